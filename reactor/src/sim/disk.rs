//! A simulated disk: files in memory, with what a power cut may take kept apart.
//!
//! Reads see every completed write. For each 512-byte sector written since the last sync the
//! durable bytes are kept too, beside those of the page they belong to; a crash puts any subset of
//! them back. Names, lengths and reservations are durable at once, as [`crate::Disk`] promises.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::api::{Create, IoError, OpenOptions};
use crate::ring::split_mix;
use crate::table::Table;

/// What a device writes whole or not at all.
const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;

const PAGE_SECTORS: u64 = (PAGE_BYTES / SECTOR_BYTES) as u64;

type Page = [u8; PAGE_BYTES];
const ZEROES: Page = [0; PAGE_BYTES];

#[derive(Default)]
pub(super) struct SimDisk {
    names: BTreeMap<PathBuf, u64>,
    dirs: BTreeSet<PathBuf>,
    files: BTreeMap<u64, SimFile>,
    next_id: u64,
    handles: Table<Handle>,
    /// Wrong answers given.
    pub(super) lies: u64,
}

#[derive(Clone, Copy)]
struct Handle {
    id: u64,
    direct: bool,
}

#[derive(Default)]
struct SimFile {
    /// What reads see; absent pages are zero.
    pages: Vec<Option<Box<Page>>>,
    len: u64,
    /// By page: durable bytes of sectors that differ, or may differ, from what reads see.
    durable: BTreeMap<u64, Sectors>,
    /// Sectors that cannot be read.
    broken: BTreeSet<u64>,
    /// Bits that are inverted at rest.
    rotten: BTreeSet<u64>,
    is_chunks: bool,
}

/// Some sectors of a page.
struct Sectors {
    /// Bit i set: sector i is here.
    which: u8,
    bytes: Box<Page>,
}

/// What a sync that has begun will make durable.
pub(super) struct SyncPoint {
    id: u64,
    pages: Vec<(u64, Sectors)>,
}

/// The bytes of a sector within its page.
fn within(sector: u64) -> Range<usize> {
    let at = (sector % PAGE_SECTORS) as usize * SECTOR_BYTES;
    at..at + SECTOR_BYTES
}

impl SimFile {
    fn page(&self, page: u64) -> &Page {
        self.pages.get(page as usize).and_then(Option::as_deref).unwrap_or(&ZEROES)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let count = self.len.saturating_sub(offset).min(into.len() as u64) as usize;
        for (page, at, piece) in pieces(offset, count) {
            into[piece.clone()].copy_from_slice(&self.page(page)[at..at + piece.len()]);
        }
        count
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        for (page, at, piece) in pieces(offset, bytes.len()) {
            let from = &bytes[piece];
            if self.pages.len() <= page as usize {
                self.pages.resize_with(page as usize + 1, || None);
            }
            // Zeroes over nothing are nothing: preformatting costs no memory.
            match &mut self.pages[page as usize] {
                Some(page) => page[at..at + from.len()].copy_from_slice(from),
                None if from == &ZEROES[..from.len()] => {}
                empty => {
                    empty.insert(Box::new(ZEROES))[at..at + from.len()].copy_from_slice(from);
                }
            }
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn sectors_of(offset: u64, len: usize) -> Range<u64> {
        let size = SECTOR_BYTES as u64;
        offset / size..(offset + len as u64).div_ceil(size)
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durably: bool) {
        let sectors = Self::sectors_of(offset, bytes.len());
        if !self.broken.is_empty() {
            self.broken.retain(|sector| !sectors.contains(sector));
        }
        if !self.rotten.is_empty() {
            self.rotten.retain(|bit| !(offset..offset + bytes.len() as u64).contains(&(bit / 8)));
        }
        if durably {
            sectors.for_each(|sector| self.settle(sector));
        } else {
            sectors.for_each(|sector| self.keep(sector, offset, bytes));
        }
        self.put(offset, bytes);
    }

    /// Keeps what is durable of a sector, if the write of `bytes` at `offset` is to change it.
    fn keep(&mut self, sector: u64, offset: u64, bytes: &[u8]) {
        let (page, bit) = (sector / PAGE_SECTORS, 1 << (sector % PAGE_SECTORS));
        if self.durable.get(&page).is_some_and(|kept| kept.which & bit != 0) {
            return;
        }
        let start = sector * SECTOR_BYTES as u64;
        let (from, to) = (start.max(offset), (start + SECTOR_BYTES as u64).min(offset + bytes.len() as u64));
        let skip = (from % PAGE_BYTES as u64) as usize;
        let before = self.pages.get(page as usize).and_then(Option::as_deref).unwrap_or(&ZEROES);
        if before[skip..][..(to - from) as usize] != bytes[(from - offset) as usize..(to - offset) as usize] {
            let none = || Sectors { which: 0, bytes: Box::new(ZEROES) };
            let kept = self.durable.entry(page).or_insert_with(none);
            kept.which |= bit;
            kept.bytes[within(sector)].copy_from_slice(&before[within(sector)]);
        }
    }

    /// What reads see of a sector is durable now.
    fn settle(&mut self, sector: u64) {
        let page = sector / PAGE_SECTORS;
        if let Some(kept) = self.durable.get_mut(&page) {
            kept.which &= !(1 << (sector % PAGE_SECTORS));
            if kept.which == 0 {
                self.durable.remove(&page);
            }
        }
    }

    /// A power cut: each sector that was not synced keeps its new or gets back its durable bytes.
    fn tear(&mut self, random: &mut u64) {
        let len = self.len;
        for (page, kept) in std::mem::take(&mut self.durable) {
            for sector in sectors_in(page, kept.which) {
                if split_mix(random).is_multiple_of(2) {
                    self.put(sector * SECTOR_BYTES as u64, &kept.bytes[within(sector)]);
                }
            }
        }
        self.len = len;
    }

    fn begin_sync(&self) -> Vec<(u64, Sectors)> {
        let now = |(page, kept): (&u64, &Sectors)| {
            (*page, Sectors { which: kept.which, bytes: Box::new(*self.page(*page)) })
        };
        self.durable.iter().map(now).collect()
    }

    fn end_sync(&mut self, pages: Vec<(u64, Sectors)>) {
        for (page, synced) in pages {
            for sector in sectors_in(page, synced.which) {
                if self.page(page)[within(sector)] == synced.bytes[within(sector)] {
                    self.settle(sector);
                } else if let Some(kept) = self.durable.get_mut(&page)
                    && kept.which & (1 << (sector % PAGE_SECTORS)) != 0
                {
                    kept.bytes[within(sector)].copy_from_slice(&synced.bytes[within(sector)]);
                }
            }
        }
    }
}

/// The pages that `count` bytes at `offset` touch: number, offset within it, and which of the bytes.
fn pieces(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let size = PAGE_BYTES as u64;
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let skip = (at % size) as usize;
        let piece = done..done + (PAGE_BYTES - skip).min(count - done);
        done = piece.end;
        (!piece.is_empty()).then_some((at / size, skip, piece))
    })
}

fn sectors_in(page: u64, which: u8) -> impl Iterator<Item = u64> {
    (0..PAGE_SECTORS).filter(move |at| which & (1 << at) != 0).map(move |at| page * PAGE_SECTORS + at)
}

impl SimDisk {
    fn id(&self, what: &'static str, handle: (u32, u32)) -> Result<u64, IoError> {
        self.handles.get(handle.0, handle.1).map(|handle| handle.id).ok_or(IoError::new(what, libc::EBADF))
    }

    fn file(&mut self, what: &'static str, handle: (u32, u32)) -> Result<&mut SimFile, IoError> {
        let id = self.id(what, handle)?;
        Ok(self.files.get_mut(&id).expect("an open file has its bytes"))
    }

    pub(super) fn open(&mut self, path: &Path, options: OpenOptions) -> Result<(u32, u32), IoError> {
        let fail = |errno| Err(IoError::new("open", errno).at(path.display()));
        let id = match (self.names.get(path), options.create) {
            (Some(_), Create::New) => return fail(libc::EEXIST),
            (None, Create::No) => return fail(libc::ENOENT),
            (Some(id), _) => *id,
            (None, _) => {
                if path.parent().is_some_and(|dir| !self.is_dir(dir)) {
                    return fail(libc::ENOENT);
                }
                self.next_id += 1;
                self.names.insert(path.into(), self.next_id);
                let is_chunks = path.extension().is_some_and(|ends| ends == "chunks");
                self.files.insert(self.next_id, SimFile { is_chunks, ..SimFile::default() });
                self.next_id
            }
        };
        Ok(self.handles.insert(Handle { id, direct: options.direct }))
    }

    /// Whether the file was opened for direct IO, so that unaligned ops are refused.
    pub(super) fn is_direct(&self, handle: (u32, u32)) -> bool {
        self.handles.get(handle.0, handle.1).is_some_and(|handle| handle.direct)
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.as_os_str().is_empty() || path == Path::new("/") || self.dirs.contains(path)
    }

    pub(super) fn close(&mut self, handle: (u32, u32)) {
        self.handles.remove(handle.0, handle.1);
    }

    pub(super) fn len(&mut self, handle: (u32, u32)) -> Result<u64, IoError> {
        Ok(self.file("stat", handle)?.len)
    }

    pub(super) fn read(
        &mut self,
        handle: (u32, u32),
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, IoError> {
        let file = self.file("read", handle)?;
        if !file.broken.is_empty()
            && file.broken.range(SimFile::sectors_of(offset, into.len())).next().is_some()
        {
            self.lies += 1;
            return Err(IoError::new("read", libc::EIO));
        }
        Ok(file.read(offset, into))
    }

    /// Where the pages lie that rotted, of those read.
    pub(super) fn rotten(&self, handle: (u32, u32), offset: u64, bytes: u32) -> Vec<u64> {
        let Some(file) = self.id("look", handle).ok().and_then(|id| self.files.get(&id)) else {
            return Vec::new();
        };
        let (page, bits) = (PAGE_BYTES as u64, offset * 8..(offset + u64::from(bytes)) * 8);
        file.rotten.range(bits).map(|bit| bit / 8 / page * page).collect()
    }

    /// Whether the file holds chunks.
    pub(super) fn is_chunks(&self, handle: (u32, u32)) -> bool {
        self.id("look", handle).is_ok_and(|id| self.files[&id].is_chunks)
    }

    /// Makes a sector unreadable.
    pub(super) fn break_sector(&mut self, path: &Path, bit: u64) -> Result<(), IoError> {
        let missing = IoError::new("break", libc::ENOENT).at(path.display());
        let id = *self.names.get(path).ok_or(missing)?;
        let file = self.files.get_mut(&id).expect("a named file has its bytes");
        file.broken.insert(bit / 8 / SECTOR_BYTES as u64);
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        handle: (u32, u32),
        offset: u64,
        from: &[u8],
        durably: bool,
    ) -> Result<(), IoError> {
        self.file("write", handle)?.write(offset, from, durably);
        Ok(())
    }

    /// Notes what is written by now; [`SimDisk::end_sync`] makes that durable.
    pub(super) fn begin_sync(&mut self, handle: (u32, u32)) -> Result<SyncPoint, IoError> {
        let id = self.id("sync", handle)?;
        Ok(SyncPoint { id, pages: self.files[&id].begin_sync() })
    }

    pub(super) fn end_sync(&mut self, point: SyncPoint) {
        if let Some(file) = self.files.get_mut(&point.id) {
            file.end_sync(point.pages);
        }
    }

    pub(super) fn allocate(&mut self, handle: (u32, u32), end: u64) -> Result<(), IoError> {
        let file = self.file("allocate", handle)?;
        file.len = file.len.max(end);
        Ok(())
    }

    pub(super) fn truncate(&mut self, handle: (u32, u32), bytes: u64) -> Result<(), IoError> {
        let file = self.file("truncate", handle)?;
        if bytes < file.len {
            let zeroes = vec![0; (bytes.next_multiple_of(PAGE_BYTES as u64) - bytes) as usize];
            file.put(bytes, &zeroes);
            file.pages.truncate(bytes.div_ceil(PAGE_BYTES as u64) as usize);
            for sector in bytes / SECTOR_BYTES as u64..file.len.div_ceil(SECTOR_BYTES as u64) {
                file.settle(sector);
            }
        }
        file.len = bytes;
        Ok(())
    }

    pub(super) fn create_dir_all(&mut self, path: &Path) {
        self.dirs.extend(path.ancestors().map(Path::to_path_buf));
    }

    pub(super) fn list(&self, path: &Path) -> Result<Vec<String>, IoError> {
        if !self.is_dir(path) {
            return Err(IoError::new("list", libc::ENOENT).at(path.display()));
        }
        let inside = |child: &&PathBuf| child.parent() == Some(path);
        let name = |child: &PathBuf| child.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut names: Vec<_> = self.names.keys().chain(&self.dirs).filter(inside).filter_map(name).collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError> {
        let id = self.names.remove(from).ok_or(IoError::new("rename", libc::ENOENT).at(from.display()))?;
        self.names.insert(to.into(), id);
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> Result<(), IoError> {
        let gone = self.names.remove(path);
        gone.map(drop).ok_or(IoError::new("remove", libc::ENOENT).at(path.display()))
    }

    pub(super) fn exists(&self, path: &Path) -> bool {
        self.names.contains_key(path) || self.is_dir(path)
    }

    /// A write that was under way when the power went: any of its sectors may have been written.
    pub(super) fn tear_write(&mut self, handle: (u32, u32), offset: u64, from: &[u8], random: &mut u64) {
        let Ok(file) = self.file("write", handle) else { return };
        for sector in SimFile::sectors_of(offset, from.len()) {
            if split_mix(random).is_multiple_of(2) {
                let start = (sector * SECTOR_BYTES as u64).max(offset);
                let end = ((sector + 1) * SECTOR_BYTES as u64).min(offset + from.len() as u64);
                file.put(start, &from[(start - offset) as usize..(end - offset) as usize]);
                file.settle(sector);
            }
        }
    }

    /// A power cut: tears what was not synced and forgets all handles.
    pub(super) fn crash(&mut self, random: &mut u64) {
        self.files.values_mut().for_each(|file| file.tear(random));
        self.handles = Table::new();
    }

    /// The place of some bit in a page that holds something.
    pub(super) fn some_bit(&self, path: &Path, random: u64) -> Option<u64> {
        let file = self.files.get(self.names.get(path)?)?;
        let used = || file.pages.iter().enumerate().filter(|(_, page)| page.is_some());
        let (page, _) = used().nth(random.checked_rem(used().count() as u64)? as usize)?;
        Some((page as u64 * PAGE_BYTES as u64) * 8 + (random >> 32) % (PAGE_BYTES as u64 * 8))
    }

    /// Inverts one bit at rest, in what is read and what is durable.
    pub(super) fn flip(&mut self, path: &Path, bit: u64) -> Result<(), IoError> {
        let missing = IoError::new("flip a bit in", libc::ENOENT).at(path.display());
        let id = *self.names.get(path).ok_or(missing)?;
        let file = self.files.get_mut(&id).expect("a named file has its bytes");
        let mut byte = [0];
        file.read(bit / 8, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        // Where the sector is not kept, this changes bytes that nobody looks at.
        if let Some(kept) = file.durable.get_mut(&(bit / 8 / PAGE_BYTES as u64)) {
            kept.bytes[(bit / 8) as usize % PAGE_BYTES] ^= 1 << (bit % 8);
        }
        file.put(bit / 8, &byte);
        if !file.rotten.insert(bit) {
            file.rotten.remove(&bit);
        }
        Ok(())
    }
}
