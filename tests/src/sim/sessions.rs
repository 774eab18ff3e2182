//! Volumes that are taken over, again and again, by hosts that do not know that they have lost them.
//!
//! Plays the MDS, which gives out epochs, and the command that waits for the fences. Maps reach targets late, so
//! that it is the copysets that must refuse. The name of a holder tells its epoch: a connection under that name
//! was admitted by a map that has it, and everything asked on it is of that epoch.
//!
//! What it demands: once a take-over has returned, nothing of a lower epoch takes effect any more, and no read
//! of one that begins then is answered.

use super::fleet::{Fleet, volume_name};
use super::history::{Change, Register};
use super::host::Host;
use super::{Draw, Failure, Mix};
use protocol::control::Problem;
use protocol::map::ClusterMap;
use protocol::types::{SessionEpoch, Span, Time, VolumeId};
use reactor::sim::SimWorld;
use rustc_hash::FxHashMap;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use target_daemon::control::ToShard;
use tokio::sync::oneshot::{self, error::TryRecvError};

/// How often it is looked whether fences have risen.
const LOOK: Span = Span::ms(2);
/// A target that has not answered for so long is given up, and another one asked.
const PATIENCE: Span = Span::ms(3_000);

/// Take-overs that have returned, and under which epoch each value was written.
#[derive(Default, Debug)]
pub struct TakeOvers {
    /// By volume: epochs and when they returned, in order of epoch.
    returned: BTreeMap<usize, Vec<(u64, Time)>>,
    epochs: FxHashMap<u64, u64>,
}

impl TakeOvers {
    /// A host writes a value under an epoch.
    pub fn writes(&mut self, value: u64, epoch: u64) {
        self.epochs.insert(value, epoch);
    }
    /// Since when nothing of an epoch may take effect, if it has ended.
    pub fn ended(&self, volume: usize, epoch: u64) -> Option<Time> {
        let higher = self.returned.get(&volume)?.iter().filter(|(returned, _)| *returned > epoch);
        higher.map(|(_, at)| *at).min()
    }

    /// # Errors
    /// A write took effect after its epoch had ended.
    fn judge(&self, changes: &BTreeMap<Register, Vec<Change>>) -> Result<(), Failure> {
        for (register, changes) in changes {
            let mut before = 0;
            for change in changes {
                // A write to part of a block writes the units beside it as they are.
                let news = std::mem::replace(&mut before, change.value) != change.value;
                let Some(epoch) = self.epochs.get(&change.value).filter(|_| news) else { continue };
                if let Some(at) = self.ended(register.0 as usize, *epoch).filter(|at| at.0 < change.at) {
                    return Err(Failure(format!(
                        "fence: volume {} unit {}: value {} of epoch {epoch} took effect at {}, entry {} of term {}, though a take-over had returned at {}",
                        register.0, register.1, change.value, change.at, change.position, change.term, at.0
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A take-over that has not returned.
struct Pending {
    epoch: u64,
    host: usize,
    asked_at: Time,
    reply: Option<oneshot::Receiver<Result<(), Problem>>>,
}

/// See the module.
pub struct Sessions {
    draw: Draw,
    mean: Span,
    hosts: usize,
    /// Of the volumes in turn, the last epoch given out.
    epoch: u64,
    pending: Vec<Option<Pending>>,
    /// When each volume is taken over next.
    due: Vec<Time>,
    /// Maps on their way, by arrival: to which target.
    maps: BTreeMap<(Time, u64), (usize, Arc<ClusterMap>)>,
    serial: u64,
    healed: bool,
    shared: Rc<RefCell<TakeOvers>>,
    /// Take-overs that returned.
    pub count: u64,
}

impl Sessions {
    /// Where the mix has take-overs.
    pub fn new(mix: &Mix, seed: u64, now: Time, shared: Rc<RefCell<TakeOvers>>) -> Option<Self> {
        let volumes = mix.volumes.len();
        Some(Self {
            draw: Draw::new(seed ^ 0x7365_7373),
            mean: mix.take_overs?,
            hosts: mix.hosts,
            epoch: 0,
            pending: (0..volumes).map(|_| None).collect(),
            due: vec![now; volumes],
            maps: BTreeMap::new(),
            serial: 0,
            healed: false,
            shared,
            count: 0,
        })
    }

    /// When [`Sessions::act`] wants to be called.
    pub fn next(&self, now: Time) -> Time {
        let look = self.pending.iter().any(Option::is_some).then_some(now + LOOK);
        let free =
            self.due.iter().zip(&self.pending).filter(|(_, pending)| pending.is_none() && !self.healed);
        let due = free.map(|(due, _)| *due);
        let map = self.maps.first_key_value().map(|((at, _), _)| *at);
        due.chain(look).chain(map).min().unwrap_or(Time(u64::MAX)).max(now + Span(1))
    }

    /// Does what is due.
    pub fn act(&mut self, world: &SimWorld, fleet: &mut Fleet, hosts: &mut [Host]) {
        let now = world.now();
        while let Some(entry) = self.maps.first_entry().filter(|entry| entry.key().0 <= now) {
            let (target, map) = entry.remove();
            self.deliver(fleet, target, map);
        }
        for volume in 0..self.pending.len() {
            if self.pending[volume].is_some() {
                self.look(fleet, hosts, volume, now);
            } else if self.due[volume] <= now && !self.healed {
                self.begin(fleet, volume, now);
            }
        }
    }

    /// The MDS gives out the next epoch; maps set out.
    fn begin(&mut self, fleet: &mut Fleet, volume: usize, now: Time) {
        let candidates: Vec<usize> = (0..self.hosts).filter(|h| h % self.pending.len() == volume).collect();
        let host = self.draw.of(&candidates);
        self.epoch += 1;
        let epoch = self.epoch;
        let mut map = (**fleet.map()).clone();
        map.generation += 1;
        let entry = map.volumes.get_mut(&VolumeId(volume as u32 + 1)).expect("the mix's volumes are there");
        (entry.session.epoch, entry.session.holder) = (SessionEpoch(epoch), holder(host, epoch));
        tracing::info!(volume = volume_name(volume), host, epoch, "take-over begins");
        let map = Arc::new(map);
        fleet.set_map(map.clone());
        for target in 0..fleet.targets() {
            // At once, soon, or so late that several come before it.
            let most = self.draw.of(&[0, 100, 2_000, 8_000]);
            let at = now + Span::ms(self.draw.below(most + 1));
            self.serial += 1;
            self.maps.insert((at, self.serial), (target, map.clone()));
        }
        self.pending[volume] = Some(Pending { epoch, host, asked_at: Time(0), reply: None });
    }

    fn deliver(&mut self, fleet: &mut Fleet, target: usize, map: Arc<ClusterMap>) {
        if fleet.cache(target).is_some_and(|known| known.generation >= map.generation) {
            return;
        }
        fleet.keep(target, map.clone());
        fleet.nodes_of(target).for_each(|node| fleet.tell(node, ToShard::Map(map.clone())));
    }

    /// Whether the fences of a take-over have risen; asks a target to see to it.
    fn look(&mut self, fleet: &mut Fleet, hosts: &mut [Host], volume: usize, now: Time) {
        let pending = self.pending[volume].as_mut().expect("looked at");
        match pending.reply.as_mut().map(oneshot::Receiver::try_recv) {
            Some(Ok(Ok(()))) => {
                let (epoch, host) = (pending.epoch, pending.host);
                tracing::info!(volume = volume_name(volume), host, epoch, "take-over returned");
                self.shared.borrow_mut().returned.entry(volume).or_default().push((epoch, now));
                self.count += 1;
                for (number, one) in hosts.iter_mut().enumerate().filter(|(_, one)| one.volume() == volume) {
                    one.hold((number == host).then_some(epoch));
                }
                self.pending[volume] = None;
                self.due[volume] = now + Span(self.draw.between(1, 2 * self.mean.0));
            }
            Some(Err(TryRecvError::Empty)) if now - pending.asked_at < PATIENCE => {}
            _ => {
                // Any target that runs; it may have an older map.
                let up: Vec<usize> = (0..fleet.targets()).filter(|target| fleet.is_up(*target)).collect();
                if up.is_empty() {
                    return;
                }
                let target = self.draw.of(&up);
                let (reply, told) = oneshot::channel();
                let (volume, epoch) = (VolumeId(volume as u32 + 1), SessionEpoch(pending.epoch));
                fleet.tell(fleet.nodes_of(target).start, ToShard::Fence { volume, epoch, reply });
                (pending.reply, pending.asked_at) = (Some(told), now);
            }
        }
    }

    /// No more take-overs begin, and every target gets the newest map.
    pub fn heal(&mut self, fleet: &mut Fleet) {
        self.healed = true;
        self.maps.clear();
        let map = fleet.map().clone();
        (0..fleet.targets()).for_each(|target| self.deliver(fleet, target, map.clone()));
    }

    /// Whether all take-overs have returned.
    pub fn is_settled(&self) -> bool {
        self.pending.iter().all(Option::is_none)
    }

    /// # Errors
    /// A write took effect after its epoch had ended.
    pub fn judge(&self, changes: &BTreeMap<Register, Vec<Change>>) -> Result<(), Failure> {
        self.shared.borrow().judge(changes)
    }
}

/// How a host calls itself when it holds a volume under an epoch.
pub fn holder(host: usize, epoch: u64) -> String {
    format!("h{host}.{epoch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_takes_effect_after_its_epoch_ended_is_found() {
        let mut seen = TakeOvers::default();
        seen.writes(10, 1);
        seen.writes(20, 2);
        seen.returned.insert(0, vec![(2, Time(100)), (3, Time(300))]);
        let change = |value, at| Change { position: at, value, at, term: 1 };
        let judge = |changes: Vec<Change>| seen.judge(&BTreeMap::from([((0, 5), changes)]));
        assert!(judge(vec![change(10, 100), change(20, 300)]).is_ok());
        assert!(judge(vec![change(10, 101)]).is_err());
        assert!(judge(vec![change(20, 200), change(10, 250)]).is_err());
        assert!(
            judge(vec![change(10, 50), change(10, 200)]).is_ok(),
            "rewritten as it was, beside another unit"
        );
        assert_eq!((seen.ended(0, 2), seen.ended(0, 3), seen.ended(1, 1)), (Some(Time(300)), None, None));
    }
}
