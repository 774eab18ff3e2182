//! Hazards of the schedulers: a replica that lives taken for lost, one freed too early, a vote gone before another comes,
//! too much begun at once.

use super::super::schedule;
use super::*;

/// A heartbeat of a target that leads every copyset it is the first member of, by the map, and follows the rest.
fn full_beat(mds: &Mds, id: u32) -> Heartbeat {
    let mut replicas = Vec::new();
    for (copyset, entry) in &mds.state.map.copysets {
        let Some(member) = entry.members.iter().find(|m| m.target.0 == id) else { continue };
        let leads = entry.members[0] == *member;
        let voters = entry.members.clone();
        let told = Membership { voters, learners: vec![], settled: true, lags: vec![], busy: true };
        let role = if leads { pb::ReplicaRole::Leader } else { pb::ReplicaRole::Follower };
        replicas.push(Replica {
            copyset: *copyset,
            shard: member.shard,
            term: Term(1),
            role: role.into(),
            leader: Some(entry.members[0].target),
            commit: LogIndex(9),
            applied: LogIndex(9),
            health: 1,
            membership: leads.then_some(told),
        });
    }
    let usage = Usage { capacity: GIB, used: 0, formatted: 0 };
    let known_generation = mds.state.counters.generation;
    Heartbeat { replicas, usage, known_generation, ..beat(id, &[]) }
}

/// Lets time pass, with heartbeats of these targets only.
fn pass(mds: &mut Mds, seconds: u64, alive: &[u32]) {
    for _ in 0..seconds {
        mds.now = mds.now + Span::ms(1000);
        for id in alive {
            mds.run(Command::Heartbeat(full_beat(mds, *id))).unwrap();
        }
        mds.run(Command::Tick { unix_s: 0 }).unwrap();
    }
}

#[test]
fn what_a_lost_target_held_is_built_elsewhere_after_a_while_and_no_more_at_once_than_allowed() {
    let mut mds = Mds::new(Policy { targets_expected: 4, ..Policy::default() });
    (1..=4).for_each(|id| drop(mds.run(Command::Register(target(id, GIB))).unwrap()));
    pass(&mut mds, 30, &[1, 2, 3, 4]);
    assert_eq!(mds.state.tasks().count(), 0);
    pass(&mut mds, 50, &[1, 2, 3]);
    assert_eq!(mds.state.presence(TargetId(4), mds.now), schedule::Presence::Unstable);
    assert_eq!(mds.state.tasks().count(), 0, "it is waited for");
    pass(&mut mds, 20, &[1, 2, 3]);
    assert_eq!(mds.state.presence(TargetId(4), mds.now), schedule::Presence::Offline);
    assert!(mds.state.tasks().count() > 0);
    let mut filled: BTreeMap<TargetId, u32> = BTreeMap::new();
    for (_, task) in mds.state.tasks() {
        assert_eq!((task.why, task.from), (schedule::Why::Recover, Some(TargetId(4))));
        *filled.entry(task.to.unwrap().target).or_default() += 1;
    }
    assert!(filled.values().all(|tasks| *tasks <= Policy::default().tasks_a_target), "{filled:?}");
    // The leader is told of the goal only when the newcomer is there.
    let (id, task) = mds.state.tasks().map(|(id, task)| (id, task.clone())).next().unwrap();
    let place = task.to.unwrap();
    let told = |mds: &mut Mds, target: u32| match mds.run(Command::Heartbeat(full_beat(mds, target))).unwrap()
    {
        Reply::Orders(orders) => {
            orders.into_iter().filter(|o| o.copyset == id.0).filter_map(|o| o.what).collect()
        }
        other => panic!("{other:?}"),
    };
    let orders: Vec<pb::order::What> = told(&mut mds, place.target.0);
    assert_eq!(orders, [pb::order::What::HostOnShard(place.shard.into())]);
}

/// Lets time pass until the MDS wants something of a copyset; target 3 does not hold that one, and the heartbeats of
/// the others tell the map.
fn pass_without_a_replica(mds: &mut Mds, id: CopysetId, alive: &[u32]) -> schedule::Task {
    for _ in 0..100 {
        mds.now = mds.now + Span::ms(1000);
        for target in alive {
            let mut beat = full_beat(mds, *target);
            beat.replicas.retain(|r| *target != 3 || r.copyset != id);
            mds.run(Command::Heartbeat(beat)).unwrap();
        }
        mds.run(Command::Tick { unix_s: 0 }).unwrap();
        if let Some(task) = mds.state.task(id) {
            return task.clone();
        }
    }
    panic!("nobody misses the replica of copyset {id}");
}

#[test]
fn a_replica_that_its_target_lost_is_built_elsewhere_and_never_while_the_old_one_has_a_vote() {
    for targets in [3, 4] {
        let mut mds = Mds::new(Policy { targets_expected: targets, ..Policy::default() });
        let all: Vec<u32> = (1..=targets).collect();
        all.iter().for_each(|id| drop(mds.run(Command::Register(target(*id, GIB))).unwrap()));
        pass(&mut mds, 30, &all);
        let at_3 = |members: &[ShardAddr]| members.iter().any(|m| m.target.0 == 3);
        let mut copysets = mds.state.map.copysets.iter();
        let found = copysets.find(|(_, e)| at_3(&e.members) && e.members[0].target.0 != 3);
        let (id, members) = found.map(|(id, entry)| (*id, entry.members.clone())).unwrap();
        let kept: Vec<_> = members.into_iter().filter(|m| m.target.0 != 3).collect();
        let task = pass_without_a_replica(&mut mds, id, &all);
        assert_eq!((task.why, task.from), (schedule::Why::Recover, Some(TargetId(3))));
        if targets == 4 {
            assert!(task.to.is_some_and(|to| to.target.0 != 3), "there is another place: {task:?}");
            continue;
        }
        assert_eq!((task.to, &task.goal), (None, &kept), "first its vote goes");
        let leader = kept[0];
        let voters = Membership { voters: kept, learners: vec![], settled: true, lags: vec![], busy: true };
        let mut told = full_beat(&mds, leader.target.0);
        let report = told.replicas.iter_mut().find(|r| r.copyset == id).unwrap();
        (report.commit, report.membership) = (LogIndex(10), Some(voters));
        mds.run(Command::Heartbeat(told)).unwrap();
        mds.run(Command::Tick { unix_s: 0 }).unwrap();
        let task = pass_without_a_replica(&mut mds, id, &all);
        assert_eq!((task.why, task.to.map(|to| to.target)), (schedule::Why::Count, Some(TargetId(3))));
    }
}

/// The target's word may be older than the replica.
#[test]
fn a_replica_is_missing_only_if_its_leader_does_not_hear_it_and_its_target_knows_the_map() {
    let mut mds = Mds::new(Policy::default());
    (1..=3).for_each(|id| drop(mds.run(Command::Register(target(id, GIB))).unwrap()));
    pass(&mut mds, 30, &[1, 2, 3]);
    let led_by_1 = |entry: &CopysetEntry| entry.members[0].target.0 == 1;
    let id = *mds.state.map.copysets.iter().find(|(_, entry)| led_by_1(entry)).unwrap().0;
    let mut missing_for = |seconds: u64, alive: bool, knows: bool| {
        for _ in 0..seconds {
            mds.now = mds.now + Span::ms(1000);
            for target in 1..=3 {
                let mut beat = full_beat(&mds, target);
                beat.replicas.retain(|r| target != 3 || r.copyset != id);
                beat.known_generation -= u64::from(!knows);
                if let Some(told) = beat.replicas.iter_mut().find(|r| r.copyset == id)
                    && let Some(membership) = &mut told.membership
                {
                    let lag = |target| pb::PeerLag { target, alive, ..pb::PeerLag::default() };
                    membership.lags = [2, 3].map(lag).to_vec();
                }
                mds.run(Command::Heartbeat(beat)).unwrap();
            }
            mds.run(Command::Tick { unix_s: 0 }).unwrap();
        }
        mds.state.task(id).is_some()
    };
    assert!(!missing_for(100, true, true), "the leader hears it");
    assert!(
        !missing_for(100, false, false),
        "it does not know the newest map, which may have brought the replica"
    );
    assert!(!missing_for(50, false, true), "only from now on");
    assert!(missing_for(20, false, true));
}

#[test]
fn a_replica_is_freed_only_when_its_leader_says_that_it_is_no_member_and_no_order_can_name_it_any_more() {
    let mut mds = Mds::new(Policy { targets_expected: 4, ..Policy::default() });
    (1..=4).for_each(|id| drop(mds.run(Command::Register(target(id, GIB))).unwrap()));
    let (id, entry) = mds.state.map.copysets.iter().next().map(|(id, e)| (*id, e.clone())).unwrap();
    let leader = entry.members[0].target.0;
    let spare = (1..=4).find(|t| !entry.members.iter().any(|m| m.target.0 == *t)).unwrap();
    // The leader tells of these learners, and the spare target of a replica that the record does not name.
    let frees = |mds: &mut Mds, learners: &[ShardAddr]| {
        let mut told = full_beat(mds, leader);
        let report = told.replicas.iter_mut().find(|r| r.copyset == id).unwrap();
        report.membership.as_mut().unwrap().learners = learners.to_vec();
        let left_over =
            Replica { membership: None, role: pb::ReplicaRole::Follower.into(), ..report.clone() };
        mds.run(Command::Heartbeat(told)).unwrap();
        let mut beat = full_beat(mds, spare);
        beat.replicas.push(left_over);
        match mds.run(Command::Heartbeat(beat)).unwrap() {
            Reply::Orders(orders) => orders
                .into_iter()
                .any(|o| o.copyset == id.0 && matches!(o.what, Some(pb::order::What::DropAfter(9)))),
            other => panic!("{other:?}"),
        }
    };
    pass(&mut mds, 2, &[1, 2, 3, 4]);
    assert!(!frees(&mut mds, &[]), "an MDS that ran before this one may have ordered that it be held");
    pass(&mut mds, 20, &[1, 2, 3, 4]);
    assert!(!frees(&mut mds, &[ShardAddr { target: TargetId(spare), shard: 0 }]), "it is a learner");
    assert!(frees(&mut mds, &[]));
}

#[test]
fn an_mds_that_hears_of_few_targets_begins_nothing() {
    let mut mds = Mds::new(Policy { targets_expected: 5, ..Policy::default() });
    (1..=5).for_each(|id| drop(mds.run(Command::Register(target(id, GIB))).unwrap()));
    pass(&mut mds, 10, &[1, 2, 3, 4, 5]);
    pass(&mut mds, 120, &[1, 2]);
    assert!(mds.state.most_are_silent(mds.now));
    assert_eq!(mds.state.tasks().count(), 0);
    pass(&mut mds, 5, &[1, 2, 3]);
    assert!(mds.state.tasks().count() > 0, "three of five are enough to believe that two are lost");
}

#[test]
fn the_report_of_a_deposed_leader_changes_nothing_that_a_later_one_told() {
    let mut mds = Mds::new(Policy { targets_expected: 4, ..Policy::default() });
    (1..=4).for_each(|id| drop(mds.run(Command::Register(target(id, GIB))).unwrap()));
    let (id, entry) = mds.state.map.copysets.iter().next().map(|(id, e)| (*id, e.clone())).unwrap();
    let members = entry.members;
    let spare = (1..=4).map(TargetId).find(|t| !members.iter().any(|m| m.target == *t)).unwrap();
    let newer = vec![members[0], members[1], ShardAddr { target: spare, shard: 0 }];
    let report = |leader: ShardAddr, term: u64, voters: &[ShardAddr], settled: bool| {
        let told =
            Membership { voters: voters.to_vec(), learners: vec![], settled, lags: vec![], busy: false };
        let replica = Replica {
            copyset: id,
            shard: 0,
            term: Term(term),
            role: pb::ReplicaRole::Leader.into(),
            leader: Some(leader.target),
            commit: LogIndex(10 * term),
            applied: LogIndex(1),
            health: 1,
            membership: Some(told),
        };
        Command::Heartbeat(Heartbeat { replicas: vec![replica], ..beat(leader.target.0, &[]) })
    };
    mds.run(report(members[0], 5, &newer, false)).unwrap();
    assert_eq!(mds.state.map.copysets[&id].members, members, "it could still be taken back");
    mds.run(report(members[0], 5, &newer, true)).unwrap();
    assert_eq!(
        (mds.state.map.copysets[&id].members.clone(), mds.state.map.copysets[&id].epoch),
        (newer.clone(), 1)
    );
    mds.run(report(members[2], 4, &members, true)).unwrap();
    let mut mds = mds.restart();
    mds.run(report(members[2], 4, &members, true)).unwrap();
    assert_eq!(mds.state.map.copysets[&id].members, newer);
}

/// Three replicas on three targets: what one of them holds has nowhere to go.
#[test]
fn an_operator_hears_of_replicas_that_cannot_move_and_of_disks_that_failed() {
    let mut mds = Mds::ready(GIB);
    mds.now = mds.now + mds.policy.unstable_after + mds.policy.unstable_after;
    for id in 1..=3 {
        let membership = |members: &[ShardAddr]| Membership {
            voters: members.to_vec(),
            learners: Vec::new(),
            settled: true,
            lags: Vec::new(),
            busy: false,
        };
        let replica = |(copyset, record): (&CopysetId, &CopysetRecord)| Replica {
            copyset: *copyset,
            shard: 0,
            term: Term(1),
            role: if id == 1 { pb::ReplicaRole::Leader } else { pb::ReplicaRole::Follower }.into(),
            leader: Some(TargetId(1)),
            commit: LogIndex(1),
            applied: LogIndex(1),
            health: pb::ReplicaHealth::Whole.into(),
            membership: (id == 1).then(|| membership(&record.members)),
        };
        let replicas = mds.state.copysets.iter().map(replica).collect();
        let usage = Usage { capacity: GIB, ..Usage::default() };
        mds.run(Command::Heartbeat(Heartbeat { replicas, usage, ..beat(id, &[]) })).unwrap();
    }
    let warnings = |mds: &Mds| crate::view::status(&mds.state, mds.now).warnings;
    mds.run(Command::Tick { unix_s: 0 }).unwrap();
    assert_eq!(warnings(&mds), Vec::<String>::new());
    let drain = |draining| Command::Drain { target: TargetId(2), draining };
    mds.run(drain(true)).unwrap();
    mds.run(Command::Tick { unix_s: 0 }).unwrap();
    let told = warnings(&mds);
    assert!(
        matches!(&told[..], [one] if one.starts_with("12 replicas are to move and none can")),
        "{told:?}"
    );
    mds.run(Command::Register(target(4, GIB))).unwrap();
    let usage = Usage { capacity: GIB, ..Usage::default() };
    mds.run(Command::Heartbeat(Heartbeat { usage, ..beat(4, &[]) })).unwrap();
    mds.run(Command::Tick { unix_s: 0 }).unwrap();
    assert_eq!(warnings(&mds), Vec::<String>::new(), "there is room now");
    let failed_shards = BTreeSet::from([0]);
    mds.run(Command::Heartbeat(Heartbeat { failed_shards, ..beat(4, &[]) })).unwrap();
    let told = warnings(&mds);
    assert!(told.iter().any(|line| line.starts_with("target 4: the disk of shard 0 failed")), "{told:?}");
}
