//! Background preformatting: first the log's segments, then chunk slots ahead of need.

use crate::api::*;
use crate::read::Pending;
use crate::store::Store;
use crate::table::PAGES;
use protocol::types::{BLOCK_BYTES, CHUNK_BLOCKS, Span, Time};
use smallvec::SmallVec;

/// Blocks zeroed by one operation.
const STEP_BLOCKS: usize = 256;
/// How long after a refusal for lack of space it is tried again.
const RETRY: Span = Span::ms(30_000);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    Segment(u32),
    Slot(u32),
}

/// The state of preformatting: one operation in flight at most.
#[derive(Default)]
pub(crate) struct Preformat {
    work: Option<Work>,
    /// Blocks of the work that are zeroed; `None`: its file is to be made first.
    done: Option<usize>,
    in_flight: bool,
    pub retry_at: Option<Time>,
}

impl Preformat {
    pub(crate) fn idle(&self) -> bool {
        self.work.is_none()
    }
}

impl<P: Payload> Store<P> {
    fn preformat_work(&self) -> Option<Work> {
        if self.log.ready < self.layout.log_segments {
            return Some(Work::Segment(self.log.ready));
        }
        let ahead = self.layout.reserve_slots.max(u32::from(!self.flush.slotless.is_empty())) as usize;
        let more = self.pool.free_ready() < ahead && self.pool.ready < self.pool.max;
        more.then_some(Work::Slot(self.pool.ready))
    }

    pub(crate) fn preformat_op(&mut self) -> Option<Op<P>> {
        if self.preformat.in_flight || self.preformat.retry_at.is_some_and(|at| self.now < at) {
            return None;
        }
        self.preformat.retry_at = None;
        if self.preformat.work.is_none() {
            self.preformat.work = Some(self.preformat_work()?);
            self.preformat.done = None;
        }
        let work = self.preformat.work?;
        self.preformat.in_flight = true;
        let file = match work {
            Work::Segment(segment) => FileId::Log(segment),
            Work::Slot(slot) => self.layout.data_place(slot).0,
        };
        let ticket = self.ticket(file, Pending::Preformat);
        let Some(done) = self.preformat.done else {
            let bytes = match work {
                Work::Segment(_) => self.layout.segment_bytes.into(),
                Work::Slot(_) => self.layout.chunk_file_bytes(),
            };
            return Some(Op::Create { ticket, file, bytes });
        };
        let (offset, blocks) = self.preformat_place(work, done);
        let pieces = SmallVec::from_iter([Piece::Zeroes { blocks }]);
        Some(Op::Write { ticket, file, offset, pieces, dsync: false })
    }

    /// Offset and blocks of the next step. A slot's table comes after its data.
    fn preformat_place(&self, work: Work, done: usize) -> (u64, usize) {
        let bytes = |blocks: usize| (blocks * BLOCK_BYTES) as u64;
        match work {
            Work::Segment(_) => (bytes(done), STEP_BLOCKS.min(self.layout.segment_blocks() as usize - done)),
            Work::Slot(slot) if done < CHUNK_BLOCKS => {
                (self.layout.data_place(slot).1 + bytes(done), STEP_BLOCKS)
            }
            Work::Slot(slot) => (self.layout.table_place(slot).1, TABLE_BLOCKS as usize),
        }
    }

    pub(crate) fn preformat_done(&mut self, result: Result<(), IoError>) {
        const _: () = assert!(CHUNK_BLOCKS.is_multiple_of(STEP_BLOCKS) && PAGES < TABLE_BLOCKS as usize);
        self.preformat.in_flight = false;
        let Some(work) = self.preformat.work else { return };
        if let Err(error) = result {
            return self.preformat_refused(work, error);
        }
        let Some(done) = self.preformat.done else {
            self.preformat.done = Some(0);
            return;
        };
        let done = done + self.preformat_place(work, done).1;
        self.preformat.done = Some(done);
        let all = match work {
            Work::Segment(_) => self.layout.segment_blocks() as usize,
            Work::Slot(_) => CHUNK_BLOCKS + TABLE_BLOCKS as usize,
        };
        if done >= all {
            self.preformatted(work);
        }
    }

    fn preformatted(&mut self, work: Work) {
        self.preformat.work = None;
        match work {
            Work::Segment(segment) => {
                self.log.free.push_back(segment);
                self.log.ready += 1;
                self.round.touch(FileId::Log(segment));
            }
            Work::Slot(slot) => {
                self.pool.grow(slot + 1);
                self.pool.limited = false;
                self.round.touch(self.layout.data_place(slot).0);
            }
        }
        let (segments, slots) = (self.log.ready, self.pool.ready);
        self.events.push_back(Event::Preformat { segments, slots });
    }

    /// Nothing is lost by a refusal: the pool stays as it is, and it is tried again later.
    fn preformat_refused(&mut self, work: Work, error: IoError) {
        self.preformat.work = None;
        self.preformat.retry_at = Some(self.now + RETRY);
        self.stats.no_space += u64::from(error.errno == ENOSPC);
        if matches!(work, Work::Slot(_)) && !self.pool.limited {
            self.pool.limited = true;
            self.events.push_back(Event::PoolLimited { slots: self.pool.ready });
        }
    }
}
