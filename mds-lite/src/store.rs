//! Where the MDS keeps its records: a [`Store`] makes changes durable and gives them back at the start.
//!
//! ```text
//! state --changes--> rows (table, key, bytes) --> redb: one process, a file in its directory
//!                                             \-> etcd: several processes, one of which leads
//!                                              \-> snapshot: a file, of either kind and for either
//! ```
//!
//! docs/format-mds.md draws the tables. Deliberately absent: decisions, and anything that only heartbeats tell.

mod etcd;
mod redb;
pub mod rows;

pub(crate) use self::etcd::EtcdStore;
pub use self::redb::{FILE, RedbStore};

use crate::record::Uuid;
use crate::state::Change;
use protocol::control::{Problem, ProblemKind};
use std::io::Read;

/// The version of the tables that this code writes.
pub const SCHEMA: u32 = 3;
/// The oldest version that it reads; what holds them is then marked as of [`SCHEMA`]. Fields that came later
/// have defaults in `record`, tables that came later may be missing.
pub(crate) const SCHEMA_OLDEST: u32 = 1;

/// The records of one cluster. Its calls block; the MDS makes them on a thread of its own.
pub trait Store: Send {
    /// The cluster's id.
    fn cluster(&self) -> Uuid;

    /// Every record, as the changes that make it.
    ///
    /// # Errors
    /// When they cannot be read, or not be understood.
    fn load(&mut self) -> Result<Vec<Change>, Problem>;

    /// Makes changes durable, all or none; nothing is written when there are none.
    ///
    /// # Errors
    /// Whether they are durable is then not known: the store refuses further ones, and whoever goes on must
    /// load again.
    fn commit(&mut self, changes: &[Change]) -> Result<(), Problem>;
}

/// A cluster id that was never given to another cluster.
fn new_cluster() -> Result<Uuid, Problem> {
    let mut cluster = [0; 16];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut cluster));
    random.map(|()| Uuid(cluster)).map_err(|error| {
        Problem::new(
            ProblemKind::Storage,
            format!("/dev/urandom cannot be read: {error}"),
            "the process runs in a root without devices",
            "give it /dev/urandom",
        )
    })
}
