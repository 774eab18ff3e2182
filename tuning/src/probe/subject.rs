//! What is measured: a file of our own in a folder, or a device.

use anyhow::{Context, ensure};
use nix::libc;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file or device that may be measured. The file is removed when this is dropped.
#[derive(Debug)]
pub struct Subject {
    path: PathBuf,
    bytes: u64,
    may_write: bool,
    /// Ours, in a folder.
    file: Option<NamedTempFile>,
}

impl Subject {
    /// Makes the file, or checks that the device is not in use.
    ///
    /// # Errors
    /// No room, no permission, a device in use, or neither folder nor device.
    pub fn open(at: &Path, bytes: u64, destroy: bool) -> anyhow::Result<Self> {
        let meta = std::fs::metadata(at).with_context(|| format!("cannot look at {}", at.display()))?;
        if meta.is_dir() {
            return Self::in_folder(at, bytes);
        }
        let is_device = meta.file_type().is_block_device();
        ensure!(is_device, "{} is neither a folder nor a block device", at.display());
        Self::device(at, bytes, destroy)
    }

    fn in_folder(at: &Path, bytes: u64) -> anyhow::Result<Self> {
        let room = nix::sys::statvfs::statvfs(at)?;
        let free = room.blocks_available() * room.fragment_size();
        ensure!(
            free / 2 >= bytes,
            "{} has {} MiB free; --size may take half of that at most",
            at.display(),
            free >> 20
        );
        let file = tempfile::Builder::new().prefix(".ashlar-probe-").tempfile_in(at);
        let file = file.with_context(|| format!("cannot make a file in {}", at.display()))?;
        Ok(Self { path: file.path().into(), bytes, may_write: true, file: Some(file) })
    }

    fn device(at: &Path, bytes: u64, destroy: bool) -> anyhow::Result<Self> {
        if destroy {
            // An exclusive open fails while the device is mounted or part of anything.
            let exclusive = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(at);
            exclusive.with_context(|| format!("{} is in use or may not be written", at.display()))?;
        }
        let mut device = std::fs::File::open(at).with_context(|| format!("cannot open {}", at.display()))?;
        let length = std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0))?;
        let bytes = length.min(bytes);
        ensure!(bytes >= 16 << 20, "{} has only {length} bytes", at.display());
        Ok(Self { path: at.into(), bytes, may_write: destroy, file: None })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes from its start that are measured.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it may be written.
    pub fn may_write(&self) -> bool {
        self.may_write
    }

    /// Whether it is a device.
    pub fn is_device(&self) -> bool {
        self.file.is_none()
    }
}
