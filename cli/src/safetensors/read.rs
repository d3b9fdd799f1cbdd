//! Reads a safetensors file's header and judges it.
//!
//! # Invariants
//! - A file that passes has tensors that lie back to back from the first byte after the header to the end of the file,
//!   each as long as its dtype and shape make it. Anything else is refused, naming what is wrong.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use alight::Dtype;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::{HEADER_BYTES_MAX, METADATA_NAME};
use crate::failure::Failure;
use crate::units;

/// A file whose header was read and judged.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// In the order of the file.
    pub(crate) tensors: Vec<Listed>,
    /// `__metadata__`, where there is one.
    pub(crate) metadata: Option<BTreeMap<String, String>>,
}

/// A tensor in a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// Where its bytes begin, from the beginning of the file.
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
}

impl SafetensorsFile {
    /// Opens a file, reads its header and judges it.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let mut file = File::open(path).map_err(|error| Failure::io("open", path, error))?;
        let facts = file.metadata().map_err(|error| Failure::io("look at", path, error))?;
        if !facts.is_file() {
            let failure = Failure::other("not_safetensors", format!("{} is not a regular file", path.display()));
            return Err(failure.with_remedy("name a safetensors file on disk; it is read out of order"));
        }
        let text = read_header(path, &mut file, facts.len())?;
        let data_start = 8 + text.len() as u64;
        let header = parse(&text).map_err(|wrong| wrong.into_failure(path))?;
        // Not needed any more, and of a hundred thousand tensors it is large.
        drop(text);
        let (tensors, metadata) = judge(header, data_start, facts.len()).map_err(|wrong| wrong.into_failure(path))?;
        Ok(Self { path: path.to_owned(), file, tensors, metadata })
    }
}

fn read_header(path: &Path, file: &mut File, file_bytes: u64) -> Result<Vec<u8>, Failure> {
    let failed = |error| Failure::io("read", path, error);
    let mut first = [0; 8];
    if file_bytes < 8 {
        return Err(Wrong::foreign(format!("it has {file_bytes} bytes, less than the shortest one")).into_failure(path));
    }
    file.read_exact(&mut first).map_err(failed)?;
    let header_bytes = u64::from_le_bytes(first);
    if first.starts_with(b"PK\x03\x04") || first.starts_with(b"\x80\x02") {
        return Err(Wrong::foreign("it looks like a file of torch.save").into_failure(path));
    }
    if header_bytes > HEADER_BYTES_MAX {
        let why =
            format!("its first 8 bytes announce a header of {header_bytes} bytes; {HEADER_BYTES_MAX} is the most");
        return Err(Wrong::foreign(why).into_failure(path));
    }
    if header_bytes < 2 {
        return Err(Wrong::foreign(format!("its header is {header_bytes} bytes long")).into_failure(path));
    }
    if header_bytes > file_bytes - 8 {
        let what = format!("its header is {header_bytes} bytes long, but the file ends after {}", file_bytes - 8);
        return Err(Wrong::damaged(what).into_failure(path));
    }
    // Bounded by the limit above and by the file that is there.
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(failed)?;
    if header[0] != b'{' {
        return Err(Wrong::foreign("its header does not begin with {").into_failure(path));
    }
    Ok(header)
}

/// What is wrong with a file.
#[derive(Debug)]
struct Wrong {
    kind: &'static str,
    what: String,
    remedy: &'static str,
}

impl Wrong {
    fn foreign(why: impl fmt::Display) -> Self {
        Self {
            kind: "not_safetensors",
            what: format!("not a safetensors file: {why}"),
            remedy: "name a .safetensors file; convert other formats with the safetensors package first",
        }
    }

    fn damaged(what: impl Into<String>) -> Self {
        Self {
            kind: "damaged_file",
            what: what.into(),
            remedy: "the file is incomplete or damaged: download or write it again. Nothing was imported",
        }
    }

    fn unknown_dtype(name: &str, dtype: &str) -> Self {
        Self {
            kind: "unknown_dtype",
            what: format!("tensor {name:?} has the dtype {dtype:?}, which alight does not know"),
            remedy: "convert the tensor to a known dtype, or use a newer alight. Nothing was imported",
        }
    }

    fn into_failure(self, path: &Path) -> Failure {
        Failure::other(self.kind, format!("{}: {}", path.display(), self.what)).with_remedy(self.remedy)
    }
}

type Judged = (Vec<Listed>, Option<BTreeMap<String, String>>);

fn parse(text: &[u8]) -> Result<Header, Wrong> {
    serde_json::from_slice(text)
        .map_err(|error| Wrong::foreign(format!("its header is not what it should be: {error}")))
}

/// Checks a header against itself and the file's length.
fn judge(header: Header, data_start: u64, file_bytes: u64) -> Result<Judged, Wrong> {
    let data_bytes = file_bytes - data_start;
    let mut tensors = header.tensors;
    tensors.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut listed = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, info) in tensors {
        let (from, to) = info.data_offsets;
        let dtype = match info.dtype {
            UntrustedDtype::Known(dtype) => dtype,
            UntrustedDtype::Unknown(dtype) => return Err(Wrong::unknown_dtype(&name, &dtype)),
        };
        if to < from {
            return Err(Wrong::damaged(format!("tensor {name:?} ends before it begins ({from}..{to})")));
        }
        let len_bytes = to - from;
        if dtype.byte_len(&info.shape) != Some(len_bytes) {
            let expected = dtype.byte_len(&info.shape).map_or("no number of bytes".into(), |n| format!("{n} bytes"));
            let what = format!("tensor {name:?}: {dtype} of shape {:?} makes {expected}, not {len_bytes}", info.shape);
            return Err(Wrong::damaged(what));
        }
        if to > data_bytes {
            let missing = units::bytes(to - data_bytes);
            let what = format!("the file is cut short: tensor {name:?} ends {missing} after the end of the file");
            return Err(Wrong::damaged(what));
        }
        if from < end {
            return Err(Wrong::damaged(format!("tensor {name:?} overlaps the one before it")));
        }
        if from > end {
            return Err(Wrong::damaged(format!("there is a hole of {} bytes before tensor {name:?}", from - end)));
        }
        end = to;
        listed.push(Listed { name, dtype, shape: info.shape, offset: data_start + from, len_bytes });
    }
    if end != data_bytes {
        return Err(Wrong::damaged(format!("{} bytes follow the last tensor", data_bytes - end)));
    }
    Ok((listed, header.metadata))
}

/// The header as it stands, with every name once.
struct Header {
    tensors: Vec<(String, UntrustedInfo)>,
    metadata: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct UntrustedInfo {
    dtype: UntrustedDtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A dtype's name, looked up while it is read.
#[derive(Deserialize)]
#[serde(from = "Cow<'_, str>")]
enum UntrustedDtype {
    Known(Dtype),
    Unknown(String),
}

impl From<Cow<'_, str>> for UntrustedDtype {
    fn from(name: Cow<'_, str>) -> Self {
        Dtype::from_name(&name).map_or_else(|| Self::Unknown(name.into_owned()), Self::Known)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the header's names one by one: a map would let the last of two equal names win in silence.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors: Vec<(String, UntrustedInfo)> = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_NAME {
                if metadata.replace(map.next_value()?).is_some() {
                    return Err(de::Error::custom(format_args!("{METADATA_NAME} stands in it twice")));
                }
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(de::Error::custom(format_args!("tensor {:?} stands in it twice", pair[0].0)));
        }
        Ok(Header { tensors, metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(header: &str, data_bytes: u64) -> Result<Judged, String> {
        parse(header.as_bytes()).and_then(|header| judge(header, 100, 100 + data_bytes)).map_err(|wrong| wrong.what)
    }

    #[test]
    fn a_sound_header_is_listed_in_the_order_of_the_file() {
        let header = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},"__metadata__":{"k":"v"},
            "a":{"dtype":"I32","shape":[],"data_offsets":[0,4]},"z":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}  "#;
        let (tensors, metadata) = judged(header, 12).unwrap();
        assert_eq!(tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "z", "b"]);
        assert_eq!((tensors[2].offset, tensors[2].len_bytes), (104, 8));
        assert_eq!(metadata.unwrap()["k"], "v");
        assert!(judged("{}", 0).unwrap().0.is_empty());
    }

    #[test]
    fn whatever_does_not_fit_is_refused_by_name() {
        let one = |dtype: &str, shape: &str, from: &str, to: &str| {
            format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
        };
        for (header, data_bytes, what) in [
            (one("F32", "[2]", "0", "8"), 7, "cut short"),
            (one("F32", "[2]", "0", "8"), 9, "1 bytes follow"),
            (one("F32", "[2]", "4", "12"), 12, "hole of 4 bytes"),
            (one("F32", "[3]", "0", "8"), 8, "makes 12 bytes, not 8"),
            (one("F4", "[3]", "0", "1"), 1, "no number of bytes"),
            (one("F32", "[18446744073709551615,2]", "0", "8"), 8, "no number of bytes"),
            (one("F99", "[2]", "0", "8"), 8, "F99"),
            (one("F32", "[2]", "8", "0"), 8, "ends before it begins"),
            (one("F32", "[2]", "0", "18446744073709551615"), 8, "makes 8 bytes"),
            (one("F32", "[-2]", "0", "8"), 8, "invalid value"),
            (one("F32", "[2.5]", "0", "8"), 8, "invalid type"),
            (one("F32", "2", "0", "8"), 8, "invalid type"),
            ("[]".into(), 0, "an object of tensors"),
            ("{\"t\":{}}".into(), 0, "missing field"),
            ("{".into(), 0, "EOF"),
            ("{\"__metadata__\":{\"k\":1}}".into(), 0, "invalid type"),
            ("{\"__metadata__\":{},\"__metadata__\":{}}".into(), 0, "twice"),
        ] {
            let wrong = judged(&header, data_bytes).unwrap_err();
            assert!(wrong.contains(what), "{header}: {wrong}");
        }
    }

    #[test]
    fn overlaps_and_equal_names_are_refused() {
        let two = |name: &str, from: u64| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},
                    "{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{from},{}]}}}}"#,
                from + 4
            )
        };
        assert!(judged(&two("b", 4), 8).is_ok());
        assert!(judged(&two("b", 3), 8).unwrap_err().contains("overlaps"));
        assert!(judged(&two("b", 0), 4).unwrap_err().contains("overlaps"));
        assert!(judged(&two("a", 4), 8).unwrap_err().contains("\"a\" stands in it twice"));
        assert!(judged(&two("\\u0061", 4), 8).unwrap_err().contains("twice"));
    }
}
