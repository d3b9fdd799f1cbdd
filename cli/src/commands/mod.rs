//! One file for each command: its arguments, what it does, and its report.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use alight::{Error, Store, StoreOptions};

use crate::args::Command;
use crate::failure::Failure;
use crate::output::Output;

pub(crate) mod backup;
pub(crate) mod bench;
pub(crate) mod compact;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod export;
pub(crate) mod get;
pub(crate) mod import;
pub(crate) mod load;
pub(crate) mod ls;
pub(crate) mod put;
pub(crate) mod repair;
pub(crate) mod rm;
pub(crate) mod stat;
pub(crate) mod verify;

pub(crate) fn run(command: Command, output: &Output) -> Result<(), Failure> {
    match command {
        Command::Demo(args) => demo::run(&args, output),
        Command::Import(args) => import::run(&args, output),
        Command::Export(args) => export::run(args, output),
        Command::Put(args) => put::run(args, output),
        Command::Get(args) => get::run(args, output),
        Command::Load(args) => load::run(args, output),
        Command::Ls(args) => ls::run(args, output),
        Command::Rm(args) => rm::run(args, output),
        Command::Stat(args) => stat::run(&args, output),
        Command::Compact(args) => compact::run(&args, output),
        Command::Verify(args) => verify::run(&args, output),
        Command::Backup(args) => backup::run(&args, output),
        Command::Repair(args) => repair::run(&args, output),
        Command::Bench(args) => bench::run(&args, output),
        Command::Doctor(args) => doctor::run(&args, output),
    }
}

/// Opens a store to read from: beside a writer, and on a read-only file system.
fn open_to_read(path: &Path) -> Result<Store, Failure> {
    opened(Store::options(), path)
}

/// Opens a store to read from, with more options.
fn opened(options: StoreOptions, path: &Path) -> Result<Store, Failure> {
    options.read_only(true).open(path).map_err(not_opened)
}

/// Opens a store to write to, which must be there.
fn open_to_write(path: &Path) -> Result<Store, Failure> {
    Store::open(path).map_err(not_opened)
}

/// Opens a store to write to, and makes it where there is none; says whether it made it.
fn open_or_create(path: &Path) -> Result<(Store, bool), Failure> {
    match Store::open(path) {
        Ok(store) => Ok((store, false)),
        Err(error) if is_absent(&error) => Ok((Store::options().create(true).open(path)?, true)),
        Err(error) => Err(error.into()),
    }
}

/// Closes a store whose changes were all committed: what fails now has not undone them.
fn close_committed(store: Store) -> Result<(), Failure> {
    store.close().map_err(|error| {
        let failure = Failure::from(error);
        let remedy = failure.remedy().map_or_else(String::new, |remedy| format!("{remedy}. "));
        failure.with_remedy(remedy + "Everything was committed before and is durable; the next open finds it")
    })
}

/// Whether there is no store because nothing is at the path, or nothing of a store.
fn is_absent(error: &Error) -> bool {
    match error {
        Error::NotAStore { .. } => true,
        Error::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

fn not_opened(error: Error) -> Failure {
    let absent = is_absent(&error);
    let failure = Failure::from(error);
    if absent {
        failure.with_remedy("check the path; `alight import STORE FILE.safetensors` makes a store")
    } else {
        failure
    }
}

/// A key or a prefix as it came from the command line: any bytes.
fn key_bytes(key: OsString) -> Vec<u8> {
    key.into_vec()
}
