//! What the real file system adds to the suite that every implementation passes.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::storage::{AlignedBuf, Arrival, BufferPool, Caching, Landing, Part, Parts, read_exact_at, write_all_at};

fn fresh() -> (FileStorage, PathBuf, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (FileStorage::new(), dir.path().to_path_buf(), dir)
}

mod suite {
    use super::fresh;
    crate::storage::suite::suite!(fresh());
}

#[test]
fn a_misaligned_direct_transfer_goes_through_the_page_cache() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    write_all_at(&*file, b"not a whole page", 5, Caching::Direct).unwrap();
    let pages = AlignedBuf::zeroed(8192);
    // The first slice is aligned, the second is not: no part of the call may go direct.
    let slices = [IoSlice::new(&pages[..4096]), IoSlice::new(&pages[4097..8192])];
    assert_eq!(file.write_vectored_at(&slices, 4096, Caching::Direct).unwrap(), 8191);
    let mut buf = [0; 16];
    read_exact_at(&*file, &mut buf, 5, Caching::Direct).unwrap();
    assert_eq!(&buf, b"not a whole page");
}

#[test]
fn misaligned_parts_are_written_too_and_a_part_past_every_limit_is_an_error() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let parts = |lens: &[usize], offsets: &[u64]| {
        let mut whole = Arc::new(BufferPool::default()).take(lens.iter().sum());
        whole.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
        let parts = whole.cut(lens.iter().copied()).into_iter().zip(offsets.to_vec());
        parts.map(|(bytes, offset)| Part { offset, bytes: bytes.into() }).collect::<Vec<_>>().into_iter()
    };
    file.write_parts_at(&mut parts(&[4096, 100, 8192], &[0, 4096, 4196])).unwrap();
    let mut found = vec![0; 4096 + 100 + 8192];
    read_exact_at(&*file, &mut found, 0, Caching::Buffered).unwrap();
    assert!(found.iter().enumerate().all(|(at, &byte)| byte == (at % 251) as u8));
    let far = file.write_parts_at(&mut parts(&[4096, 4096], &[0, i64::MAX as u64 - 4095]));
    assert!(far.is_err(), "no file is as long");
    let past = file.write_parts_at(&mut parts(&[4096], &[u64::MAX - 4095]));
    assert_eq!(past.unwrap_err().kind(), ErrorKind::InvalidInput);
}

/// Memory that is shown to a test when it is freed.
struct Shown {
    memory: AlignedBuf,
    show: Sender<Vec<u8>>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.show.send(self.memory.to_vec());
    }
}

/// What a test reads to, until it is left.
struct Target(Option<Shown>);

#[expect(unsafe_code, reason = "the trait's promise")]
// SAFETY: as that of the buffer in it.
unsafe impl Landing for Target {
    fn bytes(&mut self) -> &mut [u8] {
        self.0.as_mut().map(|shown| &mut shown.memory[..]).unwrap_or_default()
    }

    fn leave(&mut self) -> Box<dyn std::any::Any + Send> {
        Box::new(self.0.take())
    }
}

#[test]
fn a_read_that_is_overdue_keeps_its_memory_until_it_has_ended() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let mut bytes = AlignedBuf::zeroed(4 << 20);
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 5 % 251) as u8);
    write_all_at(&*file, &bytes, 0, Caching::Direct).unwrap();
    let (show, shown) = mpsc::channel();
    let (mut overdue, mut refused) = (0, 0);
    for _ in 0..20 {
        let mut target = Target(Some(Shown { memory: AlignedBuf::zeroed(4 << 20), show: show.clone() }));
        let parts = Parts { offset: 0, len: 4 << 20, part_bytes: 2 << 20 };
        let (mut told, no_time) = (0, Some(Duration::ZERO));
        match file.read_parts_at(&mut target, parts, no_time, &mut |part| told += part.len()).unwrap() {
            Arrival::Landed => assert!(told == 4 << 20 && target.bytes() == &bytes[..]),
            Arrival::Overdue => {
                overdue += 1;
                assert!(target.bytes().is_empty() && told <= 2 << 20, "{told}");
                let found =
                    shown.recv_timeout(Duration::from_secs(60)).expect("the memory is freed when the read has ended");
                // The part that was told of, and the one that was not waited for.
                assert!(found[..told + (2 << 20)] == bytes[..told + (2 << 20)]);
                continue;
            }
            Arrival::WouldWait => refused += 1,
        }
        drop(target);
        shown.recv().unwrap();
    }
    if refused == 20 {
        eprintln!("SKIPPED: no reads that can be waited for here: no direct transfers, or no queues of the kernel's");
        return;
    }
    assert!(overdue > 0, "no disk reads 2 MiB in no time");
    // The queue that was left does not answer for another's read.
    let mut found = AlignedBuf::zeroed(4 << 20);
    let parts = Parts { offset: 0, len: 4 << 20, part_bytes: 512 << 10 };
    let arrival = file.read_parts_at(&mut found, parts, None, &mut |_| {});
    assert!(arrival.unwrap() == Arrival::Landed && found[..] == bytes[..]);
}

#[test]
fn more_reads_at_once_than_there_are_queues_have_their_own_bytes_or_would_wait() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let mut bytes = AlignedBuf::zeroed(300 * 8192);
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 8192 + at % 251) as u8);
    write_all_at(&*file, &bytes, 0, Caching::Direct).unwrap();
    let all = std::sync::Barrier::new(300);
    std::thread::scope(|scope| {
        for (number, expected) in bytes.chunks(8192).enumerate() {
            let (file, all) = (&file, &all);
            scope.spawn(move || {
                all.wait();
                for patience in [Some(Duration::from_secs(600)), None, Some(Duration::from_secs(600))] {
                    let mut found = AlignedBuf::zeroed(8192);
                    let parts = Parts { offset: number as u64 * 8192, len: 8192, part_bytes: 4096 };
                    let arrival = file.read_parts_at(&mut found, parts, patience, &mut |_| {}).unwrap();
                    assert!(arrival == Arrival::Landed || patience.is_some() && arrival == Arrival::WouldWait);
                    assert!(arrival == Arrival::WouldWait || found[..] == *expected);
                }
            });
        }
    });
}

#[test]
fn a_direct_transfer_leaves_the_page_cache_empty() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    if !file.direct() {
        return eprintln!("SKIPPED: the file system of {} has no direct transfers", root.display());
    }
    let mut pages = AlignedBuf::zeroed(1 << 20);
    pages.fill(1);
    write_all_at(&*file, &pages, 0, Caching::Direct).unwrap();
    read_exact_at(&*file, &mut pages, 0, Caching::Direct).unwrap();
    match file.resident(0, 1 << 20).unwrap() {
        None => eprintln!("SKIPPED: nobody can tell what is cached here"),
        // A file system that keeps its files in memory takes the flag and has everything cached.
        Some(true) => eprintln!("SKIPPED: {} takes direct transfers and caches them all the same", root.display()),
        Some(false) => {
            let mut byte = [0];
            read_exact_at(&*file, &mut byte, 12_345, Caching::Buffered).unwrap();
            assert_eq!(file.resident(12_345, 1).unwrap(), Some(true));
            assert!(file.direct());
        }
    }
}

#[test]
fn both_ways_of_asking_the_page_cache_agree() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let pages = AlignedBuf::zeroed(1 << 20);
    write_all_at(&*file, &pages, 0, Caching::Direct).unwrap();
    let mut buf = [0; 8192];
    read_exact_at(&*file, &mut buf, 65_536, Caching::Buffered).unwrap();
    let raw = File::open(root.join("f")).unwrap();
    for (offset, len) in [(0, 1 << 20), (65_536, 8192), (0, 4096), (1 << 19, 1 << 19)] {
        match sys::cached_pages(&raw, offset, len as u64).unwrap() {
            None => eprintln!("SKIPPED: this kernel has no cachestat"),
            Some(cached) => {
                let whole = cached == (len as u64).div_ceil(sys::page_bytes());
                assert_eq!(sys::all_pages_in_core(&raw, offset, len).unwrap(), whole, "{offset} {len}");
            }
        }
    }
}

#[test]
fn the_descriptor_for_the_gpu_driver_is_one_of_this_file() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let fd = file.raw_fd().unwrap();
    let named = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    assert_eq!(named, root.join("f").canonicalize().unwrap());
}

#[test]
fn a_name_that_is_not_text_does_not_stop_a_listing() {
    use std::os::unix::ffi::OsStrExt;
    let (storage, root, _dir) = fresh();
    let path = root.join(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
    if let Err(error) = File::create(path) {
        return eprintln!("SKIPPED: this file system takes only names that are text: {error}");
    }
    std::os::unix::fs::symlink("/nowhere/at/all", root.join("dangling")).unwrap();
    assert_eq!(storage.list(&root).unwrap().len(), 2);
}

#[test]
fn an_offset_past_what_the_system_expresses_is_an_error_of_ours() {
    let (storage, root, _dir) = fresh();
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    let slice = [IoSlice::new(b"x")];
    assert_eq!(
        file.write_vectored_at(&slice, u64::MAX, Caching::Buffered).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    assert_eq!(file.allocate(u64::MAX, 1).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(file.next_data(u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(file.facts().unwrap().len_bytes, 0);
}

#[test]
fn a_lock_ends_with_the_process_that_held_it() {
    let (storage, root, _dir) = fresh();
    let path = root.join("LOCK");
    // `flock` from util-linux stands for another process that uses the same lock: it says when it holds it, and ends
    // when its input does.
    let mut command = Command::new("flock");
    command.arg(&path).args(["sh", "-c", "echo held; cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut other) = command.spawn() else { return eprintln!("SKIPPED: no `flock` command here") };
    let mut said = String::new();
    BufReader::new(other.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "held\n");
    assert_eq!(storage.lock(&path, "us").unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(other.stdin.take());
    other.wait().unwrap();
    storage.lock(&path, "us").unwrap();
}
