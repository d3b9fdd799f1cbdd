//! What states cost: `cargo test --release --lib cost -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

/// A disk of about a mebibyte: sixteen commits of 64 KiB, each a write of its payload, one of its frame, and a sync.
fn store_like(sim: &SimStorage, last_is_synced: bool) {
    sim.create_dir(&path("store")).unwrap();
    sim.sync_dir(Path::new("/")).unwrap();
    let segment = create(sim, "store/1.seg", &[1; 4096]);
    segment.allocate(0, 4 << 20).unwrap();
    segment.sync().unwrap();
    sim.sync_dir(&path("store")).unwrap();
    for commit in 0..16u64 {
        let payload: Vec<u8> = (0..61_440u64).map(|i| (i * (commit + 3) % 251) as u8).collect();
        let at = 4096 + commit * 65_536;
        write(&*segment, &payload, at + 4096);
        write(&*segment, &payload[..4096], at);
        if commit < 15 || last_is_synced {
            segment.sync().unwrap();
        }
        sim.marker(commit);
    }
}

#[test]
#[ignore = "a measurement, not a test"]
fn cost_of_a_state() {
    let sim = SimStorage::new();
    store_like(&sim, false);
    let trace = sim.trace();
    let started = Instant::now();
    for _ in 0..100 {
        std::hint::black_box(trace.walk_to(trace.len()));
    }
    println!("walking {} events: {:.1} µs", trace.len(), started.elapsed().as_secs_f64() * 1e4);

    let walker = trace.walk_to(trace.len());
    let torn = |keep| Choice::Torn { op: 0, unit: Unit::Sector, keep, others: Others::Kept };
    let choices = [
        ("none", Choice::None),
        ("all", Choice::All),
        ("one of two kept", Choice::OnlyOne(0)),
        ("torn, a prefix", torn(Keep::Prefix(60))),
        ("torn, every other sector", torn(Keep::Even)),
        ("noise", torn(Keep::Noise(1))),
        ("random", Choice::Random(5)),
    ];
    for (name, choice) in choices {
        const TIMES: u32 = 2000;
        let started = Instant::now();
        for _ in 0..TIMES {
            std::hint::black_box(walker.materialize(&choice));
        }
        let each = started.elapsed() / TIMES;
        let state = walker.materialize(&choice);
        let started = Instant::now();
        for _ in 0..TIMES {
            std::hint::black_box(state.fingerprint());
        }
        println!("{name:<26} {each:>10.2?} to make, {:>8.2?} to fingerprint", started.elapsed() / TIMES);
    }
    let state = walker.materialize(&Choice::All);
    let started = Instant::now();
    for _ in 0..200 {
        std::hint::black_box(state.read_file("/store/1.seg"));
    }
    println!("reading all 4 MiB: {:.2?}", started.elapsed() / 200);

    let (mut states, started) = (0u32, Instant::now());
    let mut walker = trace.walk();
    while walker.next_cut() {
        for choice in walker.choices().into_iter().chain((0..20).map(Choice::Random)) {
            std::hint::black_box(walker.materialize(&choice).fingerprint());
            states += 1;
        }
    }
    println!(
        "every state of the trace: {states} in {:.2?}, {:.2?} each",
        started.elapsed(),
        started.elapsed() / states
    );
    let started = Instant::now();
    for _ in 0..20 {
        store_like(&SimStorage::new(), true);
    }
    println!("making the disk: {:.2?}", started.elapsed() / 20);
}
