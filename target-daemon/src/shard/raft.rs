//! Between the replicas, the log and the peers: what a replica decides is made durable, sent
//! and applied here.

use super::fence::Gate;
use super::hosted::{Hosted, OUTBOX_MAX, Outbox};
use super::{Shard, Work};
use crate::mem::{Mem, Mems};
use chunkstore::{EntryPayload, Payload, ReadError, Record};
use copyset::{Action, Health, Role};
use protocol::peer::{Crcs, PeerMessage};
use protocol::raft::{Body, Entries, Entry, Kind, Message};
use protocol::types::{CopysetId, LogIndex, ShardAddr, Term, block_crc};

/// An Append whose payloads are being gathered.
pub struct LoadWork {
    copyset: CopysetId,
    to: ShardAddr,
    message: Message,
    payload: Mems,
    crcs: Crcs,
    /// The next of the message's entries to look at.
    next: usize,
}

impl LoadWork {
    pub(super) fn copyset(&self) -> CopysetId {
        self.copyset
    }
}

impl Shard {
    /// A message for a replica, with the payloads of its entries, one window each.
    pub(super) fn handle_raft(
        &mut self,
        id: CopysetId,
        from: ShardAddr,
        mut message: Message,
        crcs: Crcs,
        payload: Mems,
    ) {
        let now = self.now;
        if let Kind::Append { entries, .. } = &mut message.kind {
            self.cut_to_room(id, entries);
            if !self.take_payloads(id, entries, &crcs, payload) {
                return;
            }
        }
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        hosted.replica.handle(from, message, now);
        self.touch(id);
        // Drained at once: the payloads laid ready belong to this message's entries.
        self.drain_replica(id);
    }

    /// Leaves of an Append what the log has room for; the leader sends the rest again. What is in the
    /// log already needs none, and must be looked at: only what this leader has sent, too, is known to
    /// be right, and can be applied and leave the log.
    fn cut_to_room(&mut self, id: CopysetId, entries: &mut Entries) {
        let Some(replica) = self.hosted.get(&id).map(|hosted| &hosted.replica) else { return };
        let (mut first, mut fresh, mut blocks) = (None, 0, 0);
        let fit = entries.iter().take_while(|entry| {
            if replica.entry(entry.index).is_some_and(|held| held.term == entry.term) {
                return true;
            }
            fresh += 1;
            blocks += entry.body.payload_blocks();
            let first = *first.get_or_insert(entry.index);
            blocks == 0 || self.store.can_append(id, first, fresh, blocks)
        });
        let fit = fit.count();
        if fit < entries.len() {
            self.counts.busy += 1;
            entries.truncate(fit);
        }
    }

    /// Checks an Append's blocks and lays them ready for the `Persist` that may follow; false
    /// when it must be dropped (the leader sends it again).
    fn take_payloads(&mut self, id: CopysetId, entries: &[Entry], crcs: &[u32], payload: Mems) -> bool {
        let Some(hosted) = self.hosted.get_mut(&id) else { return false };
        let mut payload = payload.into_iter();
        let mut crcs = crcs.iter().copied();
        for entry in entries.iter().filter(|e| e.body.payload_blocks() > 0) {
            let Some(data) = payload.next().filter(|p| p.blocks() == entry.body.payload_blocks()) else {
                self.counts.violations += 1;
                return false;
            };
            let told: Crcs = crcs.by_ref().take(data.blocks()).collect();
            if (0..data.blocks()).any(|at| told.get(at) != Some(&block_crc(data.block(at)))) {
                self.counts.wire_corrupt += 1;
                tracing::warn!(copyset = id.0, index = entry.index.0, "a block was damaged on its way here");
                hosted.incoming.clear();
                return false;
            }
            hosted.incoming.insert(entry.index, data, told);
        }
        true
    }

    /// Carries out everything that a replica has decided.
    pub(super) fn drain_replica(&mut self, id: CopysetId) {
        loop {
            let Some(hosted) = self.hosted.get_mut(&id) else { return };
            let Some(action) = hosted.replica.poll() else { break };
            self.act(id, action);
        }
        if let Some(hosted) = self.hosted.get_mut(&id) {
            // What the replica did not take (it had it already, or refused it) is not needed.
            hosted.incoming.clear();
        }
    }

    fn act(&mut self, id: CopysetId, action: Action) {
        match action {
            Action::Persist { ticket, hard, truncate_from, entries } => {
                if let Some(hard) = hard {
                    self.store.stage(Record::Hard { copyset: id, hard }, None, &[]);
                }
                if let Some(from) = truncate_from {
                    self.store.stage(Record::Truncate { copyset: id, from }, None, &[]);
                }
                for index in entries.start.0..entries.end.0 {
                    self.stage_entry(id, LogIndex(index));
                }
                let lsn = self.store.seal();
                self.persisting.push_back((lsn, id, ticket));
                if lsn <= self.store.durable() {
                    // Nothing was staged, and all before is durable: no event will say so.
                    self.durable(lsn);
                }
            }
            Action::Send { to, message } => self.send_raft(id, to, message),
            Action::Commit { up_to } => self.apply(id, up_to),
            Action::ReadReady { token } => self.read_granted(token as usize),
            Action::ReadAborted { token } => self.read_aborted(token as usize),
            Action::Role { role, term, leader } => self.role_changed(id, role, term, leader),
            Action::Install { from } => self.start_catch_up(id, from),
            Action::Health { health } => self.health_changed(id, health),
        }
    }

    fn stage_entry(&mut self, id: CopysetId, index: LogIndex) {
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let entry = *hosted.replica.entry(index).expect("a replica persists entries that it holds");
        let (payload, crcs) = match hosted.incoming.remove(index) {
            Some((payload, crcs)) => (Some(payload), crcs),
            None => (None, Crcs::new()),
        };
        let has = payload.as_ref().map_or(0, Payload::blocks);
        assert_eq!(has, entry.body.payload_blocks(), "an entry is persisted with its payload");
        self.store.stage(Record::Entry { copyset: id, entry }, payload, &crcs);
    }

    fn apply(&mut self, id: CopysetId, up_to: LogIndex) {
        self.store.commit(id, up_to);
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        if !self.freed.is_empty() {
            // Written by a leader that had not heard of the deletion; the next one may be this shard.
            let fresh = (hosted.replica.applied_index().next().0..=up_to.0).map(LogIndex);
            for entry in fresh.filter_map(|index| hosted.replica.entry(index)) {
                if let Body::Write { chunk, .. } | Body::Zero { chunk, .. } = entry.body {
                    self.freed.remove(&chunk.volume);
                }
            }
        }
        let mut done = std::mem::take(&mut self.done);
        while let Some(waiter) = hosted.waiters.front().filter(|w| w.index <= up_to) {
            let kept = hosted.replica.entry(waiter.index).is_some_and(|e| e.term == waiter.term);
            done.push((waiter.request, kept));
            hosted.waiters.pop_front();
        }
        hosted.ordering.applied(up_to);
        if hosted.gate.awaits(up_to) {
            hosted.gate.reached(up_to, self.store.fences(id));
        }
        hosted.replica.applied(up_to);
        let next_step = hosted.goal.as_mut().is_some_and(|goal| goal.is_next(up_to));
        for (request, kept) in done.drain(..) {
            if kept {
                self.part_done(request);
            } else {
                self.part_not_leader(request, id);
            }
        }
        self.done = done;
        if next_step {
            self.pursue(id);
        }
    }

    /// Leadership lost: what was not proposed goes back at once; what was proposed is answered
    /// at once if a higher term tells its sender that the fate is open, else when it is known.
    fn role_changed(&mut self, id: CopysetId, role: Role, term: Term, leader: Option<ShardAddr>) {
        if role == Role::Leader {
            self.counts.elections_won += 1;
            tracing::info!(copyset = id.0, term = term.0, "leads");
            return self.order_inherited(id);
        }
        tracing::debug!(copyset = id.0, term = term.0, ?role, ?leader, "role changed");
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let mut refused: Vec<usize> = hosted.ordering.drain().map(|write| write.request).collect();
        hosted.waiters.retain(|waiter| {
            if waiter.term < term {
                refused.push(waiter.request);
            }
            waiter.term >= term
        });
        hosted.outboxes.clear();
        hosted.gate = Gate::default();
        for request in refused {
            self.part_not_leader(request, id);
        }
    }

    /// Entries of earlier leaders that are not applied yet come before everything proposed from now
    /// on: a write to part of a block must read what they leave behind, and a write behind a fence is judged
    /// by it.
    fn order_inherited(&mut self, id: CopysetId) {
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        let (applied, last) = (hosted.replica.applied_index(), hosted.replica.last_index());
        let indexes = (applied.next().0..=last.0).map(LogIndex);
        let inherited = indexes.filter_map(|index| Some((index, hosted.replica.entry(index)?.body)));
        for (index, body) in inherited.clone() {
            if let Body::Write { chunk, range } | Body::Zero { chunk, range } = body {
                hosted.ordering.proposed(index, chunk, range);
            }
        }
        hosted.gate = Gate::new(self.store.fences(id), inherited);
    }

    fn health_changed(&mut self, id: CopysetId, health: Health) {
        let health = match health {
            Health::Whole => chunkstore::Health::Whole,
            Health::Damaged => chunkstore::Health::Damaged,
            // The catch-up writes `InstallBegin` itself, before it touches a chunk.
            Health::Installing => return,
        };
        tracing::info!(copyset = id.0, ?health, "health changed");
        self.store.stage(Record::Health { copyset: id, health }, None, &[]);
        self.store.seal();
    }

    /// Sends a Raft message, entries with their payloads; where one must be read from the log
    /// first, it and what follows it to the same peer wait in the outbox.
    fn send_raft(&mut self, id: CopysetId, to: ShardAddr, message: Message) {
        let Some(hosted) = self.hosted.get_mut(&id) else { return };
        if let Some(outbox) = hosted.outboxes.get_mut(&to).filter(|outbox| outbox.loading.is_some())
            && matches!(message.kind, Kind::Append { .. })
        {
            if outbox.behind.len() < OUTBOX_MAX {
                outbox.behind.push_back(message);
            }
            return;
        }
        let work = LoadWork { copyset: id, to, message, payload: Mems::new(), crcs: Crcs::new(), next: 0 };
        self.gather(work);
    }

    /// Gathers payloads from `work.next` on; sends when all are there, else loads the next one.
    fn gather(&mut self, mut work: LoadWork) {
        let entries: &[Entry] = match &work.message.kind {
            Kind::Append { entries, .. } => entries,
            _ => &[],
        };
        while let Some(entry) = entries.get(work.next) {
            if matches!(entry.body, Body::Write { .. }) {
                match self.store.entry_payload(work.copyset, entry.index) {
                    EntryPayload::Ram(Some(payload), crcs) => {
                        work.payload.push(payload);
                        work.crcs.extend_from_slice(&crcs);
                    }
                    EntryPayload::NeedsLoad => return self.load(work),
                    // Compacted or truncated since: Raft will find another way.
                    EntryPayload::Ram(None, _) | EntryPayload::Gone => {
                        return self.give_up(&work);
                    }
                }
            }
            work.next += 1;
        }
        let message = PeerMessage::Raft { copyset: work.copyset, message: work.message, crcs: work.crcs };
        self.send(work.to, message, work.payload);
    }

    fn load(&mut self, work: LoadWork) {
        let (id, to) = (work.copyset, work.to);
        let index = match &work.message.kind {
            Kind::Append { entries, .. } => entries[work.next].index,
            _ => return,
        };
        let key = self.work.insert(Work::Load(work));
        if let Some(hosted) = self.hosted.get_mut(&id) {
            hosted.outboxes.entry(to).or_insert_with(Outbox::default).loading = Some(key);
        }
        self.store.load_entry(key as u64, id, index);
    }

    pub(super) fn entry_loaded(&mut self, key: usize, result: Result<(Mem, Crcs), ReadError>) {
        let Some(Work::Load(mut work)) = self.work.try_remove(key) else { return };
        match result {
            Ok((payload, crcs)) => {
                work.payload.push(payload);
                work.crcs.extend_from_slice(&crcs);
                work.next += 1;
                let (id, to) = (work.copyset, work.to);
                let before = self.work.len();
                self.gather(work);
                if self.work.len() == before {
                    self.release_outbox(id, to);
                }
            }
            Err(error) => {
                tracing::warn!(copyset = work.copyset.0, %error, "an entry cannot be read back from the log");
                self.give_up(&work);
                // Whoever needs it would ask for it again without end.
                if matches!(error, ReadError::Corrupt(_)) {
                    self.rebuild(work.copyset);
                }
            }
        }
    }

    /// Gives up on a message: what came behind it is of no use without it.
    fn give_up(&mut self, work: &LoadWork) {
        if let Some(hosted) = self.hosted.get_mut(&work.copyset) {
            hosted.outboxes.remove(&work.to);
        }
    }

    /// The message in front is away: those behind it follow until one must load again.
    fn release_outbox(&mut self, id: CopysetId, to: ShardAddr) {
        let Some(mut outbox) = self.hosted.get_mut(&id).and_then(|h| h.outboxes.remove(&to)) else { return };
        while let Some(message) = outbox.behind.pop_front() {
            self.send_raft(id, to, message);
            let again = self.hosted.get_mut(&id).and_then(|h| h.outboxes.get_mut(&to));
            if let Some(again) = again.filter(|o| o.loading.is_some()) {
                again.behind.append(&mut outbox.behind);
                return;
            }
        }
    }

    /// Writes that waited for others to be applied or merged.
    pub(super) fn release_ordered(&mut self, id: CopysetId) {
        while let Some(hosted) = self.hosted.get_mut(&id).filter(|h: &&mut Hosted| h.ordering.has_waiting()) {
            let Some((step, chunk, range)) = hosted.ordering.next() else { return };
            self.ordered_step(id, step, chunk, range);
        }
    }
}
