//! The data structures of Get Log Page, whole; the caller cuts out what was asked for.
//!
//! Deliberately absent: an error log with entries. Every error is told with its command.

use super::command::{IoCommand, NSID};
use super::identify::ANA_GROUP;
use super::wire::*;
use std::net::SocketAddr;

/// State of the paths through a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ana {
    /// As good as any.
    #[default]
    Optimized,
    /// It works, others are better.
    NonOptimized,
    /// Use another.
    Inaccessible,
}

/// Bytes of the error log: one empty entry.
const ERROR_BYTES: usize = 64;
const SMART_BYTES: usize = 512;
const DISCOVERY_HEADER_BYTES: usize = 1024;
const DISCOVERY_ENTRY_BYTES: usize = 1024;
/// Of an entry without extended attributes.
const HOST_ENTRY_BYTES: usize = 1032;

/// Errors: none.
pub fn errors() -> Vec<u8> {
    vec![0; ERROR_BYTES]
}

/// What hosts did with a volume: counts of the health log (NVM Command Set 1.0, 4.1.4.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Served {
    /// Bytes that Read, Compare and Verify asked for.
    pub read_bytes: u64,
    /// Bytes of Write.
    pub written_bytes: u64,
    /// Commands Read and Compare.
    pub reads: u64,
    /// Commands Write.
    pub writes: u64,
    /// Commands that found damage which no replica could mend.
    pub media_errors: u64,
}

impl Served {
    /// Counts a command that has ended.
    pub fn count(&mut self, command: IoCommand, bytes: u32, status: Status) {
        use IoCommand::{Compare, Read, Verify, Write};
        let bytes = u64::from(bytes);
        self.read_bytes += if matches!(command, Read | Compare | Verify) { bytes } else { 0 };
        self.written_bytes += if command == Write { bytes } else { 0 };
        self.reads += u64::from(matches!(command, Read | Compare));
        self.writes += u64::from(command == Write);
        self.media_errors += u64::from(status == Status::UNRECOVERED_READ);
    }
    /// Counts what another counted.
    pub fn add(&mut self, other: &Self) {
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.reads += other.reads;
        self.writes += other.writes;
        self.media_errors += other.media_errors;
    }
}

/// Health: nothing wears out here, and nothing is warm. The counts are the volume's at this target, since it started.
pub fn smart(served: &Served) -> Vec<u8> {
    let mut log = vec![0; SMART_BYTES];
    put(&mut log, 1, &310u16.to_le_bytes());
    log[3] = 100;
    log[4] = 10;
    // Data units are thousands of 512 bytes, rounded up.
    let units = |bytes: u64| bytes.div_ceil(512_000);
    put(&mut log, 32, &units(served.read_bytes).to_le_bytes());
    put(&mut log, 48, &units(served.written_bytes).to_le_bytes());
    put(&mut log, 64, &served.reads.to_le_bytes());
    put(&mut log, 80, &served.writes.to_le_bytes());
    put(&mut log, 160, &served.media_errors.to_le_bytes());
    log
}

/// Firmware: one slot, read-only.
pub fn firmware() -> Vec<u8> {
    let mut log = vec![0; 512];
    log[0] = 1;
    log[8..16].fill(b' ');
    let version = env!("CARGO_PKG_VERSION").as_bytes();
    put(&mut log, 8, &version[..version.len().min(8)]);
    log
}

/// Namespaces that changed since this log was read last.
pub fn changed(any: bool) -> Vec<u8> {
    let mut log = vec![0; 4096];
    if any {
        put(&mut log, 0, &NSID.to_le_bytes());
    }
    log
}

/// Commands and their effects: what is supported, and what changes data.
pub fn effects() -> Vec<u8> {
    let mut log = vec![0; 4096];
    let mut set = |at: usize, bits: u32| put(&mut log, at * 4, &bits.to_le_bytes());
    use admin::*;
    for opcode in [GET_LOG_PAGE, IDENTIFY, ABORT, SET_FEATURES, GET_FEATURES, ASYNC_EVENT, KEEP_ALIVE] {
        set(opcode.into(), 1);
    }
    for opcode in [io::FLUSH, io::READ, io::COMPARE, io::VERIFY] {
        set(256 + usize::from(opcode), 1);
    }
    for opcode in [io::WRITE, io::WRITE_ZEROES, io::DSM] {
        set(256 + usize::from(opcode), 1 | 2);
    }
    log
}

/// Which logs there are.
pub fn supported(discovery: bool) -> Vec<u8> {
    let mut log = vec![0; 1024];
    let of_discovery = [log::SUPPORTED, log::DISCOVERY, log::HOST_DISCOVERY];
    let of_others =
        [log::SUPPORTED, log::ERROR, log::SMART, log::FIRMWARE, log::CHANGED_NS, log::EFFECTS, log::ANA];
    let all = if discovery { &of_discovery[..] } else { &of_others };
    for page in all {
        log[usize::from(*page) * 4] = 1;
    }
    log
}

/// States of paths: one group that has the namespace, if it is there.
pub fn ana(state: Ana, changes: u64, present: bool, groups_only: bool) -> Vec<u8> {
    let mut log = vec![0; 48];
    put(&mut log, 0, &changes.to_le_bytes());
    put(&mut log, 8, &1u16.to_le_bytes());
    put(&mut log, 16, &ANA_GROUP.to_le_bytes());
    put(&mut log, 24, &changes.to_le_bytes());
    log[32] = match state {
        Ana::Optimized => 1,
        Ana::NonOptimized => 2,
        Ana::Inaccessible => 3,
    };
    if present && !groups_only {
        put(&mut log, 20, &1u32.to_le_bytes());
        log.extend_from_slice(&NSID.to_le_bytes());
    }
    log
}

/// What there is to connect to: each subsystem at each port.
pub fn discovery(generation: u64, subsystems: &[String], ports: &[(u16, SocketAddr)]) -> Vec<u8> {
    let mut log = vec![0; DISCOVERY_HEADER_BYTES];
    let records = (subsystems.len() * ports.len()) as u64;
    put(&mut log, 0, &generation.to_le_bytes());
    put(&mut log, 8, &records.to_le_bytes());
    for nqn in subsystems {
        for (id, addr) in ports {
            entry(&mut log, nqn, *id, *addr);
        }
    }
    log
}

/// The hosts that a host may know of: itself.
pub fn hosts(generation: u64, nqn: &str) -> Vec<u8> {
    let bytes = DISCOVERY_HEADER_BYTES + HOST_ENTRY_BYTES;
    let mut log = vec![0; bytes];
    put(&mut log, 0, &generation.to_le_bytes());
    put(&mut log, 8, &1u64.to_le_bytes());
    put(&mut log, 20, &(bytes as u32).to_le_bytes());
    let entry = &mut log[DISCOVERY_HEADER_BYTES..];
    // TCP; from an address that the service does not tell.
    entry[0] = 3;
    put(entry, 256, nqn.as_bytes());
    entry[512..768].fill(b' ');
    put(entry, 1024, &(HOST_ENTRY_BYTES as u32).to_le_bytes());
    log
}

fn entry(log: &mut Vec<u8>, nqn: &str, port: u16, addr: SocketAddr) {
    let mut entry = [0; DISCOVERY_ENTRY_BYTES];
    // TCP; IPv4 or IPv6; a subsystem with namespaces; flow control may be disabled.
    put(&mut entry, 0, &[3, if addr.is_ipv4() { 1 } else { 2 }, 2, 1 << 2]);
    put(&mut entry, 4, &port.to_le_bytes());
    put(&mut entry, 6, &u16::MAX.to_le_bytes());
    put(&mut entry, 8, &QUEUE_ENTRIES_MAX.to_le_bytes());
    entry[32..64].fill(b' ');
    put(&mut entry, 32, addr.port().to_string().as_bytes());
    put(&mut entry, 256, nqn.as_bytes());
    entry[512..768].fill(b' ');
    put(&mut entry, 512, addr.ip().to_string().as_bytes());
    log.extend_from_slice(&entry);
}
