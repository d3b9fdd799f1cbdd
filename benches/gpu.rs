//! What the way between a GPU and the disk gives: loads warm, cold and in a fresh process, thousands of tensors, small gets,
//! a large put, checksums on the device. Each row is beside the ceiling that this program measures itself, on the same disk in
//! the same run, by turns: both move by a third from one minute to the next.
//!
//! `cargo bench --bench gpu -- [--dir DIR] [--gib N]`: 8 GiB where nothing is said, and four times that on the disk in DIR
//! (`TMPDIR`). Without a GPU it says so and measures nothing; with `--host` it measures values one by one to the host, and
//! nothing else. What is cold needs the page cache dropped, and so root: those rows are left out for others.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};

use alight::cufile::{Access, CuFile, Transfer};
use alight::storage::{AlignedBuf, Caching, FileStorage, OpenMode, Storage};
use alight::{Device, DeviceBuffer, Dtype, Error, PrefetchConfig, RouteChoice, Store, StoreOptions, Tensor};

const MIB: u64 = 1 << 20;

/// Bytes that look random (xorshift64*), never zeros.
fn random_bytes(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len as usize];
    for place in bytes.as_chunks_mut::<8>().0 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *place = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    bytes
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6
}

/// A row of the table: what, how much, and what part of which ceiling.
fn row(what: &str, value: f64, unit: &str, ceiling: Option<(&str, f64)>) {
    match ceiling {
        Some((name, ceiling)) if ceiling > 0.0 => {
            println!("{what:<52} {value:>8.2} {unit:<5} {:>6.3} of {name} ({ceiling:.2})", value / ceiling);
        }
        _ => println!("{what:<52} {value:>8.2} {unit}"),
    }
}

fn drop_caches() -> bool {
    let dropped = Command::new("sync").status().is_ok()
        && fs::OpenOptions::new()
            .write(true)
            .open("/proc/sys/vm/drop_caches")
            .and_then(|mut file| file.write_all(b"3"))
            .is_ok();
    if !dropped {
        println!("the page cache cannot be dropped (needs root): no cold rows");
    }
    dropped
}

/// Brings every segment into the page cache.
fn warm(store: &Path) {
    let mut buffer = vec![0; 8 << 20];
    for entry in fs::read_dir(store.join("segments")).expect("segments") {
        let mut file = fs::File::open(entry.expect("a name").path()).expect("open");
        while file.read(&mut buffer).expect("read") > 0 {}
    }
}

fn read_only() -> StoreOptions {
    Store::options().read_only(true)
}

fn names(count: u64) -> Vec<String> {
    (0..count).map(|n| format!("layers.{n:05}.weight")).collect()
}

/// Peak resident memory of this process, in MiB: all of it, and what is no file's.
fn memory_mib() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    (field("VmHWM:").unwrap_or(0) / 1024, field("RssAnon:").unwrap_or(0) / 1024)
}

/// Writes a file past the page cache, as fast as the disk takes it, and syncs it. Space is taken ahead, untimed.
fn raw_write(path: &Path, bytes: u64) -> Duration {
    const THREADS: u64 = 8;
    let block = 4 * MIB;
    let file = FileStorage::new().open(path, OpenMode::CreateTruncate).expect("open");
    file.allocate(0, bytes).expect("allocate");
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let file = &file;
            scope.spawn(move || {
                let mut buffer = AlignedBuf::zeroed(block as usize);
                buffer.copy_from_slice(&random_bytes(thread + 1, block));
                for at in (thread * block..bytes).step_by((THREADS * block) as usize) {
                    alight::storage::write_all_at(&**file, &buffer, at, Caching::Direct).expect("write");
                }
            });
        }
    });
    file.sync().expect("sync");
    began.elapsed()
}

/// Puts tensors out of GPU memory in one durable commit, by turns with as many bytes written to the bare disk. Leaves the store.
fn puts(path: &Path, raw: &Path, keys: &[String], tensors: &[Tensor]) {
    let bytes: u64 = tensors.iter().map(Tensor::len_bytes).sum();
    let (mut times, mut raw_times) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        raw_times.push(raw_write(raw, bytes));
        if path.exists() {
            fs::remove_dir_all(path).expect("remove");
        }
        let store = Store::create(path).expect("create");
        let began = Instant::now();
        let mut batch = store.batch();
        for (key, tensor) in keys.iter().zip(tensors) {
            batch.put(key, tensor).expect("put");
        }
        batch.commit().expect("commit");
        times.push(began.elapsed());
        store.close().expect("close");
    }
    let disk = ("the disk's median", rate(bytes, median(&raw_times)));
    row("durable put from GPU memory, median of 3", rate(bytes, median(&times)), "GB/s", Some(disk));
}

/// The bus's rate: one long copy from pinned memory after another. The process's context is alight's too.
fn bus_ceiling() -> f64 {
    const LEN: usize = 1 << 30;
    let context = cudarc::driver::CudaContext::new(0).expect("a context");
    let stream = context.new_stream().expect("a stream");
    #[allow(unsafe_code, reason = "new memory is not initialised; it is filled and copied over below")]
    // SAFETY: plain bytes, all of them written before any is read.
    let (mut host, mut device) = unsafe {
        (context.alloc_pinned::<u8>(LEN).expect("pinned memory"), stream.alloc::<u8>(LEN).expect("device memory"))
    };
    let pattern = random_bytes(1, MIB);
    let bytes = host.as_mut_slice().expect("pinned memory");
    bytes.chunks_mut(pattern.len()).for_each(|chunk| chunk.copy_from_slice(&pattern));
    stream.memcpy_htod(&host, &mut device).expect("copy");
    stream.synchronize().expect("synchronize");
    let began = Instant::now();
    for _ in 0..6 {
        stream.memcpy_htod(&host, &mut device).expect("copy");
    }
    stream.synchronize().expect("synchronize");
    rate(6 * LEN as u64, began.elapsed())
}

/// What a thing gives, between what the bus gives before it and after it: the mean of both.
fn beside_the_bus<T>(measure: impl FnOnce() -> T) -> (T, (&'static str, f64)) {
    let before = bus_ceiling();
    let found = measure();
    (found, ("the bus", f64::midpoint(before, bus_ceiling())))
}

/// Reads a file past the page cache from its start, as a plain program would.
fn raw_read(path: &Path, threads: usize, block: u64) -> f64 {
    let file = FileStorage::new().open(path, OpenMode::Read).expect("open");
    let bytes = file.facts().expect("facts").len_bytes / block * block;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads as u64 {
            let file = &file;
            scope.spawn(move || {
                let mut buffer = AlignedBuf::zeroed(block as usize);
                for at in (thread * block..bytes).step_by(threads * block as usize) {
                    alight::storage::read_exact_at(&**file, &mut buffer, at, Caching::Direct).expect("read");
                }
            });
        }
    });
    rate(bytes, began.elapsed())
}

/// Reads of 4 KiB past the page cache, at random places of a file.
fn disk_reads(path: &Path) -> impl FnMut() -> Duration {
    let file = FileStorage::new().open(path, OpenMode::Read).expect("open");
    let blocks = file.facts().expect("facts").len_bytes / 4096;
    let mut buffer = AlignedBuf::zeroed(4096);
    let mut place = 0u64;
    move || {
        place = place.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let began = Instant::now();
        alight::storage::read_exact_at(&*file, &mut buffer, place % blocks * 4096, Caching::Direct).expect("read");
        began.elapsed()
    }
}

/// What cuFile itself reads of a file into GPU memory, by 16 threads and 4 MiB a call, the best way of a plain program; and a
/// store that reads by it, by turns.
fn by_cufile(store: &Path, segment: &Path, keys: &[String], gpu: &Device) {
    const THREADS: u64 = 16;
    const BLOCK: u64 = 4 * MIB;
    let file = match CuFile::get().and_then(|cufile| cufile.open(segment, Access::Read)) {
        Ok(file) => file,
        Err(error) => return println!("no cuFile: {error}"),
    };
    // A quarter: this disk is no faster by it, and it takes as long.
    let keys = &keys[..keys.len() / 4];
    let bytes = keys.len() as u64 * 32 * MIB;
    let mut memory: Vec<DeviceBuffer> = (0..THREADS).map(|_| gpu.allocate(bytes / THREADS).expect("memory")).collect();
    let mut plain = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (thread, memory) in (0..THREADS).zip(&mut memory) {
                let file = &file;
                scope.spawn(move || {
                    for at in (0..bytes / THREADS).step_by(BLOCK as usize) {
                        let file_offset = (at / BLOCK * THREADS + thread) * BLOCK;
                        let part = Transfer { file_offset, buffer_offset: at, len_bytes: BLOCK };
                        file.read_into(memory, part).expect("a read by cuFile");
                    }
                });
            }
        });
        rate(bytes, began.elapsed())
    };
    let options = || read_only().route(RouteChoice::CuFile);
    // cuFile makes its own buffers and threads with the first transfers.
    plain();
    load(options(), store, keys, gpu, 1);
    let (mut raw, mut times) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        raw.push(plain());
        times.extend(load(options(), store, keys, gpu, 1));
    }
    raw.sort_unstable_by(f64::total_cmp);
    row("cold load by cuFile, median of 5", rate(bytes, median(&times)), "GB/s", Some(("cuFile's median", raw[2])));
    row("cold load by cuFile, best of 5", rate(bytes, best(&times)), "GB/s", Some(("cuFile's best", raw[4])));
}

/// Everything of a store, `rounds` times into the same memory.
fn load(options: StoreOptions, path: &Path, keys: &[String], gpu: &Device, rounds: usize) -> Vec<Duration> {
    let store = options.open(path).expect("open");
    let mut nothing = gpu.allocate(0).expect("no memory");
    let Err(Error::ArenaTooSmall { needed, .. }) = store.get_many_into(keys, &mut nothing) else {
        panic!("there is something to load")
    };
    let mut arena = gpu.allocate(needed).expect("memory");
    (0..rounds)
        .map(|_| {
            let began = Instant::now();
            store.get_many_into(keys, &mut arena).expect("get");
            began.elapsed()
        })
        .collect()
}

/// GPU memory that is taken beyond what was asked for: by a load of everything, afterwards, and with gets in the order of the
/// disk that are fetched ahead.
fn gpu_memory(path: &Path, keys: &[String], gpu: &Device) {
    let free = || gpu.memory_bytes().expect("a GPU").expect("its memory").free;
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let store = read_only().open(path).expect("open");
    // The ring, the kernels and the driver's own.
    drop(store.get(&keys[0], gpu).expect("get"));
    let before = free();
    let tensors = store.get_many(keys, gpu).expect("get");
    let asked: u64 = tensors.iter().map(Tensor::len_bytes).sum();
    row("GPU memory beyond the tensors' own, loaded", mib(before.saturating_sub(free())) - mib(asked), "MiB", None);
    drop(tensors);
    row("GPU memory kept after they are dropped", mib(before.saturating_sub(free())), "MiB", None);
    drop(store);
    let config = PrefetchConfig { slot_bytes: 32 * MIB, ..PrefetchConfig::default() };
    let store = read_only().prefetch(config).open(path).expect("open");
    let taken = keys.iter().map(|key| {
        let tensor = store.get(key, gpu).expect("get");
        mib(before.saturating_sub(free())) - mib(tensor.len_bytes())
    });
    let most = taken.fold(0.0, f64::max);
    row("GPU memory beyond one tensor's, prefetching", most, "MiB", None);
    row("  what the prefetcher may take", mib(config.memory_bytes()), "MiB", None);
}

/// How values are got one after another, in the order of the disk.
#[derive(Clone, Copy)]
enum OneByOne {
    Gets,
    Prefetched,
    Stream,
}

impl OneByOne {
    const ALL: [(OneByOne, &str); 3] =
        [(OneByOne::Gets, "get, one by one"), (OneByOne::Prefetched, "get, prefetched"), (OneByOne::Stream, "stream")];

    /// Gets everything once, and holds one at a time.
    fn run(self, path: &Path, keys: &[String], device: &Device) -> Duration {
        let options = match self {
            OneByOne::Prefetched => read_only().prefetch(PrefetchConfig::default()),
            _ => read_only(),
        };
        let store = options.open(path).expect("open");
        let began = Instant::now();
        match self {
            OneByOne::Stream => store.stream(keys, device).for_each(|tensor| drop(tensor.expect("a tensor"))),
            _ => keys.iter().for_each(|key| drop(store.get(key, device).expect("get"))),
        }
        let time = began.elapsed();
        if let OneByOne::Prefetched = self {
            let counts = store.metrics().prefetch;
            // What is short and in the page cache is not looked for.
            let looked_for = counts.hits + counts.late + counts.misses;
            assert!(counts.failed == 0 && looked_for <= keys.len() as u64, "{counts:?}");
        }
        time
    }
}

/// Values of one length, one after another, cold and warm, by every way to get them.
fn one_by_one(folder: &Path, device: &Device, bytes: u64, len: u64) {
    let path = folder.join("in-order");
    let keys = names(bytes / len);
    let source = random_bytes(7, 65 * MIB);
    let store = Store::create(&path).expect("create");
    for keys in keys.chunks((64 * MIB / len) as usize) {
        let mut batch = store.batch();
        for (n, key) in keys.iter().enumerate() {
            let start = n * len as usize + n * 4099 % (1 << 19);
            batch.put(key, &source[start % (64 << 20)..][..len as usize]).expect("put");
        }
        batch.commit().expect("commit");
    }
    store.close().expect("close");
    let segments = fs::read_dir(path.join("segments")).expect("segments");
    let segments: Vec<PathBuf> = segments.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let bytes = len * keys.len() as u64;
    let what = |how: &str, state: &str| format!("{} KiB, {how}, {state}, median of 3", len >> 10);
    // The first opens the driver, loads the kernels and makes the ring.
    for (way, _) in OneByOne::ALL {
        way.run(&path, &keys[..8.min(keys.len())], device);
    }
    if drop_caches() {
        let (mut times, mut raw) = ([const { Vec::new() }; 3], Vec::new());
        for _ in 0..3 {
            drop_caches();
            raw.push(segments.iter().map(|segment| raw_read(segment, 8, 4 * MIB)).sum::<f64>() / segments.len() as f64);
            for (times, (way, _)) in times.iter_mut().zip(OneByOne::ALL) {
                drop_caches();
                times.push(way.run(&path, &keys, device));
            }
        }
        let disk = ("the disk", raw.iter().copied().fold(0.0, f64::max));
        for (times, (_, how)) in times.iter().zip(OneByOne::ALL) {
            row(&what(how, "cold"), rate(bytes, median(times)), "GB/s", Some(disk));
        }
    }
    warm(&path);
    let mut times = [const { Vec::new() }; 3];
    let mut by_turns = || {
        for _ in 0..3 {
            for (times, (way, _)) in times.iter_mut().zip(OneByOne::ALL) {
                times.push(way.run(&path, &keys, device));
            }
        }
    };
    let bus = if device.is_host() {
        by_turns();
        None
    } else {
        Some(beside_the_bus(by_turns).1)
    };
    for (times, (_, how)) in times.iter().zip(OneByOne::ALL) {
        row(&what(how, "page cache"), rate(bytes, median(times)), "GB/s", bus);
    }
    fs::remove_dir_all(&path).expect("remove");
}

fn best(times: &[Duration]) -> Duration {
    *times.iter().min().expect("a round")
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 2]
}

/// A process of its own: opens, loads, says how long that took, CUDA's context aside.
fn fresh(path: &Path, count: u64) {
    let gpu = Device::cuda(0).expect("a GPU");
    let keys = names(count);
    let (_, before) = memory_mib();
    let began = Instant::now();
    let store = read_only().open(path).expect("open");
    let tensors = store.get_many(&keys, &gpu).expect("get");
    let time = began.elapsed();
    let (_, after) = memory_mib();
    let bytes: u64 = tensors.iter().map(Tensor::len_bytes).sum();
    println!("{} {} {}", time.as_nanos(), bytes, after.saturating_sub(before));
}

fn in_fresh_process(path: &Path, count: u64) -> (Duration, u64, u64) {
    let program = env::current_exe().expect("this program");
    let output = Command::new(program).args(["--fresh".as_ref(), path.as_os_str()]).arg(count.to_string()).output();
    let output = String::from_utf8(output.expect("a process").stdout).expect("text");
    let numbers: Vec<u64> = output.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    (Duration::from_nanos(numbers[0]), numbers[1], numbers[2])
}

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    if let Some(at) = args.iter().position(|arg| arg == "--fresh") {
        return fresh(args[at + 1].as_ref(), args[at + 2].parse().expect("a number"));
    }
    let gib: u64 = value("--gib").map_or(8, |text| text.parse().expect("--gib takes a number"));
    let within = value("--dir").map_or_else(env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(within).expect("a temporary folder");
    if args.iter().any(|arg| arg == "--host") {
        [MIB, 64 << 10].into_iter().for_each(|len| one_by_one(folder.path(), &Device::host(), (gib << 30) / 4, len));
        return;
    }
    let gpu = match Device::cuda(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("skipped: {error}");
            assert!(env::var_os("ALIGHT_REQUIRE_GPU").is_none(), "ALIGHT_REQUIRE_GPU is set");
            return;
        }
    };

    // A large put out of GPU memory, made durable.
    let total = gib << 30;
    let raw = folder.path().join("raw");
    let large = folder.path().join("large");
    let count = total / (32 * MIB);
    let keys = names(count);
    let tensors: Vec<Tensor> = (0..count)
        .map(|n| {
            let bytes = random_bytes(n + 1, 32 * MIB);
            Tensor::from_host(Dtype::BF16, &[16 * MIB], &bytes, &gpu).expect("upload")
        })
        .collect();
    puts(&large, &raw, &keys, &tensors);
    drop(tensors);

    // Cold, then warm.
    // By turns with a plain program that reads the same file, in the better of two ways.
    if drop_caches() {
        let segment =
            fs::read_dir(large.join("segments")).expect("segments").filter_map(|entry| Some(entry.ok()?.path()));
        let segment = segment.max_by_key(|path| fs::metadata(path).map_or(0, |facts| facts.len())).expect("a segment");
        let (mut times, mut raw) = (Vec::new(), Vec::new());
        for round in 0..5 {
            raw.push(raw_read(&segment, [8, 16][round % 2], [4 * MIB, MIB][round % 2]));
            times.extend(load(read_only(), &large, &keys, &gpu, 1));
        }
        raw.sort_unstable_by(f64::total_cmp);
        let (disk_median, disk_best) =
            (("the disk's median", raw[raw.len() / 2]), ("the disk's best", raw[raw.len() - 1]));
        row("cold load, median of 5", rate(total, median(&times)), "GB/s", Some(disk_median));
        row("cold load, best of 5", rate(total, best(&times)), "GB/s", Some(disk_best));
        by_cufile(&large, &segment, &keys, &gpu);
    }
    warm(&large);
    let (times, bus) = beside_the_bus(|| load(read_only(), &large, &keys, &gpu, 9));
    row("warm load, staged, median of 9", rate(total, median(&times)), "GB/s", Some(bus));
    row("warm load, staged, best of 9", rate(total, best(&times)), "GB/s", Some(bus));
    let options = || read_only().pinned_bytes_max(2 * total);
    let (times, bus) = beside_the_bus(|| load(options(), &large, &keys, &gpu, 9));
    row("warm load, pages pinned: the 1st", rate(total, times[0]), "GB/s", Some(bus));
    row("warm load, pages pinned: median of the 3rd to 9th", rate(total, median(&times[2..])), "GB/s", Some(bus));
    let (mut fresh, bus) =
        beside_the_bus(|| (0..5).map(|_| in_fresh_process(&large, count)).collect::<Vec<(Duration, u64, u64)>>());
    fresh.sort_unstable();
    row("warm load, fresh process, median of 5", rate(total, fresh[2].0), "GB/s", Some(bus));
    let memory = fresh.iter().map(|run| run.2).max().unwrap_or(0);
    row("host memory above the process's own, at most", memory as f64, "MiB", None);

    gpu_memory(&large, &keys, &gpu);

    let began = Instant::now();
    drop(gpu.allocate(total).expect("memory"));
    row("taking and freeing as much GPU memory", began.elapsed().as_secs_f64() * 1e3, "ms", None);

    // Verification: what the checksums of as many bytes take on the device.
    let mut memory = gpu.allocate(total).expect("memory");
    memory.copy_from_host(0, &random_bytes(3, 256 * MIB)).expect("upload");
    let places: Vec<_> = (0..count).map(|n| n * 32 * MIB..(n + 1) * 32 * MIB).collect();
    let crc_time = (0..5).map(|_| {
        let began = Instant::now();
        memory.crc32(&places).expect("checksums");
        began.elapsed()
    });
    let crc_time = crc_time.min().expect("a round");
    row("CRC-32 on the GPU", rate(total, crc_time), "GB/s", None);
    row(
        "verification, part of a pinned warm load",
        100.0 * crc_time.as_secs_f64() / best(&times).as_secs_f64(),
        "%",
        None,
    );
    drop(memory);
    fs::remove_dir_all(&large).expect("remove");

    // Thousands of tensors of 64 KiB to 4 MiB.
    let many = folder.path().join("many");
    let count = 20_000 * gib / 8;
    let keys = names(count);
    let lens: Vec<u64> = (0..count).map(|n| (64 << 10) << (n * 5 % 7)).collect();
    let all: u64 = lens.iter().sum();
    let source = random_bytes(5, 64 * MIB);
    let store = Store::create(&many).expect("create");
    for (keys, lens) in keys.chunks(1000).zip(lens.chunks(1000)) {
        let mut batch = store.batch();
        for (n, (key, &len)) in keys.iter().zip(lens).enumerate() {
            let start = n * 48_611 % (60 << 20);
            batch.put(key, &source[start..start + len as usize]).expect("put");
        }
        batch.commit().expect("commit");
    }
    store.close().expect("close");
    warm(&many);
    let what = format!("warm load of {count} tensors, staged, median of 5");
    let (times, bus) = beside_the_bus(|| load(read_only(), &many, &keys, &gpu, 5));
    row(&what, rate(all, median(&times)), "GB/s", Some(bus));
    let (times, bus) = beside_the_bus(|| load(read_only().pinned_bytes_max(2 * all), &many, &keys, &gpu, 5));
    let what = format!("warm load of {count} tensors, pinned, the 5th");
    row(&what, rate(all, times[4]), "GB/s", Some(bus));
    let ((time, bytes, _), bus) = beside_the_bus(|| in_fresh_process(&many, count));
    row("the same, staged, fresh process", rate(bytes, time), "GB/s", Some(bus));
    fs::remove_dir_all(&many).expect("remove");

    // Values in the order of the disk, one by one.
    [MIB, 64 << 10].into_iter().for_each(|len| one_by_one(folder.path(), &gpu, total / 4, len));

    // One value of 4 KiB after another.
    let small = folder.path().join("small");
    let keys = names(5000);
    let store = Store::create(&small).expect("create");
    let mut batch = store.batch();
    for (n, key) in keys.iter().enumerate() {
        batch.put(key, &source[n * 4096..(n + 1) * 4096]).expect("put");
    }
    batch.commit().expect("commit");
    store.close().expect("close");
    let gets = |rounds: usize, before_each: &mut dyn FnMut()| {
        let store = read_only().open(&small).expect("open");
        store.get(&keys[0], &gpu).expect("get");
        (0..rounds)
            .map(|n| {
                before_each();
                let key = &keys[n * 7919 % keys.len()];
                let began = Instant::now();
                let tensor = store.get(key, &gpu).expect("get");
                let time = began.elapsed();
                drop(tensor);
                time
            })
            .collect::<Vec<_>>()
    };
    if drop_caches() {
        let mut from_disk = disk_reads(&raw);
        let mut raw_times = Vec::new();
        let mut times = gets(2000, &mut || raw_times.push(from_disk()));
        let (p50, raw_p50) = (percentile(&mut times, 50), percentile(&mut raw_times, 50));
        row("4 KiB read of the disk, p50", raw_p50, "us", None);
        row("4 KiB get, cold, by turns with it, p50", p50, "us", None);
        row("  above the disk's", p50 - raw_p50, "us", None);
    }
    warm(&small);
    let mut times = gets(5000, &mut || ());
    row("4 KiB get, page cache, p50", percentile(&mut times, 50), "us", None);
    row("4 KiB get, page cache, p99", percentile(&mut times, 99), "us", None);
    let store = read_only().open(&small).expect("open");
    let mut many: Vec<Duration> = (0..20)
        .map(|_| {
            let began = Instant::now();
            store.get_many(keys.iter().step_by(3), &gpu).expect("get");
            began.elapsed()
        })
        .collect();
    row("1,667 scattered values of 4 KiB in one call, p50", percentile(&mut many, 50), "us", None);
    let (all, anonymous) = memory_mib();
    println!("this process: {all} MiB resident at most, {anonymous} MiB of them its own now");
}
