//! What of a chunk is newer than its slot.

use crate::table::Table;
use protocol::types::{BlockRange, LogIndex};
use std::collections::BTreeMap;

/// A block whose latest content is not in its slot.
#[derive(Clone)]
pub(crate) struct OverlayBlock<P> {
    pub lsn: u64,
    /// Of the entry; 0 for an installed block.
    pub index: LogIndex,
    pub at: u32,
    /// At rest; 0: zeroes.
    pub crc: u32,
    pub ram: Option<(P, usize)>,
}

/// The newer blocks of one chunk, by number.
pub(crate) struct Overlay<P> {
    blocks: BTreeMap<u16, OverlayBlock<P>>,
    /// Those that are not zeroes.
    data: usize,
}

/// How many blocks an overlay has, or all of them have.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Counted {
    pub blocks: u64,
    /// Those that are not zeroes: they take room in the log, and in memory while they are to be flushed from there.
    pub data: u64,
}

impl Counted {
    /// One overlay changed from `before` to `after`.
    pub(crate) fn change(&mut self, before: Self, after: Self) {
        self.blocks = self.blocks - before.blocks + after.blocks;
        self.data = self.data - before.data + after.data;
    }
}

impl<P: Clone> Overlay<P> {
    pub(crate) fn new() -> Self {
        Self { blocks: BTreeMap::new(), data: 0 }
    }
    pub(crate) fn counted(&self) -> Counted {
        Counted { blocks: self.blocks.len() as u64, data: self.data as u64 }
    }
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
    /// Whether it has nothing but zeroes.
    pub(crate) fn is_zero(&self) -> bool {
        self.data == 0
    }
    pub(crate) fn get(&self, block: u16) -> Option<&OverlayBlock<P>> {
        self.blocks.get(&block)
    }
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, &OverlayBlock<P>)> {
        self.blocks.iter().map(|(block, over)| (*block, over))
    }
    pub(crate) fn put(&mut self, block: u16, over: OverlayBlock<P>) {
        self.data += usize::from(over.crc != 0);
        let old = self.blocks.insert(block, over);
        self.data -= usize::from(old.is_some_and(|old| old.crc != 0));
    }
    pub(crate) fn remove(&mut self, block: u16) {
        let old = self.blocks.remove(&block);
        self.data -= usize::from(old.is_some_and(|old| old.crc != 0));
    }
    pub(crate) fn remove_range(&mut self, range: BlockRange) {
        range.blocks().for_each(|block| self.remove(block as u16));
    }
    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }
    /// What was written with batch `lsn` is in memory no more.
    pub(crate) fn forget_ram(&mut self, range: BlockRange, lsn: u64) {
        let range = range.first..=(range.end() - 1) as u16;
        self.blocks
            .range_mut(range)
            .filter(|(_, over)| over.lsn == lsn)
            .for_each(|(_, over)| over.ram = None);
    }
    /// Lays zeroes over blocks of a slot, but where its table (if it is at hand) has zeroes already.
    pub(crate) fn cover(&mut self, range: BlockRange, zero: &OverlayBlock<P>, table: Option<&Table>) {
        for block in range.blocks() {
            let zero_below = table.is_some_and(|table| table.expected(block) == Some(0));
            if !zero_below || self.blocks.contains_key(&(block as u16)) {
                self.put(block as u16, zero.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(crc: u32) -> OverlayBlock<()> {
        OverlayBlock { lsn: 1, index: LogIndex(1), at: 0, crc, ram: None }
    }

    #[test]
    fn data_and_zeroes_are_counted_apart_whatever_replaces_what() {
        let mut overlay = Overlay::new();
        for (at, crc) in [(1, 7), (2, 0), (3, 7), (1, 0), (2, 9), (3, 8)] {
            overlay.put(at, block(crc));
        }
        assert_eq!(overlay.counted(), Counted { blocks: 3, data: 2 });
        overlay.cover(BlockRange { first: 3, count: 2 }, &block(0), None);
        assert_eq!(overlay.counted(), Counted { blocks: 4, data: 1 });
        overlay.remove(1);
        overlay.remove_range(BlockRange { first: 2, count: 1 });
        assert_eq!(overlay.counted(), Counted { blocks: 2, data: 0 });
        assert!(overlay.is_zero());

        let mut all = Counted { blocks: 5, data: 5 };
        all.change(Counted { blocks: 4, data: 3 }, overlay.counted());
        assert_eq!(all, Counted { blocks: 3, data: 2 });
    }
}
