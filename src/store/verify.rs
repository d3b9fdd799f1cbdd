//! Reads a whole store and checks every checksum in it.
//!
//! Three passes: the index, every block of every run; the segments, frame by frame, with every payload that the frames
//! speak for, dead ones too but where their bytes were given back; and the keys, each of which must lead to an extent that the segments really hold, and did
//! so with the checksum that the index has.

use std::collections::HashMap;
use std::sync::Arc;

use alight_format::{EntryKind, IndexEntry, IndexKind, SegmentId, Seq, limits};
use tracing::field::Empty;

use crate::error::{Damage, DisplayKey, Error, Result};
use crate::index::Version;
use crate::io::{Extent, SegmentFile, read_chunks};
use crate::metrics::Counters;
use crate::store::core::Core;
use crate::store::manifest;
use crate::store::recover::{Found, read_frame};
use crate::store::segment::{Accounting, FIRST_FRAME, Segment};
use crate::store::watch::go_on;
use crate::trace::scope;

/// How far a verification has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyProgress {
    /// Bytes read so far.
    pub bytes_done: u64,
    /// Bytes to read in all.
    pub bytes_total: u64,
    /// Damages found so far.
    pub damages: u64,
}

/// What a verification found; made by [`Store::verify`](crate::Store::verify).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Keys that lead to a value, sound or not.
    pub keys: u64,
    /// Commits whose frame was read.
    pub commits: u64,
    /// Values whose bytes were read and compared, dead ones included.
    pub values: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Everything that is wrong, each with its file and, where one is hit, its key.
    pub damages: Vec<Damage>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.damages.is_empty()
    }

    pub(crate) fn of(core: &Core, progress: impl FnMut(VerifyProgress)) -> Result<VerifyReport> {
        let counted = core.count_late();
        let (version, segments) = core.version_and_accounts();
        let scope = scope!("verify", segments = segments.len(), keys = Empty, bytes = Empty);
        let index_bytes: u64 = version.runs.iter().map(|run| run.len_bytes()).sum();
        let mut check = Check {
            core,
            version: &version,
            report: VerifyReport::default(),
            progress,
            bytes_total: index_bytes + segments.iter().map(|(_, account)| account.end).sum::<u64>(),
        };
        check.note(counted)?;
        check.note(manifest::read(&*core.storage, &core.layout).map(drop))?;
        for run in version.runs.iter() {
            let outcome = run.verify();
            check.note(outcome)?;
            check.advance(run.len_bytes())?;
        }
        for (segment, account) in &segments {
            check.segment(segment, account.end)?;
        }
        check.keys(&segments)?;
        let Check { mut report, .. } = check;
        report.damages.dedup();
        scope.record("keys", report.keys);
        scope.record("bytes", report.bytes);
        Ok(report)
    }
}

struct Check<'a, F> {
    core: &'a Core,
    version: &'a Version,
    report: VerifyReport,
    progress: F,
    bytes_total: u64,
}

impl<F: FnMut(VerifyProgress)> Check<'_, F> {
    /// Files damage in the report; anything else that went wrong ends the verification, but for files that cannot be
    /// read, which are damage to whoever needs them.
    fn note(&mut self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Ok(()) => Ok(()),
            Err(Error::Damaged(damage)) => {
                self.report.damages.push(damage);
                Ok(())
            }
            Err(Error::Io { action, path, source }) => {
                let what = format!("it cannot be read: {action}: {source}");
                self.report.damages.push(Damage { path, offset: None, key: None, what });
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    /// Tells how far it has come. An error where nobody waits for it any more.
    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.report.bytes += bytes;
        (self.progress)(VerifyProgress {
            bytes_done: self.report.bytes.min(self.bytes_total),
            bytes_total: self.bytes_total,
            damages: self.report.damages.len() as u64,
        });
        self.check_wanted()
    }

    fn check_wanted(&self) -> Result<()> {
        go_on("verify", self.core.layout.root())
    }

    /// Reads a segment from its header to its last published frame.
    fn segment(&mut self, segment: &Arc<Segment>, end: u64) -> Result<()> {
        let file = match self.core.segments.file(segment) {
            Ok(file) => SegmentFile { file, path: Arc::new(segment.path.clone()), sealed_end: segment.sealed_end() },
            Err(error) => return self.note(Err(error)),
        };
        let mut offset = FIRST_FRAME;
        let mut previous = (0, Seq::ZERO);
        self.advance(FIRST_FRAME)?;
        while offset < end {
            let found = match read_frame(segment, &*file.file, offset, end) {
                Ok(Some(found)) => found,
                Ok(None) => return self.lost_frames(segment, offset, end),
                Err(error) => return self.note(Err(error)),
            };
            if found.prelude.previous_digest != previous.0 || found.prelude.seq <= previous.1 {
                let what = "a frame that does not follow the one before it";
                self.note(Err(Error::damaged(&segment.path, offset, what)))?;
            }
            previous = (found.digest, found.prelude.seq);
            self.report.commits += 1;
            self.advance(found.prelude.frame_len)?;
            self.payload(&file, &found)?;
            offset = found.end();
        }
        Ok(())
    }

    /// A frame is broken, so nothing says where the next one begins. The values behind it are still checked by the keys
    /// that lead to them.
    fn lost_frames(&mut self, segment: &Segment, offset: u64, end: u64) -> Result<()> {
        let what = "a commit's frame is broken; its values are checked by the index alone";
        self.note(Err(Error::damaged(&segment.path, offset, what)))?;
        let version = self.version;
        let entries = match version.entries() {
            Ok(entries) => entries,
            Err(error) => return self.note(Err(error)),
        };
        for entry in entries {
            let outcome = match entry {
                Ok(entry) if leads_behind(&entry, segment, offset) => self.core.check_value(&entry),
                Ok(_) => Ok(()),
                Err(error) => return self.note(Err(error)),
            };
            self.note(outcome)?;
        }
        self.advance(end - offset)
    }

    fn payload(&mut self, file: &SegmentFile, found: &Found) -> Result<()> {
        for entry in found.entries.iter().filter(|entry| entry.kind == EntryKind::Put) {
            let extent = Extent {
                segment: found.segment.id,
                offset: found.payload() + entry.offset,
                length: entry.length,
                crc: entry.crc,
            };
            let mut whole = crc32fast::Hasher::new();
            let mut chunks_sound = true;
            let outcome = read_chunks(file, &extent, 0..extent.length, &self.core.counters, |at, bytes| {
                whole.update(bytes);
                let chunk = (at / limits::CHUNK_BYTES) as usize;
                chunks_sound &= entry.chunk_crcs.get(chunk).is_none_or(|&crc| crc == alight_format::crc32(bytes));
                Ok(())
            });
            // What could not be read is told as that, and not as wrong bytes.
            let was_read = outcome.is_ok();
            self.note(outcome)?;
            self.report.values += 1;
            if was_read && (whole.finalize() != entry.crc || !chunks_sound) {
                let live = self.version.get(&entry.key).is_ok_and(|current| {
                    current.is_some_and(|current| (current.segment, current.offset) == (extent.segment, extent.offset))
                });
                if !live && found.segment.sealed_end().is_some() {
                    match given_back(file, &extent) {
                        Ok(false) => {}
                        outcome => {
                            self.report.values -= 1;
                            self.note(outcome.map(drop))?;
                            continue;
                        }
                    }
                }
                Counters::add(&self.core.counters.checksum_failures, 1);
                let whose = if live { "" } else { " (an older value, which no key leads to any more)" };
                self.report.damages.push(Damage {
                    path: file.path.to_path_buf(),
                    offset: Some(extent.offset),
                    key: Some(DisplayKey(entry.key.clone())),
                    what: format!("{} bytes do not have the checksum they were put with{whose}", entry.length),
                });
            }
        }
        self.advance(found.prelude.payload_len)
    }

    /// Every key must lead into a segment, inside its committed part; and of each segment as many as its account says, since
    /// it goes when that says none.
    fn keys(&mut self, segments: &[(Arc<Segment>, Accounting)]) -> Result<()> {
        let mut found: HashMap<SegmentId, (u64, u64)> = HashMap::new();
        let entries = match self.version.entries() {
            Ok(entries) => entries,
            Err(error) => return self.note(Err(error)),
        };
        for entry in entries {
            self.check_wanted()?;
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return self.note(Err(error)),
            };
            if entry.kind != IndexKind::Put {
                continue;
            }
            self.report.keys += 1;
            let living = found.entry(entry.segment).or_default();
            *living = (living.0 + 1, living.1 + entry.length);
            let segment = segments.binary_search_by_key(&entry.segment, |(segment, _)| segment.id);
            let inside = segment.is_ok_and(|at| entry.offset + entry.length <= segments[at].1.end);
            if !inside {
                self.report.damages.push(Damage {
                    path: self.core.layout.segment(entry.segment),
                    offset: Some(entry.offset),
                    key: Some(DisplayKey(entry.key.clone())),
                    what: "the index leads outside what was committed".into(),
                });
            }
        }
        if !self.version.uncounted.is_empty() {
            // They lag behind: what could not be read for them is in the report, or came up meanwhile.
            return Ok(());
        }
        for (segment, account) in segments {
            let (values, bytes) = found.get(&segment.id).copied().unwrap_or_default();
            if (values, bytes) != (account.live_values, account.live_bytes) {
                let Accounting { live_values, live_bytes, .. } = account;
                let what = format!(
                    "keys lead to {values} values of {bytes} bytes in it, and the store counts {live_values} of {live_bytes}"
                );
                self.note(Err(Error::damaged(&segment.path, None, what)))?;
            }
        }
        Ok(())
    }
}

/// Whether the file has a hole where a dead value lay: its bytes were given back.
fn given_back(file: &SegmentFile, extent: &Extent) -> Result<bool> {
    let blocks = extent.offset / limits::BLOCK_BYTES..extent.end().div_ceil(limits::BLOCK_BYTES);
    for start in blocks.map(|block| block * limits::BLOCK_BYTES) {
        // Where the file system cannot tell it says that data is there, and no hole was punched.
        let data = file.file.next_data(start).map_err(Error::io("search", &file.path))?;
        if data.is_none_or(|data| data > start) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn leads_behind(entry: &IndexEntry, segment: &Segment, offset: u64) -> bool {
    entry.kind == IndexKind::Put && entry.segment == segment.id && entry.offset >= offset
}
