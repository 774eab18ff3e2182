//! Hazards of several writers: one that was deposed and does not know, a transaction that comes late, a long
//! list of changes that its leader did not live to finish. Against a real etcd.

use super::*;
use crate::election::{Candidacy, Standing};
use crate::etcd::EtcdAt;
use crate::etcd_server::EtcdServer;
use crate::record::{CopysetRecord, PoolRecord, TargetRecord, VolumeRecord};
use crate::state::{Policy, State};
use protocol::types::{CopysetId, ShardAddr, TargetId, VolumeId};
use std::time::Instant;
use tokio::sync::oneshot;

const MS: Duration = Duration::from_millis(1);

/// A real etcd and a runtime that drives connections to it.
struct World {
    server: EtcdServer,
    runtime: Handle,
    /// The thread of the runtime ends with it.
    _alive: oneshot::Sender<()>,
}

impl World {
    fn new() -> Option<Self> {
        let server = EtcdServer::start()?;
        let (tell, told) = std::sync::mpsc::channel();
        let (alive, ended) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tell.send(runtime.handle().clone()).unwrap();
            let _ = runtime.block_on(ended);
        });
        Some(Self { server, runtime: told.recv().unwrap(), _alive: alive })
    }

    fn at(&self) -> EtcdAt {
        self.server.url().parse().unwrap()
    }

    fn client(&self) -> Etcd {
        let _inside = self.runtime.enter();
        Etcd::new(&self.at())
    }

    /// A candidate that leads.
    fn leader(&self, name: &str) -> Candidacy {
        let (etcd, prefix) = (self.client(), self.at().prefix);
        self.runtime.block_on(async {
            let mut tries = 0..100;
            let candidacy = loop {
                match Candidacy::begin(&etcd, &prefix, name).await {
                    Ok(candidacy) => break candidacy,
                    Err(trouble) if tries.next().is_none() => panic!("{trouble}"),
                    Err(_) => tokio::time::sleep(50 * MS).await,
                }
            };
            while candidacy.standing(&prefix).await.unwrap() != Standing::Leads {
                tokio::time::sleep(50 * MS).await;
            }
            candidacy
        })
    }

    fn open(&self, candidacy: &Candidacy) -> EtcdStore {
        self.try_open(candidacy).unwrap()
    }

    fn try_open(&self, candidacy: &Candidacy) -> Result<EtcdStore, Problem> {
        let runtime = self.runtime.clone();
        EtcdStore::open(&self.client(), &self.at().prefix, candidacy.mandate(), runtime)
    }

    fn resign(&self, candidacy: Candidacy) {
        self.runtime.block_on(candidacy.resign());
    }
}

fn counters(generation: u64) -> Change {
    Change::Counters(Counters { generation, ..Counters::default() })
}

fn is_at(store: &mut EtcdStore, generation: u64) -> bool {
    store.load().unwrap().contains(&counters(generation))
}

#[test]
fn a_deposed_leader_that_does_not_know_it_writes_nothing() {
    let Some(world) = World::new() else { return };
    let first = world.leader("first");
    let mut old = world.open(&first);
    old.commit(&[counters(7)]).unwrap();
    // Its lease is ended behind its back, as if it had run out while the process was stopped.
    first.believe_for_ever();
    world.runtime.block_on(world.client().revoke(first.lease_id())).unwrap();
    assert!(first.mandate().tenure.holds(), "it still takes itself for the leader");
    let lost = old.lost();
    // Even before anybody else leads.
    let problem = old.commit(&[counters(8)]).unwrap_err();
    assert_eq!(problem.kind, ProblemKind::NotLeader, "{problem}");
    let second = world.leader("second");
    let mut new = world.open(&second);
    assert_eq!(new.cluster(), old.cluster());
    assert!(*lost.borrow(), "whoever runs it is told");
    assert!(is_at(&mut new, 7));
    assert_eq!(world.try_open(&first).unwrap_err().kind, ProblemKind::NotLeader);
    new.commit(&[counters(9)]).unwrap();
    assert!(old.commit(&[counters(10)]).is_err(), "nor later");
    assert!(is_at(&mut new, 9));
}

#[test]
fn a_transaction_that_comes_late_or_twice_takes_effect_once_and_never_after_a_later_one() {
    let Some(world) = World::new() else { return };
    let candidacy = world.leader("one");
    let mut store = world.open(&candidacy);
    let key = store.at("last");
    let late = pb::TxnRequest {
        compare: vec![created_at(&store.guard.key, store.guard.revision), holds(&key, &store.last)],
        success: vec![put(store.row_key(Table::Counters, Key(0, 0)), "late", 0), put(key, "late", 0)],
        failure: Vec::new(),
    };
    store.commit(&[counters(5)]).unwrap();
    let answer = world.runtime.block_on(world.client().txn(late)).unwrap();
    assert!(!answer.succeeded);
    assert!(is_at(&mut store, 5));
    // The answer of an attempt is lost: what it wrote is found to be its own.
    let mut twin = EtcdStore {
        etcd: store.etcd.clone(),
        runtime: store.runtime.clone(),
        prefix: store.prefix.clone(),
        guard: store.guard.clone(),
        cluster: store.cluster,
        last: store.last.clone(),
        written: store.written,
        lost: watch::Sender::new(false),
        failed: None,
    };
    store.commit(&[counters(6)]).unwrap();
    twin.commit(&[counters(6)]).unwrap();
    assert!(is_at(&mut twin, 6));
}

#[test]
fn an_etcd_that_hangs_for_a_while_is_waited_for_and_what_was_written_meanwhile_is_there_once() {
    let Some(world) = World::new() else { return };
    let candidacy = world.leader("one");
    candidacy.believe_for_ever();
    let mut store = world.open(&candidacy);
    world.server.signal("-STOP");
    let writing = std::thread::spawn(move || {
        let written = store.commit(&[counters(4)]);
        (store, written)
    });
    // Longer than one attempt, shorter than the lease.
    std::thread::sleep(Duration::from_millis(1300));
    world.server.signal("-CONT");
    let (mut store, written) = writing.join().unwrap();
    written.unwrap();
    assert!(is_at(&mut store, 4));
    world.server.signal("-STOP");
    let reading = std::thread::spawn(move || is_at(&mut store, 4));
    std::thread::sleep(Duration::from_millis(100));
    world.server.signal("-CONT");
    assert!(reading.join().unwrap());
}

/// More rows than one transaction takes.
fn many(count: u32) -> Vec<Change> {
    let members = |id: u32| {
        (0..3).map(|n| ShardAddr { target: TargetId((id + n) % 1000 + 1), shard: 0 }).collect::<Vec<_>>()
    };
    let copyset = |id: u32| {
        Change::Copyset(
            CopysetId(id),
            CopysetRecord { pool: 1, members: members(id), epoch: 0, told: (0, 0) },
        )
    };
    (1..=count).map(copyset).collect()
}

#[test]
fn a_long_list_whose_leader_dies_is_done_by_the_next_one_once_it_counts_and_else_forgotten() {
    let Some(world) = World::new() else { return };
    let first = world.leader("first");
    let mut store = world.open(&first);
    let rows: Vec<Row> = many(1000).iter().flat_map(rows_of).collect();
    let mut bytes = Vec::new();
    rows.iter().for_each(|row| encode_row(row, &mut bytes));
    let halves = bytes.chunks(bytes.len().div_ceil(2));
    let pieces: Vec<_> = halves.enumerate().map(|(at, half)| put(store.staged(at), half, 0)).collect();
    // It dies after the pieces.
    store.write(pieces.clone()).unwrap();
    world.resign(first);
    let second = world.leader("second");
    let mut store = world.open(&second);
    assert_eq!(store.load().unwrap().len(), 1, "only the counters");
    assert!(store.read(&store.at("staged/"), 0).unwrap().0.is_empty(), "what does not count is gone");
    // It dies after what makes them count.
    store.write(pieces).unwrap();
    store.write(vec![put(store.at("staging"), "2 ", 0)]).unwrap();
    world.resign(second);
    let third = world.leader("third");
    let mut store = world.open(&third);
    assert_eq!(store.load().unwrap().len(), 1001);
    assert!(store.value(&store.at("staging")).unwrap().is_none());
    // And one that lives.
    let ends: Vec<Change> = many(300).into_iter().chain([counters(3)]).collect();
    store.commit(&ends).unwrap();
    assert!(is_at(&mut store, 3));
    // All is replaced at once.
    let cluster = Uuid([9; 16]);
    store.replace(cluster, rows_of(&counters(11))).unwrap();
    assert_eq!(store.load().unwrap(), [counters(11)]);
    world.resign(third);
    let fourth = world.leader("fourth");
    assert_eq!(world.open(&fourth).cluster(), cluster);
}

/// Small unless ASHLAR_LONG=1: 1,000 targets, 100,000 copysets, 10,000 volumes. Prints what it costs.
#[test]
fn a_large_cluster_is_stored_and_loaded() {
    let Some(world) = World::new() else { return };
    let (copysets, volumes) = match std::env::var("ASHLAR_LONG").is_ok_and(|value| value == "1") {
        true => (100_000, 10_000),
        false => (600, 50),
    };
    let candidacy = world.leader("one");
    let mut store = world.open(&candidacy);
    let target = |id: u32| {
        let address = ([10, 0, (id >> 8) as u8, id as u8], 7500).into();
        let mut disk_uuid = [1; 16];
        disk_uuid[..4].copy_from_slice(&id.to_le_bytes());
        let record = TargetRecord {
            disk_uuid: Uuid(disk_uuid),
            peers: vec![address],
            endpoints: Default::default(),
            capacity_bytes: 1 << 40,
            draining: false,
            zone: String::new(),
            host: String::new(),
            labels: Default::default(),
        };
        Change::Target(TargetId(id), record)
    };
    let volume = |id: u32| {
        let copysets = (1..=200).map(CopysetId).collect();
        let (name, bytes, block_bytes) = (format!("v{id}"), 1 << 40, 4096);
        let record =
            VolumeRecord { name, bytes, block_bytes, pool: 1, copysets, deleted: false, purge_at_s: None };
        Change::Volume(VolumeId(id), record)
    };
    let pool = PoolRecord {
        name: "default".into(),
        replicas: 3,
        copysets: (1..=copysets).map(CopysetId).collect(),
        targets: Vec::new(),
    };
    let (next_copyset, next_volume) = (copysets + 1, volumes + 1);
    let next = Counters { generation: 2, next_pool: 2, next_copyset, next_volume, ..Counters::default() };
    let mut changes: Vec<Change> = (1..=1000).map(target).collect();
    changes.extend(many(copysets));
    changes.extend([Change::Pool(1, pool), Change::Counters(next)]);
    let began = Instant::now();
    store.commit(&changes).unwrap();
    eprintln!("{} records written to etcd in {:?}", changes.len(), began.elapsed());
    let began = Instant::now();
    let changes: Vec<Change> = (1..=volumes).map(volume).collect();
    store.commit(&changes).unwrap();
    eprintln!("{volumes} volumes in {:?}", began.elapsed());
    let began = Instant::now();
    store.commit(&[volume(1), Change::Counters(next)]).unwrap();
    eprintln!("one more in {:?}", began.elapsed());
    world.resign(candidacy);
    let candidacy = world.leader("two");
    let began = Instant::now();
    let mut store = world.open(&candidacy);
    let records = store.load().unwrap();
    eprintln!("{} records read in {:?}", records.len(), began.elapsed());
    let state = State::restore(Policy::default(), store.cluster(), records).unwrap();
    eprintln!("a new leader is ready in {:?}", began.elapsed());
    assert_eq!(
        (state.map().copysets.len(), state.map().volumes.len()),
        (copysets as usize, volumes as usize)
    );
}
