//! What a follower does: checks and takes entries, answers beats, acknowledges what is durable.

use crate::health::Install;
use crate::replica::Replica;
use core::ops::Range;
use protocol::raft::{AppendOutcome, Body, Entries, Entry, Kind, Round, Standing};
use protocol::types::{ENTRY_BLOCKS_MAX, LogIndex, ShardAddr, Term};

/// Whether the body is one that a correct leader proposes.
pub(crate) fn is_sound(body: &Body) -> bool {
    match body {
        Body::Write { range, .. } => range.is_valid() && usize::from(range.count) <= ENTRY_BLOCKS_MAX,
        Body::Zero { range, .. } => range.is_valid(),
        Body::Members(members) => members.voters().next().is_some(),
        Body::Noop | Body::DropVolume { .. } | Body::Fence(_) => true,
    }
}

/// Whether the entries follow `prev` without a gap, with terms that never fall or pass `term`.
fn is_chain(prev: (LogIndex, Term), term: Term, entries: &[Entry]) -> bool {
    let mut at = prev;
    at.1 <= term
        && entries.iter().all(|e| {
            let follows = e.index.0.checked_sub(1) == Some(at.0.0) && e.term >= at.1 && e.term <= term;
            at = (e.index, e.term);
            follows && is_sound(&e.body)
        })
}

const NOTHING: Range<LogIndex> = LogIndex(0)..LogIndex(0);

impl Replica {
    pub(crate) fn standing(&self) -> Standing {
        Standing {
            // After the chunks are fetched its log is as good as any: what it acknowledges can be
            // recovered from it, since whoever is elected applies past `whole_at` before it serves.
            counts: self.damage.is_none() && self.install != Install::Running,
            confirms: self.damage.is_none(),
            needs_install: matches!(self.install, Install::Wanted | Install::Running),
        }
    }

    pub(crate) fn on_append(
        &mut self,
        from: ShardAddr,
        round: Round,
        prev: (LogIndex, Term),
        commit: LogIndex,
        entries: Entries,
    ) -> Range<LogIndex> {
        if !is_chain(prev, self.hard.term, &entries) {
            self.violations += 1;
            return NOTHING;
        }
        if !self.follow(from) {
            return NOTHING;
        }
        self.heard = self.heard.max(round);
        self.leader_commit = self.leader_commit.max(commit);
        if self.install == Install::Running || !self.matches(prev) {
            self.reject(from, round, prev);
            return NOTHING;
        }
        let up_to = entries.last().map_or(prev.0, |e| e.index);
        let fresh = match self.take(entries) {
            Some(fresh) => fresh,
            None => {
                self.violations += 1; // It would undo a commit: the peer's log is wrong, or ours is.
                return NOTHING;
            }
        };
        self.verified = self.verified.max(up_to);
        if self.install == Install::Wanted {
            self.install = Install::No; // This leader's log does reach back.
        }
        self.follow_commit();
        if up_to <= self.log.stable() {
            self.send_matched(from, round);
        }
        fresh
    }

    /// Whether the leader's log and this one agree at `prev`. What lies before the floor is
    /// committed, so it agrees.
    fn matches(&mut self, prev: (LogIndex, Term)) -> bool {
        if prev.0 < self.log.floor().0 {
            return true;
        }
        let agrees = self.log.term_at(prev.0) == Some(prev.1);
        if !agrees && prev.0 <= self.commit {
            self.violations += 1;
        }
        agrees
    }

    fn reject(&mut self, from: ShardAddr, round: Round, prev: (LogIndex, Term)) {
        let standing = self.standing();
        let (hint, hint_term) = match self.log.term_at(self.commit) {
            // No log would help it. What it knows to be committed may help the leader: one that has
            // just started may know of less, and can serve no catch-up that would take that back.
            Some(term) if standing.needs_install => (self.commit, term),
            _ => self.log.last_not_above(prev.0, prev.1),
        };
        let outcome = AppendOutcome::Rejected { prev: prev.0, hint, hint_term };
        self.send(from, Kind::AppendReply { round, standing, outcome });
    }

    /// Takes the entries that are new, in place of those they conflict with. `None` when that would
    /// undo a commit, or when terms fall.
    fn take(&mut self, entries: Entries) -> Option<Range<LogIndex>> {
        let (floor, floor_term) = self.log.floor();
        if entries.iter().any(|e| e.index == floor && e.term != floor_term) {
            return None;
        }
        let new = |e: &Entry| e.index > floor && self.log.term_at(e.index) != Some(e.term);
        let Some(first) = entries.iter().position(new) else { return Some(NOTHING) };
        let from = entries[first].index;
        let falls = |before: Term| entries[first].term < before;
        if from <= self.commit || self.log.term_at(from.prev()).is_none_or(falls) {
            return None;
        }
        if from <= self.log.last().0 {
            self.log.truncate(from);
            self.revert_members(from);
        }
        for entry in &entries[first..] {
            self.log.append(*entry);
            if let Body::Members(members) = entry.body {
                self.adopt_members(entry.index, members);
            }
        }
        Some(from..self.log.last().0.next())
    }

    fn follow_commit(&mut self) {
        self.commit = self.commit.max(self.leader_commit.min(self.verified));
    }

    /// Tells the leader what has become durable since the last time.
    pub(crate) fn acknowledge(&mut self) {
        let durable = self.verified.min(self.log.stable());
        if let Some(leader) = self.leader
            && durable > self.acked
        {
            self.send_matched(leader, self.heard);
        }
    }

    pub(crate) fn send_matched(&mut self, to: ShardAddr, round: Round) {
        let up_to = self.verified.min(self.log.stable());
        self.acked = self.acked.max(up_to);
        let standing = self.standing();
        let outcome = AppendOutcome::Matched { up_to };
        self.send(to, Kind::AppendReply { round, standing, outcome });
    }

    pub(crate) fn on_heartbeat(
        &mut self,
        from: ShardAddr,
        round: Round,
        commit: LogIndex,
        sleep: bool,
        install: Option<LogIndex>,
    ) {
        if !self.follow(from) {
            return;
        }
        self.heard = self.heard.max(round);
        self.leader_commit = self.leader_commit.max(commit);
        self.follow_commit();
        if install.is_some_and(|floor| self.verified < floor) {
            self.want_install();
        }
        self.ask_install(from);
        if sleep && self.heard == round && self.may_sleep(commit) {
            self.asleep = true;
            self.election_due = None;
        }
        self.answer_beat(from, round);
    }

    fn may_sleep(&self, commit: LogIndex) -> bool {
        let last = self.log.last().0;
        self.standing().counts
            && !self.standing().needs_install
            && self.verified == last
            && self.log.stable() == last
            && self.commit == last
            && commit == last
    }

    /// Answers a leader's beat, a stale one's too: it learns the present term from it.
    pub(crate) fn answer_beat(&mut self, from: ShardAddr, round: Round) {
        let (accepted, last) = (self.verified, self.log.last().0);
        let (durable, standing) = (accepted.min(self.log.stable()), self.standing());
        let asleep = self.asleep;
        self.send(from, Kind::HeartbeatReply { round, standing, accepted, durable, last, asleep });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Config, Health, Recovered};
    use protocol::raft::{HardState, Members, Message};
    use protocol::types::{CopysetId, TargetId, Time};

    /// Only what is committed lies before the floor, so it is not compared; what follows is.
    #[test]
    fn entries_whose_terms_fall_behind_the_floor_are_a_violation() {
        let at = |target| ShardAddr { target: TargetId(target), shard: 0 };
        let entry = |index, term| Entry { term: Term(term), index: LogIndex(index), body: Body::Noop };
        for (entries, is_sound) in [
            (vec![entry(10, 1), entry(11, 1)], false),
            (vec![entry(10, 1)], false),
            (vec![entry(10, 5), entry(11, 5)], true),
        ] {
            let recovered = Recovered {
                hard: HardState { term: Term(5), vote: None },
                floor: (LogIndex(10), Term(5)),
                members: Members::new(&[at(1), at(2), at(3)], &[]).unwrap(),
                entries: Vec::new(),
                applied: LogIndex(10),
                health: Health::Whole,
            };
            let config = Config::new(CopysetId(1), TargetId(1), 1);
            let mut replica = Replica::new(config, recovered, Time(1));
            let kind = Kind::Append {
                round: Round { number: 1, sent_ns: 1 },
                prev_index: LogIndex(9),
                prev_term: Term(1),
                commit: LogIndex(10),
                entries: entries.into(),
            };
            replica.handle(at(2), Message { term: Term(5), kind }, Time(2));
            assert_eq!(replica.violations(), u64::from(!is_sound));
            assert_eq!(replica.last_index(), LogIndex(if is_sound { 11 } else { 10 }));
        }
    }
}
