//! Volumes offered over NBD and NVMe/TCP: clients on one side, [`VolumeIo`] on the other.
//!
//! Everything a client asks becomes a request of [`VolumeIo`] under an id of this module's, and
//! every answer finds its way back by that id. A client that vanishes leaves requests behind;
//! they are aborted, and what was already on its way is ignored when it returns.
//!
//! A flush is answered at once: a write is only ever acknowledged when it is durable on a
//! quorum, so there is nothing to flush. For the same reason FUA needs no special care, and
//! multi-conn is true: an acknowledged write is seen by every later read on any connection.
//! NVMe's own part is in [`nvme`].

mod nvme;

use self::nvme::Nvme;
use crate::mem::{Mem, Mems};
use crate::metrics::ShardCounters;
use crate::spread::Place;
use crate::subsystems::Seat;
use chunkstore::Payload;
use client::volume::{Action, Config, IoError, Request, SubmitError, VolumeIo};
use protocol::control::check_holder;
use protocol::map::{ClusterMap, ExportProtocol};
use protocol::nbd::{ExportInfo, NbdError, Refusal, Violation};
use protocol::peer::{IoOutcome, IoReply, IoRequest};
use protocol::types::{
    BLOCK_BYTES, ENTRY_BYTES_MAX, SessionEpoch, ShardAddr, Time, VolumeId, block_crc, crc_at_rest,
    crc_from_rest,
};
use reactor::{Arena, Completion, Op, Reactor, Socket};
use slab::Slab;
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use transport::{
    NbdCloseReason, NbdConn, NbdEvent, NbdLimits, Owner, ReadPart, ReadParts, ReqId, STAGING_BLOCKS,
};

/// Most connections of hosts that a shard serves.
const CONNECTIONS_MAX: usize = 1024;
/// One part in so many of a shard's arena may be their staging buffers, or there would be no room for their data.
const STAGING_SHARE: usize = 4;

/// What the export tells the loop.
pub enum ExportOut {
    /// Send IO to a copyset's leader.
    Send { to: ShardAddr, request: IoRequest, payload: Option<Mem> },
    /// Ask for a newer map.
    NeedMap,
    /// Report to the MDS.
    FirstWrite { volume: VolumeId, segment: u32 },
    /// A volume's fence stands in all of its copysets, or why not.
    Fenced { job: u64, result: Result<(), String> },
}

/// Ids of [`VolumeIo`] that are jobs of the control thread, not places in `pending`.
const FENCE_JOB: u64 = 1 << 63;

/// What a request of [`VolumeIo`] was made for.
enum Purpose {
    Read { offset: u64, length: u32, parts: Gathered, corrupt: bool },
    Write { offset: u64, length: u32 },
    Zero { length: u64 },
    Status,
}

/// Parts of a read by their offset, in order; as a rule just one, off the heap.
type Gathered = SmallVec<[(u64, ReadParts); 1]>;

/// All parts of a read in one list.
fn joined(mut parts: Gathered) -> ReadParts {
    match parts.len() {
        1 => parts.remove(0).1,
        _ => parts.into_iter().flat_map(|(_, list)| list).collect(),
    }
}

/// Whose request it is: the protocol, and the place among its connections.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum ConnKey {
    Nbd(usize),
    Nvme(usize),
}

/// Why a request failed; each protocol has its own words for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failure {
    Io(IoError),
    Refused(SubmitError),
    /// The data did not survive its way here.
    WireCorrupt,
}

/// One connection, for whoever asks.
pub struct ConnInfo {
    /// Its number.
    pub id: u64,
    /// The volume it uses; 0 for none.
    pub volume: VolumeId,
    /// Its requests in flight.
    pub in_flight: usize,
    /// How it is attached.
    pub protocol: ExportProtocol,
    /// The host's name (NQN), over NVMe.
    pub host: String,
    /// Which of its controller's queues, over NVMe.
    pub queue: u16,
    /// Whether headers, and data, carry digests.
    pub digests: (bool, bool),
    /// Under which it attached to its volume.
    pub epoch: SessionEpoch,
}

/// How an NBD client is attached.
#[derive(Clone, Default)]
struct Attached {
    volume: VolumeId,
    epoch: SessionEpoch,
    /// As it calls itself; empty: it does not.
    holder: String,
    /// Another host has taken the volume over.
    over: bool,
}

struct Pending {
    conn: ConnKey,
    epoch: SessionEpoch,
    req: ReqId,
    purpose: Purpose,
    since: Time,
}

/// Counters of the export.
#[derive(Clone, Copy, Default, Debug)]
pub struct ExportCounts {
    /// Connections accepted.
    pub connections: u64,
    /// Connections closed because the client broke the protocol.
    pub violations: u64,
    /// Replies from leaders whose data failed its checksum here.
    pub wire_corrupt: u64,
}

/// The side of one shard that hosts see.
pub struct Export {
    kind: u8,
    limits: NbdLimits,
    map: Arc<ClusterMap>,
    volume: VolumeIo<Mem>,
    conns: Slab<NbdConn>,
    /// Of each, by its place.
    attached: Vec<Attached>,
    nvme: Nvme,
    /// Of connections that carry IO, or may yet.
    places: BTreeMap<ConnKey, Place>,
    pending: Slab<Pending>,
    /// Requests that [`VolumeIo`] had no room for.
    deferred: VecDeque<(usize, Request<Mem>)>,
    out: VecDeque<ExportOut>,
    /// Of one connection; empty between calls.
    heard: Vec<NbdEvent>,
    me: ShardAddr,
    counts: ExportCounts,
    counters: Arc<ShardCounters>,
}

impl Export {
    /// An export whose NBD connections' tokens have `kind`.
    pub fn new(
        kind: u8,
        config: Config,
        me: ShardAddr,
        limits: NbdLimits,
        counters: Arc<ShardCounters>,
        seat: Seat,
    ) -> Self {
        Self {
            kind,
            limits,
            nvme: Nvme::new(&limits, seat),
            map: Arc::default(),
            volume: VolumeIo::new(config),
            conns: Slab::new(),
            attached: Vec::new(),
            places: BTreeMap::new(),
            pending: Slab::new(),
            deferred: VecDeque::new(),
            out: VecDeque::new(),
            heard: Vec::new(),
            me,
            counts: ExportCounts::default(),
            counters,
        }
    }

    /// Takes a newer map.
    pub fn set_map(&mut self, map: Arc<ClusterMap>, now: Time) {
        self.map = map.clone();
        for attached in &mut self.attached {
            attached.over |= is_over(&map, attached.volume, attached.epoch);
        }
        self.nvme.note_take_overs(&map);
        self.volume.set_map(map, now);
        self.offer_nvme();
    }

    /// Raises a volume's fence in each of its copysets; [`ExportOut::Fenced`] follows.
    pub fn fence(&mut self, job: u64, volume: VolumeId, epoch: SessionEpoch, now: Time) {
        if let Err(error) = self.volume.submit(FENCE_JOB | job, epoch, Request::Fence { volume }, now) {
            self.out.push_back(ExportOut::Fenced { job, result: Err(error.to_string()) });
        }
    }

    /// The routing core, for what concerns it alone (links, segments).
    pub fn volume(&mut self) -> &mut VolumeIo<Mem> {
        &mut self.volume
    }

    /// As [`VolumeIo::load`].
    pub fn load(&self) -> [(usize, usize); 3] {
        self.volume.load()
    }

    /// Reads of hosts under way, with the writes beside them; none while there are only writes.
    pub fn reads_under_way(&self) -> usize {
        let [_, pieces, reads] = self.volume.load();
        if reads.0 == 0 { 0 } else { pieces.0 }
    }

    /// Counters.
    pub fn counts(&self) -> &ExportCounts {
        &self.counts
    }

    /// Connections open now.
    pub fn connections(&self) -> impl Iterator<Item = ConnInfo> + '_ {
        let nbd = |(key, conn): (usize, &NbdConn)| ConnInfo {
            id: key as u64,
            volume: VolumeId(conn.export().map_or(0, |e| e.id as u32)),
            in_flight: conn.requests(),
            protocol: ExportProtocol::Nbd,
            host: self.attached[key].holder.clone(),
            queue: 0,
            digests: (false, false),
            epoch: self.attached[key].epoch,
        };
        self.conns.iter().map(nbd).chain(self.nvme.connections())
    }

    /// An NBD client has connected.
    pub fn accepted<R: Reactor>(&mut self, reactor: &mut R, socket: Socket, place: Place) {
        let owner = Owner { kind: self.kind, index: self.conns.vacant_key() as u32 };
        let full = self.is_full(reactor.arena());
        let conn = if full { None } else { NbdConn::new(reactor, socket, owner, self.limits) };
        match conn {
            Some(conn) => {
                let key = self.conns.insert(conn);
                self.attached.resize_with(self.attached.len().max(key + 1), Attached::default);
                self.attached[key] = Attached::default();
                self.places.insert(ConnKey::Nbd(key), place);
                self.counts.connections += 1;
            }
            None => {
                self.refuse(reactor, socket);
            }
        }
    }

    /// Whether it serves as many hosts as its memory for IO allows.
    fn is_full(&self, arena: &Arena) -> bool {
        let most = arena.capacity_blocks() / STAGING_SHARE / STAGING_BLOCKS;
        self.conns.len() + self.nvme.len() >= most.min(CONNECTIONS_MAX)
    }

    fn refuse<R: Reactor>(&mut self, reactor: &mut R, socket: Socket) {
        self.counters.refused_too_many.add(1);
        tracing::warn!(
            connections = self.conns.len() + self.nvme.len(),
            "a host's connection was refused: this shard's memory for IO has no room for more; a larger arena_bytes or more shards give it some"
        );
        reactor.submit(Owner { kind: u8::MAX, index: 0 }.token(0), Op::Close { socket });
    }

    /// The end of one of a connection's operations.
    pub fn on_completion<R: Reactor>(&mut self, reactor: &mut R, completion: Completion, now: Time) {
        let (owner, _) = Owner::split(completion.token);
        let key = owner.index as usize;
        let Some(conn) = self.conns.get_mut(key) else { return };
        let mut events = std::mem::take(&mut self.heard);
        conn.on_completion(reactor, completion, &mut events);
        self.take(key, events, now);
    }

    /// Checks the clocks of clients. To be called about once a second.
    pub fn tick_slow<R: Reactor>(&mut self, reactor: &mut R, now: Time) {
        let keys: Vec<usize> = self.conns.iter().map(|(key, _)| key).collect();
        for key in keys {
            let mut events = Vec::new();
            self.conns[key].tick(reactor, now, &mut events);
            self.take(key, events, now);
        }
        self.tick_nvme(reactor, now);
    }

    /// When the routing core wants to be ticked.
    pub fn next_timeout(&self) -> Option<Time> {
        self.volume.next_timeout()
    }

    /// Whether a connection waits for memory.
    pub fn is_starved(&self) -> bool {
        self.conns.iter().any(|(_, conn)| conn.is_starved()) || self.nvme.is_starved()
    }

    /// Sends answers, looks at what came. True if that brought new requests.
    pub fn pump<R: Reactor>(&mut self, reactor: &mut R, now: Time) -> bool {
        let share = self.share_bytes(reactor.arena());
        let mut any = false;
        for key in 0..self.conns.capacity() {
            let Some(conn) = self.conns.get_mut(key) else { continue };
            conn.limit_bytes(share);
            if conn.needs_pump() {
                let mut events = std::mem::take(&mut self.heard);
                conn.pump(reactor, &mut events);
                any |= !events.is_empty();
                self.take(key, events, now);
            }
            if self.conns[key].is_done() {
                self.conns.remove(key);
            }
        }
        any | self.pump_nvme(reactor, now)
    }

    /// What one client may hold: an equal part of what all may, one part left for who comes next.
    /// Clients that stop taking replies (a paused virtual machine) keep what they hold.
    fn share_bytes(&self, arena: &Arena) -> usize {
        let blocks = arena.capacity_blocks().saturating_sub(self.limits.arena_reserve_blocks);
        let share = blocks * BLOCK_BYTES / (self.conns.len() + self.nvme.len() + 1);
        share.clamp(ENTRY_BYTES_MAX, self.limits.bytes_max.max(ENTRY_BYTES_MAX))
    }

    /// Refuses new requests: the target is stopping.
    pub fn stop(&mut self) {
        self.volume.stop();
        for (_, conn) in &mut self.conns {
            conn.stop();
        }
        self.nvme.stop();
    }

    fn take(&mut self, key: usize, mut events: Vec<NbdEvent>, now: Time) {
        for event in events.drain(..) {
            self.event(key, event, now);
        }
        self.heard = events;
    }

    fn event(&mut self, key: usize, event: NbdEvent, now: Time) {
        match event {
            NbdEvent::OpenExport { name } => {
                let answer = self.find(&name).map(|(info, attached)| {
                    self.attached[key] = attached;
                    info
                });
                self.conns[key].answer_export(answer);
            }
            NbdEvent::ListExports => {
                let names: Vec<(String, String)> =
                    self.names().map(|name| (name.clone(), description(&name))).collect();
                self.conns[key].answer_list(&names);
            }
            NbdEvent::Attached(info) => tracing::info!(volume = info.name, "NBD client attached"),
            NbdEvent::Flush { req } => {
                self.counters.flushes_host.add(1);
                self.conns[key].flush_done(req, Ok(()));
            }
            NbdEvent::Closed { reason } => self.closed(key, &reason, now),
            NbdEvent::Read { req, offset, length } => {
                let purpose = Purpose::Read { offset, length, parts: Gathered::new(), corrupt: false };
                self.begin_nbd(key, req, purpose, now, |volume| Request::Read {
                    volume,
                    offset,
                    length: length.into(),
                });
            }
            NbdEvent::WritePiece { req, offset, length, buf, .. } => {
                let lead = offset as usize % BLOCK_BYTES;
                let crc = block_crc(&buf[lead..lead + length as usize]);
                let payload = Mem::whole(buf);
                self.begin_nbd(key, req, Purpose::Write { offset, length }, now, |volume| {
                    Request::WritePiece { volume, offset, length, crc, payload }
                });
            }
            NbdEvent::Zero { req, offset, length, trim, .. } => {
                let (from, to) = zero_range(offset, length.into(), trim);
                if from >= to {
                    return self.conns[key].zero_done(req, Ok(()));
                }
                self.begin_nbd(key, req, Purpose::Zero { length: to - from }, now, |volume| Request::Zero {
                    volume,
                    offset: from,
                    length: to - from,
                });
            }
            NbdEvent::Status { req, offset, length, .. } => {
                self.begin_nbd(key, req, Purpose::Status, now, |volume| Request::Status {
                    volume,
                    offset,
                    length: length.into(),
                });
            }
        }
    }

    fn names(&self) -> impl Iterator<Item = String> + '_ {
        let offered = self.map.exports.iter().filter(|e| e.protocol == ExportProtocol::Nbd);
        offered.filter_map(|e| self.map.volumes.get(&e.volume)).filter(|v| !v.deleted).map(|v| v.name.clone())
    }

    /// The export of a name, `VOLUME` or `VOLUME@HOLDER`; the empty name is the only export, if there is just
    /// one.
    fn find(&self, asked: &str) -> Result<(ExportInfo, Attached), Refusal> {
        let (name, holder) = asked.split_once('@').unwrap_or((asked, ""));
        let mut names = self.names();
        let name = match (name, names.next(), names.next()) {
            ("", Some(only), None) => only,
            _ => name.to_owned(),
        };
        let (id, volume) = self.map.volume_named(&name).ok_or(Refusal::Unknown)?;
        if !self.names().any(|offered| offered == name) {
            return Err(Refusal::Policy(format!(
                "volume {name} is not exported over NBD; `ashlar export add {name}` does it"
            )));
        }
        let session = &volume.session;
        if !holder.is_empty() {
            check_holder(holder).map_err(|problem| Refusal::Policy(problem.to_string()))?;
        }
        if !session.admits(holder) {
            return Err(Refusal::Policy(held(&name, &session.holder)));
        }
        let (epoch, holder) = (session.epoch, holder.to_owned());
        let attached = Attached { volume: id, epoch, holder, over: false };
        let info = ExportInfo {
            id: u64::from(id.0),
            description: description(&name),
            name: if asked.is_empty() { name } else { asked.to_owned() },
            bytes: volume.bytes,
            block_bytes: volume.block_bytes,
            read_only: false,
        };
        Ok((info, attached))
    }

    fn begin_nbd(
        &mut self,
        conn: usize,
        req: ReqId,
        purpose: Purpose,
        now: Time,
        request: impl FnOnce(VolumeId) -> Request<Mem>,
    ) {
        let Attached { volume, epoch, over, .. } = self.attached[conn];
        self.begin((ConnKey::Nbd(conn), req), purpose, (epoch, over), now, request(volume));
    }

    fn begin(
        &mut self,
        (conn, req): (ConnKey, ReqId),
        purpose: Purpose,
        (epoch, over): (SessionEpoch, bool),
        now: Time,
        request: Request<Mem>,
    ) {
        let key = self.pending.insert(Pending { conn, epoch, req, purpose, since: now });
        if over {
            self.count_error(IoError::Fenced);
            return self.ended(key, Err(Failure::Io(IoError::Fenced)), now);
        }
        self.submit(key, request, now);
    }

    fn submit(&mut self, key: usize, request: Request<Mem>, now: Time) {
        // The order of requests that wait is kept; nothing new slips past them.
        if !self.deferred.is_empty() {
            return self.deferred.push_back((key, request));
        }
        self.try_submit(key, request, now);
    }

    fn try_submit(&mut self, key: usize, request: Request<Mem>, now: Time) -> bool {
        // A copy of handles, for the case that there is no room now.
        let again = request.clone();
        let epoch = self.pending[key].epoch;
        match self.volume.submit(key as u64, epoch, request, now) {
            Ok(()) => true,
            Err(SubmitError::Busy) => {
                self.deferred.push_front((key, again));
                false
            }
            Err(error) => {
                tracing::debug!(%error, "a request was refused");
                self.counters.errors_other.add(1);
                self.ended(key, Err(Failure::Refused(error)), now);
                true
            }
        }
    }

    /// The client is gone: nobody waits for its requests any more.
    fn closed(&mut self, conn: usize, reason: &NbdCloseReason, now: Time) {
        match reason {
            NbdCloseReason::Disconnect => tracing::debug!("NBD client disconnected"),
            NbdCloseReason::Violation(what @ Violation::Export(_)) => {
                self.counters.refused_no_export.add(1);
                tracing::info!(%what, "NBD connection closed");
            }
            NbdCloseReason::Violation(what) => {
                self.counts.violations += 1;
                tracing::warn!(%what, "NBD connection closed: the client broke the protocol");
            }
            reason => {
                self.counters.refused_timed_out.add(u64::from(*reason == NbdCloseReason::TooSlow));
                tracing::info!(%reason, "NBD connection closed");
            }
        }
        self.abandon(ConnKey::Nbd(conn), now);
    }

    /// Nobody waits for a connection's requests any more.
    fn abandon(&mut self, conn: ConnKey, now: Time) {
        self.places.remove(&conn);
        let orphans: Vec<usize> =
            self.pending.iter().filter(|(_, p)| p.conn == conn).map(|(key, _)| key).collect();
        for key in orphans {
            self.volume.abort(key as u64, now);
            self.deferred.retain(|(deferred, _)| *deferred != key);
            self.ended(key, Err(Failure::Io(IoError::Stopped)), now);
        }
    }

    /// An answer from a shard; `payload` in as many runs as it came in. The shard verified the data as it
    /// read it: what has not left this target's memory since is not verified again.
    pub fn reply(&mut self, from: ShardAddr, mut reply: IoReply, payload: Mems, now: Time) {
        let blocks = blocks_of(payload);
        if from.target != self.me.target
            && let IoOutcome::Data { crcs, .. } = &reply.outcome
            && !blocks.iter().map(|block| crc_at_rest(block_crc(block.block(0)))).eq(crcs.iter().copied())
        {
            // Damaged on its way: asked again, as if the leader had been busy.
            self.counts.wire_corrupt += 1;
            reply.outcome = IoOutcome::Busy;
        }
        self.volume.reply(from, reply, blocks, now);
    }

    /// Carries out what the routing core decided. True if there was anything.
    pub fn drain(&mut self, now: Time) -> bool {
        let mut any = false;
        while let Some(action) = self.volume.poll() {
            any = true;
            match action {
                Action::Send { to, request, payload } => {
                    let route =
                        if to == self.me { &self.counters.io_local } else { &self.counters.io_forwarded };
                    route.add(1);
                    self.out.push_back(ExportOut::Send { to, request, payload });
                }
                Action::ReadPiece { id, offset, length, present, crcs, payload } => {
                    debug_assert_eq!(crcs.len(), payload.len(), "checked when the reply came");
                    self.read_piece(id as usize, (offset, length), present, &crcs, &payload);
                }
                Action::Done { id, result } if id & FENCE_JOB != 0 => {
                    let result = result.map_err(|error| error.to_string());
                    self.out.push_back(ExportOut::Fenced { job: id & !FENCE_JOB, result });
                }
                Action::Done { id, result } => {
                    if let Err(error) = result {
                        self.count_error(error);
                    }
                    self.ended(id as usize, result.map_err(Failure::Io), now);
                }
                Action::StatusDone { id, runs } => self.status_done(id as usize, &runs),
                Action::NeedMap => self.out.push_back(ExportOut::NeedMap),
                Action::FirstWrite { volume, segment } => {
                    self.out.push_back(ExportOut::FirstWrite { volume, segment });
                }
            }
        }
        while let Some((key, request)) = self.deferred.pop_front() {
            if !self.try_submit(key, request, now) {
                break;
            }
            any = true;
        }
        any
    }

    /// What the loop is to do.
    pub fn poll(&mut self) -> Option<ExportOut> {
        self.out.pop_front()
    }

    /// A part of a read came, whole blocks; only the asked bytes of it go to the client.
    fn read_piece(
        &mut self,
        key: usize,
        (offset, length): (u64, u32),
        present: u32,
        crcs: &[u32],
        payload: &[Mem],
    ) {
        let Some(Pending { purpose: Purpose::Read { offset: asked, length: bytes, parts, corrupt }, .. }) =
            self.pending.get_mut(key)
        else {
            return;
        };
        let (asked, end) = (*asked, *asked + u64::from(*bytes));
        let mut data = payload.iter().zip(crcs);
        let mut list = ReadParts::new();
        for block in 0..length as usize / BLOCK_BYTES {
            let at = offset + (block * BLOCK_BYTES) as u64;
            let from = asked.max(at).min(at + BLOCK_BYTES as u64) - at;
            let to = end.max(at).min(at + BLOCK_BYTES as u64) - at;
            let wanted = from < to;
            if present & (1 << block) == 0 {
                if wanted {
                    push_zeroes(&mut list, (to - from) as u32);
                }
                continue;
            }
            let Some((run, crc)) = data.next() else {
                *corrupt = true;
                return;
            };
            if wanted {
                push_data(&mut list, run, from as usize, to as usize, *crc);
            }
        }
        let place = parts.partition_point(|(at, _)| *at < offset);
        parts.insert(place, (offset, list));
    }

    fn ended(&mut self, key: usize, result: Result<(), Failure>, now: Time) {
        let Some(pending) = self.pending.try_remove(key) else { return };
        let corrupt = matches!(pending.purpose, Purpose::Read { corrupt: true, .. });
        let result = if corrupt { result.and(Err(Failure::WireCorrupt)) } else { result };
        if result.is_ok() {
            self.count(&pending, now);
        } else if corrupt {
            self.counters.errors_corrupt.add(1);
        }
        match pending.conn {
            ConnKey::Nbd(conn) => self.ended_nbd(conn, pending, result.map_err(nbd_error)),
            ConnKey::Nvme(conn) => self.nvme.ended(conn, pending, result),
        }
    }

    fn ended_nbd(&mut self, conn: usize, pending: Pending, result: Result<(), NbdError>) {
        let Some(conn) = self.conns.get_mut(conn) else { return };
        match pending.purpose {
            Purpose::Read { offset, parts, .. } => {
                conn.read_done(pending.req, offset, result.map(|()| joined(parts)));
            }
            Purpose::Write { offset, .. } => conn.write_piece_done(pending.req, offset, result),
            Purpose::Zero { .. } => conn.zero_done(pending.req, result),
            Purpose::Status => conn.status_done(pending.req, result.map(|()| &[][..])),
        }
    }

    fn count(&self, pending: &Pending, now: Time) {
        let (counters, took) = (&self.counters, (now - pending.since).0);
        let written = match pending.purpose {
            Purpose::Read { length, .. } => {
                counters.reads.add(1);
                counters.read_bytes.add(length.into());
                counters.read_latency.record(took);
                return;
            }
            Purpose::Write { length, .. } => length.into(),
            Purpose::Zero { length } => length,
            Purpose::Status => return,
        };
        counters.writes.add(1);
        counters.write_bytes.add(written);
        counters.write_latency.record(took);
    }

    fn count_error(&self, error: IoError) {
        let counters = &self.counters;
        let counter = match error {
            IoError::NoSpace => &counters.errors_no_space,
            IoError::Corrupt => &counters.errors_corrupt,
            IoError::TimedOut => &counters.errors_timed_out,
            IoError::Fenced => &counters.errors_fenced,
            IoError::Stopped | IoError::Gone | IoError::Io => &counters.errors_other,
        };
        counter.add(1);
    }

    fn status_done(&mut self, key: usize, runs: &[(u64, bool)]) {
        let Some(pending) = self.pending.try_remove(key) else { return };
        // Only NBD asks for it.
        if let ConnKey::Nbd(conn) = pending.conn
            && let Some(conn) = self.conns.get_mut(conn)
        {
            conn.status_done(pending.req, Ok(runs));
        }
    }

    /// The local shard, as [`VolumeIo`] names it.
    pub fn me(&self) -> ShardAddr {
        self.me
    }
}

fn blocks_of(payload: Mems) -> client::volume::Payload<Mem> {
    if payload.iter().all(|run| run.blocks() == 1) {
        return payload;
    }
    payload.iter().flat_map(|run| (0..run.blocks()).map(move |at| run.window(at, 1))).collect()
}

/// Whether an attachment under this epoch has ended.
fn is_over(map: &ClusterMap, volume: VolumeId, epoch: SessionEpoch) -> bool {
    map.volumes.get(&volume).is_some_and(|volume| volume.session.epoch > epoch)
}

fn held(name: &str, holder: &str) -> String {
    format!("volume {name} is attached exclusively by {holder}; its holder attaches to {name}@HOLDER")
}

fn description(volume: &str) -> String {
    format!("Ashlar volume {volume}")
}

/// What is to be zeroed: a trim only whole blocks, since its edges need not change.
fn zero_range(offset: u64, length: u64, trim: bool) -> (u64, u64) {
    let (block, end) = (BLOCK_BYTES as u64, offset + length);
    if trim { (offset.next_multiple_of(block), end / block * block) } else { (offset, end) }
}

fn push_zeroes(list: &mut ReadParts, bytes: u32) {
    match list.last_mut() {
        Some(ReadPart::Zeroes(before)) => *before += bytes,
        _ => list.push(ReadPart::Zeroes(bytes)),
    }
}

/// Appends bytes of a block; joined with the part before where they lie side by side.
fn push_data(list: &mut ReadParts, run: &Mem, from: usize, to: usize, crc: u32) {
    let (buf, start) = run.place();
    // A whole block's checksum is the digest of its data.
    let crc = crc_from_rest(crc).filter(|_| to - from == BLOCK_BYTES);
    let (from, to) = ((start + from) as u32, (start + to) as u32);
    if let Some(ReadPart::Data { buf: last, to: end, crc, .. }) = list.last_mut()
        && last.is_same_run(buf)
        && *end == from
    {
        (*end, *crc) = (to, None);
        return;
    }
    list.push(ReadPart::Data { buf: buf.clone(), from, to, crc });
}

fn nbd_error(failure: Failure) -> NbdError {
    match failure {
        Failure::Io(IoError::NoSpace) => NbdError::NoSpace,
        Failure::Io(IoError::Fenced) => NbdError::NotPermitted,
        Failure::Io(IoError::Stopped | IoError::Gone) => NbdError::Shutdown,
        Failure::Io(IoError::Corrupt | IoError::Io | IoError::TimedOut) | Failure::WireCorrupt => {
            NbdError::Io
        }
        Failure::Refused(SubmitError::UnknownVolume | SubmitError::Stopped) => NbdError::Shutdown,
        Failure::Refused(SubmitError::OutOfRange | SubmitError::Misaligned | SubmitError::Busy) => {
            NbdError::Invalid
        }
    }
}
