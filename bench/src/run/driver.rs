//! The clients: how one IO reaches a file or a server.
//!
//! A driver owns its connection and nothing else; all of them run on the reactor that the targets
//! use. Invariant: each IO that was submitted is told once, with its buffer.

use super::load::Io;
use anyhow::{Context, bail, ensure};
use protocol::nbd::client::{OptionReply, info_option, option_reply, request};
use protocol::nbd::wire;
use protocol::types::Time;
use reactor::ring::Ring;
use reactor::{
    Addr, Buf, BufMut, Completion, Disk, File, IoBuf, IoList, Op, OpenOptions, Output, Reactor, Socket,
};
use std::collections::{HashMap, VecDeque};
use std::path::Path;

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
    /// Sends what is queued, and waits until an IO ends or the deadline.
    ///
    /// # Errors
    /// The connection is lost, or the server makes no sense.
    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()>;
}

/// A file past the page cache.
pub struct FileDriver {
    file: File,
    bytes: u64,
    dsync: bool,
    completions: Vec<Completion>,
}

impl FileDriver {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or its file system refuses direct IO.
    pub fn open(ring: &mut Ring, path: &Path, dsync: bool, read_only: bool) -> anyhow::Result<Self> {
        let file = ring.open(path, OpenOptions { read_only, ..OpenOptions::EXISTING })?;
        ensure!(ring.disk().is_direct(file), "the file system refuses direct IO, as tmpfs does");
        let bytes = ring.file_len(file)?;
        Ok(Self { file, bytes, dsync, completions: Vec::new() })
    }
}

impl Driver for FileDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, ring: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let (file, offset, bytes) = (self.file, io.offset, io.bytes as usize);
        let op = if io.write {
            let bufs = std::iter::once(IoBuf::part(buf.freeze(), 0..bytes)).collect();
            Op::WriteAt { file, offset, bufs, dsync: self.dsync }
        } else {
            Op::ReadAt { file, offset, buf, bytes: bytes as u32 }
        };
        ring.submit(slot.into(), op);
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        ring.turn(deadline, &mut self.completions);
        for completion in self.completions.drain(..) {
            let Completion { token, result, buf, bufs } = completion;
            let buf = buf.or_else(|| unique(bufs.into_iter().next()?)).context("a buffer was lost")?;
            let result = result.map(|_| ()).map_err(|error| error.to_string());
            done.push(Done { slot: token as u32, result, buf });
        }
        Ok(())
    }
}

fn unique(buf: IoBuf) -> Option<BufMut> {
    match buf {
        IoBuf::Shared { buf, .. } => Buf::try_unique(buf).ok(),
        _ => None,
    }
}

const CONNECT: u64 = 1;
const RECV: u64 = 2;
const SEND: u64 = 3;
/// Blocks of the memory that replies are received into.
const STAGING_BLOCKS: usize = 32;

/// An IO on its way to a server and back.
struct Pending {
    io: Io,
    /// Here, unless it is being sent.
    buf: Option<BufMut>,
    /// The server's answer.
    answer: Option<Result<(), String>>,
}

/// An NBD export: simple replies, requests of a turn in one send.
pub struct NbdDriver {
    socket: Socket,
    bytes: u64,
    completions: Vec<Completion>,
    pending: HashMap<u32, Pending>,
    /// Headers and payloads that wait for the send before them.
    out: IoList,
    sending: bool,
    staging: Option<BufMut>,
    /// Bytes received and not yet understood.
    input: VecDeque<u8>,
    /// A read whose data comes now, and how much of it has come.
    filling: Option<(u32, usize)>,
}

impl NbdDriver {
    /// Connects and asks for the export.
    ///
    /// # Errors
    /// Nobody listens, there is no such export, or it may not be written.
    pub fn open(ring: &mut Ring, addr: Addr, export: &str, read_only: bool) -> anyhow::Result<Self> {
        let staging = ring.arena().alloc(STAGING_BLOCKS).context("no memory to receive into")?;
        let shown = addr.to_string();
        ring.submit(CONNECT, Op::Connect { addr });
        let connected =
            wait_for(ring, CONNECT)?.result.with_context(|| format!("cannot connect to {shown}"))?;
        let Output::Connected { socket } = connected else { bail!("connect ended otherwise") };
        let (completions, pending, out) = (Vec::new(), HashMap::new(), IoList::new());
        let (sending, staging, input, filling) = (false, Some(staging), VecDeque::new(), None);
        let mut driver =
            Self { socket, bytes: 0, completions, pending, out, sending, staging, input, filling };
        driver
            .negotiate(ring, export, read_only)
            .with_context(|| format!("{shown} does not serve `{export}`"))?;
        driver.receive(ring);
        Ok(driver)
    }

    fn negotiate(&mut self, ring: &mut Ring, export: &str, read_only: bool) -> anyhow::Result<()> {
        let greeting = self.exactly(ring, wire::GREETING_BYTES)?;
        ensure!(greeting[..8] == wire::MAGIC.to_be_bytes(), "it is no NBD server");
        ensure!(greeting[8..16] == wire::OPTION_MAGIC.to_be_bytes(), "it speaks the old NBD handshake only");
        let mut hello = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes().to_vec();
        info_option(wire::opt::GO, export, &[], &mut hello);
        ring.submit(
            SEND,
            Op::Send { socket: self.socket, bufs: [IoBuf::copy(&hello)].into_iter().collect() },
        );
        wait_for(ring, SEND)?.result?;
        loop {
            let OptionReply { kind, data, .. } = self.option_reply(ring)?;
            match kind {
                wire::rep::ACK => break,
                wire::rep::INFO if data.len() >= 12 && data[..2] == wire::info::EXPORT.to_be_bytes() => {
                    self.bytes = u64::from_be_bytes(data[2..10].try_into()?);
                    let flags = u16::from_be_bytes(data[10..12].try_into()?);
                    ensure!(read_only || flags & 1 << 1 == 0, "the export is read-only");
                }
                wire::rep::INFO => {}
                kind if kind >> 31 == 1 => bail!("refused: {}", String::from_utf8_lossy(&data)),
                kind => bail!("an unknown answer, {kind}"),
            }
        }
        ensure!(self.bytes > 0, "the server does not tell the export's size");
        Ok(())
    }

    fn option_reply(&mut self, ring: &mut Ring) -> anyhow::Result<OptionReply> {
        loop {
            if let Some((taken, reply)) = option_reply(self.input.make_contiguous())? {
                self.input.drain(..taken);
                return Ok(reply);
            }
            self.more(ring)?;
        }
    }

    fn exactly(&mut self, ring: &mut Ring, bytes: usize) -> anyhow::Result<Vec<u8>> {
        while self.input.len() < bytes {
            self.more(ring)?;
        }
        Ok(self.input.drain(..bytes).collect())
    }

    fn more(&mut self, ring: &mut Ring) -> anyhow::Result<()> {
        self.receive(ring);
        let completion = wait_for(ring, RECV)?;
        self.received(completion)
    }

    fn receive(&mut self, ring: &mut Ring) {
        if let Some(buf) = self.staging.take() {
            let to = buf.len() as u32;
            ring.submit(RECV, Op::Recv { socket: self.socket, buf, from: 0, to });
        }
    }

    fn received(&mut self, completion: Completion) -> anyhow::Result<()> {
        let output = completion.result.context("the connection failed")?;
        let Output::Received(count) = output else { bail!("receive ended otherwise") };
        ensure!(count > 0, "the server closed the connection");
        let buf = completion.buf.context("a buffer was lost")?;
        self.input.extend(&buf[..count as usize]);
        self.staging = Some(buf);
        Ok(())
    }

    fn sent(&mut self, completion: Completion, done: &mut Vec<Done>) -> anyhow::Result<()> {
        completion.result.context("the connection failed")?;
        self.sending = false;
        let mut slot = None;
        for buf in completion.bufs {
            match buf {
                // A request's header; its cookie says whose payload comes next.
                IoBuf::Inline { bytes, .. } => {
                    let cookie: [u8; 8] = bytes[8..16].try_into()?;
                    slot = Some(u64::from_be_bytes(cookie) as u32);
                }
                shared => {
                    let slot = slot.context("a payload without a header")?;
                    self.pending.get_mut(&slot).context("a payload of nobody")?.buf = unique(shared);
                    self.finish(slot, done);
                }
            }
        }
        Ok(())
    }

    /// Tells an IO that is both answered and has its memory back.
    fn finish(&mut self, slot: u32, done: &mut Vec<Done>) {
        let ended = self.pending.get(&slot).is_some_and(|io| io.answer.is_some() && io.buf.is_some());
        if !ended {
            return;
        }
        if let Some(Pending { answer: Some(result), buf: Some(buf), .. }) = self.pending.remove(&slot) {
            done.push(Done { slot, result, buf });
        }
    }

    /// Takes as many replies apart as have come.
    fn replies(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        loop {
            if let Some((slot, filled)) = self.filling {
                let pending = self.pending.get_mut(&slot).context("data of nobody")?;
                let buf = pending.buf.as_mut().context("a read without memory")?;
                let count = (pending.io.bytes as usize - filled).min(self.input.len());
                let (front, back) = self.input.as_slices();
                let from_front = count.min(front.len());
                buf[filled..filled + from_front].copy_from_slice(&front[..from_front]);
                buf[filled + from_front..filled + count].copy_from_slice(&back[..count - from_front]);
                self.input.drain(..count);
                if filled + count < pending.io.bytes as usize {
                    self.filling = Some((slot, filled + count));
                    return Ok(());
                }
                (self.filling, pending.answer) = (None, Some(Ok(())));
                self.finish(slot, done);
            }
            if self.input.len() < wire::SIMPLE_REPLY_BYTES {
                return Ok(());
            }
            let head: Vec<u8> = self.input.drain(..wire::SIMPLE_REPLY_BYTES).collect();
            ensure!(head[..4] == wire::SIMPLE_REPLY_MAGIC.to_be_bytes(), "the server sent no reply");
            let error = u32::from_be_bytes(head[4..8].try_into()?);
            let slot = u64::from_be_bytes(head[8..16].try_into()?) as u32;
            let pending = self.pending.get_mut(&slot).context("the server answered what nobody asked")?;
            match (error, pending.io.write) {
                (0, false) => self.filling = Some((slot, 0)),
                (0, true) => pending.answer = Some(Ok(())),
                (error, _) => pending.answer = Some(Err(format!("NBD error {error}"))),
            }
            self.finish(slot, done);
        }
    }
}

impl Driver for NbdDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, _: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let kind = if io.write { wire::cmd::WRITE } else { wire::cmd::READ };
        let mut header = Vec::with_capacity(wire::REQUEST_BYTES);
        request(kind, 0, slot.into(), io.offset, io.bytes as u32, &mut header);
        self.out.push(IoBuf::copy(&header));
        let buf = if io.write {
            self.out.push(IoBuf::part(buf.freeze(), 0..io.bytes as usize));
            None
        } else {
            Some(buf)
        };
        self.pending.insert(slot, Pending { io, buf, answer: None });
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        if !self.sending && !self.out.is_empty() {
            self.sending = true;
            let bufs = std::mem::take(&mut self.out);
            ring.submit(SEND, Op::Send { socket: self.socket, bufs });
        }
        let mut completions = std::mem::take(&mut self.completions);
        ring.turn(deadline, &mut completions);
        for completion in completions.drain(..) {
            match completion.token {
                RECV => {
                    self.received(completion)?;
                    self.replies(done)?;
                    self.receive(ring);
                }
                SEND => self.sent(completion, done)?,
                _ => bail!("an operation of nobody ended"),
            }
        }
        self.completions = completions;
        Ok(())
    }
}

/// The end of an operation while nothing else is under way.
fn wait_for(ring: &mut Ring, token: u64) -> anyhow::Result<Completion> {
    let mut completions = Vec::new();
    while completions.is_empty() {
        ring.turn(None, &mut completions);
    }
    let completion = completions.pop().context("an operation ended")?;
    ensure!(completion.token == token && completions.is_empty(), "an operation of nobody ended");
    Ok(completion)
}
