//! Whether a thread that asks the index may wait for the disk. One that may not is told so in its place, and has another ask that
//! may.

use std::cell::Cell;
use std::io;

use crate::error::Error;
use crate::io::step;

thread_local! {
    static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
}

/// Does something in which this thread asks the index, and waits for nothing: what would have to is an error, by which
/// [`was_forbidden`] knows it.
pub(crate) fn forbidden<T>(ask: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORBIDDEN.set(self.0);
        }
    }
    let _restore = Restore(FORBIDDEN.replace(true));
    ask()
}

/// Whether this thread may wait.
pub(super) fn is_allowed() -> bool {
    !FORBIDDEN.get()
}

/// What is asked for is not in memory: an error where this thread may not wait for it.
pub(super) fn check() -> io::Result<()> {
    if !is_allowed() {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    step();
    Ok(())
}

/// Whether somebody was told that he would have to wait.
pub(crate) fn was_forbidden(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_wait_again_afterwards_whatever_happens() {
        assert!(is_allowed() && check().is_ok());
        let told = forbidden(|| {
            forbidden(|| assert!(!is_allowed()));
            check()
        });
        assert_eq!(told.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _ = std::panic::catch_unwind(|| forbidden(|| panic!("on the way")));
        assert!(is_allowed());
    }
}
