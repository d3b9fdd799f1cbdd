//! What several test files share.

#![allow(dead_code, unreachable_pub, reason = "each test file uses some of it")]

pub mod gpu;
pub mod history;
pub mod interposed;
pub mod model;
pub mod panics;
pub mod placed;
pub mod rebuild;
pub mod sabotages;
pub mod strikes;
pub mod tiny;

/// Bytes that look random, never zeros, different for every seed.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut bytes = Vec::with_capacity(len.next_multiple_of(4));
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // The upper half, which is the better one.
        bytes.extend_from_slice(&((state >> 32) as u32).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
