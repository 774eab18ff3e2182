//! A simulated disk: files in memory, with what a power cut may take kept apart.
//!
//! Reads see every completed write. For each 512-byte sector written since the last sync the
//! durable bytes are kept too; a crash puts any subset of them back. Names, lengths and
//! reservations are durable at once, as [`crate::Disk`] promises.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::api::{Create, IoError, OpenOptions};
use crate::ring::split_mix;
use crate::table::Table;

/// What a device writes whole or not at all.
const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;

type Sector = [u8; SECTOR_BYTES];
static ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

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
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
    len: u64,
    /// Durable bytes of sectors that differ, or may differ, from what reads see.
    durable: BTreeMap<u64, Sector>,
    /// Sectors that cannot be read.
    broken: BTreeSet<u64>,
    is_chunks: bool,
}

/// What a sync that has begun will make durable.
pub(super) struct SyncPoint {
    id: u64,
    sectors: Vec<(u64, Sector)>,
}

impl SimFile {
    fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let count = self.len.saturating_sub(offset).min(into.len() as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let (page, skip) = (at / PAGE_BYTES as u64, (at % PAGE_BYTES as u64) as usize);
            let piece = (PAGE_BYTES - skip).min(count - done);
            match self.pages.get(&page) {
                Some(bytes) => into[done..done + piece].copy_from_slice(&bytes[skip..skip + piece]),
                None => into[done..done + piece].fill(0),
            }
            done += piece;
        }
        count
    }

    fn sector(&self, sector: u64) -> Sector {
        let at = sector * SECTOR_BYTES as u64;
        let skip = (at % PAGE_BYTES as u64) as usize;
        let page = self.pages.get(&(at / PAGE_BYTES as u64));
        page.map_or([0; SECTOR_BYTES], |page| {
            page[skip..skip + SECTOR_BYTES].try_into().expect("a sector lies within a page")
        })
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (page, skip) = (at / PAGE_BYTES as u64, (at % PAGE_BYTES as u64) as usize);
            let piece = (PAGE_BYTES - skip).min(bytes.len() - done);
            let from = &bytes[done..done + piece];
            // Zeroes over nothing are nothing: preformatting costs no memory.
            if self.pages.contains_key(&page) || from != &ZEROES[..piece] {
                let page = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES]));
                page[skip..skip + piece].copy_from_slice(from);
            }
            done += piece;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn sectors_of(offset: u64, len: usize) -> std::ops::Range<u64> {
        let size = SECTOR_BYTES as u64;
        offset / size..(offset + len as u64).div_ceil(size)
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durably: bool) {
        let sectors = Self::sectors_of(offset, bytes.len());
        if !self.broken.is_empty() {
            self.broken.retain(|sector| !sectors.contains(sector));
        }
        if !durably {
            let unchanged = |sector: u64, before: &Sector| {
                let from = (sector * SECTOR_BYTES as u64).max(offset);
                let to = ((sector + 1) * SECTOR_BYTES as u64).min(offset + bytes.len() as u64);
                let skip = (from % SECTOR_BYTES as u64) as usize;
                before[skip..skip + (to - from) as usize]
                    == bytes[(from - offset) as usize..(to - offset) as usize]
            };
            for sector in sectors.clone() {
                let before = self.sector(sector);
                if !unchanged(sector, &before) {
                    self.durable.entry(sector).or_insert(before);
                }
            }
        }
        self.put(offset, bytes);
        if durably {
            sectors.for_each(|sector| _ = self.durable.remove(&sector));
        }
    }

    /// A power cut: each sector that was not synced keeps its new or gets back its durable bytes.
    fn tear(&mut self, random: &mut u64) {
        for (sector, bytes) in std::mem::take(&mut self.durable) {
            if split_mix(random).is_multiple_of(2) {
                let len = self.len;
                self.put(sector * SECTOR_BYTES as u64, &bytes);
                self.len = len;
            }
        }
    }
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
        let file = &self.files[&id];
        Ok(SyncPoint { id, sectors: file.durable.keys().map(|at| (*at, file.sector(*at))).collect() })
    }

    pub(super) fn end_sync(&mut self, point: SyncPoint) {
        let Some(file) = self.files.get_mut(&point.id) else { return };
        for (sector, bytes) in point.sectors {
            if file.sector(sector) == bytes {
                file.durable.remove(&sector);
            } else if let Some(durable) = file.durable.get_mut(&sector) {
                *durable = bytes;
            }
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
            file.pages.retain(|page, _| page * (PAGE_BYTES as u64) < bytes);
            file.durable.retain(|sector, _| (sector + 1) * (SECTOR_BYTES as u64) <= bytes);
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
                file.durable.remove(&sector);
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
        let count = file.pages.len() as u64;
        let page = file.pages.keys().nth(random.checked_rem(count)? as usize)?;
        Some((page * PAGE_BYTES as u64) * 8 + (random >> 32) % (PAGE_BYTES as u64 * 8))
    }

    /// Inverts one bit at rest, in what is read and what is durable.
    pub(super) fn flip(&mut self, path: &Path, bit: u64) -> Result<(), IoError> {
        let missing = IoError::new("flip a bit in", libc::ENOENT).at(path.display());
        let id = *self.names.get(path).ok_or(missing)?;
        let file = self.files.get_mut(&id).expect("a named file has its bytes");
        let mut byte = [0];
        file.read(bit / 8, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        let durable = file.durable.get_mut(&(bit / 8 / SECTOR_BYTES as u64));
        if let Some(sector) = durable {
            sector[(bit / 8) as usize % SECTOR_BYTES] ^= 1 << (bit % 8);
        }
        file.put(bit / 8, &byte);
        Ok(())
    }
}
