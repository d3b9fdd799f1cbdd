//! The cuFile route: NVIDIA's cuFile moves the bytes between the file and the GPU, straight where the machine has a direct
//! path, through its own threads and host memory (compatibility mode) where it has none.
//!
//! cuFile's driver takes 0.2 to 0.5 s to open, so nobody opens it by the way: where nothing speaks for a direct path, only
//! who asks for this route does; where something does, it is opened on a thread of its own, and other routes serve
//! meanwhile.
//!
//! # Invariants
//! - A file is registered once and kept registered as long as it is open; what was found of it is asked for once.
//! - A failure that another route may not share is [`Error::RouteUnavailable`]; a short file and a full disk are what they
//!   are.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;

use parking_lot::Mutex;

use super::lanes::in_lanes;
use super::staged::{chunks, too_short};
use super::transport::{IoOperation, OpenFile, Piece, Route, Transfer, Transport};
use crate::cufile::{self, CuFile, ErrorKind, File, Landing};
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::storage::StorageFile;

/// One call of cuFile: long enough for the disk's full rate, short enough that several threads share a transfer.
const CHUNK_BYTES: usize = 4 << 20;

/// Moves bytes through cuFile. A clone is the same route, with the same files registered.
#[derive(Clone)]
pub struct CuFileTransport(Arc<Inner>);

struct Inner {
    standing: OnceLock<Standing>,
    /// Whether a thread was started to find it out.
    asked: AtomicBool,
    /// Files by the address of what they were opened as, which stays taken while the weak share lives.
    files: Mutex<HashMap<usize, Known>>,
}

/// What cuFile is in this process.
enum Standing {
    /// Open, with a direct path to storage of these kinds.
    Direct(CuFile, Vec<&'static str>),
    /// Open, with none.
    Compatible(CuFile),
    /// Why it cannot be used.
    Unusable(String),
}

struct Known {
    file: Weak<dyn StorageFile>,
    registered: std::result::Result<File, String>,
}

impl CuFileTransport {
    /// The cuFile route, of every GPU. It opens nothing yet.
    pub fn new() -> Self {
        let (standing, asked, files) = Default::default();
        Self(Arc::new(Inner { standing, asked, files }))
    }

    /// The route over a library of a test's own.
    #[cfg(test)]
    pub(crate) fn over(cufile: CuFile) -> Self {
        let route = Self::new();
        route.0.standing.get_or_init(|| Standing::of(cufile));
        route
    }

    /// Why it is not the best way to this file on this device, where it is not. Blocks for nothing: while cuFile is being
    /// opened, that is the reason.
    ///
    /// # Errors
    /// [`Error::RouteUnavailable`].
    pub(crate) fn check_direct(&self, file: &OpenFile, device: &Device) -> Result<()> {
        if device.is_host() {
            return Err(unavailable(ON_THE_HOST));
        }
        let paths = match self.standing_so_far() {
            Some(Standing::Direct(_, paths)) => paths,
            Some(Standing::Compatible(_)) => return Err(unavailable("cuFile has no direct path on this machine")),
            Some(Standing::Unusable(why)) => return Err(unavailable(why)),
            None if CuFile::may_go_direct() => return Err(unavailable("cuFile is being opened")),
            None => return Err(unavailable("there is no direct path on this machine: no nvidia-fs, and no NVMe disk")),
        };
        let registered = self.registered(file)?;
        if !registered.is_direct() {
            return Err(unavailable("the file's file system has no transfers past the page cache"));
        }
        if !registered.may_be_on(paths) {
            return Err(unavailable("the file is on a disk that cuFile has no direct path to"));
        }
        Ok(())
    }

    /// Reads from several files into one buffer, calls `begin` with a transfer's number before each call of cuFile for it, and
    /// ends where that fails.
    ///
    /// # Errors
    /// As [`Transport::read`], and those of `begin`.
    pub(crate) fn read_all(
        &self,
        transfers: &[Transfer],
        target: &mut DeviceBuffer,
        lanes: usize,
        begin: impl Fn(usize) -> Result<()> + Sync,
    ) -> Result<()> {
        let mut files = Vec::with_capacity(transfers.len());
        let mut parts: Vec<(usize, Piece)> = Vec::new();
        for (index, transfer) in transfers.iter().enumerate() {
            transfer.check(target)?;
            files.push(self.registered(&transfer.file)?);
            parts.extend(chunks(&transfer.pieces, CHUNK_BYTES).map(|chunk| (index, chunk)));
        }
        let landing = Landing::new(target);
        in_lanes(parts.len(), lanes, |part| {
            let (index, chunk) = &parts[part];
            begin(*index)?;
            let read = landing.read(&files[*index], of(chunk));
            read.map_err(|error| failed(&transfers[*index], chunk, "read", &error))
        })
    }

    /// Writes from several buffers, several threads sharing the work; calls `begin` with a transfer's number before each call of
    /// cuFile for it, and ends where that fails.
    ///
    /// # Errors
    /// As [`Transport::write`], and those of `begin`.
    pub(crate) fn write_all<B: std::borrow::Borrow<DeviceBuffer> + Sync>(
        &self,
        transfers: &[(Transfer, B)],
        lanes: usize,
        begin: impl Fn(usize) -> Result<()> + Sync,
    ) -> Result<()> {
        let mut files = Vec::with_capacity(transfers.len());
        let mut parts: Vec<(usize, Piece)> = Vec::new();
        for (index, (transfer, source)) in transfers.iter().enumerate() {
            transfer.check(source.borrow())?;
            files.push(self.registered(&transfer.file)?);
            parts.extend(chunks(&transfer.pieces, CHUNK_BYTES).map(|chunk| (index, chunk)));
        }
        in_lanes(parts.len(), lanes, |part| {
            let (index, chunk) = &parts[part];
            begin(*index)?;
            let (transfer, source) = &transfers[*index];
            let written = files[*index].write_from(source.borrow(), of(chunk));
            written.map_err(|error| failed(transfer, chunk, "write", &error))
        })
    }

    /// Deregisters files that are closed, which else stay open until another one is registered.
    pub(crate) fn forget_closed(&self) {
        self.0.files.lock().retain(|_, known| known.file.strong_count() > 0);
    }

    /// What is known by now; where a direct path is thinkable and nobody has asked, somebody is sent to ask.
    fn standing_so_far(&self) -> Option<&Standing> {
        let known = self.0.standing.get();
        if known.is_none() && CuFile::may_go_direct() && !self.0.asked.swap(true, Ordering::Relaxed) {
            let route = self.clone();
            let asked = thread::Builder::new().name("alight-cufile".to_string()).spawn(move || {
                route.standing();
            });
            if let Err(error) = asked {
                tracing::info!(%error, "no thread to open cuFile on; other routes serve");
            }
        }
        known
    }

    /// What cuFile is here: the first call in the process opens it.
    fn standing(&self) -> &Standing {
        self.0.standing.get_or_init(|| match CuFile::get() {
            Ok(cufile) => Standing::of(cufile),
            Err(error) => Standing::Unusable(error.to_string()),
        })
    }

    /// A file as cuFile knows it.
    fn registered(&self, file: &OpenFile) -> Result<File> {
        let cufile = match self.standing() {
            Standing::Direct(cufile, _) | Standing::Compatible(cufile) => cufile,
            Standing::Unusable(why) => return Err(unavailable(why)),
        };
        let key = Arc::as_ptr(&file.file).cast::<()>().addr();
        let mut files = self.0.files.lock();
        if let Some(known) = files.get(&key).filter(|known| known.file.strong_count() > 0) {
            return known.registered.clone().map_err(|why| unavailable(&why));
        }
        // A registration keeps its file open: those of files that are closed go when the next one comes.
        files.retain(|_, known| known.file.strong_count() > 0);
        let registered = cufile.register_stored(&*file.file, &file.path).map_err(|error| error.to_string());
        let answer = registered.clone().map_err(|why| unavailable(&why));
        files.insert(key, Known { file: Arc::downgrade(&file.file), registered });
        answer
    }
}

const ON_THE_HOST: &str = "cuFile moves bytes to and from a GPU, and this memory is the host's";

impl Standing {
    fn of(cufile: CuFile) -> Standing {
        match cufile.properties() {
            Ok(properties) if properties.has_direct_path() => Standing::Direct(cufile, properties.direct_paths),
            Ok(properties) if properties.compatibility_allowed => Standing::Compatible(cufile),
            Ok(_) => {
                Standing::Unusable("cuFile has no direct path, and its compatibility mode is forbidden".to_string())
            }
            Err(error) => Standing::Unusable(error.to_string()),
        }
    }
}

fn unavailable(why: &str) -> Error {
    Error::RouteUnavailable { route: Route::CuFile.name(), why: why.to_string() }
}

impl Transport for CuFileTransport {
    fn route(&self) -> Route {
        Route::CuFile
    }

    fn is_preferred(&self, file: &OpenFile, device: &Device) -> bool {
        self.check_direct(file, device).is_ok()
    }

    fn serves(&self, file: &OpenFile, device: &Device) -> Result<()> {
        if device.is_host() {
            return Err(unavailable(ON_THE_HOST));
        }
        self.registered(file).map(drop)
    }

    fn read(&self, transfer: &Transfer, target: &mut DeviceBuffer) -> Result<()> {
        let lanes = transfer.lanes;
        self.read_all(std::slice::from_ref(transfer), target, lanes, |_| transfer.check_wanted(IoOperation::Read))
    }

    fn write(&self, transfer: &Transfer, source: &DeviceBuffer) -> Result<()> {
        let lanes = transfer.lanes;
        self.write_all(&[(transfer.clone(), source)], lanes, |_| transfer.check_wanted(IoOperation::Write))
    }
}

/// A piece in cuFile's own terms.
fn of(piece: &Piece) -> cufile::Transfer {
    let Piece { file_offset, buffer_offset, len_bytes } = *piece;
    cufile::Transfer { file_offset, buffer_offset, len_bytes }
}

/// What a failure of cuFile means to who chooses routes.
fn failed(transfer: &Transfer, piece: &Piece, action: &'static str, error: &cufile::Error) -> Error {
    match *error.kind() {
        ErrorKind::EndOfFile { wanted, got } => {
            too_short(&transfer.file, piece.file_offset + wanted, piece.file_offset + got)
        }
        ErrorKind::Os(code @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EROFS)) => {
            Error::io(action, &transfer.file.path)(std::io::Error::from_raw_os_error(code))
        }
        // Whether it was the disk or cuFile shows on the next route.
        _ => unavailable(&error.to_string()),
    }
}

impl Default for CuFileTransport {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for CuFileTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.standing.get() {
            None => f.write_str("CuFileTransport(not asked for yet)"),
            Some(Standing::Direct(_, paths)) => write!(f, "CuFileTransport(direct: {})", paths.join(", ")),
            Some(Standing::Compatible(_)) => f.write_str("CuFileTransport(compatibility mode)"),
            Some(Standing::Unusable(why)) => write!(f, "CuFileTransport({why})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::cufile::simulated as library;
    use crate::device::simulated_gpu;
    use crate::storage::{FileStorage, OpenMode, Storage};

    const LEN: u64 = (13 << 20) + 777;

    fn bytes(len: u64) -> Vec<u8> {
        (0..len).map(|at| (at * 31 + at / 255) as u8).collect()
    }

    fn open(path: &Path) -> OpenFile {
        OpenFile { file: FileStorage::new().open(path, OpenMode::ReadWrite).unwrap(), path: path.into() }
    }

    fn ground() -> (tempfile::TempDir, PathBuf, OpenFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, bytes(LEN)).unwrap();
        let file = open(&path);
        (folder, path, file)
    }

    fn piece(file_offset: u64, buffer_offset: u64, len_bytes: u64) -> Piece {
        Piece { file_offset, buffer_offset, len_bytes }
    }

    #[test]
    fn pieces_are_moved_by_several_threads_and_short_counts_continued() {
        let (_folder, path, file) = ground();
        let (gpu, route) = (simulated_gpu(), CuFileTransport::over(library::cufile()));
        for (lanes, bytes_max) in [(4, None), (1, Some(1_000_003))] {
            library::set_mood(library::Mood { bytes_max, ..library::Mood::default() });
            let mut buffer = gpu.allocate(LEN + 5).unwrap();
            buffer.copy_from_host(0, &vec![9; LEN as usize + 5]).unwrap();
            let pieces =
                vec![piece(0, 0, 5 << 20), piece(5 << 20, 5 << 20, 100), piece((6 << 20) + 1, 6 << 20, 7 << 20)];
            let transfer = Transfer::of_pieces(file.clone(), pieces).with_lanes(lanes);
            route.read(&transfer, &mut buffer).unwrap();
            let (mut found, content) = (vec![0; LEN as usize + 5], bytes(LEN));
            buffer.copy_to_host(0, &mut found).unwrap();
            assert!(found[..(5 << 20) + 100] == content[..(5 << 20) + 100]);
            assert!(found[(5 << 20) + 100..6 << 20].iter().all(|&byte| byte == 9));
            assert!(found[6 << 20..13 << 20] == content[(6 << 20) + 1..(13 << 20) + 1]);
            assert!(found[13 << 20..].iter().all(|&byte| byte == 9));
            let back = Transfer::new(file.clone(), piece(LEN - 7, 6 << 20, 5 << 20)).with_lanes(lanes);
            route.write(&back, &buffer).unwrap();
            assert!(std::fs::read(&path).unwrap()[LEN as usize - 7..] == found[6 << 20..11 << 20]);
            library::set_mood(library::Mood::default());
            std::fs::write(&path, content).unwrap();
        }
    }

    #[test]
    fn what_another_route_may_do_is_told_from_what_none_can() {
        let (_folder, _path, file) = ground();
        let (gpu, route) = (simulated_gpu(), CuFileTransport::over(library::cufile()));
        let mut buffer = gpu.allocate(8192).unwrap();
        let short = route.read(&Transfer::new(file.clone(), piece(LEN - 100, 0, 8192)), &mut buffer).unwrap_err();
        let (needed, len) = (LEN + 8092, LEN);
        assert!(
            matches!(short, Error::FileTooShort { needed_bytes, len_bytes, .. } if (needed_bytes, len_bytes) == (needed, len)),
            "{short}"
        );
        let whole = Transfer::new(file.clone(), piece(0, 0, 8192));
        let count = |count| library::set_mood(library::Mood { count: Some(count), ..library::Mood::default() });
        count(-5044);
        assert!(matches!(route.read(&whole, &mut buffer), Err(Error::RouteUnavailable { route: "cufile", .. })));
        // The simulated library fails with `ENOSPC`.
        count(-1);
        assert!(route.write(&whole, &buffer).unwrap_err().is_no_space());
        let outside = Transfer::new(file, piece(0, 1, 8192));
        assert!(matches!(route.read(&outside, &mut buffer), Err(Error::Device { .. })));
    }

    #[test]
    fn a_file_is_registered_once_while_it_is_open_and_a_refusal_has_its_reason() {
        let (folder, path, file) = ground();
        let (gpu, route) = (simulated_gpu(), CuFileTransport::over(library::cufile()));
        let host = route.serves(&file, &Device::host()).unwrap_err();
        assert!(host.to_string().contains("host"), "{host}");
        route.serves(&file, &gpu).unwrap();
        route.serves(&file, &gpu).unwrap();
        assert_eq!(route.0.files.lock().len(), 1);
        let refusal = crate::cufile::sys_error(5027);
        library::set_mood(library::Mood { refuse: Some(("handle_register", refusal)), ..library::Mood::default() });
        std::fs::write(folder.path().join("other"), "x").unwrap();
        let other = open(&folder.path().join("other"));
        for _ in 0..2 {
            let refused = route.serves(&other, &gpu).unwrap_err();
            assert!(matches!(&refused, Error::RouteUnavailable { why, .. } if why.contains("5027")), "{refused}");
        }
        drop(other);
        route.forget_closed();
        assert_eq!(route.0.files.lock().len(), 1);
        drop(file);
        route.serves(&open(&path), &gpu).unwrap();
        assert_eq!(route.0.files.lock().len(), 1, "files that are closed are not kept");
        let simulated = crate::io::fixtures::disk(10);
        let nameless = route.serves(&crate::io::fixtures::open(&simulated), &gpu).unwrap_err();
        assert!(nameless.to_string().contains("descriptor"), "{nameless}");
    }

    #[test]
    fn it_is_the_best_way_only_with_a_direct_path() {
        let (_folder, _path, file) = ground();
        let gpu = simulated_gpu();
        let compatible = CuFileTransport::over(library::cufile());
        assert!(!compatible.is_preferred(&file, &gpu) && compatible.serves(&file, &gpu).is_ok());
        let direct = CuFileTransport::over(library::cufile_with_direct_path());
        // Where the temporary directory is in memory there is nothing past the page cache.
        assert_eq!(direct.is_preferred(&file, &gpu), file.file.direct());
        assert!(!direct.is_preferred(&file, &Device::host()));
        // Nobody has asked for cuFile, and nothing speaks for it on a machine without a GPU's file system driver.
        let idle = CuFileTransport::new();
        if !CuFile::may_go_direct() {
            assert!(!idle.is_preferred(&file, &gpu) && idle.0.standing.get().is_none());
        }
    }
}
