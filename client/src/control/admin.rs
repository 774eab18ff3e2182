//! The client of a target's admin service.

use super::{Link, Patience};
use protocol::control::pb::target_admin_client::TargetAdminClient as Stub;
use protocol::control::{Problem, limits, pb};
use protocol::types::{CHUNK_BLOCKS, CHUNK_BYTES, CopysetId, TargetId, VolumeId};
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::Channel;

/// Talks to one target's admin service. Clones share one connection.
#[derive(Clone, Debug)]
pub struct AdminClient {
    link: Link,
}

impl AdminClient {
    /// A client of the target whose admin service listens at `HOST:PORT`; connects at the first
    /// call. Must be made within a tokio runtime.
    ///
    /// # Errors
    /// When the address is not of that form.
    pub fn new(address: &str, patience: Patience) -> Result<Self, Problem> {
        Ok(Self { link: Link::new("target admin", address, patience)? })
    }

    /// What the target is and does.
    pub async fn status(&self) -> Result<pb::AdminStatusResponse, Problem> {
        self.link.repeat(async |c| stub(c).status(pb::AdminStatusRequest {}).await).await
    }

    /// The checksums of every chunk of a volume that the target holds; `verify` reads the blocks too.
    pub async fn chunk_checksums(&self, volume: VolumeId, verify: bool) -> Result<ChecksumStream, Problem> {
        let request = pb::ChunkChecksumsRequest { volume: volume.0, verify };
        let stream = self.link.repeat(async |c| stub(c).chunk_checksums(request).await).await?;
        Ok(ChecksumStream { link: self.link.clone(), stream })
    }

    /// Asks the copyset's leader, on this target, to hand over to `to`.
    ///
    /// # Errors
    /// `NotReady` when the copyset is not led from here.
    pub async fn transfer_leader(&self, copyset: CopysetId, to: TargetId) -> Result<(), Problem> {
        let request = pb::TransferLeaderRequest { copyset: copyset.0, to: to.0 };
        self.link.single(async |c| stub(c).transfer_leader(request).await).await?;
        Ok(())
    }

    /// Refuses, in every copyset of the volume, what is asked under a lower epoch. Idempotent.
    ///
    /// # Errors
    /// `TimedOut`: ask again, or another target.
    pub async fn fence_volume(&self, volume: VolumeId, epoch: u64) -> Result<(), Problem> {
        let request = pb::FenceVolumeRequest { volume: volume.0, epoch };
        self.link.repeat(async |c| stub(c).fence_volume(request).await).await?;
        Ok(())
    }

    /// The hosts attached through this target.
    pub async fn connections(&self) -> Result<Vec<pb::Connection>, Problem> {
        let request = pb::ListConnectionsRequest {};
        Ok(self.link.repeat(async |c| stub(c).list_connections(request).await).await?.connections)
    }

    /// Starts a scrub of one volume, or of all.
    pub async fn start_scrub(&self, volume: Option<VolumeId>) -> Result<(), Problem> {
        let request = pb::StartScrubRequest { volume: volume.map_or(0, |v| v.0) };
        self.link.repeat(async |c| stub(c).start_scrub(request).await).await?;
        Ok(())
    }
}

/// Checksums as they arrive.
#[derive(Debug)]
pub struct ChecksumStream {
    link: Link,
    stream: Streaming<pb::ChunkChecksum>,
}

impl ChecksumStream {
    /// The next chunk's, `None` after the last.
    ///
    /// # Errors
    /// When the stream breaks off, or is silent for longer than a call may take: what came before is not all.
    pub async fn next(&mut self) -> Result<Option<pb::ChunkChecksum>, Problem> {
        let limit = self.link.patience.call;
        let record = match timeout(limit, self.stream.message()).await {
            Ok(Ok(record)) => record,
            Ok(Err(status)) => return Err(self.link.problem(&self.link.here().1.address, &status)),
            Err(_) => return Err(self.link.timed_out(&self.link.here().1.address, limit)),
        };
        if record.is_some_and(|r| !plausible(&r)) {
            return Err(self.link.nonsense("a checksum record of an impossible chunk"));
        }
        Ok(record)
    }
}

fn plausible(record: &pb::ChunkChecksum) -> bool {
    let chunks_max = limits::VOLUME_BYTES_MAX / CHUNK_BYTES as u64;
    u64::from(record.chunk) < chunks_max && record.present_blocks as usize <= CHUNK_BLOCKS
}

fn stub(channel: Channel) -> Stub<Channel> {
    Stub::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
}
