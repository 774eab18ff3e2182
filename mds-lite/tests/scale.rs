//! The MDS at the size that it is meant for: 1,000 targets, 100,000 copysets, 10,000 volumes. Prints what it
//! costs; what it asserts is the state, never a time. Small unless ASHLAR_LONG=1.

use ashlar_mds_lite::placement::{Node, Wanted, place};
use ashlar_mds_lite::record::{Counters, Endpoints, Uuid, VolumeRecord};
use ashlar_mds_lite::state::{
    Change, Command, Heartbeat, Membership, Policy, Registration, Replica, Reply, Slots, State, Usage,
};
use ashlar_mds_lite::store::{RedbStore, Store};
use ashlar_mds_lite::view;
use protocol::control::{limits, map_to_pb, pb};
use protocol::types::{CopysetId, LogIndex, Span, TargetId, Term, Time, VolumeId};
use std::collections::BTreeMap;
use std::time::Instant;

struct Size {
    targets: u32,
    copysets: u32,
    volumes: u32,
}

fn size() -> Size {
    match std::env::var("ASHLAR_LONG").is_ok_and(|value| value == "1") {
        true => Size { targets: 1000, copysets: 100_000, volumes: 10_000 },
        false => Size { targets: 60, copysets: 600, volumes: 50 },
    }
}

fn registration(id: u32) -> Registration {
    let mut disk = [0; 16];
    disk[..4].copy_from_slice(&id.to_le_bytes());
    let (host, port) = ([10, 0, (id >> 8) as u8, id as u8], 7500);
    Registration {
        id: TargetId(id),
        cluster: None,
        disk_uuid: Uuid(disk),
        peers: vec![(host, port).into(), (host, port + 1).into()],
        endpoints: Endpoints::default(),
        capacity_bytes: 64 << 40,
        zone: format!("z{}", id % 10),
        host: format!("h{}", id / 2),
        labels: BTreeMap::new(),
    }
}

fn resident_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4 / 1024
}

/// What each target reports: the first member of each copyset leads.
fn heartbeats(state: &State) -> Vec<Heartbeat> {
    let mut reports: BTreeMap<TargetId, Vec<Replica>> = BTreeMap::new();
    for (id, copyset) in &state.map().copysets {
        for (at, member) in copyset.members.iter().enumerate() {
            let others = copyset.members[1..].iter();
            let lag = |m: &protocol::types::ShardAddr| pb::PeerLag {
                target: m.target.0,
                alive: true,
                ..Default::default()
            };
            let told = Membership {
                voters: copyset.members.clone(),
                learners: Vec::new(),
                settled: true,
                lags: others.map(lag).collect(),
                busy: false,
            };
            let role = if at == 0 { pb::ReplicaRole::Leader } else { pb::ReplicaRole::Follower };
            let replica = Replica {
                copyset: *id,
                shard: member.shard,
                term: Term(3),
                role: role.into(),
                leader: Some(copyset.members[0].target),
                commit: LogIndex(1000),
                applied: LogIndex(1000),
                health: pb::ReplicaHealth::Whole.into(),
                membership: (at == 0).then_some(told),
            };
            reports.entry(member.target).or_default().push(replica);
        }
    }
    let beat = |(target, replicas): (TargetId, Vec<Replica>)| Heartbeat {
        target,
        disk_uuid: registration(target.0).disk_uuid,
        known_generation: 1,
        usage: Usage { capacity: 64 << 40, used: 1 << 40, formatted: 1 << 40 },
        replicas,
        freed: Vec::new(),
        failed_shards: Default::default(),
        // Written to a little everywhere, in one interval.
        slots: (1..=100).map(|id| (VolumeId(id), Slots { held: 40, led: 13 })).collect(),
        slots_whole: true,
        attached: Vec::new(),
    };
    reports.into_iter().map(beat).collect()
}

#[test]
fn a_large_cluster_is_placed_started_and_listened_to() {
    let size = size();
    let nodes: Vec<Node> = (1..=size.targets)
        .map(|id| Node { zone: format!("z{}", id % 10), ..Node::empty(TargetId(id), 2) })
        .collect();
    let began = Instant::now();
    let (domain, placed) = place(nodes, Wanted::new(3, size.copysets)).unwrap();
    eprintln!(
        "{} copysets on {} targets, apart by {domain}: placed in {:?}",
        placed.len(),
        size.targets,
        began.elapsed()
    );

    let dir = tempfile::TempDir::new().unwrap();
    let mut store = RedbStore::open(dir.path()).unwrap();
    let heartbeat = Span::ms(10_000);
    let policy = Policy {
        copysets: 0,
        heartbeat,
        unstable_after: Span::ms(30_000),
        offline_after: Span::ms(600_000),
        ..Policy::default()
    };
    let mut state = State::restore(policy, store.cluster(), store.load().unwrap()).unwrap();
    let run = |store: &mut RedbStore, state: &mut State, now: u64, command: Command| {
        let decision = state.decide(Time(now), command).unwrap();
        if !decision.changes.is_empty() {
            store.commit(&decision.changes).unwrap();
        }
        state.apply(decision.changes);
        decision.reply
    };
    for id in 1..=size.targets {
        run(&mut store, &mut state, 1, Command::Register(registration(id)));
    }
    let began = Instant::now();
    let (name, copysets) = ("default".to_owned(), size.copysets);
    run(&mut store, &mut state, 1, Command::CreatePool { name, replicas: 3, copysets, targets: Vec::new() });
    eprintln!("pool created and stored in {:?}", began.elapsed());
    let began = Instant::now();
    for n in 0..size.volumes {
        let (name, pool) = (format!("v{n}"), String::new());
        run(
            &mut store,
            &mut state,
            1,
            Command::CreateVolume { name, bytes: 1 << 40, block_bytes: 4096, pool },
        );
        if n == 20 {
            eprintln!("a volume created in {:?}", began.elapsed() / 21);
        }
        if n == 20 && size.volumes > 1000 {
            break;
        }
    }
    // The others in one transaction, or this would take a quarter of an hour.
    let there = state.map().volumes.len() as u32;
    let copysets: Vec<CopysetId> = (1..=200).map(CopysetId).collect();
    let more = (there..size.volumes).map(|n| {
        let (name, copysets) = (format!("v{n}"), copysets.clone());
        let (bytes, block_bytes, pool) = (1 << 40, 4096, 1);
        let record =
            VolumeRecord { name, bytes, block_bytes, pool, copysets, deleted: false, purge_at_s: None };
        Change::Volume(VolumeId(n + 1), record)
    });
    let counters = Counters {
        generation: state.map().generation + 1,
        next_pool: 2,
        next_copyset: size.copysets + 1,
        next_volume: size.volumes + 1,
        ..Counters::default()
    };
    let changes: Vec<Change> = more.chain([Change::Counters(counters)]).collect();
    store.commit(&changes).unwrap();
    state.apply(changes);
    assert_eq!(state.map().volumes.len(), size.volumes as usize);
    let beats = heartbeats(&state);
    let began = Instant::now();
    let count = beats.len();
    for beat in beats {
        let Reply::Orders(orders) = run(&mut store, &mut state, 1_000_000_000, Command::Heartbeat(beat))
        else {
            panic!()
        };
        assert!(orders.is_empty(), "all is well: {orders:?}");
    }
    let each = began.elapsed();
    let began = Instant::now();
    run(&mut store, &mut state, 70_000_000_000, Command::Tick { unix_s: 0 });
    let tick = began.elapsed();
    assert!(state.tasks().next().is_none() || state.leading(CopysetId(1), Time(70_000_000_000)).is_none());
    let share = (each + tick).as_secs_f64() / 10.0;
    eprintln!(
        "{count} heartbeats in {each:?}, a look of the schedulers in {tick:?}: {share:.3} of a core at 10 s"
    );
    let began = Instant::now();
    let message = map_to_pb(state.map());
    let bytes = prost::Message::encoded_len(&message);
    eprintln!(
        "the map has {} KiB as a message, made in {:?}; {} MiB resident",
        bytes / 1024,
        began.elapsed(),
        resident_mib()
    );
    let began = Instant::now();
    let bytes = prost::Message::encoded_len(&view::status(&state, Time(70_000_000_000)));
    eprintln!("the status has {} KiB as a message, made in {:?}", bytes / 1024, began.elapsed());
    assert!(bytes < limits::MESSAGE_BYTES_MAX, "nobody could read a status of {bytes} bytes");
    let before = state.map().clone();
    drop(state);
    let began = Instant::now();
    let state = State::restore(policy, store.cluster(), store.load().unwrap()).unwrap();
    eprintln!("read back and checked in {:?}", began.elapsed());
    assert_eq!(*state.map(), before);
}
