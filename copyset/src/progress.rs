//! What a leader knows of one peer: how far its log agrees, what is in flight, when it followed.

use crate::api::Config;
use crate::queue::pop_front_if;
use protocol::raft::{Member, Round, Standing};
use protocol::types::{BLOCK_BYTES, LogIndex, Time};
use std::collections::VecDeque;

/// How entries are sent to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// One append at a time, until one matches; `sent` is the round of the one under way.
    Probe { sent: Option<u64> },
    /// Many in flight, `next` advanced as if each arrived.
    Replicate,
    /// None: the log no longer reaches back that far, or the peer said so. `since` is the first round
    /// whose reply may end it.
    Install { since: u64 },
}

#[derive(Clone)]
pub(crate) struct Progress {
    pub(crate) member: Member,
    pub(crate) voter: bool,
    pub(crate) flow: Flow,
    pub(crate) next: LogIndex,
    /// Durable and agreeing up to here.
    pub(crate) matched: LogIndex,
    /// The same, but only as told while the peer was whole; what commit counts.
    pub(crate) counted: LogIndex,
    /// Replies to rounds before this one do not count: they are from before the peer lost data.
    pub(crate) counts_since: u64,
    pub(crate) standing: Standing,
    pub(crate) heard: Time,
    /// The latest round it confirmed.
    pub(crate) confirmed: u64,
    /// When the latest round that holds up a lease was sent.
    pub(crate) leased: Option<Time>,
    /// The round of the last append.
    pub(crate) append_round: u64,
    /// The latest round it went to sleep at; 0 when awake.
    pub(crate) asleep: u64,
    /// Appends in flight: last entry and payload blocks of each.
    inflight: VecDeque<(LogIndex, usize)>,
    inflight_blocks: usize,
}

impl Progress {
    pub(crate) fn new(member: Member, voter: bool, next: LogIndex, now: Time) -> Self {
        Self {
            member,
            voter,
            flow: Flow::Probe { sent: None },
            next,
            matched: LogIndex(0),
            counted: LogIndex(0),
            counts_since: 0,
            standing: Standing { counts: false, confirms: false, needs_install: false },
            heard: now,
            confirmed: 0,
            leased: None,
            append_round: 0,
            asleep: 0,
            inflight: VecDeque::new(),
            inflight_blocks: 0,
        }
    }

    /// Whether one more append may leave, the log ending at `last`.
    pub(crate) fn may_send(&self, last: LogIndex, config: &Config) -> bool {
        match self.flow {
            Flow::Probe { sent } => sent.is_none(),
            Flow::Install { .. } => false,
            Flow::Replicate => {
                let entries = self.next.0 - 1 - self.matched.0.min(self.next.0 - 1);
                self.next <= last
                    && entries < config.window_entries as u64
                    && self.inflight_blocks * BLOCK_BYTES < config.window_bytes
            }
        }
    }

    /// Entries that may still be put in flight.
    pub(crate) fn room(&self, config: &Config) -> usize {
        let flying = (self.next.0 - 1).saturating_sub(self.matched.0);
        let window = config.window_entries.saturating_sub(usize::try_from(flying).unwrap_or(usize::MAX));
        match self.flow {
            Flow::Replicate => window.min(config.entries_per_append_max).max(1),
            _ => config.entries_per_append_max.max(1),
        }
    }

    pub(crate) fn sent(&mut self, round: u64, last: LogIndex, blocks: usize) {
        self.append_round = round;
        match &mut self.flow {
            Flow::Probe { sent } => *sent = Some(round),
            Flow::Replicate => {
                self.next = last.next();
                self.inflight.push_back((last, blocks));
                self.inflight_blocks += blocks;
            }
            Flow::Install { .. } => unreachable!("nothing is sent to a peer in catch-up"),
        }
    }

    pub(crate) fn probe(&mut self, next: LogIndex) {
        self.flow = Flow::Probe { sent: None };
        self.next = next.max(LogIndex(1));
        self.land_all();
    }

    pub(crate) fn install(&mut self, since: u64) {
        if !matches!(self.flow, Flow::Install { .. }) {
            self.flow = Flow::Install { since };
            self.land_all();
        }
    }

    fn land_all(&mut self) {
        self.inflight.clear();
        self.inflight_blocks = 0;
    }

    /// The peer's log agrees and is durable up to here.
    pub(crate) fn acknowledged(&mut self, up_to: LogIndex) {
        self.matched = self.matched.max(up_to);
        while let Some((_, blocks)) = pop_front_if(&mut self.inflight, |(last, _)| *last <= self.matched) {
            self.inflight_blocks -= blocks;
        }
        self.next = self.next.max(self.matched.next());
        if matches!(self.flow, Flow::Probe { .. }) {
            self.flow = Flow::Replicate;
            self.next = self.matched.next();
        }
    }

    /// A reply was heard.
    pub(crate) fn heard(&mut self, round: Round, standing: Standing, lease_after: u64, now: Time) {
        self.heard = now;
        if round.number < self.counts_since {
            return;
        }
        self.standing = standing;
        if !standing.counts {
            self.counted = LogIndex(0);
            self.counts_since = round.number;
        }
        if standing.confirms {
            self.confirmed = self.confirmed.max(round.number);
            if round.number > lease_after {
                self.leased = self.leased.max(Some(Time(round.sent_ns)));
            }
        }
    }
}
