//! Disks that each break one promise: a harness that stays green on one of them sees nothing.

use alight::storage::sim::Sabotage;

/// What is missing on each disk, in words, and the disk.
pub fn sabotages() -> [(&'static str, Sabotage); 8] {
    let no_file_sync = |suffix: &str| Sabotage { ignore_file_sync: Some(suffix.into()), ..Sabotage::default() };
    let no_dir_sync = |suffix: &str| Sabotage { ignore_dir_sync: Some(suffix.into()), ..Sabotage::default() };
    [
        ("the syncs of segments", no_file_sync(".seg")),
        ("the syncs of index runs", no_file_sync(".idx.tmp")),
        ("the syncs of manifests", no_file_sync("MANIFEST.tmp")),
        ("the syncs of the directory above the store", no_dir_sync("/")),
        ("the syncs of the store's directory", no_dir_sync("/store")),
        ("the syncs of the directory of segments", no_dir_sync("/segments")),
        ("the syncs of the directory of index runs", no_dir_sync("/index")),
        ("the atomicity of renames", Sabotage { rename_not_atomic: true, ..Sabotage::default() }),
    ]
}
