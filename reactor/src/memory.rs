//! Files that are memory of this process: what a store costs without a disk beneath it.
//!
//! For benchmarks. Durability means nothing here: a sync succeeds, and everything is gone when the
//! process ends. Files are sparse, in pieces of a huge page that come to be when something other than
//! zeroes is written to them; once a file is full, reads and writes take nothing from the heap.
//!
//! Deliberately absent: alignment rules, faults, a latency. [`crate::sim`] has those.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::api::{Create, Disk, File, IoBuf, IoError, OpenOptions};
use crate::mapping::{HUGE_BYTES, Mapping};
use crate::table::Table;

/// Bytes of a piece.
const PIECE_BYTES: usize = HUGE_BYTES;

/// All files of one core.
pub struct MemoryDisk {
    names: BTreeMap<PathBuf, usize>,
    folders: BTreeSet<PathBuf>,
    contents: Vec<Content>,
    open: Table<usize>,
}

#[derive(Default)]
struct Content {
    bytes: u64,
    /// Absent pieces are zeroes.
    pieces: Vec<Option<Mapping>>,
}

impl MemoryDisk {
    /// No files.
    pub fn new() -> Self {
        Self { names: BTreeMap::new(), folders: BTreeSet::new(), contents: Vec::new(), open: Table::new() }
    }

    fn content(&mut self, what: &'static str, file: File) -> Result<&mut Content, IoError> {
        let content = self.open.get(file.index, file.generation).ok_or(IoError::new(what, libc::EBADF))?;
        Ok(&mut self.contents[*content])
    }

    /// Fills `into` from `offset`; tells how many bytes there were before the end.
    pub fn read(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError> {
        Ok(self.content("read", file)?.read(offset, into))
    }

    /// Writes all of `from` at `offset`.
    pub fn write(&mut self, file: File, offset: u64, from: &[IoBuf]) -> Result<(), IoError> {
        let content = self.content("write", file)?;
        let mut at = offset;
        for buf in from {
            match buf {
                IoBuf::Zeroes(bytes) => content.zero(at, u64::from(*bytes)),
                buf => content.write(at, buf.bytes())?,
            }
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn number(&self, path: &Path) -> Result<usize, IoError> {
        let missing = || IoError::new("open", libc::ENOENT).at(path.display());
        self.names.get(path).copied().ok_or_else(missing)
    }
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::new()
    }
}

/// The pieces that a range touches: piece, first byte within it, bytes of it.
fn pieces(offset: u64, bytes: u64) -> impl Iterator<Item = (usize, usize, usize)> {
    let (piece, end) = (PIECE_BYTES as u64, offset + bytes);
    let mut at = offset;
    std::iter::from_fn(move || {
        let (nth, within) = (at / piece, at % piece);
        let count = (piece - within).min(end - at);
        at += count;
        (count > 0).then_some((nth as usize, within as usize, count as usize))
    })
}

impl Content {
    fn resize(&mut self, bytes: u64) {
        self.zero(bytes, self.bytes.saturating_sub(bytes));
        self.bytes = bytes;
        self.pieces.resize_with(bytes.div_ceil(PIECE_BYTES as u64) as usize, || None);
    }

    fn grow(&mut self, bytes: u64) {
        if bytes > self.bytes {
            self.resize(bytes);
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let bytes = (into.len() as u64).min(self.bytes.saturating_sub(offset)) as usize;
        let mut left = &mut into[..bytes];
        for (nth, within, count) in pieces(offset, bytes as u64) {
            let (here, rest) = left.split_at_mut(count);
            match &self.pieces[nth] {
                Some(piece) => here.copy_from_slice(&piece[within..within + count]),
                None => here.fill(0),
            }
            left = rest;
        }
        bytes
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), IoError> {
        self.grow(offset + from.len() as u64);
        let mut left = from;
        for (nth, within, count) in pieces(offset, from.len() as u64) {
            let (here, rest) = left.split_at(count);
            let piece = match &mut self.pieces[nth] {
                Some(piece) => piece,
                none => none.insert(Mapping::new(PIECE_BYTES)?),
            };
            piece[within..within + count].copy_from_slice(here);
            left = rest;
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, bytes: u64) {
        if bytes > 0 {
            self.grow(offset + bytes);
        }
        for (nth, within, count) in pieces(offset, bytes) {
            if let Some(piece) = &mut self.pieces[nth] {
                piece[within..within + count].fill(0);
            }
        }
    }
}

impl Disk for MemoryDisk {
    fn open(&mut self, path: &Path, options: OpenOptions) -> Result<File, IoError> {
        let there = self.names.get(path).copied();
        let number = match (there, options.create) {
            (Some(_), Create::New) => return Err(IoError::new("open", libc::EEXIST).at(path.display())),
            (Some(number), _) => number,
            (None, Create::No) => self.number(path)?,
            (None, _) => {
                self.contents.push(Content::default());
                self.names.insert(path.to_owned(), self.contents.len() - 1);
                self.contents.len() - 1
            }
        };
        let (index, generation) = self.open.insert(number);
        Ok(File { index, generation })
    }

    fn close_file(&mut self, file: File) {
        self.open.remove(file.index, file.generation);
    }

    fn file_len(&mut self, file: File) -> Result<u64, IoError> {
        Ok(self.content("stat", file)?.bytes)
    }

    fn read_blocking(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError> {
        self.read(file, offset, into)
    }

    fn write_blocking(&mut self, file: File, offset: u64, from: &[u8]) -> Result<(), IoError> {
        self.content("write", file)?.write(offset, from)
    }

    fn sync_blocking(&mut self, file: File) -> Result<(), IoError> {
        self.content("sync", file).map(|_| ())
    }

    fn allocate_blocking(&mut self, file: File, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.content("allocate", file)?.grow(offset + bytes);
        Ok(())
    }

    fn truncate(&mut self, file: File, bytes: u64) -> Result<(), IoError> {
        self.content("truncate", file)?.resize(bytes);
        Ok(())
    }

    fn create_dir_all(&mut self, path: &Path) -> Result<(), IoError> {
        // Asked for with each file: nothing to do for what is there.
        if !self.folders.contains(path) {
            self.folders.extend(path.ancestors().map(Path::to_owned));
        }
        Ok(())
    }

    fn list_dir(&mut self, path: &Path) -> Result<Vec<String>, IoError> {
        let all = self.names.keys().chain(&self.folders).filter(|name| name.parent() == Some(path));
        let names = all.filter_map(|name| Some(name.file_name()?.to_string_lossy().into_owned()));
        let names: BTreeSet<String> = names.collect();
        Ok(names.into_iter().collect())
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError> {
        let number = self.number(from)?;
        self.names.remove(from);
        self.names.insert(to.to_owned(), number);
        Ok(())
    }

    fn remove_file(&mut self, path: &Path) -> Result<(), IoError> {
        let number = self.number(path)?;
        self.names.remove(path);
        self.contents[number].resize(0);
        Ok(())
    }

    fn exists(&mut self, path: &Path) -> bool {
        self.names.contains_key(path) || self.folders.contains(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::SLAB_BYTES;

    #[test]
    fn what_is_written_anywhere_is_read_back_and_the_rest_is_zeroes() {
        let mut disk = MemoryDisk::new();
        let file = disk.open(Path::new("d/f"), OpenOptions::NEW).unwrap();
        let mut model = vec![0_u8; 3 * PIECE_BYTES];
        disk.allocate_blocking(file, 0, model.len() as u64).unwrap();
        let writes = [(0, 1, 4096), (PIECE_BYTES - 100, 2, 300), (PIECE_BYTES + 5, 3, PIECE_BYTES)];
        for (at, byte, count) in writes {
            model[at..at + count].fill(byte);
            disk.write_blocking(file, at as u64, &vec![byte; count]).unwrap();
        }
        model[2000..2000 + PIECE_BYTES].fill(0);
        let zeroes: Vec<_> = (0..PIECE_BYTES / SLAB_BYTES).map(|_| IoBuf::zeroes(SLAB_BYTES)).collect();
        disk.write(file, 2000, &zeroes).unwrap();
        let mut got = vec![9; model.len()];
        assert_eq!(disk.read_blocking(file, 0, &mut got).unwrap(), model.len());
        assert!(got == model);
        assert_eq!(disk.read_blocking(file, model.len() as u64 - 5, &mut got).unwrap(), 5);
        assert_eq!(disk.read_blocking(file, 1 << 40, &mut got).unwrap(), 0);
    }

    #[test]
    fn what_was_cut_off_comes_back_as_zeroes() {
        let mut disk = MemoryDisk::new();
        let file = disk.open(Path::new("f"), OpenOptions::NEW).unwrap();
        disk.write_blocking(file, 0, &[7; 8192]).unwrap();
        disk.truncate(file, 100).unwrap();
        disk.truncate(file, 8192).unwrap();
        let mut got = [9; 8192];
        disk.read_blocking(file, 0, &mut got).unwrap();
        assert_eq!((&got[..100], &got[100..]), (&[7; 100][..], &[0; 8092][..]));
    }

    #[test]
    fn names_are_kept_apart_and_stale_handles_refused() {
        let mut disk = MemoryDisk::new();
        disk.create_dir_all(Path::new("d/e")).unwrap();
        let errno = |result: Result<File, IoError>| result.unwrap_err().errno;
        assert_eq!(errno(disk.open(Path::new("d/e/f"), OpenOptions::EXISTING)), libc::ENOENT);
        let file = disk.open(Path::new("d/e/f"), OpenOptions::NEW).unwrap();
        assert_eq!(errno(disk.open(Path::new("d/e/f"), OpenOptions::NEW)), libc::EEXIST);
        disk.rename(Path::new("d/e/f"), Path::new("d/e/g")).unwrap();
        assert_eq!(disk.list_dir(Path::new("d/e")).unwrap(), ["g"]);
        assert_eq!(disk.list_dir(Path::new("d")).unwrap(), ["e"]);
        assert!(disk.exists(Path::new("d")) && !disk.exists(Path::new("d/e/f")));
        disk.close_file(file);
        assert_eq!(disk.file_len(file).unwrap_err().errno, libc::EBADF);
        disk.remove_file(Path::new("d/e/g")).unwrap();
        assert_eq!(disk.remove_file(Path::new("d/e/g")).unwrap_err().errno, libc::ENOENT);
    }
}
