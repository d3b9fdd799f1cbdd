//! Which bytes of a file to fetch before they are asked for. Passive: it keeps no buffer and starts no transfer; it is
//! told of accesses and answers with plans, which the caller carries out. The clock is passed in.

pub(crate) mod line;
mod pattern;
mod scheduler;

pub use pattern::{AccessPattern, PatternDetector};
pub use scheduler::{
    Lookup, Prefetch, PrefetchOptions, PrefetchScheduler, PrefetchStats, RangeLookup, SlotId, SlotState,
};
