//! Databases of earlier schemas, kept as files in `testdata/`: today's MDS must open each and find in it
//! all that was there, then serve on it and open it again. `BLESS=1` writes them anew, by tables and
//! records spelt out as they were then, on purpose only.

use ashlar_mds_lite::record::Uuid;
use ashlar_mds_lite::snapshot::Snapshot;
use ashlar_mds_lite::state::{Change, Command, Policy, State, VolumeRef};
use ashlar_mds_lite::store::{FILE, RedbStore, SCHEMA, Store};
use protocol::map::ExportProtocol;
use protocol::types::{CopysetId, SEGMENT_BYTES, TargetId, Time, VolumeId};
use redb::{Database, ReadableDatabase, TableDefinition};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const EXPORTS: TableDefinition<'_, (u32, u8), ()> = TableDefinition::new("exports");
const ALLOWED_HOSTS: TableDefinition<'_, (u32, u8), &[u8]> = TableDefinition::new("allowed_hosts");
const CLUSTER: [u8; 16] = [0xc5; 16];
const HOST: &str = "nqn.2014-08.org.example:a";

/// Schema 1 as it first was, and with the table of allowed hosts that came later.
const OLD: [(&str, bool); 2] = [("schema1-no-allow-list.redb", false), ("schema1.redb", true)];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// Three targets, a pool of two copysets, one volume exported over both protocols and one deleted.
fn make_schema1(path: &Path, allow_lists: bool) {
    let _ = std::fs::remove_file(path);
    let db = Database::create(path).unwrap();
    let write = db.begin_write().unwrap();
    {
        let mut meta = write.open_table(META).unwrap();
        meta.insert("schema", 1u32.to_le_bytes().as_slice()).unwrap();
        meta.insert("cluster", CLUSTER.as_slice()).unwrap();
        let counters = br#"{"generation":9,"next_pool":2,"next_copyset":3,"next_volume":3}"#;
        meta.insert("counters", counters.as_slice()).unwrap();
        let target = |id: u32| {
            format!(
                r#"{{"disk_uuid":"{:032x}","peers":["127.0.0.1:{}"],"endpoints":{{"admin":"127.0.0.1:{}","metrics":null,"nbd_tcp":null,"nbd_unix":"","nvme_tcp":"127.0.0.1:{}"}},"capacity_bytes":4294967296}}"#,
                id,
                7500 + id,
                7600 + id,
                4420 + id
            )
        };
        let volume = |name, deleted| {
            format!(
                r#"{{"name":"{name}","bytes":3221225472,"block_bytes":4096,"pool":1,"copysets":[1,2],"deleted":{deleted}}}"#
            )
        };
        let rows: [(&str, u32, String); 8] = [
            ("targets", 1, target(1)),
            ("targets", 2, target(2)),
            ("targets", 3, target(3)),
            ("pools", 1, r#"{"name":"default","replicas":3,"copysets":[1,2]}"#.into()),
            ("copysets", 1, r#"{"pool":1,"members":[[1,0],[2,0],[3,0]]}"#.into()),
            ("copysets", 2, r#"{"pool":1,"members":[[2,0],[3,0],[1,0]]}"#.into()),
            ("volumes", 1, volume("vol0", false)),
            ("volumes", 2, volume("gone", true)),
        ];
        for (table, key, value) in rows {
            let table: TableDefinition<'_, u32, &[u8]> = TableDefinition::new(table);
            write.open_table(table).unwrap().insert(key, value.as_bytes()).unwrap();
        }
        let allocated: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("allocated");
        write.open_table(allocated).unwrap().insert(1, [0b101].as_slice()).unwrap();
        let mut exports = write.open_table(EXPORTS).unwrap();
        exports.insert((1, 1), ()).unwrap();
        exports.insert((1, 2), ()).unwrap();
        if allow_lists {
            let hosts = format!("[{HOST:?}]");
            write.open_table(ALLOWED_HOSTS).unwrap().insert((1, 2), hosts.as_bytes()).unwrap();
        }
    }
    write.commit().unwrap();
}

/// A copy of a fixture, as the MDS would find it in its directory.
fn copy_of(name: &str, allow_lists: bool) -> TempDir {
    if std::env::var_os("BLESS").is_some() {
        make_schema1(&path(name), allow_lists);
    }
    let dir = TempDir::new().unwrap();
    std::fs::copy(path(name), dir.path().join(FILE)).unwrap();
    dir
}

fn open(dir: &Path) -> (RedbStore, State) {
    let mut store = RedbStore::open(dir).unwrap();
    let state = State::restore(Policy::default(), store.cluster(), store.load().unwrap()).unwrap();
    (store, state)
}

#[test]
fn a_database_of_an_older_schema_opens_with_all_that_was_in_it() {
    for (name, allow_lists) in OLD {
        let dir = copy_of(name, allow_lists);
        let (_, state) = open(dir.path());
        let map = state.map();
        assert_eq!((state.cluster(), map.generation), (Uuid(CLUSTER), 9), "{name}");
        assert_eq!(map.targets[&TargetId(2)].nvme, Some("127.0.0.1:4422".parse().unwrap()));
        assert_eq!(map.copysets[&CopysetId(2)].members.len(), 3);
        assert_eq!(map.volumes[&VolumeId(1)].bytes, 3 * SEGMENT_BYTES);
        assert!(map.volumes[&VolumeId(2)].deleted);
        assert_eq!(state.allocation(VolumeId(1)).count(), 2);
        let nvme = map.exports.iter().find(|e| e.protocol == ExportProtocol::Nvme).unwrap();
        let hosts: Vec<&str> = nvme.allowed_hosts.iter().map(String::as_str).collect();
        // Before there were lists, any host could attach; it still may.
        assert_eq!(hosts, if allow_lists { vec![HOST] } else { vec![] }, "{name}");
        assert_eq!(map.exports.len(), 2);
    }
}

#[test]
fn what_is_written_to_a_database_of_an_older_schema_is_there_after_a_restart() {
    for (name, allow_lists) in OLD {
        let dir = copy_of(name, allow_lists);
        let (mut store, mut state) = open(dir.path());
        let volume = VolumeRef::Name("vol0".into());
        let allowed = Some([HOST.to_owned(), "nqn.2014-08.org.example:b".to_owned()].into());
        let command = Command::AddExport { volume, protocol: ExportProtocol::Nvme, allowed };
        let decision = state.decide(Time::default(), command).unwrap();
        assert!(decision.changes.iter().any(|change| matches!(change, Change::Export(..))));
        store.commit(&decision.changes).unwrap();
        state.apply(decision.changes);
        let before = state.map().clone();
        drop((store, state));
        let (_, state) = open(dir.path());
        assert_eq!(*state.map(), before, "{name}");
        let nvme = before.exports.iter().find(|e| e.protocol == ExportProtocol::Nvme).unwrap();
        assert_eq!(nvme.allowed_hosts.len(), 2);
    }
}

#[test]
fn an_older_database_is_marked_so_that_an_older_mds_refuses_it_from_then_on() {
    let dir = copy_of(OLD[0].0, OLD[0].1);
    drop(open(dir.path()));
    let db = Database::create(dir.path().join(FILE)).unwrap();
    let meta = db.begin_read().unwrap().open_table(META).unwrap();
    let schema = meta.get("schema").unwrap().unwrap();
    assert_eq!(schema.value(), SCHEMA.to_le_bytes().as_slice());
}

/// A snapshot of version 1 with the records of schema 1, byte for byte: what was backed up long ago must be read.
#[test]
fn a_snapshot_of_an_older_version_is_read_and_a_damaged_one_refused() {
    let file = path("snapshot1.bin");
    if std::env::var_os("BLESS").is_some() {
        let dir = copy_of(OLD[1].0, OLD[1].1);
        let mut store = RedbStore::open(dir.path()).unwrap();
        let (cluster, changes) = (store.cluster(), store.load().unwrap());
        std::fs::write(&file, Snapshot { cluster, changes }.encode()).unwrap();
    }
    let bytes = std::fs::read(&file).unwrap();
    let snapshot = Snapshot::decode(&bytes).unwrap();
    let state = State::restore(Policy::default(), snapshot.cluster, snapshot.changes.clone()).unwrap();
    assert_eq!((state.cluster(), state.map().generation), (Uuid(CLUSTER), 9));
    assert_eq!((state.map().targets.len(), state.map().volumes.len(), state.map().exports.len()), (3, 2, 2));
    assert_eq!(snapshot.encode(), bytes, "what is written today is the same");
    for length in 0..bytes.len() {
        assert!(Snapshot::decode(&bytes[..length]).is_err(), "cut to {length}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Snapshot::decode(&bytes).is_err(), "bit {bit}");
    }
}
