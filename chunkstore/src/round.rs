//! Rounds: flush, copy forward, sync, checkpoint, recycle.
//!
//! A checkpoint is written when every block that its replay would not bring back is in its slot
//! and synced, and every record that it takes for granted is durable. No flush job runs between
//! the snapshot and its durability, so the snapshot's table pages are the ones on disk.
//!
//! Between rounds the flusher works ahead: what has been in memory for longest goes to its slot before
//! memory runs out, since from then on it would have to be read back from the log, a block at a time.
//! That ends without a checkpoint, so after a crash it is as a round that was not finished.

use crate::api::*;
use crate::checkpoint::{self, Checkpoint, CopysetImage, SlotImage};
use crate::read::Pending;
use crate::store::{AHEAD_EIGHTHS, Copyset, EntryMeta, KEPT_EIGHTHS, Store};
use protocol::raft::{Body, Members};
use protocol::types::{BLOCK_BYTES, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, Span, Term, Time};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Bytes of one checkpoint write at most.
const WRITE_BYTES: usize = 1 << 20;
/// How long after a round that could not begin it is tried again.
const RETRY: Span = Span::ms(100);
/// Entries copied forward together at most.
const COPIES_MAX: usize = 32;

/// An entry to be copied forward, as it was when it was loaded: whose, which, its LSN, its payload.
pub(crate) type Loaded<P> = (CopysetId, LogIndex, u64, Option<P>);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    Flush,
    Sync,
    Write,
}

/// Where replay begins for a copyset.
#[derive(Clone, Copy, Default)]
pub(crate) struct Base {
    pub floor: LogIndex,
    pub term: Term,
    pub members: Members,
    /// Whether a catch-up was under way there.
    pub installing: bool,
}

/// The state of the round in progress, and what lasts from round to round.
pub(crate) struct Round<P> {
    phase: Phase,
    /// Only flushes, ahead of need.
    ahead: bool,
    /// Not ahead again before this.
    ahead_after: Time,
    /// Replay begins here afterwards.
    target: u64,
    /// Blocks of lower LSN are flushed.
    below: u64,
    covers: u64,
    /// Highest index to be flushed whatever its LSN.
    flush_to: BTreeMap<CopysetId, LogIndex>,
    floors: BTreeMap<CopysetId, (LogIndex, Term)>,
    /// Floors for the checkpoint: as of `covers`, since a later `InstallBegin` or `InstallEnd` is
    /// replayed, and replay must know what was under way when it comes there.
    bases: BTreeMap<CopysetId, Base>,
    /// Of a round that flushes everything: what is applied when it begins, and so in the slots at
    /// its end. A replay need not bring it back.
    flushed: BTreeMap<CopysetId, LogIndex>,
    /// Those of the last durable checkpoint.
    pub last_bases: BTreeMap<CopysetId, Base>,
    copies: VecDeque<(CopysetId, LogIndex)>,
    /// Chunks that are being put in order; empty otherwise.
    order: Vec<(u64, ChunkId)>,
    copying: usize,
    /// Those of the present group that are at hand.
    group: Vec<Loaded<P>>,
    /// Log blocks that the copies still to be made take, at most: nothing else may have their place.
    pub copy_blocks: usize,
    copy_bad: bool,
    /// Nothing more can be flushed while this is the durable LSN.
    awaits: Option<u64>,
    outstanding: usize,
    image: Vec<u8>,
    needs_lsn: u64,
    retired: Vec<u32>,
    /// Files written since their last sync.
    dirty_files: BTreeSet<FileId>,
    /// Of the last durable checkpoint.
    pub seq: u64,
    pub last_covers: u64,
    retry_at: Option<Time>,
    /// The log is damaged below this: replay must begin here or later, soon.
    pub past_damage: Option<u64>,
    stop_done: bool,
    /// Segments or slots ready at the last checkpoint.
    last_ready: (u32, u32),
}

impl<P> Default for Round<P> {
    fn default() -> Self {
        Self {
            phase: Phase::Idle,
            ahead: false,
            ahead_after: Time(0),
            target: 0,
            below: 0,
            covers: 0,
            flush_to: BTreeMap::new(),
            floors: BTreeMap::new(),
            bases: BTreeMap::new(),
            flushed: BTreeMap::new(),
            last_bases: BTreeMap::new(),
            copies: VecDeque::new(),
            order: Vec::new(),
            copying: 0,
            group: Vec::new(),
            copy_blocks: 0,
            copy_bad: false,
            awaits: None,
            outstanding: 0,
            image: Vec::new(),
            needs_lsn: 0,
            retired: Vec::new(),
            dirty_files: BTreeSet::new(),
            seq: 0,
            last_covers: 0,
            retry_at: None,
            past_damage: None,
            stop_done: false,
            last_ready: (0, 0),
        }
    }
}

impl<P> Round<P> {
    pub(crate) fn wants(&self, copyset: CopysetId, lsn: u64, index: LogIndex) -> bool {
        lsn < self.below
            || (lsn < self.covers && self.flush_to.get(&copyset).is_some_and(|to| index <= *to))
            || (index.0 > 0 && self.floors.get(&copyset).is_some_and(|(floor, _)| index <= *floor))
    }
    /// Goes on from a checkpoint.
    pub(crate) fn resume(&mut self, seq: u64, covers: u64, ready: (u32, u32)) {
        (self.seq, self.last_covers, self.last_ready) = (seq, covers, ready);
    }
    /// What the round has in mind for a replica is not meant for another one of the same id.
    pub(crate) fn forget(&mut self, copyset: CopysetId) {
        self.floors.remove(&copyset);
        self.flush_to.remove(&copyset);
    }
    pub(crate) fn touch(&mut self, file: FileId) {
        self.dirty_files.insert(file);
    }
}

impl<P: Payload> Store<P> {
    /// Moves the round on as far as it goes.
    pub(crate) fn drive_round(&mut self) {
        if self.round.phase == Phase::Idle {
            self.begin_round();
        }
        if self.round.phase == Phase::Idle {
            self.begin_ahead();
        }
        if self.round.phase == Phase::Flush {
            self.start_jobs();
            if self.round.ahead {
                self.end_ahead();
            } else {
                self.copy_forward();
                self.end_flush();
            }
        }
        if self.round.phase == Phase::Sync
            && self.round.outstanding == 0
            && self.log.durable >= self.round.needs_lsn
        {
            self.write_checkpoint();
        }
    }

    pub(crate) fn round_due(&self) -> Option<Time> {
        if self.round.phase != Phase::Idle || !self.round_can_begin() {
            return None;
        }
        let idle = Time(self.last_stage.0.saturating_add(self.layout.flush_idle_ns));
        let at = match () {
            () if self.is_urgent() => Some(self.round.retry_at.unwrap_or(self.now)),
            () if self.overlaid.blocks > 0 || !self.pool.retired.is_empty() => Some(idle),
            () if self.preformat.idle() && (self.log.ready, self.pool.ready) != self.round.last_ready => {
                Some(idle)
            }
            () => None,
        };
        at.map(|at| at.max(self.round.retry_at.unwrap_or(at)))
    }

    pub(crate) fn round_timeout(&self) -> Option<Time> {
        match self.round.phase {
            Phase::Idle => self.round_due(),
            Phase::Flush => self.round.retry_at,
            Phase::Sync | Phase::Write => None,
        }
    }

    /// Whether somebody may have to wait for the end of a round.
    fn is_urgent(&self) -> bool {
        let slots_wait = !self.pool.retired.is_empty() && !self.can_allocate(1);
        self.pressed() || self.round.past_damage.is_some() || slots_wait || self.is_crowded()
    }

    fn pressed(&self) -> bool {
        let uses = self.log.uses.len();
        uses > 1 && (uses * 2 > self.log.ready as usize || self.is_full())
    }

    /// Whether an entry, or a piece of a catch-up, may have to wait for segments to be recycled.
    fn is_full(&self) -> bool {
        !self.can_stage(ENTRY_BLOCKS_MAX)
    }

    /// Begins a round if there is a reason: the end, a log that fills, damage behind, or idleness.
    fn begin_round(&mut self) {
        let due = self.round_due().is_some_and(|at| self.now >= at);
        let stop = self.stopping && !self.round.stop_done;
        if !self.round_can_begin() || !(due || stop) {
            return;
        }
        let past_damage = self.round.past_damage.and_then(|lsn| {
            // None yet if there was no free segment to go on in.
            self.log.uses.iter().position(|u| u.first_lsn >= lsn)
        });
        let wanted = match past_damage {
            Some(keep) => keep,
            None if self.pressed() => (self.log.uses.len() / 2).max(1),
            None => 0,
        };
        let keep = match wanted {
            0 => Some(0),
            most => std::iter::successors(Some(most), |k| (*k > 1).then_some(*k / 2))
                .find(|keep| self.affordable(*keep)),
        };
        let Some(keep) = keep else {
            self.round.retry_at = Some(self.now + RETRY);
            if !stop && self.pool.retired.is_empty() {
                return;
            }
            return self.open_round(self.log.uses[0].first_lsn, stop);
        };
        self.open_round(self.log.uses[keep].first_lsn, stop || keep == 0);
    }

    /// Begins to flush what would leave memory next, when the overlay fills a part of it.
    fn begin_ahead(&mut self) {
        let full = self.overlaid.data > (self.layout.ram_blocks_max / 8 * AHEAD_EIGHTHS) as u64;
        if !self.layout.flush_ahead || !full || self.now < self.round.ahead_after || !self.round_can_begin() {
            return;
        }
        let Some(oldest_kept) = self.ram.get(self.ram.len() / 8 * (8 - KEPT_EIGHTHS)) else { return };
        let below = oldest_kept.lsn.min(self.log.durable + 1);
        self.stage_hints(true);
        let round = &mut self.round;
        (round.phase, round.ahead, round.below) = (Phase::Flush, true, below);
        round.floors.clear();
        round.flush_to.clear();
        self.queue_wanted();
        if self.flush.queue.is_empty() {
            self.round.ahead_after = self.now + RETRY;
        }
    }

    fn end_ahead(&mut self) {
        if self.flush.busy() || !self.flush.queue.is_empty() {
            return;
        }
        if !self.flush.slotless.is_empty() || !self.flush.spoilt.is_empty() {
            self.round.ahead_after = self.now + RETRY;
        }
        (self.round.phase, self.round.ahead) = (Phase::Idle, false);
    }

    /// Queues all chunks that have something for this round, the oldest first.
    fn queue_wanted(&mut self) {
        let mut chunks = std::mem::take(&mut self.round.order);
        for chunk in &self.dirty {
            let state = &self.chunks[chunk];
            let wanted = state.overlay.iter().filter(|(_, b)| {
                self.round.wants(state.copyset, b.lsn, b.index)
                    && (!self.round.ahead || self.may_flush(state.copyset, b))
            });
            chunks.extend(wanted.map(|(_, b)| b.lsn).min().map(|lsn| (lsn, *chunk)));
        }
        chunks.sort_unstable();
        self.flush.queue.clear();
        self.flush.queue.extend(chunks.drain(..).map(|(_, chunk)| chunk));
        self.round.order = chunks;
        self.flush.slotless.clear();
        self.flush.spoilt.clear();
    }

    /// Nothing is flushed before the batch of the start is durable: slots are given out under its LSN.
    fn round_can_begin(&self) -> bool {
        !self.log.uses.is_empty() && self.log.durable > self.recovered
    }

    /// Whether the oldest `keep` segments can be recycled at a price that is worth it. What waits to
    /// be applied must be copied forward, and copying much would only churn: wait until more is
    /// applied, unless the log is full. Then even a segment that holds nothing else is copied whole:
    /// nothing is won by it, but those behind it come to be the oldest, and what waits is never more
    /// than a part of the log (`may_wait`). Room is always left for the small records without which
    /// nothing more would be committed (terms, votes, empty entries).
    fn affordable(&self, keep: usize) -> bool {
        let target = self.log.uses[keep].first_lsn;
        if target > self.log.durable + 1 {
            return false;
        }
        let waiting =
            self.copysets.values().flat_map(|c| c.entries.iter().filter(|e| e.entry.index > c.applied));
        let blocks = self.copy_cost(waiting.filter(|e| e.lsn < target));
        let segment = self.log.segment_blocks as usize;
        let worth =
            if self.is_full() { usize::MAX } else { (segment / 4).max(self.log.free.len() * segment / 4) };
        blocks == 0 || (blocks <= worth && self.has_space(blocks))
    }

    /// Whether so many blocks have a place in the log, the reserve included, and room for small records
    /// is left.
    pub(crate) fn has_space(&self, blocks: usize) -> bool {
        blocks + self.log.segment_blocks as usize / 4 <= self.log.space() as usize
    }

    fn open_round(&mut self, target: u64, flush_all: bool) {
        debug_assert_eq!(self.waiting_blocks, self.count_waiting(), "what waits is counted right");
        self.stage_hints(true);
        self.log.close();
        let round = &mut self.round;
        round.phase = Phase::Flush;
        round.retry_at = None;
        round.target = target;
        round.covers = self.log.next_lsn();
        round.below = if flush_all { round.covers } else { target };
        round.copy_bad = false;
        round.awaits = None;
        round.floors.clear();
        round.flush_to.clear();
        round.copies.clear();
        for (id, copyset) in &self.copysets {
            let old = copyset.entries.iter().filter(|e| e.lsn < target);
            let floor = old.clone().rfind(|e| e.entry.index <= copyset.applied);
            if let Some(floor) = floor {
                round.floors.insert(*id, (floor.entry.index, floor.entry.term));
            }
            let waiting = old.filter(|e| e.entry.index > copyset.applied);
            round.copies.extend(waiting.map(|e| (*id, e.entry.index)));
            // What is installed, or was before an install, comes back by no entry.
            let to = if copyset.installing { LogIndex(u64::MAX) } else { copyset.floor };
            round.flush_to.insert(*id, to);
        }
        let copied = self.round.copies.iter().filter_map(|(id, index)| self.copysets.get(id)?.get(*index));
        self.round.copy_blocks = self.copy_cost(copied);
        let whole = self.copysets.iter().filter(|(_, c)| flush_all && !c.installing);
        self.round.flushed = whole.map(|(id, c)| (*id, c.applied)).collect();
        self.round.bases = self.copysets.keys().map(|id| (*id, self.base(*id))).collect();
        self.queue_wanted();
    }

    /// Copies what waits, group by group: a group's payload fits in one batch, so that small entries take no
    /// more of the log than they did before. One by one each would get a header block of its own, and a
    /// segment full of them could take two.
    fn copy_forward(&mut self) {
        while self.round.copying == 0 && self.round.group.is_empty() && !self.round.copies.is_empty() {
            let mut blocks = 0;
            while self.round.group.len() + self.round.copying < COPIES_MAX {
                let Some((copyset, index)) = self.round.copies.front().copied() else { break };
                let meta = self.copysets.get(&copyset).and_then(|c| c.get(index));
                let Some(meta) = meta.filter(|m| m.lsn < self.round.target) else {
                    self.round.copies.pop_front();
                    continue;
                };
                blocks += meta.crcs.len();
                if blocks > self.layout.batch_blocks_max as usize {
                    break;
                }
                self.round.copies.pop_front();
                let (lsn, ram, empty) = (meta.lsn, meta.ram.clone(), meta.crcs.is_empty());
                if ram.is_some() || empty {
                    self.round.group.push((copyset, index, lsn, ram));
                } else {
                    self.round.copying += 1;
                    self.load_copy(copyset, index, lsn);
                }
            }
            self.stage_group();
        }
    }

    /// An entry to be copied forward was loaded; `None`: it is gone or bad.
    pub(crate) fn copy_loaded(&mut self, loaded: Option<Loaded<P>>) {
        self.round.copying -= 1;
        match loaded {
            Some(loaded) => self.round.group.push(loaded),
            None => self.round.copy_bad = true,
        }
        self.stage_group();
    }

    /// Stages the group once all of it is at hand.
    fn stage_group(&mut self) {
        if self.round.copying > 0 {
            return;
        }
        let (mut payload, records) = (0, self.round.group.len());
        for (copyset, index, lsn, ram) in std::mem::take(&mut self.round.group) {
            let Some(meta) = self.copysets.get(&copyset).and_then(|c| c.get(index)).filter(|m| m.lsn == lsn)
            else {
                continue;
            };
            let (entry, crcs) = (meta.entry, meta.crcs.clone());
            payload += crcs.len();
            self.stats.copied_forward += 1;
            let staged = self.last_stage;
            self.stage(Record::Entry { copyset, entry }, ram, &crcs);
            self.last_stage = staged;
        }
        let blocks = payload + self.header_blocks() * usize::from(records > 0);
        self.round.copy_blocks = self.round.copy_blocks.saturating_sub(blocks);
    }

    fn header_blocks(&self) -> usize {
        // A change of members takes more than one slot.
        crate::batch::header_blocks(2 * COPIES_MAX, self.layout.batch_blocks_max as usize) as usize
    }

    /// Log blocks that copies of these entries take at most: any two groups in a row hold more than a
    /// batch's worth of payload, or the first is full.
    fn copy_cost<'a>(&self, entries: impl Iterator<Item = &'a EntryMeta<P>>) -> usize
    where
        P: 'a,
    {
        let (mut count, mut payload) = (0, 0);
        for entry in entries {
            (count, payload) = (count + 1, payload + entry.crcs.len());
        }
        let groups = 2 * payload / self.layout.batch_blocks_max as usize + count / COPIES_MAX + 1;
        if count == 0 { 0 } else { payload + groups * self.header_blocks() }
    }

    /// Ends the flush phase when everything wanted is done, or when it cannot go on without a checkpoint.
    fn end_flush(&mut self) {
        let waits = self.flush.busy() || self.round.copying > 0 || !self.round.copies.is_empty();
        if self.round.copying == 0 && self.round.copies.is_empty() {
            self.round.copy_blocks = 0;
        }
        if waits || !self.flush.queue.is_empty() {
            self.round.retry_at = None;
            return;
        }
        let stuck = !self.flush.slotless.is_empty() || !self.flush.spoilt.is_empty() || self.round.copy_bad;
        // Blocks that were not durable when their chunk's turn came.
        let left = || self.wanted_chunks();
        if !stuck {
            if self.round.awaits == Some(self.log.durable) {
                return;
            }
            let (left, durable) = left();
            if !left.is_empty() {
                if durable {
                    self.flush.queue.extend(left);
                    self.start_jobs();
                } else {
                    // Nothing to be flushed until more is durable.
                    self.stage_hints(true);
                    self.round.awaits = Some(self.log.durable);
                }
                return;
            }
        } else if self.pool.retired.is_empty() && !self.stopping {
            return self.reconsider();
        } else {
            self.reduce();
        }
        self.snapshot();
    }

    /// A round that waits for a repair or for a slot: try again now and then.
    fn reconsider(&mut self) {
        match self.round.retry_at {
            Some(at) if self.now >= at => {
                self.round.retry_at = Some(self.now + RETRY);
                self.round.phase = Phase::Idle;
            }
            Some(_) => {}
            None => self.round.retry_at = Some(self.now + RETRY),
        }
    }

    /// Chunks that have something for this round, and whether any of it is durable (then only those).
    fn wanted_chunks(&self) -> (Vec<ChunkId>, bool) {
        let (mut durable, mut others) = (Vec::new(), Vec::new());
        for chunk in &self.dirty {
            let state = &self.chunks[chunk];
            let mut wanted = None;
            for (_, block) in state.overlay.iter() {
                if self.round.wants(state.copyset, block.lsn, block.index) {
                    wanted = Some(self.may_flush(state.copyset, block));
                    if wanted == Some(true) {
                        break;
                    }
                }
            }
            match wanted {
                Some(true) => durable.push(*chunk),
                Some(false) => others.push(*chunk),
                None => {}
            }
        }
        if durable.is_empty() { (others, false) } else { (durable, true) }
    }

    /// A checkpoint that promises no more than the last one did.
    fn reduce(&mut self) {
        self.round.target = self.log.uses[0].first_lsn;
        self.round.covers = self.round.last_covers;
        self.round.floors.clear();
        self.round.flushed.clear();
        self.round.bases = self.round.last_bases.clone();
    }

    fn snapshot(&mut self) {
        self.log.close();
        self.round.needs_lsn = self.log.staged();
        self.round.retired = std::mem::take(&mut self.pool.retired);
        self.round.image = self.checkpoint_image().encode(&self.layout);
        self.round.phase = Phase::Sync;
        self.round.last_ready = (self.log.ready, self.pool.ready);
        let files = std::mem::take(&mut self.round.dirty_files);
        self.round.outstanding = files.len();
        for file in files {
            let ticket = self.ticket(file, Pending::Sync);
            self.ops.push_back(Op::Sync { ticket, file });
        }
    }

    fn checkpoint_image(&self) -> Checkpoint {
        let round = &self.round;
        let start =
            self.log.uses.iter().rev().find(|u| u.first_lsn <= round.target).unwrap_or(&self.log.uses[0]);
        let slots = self.pool.slots.iter().enumerate().filter_map(|(number, slot)| {
            let slot = slot.as_ref()?;
            Some(SlotImage {
                slot: number as u32,
                copyset: slot.copyset,
                chunk: slot.chunk,
                generation: slot.generation,
                seq: slot.pages.seq,
            })
        });
        // As of now, not of `covers`: what is applied is committed, and a fence never falls.
        let fences = |(id, c): (&CopysetId, &Copyset<P>)| {
            let id = *id;
            c.fences.as_slice().iter().map(move |fence| (id, *fence)).collect::<Vec<_>>()
        };
        let fences = self.copysets.iter().flat_map(fences);
        Checkpoint {
            seq: round.seq + 1,
            disk_tag: self.log.disk_tag,
            durable_lsn: self.log.durable,
            covers_lsn: round.covers,
            replay_segment: start.segment,
            replay_epoch: start.epoch,
            replay_lsn: start.first_lsn,
            segments_ready: self.log.ready,
            slots_ready: self.pool.ready,
            may_lack_replicas: self.may_lack_replicas,
            copysets: self.copysets.keys().map(|id| self.copyset_image(*id)).collect(),
            slots: slots.collect(),
            fences: fences.collect(),
        }
    }

    /// A copyset's floor after this round, and the membership there.
    fn base(&self, id: CopysetId) -> Base {
        let state = &self.copysets[&id];
        let (members, installing) = (state.members, state.installing);
        let mut base = Base { floor: state.floor, term: state.floor_term, members, installing };
        if let Some((to, term)) = self.round.floors.get(&id) {
            (base.floor, base.term) = (*to, *term);
            for meta in state.entries.iter().take_while(|e| e.entry.index <= *to) {
                if let Body::Members(new) = meta.entry.body {
                    base.members = new;
                }
            }
        }
        base
    }

    fn copyset_image(&self, id: CopysetId) -> CopysetImage {
        let state = &self.copysets[&id];
        // One that was created since begins at 0, and what became of it is replayed.
        let fresh = Base { members: state.members, ..Base::default() };
        let base = if state.born >= self.round.covers {
            fresh
        } else {
            self.round.bases.get(&id).copied().unwrap_or(fresh)
        };
        let Base { floor, term: floor_term, members, installing } = base;
        let flushed = self.round.flushed.get(&id).filter(|_| state.born < self.round.covers && !installing);
        let ahead = flushed.map_or(0, |to| u32::try_from(to.0.saturating_sub(floor.0)).unwrap_or(0));
        CopysetImage {
            id,
            hard: state.hard,
            members,
            floor,
            floor_term,
            ahead,
            born: state.born,
            damaged: state.damaged,
            installing,
        }
    }

    fn write_checkpoint(&mut self) {
        self.round.phase = Phase::Write;
        let image = std::mem::take(&mut self.round.image);
        let file = checkpoint::side_of(self.round.seq + 1);
        for (nth, bytes) in image.chunks(WRITE_BYTES).enumerate() {
            debug_assert!(bytes.len().is_multiple_of(BLOCK_BYTES));
            let ticket = self.ticket(file, Pending::Checkpoint);
            let pieces = SmallVec::from_iter([Piece::Bytes(bytes.to_vec())]);
            let offset = (nth * WRITE_BYTES) as u64;
            self.ops.push_back(Op::Write { ticket, file, offset, pieces, dsync: true });
            self.round.outstanding += 1;
        }
    }

    pub(crate) fn synced(&mut self) {
        self.round.outstanding -= 1;
    }

    pub(crate) fn checkpoint_written(&mut self) {
        self.round.outstanding -= 1;
        if self.round.outstanding > 0 {
            return;
        }
        self.stats.checkpoints += 1;
        self.round.phase = Phase::Idle;
        self.round.seq += 1;
        self.round.last_covers = self.round.covers;
        self.round.last_bases = std::mem::take(&mut self.round.bases);
        for slot in std::mem::take(&mut self.pool.touched) {
            if let Some(slot) = self.pool.get_mut(slot) {
                slot.pages.durable = slot.pages.current;
            }
        }
        let retired = std::mem::take(&mut self.round.retired);
        self.pool.release(retired);
        for (copyset, (floor, term)) in std::mem::take(&mut self.round.floors) {
            self.raise_floor(copyset, floor, term);
        }
        self.stats.segments_recycled += self.log.recycle(self.round.target);
        self.drop_old_ram();
        if self.round.past_damage.is_some_and(|lsn| lsn <= self.log.uses[0].first_lsn) {
            self.round.past_damage = None;
        }
        if self.is_urgent() {
            self.round.retry_at = Some(self.now + RETRY);
        }
        if self.stopping && !self.round.stop_done {
            self.round.stop_done = true;
            self.events.push_back(Event::Stopped);
        }
    }

    fn raise_floor(&mut self, copyset: CopysetId, floor: LogIndex, term: Term) {
        if self.copysets.get(&copyset).is_some_and(|c| c.floor < floor && c.last() >= floor) {
            self.drop_entries(copyset, floor, true);
            self.events.push_back(Event::Compactable { copyset, floor, term });
        }
    }

    /// Handles of what the log does not hold any more.
    fn drop_old_ram(&mut self) {
        let first = self.log.uses[0].first_lsn;
        while self.ram.front().is_some_and(|item| item.lsn < first) {
            let item = self.ram.pop_front().expect("looked at");
            self.forget_ram(&item);
        }
    }
}
