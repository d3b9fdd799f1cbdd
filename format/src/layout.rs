//! Fields of the parts that are laid out by hand: a place and a width, checked at compile time to tile their part.

/// `N` bytes at a fixed offset; integers in them are little-endian.
pub(crate) struct Field<const N: usize> {
    at: usize,
}

impl<const N: usize> Field<N> {
    pub(crate) const fn at(at: usize) -> Self {
        Self { at }
    }

    #[inline]
    pub(crate) const fn span(&self) -> (usize, usize) {
        (self.at, self.at + N)
    }

    pub(crate) const fn offset(&self) -> u64 {
        self.at as u64
    }

    /// The field's bytes. The part's length was checked before.
    #[inline]
    pub(crate) fn get(&self, part: &[u8]) -> [u8; N] {
        let (start, end) = self.span();
        part[start..end].try_into().expect("a field is as long as its span")
    }

    pub(crate) fn set(&self, part: &mut [u8], bytes: [u8; N]) {
        let (start, end) = self.span();
        part[start..end].copy_from_slice(&bytes);
    }
}

macro_rules! integer_field {
    ($bytes:literal, $integer:ty) => {
        impl Field<$bytes> {
            #[inline]
            pub(crate) fn read(&self, part: &[u8]) -> $integer {
                <$integer>::from_le_bytes(self.get(part))
            }

            pub(crate) fn write(&self, part: &mut [u8], value: $integer) {
                self.set(part, value.to_le_bytes());
            }
        }
    };
}

integer_field!(2, u16);
integer_field!(4, u32);
integer_field!(8, u64);

/// Whether these spans follow one another from `start` to `end` with neither gap nor overlap.
pub(crate) const fn tiles(spans: &[(usize, usize)], start: usize, end: usize) -> bool {
    let mut cursor = start;
    let mut next = 0;
    while next < spans.len() {
        if spans[next].0 != cursor {
            return false;
        }
        cursor = spans[next].1;
        next += 1;
    }
    cursor == end
}
