//! Stream a plain file through two buffers of device memory, read it ahead with a prefetching reader, and see what that cost.

use std::sync::Arc;

use alight::Device;
use alight::gds::{GdsConfig, GdsContext, Piece};

const LEN: u64 = 64 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("weights.bin");
    // The best device there is: the first GPU, else the host.
    let gds = GdsContext::on(Device::best(), GdsConfig { buffer_size: 4 << 20, ..GdsConfig::balanced() })?;
    println!("on {}", gds.device());

    // A stream that writes: each stretch is filled in memory of the device while the one before goes to the disk.
    let byte = |at: u64| (at * 31 + at / 4096) as u8;
    gds.stream_write(&path, 0..LEN, |buffer, offset, len| {
        let bytes: Vec<u8> = (offset..offset + len).map(byte).collect();
        buffer.copy_from_host(0, &bytes)
    })?;
    gds.sync(&path)?;

    // A stream that reads: while a stretch is processed the next one is read. Every byte comes once, in order.
    let mut stretches = 0;
    let streamed = gds.stream_read(&path, 0..LEN, |chunk| {
        stretches += 1;
        let mut first = [0];
        chunk.buffer.copy_to_host(0, &mut first)?; // a kernel would start on the buffer here
        assert_eq!(first[0], byte(chunk.file_offset));
        Ok(())
    })?;
    println!("streamed {} MiB in {stretches} stretches", streamed >> 20);

    // One piece, to any place in a buffer; and back to another file.
    let mut buffer = gds.device().allocate(1 << 20)?;
    gds.read_to_gpu(&path, Piece { file_offset: 12_345, buffer_offset: 100, len_bytes: 1000 }, &mut buffer)?;
    let copy = Piece { file_offset: 0, buffer_offset: 100, len_bytes: 1000 };
    gds.write_from_gpu(folder.path().join("copy.bin"), copy, &Arc::new(buffer))?;

    // Small reads, each waited for: on a thread of their own, so that a stuck disk cannot hold up the caller for ever.
    let mut block = gds.device().allocate(4096)?;
    for n in 0..2000 {
        let offset = n * 4096 * 7 % LEN;
        gds.read_to_gpu(&path, Piece { file_offset: offset, buffer_offset: 0, len_bytes: 4096 }, &mut block)?;
    }

    // A reader sees that it is read in order, and has the next extents ready before they are asked for.
    let mut reader = gds.reader(&path)?;
    while let Some(chunk) = reader.read(256 << 10)? {
        assert_eq!(chunk.to_host()?[0], byte(chunk.range().start));
    }
    let stats = reader.stats();
    println!(
        "a reader, {:?}: {} hits, {} late, {} misses, {} wasted",
        reader.pattern(),
        stats.hits,
        stats.late,
        stats.misses,
        stats.wasted
    );

    let (metrics, status) = (gds.metrics(), gds.performance_status());
    println!("4 KiB reads take {:.0?} µs on average", status.actual_latency_us.unwrap_or_default());
    for route in gds.routes() {
        let times = metrics.route(route.route).read_latency();
        println!(
            "{}: {} reads, p50 {:?}, p99 {:?}",
            route.route,
            times.count(),
            times.quantile(0.5),
            times.quantile(0.99)
        );
    }
    println!(
        "while busy: {:.2} GB/s read, {:.2} GB/s written",
        status.actual_read_bps / 1e9,
        status.actual_write_bps / 1e9
    );
    Ok(())
}
