//! How long one may go on as the leader, by a clock that is passed in: the election's part that the simulator
//! runs too.
//!
//! Invariant: it ends no later than at whoever gave it, since it is counted from before it was asked for.

use protocol::types::{Span, Time};
use std::sync::atomic::{AtomicU64, Ordering};

/// Not held until it is extended.
#[derive(Default, Debug)]
pub struct Lease {
    /// In nanoseconds of the holder's clock.
    until: AtomicU64,
}

impl Lease {
    /// What was asked for at this moment was given for so long.
    pub fn extend(&self, asked: Time, length: Span) {
        self.until.store((asked + length).0, Ordering::Release);
    }

    /// It is given up, or known to be lost.
    pub fn end(&self) {
        self.until.store(0, Ordering::Release);
    }

    /// Whether it goes on at this moment.
    pub fn holds(&self, now: Time) -> bool {
        now.0 < self.until.load(Ordering::Acquire)
    }
}
