//! Which ranges of files are mapped into a device's memory. Passive: it holds what the caller puts in, finds it, and says
//! what would have to go to make room; the caller reads, flushes and frees.

mod lru;
mod map;

pub use lru::{Lru, LruKey};
pub use map::{EvictRefused, FileId, Region, RegionId, RegionMap, RegionPlan, RegionRefusal};
