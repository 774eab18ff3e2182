//! The one thread that owns the state and the store, so that commands are decided one after the
//! other and a slow sync never holds up the sockets' thread.

use crate::election::Tenure;
use crate::snapshot::Snapshot;
use crate::state::{Command, Reply, State};
use crate::store::Store;
use protocol::control::{Problem, ProblemKind, map_to_pb, pb};
use protocol::types::Time;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot, watch};

/// Most commands and queries that wait for the thread; further callers wait at the socket.
const JOBS_MAX: usize = 1024;

type Work = Box<dyn FnOnce(&mut Owner) + Send>;

/// What the sockets' side holds.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    jobs: mpsc::Sender<Work>,
    map: watch::Receiver<Arc<pb::ClusterMap>>,
}

pub(crate) struct Owner {
    state: State,
    store: Box<dyn Store>,
    map: watch::Sender<Arc<pb::ClusterMap>>,
    started: Instant,
    /// Of one of several MDS processes: how long it leads.
    tenure: Option<Tenure>,
}

/// Starts the thread; it ends when the last handle is dropped.
pub(crate) fn start(
    state: State,
    store: Box<dyn Store>,
    tenure: Option<Tenure>,
) -> Result<(Handle, JoinHandle<()>), Problem> {
    let (jobs, inbox) = mpsc::channel(JOBS_MAX);
    let (publish, map) = watch::channel(Arc::new(map_to_pb(state.map())));
    let owner = Owner { state, store, map: publish, started: Instant::now(), tenure };
    let thread = std::thread::Builder::new().name("mds-owner".into()).spawn(move || owner.run(inbox));
    let thread = thread.map_err(|error| {
        Problem::new(
            ProblemKind::Limit,
            format!("no thread for the MDS's state: {error}"),
            "the limit on threads or memory is reached",
            "raise it (`ulimit -u`)",
        )
    })?;
    Ok((Handle { jobs, map }, thread))
}

impl Owner {
    fn run(mut self, mut inbox: mpsc::Receiver<Work>) {
        while let Some(work) = inbox.blocking_recv() {
            work(&mut self);
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Whether this process is still the one to answer. What came in before its lease ended may go out after:
    /// an order is good only so long after the heartbeat that it answers was sent, and whoever leads next
    /// waits for that.
    fn leads(&self) -> Result<(), Problem> {
        match &self.tenure {
            Some(tenure) if !tenure.holds() => Err(Problem::not_leader(None)),
            _ => Ok(()),
        }
    }

    fn execute(&mut self, command: Command) -> Result<Reply, Problem> {
        let now = self.now();
        let decision = self.state.decide(now, command)?;
        if decision.changes.is_empty() {
            return Ok(decision.reply);
        }
        self.store
            .commit(&decision.changes)
            .inspect_err(|problem| tracing::error!(%problem, "commit failed"))?;
        self.state.apply(decision.changes);
        let generation = self.state.map().generation;
        if self.map.borrow().generation != generation {
            tracing::info!(generation, "cluster map changed");
            self.map.send_replace(Arc::new(map_to_pb(self.state.map())));
        }
        Ok(decision.reply)
    }
}

impl Handle {
    /// The current map, and word of newer ones.
    pub(crate) fn map(&self) -> watch::Receiver<Arc<pb::ClusterMap>> {
        self.map.clone()
    }

    /// Runs a command; `view` makes the answer from the state right after it.
    pub(crate) async fn command<T: Send + 'static>(
        &self,
        command: Command,
        view: impl FnOnce(Reply, &State, Time) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        self.run(move |owner| {
            let reply = owner.execute(command)?;
            view(reply, &owner.state, owner.now())
        })
        .await
    }

    /// Makes an answer from the state.
    pub(crate) async fn query<T: Send + 'static>(
        &self,
        view: impl FnOnce(&State, Time) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        self.run(move |owner| view(&owner.state, owner.now())).await
    }

    /// All records at one moment.
    pub(crate) async fn snapshot(&self) -> Result<Snapshot, Problem> {
        self.run(|owner| {
            let changes = owner.store.load()?;
            Ok(Snapshot { cluster: owner.store.cluster(), changes })
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Owner) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |owner| drop(answer.send(owner.leads().and_then(|()| work(owner)))));
        self.jobs.send(work).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }
}

fn stopping() -> Problem {
    Problem::new(
        ProblemKind::Unreachable,
        "the MDS is stopping",
        "it was told to stop, or its state's thread failed",
        "start it again; see its log",
    )
}
