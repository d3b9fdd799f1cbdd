//! Tests that need a GPU skip where there is none, and say so; with `ALIGHT_REQUIRE_GPU=1` they fail instead.

use std::fmt::Display;
use std::io::Write;

/// What was asked of a GPU, or `None` after a visible skip with the reason.
pub(crate) fn require<T>(gpu: Result<T, impl Display>) -> Option<T> {
    match gpu {
        Ok(gpu) => Some(gpu),
        Err(reason) if std::env::var_os("ALIGHT_REQUIRE_GPU").is_some_and(|value| value == "1") => {
            panic!("ALIGHT_REQUIRE_GPU=1, but there is no GPU: {reason}")
        }
        Err(reason) => {
            // Not `eprintln!`: the test harness shows what that prints only when a test fails.
            let _ = writeln!(std::io::stderr(), "skipped: no GPU: {reason}");
            None
        }
    }
}
