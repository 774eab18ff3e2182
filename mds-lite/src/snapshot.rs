//! All records of the MDS in one file, taken while it runs, and put back into either kind of store.
//!
//! docs/format-mds.md draws the file. What is put back is older than what targets saw since: their maps have
//! higher generations, and ids may have been given out that the file does not know. So the counters go ahead
//! by more than a cluster can have used meanwhile ([`AHEAD`]); else targets would ignore the new maps, a new
//! volume could be given an old one's chunks, and a host an epoch that another one has already. Copysets may have
//! moved, and targets have freed their replicas since: no copyset is put back at epoch 0, at which targets make
//! replicas that vote, empty as these are. And a volume in the bin may have been taken out: it stays there for a
//! while.

use crate::election::{Candidacy, Standing, candidates};
use crate::etcd::{Etcd, EtcdAt};
use crate::record::{Counters, Uuid, VolumeRecord};
use crate::server::StoreAt;
use crate::service::unix_s;
use crate::state::{Change, Policy, State};
use crate::store::rows::{Row, change_of, decode_rows, encode_row, rows_of};
use crate::store::{EtcdStore, RedbStore, SCHEMA, SCHEMA_OLDEST};
use protocol::control::{Problem, ProblemKind};
use protocol::types::VolumeId;
use std::path::Path;

const MAGIC: [u8; 8] = *b"ASHLSNAP";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 56;
/// What a restore adds to the counters.
pub const AHEAD: Counters = Counters {
    generation: 1_000_000,
    next_pool: 64,
    next_copyset: 8192,
    next_volume: 65_536,
    next_epoch: 1_000_000,
};
/// How long volumes that it finds in the bin stay there at least, in seconds: a day, as `volume rm` keeps them.
pub const BIN_GRACE_S: u64 = 24 * 3600;
/// A file larger than this is none: at full size one has 40 MiB.
const BYTES_MAX: u64 = 1 << 30;

/// What a snapshot holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Of which cluster.
    pub cluster: Uuid,
    /// The records.
    pub changes: Vec<Change>,
}

impl Snapshot {
    /// As a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut rows = 0_u32;
        for row in self.changes.iter().flat_map(rows_of) {
            encode_row(&row, &mut body);
            rows += 1;
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(SCHEMA.to_le_bytes());
        bytes.extend(self.cluster.0);
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(rows.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(crc32c::crc32c(&body).to_le_bytes());
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        assert_eq!(bytes.len(), HEADER_BYTES);
        bytes.extend(body);
        bytes
    }

    /// From a file.
    ///
    /// # Errors
    /// `Storage`, with what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, Problem> {
        Self::parse(bytes).map_err(|why| {
            Problem::new(
                ProblemKind::Storage,
                format!("this is no snapshot that can be used: {why}"),
                "the file was cut off or altered, or another version of ashlar wrote it",
                "use another snapshot; nothing was changed",
            )
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or("it is cut off")?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if header[..8] != MAGIC {
            return Err("it does not begin with ASHLSNAP".into());
        }
        if word(52) != crc32c::crc32c(&header[..52]) {
            return Err("its header fails its checksum".into());
        }
        let (version, schema) = (word(8), word(12));
        if version != VERSION || !(SCHEMA_OLDEST..=SCHEMA).contains(&schema) {
            return Err(format!(
                "it has version {version} and schema {schema}, known are {VERSION} and {SCHEMA}"
            ));
        }
        let length = u64::from_le_bytes(header[32..40].try_into().expect("8 bytes"));
        if length != body.len() as u64 {
            return Err(format!("{} bytes follow the header instead of {length}", body.len()));
        }
        if word(48) != crc32c::crc32c(body) {
            return Err("it fails its checksum".into());
        }
        let rows = decode_rows(body)?;
        if rows.len() != word(40) as usize {
            return Err(format!("it holds {} records instead of {}", rows.len(), word(40)));
        }
        let change = |row: Row| {
            let value = row.value.ok_or("a record without a value")?;
            change_of(row.table, row.key, &value)
        };
        let changes = rows.into_iter().map(change).collect::<Result<_, String>>()?;
        let cluster = Uuid(header[16..32].try_into().expect("16 bytes"));
        Ok(Self { cluster, changes })
    }

    /// Whether an MDS can run on it.
    fn check(&self) -> Result<(), Problem> {
        State::restore(Policy::default(), self.cluster, self.changes.clone()).map(drop)
    }

    /// The volumes in the bin.
    pub fn in_bin(&self) -> impl Iterator<Item = (VolumeId, &VolumeRecord)> {
        self.changes.iter().filter_map(|change| match change {
            Change::Volume(id, record) if record.purge_at_s.is_some() => Some((*id, record)),
            _ => None,
        })
    }

    /// As it is put back; see the module.
    fn ahead(mut self, unix_s: u64) -> Self {
        for change in &mut self.changes {
            match change {
                Change::Counters(counters) => {
                    counters.generation = counters.generation.saturating_add(AHEAD.generation);
                    counters.next_pool = counters.next_pool.saturating_add(AHEAD.next_pool);
                    counters.next_copyset = counters.next_copyset.saturating_add(AHEAD.next_copyset);
                    counters.next_volume = counters.next_volume.saturating_add(AHEAD.next_volume);
                    counters.next_epoch = counters.next_epoch.saturating_add(AHEAD.next_epoch);
                }
                // Nobody compares two epochs: what leaders report replaces the members whatever the number is.
                Change::Copyset(_, record) => record.epoch = record.epoch.max(1),
                Change::Volume(_, record) => {
                    let later = |at: u64| at.max(unix_s.saturating_add(BIN_GRACE_S));
                    record.purge_at_s = record.purge_at_s.map(later);
                }
                _ => {}
            }
        }
        self
    }
}

/// Puts a snapshot into a store, which no MDS may be using. Returns what was put there.
///
/// # Errors
/// `AlreadyExists` when the store holds records and `overwrite` is not set; `InUse` when an MDS runs on it.
pub async fn restore(file: &Path, at: &StoreAt, overwrite: bool) -> Result<Snapshot, Problem> {
    let unreadable = |error: std::io::Error| {
        Problem::new(
            ProblemKind::NotFound,
            format!("{} cannot be read: {error}", file.display()),
            "the path is misspelt, or the permissions are missing",
            "name a file that `ashlar mds snapshot` wrote",
        )
    };
    let length = std::fs::metadata(file).map_err(unreadable)?.len();
    if length > BYTES_MAX {
        return Err(unreadable(std::io::Error::other(format!("{length} bytes are more than any has"))));
    }
    let snapshot = Snapshot::decode(&std::fs::read(file).map_err(unreadable)?)?;
    snapshot.check()?;
    let snapshot = snapshot.ahead(unix_s());
    match at {
        StoreAt::Directory(dir) => {
            RedbStore::restore(dir, snapshot.cluster, &snapshot.changes, overwrite)?;
        }
        StoreAt::Etcd(at) => restore_etcd(at, &snapshot, overwrite).await?,
    }
    Ok(snapshot)
}

/// As the leader, so that no MDS leads meanwhile.
async fn restore_etcd(at: &EtcdAt, snapshot: &Snapshot, overwrite: bool) -> Result<(), Problem> {
    let etcd = Etcd::new(at);
    let mut tries = at.members.len();
    let candidacy = loop {
        if let Ok(Some(key)) = etcd.oldest(&candidates(&at.prefix)).await {
            return Err(in_use(&String::from_utf8_lossy(&key.value)));
        }
        match Candidacy::begin(&etcd, &at.prefix, "a restore").await {
            Ok(candidacy) => break candidacy,
            Err(trouble) if tries == 0 => return Err(trouble.problem()),
            Err(_) => tries -= 1,
        }
    };
    match candidacy.standing(&at.prefix).await.map_err(|trouble| trouble.problem())? {
        Standing::Leads => {}
        Standing::Follows(other) => return Err(in_use(&other)),
        Standing::Lost => return Err(in_use("somebody")),
    }
    let (mandate, runtime) = (candidacy.mandate(), tokio::runtime::Handle::current());
    let (prefix, shown, snapshot) = (at.prefix.clone(), at.to_string(), snapshot.clone());
    let write = move || {
        let mut store = EtcdStore::open(&etcd, &prefix, mandate, runtime)?;
        if !overwrite && !store.is_empty()? {
            return Err(occupied(&shown));
        }
        store.replace(snapshot.cluster, snapshot.changes.iter().flat_map(rows_of).collect())
    };
    let written = tokio::task::spawn_blocking(write).await;
    candidacy.resign().await;
    written.unwrap_or_else(|error| panic!("the restore's thread: {error}"))
}

fn in_use(by: &str) -> Problem {
    Problem::new(
        ProblemKind::InUse,
        format!("nothing was restored: {by} leads on these records"),
        "an MDS runs on this etcd and prefix",
        "stop every MDS of the cluster, wait three seconds, then restore",
    )
}

pub(crate) fn occupied(place: &str) -> Problem {
    Problem::new(
        ProblemKind::AlreadyExists,
        format!("nothing was restored: {place} holds the records of a cluster"),
        "an MDS ran on it before",
        "name an empty place, or overwrite what is there with --yes",
    )
}
