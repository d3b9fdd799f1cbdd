//! What this machine can do for alight: a table of facts, each probed, none guessed, with the remedy where one is known.
//! It changes nothing, writes nothing, and fails at nothing: what cannot be found out is [`Answer::Unknown`], and why.

mod disk;
mod gpu;
mod kernel;
#[expect(unsafe_code, reason = "some of the kernel's abilities show only in its answers to system calls")]
mod sys;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// What this machine can do, as far as it matters to alight.
///
/// ```
/// let capabilities = alight::Capabilities::probe(None);
/// println!("{}", capabilities.verdict());
/// for row in capabilities.rows() {
///     println!("{}: {} ({})", row.name, row.answer, row.reason);
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    rows: Vec<Capability>,
    verdict: String,
}

/// One fact about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// What was asked, always by the same few words.
    pub name: &'static str,
    /// The answer.
    pub answer: Answer,
    /// What was found.
    pub reason: String,
    /// What to do about it, where the answer is not yes and something can be done.
    pub remedy: Option<String>,
}

/// The answer to a question about the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is there, or as it should be.
    Yes,
    /// It is not.
    No,
    /// It could not be found out, or nobody asked.
    Unknown,
}

impl Capabilities {
    /// Looks at the machine, and at the file system that holds `store`, a store or any path that is to become one.
    ///
    /// It opens the CUDA driver and cuFile in this process where they are there, which takes up to a second and makes the
    /// first GPU's primary context; all else takes milliseconds.
    pub fn probe(store: Option<&Path>) -> Capabilities {
        let system = System { root: PathBuf::from("/") };
        let gpu = gpu::probe(&system);
        let mut rows = gpu.rows;
        rows.extend(disk::probe(&system, store, gpu.uses_cufile));
        rows.extend(kernel::probe(&system));
        let verdict = verdict(&rows);
        Capabilities { rows, verdict }
    }

    /// The facts, the most telling first.
    pub fn rows(&self) -> &[Capability] {
        &self.rows
    }

    /// What they come to, in a sentence.
    pub fn verdict(&self) -> &str {
        &self.verdict
    }
}

/// Names that the verdict asks for.
const GPU: &str = "GPU";
const DIRECT_PATH: &str = "cuFile direct path";
const UDEV: &str = "udev knows the disk";
const DIRECT_IO: &str = "O_DIRECT";

/// What the rows come to.
fn verdict(rows: &[Capability]) -> String {
    let answer = |name| rows.iter().find(|row| row.name == name).map_or(Answer::Unknown, |row| row.answer);
    let way = match (answer(GPU), answer(DIRECT_PATH), answer(UDEV)) {
        (Answer::Yes, Answer::Yes, Answer::Yes | Answer::Unknown) => {
            "this machine can move bytes straight between its disks and its GPU"
        }
        (Answer::Yes, Answer::Yes, Answer::No) => {
            "this machine could move bytes straight to its GPU, but cuFile refuses files of this disk; they go through \
             pinned host memory"
        }
        (Answer::Yes, ..) => "bytes go to the GPU through pinned host memory; there is no direct path from disk to GPU",
        _ => "no GPU can be used; everything works on the host, and gets land in host memory",
    };
    let slow = rows.iter().filter(|row| row.answer == Answer::No && is_slowing(row.name)).map(|row| row.name);
    match slow.collect::<Vec<_>>()[..] {
        [] => way.to_string(),
        ref names => format!("{way}; slower than it could be: {}", names.join(", ")),
    }
}

/// Whether a no costs speed on every machine, so that the verdict names it.
fn is_slowing(name: &str) -> bool {
    [DIRECT_IO, gpu::LINK, kernel::HUGE_PAGES].contains(&name)
}

impl Capability {
    fn yes(name: &'static str, reason: impl Into<String>) -> Capability {
        Capability { name, answer: Answer::Yes, reason: reason.into(), remedy: None }
    }

    fn no(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Capability {
        Capability { name, answer: Answer::No, reason: reason.into(), remedy: Some(remedy.into()) }
    }

    fn unknown(name: &'static str, reason: impl Into<String>) -> Capability {
        Capability { name, answer: Answer::Unknown, reason: reason.into(), remedy: None }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Answer::Yes => "yes",
            Answer::No => "no",
            Answer::Unknown => "unknown",
        })
    }
}

/// The system's files in `/proc` and `/sys`, or those of a test.
struct System {
    root: PathBuf,
}

impl System {
    /// A file's text without the white space around it; `None` where there is no such file.
    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_string())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The names in a directory, in order.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

/// Bytes as people read them.
fn show_bytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        1_048_576..1_073_741_824 => format!("{} MiB", bytes >> 20),
        // Only shown: the fraction may be rounded.
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(answers: &[(&'static str, Answer)]) -> Vec<Capability> {
        let row = |&(name, answer): &(&'static str, Answer)| Capability { answer, ..Capability::yes(name, "") };
        answers.iter().map(row).collect()
    }

    #[test]
    fn the_verdict_follows_from_the_rows() {
        use Answer::{No, Unknown, Yes};
        for (answers, begins) in [
            (vec![], "no GPU"),
            (vec![(GPU, No), (DIRECT_PATH, No)], "no GPU"),
            (vec![(GPU, Unknown)], "no GPU"),
            (vec![(GPU, Yes), (DIRECT_PATH, No)], "bytes go to the GPU through pinned"),
            (vec![(GPU, Yes), (DIRECT_PATH, Yes), (UDEV, Unknown)], "this machine can move bytes straight"),
            (vec![(GPU, Yes), (DIRECT_PATH, Yes), (UDEV, No)], "this machine could"),
        ] {
            let verdict = verdict(&rows(&answers));
            assert!(verdict.starts_with(begins) && !verdict.contains("slower"), "{answers:?}: {verdict}");
        }
        let slow = verdict(&rows(&[(GPU, Yes), (DIRECT_IO, No), (gpu::LINK, No), (kernel::HUGE_PAGES, Unknown)]));
        assert!(slow.ends_with("slower than it could be: O_DIRECT, PCIe link"), "{slow}");
    }

    #[test]
    fn this_machine_is_probed_without_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        for store in [None, Some(folder.path()), Some(Path::new("/nowhere/at/all"))] {
            let capabilities = Capabilities::probe(store);
            assert!(!capabilities.verdict().is_empty());
            let mut names: Vec<_> = capabilities.rows().iter().map(|row| row.name).collect();
            assert!(names.contains(&GPU) && names.contains(&DIRECT_IO), "{names:?}");
            names.sort();
            names.dedup();
            assert_eq!(names.len(), capabilities.rows().len(), "every question once");
            for row in capabilities.rows() {
                assert!(!row.reason.is_empty(), "{row:?}");
                assert!(row.answer != Answer::Yes || row.remedy.is_none(), "{row:?}");
                assert!(row.answer != Answer::No || row.remedy.is_some(), "{row:?}");
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "a look leaves nothing behind");
    }

    #[test]
    fn bytes_are_shown_in_the_unit_that_fits() {
        let shown = [0, 1023, 4096, 64 << 20, 80 << 30].map(show_bytes);
        assert_eq!(shown, ["0 B", "1023 B", "4 KiB", "64 MiB", "80.0 GiB"]);
    }
}
