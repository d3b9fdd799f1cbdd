//! What a store did since it was opened: counters, and how long reads took by route. It only counts.

mod histogram;
pub(crate) mod prometheus;

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

pub use histogram::Histogram;

use crate::prefetch::PrefetchStats;

/// What a store did since it was opened, as of one moment. Counters only rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Metrics {
    /// Commits acknowledged.
    pub commits: u64,
    /// Bytes of payload committed.
    pub bytes_put: u64,
    /// Values read, each key of a `get_many` counted.
    pub gets: u64,
    /// Bytes of payload read and verified.
    pub bytes_got: u64,
    /// Bytes read past the page cache.
    pub bytes_direct: u64,
    /// Bytes read through the page cache.
    pub bytes_buffered: u64,
    /// Bytes that went to a GPU out of pinned pages of the page cache.
    pub bytes_pinned: u64,
    /// Bytes that cuFile brought to a GPU.
    pub bytes_cufile: u64,
    /// Bytes that cuFile brought to the disk from a GPU's memory.
    pub bytes_put_cufile: u64,
    /// Reads and puts that cuFile was chosen for and another route served, since cuFile failed or could not be used.
    pub step_downs: u64,
    /// Calls that were given up since they made no progress.
    pub timeouts: u64,
    /// How long `get` and `get_many` took, by the route that brought most of it.
    pub reads: [ReadTimes; ReadRoute::ALL.len()],
    /// How the last `get` or `get_many` was served; `None` before the first.
    pub last_read: Option<LastRead>,
    /// What came of fetching ahead of single gets; nothing where it is off ([`StoreOptions::prefetch`](crate::StoreOptions)).
    pub prefetch: PrefetchStats,
    /// Values whose checksum did not match.
    pub checksum_failures: u64,
    /// Times the index overlay was written out.
    pub index_flushes: u64,
    /// Flushes of the index that failed; they are tried again.
    pub index_flush_failures: u64,
    /// Syncs of segment files.
    pub segment_syncs: u64,
    /// Files of segments removed in which nothing lived.
    pub segments_removed: u64,
    /// Bytes given back where dead values lay in segments that stay.
    pub bytes_punched: u64,
    /// Bytes of values copied by compaction.
    pub bytes_compacted: u64,
    /// Keys evicted to make room.
    pub keys_evicted: u64,
}

/// How long the reads by one route took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReadTimes {
    /// How many there were.
    pub count: u64,
    /// All of them together.
    pub sum: Duration,
    /// The median, at most a sixteenth too high; zero before the first.
    pub p50: Duration,
    /// What 99 of 100 did not exceed, at most a sixteenth too high; zero before the first.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

/// How one read was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastRead {
    /// The route that brought it; the best of them where it was several.
    pub route: ReadRoute,
    /// Why this one.
    pub why: RouteReason,
}

/// How a store's bytes come from the disk to where they are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReadRoute {
    /// Straight into host memory.
    Host,
    /// To a GPU through the ring of pinned host memory.
    Staged,
    /// To a GPU out of pinned pages of the page cache.
    Pinned,
    /// To a GPU by cuFile.
    CuFile,
    /// Out of what was fetched ahead to the same device.
    Prefetched,
}

/// Why a read took its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RouteReason {
    /// The destination is host memory.
    OnTheHost,
    /// Too few bytes for the GPU to take their checksums.
    Small,
    /// The GPU takes no checksums by itself, so that threads do on the way.
    NoKernels,
    /// The user asked for it.
    Asked,
    /// The bytes are in the page cache.
    Cached,
    /// Pages of the page cache are pinned, as the user allowed.
    PagesPinned,
    /// cuFile has a direct path to the file.
    DirectPath,
    /// cuFile has no direct path to the file, or is not open yet.
    NoDirectPath,
    /// cuFile failed or could not be used, now or a short while ago; the log says why.
    SteppedDown,
    /// It was fetched ahead, since gets before it came in the order of the disk.
    FetchedAhead,
}

impl ReadRoute {
    /// Every route.
    pub const ALL: [ReadRoute; 5] =
        [ReadRoute::Host, ReadRoute::Staged, ReadRoute::Pinned, ReadRoute::CuFile, ReadRoute::Prefetched];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            ReadRoute::Host => "host",
            ReadRoute::Staged => "staged",
            ReadRoute::Pinned => "pinned",
            ReadRoute::CuFile => "cufile",
            ReadRoute::Prefetched => "prefetched",
        }
    }
}

impl fmt::Display for ReadRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl RouteReason {
    /// Every reason.
    const ALL: [RouteReason; 10] = [
        RouteReason::OnTheHost,
        RouteReason::Small,
        RouteReason::NoKernels,
        RouteReason::Asked,
        RouteReason::Cached,
        RouteReason::PagesPinned,
        RouteReason::DirectPath,
        RouteReason::NoDirectPath,
        RouteReason::SteppedDown,
        RouteReason::FetchedAhead,
    ];
}

impl fmt::Display for RouteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RouteReason::OnTheHost => "the destination is host memory",
            RouteReason::Small => "less than 8 MiB",
            RouteReason::NoKernels => "the GPU takes no checksums by itself",
            RouteReason::Asked => "asked for",
            RouteReason::Cached => "the bytes are in the page cache",
            RouteReason::PagesPinned => "pages of the page cache are pinned",
            RouteReason::DirectPath => "cuFile has a direct path",
            RouteReason::NoDirectPath => "cuFile has no direct path",
            RouteReason::SteppedDown => "cuFile failed or cannot be used, see the log",
            RouteReason::FetchedAhead => "it was fetched ahead",
        })
    }
}

impl fmt::Display for LastRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.route, self.why)
    }
}

impl Metrics {
    /// How long the reads by a route took.
    pub fn read_times(&self, route: ReadRoute) -> &ReadTimes {
        &self.reads[route as usize]
    }

    /// All of it in the text format of Prometheus. Routes that served nothing are left out.
    pub fn prometheus(&self) -> String {
        let mut text = prometheus::Text::new("alight_store_");
        let counters = [
            ("commits_total", "Commits acknowledged.", self.commits),
            ("put_bytes_total", "Bytes of payload committed.", self.bytes_put),
            ("gets_total", "Values read.", self.gets),
            ("got_bytes_total", "Bytes of payload read and verified.", self.bytes_got),
            ("put_cufile_bytes_total", "Bytes that cuFile wrote from a GPU's memory.", self.bytes_put_cufile),
            (
                "step_downs_total",
                "Reads and puts that cuFile was chosen for and another route served.",
                self.step_downs,
            ),
            ("timeouts_total", "Calls given up since they made no progress.", self.timeouts),
            ("prefetch_hits_total", "Gets served by what was fetched ahead.", self.prefetch.hits),
            ("prefetch_late_total", "Gets that waited for what was being fetched ahead.", self.prefetch.late),
            ("prefetch_misses_total", "Gets that were not fetched ahead, where that is on.", self.prefetch.misses),
            ("prefetch_wasted_total", "Extents fetched ahead for nothing.", self.prefetch.wasted),
            ("prefetch_failed_total", "Extents that could not be fetched ahead.", self.prefetch.failed),
            ("checksum_failures_total", "Values whose checksum did not match.", self.checksum_failures),
            ("index_flushes_total", "Times the index was written out.", self.index_flushes),
            ("index_flush_failures_total", "Flushes of the index that failed.", self.index_flush_failures),
            ("segment_syncs_total", "Syncs of segment files.", self.segment_syncs),
            ("segments_removed_total", "Files of segments removed in which nothing lived.", self.segments_removed),
            ("punched_bytes_total", "Bytes given back inside segments that stay.", self.bytes_punched),
            ("compacted_bytes_total", "Bytes of values copied by compaction.", self.bytes_compacted),
            ("keys_evicted_total", "Keys evicted to make room.", self.keys_evicted),
        ];
        text.put_all("counter", counters);
        let by_way = [
            ("direct", self.bytes_direct),
            ("buffered", self.bytes_buffered),
            ("pinned", self.bytes_pinned),
            ("cufile", self.bytes_cufile),
        ];
        let lines = by_way.map(|(way, bytes)| (prometheus::route(way), bytes));
        text.put("read_bytes_total", "counter", "Bytes read, by the way they took from the disk.", lines);
        let used = || ReadRoute::ALL.iter().filter(|&&route| self.read_times(route).count > 0);
        let summary = used().flat_map(|&route| {
            let times = self.read_times(route);
            let quantile = |share| format!("{{route=\"{route}\",quantile=\"{share}\"}}");
            [
                (quantile("0.5"), times.p50.as_secs_f64().to_string()),
                (quantile("0.99"), times.p99.as_secs_f64().to_string()),
                (format!("_sum{{route=\"{route}\"}}"), times.sum.as_secs_f64().to_string()),
                (format!("_count{{route=\"{route}\"}}"), times.count.to_string()),
            ]
        });
        text.put("read_latency_seconds", "summary", "How long gets took, by route.", summary);
        let longest = used().map(|&route| (prometheus::route(route), self.read_times(route).max.as_secs_f64()));
        text.put("read_latency_max_seconds", "gauge", "The longest that a get took, by route.", longest);
        if let Some(LastRead { route, why }) = self.last_read {
            let labels = format!("{{route=\"{route}\",why=\"{why}\"}}");
            text.put("last_read_route", "gauge", "How the last get was served.", [(labels, 1)]);
        }
        text.finish()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) commits: AtomicU64,
    pub(crate) bytes_put: AtomicU64,
    pub(crate) gets: AtomicU64,
    pub(crate) bytes_got: AtomicU64,
    pub(crate) bytes_direct: AtomicU64,
    pub(crate) bytes_buffered: AtomicU64,
    pub(crate) bytes_pinned: AtomicU64,
    pub(crate) bytes_cufile: AtomicU64,
    pub(crate) bytes_put_cufile: AtomicU64,
    pub(crate) step_downs: AtomicU64,
    pub(crate) timeouts: AtomicU64,
    /// Each made when its route is first taken: a store that is only written to needs none.
    reads: [OnceLock<Histogram>; ReadRoute::ALL.len()],
    /// One more than the place of the last read's route in `ALL`, and of its reason; 0 before the first. The two may be of
    /// two reads that end at the same moment.
    last_route: AtomicU8,
    last_why: AtomicU8,
    pub(crate) checksum_failures: AtomicU64,
    pub(crate) index_flushes: AtomicU64,
    pub(crate) index_flush_failures: AtomicU64,
    pub(crate) segments_removed: AtomicU64,
    pub(crate) bytes_punched: AtomicU64,
    pub(crate) bytes_compacted: AtomicU64,
    pub(crate) keys_evicted: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// Counts a read that was served.
    pub(crate) fn count_read(&self, read: LastRead, time: Duration) {
        self.reads[read.route as usize].get_or_init(Histogram::default).record(time);
        // Fewer than 255 of each.
        self.last_route.store(read.route as u8 + 1, Ordering::Relaxed);
        self.last_why.store(read.why as u8 + 1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Metrics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let last = |place: &AtomicU8| usize::from(place.load(Ordering::Relaxed)).checked_sub(1);
        let route = last(&self.last_route).and_then(|place| ReadRoute::ALL.get(place));
        let why = last(&self.last_why).and_then(|place| RouteReason::ALL.get(place));
        Metrics {
            commits: read(&self.commits),
            bytes_put: read(&self.bytes_put),
            gets: read(&self.gets),
            bytes_got: read(&self.bytes_got),
            bytes_direct: read(&self.bytes_direct),
            bytes_buffered: read(&self.bytes_buffered),
            bytes_pinned: read(&self.bytes_pinned),
            bytes_cufile: read(&self.bytes_cufile),
            bytes_put_cufile: read(&self.bytes_put_cufile),
            step_downs: read(&self.step_downs),
            timeouts: read(&self.timeouts),
            reads: self.reads.each_ref().map(|times| times.get().map(ReadTimes::of).unwrap_or_default()),
            last_read: route.zip(why).map(|(&route, &why)| LastRead { route, why }),
            prefetch: PrefetchStats::default(),
            checksum_failures: read(&self.checksum_failures),
            index_flushes: read(&self.index_flushes),
            index_flush_failures: read(&self.index_flush_failures),
            segment_syncs: 0,
            segments_removed: read(&self.segments_removed),
            bytes_punched: read(&self.bytes_punched),
            bytes_compacted: read(&self.bytes_compacted),
            keys_evicted: read(&self.keys_evicted),
        }
    }
}

impl ReadTimes {
    fn of(times: &Histogram) -> Self {
        let quantile = |share| times.quantile(share).unwrap_or_default();
        Self {
            count: times.count(),
            sum: times.sum(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            max: times.max().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_told_by_route_with_the_last_ones_reason() {
        let counters = Counters::default();
        assert_eq!(counters.snapshot(), Metrics::default());
        let times = |us| Duration::from_micros(us);
        for (place, why) in RouteReason::ALL.into_iter().enumerate() {
            assert_eq!(why as usize, place);
            counters.count_read(LastRead { route: ReadRoute::Staged, why }, times(100));
            assert_eq!(counters.snapshot().last_read, Some(LastRead { route: ReadRoute::Staged, why }));
        }
        for (place, route) in ReadRoute::ALL.into_iter().enumerate() {
            assert_eq!(route as usize, place);
        }
        counters.count_read(LastRead { route: ReadRoute::CuFile, why: RouteReason::Asked }, times(7));
        Counters::add(&counters.bytes_cufile, 4096);
        let metrics = counters.snapshot();
        let staged = metrics.read_times(ReadRoute::Staged);
        assert_eq!((staged.count, staged.max, staged.sum), (10, times(100), times(1000)));
        assert_eq!(metrics.read_times(ReadRoute::Host), &ReadTimes::default());
        let text = metrics.prometheus();
        for line in [
            "alight_store_read_bytes_total{route=\"cufile\"} 4096",
            "alight_store_read_latency_seconds{route=\"staged\",quantile=\"0.99\"} 0.0001",
            "alight_store_read_latency_seconds_count{route=\"staged\"} 10",
            "alight_store_read_latency_max_seconds{route=\"cufile\"} 0.000007",
            "alight_store_last_read_route{route=\"cufile\",why=\"asked for\"} 1",
            "# TYPE alight_store_commits_total counter",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        assert!(!text.contains("latency_seconds_count{route=\"host\"}"), "{text}");
    }
}
