//! The store of one MDS process: one file, `mds.redb`, in its directory.
//!
//! Invariants: a list of changes is one transaction, synced before [`Store::commit`] returns;
//! after a failed commit the store refuses further ones, for what the disk holds is then not
//! known.

use super::rows::{Key, Row, Table, change_of, rows_of};
use super::{SCHEMA, SCHEMA_OLDEST, Store};
use crate::record::{Counters, Uuid};
use crate::state::Change;
use protocol::control::{Problem, ProblemKind};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use std::fmt::Display;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The database's file, in the MDS's directory.
pub const FILE: &str = "mds.redb";

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const EXPORTS: TableDefinition<'_, (u32, u8), ()> = TableDefinition::new("exports");

/// Of exports that not every host may use; absent in files from before there were such.
const ALLOWED_HOSTS: TableDefinition<'_, (u32, u8), &[u8]> = TableDefinition::new("allowed_hosts");

/// The tables of rows that are found by an id alone.
const BY_ID: [Table; 6] =
    [Table::Targets, Table::Pools, Table::Copysets, Table::Volumes, Table::Allocated, Table::Sessions];
/// An empty list of hosts, which has no row.
const ANY_HOST: &[u8] = b"[]";

const KEY_SCHEMA: &str = "schema";
const KEY_CLUSTER: &str = "cluster";
const KEY_COUNTERS: &str = "counters";

/// The table of rows that are found by an id alone.
fn by_id(table: Table) -> TableDefinition<'static, u32, &'static [u8]> {
    TableDefinition::new(table.name())
}

/// The open database.
#[derive(Debug)]
pub struct RedbStore {
    db: Database,
    path: PathBuf,
    cluster: Uuid,
    /// Why no more is written.
    failed: Option<Problem>,
}

impl RedbStore {
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

    /// Puts these in the place of all that the database in `dir` holds, at once or not at all; what was there
    /// stays beside it, as `mds.redb.before`.
    ///
    /// # Errors
    /// `InUse` when an MDS runs on it, `AlreadyExists` when it holds records and `overwrite` is not set.
    pub fn restore(dir: &Path, cluster: Uuid, changes: &[Change], overwrite: bool) -> Result<(), Problem> {
        std::fs::create_dir_all(dir).map_err(|e| failure(dir, "cannot be made", &e))?;
        let path = dir.join(FILE);
        // Held till the end, so that no MDS starts on it meanwhile.
        let there = match path.exists() {
            true => Some(Self::open(dir)?),
            false => None,
        };
        // A fresh one holds the counters alone.
        if there.as_ref().is_some_and(|there| there.load_all().is_ok_and(|all| all.len() > 1)) && !overwrite {
            return Err(crate::snapshot::occupied(&path.display().to_string()));
        }
        let (new, before) = (dir.join("mds.redb.new"), dir.join("mds.redb.before"));
        let _ = std::fs::remove_file(&new);
        let db = Database::create(&new).map_err(|e| open_problem(&new, &e))?;
        let rows = || changes.iter().flat_map(rows_of);
        let all = |write: &WriteTransaction| {
            put_identity(write, cluster)?;
            rows().try_for_each(|row| put(write, &row))
        };
        transact(&db, all).map_err(|why| failure(&new, "cannot be written", &why))?;
        drop(db);
        if there.is_some() {
            std::fs::rename(&path, &before).map_err(|e| failure(&before, "cannot be made", &e))?;
        }
        std::fs::rename(&new, &path).map_err(|e| failure(&path, "cannot be made", &e))?;
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| failure(dir, "cannot be synced", &e))
    }

    fn load_all(&self) -> Result<Vec<Change>, String> {
        let read = self.db.begin_read().map_err(text)?;
        let mut changes = Vec::new();
        let meta = read.open_table(META).map_err(text)?;
        let counters = meta.get(KEY_COUNTERS).map_err(text)?.ok_or("no counters")?;
        changes.push(change_of(Table::Counters, Key(0, 0), counters.value())?);
        for table in BY_ID {
            let rows = match read.open_table(by_id(table)) {
                // A table that came after the file was made.
                Err(redb::TableError::TableDoesNotExist(_)) => continue,
                rows => rows.map_err(text)?,
            };
            for row in rows.iter().map_err(text)? {
                let (key, value) = row.map_err(text)?;
                changes.push(change_of(table, Key(key.value(), 0), value.value())?);
            }
        }
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
            let allowed = allowed.as_ref().map_or(ANY_HOST, |value| value.value());
            changes.push(change_of(Table::Exports, Key(key.0, key.1), allowed)?);
        }
        Ok(changes)
    }
}

impl Store for RedbStore {
    fn cluster(&self) -> Uuid {
        self.cluster
    }

    fn load(&mut self) -> Result<Vec<Change>, Problem> {
        self.load_all().map_err(|why| failure(&self.path, "cannot be read", &why))
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), Problem> {
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(problem) = &self.failed {
            return Err(problem.clone());
        }
        let rows = || changes.iter().flat_map(rows_of);
        transact(&self.db, |write| rows().try_for_each(|row| put(write, &row))).map_err(|why| {
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
    let cluster = super::new_cluster()?;
    let write = |write: &WriteTransaction| {
        put_identity(write, cluster)?;
        rows_of(&Change::Counters(Counters::default())).iter().try_for_each(|row| put(write, row))
    };
    transact(db, write).map_err(|why| failure(path, "cannot be written", &why))?;
    // The file's own name must survive a power cut as well.
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| failure(dir, "cannot be synced", &e))?;
    Ok(cluster)
}

/// Makes the tables, and says whose they are.
fn put_identity(write: &WriteTransaction, cluster: Uuid) -> Result<(), String> {
    put_schema(write)?;
    write.open_table(META).map_err(text)?.insert(KEY_CLUSTER, cluster.0.as_slice()).map_err(text)?;
    for table in BY_ID {
        write.open_table(by_id(table)).map_err(text)?;
    }
    write.open_table(EXPORTS).map_err(text)?;
    Ok(())
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

fn put(write: &WriteTransaction, row: &Row) -> Result<(), String> {
    let Row { table, key: Key(id, sub), value } = row;
    match (table, value) {
        (Table::Counters, value) => {
            let value = value.as_deref().expect("counters never end");
            write.open_table(META).map_err(text)?.insert(KEY_COUNTERS, value).map_err(text)?;
        }
        (Table::Exports, value) => return put_export(write, (*id, *sub), value.as_deref()),
        (table, Some(value)) => {
            write.open_table(by_id(*table)).map_err(text)?.insert(*id, value.as_slice()).map_err(text)?;
        }
        (table, None) => {
            write.open_table(by_id(*table)).map_err(text)?.remove(*id).map_err(text)?;
        }
    }
    Ok(())
}

/// Hosts that may use an export are a table of their own, which came later.
fn put_export(write: &WriteTransaction, key: (u32, u8), allowed: Option<&[u8]>) -> Result<(), String> {
    let mut exports = write.open_table(EXPORTS).map_err(text)?;
    let mut hosts = write.open_table(ALLOWED_HOSTS).map_err(text)?;
    match allowed {
        Some(_) => exports.insert(key, ()).map_err(text)?,
        None => exports.remove(key).map_err(text)?,
    };
    match allowed.filter(|allowed| *allowed != ANY_HOST) {
        Some(allowed) => hosts.insert(key, allowed).map_err(text)?,
        None => hosts.remove(key).map_err(text)?,
    };
    Ok(())
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
