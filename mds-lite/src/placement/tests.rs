//! Hazards of placement: replicas that die together, targets that fill up first, and data that moves for
//! nothing.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn fresh(shards: &[usize]) -> Vec<Node> {
    let numbered = shards.iter().enumerate();
    numbered.map(|(at, shards)| Node::empty(TargetId(at as u32 + 1), *shards)).collect()
}

fn wanted(replicas: usize, copysets: usize) -> Wanted {
    Wanted { replicas, copysets, scatter_max: SCATTER_MAX }
}

fn spread(counts: impl Iterator<Item = u32> + Clone) -> u32 {
    counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
}

/// Targets in zones and on hosts, some of them without names, of weights that differ by up to 8 times.
fn topology() -> impl Strategy<Value = Vec<Node>> {
    let target = (0u8..6, 0u8..8, 1u64..=8, 1usize..4);
    proptest::collection::vec(target, 1..24).prop_map(|targets| {
        let node = |(at, (zone, host, weight, shards)): (usize, (u8, u8, u64, usize))| {
            let name = |kind: &str, n: u8| if n == 0 { String::new() } else { format!("{kind}{n}") };
            let target = TargetId(at as u32 + 1);
            let (zone, host) = (name("z", zone), name("h", host));
            Node { zone, host, weight, ..Node::empty(target, shards) }
        };
        targets.into_iter().enumerate().map(node).collect()
    })
}

/// What each target should hold: in proportion to weight, but no domain more than one replica of each
/// copyset.
fn ideal(nodes: &[Node], domain: Domain, replicas: usize, copysets: usize) -> BTreeMap<TargetId, f64> {
    let mut domains: Vec<Vec<&Node>> = Vec::new();
    for node in nodes {
        match domains.iter_mut().find(|d| !d[0].is_apart(node, domain)) {
            Some(domain) => domain.push(node),
            None => domains.push(vec![node]),
        }
    }
    let weight = |d: &Vec<&Node>| d.iter().map(|n| n.weight as f64).sum::<f64>();
    let (mut shares, mut left) = (vec![0.0; domains.len()], (replicas * copysets) as f64);
    let mut open: Vec<usize> = (0..domains.len()).collect();
    loop {
        let all: f64 = open.iter().map(|at| weight(&domains[*at])).sum();
        let share = |at: usize| left * weight(&domains[at]) / all;
        let full: Vec<usize> =
            open.iter().copied().filter(|at| share(*at) > copysets as f64 + 1e-9).collect();
        if full.is_empty() {
            open.iter().for_each(|at| shares[*at] = share(*at));
            break;
        }
        for at in full {
            shares[at] = copysets as f64;
            left -= copysets as f64;
            open.retain(|other| *other != at);
        }
    }
    let of = |(domain, share): (&Vec<&Node>, f64)| {
        let all = weight(domain);
        domain.iter().map(|n| (n.target, share * n.weight as f64 / all)).collect::<Vec<_>>()
    };
    domains.iter().zip(shares).flat_map(of).collect()
}

fn loads(nodes: &[Node], placed: &[Vec<ShardAddr>]) -> BTreeMap<TargetId, f64> {
    let mut loads: BTreeMap<TargetId, f64> = nodes.iter().map(|n| (n.target, 0.0)).collect();
    placed.iter().flatten().for_each(|m| *loads.get_mut(&m.target).unwrap() += 1.0);
    loads
}

fn check_apart(nodes: &[Node], placed: &[Vec<ShardAddr>], domain: Domain) {
    let node = |m: &ShardAddr| nodes.iter().find(|n| n.target == m.target).unwrap();
    for members in placed {
        for (at, member) in members.iter().enumerate() {
            assert!(usize::from(member.shard) < node(member).shards.len(), "a shard that exists");
            let others = members[..at].iter();
            assert!(
                others.clone().all(|o| node(o).is_apart(node(member), domain)),
                "{members:?} share a {domain}"
            );
        }
    }
}

fn scatter(placed: &[Vec<ShardAddr>]) -> BTreeMap<TargetId, usize> {
    let mut met: BTreeMap<TargetId, BTreeSet<TargetId>> = BTreeMap::new();
    for members in placed {
        for m in members {
            let others = members.iter().map(|o| o.target).filter(|o| *o != m.target);
            met.entry(m.target).or_default().extend(others);
        }
    }
    met.into_iter().map(|(target, met)| (target, met.len())).collect()
}

proptest! {
    #[test]
    fn replicas_are_apart_and_even(
        shards in proptest::collection::vec(1usize..5, 1..12),
        replicas in 1usize..6,
        copysets in 1usize..80,
    ) {
        let placed = place(fresh(&shards), wanted(replicas, copysets));
        prop_assert_eq!(placed.is_some(), shards.len() >= replicas);
        let Some((domain, placed)) = placed else { return Ok(()) };
        prop_assert_eq!(placed.len(), copysets);
        check_apart(&fresh(&shards), &placed, domain);
        let mut a_target: BTreeMap<TargetId, u32> = fresh(&shards).iter().map(|n| (n.target, 0)).collect();
        let mut a_shard: BTreeMap<ShardAddr, u32> = BTreeMap::new();
        for (at, count) in shards.iter().enumerate() {
            for shard in 0..*count as u16 {
                a_shard.insert(ShardAddr { target: TargetId(at as u32 + 1), shard }, 0);
            }
        }
        for member in placed.iter().flatten() {
            *a_target.get_mut(&member.target).unwrap() += 1;
            *a_shard.get_mut(member).expect("a shard that exists") += 1;
        }
        prop_assert!(spread(a_target.values().copied()) <= 1, "{:?}", a_target);
        for target in a_target.keys() {
            let of = a_shard.iter().filter(|(s, _)| s.target == *target).map(|(_, n)| *n);
            prop_assert!(spread(of) <= 1, "{:?}", a_shard);
        }
    }

    #[test]
    fn no_two_replicas_share_the_strongest_domain_there_is(
        nodes in topology(),
        replicas in prop::sample::select(vec![1usize, 2, 3, 5]),
    ) {
        let placed = place(nodes.clone(), wanted(replicas, 200));
        prop_assert_eq!(placed.is_some(), nodes.len() >= replicas);
        let Some((domain, placed)) = placed else { return Ok(()) };
        check_apart(&nodes, &placed, domain);
        let zones: BTreeSet<&String> = nodes.iter().map(|n| &n.zone).collect();
        prop_assert_eq!(domain == Domain::Zone, replicas > 1 && zones.len() >= replicas);
    }

    #[test]
    fn load_is_within_a_tenth_of_weight(nodes in topology(), replicas in prop::sample::select(vec![1usize, 2, 3])) {
        let copysets = 400;
        let Some((domain, placed)) = place(nodes.clone(), wanted(replicas, copysets)) else { return Ok(()) };
        let (loads, ideal) = (loads(&nodes, &placed), ideal(&nodes, domain, replicas, copysets));
        for (target, ideal) in ideal {
            let load = loads[&target];
            prop_assert!((load - ideal).abs() <= 0.1 * ideal + 1.0, "{target}: {load}, not {ideal} by {domain}");
        }
    }

    #[test]
    fn scatter_width_is_within_its_bound(
        targets in 6usize..80,
        replicas in 2usize..4,
        scatter_max in 4usize..30,
        copysets in 1usize..2000,
    ) {
        let nodes = fresh(&vec![1; targets]);
        let wanted = Wanted { replicas, copysets, scatter_max };
        let (_, placed) = place(nodes.clone(), wanted).unwrap();
        // Sets are shared out to within one of each target.
        let bound = scatter_max + 2 * (replicas - 1);
        prop_assert!(scatter(&placed).values().all(|width| *width <= bound), "{:?}", scatter(&placed));
        // And the copysets of a set are the least that can be shared out.
        let sets = (targets * scatter_max / (replicas * (replicas - 1))).clamp(targets.div_ceil(replicas), copysets.max(targets));
        let most = if targets <= scatter_max + 1 { 1 } else { copysets.div_ceil(sets) };
        let loads = loads(&nodes, &placed);
        prop_assert!(spread(loads.values().map(|load| *load as u32)) as usize <= most, "{loads:?}");
    }

    #[test]
    fn the_order_of_targets_does_not_matter(nodes in topology(), seed in any::<u64>()) {
        let mut turned = nodes.clone();
        turned.rotate_left(seed as usize % nodes.len());
        prop_assert_eq!(place(nodes, wanted(3, 20)), place(turned, wanted(3, 20)));
    }

    #[test]
    fn what_is_there_already_is_filled_up_first(loads in proptest::collection::vec(0u32..20, 4..8)) {
        let mut nodes = fresh(&vec![1; loads.len()]);
        for (node, load) in nodes.iter_mut().zip(&loads) {
            node.shards[0] = *load;
        }
        // Enough to level any start.
        let (_, placed) = place(nodes, wanted(3, 20 * loads.len())).unwrap();
        let mut totals = loads.clone();
        for member in placed.iter().flatten() {
            totals[member.target.0 as usize - 1] += 1;
        }
        prop_assert!(spread(totals.iter().copied()) <= 1, "{:?}", totals);
    }

    #[test]
    fn a_target_that_joins_gets_its_share_and_nothing_else_moves(
        nodes in topology(),
        joins in (0u8..6, 1u64..=8),
    ) {
        let (zone, weight) = (format!("z{}", joins.0), joins.1);
        let Some((_, mut placed)) = place(nodes.clone(), wanted(3, 120)) else { return Ok(()) };
        let newcomer = Node { zone, weight, ..Node::empty(TargetId(1000), 1) };
        let mut nodes = fill([nodes, vec![newcomer]].concat(), &placed);
        let domain = strongest(&nodes, 3).unwrap();
        let mut moved = 0;
        while let Some(step) = next_move(&nodes, domain, &placed, |_| true) {
            moved += 1;
            prop_assert!(moved <= 360, "it ends");
            carry_out(&mut nodes, &mut placed, step);
        }
        let held = loads(&nodes, &placed)[&TargetId(1000)];
        let fair = ideal(&nodes, domain, 3, 120)[&TargetId(1000)];
        prop_assert!(held <= fair * 1.1 + 1.0, "{held} of {fair} by {domain}");
    }

    #[test]
    fn where_targets_are_alike_only_the_newcomer_gains(targets in 4usize..20, copysets in 10usize..200) {
        let nodes = fresh(&vec![1; targets]);
        let (domain, mut placed) = place(nodes.clone(), wanted(3, copysets)).unwrap();
        let before = placed.clone();
        let newcomer = Node::empty(TargetId(1000), 1);
        let mut nodes = fill([nodes, vec![newcomer]].concat(), &placed);
        while let Some(step) = next_move(&nodes, domain, &placed, |_| true) {
            prop_assert_eq!(step.to.target, TargetId(1000));
            carry_out(&mut nodes, &mut placed, step);
        }
        let changed = before.iter().zip(&placed).map(|(a, b)| b.iter().filter(|m| !a.contains(m)).count());
        let (moved, fair) = (changed.sum::<usize>(), 3 * copysets / (targets + 1));
        prop_assert!(moved <= fair + 1 && moved + targets >= fair, "{moved} moved, {fair} is fair");
        check_apart(&nodes, &placed, domain);
    }
}

/// Nodes with what the copysets have placed on them.
fn fill(mut nodes: Vec<Node>, placed: &[Vec<ShardAddr>]) -> Vec<Node> {
    for member in placed.iter().flatten() {
        let node = nodes.iter_mut().find(|n| n.target == member.target).unwrap();
        node.shards[usize::from(member.shard)] += 1;
    }
    nodes
}

fn carry_out(nodes: &mut [Node], placed: &mut [Vec<ShardAddr>], step: Move) {
    let member = placed[step.copyset].iter_mut().find(|m| m.target == step.from).unwrap();
    let from = nodes.iter_mut().find(|n| n.target == step.from).unwrap();
    from.shards[usize::from(member.shard)] -= 1;
    let to = nodes.iter_mut().find(|n| n.target == step.to.target).unwrap();
    to.shards[usize::from(step.to.shard)] += 1;
    *member = step.to;
}

#[test]
fn what_a_target_that_leaves_held_goes_to_the_emptiest_that_is_apart() {
    let zoned = |at: u32, zone: &str| Node { zone: zone.into(), ..Node::empty(TargetId(at), 2) };
    let mut nodes = [zoned(1, "a"), zoned(2, "b"), zoned(3, "c"), zoned(4, "c"), zoned(5, "a")];
    nodes[3].shards = vec![3, 2];
    nodes[4].shards = vec![0, 0];
    let kept = [&nodes[0], &nodes[1]];
    let chosen = |domain| choose(&nodes[3..], &kept, domain, |_| 0);
    assert_eq!(
        chosen(Domain::Zone),
        Some(ShardAddr { target: TargetId(4), shard: 1 }),
        "5 is in a zone taken"
    );
    assert_eq!(chosen(Domain::Host), Some(ShardAddr { target: TargetId(5), shard: 0 }));
    assert_eq!(choose(&nodes[..2], &kept, Domain::Target, |_| 0), None);
}

#[test]
fn hosts_count_where_zones_are_too_few() {
    let on = |at: u32, host: &str| Node { host: host.into(), ..Node::empty(TargetId(at), 1) };
    let nodes = vec![on(1, "h1"), on(2, "h1"), on(3, "h2"), on(4, "h3"), on(5, "h3")];
    let (domain, placed) = place(nodes.clone(), wanted(3, 30)).unwrap();
    assert_eq!(domain, Domain::Host);
    check_apart(&nodes, &placed, domain);
    assert_eq!(strongest(&nodes[..3], 3), Some(Domain::Target), "said out loud: two share a host");
}

#[test]
fn leaders_of_a_dev_cluster_are_even() {
    let (_, placed) = place(fresh(&[1, 1, 1]), wanted(3, 12)).unwrap();
    for target in 1..=3 {
        assert_eq!(placed.iter().filter(|m| m[0].target.0 == target).count(), 4);
    }
}

#[test]
fn copysets_scatter_over_many_sets_of_targets() {
    let (_, placed) = place(fresh(&[1; 6]), wanted(3, 20)).unwrap();
    let sets: BTreeSet<BTreeSet<TargetId>> =
        placed.iter().map(|members| members.iter().map(|m| m.target).collect()).collect();
    assert!(sets.len() >= 8, "{} sets", sets.len());
}
