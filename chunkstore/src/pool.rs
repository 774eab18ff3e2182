//! Chunk slots: which are ready, free, in use, and freed but not yet reusable.

use crate::table::Pages;
use protocol::types::{ChunkId, CopysetId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// A slot in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub chunk: ChunkId,
    pub copyset: CopysetId,
    /// Differs each time a slot is given out, so that pages of its former life are told apart.
    pub generation: u64,
    pub pages: Pages,
}

/// The LSN and a count. Of the LSN the upper 20 bits are left out: every number is a generation, and two uses of a
/// slot would be taken for each other only with a multiple of 2^44 batches between them.
fn generation(durable_lsn: u64, count: u64) -> u64 {
    (durable_lsn << 20) | (count & 0xf_ffff)
}

/// All slots of a shard.
#[derive(Default)]
pub(crate) struct Pool {
    pub slots: Vec<Option<Slot>>,
    /// Slots 0 to `ready` - 1 are preformatted.
    pub ready: u32,
    pub max: u32,
    /// Set while the file system is full.
    pub limited: bool,
    free: BTreeSet<u32>,
    /// Freed, but named by the last checkpoint.
    pub retired: Vec<u32>,
    pub used: usize,
    /// Slots whose pages were written since the last checkpoint.
    pub touched: BTreeSet<u32>,
    count: u64,
    /// Slots in use by each volume of each copyset that has any.
    by_owner: BTreeMap<(CopysetId, VolumeId), u32>,
}

impl Pool {
    pub(crate) fn new(ready: u32, max: u32) -> Self {
        let mut pool = Self { max, ..Self::default() };
        pool.grow(ready);
        pool
    }
    /// So many slots are ready now.
    pub(crate) fn grow(&mut self, ready: u32) {
        self.free.extend(self.ready..ready);
        self.slots.resize_with(ready as usize, || None);
        self.ready = ready;
    }
    /// Puts a slot in use as a checkpoint tells; false when that cannot be.
    pub(crate) fn adopt(&mut self, number: u32, slot: Slot) -> bool {
        let fits = self.free.remove(&number);
        if fits {
            self.put(number, slot);
        }
        fits
    }
    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }
    pub(crate) fn free_ready(&self) -> usize {
        self.free.len()
    }
    /// Slots that can ever be given out as things stand.
    pub(crate) fn capacity(&self) -> usize {
        if self.limited { self.ready as usize } else { self.max as usize }
    }
    pub(crate) fn take(&mut self, chunk: ChunkId, copyset: CopysetId, durable_lsn: u64) -> Option<u32> {
        let number = self.free.pop_first()?;
        self.count += 1;
        let generation = generation(durable_lsn, self.count);
        self.put(number, Slot { chunk, copyset, generation, pages: Pages::NONE });
        Some(number)
    }
    fn put(&mut self, number: u32, slot: Slot) {
        *self.by_owner.entry((slot.copyset, slot.chunk.volume)).or_default() += 1;
        self.slots[number as usize] = Some(slot);
        self.used += 1;
    }
    /// Frees a slot, to be reused after the next checkpoint.
    pub(crate) fn retire(&mut self, number: u32) {
        let slot = self.slots[number as usize].take().expect("a slot in use is retired");
        self.used -= 1;
        let owner = (slot.copyset, slot.chunk.volume);
        let left = self.by_owner.get_mut(&owner).expect("counted when it was put in use");
        *left -= 1;
        if *left == 0 {
            self.by_owner.remove(&owner);
        }
        self.retired.push(number);
    }
    /// Slots that no checkpoint names any more.
    pub(crate) fn release(&mut self, numbers: Vec<u32>) {
        self.free.extend(numbers);
    }
    /// Slots in use, by copyset and volume.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (CopysetId, VolumeId, u32)> {
        self.by_owner.iter().map(|((copyset, volume), slots)| (*copyset, *volume, *slots))
    }
    pub(crate) fn get(&self, number: u32) -> Option<&Slot> {
        self.slots.get(number as usize)?.as_ref()
    }
    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Slot> {
        self.slots.get_mut(number as usize)?.as_mut()
    }
}
