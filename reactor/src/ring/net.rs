//! Sockets of the ring: making them, their order of sends, and their end.
//!
//! Invariants: a socket has at most one send and one receive in the kernel; its descriptor is
//! closed only when no op on it is left.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket as OsSocket, TcpKeepalive, Type};

use super::Ring;
use super::ops::Kind;
use crate::api::{Addr, IoError, Listener, Output, Socket};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// SYNs sent again before a connect fails: 1 + 2 + 4 s.
const SYN_RETRIES: u32 = 2;

pub(super) struct SocketEntry {
    pub(super) fd: OwnedFd,
    pub(super) ends: Ending,
    /// Sends that wait for the one in the kernel, by slot.
    pub(super) sends: VecDeque<u32>,
    pub(super) sending: bool,
    pub(super) receiving: bool,
}

pub(super) struct ListenEntry {
    pub(super) fd: OwnedFd,
    pub(super) ends: Ending,
}

/// How far a socket or listener is on its way out.
#[derive(Default)]
pub(super) struct Ending {
    /// Ops in the kernel or on their way there.
    pub(super) outstanding: u32,
    /// The close's token, once asked for.
    pub(super) closing: Option<u64>,
    /// The cancel has been through the kernel.
    pub(super) cancelled: bool,
}

impl Ending {
    pub(super) fn is_over(&self) -> bool {
        self.closing.is_some() && self.cancelled && self.outstanding == 0
    }
}

impl SocketEntry {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, ends: Ending::default(), sends: VecDeque::new(), sending: false, receiving: false }
    }
}

impl Ring {
    pub(super) fn add_socket(&mut self, fd: OwnedFd) -> Socket {
        let (index, generation) = self.sockets.insert(SocketEntry::new(fd));
        Socket { index, generation }
    }

    /// The socket itself, if nothing is under way on it.
    pub(super) fn remove_socket(&mut self, socket: Socket) -> Result<OwnedFd, IoError> {
        let refused = |errno| Err(IoError::new("give a socket away", errno));
        match self.live_socket(socket) {
            None => refused(libc::EBADF),
            Some(entry) if entry.ends.outstanding > 0 || !entry.sends.is_empty() => refused(libc::EBUSY),
            Some(_) => {
                let entry = self.sockets.remove(socket.index, socket.generation);
                Ok(entry.expect("it is live").fd)
            }
        }
    }

    pub(super) fn add_listener(&mut self, socket: OsSocket) -> Listener {
        let (index, generation) =
            self.listeners.insert(ListenEntry { fd: socket.into(), ends: Ending::default() });
        Listener { index, generation }
    }

    pub(super) fn local_addr(&self, listener: Listener) -> Result<Addr, IoError> {
        let bad = IoError::new("ask a listener's address", libc::EBADF);
        let entry = self.listeners.get(listener.index, listener.generation).ok_or(bad)?;
        let addr = SockRef::from(&entry.fd).local_addr();
        addr.map(|addr| to_addr(&addr)).map_err(|e| IoError::from_io("ask a listener's address", &e))
    }

    /// Starts the end of a socket: waiting sends fail at once, what is in the kernel is cancelled.
    pub(super) fn close_socket(&mut self, token: u64, socket: Socket) {
        let Some(entry) = self.live_socket(socket) else {
            return self.complete_plain(token, Err(IoError::new("close", libc::EBADF)));
        };
        entry.ends.closing = Some(token);
        entry.ends.cancelled = entry.ends.outstanding == 0;
        let fd = entry.fd.as_raw_fd();
        let waiting = std::mem::take(&mut entry.sends);
        for slot in waiting {
            self.end_slot(slot, Err(IoError::new("send", libc::ECANCELED)));
        }
        self.cancel_or_close(fd, Kind::CancelSocket { socket });
    }

    /// The same for a listener.
    pub(super) fn close_listener(&mut self, token: u64, listener: Listener) {
        let Some(entry) = self.live_listener(listener) else {
            return self.complete_plain(token, Err(IoError::new("close", libc::EBADF)));
        };
        entry.ends.closing = Some(token);
        entry.ends.cancelled = entry.ends.outstanding == 0;
        let fd = entry.fd.as_raw_fd();
        self.cancel_or_close(fd, Kind::CancelListener { listener });
    }

    fn cancel_or_close(&mut self, fd: RawFd, kind: Kind) {
        let over = match kind {
            Kind::CancelSocket { socket } => self.close_if_over(socket),
            Kind::CancelListener { listener } => self.close_listener_if_over(listener),
            _ => unreachable!("only cancels get here"),
        };
        if !over {
            let slot = self.new_slot(0, kind);
            self.slots[slot as usize].fd = fd;
            self.queue.push_back(slot);
        }
    }

    /// The cancel has been through; what it did not find ends by the shutdown.
    pub(super) fn socket_cancelled(&mut self, socket: Socket) {
        let entry = self.sockets.get_mut(socket.index, socket.generation);
        let entry = entry.expect("a closing socket stays until its cancel is through");
        entry.ends.cancelled = true;
        if entry.ends.outstanding > 0 {
            let _ = SockRef::from(&entry.fd).shutdown(std::net::Shutdown::Both);
        }
        self.close_if_over(socket);
    }

    pub(super) fn listener_cancelled(&mut self, listener: Listener) {
        let entry = self.listeners.get_mut(listener.index, listener.generation);
        let entry = entry.expect("a closing listener stays until its cancel is through");
        entry.ends.cancelled = true;
        if entry.ends.outstanding > 0 {
            let _ = SockRef::from(&entry.fd).shutdown(std::net::Shutdown::Both);
        }
        self.close_listener_if_over(listener);
    }

    pub(super) fn close_if_over(&mut self, socket: Socket) -> bool {
        let entry = self.sockets.get(socket.index, socket.generation);
        if !entry.is_some_and(|entry| entry.ends.is_over()) {
            return false;
        }
        let entry = self.sockets.remove(socket.index, socket.generation);
        let token = entry.and_then(|entry| entry.ends.closing).expect("a socket that is over was closed");
        self.complete_plain(token, Ok(Output::Closed));
        true
    }

    pub(super) fn close_listener_if_over(&mut self, listener: Listener) -> bool {
        let entry = self.listeners.get(listener.index, listener.generation);
        if !entry.is_some_and(|entry| entry.ends.is_over()) {
            return false;
        }
        let entry = self.listeners.remove(listener.index, listener.generation);
        let token = entry.and_then(|entry| entry.ends.closing).expect("a listener that is over was closed");
        self.complete_plain(token, Ok(Output::Closed));
        true
    }

    pub(super) fn live_socket(&mut self, socket: Socket) -> Option<&mut SocketEntry> {
        self.sockets.get_mut(socket.index, socket.generation).filter(|s| s.ends.closing.is_none())
    }

    pub(super) fn live_listener(&mut self, listener: Listener) -> Option<&mut ListenEntry> {
        self.listeners.get_mut(listener.index, listener.generation).filter(|l| l.ends.closing.is_none())
    }

    pub(super) fn close_all_sockets(&mut self) {
        self.sockets.drain().for_each(drop);
        self.listeners.drain().for_each(drop);
    }
}

/// An address as the kernel gave it.
pub(super) fn to_addr(addr: &SockAddr) -> Addr {
    match addr.as_socket() {
        Some(addr) => Addr::Tcp(addr),
        None => Addr::Unix(addr.as_pathname().map(Path::to_path_buf).unwrap_or_default()),
    }
}

pub(super) fn from_addr(addr: &Addr) -> io::Result<SockAddr> {
    match addr {
        Addr::Tcp(addr) => Ok((*addr).into()),
        Addr::Unix(path) => SockAddr::unix(path),
    }
}

/// An unconnected socket that suits the address.
pub(super) fn new_socket(addr: &Addr) -> io::Result<OsSocket> {
    match addr {
        Addr::Tcp(addr) => {
            let socket = OsSocket::new(Domain::for_address(*addr), Type::STREAM, Some(Protocol::TCP))?;
            tune_tcp(&socket)?;
            socket.set_tcp_nodelay(true)?;
            set_syn_retries(&socket);
            Ok(socket)
        }
        Addr::Unix(_) => OsSocket::new(Domain::UNIX, Type::STREAM, None),
    }
}

/// Options of every TCP socket; accepted ones inherit them from their listener.
fn tune_tcp(socket: &OsSocket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    leave_pacer(socket);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(3))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// Where BBR is the system's congestion control, this socket takes another one. BBR sends at the rate it
/// has seen lately; after small messages alone that is low, and the next burst, with all that is
/// behind it, waits for up to 70 ms on a link that could take it at once (docs/performance.md).
pub(super) fn leave_pacer(socket: &OsSocket) {
    if socket.tcp_congestion().is_ok_and(|name| name.starts_with(b"bbr")) {
        // Cubic may ask for CAP_NET_ADMIN; reno is in every kernel and for everybody. Without either
        // it works all the same.
        let _ = [&b"cubic"[..], b"reno"].iter().find(|name| socket.set_tcp_congestion(name).is_ok());
    }
}

/// Sets `TCP_USER_TIMEOUT` (RFC 5482). A socket that knows none is left as it is.
pub(super) fn limit_unacknowledged(socket: &OwnedFd, most: Duration) {
    if let Err(error) = SockRef::from(socket).set_tcp_user_timeout(Some(most)) {
        tracing::debug!(%error, "no limit for unacknowledged data");
    }
}

fn set_syn_retries(socket: &OsSocket) {
    let retries: libc::c_int = SYN_RETRIES as libc::c_int;
    // SAFETY: the option takes an int; pointer and length are those of one. A refusal only means
    // that a connect takes longer to fail.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SYNCNT,
            (&raw const retries).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

pub(super) fn listen_tcp(addr: SocketAddr) -> io::Result<OsSocket> {
    let socket = OsSocket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    tune_tcp(&socket)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// A Unix listener. A socket file that nobody listens on any more is replaced; one that is in
/// use, or is no socket, is left alone (EADDRINUSE).
pub(super) fn listen_unix(path: &Path) -> io::Result<OsSocket> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = path.symlink_metadata().is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let socket = OsSocket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

pub(super) fn adopt(fd: OwnedFd) -> io::Result<OsSocket> {
    let socket = OsSocket::from(fd);
    if !socket.is_listener()? {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // The ring waits in the kernel; a non-blocking descriptor would answer EAGAIN instead.
    socket.set_nonblocking(false)?;
    if socket.local_addr()?.as_socket().is_some() {
        tune_tcp(&socket)?;
    }
    Ok(socket)
}
