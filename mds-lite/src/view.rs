//! The state as answers show it. Pure.

use crate::record::{Endpoints, PoolId, TargetRecord, VolumeRecord};
use crate::state::schedule::{Presence, Task};
use crate::state::{Leader, Membership, Replica, Space, State, Usage};
use protocol::control::{Problem, ProblemKind, pb, protocol_to_pb, shard_to_pb};
use protocol::map::ExportProtocol;
use protocol::types::{ChunkId, CopysetId, ShardAddr, Span, TargetId, Time, VolumeId};
use std::collections::BTreeMap;

pub(crate) fn volume(state: &State, now: Time, id: VolumeId) -> Result<pb::Volume, Problem> {
    let (_, record) = state.find_volume(&crate::state::VolumeRef::Id(id))?;
    Ok(volume_of(state, now, id, record))
}

fn session(state: &State, now: Time, id: VolumeId) -> pb::Session {
    let record = state.session(id);
    let holder = |name: String| {
        let (left, targets) = state.lease(id, &name, now);
        let targets = targets.into_iter().map(|target| target.0).collect();
        pb::SessionHolder { name, lease_left_ms: left.map(|ns| ns / 1_000_000), targets }
    };
    let (epoch, exclusive) = (record.epoch, record.exclusive);
    pb::Session { epoch, exclusive, holders: record.holders.into_iter().map(holder).collect() }
}

fn volume_of(state: &State, now: Time, id: VolumeId, record: &VolumeRecord) -> pb::Volume {
    let (allocated, space) = (state.allocation(id), state.space_of(id));
    // Not a look at all of them: ten thousand volumes may be exported.
    let from = state.exports.range((id, ExportProtocol::Nbd)..);
    let exports = from.map(|(key, _)| key).take_while(|(volume, _)| *volume == id);
    pb::Volume {
        id: id.0,
        name: record.name.clone(),
        bytes: record.bytes,
        block_bytes: record.block_bytes,
        pool: state.pools[&record.pool].name.clone(),
        copysets: record.copysets.iter().map(|id| id.0).collect(),
        deleting: record.deleted,
        segments: record.segments(),
        allocated_segments: allocated.count(),
        allocated_bytes: space.allocated,
        exports: exports.map(|(_, protocol)| protocol_to_pb(*protocol).into()).collect(),
        purge_at_s: record.purge_at_s.filter(|_| !record.deleted),
        replicated_bytes: space.replicated,
        reserved_bytes: space.reserved,
        session: Some(session(state, now, id)),
    }
}

pub(crate) fn volumes(state: &State, now: Time, deleting: bool) -> Vec<pb::Volume> {
    let wanted = state.volumes.iter().filter(|(_, record)| deleting || record.is_live());
    wanted.map(|(id, record)| volume_of(state, now, *id, record)).collect()
}

pub(crate) fn stat(state: &State, now: Time, id: VolumeId) -> Result<pb::StatVolumeResponse, Problem> {
    Ok(pb::StatVolumeResponse {
        volume: Some(volume(state, now, id)?),
        allocated: state.allocation(id).as_bytes().to_vec(),
        freeing: state.freeing(id).into_iter().map(|target| target.0).collect(),
    })
}

pub(crate) fn pool(state: &State, id: PoolId) -> pb::Pool {
    let record = &state.pools[&id];
    pb::Pool {
        id,
        name: record.name.clone(),
        replicas: record.replicas,
        copysets: record.copysets.iter().map(|id| id.0).collect(),
        capacity_bytes: state.pool_capacity(record),
        space: Some(space(state.space_of_pool(Some(id)))),
        failure_domain: state.pool_domain(id).map_or(String::new(), |domain| domain.to_string()),
    }
}

pub(crate) fn export(
    state: &State,
    now: Time,
    volume: VolumeId,
    protocol: ExportProtocol,
) -> Result<pb::Export, Problem> {
    let (_, record) = state.find_volume(&crate::state::VolumeRef::Id(volume))?;
    let allowed = state.exports.get(&(volume, protocol));
    let place = |(id, target): (&TargetId, &TargetRecord)| {
        let (tcp, unix) = match protocol {
            ExportProtocol::Nbd => (target.endpoints.nbd_tcp, target.endpoints.nbd_unix.clone()),
            ExportProtocol::Nvme => (target.endpoints.nvme_tcp, String::new()),
        };
        let online = state.is_online(*id, now);
        pb::ExportPlace { target: id.0, tcp: tcp.map_or_else(String::new, |a| a.to_string()), unix, online }
    };
    Ok(pb::Export {
        volume: volume.0,
        name: record.name.clone(),
        protocol: protocol_to_pb(protocol).into(),
        places: state.targets.iter().map(place).collect(),
        allowed_hosts: allowed.into_iter().flatten().cloned().collect(),
    })
}

pub(crate) fn exports(state: &State, now: Time, of: Option<VolumeId>) -> Result<Vec<pb::Export>, Problem> {
    let wanted = state.exports.keys().filter(|(volume, _)| of.is_none_or(|of| of == *volume));
    wanted.map(|(volume, protocol)| export(state, now, *volume, *protocol)).collect()
}

/// Targets that are not online. Right after the MDS's start that would be all, so none is told of
/// until all could have beaten.
pub(crate) fn away(state: &State, now: Time) -> Vec<u32> {
    if now < Time::default() + state.policy().unstable_after + state.policy().unstable_after {
        return Vec::new();
    }
    state.targets.keys().filter(|id| !state.is_online(**id, now)).map(|id| id.0).collect()
}

pub(crate) fn leader_hint(copyset: CopysetId, leader: Leader) -> pb::LeaderHint {
    pb::LeaderHint { copyset: copyset.0, leader: leader.target.0, term: leader.term.0 }
}

pub(crate) fn leaders(state: &State, now: Time) -> Vec<pb::LeaderHint> {
    let hint = |id: &CopysetId| state.leader(*id, now).map(|leader| leader_hint(*id, leader));
    state.copysets.keys().filter_map(hint).collect()
}

pub(crate) fn route(state: &State, now: Time, chunk: ChunkId) -> Result<pb::GetRouteResponse, Problem> {
    let (_, record) = state.find_volume(&crate::state::VolumeRef::Id(chunk.volume))?;
    if chunk.index >= record.chunks() {
        return Err(Problem::new(
            ProblemKind::Invalid,
            format!("chunk {} of volume {:?} refused", chunk.index, record.name),
            format!("the volume has {}", record.chunks()),
            "use an index below that",
        ));
    }
    let Some((copyset, entry)) = state.map().route(chunk) else {
        return Err(Problem::new(
            ProblemKind::NotFound,
            format!("volume {:?} is being deleted", record.name),
            "somebody deleted it",
            "see `ashlar volume ls`",
        ));
    };
    Ok(pb::GetRouteResponse {
        copyset: copyset.0,
        members: entry.members.iter().copied().map(shard_to_pb).collect(),
        leader: state.leader(copyset, now).map(|leader| leader_hint(copyset, leader)),
    })
}

/// All that `ashlar status` shows.
pub fn status(state: &State, now: Time) -> pb::StatusResponse {
    let leaders = known_leaders(state, now);
    let held = held(state, &leaders);
    let of = |id: &TargetId| held.get(id).copied().unwrap_or_default();
    let targets: Vec<_> =
        state.targets.iter().map(|(id, record)| target(state, now, *id, record, of(id))).collect();
    let copysets = state.copysets.keys().zip(&leaders);
    let copysets: Vec<_> = copysets.map(|(id, leader)| copyset(state, now, *id, *leader)).collect();
    let mut usage = pb::Usage::default();
    for of in targets.iter().filter(|target| target.online).filter_map(|target| target.usage) {
        usage.capacity_bytes = usage.capacity_bytes.saturating_add(of.capacity_bytes);
        usage.used_bytes = usage.used_bytes.saturating_add(of.used_bytes);
        usage.formatted_bytes = usage.formatted_bytes.saturating_add(of.formatted_bytes);
    }
    let mut warnings = warnings(state, &targets, &copysets);
    if state.most_are_silent(now) {
        warnings.push("less than half of the targets are online: no replica is built elsewhere".into());
    }
    let (outstanding, eta) = outstanding(state);
    if outstanding > 0 && state.tasks().next().is_none() {
        warnings.push(format!(
            "{outstanding} replicas are to move and none can: no other target has room for them, or their copysets have \
             no leader"
        ));
    }
    pb::StatusResponse {
        cluster: state.cluster().0.to_vec(),
        generation: state.map().generation,
        targets,
        copysets,
        pools: state.pools.keys().map(|id| pool(state, *id)).collect(),
        volumes: volumes(state, now, true),
        usage: Some(usage),
        warnings,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tasks: state.tasks().map(|(id, of)| task(state, now, id, of)).collect(),
        outstanding: outstanding as u32,
        eta_ms: eta.map(|eta| eta.0 / 1_000_000),
        space: Some(space(state.space_of_pool(None))),
    }
}

/// Replicas that are to move, and how long that takes: as long as nothing moves, nobody knows.
pub(crate) fn outstanding(state: &State) -> (usize, Option<Span>) {
    let (outstanding, eta) = state.outstanding();
    (outstanding, eta.filter(|_| state.tasks().next().is_some()))
}

fn space(space: Space) -> pb::Space {
    pb::Space {
        logical_bytes: space.logical,
        allocated_bytes: space.allocated,
        replicated_bytes: space.replicated,
        reserved_bytes: space.reserved,
    }
}

fn task(state: &State, now: Time, id: CopysetId, task: &Task) -> pb::Task {
    let told = state.leading(id, now).and_then(|(_, replica)| replica.membership.as_ref());
    let lags = told.into_iter().flat_map(|told| &told.lags);
    pb::Task {
        copyset: id.0,
        why: task.why.word().to_owned(),
        from: task.from.map_or(0, |target| target.0),
        to: task.to.map(shard_to_pb),
        age_ms: (now - task.began).0 / 1_000_000,
        lag: task.to.and_then(|to| lags.copied().find(|lag| lag.target == to.target.0)),
    }
}

pub(crate) fn target_of(state: &State, now: Time, id: TargetId) -> Option<pb::TargetStatus> {
    let held = held(state, &known_leaders(state, now)).get(&id).copied().unwrap_or_default();
    state.targets.get(&id).map(|record| target(state, now, id, record, held))
}

/// Of each copyset, in their order.
fn known_leaders(state: &State, now: Time) -> Vec<Option<Leader>> {
    state.copysets.keys().map(|id| state.leader(*id, now)).collect()
}

/// Replicas and leaders of each target: counted at once, since a cluster has 100,000 copysets on 1,000 targets.
fn held(state: &State, leaders: &[Option<Leader>]) -> BTreeMap<TargetId, (u32, u32)> {
    let mut held: BTreeMap<TargetId, (u32, u32)> = BTreeMap::new();
    for (record, leader) in state.copysets.values().zip(leaders) {
        record.members.iter().for_each(|member| held.entry(member.target).or_default().0 += 1);
        if let Some(leader) = leader {
            held.entry(leader.target).or_default().1 += 1;
        }
    }
    held
}

fn target(
    state: &State,
    now: Time,
    id: TargetId,
    record: &TargetRecord,
    (replicas, leaders): (u32, u32),
) -> pb::TargetStatus {
    let seen = state.seen(id);
    pb::TargetStatus {
        id: id.0,
        disk_uuid: record.disk_uuid.0.to_vec(),
        peers: record.peers.iter().map(ToString::to_string).collect(),
        endpoints: Some(endpoints(&record.endpoints)),
        online: state.is_online(id, now),
        heartbeat_age_ms: seen.map(|seen| (now - seen.at).0 / 1_000_000),
        usage: seen.map(|seen| usage(seen.usage)),
        replicas,
        leaders,
        known_generation: seen.map_or(0, |seen| seen.known_generation),
        draining: record.draining,
        presence: match state.presence(id, now) {
            Presence::Online => pb::Presence::Online,
            Presence::Unstable => pb::Presence::Unstable,
            Presence::Offline => pb::Presence::Offline,
        }
        .into(),
        zone: record.zone.clone(),
        host: record.host.clone(),
        labels: record.labels.clone().into_iter().collect(),
    }
}

fn copyset(state: &State, now: Time, id: CopysetId, leader: Option<Leader>) -> pb::CopysetStatus {
    let record = &state.copysets[&id];
    let mut whole = 0;
    let mut replicas = Vec::new();
    for member in &record.members {
        let online = state.is_online(member.target, now);
        let Some(report) = state.seen(member.target).and_then(|seen| seen.replicas.get(&id)) else {
            continue;
        };
        whole += usize::from(online && report.health == i32::from(pb::ReplicaHealth::Whole));
        replicas.push(pb::MemberStatus { target: member.target.0, online, replica: Some(replica(report)) });
    }
    let led = leader.is_some_and(|leader| state.is_online(leader.target, now));
    pb::CopysetStatus {
        id: id.0,
        pool: state.pools[&record.pool].name.clone(),
        members: record.members.iter().copied().map(shard_to_pb).collect(),
        leader: leader.map(|leader| leader_hint(id, leader)),
        replicas,
        degraded: whole < record.members.len(),
        unavailable: !led || whole <= record.members.len() / 2,
    }
}

/// How many copysets are degraded, and how many unavailable.
pub(crate) fn unwell(state: &State, now: Time) -> (u64, u64) {
    let all = || state.copysets.keys().map(|id| copyset(state, now, *id, state.leader(*id, now)));
    all().fold((0, 0), |(degraded, unavailable), of| {
        (degraded + u64::from(of.degraded), unavailable + u64::from(of.unavailable))
    })
}

fn warnings(state: &State, targets: &[pb::TargetStatus], copysets: &[pb::CopysetStatus]) -> Vec<String> {
    let mut lines = Vec::new();
    if state.pools.is_empty() {
        let policy = state.policy();
        let expected = policy.targets_expected.max(policy.replicas);
        lines.push(format!("no pool yet: {} of {expected} targets have registered", targets.len()));
    }
    for target in targets {
        match target.heartbeat_age_ms {
            _ if target.online => {}
            Some(age) => lines.push(format!("target {} offline: last heartbeat {age} ms ago", target.id)),
            None => lines.push(format!("target {} offline: not heard of since the MDS started", target.id)),
        }
        let failed = state.seen(TargetId(target.id)).map(|seen| &seen.failed_shards);
        for shard in failed.into_iter().flatten() {
            lines.push(format!(
                "target {}: the disk of shard {shard} failed; what it held is built elsewhere",
                target.id
            ));
        }
        if target.draining && target.replicas == 0 {
            lines.push(format!("target {} is empty: stop it, then `ashlar target rm {0}`", target.id));
        }
    }
    let mut count = |what: &str, count: usize| {
        if count > 0 {
            lines.push(format!("{count} of {} copysets {what}", copysets.len()));
        }
    };
    count("unavailable", copysets.iter().filter(|c| c.unavailable).count());
    count("degraded", copysets.iter().filter(|c| c.degraded).count());
    lines
}

fn replica(replica: &Replica) -> pb::ReplicaStatus {
    pb::ReplicaStatus {
        copyset: replica.copyset.0,
        shard: replica.shard.into(),
        term: replica.term.0,
        role: replica.role,
        leader: replica.leader.map_or(0, |leader| leader.0),
        commit_index: replica.commit.0,
        applied_index: replica.applied.0,
        health: replica.health,
        membership: replica.membership.as_ref().map(membership),
    }
}

fn membership(told: &Membership) -> pb::Membership {
    let shards = |all: &[ShardAddr]| all.iter().copied().map(shard_to_pb).collect();
    pb::Membership {
        voters: shards(&told.voters),
        learners: shards(&told.learners),
        settled: told.settled,
        lags: told.lags.clone(),
        busy: told.busy,
    }
}

fn usage(usage: Usage) -> pb::Usage {
    pb::Usage { capacity_bytes: usage.capacity, used_bytes: usage.used, formatted_bytes: usage.formatted }
}

fn endpoints(endpoints: &Endpoints) -> pb::Endpoints {
    let address = |address: Option<std::net::SocketAddr>| address.map_or_else(String::new, |a| a.to_string());
    pb::Endpoints {
        admin: address(endpoints.admin),
        metrics: address(endpoints.metrics),
        nbd_tcp: address(endpoints.nbd_tcp),
        nbd_unix: endpoints.nbd_unix.clone(),
        nvme_tcp: address(endpoints.nvme_tcp),
    }
}
