//! Who leads among several MDS processes: the one whose key in etcd, beneath the election's prefix, is the
//! oldest (etcd's own recipe). Its key goes with its lease, which it renews.
//!
//! Invariants: a leader takes itself for one only while a renewal that was answered says so, counted from
//! before it was sent, so that it stops before etcd gives the place to another. What it writes is compared
//! with its key besides (`store/etcd.rs`): a process that was stopped and goes on later writes nothing.

use crate::etcd::{Etcd, Trouble, created_at, put};
use crate::lease::Lease;
use protocol::types::{Span, Time};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What is asked of etcd as the length of a lease. It gives no less than 1.5 of its election timeouts.
const LEASE_S: u32 = 2;
/// Renewals within one length of a lease.
const RENEWALS: u32 = 5;

/// Beneath which the candidates' keys are.
pub(crate) fn candidates(prefix: &str) -> String {
    format!("{prefix}/leader/")
}

/// How long one may go on as the leader, by this process's clock.
#[derive(Clone, Debug)]
pub(crate) struct Tenure {
    began: Instant,
    lease: Arc<Lease>,
}

impl Tenure {
    fn new() -> Self {
        Self { began: Instant::now(), lease: Arc::default() }
    }

    fn extend(&self, asked: Instant, length: Duration) {
        let span = Span(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
        self.lease.extend(self.time(asked), span);
    }

    fn end(&self) {
        self.lease.end();
    }

    /// Whether it goes on at this moment.
    pub(crate) fn holds(&self) -> bool {
        self.lease.holds(self.time(Instant::now()))
    }

    fn time(&self, at: Instant) -> Time {
        let after = at.saturating_duration_since(self.began).as_nanos();
        Time(u64::try_from(after).unwrap_or(u64::MAX))
    }
}

/// What a candidate has to show for its place.
#[derive(Clone, Debug)]
pub(crate) struct Mandate {
    /// Its key.
    pub(crate) key: String,
    /// The revision at which that was made.
    pub(crate) revision: i64,
    /// How long its lease holds for sure.
    pub(crate) tenure: Tenure,
}

/// A lease that is renewed until it is dropped or lost, and a candidate's key that goes with it.
#[derive(Debug)]
pub(crate) struct Candidacy {
    etcd: Etcd,
    lease: i64,
    mandate: Mandate,
    lost: watch::Receiver<bool>,
    renewing: JoinHandle<()>,
}

/// What the election says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// This one leads.
    Leads,
    /// Another does, at this address.
    Follows(String),
    /// The key is gone: begin anew.
    Lost,
}

impl Candidacy {
    /// Takes a lease and joins the candidates, so that others find this one at `address` once it leads.
    pub(crate) async fn begin(etcd: &Etcd, prefix: &str, address: &str) -> Result<Self, Trouble> {
        let tenure = Tenure::new();
        let asked = Instant::now();
        let (lease, length) = etcd.grant(LEASE_S).await?;
        tenure.extend(asked, length);
        let key = format!("{}{lease:016x}", candidates(prefix));
        let request = crate::etcd::pb::TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![put(key.clone(), address, lease)],
            failure: Vec::new(),
        };
        let written = etcd.txn(request).await?;
        let (tell, lost) = watch::channel(false);
        let renewing = tokio::spawn(renew(etcd.clone(), lease, length, tenure.clone(), tell));
        // Written once, so that the answer's revision is that of its making.
        let revision = written.header.map_or(0, |header| header.revision);
        let mandate = Mandate { key, revision, tenure };
        Ok(Self { etcd: etcd.clone(), lease, mandate, lost, renewing })
    }

    /// Whose key is the oldest.
    pub(crate) async fn standing(&self, prefix: &str) -> Result<Standing, Trouble> {
        if *self.lost.borrow() {
            return Ok(Standing::Lost);
        }
        Ok(match self.etcd.oldest(&candidates(prefix)).await? {
            None => Standing::Lost,
            Some(first) if self.is_own(&first) => Standing::Leads,
            Some(first) => Standing::Follows(String::from_utf8_lossy(&first.value).into_owned()),
        })
    }

    fn is_own(&self, first: &crate::etcd::pb::KeyValue) -> bool {
        first.key == self.mandate.key.as_bytes() && first.create_revision == self.mandate.revision
    }

    /// What makes it the leader, once it leads.
    pub(crate) fn mandate(&self) -> Mandate {
        self.mandate.clone()
    }

    #[cfg(test)]
    pub(crate) fn lease_id(&self) -> i64 {
        self.lease
    }

    /// As a process that was stopped for long, and has not looked at a clock since.
    #[cfg(test)]
    pub(crate) fn believe_for_ever(&self) {
        self.renewing.abort();
        self.mandate.tenure.extend(Instant::now(), Duration::from_secs(3600));
    }

    /// Resolves when the lease is lost, or can no longer be known to hold.
    pub(crate) async fn lost(&self) {
        let _ = self.lost.clone().wait_for(|lost| *lost).await;
    }

    /// Gives the place up, so that nobody waits for the lease to run out.
    pub(crate) async fn resign(self) {
        self.mandate.tenure.end();
        self.renewing.abort();
        if let Err(trouble) = self.etcd.revoke(self.lease).await {
            tracing::debug!(%trouble, "the lease was not given back; it runs out by itself");
        }
    }
}

impl Drop for Candidacy {
    fn drop(&mut self) {
        self.mandate.tenure.end();
        self.renewing.abort();
    }
}

/// Renews a lease until it is over.
async fn renew(etcd: Etcd, lease: i64, length: Duration, tenure: Tenure, lost: watch::Sender<bool>) {
    let mut pause = length / RENEWALS;
    while tenure.holds() {
        tokio::time::sleep(pause).await;
        let sent = Instant::now();
        match etcd.keep_alive(lease, length / RENEWALS).await {
            Ok(Duration::ZERO) => break,
            Ok(length) => {
                tenure.extend(sent, length);
                pause = length / RENEWALS;
            }
            Err(trouble) => {
                tracing::debug!(%trouble, "the lease was not renewed");
                pause = Duration::from_millis(50);
            }
        }
    }
    tenure.end();
    lost.send_replace(true);
}
