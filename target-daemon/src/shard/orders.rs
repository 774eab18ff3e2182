//! What the MDS wants done with replicas here: hold a new one, change a copyset's voters, hand over
//! leadership, free a replica that was removed.
//!
//! An order is a goal, not a step: the same one comes with every heartbeat until reports show it done, so
//! each may be lost or come twice. The leader walks towards its goal one change at a time: add as a
//! learner, wait until that has caught up, let it vote, take the vote of who leaves. Each follows as soon
//! as the one before is committed: with a voter more and one of them dead, writes wait for all the others.
//! It stops when the order has expired: an MDS that has not renewed one may rely on nobody following it
//! any more.
//!
//! Invariants: only a copyset's own log changes its membership; a replica is freed only when the map does
//! not name it any more (which is on disk here before the shard sees it, so that no restart makes it anew
//! with a vote) and its own log does not know better than the MDS.

use super::{Shard, Work};
use copyset::{Health, Lag, Refused, Role};
use protocol::raft::Members;
use protocol::types::{CopysetId, LogIndex, ShardAddr, TargetId, Time};

/// A learner that misses no more than this may vote: what a leader may have in flight to it.
pub(super) const CAUGHT_UP_ENTRIES: u64 = 256;

/// What the MDS wants of a replica here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// Of which copyset.
    pub copyset: CopysetId,
    /// What.
    pub what: OrderKind,
    /// Not to be acted on later.
    pub until: Time,
}

/// See [`Order`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OrderKind {
    /// Hold an empty replica without a vote on this shard.
    Host {
        /// Index of the shard.
        shard: u16,
    },
    /// To the leader: make these the voters.
    Voters(Vec<ShardAddr>),
    /// To the leader: hand over to the replica on this target.
    Lead(TargetId),
    /// Free the replica, which was removed from the copyset at or before this index.
    Drop {
        /// Committed by then.
        after: LogIndex,
    },
}

/// Voters wanted, as long as the order is valid.
pub struct Goal {
    voters: Vec<ShardAddr>,
    until: Time,
    /// Where the step under way is in the log.
    step: Option<LogIndex>,
}

impl Goal {
    /// Whether a commit up to here ends the step under way; said once.
    pub(super) fn is_next(&mut self, up_to: LogIndex) -> bool {
        self.step.take_if(|step| *step <= up_to).is_some()
    }
}

/// The next step from a membership to the voters that are wanted.
#[derive(PartialEq, Eq, Debug)]
enum Step {
    Done,
    /// A learner has not caught up.
    Wait,
    Change(Members),
    /// The leader is to leave: first it hands over.
    HandOver(TargetId),
}

impl Shard {
    /// What the MDS wants; orders for other shards of the target are among them.
    pub fn follow_orders(&mut self, orders: &[Order], now: Time) {
        self.now = now;
        if self.failed {
            return;
        }
        for order in orders.iter().filter(|order| now < order.until) {
            let id = order.copyset;
            match &order.what {
                OrderKind::Host { shard } if *shard == self.settings.me.shard => self.host_learner(id),
                OrderKind::Host { .. } => {}
                OrderKind::Voters(voters) => {
                    if let Some(hosted) = self.hosted.get_mut(&id) {
                        let step = hosted.goal.take().and_then(|goal| goal.step);
                        self.restless.insert(id);
                        hosted.goal = Some(Goal { voters: voters.clone(), until: order.until, step });
                        self.pursue(id);
                    }
                }
                OrderKind::Lead(to) => {
                    if self.transfer_leadership(id, *to, now).is_ok() {
                        self.counts.transfers += 1;
                    }
                }
                OrderKind::Drop { after } => self.drop_replica(id, *after),
            }
        }
    }

    fn host_learner(&mut self, id: CopysetId) {
        if !self.hosted.contains_key(&id) {
            tracing::info!(copyset = id.0, "a new replica is held here, to be filled");
            self.create(id, &[], Health::Whole);
        }
    }

    /// Takes the next step towards a goal, if there is one.
    pub(super) fn pursue(&mut self, id: CopysetId) {
        let (me, now) = (self.settings.me.target, self.now);
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let leads = hosted.replica.role() == Role::Leader;
        let Some(mut goal) = hosted.goal.take().filter(|goal| leads && now < goal.until) else { return };
        let lags: Vec<Lag> = hosted.replica.lags().collect();
        let step = next_step(hosted.replica.members(), &goal.voters, &lags, me);
        let done = match step {
            Step::Done => return,
            Step::Wait => Ok(()),
            Step::HandOver(to) => hosted.replica.transfer_leadership(to, now),
            Step::Change(members) => hosted.replica.change_members(members, now).map(|index| {
                tracing::info!(copyset = id.0, index = index.0, ?members, "membership changes");
                goal.step = Some(index);
            }),
        };
        match done {
            Ok(()) | Err(Refused::Busy) => hosted.goal = Some(goal),
            Err(refused) => {
                tracing::warn!(copyset = id.0, %refused, "an order of the MDS cannot be followed")
            }
        }
        self.touch(id);
    }

    /// Frees a replica that was removed from its copyset, once nothing here is at work on it.
    fn drop_replica(&mut self, id: CopysetId, after: LogIndex) {
        let me = self.settings.me;
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let named = self.map.copysets.get(&id).is_none_or(|entry| entry.members.contains(&me));
        let replica = &hosted.replica;
        let knows_better = replica.members().find(me.target).is_some() && replica.commit_index() > after;
        if named || knows_better || replica.role() == Role::Leader {
            return;
        }
        hosted.catch_up = None;
        hosted.wants_rebuild = false;
        if self.work.iter().any(|(_, work)| work.concerns(id))
            || self.repairs.keys().any(|(of, ..)| *of == id)
        {
            return; // The order comes again.
        }
        let Some(mut hosted) = self.hosted.remove(&id) else { return };
        tracing::info!(copyset = id.0, "a replica that was removed is freed");
        let waiting = hosted.ordering.drain().map(|write| write.request);
        // Their fate is the copyset's to tell: whoever sent them asks its members.
        for request in waiting.chain(hosted.waiters.iter().map(|waiter| waiter.request)) {
            self.requests.try_remove(request);
        }
        if let Some(at) = hosted.deadline {
            self.timers.remove(&(at, id));
        }
        self.touched.retain(|touched| *touched != id);
        self.persisting.retain(|(_, of, _)| *of != id);
        self.store.stage(chunkstore::Record::Remove { copyset: id }, None, &[]);
        self.store.seal();
    }
}

impl Work {
    /// Whether it needs the replica to be there when it comes back.
    fn concerns(&self, id: CopysetId) -> bool {
        match self {
            Work::Read(read) => read.copyset == id,
            Work::Status(status) => status.copyset() == id,
            Work::Load(load) => load.copyset() == id,
            Work::Merge { copyset, .. }
            | Work::ServeBlocks { copyset, .. }
            | Work::ServeTable { copyset, .. }
            | Work::CatchUpTable { copyset, .. } => *copyset == id,
            // It looks for each replica anew.
            Work::Check(_) => false,
        }
    }
}

/// Learners that nobody wants go first, then who is wanted comes, and only then who is not wanted goes: the
/// copyset never has fewer whole replicas than before.
fn next_step(members: &Members, wanted: &[ShardAddr], lags: &[Lag], me: TargetId) -> Step {
    let (voters, learners): (Vec<_>, Vec<_>) = (members.voters().collect(), members.learners().collect());
    let change = |voters: &[ShardAddr], learners: &[ShardAddr]| match Members::new(voters, learners) {
        Some(members) => Step::Change(members),
        None => Step::Wait,
    };
    let kept: Vec<_> = learners.iter().copied().filter(|m| wanted.contains(m)).collect();
    if kept.len() < learners.len() {
        return change(&voters, &kept);
    }
    let missing = wanted.iter().copied().find(|m| members.find(m.target).is_none());
    if let Some(missing) = missing {
        return change(&voters, &[&kept[..], &[missing]].concat());
    }
    let caught_up = |member: &&ShardAddr| {
        let lag = lags.iter().find(|lag| lag.peer == **member);
        lag.is_some_and(|lag| lag.alive && !lag.installing && lag.entries <= CAUGHT_UP_ENTRIES)
    };
    if let Some(ready) = kept.iter().find(caught_up) {
        let learners: Vec<_> = kept.iter().copied().filter(|m| m != ready).collect();
        return change(&[&voters[..], &[*ready]].concat(), &learners);
    }
    if !kept.is_empty() {
        return Step::Wait;
    }
    let leaves = |m: &&ShardAddr| !wanted.contains(m);
    let Some(leaver) = voters.iter().filter(leaves).min_by_key(|m| m.target == me) else { return Step::Done };
    if leaver.target == me {
        let heirs = lags.iter().filter(|lag| lag.alive && !lag.installing && wanted.contains(&lag.peer));
        return heirs.min_by_key(|lag| lag.entries).map_or(Step::Wait, |lag| Step::HandOver(lag.peer.target));
    }
    let stay: Vec<_> = voters.iter().copied().filter(|m| m != leaver).collect();
    change(&stay, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(target: u32) -> ShardAddr {
        ShardAddr { target: TargetId(target), shard: 0 }
    }
    fn all(targets: &[u32]) -> Vec<ShardAddr> {
        targets.iter().map(|t| at(*t)).collect()
    }
    fn lag(target: u32, entries: u64) -> Lag {
        Lag { peer: at(target), voter: true, entries, installing: entries > 10_000, alive: true }
    }

    /// Walks from voters to voters, target 1 leading while it is a member, then 2; each learner catches up
    /// at once. Tells voters and learners after each change.
    fn walk(from: &[u32], to: &[u32]) -> Vec<(Vec<u32>, Vec<u32>)> {
        let mut members = Members::new(&all(from), &[]).unwrap();
        let (mut leader, mut seen) = (from[0], Vec::new());
        let wanted = all(to);
        for _ in 0..20 {
            let lags: Vec<Lag> =
                members.all().filter(|m| m.target.0 != leader).map(|m| lag(m.target.0, 0)).collect();
            match next_step(&members, &wanted, &lags, TargetId(leader)) {
                Step::Done => return seen,
                Step::Wait => panic!("waits at {members:?}"),
                Step::HandOver(to) => leader = to.0,
                Step::Change(next) => {
                    let ids = |all: Vec<ShardAddr>| all.iter().map(|m| m.target.0).collect::<Vec<_>>();
                    let (old, new) = (members.voters().count(), next.voters().count());
                    assert!(old.abs_diff(new) <= 1, "{members:?} to {next:?}");
                    members = next;
                    seen.push((ids(members.voters().collect()), ids(members.learners().collect())));
                }
            }
        }
        panic!("never done: {seen:?}");
    }

    #[test]
    fn a_replica_is_replaced_by_adding_first_and_removing_last() {
        let steps = walk(&[1, 2, 3], &[1, 2, 4]);
        let expected: Vec<(Vec<u32>, Vec<u32>)> =
            vec![(vec![1, 2, 3], vec![4]), (vec![1, 2, 3, 4], vec![]), (vec![1, 2, 4], vec![])];
        assert_eq!(steps, expected);
    }

    #[test]
    fn a_leader_that_leaves_hands_over_before_it_is_removed() {
        assert_eq!(walk(&[1, 2, 3], &[2, 3, 4]).last().unwrap().0, [2, 3, 4]);
        assert_eq!(walk(&[1], &[2]).last().unwrap().0, [2], "even a lone one");
    }

    #[test]
    fn any_goal_is_reached_from_any_membership() {
        for (from, to) in [(&[1, 2, 3][..], &[4, 5, 6][..]), (&[1], &[1, 2, 3]), (&[1, 2, 3, 4, 5], &[5])] {
            assert_eq!(walk(from, to).last().unwrap().0.len(), to.len(), "{from:?} to {to:?}");
        }
        assert!(walk(&[1, 2, 3], &[3, 2, 1]).is_empty(), "there already");
    }

    #[test]
    fn a_learner_that_lags_is_waited_for_and_one_that_nobody_wants_is_let_go() {
        let members = Members::new(&all(&[1, 2, 3]), &all(&[4])).unwrap();
        let step = |wanted: &[u32], entries| {
            next_step(&members, &all(wanted), &[lag(2, 0), lag(3, 0), lag(4, entries)], TargetId(1))
        };
        assert_eq!(step(&[1, 2, 4], CAUGHT_UP_ENTRIES + 1), Step::Wait);
        assert_eq!(step(&[1, 2, 4], 20_000), Step::Wait, "amid a chunk catch-up");
        assert!(matches!(step(&[1, 2, 4], 1), Step::Change(m) if m.is_voter(TargetId(4))));
        let without = Step::Change(Members::new(&all(&[1, 2, 3]), &[]).unwrap());
        assert_eq!(step(&[1, 2, 3], 0), without);
        assert_eq!(step(&[1, 2, 5], 0), without, "before another one comes");
    }
}
