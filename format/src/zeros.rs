//! Zeros: what padding is, and what nobody has written to.

/// How many bytes are looked at together: few enough to end soon, and enough for wide registers.
const PIECE_BYTES: usize = 64;

/// Whether every byte is zero; so are none at all. Looks at many bytes at once, where a loop that may end at each would look
/// at one.
pub fn is_zero(bytes: &[u8]) -> bool {
    let zero = |piece: &[u8]| piece.iter().fold(0, |all, byte| all | byte) == 0;
    let (pieces, rest) = bytes.as_chunks::<PIECE_BYTES>();
    pieces.iter().all(|piece| zero(piece)) && zero(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_seen() {
        for len in [0, 1, 63, 64, 65, 128, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} zeros");
            for at in 0..len {
                bytes[at] = 1 << (at % 8);
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
