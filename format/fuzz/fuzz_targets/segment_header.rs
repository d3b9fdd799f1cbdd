//! A segment header from any bytes, as they are and with the checksum made right.
#![no_main]

use alight_format::{SEGMENT_HEADER_BYTES, SegmentHeader, crc32};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = SegmentHeader::decode(data);
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    let len = data.len().min(48);
    bytes[..len].copy_from_slice(&data[..len]);
    bytes[..8].copy_from_slice(b"ALIGHTsg");
    let digest = crc32(&bytes[..4092]);
    bytes[4092..].copy_from_slice(&digest.to_le_bytes());
    if let Ok(header) = SegmentHeader::decode(&bytes) {
        assert_eq!(header.encode(), bytes);
    }
});
