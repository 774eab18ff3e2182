//! Changes as rows of tables: what is written, whatever holds it.

use crate::record::{Allocated, Counters};
use crate::state::Change;
use protocol::map::ExportProtocol;
use protocol::types::{CopysetId, TargetId, VolumeId};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A table; the numbers are those of snapshots. In the order in which records are loaded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Table {
    /// One row, of key 0.
    Counters = 1,
    /// By target id.
    Targets = 2,
    /// By pool id.
    Pools = 3,
    /// By copyset id.
    Copysets = 4,
    /// By volume id.
    Volumes = 5,
    /// By volume id.
    Allocated = 6,
    /// By volume id and protocol; the value lists the only hosts that may attach.
    Exports = 7,
    /// By volume id.
    Sessions = 8,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Counters,
        Self::Targets,
        Self::Pools,
        Self::Copysets,
        Self::Volumes,
        Self::Allocated,
        Self::Exports,
        Self::Sessions,
    ];

    /// Its name, in keys and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counters => "counters",
            Self::Targets => "targets",
            Self::Pools => "pools",
            Self::Copysets => "copysets",
            Self::Volumes => "volumes",
            Self::Allocated => "allocated",
            Self::Exports => "exports",
            Self::Sessions => "sessions",
        }
    }

    /// The table of a number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|table| *table as u8 == number)
    }
}

/// The key of a row: an id, and for exports the protocol (1 NBD, 2 NVMe/TCP; else 0).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key(pub u32, pub u8);

const ROW_HEAD_BYTES: usize = 12;

/// A row, or its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// Where.
    pub table: Table,
    /// Which.
    pub key: Key,
    /// What it holds; `None`: there is no such row from now on.
    pub value: Option<Vec<u8>>,
}

/// The rows that a change writes.
pub fn rows_of(change: &Change) -> Vec<Row> {
    let put = |table, key, value| vec![Row { table, key, value: Some(value) }];
    let end = |table, key| Row { table, key, value: None };
    match change {
        Change::Counters(counters) => put(Table::Counters, Key(0, 0), encode(counters)),
        Change::Target(id, record) => put(Table::Targets, Key(id.0, 0), encode(record)),
        Change::TargetRemoved(id) => vec![end(Table::Targets, Key(id.0, 0))],
        Change::Pool(id, record) => put(Table::Pools, Key(*id, 0), encode(record)),
        Change::Copyset(id, record) => put(Table::Copysets, Key(id.0, 0), encode(record)),
        Change::Volume(id, record) => put(Table::Volumes, Key(id.0, 0), encode(record)),
        Change::Allocated(id, allocated) => {
            put(Table::Allocated, Key(id.0, 0), allocated.as_bytes().to_vec())
        }
        Change::VolumePurged(id) => {
            [Table::Volumes, Table::Allocated, Table::Sessions].map(|table| end(table, Key(id.0, 0))).into()
        }
        Change::Export((volume, protocol), allowed) => {
            put(Table::Exports, Key(volume.0, protocol_number(*protocol)), encode(allowed))
        }
        Change::Session(id, session) => put(Table::Sessions, Key(id.0, 0), encode(session)),
        Change::ExportRemoved((volume, protocol)) => {
            vec![end(Table::Exports, Key(volume.0, protocol_number(*protocol)))]
        }
    }
}

/// The change that makes a row.
///
/// # Errors
/// What is wrong with it.
pub fn change_of(table: Table, key: Key, value: &[u8]) -> Result<Change, String> {
    let Key(id, sub) = key;
    Ok(match table {
        Table::Counters => Change::Counters(decode::<Counters>("counters", value)?),
        Table::Targets => Change::Target(TargetId(id), decode("target", value)?),
        Table::Pools => Change::Pool(id, decode("pool", value)?),
        Table::Copysets => Change::Copyset(CopysetId(id), decode("copyset", value)?),
        Table::Volumes => Change::Volume(VolumeId(id), decode("volume", value)?),
        Table::Allocated => Change::Allocated(VolumeId(id), Allocated::from_bytes(value)),
        Table::Sessions => Change::Session(VolumeId(id), decode("session", value)?),
        Table::Exports => {
            let protocol = protocol_from(sub).ok_or(format!("export protocol {sub}"))?;
            Change::Export((VolumeId(id), protocol), decode("list of hosts", value)?)
        }
    })
}

/// Adds a row to bytes: table u8, what u8 (1 put, 0 end), sub u8, 0 u8, id u32, length u32, value.
pub fn encode_row(row: &Row, to: &mut Vec<u8>) {
    let value = row.value.as_deref();
    to.extend([row.table as u8, value.is_some().into(), row.key.1, 0]);
    to.extend(row.key.0.to_le_bytes());
    to.extend((value.map_or(0, <[u8]>::len) as u32).to_le_bytes());
    to.extend(value.unwrap_or_default());
}

/// The inverse of [`encode_row`], for any number of rows.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_rows(mut bytes: &[u8]) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at_checked(ROW_HEAD_BYTES).ok_or("a row is cut off")?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let table = Table::from_number(head[0]).ok_or_else(|| format!("table {} is not known", head[0]))?;
        let (value, rest) = rest.split_at_checked(word(8) as usize).ok_or("a row is cut off")?;
        let value = match head[1] {
            1 => Some(value.to_vec()),
            0 if value.is_empty() => None,
            other => return Err(format!("{other} is no kind of row")),
        };
        rows.push(Row { table, key: Key(word(4), head[2]), value });
        bytes = rest;
    }
    Ok(rows)
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records hold nothing that JSON cannot")
}

fn decode<T: DeserializeOwned>(noun: &str, value: &[u8]) -> Result<T, String> {
    serde_json::from_slice(value).map_err(|error| format!("record of a {noun}: {error}"))
}

fn protocol_number(protocol: ExportProtocol) -> u8 {
    match protocol {
        ExportProtocol::Nbd => 1,
        ExportProtocol::Nvme => 2,
    }
}

fn protocol_from(number: u8) -> Option<ExportProtocol> {
    match number {
        1 => Some(ExportProtocol::Nbd),
        2 => Some(ExportProtocol::Nvme),
        _ => None,
    }
}
