//! The schedulers against a model of targets and copysets that crash, come back, are cut off and drained,
//! while the MDS itself is restarted. Replays from a seed: `SEED=n` runs one, `SEEDS=n` so many.
//!
//! Hazards: a replica freed that its copyset counts on, a change that leaves a copyset without a quorum, a
//! stale leader believed, copysets that stay degraded though there is room, moves that never end.

use ashlar_mds_lite::record::{Endpoints, Uuid};
use ashlar_mds_lite::state::schedule::Why;
use ashlar_mds_lite::state::{
    Change, Command, Heartbeat, Membership, Policy, Registration, Replica, Reply, State, Usage,
};
use protocol::control::{pb, shard_from_pb};
use protocol::types::{CopysetId, LogIndex, ShardAddr, Span, TargetId, Term, Time};
use std::collections::{BTreeMap, BTreeSet};

const STEP: Span = Span::ms(500);
const CLUSTER: Uuid = Uuid([7; 16]);

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A copyset as it really is.
#[derive(Clone, Debug)]
struct Group {
    voters: Vec<ShardAddr>,
    learners: Vec<ShardAddr>,
    /// The membership is committed.
    settled: bool,
    leader: Option<TargetId>,
    term: u64,
    commit: u64,
    goal: Option<(Vec<ShardAddr>, Time)>,
    /// Who holds everything that was committed.
    whole: BTreeSet<TargetId>,
}

/// What a replica last knew.
#[derive(Clone, Debug)]
struct View {
    leads_until: Option<Time>,
    group: Group,
}

#[derive(Default)]
struct Target {
    up: bool,
    /// Cut off from the other targets, not from the MDS.
    cut: bool,
    dead_for_good: bool,
    replicas: BTreeMap<CopysetId, (u16, Option<View>)>,
    /// Named by the map it has, so that it frees nothing of that.
    mapped: BTreeSet<CopysetId>,
    known_generation: u64,
}

struct World {
    dice: Dice,
    seed: u64,
    now: Time,
    born: Time,
    policy: Policy,
    mds: Option<State>,
    disk: Vec<Change>,
    targets: BTreeMap<TargetId, Target>,
    groups: BTreeMap<CopysetId, Group>,
    drained: BTreeSet<TargetId>,
    begun: usize,
    hand_overs: usize,
    trace: Vec<String>,
}

fn registration(id: TargetId) -> Registration {
    Registration {
        id,
        cluster: None,
        disk_uuid: Uuid([id.0 as u8; 16]),
        peers: vec![([127, 0, 0, 1], 7000 + id.0 as u16).into(), ([127, 0, 0, 1], 8000 + id.0 as u16).into()],
        endpoints: Endpoints::default(),
        capacity_bytes: 64 << 30,
        zone: String::new(),
        host: String::new(),
        labels: BTreeMap::new(),
    }
}

fn has(members: &[ShardAddr], target: TargetId) -> bool {
    members.iter().any(|m| m.target == target)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let targets = 4 + dice.below(5);
        let replicas = [1, 2, 3, 3, 3, 5][dice.below(6)].min(targets as u32 - 1);
        let policy = Policy {
            replicas,
            copysets: 4 + dice.below(20) as u32,
            targets_expected: targets as u32,
            offline_after: Span::ms(10_000),
            ..Policy::default()
        };
        let mds = State::restore(policy, CLUSTER, Vec::new()).unwrap();
        let mut world = Self {
            dice,
            seed,
            now: Time(1),
            born: Time(1),
            policy,
            mds: Some(mds),
            disk: Vec::new(),
            targets: BTreeMap::new(),
            groups: BTreeMap::new(),
            drained: BTreeSet::new(),
            begun: 0,
            hand_overs: 0,
            trace: Vec::new(),
        };
        for id in (1..=targets as u32).map(TargetId) {
            world.targets.insert(id, Target { up: true, ..Target::default() });
            world.run(Command::Register(registration(id))).unwrap();
        }
        world.adopt_maps();
        world
    }

    fn fail(&self, what: impl std::fmt::Display) -> ! {
        let tail = self.trace.iter().rev().take(60).rev().cloned().collect::<Vec<_>>().join("\n");
        panic!("seed {}: {what}\n{tail}", self.seed)
    }

    fn note(&mut self, what: String) {
        let at = (self.now.0 - 1) / 1_000_000;
        self.trace.push(format!("{at:>8} ms {what}"));
    }

    /// The MDS's own clock begins at its start.
    fn mds_now(&self) -> Time {
        Time((self.now - self.born).0)
    }

    fn run(&mut self, command: Command) -> Option<Reply> {
        let now = self.mds_now();
        let mds = self.mds.as_mut()?;
        let decision = mds.decide(now, command).ok()?;
        self.disk.extend(decision.changes.clone());
        mds.apply(decision.changes);
        Some(decision.reply)
    }

    /// Targets that are up learn of the map; a copyset that never changed is made with votes.
    fn adopt_maps(&mut self) {
        let Some(mds) = &self.mds else { return };
        let map = mds.map().clone();
        for (id, target) in self.targets.iter_mut().filter(|(_, t)| t.up) {
            target.known_generation = map.generation;
            target.mapped =
                map.copysets.iter().filter(|(_, c)| has(&c.members, *id)).map(|(c, _)| *c).collect();
            for (copyset, entry) in map.copysets.iter().filter(|(_, c)| c.epoch == 0 && has(&c.members, *id))
            {
                let shard = entry.members.iter().find(|m| m.target == *id).unwrap().shard;
                let group = self.groups.entry(*copyset).or_insert_with(|| Group {
                    voters: entry.members.clone(),
                    learners: Vec::new(),
                    settled: true,
                    leader: None,
                    term: 1,
                    commit: 1,
                    goal: None,
                    whole: BTreeSet::new(),
                });
                if target.replicas.contains_key(copyset) {
                    continue;
                }
                assert!(group.commit <= 1 || !group.whole.contains(id), "made anew with a vote");
                group.whole.insert(*id);
                target.replicas.insert(*copyset, (shard, None));
            }
        }
    }

    fn reaches(&self, target: TargetId) -> bool {
        self.targets[&target].up && !self.targets[&target].cut
    }

    /// Elections, fills, and the leaders' steps.
    fn turn_groups(&mut self) {
        for id in self.groups.keys().copied().collect::<Vec<_>>() {
            let mut group = self.groups[&id].clone();
            let fit = |m: &&ShardAddr| {
                self.reaches(m.target)
                    && group.whole.contains(&m.target)
                    && self.targets[&m.target].replicas.contains_key(&id)
            };
            let able: Vec<TargetId> = group.voters.iter().filter(fit).map(|m| m.target).collect();
            if able.len() * 2 <= group.voters.len() {
                group.leader = None;
                self.groups.insert(id, group);
                continue;
            }
            if group.leader.is_none_or(|leader| !able.contains(&leader)) {
                group.term += 1;
                group.leader = Some(able[self.dice.below(able.len())]);
                group.goal = None;
            }
            group.commit += 1 + self.dice.below(3) as u64;
            group.settled = group.settled || !self.dice.one_in(4);
            for learner in group.learners.clone() {
                let there = self.targets[&learner.target].replicas.contains_key(&id);
                if there && self.reaches(learner.target) && self.dice.one_in(3) {
                    group.whole.insert(learner.target);
                }
            }
            if group.settled {
                self.step(id, &mut group);
            }
            for (target, state) in self.targets.iter_mut().filter(|(_, t)| t.up && !t.cut) {
                if let Some((_, view)) = state.replicas.get_mut(&id) {
                    // Without its peers a leader believes so for 2 s more.
                    let leads_until = (group.leader == Some(*target)).then_some(self.now + Span::ms(2_000));
                    *view = Some(View { leads_until, group: group.clone() });
                }
            }
            self.groups.insert(id, group);
        }
    }

    /// As the leader's shard does (target-daemon/src/shard/orders.rs).
    fn step(&mut self, id: CopysetId, group: &mut Group) {
        let Some((goal, until)) = group.goal.clone().filter(|(_, until)| self.now < *until) else { return };
        let kept: Vec<ShardAddr> = group.learners.iter().copied().filter(|m| goal.contains(m)).collect();
        let missing = goal.iter().find(|m| !has(&group.voters, m.target) && !has(&kept, m.target)).copied();
        let ready = kept.iter().find(|m| group.whole.contains(&m.target)).copied();
        let before = (group.voters.clone(), group.learners.clone());
        if kept.len() < group.learners.len() {
            group.learners = kept;
        } else if let Some(missing) = missing {
            group.learners.push(missing);
        } else if let Some(ready) = ready {
            group.learners.retain(|m| *m != ready);
            group.voters.push(ready);
        } else if kept.is_empty() {
            let leaver = group.voters.iter().copied().find(|m| !goal.contains(m));
            match leaver {
                Some(leaver) if Some(leaver.target) == group.leader => {
                    group.leader = None;
                    group.goal = None;
                    return;
                }
                Some(leaver) => {
                    group.voters.retain(|m| *m != leaver);
                    group.whole.remove(&leaver.target);
                }
                None => group.goal = None,
            }
        }
        if before != (group.voters.clone(), group.learners.clone()) {
            group.settled = false;
            self.note(format!(
                "cs{} {:?}+{:?}, goal {goal:?} until {}",
                id.0, group.voters, group.learners, until.0
            ));
        }
    }

    fn heartbeat(&mut self, id: TargetId) {
        let now = self.now;
        let replica = |(copyset, (shard, view)): (&CopysetId, &(u16, Option<View>))| {
            let leads = view.as_ref().filter(|v| v.leads_until.is_some_and(|until| now < until));
            let group = view.as_ref().map(|v| &v.group);
            let role = if leads.is_some() { pb::ReplicaRole::Leader } else { pb::ReplicaRole::Follower };
            let membership = |view: &View| Membership {
                voters: view.group.voters.clone(),
                learners: view.group.learners.clone(),
                settled: view.group.settled,
                lags: Vec::new(),
                busy: false,
            };
            Replica {
                copyset: *copyset,
                shard: *shard,
                term: Term(group.map_or(0, |g| g.term)),
                role: role.into(),
                leader: group.and_then(|g| g.leader),
                commit: LogIndex(group.map_or(0, |g| g.commit)),
                applied: LogIndex(group.map_or(0, |g| g.commit)),
                health: 1,
                membership: leads.map(membership),
            }
        };
        let beat = Heartbeat {
            target: id,
            disk_uuid: Uuid([id.0 as u8; 16]),
            known_generation: self.targets[&id].known_generation,
            usage: Usage { capacity: 64 << 30, used: 0, formatted: 0 },
            replicas: self.targets[&id].replicas.iter().map(replica).collect(),
            freed: Vec::new(),
            failed_shards: BTreeSet::new(),
            slots: BTreeMap::new(),
            slots_whole: true,
            attached: Vec::new(),
        };
        let Some(reply) = self.run(Command::Heartbeat(beat)) else {
            self.run(Command::Register(registration(id)));
            return;
        };
        let Reply::Orders(orders) = reply else { self.fail("no orders") };
        // An answer may be lost.
        if self.dice.one_in(10) {
            return;
        }
        self.adopt_maps();
        orders.into_iter().for_each(|order| self.follow(id, &order));
    }

    fn follow(&mut self, id: TargetId, order: &pb::Order) {
        let copyset = CopysetId(order.copyset);
        let until = self.now + Span::ms(order.valid_ms.into());
        match order.what.as_ref().unwrap() {
            pb::order::What::HostOnShard(shard) => {
                let target = self.targets.get_mut(&id).unwrap();
                target.replicas.entry(copyset).or_insert((*shard as u16, None));
            }
            pb::order::What::Voters(voters) => {
                let goal: Vec<ShardAddr> = voters.members.iter().map(|m| shard_from_pb(m).unwrap()).collect();
                let group = self.groups.get_mut(&copyset).unwrap();
                if group.leader == Some(id) {
                    group.goal = Some((goal, until));
                }
            }
            pb::order::What::Lead(to) => {
                let to = TargetId(*to);
                let group = self.groups.get_mut(&copyset).unwrap();
                if group.leader == Some(id) && has(&group.voters, to) && group.whole.contains(&to) {
                    (group.leader, group.term, group.goal) = (Some(to), group.term + 1, None);
                    self.hand_overs += 1;
                }
            }
            pb::order::What::DropAfter(_) => self.free(id, copyset),
        }
    }

    fn free(&mut self, id: TargetId, copyset: CopysetId) {
        if self.targets[&id].mapped.contains(&copyset) {
            return;
        }
        let group = &self.groups[&copyset];
        let goal = group.goal.as_ref().filter(|(_, until)| self.now < *until);
        if has(&group.voters, id) || has(&group.learners, id) {
            self.fail(format!("{id} was told to free its replica of {copyset}: {group:?}"));
        }
        if goal.is_some_and(|(goal, _)| has(goal, id)) {
            self.fail(format!("{id} was told to free what a leader may still add: {group:?}"));
        }
        self.note(format!("t{} frees cs{}", id.0, copyset.0));
        self.targets.get_mut(&id).unwrap().replicas.remove(&copyset);
        self.groups.get_mut(&copyset).unwrap().whole.remove(&id);
    }

    /// Faults of which each copyset survives any: one target at a time is down or cut off.
    fn upset(&mut self) {
        let ids: Vec<TargetId> = self.targets.keys().copied().collect();
        let id = ids[self.dice.below(ids.len())];
        let troubled = self.targets.values().filter(|t| !t.up || t.cut).count();
        match self.dice.below(60) {
            0 if troubled == 0 => self.target(id, "is killed", |t| t.up = false),
            1 if troubled == 0 => self.target(id, "is cut off", |t| t.cut = true),
            2..=8 => {
                if let Some(id) = ids.iter().find(|id| !self.targets[id].up || self.targets[id].cut).copied()
                    && !self.targets[&id].dead_for_good
                {
                    self.target(id, "comes back", |t| (t.up, t.cut) = (true, false));
                    self.run(Command::Register(registration(id)));
                }
            }
            9 => {
                self.note("MDS restarts".into());
                self.mds = None;
            }
            10 if self.drained.len() + 1 < ids.len() - self.policy.replicas as usize => self.drain(id, true),
            11 | 12 => self.drain(id, false),
            _ => {}
        }
        if self.mds.is_none() && self.dice.one_in(4) {
            self.start_mds();
        }
    }

    fn target(&mut self, id: TargetId, what: &str, change: impl FnOnce(&mut Target)) {
        self.note(format!("t{} {what}", id.0));
        change(self.targets.get_mut(&id).unwrap());
    }

    fn drain(&mut self, target: TargetId, draining: bool) {
        if self.run(Command::Drain { target, draining }).is_some()
            && draining != self.drained.contains(&target)
        {
            self.note(format!("t{} drain: {draining}", target.0));
            if draining {
                self.drained.insert(target)
            } else {
                self.drained.remove(&target)
            };
        }
    }

    fn start_mds(&mut self) {
        self.born = self.now;
        self.mds = Some(State::restore(self.policy, CLUSTER, self.disk.clone()).unwrap());
    }

    fn turn(&mut self) {
        self.now = self.now + STEP;
        self.turn_groups();
        for id in self.targets.keys().copied().collect::<Vec<_>>() {
            if self.targets[&id].up && !self.dice.one_in(8) {
                self.heartbeat(id);
            }
        }
        let before = self.mds.as_ref().map_or(0, |mds| mds.tasks().count());
        self.run(Command::Tick { unix_s: 0 });
        self.begun += self.mds.as_ref().map_or(0, |mds| mds.tasks().count()).saturating_sub(before);
        self.check();
    }

    fn check(&self) {
        for (id, group) in &self.groups {
            let whole = group.voters.iter().filter(|m| {
                group.whole.contains(&m.target) && self.targets[&m.target].replicas.contains_key(id)
            });
            if whole.count() * 2 <= group.voters.len() {
                self.fail(format!("cs{} has lost its quorum: {group:?}", id.0));
            }
        }
        let Some(mds) = &self.mds else { return };
        let mut filled: BTreeMap<TargetId, u32> = BTreeMap::new();
        for (id, task) in mds.tasks() {
            // Later the leader may have followed the order of an MDS before this one.
            let is_new = task.began == self.mds_now();
            let changed = task.goal.iter().filter(|m| !mds.map().copysets[&id].members.contains(m)).count();
            if is_new && changed > 1 || (task.why == Why::Balance && task.to.is_none()) {
                self.fail(format!("a task changes more than one replica: {task:?}"));
            }
            if let Some(to) = task.to {
                *filled.entry(to.target).or_default() += 1;
            }
        }
        if filled.values().any(|tasks| *tasks > self.policy.tasks_a_target) {
            self.fail(format!("too many at once: {filled:?}"));
        }
    }

    /// With no more faults, everything is well in the end and stays so.
    fn settle(&mut self) {
        if self.mds.is_none() {
            self.start_mds();
        }
        for id in self.targets.keys().copied().collect::<Vec<_>>() {
            if !self.targets[&id].dead_for_good {
                self.target(id, "comes back", |t| (t.up, t.cut) = (true, false));
            }
        }
        (0..1200).for_each(|_| self.turn());
        let before = (self.begun, self.hand_overs);
        (0..240).for_each(|_| self.turn());
        if (self.begun, self.hand_overs) != before {
            self.fail("replicas or leaders move for ever");
        }
        let usable: BTreeSet<TargetId> = self
            .targets
            .iter()
            .filter(|(id, t)| t.up && !self.drained.contains(id))
            .map(|(id, _)| *id)
            .collect();
        let wanted = self.policy.replicas as usize;
        for (id, group) in &self.groups {
            let good = group.voters.iter().filter(|m| usable.contains(&m.target)).count();
            if group.voters.len() != wanted || good != wanted || !group.learners.is_empty() {
                self.fail(format!("cs{} is not as wanted ({wanted} of {usable:?}): {group:?}", id.0));
            }
            let holders = self.targets.iter().filter(|(_, t)| t.up && t.replicas.contains_key(id));
            let holders: Vec<TargetId> = holders.map(|(target, _)| *target).collect();
            if holders.len() != wanted {
                self.fail(format!("cs{} is held by {holders:?}: {group:?}", id.0));
            }
        }
        let held = |target| self.groups.values().filter(|g| has(&g.voters, target)).count();
        let loads: Vec<usize> = usable.iter().map(|target| held(*target)).collect();
        let (most, least) = (loads.iter().max().unwrap(), loads.iter().min().unwrap());
        if most - least > 1 {
            self.fail(format!("unbalanced: {loads:?}"));
        }
        let led = |target: TargetId| self.groups.values().filter(|g| g.leader == Some(target)).count();
        for target in &usable {
            let share = held(*target) as f64 / wanted as f64;
            if (led(*target) as f64 - share).abs() > 2.0 {
                self.fail(format!("t{} leads {}, its share is {share}", target.0, led(*target)));
            }
        }
    }
}

fn seeds() -> Vec<u64> {
    let number = |key| std::env::var(key).ok().and_then(|text| text.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SEEDS").unwrap_or(40)).collect(),
    }
}

#[test]
fn copysets_stay_safe_amid_faults_and_are_whole_and_balanced_after_them() {
    for seed in seeds() {
        let mut world = World::new(seed);
        for _ in 0..40 {
            world.turn();
        }
        let doomed = TargetId(1 + world.dice.below(world.targets.len()) as u32);
        for at in 0..600 {
            let spare = world.targets.len() - world.drained.len() - 1;
            // With two replicas, two targets in trouble at once may be one too many.
            let calm = world.targets.values().all(|t| t.up && !t.cut);
            if at == 300 && calm && spare > world.policy.replicas as usize && world.policy.replicas > 2 {
                world.target(doomed, "dies for good", |t| (t.up, t.dead_for_good) = (false, true));
            }
            world.upset();
            world.turn();
        }
        world.settle();
    }
}
