//! GPU Direct Storage over plain files: read, write, stream and map files in the memory of a GPU, or of the host.
//!
//! The front is [`GdsContext`]. What it is made of can be used alone: the passive parts decide and count
//! ([`PrefetchScheduler`], [`RegionMap`], [`ErrorRecovery`], [`GdsMetrics`]), the active ones move bytes
//! ([`AsyncIoPipeline`], [`DoubleBufferManager`]) over whatever [`Transport`] they are given.
//!
//! It verifies nothing: a plain file has no checksums. Tensors that are to be verified, found by key and safe from crashes
//! belong in a [`Store`](crate::Store).
//!
//! # Invariants
//! - An operation in flight owns its memory; whoever stops waiting frees nothing.
//! - Every operation ends within its deadline for the one who waits, or is reported as late.
//! - All file access goes through one trait, so that tests can fail any call.

mod config;
mod context;
mod engine;
mod files;
mod mapping;
mod metrics;
mod reader;
mod router;

pub use config::{
    BATCH_MAX, BUFFER_BYTES_MAX, BUFFER_BYTES_MIN, GdsConfig, OUTSTANDING_IO_MAX, PREFETCH_SLOTS_MAX, align_down,
    align_up, is_aligned,
};
pub use context::{GdsBuilder, GdsContext};
pub use mapping::{MappedRegion, MappingStats, MemoryMapManager};
pub use metrics::{GdsMetrics, PerformanceStatus, PerformanceTargets, RouteMetrics};
pub use reader::{PrefetchReader, ReaderChunk};
pub use router::RouteStatus;

pub use crate::error::Error as GdsError;
pub use crate::io::buffered::BufferedTransport;
pub use crate::io::direct::CuFileTransport;
pub use crate::io::double_buffer::{BufferState, BufferStates, DoubleBufferManager, StreamChunk};
pub use crate::io::pipeline::{AsyncIoPipeline, Callback, Completion, Execute, IoRequest, Memory, RequestId};
pub use crate::io::retry::ErrorRecovery;
pub use crate::io::staged::StagedTransport;
pub use crate::io::transport::{IoOperation, OpenFile, Piece, Progress, Route, Transfer, Transport};
pub use crate::metrics::Histogram;
pub use crate::prefetch::{
    AccessPattern, Lookup, PatternDetector, Prefetch, PrefetchOptions, PrefetchScheduler, PrefetchStats, RangeLookup,
    SlotId, SlotState,
};
pub use crate::region::{EvictRefused, FileId, Lru, LruKey, Region, RegionId, RegionMap, RegionPlan, RegionRefusal};

#[cfg(test)]
mod tests;
