//! The index made anew from the segments alone, by SPEC.md.

use std::collections::BTreeMap;

use alight::storage::sim::SimStorage;
use alight_format::{EntryKind, Frame, Manifest, Prelude, SegmentId};

/// The keys that the segments give of a store at `/store` that was synced: of each the newest entry, in all segments that
/// the manifest names or that are younger.
pub fn rebuilt_keys(sim: &SimStorage) -> Vec<Vec<u8>> {
    let manifest = Manifest::decode(&sim.read_file("/store/MANIFEST")).unwrap();
    let mut newest = BTreeMap::new();
    let of_store = |path: &std::path::PathBuf| path.starts_with("/store/segments");
    for path in sim.files().into_iter().filter(of_store) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let id = SegmentId::from_file_name(name).unwrap();
        let record = manifest.segments.iter().find(|record| record.id == id);
        if record.is_none() && id < manifest.next_segment {
            continue;
        }
        let bytes = sim.read_file(&path);
        let end = record.filter(|record| record.sealed).map_or(bytes.len(), |record| record.end as usize);
        let mut offset = 4096;
        while offset < end
            && let Some(prelude) = bytes.get(offset..).and_then(|bytes| Prelude::decode(bytes).ok())
        {
            let frame = Frame::decode(&bytes[offset..][..prelude.frame_len as usize]).unwrap();
            for entry in frame.entries {
                let (seq, put) = (entry.counts_from(prelude.seq), entry.kind == EntryKind::Put);
                let line = newest.entry(entry.key).or_insert((seq, put));
                if seq >= line.0 {
                    *line = (seq, put);
                }
            }
            offset = prelude.next_offset() as usize;
        }
    }
    newest.into_iter().filter(|(_, (_, put))| *put).map(|(key, _)| key).collect()
}
