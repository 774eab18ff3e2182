//! The links of a shard to its peers.
//!
//! Each shard opens one link to every peer it has something to say to; Raft messages, IO and
//! fetches go out on one's own link, and the answers to IO and fetches come back on the link that
//! the question came by. So a link that breaks takes its questions and their answers with it,
//! and the asker knows.
//!
//! A new incoming link from a shard replaces the one there was *before* anything is taken from
//! it: that, with the term in each request, is why a delayed write can never overtake a later one.
//!
//! The shards of the same target are reached by mailboxes ([`crate::siblings`]), which never break.

#[cfg(test)]
mod tests;

use crate::mem::{Mem, Mems};
use crate::siblings::{Delivery, Guest, Sibling};
use chunkstore::Payload;
use protocol::map::ClusterMap;
use protocol::peer::{Hello, IoOp, IoRequest, PeerMessage};
use protocol::types::{BLOCK_BYTES, ShardAddr, Span, Time};
use reactor::{Addr, Arena, Completion, IoList, Op, Output, Reactor, Socket};
use slab::Slab;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use transport::{Owner, PeerConn, PeerEvent, PeerLimits};

/// The first pause before a peer is tried again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Span = Span::ms(20);
/// The longest pause.
const RETRY_MAX: Span = Span::ms(500);
/// Most links that others may hold to this shard.
const INCOMING_MAX: usize = 4096;

/// How long a peer may leave what was sent unacknowledged before its link is over. A write that lies in a socket's buffer
/// while the network is cut would else arrive when that heals, long after its host took another path: hosts wait for 30 s
/// as a rule.
const UNACKNOWLEDGED_MAX: Span = Span::ms(10_000);

/// What the links tell the loop.
pub enum LinkEvent {
    /// A shard can be reached.
    Up(ShardAddr),
    /// It cannot any more.
    Down(ShardAddr),
    /// A message; `incoming` names the link to answer on, `None` for one's own.
    Message { from: ShardAddr, incoming: Option<u64>, message: PeerMessage, payload: Mems },
    /// A host that another shard of this target accepted.
    Guest(Guest),
}

enum Side {
    Outgoing(ShardAddr),
    Incoming { from: Option<ShardAddr>, serial: u64 },
}

struct Link {
    conn: PeerConn,
    side: Side,
}

/// One's own link to a peer.
struct Outgoing {
    addr: SocketAddr,
    state: State,
    pause: Span,
}

enum State {
    Idle { retry_at: Time },
    Connecting,
    Link(usize),
}

/// All links of one shard.
pub struct Links {
    link_kind: u8,
    connect_kind: u8,
    me: ShardAddr,
    /// Unknown until the first map: until then nobody is let in.
    cluster: Option<[u8; 16]>,
    incarnation: u64,
    links: Slab<Link>,
    outgoing: BTreeMap<ShardAddr, Outgoing>,
    /// Connects under way: token index to peer.
    connecting: Slab<ShardAddr>,
    /// Incoming links by serial, for answers.
    serials: BTreeMap<u64, usize>,
    next_serial: u64,
    events: Vec<LinkEvent>,
    /// Of one link; empty between calls.
    heard: Vec<PeerEvent>,
    siblings: Vec<Sibling>,
    /// Whether the siblings were told as up.
    siblings_up: bool,
}

impl Links {
    /// No links yet, only siblings. Tokens of links have `link_kind`, those of connects `connect_kind`.
    pub fn new(
        link_kind: u8,
        connect_kind: u8,
        me: ShardAddr,
        incarnation: u64,
        siblings: Vec<Sibling>,
    ) -> Self {
        Self {
            link_kind,
            connect_kind,
            me,
            cluster: None,
            incarnation,
            links: Slab::new(),
            outgoing: BTreeMap::new(),
            connecting: Slab::new(),
            serials: BTreeMap::new(),
            next_serial: 0,
            events: Vec::new(),
            heard: Vec::new(),
            siblings,
            siblings_up: false,
        }
    }

    /// Keeps links to all shards of the map.
    pub fn set_map(&mut self, map: &ClusterMap, now: Time) {
        self.cluster = Some(map.cluster);
        if !std::mem::replace(&mut self.siblings_up, true) {
            let target = self.me.target;
            let up = self.siblings.iter().map(|s| LinkEvent::Up(ShardAddr { target, shard: s.shard() }));
            self.events.extend(up);
        }
        for (target, entry) in &map.targets {
            for (shard, addr) in entry.peers.iter().enumerate() {
                let peer = ShardAddr { target: *target, shard: shard as u16 };
                if *target == self.me.target {
                    continue;
                }
                let fresh = Outgoing { addr: *addr, state: State::Idle { retry_at: now }, pause: RETRY_MIN };
                self.outgoing.entry(peer).or_insert(fresh).addr = *addr;
            }
        }
    }

    /// When to call [`Links::tick`].
    pub fn next_timeout(&self) -> Option<Time> {
        let idle = |o: &Outgoing| match o.state {
            State::Idle { retry_at } => Some(retry_at),
            _ => None,
        };
        self.outgoing.values().filter_map(idle).min()
    }

    /// Connects to peers whose time has come.
    pub fn tick<R: Reactor>(&mut self, reactor: &mut R, now: Time) {
        for (peer, outgoing) in &mut self.outgoing {
            if matches!(outgoing.state, State::Idle { retry_at } if retry_at <= now) {
                outgoing.state = State::Connecting;
                let index = self.connecting.insert(*peer) as u32;
                let token = Owner { kind: self.connect_kind, index }.token(0);
                reactor.submit(token, Op::Connect { addr: Addr::Tcp(outgoing.addr) });
            }
        }
    }

    /// Checks the clocks of links that have not said hello. To be called about once a second.
    pub fn tick_slow<R: Reactor>(&mut self, reactor: &mut R, now: Time) {
        for key in self.keys() {
            let mut events = Vec::new();
            self.links[key].conn.tick(reactor, now, &mut events);
            self.take(reactor, key, &mut events);
        }
    }

    fn keys(&self) -> Vec<usize> {
        self.links.iter().map(|(key, _)| key).collect()
    }

    /// A connect has ended.
    pub fn connected<R: Reactor>(&mut self, reactor: &mut R, completion: Completion) {
        let (owner, _) = Owner::split(completion.token);
        let Some(peer) = self.connecting.try_remove(owner.index as usize) else { return };
        match completion.result {
            Ok(Output::Connected { socket }) => self.greet(reactor, peer, socket),
            _ => self.retry_later(reactor.now(), peer),
        }
    }

    fn greet<R: Reactor>(&mut self, reactor: &mut R, peer: ShardAddr, socket: Socket) {
        let key = self.links.vacant_key();
        let owner = Owner { kind: self.link_kind, index: key as u32 };
        let Some(hello) = self.hello(peer) else { return close(reactor, socket) };
        reactor.limit_unacknowledged(socket, UNACKNOWLEDGED_MAX);
        match PeerConn::connected(reactor, socket, owner, PeerLimits::default(), hello) {
            Some(conn) => {
                self.links.insert(Link { conn, side: Side::Outgoing(peer) });
                if let Some(outgoing) = self.outgoing.get_mut(&peer) {
                    outgoing.state = State::Link(key);
                }
            }
            None => {
                close(reactor, socket);
                self.retry_later(reactor.now(), peer);
            }
        }
    }

    fn hello(&self, to: ShardAddr) -> Option<Hello> {
        let cluster = self.cluster?;
        Some(Hello { cluster, from: self.me, to, incarnation: self.incarnation })
    }

    fn retry_later(&mut self, now: Time, peer: ShardAddr) {
        if let Some(outgoing) = self.outgoing.get_mut(&peer) {
            outgoing.state = State::Idle { retry_at: now + outgoing.pause };
            outgoing.pause = Span(outgoing.pause.0 * 2).min(RETRY_MAX);
        }
    }

    /// Somebody connected to this shard's port.
    pub fn accepted<R: Reactor>(&mut self, reactor: &mut R, socket: Socket) {
        let key = self.links.vacant_key();
        let owner = Owner { kind: self.link_kind, index: key as u32 };
        if self.links.len() >= INCOMING_MAX {
            return close(reactor, socket);
        }
        match PeerConn::accepted(reactor, socket, owner, PeerLimits::default()) {
            Some(conn) => {
                let serial = self.next_serial;
                self.next_serial += 1;
                self.links.insert(Link { conn, side: Side::Incoming { from: None, serial } });
                self.serials.insert(serial, key);
            }
            None => close(reactor, socket),
        }
    }

    /// The end of one of the links' operations.
    pub fn on_completion<R: Reactor>(&mut self, reactor: &mut R, completion: Completion) {
        let (owner, _) = Owner::split(completion.token);
        let key = owner.index as usize;
        let Some(link) = self.links.get_mut(key) else { return };
        let mut events = std::mem::take(&mut self.heard);
        link.conn.on_completion(reactor, completion, &mut events);
        self.take(reactor, key, &mut events);
        self.heard = events;
    }

    /// Sends and receives; to be called once all answers of a turn are queued.
    pub fn pump<R: Reactor>(&mut self, reactor: &mut R) {
        self.pump_siblings(reactor.arena());
        for key in 0..self.links.capacity() {
            let Some(link) = self.links.get_mut(key) else { continue };
            if link.conn.needs_pump() {
                let mut events = std::mem::take(&mut self.heard);
                link.conn.pump(reactor, &mut events);
                self.take(reactor, key, &mut events);
                self.heard = events;
            }
            if self.links.get(key).is_some_and(|link| link.conn.is_done()) {
                let link = self.links.remove(key);
                if let Side::Incoming { serial, .. } = link.side {
                    self.serials.remove(&serial);
                }
            }
        }
    }

    fn pump_siblings(&mut self, arena: &Arena) {
        for sibling in &mut self.siblings {
            let from = ShardAddr { target: self.me.target, shard: sibling.shard() };
            sibling.flush();
            while let Some(delivery) = sibling.take(arena) {
                self.events.push(match delivery {
                    Delivery::Message { message, payload, answer } => {
                        let incoming = (!answer).then(|| sibling_serial(from.shard));
                        LinkEvent::Message { from, incoming, message, payload }
                    }
                    Delivery::Guest(guest) => LinkEvent::Guest(guest),
                });
            }
        }
        let (target, events) = (self.me.target, &mut self.events);
        self.siblings.retain(|sibling| {
            let gone = sibling.is_gone();
            if gone {
                events.push(LinkEvent::Down(ShardAddr { target, shard: sibling.shard() }));
            }
            !gone
        });
    }

    fn sibling(&mut self, at: ShardAddr) -> Option<&mut Sibling> {
        let mine = at.target == self.me.target;
        self.siblings.iter_mut().find(|sibling| mine && sibling.shard() == at.shard)
    }

    /// Whether a link or a sibling waits for memory.
    pub fn is_starved(&self) -> bool {
        self.links.iter().any(|(_, link)| link.conn.is_starved())
            || self.siblings.iter().any(Sibling::is_starved)
    }

    /// The most that is queued for one peer, in bytes, and for one sibling, in parcels.
    pub fn queued(&self) -> (usize, usize) {
        let bytes = self.links.iter().map(|(_, link)| link.conn.tx_bytes()).max();
        let parcels = self.siblings.iter().map(Sibling::waiting).max();
        (bytes.unwrap_or(0), parcels.unwrap_or(0))
    }

    /// Whether something waits for room in a sibling's mailbox.
    pub fn is_behind(&self) -> bool {
        self.siblings.iter().any(Sibling::is_behind)
    }

    /// What has come, given for an empty list, so that both keep their memory.
    pub fn take_events(&mut self, events: &mut Vec<LinkEvent>) {
        debug_assert!(events.is_empty(), "what came before is dealt with");
        std::mem::swap(&mut self.events, events);
    }

    fn take<R: Reactor>(&mut self, reactor: &mut R, key: usize, events: &mut Vec<PeerEvent>) {
        for event in events.drain(..) {
            match event {
                PeerEvent::Hello(hello) => self.hello_came(reactor, key, hello),
                PeerEvent::Message { message, payload } => {
                    let Some(link) = self.links.get(key) else { continue };
                    let (from, incoming) = match link.side {
                        Side::Outgoing(peer) => (peer, None),
                        Side::Incoming { from: Some(from), serial } => (from, Some(serial)),
                        Side::Incoming { from: None, .. } => continue,
                    };
                    let payload = payload.into_iter().map(Mem::whole).collect();
                    self.events.push(LinkEvent::Message { from, incoming, message, payload });
                }
                PeerEvent::Closed { reason } => self.link_closed(reactor.now(), key, &reason.to_string()),
            }
        }
    }

    fn link_closed(&mut self, now: Time, key: usize, reason: &str) {
        let Some(link) = self.links.get_mut(key) else { return };
        match link.side {
            Side::Outgoing(peer) => {
                tracing::debug!(?peer, reason, "link lost");
                self.retry_later(now, peer);
                self.events.push(LinkEvent::Down(peer));
            }
            Side::Incoming { from, serial } => {
                tracing::debug!(?from, reason, "incoming link closed");
                self.serials.remove(&serial);
            }
        }
    }

    fn hello_came<R: Reactor>(&mut self, reactor: &mut R, key: usize, hello: Hello) {
        let Some(link) = self.links.get(key) else { return };
        let (expected, is_outgoing) = match link.side {
            Side::Outgoing(peer) => (peer, true),
            Side::Incoming { .. } => (hello.from, false),
        };
        if Some(hello.cluster) != self.cluster || hello.to != self.me || hello.from != expected {
            tracing::warn!(from = ?hello.from, to = ?hello.to, "a peer of another cluster or place; closed. Is an address of an old cluster still in use?");
            return self.cut(reactor, key);
        }
        if is_outgoing {
            if let Some(outgoing) = self.outgoing.get_mut(&expected) {
                outgoing.pause = RETRY_MIN;
            }
            self.events.push(LinkEvent::Up(expected));
            return;
        }
        self.replace_older(reactor, key, hello.from);
        let Some(answer) = self.hello(hello.from) else { return };
        let Some(link) = self.links.get_mut(key) else { return };
        if let Side::Incoming { from, .. } = &mut link.side {
            *from = Some(hello.from);
        }
        link.conn.answer_hello(answer);
    }

    /// Nothing more is taken from an older link of the same peer.
    fn replace_older<R: Reactor>(&mut self, reactor: &mut R, key: usize, peer: ShardAddr) {
        for old in self.keys() {
            let same =
                matches!(self.links[old].side, Side::Incoming { from: Some(from), .. } if from == peer);
            if same && old != key {
                self.cut(reactor, old);
                if let Side::Incoming { from, .. } = &mut self.links[old].side {
                    *from = None;
                }
            }
        }
    }

    fn cut<R: Reactor>(&mut self, reactor: &mut R, key: usize) {
        let mut events = Vec::new();
        self.links[key].conn.close(reactor, &mut events);
        self.take(reactor, key, &mut events);
    }

    /// Sends on one's own link; false when there is none (the message is lost).
    pub fn send(&mut self, to: ShardAddr, message: &PeerMessage, payload: &Mems) -> bool {
        if let Some(sibling) = self.sibling(to) {
            sibling.send(message, payload, false);
            return true;
        }
        match self.outgoing.get(&to).map(|o| &o.state) {
            Some(State::Link(key)) => {
                let key = *key;
                self.send_on(key, message, payload)
            }
            _ => false,
        }
    }

    /// Sends a host to the shard of this target that is to serve it, or gives it back when that shard has ended.
    pub fn send_guest(&mut self, guest: Guest) -> Result<(), Guest> {
        let at = ShardAddr { target: self.me.target, shard: guest.place.shard() };
        match self.sibling(at).filter(|sibling| !sibling.is_gone()) {
            Some(sibling) => {
                sibling.send_guest(guest);
                Ok(())
            }
            None => Err(guest),
        }
    }

    /// Cuts one's own link to a peer, so that a new one is made: what was to be sent is lost.
    pub fn cut_own<R: Reactor>(&mut self, reactor: &mut R, to: ShardAddr) {
        if let Some(State::Link(key)) = self.outgoing.get(&to).map(|o| &o.state) {
            let key = *key;
            self.cut(reactor, key);
        }
    }

    /// Answers on an incoming link, if it is still there.
    pub fn answer(&mut self, serial: u64, message: &PeerMessage, payload: &Mems) {
        if let Some(sibling) = self.siblings.iter_mut().find(|s| sibling_serial(s.shard()) == serial) {
            sibling.send(message, payload, true);
        } else if let Some(key) = self.serials.get(&serial).copied() {
            self.send_on(key, message, payload);
        }
    }

    fn send_on(&mut self, key: usize, message: &PeerMessage, payload: &Mems) -> bool {
        let Some(link) = self.links.get_mut(key) else { return false };
        let sent = link.conn.send(message, parts(message, payload));
        if let Err(error) = &sent {
            tracing::debug!(%error, "a message was not sent");
        }
        sent.is_ok()
    }
}

/// What stands for an incoming link where a sibling asks; links count up from 0.
fn sibling_serial(shard: u16) -> u64 {
    u64::MAX - u64::from(shard)
}

/// A message's block data as it goes over the wire: a write only its own bytes.
fn parts(message: &PeerMessage, payload: &Mems) -> IoList {
    if let PeerMessage::Io(IoRequest { op: IoOp::Write { offset, length, .. }, .. }) = message {
        let lead = *offset as usize % BLOCK_BYTES;
        return payload.first().map(|data| data.io(lead, lead + *length as usize)).into_iter().collect();
    }
    payload.iter().filter(|run| run.blocks() > 0).map(Mem::io_whole).collect()
}

fn close<R: Reactor>(reactor: &mut R, socket: Socket) {
    reactor.submit(Owner { kind: u8::MAX, index: 0 }.token(0), Op::Close { socket });
}
