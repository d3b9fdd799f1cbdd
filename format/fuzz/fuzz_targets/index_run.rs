//! An index run from any bytes, as they are and with every checksum made right: nothing panics, everything ends.
#![no_main]

use std::ops::Bound;

use alight_format::{HashedKey, RunView, crc32};
use libfuzzer_sys::fuzz_target;

fn number<const N: usize>(bytes: &[u8], at: usize) -> usize {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(wide) as usize
}

/// A run of this many bytes whose sections lie where the header's own counts put them, with every checksum right.
fn repair(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(data.len().clamp(4 * 4096, 64 << 10).next_multiple_of(4096), 0);
    let whole_blocks = bytes.len() / 4096 - 3;
    let blocks = 1 + number::<1>(&bytes, 65) % whole_blocks;
    let table = 4096 * (1 + blocks);
    let lines = 1 + number::<1>(&bytes, 80) % 64;
    let fences = table + 4096;
    let fence_bytes = (bytes.len() - fences) / 64 * 64;
    let root_bytes = number::<2>(&bytes, 104) % 4097 / 64 * 64;
    bytes[..8].copy_from_slice(b"ALIGHTix");
    for (at, value) in [
        (64, 4096 * blocks),
        (72, table),
        (80, lines),
        (88, fences),
        (96, fence_bytes),
        (104, root_bytes.max(64)),
        (112, bytes.len()),
    ] {
        bytes[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    }
    let digest = crc32(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&digest.to_le_bytes());

    let owner = bytes[16..40].to_vec();
    let sealed =
        |at: usize, part: &[u8]| crc32(&[owner.as_slice(), &(at as u64).to_le_bytes(), part].concat()).to_le_bytes();
    for at in (4096..table).step_by(4096) {
        let block = &mut bytes[at..at + 4096];
        let mut before = number::<2>(block, 16);
        for group in 0..number::<2>(block, 4).div_ceil(8).min(1000) {
            let (start, end) = (before.next_multiple_of(16), number::<2>(block, 20 + 4 * group));
            if start + 8 <= 4096 && number::<2>(block, start + 4) >= 4 {
                let length = number::<2>(block, start + 4).min(4096 - start);
                let crc = sealed(at + start, &block[start + 4..start + length]);
                block[start..start + 4].copy_from_slice(&crc);
            }
            before = end;
        }
        let directory_end = number::<2>(block, 16).clamp(4, 4096);
        let crc = sealed(at, &block[4..directory_end]);
        block[..4].copy_from_slice(&crc);
    }
    for at in (table..table + 64 * lines).step_by(64) {
        let crc = sealed(at, &bytes[at + 4..at + 64]);
        bytes[at..at + 4].copy_from_slice(&crc);
    }
    let mut at = fences;
    while at + 64 <= fences + fence_bytes {
        let len = number::<2>(&bytes, at + 4).clamp(64, fences + fence_bytes - at);
        let crc = sealed(at, &bytes[at + 4..at + len]);
        bytes[at..at + 4].copy_from_slice(&crc);
        at += len.next_multiple_of(64);
    }
    bytes
}

fn ask(bytes: &[u8]) {
    let Ok(run) = RunView::new(bytes) else { return };
    let _ = run.verify();
    for key in [b"".as_slice(), b"a", b"model.layers.1.mlp.013", &[255; 1024], &bytes[bytes.len() / 2..][..9]] {
        let _ = run.get(key);
        let _ = run.kind(&HashedKey::new(key));
        let _ = run.range(Bound::Included(key)).take(20).count();
    }
    let seen = run.range(Bound::Unbounded).take(1 << 20).count();
    assert!(seen <= bytes.len(), "an iteration over more entries than there are bytes");
}

fuzz_target!(|data: &[u8]| {
    ask(data);
    ask(&repair(data));
});
