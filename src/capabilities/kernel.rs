//! What the kernel lets this process do.

use std::io;

use super::{Capability, System, show_bytes, sys};

/// The row of huge pages.
pub(super) const HUGE_PAGES: &str = "huge pages";
const IO_URING: &str = "io_uring";
const CACHESTAT: &str = "cachestat";
const LOCKED_MEMORY: &str = "locked memory";

/// Enough for the ring of a device, and as much again.
const LOCKED_BYTES_WANTED: u64 = 128 << 20;

pub(super) fn probe(system: &System) -> Vec<Capability> {
    vec![io_uring(system, sys::io_uring()), cachestat(sys::cachestat()), locked_memory(system), huge_pages(system)]
}

fn io_uring(system: &System, answer: io::Result<()>) -> Capability {
    let error = match answer {
        Ok(()) => return Capability::yes(IO_URING, "the kernel gives a ring"),
        Err(error) => error,
    };
    let disabled = system.text("/proc/sys/kernel/io_uring_disabled");
    match (error.raw_os_error(), disabled.as_deref()) {
        (Some(libc::EPERM), Some(value @ ("1" | "2"))) => Capability::no(
            IO_URING,
            format!("switched off on this machine (kernel.io_uring_disabled = {value})"),
            "sysctl kernel.io_uring_disabled=0, or read with threads as now",
        ),
        (Some(libc::EPERM | libc::EACCES), _) => Capability::no(
            IO_URING,
            "blocked by a policy of this container or sandbox (seccomp)",
            "allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile, or read with threads as now",
        ),
        (Some(libc::ENOSYS), _) => Capability::no(
            IO_URING,
            "the kernel has none, or a sandbox hides it",
            "use Linux 5.10 or newer, or read with threads as now",
        ),
        _ => Capability::unknown(IO_URING, format!("io_uring_setup: {error}")),
    }
}

fn cachestat(answer: io::Result<()>) -> Capability {
    match answer {
        Ok(()) => Capability::yes(CACHESTAT, "what is in the page cache is known at the price of one call"),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => Capability::no(
                CACHESTAT,
                "the kernel has none, or a policy blocks it: mincore is asked instead, which is slower",
                "use Linux 6.5 or newer",
            ),
            _ => Capability::unknown(CACHESTAT, format!("cachestat: {error}")),
        },
    }
}

fn locked_memory(system: &System) -> Capability {
    let limits = system.text("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft.map(|soft| (soft, soft.parse::<u64>())) {
        Some(("unlimited", _)) => Capability::yes(LOCKED_MEMORY, "unlimited"),
        Some((_, Ok(bytes))) if bytes >= LOCKED_BYTES_WANTED => Capability::yes(LOCKED_MEMORY, show_bytes(bytes)),
        Some((_, Ok(bytes))) => Capability::no(
            LOCKED_MEMORY,
            format!("at most {}; pinned rings want {}", show_bytes(bytes), show_bytes(LOCKED_BYTES_WANTED)),
            "ulimit -l unlimited, LimitMEMLOCK=infinity in a service, --ulimit memlock=-1 for a container",
        ),
        _ => Capability::unknown(LOCKED_MEMORY, "/proc/self/limits does not say"),
    }
}

fn huge_pages(system: &System) -> Capability {
    let text = system.text("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(mode, _)| mode) {
        Some("never") => Capability::no(
            HUGE_PAGES,
            "switched off (transparent_hugepage = never): large buffers in host memory are slower to make",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(mode) => Capability::yes(HUGE_PAGES, format!("transparent_hugepage = {mode}")),
        None => Capability::unknown(HUGE_PAGES, "the kernel does not say (transparent_hugepage)"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Answer;
    use super::*;

    fn system(path: &str, text: &str) -> (tempfile::TempDir, System) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
        let root = folder.path().to_path_buf();
        (folder, System { root })
    }

    #[test]
    fn why_there_is_no_io_uring_is_told_apart() {
        let fails = |errno| Err(io::Error::from_raw_os_error(errno));
        let (_folder, disabled) = system("proc/sys/kernel/io_uring_disabled", "2\n");
        let (_other, plain) = system("x", "");
        assert_eq!(io_uring(&plain, Ok(())).answer, Answer::Yes);
        assert!(io_uring(&disabled, fails(libc::EPERM)).reason.contains("io_uring_disabled = 2"));
        assert!(io_uring(&plain, fails(libc::EPERM)).reason.contains("seccomp"));
        assert!(io_uring(&plain, fails(libc::ENOSYS)).reason.contains("none"));
        assert_eq!(io_uring(&plain, fails(libc::EMFILE)).answer, Answer::Unknown);
        assert_eq!(cachestat(fails(libc::ENOSYS)).answer, Answer::No);
    }

    #[test]
    fn limits_and_modes_are_read_as_the_kernel_writes_them() {
        let limits = |soft: &str| {
            let text = format!(
                "Limit                     Soft Limit           Hard Limit           Units\n\
                 Max locked memory         {soft:20} unlimited            bytes\n"
            );
            locked_memory(&system("proc/self/limits", &text).1)
        };
        assert_eq!(limits("unlimited"), Capability::yes(LOCKED_MEMORY, "unlimited"));
        assert_eq!(limits("8388608").answer, Answer::No);
        assert_eq!(limits("1073741824").reason, "1.0 GiB");
        assert_eq!(locked_memory(&system("x", "").1).answer, Answer::Unknown);
        let pages = |text: &str| huge_pages(&system("sys/kernel/mm/transparent_hugepage/enabled", text).1);
        assert_eq!(pages("always [madvise] never\n").reason, "transparent_hugepage = madvise");
        assert_eq!(pages("always madvise [never]\n").answer, Answer::No);
        assert_eq!(huge_pages(&system("x", "").1).answer, Answer::Unknown);
    }
}
