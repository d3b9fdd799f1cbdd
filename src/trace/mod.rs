//! Spans around what the store does, for whoever listens: a subscriber of `tracing` (target `alight`, level `DEBUG`), and
//! NVIDIA's profilers with the feature `nvtx`. Where nobody listens a span is one look at a number.

#[cfg(feature = "nvtx")]
#[expect(unsafe_code, reason = "NVTX is a C library")]
mod nvtx;

use tracing::field::Value;
use tracing::span::EnteredSpan;

/// A span that is entered while this lives, on the thread that made it.
#[must_use = "a span that is dropped at once spans nothing"]
pub(crate) struct Scope {
    span: EnteredSpan,
    #[cfg(feature = "nvtx")]
    _range: nvtx::Range,
}

impl Scope {
    /// Enters a span; the name ends with a zero.
    pub(crate) fn enter(span: tracing::Span, name: &'static str) -> Self {
        // Only profilers need the name: a span has its own.
        let _ = name;
        Self {
            span: span.entered(),
            #[cfg(feature = "nvtx")]
            _range: nvtx::Range::push(name),
        }
    }

    /// Tells a field that was empty at first.
    pub(crate) fn record(&self, field: &'static str, value: impl Value) {
        self.span.record(field, value);
    }
}

/// Enters a span of `tracing` by a name of the field, with fields whose values are asked for only where somebody listens.
macro_rules! scope {
    ($name:literal $(, $($field:tt)*)?) => {
        $crate::trace::Scope::enter(
            tracing::debug_span!(target: "alight", $name $(, $($field)*)?),
            concat!("alight ", $name, "\0"),
        )
    };
}

pub(crate) use scope;
