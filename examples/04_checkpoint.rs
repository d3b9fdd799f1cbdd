//! Save a training state again and again, each time all or nothing, and come back to the last one.

use std::collections::BTreeMap;

use alight::{Device, Dtype, Store, Tensor, TensorRef};

type State = BTreeMap<String, Vec<f32>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run.alight");
    let mut state = State::from([("w".into(), vec![0.0; 4096]), ("momentum".into(), vec![0.0; 4096])]);

    let store = Store::create(&path)?;
    for step in 1..=3 {
        train(&mut state);
        save(&store, step, &state)?;
    }
    // However the process ends, between two saves or in the middle of one: the last whole one is what is found.
    drop(store);

    let store = Store::open(&path)?;
    let (step, tensors) = load(&store, &Device::best())?.ok_or("there is no checkpoint yet")?;
    println!("back at step {step} with {} tensors on {}", tensors.len(), tensors["w"].device());
    assert_eq!(step, 3);
    assert_eq!(tensors["w"].to_host()?, to_bytes(&state["w"]));
    println!("keys: {:?}", store.scan("").map(|info| Ok(info?.key)).collect::<alight::Result<Vec<_>>>()?);
    Ok(())
}

fn train(state: &mut State) {
    for values in state.values_mut() {
        values.iter_mut().zip(0u8..=255).for_each(|(value, at)| *value += f32::from(at) + 1.0);
    }
}

/// Puts the state, says that it is the latest, and deletes the one before it: one commit.
fn save(store: &Store, step: u64, state: &State) -> Result<(), Box<dyn std::error::Error>> {
    let bytes: Vec<(&String, Vec<u8>)> = state.iter().map(|(name, values)| (name, to_bytes(values))).collect();
    let number = step.to_le_bytes();
    let mut batch = store.batch();
    for (name, bytes) in &bytes {
        let shape = [bytes.len() as u64 / 4];
        batch.put(format!("{step:08}/{name}"), TensorRef::new(Dtype::F32, &shape, bytes)?)?;
    }
    for old in store.scan(format!("{:08}/", step - 1)) {
        batch.delete(old?.key)?;
    }
    batch.put("latest", &number)?;
    batch.commit()?;
    println!("saved step {step}");
    Ok(())
}

/// A saved state: its step, and its tensors by name.
type Checkpoint = (u64, BTreeMap<String, Tensor>);

/// The latest state, all its tensors in one piece of device memory.
fn load(store: &Store, device: &Device) -> Result<Option<Checkpoint>, Box<dyn std::error::Error>> {
    // What another thread saves meanwhile is not mixed in.
    let snapshot = store.snapshot();
    if !snapshot.contains("latest")? {
        return Ok(None);
    }
    let number = snapshot.get("latest", &Device::host())?.to_host()?;
    let step = u64::from_le_bytes(number.as_slice().try_into()?);
    let prefix = format!("{step:08}/");
    let keys = snapshot.scan(&prefix).map(|info| Ok(info?.key)).collect::<alight::Result<Vec<_>>>()?;
    let tensors = snapshot.get_many(&keys, device)?;
    let name =
        |key: &alight::Key| key.as_str().and_then(|key| key.strip_prefix(&prefix)).unwrap_or_default().to_owned();
    Ok(Some((step, keys.iter().map(name).zip(tensors).collect())))
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
