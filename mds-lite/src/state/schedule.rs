//! The schedulers: which replica is to move where, and what each target is told to do about it.
//!
//! ```text
//! heartbeat: reports -> learn (a membership that is committed becomes the record) -> orders for the sender
//! tick:      end what is done or lost its place -> begin what is needed, in order of need
//! ```
//!
//! A [`Task`] is a set of voters that a copyset is to have. Its leader walks there by itself
//! (target-daemon/shard/orders.rs); the MDS repeats the goal with each heartbeat until the leader reports
//! it. Tasks are kept in memory only: an MDS that starts again finds half-done changes in the reports, and
//! decides anew what is needed, or tidies up.
//!
//! Invariants: one task a copyset, which replaces, adds or takes away one replica; no more than
//! [`Policy::tasks_a_target`] tasks fill a target at once; a replica is freed only when its copyset's
//! leader has said, after every order that names it has expired, that it is not a member.

use super::{Change, Replica, State};
use crate::placement::{self, Domain, Node};
use crate::record::{CopysetRecord, PoolId, TargetRecord};
use protocol::control::pb;
use protocol::types::{CopysetId, LogIndex, ShardAddr, Span, TargetId, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How long an order may be acted on: a few heartbeats at the longest interval that is usual.
pub const ORDER_VALID: Span = Span::ms(15_000);
/// A task that changes nothing for so long is given up; what is needed is then decided anew.
const STALLED: Span = Span::ms(600_000);
/// How long a target that was told to hand over a copyset is left alone: until its reports show it.
const HAND_OVER_PAUSE: Span = Span::ms(5_000);
/// Most tasks at once, so that looking after them stays cheap.
const TASKS_MAX: usize = 1024;
/// How many of the last tasks say how fast it goes.
const FINISHED_KEPT: usize = 64;
/// A target this full takes no further replica.
const FULL_PERCENT: u64 = 90;

/// How sure it is that a target is there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Presence {
    /// It was heard of lately.
    Online,
    /// It has missed heartbeats: no host is sent there, its replicas are waited for.
    Unstable,
    /// It is given up: its replicas are built elsewhere.
    Offline,
}

/// Why a replica moves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Why {
    /// A replica is lost.
    Recover,
    /// The copyset has fewer or more replicas than its pool wants.
    Count,
    /// A target is being emptied.
    Drain,
    /// A change was given up halfway.
    Tidy,
    /// A target is fuller than another.
    Balance,
}

impl Why {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Recover => "recover",
            Self::Count => "count",
            Self::Drain => "drain",
            Self::Tidy => "tidy",
            Self::Balance => "balance",
        }
    }
}

/// A change of one copyset's voters under way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Task {
    /// Why.
    pub why: Why,
    /// Who is to vote in the end.
    pub goal: Vec<ShardAddr>,
    /// Whose replica goes.
    pub from: Option<TargetId>,
    /// Where a new one comes.
    pub to: Option<ShardAddr>,
    /// Since when.
    pub began: Time,
    /// When reports last differed from those before.
    progress_at: Time,
    progress: (usize, usize, u64),
}

/// In memory only.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    tasks: BTreeMap<CopysetId, Task>,
    /// Until when an order may be acted on that names a target as a replica of a copyset.
    named: BTreeMap<(CopysetId, TargetId), Time>,
    /// Until when a target may act on an order to free its replica of a copyset.
    dropping: BTreeMap<(CopysetId, TargetId), Time>,
    /// Since when a target that is online has not reported a replica that it should have.
    missing: BTreeMap<(CopysetId, TargetId), Time>,
    /// Leadership that is to go from a target to another.
    hand_overs: BTreeMap<TargetId, (CopysetId, TargetId)>,
    /// When a target was last told to hand over.
    handed_over: BTreeMap<TargetId, Time>,
    /// When the last tasks were done.
    finished: VecDeque<Time>,
    /// Replicas that are still to be moved, built or taken away, those under way included.
    outstanding: usize,
}

impl State {
    /// How sure it is that a target is there. Before the first heartbeat the MDS's own start counts.
    pub fn presence(&self, target: TargetId, now: Time) -> Presence {
        let silent = now - self.seen.get(&target).map_or(Time::default(), |seen| seen.at);
        match () {
            () if silent <= self.policy.unstable_after && self.seen.contains_key(&target) => Presence::Online,
            () if silent <= self.policy.offline_after => Presence::Unstable,
            () => Presence::Offline,
        }
    }

    /// What no two replicas of any copyset of a pool share, as they are now.
    pub fn pool_domain(&self, pool: PoolId) -> Option<Domain> {
        let nodes: BTreeMap<TargetId, Node> =
            self.targets.iter().map(|(id, r)| (*id, node(*id, r))).collect();
        let apart = |members: &[ShardAddr], domain| {
            let pairs =
                members.iter().enumerate().flat_map(|(at, m)| members[..at].iter().map(move |o| (m, o)));
            pairs.into_iter().all(|(a, b)| nodes[&a.target].is_apart(&nodes[&b.target], domain))
        };
        let members = || self.pools[&pool].copysets.iter().map(|id| &self.copysets[id].members);
        // Hosts that nobody named may all be one.
        let named = nodes.values().any(|node| !node.host.is_empty());
        let domains = [Domain::Zone, Domain::Host, Domain::Target];
        domains
            .into_iter()
            .filter(|domain| named || *domain != Domain::Host)
            .find(|domain| members().all(|m| apart(m, *domain)))
    }

    /// The change under way.
    pub fn task(&self, copyset: CopysetId) -> Option<&Task> {
        self.schedule.tasks.get(&copyset)
    }

    /// All changes under way.
    pub fn tasks(&self) -> impl Iterator<Item = (CopysetId, &Task)> {
        self.schedule.tasks.iter().map(|(id, task)| (*id, task))
    }

    /// Replicas still to be moved, built or taken away, and how long that takes at the pace of the last ones.
    pub fn outstanding(&self) -> (usize, Option<Span>) {
        let Schedule { finished, outstanding, .. } = &self.schedule;
        let pace = finished.back().zip(finished.front()).map(|(last, first)| (*last - *first).0);
        let steps = finished.len().saturating_sub(1) as u64;
        let left = pace.filter(|_| steps > 0 && *outstanding > 0);
        (*outstanding, left.map(|pace| Span(pace / steps * *outstanding as u64)))
    }

    /// The report of whoever leads a copyset, and on which target that is.
    pub fn leading(&self, copyset: CopysetId, now: Time) -> Option<(TargetId, &Replica)> {
        let record = self.copysets.get(&copyset)?;
        let goal = self.schedule.tasks.get(&copyset).map_or(&[][..], |task| &task.goal);
        let places = record.members.iter().chain(goal).map(|member| member.target);
        let reports = places.filter(|target| self.is_online(*target, now)).filter_map(|target| {
            let replica = self.seen[&target].replicas.get(&copyset)?;
            let leads = replica.role == i32::from(pb::ReplicaRole::Leader) && replica.membership.is_some();
            leads.then_some((target, replica))
        });
        reports.max_by_key(|(target, replica)| (replica.term, *target))
    }

    /// What leaders report as committed becomes the record. A report that is older than the record, as of a
    /// leader that does not know yet that it was deposed, changes nothing.
    pub(super) fn learn(&self, replicas: &[Replica]) -> Vec<Change> {
        let learned = |replica: &Replica| {
            let told = replica.membership.as_ref().filter(|m| m.settled && !m.voters.is_empty())?;
            let record = self.copysets.get(&replica.copyset)?;
            let at = (replica.term.0, replica.commit.0);
            let known = |m: &ShardAddr| {
                self.targets.get(&m.target).is_some_and(|t| usize::from(m.shard) < t.peers.len())
            };
            if at < record.told || is_same(&told.voters, &record.members) || !told.voters.iter().all(known) {
                return None;
            }
            // Those that stay keep their order: the first is the one meant to lead.
            let stays = record.members.iter().filter(|m| told.voters.contains(m));
            let comes = told.voters.iter().filter(|m| !record.members.contains(m));
            let members = stays.chain(comes).copied().collect();
            let epoch = record.epoch + 1;
            Some(Change::Copyset(replica.copyset, CopysetRecord { members, epoch, told: at, ..*record }))
        };
        let leaders = replicas.iter().filter(|r| r.role == i32::from(pb::ReplicaRole::Leader));
        leaders.filter_map(learned).collect()
    }

    /// What a target is to do, now that its heartbeat has been taken in.
    pub(super) fn orders(&mut self, target: TargetId, now: Time) -> Vec<pb::Order> {
        let mut orders = Vec::new();
        let order = |copyset: CopysetId, what| pb::Order {
            copyset: copyset.0,
            what: Some(what),
            valid_ms: (ORDER_VALID.0 / 1_000_000) as u32,
        };
        let mut named = Vec::new();
        for (id, task) in &self.schedule.tasks {
            let hosts = task.to.filter(|to| to.target == target);
            if let Some(to) = hosts.filter(|to| !self.is_held(*id, *to)) {
                orders.push(order(*id, pb::order::What::HostOnShard(to.shard.into())));
                named.push((*id, target));
            }
            let leads = self.leading(*id, now).is_some_and(|(leader, _)| leader == target);
            // The new replica is there before anybody counts on it.
            let there = task.to.is_none_or(|to| self.is_held(*id, to));
            if leads && there {
                let members = task.goal.iter().copied().map(protocol::control::shard_to_pb).collect();
                orders.push(order(*id, pb::order::What::Voters(pb::Voters { members })));
                named.extend(task.goal.iter().map(|member| (*id, member.target)));
            }
        }
        if let Some((id, to)) = self.schedule.hand_overs.remove(&target) {
            orders.push(order(id, pb::order::What::Lead(to.0)));
            self.schedule.handed_over.insert(target, now);
        }
        let until = now + ORDER_VALID;
        self.schedule.named.extend(named.into_iter().map(|key| (key, until)));
        let orphans = self.seen[&target].replicas.keys().filter_map(|id| self.drop_after(*id, target, now));
        let orphans: Vec<_> = orphans.collect();
        self.schedule.dropping.extend(orphans.iter().map(|(id, _)| ((*id, target), until)));
        let orphans = orphans.into_iter();
        orders.extend(orphans.map(|(id, index)| order(id, pb::order::What::DropAfter(index.0))));
        orders
    }

    /// Whether a target reports a replica of a copyset on that very shard.
    fn is_held(&self, id: CopysetId, at: ShardAddr) -> bool {
        self.seen.get(&at.target).and_then(|seen| seen.replicas.get(&id)).is_some_and(|r| r.shard == at.shard)
    }

    /// Whether a target may still follow an order to free its replica of a copyset: a new one would be freed too.
    fn is_dropping(&self, id: CopysetId, target: TargetId, now: Time) -> bool {
        self.schedule.dropping.get(&(id, target)).is_some_and(|until| now <= *until)
    }

    /// Whether a replica that a target reports is none of its copyset's any more, and as of which index.
    fn drop_after(&self, id: CopysetId, target: TargetId, now: Time) -> Option<(CopysetId, LogIndex)> {
        let record = self.copysets.get(&id)?;
        let meant = |members: &[ShardAddr]| members.iter().any(|m| m.target == target);
        let wanted = self.schedule.tasks.get(&id).is_some_and(|task| meant(&task.goal));
        if meant(&record.members) || wanted {
            return None;
        }
        // An MDS that ran before this one may have given orders too.
        let orders_end = Time::default() + ORDER_VALID;
        let orders_end = self.schedule.named.get(&(id, target)).copied().unwrap_or_default().max(orders_end);
        let (leader, report) = self.leading(id, now)?;
        let told = report.membership.as_ref().filter(|m| m.settled)?;
        let heard = self.seen[&leader].at;
        let gone = !meant(&told.voters) && !meant(&told.learners);
        (gone && heard > orders_end && now > orders_end).then_some((id, report.commit))
    }

    /// Lets time pass: ends tasks, and begins those that are needed most.
    pub(super) fn tick(&mut self, now: Time) {
        // Right after the start nobody has reported yet.
        if now < Time::default() + self.policy.unstable_after + self.policy.unstable_after {
            return;
        }
        self.note_missing(now);
        self.end_tasks(now);
        let needs = if self.most_are_silent(now) { Vec::new() } else { self.needs(now) };
        self.schedule.outstanding = needs.len() + self.schedule.tasks.len();
        if self.schedule.outstanding == 0 {
            self.schedule.finished.clear();
        }
        let quiet = needs.is_empty() && self.schedule.tasks.is_empty() && !self.most_are_silent(now);
        for (why, id, victim) in needs {
            if self.schedule.tasks.len() >= TASKS_MAX {
                return;
            }
            self.begin(id, why, victim, now);
        }
        self.schedule.hand_overs.clear();
        if quiet {
            self.balance(now);
            self.balance_leaders(now);
        }
        self.schedule.named.retain(|_, until| now < *until + ORDER_VALID + ORDER_VALID);
        self.schedule.dropping.retain(|_, until| now <= *until);
    }

    /// Then it is more likely that the MDS is cut off than that all of them are lost, and the few that are left
    /// could not take everything: nothing is begun.
    pub fn most_are_silent(&self, now: Time) -> bool {
        let there = self.targets.keys().filter(|id| self.presence(**id, now) == Presence::Online).count();
        there * 2 < self.targets.len()
    }

    /// A target's word that it has no replica may be older than the replica. It counts only once the target knew the
    /// newest map when it gave it, and not while the leader hears a replica there.
    fn note_missing(&mut self, now: Time) {
        let mut missing = BTreeMap::new();
        for (id, record) in &self.copysets {
            for member in &record.members {
                let Some(seen) = self.seen.get(&member.target) else { continue };
                let lacks = seen.reported && !seen.replicas.contains_key(id);
                if !lacks || self.is_heard(*id, member.target, now) {
                    continue;
                }
                let key = (*id, member.target);
                let knew = seen.known_generation >= self.counters.generation;
                let since = self.schedule.missing.get(&key).copied().or(knew.then_some(now));
                missing.extend(since.map(|since| (key, since)));
            }
        }
        self.schedule.missing = missing;
    }

    /// Whether a copyset's leader says that the replica of a target answers it.
    fn is_heard(&self, id: CopysetId, target: TargetId, now: Time) -> bool {
        let told = self.leading(id, now).and_then(|(_, replica)| replica.membership.as_ref());
        told.is_some_and(|m| m.lags.iter().any(|lag| lag.target == target.0 && lag.alive))
    }

    /// A replica that will not come back by itself.
    fn is_lost(&self, id: CopysetId, member: ShardAddr, now: Time) -> bool {
        let Some(seen) = self.seen.get(&member.target) else {
            return self.presence(member.target, now) == Presence::Offline;
        };
        let since = self.schedule.missing.get(&(id, member.target));
        let missing = since.is_some_and(|since| now - *since > self.policy.offline_after);
        self.presence(member.target, now) == Presence::Offline
            || seen.failed_shards.contains(&member.shard)
            || missing
    }

    fn end_tasks(&mut self, now: Time) {
        let mut ended = Vec::new();
        for (id, task) in &self.schedule.tasks {
            let report = self.leading(*id, now).and_then(|(_, replica)| replica.membership.as_ref());
            let reached = report
                .is_some_and(|m| m.settled && is_same(&m.voters, &task.goal) && m.learners.is_empty())
                && is_same(&self.copysets[id].members, &task.goal);
            // A place that is lost, or no longer wanted, before the replica there has a vote.
            let voted = |to: ShardAddr| self.copysets[id].members.contains(&to);
            let misplaced = task.to.is_some_and(|to| {
                let away = self.presence(to.target, now) == Presence::Offline;
                let failed = self.seen.get(&to.target).is_some_and(|s| s.failed_shards.contains(&to.shard));
                let leaves = self.targets.get(&to.target).is_none_or(|t| t.draining);
                !voted(to) && (away || failed || leaves)
            });
            if reached || misplaced || now - task.progress_at > STALLED {
                ended.push((*id, reached, task.clone()));
            }
        }
        for (id, reached, task) in ended {
            self.schedule.tasks.remove(&id);
            let (why, from, to) = (task.why.word(), task.from, task.to);
            if reached {
                tracing::info!(copyset = id.0, why, ?from, ?to, "replica moved");
                self.schedule.finished.push_back(now);
                if self.schedule.finished.len() > FINISHED_KEPT {
                    self.schedule.finished.pop_front();
                }
            } else {
                tracing::warn!(copyset = id.0, why, ?from, ?to, "change of replicas given up");
            }
        }
        self.note_progress(now);
    }

    fn note_progress(&mut self, now: Time) {
        let progress = |id: CopysetId, task: &Task| {
            let told = self.leading(id, now).and_then(|(_, replica)| replica.membership.as_ref())?;
            let lag = task.to.and_then(|to| told.lags.iter().find(|lag| lag.target == to.target.0));
            Some((told.voters.len(), told.learners.len(), lag.map_or(0, |lag| lag.entries)))
        };
        let now_at: Vec<_> = self.tasks().map(|(id, task)| (id, progress(id, task))).collect();
        for (id, progress) in now_at {
            let Some(task) = self.schedule.tasks.get_mut(&id) else { continue };
            if let Some(progress) = progress.filter(|progress| *progress != task.progress) {
                (task.progress, task.progress_at) = (progress, now);
            }
        }
    }

    /// What is to be done and is not under way, the most urgent first: a copyset and the member that is to go.
    fn needs(&self, now: Time) -> Vec<(Why, CopysetId, Option<ShardAddr>)> {
        let mut needs = Vec::new();
        for (id, record) in &self.copysets {
            if self.schedule.tasks.contains_key(id) {
                continue;
            }
            let wanted = self.pools[&record.pool].replicas as usize;
            let lost = record.members.iter().find(|m| self.is_lost(*id, **m, now));
            let leaves = |m: &&ShardAddr| self.targets.get(&m.target).is_none_or(|t| t.draining);
            let told = self.leading(*id, now).and_then(|(_, replica)| replica.membership.as_ref());
            let halfway = told.is_some_and(|m| {
                m.settled && (!m.learners.is_empty() || !is_same(&m.voters, &record.members))
            });
            let need = if lost.is_some() {
                Some((Why::Recover, lost.copied()))
            } else if record.members.len() < wanted {
                Some((Why::Count, None))
            } else if record.members.len() > wanted {
                Some((Why::Count, self.least_needed(record, now)))
            } else if let Some(leaver) = record.members.iter().find(leaves) {
                Some((Why::Drain, Some(*leaver)))
            } else {
                halfway.then_some((Why::Tidy, None))
            };
            needs.extend(need.map(|(why, victim)| (why, *id, victim)));
        }
        // Copysets that lost most first.
        needs.sort_by_key(|(why, id, _)| {
            let whole = self.copysets[id].members.iter().filter(|m| !self.is_lost(*id, **m, now)).count();
            (*why, whole, *id)
        });
        needs
    }

    /// Which of too many replicas is to go: one on a target that leaves, else on the fullest.
    fn least_needed(&self, record: &CopysetRecord, now: Time) -> Option<ShardAddr> {
        let held = self.held();
        let order = |m: &&ShardAddr| {
            let leaves = self.targets.get(&m.target).is_none_or(|t| t.draining);
            let presence = self.presence(m.target, now);
            (leaves, presence, held.get(&m.target).copied().unwrap_or(0), m.target)
        };
        record.members.iter().max_by_key(order).copied()
    }

    fn held(&self) -> BTreeMap<TargetId, u32> {
        let mut held = BTreeMap::new();
        for member in self.copysets.values().flat_map(|c| &c.members) {
            *held.entry(member.target).or_default() += 1;
        }
        held
    }

    /// Begins a task, if its copyset has a leader and there is a place for what is to come.
    fn begin(&mut self, id: CopysetId, why: Why, victim: Option<ShardAddr>, now: Time) {
        let record = &self.copysets[&id];
        let pool = &self.pools[&record.pool];
        if self.leading(id, now).is_none() {
            return;
        }
        let kept: Vec<ShardAddr> = record.members.iter().copied().filter(|m| Some(*m) != victim).collect();
        let goes = victim.map(|m| m.target);
        let comes = why != Why::Tidy && kept.len() < pool.replicas as usize;
        let place = if comes { self.place_for(id, record, &kept, goes, now) } else { None };
        if comes && place.is_none() {
            return;
        }
        // What a target has lost it cannot be given while it still votes for it: then its vote goes first, which
        // nobody can count on any more, and what is missing is built when that is done.
        let to = place.filter(|to| Some(to.target) != goes);
        let goal: Vec<ShardAddr> = kept.into_iter().chain(to).collect();
        if goal.is_empty() {
            return;
        }
        self.add_task(id, why, goal, goes, to, now);
    }

    fn add_task(
        &mut self,
        id: CopysetId,
        why: Why,
        goal: Vec<ShardAddr>,
        from: Option<TargetId>,
        to: Option<ShardAddr>,
        now: Time,
    ) {
        // A replica that was there before, and is not freed yet, is taken on where it lies: a target has one of
        // a copyset at most.
        let old = to.and_then(|to| self.seen.get(&to.target)?.replicas.get(&id));
        let place = |to: ShardAddr| ShardAddr { shard: old.map_or(to.shard, |old| old.shard), ..to };
        let goal = goal.into_iter().map(|m| if Some(m) == to { place(m) } else { m }).collect();
        let to = to.map(place);
        tracing::info!(copyset = id.0, why = why.word(), ?from, ?to, "replica is to move");
        let task = Task { why, goal, from, to, began: now, progress_at: now, progress: (0, 0, 0) };
        self.schedule.tasks.insert(id, task);
    }

    /// Where a new replica comes beside those that are kept. On the target whose replica goes only where none of
    /// the others is as good: it would have to leave before it can come.
    fn place_for(
        &self,
        id: CopysetId,
        record: &CopysetRecord,
        kept: &[ShardAddr],
        goes: Option<TargetId>,
        now: Time,
    ) -> Option<ShardAddr> {
        let pool = &self.pools[&record.pool];
        let nodes = self.nodes(record.pool, now);
        let domain = placement::strongest(&nodes, pool.replicas as usize).unwrap_or(Domain::Target);
        let busy = self.busy();
        let takes = |node: &&Node| {
            let tasks = busy.get(&node.target).copied().unwrap_or(0);
            tasks < self.policy.tasks_a_target
                && self.has_room(node.target)
                && !self.is_dropping(id, node.target, now)
        };
        let free: Vec<Node> = nodes.iter().filter(takes).cloned().collect();
        // A replica that was begun there already is worth keeping.
        let told = self.leading(id, now).and_then(|(_, replica)| replica.membership.as_ref());
        let begun = told.into_iter().flat_map(|m| &m.learners).find(|m| {
            free.iter().any(|n| n.target == m.target) && !kept.iter().any(|k| k.target == m.target)
        });
        let begun = begun.copied();
        let all: Vec<Node> = self.targets.iter().map(|(id, record)| node(*id, record)).collect();
        let kept: Vec<&Node> = all.iter().filter(|n| kept.iter().any(|k| k.target == n.target)).collect();
        let apart = |to: ShardAddr| {
            let node = all.iter().find(|n| n.target == to.target)?;
            kept.iter().all(|k| node.is_apart(k, domain)).then_some(to)
        };
        if let Some(begun) = begun.and_then(apart) {
            return Some(begun);
        }
        let shared = |target: TargetId| {
            let meets = |c: &&CopysetRecord| {
                c.members.iter().any(|m| m.target == target)
                    && c.members.iter().any(|m| kept.iter().any(|k| k.target == m.target))
            };
            // Only for a moderate number of copysets is this worth looking at.
            if self.copysets.len() > 4096 { 0 } else { self.copysets.values().filter(meets).count() }
        };
        // Weaker domains rather than none: what is said of the pool says so too.
        let others: Vec<Node> = free.iter().filter(|n| Some(n.target) != goes).cloned().collect();
        [domain, Domain::Host, Domain::Target]
            .into_iter()
            .filter(|weaker| *weaker <= domain)
            .flat_map(|domain| [(&others, domain), (&free, domain)])
            .find_map(|(nodes, domain)| placement::choose(nodes, &kept, domain, shared))
    }

    /// Tasks that fill a target.
    fn busy(&self) -> BTreeMap<TargetId, u32> {
        let mut busy = BTreeMap::new();
        for to in self.schedule.tasks.values().filter_map(|task| task.to) {
            *busy.entry(to.target).or_default() += 1;
        }
        busy
    }

    fn has_room(&self, target: TargetId) -> bool {
        let Some(usage) = self.seen.get(&target).map(|seen| seen.usage) else { return false };
        u128::from(usage.used) * 100 <= u128::from(usage.capacity) * u128::from(FULL_PERCENT)
    }

    /// Targets that may take replicas of a pool, with what they hold and what is on its way to them.
    pub(super) fn nodes(&self, pool: PoolId, now: Time) -> Vec<Node> {
        let of_pool = self.pools.get(&pool).map(|record| &record.targets);
        let takes = |id: &TargetId, record: &TargetRecord| {
            let chosen = of_pool.is_none_or(|of| of.is_empty() || of.contains(&id.0));
            let fit = self.seen.get(id).is_some_and(|seen| seen.failed_shards.is_empty());
            chosen && fit && !record.draining && self.presence(*id, now) == Presence::Online
        };
        let mut nodes: BTreeMap<TargetId, Node> = self
            .targets
            .iter()
            .filter(|(id, record)| takes(id, record))
            .map(|(id, record)| (*id, node(*id, record)))
            .collect();
        self.count_replicas(&mut nodes);
        nodes.into_values().collect()
    }

    /// Adds what the copysets, as they are to be, place on each.
    pub(super) fn count_replicas(&self, nodes: &mut BTreeMap<TargetId, Node>) {
        for (id, record) in &self.copysets {
            let members = self.schedule.tasks.get(id).map_or(&record.members, |task| &task.goal);
            for (at, member) in members.iter().enumerate() {
                if let Some(node) = nodes.get_mut(&member.target)
                    && let Some(count) = node.shards.get_mut(usize::from(member.shard))
                {
                    *count += 1;
                    node.leads += u32::from(at == 0);
                }
            }
        }
    }

    /// Leaders go from targets that lead more than their share of what they hold to those that lead less.
    /// Where IO comes from decides more than this does: copysets that are busy are left where they are.
    fn balance_leaders(&mut self, now: Time) {
        let mut leads: BTreeMap<TargetId, i64> = BTreeMap::new();
        let mut idle: BTreeMap<TargetId, Vec<CopysetId>> = BTreeMap::new();
        for id in self.copysets.keys() {
            let Some((leader, report)) = self.leading(*id, now) else { return };
            *leads.entry(leader).or_default() += 1;
            if report.membership.as_ref().is_some_and(|m| m.settled && !m.busy) {
                idle.entry(leader).or_default().push(*id);
            }
        }
        let mut shares: BTreeMap<TargetId, f64> = BTreeMap::new();
        for record in self.copysets.values() {
            let stays = |m: &&ShardAddr| self.targets.get(&m.target).is_some_and(|t| !t.draining);
            let members: Vec<_> = record.members.iter().filter(stays).collect();
            members.iter().for_each(|m| *shares.entry(m.target).or_default() += 1.0 / members.len() as f64);
        }
        let above = |leads: &BTreeMap<TargetId, i64>, target: TargetId| {
            leads.get(&target).copied().unwrap_or(0) as f64 - shares.get(&target).copied().unwrap_or(0.0)
        };
        for (from, ids) in idle {
            let told = self.schedule.handed_over.get(&from);
            if told.is_some_and(|at| now < *at + HAND_OVER_PAUSE) {
                continue;
            }
            let lower = |id: &CopysetId| {
                let members = self.copysets[id].members.iter().filter(|m| m.target != from);
                let heirs = members.filter(|m| self.presence(m.target, now) == Presence::Online);
                let heir = heirs.min_by(|a, b| above(&leads, a.target).total_cmp(&above(&leads, b.target)));
                // One moved brings the two nearer by 2: from 1.5 apart to at most 0.5.
                let gains = |heir: TargetId| above(&leads, from) - above(&leads, heir) >= 1.5;
                heir.map(|m| (*id, m.target)).filter(|(_, heir)| gains(*heir))
            };
            if let Some((id, heir)) = ids.iter().find_map(lower) {
                *leads.entry(from).or_default() -= 1;
                *leads.entry(heir).or_default() += 1;
                self.schedule.hand_overs.insert(from, (id, heir));
            }
        }
    }

    /// When nothing else is to be done: replicas go from the fullest targets to the emptiest.
    fn balance(&mut self, now: Time) {
        for pool in self.pools.keys().copied().collect::<Vec<_>>() {
            for _ in 0..self.policy.tasks_a_target {
                let nodes = self.nodes(pool, now);
                let record = &self.pools[&pool];
                let Some(domain) = placement::strongest(&nodes, record.replicas as usize) else { break };
                let ids = &record.copysets;
                let copysets: Vec<_> = ids.iter().map(|id| self.copysets[id].members.clone()).collect();
                let busy = self.busy();
                let movable = |at: usize| {
                    let id = ids[at];
                    let there = |m: &ShardAddr| self.presence(m.target, now) == Presence::Online;
                    !self.schedule.tasks.contains_key(&id)
                        && self.copysets[&id].members.iter().all(there)
                        && self.leading(id, now).is_some()
                };
                let Some(step) = placement::next_move(&nodes, domain, &copysets, movable) else { break };
                let taken = busy.get(&step.to.target).copied().unwrap_or(0);
                let dropping = self.is_dropping(ids[step.copyset], step.to.target, now);
                if taken >= self.policy.tasks_a_target || !self.has_room(step.to.target) || dropping {
                    break;
                }
                let members = copysets[step.copyset].iter();
                let place = |m: &ShardAddr| if m.target == step.from { step.to } else { *m };
                let goal = members.map(place).collect();
                self.add_task(ids[step.copyset], Why::Balance, goal, Some(step.from), Some(step.to), now);
            }
        }
    }
}

/// A target as placement sees it, holding nothing.
pub(super) fn node(id: TargetId, record: &TargetRecord) -> Node {
    Node {
        zone: record.zone.clone(),
        host: record.host.clone(),
        weight: record.capacity_bytes.max(1),
        ..Node::empty(id, record.peers.len())
    }
}

/// Whether two memberships have the same members, in any order.
fn is_same(one: &[ShardAddr], other: &[ShardAddr]) -> bool {
    one.iter().collect::<BTreeSet<_>>() == other.iter().collect()
}
