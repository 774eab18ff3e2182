//! Reads: overlay first, then the slot, each block verified; and the queries on tables.
//!
//! A read that finds a block bad asks whether the block is still where it was when the read was
//! planned. If it has moved (flushed, overwritten, recycled), the read is planned anew; only a
//! block that stayed is reported as corrupt.

use crate::api::*;
use crate::store::{Map, Store};
use crate::table::{self, COPY_STRIDE, LOAD_BLOCKS, PAGES};
use crate::tables::Waiter;
use protocol::types::{
    BLOCK_BYTES, BlockRange, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, block_crc, crc_at_rest,
};
use smallvec::SmallVec;

/// What an operation in flight is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pending {
    Batch {
        lsn: u64,
        blocks: u32,
    },
    Table {
        slot: u32,
        generation: u64,
    },
    /// One block of a table that could not be read as a whole.
    TableBlock {
        slot: u32,
        generation: u64,
        at: usize,
    },
    Part {
        read: u64,
        part: usize,
    },
    JobLoad {
        chunk: ChunkId,
        first: usize,
        count: usize,
    },
    JobWrite {
        chunk: ChunkId,
    },
    Sync,
    Checkpoint,
    Preformat,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Zero,
    Ram,
    Log {
        lsn: u64,
        at: u32,
    },
    Slot {
        slot: u32,
        generation: u64,
        flushes: u64,
    },
    /// The CRC is lost.
    Lost,
}

struct Part<P> {
    first: u16,
    source: Source,
    /// One a block.
    crcs: SmallVec<[u32; 8]>,
    data: Option<(P, usize)>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Client { token: u64 },
    Entry { token: u64, copyset: CopysetId, index: LogIndex },
    Copy { copyset: CopysetId, index: LogIndex, lsn: u64 },
}

/// A read of one block, or of a run that lies together, stays off the heap.
type Parts<P> = SmallVec<[Part<P>; 1]>;

struct Read<P> {
    kind: Kind,
    chunk: ChunkId,
    range: BlockRange,
    parts: Parts<P>,
    outstanding: usize,
}

/// A table that is being read block by block.
struct TableBlocks<P> {
    blocks: Vec<Option<P>>,
    outstanding: usize,
}

pub(crate) struct Reads<P> {
    next: u64,
    reads: Map<u64, Read<P>>,
    /// By slot.
    tables: Map<u32, TableBlocks<P>>,
}

impl<P> Default for Reads<P> {
    fn default() -> Self {
        Self { next: 0, reads: Map::default(), tables: Map::default() }
    }
}

impl<P: Payload> Store<P> {
    /// Reads blocks as committed; answered by `Event::Read`, maybe at once.
    pub fn read(&mut self, token: u64, chunk: ChunkId, range: BlockRange) {
        if self.failed.is_some() {
            return self.events.push_back(Event::Read { token, result: Err(ReadError::Failed) });
        }
        self.stats.reads += 1;
        let id = self.new_read(Kind::Client { token }, chunk, range);
        self.plan(id);
    }
    /// Reads an entry's payload back; answered by `Event::Entry`.
    pub fn load_entry(&mut self, token: u64, copyset: CopysetId, index: LogIndex) {
        let kind = Kind::Entry { token, copyset, index };
        let id = self.new_read(kind, ChunkId::unpack(0), BlockRange::CHUNK);
        self.plan(id);
    }
    /// Loads an entry to be staged again.
    pub(crate) fn load_copy(&mut self, copyset: CopysetId, index: LogIndex, lsn: u64) {
        let id = self.new_read(Kind::Copy { copyset, index, lsn }, ChunkId::unpack(0), BlockRange::CHUNK);
        self.plan(id);
    }
    /// Which blocks hold data; answered by `Event::Status`.
    pub fn status(&mut self, token: u64, chunk: ChunkId, range: BlockRange) {
        let waiter = Waiter::Status { token, chunk, range };
        if self.want_table(chunk, waiter) {
            self.answer(waiter);
        }
    }
    /// The CRCs of a chunk, overlay included; answered by `Event::Table`.
    pub fn table(&mut self, token: u64, chunk: ChunkId) {
        let waiter = Waiter::Table { token, chunk };
        if self.want_table(chunk, waiter) {
            self.answer(waiter);
        }
    }

    fn new_read(&mut self, kind: Kind, chunk: ChunkId, range: BlockRange) -> u64 {
        self.reads.next += 1;
        let read = Read { kind, chunk, range, parts: Parts::new(), outstanding: 0 };
        self.reads.reads.insert(self.reads.next, read);
        self.reads.next
    }

    /// True when the chunk's table is at hand or not needed; else begins to load it.
    pub(crate) fn want_table(&mut self, chunk: ChunkId, waiter: Waiter) -> bool {
        let Some(slot) = self.chunks.get(&chunk).and_then(|c| c.slot) else { return true };
        if self.tables.touch(slot).is_some() {
            return true;
        }
        if self.tables.wait(slot, waiter) {
            let generation = self.pool.get(slot).expect("in use").generation;
            let (file, offset) = self.layout.table_place(slot);
            self.stats.table_loads += 1;
            self.read_op(Pending::Table { slot, generation }, file, offset, LOAD_BLOCKS);
        }
        false
    }

    pub(crate) fn read_op(&mut self, pending: Pending, file: FileId, offset: u64, blocks: usize) {
        let ticket = self.ticket(file, pending);
        self.ops.push_back(Op::Read { ticket, file, offset, blocks });
    }

    pub(crate) fn table_loaded(&mut self, slot: u32, generation: u64, data: Option<P>) {
        match data {
            Some(data) => self.take_table(slot, generation, |at| Some(data.block(at))),
            None => self.load_table_blocks(slot, generation),
        }
    }

    /// One sector that cannot be read takes with it neither the other pages nor the other copy of its own.
    fn load_table_blocks(&mut self, slot: u32, generation: u64) {
        let (file, base) = self.layout.table_place(slot);
        let mut outstanding = 0;
        for at in (0..PAGES).chain(COPY_STRIDE..LOAD_BLOCKS) {
            let offset = base + (at * BLOCK_BYTES) as u64;
            self.read_op(Pending::TableBlock { slot, generation, at }, file, offset, 1);
            outstanding += 1;
        }
        let blocks = std::iter::repeat_with(|| None).take(LOAD_BLOCKS).collect();
        self.reads.tables.insert(slot, TableBlocks { blocks, outstanding });
    }

    pub(crate) fn table_block_loaded(&mut self, slot: u32, generation: u64, at: usize, data: Option<P>) {
        let load = self.reads.tables.get_mut(&slot).expect("being loaded");
        load.blocks[at] = data;
        load.outstanding -= 1;
        if load.outstanding == 0 {
            let TableBlocks { blocks, .. } = self.reads.tables.remove(&slot).expect("just seen");
            self.take_table(slot, generation, |at| blocks[at].as_ref().map(|block| block.block(0)));
        }
    }

    fn take_table<'a>(&mut self, slot: u32, generation: u64, blocks: impl Fn(usize) -> Option<&'a [u8]>) {
        if let Some(state) = self.pool.get_mut(slot).filter(|s| s.generation == generation) {
            let (chunk, pages) = (state.chunk, &mut state.pages);
            let (table, loaded) = table::load(blocks, pages, chunk, generation);
            self.stats.table_fallbacks += loaded.fallbacks;
            self.stats.table_pages_lost += loaded.lost;
            self.tables.insert(slot, table);
        }
        for waiter in self.tables.wake(slot) {
            match waiter {
                Waiter::Read(id) => self.plan(id),
                Waiter::Job(chunk) => self.job_go_on(chunk),
                Waiter::Repair(chunk) => self.repairs_go_on(chunk),
                Waiter::Table { chunk, .. } | Waiter::Status { chunk, .. } => {
                    if self.want_table(chunk, waiter) {
                        self.answer(waiter);
                    }
                }
            }
        }
    }

    fn answer(&mut self, waiter: Waiter) {
        match waiter {
            Waiter::Table { token, chunk } => {
                let (mut crcs, mut unknown) = (Vec::with_capacity(4096), Vec::new());
                for block in BlockRange::CHUNK.blocks() {
                    let expected = self.expected(chunk, block);
                    if expected.is_none() {
                        unknown.push(block as u16);
                    }
                    crcs.push(expected.unwrap_or(u32::MAX));
                }
                self.events.push_back(Event::Table { token, crcs, unknown });
            }
            Waiter::Status { token, chunk, range } => {
                let mut runs: Vec<(u16, bool)> = Vec::new();
                for block in range.blocks() {
                    let present = self.expected(chunk, block) != Some(0);
                    match runs.last_mut() {
                        Some((count, held)) if *held == present => *count += 1,
                        _ => runs.push((1, present)),
                    }
                }
                self.events.push_back(Event::Status { token, runs });
            }
            Waiter::Read(_) | Waiter::Job(_) | Waiter::Repair(_) => {}
        }
    }

    /// CRC at rest of a block's latest content, the table being at hand.
    fn expected(&self, chunk: ChunkId, block: usize) -> Option<u32> {
        let Some(state) = self.chunks.get(&chunk) else { return Some(0) };
        if let Some(over) = state.overlay.get(block as u16) {
            return Some(over.crc);
        }
        state.slot.map_or(Some(0), |slot| self.tables.get(slot).and_then(|t| t.expected(block)))
    }

    fn plan(&mut self, id: u64) {
        let Some(read) = self.reads.reads.get(&id) else { return };
        let parts = match read.kind {
            Kind::Client { .. } => {
                let (chunk, range) = (read.chunk, read.range);
                if !self.want_table(chunk, Waiter::Read(id)) {
                    return;
                }
                self.plan_chunk(chunk, range)
            }
            Kind::Entry { copyset, index, .. } | Kind::Copy { copyset, index, .. } => {
                let Some(meta) = self.copysets.get(&copyset).and_then(|c| c.get(index)) else {
                    return self.gone(id);
                };
                let (source, data) = match &meta.ram {
                    Some(ram) => (Source::Ram, Some((ram.clone(), 0))),
                    None => (Source::Log { lsn: meta.lsn, at: meta.at }, None),
                };
                Parts::from_iter([Part { first: 0, source, crcs: meta.crcs.clone(), data }])
            }
        };
        self.submit_parts(id, parts);
    }

    fn plan_chunk(&self, chunk: ChunkId, range: BlockRange) -> Parts<P> {
        let mut parts: Parts<P> = Parts::new();
        for block in range.blocks() {
            let (source, crc, data) = self.locate(chunk, block);
            if let Some(last) = parts.last_mut()
                && Self::goes_on(last, source, &data)
            {
                last.crcs.push(crc);
                continue;
            }
            parts.push(Part { first: block as u16, source, crcs: SmallVec::from_slice(&[crc]), data });
        }
        parts
    }

    fn locate(&self, chunk: ChunkId, block: usize) -> (Source, u32, Option<(P, usize)>) {
        let Some(state) = self.chunks.get(&chunk) else { return (Source::Zero, 0, None) };
        if let Some(over) = state.overlay.get(block as u16) {
            return match &over.ram {
                _ if over.crc == 0 => (Source::Zero, 0, None),
                Some(ram) => (Source::Ram, over.crc, Some(ram.clone())),
                None => (Source::Log { lsn: over.lsn, at: over.at }, over.crc, None),
            };
        }
        let Some(slot) = state.slot else { return (Source::Zero, 0, None) };
        let generation = self.pool.get(slot).expect("in use").generation;
        match self.tables.get(slot).and_then(|t| t.expected(block)) {
            Some(0) => (Source::Zero, 0, None),
            Some(crc) => (Source::Slot { slot, generation, flushes: state.flushes }, crc, None),
            None => (Source::Lost, 0, None),
        }
    }

    /// Whether the next block continues a part.
    fn goes_on(last: &Part<P>, next: Source, data: &Option<(P, usize)>) -> bool {
        let count = last.crcs.len();
        match (last.source, next) {
            (Source::Zero, Source::Zero) | (Source::Lost, Source::Lost) => true,
            (Source::Log { lsn, at }, Source::Log { lsn: l, at: a }) => {
                lsn == l && at + count as u32 == a && count < ENTRY_BLOCKS_MAX
            }
            (Source::Slot { .. }, Source::Slot { .. }) => count < ENTRY_BLOCKS_MAX,
            (Source::Ram, Source::Ram) => match (&last.data, data) {
                (Some((one, first)), Some((two, at))) => {
                    first + count == *at && core::ptr::eq(one.block(0).as_ptr(), two.block(0).as_ptr())
                }
                _ => false,
            },
            _ => false,
        }
    }

    fn submit_parts(&mut self, id: u64, parts: Parts<P>) {
        let mut outstanding = 0;
        for (nth, part) in parts.iter().enumerate() {
            let pending = Pending::Part { read: id, part: nth };
            match part.source {
                Source::Log { lsn, at } => {
                    let Some((segment, block)) = self.log.place(lsn, at) else { continue };
                    self.stats.log_reads += 1;
                    let offset = u64::from(block) * BLOCK_BYTES as u64;
                    self.read_op(pending, FileId::Log(segment), offset, part.crcs.len());
                    outstanding += 1;
                }
                Source::Slot { slot, .. } => {
                    let (file, offset) = self.layout.data_place(slot);
                    let offset = offset + u64::from(part.first) * BLOCK_BYTES as u64;
                    self.stats.chunk_reads += 1;
                    self.read_op(pending, file, offset, part.crcs.len());
                    outstanding += 1;
                }
                Source::Zero | Source::Ram | Source::Lost => {}
            }
        }
        let read = self.reads.reads.get_mut(&id).expect("being planned");
        (read.parts, read.outstanding) = (parts, outstanding);
        if outstanding == 0 {
            self.finish(id);
        }
    }

    pub(crate) fn part_read(&mut self, id: u64, part: usize, data: Option<P>) {
        let Some(read) = self.reads.reads.get_mut(&id) else { return };
        read.parts[part].data = data.map(|data| (data, 0));
        read.outstanding -= 1;
        if read.outstanding == 0 {
            self.finish(id);
        }
    }

    fn finish(&mut self, id: u64) {
        let read = self.reads.reads.remove(&id).expect("in progress");
        let (mut bad, mut moved) = (Vec::new(), 0);
        for part in &read.parts {
            if !matches!(part.source, Source::Zero | Source::Ram) {
                self.verify(&read, part, &mut bad, &mut moved);
            }
        }
        if moved > 0 {
            self.stats.read_retries += 1;
            self.stats.moved_blocks += moved + bad.len() as u64;
            self.reads.reads.insert(id, Read { parts: Parts::new(), ..read });
            return self.plan(id);
        }
        self.stats.corrupt_blocks += bad.len() as u64;
        self.deliver(read, bad);
    }

    fn verify(&self, read: &Read<P>, part: &Part<P>, bad: &mut Vec<BadBlock>, moved: &mut u64) {
        for (nth, crc) in part.crcs.iter().enumerate() {
            let good = part.data.as_ref().is_some_and(|(data, first)| {
                let found = block_crc(data.block(first + nth));
                part.source != Source::Lost && (found == *crc || crc_at_rest(found) == *crc)
            });
            if good {
                continue;
            }
            let block = part.first + nth as u16;
            if self.stayed(read, part.source, block, nth as u32) {
                bad.push(BadBlock {
                    block,
                    expected: (part.source != Source::Lost).then_some(crc_at_rest(*crc)),
                });
            } else {
                *moved += 1;
            }
        }
    }

    fn stayed(&self, read: &Read<P>, source: Source, block: u16, nth: u32) -> bool {
        match read.kind {
            Kind::Client { .. } => match (source, self.locate(read.chunk, block.into()).0) {
                (Source::Log { lsn, at }, Source::Log { lsn: l, at: a }) => lsn == l && at + nth == a,
                (before, now) => before == now,
            },
            Kind::Entry { copyset, index, .. } | Kind::Copy { copyset, index, .. } => {
                let meta = self.copysets.get(&copyset).and_then(|c| c.get(index));
                meta.is_some_and(|m| source == Source::Log { lsn: m.lsn, at: m.at } && m.ram.is_none())
            }
        }
    }

    fn gone(&mut self, id: u64) {
        let read = self.reads.reads.remove(&id).expect("in progress");
        match read.kind {
            Kind::Client { .. } => unreachable!("chunks are always there"),
            Kind::Entry { token, .. } => {
                self.events.push_back(Event::Entry { token, result: Err(ReadError::Gone) });
            }
            Kind::Copy { .. } => self.copy_loaded(None),
        }
    }

    fn deliver(&mut self, read: Read<P>, bad: Vec<BadBlock>) {
        let part = read.parts.into_iter();
        match read.kind {
            Kind::Client { token } => {
                let result = if bad.is_empty() {
                    Ok(part.map(into_piece).collect())
                } else {
                    Err(ReadError::Corrupt(bad))
                };
                self.events.push_back(Event::Read { token, result });
            }
            Kind::Entry { token, .. } => {
                let mut part = part;
                let found = part.next().and_then(|p| Some((p.data?.0, p.crcs)));
                let result = found.filter(|_| bad.is_empty()).ok_or(ReadError::Corrupt(bad));
                self.events.push_back(Event::Entry { token, result });
            }
            Kind::Copy { copyset, index, lsn } => {
                let mut part = part;
                let data = part.next().and_then(|p| p.data).map(|(data, _)| data);
                self.copy_loaded(bad.is_empty().then_some((copyset, index, lsn, data)));
            }
        }
    }

    /// Ends all reads: the disk has failed.
    pub(crate) fn fail_reads(&mut self) {
        let mut ids: Vec<u64> = self.reads.reads.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let Some(read) = self.reads.reads.remove(&id) else { continue };
            match read.kind {
                Kind::Client { token } => {
                    self.events.push_back(Event::Read { token, result: Err(ReadError::Failed) });
                }
                Kind::Entry { token, .. } => {
                    self.events.push_back(Event::Entry { token, result: Err(ReadError::Failed) });
                }
                Kind::Copy { .. } => {}
            }
        }
    }
}

fn into_piece<P>(part: Part<P>) -> ReadPiece<P> {
    let count = part.crcs.len();
    match part.data {
        Some((payload, first)) => ReadPiece::Data { payload, first, count, crcs: part.crcs },
        None => ReadPiece::Zero { count },
    }
}
