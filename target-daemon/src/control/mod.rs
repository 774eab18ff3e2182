//! The control side of a target: one thread of its own that registers with the MDS, beats, keeps
//! the cluster map, answers operators and shows metrics.
//!
//! Invariants: nothing here is on the IO path, and no shard ever waits for it; the map in force is
//! on disk before shards see it, so a restart never goes back; a map of another cluster is never
//! taken. With every MDS down the target serves by the map that it has.
//!
//! Deliberately absent: decisions about data. This thread carries messages.

mod admin;
mod agent;
mod map_cache;
mod mds;
mod queue;
mod segments;
mod space;
#[cfg(test)]
mod tests;
mod web;

pub use agent::Agent;
pub use map_cache::FILE_NAME as MAP_CACHE_FILE;
pub use queue::{
    ControlEnds, FROM_SHARDS_MAX, FromShard, ShardHandle, ShardPort, TO_SHARD_MAX, ToShard, shard_ports,
};

use crate::config::TargetConfig;
use crate::identity::Identity;
use crate::metrics::ProcessGauges;
use crate::subsystems::Subsystems;
use client::control::{MdsClient, Patience};
use protocol::control::{Problem, ProblemKind, pb};
use protocol::map::ClusterMap;
use protocol::types::{TargetId, VolumeId};
use queue::{Report, lock};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, watch};

/// How long the control thread may take to end.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// What the control side needs.
#[derive(Debug)]
pub struct Start {
    /// The checked configuration.
    pub config: TargetConfig,
    /// The identity of the target's directory, opened for the configuration's id.
    pub identity: Identity,
    /// The control thread's ends of all shards; see [`shard_ports`].
    pub ends: ControlEnds,
}

/// The running control side.
#[derive(Debug)]
pub struct ControlHandle {
    /// The map that was on disk; it was sent to all shards as well.
    pub cached: Option<Arc<ClusterMap>>,
    stop: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl ControlHandle {
    /// Ends the thread; shards are told nothing. Waits 2 s at most.
    pub fn stop(self) {
        let _ = self.stop.send(true);
        let end = Instant::now() + STOP_WAIT;
        while !self.thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        if !self.thread.is_finished() {
            tracing::warn!("the control thread did not end within 2 s; it is left behind");
        } else if self.thread.join().is_err() {
            tracing::error!("the control thread had panicked; see above");
        }
    }
}

/// Starts the control thread. Addresses are bound before this returns.
///
/// # Errors
/// An address that cannot be bound or a thread that cannot be made.
pub fn start(start: Start) -> Result<ControlHandle, Problem> {
    assert_eq!(start.ends.shards.len(), usize::from(start.config.shards), "one port a shard");
    let admin = bind("admin", start.config.listen.admin)?;
    let metrics = bind("metrics", start.config.listen.metrics)?;
    let cached = cached_map(&start.identity);
    let patience = Patience::ONCE;
    let (stop, stopping) = watch::channel(false);
    let agent = Agent::new(start.config.target(), start.identity.disk, start.config.shards);
    let state = State { identity: start.identity, agent, mds_heard: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| cannot_start(&error))?;
    let mds = {
        // A channel to the MDS is made within the runtime that will drive it.
        let _inside = runtime.enter();
        MdsClient::new(&start.config.mds.join(","), patience)?
    };
    let control = Control {
        config: start.config,
        ports: start.ends.shards,
        subsystems: start.ends.subsystems,
        process: ProcessGauges::default(),
        state: Mutex::new(state),
        mds,
        need_map: Notify::new(),
    };
    if let Some(map) = &cached {
        control.adopt(map.clone(), true);
    }
    let reports = start.ends.reports;
    let control = Arc::new(control);
    let body = move || runtime.block_on(run(control, reports, admin, metrics, stopping));
    let thread = std::thread::Builder::new().name("control".into()).spawn(body);
    Ok(ControlHandle { cached, stop, thread: thread.map_err(|error| cannot_start(&error))? })
}

/// What all tasks of the control thread share.
#[derive(Debug)]
struct Control {
    config: TargetConfig,
    ports: Vec<ShardHandle>,
    subsystems: Arc<Subsystems>,
    process: ProcessGauges,
    state: Mutex<State>,
    /// Whichever MDS leads.
    mds: MdsClient,
    need_map: Notify,
}

#[derive(Debug)]
struct State {
    identity: Identity,
    agent: Agent,
    mds_heard: Option<Instant>,
}

impl Control {
    fn target(&self) -> TargetId {
        self.config.target()
    }

    /// Takes a map that the MDS sent: joins its cluster or refuses it, keeps it on disk, then
    /// gives it to the shards.
    fn take_map(&self, map: ClusterMap) -> Result<(), Problem> {
        let mut state = lock(&self.state);
        state.identity.join(map.cluster)?;
        if !state.agent.is_news(&map) {
            return Ok(());
        }
        let saved = map_cache::save(state.identity.dir(), &map);
        if let Err(problem) = &saved {
            tracing::warn!(%problem, "the cluster map is not kept on disk: no replica is freed here until one is");
        }
        drop(state);
        tracing::debug!(generation = map.generation, "new cluster map");
        self.adopt(Arc::new(map), saved.is_ok());
        Ok(())
    }

    /// Tries again to write a map that could not be written when it came.
    fn keep_map(&self) {
        let mut state = lock(&self.state);
        let Some(map) = state.agent.unkept().cloned() else { return };
        if map_cache::save(state.identity.dir(), &map).is_ok() {
            tracing::info!(generation = map.generation, "the cluster map is kept on disk again");
            state.agent.kept();
        }
    }

    /// Puts a map in force.
    fn adopt(&self, map: Arc<ClusterMap>, is_kept: bool) {
        self.process.map_generation.store(map.generation, Ordering::Relaxed);
        lock(&self.state).agent.adopt(map.clone(), is_kept);
        self.tell_all(|| ToShard::Map(map.clone()));
    }

    /// Sends to every shard. A full queue loses the message, which is told; a map never is.
    fn tell_all(&self, message: impl Fn() -> ToShard) {
        for (shard, port) in self.ports.iter().enumerate() {
            if let Err(lost) = port.send(message()) {
                tracing::warn!(shard, ?lost, "a shard takes no messages: it is overloaded or hangs");
            }
        }
    }

    fn map(&self) -> Option<Arc<ClusterMap>> {
        lock(&self.state).agent.map().cloned()
    }

    /// What shards posted last, with what they reported since.
    fn shard_statuses(&self) -> Vec<pb::ShardStatus> {
        let failed = lock(&self.state).agent.failed().clone();
        let with_failure = |(index, port): (usize, &ShardHandle)| {
            let mut status = port.status().unwrap_or_default();
            status.index = index as u32;
            if status.peer.is_empty() {
                status.peer = self.config.advertised(self.config.listen.peer[index]).to_string();
            }
            if let Some(why) = failed.get(&(index as u16)) {
                status.failed = true;
                status.failure = why.clone();
            }
            status
        };
        self.ports.iter().enumerate().map(with_failure).collect()
    }

    fn endpoints(&self) -> pb::Endpoints {
        let listen = &self.config.listen;
        let shown = |address: SocketAddr| self.config.advertised(address).to_string();
        let unix = listen.nbd_unix.as_ref().and_then(|path| std::path::absolute(path).ok());
        pb::Endpoints {
            admin: shown(listen.admin),
            metrics: shown(listen.metrics),
            nbd_tcp: listen.nbd.map(shown).unwrap_or_default(),
            nbd_unix: unix.map(|path| path.display().to_string()).unwrap_or_default(),
            nvme_tcp: self.config.nvme_advertised().map(|a| a.to_string()).unwrap_or_default(),
        }
    }
}

async fn run(
    control: Arc<Control>,
    reports: mpsc::Receiver<Report>,
    admin: TcpListener,
    metrics: TcpListener,
    mut stopping: watch::Receiver<bool>,
) {
    let (first_writes, to_allocate) = mpsc::channel(FROM_SHARDS_MAX);
    tokio::select! {
        // It is told by a message or by the loss of the handle.
        _ = stopping.wait_for(|stop| *stop) => {}
        () = mds::keep_in_touch(&control) => {}
        () = take_reports(&control, reports, first_writes) => {}
        () = segments::allocate(&control, to_allocate) => {}
        () = served("admin", admin::serve(control.clone(), admin)) => {}
        () = served("metrics", web::serve(control.clone(), metrics)) => {}
    }
}

/// Runs a server; should it end, the rest goes on without it.
async fn served(
    name: &str,
    server: impl Future<Output = Result<(), Box<dyn std::error::Error + Send + Sync>>>,
) {
    match server.await {
        Ok(()) => tracing::error!("the {name} server ended by itself; IO goes on without it"),
        Err(error) => tracing::error!(%error, "the {name} server ended; IO goes on without it"),
    }
    std::future::pending().await
}

async fn take_reports(
    control: &Control,
    mut reports: mpsc::Receiver<Report>,
    first_writes: mpsc::Sender<(VolumeId, u32)>,
) {
    while let Some((shard, report)) = reports.recv().await {
        lock(&control.state).agent.note(shard, &report);
        match report {
            FromShard::FirstWrite { volume, segment } => {
                // Its receiver never waits for this queue, so neither can block the other.
                let _ = first_writes.send((volume, segment)).await;
            }
            FromShard::Freed { .. } => {}
            FromShard::Failed { why } => {
                tracing::error!(shard, why, "a shard refuses work; its replicas on other targets serve");
            }
            FromShard::NeedMap => control.need_map.notify_one(),
        }
    }
    // Every shard is gone; status pages go on until the process ends.
    std::future::pending().await
}

fn cached_map(identity: &Identity) -> Option<Arc<ClusterMap>> {
    match map_cache::load(identity.dir()) {
        Ok(Some(map)) if identity.cluster.is_none_or(|cluster| cluster == map.cluster) => Some(Arc::new(map)),
        Ok(Some(_)) => {
            tracing::warn!("the cached cluster map is of another cluster and is not used");
            None
        }
        Ok(None) => None,
        Err(problem) => {
            tracing::warn!(%problem, "the cached cluster map is not used");
            None
        }
    }
}

fn bind(key: &str, address: SocketAddr) -> Result<TcpListener, Problem> {
    let bound = TcpListener::bind(address).and_then(|l| l.set_nonblocking(true).map(|()| l));
    bound.map_err(|error| {
        Problem::new(
            ProblemKind::InUse,
            format!("cannot listen on {address} (`listen.{key}` of target.toml)"),
            error.to_string(),
            "stop what listens there, or choose another address of this machine",
        )
    })
}

fn cannot_start(error: &std::io::Error) -> Problem {
    Problem::new(
        ProblemKind::Limit,
        "the control thread cannot start",
        error.to_string(),
        "raise the limits on threads and open files (ulimit -u, -n)",
    )
}
