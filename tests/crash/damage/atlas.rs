//! What each byte of a store's files is for.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use alight::storage::sim::SimStorage;
use alight_format::{EntryKind, Frame, Prelude, RunHeader, SegmentHeader};

/// The purpose of a stretch of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Region {
    Manifest,
    Lock,
    SegmentHeader,
    Frame,
    /// A value that a key leads to.
    Value,
    /// A value that none leads to any more.
    DeadValue,
    /// Between the values of a commit, and from the last of them to the end of its block.
    Padding,
    /// Behind the last commit of a segment: space taken ahead.
    Ahead,
    RunHeader,
    RunBlocks,
    RunTable,
    RunFences,
    RunPadding,
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Manifest => "manifest",
            Self::Lock => "lock",
            Self::SegmentHeader => "segment, header",
            Self::Frame => "segment, frames",
            Self::Value => "segment, values",
            Self::DeadValue => "segment, dead values",
            Self::Padding => "segment, padding between values",
            Self::Ahead => "segment, space taken ahead",
            Self::RunHeader => "index run, header",
            Self::RunBlocks => "index run, blocks",
            Self::RunTable => "index run, table",
            Self::RunFences => "index run, fences",
            Self::RunPadding => "index run, padding",
        })
    }
}

/// A stretch of a file.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub path: PathBuf,
    pub range: Range<u64>,
    pub region: Region,
    /// The commit that wrote it; zero where none did.
    pub seq: u64,
    /// The key whose value it is; empty where it is none.
    pub key: Vec<u8>,
}

/// A value's bytes.
struct Extent {
    path: PathBuf,
    range: Range<u64>,
    key: Vec<u8>,
    seq: u64,
}

/// Every byte of every file, in order; of a store that is whole.
pub(crate) fn atlas(sim: &SimStorage) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut extents = Vec::new();
    // Which commit had the last word on each key.
    let mut last: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for path in sim.files() {
        let bytes = sim.read_file(&path);
        let whole =
            |region| Span { path: path.to_path_buf(), range: 0..bytes.len() as u64, region, seq: 0, key: Vec::new() };
        match path.extension().and_then(|kind| kind.to_str()) {
            Some("seg") => segment(&path, &bytes, &mut spans, &mut extents, &mut last),
            Some("idx") => run(&path, &bytes, &mut spans),
            _ if path.ends_with("MANIFEST") => spans.push(whole(Region::Manifest)),
            _ if path.ends_with("LOCK") || path.ends_with("READERS") => spans.push(whole(Region::Lock)),
            _ => panic!("{}: what is it for?", path.display()),
        }
    }
    for Extent { path, range, key, seq } in extents {
        let region = if last[&key] == seq { Region::Value } else { Region::DeadValue };
        spans.push(Span { path, range, region, seq, key });
    }
    spans.retain(|span| !span.range.is_empty());
    spans.sort_by(|a, b| (&a.path, a.range.start).cmp(&(&b.path, b.range.start)));
    for pair in spans.windows(2) {
        assert!(pair[0].path != pair[1].path || pair[0].range.end == pair[1].range.start, "spans tile files: {pair:?}");
    }
    spans
}

fn segment(
    path: &Path,
    bytes: &[u8],
    spans: &mut Vec<Span>,
    extents: &mut Vec<Extent>,
    last: &mut BTreeMap<Vec<u8>, u64>,
) {
    let span = |range, region, seq| Span { path: path.to_path_buf(), range, region, seq, key: Vec::new() };
    let header = SegmentHeader::decode(bytes).expect("the segment is whole");
    spans.push(span(0..4096, Region::SegmentHeader, 0));
    let mut at = 4096;
    while let Ok(prelude) = Prelude::decode(&bytes[at as usize..]) {
        assert!(prelude.belongs(header.salt, at));
        let payload = prelude.payload_offset();
        let frame = Frame::decode(&bytes[at as usize..payload as usize]).expect("the frame is whole");
        let seq = prelude.seq.get();
        spans.push(span(at..payload, Region::Frame, seq));
        let mut end = payload;
        for entry in frame.entries {
            let latest = last.entry(entry.key.clone()).or_default();
            *latest = seq.max(*latest);
            if entry.kind == EntryKind::Put && entry.length > 0 {
                let range = payload + entry.offset..payload + entry.offset + entry.length;
                spans.push(span(end..range.start, Region::Padding, seq));
                end = range.end;
                extents.push(Extent { path: path.to_path_buf(), range, key: entry.key, seq });
            }
        }
        at = prelude.next_offset();
        spans.push(span(end..at, Region::Padding, seq));
    }
    spans.push(span(at..bytes.len() as u64, Region::Ahead, 0));
}

fn run(path: &Path, bytes: &[u8], spans: &mut Vec<Span>) {
    let header = RunHeader::decode(bytes).expect("the run is whole");
    let ends = [
        (4096, Region::RunHeader),
        (4096 + header.blocks_bytes, Region::RunBlocks),
        (header.table_offset, Region::RunPadding),
        (header.table_offset + header.table_lines * 64, Region::RunTable),
        (header.fences_offset, Region::RunPadding),
        (header.fences_offset + header.fences_bytes, Region::RunFences),
        (header.file_bytes, Region::RunPadding),
    ];
    let mut start = 0;
    for (end, region) in ends {
        spans.push(Span { path: path.to_path_buf(), range: start..end, region, seq: 0, key: Vec::new() });
        start = end;
    }
    assert_eq!(start, bytes.len() as u64);
}
