//! What kind of file system a path lies on, as far as it explains a speed.

use std::path::Path;

/// Kinds that behave differently enough to be worth a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileSystem {
    /// Memory: nothing reaches a disk.
    Memory,
    /// A container's layers: what lies below is not known.
    Overlay,
    /// Over the network.
    Network,
    /// Any other: taken for a disk's.
    Disk,
    /// The system did not say.
    Unknown,
}

// From linux/magic.h, and for those that are not in it from their own sources.
const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58F6;
const OVERLAYFS: u32 = 0x794C_7630;
const NFS: u32 = 0x6969;
const SMB2: u32 = 0xFE53_4D42;
const CIFS: u32 = 0xFF53_4D42;
const V9FS: u32 = 0x0102_1997;
const FUSE: u32 = 0x6573_5546;
const CEPH: u32 = 0x00C3_6400;
const LUSTRE: u32 = 0x0BD0_0BD0;

impl FileSystem {
    /// The kind of the file system that holds `path`.
    pub(crate) fn of(path: &Path) -> Self {
        let Ok(facts) = rustix::fs::statfs(path) else { return Self::Unknown };
        // The magic numbers have 32 bits; some targets hold them in more, sign-extended.
        match facts.f_type as u32 {
            TMPFS | RAMFS => Self::Memory,
            OVERLAYFS => Self::Overlay,
            NFS | SMB2 | CIFS | V9FS | FUSE | CEPH | LUSTRE => Self::Network,
            _ => Self::Disk,
        }
    }

    /// For programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Overlay => "overlay",
            Self::Network => "network",
            Self::Disk => "disk",
            Self::Unknown => "unknown",
        }
    }
}

/// The bytes that this user may still write on the file system that holds `path`.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let facts = rustix::fs::statvfs(path).ok()?;
    facts.f_bavail.checked_mul(facts.f_frsize)
}
