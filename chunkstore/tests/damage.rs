//! Bits flipped and tails torn by hand: what recovery and reads make of them, a test a row of the
//! decision table in `walk.rs`.
#![allow(missing_docs)]

mod common;
use ashlar_chunkstore::*;
use common::*;
use protocol::raft::{Body, Entry, Members};
use protocol::types::*;

const CS: CopysetId = CopysetId(1);
const CHUNK: ChunkId = ChunkId { volume: VolumeId(1), index: 0 };

fn rig() -> Rig {
    let mut rig = Rig::new(&small_layout());
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    rig.settle();
    rig
}

fn write(rig: &mut Rig, index: u64, block_at: u16, seed: u64) {
    let body = Body::Write { chunk: CHUNK, range: BlockRange { first: block_at, count: 1 } };
    let entry = Entry { term: Term(1), index: LogIndex(index), body };
    let crc = block_crc(&block(seed));
    rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&[seed])), &[crc]);
}

fn read(rig: &mut Rig, block_at: u16) -> Result<u64, ReadError> {
    rig.store.read(5, CHUNK, BlockRange { first: block_at, count: 1 });
    rig.settle();
    let at = rig.events.iter().position(|e| matches!(e, Event::Read { token: 5, .. })).expect("answered");
    let Event::Read { result, .. } = rig.events.remove(at) else { unreachable!() };
    result.map(|data| Rig::read_seeds(&data)[0])
}

/// Batches 1 (the seal of the start), 2 (Create), 3.. one entry each; where each begins.
fn three_entries() -> (Rig, Vec<u64>) {
    let mut rig = rig();
    let mut places = Vec::new();
    for index in 1..=3 {
        write(&mut rig, index, index as u16, 100 + index);
        rig.drain();
        let place = rig.ops.iter().find_map(|op| match op {
            Op::Write { file: FileId::Log(0), offset, .. } => Some(offset / 4096),
            _ => None,
        });
        places.push(place.expect("a batch"));
        rig.settle();
    }
    (rig, places)
}

fn reopen(rig: Rig) -> (Rig, Vec<RecoveredCopyset>, RecoveryReport) {
    Rig::open(rig.disk, &small_layout())
}

#[test]
fn a_whole_log_is_replayed() {
    let (rig, _) = three_entries();
    let (mut rig, found, report) = reopen(rig);
    assert_eq!((found[0].entries.len(), found[0].health, report.damages.len()), (3, Health::Whole, 0));
    rig.store.commit(CS, LogIndex(3));
    assert_eq!(read(&mut rig, 2), Ok(102));
    assert_eq!(read(&mut rig, 9), Ok(0));
}

#[test]
fn a_bad_header_at_an_unattested_end_is_a_torn_tail() {
    let (mut rig, places) = three_entries();
    rig.disk.flip(FileId::Log(0), places[2], 200);
    let (_, found, report) = reopen(rig);
    assert_eq!((found[0].entries.len(), found[0].health, report.damages.len()), (2, Health::Whole, 0));
}

#[test]
fn a_bad_payload_at_an_unattested_end_is_a_torn_tail() {
    let (mut rig, places) = three_entries();
    rig.disk.flip(FileId::Log(0), places[2] + 1, 200);
    let (_, found, report) = reopen(rig);
    assert_eq!((found[0].entries.len(), found[0].health, report.torn_batches), (2, Health::Whole, 1));
}

#[test]
fn a_bad_last_batch_of_an_idle_log_is_damage_because_the_seal_attests_it() {
    let (mut rig, places) = three_entries();
    rig.pass(100);
    rig.disk.flip(FileId::Log(0), places[2], 200);
    let (_, found, report) = reopen(rig);
    assert_eq!((found[0].entries.len(), found[0].health, report.damages.len()), (2, Health::Damaged, 1));
}

#[test]
fn a_bad_header_in_the_middle_is_damage_and_ends_after_a_flush() {
    let (mut rig, places) = three_entries();
    rig.disk.flip(FileId::Log(0), places[1], 8);
    let (mut rig, found, report) = reopen(rig);
    assert_eq!(found[0].entries.len(), 1);
    assert_eq!(found[0].health, Health::Damaged);
    assert!(!report.damages.is_empty());
    // The replica is told whole again; the hole must not be found a second time.
    rig.store.stage(Record::Health { copyset: CS, health: Health::Whole }, None, &[]);
    rig.store.commit(CS, LogIndex(1));
    rig.pass(3000);
    let (mut rig, found, report) = reopen(rig);
    assert_eq!((report.damages, found[0].health), (vec![], Health::Whole));
    assert_eq!(read(&mut rig, 1), Ok(101));
}

#[test]
fn a_bad_payload_in_the_middle_damages_its_copyset_from_that_entry_on() {
    let (mut rig, places) = three_entries();
    rig.disk.flip(FileId::Log(0), places[1] + 1, 8);
    let (_, found, report) = reopen(rig);
    assert_eq!((found[0].entries.len(), found[0].health), (1, Health::Damaged));
    assert_eq!(report.damages.len(), 2);
}

#[test]
fn an_end_lost_below_the_checkpoint_is_damage() {
    let (mut rig, places) = three_entries();
    rig.store.stop();
    rig.settle();
    for block in 0..40 {
        if block >= places[2] {
            rig.disk.write_blocks(FileId::Log(0), block * 4096, &[0; 4096], true);
        }
    }
    let (_, found, report) = reopen(rig);
    assert_eq!(found[0].health, Health::Damaged);
    assert_eq!(report.damages.len(), 1);
}

fn flushed() -> Rig {
    let (mut rig, _) = three_entries();
    rig.store.commit(CS, LogIndex(3));
    rig.pass(3000);
    assert_eq!(rig.store.stats().overlay_blocks, 0);
    rig
}

#[test]
fn a_flipped_block_at_rest_is_found_repaired_and_rewritten() {
    let mut rig = flushed();
    let (file, base) = small_layout().data_place(0);
    rig.disk.flip(file, base / 4096 + 2, 77);
    assert!(matches!(read(&mut rig, 2), Err(ReadError::Corrupt(bad)) if bad[0].block == 2));
    assert!(!rig.store.repair(CHUNK, 2, Buf::of(&[555])), "other content is refused");
    assert!(rig.store.repair(CHUNK, 2, Buf::of(&[102])));
    assert_eq!(read(&mut rig, 2), Ok(102));
    rig.pass(3000);
    assert_eq!(rig.disk.read_block(file, base / 4096 + 2), block(102));
    assert_eq!(inspect(&mut rig.disk, &small_layout()).expect("reads").problems, Vec::<String>::new());
}

#[test]
fn a_repair_is_judged_though_the_chunks_table_must_be_loaded_for_it() {
    let mut rig = Rig::new(&Layout { table_cache_max: 1, ..small_layout() });
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    let other = ChunkId { index: 1, ..CHUNK };
    write(&mut rig, 1, 1, 101);
    let body = Body::Write { chunk: other, range: BlockRange { first: 1, count: 1 } };
    let entry = Entry { term: Term(1), index: LogIndex(2), body };
    rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&[102])), &[block_crc(&block(102))]);
    rig.settle();
    rig.store.commit(CS, LogIndex(2));
    rig.pass(3000);
    let (file, base) = small_layout().data_place(0);
    rig.disk.flip(file, base / 4096 + 1, 77);
    let forget_table = |rig: &mut Rig| {
        rig.store.read(6, other, BlockRange { first: 1, count: 1 });
        rig.settle();
        rig.events.clear();
    };
    let is_bad = |result: Result<u64, ReadError>| matches!(result, Err(ReadError::Corrupt(_)));
    assert!(is_bad(read(&mut rig, 1)));
    forget_table(&mut rig);
    rig.store.repair(CHUNK, 1, Buf::of(&[555]));
    assert!(is_bad(read(&mut rig, 1)), "other content is refused");
    forget_table(&mut rig);
    rig.store.repair(CHUNK, 1, Buf::of(&[101]));
    assert_eq!(read(&mut rig, 1), Ok(101));
}

#[test]
fn inspect_tells_a_flipped_block_and_a_lost_page() {
    let mut rig = flushed();
    // A block in the replay window is told apart: the log will write it anew.
    let (file, base) = small_layout().data_place(0);
    rig.disk.flip(file, base / 4096 + 2, 77);
    let report = inspect(&mut rig.disk, &small_layout()).expect("reads");
    assert_eq!((report.blocks_good, report.blocks_in_replay, report.slots.len()), (2, 1, 1));
    let (file, base) = small_layout().table_place(0);
    for copy in [0, 8] {
        rig.disk.flip(file, base / 4096 + copy, 300);
    }
    let report = inspect(&mut rig.disk, &small_layout()).expect("reads");
    assert!(report.problems[0].contains("1 table pages are lost"), "{:?}", report.problems);
}

#[test]
fn a_lost_table_page_makes_its_blocks_corrupt_not_zero() {
    let mut rig = flushed();
    // Until the log no longer holds block 1: a replay would bring it back.
    for index in 4..2000 {
        while !rig.store.can_stage(1) {
            rig.pass(20);
        }
        write(&mut rig, index, 950 + (index % 40) as u16, 1000 + index);
        rig.settle();
        rig.store.commit(CS, LogIndex(index));
    }
    rig.pass(3000);
    assert!(rig.store.stats().segments_recycled > 3);
    let (file, base) = small_layout().table_place(0);
    for copy in [0, 8] {
        rig.disk.flip(file, base / 4096 + copy, 300);
    }
    let (mut rig, ..) = reopen(rig);
    assert!(matches!(read(&mut rig, 1), Err(ReadError::Corrupt(bad)) if bad[0].expected.is_none()));
    assert_eq!(read(&mut rig, 900), Ok(0), "the other pages are fine");
    assert!(rig.store.repair(CHUNK, 1, Buf::of(&[101])));
    assert_eq!(read(&mut rig, 1), Ok(101));
}

#[test]
fn what_was_applied_before_a_crash_is_applied_after_it_without_a_leader() {
    let (mut rig, _) = three_entries();
    rig.store.commit(CS, LogIndex(2));
    rig.pass(100);
    let (mut rig, found, _) = reopen(rig);
    assert_eq!((found[0].applied, found[0].entries.len()), (LogIndex(2), 3));
    assert_eq!([read(&mut rig, 1), read(&mut rig, 2), read(&mut rig, 3)], [Ok(101), Ok(102), Ok(0)]);
    rig.store.commit(CS, LogIndex(3));
    assert_eq!(read(&mut rig, 3), Ok(103));
}

#[test]
fn a_bad_newer_checkpoint_falls_back_to_the_older() {
    let mut rig = flushed();
    write(&mut rig, 4, 4, 104);
    rig.settle();
    rig.store.commit(CS, LogIndex(4));
    rig.pass(3000);
    let seq = inspect(&mut rig.disk, &small_layout()).expect("reads").checkpoint.seq;
    let side = if seq % 2 == 1 { Side::A } else { Side::B };
    rig.disk.flip(FileId::Checkpoint(side), 0, 100);
    let (mut rig, found, _) = reopen(rig);
    assert_eq!(found[0].entries.len(), 4);
    rig.store.commit(CS, LogIndex(4));
    for n in 1..=4 {
        assert_eq!(read(&mut rig, n), Ok(100 + u64::from(n)));
    }
}

#[test]
fn a_full_disk_limits_the_pool_and_nothing_else() {
    let mut rig = Rig::new(&Layout { reserve_slots: 0, ..small_layout() });
    rig.disk.full = true;
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    write(&mut rig, 1, 1, 101);
    rig.settle();
    rig.store.commit(CS, LogIndex(1));
    rig.pass(4000);
    assert!(rig.events.iter().any(|e| matches!(e, Event::PoolLimited { slots: 0 })));
    assert!(!rig.store.can_allocate(1));
    assert_eq!(read(&mut rig, 1), Ok(101));
    rig.disk.full = false;
    rig.pass(35_000);
    assert_eq!((rig.store.stats().overlay_blocks, rig.store.stats().used_slots), (0, 1));
    assert_eq!(read(&mut rig, 1), Ok(101));
}

#[test]
fn a_failed_log_write_ends_all_work() {
    let mut rig = rig();
    write(&mut rig, 1, 1, 101);
    rig.drain();
    let at = rig.ops.iter().position(|op| matches!(op, Op::Write { dsync: true, .. })).expect("a batch");
    let Op::Write { ticket, .. } = rig.ops.swap_remove(at) else { unreachable!() };
    rig.store.completed(ticket, Err(IoError { errno: 5 }), rig.now);
    rig.drain();
    assert!(rig.events.iter().any(|e| matches!(e, Event::Failed(_))));
    assert!(rig.store.poll_op(rig.now).is_none() && !rig.store.can_stage(1));
}

#[test]
fn a_reused_slot_reads_zeroes_where_nothing_was_written() {
    let mut rig = flushed();
    let drop = Entry { term: Term(1), index: LogIndex(4), body: Body::DropVolume { volume: VolumeId(1) } };
    rig.store.stage(Record::Entry { copyset: CS, entry: drop }, None, &[]);
    rig.settle();
    rig.store.commit(CS, LogIndex(4));
    rig.pass(6000);
    let other = ChunkId { volume: VolumeId(2), index: 0 };
    let body = Body::Write { chunk: other, range: BlockRange { first: 9, count: 1 } };
    let entry = Entry { term: Term(1), index: LogIndex(5), body };
    rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&[9])), &[block_crc(&block(9))]);
    rig.settle();
    rig.store.commit(CS, LogIndex(5));
    rig.pass(6000);
    let report = inspect(&mut rig.disk, &small_layout()).expect("reads");
    assert_eq!((report.slots.len(), report.slots[0].slot, report.slots[0].blocks), (1, 0, 1));
    rig.store.read(5, other, BlockRange { first: 0, count: 16 });
    rig.settle();
    let Some(Event::Read { result: Ok(data), .. }) = rig.events.pop() else { panic!("read") };
    let seeds = Rig::read_seeds(&data);
    assert_eq!((seeds[9], seeds.iter().sum::<u64>()), (9, 9));
}

#[test]
fn an_entry_never_committed_does_not_pin_the_log() {
    let mut rig = rig();
    let stuck = CopysetId(2);
    rig.store.stage(Record::Create { copyset: stuck, members: Members::default() }, None, &[]);
    let body = Body::Write {
        chunk: ChunkId { volume: VolumeId(7), index: 0 },
        range: BlockRange { first: 0, count: 2 },
    };
    let entry = Entry { term: Term(1), index: LogIndex(1), body };
    let crcs = [1, 2].map(|s| block_crc(&block(s)));
    rig.store.stage(Record::Entry { copyset: stuck, entry }, Some(Buf::of(&[1, 2])), &crcs);
    rig.pass(100);
    for index in 1..2000 {
        while !rig.store.can_stage(1) {
            rig.pass(20);
        }
        write(&mut rig, index, (index % 64) as u16, 1000 + index);
        rig.settle();
        rig.store.commit(CS, LogIndex(index));
    }
    let stats = rig.store.stats();
    assert!(stats.segments_recycled > 3 && stats.copied_forward > 0, "{stats:?}");
    let (mut rig, found, report) = reopen(rig);
    assert_eq!(report.damages, Vec::<String>::new());
    assert_eq!(found[1].entries, vec![entry]);
    rig.store.load_entry(3, stuck, LogIndex(1));
    rig.settle();
    let Some(Event::Entry { result: Ok((data, _)), .. }) =
        rig.events.iter().find(|e| matches!(e, Event::Entry { .. }))
    else {
        panic!("loads")
    };
    assert_eq!(data.block(1), block(2));
}

#[test]
fn what_an_idle_flush_wrote_is_read_from_its_slot_after_a_restart() {
    let rig = flushed();
    let (mut rig, found, _) = reopen(rig);
    assert_eq!((found[0].applied, found[0].entries.len()), (LogIndex(3), 3), "kept for followers that lag");
    assert_eq!(rig.store.stats().overlay_blocks, 0, "and yet not to be flushed again");
    assert_eq!([read(&mut rig, 1), read(&mut rig, 3)], [Ok(101), Ok(103)]);
}

/// A batch of 256 blocks: eight entries from `index` on.
fn stage_large_batch(rig: &mut Rig, index: u64) {
    for nth in 0..8 {
        let seeds: Vec<u64> = (0..32).map(|block| 1000 * (index + nth) + block).collect();
        let crcs: Vec<u32> = seeds.iter().map(|seed| block_crc(&block(*seed))).collect();
        let body = Body::Write { chunk: CHUNK, range: BlockRange { first: nth as u16 * 32, count: 32 } };
        let entry = Entry { term: Term(1), index: LogIndex(index + nth), body };
        rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&seeds)), &crcs);
    }
    rig.drain();
}

/// The limit of a batch may be lowered between two starts; the log still holds the larger ones, and
/// the batch that attests the lost one lies beyond eight of the new size.
#[test]
fn batches_larger_than_the_new_limit_are_found_past_a_hole() {
    let large =
        Layout { segment_bytes: 1100 * 4096, batch_blocks_max: 256, ram_blocks_max: 8192, ..small_layout() };
    let small = Layout { batch_blocks_max: 32, ..large };
    for (layout, name) in [(large, "the same limit"), (small, "a lower limit")] {
        let mut rig = Rig::new(&large);
        rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
        rig.settle();
        for nth in 0..3 {
            stage_large_batch(&mut rig, 1 + nth * 8);
            rig.settle();
        }
        // The last batch of its segment, in flight together with three in the next.
        (3..7).for_each(|nth| stage_large_batch(&mut rig, 1 + nth * 8));
        let places = rig.ops.iter().filter_map(|op| match op {
            Op::Write { file, offset, .. } => Some((*file, *offset / 4096)),
            _ => None,
        });
        let places: Vec<_> = places.collect();
        assert_eq!(places.len(), 4, "{places:?}");
        assert!(places[0].0 != places[1].0 && places[1].0 == places[3].0, "{places:?}");
        rig.settle();
        stage_large_batch(&mut rig, 57);
        rig.settle();
        rig.disk.flip(places[0].0, places[0].1, 8);
        let (_, found, report) = Rig::open(rig.disk, &layout);
        assert_eq!((found[0].entries.len(), found[0].health), (24, Health::Damaged), "{name}: {report:?}");
    }
}

/// A later leader's entry ends what came after the one it replaces, with or without a `Truncate` before it.
#[test]
fn entries_that_a_later_leader_replaced_do_not_come_back() {
    let (mut rig, _) = three_entries();
    let body = Body::Write { chunk: CHUNK, range: BlockRange { first: 7, count: 1 } };
    let entry = Entry { term: Term(2), index: LogIndex(2), body };
    rig.store.stage(Record::Entry { copyset: CS, entry }, Some(Buf::of(&[207])), &[block_crc(&block(207))]);
    rig.settle();
    let (mut rig, found, report) = reopen(rig);
    let terms: Vec<u64> = found[0].entries.iter().map(|e| e.term.0).collect();
    assert_eq!((terms, found[0].health, report.damages), (vec![1, 2], Health::Whole, vec![]));
    rig.store.commit(CS, LogIndex(2));
    assert_eq!((read(&mut rig, 2), read(&mut rig, 3), read(&mut rig, 7)), (Ok(0), Ok(0), Ok(207)));
}

/// The log told that more was applied than what is left of it.
#[test]
fn an_applied_index_beyond_the_end_of_a_damaged_log_is_not_believed() {
    let mut rig = rig();
    for index in 1..=40 {
        write(&mut rig, index, index as u16, 100 + index);
        rig.settle();
        rig.store.commit(CS, LogIndex(index));
    }
    rig.pass(100);
    let payload = (0..176).find(|at| rig.disk.read_block(FileId::Log(0), *at) == block(105));
    rig.disk.flip(FileId::Log(0), payload.expect("the fifth entry is in the log"), 8);
    let (mut rig, found, _) = reopen(rig);
    assert_eq!(
        (found[0].entries.len(), found[0].applied, found[0].health),
        (4, LogIndex(4), Health::Damaged)
    );
    write(&mut rig, 5, 5, 205);
    rig.settle();
    rig.store.commit(CS, LogIndex(5));
    assert_eq!(read(&mut rig, 5), Ok(205));
}

/// A table lies in ten blocks that are read at once: five pages, two copies of each.
#[test]
fn a_sector_of_a_table_that_cannot_be_read_takes_no_other_page_with_it() {
    let blocks = [(5, 0), (900, 1), (1700, 2)];
    for broken in 0..16 {
        let mut rig = rig();
        for (index, (at, _)) in blocks.iter().enumerate() {
            write(&mut rig, index as u64 + 1, *at, 100 + u64::from(*at));
        }
        rig.settle();
        rig.store.commit(CS, LogIndex(3));
        rig.pass(5000);
        let (mut rig, ..) = reopen(rig);
        rig.disk.broken.insert((FileId::Chunks(0), broken));
        let mut lost = 0;
        for (at, page) in blocks {
            match read(&mut rig, at) {
                Ok(seed) => assert_eq!(seed, 100 + u64::from(at)),
                Err(_) => {
                    lost += 1;
                    assert_eq!(broken % 8, page, "block {at} is lost with block {broken} of the tables");
                }
            }
        }
        // Of each page one copy was written.
        assert_eq!(lost, u64::from((8..11).contains(&broken)), "block {broken} of the tables");
        assert_eq!(rig.store.stats().table_pages_lost, lost);
    }
}

/// A log that has just gone on in its second segment; the entries that were written, none of them attested by a seal.
fn two_segments(layout: &Layout) -> (Rig, u64) {
    let mut rig = Rig::new(layout);
    rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
    rig.settle();
    let mut index = 0;
    loop {
        index += 1;
        write(&mut rig, index, 1, 100 + index);
        rig.drain();
        let second = |op: &Op<Buf>| matches!(op, Op::Write { file: FileId::Log(1), dsync: true, .. });
        let found = rig.ops.iter().any(second);
        rig.settle();
        if found {
            return (rig, index);
        }
    }
}

/// Once the damage is behind it, the log goes on, and nothing that was lost comes back.
fn goes_on_after_damage(mut rig: Rig, layout: &Layout, last: u64, name: &str) {
    write(&mut rig, last + 1, 2, 900);
    rig.write_log();
    let broken = std::mem::take(&mut rig.disk.broken);
    let (_, found, report) = Rig::open(rig.disk.clone(), layout);
    let kept = found[0].entries.len() as u64;
    assert!(found[0].health == Health::Damaged && !report.damages.is_empty(), "{name}: {report:?}");
    rig.disk.broken = broken;
    let (mut rig, found, _) = Rig::open(rig.disk, layout);
    assert_eq!(found[0].health, Health::Damaged, "{name}");
    let sound = found[0].entries.len() as u64;
    assert!(kept >= sound && sound == last + 1, "{name}: {kept} {sound}");
    rig.store.commit(CS, LogIndex(last + 1));
    rig.pass(6000);
    rig.disk.broken.clear();
    let (_, found, report) = Rig::open(rig.disk, layout);
    assert_eq!((found[0].health, report.damages), (Health::Damaged, vec![]), "{name}: only a peer heals it");
}

#[test]
fn a_newest_segment_whose_front_cannot_be_read_is_damage_and_no_torn_tail() {
    let layout = small_layout();
    for more in 0..3 {
        let (mut rig, mut index) = two_segments(&layout);
        let kept = index - 1;
        for _ in 0..more {
            index += 1;
            write(&mut rig, index, 1, 100 + index);
            rig.settle();
        }
        rig.disk.broken.insert((FileId::Log(1), 0));
        let (rig, found, report) = reopen(rig);
        let name = format!("{more} batches after the first");
        assert_eq!((found[0].entries.len() as u64, found[0].health), (kept, Health::Damaged), "{name}");
        assert!(report.damages[0].contains("cannot be read"), "{name}: {report:?}");
        if more == 0 {
            goes_on_after_damage(rig, &layout, kept, &name);
        }
    }
}

#[test]
fn a_block_that_cannot_be_read_hides_nothing_else_of_a_segments_front() {
    let (mut rig, mut index) = two_segments(&small_layout());
    for _ in 0..2 {
        index += 1;
        write(&mut rig, index, 1, 100 + index);
        rig.settle();
    }
    // The payload of the segment's second batch.
    rig.disk.broken.insert((FileId::Log(1), 3));
    let (_, found, _) = reopen(rig);
    assert_eq!((found[0].entries.len() as u64, found[0].health), (index - 2, Health::Damaged));
}

#[test]
fn a_last_batch_that_cannot_be_read_is_damage_and_no_torn_tail() {
    for part in 0..2 {
        let (mut rig, places) = three_entries();
        rig.disk.broken.insert((FileId::Log(0), places[2] + part));
        let (rig, found, _) = reopen(rig);
        assert_eq!((found[0].entries.len(), found[0].health), (2, Health::Damaged));
        if part == 0 {
            goes_on_after_damage(rig, &small_layout(), 2, "the header");
        }
    }
}

#[test]
fn a_free_segment_that_cannot_be_read_is_no_damage_where_the_next_batch_has_room() {
    let layout = Layout { segment_bytes: 600 * 4096, ..small_layout() };
    for stop in [false, true] {
        let mut rig = Rig::new(&layout);
        rig.store.stage(Record::Create { copyset: CS, members: Members::default() }, None, &[]);
        write(&mut rig, 1, 1, 101);
        rig.settle();
        if stop {
            rig.store.stop();
            rig.settle();
        }
        rig.disk.broken.insert((FileId::Log(1), 0));
        let (_, found, report) = Rig::open(rig.disk, &layout);
        assert_eq!((found[0].health, report.damages), (Health::Whole, vec![]));
    }
}

#[test]
fn one_of_two_twins_that_cannot_be_read_is_as_good_as_a_wrong_checksum() {
    let mut rig = flushed();
    rig.store.stop();
    rig.settle();
    let open = |broken: &[(FileId, u64)]| {
        let mut disk = rig.disk.clone();
        disk.broken.extend(broken);
        recover::<Buf, _>(&mut disk, &small_layout()).map(|(_, found, _)| found[0].entries.len())
    };
    let (a, b) = (FileId::Checkpoint(Side::A), FileId::Checkpoint(Side::B));
    let superblock = [(FileId::Superblock, 0), (FileId::Superblock, 1)];
    for one in superblock.into_iter().chain([(a, 0), (b, 0)]) {
        assert_eq!(open(&[one]), Ok(3), "{one:?}");
    }
    let why = |broken: &[(FileId, u64)]| open(broken).expect_err("both are bad").to_string();
    let both = why(&superblock);
    assert!(both.contains("copy 0: it cannot") && both.contains("copy 1: it cannot"), "{both}");
    let both = why(&[(a, 0), (b, 0)]);
    assert!(both.contains("A: it cannot be read (errno 5); B: it cannot"), "{both}");
    // A disk that may be formatted is not formatted again.
    let mut disk = rig.disk.clone();
    disk.broken.extend(superblock);
    let refused = format(&mut disk, &small_layout(), &identity());
    assert_eq!(refused, Err(FormatError::Io(FileId::Superblock, IoError { errno: 5 })));
}

#[test]
fn a_hole_that_may_have_held_a_create_is_known_until_the_replica_is_made_again() {
    let mut rig = rig();
    let lost = CopysetId(2);
    let create = Record::Create { copyset: lost, members: Members::default() };
    rig.store.stage(create, None, &[]);
    rig.drain();
    let place = rig.ops.iter().find_map(|op| match op {
        Op::Write { file: FileId::Log(0), offset, .. } => Some(offset / 4096),
        _ => None,
    });
    rig.settle();
    for index in 1..=3 {
        let entry = Entry { term: Term(1), index: LogIndex(index), body: Body::Noop };
        rig.store.stage(Record::Entry { copyset: lost, entry }, None, &[]);
        rig.settle();
    }
    assert!(!rig.store.may_lack_replicas());
    rig.disk.flip(FileId::Log(0), place.expect("a batch"), 8);
    let (mut rig, found, report) = reopen(rig);
    assert_eq!((found.len(), &report.unknown[..]), (1, &[lost][..]));
    assert!(rig.store.may_lack_replicas());
    // A checkpoint behind the damage: the log does not tell of it any more.
    rig.pass(6000);
    let (mut rig, found, report) = reopen(rig);
    assert_eq!((found.len(), report.damages), (1, vec![]));
    assert!(rig.store.may_lack_replicas());
    rig.store.stage(create, None, &[]);
    rig.store.stage(Record::Health { copyset: lost, health: Health::Damaged }, None, &[]);
    rig.store.all_replicas_made();
    rig.store.stop();
    rig.settle();
    let (rig, found, _) = reopen(rig);
    assert!(!rig.store.may_lack_replicas());
    assert_eq!((found[1].id, found[1].health), (lost, Health::Damaged));
}
