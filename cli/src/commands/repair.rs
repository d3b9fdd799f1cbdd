//! `alight repair`: what is whole of a damaged store, in a new one.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::{Damage, Error, Store};
use clap::Args;
use serde::Serialize;

use super::verify::JsonDamage;
use crate::failure::Failure;
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::units;

/// Arguments of `alight repair`.
#[derive(Debug, Args)]
pub(crate) struct RepairArgs {
    /// The damaged store's directory. It is read, and not changed. Nothing may write to it meanwhile.
    store: PathBuf,

    /// Where the new store goes: a directory that is absent or empty.
    new: PathBuf,
}

#[derive(Debug, Serialize)]
struct Repaired {
    command: &'static str,
    store: String,
    new: String,
    complete: bool,
    keys: u64,
    bytes: u64,
    commits: u64,
    keys_lost: u64,
    seconds: f64,
    damages: Vec<JsonDamage>,
    #[serde(skip)]
    time: Duration,
    #[serde(skip)]
    lines: Vec<String>,
}

pub(crate) fn run(args: &RepairArgs, output: &Output) -> Result<(), Failure> {
    let began = Instant::now();
    let progress = Progress::bytes(output, "salvaging", 0);
    let made = Store::options().repair(&args.store, &args.new, |done| progress.set(done.bytes_done, done.bytes_total));
    let report = made.map_err(|error| {
        let own = match &error {
            Error::AlreadyExists { .. } => Some("name a directory that is absent or empty"),
            Error::NotAStore { .. } => Some("check the path of the damaged store"),
            _ => None,
        };
        let failure = Failure::from(error);
        match (own, failure.remedy()) {
            (Some(remedy), _) => failure.with_remedy(remedy),
            (None, Some(_)) => failure,
            (None, None) => {
                let (store, new) = (args.store.display(), args.new.display());
                failure.with_remedy(format!("{store} is as it was; remove {new} and try again"))
            }
        }
    })?;
    drop(progress);
    let time = began.elapsed();
    let repaired = Repaired {
        command: "repair",
        store: args.store.display().to_string(),
        new: args.new.display().to_string(),
        complete: report.is_complete(),
        keys: report.keys,
        bytes: report.bytes,
        commits: report.commits,
        keys_lost: report.keys_lost,
        seconds: time.as_secs_f64(),
        damages: report.damages.iter().map(JsonDamage::from).collect(),
        time,
        lines: report.damages.iter().map(Damage::to_string).collect(),
    };
    if repaired.complete {
        return output.confirm(&repaired);
    }
    output.answer(&repaired)?;
    Err(Failure::Reported)
}

impl Report for Repaired {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        for line in &self.lines {
            writeln!(out, "damaged: {line}")?;
        }
        writeln!(
            out,
            "salvaged into {}: {}, {} in {}; {} read",
            self.new,
            units::count(self.keys, "key"),
            units::bytes(self.bytes),
            units::seconds(self.time),
            units::count(self.commits, "commit"),
        )?;
        if !self.complete {
            let lost = units::count(self.keys_lost, "key");
            writeln!(out, "{lost} known and not whole; what is named above is not there, or as it was before")?;
        }
        Ok(())
    }
}
