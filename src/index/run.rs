//! A run on the disk: mapped where that is safe, read where it is not; written whole or not at all.

use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alight_format::{FormatError, IndexEntry, RunBuilder, RunId, RunRecord, StoreId};

use crate::error::{Error, Result};
use crate::storage::{Caching, OpenMode, Storage, StorageFile, StorageMap, read_exact_at, write_all_at};
use crate::store::layout::Layout;
