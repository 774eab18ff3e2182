//! The states of a small copyset, and what can happen in each.

use ashlar_copyset::{
    Action, Body, Config, Entry, HardState, Health, Kind, Members, Message, Recovered, Replica, Role,
};
use protocol::raft::AppendOutcome;
use protocol::types::{CopysetId, LogIndex, ShardAddr, Span, TargetId, Term, Time, VolumeId};
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

const VOTERS: usize = 3;
/// The end of time: every time-out is over, whatever was heard.
const NOW: Time = Time(u64::MAX);
/// Who may be whom.
const NAMINGS: [[u8; VOTERS]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// See [`World::sights`].
pub const SIGHTS: [&str; 5] = [
    "a log is cut",
    "all of a log is committed",
    "the last term's leader commits",
    "a later leader commits an entry",
    "two stand against each other",
];

/// How far the walk goes, and what is wrong with the world on purpose.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    pub terms_max: u64,
    /// Of a log, those included with which leaders begin.
    pub entries_max: u64,
    /// How often all that is on its way from one replica to another is lost, in one run.
    pub resets_max: u8,
    pub crashes_max: u8,
    pub disk: Disk,
}

/// What disks do at a crash.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Disk {
    Sound,
    /// The term is there, the vote is not.
    ForgetsVotes,
    /// The last entry is not there.
    ForgetsEntries,
}

/// One replica and what is on its disk: all that it asked for, at once.
#[derive(Clone)]
pub struct Node {
    pub replica: Replica,
    hard: HardState,
    entries: Vec<Entry>,
    applied: LogIndex,
}

#[derive(Clone)]
pub struct World {
    pub nodes: [Arc<Node>; VOTERS],
    /// What is on its way: from, to.
    links: [[Arc<VecDeque<Message>>; VOTERS]; VOTERS],
    /// Pre-votes and their answers, which arrive in the same step or never: to whom.
    pre_votes: Vec<(usize, Message)>,
    resets: u8,
    crashes: u8,
    /// By term: who has led in it.
    leaders: Vec<Option<u8>>,
    /// The terms of all entries that any replica has taken for committed, and the term in which it did.
    committed: Vec<(Term, Term)>,
    /// Some term had two leaders.
    pub twice_led: bool,
    /// A replica took for committed what another one took something else for.
    pub torn: bool,
    /// A leader began without something that was committed in an earlier term.
    pub incomplete: bool,
    /// A log got shorter.
    pub cut: bool,
    /// The same for all states that differ only by who is who.
    digest: u64,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Step {
    Deliver(usize, usize),
    Reset(usize, usize),
    /// Who, and whom it asks first.
    TimeOut(usize, usize),
    Propose(usize),
    Crash(usize),
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Deliver(from, to) => write!(f, "n{to} gets the next message of n{from}"),
            Self::Reset(from, to) => write!(f, "all from n{from} to n{to} is lost"),
            Self::TimeOut(at, other) => write!(f, "n{at} times out and asks n{other}"),
            Self::Propose(at) => write!(f, "n{at} proposes"),
            Self::Crash(at) => write!(f, "n{at} crashes and comes back"),
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, node) in self.nodes.iter().enumerate() {
            let (r, log) = (&node.replica, node.entries.iter().map(|e| e.term.0));
            let vote = r.hard_state().vote.map(|v| v.0);
            let log: Vec<u64> = log.collect();
            write!(
                f,
                "\n  n{at} {:?} {:?} vote {vote:?} log {log:?} commit {}",
                r.role(),
                r.term(),
                r.commit_index()
            )?;
        }
        for (from, to) in pairs() {
            for message in self.links[from][to].iter() {
                write!(f, "\n    n{from} -> n{to} {:?} {:?}", message.term, message.kind)?;
            }
        }
        Ok(())
    }
}

fn pairs() -> impl Iterator<Item = (usize, usize)> {
    (0..VOTERS).flat_map(|from| (0..VOTERS).map(move |to| (from, to))).filter(|(from, to)| from != to)
}

fn addr(at: usize) -> ShardAddr {
    ShardAddr { target: TargetId(at as u32), shard: 0 }
}

impl Node {
    fn start(at: usize, hard: HardState, entries: Vec<Entry>, applied: LogIndex) -> Self {
        let places: Vec<_> = (0..VOTERS).map(addr).collect();
        let recovered = Recovered {
            hard,
            floor: (LogIndex(0), Term(0)),
            members: Members::new(&places, &[]).expect("distinct targets"),
            entries: entries.clone(),
            applied,
            health: Health::Whole,
        };
        let mut config = Config::new(CopysetId(1), addr(at).target, 1);
        config.hibernate_after = Span(u64::MAX);
        // So that a leader commits one entry before it has sent the next: what it counts matters then.
        config.entries_per_append_max = 1;
        Self { replica: Replica::new(config, recovered, NOW), hard, entries, applied }
    }

    fn holds<'a>(&self, mut committed: impl Iterator<Item = (usize, &'a (Term, Term))>) -> bool {
        committed.all(|(at, (term, _))| self.entries.get(at).is_some_and(|e| e.term == *term))
    }

    fn last(&self) -> (u64, usize) {
        (self.entries.last().map_or(0, |e| e.term.0), self.entries.len())
    }
}

impl World {
    pub fn new(walk: &Walk) -> Self {
        let node = |at| Arc::new(Node::start(at, HardState::default(), Vec::new(), LogIndex(0)));
        let mut world = Self {
            nodes: std::array::from_fn(node),
            links: Default::default(),
            pre_votes: Vec::new(),
            resets: 0,
            crashes: 0,
            leaders: vec![None; walk.terms_max as usize + 1],
            committed: Vec::new(),
            twice_led: false,
            torn: false,
            incomplete: false,
            cut: false,
            digest: 0,
        };
        world.seal();
        world
    }

    /// Lets something happen to a replica, then does all that it asks for.
    fn with(&mut self, at: usize, act: impl FnOnce(&mut Replica)) {
        let mut node = Node::clone(&self.nodes[at]);
        act(&mut node.replica);
        loop {
            let (mut ticket, mut commit) = (None, None);
            while let Some(action) = node.replica.poll() {
                match action {
                    Action::Persist { ticket: number, hard, truncate_from, entries } => {
                        ticket = Some(number);
                        node.hard = hard.unwrap_or(node.hard);
                        let kept = node.entries.len();
                        node.entries.retain(|e| truncate_from.is_none_or(|from| e.index < from));
                        self.cut |= node.entries.len() < kept;
                        let new = (entries.start.0..entries.end.0).map(LogIndex);
                        node.entries
                            .extend(new.map(|i| *node.replica.entry(i).expect("it is to be written")));
                    }
                    Action::Send { to, message } => self.send(at, to.target.0 as usize, message),
                    Action::Commit { up_to } => commit = Some(up_to),
                    Action::Role { role: Role::Leader, term, .. } => self.note_leader(at, term, &node),
                    Action::Role { .. } => {}
                    other => panic!("nothing is read, compacted or damaged: {other:?}"),
                }
            }
            if let Some(ticket) = ticket {
                node.replica.durable(ticket);
            }
            if let Some(up_to) = commit {
                node.applied = up_to;
                node.replica.applied(up_to);
            }
            if ticket.is_none() && commit.is_none() {
                break;
            }
        }
        self.note_commits(&node);
        self.nodes[at] = Arc::new(node);
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        match message.kind {
            Kind::Heartbeat { .. } => {} // Lost: what it tells, the next Append tells too.
            Kind::PreVote { .. } | Kind::PreVoteReply { .. } => self.pre_votes.push((to, message)),
            _ => Arc::make_mut(&mut self.links[from][to]).push_back(message),
        }
    }

    fn note_leader(&mut self, at: usize, term: Term, node: &Node) {
        let known = *self.leaders[term.0 as usize].get_or_insert(at as u8);
        self.twice_led |= known != at as u8;
        let earlier = self.committed.iter().enumerate().filter(|(_, (_, in_term))| *in_term < term);
        self.incomplete |= !node.holds(earlier);
    }

    fn note_commits(&mut self, node: &Node) {
        for (at, entry) in node.entries.iter().take(node.replica.commit_index().0 as usize).enumerate() {
            match self.committed.get(at) {
                Some((known, _)) => self.torn |= *known != entry.term,
                None => self.committed.push((entry.term, node.replica.term())),
            }
        }
    }

    /// `at` hears no leader, and asks `other` first whether it could win.
    fn time_out(&mut self, at: usize, other: usize) {
        self.with(at, |r| r.tick(NOW));
        for (from, to) in [(at, other), (other, at)] {
            let said = std::mem::take(&mut self.pre_votes).into_iter().find(|(whom, _)| *whom == to);
            if let Some((_, message)) = said {
                self.with(to, |r| {
                    r.handle(addr(from), message, NOW);
                });
            }
        }
    }

    /// Whether a message changes nothing, now and ever after.
    fn is_void(&self, to: usize, message: &Message) -> bool {
        let replica = &self.nodes[to].replica;
        let (term, role) = (replica.term(), replica.role());
        if message.term > term {
            return false;
        }
        let past = message.term < term;
        match message.kind {
            Kind::VoteReply { granted } => past || !granted || role != Role::Candidate,
            Kind::AppendReply { .. } => past || role != Role::Leader,
            Kind::HeartbeatReply { round, .. } => past || role != Role::Leader || round.number == 0,
            _ => false,
        }
    }

    fn sweep(&mut self) {
        for (from, to) in pairs() {
            if self.links[from][to].iter().any(|m| self.is_void(to, m)) {
                let mut link = VecDeque::clone(&self.links[from][to]);
                link.retain(|m| !self.is_void(to, m));
                self.links[from][to] = Arc::new(link);
            }
        }
    }

    fn seal(&mut self) {
        self.digest = NAMINGS.iter().map(|names| self.digest_as(names)).min().expect("there are namings");
    }

    /// The digest if each were called something else.
    fn digest_as(&self, names: &[u8; VOTERS]) -> u64 {
        let mut hasher = DefaultHasher::new();
        let who: [usize; VOTERS] =
            std::array::from_fn(|name| names.iter().position(|n| *n == name as u8).expect("all are named"));
        let name = |target: TargetId| names[target.0 as usize];
        for at in who {
            self.nodes[at].replica.digest(name, &mut hasher);
        }
        for (from, to) in who.iter().flat_map(|from| who.iter().map(move |to| (*from, *to))) {
            self.links[from][to].len().hash(&mut hasher);
            for message in self.links[from][to].iter() {
                self.digest_message((from, to), message, &mut hasher);
            }
        }
        (self.resets, self.crashes, &self.committed).hash(&mut hasher);
        (self.twice_led, self.torn, self.incomplete).hash(&mut hasher);
        for leader in &self.leaders {
            leader.map(|at| names[at as usize]).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn digest_message(&self, (from, to): (usize, usize), message: &Message, into: &mut impl Hasher) {
        let term = self.nodes[to].replica.term();
        let asks = matches!(message.kind, Kind::Vote { .. } | Kind::Append { .. });
        if asks && message.term < term {
            return 0.hash(into); // It will be told of the later term, whatever it wants.
        }
        if !asks && message.term > term {
            return (1, message.term).hash(into); // It teaches the term, and nothing else.
        }
        (2, message.term, std::mem::discriminant(&message.kind)).hash(into);
        let probe = |leader: usize, peer: usize, round: u64| {
            let replica = &self.nodes[leader].replica;
            replica.term() == message.term && replica.is_probe(addr(peer).target, round)
        };
        match &message.kind {
            Kind::Vote { last_index, last_term, .. } => (last_index, last_term).hash(into),
            Kind::VoteReply { granted } => granted.hash(into),
            Kind::Append { round, prev_index, prev_term, commit, entries } => {
                probe(from, to, round.number).hash(into);
                (prev_index, prev_term, commit, entries.len()).hash(into);
                entries.iter().for_each(|e| e.term.hash(into));
            }
            Kind::AppendReply { round, outcome, .. } => {
                probe(to, from, round.number).hash(into);
                match outcome {
                    AppendOutcome::Matched { up_to } => (0, up_to).hash(into),
                    AppendOutcome::Rejected { prev, hint, hint_term } => {
                        (1, prev, hint, hint_term).hash(into)
                    }
                }
            }
            other => panic!("no beat is ever heard, nothing handed over or damaged: {other:?}"),
        }
    }

    pub fn digest(&self) -> u64 {
        self.digest
    }

    fn logs_match(&self) -> bool {
        pairs().all(|(a, b)| {
            let both = || self.nodes[a].entries.iter().zip(&self.nodes[b].entries);
            let shared = both().filter(|(x, y)| x.term == y.term).count();
            both().take(shared).all(|(x, y)| x == y)
        })
    }

    /// Whether everybody who could be elected holds what is committed: who lacks some of it has a log that
    /// a majority would not vote for.
    fn is_safe(&self) -> bool {
        let lacks = |node: &Node| !node.holds(self.committed.iter().enumerate());
        let electable =
            |node: &Node| self.nodes.iter().filter(|n| n.last() <= node.last()).count() > VOTERS / 2;
        !self.nodes.iter().any(|n| lacks(n) && electable(n))
    }

    fn may_time_out(&self, at: usize, walk: &Walk) -> bool {
        let replica = &self.nodes[at].replica;
        replica.role() != Role::Leader && replica.term().0 < walk.terms_max
    }

    fn may_propose(&self, at: usize, walk: &Walk) -> bool {
        let replica = &self.nodes[at].replica;
        replica.role() == Role::Leader && replica.last_index().0 < walk.entries_max
    }
}

impl Walk {
    /// What can happen.
    pub fn steps(&self, world: &World, steps: &mut Vec<Step>) {
        for (from, to) in pairs().filter(|(from, to)| !world.links[*from][*to].is_empty()) {
            steps.push(Step::Deliver(from, to));
            if world.resets < self.resets_max {
                steps.push(Step::Reset(from, to));
            }
        }
        for at in 0..VOTERS {
            if world.may_time_out(at, self) {
                let others = (0..VOTERS).filter(|other| *other != at);
                steps.extend(others.map(|other| Step::TimeOut(at, other)));
            }
            if world.may_propose(at, self) {
                steps.push(Step::Propose(at));
            }
            if world.crashes < self.crashes_max {
                steps.push(Step::Crash(at));
            }
        }
    }

    /// What comes of it; `None` beyond the bounds, as a leader begins with an entry of its own.
    pub fn after(&self, last: &World, step: Step) -> Option<World> {
        let mut world = last.clone();
        match step {
            Step::Deliver(from, to) => {
                let link = Arc::make_mut(&mut world.links[from][to]);
                let message = link.pop_front().expect("a message is on its way");
                world.with(to, |r| {
                    r.handle(addr(from), message, NOW);
                });
            }
            Step::Reset(from, to) => {
                world.resets += 1;
                world.links[from][to] = Default::default();
            }
            Step::TimeOut(at, other) => world.time_out(at, other),
            Step::Propose(at) => world.with(at, |r| {
                r.propose(Body::DropVolume { volume: VolumeId(1) }, NOW).expect("the leader takes it");
            }),
            Step::Crash(at) => world.crash(at, self.disk),
        }
        world.sweep();
        world.seal();
        world.nodes.iter().all(|n| n.replica.last_index().0 <= self.entries_max).then_some(world)
    }
}

impl World {
    /// The first promise that is broken here.
    pub fn broken(&self) -> Option<&'static str> {
        let promises = [
            (!self.twice_led, "a term has one leader at most"),
            (self.logs_match(), "logs match"),
            (!self.torn, "what is committed stays"),
            (!self.incomplete, "leaders hold what is committed"),
            (self.is_safe(), "nobody can be elected without what is committed"),
        ];
        promises.iter().find(|(kept, _)| !kept).map(|(_, promise)| *promise)
    }

    /// What ought to happen somewhere, or the walk went nowhere.
    pub fn sights(&self, walk: &Walk) -> [bool; SIGHTS.len()] {
        let candidates = || self.nodes.iter().filter(|n| n.replica.role() == Role::Candidate);
        let terms: Vec<Term> = candidates().map(|n| n.replica.term()).collect();
        [
            self.cut,
            self.committed.len() as u64 == walk.entries_max,
            self.committed.last().is_some_and(|(_, term)| term.0 == walk.terms_max),
            self.committed.iter().any(|(term, in_term)| term < in_term),
            terms.windows(2).any(|terms| terms[0] == terms[1]),
        ]
    }

    /// What is on its way to it stays so, and finds it when it is back.
    fn crash(&mut self, at: usize, disk: Disk) {
        self.crashes += 1;
        let Node { mut hard, mut entries, mut applied, .. } = Node::clone(&self.nodes[at]);
        match disk {
            Disk::Sound => {}
            Disk::ForgetsVotes => hard.vote = None,
            Disk::ForgetsEntries => drop(entries.pop()),
        }
        applied = applied.min(LogIndex(entries.len() as u64));
        self.nodes[at] = Arc::new(Node::start(at, hard, entries, applied));
    }
}
