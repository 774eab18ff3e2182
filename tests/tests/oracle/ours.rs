//! A replica of `copyset` with a disk that is always at once durable.

use super::body;
use copyset::{Action, Config, Entry, HardState, Health, Members, Message, Recovered, Replica, Role};
use protocol::types::{CopysetId, LogIndex, ShardAddr, Span, TargetId, Term, Time};

/// So long that only those time out who are told to.
const ELECTION_TIMEOUT: Span = Span::ms(3_600_000);
const HEARTBEAT: Span = Span::ms(1);

/// One replica, what is on its disk, and its clock.
pub struct Ours {
    pub replica: Replica,
    me: u32,
    voters: u32,
    starts: u64,
    hard: HardState,
    entries: Vec<Entry>,
    applied: LogIndex,
    now: Time,
    /// What it wants to send.
    pub sent: Vec<(u32, Message)>,
}

pub fn addr(id: u32) -> ShardAddr {
    ShardAddr { target: TargetId(id), shard: 0 }
}

/// A log of these terms, each entry numbered by its index.
pub fn log(terms: &[u64]) -> Vec<Entry> {
    let entry = |(at, term): (usize, &u64)| Entry {
        term: Term(*term),
        index: LogIndex(at as u64 + 1),
        body: body(at as u32 + 1),
    };
    terms.iter().enumerate().map(entry).collect()
}

impl Ours {
    /// Replica `me` of `1..=voters` with this on its disk, long after its start.
    pub fn new(me: u32, voters: u32, hard: HardState, entries: Vec<Entry>, commit: u64) -> Self {
        let applied = LogIndex(commit);
        let replica = start(me, voters, 0, (hard, entries.clone(), applied), Time(0));
        let now = Time(0) + Span::ms(3 * 3_600_000);
        Self { replica, me, voters, starts: 0, hard, entries, applied, now, sent: Vec::new() }
    }

    pub fn restart(&mut self) {
        self.starts += 1;
        let disk = (self.hard, self.entries.clone(), self.applied);
        self.replica = start(self.me, self.voters, self.starts, disk, self.now);
        self.sent.clear();
        self.let_time_pass();
    }

    /// So much that no leader of the past binds this replica any more.
    pub fn let_time_pass(&mut self) {
        self.now = self.now + Span::ms(3 * 3_600_000);
    }

    pub fn tick(&mut self) {
        self.replica.tick(self.now);
        self.drain();
    }

    /// The leader makes itself heard.
    pub fn beat(&mut self) {
        self.now = self.now + HEARTBEAT;
        self.tick();
    }

    pub fn handle(&mut self, from: u32, message: Message) {
        self.replica.handle(addr(from), message, self.now);
        self.drain();
    }

    pub fn propose(&mut self, number: u32) {
        self.replica.propose(body(number), self.now).expect("the leader takes it");
        self.drain();
    }

    pub fn transfer(&mut self, to: u32) {
        self.replica.transfer_leadership(TargetId(to), self.now).expect("the leader hands over");
        self.drain();
    }

    pub fn leads(&self) -> bool {
        self.replica.role() == Role::Leader
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn drain(&mut self) {
        loop {
            let (mut ticket, mut commit) = (None, None);
            while let Some(action) = self.replica.poll() {
                match action {
                    Action::Persist { ticket: number, hard, truncate_from, entries } => {
                        ticket = Some(number);
                        self.hard = hard.unwrap_or(self.hard);
                        self.entries.retain(|e| truncate_from.is_none_or(|from| e.index < from));
                        let new = (entries.start.0..entries.end.0).map(LogIndex);
                        self.entries
                            .extend(new.map(|i| *self.replica.entry(i).expect("it is to be written")));
                    }
                    Action::Send { to, message } => self.sent.push((to.target.0, message)),
                    Action::Commit { up_to } => commit = Some(up_to),
                    Action::Role { .. } | Action::ReadReady { .. } | Action::ReadAborted { .. } => {}
                    Action::Install { .. } | Action::Health { .. } => {
                        panic!("nothing is compacted: {action:?}")
                    }
                }
            }
            if let Some(ticket) = ticket {
                self.replica.durable(ticket);
            }
            if let Some(up_to) = commit {
                self.applied = up_to;
                self.replica.applied(up_to);
            }
            if ticket.is_none() && commit.is_none() {
                return;
            }
        }
    }
}

fn start(me: u32, voters: u32, starts: u64, disk: (HardState, Vec<Entry>, LogIndex), now: Time) -> Replica {
    let seed = u64::from(me) << 32 | starts;
    let mut config = Config::new(CopysetId(1), TargetId(me), seed);
    config.election_timeout = ELECTION_TIMEOUT;
    config.heartbeat = HEARTBEAT;
    config.hibernate_after = Span(u64::MAX);
    let places: Vec<_> = (1..=voters).map(addr).collect();
    let members = Members::new(&places, &[]).expect("distinct targets");
    let (hard, entries, applied) = disk;
    let floor = (LogIndex(0), Term(0));
    let recovered = Recovered { hard, floor, members, entries, applied, health: Health::Whole };
    Replica::new(config, recovered, now)
}
