//! The flusher: one job a chunk moves overlay blocks to the chunk's slot and its table.
//!
//! Order within a job: slot, table, log-backed blocks, data writes, table pages. The blocks stay
//! in the overlay until the pages are written, so reads never meet a half-done job.
//!
//! A job holds its blocks in memory from their load to their write, and waits for more memory
//! meanwhile; so all jobs together must fit beside everything else, or they wait for each other
//! for ever. A chunk whose overlay is larger than a job may be is done by several, one by one.

use crate::api::*;
use crate::overlay::OverlayBlock;
use crate::read::Pending;
use crate::store::Store;
use crate::table::{COPY_STRIDE, PAGE_CRCS, PAGES, encode_page};
use crate::tables::Waiter;
use protocol::types::{BLOCK_BYTES, ChunkId, ENTRY_BLOCKS_MAX, LogIndex, block_crc, crc_at_rest};
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};

/// Blocks of one flush write at most.
const WRITE_BLOCKS_MAX: usize = 256;

/// Blocks of a job at most: 2 MiB, so that the 20 KiB of table pages that it writes weigh little.
const JOB_BLOCKS_MAX: usize = 512;

struct Item<P> {
    block: u16,
    lsn: u64,
    index: LogIndex,
    at: u32,
    crc: u32,
    data: Option<(P, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Table,
    Load,
    Data,
    Pages,
}

struct Job<P> {
    slot: u32,
    generation: u64,
    items: Vec<Item<P>>,
    outstanding: usize,
    stage: Stage,
    /// A block could not be loaded: the job ends without effect and is done again later.
    spoilt: bool,
}

pub(crate) struct Flush<P> {
    jobs: BTreeMap<ChunkId, Job<P>>,
    ops: VecDeque<Op<P>>,
    /// Of jobs that have ended, empty.
    spare_items: Vec<Vec<Item<P>>>,
    /// Of the items that are looked at now.
    runs: Vec<(usize, usize)>,
    pub in_flight: usize,
    /// Chunks to be flushed in this round, oldest first.
    pub queue: VecDeque<ChunkId>,
    /// Chunks that wait for a free slot.
    pub slotless: VecDeque<ChunkId>,
    /// Chunks of which a block is bad: done again when it is repaired.
    pub spoilt: VecDeque<ChunkId>,
}

impl<P> Default for Flush<P> {
    fn default() -> Self {
        Self {
            jobs: BTreeMap::new(),
            ops: VecDeque::new(),
            spare_items: Vec::new(),
            runs: Vec::new(),
            in_flight: 0,
            queue: VecDeque::new(),
            slotless: VecDeque::new(),
            spoilt: VecDeque::new(),
        }
    }
}

impl<P: Payload> Flush<P> {
    pub(crate) fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }
    /// A job's items have done their work; their list has not. There are never more lists than jobs, and one.
    fn keep(&mut self, mut items: Vec<Item<P>>) {
        items.clear();
        self.spare_items.push(items);
    }
    pub(crate) fn next_op(&mut self, most: usize) -> Option<Op<P>> {
        if self.in_flight >= most {
            return None;
        }
        let op = self.ops.pop_front()?;
        self.in_flight += 1;
        Some(op)
    }
}

impl<P: Payload> Store<P> {
    /// Begins jobs as long as there are chunks to flush and jobs to spare.
    pub(crate) fn start_jobs(&mut self) {
        if self.pool.has_free() {
            self.flush.queue.append(&mut self.flush.slotless);
        }
        while self.flush.jobs.len() < self.layout.flush_in_flight_max {
            let Some(chunk) = self.flush.queue.pop_front() else { return };
            if self.flush.jobs.contains_key(&chunk) {
                continue;
            }
            self.start_job(chunk);
        }
    }

    fn start_job(&mut self, chunk: ChunkId) {
        let items = self.eligible(chunk);
        if items.is_empty() {
            return self.flush.keep(items);
        }
        let state = self.chunks.get_mut(&chunk).expect("has an overlay");
        let slot = match state.slot {
            Some(slot) => slot,
            None if items.iter().all(|i| i.crc == 0) => {
                self.drop_items(chunk, &items);
                self.flush.keep(items);
                return self.queue_rest(chunk);
            }
            None => {
                let Some(slot) = self.pool.take(chunk, state.copyset, self.log.durable) else {
                    self.flush.keep(items);
                    return self.flush.slotless.push_back(chunk);
                };
                state.slot = Some(slot);
                self.tables.insert(slot, crate::table::Table::new());
                slot
            }
        };
        let generation = self.pool.get(slot).expect("in use").generation;
        let job = Job { slot, generation, items, outstanding: 0, stage: Stage::Table, spoilt: false };
        self.flush.jobs.insert(chunk, job);
        if self.want_table(chunk, Waiter::Job(chunk)) {
            self.job_go_on(chunk);
        }
    }

    /// What all jobs together load stays below half of what the overlay may keep in memory.
    fn job_blocks_max(&self) -> usize {
        let share = self.layout.ram_blocks_max / (2 * self.layout.flush_in_flight_max);
        share.clamp(ENTRY_BLOCKS_MAX, JOB_BLOCKS_MAX)
    }

    /// Blocks of a chunk that the round wants in their slot, as many as a job may have.
    fn eligible(&mut self, chunk: ChunkId) -> Vec<Item<P>> {
        let mut items = self.flush.spare_items.pop().unwrap_or_default();
        items.extend(self.wanted(chunk).take(self.job_blocks_max()).map(|(block, b)| Item {
            block,
            lsn: b.lsn,
            index: b.index,
            at: b.at,
            crc: b.crc,
            data: b.ram.clone(),
        }));
        items
    }

    fn wanted(&self, chunk: ChunkId) -> impl Iterator<Item = (u16, &OverlayBlock<P>)> {
        let blocks = self.chunks.get(&chunk).into_iter().flat_map(|state| {
            let of_state = move |(block, over)| (state.copyset, block, over);
            state.overlay.iter().map(of_state)
        });
        let wanted = blocks.filter(|(copyset, _, b)| {
            self.round.wants(*copyset, b.lsn, b.index) && self.may_flush(*copyset, b)
        });
        wanted.map(|(_, block, over)| (block, over))
    }

    /// The job's current stage has nothing outstanding: on to the next.
    pub(crate) fn job_go_on(&mut self, chunk: ChunkId) {
        let Some(job) = self.flush.jobs.get_mut(&chunk) else { return };
        let lives = self.pool.get(job.slot).is_some_and(|s| s.generation == job.generation);
        if job.spoilt || !lives {
            return self.end_job(chunk);
        }
        match job.stage {
            Stage::Table if self.tables.get(job.slot).is_none() => {
                if self.want_table(chunk, Waiter::Job(chunk)) {
                    self.job_go_on(chunk);
                }
            }
            Stage::Table => {
                self.tables.pin(job.slot, true);
                job.stage = Stage::Load;
                self.load_items(chunk);
            }
            Stage::Load => {
                job.stage = Stage::Data;
                self.write_items(chunk);
            }
            Stage::Data => {
                job.stage = Stage::Pages;
                self.write_pages(chunk);
            }
            Stage::Pages => self.end_job(chunk),
        }
    }

    fn load_items(&mut self, chunk: ChunkId) {
        let job = self.flush.jobs.get_mut(&chunk).expect("in progress");
        let mut runs = std::mem::take(&mut self.flush.runs);
        find_runs(
            &mut runs,
            &job.items,
            ENTRY_BLOCKS_MAX,
            |i| i.crc != 0 && i.data.is_none(),
            |one, two| one.lsn == two.lsn && one.at + 1 == two.at,
        );
        let mut begun = 0;
        for (first, count) in runs.drain(..) {
            let item = &self.flush.jobs[&chunk].items[first];
            let Some((segment, block)) = self.log.place(item.lsn, item.at) else {
                let (block, lsn, crc) = (item.block, item.lsn, item.crc);
                self.report_bad(chunk, block, lsn, crc);
                self.flush.jobs.get_mut(&chunk).expect("in progress").spoilt = true;
                continue;
            };
            let ticket = self.ticket(FileId::Log(segment), Pending::JobLoad { chunk, first, count });
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            self.stats.log_reads += 1;
            self.flush.ops.push_back(Op::Read { ticket, file: FileId::Log(segment), offset, blocks: count });
            begun += 1;
        }
        self.flush.runs = runs;
        self.await_job(chunk, begun);
    }

    fn await_job(&mut self, chunk: ChunkId, begun: usize) {
        let job = self.flush.jobs.get_mut(&chunk).expect("in progress");
        job.outstanding = begun;
        if begun == 0 {
            self.job_go_on(chunk);
        }
    }

    pub(crate) fn job_loaded(&mut self, chunk: ChunkId, first: usize, count: usize, data: Option<P>) {
        let Some(job) = self.flush.jobs.get_mut(&chunk) else { return };
        let mut bad = Vec::new();
        for (nth, item) in job.items[first..first + count].iter_mut().enumerate() {
            let good = data.as_ref().is_some_and(|d| crc_at_rest(block_crc(d.block(nth))) == item.crc);
            item.data = data.clone().map(|d| (d, nth)).filter(|_| good);
            if !good {
                job.spoilt = true;
                bad.push((item.block, item.lsn, item.crc));
            }
        }
        for (block, lsn, crc) in bad {
            self.report_bad(chunk, block, lsn, crc);
        }
        self.job_step(chunk);
    }

    fn report_bad(&mut self, chunk: ChunkId, block: u16, lsn: u64, crc: u32) {
        let Some(state) = self.chunks.get(&chunk) else {
            self.stats.moved_blocks += 1;
            return;
        };
        let stayed = state.overlay.get(block).is_some_and(|b| b.lsn == lsn && b.ram.is_none());
        if stayed {
            self.stats.corrupt_blocks += 1;
            let bad = BadBlock { block, expected: Some(crc) };
            self.events.push_back(Event::Corrupt { copyset: state.copyset, chunk, bad });
        } else {
            self.stats.moved_blocks += 1;
        }
    }

    /// One of the job's operations ended.
    pub(crate) fn job_step(&mut self, chunk: ChunkId) {
        let Some(job) = self.flush.jobs.get_mut(&chunk) else { return };
        job.outstanding -= 1;
        if job.outstanding == 0 {
            self.job_go_on(chunk);
        }
    }

    fn write_items(&mut self, chunk: ChunkId) {
        let job = self.flush.jobs.get(&chunk).expect("in progress");
        let (file, base) = self.layout.data_place(job.slot);
        let mut runs = std::mem::take(&mut self.flush.runs);
        let follows = |one: &Item<P>, two: &Item<P>| one.block + 1 == two.block;
        find_runs(&mut runs, &job.items, WRITE_BLOCKS_MAX, |i| i.crc != 0, follows);
        let begun = runs.len();
        for (first, count) in runs.drain(..) {
            let items = &self.flush.jobs[&chunk].items[first..first + count];
            let offset = base + u64::from(items[0].block) * BLOCK_BYTES as u64;
            let mut pieces = self.spares.pieces();
            add_pieces(&mut pieces, items);
            self.flush_write(chunk, file, offset, pieces);
            self.stats.flushed_blocks += count as u64;
        }
        self.flush.runs = runs;
        if begun > 0 {
            self.chunks.get_mut(&chunk).expect("has a slot").flushes += 1;
            self.touch_slot(chunk);
        }
        self.await_job(chunk, begun);
    }

    fn touch_slot(&mut self, chunk: ChunkId) {
        let slot = self.flush.jobs[&chunk].slot;
        self.pool.touched.insert(slot);
        self.round.touch(self.layout.data_place(slot).0);
    }

    fn flush_write(&mut self, chunk: ChunkId, file: FileId, offset: u64, pieces: Pieces<P>) {
        let ticket = self.ticket(file, Pending::JobWrite { chunk });
        self.flush.ops.push_back(Op::Write { ticket, file, offset, pieces, dsync: false });
    }

    /// Puts the new CRCs into the table and writes the pages that changed.
    fn write_pages(&mut self, chunk: ChunkId) {
        let job = self.flush.jobs.get(&chunk).expect("in progress");
        let (slot, generation) = (job.slot, job.generation);
        let table = self.tables.touch(slot).expect("pinned");
        let mut touched = [false; PAGES];
        for item in &job.items {
            let block = usize::from(item.block);
            if table.expected(block) != Some(item.crc) {
                table.set(block, item.crc);
                touched[block / PAGE_CRCS] = true;
            }
            self.stats.zeroed_blocks += u64::from(item.crc == 0);
        }
        let table = self.tables.get(slot).expect("pinned");
        let (file, base) = self.layout.table_place(slot);
        let mut writes: SmallVec<[(u64, Vec<u8>); PAGES]> = SmallVec::new();
        for page in (0..PAGES).filter(|p| touched[*p]) {
            let pages = &mut self.pool.get_mut(slot).expect("lives").pages;
            // The copy that the last checkpoint relies on is never overwritten.
            let (bit, copy) = (1u8 << page, usize::from(pages.durable >> page & 1 == 0));
            pages.seq[page] += 1;
            pages.current = pages.current & !bit | if copy == 1 { bit } else { 0 };
            let mut bytes = self.spares.bytes();
            encode_page(table, page, chunk, generation, pages.seq[page], &mut bytes);
            writes.push((base + ((copy * COPY_STRIDE + page) * BLOCK_BYTES) as u64, bytes));
        }
        let begun = writes.len();
        self.stats.table_pages += begun as u64;
        for (offset, bytes) in writes {
            self.flush_write(chunk, file, offset, SmallVec::from_iter([Piece::Bytes(bytes)]));
        }
        self.touch_slot(chunk);
        self.await_job(chunk, begun);
    }

    fn end_job(&mut self, chunk: ChunkId) {
        let job = self.flush.jobs.remove(&chunk).expect("in progress");
        let lives = self.pool.get(job.slot).is_some_and(|s| s.generation == job.generation);
        if lives {
            self.tables.pin(job.slot, false);
        }
        if job.spoilt {
            self.flush.keep(job.items);
            self.flush.spoilt.push_back(chunk);
            return;
        }
        if !lives || job.stage != Stage::Pages {
            return self.flush.keep(job.items);
        }
        self.drop_items(chunk, &job.items);
        self.flush.keep(job.items);
        self.free_if_empty(chunk, job.slot);
        self.queue_rest(chunk);
    }

    /// What a job had no room for is the next one's.
    fn queue_rest(&mut self, chunk: ChunkId) {
        if self.wanted(chunk).next().is_some() {
            self.flush.queue.push_back(chunk);
        }
    }

    fn drop_items(&mut self, chunk: ChunkId, items: &[Item<P>]) {
        let Some(state) = self.chunks.get_mut(&chunk) else { return };
        let before = state.overlay.counted();
        let same = |item: &Item<P>, b: &OverlayBlock<P>| {
            b.lsn == item.lsn && b.index == item.index && b.crc == item.crc
        };
        state.overlay.remove_same(items, |item| item.block, same);
        self.overlaid.change(before, state.overlay.counted());
        self.tidy_chunk(chunk);
    }

    /// A chunk that is all zeroes needs no slot.
    fn free_if_empty(&mut self, chunk: ChunkId, slot: u32) {
        let empty = self.tables.get(slot).is_some_and(|t| t.is_empty());
        if empty && self.chunks.get(&chunk).is_some_and(|c| c.overlay.is_empty()) {
            self.drop_chunk(chunk);
        }
    }

    /// A bad block was repaired: its chunk may be flushed again.
    pub(crate) fn wake_flush(&mut self, chunk: ChunkId) {
        if let Some(at) = self.flush.spoilt.iter().position(|c| *c == chunk) {
            self.flush.spoilt.remove(at);
            self.flush.queue.push_back(chunk);
        }
    }
}

/// Finds runs (first, count) of the items that are `wanted`, as long as each `follows` the one before.
fn find_runs<T>(
    runs: &mut Vec<(usize, usize)>,
    items: &[T],
    most: usize,
    wanted: impl Fn(&T) -> bool,
    follows: impl Fn(&T, &T) -> bool,
) {
    for (at, item) in items.iter().enumerate().filter(|(_, i)| wanted(i)) {
        match runs.last_mut() {
            Some((first, count))
                if *first + *count == at && *count < most && follows(&items[at - 1], item) =>
            {
                *count += 1;
            }
            _ => runs.push((at, 1)),
        }
    }
}

/// Adds the data of consecutive blocks, runs of one payload put together.
fn add_pieces<P: Payload>(out: &mut Pieces<P>, items: &[Item<P>]) {
    for item in items {
        let (data, at) = item.data.as_ref().expect("loaded");
        if let Some(Piece::Payload { payload, first, count }) = out.last_mut()
            && *first + *count == *at
            && core::ptr::eq(payload.block(0).as_ptr(), data.block(0).as_ptr())
        {
            *count += 1;
            continue;
        }
        out.push(Piece::Payload { payload: data.clone(), first: *at, count: 1 });
    }
}
