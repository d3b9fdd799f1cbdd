//! Read more than fits: tensors one after another, filled ahead on the device while you work on those before. And the same by
//! single gets, which are fetched ahead once they come in the order of the disk.

use alight::{Device, Dtype, PrefetchConfig, Store, TensorRef};

const BATCHES: usize = 64;
const ROWS: u64 = 4096;
const COLUMNS: u64 = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("features.alight");
    let store = Store::create(&path)?;
    let device = Device::best();

    // 64 batches of features, 1 MiB each, in one commit.
    let rows: Vec<Vec<u8>> =
        (0..BATCHES).map(|n| (0..ROWS * COLUMNS * 4).map(|at| (at * 31 + n as u64 * 7) as u8).collect()).collect();
    let mut batch = store.batch();
    for (n, rows) in rows.iter().enumerate() {
        batch.put(format!("batch.{n:03}"), TensorRef::new(Dtype::F32, &[ROWS, COLUMNS], rows)?)?;
    }
    batch.commit()?;
    store.close()?;

    // At most 16 MiB of the device are filled ahead, in windows of 4 MiB. Each tensor is verified before it is handed out.
    let store = Store::options().read_only(true).open(&path)?;
    let keys = || (0..BATCHES).map(|n| format!("batch.{n:03}"));
    let mut bytes = 0;
    for (tensor, rows) in store.stream(keys(), &device).lookahead(16 << 20).zip(&rows) {
        let tensor = tensor?; // a key that is not there, or damaged, is an error in its place
        assert_eq!(&tensor.to_host()?, rows);
        bytes += tensor.len_bytes();
    }
    println!("streamed {} MiB to {device} in {} reads", bytes >> 20, reads(&store));

    // A program that asks for one key at a time gets the same from the store itself, where it is told that it may.
    let prefetch = PrefetchConfig { slots: 4, slot_bytes: 4 << 20, distance_bytes: 12 << 20 };
    let store = Store::options().read_only(true).prefetch(prefetch).open(&path)?;
    for (key, rows) in keys().zip(&rows) {
        assert_eq!(&store.get(key, &device)?.to_host()?, rows);
    }
    let counts = store.metrics().prefetch;
    println!(
        "{} gets: {} of them fetched ahead ({} on their way yet), {} MiB of slots",
        BATCHES,
        counts.hits + counts.late,
        counts.late,
        prefetch.memory_bytes() >> 20
    );
    Ok(())
}

/// How many plans of reads the store carried out.
fn reads(store: &Store) -> u64 {
    store.metrics().reads.iter().map(|times| times.count).sum()
}
