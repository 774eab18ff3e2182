//! Aligned IO memory: one mapping a core, cut into runs of 1 to 32 blocks of 4 KiB.
//!
//! The mapping is cut into slabs of 128 KiB. A slab in use serves one size class (1, 2, 4, 8,
//! 16 or 32 blocks); a slab whose last run is freed returns to a common pool, so no class can
//! starve another for good. Reference counts live in a side table indexed by block: allocating,
//! cloning and freeing never touch the heap.
//!
//! Invariants: a run never crosses a slab; a [`BufMut`] is the only handle to its run; a run is
//! free exactly when its count is 0. Pages are touched first by whoever fills them, or all at once when the arena is
//! registered with the kernel; else an unused arena costs address space only. Freed runs keep their old bytes.
//!
//! In huge pages ([`Mapping`]) a run is one piece of physical memory, which is one segment to the disk instead of up to 32
//! (docs/performance.md).
//!
//! Runs of another core are read through a window: an arena over that core's memory, which hands out nothing but what was
//! lent to it, and gives it back when it is free ([`crate::loan`]).
//!
//! Deliberately absent: growth, and handles that threads share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::Arc;

use crate::api::IoError;
use crate::mapping::Mapping;

/// Bytes of a block, the unit of allocation and the alignment of every run.
pub const BLOCK_BYTES: usize = 4096;
/// Most blocks of one run.
pub const RUN_BLOCKS_MAX: usize = 32;
/// Bytes of a slab: the longest run.
pub const SLAB_BYTES: usize = RUN_BLOCKS_MAX * BLOCK_BYTES;
/// Size classes: 1, 2, 4, 8, 16 and 32 blocks.
const CLASSES: usize = 6;
/// No slab: the end of a list.
const NIL: u32 = u32::MAX;

const _: () = assert!(1 << (CLASSES - 1) == RUN_BLOCKS_MAX);

/// A core's IO memory. Clones are handles to the same memory; it is unmapped with the last of
/// them and of the buffers.
#[derive(Clone)]
pub struct Arena(Rc<Inner>);

struct Inner {
    memory: Arc<Mapping>,
    /// One count a block; only the first block of a run uses its own.
    counts: Box<[Cell<u32>]>,
    runs: Runs,
}

/// Whose the runs are.
enum Runs {
    /// Ours, cut from slabs.
    Own(RefCell<State>),
    /// Those of another core: each goes back to it by this ring.
    Borrowed(RefCell<rtrb::Producer<u32>>),
}

struct State {
    slabs: Box<[Slab]>,
    /// Head of the list of slabs that serve no class.
    pool: u32,
    /// Heads of the lists of slabs with a free run, a class each.
    partial: [u32; CLASSES],
    used_blocks: usize,
    high_water_blocks: usize,
}

#[derive(Clone, Copy)]
struct Slab {
    /// Bit i set: run i is free.
    free: u32,
    class: u8,
    prev: u32,
    next: u32,
}

/// All runs of a slab of this class, as a mask of free runs.
const fn all_free(class: usize) -> u32 {
    let runs = RUN_BLOCKS_MAX >> class;
    if runs == 32 { u32::MAX } else { (1 << runs) - 1 }
}

impl Arena {
    /// Maps `bytes` (rounded up to whole slabs of 128 KiB). Fails as mmap does.
    pub fn new(bytes: usize) -> Result<Self, IoError> {
        let slab_count = bytes.div_ceil(SLAB_BYTES).max(1);
        let bytes = slab_count * SLAB_BYTES;
        let memory = Arc::new(Mapping::new(bytes)?);
        let slabs = (0..slab_count as u32)
            .map(|i| Slab {
                free: 0,
                class: 0,
                prev: NIL,
                next: if i + 1 == slab_count as u32 { NIL } else { i + 1 },
            })
            .collect();
        let state = State { slabs, pool: 0, partial: [NIL; CLASSES], used_blocks: 0, high_water_blocks: 0 };
        Ok(Self::over(memory, Runs::Own(RefCell::new(state))))
    }

    fn over(memory: Arc<Mapping>, runs: Runs) -> Self {
        let counts = vec![Cell::new(0); memory.bytes() / BLOCK_BYTES].into_boxed_slice();
        Self(Rc::new(Inner { memory, counts, runs }))
    }

    /// A run of `blocks` (1 to 32) blocks, its bytes being whatever was there before; `None`
    /// when the arena is exhausted, which is backpressure for the caller to pass on.
    pub fn alloc(&self, blocks: usize) -> Option<BufMut> {
        assert!((1..=RUN_BLOCKS_MAX).contains(&blocks), "a run has 1 to 32 blocks, not {blocks}");
        let class = blocks.next_power_of_two().trailing_zeros() as usize;
        let first = self.own().borrow_mut().take(class)?;
        let count = &self.0.counts[first as usize];
        assert_eq!(count.get(), 0, "a free run had references");
        count.set(1);
        Some(BufMut(Run { arena: self.clone(), first, blocks: blocks as u32 }))
    }

    /// Blocks held by runs now, counting what rounding to a class adds.
    pub fn used_blocks(&self) -> usize {
        self.own().borrow().used_blocks
    }

    /// Blocks in all.
    pub fn capacity_blocks(&self) -> usize {
        self.0.memory.bytes() / BLOCK_BYTES
    }

    /// The most blocks ever held at once.
    pub fn high_water_blocks(&self) -> usize {
        self.own().borrow().high_water_blocks
    }

    /// Where the mapping begins, and its length in bytes: for registration with the kernel.
    pub fn mapping(&self) -> (*mut u8, usize) {
        (self.0.memory.base(), self.0.memory.bytes())
    }

    fn own(&self) -> &RefCell<State> {
        match &self.0.runs {
            Runs::Own(state) => state,
            Runs::Borrowed(_) => unreachable!("nobody has a window but the buffers on it"),
        }
    }

    /// One reference more to a run.
    fn hold(&self, first: u32) {
        let count = &self.0.counts[first as usize];
        count.set(count.get().checked_add(1).expect("fewer than 2^32 references to a run"));
    }

    /// One reference less; with the last the run is free, or goes back to its core.
    fn release(&self, first: u32) {
        let count = &self.0.counts[first as usize];
        count.set(count.get() - 1);
        if count.get() == 0 {
            match &self.0.runs {
                Runs::Own(state) => state.borrow_mut().give_back(first),
                Runs::Borrowed(back) => return_to(&mut back.borrow_mut(), first),
            }
        }
    }
}

/// What [`crate::loan`] is made of.
impl Arena {
    /// The memory, for another core to read lent runs in.
    pub(crate) fn memory(&self) -> Arc<Mapping> {
        self.0.memory.clone()
    }

    /// A window on another core's memory, whose runs go back by a ring that has room for every loan.
    pub(crate) fn window(memory: Arc<Mapping>, back: rtrb::Producer<u32>) -> Self {
        Self::over(memory, Runs::Borrowed(RefCell::new(back)))
    }

    /// Keeps a run of ours for another core, which is told where it begins, until [`Arena::end_loan`]. Refused: one of
    /// another arena, or that is borrowed itself.
    pub(crate) fn lend(&self, buf: &Buf) -> Option<u32> {
        Rc::ptr_eq(&self.0, &buf.0.arena.0).then(|| {
            self.hold(buf.0.first);
            buf.0.first
        })
    }

    /// A run has come back.
    pub(crate) fn end_loan(&self, first: u32) {
        self.release(first);
    }

    /// Blocks that a run keeps from others, what rounding to a class adds included.
    pub(crate) fn blocks_kept(&self, first: u32) -> usize {
        1 << self.own().borrow().slabs[first as usize / RUN_BLOCKS_MAX].class
    }

    /// Through a window: a run that was lent once for each call. It goes back as often.
    pub(crate) fn borrowed(&self, first: u32, blocks: u32) -> Buf {
        let Runs::Borrowed(back) = &self.0.runs else { unreachable!("only through a window") };
        if self.0.counts[first as usize].get() > 0 {
            // Held by an earlier loan, which goes back when this handle is dropped, too.
            return_to(&mut back.borrow_mut(), first);
        }
        self.hold(first);
        Buf(Run { arena: self.clone(), first, blocks })
    }
}

fn return_to(back: &mut rtrb::Producer<u32>, first: u32) {
    let returned = back.push(first);
    debug_assert!(returned.is_ok(), "the ring has room for every loan");
}

impl State {
    fn take(&mut self, class: usize) -> Option<u32> {
        if self.partial[class] == NIL {
            self.adopt_slab(class)?;
        }
        let index = self.partial[class];
        let slab = &mut self.slabs[index as usize];
        let run = slab.free.trailing_zeros();
        slab.free &= slab.free - 1;
        if slab.free == 0 {
            self.unlink(index);
        }
        self.used_blocks += 1 << class;
        self.high_water_blocks = self.high_water_blocks.max(self.used_blocks);
        Some(index * RUN_BLOCKS_MAX as u32 + (run << class))
    }

    fn give_back(&mut self, first: u32) {
        let index = first / RUN_BLOCKS_MAX as u32;
        let slab = &mut self.slabs[index as usize];
        let class = usize::from(slab.class);
        let bit = 1u32 << ((first % RUN_BLOCKS_MAX as u32) >> class);
        assert_eq!(slab.free & bit, 0, "a run was freed twice");
        let was_full = slab.free == 0;
        slab.free |= bit;
        let is_empty = slab.free == all_free(class);
        self.used_blocks -= 1 << class;
        match (was_full, is_empty) {
            (true, true) => self.retire(index),
            (false, true) => {
                self.unlink(index);
                self.retire(index);
            }
            (true, false) => self.link(index),
            (false, false) => {}
        }
    }

    fn adopt_slab(&mut self, class: usize) -> Option<()> {
        let index = self.pool;
        if index == NIL {
            return None;
        }
        let slab = &mut self.slabs[index as usize];
        self.pool = slab.next;
        slab.free = all_free(class);
        slab.class = class as u8;
        self.link(index);
        Some(())
    }

    fn retire(&mut self, index: u32) {
        let slab = &mut self.slabs[index as usize];
        slab.next = self.pool;
        slab.prev = NIL;
        self.pool = index;
    }

    fn link(&mut self, index: u32) {
        let class = usize::from(self.slabs[index as usize].class);
        let head = self.partial[class];
        self.slabs[index as usize].prev = NIL;
        self.slabs[index as usize].next = head;
        if head != NIL {
            self.slabs[head as usize].prev = index;
        }
        self.partial[class] = index;
    }

    fn unlink(&mut self, index: u32) {
        let Slab { class, prev, next, .. } = self.slabs[index as usize];
        match prev {
            NIL => self.partial[usize::from(class)] = next,
            prev => self.slabs[prev as usize].next = next,
        }
        if next != NIL {
            self.slabs[next as usize].prev = prev;
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({}/{} blocks)", self.used_blocks(), self.capacity_blocks())
    }
}

/// One reference to a run; dropping it gives the reference up.
struct Run {
    arena: Arena,
    first: u32,
    blocks: u32,
}

impl Run {
    fn ptr(&self) -> *mut u8 {
        // SAFETY: `first` lies within the mapping.
        unsafe { self.arena.0.memory.base().add(self.first as usize * BLOCK_BYTES) }
    }
    fn len(&self) -> usize {
        self.blocks as usize * BLOCK_BYTES
    }
    fn count(&self) -> &Cell<u32> {
        &self.arena.0.counts[self.first as usize]
    }
    fn bytes(&self) -> &[u8] {
        // SAFETY: the run lies within the mapping, which lives as long as `arena`; mapped memory
        // is initialised (zero or older bytes); writers hold the run alone as a BufMut, by
        // reference or inside an Op, where nobody can read it. A borrowed run is kept by its core, which
        // cannot write to it until it has come back.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len()) }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.arena.release(self.first);
    }
}

/// A run of blocks with one owner, who may fill it. Length: whole blocks, 4 KiB-aligned.
pub struct BufMut(Run);

impl BufMut {
    /// Its length in blocks, 1 to 32, as asked for.
    pub fn len_blocks(&self) -> usize {
        self.0.blocks as usize
    }
    /// Makes it read-only and shareable.
    pub fn freeze(self) -> Buf {
        Buf(self.0)
    }
    /// Byte offset of the run within the arena's mapping.
    pub fn arena_offset(&self) -> usize {
        self.0.first as usize * BLOCK_BYTES
    }
    pub(crate) fn as_ptr_mut(&mut self) -> *mut u8 {
        self.0.ptr()
    }
}

impl Deref for BufMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `Run::bytes`, and a BufMut is the only handle to its run, so `&mut self`
        // excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.0.ptr(), self.0.len()) }
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} blocks)", self.0.blocks)
    }
}

/// A run of blocks that is read-only and counted by reference; cloning is one increment.
pub struct Buf(Run);

impl Buf {
    /// Its length in blocks, 1 to 32.
    pub fn len_blocks(&self) -> usize {
        self.0.blocks as usize
    }
    /// Whether both are handles to one run.
    pub fn is_same_run(&self, other: &Buf) -> bool {
        self.0.ptr() == other.0.ptr()
    }
    /// Handles to this run, this one and those of other cores included.
    pub fn references(&self) -> u32 {
        self.0.count().get()
    }
    /// Whether it belongs to another core.
    pub fn is_borrowed(&self) -> bool {
        matches!(self.0.arena.0.runs, Runs::Borrowed(_))
    }
    /// The run for filling again if this is its only handle and it is this core's, else the handle back.
    pub fn try_unique(self) -> Result<BufMut, Buf> {
        if self.references() == 1 && !self.is_borrowed() { Ok(BufMut(self.0)) } else { Err(self) }
    }
}

impl Clone for Buf {
    fn clone(&self) -> Self {
        self.0.arena.hold(self.0.first);
        Self(Run { arena: self.0.arena.clone(), first: self.0.first, blocks: self.0.blocks })
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} blocks, {} references)", self.0.blocks, self.references())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exhausted_arena_says_so_and_recovers() {
        let arena = Arena::new(2 * SLAB_BYTES).unwrap();
        let held: Vec<_> = (0..64).map(|_| arena.alloc(1).unwrap()).collect();
        assert!(arena.alloc(1).is_none());
        assert_eq!(arena.used_blocks(), arena.capacity_blocks());
        drop(held);
        assert_eq!(arena.used_blocks(), 0);
        let whole = (arena.alloc(32).unwrap(), arena.alloc(17).unwrap());
        assert!(arena.alloc(1).is_none(), "17 blocks occupy a class of 32");
        drop(whole);
        assert_eq!(arena.high_water_blocks(), 64);
    }

    #[test]
    fn a_run_lives_until_its_last_reference_is_gone() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let mut run = arena.alloc(32).unwrap();
        run.fill(7);
        let a = run.freeze();
        let b = a.clone();
        let a = a.try_unique().unwrap_err();
        drop(a);
        assert!(arena.alloc(1).is_none());
        assert!(b.iter().all(|byte| *byte == 7));
        let unique = b.try_unique().unwrap();
        drop(unique);
        assert!(arena.alloc(32).is_some());
    }

    #[test]
    fn buffers_outlive_the_arena_handle() {
        let arena = Arena::new(SLAB_BYTES).unwrap();
        let mut run = arena.alloc(2).unwrap();
        drop(arena);
        run.fill(3);
        assert_eq!(run.len(), 8192);
        assert_eq!(run[8191], 3);
    }

    #[test]
    fn random_allocation_never_hands_out_a_block_twice() {
        let arena = Arena::new(16 * SLAB_BYTES).unwrap();
        let mut owner = vec![false; arena.capacity_blocks()];
        let mut held: Vec<BufMut> = Vec::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..if cfg!(miri) { 1_000 } else { 200_000 } {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let draw = (seed >> 33) as usize;
            if draw.is_multiple_of(2) {
                if let Some(run) = arena.alloc(draw / 2 % 32 + 1) {
                    assert_eq!(run.as_ptr() as usize % BLOCK_BYTES, 0);
                    mark(&mut owner, &run, true);
                    held.push(run);
                }
            } else if !held.is_empty() {
                let run = held.swap_remove(draw / 2 % held.len());
                mark(&mut owner, &run, false);
            }
            let least: usize = held.iter().map(BufMut::len_blocks).sum();
            assert!(arena.used_blocks() >= least);
        }
        drop(held);
        assert_eq!(arena.used_blocks(), 0);
        let all: Vec<_> = (0..16).map_while(|_| arena.alloc(32)).collect();
        assert_eq!(all.len(), 16, "every slab came back to the pool");
    }

    fn mark(owner: &mut [bool], run: &BufMut, taken: bool) {
        let first = run.arena_offset() / BLOCK_BYTES;
        for block in &mut owner[first..first + run.len_blocks()] {
            assert_ne!(*block, taken);
            *block = taken;
        }
    }
}
