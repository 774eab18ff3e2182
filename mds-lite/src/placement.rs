//! Where replicas go. Pure and deterministic: the same input gives the same places.
//!
//! Invariants: no two replicas of a copyset share a failure domain, which is the zone, the host or the
//! target, the strongest of which there are enough; any number of domains at least the replica count will
//! do. Targets are filled in proportion to their weight: by no more than one replica's difference where the
//! domains allow it, and a target so large that every copyset has a replica there gets just that.
//!
//! Scatter width is the number of other targets that a target shares copysets with: the wider, the more
//! help to rebuild it, and the more pairs or triples of targets whose common loss loses data (Cidon et al.,
//! "Copysets", 2013). A target of average weight is in so many distinct sets of targets that its scatter
//! width stays within the bound; further copysets use the same sets again.
//!
//! Moving follows the same rules and moves no more than it must: what a target that leaves held, and what
//! a target that joins is to hold.

use protocol::types::{ShardAddr, TargetId};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

/// Most other targets that one of average weight shares copysets with.
pub const SCATTER_MAX: usize = 64;

/// A target that may hold replicas, with what it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// The target.
    pub target: TargetId,
    /// Its zone; those without a name are one zone.
    pub zone: String,
    /// Its host; one without a name is a host of its own.
    pub host: String,
    /// Its share of replicas, as its capacity; above 0.
    pub weight: u64,
    /// Replicas on each of its shards; never empty.
    pub shards: Vec<u32>,
    /// Copysets of which it is the first member.
    pub leads: u32,
}

/// What no two replicas of a copyset share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Domain {
    /// Nothing weaker than this can be had.
    Target,
    /// The machine.
    Host,
    /// The strongest.
    Zone,
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Target => "target",
            Self::Host => "host",
            Self::Zone => "zone",
        })
    }
}

/// What is wanted of new copysets.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Replicas of each.
    pub replicas: usize,
    /// How many.
    pub copysets: usize,
    /// Bound of the scatter width of a target of average weight.
    pub scatter_max: usize,
}

impl Wanted {
    /// So many of so many replicas, with the usual scatter width.
    pub fn new(replicas: u32, copysets: u32) -> Self {
        Self { replicas: replicas as usize, copysets: copysets as usize, scatter_max: SCATTER_MAX }
    }
}

impl Node {
    /// A target of so many shards that holds nothing, in no zone and on a host of its own.
    pub fn empty(target: TargetId, shards: usize) -> Self {
        let (zone, host) = (String::new(), String::new());
        Self { target, zone, host, weight: 1, shards: vec![0; shards], leads: 0 }
    }
    /// Replicas on all of its shards.
    pub fn replicas(&self) -> u32 {
        self.shards.iter().sum()
    }
    /// Whether a replica here and one there may both belong to a copyset.
    pub fn is_apart(&self, other: &Self, domain: Domain) -> bool {
        self.target != other.target
            && match domain {
                Domain::Target => true,
                Domain::Host => self.host.is_empty() || self.host != other.host,
                Domain::Zone => self.zone != other.zone,
            }
    }
    /// Compares how full two would be with so many more.
    fn fuller(&self, other: &Self, more: u32) -> Ordering {
        let filled = |node: &Self, by: &Self| u128::from(node.replicas() + more) * u128::from(by.weight);
        filled(self, other).cmp(&filled(other, self))
    }
    fn emptiest_shard(&self) -> usize {
        let shards = 0..self.shards.len();
        shards.min_by_key(|at| (self.shards[*at], *at)).expect("a target has at least one shard")
    }
    fn take(&mut self) -> ShardAddr {
        let shard = self.emptiest_shard();
        self.shards[shard] += 1;
        ShardAddr { target: self.target, shard: shard as u16 }
    }
}

/// The strongest domain of which there are at least `replicas`; `None` when there are too few targets.
pub fn strongest(nodes: &[Node], replicas: usize) -> Option<Domain> {
    let zones: std::collections::BTreeSet<&str> = nodes.iter().map(|n| n.zone.as_str()).collect();
    let named: std::collections::BTreeSet<&str> =
        nodes.iter().filter(|n| !n.host.is_empty()).map(|n| n.host.as_str()).collect();
    let hosts = named.len() + nodes.iter().filter(|n| n.host.is_empty()).count();
    match replicas {
        0 => None,
        // A lone replica shares nothing with anybody.
        1 => (!nodes.is_empty()).then_some(Domain::Target),
        n if zones.len() >= n => Some(Domain::Zone),
        n if !named.is_empty() && hosts >= n => Some(Domain::Host),
        n => (nodes.len() >= n).then_some(Domain::Target),
    }
}

/// Members for new copysets, the one meant to lead first, and the domain that they are apart by; `None`
/// when there are fewer targets than replicas, or one without a shard or weight.
pub fn place(mut nodes: Vec<Node>, wanted: Wanted) -> Option<(Domain, Vec<Vec<ShardAddr>>)> {
    let domain = strongest(&nodes, wanted.replicas)?;
    if nodes.iter().any(|n| n.shards.is_empty() || n.weight == 0) {
        return None;
    }
    nodes.sort_by_key(|n| n.target);
    let sets = place_sets(&nodes, domain, wanted);
    let place = |at: usize| {
        let mut members = sets[at % sets.len()].clone();
        let fewest = |a: &usize, b: &usize| {
            let led = |node: &Node, by: &Node| u128::from(node.leads + 1) * u128::from(by.weight);
            let (a, b) = (&nodes[*a], &nodes[*b]);
            led(a, b).cmp(&led(b, a)).then(a.target.cmp(&b.target))
        };
        let leader = members.iter().copied().min_by(fewest).expect("a set has members");
        members.sort_by_key(|member| *member != leader);
        nodes[leader].leads += 1;
        members.into_iter().map(|member| nodes[member].take()).collect()
    };
    Some((domain, (0..wanted.copysets).map(place).collect()))
}

/// Distinct sets of targets, as indexes, no more than the scatter width allows; copysets are dealt to them
/// in turn, the first ones getting what is left over.
fn place_sets(nodes: &[Node], domain: Domain, wanted: Wanted) -> Vec<Vec<usize>> {
    let (replicas, copysets) = (wanted.replicas, wanted.copysets);
    let partners = (replicas * replicas.saturating_sub(1)).max(1);
    // A target in p sets has at most p * (replicas - 1) partners, and the sets have n * p places.
    let most = (nodes.len() * wanted.scatter_max / partners).max(nodes.len().div_ceil(replicas));
    // Where there are no more targets than that, nothing is bounded, and no set need be used twice.
    let count = if nodes.len() <= wanted.scatter_max + 1 { copysets } else { copysets.min(most) };
    let (mut filled, mut pairs) = (nodes.to_vec(), Pairs::new(nodes.len()));
    let deal = |at: usize| (copysets / count + usize::from(at < copysets % count)) as u32;
    (0..count).map(|at| place_set(&mut filled, &mut pairs, domain, replicas, deal(at))).collect()
}

fn place_set(
    nodes: &mut [Node],
    pairs: &mut Pairs,
    domain: Domain,
    replicas: usize,
    copysets: u32,
) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::with_capacity(replicas);
    while chosen.len() < replicas {
        let apart = |at: &usize| chosen.iter().all(|c| nodes[*at].is_apart(&nodes[*c], domain));
        // The emptiest first; among equals whoever met the chosen ones least, so that copysets scatter.
        let emptiest = |a: &usize, b: &usize| {
            nodes[*a]
                .fuller(&nodes[*b], copysets)
                .then_with(|| pairs.met(*a, &chosen).cmp(&pairs.met(*b, &chosen)))
                .then(a.cmp(b))
        };
        let next = (0..nodes.len()).filter(apart).min_by(emptiest);
        chosen.push(next.expect("there are at least as many domains as replicas"));
    }
    pairs.note(&chosen);
    for at in &chosen {
        // Evenly over its shards, as the copysets will be.
        for _ in 0..copysets {
            nodes[*at].take();
        }
    }
    chosen
}

/// A place for one more replica of a copyset that has, or keeps, replicas at `kept`; `None` when no target
/// is apart from all of them. The emptiest first; among equals whoever shares most copysets with those kept,
/// which keeps the scatter width.
pub fn choose(
    nodes: &[Node],
    kept: &[&Node],
    domain: Domain,
    shared: impl Fn(TargetId) -> usize,
) -> Option<ShardAddr> {
    let apart = |node: &&Node| kept.iter().all(|k| node.is_apart(k, domain));
    let emptiest = |a: &&Node, b: &&Node| {
        let order = a.fuller(b, 1).then_with(|| shared(b.target).cmp(&shared(a.target)));
        order.then(a.target.cmp(&b.target))
    };
    let node = nodes.iter().filter(|n| n.weight > 0).filter(apart).min_by(emptiest)?;
    Some(ShardAddr { target: node.target, shard: node.emptiest_shard() as u16 })
}

/// One replica to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// Of which copyset, by its index among those given.
    pub copyset: usize,
    /// From where.
    pub from: TargetId,
    /// To where.
    pub to: ShardAddr,
}

/// Of which target a replica should go to which, as long as that makes the fullest and the emptiest more
/// alike by a whole replica; `None` when all is balanced or nothing may move. `movable` says which copysets
/// may be touched.
pub fn next_move(
    nodes: &[Node],
    domain: Domain,
    copysets: &[Vec<ShardAddr>],
    movable: impl Fn(usize) -> bool,
) -> Option<Move> {
    let by_target: BTreeMap<TargetId, &Node> = nodes.iter().map(|n| (n.target, n)).collect();
    let mut by_fullness: Vec<&Node> = nodes.iter().filter(|n| n.weight > 0).collect();
    by_fullness.sort_by(|a, b| a.fuller(b, 0).then(a.target.cmp(&b.target)));
    for from in by_fullness.iter().rev() {
        for to in by_fullness.iter().take_while(|to| gains(from, to)) {
            let fits = |members: &Vec<ShardAddr>| {
                members.iter().any(|m| m.target == from.target)
                    && members.iter().filter(|m| m.target != from.target).all(|m| {
                        by_target
                            .get(&m.target)
                            .map_or(m.target != to.target, |other| to.is_apart(other, domain))
                    })
            };
            if let Some(copyset) = (0..copysets.len()).find(|at| movable(*at) && fits(&copysets[*at])) {
                let shard = to.emptiest_shard() as u16;
                return Some(Move { copyset, from: from.target, to: ShardAddr { target: to.target, shard } });
            }
        }
    }
    None
}

/// Whether the one is still at least as full as the other when a replica has moved.
fn gains(from: &Node, to: &Node) -> bool {
    let (had, has) = (u128::from(from.replicas()), u128::from(to.replicas()));
    had > 0 && (had - 1) * u128::from(to.weight) >= (has + 1) * u128::from(from.weight)
}

/// How often two targets share a set.
struct Pairs {
    width: usize,
    counts: Vec<u16>,
}

impl Pairs {
    fn new(width: usize) -> Self {
        Self { width, counts: vec![0; width * width] }
    }
    fn met(&self, at: usize, chosen: &[usize]) -> u32 {
        chosen.iter().map(|other| u32::from(self.counts[at * self.width + other])).sum()
    }
    fn note(&mut self, chosen: &[usize]) {
        for a in chosen {
            for b in chosen.iter().filter(|b| *b != a) {
                let count = &mut self.counts[a * self.width + b];
                *count = count.saturating_add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests;
