//! The store of several MDS processes: keys in etcd, written by whichever process leads.
//!
//! ```text
//! PREFIX/meta/schema, PREFIX/meta/cluster      as in the redb file
//! PREFIX/rows/TABLE/ID.SUB                     one record each, ID and SUB in hexadecimal
//! PREFIX/last                                  which transaction was the last one
//! PREFIX/staged/N, PREFIX/staging              a list of changes too long for one transaction
//! PREFIX/leader/LEASE                          the candidates (`election.rs`)
//! ```
//!
//! Invariants: every transaction compares the leader's key and `last`, and writes `last` anew. So a process
//! that no longer leads writes nothing; and a transaction that was sent twice, since its answer was lost,
//! takes effect once and never after a later one. A long list is staged by several transactions, takes
//! effect with the one that writes `staging`, and is carried out by whoever leads then.

use super::rows::{Key, Row, Table, change_of, decode_rows, encode_row, rows_of};
use super::{SCHEMA, SCHEMA_OLDEST, Store};
use crate::election::Mandate;
use crate::etcd::{Etcd, created_at, delete, end_of, found, get, holds, pb, put};
use crate::record::{Counters, Uuid};
use crate::state::Change;
use protocol::control::{Problem, ProblemKind};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// etcd takes 128 operations a transaction; `last` is one of them.
const OPS_MAX: usize = 120;
/// etcd takes 1.5 MiB a request.
const BYTES_MAX: usize = 1 << 20;
/// Records a page when all are read: 4 MiB at most as a rule.
const PAGE: i64 = 4000;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// The records in etcd, as the leader writes them.
#[derive(Debug)]
pub(crate) struct EtcdStore {
    etcd: Etcd,
    runtime: Handle,
    prefix: String,
    guard: Mandate,
    cluster: Uuid,
    /// What `last` holds.
    last: Vec<u8>,
    written: u64,
    /// Turns true when nothing is written any more.
    lost: watch::Sender<bool>,
    failed: Option<Problem>,
}

impl EtcdStore {
    /// The records beneath a prefix, for the process that `guard` made the leader. Makes what is not there.
    /// Blocks; not to be called on the runtime's own thread.
    ///
    /// # Errors
    /// When etcd does not answer in time, another process leads, or what is there is of another version.
    pub(crate) fn open(etcd: &Etcd, prefix: &str, guard: Mandate, runtime: Handle) -> Result<Self, Problem> {
        let mut store = Self {
            etcd: etcd.clone(),
            runtime,
            prefix: prefix.to_owned(),
            guard,
            cluster: Uuid([0; 16]),
            last: Vec::new(),
            written: 0,
            lost: watch::Sender::new(false),
            failed: None,
        };
        store.take_over()?;
        store.cluster = match store.identity()? {
            Some(cluster) => cluster,
            None => store.initialise()?,
        };
        store.finish_staged()?;
        Ok(store)
    }

    /// Turns true when this process can write no more, and another is to lead.
    pub(crate) fn lost(&self) -> watch::Receiver<bool> {
        self.lost.subscribe()
    }

    /// Whether there are records of a cluster beneath the prefix already.
    pub(crate) fn is_empty(&mut self) -> Result<bool, Problem> {
        let (rows, _) = self.read(&self.at("rows/"), 2)?;
        // Fresh ones hold the counters alone.
        Ok(rows.len() < 2)
    }

    /// Puts these in the place of all records there are.
    pub(crate) fn replace(&mut self, cluster: Uuid, rows: Vec<Row>) -> Result<(), Problem> {
        self.stage(rows, Some(cluster))?;
        self.cluster = cluster;
        Ok(())
    }

    fn at(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix)
    }

    /// The first transaction of this leader: those of its predecessors that are still on their way fail from
    /// now on.
    fn take_over(&mut self) -> Result<(), Problem> {
        let key = self.at("last");
        let before = self.value(&key)?;
        let is_as_before = match &before {
            Some(value) => holds(&key, value),
            None => created_at(&key, 0),
        };
        self.last = before.unwrap_or_default();
        self.write_if(is_as_before, Vec::new())
    }

    fn identity(&mut self) -> Result<Option<Uuid>, Problem> {
        let Some(schema) = self.value(&self.at("meta/schema"))? else { return Ok(None) };
        let number = std::str::from_utf8(&schema).ok().and_then(|text| text.parse::<u32>().ok());
        let Some(schema) = number.filter(|schema| (SCHEMA_OLDEST..=SCHEMA).contains(schema)) else {
            return Err(Problem::new(
                ProblemKind::Storage,
                format!("etcd holds schema {number:?}, this MDS knows {SCHEMA_OLDEST} to {SCHEMA}"),
                "it was written by another version",
                "run the version that wrote it; nothing was changed",
            ));
        };
        if schema != SCHEMA {
            tracing::info!(from = schema, to = SCHEMA, "the records are of an older schema; taken over");
            self.write(vec![put(self.at("meta/schema"), SCHEMA.to_string(), 0)])?;
        }
        let cluster = self.value(&self.at("meta/cluster"))?.and_then(|value| value.try_into().ok().map(Uuid));
        cluster.map(Some).ok_or_else(|| self.nonsense("it holds no cluster id"))
    }

    fn initialise(&mut self) -> Result<Uuid, Problem> {
        let cluster = super::new_cluster()?;
        let mut ops = self.identity_ops(cluster);
        ops.extend(rows_of(&Change::Counters(Counters::default())).iter().map(|row| self.op(row)));
        self.write(ops)?;
        Ok(cluster)
    }

    fn identity_ops(&self, cluster: Uuid) -> Vec<pb::RequestOp> {
        vec![put(self.at("meta/schema"), SCHEMA.to_string(), 0), put(self.at("meta/cluster"), cluster.0, 0)]
    }

    fn row_key(&self, table: Table, key: Key) -> String {
        format!("{}/rows/{}/{:08x}.{:02x}", self.prefix, table.name(), key.0, key.1)
    }

    fn op(&self, row: &Row) -> pb::RequestOp {
        let key = self.row_key(row.table, row.key);
        match &row.value {
            Some(value) => put(key, value.as_slice(), 0),
            None => delete(key, Vec::new()),
        }
    }

    /// Writes rows however many they are, all or none.
    fn write_rows(&mut self, rows: Vec<Row>) -> Result<(), Problem> {
        if fits(&rows) {
            let ops = rows.iter().map(|row| self.op(row)).collect();
            return self.write(ops);
        }
        self.stage(rows, None)
    }

    /// Writes rows aside, then makes them count, then carries them out. With a cluster, they are all that there
    /// is from then on.
    fn stage(&mut self, rows: Vec<Row>, cluster: Option<Uuid>) -> Result<(), Problem> {
        let mut bytes = Vec::new();
        rows.iter().for_each(|row| encode_row(row, &mut bytes));
        let pieces = bytes.chunks(BYTES_MAX);
        let count = pieces.len();
        for (at, piece) in pieces.enumerate() {
            self.write(vec![put(self.staged(at), piece, 0)])?;
        }
        let cluster = cluster.map_or(String::new(), |cluster| cluster.to_string());
        self.write(vec![put(self.at("staging"), format!("{count} {cluster}"), 0)])?;
        self.carry_out(rows, &cluster)
    }

    fn staged(&self, at: usize) -> String {
        self.at(&format!("staged/{at:08}"))
    }

    /// What was staged by a leader before this one: carried out if it counts, else thrown away.
    fn finish_staged(&mut self) -> Result<(), Problem> {
        let (pieces, _) = self.read(&self.at("staged/"), 0)?;
        let Some(staging) = self.value(&self.at("staging"))? else {
            return match pieces.is_empty() {
                true => Ok(()),
                false => self.write(vec![delete(self.at("staged/"), end_of(&self.at("staged/")))]),
            };
        };
        let told = String::from_utf8_lossy(&staging).into_owned();
        let (count, cluster) = told.split_once(' ').unwrap_or((&told, ""));
        if count.parse() != Ok(pieces.len()) {
            return Err(self.nonsense("a list of changes that was staged is not whole"));
        }
        let bytes: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.value).collect();
        let rows = decode_rows(&bytes).map_err(|why| self.nonsense(&why))?;
        tracing::info!(rows = rows.len(), "carrying out what the last leader had begun");
        self.carry_out(rows, cluster)?;
        if let Some(cluster) = self.value(&self.at("meta/cluster"))?.and_then(|value| value.try_into().ok()) {
            self.cluster = Uuid(cluster);
        }
        Ok(())
    }

    /// Harmless when done again.
    fn carry_out(&mut self, rows: Vec<Row>, cluster: &str) -> Result<(), Problem> {
        if let Ok(id) = u128::from_str_radix(cluster, 16) {
            let mut ops = self.identity_ops(Uuid(id.to_be_bytes()));
            ops.push(delete(self.at("rows/"), end_of(&self.at("rows/"))));
            self.write(ops)?;
        }
        let (mut ops, mut bytes) = (Vec::new(), 0);
        for row in rows {
            let length = row_bytes(&row);
            if ops.len() == OPS_MAX || bytes + length > BYTES_MAX {
                self.write(std::mem::take(&mut ops))?;
                bytes = 0;
            }
            ops.push(self.op(&row));
            bytes += length;
        }
        ops.push(delete(self.at("staging"), Vec::new()));
        ops.push(delete(self.at("staged/"), end_of(&self.at("staged/"))));
        self.write(ops)
    }

    /// One transaction of this leader.
    fn write(&mut self, ops: Vec<pb::RequestOp>) -> Result<(), Problem> {
        let is_last = holds(&self.at("last"), &self.last);
        self.write_if(is_last, ops)
    }

    fn write_if(&mut self, is_last: pb::Compare, mut ops: Vec<pb::RequestOp>) -> Result<(), Problem> {
        self.written += 1;
        let next = format!("{}-{}", self.guard.revision, self.written).into_bytes();
        ops.push(put(self.at("last"), next.clone(), 0));
        let request = pb::TxnRequest {
            compare: vec![created_at(&self.guard.key, self.guard.revision), is_last],
            success: ops,
            failure: vec![get(&self.guard.key), get(&self.at("last"))],
        };
        let mut tried = false;
        loop {
            if !self.guard.tenure.holds() {
                return Err(self.deposed(tried));
            }
            match self.runtime.block_on(self.etcd.txn(request.clone())) {
                Ok(answer) if answer.succeeded => break,
                Ok(answer) => {
                    let found = found(answer);
                    let at = |n: usize| found.get(n).and_then(Option::as_ref);
                    let leads = at(0).is_some_and(|kv| kv.create_revision == self.guard.revision);
                    // An attempt before this one took effect, and its answer was lost.
                    if leads && at(1).is_some_and(|kv| kv.value == next) {
                        break;
                    }
                    return Err(self.deposed(tried && !leads));
                }
                Err(trouble) => {
                    tried = true;
                    tracing::warn!(%trouble, "a transaction was not answered; it is sent again");
                    std::thread::sleep(PAUSE);
                }
            }
        }
        self.last = next;
        Ok(())
    }

    /// Nothing is written from now on. With `unknown`, an attempt was sent whose fate nobody knows.
    fn deposed(&mut self, unknown: bool) -> Problem {
        self.lost.send_replace(true);
        let problem = match unknown {
            false => Problem::not_leader(None),
            true => Problem::new(
                ProblemKind::TimedOut,
                "this MDS lost the lead while it wrote; whether that took effect is not known",
                "etcd did not answer in time",
                "see whether it was done, then repeat it; another MDS leads soon",
            ),
        };
        self.failed = Some(problem.clone());
        problem
    }

    fn value(&self, key: &str) -> Result<Option<Vec<u8>>, Problem> {
        let range = |etcd: Etcd| {
            let key = key.as_bytes().to_vec();
            async move { etcd.range(key, Vec::new(), 1).await }
        };
        Ok(self.patiently(range)?.0.into_iter().next().map(|kv| kv.value))
    }

    /// All keys that begin so, or the first few; pages of them.
    fn read(&self, prefix: &str, most: usize) -> Result<(Vec<pb::KeyValue>, bool), Problem> {
        let (mut all, end) = (Vec::new(), end_of(prefix));
        let mut from = prefix.as_bytes().to_vec();
        let page = if most == 0 { PAGE } else { most as i64 };
        loop {
            let range = |etcd: Etcd| {
                let (from, end) = (from.clone(), end.clone());
                async move { etcd.range(from, end, page).await }
            };
            let (kvs, more) = self.patiently(range)?;
            if let Some(last) = kvs.last() {
                from = last.key.clone();
                from.push(0);
            }
            all.extend(kvs);
            if !more || most != 0 {
                return Ok((all, more));
            }
        }
    }

    /// Asks until there is an answer or this process leads no more.
    fn patiently<T, F>(&self, ask: impl Fn(Etcd) -> F) -> Result<T, Problem>
    where
        F: Future<Output = Result<T, crate::etcd::Trouble>>,
    {
        loop {
            match self.runtime.block_on(ask(self.etcd.clone())) {
                Ok(answer) => return Ok(answer),
                Err(trouble) if !self.guard.tenure.holds() => return Err(trouble.problem()),
                Err(trouble) => {
                    tracing::warn!(%trouble, "a read was not answered; it is sent again");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn nonsense(&self, why: &str) -> Problem {
        Problem::new(
            ProblemKind::Storage,
            format!("what is in etcd beneath {:?} cannot be used: {why}", self.prefix),
            "the keys were altered by hand or by another version, or are not of an MDS",
            "see them by `etcdctl get --prefix`; else restore a snapshot (`ashlar mds restore`)",
        )
    }
}

impl Store for EtcdStore {
    fn cluster(&self) -> Uuid {
        self.cluster
    }

    fn load(&mut self) -> Result<Vec<Change>, Problem> {
        let (kvs, _) = self.read(&self.at("rows/"), 0)?;
        let skip = self.at("rows/").len();
        let parse = |kv: &pb::KeyValue| {
            let text = std::str::from_utf8(&kv.key[skip..]).ok()?;
            let (table, key) = text.split_once('/')?;
            let (id, sub) = key.split_once('.')?;
            let table = Table::ALL.into_iter().find(|known| known.name() == table)?;
            Some((table, Key(u32::from_str_radix(id, 16).ok()?, u8::from_str_radix(sub, 16).ok()?)))
        };
        let mut changes = Vec::with_capacity(kvs.len());
        for kv in &kvs {
            let (table, key) = parse(kv)
                .ok_or_else(|| self.nonsense(&format!("key {}", String::from_utf8_lossy(&kv.key))))?;
            changes.push(change_of(table, key, &kv.value).map_err(|why| self.nonsense(&why))?);
        }
        if !changes.iter().any(|change| matches!(change, Change::Counters(_))) {
            return Err(self.nonsense("there are no counters"));
        }
        Ok(changes)
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), Problem> {
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(problem) = &self.failed {
            return Err(problem.clone());
        }
        // etcd refuses a transaction that writes a key twice; the last one counts.
        let last: BTreeMap<(Table, Key), Row> =
            changes.iter().flat_map(rows_of).map(|row| ((row.table, row.key), row)).collect();
        self.write_rows(last.into_values().collect())
    }
}

fn row_bytes(row: &Row) -> usize {
    128 + row.value.as_ref().map_or(0, Vec::len)
}

fn fits(rows: &[Row]) -> bool {
    rows.len() <= OPS_MAX && rows.iter().map(row_bytes).sum::<usize>() <= BYTES_MAX
}

#[cfg(test)]
mod tests;
