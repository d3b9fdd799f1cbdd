//! The one checksum of the format: CRC-32 as of IEEE 802.3 (polynomial 0x04C11DB7, reflected; zlib's `crc32`).

use crc32fast::Hasher;

/// The CRC-32 of some bytes.
#[inline]
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The CRC-32 of bytes that follow others, from the CRC-32 of those.
#[inline]
pub(crate) fn crc32_after(before: u32, bytes: &[u8]) -> u32 {
    let mut whole = Hasher::new_with_initial(before);
    whole.update(bytes);
    whole.finalize()
}

/// The CRC-32 of two stretches of bytes laid end to end, from the CRC-32 of each and the length of the second. Costs the
/// same for any length.
pub fn combine(crc_a: u32, crc_b: u32, len_b: u64) -> u32 {
    let mut whole = Hasher::new_with_initial(crc_a);
    whole.combine(&Hasher::new_with_initial_len(crc_b, len_b));
    whole.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_zlib() {
        assert_eq!(crc32(b""), 0);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn combined_checksums_are_those_of_the_whole() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| ((i * i) >> 3) as u8).collect();
        for split in [0, 1, 255, 2500, 4999, 5000] {
            let (a, b) = bytes.split_at(split);
            assert_eq!(combine(crc32(a), crc32(b), b.len() as u64), crc32(&bytes), "split at {split}");
            assert_eq!(crc32_after(crc32(a), b), crc32(&bytes), "split at {split}");
        }
    }
}
