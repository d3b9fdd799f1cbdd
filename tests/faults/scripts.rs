//! What a store is put through before, while and after a call fails.

use alight::Durability;
use alight::storage::sim::{Choice, SimStorage};

use crate::PATH;
use crate::common::bytes;
use crate::common::model::{Commit, make};
use crate::common::tiny::tiny_on as options;

/// One step of a script.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Commit(Commit, Durability),
    Sync,
    /// Closes the store and opens it again.
    Close,
    /// Lets go of the store as a killed process does, and opens it again.
    Kill,
    /// Makes a backup, and opens it.
    Backup(&'static str),
    /// Reads, lists, measures and verifies.
    Read,
    /// Gives back all the space that can be.
    Compact,
}

pub(crate) fn put(key: u64, seed: u64, len: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    (format!("k{key}").into_bytes(), Some(bytes(seed, len)))
}

pub(crate) fn delete(key: u64) -> (Vec<u8>, Option<Vec<u8>>) {
    (format!("k{key}").into_bytes(), None)
}

pub(crate) fn durable(commit: Commit) -> Step {
    Step::Commit(commit, Durability::Immediate)
}

pub(crate) fn eventual(commit: Commit) -> Step {
    Step::Commit(commit, Durability::Eventual)
}

/// A script, and whether it begins with a torn tail.
pub(crate) struct Script {
    pub(crate) name: &'static str,
    pub(crate) torn: bool,
    pub(crate) steps: Vec<Step>,
}

pub(crate) fn scripts() -> Vec<Script> {
    let script = |name, steps| Script { name, torn: false, steps };
    vec![
        script("puts", (0..4).map(|n| durable(vec![put(n, n, 300 + 1500 * n as usize)])).chain([Step::Read]).collect()),
        script(
            "batches and deletes, and the index written out",
            (0..5)
                .map(|n| durable(vec![put(n, n, 400), put(n + 3, n + 9, 5000), delete(n + 1)]))
                .chain([Step::Read, durable(vec![delete(2)])])
                .collect(),
        ),
        script(
            "large values",
            vec![
                durable(vec![put(1, 1, 9000)]),
                durable(vec![put(2, 2, 400), put(3, 3, 20_000)]),
                durable(vec![put(1, 4, 12_000), delete(2)]),
                Step::Read,
                durable(vec![put(4, 5, 100)]),
            ],
        ),
        script("segments that fill", (0..9).map(|n| durable(vec![put(n % 4, n, 7000)])).chain([Step::Read]).collect()),
        script(
            "index runs that are merged",
            (0..6).map(|n| durable((0..5).map(|i| put((n * 5 + i * 3) % 13, n * 5 + i, 30)).collect())).collect(),
        ),
        script(
            "eventual commits",
            vec![
                eventual(vec![put(1, 1, 500)]),
                eventual(vec![put(2, 2, 9000)]),
                durable(vec![put(3, 3, 500)]),
                eventual(vec![put(1, 4, 20_000)]),
                eventual(vec![delete(2)]),
                Step::Sync,
                eventual(vec![put(5, 5, 500)]),
                Step::Read,
            ],
        ),
        script(
            "close and open",
            (0..3)
                .flat_map(|n| [durable(vec![put(n, n, 600)]), eventual(vec![put(n + 1, n + 9, 9000)]), Step::Close])
                .chain([durable(vec![delete(1)]), Step::Read])
                .collect(),
        ),
        script(
            "killed and opened",
            (0..4)
                .flat_map(|n| [durable(vec![put(n, n, 600)]), eventual(vec![put(n + 1, n + 9, 9000)]), Step::Kill])
                .chain([durable(vec![delete(1)]), Step::Read])
                .collect(),
        ),
        script(
            "compaction",
            (0..7)
                .map(|n| durable(vec![put(n % 2, n, 4000), put(10 + n, n, 300)]))
                .chain([durable(vec![delete(10), delete(11), put(3, 30, 20_000)]), durable(vec![delete(3)])])
                .chain([
                    Step::Compact,
                    Step::Read,
                    durable(vec![put(1, 40, 500), delete(12)]),
                    Step::Compact,
                    Step::Read,
                ])
                .collect(),
        ),
        script(
            "holes in segments that stay, and a kill",
            (0..3)
                .map(|n| durable(vec![put(0, n, 40_000), put(10 + n, n, 300)]))
                .chain([Step::Compact, Step::Kill, durable(vec![delete(0)]), Step::Compact, Step::Close, Step::Read])
                .collect(),
        ),
        script(
            "backups of a store that goes on",
            vec![
                durable(vec![put(1, 1, 40_000), put(2, 2, 300)]),
                durable(vec![put(1, 3, 40_000), delete(2)]),
                eventual(vec![put(3, 3, 700)]),
                Step::Backup("/backup1"),
                durable(vec![put(1, 4, 9000), put(4, 4, 300)]),
                Step::Compact,
                Step::Backup("/backup2"),
                Step::Kill,
                durable(vec![delete(1)]),
                Step::Read,
            ],
        ),
        Script {
            name: "a torn tail",
            torn: true,
            steps: vec![Step::Read, durable(vec![put(9, 9, 600)]), durable(vec![put(8, 8, 9000)]), Step::Close],
        },
    ]
}

/// A disk on which an earlier crash tore the first of three commits that nobody was told of; and what was there before.
pub(crate) fn torn_disk() -> (SimStorage, Vec<Commit>) {
    let sim = SimStorage::new();
    let store = options(&sim).create_new(true).open(PATH).unwrap();
    let commits: Vec<Commit> = (0..5).map(|n| vec![put(n, n, 3000)]).collect();
    for (n, commit) in commits.iter().enumerate() {
        make(&store, commit, if n < 2 { Durability::Immediate } else { Durability::Eventual }).unwrap();
    }
    store.abandon();
    let mut walker = sim.trace().walk();
    while walker.next_cut() {}
    let of_segment = |path: &std::path::Path| path.extension().is_some_and(|kind| kind == "seg");
    let first = walker.pending().iter().position(|change| change.is_write() && of_segment(change.path())).unwrap();
    (walker.materialize(&Choice::DropOne(first)), commits[..2].to_vec())
}
