//! Configuration, start and graceful stop.

mod incoming;

use crate::etcd::EtcdAt;
use crate::gate::{Anyone, Gate, GateLayer};
use crate::metrics;
use crate::owner::{self, Handle};
use crate::seat::{Contender, Seat};
use crate::service::{Service, unix_s};
use crate::state::{Command, Policy, State};
use crate::store::{RedbStore, Store};
use protocol::control::pb::mds_server::MdsServer;
use protocol::control::{DESCRIPTORS, Problem, ProblemKind, limits};
use protocol::types::{MEMBERS_MAX, Span};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Most calls under way on one connection.
const CALLS_MAX: u32 = 64;
/// How long open calls may take once the server stops.
const STOP_MAX: Duration = Duration::from_secs(3);

/// Where an MDS keeps its records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreAt {
    /// A redb file in this directory: one MDS process.
    Directory(PathBuf),
    /// etcd: several, one of which leads.
    Etcd(EtcdAt),
}

impl FromStr for StoreAt {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        match text.split_once("://") {
            Some(("etcd", _)) => text.parse().map(Self::Etcd),
            None if !text.is_empty() => Ok(Self::Directory(text.into())),
            _ => Err(Problem::new(
                ProblemKind::Invalid,
                format!("store {text:?} refused"),
                "it is neither a directory nor etcd://HOST:PORT[,HOST:PORT][/PREFIX]",
                "see `ashlar mds run --help`",
            )),
        }
    }
}

impl std::fmt::Display for StoreAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(dir) => dir.display().fmt(f),
            Self::Etcd(at) => at.fmt(f),
        }
    }
}

/// The flags that name a store.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct StoreArgs {
    /// Directory of the database; made when absent
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// A directory, or etcd://HOST:PORT[,HOST:PORT][/PREFIX] for several MDS processes, one of which leads
    #[arg(long, value_name = "STORE")]
    pub store: Option<StoreAt>,
}

impl From<StoreArgs> for StoreAt {
    fn from(args: StoreArgs) -> Self {
        let named = args.store.or(args.dir.map(Self::Directory));
        named.expect("clap demands one of them")
    }
}

/// The flags of `ashlar mds run`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where its records are.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Address to listen on
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7400")]
    pub listen: SocketAddr,
    /// Where callers reach this MDS, as the others tell them [default: --listen]
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Address of Prometheus metrics, at /metrics [default: none]
    #[arg(long, value_name = "IP:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Replicas of each copyset of the default pool
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub replicas: u32,
    /// Copysets of the default pool; 0: create no pool by itself
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub copysets: u32,
    /// Create the default pool when this many targets have registered [default: --replicas]
    #[arg(long, value_name = "N")]
    pub expect_targets: Option<u32>,
    /// Build the replicas of a target elsewhere when it has been silent for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub offline_after: u32,
    /// A host that has not been seen attached for so many seconds may be succeeded without --take-over
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub session_lease: u32,
    /// Replicas that are built on one target at once
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub rebuilds_a_target: u32,
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        let targets_expected = args.expect_targets.unwrap_or(args.replicas);
        let policy = Policy {
            replicas: args.replicas,
            copysets: args.copysets,
            targets_expected,
            offline_after: Span::ms(u64::from(args.offline_after) * 1000),
            tasks_a_target: args.rebuilds_a_target,
            session_lease: Span::ms(u64::from(args.session_lease) * 1000),
            ..Policy::default()
        };
        let Args { store, listen, advertise, metrics, .. } = args;
        Self { advertise, metrics, ..Self::new(store.into(), listen, policy) }
    }
}

/// What an MDS is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where its records are.
    pub store: StoreAt,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where callers reach it; `None`: at the address that it listens on.
    pub advertise: Option<String>,
    /// Address of Prometheus metrics.
    pub metrics: Option<SocketAddr>,
    /// Who may call.
    pub gate: Arc<dyn Gate>,
    /// How it decides.
    pub policy: Policy,
}

impl Config {
    /// Without metrics, for anybody.
    pub fn new(store: StoreAt, listen: SocketAddr, policy: Policy) -> Self {
        Self { store, listen, advertise: None, metrics: None, gate: Arc::new(Anyone), policy }
    }

    fn check(&self) -> Result<(), Problem> {
        let Policy { replicas, copysets, targets_expected, heartbeat, unstable_after, offline_after, .. } =
            self.policy;
        let rows = [
            (replicas >= 1 && replicas as usize <= MEMBERS_MAX, "replicas", format!("1 to {MEMBERS_MAX}")),
            (copysets as usize <= limits::COPYSETS_MAX, "copysets", format!("0 to {}", limits::COPYSETS_MAX)),
            (
                targets_expected >= replicas && targets_expected as usize <= limits::TARGETS_MAX,
                "expected targets",
                format!("{replicas} (the replicas) to {}", limits::TARGETS_MAX),
            ),
            (heartbeat.0 > 0 && unstable_after > heartbeat, "unstable time", "more than a heartbeat".into()),
            (offline_after > unstable_after, "offline time", "more than that of unstable ones".into()),
        ];
        match rows.into_iter().find(|(fine, ..)| !fine) {
            None => Ok(()),
            Some((_, noun, range)) => Err(Problem::new(
                ProblemKind::Invalid,
                format!("number of {noun} refused").replace("number of offline time", "offline time"),
                format!("it must be {range}"),
                "see `ashlar mds run --help`",
            )),
        }
    }
}

/// A started MDS: its address is bound; its database is open, or it is about to contend.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    metrics: Option<TcpListener>,
    address: SocketAddr,
    gate: Arc<dyn Gate>,
    seat: watch::Receiver<Seat>,
    leads: Leads,
    /// Between two looks of the schedulers.
    interval: Duration,
}

/// How it comes to lead.
#[derive(Debug)]
enum Leads {
    /// There is no other.
    Always(watch::Sender<Seat>, JoinHandle<()>),
    /// When it is its turn.
    InTurn(Contender),
}

/// Runs an MDS until `stop` resolves, then ends open calls and returns. Needs a tokio runtime;
/// a current_thread one will do.
///
/// # Errors
/// When the configuration, the directory or the address cannot be used.
pub async fn run(config: Config, stop: impl Future<Output = ()> + Send) -> Result<(), Problem> {
    Server::start(config).await?.serve(stop).await
}

impl Server {
    /// Opens the database and binds the address; callers can connect from now on.
    pub async fn start(config: Config) -> Result<Self, Problem> {
        config.check()?;
        let Config { store, listen, policy, gate, .. } = config;
        // Before the address is taken, so that a failure is told before anybody calls.
        let opened = match &store {
            StoreAt::Directory(dir) => {
                let mut store = RedbStore::open(dir)?;
                let records = store.load()?;
                Some((State::restore(policy, store.cluster(), records)?, store))
            }
            StoreAt::Etcd(_) => None,
        };
        let (listener, address) = bind(listen).await?;
        let metrics = match config.metrics {
            Some(address) => Some(bind(address).await?.0),
            None => None,
        };
        let advertised = match config.advertise {
            Some(advertised) => advertised,
            None if address.ip().is_unspecified() && opened.is_none() => return Err(unreachable_at(address)),
            None => address.to_string(),
        };
        tracing::info!(%address, %store, advertised, "MDS listens");
        let (tell, seat) = watch::channel(Seat::StandsBy(None));
        let leads = match (opened, store) {
            (Some((state, store)), _) => {
                let (cluster, generation) = (state.cluster(), state.map().generation);
                tracing::info!(%cluster, generation, "this MDS leads: there is no other on a directory");
                let (owner, thread) = owner::start(state, Box::new(store), None)?;
                tell.send_replace(Seat::Leads(owner));
                Leads::Always(tell, thread)
            }
            (None, StoreAt::Etcd(at)) => {
                Leads::InTurn(Contender { at, address: advertised, policy, seat: tell })
            }
            (None, StoreAt::Directory(_)) => unreachable!("a directory was opened above"),
        };
        let interval = Duration::from_nanos(policy.heartbeat.0);
        Ok(Self { listener, metrics, address, gate, seat, leads, interval })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop` resolves.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send) -> Result<(), Problem> {
        let Self { listener, metrics, address, gate, seat, leads, interval } = self;
        let pages = metrics.map(|listener| tokio::spawn(metrics::serve(listener, seat.clone())));
        let (stopping, stopped) = watch::channel(false);
        let led = match leads {
            Leads::Always(tell, thread) => {
                let owner = tell.borrow().owner()?;
                let ticks = tokio::spawn(tick(owner, interval));
                let mut stopped = stopped.clone();
                tokio::spawn(async move {
                    let _ = stopped.wait_for(|stopping| *stopping).await;
                    ticks.abort();
                    tell.send_replace(Seat::StandsBy(None));
                    wait_for_owner(thread).await;
                })
            }
            Leads::InTurn(contender) => tokio::spawn(contender.run(stopped.clone())),
        };
        let served = serve_until(listener, seat, gate, &stopping, stop).await.map_err(|error| {
            Problem::new(
                ProblemKind::Protocol,
                format!("MDS at {address} failed: {error}"),
                "the network stack refused further work",
                "start it again; see the kernel log",
            )
        });
        stopping.send_replace(true);
        let _ = tokio::time::timeout(STOP_MAX, led).await;
        pages.inspect(|pages| pages.abort());
        served
    }
}

async fn bind(listen: SocketAddr) -> Result<(TcpListener, SocketAddr), Problem> {
    let listener = TcpListener::bind(listen).await.map_err(|error| bind_problem(listen, &error))?;
    let address = listener.local_addr().map_err(|error| bind_problem(listen, &error))?;
    Ok((listener, address))
}

fn unreachable_at(address: SocketAddr) -> Problem {
    Problem::new(
        ProblemKind::Invalid,
        format!("nobody can be sent to {address}"),
        "it stands for every address of this machine, and callers of other MDS are to be sent to one",
        "name one by --advertise HOST:PORT",
    )
}

async fn serve_until(
    listener: TcpListener,
    seat: watch::Receiver<Seat>,
    gate: Arc<dyn Gate>,
    stopping: &watch::Sender<bool>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let mut stopped = stopping.subscribe();
    let service = MdsServer::new(Service::new(seat.clone(), stopped.clone()))
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    let told = tokio::spawn(tell_health(health, seat));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors were made by the compiler of these very services");
    let serve = tonic::transport::Server::builder()
        .max_concurrent_streams(CALLS_MAX)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .layer(GateLayer(gate))
        .add_service(service)
        .add_service(health_service)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming::accept(listener), async move {
            let _ = stopped.wait_for(|stopping| *stopping).await;
        });
    let mut serve = std::pin::pin!(serve);
    let served = tokio::select! {
        served = &mut serve => served,
        () = stop => {
            tracing::info!("MDS stops");
            stopping.send_replace(true);
            tokio::time::timeout(STOP_MAX, serve).await.unwrap_or(Ok(()))
        }
    };
    told.abort();
    served
}

/// The service is healthy where it leads; the process is wherever it answers.
async fn tell_health(health: tonic_health::server::HealthReporter, mut seat: watch::Receiver<Seat>) {
    loop {
        let leads = matches!(&*seat.borrow_and_update(), Seat::Leads(_));
        match leads {
            true => health.set_serving::<MdsServer<Service>>().await,
            false => health.set_not_serving::<MdsServer<Service>>().await,
        }
        if seat.changed().await.is_err() {
            return;
        }
    }
}

/// Lets the schedulers look around, once a heartbeat.
pub(crate) async fn tick(owner: Handle, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A failure is told where it happened; the next look may find it mended.
        let _ = owner.command(Command::Tick { unix_s: unix_s() }, |_, _, _| Ok(())).await;
    }
}

/// The state's thread ends with the last call, so that a next start finds the database closed.
pub(crate) async fn wait_for_owner(thread: JoinHandle<()>) {
    let end = tokio::time::Instant::now() + STOP_MAX;
    while !thread.is_finished() && tokio::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn bind_problem(listen: SocketAddr, error: &std::io::Error) -> Problem {
    Problem::new(
        ProblemKind::InUse,
        format!("MDS cannot listen on {listen}: {error}"),
        "another process uses the port, or the address is not of this machine",
        "stop the other process (`ss -ltnp`), or use another --listen",
    )
}
