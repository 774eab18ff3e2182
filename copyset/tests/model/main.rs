//! Every order of events of a small copyset. The replicas are those of production ([`ashlar_copyset::Replica`]),
//! not a model of them.
//!
//! Three replicas; each pair is joined by two links that deliver in order, as TCP does. At any time a
//! message may arrive, all that is on a link may be lost (`resets_max` times), a replica may find that it
//! hears no leader, a leader may take a proposal, a replica may be killed (`crashes_max` times). Looked at in
//! every state: at most one leader a term, logs that match, what is committed stays, and no
//! majority would elect anybody who lacks some of it.
//!
//! So that all of it can be walked: time does not pass (a time-out may come whenever, and nobody is bound
//! to a leader that it heard, which is the worst that clocks can do; leases and reads are not looked at); disks
//! are done at once; beats are lost; a pre-vote is asked of one other, who answers in the same step; states that differ only by who is who are one, and a state is known by 64
//! bits. What is left out is for the simulations, which walk a part of it only: disks that take their time,
//! memberships, catch-up by chunk, hand-over.
//!
//! `ASHLAR_LONG=1 cargo test --profile sim -p ashlar-copyset --test model -- --nocapture` walks further;
//! docs/testing.md has the figures.

// The crate may not touch its surroundings; its tests read variables and the clock.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod world;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Instant;
use world::{Disk, SIGHTS, Step, Walk, World};

const SMALL: Walk = Walk { terms_max: 2, entries_max: 2, resets_max: 0, crashes_max: 0, disk: Disk::Sound };

/// Terms, entries, resets, crashes.
const FURTHER: [[u64; 4]; 4] = [[3, 2, 0, 0], [2, 2, 1, 1], [2, 3, 1, 0], [2, 3, 0, 1]];

/// Where a walk came.
#[derive(Default)]
struct Walked {
    steps: u64,
    states: usize,
    depth_max: usize,
    sights: [bool; SIGHTS.len()],
    broken: Option<&'static str>,
}

/// All states, the deepest first: what lies ahead stays short.
fn walk(walk: &Walk) -> Walked {
    let start = Instant::now();
    let mut known: HashSet<u64> = HashSet::new();
    let mut seen = Walked::default();
    let mut ahead = vec![(World::new(walk), 0)];
    let mut steps = Vec::new();
    while let Some((world, depth)) = ahead.pop() {
        seen.depth_max = seen.depth_max.max(depth);
        steps.clear();
        walk.steps(&world, &mut steps);
        for next in steps.drain(..).filter_map(|step| walk.after(&world, step)) {
            seen.steps += 1;
            if known.insert(next.digest()) {
                for (seen, here) in seen.sights.iter_mut().zip(next.sights(walk)) {
                    *seen |= here;
                }
                if let Some(promise) = next.broken() {
                    seen.broken = Some(promise);
                    return seen;
                }
                ahead.push((next, depth + 1));
            }
        }
    }
    seen.states = known.len();
    println!(
        "model: {walk:?}: {} states by {} steps, at most {} deep, {:.1} s",
        seen.states,
        seen.steps,
        seen.depth_max,
        start.elapsed().as_secs_f32()
    );
    seen
}

/// The shortest way to a broken promise.
fn shortest(walk: &Walk) -> Option<Vec<Step>> {
    let mut ways: Vec<(usize, Step)> = Vec::new();
    let mut known: HashSet<u64> = HashSet::new();
    let mut ahead = VecDeque::from([(World::new(walk), usize::MAX)]);
    let mut steps = Vec::new();
    while let Some((world, at)) = ahead.pop_front() {
        if world.broken().is_some() {
            let mut way: Vec<Step> = std::iter::successors(ways.get(at), |(before, _)| ways.get(*before))
                .map(|(_, s)| *s)
                .collect();
            way.reverse();
            return Some(way);
        }
        walk.steps(&world, &mut steps);
        for step in steps.drain(..) {
            if let Some(next) = walk.after(&world, step)
                && known.insert(next.digest())
            {
                ways.push((at, step));
                ahead.push_back((next, ways.len() - 1));
            }
        }
    }
    None
}

/// Walks all of it; what is found wrong is looked for again by breadth, so that the way there is short.
fn check(bounds: Walk) {
    let seen = walk(&bounds);
    let Some(promise) = seen.broken else {
        let lacking: Vec<_> = SIGHTS.iter().zip(seen.sights).filter(|(_, seen)| !seen).collect();
        assert!(lacking.is_empty(), "{bounds:?} went nowhere: {lacking:?}");
        return;
    };
    let mut world = World::new(&bounds);
    for step in shortest(&bounds).expect("it was found before") {
        println!("{step:?}");
        world = bounds.after(&world, step).expect("it was taken before");
        println!("{world:?}");
    }
    panic!("broken: {promise}, {bounds:?}; the way there is above");
}

#[test]
fn two_terms_and_three_entries_break_no_promise() {
    check(Walk { entries_max: 3, ..SMALL });
}

#[test]
fn a_link_that_is_reset_breaks_no_promise() {
    check(Walk { resets_max: 1, ..SMALL });
}

#[test]
fn a_replica_that_is_killed_breaks_no_promise() {
    check(Walk { crashes_max: 1, ..SMALL });
}

/// Minutes, or what `ASHLAR_WALK=terms,entries,resets,crashes` says.
#[test]
fn walks_that_go_further_break_no_promise() {
    let walk = |numbers: [u64; 4]| {
        let [terms_max, entries_max, resets, crashes] = numbers;
        check(Walk { terms_max, entries_max, resets_max: resets as u8, crashes_max: crashes as u8, ..SMALL });
    };
    if let Ok(text) = std::env::var("ASHLAR_WALK") {
        let numbers: Vec<u64> = text.split(',').map(|n| n.parse().expect("a number")).collect();
        walk(numbers.try_into().expect("terms,entries,resets,crashes"));
    } else if std::env::var_os("ASHLAR_LONG").is_some() {
        FURTHER.into_iter().for_each(walk);
    } else {
        println!("SKIPPED: it takes minutes, ASHLAR_LONG=1 asks for it");
    }
}

/// The walk finds what it is there for.
#[test]
fn a_disk_that_forgets_votes_is_found_out() {
    let seen = walk(&Walk { crashes_max: 1, disk: Disk::ForgetsVotes, ..SMALL });
    assert_eq!(seen.broken, Some("a term has one leader at most"));
}

#[test]
fn a_disk_that_forgets_entries_is_found_out() {
    let seen = walk(&Walk { crashes_max: 1, disk: Disk::ForgetsEntries, ..SMALL });
    assert_eq!(seen.broken, Some("nobody can be elected without what is committed"));
}

/// If the digest left out what matters, states would be taken for known that are not.
#[test]
fn states_of_one_digest_go_on_alike() {
    let walk = Walk { crashes_max: 1, resets_max: 1, entries_max: 1, ..SMALL };
    let mut known: HashMap<u64, BTreeSet<u64>> = HashMap::new();
    let mut ahead = vec![World::new(&walk)];
    let (mut again, mut steps) = (0, Vec::new());
    while let Some(world) = ahead.pop() {
        walk.steps(&world, &mut steps);
        let next: Vec<World> = steps.drain(..).filter_map(|step| walk.after(&world, step)).collect();
        let digests = next.iter().map(World::digest).collect();
        match known.get(&world.digest()) {
            Some(first) => {
                assert_eq!(*first, digests, "goes on otherwise than another of this digest: {world:?}");
                again += 1;
            }
            None => {
                known.insert(world.digest(), digests);
                ahead.extend(next);
            }
        }
    }
    println!("model: {} states, {again} came again by another way", known.len());
    assert!(again > known.len());
}
