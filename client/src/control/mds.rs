//! The client of the MDS.

use super::{Link, Patience};
use protocol::control::pb::mds_client::MdsClient as Stub;
use protocol::control::{Problem, limits, map_from_pb, pb, protocol_to_pb};
use protocol::map::{ClusterMap, ExportProtocol};
use protocol::types::{ChunkId, TargetId, VolumeId};
use std::collections::BTreeSet;
use std::time::Duration;
use tonic::transport::Channel;

/// The bounds of what an MDS may ask for as the pause between heartbeats.
const BEAT_MIN: Duration = Duration::from_millis(20);
const BEAT_MAX: Duration = Duration::from_secs(30);

/// Talks to the MDS. Clones share one connection.
#[derive(Clone, Debug)]
pub struct MdsClient {
    link: Link,
}

/// The answer to a registration.
#[derive(Clone, Debug)]
pub struct Registered {
    /// The cluster that the disk belongs to from now on.
    pub cluster: [u8; 16],
    /// The current map; the target is in it.
    pub map: ClusterMap,
}

/// The answer to a heartbeat.
#[derive(Clone, Debug)]
pub struct Beat {
    /// A map newer than the one known, if there is one.
    pub map: Option<ClusterMap>,
    /// When to send the next.
    pub interval: Duration,
    /// Targets that the MDS has not heard of for a while.
    pub away: BTreeSet<TargetId>,
    /// What is wanted of replicas on the target.
    pub orders: Vec<pb::Order>,
    /// The next is to tell the space of all volumes.
    pub wants_volumes: bool,
}

/// A volume by its name, as requests have it.
pub fn volume_ref(name: &str) -> pb::VolumeRef {
    pb::VolumeRef { id: 0, name: name.to_owned() }
}

impl MdsClient {
    /// A client of the MDS at `HOST:PORT`, or at several such addresses separated by commas, one of which
    /// leads; connects at the first call. Must be made within a tokio runtime.
    ///
    /// # Errors
    /// When an address is not of that form.
    pub fn new(addresses: &str, patience: Patience) -> Result<Self, Problem> {
        Ok(Self { link: Link::new("MDS", addresses, patience)? })
    }

    /// The address that is asked now.
    pub fn address(&self) -> String {
        self.link.here().1.address
    }

    /// Joins the cluster, or comes back to it; see `RegisterTargetRequest`.
    pub async fn register(&self, request: pb::RegisterTargetRequest) -> Result<Registered, Problem> {
        let response = self.link.repeat(async |c| stub(c).register_target(request.clone()).await).await?;
        let map = self.map(response.map)?.ok_or_else(|| self.link.nonsense("no map"))?;
        if response.cluster != map.cluster {
            return Err(self.link.nonsense("a map of another cluster"));
        }
        Ok(Registered { cluster: map.cluster, map })
    }

    /// Reports what a target sees; see `HeartbeatRequest`.
    ///
    /// # Errors
    /// `UnknownTarget`: register again, then go on.
    pub async fn heartbeat(&self, request: pb::HeartbeatRequest) -> Result<Beat, Problem> {
        let response = self.link.repeat(async |c| stub(c).heartbeat(request.clone()).await).await?;
        let interval = Duration::from_millis(response.interval_ms.into()).clamp(BEAT_MIN, BEAT_MAX);
        let away = response.away.into_iter().map(TargetId).collect();
        let pb::HeartbeatResponse { map, orders, wants_volumes, .. } = response;
        Ok(Beat { map: self.map(map)?, interval, away, orders, wants_volumes })
    }

    /// The current map if newer than `known` (0: any), and the last reported leaders.
    pub async fn map_newer_than(
        &self,
        known: u64,
    ) -> Result<(Option<ClusterMap>, Vec<pb::LeaderHint>), Problem> {
        let request = pb::GetMapRequest { known_generation: known, wait_ms: 0 };
        let response = self.link.repeat(async |c| stub(c).get_map(request).await).await?;
        Ok((self.map(response.map)?, response.leaders))
    }

    /// The current map.
    pub async fn map_now(&self) -> Result<ClusterMap, Problem> {
        self.map_newer_than(0).await?.0.ok_or_else(|| self.link.nonsense("no map"))
    }

    /// Which copyset holds a chunk, where its replicas are and who was last said to lead it.
    pub async fn route(&self, chunk: ChunkId) -> Result<pb::GetRouteResponse, Problem> {
        let request = pb::GetRouteRequest { volume: chunk.volume.0, chunk: chunk.index };
        self.link.repeat(async |c| stub(c).get_route(request).await).await
    }

    /// Accounts for segments of a volume at their first write; returns the bytes that the volume
    /// has allocated. Idempotent, all or nothing.
    ///
    /// # Errors
    /// `NoSpace`: refuse the write. `Unreachable`, `TimedOut`: let the write go on and ask again later.
    pub async fn allocate(&self, volume: VolumeId, segments: &[u32]) -> Result<u64, Problem> {
        let request = pb::AllocateSegmentsRequest { volume: volume.0, segments: segments.to_vec() };
        let call = async |c| stub(c).allocate_segments(request.clone()).await;
        Ok(self.link.repeat(call).await?.allocated_bytes)
    }

    /// Creates a pool and its copysets. Carried out once at most.
    pub async fn create_pool(&self, request: pb::CreatePoolRequest) -> Result<pb::Pool, Problem> {
        let response = self.single(async |c| stub(c).create_pool(request.clone()).await).await?;
        response.pool.ok_or_else(|| self.link.nonsense("no pool"))
    }

    /// Creates a volume. `block_bytes` 0 means 4096, `pool` empty means "default". Carried out once at most.
    pub async fn create_volume(
        &self,
        name: &str,
        bytes: u64,
        block_bytes: u32,
        pool: &str,
    ) -> Result<pb::Volume, Problem> {
        let request =
            pb::CreateVolumeRequest { name: name.to_owned(), bytes, block_bytes, pool: pool.to_owned() };
        let response = self.single(async |c| stub(c).create_volume(request.clone()).await).await?;
        response.volume.ok_or_else(|| self.link.nonsense("no volume"))
    }

    /// Every volume; those being deleted too when asked for.
    pub async fn volumes(&self, deleting: bool) -> Result<Vec<pb::Volume>, Problem> {
        let request = pb::ListVolumesRequest { deleting };
        Ok(self.link.repeat(async |c| stub(c).list_volumes(request).await).await?.volumes)
    }

    /// One volume with its allocation.
    pub async fn stat_volume(&self, volume: pb::VolumeRef) -> Result<pb::StatVolumeResponse, Problem> {
        let request = pb::StatVolumeRequest { volume: Some(volume) };
        self.link.repeat(async |c| stub(c).stat_volume(request.clone()).await).await
    }

    /// Makes a volume larger. Idempotent.
    pub async fn resize_volume(&self, volume: pb::VolumeRef, bytes: u64) -> Result<pb::Volume, Problem> {
        let request = pb::ResizeVolumeRequest { volume: Some(volume), bytes };
        let call = async |c| stub(c).resize_volume(request.clone()).await;
        self.link.repeat(call).await?.volume.ok_or_else(|| self.link.nonsense("no volume"))
    }

    /// Puts a volume into the bin for so many seconds; 0: its chunks are freed now. Carried out once at most.
    pub async fn delete_volume(&self, volume: pb::VolumeRef, keep_s: u32) -> Result<VolumeId, Problem> {
        let request = pb::DeleteVolumeRequest { volume: Some(volume), keep_s };
        let response = self.single(async |c| stub(c).delete_volume(request.clone()).await).await?;
        Ok(VolumeId(response.id))
    }

    /// Takes a volume out of the bin, under another name if one is given. Carried out once at most.
    pub async fn undelete_volume(&self, volume: pb::VolumeRef, name: &str) -> Result<pb::Volume, Problem> {
        let request = pb::UndeleteVolumeRequest { volume: Some(volume), name: name.to_owned() };
        let response = self.single(async |c| stub(c).undelete_volume(request.clone()).await).await?;
        response.volume.ok_or_else(|| self.link.nonsense("no volume"))
    }

    /// Calls a volume something else. Carried out once at most.
    pub async fn rename_volume(&self, volume: pb::VolumeRef, name: &str) -> Result<pb::Volume, Problem> {
        let request = pb::RenameVolumeRequest { volume: Some(volume), name: name.to_owned() };
        let response = self.single(async |c| stub(c).rename_volume(request.clone()).await).await?;
        response.volume.ok_or_else(|| self.link.nonsense("no volume"))
    }

    /// Attaches a host to a volume; also tells the generation of the map that has it. Carried out once at most.
    pub async fn attach_volume(
        &self,
        request: pb::AttachVolumeRequest,
    ) -> Result<(pb::Volume, u64), Problem> {
        let response = self.single(async |c| stub(c).attach_volume(request.clone()).await).await?;
        let volume = response.volume.ok_or_else(|| self.link.nonsense("no volume"))?;
        Ok((volume, response.generation))
    }

    /// Ends a host's attachment; also tells the generation of the map that has it. Carried out once at most.
    pub async fn detach_volume(
        &self,
        volume: pb::VolumeRef,
        holder: &str,
    ) -> Result<(pb::Volume, u64), Problem> {
        let request = pb::DetachVolumeRequest { volume: Some(volume), holder: holder.to_owned() };
        let response = self.single(async |c| stub(c).detach_volume(request.clone()).await).await?;
        let volume = response.volume.ok_or_else(|| self.link.nonsense("no volume"))?;
        Ok((volume, response.generation))
    }

    /// Forgets a target that is away and holds no replica. Carried out once at most.
    pub async fn remove_target(&self, target: TargetId) -> Result<(), Problem> {
        let request = pb::RemoveTargetRequest { target: target.0 };
        self.single(async |c| stub(c).remove_target(request).await).await?;
        Ok(())
    }

    /// Offers a volume over a protocol, from every target. `allowed` are the NQNs of the only hosts that may
    /// attach, none of them meaning any; `None` leaves that as it is. Idempotent.
    pub async fn add_export(
        &self,
        volume: pb::VolumeRef,
        protocol: ExportProtocol,
        allowed: Option<Vec<String>>,
    ) -> Result<pb::Export, Problem> {
        let request = pb::AddExportRequest {
            volume: Some(volume),
            protocol: protocol_to_pb(protocol).into(),
            allowed: allowed.map(|nqns| pb::AllowedHosts { nqns }),
        };
        let call = async |c| stub(c).add_export(request.clone()).await;
        self.link.repeat(call).await?.export.ok_or_else(|| self.link.nonsense("no export"))
    }

    /// Ends the offer; connections to it are closed by the targets. Carried out once at most.
    pub async fn remove_export(
        &self,
        volume: pb::VolumeRef,
        protocol: ExportProtocol,
    ) -> Result<(), Problem> {
        let protocol = protocol_to_pb(protocol).into();
        let request = pb::RemoveExportRequest { volume: Some(volume), protocol };
        self.single(async |c| stub(c).remove_export(request.clone()).await).await?;
        Ok(())
    }

    /// The exports of one volume, or of all.
    pub async fn exports(&self, volume: Option<pb::VolumeRef>) -> Result<Vec<pb::Export>, Problem> {
        let request = pb::ListExportsRequest { volume };
        let call = async |c| stub(c).list_exports(request.clone()).await;
        Ok(self.link.repeat(call).await?.exports)
    }

    /// Moves what a target leads, and hosts, to others, or lets it take part again. Idempotent.
    pub async fn drain_target(&self, target: TargetId, draining: bool) -> Result<pb::TargetStatus, Problem> {
        let request = pb::DrainTargetRequest { target: target.0, draining };
        let response = self.link.repeat(async |c| stub(c).drain_target(request).await).await?;
        response.target.ok_or_else(|| self.link.nonsense("no target"))
    }

    /// The whole cluster at a glance.
    pub async fn status(&self) -> Result<pb::StatusResponse, Problem> {
        self.link.repeat(async |c| stub(c).status(pb::StatusRequest {}).await).await
    }

    /// Opens the stream of maps newer than `known`.
    pub(super) async fn watch(&self, known: u64) -> Result<tonic::Streaming<pb::ClusterMap>, Problem> {
        let request = pb::WatchMapRequest { known_generation: known };
        self.link.repeat(async |c| stub(c).watch_map(request).await).await
    }

    /// What a stream of the one asked now ended with; another one is asked next.
    pub(super) fn ended_with(&self, status: &tonic::Status) -> Problem {
        let (at, place) = self.link.here();
        let problem = self.link.problem(&place.address, status);
        self.link.move_on(at, &problem);
        problem
    }

    /// All records of the MDS at one moment, as the bytes of a file.
    pub async fn snapshot(&self) -> Result<Vec<u8>, Problem> {
        let mut stream = self.link.repeat(async |c| stub(c).snapshot(pb::SnapshotRequest {}).await).await?;
        let mut bytes = Vec::new();
        loop {
            let limit = self.link.patience.call;
            let piece = tokio::time::timeout(limit, stream.message()).await;
            let piece = piece.map_err(|_| self.link.timed_out(&self.address(), limit))?;
            match piece.map_err(|status| self.ended_with(&status))? {
                Some(piece) => bytes.extend(piece.bytes),
                None => return Ok(bytes),
            }
        }
    }

    /// A call that may take effect twice: sent to whoever leads, and again only when it surely was not carried
    /// out.
    async fn single<T>(
        &self,
        call: impl AsyncFn(Channel) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, Problem> {
        // One that hangs would leave it open whether the call was carried out; a question can be asked again.
        if !self.link.is_settled() {
            let request = pb::GetMapRequest { known_generation: u64::MAX, wait_ms: 0 };
            self.link.repeat(async |c| stub(c).get_map(request).await).await?;
        }
        self.link.single(call).await
    }

    fn map(&self, map: Option<pb::ClusterMap>) -> Result<Option<ClusterMap>, Problem> {
        map.as_ref().map(map_from_pb).transpose()
    }
}

fn stub(channel: Channel) -> Stub<Channel> {
    Stub::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
}
