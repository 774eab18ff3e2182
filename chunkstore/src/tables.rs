//! The bounded cache of CRC tables, by slot.

use crate::store::Map;
use crate::table::Table;
use protocol::types::{BlockRange, ChunkId};

/// Who waits for a table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Waiter {
    Read(u64),
    Job(ChunkId),
    Repair(ChunkId),
    Table { token: u64, chunk: ChunkId },
    Status { token: u64, chunk: ChunkId, range: BlockRange },
}

struct Cached {
    table: Table,
    /// Since the hand passed it.
    used: bool,
    pinned: bool,
    /// In the clock.
    place: usize,
}

/// What is kept is chosen by a clock (second chance): a use sets a bit, and the hand takes the first table that it finds unused
/// since it last came by. Many thousand tables cost a read no more than few.
#[derive(Default)]
pub(crate) struct Tables {
    max: usize,
    cached: Map<u32, Cached>,
    /// The slots of what is cached.
    clock: Vec<u32>,
    hand: usize,
    waiting: Map<u32, Vec<Waiter>>,
}

impl Tables {
    pub(crate) fn new(max: usize) -> Self {
        Self { max: max.max(1), ..Self::default() }
    }
    pub(crate) fn len(&self) -> usize {
        self.cached.len()
    }
    pub(crate) fn get(&self, slot: u32) -> Option<&Table> {
        self.cached.get(&slot).map(|c| &c.table)
    }
    /// As [`Tables::get`], and marks it as used.
    pub(crate) fn touch(&mut self, slot: u32) -> Option<&mut Table> {
        let cached = self.cached.get_mut(&slot)?;
        cached.used = true;
        Some(&mut cached.table)
    }
    pub(crate) fn pin(&mut self, slot: u32, pinned: bool) {
        if let Some(cached) = self.cached.get_mut(&slot) {
            cached.pinned = pinned;
        }
    }
    pub(crate) fn insert(&mut self, slot: u32, table: Table) {
        self.forget(slot);
        let freed = if self.cached.len() < self.max { None } else { self.evict() };
        let place = freed.unwrap_or(self.clock.len());
        match self.clock.get_mut(place) {
            Some(there) => *there = slot,
            None => self.clock.push(slot),
        }
        self.cached.insert(slot, Cached { table, used: false, pinned: false, place });
    }
    /// Makes a place in the clock free, behind the hand; `None` when all tables are pinned.
    fn evict(&mut self) -> Option<usize> {
        // Once around to take the chances away, and once more to find who has none.
        for _ in 0..2 * self.clock.len() {
            let place = self.hand;
            self.hand = (place + 1) % self.clock.len();
            let slot = self.clock[place];
            let cached = self.cached.get_mut(&slot).expect("the clock names what is cached");
            if !cached.pinned && !core::mem::replace(&mut cached.used, false) {
                self.cached.remove(&slot);
                return Some(place);
            }
        }
        None
    }
    pub(crate) fn forget(&mut self, slot: u32) {
        let Some(Cached { place, .. }) = self.cached.remove(&slot) else { return };
        self.clock.swap_remove(place);
        if let Some(moved) = self.clock.get(place).and_then(|slot| self.cached.get_mut(slot)) {
            moved.place = place;
        }
        if self.hand >= self.clock.len() {
            self.hand = 0;
        }
    }
    /// Puts one more in the queue; true when the load must be begun.
    pub(crate) fn wait(&mut self, slot: u32, waiter: Waiter) -> bool {
        let waiters = self.waiting.entry(slot).or_default();
        waiters.push(waiter);
        waiters.len() == 1
    }
    pub(crate) fn wake(&mut self, slot: u32) -> Vec<Waiter> {
        self.waiting.remove(&slot).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(tables: &Tables) -> Vec<u32> {
        for (place, slot) in tables.clock.iter().enumerate() {
            assert_eq!(tables.cached[slot].place, place, "the clock and the map agree");
        }
        assert_eq!(tables.clock.len(), tables.len());
        let mut slots = tables.clock.clone();
        slots.sort_unstable();
        slots
    }

    #[test]
    fn what_is_used_again_and_again_stays_and_what_was_used_once_goes() {
        let (mut tables, mut loads) = (Tables::new(4), 0);
        for slot in 1..=100 {
            tables.insert(slot, Table::new());
            tables.touch(slot);
            if tables.touch(0).is_none() {
                loads += 1;
                tables.insert(0, Table::new());
            }
            assert!(slots(&tables).contains(&slot) && tables.len() <= 4);
        }
        assert!(loads <= 2, "0 was loaded {loads} times");
        assert_eq!(slots(&tables)[0], 0);
    }

    #[test]
    fn what_is_pinned_stays_even_beyond_the_bound() {
        let mut tables = Tables::new(2);
        for slot in 0..3 {
            tables.insert(slot, Table::new());
            tables.pin(slot, true);
        }
        assert_eq!(slots(&tables), [0, 1, 2]);
        tables.pin(1, false);
        tables.insert(3, Table::new());
        assert_eq!(slots(&tables), [0, 2, 3]);
    }

    #[test]
    fn what_is_forgotten_or_loaded_anew_leaves_the_clock_whole() {
        let mut tables = Tables::new(8);
        let mut seed = 7_u32;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let slot = seed >> 27;
            match (seed >> 20) % 4 {
                0 => tables.forget(slot),
                1 => drop(tables.touch(slot).is_some()),
                _ => tables.insert(slot, Table::new()),
            }
            assert!(slots(&tables).len() <= 8);
        }
    }
}
