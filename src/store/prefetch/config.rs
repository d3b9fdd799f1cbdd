//! How much is fetched ahead. Values only.

use alight_format::limits;

use crate::error::{Error, Result};
use crate::gds::{GdsConfig, PREFETCH_SLOTS_MAX};

/// How much [`StoreOptions::prefetch`](crate::StoreOptions::prefetch) may fetch ahead, and so how much device memory it takes.
///
/// ```
/// use alight::PrefetchConfig;
/// use alight::gds::GdsConfig;
///
/// assert_eq!(PrefetchConfig::default().memory_bytes(), 128 << 20);
/// let config = GdsConfig::high_throughput();
/// assert!(PrefetchConfig::from(&config).memory_bytes() <= config.total_gpu_memory());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefetchConfig {
    /// How many extents may be on their way or ready at once, from 2 to 4096: a value may lie in two.
    pub slots: usize,
    /// Bytes of a slot, a multiple of 4096, and so of the longest value that is served from them.
    pub slot_bytes: u64,
    /// How far ahead of a get in the order of the disk to fetch, in bytes.
    pub distance_bytes: u64,
}

impl Default for PrefetchConfig {
    /// Those of [`GdsConfig::default`]: 8 slots of 16 MiB, 64 MiB ahead.
    fn default() -> Self {
        Self::from(&GdsConfig::default())
    }
}

impl From<&GdsConfig> for PrefetchConfig {
    /// Its slots, each of one buffer.
    fn from(config: &GdsConfig) -> Self {
        let GdsConfig { prefetch_slots, buffer_size, prefetch_distance, .. } = *config;
        Self { slots: prefetch_slots, slot_bytes: buffer_size, distance_bytes: prefetch_distance }
    }
}

impl PrefetchConfig {
    /// The memory that the slots take of each device that gets land on, at most.
    pub fn memory_bytes(&self) -> u64 {
        self.slot_bytes.saturating_mul(self.slots as u64)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let why = if !(2..=PREFETCH_SLOTS_MAX).contains(&self.slots) {
            format!("{} slots are not from 2 to {PREFETCH_SLOTS_MAX}", self.slots)
        } else if self.slot_bytes == 0 || !self.slot_bytes.is_multiple_of(limits::BLOCK_BYTES) {
            format!("slots of {} bytes are no multiple of {}", self.slot_bytes, limits::BLOCK_BYTES)
        } else if self.memory_bytes() > i64::MAX.unsigned_abs() {
            format!("{} slots of {} bytes are more than there is", self.slots, self.slot_bytes)
        } else {
            return Ok(());
        };
        Err(Error::InvalidOption { option: "prefetch", why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        let good = PrefetchConfig { slots: 2, slot_bytes: 4096, distance_bytes: 0 };
        good.validate().unwrap();
        for profile in [GdsConfig::low_latency(), GdsConfig::balanced(), GdsConfig::high_throughput()] {
            PrefetchConfig::from(&profile).validate().unwrap();
        }
        for bad in [
            PrefetchConfig { slots: 1, ..good },
            PrefetchConfig { slots: PREFETCH_SLOTS_MAX + 1, ..good },
            PrefetchConfig { slot_bytes: 0, ..good },
            PrefetchConfig { slot_bytes: 4097, ..good },
            PrefetchConfig { slot_bytes: 1 << 62, ..good },
        ] {
            let error = bad.validate().unwrap_err();
            assert!(matches!(error, Error::InvalidOption { option: "prefetch", .. }), "{error}");
        }
    }
}
