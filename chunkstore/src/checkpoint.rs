//! The checkpoint: all metadata at one moment, and where replay begins. Two files take turns.

use crate::api::{FileId, IoError, Layout, Media, Side};
use crate::batch::{MEMBERS_BYTES, get_members, put_members};
use crate::table::PAGES;
use crate::wire::{Get, Put, crc_with_hole, fill_crc, pad_to_block};
use protocol::raft::{Fence, HardState, Members};
use protocol::types::{BLOCK_BYTES, ChunkId, CopysetId, LogIndex, SessionEpoch, TargetId, Term, VolumeId};

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ASHCHECK");
const VERSION: u32 = 2;
/// The oldest that is read: one without fences, whose number was zero bytes.
const VERSION_MIN: u32 = 1;
const CRC_AT: usize = 12;
/// Bytes before the copysets.
pub(crate) const HEAD_BYTES: usize = 96;
/// Bytes of a copyset.
pub(crate) const COPYSET_BYTES: usize = 48 + MEMBERS_BYTES;
/// Bytes of a slot.
pub(crate) const SLOT_BYTES: usize = 44;
/// Bytes of a fence.
pub(crate) const FENCE_BYTES: usize = 16;
/// Copysets that the files have room for from the start (they grow if there are more).
const COPYSETS_EXPECTED: u64 = 1024;

/// A checkpoint in memory.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Checkpoint {
    pub seq: u64,
    pub disk_tag: u64,
    /// The log is known to be durable up to here.
    pub durable_lsn: u64,
    /// Metadata records below this are contained.
    pub covers_lsn: u64,
    pub replay_segment: u32,
    pub replay_epoch: u64,
    /// LSN of the first batch of the replay segment.
    pub replay_lsn: u64,
    pub segments_ready: u32,
    pub slots_ready: u32,
    /// The log lost records, and a Create may be among them.
    pub may_lack_replicas: bool,
    pub copysets: Vec<CopysetImage>,
    pub slots: Vec<SlotImage>,
    /// Those of entries up to the floors at least; a replay that raises one again changes nothing.
    pub fences: Vec<(CopysetId, Fence)>,
}

/// A copyset in a checkpoint.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct CopysetImage {
    pub id: CopysetId,
    pub hard: HardState,
    pub members: Members,
    pub floor: LogIndex,
    pub floor_term: Term,
    /// So many entries after the floor are applied, and all that they wrote is in the slots.
    pub ahead: u32,
    /// Records of lower LSN belong to an earlier replica of the same id.
    pub born: u64,
    pub damaged: bool,
    pub installing: bool,
}

/// A slot in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotImage {
    pub slot: u32,
    pub copyset: CopysetId,
    pub chunk: ChunkId,
    pub generation: u64,
    pub seq: [u32; PAGES],
}

/// Beyond every number that counts up by one; what claims more is nonsense, and would leave no room to count on.
const LSN_MAX: u64 = 1 << 60;

/// Which file holds a checkpoint.
pub(crate) fn side_of(seq: u64) -> FileId {
    FileId::Checkpoint(if seq % 2 == 1 { Side::A } else { Side::B })
}

/// Bytes to allocate for a checkpoint file.
pub(crate) fn file_bytes(layout: &Layout) -> u64 {
    let bytes = HEAD_BYTES as u64
        + COPYSETS_EXPECTED * COPYSET_BYTES as u64
        + u64::from(layout.slots_max) * SLOT_BYTES as u64;
    bytes.next_multiple_of(BLOCK_BYTES as u64)
}

impl Checkpoint {
    /// Whole blocks.
    pub(crate) fn encode(&self, layout: &Layout) -> Vec<u8> {
        debug_assert!(self.fits(layout), "a checkpoint that is written can be read");
        let bytes = bytes_of([self.copysets.len(), self.slots.len(), self.fences.len()]);
        let mut out = Vec::with_capacity(bytes.next_multiple_of(BLOCK_BYTES));
        out.u64(MAGIC);
        out.u32(VERSION);
        out.u32(0);
        out.u64(self.seq);
        out.u64(self.disk_tag);
        out.u64(self.durable_lsn);
        out.u64(self.covers_lsn);
        out.u64(self.replay_epoch);
        out.u64(self.replay_lsn);
        out.u32(self.replay_segment);
        out.u32(self.segments_ready);
        out.u32(self.slots_ready);
        out.u32(self.copysets.len() as u32);
        out.u32(self.slots.len() as u32);
        out.u32(self.fences.len() as u32);
        out.u32(self.may_lack_replicas.into());
        out.zeroes(HEAD_BYTES - out.len());
        self.copysets.iter().for_each(|c| put_copyset(&mut out, c));
        self.slots.iter().for_each(|s| put_slot(&mut out, s));
        self.fences.iter().for_each(|(copyset, fence)| put_fence(&mut out, *copyset, fence));
        pad_to_block(&mut out);
        fill_crc(&mut out, CRC_AT);
        out
    }

    /// Whether a log of this layout can be replayed from here.
    fn fits(&self, layout: &Layout) -> bool {
        let ahead = self.durable_lsn.saturating_sub(self.replay_lsn);
        self.replay_lsn > 0
            && self.replay_lsn < LSN_MAX
            && self.replay_epoch < LSN_MAX
            && self.replay_segment < layout.log_segments
            && ahead <= layout.log_blocks()
            && self.seq < LSN_MAX
            && self.covers_lsn < LSN_MAX
            && self.copysets.iter().all(|c| c.floor.0 < LSN_MAX && c.born < LSN_MAX)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut get = Get(&bytes[16..]);
        let mut it = Self { seq: get.u64()?, disk_tag: get.u64()?, ..Self::default() };
        it.durable_lsn = get.u64()?;
        it.covers_lsn = get.u64()?;
        it.replay_epoch = get.u64()?;
        it.replay_lsn = get.u64()?;
        it.replay_segment = get.u32()?;
        it.segments_ready = get.u32()?;
        it.slots_ready = get.u32()?;
        let (copysets, slots, fences) = (get.u32()?, get.u32()?, get.u32()?);
        it.may_lack_replicas = get.u32()? != 0;
        let mut get = Get(&bytes[HEAD_BYTES..]);
        for _ in 0..copysets {
            it.copysets.push(get_copyset(&mut get)?);
        }
        for _ in 0..slots {
            it.slots.push(get_slot(&mut get)?);
        }
        for _ in 0..fences {
            it.fences.push(get_fence(&mut get)?);
        }
        Some(it)
    }
}

fn put_copyset(out: &mut Vec<u8>, it: &CopysetImage) {
    out.u32(it.id.0);
    out.u8(it.damaged.into());
    out.u8(it.installing.into());
    out.u16(it.hard.vote.is_some().into());
    out.u64(it.hard.term.0);
    out.u32(it.hard.vote.map_or(0, |t| t.0));
    out.u32(it.ahead);
    out.u64(it.floor.0);
    out.u64(it.floor_term.0);
    out.u64(it.born);
    put_members(out, &it.members);
}

fn get_copyset(get: &mut Get<'_>) -> Option<CopysetImage> {
    let id = CopysetId(get.u32()?);
    let (damaged, installing, voted) = (get.u8()? != 0, get.u8()? != 0, get.u16()? != 0);
    let term = Term(get.u64()?);
    let (vote, ahead) = (TargetId(get.u32()?), get.u32()?);
    let (floor, floor_term, born) = (LogIndex(get.u64()?), Term(get.u64()?), get.u64()?);
    let hard = HardState { term, vote: voted.then_some(vote) };
    let members = get_members(get)?;
    Some(CopysetImage { id, hard, members, floor, floor_term, ahead, born, damaged, installing })
}

fn put_slot(out: &mut Vec<u8>, it: &SlotImage) {
    out.u32(it.slot);
    out.u32(it.copyset.0);
    out.u64(it.chunk.pack());
    out.u64(it.generation);
    it.seq.iter().for_each(|seq| out.u32(*seq));
}

fn get_slot(get: &mut Get<'_>) -> Option<SlotImage> {
    let (slot, copyset) = (get.u32()?, CopysetId(get.u32()?));
    let (chunk, generation) = (ChunkId::unpack(get.u64()?), get.u64()?);
    let mut seq = [0; PAGES];
    for one in &mut seq {
        *one = get.u32()?;
    }
    Some(SlotImage { slot, copyset, chunk, generation, seq })
}

fn put_fence(out: &mut Vec<u8>, copyset: CopysetId, fence: &Fence) {
    out.u32(copyset.0);
    out.u32(fence.volume.0);
    out.u64(fence.epoch.0);
}

fn get_fence(get: &mut Get<'_>) -> Option<(CopysetId, Fence)> {
    let (copyset, volume) = (CopysetId(get.u32()?), VolumeId(get.u32()?));
    Some((copyset, Fence { volume, epoch: SessionEpoch(get.u64()?) }))
}

/// Bytes of so many copysets, slots and fences.
fn bytes_of([copysets, slots, fences]: [usize; 3]) -> usize {
    HEAD_BYTES + copysets * COPYSET_BYTES + slots * SLOT_BYTES + fences * FENCE_BYTES
}

/// That a side was never used.
pub(crate) const NEVER_WRITTEN: &str = "never written";

/// Reads one side; why not, when it holds no good checkpoint.
pub(crate) fn read<M: Media + ?Sized>(
    media: &mut M,
    side: Side,
    disk_tag: u64,
    layout: &Layout,
) -> Result<Checkpoint, String> {
    let file = FileId::Checkpoint(side);
    let unread = |error: IoError| format!("it cannot be read ({error})");
    let Some(len) = media.len(file).map_err(unread)? else { return Err("there is no such file".into()) };
    let mut head = vec![0; BLOCK_BYTES];
    media.read(file, 0, &mut head).map_err(unread)?;
    let mut get = Get(&head);
    let (magic, version) = (get.u64(), get.u32());
    if magic != Some(MAGIC) {
        return Err(NEVER_WRITTEN.into());
    }
    if !version.is_some_and(|version| (VERSION_MIN..=VERSION).contains(&version)) {
        return Err("its format version is not known to this program".into());
    }
    let mut get = Get(&head[76..]);
    let counts = [get.u32(), get.u32(), get.u32()].map(|c| c.unwrap_or(0) as usize);
    let bytes = bytes_of(counts).next_multiple_of(BLOCK_BYTES) as u64;
    if bytes > len {
        return Err("it is cut short".into());
    }
    let mut all = vec![0; bytes as usize];
    media.read(file, 0, &mut all).map_err(unread)?;
    let crc = u32::from_le_bytes([all[12], all[13], all[14], all[15]]);
    if crc != crc_with_hole(&all, CRC_AT) {
        return Err("its checksum is wrong".into());
    }
    match Checkpoint::decode(&all) {
        Some(it) if it.disk_tag != disk_tag => Err("it belongs to another disk".into()),
        Some(it) if it.fits(layout) => Ok(it),
        _ => Err("it makes no sense".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;

    #[test]
    fn what_is_written_after_however_many_batches_is_read_back() {
        let layout = Layout::default();
        for lsn in [1, (1 << 40) - 1, 1 << 40, 1 << 44, LSN_MAX - 1] {
            let (chunk, copyset) = (ChunkId { volume: VolumeId(1), index: 2 }, CopysetId(3));
            let mut pool = Pool::new(1, 1);
            let slot = pool.take(chunk, copyset, lsn).expect("free");
            let generation = pool.get(slot).expect("in use").generation;
            let image = Checkpoint {
                seq: 1,
                durable_lsn: lsn,
                covers_lsn: lsn,
                replay_epoch: lsn,
                replay_lsn: lsn,
                slots: vec![SlotImage { slot, copyset, chunk, generation, seq: [1; PAGES] }],
                ..Checkpoint::default()
            };
            let read = Checkpoint::decode(&image.encode(&layout)).expect("decodes");
            assert!(read == image && read.fits(&layout), "LSN {lsn}");
        }
    }
}
