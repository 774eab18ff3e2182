//! The MDS's decisions: state + command -> changes + reply. Pure: no IO, no clock, no randomness.
//!
//! Calling contract: [`State::decide`] alters only what heartbeats tell (kept in memory); the
//! caller makes the decision's changes durable in one transaction, then hands them to
//! [`State::apply`], then lets the reply out. When the transaction fails, nothing was changed and
//! the reply must not go out. Invariants: ids are never given out twice; generation grows with
//! each change that the map shows; every reference among records resolves.

mod error;
pub mod schedule;
mod sessions;
mod space;
mod targets;
mod volumes;

use crate::record::{
    Allocated, AllowedHosts, CopysetRecord, Counters, Endpoints, ExportKey, PoolId, PoolRecord,
    SessionRecord, TargetRecord, Uuid, VolumeRecord,
};
use protocol::control::{Problem, check_holder, limits, map_from_pb, map_to_pb, pb};
use protocol::map::{
    ClusterMap, CopysetEntry, ExportEntry, ExportProtocol, Session, TargetEntry, VolumeEntry,
};
use protocol::types::{CopysetId, LogIndex, SessionEpoch, ShardAddr, Span, TargetId, Term, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

pub use sessions::{Attach, Attached};
pub use space::{Slots, Space};

/// The pool that is created by itself, and used when none is named.
pub const POOL_DEFAULT: &str = "default";

/// How this MDS decides; not part of what is kept.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Replicas of the default pool, 1 to 7.
    pub replicas: u32,
    /// Copysets of the default pool; 0: it is not created by itself.
    pub copysets: u32,
    /// The default pool is created when this many targets have registered.
    pub targets_expected: u32,
    /// How often targets are to send heartbeats.
    pub heartbeat: Span,
    /// Hosts are sent elsewhere when a target's last heartbeat is older.
    pub unstable_after: Span,
    /// Its replicas are built elsewhere when a target's last heartbeat is older.
    pub offline_after: Span,
    /// Most replicas that are built on a target at once.
    pub tasks_a_target: u32,
    /// How long after it was last seen attached a host still holds its volume.
    pub session_lease: Span,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            replicas: 3,
            copysets: 12,
            targets_expected: 3,
            heartbeat: Span::ms(500),
            unstable_after: Span::ms(2500),
            offline_after: Span::ms(60_000),
            tasks_a_target: 2,
            session_lease: Span::ms(30_000),
        }
    }
}

/// One durable change; a transaction is a list of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The counters now are these.
    Counters(Counters),
    /// A target is new or changed.
    Target(TargetId, TargetRecord),
    /// A target is forgotten.
    TargetRemoved(TargetId),
    /// A pool is new.
    Pool(PoolId, PoolRecord),
    /// A copyset is new.
    Copyset(CopysetId, CopysetRecord),
    /// A volume is new or changed.
    Volume(VolumeId, VolumeRecord),
    /// A deleted volume has no chunk left: forget it and its allocation.
    VolumePurged(VolumeId),
    /// A volume's allocation is now this.
    Allocated(VolumeId, Allocated),
    /// A volume is offered, to these hosts.
    Export(ExportKey, AllowedHosts),
    /// The offer ends.
    ExportRemoved(ExportKey),
    /// Who is attached to a volume is now this.
    Session(VolumeId, SessionRecord),
}

/// A volume as requests name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeRef {
    /// By id.
    Id(VolumeId),
    /// By name, among those not deleted.
    Name(String),
}

/// What the MDS is told or asked to do.
#[derive(Clone, Debug)]
pub enum Command {
    /// A target starts.
    Register(Registration),
    /// A target lives.
    Heartbeat(Heartbeat),
    /// Segments are about to be written first.
    Allocate {
        /// The volume.
        volume: VolumeId,
        /// Indexes; twice the same is harmless.
        segments: Vec<u32>,
    },
    /// Create a pool and its copysets.
    CreatePool {
        /// Unique.
        name: String,
        /// Replicas a copyset.
        replicas: u32,
        /// How many copysets.
        copysets: u32,
        /// On which targets; empty: all.
        targets: Vec<TargetId>,
    },
    /// Create a volume.
    CreateVolume {
        /// Unique among those not deleted.
        name: String,
        /// Size.
        bytes: u64,
        /// 512 or 4096.
        block_bytes: u32,
        /// Name of its pool.
        pool: String,
    },
    /// Make a volume larger.
    ResizeVolume {
        /// Which.
        volume: VolumeRef,
        /// Its new size.
        bytes: u64,
    },
    /// Put a volume into the bin, or mark it deleted.
    DeleteVolume {
        /// Which.
        volume: VolumeRef,
        /// When it is deleted, in seconds since 1970; `None`: now.
        purge_at_s: Option<u64>,
    },
    /// Take a volume out of the bin.
    UndeleteVolume {
        /// Which; by name, the last one of that name that was put there.
        volume: VolumeRef,
        /// Its name from now on; empty: as before.
        name: String,
    },
    /// Call a volume something else.
    RenameVolume {
        /// Which.
        volume: VolumeRef,
        /// Its new name.
        name: String,
    },
    /// Forget a target that is away and holds nothing.
    RemoveTarget(TargetId),
    /// Offer a volume.
    AddExport {
        /// Which.
        volume: VolumeRef,
        /// How.
        protocol: ExportProtocol,
        /// To whom only, by NQN; `None`: as before, and to anybody if it is new.
        allowed: Option<AllowedHosts>,
    },
    /// End the offer.
    RemoveExport(VolumeRef, ExportProtocol),
    /// A host is to be attached to a volume.
    Attach(Attach),
    /// A host's attachment ends.
    Detach {
        /// To which volume.
        volume: VolumeRef,
        /// Whose.
        holder: String,
    },
    /// Empty a target, or use it again.
    Drain {
        /// Which.
        target: TargetId,
        /// Whether it is to be emptied.
        draining: bool,
    },
    /// Time passes: the schedulers look around, and what is due in the bin is deleted.
    Tick {
        /// Seconds since 1970, for what must survive a restart.
        unix_s: u64,
    },
}

/// A target that starts.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Chosen by the operator.
    pub id: TargetId,
    /// What its disk says; `None` for a disk that never joined.
    pub cluster: Option<Uuid>,
    /// Identity of its disk.
    pub disk_uuid: Uuid,
    /// One address a shard.
    pub peers: Vec<SocketAddr>,
    /// Where else it is reached.
    pub endpoints: Endpoints,
    /// What its chunk slots may take up.
    pub capacity_bytes: u64,
    /// Where it stands; empty: nobody said.
    pub zone: String,
    /// The machine that it is on; empty: one of its own.
    pub host: String,
    /// What else its operator says of it.
    pub labels: BTreeMap<String, String>,
}

/// A target that lives.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// Which.
    pub target: TargetId,
    /// Identity of its disk.
    pub disk_uuid: Uuid,
    /// The map that it has.
    pub known_generation: u64,
    /// Its space.
    pub usage: Usage,
    /// Its replicas.
    pub replicas: Vec<Replica>,
    /// Deleted volumes of which it holds nothing any more.
    pub freed: Vec<VolumeId>,
    /// Shards whose disk failed.
    pub failed_shards: BTreeSet<u16>,
    /// Chunk slots of volumes: of all that have some, or of those whose number changed.
    pub slots: BTreeMap<VolumeId, Slots>,
    /// Those not named have none.
    pub slots_whole: bool,
    /// Hosts that are attached through it and say who they are.
    pub attached: Vec<Attached>,
}

/// Space on a target, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// What chunk slots may take up.
    pub capacity: u64,
    /// Slots in use.
    pub used: u64,
    /// Slots preformatted.
    pub formatted: u64,
}

/// One replica as its target reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replica {
    /// Of which copyset.
    pub copyset: CopysetId,
    /// On which shard.
    pub shard: u16,
    /// Its term.
    pub term: Term,
    /// `ReplicaRole` as on the wire.
    pub role: i32,
    /// Whom it follows in that term.
    pub leader: Option<TargetId>,
    /// Its commit index.
    pub commit: LogIndex,
    /// Its applied index.
    pub applied: LogIndex,
    /// `ReplicaHealth` as on the wire.
    pub health: i32,
    /// Told by a leader.
    pub membership: Option<Membership>,
}

/// Who belongs to a copyset, as its leader reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Membership {
    /// Who votes.
    pub voters: Vec<ShardAddr>,
    /// Who is being filled.
    pub learners: Vec<ShardAddr>,
    /// It is committed.
    pub settled: bool,
    /// How far the others are behind, as on the wire.
    pub lags: Vec<pb::PeerLag>,
    /// IO came lately.
    pub busy: bool,
}

/// What the last heartbeat of a target told.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When it came.
    pub at: Time,
    /// The map that the target had.
    pub known_generation: u64,
    /// Its space.
    pub usage: Usage,
    /// Its replicas, those that the map does not place there too: a remnant, or one that is being filled.
    pub replicas: BTreeMap<CopysetId, Replica>,
    /// Shards whose disk failed.
    pub failed_shards: BTreeSet<u16>,
    /// Whether it has reported what it holds since it registered.
    pub reported: bool,
}

/// What is answered once the changes are durable.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// To a registration, the end of an offer, a target drained.
    Done,
    /// To a heartbeat: what the target is to do.
    Orders(Vec<pb::Order>),
    /// The volume's allocated bytes.
    Allocated(u64),
    /// The pool created.
    Pool(PoolId),
    /// The volume created, grown, deleted or offered.
    Volume(VolumeId),
}

/// Changes to make durable and apply, then the reply to let out.
#[derive(Clone, Debug)]
pub struct Decision {
    /// In order; empty when there is nothing to write.
    pub changes: Vec<Change>,
    /// The reply.
    pub reply: Reply,
}

impl Decision {
    fn unchanged(reply: Reply) -> Self {
        Self { changes: Vec::new(), reply }
    }
}

/// Who was last said to lead a copyset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leader {
    /// Who.
    pub target: TargetId,
    /// In which term.
    pub term: Term,
}

/// Everything the MDS knows.
#[derive(Debug)]
pub struct State {
    policy: Policy,
    cluster: Uuid,
    counters: Counters,
    pub(crate) targets: BTreeMap<TargetId, TargetRecord>,
    pub(crate) pools: BTreeMap<PoolId, PoolRecord>,
    pub(crate) copysets: BTreeMap<CopysetId, CopysetRecord>,
    pub(crate) volumes: BTreeMap<VolumeId, VolumeRecord>,
    pub(crate) allocated: BTreeMap<VolumeId, Allocated>,
    pub(crate) exports: BTreeMap<ExportKey, AllowedHosts>,
    /// Of volumes that somebody was ever attached to by name.
    pub(crate) sessions: BTreeMap<VolumeId, SessionRecord>,
    /// Names of volumes that are not deleted.
    names: BTreeMap<String, VolumeId>,
    /// The records as the map shows them.
    map: Arc<ClusterMap>,
    /// In memory only.
    seen: BTreeMap<TargetId, Seen>,
    /// In memory only: who has freed which deleted volume.
    freed: BTreeMap<VolumeId, BTreeSet<TargetId>>,
    schedule: schedule::Schedule,
    space: space::Reported,
    leases: sessions::Leases,
}

impl State {
    /// The state that a store's records make.
    ///
    /// # Errors
    /// `Storage` when they contradict each other.
    pub fn restore(policy: Policy, cluster: Uuid, records: Vec<Change>) -> Result<Self, Problem> {
        let mut state = Self {
            policy,
            cluster,
            counters: Counters::default(),
            targets: BTreeMap::new(),
            pools: BTreeMap::new(),
            copysets: BTreeMap::new(),
            volumes: BTreeMap::new(),
            allocated: BTreeMap::new(),
            exports: BTreeMap::new(),
            sessions: BTreeMap::new(),
            names: BTreeMap::new(),
            map: Arc::default(),
            seen: BTreeMap::new(),
            freed: BTreeMap::new(),
            schedule: schedule::Schedule::default(),
            space: space::Reported::default(),
            leases: sessions::Leases::default(),
        };
        for change in records {
            state.apply_one(change);
        }
        state.check()?;
        state.map = Arc::new(state.make_map());
        Ok(state)
    }

    /// Decides on a command. Alters only what is kept in memory; see the module's contract.
    pub fn decide(&mut self, now: Time, command: Command) -> Result<Decision, Problem> {
        match command {
            Command::Register(registration) => self.register(now, registration),
            Command::Heartbeat(heartbeat) => self.heartbeat(now, heartbeat),
            Command::Allocate { volume, segments } => self.allocate(volume, &segments),
            Command::CreatePool { name, replicas, copysets, targets } => {
                self.create_pool(&name, replicas, copysets, &targets)
            }
            Command::CreateVolume { name, bytes, block_bytes, pool } => {
                self.create_volume(name, bytes, block_bytes, &pool)
            }
            Command::ResizeVolume { volume, bytes } => self.resize_volume(&volume, bytes),
            Command::DeleteVolume { volume, purge_at_s } => self.delete_volume(&volume, purge_at_s),
            Command::UndeleteVolume { volume, name } => self.undelete_volume(&volume, name),
            Command::RenameVolume { volume, name } => self.rename_volume(&volume, name),
            Command::AddExport { volume, protocol, allowed } => self.add_export(&volume, protocol, allowed),
            Command::RemoveExport(volume, protocol) => self.remove_export(&volume, protocol),
            Command::Attach(request) => self.attach(&request, now),
            Command::Detach { volume, holder } => self.detach(&volume, &holder),
            Command::Drain { target, draining } => self.drain(target, draining),
            Command::RemoveTarget(target) => self.remove_target(target, now),
            Command::Tick { unix_s } => {
                self.tick(now);
                self.forget_space_of_offline(now);
                Ok(Decision { changes: self.purge(unix_s), reply: Reply::Done })
            }
        }
    }

    /// Takes over changes that are durable.
    pub fn apply(&mut self, changes: Vec<Change>) {
        let generation = self.counters.generation;
        for change in changes {
            self.apply_one(change);
        }
        assert!(self.counters.generation >= generation, "generation never goes back");
        if self.counters.generation != generation {
            self.map = Arc::new(self.make_map());
        }
    }

    fn apply_one(&mut self, change: Change) {
        match change {
            Change::Counters(counters) => self.counters = counters,
            Change::Target(id, record) => drop(self.targets.insert(id, record)),
            Change::TargetRemoved(id) => {
                self.targets.remove(&id);
                self.seen.remove(&id);
                self.space.forget(id);
            }
            Change::Pool(id, record) => drop(self.pools.insert(id, record)),
            Change::Copyset(id, record) => drop(self.copysets.insert(id, record)),
            Change::Volume(id, record) => {
                let old = self.volumes.get(&id).map(|old| &old.name);
                if let Some(old) = old.filter(|old| self.names.get(*old) == Some(&id)) {
                    self.names.remove(old);
                }
                if record.is_live() {
                    self.names.insert(record.name.clone(), id);
                }
                self.volumes.insert(id, record);
            }
            Change::VolumePurged(id) => {
                self.volumes.remove(&id);
                self.allocated.remove(&id);
                self.freed.remove(&id);
                self.sessions.remove(&id);
                self.leases.forget(id);
            }
            Change::Allocated(id, allocated) => drop(self.allocated.insert(id, allocated)),
            Change::Export(key, allowed) => drop(self.exports.insert(key, allowed)),
            Change::ExportRemoved(key) => drop(self.exports.remove(&key)),
            Change::Session(id, session) => {
                self.leases.keep(id, &session.holders);
                self.sessions.insert(id, session);
            }
        }
    }

    /// The current map.
    pub fn map(&self) -> &Arc<ClusterMap> {
        &self.map
    }

    /// The cluster's id.
    pub fn cluster(&self) -> Uuid {
        self.cluster
    }

    /// How this MDS decides.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The volume that a request names.
    ///
    /// # Errors
    /// `NotFound`. A volume being deleted is found by its id only.
    pub fn find_volume(&self, volume: &VolumeRef) -> Result<(VolumeId, &VolumeRecord), Problem> {
        let id = match volume {
            VolumeRef::Id(id) => Some(*id),
            VolumeRef::Name(name) => self.names.get(name).copied(),
        };
        let found = id.and_then(|id| self.volumes.get(&id).map(|record| (id, record)));
        found.ok_or_else(|| error::no_volume(volume))
    }

    /// The allocation of a volume.
    pub fn allocation(&self, volume: VolumeId) -> Allocated {
        self.allocated.get(&volume).cloned().unwrap_or_default()
    }

    /// What a pool's volumes may take up, before replication: the room of whichever target fills
    /// up first when every copyset takes its equal share.
    pub fn pool_capacity(&self, pool: &PoolRecord) -> u64 {
        let mut held: BTreeMap<TargetId, u128> = BTreeMap::new();
        for member in pool.copysets.iter().flat_map(|id| &self.copysets[id].members) {
            *held.entry(member.target).or_default() += 1;
        }
        let copysets = pool.copysets.len() as u128;
        let room = |(target, held): (&TargetId, &u128)| {
            u128::from(self.targets[target].capacity_bytes) * copysets / held
        };
        held.iter().map(room).min().map_or(0, |bytes| u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// What a pool's volumes may fill of the segments that they have begun to write, before replication,
    /// those being deleted included.
    pub fn pool_reserved(&self, pool: PoolId) -> u64 {
        let of = |id: &VolumeId, volume: &VolumeRecord| {
            self.allocated.get(id).map_or(0, |allocated| allocated.bytes_of(volume))
        };
        self.volumes.iter().filter(|(_, v)| v.pool == pool).map(|(id, v)| of(id, v)).sum()
    }

    /// The last heartbeat of a target since the start.
    pub fn seen(&self, target: TargetId) -> Option<&Seen> {
        self.seen.get(&target)
    }

    /// Whether a target's last heartbeat is recent.
    pub fn is_online(&self, target: TargetId, now: Time) -> bool {
        self.seen.get(&target).is_some_and(|seen| now - seen.at <= self.policy.unstable_after)
    }

    /// Who leads a copyset by the highest term that any of its online targets reported.
    pub fn leader(&self, copyset: CopysetId, now: Time) -> Option<Leader> {
        let record = self.copysets.get(&copyset)?;
        let reports = record.members.iter().filter(|m| self.is_online(m.target, now));
        let hints = reports.filter_map(|m| {
            let replica = self.seen[&m.target].replicas.get(&copyset)?;
            let target = replica.leader?;
            let goal = self.task(copyset).map_or(&[][..], |task| &task.goal);
            let member = record.members.iter().chain(goal).any(|m| m.target == target);
            member.then_some(Leader { target, term: replica.term })
        });
        hints.max_by_key(|hint| (hint.term, hint.target))
    }

    /// Targets that have not yet said that they freed a deleted volume.
    pub fn freeing(&self, volume: VolumeId) -> BTreeSet<TargetId> {
        let Some(record) = self.volumes.get(&volume).filter(|v| v.deleted) else { return BTreeSet::new() };
        let freed = self.freed.get(&volume);
        let holders = self.holders(record).map(|member| member.target);
        holders.filter(|target| freed.is_none_or(|freed| !freed.contains(target))).collect()
    }

    fn holders<'a>(&'a self, volume: &'a VolumeRecord) -> impl Iterator<Item = ShardAddr> + 'a {
        volume.copysets.iter().flat_map(|id| self.copysets[id].members.iter().copied())
    }

    /// Counters for a transaction that the map shows.
    fn next_generation(&self) -> Counters {
        Counters { generation: self.counters.generation + 1, ..self.counters }
    }

    fn make_map(&self) -> ClusterMap {
        let target = |record: &TargetRecord| TargetEntry {
            peers: record.peers.clone(),
            nvme: record.endpoints.nvme_tcp,
            draining: record.draining,
        };
        let copyset =
            |record: &CopysetRecord| CopysetEntry { members: record.members.clone(), epoch: record.epoch };
        let session = |id: &VolumeId| {
            let Some(record) = self.sessions.get(id) else { return Session::default() };
            let holder = record.holders.first().filter(|_| record.exclusive);
            Session { epoch: SessionEpoch(record.epoch), holder: holder.cloned().unwrap_or_default() }
        };
        let volume = |id: &VolumeId, record: &VolumeRecord| VolumeEntry {
            name: record.name.clone(),
            bytes: record.bytes,
            block_bytes: record.block_bytes,
            copysets: record.copysets.clone(),
            deleted: record.deleted,
            session: session(id),
        };
        let export = |((volume, protocol), allowed): (&ExportKey, &AllowedHosts)| ExportEntry {
            volume: *volume,
            protocol: *protocol,
            allowed_hosts: allowed.clone(),
        };
        ClusterMap {
            cluster: self.cluster.0,
            generation: self.counters.generation,
            targets: self.targets.iter().map(|(id, record)| (*id, target(record))).collect(),
            copysets: self.copysets.iter().map(|(id, record)| (*id, copyset(record))).collect(),
            // What is in the bin is not served, and is not freed either.
            volumes: self
                .volumes
                .iter()
                .filter(|(_, record)| record.deleted || record.is_live())
                .map(|(id, record)| (*id, volume(id, record)))
                .collect(),
            exports: self.exports.iter().map(export).collect(),
        }
    }

    /// Whether the records agree with each other, as whoever receives the map will ask.
    fn check(&self) -> Result<(), Problem> {
        map_from_pb(&map_to_pb(&self.make_map())).map_err(|problem| error::contradiction(&problem.what))?;
        let counters = &self.counters;
        let above = |most: Option<u32>, next: u32| most.is_none_or(|most| most < next);
        let ids_fresh = above(self.pools.keys().last().copied(), counters.next_pool)
            && above(self.copysets.keys().last().map(|id| id.0), counters.next_copyset)
            && above(self.volumes.keys().last().map(|id| id.0), counters.next_volume);
        let pools_resolve = self
            .pools
            .values()
            .all(|p| !p.copysets.is_empty() && p.copysets.iter().all(|id| self.copysets.contains_key(id)));
        let volumes_resolve = self.volumes.values().all(|v| self.pools.contains_key(&v.pool));
        let copysets_resolve = self.copysets.values().all(|c| self.pools.contains_key(&c.pool));
        let allocation_resolves = self.allocated.iter().all(|(id, allocated)| {
            self.volumes
                .get(id)
                .is_some_and(|v| allocated.as_bytes().len() <= v.segments().div_ceil(8) as usize)
        });
        let sessions_resolve = self.sessions.iter().all(|(id, session)| {
            let holders = session.holders.iter().all(|holder| check_holder(holder).is_ok());
            let alone = !session.exclusive || session.holders.len() == 1;
            self.volumes.contains_key(id) && holders && alone && session.epoch < counters.next_epoch
        });
        let rows = [
            (
                sessions_resolve,
                "a session of no volume, of several that exclude each other or of an epoch to come",
            ),
            (ids_fresh, "an id at or above its counter"),
            (pools_resolve && volumes_resolve && copysets_resolve, "a pool or copyset that is not there"),
            (allocation_resolves, "an allocation of no volume or beyond its end"),
            (self.pools.len() <= limits::POOLS_MAX, "too many pools"),
        ];
        match rows.iter().find(|(fine, _)| !fine) {
            Some((_, what)) => Err(error::contradiction(what)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
