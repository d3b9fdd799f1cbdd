//! What `bench` measures and how: each round does something with the store and the like of it with the bare disk, in
//! turns, on the same file system, and the medians are compared. A disk's speed wanders by the minute; a ratio of
//! neighbours does not.

mod cases;
mod gets;
mod median;
mod puts;
mod raw;

use std::path::Path;

use alight::{Device, Store};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::Output;
use crate::pattern::Pattern;
use crate::progress::Progress;
use raw::{Aligned, RawFile};

pub(crate) use cases::Case;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Values of 1 MiB in one batch, and in one `get_many`.
const BATCH_VALUES: u64 = 64;

/// How far apart the data of two operations may begin in the pool that they are cut from.
const POOL_SLACK_BYTES: u64 = 16 * MIB;

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Enough for a table to report.
    Full,
    /// Enough to see that it works.
    Quick,
}

impl Effort {
    /// So many rounds of the full effort, a quarter of them when quick, and never fewer than three.
    fn rounds(self, full: u64) -> u64 {
        match self {
            Effort::Full => full,
            Effort::Quick => (full / 4).max(3),
        }
    }

    /// What the measurements write, space taken ahead and the bare disk's file included.
    pub(crate) fn disk_bytes(self) -> u64 {
        2 * raw_file_bytes(self) + 512 * MIB
    }
}

/// All that the bare disk's file has to hold: every put's bytes once.
fn raw_file_bytes(effort: Effort) -> u64 {
    Case::ALL.into_iter().map(|case| case.raw_bytes(effort)).sum::<u64>() + 64 * MIB
}

/// One line of the result: medians.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) unit: Unit,
    pub(crate) rounds: u64,
    pub(crate) alight: f64,
    /// The bare disk's, where there is anything to compare with.
    pub(crate) raw: Option<f64>,
    /// alight's part of the bare disk's.
    pub(crate) ratio: Option<f64>,
}

/// What a row's figures count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// 10⁹ bytes a second.
    #[serde(rename = "GB/s")]
    GbPerSecond,
    /// Operations a second.
    #[serde(rename = "1/s")]
    PerSecond,
    /// Microseconds each: less is better.
    #[serde(rename = "us")]
    Microseconds,
}

/// What all measurements share.
pub(crate) struct Bench<'a> {
    store: Store,
    device: &'a Device,
    raw: RawFile,
    /// Pseudo-random bytes that the values are cut from, each from another place.
    pool: Aligned,
    cut: u64,
    effort: Effort,
    progress: Progress,
    /// How many batches of 64 values of 1 MiB were put, which the gets read.
    batches: u64,
}

impl<'a> Bench<'a> {
    /// Makes a store and a file for the bare disk in `folder`.
    pub(crate) fn new(
        folder: &Path,
        device: &'a Device,
        effort: Effort,
        output: &Output,
        cases: &[Case],
    ) -> Result<Self, Failure> {
        let store = Store::create(folder.join("bench.alight"))?;
        let raw = RawFile::create(&folder.join("raw"), raw_file_bytes(effort))?;
        let mut pool = Aligned::zeroed((64 * MIB + POOL_SLACK_BYTES) as usize);
        Pattern::new(1).fill(0, pool.bytes_mut());
        let steps = cases.iter().map(|case| case.rounds(effort)).sum();
        let progress = Progress::steps(output, "measuring", steps);
        Ok(Self { store, device, raw, pool, cut: 0, effort, progress, batches: 0 })
    }

    /// Whether the bare disk's reads and writes go past the page cache.
    pub(crate) fn raw_is_direct(&self) -> bool {
        self.raw.is_direct()
    }

    /// Where in the pool the next value of `len` bytes is cut from: another place each time, on a page.
    fn next_cut(&mut self, len: u64) -> std::ops::Range<usize> {
        // A step that is prime to the number of pages visits all of them.
        self.cut = (self.cut + 1021 * 4 * KIB) % POOL_SLACK_BYTES;
        self.cut as usize..(self.cut + len) as usize
    }
}
