//! The filter: says of most absent keys that they are absent, at the cost of one cache line.
//!
//! A blocked Bloom filter. Each line is 64 bytes: 480 bits, then the [sealed](super::seal) CRC-32 of the 60 bytes
//! that hold them. A key's hash
//! chooses one line and seven bits in it.
//!
//! # Invariants
//! - "Absent" is said only by a line whose checksum holds. "Perhaps present" needs no checksum: the data block decides then.

use super::damaged;
use super::seal::Seal;
use crate::error::FormatError;

/// A line's length: what a processor fetches at once.
pub(super) const LINE_BYTES: usize = 64;

/// The bytes of a line that hold bits; its checksum has the rest.
const BITS_BYTES: usize = 60;

/// The bits of a line.
const LINE_BITS: u64 = 8 * BITS_BYTES as u64;

/// The bits set for one key. Seven places of 9 bits are what one 64-bit hash gives; with [`BITS_PER_KEY`] they fill about
/// half of the line, which is where a Bloom filter errs least.
const PROBES: u32 = 7;

/// The bits that a filter has for each key expected: one absent key in about a hundred is called "perhaps present".
const BITS_PER_KEY: u64 = 10;

/// Odd constants with their bits well spread: the fractional parts of the golden ratio, of √2 and of √3, times 2^64, made
/// odd.
const MULTIPLIER_WORD: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER_END: u64 = 0x6a09_e667_f3bc_c909;
const MULTIPLIER_BITS: u64 = 0xbb67_ae85_84ca_a73b;

/// The hash of a key, as the filter uses it and SPEC.md spells it out. Not against an adversary: who chooses keys can make
/// the filter useless, and nothing worse.
#[inline]
pub fn key_hash(key: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| {
        let hash = (hash ^ word).wrapping_mul(MULTIPLIER_WORD);
        hash ^ (hash >> 32)
    };
    let (words, rest) = key.as_chunks::<8>();
    let mut hash = words.iter().fold(key.len() as u64, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    if !rest.is_empty() {
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        hash = mix(hash, u64::from_le_bytes(word));
    }
    hash = hash.wrapping_mul(MULTIPLIER_END);
    hash ^ (hash >> 29)
}

/// The line that a hash chooses among `lines`.
#[inline]
pub(super) fn line_of(hash: u64, lines: u64) -> u64 {
    ((u128::from(hash) * u128::from(lines)) >> 64) as u64
}

/// The bits in its line that a hash chooses.
#[inline]
fn bits_of(hash: u64) -> impl Iterator<Item = usize> {
    let places = (hash ^ (hash >> 32)).wrapping_mul(MULTIPLIER_BITS) >> 1;
    (0..PROBES).map(move |probe| ((((places >> (9 * probe)) & 511) * LINE_BITS) >> 9) as usize)
}

/// Whether a key with this hash may be in the run. `line` is the one that [`line_of`] chose, `at` where it lies.
#[inline]
pub(super) fn may_contain(line: &[u8], seal: Seal, at: u64, hash: u64) -> Result<bool, FormatError> {
    let line: &[u8; LINE_BYTES] = line.try_into().map_err(|_| damaged("a filter line that is cut short", at))?;
    if bits_of(hash).all(|bit| line[bit / 8] & (1 << (bit % 8)) != 0) {
        return Ok(true);
    }
    judge_line(line, seal, at)?;
    Ok(false)
}

/// Whether a line's checksum holds.
pub(super) fn judge_line(line: &[u8; LINE_BYTES], seal: Seal, at: u64) -> Result<(), FormatError> {
    let (bits, digest) = line.split_at(BITS_BYTES);
    if digest == seal.crc(at, bits).to_le_bytes() {
        Ok(())
    } else {
        Err(damaged("a filter line with a wrong checksum", at))
    }
}

/// A filter being filled.
pub(super) struct FilterBuilder {
    lines: Vec<[u8; LINE_BYTES]>,
}

impl FilterBuilder {
    /// A filter for about this many keys; more make it say "perhaps present" more often.
    pub(super) fn new(keys: u64) -> Self {
        let lines = usize::try_from((keys.saturating_mul(BITS_PER_KEY)).div_ceil(LINE_BITS).max(1))
            .expect("a filter fits the memory that its keys fit");
        Self { lines: vec![[0; LINE_BYTES]; lines] }
    }

    pub(super) fn insert(&mut self, hash: u64) {
        let line = line_of(hash, self.line_count()) as usize;
        for bit in bits_of(hash) {
            self.lines[line][bit / 8] |= 1 << (bit % 8);
        }
    }

    pub(super) fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    /// The bytes of the filter, which will lie at `at`.
    pub(super) fn finish(mut self, seal: Seal, at: u64) -> Vec<[u8; LINE_BYTES]> {
        for (index, line) in self.lines.iter_mut().enumerate() {
            let digest = seal.crc(at + (index * LINE_BYTES) as u64, &line[..BITS_BYTES]);
            line[BITS_BYTES..].copy_from_slice(&digest.to_le_bytes());
        }
        self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(from: u32, count: u32) -> impl Iterator<Item = Vec<u8>> {
        (from..from + count).map(|i| format!("model.layers.{}.mlp.weight.{i:06}", i % 32).into_bytes())
    }

    fn seal() -> Seal {
        Seal::new(crate::StoreId([1; 16]), crate::RunId(1))
    }

    fn filled(count: u32) -> Vec<[u8; LINE_BYTES]> {
        let mut filter = FilterBuilder::new(u64::from(count));
        keys(0, count).for_each(|key| filter.insert(key_hash(&key)));
        filter.finish(seal(), 4096)
    }

    fn probe(lines: &[[u8; LINE_BYTES]], key: &[u8]) -> Result<bool, FormatError> {
        let hash = key_hash(key);
        let line = line_of(hash, lines.len() as u64);
        may_contain(&lines[line as usize], seal(), 4096 + line * LINE_BYTES as u64, hash)
    }

    #[test]
    fn no_key_that_is_there_is_ever_called_absent() {
        for count in [0, 1, 48, 49, 10_000] {
            let lines = filled(count);
            assert!(keys(0, count).all(|key| probe(&lines, &key).unwrap()));
        }
    }

    #[test]
    fn about_one_absent_key_in_a_hundred_is_called_perhaps_present() {
        let lines = filled(100_000);
        let wrong = keys(100_000, 100_000).filter(|key| probe(&lines, key).unwrap()).count();
        assert!((300..2500).contains(&wrong), "{wrong} of 100000");
    }

    #[test]
    fn a_damaged_line_says_of_no_key_that_it_is_absent() {
        let lines = filled(48);
        for byte in 0..LINE_BYTES {
            for bit in 0..8 {
                let mut damaged = lines.clone();
                damaged[0][byte] ^= 1 << bit;
                for key in keys(0, 48).chain(keys(48, 48)) {
                    assert_ne!(probe(&damaged, &key), Ok(false), "byte {byte} bit {bit}");
                }
            }
        }
    }

    #[test]
    fn the_hash_is_the_one_of_the_specification() {
        assert_eq!(key_hash(b""), 0);
        assert_eq!(key_hash(b"a"), spelled_out(b"a"));
        assert_eq!(key_hash(b"layers.0"), spelled_out(b"layers.0"));
        assert_eq!(key_hash(b"layers.0.weight"), spelled_out(b"layers.0.weight"));
    }

    /// The words of SPEC.md, with none of the shortcuts.
    fn spelled_out(key: &[u8]) -> u64 {
        let mut hash = key.len() as u128;
        for chunk in key.chunks(8) {
            let word = chunk.iter().rev().fold(0u128, |word, byte| word << 8 | u128::from(*byte));
            hash = ((hash ^ word) * 0x9e37_79b9_7f4a_7c15) % (1 << 64);
            hash ^= hash >> 32;
        }
        hash = (hash * 0x6a09_e667_f3bc_c909) % (1 << 64);
        (hash ^ (hash >> 29)) as u64
    }
}
