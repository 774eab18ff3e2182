//! The space that volumes take up on a target, as the MDS is told of it. Pure.

use protocol::control::pb;
use std::collections::BTreeMap;

/// What the MDS knows of the space that volumes take up here. Numbers are told when they change, and all
/// of them when the MDS has none yet; each is told whole, so that an answer may get lost.
#[derive(Debug, Default)]
pub(super) struct Space {
    known: BTreeMap<u32, pb::VolumeSlots>,
    told: BTreeMap<u32, pb::VolumeSlots>,
    is_based: bool,
}

impl Space {
    /// What the next heartbeat tells, and whether that is all.
    pub(super) fn tell(&mut self, shards: &[pb::ShardStatus]) -> (Vec<pb::VolumeSlots>, bool) {
        self.told.clear();
        for of in shards.iter().flat_map(|shard| &shard.volumes) {
            let sum = self.told.entry(of.volume).or_default();
            *sum = pb::VolumeSlots {
                volume: of.volume,
                held: sum.held.saturating_add(of.held),
                led: sum.led.saturating_add(of.led),
            };
        }
        if !self.is_based {
            return (self.told.values().copied().collect(), true);
        }
        let changed = self.told.values().filter(|of| self.known.get(&of.volume) != Some(of)).copied();
        let gone = self.known.keys().filter(|volume| !self.told.contains_key(volume));
        let gone = gone.map(|volume| pb::VolumeSlots { volume: *volume, ..Default::default() });
        (changed.chain(gone).collect(), false)
    }
    /// The heartbeat was answered.
    pub(super) fn taken(&mut self, wants_all: bool) {
        self.known = std::mem::take(&mut self.told);
        self.is_based = !wants_all;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(volume: u32, held: u32, led: u32) -> pb::VolumeSlots {
        pb::VolumeSlots { volume, held, led }
    }

    fn shards(of: &[&[pb::VolumeSlots]]) -> Vec<pb::ShardStatus> {
        of.iter().map(|v| pb::ShardStatus { volumes: v.to_vec(), ..Default::default() }).collect()
    }

    #[test]
    fn space_is_told_when_it_changes_and_again_until_it_is_answered() {
        let mut space = Space::default();
        let first = shards(&[&[slots(1, 2, 2), slots(2, 1, 0)], &[slots(1, 3, 0)]]);
        let all = vec![slots(1, 5, 2), slots(2, 1, 0)];
        assert_eq!(space.tell(&first), (all.clone(), true));
        assert_eq!(space.tell(&first), (all.clone(), true), "no answer came");
        space.taken(false);
        assert_eq!(space.tell(&first), (vec![], false));
        space.taken(false);
        let second = shards(&[&[slots(1, 2, 0)], &[slots(1, 3, 0)]]);
        let changed = (vec![slots(1, 5, 0), slots(2, 0, 0)], false);
        assert_eq!(space.tell(&second), changed);
        assert_eq!(space.tell(&second), changed, "the answer was lost");
        space.taken(true);
        assert_eq!(space.tell(&second), (vec![slots(1, 5, 0)], true), "an MDS that starts asks for all");
    }
}
