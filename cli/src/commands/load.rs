//! `alight load`: everything onto a device, verified, a window at a time, and how fast that was.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alight::{Metrics, RouteChoice, Snapshot, Store, TensorInfo};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{key_bytes, opened};
use crate::args::DeviceName;
use crate::failure::Failure;
use crate::output::{Output, Report, Table};
use crate::progress::Progress;
use crate::units;
use crate::window::{cut, totals, window_bytes};

/// Arguments of `alight load`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// The store's directory.
    store: PathBuf,

    /// Load only the keys that begin with this.
    #[arg(long, default_value = "", hide_default_value = true)]
    prefix: OsString,

    /// Where to: auto (the first GPU, else the host), host, cuda:N.
    #[arg(long, default_value = "auto")]
    device: DeviceName,

    /// How many times.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,

    /// How much to hold on the device at once: half of a GPU's free memory, or 128 MiB of the host's, when not given. A
    /// tensor that is larger than this is loaded alone.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_some_bytes)]
    window_bytes: Option<u64>,

    /// Keep up to this much of the page cache pinned for the GPU, so that the third time and on go at the bus's full rate.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_some_bytes)]
    pin: Option<u64>,

    /// By which route to a GPU: cuFile's direct path where there is one, or the one that is named.
    #[arg(long, value_enum, default_value_t = Via::Auto)]
    route: Via,
}

/// A route that can be asked for.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Via {
    Auto,
    Staged,
    Cufile,
}

impl From<Via> for RouteChoice {
    fn from(via: Via) -> Self {
        match via {
            Via::Auto => RouteChoice::Auto,
            Via::Staged => RouteChoice::Staged,
            Via::Cufile => RouteChoice::CuFile,
        }
    }
}

#[derive(Debug, Serialize)]
struct Loaded {
    command: &'static str,
    device: String,
    device_name: String,
    tensors: u64,
    bytes: u64,
    window_bytes: u64,
    open_seconds: f64,
    runs: Vec<LoadRun>,
}

/// One time through.
#[derive(Debug, Serialize)]
struct LoadRun {
    seconds: f64,
    gb_per_s: f64,
    windows: u64,
    #[serde(flatten)]
    route: Route,
    /// The route of the last window, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    taken: Option<String>,
    #[serde(skip)]
    time: Duration,
}

/// Which way bytes came from the disk.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Route {
    /// Past the page cache.
    pub(crate) bytes_direct: u64,
    /// Through the page cache.
    pub(crate) bytes_buffered: u64,
    /// Out of pinned pages of the page cache.
    pub(crate) bytes_pinned: u64,
    /// By cuFile.
    pub(crate) bytes_cufile: u64,
}

impl Route {
    /// What a store read between two moments.
    pub(crate) fn between(before: &Metrics, after: &Metrics) -> Self {
        Self {
            bytes_direct: after.bytes_direct - before.bytes_direct,
            bytes_buffered: after.bytes_buffered - before.bytes_buffered,
            bytes_pinned: after.bytes_pinned - before.bytes_pinned,
            bytes_cufile: after.bytes_cufile - before.bytes_cufile,
        }
    }

    /// The part that came past the page cache, in hundredths; none where nothing was read.
    pub(crate) fn direct_percent(self) -> Option<u64> {
        self.percent(self.bytes_direct)
    }

    fn percent(self, part: u64) -> Option<u64> {
        let all = self.bytes_direct + self.bytes_buffered + self.bytes_pinned + self.bytes_cufile;
        (u128::from(part) * 100 / u128::from(all.max(1))).try_into().ok().filter(|_| all > 0)
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            (self.bytes_cufile, "cuFile"),
            (self.bytes_direct, "direct"),
            (self.bytes_pinned, "pinned page cache"),
            (self.bytes_buffered, "page cache"),
        ];
        let mut some = parts.into_iter().filter(|&(bytes, _)| bytes > 0).peekable();
        if some.peek().is_none() {
            return f.write_str("nothing read");
        }
        while let Some((bytes, name)) = some.next() {
            match self.percent(bytes) {
                Some(percent) if percent < 100 => write!(f, "{percent}% {name}")?,
                _ => f.write_str(name)?,
            }
            if some.peek().is_some() {
                f.write_str(", ")?;
            }
        }
        Ok(())
    }
}

/// What one time through everything cost.
pub(crate) struct Pass {
    pub(crate) time: Duration,
    pub(crate) windows: u64,
    pub(crate) route: Route,
}

/// Gets everything under a prefix, window by window, and hands each window on; only the getting is timed.
pub(crate) fn load<T>(
    store: &Store,
    prefix: &[u8],
    window_bytes: u64,
    mut get: impl FnMut(&Snapshot, &[TensorInfo]) -> alight::Result<T>,
    mut hand_on: impl FnMut(&[TensorInfo], T) -> Result<(), Failure>,
) -> Result<Pass, Failure> {
    let snapshot = store.snapshot();
    let before = store.metrics();
    let mut pass = Pass { time: Duration::ZERO, windows: 0, route: Route::default() };
    for window in cut(snapshot.scan(prefix), window_bytes) {
        let window = window?;
        let began = Instant::now();
        let got = get(&snapshot, &window)?;
        pass.time += began.elapsed();
        pass.windows += 1;
        hand_on(&window, got)?;
    }
    pass.route = Route::between(&before, &store.metrics());
    Ok(pass)
}

pub(crate) fn run(args: LoadArgs, output: &Output) -> Result<(), Failure> {
    let prefix = key_bytes(args.prefix);
    let device = args.device.open()?;
    let began = Instant::now();
    let options = Store::options().pinned_bytes_max(args.pin.unwrap_or(0)).route(args.route.into());
    let store = opened(options, &args.store)?;
    let open_time = began.elapsed();
    let all = totals(&store.snapshot(), &prefix)?;
    if all.keys == 0 && !prefix.is_empty() {
        let failure = Failure::other("not_found", format!("no key begins with {}", alight::DisplayKey(prefix)));
        return Err(failure.with_remedy("`alight ls STORE` lists the keys"));
    }
    let window_bytes = window_bytes(&device, args.window_bytes)?;
    let progress = Progress::bytes(output, "loading", all.bytes * u64::from(args.repeat));
    let mut runs = Vec::new();
    // Taken once, for the longest window: what a program does that loads again and again.
    let mut arena = device.allocate(0)?;
    let mut into_arena = |snapshot: &Snapshot, window: &[TensorInfo]| {
        let keys = || window.iter().map(|info| &info.key);
        match snapshot.get_many_into(keys(), &mut arena) {
            Err(alight::Error::ArenaTooSmall { needed, .. }) => {
                // The old one first: there may not be room for both.
                arena = device.allocate(0)?;
                arena = device.allocate(needed)?;
                snapshot.get_many_into(keys(), &mut arena)
            }
            answer => answer,
        }
    };
    for _ in 0..args.repeat {
        let pass = load(&store, &prefix, window_bytes, &mut into_arena, |window, _| {
            progress.add(window.iter().map(|info| info.len_bytes).sum());
            Ok(())
        })?;
        runs.push(LoadRun {
            seconds: pass.time.as_secs_f64(),
            gb_per_s: units::gb_per_s(all.bytes, pass.time),
            windows: pass.windows,
            route: pass.route,
            taken: store.metrics().last_read.map(|read| read.to_string()),
            time: pass.time,
        });
    }
    drop(progress);
    output.answer(&Loaded {
        command: "load",
        device: device.to_string(),
        device_name: device.name().to_owned(),
        tensors: all.keys,
        bytes: all.bytes,
        window_bytes,
        open_seconds: open_time.as_secs_f64(),
        runs,
    })
}

impl Report for Loaded {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let (tensors, bytes) = (units::count(self.tensors, "tensor"), units::bytes(self.bytes));
        writeln!(
            out,
            "{tensors}, {bytes}, to {}, every checksum compared",
            device_words(&self.device, &self.device_name)
        )?;
        let mut table = Table::new(0);
        table.row(["run", "seconds", "rate", "windows", "route"]);
        for (number, run) in self.runs.iter().enumerate() {
            table.row([
                (number + 1).to_string(),
                units::seconds(run.time),
                units::rate(self.bytes, run.time),
                units::grouped(run.windows),
                match run.taken.as_ref().filter(|_| self.device != "host") {
                    Some(taken) => format!("{} ({taken})", run.route),
                    None => run.route.to_string(),
                },
            ]);
        }
        table.write(out)
    }
}

/// `host`, or `cuda:0 (NVIDIA H100 80GB HBM3)`.
pub(crate) fn device_words(device: &str, name: &str) -> String {
    if device == name { device.to_owned() } else { format!("{device} ({name})") }
}
