//! A volume by the native client: the routing that exports use, from outside of a target.
//!
//! It says hello to every shard as a shard of a target that nobody has, so a leader answers it as it answers a peer.
//! What is written is checksummed here, and what is read is checked here: the whole way is covered.
//!
//! Deliberately absent: a cache, and leaders that follow IO (there is no replica here to draw them to).

use super::{Done, Driver, Slots};
use crate::run::load::Io;
use anyhow::Context;
use client::control::{MdsClient, Patience};
use client::volume::{Action, Config, Request, VolumeIo};
use protocol::control::{Problem, ProblemKind};
use protocol::map::ClusterMap;
use protocol::peer::{Hello, IoOutcome, PeerMessage};
use protocol::types::{
    BLOCK_BYTES, ENTRY_BYTES_MAX, SessionEpoch, ShardAddr, Span, TargetId, Time, VolumeId, block_crc,
    crc_at_rest,
};
use reactor::ring::Ring;
use reactor::{Addr, Buf, BufMut, Completion, IoBuf, Op, Output, Reactor, Waker};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use transport::{Owner, PeerConn, PeerEvent, PeerLimits};

/// Kinds of tokens.
const LINK: u8 = 1;
const CONNECTING: u8 = 2;
/// How long before a shard that could not be reached is tried again.
const RETRY: Span = Span::ms(50);
/// Target numbers from here on are nobody's: they tell clients from targets.
const CLIENTS_FROM: u32 = 0xC000_0000;
/// Most requests of one IO: a piece of each entry that it touches.
const PIECES_MAX: u64 = 8;

/// A shard of the cluster.
struct Peer {
    addr: ShardAddr,
    place: SocketAddr,
    link: Link,
}

enum Link {
    Down { retry_at: Time },
    Connecting,
    Up(Box<PeerConn>),
}

/// What is open of an IO.
#[derive(Clone, Default)]
struct Progress {
    pieces: u64,
    error: Option<String>,
}

/// A client of one volume.
pub struct VolumeDriver {
    io: VolumeIo<IoBuf>,
    volume: VolumeId,
    /// As it was when this client attached: a take-over ends it.
    epoch: SessionEpoch,
    bytes: u64,
    peers: Vec<Peer>,
    hello: Hello,
    slots: Slots,
    progress: Vec<Progress>,
    control: Control,
    completions: Vec<Completion>,
}

impl VolumeDriver {
    /// Asks the MDS for the map and the volume. `job` tells the clients of one process apart.
    ///
    /// # Errors
    /// The MDS cannot be reached, or knows no such volume.
    pub fn open(ring: &mut Ring, mds: &str, name: &str, job: u32) -> anyhow::Result<Self> {
        let (control, map) = Control::start(mds, ring.waker())?;
        let (volume, entry) =
            map.volume_named(name).with_context(|| format!("the cluster has no volume `{name}`"))?;
        let session = &entry.session;
        anyhow::ensure!(
            session.admits(""),
            "volume `{name}` is attached exclusively by {}; `ashlar volume detach {name} --holder {}` lets it go",
            session.holder,
            session.holder
        );
        let epoch = session.epoch;
        let me = ShardAddr {
            target: TargetId(CLIENTS_FROM | (ring.random() as u32 & !CLIENTS_FROM)),
            shard: job as u16,
        };
        let hello = Hello { cluster: map.cluster, from: me, to: me, incarnation: ring.random() };
        let (bytes, slots) = (entry.bytes, Slots::default());
        let (io, peers, progress) = (VolumeIo::new(Config::default()), Vec::new(), Vec::new());
        let completions = Vec::new();
        let mut driver =
            Self { io, volume, epoch, bytes, peers, hello, slots, progress, control, completions };
        driver.set_map(map, ring.now());
        Ok(driver)
    }

    fn set_map(&mut self, map: ClusterMap, now: Time) {
        for (target, entry) in &map.targets {
            for (shard, place) in entry.peers.iter().enumerate() {
                let addr = ShardAddr { target: *target, shard: shard as u16 };
                match self.peers.iter_mut().find(|peer| peer.addr == addr) {
                    Some(peer) => peer.place = *place,
                    None => {
                        self.peers.push(Peer { addr, place: *place, link: Link::Down { retry_at: now } });
                    }
                }
            }
        }
        self.control.known = map.generation;
        self.io.set_map(Arc::new(map), now);
    }

    /// Everything that can be done now.
    fn work(&mut self, ring: &mut Ring, now: Time, done: &mut Vec<Done>) -> anyhow::Result<()> {
        while let Ok(told) = self.control.told.try_recv() {
            match told {
                Told::Map(map) => self.set_map(map, now),
                Told::Refused(segment) => self.io.segment_refused(self.volume, segment),
                Told::Granted(segment) => self.io.segment_granted(self.volume, segment),
            }
        }
        self.connect(ring, now);
        self.io.tick(now);
        self.actions(ring, now, done)?;
        for at in 0..self.peers.len() {
            self.pump(ring, at, now);
        }
        self.actions(ring, now, done)
    }

    fn connect(&mut self, ring: &mut Ring, now: Time) {
        for (index, peer) in self.peers.iter_mut().enumerate() {
            if matches!(peer.link, Link::Down { retry_at } if retry_at <= now) {
                peer.link = Link::Connecting;
                let token = Owner { kind: CONNECTING, index: index as u32 }.token(0);
                ring.submit(token, Op::Connect { addr: Addr::Tcp(peer.place) });
            }
        }
    }

    fn dispatch(&mut self, ring: &mut Ring, completion: Completion, now: Time) {
        let Owner { kind, index } = Owner::split(completion.token).0;
        let (at, hello) = (index as usize, self.hello);
        let Some(peer) = self.peers.get_mut(at) else { return };
        match (kind, &mut peer.link) {
            (CONNECTING, link) => {
                let owner = Owner { kind: LINK, index };
                let greeted = match completion.result {
                    Ok(Output::Connected { socket }) => {
                        let hello = Hello { to: peer.addr, ..hello };
                        PeerConn::connected(ring, socket, owner, PeerLimits::default(), hello)
                    }
                    _ => None,
                };
                *link = match greeted {
                    Some(conn) => Link::Up(Box::new(conn)),
                    None => Link::Down { retry_at: now + RETRY },
                };
            }
            (_, Link::Up(conn)) => {
                let mut events = Vec::new();
                conn.on_completion(ring, completion, &mut events);
                self.events(at, events, now);
            }
            _ => {}
        }
        self.pump(ring, at, now);
    }

    fn pump(&mut self, ring: &mut Ring, at: usize, now: Time) {
        let Link::Up(conn) = &mut self.peers[at].link else { return };
        if conn.needs_pump() {
            let mut events = Vec::new();
            conn.pump(ring, &mut events);
            self.events(at, events, now);
        }
        if matches!(&self.peers[at].link, Link::Up(conn) if conn.is_done()) {
            self.peers[at].link = Link::Down { retry_at: now + RETRY };
        }
    }

    fn events(&mut self, at: usize, events: Vec<PeerEvent>, now: Time) {
        let from = self.peers[at].addr;
        for event in events {
            match event {
                PeerEvent::Hello(_) => self.io.link_up(from, now),
                PeerEvent::Closed { .. } => self.io.link_down(from, now),
                PeerEvent::Message { message: PeerMessage::IoReply(mut reply), payload } => {
                    if let IoOutcome::Data { crcs, .. } = &reply.outcome
                        && !blocks(&payload)
                            .map(|block| crc_at_rest(block_crc(block)))
                            .eq(crcs.iter().copied())
                    {
                        // Damaged on its way: asked again, as if the leader had been busy.
                        reply.outcome = IoOutcome::Busy;
                    }
                    let payload = payload.into_iter().map(IoBuf::whole).collect();
                    self.io.reply(from, reply, payload, now);
                }
                PeerEvent::Message { .. } => {}
            }
        }
    }

    /// Carries out what the routing decided.
    fn actions(&mut self, ring: &mut Ring, now: Time, done: &mut Vec<Done>) -> anyhow::Result<()> {
        while let Some(action) = self.io.poll() {
            match action {
                Action::Send { to, request, payload } => {
                    let at = self.peers.iter().position(|peer| peer.addr == to);
                    let at = at.with_context(|| format!("a message for {to:?}, which is not in the map"))?;
                    self.send(ring, at, &PeerMessage::Io(request), payload, now);
                }
                Action::ReadPiece { id, offset, present, length, payload, .. } => {
                    let pending = self.slots.of((id / PIECES_MAX) as u32)?;
                    let from = (offset - pending.io.offset) as usize;
                    let into = pending.buf.as_mut().context("a read without memory")?;
                    let into = &mut into[from..from + length as usize];
                    let mut came = payload.iter().flat_map(|run| run.bytes().chunks_exact(BLOCK_BYTES));
                    for (nth, block) in into.chunks_exact_mut(BLOCK_BYTES).enumerate() {
                        match present >> nth & 1 {
                            1 => block.copy_from_slice(came.next().context("a read lacks data")?),
                            _ => block.fill(0),
                        }
                    }
                }
                Action::Done { id, result } => {
                    self.ended((id / PIECES_MAX) as u32, result.map_err(|error| error.to_string()), done)?;
                }
                Action::StatusDone { .. } => {}
                Action::NeedMap => self.control.ask(Ask::Map { known: self.control.known }),
                Action::FirstWrite { segment, .. } => {
                    self.control.ask(Ask::Segment { volume: self.volume, segment });
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, ring: &mut Ring, at: usize, message: &PeerMessage, data: Option<IoBuf>, now: Time) {
        let Peer { addr, link: Link::Up(conn), .. } = &mut self.peers[at] else { return };
        if conn.send(message, data).is_err() {
            let (addr, mut events) = (*addr, Vec::new());
            conn.close(ring, &mut events);
            self.io.link_down(addr, now);
        }
    }

    /// A piece of an IO has ended.
    fn ended(&mut self, slot: u32, result: Result<(), String>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let progress = &mut self.progress[slot as usize];
        progress.pieces -= 1;
        if let Err(error) = result {
            progress.error.get_or_insert(error);
        }
        if progress.pieces == 0 {
            let result = progress.error.take().map_or(Ok(()), Err);
            self.slots.answer(slot, result, done)?;
        }
        Ok(())
    }
}

/// The blocks that came, in order.
fn blocks(payload: &[Buf]) -> impl Iterator<Item = &[u8]> {
    payload.iter().flat_map(|run| run.chunks_exact(BLOCK_BYTES))
}

impl Driver for VolumeDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, ring: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let (now, volume, id) = (ring.now(), self.volume, u64::from(slot) * PIECES_MAX);
        if self.progress.len() <= slot as usize {
            self.progress.resize(slot as usize + 1, Progress::default());
        }
        let mut requests = Vec::new();
        match self.slots.begin(slot, io, buf) {
            None => requests.push(Request::Read { volume, offset: io.offset, length: io.bytes }),
            Some(data) => {
                // A write is cut where entries end.
                let (mut at, end) = (io.offset, io.offset + io.bytes);
                while at < end {
                    let entry = ENTRY_BYTES_MAX as u64;
                    let to = ((at / entry + 1) * entry).min(end);
                    let part = (at - io.offset) as usize..(to - io.offset) as usize;
                    let (crc, length) = (block_crc(&data[part.clone()]), part.len() as u32);
                    let payload = IoBuf::part(data.clone(), part);
                    requests.push(Request::WritePiece { volume, offset: at, length, crc, payload });
                    at = to;
                }
            }
        }
        self.progress[slot as usize].pieces = requests.len() as u64;
        for (nth, request) in requests.into_iter().enumerate() {
            if let Err(error) = self.io.submit(id + nth as u64, self.epoch, request, now) {
                // Told as a piece that ended, at the next turn.
                self.control.refusals.push((slot, error.to_string()));
            }
        }
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        for (slot, error) in std::mem::take(&mut self.control.refusals) {
            self.ended(slot, Err(error), done)?;
        }
        let now = ring.now();
        self.work(ring, now, done)?;
        let retry = self.peers.iter().filter_map(|peer| match peer.link {
            Link::Down { retry_at } => Some(retry_at),
            _ => None,
        });
        let limit = retry.chain(self.io.next_timeout()).chain(deadline).min();
        let limit = if done.is_empty() { limit } else { Some(now) };
        let mut completions = std::mem::take(&mut self.completions);
        ring.turn(limit, &mut completions);
        let now = ring.now();
        for completion in completions.drain(..) {
            self.dispatch(ring, completion, now);
        }
        self.completions = completions;
        self.work(ring, now, done)?;
        self.slots.settle(done);
        Ok(())
    }
}

/// What the MDS is asked for, on a thread beside.
enum Ask {
    Map { known: u64 },
    Segment { volume: VolumeId, segment: u32 },
}

/// What it answered.
enum Told {
    Map(ClusterMap),
    Refused(u32),
    Granted(u32),
}

/// The way to the MDS.
struct Control {
    ask: Sender<Ask>,
    told: Receiver<Told>,
    known: u64,
    /// Requests that were not taken at all.
    refusals: Vec<(u32, String)>,
}

impl Control {
    /// Fetches the map, then answers questions until this is dropped.
    fn start(mds: &str, waker: Waker) -> anyhow::Result<(Self, ClusterMap)> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mds = mds.to_owned();
        let (ask, asked) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let client = runtime.block_on(async { MdsClient::new(&mds, Patience::default()) });
        let client = client.map_err(in_words)?;
        let map = runtime.block_on(client.map_now()).map_err(in_words)?;
        std::thread::spawn(move || {
            for question in asked {
                if let Some(answer) = runtime.block_on(answer(&client, question)) {
                    let _ = tell.send(answer);
                    waker.wake();
                }
            }
        });
        let known = map.generation;
        Ok((Self { ask, told, known, refusals: Vec::new() }, map))
    }

    fn ask(&self, question: Ask) {
        // The thread ends after this does.
        let _ = self.ask.send(question);
    }
}

fn in_words(problem: Problem) -> anyhow::Error {
    anyhow::anyhow!("{}: {}; {}", problem.what, problem.cause, problem.fix)
}

/// What cannot be answered now is asked again by the routing.
async fn answer(client: &MdsClient, question: Ask) -> Option<Told> {
    match question {
        Ask::Map { known } => client.map_newer_than(known).await.ok()?.0.map(Told::Map),
        Ask::Segment { volume, segment } => match client.allocate(volume, &[segment]).await {
            Err(problem) if problem.kind == ProblemKind::NoSpace => Some(Told::Refused(segment)),
            Ok(_) => Some(Told::Granted(segment)),
            Err(_) => None,
        },
    }
}
