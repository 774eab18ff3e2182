//! The control plane's messages and services (MDS, target admin), their limits, the typed
//! [`Problem`] that every refusal is, and the way between messages and [`crate::map`].
//!
//! [`pb`] is made from `proto/`. What arrives in it was written by anyone: nothing leaves this
//! module as a [`crate::map::ClusterMap`] unless every reference in it resolves. Deliberately
//! absent: connections (the `client` crate) and decisions (the `mds-lite` crate).

mod convert;
mod problem;

pub use convert::{
    allowed_hosts, map_from_pb, map_to_pb, protocol_from_pb, protocol_to_pb, shard_from_pb, shard_to_pb,
};
pub use problem::{Problem, ProblemKind};

/// The messages and services as generated; comments are in `proto/*.proto`.
pub mod pb {
    #![allow(missing_docs, rust_2018_idioms, clippy::all)]
    tonic::include_proto!("ashlar.v1");
}

/// The messages and services as a `google.protobuf.FileDescriptorSet`, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// What the control plane accepts at most. With all at their most a map is about 20 MiB.
pub mod limits {
    use crate::types::{CHUNK_BYTES, SEGMENT_BYTES};

    /// The longest name of a volume or a pool, in bytes.
    pub const NAME_BYTES_MAX: usize = 128;
    /// The largest volume: 16 TiB, 1,048,576 chunks.
    pub const VOLUME_BYTES_MAX: u64 = 16 << 40;
    /// Segments of the largest volume: 16,384; its bitmap takes 2 KiB.
    pub const SEGMENTS_MAX: u32 = (VOLUME_BYTES_MAX / SEGMENT_BYTES) as u32;
    /// Most targets of a cluster.
    pub const TARGETS_MAX: usize = 1024;
    /// Most shards of a target.
    pub const SHARDS_MAX: usize = 256;
    /// Most pools of a cluster.
    pub const POOLS_MAX: usize = 64;
    /// Most copysets of a cluster: about 30 bytes of a map each, so 4 MiB.
    pub const COPYSETS_MAX: usize = 131_072;
    /// Most copysets that one volume is spread over.
    pub const VOLUME_COPYSETS_MAX: usize = 256;
    /// Most volumes of a cluster, those being deleted included.
    pub const VOLUMES_MAX: usize = 16_384;
    /// Hosts on the list of one export.
    pub const ALLOWED_HOSTS_MAX: usize = 64;
    /// Hosts on the lists of all exports: at most 223 bytes each, so 3.5 MiB of a map.
    pub const ALLOWED_HOSTS_ALL_MAX: usize = 16_384;
    /// Hosts that are attached to one volume by name: some thousand bytes of its record.
    pub const HOLDERS_MAX: usize = 64;
    /// Attachments that one target reports.
    pub const ATTACHED_MAX: usize = 65_536;
    /// Labels of one target.
    pub const LABELS_MAX: usize = 32;
    /// The longest path of a Unix socket, as in `sockaddr_un`.
    pub const UNIX_PATH_BYTES_MAX: usize = 107;
    /// The largest message either side decodes.
    pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

    const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(SEGMENT_BYTES));
    const _: () = assert!(VOLUME_BYTES_MAX / (CHUNK_BYTES as u64) <= u32::MAX as u64);
    // Three bytes hold the id of a copyset as a varint.
    const _: () = assert!(VOLUMES_MAX * VOLUME_COPYSETS_MAX * 3 < MESSAGE_BYTES_MAX);
}

/// Whether a volume or pool may be called so: 1 to [`limits::NAME_BYTES_MAX`] letters, digits,
/// `.`, `_` and `-`, the first of them a letter or digit. Such a name needs no quoting in a URI,
/// a shell, a path or a log line.
pub fn check_name(noun: &str, name: &str) -> Result<(), Problem> {
    let invalid = |cause: String| {
        let fix = format!("use 1 to {} letters, digits, '.', '_' or '-', a letter or digit first", {
            limits::NAME_BYTES_MAX
        });
        Err(Problem::new(ProblemKind::Invalid, format!("{noun} name {name:?} refused"), cause, fix))
    };
    let Some(first) = name.bytes().next() else { return invalid("it is empty".into()) };
    if name.len() > limits::NAME_BYTES_MAX {
        return invalid(format!("it is {} bytes long", name.len()));
    }
    if !first.is_ascii_alphanumeric() {
        return invalid("it does not start with a letter or digit".into());
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        Some(bad) => invalid(format!("it holds {bad:?}")),
        None => Ok(()),
    }
}

/// Whether a host may be called so: an NQN, as in /etc/nvme/hostnqn.
pub fn check_host_nqn(nqn: &str) -> Result<(), Problem> {
    let cause = if nqn.len() > crate::nvme_tcp::wire::NQN_BYTES_MAX {
        format!("it is {} bytes long", nqn.len())
    } else if !nqn.starts_with("nqn.") {
        "it does not start with \"nqn.\"".into()
    } else if !nqn.bytes().all(|byte| byte.is_ascii_graphic()) {
        "it holds something other than printable ASCII".into()
    } else {
        return Ok(());
    };
    let fix = "take the host's own name from its /etc/nvme/hostnqn";
    Err(Problem::new(ProblemKind::Invalid, format!("host {nqn:?} refused"), cause, fix))
}

/// Whether a host that attaches to a volume may be called so: over NVMe by its NQN, over NBD as it likes.
pub fn check_holder(holder: &str) -> Result<(), Problem> {
    let cause = if holder.is_empty() {
        "it is empty".into()
    } else if holder.len() > crate::nvme_tcp::wire::NQN_BYTES_MAX {
        format!("it is {} bytes long", holder.len())
    } else if !holder.bytes().all(|byte| byte.is_ascii_graphic()) {
        "it holds something other than printable ASCII, or a space".into()
    } else {
        return Ok(());
    };
    let fix =
        "name the host by its NQN (/etc/nvme/hostnqn) or by a word of its own, the same at each attachment";
    Err(Problem::new(ProblemKind::Invalid, format!("holder {holder:?} refused"), cause, fix))
}

/// Whether a volume may have this size in bytes and this block size.
pub fn check_volume_size(bytes: u64, block_bytes: u32) -> Result<(), Problem> {
    let invalid =
        |what: String, cause: String, fix: String| Err(Problem::new(ProblemKind::Invalid, what, cause, fix));
    if block_bytes != 512 && block_bytes != 4096 {
        return invalid(
            format!("block size of {block_bytes} bytes refused"),
            "only two block sizes exist".into(),
            "use 512 or 4096".into(),
        );
    }
    if bytes == 0 || bytes > limits::VOLUME_BYTES_MAX {
        return invalid(
            format!("volume size of {bytes} bytes refused"),
            "a volume has 1 block to 16 TiB".into(),
            format!("use a size of at most {} bytes", limits::VOLUME_BYTES_MAX),
        );
    }
    if !bytes.is_multiple_of(block_bytes.into()) {
        return invalid(
            format!("volume size of {bytes} bytes refused"),
            format!("it is no multiple of the block size, {block_bytes}"),
            format!("use {} bytes", bytes.next_multiple_of(block_bytes.into())),
        );
    }
    Ok(())
}
