//! Each rule by itself; the rules together against a faulty cluster are in `simulation`.

mod simulation;

use super::*;
use protocol::map::{CopysetEntry, Session};
use protocol::types::{BLOCK_BYTES, CHUNK_BYTES, TargetId};

type Io = VolumeIo<Vec<u64>>;
const VOLUME: VolumeId = VolumeId(7);
const EPOCH: SessionEpoch = SessionEpoch(4);
const CHUNK: u64 = CHUNK_BYTES as u64;

fn shard(target: u32) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard: 0 }
}

/// Three targets, one volume of 32 GiB over so many copysets.
fn map(copysets: u32) -> ClusterMap {
    let members = vec![shard(1), shard(2), shard(3)];
    let volume = VolumeEntry {
        name: "v".into(),
        bytes: 32 << 30,
        block_bytes: 512,
        copysets: (1..=copysets).map(CopysetId).collect(),
        deleted: false,
        session: Session::default(),
    };
    ClusterMap {
        generation: 1,
        copysets: (1..=copysets)
            .map(|id| (CopysetId(id), CopysetEntry { members: members.clone(), epoch: 0 }))
            .collect(),
        volumes: BTreeMap::from([(VOLUME, volume)]),
        ..ClusterMap::default()
    }
}

/// One `VolumeIo` with a hand to answer it.
struct Bench {
    io: Io,
    now: Time,
    /// What was not looked at yet.
    sent: VecDeque<(ShardAddr, IoRequest)>,
    told: VecDeque<Action<Vec<u64>>>,
}

impl Bench {
    fn new(config: Config) -> Self {
        let now = Time(1_000_000);
        let mut io = Io::new(config);
        io.set_map(Arc::new(map(1)), now);
        (1..=3).for_each(|t| io.link_up(shard(t), now));
        Self { io, now, sent: VecDeque::new(), told: VecDeque::new() }
    }
    /// As new, and target 1 is known to lead term 5.
    fn led(config: Config) -> Self {
        let mut bench = Self::new(config);
        bench.io.routes.clear();
        bench.read(999, 0, 4096);
        let (to, ask) = bench.next_sent();
        assert_eq!(ask.op, IoOp::WhoLeads);
        bench.not_leader(to, ask, Some(1), 5);
        let (to, read) = bench.next_sent();
        assert_eq!((to, read.term), (shard(1), Term(5)));
        bench.answer(to, read, IoOutcome::Data { present: 0, crcs: vec![].into() });
        bench.told.clear();
        bench
    }
    fn drain(&mut self) {
        while let Some(action) = self.io.poll() {
            match action {
                Action::Send { to, request, .. } => self.sent.push_back((to, request)),
                other => self.told.push_back(other),
            }
        }
    }
    fn read(&mut self, id: u64, offset: u64, length: u64) {
        self.io.submit(id, EPOCH, Request::Read { volume: VOLUME, offset, length }, self.now).unwrap();
        self.drain();
    }
    fn write(&mut self, id: u64, offset: u64) {
        let request = Request::WritePiece { volume: VOLUME, offset, length: 4096, crc: 1, payload: vec![id] };
        self.io.submit(id, EPOCH, request, self.now).unwrap();
        self.drain();
    }
    fn next_sent(&mut self) -> (ShardAddr, IoRequest) {
        self.sent.pop_front().expect("something was to be sent")
    }
    fn answer(&mut self, from: ShardAddr, to: IoRequest, outcome: IoOutcome) {
        let reply = IoReply { id: to.id, copyset: to.copyset, outcome };
        self.io.reply(from, reply, Payload::new(), self.now);
        self.drain();
    }
    fn not_leader(&mut self, from: ShardAddr, to: IoRequest, leader: Option<u32>, term: u64) {
        self.answer(from, to, IoOutcome::NotLeader { leader: leader.map(shard), term: Term(term) });
    }
    /// Lets time pass, ticking whenever asked to.
    fn pass(&mut self, span: Span) {
        let until = self.now + span;
        while let Some(at) = self.io.next_timeout().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.io.tick(self.now);
            self.drain();
        }
        self.now = until;
    }
    fn done(&mut self) -> Vec<(u64, Result<(), IoError>)> {
        let told = self.told.drain(..);
        let done =
            told.filter_map(|a| if let Action::Done { id, result } = a { Some((id, result)) } else { None });
        done.collect()
    }
    fn sent_ops(&mut self) -> Vec<IoOp> {
        self.sent.drain(..).map(|(_, request)| request.op).collect()
    }
}

#[test]
fn a_silent_leader_makes_it_ask_others_but_never_send_a_write_twice() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let (_, first) = bench.next_sent();
    bench.pass(Span::ms(600));
    let (asked, ask) = bench.next_sent();
    assert_eq!(ask.op, IoOp::WhoLeads);
    assert_ne!(asked, shard(1));
    bench.not_leader(asked, ask, Some(1), 5);
    bench.pass(Span::ms(5000));
    assert!(bench.sent_ops().iter().all(|op| *op == IoOp::WhoLeads));
    bench.answer(shard(1), first, IoOutcome::Done);
    assert_eq!(bench.done(), [(1, Ok(()))]);
}

#[test]
fn a_higher_term_takes_over_a_write_and_the_old_leaders_answer_counts_no_more() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let (_, first) = bench.next_sent();
    bench.pass(Span::ms(600));
    let (asked, ask) = bench.next_sent();
    bench.not_leader(asked, ask, Some(2), 6);
    let (to, second) = bench.next_sent();
    assert_eq!((to, second.term), (shard(2), Term(6)));
    bench.answer(shard(1), first, IoOutcome::Done);
    assert_eq!(bench.done(), [], "the copy on its way to the new leader might win over a later write");
    bench.answer(shard(2), second, IoOutcome::Done);
    assert_eq!(bench.done(), [(1, Ok(()))]);
}

#[test]
fn a_lost_link_repeats_a_write_only_on_a_new_one_to_the_same_leader() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    bench.sent.clear();
    bench.io.link_down(shard(1), bench.now);
    bench.drain();
    bench.pass(Span::ms(400));
    assert!(bench.sent_ops().iter().all(|op| *op == IoOp::WhoLeads));
    bench.io.link_up(shard(1), bench.now);
    bench.drain();
    let (to, again) = bench.next_sent();
    assert_eq!((to, again.term), (shard(1), Term(5)));
    assert!(matches!(again.op, IoOp::Write { .. }));
    bench.answer(to, again, IoOutcome::Done);
    assert_eq!(bench.done(), [(1, Ok(()))]);
}

#[test]
fn two_leaders_named_for_one_term_do_not_get_a_write_in_doubt() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    bench.sent.clear();
    bench.io.link_down(shard(1), bench.now);
    bench.drain();
    let (asked, ask) = bench.next_sent();
    bench.not_leader(asked, ask, Some(3), 5);
    bench.pass(Span::ms(3000));
    assert!(bench.sent_ops().iter().all(|op| *op == IoOp::WhoLeads));
}

#[test]
fn not_leader_of_the_same_term_is_not_done_and_goes_to_the_named_leader() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let (to, first) = bench.next_sent();
    bench.not_leader(to, first, Some(2), 5);
    bench.pass(Span::ms(10));
    let (to, again) = bench.next_sent();
    assert_eq!((to, again.term), (shard(2), Term(5)));
}

#[test]
fn busy_backs_off_longer_each_time_and_starts_anew_after_success() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let mut waits = Vec::new();
    for _ in 0..4 {
        let (to, request) = bench.next_sent();
        bench.answer(to, request, IoOutcome::Busy);
        let before = bench.now;
        assert!(bench.sent.is_empty());
        while bench.sent.is_empty() {
            bench.pass(Span::us(500));
        }
        waits.push((bench.now - before).0);
    }
    assert!(waits.is_sorted() && waits[3] >= 8 * waits[0] / 2, "{waits:?}");
    let (to, request) = bench.next_sent();
    bench.answer(to, request, IoOutcome::Done);
    assert_eq!(bench.done(), [(1, Ok(()))]);
}

#[test]
fn an_unknown_copyset_asks_for_a_map_and_the_next_replica() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    bench.told.clear();
    let (to, request) = bench.next_sent();
    bench.answer(to, request, IoOutcome::UnknownCopyset);
    assert_eq!(bench.told, [Action::NeedMap]);
    bench.pass(Span::ms(200));
    let (_, ask) = bench.next_sent();
    assert_eq!(ask.op, IoOp::WhoLeads);
}

#[test]
fn a_long_read_is_cut_and_never_has_more_in_flight_than_allowed() {
    let mut bench = Bench::led(Config { read_bytes_max: 1 << 20, ..Config::default() });
    bench.read(1, 512, 8 << 20);
    let mut covered = 0;
    while let Some((to, request)) = bench.sent.pop_front() {
        assert!(bench.sent.len() < 2, "a copyset may take a quarter: 2 pieces of 128 KiB");
        let IoOp::Read { range, .. } = request.op else { panic!("{request:?}") };
        covered += range.bytes();
        bench.answer(to, request, IoOutcome::Data { present: 0, crcs: vec![].into() });
    }
    assert_eq!(covered, (8 << 20) + BLOCK_BYTES);
    assert_eq!(bench.done(), [(1, Ok(()))]);
    assert_eq!((bench.io.in_flight, bench.io.read_bytes), (0, 0));
}

#[test]
fn a_status_joins_runs_across_chunks_and_is_cut_to_what_was_asked() {
    let mut bench = Bench::led(Config::default());
    let request = Request::Status { volume: VOLUME, offset: CHUNK - 8192 + 512, length: 8192 };
    bench.io.submit(1, EPOCH, request, bench.now).unwrap();
    bench.drain();
    let (first, second) = (bench.next_sent(), bench.next_sent());
    bench.answer(second.0, second.1, IoOutcome::Status { runs: vec![(1, true)] });
    bench.answer(first.0, first.1, IoOutcome::Status { runs: vec![(1, false), (1, true)] });
    let runs = vec![(4096 - 512, false), (4096 + 512, true)];
    assert_eq!(bench.told, [Action::StatusDone { id: 1, runs }]);
}

#[test]
fn nonsense_from_a_peer_fails_the_request_and_nothing_else() {
    for outcome in [
        IoOutcome::Done,
        IoOutcome::Data { present: 0b10, crcs: vec![1].into() },
        IoOutcome::Data { present: 1, crcs: vec![].into() },
        IoOutcome::Status { runs: vec![] },
    ] {
        let mut bench = Bench::led(Config::default());
        bench.read(1, 0, 4096);
        let (to, request) = bench.next_sent();
        bench.answer(to, request, outcome);
        assert_eq!(bench.done(), [(1, Err(IoError::Io))]);
    }
}

#[test]
fn a_zero_that_fails_is_told_only_when_nothing_of_it_is_in_flight() {
    let mut bench = Bench::led(Config::default());
    bench
        .io
        .submit(1, EPOCH, Request::Zero { volume: VOLUME, offset: 0, length: 2 * CHUNK }, bench.now)
        .unwrap();
    bench.drain();
    let (first, second) = (bench.next_sent(), bench.next_sent());
    bench.answer(first.0, first.1, IoOutcome::NoSpace);
    assert_eq!(bench.done(), []);
    bench.answer(second.0, second.1, IoOutcome::Done);
    assert_eq!(bench.done(), [(1, Err(IoError::NoSpace))]);
}

#[test]
fn a_refused_segment_fails_writes_and_is_reported_again_later() {
    let mut bench = Bench::led(Config::default());
    let first_write = Action::FirstWrite { volume: VOLUME, segment: 0 };
    bench.write(1, 0);
    bench.write(2, 4096);
    assert_eq!(bench.told.drain(..).collect::<Vec<_>>(), std::slice::from_ref(&first_write));
    bench.io.segment_refused(VOLUME, 0);
    bench.write(3, 0);
    assert_eq!(bench.done(), [(3, Err(IoError::NoSpace))]);
    bench.pass(Span::ms(1500));
    bench.write(4, 0);
    assert!(bench.told.contains(&first_write));
    bench.io.segment_granted(VOLUME, 0);
    bench.told.clear();
    bench.write(5, 0);
    assert!(bench.told.is_empty());
}

#[test]
fn requests_that_cannot_be_are_refused_and_leave_nothing_behind() {
    let mut bench = Bench::new(Config { requests_max: 1, ..Config::default() });
    let read = |offset, length| Request::<Vec<u64>>::Read { volume: VOLUME, offset, length };
    let mut submit = |request| bench.io.submit(1, EPOCH, request, Time(0));
    let write =
        |offset, length| Request::WritePiece { volume: VOLUME, offset, length, crc: 0, payload: vec![] };
    assert_eq!(submit(read(0, 0)), Err(SubmitError::OutOfRange));
    assert_eq!(submit(read(32 << 30, 512)), Err(SubmitError::OutOfRange));
    assert_eq!(submit(read(u64::MAX - 511, 512)), Err(SubmitError::OutOfRange));
    assert_eq!(submit(read(1, 512)), Err(SubmitError::Misaligned));
    assert_eq!(submit(write((128 << 10) - 512, 1024)), Err(SubmitError::Misaligned));
    let other = Request::Read { volume: VolumeId(8), offset: 0, length: 512 };
    assert_eq!(submit(other), Err(SubmitError::UnknownVolume));
    assert_eq!(submit(read(0, 512)), Ok(()));
    assert_eq!(submit_id(&mut bench.io, 2), Err(SubmitError::Busy));
    bench.io.stop();
    bench.drain();
    assert_eq!(bench.done(), [(1, Err(IoError::Stopped))]);
    assert_eq!(submit_id(&mut bench.io, 2), Err(SubmitError::Stopped));
    assert!(bench.io.pieces.is_empty());
}

fn submit_id(io: &mut Io, id: u64) -> Result<(), SubmitError> {
    io.submit(id, EPOCH, Request::Read { volume: VOLUME, offset: 0, length: 512 }, Time(0))
}

#[test]
fn an_export_with_a_timeout_fails_a_request_that_finds_no_quorum() {
    let mut bench = Bench::new(Config { io_timeout: Some(Span::ms(3000)), ..Config::default() });
    bench.write(1, 0);
    bench.pass(Span::ms(2900));
    assert_eq!(bench.done(), []);
    bench.pass(Span::ms(200));
    assert_eq!(bench.done(), [(1, Err(IoError::TimedOut))]);
    assert!(bench.io.pieces.is_empty() && bench.io.deadlines.is_empty());
}

#[test]
fn an_aborted_client_leaves_no_action_no_piece_and_no_count() {
    let mut bench = Bench::led(Config::default());
    bench.read(1, 0, 1 << 20);
    let (to, request) = bench.next_sent();
    bench.io.reply(
        to,
        IoReply {
            id: request.id,
            copyset: request.copyset,
            outcome: IoOutcome::Data { present: 0, crcs: vec![].into() },
        },
        Payload::new(),
        bench.now,
    );
    bench.io.abort(1, bench.now);
    bench.drain();
    assert!(bench.told.is_empty() && bench.io.pieces.is_empty());
    assert_eq!((bench.io.in_flight, bench.io.read_bytes, bench.io.open_requests()), (0, 0, 0));
    let late = bench.next_sent();
    bench.answer(late.0, late.1, IoOutcome::Data { present: 0, crcs: vec![].into() });
    assert!(bench.told.is_empty());
}

#[test]
fn a_deleted_volumes_requests_end() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let mut newer = map(1);
    newer.generation = 2;
    newer.volumes.get_mut(&VOLUME).unwrap().deleted = true;
    bench.io.set_map(Arc::new(newer), bench.now);
    bench.drain();
    assert_eq!(bench.done(), [(1, Err(IoError::Gone))]);
    bench.io.set_map(Arc::new(map(1)), bench.now);
    assert_eq!(submit_id(&mut bench.io, 2), Err(SubmitError::UnknownVolume), "an older map is ignored");
}

#[test]
fn one_copyset_without_a_leader_does_not_stop_the_others() {
    let mut bench = Bench::new(Config { in_flight_max: 8, ..Config::default() });
    let mut two = map(2);
    two.generation = 2;
    bench.io.set_map(Arc::new(two), bench.now);
    // Chunk 0 lies in copyset 1, which has no leader; chunk 1 in copyset 2, which has.
    (0..20).for_each(|n| bench.write(n, 4096 * n));
    bench.write(100, CHUNK);
    let asks: Vec<_> = bench.sent.drain(..).collect();
    assert!(asks.iter().all(|(_, ask)| ask.op == IoOp::WhoLeads));
    let (to, ask) = *asks.iter().find(|(_, ask)| ask.copyset == CopysetId(2)).unwrap();
    bench.not_leader(to, ask, Some(2), 1);
    let (to, write) = bench.next_sent();
    bench.answer(to, write, IoOutcome::Done);
    assert_eq!(bench.done(), [(100, Ok(()))]);
}

#[test]
fn idle_there_is_nothing_to_wake_for() {
    let mut bench = Bench::led(Config::default());
    bench.pass(Span::ms(10_000));
    assert_eq!(bench.io.next_timeout(), None);
    assert!(bench.sent.is_empty());
}

#[test]
fn a_write_under_an_epoch_that_a_take_over_ended_fails_for_good() {
    let mut bench = Bench::led(Config::default());
    bench.write(1, 0);
    let (to, request) = bench.next_sent();
    assert_eq!(request.epoch, EPOCH);
    bench.answer(to, request, IoOutcome::Fenced { epoch: SessionEpoch(EPOCH.0 + 1) });
    assert_eq!(bench.done(), [(1, Err(IoError::Fenced))]);
    bench.pass(Span::ms(5000));
    assert_eq!(bench.sent_ops(), [], "it is not sent again");
}

#[test]
fn a_fence_is_raised_in_each_copyset_of_the_volume_once_however_small_it_is() {
    let mut bench = Bench::led(Config::default());
    let mut wide = map(3);
    wide.generation = 2;
    // Fewer chunks than copysets.
    wide.volumes.get_mut(&VOLUME).unwrap().bytes = CHUNK;
    bench.io.set_map(Arc::new(wide), bench.now);
    bench.io.submit(1, EPOCH, Request::Fence { volume: VOLUME }, bench.now).unwrap();
    bench.drain();
    let mut raised = BTreeSet::new();
    while let Some((to, request)) = bench.sent.pop_front() {
        match request.op {
            IoOp::WhoLeads => bench.not_leader(to, request, Some(2), 7),
            IoOp::Fence { volume: VOLUME } => {
                assert_eq!(request.epoch, EPOCH);
                assert!(raised.insert(request.copyset), "{request:?}");
                bench.answer(to, request, IoOutcome::Done);
            }
            op => panic!("{op:?}"),
        }
    }
    assert_eq!(raised, (1..=3).map(CopysetId).collect());
    assert_eq!(bench.done(), [(1, Ok(()))]);
}
