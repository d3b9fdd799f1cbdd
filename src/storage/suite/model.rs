//! Random calls, and what a naive model answers to them: files are vectors, names a map.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

use super::super::{Caching, OpenMode, Storage, StorageFile, write_all_at};
use super::content_of;

#[derive(Debug, Clone)]
enum Op {
    Open { slot: usize, name: usize, mode: OpenMode },
    Write { slot: usize, offset: u64, len: usize, byte: u8 },
    Read { slot: usize, offset: u64, len: usize },
    Allocate { slot: usize, offset: u64, len: u64 },
    Punch { slot: usize, offset: u64, len: u64 },
    Truncate { slot: usize, len: u64 },
    Sync { slot: usize },
    Map { slot: usize, len: usize },
    Rename { from: usize, to: usize },
    Link { from: usize, to: usize },
    Remove { name: usize },
    SyncDir { dir: usize },
    List { dir: usize },
}

const NAMES: [&str; 6] = ["a/x", "a/y", "a/z", "b/x", "b/y", "b/z"];
const SLOTS: usize = 4;
const MODES: [OpenMode; 4] = [OpenMode::Read, OpenMode::ReadWrite, OpenMode::CreateNew, OpenMode::CreateTruncate];

fn any_op() -> impl Strategy<Value = Op> {
    let (slot, name) = (0..SLOTS, 0..NAMES.len());
    // Half of the places are on a page's edge, where mistakes live.
    let place = || prop_oneof![0u64..20_000, (0u64..5).prop_map(|page| page * 4096)];
    prop_oneof![
        4 => (slot.clone(), name.clone(), 0..MODES.len())
            .prop_map(|(slot, name, mode)| Op::Open { slot, name, mode: MODES[mode] }),
        6 => (slot.clone(), place(), place(), 1u8..).prop_map(|(slot, offset, len, byte)| Op::Write {
            slot, offset, len: len as usize, byte
        }),
        3 => (slot.clone(), place(), place()).prop_map(|(slot, offset, len)| Op::Read { slot, offset, len: len as usize }),
        1 => (slot.clone(), place(), place()).prop_map(|(slot, offset, len)| Op::Allocate { slot, offset, len: len + 1 }),
        2 => (slot.clone(), place(), place()).prop_map(|(slot, offset, len)| Op::Punch { slot, offset, len: len + 1 }),
        2 => (slot.clone(), place()).prop_map(|(slot, len)| Op::Truncate { slot, len }),
        1 => slot.clone().prop_map(|slot| Op::Sync { slot }),
        1 => (slot, place()).prop_map(|(slot, len)| Op::Map { slot, len: len as usize }),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Rename { from, to }),
        1 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Link { from, to }),
        1 => name.prop_map(|name| Op::Remove { name }),
        1 => (0..2usize).prop_map(|dir| Op::SyncDir { dir }),
        1 => (0..2usize).prop_map(|dir| Op::List { dir }),
    ]
}

/// The model: files are vectors, names are a map, handles are numbers.
#[derive(Default)]
struct Model {
    files: Vec<Vec<u8>>,
    names: BTreeMap<usize, usize>,
    slots: [Option<(usize, bool)>; SLOTS],
}

impl Model {
    fn open(&mut self, name: usize, mode: OpenMode) -> Result<(usize, bool), ErrorKind> {
        let writable = mode != OpenMode::Read;
        match (self.names.get(&name), mode) {
            (Some(_), OpenMode::CreateNew) => Err(ErrorKind::AlreadyExists),
            (None, OpenMode::Read | OpenMode::ReadWrite) => Err(ErrorKind::NotFound),
            (Some(&file), _) => {
                if mode == OpenMode::CreateTruncate {
                    self.files[file].clear();
                }
                Ok((file, writable))
            }
            (None, _) => {
                self.files.push(Vec::new());
                self.names.insert(name, self.files.len() - 1);
                Ok((self.files.len() - 1, writable))
            }
        }
    }

    fn grow(&mut self, file: usize, len: usize) {
        let bytes = &mut self.files[file];
        bytes.resize(bytes.len().max(len), 0);
    }
}

/// A storage that is called, beside the model that says what it should answer.
struct Pair<'a> {
    storage: &'a dyn Storage,
    root: PathBuf,
    model: Model,
    open: [Option<Arc<dyn StorageFile>>; SLOTS],
}

impl Pair<'_> {
    fn path(&self, name: usize) -> PathBuf {
        self.root.join(NAMES[name])
    }

    fn apply(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match *op {
            Op::Open { slot, name, mode } => {
                let answer = self.storage.open(&self.path(name), mode);
                let expected = self.model.open(name, mode);
                prop_assert_eq!(answer.as_ref().err().map(io::Error::kind), expected.err());
                if let (Ok(file), Ok(handle)) = (answer, expected) {
                    self.open[slot] = Some(file);
                    self.model.slots[slot] = Some(handle);
                }
            }
            Op::Rename { from, to } => {
                let answer = self.storage.rename(&self.path(from), &self.path(to)).map_err(|e| e.kind());
                let (old, new) = (self.model.names.get(&from).copied(), self.model.names.get(&to).copied());
                match old {
                    // Two names of one file are left as they are.
                    Some(_) if old == new => prop_assert_eq!(answer, Ok(())),
                    Some(file) => {
                        self.model.names.remove(&from);
                        self.model.names.insert(to, file);
                        prop_assert_eq!(answer, Ok(()));
                    }
                    None => prop_assert_eq!(answer, Err(ErrorKind::NotFound)),
                }
            }
            Op::Link { from, to } => {
                let answer = self.storage.link(&self.path(from), &self.path(to)).map_err(|e| e.kind());
                let names = &mut self.model.names;
                match (names.get(&from).copied(), names.contains_key(&to)) {
                    _ if answer == Err(ErrorKind::Unsupported) => {}
                    (None, _) => prop_assert_eq!(answer, Err(ErrorKind::NotFound)),
                    (Some(_), true) => prop_assert_eq!(answer, Err(ErrorKind::AlreadyExists)),
                    (Some(file), false) => {
                        names.insert(to, file);
                        prop_assert_eq!(answer, Ok(()));
                    }
                }
            }
            Op::Remove { name } => {
                let answer = self.storage.remove(&self.path(name)).map_err(|e| e.kind());
                let expected = self.model.names.remove(&name).map(drop).ok_or(ErrorKind::NotFound);
                prop_assert_eq!(answer, expected);
            }
            Op::SyncDir { dir } => self.storage.sync_dir(&self.root.join(["a", "b"][dir])).unwrap(),
            Op::List { dir } => {
                let dir = ["a", "b"][dir];
                let listed = self.storage.list(&self.root.join(dir)).unwrap();
                let mut listed: Vec<_> =
                    listed.into_iter().map(|e| (format!("{dir}/{}", e.name), e.len_bytes)).collect();
                listed.sort();
                let mut expected = Vec::new();
                for (&name, &file) in &self.model.names {
                    if NAMES[name].starts_with(dir) {
                        expected.push((NAMES[name].to_string(), self.model.files[file].len() as u64));
                    }
                }
                prop_assert_eq!(listed, expected);
            }
            Op::Write { slot, .. }
            | Op::Read { slot, .. }
            | Op::Allocate { slot, .. }
            | Op::Punch { slot, .. }
            | Op::Truncate { slot, .. }
            | Op::Sync { slot }
            | Op::Map { slot, .. } => {
                if let (Some(file), Some((index, writable))) = (self.open[slot].clone(), self.model.slots[slot]) {
                    self.apply_to_file(op, &*file, index, writable)?;
                }
            }
        }
        Ok(())
    }

    fn apply_to_file(
        &mut self,
        op: &Op,
        file: &dyn StorageFile,
        index: usize,
        writable: bool,
    ) -> Result<(), TestCaseError> {
        let model = &mut self.model;
        match *op {
            Op::Write { offset, len, byte, .. } => {
                let bytes = vec![byte; len];
                // Of no bytes, `write_all_at` makes no call, so nothing can fail.
                let answer = write_all_at(file, &bytes, offset, Caching::Buffered);
                prop_assert_eq!(answer.is_ok(), writable || len == 0);
                if writable && len > 0 {
                    let offset = offset as usize;
                    model.grow(index, offset + len);
                    model.files[index][offset..offset + len].fill(byte);
                }
            }
            Op::Read { offset, len, .. } => {
                let mut buf = vec![0xEE; len];
                let n = file.read_at(&mut buf, offset, Caching::Buffered).unwrap();
                let bytes = &model.files[index];
                let from = bytes.len().min(offset as usize);
                let to = bytes.len().min(from + len);
                prop_assert!(buf[..n] == bytes[from..to], "what was read differs");
                prop_assert!(buf[n..].iter().all(|&byte| byte == 0xEE), "bytes past the count were touched");
            }
            Op::Allocate { offset, len, .. } => match file.allocate(offset, len) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                answer => {
                    prop_assert_eq!(answer.is_ok(), writable);
                    if writable {
                        model.grow(index, (offset + len) as usize);
                    }
                }
            },
            Op::Punch { offset, len, .. } => match file.punch(offset, len) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                answer => {
                    prop_assert_eq!(answer.is_ok(), writable);
                    if writable {
                        let bytes = &mut model.files[index];
                        let from = bytes.len().min(offset as usize);
                        let to = bytes.len().min((offset + len) as usize);
                        bytes[from..to].fill(0);
                    }
                }
            },
            Op::Truncate { len, .. } => {
                prop_assert_eq!(file.truncate(len).is_ok(), writable);
                if writable {
                    model.files[index].resize(len as usize, 0);
                }
            }
            Op::Sync { .. } => file.sync().unwrap(),
            Op::Map { len, .. } => match file.map(len) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => {
                    prop_assert_eq!(error.kind(), ErrorKind::InvalidInput);
                    prop_assert!(len > model.files[index].len());
                }
                Ok(map) => prop_assert!(*map.bytes() == model.files[index][..len], "what is mapped differs"),
            },
            _ => unreachable!("the caller handles what concerns no open file"),
        }
        prop_assert_eq!(file.facts().unwrap().len_bytes, model.files[index].len() as u64);
        Ok(())
    }
}

pub(in crate::storage) fn any_calls_answer_as_the_model_does(storage: &dyn Storage, root: &Path) {
    let mut runner = TestRunner::new(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() });
    let mut case = 0;
    let cell = std::cell::RefCell::new(&mut case);
    runner
        .run(&prop::collection::vec(any_op(), 1..60), |ops| {
            let case = &mut **cell.borrow_mut();
            *case += 1;
            let root = root.join(format!("case{case}"));
            for dir in [root.clone(), root.join("a"), root.join("b")] {
                storage.create_dir(&dir).unwrap();
            }
            let mut pair = Pair { storage, root, model: Model::default(), open: Default::default() };
            for op in &ops {
                pair.apply(op)?;
            }
            for (&name, &file) in &pair.model.names {
                prop_assert!(
                    content_of(storage, &pair.path(name)) == pair.model.files[file],
                    "{} differs",
                    NAMES[name]
                );
            }
            Ok(())
        })
        .unwrap();
}
