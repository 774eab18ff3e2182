//! Reads every block of a volume that a shard holds and tells the checksums: the replicas' own
//! part of `ashlar volume check`. Bad blocks found on the way are repaired like any other.

use super::{Output, Shard, Work};
use crate::mem::Mem;
use chunkstore::{ReadData, ReadError};
use copyset::Health;
use protocol::types::{
    BlockRange, CHUNK_BLOCKS, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, VolumeId, block_crc,
};
use std::collections::VecDeque;

/// One chunk as one replica holds it.
#[derive(Clone, Debug)]
pub struct ChunkCheck {
    /// Which.
    pub chunk: ChunkId,
    /// Its copyset.
    pub copyset: CopysetId,
    /// Applied up to here when the checksums were taken.
    pub applied: LogIndex,
    /// CRC-32C over the checksums at rest, little-endian.
    pub digest: u32,
    /// Blocks that hold data.
    pub present: u32,
    /// Blocks found bad, repaired or not.
    pub bad: u32,
    /// Of the replica.
    pub health: Health,
}

/// A check under way; its token goes from step to step.
pub struct CheckWork {
    job: u64,
    chunks: VecDeque<(CopysetId, ChunkId)>,
    /// Where to begin in each chunk.
    first: usize,
    /// The next block of the first chunk to be read; past the end, its table is read.
    next: usize,
    bad: u32,
}

impl Shard {
    /// Checks all chunks of a volume (`None`: of all volumes); [`Output::Checked`] tells each, and
    /// then the end. `verify` reads the blocks too, not only their checksums.
    pub fn check_volume(&mut self, job: u64, volume: Option<VolumeId>, verify: bool) {
        let mut chunks = VecDeque::new();
        for id in self.hosted.keys() {
            let of_volume =
                self.store.chunks_of(*id).into_iter().filter(|c| volume.is_none_or(|v| c.volume == v));
            chunks.extend(of_volume.map(|chunk| (*id, chunk)));
        }
        let first = if verify { 0 } else { CHUNK_BLOCKS };
        let work = CheckWork { job, chunks, first, next: first, bad: 0 };
        let key = self.work.insert(Work::Check(work));
        self.check_step(key);
    }

    fn check_step(&mut self, key: usize) {
        let Some(Work::Check(check)) = self.work.get(key) else { return };
        let Some((_, chunk)) = check.chunks.front().copied() else {
            let job = check.job;
            self.work.remove(key);
            self.out.push_back(Output::Checked { job, chunk: None });
            return;
        };
        if check.next < CHUNK_BLOCKS {
            let range = BlockRange::new(check.next, ENTRY_BLOCKS_MAX).expect("32 divides a chunk");
            self.store.read(key as u64, chunk, range);
        } else {
            self.store.table(key as u64, chunk);
        }
    }

    pub(super) fn check_read(&mut self, key: usize, result: Result<ReadData<Mem>, ReadError>) {
        let Some(Work::Check(check)) = self.work.get_mut(key) else { return };
        let bad = match result {
            Err(ReadError::Corrupt(bad)) => bad,
            Ok(_) | Err(_) => Vec::new(),
        };
        check.next += ENTRY_BLOCKS_MAX;
        check.bad += bad.len() as u32;
        if let Some((copyset, chunk)) = check.chunks.front().copied() {
            for block in bad {
                self.repair_block(copyset, chunk, block, None);
            }
        }
        self.check_step(key);
    }

    pub(super) fn check_table(&mut self, key: usize, crcs: Vec<u32>) {
        let Some(Work::Check(check)) = self.work.get_mut(key) else { return };
        let Some((copyset, chunk)) = check.chunks.pop_front() else { return };
        let (job, bad) = (check.job, std::mem::take(&mut check.bad));
        check.next = check.first;
        if let Some(hosted) = self.hosted.get(&copyset) {
            let bytes: Vec<u8> = crcs.iter().flat_map(|crc| crc.to_le_bytes()).collect();
            let told = ChunkCheck {
                chunk,
                copyset,
                applied: hosted.replica.applied_index(),
                digest: block_crc(&bytes),
                present: crcs.iter().filter(|crc| **crc != 0).count() as u32,
                bad,
                health: hosted.replica.health(),
            };
            self.out.push_back(Output::Checked { job, chunk: Some(told) });
        }
        self.check_step(key);
    }
}
