//! A node of raft-rs with storage in memory, configured to be without what `copyset` does its own way:
//! no leases, no check of the quorum by time.

use super::ours;
use copyset::{Body, HardState};
use raft::eraftpb::{Entry, HardState as TheirHardState, Message};
use raft::storage::MemStorage;
use raft::{Config, RawNode, StateRole, Storage};

const ELECTION_TICKS: usize = 10;

/// One node and what it wants to send.
pub struct Theirs {
    pub node: RawNode<MemStorage>,
    me: u64,
    pub sent: Vec<Message>,
}

impl Theirs {
    /// Node `me` of `1..=voters` with this in its storage.
    pub fn new(me: u32, voters: u32, hard: HardState, entries: &[copyset::Entry], commit: u64) -> Self {
        let voters: Vec<u64> = (1..=u64::from(voters)).collect();
        let store = MemStorage::new_with_conf_state((voters, vec![]));
        let entries: Vec<Entry> = entries.iter().map(translate).collect();
        store.wl().append(&entries).expect("a log without a gap");
        let mut state = TheirHardState::default();
        state.set_term(hard.term.0);
        state.set_vote(hard.vote.map_or(0, |vote| vote.0.into()));
        state.set_commit(commit);
        store.wl().set_hardstate(state);
        Self { node: start(me.into(), store, false), me: me.into(), sent: Vec::new() }
    }

    /// The same, but whoever hears a leader is bound to it, as ours are.
    pub fn new_bound(me: u32, voters: u32, hard: HardState, entries: &[copyset::Entry]) -> Self {
        let theirs = Self::new(me, voters, hard, entries, 0);
        Self { node: start(me.into(), theirs.node.store().clone(), true), ..theirs }
    }

    /// As long as a leader's word binds, and no longer than until it would campaign itself.
    pub fn let_time_pass(&mut self) {
        for _ in 0..ELECTION_TICKS {
            self.node.tick();
        }
        self.drain();
    }

    pub fn restart(&mut self) {
        self.node = start(self.me, self.node.store().clone(), false);
        self.sent.clear();
    }

    pub fn campaign(&mut self) {
        self.node.campaign().expect("a node may always campaign");
        self.drain();
    }

    /// The leader makes itself heard.
    pub fn beat(&mut self) {
        self.node.ping();
        self.drain();
    }

    pub fn handle(&mut self, message: Message) {
        // Refusals are of messages from strangers and to the past: answered, if at all, by a message.
        let _ = self.node.step(message);
        self.drain();
    }

    pub fn propose(&mut self, number: u32) {
        self.node.propose(vec![], number.to_le_bytes().to_vec()).expect("the leader takes it");
        self.drain();
    }

    pub fn transfer(&mut self, to: u32) {
        self.node.transfer_leader(to.into());
        self.drain();
    }

    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// The term, and the vote in it; 0 for none.
    pub fn hard(&self) -> (u64, u64) {
        (self.node.raft.term, self.node.raft.vote)
    }

    pub fn commit(&self) -> u64 {
        self.node.raft.raft_log.committed
    }

    /// By entry: its term and the number that was proposed, `None` for a leader's first entry.
    pub fn entries(&self) -> Vec<(u64, Option<u32>)> {
        let last = self.node.store().last_index().expect("memory");
        if last == 0 {
            return Vec::new();
        }
        let context = raft::GetEntriesContext::empty(false);
        let entries = self.node.store().entries(1, last + 1, None, context).expect("memory");
        let number = |data: &[u8]| <[u8; 4]>::try_from(data).ok().map(u32::from_le_bytes);
        entries.iter().map(|e| (e.get_term(), number(e.get_data()))).collect()
    }

    fn drain(&mut self) {
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            self.sent.extend(ready.take_messages());
            self.node.store().wl().append(ready.entries()).expect("a log without a gap");
            if let Some(state) = ready.hs() {
                self.node.store().wl().set_hardstate(state.clone());
            }
            self.sent.extend(ready.take_persisted_messages());
            let mut light = self.node.advance(ready);
            if let Some(commit) = light.commit_index() {
                self.node.store().wl().mut_hard_state().set_commit(commit);
            }
            self.sent.extend(light.take_messages());
            self.node.advance_apply();
        }
    }
}

/// An entry of ours as one of theirs.
pub fn translate(entry: &copyset::Entry) -> Entry {
    let mut theirs = Entry::default();
    theirs.set_term(entry.term.0);
    theirs.set_index(entry.index.0);
    if let Some(number) = number(entry) {
        theirs.set_data(number.to_le_bytes().to_vec().into());
    }
    theirs
}

/// The number that was proposed.
pub fn number(entry: &copyset::Entry) -> Option<u32> {
    match entry.body {
        Body::Write { chunk, .. } => Some(chunk.index),
        _ => None,
    }
}

/// The same of a log of ours.
pub fn as_theirs(node: &ours::Ours) -> Vec<(u64, Option<u32>)> {
    node.entries().iter().map(|e| (e.term.0, number(e))).collect()
}

fn start(me: u64, store: MemStorage, bound: bool) -> RawNode<MemStorage> {
    let config = Config {
        id: me,
        applied: store.rl().hard_state().get_commit(),
        election_tick: ELECTION_TICKS,
        min_election_tick: 2 * ELECTION_TICKS,
        max_election_tick: 2 * ELECTION_TICKS + 1,
        heartbeat_tick: 1,
        pre_vote: true,
        check_quorum: bound,
        max_inflight_msgs: 256,
        max_size_per_msg: 1 << 20,
        ..Config::default()
    };
    let quiet = slog::Logger::root(slog::Discard, slog::o!());
    RawNode::new(&config, store, &quiet).expect("a sound configuration")
}
