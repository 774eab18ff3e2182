//! Who answers: this process while it leads, and word of who does while it stands by.
//!
//! One process on a directory always leads. Several on etcd contend: a candidate that leads loads all that
//! is kept, decides anew from it, and is deposed as soon as its lease can no longer be known to hold. What
//! only heartbeats tell begins empty then, as after a start.

use crate::election::{Candidacy, Standing};
use crate::etcd::{Etcd, EtcdAt, Trouble};
use crate::owner::{self, Handle};
use crate::server::{tick, wait_for_owner};
use crate::state::{Policy, State};
use crate::store::{EtcdStore, Store};
use protocol::control::{Problem, ProblemKind};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Between two looks at the election; each is one small read of etcd.
const LOOK: Duration = Duration::from_millis(250);
/// After a failure, before the next attempt.
const PAUSE: Duration = Duration::from_millis(300);
/// How often a leader lets etcd forget what keys held before, which it otherwise keeps for ever.
const COMPACT: Duration = Duration::from_secs(300);

/// Who answers.
#[derive(Clone, Debug)]
pub(crate) enum Seat {
    /// This process.
    Leads(Handle),
    /// Another one, at this address, if any.
    StandsBy(Option<String>),
}

impl Seat {
    /// The way to the state.
    ///
    /// # Errors
    /// `NotLeader`, with who leads.
    pub(crate) fn owner(&self) -> Result<Handle, Problem> {
        match self {
            Self::Leads(owner) => Ok(owner.clone()),
            Self::StandsBy(leader) => Err(Problem::not_leader(leader.as_deref())),
        }
    }
}

/// One of several MDS processes.
#[derive(Debug)]
pub(crate) struct Contender {
    /// Where the records are.
    pub(crate) at: EtcdAt,
    /// Where callers reach this process.
    pub(crate) address: String,
    /// How it decides.
    pub(crate) policy: Policy,
    /// Who answers, told to everybody here.
    pub(crate) seat: watch::Sender<Seat>,
}

impl Contender {
    /// Contends until told to stop, then gives the lead up.
    pub(crate) async fn run(self, mut stop: watch::Receiver<bool>) {
        let etcd = Etcd::new(&self.at);
        let mut trouble = Told::default();
        while !*stop.borrow() {
            let begun = Candidacy::begin(&etcd, &self.at.prefix, &self.address).await;
            let candidacy = match begun {
                Ok(candidacy) => candidacy,
                Err(why) => {
                    self.stand_by(None);
                    trouble.tell(&why);
                    let _ = tokio::time::timeout(PAUSE, stop.wait_for(|stop| *stop)).await;
                    continue;
                }
            };
            trouble.ends();
            if self.await_turn(&candidacy, &mut stop).await
                && let Err(problem) = self.lead(&etcd, &candidacy, &mut stop).await
            {
                tracing::error!(%problem, "this MDS cannot lead");
                let _ = tokio::time::timeout(PAUSE, stop.wait_for(|stop| *stop)).await;
            }
            self.stand_by(None);
            candidacy.resign().await;
        }
    }

    fn stand_by(&self, leader: Option<String>) {
        self.seat.send_if_modified(|seat| {
            let changed = !matches!(seat, Seat::StandsBy(told) if *told == leader);
            if changed {
                tracing::info!(leader = leader.as_deref().unwrap_or("nobody"), "standing by");
                *seat = Seat::StandsBy(leader);
            }
            changed
        });
    }

    /// Whether it is this one's turn; false when the lease is lost, or it is told to stop.
    async fn await_turn(&self, candidacy: &Candidacy, stop: &mut watch::Receiver<bool>) -> bool {
        loop {
            match candidacy.standing(&self.at.prefix).await {
                Ok(Standing::Leads) => return true,
                Ok(Standing::Follows(leader)) => self.stand_by(Some(leader)),
                Ok(Standing::Lost) => return false,
                // A lease that cannot be renewed ends this soon.
                Err(trouble) => tracing::debug!(%trouble, "the election cannot be seen"),
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = candidacy.lost() => return false,
                _ = stop.wait_for(|stop| *stop) => return false,
            }
        }
    }

    /// Leads until deposed or told to stop.
    async fn lead(
        &self,
        etcd: &Etcd,
        candidacy: &Candidacy,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(), Problem> {
        let began = Instant::now();
        let compacting = tokio::spawn(compact(etcd.clone()));
        let (etcd, prefix, policy) = (etcd.clone(), self.at.prefix.clone(), self.policy);
        let (mandate, runtime) = (candidacy.mandate(), tokio::runtime::Handle::current());
        let tenure = mandate.tenure.clone();
        // What takes a second at full size must not hold up the renewals of the lease.
        let load = move || {
            let mut store = EtcdStore::open(&etcd, &prefix, mandate, runtime)?;
            let records = store.load()?;
            let state = State::restore(policy, store.cluster(), records)?;
            Ok((store, state))
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        let (store, state) = loaded.map_err(|error| panicked(&error.to_string()))??;
        let (cluster, generation) = (state.cluster(), state.map().generation);
        let mut lost = store.lost();
        let (owner, thread) = owner::start(state, Box::new(store), Some(tenure))?;
        let ticks = tokio::spawn(tick(owner.clone(), Duration::from_nanos(policy.heartbeat.0)));
        tracing::info!(%cluster, generation, loaded_in = ?began.elapsed(), "this MDS leads");
        self.seat.send_replace(Seat::Leads(owner));
        tokio::select! {
            () = candidacy.lost() => tracing::warn!("the lease is lost: this MDS leads no more"),
            _ = lost.wait_for(|lost| *lost) => tracing::warn!("deposed: this MDS writes nothing more"),
            _ = stop.wait_for(|stop| *stop) => {}
        }
        self.stand_by(None);
        ticks.abort();
        compacting.abort();
        wait_for_owner(thread).await;
        Ok(())
    }
}

/// What keys held up to one round ago is forgotten each round, so that whoever reads now is not disturbed.
async fn compact(etcd: Etcd) {
    let mut before = None;
    loop {
        tokio::time::sleep(COMPACT).await;
        if let Some(revision) = before.take()
            && let Err(trouble) = etcd.compact(revision).await
        {
            tracing::debug!(%trouble, "not compacted");
        }
        before = etcd.revision().await.ok();
    }
}

fn panicked(why: &str) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("the records could not be loaded: {why}"),
        "a bug in this version",
        "report it with the log",
    )
}

/// What is wrong with etcd, told once when it begins and once when it ends.
#[derive(Default)]
struct Told(bool);

impl Told {
    fn tell(&mut self, why: &Trouble) {
        if !std::mem::replace(&mut self.0, true) {
            let problem = why.problem();
            tracing::warn!(%problem, "no election: nobody leads as far as is known here");
        }
    }
    fn ends(&mut self) {
        if std::mem::take(&mut self.0) {
            tracing::info!("etcd answers again");
        }
    }
}
