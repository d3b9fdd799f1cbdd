//! Every limit of the format, in one place, with its reason. Encoders refuse what is over them, and so do decoders.

/// The version of the format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// What frames and payloads are multiples of: the page, and the largest logical block of common disks, so that every part
/// can be read and written past the page cache.
pub const BLOCK_BYTES: u64 = 4096;

/// A blob longer than this has a checksum for each such chunk beside the one for the whole, so that a range of it can be
/// read and verified, and so that many hands can check one blob.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// Where a blob shorter than a block may start: what CUDA guarantees of every allocation, so that a tensor inside an arena
/// is aligned as one that was allocated alone.
pub const SMALL_ALIGN_BYTES: u64 = 256;

/// A key's longest length. Keys are 1 to this many bytes; 1024 lets one entry of an index run fit one block.
pub const KEY_BYTES_MAX: usize = 1024;

/// A shape's most dimensions: what PyTorch allows.
pub const DIMS_MAX: usize = 64;

/// The bytes of all attributes of one entry, names and values together. Larger ones are blobs and belong under a key.
pub const ATTRIBUTES_BYTES_MAX: usize = 64 << 10;

/// The attributes of one entry, so that empty ones are bounded too.
pub const ATTRIBUTES_MAX: usize = 1024;

/// The entries of one commit: a frame is decoded whole, so this bounds what recovery holds in memory.
pub const ENTRIES_PER_COMMIT_MAX: usize = 1 << 20;

/// A frame's longest length; it is read into memory whole.
pub const FRAME_BYTES_MAX: u64 = 256 << 20;

/// A blob's longest length: above any file of today's disks, and low enough that no sum of two overflows.
pub const BLOB_BYTES_MAX: u64 = 1 << 48;

/// A segment's longest length. Every offset in a segment is below it, so that no sum of two overflows 64 bits.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 60;

/// A manifest's longest length; it is read into memory whole.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// The segments that one manifest may name.
pub const SEGMENTS_MAX: usize = 1 << 20;

/// The index runs that one manifest may name. A lookup asks each until one knows the key, so a store keeps far fewer.
pub const RUNS_MAX: usize = 4096;

/// What the place of a blob of this length is a multiple of: a block from one block on, else [`SMALL_ALIGN_BYTES`].
pub const fn blob_align_bytes(length: u64) -> u64 {
    if length >= BLOCK_BYTES { BLOCK_BYTES } else { SMALL_ALIGN_BYTES }
}

/// How many chunk checksums a blob of this length has: none up to one chunk.
pub const fn chunk_count(length: u64) -> u64 {
    if length > CHUNK_BYTES { length.div_ceil(CHUNK_BYTES) } else { 0 }
}
