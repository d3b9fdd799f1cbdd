//! The double buffer of a large write: while some buffers are on their way to the disk, the next is filled.

use std::sync::{Arc, mpsc};

use parking_lot::Mutex;

use crate::config::{WRITE_BUFFER_BYTES, WRITE_BUFFERS};
use crate::error::Result;
use crate::storage::{BufferPool, PooledBuf};

/// Carries `total` bytes from `fill` to `flush`, in order, in windows of at most [`WRITE_BUFFER_BYTES`].
///
/// `fill(offset, window)` is called on this thread, once for each window, in rising order; `flush(offset, window)` on
/// others, for several windows at once. The first failure of either ends the pump; when it returns, no window is in
/// flight. Memory: [`WRITE_BUFFERS`] windows of the pool.
pub(crate) fn pump(
    pool: &Arc<BufferPool>,
    total: u64,
    mut fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
    flush: impl Fn(u64, &[u8]) -> Result<()> + Sync,
) -> Result<()> {
    let window = (WRITE_BUFFER_BYTES as u64).min(total).max(1) as usize;
    let windows = total.div_ceil(window as u64);
    if windows <= 1 {
        let mut buffer = pool.take(window);
        fill(0, &mut buffer[..total as usize])?;
        return flush(0, &buffer[..total as usize]);
    }

    let failure = Mutex::new(None);
    let (give, free) = mpsc::channel();
    let (full, take) = mpsc::channel::<(u64, usize, PooledBuf)>();
    let take = Mutex::new(take);
    for _ in 0..WRITE_BUFFERS.min(windows as usize) {
        give.send(pool.take(window)).expect("the receiver is held below");
    }
    let filled = std::thread::scope(|scope| {
        for _ in 1..WRITE_BUFFERS {
            let (give, take, failure, flush) = (give.clone(), &take, &failure, &flush);
            scope.spawn(move || {
                loop {
                    // The lock is let go before the flush, so that the other thread can take the next window.
                    let Ok((offset, len, buffer)) = take.lock().recv() else { return };
                    let done = if failure.lock().is_none() { flush(offset, &buffer[..len]) } else { Ok(()) };
                    if let Err(error) = done {
                        failure.lock().get_or_insert(error);
                    }
                    if give.send(buffer).is_err() {
                        return;
                    }
                }
            });
        }
        let mut offset = 0;
        while offset < total && failure.lock().is_none() {
            let mut buffer: PooledBuf = free.recv().expect("`give` is held by this frame");
            let len = (window as u64).min(total - offset) as usize;
            fill(offset, &mut buffer[..len])?;
            full.send((offset, len, buffer)).expect("`take` is held by this frame");
            offset += len as u64;
        }
        // Lets the writers run out of work, on every way out of this scope.
        drop(full);
        Ok(())
    });
    match failure.into_inner() {
        Some(error) => Err(error),
        None => filled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    }

    #[test]
    fn every_byte_arrives_once_where_it_belongs() {
        let window = WRITE_BUFFER_BYTES as u64;
        for total in [0, 1, 4096, window - 1, window, window + 1, 3 * window, 5 * window + 77] {
            let target = Mutex::new(vec![None; total as usize]);
            let mut next = 0;
            pump(
                &Arc::default(),
                total,
                |offset, window| {
                    assert_eq!(offset, next, "windows are filled in order");
                    next += window.len() as u64;
                    window.iter_mut().zip(offset..).for_each(|(slot, at)| *slot = byte(at));
                    Ok(())
                },
                |offset, window| {
                    let mut target = target.lock();
                    for (at, &byte) in (offset as usize..).zip(window) {
                        assert_eq!(target[at].replace(byte), None, "byte {at} was flushed twice");
                    }
                    Ok(())
                },
            )
            .unwrap();
            assert!(target.into_inner().into_iter().zip(0..).all(|(found, at)| found == Some(byte(at))));
        }
    }

    #[test]
    fn the_first_failure_of_either_side_is_returned_and_ends_the_pump() {
        let total = 20 * WRITE_BUFFER_BYTES as u64;
        for failing in 0..20u64 {
            let at = failing * WRITE_BUFFER_BYTES as u64;
            let filled = AtomicU64::new(0);
            let in_fill = pump(
                &Arc::default(),
                total,
                |offset, _| if offset == at { Err(Error::Closed) } else { Ok(()) },
                |_, _| Ok(()),
            );
            assert!(matches!(in_fill, Err(Error::Closed)));
            let in_flush = pump(
                &Arc::default(),
                total,
                |_, _| {
                    filled.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                },
                |offset, _| if offset == at { Err(Error::Closed) } else { Ok(()) },
            );
            assert!(matches!(in_flush, Err(Error::Closed)));
            assert!(filled.into_inner() <= failing + 2 * WRITE_BUFFERS as u64 + 1, "it stops soon after the failure");
        }
    }
}
