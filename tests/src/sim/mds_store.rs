//! What metadata servers keep, and which of them leads: a database of one process, or etcd as seen by several.
//!
//! Transactions are durable at once or not at all; servers crash before and after. Among several, the one that
//! leads has a lease and renews it; the rules are those of `mds-lite`: it takes itself for the leader only while
//! a renewal that was answered says so, counted from before it was sent (`election.rs`), and its writes are
//! compared with its place (`store/etcd.rs`). Both of these need a clock and sockets, so they are written anew here.

use mds_lite::state::Change;
use protocol::types::{Span, Time};

/// How long a lease lasts.
pub const LEASE: Span = Span::ms(2_000);

/// The store.
#[derive(Default)]
pub struct Store {
    /// Every change there was; loading applies them all.
    log: Vec<Change>,
    /// Counts the leaders there were.
    term: u64,
    /// When the place is free again.
    until: Time,
    /// Transactions.
    pub commits: u64,
}

impl Store {
    /// Who leads now has this number.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// A place that is free is taken: the number of the new leader.
    pub fn campaign(&mut self, now: Time) -> Option<u64> {
        if now < self.until {
            return None;
        }
        (self.term, self.until) = (self.term + 1, now + LEASE);
        Some(self.term)
    }

    /// The only process opens its database.
    pub fn open(&mut self) -> u64 {
        self.term += 1;
        self.term
    }

    /// Renews a lease; false when another leads by now, or it has run out.
    pub fn renew(&mut self, term: u64, now: Time) -> bool {
        let holds = term == self.term && now < self.until;
        if holds {
            self.until = now + LEASE;
        }
        holds
    }

    /// Makes changes durable, if this one leads.
    pub fn commit(&mut self, term: u64, changes: &[Change]) -> bool {
        let leads = term == self.term;
        if leads {
            self.log.extend_from_slice(changes);
            self.commits += 1;
        }
        leads
    }

    /// Every record, as the changes that make it.
    pub fn load(&self) -> Vec<Change> {
        self.log.clone()
    }
}
