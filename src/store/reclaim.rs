//! Gives space back: removes the files of segments that no manifest names any more, and punches holes where dead values lie.
//!
//! # Invariants, in the order in which a crash would test them
//! - A segment is condemned by a manifest that does not name it. Its file goes after that manifest is durable. A power cut
//!   that undoes the removal, or comes before it, leaves a file of no meaning, which the next open removes; so no removal is
//!   synced.
//! - What is punched is dead as of the commits that a durable manifest covers, in a segment that this manifest calls sealed:
//!   no recovery reads it, and no power cut brings the key back that led there.
//! - Nothing goes that somebody may see: no version from before the manifest is held in this process, and no reader in
//!   another process holds a manifest from before. Whether there are such readers is asked after the manifest is in place.
//! - A file with a second name (a backup's) is not punched: it would lose its bytes under that name too.
//! - After a failed sync nothing is given back: what is on the disk is not known.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};

use alight_format::{EntryKind, IndexKind, Manifest, SegmentId, SegmentRecord, limits};

use crate::config::{HOLE_BYTES_MIN, HOLES_MAX};
use crate::error::{Error, Result};
use crate::index::{Hold, Version};
use crate::metrics::Counters;
use crate::storage::StorageFile;
use crate::store::core::{Core, Writer};
use crate::store::readers::oldest_reader;
use crate::store::recover::{Found, read_frame};
use crate::store::segment::{FIRST_FRAME, Segment};

/// What a writer puts into the versions it makes, to know by whether one is still held. Versions of one epoch share it.
#[derive(Debug)]
pub(crate) struct Epoch(pub(crate) u64);

/// Who may still see something.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// Versions of earlier epochs may.
    pub(crate) before_epoch: u64,
    /// Readers of manifests up to this generation may.
    pub(crate) through_generation: u64,
}

/// A file that no manifest names.
struct Condemned {
    /// Its segment, unless it was left by an earlier process.
    id: Option<SegmentId>,
    path: PathBuf,
    /// The bytes of values in it, or of all of it.
    bytes: u64,
    seen: Seen,
}

/// Where nothing lives in a segment.
struct Holes {
    segment: Arc<Segment>,
    ranges: Vec<Range<u64>>,
    seen: Seen,
}

impl Holes {
    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// What waits to be given back.
#[derive(Default)]
pub(crate) struct Reclaim {
    /// The epoch of the versions that are being made.
    epoch: u64,
    /// Earlier ones of which a version may still be held, in order.
    earlier: VecDeque<(u64, Weak<dyn Any + Send + Sync>)>,
    condemned: Vec<Condemned>,
    holes: Vec<Holes>,
    /// Why the last attempt gave back less than it could have.
    hindrance: Option<String>,
}

impl Reclaim {
    /// Takes over files that an earlier process left, each with its length. The manifest of this generation does not name
    /// them.
    pub(crate) fn take_over(&mut self, files: Vec<(PathBuf, u64)>, generation: u64) {
        let seen = Seen { before_epoch: 0, through_generation: generation.saturating_sub(1) };
        self.condemned.extend(files.into_iter().map(|(path, bytes)| Condemned { id: None, path, bytes, seen }));
    }

    /// Begins an epoch in a version that is about to be published.
    fn turn(&mut self, version: &mut Version) -> u64 {
        let number = self.epoch;
        self.epoch += 1;
        let hold: Hold = Arc::new(Epoch(self.epoch));
        let before = std::mem::replace(&mut version.hold, hold);
        self.earlier.push_back((number, Arc::downgrade(&before)));
        self.epoch
    }

    /// The oldest epoch of which a version is held; the current one where no earlier is.
    fn oldest_epoch(&mut self) -> u64 {
        self.earlier.retain(|(_, hold)| hold.strong_count() > 0);
        // Reading a count orders nothing by itself. With this, what the holders of a version read before they let go of it
        // comes before what is done to their files from here on, on every processor.
        fence(Ordering::Acquire);
        self.earlier.front().map_or(self.epoch, |&(number, _)| number)
    }

    /// The bytes that wait for those who may see them, of which versions of epoch `of` are some.
    pub(crate) fn waiting_bytes(&self, of: Option<u64>) -> u64 {
        let counts = |seen: &Seen| of.is_none_or(|epoch| epoch < seen.before_epoch);
        let condemned = self.condemned.iter().filter(|one| counts(&one.seen)).map(|one| one.bytes);
        let holes = self.holes.iter().filter(|one| counts(&one.seen)).map(Holes::bytes);
        condemned.chain(holes).sum()
    }

    /// Why less was given back than could have been, where that is so.
    pub(crate) fn hindrance(&self) -> Option<&str> {
        self.hindrance.as_deref()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.condemned.is_empty() && self.holes.is_empty()
    }
}

impl Core {
    /// After a manifest was put in place that covers `covered`: notes what is seen by nobody who comes later.
    pub(crate) fn note_dead(
        &self,
        writer: &Writer,
        covered: &Version,
        manifest: &Manifest,
        condemned: impl IntoIterator<Item = SegmentId>,
        through_generation: u64,
    ) {
        let mut reclaim = writer.reclaim.lock();
        let before_epoch = self.change_version(|version| reclaim.turn(version));
        let seen = Seen { before_epoch, through_generation };
        for segment in condemned.into_iter().filter_map(|id| self.segments.get(id)) {
            segment.condemned.store(true, Ordering::Release);
            let bytes = segment.accounting.lock().blob_bytes;
            reclaim.condemned.push(Condemned { id: Some(segment.id), path: segment.path.clone(), bytes, seen });
            reclaim.holes.retain(|holes| holes.segment.id != segment.id);
        }
        for record in &manifest.segments {
            let known: usize = reclaim.holes.iter().map(|holes| holes.ranges.len()).sum();
            let Some(segment) = self.segments.get(record.id).filter(|segment| is_worth_a_look(segment, record)) else {
                continue;
            };
            if known > HOLES_MAX {
                break;
            }
            match self.find_holes(covered, &segment, record) {
                Ok(ranges) => {
                    segment.alive_when_punched.store(record.live_bytes, Ordering::Release);
                    if !ranges.is_empty() {
                        reclaim.holes.retain(|holes| holes.segment.id != segment.id);
                        reclaim.holes.push(Holes { segment, ranges, seen });
                    }
                }
                // It stays as it is; `verify` tells of damage.
                Err(error) => tracing::warn!(path = %segment.path.display(), %error, "no holes are looked for"),
            }
        }
    }

    /// Gives back what nobody sees any more. What somebody may see, or what fails, is left for the next time.
    pub(crate) fn reclaim(&self) -> Result<()> {
        let writer = self.writer()?;
        let mut reclaim = writer.reclaim.lock();
        if reclaim.is_empty() {
            return Ok(());
        }
        writer.committer.check()?;
        let oldest_epoch = reclaim.oldest_epoch();
        let seen = reclaim.condemned.iter().map(|one| one.seen).chain(reclaim.holes.iter().map(|one| one.seen));
        let through = seen.map(|seen| seen.through_generation).max().unwrap_or(0);
        let oldest_reader = match oldest_reader(&*self.storage, &self.layout, through) {
            Ok(oldest) => oldest,
            Err(error) => {
                let path = self.layout.readers();
                reclaim.hindrance =
                    Some(format!("{}: it cannot be told whether other processes read: {error}", path.display()));
                return if error.kind() == io::ErrorKind::Unsupported {
                    Ok(())
                } else {
                    Err(Error::io("ask", &path)(error))
                };
            }
        };
        reclaim.hindrance = None;
        let unseen = |seen: &Seen| {
            seen.before_epoch <= oldest_epoch && oldest_reader.is_none_or(|oldest| oldest > seen.through_generation)
        };
        self.remove_condemned(&mut reclaim, unseen);
        self.punch_holes(&mut reclaim, unseen);
        Ok(())
    }

    fn remove_condemned(&self, reclaim: &mut Reclaim, unseen: impl Fn(&Seen) -> bool) {
        let (ready, waiting) = std::mem::take(&mut reclaim.condemned).into_iter().partition(|one| unseen(&one.seen));
        reclaim.condemned = waiting;
        let ready: Vec<Condemned> = ready;
        for one in ready {
            if let Some(id) = one.id {
                self.segments.forget(id);
                self.routes.forget(id);
            }
            match self.storage.remove(&one.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    reclaim.hindrance = Some(format!("remove {}: {error}", one.path.display()));
                    reclaim.condemned.push(Condemned { id: None, ..one });
                }
                _ => Counters::add(&self.counters.segments_removed, 1),
            }
        }
    }

    fn punch_holes(&self, reclaim: &mut Reclaim, unseen: impl Fn(&Seen) -> bool) {
        let (ready, waiting) = std::mem::take(&mut reclaim.holes).into_iter().partition(|one| unseen(&one.seen));
        reclaim.holes = waiting;
        let ready: Vec<Holes> = ready;
        for holes in ready {
            let path = &holes.segment.path;
            let punched = self.segments.file_for_append(&holes.segment).and_then(|file| {
                let links = file.facts().map_err(Error::io("measure", path))?.links;
                if links > 1 {
                    return Ok(Some(format!("{} has {links} names, and is punched for none", path.display())));
                }
                for range in &holes.ranges {
                    file.punch(range.start, range.end - range.start).map_err(Error::io("punch", path))?;
                    Counters::add(&self.counters.bytes_punched, range.end - range.start);
                }
                Ok(None)
            });
            let hindrance = punched.unwrap_or_else(|error| Some(error.to_string()));
            if hindrance.is_some() {
                // It is looked through again when the index is next written out.
                holes.segment.alive_when_punched.store(u64::MAX, Ordering::Release);
                reclaim.hindrance = hindrance;
            }
        }
    }

    /// Where in a sealed segment nothing lives, as of the version that the manifest covers.
    ///
    /// Nothing where the frames do not lead to as many living values as the segment's account has: then a key leads there
    /// that no put in it names, such as an alias.
    fn find_holes(&self, covered: &Version, segment: &Arc<Segment>, record: &SegmentRecord) -> Result<Vec<Range<u64>>> {
        let file = self.segments.file(segment)?;
        let mut holes = Vec::new();
        let mut living = 0;
        let mut offset = FIRST_FRAME;
        while offset < record.end {
            let found = frame_at(segment, &*file, offset, record.end)?;
            let mut alive = Vec::new();
            for entry in found.entries.iter().filter(|entry| entry.kind == EntryKind::Put) {
                let at = found.payload() + entry.offset;
                if leads_to(covered, &entry.key, segment.id, at)? {
                    alive.push(at..at + entry.length);
                }
            }
            living += alive.len() as u64;
            gaps(found.payload()..found.end(), alive, &mut holes);
            offset = found.end();
        }
        Ok(if living == record.live_values { holes } else { Vec::new() })
    }
}

/// The frame that must be there, in a part of a segment that the manifest covers.
pub(crate) fn frame_at(segment: &Arc<Segment>, file: &dyn StorageFile, offset: u64, end: u64) -> Result<Found> {
    read_frame(segment, file, offset, end)?
        .ok_or_else(|| Error::damaged(&segment.path, offset, "a commit's frame is broken"))
}

/// Whether a key leads to this very place.
pub(crate) fn leads_to(version: &Version, key: &[u8], segment: SegmentId, offset: u64) -> Result<bool> {
    Ok(version
        .lookup(key)?
        .is_some_and(|now| now.kind == IndexKind::Put && now.segment == segment && now.offset == offset))
}

/// Whether enough died in a segment, since it was last looked through, to be worth reading its frames.
fn is_worth_a_look(segment: &Segment, record: &SegmentRecord) -> bool {
    let died =
        segment.alive_when_punched.load(Ordering::Acquire).min(record.blob_bytes).saturating_sub(record.live_bytes);
    let middling = record.blob_bytes / record.values.max(1) >= HOLE_BYTES_MIN / 2;
    record.sealed && middling && died >= HOLE_BYTES_MIN && died >= record.blob_bytes / 16
}

/// Adds the whole blocks of `payload` that none of `alive` touches, where they are enough of them to be worth a call.
fn gaps(payload: Range<u64>, mut alive: Vec<Range<u64>>, holes: &mut Vec<Range<u64>>) {
    alive.sort_by_key(|range| range.start);
    let mut start = payload.start;
    let end = payload.end..payload.end;
    for next in alive.into_iter().chain(std::iter::once(end)) {
        let hole = start.next_multiple_of(limits::BLOCK_BYTES)..next.start / limits::BLOCK_BYTES * limits::BLOCK_BYTES;
        if hole.end.saturating_sub(hole.start) >= HOLE_BYTES_MIN {
            holes.push(hole);
        }
        start = start.max(next.end);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    /// Red under Miri, which shows what a processor may do, where the counts alone are looked at.
    #[test]
    fn whoever_finds_an_epoch_let_go_of_finds_done_what_its_holders_did() {
        for _ in 0..30 {
            let hold: Hold = Arc::new(Epoch(0));
            let mut reclaim = Reclaim { epoch: 1, earlier: [(0, Arc::downgrade(&hold))].into(), ..Reclaim::default() };
            // Somebody else who asks, or else the end of the count's own memory would order the same, mostly.
            let _asks = Arc::downgrade(&hold);
            let done = Arc::new([const { AtomicU64::new(0) }; 2]);
            let holders = [0, 1].map(|holder| {
                let (hold, done) = (Arc::clone(&hold), Arc::clone(&done));
                thread::spawn(move || {
                    done[holder].store(1, Ordering::Relaxed);
                    drop(hold);
                })
            });
            drop(hold);
            while reclaim.oldest_epoch() == 0 {
                thread::yield_now();
            }
            assert_eq!([0, 1].map(|holder| done[holder].load(Ordering::Relaxed)), [1, 1]);
            holders.into_iter().for_each(|holder| holder.join().unwrap());
        }
    }

    #[test]
    fn holes_are_whole_blocks_between_what_lives() {
        let between = |alive: &[(u64, u64)]| {
            let mut holes = Vec::new();
            gaps(40_960..1_040_960, alive.iter().map(|&(start, end)| start..end).collect(), &mut holes);
            holes.into_iter().map(|hole| (hole.start, hole.end)).collect::<Vec<_>>()
        };
        assert_eq!(between(&[]), [(40_960, 1_040_384)], "the payload's last block is cut by the test alone");
        assert_eq!(between(&[(100_000, 200_000)]), [(40_960, 98_304), (200_704, 1_040_384)]);
        assert_eq!(between(&[(40_960, 1_000_000)]), [(1_003_520, 1_040_384)]);
        assert_eq!(between(&[(40_960, 40_960)]), [(40_960, 1_040_384)], "a value of no bytes keeps none");
        assert_eq!(
            between(&[(500_000, 600_000), (50_000, 499_000)]),
            [(602_112, 1_040_384)],
            "too little lies between"
        );
        assert_eq!(between(&[(0, 2_000_000)]), []);
    }
}
