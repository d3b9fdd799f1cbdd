//! `alight verify`: every checksum in a store compared, and all damage named.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::{Damage, Error, Store};
use clap::Args;
use serde::Serialize;

use super::open_to_read;
use crate::failure::Failure;
use crate::output::{JsonKey, Output, Report};
use crate::progress::Progress;
use crate::units;

/// Arguments of `alight verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The store's directory.
    store: PathBuf,

    /// First make the index anew from the values' own frames, and the manifest where it is missing or damaged. Nothing may
    /// write to the store meanwhile; whatever fails, it is as it was.
    #[arg(long)]
    repair_index: bool,
}

#[derive(Debug, Serialize)]
struct Verified {
    command: &'static str,
    store: String,
    sound: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired_index: Option<RepairedIndex>,
    keys: u64,
    commits: u64,
    values: u64,
    bytes: u64,
    seconds: f64,
    gb_per_s: f64,
    damages: Vec<JsonDamage>,
    #[serde(skip)]
    time: Duration,
    #[serde(skip)]
    lines: Vec<String>,
}

/// What was made anew.
#[derive(Debug, Serialize)]
struct RepairedIndex {
    keys: u64,
    commits: u64,
    segments: u64,
    manifest_was_lost: bool,
}

/// A damage as programs read it.
#[derive(Debug, Serialize)]
pub(super) struct JsonDamage {
    path: String,
    offset: Option<u64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    key: Option<JsonKey>,
    what: String,
}

impl From<&Damage> for JsonDamage {
    fn from(damage: &Damage) -> Self {
        Self {
            path: damage.path.display().to_string(),
            offset: damage.offset,
            key: damage.key.as_ref().map(|key| JsonKey::new(&key.0)),
            what: damage.what.clone(),
        }
    }
}

pub(crate) fn run(args: &VerifyArgs, output: &Output) -> Result<(), Failure> {
    let began = Instant::now();
    let repaired_index = if args.repair_index { Some(repair_index(args, output)?) } else { None };
    let report = check(args, output)?;
    let time = began.elapsed();
    let verified = Verified {
        command: "verify",
        store: args.store.display().to_string(),
        sound: report.is_sound(),
        repaired_index,
        keys: report.keys,
        commits: report.commits,
        values: report.values,
        bytes: report.bytes,
        seconds: time.as_secs_f64(),
        gb_per_s: units::gb_per_s(report.bytes, time),
        damages: report.damages.iter().map(JsonDamage::from).collect(),
        time,
        lines: report.damages.iter().map(Damage::to_string).collect(),
    };
    if verified.sound {
        return output.confirm(&verified);
    }
    output.answer(&verified)?;
    Err(Failure::Reported)
}

fn repair_index(args: &VerifyArgs, output: &Output) -> Result<RepairedIndex, Failure> {
    let progress = Progress::bytes(output, "indexing", 0);
    let made = Store::options()
        .rebuild_index(&args.store, |done| progress.set(done.bytes_done, done.bytes_total))
        .map_err(|error| {
            let damaged = error.is_damage();
            let failure = Failure::from(error);
            if damaged {
                failure.with_remedy("`alight repair STORE NEW` salvages what is whole into a new store")
            } else {
                failure
            }
        })?;
    let (keys, commits, segments) = (made.keys, made.commits, made.segments);
    Ok(RepairedIndex { keys, commits, segments, manifest_was_lost: made.manifest_was_lost })
}

fn check(args: &VerifyArgs, output: &Output) -> Result<alight::VerifyReport, Failure> {
    // A store that is too damaged to be opened is a finding, not a failure to look.
    let store = match open_to_read(&args.store) {
        Ok(store) => store,
        Err(Failure::Store { error: Error::Damaged(damage), .. }) => {
            let mut report = alight::VerifyReport::default();
            report.damages.push(damage);
            return Ok(report);
        }
        Err(failure) => return Err(failure),
    };
    let progress = Progress::bytes(output, "verifying", 0);
    Ok(store.verify(|done| progress.set(done.bytes_done, done.bytes_total))?)
}

impl Report for Verified {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        if let Some(made) = &self.repaired_index {
            let what = if made.manifest_was_lost { "the manifest and the index" } else { "the index" };
            let (keys, commits) = (units::count(made.keys, "key"), units::count(made.commits, "commit"));
            writeln!(out, "made anew: {what}, of {keys} from {commits}")?;
        }
        for line in &self.lines {
            writeln!(out, "damaged: {line}")?;
        }
        let read = format!(
            "{} and {} in {}, {} read in {} ({})",
            units::count(self.keys, "key"),
            units::count(self.values, "value"),
            units::count(self.commits, "commit"),
            units::bytes(self.bytes),
            units::seconds(self.time),
            units::rate(self.bytes, self.time),
        );
        if self.sound {
            return writeln!(out, "sound: {read}");
        }
        writeln!(out, "{}: {read}", units::count(self.lines.len() as u64, "damage"))?;
        writeln!(
            out,
            "put the damaged keys again, or restore a backup; what is not named is sound. `alight verify --repair-index` \
             mends MANIFEST and index runs, `alight repair STORE NEW` salvages what is whole"
        )
    }
}
