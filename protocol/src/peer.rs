//! What shards say to each other over a peer link: Raft, forwarded IO and chunk catch-up.
//!
//! A message is small and travels as rkyv; block data travels behind it, never inside (see `frame`).

// The rkyv derives make archived twins whose fields cannot carry docs.
#![allow(missing_docs)]

use crate::raft::{Fence, Members, Message};
use crate::types::{BlockRange, ChunkId, CopysetId, LogIndex, SessionEpoch, ShardAddr, Term, VolumeId};
use rkyv::{Archive, Deserialize, Serialize};
use smallvec::SmallVec;

/// One CRC-32C a block; those of short ranges stay off the heap.
pub type Crcs = SmallVec<[u32; 8]>;

/// One message on a peer link.
#[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
pub enum PeerMessage {
    /// The first message on a link, both ways.
    Hello(Hello),
    /// Between replicas of one copyset. Payload: the blocks of its `Write` entries, in order.
    Raft {
        copyset: CopysetId,
        message: Message,
        /// CRC-32C of each payload block.
        crcs: Crcs,
    },
    /// IO for a copyset's leader. Payload of a write: `length` bytes.
    Io(IoRequest),
    /// The answer. Payload of a read: the blocks named in `present`, in order.
    IoReply(IoReply),
    /// Chunk catch-up and repair, asked by the replica that lacks data.
    Fetch { copyset: CopysetId, fetch: Fetch },
    /// The answer. Payload of `Fetched::Blocks`: the blocks named in `present`, in order.
    Fetched { copyset: CopysetId, fetched: Fetched },
}

/// Who is on the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Hello {
    /// The cluster both must belong to.
    pub cluster: [u8; 16],
    /// The sender.
    pub from: ShardAddr,
    /// Whom it means to reach.
    pub to: ShardAddr,
    /// Changes with every start of the sender. A new link from the same shard replaces the old one.
    pub incarnation: u64,
}

/// One piece of IO on one chunk, at most [`crate::types::ENTRY_BYTES_MAX`] long.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct IoRequest {
    /// Chosen by the sender, told back in the reply.
    pub id: u64,
    pub copyset: CopysetId,
    /// The term of the leader that the sender believes in; another term's leader refuses.
    pub term: Term,
    /// Under which the host is attached to the volume; a lower one than the volume's fence is refused.
    pub epoch: SessionEpoch,
    pub op: IoOp,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum IoOp {
    /// Who leads? Answered by every replica with [`IoOutcome::NotLeader`], the leader naming itself.
    WhoLeads,
    /// Read whole blocks.
    Read { chunk: ChunkId, range: BlockRange },
    /// Write `length` bytes at byte `offset` of the chunk, multiples of 512.
    Write {
        chunk: ChunkId,
        offset: u32,
        length: u32,
        /// CRC-32C of the payload as sent.
        crc: u32,
    },
    /// Make `length` bytes at byte `offset` read as zeroes; up to the end of the chunk.
    Zero { chunk: ChunkId, offset: u32, length: u32 },
    /// Which blocks hold data? Answered by [`IoOutcome::Status`].
    Status { chunk: ChunkId, range: BlockRange },
    /// Let nothing of a lower epoch than the request's through any more. Done once that is committed.
    Fence { volume: VolumeId },
}

/// The answer to an [`IoRequest`].
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct IoReply {
    pub id: u64,
    pub copyset: CopysetId,
    pub outcome: IoOutcome,
}

/// How an IO ended.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum IoOutcome {
    /// Written or zeroed: durable on a quorum and visible to every later read.
    Done,
    /// Read. Bit n of `present` says that block n of the range travels as payload; the others are zeroes.
    Data {
        present: u32,
        /// CRC-32C of each block that is present.
        crcs: Crcs,
    },
    /// Runs of the asked range as (blocks, holds data), in order, adding up to its length.
    Status { runs: Vec<(u16, bool)> },
    /// Not done here; ask `leader`, if known, with `term`.
    NotLeader { leader: Option<ShardAddr>, term: Term },
    /// Not done here: the replica knows nothing of the copyset (its map may be older).
    UnknownCopyset,
    /// Not done: a needed chunk slot cannot be had on some replica.
    NoSpace,
    /// Not done: the request makes no sense (range, alignment); a bug of the sender.
    Invalid,
    /// Not done: no copy of the data passes its checksum.
    Corrupt,
    /// Not done: too much in flight here; send it again a little later.
    Busy,
    /// Not done, and never to be: the volume was taken over, its fence is at `epoch`; or it is being freed.
    Fenced { epoch: SessionEpoch },
}

/// What a replica that lacks data asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum Fetch {
    /// Begin a chunk catch-up: which chunks are there, as of which index?
    Begin,
    /// The checksums of one chunk.
    Table { chunk: ChunkId },
    /// Blocks, as they are now, if their checksums are still as told.
    Blocks { chunk: ChunkId, range: BlockRange },
    /// All is fetched: up to which index may what was fetched be?
    End,
}

/// The answer to a [`Fetch`].
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum Fetched {
    /// The state as of `index` is spread over these chunks.
    /// Fences are those of its volumes.
    Begin { index: LogIndex, term: Term, members: Members, fences: Vec<Fence>, chunks: Vec<ChunkId> },
    /// One value a block, 0 where the block was never written (see `types::crc_at_rest`).
    Table { chunk: ChunkId, crcs: Vec<u32> },
    /// The blocks, as in [`IoOutcome::Data`].
    Blocks { chunk: ChunkId, range: BlockRange, present: u32, crcs: Vec<u32> },
    /// Everything fetched is at most this new.
    End { index: LogIndex },
    /// Refused: not the leader, or the copyset is unknown here. Begin again elsewhere.
    Refused,
}
