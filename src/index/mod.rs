//! From keys to locations: a memory overlay of the latest commits over immutable sorted runs on disk. Passive: it
//! answers, and never starts a transfer of a payload.
//!
//! # Invariants
//! - The newest layer that holds a key is right about it: overlay, then the overlay being written out, then the runs,
//!   newest first.
//! - A version never changes. Whoever holds one sees the same keys for as long as it is held.

mod merge;
mod overlay;
mod run;
mod version;
pub(crate) mod waiting;

pub(crate) use merge::{merge_count, merge_layers};
pub(crate) use overlay::Overlay;
pub(crate) use run::{NewRun, Run, write_run};
pub(crate) use version::{Hold, Version};
