//! In touch with the MDS: register, beat, watch the map; whichever MDS answers.
//!
//! Trouble is told once when it begins, once when its kind changes, once when it ends.

use super::{Control, ToShard, lock, usage_of};
use crate::shard::{Order, OrderKind};
use client::control::MapWatch;
use protocol::control::{Problem, ProblemKind, pb, shard_from_pb};
use protocol::types::{CopysetId, LogIndex, MEMBERS_MAX, Span, TargetId, Time};
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
            control.mds_at.fetch_add(1, Ordering::Relaxed);
        }
        sleep(pause).await;
    }
}

/// From registration until trouble.
async fn session(control: &Control, trouble: &mut Trouble) -> Result<std::convert::Infallible, Problem> {
    let client = control.mds().clone();
    let registered = client.register(registration(control)).await?;
    control.take_map(registered.map)?;
    heard(control);
    trouble.ends(client.address());
    let mut watch = MapWatch::new(client.clone(), control.map().as_deref());
    // At once, so that the MDS learns of leaders and space without a second's wait.
    let (mut last, mut next) = (Instant::now(), Instant::now());
    loop {
        tokio::select! {
            () = sleep_until(next) => {
                let sent = monotonic_now();
                let beat = client.heartbeat(heartbeat(control)).await?;
                heard(control);
                control.subsystems.set_away(beat.away);
                if let Some(map) = beat.map {
                    control.take_map(map)?;
                }
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
    let usage = usage_of(&shards, control.config.capacity_bytes);
    let state = lock(&control.state);
    let everywhere = control.ports.len();
    let freed = state.freed.iter().filter(|(_, shards)| shards.len() == everywhere);
    pb::HeartbeatRequest {
        target: control.target().0,
        disk_uuid: state.identity.disk.to_vec(),
        known_generation: state.map.as_ref().map_or(0, |map| map.generation),
        usage: Some(usage),
        freed_volumes: freed.map(|(volume, _)| volume.0).collect(),
        failed_shards: state.failed.keys().map(|shard| u32::from(*shard)).collect(),
        replicas: shards.into_iter().flat_map(|shard| shard.replicas).collect(),
    }
}

/// Orders go to all shards, each of which knows what it holds. One that is lost comes again.
fn pass_on(control: &Control, orders: &[pb::Order], sent: Time) {
    let orders: Arc<[Order]> = orders.iter().filter_map(|wanted| order(wanted, sent)).collect();
    if !orders.is_empty() {
        control.tell_all(|| ToShard::Orders(orders.clone()));
    }
}

/// `None` for one that makes no sense, or that this version does not know.
fn order(wanted: &pb::Order, sent: Time) -> Option<Order> {
    use pb::order::What;
    let what = match wanted.what.as_ref()? {
        What::HostOnShard(shard) => OrderKind::Host { shard: u16::try_from(*shard).ok()? },
        What::Voters(voters) if voters.members.len() > MEMBERS_MAX => return None,
        What::Voters(voters) => {
            let members: Result<Vec<_>, _> = voters.members.iter().map(shard_from_pb).collect();
            OrderKind::Voters(members.ok().filter(|members| !members.is_empty())?)
        }
        What::Lead(target) => OrderKind::Lead(TargetId(*target)),
        What::DropAfter(index) => OrderKind::Drop { after: LogIndex(*index) },
    };
    let until = sent + Span::ms(wanted.valid_ms.into());
    Some(Order { copyset: CopysetId(wanted.copyset), what, until })
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
