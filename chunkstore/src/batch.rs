//! A log batch as bytes: header blocks with records and payload CRCs; the payload blocks follow.

use crate::api::{Health, Record};
use crate::wire::{Get, Put, crc_with_hole, fill_crc, pad_to_block};
use protocol::raft::{Body, Entry, Fence, HardState, Member, Members};
use protocol::types::{
    BLOCK_BYTES, BlockRange, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, MEMBERS_MAX, SessionEpoch,
    ShardAddr, TargetId, Term,
};

/// Header blocks of a batch at most.
pub(crate) const HEADER_BLOCKS_MAX: u32 = 8;
/// Bytes before the first record.
pub(crate) const HEAD_BYTES: usize = 96;
/// Bytes of a record slot; a record with a membership takes three.
pub(crate) const SLOT_BYTES: usize = 48;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ASHBATCH");
const VERSION: u16 = 2;
/// The oldest that is read: fences came with 2, all else is as it was.
const VERSION_MIN: u16 = 1;
const CRC_AT: usize = 12;
/// Bytes of a membership: two slots.
pub(crate) const MEMBERS_BYTES: usize = 2 * SLOT_BYTES;
const _: () = assert!(4 + 2 * MEMBERS_MAX * 6 <= MEMBERS_BYTES);

/// The fixed fields of a batch header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Head {
    pub lsn: u64,
    pub epoch: u64,
    pub durable_lsn: u64,
    pub disk_tag: u64,
    pub segment: u32,
    pub block: u32,
    pub chain: u32,
    pub payload_blocks: u32,
    pub record_slots: u32,
    pub records: u32,
    pub header_blocks: u16,
    pub crc: u32,
}

impl Head {
    pub(crate) fn total_blocks(&self) -> u32 {
        u32::from(self.header_blocks) + self.payload_blocks
    }
}

/// Header blocks that so many record slots and payload blocks take.
pub(crate) fn header_blocks(record_slots: usize, payload_blocks: usize) -> u32 {
    let bytes = HEAD_BYTES + record_slots * SLOT_BYTES + payload_blocks * 4;
    bytes.div_ceil(BLOCK_BYTES) as u32
}

/// Appends the header blocks to `out`, which is empty; fills in `head.header_blocks` and `head.crc`.
pub(crate) fn encode(head: &mut Head, records: &[u8], crcs: &[u32], out: &mut Vec<u8>) {
    head.header_blocks = header_blocks(records.len() / SLOT_BYTES, crcs.len()) as u16;
    head.record_slots = (records.len() / SLOT_BYTES) as u32;
    assert!(u32::from(head.header_blocks) <= HEADER_BLOCKS_MAX && head.payload_blocks as usize == crcs.len());
    out.u64(MAGIC);
    out.u16(VERSION);
    out.u16(head.header_blocks);
    out.u32(0);
    out.u64(head.lsn);
    out.u64(head.epoch);
    out.u64(head.durable_lsn);
    out.u64(head.disk_tag);
    out.u32(head.segment);
    out.u32(head.block);
    out.u32(head.chain);
    out.u32(head.payload_blocks);
    out.u32(head.record_slots);
    out.u32(head.records);
    out.zeroes(HEAD_BYTES - out.len());
    out.raw(records);
    for crc in crcs {
        out.u32(*crc);
    }
    pad_to_block(out);
    head.crc = fill_crc(out, CRC_AT);
}

/// A header whose checksum is right, at the front of `bytes` (which reach to the end of the segment).
pub(crate) fn decode(bytes: &[u8]) -> Option<Head> {
    let mut get = Get(bytes.get(..HEAD_BYTES)?);
    if get.u64()? != MAGIC || !(VERSION_MIN..=VERSION).contains(&get.u16()?) {
        return None;
    }
    let mut head = Head { header_blocks: get.u16()?, crc: get.u32()?, ..Head::default() };
    head.lsn = get.u64()?;
    head.epoch = get.u64()?;
    head.durable_lsn = get.u64()?;
    head.disk_tag = get.u64()?;
    head.segment = get.u32()?;
    head.block = get.u32()?;
    head.chain = get.u32()?;
    head.payload_blocks = get.u32()?;
    head.record_slots = get.u32()?;
    head.records = get.u32()?;
    if head.header_blocks == 0 || u32::from(head.header_blocks) > HEADER_BLOCKS_MAX {
        return None;
    }
    let header = bytes.get(..usize::from(head.header_blocks) * BLOCK_BYTES)?;
    let fits = HEAD_BYTES as u64
        + u64::from(head.record_slots) * SLOT_BYTES as u64
        + u64::from(head.payload_blocks) * 4
        <= header.len() as u64;
    let fits = fits && head.records <= head.record_slots;
    (fits && crc_with_hole(header, CRC_AT) == head.crc).then_some(head)
}

/// Header blocks of the batch of this LSN, as the first of them claims, whether or not its CRC holds.
pub(crate) fn claimed_blocks(bytes: &[u8], lsn: u64) -> Option<u32> {
    let mut get = Get(bytes.get(..HEAD_BYTES)?);
    let (magic, _, blocks, _) = (get.u64()?, get.u16()?, get.u16()?, get.u32()?);
    (magic == MAGIC && get.u64()? == lsn).then_some(u32::from(blocks).min(HEADER_BLOCKS_MAX))
}

/// A record as it lies in a batch.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Logged {
    pub record: Record,
    /// First payload block within the batch's payload.
    pub at: u32,
    /// Of `InstallEnd`: 1 when entries above the floor stay. Of `InstallBegin`: the applied index.
    pub extra: u64,
}

/// The records and CRCs of a header that [`decode`] accepted; `None` when a record makes no sense.
pub(crate) fn contents(head: &Head, bytes: &[u8]) -> Option<(Vec<Logged>, Vec<u32>)> {
    let records_end = HEAD_BYTES + head.record_slots as usize * SLOT_BYTES;
    let mut get = Get(&bytes[HEAD_BYTES..records_end]);
    let mut records = Vec::with_capacity(head.records as usize);
    for _ in 0..head.records {
        let logged = decode_record(&mut get)?;
        let end = u64::from(logged.at) + payload_blocks(&logged.record) as u64;
        if end > u64::from(head.payload_blocks) {
            return None;
        }
        records.push(logged);
    }
    let crcs = bytes[records_end..][..head.payload_blocks as usize * 4].chunks_exact(4);
    let crcs = crcs.map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    Some((records, crcs))
}

/// Payload blocks of a record.
pub(crate) fn payload_blocks(record: &Record) -> usize {
    match record {
        Record::Entry { entry, .. } => entry.body.payload_blocks(),
        Record::InstallBlocks { range, .. } => range.count.into(),
        _ => 0,
    }
}

/// Record slots of a record.
pub(crate) fn record_slots(record: &Record) -> usize {
    match record {
        Record::Create { .. } | Record::InstallEnd { .. } => 3,
        Record::Entry { entry: Entry { body: Body::Members(_), .. }, .. } => 3,
        _ => 1,
    }
}

/// Numbers of a slot, by their place.
#[derive(Default)]
struct Slot {
    kind: u8,
    body: u8,
    flags: u16,
    copyset: u32,
    term: u64,
    index: u64,
    chunk: u64,
    first: u16,
    count: u16,
    at: u32,
    /// A target; of a fence, its epoch.
    vote: u64,
}

/// Appends a record.
pub(crate) fn encode_record(out: &mut Vec<u8>, logged: &Logged) {
    let (mut slot, mut with) = (Slot { at: logged.at, ..Slot::default() }, None);
    let copyset = match logged.record {
        Record::Create { copyset, members } => {
            (slot.kind, with) = (1, Some(members));
            copyset
        }
        Record::Remove { copyset } => {
            slot.kind = 2;
            copyset
        }
        Record::Hard { copyset, hard } => {
            slot = Slot { kind: 3, term: hard.term.0, flags: hard.vote.is_some().into(), ..slot };
            slot.vote = hard.vote.map_or(0, |t| t.0.into());
            copyset
        }
        Record::Entry { copyset, entry } => {
            (slot.kind, slot.term, slot.index) = (4, entry.term.0, entry.index.0);
            with = body_fields(&mut slot, &entry.body);
            copyset
        }
        Record::Truncate { copyset, from } => {
            (slot.kind, slot.index) = (5, from.0);
            copyset
        }
        Record::Health { copyset, health } => {
            (slot.kind, slot.body) = (6, health as u8);
            copyset
        }
        Record::Applied { copyset, index } => {
            (slot.kind, slot.index) = (12, index.0);
            copyset
        }
        Record::Fence { copyset, fence } => {
            slot.kind = 13;
            fence_fields(&mut slot, fence);
            copyset
        }
        Record::InstallBegin { copyset } => {
            (slot.kind, slot.index) = (7, logged.extra);
            copyset
        }
        Record::InstallBlocks { copyset, chunk, range } => {
            slot = Slot { kind: 8, chunk: chunk.pack(), first: range.first, count: range.count, ..slot };
            copyset
        }
        Record::InstallZero { copyset, chunk, range } => {
            slot = Slot { kind: 9, chunk: chunk.pack(), first: range.first, count: range.count, ..slot };
            copyset
        }
        Record::InstallDrop { copyset, chunk } => {
            (slot.kind, slot.chunk) = (10, chunk.pack());
            copyset
        }
        Record::InstallEnd { copyset, floor, floor_term, members } => {
            slot = Slot { kind: 11, index: floor.0, term: floor_term.0, flags: logged.extra as u16, ..slot };
            with = Some(members);
            copyset
        }
    };
    slot.copyset = copyset.0;
    put_slot(out, &slot);
    if let Some(members) = with {
        put_members(out, &members);
    }
}

fn body_fields(slot: &mut Slot, body: &Body) -> Option<Members> {
    match body {
        Body::Noop => slot.body = 0,
        Body::Write { chunk, range } | Body::Zero { chunk, range } => {
            slot.body = if matches!(body, Body::Write { .. }) { 1 } else { 2 };
            (slot.chunk, slot.first, slot.count) = (chunk.pack(), range.first, range.count);
        }
        Body::DropVolume { volume } => {
            slot.body = 3;
            slot.chunk = ChunkId { volume: *volume, index: 0 }.pack();
        }
        Body::Members(members) => {
            slot.body = 4;
            return Some(*members);
        }
        Body::Fence(fence) => {
            slot.body = 5;
            fence_fields(slot, *fence);
        }
    }
    None
}

fn fence_fields(slot: &mut Slot, fence: Fence) {
    slot.chunk = ChunkId { volume: fence.volume, index: 0 }.pack();
    slot.vote = fence.epoch.0;
}

fn put_slot(out: &mut Vec<u8>, slot: &Slot) {
    out.u8(slot.kind);
    out.u8(slot.body);
    out.u16(slot.flags);
    out.u32(slot.copyset);
    out.u64(slot.term);
    out.u64(slot.index);
    out.u64(slot.chunk);
    out.u16(slot.first);
    out.u16(slot.count);
    out.u32(slot.at);
    out.u64(slot.vote);
}

fn get_slot(get: &mut Get<'_>) -> Option<Slot> {
    Some(Slot {
        kind: get.u8()?,
        body: get.u8()?,
        flags: get.u16()?,
        copyset: get.u32()?,
        term: get.u64()?,
        index: get.u64()?,
        chunk: get.u64()?,
        first: get.u16()?,
        count: get.u16()?,
        at: get.u32()?,
        vote: get.u64()?,
    })
}

/// A membership in [`MEMBERS_BYTES`].
pub(crate) fn put_members(out: &mut Vec<u8>, members: &Members) {
    let start = out.len();
    out.u8(members.voters().count() as u8);
    out.u8(members.learners().count() as u8);
    out.u16(0);
    for member in members.all() {
        out.u32(member.target.0);
        out.u16(member.shard);
    }
    out.zeroes(start + MEMBERS_BYTES - out.len());
}

/// The inverse of [`put_members`].
pub(crate) fn get_members(get: &mut Get<'_>) -> Option<Members> {
    let mut get = Get(get.raw(MEMBERS_BYTES)?);
    let (voters, learners) = (usize::from(get.u8()?), usize::from(get.u8()?));
    get.u16()?;
    let mut all: Vec<Member> = Vec::new();
    for _ in 0..voters + learners {
        all.push(ShardAddr { target: TargetId(get.u32()?), shard: get.u16()? });
    }
    Members::new(&all[..voters], &all[voters..])
}

fn decode_record(get: &mut Get<'_>) -> Option<Logged> {
    let slot = get_slot(get)?;
    let (copyset, chunk) = (CopysetId(slot.copyset), ChunkId::unpack(slot.chunk));
    let range = || BlockRange::new(slot.first.into(), slot.count.into());
    let fence = Fence { volume: chunk.volume, epoch: SessionEpoch(slot.vote) };
    let short = || range().filter(|r| usize::from(r.count) <= ENTRY_BLOCKS_MAX);
    let record = match slot.kind {
        1 => Record::Create { copyset, members: get_members(get)? },
        2 => Record::Remove { copyset },
        3 => {
            let vote = (slot.flags & 1 == 1).then_some(TargetId(slot.vote as u32));
            Record::Hard { copyset, hard: HardState { term: Term(slot.term), vote } }
        }
        4 => {
            let body = match slot.body {
                0 => Body::Noop,
                1 => Body::Write { chunk, range: short()? },
                2 => Body::Zero { chunk, range: range()? },
                3 => Body::DropVolume { volume: chunk.volume },
                4 => Body::Members(get_members(get)?),
                5 => Body::Fence(fence),
                _ => return None,
            };
            Record::Entry {
                copyset,
                entry: Entry { term: Term(slot.term), index: LogIndex(slot.index), body },
            }
        }
        5 => Record::Truncate { copyset, from: LogIndex(slot.index) },
        6 => {
            let health = match slot.body {
                0 => Health::Whole,
                1 => Health::Installing,
                2 => Health::Damaged,
                _ => return None,
            };
            Record::Health { copyset, health }
        }
        7 => Record::InstallBegin { copyset },
        8 => Record::InstallBlocks { copyset, chunk, range: short()? },
        9 => Record::InstallZero { copyset, chunk, range: range()? },
        10 => Record::InstallDrop { copyset, chunk },
        13 => Record::Fence { copyset, fence },
        12 => Record::Applied { copyset, index: LogIndex(slot.index) },
        11 => Record::InstallEnd {
            copyset,
            floor: LogIndex(slot.index),
            floor_term: Term(slot.term),
            members: get_members(get)?,
        },
        _ => return None,
    };
    let extra = match slot.kind {
        7 => slot.index,
        11 => u64::from(slot.flags & 1),
        _ => 0,
    };
    Some(Logged { record, at: slot.at, extra })
}
