//! The states that a crash can leave behind, walked cut by cut.

use super::trace::Trace;

/// A walk over a trace.
#[derive(Debug, Clone)]
pub struct CrashWalker {
    trace: Trace,
    position: usize,
}

impl CrashWalker {
    pub(super) fn new(trace: Trace) -> Self {
        Self { trace, position: 0 }
    }

    /// How many events are done.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Does one event more; false at the end.
    pub fn advance(&mut self) -> bool {
        let more = self.position < self.trace.len();
        self.position += usize::from(more);
        more
    }
}
