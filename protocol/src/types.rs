//! The nouns of the system and the sizes that everything agrees on.

use core::fmt;
use core::ops::{Add, Sub};
use rkyv::{Archive, Deserialize, Serialize};

/// Bytes of a block, the unit of checksum, of overlay and of chunk IO.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a chunk, the unit of placement: 16 MiB.
pub const CHUNK_BYTES: usize = 16 << 20;
/// Blocks of a chunk: 4,096.
pub const CHUNK_BLOCKS: usize = CHUNK_BYTES / BLOCK_BYTES;
/// Bytes of a segment, the unit of allocation in the MDS: 1 GiB.
pub const SEGMENT_BYTES: u64 = 1 << 30;
/// Chunks of a segment: 64.
pub const SEGMENT_CHUNKS: u32 = (SEGMENT_BYTES / CHUNK_BYTES as u64) as u32;
/// The longest payload of one log entry or one peer IO: 32 blocks, 128 KiB.
/// Longer requests are split at this size and at chunk boundaries.
pub const ENTRY_BLOCKS_MAX: usize = 32;
/// [`ENTRY_BLOCKS_MAX`] in bytes.
pub const ENTRY_BYTES_MAX: usize = ENTRY_BLOCKS_MAX * BLOCK_BYTES;
/// Most voters, and most learners, of a copyset.
pub const MEMBERS_MAX: usize = 7;

const _: () = assert!(CHUNK_BLOCKS == 4096);
const _: () = assert!(CHUNK_BYTES.is_multiple_of(ENTRY_BYTES_MAX));

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Archive, Serialize, Deserialize)]
        #[rkyv(derive(Debug))]
        pub struct $name(pub $inner);
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, concat!($tag, "{}"), self.0) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}", self.0) }
        }
    };
}

number!(
    /// A storage daemon. Given out by the MDS, never reused; 0 means none.
    TargetId(u32), "t");
number!(
    /// A Raft group.
    CopysetId(u32), "cs");
number!(
    /// A volume. Given out by the MDS, never reused, so a deleted volume's chunks can never be mistaken for a new one's.
    VolumeId(u32), "v");
number!(
    /// A Raft term.
    Term(u64), "T");
number!(
    /// Counts the exclusive attachments of a volume that ended others: what a host asks under a lower one than
    /// the volume's fence is refused. 0: never attached exclusively.
    SessionEpoch(u64), "E");
number!(
    /// A position in a copyset's Raft log. The first entry has index 1; 0 means "before the first".
    LogIndex(u64), "i");

impl LogIndex {
    /// The index after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
    /// The index before this one; stays at 0.
    pub fn prev(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// One shard (core) of one target: where a replica lives and what a peer connection reaches.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct ShardAddr {
    /// The target.
    pub target: TargetId,
    /// Index of the shard within it.
    pub shard: u16,
}

impl fmt::Debug for ShardAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}/{}", self.target.0, self.shard)
    }
}

/// One chunk of one volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct ChunkId {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// Its position in the volume: byte offset / [`CHUNK_BYTES`].
    pub index: u32,
}

impl ChunkId {
    /// The id as one number, volume in the upper half.
    pub fn pack(self) -> u64 {
        (u64::from(self.volume.0) << 32) | u64::from(self.index)
    }
    /// The inverse of [`ChunkId::pack`].
    pub fn unpack(packed: u64) -> Self {
        Self { volume: VolumeId((packed >> 32) as u32), index: packed as u32 }
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}.{}", self.volume.0, self.index)
    }
}

/// A run of blocks within one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block, 0 to 4,095.
    pub first: u16,
    /// How many, 1 to 4,096.
    pub count: u16,
}

impl BlockRange {
    /// A whole chunk.
    pub const CHUNK: Self = Self { first: 0, count: CHUNK_BLOCKS as u16 };
    /// A range that lies within a chunk, or `None`.
    pub fn new(first: usize, count: usize) -> Option<Self> {
        (count >= 1 && first < CHUNK_BLOCKS && count <= CHUNK_BLOCKS - first)
            .then_some(Self { first: first as u16, count: count as u16 })
    }
    /// Whether the range lies within a chunk; what came from a wire or a disk must be asked.
    pub fn is_valid(self) -> bool {
        Self::new(self.first.into(), self.count.into()).is_some()
    }
    /// One past the last block.
    pub fn end(self) -> usize {
        usize::from(self.first) + usize::from(self.count)
    }
    /// The blocks, in order.
    pub fn blocks(self) -> core::ops::Range<usize> {
        usize::from(self.first)..self.end()
    }
    /// Length in bytes.
    pub fn bytes(self) -> usize {
        usize::from(self.count) * BLOCK_BYTES
    }
    /// Whether the two share a block.
    pub fn overlaps(self, other: Self) -> bool {
        usize::from(self.first) < other.end() && usize::from(other.first) < self.end()
    }
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.first, self.count)
    }
}

/// A point on the monotonic clock, in nanoseconds; always passed in, never read by a core.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Time(pub u64);

/// A length of time in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Span(pub u64);

impl Span {
    /// So many milliseconds.
    pub const fn ms(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }
    /// So many microseconds.
    pub const fn us(us: u64) -> Self {
        Self(us * 1_000)
    }
}

impl Add<Span> for Time {
    type Output = Time;
    fn add(self, span: Span) -> Time {
        Time(self.0.saturating_add(span.0))
    }
}

impl Sub<Time> for Time {
    type Output = Span;
    fn sub(self, earlier: Time) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

/// The checksum of every block: CRC-32C (Castagnoli), as in iSCSI and NVMe/TCP digests. Once for each block
/// and IO, so by the faster of two crates (docs/benchmarks/micro.md); all else is short.
pub fn block_crc(block: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, block) as u32
}

/// A block's checksum as kept in tables at rest, where 0 means "never written, reads as
/// zeroes": a CRC that happens to be 0 is kept as 1.
pub fn crc_at_rest(crc: u32) -> u32 {
    crc.max(1)
}

/// The checksum that a block was kept under, where that is certain: 1 may stand for 0.
pub fn crc_from_rest(at_rest: u32) -> Option<u32> {
    (at_rest > 1).then_some(at_rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_checksum_of_iscsi_whatever_its_length() {
        // RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
        assert_eq!(block_crc(&[0; 32]), 0x8A91_36AA);
        assert_eq!(block_crc(&[0xff; 32]), 0x62A8_AB43);
        assert_eq!(block_crc(b"123456789"), 0xE306_9283);
        let data: Vec<u8> = (0..2 * BLOCK_BYTES).map(|at| (at * 31 % 251) as u8).collect();
        for (from, to) in
            [(0, 0), (0, 512), (3, 515), (0, BLOCK_BYTES), (1, BLOCK_BYTES + 1), (7, data.len())]
        {
            assert_eq!(block_crc(&data[from..to]), crc32c::crc32c(&data[from..to]), "{from}..{to}");
        }
    }
}
