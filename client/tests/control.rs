//! The client against the real MDS: what it hands out is checked, and a watch outlives a restart.

use ashlar_client::control::{MapWatch, MdsClient, Patience, volume_ref};
use mds_lite::state::Policy;
use mds_lite::{Config, Server, StoreAt};
use protocol::control::{Problem, ProblemKind, pb};
use protocol::map::ExportProtocol;
use protocol::types::ChunkId;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

type Served = JoinHandle<Result<(), Problem>>;

async fn start(dir: &Path, listen: SocketAddr) -> (SocketAddr, oneshot::Sender<()>, Served) {
    let server =
        Server::start(Config::new(StoreAt::Directory(dir.into()), listen, Policy::default())).await.unwrap();
    let address = server.address();
    let (stop, stopped) = oneshot::channel();
    (address, stop, tokio::spawn(server.serve(async move { drop(stopped.await) })))
}

fn target(id: u32) -> pb::RegisterTargetRequest {
    pb::RegisterTargetRequest {
        id,
        disk_uuid: vec![id as u8; 16],
        peers: vec![format!("127.0.0.1:{}", 7000 + id)],
        capacity_bytes: 4 << 30,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_watch_outlives_a_restart_and_no_volume_is_lost() {
    let dir = tempfile::TempDir::new().unwrap();
    let (address, stop, served) = start(dir.path(), "127.0.0.1:0".parse().unwrap()).await;
    let mds = MdsClient::new(&address.to_string(), Patience::default()).unwrap();
    for id in 1..=3 {
        let registered = mds.register(target(id)).await.unwrap();
        assert_eq!(registered.map.targets.len(), id as usize);
    }
    let mut watch = MapWatch::new(mds.clone(), None);
    let first = watch.next().await.unwrap();
    let volume = mds.create_volume("vol0", 1 << 30, 512, "").await.unwrap();
    mds.add_export(volume_ref("vol0"), ExportProtocol::Nbd, None).await.unwrap();
    let mut map = watch.next().await.unwrap();
    while map.exports.is_empty() {
        map = watch.next().await.unwrap();
    }
    assert!(map.generation > first.generation);
    let (id, _) = map.volume_named("vol0").unwrap();
    assert_eq!(id.0, volume.id);
    assert_eq!(mds.allocate(id, &[0]).await.unwrap(), 1 << 30);
    let routed = mds.route(ChunkId { volume: id, index: 3 }).await.unwrap();
    assert_eq!(routed.copyset, map.route(ChunkId { volume: id, index: 3 }).unwrap().0.0);
    let taken = mds.create_volume("vol0", 1 << 30, 512, "").await.unwrap_err();
    assert_eq!(taken.kind, ProblemKind::AlreadyExists);

    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert_eq!(watch.next().await.unwrap_err().kind, ProblemKind::Unreachable);
    let gone = MdsClient::new(&address.to_string(), Patience::ONCE).unwrap().status().await.unwrap_err();
    assert_eq!(gone.kind, ProblemKind::Unreachable, "{gone}");

    let (_, stop, served) = start(dir.path(), address).await;
    mds.create_volume("vol1", 4096, 4096, "default").await.unwrap();
    let newer = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Ok(map) = watch.next().await {
                return map;
            }
        }
    });
    let newer = newer.await.expect("the watch comes back by itself");
    assert!(newer.generation > map.generation);
    assert_eq!(mds.volumes(false).await.unwrap().len(), 2);
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
}

#[path = "../../mds-lite/tests/etcd_server/mod.rs"]
mod etcd_server;

#[tokio::test]
async fn a_client_of_several_mds_finds_who_leads_and_follows_when_that_changes() {
    let Some(etcd) = etcd_server::EtcdServer::start() else { return };
    let mut running = Vec::new();
    for _ in 0..3 {
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config::new(etcd.url().parse().unwrap(), listen, Policy::default());
        let server = Server::start(config).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let address = server.address().to_string();
        running.push((address, stop, tokio::spawn(server.serve(async move { drop(stopped.await) }))));
    }
    // One is given that is not there at all.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let addresses: Vec<&str> =
        std::iter::once(&gone).chain(running.iter().map(|r| &r.0)).map(|a| &**a).collect();
    let mds = MdsClient::new(&addresses.join(","), Patience::default()).unwrap();
    for id in 1..=3 {
        mds.register(target(id)).await.unwrap();
    }
    // A call that may take effect twice goes to who leads, and is carried out once.
    mds.create_volume("vol0", 1 << 30, 512, "").await.unwrap();
    let mut watch = MapWatch::new(mds.clone(), None);
    assert_eq!(watch.next().await.unwrap().volumes.len(), 1);
    let leader = mds.address();
    let at = running.iter().position(|(address, ..)| *address == leader).expect("it is one of them");
    // A client that knows a standby alone is sent on.
    let standby = &running[(at + 1) % 3].0;
    let sent_on = MdsClient::new(standby, Patience::default()).unwrap();
    assert_eq!(sent_on.volumes(false).await.unwrap().len(), 1);
    assert_eq!(sent_on.address(), leader);

    let (_, stop, served) = running.swap_remove(at);
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    mds.create_volume("vol1", 1 << 30, 512, "").await.expect("the next leader is found within patience");
    assert_ne!(mds.address(), leader);
    let newer = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Ok(map) = watch.next().await {
                return map;
            }
        }
    });
    assert_eq!(newer.await.expect("the watch goes on at another MDS").volumes.len(), 2);
    for (_, stop, served) in running {
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
    }
}
