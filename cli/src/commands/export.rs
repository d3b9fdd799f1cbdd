//! `alight export`: tensors to a safetensors file, which appears whole or not at all.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::{Device, TensorInfo};
use clap::Args;
use serde::Serialize;

use super::{key_bytes, open_to_read};
use crate::args::DeviceName;
use crate::failure::Failure;
use crate::interrupt;
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::safetensors::write::Plan;
use crate::target::Target;
use crate::units;
use crate::window::{cut, window_bytes};

/// Arguments of `alight export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// The store's directory.
    store: PathBuf,

    /// The file to write. It appears under its name once it is whole and on the disk.
    #[arg(value_name = "OUT.safetensors")]
    file: PathBuf,

    /// Write only the keys that begin with this, and take it off their names, as `import` put it on.
    #[arg(long, default_value = "", hide_default_value = true)]
    prefix: OsString,

    /// Leave the prefix on the names.
    #[arg(long)]
    keep_prefix: bool,

    /// Take the way through a device (auto, host, cuda:N), which shows that a round trip keeps every byte.
    #[arg(long)]
    device: Option<DeviceName>,

    /// How much to hold on the device at once.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_some_bytes, requires = "device")]
    window_bytes: Option<u64>,

    /// Replace the file if it exists.
    #[arg(short, long)]
    force: bool,
}

#[derive(Debug, Serialize)]
struct Exported {
    command: &'static str,
    file: String,
    tensors: u64,
    bytes: u64,
    device: Option<String>,
    seconds: f64,
    gb_per_s: f64,
    #[serde(skip)]
    time: Duration,
}

pub(crate) fn run(args: ExportArgs, output: &Output) -> Result<(), Failure> {
    let prefix = key_bytes(args.prefix);
    let device = args.device.as_ref().map(DeviceName::open).transpose()?;
    let store = open_to_read(&args.store)?;
    let snapshot = store.snapshot();
    let plan = Plan::new(&snapshot, &prefix, args.keep_prefix)?;
    if plan.tensors == 0 && !prefix.is_empty() {
        let shown = alight::DisplayKey(prefix.clone());
        let failure = Failure::other("not_found", format!("no key begins with {shown}"));
        return Err(failure.with_remedy("`alight ls STORE` lists the keys"));
    }

    interrupt::catch()?;
    let began = Instant::now();
    let mut target = Target::create(&args.file, args.force)?;
    let progress = Progress::bytes(output, "exporting", plan.data_bytes);
    plan.write_header(&mut target)?;
    match &device {
        None => straight(&plan, &mut target, &progress)?,
        Some(device) => through(&plan, device, window_bytes(device, args.window_bytes)?, &mut target, &progress)?,
    }
    interrupt::check()?;
    target.finish()?;
    drop(progress);
    let time = began.elapsed();
    output.confirm(&Exported {
        command: "export",
        file: args.file.display().to_string(),
        tensors: plan.tensors,
        bytes: plan.data_bytes,
        device: device.map(|device| device.to_string()),
        seconds: time.as_secs_f64(),
        gb_per_s: units::gb_per_s(plan.data_bytes, time),
        time,
    })
}

/// From the disk to the file, a few MiB at a time.
fn straight(plan: &Plan<'_>, target: &mut Target, progress: &Progress) -> Result<(), Failure> {
    for info in plan.in_order() {
        let info = info?;
        plan.snapshot.get_to_writer(&info.key, target)?;
        progress.add(info.len_bytes);
    }
    Ok(())
}

/// From the disk to the device and from there to the file, a window at a time.
fn through(
    plan: &Plan<'_>,
    device: &Device,
    window_bytes: u64,
    target: &mut Target,
    progress: &Progress,
) -> Result<(), Failure> {
    for window in cut(plan.in_order(), window_bytes) {
        let window: Vec<TensorInfo> = window?;
        let tensors = plan.snapshot.get_many(window.iter().map(|info| &info.key), device)?;
        for tensor in tensors {
            let written = match tensor.as_host() {
                Some(bytes) => target.write_all(bytes),
                None => target.write_all(&tensor.to_host()?),
            };
            written.map_err(|error| {
                if interrupt::raised() { Failure::Interrupted } else { Failure::io("write", "the file", error) }
            })?;
            progress.add(tensor.len_bytes());
        }
    }
    Ok(())
}

impl Report for Exported {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let way = self.device.as_ref().map_or_else(String::new, |device| format!(" through {device}"));
        writeln!(
            out,
            "exported {}, {}, to {}{way} in {} ({})",
            units::count(self.tensors, "tensor"),
            units::bytes(self.bytes),
            self.file,
            units::seconds(self.time),
            units::rate(self.bytes, self.time),
        )
    }
}
