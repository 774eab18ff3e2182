//! In touch with the MDS: register, beat, watch the map; whichever MDS answers.
//!
//! Trouble is told once when it begins, once when its kind changes, once when it ends.

use super::{Control, ToShard, lock};
use crate::shard::Order;
use client::control::MapWatch;
use protocol::control::{Problem, ProblemKind, pb};
use protocol::types::Time;
use reactor::clock::monotonic_now;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// The first and the longest pause before another attempt.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A shard's wish for a map is not followed more often.
const BEAT_EARLY_MIN: Duration = Duration::from_millis(100);

/// Never ends.
pub(super) async fn keep_in_touch(control: &Control) {
    let mut trouble = Trouble::default();
    let mut pause = RETRY_MIN;
    loop {
        let Err(problem) = session(control, &mut trouble).await;
        control.process.mds_reachable.store(false, Ordering::Relaxed);
        if problem.kind != ProblemKind::UnknownTarget {
            trouble.begins(control, &problem);
            pause = if trouble.is_new { RETRY_MIN } else { (pause * 2).min(RETRY_MAX) };
        }
        sleep(pause).await;
    }
}

/// From registration until trouble.
async fn session(control: &Control, trouble: &mut Trouble) -> Result<std::convert::Infallible, Problem> {
    let client = control.mds.clone();
    let registered = client.register(registration(control)).await?;
    control.take_map(registered.map)?;
    heard(control);
    trouble.ends(&client.address());
    let mut watch = MapWatch::new(client.clone(), control.map().as_deref());
    // At once, so that the MDS learns of leaders and space without a second's wait.
    let (mut last, mut next) = (Instant::now(), Instant::now());
    loop {
        tokio::select! {
            () = sleep_until(next) => {
                let sent = monotonic_now();
                let beat = client.heartbeat(heartbeat(control)).await?;
                heard(control);
                lock(&control.state).agent.answered(beat.wants_volumes);
                control.subsystems.set_away(beat.away);
                if let Some(map) = beat.map {
                    control.take_map(map)?;
                }
                control.keep_map();
                pass_on(control, &beat.orders, sent);
                last = Instant::now();
                next = last + beat.interval;
            }
            // Its failures show in the heartbeat too, where they are told.
            Ok(map) = watch.next() => control.take_map(map)?,
            () = control.need_map.notified() => next = next.min(last + BEAT_EARLY_MIN),
            else => sleep(RETRY_MIN).await,
        }
    }
}

fn heard(control: &Control) {
    control.process.mds_reachable.store(true, Ordering::Relaxed);
    lock(&control.state).mds_heard = Some(std::time::Instant::now());
}

fn registration(control: &Control) -> pb::RegisterTargetRequest {
    let state = lock(&control.state);
    let peers = control.config.listen.peer.iter();
    pb::RegisterTargetRequest {
        id: control.target().0,
        cluster: state.identity.cluster.map(Vec::from).unwrap_or_default(),
        disk_uuid: state.identity.disk.to_vec(),
        peers: peers.map(|address| control.config.advertised(*address).to_string()).collect(),
        endpoints: Some(control.endpoints()),
        capacity_bytes: control.config.capacity_bytes,
        zone: control.config.topology.zone.clone(),
        host: control.config.topology.host.clone(),
        labels: control.config.topology.labels.clone().into_iter().collect(),
    }
}

fn heartbeat(control: &Control) -> pb::HeartbeatRequest {
    let shards = control.shard_statuses();
    lock(&control.state).agent.heartbeat(shards, control.config.capacity_bytes)
}

fn pass_on(control: &Control, orders: &[pb::Order], sent: Time) {
    let orders: Arc<[Order]> = lock(&control.state).agent.orders(orders, sent).into();
    if !orders.is_empty() {
        control.tell_all(|| ToShard::Orders(orders.clone()));
    }
}

/// What is wrong between the MDS and us, so that it is told once.
#[derive(Default)]
struct Trouble {
    kind: Option<ProblemKind>,
    is_new: bool,
}

impl Trouble {
    fn begins(&mut self, control: &Control, problem: &Problem) {
        self.is_new = self.kind.is_none();
        if self.kind == Some(problem.kind) {
            return;
        }
        self.kind = Some(problem.kind);
        match control.map() {
            Some(map) => {
                tracing::warn!(%problem, generation = map.generation, "no MDS; IO goes on by the map in force");
            }
            None => tracing::warn!(%problem, "no MDS, and no map yet: nothing is served until one answers"),
        }
    }
    fn ends(&mut self, address: &str) {
        self.is_new = false;
        if self.kind.take().is_some() {
            tracing::info!("the MDS at {address} answers again");
        }
    }
}
