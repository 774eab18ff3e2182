//! The loop of one core: completions in, one round of work, everything out.
//!
//! ```text
//! reactor.turn -> completions -> disk | links | export          (what happened)
//!              -> control queue, timers                         (what is wanted)
//!              -> shard.settle, export.drain, until quiet       (what follows)
//!              -> store ops, link and client sends              (what goes out)
//! ```
//!
//! Everything that one turn brings goes out together: one log batch, one send a connection.
//! Generic over the reactor, so the simulator runs this very loop.

use crate::control::{FromShard, ShardPort, ToShard};
use crate::disk::DiskDriver;
use crate::export::{ConnInfo, Export, ExportOut};
use crate::links::{LinkEvent, Links};
use crate::mem::{Mem, Mems};
use crate::shard::{CopysetStanding, Counts, Origin, Output, Shard};
use crate::siblings::Guest;
use crate::spread::Place;
use crate::standing::{self, Snapshot};
use crate::usage::Usage;
use chunkstore::Layout;
use protocol::control::{Problem, ProblemKind, pb, protocol_to_pb};
use protocol::peer::PeerMessage;
use protocol::types::{ChunkId, CopysetId, LogIndex, SessionEpoch, Span, Time, VolumeId};
use reactor::host::{CoreLoop, Turn};
use reactor::{Completion, IoError, Listener, Op, Output as Done, Reactor, Socket};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use transport::Owner;

/// Kinds of tokens: whose a completion is.
pub mod kind {
    /// The store's operations.
    pub const DISK: u8 = 1;
    /// Peer links.
    pub const LINK: u8 = 2;
    /// Connects to peers.
    pub const CONNECT: u8 = 3;
    /// NBD clients.
    pub const NBD: u8 = 4;
    /// Accepts; the index is the place in the list of listeners.
    pub const ACCEPT: u8 = 5;
    /// NVMe/TCP hosts.
    pub const NVME: u8 = 6;
}

/// How often clocks of connections are looked at and the standing is published.
const SLOW_TICK: Span = Span::ms(1_000);
/// How soon what waits for memory is tried again when nothing else happens.
const STARVED_RETRY: Span = Span::ms(1);
/// Blocks dropped from memory when something starves: 1 MiB at a time.
const EVICT_BLOCKS: usize = 256;
/// The longest wait for a graceful end before the loop gives up on it.
const STOP_WITHIN: Span = Span::ms(5_000);

/// What a link queues at most, and the last message that it takes.
const LINK_BYTES_MAX: usize = (64 << 20) + (2 << 20);

/// The job number of scrubs, whose results nobody waits for.
const SCRUB: u64 = 0;

/// What a listener is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Port {
    /// Other shards.
    Peer,
    /// NBD clients.
    Nbd,
    /// NVMe/TCP hosts, to volumes and for discovery alike.
    Nvme,
}

/// One core of a target.
pub struct Core<R: Reactor> {
    reactor: R,
    shard: Shard,
    disk: DiskDriver,
    links: Links,
    export: Export,
    port: ShardPort,
    layout: Layout,
    shard_index: u16,
    peer: String,
    stop: Arc<AtomicBool>,
    listeners: Vec<(Port, Listener)>,
    /// Listeners whose accept failed, to be tried again at the next slow tick.
    accept_again: Vec<usize>,
    completions: Vec<Completion>,
    /// From the links; empty between turns.
    heard: Vec<LinkEvent>,
    slow_at: Time,
    stopping: Option<Time>,
    stopped: bool,
}

impl<R: Reactor> Core<R> {
    #[expect(clippy::too_many_arguments, reason = "its parts, each made once, in one place")]
    /// A core around its parts; accepts on its listeners from now on.
    pub fn new(
        mut reactor: R,
        shard: Shard,
        disk: DiskDriver,
        links: Links,
        export: Export,
        port: ShardPort,
        listeners: Vec<(Port, Listener)>,
        layout: Layout,
        stop: Arc<AtomicBool>,
    ) -> Self {
        for (index, (_, listener)) in listeners.iter().enumerate() {
            accept(&mut reactor, index, *listener);
        }
        port.seat().join();
        port.spread().open();
        Self {
            slow_at: reactor.now(),
            shard_index: shard.me().shard,
            peer: peer_address(&reactor, &listeners),
            layout,
            stop,
            reactor,
            shard,
            disk,
            links,
            export,
            port,
            listeners,
            accept_again: Vec::new(),
            completions: Vec::new(),
            heard: Vec::new(),
            stopping: None,
            stopped: false,
        }
    }

    /// Wakes it from any thread.
    pub fn waker(&self) -> reactor::Waker {
        self.reactor.waker()
    }

    /// How every copyset here stands.
    pub fn standings(&self) -> Vec<CopysetStanding> {
        self.shard.standings()
    }

    /// What it holds in memory, and what bounds that.
    pub fn usage(&self) -> Vec<Usage> {
        let arena = self.reactor.arena();
        let [requests, pieces, reads] = self.export.load();
        let (bytes, parcels) = self.links.queued();
        let mut usage = vec![
            Usage::new("blocks of the arena", arena.used_blocks(), arena.capacity_blocks()),
            Usage::new("requests of hosts", requests.0, requests.1),
            Usage::new("pieces of requests in flight", pieces.0, pieces.1),
            Usage::new("bytes of reads in flight", reads.0, reads.1),
            Usage::new("bytes queued for a peer", bytes, LINK_BYTES_MAX),
            // Requests of our hosts, and answers to those of the sibling's.
            Usage::new("parcels that wait for a sibling", parcels, 2 * pieces.1),
        ];
        usage.extend(self.shard.usage(&self.layout));
        usage
    }

    /// The replicas here, in order.
    pub fn replicas(&self) -> impl Iterator<Item = (CopysetId, &copyset::Replica)> {
        self.shard.replicas()
    }

    /// The replica of a copyset, if it is here.
    pub fn replica(&self, id: CopysetId) -> Option<&copyset::Replica> {
        self.shard.replica(id)
    }

    /// What the store has counted since it was opened.
    pub fn store_stats(&self) -> chunkstore::Stats {
        self.shard.store_stats()
    }

    /// What the shard has counted since its start.
    pub fn counts(&self) -> &Counts {
        self.shard.counts()
    }

    /// The chunks that a copyset holds here.
    pub fn chunks_of(&self, id: CopysetId) -> Vec<ChunkId> {
        self.shard.chunks_of(id)
    }

    /// The payload of an entry of the log, where it is in memory.
    pub fn entry_payload(&self, id: CopysetId, index: LogIndex) -> chunkstore::EntryPayload<Mem> {
        self.shard.entry_payload(id, index)
    }

    fn deadline(&self) -> Option<Time> {
        let starved = self.disk.is_starved() || self.links.is_starved() || self.export.is_starved();
        let waiting = starved || self.port.is_behind() || self.links.is_behind();
        let retry = waiting.then(|| self.reactor.now() + STARVED_RETRY);
        [Some(self.slow_at), self.shard.next_timeout(), self.links.next_timeout(), retry]
            .into_iter()
            .chain([self.export.next_timeout(), self.stopping])
            .flatten()
            .min()
    }

    fn dispatch(&mut self, completion: Completion, now: Time) {
        let (owner, _) = Owner::split(completion.token);
        let reactor = &mut self.reactor;
        match owner.kind {
            kind::DISK => self.disk.on_completion(reactor, completion),
            kind::LINK => self.links.on_completion(reactor, completion),
            kind::CONNECT => self.links.connected(reactor, completion),
            kind::NBD => self.export.on_completion(reactor, completion, now),
            kind::NVME => self.export.on_completion_nvme(reactor, completion, now),
            kind::ACCEPT => self.accepted(owner.index as usize, completion.result),
            _ => {}
        }
    }

    fn accepted(&mut self, index: usize, result: Result<Done, IoError>) {
        let Some((port, listener)) = self.listeners.get(index).copied() else { return };
        match result {
            Ok(Done::Accepted { socket, .. }) => {
                match port {
                    Port::Peer => self.links.accepted(&mut self.reactor, socket),
                    Port::Nbd | Port::Nvme => self.host_came(port, socket),
                }
                accept(&mut self.reactor, index, listener);
            }
            Ok(_) => accept(&mut self.reactor, index, listener),
            Err(error) => {
                if self.stopping.is_none() {
                    tracing::warn!(%error, "accept failed; tried again in a second. Is the limit of open files (ulimit -n) too low?");
                }
                self.accept_again.push(index);
            }
        }
    }

    /// A host has connected: it is served here, or by the shard that has fewer.
    fn host_came(&mut self, port: Port, socket: Socket) {
        let place = self.port.spread().place();
        if place.shard() == self.shard_index {
            return self.serve(port, socket, place);
        }
        match self.reactor.give_away(socket) {
            Ok(socket) => {
                let guest = Guest { port, socket, place };
                if let Err(Guest { socket, .. }) = self.links.send_guest(guest) {
                    self.take_in(port, socket, self.port.spread().here());
                }
            }
            Err(_) => self.serve(port, socket, self.port.spread().here()),
        }
    }

    /// Serves a host whose socket is another shard's no more.
    fn take_in(&mut self, port: Port, socket: OwnedFd, place: Place) {
        match self.reactor.adopt_socket(socket) {
            Ok(socket) => self.serve(port, socket, place),
            Err(error) => {
                tracing::warn!(%error, "a connection between two shards is lost; the host connects again")
            }
        }
    }

    fn serve(&mut self, port: Port, socket: Socket, place: Place) {
        match port {
            Port::Nvme => self.export.accepted_nvme(&mut self.reactor, socket, place),
            Port::Nbd | Port::Peer => self.export.accepted(&mut self.reactor, socket, place),
        }
    }

    /// What the control side wants.
    fn control(&mut self, now: Time) {
        while let Some(wanted) = self.port.take() {
            match wanted {
                ToShard::Map(map) => {
                    self.links.set_map(&map, now);
                    self.shard.set_map(map.clone(), now);
                    self.export.set_map(map, now);
                }
                ToShard::Checksums { volume, verify, reply } => {
                    let job = self.port.open_check(reply);
                    self.shard.check_volume(job, Some(volume), verify);
                }
                ToShard::Scrub { volume } => {
                    self.shard.check_volume(SCRUB, volume, true);
                }
                ToShard::TransferLeader { copyset, to, reply } => {
                    let done = self.shard.transfer_leadership(copyset, to, now);
                    let _ = reply.send(done.map_err(|why| not_transferred(copyset.0, why)));
                }
                ToShard::Orders(orders) => self.shard.follow_orders(&orders, now),
                ToShard::SegmentRefused { volume, segment } => {
                    self.export.volume().segment_refused(volume, segment);
                }
                ToShard::SegmentGranted { volume, segment } => {
                    self.export.volume().segment_granted(volume, segment);
                }
                ToShard::Fence { volume, epoch, reply } => {
                    let job = self.port.open_fence(reply);
                    self.export.fence(job, volume, epoch, now);
                }
                ToShard::Connections { reply } => {
                    let _ = reply.send(self.connections());
                }
                ToShard::Stop => self.stop(now),
            }
        }
        if self.stop.load(Ordering::Relaxed) {
            self.stop(now);
        }
    }

    fn connections(&self) -> Vec<pb::Connection> {
        let told = |conn: ConnInfo| pb::Connection {
            id: conn.id,
            shard: self.shard_index.into(),
            protocol: protocol_to_pb(conn.protocol).into(),
            volume: conn.volume.0,
            in_flight: conn.in_flight as u32,
            host: conn.host,
            queue: conn.queue.into(),
            header_digest: conn.digests.0,
            data_digest: conn.digests.1,
            epoch: conn.epoch.0,
            ..pb::Connection::default()
        };
        self.export.connections().map(told).collect()
    }

    /// Hosts that say who they are, each once a volume.
    fn attached(&self) -> BTreeSet<(VolumeId, SessionEpoch, String)> {
        let named = self.export.connections().filter(|conn| !conn.host.is_empty() && conn.volume.0 != 0);
        named.map(|conn| (conn.volume, conn.epoch, conn.host)).collect()
    }

    fn stop(&mut self, now: Time) {
        if self.stopping.is_none() {
            self.stopping = Some(now + STOP_WITHIN);
            self.export.stop();
            self.shard.stop();
        }
    }

    fn tick(&mut self, now: Time) {
        self.shard.tick(now);
        self.links.tick(&mut self.reactor, now);
        self.export.volume().tick(now);
        if now >= self.slow_at {
            self.slow_at = now + SLOW_TICK;
            self.links.tick_slow(&mut self.reactor, now);
            self.export.tick_slow(&mut self.reactor, now);
            for index in std::mem::take(&mut self.accept_again) {
                accept(&mut self.reactor, index, self.listeners[index].1);
            }
            self.publish();
        }
        if self.stopping.is_some_and(|limit| now >= limit) {
            tracing::warn!(
                "the disk did not settle in time; stopping without a last checkpoint. Nothing is lost: the log is replayed at the next start"
            );
            self.stopped = true;
        }
    }

    fn publish(&mut self) {
        let arena = self.reactor.arena();
        let now = Snapshot {
            shard_index: self.shard_index,
            peer: self.peer.clone(),
            shard: *self.shard.counts(),
            store: self.shard.store_stats(),
            export: *self.export.counts(),
            reactor: self.reactor.stats(),
            standings: self.shard.standings(),
            volumes: self.shard.volume_slots(),
            connections: self.export.connections().count(),
            attached: self.attached(),
            arena_blocks: (arena.used_blocks(), arena.capacity_blocks()),
            slots_max: self.layout.slots_max,
            segment_bytes: u64::from(self.layout.segment_bytes),
            failed: self.shard.has_failed(),
        };
        standing::publish(&self.port, &now);
    }

    /// Works until nothing follows from anything any more, then lets it all out.
    fn work(&mut self, now: Time) {
        if self.disk.is_starved() || self.links.is_starved() || self.export.is_starved() {
            self.shard.evict(EVICT_BLOCKS);
            self.disk.retry(&mut self.reactor);
        }
        loop {
            self.settle(now);
            self.links.pump(&mut self.reactor);
            // Siblings' parcels may have come just now. A read among them must not be judged by a lease that held earlier: this
            // thread may have been stopped meanwhile for longer than the lease lasted.
            let now = self.reactor.now();
            self.link_events(now);
            let clients = self.export.pump(&mut self.reactor, now);
            let mut any = clients | self.settle(now);
            while let Some(op) = self.shard.poll_op(now) {
                if let Some(pieces) = self.disk.run(&mut self.reactor, op) {
                    self.shard.take_back(pieces);
                }
                any = true;
            }
            while let Some((ticket, result)) = self.disk.poll() {
                self.shard.store_completed(ticket, result, now);
                any = true;
            }
            if !any {
                break;
            }
        }
    }

    /// Carries messages between shard, export and links until all three are quiet.
    fn settle(&mut self, now: Time) -> bool {
        let mut any = false;
        loop {
            self.shard.settle();
            let mut again = self.export.drain(now);
            while let Some(output) = self.shard.poll() {
                again = true;
                self.shard_output(output, now);
            }
            while let Some(out) = self.export.poll() {
                again = true;
                self.export_output(out, now);
            }
            if !again {
                return any;
            }
            any = true;
        }
    }

    fn link_events(&mut self, now: Time) {
        let mut events = std::mem::take(&mut self.heard);
        self.links.take_events(&mut events);
        for event in events.drain(..) {
            match event {
                LinkEvent::Up(peer) => self.export.volume().link_up(peer, now),
                LinkEvent::Down(peer) => {
                    self.export.volume().link_down(peer, now);
                    self.shard.peer_lost(peer, now);
                }
                LinkEvent::Guest(Guest { port, socket, place }) => self.take_in(port, socket, place),
                LinkEvent::Message { from, message: PeerMessage::IoReply(reply), payload, .. } => {
                    self.export.reply(from, reply, payload, now);
                }
                LinkEvent::Message { from, incoming, message, payload } => {
                    let origin = incoming.map_or(Origin::Local, Origin::Link);
                    self.shard.handle(origin, from, message, payload, now);
                }
            }
        }
        self.heard = events;
    }

    fn shard_output(&mut self, output: Output, now: Time) {
        match output {
            Output::Send { to, message, payload } => {
                self.links.send(to, &message, &payload);
            }
            Output::Answer { origin: Origin::Link(serial), message, payload } => {
                self.links.answer(serial, &message, &payload);
            }
            Output::Answer { origin: Origin::Local, message, payload } => {
                if let PeerMessage::IoReply(reply) = message {
                    self.export.reply(self.shard.me(), reply, payload, now);
                }
            }
            Output::Checked { job, chunk } => {
                self.port.checked(job, chunk.as_ref().map(standing::record));
            }
            Output::Freed { volume } => {
                self.port.tell(FromShard::Freed { volume });
            }
            Output::Failed { why } => {
                tracing::error!(
                    why,
                    "the disk failed: this shard refuses all further work; its replicas elsewhere serve on. Replace the disk, then format and start again"
                );
                self.port.tell(FromShard::Failed { why });
            }
            Output::Stopped => self.stopped = true,
        }
    }

    fn export_output(&mut self, out: ExportOut, now: Time) {
        match out {
            ExportOut::Send { to, request, payload } => {
                let payload: Mems = payload.into_iter().collect();
                let message = PeerMessage::Io(request);
                if to == self.shard.me() {
                    self.shard.handle(Origin::Local, to, message, payload, now);
                } else if !self.links.send(to, &message, &payload) {
                    // Lost with its link, which is made anew (see `client::volume`).
                    self.links.cut_own(&mut self.reactor, to);
                    self.export.volume().link_down(to, now);
                }
            }
            ExportOut::Fenced { job, result } => {
                self.port.fenced(job, result.map_err(|why| not_fenced(&why)));
            }
            ExportOut::NeedMap => self.port.tell(FromShard::NeedMap),
            ExportOut::FirstWrite { volume, segment } => {
                self.port.tell(FromShard::FirstWrite { volume, segment });
            }
        }
    }
}

impl<R: Reactor> CoreLoop for Core<R> {
    fn turn(&mut self) -> Turn {
        let deadline = self.deadline();
        let mut completions = std::mem::take(&mut self.completions);
        self.reactor.awaits_reads(self.export.reads_under_way());
        self.reactor.turn(deadline, &mut completions);
        let now = self.reactor.now();
        for completion in completions.drain(..) {
            self.dispatch(completion, now);
        }
        self.completions = completions;
        while let Some((ticket, result)) = self.disk.poll() {
            self.shard.store_completed(ticket, result, now);
        }
        self.control(now);
        self.link_events(now);
        self.tick(now);
        self.work(now);
        if self.stopped { Turn::Stop } else { Turn::Continue }
    }
}

fn accept<R: Reactor>(reactor: &mut R, index: usize, listener: Listener) {
    let token = Owner { kind: kind::ACCEPT, index: index as u32 }.token(0);
    reactor.submit(token, Op::Accept { listener });
}

fn not_fenced(why: &str) -> Problem {
    Problem::new(
        ProblemKind::NotReady,
        "the volume's fence has not risen in all of its copysets",
        why,
        "repeat; where another host has taken the volume over meanwhile, see `ashlar volume show`",
    )
}

fn not_transferred(copyset: u32, why: String) -> Problem {
    Problem::new(
        ProblemKind::NotReady,
        format!("leadership of copyset {copyset} was not handed over"),
        why,
        "ask the target that leads it (`ashlar status`), and name one whose replica is whole",
    )
}

/// Where other shards reach this one.
fn peer_address<R: Reactor>(reactor: &R, listeners: &[(Port, Listener)]) -> String {
    let peer = listeners.iter().find(|(port, _)| *port == Port::Peer);
    peer.and_then(|(_, l)| reactor.listener_addr(*l).ok()).map_or(String::new(), |addr| addr.to_string())
}
