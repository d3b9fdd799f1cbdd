//! The simulated library, watched: it ends the test process when anybody is in it beside the first call of a function, or
//! between the first transfer on a stream and its end. For one test alone, since what it has seen is the process's.

use std::collections::BTreeSet;
use std::ffi::{c_uint, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::driver::{CuFile, Driver};
use super::simulated;
use super::sys::{BatchHandle, Descr, Handle, IoParams, Library, Off, RawError, RawStream};
use crate::device::simulated as device;

static SEEN: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
static INSIDE: AtomicUsize = AtomicUsize::new(0);
static STREAM_BUSY: AtomicBool = AtomicBool::new(false);
static STREAM_CALLS: AtomicUsize = AtomicUsize::new(0);

/// A watched library, opened, with every first to come.
pub(super) fn cufile() -> CuFile {
    let mut functions = simulated::functions();
    functions.handle_register = handle_register;
    functions.read = read;
    functions.batch_set_up = batch_set_up;
    functions.batch_submit = batch_submit;
    functions.stream_register = stream_register;
    functions.read_async = read_async;
    let library = Library { functions, path: PathBuf::from("/simulated/libcufile.so.0") };
    CuFile::of(Driver::open(library, None, Duration::from_secs(60)).expect("the simulated driver opens"))
}

/// How many functions were called, and how many transfers on streams there were.
pub(super) fn seen() -> (usize, usize) {
    (SEEN.lock().len(), STREAM_CALLS.load(Ordering::SeqCst))
}

fn watched<T>(name: &'static str, call: impl FnOnce() -> T) -> T {
    let first = SEEN.lock().insert(name);
    let others = INSIDE.fetch_add(1, Ordering::SeqCst);
    assert!(!STREAM_BUSY.load(Ordering::SeqCst), "{name} beside the first transfer on a stream");
    if first {
        assert_eq!(others, 0, "the first {name} beside another call");
        std::thread::sleep(Duration::from_millis(5));
    }
    let answer = call();
    assert!(!first || INSIDE.load(Ordering::SeqCst) == 1, "another call beside the first {name}");
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    answer
}

unsafe extern "C" fn handle_register(handle: *mut Handle, descr: *mut Descr) -> RawError {
    // SAFETY: here and below, what the caller promises the library it promises this.
    watched("handle_register", || unsafe { (simulated::functions().handle_register)(handle, descr) })
}

unsafe extern "C" fn read(handle: Handle, base: *mut c_void, size: usize, offset: Off, base_offset: Off) -> isize {
    // SAFETY: as above.
    watched("read", || unsafe { (simulated::functions().read)(handle, base, size, offset, base_offset) })
}

unsafe extern "C" fn batch_set_up(batch: *mut BatchHandle, entries: c_uint) -> RawError {
    // SAFETY: as above.
    watched("batch_set_up", || unsafe { (simulated::functions().batch_set_up)(batch, entries) })
}

unsafe extern "C" fn batch_submit(batch: BatchHandle, count: c_uint, params: *mut IoParams, flags: c_uint) -> RawError {
    // SAFETY: as above.
    watched("batch_submit", || unsafe { (simulated::functions().batch_submit)(batch, count, params, flags) })
}

unsafe extern "C" fn stream_register(stream: RawStream, flags: c_uint) -> RawError {
    // SAFETY: as above.
    watched("stream_register", || unsafe { (simulated::functions().stream_register)(stream, flags) })
}

unsafe extern "C" fn read_async(
    handle: Handle,
    base: *mut c_void,
    size: *mut usize,
    offset: *mut Off,
    base_offset: *mut Off,
    done: *mut isize,
    stream: RawStream,
) -> RawError {
    let first = STREAM_CALLS.fetch_add(1, Ordering::SeqCst) == 0;
    watched("read_async", || {
        // SAFETY: as above.
        let answer =
            unsafe { (simulated::functions().read_async)(handle, base, size, offset, base_offset, done, stream) };
        if first {
            STREAM_BUSY.store(true, Ordering::SeqCst);
            let passed = Box::new(|_: &mut device::Gpu| {
                // Long enough for another thread to come in, if nothing keeps it out.
                std::thread::sleep(Duration::from_millis(5));
                STREAM_BUSY.store(false, Ordering::SeqCst);
            });
            assert!(device::enqueue(stream, base.addr() as u64, passed));
        }
        answer
    })
}
