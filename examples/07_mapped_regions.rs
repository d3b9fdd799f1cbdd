//! Map ranges of a plain file into device memory, change them there, and have the changes in the file.

use alight::Device;
use alight::gds::{GdsConfig, GdsContext};

const REGION: u64 = 64 << 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("table.bin");
    std::fs::write(&path, vec![1; 1 << 20])?;

    // Regions together take no more than `total_gpu_memory`: here four of 64 KiB.
    let gds = GdsContext::on(Device::best(), GdsConfig { prefetch_slots: 4, ..GdsConfig::low_latency() })?;
    println!("on {}, {} KiB for regions", gds.device(), gds.config().total_gpu_memory() >> 10);

    // While it is held, a region stays where it is: its address may be given to a kernel.
    let region = gds.regions().map_region(&path, 0..REGION)?;
    println!("mapped {:?} at {:x?}", region.range(), region.device_ptr());
    region.write(100, b"changed on the device")?;

    // What lies in a mapped range is served by the same region: no byte of the file is in two places.
    let inner = gds.regions().map_region(&path, 100..121)?;
    let mut words = [0; 21];
    inner.read(0, &mut words)?;
    println!("{}", String::from_utf8_lossy(&words));

    // The file has it after a flush, which syncs it too.
    assert_eq!(std::fs::read(&path)?[100], 1);
    println!("flushed {} bytes", gds.regions().flush(&path)?);
    assert_eq!(&std::fs::read(&path)?[100..121], b"changed on the device");
    drop((region, inner));

    // More than fits: those unused for longest go, flushed where they were changed.
    for n in 0..8 {
        gds.regions().map_region(&path, n * REGION..(n + 1) * REGION)?.write(0, &[n as u8 + 2])?;
    }
    println!("{:?}", gds.regions().stats());
    assert_eq!(gds.regions().unmap_all()?, 0);
    let file = std::fs::read(&path)?;
    assert!((0..8).all(|n| file[n * REGION as usize] == n as u8 + 2));
    Ok(())
}
