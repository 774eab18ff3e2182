//! What the tests of both protocols share: a server loop over a real ring on this thread, hosts on another.
//!
//! Invariants: it serves until the hosts are done and every connection is gone; nothing may be left over then.

use crate::nbd::{NbdCloseReason, NbdConn, NbdEvent, NbdLimits};
use crate::nvme::{NvmeCloseReason, NvmeConn, NvmeEvent, NvmeLimits};
use crate::pieces::{ReadPart, ReadParts};
use crate::token::Owner;
use protocol::types::{BLOCK_BYTES, Span, Time};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, Arena, Completion, Listener, Op, Output, Reactor, Socket};
use slab::Slab;
use std::fmt::Debug;
use std::time::{Duration, Instant};

const ACCEPT: Owner = Owner { kind: 1, index: 0 };
const CONN: u8 = 2;
const REFUSED: Owner = Owner { kind: 9, index: 0 };
/// A connection may still wait to be accepted when its host is gone: it serves so many turns more.
const QUIET_TURNS: u32 = 5;
const LIMIT: Duration = Duration::from_secs(120);

/// A stream of random numbers (splitmix64).
pub(crate) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What is tested: a connection of either protocol.
pub(crate) trait Conn: Sized {
    type Limits: Copy;
    type Event;
    type Reason: Clone + PartialEq + Debug;
    fn open(ring: &mut Ring, socket: Socket, owner: Owner, limits: Self::Limits) -> Option<Self>;
    fn take(&mut self, ring: &mut Ring, completion: Completion, events: &mut Vec<Self::Event>);
    fn turn(&mut self, ring: &mut Ring, now: Time, events: &mut Vec<Self::Event>);
    fn wants_turn(&self) -> bool;
    fn is_over(&self) -> bool;
    fn held_bytes(&self) -> usize;
    fn commands(&self) -> usize;
    fn waits_for_memory(&self) -> bool;
    fn closed(event: &Self::Event) -> Option<Self::Reason>;
    fn is_write(event: &Self::Event) -> bool;
    /// Whether an event is to be answered also when its connection is over.
    fn outlives(event: &Self::Event) -> bool;
}

macro_rules! tested {
    ($conn:ty, $limits:ty, $event:ident, $reason:ty, $ends:pat) => {
        impl Conn for $conn {
            type Limits = $limits;
            type Event = $event;
            type Reason = $reason;
            fn open(ring: &mut Ring, socket: Socket, owner: Owner, limits: $limits) -> Option<Self> {
                Self::new(ring, socket, owner, limits)
            }
            fn take(&mut self, ring: &mut Ring, completion: Completion, events: &mut Vec<$event>) {
                self.on_completion(ring, completion, events);
            }
            fn turn(&mut self, ring: &mut Ring, now: Time, events: &mut Vec<$event>) {
                if self.needs_pump() {
                    self.pump(ring, events);
                }
                self.tick(ring, now, events);
            }
            fn wants_turn(&self) -> bool {
                self.needs_pump()
            }
            fn is_over(&self) -> bool {
                self.is_done()
            }
            fn held_bytes(&self) -> usize {
                self.bytes()
            }
            fn commands(&self) -> usize {
                self.requests()
            }
            fn waits_for_memory(&self) -> bool {
                self.is_starved()
            }
            fn closed(event: &$event) -> Option<$reason> {
                match event {
                    $event::Closed { reason } => Some(reason.clone()),
                    _ => None,
                }
            }
            fn is_write(event: &$event) -> bool {
                matches!(event, $event::WritePiece { .. })
            }
            fn outlives(event: &$event) -> bool {
                !matches!(event, $ends)
            }
        }
    };
}

tested!(NbdConn, NbdLimits, NbdEvent, NbdCloseReason, NbdEvent::Attached(_));
tested!(
    NvmeConn,
    NvmeLimits,
    NvmeEvent,
    NvmeCloseReason,
    NvmeEvent::Connect { .. } | NvmeEvent::Admin { .. }
);

/// Who answers what hosts ask.
pub(crate) trait Answers<C: Conn> {
    /// Answers an event, or gives it back to be asked again in a later turn.
    fn answer(
        &mut self,
        ring: &mut Ring,
        conns: &mut Slab<C>,
        index: usize,
        event: C::Event,
    ) -> Option<C::Event>;
    /// Does what the answers and the ends of connections have led to.
    fn settle(&mut self, _ring: &mut Ring, _conns: &mut Slab<C>, _events: &mut Vec<(usize, C::Event)>) {}
    /// A connection is over.
    fn closed(&mut self, _index: usize) {}
}

/// How the server behaves, whatever is asked.
#[derive(Clone, Copy)]
pub(crate) struct Temper {
    pub arena_bytes: usize,
    /// Answers are given late and in any order, by this seed.
    pub shuffle: Option<u64>,
    /// Answers come one a turn, the last asked first.
    pub backwards: bool,
    /// Writes are not answered before this many turns.
    pub hold_turns: u32,
    /// It listens on a Unix socket.
    pub unix: bool,
}

impl Default for Temper {
    fn default() -> Self {
        Self { arena_bytes: 64 << 20, shuffle: None, backwards: false, hold_turns: 0, unix: false }
    }
}

/// What was seen while serving.
#[derive(Debug)]
pub(crate) struct Seen<Reason> {
    pub bytes_max: usize,
    pub requests_max: usize,
    pub conns_max: usize,
    /// Events that wait for an answer.
    pub pending_max: usize,
    pub starved: u32,
    pub closed: Vec<Reason>,
}

struct Server<C: Conn, A> {
    ring: Ring,
    listener: Listener,
    temper: Temper,
    limits: C::Limits,
    conns: Slab<C>,
    answers: A,
    pending: Vec<(usize, C::Event)>,
    random: Random,
    turns: u32,
    seen: Seen<C::Reason>,
}

/// Serves while `hosts` runs, then until every connection is gone; nothing may be left over.
pub(crate) fn serve<C: Conn, A: Answers<C>>(
    temper: Temper,
    limits: C::Limits,
    answers: A,
    hosts: impl FnOnce(Addr) + Send + 'static,
) -> (Seen<C::Reason>, A) {
    let config = RingConfig { arena_bytes: temper.arena_bytes, ..RingConfig::default() };
    let mut ring = Ring::new(config).unwrap();
    let place = std::env::temp_dir().join(format!("ashlar-{}-{:x}.sock", std::process::id(), ring.random()));
    let listener = match temper.unix {
        true => ring.listen_unix(&place).unwrap(),
        false => ring.listen("127.0.0.1:0".parse().unwrap()).unwrap(),
    };
    let addr = ring.listener_addr(listener).unwrap();
    ring.submit(ACCEPT.token(0), Op::Accept { listener });
    let waker = ring.waker();
    let host = std::thread::spawn(move || {
        hosts(addr);
        waker.wake();
    });
    let seen =
        Seen { bytes_max: 0, requests_max: 0, conns_max: 0, pending_max: 0, starved: 0, closed: Vec::new() };
    let (conns, pending, random) = (Slab::new(), Vec::new(), Random(temper.shuffle.unwrap_or(1)));
    let mut server =
        Server { ring, listener, temper, limits, conns, answers, pending, random, turns: 0, seen };
    let limit = Instant::now() + LIMIT;
    let mut quiet = 0;
    while quiet < QUIET_TURNS {
        server.turn();
        let idle = server.conns.is_empty() && server.pending.is_empty();
        quiet = if idle && host.is_finished() { quiet + 1 } else { 0 };
        assert!(Instant::now() < limit, "{} connections are left", server.conns.len());
    }
    std::fs::remove_file(place).ok();
    host.join().unwrap();
    assert_eq!(server.ring.arena().used_blocks(), 0, "every buffer came back");
    assert_eq!(server.ring.stats().sockets, 0, "every socket is closed");
    (server.seen, server.answers)
}

impl<C: Conn, A: Answers<C>> Server<C, A> {
    fn turn(&mut self) {
        self.turns += 1;
        let busy = self.conns.iter().any(|(_, conn)| conn.wants_turn()) || !self.pending.is_empty();
        let wait = if busy { Span::us(200) } else { Span::ms(20) };
        let mut completions = Vec::new();
        let deadline = self.ring.now() + wait;
        self.ring.turn(Some(deadline), &mut completions);
        let mut events = Vec::new();
        for completion in completions {
            self.dispatch(completion, &mut events);
        }
        self.answer_pending();
        self.seen.conns_max = self.seen.conns_max.max(self.conns.len());
        let now = self.ring.now();
        for (index, conn) in &mut self.conns {
            let mut mine = Vec::new();
            conn.turn(&mut self.ring, now, &mut mine);
            self.seen.bytes_max = self.seen.bytes_max.max(conn.held_bytes());
            self.seen.requests_max = self.seen.requests_max.max(conn.commands());
            self.seen.starved += u32::from(conn.waits_for_memory());
            events.extend(mine.into_iter().map(|event| (index, event)));
        }
        for (_, event) in &events {
            self.seen.closed.extend(C::closed(event));
        }
        // The end of one connection may lead to that of others.
        loop {
            events.drain(..).for_each(|(index, event)| match C::closed(&event) {
                Some(_) => {
                    self.pending.retain(|(at, event)| *at != index || C::outlives(event));
                    self.answers.closed(index);
                }
                None => self.pending.push((index, event)),
            });
            self.answers.settle(&mut self.ring, &mut self.conns, &mut events);
            if events.is_empty() {
                break;
            }
        }
        self.seen.pending_max = self.seen.pending_max.max(self.pending.len());
        self.conns.retain(|_, conn| !conn.is_over());
    }

    fn dispatch(&mut self, completion: Completion, events: &mut Vec<(usize, C::Event)>) {
        let (owner, _) = Owner::split(completion.token);
        if owner == ACCEPT {
            let Ok(Output::Accepted { socket, .. }) = completion.result else { return };
            let entry = self.conns.vacant_entry();
            let owner = Owner { kind: CONN, index: entry.key() as u32 };
            match C::open(&mut self.ring, socket, owner, self.limits) {
                Some(conn) => _ = entry.insert(conn),
                None => self.ring.submit(REFUSED.token(0), Op::Close { socket }),
            }
            self.ring.submit(ACCEPT.token(0), Op::Accept { listener: self.listener });
        } else if owner.kind == CONN {
            let mut mine = Vec::new();
            let index = owner.index as usize;
            self.conns[index].take(&mut self.ring, completion, &mut mine);
            events.extend(mine.into_iter().map(|event| (index, event)));
        }
    }

    /// Answers what is due.
    fn answer_pending(&mut self) {
        if self.temper.backwards {
            let last = self.pending.pop();
            return self.answer(last.into_iter().collect());
        }
        let mut due = core::mem::take(&mut self.pending);
        if self.turns < self.temper.hold_turns {
            (self.pending, due) = due.into_iter().partition(|(_, event)| C::is_write(event));
        }
        if self.temper.shuffle.is_some() {
            for at in (1..due.len()).rev() {
                due.swap(at, self.random.below(at as u64 + 1) as usize);
            }
            let keep = self.random.below(due.len() as u64 + 1) as usize;
            self.pending.extend(due.split_off(due.len() - keep.min(due.len() / 2)));
        }
        self.answer(due);
    }

    fn answer(&mut self, due: Vec<(usize, C::Event)>) {
        for (index, event) in due {
            let later = self.answers.answer(&mut self.ring, &mut self.conns, index, event);
            self.pending.extend(later.map(|event| (index, event)));
        }
    }
}

/// A read's answer, a buffer a block, zeroes for blocks that are `empty`. `None` when the arena has no room: as a
/// shard does, it is answered later.
pub(crate) fn parts(
    volume: &[u8],
    empty: impl Fn(usize) -> bool,
    arena: &Arena,
    offset: u64,
    length: u32,
) -> Option<ReadParts> {
    let (mut at, end) = (offset as usize, offset as usize + length as usize);
    let mut parts = ReadParts::new();
    while at < end {
        let next = (at / BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES).min(end);
        if empty(at / BLOCK_BYTES) {
            parts.push(ReadPart::Zeroes((next - at) as u32));
        } else {
            let mut buf = arena.alloc(1)?;
            let from = at % BLOCK_BYTES;
            let to = from + next - at;
            buf[from..to].copy_from_slice(&volume[at..next]);
            let crc = (next - at == BLOCK_BYTES).then(|| crc32c::crc32c(&volume[at..next]));
            parts.push(ReadPart::Data { buf: buf.freeze(), from: from as u32, to: to as u32, crc });
        }
        at = next;
    }
    Some(parts)
}
