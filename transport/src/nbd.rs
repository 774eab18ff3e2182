//! One NBD client: drives a session over a stream, cuts requests into pieces, gathers answers.
//!
//! Calling contract: hand [`NbdConn::on_completion`] every completion whose token this
//! connection's [`Owner`] owns; answer every event that asks for it exactly once, also after
//! [`NbdEvent::Closed`]; and call [`NbdConn::pump`] while [`NbdConn::needs_pump`] says so, best
//! once a turn after all completions and answers, for it sends everything as one operation.
//! Call [`NbdConn::tick`] about once a second. Drop the connection when it is
//! [done](NbdConn::is_done).
//!
//! Reads and writes are cut at multiples of 128 KiB of the export, so a piece never leaves its
//! chunk. Pieces of a write come as they arrive from the socket; pieces of a read as the
//! budget allows.
//!
//! Invariants: bytes held for this client (payload under way, reads asked for and answers not
//! yet sent) stay within [`NbdLimits::bytes_max`], or are those of a single piece; requests in
//! flight within [`NbdLimits::requests_max`]; when either is reached nothing more is read from
//! the socket. A reply is encoded once all events of its request are answered.
//!
//! Deliberately absent: volumes, retries, time-outs of requests.

mod answers;
mod reads;
#[cfg(test)]
mod tests;

use crate::pieces::{Budget, Course, ReqId, blocks_of, lead, piece_charge};
use crate::stream::{Fill, Happened, STAGING_BLOCKS, Stream};
use crate::token::Owner;
use protocol::nbd::wire::FEED_BYTES_MAX;
use protocol::nbd::{Command, Event, ExportInfo, NbdError, Request, Session, Violation};
use protocol::types::{BLOCK_BYTES, Span, Time};
use reactor::{Arena, Buf, BufMut, Completion, IoError, Reactor, Socket};
use reads::{Reading, Waiting, waiting_text};
use slab::Slab;
use std::collections::VecDeque;

const _: () = assert!(STAGING_BLOCKS * BLOCK_BYTES > FEED_BYTES_MAX);

/// How much one client may have in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NbdLimits {
    /// Requests being worked on.
    pub requests_max: usize,
    /// Bytes of buffers, and of replies that are not sent.
    pub bytes_max: usize,
    /// Blocks of the arena that are left to others: no payload is taken while fewer are free.
    pub arena_reserve_blocks: usize,
    /// How long a client may haggle before it is attached.
    pub negotiation: Span,
    /// How long the last replies may take to be sent before the connection is cut.
    pub linger: Span,
}

impl Default for NbdLimits {
    fn default() -> Self {
        Self {
            requests_max: 256,
            bytes_max: 16 << 20,
            arena_reserve_blocks: 0,
            negotiation: Span::ms(30_000),
            linger: Span::ms(5_000),
        }
    }
}

/// What a client wants, or what became of it.
#[derive(Debug)]
pub enum NbdEvent {
    /// What is offered under this name (empty: the default)? Answer: [`NbdConn::answer_export`].
    OpenExport {
        /// As asked.
        name: String,
    },
    /// What is there? Answer: [`NbdConn::answer_list`].
    ListExports,
    /// The client uses this export from now on. No answer.
    Attached(ExportInfo),
    /// A piece of a read. Answer: [`NbdConn::read_done`].
    Read {
        /// The request.
        req: ReqId,
        /// Bytes into the export.
        offset: u64,
        /// At most 128 KiB, within one 128 KiB-aligned window.
        length: u32,
    },
    /// A piece of a write. Answer: [`NbdConn::write_piece_done`].
    WritePiece {
        /// The request.
        req: ReqId,
        /// Bytes into the export.
        offset: u64,
        /// At most 128 KiB, within one 128 KiB-aligned window.
        length: u32,
        /// The covering blocks; the data begins at `offset % 4096`. What lies around it is stale memory.
        buf: Buf,
        /// To be answered only when durable.
        fua: bool,
    },
    /// A trim or a write-zeroes, whole. Answer: [`NbdConn::zero_done`].
    Zero {
        /// The request.
        req: ReqId,
        /// Bytes into the export.
        offset: u64,
        /// Up to 4 GiB - 1.
        length: u32,
        /// A trim: the content need not become zeroes.
        trim: bool,
        /// The space is to stay allocated.
        no_hole: bool,
        /// To be answered only when durable.
        fua: bool,
    },
    /// Which parts hold data? Answer: [`NbdConn::status_done`].
    Status {
        /// The request.
        req: ReqId,
        /// Bytes into the export.
        offset: u64,
        /// Up to 4 GiB - 1.
        length: u32,
        /// Only the first extent is wanted.
        one: bool,
    },
    /// What was acknowledged is to be durable. Answer: [`NbdConn::flush_done`].
    Flush {
        /// The request.
        req: ReqId,
    },
    /// The connection is over; comes once. No answer, but events from before still need theirs.
    Closed {
        /// Why.
        reason: NbdCloseReason,
    },
}

/// Why a connection ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NbdCloseReason {
    /// The client said so.
    #[error("client disconnected")]
    Disconnect,
    /// The client closed its side without a word.
    #[error("client vanished")]
    Vanished,
    /// The client broke the protocol.
    #[error("protocol violation: {0}")]
    Violation(#[from] Violation),
    /// The connection broke.
    #[error("connection failed: {0}")]
    Io(IoError),
    /// A read failed after its reply had begun, which can only be told by closing.
    #[error("a read failed after its reply had begun")]
    ReadFailed,
    /// The client did not finish its negotiation, or did not take the last replies.
    #[error("client was too slow")]
    TooSlow,
    /// [`NbdConn::close`].
    #[error("closed by this side")]
    Asked,
}

#[derive(Debug)]
enum State {
    Open,
    /// No more is read; close when all is answered and sent.
    Draining(NbdCloseReason),
    /// No more is read; close when all that is queued is sent.
    Flushing(NbdCloseReason),
    /// Close at once.
    Aborting(NbdCloseReason),
    Closed,
}

struct Req {
    request: Request,
    course: Course,
    error: Option<(NbdError, u64)>,
    reading: Reading,
}

impl crate::pieces::Request for Req {
    fn course(&mut self) -> &mut Course {
        &mut self.course
    }
}

/// Payload of a write on its way in.
struct Incoming {
    req: ReqId,
    /// Length of the piece being received, 0 between pieces.
    piece: u32,
}

/// Whether parsing can go on.
enum Step {
    Again,
    NeedsBytes,
    Blocked,
}

/// One client's connection; see the module.
pub struct NbdConn {
    stream: Stream,
    session: Session,
    state: State,
    limits: NbdLimits,
    requests: Slab<Req>,
    incoming: Option<Incoming>,
    /// Reads with pieces that are not handed out, in order.
    unasked: VecDeque<ReqId>,
    budget: Budget,
    /// The unfragmented reply that has begun; all others wait.
    streaming: Option<ReqId>,
    waiting: Vec<Waiting>,
    /// Bytes that wait, but of a text that is last, which still grows.
    waiting_bytes: usize,
    /// A question about exports is not answered yet.
    asking: bool,
    dirty: bool,
    starved: bool,
    /// When negotiation, or what is left to be sent, must be over.
    deadline: Option<Time>,
}

impl NbdConn {
    /// A client has connected. `None` when the arena has no room for a staging buffer: close the socket.
    pub fn new<R: Reactor>(reactor: &mut R, socket: Socket, owner: Owner, limits: NbdLimits) -> Option<Self> {
        let staging = reactor.arena().alloc(STAGING_BLOCKS)?;
        let mut stream = Stream::new(socket, owner, staging);
        let session = Session::new();
        session.greeting(stream.text());
        Some(Self {
            stream,
            session,
            state: State::Open,
            limits,
            requests: Slab::new(),
            incoming: None,
            unasked: VecDeque::new(),
            budget: Budget::new(limits.bytes_max, limits.arena_reserve_blocks),
            streaming: None,
            waiting: Vec::new(),
            waiting_bytes: 0,
            asking: false,
            dirty: true,
            starved: false,
            deadline: Some(reactor.now() + limits.negotiation),
        })
    }
    /// Whose completions this connection takes.
    pub fn owner(&self) -> Owner {
        self.stream.owner()
    }
    /// Whether [`NbdConn::pump`] may have something to do. A connection that waits for memory says so every time.
    pub fn needs_pump(&self) -> bool {
        self.dirty || self.starved
    }
    /// Whether it waits for the arena to have room.
    pub fn is_starved(&self) -> bool {
        self.starved
    }
    /// Whether it can be dropped: closed, and every event answered.
    pub fn is_done(&self) -> bool {
        self.stream.is_closed() && self.requests.is_empty() && !self.asking
    }
    /// Requests in flight.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }
    /// Bytes held for this client, the staging buffer left out.
    pub fn bytes(&self) -> usize {
        let waiting = self.waiting_bytes + self.waiting.last().map_or(0, Waiting::text_bytes);
        self.budget.writing + self.budget.reading + waiting + self.stream.tx_bytes()
    }
    /// The export in use.
    pub fn export(&self) -> Option<&ExportInfo> {
        self.session.export()
    }
    /// Sets [`NbdLimits::bytes_max`]; what is held beyond it is given back as it is answered.
    pub fn limit_bytes(&mut self, bytes_max: usize) {
        self.budget.bytes_max = bytes_max;
    }
    /// From now on every new request and option is refused, because the server is stopping.
    pub fn stop(&mut self) {
        self.session.stop();
    }
    /// Cuts the connection.
    pub fn close<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NbdEvent>) {
        self.shut(reactor, NbdCloseReason::Asked, events);
    }
    /// Checks the clock: cuts a client that haggles, or takes its last replies, too slowly.
    pub fn tick<R: Reactor>(&mut self, reactor: &mut R, now: Time, events: &mut Vec<NbdEvent>) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.shut(reactor, NbdCloseReason::TooSlow, events);
        }
    }
    /// Takes the end of one of this connection's operations.
    pub fn on_completion<R: Reactor>(
        &mut self,
        reactor: &mut R,
        completion: Completion,
        events: &mut Vec<NbdEvent>,
    ) {
        self.dirty = true;
        match self.stream.on_completion(completion) {
            Happened::Received | Happened::Sent | Happened::Closed => {}
            Happened::Failed(error) => self.shut(reactor, NbdCloseReason::Io(error), events),
            Happened::Eof => self.eof(reactor, events),
        }
    }
    /// The client has closed its side without saying so before. What it asked for and has not been sent on yet must not be:
    /// it may be on its way by another connection already.
    fn eof<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NbdEvent>) {
        if matches!(self.state, State::Open) {
            self.shut(reactor, NbdCloseReason::Vanished, events);
        }
    }
    fn drain(&mut self, reason: NbdCloseReason) {
        self.state = State::Draining(reason);
        self.deadline = None;
    }
    fn violated(&mut self, violation: Violation) {
        self.state = State::Flushing(violation.into());
        self.deadline = None;
    }
    /// Does what can be done: looks at received bytes, hands out pieces, sends, receives.
    pub fn pump<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NbdEvent>) {
        self.dirty = false;
        self.starved = false;
        while matches!(self.state, State::Open) {
            match self.step(reactor, events) {
                Ok(Step::Again) => {}
                Ok(Step::NeedsBytes) => {
                    self.stream.receive(reactor);
                    break;
                }
                Ok(Step::Blocked) => break,
                Err(violation) => self.violated(violation),
            }
        }
        self.ask_reads(reactor.arena(), events);
        if !matches!(self.state, State::Aborting(_)) {
            self.stream.flush(reactor);
        }
        self.settle(reactor, events);
    }
    /// Closes when there is nothing left to wait for.
    fn settle<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NbdEvent>) {
        let (reason, finished) = match &self.state {
            State::Open | State::Closed => return,
            State::Draining(reason) => (reason, self.requests.is_empty()),
            State::Flushing(reason) => (reason, true),
            State::Aborting(reason) => return self.shut(reactor, reason.clone(), events),
        };
        if finished && self.stream.tx_bytes() == 0 {
            self.shut(reactor, reason.clone(), events);
        } else if finished {
            self.deadline.get_or_insert(reactor.now() + self.limits.linger);
        }
    }
    fn shut<R: Reactor>(&mut self, reactor: &mut R, reason: NbdCloseReason, events: &mut Vec<NbdEvent>) {
        if matches!(self.state, State::Closed) {
            return;
        }
        self.state = State::Closed;
        self.deadline = None;
        self.stream.close(reactor);
        self.incoming = None;
        self.unasked.clear();
        self.requests.retain(|_, req| {
            req.reading = Reading::default();
            req.course.outstanding > 0
        });
        self.budget.clear();
        self.streaming = None;
        self.waiting.clear();
        self.waiting_bytes = 0;
        events.push(NbdEvent::Closed { reason });
    }
    fn step<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<NbdEvent>) -> Result<Step, Violation> {
        if self.incoming.is_some() {
            return Ok(self.payload(reactor.arena(), events));
        }
        let full = self.requests.len() >= self.limits.requests_max || self.bytes() >= self.budget.bytes_max;
        if full {
            return Ok(Step::Blocked);
        }
        let (staged, text) = self.stream.staged_and_text();
        let text = if self.streaming.is_some() { waiting_text(&mut self.waiting) } else { text };
        let progress = self.session.feed(staged, text)?;
        self.stream.consume(progress.used);
        match progress.event {
            Some(event) => self.on_event(event, events),
            None if progress.used > 0 => {}
            None if self.session.is_waiting() => return Ok(Step::Blocked),
            None => return Ok(Step::NeedsBytes),
        }
        Ok(Step::Again)
    }
    fn on_event(&mut self, event: Event, events: &mut Vec<NbdEvent>) {
        self.asking = matches!(event, Event::Export { .. } | Event::List);
        match event {
            Event::Export { name } => events.push(NbdEvent::OpenExport { name }),
            Event::List => events.push(NbdEvent::ListExports),
            Event::Attached(export) => {
                self.deadline = None;
                events.push(NbdEvent::Attached(export));
            }
            Event::Disconnect => self.drain(NbdCloseReason::Disconnect),
            Event::Request(request) => self.begin(request, events),
        }
    }
    fn begin(&mut self, request: Request, events: &mut Vec<NbdEvent>) {
        let Request { command, offset, length, fua, cookie } = request;
        if command == Command::Cache {
            // A hint; every read is served from where the data is.
            return protocol::nbd::reply::done(cookie, self.text());
        }
        let mut course = Course::new(offset, length);
        course.outstanding = u32::from(!matches!(command, Command::Read { .. } | Command::Write));
        let req = Req { request, course, error: None, reading: Reading::default() };
        let req = ReqId(self.requests.insert(req) as u32);
        match command {
            Command::Read { .. } => self.unasked.push_back(req),
            Command::Write => {
                self.incoming = Some(Incoming { req, piece: 0 });
            }
            Command::Flush => events.push(NbdEvent::Flush { req }),
            Command::Trim => {
                events.push(NbdEvent::Zero { req, offset, length, trim: true, no_hole: false, fua });
            }
            Command::WriteZeroes { no_hole, .. } => {
                events.push(NbdEvent::Zero { req, offset, length, trim: false, no_hole, fua });
            }
            Command::BlockStatus { one } => events.push(NbdEvent::Status { req, offset, length, one }),
            Command::Cache => unreachable!("answered above"),
        }
    }
    /// Takes in the payload of the write that has begun.
    fn payload(&mut self, arena: &Arena, events: &mut Vec<NbdEvent>) -> Step {
        let incoming = self.incoming.as_ref().expect("the caller asked");
        if incoming.piece == 0 {
            if self.requests[incoming.req.key()].error.is_some() {
                return self.skip_payload();
            }
            if !self.begin_piece(arena) {
                return Step::Blocked;
            }
        }
        match self.stream.poll_fill() {
            Some(buf) => {
                self.end_piece(buf, events);
                Step::Again
            }
            None => Step::NeedsBytes,
        }
    }
    /// A write of which a piece failed already: nobody needs the rest.
    fn skip_payload(&mut self) -> Step {
        let id = self.incoming.as_ref().expect("the caller asked").req;
        let course = &mut self.requests[id.key()].course;
        let bytes = self.stream.staged().len().min((course.length - course.emitted) as usize);
        if bytes == 0 {
            return Step::NeedsBytes;
        }
        self.stream.consume(bytes);
        course.skip(bytes as u32);
        if course.emitted == course.length {
            self.incoming = None;
            self.finish_write(id);
        }
        Step::Again
    }
    /// Finds room for the next piece, if the budget and the arena have it.
    fn begin_piece(&mut self, arena: &Arena) -> bool {
        let incoming = self.incoming.as_ref().expect("the caller asked");
        let (offset, length) = self.requests[incoming.req.key()].course.next();
        let charge = piece_charge(offset, length);
        if !self.has_budget(charge) {
            return false;
        }
        let Some(buf) = self.budget.alloc(arena, blocks_of(offset, length), self.bytes() == 0) else {
            self.starved = true;
            return false;
        };
        self.budget.writing += charge;
        let lead = lead(offset);
        self.stream.expect(Fill { buf, at: lead, end: lead + length as usize });
        self.incoming.as_mut().expect("as above").piece = length;
        true
    }
    fn end_piece(&mut self, buf: BufMut, events: &mut Vec<NbdEvent>) {
        let incoming = self.incoming.as_mut().expect("a piece was under way");
        let (req, length) = (incoming.req, core::mem::take(&mut incoming.piece));
        let entry = &mut self.requests[req.key()];
        let (offset, fua) = (entry.course.next().0, entry.request.fua);
        if entry.course.hand_out(length) {
            self.incoming = None;
        }
        events.push(NbdEvent::WritePiece { req, offset, length, buf: buf.freeze(), fua });
    }
    /// Whether so many bytes more may be held; a single piece always may.
    fn has_budget(&self, bytes: usize) -> bool {
        self.bytes() == 0 || self.bytes() + bytes <= self.budget.bytes_max
    }
}
