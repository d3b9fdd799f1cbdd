//! The store itself: opening, commits, reads, snapshots, and what keeps them honest.
//!
//! A [`Store`] is a handle on a `Core`. The parts, in the order in which a value meets them:
//! `batch` prepares a commit, `commit` writes and syncs it, `publish` makes it visible, `flush` moves the index to
//! disk; `lookup`, `read` and `single` answer from a version, with what `prefetch` brought ahead; `making` makes the place, `open` and `recover` start from what is on the disk; `verify` reads it all.
//!
//! # Invariants
//! - What a durable commit acknowledged is found by every later open, or the open or the read says that it is damaged.
//! - Readers hold a version and never a lock while they do I/O.

mod backup;
mod batch;
mod commit;
mod compact;
mod core;
mod distrust;
mod entropy;
#[cfg(test)]
mod fixtures;
mod flush;
mod frames;
mod gather;
mod group;
mod handle;
mod layout;
mod limit;
mod lookup;
#[cfg(all(test, loom))]
mod loom_tests;
mod making;
mod manifest;
mod open;
mod options;
mod payload;
mod prefetch;
mod publish;
mod read;
mod readers;
mod rebuild;
mod reclaim;
mod recover;
mod refresh;
mod repair;
mod scan;
mod segment;
mod single;
mod snapshot;
mod space;
mod stat;
mod stream;
mod unsettled;
mod verify;
mod watch;

pub use backup::{BackupProgress, BackupReport};
pub use batch::Batch;
pub use compact::{CompactOptions, CompactProgress, CompactReport};
pub use handle::Store;
pub use limit::Eviction;
pub use options::{Durability, Maintenance, StoreOptions};
pub use prefetch::PrefetchConfig;
pub use rebuild::{RebuildProgress, RebuildReport};
pub use repair::{RepairProgress, RepairReport};
pub use scan::Scan;
pub use snapshot::Snapshot;
pub use stat::{SnapshotStat, Stat};
pub use stream::Stream;
pub use verify::{VerifyProgress, VerifyReport};
