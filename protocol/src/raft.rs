//! What the replicas of a copyset say to each other.
//!
//! Entries are small descriptors; their payloads (block data) travel and rest beside them.

// The rkyv derives make archived twins whose fields cannot carry docs.
#![allow(missing_docs)]

use crate::types::{
    BlockRange, ChunkId, LogIndex, MEMBERS_MAX, SessionEpoch, ShardAddr, TargetId, Term, VolumeId,
};
use rkyv::{Archive, Deserialize, Serialize};
use smallvec::SmallVec;

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

/// Entries of one message: one, as a rule, which then is not on the heap.
pub type Entries = SmallVec<[Entry; 1]>;

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
    /// Refuse what is asked of a volume under a lower epoch. No payload.
    Fence(Fence),
}

/// A volume's fence in a copyset: nothing behind it in the log was asked under a lower epoch. Only rises.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Archive, Serialize, Deserialize)]
pub struct Fence {
    /// The volume.
    pub volume: VolumeId,
    /// The lowest epoch that is let through.
    pub epoch: SessionEpoch,
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

/// The fences of a copyset, one a volume that was ever attached exclusively; all others are at epoch 0.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Fences(Vec<Fence>);

impl Fences {
    /// The lowest epoch that a volume's fence lets through.
    pub fn of(&self, volume: VolumeId) -> SessionEpoch {
        match self.find(volume) {
            Ok(at) => self.0[at].epoch,
            Err(_) => SessionEpoch(0),
        }
    }
    /// Raises a volume's fence; one that is as high stays.
    pub fn raise(&mut self, fence: Fence) {
        match self.find(fence.volume) {
            Ok(at) => self.0[at].epoch = self.0[at].epoch.max(fence.epoch),
            Err(_) if fence.epoch == SessionEpoch(0) => {}
            Err(at) => self.0.insert(at, fence),
        }
    }
    /// The volume is gone, and its id is never given out again.
    pub fn forget(&mut self, volume: VolumeId) {
        if let Ok(at) = self.find(volume) {
            self.0.remove(at);
        }
    }
    /// All, in order of volume.
    pub fn as_slice(&self) -> &[Fence] {
        &self.0
    }
    fn find(&self, volume: VolumeId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&volume, |fence| fence.volume)
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

/// What replicas of a copyset send each other. A message leaves only once its sender's `term` is durable.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Message {
    /// The sender's term.
    pub term: Term,
    /// What it says.
    pub kind: Kind,
}

/// The messages, requests beside their replies.
#[derive(Clone, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum Kind {
    /// Would you vote for me in term `campaign`? Changes nothing on either side.
    PreVote {
        campaign: Term,
        last_index: LogIndex,
        last_term: Term,
    },
    PreVoteReply {
        campaign: Term,
        granted: bool,
    },
    /// Vote for me in the message's term. `transfer` is the round told in [`Kind::TimeoutNow`]: a
    /// follower that heard no later round from that leader need not wait for its lease to end.
    Vote {
        last_index: LogIndex,
        last_term: Term,
        transfer: Option<u64>,
    },
    VoteReply {
        granted: bool,
    },
    /// Entries after `prev_index`; the blocks of its `Write` entries travel beside the message.
    Append {
        round: Round,
        prev_index: LogIndex,
        prev_term: Term,
        commit: LogIndex,
        entries: Entries,
    },
    AppendReply {
        round: Round,
        standing: Standing,
        outcome: AppendOutcome,
    },
    /// I lead. `sleep` asks to hibernate, `install` says that the log no longer
    /// reaches back to the receiver, but only to after that index.
    Heartbeat {
        round: Round,
        commit: LogIndex,
        sleep: bool,
        install: Option<LogIndex>,
    },
    /// `accepted`: the log is known to agree with the leader's this far; `durable`: and is durable
    /// this far; `last`: it goes on, agreeing or not, this far.
    HeartbeatReply {
        round: Round,
        standing: Standing,
        accepted: LogIndex,
        durable: LogIndex,
        last: LogIndex,
        asleep: bool,
    },
    /// Campaign at once: leadership is handed over. `round` is the last one the leader sent to anybody.
    TimeoutNow {
        round: u64,
    },
    /// Asked by a replica with a damaged log: what is your term?
    Probe {
        nonce: u64,
    },
    /// The term is the message's; `last` counts only when `leads`.
    ProbeReply {
        nonce: u64,
        leads: bool,
        last: LogIndex,
    },
}

/// Stamp of a leader's message, told back in the reply: the leader learns from it that its
/// followers followed it at `sent`, by its own clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Archive, Serialize, Deserialize)]
pub struct Round {
    /// Counts up within the leader's term.
    pub number: u64,
    /// The leader's clock when it was sent, in nanoseconds.
    pub sent_ns: u64,
}

/// For what a reply may be counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub struct Standing {
    /// Its durable entries count towards commit: the replica is whole.
    pub counts: bool,
    /// The round counts towards leases and read confirmations: its term can be trusted.
    pub confirms: bool,
    /// It takes no entries until a chunk catch-up is done.
    pub needs_install: bool,
}

/// How an append went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Archive, Serialize, Deserialize)]
pub enum AppendOutcome {
    /// The log agrees with the leader's up to here, and is durable.
    Matched { up_to: LogIndex },
    /// `prev` does not match. It may match at `hint` or before: the last entry not after
    /// `prev` whose term is at most the asked one, `hint_term`. Of a replica that needs a chunk
    /// catch-up: the last entry that it knows to be committed.
    Rejected { prev: LogIndex, hint: LogIndex, hint_term: Term },
}
