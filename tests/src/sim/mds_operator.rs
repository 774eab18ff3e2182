//! What operators want: volumes created, grown and deleted, targets emptied and forgotten.
//!
//! One wish at a time; what got no answer is asked again, and asking twice is harmless. Volumes are created in
//! the order of the mix, so that the n-th has id n.

use super::fleet::{Fleet, volume_name};
use super::{Draw, Mix};
use mds_lite::intake;
use mds_lite::state::{Command, Reply, VolumeRef};
use protocol::control::{ProblemKind, pb};
use protocol::types::{CHUNK_BYTES, TargetId, VolumeId};
use std::collections::{BTreeSet, VecDeque};

/// Volumes that there are from the beginning.
const VOLUMES_AT_FIRST: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wish {
    Create(usize),
    Offer(usize),
    Grow(usize),
    Withdraw(usize),
    Delete(usize, u32),
    Drain(usize, bool),
    Forget(usize),
}

/// What hosts of a volume are to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// It can be used.
    There(usize),
    /// It is about to go: errors are to be expected.
    Leaves(usize),
    /// It is deleted.
    Gone(usize),
}

/// See the module.
pub struct Operator {
    volumes: Vec<(u64, u32)>,
    next: usize,
    live: VecDeque<usize>,
    wishes: VecDeque<Wish>,
    notices: Vec<Notice>,
    forgotten: BTreeSet<usize>,
    /// Volumes created.
    pub created: u64,
    /// Volumes deleted.
    pub deleted: u64,
    /// Drains begun.
    pub drains: u64,
}

impl Operator {
    /// Wants the first volumes.
    pub fn new(mix: &Mix) -> Self {
        let mut operator = Self {
            volumes: mix.volumes.clone(),
            next: 0,
            live: VecDeque::new(),
            wishes: VecDeque::new(),
            notices: Vec::new(),
            forgotten: BTreeSet::new(),
            created: 0,
            deleted: 0,
            drains: 0,
        };
        (0..VOLUMES_AT_FIRST).for_each(|_| operator.create());
        operator
    }

    fn create(&mut self) {
        if self.next < self.volumes.len() {
            self.wishes.extend([Wish::Create(self.next), Wish::Offer(self.next)]);
            self.next += 1;
        }
    }

    /// What is asked next.
    pub fn wish(&mut self, fleet: &Fleet) -> Option<Command> {
        for target in 0..fleet.targets() {
            // Its id may be given to another; once everything has moved away.
            if fleet.is_lost(target) && self.forgotten.insert(target) {
                self.wishes.push_back(Wish::Forget(target));
            }
        }
        let wish = *self.wishes.front()?;
        let id = |volume: usize| VolumeRef::Id(VolumeId(volume as u32 + 1));
        let named = |volume: usize| Some(pb::VolumeRef { id: volume as u32 + 1, name: String::new() });
        Some(match wish {
            Wish::Create(volume) => {
                let (bytes, block_bytes) = self.volumes[volume];
                let (name, pool) = (volume_name(volume), String::new());
                intake::create_volume(pb::CreateVolumeRequest { name, bytes, block_bytes, pool })
            }
            Wish::Offer(volume) => {
                let protocol = protocol::map::ExportProtocol::Nbd;
                Command::AddExport { volume: id(volume), protocol, allowed: None }
            }
            Wish::Grow(volume) => {
                let bytes = self.volumes[volume].0 + CHUNK_BYTES as u64;
                Command::ResizeVolume { volume: id(volume), bytes }
            }
            Wish::Withdraw(volume) => Command::RemoveExport(id(volume), protocol::map::ExportProtocol::Nbd),
            Wish::Delete(volume, keep_s) => {
                let request = pb::DeleteVolumeRequest { volume: named(volume), keep_s };
                let unix_s = fleet.now().0 / 1_000_000_000;
                intake::delete_volume(request, unix_s).expect("a volume is named")
            }
            Wish::Drain(target, draining) => Command::Drain { target: TargetId(target as u32 + 1), draining },
            Wish::Forget(target) => Command::RemoveTarget(TargetId(target as u32 + 1)),
        })
    }

    /// What came of it.
    pub fn answered(&mut self, fleet: &mut Fleet, answer: Result<Reply, ProblemKind>) {
        let Some(wish) = self.wishes.front().copied() else { return };
        use ProblemKind::{AlreadyExists, NotFound, NotReady, Storage, UnknownTarget, Unreachable};
        match answer {
            // No pool yet, or nobody who leads.
            Err(Unreachable | Storage | NotReady) => return,
            Err(AlreadyExists | NotFound | UnknownTarget) | Ok(_) => {}
            // Its replicas have not moved away yet: others first.
            Err(_) if matches!(wish, Wish::Forget(_)) => return self.wishes.rotate_left(1),
            Err(kind) => tracing::info!(?wish, ?kind, "an operator is refused"),
        }
        tracing::info!(?wish, ?answer, "an operator is answered");
        self.wishes.pop_front();
        match wish {
            Wish::Offer(volume) => {
                self.live.push_back(volume);
                self.created += 1;
                self.notices.push(Notice::There(volume));
            }
            Wish::Delete(volume, _) => {
                self.deleted += 1;
                self.notices.push(Notice::Gone(volume));
            }
            Wish::Drain(target, true) => drop(fleet.draining.insert(target)),
            Wish::Drain(target, false) => drop(fleet.draining.remove(&target)),
            _ => {}
        }
    }

    /// What hosts are to know.
    pub fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// What is not answered yet, as text.
    pub fn waits_for(&self) -> Option<String> {
        self.wishes.front().map(|wish| format!("an operator waits for {wish:?}"))
    }

    /// A target is to be emptied, as long as three others stay; or one that is may be used again.
    pub fn drain(&mut self, fleet: &mut Fleet, draw: &mut Draw) {
        let asked = |target: usize, draining: bool| Wish::Drain(target, draining);
        if let Some(target) = fleet.draining.iter().copied().find(|target| fleet.is_there(*target))
            && draw.chance(500)
        {
            self.wishes.push_back(asked(target, false));
            return;
        }
        let usable: Vec<usize> = fleet.usable().collect();
        if usable.len() >= 4 {
            let target = draw.of(&usable);
            self.drains += 1;
            // Known at once, so that nothing else takes the last places meanwhile.
            fleet.draining.insert(target);
            self.wishes.push_back(asked(target, true));
        }
    }

    /// A volume comes, grows or goes.
    pub fn change_volumes(&mut self, draw: &mut Draw) {
        match draw.below(3) {
            0 if self.live.len() > 1 => {
                let volume = self.live.pop_front().expect("there are two");
                self.notices.push(Notice::Leaves(volume));
                let keep_s = draw.of(&[0, 0, 2]);
                self.wishes.extend([Wish::Withdraw(volume), Wish::Delete(volume, keep_s)]);
                // What it held is to be used again.
                self.create();
            }
            1 => {
                if let Some(volume) = self.live.back() {
                    self.wishes.push_back(Wish::Grow(*volume));
                }
            }
            _ => self.create(),
        }
    }
}
