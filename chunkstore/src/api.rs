//! The words of the crate's interface: what the store asks of its driver and tells its shard.
//!
//! Nothing here does anything. Ops go out, completions come in, events go out; block data is
//! only ever held through [`Payload`], a cheap handle to memory that the caller owns.

use protocol::raft::{Entry, Fence, HardState, Members};
use protocol::types::{BLOCK_BYTES, BlockRange, CHUNK_BLOCKS, ChunkId, CopysetId, LogIndex, Term};
use smallvec::SmallVec;

/// A run of blocks in memory, shared by reference. The store clones handles and never copies blocks.
pub trait Payload: Clone {
    /// Blocks in the run.
    fn blocks(&self) -> usize;
    /// One block, [`BLOCK_BYTES`] long.
    fn block(&self, at: usize) -> &[u8];
}

/// Number of a log batch: counts up by one from 1, over the whole life of a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lsn(pub u64);

/// One of the two alternating checkpoint files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// Holds checkpoints of odd sequence number.
    A,
    /// Holds checkpoints of even sequence number.
    B,
}

/// A file of a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FileId {
    /// Identity and layout; written once.
    Superblock,
    /// A checkpoint.
    Checkpoint(Side),
    /// A log segment.
    Log(u32),
    /// A file of chunk slots.
    Chunks(u32),
}

/// Whose disk it is; checked by the caller after recovery.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    /// The cluster.
    pub cluster: [u8; 16],
    /// The disk: random, drawn when it is formatted.
    pub disk: [u8; 16],
    /// The target.
    pub target: u32,
    /// The shard within it.
    pub shard: u16,
}

/// Fewest log segments of a new disk. Two of the log are kept free for what must be copied forward so that a segment
/// can be recycled; with only one, a log full of entries that wait for the end of a catch-up stays full for good. Disks
/// from before have [`LOG_SEGMENTS_ONCE`] or more, and are opened.
pub const LOG_SEGMENTS_MIN: u32 = 6;
/// Fewest log segments that a disk was ever formatted with.
const LOG_SEGMENTS_ONCE: u32 = 4;

/// Sizes and limits. Those under "fixed" are written to the superblock at format time and read
/// back at recovery; the others may change from start to start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Fixed: bytes of a log segment, a multiple of 4 KiB.
    pub segment_bytes: u32,
    /// Fixed: log segments, at least [`LOG_SEGMENTS_MIN`] when it is formatted.
    pub log_segments: u32,
    /// Fixed: chunk slots of a chunk file, 1 to 256.
    pub slots_per_file: u32,
    /// Fixed: chunk slots there can ever be; a multiple of `slots_per_file`.
    pub slots_max: u32,
    /// Log segments written at format time (at least 2); the others follow in the background.
    pub format_segments: u32,
    /// Free chunk slots kept preformatted ahead of need.
    pub reserve_slots: u32,
    /// Payload blocks of a batch at most: [`protocol::types::ENTRY_BLOCKS_MAX`] to [`BATCH_BLOCKS_MAX`].
    pub batch_blocks_max: u32,
    /// Log batches in flight at most.
    pub batches_in_flight_max: usize,
    /// Flush and table operations in flight at most.
    pub flush_in_flight_max: usize,
    /// CRC tables ([`TABLE_BYTES`] each) kept in memory at most.
    pub table_cache_max: usize,
    /// Payload blocks kept in memory for entries and the overlay at most; older ones are read back from the log.
    pub ram_blocks_max: usize,
    /// Whether blocks are flushed before they would have to be read back from the log.
    pub flush_ahead: bool,
    /// Discarded blocks that may wait to be flushed, beyond as many blocks as the log has; each takes
    /// about 80 bytes of memory.
    pub zero_blocks_max: u64,
    /// Nanoseconds of idleness after which the last batch is attested by a seal batch.
    pub seal_idle_ns: u64,
    /// Nanoseconds of idleness after which the overlay is flushed.
    pub flush_idle_ns: u64,
}

/// Bytes of memory that the CRC table of a chunk takes: 4 for each block, a bit for those whose CRC is lost, and its place in
/// the cache.
pub const TABLE_BYTES: usize = 17 << 10;

/// Payload blocks of any batch at most, in any start: recovery looks so far past a hole, so that a
/// smaller `batch_blocks_max` may be chosen over a log that has larger batches in it.
pub const BATCH_BLOCKS_MAX: u32 = 256;

impl Default for Layout {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            log_segments: 8,
            slots_per_file: 16,
            slots_max: 1024,
            format_segments: 2,
            reserve_slots: 16,
            batch_blocks_max: BATCH_BLOCKS_MAX,
            batches_in_flight_max: 4,
            flush_in_flight_max: 8,
            table_cache_max: 1024,
            ram_blocks_max: 8192,
            flush_ahead: true,
            zero_blocks_max: 1 << 18,
            seal_idle_ns: 50_000_000,
            flush_idle_ns: 2_000_000_000,
        }
    }
}

/// Blocks of table area a slot: two copies of up to 8 pages, 5 of them used.
pub(crate) const TABLE_BLOCKS: u64 = 16;

impl Layout {
    /// Blocks of a log segment.
    pub fn segment_blocks(&self) -> u32 {
        self.segment_bytes / BLOCK_BYTES as u32
    }
    /// Blocks of all log segments.
    pub fn log_blocks(&self) -> u64 {
        u64::from(self.log_segments) * u64::from(self.segment_blocks())
    }
    /// Bytes of a chunk file.
    pub fn chunk_file_bytes(&self) -> u64 {
        u64::from(self.slots_per_file) * (TABLE_BLOCKS + CHUNK_BLOCKS as u64) * BLOCK_BYTES as u64
    }
    /// Chunk files when all slots are there.
    pub fn chunk_files_max(&self) -> u32 {
        self.slots_max.div_ceil(self.slots_per_file)
    }
    /// The file of a slot, and the byte offset of its CRC table.
    pub fn table_place(&self, slot: u32) -> (FileId, u64) {
        let within = u64::from(slot % self.slots_per_file);
        (FileId::Chunks(slot / self.slots_per_file), within * TABLE_BLOCKS * BLOCK_BYTES as u64)
    }
    /// The file of a slot, and the byte offset of its first block.
    pub fn data_place(&self, slot: u32) -> (FileId, u64) {
        let (per_file, within) = (u64::from(self.slots_per_file), u64::from(slot % self.slots_per_file));
        let block = per_file * TABLE_BLOCKS + within * CHUNK_BLOCKS as u64;
        (FileId::Chunks(slot / self.slots_per_file), block * BLOCK_BYTES as u64)
    }
    /// Why these sizes cannot work, if they cannot.
    pub fn problem(&self) -> Option<&'static str> {
        let batch = self.batch_blocks_max + crate::batch::HEADER_BLOCKS_MAX;
        match () {
            () if !(self.segment_bytes as usize).is_multiple_of(BLOCK_BYTES) => {
                Some("segment_bytes is not a multiple of 4 KiB")
            }
            // Recovery reads a segment at once.
            () if self.segment_bytes > 256 << 20 => Some("segment_bytes is above 256 MiB"),
            () if self.log_segments < LOG_SEGMENTS_ONCE => Some("log_segments is below 4"),
            () if self.log_segments > 4096 => Some("log_segments is above 4096"),
            () if self.segment_blocks() < 4 * batch => {
                Some("a log segment must hold four batches of batch_blocks_max")
            }
            () if self.slots_per_file == 0 || self.slots_per_file > 256 => {
                Some("slots_per_file is not in 1..=256")
            }
            () if self.slots_max == 0 || !self.slots_max.is_multiple_of(self.slots_per_file) => {
                Some("slots_max is not a multiple of slots_per_file")
            }
            () if self.slots_max > 1 << 24 => Some("slots_max is above 2^24"),
            () if self.format_segments < 2 || self.format_segments > self.log_segments => {
                Some("format_segments is not in 2..=log_segments")
            }
            () if (self.batch_blocks_max as usize) < protocol::types::ENTRY_BLOCKS_MAX => {
                Some("batch_blocks_max is below 32")
            }
            () if self.batch_blocks_max > BATCH_BLOCKS_MAX => Some("batch_blocks_max is above 256"),
            () if self.batches_in_flight_max == 0 || self.flush_in_flight_max == 0 => {
                Some("a limit of operations in flight is 0")
            }
            () => None,
        }
    }
}

/// An operation failed; `errno` as the kernel gave it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("errno {errno}")]
pub struct IoError {
    /// The kernel's error number, positive.
    pub errno: i32,
}

/// No space left on the device.
pub const ENOSPC: i32 = 28;

/// Blocking access to a shard's files; used by `format`, `recover` and `inspect` only.
pub trait Media {
    /// Fills `buf` from `offset`; what lies past the end of the file reads as zeroes.
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoError>;
    /// Writes all of `data`.
    fn write(&mut self, file: FileId, offset: u64, data: &[u8]) -> Result<(), IoError>;
    /// Makes what was written durable, file system metadata included.
    fn sync(&mut self, file: FileId) -> Result<(), IoError>;
    /// Length in bytes, `None` when there is no such file.
    fn len(&mut self, file: FileId) -> Result<Option<u64>, IoError>;
    /// Makes the file (or keeps it) and allocates `bytes` for it, durably, its directory entry included.
    fn create(&mut self, file: FileId, bytes: u64) -> Result<(), IoError>;
}

/// What goes into the log.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Record {
    /// A replica begins its life here, empty, with this membership.
    Create {
        /// Which.
        copyset: CopysetId,
        /// As it was created by the MDS.
        members: Members,
    },
    /// The replica leaves: its entries are dropped, its chunks freed.
    Remove {
        /// Which.
        copyset: CopysetId,
    },
    /// Term and vote.
    Hard {
        /// Whose.
        copyset: CopysetId,
        /// The new state.
        hard: HardState,
    },
    /// One Raft entry. `Write` bodies come with a payload. An entry at an index that exists
    /// already, with another term, truncates what was there.
    Entry {
        /// Whose.
        copyset: CopysetId,
        /// The entry.
        entry: Entry,
    },
    /// Entries from `from` on are void. Never reaches applied ones.
    Truncate {
        /// Whose.
        copyset: CopysetId,
        /// The first void index.
        from: LogIndex,
    },
    /// The replica's health changed.
    Health {
        /// Whose.
        copyset: CopysetId,
        /// What it is now.
        health: Health,
    },
    /// The entries up to here were committed and applied: a replay applies them at once, without
    /// waiting for a leader. Staged by the store itself, now and then.
    Applied {
        /// Whose.
        copyset: CopysetId,
        /// The last applied index.
        index: LogIndex,
    },
    /// A volume's fence as another replica has it: what a catch-up brings beside chunks. Raised at once.
    Fence {
        /// Whose.
        copyset: CopysetId,
        /// The fence.
        fence: Fence,
    },
    /// A chunk catch-up begins: until its end the chunks are a mixture of old and new.
    InstallBegin {
        /// Whose.
        copyset: CopysetId,
    },
    /// Blocks as fetched; visible at once. Comes with a payload.
    InstallBlocks {
        /// Whose.
        copyset: CopysetId,
        /// Where.
        chunk: ChunkId,
        /// Which blocks, at most 32.
        range: BlockRange,
    },
    /// These blocks read as zeroes; visible at once.
    InstallZero {
        /// Whose.
        copyset: CopysetId,
        /// Where.
        chunk: ChunkId,
        /// Which blocks.
        range: BlockRange,
    },
    /// This chunk is not part of the copyset's state.
    InstallDrop {
        /// Whose.
        copyset: CopysetId,
        /// Which.
        chunk: ChunkId,
    },
    /// The chunks are complete as of `floor`: entries up to it are void (and later ones too, unless
    /// the log held an entry of `floor_term` at `floor`).
    InstallEnd {
        /// Whose.
        copyset: CopysetId,
        /// The last index that the chunks hold in full.
        floor: LogIndex,
        /// Its term.
        floor_term: Term,
        /// The membership at `floor`.
        members: Members,
    },
}

/// How far a replica can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Health {
    /// Fully.
    #[default]
    Whole,
    /// A chunk catch-up was begun and has not ended.
    Installing,
    /// Its log lost something that was durable: it neither votes nor counts.
    Damaged,
}

/// A replica as recovery found it.
#[derive(Clone, PartialEq, Debug)]
pub struct RecoveredCopyset {
    /// Which.
    pub id: CopysetId,
    /// Term and vote.
    pub hard: HardState,
    /// Membership at `floor`; later changes are among `entries`.
    pub members: Members,
    /// Index and term of the last entry that is only in the chunks.
    pub floor: (LogIndex, Term),
    /// Contiguous from `floor` + 1. Those after `applied` are to be committed (again) as Raft finds
    /// them committed.
    pub entries: Vec<Entry>,
    /// Everything up to here is applied; at least the floor.
    pub applied: LogIndex,
    /// Damaged outweighs Installing.
    pub health: Health,
    /// A chunk catch-up was begun and has not ended (also told when `health` is Damaged).
    pub installing: bool,
}

/// A piece of a write.
#[derive(Clone, Debug)]
pub enum Piece<P> {
    /// Blocks of a payload.
    Payload {
        /// The handle.
        payload: P,
        /// First block of it.
        first: usize,
        /// Blocks.
        count: usize,
    },
    /// Bytes made by the store, a multiple of 4 KiB; not aligned in memory.
    Bytes(Vec<u8>),
    /// So many blocks of zeroes.
    Zeroes {
        /// Blocks.
        blocks: usize,
    },
}

/// What is written by one operation, in order.
pub type Pieces<P> = SmallVec<[Piece<P>; 4]>;

impl<P> Piece<P> {
    /// Length in blocks.
    pub fn blocks(&self) -> usize {
        match self {
            Piece::Payload { count, .. } => *count,
            Piece::Bytes(bytes) => bytes.len() / BLOCK_BYTES,
            Piece::Zeroes { blocks } => *blocks,
        }
    }
}

/// What the driver is to do. Ops may run and complete in any order; each is answered by one
/// call of `completed` with its ticket.
#[derive(Clone, Debug)]
pub enum Op<P> {
    /// Write the pieces one after the other.
    Write {
        /// Told back at completion.
        ticket: u64,
        /// Where.
        file: FileId,
        /// Byte offset, a multiple of 4 KiB.
        offset: u64,
        /// What.
        pieces: Pieces<P>,
        /// Complete only when durable (RWF_DSYNC).
        dsync: bool,
    },
    /// Read blocks into a new payload, at most 32.
    Read {
        /// Told back at completion.
        ticket: u64,
        /// Where.
        file: FileId,
        /// Byte offset, a multiple of 4 KiB.
        offset: u64,
        /// How many.
        blocks: usize,
    },
    /// Make all completed writes of the file durable (fdatasync).
    Sync {
        /// Told back at completion.
        ticket: u64,
        /// Which.
        file: FileId,
    },
    /// Make the file (or open it), allocate its bytes (fallocate), sync it and its directory.
    Create {
        /// Told back at completion.
        ticket: u64,
        /// Which.
        file: FileId,
        /// Length.
        bytes: u64,
    },
}

/// Part of the answer to a read, in order of blocks.
#[derive(Clone, Debug)]
pub enum ReadPiece<P> {
    /// Blocks that were never written or were zeroed.
    Zero {
        /// Blocks.
        count: usize,
    },
    /// Blocks that hold data, verified.
    Data {
        /// The handle.
        payload: P,
        /// First block of it.
        first: usize,
        /// Blocks.
        count: usize,
        /// CRC-32C a block, as of [`protocol::types::crc_at_rest`].
        crcs: SmallVec<[u32; 8]>,
    },
}

/// Pieces that add up to the range asked.
pub type ReadData<P> = SmallVec<[ReadPiece<P>; 2]>;

/// A block whose copy here is bad.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadBlock {
    /// Its number in the chunk.
    pub block: u16,
    /// CRC at rest of what it should hold; `None` when the table page is lost too.
    pub expected: Option<u32>,
}

/// Why a read has no data.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// These blocks fail their checksum or cannot be read; others of the range may be fine.
    #[error("{} blocks fail their checksum", .0.len())]
    Corrupt(Vec<BadBlock>),
    /// The entry is not in the log (any more).
    #[error("not in the log")]
    Gone,
    /// The disk has failed.
    #[error("the disk has failed")]
    Failed,
}

/// Where the payload of an entry is.
#[derive(Clone, Debug)]
pub enum EntryPayload<P> {
    /// In memory, with its CRC-32C a block. Also the answer for entries without payload (`None`).
    Ram(Option<P>, SmallVec<[u32; 8]>),
    /// In the log: ask by `load_entry`.
    NeedsLoad,
    /// Below the floor or past the end.
    Gone,
}

/// Why the store refuses all further work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} of {file:?} failed: {error}")]
pub struct Failure {
    /// Which operation.
    pub what: &'static str,
    /// On which file.
    pub file: FileId,
    /// The error.
    pub error: IoError,
}

/// What the store tells its shard.
#[derive(Clone, Debug)]
pub enum Event<P> {
    /// Every batch up to this one is durable.
    Durable(Lsn),
    /// The answer to `read`.
    Read {
        /// As asked.
        token: u64,
        /// The data.
        result: Result<ReadData<P>, ReadError>,
    },
    /// The answer to `load_entry`.
    Entry {
        /// As asked.
        token: u64,
        /// The payload and its CRC-32C a block.
        result: Result<(P, SmallVec<[u32; 8]>), ReadError>,
    },
    /// The answer to `table`: one CRC at rest a block, 0 where it reads as zeroes. Blocks whose
    /// CRC is lost are told as `u32::MAX` and listed in `unknown`.
    Table {
        /// As asked.
        token: u64,
        /// 4,096 values.
        crcs: Vec<u32>,
        /// Blocks whose CRC is lost.
        unknown: Vec<u16>,
    },
    /// The answer to `status`: (blocks, hold data) in order, adding up to the range.
    Status {
        /// As asked.
        token: u64,
        /// The runs.
        runs: Vec<(u16, bool)>,
    },
    /// The log has no entries of the copyset up to `floor` any more.
    Compactable {
        /// Whose.
        copyset: CopysetId,
        /// The new floor.
        floor: LogIndex,
        /// Its term.
        term: Term,
    },
    /// A block in background work (flush, copy forward) was found bad: fetch it from a peer and `repair` it.
    Corrupt {
        /// Whose.
        copyset: CopysetId,
        /// Where.
        chunk: ChunkId,
        /// Which block.
        bad: BadBlock,
    },
    /// A log or sync error: nothing more is done on this disk.
    Failed(Failure),
    /// The file system is full: the pool is limited to the slots there are. Told once until it grows again.
    PoolLimited {
        /// Slots there are.
        slots: u32,
    },
    /// Preformatting went on.
    Preformat {
        /// Log segments ready.
        segments: u32,
        /// Slots ready.
        slots: u32,
    },
    /// `stop` is done: everything committed is flushed, a checkpoint is written.
    Stopped,
}

/// Counters; all only grow except those under "now".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Log batches written.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of log written, headers included.
    pub log_bytes: u64,
    /// Seal batches among them.
    pub seals: u64,
    /// Blocks written to chunk slots.
    pub flushed_blocks: u64,
    /// Blocks zeroed in tables.
    pub zeroed_blocks: u64,
    /// Table pages written.
    pub table_pages: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Segments recycled.
    pub segments_recycled: u64,
    /// Entries copied forward.
    pub copied_forward: u64,
    /// Reads answered.
    pub reads: u64,
    /// Read operations on chunk files.
    pub chunk_reads: u64,
    /// Read operations on the log.
    pub log_reads: u64,
    /// Reads planned again because the block moved meanwhile.
    pub read_retries: u64,
    /// Blocks that failed their check because they had moved meanwhile: not bad, read again.
    pub moved_blocks: u64,
    /// Tables loaded.
    pub table_loads: u64,
    /// Table pages of which one copy was bad.
    pub table_fallbacks: u64,
    /// Table pages lost in both copies.
    pub table_pages_lost: u64,
    /// Bad blocks found.
    pub corrupt_blocks: u64,
    /// Bad blocks repaired.
    pub repaired_blocks: u64,
    /// Reads that the disk refused.
    pub read_errors: u64,
    /// Torn tails cut at recovery.
    pub torn_tails: u64,
    /// Damages found at recovery.
    pub log_damages: u64,
    /// Payload handles dropped from memory.
    pub evictions: u64,
    /// Preformatting refused for lack of space.
    pub no_space: u64,
    /// Now: slots that can still be given out.
    pub free_slots: u64,
    /// Now: slots in use.
    pub used_slots: u64,
    /// Now: log segments that cannot be recycled yet.
    pub segments_used: u64,
    /// Now: log segments ready for use, in use or not.
    pub segments_ready: u64,
    /// Now: blocks in the overlay.
    pub overlay_blocks: u64,
    /// Now: payload blocks held in memory.
    pub ram_blocks: u64,
    /// Now: log blocks of entries that wait to be applied.
    pub waiting_blocks: u64,
    /// Now: CRC tables in memory.
    pub tables_cached: u64,
}
