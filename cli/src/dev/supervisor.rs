//! Starts the processes, keeps them running, stops them.
//!
//! One loop owns all children and all of the state; whatever happens (a child's end, a
//! signal, a restart that is due, the cluster ready, a child that serves again) is one event of it.

use super::bring_up::{self, Again, Served};
use super::process::{Ended, Process};
use super::record::{DevRecord, MdsRecord, TargetRecord};
use super::{Plan, ready, say};
use crate::problem::{Exit, Outcome, Problem};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout_at};

/// For all targets together to stop; then for the MDS. After that they are killed.
const STOP_WAIT_MAX: Duration = Duration::from_secs(10);
/// From the first start to a cluster that serves.
const READY_WAIT_MAX: Duration = Duration::from_secs(60);
/// Copysets of the pool: each target leads some, and they are few enough to cost nothing when idle.
const COPYSETS_A_TARGET: u32 = 2;
/// Index of the MDS among the children; target N is child N.
const MDS: usize = 0;

/// Runs the cluster until a signal, or until it turns out that it cannot be brought up.
pub async fn run(plan: &Plan) -> Outcome {
    let mut signals = Signals::new()?;
    let mut supervisor = Supervisor::new(plan);
    let outcome = supervisor.serve(&mut signals).await;
    DevRecord::remove(plan.layout.root());
    supervisor.stop(&mut signals).await;
    outcome
}

/// What could not be done is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

struct Supervisor<'a> {
    plan: &'a Plan,
    children: Vec<Process>,
    ended: mpsc::UnboundedReceiver<Ended>,
    /// Given to children as they start.
    tell_ended: mpsc::UnboundedSender<Ended>,
    /// Children to start again, and when.
    restarts: Vec<(Instant, usize)>,
    /// Ends with each child that was started again and serves, or does not within a time.
    probes: JoinSet<(usize, u32, Result<(), String>)>,
    /// Of these, the one that each child's end makes idle.
    probed: BTreeMap<usize, AbortHandle>,
    /// What is served, once it is.
    served: Option<Served>,
    /// When to write the record again, which could not be written.
    record_due: Option<Instant>,
}

struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    hang_up: unix::Signal,
}

impl Signals {
    fn new() -> Result<Self, Problem> {
        let listen = |kind| unix::signal(kind).map_err(Problem::io("cannot listen for signals"));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

impl<'a> Supervisor<'a> {
    fn new(plan: &'a Plan) -> Self {
        let (tell_ended, ended) = mpsc::unbounded_channel();
        let child = |name: String, arguments| Process::new(&plan.layout, name, arguments);
        let mut children = vec![child("mds".into(), mds_arguments(plan))];
        for id in 1..=plan.shape.targets.len() as u32 {
            children.push(child(format!("target-{id}"), target_arguments(plan, id)));
        }
        let (probes, probed) = (JoinSet::new(), BTreeMap::new());
        Self {
            plan,
            children,
            ended,
            tell_ended,
            restarts: Vec::new(),
            probes,
            probed,
            served: None,
            record_due: None,
        }
    }

    async fn serve(&mut self, signals: &mut Signals) -> Outcome {
        for (index, child) in self.children.iter_mut().enumerate() {
            child.start(index, &self.tell_ended)?;
        }
        let deadline = Instant::now() + READY_WAIT_MAX;
        let mut coming_up = Box::pin(bring_up::run(self.plan));
        loop {
            let due = self.restarts.iter().map(|(due, _)| *due).min();
            let record_due = self.record_due;
            tokio::select! {
                biased;
                () = signals.any() => return Ok(Exit::Ok),
                Some(ended) = self.ended.recv() => self.child_ended(&ended)?,
                () = sleep_until(due.unwrap_or(deadline)), if due.is_some() => self.restart_due()?,
                () = sleep_until(record_due.unwrap_or(deadline)), if record_due.is_some() => self.record_changed(),
                Some(told) = self.probes.join_next() => told.into_iter().for_each(|told| self.tell_again(told)),
                served = &mut coming_up, if self.served.is_none() => self.ready(served?)?,
                () = sleep_until(deadline), if self.served.is_none() => return Err(self.not_ready()),
            }
        }
    }

    fn ready(&mut self, served: Served) -> Result<(), Problem> {
        self.served = Some(served);
        self.record().write(self.plan.layout.root())?;
        say(ready::block(self.plan, &self.record()));
        Ok(())
    }

    /// Before the cluster was ready an end is a failure of the whole: it is told, not repeated.
    fn child_ended(&mut self, ended: &Ended) -> Result<(), Problem> {
        let child = &mut self.children[ended.child];
        let wait = child.has_ended();
        if let Some(probe) = self.probed.remove(&ended.child) {
            probe.abort();
        }
        if self.served.is_none() {
            return Err(died_early(child, ended));
        }
        if ended.child != MDS && !self.plan.restart {
            say(format_args!("{} ended ({}); --no-restart: it stays so", child.name, ended.status));
            return Ok(());
        }
        say(format_args!(
            "{} ended ({}); restarting it in {} ms",
            child.name,
            ended.status,
            wait.as_millis()
        ));
        self.restarts.push((Instant::now() + wait, ended.child));
        Ok(())
    }

    fn restart_due(&mut self) -> Result<(), Problem> {
        let now = Instant::now();
        let due: Vec<_> = self.restarts.extract_if(.., |(due, _)| *due <= now).collect();
        for (_, index) in due {
            // Not enough memory or processes at the moment is no reason to end the others.
            match self.children[index].start(index, &self.tell_ended) {
                Ok(()) => {
                    self.record_changed();
                    self.probe(index)?;
                }
                Err(problem) => {
                    say(&problem);
                    self.restarts.push((now + RETRY, index));
                }
            }
        }
        Ok(())
    }

    /// A full disk is no reason to end anything, nor to start a child twice: the record is written later.
    fn record_changed(&mut self) {
        let told = self.record_due.take().is_some();
        if let Err(problem) = self.record().write(self.plan.layout.root()) {
            if !told {
                say(&problem);
            }
            self.record_due = Some(Instant::now() + RETRY);
        }
    }

    /// Finds out when a child that was started again serves.
    fn probe(&mut self, index: usize) -> Result<(), Problem> {
        let pid = self.children[index].pid();
        let what = match index {
            MDS => Again::Mds(self.plan.mds_endpoint()),
            target => Again::Target(self.plan.layout.socket(target as u32)?),
        };
        let probe = self.probes.spawn(async move { (index, pid, what.serves(READY_WAIT_MAX).await) });
        self.probed.insert(index, probe);
        Ok(())
    }

    fn tell_again(&self, (index, pid, outcome): (usize, u32, Result<(), String>)) {
        let child = &self.children[index];
        if !child.is_running() || child.pid() != pid {
            return;
        }
        let name = &child.name;
        match outcome {
            Ok(()) => say(format_args!("{name} serves again, pid {pid}")),
            Err(error) => {
                let seconds = READY_WAIT_MAX.as_secs();
                say(format_args!(
                    "{name} runs again, pid {pid}, but does not serve after {seconds} s: {error}"
                ));
            }
        }
    }

    fn record(&self) -> DevRecord {
        let targets = (1u32..).zip(&self.plan.shape.targets).zip(&self.children[MDS + 1..]);
        DevRecord {
            mds: MdsRecord { endpoint: self.plan.mds_endpoint(), pid: self.children[MDS].pid() },
            targets: targets
                .map(|((id, ports), child)| TargetRecord {
                    id,
                    pid: child.pid(),
                    dir: self.plan.layout.target(id),
                    peer: format!("127.0.0.1:{}", ports.peers[0]),
                    admin: format!("127.0.0.1:{}", ports.admin),
                    metrics: format!("127.0.0.1:{}", ports.metrics),
                })
                .collect(),
            volumes: self.served.as_ref().map(|served| served.volumes.clone()).unwrap_or_default(),
            discovery: self.served.as_ref().map(|served| served.discovery.clone()).unwrap_or_default(),
        }
    }

    fn not_ready(&self) -> Problem {
        let words: String =
            self.children.iter().map(|c| format!("\n  {}:\n{}", c.name, c.last_words())).collect();
        let seconds = READY_WAIT_MAX.as_secs();
        Problem::new(format!(
            "the cluster did not serve within {seconds} s; the last lines of its logs:{words}"
        ))
        .cause("the machine is overloaded, or a process waits for another (see above)")
        .fix(format!("look into {}", self.plan.layout.root().join("logs").display()))
    }

    /// Targets first: while they stop, they may tell the MDS so.
    async fn stop(&mut self, signals: &mut Signals) {
        if self.children.iter().any(Process::is_running) {
            say("stopping");
        }
        self.stop_those(signals, MDS + 1..self.children.len()).await;
        self.stop_those(signals, MDS..MDS + 1).await;
    }

    /// A second signal, or too long a wait, kills.
    async fn stop_those(&mut self, signals: &mut Signals, those: std::ops::Range<usize>) {
        self.children[those.clone()].iter().for_each(|child| child.signal(Signal::SIGTERM));
        let deadline = Instant::now() + STOP_WAIT_MAX;
        tokio::select! {
            () = signals.any() => {}
            () = self.all_ended(deadline, those.clone()) => {}
        }
        for child in self.children[those.clone()].iter().filter(|child| child.is_running()) {
            say(format_args!("{} does not stop: killing it", child.name));
            child.signal(Signal::SIGKILL);
        }
        self.all_ended(Instant::now() + STOP_WAIT_MAX, those).await;
    }

    async fn all_ended(&mut self, deadline: Instant, those: std::ops::Range<usize>) {
        while self.children[those.clone()].iter().any(Process::is_running) {
            match timeout_at(deadline, self.ended.recv()).await {
                Ok(Some(ended)) => drop(self.children[ended.child].has_ended()),
                _ => return,
            }
        }
    }
}

fn died_early(child: &Process, ended: &Ended) -> Problem {
    let words = child.last_words();
    Problem::new(format!(
        "{} ended at start ({}); the last lines of its log:\n{words}",
        child.name, ended.status
    ))
    .cause("what those lines say")
    .fix(format!("mend that and start again; the whole log is {}", child.log().display()))
}

fn mds_arguments(plan: &Plan) -> Vec<OsString> {
    let targets = plan.shape.targets.len() as u32;
    let mut arguments: Vec<OsString> = ["mds", "run", "--listen"].map(OsString::from).into();
    arguments.extend([plan.mds_endpoint().into(), "--dir".into(), plan.layout.mds().into()]);
    arguments.extend(["--expect-targets".into(), targets.to_string().into()]);
    arguments.extend(["--offline-after".into(), plan.offline_after.to_string().into()]);
    arguments.extend(["--replicas".into(), plan.shape.replicas.to_string().into()]);
    let copysets = plan.shape.copysets.unwrap_or(targets * COPYSETS_A_TARGET);
    arguments.extend(["--copysets".into(), copysets.to_string().into()]);
    arguments
}

fn target_arguments(plan: &Plan, id: u32) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = ["target", "run", "--config"].map(OsString::from).into();
    arguments.push(plan.layout.target_toml(id).into());
    arguments
}
