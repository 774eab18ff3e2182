//! What goes wrong, and when.
//!
//! Each kind of fault has its own clock, drawn from its mean. Disks lie only on one target (the
//! victim), so that a quorum of every copyset stays intact, as the promise demands; power may
//! fail anywhere, everywhere at once too.

use super::fleet::Fleet;
use super::{Draw, Failure, Mix};
use protocol::types::{Span, Time};
use reactor::sim::{Faults as DiskFaults, SimWorld};
use std::collections::BTreeSet;
use std::ops::AddAssign;
use std::path::PathBuf;

/// Faults injected, by kind.
#[derive(Clone, Copy, Default, Debug)]
pub struct Count {
    /// Power cuts, a target each.
    pub crashes: u64,
    /// Partitions.
    pub partitions: u64,
    /// Resets of all connections between two nodes.
    pub resets: u64,
    /// Stalls.
    pub pauses: u64,
    /// Leaderships handed over, or asked to.
    pub transfers: u64,
    /// Slow links.
    pub slow_links: u64,
    /// Bits that rotted.
    pub rotten: u64,
    /// Sectors that became unreadable.
    pub broken_sectors: u64,
    /// Wrong bits read, reads of broken sectors, writes lost and misdirected.
    pub lies: u64,
    /// Bits inverted between shards.
    pub wire_flips: u64,
    /// Clocks set to another pace.
    pub clocks: u64,
    /// Disks replaced by their power being cut, after they failed.
    pub revived: u64,
    /// Times that the disk of a target filled up.
    pub full_disks: u64,
    /// Connections whose data took a long way round.
    pub detours: u64,
    /// Targets that joined.
    pub joined: u64,
    /// Targets lost for good.
    pub lost: u64,
    /// Targets away for long.
    pub outages: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, one: Self) {
        self.crashes += one.crashes;
        self.partitions += one.partitions;
        self.resets += one.resets;
        self.pauses += one.pauses;
        self.transfers += one.transfers;
        self.slow_links += one.slow_links;
        self.rotten += one.rotten;
        self.broken_sectors += one.broken_sectors;
        self.lies += one.lies;
        self.wire_flips += one.wire_flips;
        self.clocks += one.clocks;
        self.revived += one.revived;
        self.full_disks += one.full_disks;
        self.detours += one.detours;
        self.joined += one.joined;
        self.lost += one.lost;
        self.outages += one.outages;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum What {
    Crash,
    Start(usize),
    Partition,
    Heal(usize, usize),
    Reset,
    Pause,
    Resume(usize),
    SlowLink,
    FastLink(usize, usize),
    Rot,
    Break,
    Transfer,
    Fill,
    Empty(usize),
    Detour,
    ResetOneSide(usize, usize),
    Join,
    Lose,
    Outage,
}

/// The source of all trouble.
pub struct Nemesis {
    draw: Draw,
    mix: Mix,
    agenda: BTreeSet<(Time, What)>,
    victim: usize,
    /// The other one, where more breaks than a copyset can bear.
    second: Option<usize>,
    /// Targets whose disks are full.
    full: BTreeSet<usize>,
    /// What was injected.
    pub count: Count,
}

impl Nemesis {
    /// From the mix.
    pub fn new(mix: &Mix, seed: u64, now: Time) -> Self {
        let mut draw = Draw::new(seed ^ 0x6e65_6d65);
        let victim = draw.below(mix.targets as u64) as usize;
        let second = mix.faults.beyond.then_some((victim + 1) % mix.targets);
        let (mix, agenda, count) = (mix.clone(), BTreeSet::new(), Count::default());
        let mut nemesis = Self { draw, mix, agenda, victim, second, full: BTreeSet::new(), count };
        let kinds = [
            What::Crash,
            What::Partition,
            What::Reset,
            What::Pause,
            What::SlowLink,
            What::Rot,
            What::Break,
            What::Transfer,
            What::Fill,
            What::Detour,
            What::Join,
            What::Lose,
            What::Outage,
        ];
        for what in kinds {
            nemesis.plan(what, now);
        }
        nemesis
    }

    fn plan(&mut self, what: What, now: Time) {
        let faults = &self.mix.faults;
        let mean = match what {
            What::Crash => faults.crash,
            What::Partition => faults.partition,
            What::Reset => faults.reset,
            What::Pause => faults.pause,
            What::SlowLink => faults.slow_link,
            What::Rot => faults.rot_chunks,
            What::Transfer => faults.transfer,
            What::Break => faults.break_sectors,
            What::Fill => faults.full_disk,
            What::Detour => faults.detour,
            What::Join => faults.join,
            What::Lose => faults.lose,
            What::Outage => faults.outage,
            _ => None,
        };
        if let Some(mean) = mean {
            let after = Span(self.draw.between(1, 2 * mean.0));
            self.agenda.insert((now + after, what));
        }
    }

    fn later(&mut self, now: Time, most: Span, what: What) {
        let after = Span(self.draw.between(1_000_000, most.0));
        self.agenda.insert((now + after, what));
    }

    /// When [`Nemesis::act`] wants to be called.
    pub fn next(&self) -> Time {
        self.agenda.first().map_or(Time(u64::MAX), |(at, _)| *at)
    }

    /// Does what is due.
    pub fn act(&mut self, world: &SimWorld, fleet: &mut Fleet) -> Result<(), Failure> {
        let now = world.now();
        self.set_disk(world, fleet);
        for node in 0..fleet.nodes() {
            fleet.check_counters(node, self.has_bad_disk(node / self.mix.shards), false)?;
        }
        while let Some((_, what)) = self.agenda.first().copied().filter(|(at, _)| *at <= now) {
            self.agenda.pop_first();
            self.strike(world, fleet, what, now)?;
            self.plan(what, now);
        }
        self.set_disk(world, fleet);
        Ok(())
    }

    fn set_disk(&self, world: &SimWorld, fleet: &Fleet) {
        let faults = &self.mix.faults;
        world.flip_on_the_wire(faults.wire_flip_ppm, fleet.nodes());
        for node in 0..fleet.nodes() {
            let bad = fleet.nodes_of(self.victim).contains(&node);
            let ppm = |ppm: u32| if bad { ppm } else { 0 };
            world.set_faults(
                node,
                DiskFaults {
                    read_error_ppm: ppm(faults.read_error_ppm),
                    read_flip_ppm: ppm(faults.read_flip_ppm),
                    write_error_ppm: ppm(faults.write_error_ppm),
                    sync_error_ppm: ppm(faults.sync_error_ppm),
                    lost_write_ppm: ppm(faults.lost_write_ppm),
                    misdirect_ppm: ppm(faults.misdirect_ppm),
                    slow_ppm: faults.slow_disk_ppm,
                    is_full: self.full.iter().any(|target| fleet.nodes_of(*target).contains(&node)),
                },
            );
        }
    }

    fn strike(&mut self, world: &SimWorld, fleet: &mut Fleet, what: What, now: Time) -> Result<(), Failure> {
        let nodes = fleet.nodes() as u64 + self.mix.hosts as u64;
        match what {
            What::Crash => self.crash(world, fleet, now),
            What::Start(target) => self.start(world, fleet, target)?,
            What::Partition => self.partition(world, fleet, now),
            What::Heal(a, b) => world.heal(a, b),
            What::Reset => {
                let (a, b) = self.pair(nodes);
                self.count.resets += 1;
                world.reset_connections(a, b);
            }
            What::Pause => {
                let node = self.draw.below(fleet.nodes() as u64) as usize;
                self.count.pauses += 1;
                world.pause(node);
                self.later(now, Span::ms(3_000), What::Resume(node));
            }
            What::Resume(node) => world.resume(node),
            What::Transfer => {
                self.count.transfers += 1;
                let copysets: Vec<_> =
                    fleet.map().copysets.iter().map(|(id, c)| (*id, c.members.clone())).collect();
                if copysets.is_empty() {
                    return Ok(());
                }
                let (copyset, members) = &copysets[self.draw.below(copysets.len() as u64) as usize];
                let to = self.draw.of(members).target;
                fleet.transfer(*copyset, to);
            }
            What::SlowLink => {
                let (a, b) = self.pair(nodes);
                self.count.slow_links += 1;
                let extra = Span::us(self.draw.between(100, 300_000));
                world.slow_link(a, b, extra);
                self.later(now, Span::ms(5_000), What::FastLink(a, b));
            }
            What::Fill => {
                let target = self.draw.below(fleet.targets() as u64) as usize;
                self.count.full_disks += 1;
                self.full.insert(target);
                self.later(now, Span::ms(4_000), What::Empty(target));
            }
            What::Empty(target) => _ = self.full.remove(&target),
            // Between shards; half of the time the sender then loses the connection, and asks anew on
            // another while the old requests are still on their way.
            What::Detour => {
                let (a, b) = self.pair(fleet.nodes() as u64);
                self.count.detours += 1;
                let lasts = Span(self.draw.between(50_000_000, 4_000_000_000));
                world.detour(a, b, lasts);
                if self.draw.chance(500) {
                    self.later(now, Span(lasts.0.min(500_000_000)), What::ResetOneSide(a, b));
                }
            }
            What::ResetOneSide(a, b) => world.reset_one_side(a, b),
            What::FastLink(a, b) => world.slow_link(a, b, Span(0)),
            What::Join => self.join(world, fleet)?,
            What::Lose => self.lose(world, fleet),
            What::Outage => self.outage(world, fleet, now),
            What::Rot | What::Break => self.damage(world, fleet, what, "chunks", "chunks")?,
        }
        Ok(())
    }

    fn partition(&mut self, world: &SimWorld, fleet: &Fleet, now: Time) {
        self.count.partitions += 1;
        let (shards, nodes) = (fleet.nodes(), fleet.nodes() + self.mix.hosts);
        let (a, b) = self.pair(nodes as u64);
        let kind = self.draw.below(5);
        match if self.mix.faults.isolate { 2 } else { kind } {
            0 => {
                world.partition_one_way(a, b);
                self.later(now, Span::ms(4_000), What::Heal(a, b));
            }
            1 => self.cut(world, now, |one, two| one == a && two != a),
            // One shard alone among the shards; its hosts still reach it.
            2 => {
                let alone = a % shards;
                self.cut(world, now, |one, two| one == alone && two != alone && two < shards);
            }
            // Two sides, and sometimes one node that reaches both.
            3 => {
                let (sides, bridge) = (self.draw.any(), self.draw.below(2 * nodes as u64) as usize);
                let side = |node: usize| sides >> (node % 64) & 1;
                self.cut(world, now, |one, two| {
                    one < two && side(one) != side(two) && one != bridge && two != bridge
                });
            }
            _ => {
                world.partition(a, b);
                self.later(now, Span::ms(4_000), What::Heal(a, b));
            }
        }
    }

    /// Cuts all such pairs of nodes for a while.
    fn cut(&mut self, world: &SimWorld, now: Time, is_cut: impl Fn(usize, usize) -> bool) {
        let nodes = self.mix.targets * self.mix.shards + self.mix.hosts;
        let until = now + Span(self.draw.between(1_000_000, 4_000_000_000));
        for (a, b) in (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b))).filter(|(a, b)| is_cut(*a, *b))
        {
            world.partition(a, b);
            self.agenda.insert((until, What::Heal(a, b)));
        }
    }

    fn pair(&mut self, nodes: u64) -> (usize, usize) {
        let a = self.draw.below(nodes);
        let b = (a + self.draw.between(1, nodes - 1)) % nodes;
        (a as usize, b as usize)
    }

    fn crash(&mut self, world: &SimWorld, fleet: &mut Fleet, now: Time) {
        let all = self.draw.chance(self.mix.faults.crash_all_permille);
        let one = self.draw.below(fleet.targets() as u64) as usize;
        for target in (0..fleet.targets()).filter(|target| all || *target == one) {
            if !fleet.is_up(target) {
                continue;
            }
            self.count.crashes += 1;
            tracing::info!(target, "power cut");
            fleet.nodes_of(target).for_each(|node| world.resume(node));
            fleet.crash(target);
            self.later(now, self.mix.faults.down_max, What::Start(target));
        }
    }

    /// A target that was not there before.
    fn join(&mut self, world: &SimWorld, fleet: &mut Fleet) -> Result<(), Failure> {
        let Some(target) = (0..fleet.targets()).find(|target| fleet.is_awaited(*target)) else {
            return Ok(());
        };
        tracing::info!(target, "joins");
        self.count.joined += 1;
        self.set_clocks(world, fleet, target);
        fleet.join(target)
    }

    /// A target that never comes back, when all copysets have all their replicas and three others stay.
    fn lose(&mut self, world: &SimWorld, fleet: &mut Fleet) {
        let there: Vec<usize> = fleet.usable().collect();
        if there.len() < 4 || !fleet.is_whole() {
            return;
        }
        let target = self.draw.of(&there);
        tracing::info!(target, "lost for good");
        self.count.lost += 1;
        fleet.nodes_of(target).for_each(|node| world.resume(node));
        fleet.lose(target);
    }

    /// A target is away for longer than it takes to be given up.
    fn outage(&mut self, world: &SimWorld, fleet: &mut Fleet, now: Time) {
        let Some(mds) = &self.mix.mds else { return };
        let (least, most) = (mds.offline_after.0, 4 * mds.offline_after.0);
        let there: Vec<usize> = fleet.usable().filter(|target| fleet.is_up(*target)).collect();
        if there.is_empty() {
            return;
        }
        let target = self.draw.of(&there);
        let back = now + Span(self.draw.between(least, most));
        tracing::info!(target, ?back, "away for long");
        self.count.outages += 1;
        fleet.nodes_of(target).for_each(|node| world.resume(node));
        fleet.crash(target);
        self.agenda.insert((back, What::Start(target)));
    }

    fn start(&mut self, world: &SimWorld, fleet: &mut Fleet, target: usize) -> Result<(), Failure> {
        if fleet.is_up(target) || !fleet.is_there(target) {
            return Ok(());
        }
        let is_bad = target == self.victim || Some(target) == self.second;
        if is_bad && self.draw.chance(self.mix.faults.rot_log_permille) {
            self.damage_target(world, fleet, target, What::Rot, "log", "log")?;
        }
        tracing::info!(target, "starts");
        self.set_clocks(world, fleet, target);
        fleet.start(target)
    }

    /// A machine that boots has a clock that begins anew, at a pace of its own.
    fn set_clocks(&mut self, world: &SimWorld, fleet: &Fleet, target: usize) {
        let Some(most) = self.mix.faults.drift_ppm.map(|ppm| i64::from(ppm) * 1000) else { return };
        let shows = Time(self.draw.between(1_000_000_000, 100_000_000_000));
        let drift = self.draw.between(0, 2 * most as u64) as i64 - most;
        self.count.clocks += 1;
        fleet.nodes_of(target).for_each(|node| world.set_clock(node, shows, drift));
    }

    /// Inverts a bit somewhere in the victim's files of a kind, or makes its sector unreadable.
    fn damage(
        &mut self,
        world: &SimWorld,
        fleet: &Fleet,
        what: What,
        dir: &str,
        ends: &str,
    ) -> Result<(), Failure> {
        let victim = self.second.filter(|_| self.draw.chance(500)).unwrap_or(self.victim);
        self.damage_target(world, fleet, victim, what, dir, ends)
    }

    fn damage_target(
        &mut self,
        world: &SimWorld,
        fleet: &Fleet,
        victim: usize,
        what: What,
        dir: &str,
        ends: &str,
    ) -> Result<(), Failure> {
        let node = fleet.nodes_of(victim).start + self.draw.below(self.mix.shards as u64) as usize;
        let number = self.draw.below(if dir == "log" { self.mix.layout.log_segments.into() } else { 4 });
        let path: PathBuf = fleet.dir(node).join(dir).join(format!("{number:05}.{ends}"));
        let Some(bit) = world.some_bit(node, &path) else { return Ok(()) };
        tracing::info!(node, ?path, bit, ?what, "damage");
        let done = if what == What::Break {
            self.count.broken_sectors += 1;
            world.break_sector(node, &path, bit)
        } else {
            self.count.rotten += 1;
            world.flip_bit(node, &path, bit)
        };
        done.map_err(|error| Failure(format!("harness: {error}")))
    }

    /// Whether a target's disk may do more than lose what was not synced.
    pub fn has_bad_disk(&self, target: usize) -> bool {
        self.mix.faults.has_bad_disk() && (target == self.victim || Some(target) == self.second)
    }

    /// Ends everything that is wrong, and brings every target up.
    pub fn heal(&mut self, world: &SimWorld, fleet: &mut Fleet) -> Result<(), Failure> {
        self.agenda.clear();
        world.flip_on_the_wire(0, 0);
        self.count.wire_flips = world.flipped_on_the_wire();
        let nodes = fleet.nodes() + self.mix.hosts;
        for a in 0..nodes {
            world.set_faults(a, DiskFaults::default());
            world.resume(a);
            for b in a + 1..nodes {
                world.heal(a, b);
                world.slow_link(a, b, Span(0));
            }
        }
        for target in 0..fleet.targets() {
            if fleet.is_up(target) && fleet.has_failed(target) {
                // A shard whose disk failed serves nothing until it is started anew.
                self.count.revived += 1;
                fleet.crash(target);
            }
            if !fleet.is_up(target) && fleet.is_there(target) {
                self.set_clocks(world, fleet, target);
                fleet.start(target)?;
            }
        }
        self.count.lies = (0..fleet.nodes()).map(|node| world.lies(node)).sum();
        Ok(())
    }
}
