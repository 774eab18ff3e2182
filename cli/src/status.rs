//! `ashlar status`: the cluster at a glance. Exit code 0 as long as the MDS answers: what
//! wants attention is printed, and is in the JSON for whoever wants to decide by it.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome};
use crate::size::Size;
use crate::volume;
use clap::Args;
use protocol::control::pb;
use serde::Serialize;
use std::collections::BTreeMap;

/// What `status` takes.
#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Shown {
    cluster: String,
    generation: u64,
    version: String,
    targets: Vec<TargetShown>,
    copysets: Vec<CopysetShown>,
    volumes: Vec<volume::Shown>,
    warnings: Vec<String>,
}

/// A target as printed.
#[derive(Serialize)]
pub struct TargetShown {
    /// Its number.
    pub id: u32,
    online: bool,
    draining: bool,
    heartbeat_age_ms: Option<u64>,
    peers: Vec<String>,
    admin: String,
    metrics: String,
    capacity_bytes: u64,
    used_bytes: u64,
    formatted_bytes: u64,
    replicas: u32,
    /// Copysets that it leads.
    pub leaders: u32,
}

#[derive(Serialize)]
struct CopysetShown {
    id: u32,
    leader: Option<u32>,
    term: Option<u64>,
    degraded: bool,
    unavailable: bool,
    members: Vec<MemberShown>,
    /// By target.
    replicas: BTreeMap<u32, ReplicaShown>,
}

#[derive(Serialize)]
struct MemberShown {
    target: u32,
    shard: u32,
}

#[derive(Serialize)]
struct ReplicaShown {
    online: bool,
    role: &'static str,
    health: &'static str,
    commit_index: u64,
    applied_index: u64,
}

/// Asks and prints.
pub async fn run(args: StatusArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    args.output.print(&shown(&status), text)?;
    Ok(Exit::Ok)
}

fn shown(status: &pb::StatusResponse) -> Shown {
    Shown {
        cluster: status.cluster.iter().map(|byte| format!("{byte:02x}")).collect(),
        generation: status.generation,
        version: status.version.clone(),
        targets: status.targets.iter().map(TargetShown::from).collect(),
        copysets: status.copysets.iter().map(copyset).collect(),
        volumes: status.volumes.iter().map(volume::Shown::from).collect(),
        warnings: status.warnings.clone(),
    }
}

impl From<&pb::TargetStatus> for TargetShown {
    fn from(target: &pb::TargetStatus) -> Self {
        let endpoints = target.endpoints.clone().unwrap_or_default();
        let usage = target.usage.unwrap_or_default();
        Self {
            id: target.id,
            online: target.online,
            draining: target.draining,
            heartbeat_age_ms: target.heartbeat_age_ms,
            peers: target.peers.clone(),
            admin: endpoints.admin,
            metrics: endpoints.metrics,
            capacity_bytes: usage.capacity_bytes,
            used_bytes: usage.used_bytes,
            formatted_bytes: usage.formatted_bytes,
            replicas: target.replicas,
            leaders: target.leaders,
        }
    }
}

impl TargetShown {
    fn state(&self) -> &'static str {
        match (self.online, self.draining) {
            (true, false) => "online",
            (true, true) => "draining",
            (false, false) => "AWAY",
            (false, true) => "AWAY, draining",
        }
    }

    /// Everything, a line each.
    pub fn details(&self) -> String {
        let age = self.heartbeat_age_ms.map_or("never".into(), |age| format!("{age} ms ago"));
        let rows = [
            ("state", self.state().to_owned()),
            ("heartbeat", age),
            ("used", format!("{} of {}", Size(self.used_bytes), Size(self.capacity_bytes))),
            ("formatted", percent(self.formatted_bytes, self.capacity_bytes)),
            ("replicas", format!("{}, {} of them lead", self.replicas, self.leaders)),
            ("peers", self.peers.join(" ")),
            ("admin", self.admin.clone()),
            ("metrics", self.metrics.clone()),
        ];
        let lines = rows.iter().map(|(name, value)| format!("\n  {name:<10} {value}"));
        format!("target {}{}", self.id, lines.collect::<String>())
    }
}

fn copyset(copyset: &pb::CopysetStatus) -> CopysetShown {
    let replicas = copyset.replicas.iter().map(|member| (member.target, replica(member)));
    let members = copyset.members.iter().map(|m| MemberShown { target: m.target, shard: m.shard });
    CopysetShown {
        id: copyset.id,
        leader: copyset.leader.as_ref().map(|hint| hint.leader),
        term: copyset.leader.as_ref().map(|hint| hint.term),
        degraded: copyset.degraded,
        unavailable: copyset.unavailable,
        members: members.collect(),
        replicas: replicas.collect(),
    }
}

fn replica(member: &pb::MemberStatus) -> ReplicaShown {
    let replica = member.replica.clone().unwrap_or_default();
    ReplicaShown {
        online: member.online,
        role: match replica.role() {
            pb::ReplicaRole::Follower => "follower",
            pb::ReplicaRole::Candidate => "candidate",
            pb::ReplicaRole::Leader => "leader",
            pb::ReplicaRole::Learner => "learner",
            pb::ReplicaRole::Unspecified => "unknown",
        },
        health: match replica.health() {
            pb::ReplicaHealth::Whole => "whole",
            pb::ReplicaHealth::Installing => "installing",
            pb::ReplicaHealth::Damaged => "damaged",
            pb::ReplicaHealth::Failed => "failed",
            pb::ReplicaHealth::Unspecified => "unknown",
        },
        commit_index: replica.commit_index,
        applied_index: replica.applied_index,
    }
}

fn text(status: &Shown) -> String {
    let targets = targets_table(&status.targets);
    let volumes = volume::listing(&status.volumes);
    format!("{targets}\n{}\n\n{volumes}{}", health(&status.copysets), warnings(&status.warnings))
}

/// Targets, one a line.
pub fn targets_table(targets: &[TargetShown]) -> String {
    let header = ["TARGET", "STATE", "USED", "CAPACITY", "FORMATTED", "REPLICAS", "LEADERS", "ADMIN"];
    let rows = targets.iter().map(|target| {
        vec![
            target.id.to_string(),
            target.state().to_owned(),
            Size(target.used_bytes).to_string(),
            Size(target.capacity_bytes).to_string(),
            percent(target.formatted_bytes, target.capacity_bytes),
            target.replicas.to_string(),
            target.leaders.to_string(),
            target.admin.clone(),
        ]
    });
    table(&header, rows)
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.0} %", part as f64 * 100.0 / whole as f64) }
}

fn health(copysets: &[CopysetShown]) -> String {
    let unavailable = copysets.iter().filter(|copyset| copyset.unavailable).count();
    let degraded = copysets.iter().filter(|copyset| copyset.degraded).count() - {
        copysets.iter().filter(|copyset| copyset.degraded && copyset.unavailable).count()
    };
    let well = copysets.len() - unavailable - degraded;
    format!("{} copysets: {well} well, {degraded} degraded, {unavailable} unavailable", copysets.len())
}

fn warnings(warnings: &[String]) -> String {
    warnings.iter().map(|warning| format!("\nwarning: {warning}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copyset_is_counted_once_by_its_worst_state() {
        let copyset = |degraded, unavailable| {
            copyset(&pb::CopysetStatus { degraded, unavailable, ..Default::default() })
        };
        let all = [copyset(false, false), copyset(true, false), copyset(true, true), copyset(false, true)];
        assert_eq!(health(&all), "4 copysets: 1 well, 1 degraded, 2 unavailable");
    }

    #[test]
    fn an_empty_cluster_and_one_with_everything_missing_are_printed() {
        let empty = text(&shown(&pb::StatusResponse::default()));
        assert!(empty.contains("0 copysets") && empty.contains("no volumes"), "{empty}");
        let bare = pb::StatusResponse {
            targets: vec![pb::TargetStatus::default()],
            copysets: vec![pb::CopysetStatus {
                replicas: vec![pb::MemberStatus::default()],
                ..Default::default()
            }],
            volumes: vec![pb::Volume::default()],
            warnings: vec!["look".into()],
            ..Default::default()
        };
        let printed = text(&shown(&bare));
        assert!(printed.contains("AWAY") && printed.ends_with("warning: look"), "{printed}");
    }
}
