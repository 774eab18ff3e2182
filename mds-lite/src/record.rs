//! What the MDS keeps, as values; the store writes them as JSON, so `deny_unknown_fields` guards
//! against a database of a newer schema.

use protocol::types::{CHUNK_BYTES, CopysetId, SEGMENT_BYTES, ShardAddr, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

/// A number of a pool; 0 means none.
pub type PoolId = u32;

/// 16 random bytes, shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Uuid {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        let number = number.ok_or_else(|| serde::de::Error::custom("not 32 hexadecimal digits"))?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// What is counted and never goes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Of the map.
    pub generation: u64,
    /// The next pool's id.
    pub next_pool: PoolId,
    /// The next copyset's id.
    pub next_copyset: u32,
    /// The next volume's id.
    pub next_volume: u32,
    /// The epoch of the next session that ends others. Since schema 3.
    #[serde(default = "first_epoch")]
    pub next_epoch: u64,
}

/// 0 is that of volumes that were never attached exclusively.
fn first_epoch() -> u64 {
    1
}

impl Default for Counters {
    fn default() -> Self {
        Self { generation: 1, next_pool: 1, next_copyset: 1, next_volume: 1, next_epoch: first_epoch() }
    }
}

/// A registered target.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetRecord {
    /// Identity of its disk.
    pub disk_uuid: Uuid,
    /// One listening address a shard.
    pub peers: Vec<SocketAddr>,
    /// Where else it is reached.
    pub endpoints: Endpoints,
    /// What its chunk slots may take up.
    pub capacity_bytes: u64,
    /// An operator wants it emptied. Since schema 2, as all below.
    #[serde(default)]
    pub draining: bool,
    /// Where it stands, as its configuration says; empty: nobody said.
    #[serde(default)]
    pub zone: String,
    /// The machine that it is on; empty: one of its own.
    #[serde(default)]
    pub host: String,
    /// What else its operator says of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Where a target is reached beside its peer addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoints {
    /// TargetAdmin.
    pub admin: Option<SocketAddr>,
    /// Prometheus text.
    pub metrics: Option<SocketAddr>,
    /// NBD over TCP.
    pub nbd_tcp: Option<SocketAddr>,
    /// NBD over a Unix socket: absolute path; empty when not offered.
    pub nbd_unix: String,
    /// NVMe over TCP.
    pub nvme_tcp: Option<SocketAddr>,
}

/// A pool: copysets that share a replica count.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRecord {
    /// Unique.
    pub name: String,
    /// Replicas of each of its copysets.
    pub replicas: u32,
    /// Its copysets, in order of id.
    #[serde(with = "copysets")]
    pub copysets: Vec<CopysetId>,
    /// The only targets that its replicas may be on; empty: any. Since schema 2.
    #[serde(default)]
    pub targets: Vec<u32>,
}

/// A copyset.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopysetRecord {
    /// Its pool.
    pub pool: PoolId,
    /// Its replicas, as last reported by a leader; the first is the one meant to lead.
    #[serde(with = "members")]
    pub members: Vec<ShardAddr>,
    /// Counts the changes of members; 0: as it was created, and never restored. Since schema 2.
    #[serde(default)]
    pub epoch: u64,
    /// Term and commit index of the report that the members are from: no older one is believed. Since schema 2.
    #[serde(default)]
    pub told: (u64, u64),
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// Unique among those not deleted.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// 512 or 4096.
    pub block_bytes: u32,
    /// Its pool.
    pub pool: PoolId,
    /// The copysets it is spread over.
    #[serde(with = "copysets")]
    pub copysets: Vec<CopysetId>,
    /// Its chunks are to be freed.
    pub deleted: bool,
    /// It is in the bin, and is deleted then, in seconds since 1970. Since schema 2.
    #[serde(default)]
    pub purge_at_s: Option<u64>,
}

impl VolumeRecord {
    /// Whether it can be used: it is neither deleted nor in the bin.
    pub fn is_live(&self) -> bool {
        !self.deleted && self.purge_at_s.is_none()
    }
    /// How many segments it has; the last may be shorter.
    pub fn segments(&self) -> u32 {
        self.bytes.div_ceil(SEGMENT_BYTES) as u32
    }
    /// How many chunks it has.
    pub fn chunks(&self) -> u32 {
        self.bytes.div_ceil(CHUNK_BYTES as u64) as u32
    }
    /// What a segment takes up when allocated: 1 GiB, or, for the last, its chunks.
    pub fn segment_bytes(&self, segment: u32) -> u64 {
        let rounded = u64::from(self.chunks()) * CHUNK_BYTES as u64;
        rounded.saturating_sub(u64::from(segment) * SEGMENT_BYTES).min(SEGMENT_BYTES)
    }
}

/// Which segments of a volume are allocated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Allocated(Vec<u8>);

impl Allocated {
    /// Segment n is allocated when bit n % 8 of byte n / 8 is set.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
    /// The inverse of [`Allocated::from_bytes`].
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
    /// Marks a segment; whether it was not marked before.
    pub fn insert(&mut self, segment: u32) -> bool {
        let at = segment as usize / 8;
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        let bit = 1 << (segment % 8);
        let new = self.0[at] & bit == 0;
        self.0[at] |= bit;
        new
    }
    /// Whether a segment is marked.
    pub fn contains(&self, segment: u32) -> bool {
        self.0.get(segment as usize / 8).is_some_and(|byte| byte & (1 << (segment % 8)) != 0)
    }
    /// How many are marked.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }
    /// What they take up of a volume, before replication.
    pub fn bytes_of(&self, volume: &VolumeRecord) -> u64 {
        let Some(last) = volume.segments().checked_sub(1) else { return 0 };
        let full = u64::from(self.count()) * SEGMENT_BYTES;
        if self.contains(last) { full - SEGMENT_BYTES + volume.segment_bytes(last) } else { full }
    }
}

/// Which hosts are attached to a volume. Since schema 3.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRecord {
    /// What a host asks under a lower one is refused.
    pub epoch: u64,
    /// There is one holder, and no other host may attach.
    pub exclusive: bool,
    /// Hosts that attached by name; of those that did not, nothing is known.
    pub holders: BTreeSet<String>,
}

/// The key of an export: volume and protocol.
pub type ExportKey = (VolumeId, protocol::map::ExportProtocol);

/// The NQNs of the only hosts that may use an export; empty: any host.
pub type AllowedHosts = std::collections::BTreeSet<String>;

mod copysets {
    use protocol::types::CopysetId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(ids: &[CopysetId], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(ids.iter().map(|id| id.0))
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<CopysetId>, D::Error> {
        Ok(Vec::<u32>::deserialize(from)?.into_iter().map(CopysetId).collect())
    }
}

mod members {
    use protocol::types::{ShardAddr, TargetId};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(members: &[ShardAddr], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(members.iter().map(|m| (m.target.0, m.shard)))
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<ShardAddr>, D::Error> {
        let pairs = Vec::<(u32, u16)>::deserialize(from)?;
        Ok(pairs.into_iter().map(|(target, shard)| ShardAddr { target: TargetId(target), shard }).collect())
    }
}
