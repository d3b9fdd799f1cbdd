//! One suite for every implementation of [`Storage`]: what each promises, and [random calls](model).

mod model;

use std::io::{self, ErrorKind, IoSlice};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(super) use model::any_calls_answer_as_the_model_does;

use super::{
    AlignedBuf, Arrival, BufferPool, Caching, OpenMode, Part, Parts, Storage, StorageFile, read_exact_at, write_all_at,
    write_all_vectored_at,
};

/// Makes every test of the suite for one implementation; `$make` answers a storage, an empty directory in it, and
/// whatever must live as long as they do.
macro_rules! suite {
    ($make:expr) => {
        $crate::storage::suite::suite!(@each $make,
            opening_follows_the_mode
            errors_have_the_kinds_that_callers_match_on
            a_directory_goes_when_it_is_empty
            bytes_written_are_read_back_and_gaps_are_zeros
            vectored_writes_land_one_after_another
            allocated_space_reads_as_zeros_and_punched_space_is_given_back
            truncation_cuts_and_regrowth_shows_zeros
            an_open_file_survives_rename_and_removal
            rename_replaces_what_bore_the_name
            a_second_name_leads_to_the_same_bytes
            a_reflink_is_another_file_with_the_same_bytes
            a_listing_has_every_name_once_with_its_length
            a_lock_excludes_every_other_handle_until_it_is_dropped
            a_shared_byte_is_seen_by_all_until_its_guards_are_dropped
            a_file_says_how_many_names_it_has
            a_mapping_shows_the_bytes_and_never_reaches_past_the_end
            direct_transfers_and_buffered_ones_see_each_other
            parts_land_where_they_belong
            no_data_is_ever_said_to_be_a_hole
            a_read_of_what_is_cached_answers_with_the_bytes_of_the_file_or_not_at_all
            a_file_that_is_wholly_read_is_said_to_be_resident_or_nothing_is_said
            any_calls_answer_as_the_model_does
        );
    };
    (@each $make:expr, $($name:ident)*) => {
        $(#[test]
        fn $name() {
            let (storage, root, _guard) = $make;
            $crate::storage::suite::$name(&storage, &root);
        })*
    };
}
pub(super) use suite;

fn create(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> Arc<dyn StorageFile> {
    let file = storage.open(path, OpenMode::CreateNew).unwrap();
    write_all_at(&*file, bytes, 0, Caching::Buffered).unwrap();
    file
}

fn content(file: &dyn StorageFile) -> Vec<u8> {
    let mut bytes = vec![0xEE; file.facts().unwrap().len_bytes as usize];
    read_exact_at(file, &mut bytes, 0, Caching::Buffered).unwrap();
    bytes
}

fn content_of(storage: &dyn Storage, path: &Path) -> Vec<u8> {
    content(&*storage.open(path, OpenMode::Read).unwrap())
}

fn kind<T>(result: io::Result<T>) -> ErrorKind {
    result.err().expect("an error").kind()
}

pub(super) fn opening_follows_the_mode(storage: &dyn Storage, root: &Path) {
    let path = root.join("f");
    assert_eq!(kind(storage.open(&path, OpenMode::Read)), ErrorKind::NotFound);
    assert_eq!(kind(storage.open(&path, OpenMode::ReadWrite)), ErrorKind::NotFound);
    let file = create(storage, &path, b"first");
    assert_eq!(kind(storage.open(&path, OpenMode::CreateNew)), ErrorKind::AlreadyExists);
    assert_eq!(content_of(storage, &path), b"first");
    let again = storage.open(&path, OpenMode::ReadWrite).unwrap();
    write_all_at(&*again, b"F", 0, Caching::Buffered).unwrap();
    assert_eq!(content(&*file), b"First");
    let read_only = storage.open(&path, OpenMode::Read).unwrap();
    assert!(read_only.write_vectored_at(&[IoSlice::new(b"x")], 0, Caching::Buffered).is_err());
    assert!(read_only.truncate(0).is_err());
    storage.open(&path, OpenMode::CreateTruncate).unwrap();
    assert_eq!(content(&*file), b"");
}

pub(super) fn errors_have_the_kinds_that_callers_match_on(storage: &dyn Storage, root: &Path) {
    create(storage, &root.join("f"), b"x");
    storage.create_dir(&root.join("d")).unwrap();
    assert_eq!(kind(storage.create_dir(&root.join("d"))), ErrorKind::AlreadyExists);
    assert_eq!(kind(storage.create_dir(&root.join("f"))), ErrorKind::AlreadyExists);
    assert_eq!(kind(storage.create_dir(&root.join("no/d"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.list(&root.join("no"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.list(&root.join("f"))), ErrorKind::NotADirectory);
    assert_eq!(kind(storage.sync_dir(&root.join("no"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.sync_dir(&root.join("f"))), ErrorKind::NotADirectory);
    assert_eq!(kind(storage.open(&root.join("d"), OpenMode::Read)), ErrorKind::IsADirectory);
    assert_eq!(kind(storage.open(&root.join("d"), OpenMode::ReadWrite)), ErrorKind::IsADirectory);
    assert_eq!(kind(storage.open(&root.join("no/f"), OpenMode::CreateNew)), ErrorKind::NotFound);
    assert_eq!(kind(storage.open(&root.join("f/f"), OpenMode::CreateNew)), ErrorKind::NotADirectory);
    assert_eq!(kind(storage.remove(&root.join("no"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.remove(&root.join("d"))), ErrorKind::IsADirectory);
    assert_eq!(kind(storage.remove_dir(&root.join("no"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.remove_dir(&root.join("f"))), ErrorKind::NotADirectory);
    assert_eq!(kind(storage.rename(&root.join("no"), &root.join("n"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.rename(&root.join("f"), &root.join("no/n"))), ErrorKind::NotFound);
    assert_eq!(kind(storage.rename(&root.join("f"), &root.join("d"))), ErrorKind::IsADirectory);
    assert_eq!(kind(storage.lock_holder(&root.join("no"))), ErrorKind::NotFound);
    assert!(storage.free_bytes(root).unwrap() > 0);
}

pub(super) fn a_directory_goes_when_it_is_empty(storage: &dyn Storage, root: &Path) {
    let (dir, file) = (root.join("d"), root.join("d/f"));
    storage.create_dir(&dir).unwrap();
    create(storage, &file, b"x");
    assert_eq!(kind(storage.remove_dir(&dir)), ErrorKind::DirectoryNotEmpty);
    assert_eq!(content_of(storage, &file), b"x");
    storage.remove(&file).unwrap();
    storage.remove_dir(&dir).unwrap();
    assert_eq!(kind(storage.list(&dir)), ErrorKind::NotFound);
    // The next of that name is another one.
    storage.create_dir(&dir).unwrap();
    assert_eq!(storage.list(&dir).unwrap(), []);
    storage.sync_dir(root).unwrap();
}

pub(super) fn bytes_written_are_read_back_and_gaps_are_zeros(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"abc");
    write_all_at(&*file, b"tail", 10_000, Caching::Buffered).unwrap();
    let mut expected = b"abc".to_vec();
    expected.resize(10_000, 0);
    expected.extend(b"tail");
    assert_eq!(content(&*file), expected);
    let mut buf = [0; 16];
    assert_eq!(file.read_at(&mut buf, 10_002, Caching::Buffered).unwrap(), 2);
    assert_eq!(file.read_at(&mut buf, 10_004, Caching::Buffered).unwrap(), 0);
    assert_eq!(file.read_at(&mut buf, 1 << 40, Caching::Buffered).unwrap(), 0);
    assert_eq!(kind(read_exact_at(&*file, &mut buf, 10_002, Caching::Buffered)), ErrorKind::UnexpectedEof);
    file.sync().unwrap();
    storage.sync_dir(root).unwrap();
}

pub(super) fn vectored_writes_land_one_after_another(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"");
    assert_eq!(file.write_vectored_at(&[], 0, Caching::Buffered).unwrap(), 0);
    let parts: Vec<Vec<u8>> = (0..3000u32).map(|i| i.to_le_bytes()[..(i % 5) as usize].to_vec()).collect();
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    write_all_vectored_at(&*file, &mut slices, 3, Caching::Buffered).unwrap();
    assert_eq!(content(&*file)[3..], parts.concat());
}

pub(super) fn allocated_space_reads_as_zeros_and_punched_space_is_given_back(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"abc");
    match file.allocate(0, 1 << 20) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return eprintln!("SKIPPED: this file system cannot allocate ahead: {error}");
        }
        answer => answer.unwrap(),
    }
    let facts = file.facts().unwrap();
    assert_eq!(facts.len_bytes, 1 << 20);
    assert!(facts.allocated_bytes >= 1 << 20, "{facts:?}");
    let mut expected = vec![0; 1 << 20];
    expected[..3].copy_from_slice(b"abc");
    assert_eq!(content(&*file), expected);

    write_all_at(&*file, &[7; 20_000], 0, Caching::Buffered).unwrap();
    expected[..20_000].fill(7);
    // A range that covers neither its first nor its last block whole, then one past the end.
    file.punch(100, 16_000).unwrap();
    expected[100..16_100].fill(0);
    assert_eq!(content(&*file), expected);
    file.punch(65_536, 4 << 20).unwrap();
    assert_eq!(content(&*file), expected);
    assert!(file.facts().unwrap().allocated_bytes <= 128 << 10, "{:?}", file.facts());
}

pub(super) fn truncation_cuts_and_regrowth_shows_zeros(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), &[9; 10_000]);
    file.truncate(5000).unwrap();
    file.truncate(10_000).unwrap();
    let mut expected = vec![9; 5000];
    expected.resize(10_000, 0);
    assert_eq!(content(&*file), expected);
    file.truncate(0).unwrap();
    assert_eq!(file.facts().unwrap().len_bytes, 0);
}

pub(super) fn an_open_file_survives_rename_and_removal(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"abc");
    storage.rename(&root.join("f"), &root.join("g")).unwrap();
    write_all_at(&*file, b"A", 0, Caching::Buffered).unwrap();
    assert_eq!(content_of(storage, &root.join("g")), b"Abc");
    storage.remove(&root.join("g")).unwrap();
    // Opened past the page cache only now, when it bears no name any more.
    let mut page = AlignedBuf::zeroed(4096);
    assert_eq!(file.read_at(&mut page, 0, Caching::Direct).unwrap(), 3);
    assert_eq!(&page[..3], b"Abc");
    create(storage, &root.join("g"), b"another");
    assert_eq!(content(&*file), b"Abc");
}

pub(super) fn rename_replaces_what_bore_the_name(storage: &dyn Storage, root: &Path) {
    let old = create(storage, &root.join("f"), b"old");
    create(storage, &root.join("f.tmp"), b"new");
    storage.rename(&root.join("f.tmp"), &root.join("f")).unwrap();
    assert_eq!(content_of(storage, &root.join("f")), b"new");
    assert_eq!(content(&*old), b"old");
    assert_eq!(kind(storage.open(&root.join("f.tmp"), OpenMode::Read)), ErrorKind::NotFound);
    storage.rename(&root.join("f"), &root.join("f")).unwrap();
    assert_eq!(content_of(storage, &root.join("f")), b"new");
}

pub(super) fn a_listing_has_every_name_once_with_its_length(storage: &dyn Storage, root: &Path) {
    storage.create_dir(&root.join("d")).unwrap();
    create(storage, &root.join("a"), b"four");
    create(storage, &root.join("b"), b"");
    create(storage, &root.join("d/inner"), b"x");
    let mut names: Vec<_> =
        storage.list(root).unwrap().into_iter().map(|entry| (entry.name, entry.is_dir, entry.len_bytes)).collect();
    names.sort();
    assert_eq!(names, [("a".into(), false, 4), ("b".into(), false, 0), ("d".into(), true, 0)]);
}

pub(super) fn a_second_name_leads_to_the_same_bytes(storage: &dyn Storage, root: &Path) {
    let (first, second) = (root.join("f"), root.join("g"));
    let file = create(storage, &first, b"abc");
    match storage.link(&first, &second) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return eprintln!("SKIPPED: files have one name each here: {error}");
        }
        answer => answer.unwrap(),
    }
    write_all_at(&*file, b"A", 0, Caching::Buffered).unwrap();
    assert_eq!(content_of(storage, &second), b"Abc");
    assert_eq!(file.facts().unwrap().links, 2);
    assert_eq!(kind(storage.link(&first, &second)), ErrorKind::AlreadyExists);
    assert_eq!(kind(storage.link(&root.join("no"), &root.join("h"))), ErrorKind::NotFound);
    // Two names of one file: renaming one to the other changes nothing.
    storage.rename(&first, &second).unwrap();
    assert_eq!(content_of(storage, &first), b"Abc");
    drop(file);
    storage.remove(&first).unwrap();
    assert_eq!(content_of(storage, &second), b"Abc");
    storage.rename(&second, &first).unwrap();
    assert_eq!(content_of(storage, &first), b"Abc");
}

pub(super) fn a_reflink_is_another_file_with_the_same_bytes(storage: &dyn Storage, root: &Path) {
    let (first, second) = (root.join("f"), root.join("g"));
    let file = create(storage, &first, &[7; 10_000]);
    create(storage, &root.join("taken"), b"x");
    assert_eq!(kind(storage.reflink(&first, &root.join("taken"))), ErrorKind::AlreadyExists);
    assert_eq!(kind(storage.reflink(&root.join("no"), &second)), ErrorKind::NotFound);
    match storage.reflink(&first, &second) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            assert_eq!(kind(storage.open(&second, OpenMode::Read)), ErrorKind::NotFound, "nothing is left of it");
            return eprintln!("SKIPPED: files share no space here: {error}");
        }
        answer => answer.unwrap(),
    }
    write_all_at(&*file, b"changed", 0, Caching::Buffered).unwrap();
    file.truncate(9000).unwrap();
    assert_eq!(content_of(storage, &second), [7; 10_000]);
}

pub(super) fn a_lock_excludes_every_other_handle_until_it_is_dropped(storage: &dyn Storage, root: &Path) {
    let path = root.join("LOCK");
    let first = storage.lock(&path, "the first holder, with a long text").unwrap();
    assert_eq!(kind(storage.lock(&path, "the second holder")), ErrorKind::WouldBlock);
    assert_eq!(storage.lock_holder(&path).unwrap(), "the first holder, with a long text");
    drop(first);
    let _third = storage.lock(&path, "the third holder").unwrap();
    assert_eq!(storage.lock_holder(&path).unwrap(), "the third holder");
    storage.lock(&root.join("OTHER"), "another lock").unwrap();
}

pub(super) fn a_shared_byte_is_seen_by_all_until_its_guards_are_dropped(storage: &dyn Storage, root: &Path) {
    let path = root.join("READERS");
    let lowest = |through| storage.lowest_shared_byte(&path, through).unwrap();
    assert_eq!(lowest(u64::MAX >> 2), None, "there is no file yet");
    let seven = storage.share_byte(&path, 7).unwrap();
    let again = storage.share_byte(&path, 7).unwrap();
    let large = storage.share_byte(&path, 1 << 40).unwrap();
    let three = storage.share_byte(&path, 3).unwrap();
    assert_eq!((lowest(1 << 41), lowest(3), lowest(2), lowest(0)), (Some(3), Some(3), None, None));
    drop(three);
    assert_eq!((lowest(1 << 41), lowest(7), lowest(6)), (Some(7), Some(7), None));
    drop(seven);
    assert_eq!(lowest(7), Some(7), "another guard holds it");
    drop(again);
    assert_eq!((lowest((1 << 40) - 1), lowest(1 << 40)), (None, Some(1 << 40)));
    drop(large);
    assert_eq!(lowest(1 << 41), None);
    let zero = storage.share_byte(&path, 0).unwrap();
    assert_eq!(lowest(9), Some(0));
    drop(zero);
}

pub(super) fn a_file_says_how_many_names_it_has(storage: &dyn Storage, root: &Path) {
    let file = storage.open(&root.join("f"), OpenMode::CreateNew).unwrap();
    assert_eq!(file.facts().unwrap().links, 1);
    storage.remove(&root.join("f")).unwrap();
    assert_eq!(file.facts().unwrap().links, 0);
}

pub(super) fn a_mapping_shows_the_bytes_and_never_reaches_past_the_end(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), &[5; 10_000]);
    match file.map(10_000) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return eprintln!("SKIPPED: this file system cannot map safely: {error}");
        }
        map => assert_eq!(map.unwrap().bytes(), [5; 10_000]),
    }
    assert_eq!(kind(file.map(10_001)), ErrorKind::InvalidInput);
    assert_eq!(file.map(0).unwrap().bytes(), b"");
    let map = file.map(3).unwrap();
    drop(file);
    storage.remove(&root.join("f")).unwrap();
    assert_eq!(map.bytes(), [5; 3]);
}

pub(super) fn direct_transfers_and_buffered_ones_see_each_other(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"");
    if !file.direct() {
        eprintln!("SKIPPED in part: this file system has no direct transfers, so these go through the page cache");
    }
    let mut pages = AlignedBuf::zeroed(16_384);
    pages.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
    let (head, tail) = pages.split_at(4096);
    write_all_vectored_at(&*file, &mut [IoSlice::new(head), IoSlice::new(tail)], 0, Caching::Direct).unwrap();
    assert_eq!(content(&*file), *pages);
    write_all_at(&*file, b"buffered", 8190, Caching::Buffered).unwrap();
    let mut back = AlignedBuf::zeroed(16_384);
    read_exact_at(&*file, &mut back, 0, Caching::Direct).unwrap();
    assert_eq!(&back[8190..8198], b"buffered");
    assert_eq!(&back[9000..], &pages[9000..]);
    // The last page of a file that ends inside it comes short, past the page cache too.
    file.truncate(8200).unwrap();
    assert_eq!(file.read_at(&mut back, 8192, Caching::Direct).unwrap(), 8);
    assert_eq!(&back[..8], [&b"ffered"[..], &pages[8198..8200]].concat());
}

pub(super) fn parts_land_where_they_belong(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"");
    // More than may be under way at a time; of one page to five, the last first.
    let lens: Vec<usize> = (0..50).map(|part| 4096 * (1 + part % 5)).collect();
    let total = lens.iter().sum();
    let pool = Arc::new(BufferPool::default());
    let mut whole = pool.take(total);
    whole.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 7 % 253) as u8);
    let expected = whole.to_vec();
    let mut end = total as u64;
    let mut parts = whole.cut(lens).into_iter().rev().map(|bytes| {
        end -= bytes.len() as u64;
        Part { offset: end, bytes: bytes.into() }
    });
    file.write_parts_at(&mut parts).unwrap();
    assert_eq!(content(&*file), expected);
    let mut found = AlignedBuf::zeroed(total);
    let (mut told, mut lens);
    for patience in [None, Some(Duration::from_secs(600)), Some(Duration::MAX)] {
        (told, lens) = (0, Vec::new());
        found.fill(0);
        let parts = Parts { offset: 0, len: total, part_bytes: 12_288 };
        let arrival = file.read_parts_at(&mut found, parts, patience, &mut |bytes| {
            assert!(*bytes == expected[told..][..bytes.len()], "told before it is there");
            told += bytes.len();
            lens.push(bytes.len());
        });
        let arrival = arrival.unwrap();
        if patience.is_some() && arrival == Arrival::WouldWait {
            eprintln!("SKIPPED in part: no reads here that can be waited for");
            continue;
        }
        assert_eq!(arrival, Arrival::Landed);
        assert!(found[..] == expected[..] && told == total);
        assert!(lens[..lens.len() - 1].iter().all(|&len| len == 12_288));
        told = 0;
        let past = Parts { offset: total as u64 - 8192, len: 16_384, part_bytes: 4096 };
        match file.read_parts_at(&mut found, past, patience, &mut |bytes| told += bytes.len()) {
            Ok(arrival) => assert!(patience.is_some() && arrival == Arrival::WouldWait),
            Err(error) => assert_eq!((error.kind(), told), (ErrorKind::UnexpectedEof, 8192)),
        }
    }
    let too_long = file.read_parts_at(&mut AlignedBuf::zeroed(4096), Parts::one(0, 8192), None, &mut |_| {});
    assert_eq!(too_long.unwrap_err().kind(), ErrorKind::InvalidInput);
    let refused = storage.open(&root.join("f"), OpenMode::Read).unwrap();
    let mut parts = pool.take(8192).cut([4096, 4096]).into_iter().map(|bytes| Part { offset: 0, bytes: bytes.into() });
    assert!(refused.write_parts_at(&mut parts).is_err());
    file.write_parts_at(&mut std::iter::empty()).unwrap();
    assert_eq!(content(&*file), expected);
}

pub(super) fn no_data_is_ever_said_to_be_a_hole(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), b"");
    file.truncate(1 << 20).unwrap();
    for at in [0u64, 300_000, 700_001] {
        write_all_at(&*file, &[1; 5000], at, Caching::Buffered).unwrap();
    }
    let bytes = content(&*file);
    for from in (0..1 << 20).step_by(10_007) {
        let data = bytes[from..].iter().position(|&byte| byte != 0).map(|after| (from + after) as u64);
        let found = file.next_data(from as u64).unwrap();
        match (data, found) {
            (Some(data), Some(found)) => assert!(from as u64 <= found && found <= data, "{from}: {found} > {data}"),
            (Some(data), None) => panic!("{from}: data at {data} is said to be a hole"),
            (None, _) => {}
        }
    }
    assert_eq!(file.next_data(1 << 20).unwrap(), None);
    assert_eq!(file.next_data(1 << 30).unwrap(), None);
}

pub(super) fn a_read_of_what_is_cached_answers_with_the_bytes_of_the_file_or_not_at_all(
    storage: &dyn Storage,
    root: &Path,
) {
    let bytes: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
    let file = create(storage, &root.join("f"), &bytes);
    content(&*file);
    let mut found = vec![0; bytes.len()];
    for (from, len) in [(0, 300_000), (4096, 1), (5, 100_001), (299_999, 1)] {
        match read_exact_at(&*file, &mut found[..len], from as u64, Caching::Cached) {
            Ok(()) => assert!(found[..len] == bytes[from..][..len]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    let past = read_exact_at(&*file, &mut found[..2], 299_999, Caching::Cached).unwrap_err().kind();
    assert!(matches!(past, ErrorKind::UnexpectedEof | ErrorKind::WouldBlock), "{past}");
}

pub(super) fn a_file_that_is_wholly_read_is_said_to_be_resident_or_nothing_is_said(storage: &dyn Storage, root: &Path) {
    let file = create(storage, &root.join("f"), &[5; 100_000]);
    content(&*file);
    for (offset, len) in [(0, 100_000), (5000, 1), (99_999, 1 << 30), (0, 0), (1 << 30, 1)] {
        match file.resident(offset, len).unwrap() {
            None => eprintln!("SKIPPED: nobody can tell what is cached here"),
            answer => assert_eq!(answer, Some(true), "{offset} {len}"),
        }
    }
}
