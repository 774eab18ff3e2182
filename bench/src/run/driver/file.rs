//! A file or device by io_uring and O_DIRECT: what everything else is compared with.

use super::{Done, Driver};
use crate::run::load::Io;
use anyhow::{Context, ensure};
use protocol::types::Time;
use reactor::ring::Ring;
use reactor::{Buf, BufMut, Completion, Disk, File, IoBuf, Op, OpenOptions, Reactor};
use std::path::Path;

/// A file past the page cache.
pub struct FileDriver {
    file: File,
    bytes: u64,
    dsync: bool,
    completions: Vec<Completion>,
}

impl FileDriver {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or its file system refuses direct IO.
    pub fn open(ring: &mut Ring, path: &Path, dsync: bool, read_only: bool) -> anyhow::Result<Self> {
        let file = ring.open(path, OpenOptions { read_only, ..OpenOptions::EXISTING })?;
        ensure!(ring.disk().is_direct(file), "the file system refuses direct IO, as tmpfs does");
        let bytes = ring.file_len(file)?;
        Ok(Self { file, bytes, dsync, completions: Vec::new() })
    }
}

impl Driver for FileDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, ring: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let (file, offset, bytes) = (self.file, io.offset, io.bytes as usize);
        let op = if io.write {
            let bufs = std::iter::once(IoBuf::part(buf.freeze(), 0..bytes)).collect();
            Op::WriteAt { file, offset, bufs, dsync: self.dsync }
        } else {
            Op::ReadAt { file, offset, buf, bytes: bytes as u32 }
        };
        ring.submit(slot.into(), op);
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        ring.turn(deadline, &mut self.completions);
        for completion in self.completions.drain(..) {
            let Completion { token, result, buf, bufs } = completion;
            let buf = buf.or_else(|| unique(bufs.into_iter().next()?)).context("a buffer was lost")?;
            let result = result.map(|_| ()).map_err(|error| error.to_string());
            done.push(Done { slot: token as u32, result, buf });
        }
        Ok(())
    }
}

fn unique(buf: IoBuf) -> Option<BufMut> {
    match buf {
        IoBuf::Shared { buf, .. } => Buf::try_unique(buf).ok(),
        _ => None,
    }
}
