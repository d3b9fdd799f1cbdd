//! The CUDA driver's functions, found at run time: the only file that names them. It calls nothing by itself but
//! `cuInit`, and knows no more of CUDA than the signatures.
//!
//! cudarc finds and holds the library; its bindings fix the signatures (checked below, at compile time). They are called
//! through a table of our own, for two reasons. cudarc panics where a function is missing, and it reads a driver's answer
//! as a closed `enum`, which a newer driver's answer may lie outside of. Here a missing function is an error that names
//! it, and an answer is a number. Tests fill the table with a simulated driver.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
pub(super) use sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream};

use super::error::CudaError;

/// What every function of the driver returns: 0, or why not.
pub(super) type Code = u32;

macro_rules! driver_functions {
    (
        $( #[doc = $doc:literal] $name:ident = $symbol:ident($($arg:ident: $type:ty),*); )*
        untyped:
        $( #[doc = $untyped_doc:literal] $untyped:ident = $untyped_symbol:ident($($u_arg:ident: $u_type:ty),*); )*
    ) => {
        /// The functions of one driver.
        pub(super) struct Driver {
            $( pub(super) $name: unsafe extern "C" fn($($type),*) -> Code, )*
            $( pub(super) $untyped: unsafe extern "C" fn($($u_type),*) -> Code, )*
        }

        impl Driver {
            /// Looks every function up; the name of the first that is missing is the error.
            fn find() -> Result<Driver, &'static str> {
                // SAFETY: `culib` panics where the library is missing; `load` found it just before.
                let library = unsafe { sys::culib() };
                Ok(Driver {
                    $( $name: {
                        // SAFETY: the type is that of cudarc's binding of the same symbol (asserted below), with the
                        // answer read as the number that it is.
                        let symbol = unsafe { library.get(concat!(stringify!($symbol), "\0").as_bytes()) };
                        *symbol.map_err(|_| stringify!($symbol))?
                    }, )*
                    $( $untyped: {
                        // SAFETY: as above, with `CUresult` passed as the number that it is.
                        let symbol = unsafe { library.get(concat!(stringify!($untyped_symbol), "\0").as_bytes()) };
                        *symbol.map_err(|_| stringify!($untyped_symbol))?
                    }, )*
                })
            }

            $(
                #[doc = $doc]
                ///
                /// # Safety
                /// What the driver asks of the function's arguments.
                #[allow(clippy::too_many_arguments, reason = "the driver's own")]
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Result<(), CudaError> {
                    // SAFETY: the pointer is this symbol's, and the caller answers for the arguments.
                    CudaError::check(unsafe { (self.$name)($($arg),*) })
                }
            )*
            $(
                #[doc = $untyped_doc]
                ///
                /// # Safety
                /// What the driver asks of the function's arguments.
                pub(super) unsafe fn $untyped(&self, $($u_arg: $u_type),*) -> Result<(), CudaError> {
                    // SAFETY: the pointer is this symbol's, and the caller answers for the arguments.
                    CudaError::check(unsafe { (self.$untyped)($($u_arg),*) })
                }
            )*
        }

        // The signatures above are those of cudarc's bindings, but for the type of the answer.
        $( const _: unsafe fn($($type),*) -> sys::CUresult = sys::$symbol; )*
    };
}

driver_functions! {
    /// Starts the driver in this process.
    init = cuInit(flags: c_uint);
    /// How many devices this process sees.
    device_get_count = cuDeviceGetCount(count: *mut c_int);
    /// The device with an ordinal.
    device_get = cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    /// A device's name, ended by a zero.
    device_get_name = cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
    /// The context that the runtime API and torch use on a device, made when absent.
    primary_context_retain = cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    /// The calling thread's context.
    context_current = cuCtxGetCurrent(context: *mut CUcontext);
    /// Makes a context the calling thread's, over the one it had.
    context_push = cuCtxPushCurrent_v2(context: CUcontext);
    /// Gives the calling thread the context back that it had.
    context_pop = cuCtxPopCurrent_v2(context: *mut CUcontext);
    /// Free and total device memory.
    memory_info = cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    /// Takes device memory.
    memory_allocate = cuMemAlloc_v2(address: *mut CUdeviceptr, len: usize);
    /// Gives device memory back; may wait for all of the device's work.
    memory_free = cuMemFree_v2(address: CUdeviceptr);
    /// Pins host memory that is there already.
    host_register = cuMemHostRegister_v2(address: *mut c_void, len: usize, flags: c_uint);
    /// Unpins it.
    host_unregister = cuMemHostUnregister(address: *mut c_void);
    /// Where the device sees host memory that is pinned.
    host_device_address = cuMemHostGetDevicePointer_v2(address: *mut CUdeviceptr, host: *mut c_void, flags: c_uint);
    /// Enqueues a copy from host to device memory.
    copy_to_device = cuMemcpyHtoDAsync_v2(target: CUdeviceptr, source: *const c_void, len: usize, stream: CUstream);
    /// Enqueues a copy from device to host memory.
    copy_to_host = cuMemcpyDtoHAsync_v2(target: *mut c_void, source: CUdeviceptr, len: usize, stream: CUstream);
    /// Enqueues a copy from device memory to other memory of the same device.
    copy_on_device = cuMemcpyDtoDAsync_v2(target: CUdeviceptr, source: CUdeviceptr, len: usize, stream: CUstream);
    /// Enqueues the filling of device memory with a 32-bit word, counted in words.
    fill_words = cuMemsetD32Async(target: CUdeviceptr, word: c_uint, count: usize, stream: CUstream);
    /// Loads code, compiled for this device where it is PTX.
    module_load = cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    /// A kernel of loaded code.
    module_function = cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    /// Enqueues a kernel.
    launch = cuLaunchKernel(function: CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared_bytes: c_uint, stream: CUstream, params: *mut *mut c_void, extra: *mut *mut c_void);
    /// Makes a stream.
    stream_create = cuStreamCreate(stream: *mut CUstream, flags: c_uint);
    /// Waits for all that was enqueued.
    stream_synchronize = cuStreamSynchronize(stream: CUstream);
    /// Destroys a stream.
    stream_destroy = cuStreamDestroy_v2(stream: CUstream);
    /// Makes an event.
    event_create = cuEventCreate(event: *mut CUevent, flags: c_uint);
    /// Enqueues an event behind what a stream holds.
    event_record = cuEventRecord(event: CUevent, stream: CUstream);
    /// Whether an event has passed.
    event_query = cuEventQuery(event: CUevent);
    /// Waits until an event has passed.
    event_synchronize = cuEventSynchronize(event: CUevent);
    /// Destroys an event.
    event_destroy = cuEventDestroy_v2(event: CUevent);
    untyped:
    /// The name of an answer.
    error_name = cuGetErrorName(code: Code, name: *mut *const c_char);
    /// The meaning of an answer.
    error_text = cuGetErrorString(code: Code, text: *mut *const c_char);
}

/// The answer is passed and returned as a number: it must be as wide as the bindings' type.
const _: () = assert!(size_of::<Code>() == size_of::<sys::CUresult>());

/// Pinned for every context of the process.
pub(super) const HOST_REGISTER_PORTABLE: c_uint = sys::CU_MEMHOSTREGISTER_PORTABLE;
/// Pinned to be read by the device alone: memory that the process may not write.
pub(super) const HOST_REGISTER_READ_ONLY: c_uint = sys::CU_MEMHOSTREGISTER_READ_ONLY;
/// A stream that does not wait for the legacy default stream, nor it for this one.
pub(super) const STREAM_NON_BLOCKING: c_uint = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
/// An event that keeps no time and whose waiter sleeps: a spinning one would take a core from the readers.
pub(super) const EVENT_FLAGS: c_uint = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as c_uint
    | sys::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC as c_uint;

/// The system's driver, started; or why there is none, and what to do.
///
/// A failure is not remembered: a driver that comes up later is found then.
pub(super) fn load() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    // SAFETY: loads the driver's library and closes it again, running its initialisers, as any use of CUDA does.
    if !unsafe { sys::is_culib_present() } {
        return Err("the NVIDIA driver's library (libcuda.so.1) was not found; install the NVIDIA driver, or let the \
                    dynamic loader see it (a container must be started with its GPUs)"
            .to_string());
    }
    let driver = Driver::find().map_err(|symbol| {
        format!("the NVIDIA driver's library has no {symbol}; install a driver for CUDA 12 or newer")
    })?;
    // SAFETY: `cuInit` may be called at any time, from any thread, more than once.
    unsafe { driver.init(0) }.map_err(|error| error.describe(&driver))?;
    Ok(DRIVER.get_or_init(|| driver))
}
