//! What a leader does: beats, appends, acknowledgements, commit, hand-over, sleep.

use crate::api::{Health, Lag, Refused, Role};
use crate::progress::{Flow, Progress};
use crate::replica::{PEERS_MAX, Replica};
use arrayvec::ArrayVec;
use protocol::raft::{AppendOutcome, Body, Entries, Entry, Kind, Members, Round, Standing};
use protocol::types::{BLOCK_BYTES, LogIndex, ShardAddr, Span, TargetId, Time};

/// Election time-outs without a quorum after which a leader steps down. Leases end much earlier,
/// so this is not about safety; and a leader that waits is worth more than an election, since a
/// follower that was killed and comes back can serve it at once, long before it may vote. It must
/// end some day for the sake of one-way partitions, whose victims still hear this leader.
const QUORUM_LOST_TIMEOUTS: u64 = 4;

/// Leadership on its way to another replica.
#[derive(Clone, Copy)]
pub(crate) struct Transfer {
    to: TargetId,
    /// When it is given up.
    pub(crate) due: Time,
    /// `TimeoutNow` is out: nothing more may be sent, since a follower that hears a later round
    /// refuses the hand-over.
    pub(crate) told: bool,
}

impl Replica {
    pub(crate) fn become_leader(&mut self) {
        assert!(self.role == Role::Candidate && self.is_hard_durable(), "leads before its vote is durable");
        self.role = Role::Leader;
        self.leader = self.members.find(self.config.me);
        self.election_due = None;
        self.contact = None;
        self.votes.clear();
        self.round = 0;
        self.lease_after = 0;
        self.transfer = None;
        self.sleep_since = None;
        self.idle_since = self.now;
        self.peers.clear();
        self.sync_peers();
        let first = self.commit.next();
        let tail = (first <= self.log.last().0).then(|| self.log.from(first));
        self.uncommitted_blocks = tail.into_iter().flatten().map(|e| e.body.payload_blocks()).sum();
        self.first_index = self.append_own(Body::Noop);
        self.verified = self.commit;
        self.beat_due = self.now + self.config.heartbeat;
    }

    pub(crate) fn stop_leading(&mut self) {
        self.contact = None;
        self.peers.clear();
        self.transfer = None;
        self.beat = false;
        self.pump = false;
        self.verified = self.commit;
        self.uncommitted_blocks = 0;
        self.abort_reads();
    }

    /// Makes the peers those of the membership in force.
    pub(crate) fn sync_peers(&mut self) {
        let (members, me) = (self.members, self.config.me);
        self.peers.retain(|p| members.find(p.member.target) == Some(p.member));
        for member in members.all().filter(|m| m.target != me) {
            let voter = members.is_voter(member.target);
            match self.peers.iter_mut().find(|p| p.member == member) {
                Some(peer) => peer.voter = voter,
                None => self.peers.push(Progress::new(member, voter, self.log.last().0.next(), self.now)),
            }
        }
        self.beat = true;
        self.pump = true;
    }

    pub(crate) fn append_own(&mut self, body: Body) -> LogIndex {
        let index = self.log.last().0.next();
        self.log.append(Entry { term: self.hard.term, index, body });
        self.uncommitted_blocks += body.payload_blocks();
        self.pump = true;
        index
    }

    /// Something is going on: no sleep.
    pub(crate) fn stir(&mut self) {
        self.idle_since = self.now;
        self.sleep_since = None;
        self.rouse();
    }

    pub(crate) fn wake_leader(&mut self) {
        self.sleep_since = None;
        self.idle_since = self.now;
        self.beat = true;
        self.beat_due = self.now + self.config.heartbeat;
        for peer in &mut self.peers {
            peer.heard = self.now;
            peer.asleep = 0;
        }
    }

    pub(crate) fn tick_leader(&mut self) {
        if self.transfer.is_some_and(|t| self.now >= t.due) {
            self.transfer = None;
            self.beat = true;
            self.pump = true;
        }
        if self.asleep || self.now < self.beat_due {
            return;
        }
        self.beat_due = self.now + self.config.heartbeat;
        self.beat = true;
        let now = self.now;
        let heard = self.quorum_of(now, |p| p.heard);
        if now.0 >= heard.0.saturating_add(QUORUM_LOST_TIMEOUTS * self.config.election_timeout.0) {
            self.become_follower(self.hard.term, None);
            return;
        }
        if !self.is_idle() {
            self.sleep_since = None;
        } else if self.sleep_since.is_none() {
            self.sleep_since = Some(self.round + 1);
        }
        self.fall_asleep();
    }

    fn is_idle(&self) -> bool {
        let last = self.log.last().0;
        self.now - self.idle_since >= self.config.hibernate_after
            && self.applied == last
            && self.log.stable() == last
            && self.reads.is_empty()
            && self.transfer.is_none()
            && self.peers.iter().all(|p| p.matched == last && p.standing.counts)
    }

    fn fall_asleep(&mut self) {
        if let Some(since) = self.sleep_since
            && self.is_idle()
            && self.peers.iter().all(|p| p.asleep >= since)
        {
            self.asleep = true;
            self.sleep_since = None;
            self.beat = false;
        }
    }

    /// The value that a majority of the voters has reached; `mine` is this replica's own.
    pub(crate) fn quorum_of<T: Ord + Copy>(&self, mine: T, of: impl Fn(&Progress) -> T) -> T {
        let mut values: ArrayVec<T, { PEERS_MAX + 1 }> =
            self.peers.iter().filter(|p| p.voter).map(of).collect();
        if self.members.is_voter(self.config.me) {
            values.push(mine);
        }
        values.sort_unstable_by(|a, b| b.cmp(a));
        values[values.len() / 2]
    }

    fn stamp(&mut self) -> Round {
        self.round += 1;
        Round { number: self.round, sent_ns: self.now.0 }
    }

    /// Makes itself heard by everybody, if that is due; true when something was sent.
    pub(crate) fn send_beats(&mut self) -> bool {
        if !self.beat || self.transfer.is_some_and(|t| t.told) {
            return false;
        }
        self.beat = false;
        let round = self.stamp();
        self.stamp_reads(round.number);
        let (commit, sleep) = (self.commit, self.sleep_since.is_some_and(|s| s <= round.number));
        for at in 0..self.peers.len() {
            let installs = matches!(self.peers[at].flow, Flow::Install { .. });
            let install = installs.then_some(self.log.floor().0);
            let to = self.peers[at].member;
            self.send(to, Kind::Heartbeat { round, commit, sleep, install });
        }
        self.step_reads();
        true
    }

    /// Sends what the windows allow; true when something was sent.
    pub(crate) fn send_appends(&mut self) -> bool {
        if !self.pump || self.transfer.is_some_and(|t| t.told) {
            return false;
        }
        self.pump = false;
        let mut sent = false;
        for at in 0..self.peers.len() {
            while self.peers[at].may_send(self.log.last().0, &self.config) {
                sent = true;
                if !self.send_append(at) {
                    break;
                }
            }
        }
        sent
    }

    /// Sends one append; false when the peer needs what is no longer in the log.
    fn send_append(&mut self, at: usize) -> bool {
        let next = self.peers[at].next;
        let prev_index = next.prev();
        let Some(prev_term) = self.log.term_at(prev_index) else {
            self.peers[at].install(self.round + 1);
            self.beat = true;
            return false;
        };
        let (entries, blocks) = self.cut_batch(at, next);
        let round = self.stamp();
        let peer = &mut self.peers[at];
        peer.sent(round.number, entries.last().map_or(prev_index, |e| e.index), blocks);
        let (to, commit) = (peer.member, self.commit);
        self.send(to, Kind::Append { round, prev_index, prev_term, commit, entries });
        true
    }

    fn cut_batch(&self, at: usize, next: LogIndex) -> (Entries, usize) {
        let ahead = (self.log.last().0.0 + 1).saturating_sub(next.0);
        let most = self.peers[at].room(&self.config).min(usize::try_from(ahead).unwrap_or(usize::MAX));
        let mut entries = Entries::new();
        let mut blocks = 0;
        for entry in self.log.from(next).take(most) {
            let more = blocks + entry.body.payload_blocks();
            if !entries.is_empty() && more * BLOCK_BYTES > self.config.append_bytes_max {
                break;
            }
            blocks = more;
            entries.push(*entry);
        }
        (entries, blocks)
    }

    /// The peer that replied, if the reply can be one to this leader.
    fn replier(&mut self, from: ShardAddr, round: Round, standing: Standing) -> Option<usize> {
        if self.role != Role::Leader {
            return None;
        }
        let at = self.peers.iter().position(|p| p.member == from)?;
        if round.number == 0 {
            return None; // It answers what this replica sent in an earlier term.
        }
        if round.number > self.round || Time(round.sent_ns) > self.now {
            self.violations += 1;
            return None;
        }
        let peer = &mut self.peers[at];
        peer.heard(round, standing, self.lease_after, self.now);
        if standing.needs_install {
            peer.install(round.number);
        } else if let Flow::Install { since } = peer.flow
            && round.number >= since
        {
            peer.probe(self.log.last().0.next());
            self.pump = true;
        }
        Some(at)
    }

    pub(crate) fn on_append_reply(
        &mut self,
        from: ShardAddr,
        round: Round,
        standing: Standing,
        outcome: AppendOutcome,
    ) {
        let Some(at) = self.replier(from, round, standing) else { return };
        match outcome {
            AppendOutcome::Matched { up_to } => self.on_matched(at, round, standing, up_to),
            AppendOutcome::Rejected { prev, hint, hint_term } => {
                if standing.needs_install && self.log.term_at(hint) == Some(hint_term) {
                    self.commit_to(hint);
                }
                let (index, _) = self.log.last_not_above(hint, hint_term);
                let peer = &mut self.peers[at];
                if !standing.counts {
                    peer.matched = peer.matched.min(hint); // It lost what it once acknowledged.
                }
                let current = match peer.flow {
                    Flow::Probe { sent } => sent == Some(round.number) && prev == peer.next.prev(),
                    Flow::Replicate => prev > peer.matched,
                    Flow::Install { .. } => false,
                };
                if current {
                    let back = if hint < self.log.floor().0 { hint } else { index };
                    peer.probe(back.min(prev.prev()).max(peer.matched).next());
                    self.pump = true;
                }
            }
        }
    }

    fn on_matched(&mut self, at: usize, round: Round, standing: Standing, up_to: LogIndex) {
        if up_to > self.log.last().0 {
            self.violations += 1;
            return;
        }
        let peer = &mut self.peers[at];
        if round.number < peer.counts_since {
            return;
        }
        if !matches!(peer.flow, Flow::Install { .. }) {
            peer.acknowledged(up_to);
        }
        if standing.counts {
            peer.counted = peer.counted.max(up_to);
        }
        self.pump = true;
        self.advance_commit();
    }

    pub(crate) fn on_heartbeat_reply(
        &mut self,
        from: ShardAddr,
        round: Round,
        standing: Standing,
        log: [LogIndex; 3],
        asleep: bool,
    ) {
        let [accepted, durable, last] = log;
        let Some(at) = self.replier(from, round, standing) else { return };
        if durable > accepted || accepted > last || accepted > self.log.last().0 {
            self.violations += 1;
            return;
        }
        let peer = &mut self.peers[at];
        peer.asleep = if asleep { peer.asleep.max(round.number) } else { 0 };
        if durable > peer.matched || (standing.counts && durable > peer.counted) {
            self.on_matched(at, round, standing, durable);
        }
        if self.role != Role::Leader {
            return;
        }
        let peer = &mut self.peers[at];
        if !standing.counts && round.number >= peer.counts_since {
            peer.matched = peer.matched.min(last);
        }
        // A link delivers in order: what was sent before this beat and is not there was lost.
        match peer.flow {
            Flow::Replicate if peer.append_round < round.number && accepted < peer.next.prev() => {
                peer.probe(accepted.max(peer.matched).next());
                self.pump = true;
            }
            Flow::Probe { sent: Some(sent) } if sent < round.number => {
                peer.flow = Flow::Probe { sent: None };
                self.pump = true;
            }
            _ => {}
        }
        self.fall_asleep();
    }

    /// Commits what a majority holds durably, once an entry of this term is among it: entries of
    /// earlier terms are never committed by counting.
    pub(crate) fn advance_commit(&mut self) {
        let reached = self.quorum_of(self.log.stable(), |p| p.counted);
        if reached <= self.commit || self.log.term_at(reached) != Some(self.hard.term) {
            return;
        }
        self.commit_to(reached);
        let settled = self.changes.last().is_none_or(|at| *at <= self.commit);
        if settled && !self.members.is_voter(self.config.me) {
            self.become_follower(self.hard.term, None); // It has led its own removal to the end.
        }
    }

    /// Everything up to here is committed.
    fn commit_to(&mut self, reached: LogIndex) {
        if reached <= self.commit {
            return;
        }
        let fresh = self.log.from(self.commit.next()).take((reached.0 - self.commit.0) as usize);
        self.uncommitted_blocks -= fresh.map(|e| e.body.payload_blocks()).sum::<usize>();
        self.commit = reached;
    }

    /// Hands leadership to a voter: once that holds the whole log it is told to campaign.
    /// Proposals are refused meanwhile. Given up after an election time-out.
    pub fn transfer_leadership(&mut self, to: TargetId, now: Time) -> Result<(), Refused> {
        self.observe(now);
        self.refuse_unless_leader()?;
        if to == self.config.me {
            return Ok(());
        }
        if self.transfer.is_some() {
            return Err(Refused::Busy);
        }
        if !self.members.is_voter(to) {
            return Err(Refused::Invalid);
        }
        self.stir();
        let due = self.now + self.config.election_timeout;
        self.transfer = Some(Transfer { to, due, told: false });
        self.step_transfer();
        Ok(())
    }

    pub(crate) fn step_transfer(&mut self) {
        let Some(Transfer { to, told: false, .. }) = self.transfer else { return };
        let last = self.log.last().0;
        let ready = |p: &&Progress| p.member.target == to && p.matched == last && p.standing.counts;
        let Some(to_member) = self.peers.iter().find(ready).map(|p| p.member) else { return };
        if !self.members.is_voter(to) || self.pump || self.beat {
            return; // First let out what is to be sent anyway: nothing may follow.
        }
        self.tell_timeout(to, to_member);
    }

    fn tell_timeout(&mut self, to: TargetId, member: ShardAddr) {
        self.lease_after = self.round;
        for peer in &mut self.peers {
            peer.leased = None;
        }
        let due = self.now + Span(self.config.election_timeout.0 / 2);
        self.transfer = Some(Transfer { to, due, told: true });
        self.send(member, Kind::TimeoutNow { round: self.round });
    }

    /// Changes the membership, by at most one voter; learners at will. In force at once.
    /// [`Refused::Busy`] until the earlier change, and an entry of this term, are committed.
    pub fn change_members(&mut self, members: Members, now: Time) -> Result<LogIndex, Refused> {
        self.observe(now);
        self.refuse_unless_leader()?;
        let pending = self.changes.last().is_some_and(|at| *at > self.commit);
        if pending || self.commit < self.first_index || self.transfer.is_some() {
            return Err(Refused::Busy);
        }
        if !crate::membership::is_one_step(&self.members, &members) {
            return Err(Refused::Invalid);
        }
        self.stir();
        let index = self.append_own(Body::Members(members));
        self.adopt_members(index, members);
        self.advance_commit();
        self.check_after_change();
        Ok(index)
    }

    /// How far the peers are behind; empty unless leading.
    pub fn lags(&self) -> impl Iterator<Item = Lag> + '_ {
        let last = self.log.last().0;
        self.peers.iter().map(move |p| Lag {
            peer: p.member,
            voter: p.voter,
            entries: last.0 - p.matched.0.min(last.0),
            installing: p.standing.needs_install || matches!(p.flow, Flow::Install { .. }),
            alive: self.asleep || self.now < p.heard + self.config.election_timeout,
        })
    }

    fn check_after_change(&self) {
        assert!(self.role != Role::Leader || self.health() == Health::Whole);
        assert!(self.members.voters().next().is_some(), "no voter left");
    }
}
