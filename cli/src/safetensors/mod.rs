//! The safetensors file format, read and written by its own rules: 8 bytes of header length (little-endian), a header in
//! JSON, then the tensors' bytes back to back with no holes.
//!
//! Files come from anywhere, so nothing in one is believed before it was checked; and neither side holds a file in
//! memory.

pub(crate) mod read;
pub(crate) mod write;

/// The longest header that the safetensors library reads.
pub(crate) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The name in a header under which the file's own properties stand; no tensor can have it.
pub(crate) const METADATA_NAME: &str = "__metadata__";

/// Marks the value under which a store keeps a file's properties: `import` sets it, `export` looks for it.
pub(crate) const METADATA_ATTRIBUTE: (&str, &[u8]) = ("safetensors", b"metadata");
