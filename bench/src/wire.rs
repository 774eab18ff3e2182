//! Two clients of one volume behind one face: NVMe/TCP by Ashlar's own initiator, and NBD. One connection, one thread.
//!
//! Invariants: at most `depth` IOs are in flight, each slot's next one starts when its last is answered; what is started
//! together is sent together; an answer that is not a success ends the run with what it says.
//!
//! Deliberately absent: verification of data, and any choice that one protocol has and the other has not.

use anyhow::{Context, bail, ensure};
use protocol::nvme_tcp::Sqe;
use protocol::nvme_tcp::host::{CC_ENABLE, Host, HostEvent, connect_data};
use protocol::nvme_tcp::pdu::Digests;
use protocol::nvme_tcp::wire::{io, property};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Bytes asked of the kernel at once.
const RECEIVE_BYTES: usize = 256 << 10;
/// Entries of the queue, less one: the most IOs in flight.
pub const DEPTH_MAX: usize = 127;
/// The most data that fits a command's capsule.
pub const WRITE_BYTES_MAX: usize = 16 << 10;
const HOST: &str = "nqn.2026-01.io.ashlar:bench";
/// How long a server may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What is asked again and again.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes, else reads.
    pub write: bool,
    /// In order from the start to the end, once; else anywhere, until the time is over.
    pub sequential: bool,
    /// Of one IO, a multiple of the volume's blocks.
    pub bytes: usize,
    /// IOs in flight.
    pub depth: usize,
    /// Of the volume's start, that is touched.
    pub size: u64,
    /// How long; ignored when sequential.
    pub time: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Done {
    /// IOs that were answered.
    pub ios: u64,
    /// From the first to the last.
    pub took: Duration,
    /// Of each IO, sorted, in nanoseconds.
    pub latencies_ns: Vec<u64>,
}

/// One protocol's words.
trait Wire {
    /// Appends a request for the slot.
    fn ask(&mut self, slot: u16, write: bool, offset: u64, bytes: usize, payload: &[u8], out: &mut Vec<u8>);
    /// Takes one answer from the front: bytes used, and the slot that it answers.
    fn take(&mut self, input: &[u8]) -> anyhow::Result<Option<(usize, Option<u16>)>>;
}

/// A connection that is ready for IO.
pub struct Client {
    stream: TcpStream,
    wire: Box<dyn Wire>,
    /// The admin queue of an NVMe controller lives as long as its IO queue.
    _admin: Option<TcpStream>,
}

impl Client {
    /// Attaches to a subsystem at `address` by NVMe/TCP, with one IO queue and no digests.
    ///
    /// # Errors
    /// It cannot be reached, or refuses.
    pub fn nvme(address: &str, nqn: &str, block_bytes: u64) -> anyhow::Result<Self> {
        let attach = || {
            let mut admin = Nvme::connect(address)?;
            let cntlid =
                admin.call(Sqe::connect(0, 0, 32, 0), &connect_data([7; 16], u16::MAX, nqn, HOST))?;
            admin.call(Sqe::property_set(0, property::CC, CC_ENABLE), &[])?;
            let mut queue = Nvme::connect(address)?;
            let mut connect = Sqe::connect(0, 1, DEPTH_MAX as u16 + 1, 0);
            // Without flow control of the submission queue, as Linux: a read's data says that it succeeded.
            connect.0[46] = 4;
            queue.call(connect, &connect_data([7; 16], cntlid as u16, nqn, HOST))?;
            anyhow::Ok((admin, queue))
        };
        let (admin, queue) = attach().with_context(|| format!("{nqn} at {address} cannot be attached"))?;
        let wire = NvmeWire { host: queue.host, block_bytes };
        Ok(Self { stream: queue.stream, wire: Box::new(wire), _admin: Some(admin.stream) })
    }
    /// Attaches to an export by NBD over TCP, with simple replies.
    ///
    /// # Errors
    /// It cannot be reached, or refuses.
    pub fn nbd(address: &str, export: &str) -> anyhow::Result<Self> {
        let stream = nbd_attach(address, export);
        let stream = stream.with_context(|| format!("{export} at {address} cannot be attached by NBD"))?;
        Ok(Self { stream, wire: Box::<NbdWire>::default(), _admin: None })
    }
    /// Puts a load on it until its time, or its range, is over.
    ///
    /// # Errors
    /// The server fails an IO, or the connection.
    pub fn run(&mut self, load: &Load, seed: u64) -> anyhow::Result<Done> {
        assert!((1..=DEPTH_MAX).contains(&load.depth) && load.bytes <= WRITE_BYTES_MAX, "{load:?}");
        let mut random = seed | 1;
        let payload: Vec<u8> = (0..load.bytes + 4096).map(|_| next(&mut random) as u8).collect();
        let (mut input, mut out) = (Vec::with_capacity(2 * RECEIVE_BYTES), Vec::new());
        let started = Instant::now();
        let slots = load.size / load.bytes as u64;
        let mut issued = 0;
        let mut at = |random: &mut u64| -> Option<u64> {
            let over = if load.sequential { issued >= slots } else { started.elapsed() >= load.time };
            let index = if load.sequential { issued } else { next(random) % slots };
            issued += 1;
            (!over).then_some(index * load.bytes as u64)
        };
        let mut since = vec![None; load.depth];
        let mut done = Done { ios: 0, took: Duration::ZERO, latencies_ns: Vec::new() };
        let mut free: Vec<u16> = (0..load.depth as u16).collect();
        loop {
            let now = Instant::now();
            for slot in free.drain(..) {
                let Some(offset) = at(&mut random) else { continue };
                let from = next(&mut random) as usize % 4096;
                let data = &payload[from..from + load.bytes];
                self.wire.ask(slot, load.write, offset, load.bytes, data, &mut out);
                since[usize::from(slot)] = Some(now);
            }
            if since.iter().all(Option::is_none) {
                done.took = started.elapsed();
                done.latencies_ns.sort_unstable();
                return Ok(done);
            }
            self.stream.write_all(&out)?;
            out.clear();
            receive(&mut self.stream, &mut input)?;
            let (mut used, now) = (0, Instant::now());
            while let Some((bytes, answered)) = self.wire.take(&input[used..])? {
                used += bytes;
                let Some(slot) = answered else { continue };
                let asked = since.get_mut(usize::from(slot)).and_then(Option::take);
                let asked = asked.with_context(|| format!("an answer to {slot}, which asked for nothing"))?;
                done.ios += 1;
                done.latencies_ns.push((now - asked).as_nanos() as u64);
                free.push(slot);
            }
            input.drain(..used);
        }
    }
}

/// splitmix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn open(address: &str) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// Appends what has come.
fn receive(stream: &mut TcpStream, input: &mut Vec<u8>) -> anyhow::Result<()> {
    let before = input.len();
    input.resize(before + RECEIVE_BYTES, 0);
    let bytes = stream.read(&mut input[before..]).context("the server is silent or gone")?;
    input.truncate(before + bytes);
    ensure!(bytes > 0, "the server closed the connection");
    Ok(())
}

/// A queue that is being set up.
struct Nvme {
    stream: TcpStream,
    host: Host,
}

impl Nvme {
    fn connect(address: &str) -> anyhow::Result<Self> {
        let mut queue = Self { stream: open(address)?, host: Host::default() };
        let mut out = Vec::new();
        queue.host.ic_req(Digests::default(), 0, 0, &mut out);
        queue.stream.write_all(&out)?;
        match queue.event()? {
            HostEvent::Ready(_) => Ok(queue),
            other => bail!("an answer to ICReq: {other:?}"),
        }
    }
    /// One command, alone on the queue.
    fn call(&mut self, sqe: Sqe, data: &[u8]) -> anyhow::Result<u64> {
        let mut out = Vec::new();
        self.host.command(&sqe, data, &mut out);
        self.stream.write_all(&out)?;
        match self.event()? {
            HostEvent::Response(cqe) if cqe.status.is_ok() => Ok(cqe.result),
            other => bail!("an answer to {sqe:?}: {other:?}"),
        }
    }
    fn event(&mut self) -> anyhow::Result<HostEvent> {
        let mut input = Vec::new();
        loop {
            receive(&mut self.stream, &mut input)?;
            if let Some((used, event)) = self.host.feed(&input)? {
                ensure!(used == input.len(), "more than one answer");
                return Ok(event);
            }
        }
    }
}

struct NvmeWire {
    host: Host,
    block_bytes: u64,
}

impl Wire for NvmeWire {
    fn ask(&mut self, slot: u16, write: bool, offset: u64, bytes: usize, payload: &[u8], out: &mut Vec<u8>) {
        let (slba, blocks) = (offset / self.block_bytes, (bytes as u64 / self.block_bytes) as u32);
        let sqe = Sqe::new(if write { io::WRITE } else { io::READ }, slot, 1).with_range(slba, blocks);
        let sqe = sqe.with_data(bytes as u32, write);
        self.host.command(&sqe, if write { payload } else { &[] }, out);
    }
    fn take(&mut self, input: &[u8]) -> anyhow::Result<Option<(usize, Option<u16>)>> {
        let Some((used, event)) = self.host.feed(input)? else { return Ok(None) };
        let answered = match event {
            HostEvent::Response(cqe) if cqe.status.is_ok() => Some(cqe.cid),
            HostEvent::Data { cid, success, .. } => success.then_some(cid),
            other => bail!("{other:?}"),
        };
        Ok(Some((used, answered)))
    }
}

const NBD_REQUEST: u32 = 0x2560_9513;
const NBD_SIMPLE_REPLY: u32 = 0x6744_6698;
const NBD_REPLY_BYTES: usize = 16;

#[derive(Default)]
struct NbdWire {
    /// By slot: the bytes that its reply brings.
    reads: Vec<usize>,
}

impl Wire for NbdWire {
    fn ask(&mut self, slot: u16, write: bool, offset: u64, bytes: usize, payload: &[u8], out: &mut Vec<u8>) {
        out.extend(NBD_REQUEST.to_be_bytes());
        out.extend([0, 0, 0, u8::from(write)]);
        out.extend(u64::from(slot).to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend((bytes as u32).to_be_bytes());
        let at = usize::from(slot);
        self.reads.resize(self.reads.len().max(at + 1), 0);
        self.reads[at] = if write { 0 } else { bytes };
        if write {
            out.extend_from_slice(payload);
        }
    }
    fn take(&mut self, input: &[u8]) -> anyhow::Result<Option<(usize, Option<u16>)>> {
        let Some(header) = input.first_chunk::<NBD_REPLY_BYTES>() else { return Ok(None) };
        let number = |from: usize| u32::from_be_bytes([0, 1, 2, 3].map(|at| header[from + at]));
        ensure!(number(0) == NBD_SIMPLE_REPLY && number(4) == 0, "an NBD reply {header:x?}");
        let slot = number(12);
        let bytes = self.reads.get(slot as usize).copied().context("a reply to nothing")?;
        let Some(data) = input.get(NBD_REPLY_BYTES..NBD_REPLY_BYTES + bytes) else { return Ok(None) };
        // As the other client does: whoever uses an answer takes it out of the buffer.
        std::hint::black_box(data.to_vec());
        Ok(Some((NBD_REPLY_BYTES + bytes, Some(slot as u16))))
    }
}

fn nbd_attach(address: &str, export: &str) -> anyhow::Result<TcpStream> {
    let mut stream = open(address)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "no NBD server: {greeting:x?}");
    // Fixed newstyle, no zeroes; then NBD_OPT_GO.
    let mut out = 3u32.to_be_bytes().to_vec();
    out.extend(b"IHAVEOPT");
    out.extend(7u32.to_be_bytes());
    out.extend((export.len() as u32 + 6).to_be_bytes());
    out.extend((export.len() as u32).to_be_bytes());
    out.extend(export.as_bytes());
    out.extend([0, 0]);
    stream.write_all(&out)?;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let number = |from: usize| u32::from_be_bytes([0, 1, 2, 3].map(|at| header[from + at]));
        let (kind, bytes) = (number(12), number(16));
        ensure!(bytes < 4096, "an option reply of {bytes} bytes");
        let mut data = vec![0; bytes as usize];
        stream.read_exact(&mut data)?;
        match kind {
            1 => return Ok(stream),
            3 => {}
            _ => bail!("NBD_OPT_GO is answered by {kind:#x}: {}", String::from_utf8_lossy(&data)),
        }
    }
}
