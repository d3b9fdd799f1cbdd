//! Panics as violations.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Does something; a panic is a violation like others, with its words.
pub fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("the store panics: {}", words.unwrap_or("without words")))
    })
}
