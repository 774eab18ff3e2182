//! `ashlar status`: the cluster at a glance. Exit code 0 as long as the MDS answers: what
//! wants attention is printed, and is in the JSON for whoever wants to decide by it.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::pool::{self, Space};
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
    /// "well", "degraded" (a copyset has too few whole replicas) or "unavailable" (one cannot serve).
    health: &'static str,
    /// Chunk slots of the targets that are online.
    capacity_bytes: u64,
    used_bytes: u64,
    targets: Vec<TargetShown>,
    copysets: Vec<CopysetShown>,
    pools: Vec<pool::Shown>,
    volumes: Vec<volume::Shown>,
    /// Of all volumes, those in the bin and being removed included.
    space: Space,
    tasks: Vec<TaskShown>,
    /// Replicas that are to be moved, built or taken away.
    outstanding: u32,
    /// How long that takes at the pace of the last ones.
    eta_ms: Option<u64>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct TaskShown {
    copyset: u32,
    why: String,
    from: Option<u32>,
    to: Option<u32>,
    age_ms: u64,
    entries_behind: Option<u64>,
    filled_by_chunk: bool,
}

/// A target as printed.
#[derive(Serialize)]
pub struct TargetShown {
    /// Its number.
    pub id: u32,
    online: bool,
    /// "online", "unstable" or "offline".
    presence: &'static str,
    draining: bool,
    zone: String,
    host: String,
    labels: BTreeMap<String, String>,
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

/// A copyset as printed.
#[derive(Serialize)]
pub struct CopysetShown {
    /// Its number.
    pub id: u32,
    /// Its pool's name.
    pub pool: String,
    /// The target that leads, if one is known.
    pub leader: Option<u32>,
    /// Its term.
    pub term: Option<u64>,
    degraded: bool,
    unavailable: bool,
    members: Vec<MemberShown>,
    /// By target.
    pub replicas: BTreeMap<u32, ReplicaShown>,
}

#[derive(Serialize)]
struct MemberShown {
    target: u32,
    shard: u32,
}

/// A replica as printed.
#[derive(Serialize)]
pub struct ReplicaShown {
    /// Its target was heard of lately.
    pub online: bool,
    /// One word.
    pub role: &'static str,
    /// One word.
    pub health: &'static str,
    /// Of the copyset's log.
    pub commit_index: u64,
    /// Of the copyset's log.
    pub applied_index: u64,
    /// Entries that it has not acknowledged, as its leader told last; `null`: no leader told of it.
    pub entries_behind: Option<u64>,
}

/// Asks and prints.
pub async fn run(args: StatusArgs) -> Outcome {
    let status = args.cluster.connect()?.status().await?;
    args.output.print(&shown(&status), text)?;
    Ok(Exit::Ok)
}

fn shown(status: &pb::StatusResponse) -> Shown {
    let usage = status.usage.unwrap_or_default();
    let any = |wanted: fn(&pb::CopysetStatus) -> bool| status.copysets.iter().any(wanted);
    Shown {
        health: match (any(|c| c.unavailable), any(|c| c.degraded)) {
            (true, _) => "unavailable",
            (false, true) => "degraded",
            (false, false) => "well",
        },
        capacity_bytes: usage.capacity_bytes,
        used_bytes: usage.used_bytes,
        pools: status.pools.iter().map(pool::Shown::from).collect(),
        cluster: status.cluster.iter().map(|byte| format!("{byte:02x}")).collect(),
        generation: status.generation,
        version: status.version.clone(),
        targets: status.targets.iter().map(TargetShown::from).collect(),
        copysets: status.copysets.iter().map(CopysetShown::from).collect(),
        volumes: status.volumes.iter().map(volume::Shown::from).collect(),
        space: Space::from(status.space.unwrap_or_default()),
        tasks: status.tasks.iter().map(task).collect(),
        outstanding: status.outstanding,
        eta_ms: status.eta_ms,
        warnings: status.warnings.clone(),
    }
}

fn task(task: &pb::Task) -> TaskShown {
    TaskShown {
        copyset: task.copyset,
        why: task.why.clone(),
        from: Some(task.from).filter(|target| *target != 0),
        to: task.to.map(|shard| shard.target),
        age_ms: task.age_ms,
        entries_behind: task.lag.map(|lag| lag.entries),
        filled_by_chunk: task.lag.is_some_and(|lag| lag.installing),
    }
}

impl From<&pb::TargetStatus> for TargetShown {
    fn from(target: &pb::TargetStatus) -> Self {
        let endpoints = target.endpoints.clone().unwrap_or_default();
        let usage = target.usage.unwrap_or_default();
        Self {
            id: target.id,
            online: target.online,
            presence: match target.presence() {
                pb::Presence::Online => "online",
                pb::Presence::Unstable => "unstable",
                pb::Presence::Offline | pb::Presence::Unspecified => "offline",
            },
            draining: target.draining,
            zone: target.zone.clone(),
            host: target.host.clone(),
            labels: target.labels.clone().into_iter().collect(),
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
    fn state(&self) -> String {
        let presence = if self.online { "online".to_owned() } else { self.presence.to_uppercase() };
        match (self.online, self.draining) {
            (true, true) => "draining".into(),
            (false, true) => format!("{presence}, draining"),
            (_, false) => presence,
        }
    }

    /// Everything, a line each.
    pub fn details(&self) -> String {
        let age = self.heartbeat_age_ms.map_or("never".into(), |age| format!("{age} ms ago"));
        let rows = [
            ("state", self.state()),
            ("zone", self.zone.clone()),
            ("host", self.host.clone()),
            ("labels", self.labels.iter().map(|(key, value)| format!("{key}={value} ")).collect()),
            ("heartbeat", age),
            ("used", format!("{} of {}", Size(self.used_bytes), Size(self.capacity_bytes))),
            ("formatted", percent(self.formatted_bytes, self.capacity_bytes)),
            ("replicas", format!("{}, {} of them lead", self.replicas, self.leaders)),
            ("peers", self.peers.join(" ")),
            ("admin", self.admin.clone()),
            ("metrics", self.metrics.clone()),
        ];
        let lines = rows
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| format!("\n  {name:<10} {value}"));
        format!("target {}{}", self.id, lines.collect::<String>())
    }
}

impl From<&pb::CopysetStatus> for CopysetShown {
    fn from(copyset: &pb::CopysetStatus) -> Self {
        let reports = || copyset.replicas.iter().filter_map(|member| member.replica.as_ref());
        let told = reports().filter(|report| report.role() == pb::ReplicaRole::Leader).max_by_key(|r| r.term);
        let lags = told.and_then(|report| report.membership.as_ref()).map_or(&[][..], |m| &m.lags);
        let replicas = copyset.replicas.iter().map(|member| (member.target, replica(member, lags)));
        let members = copyset.members.iter().map(|m| MemberShown { target: m.target, shard: m.shard });
        Self {
            id: copyset.id,
            pool: copyset.pool.clone(),
            leader: copyset.leader.as_ref().map(|hint| hint.leader),
            term: copyset.leader.as_ref().map(|hint| hint.term),
            degraded: copyset.degraded,
            unavailable: copyset.unavailable,
            members: members.collect(),
            replicas: replicas.collect(),
        }
    }
}

impl CopysetShown {
    /// One word.
    pub fn state(&self) -> &'static str {
        match (self.degraded, self.unavailable) {
            (_, true) => "UNAVAILABLE",
            (true, false) => "degraded",
            (false, false) => "well",
        }
    }
    /// Its targets.
    pub fn places(&self) -> String {
        self.members.iter().map(|m| m.target.to_string()).collect::<Vec<_>>().join(" ")
    }
}

fn replica(member: &pb::MemberStatus, lags: &[pb::PeerLag]) -> ReplicaShown {
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
        entries_behind: lags.iter().find(|lag| lag.target == member.target).map(|lag| lag.entries),
    }
}

/// More targets or volumes than this are counted rather than listed, so that it stays one screen.
const LISTED_MAX: usize = 16;

fn text(status: &Shown) -> String {
    let (headline, copysets, moves) = (headline(status), health(&status.copysets), moves(status));
    let pools = match status.pools.is_empty() {
        true => String::new(),
        false => format!("{}\n", pool::listing(&status.pools)),
    };
    let (targets, volumes) = (few_targets(&status.targets), few_volumes(&status.volumes));
    let space = space(&status.space);
    format!(
        "{headline}\n{copysets}\n{space}\n{moves}\n{targets}\n{pools}{volumes}{}",
        warnings(&status.warnings)
    )
}

/// All that matters when all is well.
fn headline(status: &Shown) -> String {
    let online = status.targets.iter().filter(|target| target.online).count();
    let health = if status.health == "well" { "well".to_owned() } else { status.health.to_uppercase() };
    format!(
        "{health}: {online} of {} targets online, {} of {} used ({})",
        status.targets.len(),
        Size(status.used_bytes),
        Size(status.capacity_bytes),
        percent(status.used_bytes, status.capacity_bytes)
    )
}

/// All targets, or those of many that want attention.
fn few_targets(targets: &[TargetShown]) -> String {
    if targets.len() <= LISTED_MAX {
        return targets_table(targets);
    }
    let (odd, well): (Vec<&TargetShown>, Vec<&TargetShown>) =
        targets.iter().partition(|target| !target.online || target.draining);
    let listed = odd.len().min(LISTED_MAX);
    let more = odd.len() - listed;
    let more = if more > 0 { format!("{more} more of these, ") } else { String::new() };
    let rest = format!("{more}{} targets are online (`ashlar target ls`)\n", well.len());
    if listed == 0 { rest } else { targets_table(odd[..listed].iter().copied()) + &rest }
}

fn few_volumes(volumes: &[volume::Shown]) -> String {
    match volumes.len() {
        0..=LISTED_MAX => volume::listing(volumes),
        many => format!("{many} volumes (`ashlar volume ls`)"),
    }
}

fn space(space: &Space) -> String {
    format!(
        "volumes of {}: {} allocated, {} over all replicas",
        Size(space.logical_bytes),
        Size(space.allocated_bytes),
        Size(space.replicated_bytes)
    )
}

/// Targets, one a line.
pub fn targets_table<'a>(targets: impl IntoIterator<Item = &'a TargetShown>) -> String {
    let header = ["TARGET", "STATE", "USED", "CAPACITY", "FORMATTED", "REPLICAS", "LEADERS", "ADMIN"];
    let rows = targets.into_iter().map(|target| {
        vec![
            target.id.to_string(),
            target.state(),
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

/// What is under way, the first few of it, and when it may be done.
fn moves(status: &Shown) -> String {
    const SHOWN_MAX: usize = 8;
    if status.outstanding == 0 {
        return String::new();
    }
    let eta = status
        .eta_ms
        .map_or("time left not known yet".into(), |ms| format!("about {} s left", ms.div_ceil(1000)));
    let place = |target: Option<u32>| target.map_or("-".into(), |target| target.to_string());
    let line = |task: &TaskShown| {
        let state = match (task.filled_by_chunk, task.entries_behind) {
            (true, _) => "being filled".into(),
            (false, Some(entries)) => format!("{entries} entries behind"),
            (false, None) => "begins".into(),
        };
        format!(
            "  {} copyset {}: target {} -> {}, {state}\n",
            task.why,
            task.copyset,
            place(task.from),
            place(task.to)
        )
    };
    let lines: String = status.tasks.iter().take(SHOWN_MAX).map(line).collect();
    let more = status.tasks.len().saturating_sub(SHOWN_MAX);
    let more = if more > 0 { format!("  and {more} more\n") } else { String::new() };
    format!("{} replicas to move, {eta}\n{lines}{more}", status.outstanding)
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
            CopysetShown::from(&pb::CopysetStatus { degraded, unavailable, ..Default::default() })
        };
        let all = [copyset(false, false), copyset(true, false), copyset(true, true), copyset(false, true)];
        assert_eq!(health(&all), "4 copysets: 1 well, 1 degraded, 2 unavailable");
    }

    #[test]
    fn a_thousand_targets_are_one_screen_and_the_one_that_is_away_is_on_it() {
        let target = |id| pb::TargetStatus {
            id,
            online: id != 77,
            presence: 1 + 2 * i32::from(id == 77),
            ..Default::default()
        };
        let status = pb::StatusResponse {
            targets: (1..=1000).map(target).collect(),
            volumes: vec![pb::Volume::default(); 500],
            usage: Some(pb::Usage { capacity_bytes: 4 << 30, used_bytes: 1 << 30, formatted_bytes: 0 }),
            ..Default::default()
        };
        let printed = text(&shown(&status));
        assert!(printed.lines().count() < 24, "{printed}");
        for part in ["well: 999 of 1000 targets online", "(25 %)", "OFFLINE", "500 volumes"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
        let well = vec![pb::TargetStatus { online: true, ..Default::default() }; 20];
        let printed = text(&shown(&pb::StatusResponse { targets: well, ..Default::default() }));
        assert!(printed.contains("20 targets are online") && !printed.contains("TARGET "), "{printed}");
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
        assert!(printed.contains("OFFLINE") && printed.ends_with("warning: look"), "{printed}");
    }
}
