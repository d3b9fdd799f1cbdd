//! The format of an alight store on disk: bytes to structs and back.
//!
//! Every part of a store that is not a user's blob is here: the [header of a segment](SegmentHeader), the
//! [frame of a commit](Frame), the [index run](RunReader), the [manifest](Manifest). SPEC.md beside this crate says the same bytes in prose, and
//! `reader.py` reads a store by it with no Rust at all.
//!
//! # What this crate refuses to do
//! No I/O, no unsafe code, no clock, no randomness: whoever calls has the bytes and decides where they go.
//!
//! # Invariants
//! - Decoders take bytes as suspects: every count is judged before memory is taken for it, every checksum before what it
//!   covers is believed, and no input makes one panic.
//! - What an encoder writes, its decoder accepts; what a decoder would refuse, the encoder refuses.
//! - The same values make the same bytes, on every machine.

#![forbid(unsafe_code)]

mod checksum;
mod codec;
mod dtype;
mod error;
mod frame;
mod header;
mod ids;
mod layout;
pub mod limits;
mod manifest;
mod run;
mod zeros;

pub use checksum::{combine, crc32};
pub use dtype::Dtype;
pub use error::FormatError;
pub use frame::{EncodedBody, Entry, EntryKind, Frame, PAYLOAD_SYNCED, PRELUDE_BYTES, Prelude, PreludeFields};
pub use header::{SEGMENT_HEADER_BYTES, SegmentHeader};
pub use ids::{RunId, Salt, SegmentId, Seq, StoreId};
pub use limits::FORMAT_VERSION;
pub use manifest::{FeatureFlags, Manifest, RunRecord, SegmentRecord};
pub use run::{
    FinishedRun, HashedKey, IndexEntry, IndexKind, RUN_HEADER_BYTES, RunBuilder, RunBytes, RunError, RunHeader,
    RunRange, RunReader, RunView, key_hash,
};
pub use zeros::is_zero;
