//! Numbers that cuFile reads and writes while an operation is in flight, at an address that does not move. Nobody borrows
//! them meanwhile: they are reached through raw pointers alone.

use std::ptr::NonNull;

use super::sys::{IoParams, Off};

/// What an operation on a stream reads and writes while the stream comes to it.
pub(super) struct AsyncParams {
    pub(super) size: usize,
    pub(super) file_offset: Off,
    pub(super) base_offset: Off,
    /// Written by cuFile; [`NOT_WRITTEN`] until then.
    pub(super) done: isize,
}

/// No count and no code.
pub(super) const NOT_WRITTEN: isize = isize::MIN;

/// A value that C code may read and write at any time, freed when this is dropped.
pub(super) struct Owned<T: ?Sized>(NonNull<T>);

impl<T: ?Sized> Owned<T> {
    pub(super) fn new(value: Box<T>) -> Owned<T> {
        Owned(NonNull::from(Box::leak(value)))
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T: ?Sized> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a box, in `new`, and is freed once; who drops this knows that C is done with it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

// SAFETY: it owns plain numbers, as a box does; any thread may free them, and a shared one gives out only their address.
unsafe impl Send for Owned<AsyncParams> {}
// SAFETY: as above.
unsafe impl Sync for Owned<AsyncParams> {}
// SAFETY: as above; the pointers in it are handles and addresses that only C follows.
unsafe impl Send for Owned<[IoParams]> {}
// SAFETY: as above.
unsafe impl Sync for Owned<[IoParams]> {}
