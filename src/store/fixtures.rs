//! What the tests of this layer share: values, and disks in memory to put them on.

use std::sync::Arc;

use super::{Maintenance, Store, StoreOptions};
use crate::storage::Storage;
use crate::storage::sim::SimStorage;

/// The bytes of a value: others for every seed, and for every block.
pub(crate) fn value(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 255 + seed * 7) as u8).collect()
}

/// An empty disk, which does not note what is done with it.
pub(crate) fn disk() -> SimStorage {
    let disk = SimStorage::new();
    disk.stop_recording();
    disk
}

/// For a store on a disk, with no threads but those of who uses it.
pub(crate) fn options(disk: impl Storage + 'static) -> StoreOptions {
    Store::options().create(true).storage(Arc::new(disk)).maintenance(Maintenance::Inline)
}
