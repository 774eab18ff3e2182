//! The part of the log that is in memory: descriptors after the floor, and how far they are durable.
//!
//! Invariant: floor <= stable <= handed <= last. `handed` is the last entry given out in a
//! `Persist`, `stable` the last that is known to be on disk in its present form.

use crate::queue::pop_front_if;
use core::ops::Range;
use protocol::raft::Entry;
use protocol::types::{LogIndex, Term};
use std::collections::VecDeque;

#[derive(Clone)]
pub(crate) struct Log {
    floor: (LogIndex, Term),
    entries: VecDeque<Entry>,
    stable: LogIndex,
    handed: LogIndex,
    /// Entries from here on are on disk, or on their way there, but no longer in the log.
    cut: Option<LogIndex>,
    /// Writes under way: ticket and the last entry that is durable with it.
    pending: VecDeque<(u64, LogIndex)>,
}

impl Log {
    /// A log as found on disk. Panics when the entries do not follow the floor without a gap: the
    /// shard checks what it reads.
    pub(crate) fn new(floor: (LogIndex, Term), entries: Vec<Entry>) -> Self {
        let mut at = floor;
        for entry in &entries {
            assert!(entry.index == at.0.next() && entry.term >= at.1, "recovered log has a gap");
            at = (entry.index, entry.term);
        }
        let pending = VecDeque::new();
        Self { floor, entries: entries.into(), stable: at.0, handed: at.0, cut: None, pending }
    }

    pub(crate) fn floor(&self) -> (LogIndex, Term) {
        self.floor
    }

    pub(crate) fn last(&self) -> (LogIndex, Term) {
        self.entries.back().map_or(self.floor, |e| (e.index, e.term))
    }

    pub(crate) fn stable(&self) -> LogIndex {
        self.stable
    }

    pub(crate) fn get(&self, index: LogIndex) -> Option<&Entry> {
        let at = index.0.checked_sub(self.floor.0.0 + 1)?;
        self.entries.get(usize::try_from(at).ok()?)
    }

    /// The term of an entry; `None` before the floor and after the end.
    pub(crate) fn term_at(&self, index: LogIndex) -> Option<Term> {
        if index == self.floor.0 { Some(self.floor.1) } else { self.get(index).map(|e| e.term) }
    }

    /// Entries from `first` on, in order.
    pub(crate) fn from(&self, first: LogIndex) -> impl Iterator<Item = &Entry> {
        debug_assert!(first > self.floor.0);
        let at = (first.0 - self.floor.0.0 - 1) as usize;
        self.entries.range(at.min(self.entries.len())..)
    }

    /// The last entry not after `index` whose term is at most `term`; the floor if there is none.
    pub(crate) fn last_not_above(&self, index: LogIndex, term: Term) -> (LogIndex, Term) {
        let mut at = index.min(self.last().0);
        while at > self.floor.0 {
            match self.term_at(at) {
                Some(t) if t <= term => return (at, t),
                _ => at = at.prev(),
            }
        }
        self.floor
    }

    pub(crate) fn append(&mut self, entry: Entry) {
        let (index, term) = self.last();
        assert!(entry.index == index.next() && entry.term >= term);
        self.entries.push_back(entry);
    }

    /// Drops the entries from `from` on.
    pub(crate) fn truncate(&mut self, from: LogIndex) {
        assert!(from > self.floor.0 && from <= self.last().0);
        self.entries.truncate((from.0 - self.floor.0.0 - 1) as usize);
        self.forget_written(from);
    }

    fn forget_written(&mut self, from: LogIndex) {
        if from <= self.handed {
            self.cut = Some(self.cut.map_or(from, |cut| cut.min(from)));
            self.handed = from.prev();
        }
        self.stable = self.stable.min(from.prev());
        for (_, last) in &mut self.pending {
            *last = (*last).min(from.prev());
        }
    }

    /// Drops the entries up to `floor`, which the shard's durable state covers.
    pub(crate) fn compact(&mut self, floor: LogIndex) {
        let Some(term) = self.term_at(floor) else { return };
        self.entries.drain(..(floor.0 - self.floor.0.0) as usize);
        self.floor = (floor, term);
        self.stable = self.stable.max(floor);
        self.handed = self.handed.max(floor);
    }

    /// Drops everything; the log goes on after `floor`, which lies beyond or beside it.
    pub(crate) fn restart(&mut self, floor: (LogIndex, Term)) {
        self.entries.clear();
        self.forget_written(floor.0.next());
        self.cut = self.cut.map(|cut| cut.max(floor.0.next())).filter(|_| self.handed >= floor.0);
        self.floor = floor;
        self.stable = floor.0;
        self.handed = floor.0;
    }

    /// Whether there is something to be written.
    pub(crate) fn is_dirty(&self) -> bool {
        self.cut.is_some() || self.handed < self.last().0
    }

    /// What is to be written with this ticket: where to cut first, then which entries to append.
    pub(crate) fn hand_out(&mut self, ticket: u64) -> (Option<LogIndex>, Range<LogIndex>) {
        let range = self.handed.next()..self.last().0.next();
        self.handed = self.last().0;
        self.pending.push_back((ticket, self.handed));
        (self.cut.take(), range)
    }

    /// Everything up to this ticket is on disk.
    pub(crate) fn durable(&mut self, ticket: u64) {
        while let Some((_, last)) = pop_front_if(&mut self.pending, |(t, _)| *t <= ticket) {
            self.stable = self.stable.max(last);
        }
    }

    pub(crate) fn check(&self) {
        assert!(self.floor.0 <= self.stable && self.stable <= self.handed && self.handed <= self.last().0);
    }
}
