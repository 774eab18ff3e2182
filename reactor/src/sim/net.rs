//! The simulated network: connections with ordered delivery, delays by the seed, partitions.
//!
//! A connection is two ends, each with what has arrived and not been received. What is sent
//! travels as an event; it arrives no earlier than what was sent before. Sends wait while the
//! other end has a window's worth unreceived or on the way.

use std::collections::{BTreeMap, VecDeque};

use protocol::types::{Span, Time};

use super::{Event, Partitions, World, gather, pair};
use crate::api::{Addr, Completion, IoError, IoList, Listener, Op, Output, Socket, list_len};
use crate::arena::BufMut;
use crate::ring::split_mix;
use crate::table::Table;

/// Bytes on the way and unreceived that stop further sends.
const WINDOW_BYTES: usize = 1 << 20;
/// How long a connect to beyond a partition takes to fail.
const CONNECT_TIMEOUT: Span = Span::ms(7_000);

#[derive(Default)]
pub(super) struct Net {
    listeners: Table<SimListener>,
    ends: Table<End>,
    names: BTreeMap<Addr, Listener>,
    partitions: Partitions,
    /// Pairs of nodes between which everything takes longer.
    slow: BTreeMap<(usize, usize), Span>,
    /// Parcels between nodes below a number that have a bit inverted on their way, in ppm.
    pub(super) flips: (u32, usize),
    pub(super) flipped: u64,
    /// Held by a partition, in order.
    held: Vec<((usize, usize), NetEvent)>,
    next_port: u16,
}

struct SimListener {
    node: usize,
    addr: Addr,
    accepts: VecDeque<u64>,
    /// Connections not yet accepted: the ends on this side.
    backlog: VecDeque<(Socket, Addr)>,
}

/// One end of a connection.
struct End {
    node: usize,
    peer: Option<Socket>,
    peer_node: usize,
    /// The owner holds a handle: accepted or connected.
    inbox: Inbox,
    /// After the inbox: the end of the stream, or an error.
    ended: Option<Result<(), i32>>,
    recv: Option<(u64, BufMut, usize, usize)>,
    sends: VecDeque<(u64, IoList)>,
    /// Sent towards the peer and not yet received there.
    unreceived: usize,
    /// When the last of what was sent arrives.
    last_arrival: Time,
    /// What comes takes a long way round: kept here until it is through.
    detour: Option<VecDeque<Parcel>>,
}

/// What has arrived: parcels in order, the first of them received up to `used`.
#[derive(Default)]
struct Inbox {
    parcels: VecDeque<Vec<u8>>,
    used: usize,
}

impl Inbox {
    fn push(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.parcels.push_back(bytes);
        }
    }

    fn is_empty(&self) -> bool {
        self.parcels.is_empty()
    }

    /// Moves as much as there is, or fits; tells how much.
    fn take(&mut self, into: &mut [u8]) -> usize {
        let mut count = 0;
        while let Some(first) = self.parcels.front().filter(|_| count < into.len()) {
            let piece = (first.len() - self.used).min(into.len() - count);
            into[count..count + piece].copy_from_slice(&first[self.used..self.used + piece]);
            count += piece;
            self.used += piece;
            if self.used == first.len() {
                self.parcels.pop_front();
                self.used = 0;
            }
        }
        count
    }
}

#[derive(Clone)]
pub(super) enum NetEvent {
    /// A connect reaches its listener.
    Connect {
        node: usize,
        life: u32,
        token: u64,
        addr: Addr,
    },
    ConnectFailed {
        node: usize,
        life: u32,
        token: u64,
        addr: Addr,
        errno: i32,
    },
    /// The accepting side's answer reaches the connector.
    Connected {
        node: usize,
        life: u32,
        token: u64,
        socket: Socket,
    },
    Arrive {
        to: Socket,
        what: Parcel,
    },
    /// What took a long way round is through.
    Through {
        to: Socket,
    },
}

#[derive(Clone)]
pub(super) enum Parcel {
    Bytes(Vec<u8>),
    End(Result<(), i32>),
}

impl Net {
    pub(super) fn listen(&mut self, node: usize, addr: Addr) -> Result<Listener, IoError> {
        let addr = match addr {
            Addr::Tcp(mut tcp) if tcp.port() == 0 => {
                self.next_port += 1;
                tcp.set_port(20_000 + self.next_port);
                Addr::Tcp(tcp)
            }
            addr => addr,
        };
        if self.names.contains_key(&addr) {
            return Err(IoError::new("listen on", libc::EADDRINUSE).at(addr));
        }
        let entry =
            SimListener { node, addr: addr.clone(), accepts: VecDeque::new(), backlog: VecDeque::new() };
        let (index, generation) = self.listeners.insert(entry);
        let listener = Listener { index, generation };
        self.names.insert(addr, listener);
        Ok(listener)
    }

    pub(super) fn listener_addr(&self, listener: Listener) -> Result<Addr, IoError> {
        let entry = self.listeners.get(listener.index, listener.generation);
        entry.map(|entry| entry.addr.clone()).ok_or(IoError::new("ask a listener's address", libc::EBADF))
    }

    pub(super) fn sockets_of(&self, node: usize) -> u32 {
        self.ends.iter().filter(|(_, end)| end.node == node).count() as u32
    }

    pub(super) fn partition(&mut self, from: usize, to: usize) {
        self.partitions.insert((from, to));
    }

    pub(super) fn slow(&mut self, a: usize, b: usize, extra: Span) {
        self.slow.insert(pair(a, b), extra);
    }

    pub(super) fn heal(&mut self, a: usize, b: usize) -> Vec<NetEvent> {
        self.partitions.remove(&(a, b));
        self.partitions.remove(&(b, a));
        let (freed, held) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|((from, to), _)| pair(*from, *to) == pair(a, b));
        self.held = held;
        let freed: Vec<((usize, usize), NetEvent)> = freed;
        freed.into_iter().map(|(_, event)| event).collect()
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.partitions.contains(&(a, b)) || self.partitions.contains(&(b, a))
    }

    fn end(&mut self, socket: Socket) -> Option<&mut End> {
        self.ends.get_mut(socket.index, socket.generation)
    }

    fn add_end(&mut self, node: usize, peer_node: usize) -> Socket {
        let end = End {
            node,
            peer: None,
            peer_node,
            inbox: Inbox::default(),
            ended: None,
            recv: None,
            sends: VecDeque::new(),
            unreceived: 0,
            last_arrival: Time(0),
            detour: None,
        };
        let (index, generation) = self.ends.insert(end);
        Socket { index, generation }
    }

    /// Where an event travels: from which node to which.
    fn route(&self, event: &NetEvent) -> Option<(usize, usize)> {
        match event {
            NetEvent::Arrive { to, .. } => {
                let end = self.ends.get(to.index, to.generation)?;
                Some((end.peer_node, end.node))
            }
            NetEvent::Connected { node, socket, .. } => {
                let end = self.ends.get(socket.index, socket.generation)?;
                Some((end.peer_node, *node))
            }
            _ => None,
        }
    }
}

impl World {
    pub(super) fn start_net_op(&mut self, node: usize, token: u64, op: Op) {
        match op {
            Op::Accept { listener } => match self.own_listener(node, listener) {
                None => self.complete_plain(node, token, Err(IoError::new("accept", libc::EBADF))),
                Some(entry) => {
                    entry.accepts.push_back(token);
                    self.pump_accepts(listener);
                }
            },
            Op::Connect { addr } => {
                let (life, after) = (self.nodes[node].life, self.between(20, 200));
                self.schedule(after, Event::Net(NetEvent::Connect { node, life, token, addr }));
            }
            Op::Recv { socket, buf, from, to } => {
                assert!(from < to && to as usize <= buf.len(), "a receive must fit in its buffer");
                match self.own_end(node, socket) {
                    None => {
                        let result = Err(IoError::new("receive", libc::EBADF));
                        self.complete(
                            node,
                            Completion { token, result, buf: Some(buf), bufs: IoList::new() },
                        );
                    }
                    Some(end) => {
                        assert!(end.recv.is_none(), "one receive at a time a socket");
                        end.recv = Some((token, buf, from as usize, to as usize));
                        self.pump_recv(socket);
                    }
                }
            }
            Op::Send { socket, bufs } => match self.own_end(node, socket) {
                None => {
                    let result = Err(IoError::new("send", libc::EBADF));
                    self.complete(node, Completion { token, result, buf: None, bufs });
                }
                Some(end) => {
                    end.sends.push_back((token, bufs));
                    self.pump_sends(socket);
                }
            },
            Op::Close { socket } => self.close(node, token, socket),
            Op::CloseListener { listener } => self.close_listener(node, token, listener),
            Op::ReadAt { .. } | Op::WriteAt { .. } | Op::Sync { .. } | Op::Allocate { .. } => {
                unreachable!("disk ops do not get here")
            }
        }
    }

    fn own_end(&mut self, node: usize, socket: Socket) -> Option<&mut End> {
        self.net.end(socket).filter(|end| end.node == node)
    }

    fn own_listener(&mut self, node: usize, listener: Listener) -> Option<&mut SimListener> {
        self.net.listeners.get_mut(listener.index, listener.generation).filter(|entry| entry.node == node)
    }

    pub(super) fn net_event(&mut self, event: NetEvent) {
        if let Some(route) = self.net.route(&event)
            && self.net.partitions.contains(&route)
        {
            self.net.held.push((route, event));
            return;
        }
        match event {
            NetEvent::Connect { node, life, token, addr } => self.connect(node, life, token, addr),
            NetEvent::ConnectFailed { node, life, token, addr, errno } => {
                if self.is_life(node, life) {
                    let error = IoError::new("connect to", errno).at(addr);
                    self.complete_plain(node, token, Err(error));
                }
            }
            NetEvent::Connected { node, life, token, socket } => {
                if self.is_life(node, life) {
                    self.complete_plain(node, token, Ok(Output::Connected { socket }));
                }
            }
            NetEvent::Arrive { to, what } => self.arrive(to, what),
            NetEvent::Through { to } => {
                let kept = self.net.end(to).and_then(|end| end.detour.take());
                kept.into_iter().flatten().for_each(|what| self.arrive(to, what));
            }
        }
    }

    fn is_life(&self, node: usize, life: u32) -> bool {
        self.nodes[node].life == life && self.nodes[node].running
    }

    fn connect(&mut self, node: usize, life: u32, token: u64, addr: Addr) {
        if !self.is_life(node, life) {
            return;
        }
        let found = self.net.names.get(&addr).copied();
        let server = found.and_then(|l| Some(self.net.listeners.get(l.index, l.generation)?.node));
        let (Some(listener), Some(server)) = (found, server) else {
            let after = self.between(20, 200);
            let errno = libc::ECONNREFUSED;
            return self
                .schedule(after, Event::Net(NetEvent::ConnectFailed { node, life, token, addr, errno }));
        };
        if self.net.is_cut(node, server) {
            let errno = libc::ETIMEDOUT;
            let event = NetEvent::ConnectFailed { node, life, token, addr, errno };
            return self.schedule(CONNECT_TIMEOUT, Event::Net(event));
        }
        let near = self.net.add_end(node, server);
        let far = self.net.add_end(server, node);
        self.net.end(near).expect("just made").peer = Some(far);
        self.net.end(far).expect("just made").peer = Some(near);
        let peer = Addr::Unix(format!("sim-node-{node}").into());
        let entry = self.net.listeners.get_mut(listener.index, listener.generation);
        entry.expect("found above").backlog.push_back((far, peer));
        self.pump_accepts(listener);
        let after = self.between(20, 200);
        self.schedule(after, Event::Net(NetEvent::Connected { node, life, token, socket: near }));
    }

    fn pump_accepts(&mut self, listener: Listener) {
        let Some(entry) = self.net.listeners.get_mut(listener.index, listener.generation) else { return };
        let node = entry.node;
        let mut accepted = Vec::new();
        while !entry.accepts.is_empty() && !entry.backlog.is_empty() {
            accepted.extend(entry.accepts.pop_front().zip(entry.backlog.pop_front()));
        }
        for (token, (socket, peer)) in accepted {
            self.complete_plain(node, token, Ok(Output::Accepted { socket, peer }));
        }
    }

    /// Sends what the window lets through; a dead peer fails the rest.
    fn pump_sends(&mut self, socket: Socket) {
        loop {
            let Some(end) = self.net.end(socket) else { return };
            let node = end.node;
            let gone = end.peer.is_none() || matches!(end.ended, Some(Err(_)));
            if !gone && end.unreceived >= WINDOW_BYTES {
                return;
            }
            let Some((token, bufs)) = end.sends.pop_front() else { return };
            let result = if gone {
                Err(IoError::new("send", libc::EPIPE))
            } else {
                end.unreceived += list_len(&bufs);
                let bytes = gather(&bufs);
                self.post(socket, Parcel::Bytes(bytes));
                Ok(Output::Sent)
            };
            self.complete(node, Completion { token, result, buf: None, bufs });
        }
    }

    /// Puts something on the way to the other end, behind all that went before.
    fn post(&mut self, from: Socket, what: Parcel) {
        let (delay, now) = (self.between(20, 200), self.now);
        let what = self.damage(from, what);
        let Some(end) = self.net.end(from) else { return };
        let Some(to) = end.peer else { return };
        let route = pair(end.node, end.peer_node);
        let extra = self.net.slow.get(&route).copied().unwrap_or_default();
        let Some(end) = self.net.end(from) else { return };
        let at = (now + delay + extra).max(end.last_arrival);
        end.last_arrival = at;
        self.schedule(at - now, Event::Net(NetEvent::Arrive { to, what }));
    }

    fn damage(&mut self, from: Socket, mut what: Parcel) -> Parcel {
        let (ppm, below) = self.net.flips;
        if ppm == 0 {
            return what;
        }
        let among = self.net.end(from).is_some_and(|end| end.node.max(end.peer_node) < below);
        if let Parcel::Bytes(bytes) = &mut what
            && among
            && split_mix(&mut self.random) % 1_000_000 < u64::from(ppm)
        {
            self.net.flipped += 1;
            let bit = split_mix(&mut self.random) % (bytes.len() as u64 * 8);
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        what
    }

    fn arrive(&mut self, to: Socket, what: Parcel) {
        let Some(end) = self.net.end(to) else { return };
        if end.ended.is_some() {
            return;
        }
        if let Some(detour) = &mut end.detour {
            return detour.push_back(what);
        }
        match what {
            Parcel::Bytes(bytes) => end.inbox.push(bytes),
            Parcel::End(how) => {
                end.ended = Some(how);
                end.peer = None;
            }
        }
        self.pump_recv(to);
        self.pump_sends(to);
    }

    fn pump_recv(&mut self, socket: Socket) {
        let Some(end) = self.net.end(socket) else { return };
        let (node, peer) = (end.node, end.peer);
        let reset = matches!(end.ended, Some(Err(_)));
        if end.inbox.is_empty() && end.ended.is_none() {
            return;
        }
        let Some((token, mut buf, from, to)) = end.recv.take() else { return };
        let count = if reset { 0 } else { end.inbox.take(&mut buf[from..to]) };
        let result = match end.ended {
            Some(Err(errno)) => Err(IoError::new("receive", errno)),
            _ => Ok(Output::Received(count as u32)),
        };
        self.complete(node, Completion { token, result, buf: Some(buf), bufs: IoList::new() });
        if let Some(peer) = peer
            && let Some(end) = self.net.end(peer)
        {
            end.unreceived -= count;
            self.pump_sends(peer);
        }
    }

    fn close(&mut self, node: usize, token: u64, socket: Socket) {
        if self.own_end(node, socket).is_none() {
            return self.complete_plain(node, token, Err(IoError::new("close", libc::EBADF)));
        }
        self.post(socket, Parcel::End(Ok(())));
        let end = self.net.ends.remove(socket.index, socket.generation).expect("looked up above");
        self.orphan(end.peer);
        for (token, bufs) in end.sends {
            let result = Err(IoError::new("send", libc::ECANCELED));
            self.complete(node, Completion { token, result, buf: None, bufs });
        }
        if let Some((token, buf, ..)) = end.recv {
            let result = Err(IoError::new("receive", libc::ECANCELED));
            self.complete(node, Completion { token, result, buf: Some(buf), bufs: IoList::new() });
        }
        self.complete_plain(node, token, Ok(Output::Closed));
    }

    /// The peer of this end is gone: what it still sends is lost, so its window stays open.
    fn orphan(&mut self, end: Option<Socket>) {
        if let Some(end) = end.and_then(|socket| self.net.end(socket)) {
            end.unreceived = 0;
        }
    }

    fn close_listener(&mut self, node: usize, token: u64, listener: Listener) {
        if self.own_listener(node, listener).is_none() {
            return self.complete_plain(node, token, Err(IoError::new("close", libc::EBADF)));
        }
        for accept in self.drop_listener(listener) {
            self.complete_plain(node, accept, Err(IoError::new("accept", libc::ECANCELED)));
        }
        self.complete_plain(node, token, Ok(Output::Closed));
    }

    /// Forgets a listener, resetting what it had not accepted; returns the accepts it owed.
    fn drop_listener(&mut self, listener: Listener) -> VecDeque<u64> {
        let entry = self.net.listeners.remove(listener.index, listener.generation);
        let entry = entry.expect("looked up by the caller");
        self.net.names.remove(&entry.addr);
        for (socket, _) in entry.backlog {
            self.reset_end(socket);
        }
        entry.accepts
    }

    /// Forgets an end without a word to its owner; its peer will see a reset.
    fn reset_end(&mut self, socket: Socket) {
        self.post(socket, Parcel::End(Err(libc::ECONNRESET)));
        let end = self.net.ends.remove(socket.index, socket.generation);
        self.orphan(end.and_then(|end| end.peer));
    }

    /// A node died: all its ends and listeners go.
    pub(super) fn reset_node(&mut self, node: usize) {
        let listeners: Vec<Listener> = self.net.names.values().copied().collect();
        for listener in listeners {
            if self.own_listener(node, listener).is_some() {
                self.drop_listener(listener);
            }
        }
        for socket in self.ends_where(|end| end.node == node) {
            self.reset_end(socket);
        }
    }

    pub(super) fn reset_between(&mut self, a: usize, b: usize) {
        for socket in self.ends_where(|end| pair(end.node, end.peer_node) == pair(a, b)) {
            self.arrive(socket, Parcel::End(Err(libc::ECONNRESET)));
        }
    }

    /// All that `from` sends `to` on the connections of now arrives only after this time.
    pub(super) fn detour(&mut self, from: usize, to: usize, lasts: Span) {
        for socket in self.ends_where(|end| end.node == to && end.peer_node == from && end.ended.is_none()) {
            let end = self.net.end(socket).expect("just found");
            if end.detour.is_none() {
                end.detour = Some(VecDeque::new());
                self.schedule(lasts, Event::Net(NetEvent::Through { to: socket }));
            }
        }
    }

    /// `from` sees its connections to `to` reset; `to` does so behind all that is on its way there.
    pub(super) fn reset_one_side(&mut self, from: usize, to: usize) {
        for socket in self.ends_where(|end| end.node == from && end.peer_node == to) {
            self.post(socket, Parcel::End(Err(libc::ECONNRESET)));
            self.arrive(socket, Parcel::End(Err(libc::ECONNRESET)));
        }
    }

    fn ends_where(&self, keep: impl Fn(&End) -> bool) -> Vec<Socket> {
        let ends = self.net.ends.iter().filter(|(_, end)| keep(end));
        ends.map(|((index, generation), _)| Socket { index, generation }).collect()
    }
}
