//! The GPU, the bus that it is on, and cuFile's way to it.

use super::{Answer, Capability, DIRECT_PATH, GPU, System, show_bytes};
use crate::cufile::{CuFile, ErrorKind};
use crate::device::Device;

/// The row of the bus.
pub(super) const LINK: &str = "PCIe link";
const NUMA: &str = "NUMA node";
const LIBRARY: &str = "libcufile";
const MODE: &str = "cuFile mode";

/// What NVIDIA's devices say of their maker, and display and 3D controllers of their kind.
const VENDOR: &str = "0x10de";
const CLASSES: [&str; 2] = ["0x0300", "0x0302"];

/// What was found of the GPU.
pub(super) struct Gpu {
    pub(super) rows: Vec<Capability>,
    /// Whether cuFile opened: only then udev's answer matters.
    pub(super) uses_cufile: bool,
}

pub(super) fn probe(system: &System) -> Gpu {
    let mut rows = vec![gpu()];
    let cufile = rows[0].answer == Answer::Yes;
    let (cufile_rows, uses_cufile) = if cufile { cufile_rows() } else { (cufile_without_gpu(), false) };
    rows.extend(cufile_rows);
    rows.extend(bus(system));
    Gpu { rows, uses_cufile }
}

fn gpu() -> Capability {
    let count = match (Device::cuda_unavailable_reason(), Device::cuda_count()) {
        (None, Ok(count)) => count,
        (why, _) => {
            let why = why.unwrap_or_else(|| "the driver does not say how many GPUs there are".to_string());
            // The driver's words carry their remedy after the first semicolon.
            return match why.split_once("; ") {
                Some((why, remedy)) => Capability::no(GPU, why, remedy),
                None => Capability::no(GPU, why, "see nvidia-smi; without a GPU everything works on the host"),
            };
        }
    };
    match Device::cuda(0).and_then(|gpu| Ok((gpu.name().to_string(), gpu.memory_bytes()?))) {
        Ok((name, memory)) => {
            let memory = memory.map_or(String::new(), |memory| {
                format!(", {} of {} free", show_bytes(memory.free), show_bytes(memory.total))
            });
            let others = if count > 1 { format!("; {count} in all") } else { String::new() };
            Capability::yes(GPU, format!("{name}{memory}{others}"))
        }
        Err(error) => Capability::no(GPU, error.to_string(), "see nvidia-smi for what holds or hinders the GPU"),
    }
}

fn cufile_without_gpu() -> Vec<Capability> {
    [LIBRARY, MODE, DIRECT_PATH].map(|name| Capability::unknown(name, "not asked, since no GPU can be used")).into()
}

fn cufile_rows() -> (Vec<Capability>, bool) {
    let cufile = match CuFile::get() {
        Ok(cufile) => cufile,
        Err(error) => {
            let why = error.kind().to_string();
            let (why, remedy) =
                why.split_once("; ").unwrap_or((&why, "cuFile's log and /etc/cufile.json may say more"));
            let remedy = error.remedy().unwrap_or(remedy);
            // Where nothing was loaded, the library is what is missing; else it is there and does not open.
            let library = match error.kind() {
                ErrorKind::Unavailable(_) => Capability::no(LIBRARY, why, remedy),
                _ => Capability::yes(LIBRARY, "found"),
            };
            let mode = Capability::no(MODE, format!("the driver did not open: {why}"), remedy);
            let direct = Capability::unknown(DIRECT_PATH, "cuFile is not open");
            return (vec![library, mode, direct], false);
        }
    };
    let (major, minor) = cufile.version();
    let library = Capability::yes(LIBRARY, format!("{major}.{minor}, {}", cufile.library().display()));
    let properties = match cufile.properties() {
        Ok(properties) => properties,
        Err(error) => {
            let unknown = |name| Capability::unknown(name, error.to_string());
            return (vec![library, unknown(MODE), unknown(DIRECT_PATH)], true);
        }
    };
    let direct = match (properties.direct_paths.as_slice(), properties.nvidia_fs) {
        ([], None) => Capability::no(
            DIRECT_PATH,
            "nvidia-fs is not loaded, and no disk offers PCI P2PDMA",
            "with NVMe disks on the GPU's own PCIe bus: load nvidia-fs (package nvidia-gds), or use a kernel and driver \
             with PCI P2PDMA",
        ),
        ([], Some((major, minor))) => Capability::no(
            DIRECT_PATH,
            format!("nvidia-fs {major}.{minor} is loaded, and knows no storage of this machine"),
            "gdscheck -p says which storage is supported and what is missing",
        ),
        (paths, _) => Capability::yes(DIRECT_PATH, paths.join(", ")),
    };
    let mode = match (properties.has_direct_path(), properties.compatibility_allowed) {
        (true, true) => Capability::yes(MODE, "direct, with cuFile's own threads where a file is on no direct path"),
        (true, false) => Capability::yes(MODE, "direct only"),
        (false, true) => Capability::yes(MODE, "compatibility: cuFile's own threads, through host memory"),
        (false, false) => Capability::no(
            MODE,
            "there is no direct path, and compatibility mode is forbidden",
            "allow it: properties.allow_compat_mode in cufile.json, CUFILE_ALLOW_COMPAT_MODE=true",
        ),
    };
    (vec![library, mode, direct], true)
}

/// The links and the nodes of NVIDIA's devices in sysfs.
fn bus(system: &System) -> Vec<Capability> {
    const DEVICES: &str = "/sys/bus/pci/devices";
    let is_gpu = |address: &String| {
        let read = |name| system.text(&format!("{DEVICES}/{address}/{name}")).unwrap_or_default();
        read("vendor") == VENDOR && CLASSES.iter().any(|class| read("class").starts_with(class))
    };
    let gpus: Vec<String> = system.names(DEVICES).into_iter().filter(is_gpu).collect();
    let Some(first) = gpus.first() else {
        let why = "sysfs shows no NVIDIA GPU on the PCI bus";
        return vec![Capability::unknown(LINK, why), Capability::unknown(NUMA, why)];
    };
    vec![link(system, &format!("{DEVICES}/{first}")), numa(system, &format!("{DEVICES}/{first}"))]
}

fn link(system: &System, device: &str) -> Capability {
    let read = |name: &str| system.text(&format!("{device}/{name}"));
    let (Some(speed_max), Some(width), Some(width_max)) =
        (read("max_link_speed"), read("current_link_width"), read("max_link_width"))
    else {
        return Capability::unknown(LINK, "sysfs does not tell it, as in most virtual machines");
    };
    let generation = generation(&speed_max).map_or(speed_max.clone(), |generation| format!("PCIe {generation}"));
    let reason = format!("{generation} x{width}, of x{width_max} that the GPU has");
    match (width.parse::<u32>(), width_max.parse::<u32>()) {
        (Ok(0), _) | (Err(_), _) | (_, Err(_)) => Capability::unknown(LINK, "sysfs does not tell its width"),
        (Ok(width), Ok(most)) if width < most => Capability::no(
            LINK,
            reason,
            "transfers are slower in proportion: see that the GPU sits in a slot with all lanes (lspci -vv, LnkSta)",
        ),
        // Its speed now says nothing: an idle GPU slows its link down.
        _ => Capability::yes(LINK, reason),
    }
}

/// The generation that a link of this speed is of.
fn generation(speed: &str) -> Option<&'static str> {
    let speeds = [("2.5", "1"), ("5.0", "2"), ("8.0", "3"), ("16.0", "4"), ("32.0", "5"), ("64.0", "6")];
    let number = speed.split_whitespace().next()?;
    speeds.iter().find(|(known, _)| *known == number).map(|&(_, generation)| generation)
}

fn numa(system: &System, device: &str) -> Capability {
    let nodes = system.names("/sys/devices/system/node");
    let is_node = |name: &&String| {
        name.strip_prefix("node")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let count = nodes.iter().filter(is_node).count();
    match system.text(&format!("{device}/numa_node")).and_then(|node| node.parse::<i32>().ok()) {
        _ if count <= 1 => Capability::yes(NUMA, "the machine has one node"),
        Some(node @ 0..) => {
            Capability::yes(NUMA, format!("the GPU is on node {node} of {count}; work is fastest there"))
        }
        _ => Capability::unknown(NUMA, format!("the machine has {count} nodes, and does not say which is the GPU's")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = folder.path().to_path_buf();
        (folder, System { root })
    }

    #[test]
    fn the_link_and_the_node_of_the_gpu_are_read_from_sysfs() {
        let gpu = "sys/bus/pci/devices/0000:18:00.0";
        let at = |name: &str| format!("{gpu}/{name}");
        let (vendor, class) = (at("vendor"), at("class"));
        let (speed, width, width_max, node) =
            (at("max_link_speed"), at("current_link_width"), at("max_link_width"), at("numa_node"));
        let mut files = vec![
            ("sys/bus/pci/devices/0000:00:01.0/vendor", "0x8086\n"),
            (&vendor, "0x10de\n"),
            (&class, "0x030200\n"),
            (&speed, "32.0 GT/s PCIe\n"),
            (&width, "16\n"),
            (&width_max, "16\n"),
            (&node, "1\n"),
            ("sys/devices/system/node/node0/x", ""),
            ("sys/devices/system/node/node1/x", ""),
            ("sys/devices/system/node/online", "0-1\n"),
        ];
        let rows = bus(&machine(&files).1);
        assert_eq!(rows[0], Capability::yes(LINK, "PCIe 5 x16, of x16 that the GPU has"));
        assert_eq!(rows[1].reason, "the GPU is on node 1 of 2; work is fastest there");
        files[4].1 = "8\n";
        let narrow = &bus(&machine(&files).1)[0];
        assert!(narrow.answer == Answer::No && narrow.remedy.is_some() && narrow.reason.contains("x8"), "{narrow:?}");
        files.truncate(3);
        let rows = bus(&machine(&files).1);
        assert_eq!((rows[0].answer, rows[1].answer), (Answer::Unknown, Answer::Yes), "{rows:?}");
        assert!(bus(&machine(&[]).1).iter().all(|row| row.answer == Answer::Unknown));
    }
}
