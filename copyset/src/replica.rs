//! One replica: its state, the events it takes, the actions it gives.
//!
//! What a leader does is in `replication`, what a follower does in `follow`, and so on; here is
//! what they share: terms, messages held back until durable, and the order of actions.

use crate::api::*;
use crate::health::{Damage, Install};
use crate::log::Log;
use crate::progress::Progress;
use crate::queue::pop_front_if;
use crate::read::PendingRead;
use crate::replication::Transfer;
use crate::rng::Rng;
use arrayvec::ArrayVec;
use core::ops::Range;
use protocol::raft::{Body, Entry, HardState, Kind, Members, Message, Round};
use protocol::types::{BLOCK_BYTES, LogIndex, MEMBERS_MAX, ShardAddr, TargetId, Term, Time};
use std::collections::VecDeque;

/// Most peers: voters and learners.
pub(crate) const PEERS_MAX: usize = 2 * MEMBERS_MAX;
/// Most messages held back until a write is durable; more are dropped, as a network may.
const HELD_MAX: usize = 64;
/// No cluster gets there; a message that claims it would leave no room to count on.
const TERM_MAX: Term = Term(u64::MAX / 2);

/// One replica of one copyset.
///
/// Give it an event with the time, then call [`Replica::poll`] until it has no more actions,
/// then the next event. `now` must be read from the clock after the event came in: a lease is
/// judged by it, so a stale time could grant a read too late.
#[derive(Clone)]
pub struct Replica {
    pub(crate) config: Config,
    pub(crate) now: Time,
    pub(crate) rng: Rng,

    pub(crate) hard: HardState,
    hard_dirty: bool,
    /// The write that makes the present hard state durable.
    hard_ticket: u64,
    next_ticket: u64,
    durable_ticket: u64,

    pub(crate) log: Log,
    pub(crate) base_members: Members,
    pub(crate) members: Members,
    /// Where the log changes the membership.
    pub(crate) changes: Vec<LogIndex>,

    pub(crate) role: Role,
    pub(crate) leader: Option<ShardAddr>,
    pub(crate) commit: LogIndex,
    pub(crate) commit_told: LogIndex,
    pub(crate) applied: LogIndex,

    /// When to look for a new leader; `None` while leading or hibernating.
    pub(crate) election_due: Option<Time>,
    /// When a leader was last heard: no vote for another until an election time-out later.
    pub(crate) contact: Option<Time>,
    /// No vote before this: a lease may rest on what this replica promised before a restart.
    pub(crate) withhold_until: Time,
    pub(crate) votes: ArrayVec<TargetId, PEERS_MAX>,

    /// Follower: the log agrees with the leader's up to here.
    pub(crate) verified: LogIndex,
    pub(crate) leader_commit: LogIndex,
    pub(crate) heard: Round,
    /// Acknowledged to the leader of this term up to here.
    pub(crate) acked: LogIndex,
    pub(crate) asleep: bool,

    /// Leader: everybody else.
    pub(crate) peers: ArrayVec<Progress, PEERS_MAX>,
    pub(crate) round: u64,
    pub(crate) beat: bool,
    pub(crate) beat_due: Time,
    pub(crate) pump: bool,
    pub(crate) first_index: LogIndex,
    pub(crate) uncommitted_blocks: usize,
    pub(crate) idle_since: Time,
    /// The first round that asked everybody to hibernate, unless something happened since.
    pub(crate) sleep_since: Option<u64>,
    pub(crate) transfer: Option<Transfer>,
    /// Rounds up to this one hold up no lease.
    pub(crate) lease_after: u64,
    pub(crate) reads: VecDeque<PendingRead>,

    pub(crate) damage: Option<Damage>,
    pub(crate) install: Install,
    pub(crate) install_told: Option<(ShardAddr, Time)>,

    pub(crate) out: VecDeque<Action>,
    held: VecDeque<(u64, ShardAddr, Message)>,
    role_told: (Role, Term, Option<ShardAddr>),
    health_told: Health,
    pub(crate) violations: u64,
}

impl Replica {
    /// A replica as recovered. One that took part before withholds its vote for an election
    /// time-out, since a leader may hold a lease that rests on its promise. A damaged one must
    /// have [`Replica::install_begin`] called at once if its chunks were being overwritten.
    pub fn new(config: Config, recovered: Recovered, now: Time) -> Self {
        let Recovered { hard, floor, members, entries, applied, health } = recovered;
        assert!(config.drift_permille < 1000 && config.heartbeat < config.election_timeout);
        assert!(config.window_entries > 0 && config.window_bytes > 0);
        let fresh = hard == HardState::default() && floor.0.0 == 0 && entries.is_empty();
        let withhold_until = if fresh { now } else { now + config.election_timeout };
        let log = Log::new(floor, entries);
        let last = log.last();
        assert!(floor.0 <= applied && applied <= last.0, "applied outside of the log");
        let term = hard.term.max(last.1);
        let hard = if term == hard.term { hard } else { HardState { term, vote: None } };
        let rng = Rng::new(config.seed ^ (u64::from(config.me.0) << 40) ^ u64::from(config.id.0));
        let mut replica = Self {
            now,
            rng,
            hard,
            hard_dirty: false,
            hard_ticket: 0,
            next_ticket: 1,
            durable_ticket: 0,
            log,
            base_members: members,
            members,
            changes: Vec::new(),
            role: Role::Follower,
            leader: None,
            commit: applied,
            commit_told: applied,
            applied,
            election_due: None,
            contact: None,
            withhold_until,
            votes: ArrayVec::new(),
            verified: applied,
            leader_commit: LogIndex(0),
            heard: Round::default(),
            acked: LogIndex(0),
            asleep: false,
            peers: ArrayVec::new(),
            round: 0,
            beat: false,
            beat_due: now,
            pump: false,
            first_index: LogIndex(0),
            uncommitted_blocks: 0,
            idle_since: now,
            sleep_since: None,
            transfer: None,
            lease_after: 0,
            reads: VecDeque::new(),
            damage: None,
            install: if health == Health::Installing { Install::Running } else { Install::No },
            install_told: None,
            out: VecDeque::new(),
            held: VecDeque::new(),
            role_told: (Role::Follower, term, None),
            health_told: health,
            violations: 0,
            config,
        };
        replica.scan_members();
        replica.reset_election();
        if health == Health::Damaged {
            replica.begin_damage();
        }
        replica.check();
        replica
    }

    /// Takes a message from a peer and returns which entries of it are new here: those whose
    /// payloads the shard must keep, since the next [`Action::Persist`] names them. Empty for all
    /// but an Append; entries of an Append outside of the range were there already or are refused.
    /// Entries that were at the same indices before are gone; their payloads are to be dropped.
    ///
    /// What makes no sense is ignored and counted in [`Replica::violations`].
    pub fn handle(&mut self, from: ShardAddr, message: Message, now: Time) -> Range<LogIndex> {
        self.observe(now);
        let fresh = self.dispatch(from, message);
        self.settle();
        fresh
    }

    fn dispatch(&mut self, from: ShardAddr, message: Message) -> Range<LogIndex> {
        let nothing = LogIndex(0)..LogIndex(0);
        let Message { term, kind } = message;
        if from.target == self.config.me || term > TERM_MAX {
            self.violations += 1;
            return nothing;
        }
        match kind {
            Kind::PreVote { campaign, last_index, last_term } => {
                self.on_pre_vote(from, term, campaign, (last_term, last_index));
                return nothing;
            }
            Kind::Vote { last_index, last_term, transfer } => {
                self.on_vote(from, term, (last_term, last_index), transfer);
                return nothing;
            }
            _ => {}
        }
        let leads = matches!(kind, Kind::Append { .. } | Kind::Heartbeat { .. } | Kind::TimeoutNow { .. });
        if !leads && self.members.find(from.target).is_none() {
            return nothing; // Only a leader may be unknown here: this log may not reach to its membership.
        }
        if term > self.hard.term {
            self.become_follower(term, None);
        }
        if term < self.hard.term {
            self.answer_stale(from, kind);
            return nothing;
        }
        match kind {
            Kind::PreVote { .. } | Kind::Vote { .. } => unreachable!("handled above"),
            Kind::PreVoteReply { campaign, granted } => self.on_pre_vote_reply(from, campaign, granted),
            Kind::VoteReply { granted } => self.on_vote_reply(from, granted),
            Kind::Append { round, prev_index, prev_term, commit, entries } => {
                return self.on_append(from, round, (prev_index, prev_term), commit, entries);
            }
            Kind::Heartbeat { round, commit, sleep, install } => {
                self.on_heartbeat(from, round, commit, sleep, install);
            }
            Kind::TimeoutNow { round } => self.on_timeout_now(from, round),
            Kind::AppendReply { round, standing, outcome } => {
                self.on_append_reply(from, round, standing, outcome);
            }
            Kind::HeartbeatReply { round, standing, accepted, durable, last, asleep } => {
                self.on_heartbeat_reply(from, round, standing, [accepted, durable, last], asleep);
            }
            Kind::Probe { nonce } => self.answer_probe(from, nonce),
            Kind::ProbeReply { nonce, leads, last } => self.on_probe_reply(from, nonce, leads, last),
        }
        nothing
    }

    /// Tells a stale sender the present term, where that helps it: a deposed leader, or a replica
    /// that asks for terms. Round 0 is none: the sender may lead again, in the very term that it is told
    /// here, when the answer arrives, and would take a round of its past for one of the present.
    fn answer_stale(&mut self, from: ShardAddr, kind: Kind) {
        match kind {
            Kind::Append { .. } | Kind::Heartbeat { .. } => self.answer_beat(from, Round::default()),
            Kind::Probe { nonce } => self.answer_probe(from, nonce),
            _ => {}
        }
    }

    /// Lets time pass; to be called at [`Replica::next_timeout`], or any time.
    pub fn tick(&mut self, now: Time) {
        self.observe(now);
        match self.role {
            Role::Leader => self.tick_leader(),
            _ => self.tick_election(),
        }
        self.tick_damage();
        self.settle();
    }

    /// When [`Replica::tick`] must be called at the latest; `None` while hibernating.
    pub fn next_timeout(&self) -> Option<Time> {
        let damage = self.damage.as_ref().map(|d| d.due);
        let role = match self.role {
            Role::Leader if self.asleep => None,
            Role::Leader => Some(self.transfer.as_ref().map_or(self.beat_due, |t| t.due.min(self.beat_due))),
            _ => self.election_due,
        };
        [damage, role].into_iter().flatten().min()
    }

    /// Appends an entry to the log of the copyset and returns its index. It is done once
    /// [`Action::Commit`] covers that index while the entry there still has this term.
    /// [`Refused::Busy`] when too much is uncommitted or leadership is being handed over.
    pub fn propose(&mut self, body: Body, now: Time) -> Result<LogIndex, Refused> {
        self.observe(now);
        self.refuse_unless_leader()?;
        if matches!(body, Body::Members(_)) || !crate::follow::is_sound(&body) {
            return Err(Refused::Invalid);
        }
        let waiting = self.log.last().0.0 - self.commit.0;
        let blocks = self.uncommitted_blocks + body.payload_blocks();
        if self.transfer.is_some()
            || waiting >= self.config.window_entries as u64
            || (waiting > 0 && blocks * BLOCK_BYTES > self.config.window_bytes)
        {
            return Err(Refused::Busy);
        }
        self.stir();
        let index = self.append_own(body);
        self.settle();
        Ok(index)
    }

    pub(crate) fn refuse_unless_leader(&self) -> Result<(), Refused> {
        match self.role {
            Role::Leader => Ok(()),
            _ => Err(Refused::NotLeader { leader: self.leader, term: self.hard.term }),
        }
    }

    /// All [`Action::Persist`] up to this ticket are on disk.
    pub fn durable(&mut self, ticket: u64) {
        assert!(ticket < self.next_ticket, "durable before it was told to persist");
        self.durable_ticket = self.durable_ticket.max(ticket);
        self.log.durable(ticket);
        while let Some((_, to, message)) = pop_front_if(&mut self.held, |(t, ..)| *t <= self.durable_ticket) {
            if message.term == self.hard.term {
                self.out.push_back(Action::Send { to, message });
            }
        }
        match self.role {
            Role::Candidate if self.is_hard_durable() => self.count_vote(self.config.me),
            Role::Leader => self.advance_commit(),
            _ => self.acknowledge(),
        }
        self.settle();
    }

    /// The shard has applied everything up to here, as told by [`Action::Commit`].
    pub fn applied(&mut self, index: LogIndex) {
        assert!(index <= self.commit_told, "applied what was not handed out");
        self.applied = self.applied.max(index);
        self.settle();
    }

    /// Whether a chunk catch-up is under way, as [`Replica::install_begin`] said.
    pub fn is_installing(&self) -> bool {
        self.install == Install::Running
    }

    /// Drops entries up to `floor`, which must be applied. A peer that still needs them gets them
    /// by chunk catch-up.
    pub fn compact(&mut self, floor: LogIndex) {
        assert!(floor <= self.applied, "compaction beyond what is applied");
        assert!(self.install != Install::Running, "compaction amid a catch-up");
        if floor > self.log.floor().0 {
            self.compact_members(floor);
            self.log.compact(floor);
        }
        self.settle();
    }

    /// Ends hibernation: a client asks, or the link to the leader was lost. A leader makes itself
    /// heard at once, a follower's election timer runs again. Otherwise without effect.
    pub fn wake(&mut self, now: Time) {
        self.observe(now);
        self.rouse();
        self.settle();
    }

    pub(crate) fn rouse(&mut self) {
        if !self.asleep {
            return;
        }
        self.asleep = false;
        match self.role {
            Role::Leader => self.wake_leader(),
            _ => self.reset_election(),
        }
    }

    /// The next thing to do; `None` when the next event may come.
    pub fn poll(&mut self) -> Option<Action> {
        loop {
            if let Some(persist) = self.take_persist() {
                return Some(persist);
            }
            let role = (self.role, self.hard.term, self.leader);
            if role != self.role_told {
                self.role_told = role;
                return Some(Action::Role { role: role.0, term: role.1, leader: role.2 });
            }
            if self.health() != self.health_told {
                self.health_told = self.health();
                return Some(Action::Health { health: self.health_told });
            }
            if let Some(action) = self.out.pop_front() {
                return Some(action);
            }
            if self.role == Role::Leader && (self.send_beats() | self.send_appends()) {
                continue;
            }
            let ready = self.commit.min(self.log.stable());
            if ready > self.commit_told && self.install != Install::Running {
                self.commit_told = ready;
                return Some(Action::Commit { up_to: ready });
            }
            return None;
        }
    }

    fn take_persist(&mut self) -> Option<Action> {
        if !self.hard_dirty && !self.log.is_dirty() {
            return None;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let hard = core::mem::take(&mut self.hard_dirty).then_some(self.hard);
        let (truncate_from, entries) = self.log.hand_out(ticket);
        Some(Action::Persist { ticket, hard, truncate_from, entries })
    }

    pub(crate) fn observe(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// Restores what must hold after each event.
    pub(crate) fn settle(&mut self) {
        if self.role == Role::Leader {
            self.step_transfer();
            self.step_reads();
        }
        self.step_health();
        self.check();
    }

    fn check(&self) {
        self.log.check();
        let (floor, last) = (self.log.floor().0, self.log.last().0);
        let id = self.config.id;
        assert!(floor <= self.applied && self.applied <= self.commit_told, "{id:?}: floor, applied");
        assert!(self.commit_told <= self.commit && self.commit <= last, "{id:?}: commit, last");
        assert!(self.verified <= last && self.log.last().1 <= self.hard.term, "{id:?}: term of last");
        assert!(self.role == Role::Leader || self.peers.is_empty(), "{id:?}: peers of a follower");
        assert!(self.role == Role::Follower || self.health() == Health::Whole, "{id:?}: health of a leader");
    }

    pub(crate) fn set_hard(&mut self, hard: HardState) {
        assert!(hard.term > self.hard.term || (hard.term == self.hard.term && self.hard.vote.is_none()));
        self.hard = hard;
        self.hard_dirty = true;
        self.hard_ticket = self.next_ticket;
    }

    pub(crate) fn is_hard_durable(&self) -> bool {
        self.hard_ticket <= self.durable_ticket
    }

    /// Sends, once the term and the vote are durable.
    pub(crate) fn send(&mut self, to: ShardAddr, kind: Kind) {
        let message = Message { term: self.hard.term, kind };
        if self.is_hard_durable() {
            self.out.push_back(Action::Send { to, message });
        } else if self.held.len() < HELD_MAX {
            self.held.push_back((self.hard_ticket, to, message));
        }
    }

    /// Follows in `term`, which is not below the present one.
    pub(crate) fn become_follower(&mut self, term: Term, leader: Option<ShardAddr>) {
        if self.role == Role::Leader {
            self.stop_leading();
        }
        if term > self.hard.term {
            self.set_hard(HardState { term, vote: None });
            self.new_term();
        }
        let was = core::mem::replace(&mut self.role, Role::Follower);
        self.leader = leader;
        self.votes.clear();
        if was == Role::Leader || self.election_due.is_none() {
            self.asleep = false;
            self.reset_election();
        }
    }

    /// Forgets what was learnt from the leader of an earlier term. What is committed agrees with
    /// every later leader.
    pub(crate) fn new_term(&mut self) {
        self.verified = self.commit;
        self.leader_commit = LogIndex(0);
        self.heard = Round::default();
        self.acked = LogIndex(0);
        self.install.forget_leader();
    }

    /// The term.
    pub fn term(&self) -> Term {
        self.hard.term
    }
    /// The term and the vote, durable or not.
    pub fn hard_state(&self) -> HardState {
        self.hard
    }
    /// Whether the term and the vote are durable.
    pub fn is_hard_state_durable(&self) -> bool {
        self.is_hard_durable()
    }
    /// The part played.
    pub fn role(&self) -> Role {
        self.role
    }
    /// Who leads in this term, if known; itself included.
    pub fn leader(&self) -> Option<ShardAddr> {
        self.leader
    }
    /// The last entry known to be committed; it may be ahead of what is durable, hence applied, here.
    pub fn commit_index(&self) -> LogIndex {
        self.commit
    }
    /// The last applied entry.
    pub fn applied_index(&self) -> LogIndex {
        self.applied
    }
    /// The last entry of the log.
    pub fn last_index(&self) -> LogIndex {
        self.log.last().0
    }
    /// The last entry that is durable here.
    pub fn durable_index(&self) -> LogIndex {
        self.log.stable()
    }
    /// The last entry that was compacted away.
    pub fn floor(&self) -> (LogIndex, Term) {
        self.log.floor()
    }
    /// An entry after the floor.
    pub fn entry(&self, index: LogIndex) -> Option<&Entry> {
        self.log.get(index)
    }
    /// The membership in force: the latest in the log, committed or not.
    pub fn members(&self) -> &Members {
        &self.members
    }
    /// Whether no timer runs because the group is idle.
    pub fn is_hibernating(&self) -> bool {
        self.asleep
    }
    /// Messages ignored because no correct peer sends them, or that would undo a commit.
    pub fn violations(&self) -> u64 {
        self.violations
    }
}
