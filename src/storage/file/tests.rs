//! What the real file system adds to the suite that every implementation passes.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::*;
use crate::storage::{AlignedBuf, BufferPool, Caching, Part, read_exact_at, write_all_at};

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
