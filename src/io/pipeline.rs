//! Operations in flight: a bounded number of threads that each carry out one transfer at a time. The pipeline owns what an
//! operation needs, buffer included, from [`submit`](AsyncIoPipeline::submit) to its completion.
//!
//! # Invariants
//! - Every request that was handed over has exactly one [`Completion`], which brings its buffer back: to its callback where
//!   it has one, else to whoever waits.
//! - No more than `in_flight_max` operations run, and no more than `waiting_max` wait; who brings more waits.
//! - Dropping the pipeline blocks for nothing: what has not begun completes as cancelled, what runs finishes on its thread
//!   and completes then.
//! - A panic in an operation or a callback is that operation's failure; the thread goes on.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use super::transport::{IoOperation, Transfer};
use crate::device::DeviceBuffer;
use crate::error::{Error, Result};

/// The buffer of an operation: owned by it, or shared with it.
#[derive(Debug)]
pub enum Memory {
    /// The operation's own until it completes.
    Owned(DeviceBuffer),
    /// To be read alone; others may read it meanwhile.
    Shared(Arc<DeviceBuffer>),
    /// To be read, or written where nobody else reads it meanwhile.
    Locked(Arc<RwLock<DeviceBuffer>>),
}

impl Memory {
    /// The buffer, where it came as [`Memory::Owned`].
    pub fn into_owned(self) -> Option<DeviceBuffer> {
        match self {
            Memory::Owned(buffer) => Some(buffer),
            Memory::Shared(_) | Memory::Locked(_) => None,
        }
    }
}

/// What is called with an operation's completion, on a thread of the pipeline or on the one that closes it. It must not
/// block for long, and must not submit to its own pipeline but with [`AsyncIoPipeline::submit_until`].
pub type Callback = Box<dyn FnOnce(Completion) + Send>;

/// An operation to be carried out.
pub struct IoRequest {
    operation: IoOperation,
    transfer: Transfer,
    memory: Memory,
    callback: Option<Callback>,
}

impl IoRequest {
    /// Reads a transfer into a buffer.
    pub fn read(transfer: Transfer, target: DeviceBuffer) -> Self {
        Self { operation: IoOperation::Read, transfer, memory: Memory::Owned(target), callback: None }
    }

    /// Writes a transfer from a buffer.
    pub fn write(transfer: Transfer, source: Memory) -> Self {
        Self { operation: IoOperation::Write, transfer, memory: source, callback: None }
    }

    /// Has the completion brought to a callback instead of to whoever waits.
    #[must_use]
    pub fn with_callback(mut self, callback: impl FnOnce(Completion) + Send + 'static) -> Self {
        self.callback = Some(Box::new(callback));
        self
    }
}

/// Names an operation of one pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// The operation that ended.
    pub id: RequestId,
    /// What it did.
    pub operation: IoOperation,
    /// Its buffer.
    pub memory: Memory,
    /// The bytes that it moved, all that were asked for, or why it failed.
    pub result: Result<u64>,
}

/// What carries out the operations of a pipeline. Blocks until one is done.
pub trait Execute: Send + Sync {
    /// Carries out one operation; answers the bytes that it moved.
    ///
    /// # Errors
    /// Whatever the route says.
    fn execute(&self, operation: IoOperation, transfer: &Transfer, memory: &mut Memory) -> Result<u64>;

    /// Told when a transfer that is being carried out missed its deadline.
    fn missed_deadline(&self, _transfer: &Transfer) {}
}

/// Operations in flight. See the module's page for what it promises.
pub struct AsyncIoPipeline {
    shared: Arc<Shared>,
}

struct Shared {
    executor: Arc<dyn Execute>,
    in_flight_max: usize,
    waiting_max: usize,
    state: Mutex<State>,
    /// Told to one worker for every request, and to all at the end.
    work: Condvar,
    /// Told when a request leaves the queue, and at the end.
    room: Condvar,
    /// Told when an operation has completed.
    completed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(RequestId, IoRequest)>,
    done: VecDeque<Completion>,
    running: usize,
    workers: usize,
    workers_idle: usize,
    /// Completions on their way: taken out of the queues, not yet delivered.
    delivering: usize,
    next_id: u64,
    waits: u64,
    closed: bool,
}

impl State {
    fn outstanding(&self) -> usize {
        self.waiting.len() + self.running + self.delivering
    }
}

impl AsyncIoPipeline {
    /// A pipeline that runs up to `in_flight_max` operations at once and lets `waiting_max` more wait. Threads are started
    /// as they are needed and kept.
    ///
    /// # Panics
    /// If either is zero.
    pub fn new(executor: Arc<dyn Execute>, in_flight_max: usize, waiting_max: usize) -> Self {
        assert!(
            in_flight_max > 0 && waiting_max > 0,
            "a pipeline that takes nothing would make everyone wait for ever"
        );
        let (state, work, room, completed) = Default::default();
        Self { shared: Arc::new(Shared { executor, in_flight_max, waiting_max, state, work, room, completed }) }
    }

    /// Hands an operation over. Blocks while as many wait as may.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once the pipeline is closed; the request has completed with the same then.
    pub fn submit(&self, request: IoRequest) -> Result<RequestId> {
        self.submit_until(request, None)
    }

    /// [`submit`](Self::submit) that waits no longer than until a moment.
    ///
    /// # Errors
    /// [`Error::Timeout`] where there was no room until then, and as [`submit`](Self::submit). The request has completed
    /// with the same error then.
    pub fn submit_until(&self, request: IoRequest, until: Option<Instant>) -> Result<RequestId> {
        let mut state = self.shared.state.lock();
        let began = Instant::now();
        let id = RequestId(state.next_id);
        state.next_id += 1;
        let mut waited = false;
        while state.waiting.len() >= self.shared.waiting_max && !state.closed {
            state.waits += u64::from(!waited);
            waited = true;
            match until {
                None => self.shared.room.wait(&mut state),
                Some(until) => {
                    if self.shared.room.wait_until(&mut state, until).timed_out()
                        && state.waiting.len() >= self.shared.waiting_max
                    {
                        return self.refuse(state, id, request, |operation, path| {
                            let after_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                            Error::Timeout { operation, path, after_ms }
                        });
                    }
                }
            }
        }
        if state.closed {
            return self.refuse(state, id, request, |operation, path| Error::Cancelled { operation, path });
        }
        state.waiting.push_back((id, request));
        let mut failed = None;
        if state.workers_idle < state.waiting.len() && state.workers < self.shared.in_flight_max {
            failed = self.start_worker(&mut state);
        }
        drop(state);
        self.shared.work.notify_one();
        if let Some((completion, callback)) = failed {
            self.shared.deliver(completion, callback);
        }
        Ok(id)
    }

    /// Completes a request that was not taken, and answers why.
    fn refuse(
        &self,
        mut state: MutexGuard<'_, State>,
        id: RequestId,
        request: IoRequest,
        why: impl Fn(&'static str, std::path::PathBuf) -> Error,
    ) -> Result<RequestId> {
        let why = || why(request.operation.verb(), request.transfer.file.path.to_path_buf());
        let (answer, result) = (why(), Err(why()));
        state.delivering += 1;
        drop(state);
        let completion = Completion { id, operation: request.operation, memory: request.memory, result };
        self.shared.deliver(completion, request.callback);
        Err(answer)
    }

    /// Starts a worker. Where the system gives no thread the workers that there are do its part; where there are none, the
    /// request that was just queued fails: its completion is to be delivered.
    fn start_worker(&self, state: &mut State) -> Option<(Completion, Option<Callback>)> {
        let shared = Arc::clone(&self.shared);
        let error = match thread::Builder::new().name("alight-io".into()).spawn(move || shared.work()) {
            Ok(_) => {
                state.workers += 1;
                return None;
            }
            Err(error) => error,
        };
        tracing::warn!(%error, "no thread for an operation");
        if state.workers > 0 {
            return None;
        }
        let (id, IoRequest { operation, transfer, memory, callback }) = state.waiting.pop_back()?;
        state.delivering += 1;
        let result = Err(Error::io("start a thread for", &transfer.file.path)(error));
        Some((Completion { id, operation, memory, result }, callback))
    }

    /// The next completion that has no callback, in the order in which operations ended. Blocks while operations are
    /// outstanding; `None` once none is.
    pub fn wait_one(&self) -> Option<Completion> {
        self.wait_until(None)
    }

    /// [`wait_one`](Self::wait_one) that gives up after a while; `None` then too.
    pub fn wait_one_for(&self, patience: Duration) -> Option<Completion> {
        self.wait_until(Instant::now().checked_add(patience))
    }

    fn wait_until(&self, until: Option<Instant>) -> Option<Completion> {
        let mut state = self.shared.state.lock();
        loop {
            if let Some(completion) = state.done.pop_front() {
                return Some(completion);
            }
            if state.outstanding() == 0 {
                return None;
            }
            match until {
                None => self.shared.completed.wait(&mut state),
                Some(until) => {
                    if self.shared.completed.wait_until(&mut state, until).timed_out() {
                        return state.done.pop_front();
                    }
                }
            }
        }
    }

    /// Waits until nothing is outstanding, callbacks included; answers the completions that had none.
    pub fn drain(&self) -> Vec<Completion> {
        let mut state = self.shared.state.lock();
        while state.outstanding() > 0 {
            self.shared.completed.wait(&mut state);
        }
        state.done.drain(..).collect()
    }

    /// Operations that were handed over and have not completed.
    pub fn outstanding(&self) -> usize {
        self.shared.state.lock().outstanding()
    }

    /// How often [`submit`](Self::submit) had to wait for room.
    pub fn waits(&self) -> u64 {
        self.shared.state.lock().waits
    }

    /// Takes no more requests and cancels those that have not begun; their completions are delivered before it returns. What
    /// runs goes on.
    pub fn close(&self) {
        self.shared.close();
    }

    /// [`close`](Self::close), then waits for what runs; answers the completions that had no callback.
    pub fn shutdown(self) -> Vec<Completion> {
        self.close();
        self.drain()
    }
}

impl Drop for AsyncIoPipeline {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// One worker's life.
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some((id, request)) = state.waiting.pop_front() {
                state.running += 1;
                self.room.notify_one();
                drop(state);
                let IoRequest { operation, transfer, mut memory, callback } = request;
                let run = || self.executor.execute(operation, &transfer, &mut memory);
                let result = catch_unwind(AssertUnwindSafe(run))
                    .unwrap_or_else(|panic| Err(Error::Panicked { operation: operation.verb(), why: words(&*panic) }));
                let mut locked = self.state.lock();
                locked.running -= 1;
                locked.delivering += 1;
                drop(locked);
                self.deliver(Completion { id, operation, memory, result }, callback);
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.workers_idle += 1;
                self.work.wait(&mut state);
                state.workers_idle -= 1;
            }
        }
    }

    /// Brings a completion, which is counted as being delivered, to where it is awaited.
    fn deliver(&self, completion: Completion, callback: Option<Callback>) {
        let done = match callback {
            None => Some(completion),
            Some(callback) => {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| callback(completion))) {
                    tracing::error!(why = words(&*panic), "a callback ended in a panic");
                }
                None
            }
        };
        let mut state = self.state.lock();
        state.done.extend(done);
        state.delivering -= 1;
        drop(state);
        self.completed.notify_all();
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let cancelled = std::mem::take(&mut state.waiting);
        state.delivering += cancelled.len();
        drop(state);
        self.work.notify_all();
        self.room.notify_all();
        for (id, IoRequest { operation, transfer, memory, callback }) in cancelled {
            let path = transfer.file.path.to_path_buf();
            let result = Err(Error::Cancelled { operation: operation.verb(), path });
            self.deliver(Completion { id, operation, memory, result }, callback);
        }
    }
}

/// What a panic said.
pub(super) fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no words".to_string())
}

impl fmt::Debug for AsyncIoPipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AsyncIoPipeline({} outstanding)", self.outstanding())
    }
}

impl fmt::Debug for IoRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoRequest({} {} bytes)", self.operation.verb(), self.transfer.len_bytes())
    }
}

#[cfg(test)]
mod tests;
