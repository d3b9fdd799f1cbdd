//! Which space can be given back, and which segments are worth rewriting: decisions over what the manifest knows. Passive:
//! nothing here reads or writes.
//!
//! # The rule about deletes
//! What is left of the segments must always give the same keys, so that the index can be made anew from them alone. Of a
//! segment in which no key's value lies, only a delete can be the newest entry of its key. It may hide an older put of the
//! same key in another segment: a dead one, which would come back to life without it. So a segment with deletes goes only
//! when every put in every segment that stays counts as of a later commit than its newest delete, or when its deletes are
//! repeated elsewhere (compaction does that, as of the commit that they are from). "Segments that stay" are those that the
//! manifest names: the files of others are of no meaning, whether they are gone yet or not.
//!
//! Keys are not looked at, so an old segment that is full of life keeps every later delete, repeated again and again; each is
//! its key and some hundred bytes.

use std::collections::BTreeSet;

use alight_format::{SegmentId, SegmentRecord, Seq};

use crate::config::WASTE_BYTES_MIN;

/// What is known of a segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    pub(crate) record: SegmentRecord,
    /// Whether every delete in it that still matters is repeated in another segment.
    pub(crate) deletes_carried: bool,
}

/// The segments that a manifest with these need not name: sealed, in which nothing lives, and without which no delete is
/// forgotten that hides something.
pub(crate) fn condemn(held: &[Held]) -> BTreeSet<SegmentId> {
    let dead = |held: &&Held| held.record.sealed && held.record.live_values == 0;
    let mut going: BTreeSet<SegmentId> = held.iter().filter(dead).map(|held| held.record.id).collect();
    loop {
        let oldest_staying =
            oldest_put(held.iter().map(|held| &held.record).filter(|record| !going.contains(&record.id)));
        let hides = |held: &&Held| {
            going.contains(&held.record.id) && !held.deletes_carried && held.record.newest_delete > oldest_staying
        };
        // One that has to stay may hold what the deletes of others hide, so they are asked again.
        let staying: Vec<SegmentId> = held.iter().filter(hides).map(|held| held.record.id).collect();
        if staying.is_empty() {
            return going;
        }
        going.retain(|id| !staying.contains(id));
    }
}

/// As of which commit the oldest put in any of these counts; later than every commit where there is none.
pub(crate) fn oldest_put<'a>(records: impl Iterator<Item = &'a SegmentRecord>) -> Seq {
    records.map(|record| record.oldest_put).filter(|&seq| seq != Seq::ZERO).min().unwrap_or(Seq(u64::MAX))
}

/// A segment that could be rewritten, and what that would bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) id: SegmentId,
    /// The bytes that it takes on the disk.
    pub(crate) taken: u64,
    /// About as many bytes as what lives in it would take elsewhere.
    pub(crate) rewritten: u64,
}

/// What the entry of a value takes in a frame that many share, about.
const ENTRY_BYTES: u64 = 192;

impl Candidate {
    pub(crate) fn new(record: &SegmentRecord, taken: u64) -> Self {
        Self { id: record.id, taken, rewritten: record.live_room + record.live_values * ENTRY_BYTES }
    }

    /// What a rewrite would give back.
    pub(crate) fn waste(&self) -> u64 {
        self.taken.saturating_sub(self.rewritten)
    }

    /// Whether a rewrite gives back at least this part of what the segment takes, and more than the frame of a copy could
    /// take again.
    pub(crate) fn wastes(&self, percent: u64) -> bool {
        self.waste() >= WASTE_BYTES_MIN && self.waste() >= self.taken / 100 * percent
    }
}

/// The candidates that waste at least `percent` of what they take, those first that give back the most for what is copied.
pub(crate) fn worth_rewriting(mut candidates: Vec<Candidate>, percent: u64) -> Vec<Candidate> {
    candidates.retain(|candidate| candidate.wastes(percent));
    // Compared as waste / rewritten, crosswise, so that nothing is divided.
    candidates.sort_by(|a, b| {
        let benefit = |x: &Candidate, y: &Candidate| u128::from(x.waste()) * u128::from(y.rewritten.max(1));
        benefit(b, a).cmp(&benefit(a, b)).then(a.id.cmp(&b.id))
    });
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;
    use alight_format::Salt;

    fn segment(id: u64, live_values: u64, oldest_put: u64, newest_delete: u64) -> Held {
        let record = SegmentRecord {
            id: SegmentId(id),
            salt: Salt(id),
            end: 8192,
            previous_digest: 1,
            sealed: true,
            live_bytes: live_values * 10,
            blob_bytes: 1000,
            live_values,
            live_room: live_values * 256,
            values: 100,
            oldest_put: Seq(oldest_put),
            newest_delete: Seq(newest_delete),
        };
        Held { record, deletes_carried: false }
    }

    fn going(held: &[Held]) -> Vec<u64> {
        condemn(held).into_iter().map(SegmentId::get).collect()
    }

    #[test]
    fn what_lives_or_is_written_to_stays() {
        let mut open = segment(2, 0, 1, 0);
        open.record.sealed = false;
        assert_eq!(going(&[segment(1, 1, 1, 0), open, segment(3, 0, 1, 0)]), [3]);
    }

    #[test]
    fn a_delete_stays_as_long_as_an_older_put_does() {
        assert_eq!(going(&[segment(1, 1, 5, 0), segment(2, 0, 0, 6)]), [], "5 may be what 6 deleted");
        assert_eq!(going(&[segment(1, 1, 7, 0), segment(2, 0, 0, 6)]), [2], "every put is later");
        assert_eq!(going(&[segment(1, 0, 5, 0), segment(2, 0, 0, 6)]), [1, 2], "both go");
        assert_eq!(going(&[segment(1, 0, 1, 5), segment(2, 0, 2, 6)]), [1, 2], "each hides what is in the other");
        assert_eq!(
            going(&[segment(1, 1, 1, 0), segment(2, 0, 2, 9), segment(3, 0, 0, 3)]),
            [],
            "all rests on the first"
        );
        // The second stays for the sake of the first, and with it the put that the third may hide.
        assert_eq!(going(&[segment(1, 1, 8, 0), segment(2, 0, 2, 9), segment(3, 0, 0, 3)]), []);
        let mut carried = segment(2, 0, 2, 9);
        carried.deletes_carried = true;
        assert_eq!(going(&[segment(1, 1, 8, 0), carried, segment(3, 0, 0, 3)]), [2, 3]);
    }

    /// Every way to put and delete two keys in up to four segments: what is left of the segments gives the same keys.
    #[test]
    fn no_key_comes_back_whatever_goes() {
        const COMMITS: usize = 6;
        // A commit is one of: put a, put b, delete a, delete b; and lies in segment 0 or 1 or 2.
        let ways = 12usize.pow(COMMITS as u32);
        for way in (0..ways).step_by(if cfg!(miri) { 70_001 } else { 7 }) {
            let commits: Vec<(usize, bool, usize)> = (0..COMMITS)
                .map(|n| way / 12usize.pow(n as u32) % 12)
                .map(|choice| (choice % 2, choice / 2 % 2 == 0, choice / 4))
                .collect();
            let newest = |left: &dyn Fn(usize) -> bool| -> [Option<usize>; 2] {
                let mut keys = [None; 2];
                for (seq, &(key, put, segment)) in commits.iter().enumerate().filter(|(_, commit)| left(commit.2)) {
                    let _ = segment;
                    keys[key] = put.then_some(seq);
                }
                keys
            };
            let all = newest(&|_| true);
            let held: Vec<Held> = (0..3)
                .map(|id| {
                    let own = || commits.iter().enumerate().filter(move |(_, commit)| commit.2 == id);
                    let live = all.iter().flatten().filter(|&&seq| commits[seq].2 == id).count() as u64;
                    let oldest = own().find(|(_, commit)| commit.1).map_or(0, |(seq, _)| seq as u64 + 1);
                    let newest = own().rfind(|(_, commit)| !commit.1).map_or(0, |(seq, _)| seq as u64 + 1);
                    segment(id as u64 + 1, live, oldest, newest)
                })
                .collect();
            let gone = condemn(&held);
            let left = newest(&|segment| !gone.contains(&SegmentId(segment as u64 + 1)));
            assert_eq!(left, all, "{commits:?}, gone: {gone:?}");
        }
    }

    #[test]
    fn what_gives_back_the_most_for_what_is_copied_comes_first() {
        let candidate = |id, taken, rewritten| Candidate { id: SegmentId(id), taken, rewritten };
        let worth = |candidates: &[Candidate], percent| -> Vec<u64> {
            worth_rewriting(candidates.to_vec(), percent).into_iter().map(|candidate| candidate.id.get()).collect()
        };
        let some = [
            candidate(1, 1_000_000, 900_000),
            candidate(2, 1_000_000, 100_000),
            candidate(3, 1_000_000, 500_000),
            candidate(4, 5_000_000, 0),
            candidate(5, 1_000_000, 1_200_000),
            candidate(6, 10_000, 100),
        ];
        assert_eq!(worth(&some, 10), [4, 2, 3, 1]);
        assert_eq!(worth(&some, 20), [4, 2, 3]);
        assert_eq!(worth(&[], 20), Vec::<u64>::new());
    }
}
