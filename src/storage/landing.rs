//! Memory that a read fills, and that can be left to a read which does not come back.

use std::any::Any;
use std::io;
use std::mem;

use super::aligned::AlignedBuf;

/// Memory on the host that a read fills.
///
/// # Safety
/// The bytes that [`bytes`](Self::bytes) answered last stay where they are, and are nobody else's, for as long as what
/// [`leave`](Self::leave) answers lives.
#[expect(unsafe_code, reason = "a kernel that is late writes to memory by its address")]
pub unsafe trait Landing {
    /// All of it.
    fn bytes(&mut self) -> &mut [u8];

    /// Leaves the memory to whoever holds the answer. Here there is none from then on: `bytes` are empty.
    fn leave(&mut self) -> Box<dyn Any + Send>;
}

#[expect(unsafe_code, reason = "the trait's promise")]
// SAFETY: a buffer's bytes lie in memory of its own, which moving the buffer does not move.
unsafe impl Landing for AlignedBuf {
    fn bytes(&mut self) -> &mut [u8] {
        self
    }

    fn leave(&mut self) -> Box<dyn Any + Send> {
        Box::new(mem::replace(self, AlignedBuf::zeroed(0)))
    }
}

/// A range of a file that is read in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// Where in the file it begins.
    pub offset: u64,
    /// How many bytes it has.
    pub len: usize,
    /// How many each part has, but for the last, which may be shorter. Not 0.
    pub part_bytes: usize,
}

impl Parts {
    /// A range in one part.
    pub fn one(offset: u64, len: usize) -> Self {
        Self { offset, len, part_bytes: len.max(1) }
    }

    /// The bytes at the front of some memory that the range fills.
    ///
    /// # Errors
    /// `InvalidInput` where there are too few, or a part has none.
    pub fn of(self, memory: &mut [u8]) -> io::Result<&mut [u8]> {
        let fits = self.part_bytes > 0;
        memory.get_mut(..self.len).filter(|_| fits).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// How a read ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Every byte is there.
    Landed,
    /// It did not come in time, and has the memory.
    Overdue,
    /// It could not be begun, or not be waited for, without the risk of waiting for ever. Nothing is under way.
    WouldWait,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_stays_where_it_is() {
        let mut buffer = AlignedBuf::zeroed(20_000);
        buffer.bytes().iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
        let (address, expected) = (buffer.bytes().as_ptr(), buffer.to_vec());
        let left = buffer.leave();
        assert!(buffer.bytes().is_empty());
        let left = left.downcast::<AlignedBuf>().unwrap();
        assert_eq!((left.as_ptr(), &left[..]), (address, &expected[..]));
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let mut bytes = [0; 100];
        assert_eq!(Parts::one(7, 100).of(&mut bytes).unwrap().len(), 100);
        assert_eq!(Parts::one(0, 0).of(&mut bytes).unwrap(), []);
        for parts in [Parts::one(0, 101), Parts { offset: 0, len: 10, part_bytes: 0 }] {
            assert_eq!(parts.of(&mut bytes).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
