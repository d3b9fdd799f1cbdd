//! What can be wrong with bytes, or with what was to become bytes.

/// Why bytes were refused, or why a value was refused to become bytes.
///
/// Offsets count from the first byte of the slice that was given. `what` names the part, in words; nothing of the bytes
/// themselves is kept, so that an error is small and holds nothing of a user's data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes do not begin as this part begins. Where nothing was ever written, this is what a reader meets.
    #[error("{expected} expected, but the bytes begin otherwise")]
    NotAlight {
        /// The part that was looked for: "a segment header", "a commit frame".
        expected: &'static str,
    },

    /// The bytes are whole, and a newer alight wrote them.
    #[error("format version {found}; versions up to {known} are known here")]
    NewerVersion {
        /// The version that the bytes name.
        found: u32,
        /// The newest version that this build reads.
        known: u32,
    },

    /// The bytes are whole, and use features without which they cannot be read rightly.
    #[error("unknown incompatible feature flags {flags:#x}")]
    UnknownIncompatible {
        /// The flags that this build does not know.
        flags: u64,
    },

    /// The bytes are not what was written.
    #[error("{what} at byte {offset}")]
    Damaged {
        /// What is wrong, in words.
        what: &'static str,
        /// Where the part that is wrong begins, counted from the first byte given.
        offset: u64,
    },

    /// A value to be encoded is larger than the format allows.
    #[error("{what} is {value}; the limit is {limit}")]
    LimitExceeded {
        /// What is too large.
        what: &'static str,
        /// Its size.
        value: u64,
        /// The limit.
        limit: u64,
    },

    /// A value to be encoded contradicts itself; no reader would accept it.
    #[error("{what}")]
    Invalid {
        /// The contradiction, in words.
        what: &'static str,
    },
}

impl FormatError {
    /// What the encoder would refuse, met while decoding: whoever wrote it did not write what lies there.
    pub(crate) fn found_at(self, offset: u64) -> Self {
        match self {
            Self::LimitExceeded { what, .. } | Self::Invalid { what } => Self::Damaged { what, offset },
            other => other,
        }
    }
}

/// Refuses a value over its limit.
pub(crate) fn within(what: &'static str, value: u64, limit: u64) -> Result<(), FormatError> {
    if value > limit { Err(FormatError::LimitExceeded { what, value, limit }) } else { Ok(()) }
}

/// Refuses a value of which `holds` is not true.
pub(crate) fn require(holds: bool, what: &'static str) -> Result<(), FormatError> {
    if holds { Ok(()) } else { Err(FormatError::Invalid { what }) }
}
