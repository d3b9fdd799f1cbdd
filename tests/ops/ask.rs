//! Asks a view of a store something, and compares the answer with what is known to be there.

use alight::{Device, Error, Snapshot, Store};

use super::script::{Key, Question};
use crate::common::tiny::Contents;

/// What can be asked: a store as it is now, or a snapshot of it.
pub(crate) enum View<'a> {
    Now(&'a Store),
    Then(&'a Snapshot),
}

/// Calls the same method of whichever it is.
macro_rules! of_either {
    ($view:expr, $method:ident($($argument:expr),*)) => {
        match $view {
            View::Now(store) => store.$method($($argument),*),
            View::Then(snapshot) => snapshot.$method($($argument),*),
        }
    };
}

impl<'a> View<'a> {
    pub(crate) fn of_store(store: &'a Store) -> Self {
        Self::Now(store)
    }

    pub(crate) fn of_snapshot(snapshot: &'a Snapshot) -> Self {
        Self::Then(snapshot)
    }
}

fn wrong(what: &str) -> Result<(), String> {
    Err(what.to_owned())
}

/// What judges an error that says neither that a key is missing nor that a range is none.
pub(crate) type Excuse<'a> = &'a dyn Fn(Error) -> Result<(), String>;

fn get(view: &View<'_>, key: &[u8], there: &Contents, excuse: Excuse<'_>) -> Result<(), String> {
    match (of_either!(view, get(key, &Device::host())), there.get(key)) {
        (Ok(value), Some(right)) if value.as_host() == Some(right) => Ok(()),
        (Ok(_), _) => wrong("wrong data"),
        (Err(Error::NotFound(_)), None) => Ok(()),
        (Err(Error::NotFound(_)), Some(_)) => wrong("a key is missing"),
        (Err(error), _) => excuse(error),
    }
}

/// Asks, and compares the answer with what is there.
pub(crate) fn ask(view: &View<'_>, question: &Question, there: &Contents, excuse: Excuse<'_>) -> Result<(), String> {
    let host = Device::host();
    match question {
        Question::Get(key) => get(view, &key.bytes(), there, excuse),
        Question::Range(key, start, end) => {
            let key = &key.bytes();
            let right = there.get(key);
            let at = |sixteenth: u8| right.map_or(0, |right| right.len() as u64) * u64::from(sixteenth) / 15;
            let (start, end) = (at(*start), at(*end));
            match (of_either!(view, get_range(key, start..end, &host)), right) {
                (Ok(value), Some(right)) if value.as_host() == right.get(start as usize..end as usize) => Ok(()),
                (Ok(_), _) => wrong("wrong data in a range"),
                (Err(Error::RangeOutOfBounds { .. }), Some(_)) if start > end => Ok(()),
                (Err(Error::NotFound(_)), None) => Ok(()),
                (Err(Error::NotFound(_)), Some(_)) => wrong("a key is missing"),
                (Err(error), _) => excuse(error),
            }
        }
        Question::Many(keys) => {
            let keys = &keys.map(Key::bytes);
            let right: Option<Vec<&[u8]>> = keys.iter().map(|key| there.get(key).map(Vec::as_slice)).collect();
            match (of_either!(view, get_many(keys, &host)), right) {
                (Ok(values), Some(right))
                    if values.iter().map(|value| value.as_host().unwrap_or(b"")).eq(right.iter().copied()) =>
                {
                    Ok(())
                }
                (Ok(_), _) => wrong("wrong data among several"),
                (Err(Error::NotFound(_)), None) => Ok(()),
                (Err(Error::NotFound(_)), Some(_)) => wrong("one of several keys is missing"),
                (Err(error), _) => excuse(error),
            }
        }
        Question::Scan(prefix) => {
            let mut right = there.iter().filter(|(key, _)| key.starts_with(prefix.as_bytes()));
            for info in of_either!(view, scan(prefix)) {
                match info {
                    Err(error) => return excuse(error),
                    Ok(info) => match right.next() {
                        Some((key, value)) if info.key.as_bytes() == key && info.shape == [value.len() as u64] => {}
                        _ => return wrong("a scan shows what is not there, or leaves something out"),
                    },
                }
            }
            if right.next().is_none() { Ok(()) } else { wrong("a scan ends before its end") }
        }
        Question::Contains(key) => match of_either!(view, contains(key.bytes())) {
            Ok(found) if found == there.contains_key(&key.bytes()) => Ok(()),
            Ok(found) => wrong(if found { "a key is there that is not" } else { "a key is missing" }),
            Err(error) => excuse(error),
        },
        Question::Everything => {
            ask(view, &Question::Scan(""), there, excuse)?;
            there.keys().try_for_each(|key| get(view, key, there, excuse))
        }
    }
}
