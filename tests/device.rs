//! Devices and tensors as callers see them: one suite, on the host and on the machine's GPU where there is one.

#[path = "common/gpu.rs"]
mod gpu;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use alight::{Device, DeviceBuffer, Dtype, Error, Tensor};

/// Bytes that look random (xorshift64*), never zeros.
fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Keeps the tests of this file from each other, since one of them counts the GPU's free memory.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::host()];
    devices.extend(gpu::require(Device::cuda(0)));
    devices
}

#[test]
fn what_is_copied_to_a_device_comes_back() {
    let _turn = one_at_a_time();
    for device in devices() {
        for len in [1, 255, 4096, 65_537, 5_000_011] {
            let bytes = random_bytes(len as u64, len);
            let mut buffer = device.allocate(len as u64).unwrap();
            assert_eq!((buffer.len_bytes(), buffer.device()), (len as u64, &device));
            let (head, tail) = bytes.split_at(len / 3);
            buffer.copy_from_host(head.len() as u64, tail).unwrap();
            buffer.copy_from_host(0, head).unwrap();
            let mut copy = vec![0; len];
            buffer.copy_to_host(0, &mut copy).unwrap();
            assert!(copy == bytes, "{device}: {len} bytes");
            let mut end = vec![0; tail.len()];
            buffer.copy_to_host(head.len() as u64, &mut end).unwrap();
            assert!(end == tail, "{device}: {len} bytes");
            match device.is_host() {
                true => {
                    assert_eq!(buffer.as_host(), Some(&bytes[..]));
                    assert_eq!(buffer.as_host_mut().unwrap().as_ptr() as usize % 4096, 0);
                    assert_eq!(buffer.device_ptr(), None);
                }
                false => {
                    assert!(buffer.as_host().is_none() && buffer.as_host_mut().is_none());
                    assert_ne!(buffer.device_ptr().unwrap(), 0);
                }
            }
        }
    }
}

#[test]
fn checksums_of_any_ranges_are_crc32fasts() {
    let _turn = one_at_a_time();
    let len = 9 << 20;
    let bytes = random_bytes(77, len);
    let numbers = random_bytes(78, 8 * 9000);
    let number =
        |n: usize, below: usize| u64::from_le_bytes(numbers[8 * n..][..8].try_into().unwrap()) as usize % below.max(1);
    // Every short length, whole blocks, long ones, all of it; more than a kernel takes at once.
    let mut ranges: Vec<std::ops::Range<u64>> = vec![0..len as u64, 1..len as u64 - 1, 5..5, 0..0];
    for n in 0..4400 {
        let longest = [len, 300_000, 5000, 5000][n % 4];
        let length = if n < 600 { n } else { number(2 * n, longest) };
        let start = number(2 * n + 1, len - length);
        let start = if n % 5 == 0 { start / 4096 * 4096 } else { start };
        ranges.push(start as u64..(start + length) as u64);
    }
    let expected: Vec<u32> =
        ranges.iter().map(|range| alight_format::crc32(&bytes[range.start as usize..range.end as usize])).collect();
    for device in devices() {
        let mut buffer = device.allocate(len as u64).unwrap();
        buffer.copy_from_host(0, &bytes).unwrap();
        assert!(buffer.crc32(&ranges).unwrap() == expected, "{device}");
        assert_eq!(buffer.crc32(&[]).unwrap(), []);
        let past = buffer.crc32(&[0..1, 10..len as u64 + 1]).unwrap_err();
        assert!(past.to_string().contains("checksum"), "{past}");
    }
}

#[test]
fn tensors_keep_their_bytes_dtype_and_shape() {
    let _turn = one_at_a_time();
    for device in devices() {
        let bytes = random_bytes(1, 6 * 50 * 4);
        let tensor = Tensor::from_host(Dtype::F32, &[6, 50], &bytes, &device).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape(), tensor.len_bytes()), (Dtype::F32, &[6, 50][..], 1200));
        assert_eq!(tensor.device(), &device);
        assert_eq!(tensor.as_host(), device.is_host().then_some(&bytes[..]));
        assert_eq!(tensor.device_ptr().is_none(), device.is_host());
        let clone = tensor.clone();
        drop(tensor);
        assert_eq!(clone.to_host().unwrap(), bytes);
        let mut copy = vec![0; 1200];
        clone.copy_to_host(&mut copy).unwrap();
        assert_eq!(copy, bytes);
        assert!(matches!(clone.copy_to_host(&mut copy[1..]), Err(Error::ShapeMismatch { actual: 1199, .. })));
        let mismatch = Tensor::from_host(Dtype::F32, &[6, 51], &bytes, &device);
        assert!(matches!(mismatch, Err(Error::ShapeMismatch { .. })));

        let nothing = Tensor::from_host(Dtype::F32, &[0, 3], &[], &device).unwrap();
        assert_eq!((nothing.len_bytes(), nothing.to_host().unwrap()), (0, Vec::new()));
    }
}

#[test]
fn a_range_past_the_end_of_a_buffer_is_an_error_and_copies_nothing() {
    let _turn = one_at_a_time();
    for device in devices() {
        let mut buffer = device.allocate(100).unwrap();
        let before = random_bytes(2, 100);
        buffer.copy_from_host(0, &before).unwrap();
        let mut bytes = [7; 10];
        for offset in [91, 100, 101, u64::MAX - 9, u64::MAX] {
            let error = buffer.copy_from_host(offset, &bytes).unwrap_err();
            assert!(matches!(&error, Error::Device { device: name, .. } if *name == device.to_string()), "{error}");
            assert!(buffer.copy_to_host(offset, &mut bytes).is_err());
        }
        let mut after = [0; 100];
        buffer.copy_to_host(0, &mut after).unwrap();
        assert_eq!((&after[..], bytes), (&before[..], [7; 10]));
    }
}

#[test]
fn threads_use_a_device_at_the_same_time() {
    let _turn = one_at_a_time();
    for device in devices() {
        thread::scope(|scope| {
            for seed in 0..8 {
                let device = device.clone();
                scope.spawn(move || {
                    for round in 0..20 {
                        let bytes = random_bytes(seed * 100 + round, 100_000 + seed as usize);
                        let tensor = Tensor::from_host(Dtype::U8, &[bytes.len() as u64], &bytes, &device).unwrap();
                        assert!(tensor.to_host().unwrap() == bytes, "{device}");
                    }
                });
            }
        });
    }
}

#[test]
fn memory_that_was_dropped_is_free_again() {
    let _turn = one_at_a_time();
    assert_eq!(Device::host().memory_bytes().unwrap(), None);
    let Some(device) = gpu::require(Device::cuda(0)) else { return };
    let free = || device.memory_bytes().unwrap().unwrap().free;
    const LEN: u64 = 256 << 20;
    // The first use makes what stays: the context's own memory and a stream.
    let bytes = random_bytes(3, 1 << 20);
    let use_it = || {
        let mut buffer = device.allocate(LEN).unwrap();
        buffer.copy_from_host(LEN - bytes.len() as u64, &bytes).unwrap();
        buffer
    };
    drop(use_it());
    let before = free();
    for _ in 0..5 {
        let buffer = use_it();
        assert!(free() + LEN <= before, "{} bytes were free, now {} are", before, free());
        drop(buffer);
    }
    assert!(free() >= before, "{} bytes were free, now {} are", before, free());
}

#[test]
fn more_than_a_gpu_has_is_refused_with_what_it_has() {
    let _turn = one_at_a_time();
    let Some(device) = gpu::require(Device::cuda(0)) else { return };
    let memory = device.memory_bytes().unwrap().unwrap();
    assert!(memory.free <= memory.total);
    let error = device.allocate(memory.total + 1).unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { needed, .. } if needed == memory.total + 1), "{error}");
    // The GPU is none the worse for it.
    device.allocate(1 << 20).unwrap().copy_from_host(0, &[1; 100]).unwrap();
}

#[test]
fn a_gpu_says_what_it_is() {
    let _turn = one_at_a_time();
    let Some(device) = gpu::require(Device::cuda(0)) else { return };
    assert_eq!((device.to_string(), device.ordinal(), device.is_host()), ("cuda:0".into(), Some(0), false));
    assert!(!device.name().is_empty());
    assert_eq!(Device::best(), device);
    for text in ["auto", "cuda", "cuda:0"] {
        assert_eq!(text.parse::<Device>().unwrap(), device, "{text}");
    }
    assert_eq!(Device::cuda_unavailable_reason(), None);
    let count = Device::cuda_count().unwrap();
    let error = Device::cuda(count).unwrap_err();
    assert!(error.to_string().starts_with(&format!("cuda:{count}: open: ")), "{error}");
}

#[test]
fn without_a_gpu_the_host_is_the_best_and_the_reason_is_told() {
    let _turn = one_at_a_time();
    let Some(reason) = Device::cuda_unavailable_reason() else { return };
    assert_eq!((Device::best(), "auto".parse().unwrap()), (Device::host(), Device::host()));
    assert!(reason.contains(';'), "a remedy follows the reason: {reason}");
    for error in
        [Device::cuda(0).unwrap_err(), Device::cuda_count().unwrap_err(), "cuda:3".parse::<Device>().unwrap_err()]
    {
        assert!(error.to_string().ends_with(&reason), "{error}");
    }
}

#[test]
fn device_names_are_read_back() {
    let host: Device = "host".parse().unwrap();
    assert_eq!(host, Device::host());
    assert_eq!("cpu".parse::<Device>().unwrap(), host);
    assert_eq!((host.to_string(), format!("{host:?}")), ("host".into(), "Device(host)".into()));
    assert_eq!((host.name(), host.ordinal()), ("host", None));
    for text in ["", "Host", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999", "gpu"] {
        assert!(matches!(text.parse::<Device>(), Err(Error::InvalidOption { option: "device", .. })), "{text:?}");
    }
}

#[test]
fn handles_and_buffers_go_to_other_threads() {
    fn check<T: Send + Sync>() {}
    check::<Device>();
    check::<DeviceBuffer>();
    check::<Tensor>();
}
