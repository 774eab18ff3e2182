//! One link between two shards: frames in and out over a stream.
//!
//! Calling contract as for [`crate::nbd`]: completions, then [`PeerConn::pump`] once a turn
//! while [`PeerConn::needs_pump`] says so. The side that connected says [`Hello`] first
//! ([`PeerConn::connected`]); the side that accepted hears [`PeerEvent::Hello`], checks
//! cluster, names and incarnation, and answers with [`PeerConn::answer_hello`] or closes.
//! The connecting side hears the answer as the same event and checks it likewise.
//!
//! Invariants: events keep the order of the frames; nothing but a hello comes first and none
//! comes later; block data lands in one buffer an entry, with the alignment of its blocks.
//! When the arena has no room, nothing more is received until a pump finds some.
//!
//! Deliberately absent: reconnecting, keep-alive (Raft's heartbeats do), and the check of
//! block data, which [`verify_blocks`] does for whoever uses it.

use crate::stream::{Fill, Happened, STAGING_BLOCKS, Stream};
use crate::token::Owner;
use protocol::frame::{
    self, Encoder, FrameError, HEADER_BYTES, Header, META_BYTES_MAX, MetaBuf, Part, decode_header,
    decode_meta,
};
use protocol::peer::{Hello, PeerMessage};
use protocol::types::{BLOCK_BYTES, Span, Time, block_crc};
use reactor::{Buf, Completion, IoBuf, IoError, Reactor, Socket};
use smallvec::SmallVec;

/// Block data of a message: a buffer for each entry that has some.
pub type Payload = SmallVec<[Buf; 2]>;

/// How much a link may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerLimits {
    /// Bytes queued for sending, beyond which [`PeerConn::send`] refuses.
    pub tx_bytes_max: usize,
    /// How long the other side may take to say hello.
    pub hello: Span,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self { tx_bytes_max: 64 << 20, hello: Span::ms(5_000) }
    }
}

/// What came, or what became of the link.
#[derive(Debug)]
pub enum PeerEvent {
    /// Who is there: check it; close, or (on the accepting side) answer. Comes before any message.
    Hello(Hello),
    /// One message. Its block data is not verified yet.
    Message {
        /// Anything but a hello.
        message: PeerMessage,
        /// One buffer a part of the message's layout (see [`frame::layout`]).
        payload: Payload,
    },
    /// The link is over; comes once.
    Closed {
        /// Why.
        reason: PeerCloseReason,
    },
}

/// Why a link ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerCloseReason {
    /// The other side closed it.
    #[error("peer closed the link")]
    Eof,
    /// The link broke.
    #[error("link failed: {0}")]
    Io(IoError),
    /// What came is no frame, or one that makes no sense.
    #[error("bad frame: {0}")]
    Frame(#[from] FrameError),
    /// Another message came before the hello, or a second hello.
    #[error("hello out of turn")]
    Hello,
    /// No hello came in time.
    #[error("no hello in time")]
    TooSlow,
    /// [`PeerConn::close`].
    #[error("closed by this side")]
    Asked,
}

/// Why a message was not queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// Too much is queued already: the peer does not keep up.
    #[error("too much is queued for the peer")]
    Backlog,
    /// The link is over, or the hello is not answered yet.
    #[error("the link is not open")]
    NotOpen,
    /// The receiver would refuse it: a bug of this side.
    #[error("message would be refused: {0}")]
    Frame(#[from] FrameError),
}

enum Rx {
    Header,
    Meta(Header),
    Payload { message: PeerMessage, next: usize, payload: Payload },
}

enum Step {
    Again,
    NeedsBytes,
    Blocked,
}

/// One link; see the module.
pub struct PeerConn {
    stream: Stream,
    limits: PeerLimits,
    encoder: Encoder,
    rx: Rx,
    meta: MetaBuf,
    parts: Vec<Part>,
    /// The other side's hello has come.
    heard: bool,
    /// This side's hello is sent.
    said: bool,
    over: bool,
    dirty: bool,
    starved: bool,
    deadline: Option<Time>,
}

impl PeerConn {
    /// The other side has connected; its hello comes first. `None` when the arena has no room
    /// for a staging buffer: close the socket.
    pub fn accepted<R: Reactor>(
        reactor: &mut R,
        socket: Socket,
        owner: Owner,
        limits: PeerLimits,
    ) -> Option<Self> {
        let staging = reactor.arena().alloc(STAGING_BLOCKS)?;
        Some(Self {
            stream: Stream::new(socket, owner, staging),
            limits,
            encoder: Encoder::new(),
            rx: Rx::Header,
            meta: MetaBuf::new(),
            parts: Vec::new(),
            heard: false,
            said: false,
            over: false,
            dirty: true,
            starved: false,
            deadline: Some(reactor.now() + limits.hello),
        })
    }
    /// This side has connected, and says hello.
    pub fn connected<R: Reactor>(
        reactor: &mut R,
        socket: Socket,
        owner: Owner,
        limits: PeerLimits,
        hello: Hello,
    ) -> Option<Self> {
        let mut conn = Self::accepted(reactor, socket, owner, limits)?;
        conn.answer_hello(hello);
        Some(conn)
    }
    /// Says hello, once.
    pub fn answer_hello(&mut self, hello: Hello) {
        assert!(!self.said, "hello is said once");
        if self.over {
            return;
        }
        self.said = true;
        self.dirty = true;
        let payload = self.encoder.encode(&PeerMessage::Hello(hello), self.stream.text());
        assert_eq!(payload, Ok(0), "a hello is always well-formed");
    }
    /// Whose completions this link takes.
    pub fn owner(&self) -> Owner {
        self.stream.owner()
    }
    /// Whether [`PeerConn::pump`] may have something to do.
    pub fn needs_pump(&self) -> bool {
        self.dirty || self.starved
    }
    /// Whether it waits for the arena to have room.
    pub fn is_starved(&self) -> bool {
        self.starved
    }
    /// Whether it can be dropped.
    pub fn is_done(&self) -> bool {
        self.stream.is_closed()
    }
    /// Whether messages can be sent: both hellos are exchanged.
    pub fn is_open(&self) -> bool {
        self.heard && self.said && !self.over
    }
    /// Bytes queued for sending.
    pub fn tx_bytes(&self) -> usize {
        self.stream.tx_bytes()
    }
    /// Queues a message and its block data, whose length must be what the message says.
    pub fn send(
        &mut self,
        message: &PeerMessage,
        payload: impl IntoIterator<Item = IoBuf>,
    ) -> Result<(), SendError> {
        if !self.is_open() {
            return Err(SendError::NotOpen);
        }
        if self.stream.tx_bytes() > self.limits.tx_bytes_max {
            return Err(SendError::Backlog);
        }
        assert!(!matches!(message, PeerMessage::Hello(_)), "hello is said once");
        let bytes = self.encoder.encode(message, self.stream.text())?;
        self.dirty = true;
        let mut queued = 0;
        for buf in payload {
            queued += buf.len();
            self.stream.push(buf);
        }
        assert_eq!(queued, bytes, "the payload is as long as its message says");
        Ok(())
    }
    /// Cuts the link.
    pub fn close<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<PeerEvent>) {
        self.shut(reactor, PeerCloseReason::Asked, events);
    }
    /// Checks the clock: cuts a link whose other side says no hello.
    pub fn tick<R: Reactor>(&mut self, reactor: &mut R, now: Time, events: &mut Vec<PeerEvent>) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.shut(reactor, PeerCloseReason::TooSlow, events);
        }
    }
    /// Takes the end of one of this link's operations.
    pub fn on_completion<R: Reactor>(
        &mut self,
        reactor: &mut R,
        completion: Completion,
        events: &mut Vec<PeerEvent>,
    ) {
        self.dirty = true;
        match self.stream.on_completion(completion) {
            Happened::Received | Happened::Sent | Happened::Closed => {}
            Happened::Failed(error) => self.shut(reactor, PeerCloseReason::Io(error), events),
            Happened::Eof => self.shut(reactor, PeerCloseReason::Eof, events),
        }
    }
    /// Does what can be done: takes in frames, sends, receives.
    pub fn pump<R: Reactor>(&mut self, reactor: &mut R, events: &mut Vec<PeerEvent>) {
        self.dirty = false;
        self.starved = false;
        while !self.over {
            match self.step(reactor, events) {
                Ok(Step::Again) => {}
                Ok(Step::NeedsBytes) => {
                    self.stream.receive(reactor);
                    break;
                }
                Ok(Step::Blocked) => break,
                Err(reason) => self.shut(reactor, reason, events),
            }
        }
        self.stream.flush(reactor);
    }
    fn shut<R: Reactor>(&mut self, reactor: &mut R, reason: PeerCloseReason, events: &mut Vec<PeerEvent>) {
        if core::mem::replace(&mut self.over, true) {
            return;
        }
        self.deadline = None;
        self.rx = Rx::Header;
        self.stream.close(reactor);
        events.push(PeerEvent::Closed { reason });
    }
    fn step<R: Reactor>(
        &mut self,
        reactor: &mut R,
        events: &mut Vec<PeerEvent>,
    ) -> Result<Step, PeerCloseReason> {
        if self.heard && !self.said {
            // Whoever connected is not trusted before its hello was checked and answered.
            return Ok(Step::Blocked);
        }
        match self.rx {
            Rx::Header => self.header(),
            Rx::Meta(header) => self.gather_meta(header),
            Rx::Payload { .. } => self.payload(reactor, events),
        }
    }
    fn header(&mut self) -> Result<Step, PeerCloseReason> {
        let Some(head) = self.stream.staged().first_chunk::<HEADER_BYTES>() else {
            return Ok(Step::NeedsBytes);
        };
        let header = decode_header(head)?;
        if (header.op == frame::Op::Hello) == self.heard {
            return Err(PeerCloseReason::Hello);
        }
        self.stream.consume(HEADER_BYTES);
        self.meta.clear();
        self.rx = Rx::Meta(header);
        Ok(Step::Again)
    }
    /// Gathers the message, which may be longer than what is staged, where rkyv can look at it.
    fn gather_meta(&mut self, header: Header) -> Result<Step, PeerCloseReason> {
        let missing = header.meta_bytes as usize - self.meta.len();
        let staged = self.stream.staged();
        let bytes = missing.min(staged.len());
        self.meta.extend_from_slice(&staged[..bytes]);
        self.stream.consume(bytes);
        if bytes < missing {
            return Ok(Step::NeedsBytes);
        }
        debug_assert!(self.meta.len() <= META_BYTES_MAX);
        let message = decode_meta(&header, &self.meta, &mut self.parts)?;
        self.rx = Rx::Payload { message, next: 0, payload: Payload::new() };
        Ok(Step::Again)
    }
    fn payload<R: Reactor>(
        &mut self,
        reactor: &mut R,
        events: &mut Vec<PeerEvent>,
    ) -> Result<Step, PeerCloseReason> {
        let Rx::Payload { next, payload, .. } = &mut self.rx else { unreachable!("asked in step") };
        if !self.stream.is_expecting() {
            let Some(part) = self.parts.get(*next) else {
                self.deliver(events);
                return Ok(Step::Again);
            };
            let Some(buf) = reactor.arena().alloc(part.blocks()) else {
                self.starved = true;
                return Ok(Step::Blocked);
            };
            let at = part.lead as usize;
            self.stream.expect(Fill { buf, at, end: at + part.bytes as usize });
            *next += 1;
        }
        match self.stream.poll_fill() {
            Some(buf) => payload.push(buf.freeze()),
            None => return Ok(Step::NeedsBytes),
        }
        Ok(Step::Again)
    }
    fn deliver(&mut self, events: &mut Vec<PeerEvent>) {
        let Rx::Payload { message, payload, .. } = core::mem::replace(&mut self.rx, Rx::Header) else {
            unreachable!("asked in payload")
        };
        if let PeerMessage::Hello(hello) = message {
            self.heard = true;
            self.deadline = None;
            events.push(PeerEvent::Hello(hello));
        } else {
            events.push(PeerEvent::Message { message, payload });
        }
    }
}

/// Checks whole blocks against their checksums; the number of the first that fails.
pub fn verify_blocks(payload: &[Buf], crcs: &[u32]) -> Result<(), usize> {
    let mut blocks = payload.iter().flat_map(|buf| buf.chunks_exact(BLOCK_BYTES));
    for (at, crc) in crcs.iter().enumerate() {
        if blocks.next().map(block_crc) != Some(*crc) {
            return Err(at);
        }
    }
    if blocks.next().is_some() { Err(crcs.len()) } else { Ok(()) }
}

/// Checks the payload of a write of `length` bytes at `offset` of a chunk: one checksum over it.
pub fn verify_write(buf: &Buf, offset: u32, length: u32, crc: u32) -> bool {
    let lead = offset as usize % BLOCK_BYTES;
    buf.get(lead..lead + length as usize).is_some_and(|bytes| block_crc(bytes) == crc)
}

#[cfg(test)]
mod tests;
