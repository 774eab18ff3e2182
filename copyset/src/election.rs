//! Elections: pre-vote, votes, and whom not to vote for while a leader may hold a lease.

use crate::api::{Health, Role};
use crate::replica::Replica;
use protocol::raft::{HardState, Kind};
use protocol::types::{LogIndex, ShardAddr, Span, TargetId, Term, Time};

impl Replica {
    /// Draws the time of the next election.
    pub(crate) fn reset_election(&mut self) {
        let shortest = self.config.election_timeout;
        let jitter = self.rng.below(shortest.0);
        self.election_due = Some(self.now + shortest + Span(jitter));
    }

    pub(crate) fn tick_election(&mut self) {
        if self.election_due.is_none_or(|due| self.now < due) {
            return;
        }
        self.reset_election();
        if self.may_campaign() {
            self.ask_pre_votes();
        } else {
            self.role = Role::Follower;
            self.leader = None;
        }
    }

    fn may_campaign(&self) -> bool {
        self.members.is_voter(self.config.me)
            && self.health() == Health::Whole
            && self.now >= self.withhold_until
    }

    fn ask_pre_votes(&mut self) {
        self.role = Role::PreCandidate;
        self.leader = None;
        self.votes.clear();
        let (last_index, last_term) = self.log.last();
        let campaign = Term(self.hard.term.0 + 1);
        self.send_to_voters(Kind::PreVote { campaign, last_index, last_term });
        self.count_vote(self.config.me);
    }

    fn campaign(&mut self, transfer: Option<u64>) {
        let term = Term(self.hard.term.0 + 1);
        self.set_hard(HardState { term, vote: Some(self.config.me) });
        self.new_term();
        self.role = Role::Candidate;
        self.leader = None;
        self.asleep = false;
        self.votes.clear();
        self.reset_election();
        let (last_index, last_term) = self.log.last();
        self.send_to_voters(Kind::Vote { last_index, last_term, transfer });
        // Its own vote counts once it is durable.
    }

    fn send_to_voters(&mut self, kind: Kind) {
        let (members, me) = (self.members, self.config.me);
        for member in members.voters().filter(|m| m.target != me) {
            self.send(member, kind.clone());
        }
    }

    /// Counts a vote, or pre-vote, and goes on with a majority.
    pub(crate) fn count_vote(&mut self, voter: TargetId) {
        if !self.members.is_voter(voter) || self.votes.contains(&voter) {
            return;
        }
        self.votes.push(voter);
        let voters = self.members.voters().count();
        let granted = self.votes.iter().filter(|v| self.members.is_voter(**v)).count();
        if granted <= voters / 2 {
            return;
        }
        match self.role {
            Role::PreCandidate => self.campaign(None),
            Role::Candidate => self.become_leader(),
            Role::Follower | Role::Leader => {}
        }
    }

    /// Whether a leader may hold a lease that rests on this replica.
    fn is_bound(&self) -> bool {
        let by_leader = match self.role {
            Role::Leader => !self.asleep,
            _ => self.contact.is_some_and(|at| self.now < at + self.config.election_timeout),
        };
        by_leader || self.now < self.withhold_until
    }

    /// Whether the leader this replica follows has itself asked for this election and has been
    /// silent since, so that it holds no lease.
    fn is_released(&self, term: Term, transfer: Option<u64>) -> bool {
        let heard = if self.role == Role::Leader { self.round } else { self.heard.number };
        self.now >= self.withhold_until
            && term.0 == self.hard.term.0 + 1
            && transfer.is_some_and(|round| heard <= round)
    }

    /// A vote was asked for while a leader may be alive. A hibernating leader shows itself.
    fn stir_by_candidate(&mut self, from: ShardAddr) {
        if self.asleep && self.members.find(from.target).is_some() {
            self.rouse();
        }
    }

    pub(crate) fn on_pre_vote(
        &mut self,
        from: ShardAddr,
        term: Term,
        campaign: Term,
        last: (Term, LogIndex),
    ) {
        if campaign.0 != term.0.saturating_add(1) {
            self.violations += 1;
            return;
        }
        self.stir_by_candidate(from);
        if term < self.hard.term {
            self.send(from, Kind::PreVoteReply { campaign, granted: false });
            return;
        }
        if self.is_bound() {
            return;
        }
        if term > self.hard.term {
            self.become_follower(term, None);
        }
        let granted = self.damage.is_none() && self.is_up_to_date(last);
        self.send(from, Kind::PreVoteReply { campaign, granted });
    }

    pub(crate) fn on_vote(
        &mut self,
        from: ShardAddr,
        term: Term,
        last: (Term, LogIndex),
        transfer: Option<u64>,
    ) {
        if term < self.hard.term {
            self.send(from, Kind::VoteReply { granted: false });
            return;
        }
        if self.is_bound() && !self.is_released(term, transfer) {
            self.stir_by_candidate(from);
            return;
        }
        if term > self.hard.term {
            self.become_follower(term, None);
        }
        let free = match self.hard.vote {
            Some(vote) => vote == from.target,
            None => self.leader.is_none(),
        };
        let granted = free && self.damage.is_none() && self.is_up_to_date(last);
        if granted && self.hard.vote.is_none() {
            self.set_hard(HardState { term, vote: Some(from.target) });
            self.asleep = false;
            self.reset_election();
        }
        self.send(from, Kind::VoteReply { granted });
    }

    fn is_up_to_date(&self, theirs: (Term, LogIndex)) -> bool {
        let (index, term) = self.log.last();
        theirs >= (term, index)
    }

    pub(crate) fn on_pre_vote_reply(&mut self, from: ShardAddr, campaign: Term, granted: bool) {
        if self.role == Role::PreCandidate && campaign.0 == self.hard.term.0 + 1 && granted {
            self.count_vote(from.target);
        }
    }

    pub(crate) fn on_vote_reply(&mut self, from: ShardAddr, granted: bool) {
        if self.role == Role::Candidate && granted {
            self.count_vote(from.target);
        }
    }

    pub(crate) fn on_timeout_now(&mut self, from: ShardAddr, round: u64) {
        let asked = self.role == Role::Follower && self.leader == Some(from) && self.heard.number <= round;
        if asked && self.may_campaign() {
            self.campaign(Some(round));
        }
    }

    /// Notes that the leader of this term was heard; false when it cannot be.
    pub(crate) fn follow(&mut self, from: ShardAddr) -> bool {
        let other = self.leader.is_some_and(|leader| leader != from);
        if self.role == Role::Leader || other {
            self.violations += 1;
            return false;
        }
        if self.role != Role::Follower || self.leader.is_none() {
            self.become_follower(self.hard.term, Some(from));
        }
        self.contact = Some(self.now);
        self.asleep = false;
        self.reset_election();
        true
    }

    /// The time-out that a lease must stay below.
    pub(crate) fn lease_end(&self, sent: Time) -> Time {
        let span = self.config.election_timeout.0 / 1000 * (1000 - self.config.drift_permille);
        sent + Span(span)
    }
}
