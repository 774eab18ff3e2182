//! One core of a target: the sole owner of its copysets and of their storage.
//!
//! The shard joins three cores that know nothing of each other: `copyset` decides what is
//! agreed, `chunkstore` plans what is stored, and `client` (in the export beside it) decides
//! whom to ask. Events go in by the methods, [`Output`]s and the store's ops come out; after
//! every event [`Shard::settle`] restores the invariants:
//!
//! - no replica has an undrained action, the store has no undrained event;
//! - a request is answered exactly once, and only when its fate is known (a proposed write whose
//!   leader merely stepped down keeps waiting: it may still commit);
//! - a message that carries entries leaves with their payloads or waits for them in its outbox.
//!
//! Deliberately absent: sockets, files, clocks, threads. The driver has them.

mod affinity;
mod catchup;
mod check;
mod fence;
mod hosted;
mod io;
mod ordering;
mod orders;
mod pace;
mod raft;
mod repair;
mod serve;
#[cfg(test)]
mod tests;

use crate::mem::{Mem, Mems};
use crate::usage::Usage;
use chunkstore::{Event, Lsn, Pieces, RecoveredCopyset, Store};
use copyset::{Config, Health, Lag, Recovered, Replica, Role};
use hosted::Hosted;
use pace::Pace;
use protocol::map::ClusterMap;
use protocol::peer::{Fetch, PeerMessage};
use protocol::raft::Members;
use protocol::types::{
    BLOCK_BYTES, ChunkId, CopysetId, LogIndex, SessionEpoch, ShardAddr, Span, TargetId, Time, VolumeId,
};
use reactor::Arena;
use slab::Slab;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub use check::ChunkCheck;
pub use orders::{Order, OrderKind};

/// How often slow work is looked after: affinity, stuck catch-ups, deleted volumes.
const HOUSEKEEPING: Span = Span::ms(100);
/// How many reads with a bad checksum are answered by repair and another try.
const REPAIR_TRIES_MAX: u8 = 3;

/// What a shard is told about itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its own place.
    pub me: ShardAddr,
    /// The shortest election time-out.
    pub election_timeout: Span,
    /// How often a leader is heard from.
    pub heartbeat: Span,
    /// How long a copyset is idle before it hibernates.
    pub hibernate_after: Span,
    /// How fast replicas catch up, in bytes a second over all of the shard's; 0: no limit.
    pub catch_up_bytes_s: u64,
    /// Different at every start.
    pub seed: u64,
}

/// Where a request came from, and so where its answer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The export on this core.
    Local,
    /// A peer link. If it is gone when the answer is ready, the answer is dropped.
    Link(u64),
}

/// What the driver is to do, besides the store's ops.
#[derive(Debug)]
pub enum Output {
    /// Send on this shard's own link to a peer; may be lost.
    Send {
        /// Whom.
        to: ShardAddr,
        /// What.
        message: PeerMessage,
        /// Its block data.
        payload: Mems,
    },
    /// Answer a request by the way it came.
    Answer {
        /// Where it came from.
        origin: Origin,
        /// What.
        message: PeerMessage,
        /// Its block data.
        payload: Mems,
    },
    /// A part of a volume check; `None` when it is complete.
    Checked {
        /// As given to [`Shard::check_volume`].
        job: u64,
        /// One chunk.
        chunk: Option<ChunkCheck>,
    },
    /// No chunk of a deleted volume is left here.
    Freed {
        /// Which.
        volume: VolumeId,
    },
    /// The disk failed; the shard serves nothing more.
    Failed {
        /// What happened, for the operator.
        why: String,
    },
    /// `stop` is complete.
    Stopped,
}

/// What a token given to a replica or the store stands for.
enum Work {
    Read(io::ReadWork),
    Status(io::StatusWork),
    Merge { copyset: CopysetId, write: u64 },
    Load(raft::LoadWork),
    ServeBlocks { origin: Origin, copyset: CopysetId, chunk: ChunkId, range: protocol::types::BlockRange },
    ServeTable { origin: Origin, copyset: CopysetId, chunk: ChunkId },
    CatchUpTable { copyset: CopysetId, chunk: ChunkId },
    Check(check::CheckWork),
}

/// Counters of one shard; only the export of metrics reads them.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// IOs answered, by kind.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Trims and zeroes answered.
    pub zeroes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Refused because another replica leads.
    pub not_leader: u64,
    /// Refused for want of a chunk slot.
    pub no_space: u64,
    /// Refused because too much was in flight.
    pub busy: u64,
    /// Refused because their volume was taken over, or is being freed.
    pub fenced: u64,
    /// Payloads from the wire that failed their checksum.
    pub wire_corrupt: u64,
    /// Reads whose every copy was bad.
    pub unrepaired_reads: u64,
    /// Times a replica here became leader.
    pub elections_won: u64,
    /// Leaderships handed to where the IO comes from.
    pub transfers: u64,
    /// Chunk catch-ups finished.
    pub catch_ups: u64,
    /// Blocks fetched by them.
    pub catch_up_blocks: u64,
    /// Messages that no correct peer sends.
    pub violations: u64,
}

/// How one copyset stands, for heartbeats and `ashlar status`.
#[derive(Clone, Debug)]
pub struct CopysetStanding {
    /// Which.
    pub id: CopysetId,
    /// Its term.
    pub term: u64,
    /// Role of the replica here.
    pub role: Role,
    /// Who leads, if known.
    pub leader: Option<ShardAddr>,
    /// Committed up to.
    pub commit: LogIndex,
    /// Applied up to.
    pub applied: LogIndex,
    /// Health of the replica here.
    pub health: Health,
    /// Told by the leader.
    pub membership: Option<Membership>,
}

/// Chunk slots of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VolumeSlots {
    /// In use here.
    pub held: u32,
    /// In copysets that are led from here: over all targets each chunk is among them once.
    pub led: u32,
}

/// A copyset's membership as its leader knows it.
#[derive(Clone, Debug)]
pub struct Membership {
    /// In force.
    pub members: Members,
    /// The entry that made it so is committed.
    pub settled: bool,
    /// Of everybody else.
    pub lags: Vec<Lag>,
    /// IO came lately; see [`affinity`].
    pub busy: bool,
}

/// One shard; see the module.
pub struct Shard {
    settings: Settings,
    arena: Arena,
    store: Store<Mem>,
    map: Arc<ClusterMap>,
    hosted: BTreeMap<CopysetId, Hosted>,
    /// Copysets with something to settle.
    touched: VecDeque<CopysetId>,
    timers: BTreeSet<(Time, CopysetId)>,
    /// Copysets that housekeeping moves on: at least those of which [`Hosted::is_restless`] is true. Most of a full shard's
    /// thousand are not, and no turn and no batch looks at all of them.
    restless: BTreeSet<CopysetId>,
    /// Copysets whose IO is being counted, at least.
    counting: BTreeSet<CopysetId>,
    housekeeping_at: Time,
    /// How fast replicas here catch up.
    pace: Pace,
    work: Slab<Work>,
    requests: Slab<io::Request>,
    /// Writes that wait for the log to have more room, in the order in which they came.
    slowed: VecDeque<io::Slowed>,
    /// Blocks of memory that they hold.
    slowed_blocks: usize,
    repairs: BTreeMap<(CopysetId, ChunkId, u16), repair::Repair>,
    /// Tickets whose batch is not durable yet, in order of LSN.
    persisting: VecDeque<(Lsn, CopysetId, u64)>,
    out: VecDeque<Output>,
    /// Requests whose entry is applied, and whether it is theirs; empty between events.
    done: Vec<(usize, bool)>,
    /// Deleted volumes of which nothing is left here.
    freed: BTreeSet<VolumeId>,
    /// Deleted volumes of the map.
    deleted: Vec<VolumeId>,
    counts: Counts,
    failed: bool,
    now: Time,
}

impl Shard {
    /// A shard around what recovery found on its disk.
    pub fn new(
        settings: Settings,
        arena: Arena,
        store: Store<Mem>,
        recovered: Vec<RecoveredCopyset>,
        now: Time,
    ) -> Self {
        let mut shard = Self {
            pace: Pace::new(settings.catch_up_bytes_s, now),
            settings,
            arena,
            store,
            map: Arc::default(),
            hosted: BTreeMap::new(),
            touched: VecDeque::new(),
            timers: BTreeSet::new(),
            restless: BTreeSet::new(),
            counting: BTreeSet::new(),
            housekeeping_at: now,
            work: Slab::new(),
            requests: Slab::new(),
            slowed: VecDeque::new(),
            slowed_blocks: 0,
            repairs: BTreeMap::new(),
            persisting: VecDeque::new(),
            out: VecDeque::new(),
            done: Vec::new(),
            freed: BTreeSet::new(),
            deleted: Vec::new(),
            counts: Counts::default(),
            failed: false,
            now,
        };
        for copyset in recovered {
            let (id, installing) = (copyset.id, copyset.installing);
            shard.host(id, recovered_state(copyset));
            if let Some(hosted) = shard.hosted.get_mut(&id).filter(|_| installing) {
                // Its chunks are a mixture, whatever else is wrong with it.
                hosted.replica.install_begin();
            }
        }
        shard
    }

    /// Its own place.
    pub fn me(&self) -> ShardAddr {
        self.settings.me
    }

    /// Takes a newer map: creates the replicas that it places here.
    pub fn set_map(&mut self, map: Arc<ClusterMap>, now: Time) {
        self.now = now;
        if map.generation < self.map.generation {
            return;
        }
        self.map = map.clone();
        self.freed.retain(|volume| map.volumes.contains_key(volume));
        self.deleted = map.volumes.iter().filter(|(_, v)| v.deleted).map(|(id, _)| *id).collect();
        // The map is kept on disk as soon as it comes, so the first one after a start names every replica that this log
        // may have lost. A copyset that is new in a later one cannot have been here and is made whole, even if all of
        // its shards once lost records: three damaged replicas would wait for each other for good. That is left for
        // copysets which all three lost at once, and for these nobody knows what was acknowledged.
        let suspect = self.store.may_lack_replicas();
        let health = if suspect { Health::Damaged } else { Health::Whole };
        for (id, entry) in &map.copysets {
            let mine = entry.members.contains(&self.settings.me);
            // Later members come by order of the MDS, without a vote until they have caught up.
            if mine && entry.epoch == 0 && !self.hosted.contains_key(id) && !self.failed {
                if suspect {
                    tracing::warn!(
                        copyset = id.0,
                        "its replica may have been lost with the log; made as damaged"
                    );
                }
                self.create(*id, &entry.members, health);
            }
        }
        if suspect && !self.failed {
            self.store.all_replicas_made();
        }
    }

    /// A new replica, empty; without members it has no vote and waits for a leader.
    fn create(&mut self, id: CopysetId, members: &[ShardAddr], health: Health) {
        let Some(members) = Members::new(members, &[]) else {
            tracing::error!(copyset = id.0, "the map names a target twice in a copyset; it is not created");
            return;
        };
        self.store.stage(chunkstore::Record::Create { copyset: id, members }, None, &[]);
        if health == Health::Damaged {
            let health = chunkstore::Health::Damaged;
            self.store.stage(chunkstore::Record::Health { copyset: id, health }, None, &[]);
        }
        self.store.seal();
        let recovered = Recovered {
            hard: Default::default(),
            floor: Default::default(),
            members,
            entries: Vec::new(),
            applied: LogIndex(0),
            health,
        };
        self.host(id, recovered);
    }

    fn host(&mut self, id: CopysetId, recovered: Recovered) {
        let seed = self.settings.seed ^ (u64::from(id.0) << 32) ^ u64::from(self.settings.me.target.0);
        let config = Config {
            election_timeout: self.settings.election_timeout,
            heartbeat: self.settings.heartbeat,
            hibernate_after: self.settings.hibernate_after,
            ..Config::new(id, self.settings.me.target, seed)
        };
        self.hosted.insert(id, Hosted::new(Replica::new(config, recovered, self.now)));
        self.touch(id);
    }

    /// A message from a peer shard. `origin` is the link it came by.
    pub fn handle(
        &mut self,
        origin: Origin,
        from: ShardAddr,
        message: PeerMessage,
        payload: Mems,
        now: Time,
    ) {
        self.now = now;
        if self.failed {
            return;
        }
        match message {
            PeerMessage::Raft { copyset, message, crcs } => {
                self.handle_raft(copyset, from, message, crcs, payload);
            }
            PeerMessage::Io(request) => self.handle_io(origin, from, request, payload),
            PeerMessage::Fetch { copyset, fetch } => self.serve(origin, copyset, fetch),
            PeerMessage::Fetched { copyset, fetched } => self.fetched(from, copyset, fetched, payload),
            // Hellos belong to the links, replies to the export.
            PeerMessage::Hello(_) | PeerMessage::IoReply(_) => {}
        }
    }

    /// Time has come: see [`Shard::next_timeout`].
    pub fn tick(&mut self, now: Time) {
        self.now = now;
        while let Some((at, id)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, id));
            if let Some(hosted) = self.hosted.get_mut(&id) {
                hosted.deadline = None;
                hosted.replica.tick(now);
                self.touch(id);
            }
        }
        if self.pace.is_due(now) {
            self.go_on_catching_up();
        }
        if now >= self.housekeeping_at {
            self.housekeeping_at = now + HOUSEKEEPING;
            self.housekeeping();
        }
    }

    /// When `tick` wants to be called.
    pub fn next_timeout(&self) -> Option<Time> {
        let replica = self.timers.first().map(|(at, _)| *at);
        let busy = self.is_busy().then_some(self.housekeeping_at);
        [replica, busy, self.pace.due(), self.store.next_timeout()].into_iter().flatten().min()
    }

    /// Whether there is work that housekeeping moves on.
    fn is_busy(&self) -> bool {
        debug_assert!(self.hosted.iter().all(|(id, h)| !h.is_restless() || self.restless.contains(id)));
        debug_assert!(
            self.hosted.iter().all(|(id, h)| !h.affinity.is_counting() || self.counting.contains(id))
        );
        !self.requests.is_empty()
            || !self.slowed.is_empty()
            || !self.work.is_empty()
            || !self.repairs.is_empty()
            || !self.restless.is_empty()
            || !self.counting.is_empty()
            || self.deleted.iter().any(|volume| !self.freed.contains(volume))
            || (self.is_draining() && self.hosted.values().any(|h| h.replica.role() == Role::Leader))
    }

    /// Whether this target is being emptied.
    fn is_draining(&self) -> bool {
        self.map.is_draining(self.settings.me.target)
    }

    fn housekeeping(&mut self) {
        let ids: Vec<CopysetId> = match self.is_draining() {
            true => self.hosted.keys().copied().collect(),
            false => self.restless.union(&self.counting).copied().collect(),
        };
        for id in ids {
            self.draw_leadership(id);
            self.pursue(id);
            self.nudge_catch_up(id);
            self.nudge_rebuild(id);
        }
        self.restless.retain(|id| self.hosted.get(id).is_some_and(Hosted::is_restless));
        self.counting.retain(|id| self.hosted.get(id).is_some_and(|h| h.affinity.is_counting()));
        self.nudge_repairs();
        self.drop_deleted_volumes();
    }

    /// Leadership goes to where a copyset's IO comes from, and away from a target that is being emptied.
    fn draw_leadership(&mut self, id: CopysetId) {
        let (me, now, leaves) = (self.settings.me.target, self.now, self.is_draining());
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let drawn = hosted.affinity.judge(me, now).filter(|target| !self.map.is_draining(*target));
        if hosted.replica.role() != Role::Leader || (drawn.is_none() && !leaves) {
            return;
        }
        let heirs = hosted.replica.lags().filter(|l| l.voter && l.alive && !l.installing);
        let heirs = heirs.filter(|l| !self.map.is_draining(l.peer.target));
        // Where nothing draws it, to whom the least is missing; among equals it differs by copyset.
        let order = |l: &Lag| (Some(l.peer.target) != drawn, l.entries, l.peer.target.0 ^ (id.0 & 1));
        let heir = heirs.min_by_key(order).map(|l| l.peer.target);
        let Some(heir) = heir.filter(|heir| leaves || Some(*heir) == drawn) else { return };
        if hosted.replica.transfer_leadership(heir, now).is_ok() {
            self.counts.transfers += 1;
            self.touch(id);
        }
    }

    /// Leaders propose that deleted volumes' chunks be freed, until none is left.
    fn drop_deleted_volumes(&mut self) {
        for volume in self.deleted.clone() {
            if self.freed.contains(&volume) {
                continue;
            }
            let mut left = false;
            let ids: Vec<CopysetId> = self.hosted.keys().copied().collect();
            for id in ids {
                let chunks = self.store.chunks_of(id).iter().any(|c| c.volume == volume);
                // A follower may have a fence left over that its leader has not: it takes up 16 bytes, no more.
                let leads = self.hosted.get(&id).is_some_and(|h| h.replica.role() == Role::Leader);
                let fenced = leads && self.store.fence(id, volume) > SessionEpoch(0);
                if !chunks && !fenced {
                    continue;
                }
                left = true;
                self.propose_drop(id, volume);
            }
            if !left {
                self.freed.insert(volume);
                self.out.push_back(Output::Freed { volume });
            }
        }
    }

    fn propose_drop(&mut self, id: CopysetId, volume: VolumeId) {
        let now = self.now;
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let settled = hosted.replica.applied_index() == hosted.replica.last_index();
        if hosted.replica.role() == Role::Leader && settled {
            let body = protocol::raft::Body::DropVolume { volume };
            if let Ok(index) = hosted.replica.propose(body, now) {
                hosted.gate.proposed(index, body);
            }
            self.touch(id);
        }
    }

    /// The driver finished an op of the store.
    pub fn store_completed(
        &mut self,
        ticket: u64,
        result: Result<Option<Mem>, chunkstore::IoError>,
        now: Time,
    ) {
        self.now = now;
        self.store.completed(ticket, result, now);
    }

    /// The store's next op.
    pub fn poll_op(&mut self, now: Time) -> Option<chunkstore::Op<Mem>> {
        self.store.poll_op(now)
    }

    /// What a write of the store was made of, to be used again.
    pub fn take_back(&mut self, pieces: Pieces<Mem>) {
        self.store.take_back(pieces);
    }

    /// The next output.
    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// Memory is short: drops what can be read back from the log.
    pub fn evict(&mut self, blocks: usize) -> usize {
        self.store.evict(blocks)
    }

    /// Begins the graceful end; [`Output::Stopped`] follows.
    pub fn stop(&mut self) {
        self.store.stop();
    }

    /// A peer's link broke: groups that hibernate on it must look again.
    pub fn peer_lost(&mut self, peer: ShardAddr, now: Time) {
        self.now = now;
        let ids: Vec<CopysetId> = self.hosted.keys().copied().collect();
        for id in ids {
            let Some(hosted) = self.hosted.get_mut(&id) else { continue };
            if hosted.replica.is_hibernating() && hosted.replica.members().find(peer.target).is_some() {
                hosted.replica.wake(now);
                self.touch(id);
            }
            if let Some(outbox) = self.hosted.get_mut(&id).and_then(|h| h.outboxes.get_mut(&peer)) {
                outbox.behind.clear();
            }
        }
    }

    /// Hands leadership of a copyset over, as an operator asked.
    pub fn transfer_leadership(&mut self, id: CopysetId, to: TargetId, now: Time) -> Result<(), String> {
        self.now = now;
        let hosted = self.hosted.get_mut(&id).ok_or("no replica of this copyset here")?;
        hosted.replica.transfer_leadership(to, now).map_err(|refused| refused.to_string())?;
        self.touch(id);
        Ok(())
    }

    /// How every copyset here stands.
    pub fn standings(&self) -> Vec<CopysetStanding> {
        let standing = |(id, h): (&CopysetId, &Hosted)| CopysetStanding {
            id: *id,
            term: h.replica.term().0,
            role: h.replica.role(),
            leader: h.replica.leader(),
            commit: h.replica.commit_index(),
            applied: h.replica.applied_index(),
            health: h.replica.health(),
            membership: (h.replica.role() == Role::Leader).then(|| Membership {
                members: *h.replica.members(),
                settled: h.replica.members_settled(),
                lags: h.replica.lags().collect(),
                busy: h.affinity.is_in_use(self.now),
            }),
        };
        self.hosted.iter().map(standing).collect()
    }

    /// Chunk slots that each volume has here, and those of them that are in copysets led from here.
    pub fn volume_slots(&self) -> BTreeMap<VolumeId, VolumeSlots> {
        let mut all: BTreeMap<VolumeId, VolumeSlots> = BTreeMap::new();
        for (copyset, volume, slots) in self.store.slots_in_use() {
            let leads = self.hosted.get(&copyset).is_some_and(|h| h.replica.role() == Role::Leader);
            let of = all.entry(volume).or_default();
            of.held += slots;
            of.led += if leads { slots } else { 0 };
        }
        all
    }

    /// The replicas here, in order.
    pub fn replicas(&self) -> impl Iterator<Item = (CopysetId, &Replica)> {
        self.hosted.iter().map(|(id, hosted)| (*id, &hosted.replica))
    }

    /// The replica of a copyset, if it is here.
    pub fn replica(&self, id: CopysetId) -> Option<&Replica> {
        self.hosted.get(&id).map(|hosted| &hosted.replica)
    }

    /// The chunks that a copyset holds here.
    pub fn chunks_of(&self, id: CopysetId) -> Vec<ChunkId> {
        self.store.chunks_of(id)
    }

    /// The payload of an entry of the log, where it is in memory.
    pub fn entry_payload(&self, id: CopysetId, index: LogIndex) -> chunkstore::EntryPayload<Mem> {
        self.store.entry_payload(id, index)
    }

    /// Whether the disk failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Counters.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// What it holds in memory beside the arena, and what bounds that.
    pub fn usage(&self, layout: &chunkstore::Layout) -> Vec<Usage> {
        let stats = self.store.stats();
        let replicas = self.hosted.len();
        let log_blocks = layout.log_blocks() as usize;
        let entries =
            self.hosted.values().map(|h| h.replica.last_index().0 - h.replica.floor().0.0).sum::<u64>();
        let behind = self.hosted.values().flat_map(|h| h.outboxes.values().map(|o| o.behind.len())).max();
        let installing = self.hosted.keys().any(|id| self.store.is_installing(*id));
        let waiting_most = chunkstore::waiting_max(layout, replicas, installing);
        vec![
            Usage::new("requests under way", self.requests.len(), io::REQUESTS_MAX),
            // A request has up to three parts, each of which may need a read.
            Usage::new("work under way", self.work.len(), 4 * io::REQUESTS_MAX),
            // Each has a record of 48 bytes in a block of the log.
            Usage::new("entries of all replicas", entries as usize, log_blocks * (BLOCK_BYTES / 48)),
            Usage::new("messages behind a read of the log", behind.unwrap_or(0), hosted::OUTBOX_MAX),
            Usage::new("log blocks of entries that wait", stats.waiting_blocks as usize, waiting_most),
            // Those in use by a flush stay.
            Usage::new(
                "tables in memory",
                stats.tables_cached as usize,
                layout.table_cache_max.max(1) + layout.flush_in_flight_max,
            ),
        ]
    }

    /// The store's counters.
    pub fn store_stats(&self) -> chunkstore::Stats {
        self.store.stats()
    }

    /// Restores the invariants after events; see the module.
    pub fn settle(&mut self) {
        loop {
            while let Some(event) = self.store.poll_event() {
                self.store_event(event);
            }
            let Some(id) = self.touched.pop_front() else {
                if self.let_slowed_go() {
                    continue;
                }
                return;
            };
            if let Some(hosted) = self.hosted.get_mut(&id) {
                hosted.touched = false;
            }
            self.drain_replica(id);
            self.release_ordered(id);
            self.note_deadline(id);
        }
    }

    fn store_event(&mut self, event: Event<Mem>) {
        match event {
            Event::Durable(lsn) => self.durable(lsn),
            Event::Read { token, result } => self.store_read(token as usize, result),
            Event::Entry { token, result } => self.entry_loaded(token as usize, result),
            Event::Table { token, crcs, unknown } => self.table_read(token as usize, crcs, &unknown),
            Event::Status { token, runs } => self.status_read(token as usize, runs),
            Event::Compactable { copyset, floor, .. } => {
                // A catch-up under way replaces the log when it ends.
                if let Some(hosted) = self.hosted.get_mut(&copyset).filter(|h| !h.replica.is_installing()) {
                    hosted.replica.compact(floor);
                    self.touch(copyset);
                }
            }
            Event::Corrupt { copyset, chunk, bad } => self.repair_block(copyset, chunk, bad, None),
            Event::Failed(failure) => self.fail(failure.to_string()),
            Event::PoolLimited { slots } => {
                tracing::warn!(slots, "the file system is full: no new chunk slots; existing data is served");
            }
            Event::Preformat { segments, slots } => tracing::debug!(segments, slots, "preformatted"),
            Event::Stopped => self.out.push_back(Output::Stopped),
        }
    }

    fn durable(&mut self, lsn: Lsn) {
        while let Some((_, id, ticket)) = self.persisting.front().copied().filter(|(at, ..)| *at <= lsn) {
            self.persisting.pop_front();
            if let Some(hosted) = self.hosted.get_mut(&id) {
                hosted.replica.durable(ticket);
                self.touch(id);
            }
        }
        self.catch_ups_durable(lsn);
    }

    /// The disk is gone: nothing is acknowledged, led or answered from here any more.
    fn fail(&mut self, why: String) {
        if self.failed {
            return;
        }
        self.failed = true;
        self.hosted.clear();
        self.touched.clear();
        self.timers.clear();
        self.restless.clear();
        self.counting.clear();
        self.persisting.clear();
        self.slowed.clear();
        self.slowed_blocks = 0;
        self.out.push_back(Output::Failed { why });
    }

    /// Puts a copyset on the list of those to be settled.
    fn touch(&mut self, id: CopysetId) {
        if let Some(hosted) = self.hosted.get_mut(&id)
            && !std::mem::replace(&mut hosted.touched, true)
        {
            self.touched.push_back(id);
        }
    }

    fn note_deadline(&mut self, id: CopysetId) {
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let wanted = hosted.replica.next_timeout();
        if wanted == hosted.deadline {
            return;
        }
        if let Some(old) = std::mem::replace(&mut hosted.deadline, wanted) {
            self.timers.remove(&(old, id));
        }
        if let Some(at) = wanted {
            self.timers.insert((at, id));
        }
    }

    fn send(&mut self, to: ShardAddr, message: PeerMessage, payload: Mems) {
        self.out.push_back(Output::Send { to, message, payload });
    }

    fn ask(&mut self, to: ShardAddr, copyset: CopysetId, fetch: Fetch) {
        self.send(to, PeerMessage::Fetch { copyset, fetch }, Mems::new());
    }
}

fn recovered_state(copyset: RecoveredCopyset) -> Recovered {
    let health = match copyset.health {
        chunkstore::Health::Whole => Health::Whole,
        chunkstore::Health::Installing => Health::Installing,
        chunkstore::Health::Damaged => Health::Damaged,
    };
    Recovered {
        hard: copyset.hard,
        floor: copyset.floor,
        members: copyset.members,
        entries: copyset.entries,
        applied: copyset.applied,
        health,
    }
}
