//! Chunks that are discarded: their slots come back, and who gets one next finds zeroes in it,
//! wherever power was cut.
#![allow(missing_docs)]

mod common;
use ashlar_chunkstore::*;
use common::*;
use protocol::raft::{Body, Entry, Members};
use protocol::types::*;
use std::collections::BTreeMap;
use std::sync::OnceLock;

const CS: CopysetId = CopysetId(1);
const OLD: ChunkId = ChunkId { volume: VolumeId(1), index: 1 };
const NEXT: ChunkId = ChunkId { volume: VolumeId(2), index: 1 };

/// There is one slot.
fn layout() -> Layout {
    Layout { slots_per_file: 1, slots_max: 1, reserve_slots: 1, zero_blocks_max: 2000, ..small_layout() }
}

fn range(first: usize, count: usize) -> BlockRange {
    BlockRange::new(first, count).expect("within a chunk")
}

#[derive(Clone)]
enum Step {
    /// An entry, with a seed a block.
    Entry(Body, Vec<u64>),
    /// What is staged is committed.
    Commit,
    /// Milliseconds.
    Pass(u64),
}

fn write(chunk: ChunkId, first: usize, seeds: &[u64]) -> Step {
    Step::Entry(Body::Write { chunk, range: range(first, seeds.len()) }, seeds.to_vec())
}

fn zero(chunk: ChunkId, first: usize, count: usize) -> Step {
    Step::Entry(Body::Zero { chunk, range: range(first, count) }, Vec::new())
}

/// A disk with its slot and all of its log preformatted, which takes most of the time.
fn prepared() -> Disk {
    static DISK: OnceLock<Disk> = OnceLock::new();
    let make = || {
        let mut rig = Rig::new(&layout());
        rig.pass(5000);
        rig.store.stop();
        rig.settle();
        rig.disk
    };
    DISK.get_or_init(make).clone()
}

/// A store that does steps until its power is cut.
struct World {
    rig: Rig,
    entries: Vec<(Body, Vec<u64>)>,
    committed: usize,
    /// Operations that still complete.
    left: u64,
}

impl World {
    fn new(left: u64) -> Self {
        let (mut rig, ..) = Rig::open(prepared(), &layout());
        rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
        rig.settle();
        Self { rig, entries: Vec::new(), committed: 0, left }
    }
    /// False when the power is cut amid it.
    fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::Entry(body, seeds) => self.stage(*body, seeds),
            Step::Commit => {
                // Nothing is committed that is durable nowhere.
                if !self.settle() {
                    return false;
                }
                self.committed = self.entries.len();
                self.rig.store.commit(CS, LogIndex(self.committed as u64));
            }
            Step::Pass(ms) => {
                for _ in 0..ms.div_ceil(20) {
                    self.rig.now.0 += 20_000_000;
                    if !self.settle() {
                        return false;
                    }
                }
            }
        }
        self.settle()
    }
    fn stage(&mut self, body: Body, seeds: &[u64]) {
        self.entries.push((body, seeds.to_vec()));
        let entry = Entry { term: Term(1), index: LogIndex(self.entries.len() as u64), body };
        let crcs: Vec<u32> = seeds.iter().map(|seed| block_crc(&block(*seed))).collect();
        let payload = (!seeds.is_empty()).then(|| Buf::of(seeds));
        self.rig.store.stage(Record::Entry { copyset: CS, entry }, payload, &crcs);
    }
    fn settle(&mut self) -> bool {
        self.rig.drain();
        while !self.rig.ops.is_empty() {
            if self.left == 0 {
                return false;
            }
            self.left -= 1;
            self.rig.complete(0);
            self.rig.drain();
        }
        true
    }
    /// Power comes back; what the log has is committed after all.
    fn crash(self, seed: u64) -> Self {
        let (mut world, applied) = self.restart(seed);
        world.check_before_commit(applied, seed);
        world.rig.store.commit(CS, LogIndex(world.committed as u64));
        world
    }
    /// As [`World::crash`], without a look at it; and the entry that is applied.
    fn restart(self, seed: u64) -> (Self, usize) {
        let (rig, found, report) = self.rig.crash(&layout(), &mut Rng(seed));
        assert_eq!(report.damages, Vec::<String>::new(), "seed {seed}");
        let last = found[0].entries.last().map_or(found[0].floor.0, |entry| entry.index);
        assert!(last.0 as usize >= self.committed, "seed {seed}: a committed entry is lost");
        let entries = self.entries[..last.0 as usize].to_vec();
        let world = Self { rig, committed: entries.len(), entries, left: u64::MAX };
        (world, found[0].applied.0 as usize)
    }
    /// Before a leader has confirmed anything, every block is whole, and as some entry left it.
    fn check_before_commit(&mut self, applied: usize, seed: u64) {
        for chunk in [OLD, NEXT] {
            let states: Vec<_> = (applied..=self.entries.len()).map(|to| self.state(chunk, to)).collect();
            for first in [0, 816, 4064] {
                for (nth, found) in self.read(chunk, first).into_iter().enumerate() {
                    let ok = states.iter().any(|s| s.get(&(first + nth)).copied().unwrap_or(0) == found);
                    assert!(ok, "seed {seed}: {chunk:?} block {}: {found}", first + nth);
                }
            }
        }
    }
    fn read(&mut self, chunk: ChunkId, first: usize) -> Vec<u64> {
        self.rig.store.read(7, chunk, range(first, 32));
        self.settle();
        let read = self.rig.events.drain(..).find_map(|event| match event {
            Event::Read { token: 7, result } => Some(result),
            _ => None,
        });
        Rig::read_seeds(&read.expect("answered").expect("no block is bad"))
    }
    fn state(&self, chunk: ChunkId, entries: usize) -> BTreeMap<usize, u64> {
        let mut blocks = BTreeMap::new();
        for (body, seeds) in &self.entries[..entries] {
            match body {
                Body::Write { chunk: at, range } if *at == chunk => {
                    blocks.extend(range.blocks().zip(seeds.iter().copied()));
                }
                Body::Zero { chunk: at, range } if *at == chunk => {
                    blocks.retain(|block, _| !range.blocks().contains(block));
                }
                _ => {}
            }
        }
        blocks
    }
    /// Both chunks, block by block.
    fn check(&mut self, what: &str) {
        for chunk in [OLD, NEXT] {
            let expected = self.state(chunk, self.committed);
            for first in [0, 816, 4064] {
                let seeds = self.read(chunk, first);
                let wanted: Vec<u64> =
                    (first..first + 32).map(|block| expected.get(&block).copied().unwrap_or(0)).collect();
                assert_eq!(seeds, wanted, "{what}: {chunk:?} from {first}");
            }
        }
    }
    fn slots(&self) -> (u64, u64) {
        let stats = self.rig.store.stats();
        (stats.used_slots, stats.free_slots)
    }
}

/// Ways to discard all of a chunk.
fn discards() -> Vec<(&'static str, Vec<Step>)> {
    let eighths: Vec<Step> = (0..8).map(|nth| zero(OLD, (nth * 5 % 8) * 512, 512)).collect();
    vec![
        ("whole", vec![zero(OLD, 0, 4096)]),
        ("in eighths, out of order", eighths),
        ("what holds data only", vec![zero(OLD, 4070, 2), zero(OLD, 0, 900)]),
    ]
}

/// A chunk that is written and flushed, discarded, and its slot another's.
fn script(discard: &[Step], flushes_between: bool, waits: bool) -> Vec<Step> {
    let mut steps = vec![
        write(OLD, 0, &[1, 2, 3, 4]),
        write(OLD, 820, &[5, 6]),
        write(OLD, 4070, &[7, 8]),
        Step::Commit,
        Step::Pass(4000),
        write(OLD, 2, &[9]),
        Step::Commit,
    ];
    for step in discard {
        steps.extend([step.clone(), Step::Commit]);
        if flushes_between {
            steps.push(Step::Pass(3000));
        }
    }
    if waits {
        steps.push(Step::Pass(5000));
    }
    // Else the slot is wanted before a checkpoint has given it up.
    steps.extend([write(NEXT, 2, &[21, 22]), Step::Commit, Step::Pass(4000)]);
    steps
}

#[test]
fn the_slot_of_a_discarded_chunk_comes_back_and_its_next_owner_reads_zeroes() {
    for (what, discard) in discards() {
        for flushes_between in [false, true] {
            let mut world = World::new(u64::MAX);
            let steps = script(&discard, flushes_between, true);
            let (old, next) = steps.split_at(steps.len() - 3);
            old.iter().for_each(|step| assert!(world.step(step)));
            assert_eq!(world.slots(), (0, 1), "{what}: nothing is left of it");
            assert_eq!(world.rig.store.slots_in_use().count(), 0, "{what}");
            assert_eq!(world.rig.store.chunks_of(CS), [], "{what}");
            next.iter().for_each(|step| assert!(world.step(step)));
            assert_eq!(world.slots(), (1, 0), "{what}: the only slot is the next owner's");
            let in_use: Vec<_> = world.rig.store.slots_in_use().collect();
            assert_eq!(in_use, [(CS, NEXT.volume, 1)], "{what}");
            // A restart counts them from the checkpoint.
            let mut world = world.crash(7);
            assert_eq!(world.rig.store.slots_in_use().collect::<Vec<_>>(), in_use, "{what}");
            world.check(what);
            assert_eq!(world.rig.store.stats().corrupt_blocks, 0);
        }
    }
}

#[test]
fn power_cut_at_any_step_of_a_discard_and_a_reuse_shows_nobody_what_was_there() {
    for (what, discard) in discards() {
        for (flushes_between, waits) in [(false, true), (true, true), (false, false)] {
            let steps = script(&discard, flushes_between, waits);
            let mut cuts = 0;
            for cut in 0.. {
                let mut world = World::new(cut);
                if steps.iter().all(|step| world.step(step)) {
                    break;
                }
                cuts += 1;
                let what = format!("{what}, cut after {cut} operations");
                let mut world = world.crash(cut);
                world.check(&what);
                assert!(world.step(&Step::Pass(5000)), "it goes on");
                world.check(&what);
                if cut % 3 > 0 {
                    continue;
                }
                // Once more, from what that left behind.
                let mut world = world.crash(cut + 1000);
                world.check(&what);
                if world.committed >= steps.iter().filter(|s| matches!(s, Step::Entry(..))).count() - 1 {
                    // All is discarded: the slot can be had, if the next owner has it not yet.
                    assert!(world.step(&write(NEXT, 4064, &[31])) && world.step(&Step::Commit));
                    assert!(world.step(&Step::Pass(5000)));
                    assert_eq!(world.slots(), (1, 0), "{what}");
                    world.check(&what);
                }
            }
            assert!(cuts > 20, "{what}: {cuts} moments");
        }
    }
}

#[test]
fn a_full_disk_has_room_again_soon_after_a_discard_without_being_idle() {
    let mut world = World::new(u64::MAX);
    for step in [write(OLD, 0, &[1]), Step::Commit, Step::Pass(4000)] {
        assert!(world.step(&step));
    }
    assert!(!world.rig.store.can_allocate(1) && !world.rig.store.has_slot(NEXT));
    for step in [zero(OLD, 0, 4096), Step::Commit, Step::Pass(200)] {
        assert!(world.step(&step));
    }
    assert!(world.rig.store.can_allocate(1), "less than the 2 s of idleness later: {:?}", world.slots());
}

#[test]
fn discards_of_parts_are_held_back_before_they_take_up_the_memory() {
    let mut world = World::new(u64::MAX);
    for step in [write(OLD, 0, &[1]), Step::Commit, Step::Pass(4000)] {
        assert!(world.step(&step));
    }
    // Its table is in memory no more, so what is zeroes already is not known.
    let (mut world, _) = world.restart(1);
    assert!(world.settle());
    let most = layout().zero_blocks_max + layout().log_blocks();
    assert!(most < 4095, "the whole of a chunk is more than that");
    assert!(!world.rig.store.can_zero(range(0, 4095)) && world.rig.store.can_zero(range(0, 1000)));
    // Nothing is flushed, for no operation completes any more.
    world.left = 0;
    for body in [Body::Zero { chunk: OLD, range: range(1, 2500) }; 2] {
        world.stage(body, &[]);
    }
    world.rig.store.commit(CS, LogIndex(3));
    assert_eq!(world.rig.store.stats().overlay_blocks, 2500, "of one block, however often");
    assert!(!world.rig.store.can_zero(range(0, 1000)), "{most} at most");
    assert!(world.rig.store.can_zero(BlockRange::CHUNK), "a whole chunk's takes no memory");
    world.stage(Body::Zero { chunk: OLD, range: BlockRange::CHUNK }, &[]);
    world.rig.store.commit(CS, LogIndex(4));
    assert_eq!(world.rig.store.stats().overlay_blocks, 0);
}

#[test]
fn many_discards_of_parts_are_flushed_without_waiting_for_idleness() {
    let mut world = World::new(u64::MAX);
    for step in [write(OLD, 0, &[1]), Step::Commit, Step::Pass(4000)] {
        assert!(world.step(&step));
    }
    // Its table is in memory no more, so what is zeroes already is not known.
    let (mut world, _) = world.restart(1);
    for step in [zero(OLD, 1, 2500), Step::Commit] {
        assert!(world.step(&step));
    }
    assert!(world.step(&Step::Pass(100)));
    assert_eq!(world.rig.store.stats().overlay_blocks, 0);
    world.check("flushed");
}
