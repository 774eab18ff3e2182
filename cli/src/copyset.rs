//! `ashlar copyset`: where replicas are, who leads, and handing leadership over.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome, Problem};
use crate::status::CopysetShown;
use clap::{Args, Subcommand};
use client::control::{AdminClient, Patience};
use protocol::control::pb;
use protocol::types::{CopysetId, TargetId};
use serde::Serialize;

/// Commands on copysets.
#[derive(Subcommand)]
pub enum CopysetCommand {
    /// List the copysets.
    Ls(ListArgs),
    /// Show one copyset and its replicas.
    Show(OneArgs),
    /// Hand leadership to the replica on another target. Where its IO comes from draws it back.
    TransferLeader(TransferArgs),
}

/// What `copyset ls` takes.
#[derive(Args)]
pub struct ListArgs {
    /// Only those that are degraded or unavailable.
    #[arg(long)]
    unwell: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What commands on one copyset take.
#[derive(Args)]
pub struct OneArgs {
    /// The copyset's id.
    id: u32,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `copyset transfer-leader` takes.
#[derive(Args)]
pub struct TransferArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The target that shall lead.
    #[arg(long, value_name = "TARGET")]
    to: u32,
}

/// One copyset as printed.
#[derive(Serialize)]
struct OneShown {
    #[serde(flatten)]
    copyset: CopysetShown,
    /// How often its membership has changed, as the MDS knows it.
    epoch: u64,
}

/// Runs one of the commands.
pub async fn run(command: CopysetCommand) -> Outcome {
    match command {
        CopysetCommand::Ls(args) => list(args).await,
        CopysetCommand::Show(args) => show(args).await,
        CopysetCommand::TransferLeader(args) => transfer(args).await,
    }
}

async fn list(args: ListArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    let wanted = |copyset: &&pb::CopysetStatus| !args.unwell || copyset.degraded || copyset.unavailable;
    let shown: Vec<_> = status.copysets.iter().filter(wanted).map(CopysetShown::from).collect();
    args.output.print(&shown, |shown| {
        let rows = shown.iter().map(|copyset| {
            let leader = copyset.leader.map_or("-".into(), |leader| leader.to_string());
            vec![
                copyset.id.to_string(),
                copyset.pool.clone(),
                copyset.state().into(),
                copyset.places(),
                leader,
            ]
        });
        table(&["COPYSET", "POOL", "STATE", "TARGETS", "LEADER"], rows)
    })?;
    Ok(Exit::Ok)
}

async fn show(args: OneArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let status = mds.status().await?;
    let copyset = CopysetShown::from(find(&status, args.id)?);
    let entry = mds.map_now().await?.copysets.remove(&CopysetId(args.id));
    let copyset = OneShown { copyset, epoch: entry.map_or(0, |entry| entry.epoch) };
    args.output.print(&copyset, |copyset| {
        let rows = copyset.copyset.replicas.iter().map(|(target, replica)| {
            vec![
                target.to_string(),
                if replica.online { "online" } else { "AWAY" }.into(),
                replica.role.into(),
                replica.health.into(),
                replica.commit_index.to_string(),
                replica.applied_index.to_string(),
                replica.entries_behind.map_or("-".into(), |entries| entries.to_string()),
            ]
        });
        let replicas = table(&["TARGET", "STATE", "ROLE", "HEALTH", "COMMITTED", "APPLIED", "BEHIND"], rows);
        let CopysetShown { id, pool, .. } = &copyset.copyset;
        let term = copyset.copyset.term.map_or("no leader".into(), |term| format!("term {term}"));
        let (state, epoch) = (copyset.copyset.state(), copyset.epoch);
        format!("copyset {id} of pool {pool}: {state}, {term}, membership epoch {epoch}\n{replicas}")
    })?;
    Ok(Exit::Ok)
}

fn find(status: &pb::StatusResponse, id: u32) -> Result<&pb::CopysetStatus, Problem> {
    status.copysets.iter().find(|copyset| copyset.id == id).ok_or_else(|| {
        Problem::new(format!("no copyset with id {id}"))
            .cause("the id is misspelt")
            .fix("see `ashlar copyset ls`")
    })
}

async fn transfer(args: TransferArgs) -> Outcome {
    let TransferArgs { one, to } = args;
    let status = one.cluster.connect()?.status().await?;
    let copyset = find(&status, one.id)?;
    let leader = copyset.leader.as_ref().map(|hint| hint.leader).ok_or_else(|| {
        Problem::new(format!("copyset {} has no leader now", one.id))
            .cause("it is being elected, or most of its replicas are away")
            .fix(format!("see `ashlar copyset show {}`", one.id))
    })?;
    if leader == to {
        return Err(Problem::new(format!("target {to} leads copyset {} already", one.id))
            .fix("name another of its targets"));
    }
    if !copyset.members.iter().any(|member| member.target == to) {
        return Err(Problem::new(format!("copyset {} cannot be led from target {to}", one.id))
            .cause(format!("its replicas are on targets {}", CopysetShown::from(copyset).places()))
            .fix("name one of these"));
    }
    let target = status.targets.iter().find(|target| target.id == leader);
    let address = target.and_then(|target| target.endpoints.as_ref()).map_or("", |e| e.admin.as_str());
    let admin = AdminClient::new(address, Patience::default())?;
    admin.transfer_leader(CopysetId(one.id), TargetId(to)).await?;
    let shown = serde_json::json!({"id": one.id, "from": leader, "to": to});
    one.output.print(&shown, |_| format!("copyset {}: target {leader} hands over to target {to}", one.id))?;
    Ok(Exit::Ok)
}
