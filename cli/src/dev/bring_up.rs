//! From processes that were just started to a cluster that serves: MDS, targets, pool,
//! volume, export, and one block read through every target. Each step is asked for again
//! until it holds; what is being waited for is told when it takes more than a second.

use super::record::{DiscoveryRecord, NvmeRecord, VolumeRecord};
use super::{Plan, VOLUME, VOLUME_SIZE, probe, say};
use crate::export::{nbd_unix_uri, nbd_uri};
use crate::problem::Problem;
use crate::size::Size;
use client::control::{MdsClient, Patience, volume_ref};
use protocol::control::{Problem as Refusal, ProblemKind, pb, protocol_to_pb};
use protocol::map::ExportProtocol;
use protocol::nvme_tcp::identify::nqn;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);
/// What takes longer is told.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// The pool of a dev cluster.
const POOL: &str = "default";
/// Between two attempts at what was started again.
const PAUSE_AGAIN: Duration = Duration::from_millis(50);
/// One attempt of a probe.
const PROBE_WAIT_MAX: Duration = Duration::from_secs(2);

/// What a cluster serves once it is up.
pub struct Served {
    /// The exported volumes, as `dev.json` tells them.
    pub volumes: Vec<VolumeRecord>,
    /// The NVMe discovery services.
    pub discovery: Vec<DiscoveryRecord>,
}

struct BringUp<'a> {
    plan: &'a Plan,
    mds: MdsClient,
    started: Instant,
    told: &'static str,
}

/// Ends when every target serves vol0.
pub async fn run(plan: &Plan) -> Result<Served, Problem> {
    let patience = Patience { retry: Duration::ZERO, ..Patience::default() };
    let mds = MdsClient::new(&plan.mds_endpoint(), patience)?;
    let mut up = BringUp { plan, mds, started: Instant::now(), told: "" };
    up.targets_online().await?;
    up.pool().await?;
    let volume = up.volume().await?;
    up.export(&volume).await?;
    up.serving().await?;
    up.served().await
}

/// What was started again.
pub enum Again {
    /// The MDS, at this endpoint.
    Mds(String),
    /// The target with this NBD socket.
    Target(PathBuf),
}

impl Again {
    /// Ends when it serves (a target: the first block of vol0), or tells after `within` what it answers instead.
    pub async fn serves(self, within: Duration) -> Result<(), String> {
        let end = Instant::now() + within;
        loop {
            match self.attempt().await {
                Err(_) if Instant::now() < end => sleep(PAUSE_AGAIN).await,
                outcome => return outcome,
            }
        }
    }

    async fn attempt(&self) -> Result<(), String> {
        match self {
            Self::Target(socket) => probed(socket).await.map_err(|error| error.to_string()),
            Self::Mds(endpoint) => {
                let mds = MdsClient::new(endpoint, Patience::ONCE).map_err(|refusal| refusal.what)?;
                mds.status().await.map(drop).map_err(|refusal| refusal.what)
            }
        }
    }
}

impl BringUp<'_> {
    /// Waits a moment; tells what for, once, when it has taken long.
    async fn again(&mut self, waiting_for: &'static str, detail: impl std::fmt::Display) {
        if self.started.elapsed() >= TELL_AFTER && self.told != waiting_for {
            self.told = waiting_for;
            let detail = detail.to_string();
            let because = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
            say(format_args!("waiting for {waiting_for}{because}"));
        }
        sleep(PAUSE).await;
    }

    async fn targets_online(&mut self) -> Result<(), Problem> {
        let wanted = self.plan.shape.targets.len();
        loop {
            match self.mds.status().await {
                Ok(status) => {
                    let online = status.targets.iter().filter(|target| target.online).count();
                    if online >= wanted {
                        return Ok(());
                    }
                    self.again("the targets to register", format_args!("{online} of {wanted} did")).await;
                }
                Err(refusal) if will_pass(&refusal) => self.again("the MDS", &refusal.what).await,
                Err(refusal) => return Err(refusal.into()),
            }
        }
    }

    /// The MDS makes it by itself once the targets have registered.
    async fn pool(&mut self) -> Result<(), Problem> {
        while !self.mds.status().await?.pools.iter().any(|pool| pool.name == POOL) {
            self.again("the MDS to make the pool", "").await;
        }
        Ok(())
    }

    async fn volume(&mut self) -> Result<pb::Volume, Problem> {
        let there = self.mds.volumes(false).await?.into_iter().find(|volume| volume.name == VOLUME);
        if let Some(volume) = there {
            self.tell_what_stays(&volume);
            return Ok(volume);
        }
        let bytes = self.plan.size.unwrap_or(VOLUME_SIZE).0;
        let block_bytes = self.plan.block_bytes.unwrap_or(4096);
        Ok(self.mds.create_volume(VOLUME, bytes, block_bytes, POOL).await?)
    }

    /// The flags speak of a volume to be made; one that is there is left as it is.
    fn tell_what_stays(&self, volume: &pb::Volume) {
        let other_size = self.plan.size.is_some_and(|size| size.0 != volume.bytes);
        let other_block = self.plan.block_bytes.is_some_and(|bytes| bytes != volume.block_bytes);
        if other_size || other_block {
            let (size, block) = (Size(volume.bytes), volume.block_bytes);
            say(format_args!(
                "{VOLUME} is there already and stays as it is: {size}, blocks of {block} bytes"
            ));
        }
    }

    async fn export(&mut self, volume: &pb::Volume) -> Result<(), Problem> {
        for wanted in [ExportProtocol::Nbd, ExportProtocol::Nvme] {
            if volume.exports().any(|protocol| protocol == protocol_to_pb(wanted)) {
                continue;
            }
            match self.mds.add_export(volume_ref(VOLUME), wanted, None).await {
                Err(refusal) if refusal.kind != ProblemKind::AlreadyExists => return Err(refusal.into()),
                _ => {}
            }
        }
        Ok(())
    }

    async fn serving(&mut self) -> Result<(), Problem> {
        for id in 1..=self.plan.shape.targets.len() as u32 {
            let socket = self.plan.layout.socket(id)?;
            while let Err(error) = probed(&socket).await {
                self.again("the exports to serve", format_args!("target {id}: {error}")).await;
            }
        }
        let cluster = self.mds.map_now().await?.cluster;
        for ports in &self.plan.shape.targets {
            while let Err(error) = nvme_probed(ports.nvme, &nqn(&cluster, VOLUME)).await {
                self.again("the NVMe exports to serve", format_args!("port {}: {error}", ports.nvme)).await;
            }
        }
        Ok(())
    }

    async fn served(&mut self) -> Result<Served, Problem> {
        let sockets: Vec<_> = (1..=self.plan.shape.targets.len() as u32)
            .map(|id| self.plan.layout.socket(id))
            .collect::<Result<_, _>>()?;
        let volumes = self.mds.volumes(false).await?;
        let cluster = self.mds.map_now().await?.cluster;
        let exported =
            |volume: &&pb::Volume| volume.exports().any(|protocol| protocol == pb::ExportProtocol::Nbd);
        Ok(Served {
            volumes: volumes
                .iter()
                .filter(exported)
                .map(|v| record(self.plan, &sockets, &cluster, v))
                .collect(),
            discovery: discovery(self.plan),
        })
    }
}

async fn probed(socket: &std::path::Path) -> std::io::Result<()> {
    let probe = tokio::time::timeout(PROBE_WAIT_MAX, probe::read_first_block(socket, VOLUME));
    probe.await.unwrap_or_else(|_| Err(std::io::Error::other("no answer yet")))
}

async fn nvme_probed(port: u16, nqn: &str) -> std::io::Result<()> {
    let probe = tokio::time::timeout(PROBE_WAIT_MAX, probe::connect_nvme(port, nqn));
    probe.await.unwrap_or_else(|_| Err(std::io::Error::other("no answer yet")))
}

/// Whether a refusal is that of an MDS that is only just starting.
fn will_pass(refusal: &Refusal) -> bool {
    matches!(refusal.kind, ProblemKind::Unreachable | ProblemKind::TimedOut | ProblemKind::NotReady)
}

/// The custom port first, then those that serve volumes too.
fn discovery(plan: &Plan) -> Vec<DiscoveryRecord> {
    let own = plan.shape.targets.iter().filter_map(|ports| ports.discovery);
    let ports = own.chain(plan.shape.targets.iter().map(|ports| ports.nvme));
    let traddr = plan.advertise.to_string();
    ports.map(|port| DiscoveryRecord::new(&traddr, port)).collect()
}

fn record(plan: &Plan, sockets: &[PathBuf], cluster: &[u8; 16], volume: &pb::Volume) -> VolumeRecord {
    let name = &volume.name;
    let host = match plan.advertise {
        std::net::IpAddr::V6(address) => format!("[{address}]"),
        address => address.to_string(),
    };
    let tcp = plan.shape.targets.iter().map(|ports| nbd_uri(&format!("{host}:{}", ports.nbd), name));
    let over_nvme = volume.exports().any(|protocol| protocol == pb::ExportProtocol::Nvme);
    let traddr = plan.advertise.to_string();
    let over_nvme = plan.shape.targets.iter().filter(|_| over_nvme);
    let nvme = over_nvme.map(|ports| NvmeRecord::new(&traddr, ports.nvme, nqn(cluster, name)));
    let unix = sockets.iter().map(|socket| nbd_unix_uri(&socket.to_string_lossy(), name));
    VolumeRecord {
        name: name.clone(),
        bytes: volume.bytes,
        block_bytes: volume.block_bytes,
        nbd: tcp.collect(),
        nbd_unix: unix.collect(),
        nvme: nvme.collect(),
    }
}
