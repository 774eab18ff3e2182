//! Messages to commands: every field that anyone could have written is checked here or in the
//! state; a refusal is one line that says what, why and what to do.

use crate::record::{Endpoints, Uuid};
use crate::state::{
    Attach, Attached, Command, Heartbeat, Membership, Registration, Replica, Slots, Usage, VolumeRef,
};
use protocol::control::{
    Problem, ProblemKind, allowed_hosts, check_name, limits, pb, protocol_from_pb, shard_from_pb,
};
use protocol::types::{CopysetId, LogIndex, MEMBERS_MAX, SessionEpoch, TargetId, Term, VolumeId};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// Which volume is meant.
pub fn volume_ref(volume: Option<pb::VolumeRef>) -> Result<VolumeRef, Problem> {
    match volume {
        Some(pb::VolumeRef { id: 0, name }) if !name.is_empty() => Ok(VolumeRef::Name(name)),
        Some(pb::VolumeRef { id, .. }) if id != 0 => Ok(VolumeRef::Id(VolumeId(id))),
        _ => Err(invalid("no volume named", "the request leaves it out", "name a volume or give its id")),
    }
}

/// Segments about to be written first.
pub fn allocate(request: pb::AllocateSegmentsRequest) -> Result<Command, Problem> {
    let pb::AllocateSegmentsRequest { volume, segments } = request;
    within("segments", segments.len(), limits::SEGMENTS_MAX as usize)?;
    Ok(Command::Allocate { volume: VolumeId(volume), segments })
}

/// A volume to be grown.
pub fn resize_volume(request: pb::ResizeVolumeRequest) -> Result<Command, Problem> {
    let pb::ResizeVolumeRequest { volume, bytes } = request;
    Ok(Command::ResizeVolume { volume: volume_ref(volume)?, bytes })
}

/// A volume to be deleted, `unix_s` being the seconds since 1970.
pub fn delete_volume(request: pb::DeleteVolumeRequest, unix_s: u64) -> Result<Command, Problem> {
    let purge_at_s = (request.keep_s > 0).then(|| unix_s + u64::from(request.keep_s));
    Ok(Command::DeleteVolume { volume: volume_ref(request.volume)?, purge_at_s })
}

/// A volume to be taken out of the bin.
pub fn undelete_volume(request: pb::UndeleteVolumeRequest) -> Result<Command, Problem> {
    Ok(Command::UndeleteVolume { volume: volume_ref(request.volume)?, name: request.name })
}

/// A volume to be renamed.
pub fn rename_volume(request: pb::RenameVolumeRequest) -> Result<Command, Problem> {
    Ok(Command::RenameVolume { volume: volume_ref(request.volume)?, name: request.name })
}

/// A host to be attached.
pub fn attach(request: pb::AttachVolumeRequest) -> Result<Command, Problem> {
    let pb::AttachVolumeRequest { volume, holder, exclusive, take_over } = request;
    Ok(Command::Attach(Attach { volume: volume_ref(volume)?, holder, exclusive, take_over }))
}

/// A host to be detached.
pub fn detach(request: pb::DetachVolumeRequest) -> Result<Command, Problem> {
    let pb::DetachVolumeRequest { volume, holder } = request;
    Ok(Command::Detach { volume: volume_ref(volume)?, holder })
}

/// A volume to be offered.
pub fn add_export(request: pb::AddExportRequest) -> Result<Command, Problem> {
    let pb::AddExportRequest { volume, protocol, allowed } = request;
    let allowed = allowed.map(|hosts| allowed_hosts(&hosts.nqns)).transpose()?;
    Ok(Command::AddExport { volume: volume_ref(volume)?, protocol: protocol_from_pb(protocol)?, allowed })
}

/// A pool to be created.
pub fn create_pool(request: pb::CreatePoolRequest) -> Result<Command, Problem> {
    let pb::CreatePoolRequest { name, replicas, copysets, targets } = request;
    within("targets", targets.len(), limits::TARGETS_MAX)?;
    let targets = targets.into_iter().map(TargetId).collect();
    Ok(Command::CreatePool { name, replicas, copysets, targets })
}

/// A volume to be created; blocks have 4096 bytes when none are named.
pub fn create_volume(request: pb::CreateVolumeRequest) -> Command {
    let pb::CreateVolumeRequest { name, bytes, block_bytes, pool } = request;
    let block_bytes = if block_bytes == 0 { 4096 } else { block_bytes };
    Command::CreateVolume { name, bytes, block_bytes, pool }
}

/// A target that starts.
pub fn registration(request: pb::RegisterTargetRequest) -> Result<Registration, Problem> {
    within("shards", request.peers.len(), limits::SHARDS_MAX)?;
    let cluster = match request.cluster.as_slice() {
        [] => None,
        bytes => Some(uuid("cluster id", bytes)?),
    };
    topology(&request)?;
    let peers = request.peers.iter().map(|peer| address("peer", peer)).collect::<Result<_, _>>()?;
    Ok(Registration {
        id: TargetId(request.id),
        cluster,
        disk_uuid: uuid("disk uuid", &request.disk_uuid)?,
        peers,
        endpoints: endpoints(request.endpoints.unwrap_or_default())?,
        capacity_bytes: request.capacity_bytes,
        zone: request.zone,
        host: request.host,
        labels: request.labels.into_iter().collect(),
    })
}

/// Names of zones and hosts, and labels, are as names of volumes; empty ones say nothing.
fn topology(request: &pb::RegisterTargetRequest) -> Result<(), Problem> {
    let named = |noun, name: &str| if name.is_empty() { Ok(()) } else { check_name(noun, name) };
    named("zone", &request.zone)?;
    named("host", &request.host)?;
    within("labels", request.labels.len(), limits::LABELS_MAX)?;
    request.labels.iter().try_for_each(|(key, value)| {
        check_name("label", key)?;
        named("label's value", value)
    })
}

fn endpoints(endpoints: pb::Endpoints) -> Result<Endpoints, Problem> {
    let optional = |noun: &str, text: &str| match text {
        "" => Ok(None),
        text => address(noun, text).map(Some),
    };
    let path = &endpoints.nbd_unix;
    if path.len() > limits::UNIX_PATH_BYTES_MAX || (!path.is_empty() && !path.starts_with('/')) {
        return Err(invalid(
            format!("path of a Unix socket {path:?} refused"),
            format!("it is not absolute, or longer than {} bytes", limits::UNIX_PATH_BYTES_MAX),
            "use a shorter, absolute path",
        ));
    }
    Ok(Endpoints {
        admin: optional("admin", &endpoints.admin)?,
        metrics: optional("metrics", &endpoints.metrics)?,
        nbd_tcp: optional("NBD", &endpoints.nbd_tcp)?,
        nvme_tcp: optional("NVMe", &endpoints.nvme_tcp)?,
        nbd_unix: endpoints.nbd_unix,
    })
}

/// A target that lives.
pub fn heartbeat(request: pb::HeartbeatRequest) -> Result<Heartbeat, Problem> {
    within("replicas", request.replicas.len(), limits::COPYSETS_MAX)?;
    within("freed volumes", request.freed_volumes.len(), limits::VOLUMES_MAX)?;
    // Volumes that were purged a moment ago may be among them.
    within("volumes", request.volumes.len(), 2 * limits::VOLUMES_MAX)?;
    within("attached hosts", request.attached.len(), limits::ATTACHED_MAX)?;
    let usage = request.usage.unwrap_or_default();
    Ok(Heartbeat {
        target: TargetId(request.target),
        disk_uuid: uuid("disk uuid", &request.disk_uuid)?,
        known_generation: request.known_generation,
        usage: Usage {
            capacity: usage.capacity_bytes,
            used: usage.used_bytes,
            formatted: usage.formatted_bytes,
        },
        replicas: request.replicas.iter().map(replica).collect::<Result<_, _>>()?,
        freed: request.freed_volumes.into_iter().map(VolumeId).collect(),
        failed_shards: request.failed_shards.iter().filter_map(|at| u16::try_from(*at).ok()).collect(),
        slots: request.volumes.iter().map(slots).collect(),
        slots_whole: request.volumes_whole,
        attached: request.attached.into_iter().map(attached).collect(),
    })
}

fn attached(told: pb::Attached) -> Attached {
    Attached { volume: VolumeId(told.volume), holder: told.holder, epoch: SessionEpoch(told.epoch) }
}

fn slots(of: &pb::VolumeSlots) -> (VolumeId, Slots) {
    (VolumeId(of.volume), Slots { held: of.held.into(), led: of.led.into() })
}

fn replica(status: &pb::ReplicaStatus) -> Result<Replica, Problem> {
    let shard = u16::try_from(status.shard).map_err(|_| {
        invalid(
            format!("shard {} refused", status.shard),
            "the target is of another version",
            "run the same version everywhere",
        )
    })?;
    Ok(Replica {
        copyset: CopysetId(status.copyset),
        shard,
        term: Term(status.term),
        role: status.role,
        leader: (status.leader != 0).then_some(TargetId(status.leader)),
        commit: LogIndex(status.commit_index),
        applied: LogIndex(status.applied_index),
        health: status.health,
        membership: status.membership.as_ref().map(membership).transpose()?,
    })
}

fn membership(told: &pb::Membership) -> Result<Membership, Problem> {
    within("voters", told.voters.len(), MEMBERS_MAX)?;
    within("learners", told.learners.len(), MEMBERS_MAX)?;
    within("lags", told.lags.len(), 2 * MEMBERS_MAX)?;
    let shards = |all: &[pb::Shard]| all.iter().map(shard_from_pb).collect::<Result<Vec<_>, _>>();
    let (voters, learners) = (shards(&told.voters)?, shards(&told.learners)?);
    let targets: BTreeSet<_> = voters.iter().chain(&learners).map(|m| m.target).collect();
    if targets.len() < voters.len() + learners.len() {
        return Err(invalid(
            "a copyset with two replicas on one target was refused",
            "the target is of another version",
            "run the same version everywhere",
        ));
    }
    Ok(Membership { voters, learners, settled: told.settled, lags: told.lags.clone(), busy: told.busy })
}

fn uuid(noun: &str, bytes: &[u8]) -> Result<Uuid, Problem> {
    bytes.try_into().map(Uuid).map_err(|_| {
        invalid(
            format!("{noun} of {} bytes refused", bytes.len()),
            "an identity has 16; the caller is no target or of another version",
            "run the same version everywhere",
        )
    })
}

fn address(noun: &str, text: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        invalid(
            format!("{noun} address {text:?} refused"),
            "it is not of the form IP:PORT",
            "write it as 192.0.2.1:7401 or [2001:db8::1]:7401",
        )
    })
}

fn within(noun: &str, count: usize, most: usize) -> Result<(), Problem> {
    if count <= most {
        return Ok(());
    }
    let what = format!("{count} {noun} in one request refused");
    Err(Problem::new(ProblemKind::Limit, what, format!("the limit is {most}"), "send fewer"))
}

fn invalid(what: impl Into<String>, cause: impl Into<String>, fix: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Invalid, what, cause, fix)
}
