//! `alight rm`: keys, or all keys with a prefix, deleted in one commit.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use alight::DisplayKey;
use clap::Args;
use serde::Serialize;

use super::{close_committed, key_bytes, open_to_write};
use crate::failure::Failure;
use crate::output::{Output, Report};
use crate::units;

/// Arguments of `alight rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The store's directory.
    store: PathBuf,

    /// The keys to delete. When one of them is missing, none is deleted.
    #[arg(required_unless_present = "prefix", conflicts_with = "prefix", value_name = "KEY")]
    keys: Vec<OsString>,

    /// Delete all keys that begin with this.
    #[arg(long)]
    prefix: Option<OsString>,
}

#[derive(Debug, Serialize)]
struct Removed {
    command: &'static str,
    deleted: u64,
    bytes: u64,
}

pub(crate) fn run(args: RmArgs, output: &Output) -> Result<(), Failure> {
    let prefix = args.prefix.map(key_bytes);
    if prefix.as_ref().is_some_and(Vec::is_empty) {
        let failure = Failure::usage("an empty prefix would delete every key");
        return Err(failure.with_remedy("to delete a whole store, remove its directory"));
    }
    let store = open_to_write(&args.store)?;
    let mut batch = store.batch();
    let mut bytes = 0;
    match &prefix {
        Some(prefix) => {
            for info in store.scan(prefix) {
                let info = info?;
                bytes += info.len_bytes;
                batch.delete(&info.key).map_err(|error| {
                    Failure::from(error).with_remedy("delete them in parts, with longer prefixes. Nothing was deleted")
                })?;
            }
            if batch.is_empty() {
                let failure =
                    Failure::other("not_found", format!("no key begins with {}", DisplayKey::from(&prefix[..])));
                return Err(failure.with_remedy("`alight ls STORE` lists the keys. Nothing was deleted"));
            }
        }
        None => {
            let mut keys: Vec<Vec<u8>> = args.keys.into_iter().map(key_bytes).collect();
            keys.sort();
            keys.dedup();
            for key in &keys {
                let Some(info) = store.info(key)? else {
                    let failure = Failure::from(alight::Error::NotFound(DisplayKey::from(&key[..])));
                    return Err(failure.with_remedy("`alight ls STORE` lists the keys. Nothing was deleted"));
                };
                bytes += info.len_bytes;
                batch.delete(key)?;
            }
        }
    }
    let deleted = batch.len() as u64;
    batch.commit()?;
    close_committed(store)?;
    output.confirm(&Removed { command: "rm", deleted, bytes })
}

impl Report for Removed {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "deleted {}, {}", units::count(self.deleted, "key"), units::bytes(self.bytes))
    }
}
