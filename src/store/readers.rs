//! Which manifests readers in other processes hold on to, so that the writer takes nothing away that they still see.
//!
//! A read-only store holds a shared lock on one byte of the file `READERS`: the byte whose number is the generation of its
//! manifest. The lock ends with the process that took it, however that ends: a reader that dies holds nothing. Nothing is
//! ever written to the file, and a lock is not on the disk: after a power cut nobody reads.
//!
//! # Invariants
//! - A reader believes a manifest only if it is still the store's manifest once its byte is locked. So whoever asks
//!   *after* a newer manifest was put in place meets either the lock, or a reader that will see the newer one.
//! - What no key leads to as of the manifest of generation `G + 1` is seen by nobody once [`oldest_reader`] finds no
//!   reader up to `G`: a reader at `G + 1` or later has at least the commits that this manifest covers.
//! - Where such locks are not to be had a reader reads without one, and a writer takes nothing away.

use std::io;

use crate::storage::{Storage, StorageLock};
use crate::store::layout::Layout;

/// Keeps a writer in another process from taking away what one generation of the manifest leads to; until dropped.
#[derive(Debug)]
pub(crate) struct ReaderPin {
    generation: u64,
    _lock: Box<dyn StorageLock>,
}

impl ReaderPin {
    /// Pins a generation. The caller then reads the manifest again, and starts over if it is another by now.
    ///
    /// `None`, with a warning, where it cannot be had: no such locks, or a directory that this process may not write to
    /// and in which no writer has left the file.
    pub(crate) fn take(storage: &dyn Storage, layout: &Layout, generation: u64) -> Option<ReaderPin> {
        let path = layout.readers();
        match storage.share_byte(&path, generation) {
            Ok(lock) => Some(ReaderPin { generation, _lock: lock }),
            Err(error) => {
                tracing::warn!(
                    path = %path.display(), %error,
                    "this reader cannot be seen: a writer that gives space back may take away what it reads"
                );
                None
            }
        }
    }

    /// The generation that is pinned.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }
}

/// The oldest generation up to and including `through` that a reader holds, in any process. To be asked once a newer
/// manifest is in place.
///
/// `Unsupported` where there are no such locks: then nobody can tell.
pub(crate) fn oldest_reader(storage: &dyn Storage, layout: &Layout, through: u64) -> io::Result<Option<u64>> {
    storage.lowest_shared_byte(&layout.readers(), through)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::storage::sim::{Abilities, SimStorage};

    #[test]
    fn the_oldest_reader_is_the_one_with_the_lowest_generation_until_it_goes() {
        let sim = SimStorage::new();
        let layout = Layout::new(Path::new("/"));
        assert_eq!(oldest_reader(&sim, &layout, 100).unwrap(), None, "nobody ever read");
        let old = ReaderPin::take(&sim, &layout, 4).unwrap();
        let new = ReaderPin::take(&sim, &layout, 9).unwrap();
        assert_eq!(old.generation(), 4);
        assert_eq!(oldest_reader(&sim, &layout, 100).unwrap(), Some(4));
        assert_eq!(oldest_reader(&sim, &layout, 3).unwrap(), None);
        drop(old);
        assert_eq!(oldest_reader(&sim, &layout, 8).unwrap(), None);
        assert_eq!(oldest_reader(&sim, &layout, 9).unwrap(), Some(9));
        drop(new);
        assert_eq!(oldest_reader(&sim, &layout, 9).unwrap(), None);
    }

    #[test]
    fn without_such_locks_a_reader_goes_unseen_and_a_writer_is_told_so() {
        let sim = SimStorage::new();
        sim.set_abilities(Abilities { share_bytes: false, ..Abilities::default() });
        let layout = Layout::new(Path::new("/"));
        assert!(ReaderPin::take(&sim, &layout, 4).is_none());
        assert_eq!(oldest_reader(&sim, &layout, 4).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}
