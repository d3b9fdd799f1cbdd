//! Bytes that change behind the store's back: every one of them is an error that names what it hit, or harmless.
//!
//! - `flips`: one bit of every byte of every file of a store, turned over alone; `verified`: what a verification says
//!   of each. The stores are made in `stores`.
//! - `blocks`: of a compacted store, whole blocks and whole files that are zeros, older, in each other's place or gone.
//! - `torn`: tails as a power cut may leave them, of any shape, and damage to what a sync had covered, of any shape. The
//!   first opens, the second is refused, and nothing is changed.
//! - `atlas` knows what each byte of a store's files is for, `ask` what can be asked of a store and which bytes an answer
//!   rests on.

mod ask;
mod atlas;
mod blocks;
mod flips;
mod stores;
mod torn;
mod verified;
