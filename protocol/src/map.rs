//! The cluster map: what the MDS tells every target and client, and all that routing needs.
//!
//! Plain values, made from the control plane's messages once a change and then only read.
//! Which copyset holds a chunk is a function of the volume's record alone, so no table is
//! looked up, and nobody has to be asked, on the IO path (docs/adr/0002).

use crate::types::{ChunkId, CopysetId, SEGMENT_CHUNKS, SessionEpoch, ShardAddr, TargetId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// Everything that the data path knows of the cluster; replaced whole when the MDS has a newer one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterMap {
    /// Which cluster: random, made when its MDS first starts.
    pub cluster: [u8; 16],
    /// Counts the changes; a higher one replaces a lower one.
    pub generation: u64,
    /// Every target that ever registered and was not removed.
    pub targets: BTreeMap<TargetId, TargetEntry>,
    /// Every copyset.
    pub copysets: BTreeMap<CopysetId, CopysetEntry>,
    /// Every volume, deleted ones too until each target has freed their chunks.
    pub volumes: BTreeMap<VolumeId, VolumeEntry>,
    /// What is offered to hosts.
    pub exports: Vec<ExportEntry>,
}

/// One target as others reach it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TargetEntry {
    /// One listening address a shard, in the order of shards.
    pub peers: Vec<SocketAddr>,
    /// Where hosts reach it over NVMe/TCP.
    pub nvme: Option<SocketAddr>,
    /// It is being emptied: it leads nothing where another can, and hosts are sent elsewhere.
    pub draining: bool,
}

/// One copyset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopysetEntry {
    /// Its replicas, as far as the MDS knows. Changes are entries of the copyset's own log.
    pub members: Vec<ShardAddr>,
    /// Counts the changes of members; 0: as it was created, and never restored.
    pub epoch: u64,
}

/// One volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeEntry {
    /// Unique among the volumes that are not deleted.
    pub name: String,
    /// Size in bytes, a multiple of `block_bytes`.
    pub bytes: u64,
    /// What hosts see as a block: 512 or 4096.
    pub block_bytes: u32,
    /// The copysets it is spread over; never empty, fixed when the volume is created.
    pub copysets: Vec<CopysetId>,
    /// Its chunks are to be freed.
    pub deleted: bool,
    /// Who may attach.
    pub session: Session,
}

/// Who may attach to a volume, and what is let through of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Session {
    /// Hosts that attach from now on do so under this epoch; those of a lower one are let go.
    pub epoch: SessionEpoch,
    /// The only host that may attach; empty: any may.
    pub holder: String,
}

impl Session {
    /// Whether a host of this name, empty where it has none, may attach.
    pub fn admits(&self, host: &str) -> bool {
        self.holder.is_empty() || self.holder == host
    }
}

/// One volume offered over one protocol, by every target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportEntry {
    /// The volume.
    pub volume: VolumeId,
    /// The protocol.
    pub protocol: ExportProtocol,
    /// The names (NQNs) of the only hosts that may attach over NVMe; empty: any host.
    pub allowed_hosts: BTreeSet<String>,
}

/// How hosts attach.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ExportProtocol {
    /// NBD over TCP and Unix sockets.
    Nbd,
    /// NVMe over TCP.
    Nvme,
}

impl VolumeEntry {
    /// The copyset of a chunk: consecutive chunks walk through the volume's copysets, each
    /// segment starting one further, so that neither a sequential stream nor a stride of a
    /// segment stays on one copyset.
    pub fn copyset_of(&self, chunk_index: u32) -> CopysetId {
        let segment = chunk_index / SEGMENT_CHUNKS;
        let at = (u64::from(chunk_index) + u64::from(segment)) % self.copysets.len() as u64;
        self.copysets[at as usize]
    }
}

impl ClusterMap {
    /// The copyset of a chunk, if the volume is known and not deleted.
    pub fn route(&self, chunk: ChunkId) -> Option<(CopysetId, &CopysetEntry)> {
        let volume = self.volumes.get(&chunk.volume).filter(|v| !v.deleted)?;
        let copyset = volume.copyset_of(chunk.index);
        self.copysets.get(&copyset).map(|entry| (copyset, entry))
    }
    /// Whether a target is being emptied.
    pub fn is_draining(&self, target: TargetId) -> bool {
        self.targets.get(&target).is_some_and(|entry| entry.draining)
    }
    /// The listening address of a shard.
    pub fn address(&self, shard: ShardAddr) -> Option<SocketAddr> {
        self.targets.get(&shard.target)?.peers.get(usize::from(shard.shard)).copied()
    }
    /// A volume by name, deleted ones left out.
    pub fn volume_named(&self, name: &str) -> Option<(VolumeId, &VolumeEntry)> {
        self.volumes.iter().find(|(_, v)| !v.deleted && v.name == name).map(|(id, v)| (*id, v))
    }
}
