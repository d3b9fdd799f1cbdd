//! A progress bar on standard error, for whatever takes longer than a second; on a terminal only.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;

/// What is done in less is not worth a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that counts bytes, or nothing at all. May be advanced from any thread; vanishes when dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    shown: AtomicBool,
    wanted: bool,
    began: Instant,
}

impl Progress {
    /// A bar towards `total` bytes.
    pub(crate) fn bytes(output: &Output, doing: &'static str, total: u64) -> Self {
        Self::new(
            output,
            doing,
            total,
            "{msg:12} {bar:32} {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>12} {eta:>4}",
        )
    }

    /// A bar towards `total` steps.
    pub(crate) fn steps(output: &Output, doing: &'static str, total: u64) -> Self {
        Self::new(output, doing, total, "{msg:12} {bar:32} {pos:>8} of {len} {eta:>4}")
    }

    fn new(output: &Output, doing: &'static str, total: u64, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant that was tried"));
        bar.set_message(doing);
        let wanted = output.wants_progress() && std::io::stderr().is_terminal();
        Self { bar, shown: AtomicBool::new(false), wanted, began: Instant::now() }
    }

    /// So much more is done.
    pub(crate) fn add(&self, amount: u64) {
        self.bar.inc(amount);
        self.show_when_due();
    }

    /// So much of so much is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.show_when_due();
    }

    fn show_when_due(&self) {
        if self.wanted && self.began.elapsed() >= PATIENCE && !self.shown.swap(true, Ordering::Relaxed) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
