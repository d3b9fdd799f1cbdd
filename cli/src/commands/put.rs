//! `alight put`: a file, or standard input, under a key.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alight::{Dtype, TensorRef};
use clap::Args;
use serde::Serialize;

use super::{close_committed, key_bytes, open_or_create};
use crate::failure::Failure;
use crate::output::{JsonKey, Output, Report, plain_key};
use crate::progress::Progress;
use crate::source::FileSource;
use crate::units;

/// Arguments of `alight put`.
#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    /// The store's directory; made when absent.
    store: PathBuf,

    /// The key: 1 to 1024 bytes.
    key: OsString,

    /// The file that holds the value; `-` is standard input.
    file: PathBuf,

    /// The dtype of the elements, as safetensors spells it: F32, BF16, F8_E4M3.
    #[arg(long, default_value = "U8", value_parser = parse_dtype)]
    dtype: Dtype,

    /// The shape, as `4096,1024`; one dimension when not given.
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    shape: Option<Vec<u64>>,
}

fn parse_dtype(name: &str) -> Result<Dtype, String> {
    Dtype::from_name(&name.to_ascii_uppercase()).ok_or_else(|| {
        let names: Vec<&str> = Dtype::all().map(Dtype::name).collect();
        format!("use one of {}", names.join(", "))
    })
}

#[derive(Debug, Serialize)]
struct Put {
    command: &'static str,
    #[serde(flatten)]
    key: JsonKey,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
    created: bool,
    seconds: f64,
    #[serde(skip)]
    time: Duration,
    #[serde(skip)]
    plain: String,
}

pub(crate) fn run(args: PutArgs, output: &Output) -> Result<(), Failure> {
    let key = key_bytes(args.key);
    // Whatever is wrong with the key is said before a store is made for it.
    alight::Key::new(&key)?;
    let (file, len_bytes) = open_value(&args.file)?;
    let shape = match args.shape {
        Some(shape) => shape,
        None => vec![elements(args.dtype, len_bytes)?],
    };
    let progress = Progress::bytes(output, "putting", len_bytes);
    let source = FileSource { file: &file, progress: &progress };
    let value = TensorRef::from_reader(args.dtype, &shape, &source, 0)?;
    if value.len_bytes() != len_bytes {
        let message = format!(
            "{} of shape {shape:?} makes {} bytes, but {} has {len_bytes}",
            args.dtype,
            value.len_bytes(),
            args.file.display()
        );
        return Err(Failure::other("shape_mismatch", message).with_remedy("check --dtype and --shape. Nothing was put"));
    }

    let began = Instant::now();
    let (store, created) = open_or_create(&args.store)?;
    store.put(&key, value)?;
    close_committed(store)?;
    let time = began.elapsed();
    drop(progress);
    output.confirm(&Put {
        command: "put",
        key: JsonKey::new(&key),
        dtype: args.dtype.name(),
        shape,
        bytes: len_bytes,
        created,
        seconds: time.as_secs_f64(),
        time,
        plain: plain_key(&key),
    })
}

/// How many elements of a dtype a number of bytes holds.
fn elements(dtype: Dtype, len_bytes: u64) -> Result<u64, Failure> {
    let bits = u128::from(len_bytes) * 8;
    if !bits.is_multiple_of(u128::from(dtype.bits())) {
        let message = format!("{len_bytes} bytes are no whole number of {dtype} elements");
        return Err(Failure::other("shape_mismatch", message).with_remedy("check --dtype. Nothing was put"));
    }
    u64::try_from(bits / u128::from(dtype.bits())).map_err(|_| Failure::other("too_large", "the value is too large"))
}

/// The file that holds the value, and its length. What cannot be read at any place, such as a pipe, is spooled to a file
/// without a name first, since a put has to know the length.
fn open_value(path: &Path) -> Result<(File, u64), Failure> {
    if path != Path::new("-") {
        let file = File::open(path).map_err(|error| Failure::io("open", path, error))?;
        let facts = file.metadata().map_err(|error| Failure::io("look at", path, error))?;
        if facts.is_dir() {
            let failure = Failure::other("io", format!("{} is a directory", path.display()));
            return Err(failure.with_remedy("name a file"));
        }
        return if facts.is_file() { Ok((file, facts.len())) } else { spool(file, path) };
    }
    spool(io::stdin().lock(), Path::new("standard input"))
}

fn spool(mut from: impl Read, path: &Path) -> Result<(File, u64), Failure> {
    let failed = |action| move |error| Failure::io(action, path, error);
    let mut file = tempfile::tempfile().map_err(failed("make a temporary file for"))?;
    let len_bytes = io::copy(&mut from, &mut file).map_err(failed("read"))?;
    file.rewind().map_err(failed("read"))?;
    Ok((file, len_bytes))
}

impl Report for Put {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "put {} under {} ({}{:?}) in {}",
            units::bytes(self.bytes),
            self.plain,
            self.dtype,
            self.shape,
            units::seconds(self.time)
        )
    }
}
