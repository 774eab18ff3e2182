//! The reactor over io_uring: one ring a core for disk and sockets.
//!
//! `turn` enters the kernel only with submissions queued, with deferred work flagged, or to
//! sleep; a lone op costs one call that submits and waits together. Waiting: a spin of at most
//! `spin_us_max`, halved whenever it was in vain and restored when a sleep turns out shorter
//! than the spin would have been; so an idle core never spins.
//!
//! Ops on files go to the kernel in groups of eight as they come, and never behind a send. A turn brings what was
//! received first, since it may be more work for the disk, and at most eight reads from the disk.
//!
//! Invariants: an op's slot keeps its address and has at most one entry in the kernel; memory
//! that the kernel may touch is owned by a slot until its completion was reaped.
//!
//! Deliberately absent: IOPOLL rings, SQPOLL, zero-copy send, multishot receive (all measured
//! as losses or not yet measured as gains).

mod aside;
mod net;
mod ops;
mod registered;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use protocol::types::{Span, Time};

use crate::api::{
    Addr, Completion, Disk, File, IoError, Listener, Op, OpenOptions, Output, Reactor, Socket, Stats, Waker,
};
use crate::arena::Arena;
use crate::clock::monotonic_now;
use crate::disk::HostDisk;
use crate::memory::MemoryDisk;
use crate::table::Table;
use aside::Aside;
use net::{ListenEntry, SocketEntry};
use ops::Slot;
use registered::{Registered, RegisteredFiles};

/// `user_data` of the read that is armed on the waker's eventfd.
const WAKE: u64 = u64::MAX;
/// `IORING_ENTER_GETEVENTS`: run deferred work and flush an overflowed completion queue.
const ENTER_GETEVENTS: u32 = 1;
/// Ops on files that are submitted at once, before the turn that brings them has seen all it has: a
/// disk that is told of 32 reads together also answers them together, and then idles.
const FILE_GROUP: u32 = 8;
/// Reads of files that a turn brings at most. A disk that ends 32 together would else have them all answered by one send,
/// with the client idle until then and the disk until the client has asked again.
const TURN_READS_MAX: usize = 8;
/// Reads under way with which it is worth watching for completions instead of sleeping, at most.
const SPIN_READS_MAX: usize = 4;

/// How a ring is set up.
#[derive(Debug, Clone, Copy)]
pub struct RingConfig {
    /// Bytes of the core's arena.
    pub arena_bytes: usize,
    /// Entries of the submission queue, a power of two; the completion queue has 16 times as many.
    pub entries: u32,
    /// Longest spin before a sleep, in microseconds; 0 never spins. Taken as 0 on a machine of
    /// one processor.
    pub spin_us_max: u32,
    /// Whether to register the arena with the kernel when the memlock limit allows. That pins
    /// (makes resident) all of it.
    pub register_arena: bool,
    /// Keep files in memory instead of on a disk: for benchmarks, since all is lost at exit.
    pub memory_files: bool,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            arena_bytes: 64 << 20,
            entries: 256,
            spin_us_max: 10,
            register_arena: false,
            memory_files: false,
        }
    }
}

/// The reactor of one core. Made and used on that core's thread.
pub struct Ring {
    ring: IoUring,
    // Boxed, since the kernel points into slots while the vector grows.
    #[allow(clippy::vec_box)]
    slots: Vec<Box<Slot>>,
    free_slots: Vec<u32>,
    /// Slots to be handed to the kernel, oldest first; ops on files seldom wait here.
    queue: VecDeque<u32>,
    /// Ops on files in the submission queue.
    files_unsubmitted: u32,
    /// Completions to be handed out, what was received in front.
    done: VecDeque<Completion>,
    reaped: Vec<(u64, i32)>,
    /// Slots handed to the kernel and not yet reaped.
    in_kernel: u32,
    /// Reads of files among them.
    reads_in_kernel: u32,
    /// Reads that the owner waits for, on this ring or elsewhere.
    reads_awaited: usize,
    disk: HostDisk,
    /// Takes the disk's place, where that is wanted.
    memory: Option<MemoryDisk>,
    sockets: Table<SocketEntry>,
    listeners: Table<ListenEntry>,
    arena: Arena,
    registered: Registered,
    registered_files: RegisteredFiles,
    waker: Waker,
    wake_count: Box<u64>,
    wake_armed: bool,
    spin: Spin,
    aside: Option<Aside>,
    random: u64,
    stats: Stats,
}

/// How long it is worth spinning.
struct Spin {
    max_ns: u64,
    budget_ns: u64,
}

impl Ring {
    /// Sets up a ring and its arena. Fails with a hint when the kernel refuses io_uring.
    pub fn new(config: RingConfig) -> Result<Self, IoError> {
        Self::woken_by(config, Waker::new()?)
    }

    /// [`Ring::new`] with a waker that others hold already.
    pub fn woken_by(config: RingConfig, waker: Waker) -> Result<Self, IoError> {
        let ring = build(config.entries)?;
        let arena = Arena::new(config.arena_bytes)?;
        let registered =
            if config.register_arena { Registered::new(&ring, &arena) } else { Registered::default() };
        let registered_files =
            if config.memory_files { RegisteredFiles::default() } else { RegisteredFiles::new(&ring) };
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let max_ns = if cpus == 1 { 0 } else { u64::from(config.spin_us_max) * 1000 };
        let mut ring = Self {
            ring,
            slots: Vec::new(),
            free_slots: Vec::new(),
            queue: VecDeque::new(),
            files_unsubmitted: 0,
            done: VecDeque::new(),
            reaped: Vec::new(),
            in_kernel: 0,
            reads_in_kernel: 0,
            reads_awaited: 0,
            disk: HostDisk::new()?,
            memory: config.memory_files.then(MemoryDisk::new),
            sockets: Table::new(),
            listeners: Table::new(),
            arena,
            registered,
            registered_files,
            waker,
            wake_count: Box::new(0),
            wake_armed: false,
            spin: Spin { max_ns, budget_ns: 0 },
            aside: Aside::new(),
            random: seed(),
            stats: Stats::default(),
        };
        ring.arm_wake();
        Ok(ring)
    }

    /// Whether the arena is registered with the kernel.
    pub fn arena_registered(&self) -> bool {
        self.registered.bytes > 0
    }

    /// The file table, for questions such as [`HostDisk::is_direct`].
    pub fn disk(&self) -> &HostDisk {
        &self.disk
    }

    fn files(&mut self) -> &mut dyn Disk {
        match &mut self.memory {
            Some(memory) => memory,
            None => &mut self.disk,
        }
    }

    fn arm_wake(&mut self) {
        let target: *mut u64 = &mut *self.wake_count;
        let entry = opcode::Read::new(types::Fd(self.waker.raw_fd()), target.cast(), 8).build();
        // SAFETY: `wake_count` is a box of ours that is freed only after the ring is gone, and is
        // read by nobody.
        self.wake_armed = unsafe { self.ring.submission().push(&entry.user_data(WAKE)) }.is_ok();
    }

    /// Moves queued slots into the submission queue, entering the kernel when it is full.
    ///
    /// Ops on files that are in it already are submitted by themselves first: the kernel holds them
    /// back (its block plug) until it has seen to the whole of a submission, and a send runs within
    /// that, so the disk would wait for the sends.
    fn fill(&mut self) {
        if !self.wake_armed {
            self.arm_wake();
        }
        if self.files_unsubmitted > 0 && !self.queue.is_empty() {
            self.submit_now();
        }
        while let Some(&index) = self.queue.front() {
            if !self.hand_over(index) {
                return;
            }
            self.queue.pop_front();
        }
    }

    /// Puts a new op on a file into the submission queue, and submits what makes a group.
    fn start_on_file(&mut self, index: u32) {
        if !self.hand_over(index) {
            return self.queue.push_back(index);
        }
        self.files_unsubmitted += 1;
        if self.files_unsubmitted == FILE_GROUP {
            self.submit_now();
        }
    }

    /// Puts a slot's entry into the submission queue. False when there is no room even after
    /// entering the kernel.
    fn hand_over(&mut self, index: u32) -> bool {
        let entry = self.prepare(index);
        if !self.push(&entry) {
            self.enter_now();
            self.reap();
            if !self.push(&entry) {
                return false;
            }
        }
        self.in_kernel += 1;
        self.reads_in_kernel += u32::from(self.is_read(index));
        true
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the entry was built by `prepare` over memory owned by a slot (boxed, so it does
        // not move), which stays until its completion is reaped.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Submits, does not run deferred work, does not wait.
    fn submit_now(&mut self) {
        self.enter(0);
    }

    /// Submits, runs deferred work, does not wait.
    fn enter_now(&mut self) {
        self.enter(ENTER_GETEVENTS);
    }

    fn enter(&mut self, flags: u32) {
        let queued = self.ring.submission().len() as u32;
        self.stats.enters += 1;
        self.files_unsubmitted = 0;
        // SAFETY: no argument is passed, and the flags are valid without one.
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, 0, flags, None) };
        check_enter(result);
    }

    /// Submits and sleeps until a completion or the deadline.
    fn enter_and_sleep(&mut self, now: Time, deadline: Option<Time>) {
        if !self.waker.try_sleep() {
            return;
        }
        self.stats.enters += 1;
        self.stats.sleeps += 1;
        self.files_unsubmitted = 0;
        let result = match deadline {
            None => self.ring.submitter().submit_and_wait(1),
            Some(deadline) => {
                let timeout = types::Timespec::from(Duration::from_nanos((deadline - now).0));
                let args = types::SubmitArgs::new().timespec(&timeout);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        check_enter(result);
        self.waker.end_sleep();
        if self.spin.max_ns > 0 && (monotonic_now() - now).0 < self.spin.max_ns {
            self.spin.budget_ns = self.spin.max_ns;
        }
    }

    fn kernel_wants_entry(&mut self) -> bool {
        let sq = self.ring.submission();
        let overflow = sq.cq_overflow();
        self.stats.overflows += u64::from(overflow);
        overflow || sq.taskrun()
    }

    /// Takes all completions off the ring; finished ops end up in `done`.
    fn reap(&mut self) {
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (user_data, result) in reaped.drain(..) {
            if user_data == WAKE {
                self.wake_armed = false;
            } else {
                self.finish(user_data as u32, result);
            }
        }
        self.reaped = reaped;
    }

    /// With many reads under way a wake-up brings several of them and is never far: watching for it gains nothing. With
    /// writes it does, since those who wait for them on other cores do so one after another.
    fn spins(&self) -> bool {
        self.spin.budget_ns > 0 && self.reads_awaited.max(self.reads_in_kernel as usize) <= SPIN_READS_MAX
    }

    /// Watches for work without entering the kernel; true if there is some.
    fn spin_for_work(&mut self, now: Time, deadline: Option<Time>) -> bool {
        let until = now.0.saturating_add(self.spin.budget_ns).min(deadline.map_or(u64::MAX, |d| d.0));
        loop {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            let ready = !self.ring.completion().is_empty()
                || self.ring.submission().taskrun()
                || self.waker.is_notified();
            if ready {
                self.stats.spins_won += 1;
                return true;
            }
            if monotonic_now().0 >= until {
                self.stats.spins_lost += 1;
                self.spin.budget_ns /= 2;
                if self.spin.budget_ns < 1000 {
                    self.spin.budget_ns = 0;
                }
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// What has completed, but of reads from the disk only so many that their answers leave early.
    fn hand_out(&mut self, completions: &mut Vec<Completion>) {
        let most = if self.memory.is_none() { TURN_READS_MAX } else { usize::MAX };
        let mut reads = 0;
        let count = self.done.iter().take_while(|done| {
            reads += usize::from(matches!(done.result, Ok(Output::Read(_))));
            reads <= most
        });
        let count = count.count();
        self.stats.completions += count as u64;
        self.stats.in_flight -= count as u32;
        completions.extend(self.done.drain(..count));
    }

    /// One round: submit, and wait if there is nothing to do.
    fn round(&mut self, deadline: Option<Time>) {
        self.fill();
        let now = monotonic_now();
        let may_wait = self.done.is_empty()
            && self.queue.is_empty()
            && self.ring.completion().is_empty()
            && deadline.is_none_or(|deadline| deadline > now)
            && !self.waker.is_notified();
        let wants_entry = self.kernel_wants_entry();
        if !may_wait || wants_entry || self.spins() {
            if wants_entry || !self.ring.submission().is_empty() {
                self.enter_now();
            }
            self.reap();
            let found = !self.done.is_empty() || !self.queue.is_empty() || !self.wake_armed;
            if !may_wait || found || (self.spins() && self.spin_for_work(now, deadline)) {
                return;
            }
        }
        self.enter_and_sleep(now, deadline);
        self.reap();
    }
}

impl Reactor for Ring {
    fn now(&self) -> Time {
        monotonic_now()
    }

    fn random(&mut self) -> u64 {
        split_mix(&mut self.random)
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn submit(&mut self, token: u64, op: Op) {
        self.stats.in_flight += 1;
        self.accept_op(token, op);
    }

    fn turn(&mut self, deadline: Option<Time>, completions: &mut Vec<Completion>) {
        self.stats.turns += 1;
        loop {
            self.round(deadline);
            if !self.queue.is_empty() || self.ring.submission().taskrun() {
                // Follow-ups (rest of a short write, the next send) go out before the caller works.
                self.fill();
                self.enter_now();
                self.reap();
            }
            let expired = deadline.is_some_and(|deadline| deadline <= monotonic_now());
            if !self.done.is_empty() || expired || self.waker.is_notified() {
                break;
            }
        }
        self.waker.clear();
        self.hand_out(completions);
        if let Some(aside) = &mut self.aside {
            aside.look(monotonic_now());
        }
    }

    fn awaits_reads(&mut self, count: usize) {
        self.reads_awaited = count;
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn listen(&mut self, addr: SocketAddr) -> Result<Listener, IoError> {
        let socket = net::listen_tcp(addr).map_err(|e| IoError::from_io("listen on", &e).at(addr))?;
        Ok(self.add_listener(socket))
    }

    fn give_away(&mut self, socket: Socket) -> Result<OwnedFd, IoError> {
        self.remove_socket(socket)
    }

    fn adopt_socket(&mut self, fd: OwnedFd) -> Result<Socket, IoError> {
        Ok(self.add_socket(fd))
    }

    fn limit_unacknowledged(&mut self, socket: Socket, most: Span) {
        if let Some(entry) = self.live_socket(socket) {
            net::limit_unacknowledged(&entry.fd, Duration::from_nanos(most.0));
        }
    }

    fn listen_unix(&mut self, path: &Path) -> Result<Listener, IoError> {
        let socket =
            net::listen_unix(path).map_err(|e| IoError::from_io("listen on", &e).at(path.display()))?;
        Ok(self.add_listener(socket))
    }

    fn adopt_listener(&mut self, fd: OwnedFd) -> Result<Listener, IoError> {
        let socket = net::adopt(fd).map_err(|e| IoError::from_io("adopt a listening socket", &e))?;
        Ok(self.add_listener(socket))
    }

    fn listener_addr(&self, listener: Listener) -> Result<Addr, IoError> {
        self.local_addr(listener)
    }

    fn stats(&self) -> Stats {
        Stats { sockets: self.sockets.len(), ..self.stats }
    }
}

impl Disk for Ring {
    fn open(&mut self, path: &Path, options: OpenOptions) -> Result<File, IoError> {
        let file = self.files().open(path, options)?;
        if let Some(fd) = self.disk.raw_fd(file) {
            self.registered_files.put(&self.ring, file.index, fd);
        }
        Ok(file)
    }
    fn close_file(&mut self, file: File) {
        if self.disk.raw_fd(file).is_some() {
            self.registered_files.remove(&self.ring, file.index);
        }
        self.files().close_file(file);
    }
    fn file_len(&mut self, file: File) -> Result<u64, IoError> {
        self.files().file_len(file)
    }
    fn read_blocking(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError> {
        self.files().read_blocking(file, offset, into)
    }
    fn write_blocking(&mut self, file: File, offset: u64, from: &[u8]) -> Result<(), IoError> {
        self.files().write_blocking(file, offset, from)
    }
    fn sync_blocking(&mut self, file: File) -> Result<(), IoError> {
        self.files().sync_blocking(file)
    }
    fn allocate_blocking(&mut self, file: File, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.files().allocate_blocking(file, offset, bytes)
    }
    fn truncate(&mut self, file: File, bytes: u64) -> Result<(), IoError> {
        self.files().truncate(file, bytes)
    }
    fn create_dir_all(&mut self, path: &Path) -> Result<(), IoError> {
        self.files().create_dir_all(path)
    }
    fn list_dir(&mut self, path: &Path) -> Result<Vec<String>, IoError> {
        self.files().list_dir(path)
    }
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError> {
        self.files().rename(from, to)
    }
    fn remove_file(&mut self, path: &Path) -> Result<(), IoError> {
        self.files().remove_file(path)
    }
    fn exists(&mut self, path: &Path) -> bool {
        self.files().exists(path)
    }
}

impl Drop for Ring {
    /// Cancels what is outstanding and waits for it, since the kernel may still write to its
    /// buffers. What has not ended after 2 s keeps its memory for good.
    fn drop(&mut self) {
        self.queue.clear();
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any().all()).build().user_data(WAKE);
        let deadline = monotonic_now().0 + 2_000_000_000;
        while !self.push(&cancel) {
            self.enter_now();
        }
        loop {
            self.enter_now();
            self.reap_discarding();
            if self.in_kernel == 0 || monotonic_now().0 >= deadline {
                break;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        if self.in_kernel > 0 {
            tracing::warn!(ops = self.in_kernel, "ops outlived their ring; their memory is kept");
            std::mem::take(&mut self.slots).into_iter().for_each(std::mem::forget);
        }
        self.close_all_sockets();
    }
}

/// Fewest entries that a ring is worth having with.
const ENTRIES_MIN: u32 = 8;

/// A ring of `entries`, or of fewer where the memlock limit is low: the queues of an
/// unprivileged process count against it (256 entries take some 100 KiB).
fn build(entries: u32) -> Result<IoUring, IoError> {
    let mut tried = entries;
    loop {
        match build_exactly(tried) {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && tried > ENTRIES_MIN => tried /= 2,
            Err(error) => return Err(refused(&error)),
            Ok(ring) => {
                if tried < entries {
                    tracing::warn!(
                        entries,
                        got = tried,
                        "memlock limit is low (see ulimit -l); a smaller ring it is"
                    );
                }
                return Ok(ring);
            }
        }
    }
}

/// A ring with all we ask for, or without it on an older kernel.
fn build_exactly(entries: u32) -> std::io::Result<IoUring> {
    let mut wanted = IoUring::builder();
    wanted.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    wanted.setup_cqsize(entries * 16).dontfork();
    match wanted.build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let plain = IoUring::builder().setup_cqsize(entries * 16).build(entries)?;
            tracing::warn!(
                "kernel refuses SINGLE_ISSUER and DEFER_TASKRUN; running without, at more CPU an IO"
            );
            Ok(plain)
        }
        result => result,
    }
}

fn refused(error: &std::io::Error) -> IoError {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => "io_uring (is kernel.io_uring_disabled set, or a seccomp profile in the way?)",
        Some(libc::ENOSYS) => "io_uring (this kernel has none; 5.19 or later is needed)",
        Some(libc::ENOMEM) => "io_uring (is the memlock limit used up? see ulimit -l)",
        _ => "io_uring",
    };
    IoError::from_io("set up", error).at(hint)
}

/// What entering may fail with in good order; all else is a bug of ours.
fn check_enter(result: std::io::Result<usize>) {
    let Err(error) = result else { return };
    match error.raw_os_error() {
        // A timeout, a signal, a full completion queue, memory short for a moment.
        Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => {}
        _ => panic!("io_uring_enter refused what we pass: {error}"),
    }
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(monotonic_now().0)
}

/// The splitmix64 generator: one step.
pub(crate) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
