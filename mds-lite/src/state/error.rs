//! The refusals of the MDS, each with its likely cause and its fix.

use super::VolumeRef;
use crate::record::Uuid;
use protocol::control::{Problem, ProblemKind};
use protocol::types::{TargetId, VolumeId};
use std::collections::BTreeSet;

pub(super) fn no_volume(volume: &VolumeRef) -> Problem {
    let named = match volume {
        VolumeRef::Id(id) => format!("with id {}", id.0),
        VolumeRef::Name(name) => format!("named {name:?}"),
    };
    Problem::new(
        ProblemKind::NotFound,
        format!("no volume {named}"),
        "it was deleted, or the name is misspelt",
        "see `ashlar volume ls`",
    )
}

pub(super) fn not_in_bin(volume: &VolumeRef) -> Problem {
    let named = match volume {
        VolumeRef::Id(id) => format!("with id {}", id.0),
        VolumeRef::Name(name) => format!("named {name:?}"),
    };
    Problem::new(
        ProblemKind::NotFound,
        format!("no volume {named} in the bin"),
        "it was never deleted, or its time there is over",
        "see `ashlar volume ls --all`",
    )
}

pub(super) fn target_in_use(target: TargetId, why: &str, fix: &str) -> Problem {
    Problem::new(ProblemKind::InUse, format!("target {target} was not removed"), why, fix)
}

pub(super) fn held(volume: &str, holder: &str, exclusive: bool, left_ns: u64) -> Problem {
    let (how, end) =
        if exclusive { ("exclusively ", "its lease ends") } else { ("", "its lease ends, unless renewed,") };
    Problem::new(
        ProblemKind::InUse,
        format!("volume {volume:?} is attached {how}by {holder:?}"),
        format!("{end} in {} s", left_ns.div_ceil(1_000_000_000)),
        format!(
            "let it go: ashlar volume detach {volume} --holder {holder}; if that host is dead or cut off, attach with \
             --take-over: what it still sends is refused then"
        ),
    )
}

pub(super) fn not_attached(volume: &str, holder: &str, holders: &BTreeSet<String>) -> Problem {
    let cause = match holders.len() {
        0 => "nobody is attached to it by name".into(),
        _ => format!("those that are: {}", holders.iter().map(String::as_str).collect::<Vec<_>>().join(", ")),
    };
    Problem::new(
        ProblemKind::NotFound,
        format!("{holder:?} is not attached to volume {volume:?}"),
        cause,
        format!("see `ashlar volume show {volume}`"),
    )
}

pub(super) fn no_pool(name: &str, registered: usize, expected: u32) -> Problem {
    if name == super::POOL_DEFAULT && registered < expected as usize {
        return Problem::new(
            ProblemKind::NotReady,
            format!("pool {name:?} is not there yet"),
            format!("{registered} of {expected} targets have registered"),
            "start the other targets, or create a pool on those that are there",
        );
    }
    Problem::new(
        ProblemKind::NotFound,
        format!("no pool named {name:?}"),
        "the name is misspelt, or the pool was never created",
        "see `ashlar status` for the pools",
    )
}

pub(super) fn name_taken(noun: &str, name: &str, id: u32) -> Problem {
    Problem::new(
        ProblemKind::AlreadyExists,
        format!("a {noun} named {name:?} exists already, with id {id}"),
        "it was created before, perhaps by an attempt whose answer was lost",
        format!("use that {noun}, or another name"),
    )
}

pub(super) fn limit(what: String, most: usize) -> Problem {
    Problem::new(
        ProblemKind::Limit,
        what,
        format!("the limit is {most}"),
        "remove what is not needed, or use a second cluster",
    )
}

pub(super) fn invalid(what: impl Into<String>, cause: impl Into<String>, fix: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Invalid, what, cause, fix)
}

pub(super) fn wrong_cluster(target: TargetId, theirs: Uuid, ours: Uuid) -> Problem {
    Problem::new(
        ProblemKind::WrongCluster,
        format!("target {target} refused: its disk belongs to cluster {theirs}, this is {ours}"),
        "the target was given the address of another cluster's MDS, or the MDS lost its directory",
        "check the MDS address; to give up what is on the disk, format it with `ashlar target format`",
    )
}

pub(super) fn id_taken(target: TargetId, holder: Uuid, claimant: Uuid) -> Problem {
    Problem::new(
        ProblemKind::IdTaken,
        format!("target id {target} refused to disk {claimant}: disk {holder} holds it"),
        "two targets were given the same id, or a target was formatted anew",
        "give the new disk an id that was never used",
    )
}

pub(super) fn disk_taken(target: TargetId, holder: TargetId, disk: Uuid) -> Problem {
    Problem::new(
        ProblemKind::IdTaken,
        format!("target id {target} refused: disk {disk} is registered as target {holder}"),
        "the id in the target's configuration was changed, or its directory was copied",
        format!("set the id back to {}, or format the copy", holder.0),
    )
}

pub(super) fn no_target(target: TargetId) -> Problem {
    Problem::new(
        ProblemKind::NotFound,
        format!("no target with id {target}"),
        "it never registered, or it was removed",
        "see `ashlar target ls`",
    )
}

pub(super) fn unknown_target(target: TargetId) -> Problem {
    Problem::new(
        ProblemKind::UnknownTarget,
        format!("heartbeat of target {target} refused: it is not registered"),
        "the target was given the address of another cluster's MDS, or the MDS lost its directory",
        "the target registers again by itself; if this stays, check the MDS address",
    )
}

pub(super) fn exported(volume: VolumeId, name: &str) -> Problem {
    Problem::new(
        ProblemKind::InUse,
        format!("volume {name:?} ({volume}) is exported"),
        "hosts may be using it",
        format!("detach the hosts, then `ashlar export rm {name}`"),
    )
}

pub(super) fn no_space(pool: &str, capacity: u64, allocated: u64, wanted: u64) -> Problem {
    Problem::new(
        ProblemKind::NoSpace,
        format!("no space in pool {pool:?}: {wanted} bytes wanted, {allocated} of {capacity} allocated"),
        "the volumes that were written add up to the pool's capacity",
        "delete volumes, or add targets",
    )
}

pub(super) fn contradiction(what: &str) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("the MDS's records contradict each other: {what}"),
        "the database was altered by hand or by another version",
        "restore the MDS's directory from a copy; nothing was changed",
    )
}
