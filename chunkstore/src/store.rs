//! The store of one shard.
use crate::api::*;
use protocol::types::{BlockRange, ChunkId, CopysetId, LogIndex, Time};

/// What recovery found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// LSN of the last batch found.
    pub last_lsn: Lsn,
    /// Batches replayed.
    pub batches: u64,
    /// Batches cut off as a torn tail.
    pub torn_batches: u64,
    /// What was damaged, in words with places.
    pub damages: Vec<String>,
}

/// Why a disk cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecoverError {
    /// No superblock: not formatted.
    #[error("the disk is not formatted: no superblock")]
    NotFormatted,
    /// The superblock fails its checksum or makes no sense.
    #[error("the superblock is damaged: {0}")]
    Superblock(&'static str),
    /// Neither checkpoint can be read.
    #[error("both checkpoints are damaged: {0}; the replicas of this disk must be rebuilt from their peers")]
    Checkpoint(&'static str),
    /// IO failed.
    #[error("{0:?}: {1}")]
    Io(FileId, IoError),
}

/// Why a disk cannot be formatted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// There is a superblock already.
    #[error("the disk is formatted already")]
    AlreadyFormatted,
    /// The sizes cannot work.
    #[error("bad layout: {0}")]
    Layout(&'static str),
    /// IO failed.
    #[error("{0:?}: {1}")]
    Io(FileId, IoError),
}

/// Formats an empty disk: superblock, checkpoint, the first log segments.
pub fn format<M: Media + ?Sized>(
    media: &mut M,
    layout: &Layout,
    identity: &Identity,
) -> Result<(), FormatError> {
    let _ = (media, layout, identity);
    Err(FormatError::AlreadyFormatted)
}

/// What recovery gives.
pub type Recovered<P> = (Store<P>, Vec<RecoveredCopyset>, RecoveryReport);

/// Opens a disk: superblock, last checkpoint, log replay. `limits` gives the layout's not fixed part.
pub fn recover<P: Payload, M: Media + ?Sized>(
    media: &mut M,
    limits: &Layout,
) -> Result<Recovered<P>, RecoverError> {
    let _ = (media, limits);
    Err(RecoverError::NotFormatted)
}

/// The storage of one shard. See the crate's docs for the calling contract.
pub struct Store<P> {
    stats: Stats,
    events: Vec<Event<P>>,
}

impl<P: Payload> Store<P> {
    /// Whose disk it is.
    pub fn identity(&self) -> Identity {
        Identity::default()
    }
    /// Sizes and limits in force.
    pub fn layout(&self) -> Layout {
        Layout::default()
    }
    /// Appends a record to the batch being filled; `crcs`: one CRC-32C (`block_crc`) a payload block.
    pub fn stage(&mut self, record: Record, payload: Option<P>, crcs: &[u32]) {
        let _ = (record, payload, crcs);
    }
    /// LSN of the batch which holds everything staged so far; `Event::Durable` of it or a later one means all is durable.
    pub fn seal(&mut self) -> Lsn {
        Lsn(0)
    }
    /// Whether an entry of `blocks` payload blocks may be staged now. Hard states and other small
    /// records always may; hold back entries and installs (leader and follower alike) while false.
    pub fn can_stage(&self, blocks: usize) -> bool {
        let _ = blocks;
        false
    }
    /// Makes the entries up to `up_to` visible to reads.
    pub fn commit(&mut self, copyset: CopysetId, up_to: LogIndex) {
        let _ = (copyset, up_to);
    }
    /// Reads blocks; answered by `Event::Read`, maybe at once.
    pub fn read(&mut self, token: u64, chunk: ChunkId, range: BlockRange) {
        let _ = (token, chunk, range);
    }
    /// The payload of an entry that is in the log.
    pub fn entry_payload(&self, copyset: CopysetId, index: LogIndex) -> EntryPayload<P> {
        let _ = (copyset, index);
        EntryPayload::Gone
    }
    /// Reads an entry's payload back; answered by `Event::Entry`.
    pub fn load_entry(&mut self, token: u64, copyset: CopysetId, index: LogIndex) {
        let _ = (token, copyset, index);
    }
    /// Which blocks hold data; answered by `Event::Status`.
    pub fn status(&mut self, token: u64, chunk: ChunkId, range: BlockRange) {
        let _ = (token, chunk, range);
    }
    /// The CRCs of a chunk, overlay included; answered by `Event::Table`.
    pub fn table(&mut self, token: u64, chunk: ChunkId) {
        let _ = (token, chunk);
    }
    /// The chunks of a copyset that hold (or held) data, in order.
    pub fn chunks_of(&self, copyset: CopysetId) -> Vec<ChunkId> {
        let _ = copyset;
        Vec::new()
    }
    /// Whether `n` chunks that have no slot yet can get one.
    pub fn can_allocate(&self, n: usize) -> bool {
        let _ = n;
        false
    }
    /// Slots that can still be given out.
    pub fn free_slots(&self) -> usize {
        0
    }
    /// Whether the chunk has a slot, or one promised to it.
    pub fn has_slot(&self, chunk: ChunkId) -> bool {
        let _ = chunk;
        false
    }
    /// Replaces a bad block by good content (told by `Corrupt`); false when the content is not what is
    /// expected (any more), and then nothing is done. `block` counts within `payload` from 0.
    pub fn repair(&mut self, chunk: ChunkId, block: u16, payload: P) -> bool {
        let _ = (chunk, block, payload);
        false
    }
    /// Drops the oldest payload handles of durable entries, about `blocks` blocks; they are log-backed from then on.
    pub fn evict(&mut self, blocks: usize) -> usize {
        blocks * 0
    }
    /// The next operation to run. Takes the time because batches are framed here.
    pub fn poll_op(&mut self, now: Time) -> Option<Op<P>> {
        let _ = now;
        None
    }
    /// An operation ended. `Ok(Some(payload))` for reads, `Ok(None)` for the others.
    pub fn completed(&mut self, ticket: u64, result: Result<Option<P>, IoError>, now: Time) {
        let _ = (ticket, result, now);
    }
    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event<P>> {
        self.events.pop()
    }
    /// When to call `poll_op` again though nothing happened.
    pub fn next_timeout(&self) -> Option<Time> {
        None
    }
    /// Begins the graceful end: flush, checkpoint, `Event::Stopped`.
    pub fn stop(&mut self) {}
    /// Why the store refuses work, if it does.
    pub fn failure(&self) -> Option<Failure> {
        None
    }
    /// Counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}
