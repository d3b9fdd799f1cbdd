//! Operations of a store with faults and power cuts between them, from any bytes, judged by a model: the same that
//! `tests/ops` plays with random ones.
#![no_main]

#[path = "../../tests/ops/ask.rs"]
mod ask;
#[path = "../../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the tests play more than single scripts")]
#[path = "../../tests/ops/play.rs"]
mod play;
#[path = "../../tests/ops/script.rs"]
mod script;

use alight::storage::sim::Sabotage;
use libfuzzer_sys::fuzz_target;

/// A script allocates so much that the system's allocator would take a fifth of the time more.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fuzz_target!(|input: &[u8]| {
    let script = script::Script::decode(input);
    if let Err(wrong) = play::play(&script, &Sabotage::default()) {
        panic!("{wrong}\n{script}");
    }
});
