//! What becomes of the changes that no sync had covered when the power went.
//!
//! # Invariants
//! - A choice, a cut and its list of pending changes determine every change's fate; nothing else enters.
//! - The enumeration is finite and in a fixed order. Two of its choices may lead to the same state, which fingerprints
//!   show.

use super::rng::{Rng, fold};

/// What a torn write is torn into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// 512 bytes: what a disk writes whole.
    Sector,
    /// 4096 bytes: what the page cache writes whole, and most disks too.
    Page,
}

impl Unit {
    /// Its size.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Sector => 512,
            Self::Page => 4096,
        }
    }
}

/// Which of a torn write's units reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Keep {
    /// The first so many; the file is no longer than they make it.
    Prefix(u64),
    /// The last so many.
    Suffix(u64),
    /// The first, third, fifth, and so on.
    Even,
    /// The second, fourth, sixth, and so on.
    Odd,
    /// None of them, but the file is as long as if they had: zeros, or what was there before.
    LengthOnly,
    /// About half of them, as this seed has it.
    Mask(u64),
    /// All of them, holding noise: power failed while they were being written (shorn writes; Zheng et al., FAST 2013).
    Noise(u64),
}

impl Keep {
    /// Whether the unit numbered `unit` of `count` reached the disk.
    pub(super) fn keeps(self, unit: u64, count: u64) -> bool {
        match self {
            Self::Prefix(kept) => unit < kept,
            Self::Suffix(kept) => unit >= count.saturating_sub(kept),
            Self::Even => unit.is_multiple_of(2),
            Self::Odd => !unit.is_multiple_of(2),
            Self::LengthOnly => false,
            Self::Mask(seed) => fold(seed, unit) & 1 == 1,
            Self::Noise(_) => true,
        }
    }
}

/// What becomes of the other changes, beside a torn one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Others {
    /// They all reached the disk.
    Kept,
    /// None did.
    Dropped,
}

/// Which of the pending changes reached the disk. Numbers are places in
/// [`CrashWalker::pending`](super::CrashWalker::pending).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// None of them.
    None,
    /// All of them.
    All,
    /// All but one.
    DropOne(usize),
    /// One alone.
    OnlyOne(usize),
    /// Those before this one: the disk wrote in order.
    FirstN(usize),
    /// One write reached the disk in part.
    Torn {
        /// Which one.
        op: usize,
        /// Into what it was torn.
        unit: Unit,
        /// Which of them are there.
        keep: Keep,
        /// What became of the other changes.
        others: Others,
    },
    /// Each kept, lost or torn on its own, as this seed has it.
    Random(u64),
}

/// What becomes of one change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Kept,
    Dropped,
    Torn(Unit, Keep),
}

impl Choice {
    /// The fate of each of `count` changes, of which `is_write` says whether it can be torn. The same seed says
    /// something else at another `position`.
    pub(super) fn fates(self, position: usize, count: usize, is_write: impl Fn(usize) -> bool) -> Vec<Fate> {
        let each = |fate: &dyn Fn(usize) -> Fate| (0..count).map(fate).collect();
        let kept_if = |kept: bool| if kept { Fate::Kept } else { Fate::Dropped };
        match self {
            Self::None => each(&|_| Fate::Dropped),
            Self::All => each(&|_| Fate::Kept),
            Self::DropOne(dropped) => each(&|i| kept_if(i != dropped)),
            Self::OnlyOne(kept) => each(&|i| kept_if(i == kept)),
            Self::FirstN(kept) => each(&|i| kept_if(i < kept)),
            Self::Torn { op, unit, keep, others } => {
                each(&|i| if i == op && is_write(i) { Fate::Torn(unit, keep) } else { kept_if(others == Others::Kept) })
            }
            Self::Random(seed) => random_fates(&mut Rng::new(fold(seed, position as u64)), count, is_write),
        }
    }

    /// All choices, random ones excepted, about changes of which `optional` are in doubt.
    pub(super) fn all(optional: &[usize], units: impl Fn(usize) -> Option<(u64, u64)>) -> Vec<Choice> {
        let mut choices = vec![Self::None];
        if !optional.is_empty() {
            choices.push(Self::All);
        }
        // Those before the second are one alone, and those before the last are all but one.
        let inner = optional.get(2..optional.len() - usize::from(!optional.is_empty())).unwrap_or_default();
        choices.extend(inner.iter().map(|&op| Self::FirstN(op)));
        for &op in optional {
            Self::about(op, optional.len() > 1, units(op), &mut choices);
        }
        choices
    }

    /// The choices that single one change out. `units` is how many sectors and pages it touches, if it is a write.
    pub(super) fn about(op: usize, has_others: bool, units: Option<(u64, u64)>, into: &mut Vec<Choice>) {
        if has_others {
            into.extend([Self::DropOne(op), Self::OnlyOne(op)]);
        }
        let Some((sectors, pages)) = units else { return };
        let torn_sectors = tears(sectors).into_iter().chain([Keep::LengthOnly, Keep::Noise(sectors)]);
        let torn_pages = tears(pages);
        let torn =
            torn_sectors.map(|keep| (Unit::Sector, keep)).chain(torn_pages.into_iter().map(|keep| (Unit::Page, keep)));
        for (unit, keep) in torn {
            into.push(Self::Torn { op, unit, keep, others: Others::Kept });
            if has_others {
                into.push(Self::Torn { op, unit, keep, others: Others::Dropped });
            }
        }
    }
}

/// The ways of tearing so many units that are worth a look each: an end, the middle, both ends, and every other.
fn tears(units: u64) -> Vec<Keep> {
    match units {
        0 | 1 => Vec::new(),
        2 => vec![Keep::Prefix(1), Keep::Suffix(1)],
        3 => vec![Keep::Prefix(1), Keep::Prefix(2), Keep::Suffix(1), Keep::Suffix(2), Keep::Even, Keep::Odd],
        _ => vec![
            Keep::Prefix(1),
            Keep::Prefix(units / 2),
            Keep::Prefix(units - 1),
            Keep::Suffix(1),
            Keep::Suffix(units / 2),
            Keep::Suffix(units - 1),
            Keep::Even,
            Keep::Odd,
        ],
    }
}

fn random_fates(rng: &mut Rng, count: usize, is_write: impl Fn(usize) -> bool) -> Vec<Fate> {
    // Mostly lost, about even, mostly kept: a fair coin alone would hardly ever lose one change of twenty.
    let kept = 10 + 40 * rng.below(3);
    let torn = 10 * rng.below(4);
    let mut fate = |i| {
        if rng.percent(torn) && is_write(i) {
            let unit = if rng.percent(50) { Unit::Sector } else { Unit::Page };
            Fate::Torn(unit, random_keep(rng))
        } else if rng.percent(kept) {
            Fate::Kept
        } else {
            Fate::Dropped
        }
    };
    (0..count).map(&mut fate).collect()
}

fn random_keep(rng: &mut Rng) -> Keep {
    match rng.below(8) {
        0 => Keep::Prefix(rng.below(16)),
        1 => Keep::Suffix(rng.below(16)),
        2 => Keep::LengthOnly,
        3 => Keep::Noise(rng.next()),
        _ => Keep::Mask(rng.next()),
    }
}
