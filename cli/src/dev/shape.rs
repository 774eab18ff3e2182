//! The shape of a dev cluster, kept in `D/cluster.json`: how many targets and shards, and on
//! which ports. Chosen at the first start and kept, so that a cluster started again serves
//! at the same addresses. Targets may be added later, never taken away.

use super::layout::Layout;
use super::record::replace_json;
use crate::problem::Problem;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Replicas of a volume, each on a target of its own.
pub const REPLICAS: u32 = 3;
/// More than anyone runs on one machine.
pub const TARGETS_MAX: u32 = 32;
/// Below the kernel's range for outgoing connections (32768 and up), so that none of those
/// sits on a port of ours when a cluster is started again.
const PORTS: std::ops::Range<u16> = 10_000..32_000;
/// Where hosts look for NVMe discovery first.
const DISCOVERY_PORT: u16 = 8009;
/// How long a port that is taken is waited for.
const TAKEN_WAIT_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
const TAKEN_PAUSE: Duration = Duration::from_millis(50);

/// The content of `cluster.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// The MDS's port.
    pub mds: u16,
    /// The targets; the first has id 1.
    pub targets: Vec<TargetPorts>,
    /// Replicas of each volume.
    #[serde(default = "three")]
    pub replicas: u32,
    /// Copysets of the pool, where the number was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copysets: Option<u32>,
    /// Whether the targets keep their data in memory.
    #[serde(default)]
    pub memory: bool,
}

fn three() -> u32 {
    REPLICAS
}

/// What of the shape is asked for on the command line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    /// How many targets.
    pub targets: Option<u32>,
    /// Shards of each.
    pub shards: Option<u16>,
    /// Replicas of each volume.
    pub replicas: Option<u32>,
    /// Copysets of the pool.
    pub copysets: Option<u32>,
    /// Data in memory.
    pub memory: bool,
}

/// The ports of one target.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetPorts {
    /// One a shard.
    pub peers: Vec<u16>,
    /// gRPC.
    pub admin: u16,
    /// Prometheus.
    pub metrics: u16,
    /// NBD over TCP.
    pub nbd: u16,
    /// NVMe over TCP; chosen later in clusters that are older than it.
    #[serde(default)]
    pub nvme: u16,
    /// NVMe discovery, at the first target: 8009 where that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery: Option<u16>,
}

impl Shape {
    /// The shape of the cluster in a folder: the kept one, grown where this call asks for more.
    pub fn settle(layout: &Layout, asked: Asked) -> Result<Self, Problem> {
        let kept = Self::read(layout)?;
        let mut ports = FreePorts::new(kept.as_ref());
        let shape = match &kept {
            None => Self::fresh(asked, &mut ports)?,
            Some(kept) => kept.grown(layout, asked, &mut ports)?,
        };
        let shape = shape.with_nvme(&mut ports)?;
        if kept.as_ref() != Some(&shape) {
            replace_json(&layout.cluster_json(), &shape)?;
        }
        Ok(shape)
    }

    fn read(layout: &Layout) -> Result<Option<Self>, Problem> {
        let path = layout.cluster_json();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Problem::io(format_args!("cannot read {}", path.display()))(error)),
        };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            Problem::new(format!("{} is damaged: {error}", path.display()))
                .cause("it was edited by hand")
                .fix("mend it; if it is removed, new ports are chosen and targets are reached there")
        })
    }

    fn fresh(asked: Asked, ports: &mut FreePorts) -> Result<Self, Problem> {
        let replicas = asked.replicas.unwrap_or(REPLICAS);
        let (targets, shards) = (asked.targets.unwrap_or(replicas), asked.shards.unwrap_or(1));
        if targets < replicas {
            return Err(Problem::usage(format!("--targets {targets}: a volume has {replicas} replicas"))
                .cause("each replica is on a target of its own")
                .fix("ask for as many targets, or for fewer --replicas"));
        }
        let mds = ports.take()?;
        let targets = (0..targets).map(|_| TargetPorts::fresh(shards, ports)).collect::<Result<_, _>>()?;
        Ok(Self { mds, targets, replicas, copysets: asked.copysets, memory: asked.memory })
    }

    fn grown(&self, layout: &Layout, asked: Asked, ports: &mut FreePorts) -> Result<Self, Problem> {
        if self.memory || asked.memory {
            let what = if self.memory { "had its data in memory, which is lost" } else { "is on a disk" };
            let root = layout.root().display();
            return Err(Problem::usage(format!("the cluster in {root} {what}"))
                .cause("a cluster in memory lives as long as its `ashlar dev`")
                .fix("begin in an empty folder (--dir)"));
        }
        let Asked { targets, shards, replicas, .. } = asked;
        if replicas.is_some_and(|asked| asked != self.replicas) {
            let there = self.replicas;
            return Err(Problem::usage(format!("the cluster's volumes have --replicas {there} already"))
                .cause("that is settled when its pool is made")
                .fix("leave --replicas out, or start another cluster with --dir"));
        }
        if asked.copysets.is_some() && asked.copysets != self.copysets {
            return Err(Problem::usage(
                "--copysets: the cluster's pool is there already, with another number",
            )
            .cause("a pool's copysets are settled when it is made")
            .fix("leave --copysets out, or start another cluster with --dir"));
        }
        let mut shape = self.clone();
        let there = shape.targets.len() as u32;
        let asked = targets.unwrap_or(there);
        if asked < there {
            return Err(Problem::usage(format!("--targets {asked}: the cluster has {there} already"))
                .cause("targets hold replicas, so they are not taken away by starting with fewer")
                .fix("leave --targets out, or start another cluster with --dir"));
        }
        let shards_there = shape.shards();
        if shards.is_some_and(|asked| asked != shards_there) {
            return Err(Problem::usage(format!(
                "the cluster's targets have --shards {shards_there} already"
            ))
            .cause("a target's shards are fixed when it is formatted")
            .fix("leave --shards out, or start another cluster with --dir"));
        }
        for _ in there..asked {
            shape.targets.push(TargetPorts::fresh(shards_there, ports)?);
        }
        Ok(shape)
    }

    /// Chooses what is not chosen yet.
    fn with_nvme(mut self, ports: &mut FreePorts) -> Result<Self, Problem> {
        for target in self.targets.iter_mut().filter(|target| target.nvme == 0) {
            target.nvme = ports.take()?;
        }
        let first = self.targets.first_mut().filter(|first| first.discovery.is_none());
        if let Some(first) = first {
            first.discovery =
                Some(if ports.take_this(DISCOVERY_PORT) { DISCOVERY_PORT } else { ports.take()? });
        }
        Ok(self)
    }

    /// Shards of each target.
    pub fn shards(&self) -> u16 {
        self.targets.first().map_or(1, |target| target.peers.len() as u16)
    }

    /// Every port, with what it is for.
    pub fn ports(&self) -> Vec<(u16, String)> {
        let mut all = vec![(self.mds, "the MDS".to_owned())];
        for (id, target) in (1..).zip(&self.targets) {
            all.extend(target.peers.iter().map(|port| (*port, format!("target {id}"))));
            let exports = [Some(target.nbd), Some(target.nvme).filter(|port| *port != 0), target.discovery];
            let ports = [target.admin, target.metrics].into_iter().chain(exports.into_iter().flatten());
            all.extend(ports.map(|port| (port, format!("target {id}"))));
        }
        all
    }

    /// Waits, a little, for ports of the cluster that someone else has: a process of an earlier
    /// run may still be stopping. Then says which one is taken.
    pub async fn check_free(&self, layout: &Layout) -> Result<(), Problem> {
        let deadline = Instant::now() + TAKEN_WAIT_MAX;
        let mut told = false;
        while let Some((port, user)) = self.ports().into_iter().find(|(port, _)| !is_free(*port)) {
            if Instant::now() >= deadline {
                return Err(taken(port, &user, layout));
            }
            if !std::mem::replace(&mut told, true) {
                super::say(format_args!(
                    "waiting for port {port} of {user}: an earlier run may still be stopping"
                ));
            }
            sleep(TAKEN_PAUSE).await;
        }
        Ok(())
    }
}

fn taken(port: u16, user: &str, layout: &Layout) -> Problem {
    let file = layout.cluster_json();
    Problem::new(format!("port {port}, which {user} of this cluster serves on, is taken"))
        .cause("another program listens there")
        .fix(format!("see `ss -ltnp sport = :{port}` and stop it, or change that port in {}", file.display()))
}

impl TargetPorts {
    fn fresh(shards: u16, ports: &mut FreePorts) -> Result<Self, Problem> {
        let peers = (0..shards).map(|_| ports.take()).collect::<Result<_, _>>()?;
        let (admin, metrics, nbd) = (ports.take()?, ports.take()?, ports.take()?);
        Ok(Self { peers, admin, metrics, nbd, nvme: ports.take()?, discovery: None })
    }
}

/// Ports that nobody listens on, from a random place upwards.
struct FreePorts {
    next: u16,
    given: BTreeSet<u16>,
}

impl FreePorts {
    fn new(kept: Option<&Shape>) -> Self {
        let random = RandomState::new().hash_one(std::process::id());
        let next = PORTS.start + (random % PORTS.len() as u64) as u16;
        let given = kept.map(Shape::ports).unwrap_or_default().into_iter().map(|(port, _)| port).collect();
        Self { next, given }
    }

    /// Whether this very port could be had.
    fn take_this(&mut self, port: u16) -> bool {
        is_free(port) && self.given.insert(port)
    }

    fn take(&mut self) -> Result<u16, Problem> {
        for _ in PORTS {
            let port = self.next;
            self.next = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.given.contains(&port) && is_free(port) {
                self.given.insert(port);
                return Ok(port);
            }
        }
        Err(Problem::new(format!("no free TCP port between {} and {}", PORTS.start, PORTS.end)))
    }
}

/// On all addresses, for exports may listen on all.
fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().expect("a folder");
        let layout = Layout::at(dir.path()).expect("usable");
        (dir, layout)
    }

    fn asked(targets: Option<u32>, shards: Option<u16>) -> Asked {
        Asked { targets, shards, ..Asked::default() }
    }

    fn checked(shape: &Shape, layout: &Layout) -> Result<(), Problem> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(shape.check_free(layout))
    }

    #[test]
    fn a_cluster_started_again_keeps_its_ports() {
        let (_dir, layout) = layout();
        let first = Shape::settle(&layout, Asked::default()).expect("settled");
        assert_eq!((first.targets.len(), first.shards()), (3, 1));
        assert_eq!(Shape::settle(&layout, Asked::default()).expect("kept"), first);
        assert_eq!(Shape::settle(&layout, asked(Some(3), Some(1))).expect("kept"), first);
    }

    #[test]
    fn no_port_is_given_twice() {
        let (_dir, layout) = layout();
        let shape = Shape::settle(&layout, asked(Some(5), Some(4))).expect("settled");
        let ports = shape.ports();
        let distinct: BTreeSet<_> = ports.iter().map(|(port, _)| port).collect();
        assert_eq!((ports.len(), distinct.len()), (2 + 5 * 8, 2 + 5 * 8));
    }

    #[test]
    fn targets_may_be_added_but_not_taken_away() {
        let (_dir, layout) = layout();
        let three = Shape::settle(&layout, asked(None, Some(2))).expect("settled");
        let five = Shape::settle(&layout, asked(Some(5), None)).expect("grown");
        assert_eq!(five.targets[..3], three.targets);
        assert_eq!((five.targets.len(), five.shards()), (5, 2));
        assert_eq!(Shape::settle(&layout, asked(Some(3), None)).expect_err("shrunk").exit().code(), 2);
        assert_eq!(Shape::settle(&layout, asked(None, Some(1))).expect_err("reshaped").exit().code(), 2);
        assert_eq!(Shape::settle(&layout, Asked::default()).expect("unharmed"), five);
    }

    #[test]
    fn replicas_are_chosen_once_and_need_as_many_targets() {
        let (_dir, here) = layout();
        let one = Asked { replicas: Some(1), ..Asked::default() };
        let shape = Shape::settle(&here, one).expect("settled");
        assert_eq!((shape.targets.len(), shape.replicas), (1, 1));
        assert_eq!(Shape::settle(&here, Asked::default()).expect("kept"), shape);
        let two = Asked { replicas: Some(2), ..Asked::default() };
        assert_eq!(Shape::settle(&here, two).expect_err("changed").exit().code(), 2);
        let (_dir, fresh) = layout();
        assert_eq!(Shape::settle(&fresh, asked(Some(2), None)).expect_err("too few").exit().code(), 2);
    }

    #[test]
    fn copysets_are_chosen_once() {
        let (_dir, here) = layout();
        let many = Asked { copysets: Some(300), ..Asked::default() };
        let shape = Shape::settle(&here, many).expect("settled");
        assert_eq!(shape.copysets, Some(300));
        for same in [many, Asked::default()] {
            assert_eq!(Shape::settle(&here, same).expect("kept"), shape);
        }
        let more = Asked { copysets: Some(301), ..Asked::default() };
        assert_eq!(Shape::settle(&here, more).expect_err("changed").exit().code(), 2);
    }

    #[test]
    fn a_cluster_in_memory_is_not_started_again() {
        let (_dir, here) = layout();
        let memory = Asked { memory: true, ..Asked::default() };
        Shape::settle(&here, memory).expect("settled");
        for again in [memory, Asked::default()] {
            assert_eq!(Shape::settle(&here, again).expect_err("lost").exit().code(), 2);
        }
        let (_dir, on_disk) = layout();
        Shape::settle(&on_disk, Asked::default()).expect("settled");
        assert_eq!(Shape::settle(&on_disk, memory).expect_err("on a disk").exit().code(), 2);
    }

    #[test]
    fn a_port_that_someone_took_is_named() {
        let (_dir, layout) = layout();
        let shape = Shape::settle(&layout, Asked::default()).expect("settled");
        checked(&shape, &layout).expect("free as chosen");
        let port = shape.targets[1].nbd;
        let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("free");
        let problem = checked(&shape, &layout).expect_err("taken").to_string();
        assert!(problem.contains(&port.to_string()) && problem.contains("target 2"), "{problem}");
    }

    #[test]
    fn a_damaged_file_is_not_silently_replaced() {
        let (_dir, layout) = layout();
        fs::write(layout.cluster_json(), "{\"mds\": 1").expect("written");
        let problem = Shape::settle(&layout, Asked::default()).expect_err("damaged").to_string();
        assert!(problem.contains("is damaged"), "{problem}");
        assert_eq!(fs::read_to_string(layout.cluster_json()).expect("there"), "{\"mds\": 1");
    }
}
