//! Damage on disk: finds where a target keeps the register workload's blocks, and flips bytes there.
//!
//! Blocks are found by what they hold, not by the disk format, so this keeps working when the format changes: only
//! the file names (a path that names `log` is a log, all else holds chunks) are known here.

use anyhow::Context;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// First bytes of every block that the register workload wrote.
const MAGIC: &[u8; 8] = b"ASHLARrg";

/// Which files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The write-ahead log.
    Log,
    /// Everything else: chunk files.
    Chunks,
}

/// One block of the register workload on disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Its file.
    pub path: PathBuf,
    /// Where it starts in the file.
    pub offset: u64,
    /// Which block of the volume it is.
    pub block: u64,
    /// The number that the workload gave this write of the block.
    pub number: u64,
}

/// Every block of the register workload that lies on a 4 KiB boundary of a file under `dir`, by path and offset.
///
/// # Errors
/// A directory or file cannot be read.
pub fn find(dir: &Path, place: Place) -> anyhow::Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let path = entry?.path();
            let kind = path.symlink_metadata()?.file_type();
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() && place_of(dir, &path) == place {
                scan(&path, &mut found).with_context(|| path.display().to_string())?;
            }
        }
    }
    found.sort();
    Ok(found)
}

fn place_of(dir: &Path, path: &Path) -> Place {
    let below = path.strip_prefix(dir).unwrap_or(path).to_string_lossy();
    if below.contains("log") || below.contains("wal") { Place::Log } else { Place::Chunks }
}

fn scan(path: &Path, found: &mut Vec<Found>) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 * BLOCK];
    let mut start = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        for (at, block) in buffer[..filled].chunks_exact(BLOCK).enumerate() {
            if block.starts_with(MAGIC) {
                let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| block[at + byte]));
                let offset = start + (at * BLOCK) as u64;
                found.push(Found { path: path.to_owned(), offset, block: field(16), number: field(24) });
            }
        }
        if filled < buffer.len() {
            return Ok(());
        }
        start += filled as u64;
    }
}

/// Flips some bits in the middle of a block, past its header, and syncs the file.
///
/// # Errors
/// The file cannot be read or written.
pub fn flip(found: &Found) -> anyhow::Result<()> {
    let mut file = File::options().read(true).write(true).open(&found.path)?;
    let mut bytes = [0; 16];
    let at = SeekFrom::Start(found.offset + 2000);
    file.seek(at)?;
    file.read_exact(&mut bytes)?;
    for byte in &mut bytes {
        *byte ^= 0x5a;
    }
    file.seek(at)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_by_place_and_flipped_past_their_header() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let mut block = vec![0; BLOCK];
        block[..8].copy_from_slice(MAGIC);
        block[16] = 9;
        block[24] = 4;
        for name in ["shard-0/log/7", "shard-0/chunks-1"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().context("parent")?)?;
            std::fs::write(&path, [vec![0; 300 * BLOCK], block.clone(), vec![7; 100]].concat())?;
        }
        let in_log = find(dir.path(), Place::Log)?;
        assert_eq!(in_log.len(), 1);
        assert!(in_log[0].path.ends_with("shard-0/log/7"));
        assert_eq!((in_log[0].offset, in_log[0].block, in_log[0].number), (300 * BLOCK as u64, 9, 4));
        let in_chunks = find(dir.path(), Place::Chunks)?;
        flip(&in_chunks[0])?;
        assert_eq!(find(dir.path(), Place::Chunks)?, in_chunks);
        let bytes = std::fs::read(&in_chunks[0].path)?;
        assert_eq!(bytes.iter().filter(|byte| **byte == 0x5a).count(), 16);
        Ok(())
    }
}
