//! The gRPC service: what is asked is checked (`intake`), decided by the owner and answered.

use crate::owner::Handle;
use crate::seat::Seat;
use crate::state::{Command, Reply, State};
use crate::{intake, view};
use protocol::control::pb::mds_server::Mds;
use protocol::control::{Problem, pb, protocol_from_pb};
use protocol::types::{ChunkId, TargetId, VolumeId};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// The longest that GetMap waits.
const MAP_WAIT_MAX: Duration = Duration::from_secs(30);

/// Of a snapshot, a message.
const PIECE_BYTES: usize = 1 << 20;

pub(crate) struct Service {
    seat: watch::Receiver<Seat>,
    /// Turns true when the server stops: whoever waits for a map is let go.
    stopping: watch::Receiver<bool>,
}

impl Service {
    pub(crate) fn new(seat: watch::Receiver<Seat>, stopping: watch::Receiver<bool>) -> Self {
        Self { seat, stopping }
    }

    /// The way to the state, where this process leads.
    fn owner(&self) -> Result<Handle, Problem> {
        self.seat.borrow().owner()
    }

    async fn volume_id(&self, volume: Option<pb::VolumeRef>) -> Result<VolumeId, Problem> {
        let volume = intake::volume_ref(volume)?;
        self.owner()?.query(move |state, _| state.find_volume(&volume).map(|(id, _)| id)).await
    }

    /// Attaches or detaches a host; tells the volume and the generation of the map that has it so.
    async fn change_session(&self, command: Command) -> Result<(pb::Volume, u64), Problem> {
        let view = |reply, state: &State, now| {
            let volume = view::volume(state, now, volume_in(&reply))?;
            Ok((volume, state.map().generation))
        };
        let (volume, generation) = self.owner()?.command(command, view).await?;
        let pb::Session { epoch, exclusive, holders } = volume.session.clone().unwrap_or_default();
        let holders: Vec<&str> = holders.iter().map(|holder| holder.name.as_str()).collect();
        tracing::info!(volume = volume.name, epoch, exclusive, ?holders, "session changed");
        Ok((volume, generation))
    }
}

/// The map if newer than known.
fn newer_than(owner: &Handle, known: u64) -> Option<pb::ClusterMap> {
    newer(&owner.map(), known).map(|map| (*map).clone())
}

fn newer(map: &watch::Receiver<Arc<pb::ClusterMap>>, known: u64) -> Option<Arc<pb::ClusterMap>> {
    let map = map.borrow();
    (map.generation > known).then(|| map.clone())
}

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(value: T) -> Answer<T> {
    Ok(Response::new(value))
}

#[tonic::async_trait]
impl Mds for Service {
    async fn register_target(
        &self,
        request: Request<pb::RegisterTargetRequest>,
    ) -> Answer<pb::RegisterTargetResponse> {
        let registration = intake::registration(request.into_inner())?;
        let (id, owner) = (registration.id, self.owner()?);
        let command = Command::Register(registration);
        let cluster = owner.command(command, |_, state, _| Ok(state.cluster())).await;
        let cluster = cluster
            .inspect_err(|problem| tracing::warn!(target_id = id.0, %problem, "registration refused"))?;
        tracing::info!(target_id = id.0, "target registered");
        answer(pb::RegisterTargetResponse { cluster: cluster.0.to_vec(), map: newer_than(&owner, 0) })
    }

    async fn heartbeat(&self, request: Request<pb::HeartbeatRequest>) -> Answer<pb::HeartbeatResponse> {
        let beat = intake::heartbeat(request.into_inner())?;
        let (known, target, owner) = (beat.known_generation, beat.target, self.owner()?);
        let told = move |reply, state: &crate::state::State, now| match reply {
            Reply::Orders(orders) => Ok(pb::HeartbeatResponse {
                map: None,
                interval_ms: (state.policy().heartbeat.0 / 1_000_000) as u32,
                away: view::away(state, now),
                orders,
                wants_volumes: state.wants_slots(target),
            }),
            other => unreachable!("a heartbeat is answered by orders, not {other:?}"),
        };
        let response = owner.command(Command::Heartbeat(beat), told).await?;
        answer(pb::HeartbeatResponse { map: newer_than(&owner, known), ..response })
    }

    async fn get_map(&self, request: Request<pb::GetMapRequest>) -> Answer<pb::GetMapResponse> {
        let pb::GetMapRequest { known_generation: known, wait_ms } = request.into_inner();
        let wait = Duration::from_millis(wait_ms.into()).min(MAP_WAIT_MAX);
        let owner = self.owner()?;
        let (mut map, mut stopping) = (owner.map(), self.stopping.clone());
        if !wait.is_zero() && known != 0 {
            tokio::select! {
                _ = map.wait_for(|map| map.generation > known) => {}
                _ = stopping.wait_for(|stopping| *stopping) => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        let leaders = owner.query(|state, now| Ok(view::leaders(state, now))).await?;
        answer(pb::GetMapResponse { map: newer_than(&owner, known), leaders })
    }

    type WatchMapStream = ReceiverStream<Result<pb::ClusterMap, Status>>;

    async fn watch_map(&self, request: Request<pb::WatchMapRequest>) -> Answer<Self::WatchMapStream> {
        let known = request.into_inner().known_generation;
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(feed(self.owner()?.map(), self.stopping.clone(), known, send));
        answer(ReceiverStream::new(receive))
    }

    async fn get_route(&self, request: Request<pb::GetRouteRequest>) -> Answer<pb::GetRouteResponse> {
        let pb::GetRouteRequest { volume, chunk } = request.into_inner();
        let chunk = ChunkId { volume: VolumeId(volume), index: chunk };
        answer(self.owner()?.query(move |state, now| view::route(state, now, chunk)).await?)
    }

    async fn allocate_segments(
        &self,
        request: Request<pb::AllocateSegmentsRequest>,
    ) -> Answer<pb::AllocateSegmentsResponse> {
        let command = intake::allocate(request.into_inner())?;
        let bytes = |reply, _: &_, _| match reply {
            Reply::Allocated(bytes) => Ok(bytes),
            other => unreachable!("an allocation is answered by its bytes, not {other:?}"),
        };
        let allocated_bytes = self.owner()?.command(command, bytes).await?;
        answer(pb::AllocateSegmentsResponse { allocated_bytes })
    }

    async fn create_pool(&self, request: Request<pb::CreatePoolRequest>) -> Answer<pb::CreatePoolResponse> {
        let command = intake::create_pool(request.into_inner())?;
        let view = |reply, state: &_, _| match reply {
            Reply::Pool(id) => Ok(view::pool(state, id)),
            other => unreachable!("a pool is answered by its id, not {other:?}"),
        };
        answer(pb::CreatePoolResponse { pool: Some(self.owner()?.command(command, view).await?) })
    }

    async fn create_volume(
        &self,
        request: Request<pb::CreateVolumeRequest>,
    ) -> Answer<pb::CreateVolumeResponse> {
        let command = intake::create_volume(request.into_inner());
        let view = |reply, state: &_, now| view::volume(state, now, volume_in(&reply));
        answer(pb::CreateVolumeResponse { volume: Some(self.owner()?.command(command, view).await?) })
    }

    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Answer<pb::ListVolumesResponse> {
        let deleting = request.into_inner().deleting;
        let volumes = self.owner()?.query(move |state, now| Ok(view::volumes(state, now, deleting))).await?;
        answer(pb::ListVolumesResponse { volumes })
    }

    async fn stat_volume(&self, request: Request<pb::StatVolumeRequest>) -> Answer<pb::StatVolumeResponse> {
        let id = self.volume_id(request.into_inner().volume).await?;
        answer(self.owner()?.query(move |state, now| view::stat(state, now, id)).await?)
    }

    async fn resize_volume(
        &self,
        request: Request<pb::ResizeVolumeRequest>,
    ) -> Answer<pb::ResizeVolumeResponse> {
        let command = intake::resize_volume(request.into_inner())?;
        let view = |reply, state: &_, now| view::volume(state, now, volume_in(&reply));
        answer(pb::ResizeVolumeResponse { volume: Some(self.owner()?.command(command, view).await?) })
    }

    async fn delete_volume(
        &self,
        request: Request<pb::DeleteVolumeRequest>,
    ) -> Answer<pb::DeleteVolumeResponse> {
        let command = intake::delete_volume(request.into_inner(), unix_s())?;
        let id = self.owner()?.command(command, |reply, _, _| Ok(volume_in(&reply))).await?;
        answer(pb::DeleteVolumeResponse { id: id.0 })
    }

    async fn undelete_volume(
        &self,
        request: Request<pb::UndeleteVolumeRequest>,
    ) -> Answer<pb::UndeleteVolumeResponse> {
        let command = intake::undelete_volume(request.into_inner())?;
        let view = |reply, state: &_, now| view::volume(state, now, volume_in(&reply));
        answer(pb::UndeleteVolumeResponse { volume: Some(self.owner()?.command(command, view).await?) })
    }

    async fn rename_volume(
        &self,
        request: Request<pb::RenameVolumeRequest>,
    ) -> Answer<pb::RenameVolumeResponse> {
        let command = intake::rename_volume(request.into_inner())?;
        let view = |reply, state: &_, now| view::volume(state, now, volume_in(&reply));
        answer(pb::RenameVolumeResponse { volume: Some(self.owner()?.command(command, view).await?) })
    }

    async fn attach_volume(
        &self,
        request: Request<pb::AttachVolumeRequest>,
    ) -> Answer<pb::AttachVolumeResponse> {
        let (volume, generation) = self.change_session(intake::attach(request.into_inner())?).await?;
        answer(pb::AttachVolumeResponse { volume: Some(volume), generation })
    }

    async fn detach_volume(
        &self,
        request: Request<pb::DetachVolumeRequest>,
    ) -> Answer<pb::DetachVolumeResponse> {
        let (volume, generation) = self.change_session(intake::detach(request.into_inner())?).await?;
        answer(pb::DetachVolumeResponse { volume: Some(volume), generation })
    }

    async fn remove_target(
        &self,
        request: Request<pb::RemoveTargetRequest>,
    ) -> Answer<pb::RemoveTargetResponse> {
        let target = TargetId(request.into_inner().target);
        self.owner()?.command(Command::RemoveTarget(target), |_, _, _| Ok(())).await?;
        tracing::info!(target_id = target.0, "target removed");
        answer(pb::RemoveTargetResponse {})
    }

    async fn add_export(&self, request: Request<pb::AddExportRequest>) -> Answer<pb::AddExportResponse> {
        let request = request.into_inner();
        let protocol = protocol_from_pb(request.protocol)?;
        let command = intake::add_export(request)?;
        let view = move |reply, state: &_, now| view::export(state, now, volume_in(&reply), protocol);
        answer(pb::AddExportResponse { export: Some(self.owner()?.command(command, view).await?) })
    }

    async fn remove_export(
        &self,
        request: Request<pb::RemoveExportRequest>,
    ) -> Answer<pb::RemoveExportResponse> {
        let pb::RemoveExportRequest { volume, protocol } = request.into_inner();
        let command = Command::RemoveExport(intake::volume_ref(volume)?, protocol_from_pb(protocol)?);
        self.owner()?.command(command, |_, _, _| Ok(())).await?;
        answer(pb::RemoveExportResponse {})
    }

    async fn list_exports(
        &self,
        request: Request<pb::ListExportsRequest>,
    ) -> Answer<pb::ListExportsResponse> {
        let of = match request.into_inner().volume {
            None => None,
            volume => Some(self.volume_id(volume).await?),
        };
        let exports = self.owner()?.query(move |state, now| view::exports(state, now, of)).await?;
        answer(pb::ListExportsResponse { exports })
    }

    async fn drain_target(
        &self,
        request: Request<pb::DrainTargetRequest>,
    ) -> Answer<pb::DrainTargetResponse> {
        let pb::DrainTargetRequest { target, draining } = request.into_inner();
        let target = TargetId(target);
        let command = Command::Drain { target, draining };
        let view = move |_, state: &_, now| Ok(view::target_of(state, now, target));
        let shown = self.owner()?.command(command, view).await?;
        tracing::info!(target_id = target.0, draining, "drain");
        answer(pb::DrainTargetResponse { target: shown })
    }

    type SnapshotStream = ReceiverStream<Result<pb::SnapshotPiece, Status>>;

    async fn snapshot(&self, _: Request<pb::SnapshotRequest>) -> Answer<Self::SnapshotStream> {
        let snapshot = self.owner()?.snapshot().await?;
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(async move {
            for piece in snapshot.encode().chunks(PIECE_BYTES) {
                if send.send(Ok(pb::SnapshotPiece { bytes: piece.to_vec() })).await.is_err() {
                    return;
                }
            }
        });
        answer(ReceiverStream::new(receive))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Answer<pb::StatusResponse> {
        answer(self.owner()?.query(|state, now| Ok(view::status(state, now))).await?)
    }
}

/// Sends each newer map until the watcher leaves or the server stops.
async fn feed(
    mut map: watch::Receiver<Arc<pb::ClusterMap>>,
    mut stopping: watch::Receiver<bool>,
    mut known: u64,
    send: mpsc::Sender<Result<pb::ClusterMap, Status>>,
) {
    loop {
        tokio::select! {
            changed = map.wait_for(|map| map.generation > known) => if changed.is_err() { return },
            _ = stopping.wait_for(|stopping| *stopping) => return,
            () = send.closed() => return,
        }
        let Some(newer) = newer(&map, known) else { continue };
        known = newer.generation;
        if send.send(Ok((*newer).clone())).await.is_err() {
            return;
        }
    }
}

/// Seconds since 1970, by this machine's clock.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn volume_in(reply: &Reply) -> VolumeId {
    match reply {
        Reply::Volume(id) => *id,
        other => unreachable!("this command is answered by a volume, not {other:?}"),
    }
}
