//! A cluster of any shape, each part a process of its own that is killed, stopped and started again: members of
//! etcd, one MDS or several, targets in zones. For root each part lives in a network namespace with an address
//! of its own, on one bridge with the test; else all are on loopback.
//!
//! Invariants: no process outlives it; when its test panics, the tail of every log is printed.

use crate::chaos::net::{self, HUB, Net};
use crate::cluster::{binary, machine_lock, scratch_dir, wait_until};
use crate::metrics;
use crate::tools::{Run, in_path, inside};
use anyhow::{Context, ensure};
use bench::dev::tail;
use nix::fcntl::Flock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How many of each.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Members of etcd; 0: the one MDS is on a directory.
    pub etcd: usize,
    /// MDS processes.
    pub mds: usize,
    /// Targets.
    pub targets: usize,
    /// Zones that the targets are in, by turns; 0: none is named.
    pub zones: usize,
}

/// A process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// A member of etcd, from 0.
    Etcd(usize),
    /// An MDS, from 0.
    Mds(usize),
    /// A target, from 0; its id is one more.
    Target(usize),
}

impl Shape {
    fn parts(self) -> impl DoubleEndedIterator<Item = Part> {
        let Self { etcd, mds, targets, .. } = self;
        (0..etcd).map(Part::Etcd).chain((0..mds).map(Part::Mds)).chain((0..targets).map(Part::Target))
    }
    fn count(self) -> usize {
        self.etcd + self.mds + self.targets
    }
    fn at(self, part: Part) -> usize {
        match part {
            Part::Etcd(n) => n,
            Part::Mds(n) => self.etcd + n,
            Part::Target(n) => self.etcd + self.mds + n,
        }
    }
}

impl Part {
    fn name(self) -> String {
        match self {
            Self::Etcd(n) => format!("etcd-{n}"),
            Self::Mds(n) => format!("mds-{n}"),
            Self::Target(n) => format!("target-{n}"),
        }
    }
}

/// The cluster.
#[derive(Debug)]
pub struct Several {
    // Fields drop in this order.
    processes: Vec<Option<Child>>,
    shape: Shape,
    /// With one, each part has an address of its own; without, ports.
    net: Option<Net>,
    /// Where targets say that they are reached, if it is not where they listen.
    advertise: Option<IpAddr>,
    ports: Vec<u16>,
    bin: PathBuf,
    root: tempfile::TempDir,
    _lock: Flock<File>,
}

/// Ports of one part.
const PORTS: usize = 4;

impl Several {
    /// A running cluster that takes volumes.
    ///
    /// # Errors
    /// Something cannot be started, or does not come up.
    pub fn start(shape: Shape) -> anyhow::Result<Self> {
        let mut cluster = Self::prepare(shape, None)?;
        cluster.launch_all()?;
        Ok(cluster)
    }

    /// A cluster on loopback, not started yet, whose targets say that they are reached at another address: what
    /// [`Several::ways`] tells must listen there first.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn prepare_behind(shape: Shape, advertise: IpAddr) -> anyhow::Result<Self> {
        Self::prepare(shape, Some(advertise))
    }

    fn prepare(shape: Shape, advertise: Option<IpAddr>) -> anyhow::Result<Self> {
        let lock = machine_lock()?;
        let root = tempfile::Builder::new().prefix("ashlar-several-").tempdir_in(scratch_dir())?;
        let apart =
            advertise.is_none() && nix::unistd::geteuid().is_root() && in_path("ip") && in_path("nft");
        let net = match apart {
            true => Some(Net::new(shape.count() - 1)?),
            false => None,
        };
        if let Some(net) = &net {
            // What the test itself asks, and what it starts, is among the clients from now on.
            let hub = File::open(Path::new("/run/netns").join(net.name(HUB)))?;
            nix::sched::setns(hub, nix::sched::CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
        }
        // All are taken at once, so that no two are the same.
        let taken: Vec<TcpListener> =
            (0..shape.count() * PORTS).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        let ports = taken.iter().map(|l| Ok(l.local_addr()?.port())).collect::<anyhow::Result<_>>()?;
        drop(taken);
        let processes = (0..shape.count()).map(|_| None).collect();
        let cluster = Self { processes, shape, net, advertise, ports, bin: binary()?, root, _lock: lock };
        for n in 0..shape.targets {
            let config = cluster.root.path().join(format!("target-{n}.toml"));
            std::fs::create_dir_all(cluster.root.path().join(format!("target-{n}")))?;
            std::fs::write(&config, cluster.target_config(n))?;
            Run::new(&cluster.bin).args(["target", "format", "--config"]).arg(&config).ok()?;
        }
        Ok(cluster)
    }

    /// Starts every part, and makes `vol0`.
    ///
    /// # Errors
    /// Something cannot be started, or does not come up.
    pub fn launch_all(&mut self) -> anyhow::Result<()> {
        for part in self.shape.parts() {
            self.launch(part)?;
        }
        self.create_volume("vol0", "256M")
    }

    /// Where a target says that others, and commands, reach it, and where it listens for them.
    pub fn ways(&self, target: usize) -> Vec<(String, String)> {
        let told = |address: String| match self.advertise {
            Some(ip) => address.replacen("127.0.0.1", &ip.to_string(), 1),
            None => address,
        };
        let listens = [0, 1].map(|which| self.address(Part::Target(target), which));
        listens.into_iter().map(|address| (told(address.clone()), address)).collect()
    }

    /// Where a target listens for NBD.
    pub fn nbd(&self, target: usize) -> String {
        self.address(Part::Target(target), 3)
    }

    /// Makes a volume, once the cluster takes one, and exports it.
    ///
    /// # Errors
    /// It does not within a minute.
    pub fn create_volume(&self, name: &str, size: &str) -> anyhow::Result<()> {
        wait_until(Duration::from_secs(60), || {
            self.ashlar(&["volume", "create", name, "--size", size]).ok().map(drop)
        })?;
        self.ashlar(&["export", "add", name]).ok().map(drop)
    }

    fn address(&self, part: Part, which: usize) -> String {
        let at = self.shape.at(part);
        let host = self.net.as_ref().map_or("127.0.0.1".into(), |_| net::address(at));
        format!("{host}:{}", self.ports[at * PORTS + which])
    }

    fn store(&self) -> String {
        let members: Vec<_> = (0..self.shape.etcd).map(|n| self.address(Part::Etcd(n), 0)).collect();
        format!("etcd://{}/ashlar-tests", members.join(","))
    }

    /// An MDS's address.
    pub fn mds(&self, n: usize) -> String {
        self.address(Part::Mds(n), 0)
    }

    fn every_mds(&self) -> String {
        (0..self.shape.mds).map(|n| self.mds(n)).collect::<Vec<_>>().join(",")
    }

    fn target_config(&self, n: usize) -> String {
        let (part, id) = (Part::Target(n), n + 1);
        let dir = self.root.path().join(format!("target-{n}"));
        let mds: Vec<_> = (0..self.shape.mds).map(|n| self.mds(n)).collect();
        let [peer, admin, metrics, nbd] = [0, 1, 2, 3].map(|which| self.address(part, which));
        let advertise = self.advertise.map(|ip| format!("advertise = \"{ip}\"\n")).unwrap_or_default();
        let topology = match self.shape.zones {
            0 => String::new(),
            zones => format!("[topology]\nzone = \"zone-{}\"\n", n % zones),
        };
        format!(
            "id = {id}\n{advertise}dir = {dir:?}\nmds = {mds:?}\ncapacity_bytes = 2147483648\narena_bytes = 33554432\n\
             [log]\nsegment_bytes = 16777216\nsegments = 8\n{topology}[listen]\npeer = [\"{peer}\"]\nadmin = \"{admin}\"\n\
             metrics = \"{metrics}\"\nnbd = \"{nbd}\"\n"
        )
    }

    /// A volume at a target.
    pub fn uri(&self, n: usize, volume: &str) -> String {
        format!("nbd://{}/{volume}", self.address(Part::Target(n), 3))
    }

    /// A target's metrics page.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self, target: usize) -> anyhow::Result<String> {
        metrics::fetch(&self.address(Part::Target(target), 2))
    }

    /// A run of `ashlar ARGS`, given every MDS.
    pub fn ashlar(&self, args: &[&str]) -> Run {
        Run::new(&self.bin).args(args).args(["--mds", &self.every_mds()])
    }

    /// Starts a process, for the first time or again.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self, part: Part) -> anyhow::Result<()> {
        let root = self.root.path();
        let mut command = self.command(part);
        match part {
            Part::Etcd(n) => {
                let url = |n: usize, which| format!("http://{}", self.address(Part::Etcd(n), which));
                let members: Vec<_> = (0..self.shape.etcd).map(|n| format!("m{n}={}", url(n, 1))).collect();
                command.args(["--name", &format!("m{n}"), "--initial-cluster", &members.join(",")]);
                command.args(["--listen-client-urls", &url(n, 0), "--advertise-client-urls", &url(n, 0)]);
                command.args(["--listen-peer-urls", &url(n, 1), "--initial-advertise-peer-urls", &url(n, 1)]);
                command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
                command.arg("--data-dir").arg(root.join(part.name()));
            }
            Part::Mds(n) => {
                command.args(["mds", "run", "--listen", &self.mds(n)]);
                command.args(["--metrics", &self.address(part, 1)]);
                match self.shape.etcd {
                    0 => command.arg("--dir").arg(root.join(part.name())),
                    _ => command.args(["--store", &self.store()]),
                };
                let targets = self.shape.targets.to_string();
                command.args(["--expect-targets", &targets, "--offline-after", "5"]);
            }
            Part::Target(n) => {
                command.args(["target", "run", "--config"]).arg(root.join(format!("target-{n}.toml")));
            }
        }
        let log = File::options().create(true).append(true).open(self.log(part))?;
        if !matches!(part, Part::Etcd(_)) {
            command.arg("--die-with-stdin");
        }
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| part.name())?;
        let at = self.shape.at(part);
        self.processes[at] = Some(child);
        Ok(())
    }

    /// A part's program, in its namespace.
    fn command(&self, part: Part) -> Command {
        let program = if matches!(part, Part::Etcd(_)) { "etcd".as_ref() } else { self.bin.as_path() };
        match &self.net {
            Some(net) => {
                let [enter, place] = inside(&net.name(self.shape.at(part)));
                let mut command = Command::new(enter);
                command.arg(place).arg(program);
                command
            }
            None => Command::new(program),
        }
    }

    fn log(&self, part: Part) -> PathBuf {
        self.root.path().join(format!("{}.log", part.name()))
    }

    /// What a process has told so far.
    pub fn told(&self, part: Part) -> String {
        std::fs::read_to_string(self.log(part)).unwrap_or_default()
    }

    /// Sends a signal. After SIGSTOP, waits until every thread stands: one thread takes the signal and stops the
    /// others, which on busy processors takes long enough to answer another request.
    ///
    /// # Errors
    /// It does not run, or does not stop.
    pub fn signal(&self, part: Part, signal: Signal) -> anyhow::Result<()> {
        let child = self.processes[self.shape.at(part)].as_ref().with_context(|| part.name())?;
        kill(Pid::from_raw(child.id() as i32), signal)?;
        if signal == Signal::SIGSTOP {
            wait_until(Duration::from_secs(10), || {
                ensure!(all_threads_stand(child.id())?, "{} does not stop", part.name());
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Kills a process by SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self, part: Part) -> anyhow::Result<()> {
        let at = self.shape.at(part);
        let mut child = self.processes[at].take().with_context(|| part.name())?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// The MDS that takes itself for the leader, of those that run and are not `except`.
    ///
    /// # Errors
    /// None does, or two do.
    pub fn mds_leader(&self, except: Option<usize>) -> anyhow::Result<usize> {
        let runs = |n: &usize| self.processes[self.shape.at(Part::Mds(*n))].is_some();
        let there = (0..self.shape.mds).filter(|n| Some(*n) != except && runs(n));
        let leads = |n: &usize| {
            let page = metrics::fetch(&self.address(Part::Mds(*n), 1)).unwrap_or_default();
            metrics::sum(&page, "ashlar_mds_leads") == 1.0
        };
        let leaders: Vec<usize> = there.filter(leads).collect();
        ensure!(leaders.len() == 1, "{leaders:?} lead");
        Ok(leaders[0])
    }

    /// The member that leads etcd.
    ///
    /// # Errors
    /// None is known to.
    pub fn etcd_leader(&self) -> anyhow::Result<usize> {
        let there = (0..self.shape.etcd).filter(|n| self.processes[self.shape.at(Part::Etcd(*n))].is_some());
        let leads = |n: &usize| {
            let status = post(&self.address(Part::Etcd(*n), 0), "/v3/maintenance/status").ok()?;
            let (leader, own) = (status["leader"].as_str()?, status["header"]["member_id"].as_str()?);
            (leader == own).then_some(*n)
        };
        let mut there = there;
        there.find_map(|n| leads(&n)).context("no member of etcd leads")
    }

    /// Ends all by SIGTERM.
    ///
    /// # Errors
    /// One does not end, or not with success.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        for part in self.shape.parts().rev() {
            let at = self.shape.at(part);
            let Some(mut child) = self.processes[at].take() else { continue };
            kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
            let ended = wait_until(Duration::from_secs(30), || {
                ensure!(child.try_wait()?.is_some(), "{part:?} does not stop");
                Ok(())
            });
            if ended.is_err() {
                let _ = child.kill();
            }
            ended?;
            let status = child.wait()?;
            // etcd ends by the signal itself.
            ensure!(status.success() || matches!(part, Part::Etcd(_)), "{part:?} stopped with {status}");
        }
        Ok(())
    }
}

impl Drop for Several {
    fn drop(&mut self) {
        for child in self.processes.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for part in self.shape.parts() {
                eprintln!("--- tail of {}:\n{}", part.name(), tail(&self.log(part), 30));
            }
        }
    }
}

/// Asks etcd's HTTP gateway.
fn post(address: &str, path: &str) -> anyhow::Result<Value> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    // The body may come in chunks; it is one object.
    let (from, to) = (body.find('{').context("no object")?, body.rfind('}').context("no object")?);
    Ok(serde_json::from_str(&body[from..=to])?)
}

/// Whether all threads of a process are stopped by a signal.
fn all_threads_stand(pid: u32) -> anyhow::Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
        // The name before the state may hold anything, brackets too.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}
