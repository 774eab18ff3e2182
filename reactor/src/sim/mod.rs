//! The seeded reactor: the same trait over virtual time, in one thread.
//!
//! A [`SimWorld`] owns the disks of N nodes and the network between them, and decides by its
//! seed when each op completes. The harness turns loops as the world says:
//!
//! ```text
//! let mut reactor = world.start(node);              // a fresh reactor: start-up or restart
//! while let Some(node) = world.step(until) { loops[node].turn() }
//! world.crash(node);                                // drop its loop too
//! ```
//!
//! A simulated `turn` never waits: it hands out what is ready and notes the deadline. A node
//! is stepped again while its turns find something, and then when an op completes, its
//! deadline comes or it is woken. Each turn takes 1 us of virtual time, so a loop that never
//! sleeps still lets the world go on.
//!
//! Invariants: the same seed and the same calls give the same trace ([`SimWorld::trace`]);
//! bytes of a connection arrive in order; what a node did before a crash completes nowhere
//! after it.
//!
//! Deliberately absent: processor time of the loops, packet loss within a connection (TCP
//! hides it; a partition only delays), listeners inherited from a parent.

mod disk;
mod net;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use protocol::types::{Span, Time};

use crate::api::{
    Addr, Completion, Disk, File, IoBuf, IoError, IoList, Listener, Op, OpenOptions, Output, Reactor, Socket,
    Stats, Waker, list_len,
};
use crate::arena::{Arena, BufMut};
use crate::ring::split_mix;
use disk::{SimDisk, SyncPoint};
use net::{Net, NetEvent};

/// Virtual time of one turn.
const TURN_NS: u64 = 1_000;

/// How often a node's disk misbehaves, in ppm of its ops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Reads that fail with EIO.
    pub read_error_ppm: u32,
    /// Reads that return one bit wrong (the disk keeps the right one).
    pub read_flip_ppm: u32,
    /// Writes that fail with EIO after writing any of their sectors.
    pub write_error_ppm: u32,
    /// Syncs that fail with EIO, syncing nothing.
    pub sync_error_ppm: u32,
    /// Writes to chunk files that are told as done and never happen.
    pub lost_write_ppm: u32,
    /// Writes to chunk files that land 4 KiB beside their place.
    pub misdirect_ppm: u32,
    /// Ops that take 100 times as long.
    pub slow_ppm: u32,
    /// The file system is full: files that were made before can be written, none can be made or grow.
    pub is_full: bool,
}

/// A node's clock: as monotonic as any, but with a beginning and a pace of its own.
#[derive(Debug, Clone, Copy)]
struct Clock {
    set_at: Time,
    shows: Time,
    /// Nanoseconds that it counts in a second, beyond a thousand million.
    drift_ppb: i64,
}

impl Clock {
    const TRUE: Self = Self { set_at: Time(0), shows: Time(0), drift_ppb: 0 };
    const SECOND: i128 = 1_000_000_000;

    fn local(&self, truth: Time) -> Time {
        let passed = i128::from(truth.0) - i128::from(self.set_at.0);
        let counted = passed * (Self::SECOND + i128::from(self.drift_ppb)) / Self::SECOND;
        Time((i128::from(self.shows.0) + counted) as u64)
    }

    /// The first moment at which it shows this.
    fn truth(&self, local: Time) -> Time {
        let count = (i128::from(local.0) - i128::from(self.shows.0)).max(0);
        let pace = Self::SECOND + i128::from(self.drift_ppb);
        let mut truth = Time((i128::from(self.set_at.0) + count * Self::SECOND / pace) as u64);
        while self.local(truth) < local {
            truth.0 += 1;
        }
        truth
    }
}

/// All nodes, their disks and the network. Clones are handles to the same world.
#[derive(Clone)]
pub struct SimWorld(Rc<RefCell<World>>);

struct World {
    now: Time,
    random: u64,
    nodes: Vec<Node>,
    events: BTreeMap<(Time, u64), Event>,
    next_seq: u64,
    net: Net,
    trace: u64,
    /// Scratch space of `step`.
    runnable: Vec<usize>,
}

struct Node {
    disk: SimDisk,
    faults: Faults,
    /// Counts the starts; what belongs to an earlier one is void.
    life: u32,
    running: bool,
    /// Stalled: it is not turned, while the world goes on.
    paused: bool,
    clock: Clock,
    random: u64,
    waker: Waker,
    queue: Vec<(u64, Op)>,
    ready: Vec<Completion>,
    /// Turned in vain: sleeps until its deadline, if it has one.
    asleep: Option<Option<Time>>,
    disk_ops: BTreeMap<u64, DiskOp>,
    /// Pages that reads returned with a bit inverted: whether of a chunk file, and where.
    altered: Vec<(bool, u64)>,
    stats: Stats,
}

/// A disk op under way.
struct DiskOp {
    token: u64,
    work: DiskWork,
}

enum DiskWork {
    Read { file: File, offset: u64, buf: BufMut, bytes: u32 },
    Write { file: File, offset: u64, bufs: IoList, dsync: bool },
    Sync { point: Result<SyncPoint, IoError> },
    Allocate { file: File, end: u64 },
}

enum Event {
    Disk { node: usize, life: u32, op: u64 },
    Net(NetEvent),
}

impl SimWorld {
    /// A world of `nodes` nodes with empty disks, none running.
    pub fn new(seed: u64, nodes: usize) -> Self {
        let mut random = seed;
        let nodes = (0..nodes).map(|_| Node::new(split_mix(&mut random))).collect();
        Self(Rc::new(RefCell::new(World {
            now: Time(1_000_000_000),
            random,
            nodes,
            events: BTreeMap::new(),
            next_seq: 0,
            net: Net::default(),
            trace: seed,
            runnable: Vec::new(),
        })))
    }

    /// Starts a node: its reactor, over the disk it left. It must not be running.
    pub fn start(&self, node: usize, arena_bytes: usize) -> Result<SimReactor, IoError> {
        let arena = Arena::new(arena_bytes)?;
        let mut world = self.0.borrow_mut();
        let state = &mut world.nodes[node];
        assert!(!state.running, "node {node} is running already");
        state.running = true;
        state.paused = false;
        state.life += 1;
        state.asleep = None;
        state.altered.clear();
        state.waker = Waker::simulated();
        state.stats = Stats::default();
        let (life, waker) = (state.life, state.waker.clone());
        Ok(SimReactor { world: self.clone(), node, life, arena, waker })
    }

    /// Cuts a node's power: ops under way complete nowhere, un-synced sectors are kept or lost by
    /// the seed, its connections are reset. Its old reactor is dead.
    pub fn crash(&self, node: usize) {
        self.0.borrow_mut().crash(node);
    }

    /// Advances to the next thing that concerns a running node, and returns that node to be
    /// turned; `None` when nothing is left to happen by `until`.
    pub fn step(&self, until: Time) -> Option<usize> {
        self.0.borrow_mut().step(until)
    }

    /// Virtual time.
    pub fn now(&self) -> Time {
        self.0.borrow().now
    }

    /// What a node's clock shows.
    pub fn clock(&self, node: usize) -> Time {
        let world = self.0.borrow();
        world.nodes[node].clock.local(world.now)
    }

    /// A random number of the world's own, for the harness.
    pub fn random(&self) -> u64 {
        split_mix(&mut self.0.borrow_mut().random)
    }

    /// A fingerprint of all that has completed so far, and when.
    pub fn trace(&self) -> u64 {
        self.0.borrow().trace
    }

    /// Sets how a node's disk misbehaves from now on.
    pub fn set_faults(&self, node: usize, faults: Faults) {
        self.0.borrow_mut().nodes[node].faults = faults;
    }

    /// Gives a node a clock that shows `shows` now and gains `drift_ppb` nanoseconds a second.
    pub fn set_clock(&self, node: usize, shows: Time, drift_ppb: i64) {
        let mut world = self.0.borrow_mut();
        let set_at = world.now;
        world.nodes[node].clock = Clock { set_at, shows, drift_ppb };
    }

    /// Makes the sector that holds a bit of a file unreadable, until it is written again.
    pub fn break_sector(&self, node: usize, path: &Path, bit: u64) -> Result<(), IoError> {
        self.0.borrow_mut().nodes[node].disk.break_sector(path, bit)
    }

    /// Times that a node's disk told a wrong bit, an error of a broken sector, or did a write
    /// elsewhere or not at all.
    pub fn lies(&self, node: usize) -> u64 {
        self.0.borrow().nodes[node].disk.lies
    }

    /// Pages that a node's reads returned with a bit inverted since this was last asked: whether of a
    /// chunk file, and at which offset.
    pub fn take_altered(&self, node: usize) -> Vec<(bool, u64)> {
        std::mem::take(&mut self.0.borrow_mut().nodes[node].altered)
    }

    /// Inverts one bit of a file at rest.
    pub fn flip_bit(&self, node: usize, path: &Path, bit: u64) -> Result<(), IoError> {
        self.0.borrow_mut().nodes[node].disk.flip(path, bit)
    }

    /// A bit, drawn by the seed, of what was ever written to a file (and is not all zeroes);
    /// `None` when there is nothing.
    pub fn some_bit(&self, node: usize, path: &Path) -> Option<u64> {
        let mut world = self.0.borrow_mut();
        let random = split_mix(&mut world.random);
        world.nodes[node].disk.some_bit(path, random)
    }

    /// Stalls a node as SIGSTOP or a frozen machine would: its loop is not turned, while what was
    /// begun goes on and time passes.
    pub fn pause(&self, node: usize) {
        self.0.borrow_mut().nodes[node].paused = true;
    }

    /// Lets a stalled node go on.
    pub fn resume(&self, node: usize) {
        self.0.borrow_mut().nodes[node].paused = false;
    }

    /// Whether a node runs, stalled or not.
    pub fn is_running(&self, node: usize) -> bool {
        self.0.borrow().nodes[node].running
    }

    /// Stops all traffic between two nodes: bytes wait, connects time out.
    pub fn partition(&self, a: usize, b: usize) {
        self.partition_one_way(a, b);
        self.partition_one_way(b, a);
    }

    /// Stops what `from` sends to `to`; connects time out either way.
    pub fn partition_one_way(&self, from: usize, to: usize) {
        self.0.borrow_mut().net.partition(from, to);
    }

    /// Makes all that two nodes send each other take so much longer from now on.
    pub fn slow_link(&self, a: usize, b: usize, extra: Span) {
        self.0.borrow_mut().net.slow(a, b, extra);
    }

    /// Lets traffic between two nodes flow again, both ways; what waited is delivered.
    pub fn heal(&self, a: usize, b: usize) {
        let mut world = self.0.borrow_mut();
        let held = world.net.heal(a, b);
        for event in held {
            world.net_event(event);
        }
    }

    /// From now on so many of a million sends between nodes below `below` arrive with a bit inverted.
    pub fn flip_on_the_wire(&self, ppm: u32, below: usize) {
        self.0.borrow_mut().net.flips = (ppm, below);
    }

    /// Sends that arrived with a bit inverted.
    pub fn flipped_on_the_wire(&self) -> u64 {
        self.0.borrow().net.flipped
    }

    /// What `from` sends to `to` on the connections that there are now takes a long way round: it
    /// arrives in order, but only after `lasts`. Connections made later are not affected.
    pub fn detour(&self, from: usize, to: usize, lasts: Span) {
        self.0.borrow_mut().detour(from, to, lasts);
    }

    /// Resets the connections between two nodes at `from`'s end alone. What it has sent still arrives,
    /// and only behind it does the other end see the reset: so old requests may come when `from` has
    /// long asked again on a new connection.
    pub fn reset_one_side(&self, from: usize, to: usize) {
        self.0.borrow_mut().reset_one_side(from, to);
    }

    /// Resets every connection between two nodes, as a middlebox would.
    pub fn reset_connections(&self, a: usize, b: usize) {
        self.0.borrow_mut().reset_between(a, b);
    }
}

impl Node {
    fn new(random: u64) -> Self {
        Self {
            disk: SimDisk::default(),
            faults: Faults::default(),
            life: 0,
            running: false,
            paused: false,
            clock: Clock::TRUE,
            random,
            waker: Waker::simulated(),
            queue: Vec::new(),
            ready: Vec::new(),
            asleep: None,
            disk_ops: BTreeMap::new(),
            altered: Vec::new(),
            stats: Stats::default(),
        }
    }

    fn is_runnable(&self, now: Time) -> bool {
        self.running
            && !self.paused
            && match self.asleep {
                None => true,
                Some(deadline) => {
                    !self.ready.is_empty()
                        || !self.queue.is_empty()
                        || self.waker.is_notified()
                        || deadline.is_some_and(|deadline| deadline <= now)
                }
            }
    }

    fn strikes(&mut self, ppm: u32) -> bool {
        ppm > 0 && split_mix(&mut self.random) % 1_000_000 < u64::from(ppm)
    }
}

impl World {
    fn schedule(&mut self, after: Span, event: Event) {
        self.next_seq += 1;
        self.events.insert((self.now + after, self.next_seq), event);
    }

    fn between(&mut self, least_us: u64, most_us: u64) -> Span {
        Span((least_us * 1000) + split_mix(&mut self.random) % ((most_us - least_us) * 1000))
    }

    fn note(&mut self, word: u64) {
        self.trace = (self.trace ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
    }

    fn complete(&mut self, node: usize, completion: Completion) {
        let outcome = match &completion.result {
            Ok(Output::Read(n) | Output::Received(n)) => u64::from(*n),
            Ok(_) => 1 << 32,
            Err(error) => (1 << 33) + error.errno as u64,
        };
        self.note(self.now.0);
        self.note(((node as u64) << 48) ^ completion.token);
        self.note(outcome);
        self.nodes[node].ready.push(completion);
    }

    fn complete_plain(&mut self, node: usize, token: u64, result: Result<Output, IoError>) {
        self.complete(node, Completion { token, result, buf: None, bufs: IoList::new() });
    }

    fn step(&mut self, until: Time) -> Option<usize> {
        loop {
            let now = self.now;
            while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 <= now) {
                let event = entry.remove();
                self.happen(event);
            }
            self.runnable.clear();
            let nodes = self.nodes.iter().enumerate();
            self.runnable.extend(nodes.filter(|(_, node)| node.is_runnable(now)).map(|(number, _)| number));
            if !self.runnable.is_empty() {
                if now > until {
                    return None;
                }
                let draw = split_mix(&mut self.random) as usize;
                return Some(self.runnable[draw % self.runnable.len()]);
            }
            let event = self.events.first_key_value().map(|(key, _)| key.0);
            let awake = self.nodes.iter().filter(|n| n.running && !n.paused);
            let deadlines = awake.filter_map(|node| node.asleep.flatten());
            let next = event.into_iter().chain(deadlines).min();
            match next.filter(|next| *next <= until) {
                Some(next) => self.now = next.max(now),
                None => {
                    self.now = now.max(until);
                    return None;
                }
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Disk { node, life, op } => {
                if self.nodes[node].life == life
                    && let Some(op) = self.nodes[node].disk_ops.remove(&op)
                {
                    let completion = self.nodes[node].finish(op);
                    self.complete(node, completion);
                }
            }
            Event::Net(event) => self.net_event(event),
        }
    }

    fn crash(&mut self, node: usize) {
        self.reset_node(node);
        let state = &mut self.nodes[node];
        assert!(state.running, "node {node} is not running");
        state.running = false;
        for (_, op) in std::mem::take(&mut state.disk_ops) {
            if let DiskWork::Write { file, offset, bufs, .. } = op.work {
                let bytes = gather(&bufs);
                state.disk.tear_write(key(file), offset, &bytes, &mut state.random);
            }
        }
        state.disk.crash(&mut state.random);
        state.queue.clear();
        state.ready.clear();
        self.note(0xdead);
    }

    /// Hands a queued op to the disk or the network.
    fn start_op(&mut self, node: usize, token: u64, op: Op) {
        let (work, time) = match op {
            Op::ReadAt { file, offset, buf, bytes } => {
                (DiskWork::Read { file, offset, buf, bytes }, self.between(50, 150))
            }
            Op::WriteAt { file, offset, bufs, dsync } => {
                let time = if dsync { self.between(100, 500) } else { self.between(20, 150) };
                (DiskWork::Write { file, offset, bufs, dsync }, time)
            }
            Op::Sync { file } => {
                let point = self.nodes[node].disk.begin_sync(key(file));
                (DiskWork::Sync { point }, self.between(200, 1000))
            }
            Op::Allocate { file, offset, bytes } => {
                (DiskWork::Allocate { file, end: offset + bytes }, self.between(20, 100))
            }
            op => return self.start_net_op(node, token, op),
        };
        let slow_ppm = self.nodes[node].faults.slow_ppm;
        let factor = if self.nodes[node].strikes(slow_ppm) { 100 } else { 1 };
        let (life, id) = (self.nodes[node].life, self.next_seq);
        self.nodes[node].disk_ops.insert(id, DiskOp { token, work });
        self.schedule(Span(time.0 * factor), Event::Disk { node, life, op: id });
    }
}

impl Node {
    /// Where a write lands; `None` for one that is lost.
    fn place_of_write(&mut self, file: File, offset: u64) -> Option<u64> {
        let Faults { lost_write_ppm, misdirect_ppm, .. } = self.faults;
        if lost_write_ppm + misdirect_ppm == 0 || !self.disk.is_chunks(key(file)) {
            return Some(offset);
        }
        if self.strikes(lost_write_ppm) {
            self.disk.lies += 1;
            return None;
        }
        if self.strikes(misdirect_ppm) {
            self.disk.lies += 1;
            return Some(offset ^ 4096);
        }
        Some(offset)
    }

    fn write(&mut self, file: File, mut at: u64, bufs: &IoList, durably: bool) -> Result<(), IoError> {
        for buf in bufs {
            self.disk.write(key(file), at, buf.bytes(), durably)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    /// What a disk op does at its end.
    fn finish(&mut self, op: DiskOp) -> Completion {
        let mut done =
            Completion { token: op.token, result: Ok(Output::Closed), buf: None, bufs: IoList::new() };
        let io_error = |what| Err(IoError::new(what, libc::EIO));
        match op.work {
            DiskWork::Read { file, offset, mut buf, bytes } => {
                let (error_ppm, flip_ppm) = (self.faults.read_error_ppm, self.faults.read_flip_ppm);
                done.result = if self.strikes(error_ppm) {
                    io_error("read")
                } else if self.disk.is_direct(key(file)) && !is_aligned(offset, u64::from(bytes)) {
                    Err(IoError::new("read unaligned", libc::EINVAL))
                } else {
                    let read = self.disk.read(key(file), offset, &mut buf[..bytes as usize]);
                    read.map(|count| Output::Read(count as u32))
                };
                let mut altered = self.disk.rotten(key(file), offset, bytes);
                if bytes > 0 && self.strikes(flip_ppm) {
                    self.disk.lies += 1;
                    let bit = split_mix(&mut self.random) % (u64::from(bytes) * 8);
                    buf[(bit / 8) as usize] ^= 1 << (bit % 8);
                    altered.push(offset + bit / 8 / 4096 * 4096);
                }
                if !altered.is_empty() && done.result.is_ok() {
                    altered.sort_unstable();
                    altered.dedup();
                    let is_chunks = self.disk.is_chunks(key(file));
                    self.altered.extend(altered.into_iter().map(|at| (is_chunks, at)));
                }
                done.buf = Some(buf);
            }
            DiskWork::Write { file, offset, bufs, dsync } => {
                let error_ppm = self.faults.write_error_ppm;
                let unaligned = self.disk.is_direct(key(file)) && !is_direct_write(offset, &bufs);
                done.result = if unaligned {
                    Err(IoError::new("write unaligned", libc::EINVAL))
                } else if self.strikes(error_ppm) {
                    self.disk.tear_write(key(file), offset, &gather(&bufs), &mut self.random);
                    io_error("write")
                } else {
                    let place = self.place_of_write(file, offset);
                    let write = |at| self.write(file, at, &bufs, dsync);
                    place.map_or(Ok(()), write).map(|()| Output::Written)
                };
                done.bufs = bufs;
            }
            DiskWork::Sync { point } => {
                let error_ppm = self.faults.sync_error_ppm;
                done.result = if self.strikes(error_ppm) {
                    io_error("sync")
                } else {
                    point.map(|point| self.disk.end_sync(point)).map(|()| Output::Synced)
                };
            }
            DiskWork::Allocate { .. } if self.faults.is_full => {
                done.result = Err(IoError::new("allocate", libc::ENOSPC));
            }
            DiskWork::Allocate { file, end } => {
                done.result = self.disk.allocate(key(file), end).map(|()| Output::Allocated);
            }
        }
        done
    }
}

fn gather(bufs: &IoList) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(list_len(bufs));
    bufs.iter().for_each(|buf| bytes.extend_from_slice(buf.bytes()));
    bytes
}

/// What direct IO demands of an offset or a length.
fn is_aligned(offset: u64, bytes: u64) -> bool {
    offset.is_multiple_of(512) && bytes.is_multiple_of(512)
}

fn is_direct_write(offset: u64, bufs: &IoList) -> bool {
    bufs.iter().all(|buf| {
        let from = if let IoBuf::Shared { from, .. } = buf { u64::from(*from) } else { 0 };
        !matches!(buf, IoBuf::Inline { .. } | IoBuf::Owned(_))
            && is_aligned(offset, buf.len() as u64)
            && from.is_multiple_of(512)
    })
}

fn key(file: File) -> (u32, u32) {
    (file.index, file.generation)
}

/// A node's reactor in one of its lives.
pub struct SimReactor {
    world: SimWorld,
    node: usize,
    life: u32,
    arena: Arena,
    waker: Waker,
}

impl SimReactor {
    /// Runs `act` on the node, unless this life of it has ended.
    fn with<T>(
        &self,
        what: &'static str,
        act: impl FnOnce(&mut Node) -> Result<T, IoError>,
    ) -> Result<T, IoError> {
        let mut world = self.world.0.borrow_mut();
        let node = &mut world.nodes[self.node];
        if node.life != self.life || !node.running {
            return Err(IoError::new(what, libc::ESHUTDOWN));
        }
        act(node)
    }

    fn is_alive(&self) -> bool {
        self.with("look", |_| Ok(())).is_ok()
    }
}

impl Reactor for SimReactor {
    fn now(&self) -> Time {
        let world = self.world.0.borrow();
        world.nodes[self.node].clock.local(world.now)
    }

    fn random(&mut self) -> u64 {
        split_mix(&mut self.world.0.borrow_mut().nodes[self.node].random)
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn submit(&mut self, token: u64, op: Op) {
        // Submitted by a dead node: it goes nowhere.
        let _ = self.with("submit", |node| {
            node.stats.in_flight += 1;
            node.queue.push((token, op));
            Ok(())
        });
    }

    fn turn(&mut self, deadline: Option<Time>, completions: &mut Vec<Completion>) {
        if !self.is_alive() {
            return;
        }
        let mut world = self.world.0.borrow_mut();
        let queue = std::mem::take(&mut world.nodes[self.node].queue);
        for (token, op) in queue {
            world.start_op(self.node, token, op);
        }
        world.now = world.now + Span(TURN_NS);
        let now = world.now;
        let node = &mut world.nodes[self.node];
        let deadline = deadline.map(|deadline| node.clock.truth(deadline));
        let idle = node.ready.is_empty()
            && !node.waker.is_notified()
            && deadline.is_none_or(|deadline| deadline > now);
        node.asleep = idle.then_some(deadline);
        node.waker.clear();
        node.stats.turns += 1;
        node.stats.completions += node.ready.len() as u64;
        node.stats.in_flight -= node.ready.len() as u32;
        completions.append(&mut node.ready);
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn listen(&mut self, addr: SocketAddr) -> Result<Listener, IoError> {
        self.with("listen on", |_| Ok(()))?;
        self.world.0.borrow_mut().net.listen(self.node, Addr::Tcp(addr))
    }

    fn listen_unix(&mut self, path: &Path) -> Result<Listener, IoError> {
        self.with("listen on", |_| Ok(()))?;
        self.world.0.borrow_mut().net.listen(self.node, Addr::Unix(path.into()))
    }

    fn adopt_listener(&mut self, _fd: OwnedFd) -> Result<Listener, IoError> {
        Err(IoError::new("adopt a listening socket", libc::EOPNOTSUPP))
    }

    fn give_away(&mut self, _socket: Socket) -> Result<OwnedFd, IoError> {
        Err(IoError::new("give a socket away", libc::EOPNOTSUPP))
    }

    fn adopt_socket(&mut self, _fd: OwnedFd) -> Result<Socket, IoError> {
        Err(IoError::new("adopt a socket", libc::EOPNOTSUPP))
    }

    fn listener_addr(&self, listener: Listener) -> Result<Addr, IoError> {
        self.world.0.borrow().net.listener_addr(listener)
    }

    fn stats(&self) -> Stats {
        let world = self.world.0.borrow();
        Stats { sockets: world.net.sockets_of(self.node), ..world.nodes[self.node].stats }
    }
}

impl Disk for SimReactor {
    fn open(&mut self, path: &Path, options: OpenOptions) -> Result<File, IoError> {
        let opened = self.with("open", |node| node.disk.open(path, options));
        opened.map(|(index, generation)| File { index, generation })
    }
    fn close_file(&mut self, file: File) {
        let _ = self.with("close", |node| {
            node.disk.close(key(file));
            Ok(())
        });
    }
    fn file_len(&mut self, file: File) -> Result<u64, IoError> {
        self.with("stat", |node| node.disk.len(key(file)))
    }
    fn read_blocking(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError> {
        self.with("read", |node| node.disk.read(key(file), offset, into))
    }
    fn write_blocking(&mut self, file: File, offset: u64, from: &[u8]) -> Result<(), IoError> {
        self.with("write", |node| node.disk.write(key(file), offset, from, false))
    }
    fn sync_blocking(&mut self, file: File) -> Result<(), IoError> {
        self.with("sync", |node| {
            let point = node.disk.begin_sync(key(file))?;
            node.disk.end_sync(point);
            Ok(())
        })
    }
    fn allocate_blocking(&mut self, file: File, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.with("allocate", |node| node.disk.allocate(key(file), offset + bytes))
    }
    fn truncate(&mut self, file: File, bytes: u64) -> Result<(), IoError> {
        self.with("truncate", |node| node.disk.truncate(key(file), bytes))
    }
    fn create_dir_all(&mut self, path: &Path) -> Result<(), IoError> {
        self.with("make directory", |node| {
            node.disk.create_dir_all(path);
            Ok(())
        })
    }
    fn list_dir(&mut self, path: &Path) -> Result<Vec<String>, IoError> {
        self.with("list", |node| node.disk.list(path))
    }
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError> {
        self.with("rename", |node| node.disk.rename(from, to))
    }
    fn remove_file(&mut self, path: &Path) -> Result<(), IoError> {
        self.with("remove", |node| node.disk.remove(path))
    }
    fn exists(&mut self, path: &Path) -> bool {
        self.with("look", |node| Ok(node.disk.exists(path))).unwrap_or(false)
    }
}

/// Pairs of nodes, unordered.
fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Who cannot be heard by whom.
type Partitions = BTreeSet<(usize, usize)>;
