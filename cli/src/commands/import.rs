//! `alight import`: the tensors of safetensors files, put under their names.
//!
//! All files are opened and judged before the store is touched: a file that is not what it should be leaves no trace,
//! not even an empty store. Values are read while they are put; no file is ever mapped or held in memory.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use alight::limits::{ENTRIES_PER_COMMIT_MAX, KEY_BYTES_MAX};
use alight::{Store, TensorRef};
use clap::Args;
use serde::Serialize;

use super::{close_committed, open_or_create};
use crate::failure::Failure;
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::safetensors::read::{Listed, SafetensorsFile};
use crate::safetensors::{METADATA_ATTRIBUTE, METADATA_NAME};
use crate::source::FileSource;
use crate::units;

/// The tensors in one commit at most where an import may be split: a commit takes some hundred bytes of memory for each.
const BATCH_TENSORS_MAX: usize = 64 << 10;

/// Arguments of `alight import`.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The store's directory; made when absent.
    store: PathBuf,

    /// Safetensors files; a model in several parts is named whole, and becomes one commit.
    #[arg(required = true, value_name = "FILE.safetensors")]
    files: Vec<PathBuf>,

    /// Put before every tensor's name to make its key.
    #[arg(long, default_value = "", hide_default_value = true)]
    prefix: String,

    /// Commit whenever this much has gathered, instead of once at the end: then a failure keeps what was committed
    /// before it.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_some_bytes)]
    batch_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Imported {
    command: &'static str,
    store: String,
    created: bool,
    files: u64,
    tensors: u64,
    bytes: u64,
    commits: u64,
    seconds: f64,
    gb_per_s: f64,
    #[serde(skip)]
    time: std::time::Duration,
}

/// One tensor that will be put.
struct Planned<'a> {
    key: String,
    listed: &'a Listed,
    file: usize,
}

pub(crate) fn run(args: &ImportArgs, output: &Output) -> Result<(), Failure> {
    let files = args.files.iter().map(|path| SafetensorsFile::open(path)).collect::<Result<Vec<_>, _>>()?;
    let planned = plan(&files, &args.prefix)?;
    let metadata = merge_metadata(&files)?;
    if args.batch_bytes.is_none() && planned.len() >= ENTRIES_PER_COMMIT_MAX {
        let tensors = units::count(planned.len() as u64, "tensor");
        let failure = Failure::other("limit_exceeded", format!("{tensors} are more than one commit can hold"));
        return Err(
            failure.with_remedy("split the import into several commits with --batch-bytes. Nothing was imported")
        );
    }
    let bytes = planned.iter().map(|planned| planned.listed.len_bytes).sum();

    let began = Instant::now();
    let (store, created) = open_or_create(&args.store)?;
    let progress = Progress::bytes(output, "importing", bytes);
    let commits = put_all(&store, args, &files, &planned, metadata.as_ref(), &progress)?;
    close_committed(store)?;
    drop(progress);
    let time = began.elapsed();
    output.confirm(&Imported {
        command: "import",
        store: args.store.display().to_string(),
        created,
        files: files.len() as u64,
        tensors: planned.len() as u64,
        bytes,
        commits,
        seconds: time.as_secs_f64(),
        gb_per_s: units::gb_per_s(bytes, time),
        time,
    })
}

/// Every tensor under its key, in the order of the keys: so they lie on the disk as a scan reads them.
fn plan<'a>(files: &'a [SafetensorsFile], prefix: &str) -> Result<Vec<Planned<'a>>, Failure> {
    let mut planned: Vec<Planned<'_>> = Vec::new();
    for (at, file) in files.iter().enumerate() {
        for listed in &file.tensors {
            let key = format!("{prefix}{}", listed.name);
            if key.is_empty() || key.len() > KEY_BYTES_MAX {
                let path = file.path.display();
                let message = format!(
                    "{path}: tensor {:?} makes a key of {} bytes; keys are 1 to {KEY_BYTES_MAX}",
                    listed.name,
                    key.len()
                );
                let remedy = "use another --prefix, or rename the tensor. Nothing was imported";
                return Err(Failure::other("invalid_key", message).with_remedy(remedy));
            }
            planned.push(Planned { key, listed, file: at });
        }
    }
    planned.sort_by(|a, b| a.key.cmp(&b.key));
    if let Some(pair) = planned.windows(2).find(|pair| pair[0].key == pair[1].key) {
        let (first, second) = (files[pair[0].file].path.display(), files[pair[1].file].path.display());
        let message = format!("tensor {:?} stands in both {first} and {second}", pair[0].listed.name);
        let remedy = "import them one by one, each with its own --prefix. Nothing was imported";
        return Err(Failure::other("duplicate_key", message).with_remedy(remedy));
    }
    Ok(planned)
}

/// The properties of all files; files that contradict each other are refused.
fn merge_metadata(files: &[SafetensorsFile]) -> Result<Option<BTreeMap<String, String>>, Failure> {
    let mut merged: Option<BTreeMap<&str, (&str, usize)>> = None;
    for (at, file) in files.iter().enumerate() {
        let Some(metadata) = &file.metadata else { continue };
        let merged = merged.get_or_insert_default();
        for (name, value) in metadata {
            let (found, whose) = *merged.entry(name).or_insert((value, at));
            if found != value {
                let (first, second) = (files[whose].path.display(), file.path.display());
                let message = format!("{first} and {second} disagree about {name:?} in {METADATA_NAME}");
                let remedy = "import them one by one, each with its own --prefix. Nothing was imported";
                return Err(Failure::other("metadata_conflict", message).with_remedy(remedy));
            }
        }
    }
    let owned = |(name, (value, _)): (&str, (&str, usize))| (name.to_owned(), value.to_owned());
    Ok(merged.map(|merged| merged.into_iter().map(owned).collect()))
}

/// Puts everything; says in how many commits.
fn put_all(
    store: &Store,
    args: &ImportArgs,
    files: &[SafetensorsFile],
    planned: &[Planned<'_>],
    metadata: Option<&BTreeMap<String, String>>,
    progress: &Progress,
) -> Result<u64, Failure> {
    let sources: Vec<FileSource<'_>> = files.iter().map(|file| FileSource { file: &file.file, progress }).collect();
    let metadata = metadata.map(serde_json::to_vec).transpose();
    let metadata = metadata.map_err(|error| Failure::other("json", error.to_string()))?;
    let mut batch = store.batch();
    if let Some(bytes) = &metadata {
        let (name, value) = METADATA_ATTRIBUTE;
        let key = format!("{}{METADATA_NAME}", args.prefix);
        batch.put_with_attributes(key, bytes, vec![(name.to_owned(), value.to_vec())])?;
    }
    let mut commits = 0;
    for Planned { key, listed, file } in planned {
        let full = |bytes_max| batch.payload_bytes() + listed.len_bytes > bytes_max || batch.len() >= BATCH_TENSORS_MAX;
        if !batch.is_empty() && args.batch_bytes.is_some_and(full) {
            let batch = std::mem::replace(&mut batch, store.batch());
            batch.commit().map_err(|error| cut_short(error, commits))?;
            commits += 1;
        }
        let value = TensorRef::from_reader(listed.dtype, &listed.shape, &sources[*file], listed.offset)?;
        batch.put(key, value).map_err(|error| cut_short(error, commits))?;
    }
    if !batch.is_empty() {
        batch.commit().map_err(|error| cut_short(error, commits))?;
        commits += 1;
    }
    Ok(commits)
}

/// What the failure of one commit means for the import as a whole.
fn cut_short(error: alight::Error, commits: u64) -> Failure {
    let failure = Failure::from(error);
    let kept = match commits {
        0 => "Nothing was imported".to_owned(),
        commits => format!("{} made before it stay", units::count(commits, "commit")),
    };
    let remedy = failure.remedy().map_or_else(String::new, |remedy| format!("{remedy}. "));
    failure.with_remedy(remedy + &kept)
}

impl Report for Imported {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.created {
            writeln!(out, "made {}", self.store)?;
        }
        writeln!(
            out,
            "imported {}, {}, from {} in {} ({}), as {}",
            units::count(self.tensors, "tensor"),
            units::bytes(self.bytes),
            units::count(self.files, "file"),
            units::seconds(self.time),
            units::rate(self.bytes, self.time),
            units::count(self.commits, "commit"),
        )
    }
}
