//! An NVMe namespace over TCP: one controller with one IO queue, no digests, as `nvme connect` sets it up.
//!
//! Deliberately absent: keep-alive (none is asked for), a second path, and any namespace but the first.

use super::{Connection, Done, Driver, Slots};
use crate::run::load::Io;
use anyhow::{Context, bail, ensure};
use protocol::nvme_tcp::Sqe;
use protocol::nvme_tcp::host::{CC_ENABLE, Host, HostEvent, connect_data};
use protocol::nvme_tcp::pdu::{self, Common, Digests};
use protocol::nvme_tcp::wire::{COMMON_BYTES, SHORT_BYTES, SQE_BYTES, admin, flag, io, kind, property};
use protocol::types::Time;
use reactor::ring::Ring;
use reactor::{Addr, BufMut, Completion, IoBuf, Reactor};
use std::time::{Duration, Instant};
use transport::{Fill, Owner};

const HOST_NQN: &str = "nqn.2026-01.io.ashlar:bench";
const NSID: u32 = 1;
/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// Most entries of our IO queue.
const IO_ENTRIES_MAX: u16 = 256;
/// Which structure Identify is to tell.
const CNS_NAMESPACE: u32 = 0;
const CNS_CONTROLLER: u32 = 1;
/// The bit of Connect that gives up flow control of the submission queue, as Linux does: a read's data then says
/// that it succeeded.
const NO_SQ_FLOW_CONTROL: u8 = 1 << 2;

/// A queue that is being set up: one command at a time.
struct Queue {
    conn: Connection,
    host: Host,
}

impl Queue {
    fn open(ring: &mut Ring, addr: &Addr, index: u32) -> anyhow::Result<Self> {
        let mut queue = Self { conn: Connection::open(ring, addr.clone(), index)?, host: Host::default() };
        queue.host.ic_req(Digests::default(), 0, 0, queue.conn.stream.text());
        match queue.event(ring)? {
            HostEvent::Ready(ic) => ensure!(ic.digests == Digests::default(), "it insists on digests"),
            other => bail!("an answer to ICReq: {other:?}"),
        }
        Ok(queue)
    }

    fn event(&mut self, ring: &mut Ring) -> anyhow::Result<HostEvent> {
        let host = &mut self.host;
        self.conn.until(ring, |came| Ok(host.feed(came)?))
    }

    /// One command; its result, and the data that came.
    fn call(&mut self, ring: &mut Ring, sqe: Sqe, data: &[u8]) -> anyhow::Result<(u64, Vec<u8>)> {
        self.host.command(&sqe, data, self.conn.stream.text());
        let mut came = Vec::new();
        loop {
            match self.event(ring)? {
                HostEvent::Response(cqe) if cqe.status.is_ok() => return Ok((cqe.result, came)),
                HostEvent::Response(cqe) => bail!("refused: {:?}", cqe.status),
                HostEvent::Data { data, success, .. } => {
                    came.extend(data);
                    if success {
                        return Ok((0, came));
                    }
                }
                other => bail!("an answer that makes no sense: {other:?}"),
            }
        }
    }

    fn identify(&mut self, ring: &mut Ring, what: u32) -> anyhow::Result<Vec<u8>> {
        let nsid = if what == CNS_NAMESPACE { NSID } else { 0 };
        let sqe = Sqe::new(admin::IDENTIFY, 0, nsid).with(10, what).with_data(4096, false);
        let (_, data) = self.call(ring, sqe, &[])?;
        ensure!(data.len() == 4096, "Identify brought {} bytes", data.len());
        Ok(data)
    }

    fn property(&mut self, ring: &mut Ring, which: u32, long: bool) -> anyhow::Result<u64> {
        Ok(self.call(ring, Sqe::property_get(0, which, long), &[])?.0)
    }

    fn enable(&mut self, ring: &mut Ring) -> anyhow::Result<()> {
        self.call(ring, Sqe::property_set(0, property::CC, CC_ENABLE), &[])?;
        let started = Instant::now();
        while self.property(ring, property::CSTS, false)? & 1 == 0 {
            ensure!(started.elapsed() < Duration::from_secs(10), "the controller does not become ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Data of a read that comes now.
#[derive(Clone, Copy)]
struct Filling {
    slot: u32,
    /// Whether the command is answered thereby.
    answers: bool,
}

/// A client of one namespace.
pub struct NvmeDriver {
    /// A controller lives as long as its admin queue.
    admin: Connection,
    queue: Connection,
    host: Host,
    bytes: u64,
    block_bytes: u64,
    /// Most data that a command carries along.
    capsule_bytes_max: u64,
    slots: Slots,
    filling: Option<Filling>,
    completions: Vec<Completion>,
}

impl NvmeDriver {
    /// Attaches to a subsystem, for so many IOs in flight.
    ///
    /// # Errors
    /// Nobody listens, there is no such subsystem, or its queues are too short.
    pub fn open(ring: &mut Ring, addr: &Addr, nqn: &str, depth: u32) -> anyhow::Result<Self> {
        attach(ring, addr, nqn, depth).with_context(|| format!("{nqn} at {addr} cannot be attached"))
    }

    /// Takes as many PDUs apart as have come.
    fn answers(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        loop {
            if let Some(Filling { slot, answers }) = self.filling {
                let Some(buf) = self.queue.stream.poll_fill() else { return Ok(()) };
                self.filling = None;
                self.slots.of(slot)?.buf = Some(buf);
                if answers {
                    self.slots.answer(slot, Ok(()), done)?;
                }
            }
            let staged = self.queue.stream.staged();
            let Some(common) = staged.first_chunk::<COMMON_BYTES>().map(Common::parse) else { return Ok(()) };
            if common.kind == kind::C2H_DATA {
                if !self.data(common)? {
                    return Ok(());
                }
                continue;
            }
            let Some((used, event)) = self.host.feed(staged)? else { return Ok(()) };
            self.queue.stream.consume(used);
            match event {
                HostEvent::Response(cqe) => {
                    let result =
                        if cqe.status.is_ok() { Ok(()) } else { Err(format!("NVMe {:?}", cqe.status)) };
                    self.slots.answer(cqe.cid.into(), result, done)?;
                }
                HostEvent::R2t(asked) => {
                    ensure!(asked.length <= self.host.h2c_max, "it asks for more than it takes at once");
                    let part = self.slots.part(asked.cid.into(), asked.offset, asked.length)?;
                    pdu::data(
                        kind::H2C_DATA,
                        flag::LAST,
                        asked,
                        Digests::default(),
                        4,
                        self.queue.stream.text(),
                    );
                    self.queue.stream.push(part);
                }
                other => bail!("an answer that makes no sense: {other:?}"),
            }
        }
    }

    /// The header of a read's data, which then goes straight to its memory. False: more must come.
    fn data(&mut self, common: Common) -> anyhow::Result<bool> {
        let start = usize::from(common.pdo);
        let whole = usize::from(common.hlen) == SHORT_BYTES && start >= SHORT_BYTES;
        ensure!(whole, "data with a header of {} bytes at {start}", common.hlen);
        let Some(header) = self.queue.stream.staged().get(..start) else { return Ok(false) };
        let fields = pdu::Data::parse(header);
        let fits = common.plen as usize == start + fields.length as usize;
        ensure!(fits, "{} bytes of data in a PDU of {}", fields.length, common.plen);
        self.queue.stream.consume(start);
        let slot = fields.cid.into();
        let buf = self.slots.memory(slot, fields.offset, fields.length)?;
        let (at, end) = (fields.offset as usize, (fields.offset + fields.length) as usize);
        self.queue.stream.expect(Fill { buf, at, end });
        self.filling = Some(Filling { slot, answers: common.flags & flag::SUCCESS != 0 });
        Ok(true)
    }
}

fn attach(ring: &mut Ring, addr: &Addr, nqn: &str, depth: u32) -> anyhow::Result<NvmeDriver> {
    let host_id = rand_id(ring);
    let mut admin = Queue::open(ring, addr, 0)?;
    let connect = Sqe::connect(0, 0, ADMIN_ENTRIES, 0);
    let (cntlid, _) = admin.call(ring, connect, &connect_data(host_id, u16::MAX, nqn, HOST_NQN))?;
    admin.enable(ring)?;
    let entries = (admin.property(ring, property::CAP, true)? as u16).saturating_add(1).min(IO_ENTRIES_MAX);
    ensure!(depth < entries.into(), "its queues take {} commands, {depth} are too many", entries - 1);
    let controller = admin.identify(ring, CNS_CONTROLLER)?;
    let namespace = admin.identify(ring, CNS_NAMESPACE)?;
    let capsule = u32::from_le_bytes(controller[1792..1796].try_into()?);
    let format = usize::from(namespace[26] & 0xf);
    let block_bytes = 1u64.checked_shl(namespace[128 + format * 4 + 2].into()).context("no block size")?;
    ensure!((512..=4096).contains(&block_bytes), "blocks of {block_bytes} bytes");
    let blocks = u64::from_le_bytes(namespace[..8].try_into()?);
    let mut queue = Queue::open(ring, addr, 1)?;
    let mut connect = Sqe::connect(0, 1, entries, 0);
    connect.0[46] = NO_SQ_FLOW_CONTROL;
    queue.call(ring, connect, &connect_data(host_id, cntlid as u16, nqn, HOST_NQN))?;
    Ok(NvmeDriver {
        admin: admin.conn,
        queue: queue.conn,
        host: queue.host,
        bytes: blocks.checked_mul(block_bytes).context("it is larger than any volume")?,
        block_bytes,
        capsule_bytes_max: (u64::from(capsule) * 16).saturating_sub(SQE_BYTES as u64),
        slots: Slots::default(),
        filling: None,
        completions: Vec::new(),
    })
}

/// Another host each time, so that controllers of runs side by side are not mixed up.
fn rand_id(ring: &mut Ring) -> [u8; 16] {
    (u128::from(ring.random()) << 64 | u128::from(ring.random())).to_le_bytes()
}

impl Driver for NvmeDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, _: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let (slba, blocks) = (io.offset / self.block_bytes, (io.bytes / self.block_bytes) as u32);
        let inline = io.write && io.bytes <= self.capsule_bytes_max;
        let sqe = Sqe::new(if io.write { io::WRITE } else { io::READ }, slot as u16, NSID);
        let sqe = sqe.with_range(slba, blocks).with_data(io.bytes as u32, inline);
        let along = if inline { io.bytes as u32 } else { 0 };
        pdu::command(&sqe, along, Digests::default(), 4, self.queue.stream.text());
        let data = self.slots.begin(slot, io, buf);
        if let Some(data) = data.filter(|_| inline) {
            self.queue.stream.push(IoBuf::part(data, 0..io.bytes as usize));
        }
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        self.queue.pump(ring)?;
        ring.turn(deadline, &mut self.completions);
        for completion in std::mem::take(&mut self.completions) {
            let Owner { index, .. } = Owner::split(completion.token).0;
            if index == 0 { self.admin.take(completion)? } else { self.queue.take(completion)? }
        }
        self.answers(done)?;
        self.slots.settle(done);
        Ok(())
    }
}
