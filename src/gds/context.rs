//! The module's front: plain files to device memory and back, with a deadline for every operation.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::config::GdsConfig;
use super::engine::Engine;
use super::files::Files;
use super::mapping::MemoryMapManager;
use super::metrics::{GdsMetrics, PerformanceStatus, PerformanceTargets};
use super::reader::PrefetchReader;
use super::router::{RouteStatus, Router};
use crate::config::READ_THREADS_MAX;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::buffered::BufferedTransport;
use crate::io::direct::CuFileTransport;
use crate::io::double_buffer::{DoubleBufferManager, StreamChunk};
use crate::io::lanes::lanes_for;
use crate::io::pipeline::{AsyncIoPipeline, Execute, Memory};
use crate::io::retry::ErrorRecovery;
use crate::io::staged::StagedTransport;
use crate::io::transport::{Piece, Route, Transfer, Transport};
use crate::storage::{FileStorage, Storage};

/// How long an operation may take when nothing else is asked for: far longer than any healthy disk.
const DEADLINE: Duration = Duration::from_secs(30);

/// Moves bytes between plain files and the memory of one device.
///
/// A handle: cloning it is free, and it may be used from every thread. Threads, buffers and open files are made as they are
/// needed and kept until the last handle is dropped.
///
/// An operation in flight owns its memory. One that misses its deadline is reported as [`Error::Timeout`], and its route
/// rests for a while; the buffer stays with the operation until the hardware is done, so a target that was being read into
/// is then left without bytes.
///
/// ```
/// use alight::Device;
/// use alight::gds::{GdsConfig, GdsContext, Piece};
///
/// # let folder = tempfile::tempdir().expect("a temporary folder");
/// # let path = folder.path().join("weights.bin");
/// # std::fs::write(&path, [7; 10_000]).expect("a file");
/// let gds = GdsContext::on(Device::best(), GdsConfig::low_latency())?;
/// let mut buffer = gds.device().allocate(1000)?;
/// let piece = Piece { file_offset: 9000, buffer_offset: 0, len_bytes: 1000 };
/// assert_eq!(gds.read_to_gpu(&path, piece, &mut buffer)?, 1000);
/// let mut bytes = [0; 1000];
/// buffer.copy_to_host(0, &mut bytes)?;
/// assert_eq!(bytes, [7; 1000]);
/// # Ok::<(), alight::Error>(())
/// ```
#[derive(Clone)]
pub struct GdsContext(Arc<Inner>);

struct Inner {
    engine: Arc<Engine>,
    regions: MemoryMapManager,
    /// Pairs of buffers that no stream uses now.
    streams: Mutex<Vec<DoubleBufferManager>>,
}

/// Makes a [`GdsContext`] with other parts than the usual ones.
#[derive(Debug)]
pub struct GdsBuilder {
    config: GdsConfig,
    device: Option<Device>,
    storage: Arc<dyn Storage>,
    transports: Vec<Arc<dyn Transport>>,
    first: Option<Route>,
    only: Option<Route>,
    recovery: Option<ErrorRecovery>,
    deadline: Option<Duration>,
}

impl GdsBuilder {
    /// On this device instead of the GPU that the configuration names.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// How long an operation may take; `None` lets it take for ever, and saves the hand-over to another thread.
    #[must_use]
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// What to do when a transfer fails.
    #[must_use]
    pub fn recovery(mut self, recovery: ErrorRecovery) -> Self {
        self.recovery = Some(recovery);
        self
    }

    /// A route that is better than those of the builder so far; the last that is given is tried first, also before cuFile.
    #[must_use]
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transports.insert(0, transport);
        self
    }

    /// This route before all others; they still serve what it cannot. Without it cuFile comes first where it has a direct
    /// path to the file, and after the staged route where it has none.
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.first = Some(route);
        self
    }

    /// This route and no other: what it cannot serve fails with [`Error::RouteUnavailable`].
    #[must_use]
    pub fn only(mut self, route: Route) -> Self {
        self.only = Some(route);
        self
    }

    /// Another file system than the machine's.
    #[doc(hidden)]
    #[must_use]
    pub fn storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.storage = storage;
        self
    }

    /// The context.
    ///
    /// # Errors
    /// As [`GdsContext::new`].
    pub fn build(self) -> Result<GdsContext> {
        let Self { config, device, storage, transports, first, only, recovery, deadline } = self;
        config.validate()?;
        let device = device.map_or_else(|| Device::cuda(config.gpu_device), Ok)?;
        let mut routes: Vec<(Arc<dyn Transport>, bool)> = transports.into_iter().map(|own| (own, true)).collect();
        let wanted = |route| first == Some(route) || only == Some(route);
        routes.push((Arc::new(StagedTransport::new()), false));
        // The host's memory is none of cuFile's: who asks for it there is told so.
        if !device.is_host() || wanted(Route::CuFile) {
            routes.push((Arc::new(CuFileTransport::new()), false));
        }
        if config.mmap_fallback || wanted(Route::Buffered) {
            routes.push((Arc::new(BufferedTransport::new()), false));
        }
        if let Some(first) = first {
            routes.iter_mut().for_each(|(transport, chosen)| *chosen |= transport.route() == first);
            routes.sort_by_key(|(transport, _)| transport.route() != first);
        }
        if let Some(only) = only {
            routes.retain(|(transport, _)| transport.route() == only);
        }
        let recovery = recovery.unwrap_or_else(|| ErrorRecovery::new(3, config.mmap_fallback));
        let metrics = Arc::new(GdsMetrics::default());
        let router = Arc::new(Router::new(routes, recovery, Arc::clone(&metrics)));
        let executor: Arc<dyn Execute> = Arc::clone(&router) as Arc<dyn Execute>;
        let waiting = if config.batch_mode { config.max_batch_size } else { 1 };
        let pipeline = AsyncIoPipeline::new(executor, config.max_outstanding_io, waiting);
        let lanes = config.max_outstanding_io.min(lanes_for(READ_THREADS_MAX));
        let files = Files::new(storage);
        let engine = Arc::new(Engine { config, device, files, router, metrics, pipeline, deadline, lanes });
        let regions = MemoryMapManager::new(Arc::clone(&engine));
        Ok(GdsContext(Arc::new(Inner { engine, regions, streams: Mutex::default() })))
    }
}

impl GdsContext {
    /// A context on the GPU that the configuration names.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a configuration that makes no sense, [`Error::Device`] where the GPU cannot be used.
    pub fn new(config: GdsConfig) -> Result<Self> {
        Self::builder(config).build()
    }

    /// A context on a device, the host included.
    ///
    /// # Errors
    /// [`Error::InvalidOption`].
    pub fn on(device: Device, config: GdsConfig) -> Result<Self> {
        Self::builder(config).device(device).build()
    }

    /// A context with other parts than the usual ones.
    pub fn builder(config: GdsConfig) -> GdsBuilder {
        GdsBuilder {
            config,
            device: None,
            storage: Arc::new(FileStorage::new()),
            transports: Vec::new(),
            first: None,
            only: None,
            recovery: None,
            deadline: Some(DEADLINE),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &GdsConfig {
        &self.0.engine.config
    }

    /// The device whose memory is filled.
    pub fn device(&self) -> &Device {
        &self.0.engine.device
    }

    /// The length of a file in bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn len_bytes(&self, path: impl AsRef<Path>) -> Result<u64> {
        self.0.engine.len_bytes(&self.0.engine.files.to_read(path.as_ref())?)
    }

    /// Reads a piece of a file into a buffer. Blocks until every byte is there; answers their number.
    ///
    /// The file stays open for the next call: one that was replaced under its name is seen after
    /// [`forget`](Self::forget).
    ///
    /// # Errors
    /// [`Error::Io`], also within [`Error::RetriesExhausted`]; [`Error::FileTooShort`]; [`Error::Device`] where the piece lies
    /// outside the buffer. The piece of the buffer is then unspecified. [`Error::Timeout`]: `target` is then left without
    /// bytes, since the operation has them.
    pub fn read_to_gpu(&self, path: impl AsRef<Path>, piece: Piece, target: &mut DeviceBuffer) -> Result<u64> {
        let engine = &self.0.engine;
        let file = engine.files.to_read(path.as_ref())?;
        engine.read(Transfer::new(file, piece).with_lanes(engine.lanes), target)
    }

    /// Reads many pieces of one file into one buffer. In batch mode up to `max_batch_size` of them are one operation, of which
    /// neighbours are one read; otherwise they are read one after another.
    ///
    /// # Errors
    /// As [`read_to_gpu`](Self::read_to_gpu); the pieces before the one that failed may or may not be there.
    pub fn read_batch(&self, path: impl AsRef<Path>, pieces: &[Piece], target: &mut DeviceBuffer) -> Result<u64> {
        let engine = &self.0.engine;
        let file = engine.files.to_read(path.as_ref())?;
        pieces.chunks(self.batch()).try_fold(0, |done, batch| {
            let transfer = Transfer::of_pieces(file.clone(), batch.to_vec()).with_lanes(engine.lanes);
            engine.read(transfer, target).map(|bytes| done + bytes)
        })
    }

    /// Writes a piece of a buffer to a file, which is made where it does not exist and keeps its other bytes where it does.
    /// Blocks until every byte is written; answers their number. It is durable after [`sync`](Self::sync).
    ///
    /// The buffer is shared with the operation, which may outlive the call where it misses its deadline.
    ///
    /// # Errors
    /// [`Error::Io`], also within [`Error::RetriesExhausted`]; [`Error::Device`] where the piece lies outside the buffer;
    /// [`Error::Timeout`]. What of the piece was written is then unknown.
    pub fn write_from_gpu(&self, path: impl AsRef<Path>, piece: Piece, source: &Arc<DeviceBuffer>) -> Result<u64> {
        self.write_batch(path, &[piece], source)
    }

    /// Writes many pieces of one buffer to one file, batched like [`read_batch`](Self::read_batch).
    ///
    /// # Errors
    /// As [`write_from_gpu`](Self::write_from_gpu).
    pub fn write_batch(&self, path: impl AsRef<Path>, pieces: &[Piece], source: &Arc<DeviceBuffer>) -> Result<u64> {
        let engine = &self.0.engine;
        let file = engine.files.to_write(path.as_ref())?;
        pieces.chunks(self.batch()).try_fold(0, |done, batch| {
            let transfer = Transfer::of_pieces(file.clone(), batch.to_vec()).with_lanes(engine.lanes);
            transfer.check(source)?;
            engine.write(transfer, Memory::Shared(Arc::clone(source))).map(|bytes| done + bytes)
        })
    }

    /// Makes what was written to a file durable, its name included. Never tried again: after a failure the system may have
    /// dropped what it could not write, so write it again before the next sync.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self, path: impl AsRef<Path>) -> Result<()> {
        let files = &self.0.engine.files;
        let (file, _) = files.to_change(path.as_ref())?;
        files.sync(&file)?;
        files.sync_name(path.as_ref())
    }

    /// Reads a range of a file through buffers of `buffer_size` on the device and hands each stretch to `process`, in order
    /// and exactly once; with `double_buffering` the next one is read meanwhile. Answers the bytes handed over: all of them.
    ///
    /// `process` sees the bytes only while it runs: a kernel that it starts on them must have finished when it returns. It
    /// may use the context, also for another stream.
    ///
    /// # Errors
    /// The first of `process`, or of reading, in the order of the file; after it `process` is not called again.
    pub fn stream_read(
        &self,
        path: impl AsRef<Path>,
        range: Range<u64>,
        process: impl FnMut(StreamChunk<'_>) -> Result<()>,
    ) -> Result<u64> {
        let file = self.0.engine.files.to_read(path.as_ref())?;
        self.with_stream(|stream| stream.overlapped_read(&file, range, process))
    }

    /// Writes a range of a file through buffers on the device: `fill` gets a buffer, the stretch's place in the file and its
    /// length, in order; with `double_buffering` the stretch before is written meanwhile. Answers the bytes written.
    ///
    /// # Errors
    /// Those of `fill` and of writing. How much was written is then unknown.
    pub fn stream_write(
        &self,
        path: impl AsRef<Path>,
        range: Range<u64>,
        fill: impl FnMut(&mut DeviceBuffer, u64, u64) -> Result<()>,
    ) -> Result<u64> {
        let file = self.0.engine.files.to_write(path.as_ref())?;
        self.with_stream(|stream| stream.overlapped_write(&file, range, fill))
    }

    /// A reader of one file that fetches ahead of what is read. Takes up to `prefetch_slots` buffers of `buffer_size` on
    /// the device, as it needs them.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be opened.
    pub fn reader(&self, path: impl AsRef<Path>) -> Result<PrefetchReader> {
        let file = self.0.engine.files.to_read(path.as_ref())?;
        PrefetchReader::new(Arc::clone(&self.0.engine), file)
    }

    /// The mapped regions of this context.
    pub fn regions(&self) -> &MemoryMapManager {
        &self.0.regions
    }

    /// Keeps a file open no longer, so that the next call opens whatever bears its name then.
    pub fn forget(&self, path: impl AsRef<Path>) {
        self.0.engine.files.forget(path.as_ref());
    }

    /// The routes, the best first, and which of them rest.
    pub fn routes(&self) -> Vec<RouteStatus> {
        self.0.engine.router.status()
    }

    /// What was done so far.
    pub fn metrics(&self) -> Arc<GdsMetrics> {
        Arc::clone(&self.0.engine.metrics)
    }

    /// Whether the targets of the specification are met, over the time in which something was read or written.
    pub fn performance_status(&self) -> PerformanceStatus {
        self.0.engine.metrics.check_targets_while_busy(&PerformanceTargets::default())
    }

    fn batch(&self) -> usize {
        let config = self.config();
        if config.batch_mode { config.max_batch_size } else { 1 }
    }

    /// Lends a pair of buffers. One whose transfer is stuck is not lent again.
    fn with_stream<T>(&self, stream: impl FnOnce(&mut DoubleBufferManager) -> Result<T>) -> Result<T> {
        let engine = &self.0.engine;
        let idle = self.0.streams.lock().pop();
        let mut buffers = match idle {
            Some(buffers) => buffers,
            None => DoubleBufferManager::new(
                &engine.device,
                Arc::clone(&engine.router) as Arc<dyn Execute>,
                (engine.config.buffer_count(), engine.config.buffer_size),
                engine.lanes,
                engine.deadline,
            )?,
        };
        let answer = stream(&mut buffers);
        let mut streams = self.0.streams.lock();
        // One pair is kept: another costs an allocation, and who streams two files at once has the time.
        if streams.is_empty() && !matches!(answer, Err(Error::Timeout { .. } | Error::Panicked { .. })) {
            streams.push(buffers);
        }
        answer
    }
}

impl fmt::Debug for GdsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GdsContext(on {}, {:?})", self.device(), self.config())
    }
}
