//! Several MDS on one etcd: one leads, the others say so and take over; and records that go from one kind of
//! store to the other by a snapshot. Skipped, with a line that says so, where etcd is not installed.

mod etcd_server;

use ashlar_mds_lite::snapshot::{AHEAD, Snapshot, restore};
use ashlar_mds_lite::state::Policy;
use ashlar_mds_lite::{Config, Server, StoreAt};
use etcd_server::EtcdServer;
use protocol::control::pb::mds_client::MdsClient;
use protocol::control::{Problem, ProblemKind, pb};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

struct Running {
    address: String,
    client: MdsClient<Channel>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), Problem>>,
}

impl Running {
    async fn start(store: StoreAt) -> Self {
        let config = Config::new(store, "127.0.0.1:0".parse().unwrap(), Policy::default());
        let server = Server::start(config).await.unwrap();
        let address = server.address().to_string();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(server.serve(async move { drop(stopped.await) }));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { address, client: MdsClient::new(channel).max_decoding_message_size(64 << 20), stop, served }
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.served.await.unwrap().unwrap();
    }

    async fn map(&mut self) -> Result<pb::ClusterMap, Problem> {
        let answer = self.client.get_map(pb::GetMapRequest::default()).await;
        Ok(answer.map_err(|status| Problem::from_status(&status))?.into_inner().map.unwrap())
    }

    async fn leads(&mut self) -> pb::ClusterMap {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            match self.map().await {
                Ok(map) => return map,
                Err(problem) => assert!(Instant::now() < end, "{problem}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn fill(&mut self) {
        for id in 1..=3_u32 {
            let target = pb::RegisterTargetRequest {
                id,
                disk_uuid: vec![id as u8; 16],
                peers: vec![format!("127.0.0.1:{}", 7000 + id)],
                capacity_bytes: 4 << 30,
                ..Default::default()
            };
            self.client.register_target(target).await.unwrap();
        }
        let volume = pb::CreateVolumeRequest { name: "vol0".into(), bytes: 1 << 30, ..Default::default() };
        let id = self.client.create_volume(volume).await.unwrap().into_inner().volume.unwrap().id;
        let volume = Some(pb::VolumeRef { id, name: String::new() });
        let export = pb::AddExportRequest { volume, protocol: 2, allowed: None };
        self.client.add_export(export).await.unwrap();
        let segments = pb::AllocateSegmentsRequest { volume: id, segments: vec![0] };
        self.client.allocate_segments(segments).await.unwrap();
    }

    async fn snapshot(&mut self) -> Vec<u8> {
        let mut stream = self.client.snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(piece) = stream.message().await.unwrap() {
            bytes.extend(piece.bytes);
        }
        bytes
    }
}

#[tokio::test]
async fn one_of_two_leads_the_other_names_it_and_takes_over_with_all_that_was_written() {
    let Some(etcd) = EtcdServer::start() else { return };
    let store: StoreAt = etcd.url().parse().unwrap();
    let mut first = Running::start(store.clone()).await;
    first.leads().await;
    let mut second = Running::start(store).await;
    first.fill().await;
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let problem = second.map().await.expect_err("it stands by");
        assert_eq!(problem.kind, ProblemKind::NotLeader, "{problem}");
        if problem.leader.as_deref() == Some(first.address.as_str()) {
            break;
        }
        assert!(Instant::now() < end, "{problem}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let map = first.map().await.unwrap();
    let mut watch = first.client.watch_map(pb::WatchMapRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    let began = Instant::now();
    first.stop().await;
    assert!(!matches!(watch.message().await, Ok(Some(_))), "a watch ends with the lead");
    assert_eq!(second.leads().await, map);
    eprintln!("the other leads {:?} after the first was told to stop", began.elapsed());
    second.stop().await;
}

#[tokio::test]
async fn a_snapshot_goes_from_redb_to_etcd_and_back_and_overwrites_nothing_unasked() {
    let Some(etcd) = EtcdServer::start() else { return };
    let (there, back) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let file = there.path().join("snapshot");
    let in_redb = StoreAt::Directory(there.path().into());
    let in_etcd: StoreAt = etcd.url().parse().unwrap();

    let mut mds = Running::start(in_redb.clone()).await;
    mds.fill().await;
    let map = mds.map().await.unwrap();
    std::fs::write(&file, mds.snapshot().await).unwrap();
    assert_eq!(restore(&file, &in_redb, true).await.unwrap_err().kind, ProblemKind::InUse);
    mds.stop().await;
    assert_eq!(restore(&file, &in_redb, false).await.unwrap_err().kind, ProblemKind::AlreadyExists);

    restore(&file, &in_etcd, false).await.unwrap();
    assert_eq!(restore(&file, &in_etcd, false).await.unwrap_err().kind, ProblemKind::AlreadyExists);
    restore(&file, &in_etcd, true).await.unwrap();
    let mut mds = Running::start(in_etcd.clone()).await;
    let restored = mds.leads().await;
    assert_eq!(restored.generation, map.generation + AHEAD.generation, "targets take it for newer");
    let mut map = map;
    map.copysets.iter_mut().for_each(|copyset| copyset.epoch = 1);
    assert_eq!(pb::ClusterMap { generation: map.generation, ..restored }, map);
    let volume = pb::CreateVolumeRequest { name: "vol1".into(), bytes: 1 << 30, ..Default::default() };
    let volume = mds.client.create_volume(volume).await.unwrap().into_inner().volume.unwrap();
    assert!(volume.id > AHEAD.next_volume, "an id that was never given out: {}", volume.id);
    assert_eq!(restore(&file, &in_etcd, true).await.unwrap_err().kind, ProblemKind::InUse);
    std::fs::write(&file, mds.snapshot().await).unwrap();
    let map = mds.map().await.unwrap();
    mds.stop().await;

    let in_redb = StoreAt::Directory(back.path().into());
    let snapshot = restore(&file, &in_redb, false).await.unwrap();
    assert_eq!(Snapshot::decode(&snapshot.encode()).unwrap(), snapshot);
    let mut mds = Running::start(in_redb).await;
    let restored = mds.map().await.unwrap();
    assert_eq!(pb::ClusterMap { generation: map.generation, ..restored }, map);
    mds.stop().await;
}
