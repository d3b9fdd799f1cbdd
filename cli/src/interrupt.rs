//! Ctrl-C and termination as a flag, for the commands that have something to clean up: they look at it between steps
//! and return an error, so that temporary files are removed on the way out. A second signal ends the process at once.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::Failure;

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From here on a first signal only raises the flag.
pub(crate) fn catch() -> Result<(), Failure> {
    let raised = FLAG.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        // Handlers run in the order of their registration, so only a second signal finds the flag raised.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(raised))
            .and_then(|_| flag::register(signal, Arc::clone(raised)))
            .map_err(|error| Failure::io("catch signals", "this process", error))?;
    }
    Ok(())
}

/// Whether a signal came.
pub(crate) fn raised() -> bool {
    FLAG.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Fails once a signal came.
pub(crate) fn check() -> Result<(), Failure> {
    if raised() { Err(Failure::Interrupted) } else { Ok(()) }
}

/// [`check`] for readers and writers that the library calls. Not of kind `Interrupted`, which means "call again".
pub(crate) fn check_io() -> io::Result<()> {
    if raised() { Err(io::Error::other("interrupted by a signal")) } else { Ok(()) }
}
