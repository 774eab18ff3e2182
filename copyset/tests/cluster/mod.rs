//! A cluster in memory: replicas, disks that lose what was not yet durable, a network that may lose,
//! double, delay and reorder, clocks that drift, and checkers that watch every action.
//!
//! Checked at all times: one leader a term; a new leader holds all that was committed; what is
//! committed at an index never differs; nothing is applied before it is durable; logs that share an
//! entry share all before it; a read sees every write and read that ended before it began.

#![allow(dead_code)]

use ashlar_copyset::*;
use protocol::types::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;

pub const MS: u64 = 1_000_000;

/// Numbers from a seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound.max(1)
    }
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }
}

/// What is durable.
#[derive(Clone)]
pub struct Disk {
    pub hard: HardState,
    pub floor: (LogIndex, Term),
    pub members: Members,
    pub entries: Vec<Entry>,
    pub applied: LogIndex,
    pub health: Health,
    /// Chunks are half overwritten.
    pub torn: bool,
}

impl Disk {
    pub fn get(&self, index: LogIndex) -> Option<&Entry> {
        let at = index.0.checked_sub(self.floor.0.0 + 1)?;
        self.entries.get(at as usize)
    }
    fn write(&mut self, record: &Record) {
        match record {
            Record::Persist { hard, truncate_from, entries, .. } => {
                if let Some(hard) = hard {
                    self.hard = *hard;
                }
                if let Some(from) = truncate_from {
                    self.entries.retain(|e| e.index < *from);
                }
                for entry in entries.iter().filter(|e| e.index > self.floor.0) {
                    let last = self.entries.last().map_or(self.floor.0, |e| e.index);
                    assert_eq!(entry.index, last.next(), "a gap on disk");
                    self.entries.push(*entry);
                }
            }
            Record::Floor { floor, members, .. } => {
                let keeps = self.get(floor.0).is_some_and(|e| e.term == floor.1) || *floor == self.floor;
                self.entries.retain(|e| keeps && e.index > floor.0);
                self.floor = *floor;
                self.members = *members;
                self.applied = floor.0;
            }
        }
    }
}

/// One write under way.
#[derive(Clone)]
enum Record {
    Persist { ticket: u64, hard: Option<HardState>, truncate_from: Option<LogIndex>, entries: Vec<Entry> },
    Floor { floor: (LogIndex, Term), members: Members, whole_at: LogIndex },
}

pub struct Node {
    pub addr: ShardAddr,
    pub replica: Option<Replica>,
    pub disk: Disk,
    pub disk_stuck: bool,
    incarnation: u64,
    queue: VecDeque<Record>,
    disk_free: u64,
    /// Proposals of clients that wait: index to term.
    waiting: BTreeMap<LogIndex, Term>,
    install: Option<Fetching>,
    clock: (u64, u64),
    pub violations: u64,
}

#[derive(Clone)]
struct Fetching {
    from: ShardAddr,
    term: Term,
    floor: (LogIndex, Term),
    members: Members,
}

enum Event {
    Deliver { from: ShardAddr, to: ShardAddr, message: Message },
    Disk { node: usize, incarnation: u64 },
    Fetched { node: usize, incarnation: u64 },
}

/// How badly the world behaves.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub delay: (u64, u64),
    pub disk: (u64, u64),
    pub lost_permille: u64,
    pub doubled_permille: u64,
    pub fifo: bool,
    pub drift_permille: u64,
    pub hibernate: Span,
    pub window: usize,
    pub batch: usize,
}

impl World {
    pub const CALM: Self = Self {
        delay: (MS, MS),
        disk: (MS, MS),
        lost_permille: 0,
        doubled_permille: 0,
        fifo: true,
        drift_permille: 0,
        hibernate: Span(u64::MAX),
        window: 64,
        batch: 8,
    };
}

pub struct Cluster {
    pub now: u64,
    pub dice: Dice,
    pub world: World,
    pub nodes: Vec<Node>,
    pub cut: BTreeSet<(u32, u32)>,
    /// Nodes whose timers stand still.
    pub dozing: BTreeSet<usize>,
    /// Links whose messages wait to be delivered by hand, or never.
    pub kept: BTreeMap<(u32, u32), Vec<Message>>,
    events: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    links: BTreeMap<(u32, u32), u64>,
    pub committed: Vec<Entry>,
    leaders: BTreeMap<Term, u32>,
    /// The highest index that a finished write or read has seen.
    pub seen: LogIndex,
    reads: BTreeMap<u64, (usize, u64, LogIndex)>,
    tokens: u64,
    pub acked: u64,
    pub lease_reads: u64,
    pub round_reads: u64,
    pub installs: u64,
    pub trace: Option<String>,
    /// Sends are traced too.
    pub trace_sends: bool,
}

pub fn addr(id: u32) -> ShardAddr {
    ShardAddr { target: TargetId(id), shard: 0 }
}

pub fn members(voters: &[u32], learners: &[u32]) -> Members {
    let place = |ids: &[u32]| ids.iter().map(|id| addr(*id)).collect::<Vec<_>>();
    Members::new(&place(voters), &place(learners)).expect("a membership")
}

pub fn value(number: u64) -> Body {
    let chunk = ChunkId { volume: VolumeId((number >> 32) as u32), index: number as u32 };
    Body::Write { chunk, range: BlockRange { first: 0, count: 1 + (number % 32) as u16 } }
}

impl Cluster {
    /// `nodes` replicas, of which the first `voters` form the copyset.
    pub fn new(nodes: u32, voters: u32, seed: u64, world: World) -> Self {
        let mut cluster = Self {
            now: 0,
            dice: Dice(seed),
            world,
            nodes: Vec::new(),
            cut: BTreeSet::new(),
            dozing: BTreeSet::new(),
            kept: BTreeMap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            links: BTreeMap::new(),
            committed: Vec::new(),
            leaders: BTreeMap::new(),
            seen: LogIndex(0),
            reads: BTreeMap::new(),
            tokens: 0,
            acked: 0,
            lease_reads: 0,
            round_reads: 0,
            installs: 0,
            trace: None,
            trace_sends: false,
        };
        let first: Vec<u32> = (1..=voters).collect();
        for id in 1..=nodes {
            let members = if id <= voters { members(&first, &[]) } else { Members::default() };
            let disk = Disk {
                hard: HardState::default(),
                floor: (LogIndex(0), Term(0)),
                members,
                entries: Vec::new(),
                applied: LogIndex(0),
                health: Health::Whole,
                torn: false,
            };
            let half = world.drift_permille / 2;
            let rate = cluster.dice.between(1000 - half, 1000 + half);
            let offset = cluster.dice.below(1000 * MS) * u64::from(world.drift_permille > 0);
            cluster.nodes.push(Node {
                addr: addr(id),
                replica: None,
                disk,
                disk_stuck: false,
                incarnation: 0,
                queue: VecDeque::new(),
                disk_free: 0,
                waiting: BTreeMap::new(),
                install: None,
                clock: (offset, rate),
                violations: 0,
            });
        }
        for at in 0..cluster.nodes.len() {
            cluster.restart(at);
        }
        cluster
    }

    pub fn replica(&self, at: usize) -> &Replica {
        self.nodes[at].replica.as_ref().expect("a running node")
    }

    pub fn is_up(&self, at: usize) -> bool {
        self.nodes[at].replica.is_some()
    }

    pub fn clock(&self, at: usize) -> Time {
        let (offset, rate) = self.nodes[at].clock;
        Time(offset + self.now / 1000 * rate)
    }

    fn alarm(&self, at: usize) -> Option<u64> {
        if self.dozing.contains(&at) {
            return None;
        }
        let due = self.nodes[at].replica.as_ref()?.next_timeout()?;
        let (offset, rate) = self.nodes[at].clock;
        Some((due.0.saturating_sub(offset).div_ceil(rate) * 1000).max(self.now))
    }

    fn say(&mut self, line: std::fmt::Arguments<'_>) {
        if let Some(trace) = &mut self.trace {
            let _ = writeln!(trace, "{:>6} {line}", self.now / MS);
        }
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((at, self.sequence), event);
    }

    /// Lets the world go on until `end`.
    pub fn run_until(&mut self, end: u64) {
        loop {
            let alarm = (0..self.nodes.len()).filter_map(|at| Some((self.alarm(at)?, at))).min();
            let event = self.events.keys().next().copied();
            let next = match (alarm, event) {
                (Some((due, _)), Some((at, _))) => due.min(at),
                (Some((due, _)), None) => due,
                (None, Some((at, _))) => at,
                (None, None) => break,
            };
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            match (alarm, event) {
                (Some((due, node)), _) if due <= next => {
                    let now = self.clock(node);
                    self.with(node, |r| r.tick(now));
                }
                (_, Some(key)) => {
                    let event = self.events.remove(&key).expect("an event");
                    self.happen(event);
                }
                _ => unreachable!(),
            }
        }
        self.now = self.now.max(end);
    }

    /// One of the messages that are kept arrives; it stays, and may arrive again.
    pub fn deliver_kept(&mut self, from: usize, to: usize, place: usize) {
        let message = self.kept[&(from as u32 + 1, to as u32 + 1)][place].clone();
        let (from, to) = (self.nodes[from].addr, self.nodes[to].addr);
        self.happen(Event::Deliver { from, to, message });
    }

    /// No more is kept; what was is lost.
    pub fn let_flow(&mut self, from: usize, to: usize) {
        self.kept.remove(&(from as u32 + 1, to as u32 + 1));
    }

    /// A node that is down comes back with this on its disk. Entries of one term at one index are the same.
    pub fn set_disk(&mut self, at: usize, term: u64, log: impl Iterator<Item = u64>) {
        assert!(!self.is_up(at), "n{} runs", at + 1);
        let entry = |(index, term): (u64, u64)| Entry {
            term: Term(term),
            index: LogIndex(index),
            body: value(term << 32 | index),
        };
        let disk = &mut self.nodes[at].disk;
        disk.hard = HardState { term: Term(term), vote: None };
        disk.entries = (1..).zip(log).map(entry).collect();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, message } => {
                let at = to.target.0 as usize - 1;
                if self.cut.contains(&(from.target.0, to.target.0)) || !self.is_up(at) {
                    return;
                }
                let now = self.clock(at);
                self.with(at, |r| {
                    let last = r.last_index();
                    let fresh = r.handle(from, message, now);
                    assert!(
                        fresh.start >= fresh.end || fresh.end == r.last_index().next(),
                        "{fresh:?} {last}"
                    );
                });
            }
            Event::Disk { node, incarnation } => self.disk_done(node, incarnation),
            Event::Fetched { node, incarnation } => self.fetched(node, incarnation),
        }
    }

    /// Does something with a running replica, then all that it asks for.
    pub fn with<T>(&mut self, at: usize, act: impl FnOnce(&mut Replica) -> T) -> Option<T> {
        let replica = self.nodes[at].replica.as_mut()?;
        let done = act(replica);
        while let Some(action) = self.nodes[at].replica.as_mut().and_then(Replica::poll) {
            self.perform(at, action);
        }
        Some(done)
    }

    fn perform(&mut self, at: usize, action: Action) {
        let id = at + 1;
        match action {
            Action::Persist { ticket, hard, truncate_from, entries } => {
                let indices = entries.start.0..entries.end.0;
                let replica = self.replica(at);
                let entries = indices.map(|i| *replica.entry(LogIndex(i)).expect("an entry to persist"));
                let record = Record::Persist { ticket, hard, truncate_from, entries: entries.collect() };
                self.submit(at, record);
            }
            Action::Send { to, message } => self.transmit(at, to, message),
            Action::Commit { up_to } => self.apply(at, up_to),
            Action::ReadReady { token } => {
                let (node, _, need) = self.reads.remove(&token).expect("a read");
                assert_eq!(node, at);
                self.round_reads += 1;
                self.end_read(at, need);
            }
            Action::ReadAborted { token } => {
                self.reads.remove(&token);
                self.say(format_args!("n{id} read aborted"));
            }
            Action::Role { role, term, leader } => {
                let by = leader.map_or("-".into(), |l| format!("n{}", l.target));
                self.say(format_args!("n{id} {role:?} {term:?} leader {by}"));
                if role == Role::Leader {
                    self.check_leader(at, term);
                }
            }
            Action::Install { from } => self.fetch(at, from),
            Action::Health { health } => {
                self.say(format_args!("n{id} health {health:?}"));
                self.nodes[at].disk.health = health;
            }
        }
    }

    fn submit(&mut self, at: usize, record: Record) {
        let (low, high) = self.world.disk;
        let due = self.now + self.dice.between(low, high);
        let node = &mut self.nodes[at];
        node.queue.push_back(record);
        if node.disk_stuck {
            return;
        }
        node.disk_free = node.disk_free.max(due);
        let (due, incarnation) = (node.disk_free, node.incarnation);
        self.schedule(due, Event::Disk { node: at, incarnation });
    }

    /// The disk goes on, with all that piled up.
    pub fn unstick(&mut self, at: usize) {
        self.nodes[at].disk_stuck = false;
        for _ in 0..self.nodes[at].queue.len() {
            let incarnation = self.nodes[at].incarnation;
            self.schedule(self.now, Event::Disk { node: at, incarnation });
        }
    }

    fn disk_done(&mut self, at: usize, incarnation: u64) {
        let node = &mut self.nodes[at];
        if node.incarnation != incarnation || node.disk_stuck {
            return;
        }
        let Some(record) = node.queue.pop_front() else { return };
        node.disk.write(&record);
        let now = self.clock(at);
        match record {
            Record::Persist { ticket, .. } => {
                self.with(at, |r| r.durable(ticket));
            }
            Record::Floor { floor, members, whole_at } => {
                self.nodes[at].disk.torn = false;
                self.installs += 1;
                self.with(at, |r| r.install_finish(floor, members, whole_at, now));
            }
        }
    }

    fn transmit(&mut self, at: usize, to: ShardAddr, message: Message) {
        let from = self.nodes[at].addr;
        let durable = self.nodes[at].disk.hard.term;
        assert!(message.term <= durable, "n{} spoke of a term that is not durable", at + 1);
        if self.trace_sends {
            self.say(format_args!(
                "n{} -> n{} {:?} {:?}",
                from.target, to.target, message.term, message.kind
            ));
        }
        if let Some(kept) = self.kept.get_mut(&(from.target.0, to.target.0)) {
            kept.push(message);
            return;
        }
        let copies = 1 + u64::from(self.dice.chance(self.world.doubled_permille));
        for _ in 0..copies {
            if self.dice.chance(self.world.lost_permille) {
                continue;
            }
            let (low, high) = self.world.delay;
            let mut due = self.now + self.dice.between(low, high);
            if self.world.fifo {
                let link = self.links.entry((from.target.0, to.target.0)).or_default();
                due = due.max(*link);
                *link = due;
            }
            self.schedule(due, Event::Deliver { from, to, message: message.clone() });
        }
    }

    fn apply(&mut self, at: usize, up_to: LogIndex) {
        let first = self.replica(at).applied_index().next();
        for index in first.0..=up_to.0 {
            let entry = *self.replica(at).entry(LogIndex(index)).expect("an entry to apply");
            let disk = self.nodes[at].disk.get(entry.index);
            assert_eq!(disk, Some(&entry), "n{} applies what is not durable", at + 1);
            self.check_commit(at, entry);
            if self.nodes[at].waiting.remove(&entry.index) == Some(entry.term) {
                self.acked += 1;
                self.seen = self.seen.max(entry.index);
            }
        }
        let now_term = self.replica(at).term();
        let role = self.replica(at).role();
        self.say(format_args!("n{} applies to {up_to}", at + 1));
        let _ = (now_term, role);
        self.nodes[at].replica.as_mut().expect("running").applied(up_to);
    }

    fn check_commit(&mut self, at: usize, entry: Entry) {
        let place = entry.index.0 as usize - 1;
        match self.committed.get(place) {
            Some(known) => assert_eq!(known, &entry, "n{} commits something else", at + 1),
            None => {
                assert_eq!(place, self.committed.len(), "commit with a gap");
                self.committed.push(entry);
            }
        }
    }

    fn check_leader(&mut self, at: usize, term: Term) {
        let id = at as u32 + 1;
        let known = *self.leaders.entry(term).or_insert(id);
        assert_eq!(known, id, "two leaders in {term:?}");
        let replica = self.replica(at);
        for entry in &self.committed {
            if entry.index > replica.floor().0 {
                assert_eq!(replica.entry(entry.index), Some(entry), "leader n{id} {term:?} lacks a commit");
            }
        }
    }

    /// Logs that share an entry share all before it.
    pub fn check_logs(&self) {
        let running: Vec<&Replica> = self.nodes.iter().filter_map(|n| n.replica.as_ref()).collect();
        for (at, a) in running.iter().enumerate() {
            for b in &running[at + 1..] {
                let mut shared = false;
                for index in (1..=a.last_index().0.min(b.last_index().0)).rev().map(LogIndex) {
                    let (Some(x), Some(y)) = (a.entry(index), b.entry(index)) else { break };
                    shared |= x.term == y.term;
                    assert!(!shared || x == y, "logs differ before a shared entry");
                }
            }
        }
    }

    fn fetch(&mut self, at: usize, from: ShardAddr) {
        let leader = from.target.0 as usize - 1;
        let source = self.nodes[leader].replica.as_ref().filter(|r| r.role() == Role::Leader);
        let busy = self.nodes[at].install.as_ref().is_some_and(|f| f.from == from)
            || self.nodes[at].queue.iter().any(|r| matches!(r, Record::Floor { .. }));
        let Some(source) = source.filter(|_| !busy) else { return };
        let index = source.applied_index();
        let term = if index == source.floor().0 {
            source.floor().1
        } else {
            source.entry(index).expect("applied and kept").term
        };
        let changes = (source.floor().0.0 + 1..=index.0).rev().map(LogIndex);
        let latest = changes.filter_map(|i| source.entry(i)).find_map(|e| match e.body {
            Body::Members(members) => Some(members),
            _ => None,
        });
        let members = latest.unwrap_or(*source.floor_members());
        let fetching = Fetching { from, term: source.term(), floor: (index, term), members };
        self.say(format_args!("n{} fetches chunks as of {index} from n{}", at + 1, from.target));
        let node = &mut self.nodes[at];
        node.install = Some(fetching);
        node.disk.torn = true;
        let incarnation = node.incarnation;
        node.replica.as_mut().expect("running").install_begin();
        let due = self.now + self.dice.between(10 * MS, 400 * MS);
        self.schedule(due, Event::Fetched { node: at, incarnation });
    }

    fn fetched(&mut self, at: usize, incarnation: u64) {
        if self.nodes[at].incarnation != incarnation {
            return;
        }
        let Some(fetching) = self.nodes[at].install.take() else { return };
        let leader = fetching.from.target.0 as usize - 1;
        let source = self.nodes[leader].replica.as_ref();
        let Some(source) = source.filter(|r| r.role() == Role::Leader && r.term() == fetching.term) else {
            return;
        };
        let whole_at = source.applied_index();
        if self.replica(at).install_fits(fetching.floor) {
            let record = Record::Floor { floor: fetching.floor, members: fetching.members, whole_at };
            self.submit(at, record);
        }
    }

    /// A client proposes; the index, if taken.
    pub fn propose(&mut self, at: usize, body: Body) -> Option<LogIndex> {
        let now = self.clock(at);
        let index = self.nodes[at].replica.as_mut()?.propose(body, now).ok()?;
        let term = self.replica(at).term();
        self.nodes[at].waiting.insert(index, term);
        self.with(at, |_| ());
        Some(index)
    }

    /// A client reads.
    pub fn read(&mut self, at: usize) -> Result<ReadGrant, Refused> {
        self.tokens += 1;
        let (token, need, now) = (self.tokens, self.seen, self.clock(at));
        let Some(replica) = self.nodes[at].replica.as_mut() else { return Err(Refused::Busy) };
        let grant = replica.read(token, now);
        match grant {
            Ok(ReadGrant::Now) => {
                self.lease_reads += 1;
                self.end_read(at, need);
            }
            Ok(ReadGrant::Later) => {
                self.reads.insert(token, (at, self.now, need));
            }
            Err(_) => {}
        }
        self.with(at, |_| ());
        grant
    }

    fn end_read(&mut self, at: usize, need: LogIndex) {
        let saw = self.replica(at).applied_index();
        self.say(format_args!("n{} reads at {saw}", at + 1));
        assert!(saw >= need, "n{} read at {saw} after {need} was seen", at + 1);
        self.seen = self.seen.max(saw);
    }

    /// Power off: what is not durable is gone; a few more writes may just have made it.
    pub fn crash(&mut self, at: usize) {
        if !self.is_up(at) {
            return;
        }
        let made_it = self.dice.below(self.nodes[at].queue.len() as u64 + 1);
        let made_it = if self.world.delay == World::CALM.delay { 0 } else { made_it };
        let node = &mut self.nodes[at];
        node.violations += node.replica.take().map_or(0, |r| r.violations());
        node.incarnation += 1;
        let queue = std::mem::take(&mut node.queue);
        for record in queue.iter().take(made_it as usize) {
            if matches!(record, Record::Persist { .. }) {
                node.disk.write(record);
            } else {
                break;
            }
        }
        node.install = None;
        node.waiting.clear();
        node.disk_free = 0;
        self.reads.retain(|_, (node, ..)| *node != at);
    }

    pub fn restart(&mut self, at: usize) {
        if self.is_up(at) {
            return;
        }
        let seed = self.dice.roll();
        let now = self.clock(at);
        let node = &mut self.nodes[at];
        let mut config = Config::new(CopysetId(1), node.addr.target, seed);
        config.hibernate_after = self.world.hibernate;
        config.window_entries = self.world.window;
        config.entries_per_append_max = self.world.batch;
        config.append_bytes_max = 256 << 10;
        config.window_bytes = 1 << 20;
        let disk = &node.disk;
        let health = if disk.torn && disk.health == Health::Whole { Health::Installing } else { disk.health };
        let recovered = Recovered {
            hard: disk.hard,
            floor: disk.floor,
            members: disk.members,
            entries: disk.entries.clone(),
            applied: disk.applied.max(disk.floor.0),
            health,
        };
        let torn = disk.torn;
        let mut replica = Replica::new(config, recovered, now);
        if torn {
            replica.install_begin();
        }
        node.replica = Some(replica);
        self.with(at, |_| ());
    }

    /// Keeps the log short.
    pub fn compact(&mut self, at: usize, keep: u64) {
        if !self.is_up(at) || self.nodes[at].disk.torn {
            return;
        }
        let floor = LogIndex(self.replica(at).applied_index().0.saturating_sub(keep));
        if floor <= self.replica(at).floor().0 {
            return;
        }
        self.with(at, |r| r.compact(floor));
        let replica = self.replica(at);
        let (floor, members) = (replica.floor(), *replica.floor_members());
        let disk = &mut self.nodes[at].disk;
        disk.entries.retain(|e| e.index > floor.0);
        (disk.floor, disk.members, disk.applied) = (floor, members, disk.applied.max(floor.0));
    }

    /// The running leader of the highest term.
    pub fn leader(&self) -> Option<usize> {
        let leads = |at: &usize| self.is_up(*at) && self.replica(*at).role() == Role::Leader;
        (0..self.nodes.len()).filter(leads).max_by_key(|at| self.replica(*at).term())
    }
}
