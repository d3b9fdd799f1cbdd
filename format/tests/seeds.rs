//! The seeds of the fuzz targets are what the code writes today: a fuzzer that begins with an older layout would spend its
//! time on finding the new one.
//!
//! After a change of the format `ALIGHT_BLESS=1 cargo test -p alight-format --test seeds` writes them anew.

mod common;

use std::fs;
use std::path::Path;

use alight_format::{
    Dtype, Entry, FeatureFlags, Manifest, PAYLOAD_SYNCED, PreludeFields, RunId, RunRecord, Salt, SegmentHeader,
    SegmentId, SegmentRecord, Seq, limits,
};
use common::{STORE, assert_file, build, frame, oracle, run_record, segment_record};

/// The seeds of a target are these, and no others.
fn assert_seeds(target: &str, seeds: &[(&str, Vec<u8>)]) {
    let folder = format!("fuzz/seeds/{target}");
    seeds.iter().for_each(|(name, bytes)| assert_file(&format!("{folder}/{name}"), bytes));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut there: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    there.sort();
    let mut named: Vec<_> = seeds.iter().map(|(name, _)| std::ffi::OsString::from(name)).collect();
    named.sort();
    assert_eq!(there, named, "{target}");
}

#[test]
fn segment_headers() {
    let header = SegmentHeader::new(STORE, SegmentId(3), Salt(0x0102_0304_0506_0708));
    let single = SegmentHeader { single_commit: true, ..SegmentHeader::new(STORE, SegmentId(u64::MAX - 1), Salt(0)) };
    assert_seeds("segment_header", &[("shared", header.encode().to_vec()), ("single", single.encode().to_vec())]);
}

#[test]
fn frames() {
    let fields = PreludeFields {
        salt: Salt(0x0102_0304_0506_0708),
        offset: 4096,
        seq: Seq(1),
        payload_len: 0,
        synced_through: Seq::ZERO,
        previous_digest: 0,
        part: 0,
        parts: 1,
        flags: 0,
    };
    let later = PreludeFields {
        offset: 1 << 20,
        seq: Seq(77),
        synced_through: Seq(70),
        previous_digest: 0x1122_3344,
        flags: PAYLOAD_SYNCED,
        ..fields
    };
    let frame = |entries: &[Entry], payload_len: u64, fields| {
        frame(entries, &PreludeFields { payload_len: payload_len.next_multiple_of(4096), ..fields })
    };
    let put = |key: &[u8], offset| Entry { offset, crc: 7, ..Entry::put(key, Dtype::F32, &[4, 8]) };
    let large = 2 * limits::CHUNK_BYTES + 5;
    let chunked = Entry { crc: 1, chunk_crcs: vec![2, 3, 4], ..Entry::put(b"large", Dtype::U8, &[large]) };
    let attributes = vec![("step".to_owned(), b"100".to_vec()), (String::new(), vec![])];
    let alias = Entry { segment: 7, offset: 8448, frame_offset: 4096, crc: 5, ..Entry::alias(b"b", Dtype::F32, &[]) };
    let many: Vec<Entry> = (0..60).map(|n| put(format!("model.layers.{n}.w").as_bytes(), 256 * n)).collect();
    let repeated = Entry { origin: Seq(12), ..put(b"moved", 0) };
    assert_seeds(
        "frame",
        &[
            ("put", frame(&[put(b"k", 0)], 4096, fields)),
            ("empty_value", frame(&[Entry::put(b"k", Dtype::U8, &[0])], 0, fields)),
            ("delete", frame(&[Entry::delete(b"\0\xff")], 0, fields)),
            ("alias", frame(&[alias], 0, later)),
            ("attributes", frame(&[Entry { attributes, ..put(b"k", 0) }], 4096, fields)),
            ("chunks", frame(&[chunked], large.next_multiple_of(4096), later)),
            ("long_keys", frame(&[put(&[b'x'; 1024], 0), Entry::delete(&[b'y'; 1000])], 4096, fields)),
            ("many", frame(&many, 60 * 256, later)),
            ("repeated", frame(&[repeated], 4096, later)),
            ("a_part", frame(&[put(b"k", 0)], 4096, PreludeFields { part: 1, parts: 3, ..later })),
        ],
    );
}

#[test]
fn manifests() {
    let segment = |id: u64, sealed| segment_record(id, 4096 * (id + 1), 0x1234_5678, sealed);
    let of = |segments: Vec<SegmentRecord>, runs: Vec<RunRecord>, flags| {
        let next_segment = SegmentId(segments.last().map_or(1, |last| last.id.get() + 1));
        let next_run = RunId(runs.iter().map(|run| run.id.get()).max().unwrap_or(0) + 1);
        let new = Manifest::new(STORE, 256 << 20);
        let manifest =
            Manifest { generation: 9, covered: Seq(77), next_segment, next_run, segments, runs, flags, ..new };
        manifest.encode().unwrap()
    };
    let none = Manifest::new(STORE, 4096).flags;
    let unknown = FeatureFlags { compatible: 1 << 63, ..none };
    assert_seeds(
        "manifest",
        &[
            ("new", Manifest::new(STORE, 16 << 10).encode().unwrap()),
            ("one_segment", of(vec![segment(1, false)], vec![], none)),
            (
                "runs",
                of(vec![segment(2, true), segment(5, false)], vec![run_record(9), run_record(4), run_record(1)], none),
            ),
            ("many_segments", of((1..20).map(|id| segment(id, id < 18)).collect(), vec![run_record(2)], none)),
            ("unknown_feature", of(vec![segment(1, true)], vec![run_record(1)], unknown)),
        ],
    );
}

#[test]
fn index_runs() {
    let numbered = |count: u32| (0..count).map(|n| format!("model.layers.{}.mlp.{n:03}", n % 12).into_bytes());
    let long = (0..12u8).map(|n| [vec![b'x'; 1000], vec![n]].concat());
    assert_seeds(
        "index_run",
        &[
            ("one_key", build(&oracle([b"k"])).0),
            ("a_block", build(&oracle(numbered(40))).0),
            ("several_blocks", build(&oracle(numbered(300))).0),
            ("long_keys", build(&oracle(long)).0),
            ("edges", build(&oracle([vec![0], vec![255; 1024], vec![255, 255]])).0),
        ],
    );
}
