//! libcufile's types and functions, found at run time: the only file that names them. It judges no answer.
//!
//! Codes and flags are numbers here, never enums: a newer library may answer what this one does not know. Layouts are
//! those of NVIDIA's `cufile.h` (1.15 and 1.20), asserted below, and in tests against cudarc's bindings. Functions are
//! called through a table, which tests fill with a simulated library.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::mem::offset_of;
use std::path::PathBuf;
use std::ptr;

/// A registered file.
pub(super) type Handle = *mut c_void;
/// A batch.
pub(super) type BatchHandle = *mut c_void;
/// A CUDA stream.
pub(super) type RawStream = *mut c_void;
/// C's `off_t`.
pub(super) type Off = i64;

/// `CUfileError_t`: what most functions return, by value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawError {
    /// 0, or a `CUfileOpError`.
    pub(super) err: c_int,
    /// A `CUresult`; says something where `err` is 5011.
    pub(super) cu_err: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
pub(super) struct Descr {
    pub(super) kind: c_uint,
    pub(super) handle: DescrHandle,
    /// For file systems in user space; null otherwise.
    pub(super) fs_ops: *const c_void,
}

/// The union in [`Descr`]: a descriptor, in the first four of eight bytes.
#[repr(C)]
pub(super) union DescrHandle {
    pub(super) fd: c_int,
    pub(super) pointer: *mut c_void,
}

/// `CUfileDrvProps_t`, its nested structure `nvfs` first.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DrvProps {
    pub(super) nvfs: NvfsProps,
    pub(super) feature_flags: c_uint,
    pub(super) max_device_cache_kib: c_uint,
    pub(super) per_buffer_cache_kib: c_uint,
    pub(super) max_pinned_kib: c_uint,
    pub(super) max_batch_entries: c_uint,
    pub(super) max_batch_timeout_ms: c_uint,
}

/// `CUfileDrvProps_t.nvfs`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct NvfsProps {
    pub(super) major_version: c_uint,
    pub(super) minor_version: c_uint,
    pub(super) poll_threshold_kib: usize,
    pub(super) max_direct_io_kib: usize,
    pub(super) status_flags: c_uint,
    pub(super) control_flags: c_uint,
}

/// Room for [`DrvProps`] and whatever a newer library appends to it.
#[repr(C)]
#[derive(Default)]
pub(super) struct DrvPropsRoom {
    pub(super) props: DrvProps,
    spare: [u64; 32],
}

/// `CUfileIOParams_t`: one operation of a batch, its union's one member in place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct IoParams {
    pub(super) mode: c_uint,
    pub(super) base: *mut c_void,
    pub(super) file_offset: Off,
    pub(super) base_offset: Off,
    pub(super) size: usize,
    pub(super) handle: Handle,
    pub(super) opcode: c_uint,
    pub(super) cookie: *mut c_void,
}

/// `CUfileIOEvents_t`: what became of an operation of a batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct IoEvent {
    pub(super) cookie: *mut c_void,
    pub(super) status: c_uint,
    /// Bytes, or an error below zero, in two's complement.
    pub(super) ret: usize,
}

const _: () = {
    assert!(size_of::<RawError>() == 8);
    assert!(size_of::<Descr>() == 24 && offset_of!(Descr, handle) == 8 && offset_of!(Descr, fs_ops) == 16);
    assert!(size_of::<NvfsProps>() == 32 && offset_of!(NvfsProps, status_flags) == 24);
    assert!(size_of::<DrvProps>() == 56 && offset_of!(DrvProps, feature_flags) == 32);
    assert!(offset_of!(DrvProps, max_batch_entries) == 48 && offset_of!(DrvProps, max_batch_timeout_ms) == 52);
    assert!(size_of::<IoParams>() == 64 && offset_of!(IoParams, base) == 8 && offset_of!(IoParams, size) == 32);
    assert!(offset_of!(IoParams, handle) == 40 && offset_of!(IoParams, opcode) == 48);
    assert!(offset_of!(IoParams, cookie) == 56);
    assert!(size_of::<IoEvent>() == 24 && offset_of!(IoEvent, status) == 8 && offset_of!(IoEvent, ret) == 16);
};

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
pub(super) const HANDLE_TYPE_FD: c_uint = 1;
/// `CUFILE_BATCH`, the only mode of [`IoParams`].
pub(super) const MODE_BATCH: c_uint = 1;
/// `CUFILE_READ`.
pub(super) const OPCODE_READ: c_uint = 0;
/// `CUFILE_WRITE`.
pub(super) const OPCODE_WRITE: c_uint = 1;
/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
pub(super) const PARAM_ALLOW_COMPAT_MODE: c_uint = 1;
/// `CUFILE_PARAM_EXECUTION_PARALLEL_IO`.
pub(super) const PARAM_PARALLEL_IO: c_uint = 4;
/// Numbers of `CUFILE_PARAM_EXECUTION_*`, with the values of the `cufile.json` that the CUDA toolkit installs: threads, the
/// size in KiB from which a request is split, and into how many.
pub(super) const PARAMS_EXECUTION: [(c_uint, usize); 4] = [(1, 128), (2, 4), (3, 8192), (4, 4)];
/// `CU_FILE_STREAM_FIXED_*`: offsets and size are those of the call, not of the moment when the stream comes to it. Not
/// `PAGE_ALIGNED_INPUTS` (8): any byte may be asked for.
pub(super) const STREAM_INPUTS_FIXED: c_uint = 1 | 2 | 4;

/// `CUFILEStatus_enum`, of which an operation of a batch has one.
pub(super) mod batch_status {
    use std::ffi::c_uint;

    pub(in crate::cufile) const INVALID: c_uint = 4;
    pub(in crate::cufile) const CANCELED: c_uint = 8;
    pub(in crate::cufile) const COMPLETE: c_uint = 16;
    pub(in crate::cufile) const TIMEOUT: c_uint = 32;
    pub(in crate::cufile) const FAILED: c_uint = 64;
}

macro_rules! functions {
    ($( $(#[doc = $doc:literal])* $name:ident = $symbol:literal($($type:ty),*) $(-> $answer:ty)?; )*) => {
        /// The functions of one library.
        pub(super) struct Functions {
            $( $(#[doc = $doc])* pub(super) $name: unsafe extern "C" fn($($type),*) $(-> $answer)?, )*
            /// Sets a switch before the driver opens. Since 1.14 (CUDA 12.9).
            pub(super) set_parameter_bool: Option<unsafe extern "C" fn(c_uint, bool) -> RawError>,
            /// Sets a number before the driver opens. Since 1.14 (CUDA 12.9).
            pub(super) set_parameter_size: Option<unsafe extern "C" fn(c_uint, usize) -> RawError>,
        }

        impl Functions {
            /// Looks every function up; the name of the first that is missing is the error.
            fn find(library: &Opened) -> Result<Functions, &'static str> {
                Ok(Functions {
                    $( $name: {
                        let symbol = library.symbol($symbol).ok_or($symbol)?;
                        // SAFETY: `cufile.h` gives the symbol this signature, with enums passed as the numbers that they are.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $answer)?>(symbol) }
                    }, )*
                    set_parameter_bool: library.symbol("cuFileSetParameterBool").map(|symbol| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_uint, bool) -> RawError>(symbol)
                        }
                    }),
                    set_parameter_size: library.symbol("cuFileSetParameterSizeT").map(|symbol| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_uint, usize) -> RawError>(symbol)
                        }
                    }),
                })
            }
        }
    };
}

functions! {
    /// The library's version: 1000 times the major plus 10 times the minor one.
    get_version = "cuFileGetVersion"(*mut c_int) -> RawError;
    /// Opens the driver in this process.
    driver_open = "cuFileDriverOpen"() -> RawError;
    /// What the driver can do. Opens it where it is not open.
    driver_properties = "cuFileDriverGetProperties"(*mut DrvPropsRoom) -> RawError;
    /// Registers a descriptor.
    handle_register = "cuFileHandleRegister"(*mut Handle, *mut Descr) -> RawError;
    /// Forgets it.
    handle_deregister = "cuFileHandleDeregister"(Handle);
    /// Pins device memory for direct transfers.
    buffer_register = "cuFileBufRegister"(*const c_void, usize, c_int) -> RawError;
    /// Unpins it.
    buffer_deregister = "cuFileBufDeregister"(*const c_void) -> RawError;
    /// Reads, and returns when the bytes are there.
    read = "cuFileRead"(Handle, *mut c_void, usize, Off, Off) -> isize;
    /// Writes, and returns when the bytes have left the device.
    write = "cuFileWrite"(Handle, *const c_void, usize, Off, Off) -> isize;
    /// Makes a batch.
    batch_set_up = "cuFileBatchIOSetUp"(*mut BatchHandle, c_uint) -> RawError;
    /// Starts operations.
    batch_submit = "cuFileBatchIOSubmit"(BatchHandle, c_uint, *mut IoParams, c_uint) -> RawError;
    /// Asks which operations are done.
    batch_status = "cuFileBatchIOGetStatus"(BatchHandle, c_uint, *mut c_uint, *mut IoEvent, *mut libc::timespec) -> RawError;
    /// Asks for the end of all operations.
    batch_cancel = "cuFileBatchIOCancel"(BatchHandle) -> RawError;
    /// Frees a batch.
    batch_destroy = "cuFileBatchIODestroy"(BatchHandle);
    /// Readies a stream.
    stream_register = "cuFileStreamRegister"(RawStream, c_uint) -> RawError;
    /// Frees what the stream was readied with.
    stream_deregister = "cuFileStreamDeregister"(RawStream) -> RawError;
    /// Enqueues a read.
    read_async = "cuFileReadAsync"(Handle, *mut c_void, *mut usize, *mut Off, *mut Off, *mut isize, RawStream) -> RawError;
    /// Enqueues a write.
    write_async = "cuFileWriteAsync"(Handle, *mut c_void, *mut usize, *mut Off, *mut Off, *mut isize, RawStream) -> RawError;
}

/// A library, and where it was found.
pub(super) struct Library {
    pub(super) functions: Functions,
    pub(super) path: PathBuf,
}

/// Names to look for, the usual first. Run-time packages have `libcufile.so.0` alone; development ones `libcufile.so` too.
/// The loader's own search (its cache, `LD_LIBRARY_PATH`, what the process has loaded already) comes before fixed places.
const NAMES: [&str; 9] = [
    "libcufile.so.0",
    "libcufile.so",
    "libcufile.so.1",
    "libcufile.so.13",
    "libcufile.so.12",
    "/usr/local/cuda/lib64/libcufile.so.0",
    "/usr/local/cuda/lib64/libcufile.so",
    "/usr/local/cuda/targets/x86_64-linux/lib/libcufile.so.0",
    "/usr/local/cuda/targets/sbsa-linux/lib/libcufile.so.0",
];

impl Library {
    /// The system's library; or why there is none, and what to do.
    pub(super) fn load() -> Result<Library, String> {
        Self::load_any(&NAMES)
    }

    /// The first of these that is there and whole.
    pub(super) fn load_any(names: &[&str]) -> Result<Library, String> {
        let mut refused = None;
        for name in names {
            let opened = match Opened::open(name) {
                Ok(opened) => opened,
                Err(Some(why)) => {
                    refused.get_or_insert(why);
                    continue;
                }
                Err(None) => continue,
            };
            let functions = Functions::find(&opened).map_err(|symbol| {
                format!("{} has no {symbol}; install libcufile of CUDA 12.2 or newer", opened.path(name).display())
            })?;
            return Ok(Library { functions, path: opened.path(name) });
        }
        Err(match refused {
            Some(why) => format!("libcufile was found but could not be loaded: {why}"),
            None => "libcufile.so.0 was not found; install it (it is part of the CUDA toolkit, and the Python package \
                     nvidia-cufile) and let the dynamic loader see it, for example through LD_LIBRARY_PATH"
                .to_string(),
        })
    }
}

/// A loaded library. It is never unloaded: cuFile keeps threads of its own.
struct Opened(*mut c_void);

impl Opened {
    /// Loads a library. One that is not there is `None`; one that is there and does not load says why.
    fn open(name: &str) -> Result<Opened, Option<String>> {
        let text = CString::new(name).map_err(|_| None)?;
        // SAFETY: the name ends with a zero. The library's initialisers run, as any use of it means.
        let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Opened(handle));
        }
        // SAFETY: `dlerror` answers for this thread's last call; the text is copied before the next.
        let why = unsafe { text_of(libc::dlerror()) };
        // The loader names the file that is missing first: another one is a dependency of a library that is there.
        Err(why.filter(|why| !(why.starts_with(name) && why.contains("No such file"))))
    }

    fn symbol(&self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: the library is loaded and stays so; the name ends with a zero.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    }

    /// The file that the loader took.
    fn path(&self, name: &str) -> PathBuf {
        let found = self.symbol("cuFileGetVersion").and_then(|symbol| {
            let mut facts = libc::Dl_info {
                dli_fname: ptr::null(),
                dli_fbase: ptr::null_mut(),
                dli_sname: ptr::null(),
                dli_saddr: ptr::null_mut(),
            };
            // SAFETY: the address is of a loaded library, and `facts` is a place for the answer.
            let answered = unsafe { libc::dladdr(symbol, &mut facts) } != 0;
            // SAFETY: the loader's text lives as long as the library, which is never unloaded.
            answered.then(|| unsafe { text_of(facts.dli_fname) }).flatten()
        });
        PathBuf::from(found.unwrap_or_else(|| name.to_string()))
    }
}

/// A C string, copied; null is none.
///
/// # Safety
/// `text` is null or ends with a zero, and lives through the call.
unsafe fn text_of(text: *const c_char) -> Option<String> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use cudarc::cufile::sys as theirs;

    use super::*;

    #[test]
    fn the_layouts_are_those_of_other_bindings() {
        macro_rules! same {
            ($ours:ty, $theirs:ty: $($field:ident = $($their_field:ident).+),*) => {
                assert_eq!((size_of::<$ours>(), align_of::<$ours>()), (size_of::<$theirs>(), align_of::<$theirs>()));
                $( assert_eq!(offset_of!($ours, $field), offset_of!($theirs, $($their_field).+)); )*
            };
        }
        same!(RawError, theirs::CUfileError_t: err = err, cu_err = cu_err);
        same!(Descr, theirs::CUfileDescr_t: kind = type_, handle = handle, fs_ops = fs_ops);
        same!(DrvProps, theirs::CUfileDrvProps_t: nvfs = nvfs, feature_flags = fflags,
            max_device_cache_kib = max_device_cache_size, per_buffer_cache_kib = per_buffer_cache_size,
            max_pinned_kib = max_device_pinned_mem_size, max_batch_entries = max_batch_io_size,
            max_batch_timeout_ms = max_batch_io_timeout_msecs);
        same!(NvfsProps, theirs::CUfileDrvProps__bindgen_ty_1: major_version = major_version,
            minor_version = minor_version, poll_threshold_kib = poll_thresh_size,
            max_direct_io_kib = max_direct_io_size, status_flags = dstatusflags, control_flags = dcontrolflags);
        same!(IoParams, theirs::CUfileIOParams_t: mode = mode, base = u, handle = fh, opcode = opcode, cookie = cookie);
        same!(IoEvent, theirs::CUfileIOEvents_t: cookie = cookie, status = status, ret = ret);
        let inner = offset_of!(theirs::CUfileIOParams_t, u);
        type Inner = theirs::CUfileIOParams__bindgen_ty_1__bindgen_ty_1;
        assert_eq!(offset_of!(IoParams, file_offset), inner + offset_of!(Inner, file_offset));
        assert_eq!(offset_of!(IoParams, base_offset), inner + offset_of!(Inner, devPtr_offset));
        assert_eq!(offset_of!(IoParams, size), inner + offset_of!(Inner, size));
        assert_eq!(HANDLE_TYPE_FD, theirs::CUfileFileHandleType::CU_FILE_HANDLE_TYPE_OPAQUE_FD as c_uint);
        assert_eq!(MODE_BATCH, theirs::CUfileBatchMode_t::CUFILE_BATCH as c_uint);
        assert_eq!(OPCODE_WRITE, theirs::CUfileOpcode_t::CUFILE_WRITE as c_uint);
        assert_eq!(batch_status::COMPLETE, theirs::CUfileStatus_t::CUFILE_COMPLETE as c_uint);
        assert_eq!(batch_status::FAILED, theirs::CUfileStatus_t::CUFILE_FAILED as c_uint);
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_with_a_remedy() {
        let why = Library::load_any(&["libcufile-of-nowhere.so.0", "/nowhere/libcufile.so"]).err().unwrap();
        assert!(why.contains("not found") && why.contains("LD_LIBRARY_PATH"), "{why}");
    }

    #[test]
    fn a_library_that_is_another_one_or_no_library_says_so() {
        let why = Library::load_any(&["libcufile-of-nowhere.so", "libc.so.6"]).err().unwrap();
        assert!(why.contains("libc.so.6") && why.contains("cuFileGetVersion") && why.contains("install"), "{why}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcufile.so.0");
        std::fs::write(&path, "no library").unwrap();
        let why = Library::load_any(&[path.to_str().unwrap()]).err().unwrap();
        assert!(why.contains("could not be loaded") && why.contains("libcufile.so.0"), "{why}");
    }
}
