//! The means by which threads wait for each other, in the parts whose every order is tried: the standard library's, or
//! with `--cfg loom` those of loom, which runs a test once for each way in which its threads can meet. Nothing else is built
//! to run then.

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};
