//! `alight get`: a value's bytes, verified, to a file or to standard output.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{key_bytes, open_to_read};
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{JsonKey, Output, Report, plain_key, stdout_failed};
use crate::target::Target;
use crate::units;

/// Arguments of `alight get`.
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The store's directory.
    store: PathBuf,

    /// The key.
    key: OsString,

    /// Write to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Replace the file if it exists; without a file, write to a terminal too.
    #[arg(short, long)]
    force: bool,
}

#[derive(Debug, Serialize)]
struct Got {
    command: &'static str,
    #[serde(flatten)]
    key: JsonKey,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
    file: String,
    #[serde(skip)]
    plain: String,
}

pub(crate) fn run(args: GetArgs, output: &Output) -> Result<(), Failure> {
    let key = key_bytes(args.key);
    let Some(path) = args.output else {
        return to_stdout(&args.store, &key, args.force, output);
    };
    interrupt::catch()?;
    let store = open_to_read(&args.store)?;
    let snapshot = store.snapshot();
    if !snapshot.contains(&key)? {
        return Err(alight::Error::NotFound(alight::DisplayKey(key)).into());
    }
    let mut target = Target::create(&path, args.force)?;
    let info = snapshot.get_to_writer(&key, &mut target)?;
    target.finish()?;
    output.confirm(&Got {
        command: "get",
        key: JsonKey::new(&key),
        dtype: info.dtype.name(),
        shape: info.shape,
        bytes: info.len_bytes,
        file: path.display().to_string(),
        plain: plain_key(&key),
    })
}

fn to_stdout(store: &Path, key: &[u8], force: bool, output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        let failure = Failure::usage("with --json, standard output carries the document and not the value");
        return Err(failure.with_remedy("name a file with -o FILE"));
    }
    if io::stdout().is_terminal() && !force {
        let failure = Failure::usage("a value's bytes are not for a terminal");
        return Err(failure.with_remedy("name a file with -o FILE, redirect the output, or insist with --force"));
    }
    let store = open_to_read(store)?;
    let mut out = io::BufWriter::with_capacity(1 << 20, io::stdout().lock());
    store.get_to_writer(key, &mut out)?;
    out.flush().map_err(stdout_failed)
}

impl Report for Got {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let (bytes, plain) = (units::bytes(self.bytes), &self.plain);
        writeln!(out, "got {bytes} of {plain} ({}{:?}) to {}", self.dtype, self.shape, self.file)
    }
}
