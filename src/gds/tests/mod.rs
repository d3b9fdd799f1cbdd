//! The context, its readers and its regions on the host and on a simulated GPU, over a disk that fails when it is told to.

mod mapped;
mod reads;
mod routes;
mod transfers;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::device::{Device, DeviceBuffer, simulated_gpu};
use crate::gds::{ErrorRecovery, GdsBuilder, GdsConfig, GdsContext, Piece};
use crate::io::fixtures::StuckStorage;
use crate::storage::Storage;
use crate::storage::sim::SimStorage;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Small sizes, so that rare paths are common: buffers of 64 KiB, four slots.
fn config() -> GdsConfig {
    GdsConfig {
        buffer_size: 64 * KIB,
        prefetch_slots: 4,
        prefetch_distance: 256 * KIB,
        max_outstanding_io: 4,
        max_batch_size: 4,
        ..GdsConfig::default()
    }
}

/// Long enough for a busy machine, short enough for tests that miss it on purpose.
const DEADLINE: Duration = Duration::from_millis(150);

/// One simulated GPU for all: making its ring takes longer than most tests.
fn simulated() -> Device {
    static GPU: LazyLock<Device> = LazyLock::new(simulated_gpu);
    GPU.clone()
}

fn devices() -> Vec<Device> {
    vec![Device::host(), simulated()]
}

/// A context over any disk, which sleeps for nothing.
fn builder(device: &Device, disk: impl Storage + 'static, config: GdsConfig) -> GdsBuilder {
    let recovery = ErrorRecovery::new(3, config.mmap_fallback).with_sleep(|_| {});
    GdsContext::builder(config).device(device.clone()).storage(Arc::new(disk)).recovery(recovery)
}

fn context(device: &Device, disk: &SimStorage) -> GdsContext {
    builder(device, disk.clone(), config()).build().unwrap()
}

/// A context whose operations have little time, over a disk that can get stuck.
fn impatient(device: &Device, disk: &StuckStorage) -> GdsContext {
    // Made before the clock runs: touching the ring's memory takes longer than the deadline.
    device.staging().unwrap();
    builder(device, disk.clone(), config()).deadline(Some(DEADLINE)).build().unwrap()
}

fn piece(file_offset: u64, buffer_offset: u64, len_bytes: u64) -> Piece {
    Piece { file_offset, buffer_offset, len_bytes }
}

fn contents(buffer: &DeviceBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len_bytes() as usize];
    buffer.copy_to_host(0, &mut bytes).unwrap();
    bytes
}

/// A buffer of these bytes.
fn holding(device: &Device, bytes: &[u8]) -> Arc<DeviceBuffer> {
    let mut buffer = device.allocate(bytes.len() as u64).unwrap();
    buffer.copy_from_host(0, bytes).unwrap();
    Arc::new(buffer)
}
