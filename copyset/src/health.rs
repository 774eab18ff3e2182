//! Replicas that are not whole: chunk catch-up, and the rule for damaged logs.
//!
//! A replica whose log was damaged may have lost entries it acknowledged, terms it saw and votes it
//! gave. It is silent until (1) every other voter told it, in reply to a probe sent after the
//! restart, a term: the highest is at least any that it voted or acknowledged in; and (2) it holds,
//! durably, all that the leader of its term held at a time after (1): an entry that was committed
//! with the help of the lost part is in that log.

use crate::api::{Action, Health, Role};
use crate::replica::{PEERS_MAX, Replica};
use arrayvec::ArrayVec;
use protocol::raft::{HardState, Kind, Members};
use protocol::types::{LogIndex, ShardAddr, TargetId, Term, Time};

/// Where a chunk catch-up stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Install {
    /// None is needed.
    No,
    /// The leader's log does not reach back to this one; nothing was touched yet.
    Wanted,
    /// Chunks are being overwritten: no entries are taken or applied.
    Running,
    /// The chunks may hold parts of entries up to here: whole once that is applied.
    CatchUp(LogIndex),
}

impl Install {
    pub(crate) fn forget_leader(&mut self) {
        if *self == Install::Wanted {
            *self = Install::No;
        }
    }
}

#[derive(Clone)]
pub(crate) struct Damage {
    stage: Stage,
    nonce: u64,
    heard: ArrayVec<TargetId, PEERS_MAX>,
    /// When to ask again.
    pub(crate) due: Time,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Asks every other voter for its term.
    Terms,
    /// Asks the leader where its log ends.
    End,
    /// Catches up with the leader of that term, to this index.
    CatchUp(Term, LogIndex),
}

impl Replica {
    /// How far this replica may be trusted.
    pub fn health(&self) -> Health {
        match (&self.damage, self.install) {
            (Some(_), _) => Health::Damaged,
            (None, Install::Running | Install::CatchUp(_)) => Health::Installing,
            (None, _) => Health::Whole,
        }
    }

    pub(crate) fn begin_damage(&mut self) {
        let nonce = self.rng.next();
        self.damage = Some(Damage { stage: Stage::Terms, nonce, heard: ArrayVec::new(), due: self.now });
    }

    pub(crate) fn tick_damage(&mut self) {
        let Some(damage) = &mut self.damage else { return };
        if self.now < damage.due {
            return;
        }
        damage.due = self.now + self.config.heartbeat;
        let nonce = damage.nonce;
        match damage.stage {
            Stage::Terms => {
                let (members, heard) = (self.members, damage.heard.clone());
                let me = self.config.me;
                for to in members.voters().filter(|m| m.target != me && !heard.contains(&m.target)) {
                    self.send(to, Kind::Probe { nonce });
                }
                self.all_terms_heard();
            }
            Stage::End => {
                if let Some(leader) = self.leader {
                    self.send(leader, Kind::Probe { nonce });
                }
            }
            Stage::CatchUp(..) => {}
        }
    }

    pub(crate) fn answer_probe(&mut self, from: ShardAddr, nonce: u64) {
        if self.damage.is_some() {
            return; // Its own term is in doubt.
        }
        let leads = self.role == Role::Leader;
        let last = self.log.last().0;
        self.rouse();
        self.send(from, Kind::ProbeReply { nonce, leads, last });
    }

    pub(crate) fn on_probe_reply(&mut self, from: ShardAddr, nonce: u64, leads: bool, last: LogIndex) {
        let term = self.hard.term;
        let Some(damage) = self.damage.as_mut().filter(|d| d.nonce == nonce) else { return };
        match damage.stage {
            Stage::Terms if !damage.heard.contains(&from.target) && !damage.heard.is_full() => {
                damage.heard.push(from.target);
                self.all_terms_heard();
            }
            Stage::End if leads => damage.stage = Stage::CatchUp(term, last),
            _ => {}
        }
    }

    fn unheard_voter(&self, heard: &[TargetId]) -> bool {
        let me = self.config.me;
        self.members.voters().any(|m| m.target != me && !heard.contains(&m.target))
    }

    fn all_terms_heard(&mut self) {
        let Some(damage) = &self.damage else { return };
        if damage.stage != Stage::Terms || self.unheard_voter(&damage.heard) {
            return;
        }
        let nonce = self.rng.next();
        if let Some(damage) = &mut self.damage {
            (damage.stage, damage.nonce, damage.due) = (Stage::End, nonce, self.now);
        }
        if self.hard.vote.is_none() {
            // It may have voted in this term already; a vote for itself binds it to nobody.
            self.set_hard(HardState { term: self.hard.term, vote: Some(self.config.me) });
        }
    }

    /// Notes progress of a catch-up: by chunk, and after damage.
    pub(crate) fn step_health(&mut self) {
        let counted = self.standing().counts;
        self.step_damage();
        if let Install::CatchUp(whole_at) = self.install
            && self.applied >= whole_at
        {
            self.install = Install::No;
        }
        if let Some(leader) = self.leader
            && self.role == Role::Follower
            && !counted
            && self.standing().counts
        {
            self.send_matched(leader, self.heard); // From now on it counts.
        }
    }

    fn step_damage(&mut self) {
        let Some(Damage { stage: Stage::CatchUp(term, target), heard, .. }) = &self.damage else { return };
        if *term != self.hard.term {
            let nonce = self.rng.next();
            if let Some(damage) = &mut self.damage {
                (damage.stage, damage.nonce, damage.due) = (Stage::End, nonce, self.now);
            }
            return;
        }
        if self.verified.min(self.log.stable()) < *target || self.install == Install::Running {
            return;
        }
        if self.unheard_voter(heard) {
            let heard = heard.clone();
            self.begin_damage(); // The log told of voters that were not asked yet.
            if let Some(damage) = &mut self.damage {
                damage.heard = heard;
            }
            return;
        }
        self.damage = None;
    }

    /// The leader's log no longer reaches back to this one.
    pub(crate) fn want_install(&mut self) {
        self.install = match self.install {
            Install::No | Install::Wanted => Install::Wanted,
            // The leader compacted past the last catch-up: a new one.
            Install::Running | Install::CatchUp(_) => Install::Running,
        };
    }

    /// Tells the shard, now and then, that it must fetch chunks from the leader.
    pub(crate) fn ask_install(&mut self, leader: ShardAddr) {
        if !self.standing().needs_install {
            return;
        }
        let told = self
            .install_told
            .is_some_and(|(to, at)| to == leader && self.now < at + self.config.election_timeout);
        if !told {
            self.install_told = Some((leader, self.now));
            self.out.push_back(Action::Install { from: leader });
        }
    }

    /// Chunks are about to be overwritten by a catch-up. The health becomes
    /// [`Health::Installing`] (a damaged replica stays damaged), to be persisted before the first
    /// chunk is touched. No entry is taken or applied until [`Replica::install_finish`].
    pub fn install_begin(&mut self) {
        if self.role != Role::Follower {
            self.become_follower(self.hard.term, None);
        }
        self.install = Install::Running;
        if self.asleep {
            self.rouse();
        }
    }

    /// Whether a catch-up to this floor may be finished here; to be asked before the floor is made
    /// durable. Otherwise the leader was behind this replica: the catch-up must begin again.
    pub fn install_fits(&self, floor: (LogIndex, Term)) -> bool {
        let agrees = self.log.term_at(floor.0) == Some(floor.1);
        self.install == Install::Running && (agrees || floor.0 > self.commit)
    }

    /// The chunks hold everything up to `floor`, an applied entry of the leader, and parts of entries
    /// up to `whole_at`; floor and `members`, the membership as of the floor, are durable.
    ///
    /// The log goes on after the floor. Entries after it that were in the log stay if the log has the
    /// floor's very entry, else the log is empty; a replay of the shard's floor record must do the
    /// same. Applied goes (back) to the floor. The replica is whole once it has applied `whole_at`.
    pub fn install_finish(
        &mut self,
        floor: (LogIndex, Term),
        members: Members,
        whole_at: LogIndex,
        now: Time,
    ) {
        assert!(self.install_fits(floor), "finishes a catch-up that does not fit");
        assert!(whole_at >= floor.0);
        self.observe(now);
        if floor.1 > self.hard.term {
            self.become_follower(floor.1, None);
        }
        if self.log.term_at(floor.0) == Some(floor.1) {
            self.log.compact(floor.0);
        } else {
            self.log.restart(floor);
        }
        self.base_members = members;
        self.scan_members();
        self.commit = self.commit.max(floor.0);
        self.applied = floor.0;
        self.commit_told = floor.0;
        self.verified = self.verified.min(self.log.last().0).max(self.commit);
        self.install = Install::CatchUp(whole_at);
        self.install_told = None;
        if let Some(leader) = self.leader {
            self.send_matched(leader, self.heard); // Entries may come again.
        }
        self.settle();
    }
}
