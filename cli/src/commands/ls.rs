//! `alight ls`: keys in order, with what is known of their values. Holds one key at a time.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use alight::{Snapshot, TensorInfo};
use clap::Args;
use serde::Serialize;

use super::{key_bytes, open_to_read};
use crate::failure::Failure;
use crate::output::{JsonKey, Output, error_value, plain_key, stdout_failed};
use crate::units;

/// Arguments of `alight ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The store's directory.
    store: PathBuf,

    /// List only the keys that begin with this.
    #[arg(default_value = "", hide_default_value = true)]
    prefix: OsString,

    /// Show dtype, shape and size too.
    #[arg(short, long)]
    long: bool,
}

#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    key: JsonKey,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
}

pub(crate) fn run(args: LsArgs, output: &Output) -> Result<(), Failure> {
    let prefix = key_bytes(args.prefix);
    let store = open_to_read(&args.store)?;
    let snapshot = store.snapshot();
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let outcome = if output.is_json() {
        list_json(&snapshot, &prefix, &mut out)
    } else {
        list_lines(&snapshot, &prefix, args.long, &mut out)
    };
    outcome.and_then(|()| out.flush().map_err(stdout_failed))
}

fn list_lines(snapshot: &Snapshot, prefix: &[u8], long: bool, out: &mut dyn Write) -> Result<(), Failure> {
    for info in snapshot.scan(prefix) {
        let info = info?;
        let line = if long { long_line(&info) } else { plain_key(info.key.as_bytes()) };
        writeln!(out, "{line}").map_err(stdout_failed)?;
    }
    Ok(())
}

/// Figures first: a key may be of any length.
fn long_line(info: &TensorInfo) -> String {
    let shape: Vec<String> = info.shape.iter().map(u64::to_string).collect();
    let shape = format!("[{}]", shape.join(","));
    format!(
        "{:>11}  {:11} {shape:16} {}",
        units::bytes(info.len_bytes),
        info.dtype.name(),
        plain_key(info.key.as_bytes())
    )
}

/// One document, written as it comes. When the listing breaks off, the document still ends well, and says why.
fn list_json(snapshot: &Snapshot, prefix: &[u8], out: &mut dyn Write) -> Result<(), Failure> {
    let mut put = |text: &str| out.write_all(text.as_bytes()).map_err(stdout_failed);
    put("{\n  \"command\": \"ls\",\n  \"entries\": [")?;
    let mut first = true;
    for info in snapshot.scan(prefix) {
        let info = match info {
            Ok(info) => info,
            Err(error) => {
                let failure = Failure::from(error);
                put(&format!("\n  ],\n  \"error\": {}\n}}\n", error_value(&failure)))?;
                out.flush().map_err(stdout_failed)?;
                return Err(Failure::Reported);
            }
        };
        let listed = Listed {
            key: JsonKey::new(info.key.as_bytes()),
            dtype: info.dtype.name(),
            shape: info.shape,
            bytes: info.len_bytes,
        };
        let listed = serde_json::to_string(&listed).map_err(|error| Failure::other("json", error.to_string()))?;
        put(if first { "\n    " } else { ",\n    " })?;
        put(&listed)?;
        first = false;
    }
    put(if first { "]\n}\n" } else { "\n  ]\n}\n" })
}
