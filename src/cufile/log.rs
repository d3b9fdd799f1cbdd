//! Where cuFile writes its log. By itself it makes `cufile.log` in the working directory, which is the user's.
//!
//! Measured on 1.15 and 1.20: of all that can be set, only the environment moves the log (`CUFILE_LOGFILE_PATH`, or
//! `logging.dir` in the file that `CUFILE_ENV_PATH_JSON` names). `cuFileSetParameterString` takes `LOG_DIR`,
//! `ENV_LOGFILE_PATH` and `LOGGING_LEVEL`, answers with success, and the log is still made in the working directory,
//! since it is opened before they are looked at. And the environment of a process that has threads must not be changed.
//! So the driver is opened on a thread that has a working directory of its own.

use std::env;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// With any of these the user has chosen. They may be relative, to the directory that the process is in.
const CHOSEN_BY: [&str; 2] = ["CUFILE_LOGFILE_PATH", "CUFILE_ENV_PATH_JSON"];

/// Whether the user has said where the log goes.
pub(super) fn is_chosen() -> bool {
    CHOSEN_BY.iter().any(|name| env::var_os(name).is_some())
}

/// The directory of this user for cuFile's log: private, in the system's place for temporary files.
pub(super) fn directory() -> PathBuf {
    env::temp_dir().join(format!("alight-cufile-{}", user()))
}

/// Takes this thread, and no other, into a directory, made where it is absent.
pub(super) fn move_this_thread_to(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Nobody else's directory, and none that anybody else may put a link into.
    let facts = directory.symlink_metadata()?;
    if !facts.is_dir() || facts.uid() != user() || facts.mode() & 0o022 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "not a private directory of this user"));
    }
    // SAFETY: takes no memory. From here on this thread's working directory is its own.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    env::set_current_dir(directory)
}

fn user() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::thread;

    use super::*;

    #[test]
    fn one_thread_moves_and_the_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("log");
        let before = env::current_dir().unwrap();
        let moved = place.clone();
        let there =
            thread::spawn(move || move_this_thread_to(&moved).map(|()| env::current_dir().unwrap())).join().unwrap();
        match there {
            Ok(there) => assert_eq!(there, place.canonicalize().unwrap()),
            // A container's policy may forbid it.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
        assert_eq!(env::current_dir().unwrap(), before);
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("log");
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(move_this_thread_to(&place).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert_eq!(move_this_thread_to(&link).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
