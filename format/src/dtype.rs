//! What the elements of a tensor are: the types of safetensors and DLPack.
//!
//! A code is written to disk and never changes its meaning; 0 is "no type", which only deletes carry.

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// A byte that is 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 16 bits.
    U16,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 64 bits.
    I64,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of an [`F32`](Dtype::F32).
    BF16,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 double precision.
    F64,
    /// 8 bits: 4 of exponent, 3 of mantissa, finite and NaN (OCP FP8).
    F8E4M3,
    /// 8 bits: 5 of exponent, 2 of mantissa (OCP FP8).
    F8E5M2,
    /// 8 bits of exponent, a power of two: the scale of the OCP microscaling formats.
    F8E8M0,
    /// As [`F8E4M3`](Dtype::F8E4M3), finite, with one zero and one NaN.
    F8E4M3Fnuz,
    /// As [`F8E5M2`](Dtype::F8E5M2), finite, with one zero and one NaN.
    F8E5M2Fnuz,
    /// Complex, two of [`F32`](Dtype::F32).
    C64,
    /// Complex, two of [`F64`](Dtype::F64).
    C128,
    /// 4 bits: 2 of exponent, 1 of mantissa; two elements a byte (OCP MXFP4).
    F4,
    /// 6 bits: 2 of exponent, 3 of mantissa; four elements in three bytes (OCP MXFP6).
    F6E2M3,
    /// 6 bits: 3 of exponent, 2 of mantissa; four elements in three bytes (OCP MXFP6).
    F6E3M2,
}

/// Type, code on disk, bits of one element, name as safetensors spells it. The one table; every function reads it.
const TABLE: [(Dtype, u8, u32, &str); 23] = [
    (Dtype::Bool, 1, 8, "BOOL"),
    (Dtype::U8, 2, 8, "U8"),
    (Dtype::I8, 3, 8, "I8"),
    (Dtype::U16, 4, 16, "U16"),
    (Dtype::I16, 5, 16, "I16"),
    (Dtype::U32, 6, 32, "U32"),
    (Dtype::I32, 7, 32, "I32"),
    (Dtype::U64, 8, 64, "U64"),
    (Dtype::I64, 9, 64, "I64"),
    (Dtype::F16, 10, 16, "F16"),
    (Dtype::BF16, 11, 16, "BF16"),
    (Dtype::F32, 12, 32, "F32"),
    (Dtype::F64, 13, 64, "F64"),
    (Dtype::F8E4M3, 14, 8, "F8_E4M3"),
    (Dtype::F8E5M2, 15, 8, "F8_E5M2"),
    (Dtype::F8E8M0, 16, 8, "F8_E8M0"),
    (Dtype::F8E4M3Fnuz, 17, 8, "F8_E4M3FNUZ"),
    (Dtype::F8E5M2Fnuz, 18, 8, "F8_E5M2FNUZ"),
    (Dtype::C64, 19, 64, "C64"),
    (Dtype::C128, 20, 128, "C128"),
    (Dtype::F4, 21, 4, "F4"),
    (Dtype::F6E2M3, 22, 6, "F6_E2M3"),
    (Dtype::F6E3M2, 23, 6, "F6_E3M2"),
];

/// A type's row is found by its place among the variants, a code's row by the code.
const _: () = {
    let mut row = 0;
    while row < TABLE.len() {
        assert!(TABLE[row].0 as usize == row && TABLE[row].1 as usize == row + 1);
        row += 1;
    }
};

impl Dtype {
    /// Every type, in the order of their codes.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    const fn row(self) -> &'static (Dtype, u8, u32, &'static str) {
        &TABLE[self as usize]
    }

    /// The bits of one element: 4, 6, or a multiple of 8.
    pub const fn bits(self) -> u32 {
        self.row().2
    }

    /// The code on disk; never 0.
    pub const fn code(self) -> u8 {
        self.row().1
    }

    /// The type of a code on disk.
    pub fn from_code(code: u8) -> Option<Self> {
        TABLE.get(usize::from(code).checked_sub(1)?).map(|row| row.0)
    }

    /// The name, as safetensors spells it: `BF16`, `F8_E4M3`.
    pub const fn name(self) -> &'static str {
        self.row().3
    }

    /// The type of a name in safetensors' spelling.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.3 == name).map(|row| row.0)
    }

    /// The bytes of a tensor of this shape, or `None` when they are no whole number or elements or bytes overflow 64 bits. An empty shape is a
    /// scalar, one element; a shape with a zero in it has no bytes, whatever its other dimensions are.
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        if shape.contains(&0) {
            return Some(0);
        }
        let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim))?;
        let bits = u128::from(elements) * u128::from(self.bits());
        if bits.is_multiple_of(8) { u64::try_from(bits / 8).ok() } else { None }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_lead_back_to_the_type() {
        for dtype in Dtype::all() {
            assert_eq!(Dtype::from_code(dtype.code()), Some(dtype));
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_code(0), None);
        assert_eq!(Dtype::from_code(24), None);
        assert_eq!(Dtype::from_code(255), None);
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn a_scalar_is_one_element_and_a_zero_dimension_is_none() {
        assert_eq!(Dtype::F32.byte_len(&[]), Some(4));
        assert_eq!(Dtype::F32.byte_len(&[3, 5]), Some(60));
        assert_eq!(Dtype::F32.byte_len(&[u64::MAX, u64::MAX, u64::MAX, 0]), Some(0));
    }

    #[test]
    fn parts_of_bytes_and_overflow_have_no_length() {
        assert_eq!(Dtype::F4.byte_len(&[3]), None);
        assert_eq!(Dtype::F4.byte_len(&[4]), Some(2));
        assert_eq!(Dtype::F6E2M3.byte_len(&[4]), Some(3));
        assert_eq!(Dtype::F6E3M2.byte_len(&[2]), None);
        assert_eq!(Dtype::U8.byte_len(&[u64::MAX]), Some(u64::MAX));
        assert_eq!(Dtype::U16.byte_len(&[u64::MAX]), None);
        assert_eq!(Dtype::U8.byte_len(&[u64::MAX, u64::MAX, 2]), None);
    }
}
