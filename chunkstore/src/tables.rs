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
    used: u64,
    pinned: bool,
}

#[derive(Default)]
pub(crate) struct Tables {
    max: usize,
    tick: u64,
    cached: Map<u32, Cached>,
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
        self.tick += 1;
        let cached = self.cached.get_mut(&slot)?;
        cached.used = self.tick;
        Some(&mut cached.table)
    }
    pub(crate) fn pin(&mut self, slot: u32, pinned: bool) {
        if let Some(cached) = self.cached.get_mut(&slot) {
            cached.pinned = pinned;
        }
    }
    pub(crate) fn insert(&mut self, slot: u32, table: Table) {
        self.tick += 1;
        if self.cached.len() >= self.max {
            // The ticks differ, so the order of the map does not matter.
            let oldest =
                self.cached.iter().filter(|(_, c)| !c.pinned).min_by_key(|(_, c)| c.used).map(|(s, _)| *s);
            oldest.map(|s| self.cached.remove(&s));
        }
        self.cached.insert(slot, Cached { table, used: self.tick, pinned: false });
    }
    pub(crate) fn forget(&mut self, slot: u32) {
        self.cached.remove(&slot);
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
