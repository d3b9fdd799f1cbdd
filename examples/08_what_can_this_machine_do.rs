//! Ask what this machine can do for alight: the verdict first, then every fact with its reason, and what to do about it.

use std::path::Path;

use alight::{Answer, Capabilities, Device, RouteChoice, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.alight");
    let store = Store::create(&path)?;
    store.put("weights", &vec![7; 12 << 20])?;
    store.close()?;

    // Of the file system that holds a store, or any path that is to become one. It opens the GPU's driver, and changes nothing.
    let capabilities = Capabilities::probe(Some(&path));
    println!("{}\n", capabilities.verdict());
    for row in capabilities.rows() {
        println!("{:22} {:8} {}", row.name, row.answer, row.reason);
        if let Some(remedy) = &row.remedy {
            println!("{:22} {:8} -> {remedy}", "", "");
        }
    }

    // The facts are values: a program can decide by them, as the store does for every read.
    let slow = capabilities.rows().iter().filter(|row| row.answer == Answer::No).count();
    println!("\n{slow} of {} could be better", capabilities.rows().len());
    loaded(&path, RouteChoice::Auto)?;
    loaded(&path, RouteChoice::CuFile)
}

/// Loads everything by a route, and says which one it took, and why.
fn loaded(path: &Path, route: RouteChoice) -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::options().read_only(true).route(route).open(path)?;
    let weights = store.get("weights", &Device::best())?;
    assert_eq!(weights.len_bytes(), 12 << 20);
    let metrics = store.metrics();
    if let Some(read) = metrics.last_read {
        println!("asked for {route:?}, came by {read} ({} steps down)", metrics.step_downs);
    }
    Ok(())
}
