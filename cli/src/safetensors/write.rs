//! Writes a safetensors file from a snapshot, holding neither its header nor its tensors in memory.
//!
//! The tensors stand in the order in which the safetensors library writes them: the widest dtype first, so that each is
//! aligned, then by name. The snapshot is walked once for each width that occurs instead of being sorted.

use std::collections::BTreeMap;
use std::io::{self, Write};

use alight::{Dtype, Snapshot, TensorInfo};

use super::{HEADER_BYTES_MAX, METADATA_ATTRIBUTE, METADATA_NAME};
use crate::failure::Failure;
use crate::units;

/// What a header's end is padded to, with spaces.
const HEADER_ALIGN_BYTES: u64 = 8;

/// The widths of the elements that there are, in bits, the widest first.
const WIDTHS: [u32; 7] = [128, 64, 32, 16, 8, 6, 4];

/// What of a snapshot is to be written, checked.
pub(crate) struct Plan<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) prefix: &'a [u8],
    /// What is taken off the keys to make names: the prefix, or nothing.
    stripped: usize,
    widths: Vec<u32>,
    metadata: Option<BTreeMap<String, String>>,
    header_bytes: u64,
    pub(crate) tensors: u64,
    pub(crate) data_bytes: u64,
}

impl<'a> Plan<'a> {
    /// Checks that everything under `prefix` can be written, and measures the header.
    pub(crate) fn new(snapshot: &'a Snapshot, prefix: &'a [u8], keep_prefix: bool) -> Result<Self, Failure> {
        let stripped = if keep_prefix { 0 } else { prefix.len() };
        let mut plan = Plan {
            snapshot,
            prefix,
            stripped,
            widths: Vec::new(),
            metadata: None,
            header_bytes: 0,
            tensors: 0,
            data_bytes: 0,
        };
        let mut occurs = [false; WIDTHS.len()];
        for info in snapshot.scan(prefix) {
            let info = info?;
            if plan.is_metadata_name(&info) {
                plan.metadata = Some(read_metadata(snapshot, &info)?);
                continue;
            }
            plan.name_of(&info)?;
            check_dtype(&info)?;
            let width = WIDTHS.iter().position(|&bits| bits == info.dtype.bits()).ok_or_else(|| unwritable(&info))?;
            occurs[width] = true;
            plan.tensors += 1;
            plan.data_bytes += info.len_bytes;
        }
        plan.widths = WIDTHS.into_iter().zip(occurs).filter_map(|(bits, occurs)| occurs.then_some(bits)).collect();
        let mut counter = Counter(0);
        plan.write_json(&mut counter)?;
        plan.header_bytes = counter.0.next_multiple_of(HEADER_ALIGN_BYTES);
        if plan.header_bytes > HEADER_BYTES_MAX {
            let message = format!(
                "{} make a header of {} bytes; a safetensors file's is at most {HEADER_BYTES_MAX}",
                units::count(plan.tensors, "tensor"),
                plan.header_bytes
            );
            return Err(Failure::other("too_many", message).with_remedy("export them in parts, each with its --prefix"));
        }
        Ok(plan)
    }

    /// The header with its length before it.
    pub(crate) fn write_header(&self, out: &mut dyn Write) -> Result<(), Failure> {
        write_all(out, &self.header_bytes.to_le_bytes())?;
        let mut counted = Counted { out, count: 0 };
        self.write_json(&mut counted)?;
        let padding = self.header_bytes - counted.count;
        write_all(out, &b"        "[..padding as usize])
    }

    fn write_json(&self, out: &mut dyn Write) -> Result<(), Failure> {
        write_all(out, b"{")?;
        let mut first = true;
        if let Some(metadata) = &self.metadata {
            write_all(out, format!("{}:{}", json(METADATA_NAME)?, json(metadata)?).as_bytes())?;
            first = false;
        }
        let mut offset = 0;
        for info in self.in_order() {
            let info = info?;
            let end = offset + info.len_bytes;
            let (comma, name) = (if first { "" } else { "," }, json(self.name_of(&info)?)?);
            let (dtype, shape) = (info.dtype.name(), json(&info.shape)?);
            let entry =
                format!("{comma}{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{offset},{end}]}}");
            write_all(out, entry.as_bytes())?;
            first = false;
            offset = end;
        }
        write_all(out, b"}")
    }

    /// The tensors in the order of the file.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = alight::Result<TensorInfo>> {
        self.widths.iter().flat_map(move |&bits| {
            self.snapshot.scan(self.prefix).filter(move |info| match info {
                Ok(info) => info.dtype.bits() == bits && !self.is_metadata_name(info),
                Err(_) => true,
            })
        })
    }

    fn is_metadata_name(&self, info: &TensorInfo) -> bool {
        &info.key.as_bytes()[self.stripped..] == METADATA_NAME.as_bytes()
            || &info.key.as_bytes()[self.prefix.len()..] == METADATA_NAME.as_bytes()
    }

    fn name_of<'i>(&self, info: &'i TensorInfo) -> Result<&'i str, Failure> {
        let name = &info.key.as_bytes()[self.stripped..];
        if name.is_empty() {
            let message = format!("key {} is the prefix itself, which leaves no name for the file", info.key);
            return Err(Failure::other("no_name", message).with_remedy("use --keep-prefix, or a shorter --prefix"));
        }
        std::str::from_utf8(name).map_err(|_| {
            let message = format!("key {} is not UTF-8 text, which names in a safetensors file must be", info.key);
            let remedy = "leave it out with --prefix, or write it to a file of its own with `alight get`";
            Failure::other("key_not_text", message).with_remedy(remedy)
        })
    }
}

fn check_dtype(info: &TensorInfo) -> Result<(), Failure> {
    // The others are safetensors' own; a dtype that comes to be added is checked by the test below.
    if info.dtype == Dtype::C128 { Err(unwritable(info)) } else { Ok(()) }
}

fn unwritable(info: &TensorInfo) -> Failure {
    let message = format!("key {} has the dtype {}, which safetensors does not have", info.key, info.dtype);
    Failure::other("unknown_dtype", message)
        .with_remedy("leave it out with --prefix, or write its bytes to a file of its own with `alight get`")
}

/// The file's properties that `import` kept, as JSON under a key of their own.
fn read_metadata(snapshot: &Snapshot, info: &TensorInfo) -> Result<BTreeMap<String, String>, Failure> {
    let (name, value) = METADATA_ATTRIBUTE;
    let foreign = || {
        let message =
            format!("key {} cannot be written: safetensors keeps that name for a file's properties", info.key);
        Failure::other("reserved_name", message).with_remedy("put the value under another key, or use another --prefix")
    };
    if !snapshot.attributes(&info.key)?.iter().any(|(n, v)| n == name && v == value) {
        return Err(foreign());
    }
    let mut bytes = Vec::new();
    snapshot.get_to_writer(&info.key, &mut bytes)?;
    serde_json::from_slice(&bytes).map_err(|_| foreign())
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| Failure::other("json", error.to_string()))
}

fn write_all(out: &mut dyn Write, bytes: &[u8]) -> Result<(), Failure> {
    out.write_all(bytes).map_err(|error| Failure::io("write", "the file", error))
}

/// Counts bytes and keeps none.
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts bytes on their way.
struct Counted<'a> {
    out: &'a mut dyn Write,
    count: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_has_a_place_in_the_file_or_is_refused() {
        for dtype in Dtype::all() {
            assert!(WIDTHS.contains(&dtype.bits()), "{dtype}");
            let name = format!("\"{}\"", dtype.name());
            let known = serde_json::from_str::<safetensors::Dtype>(&name).is_ok();
            assert_eq!(known, dtype != Dtype::C128, "{dtype}");
        }
        assert!(WIDTHS.is_sorted_by(|a, b| a > b));
    }
}
