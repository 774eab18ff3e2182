//! Where a shard's files lie, and blocking access to them for format, recovery and inspection.
//!
//! ```text
//! DIR/shard-0/superblock
//!             checkpoint-a  checkpoint-b
//!             log/00000.log ...
//!             chunks/00000.chunks ...
//! ```

use chunkstore::{FileId, IoError, Media, Side};
use protocol::types::BLOCK_BYTES;
use reactor::{Create, Disk, File, OpenOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files of one shard, opened when first needed and kept open.
pub struct Files {
    dir: PathBuf,
    open: BTreeMap<FileId, File>,
    read_only: bool,
}

impl Files {
    /// The files below `dir`, to be read and written.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: BTreeMap::new(), read_only: false }
    }
    /// The same, only to be looked at.
    pub fn read_only(dir: &Path) -> Self {
        Self { read_only: true, ..Self::new(dir) }
    }
    /// The path of a file.
    pub fn path(&self, file: FileId) -> PathBuf {
        match file {
            FileId::Superblock => self.dir.join("superblock"),
            FileId::Checkpoint(Side::A) => self.dir.join("checkpoint-a"),
            FileId::Checkpoint(Side::B) => self.dir.join("checkpoint-b"),
            FileId::Log(n) => self.dir.join(format!("log/{n:05}.log")),
            FileId::Chunks(n) => self.dir.join(format!("chunks/{n:05}.chunks")),
        }
    }
    /// The open file; it must exist.
    pub fn get<D: Disk>(&mut self, disk: &mut D, file: FileId) -> Result<File, reactor::IoError> {
        self.open_with(disk, file, Create::No)
    }
    /// The open file, made if it does not exist.
    pub fn make<D: Disk>(&mut self, disk: &mut D, file: FileId) -> Result<File, reactor::IoError> {
        disk.create_dir_all(&self.dir.join("log"))?;
        disk.create_dir_all(&self.dir.join("chunks"))?;
        self.open_with(disk, file, Create::IfMissing)
    }
    fn open_with<D: Disk>(
        &mut self,
        disk: &mut D,
        file: FileId,
        create: Create,
    ) -> Result<File, reactor::IoError> {
        if let Some(open) = self.open.get(&file) {
            return Ok(*open);
        }
        let options = OpenOptions { create, direct: true, read_only: self.read_only };
        let open = disk.open(&self.path(file), options)?;
        self.open.insert(file, open);
        Ok(open)
    }
}

/// A shard's files as [`Media`], for as long as nothing else runs on them.
pub struct FileMedia<'a, D> {
    /// The files.
    pub files: &'a mut Files,
    /// The disk they are on.
    pub disk: &'a mut D,
}

fn errno(error: reactor::IoError) -> IoError {
    IoError { errno: error.errno }
}

impl<D: Disk> Media for FileMedia<'_, D> {
    fn read(&mut self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let open = self.files.get(self.disk, file).map_err(errno)?;
        let got = self.disk.read_blocking(open, offset, buf).map_err(errno)?;
        buf[got..].fill(0);
        Ok(())
    }
    fn write(&mut self, file: FileId, offset: u64, data: &[u8]) -> Result<(), IoError> {
        assert!(data.len().is_multiple_of(BLOCK_BYTES), "the store writes whole blocks");
        let open = self.files.get(self.disk, file).map_err(errno)?;
        self.disk.write_blocking(open, offset, data).map_err(errno)
    }
    fn sync(&mut self, file: FileId) -> Result<(), IoError> {
        let open = self.files.get(self.disk, file).map_err(errno)?;
        self.disk.sync_blocking(open).map_err(errno)
    }
    fn len(&mut self, file: FileId) -> Result<Option<u64>, IoError> {
        let path = self.files.path(file);
        if !self.disk.exists(&path) {
            return Ok(None);
        }
        let open = self.files.get(self.disk, file).map_err(errno)?;
        self.disk.file_len(open).map(Some).map_err(errno)
    }
    fn create(&mut self, file: FileId, bytes: u64) -> Result<(), IoError> {
        let open = self.files.make(self.disk, file).map_err(errno)?;
        self.disk.allocate_blocking(open, 0, bytes).map_err(errno)?;
        self.disk.sync_blocking(open).map_err(errno)
    }
}
