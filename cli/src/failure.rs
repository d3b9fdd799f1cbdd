//! Why a command ended without doing what it was asked: what failed, what to do next, and the exit code.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use alight::Error;

/// The end of a command that failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Called wrongly: exit code 2.
    Usage { message: String, remedy: Option<String> },
    /// The library refused or failed.
    Store { error: Error, remedy: Option<String> },
    /// Something outside the store is not as it should be: a file, a device's memory.
    Other { kind: &'static str, message: String, remedy: Option<String> },
    /// The command's own report on standard output says what is wrong; nothing to add.
    Reported,
    /// Whoever read our output went away. No news to anybody.
    BrokenPipe,
    /// A signal came, and everything was cleaned up.
    Interrupted,
}

impl Failure {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure::Usage { message: message.into(), remedy: None }
    }

    /// A failure outside the store, named by a word for programs and a sentence for people.
    pub(crate) fn other(kind: &'static str, message: impl Into<String>) -> Self {
        Failure::Other { kind, message: message.into(), remedy: None }
    }

    /// The system's answer to something that was done to a file.
    pub(crate) fn io(action: &str, subject: impl AsRef<Path>, error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Failure::BrokenPipe;
        }
        let message = format!("{action} {}: {error}", subject.as_ref().display());
        Failure::Other { kind: "io", message, remedy: io_remedy(&error).map(str::to_owned) }
    }

    /// The same with a remedy, in place of whatever was known.
    #[must_use]
    pub(crate) fn with_remedy(mut self, text: impl Into<String>) -> Self {
        if let Failure::Usage { remedy, .. } | Failure::Store { remedy, .. } | Failure::Other { remedy, .. } = &mut self
        {
            *remedy = Some(text.into());
        }
        self
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::BrokenPipe => 0,
            Failure::Store { .. } | Failure::Other { .. } | Failure::Reported => 1,
            Failure::Usage { .. } => 2,
            Failure::Interrupted => 130,
        })
    }

    /// One word for programs.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Failure::Usage { .. } => "usage",
            Failure::Store { error, .. } => kind_of(error),
            Failure::Other { kind, .. } => kind,
            Failure::Reported => "reported",
            Failure::BrokenPipe => "broken_pipe",
            Failure::Interrupted => "interrupted",
        }
    }

    /// What to do next, where there is something.
    pub(crate) fn remedy(&self) -> Option<String> {
        match self {
            Failure::Usage { remedy, .. } | Failure::Other { remedy, .. } => remedy.clone(),
            Failure::Store { error, remedy } => remedy.clone().or_else(|| remedy_of(error)),
            Failure::Reported | Failure::BrokenPipe | Failure::Interrupted => None,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage { message, .. } | Failure::Other { message, .. } => f.write_str(message),
            Failure::Store { error, .. } => error.fmt(f),
            Failure::Reported => f.write_str("see the report"),
            Failure::BrokenPipe => f.write_str("the reader of the output went away"),
            Failure::Interrupted => f.write_str("interrupted; everything temporary was removed"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ if crate::interrupt::raised() => Failure::Interrupted,
            error => Failure::Store { error, remedy: None },
        }
    }
}

fn kind_of(error: &Error) -> &'static str {
    match error {
        Error::Io { .. } => "io",
        Error::Damaged(_) => "damaged",
        Error::NotFound(_) => "not_found",
        Error::NotAStore { .. } => "not_a_store",
        Error::AlreadyExists { .. } => "already_exists",
        Error::Newer { .. } => "newer",
        Error::Locked { .. } => "locked",
        Error::Outdated { .. } => "outdated",
        Error::InvalidKey { .. } => "invalid_key",
        Error::ShapeMismatch { .. } => "shape_mismatch",
        Error::LimitExceeded { .. } => "limit_exceeded",
        Error::Device { .. } => "device",
        Error::DeviceMemory { .. } => "device_memory",
        _ => "store",
    }
}

/// What to do next, where the library's own text does not say it.
fn remedy_of(error: &Error) -> Option<String> {
    let text = match error {
        Error::Io { source, .. } => return io_remedy(source).map(str::to_owned),
        Error::Damaged(_) => {
            "`alight verify STORE` names everything that is hit; put the damaged keys again, or restore a backup. Other \
             keys are still served. `alight verify --repair-index STORE` mends MANIFEST and index runs, `alight repair` \
             salvages what is whole"
        }
        Error::Outdated { .. } => "run the command again",
        Error::NotFound(_) => "`alight ls STORE` lists the keys",
        Error::NotAStore { .. } => "name a store's directory, or make one with `alight import STORE FILE.safetensors`",
        Error::DeviceMemory { .. } => "use a smaller --window-bytes, fewer keys with --prefix, or --device host",
        Error::Device { .. } => "use --device host, which needs no GPU",
        _ => return None,
    };
    Some(text.to_owned())
}

fn io_remedy(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::NotFound => Some("check the path"),
        io::ErrorKind::PermissionDenied => Some("check who owns the path and its permissions"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some("free some space, or use another disk"),
        io::ErrorKind::ReadOnlyFilesystem => Some("the file system is mounted read-only; use another one"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::io("write to", "standard output", broken()), Failure::BrokenPipe));
        let error = Error::Io { action: "write", path: "x".into(), source: broken() };
        assert!(matches!(Failure::from(error), Failure::BrokenPipe));
    }

    #[test]
    fn a_failure_says_what_to_do() {
        let failure = Failure::from(Error::NotAStore { path: "x".into(), why: "no manifest".into() });
        assert_eq!(failure.kind(), "not_a_store");
        assert!(failure.remedy().is_some_and(|remedy| remedy.contains("alight import")));
        let failure = Failure::io("read", "x", io::ErrorKind::PermissionDenied.into());
        assert!(failure.remedy().is_some());
        assert_eq!(Failure::usage("x").with_remedy("y").remedy().as_deref(), Some("y"));
    }
}
