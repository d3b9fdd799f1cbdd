//! Moves extents between files and devices. Knows segments by their files, and blobs by offset and length; knows no keys.
//!
//! # Invariants
//! - Every byte of a value is checked against its checksum before the caller sees it. Plain files have none.
//! - An operation in flight owns its memory.
//! - Host memory in use is bounded by the buffers named in [`config`](crate::config), whatever is moved.

pub(crate) mod buffered;
pub(crate) mod direct;
pub(crate) mod double_buffer;
mod fill;
#[cfg(test)]
pub(crate) mod fixtures;
mod handed;
pub(crate) mod lanes;
mod payload;
pub(crate) mod pipeline;
mod plan;
mod pump;
mod read;
pub(crate) mod retry;
mod routes;
pub(crate) mod staged;
pub(crate) mod transport;
mod watched;
mod windows;

pub(crate) use handed::hand_chunks;
pub(crate) use lanes::processors;
pub(crate) use payload::{Blob, PayloadStream, lay_out};
pub(crate) use plan::{Extent, ReadPlan};
pub(crate) use pump::pump;
pub(crate) use read::{
    Attempt, LARGE_BYTES_MIN, Outcome, SegmentFile, execute, execute_cached, execute_one, read_chunks,
    read_chunks_within,
};
pub use routes::RouteChoice;
pub(crate) use routes::Routes;
pub(crate) use watched::{Job, Patience, Steps, Waited, Watched, step};
