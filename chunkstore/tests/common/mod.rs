//! A disk in memory that loses and tears what was not synced, and a driver for a store on it.
#![allow(dead_code, missing_docs)]

use ashlar_chunkstore::*;
use protocol::types::{BLOCK_BYTES, Time};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Splitmix64: the same seed gives the same run.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
pub struct Buf(pub Rc<Vec<u8>>);

impl Buf {
    /// Blocks filled from a number each.
    pub fn of(seeds: &[u64]) -> Self {
        Self(Rc::new(seeds.iter().flat_map(|s| block(*s)).collect()))
    }
}

impl Payload for Buf {
    fn blocks(&self) -> usize {
        self.0.len() / BLOCK_BYTES
    }
    fn block(&self, at: usize) -> &[u8] {
        &self.0[at * BLOCK_BYTES..][..BLOCK_BYTES]
    }
}

/// A block that tells its seed in its first bytes and is odd in each sector.
pub fn block(seed: u64) -> Vec<u8> {
    let mut out = vec![seed as u8; BLOCK_BYTES];
    for sector in out.chunks_mut(512) {
        sector[..8].copy_from_slice(&seed.to_le_bytes());
    }
    out
}

type Blocks = BTreeMap<u64, Vec<u8>>;

#[derive(Clone, Default)]
pub struct File {
    pub bytes: u64,
    durable: Blocks,
    pub view: Blocks,
    /// Writes completed and not synced.
    cached: Vec<(u64, Vec<u8>)>,
}

fn put(blocks: &mut Blocks, at: u64, data: &[u8]) {
    if data.iter().all(|b| *b == 0) {
        blocks.remove(&at);
    } else {
        blocks.insert(at, data.to_vec());
    }
}

#[derive(Clone, Default)]
pub struct Disk {
    pub files: BTreeMap<FileId, File>,
    pub full: bool,
    /// Blocks that cannot be read before they are written again.
    pub broken: BTreeSet<(FileId, u64)>,
}

impl Disk {
    fn file(&mut self, file: FileId) -> &mut File {
        self.files.get_mut(&file).unwrap_or_else(|| panic!("{file:?} exists"))
    }
    pub fn write_blocks(&mut self, file: FileId, offset: u64, data: &[u8], dsync: bool) {
        let written = offset / 4096..offset / 4096 + (data.len() / BLOCK_BYTES) as u64;
        self.broken.retain(|(of, block)| *of != file || !written.contains(block));
        let file = self.file(file);
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(BLOCK_BYTES));
        for (nth, block) in data.chunks(BLOCK_BYTES).enumerate() {
            let at = offset / 4096 + nth as u64;
            put(&mut file.view, at, block);
            if dsync {
                put(&mut file.durable, at, block);
                file.cached.retain(|(a, _)| *a != at);
            } else {
                file.cached.push((at, block.to_vec()));
            }
        }
        file.bytes = file.bytes.max(offset + data.len() as u64);
    }
    pub fn sync_file(&mut self, file: FileId) {
        let file = self.file(file);
        for (at, data) in std::mem::take(&mut file.cached) {
            put(&mut file.durable, at, &data);
        }
    }
    pub fn read_block(&self, file: FileId, at: u64) -> Vec<u8> {
        let found = self.files.get(&file).and_then(|f| f.view.get(&at));
        found.cloned().unwrap_or_else(|| vec![0; BLOCK_BYTES])
    }
    /// Power is cut: of what was not synced each sector is there or not.
    pub fn crash(&mut self, in_flight: Vec<(FileId, u64, Vec<u8>)>, rng: &mut Rng) {
        for (file, offset, data) in in_flight {
            let Some(file) = self.files.get_mut(&file) else { continue };
            for (nth, block) in data.chunks(BLOCK_BYTES).enumerate() {
                file.cached.push((offset / 4096 + nth as u64, block.to_vec()));
            }
        }
        for file in self.files.values_mut() {
            let style = rng.below(3);
            for (at, data) in std::mem::take(&mut file.cached) {
                let mut block = file.durable.get(&at).cloned().unwrap_or_else(|| vec![0; BLOCK_BYTES]);
                let whole = rng.chance(50);
                for sector in 0..8 {
                    let keep = match style {
                        0 => whole,
                        1 => rng.chance(50),
                        _ => whole || rng.chance(10),
                    };
                    if keep {
                        block[sector * 512..][..512].copy_from_slice(&data[sector * 512..][..512]);
                    }
                }
                put(&mut file.durable, at, &block);
            }
            file.view = file.durable.clone();
        }
    }
    /// Flips a bit, durably.
    pub fn flip(&mut self, file: FileId, block: u64, byte: usize) {
        let mut data = self.read_block(file, block);
        data[byte] ^= 0x10;
        let file = self.file(file);
        put(&mut file.durable, block, &data);
        put(&mut file.view, block, &data);
    }
}

impl Media for Disk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let read = offset / 4096..offset / 4096 + buf.len().div_ceil(BLOCK_BYTES) as u64;
        if self.broken.iter().any(|(of, block)| *of == file && read.contains(block)) {
            return Err(IoError { errno: 5 });
        }
        for (nth, block) in buf.chunks_mut(BLOCK_BYTES).enumerate() {
            block.copy_from_slice(&self.read_block(file, offset / 4096 + nth as u64)[..block.len()]);
        }
        Ok(())
    }
    fn write(&mut self, file: FileId, offset: u64, data: &[u8]) -> Result<(), IoError> {
        self.write_blocks(file, offset, data, false);
        Ok(())
    }
    fn sync(&mut self, file: FileId) -> Result<(), IoError> {
        self.sync_file(file);
        Ok(())
    }
    fn len(&mut self, file: FileId) -> Result<Option<u64>, IoError> {
        Ok(self.files.get(&file).map(|f| f.bytes))
    }
    fn create(&mut self, file: FileId, bytes: u64) -> Result<(), IoError> {
        if self.full && matches!(file, FileId::Chunks(_)) {
            return Err(IoError { errno: ENOSPC });
        }
        let file = self.files.entry(file).or_default();
        file.bytes = file.bytes.max(bytes);
        Ok(())
    }
}

pub fn small_layout() -> Layout {
    Layout {
        segment_bytes: 176 * 4096,
        log_segments: 6,
        slots_per_file: 2,
        slots_max: 8,
        format_segments: 2,
        reserve_slots: 2,
        batch_blocks_max: 32,
        ram_blocks_max: 48,
        table_cache_max: 2,
        ..Layout::default()
    }
}

pub fn identity() -> Identity {
    Identity { cluster: [1; 16], disk: [7; 16], target: 3, shard: 0 }
}

/// A store, its disk and the operations in flight.
pub struct Rig {
    pub disk: Disk,
    pub store: Store<Buf>,
    pub ops: Vec<Op<Buf>>,
    pub events: Vec<Event<Buf>>,
    pub now: Time,
}

pub fn bytes_of(pieces: &[Piece<Buf>]) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Payload { payload, first, count } => {
                (*first..first + count).for_each(|at| out.extend_from_slice(payload.block(at)));
            }
            Piece::Bytes(bytes) => out.extend_from_slice(bytes),
            Piece::Zeroes { blocks } => out.resize(out.len() + blocks * BLOCK_BYTES, 0),
        }
    }
    out
}

impl Rig {
    pub fn new(layout: &Layout) -> Self {
        let mut disk = Disk::default();
        format(&mut disk, layout, &identity()).expect("formats");
        Self::open(disk, layout).0
    }
    pub fn open(mut disk: Disk, layout: &Layout) -> (Self, Vec<RecoveredCopyset>, RecoveryReport) {
        let (store, copysets, report) = recover(&mut disk, layout).expect("recovers");
        (Self { disk, store, ops: Vec::new(), events: Vec::new(), now: Time(1) }, copysets, report)
    }
    /// Takes all ops and events that are there.
    pub fn drain(&mut self) {
        while let Some(op) = self.store.poll_op(self.now) {
            self.ops.push(op);
        }
        while let Some(event) = self.store.poll_event() {
            self.events.push(event);
        }
    }
    /// Completes writes of the log until there are none; other operations do not end.
    pub fn write_log(&mut self) {
        self.drain();
        while let Some(at) = self.ops.iter().position(|op| {
            matches!(op, Op::Write { file: FileId::Log(_), .. } | Op::Create { file: FileId::Log(_), .. })
        }) {
            self.complete(at);
            self.drain();
        }
    }
    /// Completes the operation at a place.
    pub fn complete(&mut self, at: usize) {
        let op = self.ops.swap_remove(at);
        let (ticket, result) = match op {
            Op::Write { ticket, file, offset, pieces, dsync } => {
                self.disk.write_blocks(file, offset, &bytes_of(&pieces), dsync);
                (ticket, Ok(None))
            }
            Op::Read { ticket, file, offset, blocks } => {
                let mut data = vec![0; blocks * BLOCK_BYTES];
                let read = self.disk.read(file, offset, &mut data);
                (ticket, read.map(|()| Some(Buf(Rc::new(data)))))
            }
            Op::Sync { ticket, file } => {
                self.disk.sync_file(file);
                (ticket, Ok(None))
            }
            Op::Create { ticket, file, bytes } => (ticket, self.disk.create(file, bytes).map(|()| None)),
        };
        self.now.0 += 1000;
        self.store.completed(ticket, result, self.now);
    }
    /// Runs until nothing is left to do now.
    pub fn settle(&mut self) {
        self.drain();
        while !self.ops.is_empty() {
            self.complete(0);
            self.drain();
        }
    }
    /// Lets time pass in small steps.
    pub fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(20) {
            self.now.0 += 20_000_000;
            self.settle();
        }
    }
    /// Power cut and restart.
    pub fn crash(mut self, layout: &Layout, rng: &mut Rng) -> (Self, Vec<RecoveredCopyset>, RecoveryReport) {
        let mut writes = Vec::new();
        for op in &self.ops {
            if let Op::Write { file, offset, pieces, .. } = op {
                writes.push((*file, *offset, bytes_of(pieces)));
            }
        }
        self.disk.crash(writes, rng);
        Self::open(self.disk, layout)
    }
    /// Seeds of a range of blocks as a read tells them, 0 for zeroes.
    pub fn read_seeds(data: &ReadData<Buf>) -> Vec<u64> {
        let mut out = Vec::new();
        for piece in data {
            match piece {
                ReadPiece::Zero { count } => out.resize(out.len() + count, 0),
                ReadPiece::Data { payload, first, count, .. } => {
                    for at in *first..first + count {
                        let seed = u64::from_le_bytes(payload.block(at)[..8].try_into().expect("8"));
                        assert_eq!(payload.block(at), &block(seed)[..], "a block of one seed");
                        out.push(seed);
                    }
                }
            }
        }
        out
    }
}
