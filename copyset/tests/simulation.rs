//! Seeded chaos against the checkers of `cluster`. Run one seed with `COPYSET_SEED=n`, many with
//! `COPYSET_SEEDS=n` (and `COPYSET_FIRST=n`).

// The crate may not touch its surroundings; its tests read files and variables.
#![allow(clippy::disallowed_methods)]

mod cluster;

use ashlar_copyset::*;
use cluster::*;
use protocol::types::*;

/// What a seed's run did, so that a test can tell that it tested something.
#[derive(Default, Debug)]
struct Tally {
    acked: u64,
    lease_reads: u64,
    round_reads: u64,
    installs: u64,
    changes: u64,
    damages: u64,
    sleeps: u64,
}

struct Run {
    cluster: Cluster,
    plan: Plan,
    counter: u64,
    tally: Tally,
}

/// Which faults a seed has.
#[derive(Clone, Copy, Debug)]
struct Plan {
    changes: bool,
    damages: bool,
    compacts: bool,
    crashes: bool,
    partitions: bool,
}

fn world(dice: &mut Dice) -> World {
    let slow = dice.chance(300);
    World {
        delay: (MS / 10, if slow { 300 * MS } else { dice.between(MS, 20 * MS) }),
        disk: (MS / 10, if dice.chance(200) { 200 * MS } else { 5 * MS }),
        lost_permille: if dice.chance(500) { dice.below(150) } else { 0 },
        doubled_permille: if dice.chance(500) { dice.below(150) } else { 0 },
        fifo: dice.chance(500),
        drift_permille: 100,
        hibernate: if dice.chance(500) { Span::ms(700) } else { Span(u64::MAX) },
        window: dice.between(4, 64) as usize,
        batch: dice.between(1, 8) as usize,
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed ^ 0xa5a5);
        let world = world(&mut dice);
        let plan = Plan {
            changes: dice.chance(400),
            damages: dice.chance(400),
            compacts: dice.chance(600),
            crashes: dice.chance(700),
            partitions: dice.chance(700),
        };
        let voters = if dice.chance(150) { 5 } else { 3 };
        let cluster = Cluster::new(5, voters, seed, world);
        Self { cluster, plan, counter: 0, tally: Tally::default() }
    }

    fn step(&mut self) {
        let pause = self.cluster.dice.between(MS, 60 * MS);
        let pause = if self.cluster.dice.chance(10) { pause * 100 } else { pause };
        self.cluster.run_until(self.cluster.now + pause);
        // Whoever believes to lead is asked to read: an old leader's lease must not outlive it.
        for leader in 0..5 {
            if self.cluster.is_up(leader) && self.cluster.replica(leader).role() == Role::Leader {
                let _ = self.cluster.read(leader);
                self.counter += 1;
                self.cluster.propose(leader, value(self.counter));
            }
        }
        let node = self.cluster.dice.below(5) as usize;
        let node = if self.cluster.dice.chance(600) { self.cluster.leader().unwrap_or(node) } else { node };
        let at = self.cluster.clock(node);
        match self.cluster.dice.below(100) {
            0..45 => self.write(node),
            45..75 => drop(self.cluster.read(node)),
            75..80 if self.plan.crashes => {
                self.cluster.crash(node);
                if self.cluster.dice.chance(500) {
                    self.cluster.restart(node);
                }
            }
            80..88 => self.cluster.restart(node),
            88..91 if self.plan.partitions => self.partition(),
            91 | 92 if self.cluster.dice.chance(500) => self.cluster.cut.clear(),
            93 => drop(self.cluster.with(node, |r| r.wake(at))),
            94 => {
                let to = TargetId(self.cluster.dice.between(1, 5) as u32);
                let _ = self.cluster.with(node, |r| r.transfer_leadership(to, at));
            }
            95 | 96 if self.plan.changes => self.change(node),
            97 if self.plan.damages => self.damage(node),
            98 if self.plan.compacts => {
                let keep = self.cluster.dice.below(20);
                self.cluster.compact(node, keep);
            }
            99 if self.plan.compacts
                && !self.plan.changes
                && self.cluster.is_up(node)
                && self.all_whole() =>
            {
                // A scrubber found bad chunks: all are fetched anew.
                self.cluster.nodes[node].disk.torn = true;
                self.cluster.with(node, |r| r.install_begin());
            }
            _ => {}
        }
        self.tally.sleeps +=
            u64::from(self.cluster.is_up(node) && self.cluster.replica(node).is_hibernating());
    }

    fn write(&mut self, node: usize) {
        for _ in 0..self.cluster.dice.between(1, 6) {
            self.counter += 1;
            self.cluster.propose(node, value(self.counter));
        }
    }

    fn partition(&mut self) {
        self.cluster.cut.clear();
        let side = self.cluster.dice.below(32);
        let oneway = self.cluster.dice.chance(250);
        for a in 1..=5u32 {
            for b in 1..=5u32 {
                let (x, y) = (side >> (a - 1) & 1, side >> (b - 1) & 1);
                if x != y && (!oneway || x == 1) {
                    self.cluster.cut.insert((a, b));
                }
            }
        }
    }

    fn change(&mut self, node: usize) {
        if !self.cluster.is_up(node) {
            return;
        }
        let now = *self.cluster.replica(node).members();
        let id = self.cluster.dice.between(1, 5) as u32;
        let mut voters: Vec<Member> = now.voters().collect();
        let mut learners: Vec<Member> = now.learners().collect();
        match now.find(TargetId(id)) {
            Some(m) if now.is_voter(m.target) => voters.retain(|v| *v != m),
            Some(m) => {
                learners.retain(|l| *l != m);
                voters.push(m);
            }
            None => learners.push(addr(id)),
        }
        if voters.len() < 2 {
            return;
        }
        let Some(next) = Members::new(&voters, &learners) else { return };
        let clock = self.cluster.clock(node);
        let done = self.cluster.with(node, |r| r.change_members(next, clock));
        self.tally.changes += u64::from(matches!(done, Some(Ok(_))));
    }

    /// Two replicas at once that are not whole may leave too few to go on.
    fn all_whole(&self) -> bool {
        self.cluster.nodes.iter().all(|n| n.disk.health == Health::Whole && !n.disk.torn)
    }

    /// Power off, and part of the log is gone: a suffix of entries, and the latest terms and votes.
    fn damage(&mut self, node: usize) {
        if !self.all_whole() {
            return;
        }
        self.cluster.crash(node);
        let keep = self.cluster.dice.below(self.cluster.nodes[node].disk.entries.len() as u64 + 1) as usize;
        let disk = &mut self.cluster.nodes[node].disk;
        disk.entries.truncate(keep);
        let last = disk.entries.last().map_or(disk.floor, |e| (e.index, e.term));
        disk.applied = disk.applied.min(last.0);
        disk.hard = HardState { term: last.1, vote: None };
        disk.health = Health::Damaged;
        self.tally.damages += 1;
    }

    /// All faults end: the cluster must come to life.
    fn heal(&mut self) {
        self.cluster.cut.clear();
        self.cluster.world = World { hibernate: self.cluster.world.hibernate, ..World::CALM };
        for node in 0..5 {
            self.cluster.restart(node);
            let at = self.cluster.clock(node);
            self.cluster.with(node, |r| r.wake(at));
        }
        let end = self.cluster.now + 20_000 * MS;
        let mut done = None;
        while self.cluster.now < end {
            self.cluster.run_until(self.cluster.now + 500 * MS);
            let Some(leader) = self.cluster.leader() else { continue };
            match done {
                // A damaged voter may be one too many of a membership that just shrank.
                _ if self.plan.damages && self.plan.changes => return,
                None => {
                    self.counter += 1;
                    done = self.cluster.propose(leader, value(self.counter));
                }
                Some(index) if self.is_level(leader, index) => return,
                Some(_) => {}
            }
        }
        let state = |n: &Node| {
            let r = n.replica.as_ref().expect("running");
            format!(
                "n{} {:?} {:?} commit {} applied {} last {} floor {:?} {:?} {:?}\n",
                n.addr.target,
                r.role(),
                r.term(),
                r.commit_index(),
                r.applied_index(),
                r.last_index(),
                r.floor(),
                r.health(),
                r.members()
            )
        };
        if self.plan.damages && self.plan.changes {
            return;
        }
        panic!(
            "no progress after all faults ended:\n{}",
            self.cluster.nodes.iter().map(state).collect::<String>()
        );
    }

    fn is_level(&self, leader: usize, index: LogIndex) -> bool {
        let members = *self.cluster.replica(leader).members();
        members.all().all(|m| {
            let r = self.cluster.replica(m.target.0 as usize - 1);
            r.applied_index() >= index && r.health() == Health::Whole
        })
    }
}

fn simulate(seed: u64, steps: u64, trace: bool) -> Tally {
    let mut run = Run::new(seed);
    if trace {
        eprintln!("{:?} {:?}", run.plan, run.cluster.world);
        run.cluster.trace = Some(String::new());
        run.cluster.trace_sends = true;
    }
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for step in 0..steps {
            run.step();
            if step % 16 == 0 {
                run.cluster.check_logs();
            }
        }
        run.heal();
        run.cluster.check_logs();
    }));
    if let Err(panic) = outcome {
        if let Some(trace) = &run.cluster.trace {
            eprintln!("{trace}");
        }
        eprintln!("SEED {seed}");
        std::panic::resume_unwind(panic);
    }
    let c = &run.cluster;
    Tally {
        acked: c.acked,
        lease_reads: c.lease_reads,
        round_reads: c.round_reads,
        installs: c.installs,
        ..run.tally
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_seed_breaks_safety_or_stops_for_good() {
    let steps = number("COPYSET_STEPS").unwrap_or(400);
    if let Some(seed) = number("COPYSET_SEED") {
        simulate(seed, steps, true);
        return;
    }
    let first = number("COPYSET_FIRST").unwrap_or(1);
    let mut sum = Tally::default();
    for seed in first..first + number("COPYSET_SEEDS").unwrap_or(200) {
        let t = simulate(seed, steps, false);
        sum.acked += t.acked;
        sum.lease_reads += t.lease_reads;
        sum.round_reads += t.round_reads;
        sum.installs += t.installs;
        sum.changes += t.changes;
        sum.damages += t.damages;
        sum.sleeps += t.sleeps;
    }
    eprintln!("{sum:?}");
    assert!(sum.acked > 1000 && sum.lease_reads > 1000 && sum.round_reads > 100);
    assert!(sum.installs > 10 && sum.changes > 10 && sum.damages > 10 && sum.sleeps > 10);
}

/// Seeds that once failed:
/// - 2213: one of two voters was amid a chunk catch-up and had applied more than the other, which had
///   been restarted, knew to be committed: it could serve no catch-up, and commit nothing without it.
#[test]
fn seeds_that_once_failed_pass() {
    simulate(2213, 400, false);
}
