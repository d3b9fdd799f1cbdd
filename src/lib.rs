//! **alight** is an embedded key-value store for GPU-resident blobs: tensors are put by key and got by key, and a get
//! lands in GPU memory, verified.
//!
//! One directory is one [`Store`]; the library runs in the caller's process. Commits are atomic and durable, reads are
//! checked against the checksum of what was put, and the same files and the same calls work with no GPU at all, on
//! [`Device::host`].
//!
//! ```
//! use alight::{Device, Dtype, Store, TensorRef};
//!
//! # let directory = tempfile::tempdir().expect("a temporary folder");
//! # let path = directory.path().join("model.alight");
//! let store = Store::create(&path)?;
//! let weights: Vec<u8> = (0..24u8).collect();
//! let mut batch = store.batch(); // all or nothing
//! batch.put("layers.0.w", TensorRef::new(Dtype::F32, &[2, 3], &weights)?)?;
//! batch.put("layers.0.b", &[1, 2, 3, 4])?;
//! batch.commit()?;
//!
//! let tensors = store.get_many(["layers.0.w", "layers.0.b"], &Device::best())?;
//! assert_eq!(tensors[0].shape(), [2, 3]);
//! assert_eq!(tensors[1].to_host()?, [1, 2, 3, 4]);
//! # Ok::<(), alight::Error>(())
//! ```
//!
//! # What it is not for
//! Many small mutable records, transactions that read before they write, queries over values, or several writers at
//! once: one process writes, any number read.
//!
//! # Where to begin
//! [`Store::create`], [`Store::put`], [`Store::get`]; [`Batch`] for several changes at once; [`Snapshot`] for a view
//! that stays; [`Store::stream`] for more than fits; [`StoreOptions`] for durability and sizes; [`Error`] for what can go wrong.

/// The examples of the README, compiled and run with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

mod capabilities;
mod config;
#[expect(unsafe_code, reason = "cuFile is a C library")]
pub mod cufile;
mod device;
mod error;
pub mod gds;
mod index;
mod io;
mod metrics;
mod prefetch;
mod region;
#[doc(hidden)]
pub mod storage;
mod store;
mod sync;
mod tensor;
mod trace;

pub use alight_format::{Dtype, FeatureFlags, StoreId, limits};
pub use capabilities::{Answer, Capabilities, Capability};
pub use device::{Device, DeviceBuffer, DeviceMemory};
pub use error::{Damage, DisplayKey, Error, Result};
pub use io::RouteChoice;
pub use metrics::{LastRead, Metrics, ReadRoute, ReadTimes, RouteReason};
pub use store::{
    BackupProgress, BackupReport, Batch, CompactOptions, CompactProgress, CompactReport, Durability, Eviction,
    Maintenance, PrefetchConfig, RebuildProgress, RebuildReport, RepairProgress, RepairReport, Scan, Snapshot,
    SnapshotStat, Stat, Store, StoreOptions, Stream, VerifyProgress, VerifyReport,
};
pub use tensor::{Key, ReadAt, Tensor, TensorInfo, TensorRef};
