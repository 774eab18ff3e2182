//! The store of one shard: its state, what is staged, what is committed, and the calls of its driver.
//!
//! Invariants: an entry is in `Copyset::entries` iff it is above the floor; a chunk is in
//! `chunks` iff it has a slot, an overlay or entries waiting to be applied; a block in the
//! overlay outranks its slot; only durable blocks are flushed.

use crate::api::*;
use crate::flush::Flush;
use crate::log::Log;
use crate::overlay::{Counted, Overlay, OverlayBlock};
use crate::pool::Pool;
use crate::preformat::Preformat;
use crate::read::{Pending, Reads};
use crate::round::Round;
use crate::spares::Spares;
use crate::tables::{Tables, Waiter};
use protocol::raft::{Body, Entry, Fences, HardState, Members};
use protocol::types::{
    BlockRange, CHUNK_BLOCKS, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, SessionEpoch, Term, Time,
    VolumeId, crc_at_rest,
};
use rustc_hash::FxBuildHasher;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub(crate) type Map<K, V> = hashbrown::HashMap<K, V, FxBuildHasher>;

/// So many entries are applied before the log tells it: what a restart has to hear of from a
/// leader before its log can be recycled.
const HINT_ENTRIES: u64 = 32;
/// Or so much of the log, where that is less: one part in so many.
const HINT_SHARE: usize = 32;
/// Entries that wait to be applied may take so much of the log, in eighths, when they are our own
/// proposals or a leader's. A copyset may be amid a chunk catch-up, or without a quorum: then its
/// entries stay for as long as that takes, are copied forward to recycle what lies between them, and
/// the rest of the log must suffice for everything else. A leader stops before a follower does, so
/// that no two shards can fill up with proposals that each needs the other to take.
const OWN_EIGHTHS: usize = 2;
const TAKEN_EIGHTHS: usize = 3;
/// Writes are held back when less than one part in so many of the log is room for them, ...
const WINDOW_SHARE: usize = 5;
/// ... and then at most so many are under way.
const WINDOW_MAX: usize = 256;
/// Blocks are flushed ahead of need when those that are newer than their slots fill so many eighths of what memory
/// may hold.
pub(crate) const AHEAD_EIGHTHS: usize = 3;
/// The newest of memory are left for later, since they may be written again; more than these would make for jobs of
/// few blocks, each of which writes all pages of its chunk's table.
pub(crate) const KEPT_EIGHTHS: usize = 1;
/// From so many eighths on writes are held back, ...
const HOLD_EIGHTHS: usize = 4;
/// ... and from so many on, only a few are under way: what has left memory costs the flusher a read of the log for
/// each block, and so long as writes come as fast as it flushes it never catches up.
const FULL_EIGHTHS: usize = 6;
/// The few: after a start all that was not flushed lies in the log, and hosts wait.
const FEW: usize = 16;

/// Most log blocks of entries that wait to be applied, of so many replicas. Beyond the limit that is looked at
/// before entries are taken (a lone one always is), what was applied waits again after a start, as far as
/// the log does not tell of it yet; with a catch-up under way a checkpoint tells of none of it, and all that the
/// log holds may wait until that ends.
pub fn waiting_max(layout: &Layout, replicas: usize, installing: bool) -> usize {
    let log_blocks = layout.log_blocks() as usize;
    if installing {
        return log_blocks;
    }
    let untold =
        (log_blocks / HINT_SHARE).min(HINT_ENTRIES as usize * (ENTRY_BLOCKS_MAX + 1)) + ENTRY_BLOCKS_MAX + 1;
    let on_its_way = layout.batches_in_flight_max * layout.batch_blocks_max as usize;
    log_blocks / 8 * TAKEN_EIGHTHS + ENTRY_BLOCKS_MAX + 1 + replicas * untold + on_its_way
}

/// An entry above the floor.
pub(crate) struct EntryMeta<P> {
    pub entry: Entry,
    pub lsn: u64,
    pub at: u32,
    pub crcs: SmallVec<[u32; 8]>,
    pub ram: Option<P>,
}

impl<P> EntryMeta<P> {
    /// What it takes in the log: its payload, and about a block of headers.
    pub(crate) fn blocks(&self) -> usize {
        self.crcs.len() + 1
    }
}

/// A replica.
pub(crate) struct Copyset<P> {
    pub hard: HardState,
    pub members: Members,
    pub floor: LogIndex,
    pub floor_term: Term,
    pub born: u64,
    pub damaged: bool,
    pub installing: bool,
    pub applied: LogIndex,
    /// The last applied index that the log tells, and the log blocks of entries applied since.
    pub hinted: LogIndex,
    pub unhinted: usize,
    /// The last applied index that a durable batch tells: what a start applies at least.
    pub told: LogIndex,
    /// Committed while installing: applied at its end.
    pub deferred: LogIndex,
    pub entries: VecDeque<EntryMeta<P>>,
    pub chunks: BTreeSet<ChunkId>,
    /// Raised by entries that are applied, and by catch-ups.
    pub fences: Fences,
}

impl<P> Copyset<P> {
    pub(crate) fn new(members: Members, born: u64) -> Self {
        Self {
            hard: HardState::default(),
            members,
            floor: LogIndex(0),
            floor_term: Term(0),
            born,
            damaged: false,
            installing: false,
            applied: LogIndex(0),
            hinted: LogIndex(0),
            unhinted: 0,
            told: LogIndex(0),
            deferred: LogIndex(0),
            entries: VecDeque::new(),
            chunks: BTreeSet::new(),
            fences: Fences::default(),
        }
    }
    pub(crate) fn get(&self, index: LogIndex) -> Option<&EntryMeta<P>> {
        self.entries.get(index.0.checked_sub(self.floor.0 + 1)? as usize)
    }
    pub(crate) fn get_mut(&mut self, index: LogIndex) -> Option<&mut EntryMeta<P>> {
        self.entries.get_mut(index.0.checked_sub(self.floor.0 + 1)? as usize)
    }
    pub(crate) fn last(&self) -> LogIndex {
        LogIndex(self.floor.0 + self.entries.len() as u64)
    }
    /// Log blocks of the entries that wait to be applied, from `from` on.
    pub(crate) fn waiting_blocks(&self, from: LogIndex) -> usize {
        let first = self.applied.next().max(from);
        let at = (first.0.saturating_sub(self.floor.0 + 1) as usize).min(self.entries.len());
        self.entries.range(at..).map(EntryMeta::blocks).sum()
    }
    pub(crate) fn health(&self) -> Health {
        match (self.damaged, self.installing) {
            (true, _) => Health::Damaged,
            (_, true) => Health::Installing,
            _ => Health::Whole,
        }
    }
    pub(crate) fn set_health(&mut self, health: Health) {
        self.damaged = health == Health::Damaged;
        self.installing = health == Health::Installing || (self.installing && health == Health::Damaged);
    }
}

/// A chunk that is not all zeroes, or was not.
pub(crate) struct Chunk<P> {
    pub copyset: CopysetId,
    pub slot: Option<u32>,
    pub overlay: Overlay<P>,
    /// Write entries that are not applied yet.
    pub refs: u32,
    /// Counts the writes to the slot.
    pub flushes: u64,
}

/// Payload in memory, oldest first.
pub(crate) struct RamItem {
    pub copyset: CopysetId,
    pub index: LogIndex,
    pub lsn: u64,
    pub chunk: ChunkId,
    pub range: BlockRange,
}

/// The storage of one shard. See the crate's docs for the calling contract.
pub struct Store<P> {
    pub(crate) layout: Layout,
    pub(crate) identity: Identity,
    pub(crate) now: Time,
    pub(crate) failed: Option<Failure>,
    pub(crate) stats: Stats,
    pub(crate) events: VecDeque<Event<P>>,
    pub(crate) ops: VecDeque<Op<P>>,
    pub(crate) pending: Map<u64, (FileId, Pending)>,
    pub(crate) next_ticket: u64,
    pub(crate) log: Log<P>,
    /// LSN up to which the log was read at recovery.
    pub(crate) recovered: u64,
    /// The log lost records, and a Create may be among them.
    pub(crate) may_lack_replicas: bool,
    pub(crate) copysets: BTreeMap<CopysetId, Copyset<P>>,
    pub(crate) chunks: Map<ChunkId, Chunk<P>>,
    /// Chunks with an overlay.
    pub(crate) dirty: BTreeSet<ChunkId>,
    /// All overlays together.
    pub(crate) overlaid: Counted,
    /// Log blocks of entries that wait to be applied.
    pub(crate) waiting_blocks: usize,
    pub(crate) ram: VecDeque<RamItem>,
    pub(crate) ram_blocks: usize,
    pub(crate) pool: Pool,
    pub(crate) tables: Tables,
    pub(crate) reads: Reads<P>,
    pub(crate) flush: Flush<P>,
    /// Repairs that wait for their chunk's table.
    pub(crate) repairs: Vec<(ChunkId, u16, P)>,
    pub(crate) round: Round<P>,
    pub(crate) preformat: Preformat,
    pub(crate) last_stage: Time,
    /// Copysets whose applied index the log should tell soon.
    /// In order, each once.
    pub(crate) hints: Vec<CopysetId>,
    /// Staged, and not known to be durable: LSN, copyset, applied index.
    pub(crate) hints_under_way: VecDeque<(u64, CopysetId, LogIndex)>,
    pub(crate) stopping: bool,
    pub(crate) spares: Spares<P>,
}

impl<P: Payload> Store<P> {
    /// Whose disk it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }
    /// Sizes and limits in force.
    pub fn layout(&self) -> Layout {
        self.layout
    }
    /// Whether a replica may be missing because the log lost its Create. One that should be here and is not may then
    /// have voted and acknowledged: it is to be made as [`Health::Damaged`]. True over restarts until
    /// [`Store::all_replicas_made`].
    pub fn may_lack_replicas(&self) -> bool {
        self.may_lack_replicas
    }
    /// Every replica that should be here is, or is staged.
    pub fn all_replicas_made(&mut self) {
        self.may_lack_replicas = false;
    }
    /// Appends a record to the batch being filled; `crcs`: one CRC-32C (`block_crc`) a payload block.
    /// The blocks are the first ones of `payload`.
    ///
    /// # Panics
    /// When payload, CRCs and record disagree in length, when an entry leaves a gap, when the
    /// copyset is unknown (or known already, for `Create`), or when a catch-up ends that was not begun.
    pub fn stage(&mut self, record: Record, payload: Option<P>, crcs: &[u32]) {
        let blocks = crate::batch::payload_blocks(&record);
        assert_eq!(crcs.len(), blocks, "one CRC a payload block");
        assert!(payload.as_ref().map_or(0, Payload::blocks) >= blocks, "the payload holds the blocks");
        if let Record::InstallEnd { copyset, .. } = record {
            assert!(self.is_installing(copyset), "a catch-up ends once");
        }
        self.last_stage = self.now;
        if matches!(record, Record::Create { .. }) {
            // Its LSN tells the records of an earlier replica of the same id from its own.
            self.log.close();
        }
        let extra = self.extra(&record);
        let in_log = payload.as_ref().filter(|_| blocks > 0).map(|p| (p.clone(), blocks));
        let (lsn, at) = self.log.stage(record, extra, in_log, crcs);
        let placed = Placed { lsn: lsn.0, at, extra, payload: payload.filter(|_| blocks > 0), crcs };
        self.take_in(record, placed);
        if self.ram_blocks > self.layout.ram_blocks_max {
            self.evict(self.ram_blocks - self.layout.ram_blocks_max);
        }
    }
    /// Takes back what an operation wrote, once it has been copied or handed on: its memory is used again.
    pub fn take_back(&mut self, pieces: Pieces<P>) {
        self.spares.keep_pieces(pieces);
    }
    /// LSN of the batch which holds everything staged so far; once `durable` reaches it, all is durable.
    pub fn seal(&mut self) -> Lsn {
        Lsn(self.log.staged())
    }
    /// Every batch up to this one is durable.
    pub fn durable(&self) -> Lsn {
        Lsn(self.log.durable)
    }
    /// Whether so many payload blocks may be staged now. Hard states and other small records always
    /// may; hold back installs while false, and entries while [`Store::can_propose`] or
    /// [`Store::can_append`] is.
    pub fn can_stage(&self, blocks: usize) -> bool {
        let copies = self.round.copy_blocks;
        self.failed.is_none()
            && self.log.room() as usize > blocks + 2 * self.layout.batches_in_flight_max
            && (copies == 0 || self.has_space(blocks + copies))
    }
    /// Whether a leader may stage one entry of so many payload blocks.
    pub fn can_propose(&self, blocks: usize) -> bool {
        self.can_stage(blocks) && self.may_wait(0, 1 + blocks, OWN_EIGHTHS)
    }
    /// Whether a follower may stage so many entries, of so many payload blocks in all, in place of
    /// those that it has from `from` on.
    pub fn can_append(&self, copyset: CopysetId, from: LogIndex, entries: usize, blocks: usize) -> bool {
        let replaced = self.copysets.get(&copyset).map_or(0, |c| c.waiting_blocks(from));
        self.can_stage(blocks) && self.may_wait(replaced, entries + blocks, TAKEN_EIGHTHS)
    }
    /// How many writes a leader had better have under way: fewer, the less room the log has and the more of memory
    /// waits for the flusher, so that hosts are slowed down to what it can do before they are stopped by a log that
    /// is full.
    pub fn write_window(&self) -> usize {
        let window = |room, full| if room >= full { usize::MAX } else { 1 + WINDOW_MAX * room / full };
        let by_log = window(self.log.room() as usize, self.log.ready_blocks() / WINDOW_SHARE);
        if !self.layout.flush_ahead {
            return by_log;
        }
        let eighth = self.layout.ram_blocks_max / 8;
        let room = (eighth * FULL_EIGHTHS).saturating_sub(self.overlaid.data as usize);
        by_log.min(window(room, eighth * (FULL_EIGHTHS - HOLD_EIGHTHS)).max(FEW))
    }
    /// Whether a leader may stage a discard. One of a few bytes covers thousands of blocks, each of
    /// which takes memory until it is flushed; one of a whole chunk takes none.
    pub fn can_zero(&self, range: BlockRange) -> bool {
        range == BlockRange::CHUNK
            || self.overlaid.blocks + u64::from(range.count) <= self.overlay_blocks_max()
    }
    /// What the log can hold, and as much again of blocks that are only known to be zeroes.
    fn overlay_blocks_max(&self) -> u64 {
        self.log.ready_blocks() as u64 + self.layout.zero_blocks_max
    }
    /// Whether discards that are not flushed begin to take much memory.
    pub(crate) fn is_crowded(&self) -> bool {
        self.overlaid.blocks > self.overlay_blocks_max() - self.layout.zero_blocks_max / 4 * 3
    }
    fn may_wait(&self, replaced: usize, more: usize, eighths: usize) -> bool {
        let waiting = self.waiting_blocks - replaced;
        waiting == 0 || waiting + more <= self.log.ready_blocks() / 8 * eighths
    }
    /// What waits, counted anew.
    pub(crate) fn count_waiting(&self) -> usize {
        self.copysets.values().map(|c| c.waiting_blocks(LogIndex(0))).sum()
    }
    /// Makes the entries up to `up_to` (or the last one) visible to reads. Between `InstallBegin` and
    /// `InstallEnd` it is put off until the end, so that a replay finds the same order.
    pub fn commit(&mut self, copyset: CopysetId, up_to: LogIndex) {
        if let Some(state) = self.copysets.get_mut(&copyset).filter(|c| c.installing) {
            state.deferred = state.deferred.max(up_to);
            return;
        }
        while let Some(state) = self.copysets.get_mut(&copyset) {
            if state.applied >= up_to || state.applied >= state.last() {
                break;
            }
            state.applied = state.applied.next();
            let index = state.applied;
            let Some(meta) = state.get(index) else { continue };
            let (body, lsn, at, blocks) = (meta.entry.body, meta.lsn, meta.at, meta.blocks());
            let (crcs, ram) = (meta.crcs.clone(), meta.ram.clone());
            state.unhinted += blocks;
            self.waiting_blocks -= blocks;
            self.apply(copyset, index, body, Placed { lsn, at, extra: 0, payload: ram, crcs: &crcs });
        }
        if let Some(state) = self.copysets.get(&copyset)
            && (state.applied.0 - state.hinted.0 >= HINT_ENTRIES
                || state.unhinted > self.log.ready_blocks() / HINT_SHARE)
        {
            self.hint(copyset);
        }
    }
    fn hint(&mut self, copyset: CopysetId) {
        if let Err(at) = self.hints.binary_search(&copyset) {
            self.hints.insert(at, copyset);
        }
    }
    /// Lets the log tell applied indexes: of those that are due, or of `all`.
    pub(crate) fn stage_hints(&mut self, all: bool) {
        let mut due = std::mem::take(&mut self.hints);
        if all {
            due.extend(self.copysets.iter().filter(|(_, c)| c.applied > c.hinted).map(|(id, _)| *id));
            due.sort_unstable();
            due.dedup();
        }
        let staged = self.last_stage;
        for copyset in due.drain(..) {
            let Some(state) = self.copysets.get_mut(&copyset).filter(|c| !c.installing) else { continue };
            (state.hinted, state.unhinted) = (state.applied, 0);
            let index = state.applied;
            self.stage(Record::Applied { copyset, index }, None, &[]);
            self.hints_under_way.push_back((self.log.staged(), copyset, index));
        }
        // Not a sign of work: idleness goes on.
        self.last_stage = staged;
        debug_assert!(self.hints.is_empty(), "staging a hint asks for none");
        self.hints = due;
    }
    /// More of the log is durable, and hints with it.
    pub(crate) fn hints_durable(&mut self) {
        while self.hints_under_way.front().is_some_and(|(lsn, ..)| *lsn <= self.log.durable) {
            let (_, copyset, index) = self.hints_under_way.pop_front().expect("looked at");
            if let Some(state) = self.copysets.get_mut(&copyset) {
                state.told = index.min(state.applied).max(state.told);
            }
        }
    }
    /// Whether a block of the overlay may go to its slot: a start must find it in the log, and apply it before the
    /// slot is read. Until it is told that its entry is applied, a start would leave it out, and find a slot that is
    /// newer than its table. (What was applied before a catch-up is told by its begin.)
    pub(crate) fn may_flush(&self, copyset: CopysetId, over: &OverlayBlock<P>) -> bool {
        over.lsn <= self.log.durable
            && self.copysets.get(&copyset).is_none_or(|state| state.installing || over.index <= state.told)
    }
    /// The payload of an entry that is in the log.
    pub fn entry_payload(&self, copyset: CopysetId, index: LogIndex) -> EntryPayload<P> {
        match self.copysets.get(&copyset).and_then(|c| c.get(index)) {
            None => EntryPayload::Gone,
            Some(meta) if meta.crcs.is_empty() => EntryPayload::Ram(None, SmallVec::new()),
            Some(EntryMeta { ram: Some(ram), crcs, .. }) => {
                EntryPayload::Ram(Some(ram.clone()), crcs.clone())
            }
            Some(_) => EntryPayload::NeedsLoad,
        }
    }
    /// Whether a chunk catch-up of the copyset was begun and has not ended.
    pub fn is_installing(&self, copyset: CopysetId) -> bool {
        self.copysets.get(&copyset).is_some_and(|c| c.installing)
    }
    /// The chunks of a copyset that hold (or held) data, in order.
    pub fn chunks_of(&self, copyset: CopysetId) -> Vec<ChunkId> {
        self.copysets.get(&copyset).map(|c| c.chunks.iter().copied().collect()).unwrap_or_default()
    }
    /// The fences of a copyset's volumes, as of what is applied.
    pub fn fences(&self, copyset: CopysetId) -> Fences {
        self.copysets.get(&copyset).map(|c| c.fences.clone()).unwrap_or_default()
    }
    /// One of them.
    pub fn fence(&self, copyset: CopysetId, volume: VolumeId) -> SessionEpoch {
        self.copysets.get(&copyset).map_or(SessionEpoch(0), |c| c.fences.of(volume))
    }
    /// Whether `n` chunks that have no slot yet can get one.
    pub fn can_allocate(&self, n: usize) -> bool {
        self.free_slots() >= n
    }
    /// Slots that can still be given out.
    pub fn free_slots(&self) -> usize {
        let promised = self.chunks.len() - self.pool.used;
        self.pool.capacity().saturating_sub(self.pool.used + self.pool.retired.len() + promised)
    }
    /// Slots in use: those of one volume in one copyset at a time, for all that have any.
    pub fn slots_in_use(&self) -> impl Iterator<Item = (CopysetId, VolumeId, u32)> {
        self.pool.in_use()
    }
    /// Whether freed slots can be given out soon: after the next checkpoint.
    pub fn slots_come_back(&self) -> bool {
        !self.pool.retired.is_empty()
    }
    /// Whether the chunk has a slot, or one promised to it.
    pub fn has_slot(&self, chunk: ChunkId) -> bool {
        self.chunks.contains_key(&chunk)
    }
    /// Replaces a bad block by good content (told by `Corrupt`): block `block` of the chunk by the
    /// first of `payload`. False when the content is not what is expected (any more); then nothing is
    /// done. Where the chunk's table must be loaded to know, that is decided before any later read.
    pub fn repair(&mut self, chunk: ChunkId, block: u16, payload: P) -> bool {
        let crc = protocol::types::block_crc(payload.block(0));
        let Some(state) = self.chunks.get(&chunk) else { return false };
        let copyset = state.copyset;
        let fits = match state.overlay.get(block) {
            Some(over) => over.crc == crc_at_rest(crc),
            None => {
                let Some(slot) = state.slot else { return false };
                if !self.want_table(chunk, Waiter::Repair(chunk)) {
                    self.repairs.push((chunk, block, payload));
                    return true;
                }
                let table = self.tables.get(slot).expect("at hand");
                table.expected(block.into()).is_none_or(|expected| expected == crc_at_rest(crc))
            }
        };
        if fits {
            self.stats.repaired_blocks += 1;
            let range = BlockRange { first: block, count: 1 };
            self.stage(Record::InstallBlocks { copyset, chunk, range }, Some(payload), &[crc]);
            self.wake_flush(chunk);
        }
        fits
    }

    /// The table that repairs of a chunk waited for is at hand.
    pub(crate) fn repairs_go_on(&mut self, chunk: ChunkId) {
        for (at, block, payload) in std::mem::take(&mut self.repairs) {
            if at == chunk {
                self.repair(chunk, block, payload);
            } else {
                self.repairs.push((at, block, payload));
            }
        }
    }
    /// Drops the oldest payload handles of durable entries, about `blocks` blocks of them; they are
    /// log-backed from then on. Tells how many were dropped.
    pub fn evict(&mut self, blocks: usize) -> usize {
        let mut dropped = 0;
        while dropped < blocks && self.ram.front().is_some_and(|item| item.lsn <= self.log.durable) {
            let item = self.ram.pop_front().expect("looked at");
            self.forget_ram(&item);
            dropped += usize::from(item.range.count);
            self.stats.evictions += 1;
        }
        dropped
    }
    /// Begins the graceful end: flush, checkpoint, `Event::Stopped`.
    pub fn stop(&mut self) {
        self.stopping = true;
    }
    /// Why the store refuses work, if it does.
    pub fn failure(&self) -> Option<Failure> {
        self.failed
    }
    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event<P>> {
        self.events.pop_front()
    }
    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            free_slots: self.free_slots() as u64,
            used_slots: self.pool.used as u64,
            segments_used: self.log.uses.len() as u64,
            segments_ready: self.log.ready.into(),
            overlay_blocks: self.overlaid.blocks,
            ram_blocks: self.ram_blocks as u64,
            waiting_blocks: self.waiting_blocks as u64,
            tables_cached: self.tables.len() as u64,
            ..self.stats
        }
    }

    pub(crate) fn forget_ram(&mut self, item: &RamItem) {
        self.ram_blocks -= usize::from(item.range.count);
        if let Some(meta) = self.copysets.get_mut(&item.copyset).and_then(|c| c.get_mut(item.index))
            && meta.lsn == item.lsn
        {
            meta.ram = None;
        }
        if let Some(chunk) = self.chunks.get_mut(&item.chunk) {
            chunk.overlay.forget_ram(item.range, item.lsn);
        }
    }
}

/// A record's place in the log, and its payload.
pub(crate) struct Placed<'a, P> {
    pub lsn: u64,
    pub at: u32,
    pub extra: u64,
    pub payload: Option<P>,
    pub crcs: &'a [u32],
}

/// What records do to the state, at staging and at replay alike.
impl<P: Payload> Store<P> {
    /// What a record's replay must know that only this moment knows.
    fn extra(&self, record: &Record) -> u64 {
        match record {
            Record::InstallBegin { copyset } => self.copysets.get(copyset).map_or(0, |c| c.applied.0),
            Record::InstallEnd { copyset, floor, floor_term, .. } => {
                let keeps = |c: &Copyset<P>| match c.get(*floor) {
                    Some(meta) => meta.entry.term == *floor_term,
                    None => c.floor == *floor && c.floor_term == *floor_term,
                };
                self.copysets.get(copyset).is_some_and(keeps).into()
            }
            _ => 0,
        }
    }

    fn take_in(&mut self, record: Record, placed: Placed<'_, P>) {
        if let Record::Entry { copyset, entry } = record {
            return self.append(copyset, entry, placed);
        }
        if let Record::Truncate { copyset, from } = record {
            return self.truncate(copyset, from);
        }
        if let Record::Create { copyset, .. } = record {
            assert!(!self.copysets.contains_key(&copyset), "the copyset exists already");
        }
        if let Record::InstallEnd { copyset, floor, .. } = record {
            self.drop_entries(copyset, floor, placed.extra == 1);
        }
        self.take_in_metadata(record, placed);
        if let Record::InstallEnd { copyset, .. } | Record::Health { copyset, .. } = record {
            let deferred = std::mem::take(&mut self.copyset(copyset).deferred);
            self.commit(copyset, deferred);
        }
    }

    /// Every record but entries and truncations, and but for the entries that `InstallEnd` drops.
    pub(crate) fn take_in_metadata(&mut self, record: Record, placed: Placed<'_, P>) {
        match record {
            Record::Create { copyset, members } => {
                self.copysets.insert(copyset, Copyset::new(members, placed.lsn));
            }
            Record::Remove { copyset } => self.remove(copyset),
            Record::Hard { copyset, hard } => self.copyset(copyset).hard = hard,
            Record::Health { copyset, health } => self.copyset(copyset).set_health(health),
            Record::Applied { .. } => {}
            Record::Fence { copyset, fence } => self.copyset(copyset).fences.raise(fence),
            Record::InstallBegin { copyset } => self.copyset(copyset).installing = true,
            Record::InstallBlocks { copyset, chunk, range } => {
                self.keep_ram(copyset, LogIndex(0), chunk, range, &placed);
                self.overlay_write(copyset, LogIndex(0), chunk, range, &placed);
            }
            Record::InstallZero { copyset, chunk, range } => {
                self.overlay_zero(copyset, LogIndex(0), chunk, range, placed.lsn);
            }
            Record::InstallDrop { chunk, .. } => self.drop_chunk(chunk),
            Record::InstallEnd { copyset, floor, floor_term, members } => {
                let state = self.copyset(copyset);
                state.installing = false;
                if floor >= state.floor {
                    (state.floor, state.floor_term, state.members) = (floor, floor_term, members);
                    state.applied = state.applied.max(floor);
                }
            }
            Record::Entry { .. } | Record::Truncate { .. } => unreachable!("handled by the callers"),
        }
    }

    fn copyset(&mut self, id: CopysetId) -> &mut Copyset<P> {
        self.copysets.get_mut(&id).expect("the copyset was created")
    }

    fn append(&mut self, copyset: CopysetId, entry: Entry, placed: Placed<'_, P>) {
        let state = self.copysets.get(&copyset).expect("the copyset was created");
        assert!(entry.index > state.floor && entry.index <= state.last().next(), "an entry follows the last");
        if entry.index <= state.last() {
            let same = state.get(entry.index).is_some_and(|m| m.entry.term == entry.term);
            if same {
                return self.place_again(copyset, entry.index, placed);
            }
            self.truncate(copyset, entry.index);
        }
        if let Body::Write { chunk, range } = entry.body {
            self.keep_ram(copyset, entry.index, chunk, range, &placed);
            self.chunk(copyset, chunk).refs += 1;
        }
        let meta = EntryMeta {
            entry,
            lsn: placed.lsn,
            at: placed.at,
            crcs: placed.crcs.into(),
            ram: placed.payload,
        };
        self.waiting_blocks += meta.blocks();
        self.copyset(copyset).entries.push_back(meta);
    }

    /// The same entry once more: it lies where its newest copy lies. What is applied of it stays in
    /// the overlay with its old LSN, and is flushed before that is recycled: in an installing
    /// copyset the new copy would not bring it back.
    fn place_again(&mut self, copyset: CopysetId, index: LogIndex, placed: Placed<'_, P>) {
        let meta = self.copyset(copyset).get_mut(index).expect("in the log");
        let body = meta.entry.body;
        (meta.lsn, meta.at) = (placed.lsn, placed.at);
        meta.ram = placed.payload.clone();
        if let Body::Write { chunk, range } = body {
            self.keep_ram(copyset, index, chunk, range, &placed);
        }
    }

    fn truncate(&mut self, copyset: CopysetId, from: LogIndex) {
        assert!(from > self.copyset(copyset).applied, "applied entries are never truncated");
        while self.copyset(copyset).last() >= from {
            let meta = self.copyset(copyset).entries.pop_back().expect("above the floor");
            self.waiting_blocks -= meta.blocks();
            self.entry_left(meta.entry.body);
        }
    }

    /// Drops the entries up to `floor`, and if not `keep` the others too.
    pub(crate) fn drop_entries(&mut self, copyset: CopysetId, floor: LogIndex, keep: bool) {
        loop {
            let state = self.copyset(copyset);
            if state.entries.is_empty() || (keep && state.floor >= floor) {
                break;
            }
            let applied = state.floor < state.applied;
            let meta = state.entries.pop_front().expect("not empty");
            // Counting by the floor keeps `get` right while the front goes away.
            (state.floor, state.floor_term) = (meta.entry.index, meta.entry.term);
            if let Body::Members(members) = meta.entry.body {
                state.members = members;
            }
            if !applied {
                self.waiting_blocks -= meta.blocks();
                self.entry_left(meta.entry.body);
            }
        }
        let state = self.copyset(copyset);
        if !keep {
            state.floor = state.floor.min(floor);
            state.applied = state.floor;
        }
        state.applied = state.applied.max(state.floor);
    }

    /// An entry will not be applied any more, or has just been.
    fn entry_left(&mut self, body: Body) {
        if let Body::Write { chunk, .. } = body
            && let Some(state) = self.chunks.get_mut(&chunk)
        {
            state.refs = state.refs.saturating_sub(1);
            self.tidy_chunk(chunk);
        }
    }

    fn remove(&mut self, copyset: CopysetId) {
        let Some(state) = self.copysets.remove(&copyset) else { return };
        self.waiting_blocks -= state.waiting_blocks(LogIndex(0));
        self.round.forget(copyset);
        for chunk in state.chunks {
            if let Some(state) = self.chunks.get_mut(&chunk) {
                state.refs = 0;
            }
            self.drop_chunk(chunk);
        }
    }

    pub(crate) fn apply(&mut self, copyset: CopysetId, index: LogIndex, body: Body, placed: Placed<'_, P>) {
        match body {
            Body::Write { chunk, range } => {
                self.overlay_write(copyset, index, chunk, range, &placed);
                self.entry_left(body);
            }
            Body::Zero { chunk, range } => self.overlay_zero(copyset, index, chunk, range, placed.lsn),
            Body::DropVolume { volume } => self.drop_volume(copyset, volume),
            Body::Fence(fence) => self.copyset(copyset).fences.raise(fence),
            Body::Noop | Body::Members(_) => {}
        }
    }

    fn drop_volume(&mut self, copyset: CopysetId, volume: VolumeId) {
        let (first, last) = (ChunkId { volume, index: 0 }, ChunkId { volume, index: u32::MAX });
        let chunks: Vec<ChunkId> = self.copyset(copyset).chunks.range(first..=last).copied().collect();
        chunks.into_iter().for_each(|chunk| self.drop_chunk(chunk));
        self.copyset(copyset).fences.forget(volume);
    }

    fn keep_ram(
        &mut self,
        copyset: CopysetId,
        index: LogIndex,
        chunk: ChunkId,
        range: BlockRange,
        placed: &Placed<'_, P>,
    ) {
        if placed.payload.is_some() {
            self.ram_blocks += usize::from(range.count);
            self.ram.push_back(RamItem { copyset, index, lsn: placed.lsn, chunk, range });
        }
    }

    /// The chunk's state, made if there is none.
    pub(crate) fn chunk(&mut self, copyset: CopysetId, chunk: ChunkId) -> &mut Chunk<P> {
        self.chunks.entry(chunk).or_insert_with(|| {
            if let Some(state) = self.copysets.get_mut(&copyset) {
                state.chunks.insert(chunk);
            }
            Chunk { copyset, slot: None, overlay: Overlay::default(), refs: 0, flushes: 0 }
        })
    }

    /// The first block of an overlay is about to come.
    fn begin_overlay(&mut self, chunk: ChunkId) {
        self.dirty.insert(chunk);
        let state = self.chunks.get_mut(&chunk).expect("made by the caller");
        if !state.overlay.has_memory() {
            state.overlay = self.spares.overlays.pop().unwrap_or_default();
        }
    }

    fn overlay_write(
        &mut self,
        copyset: CopysetId,
        index: LogIndex,
        chunk: ChunkId,
        range: BlockRange,
        placed: &Placed<'_, P>,
    ) {
        if self.chunk(copyset, chunk).overlay.is_empty() {
            self.begin_overlay(chunk);
        }
        let state = self.chunk(copyset, chunk);
        let before = state.overlay.counted();
        state.overlay.put_range(range, |nth| OverlayBlock {
            lsn: placed.lsn,
            index,
            at: placed.at + nth as u32,
            crc: crc_at_rest(placed.crcs[nth]),
            ram: placed.payload.clone().map(|payload| (payload, nth)),
        });
        let after = state.overlay.counted();
        self.overlaid.change(before, after);
    }

    /// A chunk that is discarded whole, at once or bit by bit, gives up its slot here. A replay that
    /// finds the slot given up does the same entries again, in their order; and the slot has no other
    /// owner before a checkpoint that does not name it is durable, and the entry with it.
    fn overlay_zero(
        &mut self,
        copyset: CopysetId,
        index: LogIndex,
        chunk: ChunkId,
        range: BlockRange,
        lsn: u64,
    ) {
        let Some(state) = self.chunks.get_mut(&chunk) else { return };
        debug_assert_eq!(state.copyset, copyset);
        if range == BlockRange::CHUNK {
            return self.drop_chunk(chunk);
        }
        let before = state.overlay.counted();
        match state.slot {
            // Nothing lies beneath that had to be covered.
            None => state.overlay.remove_range(range),
            Some(slot) => {
                let over = OverlayBlock { lsn, index, at: 0, crc: 0, ram: None };
                state.overlay.cover(range, &over, self.tables.get(slot));
            }
        }
        let nothing_left = state.overlay.len() == CHUNK_BLOCKS && state.overlay.is_zero();
        self.overlaid.change(before, state.overlay.counted());
        if nothing_left {
            return self.drop_chunk(chunk);
        }
        if !state.overlay.is_empty() {
            self.dirty.insert(chunk);
        }
        self.tidy_chunk(chunk);
    }

    /// Forgets a chunk's content and frees its slot.
    pub(crate) fn drop_chunk(&mut self, chunk: ChunkId) {
        let Some(state) = self.chunks.get_mut(&chunk) else { return };
        self.overlaid.change(state.overlay.counted(), Counted::default());
        state.overlay.clear();
        state.flushes += 1;
        if let Some(slot) = state.slot.take() {
            self.tables.forget(slot);
            self.pool.retire(slot);
        }
        self.tidy_chunk(chunk);
    }

    /// Restores the invariants of `dirty` and `chunks`.
    pub(crate) fn tidy_chunk(&mut self, chunk: ChunkId) {
        let Some(state) = self.chunks.get_mut(&chunk) else { return };
        if !state.overlay.is_empty() {
            return;
        }
        // Overlays are emptied by the flusher's jobs, as a rule.
        self.spares.keep_overlay(std::mem::take(&mut state.overlay), self.layout.flush_in_flight_max);
        self.dirty.remove(&chunk);
        if state.refs == 0 && state.slot.is_none() {
            if let Some(owner) = self.copysets.get_mut(&state.copyset) {
                owner.chunks.remove(&chunk);
            }
            self.chunks.remove(&chunk);
        }
    }
}
