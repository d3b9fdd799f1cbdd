//! Changes behind the store's back: what a test does to a disk to see whether the store notices.
//!
//! # Invariants
//! - A change here is durable at once, together with everything that is live at that moment.
//! - Nothing here counts as a call, or is struck by a fault.
//! - A path that is not there is the test's mistake, and panics.

use std::path::{Path, PathBuf};

use super::SimStorage;
use super::content::Content;
use super::image::{FileId, NameChange, Node};
use super::live::Live;
use super::trace::{Effect, Event};

impl SimStorage {
    /// Every file that has a name, by its whole path.
    pub fn files(&self) -> Vec<PathBuf> {
        self.disk.state.lock().live.image.walk().into_iter().map(|(path, _)| path).collect()
    }

    /// Whether a file bears this path.
    pub fn has_file(&self, path: impl AsRef<Path>) -> bool {
        self.disk.state.lock().live.image.file(path.as_ref()).is_ok()
    }

    /// What a file holds.
    ///
    /// # Panics
    /// Where there is none.
    pub fn read_file(&self, path: impl AsRef<Path>) -> Vec<u8> {
        let state = self.disk.state.lock();
        let file = there(&state.live, path.as_ref());
        state.live.image.content(file).to_vec()
    }

    /// Replaces what a file holds, in place; makes the file where there is none. Its directory must exist.
    ///
    /// # Panics
    /// Where the directory is missing.
    pub fn write_file(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        self.tamper(|live| {
            let path = path.as_ref();
            let mut content = Content::default();
            content.write(bytes, 0);
            put(live, path, content);
        });
    }

    /// Turns one bit of a file over. Bit 0 is the lowest.
    ///
    /// # Panics
    /// Where there is no such file, or the file ends before.
    pub fn flip_bit(&self, path: impl AsRef<Path>, offset: u64, bit: u8) {
        self.tamper(|live| {
            let file = there(live, path.as_ref());
            let content = live.image.files.entry(file).or_default();
            let mut byte = [0];
            assert_eq!(content.read(&mut byte, offset), 1, "{} ends before {offset}", path.as_ref().display());
            content.write(&[byte[0] ^ (1 << (bit % 8))], offset);
        });
    }

    /// Sets a file's length.
    ///
    /// # Panics
    /// Where there is no such file.
    pub fn truncate_file(&self, path: impl AsRef<Path>, len: u64) {
        self.tamper(|live| {
            let file = there(live, path.as_ref());
            live.image.files.entry(file).or_default().truncate(len);
        });
    }

    /// Takes a file's name away.
    ///
    /// # Panics
    /// Where there is no such file.
    pub fn remove_file(&self, path: impl AsRef<Path>) {
        self.tamper(|live| {
            there(live, path.as_ref());
            live.remove(path.as_ref()).expect("the file is there");
        });
    }

    /// Makes `to` hold what `from` holds.
    ///
    /// # Panics
    /// Where there is no file `from`, or no directory for `to`.
    pub fn copy_file(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) {
        self.tamper(|live| {
            let content = live.image.content(there(live, from.as_ref()));
            put(live, to.as_ref(), content);
        });
    }

    fn tamper(&self, change: impl FnOnce(&mut Live)) {
        let state = &mut *self.disk.state.lock();
        let recording = std::mem::replace(&mut state.live.recording, false);
        let read_only = std::mem::replace(&mut state.live.read_only, false);
        change(&mut state.live);
        state.live.recording = recording;
        state.live.read_only = read_only;
        let image = state.live.image.clone();
        state.record(Event::Tampered, vec![Effect::Replaced(image)]);
    }
}

fn there(live: &Live, path: &Path) -> FileId {
    live.image.file(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn put(live: &mut Live, path: &Path, content: Content) {
    let at = live.image.place(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = match live.image.node(&at) {
        Some(Node::File(file)) => file,
        Some(Node::Dir(_)) => panic!("{}: a directory", path.display()),
        None => {
            let file = FileId(live.next_id);
            live.next_id += 1;
            live.image.apply(&NameChange::Link { at, node: Node::File(file) });
            file
        }
    };
    live.image.files.insert(file, content);
}
