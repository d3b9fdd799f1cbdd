//! Change several keys at once, all or nothing; and keep reading the store as it was.

use alight::{Device, Durability, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let store = Store::create(folder.path().join("model.alight"))?;
    let host = Device::host();

    // A batch borrows what is put into it. Nothing happens before `commit`, and dropping it changes nothing.
    let (old_w, old_b) = (vec![1; 1000], vec![1; 10]);
    let mut batch = store.batch();
    batch.put("w", &old_w)?;
    batch.put("b", &old_b)?;
    batch.commit()?; // both are there now, and survive a power cut; never one without the other

    // A snapshot costs next to nothing and never changes.
    let before = store.snapshot();

    let (new_w, moment) = (vec![2; 1000], b"step 2".to_vec());
    let mut batch = store.batch();
    batch.put_with_attributes("w", &new_w, vec![("when".to_string(), moment)])?;
    batch.delete("b")?;
    batch.commit()?;

    for (name, w, b) in [
        ("the snapshot", before.get("w", &host)?, before.contains("b")?),
        ("the store", store.get("w", &host)?, store.contains("b")?),
    ] {
        println!("{name}: w begins with {:?}, b is there: {b}", w.as_host().and_then(|bytes| bytes.first()));
    }
    println!("beside w: {:?}", store.attributes("w")?);

    // Where a lost second is no loss, a commit need not wait for the disk: it survives the end of the process at once,
    // and a power cut after the next sync.
    let mut batch = store.batch();
    batch.durability(Durability::Eventual);
    batch.put("scratch", b"soon on the disk")?;
    batch.commit()?;
    store.sync()?;
    println!("{} commits, {} syncs of segment files", store.metrics().commits, store.metrics().segment_syncs);
    Ok(())
}
