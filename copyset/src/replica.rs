//! One replica: its state, the events it takes, the actions it gives.

use crate::api::*;
use core::ops::Range;
use protocol::raft::{Body, Entry, Members, Message};
use protocol::types::{LogIndex, ShardAddr, Term, Time};

/// One replica of one copyset.
pub struct Replica {
    config: Config,
}

#[allow(unused_variables, missing_docs)]
impl Replica {
    pub fn new(config: Config, recovered: Recovered, now: Time) -> Self {
        Self { config }
    }
    /// Takes a message; gives the entries of an Append that are new here (payloads needed).
    pub fn handle(&mut self, from: ShardAddr, message: Message, now: Time) -> Range<LogIndex> {
        LogIndex(0)..LogIndex(0)
    }
    pub fn tick(&mut self, now: Time) {}
    pub fn next_timeout(&self) -> Option<Time> {
        None
    }
    pub fn propose(&mut self, body: Body, now: Time) -> Result<LogIndex, Refused> {
        Err(Refused::Busy)
    }
    pub fn read(&mut self, token: u64, now: Time) -> Result<ReadGrant, Refused> {
        Err(Refused::Busy)
    }
    pub fn durable(&mut self, ticket: u64) {}
    pub fn applied(&mut self, index: LogIndex) {}
    pub fn compact(&mut self, floor: LogIndex) {}
    pub fn install_begin(&mut self) {}
    pub fn install_finish(
        &mut self,
        floor: (LogIndex, Term),
        members: Members,
        whole_at: LogIndex,
        now: Time,
    ) {
    }
    pub fn transfer_leadership(&mut self, to: protocol::types::TargetId, now: Time) -> Result<(), Refused> {
        Err(Refused::Busy)
    }
    pub fn change_members(&mut self, members: Members, now: Time) -> Result<LogIndex, Refused> {
        Err(Refused::Busy)
    }
    pub fn wake(&mut self, now: Time) {}
    pub fn poll(&mut self) -> Option<Action> {
        None
    }
    pub fn term(&self) -> Term {
        Term(0)
    }
    pub fn role(&self) -> Role {
        Role::Follower
    }
    pub fn leader(&self) -> Option<ShardAddr> {
        None
    }
    pub fn commit_index(&self) -> LogIndex {
        LogIndex(0)
    }
    pub fn applied_index(&self) -> LogIndex {
        LogIndex(0)
    }
    pub fn last_index(&self) -> LogIndex {
        LogIndex(0)
    }
    pub fn floor(&self) -> (LogIndex, Term) {
        (LogIndex(0), Term(0))
    }
    pub fn entry(&self, index: LogIndex) -> Option<&Entry> {
        None
    }
    pub fn members(&self) -> &Members {
        unreachable!("{:?}", self.config)
    }
    pub fn health(&self) -> Health {
        Health::Whole
    }
    pub fn lags(&self) -> impl Iterator<Item = Lag> + '_ {
        [].into_iter()
    }
    pub fn is_hibernating(&self) -> bool {
        false
    }
    /// Messages ignored because no correct peer sends them.
    pub fn violations(&self) -> u64 {
        0
    }
}
