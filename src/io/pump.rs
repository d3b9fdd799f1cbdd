//! The double buffer of a large write: while some buffers are on their way to the disk, the next is filled.
//!
//! # Invariants
//! - A window that is being flushed is its thread's alone: who waits no longer frees nothing.
//! - When the pump is done, or has failed, no window is in flight and what flushed them is dropped; only where it is stuck
//!   some are.

use std::iter;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use parking_lot::Mutex;

use super::pipeline::words;
use super::watched::{Steps, Waited, Watched, step};
use crate::config::{FIRST_WRITE_BYTES, WRITE_BUFFER_BYTES, WRITE_BUFFERS, WRITE_GROWTH};
use crate::error::{Error, Result};
use crate::storage::{BufferPool, PooledBuf};

/// Carries ranges, in rising order, from `fill` to `flush`, in windows of at most [`WRITE_BUFFER_BYTES`], the first of
/// [`FIRST_WRITE_BYTES`], so that the disk begins early.
///
/// `fill(offset, window)` is called on this thread, once for each window, in rising order; `flush(offset, window)` on
/// others, for several windows at once. The first failure of either ends the pump. Memory: [`WRITE_BUFFERS`] windows of the
/// pool.
pub(crate) fn pump(
    threads: &Watched,
    pool: &Arc<BufferPool>,
    ranges: &[Range<u64>],
    deadline: Option<Duration>,
    mut fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
    flush: impl Fn(u64, &[u8]) -> Result<()> + Send + Sync + 'static,
) -> Result<Waited> {
    let longest = ranges.iter().map(|range| range.end - range.start).max().unwrap_or(0);
    let window = (WRITE_BUFFER_BYTES as u64).min(longest).max(1);
    let mut windows = windows(ranges);
    let count = windows.clone().count();

    let (give, free) = mpsc::channel();
    let (full, take) = mpsc::channel();
    let shared =
        Arc::new(Shared { take: Mutex::new(take), failure: Mutex::new(None), unwanted: AtomicBool::new(false), flush });
    // Nothing is gained by another thread for one window, but that it may be left alone.
    let lanes = if count <= 1 && deadline.is_none() { 0 } else { count.min(WRITE_BUFFERS - 1) };
    let started = (0..lanes).take_while(|_| {
        let (shared, give, steps) = (Arc::clone(&shared), give.clone(), threads.steps());
        let work = move || {
            shared.work(&give, &steps);
            // First what it flushes with, then what its end is known by.
            drop(shared);
            drop(give);
        };
        threads.start(Box::new(work)).is_ok()
    });
    let started = started.count();
    // From here on the threads alone can give windows back.
    drop(give);
    let mut in_flight = InFlight { free, deadline, count: 0 };
    let mut made = 0;
    let filled = windows.try_for_each(|(offset, len)| {
        if shared.failure.lock().is_some() {
            return Ok(());
        }
        let mut buffer: PooledBuf = match in_flight.take_now() {
            Some(buffer) => buffer,
            None if made < WRITE_BUFFERS => {
                made += 1;
                pool.take(window as usize)
            }
            None => in_flight.take()?,
        };
        fill(offset, &mut buffer[..len])?;
        step();
        if started == 0 {
            (shared.flush)(offset, &buffer[..len])?;
            made -= 1;
        } else {
            in_flight.count += 1;
            full.send((offset, len, buffer)).map_err(|_| gone())?;
        }
        Ok(())
    });
    // Lets the threads run out of work.
    drop(full);
    let settled = if matches!(filled, Err(Ended::Stuck)) { Err(Ended::Stuck) } else { in_flight.settle() };
    if matches!(settled, Err(Ended::Stuck)) {
        shared.unwanted.store(true, Ordering::Relaxed);
        return Ok(Waited::Stuck);
    }
    match shared.failure.lock().take() {
        Some(error) => Err(error),
        None => match filled.and(settled) {
            Err(Ended::Failed(error)) => Err(error),
            _ => Ok(Waited::Done),
        },
    }
}

/// Cuts ranges into windows: where each begins, and how long it is.
fn windows(ranges: &[Range<u64>]) -> impl Iterator<Item = (u64, usize)> + Clone {
    let mut ranges = ranges.iter().filter(|range| !range.is_empty()).cloned();
    let (mut rest, mut longest) = (0..0, FIRST_WRITE_BYTES);
    iter::from_fn(move || {
        if rest.is_empty() {
            rest = ranges.next()?;
        }
        let len = longest.min(rest.end - rest.start);
        let start = rest.start;
        rest.start += len;
        longest = (longest * WRITE_GROWTH).min(WRITE_BUFFER_BYTES as u64);
        // No longer than a buffer.
        Some((start, len as usize))
    })
}

/// What the threads that flush have in common.
struct Shared<F> {
    take: Mutex<Receiver<(u64, usize, PooledBuf)>>,
    /// The first that failed.
    failure: Mutex<Option<Error>>,
    /// Nobody waits any more: what was not begun need not be.
    unwanted: AtomicBool,
    flush: F,
}

impl<F: Fn(u64, &[u8]) -> Result<()>> Shared<F> {
    /// Flushes windows until there are no more.
    fn work(&self, give: &Sender<PooledBuf>, steps: &Steps) {
        loop {
            // The lock is let go before the flush, so that another thread can take the next window.
            let Ok((offset, len, buffer)) = self.take.lock().recv() else { return };
            if self.failure.lock().is_none() && !self.unwanted.load(Ordering::Relaxed) {
                let done = catch_unwind(AssertUnwindSafe(|| (self.flush)(offset, &buffer[..len])));
                let done =
                    done.unwrap_or_else(|panic| Err(Error::Panicked { operation: "write", why: words(&*panic) }));
                if let Err(error) = done {
                    self.failure.lock().get_or_insert(error);
                }
            }
            steps.take(offset);
            if give.send(buffer).is_err() {
                return;
            }
        }
    }
}

/// Why the pump ended early.
enum Ended {
    Failed(Error),
    Stuck,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Failed(error)
    }
}

fn gone() -> Ended {
    Ended::Failed(Error::Panicked { operation: "write", why: "its threads are gone".into() })
}

/// Windows that the threads have.
struct InFlight {
    free: Receiver<PooledBuf>,
    deadline: Option<Duration>,
    count: usize,
}

impl InFlight {
    fn take_now(&mut self) -> Option<PooledBuf> {
        self.free.try_recv().ok().inspect(|_| self.count -= 1)
    }

    /// Waits for one.
    fn take(&mut self) -> Result<PooledBuf, Ended> {
        let back = match self.deadline {
            None => self.free.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => self.free.recv_timeout(deadline),
        };
        match back {
            Ok(buffer) => {
                self.count -= 1;
                Ok(buffer)
            }
            Err(RecvTimeoutError::Timeout) => Err(Ended::Stuck),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    /// Waits for all, and then for the threads to end.
    fn settle(&mut self) -> Result<(), Ended> {
        while self.count > 0 {
            self.take()?;
            step();
        }
        match self.take() {
            Err(Ended::Stuck) => Err(Ended::Stuck),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::fixtures::Gate;
    use std::iter::once;
    use std::slice::from_ref;
    use std::sync::atomic::AtomicU64;

    const LONG: Option<Duration> = Some(Duration::from_secs(60));

    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    }

    /// Pumps one range on threads of its own.
    fn pump_all(
        ranges: &[Range<u64>],
        deadline: Option<Duration>,
        fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
        flush: impl Fn(u64, &[u8]) -> Result<()> + Send + Sync + 'static,
    ) -> Result<Waited> {
        pump(&Watched::default(), &Arc::default(), ranges, deadline, fill, flush)
    }

    #[test]
    fn the_first_window_is_short_and_the_next_ones_as_long_as_a_buffer() {
        let lens = |ranges: &[Range<u64>]| windows(ranges).map(|(_, len)| len >> 10).collect::<Vec<_>>();
        assert_eq!(lens(from_ref(&(0..16 << 20))), [512, 2048, 4096, 4096, 4096, 1536]);
        assert_eq!(lens(&[0..256 << 10, 1 << 20..1 << 20, 2 << 20..9 << 20]), [256, 2048, 4096, 1024]);
        assert_eq!(lens(&[]), []);
    }

    #[test]
    fn every_byte_arrives_once_where_it_belongs() {
        let window = WRITE_BUFFER_BYTES as u64;
        let whole = [0, 1, 4096, window - 1, window, window + 1, 3 * window, 5 * window + 77]
            .map(|end| Vec::from_iter(once(0..end)));
        let parts = vec![0..4096, 8192..8192 + 2 * window + 5, 3 * window..3 * window, 4 * window..9 * window];
        for ranges in whole.into_iter().chain([parts]) {
            for deadline in [None, LONG] {
                let end = ranges.last().map_or(0, |last| last.end);
                let target = Arc::new(Mutex::new(vec![None; end as usize]));
                let mut next = 0;
                let flushed = Arc::clone(&target);
                let outcome = pump_all(
                    &ranges,
                    deadline,
                    |offset, window| {
                        assert!(offset >= next, "windows are filled in order");
                        next = offset + window.len() as u64;
                        window.iter_mut().zip(offset..).for_each(|(slot, at)| *slot = byte(at));
                        Ok(())
                    },
                    move |offset, window| {
                        let mut target = flushed.lock();
                        for (at, &byte) in (offset as usize..).zip(window) {
                            assert_eq!(target[at].replace(byte), None, "byte {at} was flushed twice");
                        }
                        Ok(())
                    },
                );
                assert_eq!(outcome.unwrap(), Waited::Done);
                for (at, found) in (0..).zip(&*target.lock()) {
                    let wanted = ranges.iter().any(|range| range.contains(&at));
                    assert_eq!(*found, wanted.then(|| byte(at)), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn the_first_failure_of_either_side_is_returned_and_ends_the_pump() {
        let total = 20 * WRITE_BUFFER_BYTES as u64;
        for (failing, (at, _)) in (0..).zip(windows(from_ref(&(0..total)))) {
            let filled = AtomicU64::new(0);
            let in_fill = pump_all(
                from_ref(&(0..total)),
                LONG,
                |offset, _| if offset == at { Err(Error::Closed) } else { Ok(()) },
                |_, _| Ok(()),
            );
            assert!(matches!(in_fill, Err(Error::Closed)));
            let in_flush = pump_all(
                from_ref(&(0..total)),
                LONG,
                |_, _| {
                    filled.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                },
                move |offset, _| if offset == at { Err(Error::Closed) } else { Ok(()) },
            );
            assert!(matches!(in_flush, Err(Error::Closed)));
            assert!(filled.into_inner() <= failing + 2 * WRITE_BUFFERS as u64 + 1, "it stops soon after the failure");
        }
        let panicked = pump_all(from_ref(&(0..total)), LONG, |_, _| Ok(()), |_, _| panic!("planted"));
        assert!(matches!(&panicked, Err(Error::Panicked { why, .. }) if why == "planted"), "{panicked:?}");
    }

    #[test]
    fn a_window_that_gets_stuck_is_left_to_its_thread_and_what_was_not_begun_is_not() {
        let window = WRITE_BUFFER_BYTES as u64;
        for total in [1, window, 20 * window] {
            let (gate, begun, ended) = (Gate::default(), Arc::new(AtomicU64::new(0)), Arc::new(()));
            gate.close();
            let (stuck, counted, owned) = (gate.clone(), Arc::clone(&begun), Arc::clone(&ended));
            let outcome = pump_all(
                from_ref(&(0..total)),
                Some(Duration::from_millis(60)),
                |_, _| Ok(()),
                move |_, window| {
                    let _owned = &owned;
                    counted.fetch_add(1, Ordering::Relaxed);
                    stuck.pass();
                    assert!(!window.is_empty());
                    Ok(())
                },
            );
            assert_eq!(outcome.unwrap(), Waited::Stuck);
            assert!(Arc::strong_count(&ended) > 1, "what is stuck has what it uses");
            gate.open();
            while Arc::strong_count(&ended) > 1 {
                std::thread::yield_now();
            }
            assert!(begun.load(Ordering::Relaxed) < WRITE_BUFFERS as u64, "{begun:?}");
        }
    }
}
