//! `alight stat`: how large a store is, and what of it lives.

use std::io::{self, Write};
use std::path::PathBuf;

use alight::Stat;
use clap::Args;
use serde::Serialize;

use super::open_to_read;
use crate::failure::Failure;
use crate::output::{Output, Report, Table};
use crate::units;
use crate::window::totals;

/// Arguments of `alight stat`.
#[derive(Debug, Args)]
pub(crate) struct StatArgs {
    /// The store's directory.
    store: PathBuf,

    /// Print everything that is counted, in the text format of Prometheus: the store's sizes, and what this command itself
    /// read to find them out.
    #[arg(long)]
    metrics: bool,
}

/// What `--metrics` prints.
#[derive(Debug, Serialize)]
struct MetricsReport {
    command: &'static str,
    store: String,
    prometheus: String,
}

impl Report for MetricsReport {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(self.prometheus.as_bytes())
    }
}

#[derive(Debug, Serialize)]
struct StatReport {
    command: &'static str,
    store: String,
    store_id: String,
    format_version: u32,
    flags: Flags,
    last_commit: u64,
    keys: u64,
    value_bytes: u64,
    live_bytes: u64,
    blob_bytes: u64,
    dead_bytes: u64,
    file_bytes: u64,
    disk_bytes: u64,
    segments: u64,
    index_runs: u64,
    index_entries: u64,
    overlay_entries: u64,
}

/// The feature flags, as the manifest has them.
#[derive(Debug, Serialize)]
struct Flags {
    compatible: u64,
    read_only_compatible: u64,
    incompatible: u64,
}

pub(crate) fn run(args: &StatArgs, output: &Output) -> Result<(), Failure> {
    let store = open_to_read(&args.store)?;
    let stat: Stat = store.stat()?;
    if args.metrics {
        return output.answer(&MetricsReport {
            command: "stat",
            store: args.store.display().to_string(),
            prometheus: stat.prometheus() + &store.metrics().prometheus(),
        });
    }
    // Counted by a walk through the index: the store itself only knows a bound.
    let all = totals(&store.snapshot(), b"")?;
    output.answer(&StatReport {
        command: "stat",
        store: args.store.display().to_string(),
        store_id: stat.store_id.to_string(),
        format_version: stat.format_version,
        flags: Flags {
            compatible: stat.flags.compatible,
            read_only_compatible: stat.flags.read_only_compatible,
            incompatible: stat.flags.incompatible,
        },
        last_commit: stat.last_commit,
        keys: all.keys,
        value_bytes: all.bytes,
        live_bytes: stat.live_bytes,
        blob_bytes: stat.blob_bytes,
        dead_bytes: stat.blob_bytes.saturating_sub(stat.live_bytes),
        file_bytes: stat.file_bytes,
        disk_bytes: stat.disk_bytes,
        segments: stat.segments,
        index_runs: stat.runs,
        index_entries: stat.index_entries,
        overlay_entries: stat.overlay_entries,
    })
}

impl Report for StatReport {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let flags = &self.flags;
        let mut table = Table::new(2);
        let mut line = |name: &str, value: String| {
            table.row([name.to_owned(), value]);
        };
        line("keys", units::grouped(self.keys));
        line("values, living", units::bytes(self.live_bytes));
        line("values, replaced or deleted", units::bytes(self.dead_bytes));
        line("on the disk", units::bytes(self.disk_bytes));
        line("length of all files", units::bytes(self.file_bytes));
        line("segments", units::grouped(self.segments));
        line("index runs", units::grouped(self.index_runs));
        line("index entries, old ones counted", units::grouped(self.index_entries));
        line("last commit", units::grouped(self.last_commit));
        line("format version", self.format_version.to_string());
        let words = [
            ("compatible", flags.compatible),
            ("read-only-compatible", flags.read_only_compatible),
            ("incompatible", flags.incompatible),
        ];
        let set = words.iter().filter(|(_, word)| *word != 0).map(|(name, word)| format!("{name} {word:#x}"));
        let set: Vec<String> = set.collect();
        line("feature flags", if set.is_empty() { "none".into() } else { set.join(", ") });
        line("store id", self.store_id.clone());
        table.write(out)
    }
}
