//! A manifest from any bytes, as they are and with the length and checksums made right.
#![no_main]

use alight_format::{Manifest, crc32};
use libfuzzer_sys::fuzz_target;

fn repair(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(data.len().max(68), 0);
    let digest_at = bytes.len() - 4;
    let body_len = (digest_at - 64) as u64;
    bytes[..8].copy_from_slice(b"ALIGHTmf");
    bytes[12..16].fill(0);
    bytes[40..48].copy_from_slice(&body_len.to_le_bytes());
    bytes[56..60].fill(0);
    let digest = crc32(&bytes[..60]);
    bytes[60..64].copy_from_slice(&digest.to_le_bytes());
    let digest = crc32(&bytes[..digest_at]);
    bytes[digest_at..].copy_from_slice(&digest.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let _ = Manifest::decode(data);
    let bytes = repair(data);
    if let Ok(manifest) = Manifest::decode(&bytes) {
        assert_eq!(manifest.encode().expect("what decodes encodes"), bytes);
    }
});
