//! Volumes: created, grown, allocated, offered, deleted.

use super::{Change, Decision, POOL_DEFAULT, Reply, State, VolumeRef, error};
use crate::record::{AllowedHosts, PoolId, PoolRecord, VolumeRecord};
use protocol::control::{Problem, ProblemKind, check_name, check_volume_size, limits};
use protocol::map::ExportProtocol;
use protocol::types::{CopysetId, VolumeId};

impl State {
    pub(super) fn create_volume(
        &self,
        name: String,
        bytes: u64,
        block_bytes: u32,
        pool: &str,
    ) -> Result<Decision, Problem> {
        check_name("volume", &name)?;
        check_volume_size(bytes, block_bytes)?;
        if let Some(id) = self.names.get(&name) {
            return Err(error::name_taken("volume", &name, id.0));
        }
        let (pool, record) = self.find_pool(pool)?;
        if self.volumes.len() >= limits::VOLUMES_MAX || self.counters.next_volume == u32::MAX {
            return Err(error::limit(format!("volume {name:?} refused"), limits::VOLUMES_MAX));
        }
        let mut counters = self.next_generation();
        let id = VolumeId(counters.next_volume);
        counters.next_volume += 1;
        let copysets = copysets_for(id, record);
        let record = VolumeRecord { name, bytes, block_bytes, pool, copysets, deleted: false };
        let changes = vec![Change::Volume(id, record), Change::Counters(counters)];
        Ok(Decision { changes, reply: Reply::Volume(id) })
    }

    fn find_pool(&self, name: &str) -> Result<(PoolId, &PoolRecord), Problem> {
        let name = if name.is_empty() { POOL_DEFAULT } else { name };
        let found = self.pools.iter().find(|(_, pool)| pool.name == name).map(|(id, pool)| (*id, pool));
        let expected = self.policy.targets_expected.max(self.policy.replicas);
        found.ok_or_else(|| error::no_pool(name, self.targets.len(), expected))
    }

    pub(super) fn resize_volume(&self, volume: &VolumeRef, bytes: u64) -> Result<Decision, Problem> {
        let (id, record) = self.find_live(volume)?;
        check_volume_size(bytes, record.block_bytes)?;
        if bytes < record.bytes {
            return Err(error::invalid(
                format!("volume {:?} was not made smaller", record.name),
                format!("it has {} bytes, and what lies beyond {bytes} would be lost", record.bytes),
                "volumes only grow; create a smaller one and copy what is needed",
            ));
        }
        if bytes == record.bytes {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        }
        let grown = VolumeRecord { bytes, ..record.clone() };
        // A last segment that was short and is written takes up more from now on.
        let allocated = self.allocation(id);
        let wanted = allocated.bytes_of(&grown) - allocated.bytes_of(record);
        let pool = &self.pools[&record.pool];
        let (capacity, held) = (self.pool_capacity(pool), self.pool_allocated(record.pool));
        if wanted > 0 && held.saturating_add(wanted) > capacity {
            return Err(error::no_space(&pool.name, capacity, held, wanted));
        }
        let changes = vec![Change::Volume(id, grown), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Volume(id) })
    }

    pub(super) fn delete_volume(&self, volume: &VolumeRef) -> Result<Decision, Problem> {
        let (id, record) = self.find_volume(volume)?;
        if record.deleted {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        }
        if self.exports.keys().any(|(exported, _)| *exported == id) {
            return Err(error::exported(id, &record.name));
        }
        let record = VolumeRecord { deleted: true, ..record.clone() };
        let changes = vec![Change::Volume(id, record), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Volume(id) })
    }

    pub(super) fn allocate(&self, id: VolumeId, segments: &[u32]) -> Result<Decision, Problem> {
        let (_, volume) = self.find_live(&VolumeRef::Id(id))?;
        if let Some(beyond) = segments.iter().find(|segment| **segment >= volume.segments()) {
            return Err(error::invalid(
                format!("segment {beyond} of volume {:?} refused", volume.name),
                format!("the volume has {}", volume.segments()),
                "use an index below that; both ends must know the same size of the volume",
            ));
        }
        let mut allocated = self.allocation(id);
        let new = |segment: &&u32| allocated.insert(**segment);
        let wanted: u64 = segments.iter().filter(new).map(|segment| volume.segment_bytes(*segment)).sum();
        let bytes = allocated.bytes_of(volume);
        if wanted == 0 {
            return Ok(Decision::unchanged(Reply::Allocated(bytes)));
        }
        let pool = &self.pools[&volume.pool];
        let (capacity, held) = (self.pool_capacity(pool), self.pool_allocated(volume.pool));
        if held.saturating_add(wanted) > capacity {
            return Err(error::no_space(&pool.name, capacity, held, wanted));
        }
        Ok(Decision { changes: vec![Change::Allocated(id, allocated)], reply: Reply::Allocated(bytes) })
    }

    pub(super) fn add_export(
        &self,
        volume: &VolumeRef,
        protocol: ExportProtocol,
        allowed: Option<AllowedHosts>,
    ) -> Result<Decision, Problem> {
        let (id, _) = self.find_live(volume)?;
        if allowed.is_some() && protocol != ExportProtocol::Nvme {
            return Err(error::invalid(
                "a list of hosts was refused",
                format!("clients of {protocol:?} do not tell who they are"),
                "name hosts with `--protocol nvme` only",
            ));
        }
        let before = self.exports.get(&(id, protocol));
        let Some(allowed) = allowed.or(if before.is_none() { Some(AllowedHosts::new()) } else { None })
        else {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        };
        if before == Some(&allowed) {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        }
        let held: usize = self.exports.values().map(AllowedHosts::len).sum();
        if held - before.map_or(0, AllowedHosts::len) + allowed.len() > limits::ALLOWED_HOSTS_ALL_MAX {
            return Err(error::limit("more allowed hosts refused".into(), limits::ALLOWED_HOSTS_ALL_MAX));
        }
        let changes = vec![Change::Export((id, protocol), allowed), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Volume(id) })
    }

    pub(super) fn remove_export(
        &self,
        volume: &VolumeRef,
        protocol: ExportProtocol,
    ) -> Result<Decision, Problem> {
        let (id, record) = self.find_live(volume)?;
        if !self.exports.contains_key(&(id, protocol)) {
            return Err(Problem::new(
                ProblemKind::NotFound,
                format!("volume {:?} is not exported over {protocol:?}", record.name),
                "the export was removed before, or the protocol is another",
                "see `ashlar export ls`",
            ));
        }
        let changes = vec![Change::ExportRemoved((id, protocol)), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Done })
    }

    fn find_live(&self, volume: &VolumeRef) -> Result<(VolumeId, &VolumeRecord), Problem> {
        let (id, record) = self.find_volume(volume)?;
        if record.deleted { Err(error::no_volume(volume)) } else { Ok((id, record)) }
    }
}

/// All copysets of the pool, or as many as a volume may have; which ones and which first turns
/// with the volume's id, so that the first chunks of all volumes are not on one copyset.
fn copysets_for(id: VolumeId, pool: &PoolRecord) -> Vec<CopysetId> {
    let count = pool.copysets.len();
    let start = id.0 as usize % count;
    (0..count.min(limits::VOLUME_COPYSETS_MAX)).map(|at| pool.copysets[(start + at) % count]).collect()
}
