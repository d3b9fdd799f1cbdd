//! What udev knows of the disk under a file. cuFile registers no file of whose disk udev does not know that it holds a
//! file system: in containers and small virtual machines, where no udev runs, that is every file, and the code (5027) does
//! not say so.

use std::fs;
use std::path::{Path, PathBuf};

/// Where udev keeps what it knows of devices.
const DATABASE: &str = "/run/udev/data";

/// What udev says of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It holds a file system: what cuFile asks for.
    Knows,
    /// Nothing is known of the device with this file in udev's database, or not that it holds a file system.
    DoesNotKnow(PathBuf),
    /// The file is on no disk of its own (tmpfs, overlayfs, a network file system, some of btrfs): there is nothing to ask.
    NoDisk,
}

/// What udev says of the disk with a device number, as `stat` gives it.
pub(crate) fn ask(device: u64) -> Answer {
    ask_in(Path::new(DATABASE), device)
}

fn ask_in(database: &Path, device: u64) -> Answer {
    let (major, minor) = split(device);
    if major == 0 {
        return Answer::NoDisk;
    }
    let path = database.join(format!("b{major}:{minor}"));
    match fs::read_to_string(&path) {
        Ok(text) if text.lines().any(|line| line == "E:ID_FS_USAGE=filesystem") => Answer::Knows,
        _ => Answer::DoesNotKnow(path),
    }
}

/// Major and minor number, as the kernel packs them into 64 bits.
pub(crate) fn split(device: u64) -> (u64, u64) {
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & !0xff);
    (major, minor & 0xffff_ffff)
}

impl Answer {
    /// What to do so that cuFile takes files of this disk, where something is to be done.
    pub(crate) fn remedy(&self) -> Option<String> {
        match self {
            Answer::Knows => None,
            Answer::DoesNotKnow(path) => Some(format!(
                "udev does not know the disk, and cuFile refuses files of a disk that udev does not know: run udev, give \
                 the container the host's /run/udev, or write the lines E:ID_FS_USAGE=filesystem and E:ID_FS_TYPE=ext4 \
                 (or xfs) to {}",
                path.display()
            )),
            Answer::NoDisk => Some(
                "the file is on no disk of its own (tmpfs, overlayfs, a network): put it on a local ext4 or xfs"
                    .to_string(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udev_knows_a_disk_only_where_it_says_that_it_holds_a_file_system() {
        let database = tempfile::tempdir().unwrap();
        let file = database.path().join("b259:3");
        let device = 259 << 8 | 3;
        let unknown = Answer::DoesNotKnow(file.clone());
        assert_eq!(ask_in(database.path(), device), unknown);
        fs::write(&file, "S:disk/by-id/x\nE:ID_FS_USAGE=raid\n").unwrap();
        assert_eq!(ask_in(database.path(), device), unknown);
        fs::write(&file, "I:1\nE:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem\n").unwrap();
        assert_eq!(ask_in(database.path(), device), Answer::Knows);
        assert_eq!(ask_in(database.path(), 37), Answer::NoDisk);
        let remedy = unknown.remedy().unwrap();
        assert!(remedy.contains("b259:3") && remedy.contains("udev does not know the disk"), "{remedy}");
        assert_eq!(Answer::Knows.remedy(), None);
    }

    #[test]
    fn device_numbers_are_split_as_the_kernel_packs_them() {
        for (major, minor) in [(8, 0), (259, 7), (253, 300), (4095, 1 << 19), (5000, 12)] {
            // As glibc's `makedev` packs them.
            let packed = (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12 | (major & !0xfff) << 32;
            assert_eq!(split(packed), (major, minor));
        }
    }
}
