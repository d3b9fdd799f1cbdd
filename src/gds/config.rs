//! The sizes and counts of a [`GdsContext`](super::GdsContext), and the arithmetic of alignment.
//!
//! Values only: nothing here takes memory or asks a device. The defaults and the three profiles are those of the
//! module's specification.

use crate::error::{Error, Result};

/// The smallest buffer: below, the cost of a call outweighs the bytes that it moves.
pub const BUFFER_BYTES_MIN: u64 = 64 << 10;

/// The largest buffer. It only keeps a slip of the unit from passing.
pub const BUFFER_BYTES_MAX: u64 = 1 << 40;

/// The most operations in flight: each takes a thread.
pub const OUTSTANDING_IO_MAX: usize = 1024;

/// The most prefetch slots: each takes a buffer of the device.
pub const PREFETCH_SLOTS_MAX: usize = 4096;

/// The most operations of a batch.
pub const BATCH_MAX: usize = 1024;

/// How a [`GdsContext`](super::GdsContext) moves bytes.
///
/// ```
/// use alight::gds::GdsConfig;
///
/// let config = GdsConfig { prefetch_slots: 4, ..GdsConfig::balanced() };
/// config.validate()?;
/// assert_eq!(config.total_gpu_memory(), 4 * 2 * (16 << 20));
/// # Ok::<(), alight::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdsConfig {
    /// Bytes of one buffer: a slot of a stream, an extent of a prefetch. A power of two, at least [`BUFFER_BYTES_MIN`].
    pub buffer_size: u64,
    /// What offsets of mapped regions and prefetched extents are rounded to, in bytes. A power of two, at most
    /// `buffer_size`; 4096 is what NVMe disks want.
    pub alignment: u64,
    /// Extents that may be prefetched at once. Each takes a buffer of the device while a reader lives.
    pub prefetch_slots: usize,
    /// Operations truly in flight at once. Each takes a thread while it runs.
    pub max_outstanding_io: usize,
    /// Whether a stream fills one buffer while the other is processed.
    pub double_buffering: bool,
    /// How far ahead of the reader to prefetch, in bytes. A multiple of `buffer_size`; 0 prefetches nothing.
    pub prefetch_distance: u64,
    /// The GPU, by its number among those that the process sees.
    pub gpu_device: u32,
    /// Whether the pieces of a batch are moved together, neighbours merged, or one after another.
    pub batch_mode: bool,
    /// The most pieces that are moved together in `batch_mode`.
    pub max_batch_size: usize,
    /// How long a waiter asks again and again before it sleeps, in microseconds: a short transfer then costs no wake-up.
    pub poll_interval_us: u64,
    /// Whether a transfer that the chosen route cannot serve goes through ordinary memory and the page cache instead.
    pub mmap_fallback: bool,
}

impl Default for GdsConfig {
    fn default() -> Self {
        Self {
            buffer_size: 16 << 20,
            alignment: 4096,
            prefetch_slots: 8,
            max_outstanding_io: 32,
            double_buffering: true,
            prefetch_distance: 64 << 20,
            gpu_device: 0,
            batch_mode: true,
            max_batch_size: 16,
            poll_interval_us: 10,
            mmap_fallback: true,
        }
    }
}

impl GdsConfig {
    /// For single small reads that somebody waits for: small buffers, no batches, little ahead.
    pub fn low_latency() -> Self {
        Self {
            buffer_size: 64 << 10,
            prefetch_slots: 2,
            max_outstanding_io: 4,
            double_buffering: false,
            prefetch_distance: 256 << 10,
            batch_mode: false,
            max_batch_size: 1,
            ..Self::default()
        }
    }

    /// For files that are read or written whole: large buffers, much in flight. Takes 2 GiB of the device at most.
    pub fn high_throughput() -> Self {
        Self {
            buffer_size: 64 << 20,
            prefetch_slots: 16,
            max_outstanding_io: 64,
            double_buffering: true,
            prefetch_distance: 256 << 20,
            batch_mode: true,
            max_batch_size: 32,
            ..Self::default()
        }
    }

    /// Between the two: the default.
    pub fn balanced() -> Self {
        Self::default()
    }

    /// Whether the values make sense, alone and together.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for the first that does not: its name, and what it accepts.
    pub fn validate(&self) -> Result<()> {
        let refuse = |option, why: String| Err(Error::InvalidOption { option, why });
        if !self.buffer_size.is_power_of_two() || !(BUFFER_BYTES_MIN..=BUFFER_BYTES_MAX).contains(&self.buffer_size) {
            let why = format!("{} is no power of two from {BUFFER_BYTES_MIN} to {BUFFER_BYTES_MAX}", self.buffer_size);
            return refuse("buffer_size", why);
        }
        if !self.alignment.is_power_of_two() || self.alignment > self.buffer_size {
            let why = format!("{} is no power of two up to buffer_size, {}", self.alignment, self.buffer_size);
            return refuse("alignment", why);
        }
        if !self.prefetch_distance.is_multiple_of(self.buffer_size) {
            let why = format!("{} is no multiple of buffer_size, {}", self.prefetch_distance, self.buffer_size);
            return refuse("prefetch_distance", why);
        }
        for (option, value, max) in [
            ("prefetch_slots", self.prefetch_slots, PREFETCH_SLOTS_MAX),
            ("max_outstanding_io", self.max_outstanding_io, OUTSTANDING_IO_MAX),
            ("max_batch_size", self.max_batch_size, BATCH_MAX),
        ] {
            if !(1..=max).contains(&value) {
                return refuse(option, format!("{value} is not within 1 to {max}"));
            }
        }
        Ok(())
    }

    /// Buffers of one stream: two with double buffering, else one.
    pub fn buffer_count(&self) -> usize {
        if self.double_buffering { 2 } else { 1 }
    }

    /// The device memory that the configuration stands for, in bytes: `buffer_size` × `buffer_count` × `prefetch_slots`.
    /// Mapped regions together take no more than this. Saturates instead of overflowing.
    pub fn total_gpu_memory(&self) -> u64 {
        // Both counts fit: they are bounded by `validate`, and saturate where nobody asked it.
        let buffers = u64::try_from(self.prefetch_slots).unwrap_or(u64::MAX).saturating_mul(self.buffer_count() as u64);
        self.buffer_size.saturating_mul(buffers)
    }
}

/// The smallest multiple of `alignment` that is no less than `value`; `None` where there is none below 2^64, or the
/// alignment is no power of two.
pub const fn align_up(value: u64, alignment: u64) -> Option<u64> {
    if !alignment.is_power_of_two() {
        return None;
    }
    value.checked_next_multiple_of(alignment)
}

/// The largest multiple of `alignment` that is no more than `value`; `None` where the alignment is no power of two.
pub const fn align_down(value: u64, alignment: u64) -> Option<u64> {
    if !alignment.is_power_of_two() {
        return None;
    }
    Some(value & !(alignment - 1))
}

/// Whether `value` is a multiple of `alignment`; never where the alignment is no power of two.
pub const fn is_aligned(value: u64, alignment: u64) -> bool {
    alignment.is_power_of_two() && value.is_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(config: GdsConfig) -> &'static str {
        match config.validate() {
            Err(Error::InvalidOption { option, .. }) => option,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_profiles_are_those_of_the_specification_and_valid() {
        let row = |c: GdsConfig| {
            c.validate().unwrap();
            let (size, distance) = (c.buffer_size >> 10, c.prefetch_distance >> 10);
            (size, c.prefetch_slots, c.max_outstanding_io, c.double_buffering, distance, c.batch_mode, c.max_batch_size)
        };
        assert_eq!(row(GdsConfig::low_latency()), (64, 2, 4, false, 256, false, 1));
        assert_eq!(row(GdsConfig::high_throughput()), (64 << 10, 16, 64, true, 256 << 10, true, 32));
        assert_eq!(row(GdsConfig::balanced()), (16 << 10, 8, 32, true, 64 << 10, true, 16));
        let default = GdsConfig::default();
        assert_eq!((default.alignment, default.gpu_device, default.poll_interval_us), (4096, 0, 10));
        assert!(default.mmap_fallback);
        assert_eq!((default.buffer_count(), default.total_gpu_memory()), (2, 256 << 20));
        assert_eq!(GdsConfig::low_latency().total_gpu_memory(), 128 << 10);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let good = GdsConfig::default;
        for buffer_size in [0, 4096, 65_535, 65_537, 3 << 20, 1 << 41, u64::MAX] {
            assert_eq!(refused(GdsConfig { buffer_size, ..good() }), "buffer_size");
        }
        for alignment in [0, 3, 4095, 32 << 20] {
            assert_eq!(refused(GdsConfig { alignment, ..good() }), "alignment");
        }
        assert_eq!(refused(GdsConfig { prefetch_distance: (16 << 20) + 1, ..good() }), "prefetch_distance");
        assert_eq!(refused(GdsConfig { prefetch_slots: 0, ..good() }), "prefetch_slots");
        assert_eq!(refused(GdsConfig { max_outstanding_io: 0, ..good() }), "max_outstanding_io");
        assert_eq!(refused(GdsConfig { max_outstanding_io: 1 << 20, ..good() }), "max_outstanding_io");
        assert_eq!(refused(GdsConfig { max_batch_size: 0, ..good() }), "max_batch_size");
        let absurd = GdsConfig { prefetch_slots: usize::MAX, ..good() };
        assert_eq!(absurd.total_gpu_memory(), u64::MAX);
    }

    proptest! {
        #[test]
        fn alignment_rounds_to_the_nearest_multiple_or_refuses(value: u64, shift in 0u32..64, odd in 3u64..) {
            let alignment = 1u64 << shift;
            let down = align_down(value, alignment).unwrap();
            prop_assert!(down <= value && value - down < alignment && is_aligned(down, alignment));
            match align_up(value, alignment) {
                Some(up) => prop_assert!(up >= value && up - value < alignment && is_aligned(up, alignment)),
                None => prop_assert!(u128::from(value) > u128::from(u64::MAX) / u128::from(alignment) * u128::from(alignment)),
            }
            prop_assert_eq!(is_aligned(value, alignment), down == value);
            let odd = odd | 1;
            prop_assert_eq!((align_up(value, odd), align_down(value, odd), is_aligned(value, odd)), (None, None, false));
        }

        #[test]
        fn a_configuration_that_is_valid_has_sizes_that_fit(
            shift in 0u32..50, align in 0u32..50, slots in 0usize..10_000, double: bool, factor in 0u64..100,
        ) {
            let buffer_size = 1u64 << shift;
            let config = GdsConfig {
                buffer_size, alignment: 1 << align, prefetch_slots: slots, double_buffering: double,
                prefetch_distance: buffer_size.saturating_mul(factor), ..GdsConfig::default()
            };
            if config.validate().is_ok() {
                let whole = u128::from(buffer_size) * config.buffer_count() as u128 * slots as u128;
                prop_assert_eq!(u128::from(config.total_gpu_memory()), whole);
            }
        }
    }
}
