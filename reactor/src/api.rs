//! The seam between the shard and the world: operations, completions, and the two traits.
//!
//! The loop above is `loop { reactor.turn(deadline, &mut completions); dispatch; submit }`.
//! Everything that could differ between a run and its replay (time, chance, the order of
//! completions) comes through here.
//!
//! Contract of [`Reactor::submit`]: an op is queued and reaches the kernel at the next turn;
//! it yields exactly one completion carrying its token. Ops are not ordered among each other
//! except: sends on one socket keep their order, and a close comes after what it cancels.
//! Whoever needs a write before a sync waits for the write's completion first.
//!
//! Deliberately absent: callbacks, futures and timers (see [`crate::timers`]; the loop passes
//! its next deadline to `turn`).

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use protocol::types::{Span, Time};
use smallvec::SmallVec;

use crate::arena::{Arena, Buf, BufMut, SLAB_BYTES};
pub use crate::waker::Waker;

/// Bytes that an [`IoBuf`] can hold in itself: enough for the headers of NBD and of most
/// peer frames.
pub const INLINE_BYTES_MAX: usize = 64;

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name {
            pub(crate) index: u32,
            pub(crate) generation: u32,
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({}.{})"), self.index, self.generation)
            }
        }
    };
}

handle!(
    /// An open file of one reactor. Stale handles are refused with EBADF, never reused.
    File);
handle!(
    /// A listening socket of one reactor.
    Listener);
handle!(
    /// A connected socket of one reactor.
    Socket);

/// Why an operation failed: what was tried, where, and the kernel's number.
#[derive(Clone, PartialEq, Eq)]
pub struct IoError {
    /// What was tried, as a phrase: "read", "open".
    pub what: &'static str,
    /// The kernel's error number, positive.
    pub errno: i32,
    /// The path or address, where one is known.
    pub place: Option<Box<str>>,
}

impl IoError {
    /// An error of a known number.
    pub fn new(what: &'static str, errno: i32) -> Self {
        Self { what, errno, place: None }
    }
    /// The calling thread's last error.
    pub fn last_os(what: &'static str) -> Self {
        Self::from_io(what, &std::io::Error::last_os_error())
    }
    /// From the standard library's error; EIO where it has no number.
    pub fn from_io(what: &'static str, error: &std::io::Error) -> Self {
        Self::new(what, error.raw_os_error().unwrap_or(libc::EIO))
    }
    /// The same with the path or address it happened at.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = Some(place.to_string().into());
        self
    }
    /// Whether the op was cancelled by a close.
    pub fn is_cancelled(&self) -> bool {
        self.errno == libc::ECANCELED
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if let Some(place) = &self.place {
            write!(f, " {place}")?;
        }
        write!(f, ": {}", std::io::Error::from_raw_os_error(self.errno))
    }
}

impl fmt::Debug for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for IoError {}

impl From<IoError> for std::io::Error {
    fn from(error: IoError) -> Self {
        let kind = std::io::Error::from_raw_os_error(error.errno).kind();
        std::io::Error::new(kind, error)
    }
}

/// Where to connect to, or who connected.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Addr {
    /// An IP address and a TCP port.
    Tcp(SocketAddr),
    /// The path of a Unix stream socket; empty for an unnamed peer.
    Unix(PathBuf),
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Bytes to be sent or written.
#[derive(Clone)]
pub enum IoBuf {
    /// A range of a shared run.
    Shared {
        /// The run.
        buf: Buf,
        /// First byte.
        from: u32,
        /// One past the last byte.
        to: u32,
    },
    /// A few bytes held here. Not aligned: refused (EINVAL) by files opened for direct IO.
    Inline {
        /// How many of `bytes` count.
        len: u8,
        /// The bytes.
        bytes: [u8; INLINE_BYTES_MAX],
    },
    /// Bytes on the heap, for what is longer than that. Not aligned either. Completions hand them
    /// back, so that their memory can be used again.
    Owned(Vec<u8>),
    /// So many zeroes, at most [`SLAB_BYTES`], from a static block, aligned.
    Zeroes(u32),
}

/// A list of buffers; short ones stay off the heap. Completions hand the list back, so a long
/// one can be reused together with its allocation.
pub type IoList = SmallVec<[IoBuf; 2]>;

#[repr(align(4096))]
struct ZeroBlock([u8; SLAB_BYTES]);
static ZEROES: ZeroBlock = ZeroBlock([0; SLAB_BYTES]);

impl IoBuf {
    /// The whole of a shared run.
    pub fn whole(buf: Buf) -> Self {
        let to = buf.len() as u32;
        Self::Shared { buf, from: 0, to }
    }
    /// A range of a shared run, in bytes.
    pub fn part(buf: Buf, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= buf.len(), "a part must lie within its run");
        Self::Shared { buf, from: range.start as u32, to: range.end as u32 }
    }
    /// A copy of `bytes`: inline when it fits in [`INLINE_BYTES_MAX`], else on the heap.
    pub fn copy(bytes: &[u8]) -> Self {
        if bytes.len() > INLINE_BYTES_MAX {
            return Self::Owned(bytes.into());
        }
        let mut inline = [0; INLINE_BYTES_MAX];
        inline[..bytes.len()].copy_from_slice(bytes);
        Self::Inline { len: bytes.len() as u8, bytes: inline }
    }
    /// So many zeroes, at most 128 KiB.
    pub fn zeroes(bytes: usize) -> Self {
        assert!(bytes <= SLAB_BYTES, "at most 128 KiB of zeroes in one buffer");
        Self::Zeroes(bytes as u32)
    }
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared { buf, from, to } => &buf[*from as usize..*to as usize],
            Self::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Self::Owned(bytes) => bytes,
            Self::Zeroes(len) => &ZEROES.0[..*len as usize],
        }
    }
    /// How many bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Shared { from, to, .. } => (to - from) as usize,
            Self::Inline { len, .. } => usize::from(*len),
            Self::Owned(bytes) => bytes.len(),
            Self::Zeroes(len) => *len as usize,
        }
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Shared { .. } => "Shared",
            Self::Inline { .. } => "Inline",
            Self::Owned(_) => "Owned",
            Self::Zeroes(_) => "Zeroes",
        };
        write!(f, "{kind}({} bytes)", self.len())
    }
}

/// The bytes of a list in all.
pub fn list_len(bufs: &[IoBuf]) -> usize {
    bufs.iter().map(IoBuf::len).sum()
}

/// What the reactor can do. Each yields one [`Completion`].
#[derive(Debug)]
pub enum Op {
    /// Fills the first `bytes` of `buf` from `offset`. Short only at the end of the file.
    /// Direct files want offset and bytes in multiples of 4 KiB.
    ReadAt {
        /// The file.
        file: File,
        /// Byte offset in the file.
        offset: u64,
        /// What to fill; given back.
        buf: BufMut,
        /// How many bytes, at most the length of `buf`.
        bytes: u32,
    },
    /// Writes all of `bufs` at `offset`, whole or with an error. With `dsync` the completion
    /// means durable (RWF_DSYNC), data and the metadata needed to read it.
    WriteAt {
        /// The file.
        file: File,
        /// Byte offset in the file.
        offset: u64,
        /// What to write; given back.
        bufs: IoList,
        /// Whether completion means durable.
        dsync: bool,
    },
    /// Makes durable all writes completed before it was submitted (fdatasync).
    Sync {
        /// The file.
        file: File,
    },
    /// Reserves space (fallocate), extending the file; new bytes read as zero.
    Allocate {
        /// The file.
        file: File,
        /// First byte.
        offset: u64,
        /// How many.
        bytes: u64,
    },
    /// Accepts one connection.
    Accept {
        /// The listener.
        listener: Listener,
    },
    /// Opens a connection; fails after some 7 s when nobody answers.
    Connect {
        /// To whom.
        addr: Addr,
    },
    /// Receives what there is, at least one byte, into `buf[from..to]`; 0 means that the peer
    /// closed its side. One at a time a socket.
    Recv {
        /// The socket.
        socket: Socket,
        /// What to fill; given back.
        buf: BufMut,
        /// First byte to fill.
        from: u32,
        /// One past the last byte that may be filled; above `from`.
        to: u32,
    },
    /// Sends all of `bufs`, or fails. Several may be queued on a socket and go out in order.
    Send {
        /// The socket.
        socket: Socket,
        /// What to send; given back.
        bufs: IoList,
    },
    /// Cancels everything outstanding on the socket (each op completes first, with an error
    /// unless it had already succeeded), then closes it. The handle is dead from the submit on.
    Close {
        /// The socket.
        socket: Socket,
    },
    /// The same for a listener and its accepts.
    CloseListener {
        /// The listener.
        listener: Listener,
    },
}

/// What a successful op yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// So many bytes were read: fewer than asked for only at the end of the file.
    Read(u32),
    /// All was written.
    Written,
    /// All before is durable.
    Synced,
    /// The space is reserved.
    Allocated,
    /// A connection came in.
    Accepted {
        /// The connection.
        socket: Socket,
        /// Who connected.
        peer: Addr,
    },
    /// The connection is open.
    Connected {
        /// The connection.
        socket: Socket,
    },
    /// So many bytes came, from `buf[from]` on; 0: the peer closed its side.
    Received(u32),
    /// All was handed to the network.
    Sent,
    /// Closed.
    Closed,
}

/// The end of one op.
#[derive(Debug)]
pub struct Completion {
    /// The op's token, as submitted.
    pub token: u64,
    /// How it ended.
    pub result: Result<Output, IoError>,
    /// The buffer of a read or receive, on success and on error.
    pub buf: Option<BufMut>,
    /// The buffers of a write or send, on success and on error; empty for other ops.
    pub bufs: IoList,
}

/// Whether opening may or must make the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    /// It must exist.
    No,
    /// Made if it does not exist.
    IfMissing,
    /// It must not exist.
    New,
}

/// How to open a file. Always for reading; for writing unless `read_only`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// Whether to make it.
    pub create: Create,
    /// Past the page cache (O_DIRECT). Where the file system refuses, the file is opened
    /// buffered and a warning is logged.
    pub direct: bool,
    /// Refuse writes.
    pub read_only: bool,
}

impl OpenOptions {
    /// An existing file, direct, for reading and writing.
    pub const EXISTING: Self = Self { create: Create::No, direct: true, read_only: false };
    /// A file that must not exist yet, direct.
    pub const NEW: Self = Self { create: Create::New, direct: true, read_only: false };
}

/// Blocking access to files, for start-up, recovery and tools; never on the IO path. Paths are
/// the host's; a simulated disk keeps its own tree.
pub trait Disk {
    /// Opens or makes a file. A made file's name is durable when this returns.
    fn open(&mut self, path: &Path, options: OpenOptions) -> Result<File, IoError>;
    /// Forgets a file; no op may be outstanding on it.
    fn close_file(&mut self, file: File);
    /// Its length in bytes.
    fn file_len(&mut self, file: File) -> Result<u64, IoError>;
    /// Fills `into` from `offset`; returns the bytes read, fewer only at the end of the file.
    /// Any alignment, direct file or not.
    fn read_blocking(&mut self, file: File, offset: u64, into: &mut [u8]) -> Result<usize, IoError>;
    /// Writes all of `from` at `offset`. On a direct file, offset and length must be multiples
    /// of 4 KiB (EINVAL otherwise); the memory may lie anywhere.
    fn write_blocking(&mut self, file: File, offset: u64, from: &[u8]) -> Result<(), IoError>;
    /// Makes all completed writes durable (fdatasync).
    fn sync_blocking(&mut self, file: File) -> Result<(), IoError>;
    /// Reserves `bytes` from `offset`, extending the file (fallocate).
    fn allocate_blocking(&mut self, file: File, offset: u64, bytes: u64) -> Result<(), IoError>;
    /// Sets the length; used to cut a file off.
    fn truncate(&mut self, file: File, bytes: u64) -> Result<(), IoError>;
    /// Makes a directory and its missing parents, durably.
    fn create_dir_all(&mut self, path: &Path) -> Result<(), IoError>;
    /// The names in a directory, sorted.
    fn list_dir(&mut self, path: &Path) -> Result<Vec<String>, IoError>;
    /// Replaces `to` by `from`, atomically and durably.
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), IoError>;
    /// Removes a file, durably. Absent is ENOENT.
    fn remove_file(&mut self, path: &Path) -> Result<(), IoError>;
    /// Whether there is anything at the path.
    fn exists(&mut self, path: &Path) -> bool;
}

/// One core's way to the world. See the module for the contract of ops.
pub trait Reactor: Disk {
    /// The monotonic clock.
    fn now(&self) -> Time;
    /// A random number; from the seed in a simulation.
    fn random(&mut self) -> u64;
    /// The core's IO memory.
    fn arena(&self) -> &Arena;
    /// Queues an op; it goes out at the next turn.
    fn submit(&mut self, token: u64, op: Op);
    /// Sends out what is queued and appends what has completed, or some of it and the rest at the next turns. Returns
    /// at once if anything completed; else waits (a short spin, then asleep in the kernel) until a completion, a
    /// wake, or the deadline. `None` waits without limit; a past deadline does not wait.
    /// May return with nothing.
    fn turn(&mut self, deadline: Option<Time>, completions: &mut Vec<Completion>);
    /// Tells how many reads the caller waits for, wherever they are served: with many of them a turn sleeps at once
    /// instead of watching for their ends.
    fn awaits_reads(&mut self, _count: usize) {}
    /// Wakes `turn` from any thread.
    fn waker(&self) -> Waker;
    /// Listens on a TCP address; port 0 picks one (see [`Reactor::listener_addr`]).
    fn listen(&mut self, addr: SocketAddr) -> Result<Listener, IoError>;
    /// Listens on a Unix socket, replacing a stale one that nobody listens on.
    fn listen_unix(&mut self, path: &Path) -> Result<Listener, IoError>;
    /// Takes over a socket that is already listening (ports chosen by a parent process).
    /// Refused with EOPNOTSUPP in a simulation.
    fn adopt_listener(&mut self, fd: OwnedFd) -> Result<Listener, IoError>;
    /// Gives a socket up to another reactor, which adopts it. Refused with EBUSY while ops are outstanding on it, with
    /// EOPNOTSUPP in a simulation.
    fn give_away(&mut self, socket: Socket) -> Result<OwnedFd, IoError>;
    /// Takes over a connected socket that another reactor gave away.
    fn adopt_socket(&mut self, fd: OwnedFd) -> Result<Socket, IoError>;
    /// How long what was sent on a TCP connection may stay unacknowledged before the connection is over, and what is left of
    /// it with it. No connection of a simulation is ever that patient.
    fn limit_unacknowledged(&mut self, _socket: Socket, _most: Span) {}
    /// Where a listener listens.
    fn listener_addr(&self, listener: Listener) -> Result<Addr, IoError>;
    /// Counters since the start.
    fn stats(&self) -> Stats;
}

/// What a reactor has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Calls of `turn`.
    pub turns: u64,
    /// Ops completed.
    pub completions: u64,
    /// System calls that entered the ring.
    pub enters: u64,
    /// Of these, those that went to sleep.
    pub sleeps: u64,
    /// Spins that found work, so that a sleep was saved.
    pub spins_won: u64,
    /// Spins in vain.
    pub spins_lost: u64,
    /// Times the completion queue overflowed (nothing is lost, but it costs).
    pub overflows: u64,
    /// Ops submitted and not yet completed.
    pub in_flight: u32,
    /// Connected sockets open now.
    pub sockets: u32,
}
