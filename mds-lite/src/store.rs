//! The MDS's records in redb: one file, `mds.redb`, in the MDS's directory. docs/format-mds.md
//! draws the tables.
//!
//! Invariants: a list of changes is one transaction, synced before [`Store::commit`] returns;
//! after a failed commit the store refuses further ones, for what the disk holds is then not
//! known. Deliberately absent: decisions, and anything that only heartbeats tell.

use crate::record::{Allocated, Counters, Uuid};
use crate::state::Change;
use protocol::control::{Problem, ProblemKind};
use protocol::map::ExportProtocol;
use protocol::types::{CopysetId, TargetId, VolumeId};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The version of the tables that this code writes.
pub const SCHEMA: u32 = 2;
/// The oldest version that it reads; the database is then marked as of [`SCHEMA`]. Fields that came later
/// have defaults in `record`, tables that came later may be missing.
const SCHEMA_OLDEST: u32 = 1;
/// The database's file, in the MDS's directory.
pub const FILE: &str = "mds.redb";

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const TARGETS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("targets");
const POOLS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("pools");
const COPYSETS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("copysets");
const VOLUMES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("volumes");
const ALLOCATED: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("allocated");
const EXPORTS: TableDefinition<'_, (u32, u8), ()> = TableDefinition::new("exports");

/// Of exports that not every host may use; absent in files from before there were such.
const ALLOWED_HOSTS: TableDefinition<'_, (u32, u8), &[u8]> = TableDefinition::new("allowed_hosts");

const KEY_SCHEMA: &str = "schema";
const KEY_CLUSTER: &str = "cluster";
const KEY_COUNTERS: &str = "counters";

/// A change from a row's key and value.
type Make = dyn Fn(u32, &[u8]) -> Result<Change, String>;

/// The open database.
#[derive(Debug)]
pub struct Store {
    db: Database,
    path: PathBuf,
    cluster: Uuid,
    /// Why no more is written.
    failed: Option<Problem>,
}

impl Store {
    /// Opens the database in `dir`; makes both, with a new random cluster id, when absent.
    ///
    /// # Errors
    /// `InUse` when another process has it open, otherwise `Storage`.
    pub fn open(dir: &Path) -> Result<Self, Problem> {
        std::fs::create_dir_all(dir).map_err(|e| failure(dir, "cannot be made", &e))?;
        let path = dir.join(FILE);
        let db = Database::create(&path).map_err(|e| open_problem(&path, &e))?;
        let cluster = match read_identity(&db, &path)? {
            Some(cluster) => cluster,
            None => initialise(&db, &path, dir)?,
        };
        Ok(Self { db, path, cluster, failed: None })
    }

    /// The cluster's id.
    pub fn cluster(&self) -> Uuid {
        self.cluster
    }

    /// Every record, as the changes that make it.
    pub fn load(&self) -> Result<Vec<Change>, Problem> {
        self.load_all().map_err(|why| failure(&self.path, "cannot be read", &why))
    }

    fn load_all(&self) -> Result<Vec<Change>, String> {
        let read = self.db.begin_read().map_err(text)?;
        let mut changes = Vec::new();
        let meta = read.open_table(META).map_err(text)?;
        let counters = meta.get(KEY_COUNTERS).map_err(text)?.ok_or("no counters")?;
        changes.push(Change::Counters(decode::<Counters>("counters", counters.value())?));
        let mut each = |table: TableDefinition<'_, u32, &[u8]>, make: &Make| {
            let table = read.open_table(table).map_err(text)?;
            for row in table.iter().map_err(text)? {
                let (key, value) = row.map_err(text)?;
                changes.push(make(key.value(), value.value())?);
            }
            Ok::<(), String>(())
        };
        each(TARGETS, &|id, value| Ok(Change::Target(TargetId(id), decode("target", value)?)))?;
        each(POOLS, &|id, value| Ok(Change::Pool(id, decode("pool", value)?)))?;
        each(COPYSETS, &|id, value| Ok(Change::Copyset(CopysetId(id), decode("copyset", value)?)))?;
        each(VOLUMES, &|id, value| Ok(Change::Volume(VolumeId(id), decode("volume", value)?)))?;
        each(ALLOCATED, &|id, value| Ok(Change::Allocated(VolumeId(id), Allocated::from_bytes(value))))?;
        let hosts = match read.open_table(ALLOWED_HOSTS) {
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            hosts => Some(hosts.map_err(text)?),
        };
        let exports = read.open_table(EXPORTS).map_err(text)?;
        for row in exports.iter().map_err(text)? {
            let key = row.map_err(text)?.0.value();
            let allowed = match &hosts {
                Some(hosts) => hosts.get(key).map_err(text)?,
                None => None,
            };
            let allowed = allowed.map(|value| decode("list of hosts", value.value())).transpose()?;
            let (volume, protocol) = key;
            let protocol = protocol_from(protocol).ok_or(format!("export protocol {protocol}"))?;
            changes.push(Change::Export((VolumeId(volume), protocol), allowed.unwrap_or_default()));
        }
        Ok(changes)
    }

    /// Makes changes durable, all or none; nothing is written when there are none.
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), Problem> {
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(problem) = &self.failed {
            return Err(problem.clone());
        }
        transact(&self.db, |write| changes.iter().try_for_each(|change| put(write, change))).map_err(|why| {
            let problem = failure(&self.path, "cannot be written; the MDS refuses changes from now on", &why);
            self.failed = Some(problem.clone());
            problem
        })
    }
}

fn read_identity(db: &Database, path: &Path) -> Result<Option<Uuid>, Problem> {
    let Some((schema, cluster)) = read_meta(db).map_err(|why| failure(path, "cannot be read", &why))? else {
        return Ok(None);
    };
    let schema = schema.filter(|schema| (SCHEMA_OLDEST..=SCHEMA).contains(schema)).ok_or_else(|| {
        Problem::new(
            ProblemKind::Storage,
            format!("{} has schema {schema:?}, this MDS knows {SCHEMA_OLDEST} to {SCHEMA}", path.display()),
            "it was written by another version",
            "run the version that wrote it; nothing was changed",
        )
    })?;
    if schema != SCHEMA {
        tracing::info!(from = schema, to = SCHEMA, "the database is of an older schema; it is taken over");
        transact(db, put_schema).map_err(|why| failure(path, "cannot be written", &why))?;
    }
    cluster.map(Some).ok_or_else(|| failure(path, "cannot be read", &"it holds no cluster id"))
}

/// What the meta table says of schema and cluster id.
type Identity = (Option<u32>, Option<Uuid>);

/// `None` for a database without tables.
fn read_meta(db: &Database) -> Result<Option<Identity>, String> {
    let read = db.begin_read().map_err(text)?;
    let meta = match read.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        meta => meta.map_err(text)?,
    };
    let schema = meta.get(KEY_SCHEMA).map_err(text)?;
    let schema = schema.and_then(|value| value.value().try_into().ok().map(u32::from_le_bytes));
    let cluster = meta.get(KEY_CLUSTER).map_err(text)?;
    let cluster = cluster.and_then(|value| value.value().try_into().ok().map(Uuid));
    Ok(Some((schema, cluster)))
}

fn initialise(db: &Database, path: &Path, dir: &Path) -> Result<Uuid, Problem> {
    let mut cluster = [0; 16];
    let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut cluster));
    random.map_err(|e| failure(Path::new("/dev/urandom"), "cannot be read", &e))?;
    let write = |write: &WriteTransaction| {
        put_schema(write)?;
        let mut meta = write.open_table(META).map_err(text)?;
        meta.insert(KEY_CLUSTER, cluster.as_slice()).map_err(text)?;
        meta.insert(KEY_COUNTERS, encode(&Counters::default()).as_slice()).map_err(text)?;
        for table in [TARGETS, POOLS, COPYSETS, VOLUMES, ALLOCATED] {
            write.open_table(table).map_err(text)?;
        }
        write.open_table(EXPORTS).map_err(text)?;
        Ok(())
    };
    transact(db, write).map_err(|why| failure(path, "cannot be written", &why))?;
    // The file's own name must survive a power cut as well.
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| failure(dir, "cannot be synced", &e))?;
    Ok(Uuid(cluster))
}

fn put_schema(write: &WriteTransaction) -> Result<(), String> {
    let mut meta = write.open_table(META).map_err(text)?;
    meta.insert(KEY_SCHEMA, SCHEMA.to_le_bytes().as_slice()).map_err(text)?;
    Ok(())
}

/// One transaction; redb's default durability syncs the file before the commit returns.
fn transact(db: &Database, work: impl FnOnce(&WriteTransaction) -> Result<(), String>) -> Result<(), String> {
    let write = db.begin_write().map_err(text)?;
    work(&write)?;
    write.commit().map_err(text)
}

fn put(write: &WriteTransaction, change: &Change) -> Result<(), String> {
    match change {
        Change::Counters(counters) => {
            let mut meta = write.open_table(META).map_err(text)?;
            meta.insert(KEY_COUNTERS, encode(counters).as_slice()).map_err(text)?;
        }
        Change::Target(id, record) => insert(write, TARGETS, id.0, &encode(record))?,
        Change::TargetRemoved(id) => {
            write.open_table(TARGETS).map_err(text)?.remove(id.0).map_err(text)?;
        }
        Change::Pool(id, record) => insert(write, POOLS, *id, &encode(record))?,
        Change::Copyset(id, record) => insert(write, COPYSETS, id.0, &encode(record))?,
        Change::Volume(id, record) => insert(write, VOLUMES, id.0, &encode(record))?,
        Change::Allocated(id, allocated) => insert(write, ALLOCATED, id.0, allocated.as_bytes())?,
        Change::VolumePurged(id) => {
            for table in [VOLUMES, ALLOCATED] {
                write.open_table(table).map_err(text)?.remove(id.0).map_err(text)?;
            }
        }
        Change::Export((volume, protocol), allowed) => {
            let key = (volume.0, protocol_number(*protocol));
            write.open_table(EXPORTS).map_err(text)?.insert(key, ()).map_err(text)?;
            let mut hosts = write.open_table(ALLOWED_HOSTS).map_err(text)?;
            match allowed.is_empty() {
                true => hosts.remove(key).map_err(text)?,
                false => hosts.insert(key, encode(allowed).as_slice()).map_err(text)?,
            };
        }
        Change::ExportRemoved((volume, protocol)) => {
            let key = (volume.0, protocol_number(*protocol));
            write.open_table(EXPORTS).map_err(text)?.remove(key).map_err(text)?;
            write.open_table(ALLOWED_HOSTS).map_err(text)?.remove(key).map_err(text)?;
        }
    }
    Ok(())
}

fn insert(
    write: &WriteTransaction,
    table: TableDefinition<'_, u32, &[u8]>,
    key: u32,
    value: &[u8],
) -> Result<(), String> {
    let mut table = write.open_table(table).map_err(text)?;
    table.insert(key, value).map_err(text)?;
    Ok(())
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

fn text(error: impl Display) -> String {
    error.to_string()
}

fn open_problem(path: &Path, error: &redb::DatabaseError) -> Problem {
    match error {
        redb::DatabaseError::DatabaseAlreadyOpen => Problem::new(
            ProblemKind::InUse,
            format!("{} is in use", path.display()),
            "another MDS runs on this directory",
            "stop it, or use another --dir",
        ),
        error => failure(path, "cannot be opened", error),
    }
}

fn failure(path: &Path, what: &str, why: &dyn Display) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("{} {what}: {why}", path.display()),
        "the disk is full or failing, the permissions are missing, or this is no MDS database",
        "check the disk with `df` and the kernel log; else restore the directory from a copy",
    )
}
