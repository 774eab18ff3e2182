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
        self.check_free("volume", &name)?;
        check_volume_size(bytes, block_bytes)?;
        let (pool, record) = self.find_pool(pool)?;
        if self.volumes.len() >= limits::VOLUMES_MAX || self.counters.next_volume == u32::MAX {
            return Err(error::limit(format!("volume {name:?} refused"), limits::VOLUMES_MAX));
        }
        let mut counters = self.next_generation();
        let id = VolumeId(counters.next_volume);
        counters.next_volume += 1;
        let copysets = copysets_for(id, record);
        let (deleted, purge_at_s) = (false, None);
        let record = VolumeRecord { name, bytes, block_bytes, pool, copysets, deleted, purge_at_s };
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
        let (capacity, held) = (self.pool_capacity(pool), self.pool_reserved(record.pool));
        if wanted > 0 && held.saturating_add(wanted) > capacity {
            return Err(error::no_space(&pool.name, capacity, held, wanted));
        }
        let changes = vec![Change::Volume(id, grown), Change::Counters(self.next_generation())];
        Ok(Decision { changes, reply: Reply::Volume(id) })
    }

    pub(super) fn delete_volume(
        &self,
        volume: &VolumeRef,
        purge_at_s: Option<u64>,
    ) -> Result<Decision, Problem> {
        let (id, record) = self.find_volume(volume)?;
        if record.deleted || (purge_at_s.is_some() && purge_at_s == record.purge_at_s) {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        }
        if self.exports.keys().any(|(exported, _)| *exported == id) {
            return Err(error::exported(id, &record.name));
        }
        let record = VolumeRecord { deleted: purge_at_s.is_none(), purge_at_s, ..record.clone() };
        Ok(self.volume_changed(id, record))
    }

    fn volume_changed(&self, id: VolumeId, record: VolumeRecord) -> Decision {
        let changes = vec![Change::Volume(id, record), Change::Counters(self.next_generation())];
        Decision { changes, reply: Reply::Volume(id) }
    }

    /// Deletes what is due in the bin.
    pub(super) fn purge(&self, unix_s: u64) -> Vec<Change> {
        let due =
            self.volumes.iter().filter(|(_, v)| !v.deleted && v.purge_at_s.is_some_and(|at| at <= unix_s));
        let deleted =
            |record: &VolumeRecord| VolumeRecord { deleted: true, purge_at_s: None, ..record.clone() };
        let mut changes: Vec<Change> = due.map(|(id, record)| Change::Volume(*id, deleted(record))).collect();
        if !changes.is_empty() {
            changes.push(Change::Counters(self.next_generation()));
        }
        changes
    }

    pub(super) fn undelete_volume(&self, volume: &VolumeRef, name: String) -> Result<Decision, Problem> {
        let binned =
            |(_, record): &(&VolumeId, &VolumeRecord)| !record.deleted && record.purge_at_s.is_some();
        let meant = |(id, record): &(&VolumeId, &VolumeRecord)| match volume {
            VolumeRef::Id(wanted) => *id == wanted,
            VolumeRef::Name(wanted) => record.name == *wanted,
        };
        let found = self.volumes.iter().filter(binned).filter(meant);
        let Some((id, record)) = found.max_by_key(|(id, record)| (record.purge_at_s, **id)) else {
            return Err(error::not_in_bin(volume));
        };
        let name = if name.is_empty() { record.name.clone() } else { name };
        self.check_free("volume", &name)?;
        Ok(self.volume_changed(*id, VolumeRecord { name, purge_at_s: None, ..record.clone() }))
    }

    pub(super) fn rename_volume(&self, volume: &VolumeRef, name: String) -> Result<Decision, Problem> {
        let (id, record) = self.find_live(volume)?;
        if record.name == name {
            return Ok(Decision::unchanged(Reply::Volume(id)));
        }
        self.check_free("volume", &name)?;
        // Hosts find it by its name, which is part of the subsystem's over NVMe.
        if self.exports.keys().any(|(exported, _)| *exported == id) {
            return Err(error::exported(id, &record.name));
        }
        Ok(self.volume_changed(id, VolumeRecord { name, ..record.clone() }))
    }

    /// Whether a volume may be called so.
    fn check_free(&self, noun: &str, name: &str) -> Result<(), Problem> {
        check_name(noun, name)?;
        self.names.get(name).map_or(Ok(()), |id| Err(error::name_taken(noun, name, id.0)))
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
        let (capacity, held) = (self.pool_capacity(pool), self.pool_reserved(volume.pool));
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

    pub(super) fn find_live(&self, volume: &VolumeRef) -> Result<(VolumeId, &VolumeRecord), Problem> {
        let (id, record) = self.find_volume(volume)?;
        if record.is_live() { Ok((id, record)) } else { Err(error::no_volume(volume)) }
    }
}

/// All copysets of the pool, or as many as a volume may have; which ones and which first turns
/// with the volume's id, so that the first chunks of all volumes are not on one copyset.
fn copysets_for(id: VolumeId, pool: &PoolRecord) -> Vec<CopysetId> {
    let count = pool.copysets.len();
    let start = id.0 as usize % count;
    (0..count.min(limits::VOLUME_COPYSETS_MAX)).map(|at| pool.copysets[(start + at) % count]).collect()
}
