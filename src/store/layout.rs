//! The names in a store's directory.

use std::path::{Path, PathBuf};

use alight_format::{RunId, SegmentId};

/// Where each part of one store lies.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("LOCK")
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.root.join("MANIFEST")
    }

    /// Where the next manifest is written before it takes the place of the last.
    pub(crate) fn manifest_new(&self) -> PathBuf {
        self.root.join("MANIFEST.tmp")
    }

    /// Where readers lock the byte that is the generation of their manifest. The file stays empty.
    pub(crate) fn readers(&self) -> PathBuf {
        self.root.join("READERS")
    }

    /// What a store bears that is still being made from another one. It does not open.
    pub(crate) fn unfinished(&self) -> PathBuf {
        self.root.join("UNFINISHED")
    }

    /// Where a failed sync leaves word for the next open.
    pub(crate) fn distrust(&self) -> PathBuf {
        self.root.join("DISTRUST")
    }

    /// Where an opening whose own sync failed leaves word for the next.
    pub(crate) fn unsettled(&self) -> PathBuf {
        self.root.join("UNSETTLED")
    }

    pub(crate) fn segments(&self) -> PathBuf {
        self.root.join("segments")
    }

    pub(crate) fn segment(&self, id: SegmentId) -> PathBuf {
        self.segments().join(id.file_name())
    }

    /// Where a segment's copy is written before it takes the segment's place.
    pub(crate) fn segment_new(&self, id: SegmentId) -> PathBuf {
        self.segments().join(format!("{}.tmp", id.file_name()))
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    pub(crate) fn run(&self, id: RunId) -> PathBuf {
        self.index().join(id.file_name())
    }

    /// Where a run is written before it bears its name.
    pub(crate) fn run_new(&self, id: RunId) -> PathBuf {
        self.index().join(format!("{}.tmp", id.file_name()))
    }
}
