//! The rules of this module over a simulated library and a simulated GPU.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::driver::Driver;
use super::simulated::{self as library, Mood, set_mood};
use super::sys::{Library, RawError};
use super::*;
use crate::device::Device;
use crate::device::simulated::Simulated;

const LEN: usize = 300_001;
const TIME: Duration = Duration::from_secs(60);

struct Ground {
    cufile: CuFile,
    simulated: Simulated,
    gpu: Device,
    folder: TempDir,
    path: PathBuf,
    content: Vec<u8>,
    file: File,
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|n| ((n * 31 + seed * 17) % 251) as u8).collect()
}

fn ground() -> Ground {
    set_mood(Mood::default());
    let (cufile, simulated) = (library::cufile(), Simulated::new());
    let gpu = simulated.handle();
    let folder = tempfile::tempdir().unwrap();
    let (path, content) = (folder.path().join("file"), pattern(1, LEN));
    fs::write(&path, &content).unwrap();
    let file = cufile.open(&path, Access::ReadWrite).unwrap();
    Ground { cufile, simulated, gpu, folder, path, content, file }
}

impl Ground {
    fn buffer(&self, len: usize) -> Buffer {
        Buffer::new(self.gpu.allocate(len as u64).unwrap()).unwrap()
    }

    fn filled(&self, bytes: &[u8]) -> Buffer {
        let mut buffer = self.buffer(bytes.len());
        buffer.memory_mut().unwrap().copy_from_host(0, bytes).unwrap();
        buffer
    }
}

fn contents(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.memory().len_bytes() as usize];
    buffer.memory().copy_to_host(0, &mut bytes).unwrap();
    bytes
}

fn transfer(file_offset: usize, buffer_offset: usize, len: usize) -> Transfer {
    Transfer { file_offset: file_offset as u64, buffer_offset: buffer_offset as u64, len_bytes: len as u64 }
}

fn status(error: &Error) -> i32 {
    error.status().unwrap_or_else(|| panic!("{error}")).code()
}

fn refuse(name: &'static str, err: i32) {
    set_mood(Mood { refuse: Some((name, RawError { err, cu_err: 0 })), ..Mood::default() });
}

#[test]
fn short_counts_are_continued_in_every_way_of_moving_bytes() {
    let mut ground = ground();
    let short = Mood { bytes_max: Some(70_001), ..Mood::default() };
    let (buffer, wanted) = (ground.buffer(LEN), transfer(0, 0, LEN));
    set_mood(short);
    ground.file.read(&buffer, wanted).unwrap();
    assert!(contents(&buffer) == ground.content);
    let buffer = ground.buffer(LEN);
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 2).unwrap();
    let (direction, file) = (Direction::Read, ground.file.clone());
    batch.submit([Operation { direction, file, buffer: buffer.clone(), transfer: wanted }]).unwrap();
    batch.wait(TIME).unwrap().remove(0).result.unwrap();
    assert!(contents(&buffer) == ground.content);
    let buffer = ground.buffer(LEN);
    Stream::new(ground.cufile, &ground.gpu).unwrap().read(&ground.file, &buffer, wanted).unwrap().wait().unwrap();
    assert!(contents(&buffer) == ground.content);
    ground.content = pattern(2, LEN);
    ground.file.write(&ground.filled(&ground.content), wanted).unwrap();
    assert!(fs::read(&ground.path).unwrap() == ground.content);
}

#[test]
fn a_file_that_ends_before_the_bytes_that_were_promised_is_an_error() {
    let ground = ground();
    let (buffer, wanted) = (ground.buffer(8192), transfer(LEN - 100, 0, 8192));
    let error = ground.file.read(&buffer, wanted).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::EndOfFile { wanted: 8192, got: 100 });
    assert!(error.to_string().contains("file ended after 100 of 8192"), "{error}");
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    assert!(stream.read(&ground.file, &buffer, wanted).unwrap().wait().unwrap_err().is_end_of_file());
}

#[test]
fn answers_of_the_library_are_told_apart() {
    let ground = ground();
    let buffer = ground.buffer(4096);
    let read = |count| {
        set_mood(Mood { count: Some(count), ..Mood::default() });
        ground.file.read(&buffer, transfer(0, 0, 4096)).unwrap_err()
    };
    assert_eq!(read(-1).kind(), &ErrorKind::Os(libc::ENOSPC));
    assert_eq!(status(&read(-5044)), 5044);
    assert_eq!(read(-6001).status(), Some(Status::Unknown(6001)));
    assert!(matches!(read(4097).kind(), ErrorKind::Invalid(_)), "more than was asked for");
    assert!(read(0).is_end_of_file());
    set_mood(Mood { count: Some(0), ..Mood::default() });
    let full = ground.file.write(&buffer, transfer(0, 0, 4096)).unwrap_err();
    assert_eq!(full.kind(), &ErrorKind::Os(libc::ENOSPC), "a write that takes nothing");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_done() {
    let ground = ground();
    let buffer = ground.buffer(4096);
    for wrong in [transfer(0, 1, 4096), transfer(0, usize::MAX, 2), transfer(usize::MAX / 2, 0, 4096)] {
        let error = ground.file.read(&buffer, wrong).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Invalid(_)), "{error}");
        let mut batch = Batch::new(ground.cufile, &ground.gpu, 2).unwrap();
        let (direction, file, buffer) = (Direction::Read, ground.file.clone(), buffer.clone());
        assert!(batch.submit([Operation { direction, file, buffer, transfer: wrong }]).is_err());
        assert_eq!(batch.in_flight(), 0);
    }
    ground.file.read(&buffer, transfer(LEN, 4096, 0)).unwrap();
    let mut host = Device::host().allocate(10).unwrap();
    let error = ground.file.read_into(&mut host, transfer(0, 0, 10)).unwrap_err();
    assert!(error.to_string().contains("host"), "{error}");
    assert!(Buffer::new(host).is_err());
    let reader = ground.cufile.open(&ground.path, Access::Read).unwrap();
    let error = reader.write(&buffer, transfer(0, 0, 10)).unwrap_err();
    assert!(error.to_string().contains("reading"), "{error}");
    let elsewhere = Buffer::new(Simulated::new().handle().allocate(10).unwrap()).unwrap();
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    assert!(
        stream.read(&ground.file, &elsewhere, transfer(0, 0, 10)).unwrap_err().to_string().contains("buffer is on")
    );
}

#[test]
fn a_file_is_registered_once_and_deregistered_before_it_is_closed() {
    let ground = ground();
    let same = ground.cufile.open(&ground.path, Access::ReadWrite).unwrap();
    assert_eq!(same.descriptor().as_raw_fd(), ground.file.descriptor().as_raw_fd());
    let linked = ground.folder.path().join("linked");
    fs::hard_link(&ground.path, &linked).unwrap();
    let linked = ground.cufile.open(linked, Access::ReadWrite).unwrap();
    assert_eq!(linked.descriptor().as_raw_fd(), same.descriptor().as_raw_fd());
    let reader = ground.cufile.open(&ground.path, Access::Read).unwrap();
    assert_ne!(
        reader.descriptor().as_raw_fd(),
        same.descriptor().as_raw_fd(),
        "another access is another registration"
    );
    let descriptor = same.descriptor().as_raw_fd();
    drop((same, linked));
    assert!(library::is_registered(descriptor));
    let (buffer, cufile) = (ground.buffer(10), ground.cufile);
    drop(ground.file);
    // The descriptor may be another file's by now; this library's table is empty but for the reader.
    assert_eq!(cufile.driver().files.lock().len(), 1);
    let plain = fs::File::open(&ground.path).unwrap();
    let again = cufile.register(plain.as_fd(), &ground.path).unwrap();
    drop(plain);
    again.read(&buffer, transfer(0, 0, 10)).unwrap();
    assert!(contents(&buffer) == ground.content[..10]);
}

#[test]
fn a_disk_that_udev_does_not_know_is_named_with_the_remedy() {
    let ground = ground();
    refuse("handle_register", 5027);
    // A file on a disk is answered by what udev knows of it, one in memory by what it is.
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(shm.path().join("x"), "x").unwrap();
    let error = ground.cufile.open(shm.path().join("x"), Access::Read).unwrap_err();
    assert_eq!(error.status(), Some(Status::HandleNotRegistered));
    assert!(error.to_string().contains("tmpfs"), "{error}");
    assert!(ground.cufile.open(shm.path().join("x"), Access::Read).is_ok(), "a refusal is not remembered");
    refuse("handle_register", 5018);
    let error = ground.cufile.open(shm.path().join("x"), Access::ReadWrite).unwrap_err();
    assert!(error.remedy().is_none(), "{error}");
    let error = ground.cufile.open(shm.path().join("y"), Access::Read).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Os(libc::ENOENT));
}

#[test]
fn registered_memory_is_deregistered_before_it_is_freed() {
    let ground = ground();
    let buffer = Buffer::registered(ground.cufile, ground.gpu.allocate(5000).unwrap()).unwrap();
    let address = buffer.memory().device_ptr().unwrap();
    assert!(buffer.is_registered() && library::is_memory_registered(address));
    let clone = buffer.clone();
    let buffer = buffer.into_memory().expect_err("a clone has a share");
    drop(clone);
    let memory = buffer.into_memory().expect("nobody has a share");
    assert!(!library::is_memory_registered(address));
    refuse("buffer_register", 5036);
    let error = Buffer::registered(ground.cufile, memory).unwrap_err();
    assert!(status(&error) == 5036 && error.to_string().contains("BAR1"), "{error}");
    assert_eq!(ground.simulated.allocated_bytes(), 0, "refused memory is freed");
    assert!(Buffer::registered(ground.cufile, ground.gpu.allocate(0).unwrap()).is_err());
}

#[test]
fn a_batch_reports_every_operation_once() {
    let mut ground = ground();
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 16).unwrap();
    let buffer = ground.buffer(LEN);
    let piece = LEN / 15;
    let mut operations: Vec<Operation> = (0..15)
        .map(|n| Operation {
            direction: Direction::Read,
            file: ground.file.clone(),
            buffer: buffer.clone(),
            transfer: transfer(n * piece, n * piece, if n == 14 { LEN - 14 * piece } else { piece }),
        })
        .collect();
    let mut write = operations[0].clone();
    (write.direction, write.buffer, write.transfer) = (Direction::Write, ground.filled(&[9; 10]), transfer(LEN, 0, 10));
    operations.push(write.clone());
    let ids = batch.submit(operations).unwrap();
    assert_eq!((ids.len(), batch.in_flight()), (16, 16));
    let full = batch.submit([write.clone()]).unwrap_err();
    assert!(matches!(full.kind(), ErrorKind::Invalid(_)), "{full}");
    let timed_out = batch.wait(Duration::ZERO).unwrap_err();
    assert_eq!(timed_out.kind(), &ErrorKind::TimedOut(Duration::ZERO));
    let mut done = batch.wait(TIME).unwrap();
    done.sort_by_key(|completion| completion.id);
    assert_eq!(done.iter().map(|completion| completion.id).collect::<Vec<_>>(), ids);
    assert!(done.into_iter().all(|completion| completion.result.is_ok()));
    assert!(contents(&buffer) == ground.content);
    ground.content.extend([9; 10]);
    assert!(fs::read(&ground.path).unwrap() == ground.content);
    assert!(batch.poll().unwrap().is_empty());
    // One that fails does not hide the others; one of nothing is done at once.
    let mut past = write.clone();
    (past.direction, past.transfer) = (Direction::Read, transfer(LEN + 100, 0, 10));
    let mut nothing = write.clone();
    nothing.transfer.len_bytes = 0;
    let ids = batch.submit([past, write, nothing]).unwrap();
    let done = batch.wait(TIME).unwrap();
    let of = |id| done.iter().find(|completion| completion.id == id).unwrap();
    assert!(of(ids[0]).result.as_ref().unwrap_err().is_end_of_file());
    assert!(of(ids[1]).result.is_ok() && of(ids[2]).result.is_ok() && done.len() == 3);
    assert!(Batch::new(ground.cufile, &ground.gpu, 129).is_err());
}

#[test]
fn a_batch_that_is_dropped_or_cancelled_keeps_its_memory_as_long_as_needed() {
    let ground = ground();
    let operation = |buffer: &Buffer| Operation {
        direction: Direction::Read,
        file: ground.file.clone(),
        buffer: buffer.clone(),
        transfer: transfer(0, 0, 4096),
    };
    let buffer = ground.buffer(4096);
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 4).unwrap();
    batch.submit([operation(&buffer), operation(&ground.buffer(4096))]).unwrap();
    drop(batch);
    assert!(contents(&buffer) == ground.content[..4096], "what is dropped is waited for");
    assert_eq!(ground.simulated.allocated_bytes(), 4096);
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 4).unwrap();
    batch.submit([operation(&buffer), operation(&ground.buffer(4096))]).unwrap();
    refuse("batch_cancel", 5042);
    assert!(batch.cancel().unwrap_err().status().unwrap().is_transient());
    assert_eq!(batch.in_flight(), 2);
    batch.cancel().unwrap();
    assert_eq!(ground.simulated.allocated_bytes(), 8192, "kept until the batch is destroyed");
    let done = batch.wait(TIME).unwrap();
    assert!(
        done.len() == 2 && done.iter().all(|done| done.result.as_ref().unwrap_err().kind() == &ErrorKind::Canceled)
    );
    assert_eq!(batch.submit([operation(&buffer)]).unwrap_err().kind(), &ErrorKind::Canceled);
    drop(batch);
    assert_eq!(ground.simulated.allocated_bytes(), 4096);
}

#[test]
fn a_submission_that_is_refused_leaves_nothing_behind_or_the_batch_unused() {
    let ground = ground();
    let operation = |buffer: &Buffer| Operation {
        direction: Direction::Read,
        file: ground.file.clone(),
        buffer: buffer.clone(),
        transfer: transfer(0, 0, 4096),
    };
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 4).unwrap();
    let buffer = ground.buffer(4096);
    refuse("batch_submit", 5022);
    assert_eq!(status(&batch.submit([operation(&buffer)]).unwrap_err()), 5022);
    assert_eq!(batch.in_flight(), 0);
    batch.submit([operation(&buffer)]).unwrap();
    assert!(batch.wait(TIME).unwrap()[0].result.is_ok());
    refuse("batch_submit", 5035);
    assert_eq!(status(&batch.submit([operation(&buffer)]).unwrap_err()), 5035);
    assert_eq!(status(&batch.submit([operation(&buffer)]).unwrap_err()), 5035, "nobody knows what was started");
    drop(batch);
    assert!(buffer.into_memory().is_err(), "what may be in use is kept for ever");
    // A batch that cannot be asked after says so, and loses nothing.
    let buffer = ground.buffer(4096);
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 4).unwrap();
    batch.submit([operation(&buffer)]).unwrap();
    refuse("batch_status", 5041);
    assert_eq!(status(&batch.wait(TIME).unwrap_err()), 5041);
    assert_eq!(batch.wait(TIME).unwrap().len(), 1);
}

#[test]
fn a_stream_owns_what_it_uses_until_it_has_passed() {
    let ground = ground();
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    let (buffer, path) = (ground.buffer(4096), ground.path.clone());
    let pending = stream.read(&ground.file, &buffer, transfer(5, 7, 1000)).unwrap();
    assert!(!pending.wait_at_most(Duration::ZERO).unwrap() || pending.is_done().unwrap());
    // The caller lets go of everything; the simulated GPU ends the process if memory is freed under the transfer.
    let kept = buffer.clone();
    drop((stream, buffer, ground.file));
    pending.wait().unwrap();
    assert!(contents(&kept)[7..1007] == ground.content[5..1005]);
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    let file = ground.cufile.open(&path, Access::ReadWrite).unwrap();
    let bytes = pattern(8, 100);
    let mut source = Buffer::new(ground.gpu.allocate(100).unwrap()).unwrap();
    source.memory_mut().unwrap().copy_from_host(0, &bytes).unwrap();
    let write = stream.write(&file, &source, transfer(50, 0, 100)).unwrap();
    drop((source, write));
    assert!(fs::read(&path).unwrap()[50..150] == bytes, "a dropped transfer is waited for");
    stream.read(&file, &kept, transfer(0, 0, 0)).unwrap().wait().unwrap();
    assert_eq!(ground.simulated.allocated_bytes(), 4096);
    assert_eq!(ground.simulated.streams(), 2, "of the stream and of the copies above, which is lent again");
}

#[test]
fn a_stream_that_fails_says_so() {
    let ground = ground();
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    let buffer = ground.buffer(4096);
    refuse("async", 5038);
    assert_eq!(status(&stream.read(&ground.file, &buffer, transfer(0, 0, 10)).unwrap_err()), 5038);
    set_mood(Mood { count: Some(-5044), ..Mood::default() });
    let failed = stream.read(&ground.file, &buffer, transfer(0, 0, 10)).unwrap();
    assert_eq!(status(&failed.wait().unwrap_err()), 5044);
    set_mood(Mood { count: Some(isize::MIN), ..Mood::default() });
    let silent = stream.read(&ground.file, &buffer, transfer(0, 0, 10)).unwrap();
    assert!(silent.wait().unwrap_err().to_string().contains("has not said"));
    refuse("stream_register", 5022);
    assert_eq!(status(&Stream::new(ground.cufile, &ground.gpu).unwrap_err()), 5022);
    assert!(matches!(Stream::new(ground.cufile, &Device::host()).unwrap_err().kind(), ErrorKind::Device(_)));
    // The GPU is lost under a transfer: an error, and its memory is kept for ever.
    set_mood(Mood::default());
    let lost = stream.read(&ground.file, &buffer, transfer(0, 0, 10)).unwrap();
    ground.simulated.fail_after(0, 700, true);
    assert!(matches!(lost.wait().unwrap_err().kind(), ErrorKind::Device(_)));
    assert!(buffer.into_memory().is_err());
}

#[test]
fn threads_read_through_one_file_and_keep_their_own_context() {
    let ground = ground();
    let other = Simulated::new();
    let buffer = ground.buffer(LEN);
    let part = LEN.div_ceil(4);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (file, buffer, other) = (&ground.file, &buffer, &other);
            scope.spawn(move || {
                other.make_current();
                for at in (thread * part..((thread + 1) * part).min(LEN)).step_by(999) {
                    let len = 999.min(((thread + 1) * part).min(LEN) - at);
                    file.read(buffer, transfer(at, at, len)).unwrap();
                }
                assert_eq!(Simulated::contexts().len(), 1, "the thread has the context that it had");
            });
        }
    });
    assert!(contents(&buffer) == ground.content);
}

#[test]
fn a_driver_that_hangs_or_refuses_is_an_error_in_time() {
    let library = |open| {
        let mut functions = library::functions();
        functions.driver_open = open;
        Library { functions, path: PathBuf::new() }
    };
    let hung = Driver::open(library(library::open_and_hang), None, Duration::from_millis(20)).err().unwrap();
    assert_eq!(hung.kind(), &ErrorKind::TimedOut(Duration::from_millis(20)));
    // The log of a driver that opens is not in this process's working directory.
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("private");
    let before = fs::exists("cufile.log").unwrap();
    let driver = Driver::open(library(library::open_and_log), Some(place.clone()), TIME).ok().unwrap();
    match CuFile::of(driver).log_directory() {
        Some(directory) => {
            assert_eq!(directory, place);
            assert!(fs::exists(place.join("cufile.log")).unwrap());
            assert_eq!(fs::exists("cufile.log").unwrap(), before);
        }
        // Where a thread may not have a working directory of its own.
        None => fs::remove_file("cufile.log").unwrap(),
    }
    assert!(CuFile::of(driver).properties().unwrap().compatibility_allowed);
    assert_eq!(CuFile::of(driver).version(), (1, 15));
}

#[test]
fn without_a_library_or_a_gpu_there_is_an_answer_and_always_the_same() {
    match (CuFile::get(), CuFile::get()) {
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            assert!(matches!(first.kind(), ErrorKind::Unavailable(_) | ErrorKind::Status { .. }), "{first}");
        }
        (first, second) => assert_eq!(first.unwrap().library(), second.unwrap().library()),
    }
}
