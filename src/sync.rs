//! The means by which threads wait for each other, in the parts whose every order is tried: the usual ones, or with
//! `--cfg loom` those of loom, which runs a test once for each way in which its threads can meet. Nothing else is built to run
//! then.
//!
//! Of a whole store that is tried this way, threads are interrupted at these locks alone: around every step from one version to
//! the next, and before every call of the simulated disk. Atomics and reference counts are the usual ones and are never
//! reordered there; ThreadSanitizer looks at those (`scripts/tsan.sh`).

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks that nobody has to be told are poisoned.
#[cfg(not(loom))]
pub(crate) mod lock {
    pub(crate) use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
}
#[cfg(loom)]
pub(crate) mod lock;
