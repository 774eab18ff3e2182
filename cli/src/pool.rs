//! `ashlar pool`: groups of copysets with the same number of replicas.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome, Problem};
use crate::size::Size;
use clap::{Args, Subcommand};
use mds_lite::durability::{Question, expected, hastened, simulated};
use protocol::control::pb;
use serde::Serialize;

/// Commands on pools.
#[derive(Subcommand)]
pub enum PoolCommand {
    /// Create a pool with all of its copysets.
    Create(CreateArgs),
    /// List the pools, and what keeps the replicas of each apart.
    Ls(ListArgs),
    /// How likely it is to lose data, for replica counts and scatter widths; asks no cluster.
    Durability(DurabilityArgs),
}

/// What `pool durability` takes.
#[derive(Args)]
pub struct DurabilityArgs {
    /// Targets, all alike.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1024))]
    targets: u32,
    /// Copysets.
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..=131072))]
    copysets: u32,
    /// What each target holds.
    #[arg(long, value_name = "SIZE", default_value = "8T")]
    held: Size,
    /// Failures of a target, in percent a year.
    #[arg(long, value_name = "PERCENT", default_value_t = 2.0)]
    failures: f64,
    /// What one target sends or takes of a rebuild in a second.
    #[arg(long, value_name = "SIZE", default_value = "50M")]
    rebuild: Size,
    /// Seconds from a failure until its rebuild begins.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    notice: u32,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `pool create` takes.
#[derive(Args)]
pub struct CreateArgs {
    /// Letters, digits, '.', '_' and '-'.
    name: String,
    /// Replicas of each copyset.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=7))]
    replicas: u32,
    /// How many copysets.
    #[arg(long)]
    copysets: u32,
    /// Only on these targets, such as 1,2,5 [default: all]
    #[arg(long, value_delimiter = ',')]
    targets: Vec<u32>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `pool ls` takes.
#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A pool as printed.
#[derive(Serialize)]
pub struct Shown {
    id: u32,
    name: String,
    replicas: u32,
    copysets: usize,
    /// "zone", "host" or "target": what no two replicas of a copyset share. Says nothing of a pool of one replica.
    failure_domain: String,
    capacity_bytes: u64,
    #[serde(flatten)]
    space: Space,
}

/// Bytes of all volumes of a pool or of the cluster.
#[derive(Serialize)]
pub struct Space {
    /// As hosts see them.
    pub logical_bytes: u64,
    /// Of chunks that hold data, each counted once.
    pub allocated_bytes: u64,
    /// Of chunks that hold data, over all replicas.
    pub replicated_bytes: u64,
    /// Of segments that were ever written: what a pool's capacity is held against.
    pub reserved_bytes: u64,
}

impl From<pb::Space> for Space {
    fn from(space: pb::Space) -> Self {
        let pb::Space { logical_bytes, allocated_bytes, replicated_bytes, reserved_bytes } = space;
        Self { logical_bytes, allocated_bytes, replicated_bytes, reserved_bytes }
    }
}

impl From<&pb::Pool> for Shown {
    fn from(pool: &pb::Pool) -> Self {
        Self {
            id: pool.id,
            name: pool.name.clone(),
            replicas: pool.replicas,
            copysets: pool.copysets.len(),
            failure_domain: pool.failure_domain.clone(),
            capacity_bytes: pool.capacity_bytes,
            space: Space::from(pool.space.unwrap_or_default()),
        }
    }
}

impl Shown {
    /// A lone replica is kept apart from nothing.
    fn apart_by(&self) -> &str {
        if self.replicas == 1 { "-" } else { &self.failure_domain }
    }
}

/// Runs one of the commands.
pub async fn run(command: PoolCommand) -> Outcome {
    match command {
        PoolCommand::Create(args) => create(args).await,
        PoolCommand::Ls(args) => list(args).await,
        PoolCommand::Durability(args) => durability(&args),
    }
}

#[derive(Serialize)]
struct Odds {
    replicas: u32,
    scatter_width: f64,
    sets: usize,
    rebuild_s: f64,
    /// Of any loss in a year.
    probability: f64,
    /// Losses that were counted to those expected, with failures so frequent that they can be counted.
    counted_to_expected: Option<f64>,
}

/// Replica counts and bounds of the scatter width that are compared.
const COMPARED: [(u32, usize); 9] =
    [(1, 1), (2, 4), (2, 16), (2, 64), (3, 4), (3, 16), (3, 64), (5, 16), (5, 64)];
/// Losses that are counted by chance: some 3 % of error.
const COUNTED: f64 = 1000.0;

fn durability(args: &DurabilityArgs) -> Outcome {
    if !(args.failures > 0.0 && args.failures <= 1000.0) {
        return Err(Problem::usage(format!("--failures {} refused", args.failures))
            .cause("it is a percentage of all targets a year")
            .fix("use something like 2"));
    }
    let odds: Vec<Odds> =
        COMPARED.iter().filter_map(|(replicas, width)| odds(args, *replicas, *width)).collect();
    args.output.print(&odds, |odds| {
        let rows = odds.iter().map(|o| {
            let checked = o.counted_to_expected.map_or("-".into(), |ratio| format!("{ratio:.2}"));
            vec![
                o.replicas.to_string(),
                format!("{:.0}", o.scatter_width),
                o.sets.to_string(),
                format!("{:.1} h", o.rebuild_s / 3600.0),
                format!("{:.1e}", o.probability),
                checked,
            ]
        });
        let header = ["REPLICAS", "SCATTER", "SETS", "REBUILD", "LOSS A YEAR", "COUNTED/EXPECTED"];
        let note = "Failures with a common cause are not in this: compare, do not promise. The last column counts losses\n\
                    in a simulation with failures so frequent that there are some.";
        format!("{}\n{note}", table(&header, rows))
    })?;
    Ok(Exit::Ok)
}

fn odds(args: &DurabilityArgs, replicas: u32, scatter_max: usize) -> Option<Odds> {
    let question = Question {
        targets: args.targets,
        replicas,
        copysets: args.copysets,
        scatter_max,
        bytes: args.held.0 as f64,
        failures_a_year: args.failures / 100.0,
        rebuild_bytes_s: args.rebuild.0.max(1) as f64,
        notice_s: args.notice.into(),
    };
    let answer = expected(&question)?;
    // A lone replica's loss needs no second failure; that of five is too rare to be counted even so.
    let counted = (2..=3).contains(&replicas).then(|| {
        let hasty = hastened(&question)?;
        let losses = expected(&hasty)?.losses_a_year;
        simulated(&hasty, COUNTED / losses, 1).map(|counted| counted / losses)
    });
    Some(Odds {
        replicas,
        scatter_width: answer.scatter_width,
        sets: answer.sets,
        rebuild_s: answer.rebuild_s,
        probability: answer.probability(),
        counted_to_expected: counted.flatten(),
    })
}

async fn create(args: CreateArgs) -> Outcome {
    let CreateArgs { name, replicas, copysets, targets, cluster, output } = args;
    let request = pb::CreatePoolRequest { name, replicas, copysets, targets };
    let pool = cluster.connect()?.create_pool(request).await?;
    output.print(&Shown::from(&pool), |pool| {
        let Shown { name, copysets, replicas, failure_domain, .. } = pool;
        match replicas {
            1 => format!("created {name}: {copysets} copysets of 1 replica: what a disk loses is lost"),
            _ => format!(
                "created {name}: {copysets} copysets of {replicas} replicas, no two of a copyset on the same \
                 {failure_domain}"
            ),
        }
    })?;
    Ok(Exit::Ok)
}

async fn list(args: ListArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    let shown: Vec<_> = status.pools.iter().map(Shown::from).collect();
    args.output.print(&shown, |shown| listing(shown))?;
    Ok(Exit::Ok)
}

/// Pools, one a line.
pub fn listing(pools: &[Shown]) -> String {
    let rows = pools.iter().map(|pool| {
        vec![
            pool.name.clone(),
            pool.replicas.to_string(),
            pool.copysets.to_string(),
            pool.apart_by().to_owned(),
            Size(pool.space.logical_bytes).to_string(),
            Size(pool.space.allocated_bytes).to_string(),
            Size(pool.space.replicated_bytes).to_string(),
            Size(pool.space.reserved_bytes).to_string(),
            Size(pool.capacity_bytes).to_string(),
        ]
    });
    let header = [
        "POOL",
        "REPLICAS",
        "COPYSETS",
        "APART BY",
        "LOGICAL",
        "ALLOCATED",
        "REPLICATED",
        "RESERVED",
        "CAPACITY",
    ];
    table(&header, rows)
}
