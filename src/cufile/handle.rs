//! Files that cuFile knows. A file is registered once, however often it is opened here, and deregistered before its
//! descriptor closes.
//!
//! # Invariants
//! - A registration owns the descriptor that it was made with: nobody else can close it.
//! - A registration that is in the table of its driver is of an inode that is still open, so its number means that inode.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Weak};

use super::driver::CuFile;
use super::error::{self, Error, ErrorKind, Result, Status};
use super::sys;
use super::transfer::device_error;
use super::udev;
use crate::device::{Current, Device};
use crate::storage::StorageFile;

/// What may be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// An existing file, for reading.
    Read,
    /// For reading and writing, made when absent.
    ReadWrite,
}

/// A file that cuFile knows. A handle: cloning it is free, every thread may use it, and the last one deregisters.
#[derive(Clone)]
pub struct File(Arc<Registration>);

/// What one registration stands for: the inode, and how it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
    writable: bool,
    /// Past the page cache: cuFile has no direct path through another descriptor.
    direct: bool,
}

/// A registered descriptor.
pub(super) struct Registration {
    cufile: CuFile,
    raw: sys::Handle,
    id: FileId,
    path: PathBuf,
    /// Closed after the registration is gone, since fields are dropped after the struct.
    descriptor: OwnedFd,
}

// SAFETY: a handle is an index into cuFile's own tables; cuFile allows every thread to use it at the same time.
unsafe impl Send for Registration {}
// SAFETY: as above; nothing else here changes.
unsafe impl Sync for Registration {}

impl CuFile {
    /// Opens a file past the page cache (`O_DIRECT`), where its file system can, and registers it.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] where it cannot be opened; else as [`register`](Self::register).
    pub fn open(&self, path: impl AsRef<Path>, access: Access) -> Result<File> {
        let path = path.as_ref();
        let write = access == Access::ReadWrite;
        let open = |flags| {
            let mut options = OpenOptions::new();
            options.read(true).write(write).create(write).truncate(false).custom_flags(flags).open(path)
        };
        let file = match open(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0),
            answer => answer,
        };
        let file = file.map_err(|error| os_error("open", path, &error))?;
        self.register_owned(file.into(), path)
    }

    /// Registers an open file, through a descriptor of its own to the same open file. `path` is only for messages.
    ///
    /// A file that is registered already, with the same access and the same way past the page cache or through it, is not
    /// registered again.
    ///
    /// # Errors
    /// [`ErrorKind::Status`] where cuFile refuses it: where the code is 5027 (or, before 1.15, 5030), with what udev knows of the file's disk.
    pub fn register(&self, file: BorrowedFd<'_>, path: &Path) -> Result<File> {
        let descriptor = file.try_clone_to_owned().map_err(|error| os_error("duplicate", path, &error))?;
        self.register_owned(descriptor, path)
    }

    /// [`register`](Self::register) for a file of the storage layer, through the descriptor that it names.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where it has none; else as [`register`](Self::register).
    pub(crate) fn register_stored(&self, file: &dyn StorageFile, path: &Path) -> Result<File> {
        let Some(descriptor) = file.raw_fd().filter(|&descriptor| descriptor >= 0) else {
            let why = "the file has no descriptor of the system's".to_string();
            return Err(Error::new("register", path.display().to_string(), ErrorKind::Invalid(why)));
        };
        // SAFETY: the descriptor is open as long as the file is, which is borrowed here.
        self.register(unsafe { BorrowedFd::borrow_raw(descriptor) }, path)
    }

    fn register_owned(&self, descriptor: OwnedFd, path: &Path) -> Result<File> {
        let file = std::fs::File::from(descriptor);
        let facts = file.metadata().map_err(|error| os_error("look at", path, &error))?;
        let flags = status_flags(&file).map_err(|error| os_error("look at", path, &error))?;
        let writable = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let direct = flags & libc::O_DIRECT != 0;
        let id = FileId { device: facts.dev(), inode: facts.ino(), writable, direct };
        // Held while cuFile registers, so that two threads do not register the same file.
        let mut files = self.driver().files.lock();
        if let Some(known) = files.get(&id).and_then(Weak::upgrade) {
            return Ok(File(known));
        }
        let mut raw = ptr::null_mut();
        let mut descr = sys::Descr {
            kind: sys::HANDLE_TYPE_FD,
            handle: sys::DescrHandle { pointer: ptr::null_mut() },
            fs_ops: ptr::null(),
        };
        descr.handle.fd = file.as_raw_fd();
        // SAFETY: `raw` is a place for the answer; `descr` is whole and is only read during the call.
        let answer = unsafe { (self.functions().handle_register)(&raw mut raw, &raw mut descr) };
        error::check(answer).map_err(|kind| {
            let remedy = match kind {
                // The second is the answer of 1.13 and 1.14.
                ErrorKind::Status { status: Status::HandleNotRegistered | Status::InternalError, .. } => {
                    udev::ask(id.device).remedy()
                }
                _ => None,
            };
            Error::new("register", path.display().to_string(), kind).with_remedy(remedy)
        })?;
        let registration =
            Arc::new(Registration { cufile: *self, raw, id, path: path.to_path_buf(), descriptor: file.into() });
        files.insert(id, Arc::downgrade(&registration));
        Ok(File(registration))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: the handle was registered, is deregistered once, and no operation is left that uses it: each holds a
        // share of this. The descriptor is closed after this.
        unsafe { (self.cufile.functions().handle_deregister)(self.raw) };
        let mut files = self.cufile.driver().files.lock();
        // Another thread may have registered the file anew meanwhile.
        if files.get(&self.id).is_some_and(|known| known.strong_count() == 0) {
            files.remove(&self.id);
        }
    }
}

impl File {
    /// Where it was opened. It may bear another name by now.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether it may be written to.
    pub fn is_writable(&self) -> bool {
        self.0.id.writable
    }

    /// Whether it is open past the page cache. Where it is not, cuFile has no direct path to it.
    pub fn is_direct(&self) -> bool {
        self.0.id.direct
    }

    /// Whether the disk under it may be of a kind that cuFile has a direct path to, by cuFile's own names for those kinds. A
    /// disk that says nothing of itself may be.
    pub(crate) fn may_be_on(&self, paths: &[&str]) -> bool {
        // Where anything but NVMe is among them, only cuFile knows.
        if paths.iter().any(|path| !path.starts_with("NVMe")) {
            return true;
        }
        let (major, minor) = udev::split(self.0.id.device);
        let disk = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"));
        // Volumes made of several disks (`dm-0`, `md0`) lie under `virtual`.
        disk.map_or(true, |disk| ["/nvme", "/virtual/"].iter().any(|kind| disk.to_string_lossy().contains(kind)))
    }

    /// The descriptor that is registered.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.0.descriptor.as_fd()
    }

    pub(super) fn cufile(&self) -> CuFile {
        self.0.cufile
    }

    pub(super) fn raw(&self) -> sys::Handle {
        self.0.raw
    }

    pub(super) fn error(&self, action: &'static str, kind: ErrorKind) -> Error {
        Error::new(action, self.path().display().to_string(), kind)
    }

    /// Makes a device's context current for calls on this file.
    pub(super) fn enter(&self, action: &'static str, device: &Device) -> Result<Current> {
        device.make_current().map_err(|error| device_error(action, &error))
    }
}

fn os_error(action: &'static str, path: &Path, error: &io::Error) -> Error {
    Error::new(action, path.display().to_string(), ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// How the file was opened.
fn status_flags(file: &std::fs::File) -> io::Result<i32> {
    // SAFETY: the descriptor is open as long as `file` is borrowed; the call takes no memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        flags if flags < 0 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({})", self.path().display())
    }
}
