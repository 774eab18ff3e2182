//! The control thread against a real MDS, and without one.

use super::*;
use protocol::types::CopysetId;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// An MDS on a thread of its own, that can be stopped and started on the same data.
struct Mds {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl Mds {
    fn start(dir: &Path, listen: SocketAddr) -> Self {
        let policy =
            mds_lite::state::Policy { replicas: 1, copysets: 2, targets_expected: 1, ..Default::default() };
        let config = mds_lite::Config::new(mds_lite::StoreAt::Directory(dir.to_owned()), listen, policy);
        let (stop, mut stopping) = watch::channel(false);
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let server = mds_lite::Server::start(config).await.unwrap();
                tell.send(server.address()).unwrap();
                let stopped = async move {
                    let _ = stopping.wait_for(|stop| *stop).await;
                };
                server.serve(stopped).await.unwrap();
            });
        });
        Self { address: told.recv().unwrap(), stop, thread }
    }
    fn stop(self) {
        self.stop.send(true).unwrap();
        self.thread.join().unwrap();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// An address that nobody listens on. Not one that the kernel gives out: between two uses it might go to another test.
fn free() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() as u16).wrapping_mul(8);
    loop {
        let port = 20_000 + first.wrapping_add(NEXT.fetch_add(1, Relaxed)) % 12_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

fn config(dir: &Path, mds: SocketAddr) -> TargetConfig {
    let text = format!(
        "id = 1\ndir = {dir:?}\nmds = [\"{mds}\"]\ncapacity_bytes = 4294967296\n[listen]\npeer = [\"{}\"]\nadmin = \"{}\"\nmetrics = \"{}\"\n",
        free(),
        free(),
        free()
    );
    TargetConfig::parse(&text, "target.toml").unwrap()
}

fn identity(dir: &Path) -> Identity {
    Identity::load(dir).unwrap().unwrap_or_else(|| Identity::create(dir, TargetId(1)).unwrap())
}

fn begin(config: &TargetConfig) -> (ControlHandle, ShardPort) {
    let (ends, mut ports) = shard_ports(vec![Box::new(|| {})]);
    let identity = identity(&config.dir);
    (start(Start { config: config.clone(), identity, ends }).unwrap(), ports.pop().unwrap())
}

/// The next message that is wanted, within 10 s.
fn wait<T>(port: &mut ShardPort, what: &str, mut wanted: impl FnMut(ToShard) -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        if let Some(found) = port.take().and_then(&mut wanted) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{what} did not come");
}

fn map_of(message: ToShard) -> Option<Arc<ClusterMap>> {
    if let ToShard::Map(map) = message { Some(map) } else { None }
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_target_joins_keeps_its_map_and_serves_by_it_while_the_mds_is_away() {
    let (dir, mds_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mds = Mds::start(mds_dir.path(), free());
    let config = config(dir.path(), mds.address);
    let (control, mut port) = begin(&config);
    let map = wait(&mut port, "a map with copysets", |m| map_of(m).filter(|m| m.copysets.len() == 2));
    assert!(control.cached.is_none());
    assert_eq!(identity(dir.path()).cluster, Some(map.cluster));
    assert!(get(config.listen.metrics, "/healthz").starts_with("HTTP/1.1 200"));
    let page = get(config.listen.metrics, "/metrics");
    assert!(page.contains("ashlar_mds_reachable 1") && page.contains("ashlar_reads_total{shard=\"0\"} 0"));
    control.stop();
    let address = mds.address;
    mds.stop();

    let (control, mut port) = begin(&config);
    let cached = wait(&mut port, "the cached map", map_of);
    assert!(cached.generation >= map.generation && cached.cluster == map.cluster);
    assert!(get(config.listen.metrics, "/metrics").contains("ashlar_mds_reachable 0"));
    let mds = Mds::start(mds_dir.path(), address);
    let end = Instant::now() + Duration::from_secs(10);
    while !get(config.listen.metrics, "/metrics").contains("ashlar_mds_reachable 1") {
        assert!(Instant::now() < end, "it never came back to the MDS");
        std::thread::sleep(Duration::from_millis(20));
    }
    control.stop();
    mds.stop();
}

#[test]
fn first_writes_are_accounted_for_and_new_volumes_reach_the_shards_at_once() {
    let (dir, mds_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mds = Mds::start(mds_dir.path(), free());
    let config = config(dir.path(), mds.address);
    let (control, mut port) = begin(&config);
    wait(&mut port, "copysets", |m| map_of(m).filter(|m| m.copysets.len() == 2));
    let runtime = runtime();
    let inside = runtime.enter();
    let client = MdsClient::new(&mds.address.to_string(), Patience::default()).unwrap();
    let created = runtime.block_on(client.create_volume("v", 2 << 30, 4096, ""));
    let volume = VolumeId(created.unwrap().id);
    wait(&mut port, "the volume", |m| map_of(m).filter(|m| m.volumes.contains_key(&volume)));
    port.tell(FromShard::FirstWrite { volume, segment: 1 });
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let by_id = pb::VolumeRef { id: volume.0, name: String::new() };
        let stat = runtime.block_on(client.stat_volume(by_id)).unwrap();
        if stat.allocated == [0b10] {
            break;
        }
        assert!(Instant::now() < end, "the segment was not accounted for: {stat:?}");
        port.take();
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(inside);
    control.stop();
    mds.stop();
}

#[test]
fn operators_are_answered_by_the_shard_or_told_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), free());
    let (control, mut port) = begin(&config);
    assert!(get(config.listen.metrics, "/healthz").contains("no cluster map yet"));
    let replicas = vec![pb::ReplicaStatus { copyset: 5, ..Default::default() }];
    port.post_status(pb::ShardStatus { replicas, ..Default::default() });
    port.tell(FromShard::Failed { why: "EIO at log write".into() });
    let admin = config.listen.admin.to_string();
    let operator = std::thread::spawn(move || {
        runtime().block_on(async {
            let client = client::control::AdminClient::new(&admin, Patience::default()).unwrap();
            let status = client.status().await.unwrap();
            let connections = client.connections().await.unwrap();
            let elsewhere = client.transfer_leader(CopysetId(9), TargetId(2)).await.unwrap_err();
            client.transfer_leader(CopysetId(5), TargetId(2)).await.unwrap();
            let unknown = client.chunk_checksums(VolumeId(3), false).await.err().unwrap();
            (status, connections, elsewhere.kind, unknown.kind)
        })
    });
    wait(&mut port, "the question for connections", |message| match message {
        ToShard::Connections { reply } => {
            reply.send(vec![pb::Connection { id: 4, ..Default::default() }]).ok()
        }
        _ => None,
    });
    wait(&mut port, "the transfer", |message| match message {
        ToShard::TransferLeader { copyset: CopysetId(5), to: TargetId(2), reply } => reply.send(Ok(())).ok(),
        _ => None,
    });
    let (status, connections, elsewhere, unknown) = operator.join().unwrap();
    assert_eq!((status.target, status.pid), (1, std::process::id()));
    assert!(status.shards[0].failed && status.shards[0].failure == "EIO at log write");
    assert_eq!(status.mds_age_ms, None);
    assert_eq!(connections[0].id, 4);
    assert_eq!((elsewhere, unknown), (ProblemKind::NotFound, ProblemKind::NotFound));
    assert!(get(config.listen.metrics, "/healthz").starts_with("HTTP/1.1 503"));
    control.stop();
}

#[test]
fn an_address_in_use_is_named_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), free());
    let _taken = TcpListener::bind(config.listen.metrics).unwrap();
    let (ends, _ports) = shard_ports(vec![Box::new(|| {})]);
    let problem = start(Start { identity: identity(dir.path()), config, ends }).unwrap_err();
    assert!(problem.what.contains("listen.metrics"), "{problem:?}");
}

#[test]
fn a_damaged_map_cache_costs_only_a_wait() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MAP_CACHE_FILE), b"ASHLRMAP garbage").unwrap();
    let (control, mut port) = begin(&config(dir.path(), free()));
    assert!(control.cached.is_none() && port.take().is_none());
    control.stop();
}
