//! Peer frames: header and message as another target, or a damaged network, would send them.
//!
//! An input is the operation, its version, the payload's length, and the message; the checksums are
//! put right, since a frame that fails them is refused before it is looked at.

use super::{Dice, Target};
use protocol::frame::{
    Encoder, FORMAT, HEADER_BYTES, MAGIC, META_BYTES_MAX, MetaBuf, PAYLOAD_BYTES_MAX, decode_header,
    decode_meta,
};
use protocol::peer::{Fetch, Fetched, Hello, IoOp, IoOutcome, IoReply, IoRequest, PeerMessage};
use protocol::raft::{AppendOutcome, Body, Entry, Fence, Kind, Members, Message, Round, Standing};
use protocol::types::*;

/// A peer.
pub const FRAMES: Target = Target {
    name: "peer-frames",
    about: "frames between shards: headers, and messages as rkyv",
    bytes_max: 24 << 10,
    // A message and its copies; four bytes of rkyv may name an entry of some hundred bytes once.
    memory_max: |bytes| (256 << 10) + 64 * bytes,
    make: |dice| {
        let mut frame = Vec::new();
        match Encoder::new().encode(&message(dice), &mut frame) {
            Ok(_) => from_frame(&frame),
            Err(_) => from_frame(&[0; HEADER_BYTES]),
        }
    },
    run,
};

/// Bytes of an input before the message.
const HEAD: usize = 8;

fn from_frame(frame: &[u8]) -> Vec<u8> {
    let mut input = frame[6..10].to_vec();
    input.extend_from_slice(&frame[16..20]);
    input.extend_from_slice(&frame[HEADER_BYTES..]);
    input
}

fn run(input: &[u8]) {
    let Some((head, bytes)) = input.split_first_chunk::<HEAD>() else { return };
    let mut meta = MetaBuf::new();
    meta.extend_from_slice(bytes);
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&FORMAT.to_le_bytes());
    header[6..10].copy_from_slice(&head[..4]);
    header[12..16].copy_from_slice(&(meta.len() as u32).to_le_bytes());
    header[16..20].copy_from_slice(&head[4..]);
    header[20..24].copy_from_slice(&crc32c::crc32c(&meta).to_le_bytes());
    let crc = crc32c::crc32c(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    let header = match decode_header(&header) {
        Ok(header) => header,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(
        header.meta_bytes as usize <= META_BYTES_MAX && header.payload_bytes as usize <= PAYLOAD_BYTES_MAX
    );
    let mut parts = Vec::new();
    let message = match decode_meta(&header, &meta, &mut parts) {
        Ok(message) => message,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert_eq!(parts.iter().map(|p| u64::from(p.bytes)).sum::<u64>(), u64::from(header.payload_bytes));
    assert!(parts.iter().all(|p| p.lead as usize + p.bytes as usize <= ENTRY_BYTES_MAX));
    again(&message, header.payload_bytes);
}

/// What was accepted can be sent on, and arrives as it was.
fn again(message: &PeerMessage, payload: u32) {
    let mut frame = Vec::new();
    let told = Encoder::new().encode(message, &mut frame).expect("what is accepted can be sent");
    assert_eq!(told, payload as usize);
    let (header, bytes) = frame.split_first_chunk().expect("a header");
    let header = decode_header(header).expect("our header");
    let mut meta = MetaBuf::new();
    meta.extend_from_slice(bytes);
    assert_eq!(decode_meta(&header, &meta, &mut Vec::new()).as_ref(), Ok(message));
}

fn shard(dice: &mut Dice) -> ShardAddr {
    ShardAddr { target: TargetId(dice.below(5) as u32), shard: dice.below(3) as u16 }
}

fn chunk(dice: &mut Dice) -> ChunkId {
    ChunkId { volume: VolumeId(dice.odd() as u32), index: dice.odd() as u32 }
}

fn range(dice: &mut Dice) -> BlockRange {
    let most = if dice.percent(90) { 32 } else { 5000 };
    let count = 1 + dice.below(most) as u16;
    BlockRange { first: dice.below(CHUNK_BLOCKS) as u16, count }
}

fn members(dice: &mut Dice) -> Members {
    let voters: Vec<_> = (0..dice.below(8)).map(|_| shard(dice)).collect();
    let learners: Vec<_> = (0..dice.below(3)).map(|_| shard(dice)).collect();
    Members::new(&voters, &learners).unwrap_or_default()
}

fn crcs(dice: &mut Dice, count: usize) -> Vec<u32> {
    (0..count).map(|_| dice.roll() as u32).collect()
}

fn data(dice: &mut Dice) -> (u32, Vec<u32>) {
    let present = dice.odd() as u32;
    (present, crcs(dice, present.count_ones() as usize))
}

fn message(dice: &mut Dice) -> PeerMessage {
    let copyset = CopysetId(dice.odd() as u32);
    match dice.below(8) {
        0 => PeerMessage::Hello(Hello {
            cluster: [dice.roll() as u8; 16],
            from: shard(dice),
            to: shard(dice),
            incarnation: dice.roll(),
        }),
        1 => {
            let (id, term, epoch) = (dice.roll(), Term(dice.odd()), SessionEpoch(dice.odd()));
            PeerMessage::Io(IoRequest { id, copyset, term, epoch, op: io(dice) })
        }
        2 => PeerMessage::IoReply(IoReply { id: dice.roll(), copyset, outcome: outcome(dice) }),
        3 => {
            let fetch = match dice.below(4) {
                0 => Fetch::Begin,
                1 => Fetch::Table { chunk: chunk(dice) },
                2 => Fetch::Blocks { chunk: chunk(dice), range: range(dice) },
                _ => Fetch::End,
            };
            PeerMessage::Fetch { copyset, fetch }
        }
        4 => PeerMessage::Fetched { copyset, fetched: fetched(dice) },
        _ => raft(copyset, dice),
    }
}

fn io(dice: &mut Dice) -> IoOp {
    let (offset, length) = (512 * dice.below(32768) as u32, 512 * dice.below(260) as u32);
    match dice.below(6) {
        0 => IoOp::WhoLeads,
        5 => IoOp::Fence { volume: VolumeId(dice.odd() as u32) },
        1 => IoOp::Read { chunk: chunk(dice), range: range(dice) },
        2 => IoOp::Write { chunk: chunk(dice), offset, length, crc: dice.roll() as u32 },
        3 => IoOp::Zero { chunk: chunk(dice), offset, length },
        _ => IoOp::Status { chunk: chunk(dice), range: range(dice) },
    }
}

fn outcome(dice: &mut Dice) -> IoOutcome {
    match dice.below(7) {
        6 => IoOutcome::Fenced { epoch: SessionEpoch(dice.odd()) },
        0 => {
            let (present, crcs) = data(dice);
            IoOutcome::Data { present, crcs: crcs.into() }
        }
        1 => IoOutcome::Status {
            runs: (0..dice.below(9)).map(|n| (dice.below(600) as u16, n % 2 == 0)).collect(),
        },
        2 => IoOutcome::NotLeader { leader: dice.percent(50).then(|| shard(dice)), term: Term(dice.odd()) },
        3 => IoOutcome::Done,
        4 => IoOutcome::NoSpace,
        _ => IoOutcome::Busy,
    }
}

fn fetched(dice: &mut Dice) -> Fetched {
    match dice.below(5) {
        0 => Fetched::Begin {
            index: LogIndex(dice.odd()),
            term: Term(dice.odd()),
            members: members(dice),
            fences: (0..dice.below(4)).map(|_| fence(dice)).collect(),
            chunks: (0..dice.below(20)).map(|_| chunk(dice)).collect(),
        },
        1 => Fetched::Table { chunk: chunk(dice), crcs: crcs(dice, CHUNK_BLOCKS) },
        2 => {
            let range = BlockRange { first: dice.below(4064) as u16, count: 32 };
            let (present, crcs) = data(dice);
            Fetched::Blocks { chunk: chunk(dice), range, present, crcs }
        }
        3 => Fetched::End { index: LogIndex(dice.odd()) },
        _ => Fetched::Refused,
    }
}

fn raft(copyset: CopysetId, dice: &mut Dice) -> PeerMessage {
    let mut blocks = 0;
    let (last_index, last_term) = (LogIndex(dice.odd()), Term(dice.odd()));
    let round = Round { number: dice.odd(), sent_ns: dice.odd() };
    let standing =
        Standing { counts: dice.percent(50), confirms: dice.percent(50), needs_install: dice.percent(50) };
    let kind = match dice.below(9) {
        0 => Kind::PreVote { campaign: Term(dice.odd()), last_index, last_term },
        1 => Kind::Vote { last_index, last_term, transfer: dice.percent(50).then(|| dice.odd()) },
        2 => Kind::VoteReply { granted: dice.percent(50) },
        3 => {
            Kind::Heartbeat { round, commit: last_index, sleep: dice.percent(50), install: Some(last_index) }
        }
        4 => {
            let (accepted, durable) = (LogIndex(dice.odd()), LogIndex(dice.odd()));
            Kind::HeartbeatReply { round, standing, accepted, durable, last: last_index, asleep: false }
        }
        5 => {
            let rejected =
                AppendOutcome::Rejected { prev: last_index, hint: last_index, hint_term: last_term };
            let outcome =
                if dice.percent(50) { rejected } else { AppendOutcome::Matched { up_to: last_index } };
            Kind::AppendReply { round, standing, outcome }
        }
        _ => {
            let prev = last_index.0 >> 1;
            let entries = (1..=dice.below(6) as u64).map(|n| {
                let body = body(dice);
                blocks += body.payload_blocks();
                Entry { term: last_term, index: LogIndex(prev + n), body }
            });
            let entries = entries.collect();
            Kind::Append {
                round,
                prev_index: LogIndex(prev),
                prev_term: last_term,
                commit: LogIndex(prev),
                entries,
            }
        }
    };
    let message = Message { term: Term(dice.odd()), kind };
    PeerMessage::Raft { copyset, message, crcs: crcs(dice, blocks).into() }
}

fn fence(dice: &mut Dice) -> Fence {
    Fence { volume: VolumeId(dice.odd() as u32), epoch: SessionEpoch(dice.odd()) }
}

fn body(dice: &mut Dice) -> Body {
    match dice.below(6) {
        5 => Body::Fence(fence(dice)),
        0 => Body::Noop,
        1 => Body::Zero { chunk: chunk(dice), range: range(dice) },
        2 => Body::DropVolume { volume: VolumeId(dice.odd() as u32) },
        3 => Body::Members(members(dice)),
        _ => Body::Write {
            chunk: chunk(dice),
            range: BlockRange { first: dice.below(4000) as u16, count: 1 + dice.below(32) as u16 },
        },
    }
}
