//! Calls that fail as they are told to.

use super::*;

fn kind<T>(result: io::Result<T>) -> ErrorKind {
    result.err().expect("an error").kind()
}

/// A run that makes one call of each kind that changes something, and says where it first failed.
fn run(sim: &SimStorage) -> io::Result<()> {
    sim.create_dir(&path("d"))?;
    let file = sim.open(&path("d/f.tmp"), OpenMode::CreateNew)?;
    file.allocate(0, 8192)?;
    write_all_at(&*file, &[1; 4096], 0, Caching::Buffered)?;
    let mut buf = [0; 100];
    crate::storage::read_exact_at(&*file, &mut buf, 0, Caching::Buffered)?;
    file.sync()?;
    sim.rename(&path("d/f.tmp"), &path("d/f"))?;
    sim.sync_dir(&path("d"))
}

#[test]
fn every_call_can_be_failed_by_its_number() {
    let whole = SimStorage::new();
    run(&whole).unwrap();
    let calls = whole.calls_made();
    assert_eq!(calls, 8);
    for n in 0..calls {
        let sim = SimStorage::new();
        sim.inject(Fault::new(FaultKind::Eio, n));
        assert_eq!(run(&sim).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!((sim.calls_made(), sim.faults_struck()), (n + 1, 1));
        // Once: the next run gets through, after what is in its way is gone.
        if !sim.has_file("/d/f") && sim.list(&path("d")).is_err() {
            run(&sim).unwrap();
        }
    }
    let sim = SimStorage::new();
    sim.inject(Fault::new(FaultKind::Eio, calls));
    run(&sim).unwrap();
    assert_eq!(sim.faults_struck(), 0);
}

#[test]
fn a_call_that_fails_has_no_effect_but_where_it_says_so() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"old");
    let before = sim.fingerprint();
    for fault in [FaultKind::Eio, FaultKind::Enospc, FaultKind::Edquot] {
        sim.inject(Fault::new(fault, 0).from_then_on());
        file.allocate(0, 100_000).unwrap_err();
        write_all_at(&*file, b"new", 0, Caching::Buffered).unwrap_err();
        sim.open(&path("g"), OpenMode::CreateNew).unwrap_err();
        sim.rename(&path("f"), &path("g")).unwrap_err();
        sim.clear_faults();
        assert_eq!(sim.fingerprint(), before);
    }
    sim.inject(Fault::new(FaultKind::EioAfter, 0).on(OpKind::Rename));
    sim.rename(&path("f"), &path("g")).unwrap_err();
    assert_eq!(sim.read_file("/g"), b"old");
}

#[test]
fn each_kind_answers_as_the_system_would() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"old");
    for (fault, expected) in
        [(FaultKind::Enospc, ErrorKind::StorageFull), (FaultKind::Edquot, ErrorKind::QuotaExceeded)]
    {
        sim.inject(Fault::new(fault, 0).on(OpKind::Allocate));
        assert_eq!(kind(file.allocate(0, 1)), expected);
    }
    sim.inject(Fault::new(FaultKind::Eintr, 0).on(OpKind::Write));
    assert_eq!(kind(file.write_vectored_at(&[io::IoSlice::new(b"x")], 0, Caching::Buffered)), ErrorKind::Interrupted);
    assert_eq!(sim.faults_struck(), 3);
}

#[test]
fn short_and_interrupted_transfers_are_continued_by_the_helpers() {
    for fault in [FaultKind::Short, FaultKind::Eintr] {
        for op in [OpKind::Read, OpKind::Write] {
            let sim = SimStorage::new();
            let file = create(&sim, "f", b"");
            let mut bytes = AlignedBuf::zeroed(12_288);
            bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 253) as u8);
            // Interrupted for ever would be for ever; interrupted a few times is enough.
            for n in 0..5 {
                sim.inject(Fault::new(fault, n).on(op));
            }
            for caching in [Caching::Buffered, Caching::Direct] {
                write_all_at(&*file, &bytes, 4096, caching).unwrap();
                let mut back = AlignedBuf::zeroed(12_288);
                crate::storage::read_exact_at(&*file, &mut back, 4096, caching).unwrap();
                assert_eq!(*back, *bytes, "{fault:?} {op} {caching:?}");
            }
            assert_eq!(sim.faults_struck(), 5, "{fault:?} {op}");
        }
    }
}

#[test]
fn faults_choose_by_kind_and_by_path_and_may_go_on() {
    let sim = SimStorage::new();
    let segment = create(&sim, "1.seg", b"");
    let index = create(&sim, "1.idx", b"");
    sim.inject(Fault::new(FaultKind::Eio, 1).on(OpKind::Sync).path_ending(".seg").from_then_on());
    index.sync().unwrap();
    segment.sync().unwrap();
    index.sync().unwrap();
    segment.sync().unwrap_err();
    index.sync().unwrap();
    segment.sync().unwrap_err();
    sim.clear_faults();
    segment.sync().unwrap();
    // Of a rename, either path counts.
    sim.inject(Fault::new(FaultKind::Eio, 0).path_ending("MANIFEST"));
    sim.rename(&path("1.idx"), &path("MANIFEST")).unwrap_err();
}

#[test]
fn a_kind_that_a_call_cannot_show_passes_it_by() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"x");
    for fault in [FaultKind::Short, FaultKind::FailedSync, FaultKind::Eintr, FaultKind::Enospc] {
        sim.inject(Fault::new(fault, 0).on(OpKind::Facts));
    }
    file.facts().unwrap();
    assert_eq!(sim.faults_struck(), 0);
}

#[test]
fn a_full_disk_takes_what_fits_and_then_nothing() {
    let sim = SimStorage::new();
    sim.set_capacity(Some(16_384));
    let file = create(&sim, "f", b"");
    assert_eq!(kind(file.allocate(0, 16_385)), ErrorKind::StorageFull);
    assert_eq!(file.facts().unwrap().len_bytes, 0);
    assert_eq!(file.write_vectored_at(&[io::IoSlice::new(&[1; 40_000])], 100, Caching::Buffered).unwrap(), 16_284);
    assert_eq!(kind(write_all_at(&*file, b"x", 16_384, Caching::Buffered)), ErrorKind::StorageFull);
    // What is taken already can be written again, and given back.
    write(&*file, &[2; 16_384], 0);
    assert_eq!(sim.free_bytes(&path("f")).unwrap(), 0);
    file.punch(0, 4096).unwrap();
    write(&*file, b"x", 0);
    file.truncate(0).unwrap();
    file.allocate(0, 16_384).unwrap();
    sim.set_capacity(None);
    write(&*file, &[3; 40_000], 0);
}

#[test]
fn a_disk_for_reading_is_read_and_nothing_else() {
    let sim = SimStorage::new();
    let file = create(&sim, "f", b"x");
    sim.set_read_only(true);
    let before = sim.fingerprint();
    assert_eq!(kind(sim.open(&path("f"), OpenMode::ReadWrite)), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(sim.open(&path("g"), OpenMode::CreateNew)), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(sim.lock(&path("LOCK"), "x")), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(sim.create_dir(&path("d"))), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(sim.remove(&path("f"))), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(sim.rename(&path("f"), &path("g"))), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(write_all_at(&*file, b"y", 0, Caching::Buffered)), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(kind(file.truncate(0)), ErrorKind::ReadOnlyFilesystem);
    sim.open(&path("f"), OpenMode::Read).unwrap();
    assert_eq!((sim.read_file("/f"), sim.fingerprint()), (b"x".to_vec(), before));
}
