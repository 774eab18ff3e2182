//! The gRPC service for operators and tests; see `protocol/proto/admin.proto`.

use super::agent::usage_of;
use super::{Control, ShardHandle, ToShard, lock};
use protocol::control::pb::target_admin_server::{TargetAdmin, TargetAdminServer};
use protocol::control::{Problem, ProblemKind, pb};
use protocol::types::{CopysetId, SessionEpoch, TargetId, VolumeId};
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

/// Records that may wait between shards and a reader of checksums.
const CHECKSUMS_WAITING_MAX: usize = 256;
/// How long a shard may take to answer.
const SHARD_PATIENCE: Duration = Duration::from_secs(5);
/// How long fences may take to rise; then the caller asks again.
const FENCE_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether a newer map has come.
const MAP_LOOK: Duration = Duration::from_millis(10);

/// Serves until the listener fails.
pub(super) async fn serve(
    control: Arc<Control>,
    listener: TcpListener,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener)?);
    let service = TargetAdminServer::new(Admin { control });
    tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await?;
    Ok(())
}

struct Admin {
    control: Arc<Control>,
}

impl Admin {
    /// The volume, if the map has it, being deleted or not.
    fn volume(&self, id: u32) -> Result<VolumeId, Problem> {
        let known = self.control.map().is_some_and(|map| map.volumes.contains_key(&VolumeId(id)));
        known.then_some(VolumeId(id)).ok_or_else(|| {
            Problem::new(
                ProblemKind::NotFound,
                format!("no volume {id} is known to this target"),
                "it does not exist, or the target's map is older than it",
                "see `ashlar volume ls`; repeat when the target reached the MDS again",
            )
        })
    }

    /// Under which epoch hosts attach to a volume, by the map in force.
    fn epoch(&self, id: VolumeId) -> Result<SessionEpoch, Problem> {
        self.volume(id.0)?;
        let map = self.control.map();
        Ok(map.and_then(|map| map.volumes.get(&id).map(|v| v.session.epoch)).unwrap_or_default())
    }

    /// The shard that holds a copyset's replica, by what it posted last.
    fn holder(&self, copyset: CopysetId) -> Result<&ShardHandle, Problem> {
        let holds = |port: &&ShardHandle| {
            port.status().is_some_and(|status| status.replicas.iter().any(|r| r.copyset == copyset.0))
        };
        self.control.ports.iter().find(holds).ok_or_else(|| {
            Problem::new(
                ProblemKind::NotFound,
                format!("this target holds no replica of copyset {copyset}"),
                "it lies on other targets",
                "see `ashlar status` for where it lies",
            )
        })
    }
}

#[tonic::async_trait]
impl TargetAdmin for Admin {
    async fn status(
        &self,
        _: Request<pb::AdminStatusRequest>,
    ) -> Result<Response<pb::AdminStatusResponse>, Status> {
        let control = &self.control;
        let shards = control.shard_statuses();
        let state = lock(&control.state);
        let age = state.mds_heard.map(|at| at.elapsed().as_millis() as u64);
        Ok(Response::new(pb::AdminStatusResponse {
            target: control.target().0,
            cluster: state.identity.cluster.map(Vec::from).unwrap_or_default(),
            disk_uuid: state.identity.disk.to_vec(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ms: control.process.started.elapsed().as_millis() as u64,
            map_generation: state.agent.map().map_or(0, |map| map.generation),
            mds_age_ms: age,
            endpoints: Some(control.endpoints()),
            usage: Some(usage_of(&shards, control.config.capacity_bytes)),
            shards,
        }))
    }

    type ChunkChecksumsStream = Pin<Box<dyn Stream<Item = Result<pb::ChunkChecksum, Status>> + Send>>;

    async fn chunk_checksums(
        &self,
        request: Request<pb::ChunkChecksumsRequest>,
    ) -> Result<Response<Self::ChunkChecksumsStream>, Status> {
        let pb::ChunkChecksumsRequest { volume, verify } = request.into_inner();
        let volume = self.volume(volume)?;
        let (reply, records) = mpsc::channel(CHECKSUMS_WAITING_MAX);
        for port in &self.control.ports {
            let ask = ToShard::Checksums { volume, verify, reply: reply.clone() };
            port.send(ask).map_err(|_| busy())?;
        }
        let records = ReceiverStream::new(records).map(|record| record.map_err(Status::from));
        Ok(Response::new(Box::pin(records)))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        let copyset = CopysetId(request.copyset);
        let (reply, answer) = oneshot::channel();
        let ask = ToShard::TransferLeader { copyset, to: TargetId(request.to), reply };
        self.holder(copyset)?.send(ask).map_err(|_| busy())?;
        answered(answer).await??;
        Ok(Response::new(pb::TransferLeaderResponse {}))
    }

    async fn fence_volume(
        &self,
        request: Request<pb::FenceVolumeRequest>,
    ) -> Result<Response<pb::FenceVolumeResponse>, Status> {
        let pb::FenceVolumeRequest { volume, epoch } = request.into_inner();
        let (volume, epoch) = (VolumeId(volume), SessionEpoch(epoch));
        let end = tokio::time::Instant::now() + FENCE_PATIENCE;
        while self.epoch(volume)? < epoch {
            if tokio::time::Instant::now() >= end {
                return Err(map_is_old(volume, epoch).into());
            }
            tokio::time::sleep(MAP_LOOK).await;
        }
        let mut answer = None;
        for port in &self.control.ports {
            let (reply, told) = oneshot::channel();
            // The next one, where this one takes nothing.
            if port.send(ToShard::Fence { volume, epoch, reply }).is_ok() {
                answer = Some(told);
                break;
            }
        }
        match tokio::time::timeout_at(end, answer.ok_or_else(busy)?).await {
            Ok(answer) => answer.map_err(|_| busy())??,
            Err(_) => return Err(fence_waits(volume).into()),
        }
        Ok(Response::new(pb::FenceVolumeResponse {}))
    }

    async fn list_connections(
        &self,
        _: Request<pb::ListConnectionsRequest>,
    ) -> Result<Response<pb::ListConnectionsResponse>, Status> {
        let mut connections = Vec::new();
        for port in &self.control.ports {
            let (reply, answer) = oneshot::channel();
            port.send(ToShard::Connections { reply }).map_err(|_| busy())?;
            connections.extend(answered(answer).await?);
        }
        Ok(Response::new(pb::ListConnectionsResponse { connections }))
    }

    async fn start_scrub(
        &self,
        request: Request<pb::StartScrubRequest>,
    ) -> Result<Response<pb::StartScrubResponse>, Status> {
        let volume = match request.into_inner().volume {
            0 => None,
            id => Some(self.volume(id)?),
        };
        for port in &self.control.ports {
            port.send(ToShard::Scrub { volume }).map_err(|_| busy())?;
        }
        Ok(Response::new(pb::StartScrubResponse {}))
    }
}

async fn answered<T>(answer: oneshot::Receiver<T>) -> Result<T, Problem> {
    match tokio::time::timeout(SHARD_PATIENCE, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        // The shard dropped the question: it is stopping.
        Ok(Err(_)) => Err(busy()),
        Err(_) => Err(Problem::new(
            ProblemKind::TimedOut,
            "a shard did not answer within 5 s",
            "it is overloaded, or its disk hangs",
            "see the target's log and metrics, then repeat",
        )),
    }
}

fn map_is_old(volume: VolumeId, epoch: SessionEpoch) -> Problem {
    Problem::new(
        ProblemKind::TimedOut,
        format!("this target's map knows nothing of epoch {epoch} of volume {volume}"),
        "it does not reach the MDS",
        "ask another target, or repeat when it does",
    )
}

fn fence_waits(volume: VolumeId) -> Problem {
    Problem::new(
        ProblemKind::TimedOut,
        format!("the fence of volume {volume} has not risen in all of its copysets within 5 s"),
        "one of them has no leader or no quorum",
        "repeat; see `ashlar status` for copysets without a leader",
    )
}

fn busy() -> Problem {
    Problem::new(
        ProblemKind::Limit,
        "a shard takes no messages",
        "its queue is full, it failed, or it is stopping",
        "see the target's status and log, then repeat",
    )
}
