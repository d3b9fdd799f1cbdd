//! `alight backup`: a second store with everything in it, made beside whoever writes.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::Error;
use clap::Args;
use serde::Serialize;

use super::open_to_read;
use crate::failure::Failure;
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::units;

/// Arguments of `alight backup`.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// The store's directory. It may be open for writing meanwhile.
    store: PathBuf,

    /// Where the backup goes: a directory that is absent or empty. On the same file system it takes little time and space.
    backup: PathBuf,
}

#[derive(Debug, Serialize)]
struct BackedUp {
    command: &'static str,
    store: String,
    backup: String,
    last_commit: u64,
    files: u64,
    linked_bytes: u64,
    shared_bytes: u64,
    copied_bytes: u64,
    seconds: f64,
    #[serde(skip)]
    time: Duration,
}

pub(crate) fn run(args: &BackupArgs, output: &Output) -> Result<(), Failure> {
    let began = Instant::now();
    let store = open_to_read(&args.store)?;
    let progress = Progress::bytes(output, "backing up", 0);
    let made = store.backup_with_progress(&args.backup, |done| progress.set(done.bytes_done, done.bytes_total));
    let report = made.map_err(|error| {
        let taken = matches!(error, Error::AlreadyExists { .. });
        let failure = Failure::from(error);
        if taken { failure.with_remedy("name a directory that is absent or empty") } else { failure }
    })?;
    drop(progress);
    let time = began.elapsed();
    output.confirm(&BackedUp {
        command: "backup",
        store: args.store.display().to_string(),
        backup: args.backup.display().to_string(),
        last_commit: report.last_commit,
        files: report.files,
        linked_bytes: report.linked_bytes,
        shared_bytes: report.shared_bytes,
        copied_bytes: report.copied_bytes,
        seconds: time.as_secs_f64(),
        time,
    })
}

impl Report for BackedUp {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "backed up to {} as of commit {}: {} in {}, {} linked, {} shared, {} copied",
            self.backup,
            self.last_commit,
            units::count(self.files, "file"),
            units::seconds(self.time),
            units::bytes(self.linked_bytes),
            units::bytes(self.shared_bytes),
            units::bytes(self.copied_bytes),
        )?;
        writeln!(out, "it is a store like any other; `alight verify {}` reads all of it", self.backup)
    }
}
