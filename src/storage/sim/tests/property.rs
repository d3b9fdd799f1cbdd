//! Random calls, and what must hold of every state that a crash after them can show, by a model that knows nothing of
//! how the twin works: it keeps every version of every file, and every file that ever bore a name.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;

const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Op {
    Write { file: usize, offset: u64, len: usize },
    Truncate { file: usize, len: u64 },
    Allocate { file: usize, offset: u64, len: u64 },
    Punch { file: usize, offset: u64, len: u64 },
    Sync { file: usize },
    Create { name: usize },
    Rename { from: usize, to: usize },
    Remove { name: usize },
    SyncDir,
}

const NAMES: [&str; 3] = ["x", "y", "z"];

fn any_op() -> impl Strategy<Value = Op> {
    let place = || prop_oneof![0u64..12_000, (0u64..12).prop_map(|page| page * 1024)];
    let (file, name) = (0..4usize, 0..NAMES.len());
    prop_oneof![
        8 => (file.clone(), place(), place())
            .prop_map(|(file, offset, len)| Op::Write { file, offset, len: len as usize }),
        2 => (file.clone(), place()).prop_map(|(file, len)| Op::Truncate { file, len }),
        1 => (file.clone(), place(), place()).prop_map(|(file, offset, len)| Op::Allocate { file, offset, len: len + 1 }),
        1 => (file.clone(), place(), place()).prop_map(|(file, offset, len)| Op::Punch { file, offset, len: len + 1 }),
        3 => file.prop_map(|file| Op::Sync { file }),
        4 => name.clone().prop_map(|name| Op::Create { name }),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Rename { from, to }),
        1 => name.prop_map(|name| Op::Remove { name }),
        2 => Just(Op::SyncDir),
    ]
}

/// What one file held at its last sync, and at every moment since; the last is what it holds now.
type Versions = Vec<Vec<u8>>;

#[derive(Default)]
struct Model {
    files: Vec<Versions>,
    handles: Vec<Arc<dyn StorageFile>>,
    /// What each name led to at the last sync of the directory, and at every moment since.
    names: BTreeMap<usize, Vec<Option<usize>>>,
    bytes_written: u8,
}

impl Model {
    fn bears(&self, name: usize) -> Option<usize> {
        *self.names.get(&name)?.last()?
    }

    fn rename(&mut self, name: usize, file: Option<usize>) {
        self.names.entry(name).or_insert_with(|| vec![None]).push(file);
    }

    fn change(&mut self, file: usize, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.files[file].last().unwrap().clone();
        change(&mut bytes);
        self.files[file].push(bytes);
    }

    fn apply(&mut self, sim: &SimStorage, op: &Op) {
        let with = |file: usize| Some(file % self.files.len().max(1)).filter(|_| !self.files.is_empty());
        match *op {
            Op::Create { name } => {
                if self.bears(name).is_none() {
                    self.handles.push(sim.open(&path(NAMES[name]), OpenMode::CreateNew).unwrap());
                    self.files.push(vec![Vec::new()]);
                    self.rename(name, Some(self.files.len() - 1));
                }
            }
            Op::Rename { from, to } => {
                if let (Some(file), true) = (self.bears(from), from != to) {
                    sim.rename(&path(NAMES[from]), &path(NAMES[to])).unwrap();
                    self.rename(from, None);
                    self.rename(to, Some(file));
                }
            }
            Op::Remove { name } => {
                if self.bears(name).is_some() {
                    sim.remove(&path(NAMES[name])).unwrap();
                    self.rename(name, None);
                }
            }
            Op::SyncDir => {
                sim.sync_dir(Path::new("/")).unwrap();
                self.names.values_mut().for_each(|past| drop(past.drain(..past.len() - 1)));
            }
            Op::Write { file, offset, len } => {
                let Some(file) = with(file) else { return };
                if len == 0 {
                    return;
                }
                self.bytes_written = self.bytes_written % 250 + 1;
                let byte = self.bytes_written;
                write(&*self.handles[file], &vec![byte; len], offset);
                let (from, to) = (offset as usize, offset as usize + len);
                self.change(file, |bytes| {
                    bytes.resize(bytes.len().max(to), 0);
                    bytes[from..to].fill(byte);
                });
            }
            Op::Truncate { file, len } => {
                let Some(file) = with(file) else { return };
                self.handles[file].truncate(len).unwrap();
                self.change(file, |bytes| bytes.resize(len as usize, 0));
            }
            Op::Allocate { file, offset, len } => {
                let Some(file) = with(file) else { return };
                self.handles[file].allocate(offset, len).unwrap();
                self.change(file, |bytes| bytes.resize(bytes.len().max((offset + len) as usize), 0));
            }
            Op::Punch { file, offset, len } => {
                let Some(file) = with(file) else { return };
                self.handles[file].punch(offset, len).unwrap();
                self.change(file, |bytes| {
                    let to = bytes.len().min((offset + len) as usize);
                    let from = to.min(offset as usize);
                    bytes[from..to].fill(0);
                });
            }
            Op::Sync { file } => {
                let Some(file) = with(file) else { return };
                self.handles[file].sync().unwrap();
                let versions = &mut self.files[file];
                versions.drain(..versions.len() - 1);
            }
        }
    }

    /// A name leads to a file that it led to at the last sync of the directory or since; so a name that did not change
    /// since is as it was.
    fn check(&self, state: &SimStorage, noise: bool) -> Result<(), TestCaseError> {
        for (name, past) in &self.names {
            let path = path(NAMES[*name]);
            if !state.has_file(&path) {
                prop_assert!(past.contains(&None), "{} is missing", path.display());
                continue;
            }
            let bytes = state.read_file(&path);
            let borne: BTreeSet<usize> = past.iter().flatten().copied().collect();
            let fits = borne.iter().any(|&file| noise || could_hold(&self.files[file], &bytes));
            prop_assert!(fits, "{} holds what it cannot ({} bytes)", path.display(), bytes.len());
        }
        Ok(())
    }
}

/// Whether a crash can leave these bytes: no more than the file ever had, and each sector as in one of the versions. Of
/// a sector, a shorter length may have cut the end off and a longer one shown it again as zeros; cut to nothing, it is
/// a sector that was never written.
fn could_hold(versions: &Versions, bytes: &[u8]) -> bool {
    let len_max = versions.iter().map(Vec::len).max().unwrap_or(0);
    let is_old = |(i, sector): (usize, &[u8])| {
        let kept = sector.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let sector = i * SECTOR..i * SECTOR + kept;
        kept == 0 || versions.iter().any(|version| version.get(sector.clone()) == Some(&bytes[sector.clone()]))
    };
    bytes.len() <= len_max && bytes.chunks(SECTOR).enumerate().all(is_old)
}

fn has_noise(choice: &Choice, walker: &CrashWalker) -> bool {
    walker.explain(choice).contains("Noise")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_state_is_one_that_a_disk_could_show(ops in prop::collection::vec(any_op(), 1..24)) {
        let sim = SimStorage::new();
        let mut model = Model::default();
        for op in &ops {
            model.apply(&sim, op);
        }
        let trace = sim.trace();
        let walker = trace.walk_to(trace.len());
        for choice in walker.choices().into_iter().chain((0..30).map(Choice::Random)) {
            let state = walker.materialize(&choice);
            state.disk.state.lock().live.image.files.values().for_each(content::Content::assert_invariants);
            let checked = model.check(&state, has_noise(&choice, &walker));
            prop_assert!(checked.is_ok(), "{}\n{}", checked.unwrap_err(), walker.explain(&choice));
        }
        sim.disk.state.lock().live.image.files.values().for_each(content::Content::assert_invariants);
        // Everything kept is what the store saw.
        prop_assert_eq!(walker.materialize(&Choice::All).fingerprint(), sim.fingerprint());
        // And everything kept, change by change, is the same as taking it over whole.
        for (file, content) in walker.landed_one_by_one() {
            prop_assert_eq!(content.fingerprint(), walker.live_content(file).fingerprint());
            prop_assert_eq!(content.to_vec(), walker.live_content(file).to_vec());
            prop_assert_eq!(content.allocated_bytes(), walker.live_content(file).allocated_bytes());
        }
    }

    /// Whatever is on the disk when everything has been synced is there after any crash, and nothing else.
    #[test]
    fn after_every_sync_there_is_one_state(ops in prop::collection::vec(any_op(), 1..24)) {
        let sim = SimStorage::new();
        let mut model = Model::default();
        for op in &ops {
            model.apply(&sim, op);
        }
        for handle in &model.handles {
            handle.sync().unwrap();
        }
        sim.sync_dir(Path::new("/")).unwrap();
        let trace = sim.trace();
        let walker = trace.walk_to(trace.len());
        prop_assert_eq!(walker.pending().len(), 0);
        prop_assert_eq!(walker.materialize(&Choice::None).fingerprint(), sim.fingerprint());
    }
}
