//! What the twin adds to the suite that every implementation passes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::*;
use crate::storage::{AlignedBuf, Caching, write_all_at};

mod crash;
mod faults;
mod property;

mod suite {
    use super::*;
    crate::storage::suite::suite!((SimStorage::new(), PathBuf::from("/"), ()));
}

fn path(name: &str) -> PathBuf {
    Path::new("/").join(name)
}

fn create(sim: &SimStorage, name: &str, bytes: &[u8]) -> Arc<dyn StorageFile> {
    let file = sim.open(&path(name), OpenMode::CreateNew).unwrap();
    write_all_at(&*file, bytes, 0, Caching::Buffered).unwrap();
    file
}

fn create_durably(sim: &SimStorage, name: &str, bytes: &[u8]) -> Arc<dyn StorageFile> {
    let file = create(sim, name, bytes);
    file.sync().unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    file
}

fn write(file: &dyn StorageFile, bytes: &[u8], offset: u64) {
    write_all_at(file, bytes, offset, Caching::Buffered).unwrap();
}

#[test]
fn a_disk_and_its_states_can_be_checked_from_other_threads() {
    fn assert_send_and_sync<T: Send + Sync>() {}
    assert_send_and_sync::<SimStorage>();
    assert_send_and_sync::<CrashWalker>();
    assert_send_and_sync::<Trace>();
}

#[test]
fn the_same_calls_make_the_same_trace_and_the_same_states() {
    let run = || {
        let sim = SimStorage::new();
        sim.create_dir(&path("d")).unwrap();
        let file = create(&sim, "d/f", &[3; 10_000]);
        file.sync().unwrap();
        write(&*file, &[4; 700], 9_900);
        sim.rename(&path("d/f"), &path("g")).unwrap();
        let mut walker = sim.trace().walk();
        let mut prints = Vec::new();
        while walker.next_cut() {
            let random = (0..5).map(Choice::Random);
            prints.extend(walker.choices().into_iter().chain(random).map(|c| walker.materialize(&c).fingerprint()));
        }
        (sim.trace().to_string(), prints)
    };
    assert_eq!(run(), run());
}

#[test]
fn a_trace_reads_as_a_list_of_calls() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[3; 10]);
    file.sync().unwrap();
    sim.marker(7);
    sim.note("a word");
    sim.rename(&path("f"), &path("g")).unwrap();
    assert!(sim.remove(&path("f")).is_err());
    let text = sim.trace().to_string();
    let lines: Vec<&str> = text.lines().map(|line| line.split_once("  #").map_or(line, |(_, call)| call)).collect();
    assert_eq!(
        lines,
        [
            "0     open        /f",
            "1     write       /f [0 +10]",
            "2     sync        /f",
            "     4  ------ marker 7",
            "     5  ------ a word",
            "3     rename      /f -> /g",
            "4     remove      /f = entity not found",
        ]
    );
    assert_eq!(sim.trace().len(), 7);
    assert_eq!(sim.calls_made(), 5);
}

#[test]
fn a_cloned_disk_goes_its_own_way() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"before");
    let other = sim.clone_disk();
    assert_eq!(sim.fingerprint(), other.fingerprint());
    write(&*file, b"after!", 0);
    assert_eq!(other.read_file("/f"), b"before");
    assert_ne!(sim.fingerprint(), other.fingerprint());
    other.remove_file("/f");
    assert_eq!(sim.read_file("/f"), b"after!");
    // A lock of the one is none of the other.
    let _held = sim.lock(&path("LOCK"), "x").unwrap();
    sim.clone_disk().lock(&path("LOCK"), "y").unwrap();
}

#[test]
fn a_fingerprint_tells_names_lengths_bytes_and_holes_apart() {
    let print = |make: &dyn Fn(&SimStorage)| {
        let sim = SimStorage::new();
        make(&sim);
        sim.fingerprint()
    };
    let prints = [
        print(&|_| {}),
        print(&|sim| sim.create_dir(&path("a")).unwrap()),
        print(&|sim| drop(create(sim, "a", b""))),
        print(&|sim| drop(create(sim, "b", b""))),
        print(&|sim| drop(create(sim, "a", b"x"))),
        print(&|sim| drop(create(sim, "a", b"x\0"))),
        print(&|sim| drop(create(sim, "a", &[0; 4096]))),
        print(&|sim| create(sim, "a", b"").truncate(4096).unwrap()),
        print(&|sim| write(&*create(sim, "a", b""), b"x", 4096)),
        print(&|sim| drop((create(sim, "a", b"x"), create(sim, "b", b"y")))),
        print(&|sim| drop((create(sim, "a", b"y"), create(sim, "b", b"x")))),
    ];
    let distinct: std::collections::BTreeSet<u64> = prints.iter().copied().collect();
    assert_eq!(distinct.len(), prints.len());
    assert_eq!(prints[4], print(&|sim| write(&*create(sim, "a", b"y"), b"x", 0)), "history must not show");
}

#[test]
fn what_a_test_does_behind_the_stores_back_is_durable_at_once() {
    let sim = SimStorage::new();
    sim.create_dir(&path("d")).unwrap();
    let file = create(&sim, "d/f", &[0xF0; 5000]);
    sim.copy_file("/d/f", "/d/copy");
    sim.flip_bit("/d/f", 4999, 0);
    sim.write_file("/new", b"made");
    assert_eq!(sim.files(), [path("d/copy"), path("d/f"), path("new")]);
    assert_eq!(sim.read_file("/d/f")[4998..], [0xF0, 0xF1]);
    // The handle sees it, since it is the same file.
    let mut byte = [0];
    file.read_at(&mut byte, 4999, Caching::Buffered).unwrap();
    assert_eq!(byte, [0xF1]);
    sim.truncate_file("/d/copy", 3);
    sim.remove_file("/new");
    assert!(!sim.has_file("/new"));
    let mut walker = sim.trace().walk_to(sim.trace().len());
    assert!(!walker.advance());
    assert_eq!(walker.materialize(&Choice::None).read_file("/d/copy"), [0xF0; 3]);
    assert_eq!(walker.materialize(&Choice::None).fingerprint(), sim.fingerprint());
}

#[test]
#[should_panic(expected = "a direct transfer that is not aligned")]
fn a_misaligned_direct_transfer_is_a_mistake_of_ours() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[1; 8192]);
    let mut buf = AlignedBuf::zeroed(8192);
    let _ = file.read_at(&mut buf[..4096], 512, Caching::Direct);
}

#[test]
#[should_panic(expected = "bytes are changed that are mapped")]
fn a_write_to_mapped_bytes_is_a_mistake_of_ours() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[1; 8192]);
    let _map = file.map(4096).unwrap();
    write(&*file, b"behind the mapping", 4096);
    write(&*file, b"into it", 4095);
}

#[test]
fn a_mapping_that_is_gone_binds_nobody() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[1; 8192]);
    drop(file.map(8192).unwrap());
    file.truncate(0).unwrap();
}

#[test]
fn abilities_can_be_taken_away() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[1; 8192]);
    assert_eq!(file.resident(0, 1).unwrap(), None);
    assert!(file.direct());
    let abilities = Abilities {
        direct: false,
        map: false,
        allocate: false,
        punch: false,
        share_bytes: false,
        link: false,
        reflink: false,
        resident: Some(true),
    };
    sim.set_abilities(abilities);
    assert_eq!(sim.share_byte(&path("READERS"), 1).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(sim.lowest_shared_byte(&path("READERS"), 1).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file.map(1).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file.allocate(0, 1).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file.punch(0, 1).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(sim.link(&path("f"), &path("g")).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(sim.reflink(&path("f"), &path("g")).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(!sim.has_file("/g"));
    assert_eq!(file.resident(0, 1).unwrap(), Some(true));
    assert!(!file.direct());
    assert_eq!(file.raw_fd(), None);
}

#[test]
fn the_next_data_is_exact_to_the_page() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"");
    file.allocate(0, 1 << 20).unwrap();
    assert_eq!(file.next_data(0).unwrap(), None);
    write(&*file, b"x", 50_000);
    assert_eq!(file.next_data(0).unwrap(), Some(50_000 / 4096 * 4096));
    assert_eq!(file.next_data(50_001).unwrap(), Some(50_001));
    assert_eq!(file.next_data(53_248).unwrap(), None);
}

#[test]
fn files_that_nobody_can_reach_take_no_space() {
    let sim = SimStorage::new();
    sim.set_capacity(Some(100 << 12));
    let free = || sim.free_bytes(Path::new("/")).unwrap() >> 12;
    let file = create(&sim, "f", &[1; 10 << 12]);
    assert_eq!(free(), 90);
    sim.remove(&path("f")).unwrap();
    assert_eq!(free(), 90, "a handle still leads to it");
    drop(file);
    assert_eq!(free(), 100);
    drop(create(&sim, "a", &[1; 10 << 12]));
    drop(create(&sim, "b", &[1; 5 << 12]));
    sim.rename(&path("b"), &path("a")).unwrap();
    assert_eq!(free(), 95);
}
