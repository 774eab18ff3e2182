//! Space that volumes take up, as targets report it with their heartbeats. In memory only: a new MDS
//! asks for it, and sums are kept while the numbers come, so that a list of volumes costs no more.

use super::State;
use super::schedule::Presence;
use crate::record::PoolId;
use protocol::types::{CHUNK_BYTES, TargetId, Time, VolumeId};
use std::collections::BTreeMap;

/// Chunk slots of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slots {
    /// In use, on whichever replica.
    pub held: u64,
    /// In use by leaders: each chunk once.
    pub led: u64,
}

/// Bytes of a volume, a pool or the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// As hosts see it.
    pub logical: u64,
    /// Of chunks that hold data, each counted once.
    pub allocated: u64,
    /// Of chunks that hold data, over all replicas.
    pub replicated: u64,
    /// Of segments that were ever written, each counted once: what a pool's capacity is held against.
    pub reserved: u64,
}

impl std::ops::AddAssign for Space {
    fn add_assign(&mut self, other: Self) {
        self.logical = self.logical.saturating_add(other.logical);
        self.allocated = self.allocated.saturating_add(other.allocated);
        self.replicated = self.replicated.saturating_add(other.replicated);
        self.reserved = self.reserved.saturating_add(other.reserved);
    }
}

/// What targets reported, and the sums.
#[derive(Debug, Default)]
pub(super) struct Reported {
    by_target: BTreeMap<TargetId, BTreeMap<VolumeId, Slots>>,
    sums: BTreeMap<VolumeId, Slots>,
}

impl Reported {
    /// Takes a report in; one of changes only is of no use before one of all.
    fn take(&mut self, target: TargetId, slots: BTreeMap<VolumeId, Slots>, whole: bool) {
        if whole {
            self.forget(target);
            self.by_target.insert(target, BTreeMap::new());
        }
        let Some(known) = self.by_target.get_mut(&target) else { return };
        for (volume, now) in slots {
            let before =
                if now == Slots::default() { known.remove(&volume) } else { known.insert(volume, now) };
            let (sum, before) = (self.sums.entry(volume).or_default(), before.unwrap_or_default());
            *sum = Slots { held: sum.held - before.held + now.held, led: sum.led - before.led + now.led };
            if *sum == Slots::default() {
                self.sums.remove(&volume);
            }
        }
    }
    /// What a target reported does not count any more.
    pub(super) fn forget(&mut self, target: TargetId) {
        let Some(known) = self.by_target.get(&target) else { return };
        let none = known.keys().map(|volume| (*volume, Slots::default())).collect();
        self.take(target, none, false);
        self.by_target.remove(&target);
    }
}

impl State {
    /// Takes in what a target reported. It may hold something of a volume that was purged since.
    pub(super) fn take_slots(&mut self, target: TargetId, mut slots: BTreeMap<VolumeId, Slots>, whole: bool) {
        slots.retain(|volume, now| *now == Slots::default() || self.volumes.contains_key(volume));
        self.space.take(target, slots, whole);
    }

    /// Whether a target is to report all of its space.
    pub fn wants_slots(&self, target: TargetId) -> bool {
        !self.space.by_target.contains_key(&target)
    }

    /// Replicas of a target that is offline are built elsewhere, and would be counted twice.
    pub(super) fn forget_space_of_offline(&mut self, now: Time) {
        let reported = self.space.by_target.keys().copied();
        let offline: Vec<TargetId> =
            reported.filter(|target| self.presence(*target, now) == Presence::Offline).collect();
        offline.into_iter().for_each(|target| self.space.forget(target));
    }

    /// What a volume takes up.
    pub fn space_of(&self, id: VolumeId) -> Space {
        let Some(record) = self.volumes.get(&id) else { return Space::default() };
        let slots = self.space.sums.get(&id).copied().unwrap_or_default();
        Space {
            logical: record.bytes,
            allocated: slots.led.saturating_mul(CHUNK_BYTES as u64),
            replicated: slots.held.saturating_mul(CHUNK_BYTES as u64),
            reserved: self.allocated.get(&id).map_or(0, |allocated| allocated.bytes_of(record)),
        }
    }

    /// What the volumes of a pool (or of all) take up; those in the bin and those being deleted too.
    pub fn space_of_pool(&self, pool: Option<PoolId>) -> Space {
        let mut sum = Space::default();
        let wanted = self.volumes.iter().filter(|(_, record)| pool.is_none_or(|pool| record.pool == pool));
        wanted.for_each(|(id, _)| sum += self.space_of(*id));
        sum
    }
}
