//! Formatting a disk and opening one: superblock, last checkpoint, log replay.

use crate::api::*;
use crate::batch::{Logged, payload_blocks};
use crate::checkpoint::{self, Checkpoint};
use crate::log::Log;
use crate::overlay::Counted;
use crate::pool::{Pool, Slot};
use crate::round::Base;
use crate::store::{Copyset, EntryMeta, Map, Placed, Store};
use crate::superblock;
use crate::table::Pages;
use crate::tables::Tables;
use crate::walk::{Found, Walk, walk};
use protocol::raft::{Body, Entry};
use protocol::types::{BLOCK_BYTES, CopysetId, LogIndex, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What recovery found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// LSN of the last batch found.
    pub last_lsn: Lsn,
    /// Batches replayed.
    pub batches: u64,
    /// Batches cut off as a torn tail.
    pub torn_batches: u64,
    /// What was damaged, in words with places.
    pub damages: Vec<String>,
    /// Replicas whose records are in the log after a hole, but not their Create.
    pub unknown: Vec<CopysetId>,
}

/// Why a disk cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecoverError {
    /// No superblock: not formatted.
    #[error("the disk is not formatted: it has no superblock")]
    NotFormatted,
    /// The superblock fails its checksum or makes no sense.
    #[error("the superblock is damaged or foreign: {0}")]
    Superblock(String),
    /// Neither checkpoint can be read.
    #[error(
        "no checkpoint can be read: {0}; format the disk anew and let its replicas be rebuilt from their peers"
    )]
    Checkpoint(String),
    /// IO failed.
    #[error("{0:?}: {1}")]
    Io(FileId, IoError),
}

/// Why a disk cannot be formatted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// There is a superblock already.
    #[error("the disk is formatted already")]
    AlreadyFormatted,
    /// The sizes cannot work.
    #[error("bad layout: {0}")]
    Layout(&'static str),
    /// IO failed.
    #[error("{0:?}: {1}")]
    Io(FileId, IoError),
}

pub(crate) fn disk_tag(identity: &Identity) -> u64 {
    let (tag, _) = identity.disk.split_at(8);
    u64::from_le_bytes(tag.try_into().expect("8 bytes"))
}

/// Formats an empty disk: the first log segments, a checkpoint, and last the superblock.
pub fn format<M: Media + ?Sized>(
    media: &mut M,
    layout: &Layout,
    identity: &Identity,
) -> Result<(), FormatError> {
    let short = (layout.log_segments < LOG_SEGMENTS_MIN).then_some("a new log has 6 segments at least");
    if let Some(problem) = layout.problem().or(short) {
        return Err(FormatError::Layout(problem));
    }
    let at = |file| move |error| FormatError::Io(file, error);
    if media.len(FileId::Superblock).map_err(at(FileId::Superblock))?.is_some_and(|len| len > 0) {
        match superblock::read(media, layout) {
            Ok(_) => return Err(FormatError::AlreadyFormatted),
            // It may be one.
            Err(superblock::Bad { unread: Some(error), .. }) => return Err(at(FileId::Superblock)(error)),
            Err(_) => {}
        }
    }
    let zeroes = vec![0; 1 << 20];
    for segment in 0..layout.format_segments {
        let (file, bytes) = (FileId::Log(segment), layout.segment_bytes as usize);
        media.create(file, bytes as u64).map_err(at(file))?;
        for offset in (0..bytes).step_by(zeroes.len()) {
            let count = zeroes.len().min(bytes - offset);
            media.write(file, offset as u64, &zeroes[..count]).map_err(at(file))?;
        }
        media.sync(file).map_err(at(file))?;
    }
    let first = Checkpoint {
        seq: 1,
        disk_tag: disk_tag(identity),
        covers_lsn: 1,
        replay_epoch: 1,
        replay_lsn: 1,
        segments_ready: layout.format_segments,
        ..Checkpoint::default()
    };
    let (image, bytes) = (first.encode(layout), checkpoint::file_bytes(layout));
    for side in [Side::A, Side::B] {
        let file = FileId::Checkpoint(side);
        media.create(file, bytes).map_err(at(file))?;
        let blank = vec![0; BLOCK_BYTES];
        let content = if side == Side::A { &image } else { &blank };
        media.write(file, 0, content).map_err(at(file))?;
        media.sync(file).map_err(at(file))?;
    }
    let file = FileId::Superblock;
    let block = superblock::encode(layout, identity);
    media.create(file, 2 * BLOCK_BYTES as u64).map_err(at(file))?;
    media.write(file, BLOCK_BYTES as u64, &block).map_err(at(file))?;
    media.write(file, 0, &block).map_err(at(file))?;
    media.sync(file).map_err(at(file))
}

/// What recovery gives: the store, its replicas, and what was found on the way.
pub type Recovered<P> = (Store<P>, Vec<RecoveredCopyset>, RecoveryReport);

pub(crate) fn read_metadata<M: Media + ?Sized>(
    media: &mut M,
    limits: &Layout,
) -> Result<(Layout, Identity, Checkpoint, Vec<String>), RecoverError> {
    let at = |error| RecoverError::Io(FileId::Superblock, error);
    if media.len(FileId::Superblock).map_err(at)?.is_none() {
        return Err(RecoverError::NotFormatted);
    }
    let (layout, identity) =
        superblock::read(media, limits).map_err(|bad| RecoverError::Superblock(bad.why))?;
    let (mut best, mut why, mut notes) = (None::<Checkpoint>, Vec::new(), Vec::new());
    for side in [Side::A, Side::B] {
        match checkpoint::read(media, side, disk_tag(&identity), &layout) {
            Ok(found) if best.as_ref().is_none_or(|b| b.seq < found.seq) => best = Some(found),
            Ok(_) => {}
            Err(problem) => {
                if problem != checkpoint::NEVER_WRITTEN {
                    notes.push(format!("checkpoint {side:?}: {problem}"));
                }
                why.push(format!("{side:?}: {problem}"));
            }
        }
    }
    let best = best.ok_or(RecoverError::Checkpoint(why.join("; ")))?;
    Ok((layout, identity, best, notes))
}

/// Opens a disk: superblock, last checkpoint, log replay. `limits` gives the layout's not fixed
/// part. Writes only to make what it read durable and to erase a torn tail.
pub fn recover<P: Payload, M: Media + ?Sized>(
    media: &mut M,
    limits: &Layout,
) -> Result<Recovered<P>, RecoverError> {
    let (layout, identity, from, _) = read_metadata(media, limits)?;
    make_durable(media, &layout)?;
    let log = walk(media, &layout, &from).map_err(|error| RecoverError::Io(FileId::Log(0), error))?;
    erase(media, &log)?;
    let mut report = RecoveryReport {
        last_lsn: Lsn(log.last_lsn),
        batches: log.batches.len() as u64,
        torn_batches: log.torn.len() as u64,
        damages: log.damages.clone(),
        unknown: Vec::new(),
    };
    let mut store = new_store(&layout, identity, &from, &log)?;
    let replay = Replay::run(&mut store, &from, &log);
    if !log.holes.is_empty() {
        store.may_lack_replicas = true;
        report.unknown = replay.unknown.iter().copied().collect();
        let lost = report.unknown.iter().map(|id| format!("copyset {id}: its replica is lost"));
        report.damages.extend(lost);
    }
    replay.end(&mut store, &mut report);
    for state in store.copysets.values_mut() {
        // A hint never promises more than what is there.
        state.applied = state.applied.min(state.last());
        state.hinted = state.hinted.min(state.applied);
        state.told = state.applied;
    }
    store.waiting_blocks = store.count_waiting();
    if !log.holes.is_empty() {
        store.copysets.values_mut().for_each(|c| c.damaged = true);
    }
    if !report.damages.is_empty() {
        store.round.past_damage = Some(log.last_lsn + 1);
        // The next batch opens a new segment, so that the damaged ones can be recycled.
        if !store.log.free.is_empty() {
            store.log.block = store.log.segment_blocks;
        } else if let Some(last) = store.log.uses.back() {
            store.log.epoch = last.epoch;
        }
    }
    store.stats.torn_tails = u64::from(report.torn_batches > 0);
    store.stats.log_damages = report.damages.len() as u64;
    let copysets = store.copysets.iter().map(|(id, c)| recovered(*id, c)).collect();
    Ok((store, copysets, report))
}

/// What can be read now must still be there after the next crash, or decisions made on it would
/// not hold.
fn make_durable<M: Media + ?Sized>(media: &mut M, layout: &Layout) -> Result<(), RecoverError> {
    let files = [Side::A, Side::B].map(FileId::Checkpoint).into_iter();
    let files = files.chain((0..layout.log_segments).map(FileId::Log));
    let files = files.chain((0..layout.chunk_files_max()).map(FileId::Chunks));
    for file in files {
        let at = |error| RecoverError::Io(file, error);
        if media.len(file).map_err(at)?.is_some() {
            media.sync(file).map_err(at)?;
        }
    }
    Ok(())
}

/// Erases the headers of torn batches, so that they can never be taken for later ones.
fn erase<M: Media + ?Sized>(media: &mut M, log: &Walk) -> Result<(), RecoverError> {
    let mut files = BTreeSet::new();
    for (segment, block) in &log.torn {
        let file = FileId::Log(*segment);
        let offset = u64::from(*block) * BLOCK_BYTES as u64;
        media.write(file, offset, &[0; BLOCK_BYTES]).map_err(|error| RecoverError::Io(file, error))?;
        files.insert(file);
    }
    for file in files {
        media.sync(file).map_err(|error| RecoverError::Io(file, error))?;
    }
    Ok(())
}

fn recovered<P>(id: CopysetId, state: &Copyset<P>) -> RecoveredCopyset {
    RecoveredCopyset {
        id,
        hard: state.hard,
        members: state.members,
        floor: (state.floor, state.floor_term),
        entries: state.entries.iter().map(|e| e.entry).collect(),
        applied: state.applied,
        health: state.health(),
        installing: state.installing,
    }
}

/// The store as the checkpoint has it, its log ready to be continued.
fn new_store<P: Payload>(
    layout: &Layout,
    identity: Identity,
    from: &Checkpoint,
    read: &Walk,
) -> Result<Store<P>, RecoverError> {
    let mut log = Log::new(layout, from.disk_tag, read.last_lsn);
    let highest = read.uses.iter().map(|u| u.segment + 1).max().unwrap_or(0);
    log.ready = from.segments_ready.max(highest).min(layout.log_segments);
    log.free = (0..log.ready).filter(|s| read.uses.iter().all(|u| u.segment != *s)).collect();
    log.uses = read.uses.iter().copied().collect();
    (log.block, log.chain, log.epoch) = (read.block, read.chain, read.epoch);
    log.places = read.places.iter().copied().collect();
    log.first_place = from.replay_lsn;
    log.start();
    let mut store = Store {
        layout: *layout,
        identity,
        now: Time(0),
        failed: None,
        stats: Stats::default(),
        events: VecDeque::new(),
        ops: VecDeque::new(),
        pending: Map::default(),
        next_ticket: 0,
        log,
        recovered: read.last_lsn,
        may_lack_replicas: from.may_lack_replicas,
        copysets: BTreeMap::new(),
        chunks: Map::default(),
        dirty: BTreeSet::new(),
        overlaid: Counted::default(),
        waiting_blocks: 0,
        ram: VecDeque::new(),
        ram_blocks: 0,
        pool: Pool::new(from.slots_ready.min(layout.slots_max), layout.slots_max),
        tables: Tables::new(layout.table_cache_max),
        reads: Default::default(),
        repairs: Vec::new(),
        flush: Default::default(),
        round: Default::default(),
        preformat: Default::default(),
        last_stage: Time(0),
        hints: Vec::new(),
        hints_under_way: VecDeque::new(),
        stopping: false,
        spares: Default::default(),
    };
    store.round.resume(from.seq, from.covers_lsn, (from.segments_ready, from.slots_ready));
    for image in &from.copysets {
        let mut state = Copyset::new(image.members, image.born);
        (state.hard, state.floor, state.floor_term) = (image.hard, image.floor, image.floor_term);
        state.applied = LogIndex(image.floor.0 + u64::from(image.ahead));
        (state.hinted, state.damaged, state.installing) = (state.applied, image.damaged, image.installing);
        let base = Base {
            floor: image.floor,
            term: image.floor_term,
            members: image.members,
            installing: image.installing,
        };
        store.round.last_bases.insert(image.id, base);
        store.copysets.insert(image.id, state);
    }
    for (copyset, fence) in &from.fences {
        let Some(state) = store.copysets.get_mut(copyset) else {
            return Err(RecoverError::Checkpoint("a fence is of a copyset that it does not know".into()));
        };
        state.fences.raise(*fence);
    }
    for image in &from.slots {
        let pages = Pages { seq: image.seq, ..Pages::NONE };
        let slot = Slot { chunk: image.chunk, copyset: image.copyset, generation: image.generation, pages };
        let owned = store.copysets.contains_key(&image.copyset) && !store.chunks.contains_key(&image.chunk);
        if !owned || !store.pool.adopt(image.slot, slot) {
            return Err(RecoverError::Checkpoint("its slot table contradicts itself".into()));
        }
        store.chunk(image.copyset, image.chunk).slot = Some(image.slot);
    }
    Ok(store)
}

/// Entries of one copyset as they come in the log; bad: a payload block fails its CRC.
type Entries<P> = BTreeMap<u64, (EntryMeta<P>, bool)>;

/// Replay of the log over a store.
struct Replay<P> {
    entries: BTreeMap<CopysetId, Entries<P>>,
    /// Have records and no Create. Without a hole these were removed before the checkpoint was written.
    unknown: BTreeSet<CopysetId>,
}

impl<P: Payload> Replay<P> {
    fn run(store: &mut Store<P>, from: &Checkpoint, log: &Walk) -> Self {
        let mut it = Self { entries: BTreeMap::new(), unknown: BTreeSet::new() };
        for found in &log.batches {
            for logged in &found.records {
                it.record(store, from.covers_lsn, found, logged);
            }
        }
        it
    }

    fn record(&mut self, store: &mut Store<P>, covers: u64, found: &Found, logged: &Logged) {
        let lsn = found.head.lsn;
        let copyset = copyset_of(&logged.record);
        let (at, count) = (logged.at as usize, payload_blocks(&logged.record));
        let bad = found.bad.iter().any(|b| (at..at + count).contains(&(*b as usize)));
        let crcs = &found.crcs[at..at + count];
        let placed = Placed { lsn, at: logged.at, extra: logged.extra, payload: None, crcs };
        let born = store.copysets.get(&copyset).map(|c| c.born);
        match logged.record {
            Record::Create { .. } if lsn < covers || born.is_some() => return,
            Record::Create { .. } => {
                self.entries.remove(&copyset);
                self.unknown.remove(&copyset);
            }
            Record::Remove { .. } if born.is_none() => {
                self.unknown.remove(&copyset);
                return;
            }
            _ if born.is_none() => {
                if lsn >= covers {
                    self.unknown.insert(copyset);
                }
                return;
            }
            _ if born.is_none_or(|born| lsn < born) => return,
            _ => {}
        }
        match logged.record {
            Record::Entry { entry, .. } => return self.entry(copyset, entry, placed, bad),
            Record::Truncate { from, .. } => {
                self.entries.entry(copyset).or_default().split_off(&from.0);
                return;
            }
            Record::InstallEnd { floor, .. } => {
                let entries = self.entries.entry(copyset).or_default();
                let kept = entries.split_off(&(floor.0 + 1));
                *entries = if logged.extra == 1 { kept } else { BTreeMap::new() };
            }
            Record::Applied { index, .. } => return self.hint(store, copyset, index, lsn < covers),
            // A catch-up begun anew builds on the blocks of the one before.
            Record::InstallBegin { .. } if lsn >= covers && !store.copysets[&copyset].installing => {
                self.apply_until(store, copyset, LogIndex(logged.extra));
            }
            Record::Remove { .. } if lsn >= covers => {
                self.entries.remove(&copyset);
            }
            _ => {}
        }
        if lsn < covers {
            return;
        }
        if bad {
            store.copysets.get_mut(&copyset).expect("known").damaged = true;
            return;
        }
        store.take_in_metadata(logged.record, placed);
    }

    fn entry(&mut self, copyset: CopysetId, entry: Entry, placed: Placed<'_, P>, bad: bool) {
        let entries = self.entries.entry(copyset).or_default();
        let meta = EntryMeta { entry, lsn: placed.lsn, at: placed.at, crcs: placed.crcs.into(), ram: None };
        let index = entry.index.0;
        if let Some((old, old_bad)) = entries.get(&index) {
            if old.entry.term == entry.term {
                if !bad || *old_bad {
                    entries.insert(index, (meta, bad));
                }
                return;
            }
            entries.split_off(&index);
        } else if entries.range(index..).next().is_some_and(|(_, (after, _))| after.entry.term < entry.term) {
            entries.split_off(&index);
        }
        entries.insert(index, (meta, bad));
    }

    /// What was applied before a chunk catch-up began is part of what the catch-up built on.
    fn apply_until(&mut self, store: &mut Store<P>, copyset: CopysetId, applied: LogIndex) {
        // From the last hint on; at least from the floor.
        let done = store.copysets[&copyset].applied;
        let Some(entries) = self.entries.get(&copyset) else { return };
        let known: Vec<_> = entries
            .range(done.0 + 1..=applied.0.max(done.0 + 1))
            .filter(|(index, (_, bad))| **index <= applied.0 && !*bad)
            .map(|(_, (meta, _))| (meta.entry, meta.lsn, meta.at, meta.crcs.clone()))
            .collect();
        for (entry, lsn, at, crcs) in known {
            let placed = Placed { lsn, at, extra: 0, payload: None, crcs: &crcs };
            store.apply(copyset, entry.index, entry.body, placed);
        }
        let state = store.copysets.get_mut(&copyset).expect("known");
        state.applied = state.applied.max(applied);
    }

    /// The log tells that entries up to `index` were applied. Where the checkpoint holds an
    /// unfinished catch-up, older hints say nothing: its chunks may hold newer blocks already.
    fn hint(&mut self, store: &mut Store<P>, copyset: CopysetId, index: LogIndex, old: bool) {
        let state = &store.copysets[&copyset];
        if state.installing && old || index <= state.applied {
            return;
        }
        self.apply_until(store, copyset, index);
        store.copysets.get_mut(&copyset).expect("known").hinted = index;
    }

    /// Gives each copyset its entries, as far as they are contiguous and good.
    fn end(self, store: &mut Store<P>, report: &mut RecoveryReport) {
        for (copyset, entries) in self.entries {
            let Some(state) = store.copysets.get(&copyset) else { continue };
            let (floor, mut next, mut term) = (state.floor.0, state.floor.0 + 1, state.floor_term);
            let mut lost = None;
            let mut good = Vec::new();
            for (index, (meta, bad)) in entries.into_iter().filter(|(index, _)| *index > floor) {
                if bad || index != next || meta.entry.term < term {
                    lost = Some(next);
                    break;
                }
                term = meta.entry.term;
                good.push(meta);
                next += 1;
            }
            for meta in good {
                let waits = meta.entry.index > store.copysets[&copyset].applied;
                if let Body::Write { chunk, .. } = meta.entry.body
                    && waits
                {
                    store.chunk(copyset, chunk).refs += 1;
                }
                store.copysets.get_mut(&copyset).expect("known").entries.push_back(meta);
            }
            let state = store.copysets.get_mut(&copyset).expect("known");
            if let Some(index) = lost {
                state.damaged = true;
                report.damages.push(format!("copyset {copyset}: entries from {index} on are lost"));
            }
        }
    }
}

fn copyset_of(record: &Record) -> CopysetId {
    match *record {
        Record::Create { copyset, .. }
        | Record::Remove { copyset }
        | Record::Hard { copyset, .. }
        | Record::Entry { copyset, .. }
        | Record::Truncate { copyset, .. }
        | Record::Health { copyset, .. }
        | Record::Applied { copyset, .. }
        | Record::Fence { copyset, .. }
        | Record::InstallBegin { copyset }
        | Record::InstallBlocks { copyset, .. }
        | Record::InstallZero { copyset, .. }
        | Record::InstallDrop { copyset, .. }
        | Record::InstallEnd { copyset, .. } => copyset,
    }
}
