//! Shards of several targets side by side, on disks in memory, without loops or sockets: a test carries their
//! messages, and so can lose some, or let an old one come late. What a shard must refuse, whoever asks for it.
//!
//! Whole clusters seldom get that far, because one rule masks another there: these are the rules one by one.

use super::orders::CAUGHT_UP_ENTRIES;
use super::*;
use chunkstore::{FileId, Identity, IoError, Layout, Media, Op, Piece};
use protocol::map::{CopysetEntry, Session, VolumeEntry};
use protocol::peer::{Crcs, Fetched, IoOp, IoOutcome, IoReply, IoRequest};
use protocol::raft::{Body, Entry, Kind, Message, Round};
use protocol::types::{BlockRange, ENTRY_BLOCKS_MAX, Term, block_crc};

const ID: CopysetId = CopysetId(1);
const VOLUME: VolumeId = VolumeId(1);
const CHUNK: ChunkId = ChunkId { volume: VOLUME, index: 0 };
/// Whoever asks for IO; no replica is there.
const HOST: u32 = 9;
/// What a target is handed at a time.
const STEP: Span = Span::ms(10);

fn at(target: u32) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard: 0 }
}

fn all(targets: &[u32]) -> Vec<ShardAddr> {
    targets.iter().map(|target| at(*target)).collect()
}

fn map(generation: u64, targets: &[u32], epoch: u64) -> Arc<ClusterMap> {
    let copysets = BTreeMap::from([(ID, CopysetEntry { members: all(targets), epoch })]);
    Arc::new(ClusterMap { generation, copysets, ..ClusterMap::default() })
}

/// A log that is soon full.
fn layout() -> Layout {
    Layout {
        segment_bytes: 176 * BLOCK_BYTES as u32,
        log_segments: 6,
        slots_per_file: 2,
        slots_max: 8,
        reserve_slots: 2,
        batch_blocks_max: 32,
        ram_blocks_max: 128,
        ..Layout::default()
    }
}

/// A disk that does all at once.
#[derive(Default)]
struct Disk {
    files: BTreeMap<FileId, u64>,
    blocks: BTreeMap<(FileId, u64), Vec<u8>>,
}

impl Media for Disk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        for (nth, part) in (offset / BLOCK_BYTES as u64..).zip(buf.chunks_mut(BLOCK_BYTES)) {
            match self.blocks.get(&(file, nth)) {
                Some(block) => part.copy_from_slice(&block[..part.len()]),
                None => part.fill(0),
            }
        }
        Ok(())
    }
    fn write(&mut self, file: FileId, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let parts = (offset / BLOCK_BYTES as u64..).zip(data.chunks(BLOCK_BYTES));
        self.blocks.extend(parts.map(|(nth, part)| ((file, nth), part.to_vec())));
        let length = self.files.entry(file).or_default();
        *length = (*length).max(offset + data.len() as u64);
        Ok(())
    }
    fn sync(&mut self, _: FileId) -> Result<(), IoError> {
        Ok(())
    }
    fn len(&mut self, file: FileId) -> Result<Option<u64>, IoError> {
        Ok(self.files.get(&file).copied())
    }
    fn create(&mut self, file: FileId, bytes: u64) -> Result<(), IoError> {
        let length = self.files.entry(file).or_default();
        *length = (*length).max(bytes);
        Ok(())
    }
}

struct Node {
    shard: Shard,
    disk: Disk,
    arena: Arena,
}

impl Node {
    fn new(target: u32, now: Time) -> Self {
        let mut disk = Disk::default();
        let identity = Identity { target, ..Identity::default() };
        chunkstore::format(&mut disk, &layout(), &identity).unwrap();
        Self::open(disk, target, now)
    }
    fn open(mut disk: Disk, target: u32, now: Time) -> Self {
        let (store, recovered, _) = chunkstore::recover(&mut disk, &layout()).unwrap();
        let settings = Settings {
            me: at(target),
            election_timeout: Span::ms(300),
            heartbeat: Span::ms(50),
            hibernate_after: Span::ms(60_000),
            catch_up_bytes_s: 0,
            seed: 1,
        };
        let arena = Arena::new(16 << 20).unwrap();
        Self { shard: Shard::new(settings, arena.clone(), store, recovered, now), disk, arena }
    }
    fn run(&mut self, op: Op<Mem>, now: Time) {
        let (ticket, result) = match op {
            Op::Write { ticket, file, offset, pieces, .. } => {
                let mut at = offset;
                for piece in &pieces {
                    match piece {
                        Piece::Payload { payload, first, count } => {
                            self.disk.write(file, at, payload.window(*first, *count).bytes()).unwrap();
                        }
                        Piece::Bytes(bytes) => self.disk.write(file, at, bytes).unwrap(),
                        Piece::Zeroes { blocks } => {
                            self.disk.write(file, at, &vec![0; blocks * BLOCK_BYTES]).unwrap();
                        }
                    }
                    at += (piece.blocks() * BLOCK_BYTES) as u64;
                }
                (ticket, Ok(None))
            }
            Op::Read { ticket, file, offset, blocks } => {
                let mut buf = self.arena.alloc(blocks).unwrap();
                self.disk.read(file, offset, &mut buf).unwrap();
                (ticket, Ok(Some(Mem::whole(buf.freeze()))))
            }
            Op::Sync { ticket, .. } => (ticket, Ok(None)),
            Op::Create { ticket, file, bytes } => (ticket, self.disk.create(file, bytes).map(|()| None)),
        };
        self.shard.store_completed(ticket, result, now);
    }
}

/// Whether a message from one target to another is lost.
type Loses = fn(u32, u32, &PeerMessage) -> bool;

struct Cluster {
    nodes: BTreeMap<u32, Node>,
    now: Time,
    loses: Loses,
    wires: VecDeque<(u32, u32, PeerMessage, Mems)>,
    /// All that was sent and not lost, to whomever; block data only of what was sent to the host.
    heard: Vec<(u32, u32, PeerMessage, Mems)>,
    asked: u64,
}

impl Cluster {
    /// These targets, none of which holds a replica.
    fn empty(targets: &[u32]) -> Self {
        let now = Time(1_000_000_000);
        let nodes = targets.iter().map(|target| (*target, Node::new(*target, now))).collect();
        Self { nodes, now, loses: |_, _, _| false, wires: VecDeque::new(), heard: Vec::new(), asked: 0 }
    }
    /// These targets with a replica each.
    fn of(targets: &[u32]) -> Self {
        let mut cluster = Self::empty(targets);
        cluster.set_map(&map(1, targets, 0));
        cluster
    }
    /// Three targets that target 1 leads; the volume is attached under epoch 1.
    fn of_one_host() -> Self {
        let mut cluster = Self::of(&[1, 2, 3]);
        cluster.elect(1);
        cluster.fence(1, 1);
        cluster
    }
    fn set_map(&mut self, map: &Arc<ClusterMap>) {
        let now = self.now;
        self.nodes.values_mut().for_each(|node| node.shard.set_map(map.clone(), now));
        self.settle();
    }
    fn shard(&mut self, target: u32) -> &mut Shard {
        &mut self.nodes.get_mut(&target).unwrap().shard
    }
    fn replica(&self, target: u32) -> &Replica {
        self.nodes[&target].shard.replica(ID).unwrap()
    }
    /// Lets everybody do all that there is to do now.
    fn settle(&mut self) {
        let now = self.now;
        loop {
            for (target, node) in &mut self.nodes {
                node.shard.settle();
                while let Some(op) = node.shard.poll_op(now) {
                    node.run(op, now);
                    node.shard.settle();
                }
                while let Some(output) = node.shard.poll() {
                    let (to, message, payload) = match output {
                        Output::Send { to, message, payload } => (to.target.0, message, payload),
                        Output::Answer { origin: Origin::Link(to), message, payload } => {
                            (to as u32, message, payload)
                        }
                        _ => continue,
                    };
                    if !(self.loses)(*target, to, &message) {
                        self.wires.push_back((*target, to, message, payload));
                    }
                }
            }
            let Some((from, to, message, payload)) = self.wires.pop_front() else { return };
            let kept = if to == HOST { payload.clone() } else { Mems::new() };
            self.heard.push((from, to, message.clone(), kept));
            self.deliver(from, to, message, payload);
        }
    }
    fn deliver(&mut self, from: u32, to: u32, message: PeerMessage, payload: Mems) {
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&to) {
            node.shard.handle(Origin::Link(from.into()), at(from), message, payload, now);
        }
    }
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.now = self.now + STEP;
            let now = self.now;
            self.nodes.values_mut().for_each(|node| node.shard.tick(now));
            self.settle();
        }
    }
    /// Makes a target the leader in a new term: only its clock goes on until then.
    fn elect(&mut self, target: u32) {
        let term = self.nodes.values().filter_map(|n| n.shard.replica(ID)).map(Replica::term).max().unwrap();
        for _ in 0..1000 {
            self.now = self.now + STEP;
            let now = self.now;
            self.shard(target).tick(now);
            self.settle();
            let replica = self.replica(target);
            if replica.role() == Role::Leader && replica.term() > term {
                return;
            }
        }
        panic!("target {target} is not elected");
    }
    fn data(&self, target: u32, blocks: usize, byte: u8) -> Mem {
        let mut buf = self.nodes[&target].arena.alloc(blocks).unwrap();
        buf.fill(byte);
        Mem::whole(buf.freeze())
    }
    /// Sends a request in the present term, without waiting for what comes of it.
    fn send(&mut self, target: u32, epoch: u64, op: IoOp, payload: Mems) -> u64 {
        let term = self.replica(target).term();
        self.send_in(term, target, epoch, op, payload)
    }
    fn send_in(&mut self, term: Term, target: u32, epoch: u64, op: IoOp, payload: Mems) -> u64 {
        self.asked += 1;
        let request = IoRequest { id: self.asked, copyset: ID, term, epoch: SessionEpoch(epoch), op };
        self.deliver(HOST, target, PeerMessage::Io(request), payload);
        self.asked
    }
    /// The answer to a request, if there is one yet.
    fn answer(&self, id: u64) -> Option<(IoOutcome, Mems)> {
        self.heard.iter().find_map(|(_, to, message, payload)| match message {
            PeerMessage::IoReply(reply) if *to == HOST && reply.id == id => {
                let IoReply { outcome, .. } = reply.clone();
                Some((outcome, payload.clone()))
            }
            _ => None,
        })
    }
    fn outcome(&self, id: u64) -> Option<IoOutcome> {
        self.answer(id).map(|(outcome, _)| outcome)
    }
    fn ask(&mut self, target: u32, epoch: u64, op: IoOp, payload: Mems) -> IoOutcome {
        let id = self.send(target, epoch, op, payload);
        self.settle();
        self.pass(100);
        self.outcome(id).expect("an answer")
    }
    /// Writes a range of blocks, all of one byte.
    fn write(&mut self, target: u32, epoch: u64, chunk: ChunkId, first: usize, blocks: usize, byte: u8) {
        let data = self.data(target, blocks, byte);
        let (offset, length) = ((first * BLOCK_BYTES) as u32, (blocks * BLOCK_BYTES) as u32);
        let op = IoOp::Write { chunk, offset, length, crc: block_crc(data.bytes()) };
        assert_eq!(self.ask(target, epoch, op, Mems::from_elem(data, 1)), IoOutcome::Done);
    }
    /// Reads block 0; empty when it was never written.
    fn read(&mut self, target: u32, epoch: u64) -> Vec<u8> {
        let id = self.send(target, epoch, read(), Mems::new());
        self.settle();
        self.pass(100);
        let (outcome, payload) = self.answer(id).expect("an answer");
        assert!(matches!(outcome, IoOutcome::Data { .. }), "{outcome:?}");
        payload.iter().flat_map(|run| run.bytes().to_vec()).collect()
    }
    /// Asks for a fence until it stands.
    fn fence(&mut self, target: u32, epoch: u64) {
        for _ in 0..10 {
            if self.ask(target, epoch, IoOp::Fence { volume: VOLUME }, Mems::new()) == IoOutcome::Done {
                return;
            }
        }
        panic!("no fence rises");
    }
    fn order(&mut self, target: u32, what: OrderKind, lasts: Span) {
        let order = Order { copyset: ID, what, until: self.now + lasts };
        let now = self.now;
        self.shard(target).follow_orders(&[order], now);
        self.settle();
    }
    /// Of what a target has sent so far, how many messages are such.
    fn sent(&self, from: u32, is_such: impl Fn(&PeerMessage) -> bool) -> usize {
        self.heard.iter().filter(|(sender, _, message, _)| *sender == from && is_such(message)).count()
    }
}

fn read() -> IoOp {
    IoOp::Read { chunk: CHUNK, range: BlockRange::new(0, 1).unwrap() }
}

/// One block of a byte, as the host sends it.
fn block_write(data: &Mem) -> IoOp {
    IoOp::Write { chunk: CHUNK, offset: 0, length: BLOCK_BYTES as u32, crc: block_crc(data.bytes()) }
}

fn is_reply(message: &PeerMessage) -> bool {
    let PeerMessage::Raft { message, .. } = message else { return false };
    matches!(message.kind, Kind::AppendReply { .. } | Kind::HeartbeatReply { .. })
}

#[test]
fn a_write_meant_for_an_earlier_term_of_the_same_leader_is_refused() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.elect(1);
    let earlier = cluster.replica(1).term();
    let late = cluster.data(1, 1, b'a');
    cluster.elect(2);
    cluster.write(2, 0, CHUNK, 0, 1, b'b');
    cluster.elect(1);
    let id = cluster.send_in(earlier, 1, 0, block_write(&late), Mems::from_elem(late, 1));
    cluster.settle();
    cluster.pass(100);
    let term = cluster.replica(1).term();
    let refused = IoOutcome::NotLeader { leader: Some(at(1)), term };
    assert_eq!(cluster.outcome(id), Some(refused));
    assert_eq!(cluster.read(1, 0), [b'b'; BLOCK_BYTES], "target 2 did it, and later ones");
}

#[test]
fn a_part_of_a_block_is_merged_with_what_the_last_leader_left_behind() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.elect(2);
    cluster.pass(100);
    // Target 1 has the entry; nobody knows yet that it is committed.
    cluster.loses = |_, _, message| is_reply(message);
    let data = cluster.data(2, 1, b'a');
    cluster.send(2, 0, block_write(&data), Mems::from_elem(data, 1));
    cluster.settle();
    cluster.loses = |from, to, message| from == 2 || to == 2 || is_reply(message);
    cluster.elect(1);
    assert!(cluster.replica(1).applied_index().next() < cluster.replica(1).last_index(), "inherited");
    let part = cluster.data(1, 1, b'b');
    let crc = block_crc(&part.bytes()[..512]);
    let op = IoOp::Write { chunk: CHUNK, offset: 512, length: 512, crc };
    let id = cluster.send(1, 0, op, Mems::from_elem(part, 1));
    cluster.settle();
    cluster.loses = |from, to, _| from == 2 || to == 2;
    cluster.pass(300);
    assert_eq!(cluster.outcome(id), Some(IoOutcome::Done));
    let found = cluster.read(1, 0);
    assert_eq!((&found[..512], &found[512..1024]), (&[b'a'; 512][..], &[b'b'; 512][..]));
    assert_eq!(found[1024..], [b'a'; BLOCK_BYTES - 1024]);
}

#[test]
fn a_follower_neither_keeps_nor_acknowledges_a_block_that_was_damaged_on_its_way() {
    let mut cluster = Cluster::empty(&[1]);
    cluster.set_map(&map(1, &[1, 2, 3], 0));
    let range = BlockRange::new(0, 1).unwrap();
    let entry = Entry { term: Term(1), index: LogIndex(1), body: Body::Write { chunk: CHUNK, range } };
    let data = cluster.data(1, 1, b'a');
    let append = |crc: u32| {
        let kind = Kind::Append {
            round: Round { number: 1, sent_ns: 1 },
            prev_index: LogIndex(0),
            prev_term: Term(0),
            commit: LogIndex(0),
            entries: vec![entry].into(),
        };
        PeerMessage::Raft { copyset: ID, message: Message { term: Term(1), kind }, crcs: vec![crc].into() }
    };
    let crc = block_crc(data.bytes());
    cluster.deliver(2, 1, append(crc ^ 1), Mems::from_elem(data.clone(), 1));
    cluster.settle();
    let taken = |cluster: &Cluster| (cluster.replica(1).last_index().0, cluster.sent(1, is_reply));
    assert_eq!((taken(&cluster), cluster.shard(1).counts().wire_corrupt), ((0, 0), 1));
    cluster.deliver(2, 1, append(crc), Mems::from_elem(data, 1));
    cluster.settle();
    assert_eq!((taken(&cluster), cluster.shard(1).counts().wire_corrupt), ((1, 1), 1), "it is sent again");
}

/// Target 1, which has applied so much of what 2 led, alone with 3: a leader that has compacted its log, and has not yet
/// applied all of what is committed in it.
fn with_a_new_leader() -> (Cluster, LogIndex) {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.elect(2);
    cluster.write(2, 0, CHUNK, 0, 1, b'a');
    cluster.pass(200);
    let applied = cluster.replica(1).applied_index();
    cluster.nodes.retain(|target, _| *target == 1);
    (cluster, applied)
}

impl Cluster {
    /// Target 3 tells, in a term of its own, that its log does not reach back to what target 1 lacks.
    fn must_be_filled(&mut self, term: Term, install: LogIndex) {
        let round = Round { number: 1, sent_ns: 1 };
        let kind = Kind::Heartbeat { round, commit: LogIndex(0), sleep: false, install: Some(install) };
        let beat = PeerMessage::Raft { copyset: ID, message: Message { term, kind }, crcs: Crcs::new() };
        self.deliver(3, 1, beat, Mems::new());
        self.settle();
    }
    fn fetched(&mut self, fetched: Fetched) {
        self.deliver(3, 1, PeerMessage::Fetched { copyset: ID, fetched }, Mems::new());
        self.settle();
    }
    /// A leader's answer to the question for its chunks: it has none, and has applied so much.
    fn fetched_begin(&mut self, index: LogIndex) {
        let members = *self.replica(1).members();
        let term = self.replica(1).entry(index).unwrap().term;
        self.fetched(Fetched::Begin { index, term, members, fences: Vec::new(), chunks: Vec::new() });
    }
    /// What target 1 has asked for to be filled.
    fn fetches(&self) -> Vec<Fetch> {
        let fetches = self.heard.iter().filter_map(|(from, _, message, _)| match message {
            PeerMessage::Fetch { fetch, .. } if *from == 1 => Some(*fetch),
            _ => None,
        });
        fetches.collect()
    }
}

#[test]
fn a_catch_up_is_not_taken_from_a_leader_that_has_applied_less() {
    let (mut cluster, applied) = with_a_new_leader();
    let before = LogIndex(applied.0 - 1);
    assert!(cluster.replica(1).entry(before).is_some(), "its log goes further back than its leader's floor");
    cluster.must_be_filled(Term(cluster.replica(1).term().0 + 1), LogIndex(applied.0 + 9));
    assert_eq!(cluster.fetches(), [Fetch::Begin]);
    cluster.fetched_begin(before);
    assert_eq!(cluster.fetches(), [Fetch::Begin], "it would take back what was applied");
    assert_eq!(cluster.shard(1).chunks_of(ID), [CHUNK], "nothing is dropped either");
    cluster.fetched_begin(applied);
    assert_eq!(cluster.fetches(), [Fetch::Begin, Fetch::End], "once it has applied as much");
}

/// Found by the simulator (swarm 90413).
#[test]
fn a_catch_up_that_begins_before_the_replica_counts_is_told_in_the_log() {
    let (mut cluster, applied) = with_a_new_leader();
    let term = Term(cluster.replica(1).term().0 + 1);
    let ahead = LogIndex(applied.0 + 9);
    cluster.must_be_filled(term, ahead);
    cluster.fetched_begin(applied);
    cluster.fetched(Fetched::End { index: ahead });
    assert!(!cluster.shard(1).store.is_installing(ID), "a start finds it whole");
    assert_eq!(cluster.replica(1).health(), Health::Installing, "its chunks may be ahead of its log");
    cluster.must_be_filled(Term(term.0 + 1), ahead);
    assert_eq!(cluster.fetches().last(), Some(&Fetch::Begin));
    assert!(cluster.shard(1).store.is_installing(ID), "a start must not take what is half filled for whole");
}

#[test]
fn a_leader_serves_a_catch_up_before_an_entry_of_its_own_is_committed() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.elect(2);
    cluster.write(2, 0, CHUNK, 0, 1, b'a');
    cluster.pass(200);
    // The two others are amid a catch-up, neither counts: nothing of the new leader's is ever committed.
    cluster.loses = |_, _, message| is_reply(message);
    cluster.elect(1);
    let (index, term) = (cluster.replica(1).applied_index(), cluster.replica(1).term());
    assert!(cluster.replica(1).entry(index).is_some_and(|entry| entry.term < term));
    cluster.heard.clear();
    cluster.deliver(3, 1, PeerMessage::Fetch { copyset: ID, fetch: Fetch::Begin }, Mems::new());
    cluster.settle();
    let told = cluster.heard.iter().find_map(|(_, to, message, _)| match message {
        PeerMessage::Fetched { fetched, .. } if *to == 3 => Some(fetched.clone()),
        _ => None,
    });
    assert!(matches!(told, Some(Fetched::Begin { index: base, .. }) if base == index), "{told:?}");
}

#[test]
fn a_replica_that_the_map_names_is_not_freed_whatever_the_mds_orders() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.elect(1);
    cluster.pass(100);
    let drop = || OrderKind::Drop { after: LogIndex(100) };
    cluster.order(3, drop(), Span::ms(1000));
    assert!(cluster.shard(3).replica(ID).is_some());
    let elsewhere = map(2, &[1, 2, 4], 1);
    let now = cluster.now;
    cluster.shard(3).set_map(elsewhere, now);
    cluster.order(3, drop(), Span::ms(1000));
    assert!(cluster.shard(3).replica(ID).is_none());
}

#[test]
fn a_replica_is_made_with_a_vote_only_for_a_copyset_whose_members_never_changed() {
    let mut cluster = Cluster::empty(&[3]);
    cluster.set_map(&map(1, &[1, 2, 3], 1));
    assert!(cluster.shard(3).replica(ID).is_none(), "it was freed before, and may have voted");
    cluster.order(3, OrderKind::Host { shard: 0 }, Span::ms(1000));
    assert!(!cluster.replica(3).members().is_voter(TargetId(3)), "made by order, without a vote");
    let mut cluster = Cluster::empty(&[3]);
    cluster.set_map(&map(1, &[1, 2, 3], 0));
    assert!(cluster.replica(3).members().is_voter(TargetId(3)));
}

#[test]
fn a_leader_goes_no_step_further_by_an_order_that_has_expired() {
    let mut cluster = Cluster::empty(&[1, 2, 3, 4]);
    cluster.set_map(&map(1, &[1, 2, 3], 0));
    cluster.elect(1);
    cluster.pass(100);
    for _ in 0..CAUGHT_UP_ENTRIES + 20 {
        cluster.send(1, 0, IoOp::Zero { chunk: CHUNK, offset: 0, length: BLOCK_BYTES as u32 }, Mems::new());
        cluster.settle();
    }
    // The newcomer does not catch up before the order expires.
    cluster.loses = |from, _, message| from == 4 && is_reply(message);
    cluster.order(4, OrderKind::Host { shard: 0 }, Span::ms(1000));
    let voters = || OrderKind::Voters(all(&[1, 2, 3, 4]));
    cluster.order(1, voters(), Span::ms(1000));
    cluster.pass(1500);
    cluster.loses = |_, _, _| false;
    cluster.pass(2000);
    let members = *cluster.replica(1).members();
    assert_eq!((members.voters().count(), members.learners().collect()), (3, all(&[4])), "{members:?}");
    cluster.order(1, voters(), Span::ms(1000));
    cluster.pass(1000);
    assert!(cluster.replica(1).members().is_voter(TargetId(4)), "asked again, it goes on");
}

#[test]
fn a_dead_voter_leaves_as_soon_as_the_newcomer_votes() {
    let mut cluster = Cluster::empty(&[1, 2, 3, 4]);
    cluster.set_map(&map(1, &[1, 2, 3], 0));
    cluster.elect(1);
    cluster.loses = |from, to, _| from == 3 || to == 3;
    cluster.order(4, OrderKind::Host { shard: 0 }, Span::ms(5000));
    cluster.order(1, OrderKind::Voters(all(&[1, 2, 4])), Span::ms(5000));
    for _ in 0..100 {
        cluster.pass(10);
        let voters = cluster.replica(1).members().voters().count();
        assert_eq!(voters, 3, "a write waits for three of four, one of them dead");
    }
    assert_eq!(cluster.replica(1).members().voters().collect::<Vec<_>>(), all(&[1, 2, 4]));
}

#[test]
fn nothing_is_read_under_an_epoch_that_a_take_over_has_ended() {
    let mut cluster = Cluster::of_one_host();
    cluster.write(1, 1, CHUNK, 0, 1, b'a');
    cluster.fence(1, 2);
    let outcome = cluster.ask(1, 1, read(), Mems::new());
    assert_eq!(outcome, IoOutcome::Fenced { epoch: SessionEpoch(2) });
    assert_eq!(cluster.read(1, 2), [b'a'; BLOCK_BYTES]);
}

#[test]
fn a_write_that_was_merged_while_a_fence_rose_is_not_proposed_behind_it() {
    let mut cluster = Cluster::of_one_host();
    cluster.write(1, 1, CHUNK, 0, 1, b'a');
    let part = cluster.data(1, 1, b'b');
    let crc = block_crc(&part.bytes()[..512]);
    let op = IoOp::Write { chunk: CHUNK, offset: 0, length: 512, crc };
    let id = cluster.send(1, 1, op, Mems::from_elem(part, 1));
    // Its block is being read.
    cluster.send(1, 2, IoOp::Fence { volume: VOLUME }, Mems::new());
    cluster.settle();
    cluster.pass(100);
    let outcome = cluster.outcome(id);
    assert_eq!(outcome, Some(IoOutcome::Fenced { epoch: SessionEpoch(2) }));
    cluster.fence(1, 2);
    assert_eq!(cluster.read(1, 2), [b'a'; BLOCK_BYTES]);
}

#[test]
fn a_new_epoch_sees_nothing_before_what_came_under_the_old_one_is_applied() {
    let mut cluster = Cluster::of_one_host();
    cluster.write(1, 1, CHUNK, 0, 1, b'a');
    cluster.loses = |_, _, message| matches!(message, PeerMessage::Raft { .. });
    let data = cluster.data(1, 1, b'b');
    let write = cluster.send(1, 1, block_write(&data), Mems::from_elem(data, 1));
    cluster.settle();
    let early = cluster.send(1, 2, read(), Mems::new());
    cluster.settle();
    assert_eq!(cluster.outcome(write), None);
    assert_eq!(cluster.outcome(early), Some(IoOutcome::Busy), "the fence rises");
    cluster.loses = |_, _, _| false;
    cluster.fence(1, 2);
    assert_eq!(cluster.outcome(write), Some(IoOutcome::Done));
    assert_eq!(cluster.read(1, 2), [b'b'; BLOCK_BYTES]);
}

#[test]
fn a_replica_that_is_filled_chunk_by_chunk_knows_the_fences_too() {
    let mut cluster = Cluster::of_one_host();
    cluster.loses = |from, to, _| from == 3 || to == 3;
    cluster.fence(1, 2);
    let other = ChunkId { volume: VolumeId(2), index: 0 };
    for nth in 0..60 {
        cluster.write(1, 0, other, nth % 8 * ENTRY_BLOCKS_MAX, ENTRY_BLOCKS_MAX, nth as u8);
    }
    assert!(cluster.replica(1).floor().0 > cluster.replica(3).last_index(), "compacted past it");
    cluster.loses = |_, _, _| false;
    cluster.pass(3000);
    let caught_up = cluster.shard(3).counts().catch_ups;
    assert_eq!((caught_up, cluster.replica(3).health()), (1, Health::Whole));
    assert_eq!(cluster.shard(3).store.fence(ID, VOLUME), SessionEpoch(2));
    cluster.elect(3);
    let outcome = cluster.ask(3, 1, read(), Mems::new());
    assert_eq!(outcome, IoOutcome::Fenced { epoch: SessionEpoch(2) });
}

/// Swarm 99519.
#[test]
fn a_volume_written_after_a_follower_had_freed_it_is_freed_by_that_follower_as_leader() {
    let mut cluster = Cluster::of_one_host();
    let mut gone = ClusterMap::clone(&map(2, &[1, 2, 3], 0));
    let (name, copysets, session) = ("v".into(), vec![ID], Session::default());
    let deleted = VolumeEntry { name, bytes: 1 << 24, block_bytes: 4096, copysets, deleted: true, session };
    gone.volumes.insert(VOLUME, deleted);
    let (gone, now) = (Arc::new(gone), cluster.now);
    cluster.shard(2).set_map(gone.clone(), now);
    cluster.pass(1000);
    assert!(cluster.shard(2).freed.contains(&VOLUME), "nothing was ever written");
    cluster.write(1, 1, CHUNK, 0, 1, 7);
    cluster.elect(2);
    cluster.pass(1000);
    cluster.set_map(&gone);
    cluster.pass(2000);
    for target in [1, 2, 3] {
        let shard = cluster.shard(target);
        assert!(shard.store.chunks_of(ID).is_empty() && shard.freed.contains(&VOLUME), "target {target}");
    }
}

#[test]
fn a_leader_that_cannot_read_an_entry_back_leaves_the_lead_to_one_that_can() {
    let mut cluster = Cluster::of_one_host();
    cluster.loses = |_, to, message| to == 3 && matches!(message, PeerMessage::Raft { .. });
    cluster.write(1, 1, CHUNK, 0, 1, 7);
    cluster.shard(1).evict(1 << 20);
    let rotten = &mut cluster.nodes.get_mut(&1).unwrap().disk.blocks;
    let rotten = rotten.values_mut().filter(|block| block.iter().all(|byte| *byte == 7));
    assert_eq!(rotten.map(|block| block[100] = 8).count(), 1, "it lies in the log alone");
    cluster.loses = |_, _, _| false;
    cluster.pass(3_000);
    let behind = cluster.replica(2).last_index();
    assert_eq!(cluster.replica(3).last_index(), behind, "nobody is left behind");
    cluster.elect(3);
    assert_eq!(cluster.read(3, 1), [7; BLOCK_BYTES]);
}

#[test]
fn a_replica_whose_create_a_damaged_log_lost_is_made_again_without_a_vote() {
    let mut cluster = Cluster::of_one_host();
    cluster.pass(200);
    let now = cluster.now;
    let mut disk = cluster.nodes.remove(&3).unwrap().disk;
    // The log's first batch, which holds the Create.
    disk.write(FileId::Log(0), 0, &[0; BLOCK_BYTES]).unwrap();
    let mut node = Node::open(disk, 3, now);
    assert!(node.shard.replica(ID).is_none());
    node.shard.set_map(map(1, &[1, 2, 3], 0), now);
    assert_eq!(node.shard.replica(ID).unwrap().health(), Health::Damaged);
    cluster.nodes.insert(3, node);
    cluster.pass(2000);
    assert_eq!(cluster.replica(3).health(), Health::Whole, "it heard both others and caught up");
}
