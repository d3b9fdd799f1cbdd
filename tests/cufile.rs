//! The real cuFile on a real GPU: what is moved is compared byte for byte. Skipped, visibly, where there is none, where
//! libcufile is missing, or where it takes no file of the temporary directory; a failure then with `ALIGHT_REQUIRE_GPU=1`.
//! Where cuFile has no direct path, all of this runs in its compatibility mode.

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use alight::cufile::{Access, Batch, Buffer, CuFile, Direction, ErrorKind, File, Operation, Status, Stream, Transfer};
use alight::{Device, DeviceBuffer};
use common::bytes;
use common::gpu::require;
use tempfile::TempDir;

const LEN: usize = (5 << 20) + 4321;
const TIME: Duration = Duration::from_secs(60);

/// What every test needs: cuFile, a GPU, and a file of random bytes.
struct Ground {
    cufile: CuFile,
    gpu: Device,
    _folder: TempDir,
    path: PathBuf,
    content: Vec<u8>,
    file: File,
}

fn ground(seed: u64) -> Option<Ground> {
    let gpu = require(Device::cuda(0))?;
    let cufile = require(CuFile::get())?;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let content = bytes(seed, LEN);
    fs::write(&path, &content).unwrap();
    fs::File::open(&path).unwrap().sync_all().unwrap();
    let file = require(cufile.open(&path, Access::ReadWrite))?;
    Some(Ground { cufile, gpu, _folder: folder, path, content, file })
}

/// Device memory with known bytes in it.
fn filled(gpu: &Device, bytes: &[u8]) -> DeviceBuffer {
    let mut memory = gpu.allocate(bytes.len() as u64).unwrap();
    memory.copy_from_host(0, bytes).unwrap();
    memory
}

fn contents(memory: &DeviceBuffer) -> Vec<u8> {
    let mut bytes = vec![0; memory.len_bytes() as usize];
    memory.copy_to_host(0, &mut bytes).unwrap();
    bytes
}

fn transfer(file_offset: usize, buffer_offset: usize, len: usize) -> Transfer {
    Transfer { file_offset: file_offset as u64, buffer_offset: buffer_offset as u64, len_bytes: len as u64 }
}

/// File offset, buffer offset and length: aligned and not, short and long, to the very end.
const SHAPES: [(usize, usize, usize); 10] = [
    (0, 0, 4096),
    (4096, 8192, 1 << 20),
    (0, 0, LEN),
    (0, 0, 0),
    (1, 0, 1),
    (0, 1, 4095),
    (4095, 3, 4098),
    (123_457, 70_001, 2_000_003),
    (LEN - 1, 17, 1),
    ((4 << 20) - 5, 4096, (1 << 20) + 4326),
];

#[test]
fn the_driver_says_what_it_is_and_leaves_no_log_behind() {
    let before = fs::exists("cufile.log").unwrap();
    let Some(Ground { cufile, .. }) = ground(1) else { return };
    let properties = cufile.properties().unwrap();
    println!("{cufile:?}, opened in {:?}, log in {:?}: {properties:?}", cufile.open_time(), cufile.log_directory());
    assert!(cufile.version() >= (1, 0) && cufile.library().is_absolute());
    assert!(properties.compatibility_allowed || properties.has_direct_path());
    assert_eq!(fs::exists("cufile.log").unwrap(), before, "a log in the working directory");
    assert_eq!(CuFile::get().unwrap().open_time(), cufile.open_time(), "opened twice");
}

#[test]
fn any_bytes_are_read_to_any_place() {
    let Some(ground) = ground(2) else { return };
    for registered in [false, true] {
        for (file_offset, buffer_offset, len) in SHAPES {
            let mut expected = bytes(99, buffer_offset + len + 5);
            let memory = filled(&ground.gpu, &expected);
            let buffer = match registered {
                true => Buffer::registered(ground.cufile, memory).unwrap(),
                false => Buffer::new(memory).unwrap(),
            };
            ground.file.read(&buffer, transfer(file_offset, buffer_offset, len)).unwrap();
            expected[buffer_offset..buffer_offset + len]
                .copy_from_slice(&ground.content[file_offset..file_offset + len]);
            let memory = buffer.into_memory().expect("nobody else has a share");
            assert!(contents(&memory) == expected, "{len} bytes at {file_offset}, registered: {registered}");
        }
    }
}

#[test]
fn any_bytes_are_written_to_any_place() {
    let Some(mut ground) = ground(3) else { return };
    for (n, (file_offset, buffer_offset, len)) in SHAPES.into_iter().enumerate() {
        let source = bytes(100 + n as u64, buffer_offset + len + 5);
        let memory = filled(&ground.gpu, &source);
        ground.file.write_from(&memory, transfer(file_offset, buffer_offset, len)).unwrap();
        ground.content[file_offset..file_offset + len].copy_from_slice(&source[buffer_offset..buffer_offset + len]);
        assert!(fs::read(&ground.path).unwrap() == ground.content, "{len} bytes at {file_offset}");
    }
    // A file grows, and what was never written in between reads as zeros.
    let tail = bytes(7, 10_001);
    ground.file.write_from(&filled(&ground.gpu, &tail), transfer(LEN + 4096, 0, tail.len())).unwrap();
    ground.content.resize(LEN + 4096, 0);
    ground.content.extend_from_slice(&tail);
    assert!(fs::read(&ground.path).unwrap() == ground.content);
}

#[test]
fn threads_share_a_file_and_a_buffer() {
    let Some(ground) = ground(4) else { return };
    let buffer = Buffer::new(ground.gpu.allocate(LEN as u64).unwrap()).unwrap();
    let part = LEN.div_ceil(8);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (file, buffer) = (ground.file.clone(), buffer.clone());
            scope.spawn(move || {
                for piece in (thread * part..((thread + 1) * part).min(LEN)).step_by(99_991) {
                    let len = 99_991.min(((thread + 1) * part).min(LEN) - piece);
                    file.read(&buffer, transfer(piece, piece, len)).unwrap();
                }
            });
        }
    });
    assert!(contents(buffer.memory()) == ground.content);
}

#[test]
fn a_batch_of_sixteen_reads_and_writes() {
    let Some(mut ground) = ground(5) else { return };
    let gpu = ground.gpu.clone();
    let mut batch = Batch::new(ground.cufile, &gpu, 16).unwrap();
    let buffer = Buffer::new(gpu.allocate(LEN as u64).unwrap()).unwrap();
    let operation = |direction, buffer: &Buffer, transfer| Operation {
        direction,
        file: ground.file.clone(),
        buffer: buffer.clone(),
        transfer,
    };
    // Twice, since a batch is used again and again.
    for round in 0..2 {
        let piece = LEN / 16 / 4096 * 4096;
        let reads: Vec<Operation> = (0..16)
            .map(|n| {
                let len = if n == 15 { LEN - 15 * piece } else { piece };
                operation(Direction::Read, &buffer, transfer(n * piece, n * piece, len))
            })
            .collect();
        let mut ids = batch.submit(reads).unwrap();
        let mut done = batch.wait(TIME).unwrap();
        done.sort_by_key(|completion| completion.id);
        ids.sort();
        assert_eq!(done.iter().map(|completion| completion.id).collect::<Vec<_>>(), ids, "round {round}");
        done.into_iter().for_each(|completion| completion.result.unwrap());
        assert!(contents(buffer.memory()) == ground.content, "round {round}");
    }
    let source = bytes(55, 16 * 4096);
    let from = Buffer::new(filled(&gpu, &source)).unwrap();
    let writes = (0..16).map(|n| operation(Direction::Write, &from, transfer((15 - n) * 8192, n * 4096, 4096)));
    batch.submit(writes.collect::<Vec<_>>()).unwrap();
    assert!(batch.wait(TIME).unwrap().into_iter().all(|completion| completion.result.is_ok()));
    for n in 0..16 {
        let at = (15 - n) * 8192;
        ground.content[at..at + 4096].copy_from_slice(&source[n * 4096..(n + 1) * 4096]);
    }
    assert!(fs::read(&ground.path).unwrap() == ground.content);
}

#[test]
fn a_batch_reports_the_end_of_the_file_and_survives_being_dropped_in_flight() {
    let Some(ground) = ground(6) else { return };
    let buffer = Buffer::new(ground.gpu.allocate(16 << 20).unwrap()).unwrap();
    let read = |transfer| Operation {
        direction: Direction::Read,
        file: ground.file.clone(),
        buffer: buffer.clone(),
        transfer,
    };
    let mut batch = Batch::new(ground.cufile, &ground.gpu, 8).unwrap();
    batch.submit([read(transfer(LEN - 5000, 0, 1 << 20))]).unwrap();
    let done = batch.wait(TIME).unwrap();
    assert!(done[0].result.as_ref().unwrap_err().is_end_of_file(), "{done:?}");
    batch.submit((0..8).map(|n| read(transfer(n << 16, n << 20, 1 << 20)))).unwrap();
    drop(batch);
    let mut cancelled = Batch::new(ground.cufile, &ground.gpu, 8).unwrap();
    let ids = cancelled.submit((0..8).map(|n| read(transfer(n << 16, n << 20, 1 << 20)))).unwrap();
    cancelled.cancel().unwrap();
    let done = cancelled.wait(TIME).unwrap();
    assert_eq!(done.len(), ids.len());
    assert!(done.iter().all(|completion| completion.result.as_ref().unwrap_err().kind() == &ErrorKind::Canceled));
    assert!(cancelled.submit([read(transfer(0, 0, 4096))]).is_err());
    drop(cancelled);
    // Nothing of the batches is left that has a share of the buffer.
    assert!(buffer.into_memory().is_ok());
}

#[test]
fn a_stream_reads_and_writes_in_its_order() {
    let Some(mut ground) = ground(7) else { return };
    let stream = Stream::new(ground.cufile, &ground.gpu).unwrap();
    for (n, (file_offset, buffer_offset, len)) in SHAPES.into_iter().enumerate() {
        let source = bytes(200 + n as u64, buffer_offset + len + 5);
        let from = Buffer::new(filled(&ground.gpu, &source)).unwrap();
        let into = Buffer::new(filled(&ground.gpu, &source)).unwrap();
        let wanted = transfer(file_offset, buffer_offset, len);
        // The read sees what the write before it in the stream has written.
        let write = stream.write(&ground.file, &from, wanted).unwrap();
        let read = stream.read(&ground.file, &into, transfer(file_offset, 0, len)).unwrap();
        assert!(read.wait_at_most(TIME).unwrap());
        read.wait().unwrap();
        write.wait().unwrap();
        ground.content[file_offset..file_offset + len].copy_from_slice(&source[buffer_offset..buffer_offset + len]);
        assert!(fs::read(&ground.path).unwrap() == ground.content, "{len} bytes at {file_offset}");
        let mut expected = source.clone();
        expected[..len].copy_from_slice(&ground.content[file_offset..file_offset + len]);
        assert!(contents(into.memory()) == expected, "{len} bytes at {file_offset}");
    }
    // Dropped without being waited for: the memory outlives the transfer.
    let buffer = Buffer::new(ground.gpu.allocate(LEN as u64).unwrap()).unwrap();
    drop(stream.read(&ground.file, &buffer, transfer(0, 0, LEN)).unwrap());
    assert!(contents(buffer.memory()) == ground.content);
    let past = stream.read(&ground.file, &buffer, transfer(LEN - 10, 0, 4096)).unwrap();
    assert!(past.wait().unwrap_err().is_end_of_file());
}

#[test]
fn what_cannot_be_done_says_why() {
    let Some(ground) = ground(8) else { return };
    let buffer = Buffer::new(ground.gpu.allocate(8192).unwrap()).unwrap();
    let end = ground.file.read(&buffer, transfer(LEN - 100, 0, 4096)).unwrap_err();
    assert_eq!(end.kind(), &ErrorKind::EndOfFile { wanted: 4096, got: 100 }, "{end}");
    let past = ground.file.read(&buffer, transfer(LEN + (1 << 20), 0, 4096)).unwrap_err();
    assert!(past.is_end_of_file(), "{past}");
    let too_long = ground.file.read(&buffer, transfer(0, 4096, 4097)).unwrap_err();
    assert!(matches!(too_long.kind(), ErrorKind::Invalid(_)), "{too_long}");
    assert!(matches!(Buffer::new(Device::host().allocate(10).unwrap()).unwrap_err().kind(), ErrorKind::Invalid(_)));
    let reader = ground.cufile.open(&ground.path, Access::Read).unwrap();
    let read_only = reader.write(&buffer, transfer(0, 0, 4096)).unwrap_err();
    assert!(matches!(read_only.kind(), ErrorKind::Invalid(_)), "{read_only}");
    let absent = ground.cufile.open(ground.path.join("x"), Access::Read).unwrap_err();
    assert!(matches!(absent.kind(), ErrorKind::Os(_)), "{absent}");
    assert!(Batch::new(ground.cufile, &ground.gpu, 1 << 20).unwrap_err().status().is_some());
    let null = fs::File::open("/dev/null").unwrap();
    let refused = ground.cufile.register(null.as_fd(), "/dev/null".as_ref()).unwrap_err();
    assert!(refused.status().is_some(), "{refused}");
}

#[test]
fn a_file_in_memory_is_refused_with_the_reason_or_read() {
    let Some(ground) = ground(9) else { return };
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = folder.path().join("file");
    fs::write(&path, [0; 8192]).unwrap();
    match ground.cufile.open(&path, Access::Read) {
        Err(error) => {
            // The second is the answer of 1.13 and 1.14.
            let known = [Some(Status::HandleNotRegistered), Some(Status::InternalError)];
            assert!(known.contains(&error.status()), "{error}");
            assert!(error.to_string().contains("tmpfs"), "{error}");
        }
        // Seen first with 1.20.
        Ok(file) => {
            let mut memory = filled(&ground.gpu, &[7; 8192]);
            file.read_into(&mut memory, transfer(0, 0, 8192)).unwrap();
            assert_eq!(contents(&memory), [0; 8192]);
        }
    }
}
