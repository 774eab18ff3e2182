//! What a restore puts back is older than the cluster. Hazards: a replica that was freed since is made anew, empty and
//! with a vote; a volume that was taken out of the bin since is purged.

use ashlar_mds_lite::StoreAt;
use ashlar_mds_lite::record::{Endpoints, Uuid, VolumeRecord};
use ashlar_mds_lite::snapshot::{BIN_GRACE_S, Snapshot, restore};
use ashlar_mds_lite::state::{
    Change, Command, Heartbeat, Membership, Policy, Registration, Replica, State, Usage, VolumeRef,
};
use ashlar_mds_lite::store::{RedbStore, Store};
use protocol::control::pb;
use protocol::types::{CopysetId, LogIndex, SEGMENT_BYTES, ShardAddr, TargetId, Term, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

const CLUSTER: Uuid = Uuid([7; 16]);
/// One that never changed before the snapshot, and one that did.
const FRESH: CopysetId = CopysetId(1);
const MOVED: CopysetId = CopysetId(2);

/// An MDS, with all that it ever wrote.
struct Mds {
    state: State,
    written: Vec<Change>,
}

impl Mds {
    /// Six targets, two copysets of three, a volume.
    fn new() -> Self {
        let policy = Policy { copysets: 2, targets_expected: 6, ..Policy::default() };
        let mut mds =
            Self { state: State::restore(policy, CLUSTER, Vec::new()).unwrap(), written: Vec::new() };
        (1..=6).for_each(|id| mds.run(Command::Register(registration(id))));
        let (name, bytes) = ("vol0".into(), SEGMENT_BYTES);
        mds.run(Command::CreateVolume { name, bytes, block_bytes: 4096, pool: String::new() });
        mds
    }

    fn run(&mut self, command: Command) {
        let decision = self.state.decide(Time(1), command).unwrap();
        self.written.extend(decision.changes.clone());
        self.state.apply(decision.changes);
    }

    /// Of a volume that was put into the bin, to be purged at once.
    fn bin(&mut self) {
        let volume = VolumeRef::Name("vol0".into());
        self.run(Command::DeleteVolume { volume, purge_at_s: Some(1) });
    }

    /// The leader of a copyset tells of its members.
    fn told(&mut self, copyset: CopysetId, (term, commit): (u64, u64), voters: &[ShardAddr]) {
        let leader = voters[0];
        let replica = Replica {
            copyset,
            shard: leader.shard,
            term: Term(term),
            role: pb::ReplicaRole::Leader.into(),
            leader: Some(leader.target),
            commit: LogIndex(commit),
            applied: LogIndex(commit),
            health: 1,
            membership: Some(Membership {
                voters: voters.to_vec(),
                learners: Vec::new(),
                settled: true,
                lags: Vec::new(),
                busy: false,
            }),
        };
        let Registration { id, disk_uuid, .. } = registration(leader.target.0);
        self.run(Command::Heartbeat(Heartbeat {
            target: id,
            disk_uuid,
            known_generation: 0,
            usage: Usage::default(),
            replicas: vec![replica],
            freed: Vec::new(),
            failed_shards: BTreeSet::new(),
            slots: BTreeMap::new(),
            slots_whole: false,
            attached: Vec::new(),
        }));
    }

    fn members(&self, copyset: CopysetId) -> BTreeSet<ShardAddr> {
        self.state.map().copysets[&copyset].members.iter().copied().collect()
    }

    fn epoch(&self, copyset: CopysetId) -> u64 {
        self.state.map().copysets[&copyset].epoch
    }

    /// The three targets that a copyset has no replica on.
    fn others(&self, copyset: CopysetId) -> Vec<ShardAddr> {
        let members = self.members(copyset);
        let all = (1..=6).map(|id| ShardAddr { target: TargetId(id), shard: 0 });
        all.filter(|at| !members.contains(at)).collect()
    }

    /// As it is after a restore from what it has written.
    async fn restored(&self) -> Self {
        let dir = TempDir::new().unwrap();
        let (file, into) = (dir.path().join("snapshot"), dir.path().join("mds"));
        let snapshot = Snapshot { cluster: CLUSTER, changes: self.written.clone() };
        std::fs::write(&file, snapshot.encode()).unwrap();
        restore(&file, &StoreAt::Directory(into.clone()), false).await.unwrap();
        let written = RedbStore::open(&into).unwrap().load().unwrap();
        let state = State::restore(*self.state.policy(), CLUSTER, written.clone()).unwrap();
        Self { state, written }
    }
}

fn registration(id: u32) -> Registration {
    Registration {
        id: TargetId(id),
        cluster: None,
        disk_uuid: Uuid([id as u8; 16]),
        peers: vec![([127, 0, 0, 1], 7000 + id as u16).into()],
        endpoints: Endpoints::default(),
        capacity_bytes: 64 << 30,
        zone: String::new(),
        host: String::new(),
        labels: BTreeMap::new(),
    }
}

#[tokio::test]
async fn no_replica_is_made_with_a_vote_on_the_word_of_a_restored_map() {
    let mut mds = Mds::new();
    assert_eq!((mds.epoch(FRESH), mds.epoch(MOVED)), (0, 0));
    mds.told(MOVED, (2, 10), &mds.others(MOVED));
    mds.told(MOVED, (2, 20), &mds.others(MOVED));
    let snapshot = mds.restored().await;
    // Targets make replicas that vote for copysets of epoch 0 (target-daemon/src/shard/mod.rs).
    assert_eq!((snapshot.epoch(FRESH), snapshot.epoch(MOVED)), (1, 2));
    assert_eq!((snapshot.members(FRESH), snapshot.members(MOVED)), (mds.members(FRESH), mds.members(MOVED)));
}

#[tokio::test]
async fn what_leaders_report_replaces_a_restored_record_whatever_its_epoch() {
    let mut mds = Mds::new();
    mds.told(MOVED, (2, 10), &mds.others(MOVED));
    // How often they have moved since the snapshot, of which the record's epoch knows nothing.
    for moves in 1..=3 {
        let mut restored = mds.restored().await;
        for copyset in [FRESH, MOVED] {
            let before = restored.epoch(copyset);
            let real = restored.others(copyset);
            // A leader that was deposed before the snapshot is not believed.
            restored.told(MOVED, (1, 90), &restored.others(MOVED));
            restored.told(copyset, (2, 10 + moves), &real);
            assert_eq!(restored.members(copyset), real.into_iter().collect());
            assert!(restored.epoch(copyset) > before);
        }
    }
}

#[tokio::test]
async fn a_volume_that_a_restore_finds_in_the_bin_is_not_purged_for_a_day() {
    let mut mds = Mds::new();
    mds.bin();
    let mut restored = mds.restored().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    restored.run(Command::Tick { unix_s: now + BIN_GRACE_S - 60 });
    let changes = restored.written.clone();
    let binned: Vec<(VolumeId, VolumeRecord)> =
        Snapshot { cluster: CLUSTER, changes }.in_bin().map(|(id, record)| (id, record.clone())).collect();
    assert_eq!(binned.len(), 1, "it is told of");
    assert!(!binned[0].1.deleted);
    let volume = VolumeRef::Name("vol0".into());
    restored.run(Command::UndeleteVolume { volume, name: String::new() });
    assert!(restored.state.map().volumes.contains_key(&binned[0].0));
    // Left alone it is purged in the end.
    let mut restored = mds.restored().await;
    restored.run(Command::Tick { unix_s: now + BIN_GRACE_S + 3600 });
    assert!(restored.state.map().volumes[&binned[0].0].deleted);
}
