//! One NVMe/TCP connection, which is one queue: drives a session over a stream, cuts commands
//! into pieces, gathers answers.
//!
//! Calling contract: hand [`NvmeConn::on_completion`] every completion whose token this
//! connection's [`Owner`] owns; answer every event of IO exactly once, also after
//! [`NvmeEvent::Closed`]; and call [`NvmeConn::pump`] while [`NvmeConn::needs_pump`] says so, best
//! once a turn after all completions and answers, for it sends everything as one operation.
//! Call [`NvmeConn::tick`] about once a second. Drop the connection when it is
//! [done](NvmeConn::is_done).
//!
//! IO is cut at multiples of 128 KiB of the volume, so a piece never leaves its chunk. Payload
//! goes from the socket straight into the piece's blocks, whether it came in the command's
//! capsule or was asked for; data of reads is sent from the blocks that hold it, in order.
//!
//! Invariants: bytes held for this host (payload received or being received, reads asked for,
//! answers not sent) stay within [`NvmeLimits::bytes_max`], or are those of a single piece; no
//! more data is asked for than would fit. When the budget is reached nothing more
//! is read from the socket. That cannot last for ever: a piece that waits for more data was
//! within the budget when that was asked for, and all else ends without the host's doing. A piece of a
//! write is handed out only when the digest over it was found intact.
//!
//! Deliberately absent: controllers (see `protocol::nvme_tcp::controller`), volumes, retries.

mod answers;
mod payload;
#[cfg(test)]
mod tests;

use crate::pieces::{Budget, Course, InOrder, ReqId, Request};
use crate::stream::{Happened, STAGING_BLOCKS, Stream};
use crate::token::Owner;
use payload::{Incoming, Place};
use protocol::nvme_tcp::command::ranges;
use protocol::nvme_tcp::controller::{Answer, Connected};
use protocol::nvme_tcp::logs::Served;
use protocol::nvme_tcp::wire::FEED_BYTES_MAX;
use protocol::nvme_tcp::{Event, IoCommand, IoRequest, Namespace, Session, Sqe, Status, Violation};
use protocol::types::{BLOCK_BYTES, Span, Time};
use reactor::{Arena, Buf, Completion, IoError, Reactor, Socket};
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};

/// Ranges of deallocations that a host has under way at most: one command may bring 256 of them, a queue as many commands.
const ZEROES_MAX: usize = 8;

const _: () = assert!(STAGING_BLOCKS * BLOCK_BYTES > FEED_BYTES_MAX);

/// How much one connection may have in flight. The number of commands is limited by the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NvmeLimits {
    /// Bytes of buffers, and of answers that are not sent.
    pub bytes_max: usize,
    /// Blocks of the arena that are left to others: no payload is taken while fewer are free.
    pub arena_reserve_blocks: usize,
    /// How long a host may take until its queue is connected.
    pub setup: Span,
    /// How long data that has begun to come may take to be complete.
    pub stall: Span,
    /// How long the last answers may take to be sent before the connection is cut.
    pub linger: Span,
}

impl Default for NvmeLimits {
    fn default() -> Self {
        Self {
            bytes_max: 16 << 20,
            arena_reserve_blocks: 0,
            setup: Span::ms(30_000),
            stall: Span::ms(30_000),
            linger: Span::ms(5_000),
        }
    }
}

/// What a host wants, or what became of it.
#[derive(Debug)]
pub enum NvmeEvent {
    /// Connect, with its data. Answer: [`NvmeConn::connect_done`], unless the connection is over.
    Connect {
        /// The command.
        sqe: Sqe,
        /// Its data.
        data: Vec<u8>,
    },
    /// A command of an admin queue. Answer: [`NvmeConn::admin_done`], unless the connection is over.
    Admin {
        /// The command.
        sqe: Sqe,
        /// Its data.
        data: Vec<u8>,
    },
    /// A piece to be read. Answer: [`NvmeConn::read_done`].
    Read {
        /// The request.
        req: ReqId,
        /// Bytes into the volume.
        offset: u64,
        /// At most 128 KiB, within one 128 KiB-aligned window.
        length: u32,
    },
    /// A piece of a write. Answer: [`NvmeConn::write_piece_done`].
    WritePiece {
        /// The request.
        req: ReqId,
        /// Bytes into the volume.
        offset: u64,
        /// At most 128 KiB, within one 128 KiB-aligned window.
        length: u32,
        /// The covering blocks; the data begins at `offset % 4096`. What lies around it is stale memory.
        buf: Buf,
        /// CRC-32C of the data, where its digest was just that.
        crc: Option<u32>,
    },
    /// A range to be zeroed. Answer: [`NvmeConn::zero_done`].
    Zero {
        /// The request; may have several such events.
        req: ReqId,
        /// Bytes into the volume.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The content need not become zeroes.
        trim: bool,
    },
    /// What was acknowledged is to be durable. Answer: [`NvmeConn::flush_done`].
    Flush {
        /// The request.
        req: ReqId,
    },
    /// The connection is over; comes once. No answer, but IO from before still needs its.
    Closed {
        /// Why.
        reason: NvmeCloseReason,
    },
}

/// Why a connection ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NvmeCloseReason {
    /// The host closed its side.
    #[error("host closed the connection")]
    Vanished,
    /// The host broke the protocol, or gave up.
    #[error("{0}")]
    Violation(#[from] Violation),
    /// The connection broke.
    #[error("connection failed: {0}")]
    Io(IoError),
    /// The host did not set up its queue, send its data or take the last answers in time.
    #[error("host was too slow")]
    TooSlow,
    /// [`NvmeConn::close`].
    #[error("closed by this side")]
    Asked,
}

#[derive(Debug)]
enum State {
    Open,
    /// What comes is thrown away; close when the host does, or when it takes too long.
    Parting(NvmeCloseReason),
    Closed,
}

/// What a request is.
#[derive(Debug)]
enum Kind {
    Io(IoCommand),
    /// The data of a command of an admin queue, or of Connect.
    Collect(Sqe),
}

struct Req {
    cid: u16,
    kind: Kind,
    course: Course,
    /// Bytes of data that were announced: in the capsule or asked for.
    granted: u32,
    /// Bytes of data that came.
    taken: u32,
    /// Transfers under way.
    transfers: u32,
    /// Waits in the list of those that may ask for data.
    listed: bool,
    error: Option<Status>,
    order: InOrder,
    /// What the host sent to be compared, by its offset within the request.
    compare: BTreeMap<u32, Buf>,
    /// Ranges to be deallocated that are not handed out: offset and length in bytes, the first one last.
    unzeroed: Vec<(u64, u64)>,
}

impl Req {
    fn is_out(&self) -> bool {
        use IoCommand::*;
        let none = matches!(self.kind, Kind::Io(Read | Verify | Flush | WriteZeroes { .. }));
        !none
    }
}

impl Request for Req {
    fn course(&mut self) -> &mut Course {
        &mut self.course
    }
}

/// Whether parsing can go on.
enum Step {
    Again,
    NeedsBytes,
    Blocked,
}

/// One connection; see the module.
pub struct NvmeConn {
    stream: Stream,
    session: Session,
    state: State,
    limits: NvmeLimits,
    requests: Slab<Req>,
    incoming: Option<Incoming>,
    /// What transfers have under way, by their place.
    places: Vec<Place>,
    /// Requests that may ask for more data, in order.
    ungranted: VecDeque<ReqId>,
    /// Reads with pieces that are not handed out, in order.
    unasked: VecDeque<ReqId>,
    /// Deallocations with ranges that are not handed out, in order.
    unzeroed: VecDeque<ReqId>,
    /// Ranges of deallocations that are handed out and not answered.
    zeroing: usize,
    budget: Budget,
    /// What data that was asked for and has no buffer yet will be charged with.
    granted_bytes: usize,
    /// Connect is not answered yet.
    connecting: bool,
    /// Nothing is read from the socket: the budget or the arena has no room.
    blocked: bool,
    dirty: bool,
    starved: bool,
    /// When the queue must be connected, or what is left to be sent must be over.
    deadline: Option<Time>,
    /// Since when some data has begun to come and is not complete.
    stalled_since: Option<Time>,
    received: u64,
    received_before: u64,
    served: Served,
}

impl NvmeConn {
    /// A host has connected. `None` when the arena has no room for a staging buffer: close the socket.
    pub fn new<R: Reactor>(
        reactor: &mut R,
        socket: Socket,
        owner: Owner,
        limits: NvmeLimits,
    ) -> Option<Self> {
        let staging = reactor.arena().alloc(STAGING_BLOCKS)?;
        Some(Self {
            stream: Stream::new(socket, owner, staging),
            session: Session::new(),
            state: State::Open,
            limits,
            requests: Slab::new(),
            incoming: None,
            places: Vec::new(),
            ungranted: VecDeque::new(),
            unasked: VecDeque::new(),
            unzeroed: VecDeque::new(),
            zeroing: 0,
            budget: Budget::new(limits.bytes_max, limits.arena_reserve_blocks),
            granted_bytes: 0,
            connecting: false,
            blocked: false,
            dirty: true,
            starved: false,
            deadline: Some(reactor.now() + limits.setup),
            stalled_since: None,
            received: 0,
            received_before: 0,
            served: Served::default(),
        })
    }
    /// Whose completions this connection takes.
    pub fn owner(&self) -> Owner {
        self.stream.owner()
    }
    /// Whether [`NvmeConn::pump`] may have something to do. A connection that waits for memory says so every time.
    pub fn needs_pump(&self) -> bool {
        self.dirty || self.starved
    }
    /// Whether it waits for the arena to have room.
    pub fn is_starved(&self) -> bool {
        self.starved
    }
    /// Whether it can be dropped: closed, and every event of IO answered.
    pub fn is_done(&self) -> bool {
        self.stream.is_closed() && self.requests.is_empty()
    }
    /// What was answered since this was asked last, if anything was.
    pub fn take_served(&mut self) -> Option<Served> {
        let served = std::mem::take(&mut self.served);
        (served != Served::default()).then_some(served)
    }
    /// Commands in flight.
    pub fn requests(&self) -> usize {
        self.session.open()
    }
    /// Bytes held for this host, the staging buffer left out.
    pub fn bytes(&self) -> usize {
        self.budget.writing + self.budget.reading + self.stream.tx_bytes()
    }
    /// The namespace in use, on an IO queue.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.session.namespace()
    }
    /// Whether headers, and data, are protected by digests.
    pub fn digests(&self) -> (bool, bool) {
        (self.session.digests().header, self.session.digests().data)
    }
    /// The namespace has changed, or is gone.
    pub fn set_namespace(&mut self, namespace: Option<Namespace>) {
        self.session.set_namespace(namespace);
    }
    /// Sets [`NvmeLimits::bytes_max`]; what is held beyond it is given back as it is answered.
    pub fn limit_bytes(&mut self, bytes_max: usize) {
        self.budget.bytes_max = bytes_max;
    }
    /// Cuts the connection.
    pub fn close<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NvmeEvent>) {
        self.shut(reactor, NvmeCloseReason::Asked, events);
    }
    /// Checks the clock: cuts a host that is too slow.
    pub fn tick<R: Reactor>(&mut self, reactor: &mut R, now: Time, events: &mut Vec<NvmeEvent>) {
        self.watch_data(now);
        let stalled = self.stalled_since.is_some_and(|since| now >= since + self.limits.stall);
        if stalled || self.deadline.is_some_and(|deadline| now >= deadline) {
            self.shut(reactor, NvmeCloseReason::TooSlow, events);
        }
    }
    /// Data that has begun to come holds a buffer, so it must go on coming.
    fn watch_data(&mut self, now: Time) {
        let holds = self.incoming.is_some() || self.places.iter().any(|place| place.partial.is_some());
        let moved = core::mem::replace(&mut self.received_before, self.received) != self.received;
        if !holds || self.blocked || moved {
            self.stalled_since = None;
        } else {
            self.stalled_since.get_or_insert(now);
        }
    }
    /// Takes the end of one of this connection's operations.
    pub fn on_completion<R: Reactor>(
        &mut self,
        reactor: &mut R,
        completion: Completion,
        events: &mut Vec<NvmeEvent>,
    ) {
        self.dirty = true;
        match self.stream.on_completion(completion) {
            Happened::Received => self.received += 1,
            Happened::Sent | Happened::Closed => {}
            Happened::Failed(error) => self.shut(reactor, NvmeCloseReason::Io(error), events),
            Happened::Eof => self.eof(reactor, events),
        }
    }
    /// The host has closed its side, and with it the queue. What it asked for and has not been sent on yet must not be: it
    /// may be on its way by another path already.
    fn eof<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NvmeEvent>) {
        let reason = match &self.state {
            State::Parting(reason) => reason.clone(),
            State::Open | State::Closed => NvmeCloseReason::Vanished,
        };
        self.shut(reactor, reason, events);
    }
    /// Does what can be done: looks at received bytes, hands out pieces, sends, receives.
    pub fn pump<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NvmeEvent>) {
        self.dirty = false;
        (self.starved, self.blocked) = (false, false);
        let had = events.len();
        while matches!(self.state, State::Open) {
            match self.step(reactor.arena(), events) {
                Ok(Step::Again) if matches!(events[had..], [.., NvmeEvent::Admin { .. }]) => {
                    // Its answer may be long, and counts before the next one is looked at.
                    self.dirty = true;
                    break;
                }
                Ok(Step::Again) => {}
                Ok(Step::NeedsBytes) => {
                    self.stream.receive(reactor);
                    break;
                }
                Ok(Step::Blocked) => {
                    self.blocked = true;
                    break;
                }
                Err(violation) => {
                    self.state = State::Parting(violation.into());
                    self.deadline = Some(reactor.now() + self.limits.linger);
                }
            }
        }
        self.ask_data();
        self.ask_reads(reactor.arena(), events);
        self.ask_zeroes(events);
        self.stream.flush(reactor);
        self.settle(reactor, events);
    }
    /// Closes when there is nothing left to wait for.
    fn settle<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NvmeEvent>) {
        match &self.state {
            State::Open | State::Closed => {}
            State::Parting(reason) => {
                if matches!(reason, NvmeCloseReason::Violation(Violation::Terminated(_))) {
                    return self.shut(reactor, reason.clone(), events);
                }
                // A close with bytes unread would take the termination with it. The host is to
                // close when it has read that; until then what it sends is thrown away.
                let staged = self.stream.staged().len();
                self.stream.consume(staged);
                if !self.stream.is_expecting() {
                    self.stream.receive(reactor);
                }
            }
        }
    }
    fn shut<R: Reactor>(&mut self, reactor: &mut R, reason: NvmeCloseReason, events: &mut Vec<NvmeEvent>) {
        if matches!(self.state, State::Closed) {
            return;
        }
        self.state = State::Closed;
        self.deadline = None;
        self.stalled_since = None;
        self.starved = false;
        self.stream.close(reactor);
        self.incoming = None;
        self.places.clear();
        self.ungranted.clear();
        self.unasked.clear();
        self.unzeroed.clear();
        self.requests.retain(|_, req| {
            req.order.clear();
            req.compare.clear();
            req.unzeroed.clear();
            req.course.outstanding > 0
        });
        self.budget.clear();
        self.granted_bytes = 0;
        events.push(NvmeEvent::Closed { reason });
    }
    fn step(&mut self, arena: &Arena, events: &mut Vec<NvmeEvent>) -> Result<Step, Violation> {
        if self.incoming.as_ref().is_some_and(|incoming| !incoming.is_over()) {
            return Ok(self.payload(arena));
        }
        if self.connecting || (self.bytes() >= self.budget.bytes_max && !self.holds_parts_only()) {
            return Ok(Step::Blocked);
        }
        let (staged, text) = self.stream.staged_and_text();
        let progress = self.session.feed(staged, text)?;
        self.stream.consume(progress.used);
        match progress.event {
            Some(Event::Command { sqe, io, out_bytes, inline }) => {
                self.begin(&sqe, io, out_bytes, inline, events);
            }
            Some(Event::Data { place, tag, offset, length, last }) => {
                self.begin_data(place, ReqId(tag), offset, length, last);
            }
            Some(Event::PayloadEnd { intact }) => self.end_payload(intact, events),
            None if progress.used > 0 => {}
            None => return Ok(Step::NeedsBytes),
        }
        Ok(Step::Again)
    }
    fn begin(
        &mut self,
        sqe: &Sqe,
        io: Option<IoRequest>,
        out_bytes: u32,
        inline: bool,
        events: &mut Vec<NvmeEvent>,
    ) {
        let (kind, offset, length) = match io {
            Some(io) => (Kind::Io(io.command), io.offset, io.length),
            None if out_bytes == 0 => return events.push(NvmeEvent::Admin { sqe: *sqe, data: Vec::new() }),
            None => (Kind::Collect(*sqe), 0, out_bytes),
        };
        let req = Req {
            cid: sqe.cid(),
            kind,
            course: Course::new(offset, length),
            granted: if inline { length } else { 0 },
            taken: 0,
            transfers: 0,
            listed: false,
            error: None,
            order: InOrder::default(),
            compare: BTreeMap::new(),
            unzeroed: Vec::new(),
        };
        let id = ReqId(self.requests.insert(req) as u32);
        if inline {
            self.incoming = Some(Incoming::inline(id, length, self.session.digests().data));
            return;
        }
        let req = &mut self.requests[id.key()];
        match req.kind {
            Kind::Io(IoCommand::Read | IoCommand::Verify) => self.unasked.push_back(id),
            Kind::Io(IoCommand::Flush) => {
                req.course.outstanding = 1;
                events.push(NvmeEvent::Flush { req: id });
            }
            Kind::Io(IoCommand::WriteZeroes { .. }) => {
                req.course.outstanding = 1;
                events.push(NvmeEvent::Zero { req: id, offset, length: length.into(), trim: false });
            }
            Kind::Io(_) if length == 0 => self.finish(id),
            Kind::Io(_) | Kind::Collect(_) => self.list(id),
        }
    }
    /// Whether so many bytes more may be held; a single piece always may.
    fn has_budget(&self, bytes: usize) -> bool {
        self.bytes() + bytes <= self.budget.bytes_max || self.holds_parts_only()
    }
    /// Whether nothing that is held will be given back before more data has come.
    fn holds_parts_only(&self) -> bool {
        self.stream.tx_bytes() == 0 && self.requests.iter().all(|(_, req)| req.course.outstanding == 0)
    }
    /// All data of a command that is no write is here.
    fn collected(&mut self, id: ReqId, buf: &Buf, events: &mut Vec<NvmeEvent>) {
        let req = &mut self.requests[id.key()];
        let data = &buf[..req.course.length as usize];
        match &req.kind {
            Kind::Collect(sqe) => {
                let (sqe, data) = (*sqe, data.to_vec());
                self.requests.remove(id.key());
                if self.session.is_connected() {
                    events.push(NvmeEvent::Admin { sqe, data });
                } else {
                    self.session.connecting();
                    self.connecting = true;
                    events.push(NvmeEvent::Connect { sqe, data });
                }
            }
            Kind::Io(IoCommand::Deallocate { ranges: count }) => {
                let namespace = self.session.namespace();
                let list =
                    namespace.map_or(Err(Status::INVALID_NAMESPACE.dnr()), |n| ranges(data, *count, n));
                match list {
                    Ok(mut list) => {
                        list.reverse();
                        req.unzeroed = list;
                        self.unzeroed.push_back(id);
                    }
                    Err(status) => req.error = Some(status),
                }
                self.finish_if_over(id);
            }
            _ => self.finish_if_over(id),
        }
    }
    /// Answers [`NvmeEvent::Connect`]: accepted, or a status and its result. Ignored when the connection is over.
    pub fn connect_done(&mut self, sqe: &Sqe, answer: Result<Connected, (Status, u32)>) {
        self.dirty = true;
        self.connecting = false;
        if !matches!(self.state, State::Open) {
            return;
        }
        let text = self.stream.text();
        match answer {
            Ok(told) => {
                self.deadline = None;
                self.session.connected(sqe, told.admin, told.namespace, told.cntlid, text);
            }
            Err((status, result)) => self.session.respond(sqe.cid(), status, result.into(), text),
        }
    }
    /// Answers [`NvmeEvent::Admin`], now or whenever. Ignored when the connection is over.
    pub fn admin_done(&mut self, cid: u16, answer: Answer) {
        self.dirty = true;
        let Answer::Done { status, result, data } = answer else { return };
        if !matches!(self.state, State::Open) {
            return;
        }
        if !data.is_empty() {
            let text = self.stream.text();
            // A result cannot be told by the data's flag, and 0 is what the flag means.
            let plain = status.is_ok() && result == 0;
            let over = self.session.begin_data(cid, 0, data.len() as u32, true, plain, text);
            text.extend_from_slice(&data);
            self.session.end_data(crc32c::crc32c(&data), text);
            if over {
                return;
            }
        }
        self.session.respond(cid, status, result, self.stream.text());
    }
}
