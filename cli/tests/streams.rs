//! Pipes that break, signals that come, and memory that stays bounded.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Run, alight, arg, command, made, noise, peak_resident, write_safetensors};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// What any command may have resident, whatever it works on.
const RESIDENT_BYTES_MAX: u64 = 256 * MIB;

#[test]
fn a_reader_that_goes_away_is_met_with_silence() {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = (folder.path().join("s"), folder.path().join("f.safetensors"));
    let many: Vec<_> = (0..20_000).map(|n| made(&format!("{n:08}{}", "k".repeat(100)), "U8", &[0], vec![])).collect();
    write_safetensors(&file, &many, None);
    alight(["import", arg(&store), arg(&file)]).ok();
    let big = folder.path().join("big");
    fs::write(&big, noise(1, 4 << 20)).unwrap();
    alight(["put", arg(&store), "big", arg(&big)]).ok();
    for args in [
        &["ls", arg(&store)][..],
        &["ls", "-l", arg(&store)],
        &["ls", "--json", arg(&store)],
        &["get", arg(&store), "big"],
    ] {
        let mut child = command(args).spawn().unwrap();
        let mut stdout = BufReader::with_capacity(16, child.stdout.take().unwrap());
        stdout.read_until(b'\n', &mut Vec::new()).unwrap();
        drop(stdout);
        let run = Run::from(child.wait_with_output().unwrap()).ok();
        assert_eq!(run.stderr, "", "{args:?}");
    }
    let mut child = command(["--help"]).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(Run::from(child.wait_with_output().unwrap()).ok().stderr, "");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["demo", "--size", "2GiB", "--device", "host", "--path", arg(folder.path())];
    let mut child = command(args).spawn().unwrap();
    let began = Instant::now();
    // The store is there once its first segment is.
    while fs::read_dir(folder.path()).unwrap().count() == 0 && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60), "the demo never begins");
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let run = Run::from(child.wait_with_output().unwrap());
    if run.code != 1 || !run.stderr.contains("free") {
        run.fails(130, &["interrupted"]);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_demo_shows_the_whole_way_and_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let demo = ["demo", "--size", "24MiB", "--device", "host", "--path", arg(folder.path())];
    let text = alight(demo).ok().text();
    assert!(text.contains("every byte that was got is the byte that was put"), "{text}");
    assert!(text.contains("faster here: ") && text.contains("GB/s"), "{text}");
    let report = alight(demo.into_iter().chain(["--json"])).ok().json();
    assert_eq!(report["equal"], true);
    assert!(report["bytes"].as_u64().unwrap().abs_diff(24 * MIB) < MIB);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    let kept = alight(demo.into_iter().chain(["--json", "--keep"])).ok().json();
    let store = kept["kept"].as_str().unwrap();
    assert_eq!(alight(["stat", "--json", store]).ok().json()["keys"], kept["tensors"]);
    alight(["verify", store]).ok();

    alight(["demo", "--path", arg(&folder.path().join("none"))]).fails(1, &["none", "check the path"]);
    alight(["demo", "--size", "900TiB", "--path", arg(folder.path())]).fails(1, &["free", "--size"]);
    alight(["demo", "--size", "0"]).exits(2);
}

#[test]
fn the_bench_measures_what_it_is_asked_for_and_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["bench", arg(folder.path()), "--quick", "--json"];
    let only = ["--only", "put-1m", "--only", "put-4k-16", "--only", "get-1m", "--only", "lookup"];
    let report = alight(args.into_iter().chain(only)).ok().json();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| &row["name"]).collect::<Vec<_>>(), ["put-1m", "put-4k-16", "get-1m", "lookup"]);
    for row in rows {
        assert!(row["alight"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["ratio"].is_null(), row["name"] == "lookup", "{row}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    alight(args.into_iter().chain(["--only", "put-1t"])).exits(2);
    alight(["bench", arg(&folder.path().join("none")), "--quick"]).fails(1, &["none", "check the path"]);
}

/// Writes a file of `count` tensors of `each` bytes, without holding it in memory.
fn write_large(path: &Path, count: u64, each: u64) {
    let header: serde_json::Map<_, _> = (0..count)
        .map(|n| {
            let entry = json!({ "dtype": "U8", "shape": [each], "data_offsets": [n * each, (n + 1) * each] });
            (format!("t{n:04}"), entry)
        })
        .collect();
    let header = serde_json::Value::Object(header).to_string();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let noise = noise(1, 1 << 20);
    for _ in 0..(count * each).div_ceil(MIB) {
        file.write_all(&noise).unwrap();
    }
    file.set_len(8 + header.len() as u64 + count * each).unwrap();
}

#[test]
fn memory_stays_bounded_whatever_the_size_of_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = (folder.path().join("s"), folder.path().join("large.safetensors"));
    let out = folder.path().join("out.safetensors");
    write_large(&file, 100, 6 * MIB);
    for args in [
        &["import", arg(&store), arg(&file)][..],
        &["load", arg(&store), "--device", "host"],
        &["verify", arg(&store)],
        &["export", arg(&store), arg(&out), "--device", "host"],
        &["export", arg(&store), arg(&out), "--force"],
    ] {
        let (run, peak) = peak_resident(command(args).spawn().unwrap());
        run.ok();
        assert!(peak > MIB, "nothing was measured of {args:?}");
        assert!(peak < RESIDENT_BYTES_MAX, "{args:?} had {} MiB resident", peak / MIB);
    }
    assert!(same_ends(&file, &out, 600 * MIB), "the same tensors in the same order make the same data");
}

/// Whether two files' last bytes are the same.
fn same_ends(a: &Path, b: &Path, len: u64) -> bool {
    let open = |path: &Path| {
        let mut file = fs::File::open(path).unwrap();
        file.seek(SeekFrom::End(-i64::try_from(len).unwrap())).unwrap();
        BufReader::with_capacity(1 << 20, file)
    };
    let (mut a, mut b) = (open(a), open(b));
    loop {
        let (left, right) = (a.fill_buf().unwrap(), b.fill_buf().unwrap());
        if left != right {
            return false;
        }
        let read = left.len();
        if read == 0 {
            return true;
        }
        a.consume(read);
        b.consume(read);
    }
}
