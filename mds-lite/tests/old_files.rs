//! Databases of earlier schemas, kept as files in `testdata/`: today's MDS must open each and find in it
//! all that was there, then serve on it and open it again. `BLESS=1` writes them anew, by tables and
//! records spelt out as they were then, on purpose only.

use ashlar_mds_lite::record::{SessionRecord, Uuid};
use ashlar_mds_lite::snapshot::Snapshot;
use ashlar_mds_lite::state::{Attach, Change, Command, Policy, State, VolumeRef};
use ashlar_mds_lite::store::{FILE, RedbStore, SCHEMA, Store};
use protocol::map::{ExportProtocol, Session};
use protocol::types::{CopysetId, SEGMENT_BYTES, TargetId, Time, VolumeId};
use redb::{Database, ReadableDatabase, TableDefinition};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const EXPORTS: TableDefinition<'_, (u32, u8), ()> = TableDefinition::new("exports");
const ALLOWED_HOSTS: TableDefinition<'_, (u32, u8), &[u8]> = TableDefinition::new("allowed_hosts");
const CLUSTER: [u8; 16] = [0xc5; 16];
const HOST: &str = "nqn.2014-08.org.example:a";

/// A file, its schema, and whether it has a table of allowed hosts.
type Old = (&'static str, u32, bool);

/// Schema 1 as it first was, with the table of allowed hosts that came later, and schema 2.
const OLD: [Old; 3] =
    [("schema1-no-allow-list.redb", 1, false), ("schema1.redb", 1, true), ("schema2.redb", 2, true)];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// Three targets, a pool of two copysets, one volume exported over both protocols and one deleted.
fn make_old(path: &Path, schema: u32, allow_lists: bool) {
    let db = Database::create(path).unwrap();
    let write = db.begin_write().unwrap();
    {
        let mut meta = write.open_table(META).unwrap();
        meta.insert("schema", schema.to_le_bytes().as_slice()).unwrap();
        meta.insert("cluster", CLUSTER.as_slice()).unwrap();
        let counters = br#"{"generation":9,"next_pool":2,"next_copyset":3,"next_volume":3}"#;
        meta.insert("counters", counters.as_slice()).unwrap();
        // What came with schema 2.
        let with = |fields: &'static str| if schema < 2 { "" } else { fields };
        let target = |id: u32| {
            format!(
                r#"{{"disk_uuid":"{:032x}","peers":["127.0.0.1:{}"],"endpoints":{{"admin":"127.0.0.1:{}","metrics":null,"nbd_tcp":null,"nbd_unix":"","nvme_tcp":"127.0.0.1:{}"}},"capacity_bytes":4294967296{}}}"#,
                id,
                7500 + id,
                7600 + id,
                4420 + id,
                with(r#","draining":false,"zone":"z1","host":"h1","labels":{"rack":"r1"}"#)
            )
        };
        let volume = |name, deleted| {
            let more = with(r#","purge_at_s":null"#);
            format!(
                r#"{{"name":"{name}","bytes":3221225472,"block_bytes":4096,"pool":1,"copysets":[1,2],"deleted":{deleted}{more}}}"#
            )
        };
        let pool =
            format!(r#"{{"name":"default","replicas":3,"copysets":[1,2]{}}}"#, with(r#","targets":[]"#));
        let copyset =
            |members| format!(r#"{{"pool":1,"members":{members}{}}}"#, with(r#","epoch":0,"told":[0,0]"#));
        let rows: [(&str, u32, String); 8] = [
            ("targets", 1, target(1)),
            ("targets", 2, target(2)),
            ("targets", 3, target(3)),
            ("pools", 1, pool),
            ("copysets", 1, copyset("[[1,0],[2,0],[3,0]]")),
            ("copysets", 2, copyset("[[2,0],[3,0],[1,0]]")),
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
fn copy_of((name, schema, allow_lists): Old) -> TempDir {
    if std::env::var_os("BLESS").is_some() && !path(name).exists() {
        make_old(&path(name), schema, allow_lists);
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
    for old @ (name, _, allow_lists) in OLD {
        let dir = copy_of(old);
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
        assert_eq!(map.volumes[&VolumeId(1)].session, Session::default(), "anybody may attach, as before");
    }
}

#[test]
fn what_is_written_to_a_database_of_an_older_schema_is_there_after_a_restart() {
    for old @ (name, ..) in OLD {
        let dir = copy_of(old);
        let (mut store, mut state) = open(dir.path());
        let volume = VolumeRef::Name("vol0".into());
        let allowed = Some([HOST.to_owned(), "nqn.2014-08.org.example:b".to_owned()].into());
        let command = Command::AddExport { volume, protocol: ExportProtocol::Nvme, allowed };
        let decision = state.decide(Time::default(), command).unwrap();
        assert!(decision.changes.iter().any(|change| matches!(change, Change::Export(..))));
        store.commit(&decision.changes).unwrap();
        state.apply(decision.changes);
        let volume = VolumeRef::Name("vol0".into());
        let attach = Attach { volume, holder: HOST.into(), exclusive: true, take_over: false };
        let decision = state.decide(Time::default(), Command::Attach(attach)).unwrap();
        store.commit(&decision.changes).unwrap();
        state.apply(decision.changes);
        assert_eq!(state.session(VolumeId(1)).epoch, 1, "the first one");
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
    let dir = copy_of(OLD[0]);
    drop(open(dir.path()));
    let db = Database::create(dir.path().join(FILE)).unwrap();
    let meta = db.begin_read().unwrap().open_table(META).unwrap();
    let schema = meta.get("schema").unwrap().unwrap();
    assert_eq!(schema.value(), SCHEMA.to_le_bytes().as_slice());
}

/// Snapshots of version 1, byte for byte, with the records of schema 2 and of today: what was backed up long ago
/// must be read.
#[test]
fn a_snapshot_of_an_older_version_is_read_and_a_damaged_one_refused() {
    check_snapshot("snapshot1.bin", false);
    check_snapshot("snapshot1-schema3.bin", true);
}

fn check_snapshot(name: &str, of_today: bool) {
    let file = path(name);
    if std::env::var_os("BLESS").is_some() && !file.exists() {
        let dir = copy_of(OLD[1]);
        let mut store = RedbStore::open(dir.path()).unwrap();
        let (cluster, mut changes) = (store.cluster(), store.load().unwrap());
        let holders = [HOST.to_owned()].into();
        changes.push(Change::Session(VolumeId(1), SessionRecord { epoch: 3, exclusive: true, holders }));
        changes.iter_mut().for_each(|change| {
            if let Change::Counters(counters) = change {
                counters.next_epoch = 4;
            }
        });
        std::fs::write(&file, Snapshot { cluster, changes }.encode()).unwrap();
    }
    let bytes = std::fs::read(&file).unwrap();
    let snapshot = Snapshot::decode(&bytes).unwrap();
    let state = State::restore(Policy::default(), snapshot.cluster, snapshot.changes.clone()).unwrap();
    assert_eq!((state.cluster(), state.map().generation), (Uuid(CLUSTER), 9));
    assert_eq!((state.map().targets.len(), state.map().volumes.len(), state.map().exports.len()), (3, 2, 2));
    let session = &state.map().volumes[&VolumeId(1)].session;
    assert_eq!((session.epoch.0, session.holder.as_str()), if of_today { (3, HOST) } else { (0, "") });
    if of_today {
        assert_eq!(snapshot.encode(), bytes, "what is written today is the same");
    }
    for length in 0..bytes.len() {
        assert!(Snapshot::decode(&bytes[..length]).is_err(), "cut to {length}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Snapshot::decode(&bytes).is_err(), "bit {bit}");
    }
}
