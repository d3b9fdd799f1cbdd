//! A commit frame from any bytes, as they are and with lengths, counts and checksums made right.
#![no_main]

use alight_format::{EncodedBody, Frame, Prelude, crc32};
use libfuzzer_sys::fuzz_target;

/// Makes right what a random change would make wrong, so that the rest is looked at.
fn repair(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(data.len().clamp(1, 16 << 10).next_multiple_of(4096), 0);
    let len = bytes.len();
    let slack = usize::from(u16::from_le_bytes([bytes[56], bytes[57]])) % 3900;
    let body_len = len - 100 - slack;
    let count: [u8; 4] = bytes[96..100].try_into().unwrap();
    bytes[..8].copy_from_slice(b"ALIGHTfr");
    bytes[32..40].copy_from_slice(&(len as u64).to_le_bytes());
    bytes[56..64].copy_from_slice(&(body_len as u64).to_le_bytes());
    bytes[64..68].copy_from_slice(&count);
    bytes[80..92].fill(0);
    let digest = crc32(&bytes[..92]);
    bytes[92..96].copy_from_slice(&digest.to_le_bytes());
    bytes[96 + body_len..].fill(0);
    let digest = crc32(&bytes[..len - 4]);
    bytes[len - 4..].copy_from_slice(&digest.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let _ = Prelude::decode(data);
    let _ = Frame::decode(data);
    let bytes = repair(data);
    if let Ok(frame) = Frame::decode(&bytes) {
        let body = EncodedBody::new(&frame.entries).expect("what decodes encodes");
        assert_eq!(body.frame_len(), bytes.len() as u64);
        let mut again = vec![0xff; bytes.len()];
        assert_eq!(body.write_frame(&frame.prelude.fields(), &mut again), frame.digest);
        assert_eq!(again, bytes);
    }
});
