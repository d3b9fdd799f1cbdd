//! What a store is put through while the power may fail. Each is small: a cut at every call, times every state of the
//! disk, makes many out of few.

use alight::storage::sim::{Event, Fault, FaultKind, OpKind, SimStorage};
use alight::{CompactOptions, Durability, Eviction, Store};

use crate::harness::{Look, Run, expect_sound, look, record};
use crate::oracle::{Asked, Commit, Mark, PATH, Scribe, tiny};

/// Bytes that look random, different for every seed and length.
pub(crate) fn value(seed: u64, len: usize) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ len as u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

fn put(key: impl Into<String>, seed: u64, len: usize) -> (Vec<u8>, Option<Vec<u8>>) {
    (key.into().into_bytes(), Some(value(seed, len)))
}

fn delete(key: impl Into<String>) -> (Vec<u8>, Option<Vec<u8>>) {
    (key.into().into_bytes(), None)
}

fn create(sim: &SimStorage) -> Store {
    let store = tiny(sim).create_new(true).open(PATH).unwrap();
    sim.marker(Mark::Created.number());
    store
}

fn scribe<'a>(sim: &'a SimStorage, asked: &'a Asked) -> Scribe<'a> {
    Scribe { sim, asked, thread: 0 }
}

/// Runs commits one after another, durably.
fn commit_all(scribe: &Scribe<'_>, store: &Store, commits: Vec<Commit>) {
    for commit in commits {
        scribe.commit(store, commit, Durability::Immediate).unwrap();
    }
}

pub(crate) fn single_puts() -> Run {
    record("single_puts", false, |sim, asked| {
        let store = create(sim);
        let lengths = [0, 1, 300, 4095, 4096, 5000, 7000];
        let commits = lengths.iter().enumerate().map(|(n, &len)| vec![put(format!("k{n}"), n as u64, len)]);
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn overwrites_and_deletes() -> Run {
    record("overwrites_and_deletes", false, |sim, asked| {
        let store = create(sim);
        let commits =
            (0..10u64).map(|n| if n % 4 == 3 { vec![delete("k")] } else { vec![put("k", n, 100 + n as usize)] });
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

/// Keys so long that one holds a whole sector of its frame: a torn frame may lack the middle of a key and nothing else.
pub(crate) fn long_keys() -> Run {
    record("long_keys", false, |sim, asked| {
        let store = create(sim);
        let long = |n: u64, i: u64| format!("{n}-{i}-{}", "k".repeat(1000));
        let commits = (0..8u64).map(|n| {
            let few = (0..1 + n % 2).map(|i| put(long(n, i), n * 2 + i, 100)).collect::<Commit>();
            if n == 5 { vec![delete(long(4, 0))] } else { few }
        });
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn batches_with_deletes() -> Run {
    record("batches_with_deletes", false, |sim, asked| {
        let store = create(sim);
        let commits = (0..6u64).map(|n| {
            let mut commit: Commit =
                (0..3).map(|i| put(format!("{}", (n + i) % 5), n * 3 + i, 200 + 700 * i as usize)).collect();
            commit.push(delete(format!("{}", (n + 3) % 5)));
            commit
        });
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn large_values() -> Run {
    record("large_values", false, |sim, asked| {
        let store = create(sim);
        // Over 8 KiB: the payload is synced before the frame. Over 16 KiB: a segment of its own.
        let lengths = [9000, 100, 12_000, 20_000, 50, 9000, 40_000];
        let commits = lengths.iter().enumerate().map(|(n, &len)| vec![put(format!("k{}", n % 4), n as u64, len)]);
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn segment_roll() -> Run {
    record("segment_roll", false, |sim, asked| {
        let store = create(sim);
        // Twelve of these fill a segment of 64 KiB and a bit.
        let commits = (0..14u64).map(|n| vec![put(format!("k{}", n % 6), n, 3500)]);
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn index_flush() -> Run {
    record("index_flush", false, |sim, asked| {
        let store = create(sim);
        // The overlay holds six keys; the flush comes inside a commit.
        let commits = (0..16u64)
            .map(|n| if n % 5 == 4 { vec![delete(format!("k{}", n - 3))] } else { vec![put(format!("k{n}"), n, 64)] });
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn run_merges() -> Run {
    record("run_merges", false, |sim, asked| {
        let store = create(sim);
        let commits =
            (0..9u64).map(|n| (0..6).map(|i| put(format!("k{}", (n * 5 + i * 7) % 40), n * 6 + i, 40)).collect());
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

pub(crate) fn eventual_then_sync() -> Run {
    record("eventual_then_sync", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..9u64 {
            scribe.commit(&store, vec![put(format!("k{}", n % 4), n, 500)], Durability::Eventual).unwrap();
            if n == 4 {
                store.sync().unwrap();
                scribe.all_durable();
            }
        }
        scribe.commit(&store, vec![put("last", 99, 10_000)], Durability::Immediate).unwrap();
        scribe.commit(&store, vec![delete("k1")], Durability::Eventual).unwrap();
        store.abandon();
    })
}

pub(crate) fn eventual_and_large_mixed() -> Run {
    record("eventual_and_large_mixed", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..8u64 {
            let (len, durability) = match n % 4 {
                0 => (200, Durability::Eventual),
                1 => (9000, Durability::Eventual),
                2 => (20_000, Durability::Eventual),
                _ => (300, Durability::Immediate),
            };
            scribe.commit(&store, vec![put(format!("k{}", n % 5), n, len)], durability).unwrap();
        }
        store.abandon();
    })
}

pub(crate) fn close_and_reopen() -> Run {
    record("close_and_reopen", false, |sim, asked| {
        let mut store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..9u64 {
            scribe.commit(&store, vec![put(format!("k{}", n % 5), n, 600)], Durability::Immediate).unwrap();
            if n % 3 == 2 {
                store.close().unwrap();
                scribe.all_durable();
                store = tiny(sim).open(PATH).unwrap();
            }
        }
        store.abandon();
    })
}

pub(crate) fn killed_and_reopened() -> Run {
    record("killed_and_reopened", false, |sim, asked| {
        let mut store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..10u64 {
            let durability = if n % 3 == 0 { Durability::Eventual } else { Durability::Immediate };
            let len = if n % 4 == 1 { 9500 } else { 400 };
            scribe.commit(&store, vec![put(format!("k{}", n % 6), n, len)], durability).unwrap();
            if n % 2 == 1 {
                // The process dies: nothing is settled, and the disk's cache goes on.
                store.abandon();
                store = tiny(sim).open(PATH).unwrap();
            }
        }
        store.abandon();
    })
}

/// A process dies with commits unsynced in several segments; the next one goes on in one of them alone.
pub(crate) fn killed_with_news_in_several_segments() -> Run {
    record("killed_with_news_in_several_segments", false, |sim, asked| {
        let mut store = create(sim);
        let scribe = scribe(sim, asked);
        for round in 0..3u64 {
            for (n, len) in [300, 9000, 20_000, 400].into_iter().enumerate() {
                let key = format!("k{}", (round + n as u64) % 5);
                scribe.commit(&store, vec![put(key, round * 4 + n as u64, len)], Durability::Eventual).unwrap();
            }
            store.abandon();
            store = tiny(sim).open(PATH).unwrap();
            scribe.commit(&store, vec![put("last", 99 + round, 500)], Durability::Immediate).unwrap();
        }
        store.abandon();
    })
}

/// A process dies at its call number `kill_at`, wherever that is: while it commits, makes a segment, writes the index out.
/// The disk's cache goes on, and so does another process.
pub(crate) fn killed_at(kill_at: u64) -> Run {
    record("killed_at", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        // From that call on nothing has an effect, and none of it is noticed by anyone but the one who is dead.
        sim.inject(Fault::new(FaultKind::Eio, kill_at).from_then_on());
        for n in 0..22u64 {
            let (len, durability) = match n % 8 {
                3 => (9000, Durability::Eventual),
                5 => (300, Durability::Eventual),
                6 => (17_000, Durability::Immediate),
                _ => (700, Durability::Immediate),
            };
            let commit = (0..2).map(|i| put(format!("k{}", (n * 3 + i) % 14), n * 2 + i, len / 2)).collect();
            if scribe.commit(&store, commit, durability).is_err() {
                break;
            }
        }
        store.abandon();
        sim.clear_faults();
        sim.note("another process");
        let store = tiny(sim).open(PATH).unwrap();
        scribe.forget_what_was_never_written(&store);
        for n in 30..39u64 {
            scribe.commit(&store, vec![put(format!("k{}", n % 14), n, 400)], Durability::Immediate).unwrap();
        }
        store.abandon();
    })
}

/// A process dies at its call number `kill_at` while it makes the store; another one makes it, or opens it.
fn killed_while_it_was_made(kill_at: u64) -> Run {
    record("killed_while_it_was_made", false, |sim, asked| {
        sim.inject(Fault::new(FaultKind::Eio, kill_at).from_then_on());
        let made = tiny(sim).create_new(true).open(PATH);
        let dead = made.is_err();
        drop(made.map(Store::abandon));
        sim.clear_faults();
        sim.note("another process");
        let store = tiny(sim).create(true).open(PATH).unwrap();
        sim.marker(Mark::Created.number());
        let lengths: &[usize] = if dead { &[300, 9000, 20_000, 500] } else { &[] };
        let commits = lengths.iter().enumerate().map(|(n, &len)| vec![put(format!("k{n}"), n as u64, len)]);
        commit_all(&scribe(sim, asked), &store, commits.collect());
        store.abandon();
    })
}

/// How many calls [`killed_at`] makes of its disk before it would die of itself.
pub(crate) fn calls_to_be_killed_at() -> u64 {
    let run = killed_at(u64::MAX);
    let before = run.trace.events().take_while(|event| !matches!(event, Event::Note(_)));
    before.filter(|event| matches!(event, Event::Call(_))).count() as u64
}

/// Has the store compacted. Its commits repeat what earlier ones did: to the oracle they change nothing.
fn compact(scribe: &Scribe<'_>, store: &Store) {
    scribe.repeats(store, |store| {
        let report = store.compact(&CompactOptions::default(), |_| {}).unwrap();
        assert!(report.damages.is_empty(), "{:?}", report.damages);
    });
}

pub(crate) fn compaction() -> Run {
    record("compaction", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..26u64 {
            // Some keys live on in segments of which the rest dies.
            let key = if n % 6 == 0 { format!("lives{n}") } else { format!("k{}", n % 3) };
            scribe
                .commit(&store, vec![put(key, n, [700, 4096, 300][(n % 3) as usize])], Durability::Immediate)
                .unwrap();
        }
        scribe.commit(&store, vec![delete("k1"), delete("lives6")], Durability::Immediate).unwrap();
        compact(&scribe, &store);
        scribe.commit(&store, vec![put("k0", 90, 300), delete("lives12")], Durability::Immediate).unwrap();
        store.abandon();
    })
}

pub(crate) fn compaction_again_and_again() -> Run {
    record("compaction_again_and_again", false, |sim, asked| {
        let mut store = create(sim);
        let scribe = scribe(sim, asked);
        for round in 0..3u64 {
            for n in 0..9u64 {
                let commit = match n % 5 {
                    4 => vec![delete(format!("k{}", (n + round) % 4))],
                    _ => vec![put(format!("k{}", n % 4), round * 10 + n, 4500), put(format!("l{round}{n}"), n, 40)],
                };
                scribe.commit(&store, commit, Durability::Immediate).unwrap();
            }
            compact(&scribe, &store);
            if round == 1 {
                store.abandon();
                store = tiny(sim).open(PATH).unwrap();
            }
        }
        store.abandon();
    })
}

/// Dead values are punched out of segments that stay.
pub(crate) fn punching() -> Run {
    record("punching", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..8u64 {
            let commit = vec![put(format!("k{}", n % 2), n, 33_000), put(format!("lives{n}"), n, 300)];
            scribe.commit(&store, commit, Durability::Immediate).unwrap();
        }
        compact(&scribe, &store);
        scribe.commit(&store, vec![delete("k0"), put("k1", 50, 17_000)], Durability::Eventual).unwrap();
        scribe.commit(&store, vec![put("last", 51, 300)], Durability::Immediate).unwrap();
        store.abandon();
    })
}

/// Backups between commits: the store's files get second names, and go on losing their first ones to compaction.
pub(crate) fn backups() -> Run {
    record("backups", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..12u64 {
            let len = [500, 17_000, 3000, 33_000][(n % 4) as usize];
            let durability = if n % 4 == 2 { Durability::Eventual } else { Durability::Immediate };
            scribe.commit(&store, vec![put(format!("k{}", n % 5), n, len)], durability).unwrap();
            if n % 5 == 2 {
                scribe.back_up(&store, n);
            }
        }
        compact(&scribe, &store);
        scribe.commit(&store, vec![delete("k0")], Durability::Immediate).unwrap();
        store.abandon();
    })
}

/// Dead values are punched out of small commits that no later frame vouches for: recovery would read their payload, were
/// the segment not called sealed by then.
pub(crate) fn punching_what_nothing_vouches_for() -> Run {
    record("punching_what_nothing_vouches_for", false, |sim, asked| {
        let options = tiny(sim).segment_bytes(1 << 20).small_commit_bytes_max(128 << 10).overlay_entries_max(60);
        let store = options.create_new(true).open(PATH).unwrap();
        sim.marker(Mark::Created.number());
        let scribe = scribe(sim, asked);
        for n in 0..4u64 {
            let commit = vec![put(format!("k{n}"), n, 30_000), put(format!("lives{n}"), n, 80_000)];
            scribe.commit(&store, commit, Durability::Eventual).unwrap();
        }
        scribe.commit(&store, vec![delete("k0"), delete("k2")], Durability::Eventual).unwrap();
        compact(&scribe, &store);
        scribe.all_durable();
        for n in 0..3u64 {
            scribe.commit(&store, vec![put("later", n, 300)], Durability::Eventual).unwrap();
        }
        store.abandon();
    })
}

/// Deletes of puts that lie dead in the oldest segment, which stays: their segments go, and the deletes are repeated.
pub(crate) fn deletes_are_carried_on() -> Run {
    record("deletes_are_carried_on", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        let mut first: Commit = (0..4).map(|n| put(format!("a{n}"), n, 100)).collect();
        first.push(put("rock", 9, 40_000));
        scribe.commit(&store, first, Durability::Immediate).unwrap();
        for n in 0..20u64 {
            let commit = match n % 4 {
                0 => vec![delete(format!("a{}", n / 8))],
                _ => vec![put(format!("b{}", n % 2), n, 3900)],
            };
            scribe.commit(&store, commit, Durability::Immediate).unwrap();
            if n == 12 {
                compact(&scribe, &store);
            }
        }
        scribe.commit(&store, vec![delete("b0"), delete("b1")], Durability::Immediate).unwrap();
        compact(&scribe, &store);
        store.abandon();
    })
}

/// A bounded cache: what was put first goes with the commit that needs the room.
pub(crate) fn eviction() -> Run {
    const MAX_BYTES: usize = 70_000;
    record("eviction", false, |sim, asked| {
        let options = || tiny(sim).max_bytes(MAX_BYTES as u64).eviction(Eviction::Fifo);
        let mut store = options().create_new(true).open(PATH).unwrap();
        sim.marker(Mark::Created.number());
        let scribe = scribe(sim, asked);
        let mut held: Vec<(Vec<u8>, usize)> = Vec::new();
        for n in 0..26u64 {
            let commit = vec![put(format!("k{n}"), n, [300, 17_000, 4000, 9000][(n % 4) as usize])];
            let coming: usize = commit.iter().map(|(_, value)| value.as_ref().unwrap().len()).sum();
            let mut evicted = Vec::new();
            while held.iter().map(|(_, len)| len).sum::<usize>() + coming > MAX_BYTES {
                evicted.push(held.remove(0).0);
            }
            held.push((commit[0].0.clone(), coming));
            scribe.commit_that_evicts(&store, commit, evicted, Durability::Immediate).unwrap();
            if n == 15 {
                store.abandon();
                store = options().open(PATH).unwrap();
            }
        }
        store.abandon();
    })
}

/// Killed at its call number `kill_at` of a compaction; the next process goes on, and compacts.
pub(crate) fn killed_while_it_compacted(kill_at: u64) -> Run {
    record("killed_while_it_compacted", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..18u64 {
            let key = if n % 5 == 0 { format!("lives{n}") } else { format!("k{}", n % 3) };
            let len = if n % 6 == 1 { 20_000 } else { 3500 };
            scribe.commit(&store, vec![put(key, n, len)], Durability::Immediate).unwrap();
        }
        scribe.commit(&store, vec![delete("lives5"), delete("k2")], Durability::Immediate).unwrap();
        sim.note("compaction");
        sim.inject(Fault::new(FaultKind::Eio, kill_at).from_then_on());
        let mut dead = false;
        scribe.repeats_as_far_as_it_gets(|| dead = store.compact(&CompactOptions::default(), |_| {}).is_err());
        store.abandon();
        sim.clear_faults();
        sim.note("another process");
        let store = tiny(sim).open(PATH).unwrap();
        scribe.forget_what_was_never_repeated(&store);
        scribe.commit(&store, vec![put("k0", 70, 300), delete("lives10")], Durability::Immediate).unwrap();
        compact(&scribe, &store);
        store.abandon();
        if !dead {
            sim.note("survived");
        }
    })
}

/// A frame cannot be written, and is taken back; the process dies before that is durable. The next one gives the frame's
/// number again, in another segment: the first must not come back.
///
/// Both make the same commit, so that what is there is the same whichever of the two frames a power cut leaves.
pub(crate) fn killed_while_it_took_a_frame_back() -> Run {
    record("killed_while_it_took_a_frame_back", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        commit_all(&scribe, &store, vec![vec![put("k0", 0, 300)], vec![put("k1", 1, 300)]]);
        store.close().unwrap();
        let store = tiny(sim).open(PATH).unwrap();
        let commit = || vec![put("k2", 2, 300)];
        // The write fails, though all of it arrives; it is cut off, and then it is over.
        sim.inject(Fault::new(FaultKind::EioAfter, 0).on(OpKind::Write).path_ending(".seg"));
        sim.inject(Fault::new(FaultKind::Eio, 1).on(OpKind::Sync).path_ending(".seg").from_then_on());
        sim.inject(Fault::new(FaultKind::Eio, 0).path_ending("DISTRUST").from_then_on());
        scribe.commit(&store, commit(), Durability::Immediate).unwrap_err();
        store.abandon();
        assert_eq!(sim.faults_struck(), 3, "{}", sim.trace());
        sim.clear_faults();
        sim.note("another process");
        let store = tiny(sim).small_commit_bytes_max(100).open(PATH).unwrap();
        scribe.forget_what_was_never_written(&store);
        commit_all(&scribe, &store, vec![commit(), vec![put("k3", 3, 300)]]);
        store.abandon();
    })
}

pub(crate) fn recovered_from_a_torn_tail() -> Run {
    // A disk on which an earlier crash lost the first of three commits, and kept the others. Fewer keys than the overlay
    // holds, or a flush would have synced them.
    let earlier = record("", false, |sim, asked| {
        let store = create(sim);
        let scribe = scribe(sim, asked);
        for n in 0..2u64 {
            scribe.commit(&store, vec![put(format!("k{n}"), n, 5000)], Durability::Immediate).unwrap();
        }
        for n in 2..5u64 {
            scribe.commit(&store, vec![put(format!("k{n}"), n, 5000)], Durability::Eventual).unwrap();
        }
        store.abandon();
    });
    let mut walker = earlier.trace.walk();
    while walker.next_cut() {}
    let first_lost =
        walker.pending().iter().position(|change| change.path().extension().is_some_and(|kind| kind == "seg")).unwrap();
    let torn = walker.materialize(&alight::storage::sim::Choice::DropOne(first_lost));
    torn.start_recording();
    crate::harness::record_on(torn, "recovered_from_a_torn_tail", false, |sim, asked| {
        let kept: Vec<Commit> = earlier.asked.threads.lock()[&0][..2].to_vec();
        asked.threads.lock().insert(0, kept);
        let scribe = scribe(sim, asked);
        sim.marker(Mark::Created.number());
        sim.marker(Mark::Begun(0, 2).number());
        scribe.all_durable();
        let store = tiny(sim).open(PATH).unwrap();
        for n in 10..15u64 {
            scribe.commit(&store, vec![put(format!("k{}", n % 7), n, 3000)], Durability::Immediate).unwrap();
        }
        store.abandon();
    })
}

pub(crate) fn group_commit() -> Run {
    record("group_commit", true, |sim, asked| {
        let store = create(sim);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let store = store.clone();
                scope.spawn(move || {
                    let scribe = Scribe { sim, asked, thread };
                    for n in 0..4u64 {
                        let len = if thread == 3 && n == 1 { 9000 } else { 300 + 900 * n as usize };
                        let commit =
                            (0..2).map(|i| put(format!("{thread}-{n}-{i}"), thread * 100 + n * 10 + i, len)).collect();
                        scribe.commit(&store, commit, Durability::Immediate).unwrap();
                    }
                });
            }
        });
        store.abandon();
    })
}

macro_rules! sound {
    ($($name:ident),* $(,)?) => {
        /// Every workload.
        pub(crate) const ALL: &[fn() -> Run] = &[$($name),*];

        $(
            mod $name {
                #[test]
                fn survives_a_power_cut_at_every_call() {
                    super::expect_sound(&super::$name());
                }
            }
        )*
    };
}

sound!(
    single_puts,
    overwrites_and_deletes,
    long_keys,
    batches_with_deletes,
    large_values,
    segment_roll,
    index_flush,
    run_merges,
    eventual_then_sync,
    eventual_and_large_mixed,
    close_and_reopen,
    killed_and_reopened,
    killed_with_news_in_several_segments,
    killed_while_it_took_a_frame_back,
    recovered_from_a_torn_tail,
    group_commit,
    compaction,
    compaction_again_and_again,
    punching,
    punching_what_nothing_vouches_for,
    backups,
    deletes_are_carried_on,
    eviction,
);

#[test]
fn a_process_killed_at_any_call_of_a_compaction_leaves_a_store_that_survives_power_cuts() {
    let step = if std::env::var_os("ALIGHT_CRASH_RANDOM").is_some() { 1 } else { 3 };
    let (mut states, mut kill_at) = (0, 0);
    loop {
        let run = killed_while_it_compacted(kill_at);
        let tally = look(&run, &Look::quick());
        states += tally.states;
        if let Some(violation) = tally.violation {
            panic!("killed at call {kill_at}: {violation}");
        }
        if run.trace.events().any(|event| matches!(event, Event::Note(words) if words == "survived")) {
            break;
        }
        kill_at += step;
    }
    println!("killed at every call of {kill_at} of a compaction by steps of {step}: {states} states");
}

/// The story: killed after the first manifest got its name and before that name was durable. The next process found a
/// store with nothing to recover, and acknowledged commits; a power cut took the manifest away, and with it everything.
#[test]
fn a_process_killed_while_it_makes_a_store_leaves_one_that_survives_power_cuts() {
    let mut states = 0;
    let mut kill_at = 0;
    loop {
        let run = killed_while_it_was_made(kill_at);
        if run.asked.threads.lock().is_empty() {
            break;
        }
        let tally = look(&run, &Look::quick());
        states += tally.states;
        if let Some(violation) = tally.violation {
            panic!("killed at call {kill_at}: {violation}");
        }
        kill_at += 1;
    }
    println!("killed at each of {kill_at} calls of the making: {states} states");
}

#[test]
fn a_process_killed_at_any_call_leaves_a_store_that_survives_power_cuts() {
    let step = if std::env::var_os("ALIGHT_CRASH_RANDOM").is_some() { 1 } else { 3 };
    let calls = calls_to_be_killed_at();
    let mut states = 0;
    for kill_at in (0..calls).step_by(step) {
        let tally = look(&killed_at(kill_at), &Look::quick());
        states += tally.states;
        if let Some(violation) = tally.violation {
            panic!("killed at call {kill_at}: {violation}");
        }
    }
    println!("killed at every call of {calls} by steps of {step}: {states} states");
}
