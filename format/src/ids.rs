//! Names of things, one type each, so that no two can be swapped.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which store a file belongs to: 16 random bytes, drawn when the store is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StoreId(pub [u8; 16]);

impl StoreId {
    /// The bytes.
    pub const fn get(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreId({self})")
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $display:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $display, self.0)
            }
        }
    };
}

number!(
    /// A segment's number, counted from 1. Never used twice in one store.
    SegmentId,
    "{:08}"
);
number!(
    /// An index run's number, counted from 1. Never used twice in one store.
    RunId,
    "{:08}"
);
number!(
    /// A commit's place in the one order of all commits of a store, counted from 1. [`Seq::ZERO`] is before the first.
    Seq,
    "{}"
);
number!(
    /// A random number drawn for each segment, so that a frame left in reused disk blocks is not taken for one of ours.
    Salt,
    "{:016x}"
);

impl Seq {
    /// Before the first commit.
    pub const ZERO: Self = Self(0);

    /// The number that follows. Counting past 2^64 commits would be a broken promise of our own.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("a store never sees 2^64 commits"))
    }
}

impl SegmentId {
    /// The name of the segment's file: `00000007.seg`.
    pub fn file_name(self) -> String {
        format!("{self}.seg")
    }

    /// The segment that a file name names. Only the exact name that [`file_name`](Self::file_name) gives is one.
    pub fn from_file_name(name: &str) -> Option<Self> {
        number_in(name, ".seg").map(Self).filter(|id| id.file_name() == name)
    }
}

impl RunId {
    /// The name of the run's file: `00000007.idx`.
    pub fn file_name(self) -> String {
        format!("{self}.idx")
    }

    /// The run that a file name names. Only the exact name that [`file_name`](Self::file_name) gives is one.
    pub fn from_file_name(name: &str) -> Option<Self> {
        number_in(name, ".idx").map(Self).filter(|id| id.file_name() == name)
    }
}

fn number_in(name: &str, suffix: &str) -> Option<u64> {
    name.strip_suffix(suffix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_leads_back_to_its_number() {
        for id in [0, 1, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(SegmentId::from_file_name(&SegmentId(id).file_name()), Some(SegmentId(id)));
            assert_eq!(RunId::from_file_name(&RunId(id).file_name()), Some(RunId(id)));
        }
        assert_eq!(SegmentId(7).file_name(), "00000007.seg");
        assert_eq!(RunId(7).file_name(), "00000007.idx");
    }

    #[test]
    fn a_foreign_file_name_names_nothing() {
        for name in ["7.seg", "+0000007.seg", "000000007.seg", "00000007.idx", "00000007.seg.tmp", ".seg", "seg", ""] {
            assert_eq!(SegmentId::from_file_name(name), None, "{name}");
        }
        assert_eq!(RunId::from_file_name("00000007.idx.tmp"), None);
    }

    #[test]
    fn ids_are_shown_as_people_meet_them() {
        assert_eq!(StoreId([0xab; 16]).to_string(), "ab".repeat(16));
        assert_eq!(Salt(0xfeed).to_string(), "000000000000feed");
        assert_eq!(Seq(12).next().to_string(), "13");
        assert_eq!(SegmentId(3).to_string(), "00000003");
    }
}
