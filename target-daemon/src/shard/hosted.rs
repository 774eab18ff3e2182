//! One copyset as its shard hosts it: the replica, and what waits for it.

use super::affinity::Affinity;
use super::catchup::CatchUp;
use super::fence::Gate;
use super::ordering::Ordering;
use super::orders::Goal;
use crate::mem::Mem;
use copyset::Replica;
use protocol::peer::Crcs;
use protocol::types::{LogIndex, ShardAddr, Term, Time};
use std::collections::{BTreeMap, VecDeque};

/// A write between arrival and proposal.
pub struct PendingWrite {
    /// Key of the request it is a part of.
    pub request: usize,
    /// Byte offset in the chunk.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
    /// The covering blocks with the data at its place in them; `None` writes zeroes.
    pub data: Option<Mem>,
    /// Of the data, where it is one whole block.
    pub crc: Option<u32>,
}

/// A proposed entry whose fate a request waits for.
pub struct Waiter {
    /// Where it is in the log.
    pub index: LogIndex,
    /// The term it was proposed in: another term's entry at `index` means that it was lost.
    pub term: Term,
    /// Key of the request.
    pub request: usize,
}

/// A message whose payload is being read back from the log, and those that came behind it.
#[derive(Default)]
pub struct Outbox {
    /// Key of the load job, while one is under way.
    pub loading: Option<usize>,
    /// Messages behind it, oldest first.
    pub behind: VecDeque<protocol::raft::Message>,
}

/// Payloads by the index of their entry, in order: they come and go at the ends, as a rule.
#[derive(Default)]
pub struct Incoming(VecDeque<(LogIndex, Mem, Crcs)>);

impl Incoming {
    /// Lays a payload ready; one that was there for the same entry is dropped.
    pub fn insert(&mut self, index: LogIndex, payload: Mem, crcs: Crcs) {
        let place = self.0.partition_point(|(at, ..)| *at < index);
        match self.0.get_mut(place).filter(|(at, ..)| *at == index) {
            Some(there) => *there = (index, payload, crcs),
            None => self.0.insert(place, (index, payload, crcs)),
        }
    }

    /// Takes the payload of an entry.
    pub fn remove(&mut self, index: LogIndex) -> Option<(Mem, Crcs)> {
        let place = self.0.binary_search_by_key(&index, |(at, ..)| *at).ok()?;
        self.0.remove(place).map(|(_, payload, crcs)| (payload, crcs))
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Most messages held for one peer behind a payload that is read from the log. More are dropped:
/// Raft sends again.
pub const OUTBOX_MAX: usize = 64;

/// A hosted copyset.
pub struct Hosted {
    /// The Raft core.
    pub replica: Replica,
    /// Payloads that were handed in and whose `Persist` has not come yet.
    pub incoming: Incoming,
    /// In order of index.
    pub waiters: VecDeque<Waiter>,
    /// The order of overlapping writes.
    pub ordering: Ordering<PendingWrite>,
    /// What its leader lets through of volumes that were taken over.
    pub gate: Gate,
    /// Where IO comes from.
    pub affinity: Affinity,
    /// Messages that wait for payloads, by receiver.
    pub outboxes: BTreeMap<ShardAddr, Outbox>,
    /// The catch-up under way, if one is.
    pub catch_up: Option<CatchUp>,
    /// Checksums of its own are lost: it is to be filled from another replica once it does not lead.
    pub wants_rebuild: bool,
    /// The voters that the MDS wants.
    pub goal: Option<Goal>,
    /// When the replica wants to be ticked, as noted in the shard's timers.
    pub deadline: Option<Time>,
    /// It is in the list of those to be settled.
    pub touched: bool,
}

impl Hosted {
    /// A copyset around its replica.
    pub fn new(replica: Replica) -> Self {
        Self {
            replica,
            incoming: Incoming::default(),
            waiters: VecDeque::new(),
            ordering: Ordering::default(),
            gate: Gate::default(),
            affinity: Affinity::default(),
            outboxes: BTreeMap::new(),
            catch_up: None,
            wants_rebuild: false,
            goal: None,
            deadline: None,
            touched: false,
        }
    }

    /// Whether there is work that housekeeping moves on, beside counting where IO comes from.
    pub fn is_restless(&self) -> bool {
        self.catch_up.is_some() || self.wants_rebuild || self.goal.is_some()
    }
}
