//! What a store's segments say happened after the manifest was written, and what of it may be believed.
//!
//! Recovery reads frames and decides; it changes nothing. [`decide`] is the whole decision, a function of values: it is
//! tested over its whole input space for short histories.
//!
//! # Invariants
//! - What is accepted is the unbroken run of sequence numbers after the manifest's, over all segments.
//! - A missing number is damage exactly when some valid frame says that a sync covered it. Then nothing is accepted,
//!   nothing is cut, and the open is refused. Otherwise it is the torn tail of commits that nobody was told of.
//! - A payload is read only where the frame did not wait for it (small commits) and no later sync is known to cover it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use alight_format::{Entry, EntryKind, Frame, PAYLOAD_SYNCED, PRELUDE_BYTES, Prelude, Seq, is_zero, limits};

use crate::error::{Damage, Error, Result};
use crate::io::step;
use crate::storage::{AlignedBuf, Caching, StorageFile, read_exact_at};
use crate::store::segment::{Segment, read_header};

/// A frame that recovery found after the part of a segment that the manifest covers.
pub(crate) struct Found {
    pub(crate) segment: Arc<Segment>,
    pub(crate) prelude: Prelude,
    pub(crate) entries: Vec<Entry>,
    pub(crate) digest: u32,
}

impl Found {
    /// Where its commit ends in its segment.
    pub(crate) fn end(&self) -> u64 {
        self.prelude.offset + self.prelude.frame_len + self.prelude.payload_len
    }

    /// Whether the payload was synced before the frame was written.
    pub(crate) fn payload_synced(&self) -> bool {
        self.prelude.flags & PAYLOAD_SYNCED != 0
    }

    /// Where its payload begins.
    pub(crate) fn payload(&self) -> u64 {
        self.prelude.offset + self.prelude.frame_len
    }
}

/// What the tail of one segment holds.
pub(crate) struct TailScan {
    pub(crate) segment: Arc<Segment>,
    /// The frames back to back after the covered part.
    pub(crate) frames: Vec<Found>,
    /// The highest `synced_through` of any valid frame, those after a gap included.
    pub(crate) synced_through: Seq,
    /// Where the last of `frames` ends, its payload included.
    pub(crate) end_of_frames: u64,
    /// Whether anything but zeros follows there.
    pub(crate) litter: bool,
    /// Whether the segment holds one commit alone.
    pub(crate) single: bool,
    pub(crate) len_bytes: u64,
}

/// Reads what follows the covered part of a segment.
pub(crate) fn scan_tail(segment: &Arc<Segment>, file: &dyn StorageFile) -> Result<TailScan> {
    let path = &segment.path;
    let len_bytes = file.facts().map_err(Error::io("measure", path))?.len_bytes;
    let start = *segment.accounting.lock();
    let mut scan = TailScan {
        segment: Arc::clone(segment),
        frames: Vec::new(),
        synced_through: Seq::ZERO,
        end_of_frames: start.end,
        litter: false,
        single: read_header(file, path)?.single_commit,
        len_bytes,
    };
    let mut offset = start.end;
    let mut digest = start.previous_digest;
    let mut window = Window::new(file, path, len_bytes);
    while let Some(found) = read_frame_through(&mut window, segment, offset)? {
        if found.prelude.previous_digest != digest {
            break;
        }
        scan.synced_through = scan.synced_through.max(found.prelude.synced_through);
        digest = found.digest;
        offset = found.end();
        scan.frames.push(found);
    }
    scan.end_of_frames = offset;
    look_past(segment, file, &mut scan)?;
    Ok(scan)
}

/// How much of a tail is read at a time.
const WINDOW_BYTES: usize = 1 << 20;

/// The bytes of a file around where it was last read: frames lie close together, and reading them one by one would wait
/// for the disk as often.
struct Window<'a> {
    file: &'a dyn StorageFile,
    path: &'a Path,
    file_len: u64,
    buffer: AlignedBuf,
    start: u64,
    filled: usize,
}

impl<'a> Window<'a> {
    fn new(file: &'a dyn StorageFile, path: &'a Path, file_len: u64) -> Self {
        Self { file, path, file_len, buffer: AlignedBuf::zeroed(0), start: 0, filled: 0 }
    }

    /// The bytes at `offset`, which lie inside the file.
    fn get(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        let inside = offset >= self.start && offset + len as u64 <= self.start + self.filled as u64;
        if !inside {
            let room = len.max(WINDOW_BYTES).min((self.file_len - offset) as usize);
            if self.buffer.len() < room {
                self.buffer = AlignedBuf::zeroed(room);
            }
            (self.start, self.filled) = (offset, 0);
            read_exact_at(self.file, &mut self.buffer[..room], offset, Caching::Buffered)
                .map_err(Error::io("read", self.path))?;
            step();
            self.filled = room;
        }
        Ok(&self.buffer[(offset - self.start) as usize..][..len])
    }
}

/// Looks behind the first gap for anything at all, and for frames that know of syncs. In a segment that holds one
/// commit alone nothing can follow a torn one, and its payload, which may be of any length, is not searched.
pub(crate) fn look_past(segment: &Arc<Segment>, file: &dyn StorageFile, scan: &mut TailScan) -> Result<()> {
    let path = &segment.path;
    let mut window = AlignedBuf::zeroed(0);
    let mut offset = scan.end_of_frames;
    while let Some(data) = file.next_data(offset).map_err(Error::io("search", path))? {
        // A frame starts on a block.
        offset = offset.max(data / limits::BLOCK_BYTES * limits::BLOCK_BYTES);
        if offset >= scan.len_bytes {
            break;
        }
        let take = (scan.len_bytes - offset).min(WINDOW_BYTES as u64) as usize;
        if window.len() < take {
            window = AlignedBuf::zeroed(take);
        }
        read_exact_at(file, &mut window[..take], offset, Caching::Buffered).map_err(Error::io("read", path))?;
        step();
        let mut next = offset + take as u64;
        for (index, block) in window[..take].chunks(limits::BLOCK_BYTES as usize).enumerate() {
            if is_zero(block) {
                continue;
            }
            scan.litter = true;
            if scan.single {
                return Ok(());
            }
            let at = offset + index as u64 * limits::BLOCK_BYTES;
            // The prelude alone is cheap to judge; the whole frame is read only where it fits this very place.
            if block.len() >= PRELUDE_BYTES
                && Prelude::decode(block).is_ok_and(|prelude| prelude.belongs(segment.salt, at))
                && let Some(found) = read_frame(segment, file, at, scan.len_bytes)?
            {
                scan.synced_through = scan.synced_through.max(found.prelude.synced_through);
                next = found.end().max(at + limits::BLOCK_BYTES);
                break;
            }
        }
        offset = next;
    }
    Ok(())
}

/// The frame at `offset`, if a whole and valid one of this segment lies there with room for its payload.
pub(crate) fn read_frame(
    segment: &Arc<Segment>,
    file: &dyn StorageFile,
    offset: u64,
    len_bytes: u64,
) -> Result<Option<Found>> {
    let path = &segment.path;
    if offset + limits::BLOCK_BYTES > len_bytes {
        return Ok(None);
    }
    let mut first = AlignedBuf::zeroed(limits::BLOCK_BYTES as usize);
    read_exact_at(file, &mut first, offset, Caching::Buffered).map_err(Error::io("read", path))?;
    let Some(prelude) = own_prelude(&first, segment, offset, len_bytes) else { return Ok(None) };
    let mut whole = first;
    if prelude.frame_len > limits::BLOCK_BYTES {
        whole = AlignedBuf::zeroed(prelude.frame_len as usize);
        read_exact_at(file, &mut whole, offset, Caching::Buffered).map_err(Error::io("read", path))?;
    }
    Ok(decode(&whole[..prelude.frame_len as usize], segment))
}

/// [`read_frame`], of many in a row.
fn read_frame_through(window: &mut Window<'_>, segment: &Arc<Segment>, offset: u64) -> Result<Option<Found>> {
    let len_bytes = window.file_len;
    if offset + limits::BLOCK_BYTES > len_bytes {
        return Ok(None);
    }
    let first = window.get(offset, limits::BLOCK_BYTES as usize)?;
    let Some(prelude) = own_prelude(first, segment, offset, len_bytes) else { return Ok(None) };
    Ok(decode(window.get(offset, prelude.frame_len as usize)?, segment))
}

/// The prelude of a frame that belongs to this place of this segment, and whose commit ends inside the file.
fn own_prelude(block: &[u8], segment: &Segment, offset: u64, len_bytes: u64) -> Option<Prelude> {
    let prelude = Prelude::decode(block).ok()?;
    // Every sum is checked: a digest only proves that these are the bytes somebody wrote.
    let end = offset.checked_add(prelude.frame_len)?.checked_add(prelude.payload_len)?;
    (prelude.belongs(segment.salt, offset) && end <= len_bytes).then_some(prelude)
}

fn decode(bytes: &[u8], segment: &Arc<Segment>) -> Option<Found> {
    let frame = Frame::decode(bytes).ok()?;
    Some(Found { segment: Arc::clone(segment), prelude: frame.prelude, entries: frame.entries, digest: frame.digest })
}

/// Reads a small commit's payload and compares it with its entries' checksums.
pub(crate) fn payload_is_whole(found: &Found, file: &dyn StorageFile) -> Result<bool> {
    let path = &found.segment.path;
    let mut payload = AlignedBuf::zeroed(found.prelude.payload_len as usize);
    read_exact_at(file, &mut payload, found.payload(), Caching::Buffered).map_err(Error::io("read", path))?;
    step();
    Ok(found.entries.iter().filter(|entry| entry.kind == EntryKind::Put).all(|entry| {
        let start = entry.offset as usize;
        payload.get(start..start + entry.length as usize).is_some_and(|bytes| alight_format::crc32(bytes) == entry.crc)
    }))
}

/// What is known of one sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Evidence {
    /// Whether the frame's payload, where recovery has to read it, is what the frame says.
    pub(crate) believed: bool,
}

/// What recovery does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Everything up to and including this number is accepted; what lies after it is cut.
    Accept(Seq),
    /// This number was made durable once and is missing now.
    Damaged(Seq),
}

/// Decides what of the commits after `covered` to believe, given which numbers have a frame, and up to which number a
/// sync is known to have reached.
pub(crate) fn decide(covered: Seq, found: &BTreeMap<Seq, Evidence>, synced_through: Seq) -> Verdict {
    let mut last = covered;
    while found.get(&last.next()).is_some_and(|evidence| evidence.believed) {
        last = last.next();
    }
    if last < synced_through { Verdict::Damaged(last.next()) } else { Verdict::Accept(last) }
}

/// The outcome of looking at all tails.
pub(crate) struct Recovery {
    /// The accepted commits, in order.
    pub(crate) commits: Vec<Found>,
    pub(crate) last: Seq,
}

/// Orders what the tails hold and decides what of it to accept; nothing after `trusted`, where that is given.
pub(crate) fn judge(covered: Seq, trusted: Option<Seq>, scans: &mut [TailScan], files: &Files<'_>) -> Result<Recovery> {
    let proven = scans.iter().map(|scan| scan.synced_through).fold(covered, Seq::max);
    let mut evidence = BTreeMap::new();
    let mut by_seq: BTreeMap<Seq, Found> = BTreeMap::new();
    for scan in scans.iter_mut() {
        for found in scan.frames.drain(..) {
            let seq = found.prelude.seq;
            if trusted.is_some_and(|trusted| seq > trusted.max(proven)) {
                continue;
            }
            let believed =
                seq <= proven || found.payload_synced() || payload_is_whole(&found, &*files(&found.segment)?)?;
            if seq <= covered || evidence.insert(seq, Evidence { believed }).is_some() {
                return Err(Error::Damaged(Damage {
                    path: found.segment.path.clone(),
                    offset: Some(found.prelude.offset),
                    key: None,
                    what: format!("commit {seq} lies here and in another place too; nothing was changed"),
                }));
            }
            by_seq.insert(seq, found);
        }
    }
    match decide(covered, &evidence, proven) {
        Verdict::Damaged(missing) => Err(damage(missing, proven, &by_seq, scans)),
        Verdict::Accept(last) => {
            by_seq.split_off(&last.next());
            Ok(Recovery { commits: by_seq.into_values().collect(), last })
        }
    }
}

/// Opens a segment's file for reading.
pub(crate) type Files<'a> = dyn Fn(&Segment) -> Result<Arc<dyn StorageFile>> + 'a;

fn damage(missing: Seq, proven: Seq, found: &BTreeMap<Seq, Found>, scans: &[TailScan]) -> Error {
    // The commit before the missing one tells the likely file; a segment with a torn tail the next likely.
    let suspect = scans
        .iter()
        .find(|scan| scan.litter)
        .map(|scan| scan.segment.path.clone())
        .or_else(|| found.range(..missing).next_back().map(|(_, found)| found.segment.path.clone()))
        .or_else(|| scans.first().map(|scan| scan.segment.path.clone()))
        .unwrap_or_else(|| Path::new("segments").to_path_buf());
    Error::Damaged(Damage {
        path: suspect,
        offset: None,
        key: None,
        what: format!(
            "commit {missing} was durable (a later commit says that a sync reached commit {proven}) and is missing or \
             broken; the store was left as it is"
        ),
    })
}

/// Whether a segment that is not in the manifest and has no readable header was nevertheless written to. A header is
/// durable before the first frame, so a frame without one is damage.
pub(crate) fn holds_a_frame(file: &dyn StorageFile, path: &Path) -> Result<bool> {
    let len_bytes = file.facts().map_err(Error::io("measure", path))?.len_bytes;
    if len_bytes < 2 * limits::BLOCK_BYTES {
        return Ok(false);
    }
    let mut block = AlignedBuf::zeroed(limits::BLOCK_BYTES as usize);
    read_exact_at(file, &mut block, limits::BLOCK_BYTES, Caching::Buffered).map_err(Error::io("read", path))?;
    Ok(Prelude::decode(&block).is_ok_and(|prelude| prelude.offset == limits::BLOCK_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seqs(bits: u32, believed: u32, covered: u64, len: u64) -> BTreeMap<Seq, Evidence> {
        (0..len)
            .filter(|n| bits >> n & 1 == 1)
            .map(|n| (Seq(covered + 1 + n), Evidence { believed: believed >> n & 1 == 1 }))
            .collect()
    }

    /// Every history of up to seven commits after the manifest: each present or not, believed or not, with every sync
    /// evidence that could exist.
    #[test]
    fn every_short_history_is_decided_as_the_rule_says() {
        for covered in [0, 1, 9] {
            for len in 0..=if cfg!(miri) { 3 } else { 7u64 } {
                for present in 0..1u32 << len {
                    for believed in 0..1u32 << len {
                        for synced in 0..=len + 1 {
                            let found = seqs(present, believed, covered, len);
                            let verdict = decide(Seq(covered), &found, Seq(covered + synced));
                            let whole = (present & believed).trailing_ones().min(len as u32) as u64;
                            let expected = if whole >= synced {
                                Verdict::Accept(Seq(covered + whole))
                            } else {
                                Verdict::Damaged(Seq(covered + whole + 1))
                            };
                            assert_eq!(verdict, expected, "{covered} {len} {present:b} {believed:b} {synced}");
                        }
                    }
                }
            }
        }
    }
}
