//! Bytes that the caller of a write has, lent to the thread that writes them, so that nobody need copy them.
//!
//! That thread may get stuck with a disk that does not come back, and the caller goes away then. So he can take back what he lent
//! at any moment, and does when he leaves.
//!
//! # Invariants
//! - Once the [`Lender`] is gone nobody in this process reads the bytes, nor names them to the kernel.
//! - Nobody waits for the disk while he has hold of them, since the lender would wait for him: they are copied, or named to the
//!   kernel in a call that was told not to wait.
//! - What the kernel took on before it has by its pages, whoever uses those since: what lands then is spoken for by nothing,
//!   as the commit was given up.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::aligned::{BufferPool, PooledPart};

/// The one who lends bytes. Dropping it takes them back.
#[derive(Debug)]
pub(crate) struct Lender<'b> {
    loan: Arc<Loan>,
    bytes: PhantomData<&'b [u8]>,
}

/// Bytes on loan.
pub struct LentBytes {
    loan: Arc<Loan>,
    len: usize,
    pool: Arc<BufferPool>,
}

#[derive(Debug)]
struct Loan {
    /// Nothing once they were taken back.
    bytes: Mutex<Option<Address>>,
    was_copied: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
struct Address(*const [u8]);

#[expect(unsafe_code, reason = "a raw pointer is not Send by itself")]
// SAFETY: the bytes are only read, and only while the lender's borrow of them lives.
unsafe impl Send for Address {}

/// Lends bytes, to be copied into buffers of `pool` where the kernel does not take them as they lie.
///
/// # Safety
/// The lender is dropped, not leaked, before the borrow ends.
#[expect(unsafe_code, reason = "the borrow is handed to a thread that may outlive it")]
pub(crate) unsafe fn lend<'b>(bytes: &'b [u8], pool: &Arc<BufferPool>) -> (Lender<'b>, LentBytes) {
    let loan = Arc::new(Loan { bytes: Mutex::new(Some(Address(bytes))), was_copied: AtomicBool::new(false) });
    let lent = LentBytes { loan: Arc::clone(&loan), len: bytes.len(), pool: Arc::clone(pool) };
    (Lender { loan, bytes: PhantomData }, lent)
}

impl Lender<'_> {
    /// Whether they had to be copied after all.
    pub(crate) fn was_copied(&self) -> bool {
        self.loan.was_copied.load(Ordering::Relaxed)
    }
}

impl Drop for Lender<'_> {
    fn drop(&mut self) {
        *self.loan.bytes.lock() = None;
    }
}

impl LentBytes {
    /// How many they are.
    #[expect(clippy::len_without_is_empty, reason = "nobody lends nothing")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Has the bytes named to the kernel by a call that does not wait; nothing where they were taken back.
    pub(super) fn name<R>(&self, call: impl FnOnce(*const [u8]) -> R) -> Option<R> {
        let bytes = self.loan.bytes.lock();
        bytes.map(|Address(bytes)| call(bytes))
    }

    /// A copy of them.
    ///
    /// # Errors
    /// `ConnectionAborted` where they were taken back.
    pub fn copied(&self) -> io::Result<PooledPart> {
        let mut copy = self.pool.take(self.len).cut([self.len]);
        let mut copy = copy.pop().expect("one part was cut");
        let bytes = self.loan.bytes.lock();
        let Some(Address(bytes)) = *bytes else {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "whoever lent the bytes is gone"));
        };
        #[expect(unsafe_code, reason = "the borrow is the lender's")]
        // SAFETY: the lender's borrow lives: it is gone only after it has taken the bytes back, for which it needs the lock
        // that is held here.
        copy.copy_from_slice(unsafe { &*bytes });
        self.loan.was_copied.store(true, Ordering::Relaxed);
        Ok(copy)
    }
}

impl fmt::Debug for LentBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LentBytes({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lent(bytes: &[u8]) -> (Lender<'_>, LentBytes) {
        #[expect(unsafe_code, reason = "what is tested")]
        // SAFETY: the tests drop it.
        unsafe {
            lend(bytes, &Arc::default())
        }
    }

    #[test]
    fn what_is_lent_is_reached_until_it_is_taken_back() {
        let bytes: Vec<u8> = (0..10_000u32).map(|at| at as u8).collect();
        let (lender, lent) = lent(&bytes);
        assert_eq!(lent.name(|named| named == &raw const bytes[..]), Some(true));
        assert!(!lender.was_copied());
        assert_eq!(lent.copied().unwrap()[..], bytes);
        assert!(lender.was_copied());
        drop(lender);
        drop(bytes);
        assert_eq!(lent.name(|_| unreachable!("they are gone")), None::<()>);
        assert_eq!(lent.copied().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn the_lender_waits_for_who_reads() {
        let bytes = vec![7; 1 << 20];
        let (lender, lent) = lent(&bytes);
        let reading = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                lent.name(|_| {
                    reading.store(true, Ordering::SeqCst);
                    std::thread::sleep(std::time::Duration::from_millis(30));
                    reading.store(false, Ordering::SeqCst);
                })
            });
            while !reading.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            drop(lender);
            assert!(!reading.load(Ordering::SeqCst));
        });
    }
}
