//! What is known of one copyset: its leader, whom to ask next, and what waits for the answer.

use super::Config;
use protocol::types::{CopysetId, ShardAddr, Span, Term, Time};
use std::collections::VecDeque;

/// The state of the link to a shard.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Link {
    pub up: bool,
    /// Counts the times it came up: what tells a new link from the old one.
    pub epoch: u64,
}

/// One sending of a piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Attempt {
    /// The wire id, which its answer repeats.
    pub id: u64,
    pub to: ShardAddr,
    pub term: Term,
    /// The link's epoch.
    pub link: u64,
}

impl Attempt {
    /// Whether a write last sent as `earlier`, with unknown fate, may be sent as `self`: to a
    /// leader of a higher term, or in the same term on a new link to the same shard.
    pub fn may_follow(&self, earlier: &Attempt) -> bool {
        self.term > earlier.term
            || (self.term == earlier.term && self.to == earlier.to && self.link > earlier.link)
    }
}

/// A `WhoLeads` on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub id: u64,
    pub to: ShardAddr,
    pub sent_at: Time,
}

/// What is known of one copyset.
#[derive(Debug, Default)]
pub(super) struct Route {
    /// Replicas in the order of asking, the local shard first.
    pub members: Vec<ShardAddr>,
    /// The highest term of which a leader was heard; never falls.
    pub term: Term,
    /// The leader of `term`, unless it said that it no longer is.
    pub leader: Option<ShardAddr>,
    /// Pieces that are to be sent, oldest first.
    pub waiting: VecDeque<usize>,
    /// Whether it stands in the queue of routes that may send.
    pub queued: bool,
    /// Pieces sent and unanswered.
    pub in_flight: usize,
    /// Bytes of reads sent and unanswered.
    pub read_bytes: usize,
    /// When an answer last came, or the first piece of those in flight was sent.
    pub heard_at: Time,
    pub probe: Option<Probe>,
    /// No further probe before this time.
    pub probe_after: Time,
    /// Probes since there was last progress.
    probes: u32,
    next_member: usize,
    /// No piece is sent before this time.
    pub hold_until: Time,
    refusals: u32,
    /// The time in the set of timers, if any.
    pub timer: Option<Time>,
}

impl Route {
    /// Sets whom to ask: the local shard first, the others starting at a place that differs by
    /// copyset, so that not every question goes to the same target.
    pub fn set_members(&mut self, id: CopysetId, members: &[ShardAddr], me: Option<ShardAddr>) {
        let mut order = members.to_vec();
        if !order.is_empty() {
            let len = order.len();
            order.rotate_left(id.0 as usize % len);
        }
        order.sort_by_key(|m| Some(*m) != me);
        if order != self.members {
            self.members = order;
            self.next_member = 0;
            self.probe_after = Time(0);
        }
    }

    /// Takes in what a replica said of leadership. True if that is news to act on at once.
    ///
    /// A lower term is ignored, and so is a term without a leader, except that the believed
    /// leader's own denial ends the belief in it.
    pub fn learn(&mut self, from: ShardAddr, leader: Option<ShardAddr>, term: Term) -> bool {
        match leader {
            Some(new) if term > self.term || (term == self.term && self.leader != Some(new)) => {
                let risen = term > self.term;
                self.term = term;
                self.leader = Some(new);
                risen
            }
            Some(_) => false,
            None => {
                if self.leader == Some(from) && term >= self.term {
                    self.leader = None;
                }
                false
            }
        }
    }

    /// An answer came: the leader lives, and all back-offs start anew.
    pub fn progress(&mut self, now: Time) {
        self.heard_at = now;
        self.probes = 0;
        self.refusals = 0;
    }

    /// A refusal came: wait, twice as long as the last time. What was sent together is refused together,
    /// and counts once: else a burst of ten would mean the longest wait at once.
    pub fn hold(&mut self, config: &Config, now: Time) {
        if now < self.hold_until {
            return;
        }
        self.hold_until = now + backoff(config, self.refusals);
        self.refusals = self.refusals.saturating_add(1);
    }

    /// The next replica to ask that can be reached, and the time of the question after it: at
    /// once until each has been asked, then backing off. The believed leader is passed over, for
    /// it is in doubt.
    pub fn next_probe(
        &mut self,
        config: &Config,
        now: Time,
        reachable: impl Fn(ShardAddr) -> bool,
    ) -> Option<ShardAddr> {
        let count = self.members.len();
        let at = (0..count)
            .map(|step| (self.next_member + step) % count)
            .find(|&at| self.leader != Some(self.members[at]) && reachable(self.members[at]))
            .or_else(|| (0..count).find(|&at| reachable(self.members[at])))?;
        self.next_member = (at + 1) % count;
        self.probes = self.probes.saturating_add(1);
        let wait = match self.probes.checked_sub(count as u32) {
            Some(rounds) => backoff(config, rounds),
            None => Span(0),
        };
        self.probe_after = now + wait;
        Some(self.members[at])
    }
}

/// `backoff_min` doubled so many times, at most `backoff_max`.
fn backoff(config: &Config, times: u32) -> Span {
    let factor = 1u64 << times.min(20);
    Span(config.backoff_min.0.saturating_mul(factor).min(config.backoff_max.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::types::TargetId;

    fn shard(target: u32) -> ShardAddr {
        ShardAddr { target: TargetId(target), shard: 0 }
    }
    fn attempt(to: u32, term: u64, link: u64) -> Attempt {
        Attempt { id: 0, to: shard(to), term: Term(term), link }
    }

    #[test]
    fn a_write_in_doubt_follows_only_a_higher_term_or_a_new_link() {
        let sent = attempt(1, 5, 1);
        assert!(attempt(2, 6, 1).may_follow(&sent));
        assert!(attempt(1, 6, 1).may_follow(&sent));
        assert!(attempt(1, 5, 2).may_follow(&sent));
        assert!(!attempt(1, 5, 1).may_follow(&sent));
        assert!(!attempt(2, 5, 9).may_follow(&sent));
        assert!(!attempt(1, 4, 9).may_follow(&sent));
    }

    #[test]
    fn a_stale_hint_never_brings_back_an_old_leader() {
        let mut route = Route::default();
        assert!(route.learn(shard(1), Some(shard(1)), Term(4)));
        assert!(!route.learn(shard(2), Some(shard(3)), Term(3)));
        assert_eq!((route.leader, route.term), (Some(shard(1)), Term(4)));
        assert!(!route.learn(shard(2), None, Term(9)), "a candidate's word changes nothing");
        assert_eq!(route.leader, Some(shard(1)));
        assert!(!route.learn(shard(1), None, Term(5)), "its own word does");
        assert_eq!((route.leader, route.term), (None, Term(4)));
    }

    #[test]
    fn refusals_that_come_together_are_one_and_later_ones_double_the_wait() {
        let config = Config::default();
        let mut route = Route::default();
        let now = Time(1000);
        (0..30).for_each(|_| route.hold(&config, now));
        assert_eq!(route.hold_until, now + config.backoff_min);
        let again = route.hold_until;
        (0..30).for_each(|_| route.hold(&config, again));
        assert_eq!(route.hold_until, again + Span(config.backoff_min.0 * 2));
        route.progress(again);
        let later = route.hold_until;
        route.hold(&config, later);
        assert_eq!(route.hold_until, later + config.backoff_min);
    }

    #[test]
    fn the_local_shard_is_asked_first_and_each_replica_once_before_a_pause() {
        let config = Config::default();
        let mut route = Route::default();
        route.set_members(CopysetId(1), &[shard(1), shard(2), shard(3)], Some(shard(3)));
        let now = Time(1000);
        let asked: Vec<_> = (0..3).map(|_| route.next_probe(&config, now, |_| true).unwrap()).collect();
        assert_eq!(asked, [shard(3), shard(2), shard(1)]);
        assert!(route.probe_after > now);
    }
}
