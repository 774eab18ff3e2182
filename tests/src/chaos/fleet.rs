//! The processes: an MDS, three targets with disks, one without replicas; started again when they end.

use super::disk::{self, Disk};
use super::net::{HUB, MDS, Net, address};
use super::{Options, nemesis::Storage};
use crate::cluster::wait_until;
use crate::tools::{LONG_LIMIT, Run, inside};
use anyhow::{Context, ensure};
use bench::dev::tail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use target_daemon::config::TargetConfig;

/// Targets that hold replicas: 1 to 3.
pub const TARGETS: usize = 3;
/// The one that holds none.
const SPARED: usize = 4;
const MDS_PORT: u16 = 7400;
const NBD_PORT: u16 = 10809;

/// A cluster on a network and disks of its own.
#[derive(Debug)]
pub struct Fleet {
    // Dropped in this order.
    processes: Vec<Option<Child>>,
    /// Shall run; by number, the MDS first.
    wanted: Vec<bool>,
    disks: Vec<Disk>,
    /// The network.
    pub net: Net,
    /// Whether disks can fail.
    pub disks_fail: bool,
    /// Who ended without being asked to.
    pub ended: Vec<String>,
    /// A disk that fails is why its target ends.
    pub excused: Option<usize>,
    bin: PathBuf,
    dir: PathBuf,
}

impl Fleet {
    /// A cluster that serves two volumes.
    ///
    /// # Errors
    /// Something cannot be made, or does not come up.
    pub fn start(options: &Options, skipped: &mut Vec<String>) -> anyhow::Result<Self> {
        let Options { bin, dir, .. } = options.clone();
        fs::create_dir_all(&dir)?;
        let net = Net::new(TARGETS + 1)?;
        let disks_fail = match disk::can_fail() {
            Ok(()) => true,
            Err(why) => {
                skipped.push(format!("errors of disks and loss of un-synced writes: {why}"));
                false
            }
        };
        let disks = (1..=TARGETS).map(|id| Disk::new(&dir.join(format!("disk-{id}")), disks_fail));
        let disks = disks.collect::<anyhow::Result<Vec<_>>>().context("a disk")?;
        let processes = (0..=SPARED).map(|_| None).collect();
        let wanted = vec![false; SPARED + 1];
        let mut fleet =
            Self { processes, wanted, disks, net, disks_fail, ended: Vec::new(), excused: None, bin, dir };
        fleet.bring_up()?;
        Ok(fleet)
    }

    fn bring_up(&mut self) -> anyhow::Result<()> {
        for id in 1..=SPARED {
            fs::create_dir_all(self.data(id))?;
            fs::write(self.config(id), self.toml(id)?.to_toml())?;
            Run::new(&self.bin).args(["target", "format", "--config"]).arg(self.config(id)).ok()?;
        }
        for host in 0..=TARGETS {
            self.launch(host)?;
        }
        let mds = format!("{}:{MDS_PORT}", address(MDS));
        for volume in ["vol0", "vol1"] {
            wait_until(Duration::from_secs(60), || {
                self.ashlar(&["volume", "create", volume, "--size", "256M", "--mds", &mds]).ok().map(drop)
            })?;
            self.ashlar(&["export", "add", volume, "--mds", &mds]).ok()?;
        }
        // The pool is made of the first three; the fourth comes too late to hold anything.
        self.launch(SPARED)?;
        self.await_healthy()
    }

    fn data(&self, id: usize) -> PathBuf {
        if id == SPARED { self.dir.join("spared") } else { self.disks[id - 1].dir() }
    }

    fn config(&self, id: usize) -> PathBuf {
        self.dir.join(format!("target-{id}.toml"))
    }

    fn toml(&self, id: usize) -> anyhow::Result<TargetConfig> {
        let (ip, dir) = (address(id), self.data(id));
        let mds = address(MDS);
        let text = format!(
            "id = {id}\ndir = {dir:?}\nmds = [\"{mds}:{MDS_PORT}\"]\ncapacity_bytes = 805306368\n\
             arena_bytes = 33554432\n[log]\nsegment_bytes = 8388608\nsegments = 6\n[listen]\n\
             peer = [\"{ip}:7501\"]\nadmin = \"{ip}:7601\"\nmetrics = \"{ip}:7701\"\nnbd = \"{ip}:{NBD_PORT}\"\n"
        );
        Ok(TargetConfig::parse(&text, "the target's configuration")?)
    }

    fn ashlar(&self, arguments: &[&str]) -> Run {
        Run::new(&self.bin).args(arguments).inside(self.hub())
    }

    /// The namespace of clients.
    pub fn hub(&self) -> String {
        self.net.name(HUB)
    }

    /// The target that never dies.
    pub fn spared(&self) -> usize {
        SPARED
    }

    /// A volume at a target.
    pub fn uri(&self, target: usize, volume: &str) -> String {
        format!("nbd://{}:{NBD_PORT}/{volume}", address(target))
    }

    /// A volume at every target.
    pub fn uris(&self, volume: &str) -> Vec<String> {
        (1..=SPARED).map(|id| self.uri(id, volume)).collect()
    }

    fn log(&self, host: usize) -> PathBuf {
        self.dir.join(if host == MDS { "mds.log".into() } else { format!("target-{host}.log") })
    }

    /// Starts a process.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(&mut self, host: usize) -> anyhow::Result<()> {
        let [enter, place] = inside(&self.net.name(host));
        let mut command = Command::new(enter);
        command.arg(place).arg(&self.bin);
        if host == MDS {
            let listen = format!("{}:{MDS_PORT}", address(MDS));
            command.args(["mds", "run", "--listen", &listen, "--dir"]).arg(self.dir.join("mds"));
        } else {
            command.args(["target", "run", "--config"]).arg(self.config(host));
        }
        let log = File::options().create(true).append(true).open(self.log(host))?;
        command.arg("--die-with-stdin").stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
        self.processes[host] = Some(command.spawn().with_context(|| format!("process {host}"))?);
        self.wanted[host] = true;
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&mut self, host: usize, signal: Signal) -> anyhow::Result<()> {
        if let Some(child) = &self.processes[host] {
            kill(Pid::from_raw(child.id() as i32), signal)?;
        }
        Ok(())
    }

    /// Kills a process, which stays dead until it is launched.
    pub fn kill(&mut self, host: usize) -> anyhow::Result<()> {
        self.wanted[host] = false;
        if let Some(mut child) = self.processes[host].take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts again what has ended by itself, and notes why it did.
    pub fn supervise(&mut self) -> anyhow::Result<()> {
        for host in 0..=SPARED {
            let Some(child) = &mut self.processes[host] else { continue };
            let Some(status) = child.try_wait()? else { continue };
            self.processes[host] = None;
            if self.excused == Some(host) {
                continue; // Its disk fails: it is launched when that is over.
            }
            if self.wanted[host] {
                self.ended.push(format!("process {host} ended with {status}: {}", tail(&self.log(host), 2)));
            }
            if self.wanted[host] {
                self.launch(host)?;
            }
        }
        Ok(())
    }

    /// Lets time pass.
    pub fn pass(&mut self, length: Duration) -> anyhow::Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < length {
            self.supervise()?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Does something to the disk of a target.
    pub fn storage(&mut self, target: usize, what: Storage) -> anyhow::Result<()> {
        let dir = self.disks[target - 1].dir();
        let disk = &mut self.disks[target - 1];
        match what {
            Storage::PowerCycle => disk.power_cycle(),
            Storage::Fail(fails) => disk.fail(fails),
            Storage::Fill(full) => disk.fill(full),
            Storage::Rot => super::nemesis::rot(&dir, target),
        }
        .with_context(|| format!("disk {target}: {what:?}"))
    }

    /// Waits until every target answers with both volumes.
    pub fn await_healthy(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            self.supervise()?;
            let uris = self.uris("vol0").into_iter().chain(self.uris("vol1"));
            let refused = uris.map(|uri| {
                let python = crate::tools::python().unwrap_or("python3");
                let read = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(4096, 0)";
                let limit = Duration::from_secs(10);
                Run::new(python).args(["-c", read, &uri]).inside(self.hub()).limit(limit).ok().map(drop)
            });
            match refused.collect::<anyhow::Result<()>>() {
                Ok(()) => return Ok(()),
                Err(error) if begin.elapsed() > Duration::from_secs(90) => {
                    return Err(error.context("the cluster is not healthy 90 s after all faults ended"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(300)),
            }
        }
    }

    /// Compares all replicas of a volume.
    pub fn check_replicas(&mut self, volume: &str) -> anyhow::Result<()> {
        let mds = format!("{}:{MDS_PORT}", address(MDS));
        let check = self.ashlar(&["volume", "check", volume, "--wait", "90", "--mds", &mds]);
        check.limit(LONG_LIMIT).ok().with_context(|| format!("replicas of {volume}")).map(drop)
    }

    /// Ends all processes by SIGTERM.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        for host in (0..=SPARED).rev() {
            self.wanted[host] = false;
            self.signal(host, Signal::SIGTERM)?;
        }
        for host in (0..=SPARED).rev() {
            let Some(mut child) = self.processes[host].take() else { continue };
            let begin = Instant::now();
            while child.try_wait()?.is_none() {
                ensure!(begin.elapsed() < Duration::from_secs(30), "process {host} does not stop");
                std::thread::sleep(Duration::from_millis(20));
            }
            ensure!(child.wait()?.success(), "process {host} stopped with {}", child.wait()?);
        }
        Ok(())
    }

    /// The end of every log, on stderr.
    pub fn print_logs(&self) {
        for host in 0..=SPARED {
            eprintln!("--- tail of {}:\n{}", self.log(host).display(), tail(&self.log(host), 60));
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in self.processes.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
