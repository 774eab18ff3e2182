//! A shard's disk: log batches, checkpoint, superblock and checksum tables, as recovery meets them.
//!
//! An input is patches to the disk that the fixtures make: (part, block, offset in it, length, bytes).
//! Then the checksums of the part are put right, if the input says so, and the disk is opened.

use super::{Dice, Target};
use chunkstore::{
    FileId, Health, Identity, IoError, Layout, Media, Payload, RecoveredCopyset, Side, format, inspect,
    recover,
};
use copyset::{Config, Recovered, Replica};
use protocol::types::{BLOCK_BYTES, CopysetId, TargetId, Time};
use std::cell::RefCell;
use std::collections::BTreeMap;

macro_rules! target {
    ($name:literal, $about:literal, $part:literal, $memory_mib:literal) => {
        Target {
            name: $name,
            about: $about,
            bytes_max: 2 << 10,
            memory_max: |_| $memory_mib << 20,
            make: |dice| patches(dice, $part),
            run: |input| open(input, $part),
        }
    };
}

/// The write-ahead log.
pub const LOG: Target = target!("disk-log", "batches of the log", 0, 64);
/// The checkpoint.
pub const CHECKPOINT: Target = target!("disk-checkpoint", "the checkpoint", 1, 64);
/// The superblock. It may name segments of 256 MiB, which are read whole.
pub const SUPERBLOCK: Target = target!("disk-superblock", "the superblock", 2, 768);
/// Chunk tables.
pub const TABLE: Target = target!("disk-table", "the checksum tables of chunks", 3, 64);

/// A part of the disk: its fixture, file, blocks, and how its checksums are put right.
struct Part {
    fixture: &'static [u8],
    file: FileId,
    mend: fn(&mut [u8]),
}

const PARTS: [Part; 4] = [
    Part {
        fixture: include_bytes!("../../../chunkstore/testdata/log-v1.bin"),
        file: FileId::Log(0),
        mend: mend_log,
    },
    Part {
        fixture: include_bytes!("../../../chunkstore/testdata/checkpoint-v1.bin"),
        file: FileId::Checkpoint(Side::B),
        mend: mend_checkpoint,
    },
    Part {
        fixture: include_bytes!("../../../chunkstore/testdata/superblock-v1.bin"),
        file: FileId::Superblock,
        mend: mend_blocks,
    },
    Part {
        fixture: include_bytes!("../../../chunkstore/testdata/table-v1.bin"),
        file: FileId::Chunks(0),
        mend: mend_blocks,
    },
];

/// Where all structures have their CRC-32C.
const CRC_AT: usize = 12;

fn layout() -> Layout {
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

/// Files as blocks; what is not there reads as zeroes.
#[derive(Clone, Default)]
struct Disk(BTreeMap<FileId, (u64, BTreeMap<u64, Vec<u8>>)>);

impl Media for Disk {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        buf.fill(0);
        let Some((_, blocks)) = self.0.get(&file) else { return Ok(()) };
        for (nth, to) in buf.chunks_mut(BLOCK_BYTES).enumerate() {
            if let Some(block) = blocks.get(&(offset / BLOCK_BYTES as u64 + nth as u64)) {
                to.copy_from_slice(&block[..to.len()]);
            }
        }
        Ok(())
    }
    fn write(&mut self, file: FileId, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let (bytes, blocks) = self.0.entry(file).or_default();
        for (nth, block) in data.chunks(BLOCK_BYTES).enumerate() {
            let at = offset / BLOCK_BYTES as u64 + nth as u64;
            if block.iter().all(|b| *b == 0) {
                blocks.remove(&at);
            } else {
                blocks.insert(at, block.to_vec());
            }
        }
        *bytes = (*bytes).max(offset + data.len() as u64);
        Ok(())
    }
    fn sync(&mut self, _: FileId) -> Result<(), IoError> {
        Ok(())
    }
    fn len(&mut self, file: FileId) -> Result<Option<u64>, IoError> {
        Ok(self.0.get(&file).map(|(bytes, _)| *bytes))
    }
    fn create(&mut self, file: FileId, bytes: u64) -> Result<(), IoError> {
        let (len, _) = self.0.entry(file).or_default();
        *len = (*len).max(bytes);
        Ok(())
    }
}

#[derive(Clone)]
struct Buf;

impl Payload for Buf {
    fn blocks(&self) -> usize {
        1
    }
    fn block(&self, _: usize) -> &[u8] {
        &[0; BLOCK_BYTES]
    }
}

thread_local! {
    static BASE: RefCell<Disk> = RefCell::new(base());
}

fn base() -> Disk {
    let mut disk = Disk::default();
    let identity = Identity { cluster: [1; 16], disk: [7; 16], target: 3, shard: 0 };
    format(&mut disk, &layout(), &identity).expect("formats");
    disk.create(FileId::Chunks(0), layout().chunk_file_bytes()).expect("makes");
    for part in PARTS {
        disk.write(part.file, 0, part.fixture).expect("writes");
    }
    disk
}

fn open(input: &[u8], part: usize) {
    let Some((style, input)) = input.split_first() else { return };
    let mut disk = BASE.with(|base| base.borrow().clone());
    let Part { fixture, file, mend } = &PARTS[part];
    // Room behind the fixture's end, for batches and blocks that patches make longer.
    let mut image = fixture.to_vec();
    image.resize(fixture.len().max(16 * BLOCK_BYTES), 0);
    apply(&mut image, input);
    if style & 1 == 0 {
        mend(&mut image);
    }
    disk.write(*file, 0, &image).expect("writes");
    let report = inspect(&mut disk.clone(), &layout());
    match recover::<Buf, _>(&mut disk, &layout()) {
        Ok((store, found, _)) => {
            assert!(report.is_ok(), "recovered, yet not inspected: {report:?}");
            drop(store);
            let (_, again, report) =
                recover::<Buf, _>(&mut disk, &layout()).expect("a disk that opened opens again");
            assert_eq!(found, again, "another outcome the second time: {report:?}");
            found.into_iter().for_each(usable);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A replica can be made of it: what recovery gives has no gap and no end before its beginning.
fn usable(found: RecoveredCopyset) {
    let health = match found.health {
        Health::Whole => copyset::Health::Whole,
        Health::Installing => copyset::Health::Installing,
        Health::Damaged => copyset::Health::Damaged,
    };
    let RecoveredCopyset { hard, floor, members, entries, applied, .. } = found;
    let recovered = Recovered { hard, floor, members, entries, applied, health };
    let _ = Replica::new(Config::new(CopysetId(found.id.0), TargetId(1), 1), recovered, Time(1));
}

fn apply(image: &mut [u8], mut input: &[u8]) {
    while let [block, low, high, bytes, rest @ ..] = input {
        let block = usize::from(*block) % (image.len() / BLOCK_BYTES);
        let at = block * BLOCK_BYTES + usize::from(u16::from_le_bytes([*low, *high])) % BLOCK_BYTES;
        let bytes = usize::from(*bytes).min(rest.len()).min(image.len() - at);
        let (data, rest) = rest.split_at(bytes);
        image[at..at + bytes].copy_from_slice(data);
        input = rest;
    }
}

fn crc_of(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[CRC_AT + 4..])
}

fn fill(bytes: &mut [u8]) -> u32 {
    let crc = crc_of(bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn mend_blocks(image: &mut [u8]) {
    for block in image.chunks_mut(BLOCK_BYTES).filter(|block| block.iter().any(|b| *b != 0)) {
        fill(block);
    }
}

/// Sizes are those of docs/format.md: 96 bytes, then so many copysets of 144 and slots of 44.
fn mend_checkpoint(image: &mut [u8]) {
    let (copysets, slots) = (u64::from(u32_at(image, 76)), u64::from(u32_at(image, 80)));
    let bytes = (96 + copysets * 144 + slots * 44).next_multiple_of(BLOCK_BYTES as u64);
    if let Some(image) = image.get_mut(..bytes as usize) {
        fill(image);
    }
}

/// Each batch's checksum and its chain to the one before it, as far as batches follow each other.
fn mend_log(image: &mut [u8]) {
    let (mut at, mut chain) = (0, None);
    while image.get(at..at + 8) == Some(b"ASHBATCH") {
        let blocks = usize::from(u16::from_le_bytes([image[at + 10], image[at + 11]]));
        let total = blocks + u32_at(image, at + 60) as usize;
        let Some(header) = image.get_mut(at..at + blocks.max(1) * BLOCK_BYTES) else { return };
        if let Some(chain) = chain {
            header[56..60].copy_from_slice(&u32::to_le_bytes(chain));
        }
        chain = Some(fill(header));
        at += total.max(1) * BLOCK_BYTES;
    }
}

fn patches(dice: &mut Dice, part: usize) -> Vec<u8> {
    let mut out = vec![u8::from(dice.percent(10))];
    for _ in 0..dice.below(6) {
        let block = dice.below(PARTS[part].fixture.len() / BLOCK_BYTES) as u8;
        // Fields lie at the front; records, copysets and slots are a multiple of four long.
        let offset = if dice.percent(80) { 4 * dice.below(96) } else { dice.below(BLOCK_BYTES) } as u16;
        let number = dice.odd().to_le_bytes();
        let bytes = dice.pick(&[1, 2, 4, 8]);
        out.push(block);
        out.extend_from_slice(&offset.to_le_bytes());
        out.push(bytes as u8);
        out.extend_from_slice(&number[..bytes]);
    }
    out
}
