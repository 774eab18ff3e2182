//! Ops on their way through the kernel: taking them in, submission entries, completions.
//!
//! Invariants: a slot is owned by exactly one of the free list, the queue, a socket's list of
//! waiting sends, or the kernel; short transfers are continued from where they stopped, so a
//! write or send ends whole or with an error.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use io_uring::{opcode, squeue, types};
use socket2::SockAddr;

use super::Ring;
use super::net::{from_addr, new_socket, to_addr};
use super::registered::Registered;
use crate::api::{Addr, Completion, Disk, File, IoError, IoList, Listener, Op, Output, Socket, list_len};
use crate::arena::BufMut;
use crate::memory::MemoryDisk;

/// The kernel's limit on the pieces of one vectored call.
const IOVECS_MAX: usize = 1024;

/// What a slot is at.
#[derive(Debug)]
pub(super) enum Kind {
    Free,
    Read,
    Write { dsync: bool },
    Sync,
    Allocate,
    Accept { listener: Listener },
    Connect { socket: Option<OwnedFd>, addr: Addr },
    Recv { socket: Socket },
    Send { socket: Socket },
    CancelSocket { socket: Socket },
    CancelListener { listener: Listener },
}

/// One op and all memory that the kernel sees of it. Boxed, so that it never moves.
pub(super) struct Slot {
    token: u64,
    kind: Kind,
    /// The descriptor, or the place of a registered file.
    pub(super) fd: RawFd,
    is_registered: bool,
    buf: Option<BufMut>,
    bufs: IoList,
    /// First byte within `buf` (receives only).
    from: usize,
    /// Byte offset within the file.
    offset: u64,
    total: u64,
    done: u64,
    iovecs: Vec<libc::iovec>,
    message: libc::msghdr,
    addr: libc::sockaddr_storage,
    addr_len: libc::socklen_t,
}

impl Slot {
    fn new() -> Self {
        Self {
            token: 0,
            kind: Kind::Free,
            fd: -1,
            is_registered: false,
            buf: None,
            bufs: IoList::new(),
            from: 0,
            offset: 0,
            total: 0,
            done: 0,
            iovecs: Vec::new(),
            // SAFETY: both are plain C structures for which all zeroes is a value (null pointers,
            // zero lengths, family AF_UNSPEC).
            message: unsafe { std::mem::zeroed() },
            // SAFETY: as above.
            addr: unsafe { std::mem::zeroed() },
            addr_len: 0,
        }
    }
}

impl Ring {
    pub(super) fn new_slot(&mut self, token: u64, kind: Kind) -> u32 {
        let index = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(Box::new(Slot::new()));
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.token = token;
        slot.kind = kind;
        slot.is_registered = false;
        (slot.from, slot.offset, slot.total, slot.done) = (0, 0, 0, 0);
        index
    }

    /// Takes an op in: to the queue, to a socket's waiting sends, or straight to its end.
    pub(super) fn accept_op(&mut self, token: u64, op: Op) {
        let op = match &mut self.memory {
            None => op,
            Some(memory) => match in_memory(memory, op) {
                InMemory::Done(result, buf, bufs) => {
                    return self.done.push_back(Completion { token, result, buf, bufs });
                }
                InMemory::Other(op) => op,
            },
        };
        match op {
            Op::ReadAt { file, offset, buf, bytes } => {
                assert!(bytes as usize <= buf.len(), "a read must fit in its buffer");
                let slot = self.new_slot(token, Kind::Read);
                let total = u64::from(bytes);
                self.start_file_op(slot, file, offset, total).buf = Some(buf);
                self.enqueue_file_op(slot, total == 0);
            }
            Op::WriteAt { file, offset, bufs, dsync } => {
                let slot = self.new_slot(token, Kind::Write { dsync });
                let total = list_len(&bufs) as u64;
                self.start_file_op(slot, file, offset, total).bufs = bufs;
                self.enqueue_file_op(slot, total == 0);
            }
            Op::Sync { file } => {
                let slot = self.new_slot(token, Kind::Sync);
                self.start_file_op(slot, file, 0, 0);
                self.enqueue_file_op(slot, false);
            }
            Op::Allocate { file, offset, bytes } => {
                let slot = self.new_slot(token, Kind::Allocate);
                self.start_file_op(slot, file, offset, bytes);
                self.enqueue_file_op(slot, false);
            }
            Op::Accept { listener } => self.take_accept(token, listener),
            Op::Connect { addr } => self.take_connect(token, addr),
            Op::Recv { socket, buf, from, to } => {
                assert!(from < to && to as usize <= buf.len(), "a receive must fit in its buffer");
                self.take_recv(token, socket, buf, from as usize, to as usize);
            }
            Op::Send { socket, bufs } => self.take_send(token, socket, bufs),
            Op::Close { socket } => self.close_socket(token, socket),
            Op::CloseListener { listener } => self.close_listener(token, listener),
        }
    }

    fn start_file_op(&mut self, slot: u32, file: File, offset: u64, total: u64) -> &mut Slot {
        let fd = self.disk.raw_fd(file);
        let is_registered = fd.is_some() && self.registered_files.has(file.index);
        let slot = &mut self.slots[slot as usize];
        slot.fd = if is_registered { file.index as RawFd } else { fd.unwrap_or(-1) };
        slot.is_registered = is_registered;
        slot.offset = offset;
        slot.total = total;
        slot
    }

    fn enqueue_file_op(&mut self, slot: u32, empty: bool) {
        if self.slots[slot as usize].fd < 0 {
            self.end_slot(slot, Err(IoError::new("use a closed file", libc::EBADF)));
        } else if empty {
            self.finish_transfer(slot);
        } else {
            self.start_on_file(slot);
        }
    }

    fn take_accept(&mut self, token: u64, listener: Listener) {
        let Some(entry) = self.live_listener(listener) else {
            return self.complete_plain(token, Err(IoError::new("accept", libc::EBADF)));
        };
        entry.ends.outstanding += 1;
        let fd = entry.fd.as_raw_fd();
        let slot = self.new_slot(token, Kind::Accept { listener });
        self.slots[slot as usize].fd = fd;
        self.queue.push_back(slot);
    }

    fn take_connect(&mut self, token: u64, addr: Addr) {
        let made = from_addr(&addr).and_then(|to| Ok((to, new_socket(&addr)?)));
        let (to, socket) = match made {
            Ok(made) => made,
            Err(e) => {
                return self.complete_plain(token, Err(IoError::from_io("connect to", &e).at(addr)));
            }
        };
        let fd = socket.as_raw_fd();
        let slot = self.new_slot(token, Kind::Connect { socket: Some(socket.into()), addr });
        let slot_ref = &mut self.slots[slot as usize];
        slot_ref.fd = fd;
        slot_ref.addr_len = to.len();
        // SAFETY: a SockAddr holds `len` initialised bytes, at most a sockaddr_storage; source and
        // target do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                to.as_ptr().cast::<u8>(),
                (&raw mut slot_ref.addr).cast::<u8>(),
                to.len() as usize,
            );
        }
        self.queue.push_back(slot);
    }

    fn take_recv(&mut self, token: u64, socket: Socket, buf: BufMut, from: usize, to: usize) {
        let slot = self.new_slot(token, Kind::Recv { socket });
        let slot_ref = &mut self.slots[slot as usize];
        slot_ref.buf = Some(buf);
        slot_ref.from = from;
        slot_ref.total = (to - from) as u64;
        let Some(entry) = self.live_socket(socket) else {
            return self.end_slot(slot, Err(IoError::new("receive", libc::EBADF)));
        };
        assert!(!entry.receiving, "one receive at a time a socket");
        entry.receiving = true;
        entry.ends.outstanding += 1;
        self.slots[slot as usize].fd = entry.fd.as_raw_fd();
        self.queue.push_back(slot);
    }

    fn take_send(&mut self, token: u64, socket: Socket, bufs: IoList) {
        let slot = self.new_slot(token, Kind::Send { socket });
        let slot_ref = &mut self.slots[slot as usize];
        slot_ref.total = list_len(&bufs) as u64;
        slot_ref.bufs = bufs;
        let Some(entry) = self.live_socket(socket) else {
            return self.end_slot(slot, Err(IoError::new("send", libc::EBADF)));
        };
        let fd = entry.fd.as_raw_fd();
        if entry.sending {
            entry.sends.push_back(slot);
        } else {
            entry.sending = true;
            entry.ends.outstanding += 1;
            self.queue.push_back(slot);
        }
        self.slots[slot as usize].fd = fd;
    }

    /// The submission entry of a slot's next step.
    pub(super) fn prepare(&mut self, index: u32) -> squeue::Entry {
        let registered = self.registered;
        let slot = &mut *self.slots[index as usize];
        let fd = types::Fd(slot.fd);
        let entry = match &slot.kind {
            Kind::Free => unreachable!("a free slot was queued"),
            Kind::Read => slot.prepare_read(registered),
            Kind::Write { dsync } => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                slot.prepare_write(registered, flags)
            }
            Kind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Kind::Allocate => opcode::Fallocate::new(fd, slot.total).offset(slot.offset).build(),
            Kind::Accept { .. } => {
                slot.addr_len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
                opcode::Accept::new(fd, (&raw mut slot.addr).cast(), &mut slot.addr_len)
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Kind::Connect { .. } => {
                opcode::Connect::new(fd, (&raw const slot.addr).cast(), slot.addr_len).build()
            }
            Kind::Recv { .. } => {
                let (from, len) = (slot.from, slot.total as u32);
                let target = slot.buf.as_mut().expect("a receive has a buffer").as_ptr_mut();
                opcode::Recv::new(fd, target.wrapping_add(from), len).build()
            }
            Kind::Send { .. } => slot.prepare_send(),
            Kind::CancelSocket { .. } | Kind::CancelListener { .. } => {
                opcode::AsyncCancel2::new(types::CancelBuilder::fd(fd).all()).build()
            }
        };
        let entry = if slot.is_registered { entry.flags(squeue::Flags::FIXED_FILE) } else { entry };
        entry.user_data(u64::from(index))
    }

    /// The kernel is through with a slot's step: the result, or the negated error number.
    pub(super) fn finish(&mut self, index: u32, result: i32) {
        self.in_kernel -= 1;
        self.reads_in_kernel -= u32::from(self.is_read(index));
        if (result == -libc::EINTR || result == -libc::EAGAIN) && !self.is_closing(index) {
            self.queue.push_back(index);
            return;
        }
        match self.slots[index as usize].kind {
            Kind::Free => unreachable!("a completion for a free slot"),
            Kind::Read | Kind::Write { .. } => self.finish_file_step(index, result),
            Kind::Sync => self.end_slot(index, checked("sync", result).map(|_| Output::Synced)),
            Kind::Allocate => self.end_slot(index, checked("allocate", result).map(|_| Output::Allocated)),
            Kind::Accept { listener } => self.finish_accept(index, listener, result),
            Kind::Connect { .. } => self.finish_connect(index, result),
            Kind::Recv { socket } => self.finish_recv(index, socket, result),
            Kind::Send { socket } => self.finish_send(index, socket, result),
            Kind::CancelSocket { socket } => {
                self.release(index);
                self.socket_cancelled(socket);
            }
            Kind::CancelListener { listener } => {
                self.release(index);
                self.listener_cancelled(listener);
            }
        }
    }

    pub(super) fn is_read(&self, index: u32) -> bool {
        matches!(self.slots[index as usize].kind, Kind::Read)
    }

    fn is_closing(&self, index: u32) -> bool {
        match self.slots[index as usize].kind {
            Kind::Recv { socket } | Kind::Send { socket } => self
                .sockets
                .get(socket.index, socket.generation)
                .is_none_or(|entry| entry.ends.closing.is_some()),
            Kind::Accept { listener } => self
                .listeners
                .get(listener.index, listener.generation)
                .is_none_or(|entry| entry.ends.closing.is_some()),
            Kind::CancelSocket { .. } | Kind::CancelListener { .. } => true,
            _ => false,
        }
    }

    fn finish_file_step(&mut self, index: u32, result: i32) {
        let slot = &mut self.slots[index as usize];
        let is_read = matches!(slot.kind, Kind::Read);
        let what = if is_read { "read" } else { "write" };
        match checked(what, result) {
            Err(error) => self.end_slot(index, Err(error)),
            Ok(0) if is_read => self.finish_transfer(index),
            Ok(0) => self.end_slot(index, Err(IoError::new(what, libc::EIO))),
            Ok(count) => {
                slot.done += u64::from(count);
                assert!(slot.done <= slot.total, "the kernel moved more than it was asked to");
                if slot.done == slot.total {
                    self.finish_transfer(index);
                } else {
                    self.queue.push_back(index);
                }
            }
        }
    }

    fn finish_transfer(&mut self, index: u32) {
        let slot = &self.slots[index as usize];
        let output = match slot.kind {
            Kind::Read => Output::Read(slot.done as u32),
            _ => Output::Written,
        };
        self.end_slot(index, Ok(output));
    }

    fn finish_accept(&mut self, index: u32, listener: Listener, result: i32) {
        let accepted = checked("accept", result).map(|fd| {
            // SAFETY: the kernel just made this descriptor for us, so nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
            let slot = &self.slots[index as usize];
            // SAFETY: the kernel filled `addr` and set `addr_len` to what it filled, both ours and
            // of the right size.
            let peer = unsafe { SockAddr::new(storage(&slot.addr), slot.addr_len) };
            (fd, to_addr(&peer))
        });
        let result = accepted.map(|(fd, peer)| Output::Accepted { socket: self.add_socket(fd), peer });
        self.end_slot(index, result);
        if let Some(entry) = self.listeners.get_mut(listener.index, listener.generation) {
            entry.ends.outstanding -= 1;
        }
        self.close_listener_if_over(listener);
    }

    fn finish_connect(&mut self, index: u32, result: i32) {
        let slot = &mut self.slots[index as usize];
        let Kind::Connect { socket, addr } = &mut slot.kind else { unreachable!("checked by the caller") };
        let fd = socket.take().expect("a connect owns its socket until its end");
        let result = checked("connect to", result).map_err(|e| e.at(&*addr));
        let result = result.map(|_| Output::Connected { socket: self.add_socket(fd) });
        self.end_slot(index, result);
    }

    fn finish_recv(&mut self, index: u32, socket: Socket, result: i32) {
        let entry = self.sockets.get_mut(socket.index, socket.generation);
        let entry = entry.expect("a socket stays until its ops have ended");
        entry.receiving = false;
        entry.ends.outstanding -= 1;
        // The shutdown of a close looks like the end of the stream.
        let faked = entry.ends.closing.is_some() && result == 0;
        let result = if faked { -libc::ECANCELED } else { result };
        self.end_slot(index, checked("receive", result).map(Output::Received));
        self.close_if_over(socket);
    }

    fn finish_send(&mut self, index: u32, socket: Socket, result: i32) {
        let closing = self.is_closing(index);
        let slot = &mut self.slots[index as usize];
        let result = checked("send", result).and_then(|count| {
            slot.done += u64::from(count);
            let whole = slot.done == slot.total;
            if !whole && closing { Err(IoError::new("send", libc::ECANCELED)) } else { Ok(whole) }
        });
        match result {
            Ok(false) => return self.queue.push_back(index),
            Ok(true) => self.end_slot(index, Ok(Output::Sent)),
            Err(error) => self.end_slot(index, Err(error)),
        }
        let entry = self.sockets.get_mut(socket.index, socket.generation);
        let entry = entry.expect("a socket stays until its ops have ended");
        match entry.sends.pop_front() {
            Some(next) => self.queue.push_back(next),
            None => {
                entry.sending = false;
                entry.ends.outstanding -= 1;
                self.close_if_over(socket);
            }
        }
    }

    /// An op is over: its completion goes out with all its buffers.
    pub(super) fn end_slot(&mut self, index: u32, result: Result<Output, IoError>) {
        let slot = &mut self.slots[index as usize];
        let completion = Completion {
            token: slot.token,
            result,
            buf: slot.buf.take(),
            bufs: std::mem::take(&mut slot.bufs),
        };
        if matches!(completion.result, Ok(Output::Received(_))) {
            self.done.push_front(completion);
        } else {
            self.done.push_back(completion);
        }
        self.release(index);
    }

    pub(super) fn complete_plain(&mut self, token: u64, result: Result<Output, IoError>) {
        self.done.push_back(Completion { token, result, buf: None, bufs: IoList::new() });
    }

    fn release(&mut self, index: u32) {
        self.slots[index as usize].kind = Kind::Free;
        self.free_slots.push(index);
    }

    /// While the ring is being dropped: ends slots without continuing anything.
    pub(super) fn reap_discarding(&mut self) {
        let reaped: Vec<_> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (user_data, result) in reaped {
            let Some(slot) = self.slots.get_mut(user_data as usize) else { continue };
            self.in_kernel -= 1;
            if matches!(slot.kind, Kind::Accept { .. }) && result >= 0 {
                // SAFETY: an accepted descriptor that nobody has taken yet is ours to close.
                drop(unsafe { OwnedFd::from_raw_fd(result) });
            }
            slot.buf = None;
            slot.bufs.clear();
            self.release(user_data as u32);
        }
    }
}

impl Slot {
    fn prepare_read(&mut self, registered: Registered) -> squeue::Entry {
        let fd = types::Fd(self.fd);
        let (done, offset) = (self.done as usize, self.offset + self.done);
        let len = (self.total - self.done) as u32;
        let buf = self.buf.as_mut().expect("a read has a buffer");
        let target = buf.as_ptr_mut().wrapping_add(done);
        match registered.buffer_of(target) {
            Some(buffer) => opcode::ReadFixed::new(fd, target, len, buffer).offset(offset).build(),
            None => opcode::Read::new(fd, target, len).offset(offset).build(),
        }
    }

    fn prepare_write(&mut self, registered: Registered, flags: i32) -> squeue::Entry {
        self.gather();
        let (fd, offset) = (types::Fd(self.fd), self.offset + self.done);
        if let [piece] = self.iovecs[..] {
            let (from, len) = (piece.iov_base.cast::<u8>().cast_const(), piece.iov_len as u32);
            return match registered.buffer_of(from) {
                Some(buffer) => {
                    opcode::WriteFixed::new(fd, from, len, buffer).offset(offset).rw_flags(flags).build()
                }
                None => opcode::Write::new(fd, from, len).offset(offset).rw_flags(flags).build(),
            };
        }
        let (list, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
        match registered.buffer_of_list(&self.iovecs) {
            Some(buffer) => {
                opcode::WritevFixed::new(fd, list, count, buffer).offset(offset).rw_flags(flags).build()
            }
            None => opcode::Writev::new(fd, list, count).offset(offset).rw_flags(flags).build(),
        }
    }

    fn prepare_send(&mut self) -> squeue::Entry {
        self.gather();
        let fd = types::Fd(self.fd);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        if let [piece] = self.iovecs[..] {
            return opcode::Send::new(fd, piece.iov_base.cast(), piece.iov_len as u32).flags(flags).build();
        }
        self.message.msg_iov = self.iovecs.as_mut_ptr();
        self.message.msg_iovlen = self.iovecs.len() as _;
        opcode::SendMsg::new(fd, &self.message).flags(flags as u32).build()
    }

    /// Lists the pieces that are still to go, past the `done` bytes, as many as one call takes.
    fn gather(&mut self) {
        self.iovecs.clear();
        let mut skip = self.done as usize;
        for buf in &self.bufs {
            let bytes = buf.bytes();
            if skip >= bytes.len() {
                skip -= bytes.len();
                continue;
            }
            let rest = &bytes[skip..];
            skip = 0;
            self.iovecs.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
            if self.iovecs.len() == IOVECS_MAX {
                break;
            }
        }
    }
}

/// What became of an op where files are in memory.
enum InMemory {
    /// Its result, and the buffers that it gives back.
    Done(Result<Output, IoError>, Option<BufMut>, IoList),
    /// It is not on a file.
    Other(Op),
}

/// Does an op on a file at once, in memory.
fn in_memory(memory: &mut MemoryDisk, op: Op) -> InMemory {
    match op {
        Op::ReadAt { file, offset, mut buf, bytes } => {
            let result = memory.read(file, offset, &mut buf[..bytes as usize]);
            InMemory::Done(result.map(|count| Output::Read(count as u32)), Some(buf), IoList::new())
        }
        Op::WriteAt { file, offset, bufs, .. } => {
            let result = memory.write(file, offset, &bufs);
            InMemory::Done(result.map(|()| Output::Written), None, bufs)
        }
        Op::Sync { file } => {
            InMemory::Done(memory.sync_blocking(file).map(|()| Output::Synced), None, IoList::new())
        }
        Op::Allocate { file, offset, bytes } => {
            let result = memory.allocate_blocking(file, offset, bytes);
            InMemory::Done(result.map(|()| Output::Allocated), None, IoList::new())
        }
        other => InMemory::Other(other),
    }
}

fn checked(what: &'static str, result: i32) -> Result<u32, IoError> {
    if result < 0 { Err(IoError::new(what, -result)) } else { Ok(result as u32) }
}

fn storage(addr: &libc::sockaddr_storage) -> socket2::SockAddrStorage {
    let mut storage = socket2::SockAddrStorage::zeroed();
    // SAFETY: SockAddrStorage is a transparent sockaddr_storage, as its `view_as` promises for
    // socket address types.
    unsafe { *storage.view_as::<libc::sockaddr_storage>() = *addr };
    storage
}
