//! Import and export: what goes in comes out byte for byte, and what is not as it should be is refused whole.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use ::safetensors::SafeTensors;
use common::{Made, alight, alight_fed, arg, made, noise, write_raw, write_safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Tensors of every width, an empty one and a scalar among them.
fn tensors() -> Vec<Made> {
    vec![
        made("layers.0.w", "BF16", &[512, 3000], noise(1, 512 * 3000 * 2)),
        made("layers.0.b", "F32", &[7], noise(2, 28)),
        made("flags", "BOOL", &[3], vec![1, 0, 1]),
        made("ids", "I64", &[2, 2], noise(3, 32)),
        made("half", "F16", &[5], noise(4, 10)),
        made("eight", "F8_E4M3", &[3, 3], noise(5, 9)),
        made("wave", "C64", &[2], noise(6, 16)),
        made("scalar", "F64", &[], noise(7, 8)),
        made("nothing", "I32", &[0, 4], vec![]),
        made("sechs", "F6_E2M3", &[4], noise(8, 3)),
        made("vier \"\\ é\n", "F4", &[2, 3], noise(9, 3)),
    ]
}

fn folder_and_store() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = (folder.path().join("s.alight"), folder.path().join("model.safetensors"));
    (folder, store, file)
}

/// A tensor's name, dtype, shape and bytes.
type Found = (String, String, Vec<u64>, Vec<u8>);

/// A safetensors file as its own library reads it, names in order.
fn read_back(path: &Path) -> (Vec<Found>, Option<Value>) {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let properties = metadata.metadata().as_ref().map(|properties| json!(properties));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| {
            let shape = view.shape().iter().map(|&dim| dim as u64).collect();
            (name.to_owned(), view.dtype().to_string(), shape, view.data().to_vec())
        })
        .collect();
    tensors.sort();
    (tensors, properties)
}

fn expected(tensors: &[Made], prefix: &str) -> Vec<Found> {
    let mut tensors: Vec<_> = tensors
        .iter()
        .map(|t| (format!("{prefix}{}", t.name), t.dtype.to_owned(), t.shape.clone(), t.bytes.clone()))
        .collect();
    tensors.sort();
    tensors
}

#[test]
fn a_file_comes_back_byte_for_byte_with_its_properties() {
    let (folder, store, file) = folder_and_store();
    write_safetensors(&file, &tensors(), Some(json!({ "format": "pt", "note": "a \"b\" é" })));
    let report = alight(["import", "--json", arg(&store), arg(&file)]).ok().json();
    assert_eq!((report["tensors"].as_u64(), report["commits"].as_u64()), (Some(11), Some(1)));
    assert_eq!(report["created"], true);
    for tensor in tensors() {
        assert_eq!(alight(["get", arg(&store), &tensor.name]).ok().stdout, tensor.bytes, "{}", tensor.name);
    }
    for way in [&[][..], &["--device", "host"], &["--device", "host", "--window-bytes", "1KiB"]] {
        let out = folder.path().join("out.safetensors");
        let args = ["export", arg(&store), arg(&out), "--force"];
        alight(args.iter().chain(way)).ok();
        let (found, properties) = read_back(&out);
        assert_eq!(found, expected(&tensors(), ""));
        assert_eq!(properties, Some(json!({ "format": "pt", "note": "a \"b\" é" })));
        // Every tensor is aligned to its own width, and the data to eight bytes.
        let bytes = fs::read(&out).unwrap();
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "nothing else is left in the folder");
}

#[test]
fn a_prefix_goes_on_at_import_and_off_at_export() {
    let (folder, store, file) = folder_and_store();
    write_safetensors(&file, &tensors()[..3], Some(json!({ "step": "1" })));
    alight(["import", arg(&store), arg(&file), "--prefix", "step1/"]).ok();
    write_safetensors(&file, &tensors()[2..5], None);
    alight(["import", arg(&store), arg(&file), "--prefix", "step2/"]).ok();
    assert!(alight(["ls", arg(&store)]).ok().text().contains("step1/layers.0.w\nstep2/flags\n"));
    let out = folder.path().join("out.safetensors");
    alight(["export", arg(&store), arg(&out), "--prefix", "step1/"]).ok();
    assert_eq!(read_back(&out), (expected(&tensors()[..3], ""), Some(json!({ "step": "1" }))));
    alight(["export", arg(&store), arg(&out), "--prefix", "step2/", "--keep-prefix", "-f"]).ok();
    assert_eq!(read_back(&out), (expected(&tensors()[2..5], "step2/"), None));
    alight(["export", arg(&store), arg(&out), "--prefix", "step2/flags", "-f"]).fails(1, &["no name", "--keep-prefix"]);
    alight(["export", arg(&store), arg(&out), "--prefix", "step3/", "-f"]).fails(1, &["no key begins"]);
}

#[test]
fn a_model_in_parts_becomes_one_commit() {
    let (folder, store, _) = folder_and_store();
    let parts = [folder.path().join("1.safetensors"), folder.path().join("2.safetensors")];
    write_safetensors(&parts[0], &tensors()[..4], Some(json!({ "format": "pt" })));
    write_safetensors(&parts[1], &tensors()[4..], Some(json!({ "format": "pt" })));
    let report = alight(["import", "--json", arg(&store), arg(&parts[0]), arg(&parts[1])]).ok().json();
    assert_eq!((report["files"].as_u64(), report["commits"].as_u64()), (Some(2), Some(1)));
    assert_eq!(alight(["stat", "--json", arg(&store)]).ok().json()["last_commit"], 1);
    let out = folder.path().join("out.safetensors");
    alight(["export", arg(&store), arg(&out)]).ok();
    assert_eq!(read_back(&out).0, expected(&tensors(), ""));
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let (folder, store, file) = folder_and_store();
    let other = folder.path().join("other.safetensors");
    write_safetensors(&file, &tensors()[..3], Some(json!({ "format": "pt" })));
    write_safetensors(&other, &tensors()[2..4], None);
    alight(["import", arg(&store), arg(&file), arg(&other)])
        .fails(1, &["\"flags\"", "model.safetensors", "other.safetensors", "--prefix"]);
    write_safetensors(&other, &tensors()[3..4], Some(json!({ "format": "tf" })));
    alight(["import", arg(&store), arg(&file), arg(&other)]).fails(1, &["\"format\"", "disagree"]);
    assert!(!store.exists());
}

#[test]
fn an_import_can_be_split_into_commits() {
    let (_folder, store, file) = folder_and_store();
    let many: Vec<Made> = (0..10).map(|n| made(&format!("t{n}"), "U8", &[1000], noise(n + 1, 1000))).collect();
    write_safetensors(&file, &many, None);
    let commits = |size: &str| {
        let args = ["import", "--json", arg(&store), arg(&file), "--batch-bytes", size];
        alight(args).ok().json()["commits"].as_u64()
    };
    assert_eq!(commits("3000"), Some(4));
    assert_eq!(commits("1"), Some(10));
    assert_eq!(commits("1GiB"), Some(1));
    alight(["import", arg(&store), arg(&file), "--batch-bytes", "0"]).exits(2);
    alight(["import", arg(&store), arg(&file), "--batch-bytes", "many"]).exits(2);
}

#[test]
fn an_import_replaces_what_is_there() {
    let (_folder, store, file) = folder_and_store();
    for seed in [1, 2] {
        write_safetensors(&file, &[made("t", "U8", &[100], noise(seed, 100))], None);
        alight(["import", arg(&store), arg(&file)]).ok();
        assert_eq!(alight(["get", arg(&store), "t"]).ok().stdout, noise(seed, 100));
    }
}

#[test]
fn hostile_files_are_refused_by_name_and_leave_no_trace() {
    let (folder, store, file) = folder_and_store();
    let good = folder.path().join("good.safetensors");
    write_safetensors(&good, &tensors(), None);
    let entry = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = |entry: String| format!(r#"{{"t":{entry}}}"#);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let cases: Vec<(&str, String, usize, &str)> = vec![
        ("cut short", one(entry("F32", "[2]", 0, 8)), 7, "cut short"),
        ("something after", one(entry("F32", "[2]", 0, 8)), 9, "follow the last"),
        ("a hole", two(entry("U8", "[1]", 0, 1), entry("U8", "[1]", 2, 3)), 3, "hole"),
        ("a hole at first", one(entry("U8", "[1]", 1, 2)), 2, "hole"),
        ("an overlap", two(entry("U8", "[2]", 0, 2), entry("U8", "[2]", 1, 3)), 3, "overlaps"),
        ("shape and bytes", one(entry("F32", "[3]", 0, 8)), 8, "12 bytes, not 8"),
        ("a huge shape", one(entry("U8", "[18446744073709551615,18446744073709551615]", 0, 8)), 8, "no number"),
        ("a huge offset", one(entry("U8", "[18446744073709551615]", 0, u64::MAX)), 8, "cut short"),
        ("backwards", one(entry("U8", "[8]", 8, 0)), 8, "ends before it begins"),
        ("a dtype of no one's", one(entry("F33", "[2]", 0, 8)), 8, "F33"),
        ("a name twice", format!(r#"{{"t":{0},"t":{0}}}"#, entry("U8", "[8]", 0, 8)), 8, "twice"),
        ("no name", format!(r#"{{"":{}}}"#, entry("U8", "[8]", 0, 8)), 8, "1 to 1024"),
        ("a long name", format!(r#"{{"{}":{}}}"#, "n".repeat(1025), entry("U8", "[8]", 0, 8)), 8, "1 to 1024"),
        ("no object", "[1,2,3]".into(), 0, "not a safetensors file"),
        ("no JSON", "{\"t\":".into(), 0, "not a safetensors file"),
        ("deep JSON", format!("{{\"t\":{}", "[".repeat(100_000)), 0, "not a safetensors file"),
        ("a field missing", "{\"t\":{\"dtype\":\"U8\"}}".into(), 0, "missing field"),
    ];
    for (case, header, data_bytes, said) in cases {
        write_raw(&file, &header, &noise(1, data_bytes));
        let run = alight(["import", arg(&store), arg(&good), arg(&file)]);
        run.fails(1, &["model.safetensors", said]);
        assert!(!store.exists(), "{case}");
    }
    let bytes = fs::read(&good).unwrap();
    for (case, content) in [
        ("nothing", &b""[..]),
        ("seven bytes", &bytes[..7]),
        ("a length alone", &bytes[..8]),
        ("half a header", &bytes[..100]),
        ("a cut end", &bytes[..bytes.len() - 1]),
        ("text", b"#!/bin/sh\necho hello, this is no model at all\n"),
        ("a zip file", b"PK\x03\x04\0\0\0\0\0\0\0\0archive/data.pkl"),
        ("a header of 100 MB", &100_000_001u64.to_le_bytes()),
        ("a header of no end", &u64::MAX.to_le_bytes()),
        ("no header", &0u64.to_le_bytes()),
    ] {
        fs::write(&file, content).unwrap();
        alight(["import", arg(&store), arg(&file)]).fails(1, &["model.safetensors"]);
        let error = alight(["import", "--json", arg(&store), arg(&file)]).exits(1).json();
        assert!(error["error"]["remedy"].is_string(), "{case}: {error}");
        assert!(!store.exists(), "{case}");
    }
    alight(["import", arg(&store), arg(folder.path())]).fails(1, &["not a regular file"]);
    alight(["import", arg(&store), "/dev/zero"]).fails(1, &["not a regular file"]);
    alight(["import", arg(&store), arg(&folder.path().join("none"))]).fails(1, &["none", "check the path"]);
    alight(["import", arg(&store)]).exits(2);
}

#[test]
fn a_dtype_that_safetensors_lacks_is_not_exported() {
    let (folder, store, _) = folder_and_store();
    alight_fed(["put", arg(&store), "t", "-", "--dtype", "C128"], &noise(1, 32)).ok();
    let out = folder.path().join("out.safetensors");
    alight(["export", arg(&store), arg(&out)]).fails(1, &["C128", "\"t\"", "alight get"]);
    alight_fed(["put", arg(&store), "u.__metadata__", "-"], b"{}").ok();
    alight(["export", arg(&store), arg(&out), "--prefix", "u."]).fails(1, &["__metadata__", "--prefix"]);
    assert!(!out.exists());
}

#[test]
fn an_empty_store_and_an_empty_file_are_fine() {
    let (folder, store, file) = folder_and_store();
    write_safetensors(&file, &[], None);
    alight(["import", arg(&store), arg(&file)]).ok();
    let out = folder.path().join("out.safetensors");
    alight(["export", arg(&store), arg(&out)]).ok();
    assert_eq!(read_back(&out), (vec![], None));
    alight(["load", arg(&store), "--device", "host"]).ok();
    alight(["verify", arg(&store)]).ok();
    alight(["stat", arg(&store)]).ok();
}
