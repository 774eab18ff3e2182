//! A target from its configuration: format it, look at it, run it.

use crate::assemble::{ShardPlan, build_core, cannot, format_shard};
use crate::config::{Host as HostChoice, Listen, Store, TargetConfig};
use crate::control::{self, ShardPort, shard_ports};
use crate::core_loop::{Core, Port as ListenFor};
use crate::files::{FileMedia, Files};
use crate::identity::Identity;
use crate::lock::DirLock;
use crate::siblings::{SiblingEnd, mesh};
use chunkstore::{InspectReport, Layout};
use protocol::control::{Problem, ProblemKind};
use protocol::types::{BLOCK_BYTES, CHUNK_BYTES, ShardAddr, Span};
use reactor::disk::HostDisk;
use reactor::host::{CoreContext, CoreLoop, CoreSpec, Host, HostKind, Turn};
use reactor::ring::{Ring, RingConfig};
use reactor::{Listener, Reactor, Waker};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tuning::device::Limits;
use tuning::start::{AtStart, Start};

/// Chunk slots of a chunk file: 256 MiB of data a file, so that 16 TiB need 65,536 open files.
const SLOTS_PER_FILE: u32 = 16;
/// Chunk slots kept preformatted ahead of need: 256 MiB.
const RESERVE_SLOTS: u32 = 16;
/// An idle copyset hibernates after this long.
const HIBERNATE_AFTER: Span = Span::ms(10_000);

/// Makes a target's directory ready: its identity, then each shard's files.
///
/// # Errors
/// It is formatted already, the sizes cannot work, or the disk refuses.
pub fn format(config: &TargetConfig) -> Result<(), Problem> {
    let identity = Identity::create(&config.dir, config.target())?;
    // What is in memory is made when the target starts.
    let on_disk = if config.store == Store::Disk { config.shards } else { 0 };
    for shard in 0..on_disk {
        let mut disk = HostDisk::new().map_err(|error| cannot("use the disk", &error))?;
        format_shard(&mut disk, &plan(config, &identity, shard))?;
    }
    Ok(())
}

/// What is on a target's disk, every checksum verified; one report a shard. The target must not run.
///
/// # Errors
/// There is no target, it runs, or a superblock or both checkpoints cannot be read.
pub fn inspect(dir: &Path) -> Result<Vec<InspectReport>, Problem> {
    let _lock = DirLock::for_reading(dir)?;
    let mut reports = Vec::new();
    for shard in 0.. {
        let dir = shard_dir(dir, shard);
        if !dir.is_dir() {
            break;
        }
        let mut disk = HostDisk::new().map_err(|error| cannot("use the disk", &error))?;
        let mut files = Files::read_only(&dir);
        let mut media = FileMedia { files: &mut files, disk: &mut disk };
        reports.push(
            chunkstore::inspect(&mut media, &Layout::default()).map_err(|error| cannot("inspect", &error))?,
        );
    }
    if reports.is_empty() {
        let fix = "name the directory of a target (the `dir` of its target.toml)";
        return Err(Problem::new(
            ProblemKind::NotFound,
            format!("no target in {}", dir.display()),
            "no shard-0 there",
            fix,
        ));
    }
    Ok(reports)
}

/// Runs a target until `stop` is set and `stopped` of every shard, or until every shard failed.
/// The closure handed to `ready` may be called from any thread to stop it.
///
/// # Errors
/// Nothing could be started. What happens later is logged, and the other shards go on.
pub fn run(config: TargetConfig, ready: impl FnOnce(Box<dyn Fn() + Send + Sync>)) -> Result<(), Problem> {
    let identity = Identity::open(&config.dir, config.target())?;
    let _lock = DirLock::for_running(&config.dir)?;
    if config.store == Store::Memory {
        run_once(&config.dir)?;
    }
    let host_setup = look_at_host(&config);
    let stop = Arc::new(AtomicBool::new(false));
    let shared = listen_shared(&config)?;
    let wakers = (0..config.shards).map(|_| Waker::new()).collect::<Result<Vec<_>, _>>();
    let wakers = wakers.map_err(|error| cannot("make the shards' wakers", &error))?;
    let (ends, ports) = shard_ports(wakers.iter().map(|waker| wake_by(waker.clone())).collect());
    let mut parts = Vec::new();
    let joined = ports.into_iter().zip(&wakers).zip(mesh(&wakers));
    for ((port, waker), siblings) in joined {
        let copy = |(port, fd): &(ListenFor, OwnedFd)| Ok((*port, fd.try_clone()?));
        let listeners = shared.iter().map(copy).collect::<Result<Vec<_>, std::io::Error>>();
        let listeners = listeners.map_err(|error| cannot("share the listeners between shards", &error))?;
        parts.push(Some(Parts { port, waker: waker.clone(), siblings, listeners, stop: stop.clone() }));
    }
    let control =
        control::start(control::Start { config: config.clone(), identity: identity.clone(), ends })?;
    let wakes: Vec<_> = wakers.into_iter().map(wake_by).collect();
    ready(Box::new(move || {
        stop.store(true, Ordering::Relaxed);
        wakes.iter().for_each(|wake| wake());
    }));
    let failures: Arc<Mutex<Vec<Problem>>> = Arc::default();
    let build = Build {
        config: config.clone(),
        identity,
        limits: host_setup.limits,
        parts: Arc::new(Mutex::new(parts)),
        failures: failures.clone(),
    };
    let host = match config.host {
        HostChoice::Glommio => HostKind::Glommio,
        HostChoice::Bare => HostKind::Bare,
    };
    let ran = host.run(cores(&config), move |context| build.core(context));
    control.stop();
    if let Some(path) = &config.listen.nbd_unix {
        // A socket file that nobody listens on only puzzles people.
        let _ = std::fs::remove_file(path);
    }
    ran.map_err(|error| cannot("run the shards", &error))?;
    let failed = failures.lock().unwrap_or_else(PoisonError::into_inner).pop();
    failed.map_or(Ok(()), Err)
}

/// The mark that a target in memory leaves.
const RAN_IN_MEMORY: &str = "ran-in-memory";

/// A target that keeps its data in memory must not come back under its name: its replicas would have
/// forgotten what they acknowledged and whom they voted for, and outvote those that have not.
fn run_once(dir: &Path) -> Result<(), Problem> {
    let mark = dir.join(RAN_IN_MEMORY);
    let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&mark);
    match made.and_then(|file| file.sync_all()) {
        Ok(()) => {
            tracing::warn!("the data of this target is in memory: all of it is lost when it ends");
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Problem::new(
            ProblemKind::NotReady,
            format!("the target in {} kept its data in memory, and lost it when it ended", dir.display()),
            "a replica without its past is no replica",
            "begin a new cluster in an empty directory",
        )),
        Err(error) => Err(cannot("mark the directory", &error)),
    }
}

/// Says what on this machine costs performance, and reads what `tune probe` found of the disk.
/// The result is kept while the target runs: it may hold processors out of deep sleep.
fn look_at_host(config: &TargetConfig) -> AtStart {
    let start = Start { dir: &config.dir, cpus: &config.cpus, shards: config.shards };
    let told = tuning::start::at_start(&start);
    for line in &told.lines {
        tracing::warn!("{line}");
    }
    if let Some(limits) = &told.limits {
        tracing::info!(?limits, "limits from device.toml");
    }
    told
}

/// Wakes a shard.
fn wake_by(waker: Waker) -> Box<dyn Fn() + Send + Sync> {
    Box::new(move || waker.wake())
}

/// What one shard's thread is given.
struct Parts {
    port: ShardPort,
    waker: Waker,
    siblings: Vec<SiblingEnd>,
    /// Shared by all shards.
    listeners: Vec<(ListenFor, OwnedFd)>,
    stop: Arc<AtomicBool>,
}

/// Builds each core's loop on that core's thread.
#[derive(Clone)]
struct Build {
    config: TargetConfig,
    identity: Identity,
    limits: Option<Limits>,
    parts: Arc<Mutex<Vec<Option<Parts>>>>,
    failures: Arc<Mutex<Vec<Problem>>>,
}

/// The loop of a shard that could not be started.
struct Nothing;

impl CoreLoop for Nothing {
    fn turn(&mut self) -> Turn {
        Turn::Stop
    }
}

impl Build {
    fn core(&self, context: CoreContext) -> Box<dyn CoreLoop> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner)[context.index].take();
        let parts = parts.expect("each core is built once");
        let shard = context.index as u16;
        self.try_core(shard, parts)
            .map_or_else(|problem| self.failed(shard, problem), |core| Box::new(core) as _)
    }

    fn failed(&self, shard: u16, problem: Problem) -> Box<dyn CoreLoop> {
        tracing::error!(shard, %problem, "the shard cannot start");
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(problem);
        Box::new(Nothing)
    }

    fn try_core(&self, shard_index: u16, parts: Parts) -> Result<Core<Ring>, Problem> {
        let config = &self.config;
        let ring = RingConfig {
            arena_bytes: config.arena_bytes as usize,
            spin_us_max: config.spin_us_max,
            entries: ring_entries(self.limits),
            register_arena: config.store != Store::Memory,
            memory_files: config.store == Store::Memory,
        };
        let ring = Ring::woken_by(ring, parts.waker);
        let mut ring = ring.map_err(|error| cannot("set up io_uring", &error))?;
        let mut plan = plan(config, &self.identity, shard_index);
        plan.layout = limited(plan.layout, self.limits);
        if config.store == Store::Memory {
            format_shard(&mut ring, &plan)?;
        }
        build_core(ring, &plan, parts.port, parts.siblings, parts.stop, |ring| {
            self.listen(ring, shard_index, parts.listeners)
        })
    }

    fn listen(
        &self,
        ring: &mut Ring,
        shard: u16,
        shared: Vec<(ListenFor, OwnedFd)>,
    ) -> Result<Vec<(ListenFor, Listener)>, Problem> {
        let peer = self.config.listen.peer[usize::from(shard)];
        let listener = ring.listen(peer).map_err(|error| cannot_listen("peer", &peer.to_string(), &error))?;
        let mut listeners = vec![(ListenFor::Peer, listener)];
        for (port, fd) in shared {
            let listener = ring.adopt_listener(fd).map_err(|error| cannot("listen for hosts", &error))?;
            listeners.push((port, listener));
        }
        Ok(listeners)
    }
}

/// The listeners that all shards share: whoever is free takes the next client, and gives it to the shard that is to serve
/// it ([`crate::spread`]).
fn listen_shared(config: &TargetConfig) -> Result<Vec<(ListenFor, OwnedFd)>, Problem> {
    let mut listeners = Vec::new();
    let Listen { nbd, nvme, nvme_discovery, .. } = &config.listen;
    let tcp = [
        ("nbd", ListenFor::Nbd, nbd),
        ("nvme", ListenFor::Nvme, nvme),
        ("nvme_discovery", ListenFor::Nvme, nvme_discovery),
    ];
    for (key, port, address) in tcp {
        let Some(address) = *address else { continue };
        let listener =
            TcpListener::bind(address).map_err(|error| cannot_listen(key, &address.to_string(), &error))?;
        listeners.push((port, listener.into()));
    }
    if let Some(path) = &config.listen.nbd_unix {
        let shown = path.display().to_string();
        if path.exists() && UnixStream::connect(path).is_err() {
            // Left behind by a target that was killed.
            let _ = std::fs::remove_file(path);
        }
        let listener = UnixListener::bind(path).map_err(|error| cannot_listen("nbd_unix", &shown, &error))?;
        listeners.push((ListenFor::Nbd, listener.into()));
    }
    Ok(listeners)
}

fn cores(config: &TargetConfig) -> Vec<CoreSpec> {
    let core = |index: usize| CoreSpec {
        index,
        cpu: config.cpus.get(index).copied(),
        name: format!("shard-{index}"),
    };
    (0..usize::from(config.shards)).map(core).collect()
}

fn shard_dir(dir: &Path, shard: u16) -> PathBuf {
    dir.join(format!("shard-{shard}"))
}

/// The disk's own limits, where they were measured.
fn limited(layout: Layout, limits: Option<Limits>) -> Layout {
    let Some(limits) = limits else { return layout };
    let Limits { batches_in_flight_max, batch_blocks_max, flush_in_flight_max, .. } = limits;
    Layout { batches_in_flight_max, batch_blocks_max, flush_in_flight_max, ..layout }
}

/// Room in the ring for what the disk takes at once and as much for sockets, twice over.
fn ring_entries(limits: Option<Limits>) -> u32 {
    let depth = limits.map_or(0, |limits| limits.queue_depth);
    (depth * 4).next_power_of_two().clamp(RingConfig::default().entries, 4096)
}

fn plan(config: &TargetConfig, identity: &Identity, shard: u16) -> ShardPlan {
    ShardPlan {
        dir: shard_dir(&config.dir, shard),
        me: ShardAddr { target: config.target(), shard },
        disk: identity.disk,
        layout: layout(config),
        election_timeout: Span::ms(config.raft.election_timeout_ms.into()),
        heartbeat: Span::ms(config.raft.heartbeat_ms.into()),
        hibernate_after: HIBERNATE_AFTER,
        io_timeout: config.export.io_timeout_s.map(|s| Span::ms(u64::from(s) * 1000)),
        catch_up_bytes_s: config.catch_up_bytes_s,
    }
}

fn layout(config: &TargetConfig) -> Layout {
    let slots = config.capacity_bytes / u64::from(config.shards) / CHUNK_BYTES as u64;
    let slots = (slots.max(1) as u32).next_multiple_of(SLOTS_PER_FILE);
    Layout {
        segment_bytes: config.log.segment_bytes as u32,
        log_segments: config.log.segments,
        slots_per_file: SLOTS_PER_FILE,
        slots_max: slots,
        reserve_slots: RESERVE_SLOTS,
        // Two fifths of the arena: the rest is for what is on its way.
        ram_blocks_max: config.arena_bytes as usize / BLOCK_BYTES * 2 / 5,
        table_cache_max: config.checksum_bytes as usize / chunkstore::TABLE_BYTES,
        ..Layout::default()
    }
}

fn cannot_listen(key: &str, place: &str, error: &dyn std::fmt::Display) -> Problem {
    Problem::new(
        ProblemKind::InUse,
        format!("cannot listen on {place} (`listen.{key}` of target.toml)"),
        error.to_string(),
        "stop what listens there, or choose another address",
    )
}
