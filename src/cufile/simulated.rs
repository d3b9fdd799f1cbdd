//! A libcufile that is not there: the same table of functions over plain files and the simulated GPU, so that every rule
//! of this module is tested on machines without either. It is as late as the real one may be: an operation of a batch is
//! done when somebody asks after it, one at a time, and one of a stream when the stream comes to it, from the numbers that
//! stand in its parameters then.
//!
//! What no caller may do, whatever the library answers, ends the test process: deregistering a file that is closed, or
//! memory that is freed, destroying a batch with operations in flight. What a caller may get wrong is answered as the real
//! one does.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::{c_int, c_uint, c_void};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::driver::{CuFile, Driver};
use super::sys::{
    BatchHandle, Descr, DrvPropsRoom, Functions, Handle, IoEvent, IoParams, Library, OPCODE_READ, Off, RawError,
    RawStream, batch_status,
};
use crate::device::simulated::{self, Gpu};

const OK: RawError = RawError { err: 0, cu_err: 0 };

/// What the library does otherwise than usual, on this thread.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mood {
    /// The next call of the function with this name answers so, and does nothing.
    pub(crate) refuse: Option<(&'static str, RawError)>,
    /// The next transfer answers with this count, and moves nothing.
    pub(crate) count: Option<isize>,
    /// A transfer moves at most so many bytes.
    pub(crate) bytes_max: Option<usize>,
}

thread_local! {
    static MOOD: RefCell<Mood> = const { RefCell::new(Mood { refuse: None, count: None, bytes_max: None }) };
}

/// Changes this thread's library.
pub(crate) fn set_mood(mood: Mood) {
    MOOD.set(mood);
}

#[derive(Default)]
struct State {
    /// Descriptors by handle.
    files: BTreeMap<usize, c_int>,
    /// Registered memory: its GPU, of which each has addresses of its own, and its address.
    memory: BTreeSet<(usize, u64)>,
    streams: BTreeSet<usize>,
    batches: BTreeMap<usize, Queue>,
}

#[derive(Default)]
struct Queue {
    entries: usize,
    /// Addresses of parameters.
    waiting: VecDeque<usize>,
}

static STATE: Mutex<State> = Mutex::new(State {
    files: BTreeMap::new(),
    memory: BTreeSet::new(),
    streams: BTreeSet::new(),
    batches: BTreeMap::new(),
});
static HANDLES: AtomicUsize = AtomicUsize::new(1);

/// A library of its own, opened: its files are not another's.
pub(crate) fn cufile() -> CuFile {
    cufile_that(|_| {})
}

/// The same on a machine where cuFile has a direct path to whatever there is.
pub(crate) fn cufile_with_direct_path() -> CuFile {
    cufile_that(|functions| functions.driver_properties = properties_with_direct_path)
}

/// One that moves no byte of any file: every transfer is cuFile's own failure.
pub(crate) fn cufile_that_moves_nothing() -> CuFile {
    cufile_that(|functions| (functions.read, functions.write) = (read_nothing, write_nothing))
}

/// One on a full disk.
pub(crate) fn cufile_on_a_full_disk() -> CuFile {
    cufile_that(|functions| functions.write = write_to_a_full_disk)
}

/// One whose writes do not come back before [`let_writes_go_on`]. For one test alone.
pub(crate) fn cufile_that_gets_stuck() -> CuFile {
    cufile_that(|functions| functions.write = write_and_hang)
}

static STUCK: (Mutex<bool>, Condvar) = (Mutex::new(true), Condvar::new());

/// Lets go of what is stuck.
pub(crate) fn let_writes_go_on() {
    *STUCK.0.lock() = false;
    STUCK.1.notify_all();
}

/// A library of which some functions are changed.
fn cufile_that(change: impl FnOnce(&mut Functions)) -> CuFile {
    let mut functions = functions();
    change(&mut functions);
    let library = Library { functions, path: PathBuf::from("/simulated/libcufile.so.0") };
    CuFile::of(Driver::open(library, None, Duration::from_secs(60)).expect("the simulated driver opens"))
}

/// Whether a file is registered with this descriptor.
pub(super) fn is_registered(descriptor: c_int) -> bool {
    STATE.lock().files.values().any(|&known| known == descriptor)
}

/// Whether memory with this address is registered.
pub(super) fn is_memory_registered(address: u64) -> bool {
    STATE.lock().memory.iter().any(|&(_, known)| known == address)
}

pub(super) fn functions() -> Functions {
    Functions {
        get_version,
        driver_open,
        driver_properties,
        handle_register,
        handle_deregister,
        buffer_register,
        buffer_deregister,
        read,
        write,
        batch_set_up,
        batch_submit,
        batch_status,
        batch_cancel,
        batch_destroy,
        stream_register,
        stream_deregister,
        read_async,
        write_async,
        set_parameter_bool: None,
        set_parameter_size: None,
    }
}

fn code(err: c_int) -> RawError {
    RawError { err, cu_err: 0 }
}

/// The answer that this thread's mood has for a function, if any.
fn refused(name: &str) -> Option<RawError> {
    MOOD.with_borrow_mut(|mood| mood.refuse.take_if(|(refuse, _)| *refuse == name).map(|(_, answer)| answer))
}

fn new_handle() -> *mut c_void {
    ptr::without_provenance_mut(HANDLES.fetch_add(1, Ordering::Relaxed))
}

fn has_context() -> bool {
    simulated::current(|_| ()).is_some()
}

unsafe extern "C" fn get_version(version: *mut c_int) -> RawError {
    // SAFETY: this and every place for an answer below is valid, as the real library demands.
    unsafe { *version = 1150 };
    OK
}

unsafe extern "C" fn driver_open() -> RawError {
    refused("driver_open").unwrap_or(OK)
}

unsafe extern "C" fn driver_properties(room: *mut DrvPropsRoom) -> RawError {
    // SAFETY: a place for the answer.
    let props = unsafe { &mut (*room).props };
    props.nvfs.control_flags = 2;
    props.feature_flags = 7;
    props.max_batch_entries = 128;
    OK
}

unsafe extern "C" fn properties_with_direct_path(room: *mut DrvPropsRoom) -> RawError {
    // SAFETY: a place for the answer.
    let props = unsafe { &mut (*room).props };
    // As with nvidia-fs, for Lustre and NVMe.
    (props.nvfs.major_version, props.nvfs.status_flags, props.nvfs.control_flags) = (2, 1 << 4 | 1, 2);
    OK
}

unsafe extern "C" fn handle_register(handle: *mut Handle, descr: *mut Descr) -> RawError {
    if let Some(answer) = refused("handle_register") {
        return answer;
    }
    // SAFETY: a whole description, which is of a descriptor.
    let (kind, fd) = unsafe { ((*descr).kind, (*descr).handle.fd) };
    assert_eq!(kind, 1, "a descriptor is what is registered");
    let mut state = STATE.lock();
    if state.files.values().any(|&known| known == fd) {
        return code(5028);
    }
    let new = new_handle();
    state.files.insert(new.addr(), fd);
    // SAFETY: a place for the answer.
    unsafe { *handle = new };
    OK
}

unsafe extern "C" fn handle_deregister(handle: Handle) {
    let fd = STATE.lock().files.remove(&handle.addr()).expect("a handle that is registered");
    // SAFETY: asks after a descriptor.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    assert!(open, "a file was closed before it was deregistered");
}

unsafe extern "C" fn buffer_register(base: *const c_void, len: usize, _flags: c_int) -> RawError {
    if let Some(answer) = refused("buffer_register") {
        return answer;
    }
    let address = base.addr() as u64;
    match simulated::current(|gpu| gpu.memory(address, len).is_some().then(|| ptr::from_mut(gpu).addr())) {
        None => code(5047),
        Some(None) => code(5014),
        Some(Some(gpu)) if !STATE.lock().memory.insert((gpu, address)) => code(5023),
        Some(Some(_)) => OK,
    }
}

unsafe extern "C" fn buffer_deregister(base: *const c_void) -> RawError {
    let address = base.addr() as u64;
    let gpu = simulated::current(|gpu| {
        assert!(gpu.memory(address, 1).is_some(), "memory was freed before it was deregistered");
        ptr::from_mut(gpu).addr()
    });
    match gpu {
        None => code(5047),
        Some(gpu) if STATE.lock().memory.remove(&(gpu, address)) => OK,
        Some(_) => code(5024),
    }
}

/// Moves bytes as the real library does: a count, -1 with `errno`, or a code below zero.
fn transfer(gpu: &mut Gpu, mood: Mood, is_read: bool, handle: usize, address: u64, size: usize, offset: Off) -> isize {
    let Some(fd) = STATE.lock().files.get(&handle).copied() else { return -5027 };
    let Some(memory) = gpu.memory(address, size) else { return -5014 };
    let memory = &mut memory[..mood.bytes_max.unwrap_or(size).min(size)];
    // Through the page cache, whatever the descriptor: the real library takes any bytes too.
    let file = OpenOptions::new().read(is_read).write(!is_read).open(format!("/proc/self/fd/{fd}"));
    let moved = file.and_then(|file| match is_read {
        true => file.read_at(memory, offset as u64),
        false => file.write_at(memory, offset as u64),
    });
    moved.map_or_else(
        |error| {
            set_errno(error.raw_os_error().unwrap_or(libc::EIO));
            -1
        },
        |count| count as isize,
    )
}

fn set_errno(errno: c_int) {
    // SAFETY: the address of this thread's own `errno`.
    unsafe { *libc::__errno_location() = errno };
}

fn blocking(is_read: bool, handle: Handle, base: *const c_void, size: usize, offset: Off, base_offset: Off) -> isize {
    let (mood, count) = MOOD.with_borrow_mut(|mood| (*mood, mood.count.take()));
    if let Some(count) = count {
        set_errno(libc::ENOSPC);
        return count;
    }
    let address = base.addr() as u64 + base_offset as u64;
    simulated::current(|gpu| transfer(gpu, mood, is_read, handle.addr(), address, size, offset)).unwrap_or(-5047)
}

unsafe extern "C" fn read(handle: Handle, base: *mut c_void, size: usize, offset: Off, base_offset: Off) -> isize {
    blocking(true, handle, base, size, offset, base_offset)
}

unsafe extern "C" fn read_nothing(_: Handle, _: *mut c_void, _: usize, _: Off, _: Off) -> isize {
    -5044
}

unsafe extern "C" fn write_nothing(_: Handle, _: *const c_void, _: usize, _: Off, _: Off) -> isize {
    -5044
}

unsafe extern "C" fn write_to_a_full_disk(_: Handle, _: *const c_void, _: usize, _: Off, _: Off) -> isize {
    set_errno(libc::ENOSPC);
    -1
}

unsafe extern "C" fn write_and_hang(
    handle: Handle,
    base: *const c_void,
    size: usize,
    offset: Off,
    base_offset: Off,
) -> isize {
    let mut stuck = STUCK.0.lock();
    while *stuck {
        STUCK.1.wait(&mut stuck);
    }
    drop(stuck);
    blocking(false, handle, base, size, offset, base_offset)
}

unsafe extern "C" fn write(handle: Handle, base: *const c_void, size: usize, offset: Off, base_offset: Off) -> isize {
    blocking(false, handle, base, size, offset, base_offset)
}

unsafe extern "C" fn batch_set_up(batch: *mut BatchHandle, entries: c_uint) -> RawError {
    if entries > 128 {
        return code(5022);
    }
    let new = new_handle();
    STATE.lock().batches.insert(new.addr(), Queue { entries: entries as usize, waiting: VecDeque::new() });
    // SAFETY: a place for the answer.
    unsafe { *batch = new };
    OK
}

unsafe extern "C" fn batch_submit(
    batch: BatchHandle,
    count: c_uint,
    params: *mut IoParams,
    _flags: c_uint,
) -> RawError {
    if let Some(answer) = refused("batch_submit") {
        return answer;
    }
    if !has_context() {
        return code(5047);
    }
    let mut state = STATE.lock();
    let queue = state.batches.get_mut(&batch.addr()).expect("a batch that is set up");
    if queue.waiting.len() + count as usize > queue.entries {
        return code(5037);
    }
    for n in 0..count as usize {
        queue.waiting.push_back(params.wrapping_add(n).expose_provenance());
    }
    OK
}

unsafe extern "C" fn batch_status(
    batch: BatchHandle,
    _at_least: c_uint,
    count: *mut c_uint,
    events: *mut IoEvent,
    _timeout: *mut libc::timespec,
) -> RawError {
    if let Some(answer) = refused("batch_status") {
        return answer;
    }
    let next = STATE.lock().batches.get_mut(&batch.addr()).expect("a batch that is set up").waiting.pop_back();
    let mood = MOOD.with_borrow(|mood| *mood);
    let Some(at) = next else {
        // SAFETY: a place for the answer.
        unsafe { *count = 0 };
        return OK;
    };
    // SAFETY: parameters stay until their operation is reported; who frees them before breaks the rule that is tested here.
    let params = unsafe { *ptr::with_exposed_provenance::<IoParams>(at) };
    assert_eq!(params.mode, 1, "the parameters of an operation in flight were freed");
    let address = params.base.addr() as u64 + params.base_offset as u64;
    let is_read = params.opcode == OPCODE_READ;
    let moved = simulated::current(|gpu| {
        transfer(gpu, mood, is_read, params.handle.addr(), address, params.size, params.file_offset)
    });
    let moved = moved.unwrap_or(-5047);
    let status = if moved < 0 { batch_status::FAILED } else { batch_status::COMPLETE };
    // SAFETY: places for the answers; the caller has room for at least one event, since one was in flight.
    unsafe {
        assert!(*count >= 1);
        *count = 1;
        *events = IoEvent { cookie: params.cookie, status, ret: moved as usize };
    }
    OK
}

unsafe extern "C" fn batch_cancel(batch: BatchHandle) -> RawError {
    if let Some(answer) = refused("batch_cancel") {
        return answer;
    }
    // As the real one: nothing is reported any more.
    STATE.lock().batches.get_mut(&batch.addr()).expect("a batch that is set up").waiting.clear();
    OK
}

unsafe extern "C" fn batch_destroy(batch: BatchHandle) {
    assert!(has_context());
    let queue = STATE.lock().batches.remove(&batch.addr()).expect("a batch that is set up");
    assert!(queue.waiting.is_empty(), "a batch was destroyed with operations in flight");
}

unsafe extern "C" fn stream_register(stream: RawStream, flags: c_uint) -> RawError {
    if let Some(answer) = refused("stream_register") {
        return answer;
    }
    assert_eq!(flags & 8, 0, "inputs are not promised to be aligned");
    STATE.lock().streams.insert(stream.addr());
    OK
}

unsafe extern "C" fn stream_deregister(stream: RawStream) -> RawError {
    if STATE.lock().streams.remove(&stream.addr()) { OK } else { code(5022) }
}

struct AsyncCall {
    is_read: bool,
    handle: usize,
    base: u64,
    /// Addresses of the caller's numbers, looked at when the stream comes to the call.
    numbers: [usize; 4],
    mood: Mood,
}

impl AsyncCall {
    fn run(self, gpu: &mut Gpu) {
        let [size, offset, base_offset, done] = self.numbers;
        // SAFETY: the caller keeps them until the stream has passed the call; who does not breaks the rule that is tested.
        let (size, offset, base_offset) = unsafe {
            (
                *ptr::with_exposed_provenance::<usize>(size),
                *ptr::with_exposed_provenance::<Off>(offset),
                *ptr::with_exposed_provenance::<Off>(base_offset),
            )
        };
        let address = self.base + base_offset as u64;
        let moved = match self.mood.count {
            Some(count) => count,
            None => transfer(gpu, self.mood, self.is_read, self.handle, address, size, offset),
        };
        // SAFETY: as above.
        unsafe { *ptr::with_exposed_provenance_mut::<isize>(done) = moved };
    }
}

fn enqueue(call: AsyncCall, stream: RawStream) -> RawError {
    if let Some(answer) = refused("async") {
        return answer;
    }
    assert!(STATE.lock().streams.contains(&stream.addr()), "a stream that is registered");
    MOOD.with_borrow_mut(|mood| mood.count = None);
    let base = call.base;
    match has_context() && simulated::enqueue(stream, base, Box::new(move |gpu| call.run(gpu))) {
        true => OK,
        false => code(5047),
    }
}

/// What a call on a stream was handed, and the mood it is made in.
fn async_call(
    is_read: bool,
    handle: Handle,
    base: *mut c_void,
    (size, offset, base_offset, done): (*mut usize, *mut Off, *mut Off, *mut isize),
) -> AsyncCall {
    let numbers = [
        size.expose_provenance(),
        offset.expose_provenance(),
        base_offset.expose_provenance(),
        done.expose_provenance(),
    ];
    let mood = MOOD.with_borrow(|mood| *mood);
    AsyncCall { is_read, handle: handle.addr(), base: base.addr() as u64, numbers, mood }
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
    enqueue(async_call(true, handle, base, (size, offset, base_offset, done)), stream)
}

unsafe extern "C" fn write_async(
    handle: Handle,
    base: *mut c_void,
    size: *mut usize,
    offset: *mut Off,
    base_offset: *mut Off,
    done: *mut isize,
    stream: RawStream,
) -> RawError {
    enqueue(async_call(false, handle, base, (size, offset, base_offset, done)), stream)
}

/// A driver that makes its log where it stands, as the real one does.
pub(super) unsafe extern "C" fn open_and_log() -> RawError {
    match std::fs::write("cufile.log", "log") {
        Ok(()) => OK,
        Err(_) => code(5033),
    }
}

/// A driver that does not come back in time.
pub(super) unsafe extern "C" fn open_and_hang() -> RawError {
    std::thread::sleep(Duration::from_secs(2));
    OK
}
