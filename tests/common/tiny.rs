//! Stores with options that make rare paths common, and all that is in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use alight::storage::sim::SimStorage;
use alight::{Device, Error, Maintenance, Store, StoreOptions};

/// Every key of a store, with its value's bytes.
pub type Contents = BTreeMap<Vec<u8>, Vec<u8>>;

/// Segments roll, commits are large and the index is written out after a few small puts.
pub fn tiny() -> StoreOptions {
    Store::options().segment_bytes(64 << 10).small_commit_bytes_max(8 << 10).overlay_entries_max(6)
}

/// The same on a simulated disk, which sees the same calls in the same order every time.
pub fn tiny_on(sim: &SimStorage) -> StoreOptions {
    tiny().storage(Arc::new(sim.clone())).maintenance(Maintenance::Inline)
}

/// Everything a store holds, or what is wrong with it.
pub fn contents(store: &Store) -> Result<Contents, Error> {
    let mut contents = Contents::new();
    for info in store.scan("") {
        let info = info?;
        let tensor = store.get(&info.key, &Device::host())?;
        contents.insert(info.key.as_bytes().to_vec(), tensor.to_host()?);
    }
    Ok(contents)
}

/// Nothing in the store is damaged.
pub fn sound(store: &Store) {
    let report = store.verify(|_| {}).unwrap();
    assert!(report.is_sound(), "{:?}", report.damages);
}
