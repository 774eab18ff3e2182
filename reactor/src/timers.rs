//! Deadlines of one loop, in the order (time, when it was set); equal times fire in the order
//! they were set, so a replay fires them alike.
//!
//! Timers are not cancelled: the loop keeps with each timer what it needs to see that it is
//! stale (a generation, a request id) and ignores it. Whoever re-arms often keeps one timer
//! and moves its deadline when it fires.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use protocol::types::Time;

/// A queue of deadlines, each with what is due then.
pub struct Timers<T> {
    heap: BinaryHeap<Reverse<Timer<T>>>,
    next_seq: u64,
}

struct Timer<T> {
    at: Time,
    seq: u64,
    what: T,
}

impl<T> Timers<T> {
    /// Without timers.
    pub fn new() -> Self {
        Self { heap: BinaryHeap::new(), next_seq: 0 }
    }

    /// Sets a timer.
    pub fn set(&mut self, at: Time, what: T) {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.heap.push(Reverse(Timer { at, seq, what }));
    }

    /// The earliest deadline, for [`crate::Reactor::turn`].
    pub fn next_deadline(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse(timer)| timer.at)
    }

    /// The earliest timer if it is due.
    pub fn pop_due(&mut self, now: Time) -> Option<T> {
        if self.next_deadline()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(timer)| timer.what)
    }

    /// How many are set.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Ord for Timer<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}
impl<T> PartialOrd for Timer<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> PartialEq for Timer<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<T> Eq for Timer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_deadlines_fire_in_the_order_they_were_set() {
        let mut timers = Timers::new();
        for (at, what) in [(20, 'c'), (10, 'a'), (20, 'd'), (10, 'b')] {
            timers.set(Time(at), what);
        }
        assert_eq!(timers.next_deadline(), Some(Time(10)));
        let mut fired = String::new();
        while let Some(what) = timers.pop_due(Time(10)) {
            fired.push(what);
        }
        assert_eq!(fired, "ab");
        while let Some(what) = timers.pop_due(Time(30)) {
            fired.push(what);
        }
        assert_eq!(fired, "abcd");
        assert!(timers.is_empty());
    }
}
