//! The control plane of a run: metadata servers, the agents of targets, and the network between them.
//!
//! ```text
//! Server   production: mds_lite::state and intake; here: its store, its lease, and that it dies and stalls
//! agents   production: target_daemon's Agent; here: when it registers, beats and gives up (control/mds.rs)
//! Store    what is durable, and who leads (mds_store.rs)
//! Operator volumes and drains (mds_operator.rs)
//! Guard    what must hold (mds_guard.rs)
//! ```
//!
//! Messages take time, get lost, come twice, and come long after their sender gave up. A stalled server finds
//! them all when it goes on; a target's agent does not stall with its shards, as in production, where it is a
//! thread of its own. All that is drawn comes from a generator of its own.

use super::fleet::{CLUSTER, Fleet, addresses};
use super::mds_operator::{Notice, Operator};
use super::mds_store::{LEASE, Store};
use super::{Draw, Failure, MdsMix, Mix};
use mds_lite::intake;
use mds_lite::lease::Lease;
use mds_lite::record::Uuid;
use mds_lite::state::{Command, Policy, Reply, State};
use protocol::control::{Problem, ProblemKind, map_from_pb, map_to_pb, pb};
use protocol::types::{CHUNK_BYTES, CopysetId, Span, TargetId, Time};
use reactor::sim::SimWorld;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::AddAssign;
use std::sync::Arc;
use target_daemon::control::{Agent, FromShard, ToShard};

/// How long a target waits for an answer (`client::control::Patience::ONCE`).
const PATIENCE: Span = Span::ms(3_000);
/// The first and the longest pause before another attempt, and the least between two beats.
const RETRY_MIN: Span = Span::ms(100);
const RETRY_MAX: Span = Span::ms(1_000);
/// The longest that anything goes on that breaks the servers' network.
const CUT_MAX: Span = Span::ms(6_000);

/// What happened to the control plane.
#[derive(Clone, Copy, Default, Debug)]
pub struct MdsCount {
    /// Times that a server began to lead.
    pub leads: u64,
    /// Servers that crashed, at a transaction or else.
    pub crashes: u64,
    /// Servers that stalled.
    pub pauses: u64,
    /// Times that a server lost a target, or the store.
    pub cuts: u64,
    /// Messages lost, doubled and late.
    pub mail: u64,
    /// Heartbeats taken in.
    pub beats: u64,
    /// Transactions.
    pub commits: u64,
    /// Changes of replicas begun.
    pub moves: u64,
    /// Changes of voters committed.
    pub memberships: u64,
    /// Replicas freed.
    pub freed: u64,
    /// Volumes created.
    pub volumes: u64,
    /// Volumes deleted and freed everywhere.
    pub purged: u64,
    /// Drains begun.
    pub drains: u64,
}

impl AddAssign for MdsCount {
    fn add_assign(&mut self, one: Self) {
        self.leads += one.leads;
        self.crashes += one.crashes;
        self.pauses += one.pauses;
        self.cuts += one.cuts;
        self.mail += one.mail;
        self.beats += one.beats;
        self.commits += one.commits;
        self.moves += one.moves;
        self.memberships += one.memberships;
        self.freed += one.freed;
        self.volumes += one.volumes;
        self.purged += one.purged;
        self.drains += one.drains;
    }
}

#[derive(Clone, Debug)]
enum Ask {
    Register(pb::RegisterTargetRequest),
    Beat(pb::HeartbeatRequest),
}

#[derive(Clone, Debug)]
enum Answer {
    Registered(Option<pb::ClusterMap>),
    Beaten(pb::HeartbeatResponse),
    Refused(ProblemKind),
}

#[derive(Clone, Debug)]
enum Event {
    /// An agent looks at what is due.
    Agent(usize),
    Ask {
        from: usize,
        life: u64,
        server: usize,
        call: u64,
        ask: Ask,
    },
    Answer {
        to: usize,
        life: u64,
        call: u64,
        answer: Answer,
    },
    /// A newer map by the watch.
    News {
        to: usize,
        life: u64,
        map: pb::ClusterMap,
    },
    /// A server looks at its lease, or for one.
    Lease(usize, u64),
    /// A server's schedulers look around.
    Tick(usize, u64),
    Operator,
    Trouble(Trouble),
    Start(usize),
    Resume(usize),
    Reach(usize, usize),
    ReachStore(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    Crash,
    Pause,
    Cut,
    StoreCut,
    Drain,
    Volumes,
}

/// How a target stands with the servers.
enum Session {
    Idle { again_at: Time },
    Registering { call: u64, until: Time },
    Up { beat: Option<Beat>, last: Time, next: Time },
}

struct Beat {
    call: u64,
    /// By the target's own clock.
    sent: Time,
    until: Time,
}

/// The control side of a target that runs.
struct Node {
    life: u64,
    agent: Agent,
    server: usize,
    session: Session,
    pause: Span,
}

struct Server {
    life: u64,
    is_up: bool,
    is_paused: bool,
    has_store: bool,
    /// What came while it was stalled.
    held: Vec<Event>,
    lead: Option<Lead>,
}

struct Lead {
    state: State,
    since: Time,
    term: u64,
    /// When it must stop, unless it is renewed; `None`: it is the only process.
    lease: Option<Lease>,
}

/// The control plane.
pub struct Plane {
    world: SimWorld,
    draw: Draw,
    mix: MdsMix,
    policy: Policy,
    shards: usize,
    capacity: u64,
    agenda: BTreeMap<(Time, u64), Event>,
    next_number: u64,
    nodes: Vec<Option<Node>>,
    servers: Vec<Server>,
    store: Store,
    /// Targets and servers that do not reach each other.
    cuts: BTreeSet<(usize, usize)>,
    operator: Operator,
    is_calm: bool,
    trace: u64,
    /// What happened.
    pub count: MdsCount,
}

impl Plane {
    /// Servers and agents, none of which has done anything yet.
    pub fn new(world: &SimWorld, mix: &Mix, seed: u64) -> Option<Self> {
        let mds = mix.mds.clone()?;
        let server = |_| Server {
            life: 0,
            is_up: false,
            is_paused: false,
            has_store: true,
            held: Vec::new(),
            lead: None,
        };
        let policy = Policy {
            replicas: 3,
            copysets: mix.copysets as u32,
            targets_expected: mds.initial as u32,
            heartbeat: mds.heartbeat,
            unstable_after: mds.unstable_after,
            offline_after: mds.offline_after,
            tasks_a_target: mds.tasks_a_target,
            ..Policy::default()
        };
        let mut plane = Self {
            world: world.clone(),
            draw: Draw::new(seed ^ 0x706c_616e),
            policy,
            shards: mix.shards,
            capacity: u64::from(mix.layout.slots_max) * mix.shards as u64 * CHUNK_BYTES as u64,
            agenda: BTreeMap::new(),
            next_number: 0,
            nodes: (0..mix.targets).map(|_| None).collect(),
            servers: (0..mds.servers).map(server).collect(),
            mix: mds,
            store: Store::default(),
            cuts: BTreeSet::new(),
            operator: Operator::new(mix),
            is_calm: false,
            trace: 0,
            count: MdsCount::default(),
        };
        for server in 0..plane.servers.len() {
            plane.at(Span(0), Event::Start(server));
        }
        plane.at(Span::ms(100), Event::Operator);
        let all = [
            Trouble::Crash,
            Trouble::Pause,
            Trouble::Cut,
            Trouble::StoreCut,
            Trouble::Drain,
            Trouble::Volumes,
        ];
        all.into_iter().for_each(|trouble| plane.plan(trouble));
        Some(plane)
    }

    fn at(&mut self, after: Span, event: Event) {
        self.next_number += 1;
        self.agenda.insert((self.world.now() + after, self.next_number), event);
    }

    fn plan(&mut self, trouble: Trouble) {
        let mean = match trouble {
            Trouble::Crash => self.mix.crash,
            Trouble::Pause => self.mix.pause,
            Trouble::Cut => self.mix.cut,
            Trouble::StoreCut => self.mix.store_cut,
            Trouble::Drain => self.mix.drain,
            Trouble::Volumes => self.mix.volumes,
        };
        if let Some(mean) = mean {
            let after = Span(self.draw.between(1, 2 * mean.0));
            self.at(after, Event::Trouble(trouble));
        }
    }

    /// When [`Plane::act`] wants to be called.
    pub fn next(&self) -> Time {
        self.agenda.first_key_value().map_or(Time(u64::MAX), |(key, _)| key.0)
    }

    /// A fingerprint of all that happened.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// Does what is due.
    ///
    /// # Errors
    /// A rule is broken.
    pub fn act(&mut self, fleet: &mut Fleet) -> Result<(), Failure> {
        self.meet(fleet);
        while let Some(entry) = self.agenda.first_entry().filter(|e| e.key().0 <= self.world.now()) {
            let ((at, _), event) = entry.remove_entry();
            let text = format!("{at:?} {event:?}");
            self.trace = text.bytes().fold(self.trace ^ at.0, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
            self.happen(fleet, event)?;
        }
        Ok(())
    }

    /// Targets that started or crashed since it was last called; what their shards told.
    pub fn meet(&mut self, fleet: &mut Fleet) {
        for target in 0..self.nodes.len() {
            let life = fleet.boots(target);
            let known = self.nodes[target].as_ref().map(|node| node.life);
            if !fleet.is_up(target) {
                self.nodes[target] = None;
            } else if known != Some(life) {
                let id = TargetId(target as u32 + 1);
                let mut agent = Agent::new(id, disk(target), self.shards as u16);
                if let Some(map) = fleet.cache(target) {
                    agent.adopt(map.clone(), true);
                }
                let session = Session::Idle { again_at: self.world.now() };
                self.nodes[target] = Some(Node { life, agent, server: 0, session, pause: RETRY_MIN });
                self.at(Span(0), Event::Agent(target));
            }
        }
        for (number, report) in std::mem::take(&mut fleet.reports) {
            let (target, shard) = (number / self.shards, (number % self.shards) as u16);
            let Some(node) = &mut self.nodes[target] else { continue };
            node.agent.note(shard, &report);
            if let (FromShard::NeedMap, Session::Up { last, next, .. }) = (&report, &mut node.session) {
                *next = (*next).min(*last + RETRY_MIN);
                self.at(Span(0), Event::Agent(target));
            }
        }
    }

    fn happen(&mut self, fleet: &mut Fleet, event: Event) -> Result<(), Failure> {
        match event {
            Event::Agent(target) => self.agent(fleet, target),
            Event::Ask { server, .. } | Event::Tick(server, _) | Event::Lease(server, _)
                if self.servers[server].is_paused =>
            {
                self.servers[server].held.push(event);
            }
            Event::Ask { from, life, server, call, ask } => {
                let answer = self.answer(fleet, server, ask)?;
                self.send(from, server, Event::Answer { to: from, life, call, answer });
            }
            Event::Answer { to, life, call, answer } => self.answered(fleet, (to, life), call, answer),
            Event::News { to, life, map } => {
                if self.nodes[to].as_ref().is_some_and(|node| node.life == life) {
                    self.take_map(fleet, to, &map);
                }
            }
            Event::Lease(server, life) => self.lease(fleet, server, life)?,
            Event::Tick(server, life) => self.tick(fleet, server, life)?,
            Event::Operator => self.operate(fleet)?,
            Event::Trouble(trouble) => {
                self.strike(fleet, trouble);
                self.plan(trouble);
            }
            Event::Start(server) => self.start(server),
            Event::Resume(server) => self.resume(server),
            Event::Reach(target, server) => drop(self.cuts.remove(&(target, server))),
            Event::ReachStore(server) => self.servers[server].has_store = true,
        }
        Ok(())
    }

    // ---- the network

    /// Between a target and a server, either way.
    fn send(&mut self, target: usize, server: usize, event: Event) {
        if self.cuts.contains(&(target, server)) {
            return;
        }
        let (lost, doubled, late) = if self.is_calm {
            (0, 0, 0)
        } else {
            (self.mix.lost_permille, self.mix.doubled_permille, self.mix.late_permille)
        };
        if self.draw.chance(lost) {
            self.count.mail += 1;
            return;
        }
        let copies = 1 + usize::from(self.draw.chance(doubled));
        for _ in 0..copies {
            let slow = self.draw.chance(late);
            self.count.mail += u64::from(slow);
            let most = if slow { 8_000_000 } else { 3_000 };
            let after = Span::us(self.draw.between(50, most));
            self.at(after, event.clone());
        }
        self.count.mail += copies as u64 - 1;
    }

    // ---- targets

    fn agent(&mut self, fleet: &Fleet, target: usize) {
        let (now, call) = (self.world.now(), self.next_number);
        let Some(node) = &mut self.nodes[target] else { return };
        let (life, server) = (node.life, node.server);
        let ask = match &mut node.session {
            Session::Idle { again_at } if *again_at <= now => {
                node.session = Session::Registering { call, until: now + PATIENCE };
                Ask::Register(registration(target, self.shards, self.capacity))
            }
            Session::Registering { until, .. } if *until <= now => return self.trouble(target, true),
            Session::Up { beat: Some(beat), .. } if beat.until <= now => return self.trouble(target, true),
            Session::Up { beat: beat @ None, next, .. } if *next <= now => {
                *beat = Some(Beat { call, sent: fleet.clock(target), until: now + PATIENCE });
                let shards = fleet.nodes_of(target).filter_map(|node| fleet.status(node)).collect();
                Ask::Beat(node.agent.heartbeat(shards, self.capacity))
            }
            _ => return,
        };
        self.at(PATIENCE, Event::Agent(target));
        self.send(target, server, Event::Ask { from: target, life, server, call, ask });
    }

    /// The session is over; another server may know more.
    fn trouble(&mut self, target: usize, elsewhere: bool) {
        let (now, servers) = (self.world.now(), self.servers.len());
        let Some(node) = &mut self.nodes[target] else { return };
        let pause = node.pause;
        if elsewhere {
            node.server = (node.server + 1) % servers;
            node.pause = Span((2 * pause.0).min(RETRY_MAX.0));
        }
        node.session = Session::Idle { again_at: now + pause };
        self.at(pause, Event::Agent(target));
    }

    fn answered(&mut self, fleet: &mut Fleet, (to, life): (usize, u64), call: u64, answer: Answer) {
        let now = self.world.now();
        let Some(node) = self.nodes[to].as_mut().filter(|node| node.life == life) else { return };
        let expected = match &node.session {
            Session::Registering { call, .. } | Session::Up { beat: Some(Beat { call, .. }), .. } => {
                Some(*call)
            }
            _ => None,
        };
        if expected != Some(call) {
            return;
        }
        match answer {
            Answer::Refused(kind) => self.trouble(to, kind != ProblemKind::UnknownTarget),
            Answer::Registered(map) => {
                node.session = Session::Up { beat: None, last: now, next: now };
                node.pause = RETRY_MIN;
                if let Some(map) = map {
                    self.take_map(fleet, to, &map);
                }
                self.at(Span(0), Event::Agent(to));
            }
            Answer::Beaten(beaten) => {
                let Session::Up { beat, last, next } = &mut node.session else { return };
                let Some(Beat { sent, .. }) = beat.take() else { return };
                let interval = Span::ms(beaten.interval_ms.into());
                (*last, *next) = (now, now + interval);
                node.agent.answered(beaten.wants_volumes);
                if let Some(map) = beaten.map {
                    self.take_map(fleet, to, &map);
                }
                self.keep_map(fleet, to);
                self.pass_on(fleet, to, &beaten.orders, sent);
                self.at(interval, Event::Agent(to));
            }
        }
    }

    /// As `Control::take_map`.
    fn take_map(&mut self, fleet: &mut Fleet, target: usize, map: &pb::ClusterMap) {
        let map = Arc::new(map_from_pb(map).expect("a server's map is one that every target accepts"));
        let saved = self.is_calm || !self.draw.chance(self.mix.unsaved_permille);
        let Some(node) = &mut self.nodes[target] else { return };
        if !node.agent.is_news(&map) {
            return;
        }
        if saved {
            fleet.keep(target, map.clone());
        }
        node.agent.adopt(map.clone(), saved);
        for node in fleet.nodes_of(target) {
            fleet.tell(node, ToShard::Map(map.clone()));
        }
    }

    /// As `Control::keep_map`.
    fn keep_map(&mut self, fleet: &mut Fleet, target: usize) {
        let Some(node) = &mut self.nodes[target] else { return };
        let Some(map) = node.agent.unkept().cloned() else { return };
        if self.is_calm || !self.draw.chance(self.mix.unsaved_permille) {
            fleet.keep(target, map);
            node.agent.kept();
        }
    }

    fn pass_on(&self, fleet: &Fleet, target: usize, orders: &[pb::Order], sent: Time) {
        let Some(node) = &self.nodes[target] else { return };
        let orders: Arc<[_]> = node.agent.orders(orders, sent).into();
        if !orders.is_empty() {
            tracing::debug!(target, ?orders, "orders");
            fleet.nodes_of(target).for_each(|node| fleet.tell(node, ToShard::Orders(orders.clone())));
        }
    }

    // ---- servers

    fn start(&mut self, server: usize) {
        let this = &mut self.servers[server];
        if this.is_up {
            return;
        }
        (this.is_up, this.life) = (true, this.life + 1);
        let life = this.life;
        tracing::info!(server, "a metadata server starts");
        self.at(Span(0), Event::Lease(server, life));
    }

    fn crash(&mut self, server: usize) {
        let this = &mut self.servers[server];
        if !this.is_up {
            return;
        }
        tracing::info!(server, "a metadata server crashes");
        this.held.clear();
        (this.is_up, this.is_paused, this.lead) = (false, false, None);
        self.count.crashes += 1;
        let after = Span::ms(self.draw.between(10, 5_000));
        self.at(after, Event::Start(server));
    }

    fn resume(&mut self, server: usize) {
        let this = &mut self.servers[server];
        this.is_paused = false;
        for event in std::mem::take(&mut this.held) {
            self.at(Span(0), event);
        }
    }

    /// Renews the lease of a leader, or looks whether the place is free.
    fn lease(&mut self, fleet: &mut Fleet, server: usize, life: u64) -> Result<(), Failure> {
        let (now, alone) = (self.world.now(), self.servers.len() == 1);
        let this = &mut self.servers[server];
        if !this.is_up || this.life != life {
            return Ok(());
        }
        let reaches = this.has_store;
        match &mut this.lead {
            Some(lead) if reaches => match &lead.lease {
                Some(lease) if self.store.renew(lead.term, now) => lease.extend(now, LEASE),
                Some(_) => this.lead = None,
                None => {}
            },
            Some(_) => {}
            None if alone || reaches => {
                let term = if alone { Some(self.store.open()) } else { self.store.campaign(now) };
                if let Some(term) = term {
                    self.lead(fleet, server, term)?;
                }
            }
            None => {}
        }
        if !alone {
            self.at(Span(LEASE.0 / 5), Event::Lease(server, life));
        }
        Ok(())
    }

    fn lead(&mut self, fleet: &mut Fleet, server: usize, term: u64) -> Result<(), Failure> {
        let now = self.world.now();
        let state = State::restore(self.policy, Uuid(CLUSTER), self.store.load())
            .map_err(|problem| Failure(format!("records: they cannot be loaded: {problem}")))?;
        tracing::info!(server, term, generation = state.map().generation, "a metadata server leads");
        fleet.set_map(state.map().clone());
        if let Some(guard) = &mut fleet.guard {
            guard.another_leads();
        }
        let lease = (self.servers.len() > 1).then(Lease::default);
        lease.iter().for_each(|lease| lease.extend(now, LEASE));
        let life = self.servers[server].life;
        self.servers[server].lead = Some(Lead { state, since: now, term, lease });
        self.count.leads += 1;
        self.at(self.policy.heartbeat, Event::Tick(server, life));
        Ok(())
    }

    fn tick(&mut self, fleet: &mut Fleet, server: usize, life: u64) -> Result<(), Failure> {
        let this = &self.servers[server];
        if this.life != life || this.lead.is_none() {
            return Ok(());
        }
        let unix_s = self.world.now().0 / 1_000_000_000;
        // Whatever fails is tried again at the next one.
        let _ = self.execute(fleet, server, Command::Tick { unix_s })?;
        self.at(self.policy.heartbeat, Event::Tick(server, life));
        Ok(())
    }

    /// As `Owner::execute` and `Owner::leads`.
    fn execute(
        &mut self,
        fleet: &mut Fleet,
        server: usize,
        command: Command,
    ) -> Result<Result<Reply, ProblemKind>, Failure> {
        let now = self.world.now();
        let this = &mut self.servers[server];
        let Some(lead) = this.lead.as_mut().filter(|_| this.is_up) else {
            return Ok(Err(ProblemKind::Unreachable));
        };
        if lead.lease.as_ref().is_some_and(|lease| !lease.holds(now)) {
            this.lead = None;
            return Ok(Err(ProblemKind::Unreachable));
        }
        if let Some(guard) = &fleet.guard {
            guard.answers(server, lead.term, self.store.term())?;
        }
        let local = Time((now - lead.since).0);
        let decision = match lead.state.decide(local, command) {
            Ok(decision) => decision,
            Err(problem) => {
                tracing::debug!(server, %problem, "refused");
                return Ok(Err(problem.kind));
            }
        };
        let (term, generation) = (lead.term, lead.state.map().generation);
        if !decision.changes.is_empty() {
            let fate = if self.is_calm { 1000 } else { self.draw.below(1000) };
            let crashes = fate < self.mix.crash_at_commit_permille;
            let this = &mut self.servers[server];
            if crashes && fate % 2 == 0 {
                self.crash(server);
                return Ok(Err(ProblemKind::Unreachable));
            }
            // A transaction of unknown fate, as well as one that is refused, ends a leader's term.
            let known = this.has_store || self.servers.len() == 1;
            let done = (known || fate % 2 == 0) && self.store.commit(term, &decision.changes);
            if crashes {
                self.crash(server);
                return Ok(Err(ProblemKind::Unreachable));
            }
            if !known || !done {
                self.servers[server].lead = None;
                return Ok(Err(ProblemKind::Storage));
            }
            let lead = self.servers[server].lead.as_mut().expect("it leads, as seen above");
            lead.state.apply(decision.changes);
        }
        let lead = self.servers[server].lead.as_mut().expect("it leads, as seen above");
        if let Some(guard) = &mut fleet.guard {
            guard.wants(&lead.state, local)?;
        }
        let map = lead.state.map().clone();
        if map.generation != generation {
            fleet.set_map(map.clone());
            self.publish(server, &map_to_pb(&map));
        }
        Ok(Ok(decision.reply))
    }

    /// Those that watch the map are told.
    fn publish(&mut self, server: usize, map: &pb::ClusterMap) {
        for target in 0..self.nodes.len() {
            let Some(node) = &self.nodes[target] else { continue };
            if node.server == server && matches!(node.session, Session::Up { .. }) {
                let news = Event::News { to: target, life: node.life, map: map.clone() };
                self.send(target, server, news);
            }
        }
    }

    /// As `Service`.
    fn answer(&mut self, fleet: &mut Fleet, server: usize, ask: Ask) -> Result<Answer, Failure> {
        let wrong = |problem: Problem| Failure(format!("intake: a target's own message: {problem}"));
        let (command, known, of) = match ask {
            Ask::Register(request) => {
                (Command::Register(intake::registration(request).map_err(wrong)?), 0, None)
            }
            Ask::Beat(request) => {
                let beat = intake::heartbeat(request).map_err(wrong)?;
                let (known, of) = (beat.known_generation, beat.target);
                (Command::Heartbeat(beat), known, Some(of))
            }
        };
        let reply = match self.execute(fleet, server, command)? {
            Ok(reply) => reply,
            Err(kind) => return Ok(Answer::Refused(kind)),
        };
        let state = self.servers[server].lead.as_ref().map(|lead| &lead.state);
        let wants_volumes = state.zip(of).is_some_and(|(state, target)| state.wants_slots(target));
        let map = state.map(|state| state.map());
        let map = map.filter(|map| map.generation > known).map(|map| map_to_pb(map));
        Ok(match reply {
            Reply::Orders(orders) => {
                self.count.beats += 1;
                let interval_ms = (self.policy.heartbeat.0 / 1_000_000) as u32;
                let away = Vec::new();
                Answer::Beaten(pb::HeartbeatResponse { map, interval_ms, away, orders, wants_volumes })
            }
            _ => Answer::Registered(map),
        })
    }

    // ---- operators and trouble

    fn operate(&mut self, fleet: &mut Fleet) -> Result<(), Failure> {
        self.at(Span::ms(100), Event::Operator);
        let Some(command) = self.operator.wish(fleet) else { return Ok(()) };
        let leads = |server: &Server| server.is_up && !server.is_paused && server.lead.is_some();
        let Some(server) = self.servers.iter().position(leads) else { return Ok(()) };
        let done = self.execute(fleet, server, command)?;
        self.operator.answered(fleet, done);
        Ok(())
    }

    /// What hosts are to know of their volumes.
    pub fn notices(&mut self) -> Vec<Notice> {
        self.operator.notices()
    }

    fn strike(&mut self, fleet: &mut Fleet, trouble: Trouble) {
        let server = self.draw.below(self.servers.len() as u64) as usize;
        let lasts = Span(self.draw.between(10_000_000, CUT_MAX.0));
        match trouble {
            Trouble::Crash => self.crash(server),
            Trouble::Pause if self.servers[server].is_up => {
                self.count.pauses += 1;
                self.servers[server].is_paused = true;
                self.at(lasts, Event::Resume(server));
            }
            Trouble::Pause => {}
            Trouble::Cut => {
                let target = self.draw.below(self.nodes.len() as u64) as usize;
                self.count.cuts += 1;
                self.cuts.insert((target, server));
                self.at(lasts, Event::Reach(target, server));
            }
            Trouble::StoreCut => {
                self.count.cuts += 1;
                self.servers[server].has_store = false;
                self.at(lasts, Event::ReachStore(server));
            }
            Trouble::Drain => self.operator.drain(fleet, &mut self.draw),
            Trouble::Volumes => self.operator.change_volumes(&mut self.draw),
        }
    }

    /// Ends everything that is wrong with servers and their network.
    pub fn heal(&mut self, fleet: &mut Fleet) {
        self.is_calm = true;
        let is_trouble = |event: &Event| {
            matches!(event, Event::Trouble(_) | Event::Resume(_) | Event::Reach(..) | Event::ReachStore(_))
        };
        self.agenda.retain(|_, event| !is_trouble(event));
        self.cuts.clear();
        for server in 0..self.servers.len() {
            self.servers[server].has_store = true;
            self.resume(server);
            self.start(server);
        }
        self.meet(fleet);
    }

    // ---- the end

    fn leading(&self) -> Option<&State> {
        self.servers.iter().find_map(|server| server.lead.as_ref()).map(|lead| &lead.state)
    }

    /// What is still to be done by anybody; `None`: nothing.
    pub fn is_unsettled(&self, fleet: &Fleet) -> Option<String> {
        if let Some(wish) = self.operator.waits_for() {
            return Some(wish);
        }
        let Some(state) = self.leading() else { return Some("no server leads".into()) };
        if let Some((id, task)) = state.tasks().next() {
            return Some(format!("copyset {id} is to change: {task:?}"));
        }
        if state.outstanding().0 > 0 {
            return Some(format!("{} changes are outstanding", state.outstanding().0));
        }
        let map = state.map();
        if let Some((id, _)) = map.volumes.iter().find(|(_, volume)| volume.deleted) {
            return Some(format!("volume {id} is not freed by targets {:?}", state.freeing(*id)));
        }
        for (target, node) in self.nodes.iter().enumerate() {
            let known = node.as_ref().map(|node| node.agent.map().map_or(0, |map| map.generation));
            if known.is_some_and(|known| known != map.generation) {
                return Some(format!("target {target} has the map of {known:?}, not of {}", map.generation));
            }
        }
        self.misplaced(fleet, state)
    }

    /// A copyset that is not where it should be.
    fn misplaced(&self, fleet: &Fleet, state: &State) -> Option<String> {
        for (id, entry) in &state.map().copysets {
            let bad = |target: TargetId| {
                let target = target.0 as usize - 1;
                !fleet.is_there(target) || fleet.draining.contains(&target)
            };
            if entry.members.len() != 3 || entry.members.iter().any(|m| bad(m.target)) {
                return Some(format!("copyset {id} is on {:?}", entry.members));
            }
            let members: BTreeSet<_> = entry.members.iter().copied().collect();
            let agree = |m: &&protocol::types::ShardAddr| {
                let replica = fleet.core(fleet.node_of(**m)).and_then(|core| core.replica(*id));
                replica.is_some_and(|r| {
                    r.members().voters().collect::<BTreeSet<_>>() == members
                        && r.members().learners().count() == 0
                })
            };
            if let Some(differs) = entry.members.iter().find(|m| !agree(m)) {
                return Some(format!("the replica of copyset {id} on {differs:?} knows other members"));
            }
        }
        None
    }

    /// Epochs of all copysets, which no longer change when all is settled.
    pub fn epochs(&self) -> BTreeMap<CopysetId, u64> {
        let map = self.leading().map(|state| state.map().clone()).unwrap_or_default();
        map.copysets.iter().map(|(id, entry)| (*id, entry.epoch)).collect()
    }

    /// What happened, all told.
    pub fn tally(&self, fleet: &Fleet) -> MdsCount {
        let guard = fleet.guard.as_ref();
        MdsCount {
            commits: self.store.commits,
            moves: guard.map_or(0, |guard| guard.begun),
            memberships: guard.map_or(0, |guard| guard.changes),
            freed: guard.map_or(0, |guard| guard.freed),
            volumes: self.operator.created,
            purged: self.operator.deleted,
            drains: self.operator.drains,
            ..self.count
        }
    }

    /// How servers and agents stand, as text.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (number, server) in self.servers.iter().enumerate() {
            let Server { is_up, is_paused, has_store, lead, .. } = server;
            text += &format!("server {number}: up {is_up}, paused {is_paused}, reaches store {has_store}\n");
            let Some(lead) = lead else { continue };
            text += &format!("  leads in term {}: {:?}\n", lead.term, lead.state.map());
            for (id, task) in lead.state.tasks() {
                text += &format!("  copyset {id}: {task:?}\n");
            }
        }
        for (target, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let generation = node.agent.map().map_or(0, |map| map.generation);
            text +=
                &format!("agent of target {}: map {generation}, asks server {}\n", target + 1, node.server);
        }
        text
    }
}

fn disk(target: usize) -> [u8; 16] {
    [target as u8 + 1; 16]
}

fn registration(target: usize, shards: usize, capacity_bytes: u64) -> pb::RegisterTargetRequest {
    let peers = target * shards..(target + 1) * shards;
    pb::RegisterTargetRequest {
        id: target as u32 + 1,
        cluster: CLUSTER.to_vec(),
        disk_uuid: disk(target).to_vec(),
        peers: peers.map(|node| addresses(node).0.to_string()).collect(),
        endpoints: Some(pb::Endpoints::default()),
        capacity_bytes,
        ..Default::default()
    }
}
