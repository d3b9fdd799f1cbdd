#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const MS: Duration = Duration::from_millis(1);

fn scheduler(slots: usize, extent: u64, distance: u64) -> PrefetchScheduler {
    PrefetchScheduler::new(PrefetchOptions::new(slots, extent, distance, 4))
}

/// Reads front to back in pieces, so that the pattern is known.
fn read_on(scheduler: &mut PrefetchScheduler, pieces: std::ops::Range<u64>, len: u64, file_len: u64, now: Instant) {
    for piece in pieces {
        scheduler.access(piece * len..(piece + 1) * len, file_len, now);
    }
}

fn take(scheduler: &mut PrefetchScheduler, now: Instant) -> Vec<std::ops::Range<u64>> {
    std::iter::from_fn(|| scheduler.next(now)).map(|prefetch| prefetch.range).collect()
}

#[test]
fn a_sequential_reader_gets_what_comes_next_nearest_first() {
    let now = Instant::now();
    let mut scheduler = scheduler(4, 16, 48);
    read_on(&mut scheduler, 0..4, 16, 1000, now);
    assert_eq!(scheduler.pattern(), AccessPattern::Sequential);
    assert_eq!(take(&mut scheduler, now), [64..80, 80..96, 96..112], "no further than the distance");
    scheduler.access(64..80, 1000, now);
    assert_eq!((scheduler.next(now).unwrap().range, scheduler.next(now)), (112..128, None), "and nothing twice");
    scheduler.access(80..96, 1000, now);
    assert_eq!(take(&mut scheduler, now), [], "every slot is taken");
}

#[test]
fn the_end_of_the_file_is_the_end() {
    let now = Instant::now();
    let mut scheduler = scheduler(8, 16, 160);
    read_on(&mut scheduler, 0..4, 16, 90, now);
    assert_eq!(take(&mut scheduler, now), [64..80, 80..90]);
    scheduler.access(u64::MAX - 8..u64::MAX, u64::MAX, now);
    scheduler.access(0..0, 0, now);
    assert_eq!(scheduler.next(now), None);
}

#[test]
fn strides_are_followed_both_ways_to_the_ends_of_the_file() {
    let now = Instant::now();
    let mut up = scheduler(4, 16, 64);
    for n in 0..4 {
        up.access(n * 100..n * 100 + 8, 520, now);
    }
    assert_eq!(up.pattern(), AccessPattern::Strided { stride: 100 });
    assert_eq!(take(&mut up, now), [400..408, 500..508]);
    let mut down = scheduler(4, 16, 64);
    for n in 0..4 {
        down.access(550 - n * 100..558 - n * 100, 600, now);
    }
    assert_eq!(down.pattern(), AccessPattern::Strided { stride: -100 });
    assert_eq!(take(&mut down, now), [148..160, 48..60], "rounded outwards to the alignment");
}

#[test]
fn far_extents_beyond_ten_slots_have_a_priority_too() {
    let now = Instant::now();
    let mut scheduler = scheduler(64, 16, 16 * 64);
    read_on(&mut scheduler, 0..4, 16, 1 << 20, now);
    let taken = take(&mut scheduler, now);
    assert_eq!(taken.len(), 64);
    assert!(taken.is_sorted_by_key(|range| range.start));
}

#[test]
fn requests_past_their_deadline_are_dropped_and_counted() {
    let now = Instant::now();
    let mut scheduler = scheduler(4, 16, 64);
    read_on(&mut scheduler, 0..4, 16, 1000, now);
    assert_eq!(scheduler.next(now + 100 * MS).unwrap().range, 64..80, "in time to the last moment");
    assert_eq!(scheduler.next(now + 101 * MS), None);
    assert_eq!(scheduler.stats().expired, 3);
    scheduler.access(64..80, 1000, now + 200 * MS);
    assert_eq!(take(&mut scheduler, now + 200 * MS), [80..96, 96..112, 112..128], "they can be asked for anew");
}

#[test]
fn slots_come_back_and_everything_is_counted() {
    let now = Instant::now();
    let mut scheduler = scheduler(2, 16, 32);
    read_on(&mut scheduler, 0..4, 16, 1000, now);
    let first = scheduler.next(now).unwrap();
    let second = scheduler.next(now).unwrap();
    assert_eq!(scheduler.lookup(70), Lookup::Late(first.clone()));
    assert!(scheduler.filled(first.slot) && !scheduler.filled(first.slot));
    assert_eq!(scheduler.lookup(79), Lookup::Hit(first.clone()));
    assert_eq!(scheduler.lookup(96), Lookup::Miss);
    assert!(scheduler.failed(second.slot) && !scheduler.failed(second.slot));
    assert!(scheduler.release(first.slot) && !scheduler.release(first.slot));
    assert_eq!(scheduler.slots_in(SlotState::Idle), 2);
    assert_eq!(scheduler.state(SlotId(2)), None);
    let stats = scheduler.stats();
    assert_eq!((stats.hits, stats.late, stats.misses, stats.failed, stats.wasted), (1, 1, 1, 1, 0));
    assert!((stats.hit_rate() - 1.0 / 3.0).abs() < 1e-9);
}

#[test]
fn a_range_is_there_when_all_its_extents_are_and_counts_once() {
    let now = Instant::now();
    let mut scheduler = scheduler(3, 16, 48);
    read_on(&mut scheduler, 0..4, 16, 1000, now);
    let one = scheduler.next(now).unwrap();
    assert_eq!(scheduler.lookup_range(64..81), RangeLookup::Miss, "its end waits for a slot");
    let two = scheduler.next(now).unwrap();
    assert_eq!(scheduler.lookup_range(70..90), RangeLookup::Late);
    assert_eq!(scheduler.held(70..90), Some(vec![one.clone(), two.clone()]));
    scheduler.filled(one.slot);
    assert_eq!(scheduler.lookup_range(79..81), RangeLookup::Late);
    scheduler.filled(two.slot);
    assert_eq!(scheduler.lookup_range(79..96), RangeLookup::Hit);
    assert_eq!((scheduler.held(63..70), scheduler.held(90..97), scheduler.held(5..5)), (None, None, Some(Vec::new())));
    assert_eq!(scheduler.lookup_range(90..97), RangeLookup::Miss);
    let stats = scheduler.stats();
    assert_eq!((stats.hits, stats.late, stats.misses), (1, 2, 2));
    scheduler.reset();
    assert_eq!(scheduler.stats().wasted, 0, "both were looked up");
}

#[test]
fn without_a_guess_nothing_is_fetched_before_a_pattern_shows() {
    let now = Instant::now();
    let options = PrefetchOptions { guess: false, ..PrefetchOptions::new(4, 16, 64, 4) };
    let mut scheduler = PrefetchScheduler::new(options);
    let places = [900, 20, 500, 130, 810, 333, 7, 640];
    let made: usize = places.iter().map(|&at| scheduler.access(at..at + 8, 1000, now)).sum();
    assert_eq!((made, scheduler.stats().scheduled), (0, 0));
    scheduler.reset();
    read_on(&mut scheduler, 0..3, 16, 1000, now);
    assert_eq!(scheduler.next(now), None);
    read_on(&mut scheduler, 3..4, 16, 1000, now);
    assert_eq!(scheduler.next(now).unwrap().range, 64..80);
}

#[test]
fn nothing_outside_of_a_file_is_expected_whichever_way_it_is_read() {
    let now = Instant::now();
    for backwards in [false, true] {
        let mut scheduler = scheduler(8, 16, 128);
        for n in 0..4 {
            let step = if backwards { 7 - n } else { n + 4 };
            let at = 10_000 + step * 100;
            scheduler.access_within(at..at + 8, 10_200..10_950, now);
        }
        let ends = if backwards { vec![10_300..10_308, 10_200..10_208] } else { vec![10_800..10_808, 10_900..10_908] };
        assert_eq!(take(&mut scheduler, now), ends);
    }
}

#[test]
fn what_the_reader_left_behind_is_given_up_and_counted_as_wasted() {
    let now = Instant::now();
    let mut scheduler = scheduler(3, 16, 48);
    read_on(&mut scheduler, 0..4, 16, 10_000, now);
    let one = scheduler.next(now).unwrap();
    let two = scheduler.next(now).unwrap();
    scheduler.filled(one.slot);
    scheduler.access(5000..5016, 10_000, now);
    assert_eq!((scheduler.stats().wasted, scheduler.slots_in(SlotState::Filling)), (1, 1));
    scheduler.filled(two.slot);
    scheduler.access(5016..5032, 10_000, now);
    assert_eq!((scheduler.stats().wasted, scheduler.slots_in(SlotState::Ready)), (2, 0));
}

#[test]
fn a_read_of_no_bytes_keeps_no_extent_around_it() {
    let now = Instant::now();
    let mut scheduler = scheduler(3, 16, 48);
    read_on(&mut scheduler, 0..4, 16, 10_000, now);
    let one = scheduler.next(now).unwrap();
    scheduler.filled(one.slot);
    // The read of nothing begins within the extent; a file that ends there leaves nothing to be read after it.
    scheduler.access(70..70, 70, now);
    assert_eq!((scheduler.stats().wasted, scheduler.slots_in(SlotState::Ready)), (1, 0));
}

#[test]
fn a_demanded_read_gets_a_slot_before_any_guess() {
    let now = Instant::now();
    let mut scheduler = scheduler(2, 16, 32);
    read_on(&mut scheduler, 0..4, 16, 1000, now);
    let demanded = scheduler.demand(72..80).unwrap();
    assert_eq!(demanded.range, 72..80);
    assert_eq!(scheduler.next(now).unwrap().range, 80..96, "the guess that it crossed is dropped");
    assert_eq!(scheduler.demand(500..516), None, "every slot is being filled");
    assert_eq!(scheduler.demand(74..75), None, "on its way already");
    scheduler.filled(demanded.slot);
    assert_eq!(scheduler.demand(76..90), None, "there already");
    let cut = scheduler.demand(60..72).unwrap();
    assert_eq!((cut.slot, cut.range), (demanded.slot, 60..72));
    scheduler.filled(cut.slot);
    assert_eq!(scheduler.demand(64..65), None);
    assert_eq!(scheduler.demand(74..100).unwrap().range, 74..80, "cut short where the next extent begins");
}

#[test]
fn nothing_is_fetched_ahead_of_a_random_reader_or_without_a_distance() {
    let now = Instant::now();
    let mut random = scheduler(4, 16, 64);
    for offset in [500, 3, 9000, 77, 4000, 1200, 8, 7000, 2500, 60] {
        random.access(offset..offset + 4, 10_000, now);
    }
    assert_eq!((random.pattern(), random.next(now)), (AccessPattern::Random, None));
    let mut none = scheduler(4, 16, 0);
    read_on(&mut none, 0..8, 16, 1000, now);
    assert_eq!(none.next(now), None);
}

/// The scheduler again, byte by byte and slow.
struct Model {
    slots: Vec<Option<(Range<u64>, bool, bool)>>,
    /// Waiting ranges: priority, deadline, range; in the order in which they were made.
    waiting: Vec<(u32, Instant, Range<u64>)>,
    reads: Vec<Range<u64>>,
    stats: PrefetchStats,
    extent: u64,
    distance: u64,
}

impl Model {
    fn taken(&self) -> BTreeSet<u64> {
        let slots = self.slots.iter().flatten().map(|slot| slot.0.clone());
        let bytes: Vec<u64> = slots.chain(self.waiting.iter().map(|w| w.2.clone())).flatten().collect();
        let set: BTreeSet<u64> = bytes.iter().copied().collect();
        assert_eq!(set.len(), bytes.len(), "a byte is scheduled twice");
        set
    }

    fn extents(&self) -> usize {
        self.waiting.len() + self.slots.iter().flatten().count()
    }

    fn access(&mut self, range: Range<u64>, file_len: u64, now: Instant) {
        self.reads.push(range.clone());
        let mut detector = PatternDetector::new(self.extent);
        for read in &self.reads {
            detector.record(read.start, read.end - read.start);
        }
        let next = range.end / 4 * 4;
        let (wanted, priority): (Vec<Range<u64>>, u32) = match detector.pattern() {
            _ if self.distance == 0 => (vec![], 0),
            AccessPattern::Sequential => (vec![next..(next + self.distance).min(file_len)], 100),
            AccessPattern::Unknown => (vec![next..(next + self.extent.min(self.distance)).min(file_len)], 50),
            AccessPattern::Random => (vec![], 0),
            AccessPattern::Strided { stride } => {
                let len = (range.end - range.start).clamp(1, self.extent);
                let mut ranges = vec![];
                let mut at = range.start as i64 + stride;
                while ranges.len() < self.slots.len()
                    && (ranges.len() as u64 + 1) * len <= self.distance
                    && at >= 0
                    && (at as u64) < file_len
                {
                    ranges.push(at as u64 / 4 * 4..(at as u64 + len).next_multiple_of(4).min(file_len));
                    at += stride;
                }
                (ranges, 80)
            }
        };
        let ahead = |r: &Range<u64>| r.clone().any(|byte| wanted.iter().any(|wanted| wanted.contains(&byte)));
        self.waiting.retain(|(_, _, range)| ahead(range));
        for slot in &mut self.slots {
            if let Some((held, true, used)) = slot
                && !ahead(held)
                && !held.clone().any(|byte| range.contains(&byte))
            {
                self.stats.wasted += u64::from(!*used);
                *slot = None;
            }
        }
        let mut rank = 0;
        for wanted in wanted.iter().filter(|range| range.start < range.end) {
            let mut at = wanted.start;
            while at < wanted.end && self.extents() < self.slots.len() {
                let taken = self.taken();
                if taken.contains(&at) {
                    let holder =
                        self.slots.iter().flatten().map(|slot| &slot.0).chain(self.waiting.iter().map(|w| &w.2));
                    at = holder.into_iter().find(|range| range.contains(&at)).unwrap().end;
                } else {
                    let end = (at..wanted.end.min(at + self.extent)).find(|byte| taken.contains(byte));
                    let end = end.unwrap_or(wanted.end.min(at + self.extent));
                    self.waiting.push((priority - (10 * rank).min(priority), now + 100 * MS, at..end));
                    self.stats.scheduled += 1;
                    at = end;
                }
                rank += 1;
            }
        }
    }

    fn next(&mut self, now: Instant) -> Option<(usize, Range<u64>)> {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.1 >= now);
        self.stats.expired += (before - self.waiting.len()) as u64;
        let slot = self.slots.iter().position(Option::is_none)?;
        let best = (0..self.waiting.len()).min_by_key(|&n| (Reverse(self.waiting[n].0), self.waiting[n].1, n))?;
        let range = self.waiting.remove(best).2;
        self.slots[slot] = Some((range.clone(), false, false));
        Some((slot, range))
    }

    fn lookup(&mut self, offset: u64) {
        match self.slots.iter_mut().flatten().find(|slot| slot.0.contains(&offset)) {
            Some((_, ready, used)) => {
                *used = true;
                *(if *ready { &mut self.stats.hits } else { &mut self.stats.late }) += 1;
            }
            None => self.stats.misses += 1,
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Access(u64, u64),
    ReadOn(u64),
    Back(u64),
    Next,
    Filled(usize),
    Failed(usize),
    Release(usize),
    Lookup(u64),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0u64..400, 0u64..30).prop_map(|(offset, len)| Step::Access(offset, len)),
        4 => (1u64..20).prop_map(Step::ReadOn),
        2 => (30u64..35).prop_map(Step::Back),
        6 => Just(Step::Next),
        4 => (0usize..6).prop_map(Step::Filled),
        1 => (0usize..6).prop_map(Step::Failed),
        1 => (0usize..6).prop_map(Step::Release),
        3 => (0u64..400).prop_map(Step::Lookup),
        1 => (0u64..80).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn any_calls_are_answered_as_the_model_does(
        slots in 1usize..6, extent in 1u64..6, distance in 0u64..20, file_len in 0u64..400,
        steps in prop::collection::vec(step(), 1..if cfg!(miri) { 40 } else { 200 }),
    ) {
        let (extent, distance) = (extent * 4, distance * 4);
        let mut scheduler = scheduler(slots, extent, distance);
        let mut model = Model {
            slots: vec![None; slots], waiting: vec![], reads: vec![], stats: PrefetchStats::default(), extent, distance,
        };
        let (mut now, mut at) = (Instant::now(), 0u64);
        for step in steps {
            match step {
                Step::Access(offset, len) => {
                    scheduler.access(offset..offset + len, file_len, now);
                    model.access(offset..offset + len, file_len, now);
                }
                Step::ReadOn(len) => {
                    scheduler.access(at..at + len, file_len, now);
                    model.access(at..at + len, file_len, now);
                    at += len;
                }
                Step::Back(len) => {
                    at = at.saturating_sub(len);
                    scheduler.access(at..at + 8, file_len, now);
                    model.access(at..at + 8, file_len, now);
                }
                Step::Next => {
                    let taken = scheduler.next(now).map(|prefetch| (prefetch.slot.index(), prefetch.range));
                    prop_assert_eq!(taken, model.next(now));
                }
                Step::Filled(slot) => {
                    let fits = matches!(model.slots.get(slot), Some(Some((_, false, _))));
                    prop_assert_eq!(scheduler.filled(SlotId(slot)), fits);
                    if fits && let Some((_, ready, _)) = &mut model.slots[slot] { *ready = true; }
                }
                Step::Failed(slot) => {
                    let fits = matches!(model.slots.get(slot), Some(Some((_, false, _))));
                    prop_assert_eq!(scheduler.failed(SlotId(slot)), fits);
                    if fits { model.slots[slot] = None; model.stats.failed += 1; }
                }
                Step::Release(slot) => {
                    let fits = matches!(model.slots.get(slot), Some(Some((_, true, _))));
                    prop_assert_eq!(scheduler.release(SlotId(slot)), fits);
                    if fits && let Some((_, _, used)) = model.slots[slot].take() { model.stats.wasted += u64::from(!used); }
                }
                Step::Lookup(offset) => {
                    scheduler.lookup(offset);
                    model.lookup(offset);
                }
                Step::Wait(ms) => now += MS * ms as u32,
            }
            prop_assert_eq!(scheduler.stats(), model.stats);
            prop_assert!(model.extents() <= slots);
            prop_assert!(model.taken().last().is_none_or(|&last| last < file_len));
            for (index, slot) in model.slots.iter().enumerate() {
                let state = match slot {
                    None => SlotState::Idle,
                    Some((_, false, _)) => SlotState::Filling,
                    Some((_, true, _)) => SlotState::Ready,
                };
                prop_assert_eq!(scheduler.state(SlotId(index)), Some(state));
            }
        }
    }

    #[test]
    fn a_reader_in_order_is_served_ahead_whatever_its_pieces(
        pieces in prop::collection::vec(1u64..=16, 30..80), slots in 4usize..8,
    ) {
        let now = Instant::now();
        let file_len: u64 = pieces.iter().sum();
        let mut scheduler = scheduler(slots, 16, 16 * slots as u64);
        let mut at = 0;
        for len in pieces {
            scheduler.lookup(at);
            scheduler.access(at..at + len, file_len, now);
            while let Some(prefetch) = scheduler.next(now) {
                scheduler.filled(prefetch.slot);
            }
            at += len;
        }
        let stats = scheduler.stats();
        prop_assert_eq!((stats.misses, stats.late), (1, 0), "only the first read was not foreseen: {:?}", stats);
    }
}
