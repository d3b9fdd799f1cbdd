//! The file system that holds the store: what it is, and what it lets alight do.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Capability, DIRECT_IO, System, UDEV, sys};
use crate::cufile::udev;
use crate::storage::{DIRECT_ALIGN_BYTES, FileStorage, OpenMode, Storage};

const FILE_SYSTEM: &str = "file system";
const MAPPING: &str = "mapping";

pub(super) fn probe(system: &System, store: Option<&Path>, uses_cufile: bool) -> Vec<Capability> {
    let place = match store.map(existing) {
        None => return unknown("no store was named"),
        Some(Err(error)) => return unknown(&error.to_string()),
        Some(Ok(place)) => place,
    };
    let facts = match fs::metadata(&place) {
        Ok(facts) => facts,
        Err(error) => return unknown(&format!("{}: {error}", place.display())),
    };
    let file = if facts.is_dir() { file_in(&place) } else { Some(place.clone()) };
    vec![
        file_system(system, &place, facts.dev()),
        direct_io(file.as_deref()),
        mapping(file.as_deref()),
        disk_in_udev(facts.dev(), uses_cufile),
    ]
}

fn unknown(why: &str) -> Vec<Capability> {
    [FILE_SYSTEM, DIRECT_IO, MAPPING, UDEV].map(|name| Capability::unknown(name, why)).into()
}

/// The path, or the nearest of its parents that is there: where a store would be made.
fn existing(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let found = path.ancestors().find(|path| path.exists()).map(Path::to_path_buf);
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// A file to try things on: a segment of a store where there is one, since that is what is read and written.
fn file_in(directory: &Path) -> Option<PathBuf> {
    let in_order = [directory.join("segments"), directory.to_path_buf()];
    let files = in_order.iter().flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten());
    let mut files = files.map(|entry| entry.path());
    files.find(|path| {
        fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() > 0) && File::open(path).is_ok()
    })
}

fn file_system(system: &System, place: &Path, device: u64) -> Capability {
    let name = system.text("/proc/self/mountinfo").and_then(|text| mount_of(&text, device));
    match (name, sys::filesystem_magic(place)) {
        (Some((kind, source)), _) if kind == "tmpfs" || kind == "ramfs" => Capability::no(
            FILE_SYSTEM,
            format!("{kind} ({source}): memory, nothing survives a restart"),
            "put the store on a disk, unless it is only to be tried",
        ),
        (Some((kind, source)), _) if is_network(&kind) => Capability::no(
            FILE_SYSTEM,
            format!("{kind} ({source}): over a network"),
            "one machine at a time may write to the store, and a local disk is faster",
        ),
        (Some((kind, source)), _) => Capability::yes(FILE_SYSTEM, format!("{kind} on {source}")),
        (None, Ok(magic)) => {
            Capability::unknown(FILE_SYSTEM, format!("of a kind that the system gives no name ({magic:#x})"))
        }
        (None, Err(error)) => Capability::unknown(FILE_SYSTEM, format!("{}: {error}", place.display())),
    }
}

fn is_network(kind: &str) -> bool {
    ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs", "wekafs"].contains(&kind)
        || kind.starts_with("fuse.sshfs")
}

/// Type and source of the mount with this device number. Lines are
/// `ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS [TAGS] - TYPE SOURCE OPTIONS`.
fn mount_of(mountinfo: &str, device: u64) -> Option<(String, String)> {
    let (major, minor) = udev::split(device);
    let number = format!("{major}:{minor}");
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        (before.split(' ').nth(2)? == number).then_some((after.next()?.to_string(), after.next()?.to_string()))
    })
}

fn direct_io(file: Option<&Path>) -> Capability {
    let Some(path) = file else {
        return Capability::unknown(
            DIRECT_IO,
            "there is no file to try it on; ask again when the store holds something",
        );
    };
    let opened = FileStorage::new().open(path, OpenMode::Read).and_then(|file| Ok((file, File::open(path)?)));
    let (stored, plain) = match opened {
        Ok(opened) => opened,
        Err(error) => return Capability::unknown(DIRECT_IO, format!("{}: {error}", path.display())),
    };
    const REMEDY: &str = "put the store on ext4, xfs or btrfs; it works without, through the page cache";
    if !stored.direct() {
        return Capability::no(DIRECT_IO, "the file system refuses it", REMEDY);
    }
    match sys::direct_alignment(&plain) {
        Ok(Some((_, 0))) => Capability::no(DIRECT_IO, "the file system takes it, and has none for this file", REMEDY),
        Ok(Some((memory, offset))) if u64::from(memory.max(offset)) > DIRECT_ALIGN_BYTES => Capability::no(
            DIRECT_IO,
            format!(
                "addresses in steps of {memory} and offsets in steps of {offset} bytes; alight aligns to {DIRECT_ALIGN_BYTES}"
            ),
            "make the file system with blocks of 4096 bytes",
        ),
        Ok(Some((memory, offset))) => Capability::yes(
            DIRECT_IO,
            format!(
                "addresses in steps of {memory}, offsets in steps of {offset} bytes; alight aligns to {DIRECT_ALIGN_BYTES}"
            ),
        ),
        Ok(None) | Err(_) => Capability::yes(DIRECT_IO, "the kernel does not tell its alignment (STATX_DIOALIGN)"),
    }
}

fn mapping(file: Option<&Path>) -> Capability {
    let Some(path) = file else {
        return Capability::unknown(MAPPING, "there is no file to try it on; ask again when the store holds something");
    };
    match FileStorage::new().open(path, OpenMode::Read).and_then(|file| file.map(1).map(drop)) {
        Ok(()) => Capability::yes(MAPPING, "files of this file system may be mapped; the index is read in place"),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Capability::no(
            MAPPING,
            "a mapped file of this file system could kill the process; the index is read into memory",
            "put the store on a local disk; opening it is then faster",
        ),
        Err(error) => Capability::unknown(MAPPING, format!("{}: {error}", path.display())),
    }
}

fn disk_in_udev(device: u64, uses_cufile: bool) -> Capability {
    let answer = udev::ask(device);
    let remedy = answer.remedy().unwrap_or_default();
    match answer {
        udev::Answer::Knows => Capability::yes(UDEV, "it holds a file system: cuFile takes its files"),
        _ if !uses_cufile => Capability::unknown(UDEV, "not asked, since only cuFile needs it and cuFile is not open"),
        udev::Answer::DoesNotKnow(path) => {
            Capability::no(UDEV, format!("{} does not say so: cuFile refuses its files", path.display()), remedy)
        }
        udev::Answer::NoDisk => {
            Capability::no(UDEV, "there is no disk of its own below: cuFile may refuse its files", remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Answer;
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_device_number() {
        let mountinfo = "24 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
                         30 24 0:27 / /dev/shm rw,nosuid - tmpfs tmpfs rw\n\
                         40 24 0:51 / /mnt/a\\040b rw master:2 shared:9 - nfs4 host:/x rw\n";
        let of = |device| mount_of(mountinfo, device);
        assert_eq!(of(254 << 8 | 1), Some(("ext4".into(), "/dev/vda1".into())));
        assert_eq!(of(27), Some(("tmpfs".into(), "tmpfs".into())));
        assert_eq!(of(51), Some(("nfs4".into(), "host:/x".into())));
        assert_eq!(of(52), None);
    }

    #[test]
    fn a_place_that_is_not_there_yet_is_judged_by_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(existing(&folder.path().join("a/b/c")).unwrap(), folder.path());
        assert_eq!(existing(Path::new("not-there-at-all")).unwrap(), std::env::current_dir().unwrap());
        let root = System { root: PathBuf::from("/") };
        let rows = probe(&root, Some(&folder.path().join("a/b")), true);
        assert_eq!(rows.iter().map(|row| row.name).collect::<Vec<_>>(), [FILE_SYSTEM, DIRECT_IO, MAPPING, UDEV]);
        assert_eq!((rows[1].answer, rows[2].answer), (Answer::Unknown, Answer::Unknown), "no file to try on");
        fs::write(folder.path().join("file"), "x").unwrap();
        let rows = probe(&root, Some(folder.path()), true);
        assert_ne!(rows[1].answer, Answer::Unknown, "{rows:?}");
    }

    #[test]
    fn a_file_system_in_memory_is_told() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
        let rows = probe(&System { root: PathBuf::from("/") }, Some(folder.path()), true);
        assert!(rows[0].answer == Answer::No && rows[0].reason.contains("tmpfs"), "{rows:?}");
        assert!(rows[3].remedy.as_ref().is_some_and(|remedy| remedy.contains("tmpfs")), "{rows:?}");
    }
}
