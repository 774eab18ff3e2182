//! Fences: what was asked under an epoch that a take-over of its volume has ended is refused.
//!
//! A fence is an entry of the copyset's log, so all its leaders agree on where in the order of writes it
//! stands. The rules, all kept by the leader:
//!
//! 1. A request under a lower epoch than any fence in the log, applied or not, is refused for good; a new leader
//!    knows those that it inherited.
//! 2. One under a higher epoch than the applied fence lets the leader propose a fence, and is told to come again:
//!    until that is applied, a write of the old epoch may still be on its way into the state that a read of the
//!    new one would see.
//! 3. A write is judged again when its turn to be proposed has come.
//!
//! Hence behind a fence in the log there is no write of a lower epoch, and whoever was answered under an epoch
//! is never overwritten by a lower one.

use super::Shard;
use protocol::map::VolumeEntry;
use protocol::peer::{IoOp, IoOutcome};
use protocol::raft::{Body, Fence, Fences};
use protocol::types::{CopysetId, LogIndex, SessionEpoch, VolumeId};

/// The fences of a copyset as its leader knows them; empty elsewhere.
#[derive(Default)]
pub struct Gate {
    applied: Fences,
    /// In the log and not applied, in order of index. A volume that is dropped is among them at epoch 0.
    pending: Vec<(LogIndex, Fence)>,
}

impl Gate {
    /// Of a new leader: what is applied, and the entries of its log that are not.
    pub fn new(applied: Fences, inherited: impl Iterator<Item = (LogIndex, Body)>) -> Self {
        let pending = inherited.filter_map(|(index, body)| Some((index, fence_of(body)?))).collect();
        Self { applied, pending }
    }
    /// Whether a request may be served: its epoch is that of the applied fence, and none higher is in the log.
    pub fn passes(&self, volume: VolumeId, epoch: SessionEpoch) -> bool {
        self.applied.of(volume) == epoch && (self.pending.is_empty() || self.newest(volume) == epoch)
    }
    /// Below this, requests are refused.
    pub fn newest(&self, volume: VolumeId) -> SessionEpoch {
        let pending = self.pending.iter().filter(|(_, fence)| fence.volume == volume);
        pending.map(|(_, fence)| fence.epoch).fold(self.applied.of(volume), SessionEpoch::max)
    }
    /// The leader has proposed this.
    pub fn proposed(&mut self, index: LogIndex, body: Body) {
        self.pending.extend(fence_of(body).map(|fence| (index, fence)));
    }
    /// Whether entries up to here change what is applied.
    pub fn awaits(&self, up_to: LogIndex) -> bool {
        self.pending.first().is_some_and(|(index, _)| *index <= up_to)
    }
    /// Entries up to here are applied, and have left this.
    pub fn reached(&mut self, up_to: LogIndex, applied: Fences) {
        self.pending.retain(|(index, _)| *index > up_to);
        self.applied = applied;
    }
}

fn fence_of(body: Body) -> Option<Fence> {
    match body {
        Body::Fence(fence) => Some(fence),
        Body::DropVolume { volume } => Some(Fence { volume, epoch: SessionEpoch(0) }),
        Body::Noop | Body::Write { .. } | Body::Zero { .. } | Body::Members(_) => None,
    }
}

/// The volume that a request is about.
pub fn volume_of(op: &IoOp) -> Option<VolumeId> {
    match op {
        IoOp::Read { chunk, .. }
        | IoOp::Write { chunk, .. }
        | IoOp::Zero { chunk, .. }
        | IoOp::Status { chunk, .. } => Some(chunk.volume),
        IoOp::Fence { volume } => Some(*volume),
        IoOp::WhoLeads => None,
    }
}

impl Shard {
    /// The answer to a request that the gate does not let pass; `asked` is what it would have as the fence.
    pub(super) fn barred(&mut self, id: CopysetId, asked: Fence, newest: SessionEpoch) -> IoOutcome {
        if asked.epoch < newest { self.fenced(newest) } else { self.raise_fence(id, asked) }
    }

    /// The answer to a write under another epoch than that of the newest fence, when its turn has come.
    pub(super) fn barred_write(&mut self, epoch: SessionEpoch, newest: SessionEpoch) -> IoOutcome {
        // Else the volume was dropped meanwhile.
        if epoch < newest { self.fenced(newest) } else { IoOutcome::Busy }
    }

    /// Whether the map says that a volume is being freed. Its id is never given out again.
    pub(super) fn is_deleted(&self, volume: VolumeId) -> bool {
        self.map.volumes.get(&volume).is_some_and(|VolumeEntry { deleted, .. }| *deleted)
    }

    pub(super) fn fenced(&mut self, epoch: SessionEpoch) -> IoOutcome {
        self.counts.fenced += 1;
        IoOutcome::Fenced { epoch }
    }

    /// Proposes a fence, unless one as high is on its way; the sender comes again.
    fn raise_fence(&mut self, id: CopysetId, fence: Fence) -> IoOutcome {
        if self.is_deleted(fence.volume) {
            return self.fenced(fence.epoch);
        }
        let room = self.store.can_propose(0);
        let Some(hosted) = self.hosted.get_mut(&id) else { return IoOutcome::UnknownCopyset };
        if room && hosted.gate.newest(fence.volume) < fence.epoch {
            let body = Body::Fence(fence);
            if let Ok(index) = hosted.replica.propose(body, self.now) {
                tracing::info!(copyset = id.0, volume = fence.volume.0, epoch = fence.epoch.0, "fence rises");
                hosted.gate.proposed(index, body);
            }
            self.touch(id);
        }
        IoOutcome::Busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeId = VolumeId(7);

    fn fence(epoch: u64) -> Fence {
        Fence { volume: V, epoch: SessionEpoch(epoch) }
    }
    fn fences(epoch: u64) -> Fences {
        let mut fences = Fences::default();
        fences.raise(fence(epoch));
        fences
    }

    #[test]
    fn a_fence_in_the_log_bars_the_old_epoch_at_once_and_lets_the_new_one_pass_when_it_is_applied() {
        let mut gate = Gate::new(fences(2), std::iter::empty());
        let passing = |gate: &Gate| (0..9).filter(|n| gate.passes(V, SessionEpoch(*n))).collect::<Vec<_>>();
        assert_eq!((passing(&gate), gate.newest(V)), (vec![2], SessionEpoch(2)));
        gate.proposed(LogIndex(9), Body::Fence(fence(3)));
        assert_eq!((passing(&gate), gate.newest(V)), (vec![], SessionEpoch(3)));
        assert!(gate.passes(VolumeId(8), SessionEpoch(0)), "another volume");
        assert!(!gate.awaits(LogIndex(8)) && gate.awaits(LogIndex(9)));
        gate.reached(LogIndex(9), fences(3));
        assert_eq!((passing(&gate), gate.newest(V)), (vec![3], SessionEpoch(3)));
        assert!(!gate.awaits(LogIndex(99)));
    }

    #[test]
    fn a_new_leader_knows_the_fences_that_it_inherited_and_has_not_applied() {
        let inherited = [
            (LogIndex(4), Body::Noop),
            (LogIndex(5), Body::Fence(fence(6))),
            (LogIndex(6), Body::DropVolume { volume: VolumeId(1) }),
        ];
        let gate = Gate::new(fences(2), inherited.into_iter());
        assert_eq!((gate.passes(V, SessionEpoch(2)), gate.newest(V)), (false, SessionEpoch(6)));
        assert!(gate.awaits(LogIndex(5)) && !gate.awaits(LogIndex(4)));
    }
}
