//! Chooses the route of every transfer and carries it out: the best that can serve and has not been late, tried again
//! where time can heal, and the next one where the route itself was the trouble.
//!
//! # Invariants
//! - Every transfer is counted once: for the route that served it, or as a failure.
//! - A route that missed a deadline rests; it is taken again before its rest is over only where no other can serve.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::metrics::GdsMetrics;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::pipeline::{Execute, Memory};
use crate::io::retry::ErrorRecovery;
use crate::io::transport::{IoOperation, Route, Transfer, Transport};

/// How long a route rests after it missed a deadline.
const REST: Duration = Duration::from_secs(60);

/// How a route is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteStatus {
    /// The route.
    pub route: Route,
    /// How many of its transfers missed their deadline.
    pub late: u64,
    /// Whether others are taken before it, since it was late a short while ago.
    pub resting: bool,
}

#[derive(Debug)]
struct Candidate {
    transport: Arc<dyn Transport>,
    late: AtomicU64,
    rests_until: Mutex<Option<Instant>>,
}

impl Candidate {
    fn is_resting(&self) -> bool {
        self.rests_until.lock().is_some_and(|until| Instant::now() < until)
    }
}

/// The routes of a context, the best first.
#[derive(Debug)]
pub(super) struct Router {
    candidates: Vec<Candidate>,
    recovery: ErrorRecovery,
    metrics: Arc<GdsMetrics>,
}

impl Router {
    /// Routes, the best first.
    pub(super) fn new(transports: Vec<Arc<dyn Transport>>, recovery: ErrorRecovery, metrics: Arc<GdsMetrics>) -> Self {
        let candidate = |transport| Candidate { transport, late: AtomicU64::new(0), rests_until: Mutex::new(None) };
        Self { candidates: transports.into_iter().map(candidate).collect(), recovery, metrics }
    }

    pub(super) fn status(&self) -> Vec<RouteStatus> {
        let status = |candidate: &Candidate| RouteStatus {
            route: candidate.transport.route(),
            late: candidate.late.load(Ordering::Relaxed),
            resting: candidate.is_resting(),
        };
        self.candidates.iter().map(status).collect()
    }

    /// Tries one route as often as it makes sense.
    fn take(
        &self,
        route: &dyn Transport,
        operation: IoOperation,
        transfer: &Transfer,
        memory: &mut Memory,
    ) -> Result<()> {
        with_device(memory, |device| route.serves(&transfer.file, device))?;
        transfer.progress.take_route(route.route());
        self.recovery.with_retry(|attempt| {
            if attempt > 0 {
                transfer.check_wanted(operation)?;
                self.metrics.count_retry();
            }
            match operation {
                IoOperation::Read => with_target(memory, |target| route.read(transfer, target)),
                IoOperation::Write => with_source(memory, |source| route.write(transfer, source)),
            }
        })
    }
}

impl Execute for Router {
    fn execute(&self, operation: IoOperation, transfer: &Transfer, memory: &mut Memory) -> Result<u64> {
        let len_bytes = transfer.len_bytes();
        if len_bytes == 0 {
            return Ok(0);
        }
        let _busy = self.metrics.begin(operation);
        let began = Instant::now();
        let (resting, rested): (Vec<_>, Vec<_>) = self.candidates.iter().partition(|candidate| candidate.is_resting());
        let mut refused = None;
        for candidate in rested.into_iter().chain(resting) {
            let route = candidate.transport.route();
            match self.take(&*candidate.transport, operation, transfer, memory) {
                Ok(()) => {
                    match operation {
                        IoOperation::Read => self.metrics.record_read(route, len_bytes, began.elapsed()),
                        IoOperation::Write => self.metrics.record_write(route, len_bytes, began.elapsed()),
                    }
                    if self.candidates.first().is_some_and(|first| first.transport.route() != route) {
                        self.metrics.count_fallback();
                    }
                    return Ok(len_bytes);
                }
                Err(error) if self.recovery.should_fall_back(&error) => {
                    tracing::debug!(%error, "taking another route");
                    refused.get_or_insert(error);
                }
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        self.metrics.count_failure();
        let none = || Error::RouteUnavailable { route: "any", why: "there is no route".into() };
        Err(refused.unwrap_or_else(none))
    }

    fn missed_deadline(&self, transfer: &Transfer) {
        self.metrics.count_timeout();
        let Some(route) = transfer.progress.route() else { return };
        for candidate in self.candidates.iter().filter(|candidate| candidate.transport.route() == route) {
            candidate.late.fetch_add(1, Ordering::Relaxed);
            *candidate.rests_until.lock() = Instant::now().checked_add(REST);
            tracing::warn!(%route, path = %transfer.file.path.display(), "a transfer missed its deadline; the route rests");
        }
    }
}

fn with_device<T>(memory: &Memory, then: impl FnOnce(&Device) -> T) -> T {
    match memory {
        Memory::Owned(buffer) => then(buffer.device()),
        Memory::Shared(buffer) => then(buffer.device()),
        Memory::Locked(buffer) => then(buffer.read().device()),
    }
}

fn with_source<T>(memory: &Memory, then: impl FnOnce(&DeviceBuffer) -> T) -> T {
    match memory {
        Memory::Owned(buffer) => then(buffer),
        Memory::Shared(buffer) => then(buffer),
        Memory::Locked(buffer) => then(&buffer.read()),
    }
}

/// Reading needs a buffer that nobody else reads: requests are made so.
fn with_target(memory: &mut Memory, then: impl FnOnce(&mut DeviceBuffer) -> Result<()>) -> Result<()> {
    match memory {
        Memory::Owned(buffer) => then(buffer),
        Memory::Locked(buffer) => then(&mut buffer.write()),
        Memory::Shared(buffer) => Err(Error::Device {
            device: buffer.device().to_string(),
            action: "read into memory",
            why: "the buffer is shared".into(),
        }),
    }
}
