//! Put a tensor under a key, close the store, open it again, get the tensor: on a GPU where there is one, else in host
//! memory.

use alight::{Device, Dtype, Store, TensorRef};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.alight");

    // A tensor is a dtype, a shape and bytes. Here: 2 × 3 floats.
    let weights: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();

    let store = Store::create(&path)?;
    store.put("layers.0.w", TensorRef::new(Dtype::F32, &[2, 3], &weights)?)?;
    store.put("note", b"bytes without a shape are u8[len]")?;
    store.close()?; // what was put was already durable; closing tells of errors and makes the next open instant

    let store = Store::open(&path)?;
    let device = Device::best();
    let tensor = store.get("layers.0.w", &device)?;
    println!("layers.0.w is {}{:?}, {} bytes", tensor.dtype(), tensor.shape(), tensor.len_bytes());
    match tensor.device_ptr() {
        Some(address) => println!("it lies in the memory of {device} ({}) at {address:#x}", device.name()),
        None => println!("it lies in host memory: there is no GPU here that could be used"),
    }
    assert_eq!(tensor.to_host()?, weights);

    // A key that is not there is an error that names it; asking first is cheap, and reads no value.
    println!("layers.9.w: {}", store.get("layers.9.w", &device).expect_err("it was never put"));
    println!("note: {:?}", store.info("note")?.map(|info| (info.dtype, info.shape)));
    Ok(())
}
