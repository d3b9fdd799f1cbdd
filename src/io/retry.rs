//! What to do when a transfer fails: try again where time can heal it, take another route where that one can serve.
//!
//! It sleeps between attempts on the caller's thread, and decides nothing about which routes there are.
//!
//! # Invariants
//! - A sync that failed is never tried again: the system may have dropped what it could not write.
//! - An operation that missed its deadline is never tried again: it still owns its memory.
//! - The last error is the one that is reported, with the number of attempts.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};

/// The wait before the first retry, doubled before each further one.
const BACKOFF_BASE: Duration = Duration::from_millis(10);

/// No wait is longer.
const BACKOFF_CAP: Duration = Duration::from_secs(1);

type Sleep = dyn Fn(Duration) + Send + Sync;

/// A policy for failed transfers. A clone shares its clock and its randomness.
#[derive(Clone)]
pub struct ErrorRecovery {
    max_retries: u32,
    fallback_enabled: bool,
    base: Duration,
    cap: Duration,
    sleep: Arc<Sleep>,
    random: Arc<AtomicU64>,
}

impl ErrorRecovery {
    /// Tries `max_retries` times again, after 10 ms, 20 ms and so on up to a second, and lets another route serve where
    /// `fallback_enabled`.
    pub fn new(max_retries: u32, fallback_enabled: bool) -> Self {
        Self {
            max_retries,
            fallback_enabled,
            base: BACKOFF_BASE,
            cap: BACKOFF_CAP,
            sleep: Arc::new(std::thread::sleep),
            random: Arc::new(AtomicU64::new(u64::from(std::process::id()))),
        }
    }

    /// Waits `base` before the first retry and never longer than `cap`.
    #[must_use]
    pub fn with_backoff(mut self, base: Duration, cap: Duration) -> Self {
        (self.base, self.cap) = (base, cap);
        self
    }

    /// Waits by calling this instead of sleeping: for tests.
    #[must_use]
    pub fn with_sleep(mut self, sleep: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        self.sleep = Arc::new(sleep);
        self
    }

    /// Calls `operation` until it succeeds, fails for good, or was tried as often as allowed. It is told which attempt it
    /// is, from 0.
    ///
    /// # Errors
    /// What the last attempt said; as [`Error::RetriesExhausted`] where there were several.
    pub fn with_retry<T>(&self, mut operation: impl FnMut(u32) -> Result<T>) -> Result<T> {
        let mut attempt = 0;
        loop {
            let error = match operation(attempt) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if attempt >= self.max_retries || !Self::is_retryable(&error) {
                return Err(match attempt {
                    0 => error,
                    retries => Error::RetriesExhausted { attempts: retries + 1, source: Box::new(error) },
                });
            }
            tracing::debug!(%error, attempt, "trying again");
            (self.sleep)(self.delay(attempt));
            attempt += 1;
        }
    }

    /// Calls `operation`, and `fallback` where that failed in a way that another route can help.
    ///
    /// # Errors
    /// What the one that was called last said.
    pub fn with_fallback<T>(
        &self,
        operation: impl FnOnce() -> Result<T>,
        fallback: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        match operation() {
            Err(error) if self.should_fall_back(&error) => {
                tracing::warn!(%error, "falling back to another route");
                fallback()
            }
            answer => answer,
        }
    }

    /// The wait before the retry that follows this attempt: `base` doubled `attempt` times, at most `cap`, and of that a
    /// random part between half and all, so that many that failed together do not come back together.
    pub fn delay(&self, attempt: u32) -> Duration {
        let whole = self.base.saturating_mul(1u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(self.cap);
        let half = whole / 2;
        // At most a second by default; who asks for centuries gets no more jitter than 2^64 ns.
        let span = u64::try_from((whole - half).as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(self.random() % span.saturating_add(1).max(1))
    }

    /// Whether another attempt may succeed though nobody changed anything: transient answers of the system, and failures
    /// of the device or the link to it. A full disk, a missing file, a short file, a refusal and a failed sync stay.
    pub fn is_retryable(error: &Error) -> bool {
        let Error::Io { action, source, .. } = error else { return false };
        if action.starts_with("sync") {
            return false;
        }
        match source.raw_os_error() {
            Some(code) => matches!(
                code,
                libc::EIO
                    | libc::EAGAIN
                    | libc::EINTR
                    | libc::EBUSY
                    | libc::ENOMEM
                    | libc::ENOBUFS
                    | libc::ETIMEDOUT
                    | libc::ECONNRESET
                    | libc::ENOLINK
            ),
            None => matches!(
                source.kind(),
                io::ErrorKind::Interrupted
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::ResourceBusy
            ),
        }
    }

    /// Whether another route may serve what this error refused: the route itself was the trouble. Device memory that is
    /// used up, or a file that fails, is as missing on every route.
    pub fn should_fall_back(&self, error: &Error) -> bool {
        match error {
            Error::RouteUnavailable { .. } => self.fallback_enabled,
            Error::RetriesExhausted { source, .. } => self.should_fall_back(source),
            _ => false,
        }
    }

    /// A number that looks random (SplitMix64).
    fn random(&self) -> u64 {
        let state = self.random.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

impl Default for ErrorRecovery {
    /// Three retries, and fallback.
    fn default() -> Self {
        Self::new(3, true)
    }
}

impl fmt::Debug for ErrorRecovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { max_retries, fallback_enabled, base, cap, .. } = self;
        write!(f, "ErrorRecovery({max_retries} retries, {base:?} to {cap:?}, fallback {fallback_enabled})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::path::PathBuf;

    fn os(action: &'static str, code: i32) -> Error {
        Error::Io { action, path: PathBuf::from("f"), source: io::Error::from_raw_os_error(code) }
    }

    fn recovery(retries: u32) -> (ErrorRecovery, Arc<Mutex<Vec<Duration>>>) {
        let slept = Arc::new(Mutex::new(vec![]));
        let log = Arc::clone(&slept);
        (ErrorRecovery::new(retries, true).with_sleep(move |time| log.lock().push(time)), slept)
    }

    #[test]
    fn what_heals_is_tried_again_after_growing_waits() {
        let (recovery, slept) = recovery(5);
        let answer = recovery.with_retry(|attempt| if attempt < 4 { Err(os("read", libc::EIO)) } else { Ok(attempt) });
        assert_eq!(answer.unwrap(), 4);
        let slept = slept.lock();
        assert_eq!(slept.len(), 4);
        for (attempt, time) in slept.iter().enumerate() {
            let whole = Duration::from_millis(10 << attempt);
            assert!((whole / 2..=whole).contains(time), "{attempt}: {time:?}");
        }
    }

    #[test]
    fn the_attempts_are_in_the_error_and_a_single_one_is_plain() {
        let (recovery, slept) = recovery(3);
        let error = recovery.with_retry(|_| Err::<(), _>(os("write", libc::EIO))).unwrap_err();
        assert!(
            matches!(&error, Error::RetriesExhausted { attempts: 4, source } if matches!(**source, Error::Io { .. }))
        );
        assert!(error.to_string().ends_with("(4 attempts)") && std::error::Error::source(&error).is_some());
        assert_eq!(slept.lock().len(), 3);
        let error = recovery.with_retry(|_| Err::<(), _>(os("write", libc::ENOSPC))).unwrap_err();
        assert!(matches!(error, Error::Io { .. }));
        let once = ErrorRecovery::new(0, true).with_retry(|_| Err::<(), _>(os("read", libc::EIO))).unwrap_err();
        assert!(matches!(once, Error::Io { .. }));
        assert_eq!(slept.lock().len(), 3, "what cannot heal is not waited for");
    }

    #[test]
    fn a_second_failure_of_another_kind_ends_it() {
        let (recovery, _) = recovery(9);
        let error = recovery
            .with_retry(|n| Err::<(), _>(os("read", if n == 0 { libc::EIO } else { libc::ENOENT })))
            .unwrap_err();
        assert!(matches!(error, Error::RetriesExhausted { attempts: 2, .. }), "{error}");
    }

    #[test]
    fn only_what_can_heal_is_tried_again() {
        for code in [libc::EIO, libc::EAGAIN, libc::EINTR, libc::ETIMEDOUT] {
            assert!(ErrorRecovery::is_retryable(&os("read", code)));
            assert!(!ErrorRecovery::is_retryable(&os("sync", code)), "a failed sync is final");
        }
        for code in [libc::ENOENT, libc::EACCES, libc::ENOSPC, libc::EDQUOT, libc::EINVAL, libc::EROFS, libc::EBADF] {
            assert!(!ErrorRecovery::is_retryable(&os("read", code)), "{code}");
        }
        let path = PathBuf::from("f");
        assert!(!ErrorRecovery::is_retryable(&Error::Timeout { operation: "read", path: path.clone(), after_ms: 1 }));
        assert!(!ErrorRecovery::is_retryable(&Error::FileTooShort { path, needed_bytes: 2, len_bytes: 1 }));
        assert!(!ErrorRecovery::is_retryable(&Error::Closed));
    }

    #[test]
    fn waits_are_capped_and_never_overflow() {
        let recovery = ErrorRecovery::default();
        for attempt in [7, 31, 32, 33, 64, u32::MAX] {
            let delay = recovery.delay(attempt);
            assert!((BACKOFF_CAP / 2..=BACKOFF_CAP).contains(&delay), "{attempt}: {delay:?}");
        }
        let long = ErrorRecovery::default().with_backoff(Duration::MAX, Duration::MAX);
        assert!(long.delay(u32::MAX) >= Duration::MAX / 2);
        let none = ErrorRecovery::default().with_backoff(Duration::ZERO, Duration::ZERO);
        assert_eq!(none.delay(3), Duration::ZERO);
        let delays: std::collections::BTreeSet<_> = (0..50).map(|_| recovery.delay(6)).collect();
        assert!(delays.len() > 40, "they differ");
    }

    #[test]
    fn another_route_serves_only_what_the_first_could_not() {
        let unavailable = || Error::RouteUnavailable { route: "cufile", why: "no driver".into() };
        let recovery = ErrorRecovery::default();
        assert_eq!(recovery.with_fallback(|| Err(unavailable()), || Ok(2)).unwrap(), 2);
        assert_eq!(recovery.with_fallback(|| Ok(1), || -> Result<u32> { panic!("not needed") }).unwrap(), 1);
        let memory = Error::DeviceMemory { device: "cuda:0".into(), needed: 2, free: 1 };
        assert!(recovery.with_fallback(|| Err(memory), || Ok(2)).is_err(), "memory is missing on every route");
        assert!(ErrorRecovery::new(3, false).with_fallback(|| Err(unavailable()), || Ok(2)).is_err());
    }
}
