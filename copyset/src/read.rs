//! Linearizable reads: by lease, or by a round confirmed by a majority (ReadIndex).
//!
//! A lease rests on the rounds that a majority confirmed: each of them refuses its vote for an
//! election time-out after it heard the round, so after it was *sent*, no other leader can be
//! elected for that long. The lease is shorter by the allowed drift between two clocks.

use crate::api::{Action, ReadGrant, Refused, Role};
use crate::queue::pop_front_if;
use crate::replica::Replica;
use protocol::types::{LogIndex, Time};

/// Most reads waiting for confirmation.
const READS_PENDING_MAX: usize = 4096;

#[derive(Clone)]
pub(crate) struct PendingRead {
    token: u64,
    /// Must be applied first.
    index: LogIndex,
    /// Must be confirmed by a majority first; not sent yet when `None`.
    round: Option<u64>,
}

impl Replica {
    /// Asks to read the applied state, linearizably. With [`ReadGrant::Later`], `token` comes
    /// back in an action. What was acknowledged to a client must have been applied here.
    pub fn read(&mut self, token: u64, now: Time) -> Result<ReadGrant, Refused> {
        self.observe(now);
        self.refuse_unless_leader()?;
        self.stir();
        let index = self.commit_told.max(self.first_index);
        if self.holds_lease(self.now) && self.applied >= index {
            return Ok(ReadGrant::Now);
        }
        if self.reads.len() >= READS_PENDING_MAX {
            return Err(Refused::Busy);
        }
        self.reads.push_back(PendingRead { token, index, round: None });
        self.beat = true;
        Ok(ReadGrant::Later)
    }

    /// Whether reads need no confirmation at this time.
    pub fn holds_lease(&self, now: Time) -> bool {
        if self.role != Role::Leader || self.transfer.is_some_and(|t| t.told) {
            return false;
        }
        let sent = self.quorum_of(Some(now), |p| p.leased);
        sent.is_some_and(|sent: Time| now < self.lease_end(sent))
    }

    pub(crate) fn stamp_reads(&mut self, round: u64) {
        for read in self.reads.iter_mut().rev().take_while(|r| r.round.is_none()) {
            read.round = Some(round);
        }
    }

    pub(crate) fn step_reads(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let confirmed = self.quorum_of(u64::MAX, |p| p.confirmed);
        let applied = self.applied;
        let ready = |r: &PendingRead| r.round.is_some_and(|n| n <= confirmed) && r.index <= applied;
        while let Some(read) = pop_front_if(&mut self.reads, ready) {
            self.out.push_back(Action::ReadReady { token: read.token });
        }
    }

    pub(crate) fn abort_reads(&mut self) {
        for read in self.reads.drain(..) {
            self.out.push_back(Action::ReadAborted { token: read.token });
        }
    }
}
