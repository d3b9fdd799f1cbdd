//! One suite for every backend: the host, a simulated GPU, and the machine's GPU where there is one. Bytes are random, and
//! what came back is compared with plain slices.

mod failures;
#[path = "../../tests/common/gpu.rs"]
mod gpu;
mod transfers;

use super::cuda::simulated::Simulated;
use super::{Device, DeviceBuffer, Kind};

/// A sequence of numbers that look random (xorshift64*), the same for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

impl Simulated {
    /// The device as callers see it.
    pub(crate) fn handle(&self) -> Device {
        Device(Kind::Cuda(self.device))
    }
}

/// Every device that this machine can show.
fn backends() -> Vec<Device> {
    let mut devices = vec![Device::host(), Simulated::new().handle()];
    devices.extend(gpu::require(Device::cuda(0)));
    devices
}

/// The bytes of a buffer.
fn contents(buffer: &DeviceBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len_bytes() as usize];
    buffer.copy_to_host(0, &mut bytes).unwrap();
    bytes
}
