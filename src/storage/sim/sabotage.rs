//! A disk that lies, to show that a crash simulation would notice.

use std::path::Path;

use super::trace::Call;

/// Which promises the disk breaks. A crash simulation that stays green on such a disk sees nothing.
///
/// The calls answer as ever; the lie shows in the states that a crash leaves behind.
#[derive(Debug, Clone, Default)]
pub struct Sabotage {
    /// Syncs of files whose path ends like this make nothing durable; `Some("".into())` means every file.
    pub ignore_file_sync: Option<String>,
    /// Syncs of directories whose path ends like this make nothing durable; `Some("".into())` means every directory.
    pub ignore_dir_sync: Option<String>,
    /// The one sync with this number ([`Call::index`]) makes nothing durable, be it of a file or of a directory.
    pub ignore_sync_call: Option<u64>,
    /// A rename over an existing file is two changes: the old file loses its name, then the new one gets it.
    pub rename_not_atomic: bool,
}

impl Sabotage {
    pub(super) fn loses_file_sync(&self, call: &Call) -> bool {
        self.loses(call, self.ignore_file_sync.as_deref())
    }

    pub(super) fn loses_dir_sync(&self, call: &Call) -> bool {
        self.loses(call, self.ignore_dir_sync.as_deref())
    }

    fn loses(&self, call: &Call, suffix: Option<&str>) -> bool {
        self.ignore_sync_call == Some(call.index) || suffix.is_some_and(|suffix| ends_with(&call.path, suffix))
    }
}

/// Whether a path, written out, ends with these letters.
pub(super) fn ends_with(path: &Path, suffix: &str) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(suffix.as_bytes())
}
