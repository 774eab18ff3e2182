//! Golden bytes of every operation, and bytes that are not ours.

use super::*;
use crate::raft::{AppendOutcome, Entry, Fence, Round, Standing};
use crate::types::{ChunkId, CopysetId, LogIndex, SessionEpoch, ShardAddr, TargetId, Term, VolumeId};
use expect_test::expect_file;
use proptest::prelude::*;

const CS: CopysetId = CopysetId(3);

fn shard(target: u32, shard: u16) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard }
}

fn chunk(index: u32) -> ChunkId {
    ChunkId { volume: VolumeId(9), index }
}

fn range(first: usize, count: usize) -> BlockRange {
    BlockRange::new(first, count).unwrap()
}

fn fence(volume: u32) -> Fence {
    Fence { volume: VolumeId(volume), epoch: SessionEpoch(6) }
}

fn members() -> Members {
    Members::new(&[shard(1, 0), shard(2, 1), shard(3, 0)], &[shard(4, 0)]).unwrap()
}

fn entry(index: u64, body: Body) -> Entry {
    Entry { term: Term(5), index: LogIndex(index), body }
}

fn raft(kind: Kind, crcs: Vec<u32>) -> PeerMessage {
    let crcs = crcs.into();
    PeerMessage::Raft { copyset: CS, message: Message { term: Term(5), kind }, crcs }
}

fn append(entries: Vec<Entry>, crcs: Vec<u32>) -> PeerMessage {
    let (prev_index, prev_term, commit) = (LogIndex(10), Term(4), LogIndex(9));
    raft(
        Kind::Append {
            round: Round { number: 77, sent_ns: 88 },
            prev_index,
            prev_term,
            commit,
            entries: entries.into(),
        },
        crcs,
    )
}

fn io(op: IoOp) -> PeerMessage {
    PeerMessage::Io(IoRequest { id: 0x1234, copyset: CS, term: Term(5), epoch: SessionEpoch(6), op })
}

fn reply(outcome: IoOutcome) -> PeerMessage {
    PeerMessage::IoReply(IoReply { id: 0x1234, copyset: CS, outcome })
}

fn fetch(fetch: Fetch) -> PeerMessage {
    PeerMessage::Fetch { copyset: CS, fetch }
}

fn fetched(fetched: Fetched) -> PeerMessage {
    PeerMessage::Fetched { copyset: CS, fetched }
}

/// One of everything, by the name of its golden file.
fn every_message() -> Vec<(&'static str, PeerMessage)> {
    let round = Round { number: 77, sent_ns: 88 };
    let standing = Standing { counts: true, confirms: true, needs_install: false };
    let (index, term) = (LogIndex(12), Term(4));
    let entries = vec![
        entry(11, Body::Noop),
        entry(12, Body::Write { chunk: chunk(1), range: range(4095, 1) }),
        entry(13, Body::Zero { chunk: chunk(1), range: BlockRange::CHUNK }),
        entry(14, Body::Write { chunk: chunk(2), range: range(0, 32) }),
        entry(15, Body::DropVolume { volume: VolumeId(9) }),
        entry(16, Body::Members(members())),
        entry(17, Body::Fence(fence(9))),
    ];
    let from = shard(1, 0);
    vec![
        (
            "hello",
            PeerMessage::Hello(Hello {
                cluster: *b"0123456789abcdef",
                from,
                to: shard(2, 1),
                incarnation: 42,
            }),
        ),
        (
            "raft_pre_vote",
            raft(Kind::PreVote { campaign: Term(6), last_index: index, last_term: term }, vec![]),
        ),
        ("raft_pre_vote_reply", raft(Kind::PreVoteReply { campaign: Term(6), granted: true }, vec![])),
        ("raft_vote", raft(Kind::Vote { last_index: index, last_term: term, transfer: Some(3) }, vec![])),
        ("raft_vote_reply", raft(Kind::VoteReply { granted: false }, vec![])),
        ("raft_append", append(entries, (0..33).collect())),
        (
            "raft_append_reply",
            raft(
                Kind::AppendReply { round, standing, outcome: AppendOutcome::Matched { up_to: index } },
                vec![],
            ),
        ),
        (
            "raft_heartbeat",
            raft(Kind::Heartbeat { round, commit: index, sleep: true, install: Some(index) }, vec![]),
        ),
        (
            "raft_heartbeat_reply",
            raft(
                Kind::HeartbeatReply {
                    round,
                    standing,
                    accepted: index,
                    last: index,
                    durable: index,
                    asleep: false,
                },
                vec![],
            ),
        ),
        ("raft_timeout_now", raft(Kind::TimeoutNow { round: 77 }, vec![])),
        ("raft_probe", raft(Kind::Probe { nonce: 99 }, vec![])),
        ("raft_probe_reply", raft(Kind::ProbeReply { nonce: 99, leads: true, last: index }, vec![])),
        ("io_who_leads", io(IoOp::WhoLeads)),
        ("io_read", io(IoOp::Read { chunk: chunk(1), range: range(1, 32) })),
        ("io_write", io(IoOp::Write { chunk: chunk(1), offset: 4096 + 512, length: 1024, crc: 0xdead_beef })),
        ("io_zero", io(IoOp::Zero { chunk: chunk(1), offset: 0, length: CHUNK_BYTES as u32 })),
        ("io_fence", io(IoOp::Fence { volume: VolumeId(9) })),
        ("io_status", io(IoOp::Status { chunk: chunk(1), range: BlockRange::CHUNK })),
        ("reply_done", reply(IoOutcome::Done)),
        ("reply_data", reply(IoOutcome::Data { present: 0b101, crcs: vec![1, 2].into() })),
        ("reply_status", reply(IoOutcome::Status { runs: vec![(4000, false), (96, true)] })),
        ("reply_not_leader", reply(IoOutcome::NotLeader { leader: Some(shard(2, 1)), term: Term(6) })),
        ("reply_fenced", reply(IoOutcome::Fenced { epoch: SessionEpoch(7) })),
        ("fetch_begin", fetch(Fetch::Begin)),
        ("fetch_table", fetch(Fetch::Table { chunk: chunk(1) })),
        ("fetch_blocks", fetch(Fetch::Blocks { chunk: chunk(1), range: range(8, 32) })),
        ("fetch_end", fetch(Fetch::End)),
        (
            "fetched_begin",
            fetched(Fetched::Begin {
                index,
                term,
                members: members(),
                fences: vec![fence(9)],
                chunks: vec![chunk(1), chunk(2)],
            }),
        ),
        (
            "fetched_blocks",
            fetched(Fetched::Blocks { chunk: chunk(1), range: range(8, 2), present: 0b10, crcs: vec![7] }),
        ),
        ("fetched_end", fetched(Fetched::End { index })),
        ("fetched_refused", fetched(Fetched::Refused)),
    ]
}

fn encode(message: &PeerMessage) -> Vec<u8> {
    // Whatever lies before it in the buffer, a frame is the same.
    let mut out = vec![0xee; 3];
    Encoder::new().encode(message, &mut out).unwrap();
    out.split_off(3)
}

fn decode(bytes: &[u8]) -> Result<(PeerMessage, Vec<Part>), FrameError> {
    let header = decode_header(bytes.first_chunk().expect("tests offer whole headers"))?;
    let mut meta = MetaBuf::new();
    let mut body = bytes[HEADER_BYTES..].to_vec();
    body.resize(header.meta_bytes as usize, 0);
    meta.extend_from_slice(&body);
    let mut parts = Vec::new();
    let message = decode_meta(&header, &meta, &mut parts)?;
    Ok((message, parts))
}

fn hex(bytes: &[u8]) -> String {
    let lines = bytes.chunks(16).map(|line| line.iter().map(|b| format!("{b:02x} ")).collect::<String>());
    lines.map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// A change of any of these files is a change of the wire: raise the operation's version.
#[test]
fn golden_bytes_of_every_operation() {
    for (name, message) in every_message() {
        let path = format!("{}/testdata/frames/{name}.hex", env!("CARGO_MANIFEST_DIR"));
        expect_file![path].assert_eq(&hex(&encode(&message)));
    }
}

/// What was spoken before volumes had fences: a peer that still does must be told so, not misread.
#[test]
fn frames_of_version_1_are_refused_by_their_version() {
    let frames = [
        (include_str!("../../testdata/frames/v1/hello.hex"), Op::Hello),
        (include_str!("../../testdata/frames/v1/io_write.hex"), Op::Io),
        (include_str!("../../testdata/frames/v1/raft_append.hex"), Op::Raft),
        (include_str!("../../testdata/frames/v1/reply_done.hex"), Op::IoReply),
        (include_str!("../../testdata/frames/v1/fetched_begin.hex"), Op::Fetched),
    ];
    for (text, op) in frames {
        assert_eq!(decode(&unhex(text)).unwrap_err(), FrameError::Version { op, theirs: 1 }, "{op:?}");
    }
}

fn begin(chunks: Vec<ChunkId>, fences: Vec<Fence>) -> PeerMessage {
    fetched(Fetched::Begin { index: LogIndex(1), term: Term(1), members: members(), fences, chunks })
}

#[test]
fn every_message_comes_back_as_it_was_sent() {
    for (name, message) in every_message() {
        let (back, _) = decode(&encode(&message)).unwrap();
        assert_eq!(back, message, "{name}");
    }
    // The largest that come; miri takes minutes for those.
    let many = if cfg!(miri) { 32 } else { 32_000 };
    let table = fetched(Fetched::Table { chunk: chunk(1), crcs: (0..4096).collect() });
    assert_eq!(decode(&encode(&table)).unwrap().0, table);
    let begin = begin((0..many).map(chunk).collect(), (0..many / 2).map(fence).collect());
    assert_eq!(decode(&encode(&begin)).unwrap().0, begin);
}

fn parts_of(message: &PeerMessage) -> Vec<(u32, u32, usize)> {
    decode(&encode(message)).unwrap().1.iter().map(|part| (part.lead, part.bytes, part.blocks())).collect()
}

#[test]
fn payload_lands_with_the_alignment_of_its_blocks() {
    let entries = vec![
        entry(11, Body::Write { chunk: chunk(1), range: range(5, 2) }),
        entry(12, Body::Noop),
        entry(13, Body::Write { chunk: chunk(1), range: range(0, 32) }),
    ];
    assert_eq!(parts_of(&append(entries, vec![0; 34])), [(0, 8192, 2), (0, 131_072, 32)]);
    let write = |offset, length| io(IoOp::Write { chunk: chunk(1), offset, length, crc: 0 });
    assert_eq!(parts_of(&write(4096 + 512, 1024)), [(512, 1024, 1)]);
    assert_eq!(parts_of(&write(3584, 1024)), [(3584, 1024, 2)]);
    assert_eq!(parts_of(&write(131_072 + 512, 131_072 - 512)), [(512, 130_560, 32)]);
    assert_eq!(
        parts_of(&reply(IoOutcome::Data { present: u32::MAX, crcs: vec![0; 32].into() })),
        [(0, 131_072, 32)]
    );
    assert_eq!(parts_of(&reply(IoOutcome::Data { present: 0, crcs: vec![].into() })), []);
}

#[test]
fn senseless_messages_are_refused_by_both_sides() {
    use FrameError::*;
    let bad_range = BlockRange { first: 4095, count: 2 };
    let none = BlockRange { first: 0, count: 0 };
    let long = range(0, 33);
    let write =
        |range| append(vec![entry(11, Body::Write { chunk: chunk(1), range })], vec![0; range.count.into()]);
    let io_write = |offset, length| io(IoOp::Write { chunk: chunk(1), offset, length, crc: 0 });
    let io_zero = |offset, length| io(IoOp::Zero { chunk: chunk(1), offset, length });
    let blocks = |range, present, crcs| fetched(Fetched::Blocks { chunk: chunk(1), range, present, crcs });
    let noop = |index| entry(index, Body::Noop);
    for (message, error) in [
        (write(bad_range), Range),
        (write(none), Range),
        (write(long), Range),
        (append(vec![entry(11, Body::Zero { chunk: chunk(1), range: bad_range })], vec![]), Range),
        (append(vec![noop(11)], vec![1]), Count),
        (append(vec![entry(11, Body::Write { chunk: chunk(1), range: range(0, 2) })], vec![1]), Count),
        (append(vec![noop(12)], vec![]), Entries),
        (append(vec![noop(11), noop(11)], vec![]), Entries),
        (raft(Kind::Probe { nonce: 1 }, vec![1]), Count),
        (io(IoOp::Read { chunk: chunk(1), range: long }), Range),
        (io(IoOp::Status { chunk: chunk(1), range: none }), Range),
        (io_write(0, 0), Extent),
        (io_write(1, 512), Extent),
        (io_write(0, 513), Extent),
        (io_write(0, 131_072 + 512), Extent),
        (io_write(512, 131_072), Extent),
        (io_write(u32::MAX - 511, 1024), Extent),
        (io_zero(0, CHUNK_BYTES as u32 + 512), Extent),
        (io_zero(CHUNK_BYTES as u32, 512), Extent),
        (reply(IoOutcome::Data { present: 1, crcs: vec![].into() }), Count),
        (reply(IoOutcome::Status { runs: vec![] }), Count),
        (reply(IoOutcome::Status { runs: vec![(4096, true), (1, false)] }), Count),
        (reply(IoOutcome::Status { runs: vec![(0, true), (1, false)] }), Count),
        (fetched(Fetched::Table { chunk: chunk(1), crcs: vec![0; 4095] }), Count),
        (blocks(range(0, 2), 0b100, vec![1]), Count),
        (blocks(long, 1, vec![1]), Range),
        (fetch(Fetch::Blocks { chunk: chunk(1), range: bad_range }), Range),
    ] {
        let mut out = Vec::new();
        assert_eq!(Encoder::new().encode(&message, &mut out), Err(error), "{message:?}");
        assert!(out.is_empty());
        assert_eq!(decode(&forge(&message, 0)).unwrap_err(), error, "{message:?}");
    }
}

/// A frame of a message that the encoder would refuse.
fn forge(message: &PeerMessage, payload_bytes: u32) -> Vec<u8> {
    let meta = rkyv::api::high::to_bytes_in::<_, Failure>(message, AlignedVec::<16>::new()).unwrap();
    let mut bytes = encode_header(Op::of(message), &meta, payload_bytes).to_vec();
    bytes.extend_from_slice(&meta);
    bytes
}

#[test]
fn a_payload_of_another_length_is_refused() {
    let read = io(IoOp::Read { chunk: chunk(1), range: range(0, 1) });
    assert_eq!(decode(&forge(&read, 512)).unwrap_err(), FrameError::Payload { header: 512, message: 0 });
    let write = io(IoOp::Write { chunk: chunk(1), offset: 0, length: 4096, crc: 0 });
    let error = decode(&forge(&write, 512)).unwrap_err();
    assert_eq!(error, FrameError::Payload { header: 512, message: 4096 });
}

#[test]
fn too_much_payload_or_message_is_not_sent() {
    let entries: Vec<_> =
        (11..20).map(|i| entry(i, Body::Write { chunk: chunk(1), range: range(0, 32) })).collect();
    Encoder::new().encode(&append(entries.clone(), vec![0; 288]), &mut Vec::new()).unwrap();
    let mut more = entries;
    more.push(entry(20, Body::Write { chunk: chunk(1), range: range(0, 1) }));
    let error = Encoder::new().encode(&append(more, vec![0; 289]), &mut Vec::new());
    assert_eq!(error, Err(FrameError::PayloadLength(PAYLOAD_BYTES_MAX as u32 + 4096)));
    let begin = begin((0..70_000).map(chunk).collect(), vec![]);
    let mut out = Vec::new();
    assert!(matches!(Encoder::new().encode(&begin, &mut out), Err(FrameError::MetaLength(_))));
    assert!(out.is_empty());
}

/// Changes a good header and mends its checksum.
fn with_header(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = encode(&io(IoOp::WhoLeads));
    change(&mut bytes[..28]);
    let crc = crc32c::crc32c(&bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn every_field_of_the_header_is_checked() {
    use FrameError::*;
    let check = |bytes: Vec<u8>, error| assert_eq!(decode(&bytes).unwrap_err(), error);
    check(with_header(|h| h[0] = b'X'), Magic(*b"XSHP"));
    check(with_header(|h| h[4] = 2), Format(2));
    check(with_header(|h| h[6] = 0), Op(0));
    check(with_header(|h| h[6] = 7), Op(7));
    check(with_header(|h| h[8] = 3), Version { op: super::Op::Io, theirs: 3 });
    check(with_header(|h| h[10] = 1), Reserved);
    check(with_header(|h| h[24] = 1), Reserved);
    check(with_header(|h| h[12..16].fill(0xff)), MetaLength(u32::MAX));
    check(with_header(|h| h[16..20].fill(0xff)), PayloadLength(u32::MAX));
    check(with_header(|h| h[20] ^= 1), MetaCrc);
    check(with_header(|h| h[6] = 4), Mismatch { header: super::Op::IoReply, message: super::Op::Io });
    let mut bytes = encode(&io(IoOp::WhoLeads));
    bytes[28] ^= 1;
    check(bytes, HeaderCrc);
    let mut bytes = encode(&io(IoOp::WhoLeads));
    bytes[HEADER_BYTES] ^= 1;
    check(bytes, MetaCrc);
}

#[test]
fn a_membership_with_a_target_twice_is_refused() {
    let mut bytes = forge(&begin(vec![], vec![]), 0);
    // Voter 2 of target 2 becomes a second one of target 1.
    let at = HEADER_BYTES + find(&bytes[HEADER_BYTES..], &[2, 0, 0, 0, 1, 0]);
    bytes[at] = 1;
    mend(&mut bytes);
    assert_eq!(decode(&bytes).unwrap_err(), FrameError::Members);
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|window| window == what).expect("it is in there")
}

/// Makes both checksums right again.
fn mend(bytes: &mut [u8]) {
    let crc = crc32c::crc32c(&bytes[HEADER_BYTES..]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    /// A peer that computes checksums over nonsense still cannot do harm.
    #[test]
    fn damaged_messages_with_right_checksums_never_panic(
        which in 0usize..64, flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
    ) {
        let messages = every_message();
        let mut bytes = encode(&messages[which % messages.len()].1);
        let length = bytes.len() - HEADER_BYTES;
        for (at, value) in flips {
            bytes[HEADER_BYTES + at % length] = value;
        }
        mend(&mut bytes);
        if let Ok((message, parts)) = decode(&bytes) {
            // What is let in could have been sent.
            let mut again = Vec::new();
            prop_assert!(layout(&message, &mut again).is_ok());
            prop_assert_eq!(again, parts);
        }
    }

    #[test]
    fn random_messages_with_right_checksums_never_panic(op in 1u16..7, meta in proptest::collection::vec(any::<u8>(), 0..600)) {
        let op = Op::from_wire(op).unwrap();
        let mut bytes = encode_header(op, &meta, 0).to_vec();
        bytes.extend_from_slice(&meta);
        let _ = decode(&bytes);
    }

    #[test]
    fn random_headers_are_refused(bytes in any::<[u8; 32]>()) {
        prop_assert!(decode_header(&bytes).is_err());
    }
}
