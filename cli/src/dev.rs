//! `ashlar dev`: a whole cluster on this machine, each part a process of its own, so that
//! killing one is real.
//!
//! Invariants: one `ashlar dev` a folder (a lock); ports and socket paths are chosen once
//! and kept; no child outlives the supervisor; `dev.json` is there only while it serves.
//! Deliberately absent: anything that a cluster could not do by hand with the other commands.

mod bring_up;
mod layout;
mod probe;
mod process;
mod ready;
pub mod record;
mod shape;
mod supervisor;
mod targets;

use crate::cluster::DEV_DIR;
use crate::problem::Outcome;
use crate::size::Size;
use crate::volume::block_size;
use clap::Args;
use layout::Layout;
use shape::{Asked, Shape, TARGETS_MAX};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

/// What `dev` takes.
#[derive(Args, Clone, Debug)]
pub struct DevArgs {
    /// Where the cluster lives; started again on the same folder it serves the same data.
    #[arg(long, value_name = "DIR", default_value = DEV_DIR)]
    dir: PathBuf,
    /// How many targets [default: as many as replicas, or as there are]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(TARGETS_MAX)))]
    targets: Option<u32>,
    /// Replicas of each volume, when the cluster is made [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=5))]
    replicas: Option<u32>,
    /// Keep all data in memory, to see what the software costs without a disk. It is lost at the end.
    #[arg(long)]
    memory: bool,
    /// Size of the volume vol0, when it is made [default: 4G]
    #[arg(long)]
    size: Option<Size>,
    /// Block size of the volume vol0, when it is made: 4096 or 512 [default: 4096]
    #[arg(long, value_parser = block_size)]
    block_size: Option<u32>,
    /// Address under which other machines reach the exports; they then listen on all addresses.
    #[arg(long, value_name = "ADDR", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    advertise: IpAddr,
    /// Leave a target that dies dead.
    #[arg(long)]
    no_restart: bool,
    /// Shards (cores) of each target, when it is made [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: Option<u16>,
    /// Copysets of the pool, when it is made [default: 2 for each target]. Few cost nothing when idle; a pool that is to
    /// grow has some hundreds for each target.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    copysets: Option<u32>,
    /// Build the replicas of a target elsewhere when it has been silent for so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    offline_after: u32,
}

/// The name of the volume that is made for trying things.
const VOLUME: &str = "vol0";
/// Its size.
const VOLUME_SIZE: Size = Size(4 << 30);

/// Everything settled about a run.
struct Plan {
    layout: Layout,
    shape: Shape,
    /// Asked for on the command line, if it was.
    size: Option<Size>,
    block_bytes: Option<u32>,
    advertise: IpAddr,
    restart: bool,
    offline_after: u32,
}

impl Plan {
    fn mds_endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.shape.mds)
    }
}

/// Runs the cluster until a signal; everything is stopped when this returns.
pub async fn run(args: DevArgs) -> Outcome {
    let layout = Layout::at(&args.dir)?;
    let _lock = layout.lock()?;
    record::DevRecord::remove(layout.root());
    let DevArgs { targets, shards, replicas, copysets, memory, .. } = args;
    let shape = Shape::settle(&layout, Asked { targets, shards, replicas, copysets, memory })?;
    shape.check_free(&layout).await?;
    let plan = Plan {
        layout,
        shape,
        size: args.size,
        block_bytes: args.block_size,
        advertise: args.advertise,
        // What was in memory cannot come back.
        restart: !args.no_restart && !memory,
        offline_after: args.offline_after,
    };
    targets::write_configs(&plan)?;
    targets::format_new(&plan)?;
    supervisor::run(&plan).await
}

/// What the operator reads while the cluster runs; all on stdout, one line each.
pub fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    // Whoever closed our stdout does not want to stop the cluster.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
