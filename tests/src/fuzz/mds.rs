//! The MDS's requests and the cluster map: what is well-formed as a message and may be nonsense.
//!
//! An input of requests is a sequence of (kind, length of two bytes, message). Each is checked,
//! decided and applied; whatever state that leads to, its map must be one that every target accepts.

use super::{Dice, Target};
use mds_lite::intake;
use mds_lite::record::Uuid;
use mds_lite::state::{Command, Policy, State};
use prost::Message;
use protocol::control::{Problem, map_from_pb, map_to_pb, pb, protocol_from_pb};
use protocol::types::Time;

/// What targets and operators ask of the MDS.
pub const REQUESTS: Target = Target {
    name: "mds-requests",
    about: "requests to the MDS: form, meaning, and the state that they lead to",
    bytes_max: 8 << 10,
    // A request of some bytes may create 65,536 copysets.
    memory_max: |bytes| (256 << 20) + 64 * bytes,
    make: requests,
    run: run_requests,
};

/// What the MDS tells everybody.
pub const MAP: Target = Target {
    name: "cluster-map",
    about: "the cluster map as targets and clients take it in",
    bytes_max: 8 << 10,
    memory_max: |bytes| (64 << 10) + 256 * bytes,
    make: |dice| {
        let mut state = state();
        play(&mut state, &requests(dice));
        map_to_pb(state.map()).encode_to_vec()
    },
    run: |input| {
        let Ok(message) = pb::ClusterMap::decode(input) else { return };
        match map_from_pb(&message) {
            Ok(map) => {
                let again = map_from_pb(&map_to_pb(&map)).expect("what is accepted is accepted again");
                assert_eq!(again, map);
            }
            Err(problem) => one_line(&problem),
        }
    },
};

fn one_line(problem: &Problem) {
    let text = problem.to_string();
    assert!(!text.contains('\n') && !problem.cause.is_empty() && !problem.fix.is_empty(), "{problem:?}");
}

fn state() -> State {
    let policy = Policy { copysets: 4, ..Policy::default() };
    State::restore(policy, Uuid([5; 16]), Vec::new()).expect("an empty store")
}

fn run_requests(input: &[u8]) {
    let mut state = state();
    play(&mut state, input);
    // Generation 0 is the map of a cluster without targets, which is not told to anybody.
    if state.map().generation > 0 {
        let map = map_from_pb(&map_to_pb(state.map())).expect("a map that every target accepts");
        assert_eq!(&map, &**state.map());
    }
}

fn play(state: &mut State, mut input: &[u8]) {
    let mut now = Time(1);
    while let [kind, low, high, rest @ ..] = input {
        let bytes = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (message, rest) = rest.split_at(bytes);
        input = rest;
        now = Time(now.0 + 1_000_000);
        let decided = command(*kind, message).and_then(|command| state.decide(now, command));
        match decided {
            Ok(decision) => state.apply(decision.changes),
            Err(problem) => one_line(&problem),
        }
    }
}

fn command(kind: u8, bytes: &[u8]) -> Result<Command, Problem> {
    fn get<M: Message + Default>(bytes: &[u8]) -> M {
        M::decode(bytes).unwrap_or_default()
    }
    Ok(match kind % 11 {
        0 => Command::Register(intake::registration(get(bytes))?),
        1 => Command::Heartbeat(intake::heartbeat(get(bytes))?),
        2 => intake::allocate(get(bytes))?,
        3 => intake::create_pool(get(bytes))?,
        4 => intake::create_volume(get(bytes)),
        5 => intake::delete_volume(get(bytes), 1 << 30)?,
        6 => intake::add_export(get(bytes))?,
        8 => intake::resize_volume(get(bytes))?,
        9 => intake::attach(get(bytes))?,
        10 => intake::detach(get(bytes))?,
        _ => {
            let request: pb::RemoveExportRequest = get(bytes);
            Command::RemoveExport(intake::volume_ref(request.volume)?, protocol_from_pb(request.protocol)?)
        }
    })
}

fn requests(dice: &mut Dice) -> Vec<u8> {
    let mut out = Vec::new();
    let targets = dice.below(5) as u32;
    for id in 1..=targets {
        put(&mut out, 0, &registration(id, dice));
    }
    for _ in 0..dice.below(10) {
        let volume = pb::VolumeRef { id: dice.below(3) as u32, name: format!("v{}", dice.below(3)) };
        match dice.below(10) {
            0 => put(&mut out, 0, &registration(1 + dice.below(6) as u32, dice)),
            1 => put(&mut out, 1, &heartbeat(dice)),
            2 => {
                let segments = (0..dice.below(5)).map(|_| dice.odd() as u32).collect();
                put(&mut out, 2, &pb::AllocateSegmentsRequest { volume: volume.id, segments });
            }
            3 => {
                let targets = (0..dice.below(4)).map(|_| dice.below(5) as u32).collect();
                let replicas = dice.below(5) as u32;
                let copysets = if dice.percent(90) { dice.below(9) as u32 } else { dice.odd() as u32 };
                put(&mut out, 3, &pb::CreatePoolRequest { name: volume.name, replicas, copysets, targets });
            }
            4 => {
                let bytes = if dice.percent(70) { (1 + dice.below(9) as u64) << 30 } else { dice.odd() };
                let (block_bytes, pool) = (dice.pick(&[0, 512, 4096, 7]), String::new());
                put(&mut out, 4, &pb::CreateVolumeRequest { name: volume.name, bytes, block_bytes, pool });
            }
            5 => put(&mut out, 5, &pb::DeleteVolumeRequest { volume: Some(volume), keep_s: 0 }),
            6 => {
                let bytes = if dice.percent(70) { (1 + dice.below(9) as u64) << 30 } else { dice.odd() };
                put(&mut out, 8, &pb::ResizeVolumeRequest { volume: Some(volume), bytes });
            }
            7 => {
                let holder = dice.pick(&["a", "b", "", "a b"]).to_owned() + &"x".repeat(dice.below(3) * 120);
                let (exclusive, take_over) = (dice.percent(50), dice.percent(50));
                let volume = Some(volume);
                put(&mut out, 9, &pb::AttachVolumeRequest { volume, holder, exclusive, take_over });
            }
            8 => {
                let holder = dice.pick(&["a", "b"]).to_owned();
                put(&mut out, 10, &pb::DetachVolumeRequest { volume: Some(volume), holder });
            }
            _ => {
                let protocol = dice.below(4) as i32;
                let allowed = dice.percent(50).then(|| {
                    let host =
                        |n: usize| dice.pick(&["nqn.a", "nqn.b", "b"]).to_owned() + &"x".repeat(n * 120);
                    pb::AllowedHosts { nqns: (0..3).map(host).collect() }
                });
                put(&mut out, 6, &pb::AddExportRequest { volume: Some(volume), protocol, allowed });
            }
        }
    }
    out
}

fn put(out: &mut Vec<u8>, kind: u8, message: &impl Message) {
    let bytes = message.encode_to_vec();
    out.push(kind);
    out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    out.extend_from_slice(&bytes);
}

fn registration(id: u32, dice: &mut Dice) -> pb::RegisterTargetRequest {
    let port = if dice.percent(90) { 7500 + id } else { dice.below(70000) as u32 };
    pb::RegisterTargetRequest {
        id,
        cluster: if dice.percent(80) { Vec::new() } else { vec![5; 16] },
        disk_uuid: vec![id as u8; if dice.percent(95) { 16 } else { 3 }],
        peers: (0..dice.below(3) as u32).map(|n| format!("127.0.0.1:{}", port + 100 * n)).collect(),
        endpoints: None,
        capacity_bytes: if dice.percent(80) { 64 << 30 } else { dice.odd() },
        ..Default::default()
    }
}

fn heartbeat(dice: &mut Dice) -> pb::HeartbeatRequest {
    let target = 1 + dice.below(5) as u32;
    let replica = |dice: &mut Dice| pb::ReplicaStatus {
        copyset: dice.below(9) as u32,
        shard: dice.below(3) as u32,
        term: dice.odd(),
        role: dice.below(5) as i32,
        leader: dice.below(5) as u32,
        ..pb::ReplicaStatus::default()
    };
    let known_generation = dice.odd();
    // Drawn from what is drawn already, so that inputs that were kept mean what they meant.
    let slots = pb::VolumeSlots { volume: target, held: known_generation as u32, led: target };
    pb::HeartbeatRequest {
        target,
        disk_uuid: vec![target as u8; 16],
        known_generation,
        volumes: vec![slots; (known_generation % 3) as usize],
        volumes_whole: known_generation.is_multiple_of(2),
        replicas: (0..dice.below(5)).map(|_| replica(dice)).collect(),
        freed_volumes: (0..dice.below(3)).map(|_| dice.below(4) as u32).collect(),
        ..pb::HeartbeatRequest::default()
    }
}
