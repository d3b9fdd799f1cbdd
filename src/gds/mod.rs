//! gds
#![allow(missing_docs)]
mod config;
mod histogram;
mod metrics;
pub use crate::io::retry::ErrorRecovery;
pub use crate::io::transport::*;
pub use crate::prefetch::*;
pub use crate::region::*;
pub use config::*;
pub use histogram::Histogram;
pub use metrics::*;
