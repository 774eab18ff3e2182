//! Draws a copyset's leadership to the target through which its IO comes in.
//!
//! A host attached to one target pays a forwarding hop for every IO whose leader is elsewhere.
//! The leader counts where its IO comes from; when one other target brings most of it in two
//! windows running, leadership goes there. Two windows and a lead of three to one are the
//! hysteresis: two hosts that share a volume do not make leaders wander.

use protocol::types::{Span, TargetId, Time};

/// How long IO is counted before it is judged.
const WINDOW: Span = Span::ms(1_000);
/// Fewer IOs than this in a window say nothing.
const SAMPLE_MIN: u32 = 50;
/// The candidate's share of all IO must be at least 3 of 4.
const SHARE: (u32, u32) = (3, 4);
/// Most origins told apart; further ones count as "others".
const ORIGINS_MAX: usize = 8;

/// Where one copyset's IO comes from.
#[derive(Default)]
pub struct Affinity {
    origins: Vec<(TargetId, u32)>,
    total: u32,
    window_end: Time,
    candidate: Option<TargetId>,
}

impl Affinity {
    /// Counts one IO.
    pub fn count(&mut self, origin: TargetId) {
        self.total += 1;
        if let Some((_, count)) = self.origins.iter_mut().find(|(target, _)| *target == origin) {
            *count += 1;
        } else if self.origins.len() < ORIGINS_MAX {
            self.origins.push((origin, 1));
        }
    }

    /// At the end of a window: the target that leadership should go to, if it is not `me`.
    pub fn judge(&mut self, me: TargetId, now: Time) -> Option<TargetId> {
        if now < self.window_end {
            return None;
        }
        self.window_end = now + WINDOW;
        let leading = self.leading().filter(|target| *target != me);
        let (previous, total) = (self.candidate.take(), std::mem::take(&mut self.total));
        self.origins.clear();
        if total < SAMPLE_MIN {
            return None;
        }
        if leading.is_some() && leading == previous {
            return leading;
        }
        self.candidate = leading;
        None
    }

    /// Whether a window is open with something in it.
    pub fn is_counting(&self) -> bool {
        self.total > 0 || self.candidate.is_some()
    }

    fn leading(&self) -> Option<TargetId> {
        let (target, count) = self.origins.iter().copied().max_by_key(|(_, count)| *count)?;
        (count * SHARE.1 >= self.total * SHARE.0).then_some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: TargetId = TargetId(1);
    const OTHER: TargetId = TargetId(2);

    /// Counts `mine` and `theirs` in each of the windows, and says where leadership went.
    fn windows(counts: &[(u32, u32)]) -> Vec<Option<TargetId>> {
        let mut affinity = Affinity::default();
        let judge = |(at, (mine, theirs)): (usize, &(u32, u32))| {
            (0..*mine).for_each(|_| affinity.count(ME));
            (0..*theirs).for_each(|_| affinity.count(OTHER));
            affinity.judge(ME, Time(at as u64 * WINDOW.0))
        };
        counts.iter().enumerate().map(judge).collect()
    }

    #[test]
    fn a_steady_majority_elsewhere_draws_leadership_in_the_second_window() {
        assert_eq!(windows(&[(10, 90), (10, 90)]), [None, Some(OTHER)]);
    }

    #[test]
    fn a_burst_or_a_shared_volume_moves_nothing() {
        assert_eq!(windows(&[(10, 90), (90, 10), (10, 90)]), [None, None, None]);
        assert_eq!(windows(&[(40, 60), (40, 60), (40, 60)]), [None, None, None]);
        assert_eq!(windows(&[(0, 20), (0, 20)]), [None, None], "too few to judge");
    }
}
