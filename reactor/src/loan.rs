//! Block data from core to core without a copy: runs of one core's arena, lent to another.
//!
//! A [`Lender`] keeps a run and makes a [`Loan`] of it, which travels by mailbox. The [`Borrower`] makes a [`Buf`] of that, read
//! in place through a window on the lender's memory. When the last handle to it is dropped the run goes back by a ring of
//! its own, which has room for every loan, so that nobody waits and nobody is woken; the lender collects what has come
//! back when it lends, and at each turn.
//!
//! Invariants: a run that is lent has a reference, so its core cannot write to it ([`Buf::try_unique`]); neither can the
//! borrower. Each loan that was borrowed comes back once. The memory outlives both sides. How much is lent at once is
//! bounded, so that a core which does not give back cannot take a lender's arena.
//!
//! Deliberately absent: lending on what is borrowed; calling a loan back.

use std::sync::{Arc, OnceLock};

use rtrb::{Consumer, Producer, RingBuffer};

use crate::arena::{Arena, Buf};
use crate::mapping::Mapping;

/// Loans under way between two cores in one direction, at most.
pub const LOANS_MAX: usize = 1024;

/// What both sides know.
#[derive(Default)]
struct Shared {
    /// The lender's, once it has started.
    memory: OnceLock<Arc<Mapping>>,
}

/// A run on its way to the borrower. One that is dropped on the way stays lent.
#[derive(Debug)]
pub struct Loan {
    /// Whose: the address of what both sides share.
    pair: usize,
    first: u32,
    blocks: u32,
}

/// The side that lends, before it is on its core.
pub struct LenderEnd {
    shared: Arc<Shared>,
    back: Consumer<u32>,
}

/// The side that borrows, before it is on its core.
pub struct BorrowerEnd {
    shared: Arc<Shared>,
    back: Producer<u32>,
}

/// The side that lends.
pub struct Lender {
    shared: Arc<Shared>,
    arena: Arena,
    back: Consumer<u32>,
    loans: usize,
    blocks: usize,
    blocks_max: usize,
}

/// The side that borrows.
pub struct Borrower {
    shared: Arc<Shared>,
    way: Way,
}

/// How the borrower reads.
enum Way {
    /// Not yet; later the window has the ring.
    Back(Option<Producer<u32>>),
    Window(Arena),
}

/// Both sides of one direction.
pub fn pair() -> (LenderEnd, BorrowerEnd) {
    let (to_lender, from_borrower) = RingBuffer::new(LOANS_MAX);
    let shared = Arc::<Shared>::default();
    let lender = LenderEnd { shared: shared.clone(), back: from_borrower };
    (lender, BorrowerEnd { shared, back: to_lender })
}

impl LenderEnd {
    /// Lends from this core's arena, one part in `share` of it at most.
    pub fn start(self, arena: &Arena, share: usize) -> Lender {
        let Self { shared, back } = self;
        shared.memory.get_or_init(|| arena.memory());
        let blocks_max = arena.capacity_blocks() / share;
        Lender { shared, arena: arena.clone(), back, loans: 0, blocks: 0, blocks_max }
    }
}

impl BorrowerEnd {
    /// Borrows on this core.
    pub fn start(self) -> Borrower {
        Borrower { shared: self.shared, way: Way::Back(Some(self.back)) }
    }
}

impl Lender {
    /// Lends a run; `None` when as much is lent as may be, or the run is not of this core's arena.
    pub fn lend(&mut self, buf: &Buf) -> Option<Loan> {
        self.collect();
        if self.loans == LOANS_MAX {
            return None;
        }
        let first = self.arena.lend(buf)?;
        let kept = self.arena.blocks_kept(first);
        if self.blocks + kept > self.blocks_max {
            self.arena.end_loan(first);
            return None;
        }
        self.loans += 1;
        self.blocks += kept;
        Some(Loan { pair: Arc::as_ptr(&self.shared).addr(), first, blocks: buf.len_blocks() as u32 })
    }

    /// Ends a loan that was not sent.
    pub fn take_back(&mut self, loan: Loan) {
        assert_eq!(loan.pair, Arc::as_ptr(&self.shared).addr(), "a loan of this pair");
        self.ended(loan.first);
    }

    fn ended(&mut self, first: u32) {
        self.loans -= 1;
        self.blocks -= self.arena.blocks_kept(first);
        self.arena.end_loan(first);
    }

    /// Takes what has come back; to be called now and then, for the memory is kept until then.
    pub fn collect(&mut self) {
        while let Ok(first) = self.back.pop() {
            self.ended(first);
        }
    }

    /// Blocks of this core that are lent, what rounding to a class adds included.
    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

impl Borrower {
    /// The run, to be read in place; it goes back with its last handle.
    pub fn borrow(&mut self, loan: Loan) -> Buf {
        assert_eq!(loan.pair, Arc::as_ptr(&self.shared).addr(), "a loan of this pair");
        if let Way::Back(back) = &mut self.way {
            let memory = self.shared.memory.get().expect("who has lent has started").clone();
            self.way = Way::Window(Arena::window(memory, back.take().expect("taken once, here")));
        }
        let Way::Window(window) = &self.way else { unreachable!("made above") };
        window.borrowed(loan.first, loan.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::SLAB_BYTES;

    /// One that lends one part in `share` of the arena, and one that borrows.
    fn lent(arena: &Arena, share: usize) -> (Lender, Borrower) {
        let (lender, borrower) = pair();
        (lender.start(arena, share), borrower.start())
    }

    fn filled(arena: &Arena, blocks: usize, byte: u8) -> Buf {
        let mut run = arena.alloc(blocks).expect("room");
        run.fill(byte);
        run.freeze()
    }

    #[test]
    fn a_run_is_read_on_another_thread_and_comes_back_to_be_used_again() {
        let arena = Arena::new(8 * SLAB_BYTES).unwrap();
        let (lender, borrower) = pair();
        let mut lender = lender.start(&arena, 2);
        let (mut to, mut from) = rtrb::RingBuffer::new(LOANS_MAX);
        let rounds = if cfg!(miri) { 50_u32 } else { 20_000 };
        let reader = std::thread::spawn(move || {
            let mut borrower = borrower.start();
            let mut read = 0_u32;
            while read < rounds {
                let Ok(loan) = from.pop() else {
                    std::thread::yield_now();
                    continue;
                };
                let buf = borrower.borrow(loan);
                let copy = buf.clone();
                drop(buf);
                assert!(copy.iter().step_by(512).all(|byte| *byte == read as u8), "run {read}");
                read += 1;
            }
        });
        let mut sent = 0_u32;
        while sent < rounds {
            lender.collect();
            let Some(mut run) = arena.alloc(1 + sent as usize % 4) else {
                std::thread::yield_now();
                continue;
            };
            run.fill(sent as u8);
            let run = run.freeze();
            if let Some(loan) = lender.lend(&run) {
                to.push(loan).expect("as many places as loans");
                sent += 1;
            }
        }
        reader.join().unwrap();
        lender.collect();
        assert_eq!((lender.blocks(), arena.used_blocks()), (0, 0), "all has come back");
    }

    #[test]
    fn what_is_lent_can_neither_be_written_nor_lent_on() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let ((mut lender, mut borrower), (mut next, _far)) = (lent(&arena, 1), lent(&arena, 1));
        let run = filled(&arena, 1, 5);
        let loan = lender.lend(&run).unwrap();
        let run = run.try_unique().expect_err("it is lent");
        let there = borrower.borrow(loan);
        assert!(there.is_borrowed() && !run.is_borrowed() && there.is_same_run(&run));
        assert!(next.lend(&there).is_none(), "not the core's own");
        let there = there.try_unique().expect_err("it is another core's");
        drop(there);
        let run = run.try_unique().expect_err("nobody has looked what came back");
        lender.collect();
        run.try_unique().expect("it is back");
    }

    #[test]
    fn a_run_lent_twice_comes_back_twice_and_is_free_after_the_second() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let (mut lender, mut borrower) = lent(&arena, 1);
        let run = filled(&arena, 3, 9);
        let loans = [lender.lend(&run).unwrap(), lender.lend(&run).unwrap()];
        drop(run);
        assert_eq!(lender.blocks(), 8, "two of four blocks each, as the class has it");
        let [one, two] = loans.map(|loan| borrower.borrow(loan));
        assert_eq!(one.len_blocks(), 3);
        drop(one);
        lender.collect();
        assert_eq!((lender.blocks(), arena.used_blocks()), (4, 4));
        assert!(two.iter().all(|byte| *byte == 9));
        drop(two);
        lender.collect();
        assert_eq!((lender.blocks(), arena.used_blocks()), (0, 0));
    }

    #[test]
    fn no_more_is_lent_than_the_share_of_the_arena_and_the_ring_can_take_back() {
        let arena = Arena::new(64 * SLAB_BYTES).unwrap();
        let (mut lender, mut borrower) = lent(&arena, 4);
        let run = filled(&arena, 32, 0);
        let big: Vec<_> = std::iter::from_fn(|| lender.lend(&run)).collect();
        assert_eq!(big.len(), 16, "a quarter of 64");
        let first = big.into_iter().next().unwrap();
        // Fifteen loans that never arrive stay lent; one that does makes room for one.
        drop(borrower.borrow(first));
        assert!(lender.lend(&run).is_some() && lender.lend(&run).is_none());

        let (mut lender, _borrower) = lent(&arena, 1);
        let block = filled(&arena, 1, 0);
        assert_eq!(std::iter::from_fn(|| lender.lend(&block)).count(), LOANS_MAX);
    }

    #[test]
    fn the_memory_lives_as_long_as_whoever_reads_it() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let (mut lender, mut borrower) = lent(&arena, 1);
        let loan = lender.lend(&filled(&arena, 2, 3)).unwrap();
        drop((lender, arena));
        let there = borrower.borrow(loan);
        drop(borrower);
        assert!(there.iter().all(|byte| *byte == 3));
    }

    #[test]
    #[should_panic(expected = "a loan of this pair")]
    fn a_loan_is_good_for_its_borrower_only() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let ((mut lender, _one), (_lender, mut other)) = (lent(&arena, 1), lent(&arena, 1));
        let loan = lender.lend(&filled(&arena, 1, 0)).unwrap();
        other.borrow(loan);
    }
}
