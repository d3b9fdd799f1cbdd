//! The harness can see: what keeps the store safe is taken away piece by piece, and each time the crash simulation must
//! go red. A piece without which it stays green would be superfluous, or be kept by no test.
//!
//! Syncs are taken away by the twin's [`Sabotage`]. The store's checks of digests stay as they are; they are blinded from
//! outside: [`bless_payloads`] and [`bless_frames`] write, over each state that a crash leaves behind, the digests that
//! torn bytes would need to be believed.

use std::collections::BTreeMap;

use alight::storage::sim::{Call, Event, OpKind, Sabotage, SimStorage, Trace};
use alight_format::{EncodedBody, EntryKind, Frame, PRELUDE_BYTES, Prelude, SegmentHeader, crc32};

use crate::harness::{Look, Run, look};
use crate::sabotages::sabotages;
use crate::workloads::{
    ALL, calls_to_be_killed_at, compaction, killed_at, long_keys, punching_what_nothing_vouches_for,
};

/// The first workload in which the store, broken like this, is seen to be broken, and how.
fn first_red(sabotage: &Sabotage, closely: &Look<'_>, workloads: &[fn() -> Run]) -> Option<(String, u64)> {
    let mut states = 0;
    workloads.iter().find_map(|workload| {
        let mut run = workload();
        run.sabotage(sabotage.clone());
        let tally = look(&run, closely);
        states += tally.states;
        tally
            .violation
            .map(|violation| (violation.lines().next().unwrap_or_default().chars().take(300).collect(), states))
    })
}

fn expect_red(removed: &str, sabotage: Sabotage, closely: &Look<'_>, workloads: &[fn() -> Run]) {
    match first_red(&sabotage, closely, workloads) {
        Some((violation, states)) => println!("without {removed}: red after {states} states: {violation}"),
        None => panic!("the crash simulation stays green without {removed}: it sees nothing there"),
    }
}

#[test]
fn without_any_one_kind_of_sync_the_simulation_goes_red() {
    for (removed, sabotage) in sabotages() {
        expect_red(removed, sabotage, &Look::quick(), ALL);
    }
}

/// Whether a call gives space of a segment back.
fn gives_back(event: &Event) -> bool {
    matches!(event, Event::Call(call) if matches!(call.op, OpKind::Remove | OpKind::Punch)
        && call.path.extension().is_some_and(|kind| kind == "seg"))
}

/// Segments go, and holes are punched, only after the manifest that does without them has its name for good: with the one
/// sync before taken away, the older manifest comes back, and misses them.
#[test]
fn without_the_sync_of_the_manifests_name_what_is_given_back_is_missed() {
    let giving_back: &[fn() -> Run] = &[compaction, punching_what_nothing_vouches_for];
    for workload in giving_back {
        let mut run = workload();
        let events: Vec<&Event> = run.trace.events().collect();
        let first = events.iter().position(|event| gives_back(event)).expect("the workload gives space back");
        let sync = events[..first].iter().rev().find_map(|event| match event {
            Event::Call(call) if call.op == OpKind::SyncDir && call.path.ends_with("store") => Some(call.index),
            _ => None,
        });
        run.sabotage(Sabotage { ignore_sync_call: sync, ..Sabotage::default() });
        let tally = look(&run, &Look { from: first, ..Look::quick() });
        let violation = tally.violation.unwrap_or_else(|| panic!("{} stays green", run.name));
        println!("{}: {}", run.name, first_line(&violation));
    }
}

#[test]
fn without_the_digests_the_simulation_goes_red() {
    let payloads = Look { alter: &|state| bless(state, bless_payloads), ..Look::quick() };
    expect_red("the check of small payloads in recovery", Sabotage::default(), &payloads, ALL);
    let frames = Look { alter: &|state| bless(state, bless_frames), ..Look::quick() };
    expect_red("the digest of frames", Sabotage::default(), &frames, &[long_keys]);
}

/// Syncs of which none is missed when it alone is removed, each with the reason.
const NOT_MISSED: &[&str] = &[
    // A run counts only once a manifest names it, and that one is written after the process that made the run synced this
    // directory itself. A leftover whose removal is lost is a leftover again; its number is not given a second time.
    "/store/index, at opening",
    // A cut gives back space that was taken ahead. A file that is longer again after a power cut ends in zeros, which
    // recovery passes over.
    "a segment, its end cut",
    // So did that of an earlier process. One that took a frame back counts as news of commits.
    "a segment, its end cut, at opening",
];

/// Of each kind of sync, by what it is for, one after another is removed alone until the simulation goes red. A kind of
/// which none is missed is superfluous, or stands in [`NOT_MISSED`] with its reason. With `ALIGHT_SABOTAGE_ALL`, every
/// sync of every workload is removed in turn.
#[test]
fn each_kind_of_sync_is_missed_when_one_of_it_is_removed() {
    let all = std::env::var_os("ALIGHT_SABOTAGE_ALL").is_some();
    let mut kinds: BTreeMap<String, Missed> = BTreeMap::new();
    for workload in ALL {
        remove_each_sync(&mut workload(), all, &mut kinds);
    }
    for kill_at in (0..calls_to_be_killed_at()).step_by(if all { 1 } else { 2 }) {
        let open = |(kind, missed): (&String, &Missed)| missed.red == 0 && !NOT_MISSED.contains(&kind.as_str());
        if all || kinds.iter().any(open) {
            remove_each_sync(&mut killed_at(kill_at), all, &mut kinds);
        }
    }
    for (kind, Missed { red, green, told }) in &kinds {
        println!("{kind:48} missed {red} times of {}: {told}", red + green);
    }
    let unmissed: Vec<&str> =
        kinds.iter().filter(|(_, missed)| missed.red == 0).map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(unmissed, NOT_MISSED, "removed one at a time, none of these is missed");
}

/// What came of removing the syncs of one kind, one at a time.
#[derive(Default)]
struct Missed {
    red: u64,
    green: u64,
    /// How the first that was missed was missed.
    told: String,
}

fn remove_each_sync(run: &mut Run, all: bool, kinds: &mut BTreeMap<String, Missed>) {
    for Sync { call, event, kind } in syncs(&run.trace) {
        let missed = kinds.entry(kind.clone()).or_default();
        if (missed.red > 0 || NOT_MISSED.contains(&kind.as_str())) && !all {
            continue;
        }
        run.sabotage(Sabotage { ignore_sync_call: Some(call), ..Sabotage::default() });
        let tally = look(run, &Look { from: event, ..Look::quick() });
        match tally.violation {
            Some(violation) if missed.red == 0 => (missed.red, missed.told) = (1, first_line(&violation)),
            Some(_) => missed.red += 1,
            None => missed.green += 1,
        }
    }
}

fn first_line(violation: &str) -> String {
    violation.lines().next().unwrap_or_default().chars().take(250).collect()
}

/// A sync that succeeded.
struct Sync {
    /// Its number among the calls.
    call: u64,
    /// Its place among the events.
    event: usize,
    kind: String,
}

fn syncs(trace: &Trace) -> Vec<Sync> {
    let calls: Vec<(usize, &Call)> = trace
        .events()
        .enumerate()
        .filter_map(|(event, call)| if let Event::Call(call) = call { Some((event, call)) } else { None })
        .filter(|(_, call)| call.outcome.is_ok())
        .collect();
    let is_sync = |call: &Call| matches!(call.op, OpKind::Sync | OpKind::SyncDir);
    let only_calls: Vec<&Call> = calls.iter().map(|(_, call)| *call).collect();
    let here = calls.iter().enumerate().filter(|(_, (_, call))| is_sync(call));
    here.filter_map(|(at, &(event, call))| Some(Sync { call: call.index, event, kind: kind(&only_calls, at)? }))
        .collect()
}

/// What a sync is for, from the calls before it. None where it is for nothing: who opens a store cannot know that it was
/// synced before.
fn kind(calls: &[&Call], at: usize) -> Option<String> {
    let sync = calls[at];
    let path = sync.path.to_string_lossy();
    let changes_names = |call: &&Call| matches!(call.op, OpKind::Rename | OpKind::CreateDir);
    let changes_bytes = |call: &&Call| matches!(call.op, OpKind::Write | OpKind::Truncate);
    let last_lock = calls[..at].iter().rposition(|call| call.op == OpKind::Lock);
    // An open that has taken the lock and changed nothing yet makes sure of what it found.
    let opening =
        last_lock.is_some_and(|lock| !calls[lock..at].iter().any(|call| changes_names(call) || changes_bytes(call)));
    let of_this_file = |call: &&&Call| call.path == sync.path;
    let news: Vec<&&Call> = calls[..at]
        .iter()
        .rev()
        .filter(of_this_file)
        .take_while(|call| call.op != OpKind::Sync)
        .filter(|call| changes_bytes(call))
        .collect();
    let next_write = calls[at..].iter().filter(of_this_file).find(|call| call.op == OpKind::Write);
    let last_write = news.iter().find(|call| call.op == OpKind::Write);
    let what = match last_write {
        _ if sync.op == OpKind::SyncDir => path.into_owned(),
        _ if path.ends_with("MANIFEST.tmp") => "a manifest".into(),
        _ if path.ends_with(".idx.tmp") => "an index run".into(),
        Some(write) if write.offset == 0 => "a segment, its header".into(),
        Some(write) if next_write.is_some_and(|next| next.offset <= write.offset) => {
            "a segment, a large payload".into()
        }
        Some(_) => "a segment, its commits".into(),
        None if news.is_empty() => return None,
        None => "a segment, its end cut".to_owned(),
    };
    Some(if opening { format!("{what}, at opening") } else { what })
}

/// Lets `blessing` change the bytes of every segment.
pub(crate) fn bless(state: &SimStorage, blessing: fn(&mut [u8])) {
    for path in state.files().into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "seg")) {
        let before = state.read_file(&path);
        let mut bytes = before.clone();
        blessing(&mut bytes);
        if bytes != before {
            state.write_file(&path, &bytes);
        }
    }
}

const BLOCK: usize = 4096;

/// Where the frames of a segment begin, of which the prelude is whole and `frame` fits the file.
fn preludes(bytes: &[u8]) -> Vec<(usize, Prelude)> {
    let Ok(header) = SegmentHeader::decode(bytes) else { return Vec::new() };
    let fits = |at: usize, prelude: &Prelude| at as u64 + prelude.frame_len <= bytes.len() as u64;
    (BLOCK..bytes.len())
        .step_by(BLOCK)
        .filter_map(|at| Prelude::decode(&bytes[at..]).ok().map(|prelude| (at, prelude)))
        .filter(|(at, prelude)| prelude.belongs(header.salt, *at as u64) && fits(*at, prelude))
        .collect()
}

/// Makes every whole frame speak for the payload that lies behind it, whatever lies there.
pub(crate) fn bless_payloads(bytes: &mut [u8]) {
    // Digests that were rewritten, by what they were: the next frame names them.
    let mut rewritten = BTreeMap::new();
    for (at, prelude) in preludes(bytes) {
        let end = at + prelude.frame_len as usize;
        let Ok(mut frame) = Frame::decode(&bytes[at..end]) else { continue };
        for entry in frame.entries.iter_mut().filter(|entry| entry.kind == EntryKind::Put) {
            let start = end + entry.offset as usize;
            if let Some(value) = bytes.get(start..start + entry.length as usize) {
                entry.crc = crc32(value);
            }
        }
        let mut fields = prelude.fields();
        if let Some(&digest) = rewritten.get(&fields.previous_digest) {
            fields.previous_digest = digest;
        }
        let body = EncodedBody::new(&frame.entries).expect("the entries were written before, with other checksums");
        let digest = body.write_frame(&fields, &mut bytes[at..end]);
        if digest != frame.digest {
            rewritten.insert(frame.digest, digest);
        }
    }
}

/// Makes the digest of every frame with a whole prelude the one of the bytes that lie there.
fn bless_frames(bytes: &mut [u8]) {
    for (at, prelude) in preludes(bytes) {
        assert!(prelude.frame_len as usize > PRELUDE_BYTES + 4);
        let digest_at = at + prelude.frame_len as usize - 4;
        let digest = crc32(&bytes[at..digest_at]);
        bytes[digest_at..digest_at + 4].copy_from_slice(&digest.to_le_bytes());
    }
}
