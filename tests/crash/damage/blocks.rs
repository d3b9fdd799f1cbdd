//! Whole blocks and whole files that are not what was written there: zeros, what was there earlier, what belongs somewhere
//! else, or nothing. The store is a compacted one with many runs.
//!
//! What must hold of each: the store does not open, says why and changes nothing; or it opens, every answer that rests on
//! none of the changed bytes is right, every other is right or an error that names the damage, and a value of which a
//! byte was changed is such an error.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use alight::Error;
use alight::storage::sim::SimStorage;
use parking_lot::Mutex;

use super::ask::{Answer, Ask, Subject};
use super::atlas::{Region, Span, atlas};
use super::flips::{WORKERS, told};
use super::stores::compacted;
use crate::panics::caught;

const BLOCK: usize = 4096;

/// One thing that a disk does wrong.
#[derive(Debug, Clone)]
enum Damage {
    Zeroed {
        path: PathBuf,
        block: usize,
    },
    /// A write was lost: the block is as it was earlier.
    Stale {
        path: PathBuf,
        block: usize,
        state: usize,
    },
    Swapped {
        path: PathBuf,
        block: usize,
        with: usize,
    },
    /// A write landed in another's place, too.
    Misdirected {
        from: PathBuf,
        block: usize,
        onto: PathBuf,
        at: usize,
    },
    Truncated {
        path: PathBuf,
        len: u64,
    },
    Missing {
        path: PathBuf,
    },
    StaleFile {
        path: PathBuf,
        state: usize,
    },
    FilesSwapped {
        one: PathBuf,
        two: PathBuf,
    },
}

impl Damage {
    fn kind(&self) -> &'static str {
        match self {
            Self::Zeroed { .. } => "blocks of zeros",
            Self::Stale { .. } => "blocks as they were earlier",
            Self::Swapped { .. } => "blocks in each other's place",
            Self::Misdirected { .. } => "blocks that another was written to",
            Self::Truncated { .. } => "files cut short",
            Self::Missing { .. } => "files that are gone",
            Self::StaleFile { .. } => "files as they were earlier",
            Self::FilesSwapped { .. } => "files in each other's place",
        }
    }

    /// The files as they are afterwards; `None` is one that is gone.
    fn files(&self, sim: &SimStorage, earlier: &[SimStorage]) -> Vec<(PathBuf, Option<Vec<u8>>)> {
        let read = |path: &Path| sim.read_file(path);
        let range = |block: usize, bytes: &[u8]| block * BLOCK..((block + 1) * BLOCK).min(bytes.len());
        match self {
            Self::Zeroed { path, block } => {
                let mut bytes = read(path);
                let range = range(*block, &bytes);
                bytes[range].fill(0);
                vec![(path.clone(), Some(bytes))]
            }
            Self::Stale { path, block, state } => {
                let (mut bytes, old) = (read(path), earlier[*state].read_file(path));
                let range = range(*block, &bytes);
                // Behind its end then there was nothing.
                for at in range {
                    bytes[at] = old.get(at).copied().unwrap_or(0);
                }
                vec![(path.clone(), Some(bytes))]
            }
            Self::Swapped { path, block, with } => {
                let mut bytes = read(path);
                for at in 0..BLOCK {
                    bytes.swap(block * BLOCK + at, with * BLOCK + at);
                }
                vec![(path.clone(), Some(bytes))]
            }
            Self::Misdirected { from, block, onto, at } => {
                let (source, mut target) = (read(from), read(onto));
                let source = &source[range(*block, &source)];
                let place = range(*at, &target);
                let len = source.len().min(place.len());
                target[place][..len].copy_from_slice(&source[..len]);
                vec![(onto.clone(), Some(target))]
            }
            Self::Truncated { path, len } => {
                let mut bytes = read(path);
                bytes.truncate(*len as usize);
                vec![(path.clone(), Some(bytes))]
            }
            Self::Missing { path } => vec![(path.clone(), None)],
            Self::StaleFile { path, state } => vec![(path.clone(), Some(earlier[*state].read_file(path)))],
            Self::FilesSwapped { one, two } => {
                vec![(one.clone(), Some(read(two))), (two.clone(), Some(read(one)))]
            }
        }
    }
}

/// Every damage that is looked at: of each block and of each file every kind, with partners taken in turn.
fn damages(sim: &SimStorage, earlier: &[SimStorage]) -> Vec<Damage> {
    let mut all = Vec::new();
    let files: Vec<PathBuf> = sim.files().into_iter().filter(|path| !is_lock(path)).collect();
    let blocks: Vec<(PathBuf, usize)> = files
        .iter()
        .flat_map(|path| (0..sim.read_file(path).len().div_ceil(BLOCK)).map(|block| (path.clone(), block)))
        .collect();
    for (nth, (path, block)) in blocks.iter().enumerate() {
        let (path, block) = (path.clone(), *block);
        let whole = sim.read_file(&path).len() / BLOCK;
        all.push(Damage::Zeroed { path: path.clone(), block });
        let states = (0..earlier.len()).filter(|&state| earlier[state].has_file(&path));
        all.extend(states.map(|state| Damage::Stale { path: path.clone(), block, state }));
        // A neighbour, and one far away.
        for with in [block + 1, block + 7] {
            if with < whole {
                all.push(Damage::Swapped { path: path.clone(), block, with });
            }
        }
        if block < whole && block + 1 < whole {
            all.push(Damage::Misdirected { from: path.clone(), block, onto: path.clone(), at: block + 1 });
        }
        // Into the same place of another file, and anywhere.
        for step in [1, 61, 173] {
            let (onto, anywhere) = &blocks[(nth + step) % blocks.len()];
            let room = sim.read_file(onto).len().div_ceil(BLOCK);
            let at = if block < room { block } else { *anywhere };
            all.push(Damage::Misdirected { from: path.clone(), block, onto: onto.clone(), at });
        }
        let start = (block * BLOCK) as u64;
        all.extend([start, start + 1000].map(|len| Damage::Truncated { path: path.clone(), len }));
    }
    for (nth, one) in files.iter().enumerate() {
        all.push(Damage::Missing { path: one.clone() });
        let states = (0..earlier.len()).filter(|&state| earlier[state].has_file(one));
        all.extend(states.map(|state| Damage::StaleFile { path: one.clone(), state }));
        all.extend(files[nth + 1..].iter().map(|two| Damage::FilesSwapped { one: one.clone(), two: two.clone() }));
    }
    all
}

/// What is in them does not count.
fn is_lock(path: &Path) -> bool {
    path.ends_with("LOCK") || path.ends_with("READERS")
}

/// What a damage came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// The bytes are what they were.
    Nothing,
    Refused,
    /// No answer rests on what was changed.
    Unread,
    Reported,
}

struct Judge<'a> {
    subject: &'a Subject,
    earlier: &'a [SimStorage],
    spans: &'a [Span],
}

impl Judge<'_> {
    fn judge(&self, damage: &Damage) -> Result<Outcome, String> {
        let subject = self.subject;
        let disk = subject.disk();
        let mut rests_on_it = BTreeSet::new();
        let (mut opening, mut hit) = (false, BTreeSet::new());
        let mut any = false;
        for (path, bytes) in damage.files(&subject.sim, self.earlier) {
            let before = subject.sim.read_file(&path);
            let changed = changes(&before, bytes.as_deref().unwrap_or_default());
            any |= !changed.is_empty() || bytes.is_none();
            // A file's length is known to the manifest, and its being there to the directory.
            opening |= bytes.as_ref().is_none_or(|bytes| bytes.len() != before.len());
            for range in changed {
                for (_, resting) in subject.resting_on(&path, range.clone()) {
                    opening |= resting.open;
                    rests_on_it.extend(resting.asks);
                }
                let live = self.spans.iter().filter(|span| span.region == Region::Value && span.path == path);
                let touched = live.filter(|span| span.range.start < range.end && range.start < span.range.end);
                hit.extend(touched.map(|span| span.key.clone()));
            }
            match bytes {
                Some(bytes) => disk.write_file(&path, &bytes),
                None => disk.remove_file(&path),
            }
        }
        if !any {
            return Ok(Outcome::Nothing);
        }
        let before = disk.fingerprint();
        let store = match subject.open(&disk) {
            Ok(store) => store,
            Err(Error::Damaged(_) | Error::NotAStore { .. } | Error::Newer { .. }) if opening => {
                let unchanged = disk.fingerprint() == before;
                return if unchanged { Ok(Outcome::Refused) } else { Err("a refused open wrote".into()) };
            }
            Err(error) => return Err(format!("the open, resting on it: {opening}, fails: {error:?}")),
        };
        let mut outcome = Outcome::Unread;
        for (index, (ask, right)) in subject.asks.iter().zip(&subject.now).enumerate() {
            match ask.of(&store) {
                Ok(answer) if answer != *right => return Err(told(ask, &answer, right)),
                Ok(Answer::Value(_)) if matches!(ask, Ask::Value(key) if hit.contains(key)) => {
                    return Err(format!("{ask:?}: its bytes are damaged, and it is served"));
                }
                Ok(_) => {}
                Err(Error::Damaged(_)) if opening || rests_on_it.contains(&index) => outcome = Outcome::Reported,
                Err(error) => return Err(format!("{ask:?} rests on nothing that was changed, and fails: {error:?}")),
            }
        }
        store.abandon();
        Ok(outcome)
    }
}

/// Where two contents differ, block by block: from the first to the last byte that does.
fn changes(before: &[u8], after: &[u8]) -> Vec<Range<u64>> {
    let len = before.len().max(after.len());
    let byte = |bytes: &[u8], at: usize| bytes.get(at).copied();
    (0..len)
        .step_by(BLOCK)
        .filter_map(|start| {
            let mut differ = (start..(start + BLOCK).min(len)).filter(|&at| byte(before, at) != byte(after, at));
            let first = differ.next()?;
            Some(first as u64..differ.next_back().unwrap_or(first) as u64 + 1)
        })
        .collect()
}

#[test]
fn of_a_compacted_store_no_block_and_no_file_in_a_wrong_place_is_believed() {
    let started = Instant::now();
    let (subject, earlier) = compacted();
    let spans = atlas(&subject.sim);
    let damages = damages(&subject.sim, &earlier);
    let judge = Judge { subject: &subject, earlier: &earlier, spans: &spans };
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(None));
    let counts: Mutex<BTreeMap<(&str, Outcome), u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(damage) = damages.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let judged = caught(|| judge.judge(damage));
                    match judged {
                        Ok(outcome) => *counts.lock().entry((damage.kind(), outcome)).or_default() += 1,
                        Err(what) => drop(wrong.lock().get_or_insert(format!("{damage:?}: {what}"))),
                    }
                    if wrong.lock().is_some() {
                        return;
                    }
                }
            });
        }
    });
    if let Some(wrong) = wrong.into_inner() {
        panic!("{wrong}");
    }
    let counts = counts.into_inner();
    println!("{} damages of a compacted store, {:.1} s", damages.len(), started.elapsed().as_secs_f64());
    println!("{:36} {:>9} {:>9} {:>9} {:>9}", "", "nothing", "refused", "unread", "reported");
    for kind in counts.keys().map(|(kind, _)| *kind).collect::<BTreeSet<_>>() {
        let of = |outcome| counts.get(&(kind, outcome)).copied().unwrap_or_default();
        let [nothing, refused, unread, reported] =
            [Outcome::Nothing, Outcome::Refused, Outcome::Unread, Outcome::Reported].map(of);
        println!("{kind:36} {nothing:>9} {refused:>9} {unread:>9} {reported:>9}");
        assert!(refused + reported > 0, "{kind}: nothing was ever noticed");
    }
}
