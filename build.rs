//! Puts the kernels' PTX into the library, and refuses one that was not made from the source that stands beside it.

use std::path::Path;
use std::{env, fs};

const FOLDER: &str = "src/device/kernels";

fn main() {
    println!("cargo::rerun-if-changed={FOLDER}");
    let read = |name: &str| {
        let path = Path::new(FOLDER).join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let (source, ptx) = (read("kernels.cu"), read("kernels.ptx"));
    let wanted = format!("// source crc32 {:08x}", crc32fast::hash(source.as_bytes()));
    assert!(
        ptx.lines().next() == Some(&wanted),
        "{FOLDER}/kernels.ptx was not made from kernels.cu as it stands: run scripts/ptx.sh, which needs nvcc"
    );
    // The driver takes the text up to a zero.
    let out = env::var_os("OUT_DIR").expect("cargo says where to build");
    fs::write(Path::new(&out).join("kernels.ptx"), ptx + "\0").expect("the build folder can be written to");
}
