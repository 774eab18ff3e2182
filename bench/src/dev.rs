//! A dev cluster as seen from outside: its `dev.json`, and a supervisor process that is started and stopped.
//!
//! Invariants: a pid is taken from `dev.json` at the moment of use, since the supervisor restarts targets under us;
//! whoever starts a [`DevProcess`] leaves no process behind, also when it panics.
//!
//! Deliberately absent: anything that links the cluster's code. Benchmarks and tests meet it as its users do.

use crate::process;
use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// `D/dev.json`: the processes and addresses of a dev cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct DevFile {
    /// The metadata server.
    pub mds: DevMds,
    /// The targets, in the order of their numbers.
    pub targets: Vec<DevTarget>,
    /// The volumes and where they are exported.
    #[serde(default)]
    pub volumes: Vec<DevVolume>,
}

/// The metadata server of a dev cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct DevMds {
    /// Host and port of its gRPC service.
    pub endpoint: String,
    /// Its process.
    pub pid: i32,
}

/// One target of a dev cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct DevTarget {
    /// Its number; kept as JSON since both 1 and "t1" are readable.
    pub id: serde_json::Value,
    /// Its process.
    pub pid: i32,
    /// Where its data lies.
    pub dir: PathBuf,
    /// Host and port of its Prometheus text, with or without a scheme.
    #[serde(default)]
    pub metrics: String,
}

/// One volume of a dev cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct DevVolume {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its block size: 512 or 4096.
    pub block_bytes: u64,
    /// NBD URIs over TCP, one a target.
    #[serde(default)]
    pub nbd: Vec<String>,
    /// NBD URIs over Unix sockets, one a target.
    #[serde(default)]
    pub nbd_unix: Vec<String>,
    /// NVMe/TCP paths, one a target.
    #[serde(default)]
    pub nvme: Vec<DevPath>,
}

/// A path to a volume over NVMe/TCP.
#[derive(Clone, Debug, Deserialize)]
pub struct DevPath {
    /// Address.
    pub traddr: String,
    /// Port.
    pub trsvcid: String,
    /// The subsystem's name.
    pub nqn: String,
}

impl DevFile {
    /// Reads `dir/dev.json`.
    ///
    /// # Errors
    /// The file is missing or is not what a dev cluster writes.
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("dev.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("{} cannot be read; is `ashlar dev --dir {}` running?", path.display(), dir.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a dev cluster's file", path.display()))
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// There is none, or it is not exported by any target over a Unix socket.
    pub fn volume(&self, name: &str) -> anyhow::Result<&DevVolume> {
        let volume = self.volumes.iter().find(|volume| volume.name == name);
        let volume = volume.with_context(|| format!("the dev cluster has no volume {name}"))?;
        ensure!(!volume.nbd_unix.is_empty(), "volume {name} has no NBD export on a Unix socket");
        Ok(volume)
    }

    /// The pids of the MDS and of every target.
    pub fn pids(&self) -> Vec<i32> {
        std::iter::once(self.mds.pid).chain(self.targets.iter().map(|target| target.pid)).collect()
    }
}

/// How a dev cluster is started.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// The `ashlar` binary.
    pub bin: PathBuf,
    /// The cluster's directory; its parent holds the supervisor's output.
    pub dir: PathBuf,
    /// Size of `vol0`, as the command line takes it.
    pub size: String,
    /// Whether a target that dies is started again.
    pub restart: bool,
    /// Further arguments of `ashlar dev`.
    pub extra: Vec<String>,
    /// Whether it is killed when the thread that starts it ends, however that is: it is nobody else's.
    pub with_us: bool,
    /// Most open files of the supervisor and its children; `None` leaves the limit alone.
    pub nofile: Option<u32>,
    /// How long READY may take.
    pub limit: Duration,
}

impl DevOptions {
    /// A cluster of three targets with a volume of `size` that restarts what dies.
    pub fn new(bin: &Path, dir: &Path, size: &str) -> Self {
        Self {
            bin: bin.to_owned(),
            dir: dir.to_owned(),
            size: size.to_owned(),
            restart: true,
            extra: Vec::new(),
            with_us: false,
            nofile: None,
            limit: Duration::from_secs(60),
        }
    }

    /// The file that takes the supervisor's output of that stream.
    pub fn output_path(&self, stream: &str) -> PathBuf {
        let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
        self.dir.with_file_name(format!("{name}.{stream}"))
    }

    fn command(&self) -> Command {
        let mut command = match self.nofile {
            None if self.with_us => process::with_us(&self.bin),
            None => Command::new(&self.bin),
            Some(limit) => {
                let mut command = Command::new("prlimit");
                command.arg(format!("--nofile={limit}:{limit}")).arg(&self.bin);
                command
            }
        };
        command.arg("dev").arg("--dir").arg(&self.dir).args(["--size", &self.size]);
        if !self.restart {
            command.arg("--no-restart");
        }
        command.args(&self.extra);
        command
    }
}

/// A supervisor that we started: stopped, with its children, at the latest when dropped.
#[derive(Debug)]
pub struct DevProcess {
    options: DevOptions,
    child: Child,
    /// How long it took from the start to READY.
    pub ready_after: Duration,
}

impl DevProcess {
    /// Starts `ashlar dev` and waits for READY and for a `dev.json` whose processes live.
    ///
    /// # Errors
    /// The binary cannot run, ends early or is not ready within the limit; the tail of its output is in the message.
    pub fn start(options: DevOptions) -> anyhow::Result<Self> {
        let output = File::create(options.output_path("out"))?;
        let errors = File::create(options.output_path("err"))?;
        let started = Instant::now();
        let child = options
            .command()
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("{} cannot be started", options.bin.display()))?;
        let mut process = Self { options, child, ready_after: Duration::ZERO };
        process.wait_ready(started)?;
        process.ready_after = started.elapsed();
        Ok(process)
    }

    /// The cluster's directory.
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// The supervisor's pid.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The cluster as `dev.json` shows it now.
    ///
    /// # Errors
    /// See [`DevFile::read`].
    pub fn file(&self) -> anyhow::Result<DevFile> {
        DevFile::read(&self.options.dir)
    }

    /// Asks the supervisor to stop everything and waits for it.
    ///
    /// # Errors
    /// It does not end within 30 s, or leaves a child behind; both are killed then.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        let pids = self.file().map(|file| file.pids()).unwrap_or_default();
        if let Some(status) = self.child.try_wait()? {
            process::kill_all(&pids);
            return Ok(status);
        }
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?;
        let ended = self.wait_exit(Duration::from_secs(30));
        let left: Vec<i32> = pids.into_iter().filter(|pid| process::is_alive(*pid)).collect();
        process::kill_all(&left);
        let Some(status) = ended? else {
            self.kill();
            bail!("`ashlar dev` did not end within 30 s of SIGTERM");
        };
        ensure!(left.is_empty(), "`ashlar dev` ended but left processes {left:?} running");
        Ok(status)
    }

    /// Kills the supervisor and then every process of the cluster with SIGKILL.
    pub fn kill(&mut self) {
        // Halted first, so that it cannot start again what dies, nor have a child that is not in its list yet.
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGSTOP);
        let mut pids = process::children(self.pid());
        pids.extend(self.file().map(|file| file.pids()).unwrap_or_default());
        let _ = self.child.kill();
        let _ = self.child.wait();
        process::kill_all(&pids);
    }

    fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let started = Instant::now();
        while started.elapsed() < limit {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    fn wait_ready(&mut self, started: Instant) -> anyhow::Result<()> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("`ashlar dev` ended before READY with {status}:\n{}", self.output_tail());
            }
            if self.is_ready() {
                return Ok(());
            }
            if started.elapsed() > self.options.limit {
                let tail = self.output_tail();
                self.kill();
                bail!("`ashlar dev` was not READY within {:?}:\n{tail}", self.options.limit);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_ready(&self) -> bool {
        let output = std::fs::read_to_string(self.options.output_path("out")).unwrap_or_default();
        let Ok(file) = self.file() else { return false };
        output.contains("READY") && file.pids().iter().all(|pid| process::is_alive(*pid))
    }

    fn output_tail(&self) -> String {
        ["out", "err"].map(|stream| tail(&self.options.output_path(stream), 30)).join("\n")
    }
}

impl Drop for DevProcess {
    fn drop(&mut self) {
        if self.stop().is_err() {
            self.kill();
        }
    }
}

/// The last `lines` lines of a text file; empty when it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let text =
        std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"{"mds": {"endpoint": "127.0.0.1:7000", "pid": 10},
        "targets": [{"id": 1, "pid": 11, "dir": "/d/target-1", "peer": "127.0.0.1:1", "admin": "x", "metrics": "127.0.0.1:2"}],
        "volumes": [{"name": "vol0", "bytes": 4096, "block_bytes": 512, "nbd": ["nbd://127.0.0.1:3/vol0"],
                     "nbd_unix": ["nbd+unix:///vol0?socket=/d/s"], "nvme": []}], "discovery": []}"#;

    #[test]
    fn a_dev_file_is_read_and_unknown_fields_are_left_to_later_versions() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("dev.json"), SAMPLE)?;
        let file = DevFile::read(dir.path())?;
        assert_eq!(file.pids(), [10, 11]);
        assert_eq!(file.volume("vol0")?.block_bytes, 512);
        assert!(file.volume("vol1").is_err());
        Ok(())
    }

    #[test]
    fn a_supervisor_that_dies_at_once_shows_its_last_words() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let bin = dir.path().join("ashlar");
        std::fs::write(&bin, "#!/bin/sh\necho no space here >&2\nexit 1\n")?;
        std::fs::set_permissions(&bin, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let started = DevProcess::start(DevOptions::new(&bin, &dir.path().join("d"), "1G"));
        let message = format!("{:?}", started.err().context("must fail")?);
        assert!(message.contains("ended before READY") && message.contains("no space here"), "{message}");
        Ok(())
    }
}
