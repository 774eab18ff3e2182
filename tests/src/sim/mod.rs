//! The simulator: the production code of a whole cluster, in virtual time, decided by one seed.
//!
//! ```text
//! Mix      what a seed draws: sizes, limits, workload, which faults and how often
//! Fleet    targets: real cores (shard, store, replicas, links, exports) on simulated reactors
//! Host     NBD clients that write, read, trim and zero, and go elsewhere when a link breaks
//! Nemesis  crashes, partitions, resets, stalls, damage at rest, targets that join and are lost
//! Sessions volumes that are taken over by hosts from each other (some runs)
//! Plane    metadata servers, what targets and they tell each other, and operators (some runs)
//! Witness  what the copysets agreed on: log matching, one entry an index, durable on a majority
//! History  every operation on every block, judged as an atomic register at the end
//! ```
//!
//! A run: faults and load for a while, then the faults stop; everything outstanding must end
//! within a bound, every block is read once more, replicas must become equal. The same seed gives
//! the same trace. Only `reactor` is simulated, and where there is a `Plane`, what carries its messages and
//! keeps its records; elsewhere the cluster map is fixed and handed in.

mod fleet;
pub mod history;
mod host;
mod judge;
mod mds;
mod mds_guard;
mod mds_operator;
mod mds_store;
mod mix;
mod nemesis;
mod sessions;
mod witness;

use fleet::Fleet;
pub use fleet::Tally;
use history::History;
use host::Host;
pub use mds::MdsCount;
use mds::Plane;
use mds_operator::Notice;
pub use mix::{FAMILIES, MdsMix, Mix, SIMPLER};
pub use nemesis::Count;
use nemesis::Nemesis;
use protocol::types::{Span, Time};
use reactor::sim::SimWorld;
use sessions::{Sessions, TakeOvers};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::AddAssign;
use std::rc::Rc;

/// How long everything outstanding may take once nothing is broken any more.
const SETTLE_WITHIN: Span = Span::ms(120_000);
/// The same where replicas are to be moved too: an order is good for 15 s, and replicas go one after the other.
const SETTLE_WITHIN_MDS: Span = Span::ms(600_000);
/// How long nothing has moved when all is at rest: an order may be followed for 15 s. And how often something may
/// begin once more before that: leftovers are tidied up, the last to come back is filled.
const REST: Span = Span::ms(30_000);
const ROUNDS_TO_REST: u32 = 10;
/// How long nothing may move any more once all is well.
const QUIET: Span = Span::ms(60_000);

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
    /// Take-overs of volumes that returned.
    pub take_overs: u64,
    /// What the shards counted, all lives together.
    pub shards: Tally,
    /// What metadata servers and operators did.
    pub mds: MdsCount,
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
        self.take_overs += one.take_overs;
        self.faults += one.faults;
        self.shards += one.shards;
        self.mds += one.mds;
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
    plane: Option<Plane>,
    sessions: Option<Sessions>,
    history: Rc<RefCell<History>>,
    turns: u64,
}

impl Sim {
    fn new(seed: u64, mix: &Mix) -> Result<Self, Failure> {
        let shards = mix.targets * mix.shards;
        let world = SimWorld::new(seed, shards + mix.hosts);
        let fleet = Fleet::new(&world, mix)?;
        let history = Rc::new(RefCell::new(History::default()));
        let take_overs = Rc::new(RefCell::new(TakeOvers::default()));
        let make =
            |n: usize| Host::new(&world, shards + n, n, mix, history.clone(), take_overs.clone(), seed);
        let hosts = (0..mix.hosts).map(make).collect::<Result<Vec<_>, _>>()?;
        let nemesis = Nemesis::new(mix, seed, world.now());
        let plane = Plane::new(&world, mix, seed);
        let sessions = Sessions::new(mix, seed, world.now(), take_overs);
        Ok(Self { world, mix: mix.clone(), fleet, hosts, nemesis, plane, sessions, history, turns: 0 })
    }

    fn run(mut self) -> Result<Report, Failure> {
        let begun = self.world.now();
        let end = begun + self.mix.load;
        while self.world.now() < end {
            let until = self.nemesis.next().min(end);
            self.turn_until(until)?;
            self.nemesis.act(&self.world, &mut self.fleet)?;
            if let Some(plane) = &mut self.plane {
                plane.meet(&mut self.fleet);
            }
        }
        self.nemesis.heal(&self.world, &mut self.fleet)?;
        if let Some(plane) = &mut self.plane {
            plane.heal(&mut self.fleet);
        }
        if let Some(sessions) = &mut self.sessions {
            sessions.heal(&mut self.fleet);
        }
        self.hosts.iter_mut().for_each(Host::drain);
        match self.end() {
            // Where more broke than a copyset can bear, it may stop; it may not lie.
            Err(Failure(why)) if self.mix.faults.beyond && STOPPED.iter().any(|s| why.starts_with(s)) => {
                tracing::info!(why, "came to no end");
            }
            done => done?,
        }
        let changes = self.fleet.witness.changes()?;
        let doubles = self.history.borrow().judge(&changes)?;
        self.sessions.as_ref().map_or(Ok(()), |sessions| sessions.judge(&changes))?;
        let mut report = Report {
            trace: self.world.trace() ^ self.plane.as_ref().map_or(0, Plane::trace),
            turns: self.turns,
            span: self.world.now() - begun,
            faults: self.nemesis.count,
            doubles,
            take_overs: self.sessions.as_ref().map_or(0, |sessions| sessions.count),
            shards: self.fleet.tally(),
            mds: self.plane.as_ref().map(|plane| plane.tally(&self.fleet)).unwrap_or_default(),
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
        if self.plane.is_some() {
            self.come_to_rest()?;
        }
        self.settle("take-overs did not return", |sim| {
            sim.sessions.as_ref().is_none_or(Sessions::is_settled)
        })?;
        self.settle("hosts did not get their answers", |sim| sim.hosts.iter().all(Host::is_idle))?;
        self.hosts.iter_mut().for_each(Host::read_everything);
        self.settle("the last reads did not end", |sim| sim.hosts.iter().all(Host::is_idle))?;
        self.settle("replicas did not settle", |sim| judge::is_settled(&sim.fleet))?;
        judge::compare_replicas(self)?;
        for node in 0..self.fleet.nodes() {
            let target = node / self.mix.shards;
            self.fleet.check_counters(node, self.nemesis.has_bad_disk(target), true)?;
        }
        if self.plane.is_some() { self.stay_in_order() } else { Ok(()) }
    }

    /// Whether the servers want nothing any more.
    fn is_in_order(&self) -> bool {
        self.plane.as_ref().is_none_or(|plane| plane.is_unsettled(&self.fleet).is_none())
    }

    /// Waits until nothing has moved for a while: a server that has just begun to lead waits before it looks.
    fn come_to_rest(&mut self) -> Result<(), Failure> {
        let moves = |sim: &Self| sim.plane.as_ref().map(|plane| plane.tally(&sim.fleet).moves);
        for _ in 0..ROUNDS_TO_REST {
            let before = moves(self);
            self.settle("replicas and volumes did not come to rest", Self::is_in_order)?;
            let until = self.world.now() + REST;
            self.turn_until(until)?;
            if moves(self) == before && self.is_in_order() {
                return Ok(());
            }
        }
        Err(Failure(format!("liveness: replicas move for ever\n{}", self.describe())))
    }

    /// Once all is well nothing moves any more.
    fn stay_in_order(&mut self) -> Result<(), Failure> {
        let seen =
            |sim: &Self| sim.plane.as_ref().map(|plane| (plane.epochs(), plane.tally(&sim.fleet).moves));
        let before = seen(self);
        let until = self.world.now() + QUIET;
        self.turn_until(until)?;
        judge::find_leaks(&self.fleet)?;
        if seen(self) == before && self.is_in_order() {
            return Ok(());
        }
        Err(Failure(format!(
            "at rest: replicas move though all was well: {before:?}, then {:?}\n{}",
            seen(self),
            self.describe()
        )))
    }

    fn describe(&self) -> String {
        let hosts: String = self.hosts.iter().map(|host| host.describe() + "\n").collect();
        let plane = self.plane.as_ref();
        let wanted = plane.and_then(|plane| plane.is_unsettled(&self.fleet)).unwrap_or_default();
        let plane = plane.map(Plane::describe).unwrap_or_default();
        format!("{wanted}\n{hosts}{plane}{}", self.fleet.describe())
    }

    /// Turns whatever has something to do, until nothing is left to happen before `until`.
    fn turn_until(&mut self, until: Time) -> Result<(), Failure> {
        loop {
            let now = self.world.now();
            let plane = self.plane.as_ref().map(Plane::next);
            let sessions = self.sessions.as_ref().map(|sessions| sessions.next(now));
            let next = plane.into_iter().chain(sessions).chain([until]).min().expect("until is there");
            self.turn_nodes_until(next)?;
            if let Some(sessions) = &mut self.sessions {
                sessions.act(&self.world, &mut self.fleet, &mut self.hosts);
            }
            if let Some(plane) = &mut self.plane {
                plane.act(&mut self.fleet)?;
                for notice in plane.notices() {
                    self.tell_hosts(notice);
                }
            }
            if self.world.now() >= until {
                return Ok(());
            }
        }
    }

    fn turn_nodes_until(&mut self, until: Time) -> Result<(), Failure> {
        while let Some(node) = self.world.step(until) {
            self.turns += 1;
            NOW.set((self.world.now().0, node));
            match node.checked_sub(self.fleet.nodes()) {
                Some(host) => self.hosts[host].turn()?,
                None => self.fleet.turn(node)?,
            }
            if let Some(plane) = self.plane.as_mut().filter(|_| !self.fleet.reports.is_empty()) {
                plane.meet(&mut self.fleet);
                // It may want to act before `until`.
                if plane.next() <= self.world.now() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn tell_hosts(&mut self, notice: Notice) {
        let (Notice::There(volume) | Notice::Leaves(volume) | Notice::Gone(volume)) = notice;
        for host in self.hosts.iter_mut().filter(|host| host.volume() == volume) {
            host.hear(notice);
        }
    }

    /// Waits for something that must come about now that nothing is broken.
    fn settle(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<(), Failure> {
        let within = if self.plane.is_some() { SETTLE_WITHIN_MDS } else { SETTLE_WITHIN };
        let limit = self.world.now() + within;
        while !done(self) {
            if self.world.now() >= limit {
                return Err(Failure(format!(
                    "liveness: {what} within {} s after the last fault\n{}",
                    within.0 / 1_000_000_000,
                    self.describe()
                )));
            }
            let until = self.world.now() + Span::ms(50);
            self.turn_until(until)?;
        }
        Ok(())
    }
}
