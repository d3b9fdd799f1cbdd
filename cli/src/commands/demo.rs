//! `alight demo`: the whole way on this machine. Puts a small decoder's tensors, closes the store, opens it again, gets
//! them all onto the best device, and compares every byte with its source.
//!
//! The source is a seed for each tensor, so nothing is held in memory: the bytes are made while they are put, and made
//! again to compare. The store is in a temporary folder, which goes when the command ends, however it ends.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alight::{Device, Dtype, Snapshot, Store, Tensor, TensorInfo, TensorRef};
use clap::Args;
use serde::Serialize;

use super::load::{Pass, Route, device_words, load};
use crate::args::DeviceName;
use crate::failure::Failure;
use crate::interrupt;
use crate::model::{Model, len_bytes};
use crate::output::{Output, Report, Table};
use crate::pattern::{Pattern, PatternSource};
use crate::place::{FileSystem, free_bytes};
use crate::progress::Progress;
use crate::units;
use crate::window::window_bytes;

/// Arguments of `alight demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The folder in which to make the temporary one: chooses the disk.
    #[arg(long, value_name = "FOLDER")]
    path: Option<PathBuf>,

    /// How large the model is, about.
    #[arg(long, default_value = "1GiB", value_parser = units::parse_some_bytes)]
    size: u64,

    /// Where the tensors are got to: auto (the first GPU, else the host), host, cuda:N.
    #[arg(long, default_value = "auto")]
    device: DeviceName,

    /// Leave the store there, and say where.
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Serialize)]
struct Demo {
    command: &'static str,
    folder: String,
    file_system: &'static str,
    layers: u64,
    tensors: u64,
    bytes: u64,
    put: Step,
    open: Step,
    get: Step,
    get_route: Route,
    get_windows: u64,
    compare: Step,
    device: String,
    device_name: String,
    equal: bool,
    faster: String,
    /// Where the store is, if it was kept.
    kept: Option<String>,
}

/// How long a step took.
#[derive(Debug, Serialize)]
struct Step {
    seconds: f64,
    gb_per_s: f64,
    #[serde(skip)]
    time: Duration,
}

impl Step {
    fn new(bytes: u64, time: Duration) -> Self {
        Self { seconds: time.as_secs_f64(), gb_per_s: units::gb_per_s(bytes, time), time }
    }
}

pub(crate) fn run(args: &DemoArgs, output: &Output) -> Result<(), Failure> {
    interrupt::catch()?;
    let device = args.device.open()?;
    let model = Model::of_bytes(args.size);
    let bytes = model.len_bytes();
    let parent = args.path.clone().unwrap_or_else(std::env::temp_dir);
    check_room(&parent, bytes)?;
    let folder = tempfile::Builder::new().prefix("alight-demo-").tempdir_in(&parent);
    let folder = folder.map_err(|error| Failure::io("make a folder in", &parent, error))?;
    let path = folder.path().join("model.alight");
    let put = put(&path, &model, output)?;
    interrupt::check()?;
    let (open, get, compare) = get_and_compare(&path, &model, &device, output)?;
    let file_system = FileSystem::of(folder.path());
    let kept = if args.keep { Some(folder.keep().join("model.alight").display().to_string()) } else { None };
    output.answer(&Demo {
        command: "demo",
        folder: parent.display().to_string(),
        file_system: file_system.name(),
        layers: model.layers,
        tensors: model.tensors.len() as u64,
        bytes,
        put: Step::new(bytes, put),
        open: Step::new(0, open),
        get: Step::new(bytes, get.time),
        get_route: get.route,
        get_windows: get.windows,
        compare: Step::new(bytes, compare),
        device: device.to_string(),
        device_name: device.name().to_owned(),
        equal: true,
        faster: faster(file_system, get.route, &device),
        kept,
    })
}

/// Refuses before anything is written when the disk has no room.
fn check_room(parent: &Path, bytes: u64) -> Result<(), Failure> {
    // Beside the values: frames, and space that is taken ahead.
    let needed = bytes + bytes / 16 + (128 << 20);
    match free_bytes(parent) {
        Some(free) if free < needed => {
            let (needed, free) = (units::bytes(needed), units::bytes(free));
            let message = format!("{} has {free} free; the demo takes {needed}", parent.display());
            Err(Failure::other("no_space", message).with_remedy("choose a smaller --size, or another disk with --path"))
        }
        _ => Ok(()),
    }
}

/// The bytes of the tensor at this place in the model.
fn pattern(place: usize) -> Pattern {
    Pattern::new(place as u64 + 1)
}

/// Puts the whole model in one commit and closes the store.
fn put(path: &Path, model: &Model, output: &Output) -> Result<Duration, Failure> {
    let progress = Progress::bytes(output, "putting", model.len_bytes());
    let sources: Vec<PatternSource<'_>> =
        (0..model.tensors.len()).map(|place| PatternSource { pattern: pattern(place), progress: &progress }).collect();
    let began = Instant::now();
    let store = Store::create(path)?;
    let mut batch = store.batch();
    for ((name, shape), source) in model.tensors.iter().zip(&sources) {
        batch.put(name, TensorRef::from_reader(Dtype::BF16, shape, source, 0)?)?;
    }
    batch.commit()?;
    store.close()?;
    Ok(began.elapsed())
}

fn get_and_compare(
    path: &Path,
    model: &Model,
    device: &Device,
    output: &Output,
) -> Result<(Duration, Pass, Duration), Failure> {
    let window_bytes = window_bytes(device, None)?;
    let places: std::collections::HashMap<&[u8], usize> =
        model.tensors.iter().enumerate().map(|(place, (name, _))| (name.as_bytes(), place)).collect();
    let progress = Progress::bytes(output, "getting", model.len_bytes());
    let began = Instant::now();
    let store = Store::options().read_only(true).open(path)?;
    let open = began.elapsed();
    let mut compared = Duration::ZERO;
    let mut got = 0u64;
    let get =
        |snapshot: &Snapshot, window: &[TensorInfo]| snapshot.get_many(window.iter().map(|info| &info.key), device);
    let pass = load(&store, b"", window_bytes, get, |window, tensors| {
        interrupt::check()?;
        let began = Instant::now();
        for (info, tensor) in window.iter().zip(tensors) {
            let place = places.get(info.key.as_bytes()).copied();
            let place = place.ok_or_else(|| differs(info, "nothing was put under this key"))?;
            compare(info, tensor, &model.tensors[place].1, pattern(place))?;
            got += info.len_bytes;
            progress.add(info.len_bytes);
        }
        compared += began.elapsed();
        Ok(())
    })?;
    if got != model.len_bytes() {
        let message = format!("{} were put, but {} were got", units::bytes(model.len_bytes()), units::bytes(got));
        return Err(Failure::other("different", message));
    }
    store.close()?;
    Ok((open, pass, compared))
}

/// Compares a tensor on a device with its source.
fn compare(info: &TensorInfo, tensor: Tensor, shape: &[u64], source: Pattern) -> Result<(), Failure> {
    if tensor.dtype() != Dtype::BF16 || tensor.shape() != shape || tensor.len_bytes() != len_bytes(shape) {
        return Err(differs(info, &format!("it was put as BF16{shape:?}")));
    }
    let difference = match tensor.as_host() {
        Some(bytes) => source.first_difference(bytes),
        None => source.first_difference(&tensor.to_host()?),
    };
    match difference {
        None => Ok(()),
        Some(at) => Err(differs(info, &format!("byte {at} is not what was put"))),
    }
}

fn differs(info: &TensorInfo, what: &str) -> Failure {
    Failure::other("different", format!("{} came back different: {what}", info.key))
        .with_remedy("this should be impossible; please report it with the output of `alight demo --json`")
}

/// The one thing that would speed this up the most here.
fn faster(file_system: FileSystem, route: Route, device: &Device) -> String {
    let direct = route.direct_percent().unwrap_or(0);
    match file_system {
        FileSystem::Memory => {
            "this folder is in memory, so no disk was measured; name a folder on one with --path".into()
        }
        FileSystem::Overlay => {
            "this folder is in a container's layered file system; name a mounted disk with --path".into()
        }
        FileSystem::Network => "this folder is on a network; name one on a local disk with --path".into(),
        _ if direct < 50 => {
            "this file system does not read past the page cache (O_DIRECT); ext4 or XFS on a local disk does".into()
        }
        _ if device.is_host() => match Device::cuda_unavailable_reason() {
            Some(reason) => {
                // The rest of it is how to install a driver, which nobody asked for.
                let reason = reason.split_once(';').map_or(reason.as_str(), |(what, _)| what);
                format!("a CUDA GPU, in whose memory the tensors would land (none is used here: {reason})")
            }
            None => "a get to the GPU of this machine, with --device cuda".into(),
        },
        _ => "a faster disk: the GPU's bus was waiting for it".into(),
    }
}

impl Report for Demo {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let device = device_words(&self.device, &self.device_name);
        let (tensors, bytes) = (units::grouped(self.tensors), units::bytes(self.bytes));
        let layers = units::count(self.layers, "layer");
        writeln!(out, "a decoder of {layers}: {tensors} tensors of bf16, {bytes}, in {}", self.folder)?;
        let mut table = Table::new(1);
        let mut line = |name: &str, step: &Step| {
            let (time, rate) = (units::seconds(step.time), units::rate(self.bytes, step.time));
            table.row([format!("  {name}"), tensors.clone(), bytes.clone(), time, rate]);
        };
        line("put, one durable commit", &self.put);
        line(&format!("get to {device}, verified ({})", self.get_route), &self.get);
        line("compare with the source", &self.compare);
        table.write(out)?;
        writeln!(
            out,
            "open took {}; every byte that was got is the byte that was put",
            units::seconds(self.open.time)
        )?;
        writeln!(out, "faster here: {}", self.faster)?;
        match &self.kept {
            Some(path) => writeln!(out, "the store is kept in {path}"),
            None => Ok(()),
        }
    }
}
