//! Values as callers hold them: [`Tensor`] on a device, [`TensorRef`] to put one, [`TensorInfo`] to know one, and
//! [`Key`] to name one. They know nothing of files; the store moves the bytes.
//!
//! # Invariants
//! - The dtype, the shape and the length of a tensor belong together: checked when it is made, never changed after.
//! - A tensor's bytes never change: every clone and every view of one arena may be read from any thread.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use alight_format::Dtype;

use crate::device::transfer::{Wait, download_into};
use crate::device::{Device, DeviceBuffer};
use crate::error::{DisplayKey, Error, Result};
use crate::limits::{DIMS_MAX, KEY_BYTES_MAX};

/// A value on a device: its dtype, its shape and its bytes.
///
/// It is a view of memory that it shares with its clones and with the tensors that were read in the same call: cloning
/// is cheap, and the memory is freed with the last of them. It never changes and computes nothing; hand
/// [`device_ptr`](Self::device_ptr) or [`as_host`](Self::as_host) to what does.
#[derive(Clone)]
pub struct Tensor {
    dtype: Dtype,
    shape: Arc<[u64]>,
    buffer: Arc<DeviceBuffer>,
    offset: u64,
    len_bytes: u64,
}

impl Tensor {
    /// Copies host bytes to a device. Blocks until they are there.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::LimitExceeded`] as [`TensorRef::new`]; else what [`Device::allocate`] and
    /// [`DeviceBuffer::copy_from_host`] say.
    pub fn from_host(dtype: Dtype, shape: &[u64], bytes: &[u8], device: &Device) -> Result<Tensor> {
        let len_bytes = bytes.len() as u64;
        check_shape(dtype, shape, len_bytes)?;
        let mut buffer = device.allocate(len_bytes)?;
        buffer.copy_from_host(0, bytes)?;
        Ok(Tensor { dtype, shape: shape.into(), buffer: Arc::new(buffer), offset: 0, len_bytes })
    }

    /// A view of a part of an arena that already holds the bytes.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::LimitExceeded`]: the dtype and the shape come from disk.
    ///
    /// # Panics
    /// If the view reaches past the arena's end: the arena was made for it.
    pub(crate) fn from_arena(
        dtype: Dtype,
        shape: &[u64],
        arena: &Arc<DeviceBuffer>,
        offset: u64,
        len_bytes: u64,
    ) -> Result<Tensor> {
        check_shape(dtype, shape, len_bytes)?;
        let end = offset.checked_add(len_bytes);
        assert!(
            end.is_some_and(|end| end <= arena.len_bytes()),
            "a view of {len_bytes} bytes at {offset} of {arena:?}"
        );
        Ok(Tensor { dtype, shape: shape.into(), buffer: Arc::clone(arena), offset, len_bytes })
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The extent of every dimension, the slowest first; empty for a single element.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The device that holds the bytes.
    pub fn device(&self) -> &Device {
        self.buffer.device()
    }

    /// The bytes, where they are in host memory; nothing is copied.
    pub fn as_host(&self) -> Option<&[u8]> {
        self.buffer.as_host().map(|bytes| {
            // The view lies inside the buffer, whose length is that of host memory: both ends fit.
            &bytes[self.offset as usize..(self.offset + self.len_bytes) as usize]
        })
    }

    /// A copy of the bytes in host memory. Blocks; costs what [`copy_to_host`](Self::copy_to_host) costs.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver failed.
    pub fn to_host(&self) -> Result<Vec<u8>> {
        if let Some(bytes) = self.as_host() {
            return Ok(bytes.to_vec());
        }
        let len = usize::try_from(self.len_bytes).map_err(|_| Error::LimitExceeded {
            what: "the length of a copy in host memory",
            value: self.len_bytes,
            limit: isize::MAX as u64,
        })?;
        let mut bytes = vec![0; len];
        self.buffer.copy_to_host(self.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies the bytes into host memory of the same length. Blocks until they are there.
    ///
    /// From a GPU this goes through the driver's own buffer, at about a tenth of the bus's speed.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where the destination has another length; [`Error::Device`] where the driver failed.
    pub fn copy_to_host(&self, destination: &mut [u8]) -> Result<()> {
        check_shape(self.dtype, &self.shape, destination.len() as u64)?;
        self.buffer.copy_to_host(self.offset, destination)
    }

    /// The address of the first byte in the GPU's memory, for other libraries; `None` on the host.
    ///
    /// Valid while this tensor or a clone lives. The bytes must not be written through it: other tensors may share
    /// them. For a tensor of no bytes it points at nothing.
    pub fn device_ptr(&self) -> Option<u64> {
        self.buffer.device_ptr().map(|base| base + self.offset)
    }

    /// The memory that this is a view of.
    pub(crate) fn buffer(&self) -> &Arc<DeviceBuffer> {
        &self.buffer
    }

    /// Where in [`buffer`](Self::buffer) the bytes are.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len_bytes
    }
}

/// Shows what it is, not its bytes.
impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{:?} on {})", self.dtype.name(), self.shape, self.device())
    }
}

/// A value to be put: borrowed bytes, or a borrowed [`Tensor`], with their dtype and shape.
///
/// It owns no bytes and copies none. Bytes without a shape are `u8[len]`.
#[derive(Clone)]
pub struct TensorRef<'a> {
    dtype: Dtype,
    shape: Vec<u64>,
    len_bytes: u64,
    source: Source<'a>,
}

/// Where the bytes of a [`TensorRef`] are.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// In host memory, whoever owns it.
    Host(&'a [u8]),
    /// In a GPU's memory.
    Device(&'a Tensor),
    /// Wherever the reader takes them from, from this offset on.
    Reader(&'a dyn ReadAt, u64),
}

/// Bytes that can be read at any place: a file, mostly. A value that is put from one is never in memory as a whole.
pub trait ReadAt {
    /// Fills `buf` with the bytes from `offset` on; fewer are an error (`UnexpectedEof`).
    ///
    /// # Errors
    /// Whatever the source says; it ends the commit, of which nothing is stored then.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset)
    }
}

impl<'a> TensorRef<'a> {
    /// Bytes in host memory with a dtype and a shape.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`] for too many dimensions, [`Error::ShapeMismatch`] where dtype and shape do not make this
    /// number of bytes.
    pub fn new(dtype: Dtype, shape: &[u64], bytes: &'a [u8]) -> Result<TensorRef<'a>> {
        check_shape(dtype, shape, bytes.len() as u64)?;
        Ok(TensorRef { dtype, shape: shape.to_vec(), len_bytes: bytes.len() as u64, source: Source::Host(bytes) })
    }

    /// Bytes that are read while they are put, from `offset` of `reader` on: as many as the dtype and the shape make.
    ///
    /// # Errors
    /// As [`new`](TensorRef::new), where dtype and shape make no number of bytes.
    pub fn from_reader(dtype: Dtype, shape: &[u64], reader: &'a dyn ReadAt, offset: u64) -> Result<TensorRef<'a>> {
        let len_bytes = dtype.byte_len(shape).unwrap_or(0);
        check_shape(dtype, shape, len_bytes)?;
        Ok(TensorRef { dtype, shape: shape.to_vec(), len_bytes, source: Source::Reader(reader, offset) })
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The extent of every dimension, the slowest first.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Copies some of the bytes into host memory, from wherever they are. Blocks; for a GPU by `wait`.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8], wait: &Wait<'_>) -> Result<()> {
        match self.source {
            Source::Host(bytes) => {
                buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
                Ok(())
            }
            Source::Device(tensor) => download_into(tensor.buffer(), tensor.range().start + offset, buf, wait),
            Source::Reader(reader, start) => {
                reader.read_exact_at(buf, start + offset).map_err(|source| Error::Source { source })
            }
        }
    }

    /// The GPU's memory that the bytes are in, and where in it.
    pub(crate) fn on_device(&self) -> Option<(&'a Arc<DeviceBuffer>, Range<u64>)> {
        match self.source {
            Source::Device(tensor) => Some((tensor.buffer(), tensor.range())),
            Source::Host(_) | Source::Reader(..) => None,
        }
    }

    /// The bytes, where they are in host memory, so that copying them waits for nobody.
    pub(crate) fn as_host(&self) -> Option<&'a [u8]> {
        match self.source {
            Source::Host(bytes) => Some(bytes),
            Source::Device(_) | Source::Reader(..) => None,
        }
    }

    /// Where the bytes are. A tensor on the host counts as host memory.
    #[cfg(test)]
    pub(crate) fn source(&self) -> Source<'a> {
        self.source
    }
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRef({}{:?}", self.dtype.name(), self.shape)?;
        match self.source {
            Source::Host(_) => f.write_str(" on host)"),
            Source::Device(tensor) => write!(f, " on {})", tensor.device()),
            Source::Reader(..) => f.write_str(" to be read)"),
        }
    }
}

impl<'a> From<&'a [u8]> for TensorRef<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        let len_bytes = bytes.len() as u64;
        TensorRef { dtype: Dtype::U8, shape: vec![len_bytes], len_bytes, source: Source::Host(bytes) }
    }
}

impl<'a> From<&'a Vec<u8>> for TensorRef<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for TensorRef<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a> From<&'a Tensor> for TensorRef<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        let source = match tensor.as_host() {
            Some(bytes) => Source::Host(bytes),
            None => Source::Device(tensor),
        };
        TensorRef { dtype: tensor.dtype, shape: tensor.shape.to_vec(), len_bytes: tensor.len_bytes, source }
    }
}

/// What is known of a stored value without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The key.
    pub key: Key,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The extent of every dimension, the slowest first.
    pub shape: Vec<u64>,
    /// The length in bytes.
    pub len_bytes: u64,
}

/// A key: 1 to 1024 bytes, most often text, ordered as bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Box<[u8]>);

impl Key {
    /// A key of these bytes.
    ///
    /// # Errors
    /// [`Error::InvalidKey`] for no bytes, or more than [`KEY_BYTES_MAX`].
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Key> {
        let bytes = bytes.as_ref();
        check_key(bytes)?;
        Ok(Key(bytes.into()))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The key as text, if it is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

/// Whether these bytes may be a key, without copying them.
pub(crate) fn check_key(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX {
        return Err(Error::InvalidKey { len_bytes: bytes.len() });
    }
    Ok(())
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes find the key in a map: they are ordered, compared and hashed alike.
impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// Quoted, with bytes that are not UTF-8 escaped.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        DisplayKey::from(self.as_bytes()).fmt(f)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether a dtype and a shape make this number of bytes.
fn check_shape(dtype: Dtype, shape: &[u64], len_bytes: u64) -> Result<()> {
    if shape.len() > DIMS_MAX {
        let (value, limit) = (shape.len() as u64, DIMS_MAX as u64);
        return Err(Error::LimitExceeded { what: "the number of dimensions", value, limit });
    }
    let expected = match dtype.byte_len(shape) {
        Some(bytes) if bytes == len_bytes => return Ok(()),
        Some(bytes) => format!("{bytes} bytes"),
        None => "no whole number of bytes that can be counted".to_string(),
    };
    Err(Error::ShapeMismatch { dtype: dtype.name(), shape: shape.to_vec(), expected, actual: len_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_that_does_not_make_the_bytes_is_refused() {
        let bytes = [0; 12];
        assert_eq!(TensorRef::new(Dtype::F32, &[3], &bytes).unwrap().len_bytes(), 12);
        assert_eq!(TensorRef::new(Dtype::F32, &[0, 7], &[]).unwrap().len_bytes(), 0);
        assert_eq!(TensorRef::new(Dtype::F32, &[], &bytes[..4]).unwrap().shape(), &[0u64; 0]);
        for shape in [&[4][..], &[], &[3, 0], &[u64::MAX, u64::MAX], &[1 << 63, 2]] {
            let error = TensorRef::new(Dtype::F32, shape, &bytes).unwrap_err();
            assert!(matches!(error, Error::ShapeMismatch { actual: 12, .. }), "{shape:?}: {error}");
        }
        let error = TensorRef::new(Dtype::U8, &[1; DIMS_MAX + 1], &bytes[..1]).unwrap_err();
        assert!(matches!(error, Error::LimitExceeded { value: 65, limit: 64, .. }), "{error}");
    }

    #[test]
    fn bytes_without_a_shape_are_a_vector_of_bytes() {
        let bytes = vec![1, 2, 3];
        for tensor in [TensorRef::from(&bytes), TensorRef::from(&[1, 2, 3]), TensorRef::from(&bytes[..])] {
            assert_eq!((tensor.dtype(), tensor.shape(), tensor.len_bytes()), (Dtype::U8, &[3][..], 3));
            assert!(matches!(tensor.source(), Source::Host([1, 2, 3])));
        }
    }

    #[test]
    fn views_of_one_arena_share_it_and_show_their_own_bytes() {
        let mut arena = Device::host().allocate(16).unwrap();
        arena.copy_from_host(0, &std::array::from_fn::<u8, 16, _>(|i| i as u8)).unwrap();
        let arena = Arc::new(arena);
        let view = Tensor::from_arena(Dtype::F32, &[2], &arena, 4, 8).unwrap();
        assert_eq!(view.as_host(), Some(&[4, 5, 6, 7, 8, 9, 10, 11][..]));
        assert_eq!(view.to_host().unwrap(), view.as_host().unwrap());
        assert_eq!((view.range(), view.device_ptr()), (4..12, None));
        let mut copy = [0; 8];
        view.copy_to_host(&mut copy).unwrap();
        assert_eq!(Some(&copy[..]), view.as_host());
        assert!(matches!(view.copy_to_host(&mut copy[..7]), Err(Error::ShapeMismatch { actual: 7, .. })));
        assert!(matches!(TensorRef::from(&view).source(), Source::Host([4, ..])));
        assert!(matches!(Tensor::from_arena(Dtype::F32, &[3], &arena, 4, 8), Err(Error::ShapeMismatch { .. })));
        drop(arena);
        assert_eq!(view.clone().shape(), &[2]);
        assert!(Arc::ptr_eq(view.buffer(), view.clone().buffer()));
        assert_eq!(format!("{view:?}"), "Tensor(F32[2] on host)");
    }

    #[test]
    #[should_panic(expected = "a view of 8 bytes at 12")]
    fn a_view_past_its_arena_is_our_own_mistake() {
        let arena = Arc::new(Device::host().allocate(16).unwrap());
        let _ = Tensor::from_arena(Dtype::U8, &[8], &arena, 12, 8);
    }

    #[test]
    fn keys_are_checked_ordered_and_shown() {
        for bytes in [&[][..], &[b'k'; KEY_BYTES_MAX + 1]] {
            assert!(matches!(Key::new(bytes), Err(Error::InvalidKey { len_bytes }) if len_bytes == bytes.len()));
        }
        assert_eq!(Key::new([b'k'; KEY_BYTES_MAX]).unwrap().as_bytes().len(), KEY_BYTES_MAX);
        let (text, raw) = (Key::new("layers.0").unwrap(), Key::new([0xff]).unwrap());
        assert_eq!((text.as_str(), raw.as_str()), (Some("layers.0"), None));
        assert_eq!((text.to_string(), raw.to_string()), ("\"layers.0\"".into(), "\"\\xff\"".into()));
        let map = std::collections::BTreeMap::from([(text, 1), (raw, 2)]);
        assert_eq!((map.get(&b"layers.0"[..]), map.get(&[0xff][..])), (Some(&1), Some(&2)));
    }
}
