//! One fixture of each on-disk structure: bytes written by an earlier build must still be read,
//! and today's code must still write the same. `BLESS=1` writes them anew, on purpose only.
#![allow(missing_docs)]

mod common;
use ashlar_chunkstore::*;
use common::*;
use protocol::raft::{Body, Entry, Fence, HardState, Members};
use protocol::types::*;
use std::path::PathBuf;

const CS: CopysetId = CopysetId(7);
const CHUNK: ChunkId = ChunkId { volume: VolumeId(3), index: 5 };

fn fence(volume: u32, epoch: u64) -> Fence {
    Fence { volume: VolumeId(volume), epoch: SessionEpoch(epoch) }
}

/// A disk after a little of everything, made the same way each time.
fn disk() -> Disk {
    let mut rig = Rig::new(&small_layout());
    let at = |target| ShardAddr { target: TargetId(target), shard: 1 };
    let members = Members::new(&[at(1), at(2), at(3)], &[at(4)]).expect("fits");
    rig.store.stage(Record::Create { copyset: CS, members }, None, &[]);
    rig.store.stage(
        Record::Hard { copyset: CS, hard: HardState { term: Term(9), vote: Some(TargetId(2)) } },
        None,
        &[],
    );
    let bodies = [
        Body::Noop,
        Body::Write { chunk: CHUNK, range: BlockRange { first: 8, count: 2 } },
        Body::Zero { chunk: CHUNK, range: BlockRange { first: 9, count: 1 } },
        Body::Members(members),
        Body::DropVolume { volume: VolumeId(99) },
        Body::Fence(fence(3, 4)),
    ];
    for (nth, body) in bodies.into_iter().enumerate() {
        let entry = Entry { term: Term(9), index: LogIndex(nth as u64 + 1), body };
        let seeds: &[u64] = if body.payload_blocks() > 0 { &[11, 12] } else { &[] };
        let crcs: Vec<u32> = seeds.iter().map(|s| block_crc(&block(*s))).collect();
        rig.store.stage(
            Record::Entry { copyset: CS, entry },
            (!seeds.is_empty()).then(|| Buf::of(seeds)),
            &crcs,
        );
    }
    rig.store.stage(Record::Fence { copyset: CS, fence: fence(2, 9) }, None, &[]);
    rig.settle();
    rig.store.commit(CS, LogIndex(6));
    rig.store.stop();
    rig.settle();
    rig.disk
}

/// Name, file, first block, blocks.
const PARTS: [(&str, FileId, u64, u64); 4] = [
    ("superblock-v1.bin", FileId::Superblock, 0, 2),
    ("checkpoint-v2.bin", FileId::Checkpoint(Side::B), 0, 1),
    ("log-v2.bin", FileId::Log(0), 0, 8),
    ("table-v1-2.bin", FileId::Chunks(0), 0, 16),
];

/// What was written before there were fences.
const PARTS_OLD: [(&str, FileId, u64, u64); 4] = [
    PARTS[0],
    ("checkpoint-v1.bin", FileId::Checkpoint(Side::B), 0, 1),
    ("log-v1.bin", FileId::Log(0), 0, 8),
    ("table-v1.bin", FileId::Chunks(0), 0, 16),
];

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

#[test]
fn the_formats_are_written_as_they_were() {
    let disk = disk();
    for (name, file, first, blocks) in PARTS {
        let bytes: Vec<u8> = (first..first + blocks).flat_map(|at| disk.read_block(file, at)).collect();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path(name), &bytes).expect("writes");
        }
        let kept = std::fs::read(path(name)).expect("the fixture is there");
        assert!(
            kept == bytes,
            "{name} differs: a change of format needs a new version and a fixture of the old one"
        );
    }
}

#[test]
fn a_disk_made_of_the_fixtures_is_read() {
    let fences = read_disk(&PARTS, 6);
    assert_eq!(fences, [fence(2, 9), fence(3, 4)], "of the record and of the entry");
}

#[test]
fn a_disk_from_before_fences_is_read() {
    assert_eq!(read_disk(&PARTS_OLD, 5), []);
}

/// Makes a disk of fixtures, with so many entries, and tells the fences on it.
fn read_disk(parts: &[(&str, FileId, u64, u64)], entries: usize) -> Vec<Fence> {
    let mut disk = Disk::default();
    format(&mut disk, &small_layout(), &identity()).expect("formats");
    disk.create(FileId::Chunks(0), small_layout().chunk_file_bytes()).expect("makes");
    for (name, file, first, _) in parts {
        disk.write_blocks(
            *file,
            first * 4096,
            &std::fs::read(path(name)).expect("the fixture is there"),
            true,
        );
    }
    let (_, base) = small_layout().data_place(0);
    disk.write_blocks(FileId::Chunks(0), base + 8 * 4096, &block(11), true);
    let report = inspect(&mut disk, &small_layout()).expect("reads");
    assert_eq!((report.problems, report.blocks_good, report.identity), (vec![], 1, identity()));
    let (rig, found, report) = Rig::open(disk, &small_layout());
    assert_eq!(report.damages, Vec::<String>::new());
    assert_eq!(found[0].hard, HardState { term: Term(9), vote: Some(TargetId(2)) });
    assert_eq!((found[0].entries.len(), found[0].members.learners().count()), (entries, 1));
    rig.store.fences(CS).as_slice().to_vec()
}
