//! What a crash can show, told as stories; `property` says the same of calls that nobody thought of.

use std::collections::BTreeSet;

use super::*;

/// Every state after the whole trace: all choices, and some random ones.
fn states_at_the_end(sim: &SimStorage) -> Vec<SimStorage> {
    let trace = sim.trace();
    let walker = trace.walk_to(trace.len());
    states(&walker)
}

fn states(walker: &CrashWalker) -> Vec<SimStorage> {
    let random = (0..50).map(Choice::Random);
    walker.choices().into_iter().chain(random).map(|choice| walker.materialize(&choice)).collect()
}

/// What `/name` holds in each state; `None` where it is missing.
fn contents(states: &[SimStorage], name: &str) -> BTreeSet<Option<Vec<u8>>> {
    let content = |state: &SimStorage| state.has_file(path(name)).then(|| state.read_file(path(name)));
    states.iter().map(content).collect()
}

fn set<const N: usize>(contents: [Option<&[u8]>; N]) -> BTreeSet<Option<Vec<u8>>> {
    contents.into_iter().map(|content| content.map(<[u8]>::to_vec)).collect()
}

#[test]
fn a_synced_file_with_a_synced_name_survives_every_crash() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"kept");
    let after = states_at_the_end(&sim);
    assert_eq!(contents(&after, "f"), set([Some(b"kept")]));
    assert!(after.iter().all(|state| state.fingerprint() == sim.fingerprint()));
}

#[test]
fn a_file_without_a_synced_name_can_be_lost_however_often_it_was_synced() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"synced");
    file.sync().unwrap();
    file.sync().unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None, Some(b"synced")]));
}

#[test]
fn a_second_name_is_durable_once_its_own_directory_is_synced() {
    let sim = SimStorage::new();
    sim.create_dir(&path("d")).unwrap();
    create_durably(&sim, "f", b"kept");
    sim.link(&path("f"), &path("d/g")).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "d/g"), set([None, Some(b"kept")]));
    sim.sync_dir(&path("d")).unwrap();
    // And it stays when the first one goes, in whatever order that becomes durable.
    sim.remove(&path("f")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "d/g"), set([Some(b"kept")]));
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None, Some(b"kept")]));
}

#[test]
fn a_reflink_is_durable_as_a_file_that_was_written_is() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"kept");
    sim.reflink(&path("f"), &path("g")).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    let seen = contents(&states_at_the_end(&sim), "g");
    assert!(seen.is_superset(&set([Some(b""), Some(b"kept"), Some(&[0; 4])])), "{seen:?}");
    sim.open(&path("g"), OpenMode::ReadWrite).unwrap().sync().unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "g"), set([Some(b"kept")]));
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"kept")]));
}

#[test]
fn a_synced_name_of_an_unsynced_file_can_lead_to_nothing() {
    let sim = SimStorage::new();
    create(&sim, "f", b"bytes");
    sim.sync_dir(Path::new("/")).unwrap();
    let seen = contents(&states_at_the_end(&sim), "f");
    assert!(seen.is_superset(&set([Some(b""), Some(b"bytes"), Some(&[0; 5])])), "{seen:?}");
    assert!(!seen.contains(&None));
}

#[test]
fn a_directory_whose_name_was_lost_takes_everything_in_it_along() {
    let sim = SimStorage::new();
    sim.create_dir(&path("d")).unwrap();
    create(&sim, "d/f", b"x").sync().unwrap();
    sim.sync_dir(&path("d")).unwrap();
    let lost = states_at_the_end(&sim).into_iter().filter(|state| state.files().is_empty()).count();
    assert!(lost > 0);
    sim.sync_dir(Path::new("/")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "d/f"), set([Some(b"x")]));
}

#[test]
fn a_rename_shows_the_old_file_or_the_new_one_and_never_neither() {
    let sim = SimStorage::new();
    create_durably(&sim, "MANIFEST", b"old");
    sim.start_recording();
    create(&sim, "MANIFEST.tmp", b"new").sync().unwrap();
    sim.rename(&path("MANIFEST.tmp"), &path("MANIFEST")).unwrap();
    sim.marker(1);
    sim.sync_dir(Path::new("/")).unwrap();
    sim.marker(2);
    let mut walker = sim.trace().walk();
    while walker.next_cut() {
        let seen = contents(&states(&walker), "MANIFEST");
        match walker.markers() {
            [] => assert_eq!(seen, set([Some(b"old")])),
            [1] => assert_eq!(seen, set([Some(b"old"), Some(b"new")])),
            _ => assert_eq!(seen, set([Some(b"new")])),
        }
    }
}

#[test]
fn a_rename_before_the_sync_of_what_is_renamed_can_show_an_empty_file() {
    let sim = SimStorage::new();
    create_durably(&sim, "MANIFEST", b"old");
    create(&sim, "MANIFEST.tmp", b"new");
    sim.rename(&path("MANIFEST.tmp"), &path("MANIFEST")).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    assert!(contents(&states_at_the_end(&sim), "MANIFEST").contains(&Some(Vec::new())));
}

#[test]
fn a_rename_between_directories_is_whole_and_durable_once_both_are_synced() {
    let sim = SimStorage::new();
    for dir in ["a", "b"] {
        sim.create_dir(&path(dir)).unwrap();
    }
    sim.sync_dir(Path::new("/")).unwrap();
    create(&sim, "a/f", b"x").sync().unwrap();
    sim.sync_dir(&path("a")).unwrap();
    sim.rename(&path("a/f"), &path("b/f")).unwrap();
    sim.sync_dir(&path("b")).unwrap();
    let between = states_at_the_end(&sim);
    assert!(between.iter().all(|state| state.files().len() == 1));
    assert_eq!(contents(&between, "b/f"), set([None, Some(b"x")]));
    sim.sync_dir(&path("a")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "b/f"), set([Some(b"x")]));
    // A name that a rename left free is taken and synced: the rename has to be there too, whatever was synced of it.
    sim.rename(&path("b/f"), &path("a/f")).unwrap();
    create(&sim, "b/f", b"y").sync().unwrap();
    sim.sync_dir(&path("b")).unwrap();
    let after = states_at_the_end(&sim);
    assert_eq!(contents(&after, "b/f"), set([Some(b"y")]));
    assert_eq!(contents(&after, "a/f"), set([Some(b"x")]));
}

#[test]
fn a_removal_can_be_undone_by_a_crash_until_its_directory_is_synced() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"x");
    sim.remove(&path("f")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None, Some(b"x")]));
    sim.sync_dir(Path::new("/")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None]));
}

#[test]
fn a_write_is_torn_by_sectors_and_by_pages() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", &[1; 16_384]);
    sim.start_recording();
    write(&*file, &[2; 8192], 4096);
    let walker = sim.trace().walk_to(1);
    let torn = |unit, keep| {
        let state = walker.materialize(&Choice::Torn { op: 0, unit, keep, others: Others::Kept });
        let bytes = state.read_file("/f");
        assert_eq!(bytes.len(), 16_384);
        // One letter a sector.
        bytes
            .chunks(512)
            .map(|s| if s.iter().all(|b| *b == s[0]) { (b'0' + s[0]) as char } else { '?' })
            .collect::<String>()
    };
    let old = "1".repeat(8);
    assert_eq!(torn(Unit::Sector, Keep::Prefix(1)), format!("{old}2111111111111111{old}"));
    assert_eq!(torn(Unit::Sector, Keep::Suffix(3)), format!("{old}1111111111111222{old}"));
    assert_eq!(torn(Unit::Sector, Keep::Even), format!("{old}2121212121212121{old}"));
    assert_eq!(torn(Unit::Page, Keep::Odd), format!("{old}1111111122222222{old}"));
    assert_eq!(torn(Unit::Sector, Keep::LengthOnly), "1".repeat(32));
    let mask = torn(Unit::Sector, Keep::Mask(3));
    assert!(mask[8..24].contains('1') && mask[8..24].contains('2'), "{mask}");
    let noise =
        walker.materialize(&Choice::Torn { op: 0, unit: Unit::Sector, keep: Keep::Noise(1), others: Others::Kept });
    let bytes = noise.read_file("/f");
    assert_eq!((&bytes[..4096], &bytes[12_288..]), (&[1; 4096][..], &[1; 4096][..]));
    assert!(bytes[4096..12_288].iter().collect::<BTreeSet<_>>().len() > 200);
}

#[test]
fn a_write_that_lengthens_a_file_can_leave_it_short_or_full_of_zeros() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", b"abc");
    sim.start_recording();
    write(&*file, &[7; 1500], 3);
    let walker = sim.trace().walk_to(1);
    let state = |keep| walker.materialize(&Choice::Torn { op: 0, unit: Unit::Sector, keep, others: Others::Kept });
    assert_eq!(state(Keep::Prefix(1)).read_file("/f").len(), 512);
    assert_eq!(state(Keep::Prefix(0)).read_file("/f"), b"abc");
    let mut zeros = b"abc".to_vec();
    zeros.resize(1503, 0);
    assert_eq!(state(Keep::LengthOnly).read_file("/f"), zeros);
    let tail = state(Keep::Suffix(1)).read_file("/f");
    assert_eq!((tail.len(), &tail[3..1024], &tail[1024..]), (1503, &[0; 1021][..], &[7; 479][..]));
}

#[test]
fn a_sector_that_is_written_brings_what_was_in_it_then() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", &[0; 512]);
    sim.start_recording();
    write(&*file, b"first", 0);
    write(&*file, b"second", 5);
    // The second alone is no state of a disk: the sector that brings it was written with the first already in it.
    let state = sim.trace().walk_to(2).materialize(&Choice::OnlyOne(1));
    assert_eq!(&state.read_file("/f")[..12], b"firstsecond\0");
}

#[test]
fn a_failed_sync_leaves_changes_that_no_later_sync_makes_durable() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", &[0; 1024]);
    write(&*file, &[1; 512], 0);
    sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync));
    assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
    write(&*file, &[2; 512], 512);
    file.sync().unwrap();
    assert_eq!(sim.read_file("/f"), [[1; 512], [2; 512]].concat());
    let seen = contents(&states_at_the_end(&sim), "f");
    assert!(seen.is_superset(&set([Some(&[[0; 512], [2; 512]].concat()), Some(&[[1; 512], [2; 512]].concat())])));
    assert!(seen.iter().flatten().all(|bytes| bytes[512..] == [2; 512]), "the later sync covers the later write");
}

#[test]
fn a_later_write_over_one_whose_sync_failed_is_never_undone_by_it() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", b"old");
    write(&*file, b"bad", 0);
    sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::Sync));
    file.sync().unwrap_err();
    write(&*file, b"new", 0);
    file.sync().unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"new")]));
}

#[test]
fn a_failed_sync_of_a_directory_leaves_names_that_no_later_sync_makes_durable() {
    let sim = SimStorage::new();
    create(&sim, "f.tmp", b"x").sync().unwrap();
    sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::SyncDir));
    sim.sync_dir(Path::new("/")).unwrap_err();
    sim.rename(&path("f.tmp"), &path("f")).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    let after = states_at_the_end(&sim);
    assert_eq!(contents(&after, "f"), set([None, Some(b"x")]), "the name rests on one that may be lost");
    assert_eq!(contents(&after, "f.tmp"), set([None]));
}

#[test]
fn a_directory_whose_name_a_failed_sync_lost_is_durable_once_it_was_made_anew() {
    for made_anew in [false, true] {
        let sim = SimStorage::new();
        sim.create_dir(&path("d")).unwrap();
        sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::SyncDir));
        sim.sync_dir(Path::new("/")).unwrap_err();
        if made_anew {
            sim.remove_dir(&path("d")).unwrap();
            sim.create_dir(&path("d")).unwrap();
        }
        sim.sync_dir(Path::new("/")).unwrap();
        create(&sim, "d/f", b"x").sync().unwrap();
        sim.sync_dir(&path("d")).unwrap();
        let expected = if made_anew { set([Some(b"x")]) } else { set([None, Some(b"x")]) };
        assert_eq!(contents(&states_at_the_end(&sim), "d/f"), expected);
    }
}

#[test]
fn a_sync_that_merely_fails_leaves_its_changes_to_the_next() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", b"old");
    write(&*file, b"new", 0);
    sim.inject(Fault::new(FaultKind::Eio, 0).on(OpKind::Sync));
    file.sync().unwrap_err();
    file.sync().unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"new")]));
}

#[test]
fn allocated_space_and_punched_holes_are_in_doubt_like_writes() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", &[1; 8192]);
    file.allocate(8192, 8192).unwrap();
    file.punch(0, 4096).unwrap();
    let lens = |states: &[SimStorage]| states.iter().map(|s| s.read_file("/f").len()).collect::<BTreeSet<_>>();
    let firsts = |states: &[SimStorage]| states.iter().map(|s| s.read_file("/f")[0]).collect::<BTreeSet<_>>();
    let before = states_at_the_end(&sim);
    assert_eq!((lens(&before), firsts(&before)), ([8192, 16_384].into(), [0, 1].into()));
    file.sync().unwrap();
    let after = states_at_the_end(&sim);
    assert_eq!((lens(&after), firsts(&after)), ([16_384].into(), [0].into()));
}

#[test]
fn a_cut_stands_at_the_last_moment_with_the_same_disk() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"1");
    sim.marker(1);
    let _ = file.facts();
    write(&*file, b"2", 0);
    sim.marker(2);
    file.sync().unwrap();
    sim.marker(3);
    file.sync().unwrap(); // Nothing is pending: nothing changes.
    sim.marker(4);
    let mut walker = sim.trace().walk();
    let mut cuts = Vec::new();
    while walker.next_cut() {
        cuts.push((walker.markers().last().copied(), walker.pending().len()));
    }
    // Before anything; the name; the first write; the second; the sync.
    assert_eq!(cuts, [(None, 0), (None, 1), (Some(1), 2), (Some(2), 3), (Some(4), 1)]);
}

/// The story: a manifest's rename whose sync had failed was lost, and took the next one with it, whose sync had not.
#[test]
fn a_name_that_was_synced_is_there_whatever_became_of_a_change_before_it() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"first");
    let replace = |bytes: &[u8]| {
        create(&sim, "f.tmp", bytes).sync().unwrap();
        sim.rename(&path("f.tmp"), &path("f")).unwrap();
        sim.sync_dir(&path(""))
    };
    sim.inject(Fault::new(FaultKind::FailedSync, 0).on(OpKind::SyncDir));
    replace(b"second").unwrap_err();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"first"), Some(b"second")]));
    replace(b"third").unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"third")]));
    sim.remove(&path("f")).unwrap();
    sim.sync_dir(&path("")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None]));
}

#[test]
fn a_marker_stands_after_what_its_thread_has_done() {
    let sim = SimStorage::new();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let sim = sim.clone();
            scope.spawn(move || {
                for i in 0..10 {
                    let number = thread * 10 + i;
                    create_durably(&sim, &number.to_string(), &number.to_le_bytes());
                    sim.marker(number);
                }
            });
        }
    });
    let mut walker = sim.trace().walk();
    while walker.next_cut() {
        let choices = walker.fresh_choices().into_iter().chain((0..3).map(Choice::Random));
        for choice in choices {
            let state = walker.materialize(&choice);
            for number in walker.markers() {
                assert_eq!(state.read_file(path(&number.to_string())), number.to_le_bytes());
            }
        }
    }
    assert_eq!(walker.markers().len(), 40);
}

#[test]
fn fresh_choices_single_out_the_last_event_alone() {
    let sim = SimStorage::new();
    let file = create_durably(&sim, "f", b"");
    sim.start_recording();
    for i in 0..20 {
        write(&*file, &[1; 512], i * 512);
    }
    let mut walker = sim.trace().walk();
    while walker.next_cut() {
        let about = |choice: &Choice| match *choice {
            Choice::DropOne(op) | Choice::OnlyOne(op) | Choice::Torn { op, .. } => Some(op),
            _ => None,
        };
        let singled_out: BTreeSet<usize> = walker.fresh_choices().iter().filter_map(about).collect();
        assert_eq!(singled_out, walker.pending().len().checked_sub(1).into_iter().collect());
    }
}

#[test]
fn a_state_is_a_disk_that_can_crash_again() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"first");
    let state = states_at_the_end(&sim).remove(0);
    state.start_recording();
    let file = state.open(&path("f"), OpenMode::ReadWrite).unwrap();
    create(&state, "g", b"another");
    write(&*file, b"again", 0);
    let seen = states_at_the_end(&state);
    assert!(contents(&seen, "f").is_superset(&set([Some(b"first"), Some(b"again")])));
    assert!(contents(&seen, "g").contains(&None));
}

#[test]
fn an_explanation_names_the_calls_and_their_fates() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", &[1; 2048]);
    write(&*file, &[2; 512], 0);
    let walker = sim.trace().walk_to(3);
    let text = walker.explain(&Choice::Torn { op: 1, unit: Unit::Sector, keep: Keep::Even, others: Others::Dropped });
    for part in
        ["after event 3 of 3", "[0] lost", "[1] torn by 512 bytes, Even", "[2] lost", "write       /f [0 +2048]"]
    {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

// The harness can see: each lie shows in some state.

#[test]
fn a_disk_that_ignores_a_files_sync_is_seen_to_lose_it() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"x");
    create_durably(&sim, "g", b"y");
    sim.set_sabotage(Sabotage { ignore_file_sync: Some("f".into()), ..Sabotage::default() });
    let after = states_at_the_end(&sim);
    assert!(contents(&after, "f").contains(&Some(Vec::new())));
    assert_eq!(contents(&after, "g"), set([Some(b"y")]));
}

#[test]
fn a_disk_that_ignores_a_directorys_sync_is_seen_to_lose_names() {
    let sim = SimStorage::new();
    sim.set_sabotage(Sabotage { ignore_dir_sync: Some(String::new()), ..Sabotage::default() });
    create_durably(&sim, "f", b"x");
    assert!(contents(&states_at_the_end(&sim), "f").contains(&None));
}

#[test]
fn a_disk_whose_renames_are_two_steps_is_seen_with_neither_file() {
    let sim = SimStorage::new();
    create_durably(&sim, "f", b"old");
    create_durably(&sim, "f.tmp", b"new");
    sim.start_recording();
    sim.rename(&path("f.tmp"), &path("f")).unwrap();
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([Some(b"old"), Some(b"new")]));
    sim.set_sabotage(Sabotage { rename_not_atomic: true, ..Sabotage::default() });
    assert_eq!(contents(&states_at_the_end(&sim), "f"), set([None, Some(b"old"), Some(b"new")]));
}
