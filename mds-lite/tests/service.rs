//! The service over loopback, as targets, operators and strangers meet it.

use ashlar_mds_lite::gate::{Caller, Gate};
use ashlar_mds_lite::state::Policy;
use ashlar_mds_lite::{Config, Server, StoreAt};
use protocol::control::pb::mds_client::MdsClient;
use protocol::control::{Problem, ProblemKind, limits, map_from_pb, pb};
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

const GIB: u64 = 1 << 30;

struct Running {
    address: SocketAddr,
    client: MdsClient<Channel>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), Problem>>,
}

impl Running {
    async fn start(dir: &Path) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let server = Server::start(Config::new(StoreAt::Directory(dir.into()), listen, Policy::default()))
            .await
            .unwrap();
        let address = server.address();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(server.serve(async move { drop(stopped.await) }));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { address, client: MdsClient::new(channel), stop, served }
    }
    async fn stop(self) -> Duration {
        let begin = Instant::now();
        self.stop.send(()).unwrap();
        self.served.await.unwrap().unwrap();
        begin.elapsed()
    }
    async fn register_three(&mut self) {
        for id in 1..=3 {
            self.client.register_target(target(id)).await.unwrap();
        }
    }
}

fn target(id: u32) -> pb::RegisterTargetRequest {
    pb::RegisterTargetRequest {
        id,
        cluster: Vec::new(),
        disk_uuid: vec![id as u8; 16],
        peers: vec![format!("127.0.0.1:{}", 7000 + id)],
        endpoints: Some(pb::Endpoints {
            nbd_tcp: format!("127.0.0.1:{}", 10_800 + id),
            ..Default::default()
        }),
        capacity_bytes: 4 * GIB,
        ..Default::default()
    }
}

fn beat(id: u32, leads: &[u32]) -> pb::HeartbeatRequest {
    let replica = |copyset: u32| pb::ReplicaStatus {
        copyset,
        term: 3,
        role: if leads.contains(&copyset) { 3 } else { 1 },
        leader: if leads.contains(&copyset) { id } else { 0 },
        health: pb::ReplicaHealth::Whole.into(),
        ..Default::default()
    };
    pb::HeartbeatRequest {
        target: id,
        disk_uuid: vec![id as u8; 16],
        known_generation: 0,
        usage: Some(pb::Usage { capacity_bytes: 4 * GIB, used_bytes: GIB, formatted_bytes: 2 * GIB }),
        replicas: (1..=12).map(replica).collect(),
        freed_volumes: Vec::new(),
        ..Default::default()
    }
}

fn volume(name: &str) -> pb::CreateVolumeRequest {
    pb::CreateVolumeRequest { name: name.into(), bytes: 4 * GIB, ..Default::default() }
}

fn named(name: &str) -> Option<pb::VolumeRef> {
    Some(pb::VolumeRef { id: 0, name: name.into() })
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("no hang") });
}

#[test]
fn a_cluster_comes_up_and_survives_a_restart_of_its_mds() {
    run(async {
        let dir = TempDir::new().unwrap();
        let mut mds = Running::start(dir.path()).await;
        mds.register_three().await;
        let created = mds.client.create_volume(volume("vol0")).await.unwrap().into_inner().volume.unwrap();
        let request = pb::AddExportRequest { volume: named("vol0"), protocol: 1, allowed: None };
        let export = mds.client.add_export(request).await.unwrap().into_inner().export.unwrap();
        assert_eq!(export.places[2].tcp, "127.0.0.1:10803");
        let request = pb::AllocateSegmentsRequest { volume: created.id, segments: vec![0, 2] };
        assert_eq!(
            mds.client.allocate_segments(request).await.unwrap().into_inner().allocated_bytes,
            2 * GIB
        );
        for id in 1..=3 {
            let leads: Vec<u32> = (1..=12).filter(|copyset| copyset % 3 + 1 == id).collect();
            let answer = mds.client.heartbeat(beat(id, &leads)).await.unwrap().into_inner();
            let map = map_from_pb(&answer.map.unwrap()).unwrap();
            assert_eq!((map.copysets.len(), map.exports.len()), (12, 1));
        }
        let status = mds.client.status(pb::StatusRequest {}).await.unwrap().into_inner();
        assert_eq!(status.warnings, Vec::<String>::new());
        assert!(status.targets.iter().all(|t| t.online && t.leaders == 4 && t.replicas == 12), "{status:?}");
        assert_eq!(status.usage.unwrap().used_bytes, 3 * GIB);
        let route = pb::GetRouteRequest { volume: created.id, chunk: 5 };
        let routed = mds.client.get_route(route).await.unwrap().into_inner();
        assert_eq!(routed.leader.unwrap().leader, routed.copyset % 3 + 1);
        let before = mds.client.get_map(pb::GetMapRequest::default()).await.unwrap().into_inner().map;
        assert!(mds.stop().await < Duration::from_secs(2), "an idle MDS stops at once");

        let mut mds = Running::start(dir.path()).await;
        let after = mds.client.get_map(pb::GetMapRequest::default()).await.unwrap().into_inner().map;
        assert_eq!(after, before);
        let request = pb::StatVolumeRequest { volume: named("vol0") };
        let stat = mds.client.stat_volume(request).await.unwrap().into_inner();
        assert_eq!((stat.allocated, stat.volume.unwrap().allocated_segments), (vec![0b101], 2));
        let status = mds.client.status(pb::StatusRequest {}).await.unwrap().into_inner();
        assert!(status.targets.iter().all(|t| !t.online && t.heartbeat_age_ms.is_none()));
        assert!(status.copysets.iter().all(|c| c.unavailable && c.degraded));
        // A heartbeat brings a target back without a registration.
        mds.client.heartbeat(beat(1, &[])).await.unwrap();
        mds.stop().await;
    });
}

#[test]
fn a_watch_sees_each_change_and_does_not_hold_up_the_stop() {
    run(async {
        let dir = TempDir::new().unwrap();
        let mut mds = Running::start(dir.path()).await;
        mds.register_three().await;
        let request = pb::WatchMapRequest { known_generation: 0 };
        let mut watch = mds.client.watch_map(request).await.unwrap().into_inner();
        let first = watch.message().await.unwrap().unwrap();
        let mut poller = mds.client.clone();
        let known_generation = first.generation;
        let request = pb::GetMapRequest { known_generation, wait_ms: 20_000 };
        let poll = tokio::spawn(async move { poller.get_map(request).await.unwrap().into_inner().map });
        mds.client.create_volume(volume("vol0")).await.unwrap();
        let second = watch.message().await.unwrap().unwrap();
        assert_eq!((second.generation, second.volumes.len()), (first.generation + 1, 1));
        assert_eq!(poll.await.unwrap(), Some(second.clone()));

        let mut poller = mds.client.clone();
        let request = pb::GetMapRequest { known_generation: second.generation, wait_ms: 20_000 };
        let poll = tokio::spawn(async move { poller.get_map(request).await.map(|_| ()) });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(mds.stop().await < Duration::from_secs(2), "watchers and waiters are let go");
        let _ = poll.await.unwrap();
        assert!(!matches!(watch.message().await, Ok(Some(_))));
    });
}

#[test]
fn refusals_arrive_typed_and_on_one_line() {
    run(async {
        let dir = TempDir::new().unwrap();
        let mut mds = Running::start(dir.path()).await;
        let status = mds.client.create_volume(volume("vol0")).await.unwrap_err();
        assert_eq!(Problem::from_status(&status).kind, ProblemKind::NotReady);
        for part in ["0 of 3 targets", "likely cause:", "fix:"] {
            assert!(status.message().contains(part), "{}", status.message());
        }
        mds.register_three().await;
        let mut stolen = target(2);
        stolen.disk_uuid = vec![77; 16];
        let status = mds.client.register_target(stolen).await.unwrap_err();
        assert_eq!(Problem::from_status(&status).kind, ProblemKind::IdTaken);
        let hostile = pb::CreateVolumeRequest { name: "x\r\n\u{1b}[2J".repeat(9999), ..volume("") };
        let status = mds.client.create_volume(hostile).await.unwrap_err();
        assert_eq!(Problem::from_status(&status).kind, ProblemKind::Invalid);
        assert!(!status.message().contains(char::is_control));
        type Spoil = fn(&mut pb::RegisterTargetRequest);
        let rows: &[Spoil] = &[
            |r| r.disk_uuid = vec![1; 15],
            |r| r.cluster = vec![1; 17],
            |r| r.peers = vec!["127.0.0.1:7000".into(); 257],
            |r| r.peers = vec!["localhost:7000".into()],
            |r| r.endpoints.as_mut().unwrap().admin = "nowhere".into(),
            |r| r.endpoints.as_mut().unwrap().nbd_unix = "relative.sock".into(),
            |r| r.endpoints.as_mut().unwrap().nbd_unix = format!("/{}", "x".repeat(200)),
        ];
        for (at, spoil) in rows.iter().enumerate() {
            let mut request = target(9);
            spoil(&mut request);
            let status = mds.client.register_target(request).await.expect_err(&format!("row {at}"));
            let kind = Problem::from_status(&status).kind;
            assert!(matches!(kind, ProblemKind::Invalid | ProblemKind::Limit), "row {at}: {status:?}");
        }
        let request = pb::AddExportRequest { volume: named("vol0"), protocol: 0, allowed: None };
        assert!(mds.client.add_export(request).await.is_err());
        assert!(mds.client.stat_volume(pb::StatVolumeRequest { volume: None }).await.is_err());
        mds.stop().await;
    });
}

#[test]
fn garbage_and_oversized_requests_leave_other_callers_alone() {
    run(async {
        let dir = TempDir::new().unwrap();
        let mut mds = Running::start(dir.path()).await;
        mds.register_three().await;
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..60 {
            let mut socket = tokio::net::TcpStream::connect(mds.address).await.unwrap();
            let preface: &[u8] = if round % 2 == 0 { b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" } else { b"" };
            let noise = (0..400).map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            });
            let bytes: Vec<u8> = preface.iter().copied().chain(noise).collect();
            let _ = socket.write_all(&bytes).await;
            if round % 3 == 0 {
                let _ = tokio::time::timeout(Duration::from_millis(20), socket.read(&mut [0; 64])).await;
            }
        }
        let huge = pb::HeartbeatRequest { disk_uuid: vec![0; limits::MESSAGE_BYTES_MAX + 1], ..beat(1, &[]) };
        assert!(mds.client.heartbeat(huge).await.is_err());
        let many = pb::HeartbeatRequest { freed_volumes: vec![1; limits::VOLUMES_MAX + 1], ..beat(1, &[]) };
        assert!(mds.client.heartbeat(many).await.is_err());
        mds.client.heartbeat(beat(1, &[])).await.expect("an honest caller is served");
        mds.stop().await;
    });
}

#[test]
fn a_bad_configuration_is_refused_with_its_range() {
    run(async {
        let dir = TempDir::new().unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        for (replicas, copysets, targets_expected) in
            [(0, 1, 3), (8, 1, 8), (3, 1, 2), (3, limits::COPYSETS_MAX as u32 + 1, 3)]
        {
            let policy = Policy { replicas, copysets, targets_expected, ..Policy::default() };
            let config = Config::new(StoreAt::Directory(dir.path().into()), listen, policy);
            assert_eq!(Server::start(config).await.unwrap_err().kind, ProblemKind::Invalid);
        }
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen = taken.local_addr().unwrap();
        let config = Config::new(StoreAt::Directory(dir.path().into()), listen, Policy::default());
        assert_eq!(Server::start(config).await.unwrap_err().kind, ProblemKind::InUse);
    });
}

#[tokio::test]
async fn health_is_told_and_services_are_described_to_whoever_asks() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let dir = TempDir::new().unwrap();
    let mds = Running::start(dir.path()).await;
    let channel = Endpoint::from_shared(format!("http://{}", mds.address)).unwrap().connect_lazy();
    let request = HealthCheckRequest { service: "ashlar.v1.Mds".into() };
    let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
    let wanted = MessageRequest::ListServices(String::new());
    let ask = ServerReflectionRequest { host: String::new(), message_request: Some(wanted) };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::iter([ask])).await.unwrap();
    let told = answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(listed) = told else { panic!("{told:?}") };
    let names: Vec<&str> = listed.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"ashlar.v1.Mds") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    mds.stop().await;
}

/// Lets everybody read, and those change something who bring a token.
#[derive(Debug)]
struct Token;

impl Gate for Token {
    fn admit(&self, caller: &Caller<'_>) -> Result<(), Problem> {
        assert!(caller.peer.is_some_and(|peer| peer.ip().is_loopback()), "{caller:?}");
        if !caller.call.contains("Create") || caller.authorization == Some("Bearer open") {
            return Ok(());
        }
        let what = format!("{} refused", caller.call);
        Err(Problem::new(ProblemKind::Refused, what, "there was no token", "bring one"))
    }
}

#[tokio::test]
async fn a_gate_sees_who_calls_what_and_its_refusal_arrives_typed() {
    let dir = TempDir::new().unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut config = Config::new(StoreAt::Directory(dir.path().into()), listen, Policy::default());
    config.gate = std::sync::Arc::new(Token);
    let server = Server::start(config).await.unwrap();
    let channel = Endpoint::from_shared(format!("http://{}", server.address())).unwrap().connect_lazy();
    let mut client = MdsClient::new(channel);
    let served = tokio::spawn(server.serve(std::future::pending()));
    client.status(pb::StatusRequest {}).await.expect("reading needs no token");
    for id in 1..=3 {
        client.register_target(target(id)).await.unwrap();
    }
    let refused = Problem::from_status(&client.create_volume(volume("v")).await.unwrap_err());
    assert_eq!((refused.kind, refused.fix.as_str()), (ProblemKind::Refused, "bring one"));
    let mut request = tonic::Request::new(volume("v"));
    request.metadata_mut().insert("authorization", "Bearer open".parse().unwrap());
    client.create_volume(request).await.expect("with the token");
    served.abort();
}

#[tokio::test]
async fn metrics_tell_what_an_operator_watches() {
    let dir = TempDir::new().unwrap();
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut config = Config::new(StoreAt::Directory(dir.path().into()), listen, Policy::default());
    config.metrics = Some(free);
    let server = Server::start(config).await.unwrap();
    let channel = Endpoint::from_shared(format!("http://{}", server.address())).unwrap().connect_lazy();
    let mut client = MdsClient::new(channel);
    let served = tokio::spawn(server.serve(std::future::pending()));
    for id in 1..=3 {
        client.register_target(target(id)).await.unwrap();
    }
    let mut socket = tokio::net::TcpStream::connect(free).await.unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    socket.read_to_string(&mut page).await.unwrap();
    for line in [
        "ashlar_mds_leads 1",
        "ashlar_mds_targets{presence=\"online\"} 3",
        "ashlar_mds_copysets{which=\"all\"} 12",
        "ashlar_mds_copysets{which=\"degraded\"} 12",
        "ashlar_mds_moves{why=\"recover\"} 0",
        "ashlar_mds_moves_outstanding 0",
        "ashlar_mds_pool_capacity_bytes{pool=\"default\"}",
    ] {
        assert!(page.lines().any(|told| told.starts_with(line)), "{line} is not in\n{page}");
    }
    served.abort();
}
