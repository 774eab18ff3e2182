//! How much of this machine's processors its host gave to others meanwhile (steal time): no program sees it otherwise,
//! and what was measured under much of it tells little.

use std::fs;
use std::time::{Duration, Instant};

/// A measurement during which more than this part was taken is disturbed.
pub const DISTURBED: f64 = 0.05;

/// Time of all processors since the boot, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ticks {
    stolen: u64,
    all: u64,
}

impl Ticks {
    /// Up to now; `None` where `/proc` does not say.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The first line of `/proc/stat` (`proc_stat(5)`): user, nice, system, idle, iowait, irq, softirq and steal. What
    /// follows is part of user and nice.
    fn parse(stat: &str) -> Option<Self> {
        let ticks = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = ticks.map_while(|field| field.parse().ok()).collect();
        (ticks.len() == 8).then(|| Self { stolen: ticks[7], all: ticks.iter().sum() })
    }

    /// The part, from 0 to 1, that was stolen between two moments; `None` when no tick passed.
    pub fn stolen_until(self, later: Self) -> Option<f64> {
        let all = later.all.checked_sub(self.all).filter(|all| *all > 0)?;
        // The kernel's sums of single processors can step back by a tick.
        Some(later.stolen.saturating_sub(self.stolen) as f64 / all as f64)
    }
}

/// The same of two moments that `/proc` may not tell.
pub fn between(before: Option<Ticks>, after: Option<Ticks>) -> Option<f64> {
    before?.stolen_until(after?)
}

/// Does it, and again while it was disturbed and there is something to spare, which is taken from; before that,
/// `rest`. Returns the least disturbed, and how often it was done again.
///
/// # Errors
/// Those of what is done.
pub fn calmest<T, E>(
    spare: &mut u32,
    stolen: impl Fn(&T) -> f64,
    rest: impl Fn(),
    mut once: impl FnMut() -> Result<T, E>,
) -> Result<(T, u32), E> {
    let (mut kept, mut repeats) = (once()?, 0);
    while *spare > 0 && stolen(&kept) > DISTURBED {
        (*spare, repeats) = (*spare - 1, repeats + 1);
        eprintln!(
            "note: the host took {:.0} % of the processors; once more when it is calm",
            stolen(&kept) * 100.0
        );
        rest();
        let other = once()?;
        if stolen(&other) < stolen(&kept) {
            kept = other;
        }
    }
    Ok((kept, repeats))
}

/// How often it is looked whether the host is calm again.
const LOOKS_MAX: u32 = 12;
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(2);
/// How long a look keeps all processors busy: nothing is taken from those that rest.
const LOOK: Duration = Duration::from_millis(300);

/// Rests until the host takes little, half a minute at most. A host that takes much does so for a while, and from those who
/// use much.
pub fn rest_until_calm() {
    for _ in 0..LOOKS_MAX {
        std::thread::sleep(PAUSE);
        if taken_while_busy().is_none_or(|part| part <= DISTURBED) {
            return;
        }
    }
}

fn taken_while_busy() -> Option<f64> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let (before, began) = (Ticks::now(), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..cpus {
            scope.spawn(|| while began.elapsed() < LOOK {});
        }
    });
    between(before, Ticks::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_part_is_that_of_all_processors_and_guests_are_not_counted_twice() {
        let before = Ticks::parse("cpu  100 0 50 800 10 0 5 35 90 0\ncpu0 1 2\n").expect("well formed");
        let after = Ticks::parse("cpu  150 0 60 820 10 0 5 55 140 0\n").expect("well formed");
        assert_eq!((before.all, after.all), (1000, 1100));
        assert_eq!(before.stolen_until(after), Some(0.2));
        assert_eq!(after.stolen_until(before), None);
        assert_eq!(before.stolen_until(before), None);
        assert_eq!(between(Some(before), None), None);
    }

    #[test]
    fn a_look_keeps_the_processors_busy_and_finds_a_part() {
        let began = Instant::now();
        let part = taken_while_busy();
        assert!(began.elapsed() >= LOOK && part.is_some_and(|part| (0.0..=1.0).contains(&part)), "{part:?}");
    }

    #[test]
    fn what_is_no_such_line_tells_nothing() {
        for text in ["", "cpu0 1 2 3 4 5 6 7 8", "cpu  1 2 3", "cpu  1 2 x 4 5 6 7 8"] {
            assert_eq!(Ticks::parse(text), None, "{text}");
        }
        assert!(Ticks::now().is_some());
    }

    #[test]
    fn what_the_host_disturbed_is_done_again_and_the_calmest_counts() {
        let run = |spare: u32, all: &[f64]| {
            let (mut left, mut all) = (spare, all.iter());
            let rests = Cell::new(0);
            let rest = || rests.set(rests.get() + 1);
            let found = calmest(&mut left, |part| *part, rest, || all.next().copied().ok_or("no more"));
            found.map(|(part, repeats)| {
                assert_eq!(repeats, rests.get(), "a rest before each");
                (part, repeats, left)
            })
        };
        assert_eq!(run(5, &[0.01, 0.0]), Ok((0.01, 0, 5)), "calm at once");
        assert_eq!(run(5, &[0.3, 0.06, 0.04, 0.0]), Ok((0.04, 2, 3)));
        assert_eq!(run(2, &[0.1, 0.2, 0.3, 0.0]), Ok((0.1, 2, 0)), "never calm");
        assert_eq!(run(0, &[0.9, 0.0]), Ok((0.9, 0, 0)), "nothing to spare");
        assert_eq!(run(5, &[0.9]), Err("no more"));
    }
}
