//! Configuration, start and graceful stop.

mod incoming;

use crate::owner::{self, Handle};
use crate::service::{Service, unix_s};
use crate::state::{Command, Policy, State};
use crate::store::Store;
use protocol::control::pb::mds_server::MdsServer;
use protocol::control::{DESCRIPTORS, Problem, ProblemKind, limits};
use protocol::types::{MEMBERS_MAX, Span};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Most calls under way on one connection.
const CALLS_MAX: u32 = 64;
/// How long open calls may take once the server stops.
const STOP_MAX: Duration = Duration::from_secs(3);

/// The flags of `ashlar mds run`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Directory of the database; made when absent
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Address to listen on
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7400")]
    pub listen: SocketAddr,
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
            ..Policy::default()
        };
        Self { dir: args.dir, listen: args.listen, policy }
    }
}

/// What an MDS is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the database.
    pub dir: PathBuf,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// How it decides.
    pub policy: Policy,
}

impl Config {
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

/// A started MDS: its database is open, its address bound.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    owner: Handle,
    thread: JoinHandle<()>,
    /// Between two looks of the schedulers.
    interval: Duration,
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
        let store = Store::open(&config.dir)?;
        let state = State::restore(config.policy, store.cluster(), store.load()?)?;
        let listen = config.listen;
        let listener = TcpListener::bind(listen).await.map_err(|error| bind_problem(listen, &error))?;
        let address = listener.local_addr().map_err(|error| bind_problem(listen, &error))?;
        tracing::info!(
            %address,
            dir = %config.dir.display(),
            cluster = %state.cluster(),
            generation = state.map().generation,
            "MDS listens",
        );
        let interval = Duration::from_nanos(config.policy.heartbeat.0);
        let (owner, thread) = owner::start(state, store)?;
        Ok(Self { listener, address, owner, thread, interval })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop` resolves.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send) -> Result<(), Problem> {
        let Self { listener, address, owner, thread, interval } = self;
        serve_until(listener, owner, interval, stop).await.map_err(|error| {
            Problem::new(
                ProblemKind::Protocol,
                format!("MDS at {address} failed: {error}"),
                "the network stack refused further work",
                "start it again; see the kernel log",
            )
        })?;
        wait_for_owner(thread).await;
        Ok(())
    }
}

async fn serve_until(
    listener: TcpListener,
    owner: Handle,
    interval: Duration,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (stopping, mut stopped) = watch::channel(false);
    let ticks = tokio::spawn(tick(owner.clone(), interval));
    let service = MdsServer::new(Service::new(owner, stopped.clone()))
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<MdsServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors were made by the compiler of these very services");
    let serve = tonic::transport::Server::builder()
        .max_concurrent_streams(CALLS_MAX)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
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
            health.set_not_serving::<MdsServer<Service>>().await;
            stopping.send_replace(true);
            tokio::time::timeout(STOP_MAX, serve).await.unwrap_or(Ok(()))
        }
    };
    ticks.abort();
    served
}

/// Lets the schedulers look around, once a heartbeat.
async fn tick(owner: Handle, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if owner.command(Command::Tick { unix_s: unix_s() }, |_, _, _| Ok(())).await.is_err() {
            return;
        }
    }
}

/// The state's thread ends with the last call, so that a next start finds the database closed.
async fn wait_for_owner(thread: JoinHandle<()>) {
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
