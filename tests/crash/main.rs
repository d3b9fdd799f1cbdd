//! Crash simulation: the power is cut at every call that a workload makes of its disk, and the store is opened on every
//! state that the disk could then be in.
//!
//! `ALIGHT_CRASH_RANDOM=N` draws N random states at every cut instead of a few (the long run), `ALIGHT_CRASH_SEED=N`
//! other ones, `ALIGHT_CRASH_ONLY=WORKLOAD` looks at one workload. A violation prints the workload, the cut, the choice
//! and the seed; with the same seed the same states come again.
//!
//! `sabotage` shows that the simulation sees what it is there to see; `ALIGHT_SABOTAGE_ALL=1` removes every sync of every
//! workload in turn.

mod damage;
mod harness;
mod oracle;
#[expect(unreachable_pub, reason = "other tests share it")]
#[path = "../common/panics.rs"]
mod panics;
#[expect(unreachable_pub, reason = "other tests share it")]
#[path = "../common/rebuild.rs"]
mod rebuild;
mod sabotage;
#[expect(unreachable_pub, reason = "other tests share it")]
#[path = "../common/sabotages.rs"]
mod sabotages;
#[expect(unreachable_pub, dead_code, reason = "other tests share it")]
#[path = "../common/tiny.rs"]
mod tiny;
mod workloads;
