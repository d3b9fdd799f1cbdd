//! What the tool says of the machine that it runs on. Which machine that is, nobody knows here: the form is what is tested.

mod common;

use std::fs;

use common::{alight, alight_fed, arg};

/// What is asked of every machine, in this order.
const QUESTIONS: [&str; 14] = [
    "GPU",
    "libcufile",
    "cuFile mode",
    "cuFile direct path",
    "PCIe link",
    "NUMA node",
    "file system",
    "O_DIRECT",
    "mapping",
    "udev knows the disk",
    "io_uring",
    "cachestat",
    "locked memory",
    "huge pages",
];

#[test]
fn the_verdict_comes_first_and_every_no_has_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("s.alight");
    alight_fed(["put", arg(&store), "k", "-"], b"value").ok();
    let said = alight(["doctor", "--json", arg(&store)]).ok().json();
    assert_eq!(said["command"], "doctor");
    assert_eq!(said["store"], arg(&store));
    let rows = said["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["name"].as_str().unwrap()).collect::<Vec<_>>(), QUESTIONS);
    for row in rows {
        let answer = row["answer"].as_str().unwrap();
        assert!(["yes", "no", "unknown"].contains(&answer), "{row}");
        assert!(!row["reason"].as_str().unwrap().is_empty());
        assert_eq!(row["remedy"].is_string(), answer == "no", "{row}");
    }
    // A store has files to try things on.
    let of = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    assert_ne!(of("O_DIRECT")["answer"], "unknown");
    assert_ne!(of("mapping")["answer"], "unknown");
    let text = alight(["doctor", arg(&store)]).ok().text();
    let verdict = said["verdict"].as_str().unwrap();
    let first_words: Vec<&str> = verdict.split(' ').skip(1).take(3).collect();
    assert!(text.lines().next().unwrap().contains(&first_words.join(" ")), "{text}");
    for name in QUESTIONS {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} in {text}");
    }
    let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(longest <= 140, "{longest} characters: only a long word may stand over\n{text}");
}

#[test]
fn a_store_is_not_needed_and_none_is_made() {
    let text = alight(["doctor"]).ok().text();
    assert!(text.contains("alight doctor STORE"), "{text}");
    let said = alight(["doctor", "--json"]).ok().json();
    assert!(said["store"].is_null());
    assert_eq!(said["rows"][6]["answer"], "unknown");
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("not/there");
    let said = alight(["doctor", "--json", arg(&store)]).ok().json();
    assert_ne!(said["rows"][6]["answer"], "unknown", "its parent's file system is looked at: {said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");
}
