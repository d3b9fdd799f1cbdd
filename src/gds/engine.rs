//! Runs one operation for one waiter, within a deadline. What the context, its readers and its mapped regions share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::config::GdsConfig;
use super::files::Files;
use super::metrics::GdsMetrics;
use super::router::Router;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::pipeline::{AsyncIoPipeline, Completion, Execute, IoRequest, Memory};
use crate::io::transport::{IoOperation, OpenFile, Transfer};

/// What moves bytes for a context.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) config: GdsConfig,
    pub(super) device: Device,
    pub(super) files: Files,
    pub(super) router: Arc<Router>,
    pub(super) metrics: Arc<GdsMetrics>,
    pub(super) pipeline: AsyncIoPipeline,
    pub(super) deadline: Option<Duration>,
    /// The threads of a transfer that somebody waits for.
    pub(super) lanes: usize,
}

/// Where a completion is left for the one who waits for it.
#[derive(Default)]
struct Letterbox {
    completion: Mutex<Option<Completion>>,
    arrived: Condvar,
}

impl Engine {
    /// Reads into a buffer, which is the operation's own until it is done: where it misses its deadline, `target` is left
    /// without bytes.
    pub(super) fn read(&self, transfer: Transfer, target: &mut DeviceBuffer) -> Result<u64> {
        transfer.check(target)?;
        if self.deadline.is_none() {
            let nothing = target.device().allocate(0)?;
            let mut memory = Memory::Owned(std::mem::replace(target, nothing));
            let result = self.router.execute(IoOperation::Read, &transfer, &mut memory);
            *target = memory.into_owned().expect("it was just put in");
            return result;
        }
        let nothing = target.device().allocate(0)?;
        let source = std::mem::replace(target, nothing);
        let (memory, result) =
            self.run(transfer.clone(), IoOperation::Read, |transfer| IoRequest::read(transfer, source));
        if let Some(buffer) = memory.and_then(Memory::into_owned) {
            *target = buffer;
        }
        result
    }

    /// Writes from memory that the operation shares until it is done.
    pub(super) fn write(&self, transfer: Transfer, source: Memory) -> Result<u64> {
        if self.deadline.is_none() {
            let mut source = source;
            return self.router.execute(IoOperation::Write, &transfer, &mut source);
        }
        self.run(transfer, IoOperation::Write, |transfer| IoRequest::write(transfer, source)).1
    }

    /// The length of a file.
    pub(super) fn len_bytes(&self, file: &OpenFile) -> Result<u64> {
        file.file.facts().map(|facts| facts.len_bytes).map_err(Error::io("ask for the length of", &file.path))
    }

    /// Runs an operation on the pipeline and waits for it; the memory comes back unless the deadline was missed.
    fn run(
        &self,
        transfer: Transfer,
        operation: IoOperation,
        request: impl FnOnce(Transfer) -> IoRequest,
    ) -> (Option<Memory>, Result<u64>) {
        let began = Instant::now();
        let until = self.deadline.and_then(|deadline| began.checked_add(deadline));
        let letterbox = Arc::new(Letterbox::default());
        let request = request(transfer.clone()).with_callback({
            let letterbox = Arc::clone(&letterbox);
            move |completion| {
                *letterbox.completion.lock() = Some(completion);
                letterbox.arrived.notify_one();
            }
        });
        let waits = self.pipeline.waits();
        // A request that is refused completes all the same.
        let submitted = self.pipeline.submit_until(request, until);
        if self.pipeline.waits() > waits {
            self.metrics.count_buffer_wait();
        }
        if matches!(submitted, Err(Error::Timeout { .. })) {
            self.metrics.count_timeout();
        }
        match letterbox.wait(Duration::from_micros(self.config.poll_interval_us), until) {
            Some(Completion { memory, result, .. }) => (Some(memory), result),
            None => {
                transfer.progress.abandon();
                self.router.missed_deadline(&transfer);
                let after_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let path = transfer.file.path.to_path_buf();
                (None, Err(Error::Timeout { operation: operation.verb(), path, after_ms }))
            }
        }
    }
}

impl Letterbox {
    /// Asks again and again for a while, then sleeps until something arrives or it is too late.
    fn wait(&self, poll: Duration, until: Option<Instant>) -> Option<Completion> {
        let began = Instant::now();
        while began.elapsed() < poll {
            if let Some(completion) = self.completion.try_lock().and_then(|mut completion| completion.take()) {
                return Some(completion);
            }
            std::hint::spin_loop();
        }
        let mut completion = self.completion.lock();
        loop {
            if let Some(completion) = completion.take() {
                return Some(completion);
            }
            match until {
                None => self.arrived.wait(&mut completion),
                Some(until) => {
                    if self.arrived.wait_until(&mut completion, until).timed_out() {
                        return completion.take();
                    }
                }
            }
        }
    }
}
