//! Rounds in turns, and their medians.

use std::time::Duration;

use crate::failure::Failure;
use crate::interrupt;

/// Which of the two a round is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Store,
    Disk,
}

/// The medians of both sides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Medians {
    pub(super) store: Duration,
    pub(super) disk: Duration,
}

/// Does so many rounds of each side, in turns, and each side first every other time.
pub(super) fn in_turns(
    rounds: u64,
    mut round: impl FnMut(Side, u64) -> Result<Duration, Failure>,
) -> Result<Medians, Failure> {
    let (mut store, mut disk) = (Vec::new(), Vec::new());
    for number in 0..rounds {
        interrupt::check()?;
        let order = if number % 2 == 0 { [Side::Store, Side::Disk] } else { [Side::Disk, Side::Store] };
        for side in order {
            let time = round(side, number)?;
            match side {
                Side::Store => store.push(time),
                Side::Disk => disk.push(time),
            }
        }
    }
    Ok(Medians { store: median(store), disk: median(disk) })
}

/// The middle one; of an even number the mean of the middle two.
pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    let middle = times.len() / 2;
    match times.get(middle) {
        None => Duration::ZERO,
        Some(&upper) if times.len() % 2 == 1 => upper,
        Some(&upper) => (times[middle - 1] + upper) / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        let of = |times: &[u64]| median(times.iter().map(|&time| Duration::from_secs(time)).collect());
        assert_eq!(of(&[]), Duration::ZERO);
        assert_eq!(of(&[9, 1, 5]), Duration::from_secs(5));
        assert_eq!(of(&[9, 1, 5, 7]), Duration::from_secs(6));
    }

    #[test]
    fn the_sides_take_turns() {
        let mut seen = Vec::new();
        let medians = in_turns(4, |side, number| {
            seen.push(side);
            Ok(Duration::from_secs(if side == Side::Store { 10 + number } else { 1 }))
        });
        let medians = medians.unwrap();
        assert_eq!((medians.store, medians.disk), (Duration::from_millis(11_500), Duration::from_secs(1)));
        assert!(seen.chunks(2).all(|pair| pair[0] != pair[1]) && seen[0] != seen[2]);
    }
}
