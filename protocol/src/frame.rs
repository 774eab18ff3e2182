//! Frames of a peer link: a fixed header, a [`PeerMessage`] as rkyv, then block data.
//!
//! ```text
//! byte   0        4         6     8             10      12           16              20          24      28           32
//!        | "ASHP" | format | op  | op version  | zero  | meta bytes | payload bytes | meta crc  | zero  | header crc | meta | payload
//! ```
//!
//! Little-endian. The header's CRC-32C covers its bytes 0 to 27, the meta's covers the rkyv
//! bytes; block data is covered by the checksums inside the message, which whoever uses the
//! blocks verifies ([`crate::types::block_crc`]). Each operation has its own version.
//!
//! Invariants: nothing that arrives makes this module panic, or hold more than
//! [`META_BYTES_MAX`]; a message that comes out of [`decode_meta`] names only ranges, counts
//! and lengths within the limits, and its payload is exactly as long as the header told.
//!
//! Deliberately absent: any state of a link, and buffers for block data.

use crate::peer::{Fetch, Fetched, Hello, IoOp, IoOutcome, IoReply, IoRequest, PeerMessage};
use crate::raft::{Body, Kind, Members, Message};
use crate::types::{BLOCK_BYTES, BlockRange, CHUNK_BLOCKS, CHUNK_BYTES, ENTRY_BLOCKS_MAX, ENTRY_BYTES_MAX};
use rkyv::rancor::Failure;
use rkyv::util::AlignedVec;

/// `ASHP` as it stands on the wire.
pub const MAGIC: [u8; 4] = *b"ASHP";
/// Version of the header's layout.
pub const FORMAT: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 32;
/// Longest message without its payload: a list of 32,000 chunks and the fences of 16,000 volumes, or a chunk's
/// table (16 KiB), fits.
pub const META_BYTES_MAX: usize = 512 << 10;
/// Longest payload: an append is closed once it holds 1 MiB, so one more entry may be in it.
pub const PAYLOAD_BYTES_MAX: usize = (1 << 20) + ENTRY_BYTES_MAX;
/// Unit of offsets and lengths of a write.
pub const SECTOR_BYTES: u32 = 512;

const _: () = assert!(HEADER_BYTES == 32);
const _: () = assert!(CHUNK_BLOCKS * 4 + 1024 <= META_BYTES_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(BLOCK_BYTES));

/// What a frame carries; the number is on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u16)]
pub enum Op {
    /// [`PeerMessage::Hello`].
    Hello = 1,
    /// [`PeerMessage::Raft`].
    Raft = 2,
    /// [`PeerMessage::Io`].
    Io = 3,
    /// [`PeerMessage::IoReply`].
    IoReply = 4,
    /// [`PeerMessage::Fetch`].
    Fetch = 5,
    /// [`PeerMessage::Fetched`].
    Fetched = 6,
}

impl Op {
    /// Every operation.
    pub const ALL: [Op; 6] = [Op::Hello, Op::Raft, Op::Io, Op::IoReply, Op::Fetch, Op::Fetched];
    /// The version of its message that is spoken here; raised with every change of the message.
    pub const fn version(self) -> u16 {
        match self {
            // Fences came with 2. A message takes as much room as the largest one, so all have changed.
            Op::Hello | Op::Raft | Op::Io | Op::IoReply | Op::Fetch | Op::Fetched => 2,
        }
    }
    /// The operation that carries a message.
    pub fn of(message: &PeerMessage) -> Self {
        match message {
            PeerMessage::Hello(_) => Op::Hello,
            PeerMessage::Raft { .. } => Op::Raft,
            PeerMessage::Io(_) => Op::Io,
            PeerMessage::IoReply(_) => Op::IoReply,
            PeerMessage::Fetch { .. } => Op::Fetch,
            PeerMessage::Fetched { .. } => Op::Fetched,
        }
    }
    fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|op| *op as u16 == number)
    }
}

/// What is wrong with a frame. The link it came on cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Not a frame, or out of step.
    #[error("frame magic is {0:02x?}")]
    Magic([u8; 4]),
    /// The header was damaged.
    #[error("frame header fails its checksum")]
    HeaderCrc,
    /// A header of another layout: the peer runs another release.
    #[error("frame format {0}, this side speaks {FORMAT}")]
    Format(u16),
    /// An operation of a newer release.
    #[error("unknown frame operation {0}")]
    Op(u16),
    /// An operation of another release.
    #[error("{op:?} version {theirs}, this side speaks {}", .op.version())]
    Version {
        /// Which.
        op: Op,
        /// As told.
        theirs: u16,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the frame header are not zero")]
    Reserved,
    /// More than [`META_BYTES_MAX`].
    #[error("message of {0} bytes, more than {META_BYTES_MAX}")]
    MetaLength(u32),
    /// More than [`PAYLOAD_BYTES_MAX`].
    #[error("payload of {0} bytes, more than {PAYLOAD_BYTES_MAX}")]
    PayloadLength(u32),
    /// The message was damaged.
    #[error("message fails its checksum")]
    MetaCrc,
    /// Not a message, though undamaged: a bug of the sender.
    #[error("message is malformed")]
    Malformed,
    /// The message is another operation's.
    #[error("a {header:?} frame carries a {message:?} message")]
    Mismatch {
        /// As the header has it.
        header: Op,
        /// As the message has it.
        message: Op,
    },
    /// A range outside of a chunk, or longer than one entry.
    #[error("block range out of bounds")]
    Range,
    /// An offset or length that is no multiple of 512, or leaves its chunk.
    #[error("byte range out of bounds")]
    Extent,
    /// As many checksums as blocks, and as many blocks as the range has, or it is wrong.
    #[error("counts of blocks and checksums disagree")]
    Count,
    /// Entries of an append that do not follow each other.
    #[error("entries of an append are not consecutive")]
    Entries,
    /// A membership that names a target twice.
    #[error("membership is inconsistent")]
    Members,
    /// The message names another length than the header.
    #[error("payload is {header} bytes by the header and {message} by the message")]
    Payload {
        /// As the header has it.
        header: u32,
        /// As the message has it.
        message: u64,
    },
}

/// A header that passed its checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame carries.
    pub op: Op,
    /// Length of the message, at most [`META_BYTES_MAX`].
    pub meta_bytes: u32,
    /// Length of the payload, at most [`PAYLOAD_BYTES_MAX`].
    pub payload_bytes: u32,
    meta_crc: u32,
}

/// One buffer's worth of payload: it begins `lead` bytes into a buffer of whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Bytes of the first block before the payload; 0 but for writes that begin within a block.
    pub lead: u32,
    /// Length in bytes, at most [`ENTRY_BYTES_MAX`] less `lead`.
    pub bytes: u32,
}

impl Part {
    /// Blocks that the buffer needs.
    pub fn blocks(self) -> usize {
        ((self.lead + self.bytes) as usize).div_ceil(BLOCK_BYTES)
    }
}

/// Checks a header.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
    let magic = field(bytes, 0);
    if magic != MAGIC {
        return Err(FrameError::Magic(magic));
    }
    if u32_at(bytes, 28) != crc32c::crc32c(&bytes[..28]) {
        return Err(FrameError::HeaderCrc);
    }
    if u16_at(bytes, 4) != FORMAT {
        return Err(FrameError::Format(u16_at(bytes, 4)));
    }
    let op = Op::from_wire(u16_at(bytes, 6)).ok_or(FrameError::Op(u16_at(bytes, 6)))?;
    if u16_at(bytes, 8) != op.version() {
        return Err(FrameError::Version { op, theirs: u16_at(bytes, 8) });
    }
    if u16_at(bytes, 10) != 0 || u32_at(bytes, 24) != 0 {
        return Err(FrameError::Reserved);
    }
    let header = Header {
        op,
        meta_bytes: u32_at(bytes, 12),
        payload_bytes: u32_at(bytes, 16),
        meta_crc: u32_at(bytes, 20),
    };
    if header.meta_bytes as usize > META_BYTES_MAX {
        return Err(FrameError::MetaLength(header.meta_bytes));
    }
    if header.payload_bytes as usize > PAYLOAD_BYTES_MAX {
        return Err(FrameError::PayloadLength(header.payload_bytes));
    }
    Ok(header)
}

/// Checks a message and takes it out of its bytes. `meta` is the `meta_bytes` after the
/// header, aligned as [`MetaBuf`] is; `parts` is cleared and receives how the payload is laid out.
pub fn decode_meta(
    header: &Header,
    meta: &MetaBuf,
    parts: &mut Vec<Part>,
) -> Result<PeerMessage, FrameError> {
    assert_eq!(meta.len(), header.meta_bytes as usize, "the caller gathers the whole message first");
    if crc32c::crc32c(meta) != header.meta_crc {
        return Err(FrameError::MetaCrc);
    }
    let archived =
        rkyv::access::<rkyv::Archived<PeerMessage>, Failure>(meta).map_err(|_| FrameError::Malformed)?;
    let message = rkyv::deserialize::<PeerMessage, Failure>(archived).map_err(|_| FrameError::Malformed)?;
    if Op::of(&message) != header.op {
        return Err(FrameError::Mismatch { header: header.op, message: Op::of(&message) });
    }
    layout(&message, parts)?;
    let bytes = payload_bytes(parts);
    if bytes != u64::from(header.payload_bytes) {
        return Err(FrameError::Payload { header: header.payload_bytes, message: bytes });
    }
    Ok(message)
}

/// A buffer for received messages, aligned as rkyv wants it. Reused from frame to frame.
pub type MetaBuf = AlignedVec;

/// Writes headers and messages; reused so that nothing is allocated for a frame.
#[derive(Debug, Default)]
pub struct Encoder {
    scratch: AlignedVec,
    parts: Vec<Part>,
}

impl Encoder {
    /// An encoder.
    pub fn new() -> Self {
        Self::default()
    }
    /// Appends header and message to `out` and returns the bytes of payload that must follow.
    /// A message that its receiver would refuse is refused here too, with `out` unchanged.
    pub fn encode(&mut self, message: &PeerMessage, out: &mut Vec<u8>) -> Result<usize, FrameError> {
        layout(message, &mut self.parts)?;
        let payload = payload_bytes(&self.parts);
        if payload > PAYLOAD_BYTES_MAX as u64 {
            return Err(FrameError::PayloadLength(u32::try_from(payload).unwrap_or(u32::MAX)));
        }
        self.scratch.clear();
        let scratch = core::mem::take(&mut self.scratch);
        self.scratch = rkyv::api::high::to_bytes_in::<_, Failure>(message, scratch)
            .map_err(|_| FrameError::Malformed)?;
        if self.scratch.len() > META_BYTES_MAX {
            return Err(FrameError::MetaLength(u32::try_from(self.scratch.len()).unwrap_or(u32::MAX)));
        }
        out.extend_from_slice(&encode_header(Op::of(message), &self.scratch, payload as u32));
        out.extend_from_slice(&self.scratch);
        Ok(payload as usize)
    }
}

fn encode_header(op: Op, meta: &[u8], payload_bytes: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&FORMAT.to_le_bytes());
    header[6..8].copy_from_slice(&(op as u16).to_le_bytes());
    header[8..10].copy_from_slice(&op.version().to_le_bytes());
    header[12..16].copy_from_slice(&(meta.len() as u32).to_le_bytes());
    header[16..20].copy_from_slice(&payload_bytes.to_le_bytes());
    header[20..24].copy_from_slice(&crc32c::crc32c(meta).to_le_bytes());
    let crc = crc32c::crc32c(&header[..28]);
    header[28..32].copy_from_slice(&crc.to_le_bytes());
    header
}

fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], from: usize) -> [u8; N] {
    bytes[from..from + N].try_into().expect("N bytes")
}

fn u16_at(bytes: &[u8; HEADER_BYTES], from: usize) -> u16 {
    u16::from_le_bytes(field(bytes, from))
}

fn u32_at(bytes: &[u8; HEADER_BYTES], from: usize) -> u32 {
    u32::from_le_bytes(field(bytes, from))
}

fn payload_bytes(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.bytes)).sum()
}

/// Checks what a message says and lays out its payload: one part a buffer, in order.
pub fn layout(message: &PeerMessage, parts: &mut Vec<Part>) -> Result<(), FrameError> {
    parts.clear();
    match message {
        PeerMessage::Hello(Hello { .. }) => Ok(()),
        PeerMessage::Raft { message, crcs, .. } => raft_layout(message, crcs, parts),
        PeerMessage::Io(IoRequest { op, .. }) => io_layout(op, parts),
        PeerMessage::IoReply(IoReply { outcome, .. }) => outcome_layout(outcome, parts),
        PeerMessage::Fetch { fetch, .. } => match fetch {
            Fetch::Blocks { range, .. } => entry_range(*range),
            Fetch::Begin | Fetch::Table { .. } | Fetch::End => Ok(()),
        },
        PeerMessage::Fetched { fetched, .. } => fetched_layout(fetched, parts),
    }
}

fn raft_layout(message: &Message, crcs: &[u32], parts: &mut Vec<Part>) -> Result<(), FrameError> {
    let mut blocks = 0;
    if let Kind::Append { prev_index, entries, .. } = &message.kind {
        let mut before = prev_index.0;
        for entry in entries {
            if before.checked_add(1) != Some(entry.index.0) {
                return Err(FrameError::Entries);
            }
            before = entry.index.0;
            check_body(&entry.body)?;
            let of_entry = entry.body.payload_blocks();
            if of_entry > 0 {
                blocks += of_entry;
                parts.push(Part { lead: 0, bytes: (of_entry * BLOCK_BYTES) as u32 });
            }
        }
    }
    if crcs.len() == blocks { Ok(()) } else { Err(FrameError::Count) }
}

fn check_body(body: &Body) -> Result<(), FrameError> {
    match body {
        Body::Write { range, .. } => entry_range(*range),
        Body::Zero { range, .. } => range.is_valid().then_some(()).ok_or(FrameError::Range),
        Body::Members(members) => check_members(members),
        Body::Noop | Body::DropVolume { .. } | Body::Fence(_) => Ok(()),
    }
}

/// Nobody twice, and no gaps: what [`Members::new`] would have made.
fn check_members(members: &Members) -> Result<(), FrameError> {
    let voters: Vec<_> = members.voters().collect();
    let learners: Vec<_> = members.learners().collect();
    (Members::new(&voters, &learners) == Some(*members)).then_some(()).ok_or(FrameError::Members)
}

fn io_layout(op: &IoOp, parts: &mut Vec<Part>) -> Result<(), FrameError> {
    match *op {
        IoOp::WhoLeads | IoOp::Fence { .. } => Ok(()),
        IoOp::Read { range, .. } => entry_range(range),
        IoOp::Status { range, .. } => range.is_valid().then_some(()).ok_or(FrameError::Range),
        IoOp::Zero { offset, length, .. } => extent(offset, length),
        IoOp::Write { offset, length, .. } => {
            extent(offset, length)?;
            let part = Part { lead: offset % BLOCK_BYTES as u32, bytes: length };
            if length as usize > ENTRY_BYTES_MAX || part.blocks() > ENTRY_BLOCKS_MAX {
                return Err(FrameError::Extent);
            }
            parts.push(part);
            Ok(())
        }
    }
}

fn outcome_layout(outcome: &IoOutcome, parts: &mut Vec<Part>) -> Result<(), FrameError> {
    match outcome {
        IoOutcome::Data { present, crcs } => present_layout(*present, crcs, parts),
        IoOutcome::Status { runs } => {
            let blocks: usize = runs.iter().map(|run| usize::from(run.0)).sum();
            let some = runs.iter().all(|run| run.0 > 0);
            if some && (1..=CHUNK_BLOCKS).contains(&blocks) { Ok(()) } else { Err(FrameError::Count) }
        }
        IoOutcome::Done
        | IoOutcome::NotLeader { .. }
        | IoOutcome::UnknownCopyset
        | IoOutcome::NoSpace
        | IoOutcome::Invalid
        | IoOutcome::Corrupt
        | IoOutcome::Busy
        | IoOutcome::Fenced { .. } => Ok(()),
    }
}

fn fetched_layout(fetched: &Fetched, parts: &mut Vec<Part>) -> Result<(), FrameError> {
    match fetched {
        Fetched::Table { crcs, .. } if crcs.len() != CHUNK_BLOCKS => Err(FrameError::Count),
        Fetched::Blocks { range, present, crcs, .. } => {
            entry_range(*range)?;
            if u64::from(*present) >> range.count != 0 {
                return Err(FrameError::Count);
            }
            present_layout(*present, crcs, parts)
        }
        Fetched::Begin { members, .. } => check_members(members),
        Fetched::Table { .. } | Fetched::End { .. } | Fetched::Refused => Ok(()),
    }
}

/// The blocks of a bit map, in one buffer.
fn present_layout(present: u32, crcs: &[u32], parts: &mut Vec<Part>) -> Result<(), FrameError> {
    let blocks = present.count_ones();
    if crcs.len() != blocks as usize {
        return Err(FrameError::Count);
    }
    if blocks > 0 {
        parts.push(Part { lead: 0, bytes: blocks * BLOCK_BYTES as u32 });
    }
    Ok(())
}

fn entry_range(range: BlockRange) -> Result<(), FrameError> {
    let fits = range.is_valid() && usize::from(range.count) <= ENTRY_BLOCKS_MAX;
    fits.then_some(()).ok_or(FrameError::Range)
}

fn extent(offset: u32, length: u32) -> Result<(), FrameError> {
    let aligned = offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES);
    let inside = u64::from(offset) + u64::from(length) <= CHUNK_BYTES as u64;
    (length > 0 && aligned && inside).then_some(()).ok_or(FrameError::Extent)
}

#[cfg(test)]
mod tests;
