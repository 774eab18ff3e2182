//! One connection's bytes: a staging buffer and direct receives inwards, a queue outwards.
//!
//! Inwards, at most one receive is under way. Small things are received into the staging
//! buffer and looked at there. Payload is asked for with [`Stream::expect`]: what is staged
//! already is copied, a long remainder is received straight into its buffer. Nothing is
//! received unless [`Stream::receive`] asks, so whoever stops asking stops the sender.
//!
//! Outwards, small bytes are gathered in [`Stream::text`] and payload is queued by reference;
//! [`Stream::flush`] sends all of it as one operation, and at most one send is under way.
//!
//! Invariants: bytes leave in the order they were queued; after [`Stream::close`] nothing is
//! submitted any more, and every buffer is given up as its operation completes.

use crate::token::Owner;
use reactor::api::INLINE_BYTES_MAX;
use reactor::{BufMut, Completion, IoBuf, IoError, IoList, Op, Output, Reactor, Socket};
use std::collections::VecDeque;

/// Blocks of the staging buffer: 64 KiB, so that a burst of small requests is one receive.
pub const STAGING_BLOCKS: usize = 16;
/// A payload of which less than this is missing is received through the staging buffer, so
/// that the requests behind it come with the same receive.
pub const DIRECT_BYTES_MIN: usize = 16 << 10;
/// Most buffers of one send.
pub const SEND_BUFS_MAX: usize = 256;
/// Most bytes of one send, up to the buffer that reaches it.
pub const SEND_BYTES_MAX: usize = 1 << 20;

/// Sent texts whose memory is kept for the next ones: a send may have one for each of its payloads.
const SPARE_TEXTS_MAX: usize = 64;
/// Memory of a text that is kept, at most.
const SPARE_TEXT_BYTES_MAX: usize = 16 << 10;

const OP_RECV: u8 = 0;
const OP_SEND: u8 = 1;
const OP_CLOSE: u8 = 2;

/// Payload to be received into `buf[at..end]`.
#[derive(Debug)]
pub struct Fill {
    /// Where it goes.
    pub buf: BufMut,
    /// The first byte that is missing.
    pub at: usize,
    /// One past the last byte.
    pub end: usize,
}

/// What a completion meant for the connection.
#[derive(Debug)]
pub enum Happened {
    /// Bytes came: more is staged, or the payload has grown.
    Received,
    /// The other side sends no more.
    Eof,
    /// All that was under way is sent.
    Sent,
    /// The connection is broken.
    Failed(IoError),
    /// The socket is closed.
    Closed,
}

enum Rx {
    Idle,
    Staging,
    Direct { at: usize, end: usize },
}

/// The bytes of one connection; see the module.
pub struct Stream {
    socket: Socket,
    owner: Owner,
    /// Absent while a receive holds it, and after the close.
    staging: Option<BufMut>,
    start: usize,
    end: usize,
    rx: Rx,
    fill: Option<Fill>,
    eof: bool,
    text: Vec<u8>,
    queue: VecDeque<IoBuf>,
    queued_bytes: usize,
    sending_bytes: usize,
    sending: bool,
    spare: IoList,
    spare_texts: Vec<Vec<u8>>,
    closing: bool,
    closed: bool,
}

impl Stream {
    /// A connected socket. `owner` must name this connection until [`Stream::is_closed`];
    /// `staging` is at least as long as the longest thing that must be looked at in one piece.
    pub fn new(socket: Socket, owner: Owner, staging: BufMut) -> Self {
        Self {
            socket,
            owner,
            staging: Some(staging),
            start: 0,
            end: 0,
            rx: Rx::Idle,
            fill: None,
            eof: false,
            text: Vec::new(),
            queue: VecDeque::new(),
            queued_bytes: 0,
            sending_bytes: 0,
            sending: false,
            spare: IoList::new(),
            spare_texts: Vec::new(),
            closing: false,
            closed: false,
        }
    }
    /// Whose operations these are.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// What has come and is not consumed; empty while a receive is under way.
    pub fn staged(&self) -> &[u8] {
        self.staging.as_ref().map_or(&[], |staging| &staging[self.start..self.end])
    }
    /// The staged bytes, and where small answers to them go.
    pub fn staged_and_text(&mut self) -> (&[u8], &mut Vec<u8>) {
        let staged = self.staging.as_ref().map_or(&[][..], |staging| &staging[self.start..self.end]);
        (staged, &mut self.text)
    }
    /// Is done with the first bytes that are staged.
    pub fn consume(&mut self, bytes: usize) {
        assert!(bytes <= self.end - self.start, "only what is staged can be consumed");
        self.start += bytes;
    }
    /// The next bytes are payload; one at a time. Then [`Stream::poll_fill`] until it is done.
    pub fn expect(&mut self, fill: Fill) {
        assert!(!self.is_expecting(), "one payload at a time");
        assert!(fill.at <= fill.end && fill.end <= fill.buf.len(), "a payload lies within its buffer");
        self.fill = Some(fill);
    }
    /// Whether a payload is expected and not taken yet.
    pub fn is_expecting(&self) -> bool {
        self.fill.is_some() || matches!(self.rx, Rx::Direct { .. })
    }
    /// Moves staged bytes into the payload, and hands its buffer out when it is complete.
    pub fn poll_fill(&mut self) -> Option<BufMut> {
        let fill = self.fill.as_mut()?;
        if let Some(staging) = &self.staging {
            let bytes = (fill.end - fill.at).min(self.end - self.start);
            fill.buf[fill.at..fill.at + bytes].copy_from_slice(&staging[self.start..self.start + bytes]);
            fill.at += bytes;
            self.start += bytes;
        }
        let complete = fill.at == fill.end;
        complete.then(|| self.fill.take().expect("just looked at").buf)
    }
    /// Asks for more bytes, unless some are on their way already.
    pub fn receive<R: Reactor>(&mut self, reactor: &mut R) {
        if self.closing || self.eof || !matches!(self.rx, Rx::Idle) {
            return;
        }
        let socket = self.socket;
        let (buf, from, to) = match self.fill.take() {
            Some(fill) if fill.end - fill.at >= DIRECT_BYTES_MIN && self.start == self.end => {
                self.rx = Rx::Direct { at: fill.at, end: fill.end };
                (fill.buf, fill.at, fill.end)
            }
            fill => {
                self.fill = fill;
                let staging = self.compact();
                self.rx = Rx::Staging;
                let to = staging.len();
                (staging, self.end, to)
            }
        };
        let op = Op::Recv { socket, buf, from: from as u32, to: to as u32 };
        reactor.submit(self.owner.token(OP_RECV), op);
    }
    /// Takes the staging buffer, unconsumed bytes moved to its front.
    fn compact(&mut self) -> BufMut {
        let mut staging = self.staging.take().expect("no receive is under way, so it is here");
        if self.start > 0 {
            staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        assert!(self.end < staging.len(), "whatever is looked at in one piece fits in the staging buffer");
        staging
    }

    /// Where small bytes to be sent are appended, behind everything queued so far.
    pub fn text(&mut self) -> &mut Vec<u8> {
        &mut self.text
    }
    /// Queues payload behind everything queued so far.
    pub fn push(&mut self, buf: IoBuf) {
        if buf.is_empty() || self.closing {
            return;
        }
        self.seal();
        self.queued_bytes += buf.len();
        self.queue.push_back(buf);
    }
    /// Queues zeroes, however many.
    pub fn push_zeroes(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let some = bytes.min(reactor::arena::SLAB_BYTES);
            self.push(IoBuf::zeroes(some));
            bytes -= some;
        }
    }
    fn seal(&mut self) {
        if !self.text.is_empty() {
            self.queued_bytes += self.text.len();
            if self.text.len() > INLINE_BYTES_MAX {
                let next = self.spare_texts.pop().unwrap_or_default();
                self.queue.push_back(IoBuf::Owned(core::mem::replace(&mut self.text, next)));
                return;
            }
            self.queue.push_back(IoBuf::copy(&self.text));
            self.text.clear();
        }
    }
    /// Bytes that are queued or under way.
    pub fn tx_bytes(&self) -> usize {
        self.queued_bytes + self.text.len() + self.sending_bytes
    }
    /// Sends what is queued, unless a send is under way; its completion calls for another flush.
    pub fn flush<R: Reactor>(&mut self, reactor: &mut R) {
        if self.closing {
            self.text.clear();
            return;
        }
        if self.sending {
            return;
        }
        self.seal();
        let mut bufs = core::mem::take(&mut self.spare);
        while self.sending_bytes < SEND_BYTES_MAX && bufs.len() < SEND_BUFS_MAX {
            let Some(buf) = self.queue.pop_front() else { break };
            self.sending_bytes += buf.len();
            bufs.push(buf);
        }
        if bufs.is_empty() {
            self.spare = bufs;
            return;
        }
        self.queued_bytes -= self.sending_bytes;
        self.sending = true;
        reactor.submit(self.owner.token(OP_SEND), Op::Send { socket: self.socket, bufs });
    }

    /// Gives up: what is queued is dropped, what is under way is cancelled.
    pub fn close<R: Reactor>(&mut self, reactor: &mut R) {
        if self.closing {
            return;
        }
        self.closing = true;
        self.queue.clear();
        self.queued_bytes = 0;
        self.text = Vec::new();
        self.fill = None;
        self.staging = None;
        self.start = 0;
        self.end = 0;
        reactor.submit(self.owner.token(OP_CLOSE), Op::Close { socket: self.socket });
    }
    /// Whether [`Stream::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.closing
    }
    /// Whether the socket is closed and none of its operations is outstanding.
    pub fn is_closed(&self) -> bool {
        self.closed && !self.sending && matches!(self.rx, Rx::Idle)
    }
    /// Takes the end of one of this stream's operations.
    pub fn on_completion(&mut self, completion: Completion) -> Happened {
        let (owner, op) = Owner::split(completion.token);
        assert_eq!(owner, self.owner, "a completion is dispatched by its token");
        match op {
            OP_RECV => self.received(completion),
            OP_SEND => self.sent(completion),
            OP_CLOSE => {
                self.closed = true;
                Happened::Closed
            }
            _ => unreachable!("no such operation is submitted here"),
        }
    }
    fn received(&mut self, completion: Completion) -> Happened {
        let rx = core::mem::replace(&mut self.rx, Rx::Idle);
        let bytes = match completion.result {
            Ok(Output::Received(bytes)) => bytes as usize,
            Ok(other) => unreachable!("a receive yields {other:?}"),
            Err(error) => {
                self.eof = true;
                return Happened::Failed(error);
            }
        };
        if !self.closing {
            let buf = completion.buf.expect("a receive gives its buffer back");
            match rx {
                Rx::Direct { at, end } => self.fill = Some(Fill { buf, at: at + bytes, end }),
                Rx::Staging => {
                    self.staging = Some(buf);
                    self.end += bytes;
                }
                Rx::Idle => unreachable!("nothing was received without a receive"),
            }
        }
        if bytes == 0 {
            self.eof = true;
            return Happened::Eof;
        }
        Happened::Received
    }
    fn sent(&mut self, completion: Completion) -> Happened {
        self.sending = false;
        self.sending_bytes = 0;
        self.spare = completion.bufs;
        for buf in self.spare.drain(..) {
            if let IoBuf::Owned(mut text) = buf
                && self.spare_texts.len() < SPARE_TEXTS_MAX
                && text.capacity() <= SPARE_TEXT_BYTES_MAX
            {
                text.clear();
                self.spare_texts.push(text);
            }
        }
        match completion.result {
            Ok(_) => Happened::Sent,
            Err(error) => Happened::Failed(error),
        }
    }
}
