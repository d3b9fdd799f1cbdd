//! `alight bench`: puts and gets beside what the disk itself gives in the same run.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::load::device_words;
use crate::args::DeviceName;
use crate::bench::{Bench, Case, Effort, Row, Unit};
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{Output, Report, Table};
use crate::place::{FileSystem, free_bytes};
use crate::units;

/// Arguments of `alight bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// A folder on the disk to measure. A temporary folder is made in it and removed at the end.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,

    /// Fewer rounds: to see that it works, not to report.
    #[arg(long)]
    quick: bool,

    /// Only this measurement; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<Case>,

    /// Where the gets land: auto (the first GPU, else the host), host, cuda:N.
    #[arg(long, default_value = "host")]
    device: DeviceName,
}

#[derive(Debug, Serialize)]
struct Benched {
    command: &'static str,
    folder: String,
    file_system: &'static str,
    raw_is_direct: bool,
    device: String,
    device_name: String,
    quick: bool,
    rows: Vec<Row>,
}

pub(crate) fn run(args: &BenchArgs, output: &Output) -> Result<(), Failure> {
    interrupt::catch()?;
    let device = args.device.open()?;
    let effort = if args.quick { Effort::Quick } else { Effort::Full };
    let needed = effort.disk_bytes();
    if let Some(free) = free_bytes(&args.folder).filter(|&free| free < needed) {
        let (needed, free) = (units::bytes(needed), units::bytes(free));
        let message = format!("{} has {free} free; the measurements take {needed}", args.folder.display());
        let remedy =
            if args.quick { "use a folder on another disk" } else { "use --quick, or a folder on another disk" };
        return Err(Failure::other("no_space", message).with_remedy(remedy));
    }
    let folder = tempfile::Builder::new().prefix("alight-bench-").tempdir_in(&args.folder);
    let folder = folder.map_err(|error| Failure::io("make a folder in", &args.folder, error))?;
    let cases: Vec<Case> =
        Case::ALL.into_iter().filter(|case| args.only.is_empty() || args.only.contains(case)).collect();
    let mut bench = Bench::new(folder.path(), &device, effort, output, &cases)?;
    let rows = cases.iter().map(|&case| bench.measure(case)).collect::<Result<Vec<_>, _>>()?;
    output.answer(&Benched {
        command: "bench",
        folder: args.folder.display().to_string(),
        file_system: FileSystem::of(folder.path()).name(),
        raw_is_direct: bench.raw_is_direct(),
        device: device.to_string(),
        device_name: device.name().to_owned(),
        quick: args.quick,
        rows,
    })
}

impl Report for Benched {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let device = device_words(&self.device, &self.device_name);
        let how = if self.quick { ", quick: not to be reported" } else { "" };
        writeln!(out, "in {} ({}), gets to {device}; medians, rounds in turns{how}", self.folder, self.file_system)?;
        let mut table = Table::new(2);
        table.row(["name", "what", "alight", "bare disk", "ratio"]);
        for row in &self.rows {
            let figure = |value: f64| match row.unit {
                Unit::GbPerSecond => format!("{value:.2} GB/s"),
                Unit::PerSecond => format!("{value:.0} /s"),
                Unit::Microseconds => format!("{value:.2} µs"),
            };
            table.row([
                row.name.to_owned(),
                row.what.to_owned(),
                figure(row.alight),
                row.raw.map_or_else(String::new, figure),
                row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            ]);
        }
        table.write(out)?;
        if !self.raw_is_direct {
            writeln!(out, "this file system has no O_DIRECT: the bare disk's figures are the page cache's too")?;
        }
        Ok(())
    }
}
