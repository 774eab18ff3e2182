//! The simulator: the production code of a whole cluster, in virtual time, decided by one seed.
//!
//! ```text
//! Mix      what a seed draws: sizes, limits, workload, which faults and how often
//! Fleet    targets: real cores (shard, store, replicas, links, exports) on simulated reactors
//! Host     NBD clients that write, read, trim and zero, and go elsewhere when a link breaks
//! Nemesis  crashes, partitions, resets, stalls, damage at rest
//! Witness  what the copysets agreed on: log matching, one entry an index, durable on a majority
//! History  every operation on every block, judged as an atomic register at the end
//! ```
//!
//! A run: faults and load for a while, then the faults stop; everything outstanding must end
//! within a bound, every block is read once more, replicas must become equal. The same seed gives
//! the same trace. Only `reactor` is simulated; the cluster map is fixed and handed in.
//!
//! Deliberately absent: the MDS, and the control thread of targets.

mod fleet;
pub mod history;
mod host;
mod judge;
mod mix;
mod nemesis;
mod witness;

use fleet::Fleet;
pub use fleet::Tally;
use history::History;
use host::Host;
pub use mix::{FAMILIES, Mix, SIMPLER};
pub use nemesis::Count;
use nemesis::Nemesis;
use protocol::types::{Span, Time};
use reactor::sim::SimWorld;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::AddAssign;
use std::rc::Rc;

/// How long everything outstanding may take once nothing is broken any more.
const SETTLE_WITHIN: Span = Span::ms(120_000);

/// What a cluster that has stopped because too much broke is allowed to fail in.
const STOPPED: [&str; 3] = ["liveness:", "equal replicas:", "check:"];

/// What a run did.
#[derive(Clone, Copy, Default, Debug)]
pub struct Report {
    /// Fingerprint of everything that happened.
    pub trace: u64,
    /// Turns of loops.
    pub turns: u64,
    /// Virtual time.
    pub span: Span,
    /// Requests answered without an error.
    pub acknowledged: u64,
    /// Requests whose fate the hosts never learnt.
    pub unknown: u64,
    /// Errors that hosts were given.
    pub errors: u64,
    /// Faults injected.
    pub faults: Count,
    /// Writes, by register, that took effect twice: sent twice, and not acknowledged before both.
    pub doubles: u64,
    /// What the shards counted, all lives together.
    pub shards: Tally,
}

impl AddAssign for Report {
    /// Sums up; the fingerprint is left as it is.
    fn add_assign(&mut self, one: Self) {
        self.turns += one.turns;
        self.span.0 += one.span.0;
        self.acknowledged += one.acknowledged;
        self.unknown += one.unknown;
        self.errors += one.errors;
        self.doubles += one.doubles;
        self.faults += one.faults;
        self.shards += one.shards;
    }
}

/// What went wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// A generator of its own for everything that the harness draws.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit.max(1)
    }
    /// From `least` to `most`, both included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }
    /// True so often in a thousand.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }
    /// One of these.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Runs a seed; the mix it draws may be changed by the caller.
///
/// # Errors
/// A checker found something.
pub fn run(seed: u64, mix: &Mix) -> Result<Report, Failure> {
    Sim::new(seed, mix)?.run()
}

thread_local! {
    static NOW: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
}

/// Virtual time in nanoseconds and the node being turned, of the run on this thread; for logs.
pub fn virtual_now() -> (u64, usize) {
    NOW.get()
}

struct Sim {
    world: SimWorld,
    mix: Mix,
    fleet: Fleet,
    hosts: Vec<Host>,
    nemesis: Nemesis,
    history: Rc<RefCell<History>>,
    turns: u64,
}

impl Sim {
    fn new(seed: u64, mix: &Mix) -> Result<Self, Failure> {
        let shards = mix.targets * mix.shards;
        let world = SimWorld::new(seed, shards + mix.hosts);
        let fleet = Fleet::new(&world, mix)?;
        let history = Rc::new(RefCell::new(History::default()));
        let make = |n: usize| Host::new(&world, shards + n, n, mix, history.clone(), seed);
        let hosts = (0..mix.hosts).map(make).collect::<Result<Vec<_>, _>>()?;
        let nemesis = Nemesis::new(mix, seed, world.now());
        Ok(Self { world, mix: mix.clone(), fleet, hosts, nemesis, history, turns: 0 })
    }

    fn run(mut self) -> Result<Report, Failure> {
        let begun = self.world.now();
        let end = begun + self.mix.load;
        while self.world.now() < end {
            let until = self.nemesis.next().min(end);
            self.turn_until(until)?;
            self.nemesis.act(&self.world, &mut self.fleet)?;
        }
        self.nemesis.heal(&self.world, &mut self.fleet)?;
        self.hosts.iter_mut().for_each(Host::drain);
        match self.end() {
            // Where more broke than a copyset can bear, it may stop; it may not lie.
            Err(Failure(why)) if self.mix.faults.beyond && STOPPED.iter().any(|s| why.starts_with(s)) => {
                tracing::info!(why, "came to no end");
            }
            done => done?,
        }
        let doubles = self.history.borrow().judge(&self.fleet.witness.changes()?)?;
        let mut report = Report {
            trace: self.world.trace(),
            turns: self.turns,
            span: self.world.now() - begun,
            faults: self.nemesis.count,
            doubles,
            shards: self.fleet.tally(),
            ..Report::default()
        };
        for host in &self.hosts {
            report.acknowledged += host.acknowledged;
            report.unknown += host.unknown;
            report.errors += host.errors;
        }
        Ok(report)
    }

    /// Waits until all IO has ended, reads everything, waits for the replicas and compares them.
    fn end(&mut self) -> Result<(), Failure> {
        self.settle("hosts did not get their answers", |sim| sim.hosts.iter().all(Host::is_idle))?;
        self.hosts.iter_mut().for_each(Host::read_everything);
        self.settle("the last reads did not end", |sim| sim.hosts.iter().all(Host::is_idle))?;
        self.settle("replicas did not settle", |sim| judge::is_settled(&sim.fleet))?;
        judge::compare_replicas(self)?;
        for node in 0..self.fleet.nodes() {
            let target = node / self.mix.shards;
            self.fleet.check_counters(node, self.nemesis.has_bad_disk(target), true)?;
        }
        Ok(())
    }

    /// Turns whatever has something to do, until nothing is left to happen before `until`.
    fn turn_until(&mut self, until: Time) -> Result<(), Failure> {
        while let Some(node) = self.world.step(until) {
            self.turns += 1;
            NOW.set((self.world.now().0, node));
            match node.checked_sub(self.fleet.nodes()) {
                Some(host) => self.hosts[host].turn()?,
                None => self.fleet.turn(node)?,
            }
        }
        Ok(())
    }

    /// Waits for something that must come about now that nothing is broken.
    fn settle(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<(), Failure> {
        let limit = self.world.now() + SETTLE_WITHIN;
        while !done(self) {
            if self.world.now() >= limit {
                let standings = self.fleet.describe();
                let hosts: String = self.hosts.iter().map(|host| host.describe() + "\n").collect();
                return Err(Failure(format!(
                    "liveness: {what} within {} s after the last fault\n{hosts}{standings}",
                    SETTLE_WITHIN.0 / 1_000_000_000
                )));
            }
            let until = self.world.now() + Span::ms(50);
            self.turn_until(until)?;
        }
        Ok(())
    }
}
