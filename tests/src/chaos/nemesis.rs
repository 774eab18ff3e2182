//! Which fault comes when, and its end.

use super::Options;
use super::fleet::{Fleet, TARGETS};
use super::net::MDS;
use crate::damage::{Place, find, flip};
use crate::fuzz::Dice;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// What can be done to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// Un-flushed writes are lost.
    PowerCycle,
    /// Every IO fails, or no more.
    Fail(bool),
    /// No room is left, or it is given back.
    Fill(bool),
    /// Some blocks in chunk files change.
    Rot,
}

/// A fault under way; what ends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Kill,
    KillAll,
    KillMds,
    Pause,
    Cut,
    CutOneWay,
    Bridge,
    Lose,
    Slow,
    Full,
    PowerOne,
    PowerAll,
    IoErrors,
    Rot,
}

const FAULTS: &[(&str, Fault, usize)] = &[
    ("kill", Fault::Kill, 4),
    ("kill-all", Fault::KillAll, 1),
    ("kill-mds", Fault::KillMds, 1),
    ("pause", Fault::Pause, 3),
    ("cut", Fault::Cut, 3),
    ("cut-one-way", Fault::CutOneWay, 3),
    ("bridge", Fault::Bridge, 1),
    ("lose-packets", Fault::Lose, 2),
    ("slow-link", Fault::Slow, 2),
    ("disk-full", Fault::Full, 2),
    ("power-cut", Fault::PowerOne, 3),
    ("power-cut-all", Fault::PowerAll, 1),
    ("io-errors", Fault::IoErrors, 2),
    ("rot", Fault::Rot, 2),
];

/// Draws faults and ends them.
pub struct Nemesis {
    bag: Vec<(&'static str, Fault)>,
    counts: BTreeMap<&'static str, u32>,
    pause_max_s: u64,
}

impl Nemesis {
    /// What this run may do.
    pub fn new(options: &Options, fleet: &Fleet, skipped: &mut Vec<String>) -> Self {
        if !fleet.net.has_netem {
            skipped.push(
                "delay by netem: the kernel lacks it; a token bucket delays by queueing instead".into(),
            );
        }
        skipped.push(
            "clock jumps: no namespace has a CLOCK_REALTIME of its own (the simulator has them)".into(),
        );
        let wanted =
            |name: &str| options.only.is_empty() || options.only.iter().any(|o| name.contains(o.as_str()));
        let possible = |fault: Fault| {
            fleet.disks_fail || !matches!(fault, Fault::PowerOne | Fault::PowerAll | Fault::IoErrors)
        };
        let chosen = FAULTS.iter().filter(|(name, fault, _)| wanted(name) && possible(*fault));
        let bag = chosen.flat_map(|(name, fault, weight)| vec![(*name, *fault); *weight]).collect();
        // A pause of 30 s would be most of a short run.
        let pause_max_s = if options.length >= Duration::from_secs(240) { 30 } else { 6 };
        Self { bag, counts: BTreeMap::new(), pause_max_s }
    }

    /// How often each fault came.
    pub fn counts(&self) -> Vec<(&'static str, u32)> {
        self.counts.iter().map(|(name, count)| (*name, *count)).collect()
    }

    /// One fault, sometimes with another one on top, their ends, and a while of peace.
    pub fn round(&mut self, fleet: &mut Fleet, dice: &mut Dice) -> anyhow::Result<()> {
        let (name, fault) = dice.pick(&self.bag);
        let target = 1 + dice.below(TARGETS);
        let other = 1 + (target - 1 + 1 + dice.below(TARGETS - 1)) % TARGETS;
        let hold = Duration::from_millis(300 + dice.below(5000) as u64);
        eprintln!("nemesis: {name} at target {target} (and {other}) for {hold:?}");
        *self.counts.entry(name).or_default() += 1;
        self.strike(fault, target, other, hold, fleet, dice)?;
        fleet.net.heal()?;
        fleet.excused = None;
        for host in 0..=TARGETS {
            fleet.signal(host, Signal::SIGCONT)?;
        }
        fleet.pass(Duration::from_millis(500 + dice.below(3000) as u64))
    }

    fn strike(
        &self,
        fault: Fault,
        target: usize,
        other: usize,
        hold: Duration,
        fleet: &mut Fleet,
        dice: &mut Dice,
    ) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => restart(fleet, &[target], hold),
            Fault::KillAll => restart(fleet, &[1, 2, 3], hold / 4),
            Fault::KillMds => restart(fleet, &[MDS], hold),
            Fault::Pause => {
                fleet.signal(target, Signal::SIGSTOP)?;
                let most = self.pause_max_s as usize * 1000;
                fleet.pass(Duration::from_millis(500 + dice.below(most) as u64))
            }
            Fault::Cut => {
                self.cut(fleet, target, true)?;
                self.meanwhile(fleet, other, hold, dice)
            }
            Fault::CutOneWay => {
                self.cut(fleet, target, false)?;
                self.meanwhile(fleet, other, hold, dice)
            }
            Fault::Bridge => {
                // Two that do not hear each other, and a third that hears both.
                fleet.net.drop_from(target, other)?;
                fleet.net.drop_from(other, target)?;
                self.meanwhile(fleet, 6 - target - other, hold, dice)
            }
            Fault::Lose => {
                fleet.net.lose(target, 2 + dice.below(20))?;
                self.meanwhile(fleet, other, hold, dice)
            }
            Fault::Slow => {
                fleet.net.slow(target)?;
                self.meanwhile(fleet, other, hold, dice)
            }
            Fault::Full => {
                fleet.storage(target, Storage::Fill(true))?;
                let passed = self.meanwhile(fleet, target, hold, dice);
                fleet.storage(target, Storage::Fill(false))?;
                passed
            }
            Fault::PowerOne => power(fleet, &[target], hold / 2),
            Fault::PowerAll => power(fleet, &[1, 2, 3], hold / 8),
            Fault::IoErrors => {
                fleet.excused = Some(target);
                fleet.storage(target, Storage::Fail(true))?;
                fleet.pass(hold)?;
                fleet.kill(target)?;
                fleet.storage(target, Storage::Fail(false))?;
                fleet.launch(target)
            }
            Fault::Rot => {
                fleet.kill(target)?;
                fleet.storage(target, Storage::Rot)?;
                fleet.launch(target)
            }
        }
    }

    /// From one target no other hears, or it hears no other, or both.
    fn cut(&self, fleet: &Fleet, target: usize, both: bool) -> anyhow::Result<()> {
        for other in (0..=TARGETS + 1).filter(|other| *other != target) {
            fleet.net.drop_from(other, target)?;
            if both {
                fleet.net.drop_from(target, other)?;
            }
        }
        Ok(())
    }

    /// A fault lasts; often a process dies meanwhile.
    fn meanwhile(
        &self,
        fleet: &mut Fleet,
        target: usize,
        hold: Duration,
        dice: &mut Dice,
    ) -> anyhow::Result<()> {
        fleet.pass(hold / 2)?;
        match dice.below(4) {
            0 => restart(fleet, &[target], hold / 4)?,
            1 => {
                fleet.signal(target, Signal::SIGSTOP)?;
                fleet.pass(hold / 4)?;
                fleet.signal(target, Signal::SIGCONT)?;
            }
            _ => {}
        }
        fleet.pass(hold / 2)
    }

    /// Ends whatever may be left.
    pub fn heal_all(&mut self, fleet: &mut Fleet) -> anyhow::Result<()> {
        fleet.net.heal()?;
        fleet.pass(Duration::from_millis(200))
    }
}

fn restart(fleet: &mut Fleet, hosts: &[usize], dead: Duration) -> anyhow::Result<()> {
    for host in hosts {
        fleet.kill(*host)?;
    }
    fleet.pass(dead)?;
    hosts.iter().try_for_each(|host| fleet.launch(*host))
}

fn power(fleet: &mut Fleet, targets: &[usize], dark: Duration) -> anyhow::Result<()> {
    for target in targets {
        fleet.kill(*target)?;
    }
    for target in targets {
        fleet.storage(*target, Storage::PowerCycle)?;
    }
    fleet.pass(dark)?;
    targets.iter().try_for_each(|target| fleet.launch(*target))
}

/// Blocks rot in the chunk files of a target, each third block its own, so that none rots twice.
pub fn rot(dir: &Path, target: usize) -> anyhow::Result<()> {
    let found = find(dir, Place::Chunks)?;
    let own = found.iter().filter(|found| found.block % TARGETS as u64 == target as u64 - 1);
    let mut rotten = 0;
    for found in own.step_by(5).take(60) {
        flip(found)?;
        rotten += 1;
    }
    eprintln!("nemesis: {rotten} blocks rot");
    Ok(())
}
