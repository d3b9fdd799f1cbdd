//! cuFile's driver: opened once in a process, on first use, and never closed. It moves no bytes.
//!
//! # Invariants
//! - Whether the driver opened is found out once; every later caller gets the same answer, also the caller that came
//!   while it was being found out.
//! - An opening that hangs is given up after [`OPEN_TIME_MAX`]: nobody waits for ever.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::error::{self, Error, ErrorKind, Result, Status};
use super::handle::{FileId, Registration};
use super::log;
use super::sys::{self, Functions, Library};
use crate::device::Device;

/// Opening takes 0.2 to 0.5 s with one GPU; more GPUs and a cold driver make it several.
const OPEN_TIME_MAX: Duration = Duration::from_secs(60);

/// cuFile, open in this process. A handle: copying it is free, and every thread may use it.
#[derive(Clone, Copy)]
pub struct CuFile(&'static Driver);

/// The driver behind every handle.
pub(super) struct Driver {
    pub(super) functions: Functions,
    library: PathBuf,
    version: (u32, u32),
    log_directory: Option<PathBuf>,
    open_time: Duration,
    /// Files that are registered now.
    pub(super) files: Mutex<HashMap<FileId, Weak<Registration>>>,
}

impl CuFile {
    /// cuFile, opened by the first call in the process: that takes 200 to 500 ms. Later calls are free and give the same
    /// answer.
    ///
    /// Compatibility mode is allowed, unless the user's environment (`CUFILE_ALLOW_COMPAT_MODE`) decides. cuFile's log
    /// goes to a private directory under the system's temporary one, unless the user's environment
    /// (`CUFILE_LOGFILE_PATH`, `CUFILE_ENV_PATH_JSON`) says where.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where there is no GPU, no libcufile, or a system that cuFile would hang on;
    /// [`ErrorKind::Status`] where the driver does not open; [`ErrorKind::TimedOut`] where it hangs. Each with its remedy
    /// where one is known.
    pub fn get() -> Result<CuFile> {
        static DRIVER: OnceLock<Result<&'static Driver>> = OnceLock::new();
        let opened = DRIVER.get_or_init(|| {
            let why_not = Device::cuda_unavailable_reason().or_else(|| would_hang(Path::new("/proc/modules")));
            if let Some(why) = why_not {
                return Err(unavailable(why));
            }
            let directory = (!log::is_chosen()).then(log::directory);
            Driver::open(Library::load().map_err(unavailable)?, directory, OPEN_TIME_MAX)
        });
        opened.clone().map(CuFile)
    }

    /// Whether anything speaks for a direct path, so that opening the driver to ask could pay: nvidia-fs, or an NVMe disk
    /// that PCI P2PDMA might reach. Asked of the system once; opens nothing.
    pub(crate) fn may_go_direct() -> bool {
        static ANSWER: OnceLock<bool> = OnceLock::new();
        *ANSWER.get_or_init(|| {
            let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
            let nvidia_fs = modules.lines().any(|line| line.starts_with("nvidia_fs "));
            let has_nvme = || fs::read_dir("/sys/class/nvme").is_ok_and(|mut disks| disks.next().is_some());
            // Without a GPU's driver neither helps.
            Path::new("/proc/driver/nvidia").exists() && (nvidia_fs || has_nvme())
        })
    }

    /// What the driver can do, asked now: some of it changes with the driver's configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] where it does not say.
    pub fn properties(&self) -> Result<Properties> {
        let mut room = sys::DrvPropsRoom::default();
        // SAFETY: `room` is a place for the answer, and for more than any known version writes.
        let answer = unsafe { (self.0.functions.driver_properties)(&raw mut room) };
        error::check(answer).map_err(|kind| Error::new("ask for the properties of", "the driver", kind))?;
        Ok(Properties::new(room.props))
    }

    /// The library's file.
    pub fn library(&self) -> &Path {
        &self.0.library
    }

    /// The library's version, major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.0.version
    }

    /// Where alight had cuFile write its log; `None` where the user's environment decides, or where it is the directory
    /// that the process was in.
    pub fn log_directory(&self) -> Option<&Path> {
        self.0.log_directory.as_deref()
    }

    /// How long the driver took to open.
    pub fn open_time(&self) -> Duration {
        self.0.open_time
    }

    pub(super) fn functions(self) -> &'static Functions {
        &self.0.functions
    }

    pub(super) fn driver(self) -> &'static Driver {
        self.0
    }

    #[cfg(test)]
    pub(super) fn of(driver: &'static Driver) -> CuFile {
        CuFile(driver)
    }
}

fn unavailable(why: String) -> Error {
    Error::new("open", "the driver", ErrorKind::Unavailable(why))
}

/// Why opening the driver would never return. libcufile (1.15 and 1.20) reads `/proc/modules` in a loop that ends at the
/// end of the file, and does not notice that the file could not be opened: so under kernels without modules, as small
/// virtual machines and sandboxes have them.
fn would_hang(modules: &Path) -> Option<String> {
    let error = fs::File::open(modules).err()?;
    Some(format!(
        "{} cannot be read ({error}), and libcufile hangs where it cannot; use a kernel with loadable modules, or another \
         transport",
        modules.display()
    ))
}

impl Driver {
    /// Opens the driver on a thread of its own and waits for it, but not for ever. It is never freed.
    pub(super) fn open(
        library: Library,
        log_directory: Option<PathBuf>,
        time_max: Duration,
    ) -> Result<&'static Driver> {
        let (tell, told) = mpsc::sync_channel(1);
        let started = Instant::now();
        let opening = move || {
            let moved = log_directory.filter(|directory| {
                log::move_this_thread_to(directory)
                    .inspect_err(|error| {
                        tracing::info!(%error, "cuFile writes cufile.log into the working directory; CUFILE_LOGFILE_PATH moves it");
                    })
                    .is_ok()
            });
            let opened = open_here(&library.functions);
            // Nobody listens any more where the time was up.
            let _ = tell.send((library, moved, opened));
        };
        let spawned = thread::Builder::new().name("alight-cufile".to_string()).spawn(opening);
        spawned.map_err(|error| unavailable(format!("no thread to open the driver on: {error}")))?;
        let (library, log_directory, opened) = told.recv_timeout(time_max).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::new("open", "the driver", ErrorKind::TimedOut(time_max)),
            RecvTimeoutError::Disconnected => unavailable("the thread that opened the driver panicked".to_string()),
        })?;
        let version = opened.map_err(|kind| {
            let log = log_directory.as_deref().map(|directory| directory.join("cufile.log"));
            let remedy = log.map(|log| format!("cuFile's log says why: {}", log.display()));
            Error::new("open", "the driver", kind).with_remedy(remedy)
        })?;
        Ok(Box::leak(Box::new(Driver {
            functions: library.functions,
            library: library.path,
            version,
            log_directory,
            open_time: started.elapsed(),
            files: Mutex::default(),
        })))
    }
}

/// Sets what must be set before, opens the driver, and asks for the library's version.
fn open_here(functions: &Functions) -> std::result::Result<(u32, u32), ErrorKind> {
    let said = |what: &str, answer: sys::RawError| match error::check(answer) {
        // Another library was first; its choice stands.
        Ok(()) | Err(ErrorKind::Status { status: Status::DriverAlreadyOpen, .. }) => {}
        Err(kind) => tracing::info!(%kind, "cuFile does not take {what}; its own setting stands"),
    };
    // What is set here comes before the environment and the configuration, so the user's word there is not overridden.
    if let Some(set) = functions.set_parameter_bool
        && std::env::var_os("CUFILE_ALLOW_COMPAT_MODE").is_none()
    {
        // SAFETY: takes no memory of ours.
        said("compatibility mode", unsafe { set(sys::PARAM_ALLOW_COMPAT_MODE, true) });
    }
    if let (Some(set_size), Some(set_bool)) = (functions.set_parameter_size, functions.set_parameter_bool)
        && std::env::var_os("CUFILE_ENV_PATH_JSON").is_none()
        && !Path::new("/etc/cufile.json").exists()
    {
        // Without a configuration, as with the run-time package alone, cuFile 1.15 has no threads, and every operation on a
        // stream fails in compatibility mode, with no code that says why. All of these or none: with threads and nothing
        // to split a request into, it divides by zero.
        for (param, value) in sys::PARAMS_EXECUTION {
            // SAFETY: takes no memory of ours.
            said("threads", unsafe { set_size(param, value) });
        }
        // SAFETY: as above.
        said("threads", unsafe { set_bool(sys::PARAM_PARALLEL_IO, true) });
    }
    // SAFETY: takes nothing; may be called from any thread.
    match error::check(unsafe { (functions.driver_open)() }) {
        Ok(()) | Err(ErrorKind::Status { status: Status::DriverAlreadyOpen, .. }) => {}
        Err(kind) => return Err(kind),
    }
    let mut version = 0;
    // SAFETY: a place for the answer.
    error::check(unsafe { (functions.get_version)(&raw mut version) })?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}

/// What cuFile's driver can do in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Properties {
    /// The version of the nvidia-fs kernel module, where it is loaded.
    pub nvidia_fs: Option<(u32, u32)>,
    /// The storage that cuFile has a direct path to, by cuFile's own names; empty where there is none.
    pub direct_paths: Vec<&'static str>,
    /// Whether cuFile may go through its own threads and host memory where there is no direct path.
    pub compatibility_allowed: bool,
    /// Whether batches work.
    pub batches: bool,
    /// Whether operations on streams work.
    pub streams: bool,
    /// The most operations that a batch may hold.
    pub batch_entries_max: u32,
    /// The most bytes that one direct request moves; larger ones are split by cuFile.
    pub direct_io_bytes_max: u64,
    /// The size of cuFile's own buffers. Before 1.15, no operation of a batch may be longer in compatibility mode.
    pub buffer_bytes: u64,
    /// The device memory that cuFile may take for buffers of its own.
    pub device_cache_bytes_max: u64,
    /// The device memory that may be registered.
    pub registered_bytes_max: u64,
}

/// Bits of `nvfs.dstatusflags`. The bit of PCI P2PDMA stands without nvidia-fs; the others say what nvidia-fs can do.
const PATHS: [(u32, &str); 13] = [
    (0, "Lustre"),
    (1, "WekaFS"),
    (2, "NFS over RDMA"),
    (3, "GPFS"),
    (4, "NVMe"),
    (5, "NVMe-oF"),
    (6, "SCSI"),
    (7, "ScaleFlux CSD"),
    (8, "NVMesh"),
    (9, "BeeGFS"),
    (P2PDMA_BIT, "NVMe by PCI P2PDMA"),
    (12, "ScateFS"),
    (13, "virtio-fs"),
];
const P2PDMA_BIT: u32 = 11;

impl Properties {
    fn new(raw: sys::DrvProps) -> Properties {
        let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
        let nvfs = raw.nvfs;
        let nvidia_fs = (nvfs.major_version > 0).then_some((nvfs.major_version, nvfs.minor_version));
        // 1.20 sets bits for what it could use if the module were there.
        let direct = |at: u32| bit(nvfs.status_flags, at) && (nvidia_fs.is_some() || at == P2PDMA_BIT);
        Properties {
            nvidia_fs,
            direct_paths: PATHS.iter().filter(|&&(at, _)| direct(at)).map(|&(_, name)| name).collect(),
            compatibility_allowed: bit(nvfs.control_flags, 1),
            batches: bit(raw.feature_flags, 1),
            streams: bit(raw.feature_flags, 2),
            batch_entries_max: raw.max_batch_entries,
            direct_io_bytes_max: (nvfs.max_direct_io_kib as u64).saturating_mul(1024),
            buffer_bytes: u64::from(raw.per_buffer_cache_kib) * 1024,
            device_cache_bytes_max: u64::from(raw.max_device_cache_kib) * 1024,
            registered_bytes_max: u64::from(raw.max_pinned_kib) * 1024,
        }
    }

    /// Whether any storage can be reached without host memory in between. Whether a given file is on it shows only when it
    /// is read.
    pub fn has_direct_path(&self) -> bool {
        !self.direct_paths.is_empty()
    }
}

impl fmt::Debug for CuFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.version();
        write!(f, "CuFile({major}.{minor}, {})", self.library().display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_that_cufile_hangs_on_is_told_before_it_is_tried() {
        let why = would_hang(Path::new("/nowhere/modules")).unwrap();
        assert!(
            why.contains("/nowhere/modules") && why.contains("hangs") && why.contains("another transport"),
            "{why}"
        );
        assert_eq!(would_hang(Path::new("/proc/self/maps")), None);
    }

    #[test]
    fn properties_of_a_machine_without_a_direct_path_name_none() {
        // As 1.20 answers on a machine without nvidia-fs.
        let mut raw = sys::DrvProps { feature_flags: 0xf, max_batch_entries: 128, ..sys::DrvProps::default() };
        raw.nvfs = sys::NvfsProps { status_flags: 1 << 14, control_flags: 2, max_direct_io_kib: 16384, ..raw.nvfs };
        let properties = Properties::new(raw);
        assert!(!properties.has_direct_path() && properties.compatibility_allowed);
        assert!(properties.batches && properties.streams && properties.nvidia_fs.is_none());
        assert_eq!((properties.batch_entries_max, properties.direct_io_bytes_max), (128, 16 << 20));
        raw.nvfs.status_flags = 1 << 4;
        assert!(!Properties::new(raw).has_direct_path(), "a bit of nvidia-fs without nvidia-fs");
        raw.nvfs.status_flags |= 1 << P2PDMA_BIT;
        assert_eq!(Properties::new(raw).direct_paths, ["NVMe by PCI P2PDMA"]);
        (raw.nvfs.major_version, raw.nvfs.minor_version) = (2, 26);
        let properties = Properties::new(raw);
        assert_eq!((properties.nvidia_fs, properties.direct_paths.len()), (Some((2, 26)), 2));
    }
}
