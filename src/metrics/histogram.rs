//! How often something took how long: lock-free counters in log-linear buckets.
//!
//! Every power of two of nanoseconds is cut into sixteen, so a quantile is at most a sixteenth too high, and never above
//! the longest time that was seen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const STEPS_LOG2: u32 = 4;
const STEPS: u64 = 1 << STEPS_LOG2;
/// The first sixteen nanoseconds have a bucket each, each of the 60 powers of two above has sixteen.
const BUCKETS: usize = ((64 - STEPS_LOG2 as usize) + 1) << STEPS_LOG2;

/// Times, counted. Recording is wait-free; reading while others record shows some of what they recorded.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    count: AtomicU64,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { buckets, count: AtomicU64::new(0), sum_ns: AtomicU64::new(0), max_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, time: Duration) {
        // Five centuries and more count as 584 years.
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// All times together.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed))
    }

    /// The average; `None` before the first.
    pub fn mean(&self) -> Option<Duration> {
        self.sum_ns.load(Ordering::Relaxed).checked_div(self.count()).map(Duration::from_nanos)
    }

    /// The longest; `None` before the first.
    pub fn max(&self) -> Option<Duration> {
        (self.count() > 0).then(|| Duration::from_nanos(self.max_ns.load(Ordering::Relaxed)))
    }

    /// The time that this share of them did not exceed, 0.5 for the median; `None` before the first.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        // The rank lies within 1..=total whatever the share; rounding to f64 costs less than a bucket does.
        let rank = ((total as f64 * share.clamp(0.0, 1.0)).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (index, count) in counts.into_iter().enumerate() {
            seen += count;
            if seen >= rank {
                let longest = self.max_ns.load(Ordering::Relaxed);
                return Some(Duration::from_nanos(upper_bound(index).min(longest)));
            }
        }
        None
    }
}

/// The bucket of a number of nanoseconds.
fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let power = ns.ilog2();
    let step = (ns >> (power - STEPS_LOG2)) & (STEPS - 1);
    (u64::from(power - STEPS_LOG2 + 1) * STEPS + step) as usize
}

/// The longest time of a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let (power, step) = (bucket / STEPS - 1, bucket % STEPS);
    let width = 1u64 << power;
    // The last bucket ends at the last number.
    ((STEPS + step) << power) + (width - 1)
}

const _: () = assert!(BUCKETS == 976);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_recorded_says_nothing() {
        let histogram = Histogram::default();
        assert_eq!((histogram.quantile(0.5), histogram.max(), histogram.mean()), (None, None, None));
    }

    #[test]
    fn the_ends_of_the_scale_have_buckets() {
        for ns in [0, 1, 15, 16, 17, 31, 32, u64::MAX - 1, u64::MAX] {
            let index = bucket(ns);
            assert!(index < BUCKETS && upper_bound(index) >= ns);
            assert!(index == 0 || upper_bound(index - 1) < ns, "{ns}");
        }
        let histogram = Histogram::default();
        histogram.record(Duration::MAX);
        assert_eq!(histogram.quantile(1.0), Some(Duration::from_nanos(u64::MAX)));
    }

    #[test]
    fn threads_that_record_together_lose_nothing() {
        const EACH: u64 = if cfg!(miri) { 100 } else { 10_000 };
        let histogram = Histogram::default();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let histogram = &histogram;
                scope.spawn(move || (0..EACH).for_each(|n| histogram.record(Duration::from_nanos(n * 4 + thread))));
            }
        });
        assert_eq!((histogram.count(), histogram.max()), (4 * EACH, Some(Duration::from_nanos(4 * EACH - 1))));
        assert_eq!(histogram.sum(), Duration::from_nanos(4 * EACH * (4 * EACH - 1) / 2));
    }

    proptest! {
        #[test]
        fn quantiles_are_at_most_a_sixteenth_too_high(
            mut times in prop::collection::vec(0u64..1 << 40, 1..300), share in 0.0f64..=1.0,
        ) {
            let histogram = Histogram::default();
            times.iter().for_each(|&ns| histogram.record(Duration::from_nanos(ns)));
            times.sort_unstable();
            let rank = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len());
            let exact = times[rank - 1];
            let found = histogram.quantile(share).unwrap().as_nanos() as u64;
            prop_assert!(exact <= found && found <= exact + exact / 16 + 1, "{exact} {found}");
            prop_assert_eq!(histogram.max(), times.last().map(|&ns| Duration::from_nanos(ns)));
        }
    }
}
