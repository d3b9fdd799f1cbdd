//! Chooses the route of every transfer and carries it out: the best that can serve and has given no trouble, tried again
//! where time can heal, and the next one where the route itself was the trouble.
//!
//! # Invariants
//! - Every transfer is counted once: for the route that served it, or as a failure.
//! - A route that missed a deadline, or failed where the next one served, rests; it is taken again before its rest is over
//!   only where no other can serve.
//! - A step down is logged, once for each route and reason to rest, and counted every time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::metrics::GdsMetrics;
use crate::device::{Device, DeviceBuffer};
use crate::error::{Error, Result};
use crate::io::pipeline::{Execute, Memory};
use crate::io::retry::ErrorRecovery;
use crate::io::transport::{IoOperation, OpenFile, Route, Transfer, Transport};

/// How long a route rests after it missed a deadline or failed.
const REST: Duration = Duration::from_secs(60);

/// How a route is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteStatus {
    /// The route.
    pub route: Route,
    /// How many of its transfers missed their deadline.
    pub late: u64,
    /// Whether others are taken before it, since it was late or failed a short while ago.
    pub resting: bool,
}

#[derive(Debug)]
struct Candidate {
    transport: Arc<dyn Transport>,
    /// Whether the user put it where it is: then none is preferred to it.
    chosen: bool,
    late: AtomicU64,
    /// Whether it was told that it cannot serve.
    told: AtomicBool,
    rests_until: Mutex<Option<Instant>>,
}

impl Candidate {
    fn is_resting(&self) -> bool {
        self.rests_until.lock().is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        *self.rests_until.lock() = Instant::now().checked_add(REST);
    }

    /// Says that another route is taken: aloud the first time.
    fn tell(&self, error: &Error) {
        if self.told.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "taking another route");
        } else {
            tracing::warn!(%error, "taking another route; from here on this is counted and not logged");
        }
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
    /// Routes, the best first; of each, whether its user chose its place.
    pub(super) fn new(
        transports: Vec<(Arc<dyn Transport>, bool)>,
        recovery: ErrorRecovery,
        metrics: Arc<GdsMetrics>,
    ) -> Self {
        let candidate = |(transport, chosen)| {
            let (late, told, rests_until) = Default::default();
            Candidate { transport, chosen, late, told, rests_until }
        };
        Self { candidates: transports.into_iter().map(candidate).collect(), recovery, metrics }
    }

    /// The routes in the order in which they are to be tried for a file on a device, rest or no rest.
    fn in_order(&self, file: &OpenFile, device: &Device) -> Vec<&Candidate> {
        let mut candidates: Vec<&Candidate> = self.candidates.iter().collect();
        // Stable: routes that are alike stay in the order of the builder.
        candidates.sort_by_cached_key(|candidate| !candidate.chosen && !candidate.transport.is_preferred(file, device));
        candidates
    }

    pub(super) fn status(&self) -> Vec<RouteStatus> {
        let status = |candidate: &Candidate| RouteStatus {
            route: candidate.transport.route(),
            late: candidate.late.load(Ordering::Relaxed),
            resting: candidate.is_resting(),
        };
        self.candidates.iter().map(status).collect()
    }

    /// Tries one route that serves as often as it makes sense.
    fn take(
        &self,
        route: &dyn Transport,
        operation: IoOperation,
        transfer: &Transfer,
        memory: &mut Memory,
    ) -> Result<()> {
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
        let candidates = with_device(memory, |device| self.in_order(&transfer.file, device));
        let first_choice = candidates.first().map(|candidate| candidate.transport.route());
        let (resting, rested): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| candidate.is_resting());
        let mut refused = None;
        for candidate in rested.into_iter().chain(resting) {
            let route = candidate.transport.route();
            let serves = with_device(memory, |device| candidate.transport.serves(&transfer.file, device));
            let has_begun = serves.is_ok();
            match serves.and_then(|()| self.take(&*candidate.transport, operation, transfer, memory)) {
                Ok(()) => {
                    match operation {
                        IoOperation::Read => self.metrics.record_read(route, len_bytes, began.elapsed()),
                        IoOperation::Write => self.metrics.record_write(route, len_bytes, began.elapsed()),
                    }
                    if first_choice.is_some_and(|first| first != route) {
                        self.metrics.count_fallback();
                    }
                    return Ok(len_bytes);
                }
                Err(error) if self.recovery.should_fall_back(&error) => {
                    candidate.tell(&error);
                    // It began, and could not: it is not asked again for a while.
                    if has_begun {
                        candidate.rest();
                    }
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
            candidate.rest();
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
