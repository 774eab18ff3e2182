//! What an MDS tells Prometheus, at `/metrics`; a standby tells only that it is one.

use crate::seat::Seat;
use crate::state::schedule::{Presence, Why};
use crate::state::{State, Usage};
use crate::view;
use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use protocol::types::Time;
use std::fmt::Write;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Serves until it is aborted.
pub(crate) async fn serve(listener: TcpListener, seat: watch::Receiver<Seat>) {
    let page = move || {
        let seat = seat.borrow().clone();
        async move { metrics(seat).await }
    };
    if let Err(error) = axum::serve(listener, Router::new().route("/metrics", get(page))).await {
        tracing::error!(%error, "the metrics server ended; the MDS goes on without it");
    }
}

async fn metrics(seat: Seat) -> impl IntoResponse {
    let told = match seat.owner() {
        Ok(owner) => owner.query(|state, now| Ok(page(state, now))).await.ok(),
        Err(_) => None,
    };
    let mut text = Page::default();
    text.one(
        "ashlar_mds_leads",
        "gauge",
        "1 where this MDS leads, 0 where it stands by.",
        told.is_some().into(),
    );
    let text = text.0 + &told.unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }
    fn one(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.head(name, kind, help);
        let _ = writeln!(self.0, "{name} {value}");
    }
    fn each<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'a str, u64)>,
    ) {
        self.head(name, "gauge", help);
        for (which, value) in values {
            let _ = writeln!(self.0, "{name}{{{label}=\"{which}\"}} {value}");
        }
    }
}

fn page(state: &State, now: Time) -> String {
    let mut page = Page::default();
    let there = |wanted: Presence| {
        state.targets.keys().filter(|id| state.presence(**id, now) == wanted).count() as u64
    };
    let presences =
        [("online", Presence::Online), ("unstable", Presence::Unstable), ("offline", Presence::Offline)];
    page.each(
        "ashlar_mds_targets",
        "Registered targets, by how sure it is that they are there.",
        "presence",
        presences.map(|(word, presence)| (word, there(presence))),
    );
    let (degraded, unavailable) = view::unwell(state, now);
    page.each(
        "ashlar_mds_copysets",
        "Copysets: all, those with too few whole replicas online, those that cannot serve.",
        "which",
        [("all", state.copysets.len() as u64), ("degraded", degraded), ("unavailable", unavailable)],
    );
    let whys = [Why::Recover, Why::Count, Why::Drain, Why::Tidy, Why::Balance];
    let under_way = |why: Why| state.tasks().filter(|(_, task)| task.why == why).count() as u64;
    page.each(
        "ashlar_mds_moves",
        "Changes of replicas under way, by reason.",
        "why",
        whys.map(|why| (why.word(), under_way(why))),
    );
    let (outstanding, eta) = view::outstanding(state);
    let help = "Replicas to be moved, built or taken away, those under way included.";
    page.one("ashlar_mds_moves_outstanding", "gauge", help, outstanding as u64);
    if let Some(eta) = eta {
        let help = "How long that takes at the pace of the last ones; absent when not known.";
        page.one("ashlar_mds_moves_left_seconds", "gauge", help, eta.0 / 1_000_000_000);
    }
    let usage = state.targets.keys().filter(|id| state.is_online(**id, now)).filter_map(|id| state.seen(*id));
    let (mut capacity, mut used) = (0_u64, 0_u64);
    for Usage { capacity: of, used: taken, .. } in usage.map(|seen| seen.usage) {
        (capacity, used) = (capacity.saturating_add(of), used.saturating_add(taken));
    }
    let help = "Chunk slots of targets that are online, in bytes.";
    page.each("ashlar_mds_slots_bytes", help, "which", [("all", capacity), ("used", used)]);
    let pools = state.pools.iter();
    let pools: Vec<_> = pools.map(|(id, pool)| (pool.name.as_str(), pool, *id)).collect();
    let help = "What volumes of a pool may take up, before replication.";
    let room = pools.iter().map(|(name, pool, _)| (*name, state.pool_capacity(pool)));
    page.each("ashlar_mds_pool_capacity_bytes", help, "pool", room);
    let help = "Of chunks of a pool that hold data, before replication.";
    let taken = pools.iter().map(|(name, _, id)| (*name, state.space_of_pool(Some(*id)).allocated));
    page.each("ashlar_mds_pool_allocated_bytes", help, "pool", taken);
    let help = "Of segments of a pool that were ever written, before replication: held against its capacity.";
    let reserved = pools.iter().map(|(name, _, id)| (*name, state.pool_reserved(*id)));
    page.each("ashlar_mds_pool_reserved_bytes", help, "pool", reserved);
    let volumes = state.volumes.values().filter(|volume| volume.is_live()).count();
    page.one("ashlar_mds_volumes", "gauge", "Volumes that are not deleted or in the bin.", volumes as u64);
    let help = "Of the cluster map; grows with each change.";
    page.one("ashlar_mds_map_generation", "counter", help, state.map().generation);
    page.0
}
