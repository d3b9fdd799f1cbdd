//! A file that appears whole under its name or not at all: written beside it, synced, then renamed over it.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::failure::Failure;
use crate::interrupt;

/// A file in the making. Dropped without [`finish`](Target::finish), it leaves nothing behind.
pub(crate) struct Target {
    path: PathBuf,
    out: Out,
}

enum Out {
    /// A regular file, under a temporary name.
    Beside(BufWriter<NamedTempFile>),
    /// A pipe or a device, which can only be written to.
    Through(BufWriter<File>),
}

impl Target {
    /// Begins the file. Refuses to replace one unless `force` says so.
    pub(crate) fn create(path: &Path, force: bool) -> Result<Self, Failure> {
        match fs::metadata(path) {
            Ok(facts) if facts.is_dir() => {
                let message = format!("{} is a directory", path.display());
                return Err(Failure::other("already_exists", message).with_remedy("name a file"));
            }
            Ok(facts) if facts.is_file() => {
                if !force {
                    let message = format!("{} already exists", path.display());
                    let remedy = "name another file, or replace it with --force";
                    return Err(Failure::other("already_exists", message).with_remedy(remedy));
                }
            }
            Ok(_) => {
                let opened = File::options().write(true).open(path);
                let file = opened.map_err(|error| Failure::io("open", path, error))?;
                return Ok(Self { path: path.to_owned(), out: Out::Through(BufWriter::with_capacity(1 << 20, file)) });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::io("look at", path, error)),
        }
        let name = path.file_name().ok_or_else(|| Failure::usage(format!("{} names no file", path.display())))?;
        let mut prefix = name.to_os_string();
        prefix.push(".");
        let temporary = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".tmp")
            // As any file that is written: the user's umask takes away from this, and nothing else does.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory_of(path));
        let temporary = temporary.map_err(|error| Failure::io("create a file beside", path, error))?;
        Ok(Self { path: path.to_owned(), out: Out::Beside(BufWriter::with_capacity(1 << 20, temporary)) })
    }

    /// Makes the file durable and gives it its name.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        let path = self.path;
        match self.out {
            Out::Through(mut out) => out.flush(),
            Out::Beside(out) => finish_beside(out, &path),
        }
        .map_err(|error| Failure::io("write", &path, error))
    }
}

fn finish_beside(out: BufWriter<NamedTempFile>, path: &Path) -> io::Result<()> {
    let temporary = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    File::open(directory_of(path))?.sync_all()
}

/// The directory that holds `path`; the current one for a bare name.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        interrupt::check_io()?;
        match &mut self.out {
            Out::Beside(out) => out.write(bytes),
            Out::Through(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.out {
            Out::Beside(out) => out.flush(),
            Out::Through(out) => out.flush(),
        }
    }
}
