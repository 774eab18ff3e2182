//! The clients: how one IO reaches a file, a server or a cluster.
//!
//! A driver owns its connections and nothing else; all of them run on the reactor that the targets
//! use, and those that speak to a server receive and send by the streams that targets do it with.
//! Invariant: each IO that was submitted is told once, with its buffer.

mod file;
mod nbd;
mod nvme;
mod volume;

pub use file::FileDriver;
pub use nbd::NbdDriver;
pub use nvme::NvmeDriver;
pub use volume::VolumeDriver;

use super::load::Io;
use anyhow::{Context, bail, ensure};
use protocol::types::{BLOCK_BYTES, Span, Time};
use reactor::ring::Ring;
use reactor::{Addr, Buf, BufMut, Completion, IoBuf, Op, Output, Reactor};
use transport::stream::STAGING_BLOCKS;
use transport::{Happened, Owner, Stream};

/// One IO that ended.
pub struct Done {
    /// As submitted.
    pub slot: u32,
    /// Why it failed.
    pub result: Result<(), String>,
    /// Its memory, with what was read.
    pub buf: BufMut,
}

/// A client.
pub trait Driver {
    /// Bytes that can be touched.
    fn bytes(&self) -> u64;
    /// Queues an IO. A write takes its data from `buf`, a read fills it.
    fn submit(&mut self, ring: &mut Ring, slot: u32, io: Io, buf: BufMut);
    /// Sends what is queued, and waits until something happens or the deadline.
    ///
    /// # Errors
    /// The connection is lost, or the server makes no sense.
    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()>;
}

/// How long a server may take for one step of being attached.
const ATTACH_MAX: Span = Span::ms(10_000);
/// What tells the completion of a connect.
const CONNECT: Owner = Owner { kind: u8::MAX, index: 0 };

/// One connection of a client.
struct Connection {
    stream: Stream,
}

impl Connection {
    /// Connects; its operations have `index` in their tokens.
    ///
    /// # Errors
    /// Nobody listens there.
    fn open(ring: &mut Ring, addr: Addr, index: u32) -> anyhow::Result<Self> {
        let staging = ring.arena().alloc(STAGING_BLOCKS).context("no memory to receive into")?;
        let shown = addr.to_string();
        ring.submit(CONNECT.token(0), Op::Connect { addr });
        let mut completions = Vec::new();
        while !completions.iter().any(|one: &Completion| CONNECT.owns(one.token)) {
            ring.turn(None, &mut completions);
        }
        let connected = completions.into_iter().find(|one| CONNECT.owns(one.token)).context("just seen")?;
        let output = connected.result.with_context(|| format!("cannot connect to {shown}"))?;
        let Output::Connected { socket } = output else { bail!("connect ended otherwise") };
        Ok(Self { stream: Stream::new(socket, Owner { kind: 0, index }, staging) })
    }

    /// Sends what is queued and receives until `take` finds what it looks for at the front of what came: the bytes
    /// it used, and what it made of them.
    ///
    /// # Errors
    /// What `take` says; a server that is silent, gone, or talks too long.
    fn until<T>(
        &mut self,
        ring: &mut Ring,
        mut take: impl FnMut(&[u8]) -> anyhow::Result<Option<(usize, T)>>,
    ) -> anyhow::Result<T> {
        let (deadline, mut completions) = (ring.now() + ATTACH_MAX, Vec::new());
        loop {
            if let Some((used, found)) = take(self.stream.staged())? {
                self.stream.consume(used);
                return Ok(found);
            }
            ensure!(ring.now() < deadline, "the server is silent since {} s", ATTACH_MAX.0 / 1_000_000_000);
            self.pump(ring)?;
            ring.turn(Some(deadline), &mut completions);
            for completion in completions.drain(..) {
                self.take(completion)?;
            }
        }
    }

    /// Sends what is queued, and receives.
    fn pump(&mut self, ring: &mut Ring) -> anyhow::Result<()> {
        let staged = self.stream.staged().len();
        ensure!(staged < STAGING_BLOCKS * BLOCK_BYTES, "the server sent {staged} bytes where few were due");
        self.stream.flush(ring);
        self.stream.receive(ring);
        Ok(())
    }

    /// Takes the end of an operation.
    fn take(&mut self, completion: Completion) -> anyhow::Result<()> {
        if Owner::split(completion.token).0 != self.stream.owner() {
            return Ok(());
        }
        match self.stream.on_completion(completion) {
            Happened::Failed(error) => Err(error).context("the connection failed"),
            Happened::Eof => bail!("the server closed the connection"),
            Happened::Received | Happened::Sent | Happened::Closed => Ok(()),
        }
    }
}

/// An IO on its way to a server and back.
struct Pending {
    io: Io,
    /// Of a read, unless it is being filled.
    buf: Option<BufMut>,
    /// Of a write: one of the handles to what is sent.
    sent: Option<Buf>,
    answer: Option<Result<(), String>>,
}

/// The IOs under way, by slot.
#[derive(Default)]
struct Slots {
    slots: Vec<Option<Pending>>,
    /// Answered before the kernel gave their memory back.
    parting: Vec<u32>,
}

impl Slots {
    fn put(&mut self, slot: u32, pending: Pending) {
        let at = slot as usize;
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || None);
        }
        assert!(self.slots[at].is_none(), "one IO a slot");
        self.slots[at] = Some(pending);
    }

    /// Begins an IO; of a write, what is to be sent.
    fn begin(&mut self, slot: u32, io: Io, buf: BufMut) -> Option<Buf> {
        let (buf, sent) = if io.write { (None, Some(buf.freeze())) } else { (Some(buf), None) };
        self.put(slot, Pending { io, buf, sent: sent.clone(), answer: None });
        sent
    }

    fn of(&mut self, slot: u32) -> anyhow::Result<&mut Pending> {
        let pending = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        pending.context("the server answered what nobody asked")
    }

    /// A part of what a write sends.
    fn part(&mut self, slot: u32, offset: u32, bytes: u32) -> anyhow::Result<IoBuf> {
        let pending = self.of(slot)?;
        let (from, to) = (u64::from(offset), u64::from(offset) + u64::from(bytes));
        let buf = pending.sent.as_ref().filter(|_| to <= pending.io.bytes);
        let buf = buf.context("the server asked for data that its command has not")?;
        Ok(IoBuf::part(buf.clone(), from as usize..to as usize))
    }

    /// The memory that a read's bytes go to.
    fn memory(&mut self, slot: u32, offset: u32, bytes: u32) -> anyhow::Result<BufMut> {
        let pending = self.of(slot)?;
        let fits = u64::from(offset) + u64::from(bytes) <= pending.io.bytes;
        let buf = pending.buf.take().filter(|_| fits && pending.answer.is_none());
        buf.context("the server sent data that nobody asked for")
    }

    /// An answer came; tells the IO's end once its memory is back.
    fn answer(&mut self, slot: u32, result: Result<(), String>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let pending = self.of(slot)?;
        ensure!(pending.answer.is_none(), "the server answered twice");
        pending.answer = Some(result);
        if !self.part_with(slot, done) {
            self.parting.push(slot);
        }
        Ok(())
    }

    /// Tells the end of answered IOs whose memory has come back.
    fn settle(&mut self, done: &mut Vec<Done>) {
        let mut waiting = std::mem::take(&mut self.parting);
        waiting.retain(|slot| !self.part_with(*slot, done));
        self.parting = waiting;
    }

    fn part_with(&mut self, slot: u32, done: &mut Vec<Done>) -> bool {
        let Some(pending) = self.slots[slot as usize].as_mut() else { return true };
        if let Some(sent) = pending.sent.take() {
            match sent.try_unique() {
                Ok(buf) => pending.buf = Some(buf),
                Err(sent) => pending.sent = Some(sent),
            }
        }
        if pending.buf.is_none() || pending.answer.is_none() {
            return false;
        }
        if let Some(Pending { buf: Some(buf), answer: Some(result), .. }) = self.slots[slot as usize].take() {
            done.push(Done { slot, result, buf });
        }
        true
    }
}
