//! What is registered with the kernel, so that it need not be looked up and pinned for each read and write of a file:
//! the arena and the open files.
//!
//! Refused (the arena, where the memlock limit is low), all works as before, for more processor time. Sockets are not
//! registered: their bytes are copied, and one send carries many answers.

use std::os::fd::RawFd;

use io_uring::{IoUring, Probe, opcode};

use crate::arena::Arena;

/// Longest registered buffer the kernel takes: 1 GiB. A run never lies across two, being part of a slab.
const RANGE_BYTES: usize = 1 << 30;

/// What the kernel has pinned; nothing by default.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Registered {
    base: usize,
    pub(super) bytes: usize,
    /// The kernel takes lists of registered pieces (since Linux 6.15).
    lists: bool,
}

impl Registered {
    /// Registers the arena, or says why not.
    pub fn new(ring: &IoUring, arena: &Arena) -> Self {
        let (base, bytes) = arena.mapping();
        let ranges: Vec<libc::iovec> = (0..bytes)
            .step_by(RANGE_BYTES)
            .map(|at| libc::iovec {
                iov_base: base.wrapping_add(at).cast(),
                iov_len: RANGE_BYTES.min(bytes - at),
            })
            .collect();
        // SAFETY: the ranges are the arena's mapping, which outlives the ring: the ring's owner holds
        // a handle to the arena and drops the ring first.
        if let Err(error) = unsafe { ring.submitter().register_buffers(&ranges) } {
            tracing::info!(
                %error, bytes,
                "arena not registered with the kernel: needs CAP_IPC_LOCK or a larger memlock limit (ulimit -l)"
            );
            return Self::default();
        }
        let mut probe = Probe::new();
        let lists = ring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::WritevFixed::CODE);
        Self { base: base.addr(), bytes, lists }
    }

    /// The registered buffer in which this memory lies.
    pub fn buffer_of(&self, memory: *const u8) -> Option<u16> {
        let at = memory.addr().wrapping_sub(self.base);
        (at < self.bytes).then_some((at / RANGE_BYTES) as u16)
    }

    /// The registered buffer in which all of these pieces lie, where the kernel takes lists.
    pub fn buffer_of_list(&self, pieces: &[libc::iovec]) -> Option<u16> {
        let (first, rest) = pieces.split_first().filter(|_| self.lists)?;
        let buffer = self.buffer_of(first.iov_base.cast())?;
        rest.iter().all(|piece| self.buffer_of(piece.iov_base.cast()) == Some(buffer)).then_some(buffer)
    }
}

/// Most files that are registered, by their place in the file table; further ones work by their descriptors.
const FILES_MAX: u32 = 1024;

/// The kernel's table of open files; without places by default.
#[derive(Debug, Default)]
pub(super) struct RegisteredFiles {
    pub(super) places: u32,
}

impl RegisteredFiles {
    /// An empty table, or none where the kernel refuses (it counts against the limit of open files).
    pub fn new(ring: &IoUring) -> Self {
        let made = ring.submitter().register_files_sparse(FILES_MAX);
        if let Err(error) = &made {
            tracing::debug!(%error, "open files are not registered with the kernel");
        }
        Self { places: if made.is_ok() { FILES_MAX } else { 0 } }
    }

    /// Whether ops name the file of this place by it.
    pub fn has(&self, place: u32) -> bool {
        place < self.places
    }

    /// Puts an open file in its place. A kernel that refuses is not asked again.
    pub fn put(&mut self, ring: &IoUring, place: u32, fd: RawFd) {
        if self.has(place)
            && let Err(error) = ring.submitter().register_files_update(place, &[fd])
        {
            tracing::warn!(%error, "files opened from now on are not registered with the kernel");
            self.places = place;
        }
    }

    /// Empties a place, before its file is closed.
    pub fn remove(&mut self, ring: &IoUring, place: u32) {
        self.put(ring, place, -1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(memory: *const u8) -> libc::iovec {
        libc::iovec { iov_base: memory.cast_mut().cast(), iov_len: 1 }
    }

    #[test]
    fn memory_is_found_in_its_buffer_and_a_list_only_where_one_buffer_has_all_of_it() {
        let range = RANGE_BYTES;
        let registered = Registered { base: 4096, bytes: range + 4096, lists: true };
        let at = |at: usize| std::ptr::without_provenance::<u8>(at);
        let found = |memory: usize| registered.buffer_of(at(memory));
        assert_eq!([4095, 4096, 4095 + range, 4096 + range].map(found), [None, Some(0), Some(0), Some(1)]);
        assert_eq!([8191 + range, 8192 + range, 0].map(found), [Some(1), None, None]);

        let list = |places: &[usize]| {
            let pieces: Vec<_> = places.iter().map(|place| piece(at(*place))).collect();
            registered.buffer_of_list(&pieces)
        };
        assert_eq!(list(&[4096, 8192]), Some(0));
        assert_eq!(list(&[4096, 4096 + range]), None, "two buffers");
        assert_eq!(list(&[4096, 100]), None, "not all of it is registered");
        let older = Registered { lists: false, ..registered };
        assert_eq!(older.buffer_of_list(&[piece(at(4096))]), None, "a kernel without lists");
        assert_eq!(Registered::default().buffer_of(at(0)), None, "nothing is registered");
    }
}
