//! Get many tensors with one call: one piece of device memory, one plan of large reads in the order of the disk.

use std::time::Instant;

use alight::{Device, Dtype, Store, TensorRef};

const LAYERS: usize = 32;
const SHAPE: [u64; 2] = [1024, 512];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let store = Store::create(folder.path().join("model.alight"))?;
    let device = Device::best();

    // 32 layers of 1 MiB bf16, in one commit, so they lie side by side.
    let weights: Vec<Vec<u8>> =
        (0..LAYERS).map(|layer| (0..1u32 << 20).map(|at| (at * 31 + layer as u32 * 7 + 1) as u8).collect()).collect();
    let mut batch = store.batch();
    for (layer, bytes) in weights.iter().enumerate() {
        batch.put(format!("layers.{layer:02}.w"), TensorRef::new(Dtype::BF16, &SHAPE, bytes)?)?;
    }
    batch.commit()?;

    // The tensors come back in the order of the keys, whatever their order on the disk.
    let keys: Vec<String> = (0..LAYERS).rev().map(|layer| format!("layers.{layer:02}.w")).collect();
    let began = Instant::now();
    let tensors = store.get_many(&keys, &device)?;
    let time = began.elapsed();

    let bytes: u64 = tensors.iter().map(|tensor| tensor.len_bytes()).sum();
    println!("{} tensors, {} MiB, to {device} in {time:.1?}, every checksum compared", tensors.len(), bytes >> 20);
    for (tensor, source) in tensors.iter().zip(weights.iter().rev()) {
        assert_eq!(&tensor.to_host()?, source);
    }
    let metrics = store.metrics();
    println!("{} bytes past the page cache, {} through it", metrics.bytes_direct, metrics.bytes_buffered);
    if let Some(read) = metrics.last_read {
        println!("route {read}");
    }

    // All of them share one allocation: it is freed when the last is dropped. To keep one and free the rest, copy it.
    let kept = tensors[0].clone();
    drop(tensors);
    println!("kept: {kept:?}");
    Ok(())
}
