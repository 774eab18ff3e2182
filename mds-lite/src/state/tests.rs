//! Hazards of the state: ids given twice, names that clash, space counted wrongly, and a restart
//! that forgets.

mod schedule;
mod sessions;

use super::*;
use crate::store::{RedbStore, Store};
use proptest::prelude::*;
use protocol::control::ProblemKind;
use protocol::types::{CHUNK_BYTES, ChunkId, SEGMENT_BYTES};
use tempfile::TempDir;

const GIB: u64 = SEGMENT_BYTES;

/// A state on a real store.
struct Mds {
    state: State,
    store: RedbStore,
    policy: Policy,
    now: Time,
    dir: TempDir,
}

type Durable = (
    Arc<ClusterMap>,
    BTreeMap<TargetId, TargetRecord>,
    BTreeMap<PoolId, PoolRecord>,
    BTreeMap<CopysetId, CopysetRecord>,
    BTreeMap<VolumeId, VolumeRecord>,
    BTreeMap<VolumeId, Allocated>,
    (BTreeMap<ExportKey, AllowedHosts>, Counters, BTreeMap<String, VolumeId>),
    BTreeMap<VolumeId, SessionRecord>,
);

impl Mds {
    fn new(policy: Policy) -> Self {
        let dir = TempDir::new().unwrap();
        let mut store = RedbStore::open(dir.path()).unwrap();
        let state = State::restore(policy, store.cluster(), store.load().unwrap()).unwrap();
        Self { state, store, policy, now: Time::default(), dir }
    }
    /// With three registered targets of this capacity, and so with the default pool.
    fn ready(capacity: u64) -> Self {
        let mut mds = Self::new(Policy::default());
        for id in 1..=3 {
            mds.run(Command::Register(target(id, capacity))).unwrap();
        }
        mds
    }
    fn run(&mut self, command: Command) -> Result<Reply, Problem> {
        let decision = self.state.decide(self.now, command)?;
        self.store.commit(&decision.changes).unwrap();
        self.state.apply(decision.changes);
        self.state.check().expect("records agree after each command");
        Ok(decision.reply)
    }
    fn restart(self) -> Self {
        let Self { store, policy, now, dir, .. } = self;
        drop(store);
        let mut store = RedbStore::open(dir.path()).unwrap();
        let state = State::restore(policy, store.cluster(), store.load().unwrap()).unwrap();
        Self { state, store, policy, now, dir }
    }
    fn durable(&self) -> Durable {
        let s = &self.state;
        (
            s.map.clone(),
            s.targets.clone(),
            s.pools.clone(),
            s.copysets.clone(),
            s.volumes.clone(),
            s.allocated.clone(),
            (s.exports.clone(), s.counters, s.names.clone()),
            s.sessions.clone(),
        )
    }
    fn create(&mut self, name: &str, bytes: u64) -> Result<VolumeId, Problem> {
        match self.run(create(name, bytes))? {
            Reply::Volume(id) => Ok(id),
            other => panic!("{other:?}"),
        }
    }
    fn generation(&self) -> u64 {
        self.state.map.generation
    }
    fn refused(&mut self, command: Command) -> ProblemKind {
        let before = self.durable();
        let problem = self.run(command).expect_err("a refusal");
        assert_eq!(self.durable(), before, "a refusal changes nothing");
        assert!(!problem.cause.is_empty() && !problem.fix.is_empty(), "{problem}");
        problem.kind
    }
}

fn target(id: u32, capacity_bytes: u64) -> Registration {
    Registration {
        id: TargetId(id),
        cluster: None,
        disk_uuid: Uuid([id as u8 + 1; 16]),
        peers: vec![SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16))],
        endpoints: Endpoints::default(),
        capacity_bytes,
        zone: String::new(),
        host: String::new(),
        labels: BTreeMap::new(),
    }
}

fn beat(id: u32, freed: &[VolumeId]) -> Heartbeat {
    Heartbeat {
        target: TargetId(id),
        disk_uuid: Uuid([id as u8 + 1; 16]),
        known_generation: 0,
        usage: Usage::default(),
        replicas: Vec::new(),
        freed: freed.to_vec(),
        failed_shards: BTreeSet::new(),
        slots: BTreeMap::new(),
        slots_whole: false,
        attached: Vec::new(),
    }
}

fn led(id: u32, copyset: u32, leader: u32, term: u64) -> Heartbeat {
    let replica = Replica {
        copyset: CopysetId(copyset),
        shard: 0,
        term: Term(term),
        role: 1,
        leader: (leader != 0).then_some(TargetId(leader)),
        commit: LogIndex(1),
        applied: LogIndex(1),
        health: 1,
        membership: None,
    };
    Heartbeat { replicas: vec![replica], ..beat(id, &[]) }
}

fn create(name: &str, bytes: u64) -> Command {
    Command::CreateVolume { name: name.into(), bytes, block_bytes: 4096, pool: String::new() }
}

/// For good.
fn delete(volume: VolumeRef) -> Command {
    Command::DeleteVolume { volume, purge_at_s: None }
}

fn named(name: &str) -> VolumeRef {
    VolumeRef::Name(name.into())
}

fn allocate(volume: VolumeId, segments: &[u32]) -> Command {
    Command::Allocate { volume, segments: segments.to_vec() }
}

#[test]
fn the_default_pool_waits_for_the_expected_targets() {
    let mut mds = Mds::new(Policy::default());
    for id in 1..=2 {
        mds.run(Command::Register(target(id, GIB))).unwrap();
        assert!(mds.state.pools.is_empty());
        assert_eq!(mds.refused(create("vol0", GIB)), ProblemKind::NotReady);
    }
    mds.run(Command::Register(target(3, GIB))).unwrap();
    assert_eq!(mds.state.pools[&1].name, POOL_DEFAULT);
    assert_eq!(mds.state.copysets.len(), 12);
    for copyset in mds.state.copysets.values() {
        let targets: BTreeSet<_> = copyset.members.iter().map(|m| m.target).collect();
        assert_eq!(targets.len(), 3);
    }
}

#[test]
fn a_registration_repeated_changes_nothing() {
    let mut mds = Mds::ready(GIB);
    let before = mds.durable();
    let mut again = target(2, GIB);
    mds.run(Command::Register(again.clone())).unwrap();
    again.cluster = Some(mds.state.cluster());
    mds.run(Command::Register(again)).unwrap();
    assert_eq!(mds.durable(), before);
}

#[test]
fn a_target_that_moved_is_shown_by_a_newer_map() {
    let mut mds = Mds::ready(GIB);
    let before = mds.generation();
    let mut moved = target(2, GIB);
    moved.peers = vec!["127.0.0.1:9999".parse().unwrap()];
    mds.run(Command::Register(moved.clone())).unwrap();
    assert_eq!(mds.generation(), before + 1);
    assert_eq!(mds.state.map.targets[&TargetId(2)].peers, moved.peers);
    assert_eq!(mds.state.copysets.len(), 12, "no second default pool");
}

#[test]
fn impostors_and_nonsense_targets_are_refused() {
    let mut mds = Mds::ready(GIB);
    type Spoil = fn(&mut Registration);
    let rows: &[(ProblemKind, Spoil)] = &[
        (ProblemKind::Invalid, |r| r.id = TargetId(0)),
        (ProblemKind::Invalid, |r| r.disk_uuid = Uuid([0; 16])),
        (ProblemKind::WrongCluster, |r| r.cluster = Some(Uuid([9; 16]))),
        (ProblemKind::IdTaken, |r| r.disk_uuid = Uuid([99; 16])),
        (ProblemKind::IdTaken, |r| r.id = TargetId(77)),
        (ProblemKind::Invalid, |r| r.peers.clear()),
        (ProblemKind::Invalid, |r| r.peers = vec!["0.0.0.0:7000".parse().unwrap()]),
        (ProblemKind::Invalid, |r| r.peers = vec!["[::]:7000".parse().unwrap()]),
        (ProblemKind::Invalid, |r| r.peers = vec!["10.0.0.1:0".parse().unwrap()]),
        (ProblemKind::Invalid, |r| r.peers = vec!["10.0.0.1:7".parse().unwrap(); 2]),
    ];
    for (at, (kind, spoil)) in rows.iter().enumerate() {
        let mut registration = target(2, GIB);
        spoil(&mut registration);
        assert_eq!(mds.refused(Command::Register(registration)), *kind, "row {at}");
    }
    let stranger = Heartbeat { target: TargetId(50), ..beat(1, &[]) };
    assert_eq!(mds.refused(Command::Heartbeat(stranger)), ProblemKind::UnknownTarget);
    let impostor = Heartbeat { disk_uuid: Uuid([99; 16]), ..beat(1, &[]) };
    assert_eq!(mds.refused(Command::Heartbeat(impostor)), ProblemKind::IdTaken);
}

#[test]
fn shards_that_hold_replicas_cannot_be_configured_away() {
    let mut mds = Mds::new(Policy::default());
    for id in 1..=3 {
        let mut wide = target(id, GIB);
        wide.peers.push(SocketAddr::from(([127, 0, 0, 1], 8000 + id as u16)));
        mds.run(Command::Register(wide)).unwrap();
    }
    assert_eq!(mds.refused(Command::Register(target(1, GIB))), ProblemKind::Invalid);
}

#[test]
fn a_volume_id_is_never_given_out_again_across_delete_purge_and_restart() {
    let mut mds = Mds::ready(100 * GIB);
    let mut given = BTreeSet::new();
    for round in 0..5 {
        let id = mds.create("vol0", GIB).unwrap();
        assert!(given.insert(id), "{id} was given out before");
        mds.run(allocate(id, &[0])).unwrap();
        mds.run(delete(named("vol0"))).unwrap();
        if round % 2 == 0 {
            mds = mds.restart();
        }
        for target in 1..=3 {
            mds.run(Command::Heartbeat(beat(target, &[id]))).unwrap();
        }
        assert!(!mds.state.volumes.contains_key(&id) && !mds.state.allocated.contains_key(&id));
        if round % 2 == 1 {
            mds = mds.restart();
        }
    }
}

#[test]
fn a_volume_grows_and_never_shrinks_and_what_its_last_segment_takes_up_must_fit() {
    let mut mds = Mds::ready(4 * GIB);
    let id = mds.create("vol0", GIB / 2).unwrap();
    let resize = |bytes| Command::ResizeVolume { volume: named("vol0"), bytes };
    mds.run(allocate(id, &[0])).unwrap();
    let other = mds.create("other", 3 * GIB).unwrap();
    mds.run(allocate(other, &[0, 1, 2])).unwrap();
    let before = mds.generation();
    assert_eq!(mds.run(resize(GIB / 2)).unwrap(), Reply::Volume(id));
    assert_eq!(mds.generation(), before, "the same size is no change");
    for bytes in [0, GIB / 2 - 4096, GIB / 2 + 512, limits::VOLUME_BYTES_MAX + 4096] {
        assert_eq!(mds.refused(resize(bytes)), ProblemKind::Invalid, "{bytes}");
    }
    // Of the 4 GiB 3.5 are taken: the short segment may grow by all that is left.
    mds.run(resize(9 * GIB)).unwrap();
    assert_eq!((mds.generation(), mds.state.map.volumes[&id].bytes), (before + 1, 9 * GIB));
    assert_eq!(mds.state.pool_reserved(1), 4 * GIB);
    assert_eq!(mds.refused(allocate(id, &[1])), ProblemKind::NoSpace);
    let mds = mds.restart();
    assert_eq!(mds.state.map.volumes[&id].bytes, 9 * GIB);
}

#[test]
fn a_volume_does_not_grow_into_space_that_is_not_there() {
    let mut mds = Mds::ready(GIB);
    let id = mds.create("vol0", GIB / 4).unwrap();
    mds.run(allocate(id, &[0])).unwrap();
    let other = mds.create("other", GIB / 2).unwrap();
    mds.run(allocate(other, &[0])).unwrap();
    let resize = Command::ResizeVolume { volume: named("vol0"), bytes: GIB };
    assert_eq!(mds.refused(resize), ProblemKind::NoSpace);
    mds.run(delete(named("vol0"))).unwrap();
    let resize = Command::ResizeVolume { volume: VolumeRef::Id(id), bytes: GIB / 2 };
    assert_eq!(mds.refused(resize), ProblemKind::NotFound);
}

#[test]
fn a_list_of_hosts_is_kept_and_replaced_and_left_alone_when_none_is_given() {
    let mut mds = Mds::ready(100 * GIB);
    mds.create("vol0", GIB).unwrap();
    let hosts = |names: &[&str]| names.iter().map(|name| format!("nqn.2014-08.org.{name}")).collect();
    let add = |protocol, allowed| Command::AddExport { volume: named("vol0"), protocol, allowed };
    let over_nvme = |allowed| add(ExportProtocol::Nvme, allowed);
    let listed = |mds: &Mds| mds.state.map.exports[0].allowed_hosts.clone();
    mds.run(over_nvme(None)).unwrap();
    assert!(listed(&mds).is_empty());
    mds.run(over_nvme(Some(hosts(&["a", "b"])))).unwrap();
    let before = mds.generation();
    mds.run(over_nvme(None)).unwrap();
    mds.run(over_nvme(Some(hosts(&["b", "a"])))).unwrap();
    assert_eq!((mds.generation(), listed(&mds)), (before, hosts(&["a", "b"])), "no change");
    mds = mds.restart();
    assert_eq!(listed(&mds), hosts(&["a", "b"]));
    assert_eq!(mds.refused(add(ExportProtocol::Nbd, Some(hosts(&["a"])))), ProblemKind::Invalid);
    // Removed with its export: one added later does not inherit it.
    mds.run(Command::RemoveExport(named("vol0"), ExportProtocol::Nvme)).unwrap();
    mds.run(over_nvme(None)).unwrap();
    mds = mds.restart();
    assert!(listed(&mds).is_empty());
    mds.run(over_nvme(Some(hosts(&["c"])))).unwrap();
    mds.run(over_nvme(Some(AllowedHosts::new()))).unwrap();
    assert!(mds.restart().state.map.exports[0].allowed_hosts.is_empty(), "any host again");
}

#[test]
fn a_deleted_volume_is_kept_until_every_holder_freed_it() {
    let mut mds = Mds::ready(100 * GIB);
    let id = mds.create("vol0", GIB).unwrap();
    // A target that claims to have freed a live volume is not believed later either.
    mds.run(Command::Heartbeat(beat(3, &[id]))).unwrap();
    mds.run(delete(named("vol0"))).unwrap();
    let deleted = mds.generation();
    assert!(mds.state.map.volumes[&id].deleted);
    assert_eq!(mds.refused(allocate(id, &[0])), ProblemKind::NotFound);
    for target in [1, 1, 2] {
        mds.run(Command::Heartbeat(beat(target, &[id]))).unwrap();
        assert!(mds.state.volumes.contains_key(&id));
    }
    // What was only heard is forgotten by a restart, and told again.
    mds = mds.restart();
    assert_eq!(mds.state.freeing(id).len(), 3);
    for target in [3, 1, 2] {
        assert!(mds.state.volumes.contains_key(&id));
        mds.run(Command::Heartbeat(beat(target, &[id]))).unwrap();
    }
    assert!(mds.state.map.volumes.is_empty());
    assert!(mds.generation() > deleted);
    mds.run(Command::Heartbeat(beat(2, &[id]))).expect("a late report is harmless");
}

#[test]
fn names_clash_only_among_volumes_that_live() {
    let mut mds = Mds::ready(100 * GIB);
    let first = mds.create("vol0", GIB).unwrap();
    assert_eq!(mds.refused(create("vol0", GIB)), ProblemKind::AlreadyExists);
    mds.run(delete(named("vol0"))).unwrap();
    let second = mds.create("vol0", 2 * GIB).unwrap();
    assert_eq!(mds.state.find_volume(&named("vol0")).unwrap().0, second);
    mds = mds.restart();
    assert_eq!(mds.state.find_volume(&named("vol0")).unwrap().0, second);
    assert_eq!(mds.run(delete(VolumeRef::Id(first))).unwrap(), Reply::Volume(first));
    assert_eq!(mds.state.find_volume(&named("vol0")).unwrap().0, second, "the name stays with the second");
}

#[test]
fn an_exported_volume_cannot_be_deleted_under_its_hosts() {
    let mut mds = Mds::ready(GIB);
    let id = mds.create("vol0", GIB).unwrap();
    for _ in 0..2 {
        mds.run(Command::AddExport { volume: named("vol0"), protocol: ExportProtocol::Nbd, allowed: None })
            .unwrap();
    }
    assert_eq!(mds.state.map.exports.len(), 1);
    assert_eq!(mds.refused(delete(VolumeRef::Id(id))), ProblemKind::InUse);
    mds = mds.restart();
    assert_eq!(
        mds.refused(Command::RemoveExport(named("vol0"), ExportProtocol::Nvme)),
        ProblemKind::NotFound
    );
    mds.run(Command::RemoveExport(named("vol0"), ExportProtocol::Nbd)).unwrap();
    mds.run(delete(VolumeRef::Id(id))).unwrap();
    assert_eq!(
        mds.refused(Command::AddExport {
            volume: VolumeRef::Id(id),
            protocol: ExportProtocol::Nbd,
            allowed: None
        }),
        ProblemKind::NotFound
    );
}

#[test]
fn bad_volumes_are_refused() {
    let mut mds = Mds::ready(GIB);
    let most = limits::VOLUME_BYTES_MAX;
    for bytes in [0, 1, 4095, 4097, most + 4096, u64::MAX] {
        assert_eq!(mds.refused(create("vol0", bytes)), ProblemKind::Invalid, "{bytes}");
    }
    let long = "x".repeat(129);
    for name in ["", "-a", ".a", "a b", "a/b", "a\n", "é", "a\0", "..", &long] {
        assert_eq!(mds.refused(create(name, GIB)), ProblemKind::Invalid, "{name:?}");
    }
    let other_pool =
        Command::CreateVolume { name: "a".into(), bytes: GIB, block_bytes: 512, pool: "nope".into() };
    assert_eq!(mds.refused(other_pool), ProblemKind::NotFound);
    mds.create("a", most).expect("the largest volume");
}

#[test]
fn segments_are_counted_once_and_the_last_by_its_chunks() {
    let mut mds = Mds::ready(100 * GIB);
    let id = mds.create("vol0", 2 * GIB + (16 << 20) + 4096).unwrap();
    for _ in 0..2 {
        assert_eq!(mds.run(allocate(id, &[0, 0])).unwrap(), Reply::Allocated(GIB));
    }
    assert_eq!(mds.run(allocate(id, &[2])).unwrap(), Reply::Allocated(GIB + (32 << 20)));
    assert_eq!(mds.refused(allocate(id, &[1, 3])), ProblemKind::Invalid);
    assert_eq!(mds.run(allocate(id, &[1])).unwrap(), Reply::Allocated(2 * GIB + (32 << 20)));
    assert_eq!(mds.refused(allocate(VolumeId(99), &[0])), ProblemKind::NotFound);
    let before = mds.durable();
    mds = mds.restart();
    assert_eq!(mds.durable(), before);
}

#[test]
fn a_full_pool_refuses_new_segments_and_takes_known_ones() {
    let mut mds = Mds::ready(3 * GIB);
    let (a, b) = (mds.create("a", 4 * GIB).unwrap(), mds.create("b", 4 * GIB).unwrap());
    mds.run(allocate(a, &[0, 1])).unwrap();
    mds.run(allocate(b, &[3])).unwrap();
    assert_eq!(mds.refused(allocate(b, &[0])), ProblemKind::NoSpace);
    assert_eq!(mds.run(allocate(a, &[1, 0])).unwrap(), Reply::Allocated(2 * GIB));
    // Space comes back when the chunks are freed, not before.
    mds.run(delete(named("a"))).unwrap();
    assert_eq!(mds.refused(allocate(b, &[0])), ProblemKind::NoSpace);
    for target in 1..=3 {
        mds.run(Command::Heartbeat(beat(target, &[a]))).unwrap();
    }
    mds.run(allocate(b, &[0, 1])).unwrap();
}

#[test]
fn the_smallest_target_bounds_its_pool() {
    let mut mds = Mds::new(Policy::default());
    for (id, capacity) in [(1, 10 * GIB), (2, 2 * GIB), (3, 10 * GIB)] {
        mds.run(Command::Register(target(id, capacity))).unwrap();
    }
    assert_eq!(mds.state.pool_capacity(&mds.state.pools[&1]), 2 * GIB);
}

#[test]
fn the_leader_is_of_the_highest_term_heard_from_an_online_target() {
    let mut mds = Mds::ready(GIB);
    let cs = CopysetId(1);
    assert_eq!(mds.state.leader(cs, mds.now), None);
    for (id, leader, term) in [(1, 1, 5), (2, 3, 6), (3, 0, 7)] {
        mds.run(Command::Heartbeat(led(id, 1, leader, term))).unwrap();
    }
    let hint = mds.state.leader(cs, mds.now).unwrap();
    assert_eq!((hint.target, hint.term), (TargetId(3), Term(6)));
    // A term from a liar, or a leader that is no member, passes with its heartbeat's age.
    mds.run(Command::Heartbeat(led(2, 1, 99, u64::MAX))).unwrap();
    assert_eq!(mds.state.leader(cs, mds.now).unwrap().target, TargetId(1));
    mds.now = mds.now + Span::ms(10_000);
    assert_eq!(mds.state.leader(cs, mds.now), None);
    assert!(!mds.state.is_online(TargetId(1), mds.now));
}

#[test]
fn a_heartbeat_writes_nothing() {
    let mut mds = Mds::ready(GIB);
    let decision = mds.state.decide(mds.now, Command::Heartbeat(led(1, 1, 1, 1))).unwrap();
    assert!(decision.changes.is_empty());
}

#[test]
fn pools_that_cannot_be_are_refused() {
    let mut mds = Mds::ready(GIB);
    let pool = |name: &str, replicas, copysets, targets: &[u32]| Command::CreatePool {
        name: name.into(),
        replicas,
        copysets,
        targets: targets.iter().copied().map(TargetId).collect(),
    };
    assert_eq!(mds.refused(pool("default", 3, 4, &[])), ProblemKind::AlreadyExists);
    assert_eq!(mds.refused(pool("p", 0, 4, &[])), ProblemKind::Invalid);
    assert_eq!(mds.refused(pool("p", 8, 4, &[])), ProblemKind::Invalid);
    assert_eq!(mds.refused(pool("p", 4, 4, &[])), ProblemKind::Invalid);
    assert_eq!(mds.refused(pool("p", 2, 4, &[1, 1])), ProblemKind::Invalid);
    assert_eq!(mds.refused(pool("p", 1, 4, &[9])), ProblemKind::Invalid);
    assert_eq!(mds.refused(pool("p", 3, 0, &[])), ProblemKind::Limit);
    assert_eq!(mds.refused(pool("p", 3, u32::MAX, &[])), ProblemKind::Limit);
    assert_eq!(mds.refused(pool("p q", 3, 4, &[])), ProblemKind::Invalid);
    mds.run(pool("p", 2, 4, &[1, 3])).unwrap();
    assert_eq!(mds.state.copysets.len(), 16);
}

#[test]
fn volumes_start_on_different_copysets() {
    let mut mds = Mds::ready(GIB);
    let firsts: BTreeSet<_> = (0..12)
        .map(|n| {
            let volume = mds.create(&format!("v{n}"), GIB).unwrap();
            mds.state.map.route(ChunkId { volume, index: 0 }).unwrap().0
        })
        .collect();
    assert_eq!(firsts.len(), 12);
}

#[test]
fn a_second_mds_on_the_directory_and_a_foreign_file_are_refused() {
    let mds = Mds::ready(GIB);
    assert_eq!(RedbStore::open(mds.dir.path()).unwrap_err().kind, ProblemKind::InUse);
    let other = TempDir::new().unwrap();
    std::fs::write(other.path().join(crate::store::FILE), vec![b'x'; 8192]).unwrap();
    assert_eq!(RedbStore::open(other.path()).unwrap_err().kind, ProblemKind::Storage);
    let file = other.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert_eq!(RedbStore::open(&file).unwrap_err().kind, ProblemKind::Storage);
}

#[test]
fn records_that_contradict_each_other_are_refused() {
    let record = VolumeRecord {
        name: "vol0".into(),
        bytes: GIB,
        block_bytes: 4096,
        pool: 1,
        copysets: vec![CopysetId(1)],
        deleted: false,
        purge_at_s: None,
    };
    let pool = PoolRecord { name: "p".into(), replicas: 1, copysets: vec![CopysetId(1)], targets: vec![] };
    let rows = [
        vec![Change::Volume(VolumeId(1), record)],
        vec![Change::Pool(1, pool)],
        vec![Change::Allocated(VolumeId(1), Allocated::from_bytes(&[1]))],
        vec![Change::Export((VolumeId(1), ExportProtocol::Nbd), AllowedHosts::new())],
    ];
    for records in rows {
        let shown = format!("{records:?}");
        let problem = State::restore(Policy::default(), Uuid([1; 16]), records).expect_err(&shown);
        assert_eq!(problem.kind, ProblemKind::Storage, "{problem}");
    }
}

fn any_command() -> impl Strategy<Value = Command> {
    let name = || (0u8..4).prop_map(|n| format!("v{n}"));
    let volume = || {
        prop_oneof![name().prop_map(VolumeRef::Name), (0u32..8).prop_map(|id| VolumeRef::Id(VolumeId(id)))]
    };
    let protocol = || prop_oneof![Just(ExportProtocol::Nbd), Just(ExportProtocol::Nvme)];
    prop_oneof![
        (0u32..6, 1u64..9).prop_map(|(id, gib)| Command::Register(target(id, gib * GIB))),
        (1u32..6, proptest::collection::vec((0u32..8).prop_map(VolumeId), 0..8))
            .prop_map(|(id, freed)| Command::Heartbeat(beat(id, &freed))),
        (0u32..8, proptest::collection::vec(0u32..5, 0..4)).prop_map(|(v, s)| allocate(VolumeId(v), &s)),
        (name(), 0u64..5).prop_map(|(name, gib)| create(&name, gib * GIB + 4096)),
        (name(), 0u32..4, 0u32..5).prop_map(|(name, replicas, copysets)| Command::CreatePool {
            name,
            replicas,
            copysets,
            targets: Vec::new()
        }),
        volume().prop_map(delete),
        (volume(), 0u64..50).prop_map(|(volume, at)| Command::DeleteVolume { volume, purge_at_s: Some(at) }),
        (volume(), "[ab]?").prop_map(|(volume, name)| Command::UndeleteVolume { volume, name }),
        (volume(), "[ab]").prop_map(|(volume, name)| Command::RenameVolume { volume, name }),
        (0u64..50).prop_map(|unix_s| Command::Tick { unix_s }),
        (1u32..6).prop_map(|id| Command::RemoveTarget(TargetId(id))),
        (1u32..6, any::<bool>()).prop_map(|(id, draining)| Command::Drain { target: TargetId(id), draining }),
        (volume(), 0u64..6)
            .prop_map(|(volume, gib)| Command::ResizeVolume { volume, bytes: gib * GIB + 4096 }),
        (volume(), protocol(), proptest::option::of(0u8..3)).prop_map(|(volume, protocol, hosts)| {
            let allowed =
                hosts.map(|count| (0..count).map(|n| format!("nqn.2014-08.org.example:{n}")).collect());
            Command::AddExport { volume, protocol, allowed }
        }),
        (volume(), protocol()).prop_map(|(v, p)| Command::RemoveExport(v, p)),
        (volume(), "[ab ]", any::<bool>(), any::<bool>()).prop_map(
            |(volume, holder, exclusive, take_over)| {
                Command::Attach(Attach { volume, holder, exclusive, take_over })
            }
        ),
        (volume(), "[ab]").prop_map(|(volume, holder)| Command::Detach { volume, holder }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is asked, in whatever order, with restarts anywhere: what was durable is there
    /// again, generations only grow, and no id comes back.
    #[test]
    fn any_history_survives_restarts(
        history in proptest::collection::vec((any_command(), proptest::bool::weighted(0.1)), 1..60),
    ) {
        let mut mds = Mds::ready(8 * GIB);
        let mut born: BTreeSet<VolumeId> = BTreeSet::new();
        for (command, restart) in history {
            let (before, live) = (mds.generation(), mds.state.volumes.keys().copied().collect::<BTreeSet<_>>());
            let creates = matches!(command, Command::CreateVolume { .. });
            let reply = mds.run(command);
            prop_assert!(mds.generation() >= before);
            if let (true, Ok(Reply::Volume(id))) = (creates, &reply) {
                prop_assert!(born.insert(*id), "{} was given out before", id);
                prop_assert!(!live.contains(id));
            }
            if restart {
                let durable = mds.durable();
                mds = mds.restart();
                prop_assert_eq!(mds.durable(), durable);
            }
        }
    }
}

#[test]
fn a_target_drained_says_so_in_the_map_until_it_is_used_again() {
    let mut mds = Mds::ready(GIB);
    let drain = |draining| Command::Drain { target: TargetId(2), draining };
    let before = mds.generation();
    mds.run(drain(true)).unwrap();
    mds.run(drain(true)).unwrap();
    assert_eq!(mds.generation(), before + 1, "once");
    assert!(mds.state.map.is_draining(TargetId(2)) && !mds.state.map.is_draining(TargetId(1)));
    // Neither a restart of the target nor one of the MDS makes it forget.
    mds.run(Command::Register(target(2, GIB))).unwrap();
    let mut mds = mds.restart();
    assert!(mds.state.map.is_draining(TargetId(2)));
    mds.run(drain(false)).unwrap();
    assert!(!mds.state.map.is_draining(TargetId(2)));
    let stranger = Command::Drain { target: TargetId(9), draining: true };
    assert_eq!(mds.refused(stranger), ProblemKind::NotFound);
}

#[test]
fn a_volume_in_the_bin_is_not_served_nor_freed_and_comes_back_with_all_it_held() {
    let mut mds = Mds::ready(16 * GIB);
    let id = mds.create("vol0", 4 * GIB).unwrap();
    mds.run(allocate(id, &[0, 2])).unwrap();
    mds.run(Command::DeleteVolume { volume: named("vol0"), purge_at_s: Some(1000) }).unwrap();
    assert!(!mds.state.map.volumes.contains_key(&id), "neither served nor told to be freed");
    assert_eq!(mds.refused(allocate(id, &[1])), ProblemKind::NotFound);
    assert!(mds.state.pool_reserved(1) > 0, "it takes up space still");
    // Its name is free meanwhile, and it can come back only under a free one.
    let second = mds.create("vol0", GIB).unwrap();
    let undelete = |name: &str| Command::UndeleteVolume { volume: named("vol0"), name: name.into() };
    assert_eq!(mds.refused(undelete("")), ProblemKind::AlreadyExists);
    let mut mds = mds.restart();
    mds.run(Command::Tick { unix_s: 999 }).unwrap();
    assert_eq!(mds.run(undelete("old")).unwrap(), Reply::Volume(id));
    assert_eq!(mds.state.map.volumes[&id].name, "old");
    assert_eq!(mds.state.allocation(id).count(), 2);
    // And when its time is over it is freed.
    mds.run(Command::DeleteVolume { volume: VolumeRef::Id(second), purge_at_s: Some(1000) }).unwrap();
    mds.run(Command::Tick { unix_s: 1000 }).unwrap();
    assert!(mds.state.map.volumes[&second].deleted);
    assert_eq!(mds.refused(undelete("")), ProblemKind::NotFound);
}

#[test]
fn a_volume_is_renamed_unless_hosts_know_it_by_its_name() {
    let mut mds = Mds::ready(GIB);
    let id = mds.create("a", GIB).unwrap();
    mds.create("b", GIB).unwrap();
    let rename = |from: &str, to: &str| Command::RenameVolume { volume: named(from), name: to.into() };
    assert_eq!(mds.refused(rename("a", "b")), ProblemKind::AlreadyExists);
    assert_eq!(mds.refused(rename("a", "/")), ProblemKind::Invalid);
    mds.run(rename("a", "c")).unwrap();
    assert_eq!(mds.state.map.volumes[&id].name, "c");
    assert_eq!(mds.refused(rename("a", "d")), ProblemKind::NotFound);
    mds.create("a", GIB).unwrap();
    let export = Command::AddExport { volume: named("c"), protocol: ExportProtocol::Nbd, allowed: None };
    mds.run(export).unwrap();
    assert_eq!(mds.refused(rename("c", "d")), ProblemKind::InUse);
}

#[test]
fn a_target_is_removed_only_when_it_is_away_and_holds_nothing() {
    let mut mds = Mds::ready(GIB);
    mds.run(Command::Register(target(4, GIB))).unwrap();
    assert_eq!(mds.refused(Command::RemoveTarget(TargetId(9))), ProblemKind::NotFound);
    assert_eq!(mds.refused(Command::RemoveTarget(TargetId(1))), ProblemKind::InUse, "it holds replicas");
    assert_eq!(mds.refused(Command::RemoveTarget(TargetId(4))), ProblemKind::InUse, "it runs");
    mds.now = mds.now + Span::ms(10_000);
    mds.run(Command::RemoveTarget(TargetId(4))).unwrap();
    let mds = mds.restart();
    assert!(!mds.state.map.targets.contains_key(&TargetId(4)));
}

/// A heartbeat that tells (volume, held, led).
fn slots(id: u32, told: &[(VolumeId, u64, u64)], slots_whole: bool) -> Command {
    let slots = told.iter().map(|(volume, held, led)| (*volume, Slots { held: *held, led: *led })).collect();
    Command::Heartbeat(Heartbeat { slots, slots_whole, ..beat(id, &[]) })
}

#[test]
fn space_is_the_sum_of_what_targets_told_last_and_no_more_after_restarts_and_losses() {
    let mut mds = Mds::ready(16 * GIB);
    let (one, two) = (mds.create("one", GIB).unwrap(), mds.create("two", 2 * GIB).unwrap());
    let chunk = CHUNK_BYTES as u64;
    let taken = |mds: &Mds, id| {
        let space = mds.state.space_of(id);
        (space.allocated / chunk, space.replicated / chunk)
    };
    mds.run(slots(1, &[(one, 9, 9)], false)).unwrap();
    assert_eq!(taken(&mds, one), (0, 0), "changes to something unknown say nothing");
    assert!(mds.state.wants_slots(TargetId(1)));
    mds.run(slots(1, &[(one, 3, 2), (two, 1, 0)], true)).unwrap();
    mds.run(slots(2, &[(one, 3, 1), (two, 1, 1)], true)).unwrap();
    mds.run(slots(3, &[(one, 3, 0)], true)).unwrap();
    assert!(!mds.state.wants_slots(TargetId(1)));
    assert_eq!((taken(&mds, one), taken(&mds, two)), ((3, 9), (1, 2)));
    let all = mds.state.space_of_pool(None);
    assert_eq!(all, mds.state.space_of_pool(Some(1)));
    assert_eq!((all.logical, all.allocated / chunk, all.replicated / chunk), (3 * GIB, 4, 11));
    // A trim; a volume that is not named stays as it was.
    mds.run(slots(1, &[(one, 1, 1)], false)).unwrap();
    mds.run(slots(3, &[(one, 0, 0)], false)).unwrap();
    assert_eq!((taken(&mds, one), taken(&mds, two)), ((2, 4), (1, 2)));
    // What was told whole before does not count twice.
    mds.run(slots(2, &[(one, 3, 2)], true)).unwrap();
    assert_eq!((taken(&mds, one), taken(&mds, two)), ((3, 4), (0, 1)));
    mds.run(Command::Register(target(2, 16 * GIB))).unwrap();
    assert_eq!(taken(&mds, one), (1, 1), "it starts and tells again");
    let mut mds = mds.restart();
    assert!(mds.state.wants_slots(TargetId(1)) && taken(&mds, one) == (0, 0));
    mds.run(slots(1, &[(one, 1, 1)], true)).unwrap();
    assert_eq!(taken(&mds, one), (1, 1));
    // Its replicas are built elsewhere, so they are counted there.
    mds.now = mds.now + mds.state.policy().offline_after + Span::ms(1000);
    mds.run(slots(2, &[(one, 1, 1)], true)).unwrap();
    mds.run(Command::Tick { unix_s: 0 }).unwrap();
    assert_eq!(taken(&mds, one), (1, 1));
    assert!(mds.state.wants_slots(TargetId(1)) && !mds.state.wants_slots(TargetId(2)));
}
