//! A disk looked at from outside, nothing changed: what is there, and whether every checksum holds.

use crate::api::*;
use crate::batch::payload_blocks;
use crate::recover::{RecoverError, read_metadata};
use crate::table::{self, LOAD_BLOCKS, Pages};
use crate::walk::walk;
use protocol::raft::Body;
use protocol::types::{BLOCK_BYTES, BlockRange, CHUNK_BLOCKS, ChunkId, CopysetId, block_crc, crc_at_rest};
use std::collections::{BTreeMap, BTreeSet};

/// Everything of a shard's disk that an operator wants to see.
#[derive(Clone, PartialEq, Debug)]
pub struct InspectReport {
    /// Whose disk it is.
    pub identity: Identity,
    /// Its fixed sizes.
    pub layout: Layout,
    /// The checkpoint that counts.
    pub checkpoint: InspectCheckpoint,
    /// The log from there on.
    pub log: InspectLog,
    /// Slots in use.
    pub slots: Vec<InspectSlot>,
    /// Blocks at rest whose checksum was verified and holds.
    pub blocks_good: u64,
    /// Blocks at rest that differ from their table but are written anew by the log's replay.
    pub blocks_in_replay: u64,
    /// What is wrong, in words with places; empty: the disk is sound.
    pub problems: Vec<String>,
}

/// A checkpoint in short.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InspectCheckpoint {
    /// Its sequence number.
    pub seq: u64,
    /// The log was durable up to here.
    pub durable_lsn: u64,
    /// Segment and LSN at which replay begins.
    pub replay: (u32, u64),
    /// Copysets: id, term, floor, health.
    pub copysets: Vec<(CopysetId, u64, u64, Health)>,
    /// Log segments and slots ready.
    pub ready: (u32, u32),
}

/// The log in short.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InspectLog {
    /// LSN of the first and the last batch.
    pub lsns: (u64, u64),
    /// Batches, records, payload blocks.
    pub counts: (u64, u64, u64),
    /// Segments in the replay window, oldest first: number, epoch, first LSN.
    pub segments: Vec<(u32, u64, u64)>,
    /// Torn batches at the end (harmless: they were never acknowledged).
    pub torn_batches: u64,
}

/// A slot in short.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InspectSlot {
    /// Its number.
    pub slot: u32,
    /// Whose.
    pub copyset: CopysetId,
    /// Which chunk.
    pub chunk: ChunkId,
    /// Which use of the slot.
    pub generation: u64,
    /// Blocks that hold data.
    pub blocks: u32,
    /// Blocks that fail their checksum and are not in the replay window.
    pub bad: Vec<u16>,
}

/// Reads and verifies a whole disk. Blocking, and as long as reading all of its data takes.
pub fn inspect<M: Media + ?Sized>(media: &mut M, limits: &Layout) -> Result<InspectReport, RecoverError> {
    let (layout, identity, from, mut problems) = read_metadata(media, limits)?;
    let log = walk(media, &layout, &from).map_err(|error| RecoverError::Io(FileId::Log(0), error))?;
    problems.extend(log.damages.iter().cloned());
    let mut replayed: BTreeMap<ChunkId, BTreeSet<u16>> = BTreeMap::new();
    let (mut records, mut blocks) = (0, 0);
    for logged in log.batches.iter().flat_map(|b| &b.records) {
        records += 1;
        blocks += payload_blocks(&logged.record) as u64;
        if let Some((chunk, range)) = touched(&logged.record) {
            replayed.entry(chunk).or_default().extend(range.blocks().map(|b| b as u16));
        }
    }
    let first = log.batches.first().map_or(from.replay_lsn, |b| b.head.lsn);
    let mut report = InspectReport {
        identity,
        layout,
        checkpoint: InspectCheckpoint {
            seq: from.seq,
            durable_lsn: from.durable_lsn,
            replay: (from.replay_segment, from.replay_lsn),
            copysets: from.copysets.iter().map(|c| (c.id, c.hard.term.0, c.floor.0, health(c))).collect(),
            ready: (from.segments_ready, from.slots_ready),
        },
        log: InspectLog {
            lsns: (first, log.last_lsn),
            counts: (log.batches.len() as u64, records, blocks),
            segments: log.uses.iter().map(|u| (u.segment, u.epoch, u.first_lsn)).collect(),
            torn_batches: log.torn.len() as u64,
        },
        slots: Vec::new(),
        blocks_good: 0,
        blocks_in_replay: 0,
        problems,
    };
    for slot in &from.slots {
        let window = replayed.get(&slot.chunk);
        inspect_slot(media, slot, window, &mut report)?;
    }
    Ok(report)
}

fn health(image: &crate::checkpoint::CopysetImage) -> Health {
    match (image.damaged, image.installing) {
        (true, _) => Health::Damaged,
        (_, true) => Health::Installing,
        _ => Health::Whole,
    }
}

/// The blocks that a record changes.
fn touched(record: &Record) -> Option<(ChunkId, BlockRange)> {
    match record {
        Record::InstallBlocks { chunk, range, .. } | Record::InstallZero { chunk, range, .. } => {
            Some((*chunk, *range))
        }
        Record::InstallDrop { chunk, .. } => Some((*chunk, BlockRange::CHUNK)),
        Record::Entry { entry, .. } => match entry.body {
            Body::Write { chunk, range } | Body::Zero { chunk, range } => Some((chunk, range)),
            _ => None,
        },
        _ => None,
    }
}

fn inspect_slot<M: Media + ?Sized>(
    media: &mut M,
    image: &crate::checkpoint::SlotImage,
    window: Option<&BTreeSet<u16>>,
    report: &mut InspectReport,
) -> Result<(), RecoverError> {
    let (file, offset) = report.layout.table_place(image.slot);
    // Block by block, so that one that cannot be read takes no other with it.
    let mut read = |at: usize| {
        let mut block = vec![0; BLOCK_BYTES];
        let done = media.read(file, offset + (at * BLOCK_BYTES) as u64, &mut block);
        done.is_ok().then_some(block)
    };
    let blocks: Vec<Option<Vec<u8>>> = (0..LOAD_BLOCKS).map(&mut read).collect();
    let mut pages = Pages { seq: image.seq, ..Pages::NONE };
    let (table, loaded) = table::load(|at| blocks[at].as_deref(), &mut pages, image.chunk, image.generation);
    if loaded.lost > 0 {
        report
            .problems
            .push(format!("slot {} ({:?}): {} table pages are lost", image.slot, image.chunk, loaded.lost));
    }
    let (file, base) = report.layout.data_place(image.slot);
    let (mut count, mut bad, mut block) = (0, Vec::new(), vec![0; BLOCK_BYTES]);
    for at in 0..CHUNK_BLOCKS {
        let expected = table.expected(at);
        if expected == Some(0) {
            continue;
        }
        count += 1;
        let read = media.read(file, base + (at * BLOCK_BYTES) as u64, &mut block).is_ok();
        if read && expected == Some(crc_at_rest(block_crc(&block))) {
            report.blocks_good += 1;
        } else if window.is_some_and(|w| w.contains(&(at as u16))) {
            report.blocks_in_replay += 1;
        } else {
            bad.push(at as u16);
        }
    }
    if !bad.is_empty() {
        let (slot, chunk) = (image.slot, image.chunk);
        report.problems.push(format!(
            "{file:?} slot {slot} ({chunk:?}): {} blocks fail their checksum: {bad:?}",
            bad.len()
        ));
    }
    report.slots.push(InspectSlot {
        slot: image.slot,
        copyset: image.copyset,
        chunk: image.chunk,
        generation: image.generation,
        blocks: count,
        bad,
    });
    Ok(())
}
