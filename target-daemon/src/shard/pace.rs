//! How fast a shard takes in what its replicas catch up with, so that hosts are served meanwhile.
//!
//! A bucket that fills at the rate allowed, up to what may be asked for at once. Whoever finds it empty
//! waits until it holds one largest fetch again.

use protocol::types::{ENTRY_BYTES_MAX, Span, Time};

/// What may be asked for at once after a pause: eight of the largest fetches.
const BURST_BYTES: u64 = 8 * ENTRY_BYTES_MAX as u64;

/// The bucket.
#[derive(Debug)]
pub struct Pace {
    /// 0: no limit.
    bytes_s: u64,
    credit: u64,
    filled_at: Time,
    /// Somebody found it empty and waits.
    waited_for: bool,
    turn: usize,
}

impl Pace {
    /// A full one.
    pub fn new(bytes_s: u64, now: Time) -> Self {
        Self { bytes_s, credit: BURST_BYTES, filled_at: now, waited_for: false, turn: 0 }
    }

    /// Whether so much may be asked for at `now`; then it counts as asked for.
    pub fn take(&mut self, bytes: u64, now: Time) -> bool {
        debug_assert!(bytes <= ENTRY_BYTES_MAX as u64);
        if self.bytes_s == 0 {
            return true;
        }
        self.fill(now);
        let taken = self.credit.checked_sub(bytes);
        self.credit = taken.unwrap_or(self.credit);
        self.waited_for |= taken.is_none();
        taken.is_some()
    }

    fn fill(&mut self, now: Time) {
        let gained = u128::from((now - self.filled_at).0) * u128::from(self.bytes_s) / 1_000_000_000;
        if gained > 0 {
            self.credit =
                u64::try_from(gained).unwrap_or(u64::MAX).saturating_add(self.credit).min(BURST_BYTES);
            self.filled_at = now;
        }
    }

    /// When those who wait are to try again.
    pub fn due(&self) -> Option<Time> {
        let lacks = u128::from((ENTRY_BYTES_MAX as u64).saturating_sub(self.credit)) * 1_000_000_000;
        let after = lacks.div_ceil(u128::from(self.bytes_s.max(1)));
        self.waited_for.then_some(self.filled_at + Span(u64::try_from(after).unwrap_or(u64::MAX / 2)))
    }

    /// Which of so many comes first this time.
    pub fn turn(&mut self, of: usize) -> usize {
        self.turn = self.turn.wrapping_add(1);
        self.turn.checked_rem(of).unwrap_or(0)
    }

    /// Whether those who wait are to try again now; they are then waited for no more.
    pub fn is_due(&mut self, now: Time) -> bool {
        let due = self.due().is_some_and(|at| at <= now);
        self.waited_for &= !due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FETCH: u64 = ENTRY_BYTES_MAX as u64;

    /// Bytes taken within a time by one that tries whenever it is due.
    fn taken(bytes_s: u64, length: Span, fetch: u64) -> u64 {
        let (mut pace, mut now, mut taken) = (Pace::new(bytes_s, Time(7)), Time(7), 0);
        let end = now + length;
        while now < end {
            while pace.take(fetch, now) {
                taken += fetch;
            }
            let due = pace.due().expect("it was found empty");
            assert!(due > now, "waiting makes progress");
            assert!(!pace.is_due(now) && pace.is_due(due));
            now = due;
        }
        taken
    }

    #[test]
    fn over_time_the_rate_is_kept_whatever_is_asked_for_at_once() {
        for bytes_s in [1 << 20, 32 << 20, 1 << 30] {
            for fetch in [4096, FETCH / 2, FETCH] {
                let wanted = 10 * bytes_s;
                let got = taken(bytes_s, Span::ms(10_000), fetch);
                assert!(got <= wanted + 2 * BURST_BYTES, "{got} of {wanted} at {bytes_s}");
                assert!(got * 10 >= wanted * 9, "{got} of {wanted} at {bytes_s} by {fetch}");
            }
        }
    }

    #[test]
    fn a_long_pause_earns_no_more_than_one_burst() {
        let mut pace = Pace::new(1 << 20, Time(0));
        let later = Time(0) + Span::ms(3_600_000);
        let all = std::iter::repeat_with(|| pace.take(FETCH, later)).take_while(|taken| *taken).count();
        assert_eq!(all as u64 * FETCH, BURST_BYTES);
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let mut pace = Pace::new(0, Time(0));
        assert!((0..10_000).all(|_| pace.take(FETCH, Time(0))));
        assert_eq!(pace.due(), None);
    }
}
