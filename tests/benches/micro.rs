//! What single steps of the data path cost, by criterion. `ashlar bench micro` runs these and prints the table.
//!
//! Names are `group/case`, where a case ends with what it is counted by: all times are for one of these.
#![allow(missing_docs)]

extern crate chunkstore as ashlar_chunkstore;

#[path = "../../chunkstore/tests/common/mod.rs"]
mod common;

use chunkstore::{Event, FileId, Layout, Op, Record};
use copyset::{Action, Config, Health, Recovered, Replica, Role};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protocol::frame::{Encoder, HEADER_BYTES, decode_header, decode_meta};
use protocol::peer::{IoOp, IoRequest, PeerMessage};
use protocol::raft::{Body, Entry, HardState, Members, Message};
use protocol::types::{
    BLOCK_BYTES, BlockRange, ChunkId, CopysetId, LogIndex, SessionEpoch, ShardAddr, TargetId, Term, Time,
    VolumeId, block_crc,
};
use reactor::mailbox::mailbox;
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, IoBuf, Output, Reactor, Socket};
use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

const COPYSET: CopysetId = CopysetId(1);
/// Entries that a turn under load brings together.
const BATCH: usize = 32;

fn chunk() -> ChunkId {
    ChunkId { volume: VolumeId(1), index: 0 }
}

fn write(index: u64, block: u16) -> Entry {
    let body = Body::Write { chunk: chunk(), range: BlockRange { first: block, count: 1 } };
    Entry { term: Term(1), index: LogIndex(index), body }
}

/// CRC-32C by the crate in use and by the one that was weighed against it.
fn crc(c: &mut Criterion) {
    let mut group = c.benchmark_group("crc");
    for (name, bytes) in [("4K", 4 << 10), ("128K", 128 << 10)] {
        let data: Vec<u8> = (0..bytes).map(|at| (at * 31) as u8).collect();
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("crc32c {name}"), |b| b.iter(|| crc32c::crc32c(black_box(&data))));
        group.bench_function(format!("crc-fast {name}"), |b| {
            b.iter(|| crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, black_box(&data)))
        });
    }
    group.finish();
}

/// A message of a peer link, to bytes and back, without its block data.
fn frame(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame");
    let op = IoOp::Read { chunk: chunk(), range: BlockRange { first: 0, count: 1 } };
    let io =
        PeerMessage::Io(IoRequest { id: 7, copyset: COPYSET, term: Term(3), epoch: SessionEpoch(0), op });
    for (name, message) in [("io", io), ("append of 1", append(1)), ("append of 32", append(BATCH))] {
        let (mut encoder, mut bytes) = (Encoder::new(), Vec::new());
        group.bench_function(format!("encode {name}"), |b| {
            b.iter(|| {
                bytes.clear();
                encoder.encode(black_box(&message), &mut bytes).expect("well formed")
            });
        });
        let head = *bytes.first_chunk::<HEADER_BYTES>().expect("a header");
        let mut aligned = rkyv::util::AlignedVec::<16>::new();
        aligned.extend_from_slice(&bytes[HEADER_BYTES..]);
        let mut parts = Vec::new();
        group.bench_function(format!("decode {name}"), |b| {
            b.iter(|| {
                let header = decode_header(black_box(&head)).expect("our own");
                decode_meta(&header, &aligned, &mut parts).expect("our own")
            });
        });
    }
    group.finish();
}

/// What a leader sends for so many proposals of one block.
fn append(entries: usize) -> PeerMessage {
    let mut trio = Trio::new();
    for nth in 0..entries {
        trio.propose(nth as u16);
    }
    let sent = std::iter::from_fn(|| trio.replicas[trio.leader].poll()).find_map(|action| match action {
        Action::Send { message, .. } => Some(message),
        _ => None,
    });
    let message = sent.expect("an append");
    PeerMessage::Raft { copyset: COPYSET, message, crcs: vec![7; entries].into() }
}

/// Three replicas whose logs are durable at once and whose network loses nothing.
struct Trio {
    replicas: Vec<Replica>,
    leader: usize,
    now: Time,
    wire: VecDeque<(usize, usize, Message)>,
    next_compaction: u64,
}

fn place(at: usize) -> ShardAddr {
    ShardAddr { target: TargetId(at as u32 + 1), shard: 0 }
}

impl Trio {
    fn new() -> Self {
        let members = Members::new(&[place(0), place(1), place(2)], &[]).expect("three");
        let replica = |at: usize| {
            let recovered = Recovered {
                hard: HardState::default(),
                floor: (LogIndex(0), Term(0)),
                members,
                entries: Vec::new(),
                applied: LogIndex(0),
                health: Health::Whole,
            };
            Replica::new(Config::new(COPYSET, TargetId(at as u32 + 1), at as u64 + 1), recovered, Time(1))
        };
        let replicas = (0..3).map(replica).collect();
        let mut trio =
            Self { replicas, leader: 0, now: Time(1), wire: VecDeque::new(), next_compaction: 4096 };
        let leads = |trio: &Self| trio.replicas.iter().position(|one| one.role() == Role::Leader);
        while leads(&trio).is_none() {
            trio.now.0 += 10_000_000;
            trio.replicas.iter_mut().for_each(|replica| replica.tick(trio.now));
            trio.settle();
        }
        trio.leader = leads(&trio).expect("just seen");
        trio
    }

    fn propose(&mut self, block: u16) {
        let body = Body::Write { chunk: chunk(), range: BlockRange { first: block, count: 1 } };
        self.replicas[self.leader].propose(body, self.now).expect("the leader has room");
    }

    /// Runs until nobody has anything left to do.
    fn settle(&mut self) {
        loop {
            let mut any = false;
            for at in 0..self.replicas.len() {
                while let Some(action) = self.replicas[at].poll() {
                    any = true;
                    match action {
                        Action::Persist { ticket, .. } => self.replicas[at].durable(ticket),
                        Action::Commit { up_to } => self.replicas[at].applied(up_to),
                        Action::Send { to, message } => {
                            self.wire.push_back((at, to.target.0 as usize - 1, message));
                        }
                        _ => {}
                    }
                }
            }
            while let Some((from, to, message)) = self.wire.pop_front() {
                any = true;
                self.replicas[to].handle(place(from), message, self.now);
            }
            if !any {
                return;
            }
        }
    }

    /// Commits so many entries together; the clock moves so that leases live and nobody sleeps.
    fn commit(&mut self, entries: usize) {
        self.now.0 += 50_000;
        for nth in 0..entries {
            self.propose(nth as u16);
        }
        self.settle();
        let applied = self.replicas[self.leader].applied_index();
        if applied.0 >= self.next_compaction {
            self.replicas.iter_mut().for_each(|replica| replica.compact(LogIndex(applied.0 - 1024)));
            self.next_compaction = applied.0 + 4096;
        }
    }
}

/// One entry from the proposal to being applied on all three replicas: the CPU of all three together.
fn raft(c: &mut Criterion) {
    let mut group = c.benchmark_group("raft");
    for entries in [1, BATCH] {
        let mut trio = Trio::new();
        group.throughput(Throughput::Elements(entries as u64));
        group.bench_function(format!("commit {entries} on 3 replicas"), |b| b.iter(|| trio.commit(entries)));
    }
    group.finish();
}

/// A store with room for the blocks of one chunk.
fn store() -> common::Rig {
    let layout = Layout {
        segment_bytes: 4096 * 4096,
        log_segments: 6,
        ram_blocks_max: 4096,
        ..common::small_layout()
    };
    let mut rig = common::Rig::new(&layout);
    rig.pass(200);
    rig.store.stage(Record::Create { copyset: COPYSET, members: Members::default() }, None, &[]);
    rig.settle();
    rig
}

/// The log: entries of one block staged, framed and handed to the disk. What the disk does is not counted.
fn log(c: &mut Criterion) {
    let mut group = c.benchmark_group("log");
    for entries in [1, BATCH] {
        let (mut rig, mut index) = (store(), 0);
        let payload = common::Buf::of(&[1]);
        let crcs = [block_crc(&common::block(1))];
        group.throughput(Throughput::Elements(entries as u64));
        group.bench_function(format!("append {entries} x 4K"), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let started = Instant::now();
                    for nth in 0..entries {
                        index += 1;
                        let entry = write(index, nth as u16);
                        rig.store.stage(
                            Record::Entry { copyset: COPYSET, entry },
                            Some(payload.clone()),
                            &crcs,
                        );
                    }
                    rig.store.seal();
                    let log_write =
                        |op: &Op<common::Buf>| matches!(op, Op::Write { file: FileId::Log(_), .. });
                    while let Some(op) = rig.store.poll_op(rig.now) {
                        rig.ops.push(op);
                    }
                    spent += started.elapsed();
                    assert!(rig.ops.iter().any(log_write), "a batch goes to the log");
                    rig.settle();
                    rig.store.commit(COPYSET, LogIndex(index));
                    rig.settle();
                    rig.events.clear();
                    while !rig.store.can_stage(BATCH) {
                        rig.pass(100);
                        rig.events.clear();
                    }
                }
                spent
            });
        });
    }
    group.finish();
}

/// A read of one block that the overlay has in memory.
fn overlay(c: &mut Criterion) {
    const BLOCKS: u16 = 256;
    let mut rig = store();
    for block in 0..BLOCKS {
        let entry = write(u64::from(block) + 1, block);
        let crcs = [block_crc(&common::block(9))];
        rig.store.stage(Record::Entry { copyset: COPYSET, entry }, Some(common::Buf::of(&[9])), &crcs);
    }
    rig.drain();
    rig.settle();
    rig.store.commit(COPYSET, LogIndex(BLOCKS.into()));
    rig.drain();
    rig.events.clear();
    assert!(rig.store.stats().overlay_blocks > 0, "nothing was flushed yet");
    let mut at = 0;
    c.benchmark_group("overlay").bench_function("read 4K from memory", |b| {
        b.iter(|| {
            at = (at + 97) % BLOCKS;
            rig.store.read(1, chunk(), BlockRange { first: at, count: 1 });
            let event = rig.store.poll_event();
            assert!(matches!(event, Some(Event::Read { result: Ok(_), .. })), "served from memory");
            event
        });
    });
}

/// A turn of the reactor: with nothing to do, and with a small message sent and received over a Unix socket.
fn turn(c: &mut Criterion) {
    let mut group = c.benchmark_group("reactor");
    let config = RingConfig { arena_bytes: 1 << 20, spin_us_max: 0, ..RingConfig::default() };
    let mut ring = Ring::new(config).expect("io_uring");
    let mut completions = Vec::new();
    group.bench_function("turn with nothing to do", |b| {
        b.iter(|| ring.turn(Some(Time(0)), &mut completions));
    });
    let (mut sender, mut receiver) = mailbox::<[u64; 8]>(64, ring.waker());
    group.bench_function("mailbox hop", |b| {
        b.iter(|| {
            // As siblings do it: a batch is posted quietly, and its receiver is awake.
            sender.post_quietly(black_box([7; 8])).expect("room");
            receiver.take()
        });
    });
    let (from, mut to) = (vec![7_u8; 4096], vec![0_u8; 4096]);
    group.bench_function("copy 4K", |b| b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from))));
    let (here, there) = pair(&mut ring);
    let mut spare = ring.arena().alloc(1);
    group.bench_function("send and receive 64 bytes", |b| {
        b.iter(|| {
            let buf = spare.take().expect("given back");
            ring.submit(1, reactor::Op::Recv { socket: there, buf, from: 0, to: 64 });
            let bufs = std::iter::once(IoBuf::copy(&[7; 64])).collect();
            ring.submit(2, reactor::Op::Send { socket: here, bufs });
            let mut ended = 0;
            while ended < 2 {
                ring.turn(None, &mut completions);
                for completion in completions.drain(..) {
                    ended += 1;
                    spare = completion.buf.or(spare.take());
                }
            }
        });
    });
    group.finish();
}

/// Two ends of a Unix socket.
fn pair(ring: &mut Ring) -> (Socket, Socket) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("s");
    let listener = ring.listen_unix(&path).expect("listens");
    ring.submit(1, reactor::Op::Accept { listener });
    ring.submit(2, reactor::Op::Connect { addr: Addr::Unix(path) });
    let (mut completions, mut here, mut there) = (Vec::new(), None, None);
    while here.is_none() || there.is_none() {
        ring.turn(None, &mut completions);
        for completion in completions.drain(..) {
            match completion.result.expect("connects") {
                Output::Connected { socket } => here = Some(socket),
                Output::Accepted { socket, .. } => there = Some(socket),
                other => panic!("{other:?}"),
            }
        }
    }
    (here.expect("just seen"), there.expect("just seen"))
}

const _: () = assert!(BLOCK_BYTES == 4096, "the names of the cases say 4K");

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    targets = crc, frame, raft, log, overlay, turn
}
criterion_main!(benches);
