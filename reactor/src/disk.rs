//! Blocking access to the host's files: start-up, recovery, tools. The ring embeds a
//! [`HostDisk`] for its file table; tools use one alone.
//!
//! Invariants: a created name, a rename or a removal is durable (its directory synced) when
//! the call returns; direct files are only ever read and written in whole aligned blocks,
//! through a bounce buffer.
//!
//! Deliberately absent: anything for the IO path.

use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::api::{Create, Disk, File, IoError, OpenOptions};
use crate::arena::{Arena, BLOCK_BYTES, BufMut, RUN_BLOCKS_MAX, SLAB_BYTES};
use crate::table::Table;

/// The host's files, behind small handles.
pub struct HostDisk {
    files: Table<OpenFile>,
    /// One run of 128 KiB that direct IO passes through.
    bounce: BufMut,
}

struct OpenFile {
    file: fs::File,
    direct: bool,
    place: Box<str>,
}

impl HostDisk {
    /// Without open files. Fails when 128 KiB of memory cannot be mapped.
    pub fn new() -> Result<Self, IoError> {
        let arena = Arena::new(SLAB_BYTES)?;
        let bounce = arena.alloc(RUN_BLOCKS_MAX).expect("a new arena of one slab holds one run");
        Ok(Self { files: Table::new(), bounce })
    }

    /// The descriptor behind a handle.
    pub(crate) fn raw_fd(&self, file: File) -> Option<RawFd> {
        self.files.get(file.index, file.generation).map(|open| open.file.as_raw_fd())
    }

    /// Whether the file really is open past the page cache.
    pub fn is_direct(&self, file: File) -> bool {
        self.files.get(file.index, file.generation).is_some_and(|open| open.direct)
    }

    fn entry(&self, what: &'static str, file: File) -> Result<&OpenFile, IoError> {
        self.files.get(file.index, file.generation).ok_or(IoError::new(what, libc::EBADF))
    }
}

fn failed<'a>(what: &'static str, place: &'a str) -> impl Fn(std::io::Error) -> IoError + 'a {
    move |error| IoError::from_io(what, &error).at(place)
}

fn open_with(path: &Path, options: OpenOptions, direct: bool) -> std::io::Result<fs::File> {
    let mut how = fs::OpenOptions::new();
    how.read(true).write(!options.read_only);
    match options.create {
        Create::No => {}
        Create::IfMissing => drop(how.create(true)),
        Create::New => drop(how.create_new(true)),
    }
    how.mode(0o600).custom_flags(if direct { libc::O_DIRECT } else { 0 });
    how.open(path)
}

fn sync_dir_of(path: &Path) -> Result<(), IoError> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let place = dir.display().to_string();
    fs::File::open(dir).and_then(|d| d.sync_all()).map_err(failed("sync directory", &place))
}

impl Disk for HostDisk {
    fn open(&mut self, path: &Path, options: OpenOptions) -> Result<File, IoError> {
        let place = path.display().to_string();
        let is_new = options.create != Create::No && !path.exists();
        let mut direct = options.direct;
        let mut opened = open_with(path, options, direct);
        if direct && opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
            tracing::warn!(path = %place, "the file system refuses O_DIRECT; going through the page cache");
            direct = false;
            // A refused O_DIRECT open may have created the name already.
            let create = if is_new { Create::IfMissing } else { options.create };
            opened = open_with(path, OpenOptions { create, ..options }, false);
        }
        let file = opened.map_err(failed("open", &place))?;
        if is_new {
            sync_dir_of(path)?;
        }
        let (index, generation) = self.files.insert(OpenFile { file, direct, place: place.into() });
        Ok(File { index, generation })
    }

    fn close_file(&mut self, file: File) {
        self.files.remove(file.index, file.generation);
    }

    fn file_len(&mut self, file: File) -> Result<u64, IoError> {
        use std::io::{Seek, SeekFrom};
        let open = self.entry("stat", file)?;
        let meta = open.file.metadata().map_err(failed("stat", &open.place))?;
        if meta.file_type().is_block_device() {
            return (&open.file).seek(SeekFrom::End(0)).map_err(failed("measure", &open.place));
        }
        Ok(meta.len())
    }

    fn read_blocking(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError> {
        let open = self.files.get(file.index, file.generation).ok_or(IoError::new("read", libc::EBADF))?;
        if !open.direct {
            return read_full(&open.file, offset, into).map_err(failed("read", &open.place));
        }
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let skip = (at % BLOCK_BYTES as u64) as usize;
            let want = (into.len() - done + skip).next_multiple_of(BLOCK_BYTES).min(self.bounce.len());
            let got = read_full(&open.file, at - skip as u64, &mut self.bounce[..want])
                .map_err(failed("read", &open.place))?;
            let count = got.saturating_sub(skip).min(into.len() - done);
            into[done..done + count].copy_from_slice(&self.bounce[skip..skip + count]);
            done += count;
            if got < want {
                break;
            }
        }
        Ok(done)
    }

    fn write_blocking(&mut self, file: File, offset: u64, from: &[u8]) -> Result<(), IoError> {
        let open = self.files.get(file.index, file.generation).ok_or(IoError::new("write", libc::EBADF))?;
        if !open.direct {
            return open.file.write_all_at(from, offset).map_err(failed("write", &open.place));
        }
        if !offset.is_multiple_of(BLOCK_BYTES as u64) || !from.len().is_multiple_of(BLOCK_BYTES) {
            return Err(IoError::new("write unaligned to", libc::EINVAL).at(&open.place));
        }
        for (i, piece) in from.chunks(self.bounce.len()).enumerate() {
            self.bounce[..piece.len()].copy_from_slice(piece);
            open.file
                .write_all_at(&self.bounce[..piece.len()], offset + (i * SLAB_BYTES) as u64)
                .map_err(failed("write", &open.place))?;
        }
        Ok(())
    }

    fn sync_blocking(&mut self, file: File) -> Result<(), IoError> {
        let open = self.entry("sync", file)?;
        open.file.sync_data().map_err(failed("sync", &open.place))
    }

    fn allocate_blocking(&mut self, file: File, offset: u64, bytes: u64) -> Result<(), IoError> {
        let open = self.entry("allocate", file)?;
        nix::fcntl::fallocate(
            &open.file,
            nix::fcntl::FallocateFlags::empty(),
            offset as libc::off_t,
            bytes as libc::off_t,
        )
        .map_err(|errno| IoError::new("allocate", errno as i32).at(&open.place))
    }

    fn truncate(&mut self, file: File, bytes: u64) -> Result<(), IoError> {
        let open = self.entry("truncate", file)?;
        open.file.set_len(bytes).map_err(failed("truncate", &open.place))
    }

    fn create_dir_all(&mut self, path: &Path) -> Result<(), IoError> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
        {
            self.create_dir_all(parent)?;
        }
        match fs::create_dir(path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(IoError::from_io("make directory", &e).at(path.display()))
            }
            _ => sync_dir_of(path),
        }
    }

    fn list_dir(&mut self, path: &Path) -> Result<Vec<String>, IoError> {
        let place = path.display().to_string();
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(failed("list", &place))? {
            let name = entry.map_err(failed("list", &place))?.file_name();
            names.push(name.to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError> {
        let place = from.display().to_string();
        fs::rename(from, to).map_err(failed("rename", &place))?;
        sync_dir_of(to)
    }

    fn remove_file(&mut self, path: &Path) -> Result<(), IoError> {
        let place = path.display().to_string();
        fs::remove_file(path).map_err(failed("remove", &place))?;
        sync_dir_of(path)
    }

    fn exists(&mut self, path: &Path) -> bool {
        path.exists()
    }
}

fn read_full(file: &fs::File, offset: u64, into: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Whether the disk beneath `path` has queues for polled completions (`queue/io_poll`); `None`
/// when it cannot be told (no block device behind it). Reported at start, never required.
pub fn has_iopoll(path: &Path) -> Option<bool> {
    let meta = fs::metadata(path).ok()?;
    let device = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    let base = format!("/sys/dev/block/{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    // A partition has no queue of its own; its disk's is one level up.
    ["queue/io_poll", "../queue/io_poll"]
        .iter()
        .find_map(|name| fs::read_to_string(Path::new(&base).join(name)).ok())
        .map(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_and_buffered_files_read_alike_at_any_alignment() {
        let dir = tempfile::tempdir().unwrap();
        for direct in [false, true] {
            let mut disk = HostDisk::new().unwrap();
            let options = OpenOptions { direct, ..OpenOptions::NEW };
            let file = disk.open(&dir.path().join(format!("f{direct}")), options).unwrap();
            let bytes: Vec<u8> = (0..300 << 10).map(|i| (i % 251) as u8).collect();
            disk.write_blocking(file, 8192, &bytes).unwrap();
            disk.sync_blocking(file).unwrap();
            assert_eq!(disk.file_len(file).unwrap(), 8192 + (300 << 10));
            for (offset, len) in [(0, 100), (8191, 2), (8192, 300 << 10), (9001, 200_003)] {
                let mut got = vec![0xaa; len];
                assert_eq!(disk.read_blocking(file, offset, &mut got).unwrap(), len);
                for (i, byte) in got.iter().enumerate() {
                    let at = offset as usize + i;
                    let want = if at < 8192 { 0 } else { ((at - 8192) % 251) as u8 };
                    assert_eq!(*byte, want, "direct {direct}, byte {at}");
                }
            }
            let mut tail = [0; 10_000];
            assert_eq!(disk.read_blocking(file, 8192 + (300 << 10) - 5, &mut tail).unwrap(), 5);
        }
    }

    #[test]
    fn a_stale_file_handle_is_refused_though_its_slot_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = HostDisk::new().unwrap();
        let old = disk.open(&dir.path().join("a"), OpenOptions::NEW).unwrap();
        disk.close_file(old);
        let new = disk.open(&dir.path().join("b"), OpenOptions::NEW).unwrap();
        assert_eq!(old.index, new.index);
        assert_eq!(disk.file_len(old).unwrap_err().errno, libc::EBADF);
        assert_eq!(disk.open(&dir.path().join("b"), OpenOptions::NEW).unwrap_err().errno, libc::EEXIST);
        assert_eq!(disk.file_len(new).unwrap(), 0);
    }

    #[test]
    fn errors_name_the_path() {
        let error = HostDisk::new().unwrap().open(Path::new("/nonexistent/x"), OpenOptions::EXISTING);
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("open /nonexistent/x: No such file"), "{text}");
    }
}
