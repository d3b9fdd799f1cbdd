//! What the twin adds to the suite that every implementation passes.

use std::path::PathBuf;

use super::*;

mod suite {
    use super::*;
    crate::storage::suite::suite!((SimStorage::new(), PathBuf::from("/"), ()));
}
