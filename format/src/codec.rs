//! The only module that knows bincode: structs to bytes and back, for the parts of variable length.
//!
//! The bytes are fixed-width little-endian integers, 64-bit counts before sequences, fields in order with nothing between
//! them; SPEC.md says them without naming bincode, and the golden files catch a replacement that changes one.
//!
//! Decoding trusts no count: sequences of fixed-size elements grow as their elements are read (serde reserves at most 1 MiB
//! ahead), and byte strings are borrowed from the input before they are copied.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes that do not decode. Callers say of what.
#[derive(Debug)]
pub(crate) struct Undecodable;

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding()
}

/// The bytes of `value`, which must have exactly `len` of them.
pub(crate) fn encode<T: Serialize>(value: &T, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let written = bincode::serde::encode_into_slice(value, &mut bytes, config())
        .expect("plain structs of integers and bytes encode into the room counted for them");
    assert_eq!(written, len, "the length counted is the length written");
    bytes
}

/// The value of which `bytes` are exactly the encoding.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Undecodable> {
    match bincode::serde::decode_from_slice(bytes, config()) {
        Ok((value, read)) if read == bytes.len() => Ok(value),
        _ => Err(Undecodable),
    }
}

/// For `#[serde(with)]`: a byte string, as its 64-bit length and its bytes; copied at once and not byte by byte.
pub(crate) mod bytes {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a byte string")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// For `#[serde(with)]`: a list of names and byte strings, both copied at once.
pub(crate) mod attributes {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize)]
    struct Borrowed<'a>(&'a str, #[serde(with = "super::bytes")] &'a [u8]);

    #[derive(Deserialize)]
    struct Owned(#[serde(deserialize_with = "text")] String, #[serde(with = "super::bytes")] Vec<u8>);

    pub(crate) fn serialize<S: Serializer>(list: &[(String, Vec<u8>)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|(name, value)| Borrowed(name, value)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(String, Vec<u8>)>, D::Error> {
        let list = Vec::<Owned>::deserialize(d)?;
        Ok(list.into_iter().map(|Owned(name, value)| (name, value)).collect())
    }

    fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = String;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
                Ok(text.to_owned())
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Sample {
        flag: bool,
        #[serde(with = "bytes")]
        key: Vec<u8>,
        #[serde(with = "attributes")]
        list: Vec<(String, Vec<u8>)>,
        last: u16,
    }

    #[test]
    fn integers_are_fixed_width_and_counts_are_64_bits() {
        let sample = Sample { flag: true, key: vec![9, 8], list: vec![("a".into(), vec![7])], last: 0x0102 };
        let expected = [
            [1].as_slice(),
            &[2, 0, 0, 0, 0, 0, 0, 0, 9, 8],
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, b'a'],
            &[1, 0, 0, 0, 0, 0, 0, 0, 7],
            &[2, 1],
        ]
        .concat();
        assert_eq!(encode(&sample, expected.len()), expected);
        assert_eq!(decode::<Sample>(&expected).unwrap(), sample);
    }

    #[test]
    fn counts_beyond_the_bytes_are_refused_and_take_no_memory() {
        let huge = u64::MAX.to_le_bytes();
        assert!(decode::<Sample>(&[[1].as_slice(), &huge].concat()).is_err());
        assert!(decode::<Sample>(&[[1].as_slice(), &[0; 8], &huge].concat()).is_err());
        assert!(decode::<Vec<u64>>(&(1u64 << 60).to_le_bytes()).is_err());
    }

    #[test]
    fn bytes_left_over_are_refused() {
        assert!(decode::<u16>(&[1, 0]).is_ok());
        assert!(decode::<u16>(&[1, 0, 0]).is_err());
        assert!(decode::<u16>(&[1]).is_err());
    }
}
