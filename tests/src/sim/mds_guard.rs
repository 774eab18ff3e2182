//! What changes of memberships must keep to, whatever the servers order.
//!
//! - from one committed membership to the next at most one voter comes or goes, and three always stay, unless the
//!   one that goes never held a replica;
//! - a replica that was freed has no vote when it is made anew;
//! - a replica is freed only when the committed membership does not name it, and neither does the map on its
//!   target's disk: nothing that a restart reads makes it anew with a vote;
//! - a server that answers as the leader is the one that leads;
//! - each change wanted replaces, adds or takes away one replica, and moves none within a target; no target is filled
//!   by more than its share;
//! - no more changes begin than there are reasons for (`note_reasons`).

use super::{Failure, Mix};
use mds_lite::state::State;
use mds_lite::state::schedule::Presence;
use protocol::map::ClusterMap;
use protocol::raft::Members;
use protocol::types::{CopysetId, LogIndex, ShardAddr, TargetId, Time};
use reactor::sim::SimReactor;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use target_daemon::core_loop::Core;

/// A replica comes before another goes: no copyset ever has fewer voters.
const VOTERS_LEAST: usize = 3;

/// See the module.
pub struct Guard {
    shards: usize,
    /// The newest committed membership, and an index as of which it was seen.
    members: BTreeMap<CopysetId, (LogIndex, Members)>,
    /// What each node held when it was last looked at, and how far that was committed.
    held: BTreeMap<usize, BTreeMap<CopysetId, LogIndex>>,
    /// Replicas that there ever were, and those that were freed.
    ever: BTreeSet<(usize, CopysetId)>,
    once_freed: BTreeSet<(usize, CopysetId)>,
    /// Changes wanted, by when they began, and the voters wanted.
    tasks: BTreeMap<CopysetId, (Time, Vec<ShardAddr>)>,
    /// Targets as the leading server knew them: given up, being emptied.
    targets: BTreeMap<TargetId, (bool, bool)>,
    /// Changes that there was a reason for, at most.
    reasons: u64,
    /// Changes of voters that were committed.
    pub changes: u64,
    /// Replicas freed.
    pub freed: u64,
    /// Changes that servers began.
    pub begun: u64,
}

impl Guard {
    /// Has seen nothing yet.
    pub fn new(mix: &Mix) -> Self {
        Self {
            shards: mix.shards,
            members: BTreeMap::new(),
            held: BTreeMap::new(),
            ever: BTreeSet::new(),
            once_freed: BTreeSet::new(),
            tasks: BTreeMap::new(),
            targets: BTreeMap::new(),
            reasons: 0,
            changes: 0,
            freed: 0,
            begun: 0,
        }
    }

    fn node_of(&self, member: ShardAddr) -> usize {
        (member.target.0 as usize - 1) * self.shards + usize::from(member.shard)
    }

    /// A node's power is cut: what it holds is read anew when it starts.
    pub fn crashed(&mut self, node: usize) {
        self.held.remove(&node);
    }

    /// Looks at a node after one of its turns.
    ///
    /// # Errors
    /// A rule is broken.
    pub fn look(
        &mut self,
        node: usize,
        core: &Core<SimReactor>,
        has_failed: bool,
        cache: &Option<Arc<ClusterMap>>,
    ) -> Result<(), Failure> {
        let mut held = self.held.remove(&node).unwrap_or_default();
        let now: BTreeSet<CopysetId> = core.replicas().map(|(id, _)| id).collect();
        if !has_failed {
            for id in held.keys().filter(|id| !now.contains(id)) {
                self.freed(node, *id, cache)?;
            }
        }
        held.retain(|id, _| now.contains(id));
        for (id, replica) in core.replicas() {
            let commit = replica.commit_index();
            let seen = held.insert(id, commit);
            self.ever.insert((node, id));
            // One whose making was not durable when power was cut has promised nothing.
            let was_freed = self.once_freed.contains(&(node, id));
            if seen.is_none() && was_freed && replica.last_index() == LogIndex(0) {
                self.made(node, id, *replica.members())?;
            }
            if seen != Some(commit) && replica.floor().0 <= commit && !replica.is_installing() {
                self.committed(id, commit, replica.members_as_of(commit))?;
            }
        }
        self.held.insert(node, held);
        Ok(())
    }

    /// One that was freed has no vote when it is made anew: what it promised is forgotten.
    fn made(&self, node: usize, id: CopysetId, members: Members) -> Result<(), Failure> {
        let target = TargetId((node / self.shards) as u32 + 1);
        match self.members.get(&id) {
            Some((at, now)) if members.is_voter(target) && !now.is_voter(target) => Err(Failure(format!(
                "made anew: node {node} has a new replica of copyset {id} with a vote among {members:?}, though its members as of {at} are {now:?}"
            ))),
            _ => Ok(()),
        }
    }

    fn committed(&mut self, id: CopysetId, index: LogIndex, members: Members) -> Result<(), Failure> {
        let voters = |members: &Members| members.voters().collect::<BTreeSet<ShardAddr>>();
        match self.members.get(&id) {
            Some((at, _)) if index <= *at => return Ok(()),
            Some((at, before)) if *before != members => {
                let (old, new) = (voters(before), voters(&members));
                let changed = old.symmetric_difference(&new).count();
                self.changes += changed as u64;
                let counts = |m: &&ShardAddr| self.ever.contains(&(self.node_of(**m), id));
                if new.len() < VOTERS_LEAST && old.difference(&new).any(|m| counts(&m)) {
                    return Err(Failure(format!(
                        "membership: copyset {id} has {} voters as of {index}, {members:?}",
                        new.len()
                    )));
                }
                if changed > 1 {
                    return Err(Failure(format!(
                        "membership: copyset {id} went from {before:?} (as of {at}) to {members:?} (as of {index}) at once"
                    )));
                }
            }
            // Learners have no members of their own before they hear a leader.
            None if members.voters().next().is_none() => return Ok(()),
            _ => {}
        }
        self.members.insert(id, (index, members));
        Ok(())
    }

    fn freed(&mut self, node: usize, id: CopysetId, cache: &Option<Arc<ClusterMap>>) -> Result<(), Failure> {
        self.freed += 1;
        self.once_freed.insert((node, id));
        let target = TargetId((node / self.shards) as u32 + 1);
        let me = ShardAddr { target, shard: (node % self.shards) as u16 };
        let mapped = cache.as_ref().and_then(|map| map.copysets.get(&id));
        let is_mapped = mapped.is_some_and(|entry| entry.members.contains(&me));
        match self.members.get(&id) {
            Some((at, members)) if members.find(target).is_some() => Err(Failure(format!(
                "freed too early: node {node} freed its replica of copyset {id}, whose members as of {at} are {members:?}"
            ))),
            _ if is_mapped => Err(Failure(format!(
                "freed too early: node {node} freed its replica of copyset {id}, which the map on its disk names"
            ))),
            _ => Ok(()),
        }
    }

    /// A server answers as the leader.
    pub fn answers(&self, server: usize, term: u64, leads: u64) -> Result<(), Failure> {
        if term == leads {
            return Ok(());
        }
        Err(Failure(format!("two servers act: server {server} of term {term}, though term {leads} leads")))
    }

    /// Looks at what the leading server wants, by its own clock.
    ///
    /// # Errors
    /// A rule is broken.
    pub fn wants(&mut self, state: &State, now: Time) -> Result<(), Failure> {
        self.note_reasons(state, now);
        let mut filled: BTreeMap<TargetId, u32> = BTreeMap::new();
        for (id, task) in state.tasks() {
            *filled.entry(task.to.map_or(TargetId(0), |to| to.target)).or_default() += 1;
            let began = (task.began, task.goal.clone());
            if self.tasks.get(&id) == Some(&began) {
                continue;
            }
            self.tasks.insert(id, began);
            self.begun += 1;
            let members = state.map().copysets.get(&id).map_or(&[][..], |entry| &entry.members);
            let comes = task.goal.iter().filter(|m| !members.contains(m)).count();
            let goes = members.iter().filter(|m| !task.goal.contains(m)).count();
            if comes > 1 || goes > 1 || task.goal.is_empty() {
                return Err(Failure(format!(
                    "orders: copyset {id} is to go from {members:?} to {:?} at once",
                    task.goal
                )));
            }
            // It would have to lose the one before it gets the other.
            let moved = |m: &&ShardAddr| members.iter().any(|o| o.target == m.target && o != *m);
            if task.goal.iter().any(|m| moved(&m)) {
                return Err(Failure(format!(
                    "orders: a replica of copyset {id} is to move within a target, from {members:?} to {:?}",
                    task.goal
                )));
            }
        }
        if self.begun > self.reasons {
            return Err(Failure(format!(
                "operator storm: {} changes of replicas begun, though there were reasons for {}",
                self.begun, self.reasons
            )));
        }
        filled.remove(&TargetId(0));
        let most = state.policy().tasks_a_target;
        match filled.iter().find(|(_, count)| **count > most) {
            Some((target, count)) => {
                Err(Failure(format!("orders: {count} replicas are built on target {target} at once")))
            }
            None => Ok(()),
        }
    }

    /// What may make replicas move, and how many: a target that is given up or emptied, all that it holds; one
    /// that comes, comes back or is used again, its share of all; a change given up, itself and what it left.
    fn note_reasons(&mut self, state: &State, now: Time) {
        let map = state.map();
        let held = |target: TargetId| {
            let holds = |c: &&protocol::map::CopysetEntry| c.members.iter().any(|m| m.target == target);
            map.copysets.values().filter(holds).count() as u64
        };
        for (id, entry) in &map.targets {
            let is_gone = state.presence(*id, now) == Presence::Offline;
            let as_now = (is_gone, entry.draining);
            let before = self.targets.insert(*id, as_now);
            if before == Some(as_now) {
                continue;
            }
            self.reasons += if is_gone || entry.draining { held(*id) } else { map.copysets.len() as u64 };
        }
        let ended: Vec<CopysetId> =
            self.tasks.keys().copied().filter(|id| state.task(*id).is_none()).collect();
        for id in ended {
            let goal = self.tasks.remove(&id).map_or(Vec::new(), |(_, goal)| goal);
            let members = map.copysets.get(&id).map_or(&[][..], |entry| &entry.members);
            let is_reached = members.len() == goal.len() && members.iter().all(|m| goal.contains(m));
            self.reasons += if is_reached { 0 } else { 2 };
        }
    }

    /// Another server leads: it decides anew on what was under way.
    pub fn another_leads(&mut self) {
        self.reasons += 2 * self.tasks.len() as u64;
        self.tasks.clear();
    }
}
