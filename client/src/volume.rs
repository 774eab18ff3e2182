//! IO on volumes: requests go in, messages for copyset leaders come out, until each is answered.
//!
//! Sans-IO: no socket, no clock (`now` is passed in), no randomness, no walk in hash order; so a
//! simulator replays it from a seed. It is generic over the payload handle `P` (an arena buffer
//! in production) and never looks inside one. There is no cache of data and no ordering between
//! requests: like a disk, it promises only that a write which was answered is seen by every read
//! submitted later, through any target.
//!
//! # The rules, and why
//!
//! 1. **Term fence.** Every request names the term of the leader that it is meant for; a replica
//!    that does not lead in exactly that term refuses it. So a message that was delayed anywhere
//!    dies as soon as another term begins.
//! 2. **A write whose fate is unknown is sent again only** (a) to a leader of a higher term (what
//!    the old term left behind is in that leader's log already, before the new write, or never will
//!    be), or (b) on a *new link* to the same shard in the same term (that shard drops the old link,
//!    and what it had not yet proposed from it, before it takes anything from the new one). Hence no
//!    copy of a write can take effect after the write was answered. See `Attempt::may_follow`.
//! 3. **Only the latest attempt's answer counts.** A `Done` from the old leader while a second copy
//!    is on its way to the new one would free the host to overwrite the block, and the second copy
//!    might then win.
//! 4. **Silence is not failure.** When a leader is silent for `who_leads_after`, the *other*
//!    replicas are asked who leads; nothing is sent again unless their answer satisfies rule 2.
//! 5. **Terms only rise.** A leader is believed only if its term is at least that of the last
//!    believed one; a replica that knows a term but no leader changes nothing but our hurry.
//! 6. **Reads are sent again freely**: they change nothing, and each attempt is itself current.
//! 7. **A refusal is not done** (`Busy`, `UnknownCopyset`, `NotLeader` of no higher term): the
//!    request may go anywhere next, after a back-off. `NotLeader` of a *higher* term leaves the
//!    fate open, since a deposed leader may have logged the write: rule 2 applies.
//! 8. **A fence is final.** A request names the epoch under which its host is attached; `Fenced` says that
//!    another host has taken the volume over, and ends it at once. A write that was sent before may have
//!    taken effect, but only before the fence.
//!
//! Known limit: a write that was sent twice may take effect twice *before* it is answered. Another
//! write of the same block that runs at the same time can land between, and a reader can then see
//! first, second, first. Hosts do not rely on the order of writes that overlap in time.
//!
//! # Calling contract
//!
//! After each call of `set_map`, `submit`, `reply`, `link_up`, `link_down`, `tick`, `abort`, `stop`:
//! drain [`VolumeIo::poll`], then sleep no longer than [`VolumeIo::next_timeout`], then `tick`.
//! `Action::Send` to a shard follows `link_up` for it (the local shard `me` needs none), and belongs
//! to the link that was up when it was polled: if the link is lost first, drop the message and call
//! `link_down`. Calls happen with a `now` that never falls.

mod cut;
mod engine;
mod route;
#[cfg(test)]
mod tests;

use crate::volume::cut::{Cursor, Extent};
use crate::volume::route::{Attempt, Link, Route};
use protocol::map::{ClusterMap, VolumeEntry};
use protocol::peer::{Crcs, IoOp, IoOutcome, IoReply, IoRequest};
use protocol::types::{
    CopysetId, ENTRY_BYTES_MAX, SEGMENT_BYTES, SessionEpoch, ShardAddr, Span, Term, Time, VolumeId,
};
use slab::Slab;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub use cut::STATUS_CHUNKS_MAX;

/// The smallest unit of IO that a host may use, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Most pieces of one request that are cut and not yet answered: 32, or 4 MiB of a read.
const PIECES_OPEN_MAX: u32 = 32;

/// The data of a reply: its blocks in order, in as many handles as the sender happened to have.
pub type Payload<P> = SmallVec<[P; 2]>;

/// How a [`VolumeIo`] behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// The shard this runs in: needs no link, and is asked first. `None` outside of a target.
    pub me: Option<ShardAddr>,
    /// How long a request may take before it fails with [`IoError::TimedOut`]. `None`: for ever,
    /// so that a lost quorum is a pause and not an error.
    pub io_timeout: Option<Span>,
    /// How long a leader, or a replica asked who leads, may be silent before others are asked.
    pub who_leads_after: Span,
    /// The first back-off after a refusal; doubles up to `backoff_max`.
    pub backoff_min: Span,
    /// The longest back-off.
    pub backoff_max: Span,
    /// Most requests at once; more are refused with [`SubmitError::Busy`].
    pub requests_max: usize,
    /// Most pieces sent and unanswered. One copyset takes at most a quarter, so that one without
    /// a leader does not stop the others.
    pub in_flight_max: usize,
    /// Most bytes of reads sent and unanswered: what the replies may take of the arena. One
    /// copyset takes at most a quarter.
    pub read_bytes_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            me: None,
            io_timeout: None,
            who_leads_after: Span::ms(500),
            backoff_min: Span::ms(1),
            backoff_max: Span::ms(100),
            requests_max: 4096,
            in_flight_max: 1024,
            read_bytes_max: 16 << 20,
        }
    }
}

/// What is asked of a volume. Offsets and lengths are bytes, multiples of [`SECTOR_BYTES`].
#[derive(Clone, Debug)]
pub enum Request<P> {
    /// Read; answered by [`Action::ReadPiece`]s in any order, then [`Action::Done`].
    Read {
        /// Which volume.
        volume: VolumeId,
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Write one piece that crosses no multiple of [`ENTRY_BYTES_MAX`].
    WritePiece {
        /// Which volume.
        volume: VolumeId,
        /// From where.
        offset: u64,
        /// How much.
        length: u32,
        /// CRC-32C of the payload.
        crc: u32,
        /// The data; kept until the write is answered.
        payload: P,
    },
    /// Make a range read as zeroes.
    Zero {
        /// Which volume.
        volume: VolumeId,
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Which parts hold data? Answered by [`Action::StatusDone`] for the first
    /// [`STATUS_CHUNKS_MAX`] chunks of the range at most; ask again for the rest.
    Status {
        /// Which volume.
        volume: VolumeId,
        /// From where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Raise the volume's fence, in each of its copysets, to the epoch that is asked under.
    Fence {
        /// Which volume.
        volume: VolumeId,
    },
}

/// Why a request was not taken. Nothing was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// The map has no such volume, or it was deleted.
    #[error("no such volume")]
    UnknownVolume,
    /// Past the volume's end, or of length 0.
    #[error("the range does not lie within the volume")]
    OutOfRange,
    /// Not multiples of 512 bytes, or a write across a multiple of 128 KiB.
    #[error("the range is not aligned to 512 bytes, or a write crosses a 128 KiB boundary")]
    Misaligned,
    /// [`Config::requests_max`] are open; submit again after one is done.
    #[error("too many requests at once")]
    Busy,
    /// [`VolumeIo::stop`] was called.
    #[error("stopping")]
    Stopped,
}

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IoError {
    /// No room on some replica, or the MDS refused the segment.
    #[error("no space")]
    NoSpace,
    /// No copy of the data passes its checksum.
    #[error("no copy of the data passes its checksum")]
    Corrupt,
    /// A replica called the request invalid or answered with nonsense: a bug or a broken peer.
    #[error("a replica answered out of protocol")]
    Io,
    /// [`Config::io_timeout`] passed. A write may still take effect.
    #[error("timed out")]
    TimedOut,
    /// The volume was deleted meanwhile.
    #[error("the volume was deleted")]
    Gone,
    /// [`VolumeIo::stop`] was called. A write may still take effect.
    #[error("stopping")]
    Stopped,
    /// Another host has taken the volume over: nothing more is done under this epoch.
    #[error("another host has taken the volume over")]
    Fenced,
}

/// What the caller is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<P> {
    /// Send a message to a shard.
    Send {
        /// Where.
        to: ShardAddr,
        /// What.
        request: IoRequest,
        /// The data of a write.
        payload: Option<P>,
    },
    /// A part of a read. Parts come in any order and cover the asked range, rounded out to blocks.
    ReadPiece {
        /// The read.
        id: u64,
        /// Byte offset in the volume of the first block, a multiple of [`protocol::types::BLOCK_BYTES`].
        offset: u64,
        /// Bytes, a multiple of [`protocol::types::BLOCK_BYTES`], at most [`ENTRY_BYTES_MAX`].
        length: u32,
        /// Bit n: block n is in the payload; the others are zeroes.
        present: u32,
        /// CRC-32C of each block that is present.
        crcs: Crcs,
        /// The present blocks, in order.
        payload: Payload<P>,
    },
    /// A read, write or zero has ended (a status too, if it failed).
    Done {
        /// Which.
        id: u64,
        /// How.
        result: Result<(), IoError>,
    },
    /// A status has ended.
    StatusDone {
        /// Which.
        id: u64,
        /// Runs as (bytes, holds data), in order from the asked offset; neighbours differ.
        runs: Vec<(u64, bool)>,
    },
    /// The map seems stale: ask the control plane for a newer one.
    NeedMap,
    /// The first write of a segment since start: report it to the MDS. The write does not wait.
    /// Repeated while a refused segment is written, so that the MDS may change its mind.
    FirstWrite {
        /// The volume.
        volume: VolumeId,
        /// Byte offset / [`SEGMENT_BYTES`].
        segment: u32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    Zero,
    Status,
    Fence,
}

/// A request under way.
struct Job<P> {
    id: u64,
    volume: VolumeId,
    /// Under which it is asked.
    epoch: SessionEpoch,
    kind: Kind,
    /// Counts submissions, to tell this job from a later one in the same slot.
    serial: u64,
    /// The asked range: first byte and one past the last.
    asked: (u64, u64),
    /// What is still to be cut.
    cursor: Cursor,
    /// The CRC and data of a write, until its one piece is cut.
    write: Option<(u32, P)>,
    /// Pieces cut and not answered.
    open: u32,
    error: Option<IoError>,
    /// Answers of a status by volume offset.
    runs: BTreeMap<u64, Vec<(u64, bool)>>,
}

/// One message's worth of a job.
struct Piece<P> {
    job: usize,
    /// Counts pieces: the order of waiting.
    serial: u64,
    copyset: CopysetId,
    epoch: SessionEpoch,
    extent: Extent,
    op: IoOp,
    payload: Option<P>,
    /// The attempt whose answer is awaited; `None` while it waits in its route.
    sent: Option<Attempt>,
    /// The last attempt whose fate is unknown (writes only): rule 2.
    doubt: Option<Attempt>,
}

impl<P> Piece<P> {
    /// Bytes of arena that the answer may take.
    fn read_bytes(&self) -> usize {
        if let IoOp::Read { range, .. } = self.op { range.bytes() } else { 0 }
    }
    /// Whether a second execution would be felt.
    fn changes_data(&self) -> bool {
        matches!(self.op, IoOp::Write { .. } | IoOp::Zero { .. })
    }
}

/// What the MDS is known to think of a segment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Segment {
    Reported,
    /// Writes fail; reported again when this time has passed and it is written.
    Refused {
        ask_again: Option<Time>,
    },
}

/// How long a refused segment's writes fail before the MDS is asked again.
const REFUSED_ASK_AFTER: Span = Span::ms(1000);

/// Bits of a wire id that count attempts; the slot of the piece is above them. 2^44 attempts
/// at a million a second are 200 days, and a clash would need an answer that old.
const SERIAL_BITS: u32 = 44;
/// The slot that marks a `WhoLeads`.
const PROBE_SLOT: u64 = (1 << (64 - SERIAL_BITS)) - 1;

/// Volume IO; see the module's description.
pub struct VolumeIo<P> {
    config: Config,
    map: Arc<ClusterMap>,
    jobs: Slab<Job<P>>,
    pieces: Slab<Piece<P>>,
    routes: BTreeMap<CopysetId, Route>,
    links: BTreeMap<ShardAddr, Link>,
    /// Routes that may be able to send, each at most once, served in turn.
    ready: VecDeque<CopysetId>,
    timers: BTreeSet<(Time, CopysetId)>,
    /// Deadlines in the order of submission, which is their own order.
    deadlines: VecDeque<(Time, usize, u64)>,
    segments: BTreeMap<(VolumeId, u32), Segment>,
    actions: VecDeque<Action<P>>,
    in_flight: usize,
    read_bytes: usize,
    /// The next number for a job, a piece or an attempt.
    serial: u64,
    /// `NeedMap` is not said again before this time.
    need_map_after: Time,
    stopped: bool,
}

impl<P: Clone> VolumeIo<P> {
    /// Knows no map yet: every submission is refused until [`VolumeIo::set_map`].
    pub fn new(config: Config) -> Self {
        assert!(config.requests_max > 0 && config.in_flight_max > 0 && config.read_bytes_max > 0);
        assert!((config.in_flight_max as u64) < PROBE_SLOT, "slots fit a wire id");
        assert!(config.backoff_min > Span(0) && config.who_leads_after > Span(0), "no busy loop");
        Self {
            config,
            map: Arc::default(),
            jobs: Slab::new(),
            pieces: Slab::new(),
            routes: BTreeMap::new(),
            links: BTreeMap::new(),
            ready: VecDeque::new(),
            timers: BTreeSet::new(),
            deadlines: VecDeque::new(),
            segments: BTreeMap::new(),
            actions: VecDeque::new(),
            in_flight: 0,
            read_bytes: 0,
            serial: 0,
            need_map_after: Time(0),
            stopped: false,
        }
    }

    /// Requests open, pieces in flight and bytes of reads in flight, each with its limit.
    pub fn load(&self) -> [(usize, usize); 3] {
        let Config { requests_max, in_flight_max, read_bytes_max, .. } = self.config;
        [
            (self.jobs.len(), requests_max),
            (self.in_flight, in_flight_max),
            // A lone piece always goes.
            (self.read_bytes, read_bytes_max.max(ENTRY_BYTES_MAX)),
        ]
    }

    /// Takes a newer map; an older one is ignored. Requests of volumes that are gone fail.
    pub fn set_map(&mut self, map: Arc<ClusterMap>, now: Time) {
        if map.generation < self.map.generation {
            return;
        }
        self.map = map;
        for (id, route) in &mut self.routes {
            let members = self.map.copysets.get(id).map_or(&[][..], |c| &c.members);
            route.set_members(*id, members, self.config.me);
        }
        let gone: Vec<usize> =
            self.jobs.iter().filter(|(_, job)| self.volume(job.volume).is_none()).map(|(at, _)| at).collect();
        for at in gone {
            self.finish(at, Err(IoError::Gone));
        }
        let map = self.map.clone();
        self.segments.retain(|(volume, _), _| map.volumes.get(volume).is_some_and(|v| !v.deleted));
        self.wake_all();
        self.dispatch(now);
    }

    /// Begins a request of a host that is attached to the volume under `epoch`. `id` is the caller's and comes
    /// back in its actions; no two open requests share one.
    pub fn submit(
        &mut self,
        id: u64,
        epoch: SessionEpoch,
        request: Request<P>,
        now: Time,
    ) -> Result<(), SubmitError> {
        debug_assert!(self.jobs.iter().all(|(_, job)| job.id != id), "request {id} is open already");
        let job = self.admit(id, epoch, request)?;
        if job.kind == Kind::Write && !self.segment_open(job.volume, job.asked.0, now) {
            self.actions.push_back(Action::Done { id, result: Err(IoError::NoSpace) });
            return Ok(());
        }
        let serial = job.serial;
        let at = self.jobs.insert(job);
        if let Some(timeout) = self.config.io_timeout {
            self.deadlines.push_back((now + timeout, at, serial));
        }
        self.cut(at);
        self.dispatch(now);
        Ok(())
    }

    /// An answer arrived from a shard, with the data of a read.
    pub fn reply(&mut self, from: ShardAddr, reply: IoReply, payload: Payload<P>, now: Time) {
        if let IoOutcome::NotLeader { leader, term } = reply.outcome {
            self.learn(reply.copyset, from, leader, term);
        }
        if reply.id >> SERIAL_BITS == PROBE_SLOT {
            self.probe_answered(from, &reply, now);
        } else if let Some(at) = self.awaited(from, &reply) {
            self.answered(at, from, reply, payload, now);
        }
        self.dispatch(now);
    }

    /// A link to a shard is up: a new one, on which nothing of an earlier one can arrive any more.
    pub fn link_up(&mut self, to: ShardAddr, now: Time) {
        if self.links.get(&to).is_some_and(|link| link.up) {
            self.link_down(to, now);
        }
        let link = self.links.entry(to).or_default();
        link.up = true;
        link.epoch += 1;
        self.wake_all();
        self.dispatch(now);
    }

    /// The link to a shard is lost, and whatever was on it either way.
    pub fn link_down(&mut self, to: ShardAddr, now: Time) {
        if let Some(link) = self.links.get_mut(&to) {
            link.up = false;
        }
        self.pull_back(|attempt, _| attempt.to == to);
        for route in self.routes.values_mut() {
            if route.probe.is_some_and(|probe| probe.to == to) {
                route.probe = None;
            }
        }
        self.wake_all();
        self.dispatch(now);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Time) {
        while let Some(&(at, copyset)) = self.timers.first().filter(|(at, _)| *at <= now) {
            self.timers.remove(&(at, copyset));
            self.route_due(copyset, now);
        }
        while let Some(&(_, at, serial)) = self.deadlines.front().filter(|(at, ..)| *at <= now) {
            self.deadlines.pop_front();
            if self.jobs.get(at).is_some_and(|job| job.serial == serial) {
                self.finish(at, Err(IoError::TimedOut));
            }
        }
        self.dispatch(now);
    }

    /// When to call [`VolumeIo::tick`] at the latest; `None` when nothing waits for time.
    pub fn next_timeout(&self) -> Option<Time> {
        let timer = self.timers.first().map(|(at, _)| *at);
        let deadline = self.deadlines.front().map(|(at, ..)| *at);
        [timer, deadline].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Action<P>> {
        self.actions.pop_front()
    }

    /// Forgets a request, whose client is gone: no more of its actions come. A write that was sent
    /// may still take effect.
    pub fn abort(&mut self, id: u64, now: Time) {
        self.actions.retain(|action| !action.belongs_to(id));
        let found = self.jobs.iter().find(|(_, job)| job.id == id).map(|(at, _)| at);
        if let Some(at) = found {
            self.drop_pieces(at);
            self.jobs.remove(at);
            self.dispatch(now);
        }
    }

    /// Fails every open request with [`IoError::Stopped`] and refuses new ones.
    pub fn stop(&mut self) {
        self.stopped = true;
        let open: Vec<usize> = self.jobs.iter().map(|(at, _)| at).collect();
        for at in open {
            self.finish(at, Err(IoError::Stopped));
        }
    }

    /// The MDS refused a segment: writes there fail with [`IoError::NoSpace`] from now on.
    pub fn segment_refused(&mut self, volume: VolumeId, segment: u32) {
        self.segments.insert((volume, segment), Segment::Refused { ask_again: None });
    }

    /// The MDS granted a segment (also one that it refused before).
    pub fn segment_granted(&mut self, volume: VolumeId, segment: u32) {
        self.segments.insert((volume, segment), Segment::Reported);
    }

    /// Requests that are not done.
    pub fn open_requests(&self) -> usize {
        self.jobs.len()
    }

    /// The believed leader of a copyset and its term, for status pages.
    pub fn leader(&self, copyset: CopysetId) -> Option<(ShardAddr, Term)> {
        let route = self.routes.get(&copyset)?;
        route.leader.map(|leader| (leader, route.term))
    }

    fn volume(&self, id: VolumeId) -> Option<&VolumeEntry> {
        self.map.volumes.get(&id).filter(|v| !v.deleted && !v.copysets.is_empty())
    }

    /// Checks a request and makes its job.
    fn admit(&mut self, id: u64, epoch: SessionEpoch, request: Request<P>) -> Result<Job<P>, SubmitError> {
        if self.stopped {
            return Err(SubmitError::Stopped);
        }
        if self.jobs.len() >= self.config.requests_max {
            return Err(SubmitError::Busy);
        }
        let (kind, volume, offset, length, write) = match request {
            Request::Read { volume, offset, length } => (Kind::Read, volume, offset, length, None),
            Request::Zero { volume, offset, length } => (Kind::Zero, volume, offset, length, None),
            Request::Status { volume, offset, length } => (Kind::Status, volume, offset, length, None),
            Request::WritePiece { volume, offset, length, crc, payload } => {
                (Kind::Write, volume, offset, length.into(), Some((crc, payload)))
            }
            // One piece a copyset; where does not matter.
            Request::Fence { volume } => {
                let bytes = self.volume(volume).ok_or(SubmitError::UnknownVolume)?.bytes;
                (Kind::Fence, volume, 0, bytes, None)
            }
        };
        let bytes = self.volume(volume).ok_or(SubmitError::UnknownVolume)?.bytes;
        if length == 0 || offset.checked_add(length).is_none_or(|end| end > bytes) {
            return Err(SubmitError::OutOfRange);
        }
        let entry = ENTRY_BYTES_MAX as u64;
        let crosses = kind == Kind::Write && offset / entry != (offset + length - 1) / entry;
        if !offset.is_multiple_of(SECTOR_BYTES) || !length.is_multiple_of(SECTOR_BYTES) || crosses {
            return Err(SubmitError::Misaligned);
        }
        let cursor = match kind {
            Kind::Read => Cursor::read(offset, length),
            Kind::Write => Cursor::write(offset, length),
            Kind::Zero => Cursor::zero(offset, length),
            Kind::Status => Cursor::status(offset, length),
            Kind::Fence => Cursor::copysets(self.volume(volume).map_or(0, |v| v.copysets.len())),
        };
        let asked = (offset, (offset + length).min(cursor.end()));
        let serial = self.next_serial();
        let (open, error, runs) = (0, None, BTreeMap::new());
        Ok(Job { id, volume, epoch, kind, serial, asked, cursor, write, open, error, runs })
    }

    /// Whether a segment may be written; reports its first write.
    fn segment_open(&mut self, volume: VolumeId, offset: u64, now: Time) -> bool {
        let segment = (offset / SEGMENT_BYTES) as u32;
        match self.segments.get_mut(&(volume, segment)) {
            Some(Segment::Reported) => return true,
            Some(Segment::Refused { ask_again }) => {
                let due = ask_again.is_some_and(|at| at <= now);
                if due || ask_again.is_none() {
                    *ask_again = Some(now + REFUSED_ASK_AFTER);
                }
                if due {
                    self.actions.push_back(Action::FirstWrite { volume, segment });
                }
                return false;
            }
            None => {}
        }
        self.segments.insert((volume, segment), Segment::Reported);
        self.actions.push_back(Action::FirstWrite { volume, segment });
        true
    }
}

impl<P> Action<P> {
    fn belongs_to(&self, request: u64) -> bool {
        match self {
            Action::ReadPiece { id, .. } | Action::Done { id, .. } | Action::StatusDone { id, .. } => {
                *id == request
            }
            Action::Send { .. } | Action::NeedMap | Action::FirstWrite { .. } => false,
        }
    }
}
