//! Chunk catch-up: how a replica whose log no longer reaches the leader's becomes whole again.
//!
//! The replica asks the leader for its chunks as of an index S, compares checksum tables chunk by
//! chunk, and fetches only blocks that differ. The leader goes on meanwhile, so what is fetched
//! may be newer than S, up to an index E asked at the end; the log from S on, replayed over it,
//! makes every block right by E, and until then the replica does not count (docs/adr/0005).
//!
//! What is fetched goes through the shard's own log like everything else, so a crash at any point
//! leaves a disk that recovery understands. A catch-up that gets no answer begins anew; since
//! only differences are fetched, beginning anew is cheap.

use super::{Shard, Work};
use crate::mem::Mems;
use chunkstore::{Lsn, Payload, Record};
use copyset::{Replica, Role};
use protocol::peer::{Fetch, Fetched};
use protocol::raft::Members;
use protocol::types::{
    BLOCK_BYTES, BlockRange, CHUNK_BLOCKS, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, ShardAddr, Span,
    Term, Time, block_crc, crc_at_rest,
};
use std::collections::VecDeque;

/// Fetches of blocks under way at once, in one catch-up.
const FETCHES_MAX: usize = 8;
/// A catch-up that got no answer for this long begins anew.
const STALLED: Span = Span::ms(2_000);

/// One catch-up.
pub struct CatchUp {
    from: ShardAddr,
    base: Option<Base>,
    chunks: VecDeque<ChunkId>,
    current: Option<Chunk>,
    phase: Phase,
    progress: Time,
    blocks: u64,
}

/// What the log will go on from.
#[derive(Clone, Copy)]
struct Base {
    index: LogIndex,
    term: Term,
    members: Members,
}

/// The chunk being compared.
struct Chunk {
    id: ChunkId,
    theirs: Option<Vec<u32>>,
    ours: Option<Vec<u32>>,
    todo: VecDeque<BlockRange>,
    asked: Vec<BlockRange>,
}

enum Phase {
    Beginning,
    Fetching,
    Ending,
    /// Everything is staged; complete once this batch is durable.
    Writing {
        lsn: Lsn,
        whole_at: LogIndex,
    },
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Beginning => "beginning",
            Self::Fetching => "fetching",
            Self::Ending => "ending",
            Self::Writing { .. } => "writing",
        }
    }
}

impl Shard {
    /// The replica cannot go on by the leader's log.
    pub(super) fn start_catch_up(&mut self, id: CopysetId, from: ShardAddr) {
        let now = self.now;
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        // One whose end is staged waits for the disk alone: for the store the replica is whole again, and nothing may
        // be written over it without a new begin.
        let under_way = |c: &CatchUp| {
            matches!(c.phase, Phase::Writing { .. }) || c.from == from && now - c.progress < STALLED
        };
        if hosted.catch_up.as_ref().is_some_and(under_way) {
            return;
        }
        tracing::info!(copyset = id.0, ?from, "chunk catch-up begins");
        // The replica does not count until it has applied what its chunks may be ahead by; its store is whole before.
        if !self.store.is_installing(id) {
            self.store.stage(Record::InstallBegin { copyset: id }, None, &[]);
            self.store.seal();
        }
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        self.restless.insert(id);
        hosted.replica.install_begin();
        hosted.catch_up = Some(CatchUp {
            from,
            base: None,
            chunks: VecDeque::new(),
            current: None,
            phase: Phase::Beginning,
            progress: now,
            blocks: 0,
        });
        self.touch(id);
        self.ask(from, id, Fetch::Begin);
    }

    /// Looks after a catch-up that waits for room in the log or for an answer that was lost.
    pub(super) fn nudge_catch_up(&mut self, id: CopysetId) {
        let now = self.now;
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let Some(catch_up) = &mut hosted.catch_up else { return };
        if hosted.replica.role() == Role::Leader {
            hosted.catch_up = None;
            return;
        }
        if matches!(catch_up.phase, Phase::Writing { .. }) || now - catch_up.progress < STALLED {
            return self.catch_up_step(id);
        }
        let from = hosted.replica.leader().unwrap_or(catch_up.from);
        let (phase, chunks) = (catch_up.phase.name(), catch_up.chunks.len());
        let has_room = self.store.can_stage(ENTRY_BLOCKS_MAX);
        tracing::info!(copyset = id.0, phase, chunks, has_room, "chunk catch-up got no answer; begins anew");
        // Begins anew (see `under_way`).
        self.start_catch_up(id, from);
    }

    /// An answer to one of the replica's questions, or to a repair's.
    pub(super) fn fetched(&mut self, from: ShardAddr, id: CopysetId, fetched: Fetched, payload: Mems) {
        if let Fetched::Blocks { chunk, range, present, crcs } = &fetched {
            self.repair_answered(from, id, *chunk, *range, *present, crcs, &payload);
        }
        if matches!(fetched, Fetched::Refused) {
            self.repair_refused(from, id);
        }
        let now = self.now;
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let replica = &hosted.replica;
        let Some(catch_up) = hosted.catch_up.as_mut().filter(|c| c.from == from) else { return };
        match fetched {
            Fetched::Begin { index, term, members, fences, chunks }
                if matches!(catch_up.phase, Phase::Beginning) =>
            {
                if !fits(replica, (index, term)) {
                    return; // A new leader that is still behind this replica: asked again later.
                }
                catch_up.progress = now;
                catch_up.base = Some(Base { index, term, members });
                catch_up.phase = Phase::Fetching;
                catch_up.chunks = chunks.into();
                // As of `index`, and so committed: they may rise before the chunks are there.
                for fence in fences {
                    self.store.stage(Record::Fence { copyset: id, fence }, None, &[]);
                }
                self.drop_other_chunks(id);
            }
            Fetched::Table { chunk, crcs } => {
                if let Some(current) = catch_up.current.as_mut().filter(|c| c.id == chunk) {
                    catch_up.progress = now;
                    current.theirs = Some(crcs);
                    self.compare(id);
                }
            }
            Fetched::Blocks { chunk, range, present, crcs } => {
                if !blocks_match(&crcs, &payload) {
                    // Damaged on its way: it stays asked for, and the stall begins anew.
                    self.counts.wire_corrupt += 1;
                    return;
                }
                self.catch_up_blocks(id, chunk, range, present, payload);
            }
            Fetched::End { index } => self.finish_catch_up(id, index),
            // The leader changed, or cannot serve now: `nudge_catch_up` begins anew.
            _ => return,
        }
        self.catch_up_step(id);
    }

    /// Chunks that the leader does not have are not part of the state.
    fn drop_other_chunks(&mut self, id: CopysetId) {
        let ours = self.store.chunks_of(id);
        let Some(catch_up) = self.hosted.get(&id).and_then(|h| h.catch_up.as_ref()) else { return };
        let other: Vec<ChunkId> = ours.into_iter().filter(|c| !catch_up.chunks.contains(c)).collect();
        for chunk in other {
            self.store.stage(Record::InstallDrop { copyset: id, chunk }, None, &[]);
        }
        self.store.seal();
    }

    /// Asks for whatever is next, as far as windows and the log's room allow.
    fn catch_up_step(&mut self, id: CopysetId) {
        // As many fetches as there is room in the log for: all that was asked for may come at once.
        let fits = |n: &usize| self.store.can_stage(n * ENTRY_BLOCKS_MAX);
        let room = (1..=FETCHES_MAX).rev().find(fits).unwrap_or(0);
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let Some(catch_up) = &mut hosted.catch_up else { return };
        if !matches!(catch_up.phase, Phase::Fetching) {
            return;
        }
        let from = catch_up.from;
        if let Some(chunk) = &mut catch_up.current {
            let chunk_id = chunk.id;
            let mut asks = Vec::new();
            while chunk.asked.len() < room {
                let Some(range) = chunk.todo.front().copied() else { break };
                if !self.pace.take(u64::from(range.count) * BLOCK_BYTES as u64, self.now) {
                    // `go_on_catching_up` tries again. With nothing asked for, no answer is late meanwhile.
                    if chunk.asked.is_empty() {
                        catch_up.progress = self.now;
                    }
                    break;
                }
                chunk.todo.pop_front();
                chunk.asked.push(range);
                asks.push(range);
            }
            let compared = chunk.ours.is_some() && chunk.theirs.is_some();
            let done = compared && chunk.todo.is_empty() && chunk.asked.is_empty();
            for range in asks {
                self.ask(from, id, Fetch::Blocks { chunk: chunk_id, range });
            }
            if !done {
                return;
            }
        }
        self.next_chunk(id);
    }

    /// Those that waited for the pace may have some of it.
    pub(super) fn go_on_catching_up(&mut self) {
        let fills = |id: &CopysetId| self.hosted.get(id).is_some_and(|hosted| hosted.catch_up.is_some());
        let mut waiting: Vec<CopysetId> = self.restless.iter().copied().filter(fills).collect();
        // Each time another one comes first.
        let turn = self.pace.turn(waiting.len());
        waiting.rotate_left(turn);
        waiting.into_iter().for_each(|id| self.catch_up_step(id));
    }

    fn next_chunk(&mut self, id: CopysetId) {
        let Some(catch_up) = self.hosted.get_mut(&id).and_then(|h| h.catch_up.as_mut()) else { return };
        let from = catch_up.from;
        match catch_up.chunks.pop_front() {
            Some(chunk) => {
                let (todo, asked) = (VecDeque::new(), Vec::new());
                catch_up.current = Some(Chunk { id: chunk, theirs: None, ours: None, todo, asked });
                let key = self.work.insert(Work::CatchUpTable { copyset: id, chunk });
                self.store.table(key as u64, chunk);
                self.ask(from, id, Fetch::Table { chunk });
            }
            None => {
                catch_up.current = None;
                catch_up.phase = Phase::Ending;
                self.ask(from, id, Fetch::End);
            }
        }
    }

    pub(super) fn catch_up_local_table(&mut self, id: CopysetId, chunk: ChunkId, crcs: Vec<u32>) {
        let current = self
            .hosted
            .get_mut(&id)
            .and_then(|h| h.catch_up.as_mut())
            .and_then(|c| c.current.as_mut())
            .filter(|c| c.id == chunk);
        if let Some(current) = current {
            current.ours = Some(crcs);
            self.compare(id);
            self.catch_up_step(id);
        }
    }

    /// Both tables are there: zeroes are staged at once, other differences are to be fetched.
    fn compare(&mut self, id: CopysetId) {
        let current = self
            .hosted
            .get_mut(&id)
            .and_then(|h| h.catch_up.as_mut())
            .and_then(|c| c.current.as_mut())
            .filter(|c| c.todo.is_empty() && c.asked.is_empty());
        let Some(current) = current else { return };
        let (Some(ours), Some(theirs)) = (&current.ours, &current.theirs) else { return };
        let chunk = current.id;
        let (zero, fetch) = differences(ours, theirs);
        current.todo = fetch.into();
        for range in zero {
            self.store.stage(Record::InstallZero { copyset: id, chunk, range }, None, &[]);
        }
        self.store.seal();
    }

    /// Fetched blocks, verified, go into the log and from there into the chunk.
    fn catch_up_blocks(
        &mut self,
        id: CopysetId,
        chunk: ChunkId,
        range: BlockRange,
        present: u32,
        payload: Mems,
    ) {
        let now = self.now;
        let Some(catch_up) = self.hosted.get_mut(&id).and_then(|h| h.catch_up.as_mut()) else { return };
        let Some(current) = catch_up.current.as_mut().filter(|c| c.id == chunk) else { return };
        let Some(at) = current.asked.iter().position(|r| *r == range) else { return };
        current.asked.swap_remove(at);
        catch_up.progress = now;
        if !self.store.can_stage(range.count.into()) {
            // Others took the room that there was when it was asked for: asked again later.
            current.todo.push_front(range);
            return;
        }
        catch_up.blocks += u64::from(range.count);
        self.counts.catch_up_blocks += u64::from(range.count);
        let mut blocks = payload.iter().flat_map(|run| (0..run.blocks()).map(move |at| run.window(at, 1)));
        for (from, count, holds_data) in runs(present, range) {
            let range = BlockRange::new(from, count).expect("a part of a valid range");
            if !holds_data {
                self.store.stage(Record::InstallZero { copyset: id, chunk, range }, None, &[]);
                continue;
            }
            for block in range.blocks() {
                let Some(data) = blocks.next() else { return };
                let crc = block_crc(data.block(0));
                let range = BlockRange::new(block, 1).expect("one block of a valid range");
                let record = Record::InstallBlocks { copyset: id, chunk, range };
                self.store.stage(record, Some(data), &[crc]);
            }
        }
        self.store.seal();
    }

    fn finish_catch_up(&mut self, id: CopysetId, whole_at: LogIndex) {
        let Some(catch_up) = self.hosted.get_mut(&id).and_then(|h| h.catch_up.as_mut()) else { return };
        let (Phase::Ending, Some(base)) = (&catch_up.phase, catch_up.base) else { return };
        let fits = self.hosted.get(&id).is_some_and(|h| fits(&h.replica, (base.index, base.term)));
        let Some(catch_up) = self.hosted.get_mut(&id).and_then(|h| h.catch_up.as_mut()) else { return };
        if !fits {
            // The log has moved past what was fetched: `nudge_catch_up` begins anew.
            catch_up.phase = Phase::Beginning;
            catch_up.progress = Time(0);
            return;
        }
        let record = Record::InstallEnd {
            copyset: id,
            floor: base.index,
            floor_term: base.term,
            members: base.members,
        };
        self.store.stage(record, None, &[]);
        catch_up.phase = Phase::Writing { lsn: self.store.seal(), whole_at };
    }

    /// A batch became durable: catch-ups that waited for it are complete.
    pub(super) fn catch_ups_durable(&mut self, durable: Lsn) {
        let now = self.now;
        let mut finished = Vec::new();
        for id in &self.restless {
            let Some(hosted) = self.hosted.get_mut(id) else { continue };
            let Some(CatchUp { phase: Phase::Writing { lsn, whole_at }, base: Some(base), blocks, .. }) =
                &hosted.catch_up
            else {
                continue;
            };
            if *lsn <= durable {
                tracing::info!(copyset = id.0, blocks, index = base.index.0, "chunk catch-up complete");
                hosted.replica.install_finish((base.index, base.term), base.members, *whole_at, now);
                hosted.catch_up = None;
                finished.push(*id);
            }
        }
        if !finished.is_empty() {
            // It may have brought chunks of volumes that were freed here before.
            self.freed.clear();
        }
        for id in finished {
            self.counts.catch_ups += 1;
            self.touch(id);
        }
    }
}

/// Whether a catch-up from this entry on takes nothing back that the replica has applied.
fn fits(replica: &Replica, base: (LogIndex, Term)) -> bool {
    replica.install_fits(base) && base.0 >= replica.applied_index()
}

/// Where two tables differ: blocks to be zeroed, and blocks to be fetched, in runs of at most
/// [`ENTRY_BLOCKS_MAX`].
fn differences(ours: &[u32], theirs: &[u32]) -> (Vec<BlockRange>, Vec<BlockRange>) {
    let (mut zero, mut fetch) = (Vec::new(), Vec::new());
    let kind = |at: usize| match (ours.get(at), theirs.get(at)) {
        (Some(a), Some(b)) if a == b => 0,
        (_, Some(0)) => 1,
        _ => 2,
    };
    let mut at = 0;
    while at < CHUNK_BLOCKS {
        let this = kind(at);
        let limit = CHUNK_BLOCKS.min(at + ENTRY_BLOCKS_MAX);
        let end = (at + 1..limit).find(|n| kind(*n) != this).unwrap_or(limit);
        let range = BlockRange::new(at, end - at).expect("within a chunk");
        match this {
            1 => zero.push(range),
            2 => fetch.push(range),
            _ => {}
        }
        at = end;
    }
    (zero, fetch)
}

/// Runs of equal presence: (first block of the chunk, blocks, holds data).
fn runs(present: u32, range: BlockRange) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    for (bit, block) in range.blocks().enumerate() {
        let holds = present & (1 << bit) != 0;
        match runs.last_mut() {
            Some((_, count, last)) if *last == holds => *count += 1,
            _ => runs.push((block, 1, holds)),
        }
    }
    runs
}

/// Whether fetched blocks are what the reply says they are.
pub(super) fn blocks_match(crcs: &[u32], payload: &Mems) -> bool {
    let blocks = payload.iter().flat_map(|run| (0..run.blocks()).map(move |at| run.block(at)));
    let mut told = crcs.iter();
    blocks.map(|b| crc_at_rest(block_crc(b))).all(|crc| told.next() == Some(&crc)) && told.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_that_differ_are_fetched_and_zeroes_are_not_fetched_at_all() {
        let (mut ours, mut theirs) = (vec![7; CHUNK_BLOCKS], vec![7; CHUNK_BLOCKS]);
        theirs[3] = 8;
        theirs[4] = 9;
        theirs[10] = 0;
        ours[100..200].fill(0);
        let (zero, fetch) = differences(&ours, &theirs);
        assert_eq!(zero, [BlockRange::new(10, 1).unwrap()]);
        let lengths: Vec<(u16, u16)> = fetch.iter().map(|r| (r.first, r.count)).collect();
        assert_eq!(lengths, [(3, 2), (100, 32), (132, 32), (164, 32), (196, 4)]);
    }

    #[test]
    fn runs_cover_the_range() {
        let range = BlockRange::new(8, 5).unwrap();
        assert_eq!(runs(0b10011, range), [(8, 2, true), (10, 2, false), (12, 1, true)]);
    }
}
