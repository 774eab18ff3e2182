//! Where the replicas of new copysets go. Pure and deterministic: the same input gives the same places.
//!
//! Invariants: the replicas of a copyset are on distinct targets; starting from none, replica
//! counts of any two targets differ by at most 1, and so do those of two shards of one target.
//! Leaders (first members) are spread as evenly as the replicas allow. Deliberately absent: zones
//! and hosts, and moving what is already placed.

use protocol::types::{ShardAddr, TargetId};

/// A target that may take replicas, with what it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The target.
    pub target: TargetId,
    /// Replicas on each of its shards; never empty.
    pub shards: Vec<u32>,
    /// Copysets of which it is the first member.
    pub leads: u32,
}

impl Candidate {
    /// A target of so many shards that holds nothing.
    pub fn empty(target: TargetId, shards: usize) -> Self {
        Self { target, shards: vec![0; shards], leads: 0 }
    }
    fn replicas(&self) -> u32 {
        self.shards.iter().sum()
    }
}

/// Members for `copysets` new copysets of `replicas` each, the one meant to lead first; `None`
/// when there are fewer targets than replicas, or a target without a shard.
pub fn place(
    mut candidates: Vec<Candidate>,
    replicas: usize,
    copysets: usize,
) -> Option<Vec<Vec<ShardAddr>>> {
    if replicas == 0 || candidates.len() < replicas || candidates.iter().any(|c| c.shards.is_empty()) {
        return None;
    }
    candidates.sort_by_key(|c| c.target);
    let mut pairs = Pairs::new(candidates.len());
    Some((0..copysets).map(|_| place_one(&mut candidates, &mut pairs, replicas)).collect())
}

fn place_one(candidates: &mut [Candidate], pairs: &mut Pairs, replicas: usize) -> Vec<ShardAddr> {
    let mut chosen: Vec<usize> = Vec::with_capacity(replicas);
    while chosen.len() < replicas {
        let next = (0..candidates.len())
            .filter(|at| !chosen.contains(at))
            // Fewest replicas first; among equals whoever met the chosen ones least, so that
            // copysets scatter over many sets of targets and a lost target is rebuilt by many.
            .min_by_key(|at| (candidates[*at].replicas(), pairs.met(*at, &chosen), *at))
            .expect("there are at least as many candidates as replicas");
        chosen.push(next);
    }
    pairs.note(&chosen);
    let leader = (0..replicas)
        .min_by_key(|at| (candidates[chosen[*at]].leads, chosen[*at]))
        .expect("a copyset has at least one replica");
    chosen.swap(0, leader);
    candidates[chosen[0]].leads += 1;
    chosen.iter().map(|at| take_shard(&mut candidates[*at])).collect()
}

fn take_shard(candidate: &mut Candidate) -> ShardAddr {
    let shard = (0..candidate.shards.len())
        .min_by_key(|at| (candidate.shards[*at], *at))
        .expect("a candidate has at least one shard");
    candidate.shards[shard] += 1;
    ShardAddr { target: candidate.target, shard: shard as u16 }
}

/// How often two candidates share a copyset.
struct Pairs {
    width: usize,
    counts: Vec<u32>,
}

impl Pairs {
    fn new(width: usize) -> Self {
        Self { width, counts: vec![0; width * width] }
    }
    fn met(&self, at: usize, chosen: &[usize]) -> u32 {
        chosen.iter().map(|other| self.counts[at * self.width + other]).sum()
    }
    fn note(&mut self, chosen: &[usize]) {
        for a in chosen {
            for b in chosen {
                self.counts[a * self.width + b] += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn spread(counts: impl Iterator<Item = u32> + Clone) -> u32 {
        counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
    }

    fn fresh(shards: &[usize]) -> Vec<Candidate> {
        let numbered = shards.iter().enumerate();
        numbered.map(|(at, shards)| Candidate::empty(TargetId(at as u32 + 1), *shards)).collect()
    }

    proptest! {
        #[test]
        fn replicas_are_apart_and_even(
            shards in proptest::collection::vec(1usize..5, 1..12),
            replicas in 1usize..6,
            copysets in 0usize..80,
        ) {
            let placed = place(fresh(&shards), replicas, copysets);
            prop_assert_eq!(placed.is_some(), shards.len() >= replicas);
            let Some(placed) = placed else { return Ok(()) };
            prop_assert_eq!(placed.len(), copysets);
            let mut a_target: BTreeMap<TargetId, u32> = fresh(&shards).iter().map(|c| (c.target, 0)).collect();
            let mut a_shard: BTreeMap<ShardAddr, u32> = BTreeMap::new();
            for (at, count) in shards.iter().enumerate() {
                for shard in 0..*count as u16 {
                    a_shard.insert(ShardAddr { target: TargetId(at as u32 + 1), shard }, 0);
                }
            }
            for members in &placed {
                prop_assert_eq!(members.len(), replicas);
                let distinct: BTreeSet<TargetId> = members.iter().map(|m| m.target).collect();
                prop_assert_eq!(distinct.len(), replicas, "two replicas share a target");
                for member in members {
                    *a_target.get_mut(&member.target).unwrap() += 1;
                    *a_shard.get_mut(member).expect("a shard that exists") += 1;
                }
            }
            prop_assert!(spread(a_target.values().copied()) <= 1, "{:?}", a_target);
            for target in a_target.keys() {
                let of = a_shard.iter().filter(|(s, _)| s.target == *target).map(|(_, n)| *n);
                prop_assert!(spread(of) <= 1, "{:?}", a_shard);
            }
        }

        #[test]
        fn the_order_of_candidates_does_not_matter(
            shards in proptest::collection::vec(1usize..4, 3..8),
            seed in any::<u64>(),
        ) {
            let forward = fresh(&shards);
            let mut turned = forward.clone();
            turned.rotate_left(seed as usize % shards.len());
            prop_assert_eq!(place(forward, 3, 20), place(turned, 3, 20));
        }

        #[test]
        fn what_is_there_already_is_filled_up_first(loads in proptest::collection::vec(0u32..20, 4..8)) {
            let mut candidates = fresh(&vec![1; loads.len()]);
            for (candidate, load) in candidates.iter_mut().zip(&loads) {
                candidate.shards[0] = *load;
            }
            // Enough to level any start.
            let placed = place(candidates, 3, 20 * loads.len()).unwrap();
            let mut totals = loads.clone();
            for member in placed.iter().flatten() {
                totals[member.target.0 as usize - 1] += 1;
            }
            prop_assert!(spread(totals.iter().copied()) <= 1, "{:?}", totals);
        }
    }

    #[test]
    fn leaders_of_a_dev_cluster_are_even() {
        let placed = place(fresh(&[1, 1, 1]), 3, 12).unwrap();
        for target in 1..=3 {
            assert_eq!(placed.iter().filter(|m| m[0].target.0 == target).count(), 4);
        }
    }

    #[test]
    fn copysets_scatter_over_many_sets_of_targets() {
        let placed = place(fresh(&[1; 6]), 3, 20).unwrap();
        let sets: BTreeSet<BTreeSet<TargetId>> =
            placed.iter().map(|members| members.iter().map(|m| m.target).collect()).collect();
        assert!(sets.len() >= 8, "{} sets", sets.len());
    }
}
