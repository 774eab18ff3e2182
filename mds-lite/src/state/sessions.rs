//! Sessions: which hosts are attached to a volume, and under which epoch.
//!
//! Invariants: an epoch is given out once, over all volumes; whoever is attached after an attachment that
//! ended others is so under a higher epoch than they were. What refuses those others is the copysets' fences
//! (docs/adr/0009), not the lease: that only says who may be ended without `take_over`.

use super::{Change, Decision, Reply, State, VolumeRef, error};
use crate::record::SessionRecord;
use protocol::control::{Problem, check_holder, limits};
use protocol::types::{SessionEpoch, TargetId, Time, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// A host that a target reports as attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// To which volume.
    pub volume: VolumeId,
    /// As it calls itself.
    pub holder: String,
    /// Under which epoch.
    pub epoch: SessionEpoch,
}

/// When a holder was last reported as attached, by target. In memory only.
#[derive(Debug, Default)]
pub(super) struct Leases(BTreeMap<(VolumeId, String), BTreeMap<TargetId, Time>>);

impl Leases {
    pub(super) fn forget(&mut self, volume: VolumeId) {
        self.0.retain(|(of, _), _| *of != volume);
    }
    pub(super) fn keep(&mut self, volume: VolumeId, holders: &BTreeSet<String>) {
        self.0.retain(|(of, holder), _| *of != volume || holders.contains(holder));
    }
    fn renew(&mut self, volume: VolumeId, holder: &str, by: TargetId, now: Time) {
        self.0.entry((volume, holder.to_owned())).or_default().insert(by, now);
    }
}

/// How a volume is to be attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attach {
    /// Which.
    pub volume: VolumeRef,
    /// By whom.
    pub holder: String,
    /// By nobody else.
    pub exclusive: bool,
    /// Whoever holds it is ended, and so is what the holder itself had attached before.
    pub take_over: bool,
}

impl State {
    /// Who is attached to a volume.
    pub fn session(&self, volume: VolumeId) -> SessionRecord {
        self.sessions.get(&volume).cloned().unwrap_or_default()
    }

    /// How much of its lease a holder has left; and through which targets it was attached within that.
    pub fn lease(&self, volume: VolumeId, holder: &str, now: Time) -> (Option<u64>, Vec<TargetId>) {
        let lease = self.policy.session_lease;
        let reports = self.leases.0.get(&(volume, holder.to_owned()));
        // A holder that this MDS has not heard of yet has a whole lease from the MDS's start.
        let heard = reports.and_then(|by| by.values().max()).copied().unwrap_or_default();
        let end = heard + lease;
        let live = |(target, at): (&TargetId, &Time)| (*at + lease > now && target.0 != 0).then_some(*target);
        let targets = reports.into_iter().flatten().filter_map(live).collect();
        ((end > now).then(|| (end - now).0), targets)
    }

    pub(super) fn attach(&mut self, request: &Attach, now: Time) -> Result<Decision, Problem> {
        let Attach { volume, holder, exclusive, take_over } = request;
        check_holder(holder)?;
        let (id, record) = self.find_live(volume)?;
        let name = record.name.clone();
        let before = self.session(id);
        let others = before.holders.iter().filter(|other| *other != holder);
        // Shared attachments do not bar each other.
        let barred = *exclusive || before.exclusive;
        if barred && !take_over {
            let mut living = others.clone().filter_map(|other| Some((other, self.lease(id, other, now).0?)));
            if let Some((other, left)) = living.next() {
                return Err(error::held(&name, other, before.exclusive, left));
            }
        }
        let ends = *take_over || (barred && others.count() > 0) || *exclusive != before.exclusive;
        let mut counters = self.next_generation();
        let mut after = SessionRecord { exclusive: *exclusive, ..before.clone() };
        if ends {
            after.holders.clear();
            after.epoch = counters.next_epoch;
            counters.next_epoch += 1;
        }
        if after.holders.len() >= limits::HOLDERS_MAX {
            return Err(error::limit(
                format!("holder {holder:?} of volume {name:?} refused"),
                limits::HOLDERS_MAX,
            ));
        }
        after.holders.insert(holder.clone());
        // From now on, whether it has connected yet or not.
        self.leases.renew(id, holder, TargetId(0), now);
        Ok(self.session_changed(id, before, after, counters))
    }

    pub(super) fn detach(&mut self, volume: &VolumeRef, holder: &str) -> Result<Decision, Problem> {
        let (id, record) = self.find_live(volume)?;
        let before = self.session(id);
        if !before.holders.contains(holder) {
            return Err(error::not_attached(&record.name, holder, &before.holders));
        }
        let mut counters = self.next_generation();
        let mut after = before.clone();
        after.holders.remove(holder);
        if before.exclusive {
            // Whoever comes next must not meet what this one still has on its way.
            (after.exclusive, after.epoch) = (false, counters.next_epoch);
            counters.next_epoch += 1;
        }
        Ok(self.session_changed(id, before, after, counters))
    }

    fn session_changed(
        &self,
        id: VolumeId,
        before: SessionRecord,
        after: SessionRecord,
        counters: crate::record::Counters,
    ) -> Decision {
        if before == after {
            return Decision::unchanged(Reply::Volume(id));
        }
        let changes = vec![Change::Session(id, after), Change::Counters(counters)];
        Decision { changes, reply: Reply::Volume(id) }
    }

    /// Renews the leases of hosts that a target reports.
    pub(super) fn renew_leases(&mut self, by: TargetId, attached: &[Attached], now: Time) {
        for Attached { volume, holder, epoch } in attached {
            let session = self.sessions.get(volume);
            if session.is_some_and(|s| s.epoch == epoch.0 && s.holders.contains(holder)) {
                self.leases.renew(*volume, holder, by, now);
            }
        }
    }
}
