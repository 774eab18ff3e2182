//! The data structures of Identify, and the names of things.
//!
//! Names are functions of the cluster and the volume alone, so every target tells the same and
//! they outlive every restart. Deliberately absent: what a controller may be asked when.

use super::command::{NSID, Namespace};
use super::wire::*;
use crate::types::{ENTRY_BYTES_MAX, VolumeId};

/// Bytes of every answer to Identify.
pub const IDENTIFY_BYTES: usize = 4096;
/// NVM Express 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Asynchronous Event Requests that may wait, less one.
pub const AERL: u8 = 3;
/// Unit of the keep alive timer: 100 ms.
pub const KAS: u16 = 1;
/// Events that a controller of a subsystem tells of: namespaces and paths.
pub const OAES: u32 = 1 << 8 | 1 << 11;
/// Events that a discovery controller tells of.
pub const OAES_DISCOVERY: u32 = 1 << 31;
/// The only group of paths.
pub const ANA_GROUP: u32 = 1;

/// What to list by a CNS.
pub mod cns {
    /// A namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// The controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespaces.
    pub const ACTIVE: u8 = 0x02;
    /// Descriptors of a namespace.
    pub const DESCRIPTORS: u8 = 0x03;
    /// A namespace, as its command set has it.
    pub const CS_NAMESPACE: u8 = 0x05;
    /// The controller, as a command set has it.
    pub const CS_CONTROLLER: u8 = 0x06;
    /// Active namespaces of a command set.
    pub const CS_ACTIVE: u8 = 0x07;
    /// A namespace, whatever its command set.
    pub const ANY_NAMESPACE: u8 = 0x08;
    /// Command sets.
    pub const COMMAND_SETS: u8 = 0x1c;
}

/// The subsystem's name of a volume.
pub fn nqn(cluster: &[u8; 16], volume: &str) -> String {
    let hex: String = cluster.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("nqn.2026-01.io.ashlar:{hex}:{volume}")
}

/// The same for all targets and for ever: 12 bytes of the cluster's identity, then the volume's.
pub fn nguid(cluster: &[u8; 16], volume: VolumeId) -> [u8; 16] {
    let mut id = *cluster;
    put(&mut id, 12, &volume.0.to_be_bytes());
    id
}

/// [`nguid`] in the form of a UUID, version 8.
pub fn uuid(cluster: &[u8; 16], volume: VolumeId) -> [u8; 16] {
    let mut id = nguid(cluster, volume);
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// A locally administered EUI-64: 4 bytes of the cluster's identity, then the volume's.
pub fn eui64(cluster: &[u8; 16], volume: VolumeId) -> [u8; 8] {
    let mut id = [0; 8];
    put(&mut id, 0, &cluster[..4]);
    id[0] = id[0] & 0xfc | 0x02;
    put(&mut id, 4, &volume.0.to_be_bytes());
    id
}

/// What an Identify Controller tells of.
pub struct Controller<'a> {
    /// Its id.
    pub cntlid: u16,
    /// Which cluster.
    pub cluster: &'a [u8; 16],
    /// The subsystem's name.
    pub nqn: &'a str,
    /// The volume; `None` in a discovery subsystem.
    pub volume: Option<VolumeId>,
}

fn text(bytes: &mut [u8], from: usize, to: usize, value: &str) {
    bytes[from..to].fill(b' ');
    let value = &value.as_bytes()[..value.len().min(to - from)];
    put(bytes, from, value);
}

/// Identify Controller.
pub fn controller(of: &Controller<'_>) -> Vec<u8> {
    let mut id = vec![0; IDENTIFY_BYTES];
    let serial: String = of.cluster[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    let number = of.volume.map_or(0, |volume| volume.0);
    text(&mut id, 4, 24, &format!("{serial}{number:08x}"));
    text(&mut id, 24, 64, "Ashlar");
    text(&mut id, 64, 72, env!("CARGO_PKG_VERSION"));
    id[77] = MDTS;
    put(&mut id, 78, &of.cntlid.to_le_bytes());
    put(&mut id, 80, &VERSION.to_le_bytes());
    // 128-bit host identifiers.
    put(&mut id, 96, &1u32.to_le_bytes());
    id[259] = AERL;
    put(&mut id, 320, &KAS.to_le_bytes());
    put(&mut id, 514, &QUEUE_ENTRIES_MAX.to_le_bytes());
    // SGLs: supported, offsets in capsules, the transport's own.
    put(&mut id, 536, &(1u32 | 1 << 20 | 1 << 21).to_le_bytes());
    put(&mut id, 768, of.nqn.as_bytes());
    put(&mut id, 1796, &1u32.to_le_bytes());
    id[1803] = 1;
    if of.volume.is_some() {
        io_controller(&mut id)
    } else {
        discovery_controller(&mut id)
    }
    id
}

fn discovery_controller(id: &mut [u8]) {
    put(id, 92, &OAES_DISCOVERY.to_le_bytes());
    id[111] = 2;
    // Log pages at an offset.
    id[261] = 1 << 2;
    put(id, 1792, &((COMMAND_BYTES - COMMON_BYTES) as u32 / 16).to_le_bytes());
}

fn io_controller(id: &mut [u8]) {
    // Several ports, several controllers, asymmetric access.
    id[76] = 1 << 1 | 1 << 0 | 1 << 3;
    put(id, 92, &OAES.to_le_bytes());
    id[111] = 1;
    id[258] = 3;
    id[260] = 1 << 1 | 1;
    // Health by namespace, effects, log pages at an offset.
    id[261] = 1 << 0 | 1 << 1 | 1 << 2;
    put(id, 266, &363u16.to_le_bytes());
    put(id, 268, &373u16.to_le_bytes());
    // Paths: optimized, non-optimized, inaccessible, change; a transition takes 10 s at most.
    id[342] = 10;
    id[343] = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4;
    put(id, 344, &ANA_GROUP.to_le_bytes());
    put(id, 348, &1u32.to_le_bytes());
    id[512] = 0x66;
    id[513] = 0x44;
    put(id, 516, &NSID.to_le_bytes());
    // Compare, Dataset Management, Write Zeroes, Verify.
    put(id, 520, &(1u16 << 0 | 1 << 2 | 1 << 3 | 1 << 7).to_le_bytes());
    // No volatile cache: what is acknowledged is durable. Flush takes all namespaces at once.
    id[525] = 3 << 1;
    put(id, 540, &1u32.to_le_bytes());
    put(id, 1792, &((SQE_BYTES as u32 + IO_CAPSULE_DATA_MAX) / 16).to_le_bytes());
}

/// Identify Namespace. AWUN and its kin are 0: one block is written wholly or not at all, more is not promised.
pub fn namespace(cluster: &[u8; 16], of: &Namespace) -> Vec<u8> {
    let mut id = vec![0; IDENTIFY_BYTES];
    let blocks = of.bytes / u64::from(of.block_bytes);
    for at in [0, 8, 16] {
        put(&mut id, at, &blocks.to_le_bytes());
    }
    // Thin, and the preferred granularities below.
    id[24] = 1 << 0 | 1 << 4;
    id[30] = 1;
    // Deallocated blocks read as zeroes; Write Zeroes may deallocate.
    id[33] = 1 | 1 << 3;
    let blocks_of = |bytes: u32| ((bytes / of.block_bytes).max(1) - 1) as u16;
    for at in [64, 66, 68, 70] {
        put(&mut id, at, &blocks_of(4096).to_le_bytes());
    }
    put(&mut id, 72, &blocks_of(ENTRY_BYTES_MAX as u32).to_le_bytes());
    put(&mut id, 92, &ANA_GROUP.to_le_bytes());
    put(&mut id, 104, &nguid(cluster, of.volume));
    put(&mut id, 120, &eui64(cluster, of.volume));
    id[130] = of.block_bytes.trailing_zeros() as u8;
    id
}

/// Identify Namespace, whatever its command set (CNS 08h).
pub fn any_namespace() -> Vec<u8> {
    let mut id = vec![0; IDENTIFY_BYTES];
    // NMIC: shared.
    id[1] = 1;
    put(&mut id, 8, &ANA_GROUP.to_le_bytes());
    // NSTAT: ready.
    id[14] = 1;
    id
}

/// The limits of the NVM command set (CNS 06h): none on Verify and Write Zeroes, 256 ranges.
pub fn nvm_controller() -> Vec<u8> {
    let mut id = vec![0; IDENTIFY_BYTES];
    // DMRL counts from 1, and 255 is the most it can tell.
    id[3] = 255;
    id
}

/// Namespace identification descriptors.
pub fn descriptors(cluster: &[u8; 16], volume: VolumeId) -> Vec<u8> {
    let mut id = Vec::with_capacity(IDENTIFY_BYTES);
    let mut add = |kind: u8, value: &[u8]| {
        id.extend_from_slice(&[kind, value.len() as u8, 0, 0]);
        id.extend_from_slice(value);
    };
    add(1, &eui64(cluster, volume));
    add(2, &nguid(cluster, volume));
    add(3, &uuid(cluster, volume));
    // The NVM command set.
    add(4, &[0]);
    id.resize(IDENTIFY_BYTES, 0);
    id
}

/// The list of active namespaces above `after`.
pub fn active(after: u32, present: bool) -> Vec<u8> {
    let mut id = vec![0; IDENTIFY_BYTES];
    if present && after < NSID {
        put(&mut id, 0, &NSID.to_le_bytes());
    }
    id
}
