use super::*;
use proptest::prelude::*;

const FILE: FileId = FileId(1);

fn admit(map: &mut RegionMap<()>, range: Range<u64>) -> RegionId {
    map.admit(FILE, range, (), Instant::now())
}

#[test]
fn what_lies_in_a_region_is_served_by_it_and_a_longer_request_is_not() {
    let mut map = RegionMap::new(1000);
    let id = admit(&mut map, 100..200);
    for range in [100..200, 100..101, 150..160, 199..200] {
        assert_eq!(map.plan(FILE, &range), Ok(RegionPlan::Hit(id)), "{range:?}");
    }
    // The specification keyed by offset alone, and answered the shorter region.
    assert_eq!(map.plan(FILE, &(100..300)), Ok(RegionPlan::Admit { evict: vec![id] }));
    assert_eq!(map.plan(FILE, &(50..150)), Ok(RegionPlan::Admit { evict: vec![id] }));
    assert_eq!(map.plan(FILE, &(200..300)), Ok(RegionPlan::Admit { evict: vec![] }));
    assert_eq!(map.plan(FileId(2), &(100..200)), Ok(RegionPlan::Admit { evict: vec![] }));
}

#[test]
fn room_is_made_from_the_coldest_on() {
    let mut map = RegionMap::new(300);
    let [a, b, c] = [0, 100, 200].map(|start| admit(&mut map, start..start + 100));
    map.touch(a, Instant::now());
    assert_eq!(map.plan(FILE, &(300..350)), Ok(RegionPlan::Admit { evict: vec![b] }));
    assert_eq!(map.plan(FILE, &(300..450)), Ok(RegionPlan::Admit { evict: vec![b, c] }));
    map.pin(b);
    assert_eq!(map.plan(FILE, &(300..450)), Ok(RegionPlan::Admit { evict: vec![c, a] }));
    assert_eq!(map.plan(FILE, &(300..501)), Err(RegionRefusal::Memory { needed: 201, available: 200 }));
    assert_eq!(map.plan(FILE, &(190..210)), Err(RegionRefusal::InUse(100..200)));
    assert_eq!(map.plan(FILE, &(250..300)), Ok(RegionPlan::Hit(c)));
    assert_eq!(map.plan(FILE, &(250..301)), Ok(RegionPlan::Admit { evict: vec![c] }), "an overlapped one is room too");
}

#[test]
fn pinned_and_dirty_regions_stay() {
    let mut map = RegionMap::new(100);
    let id = admit(&mut map, 0..100);
    assert!(map.pin(id) && map.pin(id) && map.mark_dirty(id));
    assert_eq!((map.evict(id), map.pinned_bytes()), (Err(EvictRefused::Pinned), 100));
    assert!(map.unpin(id) && map.unpin(id) && !map.unpin(id));
    assert_eq!((map.evict(id), map.pinned_bytes()), (Err(EvictRefused::Dirty), 0));
    let flushing = map.get(id).unwrap().changes();
    map.mark_dirty(id);
    map.cleaned(id, flushing);
    assert_eq!(map.evict(id), Err(EvictRefused::Dirty), "it was changed while it was flushed");
    map.cleaned(id, flushing + 1);
    assert_eq!((map.evict(id), map.evict(id)), (Ok(()), Err(EvictRefused::Unknown)));
    assert!(!map.touch(id, Instant::now()) && !map.pin(id) && !map.unpin(id) && !map.mark_dirty(id));
    assert_eq!((map.mapped_bytes(), map.len()), (0, 0));
}

#[derive(Debug, Clone)]
struct Known {
    id: RegionId,
    file: u64,
    range: Range<u64>,
    pins: usize,
    dirty: bool,
}

/// The plan, by going through every region and byte.
fn naive_plan(known: &[Known], budget: u64, file: u64, range: &Range<u64>) -> Result<RegionPlan, RegionRefusal> {
    if let Some(hit) = known.iter().find(|k| k.file == file && k.range.start <= range.start && range.end <= k.range.end)
    {
        return Ok(RegionPlan::Hit(hit.id));
    }
    let len = |k: &Known| k.range.end - k.range.start;
    let mut overlapped: Vec<&Known> =
        known.iter().filter(|k| k.file == file && k.range.clone().any(|byte| range.contains(&byte))).collect();
    overlapped.sort_by_key(|k| k.range.start);
    if let Some(pinned) = overlapped.iter().find(|k| k.pins > 0) {
        return Err(RegionRefusal::InUse(pinned.range.clone()));
    }
    let needed = range.end - range.start;
    let available = budget - known.iter().filter(|k| k.pins > 0).map(len).sum::<u64>();
    if needed > available {
        return Err(RegionRefusal::Memory { needed, available });
    }
    let mut evict: Vec<RegionId> = overlapped.iter().map(|k| k.id).collect();
    for candidate in known {
        let kept: u64 = known.iter().filter(|k| !evict.contains(&k.id)).map(len).sum();
        if kept + needed > budget && candidate.pins == 0 && !evict.contains(&candidate.id) {
            evict.push(candidate.id);
        }
    }
    Ok(RegionPlan::Admit { evict })
}

proptest! {
    #[test]
    fn any_calls_are_answered_as_the_model_does(
        budget in 1u64..200,
        steps in prop::collection::vec((0u8..10, 0u64..3, 0u64..120, 1u64..60, 0usize..20), 1..150),
    ) {
        let now = Instant::now();
        let mut map = RegionMap::new(budget);
        let mut known: Vec<Known> = vec![];
        for (kind, file, start, len, pick) in steps {
            let range = start..start + len;
            let picked = if known.is_empty() { None } else { Some(pick % known.len()) };
            match (kind, picked) {
                (4, Some(at)) => {
                    prop_assert!(map.pin(known[at].id));
                    known[at].pins += 1;
                }
                (5, Some(at)) => {
                    prop_assert_eq!(map.unpin(known[at].id), known[at].pins > 0);
                    known[at].pins = known[at].pins.saturating_sub(1);
                }
                (6, Some(at)) => {
                    prop_assert!(map.mark_dirty(known[at].id));
                    known[at].dirty = true;
                }
                (7, Some(at)) => {
                    let changes = map.get(known[at].id).unwrap().changes();
                    prop_assert!(map.cleaned(known[at].id, changes));
                    known[at].dirty = false;
                }
                (8, Some(at)) => {
                    prop_assert!(map.touch(known[at].id, now));
                    let region = known.remove(at);
                    known.push(region);
                }
                (9, Some(at)) => {
                    let expected = match &known[at] {
                        k if k.pins > 0 => Err(EvictRefused::Pinned),
                        k if k.dirty => Err(EvictRefused::Dirty),
                        _ => Ok(()),
                    };
                    prop_assert_eq!(map.evict(known[at].id), expected);
                    if expected.is_ok() { known.remove(at); }
                }
                _ => {
                    let plan = map.plan(FileId(file), &range);
                    prop_assert_eq!(&plan, &naive_plan(&known, budget, file, &range));
                    if let Ok(RegionPlan::Admit { evict }) = plan {
                        for id in evict {
                            let changes = map.get(id).unwrap().changes();
                            map.cleaned(id, changes);
                            prop_assert_eq!(map.evict(id), Ok(()));
                            known.retain(|k| k.id != id);
                        }
                        let id = map.admit(FileId(file), range.clone(), (), now);
                        known.push(Known { id, file, range, pins: 0, dirty: false });
                    }
                }
            }
            let bytes: u64 = known.iter().map(|k| k.range.end - k.range.start).sum();
            prop_assert!(bytes <= budget);
            prop_assert_eq!((map.mapped_bytes(), map.len(), map.is_empty()), (bytes, known.len(), known.is_empty()));
            let order: Vec<_> = map.iter().map(|(id, region)| (id, region.is_dirty(), region.is_pinned())).collect();
            prop_assert_eq!(order, known.iter().map(|k| (k.id, k.dirty, k.pins > 0)).collect::<Vec<_>>());
        }
    }
}
