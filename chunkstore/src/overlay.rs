//! What of a chunk is newer than its slot.

use crate::table::Table;
use protocol::types::{BlockRange, LogIndex};
use std::ops::Range;

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

/// The newer blocks of one chunk, by number. In lists, which keep their memory: a tree would take some from the heap for
/// every few blocks.
pub(crate) struct Overlay<P> {
    /// Each block with its place in `kept`, in order of blocks.
    order: Vec<(u16, u16)>,
    kept: Vec<Option<OverlayBlock<P>>>,
    /// Places in `kept` that are free.
    free: Vec<u16>,
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

impl<P> Default for Overlay<P> {
    fn default() -> Self {
        Self { order: Vec::new(), kept: Vec::new(), free: Vec::new(), data: 0 }
    }
}

impl<P: Clone> Overlay<P> {
    pub(crate) fn counted(&self) -> Counted {
        Counted { blocks: self.order.len() as u64, data: self.data as u64 }
    }
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
    /// Whether it has memory for blocks, though it may have none.
    pub(crate) fn has_memory(&self) -> bool {
        self.kept.capacity() > 0
    }
    /// Whether it has nothing but zeroes.
    pub(crate) fn is_zero(&self) -> bool {
        self.data == 0
    }
    fn find(&self, block: u16) -> Result<usize, usize> {
        self.order.binary_search_by_key(&block, |(block, _)| *block)
    }
    fn at(&self, place: u16) -> &OverlayBlock<P> {
        self.kept[usize::from(place)].as_ref().expect("in the order")
    }
    pub(crate) fn get(&self, block: u16) -> Option<&OverlayBlock<P>> {
        self.find(block).ok().map(|nth| self.at(self.order[nth].1))
    }
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, &OverlayBlock<P>)> {
        self.order.iter().map(|(block, place)| (*block, self.at(*place)))
    }
    pub(crate) fn put(&mut self, block: u16, over: OverlayBlock<P>) {
        self.data += usize::from(over.crc != 0);
        match self.find(block) {
            Ok(nth) => {
                let old = self.kept[usize::from(self.order[nth].1)].replace(over);
                self.data -= usize::from(old.is_some_and(|old| old.crc != 0));
            }
            Err(nth) => {
                let place = self.keep(over);
                self.order.insert(nth, (block, place));
            }
        }
    }
    fn keep(&mut self, over: OverlayBlock<P>) -> u16 {
        match self.free.pop() {
            Some(place) => {
                self.kept[usize::from(place)] = Some(over);
                place
            }
            None => {
                self.kept.push(Some(over));
                (self.kept.len() - 1) as u16
            }
        }
    }
    /// Where the blocks of a range are in the order, as many as are here.
    fn span(&self, range: BlockRange) -> Range<usize> {
        let nth = |end: usize| self.order.partition_point(|(block, _)| usize::from(*block) < end);
        nth(range.first.into())..nth(range.end())
    }
    /// [`Overlay::put`] for all blocks of a range; those behind it move once if none of them is here yet.
    pub(crate) fn put_range(&mut self, range: BlockRange, over: impl Fn(usize) -> OverlayBlock<P>) {
        let here = self.span(range);
        if !here.is_empty() {
            return range.blocks().enumerate().for_each(|(at, block)| self.put(block as u16, over(at)));
        }
        self.order.splice(here.clone(), range.blocks().map(|block| (block as u16, 0)));
        for at in 0..range.count.into() {
            let over = over(at);
            self.data += usize::from(over.crc != 0);
            self.order[here.start + at].1 = self.keep(over);
        }
    }
    fn release(&mut self, place: u16) {
        let old = self.kept[usize::from(place)].take();
        self.data -= usize::from(old.is_some_and(|old| old.crc != 0));
        self.free.push(place);
    }
    pub(crate) fn remove_range(&mut self, range: BlockRange) {
        let gone = self.span(range);
        for nth in gone.clone() {
            self.release(self.order[nth].1);
        }
        self.order.drain(gone);
    }
    /// Removes the blocks of `items`, which come in order of blocks, that still are the `same`.
    pub(crate) fn remove_same<T>(
        &mut self,
        items: &[T],
        block: impl Fn(&T) -> u16,
        same: impl Fn(&T, &OverlayBlock<P>) -> bool,
    ) {
        let mut items = items.iter().peekable();
        let mut order = std::mem::take(&mut self.order);
        order.retain(|(here, place)| {
            while items.next_if(|item| block(item) < *here).is_some() {}
            let gone =
                items.next_if(|item| block(item) == *here).is_some_and(|item| same(item, self.at(*place)));
            if gone {
                self.release(*place);
            }
            !gone
        });
        self.order = order;
    }
    pub(crate) fn clear(&mut self) {
        self.order.clear();
        self.kept.clear();
        self.free.clear();
        self.data = 0;
    }
    /// What was written with batch `lsn` is in memory no more.
    pub(crate) fn forget_ram(&mut self, range: BlockRange, lsn: u64) {
        for (_, place) in &self.order[self.span(range)] {
            let over = self.kept[usize::from(*place)].as_mut().expect("in the order");
            if over.lsn == lsn {
                over.ram = None;
            }
        }
    }
    /// Lays zeroes over blocks of a slot, but where its table (if it is at hand) has zeroes already.
    pub(crate) fn cover(&mut self, range: BlockRange, zero: &OverlayBlock<P>, table: Option<&Table>) {
        for block in range.blocks() {
            let zero_below = table.is_some_and(|table| table.expected(block) == Some(0));
            if !zero_below || self.find(block as u16).is_ok() {
                self.put(block as u16, zero.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn block(crc: u32) -> OverlayBlock<()> {
        OverlayBlock { lsn: 1, index: LogIndex(1), at: 0, crc, ram: None }
    }

    #[test]
    fn data_and_zeroes_are_counted_apart_whatever_replaces_what() {
        let mut overlay = Overlay::default();
        for (at, crc) in [(1, 7), (2, 0), (3, 7), (1, 0), (2, 9), (3, 8)] {
            overlay.put(at, block(crc));
        }
        assert_eq!(overlay.counted(), Counted { blocks: 3, data: 2 });
        overlay.cover(BlockRange { first: 3, count: 2 }, &block(0), None);
        assert_eq!(overlay.counted(), Counted { blocks: 4, data: 1 });
        overlay.remove_range(BlockRange { first: 1, count: 1 });
        overlay.remove_range(BlockRange { first: 2, count: 1 });
        assert_eq!(overlay.counted(), Counted { blocks: 2, data: 0 });
        assert!(overlay.is_zero());

        let mut all = Counted { blocks: 5, data: 5 };
        all.change(Counted { blocks: 4, data: 3 }, overlay.counted());
        assert_eq!(all, Counted { blocks: 3, data: 2 });
    }

    /// Steps of a walk that takes each kind of change at random places.
    const STEPS: u64 = 4_000;

    #[test]
    fn lists_are_what_a_map_would_be() {
        let (mut overlay, mut map) = (Overlay::default(), BTreeMap::new());
        let mut state = 7_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for step in 1..=STEPS {
            let first = draw(300) as u16;
            let range = BlockRange { first, count: 1 + draw(24) as u16 };
            let of = |at: usize| OverlayBlock {
                lsn: step,
                index: LogIndex(step),
                at: at as u32,
                crc: (step as u32 + at as u32) % 3,
                ram: Some(((), at)),
            };
            match draw(6) {
                0 | 1 => {
                    overlay.put_range(range, of);
                    map.extend(range.blocks().enumerate().map(|(at, block)| (block as u16, of(at))));
                }
                2 => {
                    overlay.put(first, of(0));
                    map.insert(first, of(0));
                }
                3 => {
                    overlay.remove_range(range);
                    map.retain(|block, _| !(usize::from(first)..range.end()).contains(&usize::from(*block)));
                }
                4 => {
                    // As the flusher does, some of whose blocks were written again meanwhile.
                    let items: Vec<(u16, u64)> =
                        map.iter().map(|(block, over)| (*block, over.lsn - draw(2))).collect();
                    overlay.remove_same(&items, |item| item.0, |item, over| over.lsn == item.1);
                    for (block, lsn) in items {
                        if map[&block].lsn == lsn {
                            map.remove(&block);
                        }
                    }
                }
                _ => {
                    let lsn = step - draw(20).min(step);
                    overlay.forget_ram(range, lsn);
                    map.range_mut(first..range.end() as u16)
                        .filter(|(_, over)| over.lsn == lsn)
                        .for_each(|(_, over)| over.ram = None);
                }
            }
            let told = |(block, over): (u16, &OverlayBlock<()>)| {
                (block, over.lsn, over.at, over.crc, over.ram.is_some())
            };
            let (ours, theirs): (Vec<_>, Vec<_>) =
                (overlay.iter().map(told).collect(), map.iter().map(|(b, o)| told((*b, o))).collect());
            assert_eq!(ours, theirs, "after step {step}");
            let data = map.values().filter(|over| over.crc != 0).count() as u64;
            assert_eq!(overlay.counted(), Counted { blocks: map.len() as u64, data });
            assert_eq!(overlay.get(first).map(|over| over.lsn), map.get(&first).map(|over| over.lsn));
            if draw(200) == 0 {
                overlay.clear();
                map.clear();
            }
        }
        assert!(overlay.kept.len() <= 324, "places are used again: {}", overlay.kept.len());
    }
}
