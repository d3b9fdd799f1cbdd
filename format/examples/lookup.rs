//! How long a lookup takes in a run of ten million keys, and how much memory building one takes.
//!
//! ```text
//! cargo run --release -p alight-format --example lookup [KEYS [FILE]]
//! ```
//! The keys are those of a large decoder: `model.layers.17.mlp.up_proj.weight.000123`. The run is built as a stream, into
//! memory, or into FILE to see what the builder alone holds. Then random keys are looked up: present ones, and absent ones
//! that differ from a present one in the last digit. A time includes the clock's own, which is printed beside it. All data is
//! made from fixed seeds.
//!
//! What a lookup costs is mostly what memory costs: it waits for it twice, one after another. So the time of one
//! such wait is printed too: a walk through 256 MB in which each address depends on the last.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use alight_format::{Dtype, HashedKey, IndexEntry, IndexKind, RunBuilder, RunId, RunView, SegmentId, Seq, StoreId};

const LAYERS: u64 = 32;
const MODULES: [&str; 9] = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
];
const LOOKUPS: usize = 1_000_000;

/// The keys of a decoder, by their place in byte order. Even parts are present, odd ones absent.
struct Keys {
    /// The layers' numbers, in the order of their digits.
    layers: Vec<String>,
    parts: u64,
}

impl Keys {
    fn new(count: u64) -> Self {
        let mut layers: Vec<String> = (0..LAYERS).map(|layer| layer.to_string()).collect();
        layers.sort();
        Self { layers, parts: count.div_ceil(LAYERS * MODULES.len() as u64).max(1) }
    }

    fn key(&self, place: u64, present: bool) -> Vec<u8> {
        let (tensor, part) = (place / self.parts, place % self.parts);
        let layer = &self.layers[(tensor / MODULES.len() as u64) as usize];
        let module = MODULES[(tensor % MODULES.len() as u64) as usize];
        format!("model.layers.{layer}.{module}.{:06}", 2 * part + u64::from(!present)).into_bytes()
    }
}

/// Numbers without pattern, the same each time (splitmix64).
fn scramble(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn entry(key: Vec<u8>, place: u64) -> IndexEntry {
    let shape = vec![4096, 1 + scramble(place) % 512];
    IndexEntry {
        key,
        kind: IndexKind::Put,
        seq: Seq(1 + place / 64),
        segment: SegmentId(1 + place / 20_000),
        frame_offset: 4096 + (place % 20_000) * 69_632,
        offset: 8192 + (place % 20_000) * 69_632,
        length: 2 * shape[0] * shape[1],
        crc: scramble(!place) as u32,
        dtype: Dtype::BF16,
        shape,
        has_attributes: place.is_multiple_of(100),
    }
}

fn build<E: From<alight_format::FormatError>>(
    keys: &Keys,
    count: u64,
    sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<alight_format::FinishedRun, E> {
    let mut builder = RunBuilder::new(StoreId([7; 16]), RunId(1), count, sink);
    for place in 0..count {
        builder.push(&entry(keys.key(place, true), place))?;
    }
    builder.finish()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let count: u64 = arguments.next().map_or(Ok(10_000_000), |count| count.parse())?;
    let keys = Keys::new(count);
    let before = peak_memory_bytes();
    let start = Instant::now();
    let bytes = match arguments.next() {
        None => {
            let mut bytes = vec![0; 4096];
            let finished = build(&keys, count, |piece| {
                bytes.extend_from_slice(piece);
                Ok::<_, alight_format::FormatError>(())
            })?;
            bytes[..4096].copy_from_slice(&finished.header[..]);
            println!("built {count} entries in {:.1?}", start.elapsed());
            bytes
        }
        Some(path) => {
            let mut file = File::create(&path)?;
            file.write_all(&[0; 4096])?;
            let finished = build(&keys, count, |piece| file.write_all(piece).map_err(Box::<dyn Error>::from))?;
            file.write_all_at(&finished.header[..], 0)?;
            println!("built {count} entries in {:.1?}", start.elapsed());
            if let (Some(before), Some(after)) = (before, peak_memory_bytes()) {
                println!("memory that building took: {:.1} MB", (after - before) as f64 / 1e6);
            }
            let mut bytes = Vec::new();
            File::open(&path)?.read_to_end(&mut bytes)?;
            bytes
        }
    };
    let run = RunView::new(&bytes)?;
    let header = run.header();
    println!("file {:.1} MB: {:.1} bytes a key", bytes.len() as f64 / 1e6, bytes.len() as f64 / count as f64);
    println!(
        "blocks {:.1} MB, table {:.1} MB, fences {:.1} MB in {} levels",
        header.blocks_bytes as f64 / 1e6,
        header.table_lines as f64 * 64.0 / 1e6,
        header.fences_bytes as f64 / 1e6,
        header.height
    );
    let start = Instant::now();
    run.verify()?;
    println!("verified in {:.1?}", start.elapsed());

    println!("one dependent read of memory: {:.0} ns", memory_latency_ns());
    let clock = times(LOOKUPS, |_| ());
    report("clock alone", clock);
    for (name, present) in [("present keys", true), ("absent keys", false)] {
        let wanted: Vec<Vec<u8>> =
            (0..LOOKUPS as u64).map(|i| keys.key(scramble(i + u64::from(present) * 77) % count, present)).collect();
        let found = wanted.iter().filter(|key| run.get(key).is_ok_and(|entry| entry.is_some())).count();
        assert_eq!(found, if present { LOOKUPS } else { 0 });
        let kind = format!("{name}, kind alone");
        report(name, times(LOOKUPS, |i| black_box(run.get(&wanted[i]))));
        report(&kind, times(LOOKUPS, |i| black_box(run.kind(&HashedKey::new(&wanted[i])))));
    }
    let start = Instant::now();
    assert_eq!(run.range(std::ops::Bound::Unbounded).filter(Result::is_ok).count() as u64, count);
    println!("iteration over all: {:.0} ns an entry", start.elapsed().as_nanos() as f64 / count as f64);
    Ok(())
}

fn times<T>(count: usize, mut each: impl FnMut(usize) -> T) -> Vec<Duration> {
    let mut times: Vec<Duration> = (0..count)
        .map(|i| {
            let start = Instant::now();
            let result = each(i);
            let time = start.elapsed();
            drop(black_box(result));
            time
        })
        .collect();
    times.sort_unstable();
    times
}

/// The time of one read among 256 MB whose address depends on the read before.
fn memory_latency_ns() -> f64 {
    const LINES: usize = (256 << 20) / 64;
    let mut order: Vec<u32> = (0..LINES as u32).collect();
    for last in (1..LINES).rev() {
        order.swap(last, (scramble(last as u64) % last as u64) as usize);
    }
    // One cycle through all lines, in this order.
    let mut lines = vec![[0u32; 16]; LINES];
    for pair in order.windows(2) {
        lines[pair[0] as usize][0] = pair[1];
    }
    lines[order[LINES - 1] as usize][0] = order[0];
    let mut at = 0u32;
    let times = times(LOOKUPS / 1000, |_| {
        for _ in 0..1000 {
            at = lines[at as usize][0];
        }
        black_box(at)
    });
    times[times.len() / 2].as_nanos() as f64 / 1000.0
}

fn report(name: &str, times: Vec<Duration>) {
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_nanos();
    let mean = times.iter().sum::<Duration>().as_nanos() / times.len() as u128;
    println!(
        "{name:>24}: median {:>5} ns   p90 {:>5} ns   p99 {:>5} ns   mean {mean:>5} ns",
        at(0.5),
        at(0.9),
        at(0.99)
    );
}

/// The most memory that this process ever held, where the system says so.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
