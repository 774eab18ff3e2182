//! IO on the chunks of a copyset, as its leader answers it.

use super::fence::volume_of;
use super::hosted::{PendingWrite, Waiter};
use super::ordering::Step;
use super::repair::Repaired;
use super::{Origin, Output, REPAIR_TRIES_MAX, Shard, Work};
use crate::mem::{Mem, Mems};
use chunkstore::{BadBlock, Payload, ReadData, ReadError, ReadPiece};
use copyset::{ReadGrant, Refused, Role};
use protocol::peer::{Crcs, IoOp, IoOutcome, IoReply, IoRequest, PeerMessage};
use protocol::raft::{Body, Fence};
use protocol::types::{
    BLOCK_BYTES, BlockRange, CHUNK_BYTES, ChunkId, CopysetId, ENTRY_BLOCKS_MAX, ENTRY_BYTES_MAX,
    SessionEpoch, ShardAddr, Term, block_crc,
};

/// Granularity of offsets and lengths, in bytes.
const SECTOR: u32 = 512;
/// Most requests under way in a shard; more are answered `Busy`.
pub(super) const REQUESTS_MAX: usize = 8192;

/// Writes that wait for room in the log may hold one part in so many of the arena.
const SLOWED_SHARE: usize = 8;

/// A write or zero under way; it may have up to three parts.
pub struct Request {
    origin: Origin,
    id: u64,
    copyset: CopysetId,
    epoch: SessionEpoch,
    /// Parts that are not answered, plus one while parts are still being started.
    open: u32,
    outcome: IoOutcome,
    bytes: u64,
    is_write: bool,
}

/// A write or zero that waits for the log to have more room.
pub struct Slowed {
    origin: Origin,
    request: IoRequest,
    payload: Mems,
}

impl Slowed {
    /// Blocks of memory that it holds.
    fn blocks(&self) -> usize {
        self.payload.iter().map(Payload::blocks).sum()
    }
}

/// A read under way.
pub struct ReadWork {
    pub(super) origin: Origin,
    pub(super) id: u64,
    pub(super) copyset: CopysetId,
    pub(super) chunk: ChunkId,
    pub(super) range: BlockRange,
    pub(super) tries: u8,
    /// Repairs that it waits for.
    pub(super) repairs: usize,
    pub(super) repaired: Repaired,
}

/// A status under way.
pub struct StatusWork {
    origin: Origin,
    id: u64,
    copyset: CopysetId,
    chunk: ChunkId,
    range: BlockRange,
}

impl StatusWork {
    pub(super) fn copyset(&self) -> CopysetId {
        self.copyset
    }
}

impl Shard {
    /// IO for a copyset that the sender believes to be led from here.
    pub(super) fn handle_io(&mut self, origin: Origin, from: ShardAddr, request: IoRequest, payload: Mems) {
        let (id, copyset) = (request.id, request.copyset);
        let Some(hosted) = self.hosted.get_mut(&copyset) else {
            return self.answer(origin, id, copyset, IoOutcome::UnknownCopyset, Mems::new());
        };
        let replica = &mut hosted.replica;
        if matches!(request.op, IoOp::WhoLeads)
            || replica.role() != Role::Leader
            || replica.term() != request.term
        {
            if replica.is_hibernating() {
                replica.wake(self.now);
                self.touch(copyset);
            }
            return self.answer_not_leader(origin, id, copyset);
        }
        if !hosted.affinity.is_counting() {
            self.counting.insert(copyset);
        }
        hosted.affinity.count(from.target);
        if let Some(volume) = volume_of(&request.op)
            && !hosted.gate.passes(volume, request.epoch)
        {
            let newest = hosted.gate.newest(volume);
            let outcome = self.barred(copyset, Fence { volume, epoch: request.epoch }, newest);
            return self.answer(origin, id, copyset, outcome, Mems::new());
        }
        if self.requests.len() + self.work.len() + self.slowed.len() >= REQUESTS_MAX {
            self.counts.busy += 1;
            return self.answer(origin, id, copyset, IoOutcome::Busy, Mems::new());
        }
        // None overtakes one that waits: of two copies of a write, the one that came by a link that is
        // gone must not be the later.
        let writes = matches!(request.op, IoOp::Write { .. } | IoOp::Zero { .. });
        if writes && (!self.slowed.is_empty() || !self.has_room(&request)) {
            return self.slow(Slowed { origin, request, payload });
        }
        self.begin(origin, &request, payload);
    }

    /// Lets a write wait, unless too much waits already: what waits holds memory that the flusher needs.
    fn slow(&mut self, write: Slowed) {
        let blocks = write.blocks();
        if self.slowed_blocks + blocks > self.arena.capacity_blocks() / SLOWED_SHARE {
            self.counts.busy += 1;
            let (id, copyset) = (write.request.id, write.request.copyset);
            return self.answer(write.origin, id, copyset, IoOutcome::Busy, Mems::new());
        }
        self.slowed_blocks += blocks;
        self.slowed.push_back(write);
    }

    /// Whether there is room in the log for a write, and for as many as are under way.
    fn has_room(&self, request: &IoRequest) -> bool {
        let blocks = match request.op {
            IoOp::Write { length, .. } => (length as usize / BLOCK_BYTES + 1).min(ENTRY_BLOCKS_MAX),
            _ => 0,
        };
        self.requests.len() < self.store.write_window() && self.store.can_propose(blocks)
    }

    /// Begins the write that has waited longest, if there is room now; true if one has ended its wait.
    pub(super) fn let_slowed_go(&mut self) -> bool {
        let Some(Slowed { request, .. }) = self.slowed.front() else { return false };
        let replica = self.hosted.get(&request.copyset).map(|hosted| &hosted.replica);
        let leads = replica.is_some_and(|r| r.role() == Role::Leader && r.term() == request.term);
        if leads && !self.has_room(request) {
            return false;
        }
        let write = self.slowed.pop_front().expect("looked at");
        self.slowed_blocks -= write.blocks();
        let Slowed { origin, request, payload } = write;
        if leads {
            self.begin(origin, &request, payload);
        } else {
            self.answer_not_leader(origin, request.id, request.copyset);
        }
        true
    }

    fn begin(&mut self, origin: Origin, request: &IoRequest, payload: Mems) {
        match request.op {
            IoOp::WhoLeads => {}
            // It stands: what is lower was told so before it came here.
            IoOp::Fence { .. } => {
                self.answer(origin, request.id, request.copyset, IoOutcome::Done, Mems::new());
            }
            IoOp::Read { chunk, range } => self.begin_read(origin, request, chunk, range),
            IoOp::Status { chunk, range } => self.begin_status(origin, request, chunk, range),
            IoOp::Write { chunk, offset, length, crc } => {
                self.begin_write(origin, request, chunk, (offset, length), crc, payload);
            }
            IoOp::Zero { chunk, offset, length } => self.begin_zero(origin, request, chunk, offset, length),
        }
    }

    pub(super) fn answer(
        &mut self,
        origin: Origin,
        id: u64,
        copyset: CopysetId,
        outcome: IoOutcome,
        payload: Mems,
    ) {
        let message = PeerMessage::IoReply(IoReply { id, copyset, outcome });
        self.out.push_back(Output::Answer { origin, message, payload });
    }

    fn answer_not_leader(&mut self, origin: Origin, id: u64, copyset: CopysetId) {
        let outcome = match self.hosted.get(&copyset) {
            Some(hosted) => {
                let leader = match hosted.replica.role() {
                    Role::Leader => Some(self.settings.me),
                    _ => hosted.replica.leader(),
                };
                IoOutcome::NotLeader { leader, term: hosted.replica.term() }
            }
            None => IoOutcome::UnknownCopyset,
        };
        self.counts.not_leader += 1;
        self.answer(origin, id, copyset, outcome, Mems::new());
    }

    // ---- reads

    fn begin_read(&mut self, origin: Origin, request: &IoRequest, chunk: ChunkId, range: BlockRange) {
        if !range.is_valid() || usize::from(range.count) > ENTRY_BLOCKS_MAX {
            return self.answer(origin, request.id, request.copyset, IoOutcome::Invalid, Mems::new());
        }
        let (id, copyset) = (request.id, request.copyset);
        let work =
            ReadWork { origin, id, copyset, chunk, range, tries: 0, repairs: 0, repaired: Repaired::Yes };
        let key = self.work.insert(Work::Read(work));
        self.ask_replica(key, copyset);
    }

    fn begin_status(&mut self, origin: Origin, request: &IoRequest, chunk: ChunkId, range: BlockRange) {
        if !range.is_valid() {
            return self.answer(origin, request.id, request.copyset, IoOutcome::Invalid, Mems::new());
        }
        let work = StatusWork { origin, id: request.id, copyset: request.copyset, chunk, range };
        let key = self.work.insert(Work::Status(work));
        self.ask_replica(key, request.copyset);
    }

    /// Asks the replica whether the applied state may be read.
    fn ask_replica(&mut self, key: usize, copyset: CopysetId) {
        let Some(hosted) = self.hosted.get_mut(&copyset) else { return self.read_aborted(key) };
        match hosted.replica.read(key as u64, self.now) {
            Ok(ReadGrant::Now) => self.read_granted(key),
            Ok(ReadGrant::Later) => {}
            Err(Refused::Busy) => self.end_read(key, IoOutcome::Busy, Mems::new()),
            Err(_) => self.read_aborted(key),
        }
        self.touch(copyset);
    }

    pub(super) fn read_granted(&mut self, key: usize) {
        match self.work.get(key) {
            Some(Work::Read(read)) => self.store.read(key as u64, read.chunk, read.range),
            Some(Work::Status(status)) => self.store.status(key as u64, status.chunk, status.range),
            _ => {}
        }
    }

    pub(super) fn read_aborted(&mut self, key: usize) {
        match self.work.try_remove(key) {
            Some(Work::Read(read)) => self.answer_not_leader(read.origin, read.id, read.copyset),
            Some(Work::Status(status)) => self.answer_not_leader(status.origin, status.id, status.copyset),
            _ => {}
        }
    }

    /// The store answered a read of one of the kinds that read blocks.
    pub(super) fn store_read(&mut self, key: usize, result: Result<ReadData<Mem>, ReadError>) {
        match self.work.get(key) {
            Some(Work::Read(_)) => self.client_read(key, result),
            Some(Work::Merge { .. }) => self.merge_read(key, result),
            Some(Work::ServeBlocks { .. }) => self.serve_blocks(key, result),
            Some(Work::Check(_)) => self.check_read(key, result),
            _ => {}
        }
    }

    fn client_read(&mut self, key: usize, result: Result<ReadData<Mem>, ReadError>) {
        match result {
            Ok(data) => {
                let (present, crcs, payload) = spread(&data);
                self.end_read(key, IoOutcome::Data { present, crcs }, payload);
            }
            Err(ReadError::Corrupt(bad)) => self.repair_for_read(key, &bad),
            Err(error) => {
                // The disk takes its shard along: another replica leads soon, and has the block.
                tracing::warn!(%error, "a read failed");
                self.end_read(key, IoOutcome::Busy, Mems::new());
            }
        }
    }

    fn repair_for_read(&mut self, key: usize, bad: &[BadBlock]) {
        let Some(Work::Read(read)) = self.work.get_mut(key) else { return };
        read.tries += 1;
        if read.tries > REPAIR_TRIES_MAX {
            return self.end_read(key, IoOutcome::Corrupt, Mems::new());
        }
        read.repairs = bad.len();
        let (copyset, chunk) = (read.copyset, read.chunk);
        for block in bad {
            self.repair_block(copyset, chunk, *block, Some(key));
        }
    }

    /// One of the repairs that a read waits for has ended.
    pub(super) fn read_repaired(&mut self, key: usize, repaired: Repaired) {
        let Some(Work::Read(read)) = self.work.get_mut(key) else { return };
        read.repairs -= 1;
        read.repaired = read.repaired.max(repaired);
        if read.repairs > 0 {
            return;
        }
        match std::mem::take(&mut read.repaired) {
            Repaired::Yes => {}
            Repaired::Later => return self.end_read(key, IoOutcome::Busy, Mems::new()),
            Repaired::Never => {
                self.counts.unrepaired_reads += 1;
                return self.end_read(key, IoOutcome::Corrupt, Mems::new());
            }
        }
        let (chunk, range) = (read.chunk, read.range);
        self.store.read(key as u64, chunk, range);
    }

    fn end_read(&mut self, key: usize, outcome: IoOutcome, payload: Mems) {
        match self.work.try_remove(key) {
            Some(Work::Read(read)) => {
                if matches!(outcome, IoOutcome::Data { .. }) {
                    self.counts.reads += 1;
                    self.counts.read_bytes += read.range.bytes() as u64;
                }
                self.answer(read.origin, read.id, read.copyset, outcome, payload);
            }
            Some(Work::Status(status)) => {
                self.answer(status.origin, status.id, status.copyset, outcome, payload);
            }
            _ => {}
        }
    }

    pub(super) fn status_read(&mut self, key: usize, runs: Vec<(u16, bool)>) {
        self.end_read(key, IoOutcome::Status { runs }, Mems::new());
    }

    // ---- writes

    fn begin_write(
        &mut self,
        origin: Origin,
        request: &IoRequest,
        chunk: ChunkId,
        (offset, length): (u32, u32),
        crc: u32,
        payload: Mems,
    ) {
        let data = payload.into_iter().next();
        let within = offset as usize % BLOCK_BYTES;
        let fits = |d: &Mem| within + length as usize <= d.blocks() * BLOCK_BYTES;
        let Some(data) = data.filter(|d| is_write(offset, length) && fits(d)) else {
            return self.answer(origin, request.id, request.copyset, IoOutcome::Invalid, Mems::new());
        };
        if origin != Origin::Local && block_crc(&data.bytes()[within..within + length as usize]) != crc {
            self.counts.wire_corrupt += 1;
            return self.answer(origin, request.id, request.copyset, IoOutcome::Busy, Mems::new());
        }
        let key = self.open_request(origin, request, u64::from(length), true);
        // The checksum of one whole block is the one that it keeps.
        let is_block = length as usize == BLOCK_BYTES && within == 0;
        self.start_part(key, chunk, (offset, length), Some(data), is_block.then_some(crc));
        self.part_done(key);
    }

    /// Zeroes whole blocks by one entry, and the parts of blocks at either end by writes.
    fn begin_zero(&mut self, origin: Origin, request: &IoRequest, chunk: ChunkId, offset: u32, length: u32) {
        if !is_range(offset, length) {
            return self.answer(origin, request.id, request.copyset, IoOutcome::Invalid, Mems::new());
        }
        let key = self.open_request(origin, request, u64::from(length), false);
        let block = BLOCK_BYTES as u32;
        let end = offset + length;
        let (inner_start, inner_end) = (offset.next_multiple_of(block), end / block * block);
        if inner_start > inner_end {
            self.start_part(key, chunk, (offset, length), None, None);
        } else {
            let parts = [(offset, inner_start), (inner_start, inner_end), (inner_end, end)];
            for (from, to) in parts.into_iter().filter(|(from, to)| to > from) {
                self.start_part(key, chunk, (from, to - from), None, None);
            }
        }
        self.part_done(key);
    }

    fn open_request(&mut self, origin: Origin, request: &IoRequest, bytes: u64, is_write: bool) -> usize {
        self.requests.insert(Request {
            origin,
            id: request.id,
            copyset: request.copyset,
            epoch: request.epoch,
            open: 1,
            outcome: IoOutcome::Done,
            bytes,
            is_write,
        })
    }

    fn start_part(
        &mut self,
        key: usize,
        chunk: ChunkId,
        (offset, length): (u32, u32),
        data: Option<Mem>,
        crc: Option<u32>,
    ) {
        self.requests[key].open += 1;
        let id = self.requests[key].copyset;
        let range = covering(offset, length);
        let partial =
            !(offset as usize).is_multiple_of(BLOCK_BYTES) || !(length as usize).is_multiple_of(BLOCK_BYTES);
        let write = PendingWrite { request: key, offset, length, data, crc };
        let Some(hosted) = self.hosted.get_mut(&id) else { return self.part_not_leader(key, id) };
        if let Some(step) = hosted.ordering.arrive(chunk, range, partial, write) {
            self.ordered_step(id, step, chunk, range);
        }
    }

    /// A write's turn has come: propose it, or read what it only covers in part.
    pub(super) fn ordered_step(
        &mut self,
        id: CopysetId,
        step: Step<PendingWrite>,
        chunk: ChunkId,
        range: BlockRange,
    ) {
        match step {
            Step::Propose(write) => self.propose_write(id, write, chunk, range),
            Step::Read { id: write } => {
                let key = self.work.insert(Work::Merge { copyset: id, write });
                self.store.read(key as u64, chunk, range);
            }
        }
    }

    fn propose_write(&mut self, id: CopysetId, write: PendingWrite, chunk: ChunkId, range: BlockRange) {
        let body = match &write.data {
            Some(_) => Body::Write { chunk, range },
            None => Body::Zero { chunk, range },
        };
        let blocks = body.payload_blocks();
        // Not before its turn: others may have been promised the last slot since it came.
        if write.data.is_some() && !self.store.has_slot(chunk) && !self.store.can_allocate(1) {
            if self.store.slots_come_back() {
                self.counts.busy += 1;
                return self.part_ended(write.request, IoOutcome::Busy);
            }
            self.counts.no_space += 1;
            return self.part_ended(write.request, IoOutcome::NoSpace);
        }
        let room = self.store.can_propose(blocks) && (write.data.is_some() || self.store.can_zero(range));
        if !room {
            self.counts.busy += 1;
            return self.part_ended(write.request, IoOutcome::Busy);
        }
        if self.is_deleted(chunk.volume) {
            // Once a shard has told that it holds nothing of a volume, nothing may come any more.
            let outcome = self.fenced(self.requests[write.request].epoch);
            return self.part_ended(write.request, outcome);
        }
        let Some(hosted) = self.hosted.get_mut(&id) else { return self.part_not_leader(write.request, id) };
        let (fence, epoch) = (hosted.gate.newest(chunk.volume), self.requests[write.request].epoch);
        if fence != epoch {
            let outcome = self.barred_write(epoch, fence);
            return self.part_ended(write.request, outcome);
        }
        match hosted.replica.propose(body, self.now) {
            Ok(index) => {
                if let Some(data) = write.data {
                    let data = data.window(0, blocks);
                    let crcs = match write.crc {
                        Some(crc) => Crcs::from_elem(crc, 1),
                        None => (0..blocks).map(|at| block_crc(data.block(at))).collect(),
                    };
                    hosted.incoming.insert(index, data, crcs);
                }
                let term = hosted.replica.term();
                hosted.waiters.push_back(Waiter { index, term, request: write.request });
                hosted.ordering.proposed(index, chunk, range);
                // Drained at once: what a later message brings must not find it undrained.
                self.touch(id);
                self.drain_replica(id);
            }
            Err(Refused::Busy) => {
                self.counts.busy += 1;
                self.part_ended(write.request, IoOutcome::Busy);
            }
            Err(_) => self.part_not_leader(write.request, id),
        }
    }

    /// The blocks that a write covers in part have been read.
    fn merge_read(&mut self, key: usize, result: Result<ReadData<Mem>, ReadError>) {
        let Some(Work::Merge { copyset, write }) = self.work.try_remove(key) else { return };
        let Some(hosted) = self.hosted.get_mut(&copyset) else { return };
        let Some((pending, chunk, range)) = hosted.ordering.merged(write) else { return };
        self.touch(copyset);
        let data = match result {
            Ok(data) => data,
            Err(ReadError::Corrupt(bad)) => {
                // Repaired in the background; the sender tries again.
                for block in bad {
                    self.repair_block(copyset, chunk, block, None);
                }
                return self.part_ended(pending.request, IoOutcome::Busy);
            }
            // As for a read: another replica leads soon.
            Err(_) => return self.part_ended(pending.request, IoOutcome::Busy),
        };
        let is_zero = |piece: &ReadPiece<Mem>| matches!(piece, ReadPiece::Zero { .. });
        if pending.data.is_none() && data.iter().all(is_zero) {
            // Zeroes over zeroes: no slot is taken up for them.
            return self.propose_write(copyset, pending, chunk, range);
        }
        match self.merge(&data, &pending, range) {
            Some(merged) => {
                let whole = PendingWrite { data: Some(merged), crc: None, ..pending };
                self.propose_write(copyset, whole, chunk, range);
            }
            None => {
                self.counts.busy += 1;
                self.part_ended(pending.request, IoOutcome::Busy);
            }
        }
    }

    /// The old blocks with the write laid over them; `None` when the arena is exhausted.
    fn merge(&self, old: &ReadData<Mem>, write: &PendingWrite, range: BlockRange) -> Option<Mem> {
        let mut buf = self.arena.alloc(range.count.into())?;
        let mut at = 0;
        for piece in old {
            match piece {
                ReadPiece::Zero { count } => {
                    buf[at..at + count * BLOCK_BYTES].fill(0);
                    at += count * BLOCK_BYTES;
                }
                ReadPiece::Data { payload, first, count, .. } => {
                    let bytes = &payload.bytes()[first * BLOCK_BYTES..][..count * BLOCK_BYTES];
                    buf[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
            }
        }
        let within =
            write.offset as usize % BLOCK_BYTES..write.offset as usize % BLOCK_BYTES + write.length as usize;
        match &write.data {
            Some(data) => buf[within.clone()].copy_from_slice(&data.bytes()[within]),
            None => buf[within].fill(0),
        }
        Some(Mem::whole(buf.freeze()))
    }

    pub(super) fn part_done(&mut self, key: usize) {
        self.part_ended(key, IoOutcome::Done);
    }

    pub(super) fn part_not_leader(&mut self, key: usize, id: CopysetId) {
        self.counts.not_leader += 1;
        let outcome = match self.hosted.get(&id) {
            Some(h) => IoOutcome::NotLeader { leader: h.replica.leader(), term: h.replica.term() },
            None => IoOutcome::NotLeader { leader: None, term: Term(0) },
        };
        self.part_ended(key, outcome);
    }

    /// One part of a request has ended; the last one answers it. Any part that was not done makes
    /// the whole not done, and the sender repeats all of it, which changes nothing that was done.
    fn part_ended(&mut self, key: usize, outcome: IoOutcome) {
        let request = &mut self.requests[key];
        if outcome != IoOutcome::Done && request.outcome == IoOutcome::Done {
            request.outcome = outcome;
        }
        request.open -= 1;
        if request.open > 0 {
            return;
        }
        let request = self.requests.remove(key);
        if request.outcome == IoOutcome::Done {
            if request.is_write {
                self.counts.writes += 1;
                self.counts.write_bytes += request.bytes;
            } else {
                self.counts.zeroes += 1;
            }
        }
        self.answer(request.origin, request.id, request.copyset, request.outcome, Mems::new());
    }
}

/// The blocks that hold bytes `offset..offset + length`.
fn covering(offset: u32, length: u32) -> BlockRange {
    let first = offset as usize / BLOCK_BYTES;
    let end = ((offset + length) as usize).div_ceil(BLOCK_BYTES);
    BlockRange::new(first, end - first).expect("checked to lie within a chunk")
}

fn is_range(offset: u32, length: u32) -> bool {
    let end = u64::from(offset) + u64::from(length);
    length > 0 && offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR) && end <= CHUNK_BYTES as u64
}

/// A write also crosses no multiple of [`ENTRY_BYTES_MAX`], so that it covers at most 32 blocks.
fn is_write(offset: u32, length: u32) -> bool {
    let entry = ENTRY_BYTES_MAX as u32;
    is_range(offset, length) && offset / entry == (offset + length - 1) / entry
}

/// What a read found, as a reply tells it: which blocks are present, their checksums
/// (as at rest: see `types::crc_at_rest`) and their data.
pub(super) fn spread(data: &ReadData<Mem>) -> (u32, protocol::peer::Crcs, Mems) {
    let (mut present, mut at) = (0_u32, 0);
    let (mut all_crcs, mut payload) = (protocol::peer::Crcs::new(), Mems::new());
    for piece in data {
        match piece {
            ReadPiece::Zero { count } => at += count,
            ReadPiece::Data { payload: run, first, count, crcs } => {
                for n in 0..*count {
                    present |= 1 << (at + n);
                }
                all_crcs.extend_from_slice(crcs);
                payload.push(run.window(*first, *count));
                at += count;
            }
        }
    }
    (present, all_crcs, payload)
}
