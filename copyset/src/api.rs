//! The words between a replica and its shard: configuration, recovered state, actions, refusals.

use core::ops::Range;
use protocol::raft::{Entry, HardState, Members, Message};
use protocol::types::{CopysetId, LogIndex, ShardAddr, Span, TargetId, Term};

/// How one replica behaves. The same in all replicas of a copyset, but for `me` and `seed`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The copyset; only for messages of assertions.
    pub id: CopysetId,
    /// The target this replica lives on.
    pub me: TargetId,
    /// The shortest election time-out; each wait is drawn from `election_timeout ..
    /// 2 * election_timeout`. Must be the same in all replicas: leases rest on it.
    pub election_timeout: Span,
    /// How often a leader is heard from; well below `election_timeout`.
    pub heartbeat: Span,
    /// Most entries in flight to one peer, and most entries proposed but not committed.
    pub window_entries: usize,
    /// Most payload bytes in flight to one peer, and proposed but not committed.
    pub window_bytes: usize,
    /// Most entries of one Append.
    pub entries_per_append_max: usize,
    /// Most payload bytes of one Append; one entry is always let through.
    pub append_bytes_max: usize,
    /// An idle group, all caught up, hibernates after this long; `Span(u64::MAX)` for never.
    pub hibernate_after: Span,
    /// Seed of election jitter and probe nonces. Must differ at every start of a replica.
    pub seed: u64,
    /// How far apart two clocks may run, in thousandths; a lease is shorter than
    /// `election_timeout` by as much.
    pub drift_permille: u64,
}

impl Config {
    /// The defaults of a dev cluster.
    pub fn new(id: CopysetId, me: TargetId, seed: u64) -> Self {
        Self {
            id,
            me,
            election_timeout: Span::ms(500),
            heartbeat: Span::ms(100),
            window_entries: 256,
            window_bytes: 8 << 20,
            entries_per_append_max: 64,
            append_bytes_max: 1 << 20,
            hibernate_after: Span::ms(10_000),
            seed,
            drift_permille: 100,
        }
    }
}

/// How far a replica may be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    /// Log and state are complete.
    Whole,
    /// A chunk catch-up is under way: it votes by its log, does not campaign, and is not counted.
    Installing,
    /// The durable log was found damaged: it neither votes nor is counted until it has heard the
    /// term of every other voter and holds all that the leader held after that.
    Damaged,
}

/// What a shard found on its disk, or the state of a new replica.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The last durable hard state; the default for a new replica.
    pub hard: HardState,
    /// The last entry that is no longer in the log.
    pub floor: (LogIndex, Term),
    /// The membership as of the floor; members entries of `entries` come on top.
    /// Empty for a replica that is to be added to a running copyset.
    pub members: Members,
    /// The entries after the floor, without a gap.
    pub entries: Vec<Entry>,
    /// The state of the shard holds everything up to here, surely committed; at least the floor.
    pub applied: LogIndex,
    /// [`Health::Installing`] begins the catch-up anew.
    pub health: Health,
}

/// What part a replica plays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks whether it could win an election.
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
}

/// What the shard must do, in the order in which it is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Write to the log, in the order of tickets; then call [`crate::Replica::durable`].
    /// First drop all entries from `truncate_from` on, then append `entries` (read by
    /// [`crate::Replica::entry`], payloads from the shard's own table).
    Persist {
        /// Counts up by one.
        ticket: u64,
        /// The new term and vote, if changed.
        hard: Option<HardState>,
        /// Logical cut of entries that an earlier `Persist` wrote (or recovery found).
        truncate_from: Option<LogIndex>,
        /// Half open; may be empty.
        entries: Range<LogIndex>,
    },
    /// Send. An Append's payloads are added by the shard, by index.
    Send {
        /// To whom.
        to: ShardAddr,
        /// What.
        message: Message,
    },
    /// Apply all entries after the last applied up to here, then call [`crate::Replica::applied`].
    /// They are committed and durable here.
    Commit {
        /// The last entry to apply.
        up_to: LogIndex,
    },
    /// The read may be served from the applied state.
    ReadReady {
        /// As given to [`crate::Replica::read`].
        token: u64,
    },
    /// The read cannot be served here; leadership was lost.
    ReadAborted {
        /// As given to [`crate::Replica::read`].
        token: u64,
    },
    /// Role, term or leader changed. On losing leadership, what was proposed but not applied may or
    /// may not commit later: whoever waits for an index must compare the entry's term.
    Role {
        /// The part played now.
        role: Role,
        /// The term.
        term: Term,
        /// Who leads in it, if known.
        leader: Option<ShardAddr>,
    },
    /// The log of the leader no longer reaches back to this replica: call
    /// [`crate::Replica::install_begin`] and fetch chunks from `from`. Comes again from time to time,
    /// and whenever the leader changes, until [`crate::Replica::install_finish`] is called.
    Install {
        /// The leader.
        from: ShardAddr,
    },
    /// Health changed; to be persisted (before any chunk is overwritten, for `Installing`).
    Health {
        /// The new one.
        health: Health,
    },
}

/// How a read may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadGrant {
    /// Read the applied state now, before handling any other event.
    Now,
    /// [`Action::ReadReady`] or [`Action::ReadAborted`] will come for the token.
    Later,
}

/// Why a replica does not do as asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// Another replica leads, or nobody.
    #[error("not the leader in term {term}")]
    NotLeader {
        /// Who, if known.
        leader: Option<ShardAddr>,
        /// In which term.
        term: Term,
    },
    /// Too much is in flight, leadership is being handed over, or an earlier membership change is
    /// not committed yet; try again later.
    #[error("busy, try again later")]
    Busy,
    /// It makes no sense: more than one voter changes, no voter is left, the target does not vote.
    #[error("the request makes no sense")]
    Invalid,
}

/// How far a peer is behind, as its leader knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lag {
    /// The peer.
    pub peer: ShardAddr,
    /// Whether it votes.
    pub voter: bool,
    /// Entries that it has not acknowledged as durable.
    pub entries: u64,
    /// It waits for, or is in, a chunk catch-up.
    pub installing: bool,
    /// It was heard from within an election time-out.
    pub alive: bool,
}
