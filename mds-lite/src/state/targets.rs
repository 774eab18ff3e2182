//! Targets, heartbeats, and the pools that are made of them.

use super::{
    Change, Decision, Heartbeat, POOL_DEFAULT, Registration, Reply, Seen, State, Usage, error, schedule,
};
use crate::placement::{Node, Wanted, place};
use crate::record::{CopysetRecord, Counters, PoolRecord, TargetRecord, Uuid};
use protocol::control::{Problem, check_name, limits};
use protocol::types::{CopysetId, MEMBERS_MAX, TargetId, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

impl State {
    pub(super) fn register(&mut self, now: Time, request: Registration) -> Result<Decision, Problem> {
        self.check_identity(&request)?;
        self.check_shape(&request)?;
        let id = request.id;
        let known = self.targets.get(&id);
        let record = TargetRecord {
            disk_uuid: request.disk_uuid,
            peers: request.peers,
            endpoints: request.endpoints,
            capacity_bytes: request.capacity_bytes,
            draining: known.is_some_and(|known| known.draining),
            zone: request.zone,
            host: request.host,
            labels: request.labels,
        };
        let mut changes = Vec::new();
        if known != Some(&record) {
            let mut counters = self.counters;
            let shown = |record: &TargetRecord| (record.peers.clone(), record.endpoints.nvme_tcp);
            if known.is_none_or(|known| shown(known) != shown(&record)) {
                counters = self.next_generation();
            }
            changes.push(Change::Target(id, record.clone()));
            self.add_default_pool(id, &record, &mut counters, &mut changes);
            changes.push(Change::Counters(counters));
        }
        // Its usage comes with the first heartbeat; until then it is online with nothing reported.
        let seen = Seen {
            at: now,
            known_generation: 0,
            usage: Usage { capacity: record.capacity_bytes, ..Usage::default() },
            replicas: BTreeMap::new(),
            failed_shards: BTreeSet::new(),
            reported: false,
        };
        self.seen.insert(id, seen);
        self.space.forget(id);
        Ok(Decision { changes, reply: Reply::Done })
    }

    fn check_identity(&self, request: &Registration) -> Result<(), Problem> {
        if request.id.0 == 0 {
            return Err(error::invalid(
                "target id 0 refused",
                "0 means none; the id was left out",
                "give the target an id above 0",
            ));
        }
        if request.disk_uuid == Uuid([0; 16]) {
            return Err(error::invalid(
                format!("target {} refused: its disk has no identity", request.id),
                "the disk was never formatted",
                "format it with `ashlar target format`",
            ));
        }
        if let Some(theirs) = request.cluster.filter(|theirs| *theirs != self.cluster) {
            return Err(error::wrong_cluster(request.id, theirs, self.cluster));
        }
        match self.targets.get(&request.id) {
            Some(known) if known.disk_uuid != request.disk_uuid => {
                return Err(error::id_taken(request.id, known.disk_uuid, request.disk_uuid));
            }
            Some(_) => return Ok(()),
            None => {}
        }
        if let Some((holder, _)) = self.targets.iter().find(|(_, t)| t.disk_uuid == request.disk_uuid) {
            return Err(error::disk_taken(request.id, *holder, request.disk_uuid));
        }
        if self.targets.len() >= limits::TARGETS_MAX {
            return Err(error::limit(format!("target {} refused", request.id), limits::TARGETS_MAX));
        }
        Ok(())
    }

    fn check_shape(&self, request: &Registration) -> Result<(), Problem> {
        let id = request.id;
        let shards = request.peers.len();
        if shards == 0 || shards > limits::SHARDS_MAX {
            return Err(error::invalid(
                format!("target {id} refused: it has {shards} shards"),
                "each shard needs one peer address",
                format!("configure 1 to {} shards", limits::SHARDS_MAX),
            ));
        }
        let unusable =
            |a: &&std::net::SocketAddr| a.port() == 0 || a.ip().is_unspecified() || a.ip().is_multicast();
        if let Some(address) = request.peers.iter().find(unusable) {
            return Err(error::invalid(
                format!("target {id} refused: nobody can connect to its peer address {address}"),
                "the address that it listens on was given instead of the one it is reached at",
                "configure an advertised address of this machine",
            ));
        }
        if request.peers.iter().collect::<BTreeSet<_>>().len() != shards {
            return Err(error::invalid(
                format!("target {id} refused: two of its shards have the same peer address"),
                "the addresses were configured by hand",
                "give each shard a port of its own",
            ));
        }
        let members = self.copysets.values().flat_map(|c| &c.members).filter(|m| m.target == id);
        match members.map(|m| usize::from(m.shard) + 1).max() {
            Some(needed) if needed > shards => Err(error::invalid(
                format!("target {id} refused: it has {shards} shards, its replicas are on {needed}"),
                "the number of shards in its configuration was lowered",
                format!("set it back to at least {needed}"),
            )),
            _ => Ok(()),
        }
    }

    /// Marks a target as to be emptied, or as used again. Idempotent.
    pub(super) fn drain(&self, id: TargetId, draining: bool) -> Result<Decision, Problem> {
        let Some(record) = self.targets.get(&id) else { return Err(error::no_target(id)) };
        if record.draining == draining {
            return Ok(Decision::unchanged(Reply::Done));
        }
        let record = TargetRecord { draining, ..record.clone() };
        let changes = vec![Change::Target(id, record), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Done })
    }

    /// Forgets a target, so that its id means nothing any more.
    pub(super) fn remove_target(&self, id: TargetId, now: Time) -> Result<Decision, Problem> {
        if !self.targets.contains_key(&id) {
            return Err(error::no_target(id));
        }
        let placed = self.copysets.values().flat_map(|c| &c.members);
        let coming = self.tasks().flat_map(|(_, task)| &task.goal);
        let held = placed.chain(coming).filter(|member| member.target == id).count();
        if held > 0 {
            return Err(error::target_in_use(
                id,
                &format!("{held} copysets have a replica there"),
                &format!("drain it first: ashlar target drain {id}"),
            ));
        }
        if self.is_online(id, now) {
            return Err(error::target_in_use(
                id,
                "it runs, and would register again at once",
                "stop its daemon, wait a few seconds, then remove it",
            ));
        }
        let changes = vec![Change::TargetRemoved(id), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Done })
    }

    /// When `newcomer` completes the expected targets, adds the default pool.
    fn add_default_pool(
        &self,
        newcomer: TargetId,
        record: &TargetRecord,
        counters: &mut Counters,
        changes: &mut Vec<Change>,
    ) {
        let policy = &self.policy;
        let registered = self.targets.len() + usize::from(!self.targets.contains_key(&newcomer));
        let enough = policy.targets_expected.max(policy.replicas) as usize;
        let exists = self.pools.values().any(|pool| pool.name == POOL_DEFAULT);
        if exists || policy.copysets == 0 || registered < enough {
            return;
        }
        let mut nodes = self.nodes_of(|target| target != newcomer);
        nodes.push(schedule::node(newcomer, record));
        let wanted = Wanted::new(policy.replicas, policy.copysets);
        let pool = self.pool_changes(POOL_DEFAULT, wanted, &[], nodes, counters);
        changes.extend(pool.expect("there are at least as many targets as replicas"));
    }

    pub(super) fn create_pool(
        &self,
        name: &str,
        replicas: u32,
        copysets: u32,
        targets: &[TargetId],
    ) -> Result<Decision, Problem> {
        check_name("pool", name)?;
        if let Some((id, _)) = self.pools.iter().find(|(_, pool)| pool.name == name) {
            return Err(error::name_taken("pool", name, *id));
        }
        if self.pools.len() >= limits::POOLS_MAX {
            return Err(error::limit(format!("pool {name:?} refused"), limits::POOLS_MAX));
        }
        if replicas == 0 || replicas as usize > MEMBERS_MAX {
            return Err(error::invalid(
                format!("{replicas} replicas refused"),
                format!("a copyset has 1 to {MEMBERS_MAX}"),
                "use 3",
            ));
        }
        let room = limits::COPYSETS_MAX - self.copysets.len();
        if copysets == 0 || copysets as usize > room {
            return Err(error::limit(format!("{copysets} copysets refused"), room));
        }
        if let Some(unknown) = targets.iter().find(|id| !self.targets.contains_key(id)) {
            return Err(error::invalid(
                format!("pool {name:?} refused: target {unknown} is not registered"),
                "the id is misspelt, or the target never started",
                "see `ashlar status` for the targets",
            ));
        }
        let chosen = |target: TargetId| targets.is_empty() || targets.contains(&target);
        let nodes = self.nodes_of(|target| chosen(target) && !self.targets[&target].draining);
        let count = nodes.len();
        let mut counters = self.next_generation();
        let id = counters.next_pool;
        let wanted = Wanted::new(replicas, copysets);
        let changes = self.pool_changes(name, wanted, targets, nodes, &mut counters);
        let mut changes = changes.ok_or_else(|| {
            error::invalid(
                format!("pool {name:?} refused: {replicas} replicas need as many targets, there are {count}"),
                "too few targets have registered",
                "start more targets, or use fewer replicas",
            )
        })?;
        changes.push(Change::Counters(counters));
        Ok(Decision { changes, reply: Reply::Pool(id) })
    }

    fn pool_changes(
        &self,
        name: &str,
        wanted: Wanted,
        targets: &[TargetId],
        nodes: Vec<Node>,
        counters: &mut Counters,
    ) -> Option<Vec<Change>> {
        let (domain, placed) = place(nodes, wanted)?;
        tracing::info!(pool = name, %domain, "no two replicas of a copyset share a failure domain");
        let pool = counters.next_pool;
        counters.next_pool += 1;
        let first = counters.next_copyset;
        counters.next_copyset += wanted.copysets as u32;
        let ids = (first..counters.next_copyset).map(CopysetId);
        let (name, targets) = (name.to_owned(), targets.iter().map(|target| target.0).collect());
        let replicas = wanted.replicas as u32;
        let record = PoolRecord { name, replicas, copysets: ids.clone().collect(), targets };
        let created =
            |(id, members)| Change::Copyset(id, CopysetRecord { pool, members, epoch: 0, told: (0, 0) });
        Some(std::iter::once(Change::Pool(pool, record)).chain(ids.zip(placed).map(created)).collect())
    }

    /// Targets with what they hold.
    fn nodes_of(&self, wanted: impl Fn(TargetId) -> bool) -> Vec<Node> {
        let wanted = self.targets.iter().filter(|(id, _)| wanted(**id));
        let mut nodes: BTreeMap<TargetId, Node> =
            wanted.map(|(id, record)| (*id, schedule::node(*id, record))).collect();
        self.count_replicas(&mut nodes);
        nodes.into_values().collect()
    }

    pub(super) fn heartbeat(&mut self, now: Time, beat: Heartbeat) -> Result<Decision, Problem> {
        let target = beat.target;
        let Some(record) = self.targets.get(&target) else { return Err(error::unknown_target(target)) };
        if record.disk_uuid != beat.disk_uuid {
            return Err(error::id_taken(target, record.disk_uuid, beat.disk_uuid));
        }
        let mut changes = self.learn(&beat.replicas);
        let replicas = beat.replicas.into_iter().map(|r| (r.copyset, r));
        let seen = Seen {
            at: now,
            known_generation: beat.known_generation,
            usage: beat.usage,
            replicas: replicas.collect(),
            failed_shards: beat.failed_shards,
            reported: true,
        };
        self.seen.insert(target, seen);
        self.take_slots(target, beat.slots, beat.slots_whole);
        self.renew_leases(target, &beat.attached, now);
        changes.extend(self.free(target, &beat.freed));
        if !changes.is_empty() {
            changes.push(Change::Counters(self.next_generation()));
        }
        let orders = self.orders(target, now);
        Ok(Decision { changes, reply: Reply::Orders(orders) })
    }

    /// Notes what a target has freed; purges the volumes that nobody holds any more.
    fn free(&mut self, target: TargetId, freed: &[VolumeId]) -> Vec<Change> {
        let mut purged = BTreeSet::new();
        for volume in freed {
            // A target that claims to have freed a live volume is wrong: nothing is noted.
            if self.volumes.get(volume).is_none_or(|v| !v.deleted) {
                continue;
            }
            self.freed.entry(*volume).or_default().insert(target);
            if self.freeing(*volume).is_empty() {
                purged.insert(*volume);
            }
        }
        purged.into_iter().map(Change::VolumePurged).collect()
    }
}
