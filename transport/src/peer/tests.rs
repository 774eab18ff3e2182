//! Links over a real ring: both ends on this thread, or one end a socket that lies.

use super::*;
use protocol::peer::{IoOp, IoRequest};
use protocol::raft::{Body, Entry, Kind, Message, Round};
use protocol::types::{
    BlockRange, ChunkId, CopysetId, LogIndex, SessionEpoch, ShardAddr, TargetId, Term, VolumeId,
};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, Listener, Op, Output};
use std::io::Write;
use std::net::TcpStream;

const NEAR: Owner = Owner { kind: 3, index: 0 };
const FAR: Owner = Owner { kind: 3, index: 1 };
const REST: Owner = Owner { kind: 9, index: 0 };

/// Two ends of a link, and what each heard.
struct Rig {
    ring: Ring,
    listener: Listener,
    ends: [Option<PeerConn>; 2],
    heard: [Vec<PeerEvent>; 2],
    limits: PeerLimits,
}

fn shard(target: u32) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard: 0 }
}

fn hello(from: u32, to: u32) -> Hello {
    Hello { cluster: [7; 16], from: shard(from), to: shard(to), incarnation: 1 }
}

impl Rig {
    fn new(arena_bytes: usize, limits: PeerLimits) -> Self {
        let mut ring = Ring::new(RingConfig { arena_bytes, ..RingConfig::default() }).unwrap();
        let listener = ring.listen("127.0.0.1:0".parse().unwrap()).unwrap();
        Self { ring, listener, ends: [None, None], heard: [vec![], vec![]], limits }
    }
    fn addr(&self) -> Addr {
        self.ring.listener_addr(self.listener).unwrap()
    }
    fn accept(&mut self) {
        self.ring.submit(REST.token(0), Op::Accept { listener: self.listener });
    }
    fn connect(&mut self) {
        self.accept();
        let addr = self.addr();
        self.ring.submit(REST.token(1), Op::Connect { addr });
    }
    /// Both ends up, hellos exchanged.
    fn linked(arena_bytes: usize) -> Self {
        let mut rig = Self::new(arena_bytes, PeerLimits::default());
        rig.connect();
        rig.until(|rig| rig.open(0) && rig.open(1));
        rig.heard = [vec![], vec![]];
        rig
    }
    fn open(&self, end: usize) -> bool {
        self.ends[end].as_ref().is_some_and(PeerConn::is_open)
    }
    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let limit = self.ring.now() + Span::ms(20_000);
        while !done(self) {
            assert!(self.ring.now() < limit, "it never happened: {:?}", self.heard);
            self.turn();
        }
    }
    fn turn(&mut self) {
        let mut completions = Vec::new();
        let deadline = self.ring.now() + Span::ms(1);
        self.ring.turn(Some(deadline), &mut completions);
        for completion in completions {
            self.dispatch(completion);
        }
        let now = self.ring.now();
        for end in 0..2 {
            let Some(conn) = &mut self.ends[end] else { continue };
            let mut events = Vec::new();
            if conn.needs_pump() {
                conn.pump(&mut self.ring, &mut events);
            }
            conn.tick(&mut self.ring, now, &mut events);
            if end == 1 && events.iter().any(|event| matches!(event, PeerEvent::Hello(_))) {
                conn.answer_hello(hello(2, 1));
            }
            self.heard[end].extend(events);
        }
        for end in &mut self.ends {
            if end.as_ref().is_some_and(PeerConn::is_done) {
                *end = None;
            }
        }
    }
    fn dispatch(&mut self, completion: Completion) {
        let (owner, _) = Owner::split(completion.token);
        if owner.kind == NEAR.kind {
            let end = owner.index as usize;
            let conn = self.ends[end].as_mut().unwrap();
            conn.on_completion(&mut self.ring, completion, &mut self.heard[end]);
            return;
        }
        match completion.result.unwrap() {
            Output::Accepted { socket, .. } => {
                self.ends[1] = PeerConn::accepted(&mut self.ring, socket, FAR, self.limits);
            }
            Output::Connected { socket } => {
                let said = hello(1, 2);
                self.ends[0] = PeerConn::connected(&mut self.ring, socket, NEAR, self.limits, said);
            }
            other => panic!("{other:?}"),
        }
    }
    fn reason(&self, end: usize) -> Option<&PeerCloseReason> {
        self.heard[end].iter().find_map(|event| match event {
            PeerEvent::Closed { reason } => Some(reason),
            _ => None,
        })
    }
    /// Both ends down, nothing left over.
    fn over(mut self) {
        self.heard = [vec![], vec![]];
        for end in 0..2 {
            if let Some(conn) = &mut self.ends[end] {
                conn.close(&mut self.ring, &mut self.heard[end]);
            }
        }
        self.until(|rig| rig.ends.iter().all(Option::is_none));
        self.heard = [vec![], vec![]];
        assert_eq!(self.ring.arena().used_blocks(), 0, "every buffer came back");
        assert_eq!(self.ring.stats().sockets, 0);
    }
}

fn write_entry(index: u64, count: usize) -> Entry {
    let chunk = ChunkId { volume: VolumeId(1), index: 0 };
    let range = BlockRange::new(5, count).unwrap();
    Entry { term: Term(2), index: LogIndex(index), body: Body::Write { chunk, range } }
}

/// An append of entries with so many blocks, every block of its own content, and its data.
fn append(arena: &reactor::Arena, first: u64, counts: &[usize]) -> Option<(PeerMessage, Vec<Buf>)> {
    let mut bufs = Vec::new();
    for (at, count) in counts.iter().enumerate() {
        let mut buf = arena.alloc(*count)?;
        for (block, bytes) in buf.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            bytes.fill((first as usize * 31 + at * 7 + block) as u8);
        }
        bufs.push(buf.freeze());
    }
    let crcs = bufs.iter().flat_map(|buf| buf.chunks_exact(BLOCK_BYTES)).map(block_crc).collect();
    let entries = counts.iter().enumerate().map(|(at, n)| write_entry(first + at as u64, *n)).collect();
    let round = Round { number: first, sent_ns: 0 };
    let prev_index = LogIndex(first - 1);
    let kind = Kind::Append { round, prev_index, prev_term: Term(2), commit: LogIndex(0), entries };
    let message = PeerMessage::Raft { copyset: CopysetId(1), message: Message { term: Term(2), kind }, crcs };
    Some((message, bufs))
}

fn write(offset: u32, length: u32) -> PeerMessage {
    let chunk = ChunkId { volume: VolumeId(1), index: 0 };
    let op = IoOp::Write { chunk, offset, length, crc: block_crc(&vec![0x42; length as usize]) };
    PeerMessage::Io(IoRequest { id: 9, copyset: CopysetId(1), term: Term(2), epoch: SessionEpoch(0), op })
}

#[test]
fn both_sides_say_hello_before_anything_else() {
    let mut rig = Rig::new(4 << 20, PeerLimits::default());
    rig.connect();
    rig.until(|rig| rig.open(0) && rig.open(1));
    assert!(matches!(rig.heard[1][..], [PeerEvent::Hello(said)] if said == hello(1, 2)));
    assert!(matches!(rig.heard[0][..], [PeerEvent::Hello(said)] if said == hello(2, 1)));
    rig.over();
}

#[test]
fn appends_arrive_in_order_with_a_buffer_an_entry() {
    let mut rig = Rig::linked(32 << 20);
    let counts = [1, 32, 3, 17, 2];
    for round in 0..60 {
        let counts = &counts[..round % 5 + 1];
        let (message, bufs) = append(rig.ring.arena(), 1 + round as u64 * 10, counts).unwrap();
        for end in rig.ends.iter_mut().flatten() {
            end.send(&message, bufs.iter().cloned().map(IoBuf::whole)).unwrap();
        }
    }
    rig.until(|rig| rig.heard.iter().all(|heard| heard.len() == 60));
    for heard in &rig.heard {
        for (round, event) in heard.iter().enumerate() {
            let PeerEvent::Message { message: PeerMessage::Raft { message, crcs, .. }, payload } = event
            else {
                panic!("{event:?}")
            };
            let Kind::Append { prev_index, entries, .. } = &message.kind else { panic!("an append") };
            assert_eq!(prev_index.0, round as u64 * 10, "in order");
            let blocks: Vec<_> = entries.iter().map(|entry| entry.body.payload_blocks()).collect();
            assert_eq!(payload.iter().map(Buf::len_blocks).collect::<Vec<_>>(), blocks);
            assert_eq!(verify_blocks(payload, crcs), Ok(()));
        }
    }
    rig.over();
}

#[test]
fn a_write_lands_with_its_alignment_and_is_verified() {
    let mut rig = Rig::linked(4 << 20);
    for (offset, length) in [(0, 512), (512, 512), (3584, 1024), (8192 - 512, 131_072 - 4096)] {
        let mut buf = rig.ring.arena().alloc(32).unwrap();
        buf.fill(0x42);
        let data = IoBuf::part(buf.freeze(), 0..length as usize);
        rig.ends[0].as_mut().unwrap().send(&write(offset, length), [data]).unwrap();
        rig.until(|rig| !rig.heard[1].is_empty());
        let Some(PeerEvent::Message { payload, .. }) = rig.heard[1].pop() else { panic!("a message") };
        let crc = block_crc(&vec![0x42; length as usize]);
        assert!(verify_write(&payload[0], offset, length, crc));
        assert!(!verify_write(&payload[0], offset, length, crc ^ 1));
    }
    rig.over();
}

#[test]
fn damaged_and_missing_blocks_are_told_by_number() {
    let arena = reactor::Arena::new(1 << 20).unwrap();
    let (message, bufs) = append(&arena, 1, &[2, 1]).unwrap();
    let PeerMessage::Raft { mut crcs, .. } = message else { panic!("raft") };
    assert_eq!(verify_blocks(&bufs, &crcs), Ok(()));
    assert_eq!(verify_blocks(&bufs, &crcs[..2]), Err(2));
    assert_eq!(verify_blocks(&bufs[..1], &crcs), Err(2));
    crcs[1] ^= 1;
    assert_eq!(verify_blocks(&bufs, &crcs), Err(1));
}

#[test]
fn a_full_arena_delays_a_message_and_loses_nothing() {
    let mut rig = Rig::linked(1 << 20);
    let (message, bufs) = append(rig.ring.arena(), 1, &[32, 32]).unwrap();
    rig.ends[0].as_mut().unwrap().send(&message, bufs.iter().cloned().map(IoBuf::whole)).unwrap();
    let hog: Vec<_> = core::iter::from_fn(|| rig.ring.arena().alloc(32)).collect();
    rig.until(|rig| rig.ends[1].as_ref().unwrap().is_starved());
    assert!(rig.heard[1].is_empty());
    drop((hog, bufs));
    rig.until(|rig| !rig.heard[1].is_empty());
    let PeerEvent::Message { message: PeerMessage::Raft { crcs, .. }, payload } = &rig.heard[1][0] else {
        panic!("a message")
    };
    assert_eq!(verify_blocks(payload, crcs), Ok(()));
    rig.over();
}

#[test]
fn a_peer_that_does_not_keep_up_is_refused_more() {
    let mut rig = Rig::linked(4 << 20);
    let near = rig.ends[0].as_mut().unwrap();
    near.limits.tx_bytes_max = 1000;
    let probe = write(0, 512);
    let sends = (0..10).map(|_| near.send(&probe, [IoBuf::zeroes(512)]));
    assert_eq!(sends.last(), Some(Err(SendError::Backlog)));
    near.close(&mut rig.ring, &mut rig.heard[0]);
    assert_eq!(near.send(&probe, [IoBuf::zeroes(512)]), Err(SendError::NotOpen));
    rig.until(|rig| rig.reason(1).is_some());
    rig.over();
}

/// What a well-behaved peer would send: its hello and a write.
fn speech() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new();
    encoder.encode(&PeerMessage::Hello(hello(1, 2)), &mut bytes).unwrap();
    encoder.encode(&write(512, 1024), &mut bytes).unwrap();
    bytes.resize(bytes.len() + 1024, 0x42);
    bytes
}

/// Lets a socket say this and close; why the link ended.
fn hear(rig: &mut Rig, bytes: &[u8]) -> PeerCloseReason {
    rig.accept();
    let Addr::Tcp(addr) = rig.addr() else { panic!("TCP was asked for") };
    let mut socket = TcpStream::connect(addr).unwrap();
    _ = socket.write_all(bytes);
    drop(socket);
    rig.heard[1].clear();
    rig.until(|rig| rig.reason(1).is_some());
    rig.until(|rig| rig.ends[1].is_none());
    rig.reason(1).unwrap().clone()
}

#[test]
fn peers_that_leave_at_each_byte_free_everything() {
    let mut rig = Rig::new(4 << 20, PeerLimits::default());
    let bytes = speech();
    for cut in 0..bytes.len() {
        let reason = hear(&mut rig, &bytes[..cut]);
        assert!(matches!(reason, PeerCloseReason::Eof | PeerCloseReason::Io(_)), "{reason:?}");
        let messages = rig.heard[1].iter().filter(|event| matches!(event, PeerEvent::Message { .. }));
        assert_eq!(messages.count(), 0);
    }
    rig.over();
}

#[test]
fn peers_that_talk_garbage_are_cut() {
    let mut rig = Rig::new(4 << 20, PeerLimits::default());
    let good = speech();
    let mut random = 1u64;
    for round in 0..2000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (random >> 33) as usize % (good.len() - 1024);
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (round % 8);
        let reason = hear(&mut rig, &bytes);
        let cut = !matches!(reason, PeerCloseReason::Eof);
        assert!(cut, "a flip of byte {at} went by: {reason:?}");
    }
    rig.over();
}

#[test]
fn hellos_out_of_turn_are_refused() {
    let mut rig = Rig::new(4 << 20, PeerLimits::default());
    let mut first = Vec::new();
    Encoder::new().encode(&write(0, 512), &mut first).unwrap();
    assert_eq!(hear(&mut rig, &first), PeerCloseReason::Hello);
    let mut twice = speech();
    twice.extend(speech());
    assert_eq!(hear(&mut rig, &twice), PeerCloseReason::Hello);
    rig.over();
}

#[test]
fn a_peer_that_says_nothing_is_cut() {
    let mut rig = Rig::new(4 << 20, PeerLimits { hello: Span::ms(30), ..PeerLimits::default() });
    rig.accept();
    let Addr::Tcp(addr) = rig.addr() else { panic!("TCP was asked for") };
    let socket = TcpStream::connect(addr).unwrap();
    rig.until(|rig| rig.reason(1).is_some());
    assert_eq!(rig.reason(1), Some(&PeerCloseReason::TooSlow));
    drop(socket);
    rig.over();
}
