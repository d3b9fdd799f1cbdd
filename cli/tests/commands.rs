//! Every command by hand: what it prints, what it returns, and what it says when it cannot.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{alight, alight_fed, arg, flip_a_bit, noise};
use tempfile::TempDir;

/// A folder with a store of three values in it, and their bytes.
fn a_store() -> (TempDir, PathBuf, [(&'static str, Vec<u8>); 3]) {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("s.alight");
    let values = [("layers.0.b", noise(1, 10)), ("layers.0.w", noise(2, 100_000)), ("layers.1.w", noise(3, 3 << 20))];
    for (key, bytes) in &values {
        let file = folder.path().join("value");
        fs::write(&file, bytes).unwrap();
        alight(["put", arg(&store), key, arg(&file)]).ok();
    }
    (folder, store, values)
}

#[test]
fn what_is_put_is_got_by_file_and_by_pipe() {
    let (folder, store, values) = a_store();
    for (key, bytes) in &values {
        assert_eq!(&alight(["get", arg(&store), key]).ok().stdout, bytes);
        let out = folder.path().join(key);
        let said = alight(["get", arg(&store), key, "-o", arg(&out)]).ok().text();
        assert!(said.contains(key) && said.contains("U8"), "{said}");
        assert_eq!(&fs::read(&out).unwrap(), bytes);
    }
    let bytes = noise(9, 3_000_000);
    alight_fed(["put", arg(&store), "piped", "-"], &bytes).ok();
    assert_eq!(alight(["get", arg(&store), "piped"]).ok().stdout, bytes);
    alight_fed(["put", arg(&store), "empty", "-"], b"").ok();
    assert_eq!(alight(["get", arg(&store), "empty"]).ok().stdout, b"");
}

#[test]
fn a_value_can_have_a_dtype_and_a_shape() {
    let (folder, store, _) = a_store();
    let file = folder.path().join("value");
    fs::write(&file, noise(4, 24)).unwrap();
    let put = ["put", arg(&store), "t", arg(&file)];
    let shape_of = |key: &str| alight(["ls", "--json", arg(&store), key]).ok().json()["entries"][0].clone();
    alight(put.into_iter().chain(["--dtype", "bf16", "--shape", "3,4"])).ok();
    assert_eq!(shape_of("t")["shape"], serde_json::json!([3, 4]));
    assert_eq!(shape_of("t")["dtype"], "BF16");
    alight(put.into_iter().chain(["--dtype", "F32"])).ok();
    assert_eq!(shape_of("t")["shape"], serde_json::json!([6]));
    alight(put.into_iter().chain(["--dtype", "F32", "--shape", "7"])).fails(1, &["24", "--shape", "Nothing was put"]);
    alight(put.into_iter().chain(["--dtype", "C128"])).fails(1, &["no whole number"]);
    alight(put.into_iter().chain(["--dtype", "F33"])).fails(2, &["BF16"]);
    alight(put.into_iter().chain(["--shape", "-1"])).exits(2);
    assert_eq!(shape_of("t")["shape"], serde_json::json!([6]), "what failed changed nothing");
}

#[test]
fn a_list_is_in_order_and_by_prefix() {
    let (_folder, store, _) = a_store();
    assert_eq!(alight(["ls", arg(&store)]).ok().text(), "layers.0.b\nlayers.0.w\nlayers.1.w\n");
    assert_eq!(alight(["ls", arg(&store), "layers.0."]).ok().text(), "layers.0.b\nlayers.0.w\n");
    assert_eq!(alight(["ls", arg(&store), "none"]).ok().text(), "");
    let long = alight(["ls", "-l", arg(&store), "layers.1"]).ok().text();
    assert!(long.contains("3.00 MiB") && long.contains("U8") && long.contains("[3145728]"), "{long}");
    let listed = alight(["ls", "--json", arg(&store)]).ok().json();
    assert_eq!(listed["entries"].as_array().map(Vec::len), Some(3));
    assert_eq!(listed["entries"][0]["key"], "layers.0.b");
    assert_eq!(alight(["ls", "--json", arg(&store), "none"]).ok().json()["entries"], serde_json::json!([]));
}

#[test]
fn keys_that_are_not_text_survive_the_command_line() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let (_folder, store, _) = a_store();
    let key = OsStr::from_bytes(b"\xffraw\n");
    let args = [OsStr::new("put"), store.as_os_str(), key, OsStr::new("-")];
    alight_fed(args, b"value").ok();
    let listed = alight(["ls", arg(&store)]).ok().text();
    assert!(listed.ends_with("\"\\xffraw\\n\"\n"), "{listed}");
    let entries = alight(["ls", "--json", arg(&store)]).ok().json();
    assert_eq!(entries["entries"][3]["key_hex"], "ff7261770a");
    assert_eq!(alight([OsStr::new("get"), store.as_os_str(), key]).ok().stdout, b"value");
    let out = store.with_extension("safetensors");
    alight(["export", arg(&store), arg(&out)]).fails(1, &["\\xffraw", "not UTF-8", "--prefix"]);
    assert!(!out.exists());
    alight([OsStr::new("rm"), store.as_os_str(), key]).ok();
}

#[test]
fn deleting_is_all_or_nothing_and_says_how_much() {
    let (_folder, store, _) = a_store();
    alight(["rm", arg(&store), "layers.0.b", "none"]).fails(1, &["none", "Nothing was deleted"]);
    assert_eq!(alight(["ls", arg(&store)]).ok().text().lines().count(), 3);
    let removed = alight(["rm", "--json", arg(&store), "layers.0.b", "layers.0.b"]).ok().json();
    assert_eq!((removed["deleted"].as_u64(), removed["bytes"].as_u64()), (Some(1), Some(10)));
    assert!(alight(["rm", arg(&store), "--prefix", "layers."]).ok().text().contains("deleted 2 keys"));
    alight(["rm", arg(&store), "--prefix", "layers."]).fails(1, &["no key begins"]);
    alight(["rm", arg(&store), "--prefix", ""]).fails(2, &["every key"]);
    alight(["rm", arg(&store)]).exits(2);
    alight(["rm", arg(&store), "a", "--prefix", "b"]).exits(2);
    assert_eq!(alight(["ls", arg(&store)]).ok().text(), "");
}

#[test]
fn the_size_of_a_store_is_told() {
    let (_folder, store, values) = a_store();
    let bytes: usize = values.iter().map(|(_, bytes)| bytes.len()).sum();
    let stat = alight(["stat", "--json", arg(&store)]).ok().json();
    assert_eq!(stat["keys"], 3);
    assert_eq!(stat["live_bytes"].as_u64(), Some(bytes as u64));
    assert!(stat["disk_bytes"].as_u64() >= Some(bytes as u64));
    let metrics = alight(["stat", "--metrics", arg(&store)]).ok().text();
    assert!(metrics.lines().any(|line| line == format!("alight_store_live_bytes {bytes}")), "{metrics}");
    assert!(metrics.contains("# TYPE alight_store_gets_total counter"), "{metrics}");
    let text = alight(["stat", arg(&store)]).ok().text();
    assert!(text.contains("segments") && text.contains("store id"), "{text}");
    let line =
        |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().split_whitespace().last().unwrap();
    assert_eq!((line("format version"), line("feature flags")), ("1", "none"));
}

#[test]
fn compaction_gives_back_what_was_deleted_and_keeps_the_rest() {
    let (folder, store, _) = a_store();
    let large = folder.path().join("large");
    std::fs::write(&large, vec![7; 3 << 20]).unwrap();
    for key in ["dies", "lives", "dies"] {
        alight(["put", arg(&store), key, arg(&large)]).ok();
    }
    alight(["rm", arg(&store), "dies"]).ok();
    let before = alight(["stat", "--json", arg(&store)]).ok().json();
    let live = before["live_bytes"].as_u64().unwrap();
    assert!(
        before["disk_bytes"].as_u64() > Some(live + (6 << 20)) && before["dead_bytes"].as_u64() >= Some(6 << 20),
        "{before}"
    );
    let compacted = alight(["compact", "--json", arg(&store), "--rate", "1GiB"]).ok().json();
    assert!(compacted["disk_bytes"].as_u64() < Some(live + (1 << 20)), "{compacted}");
    assert!(compacted["not_given_back"].is_null() && compacted["pinned_bytes"] == 0, "{compacted}");
    assert_eq!(alight(["get", arg(&store), "lives"]).ok().stdout, vec![7; 3 << 20]);
    assert!(alight(["verify", arg(&store)]).ok().text().contains("sound"));
    assert!(alight(["compact", arg(&store)]).ok().text().contains("on the disk"));
    alight(["compact", arg(&store), "--rate", "0"]).exits(2);
}

#[test]
fn everything_is_loaded_in_windows_and_every_time_is_told() {
    let (_folder, store, values) = a_store();
    let bytes: usize = values.iter().map(|(_, bytes)| bytes.len()).sum();
    let loaded = alight(["load", "--json", arg(&store), "--device", "host", "--repeat", "3"]).ok().json();
    assert_eq!((loaded["tensors"].as_u64(), loaded["bytes"].as_u64()), (Some(3), Some(bytes as u64)));
    assert_eq!((loaded["runs"].as_array().map(Vec::len), loaded["device"].as_str()), (Some(3), Some("host")));
    assert_eq!(loaded["runs"][0]["windows"], 1);
    let small = alight(["load", "--json", arg(&store), "--device", "host", "--window-bytes", "4KiB"]).ok().json();
    assert_eq!(small["runs"][0]["windows"], 3);
    let part = alight(["load", arg(&store), "--device", "host", "--prefix", "layers.0."]).ok().text();
    assert!(part.starts_with("2 tensors"), "{part}");
    alight(["load", arg(&store), "--device", "host", "--prefix", "none"]).fails(1, &["no key begins"]);
    alight(["load", arg(&store), "--device", "tpu"]).fails(2, &["auto, host, cuda or cuda:N"]);
    alight(["load", arg(&store), "--repeat", "0"]).exits(2);
    alight(["load", arg(&store), "--window-bytes", "0"]).exits(2);
    alight(["load", arg(&store), "--device", "cuda:4000000"]).fails(1, &["cuda", "host"]);
}

#[test]
fn a_flipped_bit_is_named_and_the_rest_is_served() {
    let (_folder, store, values) = a_store();
    let sound = alight(["verify", "--json", arg(&store)]).ok().json();
    assert_eq!((sound["sound"].as_bool(), sound["keys"].as_u64()), (Some(true), Some(3)));
    let path = flip_a_bit(&store, &values[1].1[50_000..50_100]);

    let run = alight(["verify", arg(&store)]).exits(1);
    assert!(run.text().contains("\"layers.0.w\"") && run.text().contains(arg(&path)), "{run:?}");
    assert!(!run.text().contains("layers.1.w") && run.stderr.is_empty(), "{run:?}");
    let report = alight(["verify", "--json", arg(&store)]).exits(1).json();
    assert_eq!(report["sound"], false);
    assert_eq!(report["damages"][0]["key"], "layers.0.w");
    assert_eq!(report["damages"][0]["path"], arg(&path));

    alight(["get", arg(&store), "layers.0.w"]).fails(1, &["damaged", "layers.0.w", "alight verify"]);
    alight(["load", arg(&store), "--device", "host"]).fails(1, &["damaged", "layers.0.w"]);
    let out = store.with_extension("out");
    alight(["get", arg(&store), "layers.0.w", "-o", arg(&out)]).fails(1, &["damaged"]);
    alight(["export", arg(&store), arg(&out)]).fails(1, &["damaged", "layers.0.w"]);
    let error = alight(["export", "--json", arg(&store), arg(&out)]).exits(1).json();
    assert_eq!(error["error"]["kind"], "damaged");
    assert_eq!(fs::read_dir(store.parent().unwrap()).unwrap().count(), 2, "no half-written file is left");
    assert_eq!(alight(["get", arg(&store), "layers.1.w"]).ok().stdout, values[2].1);
}

#[test]
fn a_store_that_cannot_be_opened_for_damage_is_reported_as_damaged() {
    let (_folder, store, _) = a_store();
    let manifest = store.join("MANIFEST");
    let mut bytes = fs::read(&manifest).unwrap();
    bytes[70] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    let run = alight(["verify", arg(&store)]).exits(1);
    assert!(run.text().contains("MANIFEST"), "{run:?}");
    assert_eq!(alight(["verify", "--json", arg(&store)]).exits(1).json()["sound"], false);
    alight(["ls", arg(&store)]).fails(1, &["damaged", "MANIFEST"]);
}

#[test]
fn paths_that_are_no_store_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent");
    for command in ["ls", "stat", "verify", "load"] {
        alight([command, arg(&absent)]).fails(1, &["absent", "alight import"]);
        alight([command, "/dev/null"]).fails(1, &["/dev/null"]);
    }
    alight(["get", arg(&absent), "k"]).fails(1, &["absent"]);
    alight(["rm", arg(&absent), "k"]).fails(1, &["absent"]);
    alight(["export", arg(&absent), arg(&folder.path().join("out"))]).fails(1, &["absent"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), "mine").unwrap();
    let error = alight_fed(["put", "--json", arg(&foreign), "k", "-"], b"v").exits(1).json();
    assert_eq!(error["error"]["kind"], "not_a_store");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "a folder of somebody else's is not taken over");
}

#[test]
fn a_store_that_is_being_written_can_be_read_and_not_written() {
    let (_folder, store, values) = a_store();
    let writer = alight::Store::open(&store).unwrap();
    alight_fed(["put", arg(&store), "k", "-"], b"v").fails(1, &["is open for writing by", "read-only"]);
    alight(["rm", arg(&store), "layers.0.b"]).fails(1, &["is open for writing"]);
    assert_eq!(alight(["get", arg(&store), "layers.0.w"]).ok().stdout, values[1].1);
    assert_eq!(alight(["ls", arg(&store)]).ok().text().lines().count(), 3);
    alight(["verify", arg(&store)]).ok();
    writer.close().unwrap();
    alight(["rm", arg(&store), "layers.0.b"]).ok();
}

#[test]
fn keys_and_files_that_cannot_be_are_refused_before_a_store_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("s");
    let long = "k".repeat(1025);
    alight_fed(["put", arg(&store), &long, "-"], b"").fails(1, &["1 to 1024 bytes"]);
    alight_fed(["put", arg(&store), "", "-"], b"").fails(1, &["1 to 1024 bytes"]);
    alight(["put", arg(&store), "k", arg(&folder.path().join("none"))]).fails(1, &["none", "check the path"]);
    alight(["put", arg(&store), "k", arg(folder.path())]).fails(1, &["is a directory"]);
    assert!(!store.exists());
}

#[test]
fn an_existing_file_is_replaced_only_when_asked() {
    let (folder, store, values) = a_store();
    let out = folder.path().join("out");
    fs::write(&out, "precious").unwrap();
    alight(["get", arg(&store), "layers.0.b", "-o", arg(&out)]).fails(1, &["already exists", "--force"]);
    alight(["export", arg(&store), arg(&out)]).fails(1, &["already exists", "--force"]);
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    alight(["get", arg(&store), "layers.0.b", "-o", arg(&out), "--force"]).ok();
    assert_eq!(fs::read(&out).unwrap(), values[0].1);
    alight(["get", arg(&store), "layers.0.b", "-o", arg(folder.path())]).fails(1, &["is a directory"]);
    alight(["get", arg(&store), "layers.0.b", "-o", "/dev/null"]).ok();
    alight(["get", arg(&store), "none", "-o", arg(&folder.path().join("new"))]).fails(1, &["no value"]);
    assert!(!folder.path().join("new").exists());
}

#[test]
fn usage_errors_exit_with_two_and_speak_json_when_asked() {
    alight(["ls"]).fails(2, &["STORE"]);
    alight(["frobnicate"]).fails(2, &["frobnicate"]);
    alight(["ls", "s", "--frobnicate"]).exits(2);
    alight::<&str>([]).exits(2);
    let error = alight(["--json", "ls"]).exits(2).json();
    assert_eq!(error["error"]["kind"], "usage");
    let error = alight(["get", "s", "k", "--json"]).exits(2).json();
    assert!(error["error"]["remedy"].as_str().unwrap().contains("-o"));
    assert!(alight(["--help"]).ok().text().contains("Exit codes"));
    assert!(alight(["--version"]).ok().text().starts_with("alight "));
    let commands = [
        "demo", "import", "export", "put", "get", "load", "ls", "rm", "stat", "compact", "verify", "backup", "repair",
        "bench", "doctor",
    ];
    for command in commands {
        assert!(alight([command, "--help"]).ok().text().contains("Usage:"), "{command}");
    }
}

#[test]
fn quiet_says_nothing_but_what_was_asked_for() {
    let (folder, store, values) = a_store();
    assert_eq!(alight_fed(["-q", "put", arg(&store), "k", "-"], b"v").ok().stdout, b"");
    assert_eq!(alight(["rm", "-q", arg(&store), "k"]).ok().stdout, b"");
    assert_eq!(alight(["verify", "-q", arg(&store)]).ok().stdout, b"");
    let out = folder.path().join("out");
    assert_eq!(alight(["export", "-q", arg(&store), arg(&out)]).ok().stdout, b"");
    assert_eq!(alight(["get", "-q", arg(&store), "layers.0.b"]).ok().stdout, values[0].1);
    assert_eq!(alight(["ls", "-q", arg(&store)]).ok().text().lines().count(), 3);
    assert_eq!(alight(["rm", "-q", "--json", arg(&store), "layers.0.b"]).ok().json()["deleted"], 1);
}

#[test]
fn a_backup_is_made_beside_a_writer_and_serves_what_was_there() {
    let (folder, store, values) = a_store();
    let backup = folder.path().join("backup");
    let writer = alight::Store::open(&store).unwrap();
    writer.put("while it is open", b"here").unwrap();
    let made = alight(["backup", "--json", arg(&store), arg(&backup)]).ok().json();
    assert_eq!((made["command"].as_str(), made["last_commit"].as_u64()), (Some("backup"), Some(4)));
    let bytes = |what: &str| made[what].as_u64().unwrap();
    assert!(bytes("linked_bytes") + bytes("shared_bytes") + bytes("copied_bytes") > 3 << 20, "{made}");
    writer.delete("layers.0.w").unwrap();
    writer.close().unwrap();
    alight(["verify", arg(&backup)]).ok();
    assert_eq!(alight(["get", arg(&backup), "layers.0.w"]).ok().stdout, values[1].1);
    assert_eq!(alight(["get", arg(&backup), "while it is open"]).ok().stdout, b"here");

    alight(["backup", arg(&store), arg(&backup)]).fails(1, &["already exists", "absent or empty"]);
    alight(["backup", arg(&store), arg(&store.join("inside"))]).fails(1, &["lies in the store itself"]);
    alight(["backup", arg(&folder.path().join("none")), arg(&backup)]).fails(1, &["none", "alight import"]);
    alight(["backup", arg(&store)]).exits(2);
    let said = alight(["backup", arg(&store), arg(&folder.path().join("second"))]).ok().text();
    assert!(said.contains("backed up to") && said.contains("as of commit 5"), "{said}");
    assert_eq!(alight(["backup", "-q", arg(&store), arg(&folder.path().join("third"))]).ok().stdout, b"");
}

#[test]
fn what_is_whole_of_a_damaged_store_is_salvaged_and_the_rest_is_named() {
    let (folder, store, values) = a_store();
    let (whole, rest) = (folder.path().join("whole"), folder.path().join("rest"));
    let complete = alight(["repair", "--json", arg(&store), arg(&whole)]).ok().json();
    assert_eq!((complete["complete"].as_bool(), complete["keys"].as_u64()), (Some(true), Some(3)));

    flip_a_bit(&store, &values[1].1[50_000..50_100]);
    let run = alight(["repair", arg(&store), arg(&rest)]).exits(1);
    assert!(run.text().contains("\"layers.0.w\"") && run.text().contains("1 key"), "{run:?}");
    assert!(run.stderr.is_empty(), "{run:?}");
    alight(["verify", arg(&rest)]).ok();
    assert_eq!(alight(["ls", arg(&rest)]).ok().text(), "layers.0.b\nlayers.1.w\n");
    assert_eq!(alight(["get", arg(&rest), "layers.1.w"]).ok().stdout, values[2].1);
    let json = folder.path().join("json");
    let report = alight(["repair", "--json", arg(&store), arg(&json)]).exits(1).json();
    assert_eq!((report["complete"].as_bool(), report["keys_lost"].as_u64()), (Some(false), Some(1)));
    assert_eq!(report["damages"][0]["key"], "layers.0.w");

    alight(["repair", arg(&store), arg(&rest)]).fails(1, &["already exists", "absent or empty"]);
    alight(["repair", arg(folder.path()), arg(&folder.path().join("x"))]).fails(1, &["not an alight store", "check"]);
    assert!(!folder.path().join("x").exists());
    alight(["repair", arg(&store)]).exits(2);
}

#[test]
fn an_index_and_a_manifest_that_are_lost_are_made_anew() {
    let (_folder, store, values) = a_store();
    let repair = ["verify", "--repair-index", arg(&store)];
    for run in fs::read_dir(store.join("index")).unwrap() {
        fs::write(run.unwrap().path(), "not what it was").unwrap();
    }
    alight(["ls", arg(&store)]).fails(1, &["damaged", "--repair-index"]);
    let said = alight(repair).ok().text();
    assert!(said.starts_with("made anew: the index, of 3 keys") && said.contains("sound:"), "{said}");
    assert_eq!(alight(["get", arg(&store), "layers.0.w"]).ok().stdout, values[1].1);
    fs::remove_file(store.join("MANIFEST")).unwrap();
    let made = alight(repair.into_iter().chain(["--json"])).ok().json();
    assert_eq!(
        (made["sound"].as_bool(), made["repaired_index"]["manifest_was_lost"].as_bool()),
        (Some(true), Some(true))
    );
    assert_eq!(alight(["get", arg(&store), "layers.1.w"]).ok().stdout, values[2].1);

    let writer = alight::Store::open(&store).unwrap();
    alight(repair).fails(1, &["is open for writing by"]);
    writer.close().unwrap();
    let segment = store.join("segments/00000001.seg");
    let mut bytes = fs::read(&segment).unwrap();
    bytes[4096 + 200] ^= 1;
    fs::write(&segment, bytes).unwrap();
    alight(repair).fails(1, &["damaged", "00000001.seg", "alight repair"]);
}
