//! What the copysets agreed on, as seen from outside of the code that agrees.
//!
//! After each turn of a shard its replicas are looked at: entries that are new in their logs, with
//! the values their payloads hold, and entries that are newly applied. Checked at once:
//!
//! - log matching: an index and a term name the same entry on every replica, payload included;
//! - state machine safety: every replica, in each of its lives, applies the same entry at an index;
//! - an entry is applied only when a majority of the copyset's members holds it durably;
//! - a term and a vote that were durable at a power cut are there after it, unless the log was damaged.
//!
//! A register belongs to one copyset, so the order of its log is the order of the register's
//! changes: with it [`super::history`] judges exactly what hosts saw.

use super::history::{Change, Register};
use super::{Failure, Mix};
use chunkstore::{EntryPayload, Payload};
use copyset::{Body, Entry, HardState, Health, Replica};
use protocol::raft::Members;
use protocol::types::{
    BLOCK_BYTES, BlockRange, CHUNK_BYTES, ChunkId, CopysetId, LogIndex, ShardAddr, Term, Time, block_crc,
};
use reactor::sim::SimReactor;
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use target_daemon::core_loop::Core;

type Node = Core<SimReactor>;

/// An entry, wherever it is.
type Key = (CopysetId, LogIndex, Term);

/// Everything that was agreed.
pub struct Witness {
    /// The smallest unit that is written, in bytes, by volume.
    units: Vec<u64>,
    /// Shards of a target.
    shards: usize,
    /// Looked up only, never walked.
    entries: FxHashMap<Key, Seen>,
    chosen: BTreeMap<(CopysetId, LogIndex), Chosen>,
    views: BTreeMap<(usize, CopysetId), View>,
}

struct Seen {
    body: Body,
    /// Of a write: the value of each unit, and the checksum of each block.
    values: Vec<u64>,
    crcs: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Chosen {
    term: Term,
    /// When it was first applied anywhere.
    at: Time,
}

/// What was last seen of a replica.
#[derive(Default)]
struct View {
    last: (LogIndex, Term),
    applied: LogIndex,
    /// At the last power cut: the floor, and the durable entries after it.
    durable: (LogIndex, Vec<(LogIndex, Term)>),
    /// At the last power cut: what it had promised, until it was looked at again.
    promised: Option<HardState>,
}

impl Witness {
    /// Knows nothing yet.
    pub fn new(mix: &Mix) -> Self {
        Self {
            units: mix.volumes.iter().map(|(_, block)| u64::from(*block)).collect(),
            shards: mix.shards,
            entries: FxHashMap::default(),
            chosen: BTreeMap::new(),
            views: BTreeMap::new(),
        }
    }

    /// A node's power is cut: what is durable there stays so; the rest is looked at anew.
    pub fn crashed(&mut self, node: usize, core: &Node) {
        for (id, replica) in core.replicas() {
            let floor = replica.floor().0;
            let entries = (floor.0 + 1..=replica.durable_index().0)
                .filter_map(|index| replica.entry(LogIndex(index)).map(|entry| (entry.index, entry.term)));
            let durable = (floor, entries.collect());
            let promised = Some(replica.hard_state()).filter(|_| replica.is_hard_state_durable());
            self.views.insert((node, id), View { durable, promised, ..View::default() });
        }
    }

    /// Looks at a node after one of its turns; `cores` are all that run.
    ///
    /// # Errors
    /// What it holds contradicts what was seen before.
    pub fn look<'a>(
        &mut self,
        node: usize,
        core: &Node,
        cores: impl Fn(usize) -> Option<&'a Node>,
        now: Time,
    ) -> Result<(), Failure> {
        for (id, replica) in core.replicas() {
            let last = replica.last_index();
            let last = (last, term_at(replica, last));
            let view = self.views.entry((node, id)).or_default();
            if let Some(promised) = view.promised.take().filter(|_| replica.health() != Health::Damaged) {
                let now = replica.hard_state();
                let kept = promised.vote.is_none() || now.vote == promised.vote;
                if now.term < promised.term || (now.term == promised.term && !kept) {
                    return Err(Failure(format!(
                        "promises: node {node} had {promised:?} of {id:?} on its disk and came back with {now:?}"
                    )));
                }
            }
            let (seen, applied) = (view.last, view.applied);
            (view.last, view.applied) = (last, replica.applied_index());
            if last != seen {
                self.look_at_log(id, core, replica, seen.0)?;
            }
            for index in applied.0.max(replica.floor().0.0) + 1..=replica.applied_index().0 {
                self.applied(node, (id, LogIndex(index)), replica, &cores, now)?;
            }
        }
        Ok(())
    }

    fn look_at_log(
        &mut self,
        id: CopysetId,
        core: &Node,
        replica: &Replica,
        seen: LogIndex,
    ) -> Result<(), Failure> {
        let (floor, last) = (replica.floor().0, replica.last_index());
        // What was truncated and written anew may begin below what was seen last.
        let mut from = seen.next().max(floor.next()).min(last.next());
        while from > floor.next()
            && !self.entries.contains_key(&(id, from.prev(), term_at(replica, from.prev())))
        {
            from = from.prev();
        }
        for index in from.0..=last.0 {
            if let Some(entry) = replica.entry(LogIndex(index)) {
                self.note(id, entry, core.entry_payload(id, entry.index))?;
            }
        }
        Ok(())
    }

    fn note<P: Payload>(
        &mut self,
        id: CopysetId,
        entry: &Entry,
        payload: EntryPayload<P>,
    ) -> Result<(), Failure> {
        let key = (id, entry.index, entry.term);
        if let EntryPayload::Ram(Some(payload), crcs) = &payload
            && let Some(at) = (0..crcs.len()).find(|at| block_crc(payload.block(*at)) != crcs[*at])
        {
            return Err(Failure(format!(
                "log matching: block {at} of {key:?} is not what its checksum says"
            )));
        }
        let (values, crcs) = match (&payload, entry.body) {
            (EntryPayload::Ram(Some(payload), crcs), Body::Write { chunk, .. }) => {
                (self.values_of(chunk, payload), crcs.to_vec())
            }
            _ => (Vec::new(), Vec::new()),
        };
        let Some(known) = self.entries.get(&key) else {
            if values.is_empty() && matches!(entry.body, Body::Write { .. }) {
                return Err(Failure(format!("harness: nobody saw the payload of {key:?}")));
            }
            self.entries.insert(key, Seen { body: entry.body, values, crcs });
            return Ok(());
        };
        if known.body != entry.body || (!crcs.is_empty() && known.crcs != crcs) {
            return Err(Failure(format!("log matching: {key:?} is {:?} and {:?}", known.body, entry.body)));
        }
        Ok(())
    }

    fn values_of<P: Payload>(&self, chunk: ChunkId, payload: &P) -> Vec<u64> {
        let unit = self.units[chunk.volume.0 as usize - 1] as usize;
        let value = |unit: &[u8]| u64::from_le_bytes(unit[..8].try_into().expect("8 bytes"));
        (0..payload.blocks()).flat_map(|at| payload.block(at).chunks(unit).map(value)).collect()
    }

    fn applied<'a>(
        &mut self,
        node: usize,
        at: (CopysetId, LogIndex),
        replica: &Replica,
        cores: &impl Fn(usize) -> Option<&'a Node>,
        now: Time,
    ) -> Result<(), Failure> {
        let (id, index) = at;
        let Some(entry) = replica.entry(index) else { return Ok(()) };
        let term = entry.term;
        match self.chosen.get(&at) {
            Some(chosen) if chosen.term == term => return Ok(()),
            Some(chosen) => {
                return Err(Failure(format!(
                    "state machine safety: node {node} applies {at:?} of term {term}, though the entry of term {} was applied before",
                    chosen.term
                )));
            }
            None => {}
        }
        // By the membership of that entry, or by one that came after: whichever was in force when the leader
        // counted. Of two that follow each other any two majorities meet.
        let holds = |members: &Members| {
            let node = |m: ShardAddr| (m.target.0 as usize - 1) * self.shards + usize::from(m.shard);
            let voters: Vec<usize> = members.voters().map(node).collect();
            let holding =
                voters.iter().filter(|member| self.is_durable(**member, (id, index, term), cores(**member)));
            holding.count() > voters.len() / 2
        };
        if !holds(&replica.members_as_of(index)) && !holds(replica.members()) {
            return Err(Failure(format!(
                "durable quorum: node {node} applies {at:?} of term {term}, which no majority holds durably of {:?}, then {:?}",
                replica.members_as_of(index),
                replica.members()
            )));
        }
        self.chosen.insert(at, Chosen { term, at: now });
        Ok(())
    }

    fn is_durable(&self, node: usize, (id, index, term): Key, core: Option<&Node>) -> bool {
        match core {
            Some(core) => match core.replica(id) {
                Some(replica) => {
                    index <= replica.durable_index()
                        && (index <= replica.floor().0 || term_at(replica, index) == term)
                }
                // Its disk failed after that.
                None => true,
            },
            None => self
                .views
                .get(&(node, id))
                .is_some_and(|view| index <= view.durable.0 || view.durable.1.contains(&(index, term))),
        }
    }

    /// The changes of every register, in the order agreed.
    ///
    /// # Errors
    /// An entry changes units to more than one value, though it was made by one write: parts of a
    /// block that nobody asked to change were put back.
    pub fn changes(&self) -> Result<BTreeMap<Register, Vec<Change>>, Failure> {
        let mut changes: BTreeMap<Register, Vec<Change>> = BTreeMap::new();
        for ((id, index), chosen) in &self.chosen {
            let Some(seen) = self.entries.get(&(*id, *index, chosen.term)) else { continue };
            let (chunk, range) = match seen.body {
                Body::Write { chunk, range } | Body::Zero { chunk, range } => (chunk, range),
                _ => continue,
            };
            let mut changed = None;
            for (n, register) in self.registers(chunk, range).enumerate() {
                let value = seen.values.get(n).copied().unwrap_or(0);
                let before = changes.get(&register).and_then(|all| all.last()).map_or(0, |last| last.value);
                if before != value && changed.replace(value).is_some_and(|other| other != value) {
                    return Err(Failure(format!(
                        "lost update: entry {index} of copyset {id} changed {register:?} from {before} to {value}, and others to other values"
                    )));
                }
                let change = Change { position: index.0, value, at: chosen.at.0, term: chosen.term.0 };
                changes.entry(register).or_default().push(change);
            }
        }
        Ok(changes)
    }

    fn registers(&self, chunk: ChunkId, range: BlockRange) -> impl Iterator<Item = Register> {
        let volume = chunk.volume.0 - 1;
        let unit = self.units[volume as usize];
        let first = u64::from(chunk.index) * CHUNK_BYTES as u64 + u64::from(range.first) * BLOCK_BYTES as u64;
        let count = u64::from(range.count) * BLOCK_BYTES as u64 / unit;
        (first / unit..first / unit + count).map(move |at| (volume, at))
    }
}

fn term_at(replica: &Replica, index: LogIndex) -> Term {
    let (floor, term) = replica.floor();
    if index == floor { term } else { replica.entry(index).map_or(Term(0), |entry| entry.term) }
}
