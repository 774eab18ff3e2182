//! What a target and the MDS have to tell each other. Pure: reports, maps and orders in, messages out;
//! the control thread carries them over gRPC, the simulator over its own network.
//!
//! Invariants: the map never goes back; a replica is freed only by a map that is on disk, so that no restart
//! takes an older one, which names it, for the newest.

use super::FromShard;
use super::space::Space;
use crate::shard::{Order, OrderKind};
use protocol::control::{limits, pb, shard_from_pb};
use protocol::map::ClusterMap;
use protocol::types::{CopysetId, LogIndex, MEMBERS_MAX, Span, TargetId, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A target as the MDS sees it.
#[derive(Debug)]
pub struct Agent {
    target: TargetId,
    disk: [u8; 16],
    shards: u16,
    map: Option<Arc<ClusterMap>>,
    /// Whether the map in force is on disk.
    is_kept: bool,
    /// By volume: the shards that freed it.
    freed: BTreeMap<VolumeId, BTreeSet<u16>>,
    /// Why each shard that refuses work does so.
    failed: BTreeMap<u16, String>,
    space: Space,
}

impl Agent {
    /// A target of so many shards on this disk, without a map.
    pub fn new(target: TargetId, disk: [u8; 16], shards: u16) -> Self {
        let (freed, failed) = (BTreeMap::new(), BTreeMap::new());
        Self { target, disk, shards, map: None, is_kept: false, freed, failed, space: Space::default() }
    }

    /// The map in force.
    pub fn map(&self) -> Option<&Arc<ClusterMap>> {
        self.map.as_ref()
    }

    /// Why each shard that refuses work does so.
    pub fn failed(&self) -> &BTreeMap<u16, String> {
        &self.failed
    }

    /// Whether a map is newer than the one in force.
    pub fn is_news(&self, map: &ClusterMap) -> bool {
        self.map.as_ref().is_none_or(|known| known.generation < map.generation)
    }

    /// Puts a newer map in force, which is on disk or could not be written. Shards are to be told of it next.
    pub fn adopt(&mut self, map: Arc<ClusterMap>, is_kept: bool) {
        assert!(self.is_news(&map), "the map never goes back");
        self.freed.retain(|volume, _| map.volumes.contains_key(volume));
        (self.map, self.is_kept) = (Some(map), is_kept);
    }

    /// The map in force, when it could not be written to disk: that is to be tried again.
    pub fn unkept(&self) -> Option<&Arc<ClusterMap>> {
        self.map.as_ref().filter(|_| !self.is_kept)
    }

    /// The map in force is on disk now.
    pub fn kept(&mut self) {
        self.is_kept = true;
    }

    /// Notes what a shard reports of itself.
    pub fn note(&mut self, shard: u16, report: &FromShard) {
        match report {
            FromShard::Freed { volume } => {
                self.freed.entry(*volume).or_default().insert(shard);
            }
            FromShard::Failed { why } => drop(self.failed.insert(shard, why.clone())),
            FromShard::FirstWrite { .. } | FromShard::NeedMap => {}
        }
    }

    /// The next heartbeat, from what the shards posted last.
    pub fn heartbeat(&mut self, shards: Vec<pb::ShardStatus>, capacity_bytes: u64) -> pb::HeartbeatRequest {
        let usage = usage_of(&shards, capacity_bytes);
        let (volumes, volumes_whole) = self.space.tell(&shards);
        let freed = self.freed.iter().filter(|(_, by)| by.len() == usize::from(self.shards));
        let attached = shards.iter().flat_map(|shard| shard.attached.iter().cloned());
        // Through several shards, told once.
        let attached: BTreeMap<_, _> = attached.map(|a| ((a.volume, a.epoch, a.holder.clone()), a)).collect();
        pb::HeartbeatRequest {
            attached: attached.into_values().take(limits::ATTACHED_MAX).collect(),
            target: self.target.0,
            disk_uuid: self.disk.to_vec(),
            known_generation: self.map.as_ref().map_or(0, |map| map.generation),
            usage: Some(usage),
            freed_volumes: freed.map(|(volume, _)| volume.0).collect(),
            failed_shards: self.failed.keys().map(|shard| u32::from(*shard)).collect(),
            replicas: shards.into_iter().flat_map(|shard| shard.replicas).collect(),
            volumes,
            volumes_whole,
        }
    }

    /// The last heartbeat was answered; the next one is to tell the space of all volumes, or what changes.
    pub fn answered(&mut self, wants_volumes: bool) {
        self.space.taken(wants_volumes);
    }

    /// What the shards are to do, by the answer to a heartbeat that was sent at `sent`. Orders go to all shards,
    /// each of which knows what it holds. One that is lost comes again.
    pub fn orders(&self, wanted: &[pb::Order], sent: Time) -> Vec<Order> {
        let orders = wanted.iter().filter_map(|wanted| order(wanted, sent));
        orders.filter(|order| self.is_kept || !matches!(order.what, OrderKind::Drop { .. })).collect()
    }
}

/// Space over all shards.
pub(super) fn usage_of(shards: &[pb::ShardStatus], capacity_bytes: u64) -> pb::Usage {
    let mut sum = pb::Usage { capacity_bytes, ..pb::Usage::default() };
    for usage in shards.iter().filter_map(|shard| shard.usage.as_ref()) {
        sum.used_bytes += usage.used_bytes;
        sum.formatted_bytes += usage.formatted_bytes;
    }
    sum
}

/// `None` for one that makes no sense, or that this version does not know.
fn order(wanted: &pb::Order, sent: Time) -> Option<Order> {
    use pb::order::What;
    let what = match wanted.what.as_ref()? {
        What::HostOnShard(shard) => OrderKind::Host { shard: u16::try_from(*shard).ok()? },
        What::Voters(voters) if voters.members.len() > MEMBERS_MAX => return None,
        What::Voters(voters) => {
            let members: Result<Vec<_>, _> = voters.members.iter().map(shard_from_pb).collect();
            OrderKind::Voters(members.ok().filter(|members| !members.is_empty())?)
        }
        What::Lead(target) => OrderKind::Lead(TargetId(*target)),
        What::DropAfter(index) => OrderKind::Drop { after: LogIndex(*index) },
    };
    let until = sent + Span::ms(wanted.valid_ms.into());
    Some(Order { copyset: CopysetId(wanted.copyset), what, until })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(generation: u64) -> Arc<ClusterMap> {
        Arc::new(ClusterMap { generation, ..ClusterMap::default() })
    }

    #[test]
    fn nothing_is_freed_by_a_map_that_is_not_on_disk() {
        let mut agent = Agent::new(TargetId(1), [1; 16], 1);
        let order = |what| pb::Order { copyset: 1, what: Some(what), valid_ms: 10 };
        let wanted = [order(pb::order::What::DropAfter(7)), order(pb::order::What::Lead(2))];
        agent.adopt(map(1), false);
        let taken = agent.orders(&wanted, Time(5));
        assert!(matches!(&taken[..], [Order { what: OrderKind::Lead(TargetId(2)), .. }]), "{taken:?}");
        assert_eq!(agent.unkept(), Some(&map(1)), "it is tried again");
        agent.kept();
        assert_eq!(agent.orders(&wanted, Time(5)).len(), 2);
        agent.adopt(map(2), true);
        assert_eq!((agent.orders(&wanted, Time(5)).len(), agent.unkept()), (2, None));
        assert!(!agent.is_news(&map(2)) && !agent.is_news(&map(1)));
    }

    #[test]
    fn a_volume_is_freed_when_every_shard_said_so() {
        let mut agent = Agent::new(TargetId(1), [1; 16], 2);
        let freed = |agent: &mut Agent| agent.heartbeat(Vec::new(), 0).freed_volumes;
        agent.note(0, &FromShard::Freed { volume: VolumeId(3) });
        agent.note(0, &FromShard::Freed { volume: VolumeId(3) });
        assert!(freed(&mut agent).is_empty());
        agent.note(1, &FromShard::Freed { volume: VolumeId(3) });
        assert_eq!(freed(&mut agent), [3]);
        agent.adopt(map(1), true);
        assert!(freed(&mut agent).is_empty(), "the map does not list it any more");
    }
}
