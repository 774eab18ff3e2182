//! The order of overlapping writes on one copyset's leader.
//!
//! Whole-block writes need no care: the Raft log orders them. A write that covers only part of
//! a block (volumes with 512-byte blocks) is read, merged and then proposed whole, and in that
//! window nothing else may slip past it on the same blocks, or one of the two would be lost.
//!
//! Rules, for a write W that arrives:
//! 1. W waits while any earlier waiting write overlaps it.
//! 2. A partial W also waits while any proposed, not yet applied write overlaps it, since its
//!    read must see them.
//! 3. A partial W that need not wait is read; it keeps its place until it is proposed.
//!
//! Knows nothing of replicas, buffers or disks: `W` is whatever the caller keeps with a write.

use protocol::types::{BlockRange, ChunkId, LogIndex};
use std::collections::VecDeque;

/// What to do with a write now.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<W> {
    /// Propose it.
    Propose(W),
    /// Read its blocks, merge, then take it back with [`Ordering::merged`].
    Read { id: u64 },
}

struct Waiting<W> {
    id: u64,
    chunk: ChunkId,
    range: BlockRange,
    partial: bool,
    /// Its read is under way.
    reading: bool,
    write: W,
}

/// All writes of one copyset between arrival and apply.
pub struct Ordering<W> {
    proposed: Vec<(LogIndex, ChunkId, BlockRange)>,
    waiting: VecDeque<Waiting<W>>,
    next_id: u64,
}

impl<W> Default for Ordering<W> {
    fn default() -> Self {
        Self { proposed: Vec::new(), waiting: VecDeque::new(), next_id: 0 }
    }
}

impl<W> Ordering<W> {
    /// Takes a write in; `None` means that it waits for others.
    pub fn arrive(&mut self, chunk: ChunkId, range: BlockRange, partial: bool, write: W) -> Option<Step<W>> {
        let blocked = self.blocked(self.waiting.len(), chunk, range, partial);
        if !blocked && !partial {
            return Some(Step::Propose(write));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Waiting { id, chunk, range, partial, reading: !blocked, write });
        (!blocked).then_some(Step::Read { id })
    }

    /// Takes back a write whose read is done, to be proposed now.
    pub fn merged(&mut self, id: u64) -> Option<(W, ChunkId, BlockRange)> {
        let at = self.waiting.iter().position(|w| w.id == id && w.reading)?;
        self.waiting.remove(at).map(|w| (w.write, w.chunk, w.range))
    }

    /// Notes that a write was proposed as `index`.
    pub fn proposed(&mut self, index: LogIndex, chunk: ChunkId, range: BlockRange) {
        self.proposed.push((index, chunk, range));
    }

    /// Forgets all proposed writes up to `index`: they are applied.
    pub fn applied(&mut self, index: LogIndex) {
        self.proposed.retain(|(at, ..)| *at > index);
    }

    /// Whether [`Ordering::next`] may have something; cheap.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next write that no longer has to wait, together with where it goes.
    pub fn next(&mut self) -> Option<(Step<W>, ChunkId, BlockRange)> {
        let at = (0..self.waiting.len()).find(|at| {
            let w = &self.waiting[*at];
            !w.reading && !self.blocked(*at, w.chunk, w.range, w.partial)
        })?;
        let (chunk, range) = (self.waiting[at].chunk, self.waiting[at].range);
        if self.waiting[at].partial {
            self.waiting[at].reading = true;
            return Some((Step::Read { id: self.waiting[at].id }, chunk, range));
        }
        let w = self.waiting.remove(at)?;
        Some((Step::Propose(w.write), chunk, range))
    }

    /// Gives everything that waits back, in order: leadership is lost.
    pub fn drain(&mut self) -> impl Iterator<Item = W> {
        self.proposed.clear();
        std::mem::take(&mut self.waiting).into_iter().map(|w| w.write)
    }

    fn blocked(&self, before: usize, chunk: ChunkId, range: BlockRange, partial: bool) -> bool {
        let overlaps = |c: ChunkId, r: BlockRange| c == chunk && r.overlaps(range);
        self.waiting.iter().take(before).any(|w| overlaps(w.chunk, w.range))
            || (partial && self.proposed.iter().any(|(_, c, r)| overlaps(*c, *r)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::types::VolumeId;

    const CHUNK: ChunkId = ChunkId { volume: VolumeId(1), index: 0 };

    fn range(first: usize, count: usize) -> BlockRange {
        BlockRange::new(first, count).expect("within a chunk")
    }

    #[test]
    fn whole_blocks_never_wait_for_each_other() {
        let mut order = Ordering::default();
        assert_eq!(order.arrive(CHUNK, range(0, 2), false, 'a'), Some(Step::Propose('a')));
        order.proposed(LogIndex(1), CHUNK, range(0, 2));
        assert_eq!(order.arrive(CHUNK, range(1, 2), false, 'b'), Some(Step::Propose('b')));
    }

    #[test]
    fn a_partial_write_reads_only_after_what_it_overlaps_is_applied() {
        let mut order = Ordering::default();
        order.proposed(LogIndex(1), CHUNK, range(0, 1));
        assert_eq!(order.arrive(CHUNK, range(0, 1), true, 'p'), None);
        assert_eq!(order.next(), None);
        order.applied(LogIndex(1));
        assert_eq!(order.next(), Some((Step::Read { id: 0 }, CHUNK, range(0, 1))));
        assert_eq!(order.next(), None, "it is read once");
        assert_eq!(order.merged(0), Some(('p', CHUNK, range(0, 1))));
    }

    #[test]
    fn a_whole_write_does_not_slip_past_a_partial_one_being_read() {
        let mut order = Ordering::default();
        assert_eq!(order.arrive(CHUNK, range(3, 1), true, 'p'), Some(Step::Read { id: 0 }));
        assert_eq!(order.arrive(CHUNK, range(2, 4), false, 'w'), None);
        assert_eq!(order.arrive(CHUNK, range(5, 1), true, 'q'), None, "waits for w, which waits for p");
        assert_eq!(order.arrive(CHUNK, range(9, 1), false, 'x'), Some(Step::Propose('x')));
        assert_eq!(order.next(), None);
        assert!(order.merged(0).is_some());
        order.proposed(LogIndex(7), CHUNK, range(3, 1));
        assert_eq!(order.next(), Some((Step::Propose('w'), CHUNK, range(2, 4))));
        order.proposed(LogIndex(8), CHUNK, range(2, 4));
        assert_eq!(order.next(), None, "q must see w");
        order.applied(LogIndex(8));
        assert_eq!(order.next(), Some((Step::Read { id: 2 }, CHUNK, range(5, 1))));
    }

    #[test]
    fn losing_leadership_gives_everything_back_in_order() {
        let mut order = Ordering::default();
        order.arrive(CHUNK, range(3, 1), true, 'p');
        order.arrive(CHUNK, range(3, 1), false, 'w');
        assert_eq!(order.drain().collect::<String>(), "pw");
        assert!(!order.has_waiting());
    }
}
