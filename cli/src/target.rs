//! `ashlar target`: the storage daemon, making and checking its disk, and targets as the MDS knows them.

use crate::cluster::ClusterArgs;
use crate::daemon::{DaemonArgs, on_stop_signal};
use crate::output::OutputArgs;
use crate::problem::{Exit, Outcome, Problem};
use crate::status::{TargetShown, targets_table};
use clap::{Args, Subcommand};
use client::control::{AdminClient, Patience};
use protocol::control::pb;
use protocol::types::TargetId;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use target_daemon::config::TargetConfig;
use target_daemon::identity::Identity;

/// Commands of the storage daemon.
#[derive(Subcommand)]
pub enum TargetCommand {
    /// Make a target's disk ready for its first start.
    Format(ConfigArgs),
    /// Run it in the foreground until SIGTERM or SIGINT.
    Run(RunArgs),
    /// Check a configuration, and the disk it names, without running.
    Check(ConfigArgs),
    /// List the cluster's targets.
    Ls(ListArgs),
    /// Show one target.
    Show(OneArgs),
    /// Empty a target: it hands over what it leads, and hosts are sent to others.
    Drain(OneArgs),
    /// Use a target again that was being emptied.
    Undrain(OneArgs),
    /// Forget a target that is stopped and holds no replica. Needs --yes.
    Rm(RemoveArgs),
}

/// What `target rm` takes.
#[derive(Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Yes, forget it.
    #[arg(long)]
    yes: bool,
}

/// What `target ls` takes.
#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What commands on one target of the cluster take.
#[derive(Args)]
pub struct OneArgs {
    /// The target's id.
    id: u32,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What names a target.
#[derive(Args)]
pub struct ConfigArgs {
    /// Its configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// What `target run` takes.
#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    target: ConfigArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// One target as printed.
#[derive(Serialize)]
struct OneShown {
    #[serde(flatten)]
    target: TargetShown,
    /// `null`: the target does not answer.
    shards: Option<Vec<ShardShown>>,
}

/// A shard's disk as printed.
#[derive(Serialize)]
struct ShardShown {
    index: u32,
    /// Why it refuses work, if it does.
    failure: Option<String>,
    /// Blocks that failed their checksum, since the target's start.
    blocks_damaged: u64,
    /// Those of them that were mended from a peer.
    blocks_repaired: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    log_bytes: u64,
    log_used_bytes: u64,
}

impl From<pb::ShardStatus> for ShardShown {
    fn from(shard: pb::ShardStatus) -> Self {
        let usage = shard.usage.unwrap_or_default();
        Self {
            index: shard.index,
            failure: shard.failed.then_some(shard.failure),
            blocks_damaged: shard.blocks_damaged,
            blocks_repaired: shard.blocks_repaired,
            capacity_bytes: usage.capacity_bytes,
            used_bytes: usage.used_bytes,
            log_bytes: shard.log_bytes,
            log_used_bytes: shard.log_used_bytes,
        }
    }
}

/// Runs one of the commands.
pub fn run(command: TargetCommand) -> Outcome {
    match command {
        TargetCommand::Format(args) => format(&TargetConfig::load(&args.config)?),
        TargetCommand::Check(args) => check(&TargetConfig::load(&args.config)?),
        TargetCommand::Run(args) => {
            args.daemon.set_up();
            serve(TargetConfig::load(&args.target.config)?)
        }
        TargetCommand::Ls(args) => crate::block_on(list(args)),
        TargetCommand::Show(args) => crate::block_on(show(args)),
        TargetCommand::Drain(args) => crate::block_on(drain(args, true)),
        TargetCommand::Undrain(args) => crate::block_on(drain(args, false)),
        TargetCommand::Rm(args) => crate::block_on(remove(args)),
    }
}

async fn list(args: ListArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    let shown: Vec<_> = status.targets.iter().map(TargetShown::from).collect();
    args.output.print(&shown, |shown| targets_table(shown))?;
    Ok(Exit::Ok)
}

async fn show(args: OneArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    let found = status.targets.iter().find(|target| target.id == args.id);
    let found = found.ok_or_else(|| {
        Problem::new(format!("no target with id {}", args.id))
            .cause("it never registered, or it was removed")
            .fix("see `ashlar target ls`")
    })?;
    let shown = OneShown { target: TargetShown::from(found), shards: shards(found).await };
    args.output.print(&shown, |shown| shown.target.details() + &disks(shown.shards.as_deref()))?;
    Ok(Exit::Ok)
}

/// What the target tells of its shards; the MDS does not know it.
async fn shards(target: &pb::TargetStatus) -> Option<Vec<ShardShown>> {
    let address = target.endpoints.as_ref().filter(|_| target.online)?.admin.clone();
    let status = AdminClient::new(&address, Patience::ONCE).ok()?.status().await.ok()?;
    Some(status.shards.into_iter().map(ShardShown::from).collect())
}

fn disks(shards: Option<&[ShardShown]>) -> String {
    let Some(shards) = shards else { return "\n  disk       not known: the target does not answer".into() };
    let line = |shard: &ShardShown| {
        let ShardShown { index, failure, blocks_damaged, blocks_repaired, .. } = shard;
        let state = failure.as_ref().map_or("well".to_owned(), |why| format!("FAILED: {why}"));
        format!(
            "\n  disk       shard {index}: {state}; {blocks_damaged} damaged blocks found, {blocks_repaired} mended"
        )
    };
    shards.iter().map(line).collect()
}

async fn remove(args: RemoveArgs) -> Outcome {
    let RemoveArgs { one, yes } = args;
    if !yes {
        return Err(Problem::usage(format!("target {} was not removed", one.id))
            .cause("its disk would have to join anew, so this wants to be confirmed")
            .fix("add --yes"));
    }
    one.cluster.connect()?.remove_target(TargetId(one.id)).await?;
    one.output.print(&serde_json::json!({"id": one.id}), |_| format!("target {} is removed", one.id))?;
    Ok(Exit::Ok)
}

async fn drain(args: OneArgs, draining: bool) -> Outcome {
    let target = args.cluster.connect()?.drain_target(TargetId(args.id), draining).await?;
    args.output.print(&TargetShown::from(&target), |target| match draining {
        true => format!("target {} is being emptied; it leads {} copysets still", target.id, target.leaders),
        false => format!("target {} is used again", target.id),
    })?;
    Ok(Exit::Ok)
}

fn format(config: &TargetConfig) -> Outcome {
    let dir = config.dir.display();
    std::fs::create_dir_all(&config.dir).map_err(Problem::io(format!("cannot make {dir}")))?;
    target_daemon::format(config)?;
    println!("target {} is formatted in {dir}", config.id);
    Ok(Exit::Ok)
}

/// The configuration was checked by reading it; what is left is its disk's identity.
fn check(config: &TargetConfig) -> Outcome {
    let (id, dir) = (config.id, config.dir.display());
    if Identity::load(&config.dir)?.is_none() {
        println!(
            "the configuration of target {id} is valid; {dir} is not formatted yet (ashlar target format)"
        );
        return Ok(Exit::CheckFailed);
    }
    Identity::open(&config.dir, config.target())?;
    println!("the configuration of target {id} is valid; {dir} is formatted and is that target's");
    Ok(Exit::Ok)
}

type Stop = Box<dyn Fn() + Send + Sync>;

fn serve(config: TargetConfig) -> Outcome {
    let stop: Arc<OnceLock<Stop>> = Arc::default();
    let asked = stop.clone();
    on_stop_signal(move || match asked.get() {
        Some(stop) => stop(),
        // Nothing is under way before the target can be stopped.
        None => std::process::exit(0),
    })?;
    target_daemon::run(config, move |handle| drop(stop.set(handle)))?;
    Ok(Exit::Ok)
}
