//! The targets: each shard a real core on a simulated reactor, started, turned, and let crash.
//!
//! A node of the world is one shard. The shards of a target share a fate: power fails for all
//! of them. The control thread is played by whoever holds the ends of the shards' ports.

use super::mds_guard::Guard;
use super::witness::Witness;
use super::{Draw, Failure, Mix};
use protocol::control::pb;
use protocol::map::{
    ClusterMap, CopysetEntry, ExportEntry, ExportProtocol, Session, TargetEntry, VolumeEntry,
};
use protocol::types::{CopysetId, ShardAddr, Span, TargetId, Time, VolumeId};
use reactor::host::{CoreLoop, Turn};
use reactor::sim::{SimReactor, SimWorld};
use reactor::{IoError, Reactor};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::AddAssign;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use target_daemon::CopysetStanding;
use target_daemon::assemble::{ShardPlan, build_core, format_shard};
use target_daemon::control::{ControlEnds, FromShard, ShardPort, ToShard, shard_ports};
use target_daemon::core_loop::{Core, Port};
use target_daemon::siblings::{SiblingEnd, mesh};

/// How often the standing of a shard is looked at: once in so many turns.
const LOOK_EVERY: u64 = 8;

/// What a slot's table takes at the beginning of its file.
const TABLE_BYTES: u64 = 16 * 4096;

/// How often what a shard holds in memory is looked at: once in so many turns.
const USAGE_EVERY: u64 = 32;

/// The identity of the cluster.
pub const CLUSTER: [u8; 16] = [7; 16];

/// What shards counted.
#[derive(Clone, Copy, Default, Debug)]
pub struct Tally {
    /// Leaders elected, as seen.
    pub terms: u64,
    /// Times that a shard gave up because its disk failed.
    pub failed_disks: u64,
    /// Starts of shards.
    pub starts: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, one: Self) {
        self.terms += one.terms;
        self.failed_disks += one.failed_disks;
        self.starts += one.starts;
    }
}

struct Node {
    plan: ShardPlan,
    life: Option<Life>,
}

struct Life {
    core: Core<SimReactor>,
    ends: ControlEnds,
    turns: u64,
    failed: bool,
    /// Blocks that its disk returned with a bit inverted.
    altered: u64,
}

/// All targets.
pub struct Fleet {
    world: SimWorld,
    nodes: Vec<Node>,
    shards: usize,
    arena_bytes: usize,
    map: Arc<ClusterMap>,
    /// By target: the map on its disk.
    caches: Vec<Option<Arc<ClusterMap>>>,
    /// By target: how often it started.
    boots: Vec<u64>,
    /// Targets that have not joined yet.
    awaited: BTreeSet<usize>,
    /// Targets that never come back.
    lost: BTreeSet<usize>,
    /// Targets that are being emptied, or are to be.
    pub draining: BTreeSet<usize>,
    /// What shards told their control side, and which node did.
    pub reports: Vec<(usize, FromShard)>,
    /// What memberships must keep to, where they change.
    pub guard: Option<Guard>,
    /// Who led a copyset in a term.
    leaders: BTreeMap<(CopysetId, u64), usize>,
    tally: Tally,
    /// What they agreed on.
    pub witness: Witness,
}

/// Where a shard is reached by others, and by hosts.
pub fn addresses(node: usize) -> (SocketAddr, SocketAddr) {
    let ip = [10, 0, (node / 256) as u8, (node % 256) as u8];
    (SocketAddr::from((ip, 7000)), SocketAddr::from((ip, 10_809)))
}

/// The name of a volume.
pub fn volume_name(volume: usize) -> String {
    format!("vol{volume}")
}

impl Fleet {
    /// Formats and starts every target.
    pub fn new(world: &SimWorld, mix: &Mix) -> Result<Self, Failure> {
        let plan = |node: usize| ShardPlan {
            dir: PathBuf::from(format!("/shard-{node}")),
            me: ShardAddr {
                target: TargetId((node / mix.shards) as u32 + 1),
                shard: (node % mix.shards) as u16,
            },
            disk: [node as u8; 16],
            layout: mix.layout,
            election_timeout: mix.election_timeout,
            heartbeat: Span(mix.election_timeout.0 / 5),
            hibernate_after: mix.hibernate_after,
            io_timeout: None,
            catch_up_bytes_s: 64 << 20,
        };
        let nodes = (0..mix.targets * mix.shards).map(|node| Node { plan: plan(node), life: None });
        let map = Arc::new(cluster_map(mix));
        let initial = mix.mds.as_ref().map_or(mix.targets, |mds| mds.initial);
        let mut fleet = Self {
            world: world.clone(),
            nodes: nodes.collect(),
            shards: mix.shards,
            arena_bytes: mix.arena_bytes,
            caches: vec![mix.mds.is_none().then(|| map.clone()); mix.targets],
            map,
            boots: vec![0; mix.targets],
            awaited: (initial..mix.targets).collect(),
            lost: BTreeSet::new(),
            draining: BTreeSet::new(),
            reports: Vec::new(),
            guard: mix.mds.as_ref().map(|_| Guard::new(mix)),
            leaders: BTreeMap::new(),
            tally: Tally::default(),
            witness: Witness::new(mix),
        };
        for target in 0..mix.targets {
            let mut reactors = fleet.reactors(target)?;
            for (node, reactor) in fleet.nodes_of(target).zip(&mut reactors) {
                let formatted = format_shard(reactor, &fleet.nodes[node].plan);
                formatted
                    .map_err(|problem| Failure(format!("shard {node} cannot be formatted: {problem}")))?;
            }
            if fleet.awaited.contains(&target) {
                drop(reactors);
                fleet.nodes_of(target).for_each(|node| fleet.world.crash(node));
                continue;
            }
            fleet.start_on(target, reactors)?;
        }
        Ok(fleet)
    }

    /// Shards of all targets.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Targets.
    pub fn targets(&self) -> usize {
        self.nodes.len() / self.shards
    }

    /// The nodes of a target.
    pub fn nodes_of(&self, target: usize) -> std::ops::Range<usize> {
        target * self.shards..(target + 1) * self.shards
    }

    /// Where a shard's files lie.
    pub fn dir(&self, node: usize) -> PathBuf {
        self.nodes[node].plan.dir.clone()
    }

    /// The newest map.
    pub fn map(&self) -> &Arc<ClusterMap> {
        &self.map
    }

    /// There is a newer map; nobody is told of it by this.
    pub fn set_map(&mut self, map: Arc<ClusterMap>) {
        self.map = map;
    }

    /// The map on a target's disk.
    pub fn cache(&self, target: usize) -> Option<&Arc<ClusterMap>> {
        self.caches[target].as_ref()
    }

    /// A target writes a map to its disk.
    pub fn keep(&mut self, target: usize, map: Arc<ClusterMap>) {
        self.caches[target] = Some(map);
    }

    /// How often a target has started.
    pub fn boots(&self, target: usize) -> u64 {
        self.boots[target]
    }

    /// Virtual time.
    pub fn now(&self) -> Time {
        self.world.now()
    }

    /// What a target's clock shows.
    pub fn clock(&self, target: usize) -> Time {
        self.world.clock(target * self.shards)
    }

    /// Whether a target is still to join.
    pub fn is_awaited(&self, target: usize) -> bool {
        self.awaited.contains(&target)
    }

    /// Whether a target is part of the cluster: it runs, or will again.
    pub fn is_there(&self, target: usize) -> bool {
        !self.awaited.contains(&target) && !self.lost.contains(&target)
    }

    /// Whether a target was lost for good.
    pub fn is_lost(&self, target: usize) -> bool {
        self.lost.contains(&target)
    }

    /// Targets that replicas may be placed on.
    pub fn usable(&self) -> impl Iterator<Item = usize> {
        (0..self.targets()).filter(|target| self.is_there(*target) && !self.draining.contains(target))
    }

    /// A target joins.
    pub fn join(&mut self, target: usize) -> Result<(), Failure> {
        self.awaited.remove(&target);
        self.start(target)
    }

    /// A target is lost for good, maybe while its power is off.
    pub fn lose(&mut self, target: usize) {
        if self.is_up(target) {
            self.crash(target);
        }
        self.lost.insert(target);
    }

    /// Whether every copyset has all its replicas, whole and on targets that run, as the map has it.
    pub fn is_whole(&self) -> bool {
        !self.map.copysets.is_empty()
            && self.map.copysets.iter().all(|(id, entry)| {
                let whole = |m: &&ShardAddr| {
                    let node = self.node_of(**m);
                    let core = self.nodes[node].life.as_ref().map(|life| &life.core);
                    let replica = core.and_then(|core| core.replica(*id));
                    replica.is_some_and(|r| {
                        let members: BTreeSet<_> = r.members().voters().collect();
                        r.health() == copyset::Health::Whole
                            && members == entry.members.iter().copied().collect()
                    })
                };
                entry.members.len() == 3 && entry.members.iter().filter(whole).count() == 3
            })
    }

    /// The node of a shard.
    pub fn node_of(&self, shard: ShardAddr) -> usize {
        (shard.target.0 as usize - 1) * self.shards + usize::from(shard.shard)
    }

    /// The loop of a shard that runs.
    pub fn core(&self, node: usize) -> Option<&Core<SimReactor>> {
        self.nodes[node].life.as_ref().map(|life| &life.core)
    }

    /// Whether a target runs.
    pub fn is_up(&self, target: usize) -> bool {
        self.nodes[target * self.shards].life.is_some()
    }

    /// Whether a shard of a target has given up because its disk failed.
    pub fn has_failed(&self, target: usize) -> bool {
        self.nodes_of(target).any(|node| self.nodes[node].life.as_ref().is_some_and(|life| life.failed))
    }

    /// What was counted.
    pub fn tally(&self) -> Tally {
        Tally { terms: self.leaders.len() as u64, ..self.tally }
    }

    fn reactors(&self, target: usize) -> Result<Vec<SimReactor>, Failure> {
        let start = |node| {
            let started = self.world.start(node, self.arena_bytes);
            started.map_err(|error| Failure(format!("no reactor for shard {node}: {error}")))
        };
        self.nodes_of(target).map(start).collect()
    }

    /// Starts a target that is down.
    pub fn start(&mut self, target: usize) -> Result<(), Failure> {
        let reactors = self.reactors(target)?;
        self.start_on(target, reactors)
    }

    fn start_on(&mut self, target: usize, reactors: Vec<SimReactor>) -> Result<(), Failure> {
        self.boots[target] += 1;
        let wakers: Vec<_> = reactors.iter().map(Reactor::waker).collect();
        for ((node, reactor), siblings) in self.nodes_of(target).zip(reactors).zip(mesh(&wakers)) {
            self.start_shard(node, reactor, siblings)?;
        }
        Ok(())
    }

    fn start_shard(
        &mut self,
        node: usize,
        reactor: SimReactor,
        siblings: Vec<SiblingEnd>,
    ) -> Result<(), Failure> {
        self.tally.starts += 1;
        let waker = reactor.waker();
        let (ends, mut ports) = shard_ports(vec![Box::new(move || waker.wake())]);
        let port: ShardPort = ports.pop().expect("one shard, one port");
        let (peer, nbd) = addresses(node);
        let listen = |reactor: &mut SimReactor| {
            let mut open = |port, addr| Ok((port, reactor.listen(addr)?));
            let both = open(Port::Peer, peer).and_then(|p| Ok(vec![p, open(Port::Nbd, nbd)?]));
            Ok(both.unwrap_or_else(|error: IoError| panic!("shard {node} cannot listen: {error}")))
        };
        let core = build_core(
            reactor,
            &self.nodes[node].plan,
            port,
            siblings,
            Arc::new(AtomicBool::new(false)),
            listen,
        )
        .map_err(|problem| Failure(format!("start: shard {node} does not start: {problem}")))?;
        if let Some(map) = &self.caches[node / self.shards] {
            let _ = ends.shards()[0].send(ToShard::Map(map.clone()));
        }
        self.nodes[node].life = Some(Life { core, ends, turns: 0, failed: false, altered: 0 });
        Ok(())
    }

    /// Compares what a shard has counted with what its disk did: without damage it has found none, and at
    /// the end, when no read is under way (`is_idle`), it has found every damaged block that it was given.
    ///
    /// # Errors
    /// They do not agree.
    pub fn check_counters(&self, node: usize, has_bad_disk: bool, is_idle: bool) -> Result<(), Failure> {
        let Some(life) = self.nodes[node].life.as_ref().filter(|life| !life.failed) else { return Ok(()) };
        let (store, shard) = (life.core.store_stats(), life.core.counts());
        let found = store.corrupt_blocks + store.log_damages + store.table_pages_lost;
        if found > 0 && !has_bad_disk {
            return Err(Failure(format!("counters: shard {node} found damage on a good disk: {store:?}")));
        }
        if shard.wire_corrupt > 0 && self.world.flipped_on_the_wire() == 0 {
            return Err(Failure(format!("counters: shard {node} found damage on good links: {shard:?}")));
        }
        if is_idle && store.corrupt_blocks + store.moved_blocks < life.altered {
            return Err(Failure(format!(
                "counters: the disk of shard {node} gave {} damaged blocks, and it found fewer: {store:?}",
                life.altered
            )));
        }
        Ok(())
    }

    /// Cuts the power of a target.
    pub fn crash(&mut self, target: usize) {
        for node in self.nodes_of(target) {
            self.world.crash(node);
            if let Some(life) = self.nodes[node].life.take() {
                self.witness.crashed(node, &life.core);
                if let Some(guard) = &mut self.guard {
                    guard.crashed(node);
                }
            }
        }
    }

    /// One turn of a shard's loop.
    pub fn turn(&mut self, node: usize) -> Result<(), Failure> {
        let Node { plan, life: Some(life) } = &mut self.nodes[node] else { return Ok(()) };
        if matches!(life.core.turn(), Turn::Stop) {
            return Err(Failure(format!("start: shard {node} stopped by itself")));
        }
        let tables = u64::from(plan.layout.slots_per_file) * TABLE_BYTES;
        // Tables have two copies, and pages that nobody looks at.
        let altered = self.world.take_altered(node).into_iter();
        life.altered += altered.filter(|(is_chunks, at)| !is_chunks || *at >= tables).count() as u64;
        while let Some((_, report)) = life.ends.try_report() {
            if let FromShard::Failed { .. } = report {
                life.failed = true;
                self.tally.failed_disks += 1;
            }
            if self.guard.is_some() {
                self.reports.push((node, report));
            }
        }
        life.turns += 1;
        let has_failed = life.failed;
        if life.turns.is_multiple_of(USAGE_EVERY)
            && let Some(usage) = life.core.usage().into_iter().find(|usage| !usage.fits())
        {
            return Err(Failure(format!("memory: shard {node} has {usage:?}")));
        }
        if life.turns.is_multiple_of(LOOK_EVERY) {
            let standings = life.core.standings();
            self.look(node, &standings)?;
        }
        let core = |node: usize| self.nodes[node].life.as_ref().map(|life| &life.core);
        let Some(this) = core(node) else { return Ok(()) };
        self.witness.look(node, this, core, self.world.now())?;
        match &mut self.guard {
            Some(guard) => guard.look(node, this, has_failed, &self.caches[node / self.shards]),
            None => Ok(()),
        }
    }

    /// At most one leader a term.
    fn look(&mut self, node: usize, standings: &[CopysetStanding]) -> Result<(), Failure> {
        for standing in standings.iter().filter(|s| s.role == copyset::Role::Leader) {
            let leader = *self.leaders.entry((standing.id, standing.term)).or_insert(node);
            if leader != node {
                return Err(Failure(format!(
                    "election safety: copyset {} has two leaders in term {}: nodes {leader} and {node}",
                    standing.id, standing.term
                )));
            }
        }
        Ok(())
    }

    /// How the replicas of a shard stand.
    pub fn standings(&self, node: usize) -> Vec<CopysetStanding> {
        self.nodes[node].life.as_ref().map_or(Vec::new(), |life| life.core.standings())
    }

    /// Asks whoever leads a copyset to hand it over, as an operator would.
    pub fn transfer(&self, copyset: CopysetId, to: TargetId) {
        for node in 0..self.nodes() {
            let (reply, _) = tokio::sync::oneshot::channel();
            self.tell(node, ToShard::TransferLeader { copyset, to, reply });
        }
    }

    /// Sends a shard's control side a message.
    pub fn tell(&self, node: usize, message: ToShard) {
        if let Some(life) = &self.nodes[node].life {
            let _ = life.ends.shards()[0].send(message);
        }
    }

    /// What a shard told of itself last.
    pub fn status(&self, node: usize) -> Option<pb::ShardStatus> {
        self.nodes[node].life.as_ref()?.ends.shards()[0].status()
    }

    /// All standings as text.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for node in 0..self.nodes.len() {
            let state = if self.nodes[node].life.is_some() { "up" } else { "down" };
            text += &format!("node {node} {state}\n");
            for standing in self.standings(node) {
                text += &format!("  {standing:?}\n");
            }
            if let Some(life) = &self.nodes[node].life {
                text += &format!("  {:?}\n", life.core.store_stats());
            }
            if let Some(status) = self.status(node) {
                text += &format!("  {status:?}\n");
            }
        }
        text
    }
}

fn cluster_map(mix: &Mix) -> ClusterMap {
    let mut map = ClusterMap { cluster: CLUSTER, generation: 1, ..ClusterMap::default() };
    if mix.mds.is_some() {
        return ClusterMap { generation: 0, ..map };
    }
    for target in 0..mix.targets {
        let nodes = target * mix.shards..(target + 1) * mix.shards;
        let peers = nodes.map(|node| addresses(node).0).collect();
        map.targets.insert(TargetId(target as u32 + 1), TargetEntry { peers, nvme: None, draining: false });
    }
    // Placement by a walk over the targets: every shard gets its share.
    let mut draw = Draw::new(mix.targets as u64);
    for copyset in 0..mix.copysets {
        let member = |n: usize| ShardAddr {
            target: TargetId(((copyset + n) % mix.targets) as u32 + 1),
            shard: (draw.below(mix.shards as u64)) as u16,
        };
        let members = (0..3).map(member).collect();
        map.copysets.insert(CopysetId(copyset as u32 + 1), CopysetEntry { members, epoch: 0 });
    }
    for (n, (bytes, block_bytes)) in mix.volumes.iter().enumerate() {
        let id = VolumeId(n as u32 + 1);
        let copysets = map.copysets.keys().copied().collect();
        let (bytes, block_bytes) = (*bytes, *block_bytes);
        let (name, deleted, session) = (volume_name(n), false, Session::default());
        let entry = VolumeEntry { name, bytes, block_bytes, copysets, deleted, session };
        map.volumes.insert(id, entry);
        map.exports.push(ExportEntry {
            volume: id,
            protocol: ExportProtocol::Nbd,
            allowed_hosts: Default::default(),
        });
    }
    map
}
