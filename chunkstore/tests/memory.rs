//! A store whose driver has little memory: work waits for it, but never for ever.
#![allow(missing_docs)]

mod common;
use ashlar_chunkstore::*;
use common::*;
use protocol::raft::{Body, Entry, Members};
use protocol::types::*;
use std::rc::{Rc, Weak};

const CS: CopysetId = CopysetId(1);
const CHUNKS: u32 = 4;
const ENTRIES_A_CHUNK: u64 = 5;
const COUNT: u16 = ENTRY_BLOCKS_MAX as u16;

fn chunk(index: u32) -> ChunkId {
    ChunkId { volume: VolumeId(1), index }
}

fn seeds(index: u64) -> Vec<u64> {
    (0..u64::from(COUNT)).map(|at| index * 1000 + at).collect()
}

/// Fills chunks with so much that most of it is in the log only.
fn filled(layout: &Layout) -> Rig {
    let mut rig = Rig::new(layout);
    rig.pass(100);
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    rig.settle();
    for index in 1..=ENTRIES_A_CHUNK * u64::from(CHUNKS) {
        let (nth, within) = ((index - 1) / ENTRIES_A_CHUNK, (index - 1) % ENTRIES_A_CHUNK);
        let range = BlockRange { first: within as u16 * COUNT, count: COUNT };
        let body = Body::Write { chunk: chunk(nth as u32), range };
        let crcs: Vec<u32> = seeds(index).iter().map(|seed| block_crc(&block(*seed))).collect();
        assert!(rig.store.can_stage(COUNT.into()), "the log has room for all");
        let entry = Entry { term: Term(1), index: LogIndex(index), body };
        rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&seeds(index))), &crcs);
        rig.settle();
        rig.store.commit(CS, LogIndex(index));
    }
    rig.settle();
    rig
}

#[test]
fn jobs_of_the_flusher_do_not_wait_for_memory_that_they_hold_themselves() {
    let layout = Layout { log_segments: 16, reserve_slots: 4, flush_ahead: false, ..small_layout() };
    let mut rig = filled(&layout);
    assert!(rig.store.stats().overlay_blocks > 10 * layout.ram_blocks_max as u64, "most is in the log only");
    let budget = ENTRY_BLOCKS_MAX * layout.flush_in_flight_max;
    rig.now.0 += layout.flush_idle_ns;
    let mut held: Vec<Weak<Vec<u8>>> = Vec::new();
    loop {
        rig.drain();
        held.retain(|buf| buf.strong_count() > 0);
        let used: usize = held.iter().filter_map(Weak::upgrade).map(|buf| buf.len() / BLOCK_BYTES).sum();
        let fits = |op: &Op<Buf>| !matches!(op, Op::Read { blocks, .. } if used + blocks > budget);
        let Some(at) = rig.ops.iter().position(fits) else { break };
        if let Op::Read { ticket, file, offset, blocks } = rig.ops[at] {
            rig.ops.swap_remove(at);
            let mut data = vec![0; blocks * BLOCK_BYTES];
            rig.disk.read(file, offset, &mut data).expect("reads");
            let data = Rc::new(data);
            held.push(Rc::downgrade(&data));
            rig.store.completed(ticket, Ok(Some(Buf(data))), rig.now);
        } else {
            rig.complete(at);
        }
    }
    assert!(rig.ops.is_empty(), "{} reads wait for memory that nobody will free", rig.ops.len());
    assert_eq!(rig.store.stats().overlay_blocks, 0, "all is in its slots");
    for index in 1..=ENTRIES_A_CHUNK * u64::from(CHUNKS) {
        let (nth, within) = ((index - 1) / ENTRIES_A_CHUNK, (index - 1) % ENTRIES_A_CHUNK);
        let range = BlockRange { first: within as u16 * COUNT, count: COUNT };
        rig.store.read(index, chunk(nth as u32), range);
        rig.settle();
        let read = rig.events.iter().find_map(|event| match event {
            Event::Read { token, result: Ok(data) } if *token == index => Some(Rig::read_seeds(data)),
            _ => None,
        });
        assert_eq!(read, Some(seeds(index)));
    }
}

#[test]
fn what_leaves_memory_is_in_its_slot_already_and_not_read_back_from_the_log() {
    let layout = Layout { log_segments: 16, reserve_slots: 4, ram_blocks_max: 512, ..small_layout() };
    let mut rig = filled(&layout);
    rig.pass(20);
    let stats = rig.store.stats();
    assert!(stats.overlay_blocks <= layout.ram_blocks_max as u64, "{} blocks wait", stats.overlay_blocks);
    assert!(stats.flushed_blocks > 0 && stats.checkpoints <= 1, "flushed, without a round: {stats:?}");
    assert_eq!(stats.log_reads, 0, "from memory");
    let (mut rig, ..) = rig.crash(&layout, &mut Rng(7));
    for index in 1..=ENTRIES_A_CHUNK * u64::from(CHUNKS) {
        rig.store.commit(CS, LogIndex(index));
        let (nth, within) = ((index - 1) / ENTRIES_A_CHUNK, (index - 1) % ENTRIES_A_CHUNK);
        let range = BlockRange { first: within as u16 * COUNT, count: COUNT };
        rig.store.read(index, chunk(nth as u32), range);
        rig.settle();
        let read = rig.events.iter().find_map(|event| match event {
            Event::Read { token, result: Ok(data) } if *token == index => Some(Rig::read_seeds(data)),
            _ => None,
        });
        assert_eq!(read, Some(seeds(index)), "entry {index} after a power cut");
    }
}

/// Writes that fill `range(n)` of chunk 0, as long as the log takes them and `most` at most; nothing is flushed
/// meanwhile. Tells the write window after each.
fn windows_without_a_flush(rig: &mut Rig, most: u64, range: impl Fn(u64) -> BlockRange) -> Vec<usize> {
    rig.pass(2000);
    assert_eq!(rig.store.write_window(), usize::MAX, "nothing was written yet");
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    let mut windows = Vec::new();
    for index in 1..=most {
        if !rig.store.can_propose(COUNT.into()) {
            break;
        }
        let body = Body::Write { chunk: chunk(0), range: range(index) };
        let crcs: Vec<u32> = seeds(index).iter().map(|seed| block_crc(&block(*seed))).collect();
        let entry = Entry { term: Term(1), index: LogIndex(index), body };
        rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&seeds(index))), &crcs);
        // Operations on chunks and checkpoints do not end.
        rig.write_log();
        rig.store.commit(CS, LogIndex(index));
        windows.push(rig.store.write_window());
    }
    assert!(windows.is_sorted_by(|before, after| before >= after), "ever fewer: {windows:?}");
    windows
}

#[test]
fn writes_are_slowed_before_the_log_is_full_and_go_on_once_it_is_flushed() {
    let layout = Layout { log_segments: 16, reserve_slots: 4, flush_ahead: false, ..small_layout() };
    let mut rig = Rig::new(&layout);
    let windows = windows_without_a_flush(&mut rig, u64::MAX, |_| BlockRange { first: 0, count: COUNT });
    let slowed = windows.iter().filter(|window| **window < usize::MAX).count();
    assert!(slowed > 1 && *windows.last().unwrap() < 128, "long before the log is full: {windows:?}");
    rig.pass(3000);
    assert_eq!(rig.store.write_window(), usize::MAX, "all is flushed");
}

/// What has left memory costs the flusher a read of the log for each block: writes wait for it before that.
#[test]
fn writes_are_slowed_before_what_is_not_flushed_leaves_memory() {
    let fits = 16;
    let ram_blocks_max = fits as usize * usize::from(COUNT);
    let layout = Layout { log_segments: 16, reserve_slots: 4, ram_blocks_max, ..small_layout() };
    let mut rig = Rig::new(&layout);
    let places = |index| BlockRange { first: index as u16 * COUNT, count: COUNT };
    let windows = windows_without_a_flush(&mut rig, fits, places);
    assert_eq!(windows.len(), fits as usize, "the log has room for all");
    assert!(windows[..6].iter().all(|window| *window == usize::MAX), "a part of memory: {windows:?}");
    assert!(windows[8] < usize::MAX && windows[13..].iter().all(|window| *window == 16), "{windows:?}");
    assert_eq!(rig.store.stats().evictions, 0, "held back in time");
    rig.pass(3000);
    assert_eq!(rig.store.write_window(), usize::MAX, "all is flushed");
}

/// A copyset amid a catch-up applies nothing until its end, whatever its log holds.
#[test]
fn a_catch_up_larger_than_the_log_ends_though_the_log_is_full_of_entries_that_wait() {
    catch_up_in_a_full_log(COUNT, 1);
}

/// Small entries lie close together: many share the header of one batch. Copied one by one, what a segment
/// holds would need two, and there may be no more than two.
#[test]
fn a_segment_full_of_small_entries_that_wait_is_copied_into_the_room_that_is_kept() {
    catch_up_in_a_full_log(1, 30);
}

fn catch_up_in_a_full_log(count: u16, a_batch: u64) {
    let layout = Layout { ram_blocks_max: 1, ..small_layout() };
    let mut rig = Rig::new(&layout);
    rig.pass(2000);
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    rig.settle();
    let mut last = 0;
    let crcs = |index| seeds(index).iter().map(|seed| block_crc(&block(*seed))).collect::<Vec<u32>>();
    while rig.store.can_append(CS, LogIndex(last + 1), 1, count.into()) {
        last += 1;
        let body = Body::Write { chunk: chunk(9), range: BlockRange { first: 0, count } };
        let entry = Entry { term: Term(1), index: LogIndex(last), body };
        let crcs = &crcs(last)[..count.into()];
        rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&seeds(last))), crcs);
        if last % a_batch == 0 {
            rig.settle();
        }
    }
    let waiting = last * (u64::from(count) + 1);
    assert!(waiting > layout.log_blocks() / 4, "{last} entries wait, a good part of the log");
    rig.store.stage(Record::InstallBegin { copyset: CS }, None, &[]);
    rig.settle();
    let pieces = 4 * layout.log_blocks() / u64::from(COUNT);
    for piece in 0..pieces {
        let mut waited = 0;
        while !rig.store.can_stage(COUNT.into()) {
            waited += 1;
            assert!(waited < 100, "no room for piece {piece} of {pieces}: {:?}", rig.store.stats());
            rig.pass(100);
        }
        let range = BlockRange { first: (piece % 100) as u16 * COUNT, count: COUNT };
        let record = Record::InstallBlocks { copyset: CS, chunk: chunk((piece / 100) as u32 % 4), range };
        rig.store.stage(record, Some(Buf::of(&seeds(1000 + piece))), &crcs(1000 + piece));
        rig.settle();
    }
    for index in 1..=last {
        assert!(!matches!(rig.store.entry_payload(CS, LogIndex(index)), EntryPayload::Gone));
    }
}

/// The catch-up takes whatever room it is given, operation by operation, while what waits is being copied.
#[test]
fn a_catch_up_leaves_room_for_the_copies_that_are_still_to_be_made() {
    for log_segments in [LOG_SEGMENTS_MIN, 7, 12] {
        for (count, piece) in [(COUNT, 1), (COUNT, COUNT), (1, 1), (1, COUNT)] {
            for seed in 0..3 {
                greedy_catch_up(log_segments, count, piece, &mut Rng(seed));
            }
        }
    }
    // Long enough that a round copies more than the segments that are kept free would hold.
    greedy_catch_up(40, 1, 1, &mut Rng(0));
}

fn greedy_catch_up(log_segments: u32, count: u16, piece: u16, rng: &mut Rng) {
    let layout = Layout { log_segments, ram_blocks_max: 1, ..small_layout() };
    let mut rig = Rig::new(&layout);
    rig.pass(2000);
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    rig.settle();
    let crcs = |index, count: u16| -> Vec<u32> {
        seeds(index)[..count.into()].iter().map(|seed| block_crc(&block(*seed))).collect()
    };
    let mut last = 0;
    while rig.store.can_append(CS, LogIndex(last + 1), 1, count.into()) {
        last += 1;
        let body = Body::Write { chunk: chunk(9), range: BlockRange { first: 0, count } };
        let entry = Entry { term: Term(1), index: LogIndex(last), body };
        let payload = Buf::of(&seeds(last)[..count.into()]);
        rig.store.stage(Record::Entry { copyset: CS, entry }, Some(payload), &crcs(last, count));
        if last % 10 == 0 {
            rig.settle();
        }
    }
    rig.store.stage(Record::InstallBegin { copyset: CS }, None, &[]);
    rig.settle();
    let pieces = 4 * layout.log_blocks() / u64::from(piece);
    let (mut staged, mut idle) = (0, 0);
    while staged < pieces {
        while staged < pieces && rig.store.can_stage(piece.into()) {
            (staged, idle) = (staged + 1, 0);
            let range = BlockRange { first: (staged % 100) as u16 * COUNT, count: piece };
            let record =
                Record::InstallBlocks { copyset: CS, chunk: chunk((staged / 100) as u32 % 4), range };
            let payload = Buf::of(&seeds(1000 + staged)[..piece.into()]);
            rig.store.stage(record, Some(payload), &crcs(1000 + staged, piece));
            rig.drain();
            // Up to half of the log it is written as it comes: a round begins while much of the log is free, and
            // may have much to copy.
            let stats = rig.store.stats();
            if stats.segments_recycled == 0 && stats.segments_used * 2 <= stats.segments_ready {
                rig.write_log();
            }
        }
        match rig.ops.len() {
            0 => {
                idle += 1;
                assert!(idle < 200, "no room for piece {staged} of {pieces}: {:?}", rig.store.stats());
                rig.pass(100);
            }
            ops => rig.complete(rng.below(ops as u64) as usize),
        }
        rig.drain();
    }
    for index in 1..=last {
        assert!(!matches!(rig.store.entry_payload(CS, LogIndex(index)), EntryPayload::Gone));
    }
}
