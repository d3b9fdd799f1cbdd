//! The bytes of the format, fixed: what these tests build must equal the files under `golden/`, byte for byte.
//!
//! A difference is a change of the format: either a mistake, or a new version with its line in SPEC.md. After such a change
//! `ALIGHT_BLESS=1 cargo test -p alight-format --test golden` writes the files anew.
//!
//! The files under `golden/store/` are a whole store, for readers in other languages; `reader.py` is held against it here.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use alight_format::{
    Dtype, EncodedBody, Entry, Frame, Manifest, PAYLOAD_SYNCED, Prelude, PreludeFields, RunId, Salt, SegmentHeader,
    SegmentId, SegmentRecord, Seq, crc32, key_hash, limits,
};
use common::{STORE, assert_file, build, frame, oracle, run_record, segment_record};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn assert_golden(name: &str, bytes: &[u8]) {
    assert_file(&format!("golden/{name}"), bytes);
}

#[test]
fn a_segment_header_has_the_bytes_of_the_specification() {
    let header = SegmentHeader::new(STORE, SegmentId(258), Salt(0x0102_0304_0506_0708));
    assert_golden("segment_header.bin", &header.encode());
    assert_eq!(SegmentHeader::decode(&fs::read(golden("segment_header.bin")).unwrap()), Ok(header));
}

#[test]
fn a_frame_has_the_bytes_of_the_specification() {
    let large = 2 * limits::CHUNK_BYTES + 5;
    let entries = [
        Entry {
            attributes: vec![("step".into(), b"100".to_vec()), ("größe".into(), vec![])],
            crc: 0x0a0b_0c0d,
            ..Entry::put(b"layers.0.w", Dtype::BF16, &[2, 3])
        },
        Entry { offset: 4096, crc: 1, chunk_crcs: vec![2, 3, 4], ..Entry::put(b"large", Dtype::U8, &[large]) },
        Entry::delete(b"\x00\xff"),
        Entry { segment: 7, offset: 8448, frame_offset: 4096, crc: 5, ..Entry::alias(b"same", Dtype::F32, &[]) },
    ];
    let fields = PreludeFields {
        salt: Salt(0x0102_0304_0506_0708),
        offset: 12_288,
        seq: Seq(77),
        payload_len: (4096 + large).next_multiple_of(4096),
        synced_through: Seq(70),
        previous_digest: 0x1122_3344,
        part: 1,
        parts: 3,
        flags: PAYLOAD_SYNCED,
    };
    assert_golden("frame.bin", &frame(&entries, &fields));
    let frame = Frame::decode(&fs::read(golden("frame.bin")).unwrap()).unwrap();
    assert_eq!((frame.prelude.fields(), frame.entries.as_slice()), (fields, entries.as_slice()));
}

#[test]
fn a_manifest_has_the_bytes_of_the_specification() {
    let manifest = Manifest {
        generation: 9,
        covered: Seq(77),
        next_segment: SegmentId(6),
        next_run: RunId(5),
        segments: vec![segment_record(2, 1 << 20, 0x1234_5678, true), segment_record(5, 4096, 0, false)],
        runs: vec![run_record(4), run_record(1)],
        ..Manifest::new(STORE, 1 << 30)
    };
    assert_golden("manifest.bin", &manifest.encode().unwrap());
    assert_eq!(Manifest::decode(&fs::read(golden("manifest.bin")).unwrap()), Ok(manifest));
}

#[test]
fn an_index_run_has_the_bytes_of_the_specification() {
    let long = vec![b'x'; 1024];
    let keys = (0..300u32).map(|part| format!("model.layers.{}.mlp.{part:03}", part % 12).into_bytes());
    let oracle = oracle(keys.chain([long, vec![0], vec![255, 255]]));
    let (bytes, _) = build(&oracle);
    assert_golden("run.bin", &bytes);
    common::assert_like_oracle(&fs::read(golden("run.bin")).unwrap(), &oracle);
    let hashes = [b"".as_slice(), b"a", b"layers.0", b"layers.0.weight"].map(key_hash);
    assert_eq!(hashes, [0, HASH_OF_A, HASH_OF_8, HASH_OF_15]);
}

// As SPEC.md has them.
const HASH_OF_A: u64 = 0x9be4_60f3_7bea_5b5a;
const HASH_OF_8: u64 = 0xaafc_6fda_2fc2_93c4;
const HASH_OF_15: u64 = 0x2555_c0bf_efd2_2936;

/// A segment being written by hand, as a store would.
struct Segment {
    header: SegmentHeader,
    bytes: Vec<u8>,
    previous_digest: u32,
}

/// A value of a commit: key, dtype, shape, bytes.
type Value<'a> = (&'a str, Dtype, &'a [u64], &'a [u8]);

impl Segment {
    fn new(id: u64) -> Self {
        let header = SegmentHeader::new(STORE, SegmentId(id), Salt(0xa000 + id));
        Self { header, bytes: header.encode().to_vec(), previous_digest: 0 }
    }

    fn commit(&mut self, seq: u64, synced_through: u64, flags: u32, values: &[Value<'_>], rest: &[Entry]) {
        let (mut payload, mut entries) = (Vec::new(), Vec::new());
        for (key, dtype, shape, bytes) in values {
            payload.resize(payload.len().next_multiple_of(limits::blob_align_bytes(bytes.len() as u64) as usize), 0);
            let chunks = if bytes.len() > 1 << 20 { bytes.chunks(1 << 20).map(crc32).collect() } else { vec![] };
            let entry = Entry::put(key.as_bytes(), *dtype, shape);
            entries.push(Entry { offset: payload.len() as u64, crc: crc32(bytes), chunk_crcs: chunks, ..entry });
            payload.extend_from_slice(bytes);
        }
        entries.extend_from_slice(rest);
        self.commit_laid_out(seq, synced_through, flags, payload, &entries);
    }

    fn commit_laid_out(&mut self, seq: u64, synced_through: u64, flags: u32, mut payload: Vec<u8>, entries: &[Entry]) {
        payload.resize(payload.len().next_multiple_of(4096), 0);
        let body = EncodedBody::new(entries).unwrap();
        let start = self.bytes.len();
        self.bytes.resize(start + body.frame_len() as usize, 0);
        let fields = PreludeFields {
            salt: self.header.salt,
            offset: start as u64,
            seq: Seq(seq),
            payload_len: payload.len() as u64,
            synced_through: Seq(synced_through),
            previous_digest: self.previous_digest,
            part: 0,
            parts: 1,
            flags,
        };
        self.previous_digest = body.write_frame(&fields, &mut self.bytes[start..]);
        self.bytes.extend_from_slice(&payload);
    }

    fn record(&self, end: u64, previous_digest: u32, sealed: bool) -> SegmentRecord {
        let id = self.header.segment;
        SegmentRecord {
            id,
            salt: self.header.salt,
            end,
            previous_digest,
            sealed,
            live_bytes: 0,
            blob_bytes: 0,
            live_values: 0,
            live_room: 0,
            values: 0,
            oldest_put: Seq::ZERO,
            newest_delete: Seq::ZERO,
        }
    }
}

/// The segments and the manifest of the golden store, by their paths in it.
fn golden_store() -> Vec<(String, Vec<u8>)> {
    let floats: Vec<u8> = (0..6u8).flat_map(|number| f32::from(number).to_le_bytes()).collect();
    let block: Vec<u8> = (0..5000u32).map(|at| (at % 251) as u8).collect();
    let mut small = Segment::new(1);
    let deleted = ("deleted", Dtype::U8, [3u64].as_slice(), b"old".as_slice());
    small.commit(1, 0, 0, &[("layers.0.w", Dtype::F32, &[2, 3], &floats), deleted], &[]);
    let (end, digest) = (small.bytes.len() as u64, small.previous_digest);
    small.commit(3, 2, 0, &[("layers.0.b", Dtype::F64, &[], &1.5f64.to_le_bytes())], &[Entry::delete(b"deleted")]);
    // Replaces a value, and names one of the other segment again.
    let mut large = Segment::new(3);
    large.commit(2, 1, PAYLOAD_SYNCED, &[("block", Dtype::U8, &[5000], &block)], &[]);
    let alias = Entry { segment: 3, offset: 8192, frame_offset: 4096, ..Entry::alias(b"again", Dtype::U8, &[5000]) };
    let alias = Entry { crc: crc32(&block), ..alias };
    small.commit(
        4,
        3,
        0,
        &[("layers.0.w", Dtype::BF16, &[3], &[1, 2, 3, 4, 5, 6]), ("empty", Dtype::I8, &[0, 7], &[])],
        &[alias],
    );
    // Compaction's: a value moved, one that was replaced since and stays so, and a delete.
    let mut moved = Segment::new(4);
    let mut repeated: Vec<Entry> = Vec::new();
    let mut payload = block.clone();
    payload.resize(8192, 0);
    payload.extend_from_slice(&floats);
    repeated.push(Entry { crc: crc32(&block), origin: Seq(2), ..Entry::put(b"block", Dtype::U8, &[5000]) });
    let stale = Entry::put(b"layers.0.w", Dtype::F32, &[2, 3]);
    repeated.push(Entry { offset: 8192, crc: crc32(&floats), origin: Seq(1), ..stale });
    repeated.push(Entry { origin: Seq(3), ..Entry::delete(b"deleted") });
    moved.commit_laid_out(5, 4, PAYLOAD_SYNCED, payload, &repeated);
    // The torn tail: a frame that reached the disk before its payload did, and was never acknowledged.
    let whole = small.bytes.len();
    small.commit(6, 4, 0, &[("torn", Dtype::U8, &[4], b"torn")], &[]);
    let torn = whole + 4096;
    small.bytes[torn..torn + 4].fill(0);

    // A sealed segment whose tail was cut: what lies behind its end is no part of the store, valid as it looks.
    let mut cut = Segment::new(2);
    let sealed = cut.record(4096, 0, true);
    cut.commit(5, 4, PAYLOAD_SYNCED, &[("cut", Dtype::U8, &[3], b"cut")], &[]);

    let manifest = Manifest {
        covered: Seq(1),
        next_segment: SegmentId(3),
        segments: vec![small.record(end, digest, false), sealed],
        ..Manifest::new(STORE, 1 << 20)
    };
    vec![
        ("MANIFEST".into(), manifest.encode().unwrap()),
        ("segments/00000001.seg".into(), small.bytes),
        ("segments/00000002.seg".into(), cut.bytes),
        ("segments/00000003.seg".into(), large.bytes),
        ("segments/00000004.seg".into(), moved.bytes),
    ]
}

#[test]
fn a_store_has_the_bytes_of_the_specification() {
    golden_store().iter().for_each(|(path, bytes)| assert_golden(&format!("store/{path}"), bytes));
}

fn reader(arguments: &[&Path]) -> Option<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("reader.py");
    match Command::new("python3").arg(script).args(arguments).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("SKIPPED: reader.py is not tested, python3 cannot be run: {error}");
            None
        }
    }
}

/// A fresh directory with the golden store in it, each file changed by `change`.
fn store_with(name: &str, mut change: impl FnMut(&str, &mut Vec<u8>)) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(root.join("segments")).unwrap();
    for (path, mut bytes) in golden_store() {
        change(&path, &mut bytes);
        fs::write(root.join(path), bytes).unwrap();
    }
    root
}

#[test]
#[cfg_attr(miri, ignore = "starts another process")]
fn the_python_reader_lists_and_extracts_the_golden_store() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("extracted");
    let _ = fs::remove_dir_all(&out);
    let Some(list) = reader(&[Path::new("list"), &golden("store")]) else { return };
    assert!(list.status.success(), "{list:?}");
    let expected = "again\tU8\t[5000]\t5000\nblock\tU8\t[5000]\t5000\nempty\tI8\t[0, 7]\t0\nlayers.0.b\tF64\t[]\t8\n\
                    layers.0.w\tBF16\t[3]\t6\n";
    assert_eq!(String::from_utf8(list.stdout).unwrap(), expected);
    let extract = reader(&[Path::new("extract"), &golden("store"), &out]).unwrap();
    assert!(extract.status.success(), "{extract:?}");
    assert_eq!(fs::read(out.join("000005.bin")).unwrap(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(fs::read(out.join("000001.bin")).unwrap(), fs::read(out.join("000002.bin")).unwrap());
    let index = fs::read_to_string(out.join("index.json")).unwrap();
    assert!(index.contains(r#""key": "layers.0.w", "dtype": "BF16", "shape": [3]"#), "{index}");
}

#[test]
#[cfg_attr(miri, ignore = "starts another process")]
fn the_python_reader_tells_damage_from_a_torn_tail() {
    if reader(&[Path::new("list"), &golden("store")]).is_none() {
        return;
    }
    let answer = |root: &Path, command: &str| {
        let (command, out) = (Path::new(command), root.join("out"));
        let arguments = [command, root, &out];
        let output = reader(if command == Path::new("list") { &arguments[..2] } else { &arguments }).unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // The frame of commit 3 is lost, and commit 4 says that it was synced.
    let lost = store_with("lost", |path, bytes| {
        if path.ends_with("1.seg") {
            let first = Prelude::decode(&bytes[4096..]).unwrap();
            bytes[first.next_offset() as usize + 24] ^= 1;
        }
    });
    let (code, message) = answer(&lost, "list");
    assert_eq!(code, Some(1));
    assert!(message.contains("commit 3"), "{message}");
    // The segment that commit 2 alone is in is gone, and commit 3 says that it was synced.
    let gone = store_with("gone", |path, bytes| {
        if path.ends_with("3.seg") {
            bytes.truncate(4096);
        }
    });
    assert!(answer(&gone, "list").1.contains("commit 2"));
    // A bit of a value: found when it is extracted.
    let flipped = store_with("flipped", |path, bytes| {
        if path.ends_with("3.seg") {
            bytes[8192 + 17] ^= 4;
        }
    });
    assert_eq!(answer(&flipped, "list").0, Some(0));
    let (code, message) = answer(&flipped, "extract");
    assert_eq!(code, Some(1));
    assert!(message.contains("block") || message.contains("again"), "{message}");
    // A bit of the manifest, of a header, of a frame that the manifest covers.
    for (name, file, at) in [("manifest", "MANIFEST", 70), ("header", "1.seg", 20), ("covered", "1.seg", 4096 + 200)] {
        let root = store_with(name, |path, bytes| {
            if path.ends_with(file) {
                bytes[at] ^= 1;
            }
        });
        assert_eq!(answer(&root, "list").0, Some(1), "{name}");
    }
}
