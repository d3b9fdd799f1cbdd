//! Walk through keys in order without reading values, and read a part of a large value.

use alight::{Device, Dtype, Error, Store, TensorRef};

const ROWS: u64 = 10_000;
const ROW_FLOATS: u64 = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let store = Store::create(folder.path().join("features.alight"))?;

    // A table of 10,000 rows of 64 floats: row n is filled with n.
    let table: Vec<u8> = (0..ROWS).flat_map(|row| (row as f32).to_le_bytes().repeat(ROW_FLOATS as usize)).collect();
    let mut batch = store.batch();
    batch.put("users/embedding", TensorRef::new(Dtype::F32, &[ROWS, ROW_FLOATS], &table)?)?;
    for day in 1..=5 {
        batch.put(format!("users/active/2026-11-{day:02}"), b"some ids")?;
    }
    batch.put("videos/embedding", &table[..1000])?;
    batch.commit()?;

    // Keys are ordered as bytes, and found by their beginning. No value is read.
    for info in store.scan("users/") {
        let info = info?;
        println!("{:30} {}{:?}, {} bytes", info.key.to_string(), info.dtype, info.shape, info.len_bytes);
    }

    // Some rows of the table: only the chunks of 1 MiB that they lie in are read, and each is verified.
    let row_bytes = ROW_FLOATS * 4;
    let rows = 7_000..7_003;
    let part = store.get_range("users/embedding", rows.start * row_bytes..rows.end * row_bytes, &Device::best())?;
    for row in part.to_host()?.chunks_exact(row_bytes as usize) {
        let (first, _) = row.split_first_chunk().ok_or("a row has a float")?;
        println!("a row of {}", f32::from_le_bytes(*first));
    }

    // What cannot be is said, with the figures.
    match store.get_range("users/embedding", 0..u64::MAX, &Device::host()) {
        Err(error @ Error::RangeOutOfBounds { .. }) => println!("{error}"),
        other => println!("unexpected: {other:?}"),
    }
    Ok(())
}
