//! The table: leads from the hash of a key to the group of entries that has it, at the cost of one cache line; and says of
//! a key that has none that it is absent.
//!
//! ```text
//! line = [ crc, 4 ][ spilled, 4 ][ slots in use, 2 ][ fingerprint, 2 ]×9 [ position, 4 ]×9
//! ```
//! A key's hash chooses one line, its home, and a fingerprint of 16 bits. A slot says that a key with this fingerprint is in
//! the group that lies at 16 times its position. A key whose home has no room is in the next line that has, at most seven
//! further on; `spilled` has a bit for it in each line that it passed. A key that no line took is found by the fences alone.
//! The checksum is [sealed](super::seal) and covers everything after itself.
//!
//! # Invariants
//! - "Absent" is said only by lines whose checksums hold: all that were looked at. A slot needs no checksum: the group that
//!   it leads to has its own, and the keys.
//! - A line without a key's bit in `spilled` was passed by no key of that hash: the search ends there.

use super::damaged;
use super::group::GROUP_ALIGN_BYTES;
use super::seal::Seal;
use crate::error::FormatError;
use crate::layout::{Field, tiles};
use crate::zeros::is_zero;

/// A line's length: what a processor fetches at once.
pub(super) const LINE_BYTES: usize = 64;

/// The slots of a line.
const SLOTS: usize = 9;

/// How many lines a key may be in: its home and those that follow it, the first after the last.
pub(super) const PROBE_LINES: u64 = 8;

/// A table has two lines for each so many keys expected: 9.85 bytes a key. With that, one key in 16 is not in its home, and
/// one in 8000 in no line.
const KEYS_PER_TWO_LINES: u64 = 13;

const CRC: Field<4> = Field::at(0);
const SPILLED: Field<4> = Field::at(4);
const USED: Field<2> = Field::at(8);
const FINGERPRINTS: Field<{ 2 * SLOTS }> = Field::at(10);
const POSITIONS: Field<{ 4 * SLOTS }> = Field::at(28);

const _: () =
    assert!(tiles(&[CRC.span(), SPILLED.span(), USED.span(), FINGERPRINTS.span(), POSITIONS.span()], 0, LINE_BYTES));

/// Odd constants with their bits well spread: the fractional parts of the golden ratio and of √2, times 2^64, made odd.
const MULTIPLIER_WORD: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER_END: u64 = 0x6a09_e667_f3bc_c909;

/// The hash of a key, as the table uses it and SPEC.md spells it out. Not against an adversary: who chooses keys can send
/// them all to one line, so that lookups go by the fences, and nothing worse.
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

/// A key and its hash, which is taken once for the runs of a store, however many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashedKey<'k> {
    bytes: &'k [u8],
    hash: u64,
}

impl<'k> HashedKey<'k> {
    /// Takes the hash of a key.
    #[inline]
    pub fn new(bytes: &'k [u8]) -> Self {
        Self { bytes, hash: key_hash(bytes) }
    }

    /// The key.
    #[inline]
    pub fn bytes(&self) -> &'k [u8] {
        self.bytes
    }

    /// Its hash, as [`key_hash`] takes it.
    #[inline]
    pub fn hash(&self) -> u64 {
        self.hash
    }
}

/// The number of the line, among `lines`, that is looked at after so many others.
#[inline]
pub(super) fn line_of(hash: u64, lines: u64, probe: u64) -> u64 {
    let home = ((u128::from(hash) * u128::from(lines)) >> 64) as u64;
    let line = home + probe;
    // Rarely more than once, and never but where there are fewer lines than are looked at.
    if line < lines { line } else { line % lines }
}

#[inline]
fn fingerprint_of(hash: u64) -> u16 {
    hash as u16
}

#[inline]
fn spilled_bit_of(hash: u64) -> u32 {
    1 << ((hash >> 16) % 32)
}

/// One line, its checksum not looked at.
#[derive(Clone, Copy)]
pub(super) struct Line<'b> {
    bytes: &'b [u8; LINE_BYTES],
    at: u64,
}

impl<'b> Line<'b> {
    /// The line that lies at `at`.
    #[inline]
    pub(super) fn new(bytes: &'b [u8], at: u64) -> Result<Self, FormatError> {
        let bytes = bytes.try_into().map_err(|_| damaged("a line of the index table that is cut short", at))?;
        Ok(Self { bytes, at })
    }

    /// Where the groups lie that may have a key with this hash.
    #[inline]
    pub(super) fn groups(self, hash: u64) -> impl Iterator<Item = u64> {
        let wanted = fingerprint_of(hash).to_le_bytes();
        let fingerprints = FINGERPRINTS.get(self.bytes);
        // All slots are compared before any is looked at: that is quicker than a branch for each.
        let mut matching = 0u32;
        for (slot, fingerprint) in fingerprints.as_chunks::<2>().0.iter().enumerate() {
            matching |= u32::from(*fingerprint == wanted) << slot;
        }
        matching &= (1 << self.used().min(SLOTS)) - 1;
        std::iter::from_fn(move || {
            let slot = matching.trailing_zeros() as usize;
            matching &= matching.wrapping_sub(1);
            let position = POSITIONS.get(self.bytes).as_chunks::<4>().0.get(slot).copied()?;
            Some(u64::from(u32::from_le_bytes(position)) * GROUP_ALIGN_BYTES as u64)
        })
    }

    /// Whether a key with this hash may be in the next line, or in none.
    #[inline]
    pub(super) fn is_passed(self, hash: u64) -> bool {
        SPILLED.read(self.bytes) & spilled_bit_of(hash) != 0
    }

    /// The slots in use.
    #[inline]
    pub(super) fn used(self) -> usize {
        usize::from(USED.read(self.bytes))
    }

    /// Whether the line's checksum holds.
    #[inline]
    pub(super) fn judge(self, seal: Seal) -> Result<(), FormatError> {
        if CRC.read(self.bytes) == seal.crc(self.at, &self.bytes[CRC.span().1..]) {
            Ok(())
        } else {
            Err(damaged("a line of the index table with a wrong checksum", self.at))
        }
    }

    /// Whether nothing is in the slots that are not in use.
    pub(super) fn is_clean(self) -> bool {
        let used = self.used();
        used <= SLOTS
            && is_zero(&FINGERPRINTS.get(self.bytes)[2 * used..])
            && is_zero(&POSITIONS.get(self.bytes)[4 * used..])
    }
}

/// A table being filled. Holds all of it: 9.85 bytes for each key expected.
pub(super) struct TableBuilder {
    lines: Vec<[u8; LINE_BYTES]>,
}

impl TableBuilder {
    /// A table for about this many keys; what more come find no room sooner or later, and are found by the fences.
    pub(super) fn new(keys: u64) -> Self {
        let lines = usize::try_from(keys.saturating_mul(2).div_ceil(KEYS_PER_TWO_LINES).max(1))
            .expect("a table fits the memory that its keys fit");
        Self { lines: vec![[0; LINE_BYTES]; lines] }
    }

    /// Adds a key that is in the group that lies at `group_at`.
    pub(super) fn insert(&mut self, hash: u64, group_at: u64) {
        debug_assert!(group_at.is_multiple_of(GROUP_ALIGN_BYTES as u64));
        // A group further on than 32 bits can say is in no line: as if all were full.
        let position = u32::try_from(group_at / GROUP_ALIGN_BYTES as u64).ok();
        for probe in 0..PROBE_LINES {
            let line = line_of(hash, self.line_count(), probe);
            let line = &mut self.lines[usize::try_from(line).expect("the lines are in memory")];
            let used = usize::from(USED.read(line));
            if let Some(position) = position
                && used < SLOTS
            {
                USED.write(line, used as u16 + 1);
                line[FINGERPRINTS.span().0 + 2 * used..][..2].copy_from_slice(&fingerprint_of(hash).to_le_bytes());
                line[POSITIONS.span().0 + 4 * used..][..4].copy_from_slice(&position.to_le_bytes());
                return;
            }
            let spilled = SPILLED.read(line) | spilled_bit_of(hash);
            SPILLED.write(line, spilled);
        }
    }

    pub(super) fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    /// The bytes of the table, which will lie at `at`.
    pub(super) fn finish(mut self, seal: Seal, at: u64) -> Vec<[u8; LINE_BYTES]> {
        for (index, line) in self.lines.iter_mut().enumerate() {
            let crc = seal.crc(at + (index * LINE_BYTES) as u64, &line[CRC.span().1..]);
            CRC.write(line, crc);
        }
        self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 1 << 20;

    fn keys(from: u32, count: u32) -> impl Iterator<Item = Vec<u8>> {
        (from..from + count).map(|i| format!("model.layers.{}.mlp.weight.{i:06}", i % 32).into_bytes())
    }

    fn seal() -> Seal {
        Seal::new(crate::StoreId([1; 16]), crate::RunId(1))
    }

    /// Eight keys to a group, a group each 32 bytes.
    fn group_of(number: usize) -> u64 {
        4096 + 32 * (number as u64 / 8)
    }

    fn filled(count: u32, expected: u64) -> Vec<[u8; LINE_BYTES]> {
        let mut table = TableBuilder::new(expected);
        keys(0, count).enumerate().for_each(|(number, key)| table.insert(key_hash(&key), group_of(number)));
        table.finish(seal(), AT)
    }

    /// The groups to which a table leads a key, and how many lines say that there are no others; none, if the fences must
    /// be asked.
    fn ask(lines: &[[u8; LINE_BYTES]], key: &[u8]) -> Result<(Vec<u64>, Option<usize>), FormatError> {
        let hash = key_hash(key);
        let mut groups = Vec::new();
        for probe in 0..PROBE_LINES {
            let line = line_of(hash, lines.len() as u64, probe);
            let line = Line::new(&lines[line as usize], AT + line * LINE_BYTES as u64)?;
            groups.extend(line.groups(hash));
            line.judge(seal())?;
            if !line.is_passed(hash) {
                return Ok((groups, Some(probe as usize + 1)));
            }
        }
        Ok((groups, None))
    }

    #[test]
    fn every_key_leads_to_its_group_or_to_the_fences() {
        for (count, expected) in [(1, 1), (9, 9), (10, 1), (100, 0), (10_000, 10_000), (10_000, 3000), (3000, 30_000)] {
            // Miri takes minutes for as many.
            let (count, expected) = if cfg!(miri) { (count.min(200), expected.min(300)) } else { (count, expected) };
            let lines = filled(count, expected);
            let mut by_the_fences = 0;
            for (number, key) in keys(0, count).enumerate() {
                let (groups, asked) = ask(&lines, &key).unwrap();
                if !groups.contains(&group_of(number)) {
                    assert_eq!(asked, None, "key {number} of {count}, {expected} expected");
                    by_the_fences += 1;
                }
            }
            let used: usize = lines.iter().map(|line| Line::new(line, 0).unwrap().used()).sum();
            // Of a group's keys one may stand in for another with the same fingerprint; then both lead there.
            assert!(used + by_the_fences <= count as usize, "a key is in one line or in none");
            assert!(used + by_the_fences + 2 >= count as usize, "{used} and {by_the_fences} of {count}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "statistics of 200,000 keys take hours")]
    fn most_keys_need_one_line_and_very_few_the_fences() {
        let count = 200_000;
        let lines = filled(count, u64::from(count));
        assert!(lines.len() * LINE_BYTES <= count as usize * 10, "ten bytes a key");
        let used: usize = lines.iter().map(|line| Line::new(line, 0).unwrap().used()).sum();
        let in_no_line = count as usize - used;
        assert!(in_no_line < 60, "{in_no_line} of {count} keys are in no line");
        let (mut groups, mut by_lines) = (0, [0; 1 + PROBE_LINES as usize]);
        for key in keys(count, count) {
            let (led, asked) = ask(&lines, &key).unwrap();
            groups += led.len();
            by_lines[asked.unwrap_or(0)] += 1;
        }
        assert!(groups < 100, "{groups} times an absent key led to a group");
        assert!(by_lines[1] > 190_000 && by_lines[0] < 200, "{by_lines:?}");
    }

    #[test]
    fn a_group_too_far_for_a_slot_is_left_to_the_fences() {
        let mut table = TableBuilder::new(100);
        let (near, far) = (u64::from(u32::MAX) * 16, (1 << 32) * 16);
        table.insert(key_hash(b"near"), near);
        table.insert(key_hash(b"far"), far);
        let lines = table.finish(seal(), AT);
        assert_eq!(ask(&lines, b"near"), Ok((vec![near], Some(1))));
        assert_eq!(ask(&lines, b"far"), Ok((vec![], None)));
    }

    #[test]
    fn a_damaged_line_says_of_no_key_that_it_is_absent() {
        let lines = filled(48, 48);
        for byte in (0..LINE_BYTES).step_by(if cfg!(miri) { 13 } else { 1 }) {
            for bit in (0..8).step_by(if cfg!(miri) { 5 } else { 1 }) {
                let mut damaged = lines.clone();
                damaged[0][byte] ^= 1 << bit;
                for key in keys(0, 48).chain(keys(48, 48)) {
                    let home = line_of(key_hash(&key), lines.len() as u64, 0);
                    assert!(home != 0 || ask(&damaged, &key).is_err(), "byte {byte} bit {bit}");
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
