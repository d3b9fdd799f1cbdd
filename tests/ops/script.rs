//! What a store is put through, from any bytes: how it is opened, and then steps of four bytes each. Whatever the bytes
//! are, they are a script; a change of one byte changes one step, and most changes keep the other steps as they are.
//!
//! Four bytes and no more structure, so that a fuzzer's changes stay small and its corpus can be read by eye.

use std::fmt;

use alight::Durability;
use alight::storage::sim::{Abilities, Choice, FaultKind, Keep, OpKind, Others, Unit};

use crate::common::bytes;
use crate::common::model::Commit;

/// Longer scripts are cut off: what they would find, shorter ones find sooner.
pub(crate) const STEPS_MAX: usize = 40;

/// Lengths of values: none, packed beside others, whole blocks, more than a small commit, a segment of their own.
const LENGTHS: [usize; 12] = [0, 1, 300, 700, 4095, 4096, 5000, 7000, 9000, 12_000, 20_000, 40_000];

/// As long as a small commit's may be, two blocks: written in one call where it begins on a page, else in two.
const LENT: usize = 8192;
/// The lengths from here on are that.
const LENT_FROM: u8 = 248;

/// How many keys there are; the last few are so long that one holds whole sectors of its frame.
const KEYS: u8 = 14;
const SHORT_KEYS: u8 = 11;

/// What a store may hold at most.
pub(crate) const MAX_BYTES: u64 = 45_000;

/// What becomes of a commit that would pass [`MAX_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    None,
    Refuses,
    EvictsFirst,
    EvictsUnread,
}

/// How the store is opened, every time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    pub overlay_entries_max: usize,
    pub segment_bytes: u64,
    pub limit: Limit,
    pub abilities: Abilities,
    /// Whether calls have deadlines, and so threads of the store's own do what may get stuck. Handing over to them takes far
    /// longer than the twin's answer: seldom.
    pub deadlines: bool,
    /// What is lost by the power cut after the last step; without one the process dies.
    pub last_loss: Option<Loss>,
}

/// What is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Question {
    Get(Key),
    /// From one fifteenth of the value's length to another.
    Range(Key, u8, u8),
    Many([Key; 3]),
    Scan(&'static str),
    Contains(Key),
    Everything,
}

/// What is done after the store was closed, before it is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    Nothing,
    Repair,
    RebuildIndex,
}

/// How many calls a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Often {
    Once,
    Thrice,
    FromThenOn,
}

/// One step.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Commit(Commit, Durability),
    Ask(Question),
    TakeSnapshot,
    AskSnapshot(u8, Question),
    DropSnapshot(u8),
    OpenReader,
    AskReader(Question),
    RefreshReader,
    DropReader,
    Sync,
    Compact,
    Backup,
    Verify,
    Close(Closed),
    /// The process dies, and another opens the store.
    Kill,
    /// The power fails, and the disk comes back like this.
    PowerCut(Loss),
    Fault {
        kind: FaultKind,
        nth: u64,
        often: Often,
        on: Option<OpKind>,
    },
    /// So many bytes are left on the disk.
    FillUp(u64),
    /// Faults are over, and there is room.
    Heal,
}

/// What becomes of the changes that no sync had covered; numbers are taken modulo how many there are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Loss {
    All,
    Nothing,
    OnlyOf(usize),
    AllBut(usize),
    From(usize),
    Torn(usize, Unit, Keep, Others),
    Random(u64),
}

impl Loss {
    /// The choice, among so many changes.
    pub(crate) fn choice(self, pending: usize) -> Choice {
        let nth = |number: usize| number % pending.max(1);
        match self {
            Self::All => Choice::None,
            Self::Nothing => Choice::All,
            Self::OnlyOf(number) => Choice::DropOne(nth(number)),
            Self::AllBut(number) => Choice::OnlyOne(nth(number)),
            Self::From(number) => Choice::FirstN(nth(number)),
            Self::Torn(number, unit, keep, others) => Choice::Torn { op: nth(number), unit, keep, others },
            Self::Random(seed) => Choice::Random(seed),
        }
    }

    fn decode([a, b, c]: [u8; 3]) -> Self {
        let number = usize::from(b);
        match a % 8 {
            0 => Self::All,
            1 => Self::Nothing,
            2 => Self::OnlyOf(number),
            3 => Self::AllBut(number),
            4 => Self::From(number),
            5 => {
                let unit = if c & 1 == 0 { Unit::Sector } else { Unit::Page };
                let others = if c & 2 == 0 { Others::Kept } else { Others::Dropped };
                let some = u64::from(c >> 5);
                let keep = match c >> 2 & 7 {
                    0 => Keep::Prefix(some),
                    1 => Keep::Suffix(some),
                    2 => Keep::Even,
                    3 => Keep::Odd,
                    4 => Keep::LengthOnly,
                    5 => Keep::Noise(some),
                    _ => Keep::Mask(some),
                };
                Self::Torn(number, unit, keep, others)
            }
            _ => Self::Random(u64::from(b) << 8 | u64::from(c)),
        }
    }
}

/// A key, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u8);

impl Key {
    pub(crate) fn bytes(self) -> Vec<u8> {
        match self.0 % KEYS {
            short if short < SHORT_KEYS => format!("k{short}").into_bytes(),
            long => format!("long{long}{}", "-".repeat(1000)).into_bytes(),
        }
    }
}

impl Setting {
    fn decode([a, b, c, d]: [u8; 4]) -> Self {
        let off = |bit: u8| d >> bit & 1 == 1;
        Self {
            deadlines: a >> 4 == 15,
            last_loss: match b >> 2 & 7 {
                0 | 1 => None,
                2 | 3 => Some(Loss::All),
                _ => Some(Loss::decode([b >> 5, c >> 3, a])),
            },
            overlay_entries_max: [6, 1, 3, 30][usize::from(a % 4)],
            segment_bytes: [64 << 10, 16 << 10, 32 << 10, 256 << 10][usize::from(b % 4)],
            limit: match c % 8 {
                0..=4 => Limit::None,
                5 => Limit::Refuses,
                6 => Limit::EvictsFirst,
                _ => Limit::EvictsUnread,
            },
            abilities: Abilities {
                direct: !off(0),
                map: !off(1),
                allocate: !off(2),
                punch: !off(3),
                share_bytes: !off(4),
                link: !off(5),
                reflink: !off(6),
                resident: None,
            },
        }
    }
}

impl Step {
    /// The step that four bytes are; `number` makes its values unlike those of every other.
    fn decode([what, a, b, c]: [u8; 4], number: u64) -> Self {
        let durability = |bits: u8| if bits & 3 == 0 { Durability::Eventual } else { Durability::Immediate };
        let len_of = |length: u8| if length < LENT_FROM { LENGTHS[usize::from(length) % LENGTHS.len()] } else { LENT };
        let value = |nth: u64, length: u8| Some(bytes(number * 8 + nth, len_of(length)));
        let question = || match b % 6 {
            0 => Question::Get(Key(a)),
            1 => Question::Range(Key(a), c >> 4, c & 15),
            2 => Question::Many([Key(a), Key(c), Key(c >> 4)]),
            3 => Question::Scan(["", "k", "k1", "long", "none"][usize::from(a % 5)]),
            4 => Question::Contains(Key(a)),
            _ => Question::Everything,
        };
        match what % 40 {
            0..=8 => Self::Commit(vec![(Key(a).bytes(), value(0, b))], durability(c)),
            9..=11 => {
                let puts = [
                    (Key(a).bytes(), value(0, b)),
                    (Key(a >> 4).bytes(), value(1, b >> 4)),
                    (Key(c >> 4).bytes(), None),
                ];
                Self::Commit(puts.into(), durability(c))
            }
            12 => {
                // Many at once: the index is written out after a few of these.
                let puts = (0..1 + b % 12).map(|nth| (Key(a.wrapping_add(nth)).bytes(), value(u64::from(nth), c % 4)));
                Self::Commit(puts.collect(), durability(c >> 4))
            }
            13 | 14 => Self::Commit(vec![(Key(a).bytes(), None)], durability(c)),
            15 => Self::Commit(
                vec![(Key(a).bytes(), None), (Key(b).bytes(), None), (Key(c).bytes(), value(0, c >> 4))],
                Durability::Immediate,
            ),
            16..=18 => Self::Ask(question()),
            19 => Self::TakeSnapshot,
            20 => Self::AskSnapshot(c, question()),
            21 if a % 2 == 0 => Self::DropSnapshot(b),
            21 => Self::DropReader,
            22 => Self::OpenReader,
            23 => Self::AskReader(question()),
            24 => Self::RefreshReader,
            25 => Self::Sync,
            26 | 27 => Self::Compact,
            28 => Self::Backup,
            29 => Self::Verify,
            30 => Self::Close([Closed::Nothing, Closed::Repair, Closed::RebuildIndex][usize::from(a % 3)]),
            31 => Self::Kill,
            32 | 33 => Self::PowerCut(Loss::decode([a, b, c])),
            34..=37 => {
                let kind = FaultKind::ALL[usize::from(a) % FaultKind::ALL.len()];
                let often = match c % 4 {
                    0 | 1 => Often::Once,
                    2 => Often::Thrice,
                    // No system interrupts every call for ever, and who waits for that may wait for ever.
                    _ if kind == FaultKind::Eintr => Often::Thrice,
                    _ => Often::FromThenOn,
                };
                let ops = [
                    OpKind::Write,
                    OpKind::Sync,
                    OpKind::SyncDir,
                    OpKind::Rename,
                    OpKind::Read,
                    OpKind::Open,
                    OpKind::Remove,
                    OpKind::Truncate,
                    OpKind::Allocate,
                    OpKind::Map,
                    OpKind::Punch,
                    OpKind::Link,
                    OpKind::List,
                    OpKind::Facts,
                ];
                // Half of them strike whatever call it is.
                let on = (c & 128 != 0).then(|| ops[usize::from(c >> 2 & 31) % ops.len()]);
                let nth = u64::from(b % if on.is_some() { 8 } else { 64 });
                Self::Fault { kind, nth, often, on }
            }
            38 => Self::FillUp(u64::from(a) * 1024),
            _ => Self::Heal,
        }
    }
}

/// A whole script.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub setting: Setting,
    pub steps: Vec<Step>,
}

impl Script {
    /// The script that these bytes are.
    pub(crate) fn decode(input: &[u8]) -> Self {
        let mut fours = input.chunks(4).map(|four| std::array::from_fn(|at| four.get(at).copied().unwrap_or(0)));
        let setting = Setting::decode(fours.next().unwrap_or_default());
        let steps = (1..).zip(fours).take(STEPS_MAX).map(|(number, four)| Step::decode(four, number)).collect();
        Self { setting, steps }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Commit(commit, durability) = self else { return write!(f, "{self:?}") };
        write!(f, "{durability:?} commit:")?;
        commit.iter().try_for_each(|(key, value)| {
            let key = String::from_utf8_lossy(&key[..key.len().min(6)]);
            match value {
                Some(value) => write!(f, " {key} = {} bytes", value.len()),
                None => write!(f, " {key} deleted"),
            }
        })
    }
}

/// One step a line, under how the store is opened.
impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.setting)?;
        (1..).zip(&self.steps).try_for_each(|(number, step)| writeln!(f, "{number:>4}  {step}"))
    }
}
