//! Plain files to device memory and back, through the public API: on the host, and on the machine's GPU where there is one.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use alight::cufile::{Access, CuFile};
use alight::gds::{
    AsyncIoPipeline, BufferedTransport, Execute, GdsConfig, GdsContext, IoOperation, IoRequest, Memory, OpenFile,
    Piece, Route, StagedTransport, Transfer, Transport,
};
use alight::storage::{FileStorage, OpenMode, Storage};
use alight::{Device, DeviceBuffer, Error};
use common::bytes;
use common::gpu::require;

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::host()];
    devices.extend(require(Device::cuda(0)));
    devices
}

fn config() -> GdsConfig {
    GdsConfig { buffer_size: 1 << 20, prefetch_distance: 4 << 20, ..GdsConfig::default() }
}

fn contents(buffer: &DeviceBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len_bytes() as usize];
    buffer.copy_to_host(0, &mut bytes).unwrap();
    bytes
}

fn piece(file_offset: u64, buffer_offset: u64, len_bytes: u64) -> Piece {
    Piece { file_offset, buffer_offset, len_bytes }
}

#[test]
fn pieces_go_to_the_device_and_back() {
    for device in devices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let source = bytes(1, (9 << 20) + 4321);
        std::fs::write(&path, &source).unwrap();
        for deadline in [None, Some(Duration::from_secs(60))] {
            let gds = GdsContext::builder(config()).device(device.clone()).deadline(deadline).build().unwrap();
            for (offset, at, len) in [(0, 0, 4096), (4095, 1, 2), (77, 99, 5 << 20), (0, 0, source.len())] {
                let mut target = device.allocate((at + len) as u64).unwrap();
                let what = piece(offset as u64, at as u64, len as u64);
                assert_eq!(gds.read_to_gpu(&path, what, &mut target).unwrap(), len as u64);
                assert!(contents(&target)[at..] == source[offset..offset + len], "{device}: {offset} {at} {len}");
                let copy = folder.path().join(format!("copy-{offset}-{}", deadline.is_some()));
                gds.write_from_gpu(&copy, piece(0, at as u64, len as u64), &Arc::new(target)).unwrap();
                gds.sync(&copy).unwrap();
                assert!(std::fs::read(&copy).unwrap() == source[offset..offset + len]);
            }
            let mut target = device.allocate(10).unwrap();
            let error = gds.read_to_gpu(&path, piece(source.len() as u64 - 5, 0, 10), &mut target).unwrap_err();
            assert!(matches!(error, Error::FileTooShort { .. }), "{error}");
            assert!(gds.metrics().route(Route::Staged).bytes_read() > source.len() as u64);
        }
    }
}

#[test]
fn streams_readers_and_regions_show_the_file() {
    for device in devices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mut source = bytes(2, (7 << 20) + 99);
        let len = source.len() as u64;
        let gds = GdsContext::on(device.clone(), config()).unwrap();
        gds.stream_write(&path, 0..len, |buffer, offset, len| {
            buffer.copy_from_host(0, &source[offset as usize..(offset + len) as usize])
        })
        .unwrap();
        assert!(std::fs::read(&path).unwrap() == source);
        let mut streamed = vec![];
        gds.stream_read(&path, 0..len, |chunk| {
            let mut bytes = vec![0; chunk.len_bytes as usize];
            chunk.buffer.copy_to_host(0, &mut bytes)?;
            streamed.extend(bytes);
            Ok(())
        })
        .unwrap();
        assert!(streamed == source, "{device}");

        let mut reader = gds.reader(&path).unwrap();
        let mut read = vec![];
        while let Some(chunk) = reader.read(300_000).unwrap() {
            read.extend(chunk.to_host().unwrap());
        }
        assert!(read == source, "{device}");
        let stats = reader.stats();
        assert_eq!(stats.misses, 1, "{device}: {stats:?}");

        let region = gds.regions().map_region(&path, 1_000_000..3_000_000).unwrap();
        region.write(5, b"changed").unwrap();
        source[1_000_005..1_000_012].copy_from_slice(b"changed");
        let mut shown = vec![0; 2_000_000];
        region.read(0, &mut shown).unwrap();
        assert!(shown == source[1_000_000..3_000_000], "{device}");
        drop(region);
        assert_eq!(gds.regions().unmap_all().unwrap(), 0);
        assert!(std::fs::read(&path).unwrap() == source, "{device}");
    }
}

/// In cuFile's compatibility mode where the machine has no direct path.
#[test]
fn cufile_moves_the_same_bytes() {
    let Some(device) = require(Device::cuda(0)) else { return };
    let Some(cufile) = require(CuFile::get()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let source = bytes(4, (21 << 20) + 4321);
    std::fs::write(&path, &source).unwrap();
    if require(cufile.open(&path, Access::Read)).is_none() {
        return;
    }
    for deadline in [None, Some(Duration::from_secs(60))] {
        let builder = GdsContext::builder(config()).device(device.clone()).deadline(deadline);
        let gds = builder.only(Route::CuFile).build().unwrap();
        for (offset, at, len) in [(0, 0, 4096), (4095, 1, 2), (77, 99, 15 << 20), (0, 0, source.len())] {
            let mut target = device.allocate((at + len) as u64).unwrap();
            gds.read_to_gpu(&path, piece(offset as u64, at as u64, len as u64), &mut target).unwrap();
            assert!(contents(&target)[at..] == source[offset..offset + len], "{offset} {at} {len}");
            let copy = folder.path().join(format!("copy-{offset}-{}", deadline.is_some()));
            gds.write_from_gpu(&copy, piece(0, at as u64, len as u64), &Arc::new(target)).unwrap();
            gds.sync(&copy).unwrap();
            assert!(std::fs::read(&copy).unwrap() == source[offset..offset + len], "{offset} {at} {len}");
        }
        let mut target = device.allocate(10).unwrap();
        let error = gds.read_to_gpu(&path, piece(source.len() as u64 - 5, 0, 10), &mut target).unwrap_err();
        assert!(matches!(error, Error::FileTooShort { .. }), "{error}");
        let metrics = gds.metrics();
        assert!(metrics.route(Route::CuFile).bytes_read() > source.len() as u64 && metrics.fallbacks() == 0);
    }
}

/// One route for every operation of a pipeline: the parts work without a context.
struct Only<T>(T);

impl<T: Transport> Execute for Only<T> {
    fn execute(&self, operation: IoOperation, transfer: &Transfer, memory: &mut Memory) -> alight::Result<u64> {
        let Memory::Owned(buffer) = memory else { panic!("this test owns its buffers") };
        match operation {
            IoOperation::Read => self.0.read(transfer, buffer)?,
            IoOperation::Write => self.0.write(transfer, buffer)?,
        }
        Ok(transfer.len_bytes())
    }
}

#[test]
fn a_pipeline_moves_many_pieces_at_once_on_every_route() {
    for device in devices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let source = bytes(3, 8 << 20);
        std::fs::write(&path, &source).unwrap();
        let open =
            |path: &Path| OpenFile { file: FileStorage::new().open(path, OpenMode::Read).unwrap(), path: path.into() };
        let routes: [Arc<dyn Execute>; 2] =
            [Arc::new(Only(StagedTransport::new())), Arc::new(Only(BufferedTransport::new()))];
        for route in routes {
            let pipeline = AsyncIoPipeline::new(route, 8, 4);
            let file = open(&path);
            for n in 0..32u64 {
                let what = piece(n * 250_000, 3, 250_000);
                let target = device.allocate(250_003).unwrap();
                pipeline.submit(IoRequest::read(Transfer::new(file.clone(), what), target)).unwrap();
            }
            let done = pipeline.drain();
            assert_eq!(done.len(), 32);
            for completion in done {
                assert_eq!(completion.result.unwrap(), 250_000);
                let found = contents(&completion.memory.into_owned().unwrap());
                assert!(source.windows(250_000).step_by(250_000).any(|window| window == &found[3..]), "{device}");
            }
        }
    }
}
