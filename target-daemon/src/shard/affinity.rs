//! Draws a copyset's leadership to the target through which its IO comes in.
//!
//! A host attached to one target pays a forwarding hop for every IO whose leader is elsewhere.
//! The leader counts where its IO comes from; when one other target brings most of it in two
//! windows running, leadership goes there. Two windows and a lead of three to one are the
//! hysteresis: two hosts that share a volume do not make leaders wander. Leadership stays where it
//! was drawn while the host pauses: the next burst would have to draw it again.

use protocol::types::{Span, TargetId, Time};

/// How long IO is counted before it is judged, at most.
const WINDOW: Span = Span::ms(1_000);
/// A window that has counted `SAMPLE_ENOUGH` ends after this.
const WINDOW_MIN: Span = Span::ms(200);
/// So many IOs in a window need no more to be judged.
const SAMPLE_ENOUGH: u32 = 200;
/// Fewer IOs than this in a window say nothing.
const SAMPLE_MIN: u32 = 50;
/// How long after the last IO the copyset is still left where it is.
const KEPT: Span = Span::ms(60_000);
/// The candidate's share of all IO must be at least 3 of 4.
const SHARE: (u32, u32) = (3, 4);
/// Most origins told apart; further ones count as "others".
const ORIGINS_MAX: usize = 8;

/// Where one copyset's IO comes from.
#[derive(Default)]
pub struct Affinity {
    origins: Vec<(TargetId, u32)>,
    total: u32,
    window_begin: Time,
    candidate: Option<TargetId>,
    /// The end of the last window with IO in it.
    used: Option<Time>,
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
        let window = if self.total < SAMPLE_ENOUGH { WINDOW } else { WINDOW_MIN };
        if now < self.window_begin + window {
            return None;
        }
        self.window_begin = now;
        if self.total > 0 {
            self.used = Some(now);
        }
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

    /// Whether IO came lately: leadership is where that wants it.
    pub fn is_in_use(&self, now: Time) -> bool {
        self.total > 0 || self.used.is_some_and(|at| now < at + KEPT)
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
    fn windows(window: Span, counts: &[(u32, u32)]) -> Vec<Option<TargetId>> {
        let mut affinity = Affinity::default();
        let judge = |(at, (mine, theirs)): (usize, &(u32, u32))| {
            (0..*mine).for_each(|_| affinity.count(ME));
            (0..*theirs).for_each(|_| affinity.count(OTHER));
            affinity.judge(ME, Time((at as u64 + 1) * window.0))
        };
        counts.iter().enumerate().map(judge).collect()
    }

    #[test]
    fn a_steady_majority_elsewhere_draws_leadership_in_the_second_window() {
        assert_eq!(windows(WINDOW, &[(10, 90), (10, 90)]), [None, Some(OTHER)]);
    }

    #[test]
    fn a_burst_or_a_shared_volume_moves_nothing() {
        assert_eq!(windows(WINDOW, &[(10, 90), (90, 10), (10, 90)]), [None, None, None]);
        assert_eq!(windows(WINDOW, &[(40, 60), (40, 60), (40, 60)]), [None, None, None]);
        assert_eq!(windows(WINDOW, &[(0, 20), (0, 20)]), [None, None], "too few to judge");
    }

    #[test]
    fn much_io_draws_sooner() {
        assert_eq!(windows(WINDOW_MIN, &[(10, 190), (10, 190)]), [None, Some(OTHER)]);
        assert_eq!(windows(WINDOW_MIN, &[(10, 20), (10, 20)]), [None, None], "too early to judge");
    }

    #[test]
    fn a_pause_leaves_it_in_use_for_a_while() {
        let mut affinity = Affinity::default();
        assert!(!affinity.is_in_use(Time(0)), "never used");
        affinity.count(ME);
        let end = Time(0) + WINDOW;
        assert_eq!(affinity.judge(ME, end), None);
        assert!(affinity.is_in_use(Time(end.0 + KEPT.0 - 1)));
        assert!(!affinity.is_in_use(end + KEPT));
    }
}
