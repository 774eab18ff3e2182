//! NVMe/TCP: connections, controllers, and the words that both use for failures.
//!
//! Each volume exported over NVMe is a subsystem; every target of the map that has an NVMe
//! address is a port of it. Whichever shard a connection is given to keeps it: an IO queue is the
//! shard's alone, commands of admin queues go to the [subsystems](crate::subsystems) of the target.

use super::{ConnInfo, ConnKey, Export, Failure, Gathered, Pending, Purpose, is_over, joined, zero_range};
use crate::core_loop::kind;
use crate::mem::Mem;
use crate::spread::Place;
use crate::subsystems::Seat;
use client::volume::{IoError, Request, SubmitError};
use protocol::map::{ClusterMap, ExportProtocol};
use protocol::nvme_tcp::controller::{Answer, Out, QueueId};
use protocol::nvme_tcp::{Status, Violation};
use protocol::types::{BLOCK_BYTES, SessionEpoch, Time, VolumeId, block_crc};
use reactor::{Completion, Reactor, Socket};
use slab::Slab;
use transport::{NbdLimits, NvmeCloseReason, NvmeConn, NvmeEvent, NvmeLimits, Owner, ReqId};

/// The NVMe side of one shard.
pub(super) struct Nvme {
    limits: NvmeLimits,
    conns: Slab<NvmeConn>,
    /// Of each connection, by its place.
    attached: Vec<Attached>,
    seat: Seat,
    serial: u32,
    /// Connections that the controllers want closed.
    to_close: Vec<usize>,
    /// Of one connection; empty between calls.
    heard: Vec<NvmeEvent>,
}

/// What is known of a connection beside its bytes.
#[derive(Clone, Default)]
struct Attached {
    queue: QueueId,
    /// Empty until its Connect was accepted.
    host: String,
    qid: u16,
    epoch: SessionEpoch,
    /// Another host has taken the volume over.
    over: bool,
}

impl Nvme {
    pub(super) fn new(limits: &NbdLimits, seat: Seat) -> Self {
        let (bytes_max, arena_reserve_blocks) = (limits.bytes_max, limits.arena_reserve_blocks);
        Self {
            limits: NvmeLimits { bytes_max, arena_reserve_blocks, ..NvmeLimits::default() },
            conns: Slab::new(),
            attached: Vec::new(),
            seat,
            serial: 0,
            to_close: Vec::new(),
            heard: Vec::new(),
        }
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = ConnInfo> + '_ {
        self.conns.iter().map(|(key, conn)| ConnInfo {
            id: key as u64,
            volume: conn.namespace().map_or(VolumeId(0), |n| n.volume),
            in_flight: conn.requests(),
            protocol: ExportProtocol::Nvme,
            host: self.attached[key].host.clone(),
            queue: self.attached[key].qid,
            digests: conn.digests(),
            epoch: self.attached[key].epoch,
        })
    }

    /// Notes whose attachment has ended.
    pub(super) fn note_take_overs(&mut self, map: &ClusterMap) {
        for (key, conn) in &self.conns {
            let (attached, namespace) = (&mut self.attached[key], conn.namespace());
            attached.over |= namespace.is_some_and(|n| is_over(map, n.volume, attached.epoch));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.conns.len()
    }

    pub(super) fn is_starved(&self) -> bool {
        self.conns.iter().any(|(_, conn)| conn.is_starved())
    }

    /// Hosts are told to use other paths.
    pub(super) fn stop(&mut self) {
        self.seat.leave();
        self.carry_out();
    }

    /// The connection that a controller means, unless it is over.
    fn place(&self, queue: QueueId) -> Option<usize> {
        let place = Seat::place(queue);
        (self.conns.contains(place) && self.attached[place].queue == queue).then_some(place)
    }

    /// Does what the controllers want.
    fn carry_out(&mut self) {
        for out in self.seat.take() {
            let Some(place) = self.place(out.queue()) else { continue };
            let conn = &mut self.conns[place];
            match out {
                Out::Complete { cid, status, result, .. } => {
                    conn.admin_done(cid, Answer::Done { status, result, data: Vec::new() });
                }
                Out::Namespace { namespace, .. } => conn.set_namespace(namespace),
                Out::Close { why, .. } => {
                    tracing::info!(why, "NVMe connection ends");
                    self.to_close.push(place);
                }
            }
        }
    }

    /// Counts for the health log what a connection answered.
    fn tell_served(&mut self, conn: usize) {
        let Some(served) = self.conns.get_mut(conn).and_then(NvmeConn::take_served) else { return };
        let queue = self.attached[conn].queue;
        self.seat.with(|controllers| controllers.served(queue, &served));
    }

    pub(super) fn ended(&mut self, conn: usize, pending: Pending, result: Result<(), Failure>) {
        let Some(conn) = self.conns.get_mut(conn) else { return };
        let reading = matches!(pending.purpose, Purpose::Read { .. });
        let result = result.map_err(|failure| status(failure, reading));
        match pending.purpose {
            Purpose::Read { offset, parts, .. } => {
                conn.read_done(pending.req, offset, result.map(|()| joined(parts)));
            }
            Purpose::Write { offset, .. } => conn.write_piece_done(pending.req, offset, result),
            Purpose::Zero { .. } => conn.zero_done(pending.req, result),
            Purpose::Status => unreachable!("NVMe has no such request"),
        }
    }
}

impl Export {
    /// Tells the controllers what the map offers.
    pub(super) fn offer_nvme(&mut self) {
        self.nvme.seat.adopted(&self.map, self.me.target);
        self.nvme.carry_out();
    }

    /// An NVMe host has connected.
    pub fn accepted_nvme<R: Reactor>(&mut self, reactor: &mut R, socket: Socket, spread: Place) {
        let full = self.is_full(reactor.arena());
        let conns = &mut self.nvme.conns;
        let owner = Owner { kind: kind::NVME, index: conns.vacant_key() as u32 };
        let conn = if full { None } else { NvmeConn::new(reactor, socket, owner, self.nvme.limits) };
        match conn {
            Some(conn) => {
                let place = conns.insert(conn);
                self.nvme.serial = self.nvme.serial.wrapping_add(1);
                let queue = self.nvme.seat.queue_id(place, self.nvme.serial);
                let attached = &mut self.nvme.attached;
                attached.resize_with(attached.len().max(place + 1), Attached::default);
                attached[place] = Attached { queue, ..Attached::default() };
                self.places.insert(ConnKey::Nvme(place), spread);
                self.counts.connections += 1;
            }
            None => {
                self.refuse(reactor, socket);
            }
        }
    }

    /// The end of one of an NVMe connection's operations.
    pub fn on_completion_nvme<R: Reactor>(&mut self, reactor: &mut R, completion: Completion, now: Time) {
        let (owner, _) = Owner::split(completion.token);
        let key = owner.index as usize;
        let Some(conn) = self.nvme.conns.get_mut(key) else { return };
        let mut events = std::mem::take(&mut self.nvme.heard);
        conn.on_completion(reactor, completion, &mut events);
        self.take_nvme(key, events, now);
    }

    pub(super) fn tick_nvme<R: Reactor>(&mut self, reactor: &mut R, now: Time) {
        let keys: Vec<usize> = self.nvme.conns.iter().map(|(key, _)| key).collect();
        for key in keys {
            let mut events = Vec::new();
            self.nvme.conns[key].tick(reactor, now, &mut events);
            self.take_nvme(key, events, now);
            self.nvme.tell_served(key);
        }
        if self.nvme.seat.keeps_time() {
            self.nvme.seat.with(|controllers| controllers.tick(now));
        }
        self.nvme.carry_out();
    }

    pub(super) fn pump_nvme<R: Reactor>(&mut self, reactor: &mut R, now: Time) -> bool {
        let mut any = false;
        self.nvme.carry_out();
        // Closing one connection may lead to others: those of its controller.
        while let Some(key) = self.nvme.to_close.pop() {
            let Some(conn) = self.nvme.conns.get_mut(key) else { continue };
            let mut events = Vec::new();
            conn.close(reactor, &mut events);
            self.take_nvme(key, events, now);
            any = true;
        }
        let share = self.share_bytes(reactor.arena());
        for key in 0..self.nvme.conns.capacity() {
            let Some(conn) = self.nvme.conns.get_mut(key) else { continue };
            conn.limit_bytes(share);
            if conn.needs_pump() {
                let mut events = std::mem::take(&mut self.nvme.heard);
                conn.pump(reactor, &mut events);
                any |= !events.is_empty();
                self.take_nvme(key, events, now);
            }
            if self.nvme.conns[key].is_done() {
                self.nvme.conns.remove(key);
            }
        }
        any
    }

    fn take_nvme(&mut self, key: usize, mut events: Vec<NvmeEvent>, now: Time) {
        for event in events.drain(..) {
            self.event_nvme(key, event, now);
        }
        self.nvme.heard = events;
    }

    fn event_nvme(&mut self, key: usize, event: NvmeEvent, now: Time) {
        match event {
            NvmeEvent::Connect { sqe, data } => {
                let queue = self.nvme.attached[key].queue;
                let answer = self.nvme.seat.with(|controllers| controllers.connect(queue, &sqe, &data, now));
                match &answer {
                    Err((status, result)) => tracing::info!(?status, result, "NVMe Connect refused"),
                    Ok(told) => {
                        let attached = &mut self.nvme.attached[key];
                        (attached.host, attached.qid) = (told.host.clone(), told.qid);
                        attached.epoch = told.epoch;
                        if told.qid == 0 {
                            // No IO comes by it.
                            self.places.remove(&ConnKey::Nvme(key));
                        }
                    }
                }
                self.nvme.conns[key].connect_done(&sqe, answer);
            }
            NvmeEvent::Admin { sqe, data } => {
                let queue = self.nvme.attached[key].queue;
                let answer = self.nvme.seat.with(|controllers| controllers.admin(queue, &sqe, &data, now));
                self.nvme.conns[key].admin_done(sqe.cid(), answer);
                self.nvme.carry_out();
            }
            NvmeEvent::Flush { req } => {
                self.counters.flushes_host.add(1);
                self.nvme.conns[key].flush_done(req, Ok(()));
            }
            NvmeEvent::Closed { reason } => self.closed_nvme(key, &reason, now),
            NvmeEvent::Read { req, offset, length } => {
                let purpose = Purpose::Read { offset, length, parts: Gathered::new(), corrupt: false };
                let length = length.into();
                self.begin_nvme(key, req, purpose, now, |volume| Request::Read { volume, offset, length });
            }
            NvmeEvent::WritePiece { req, offset, length, buf, crc } => {
                let lead = offset as usize % BLOCK_BYTES;
                let crc = crc.unwrap_or_else(|| block_crc(&buf[lead..lead + length as usize]));
                let payload = Mem::whole(buf);
                let write = |volume| Request::WritePiece { volume, offset, length, crc, payload };
                self.begin_nvme(key, req, Purpose::Write { offset, length }, now, write);
            }
            NvmeEvent::Zero { req, offset, length, trim } => {
                let (from, to) = zero_range(offset, length, trim);
                if from >= to {
                    return self.nvme.conns[key].zero_done(req, Ok(()));
                }
                let zero = |volume| Request::Zero { volume, offset: from, length: to - from };
                self.begin_nvme(key, req, Purpose::Zero { length: to - from }, now, zero);
            }
        }
    }

    fn begin_nvme(
        &mut self,
        conn: usize,
        req: ReqId,
        purpose: Purpose,
        now: Time,
        request: impl FnOnce(VolumeId) -> Request<Mem>,
    ) {
        let volume = self.nvme.conns[conn].namespace().map_or(VolumeId(0), |n| n.volume);
        let Attached { epoch, over, .. } = self.nvme.attached[conn];
        self.begin((ConnKey::Nvme(conn), req), purpose, (epoch, over), now, request(volume));
    }

    /// The host is gone: nobody waits for its requests any more.
    fn closed_nvme(&mut self, conn: usize, reason: &NvmeCloseReason, now: Time) {
        match reason {
            NvmeCloseReason::Violation(Violation::Broken(what)) => {
                self.counts.violations += 1;
                tracing::warn!(%what, "NVMe connection closed: the host broke the protocol");
            }
            reason => {
                self.counters.refused_timed_out.add(u64::from(*reason == NvmeCloseReason::TooSlow));
                tracing::debug!(%reason, "NVMe connection closed");
            }
        }
        self.nvme.tell_served(conn);
        let queue = self.nvme.attached[conn].queue;
        self.nvme.seat.with(|controllers| controllers.closed(queue));
        self.nvme.carry_out();
        self.abandon(ConnKey::Nvme(conn), now);
    }
}

fn status(failure: Failure, reading: bool) -> Status {
    match failure {
        Failure::Io(IoError::NoSpace) => Status::CAPACITY.dnr(),
        // As if the other host had reserved the namespace: no path of this one will do.
        Failure::Io(IoError::Fenced) => Status::RESERVATION_CONFLICT.dnr(),
        // Another target may serve it.
        Failure::Io(IoError::Stopped) | Failure::Refused(SubmitError::Stopped) => Status::PATH_INTERNAL,
        Failure::Io(IoError::Gone) | Failure::Refused(SubmitError::UnknownVolume) => {
            Status::INVALID_NAMESPACE.dnr()
        }
        Failure::Io(IoError::Corrupt) if reading => Status::UNRECOVERED_READ,
        // Its quorum is lost, and may come back.
        Failure::Io(IoError::TimedOut) => Status::NOT_READY,
        Failure::Io(IoError::Corrupt | IoError::Io) => Status::INTERNAL,
        Failure::WireCorrupt => Status::TRANSIENT_TRANSPORT,
        Failure::Refused(SubmitError::OutOfRange) => Status::LBA_RANGE.dnr(),
        Failure::Refused(SubmitError::Misaligned | SubmitError::Busy) => Status::INVALID_FIELD.dnr(),
    }
}
