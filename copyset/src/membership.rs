//! Membership: in force as soon as it is in the log, gone when it is cut off again.

use crate::api::Role;
use crate::replica::Replica;
use protocol::raft::{Body, Members};
use protocol::types::LogIndex;

/// Whether one voter at most comes or goes, so that any majority of the one membership meets any of
/// the other. A voter that moves to another shard of its target must leave first.
pub(crate) fn is_one_step(from: &Members, to: &Members) -> bool {
    let lost = from.voters().filter(|m| !to.is_voter(m.target)).count();
    let won = to.voters().filter(|m| !from.is_voter(m.target)).count();
    let moved = to.all().any(|m| from.find(m.target).is_some_and(|old| old != m));
    to.voters().next().is_some() && lost + won <= 1 && !moved
}

impl Replica {
    pub(crate) fn adopt_members(&mut self, index: LogIndex, members: Members) {
        self.changes.push(index);
        self.members = members;
        if self.role == Role::Leader {
            self.sync_peers();
        }
    }

    /// Finds the changes in the log anew.
    pub(crate) fn scan_members(&mut self) {
        let floor = self.log.floor().0;
        let entries = self.log.from(floor.next());
        let is_change = |e: &&protocol::raft::Entry| matches!(e.body, Body::Members(_));
        self.changes = entries.filter(is_change).map(|e| e.index).collect();
        self.members = self.latest_members();
    }

    fn latest_members(&self) -> Members {
        let latest = self.changes.last().and_then(|at| self.log.get(*at));
        match latest.map(|e| e.body) {
            Some(Body::Members(members)) => members,
            _ => self.base_members,
        }
    }

    /// The log was cut at `from`.
    pub(crate) fn revert_members(&mut self, from: LogIndex) {
        let before = self.changes.len();
        self.changes.retain(|at| *at < from);
        if self.changes.len() != before {
            self.members = self.latest_members();
        }
    }

    /// The log is about to lose the entries up to `floor`.
    pub(crate) fn compact_members(&mut self, floor: LogIndex) {
        if let Some(at) = self.changes.iter().rfind(|at| **at <= floor)
            && let Some(Body::Members(members)) = self.log.get(*at).map(|e| e.body)
        {
            self.base_members = members;
        }
        self.changes.retain(|at| *at > floor);
    }

    /// The membership as of an entry of the log, or of the floor.
    pub fn members_as_of(&self, index: LogIndex) -> Members {
        let change = self.changes.iter().rfind(|at| **at <= index).and_then(|at| self.log.get(*at));
        match change.map(|e| e.body) {
            Some(Body::Members(members)) => members,
            _ => self.base_members,
        }
    }

    /// Whether the membership in force is committed, so that no later leader takes it back.
    pub fn members_settled(&self) -> bool {
        self.changes.last().is_none_or(|at| *at <= self.commit)
    }

    /// The membership as of the floor, to be kept with it.
    pub fn floor_members(&self) -> &Members {
        &self.base_members
    }
}
