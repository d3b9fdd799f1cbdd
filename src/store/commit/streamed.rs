//! A small commit whose payload goes to the disk while it is still being copied: the caller hands on what it has copied, part by
//! part, to the thread that leads. Copying 1 MiB takes a quarter of the time that a fast disk takes for it.
//!
//! # Invariants
//! - All parts and the frame are written before anything is synced, in no order: as with any small commit, the checksums in
//!   the frame tell whether the payload is whole.
//! - The frame is written last, since it has the checksums: a payload whose caller went away is spoken for by nothing, and is
//!   cut off again.
//! - What lies on whole pages already is not copied but lent: the disk has it at once, and the caller takes its checksum meanwhile.
//! - The log is held while the caller copies, so nothing is streamed but what is in host memory: a GPU may have to be waited
//!   for, and a reader may do anything.

use std::iter;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use alight_format::limits::BLOCK_BYTES;
use alight_format::{EncodedBody, IndexEntry, PreludeFields, Seq};

use super::{Committer, Deleted, Written, place};
use crate::error::{Error, Result};
use crate::io::step;
use crate::storage::{LentBytes, Part, PartBytes, PooledBuf, PooledPart};

/// How a payload is cut, in sixteenths: a little first, so that the disk begins early, then what is copied meanwhile. Each part is
/// a call, and 10 µs of a virtual disk's time.
const PARTS: [u64; 3] = [1, 3, 12];

/// A commit in the leader's hands.
pub(crate) struct Streamed {
    pub(crate) durable: bool,
    frame: PooledPart,
    payload_len: u64,
    arriving: Receiver<Arriving>,
}

enum Arriving {
    Payload(PartBytes),
    Rest(Rest),
}

/// What is known once the payload was read.
pub(crate) struct Rest {
    pub(crate) body: EncodedBody,
    /// As those of a [`SmallCommit`](super::SmallCommit).
    pub(crate) entries: Vec<IndexEntry>,
    pub(crate) deleted: Option<Deleted>,
}

/// The same commit in the caller's hands.
pub(crate) struct Stream {
    parts: Vec<PooledPart>,
    leader: Sender<Arriving>,
}

/// Begins a commit in a buffer that has room for a frame of `frame_len` bytes and what is copied of the payload behind it: all but
/// the first `lent_len` bytes, which are lent.
pub(crate) fn begin(buffer: PooledBuf, frame_len: u64, lent_len: u64, durable: bool) -> (Streamed, Stream) {
    let copied_len = buffer.len() as u64 - frame_len;
    let mut parts = buffer.cut(iter::once(frame_len as usize).chain(part_lens(copied_len)));
    let payload = parts.split_off(1);
    let frame = parts.pop().expect("the first part is the frame");
    let (leader, arriving) = mpsc::channel();
    (Streamed { durable, frame, payload_len: lent_len + copied_len, arriving }, Stream { parts: payload, leader })
}

/// How long each part of a payload is: whole blocks.
fn part_lens(payload_len: u64) -> impl Iterator<Item = usize> {
    let mut left = payload_len;
    PARTS.into_iter().filter_map(move |sixteenths| {
        let len = (payload_len * sixteenths).div_ceil(16).next_multiple_of(BLOCK_BYTES).min(left);
        left -= len;
        // A payload is in memory.
        (len > 0).then_some(len as usize)
    })
}

impl Stream {
    /// Hands on the bytes that are lent.
    pub(crate) fn lend(&mut self, bytes: LentBytes) {
        let _ = self.leader.send(Arriving::Payload(PartBytes::Lent(bytes)));
    }

    /// Has every part of the payload filled, in order, and handed on.
    pub(crate) fn fill(&mut self, mut fill: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        for mut part in self.parts.drain(..) {
            fill(&mut part)?;
            // A leader that has failed takes no more, and says why.
            let _ = self.leader.send(Arriving::Payload(part.into()));
        }
        Ok(())
    }

    /// Hands on what the payload was needed for. Without it the commit is taken back.
    pub(crate) fn finish(self, rest: Rest) {
        let _ = self.leader.send(Arriving::Rest(rest));
    }
}

impl Committer {
    /// Writes a commit part by part as it comes. Blocks for the caller's copying and the disk's writing, not for a sync.
    pub(crate) fn write_streamed(&self, streamed: Streamed) -> Result<Seq> {
        let Streamed { durable, frame, payload_len, arriving } = streamed;
        let frame_len = frame.len() as u64;
        let mut log = self.log.lock();
        self.check()?;
        self.settle_found(&mut log)?;
        let synced_through = self.synced();
        let seq = log.next;
        let tail = self.ready_tail(&mut log, frame_len + payload_len)?;
        let (at, segment) = (tail.offset, Arc::clone(&tail.segment));
        let fields = PreludeFields {
            salt: segment.salt,
            offset: at,
            seq,
            payload_len,
            synced_through,
            previous_digest: tail.previous_digest,
            flags: 0,
            part: 0,
            parts: 1,
        };
        let end = at + frame_len + payload_len;
        let mut next = at + frame_len;
        let mut frame = Some(frame);
        let mut written = None;
        let mut parts = iter::from_fn(|| match arriving.recv().ok()? {
            Arriving::Payload(bytes) => {
                step();
                let offset = next;
                next += bytes.len() as u64;
                Some(Part { offset, bytes })
            }
            Arriving::Rest(Rest { body, mut entries, deleted }) => {
                let mut frame = frame.take()?;
                let digest = body.write_frame(&fields, &mut frame);
                place(&mut entries, seq, &segment, at, at + frame_len);
                let segment = Arc::clone(&segment);
                written = Some(Written { seq, durable, segment, end, digest, entries, repeats: false, deleted });
                Some(Part { offset: at, bytes: frame.into() })
            }
        });
        let outcome = tail.file.write_parts_at(&mut parts);
        match (outcome, written) {
            (Ok(()), Some(written)) => {
                self.note_appended(&mut log, vec![written]);
                Ok(seq)
            }
            (outcome, _) => {
                let error = match outcome {
                    Err(source) => Error::Io { action: "write a commit to", path: segment.path.clone(), source },
                    Ok(()) => Error::Panicked { operation: "put", why: "the thread that made it is gone".into() },
                };
                self.undo_small(&mut log);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::{Deref, Range};
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::device::Device;
    use crate::storage::AlignedBuf;
    use crate::storage::sim::{Event, Fault, FaultKind, OpKind, SimStorage};
    use crate::{Maintenance, Store};

    #[test]
    fn parts_are_whole_blocks_and_all_of_the_payload() {
        for blocks in 1..300 {
            let lens: Vec<usize> = part_lens(blocks * BLOCK_BYTES).collect();
            assert_eq!(lens.iter().sum::<usize>() as u64, blocks * BLOCK_BYTES);
            assert!(lens.iter().all(|&len| len > 0 && (len as u64).is_multiple_of(BLOCK_BYTES)));
            assert!(lens.len() <= PARTS.len());
        }
        let mebibyte: Vec<usize> = part_lens(1 << 20).map(|len| len >> 10).collect();
        assert_eq!(mebibyte, [64, 192, 768]);
    }

    fn value(seed: usize) -> Vec<u8> {
        (0..300_000).map(|at| (at * 31 + at / 255 + seed * 7) as u8).collect()
    }

    fn open(disk: &SimStorage) -> Store {
        let options = Store::options().create(true).storage(Arc::new(disk.clone())).maintenance(Maintenance::Inline);
        options.segment_bytes(4 << 20).open("/s").unwrap()
    }

    fn writes_and_syncs(disk: &SimStorage, from: usize) -> Vec<OpKind> {
        let trace = disk.trace();
        let calls = trace.events().skip(from).filter_map(|event| match event {
            Event::Call(call) => Some(call.op),
            _ => None,
        });
        calls.filter(|op| matches!(op, OpKind::Write | OpKind::Sync)).collect()
    }

    #[test]
    fn a_payload_is_written_in_parts_and_the_frame_last_with_one_sync_behind() {
        let disk = SimStorage::new();
        let store = open(&disk);
        store.put("first", &*off_a_page(&value(0))).unwrap();
        let before = disk.trace().len();
        store.put("second", &*off_a_page(&value(1))).unwrap();
        let mut expected = vec![OpKind::Write; PARTS.len() + 1];
        expected.push(OpKind::Sync);
        assert_eq!(writes_and_syncs(&disk, before), expected);
        assert!(store.get("second", &Device::host()).unwrap().as_host() == Some(&value(1)[..]));
    }

    /// Bytes that begin on a page, or off one: where a vector's do is chance.
    struct Placed {
        pages: AlignedBuf,
        range: Range<usize>,
    }

    fn placed(bytes: &[u8], start: usize) -> Placed {
        let range = start..start + bytes.len();
        let mut pages = AlignedBuf::zeroed(range.end);
        pages[range.clone()].copy_from_slice(bytes);
        Placed { pages, range }
    }

    fn on_a_page(bytes: &[u8]) -> Placed {
        placed(bytes, 0)
    }

    fn off_a_page(bytes: &[u8]) -> Placed {
        placed(bytes, 8)
    }

    impl Deref for Placed {
        type Target = [u8];

        fn deref(&self) -> &[u8] {
            &self.pages[self.range.clone()]
        }
    }

    #[test]
    fn what_lies_on_whole_pages_is_lent_until_the_disk_has_it_copied_all_the_same() {
        let disk = SimStorage::new();
        let store = open(&disk);
        store.put("first", &*off_a_page(&value(0))).unwrap();
        for (number, writes) in [(1, 3), (2, PARTS.len() + 1)] {
            let (value, before) = (value(number), disk.trace().len());
            store.put(number.to_string(), &*on_a_page(&value)).unwrap();
            let mut expected = vec![OpKind::Write; writes];
            expected.push(OpKind::Sync);
            assert_eq!(writes_and_syncs(&disk, before), expected);
            assert!(store.get(number.to_string(), &Device::host()).unwrap().as_host() == Some(&value[..]));
        }
        assert!(!store.core().unwrap().lends.load(Ordering::Relaxed));
    }

    #[test]
    #[cfg_attr(miri, ignore = "real files")]
    fn what_is_lent_to_a_real_disk_is_there_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = value(1).repeat(4);
        let pages = on_a_page(&bytes);
        let lens = [1 << 20, (1 << 20) - 1, 300_000, 262_145];
        let store = Store::create(folder.path().join("s")).unwrap();
        for len in lens {
            store.put(len.to_string(), &pages[..len]).unwrap();
        }
        // Off a page: copied.
        store.put("odd", &pages[8..8 + 300_000]).unwrap();
        store.close().unwrap();
        let store = Store::open(folder.path().join("s")).unwrap();
        for len in lens {
            assert!(store.get(len.to_string(), &Device::host()).unwrap().as_host() == Some(&bytes[..len]), "{len}");
        }
        assert!(store.get("odd", &Device::host()).unwrap().as_host() == Some(&bytes[8..8 + 300_000]));
        assert!(store.verify(|_| {}).unwrap().is_sound());
    }

    #[test]
    fn whichever_call_fails_the_commit_is_there_whole_or_not_at_all_and_the_next_one_finds_its_place() {
        for kind in [FaultKind::Eio, FaultKind::EioAfter, FaultKind::Enospc, FaultKind::Short, FaultKind::Eintr] {
            // Copied, and lent in one part with what is left of a page.
            for (nth, lent) in (0..=PARTS.len() as u64).map(|nth| (nth, false)).chain((0..3).map(|nth| (nth, true))) {
                let disk = SimStorage::new();
                let store = open(&disk);
                store.put("first", &*off_a_page(&value(0))).unwrap();
                disk.inject(Fault::new(kind, nth).on(OpKind::Write));
                let second = if lent { on_a_page(&value(1)) } else { off_a_page(&value(1)) };
                let outcome = store.put("second", &*second);
                assert_eq!(outcome.is_ok(), matches!(kind, FaultKind::Short | FaultKind::Eintr), "{kind:?} {nth}");
                assert_eq!(store.contains("second").unwrap(), outcome.is_ok());
                store.put("third", &*off_a_page(&value(2))).unwrap();
                store.close().unwrap();
                let store = open(&disk);
                assert!(store.get("third", &Device::host()).unwrap().as_host() == Some(&value(2)[..]));
                assert_eq!(store.contains("second").unwrap(), outcome.is_ok());
                assert!(store.verify(|_| {}).unwrap().is_sound());
            }
        }
    }

    #[test]
    fn a_commit_whose_caller_is_gone_is_taken_back() {
        let disk = SimStorage::new();
        let store = open(&disk);
        store.put("first", &*off_a_page(&value(0))).unwrap();
        let core = store.core().unwrap();
        for filled in [0, 1, 3] {
            let buffer = core.buffers.take(4096 + 65_536);
            let (begun, mut stream) = core.begin_in_group(buffer, 4096, 0, true).unwrap().expect("nobody is at work");
            let mut left = filled;
            let outcome = stream.fill(|part| {
                part.fill(7);
                left -= 1;
                if left < 0 { Err(Error::Closed) } else { Ok(()) }
            });
            assert_eq!(outcome.is_ok(), filled == 3);
            drop(stream);
            assert!(matches!(begun.wait(), Err(Error::Panicked { .. })));
        }
        store.put("second", &*off_a_page(&value(1))).unwrap();
        drop(core);
        store.close().unwrap();
        let store = open(&disk);
        assert!(store.verify(|_| {}).unwrap().is_sound());
        assert!(store.get("second", &Device::host()).unwrap().as_host() == Some(&value(1)[..]));
    }
}
