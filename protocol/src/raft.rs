//! What the replicas of a copyset say to each other.
//!
//! Entries are small descriptors; their payloads (block data) travel and rest beside them.

// The rkyv derives make archived twins whose fields cannot carry docs.
#![allow(missing_docs)]

use crate::types::{BlockRange, ChunkId, LogIndex, MEMBERS_MAX, ShardAddr, TargetId, Term, VolumeId};
use rkyv::{Archive, Deserialize, Serialize};

/// One entry of a copyset's Raft log, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Entry {
    /// Term of the leader that proposed it.
    pub term: Term,
    /// Its place in the log.
    pub index: LogIndex,
    /// What it does when applied.
    pub body: Body,
}

/// What an entry does when it is applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum Body {
    /// Nothing; a new leader's first entry.
    Noop,
    /// Overwrite blocks. Its payload is `range.bytes()` long, with one CRC-32C a block; at most
    /// [`crate::types::ENTRY_BLOCKS_MAX`] blocks.
    Write {
        /// Where.
        chunk: ChunkId,
        /// Which blocks.
        range: BlockRange,
    },
    /// Make blocks read as zeroes (trim and write-zeroes). No payload.
    Zero {
        /// Where.
        chunk: ChunkId,
        /// Which blocks.
        range: BlockRange,
    },
    /// Free every chunk of a deleted volume. No payload.
    DropVolume {
        /// The volume; its id is never given out again.
        volume: VolumeId,
    },
    /// Change the membership; in force as soon as it is in the log (Raft dissertation, 4.1).
    Members(Members),
}

impl Body {
    /// Blocks of payload that travel with the entry.
    pub fn payload_blocks(&self) -> usize {
        match self {
            Body::Write { range, .. } => range.count.into(),
            _ => 0,
        }
    }
}

/// One replica's place.
pub type Member = ShardAddr;

/// The membership of a copyset. A replica is named by its target: a target holds at most one of a copyset.
#[derive(Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize, Default)]
pub struct Members {
    voters: [Option<Member>; MEMBERS_MAX],
    learners: [Option<Member>; MEMBERS_MAX],
}

impl Members {
    /// A membership of these voters and learners; `None` when a target is named twice or there are too many.
    pub fn new(voters: &[Member], learners: &[Member]) -> Option<Self> {
        if voters.len() > MEMBERS_MAX || learners.len() > MEMBERS_MAX {
            return None;
        }
        let all = || voters.iter().chain(learners);
        if all().enumerate().any(|(at, m)| all().skip(at + 1).any(|other| other.target == m.target)) {
            return None;
        }
        let mut members = Self::default();
        for (place, m) in members.voters.iter_mut().zip(voters) {
            *place = Some(*m);
        }
        for (place, m) in members.learners.iter_mut().zip(learners) {
            *place = Some(*m);
        }
        Some(members)
    }
    /// Who votes.
    pub fn voters(&self) -> impl Iterator<Item = Member> + Clone + '_ {
        self.voters.iter().flatten().copied()
    }
    /// Who only listens.
    pub fn learners(&self) -> impl Iterator<Item = Member> + Clone + '_ {
        self.learners.iter().flatten().copied()
    }
    /// Everyone.
    pub fn all(&self) -> impl Iterator<Item = Member> + Clone + '_ {
        self.voters().chain(self.learners())
    }
    /// Whether the target votes.
    pub fn is_voter(&self, target: TargetId) -> bool {
        self.voters().any(|m| m.target == target)
    }
    /// The place of a target's replica.
    pub fn find(&self, target: TargetId) -> Option<Member> {
        self.all().find(|m| m.target == target)
    }
}

impl core::fmt::Debug for Members {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.voters()).finish()?;
        if self.learners().next().is_some() {
            f.write_str("+")?;
            f.debug_list().entries(self.learners()).finish()?;
        }
        Ok(())
    }
}

/// What must survive a restart besides the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Archive, Serialize, Deserialize)]
pub struct HardState {
    /// The latest term this replica has seen.
    pub term: Term,
    /// Whom it voted for in that term.
    pub vote: Option<TargetId>,
}

/// What replicas of a copyset send each other.
#[derive(Clone, PartialEq, Debug, Archive, Serialize, Deserialize)]
pub struct Message {
    /// The sender's term.
    pub term: Term,
}
