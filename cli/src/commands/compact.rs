//! `alight compact`: space that nothing living needs, given back.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::{CompactOptions, Damage};
use clap::Args;
use serde::Serialize;

use super::{close_committed, open_to_write};
use crate::failure::Failure;
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::units;

/// Arguments of `alight compact`.
#[derive(Debug, Args)]
pub(crate) struct CompactArgs {
    /// The store's directory.
    store: PathBuf,

    /// Copy at most so much per second, for example 64MiB; as fast as it goes where nothing is said.
    #[arg(long, value_name = "BYTES", value_parser = units::parse_some_bytes)]
    rate: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Compacted {
    command: &'static str,
    store: String,
    disk_bytes_before: u64,
    disk_bytes: u64,
    live_bytes: u64,
    pinned_bytes: u64,
    not_given_back: Option<String>,
    segments_rewritten: u64,
    segments_removed: u64,
    bytes_copied: u64,
    bytes_punched: u64,
    seconds: f64,
    damages: Vec<String>,
    #[serde(skip)]
    time: Duration,
}

pub(crate) fn run(args: &CompactArgs, output: &Output) -> Result<(), Failure> {
    let began = Instant::now();
    let store = open_to_write(&args.store)?;
    let before = store.stat()?;
    let mut options = CompactOptions::default();
    if let Some(rate) = args.rate {
        options = options.bytes_per_second(rate);
    }
    let progress = Progress::bytes(output, "compacting", 0);
    let report = store.compact(&options, |done| progress.set(done.bytes_done, done.bytes_total))?;
    drop(progress);
    let after = store.stat()?;
    close_committed(store)?;
    let time = began.elapsed();
    let compacted = Compacted {
        command: "compact",
        store: args.store.display().to_string(),
        disk_bytes_before: before.disk_bytes,
        disk_bytes: after.disk_bytes,
        live_bytes: after.live_bytes,
        pinned_bytes: after.pinned_bytes,
        not_given_back: after.not_given_back,
        segments_rewritten: report.segments_rewritten,
        segments_removed: report.segments_removed,
        bytes_copied: report.bytes_copied,
        bytes_punched: report.bytes_punched,
        seconds: time.as_secs_f64(),
        damages: report.damages.iter().map(Damage::to_string).collect(),
        time,
    };
    if compacted.damages.is_empty() {
        return output.confirm(&compacted);
    }
    output.answer(&compacted)?;
    Err(Failure::Reported)
}

impl Report for Compacted {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        for line in &self.damages {
            writeln!(out, "damaged, and left as it is: {line}")?;
        }
        writeln!(
            out,
            "{} on the disk, {} before; {} live; {} copied in {}",
            units::bytes(self.disk_bytes),
            units::bytes(self.disk_bytes_before),
            units::bytes(self.live_bytes),
            units::bytes(self.bytes_copied),
            units::seconds(self.time),
        )?;
        if self.pinned_bytes > 0 {
            let kept = units::bytes(self.pinned_bytes);
            writeln!(out, "{kept} are kept for readers in other processes; compact again when they are gone")?;
        }
        if let Some(why) = &self.not_given_back {
            writeln!(out, "not all was given back: {why}")?;
        }
        Ok(())
    }
}
