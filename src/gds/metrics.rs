//! What a [`GdsContext`](super::GdsContext) did: bytes, times and prefetches, by route, and whether the targets are met.
//!
//! Everything is a counter that only rises, but for the number of buffers in use. Recording takes no lock, except for two
//! clocks that run while something is read or written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::io::transport::{IoOperation, Route};
use crate::metrics::Histogram;
use crate::metrics::prometheus::{self, Text};
use crate::prefetch::PrefetchStats;

/// Reads up to this length count as small: the ones that the latency target is about.
const SMALL_READ_BYTES: u64 = 4096;

/// What a context did since it was made. Shared by its threads.
#[derive(Debug, Default)]
pub struct GdsMetrics {
    routes: [RouteMetrics; Route::ALL.len()],
    small_reads: Histogram,
    reading: BusyClock,
    writing: BusyClock,
    prefetch_hits: AtomicU64,
    prefetch_misses: AtomicU64,
    prefetch_late: AtomicU64,
    prefetch_wasted: AtomicU64,
    prefetch_expired: AtomicU64,
    buffer_waits: AtomicU64,
    active_buffers: AtomicU64,
    retries: AtomicU64,
    fallbacks: AtomicU64,
    timeouts: AtomicU64,
    failures: AtomicU64,
}

/// What one route did.
#[derive(Debug, Default)]
pub struct RouteMetrics {
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    read_latency: Histogram,
    write_latency: Histogram,
}

impl RouteMetrics {
    /// Bytes that were read.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Bytes that were written.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// How long reads took, and how many there were.
    pub fn read_latency(&self) -> &Histogram {
        &self.read_latency
    }

    /// How long writes took, and how many there were.
    pub fn write_latency(&self) -> &Histogram {
        &self.write_latency
    }
}

/// What a machine should reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerformanceTargets {
    /// Bytes read a second, sustained.
    pub read_bps: f64,
    /// Bytes written a second, sustained.
    pub write_bps: f64,
    /// The average time of an aligned read of 4 KiB.
    pub latency: Duration,
}

impl Default for PerformanceTargets {
    /// Those of the specification: 4 GB/s, 2 GB/s, 100 µs. On a slower device the target is what that device can do.
    fn default() -> Self {
        Self { read_bps: 4e9, write_bps: 2e9, latency: Duration::from_micros(100) }
    }
}

/// How what was measured compares with the targets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerformanceStatus {
    /// Whether reading is fast enough; false before the first read.
    pub read_target_met: bool,
    /// Whether writing is fast enough; false before the first write.
    pub write_target_met: bool,
    /// Whether small reads are quick enough; false before the first.
    pub latency_target_met: bool,
    /// Bytes read a second.
    pub actual_read_bps: f64,
    /// Bytes written a second.
    pub actual_write_bps: f64,
    /// The average time of reads of up to 4 KiB, in microseconds; `None` before the first.
    pub actual_latency_us: Option<f64>,
}

impl GdsMetrics {
    /// Counts a read that was served by a route.
    pub fn record_read(&self, route: Route, bytes: u64, latency: Duration) {
        let metrics = &self.routes[route.index()];
        metrics.bytes_read.fetch_add(bytes, Ordering::Relaxed);
        metrics.read_latency.record(latency);
        if bytes <= SMALL_READ_BYTES {
            self.small_reads.record(latency);
        }
    }

    /// Counts a write that was served by a route.
    pub fn record_write(&self, route: Route, bytes: u64, latency: Duration) {
        let metrics = &self.routes[route.index()];
        metrics.bytes_written.fetch_add(bytes, Ordering::Relaxed);
        metrics.write_latency.record(latency);
    }

    /// What one route did.
    pub fn route(&self, route: Route) -> &RouteMetrics {
        &self.routes[route.index()]
    }

    /// Bytes read, by all routes.
    pub fn bytes_read(&self) -> u64 {
        self.routes.iter().map(RouteMetrics::bytes_read).sum()
    }

    /// Bytes written, by all routes.
    pub fn bytes_written(&self) -> u64 {
        self.routes.iter().map(RouteMetrics::bytes_written).sum()
    }

    /// Reads that were served.
    pub fn read_ops(&self) -> u64 {
        self.routes.iter().map(|route| route.read_latency.count()).sum()
    }

    /// Writes that were served.
    pub fn write_ops(&self) -> u64 {
        self.routes.iter().map(|route| route.write_latency.count()).sum()
    }

    /// The average time of a read, of any length.
    pub fn avg_read_latency(&self) -> Option<Duration> {
        mean(self.routes.iter().map(RouteMetrics::read_latency))
    }

    /// The average time of a write, of any length.
    pub fn avg_write_latency(&self) -> Option<Duration> {
        mean(self.routes.iter().map(RouteMetrics::write_latency))
    }

    /// The longest time of a read.
    pub fn max_read_latency(&self) -> Option<Duration> {
        self.routes.iter().filter_map(|route| route.read_latency.max()).max()
    }

    /// The longest time of a write.
    pub fn max_write_latency(&self) -> Option<Duration> {
        self.routes.iter().filter_map(|route| route.write_latency.max()).max()
    }

    /// Reads of a reader that were served by what it had prefetched.
    pub fn prefetch_hits(&self) -> u64 {
        self.prefetch_hits.load(Ordering::Relaxed)
    }

    /// Reads of a reader that it had not prefetched.
    pub fn prefetch_misses(&self) -> u64 {
        self.prefetch_misses.load(Ordering::Relaxed)
    }

    /// Reads of a reader that had to wait for what was on its way.
    pub fn prefetch_late(&self) -> u64 {
        self.prefetch_late.load(Ordering::Relaxed)
    }

    /// Extents that were prefetched for nothing.
    pub fn prefetch_wasted(&self) -> u64 {
        self.prefetch_wasted.load(Ordering::Relaxed)
    }

    /// The share of a reader's reads that were hits, 0 before the first.
    pub fn prefetch_hit_rate(&self) -> f64 {
        let (hits, misses, late) = (self.prefetch_hits(), self.prefetch_misses(), self.prefetch_late());
        PrefetchStats { hits, misses, late, ..PrefetchStats::default() }.hit_rate()
    }

    /// How often an operation had to wait for a buffer, or for its turn.
    pub fn buffer_waits(&self) -> u64 {
        self.buffer_waits.load(Ordering::Relaxed)
    }

    /// Operations that own a buffer now.
    pub fn active_buffers(&self) -> u64 {
        self.active_buffers.load(Ordering::Relaxed)
    }

    /// Attempts after the first.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    /// Transfers that another route served than the first choice.
    pub fn fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }

    /// Operations that missed their deadline.
    pub fn timeouts(&self) -> u64 {
        self.timeouts.load(Ordering::Relaxed)
    }

    /// Transfers that failed for good.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// How long something was being read.
    pub fn time_reading(&self) -> Duration {
        self.reading.total()
    }

    /// How long something was being written.
    pub fn time_writing(&self) -> Duration {
        self.writing.total()
    }

    /// Bytes read a second, over a time of the caller's.
    pub fn read_throughput(&self, elapsed: Duration) -> f64 {
        per_second(self.bytes_read(), elapsed)
    }

    /// Bytes written a second, over a time of the caller's.
    pub fn write_throughput(&self, elapsed: Duration) -> f64 {
        per_second(self.bytes_written(), elapsed)
    }

    /// Compares with the targets of the specification, over a time of the caller's.
    pub fn check_targets(&self, elapsed: Duration) -> PerformanceStatus {
        self.check(&PerformanceTargets::default(), elapsed, elapsed)
    }

    /// Compares with targets, over the time in which something was being read or written.
    pub fn check_targets_while_busy(&self, targets: &PerformanceTargets) -> PerformanceStatus {
        self.check(targets, self.time_reading(), self.time_writing())
    }

    fn check(&self, targets: &PerformanceTargets, reading: Duration, writing: Duration) -> PerformanceStatus {
        let (read, written) = (self.read_throughput(reading), self.write_throughput(writing));
        let latency = self.small_reads.mean();
        PerformanceStatus {
            read_target_met: read >= targets.read_bps,
            write_target_met: written >= targets.write_bps,
            latency_target_met: latency.is_some_and(|latency| latency <= targets.latency),
            actual_read_bps: read,
            actual_write_bps: written,
            actual_latency_us: latency.map(|latency| latency.as_secs_f64() * 1e6),
        }
    }

    /// All of it in the text format of Prometheus. Routes that moved nothing are left out.
    pub fn prometheus(&self) -> String {
        let mut text = Text::new("alight_gds_");
        let by_route = |value: &dyn Fn(&RouteMetrics) -> String| -> Vec<(String, String)> {
            let used = |route: &&Route| {
                let metrics = self.route(**route);
                metrics.read_latency.count() + metrics.write_latency.count() > 0
            };
            let line = |route: &Route| (prometheus::route(route), value(self.route(*route)));
            Route::ALL.iter().filter(used).map(line).collect()
        };
        text.put("read_bytes_total", "counter", "Bytes read.", by_route(&|r| r.bytes_read().to_string()));
        text.put("written_bytes_total", "counter", "Bytes written.", by_route(&|r| r.bytes_written().to_string()));
        for (name, help, histogram) in [
            ("read_latency", "How long reads took.", RouteMetrics::read_latency as fn(&RouteMetrics) -> &Histogram),
            ("write_latency", "How long writes took.", RouteMetrics::write_latency),
        ] {
            let lines = Route::ALL.iter().flat_map(|&route| prometheus::summary(route, histogram(self.route(route))));
            text.put(&format!("{name}_seconds"), "summary", help, lines);
            let max = |r: &RouteMetrics| histogram(r).max().unwrap_or_default().as_secs_f64().to_string();
            let help = help.replace("How long", "The longest that");
            text.put(&format!("{name}_max_seconds"), "gauge", &help, by_route(&max));
        }
        for (name, kind, help, value) in [
            ("prefetch_hits_total", "counter", "Reads served by a prefetch.", self.prefetch_hits()),
            ("prefetch_misses_total", "counter", "Reads that were not prefetched.", self.prefetch_misses()),
            ("prefetch_late_total", "counter", "Reads that waited for a prefetch.", self.prefetch_late()),
            ("prefetch_wasted_total", "counter", "Prefetches for nothing.", self.prefetch_wasted()),
            (
                "prefetch_expired_total",
                "counter",
                "Prefetches dropped past their deadline.",
                self.prefetch_expired.load(Ordering::Relaxed),
            ),
            ("buffer_waits_total", "counter", "Waits for a buffer or a turn.", self.buffer_waits()),
            ("active_buffers", "gauge", "Operations that own a buffer now.", self.active_buffers()),
            ("retries_total", "counter", "Attempts after the first.", self.retries()),
            ("fallbacks_total", "counter", "Transfers not served by the first choice.", self.fallbacks()),
            ("timeouts_total", "counter", "Operations past their deadline.", self.timeouts()),
            ("failures_total", "counter", "Transfers that failed for good.", self.failures()),
        ] {
            text.put_one(name, kind, help, value);
        }
        text.finish()
    }

    /// Runs a clock and counts a buffer while it lives.
    pub(crate) fn begin(&self, operation: IoOperation) -> Busy<'_> {
        let clock = match operation {
            IoOperation::Read => &self.reading,
            IoOperation::Write => &self.writing,
        };
        clock.enter();
        self.active_buffers.fetch_add(1, Ordering::Relaxed);
        Busy { metrics: self, clock }
    }

    pub(crate) fn count_buffer_wait(&self) {
        self.buffer_waits.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_fallback(&self) {
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_timeout(&self) {
        self.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds what one reader's scheduler counted between two moments.
    pub(crate) fn count_prefetches(&self, before: &PrefetchStats, after: &PrefetchStats) {
        for (counter, before, after) in [
            (&self.prefetch_hits, before.hits, after.hits),
            (&self.prefetch_misses, before.misses, after.misses),
            (&self.prefetch_late, before.late, after.late),
            (&self.prefetch_wasted, before.wasted, after.wasted),
            (&self.prefetch_expired, before.expired, after.expired),
        ] {
            counter.fetch_add(after - before, Ordering::Relaxed);
        }
    }
}

/// While it lives, an operation runs.
pub(crate) struct Busy<'m> {
    metrics: &'m GdsMetrics,
    clock: &'m BusyClock,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.clock.leave();
        self.metrics.active_buffers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A clock that runs while anybody is inside.
#[derive(Debug, Default)]
struct BusyClock(Mutex<BusyTime>);

#[derive(Debug, Default)]
struct BusyTime {
    inside: usize,
    since: Option<Instant>,
    total: Duration,
}

impl BusyClock {
    fn enter(&self) {
        let mut time = self.0.lock();
        time.inside += 1;
        time.since.get_or_insert_with(Instant::now);
    }

    fn leave(&self) {
        let mut time = self.0.lock();
        time.inside -= 1;
        if time.inside == 0
            && let Some(since) = time.since.take()
        {
            time.total += since.elapsed();
        }
    }

    fn total(&self) -> Duration {
        let time = self.0.lock();
        time.total + time.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { bytes as f64 / elapsed.as_secs_f64() }
}

fn mean<'h>(histograms: impl Iterator<Item = &'h Histogram>) -> Option<Duration> {
    let (sum, count) =
        histograms.fold((Duration::ZERO, 0), |(sum, count), h| (sum.saturating_add(h.sum()), count + h.count()));
    (count > 0).then(|| sum.div_f64(count as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn targets_are_those_of_the_specification() {
        let metrics = GdsMetrics::default();
        assert_eq!(metrics.check_targets(Duration::from_secs(1)).actual_latency_us, None);
        assert_eq!(metrics.read_throughput(Duration::ZERO), 0.0);
        metrics.record_read(Route::Staged, 4_000_000_000 - 4096, 500_000 * US);
        metrics.record_read(Route::Staged, 4096, 100 * US);
        metrics.record_write(Route::Buffered, 2_000_000_000, US);
        let status = metrics.check_targets(Duration::from_secs(1));
        assert!(status.read_target_met && status.write_target_met && status.latency_target_met, "{status:?}");
        let status = metrics.check_targets(Duration::from_millis(1001));
        assert!(!status.read_target_met && !status.write_target_met, "{status:?}");
        metrics.record_read(Route::CuFile, 4096, 101 * US);
        assert!(!metrics.check_targets(Duration::from_secs(1)).latency_target_met);
        assert_eq!((metrics.read_ops(), metrics.write_ops(), metrics.bytes_read()), (3, 1, 4_000_004_096));
        assert_eq!(metrics.max_read_latency(), Some(500_000 * US));
        assert_eq!(metrics.avg_write_latency(), Some(US));
    }

    #[test]
    fn the_text_has_what_was_counted_and_leaves_idle_routes_out() {
        let metrics = GdsMetrics::default();
        metrics.record_read(Route::Staged, 4096, 100 * US);
        metrics
            .count_prefetches(&PrefetchStats::default(), &PrefetchStats { hits: 3, misses: 1, ..Default::default() });
        let text = metrics.prometheus();
        for line in [
            "alight_gds_read_bytes_total{route=\"staged\"} 4096",
            "alight_gds_read_latency_seconds{route=\"staged\",quantile=\"0.99\"} 0.0001",
            "alight_gds_read_latency_seconds_count{route=\"staged\"} 1",
            "alight_gds_read_latency_max_seconds{route=\"staged\"} 0.0001",
            "alight_gds_prefetch_hits_total 3",
            "# TYPE alight_gds_active_buffers gauge",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        assert!(!text.contains("cufile"));
        assert_eq!(metrics.prefetch_hit_rate(), 0.75);
    }

    #[test]
    fn the_clock_runs_while_anybody_is_inside() {
        let metrics = GdsMetrics::default();
        let first = metrics.begin(IoOperation::Read);
        let second = metrics.begin(IoOperation::Read);
        assert_eq!(metrics.active_buffers(), 2);
        drop(first);
        std::thread::sleep(Duration::from_millis(2));
        drop(second);
        let time = metrics.time_reading();
        assert!(time >= Duration::from_millis(2));
        assert_eq!(
            (metrics.time_reading(), metrics.time_writing(), metrics.active_buffers()),
            (time, Duration::ZERO, 0)
        );
    }
}
