//! Several threads on one piece of work: each takes the next part until there are none, or one has failed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

use crate::error::Result;

/// Calls `work` with every number below `count`, each once and in rising order of their beginnings, on this thread and
/// up to `lanes - 1` others. Ends at the first failure, which is the answer; blocks until every thread is done.
pub(crate) fn in_lanes(count: usize, lanes: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let lanes = lanes.min(count);
    if lanes <= 1 {
        return (0..count).try_for_each(work);
    }
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let lane = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= count {
                return;
            }
            if let Err(error) = work(part) {
                failure.lock().get_or_insert(error);
                // Nobody takes another. Far from the largest number, so that what is still added overflows nothing.
                next.store(count, Ordering::Relaxed);
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..lanes {
            // Without a thread the others do its part.
            let _ = thread::Builder::new().name("alight-lane".into()).spawn_scoped(scope, lane);
        }
        lane();
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// The threads that one transfer may use where nobody says otherwise: most of the processors that the process may use,
/// two at least so that one can wait for the disk, and no more than `most`. The last few are left to who made the call: on
/// 16 processors, 14 threads were faster than 16.
pub(crate) fn lanes_for(most: usize) -> usize {
    let processors = processors();
    (processors - processors / 8).clamp(2, most.max(2))
}

/// How many processors the process may use.
pub(crate) fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    // Asked for once: the answer takes the system ten reads of small files.
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn every_part_is_done_once_and_the_first_failure_ends_it() {
        for lanes in [0, 1, 2, 9] {
            let done = Mutex::new(vec![0; 100]);
            in_lanes(100, lanes, |part| {
                done.lock()[part] += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(*done.lock(), [1; 100]);
            let begun = AtomicUsize::new(0);
            let failed = in_lanes(10_000, lanes, |part| {
                begun.fetch_add(1, Ordering::Relaxed);
                if part == 5 { Err(Error::Closed) } else { Ok(()) }
            });
            assert!(matches!(failed, Err(Error::Closed)));
            assert!(begun.into_inner() < 10_000, "{lanes}");
        }
        in_lanes(0, 4, |_| Err(Error::Closed)).unwrap();
    }
}
