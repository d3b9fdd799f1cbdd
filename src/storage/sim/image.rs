//! A whole disk at one moment: directories, names and contents. Cloned for the price of a few pointers.
//!
//! # Invariants
//! - Directory 0 is the root and is always there. A directory that no name leads to is as good as gone.
//! - An id is never used twice in the life of a disk and of its copies.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use imbl::OrdMap;

use super::content::Content;
use super::rng::{fold, hash_name};

/// One file, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId(pub(super) u64);

/// One directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DirId(pub(super) u64);

const ROOT: DirId = DirId(0);

/// What a name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    File(FileId),
    Dir(DirId),
}

/// A name in a directory, whether something bears it or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) dir: DirId,
    pub(super) name: Arc<str>,
}

/// A change of names. Each is atomic: a crash shows it whole or not at all.
#[derive(Debug, Clone)]
pub(super) enum NameChange {
    Link { at: Place, node: Node },
    Unlink { at: Place, node: Node },
    Rename { from: Place, to: Place, node: Node },
}

impl NameChange {
    /// The names that it touches: one or two.
    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        let (first, second) = match self {
            Self::Link { at, .. } | Self::Unlink { at, .. } => (at, None),
            Self::Rename { from, to, .. } => (from, Some(to)),
        };
        [Some(first), second].into_iter().flatten()
    }
}

/// The state of a disk.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub(super) files: OrdMap<FileId, Content>,
    dirs: OrdMap<DirId, OrdMap<Arc<str>, Node>>,
}

impl Image {
    pub(super) fn empty() -> Self {
        Self { files: OrdMap::new(), dirs: OrdMap::unit(ROOT, OrdMap::new()) }
    }

    /// What a file holds; one that nothing was ever written to holds nothing.
    pub(super) fn content(&self, file: FileId) -> Content {
        self.files.get(&file).cloned().unwrap_or_default()
    }

    pub(super) fn node(&self, place: &Place) -> Option<Node> {
        self.dirs.get(&place.dir)?.get(&place.name).copied()
    }

    pub(super) fn names(&self, dir: DirId) -> impl Iterator<Item = (&Arc<str>, Node)> {
        self.dirs.get(&dir).into_iter().flatten().map(|(name, &node)| (name, node))
    }

    /// Makes the change if it can be made here; answers whether it could. It cannot where a name does not lead to what
    /// it led to when the change was made first, since another change before it is missing.
    pub(super) fn apply(&mut self, change: &NameChange) -> bool {
        match change {
            NameChange::Link { at, node } => {
                let free = self.node(at).is_none();
                if free {
                    self.set(at, Some(*node));
                }
                free
            }
            NameChange::Unlink { at, node } => {
                let there = self.node(at) == Some(*node);
                if there {
                    self.set(at, None);
                }
                there
            }
            NameChange::Rename { from, to, node } => {
                let there = self.node(from) == Some(*node);
                if there {
                    self.set(from, None);
                    self.set(to, Some(*node));
                }
                there
            }
        }
    }

    /// Makes a change that a sync made durable. What was made under a name is there, even where a change that was lost
    /// would have freed the name before; what was renamed or removed still had to be there to be so.
    pub(super) fn apply_durable(&mut self, change: &NameChange) {
        match change {
            NameChange::Link { at, node } => self.set(at, Some(*node)),
            other => drop(self.apply(other)),
        }
    }

    fn set(&mut self, place: &Place, node: Option<Node>) {
        // A directory that was made a moment ago has no names yet.
        let names = self.dirs.entry(place.dir).or_default();
        match node {
            Some(node) => names.insert(Arc::clone(&place.name), node),
            None => names.remove(&place.name),
        };
    }

    /// The directory that a path names.
    pub(super) fn dir(&self, path: &Path) -> io::Result<DirId> {
        let mut trail = vec![ROOT];
        for component in path.components() {
            match component {
                Component::ParentDir if trail.len() > 1 => drop(trail.pop()),
                Component::Normal(name) => trail.push(self.child_dir(trail[trail.len() - 1], name)?),
                Component::RootDir | Component::CurDir | Component::ParentDir | Component::Prefix(_) => {}
            }
        }
        Ok(trail[trail.len() - 1])
    }

    fn child_dir(&self, dir: DirId, name: &OsStr) -> io::Result<DirId> {
        match self.node(&Place { dir, name: name.to_string_lossy().into() }) {
            Some(Node::Dir(dir)) => Ok(dir),
            Some(Node::File(_)) => Err(errno(libc::ENOTDIR)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    /// The place that a path names; its directory must exist.
    pub(super) fn place(&self, path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or_else(|| errno(libc::EISDIR))?;
        let dir = self.dir(path.parent().unwrap_or(Path::new("")))?;
        Ok(Place { dir, name: name.to_string_lossy().into() })
    }

    /// The file at a path.
    pub(super) fn file(&self, path: &Path) -> io::Result<FileId> {
        match self.node(&self.place(path)?) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Dir(_)) => Err(errno(libc::EISDIR)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    /// Every file that a name leads to, with its path, in the order of the paths' components.
    pub(super) fn walk(&self) -> Vec<(PathBuf, FileId)> {
        let mut found = Vec::new();
        self.walk_into(ROOT, &PathBuf::from("/"), &mut |path, node| {
            if let Node::File(file) = node {
                found.push((path, file));
            }
        });
        found
    }

    fn walk_into(&self, dir: DirId, path: &Path, visit: &mut impl FnMut(PathBuf, Node)) {
        for (name, node) in self.names(dir) {
            let path = path.join(&**name);
            if let Node::Dir(dir) = node {
                self.walk_into(dir, &path, visit);
            }
            visit(path, node);
        }
    }

    /// A hash of every name, and of what is behind it: two images with the same one answer every read alike.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint_of(ROOT)
    }

    fn fingerprint_of(&self, dir: DirId) -> u64 {
        self.names(dir).fold(1, |sum: u64, (name, node)| {
            let behind = match node {
                Node::File(file) => self.content(file).fingerprint(),
                Node::Dir(dir) => self.fingerprint_of(dir),
            };
            let is_dir = u64::from(matches!(node, Node::Dir(_)));
            sum.wrapping_add(fold(hash_name(name), fold(behind, is_dir)))
        })
    }

    /// How many names lead to a file.
    pub(super) fn links(&self, file: FileId) -> u64 {
        let dirs = self.dirs_reachable();
        let nodes = dirs.iter().flat_map(|&dir| self.names(dir));
        nodes.filter(|&(_, node)| node == Node::File(file)).count() as u64
    }

    /// The files that have a name.
    pub(super) fn linked_files(&self) -> BTreeSet<FileId> {
        let dirs = self.dirs_reachable();
        let nodes = dirs.iter().flat_map(|&dir| self.names(dir));
        nodes.filter_map(|(_, node)| if let Node::File(file) = node { Some(file) } else { None }).collect()
    }

    fn dirs_reachable(&self) -> Vec<DirId> {
        let mut dirs = vec![ROOT];
        let mut next = 0;
        while next < dirs.len() {
            dirs.extend(self.names(dirs[next]).filter_map(|(_, node)| match node {
                Node::Dir(dir) => Some(dir),
                Node::File(_) => None,
            }));
            next += 1;
        }
        dirs
    }
}

/// The system's own answer.
pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}
