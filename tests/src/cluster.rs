//! A dev cluster for one test: real processes that are started, killed, stopped and looked at.
//!
//! Invariants: at most one [`DevCluster`] lives on the machine, also across test processes; none of its processes
//! outlives it; when its test panics, the tail of every log is printed.

use crate::tools::{LONG_LIMIT, Run, target_dir};
use anyhow::{Context, ensure};
use bench::dev::{DevFile, DevOptions, DevProcess, DevVolume, tail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The volume of every dev cluster.
pub const VOLUME: &str = "vol0";

/// A dev cluster in a directory of its own.
#[derive(Debug)]
pub struct DevCluster {
    // Fields drop in this order: processes, directory, lock.
    process: Option<DevProcess>,
    options: DevOptions,
    /// File systems beneath the directory, to be unmounted before it is removed.
    mounts: Vec<PathBuf>,
    root: Option<tempfile::TempDir>,
    _lock: Flock<File>,
}

impl DevCluster {
    /// A running cluster of three targets with a volume of `size`, such as `1G`.
    ///
    /// # Errors
    /// It cannot be built or is not READY in time.
    pub fn start(size: &str) -> anyhow::Result<Self> {
        Self::start_with(size, |_| {})
    }

    /// As [`DevCluster::start`], after `adjust` has changed the options.
    ///
    /// # Errors
    /// See [`DevCluster::start`].
    pub fn start_with(size: &str, adjust: impl FnOnce(&mut DevOptions)) -> anyhow::Result<Self> {
        let mut cluster = Self::prepare(size)?;
        adjust(&mut cluster.options);
        cluster.start_again()?;
        Ok(cluster)
    }

    /// A cluster that is not yet started, so that its directory can be prepared.
    ///
    /// # Errors
    /// There is no binary or no room for the directory.
    pub fn prepare(size: &str) -> anyhow::Result<Self> {
        let lock = machine_lock()?;
        let bin = binary()?;
        let root = tempfile::Builder::new().prefix("ashlar-test-").tempdir_in(scratch_dir())?;
        let options = DevOptions::new(&bin, &root.path().join("d"), size);
        Ok(Self { process: None, options, mounts: Vec::new(), root: Some(root), _lock: lock })
    }

    /// Puts the target with this number, from 1, on an ext4 file system of that size on a loop device. Needs root.
    ///
    /// # Errors
    /// It cannot be made or mounted.
    pub fn mount_small_disk(&mut self, target: usize, size: &str) -> anyhow::Result<()> {
        let (image, dir) =
            (self.scratch().join(format!("disk-{target}")), self.dir().join(format!("target-{target}")));
        std::fs::create_dir_all(&dir)?;
        Run::new("truncate").args(["-s", size]).arg(&image).ok()?;
        Run::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image).ok()?;
        Run::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir).ok()?;
        self.mounts.push(dir.clone());
        // A target would rightly wonder about a directory that is not empty.
        Ok(std::fs::remove_dir(dir.join("lost+found"))?)
    }

    /// Starts `ashlar dev` on the directory, for the first time or again.
    ///
    /// # Errors
    /// It runs already, or is not READY in time.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "the cluster runs already");
        let process = DevProcess::start(self.options.clone())?;
        eprintln!("cluster READY after {:?} in {}", process.ready_after, self.dir().display());
        self.process = Some(process);
        Ok(())
    }

    /// Stops the cluster by SIGTERM.
    ///
    /// # Errors
    /// It runs not, does not end in time or leaves processes behind.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.process.take().context("the cluster does not run")?.stop()
    }

    /// Kills the supervisor and every process of the cluster with SIGKILL.
    pub fn kill_everything(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// The cluster's directory.
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// A place for the test's own files, on the cluster's disk.
    pub fn scratch(&self) -> PathBuf {
        self.options.dir.with_file_name("")
    }

    /// The cluster as `dev.json` shows it now.
    ///
    /// # Errors
    /// It is not running or its file is damaged.
    pub fn file(&self) -> anyhow::Result<DevFile> {
        DevFile::read(self.dir())
    }

    /// `vol0` as `dev.json` shows it now.
    ///
    /// # Errors
    /// See [`DevCluster::file`].
    pub fn volume(&self) -> anyhow::Result<DevVolume> {
        Ok(self.file()?.volume(VOLUME)?.clone())
    }

    /// The Unix-socket URI of `vol0` at the target with this index, from 0.
    ///
    /// # Errors
    /// There is no such target.
    pub fn uri(&self, target: usize) -> anyhow::Result<String> {
        self.volume()?.nbd_unix.get(target).cloned().with_context(|| format!("target {target} has no export"))
    }

    /// Sends a signal to the target with this index and returns its pid.
    ///
    /// # Errors
    /// There is no such target, or its process is gone.
    pub fn signal_target(&self, target: usize, signal: Signal) -> anyhow::Result<i32> {
        let pid = self.file()?.targets.get(target).with_context(|| format!("no target {target}"))?.pid;
        kill(Pid::from_raw(pid), signal)
            .with_context(|| format!("target {target}, process {pid}: {signal}"))?;
        Ok(pid)
    }

    /// Kills the target with this index and waits until the supervisor has started it again.
    ///
    /// # Errors
    /// It is not there again within 20 s.
    pub fn kill_and_await_restart(&self, target: usize) -> anyhow::Result<()> {
        let old = self.signal_target(target, Signal::SIGKILL)?;
        wait_until(Duration::from_secs(20), || {
            let pid = self.file()?.targets[target].pid;
            ensure!(pid != old && bench::process::is_alive(pid), "target {target} was not started again");
            Ok(())
        })
    }

    /// Stops the supervisor from acting (SIGSTOP), so that what dies stays dead, or lets it act again (SIGCONT).
    ///
    /// # Errors
    /// The cluster does not run.
    pub fn signal_supervisor(&self, signal: Signal) -> anyhow::Result<()> {
        let process = self.process.as_ref().context("the cluster does not run")?;
        Ok(kill(Pid::from_raw(process.pid()), signal)?)
    }

    /// A run of `ashlar ARGS --dir D`.
    pub fn ashlar(&self, args: &[&str]) -> Run {
        Run::new(&self.options.bin).args(args).arg("--dir").arg(self.dir())
    }

    /// Waits until `ashlar volume check vol0` finds every replica of every chunk equal.
    ///
    /// # Errors
    /// It still differs after 60 s; what was found is in the message.
    pub fn check_replicas(&self) -> anyhow::Result<()> {
        // A replica that was killed may still be catching up, which is no fault.
        wait_until(Duration::from_secs(60), || {
            self.ashlar(&["volume", "check", VOLUME]).limit(LONG_LIMIT).ok().map(|_| ())
        })
    }

    /// Prints the tail of every log and of the supervisor's output.
    pub fn print_logs(&self) {
        let mut paths = vec![self.options.output_path("out"), self.options.output_path("err")];
        paths.extend(log_paths(self.dir()));
        for path in paths {
            eprintln!("--- tail of {}:\n{}", path.display(), tail(&path, 40));
        }
    }
}

impl Drop for DevCluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.print_logs();
        }
        // A supervisor that was stopped by SIGSTOP would not hear SIGTERM.
        let _ = self.signal_supervisor(Signal::SIGCONT);
        self.process = None;
        for dir in self.mounts.drain(..) {
            let _ = Run::new("umount").arg("--lazy").arg(dir).end();
        }
        if failed && std::env::var_os("ASHLAR_KEEP").is_some() {
            let kept = self.root.take().map(tempfile::TempDir::keep);
            eprintln!("kept {}", kept.unwrap_or_default().display());
        }
    }
}

/// Runs a test's body on a cluster and stops the cluster; any error panics while the logs can still be printed.
///
/// # Panics
/// The cluster did not start or stop, or the body failed.
pub fn with_cluster(
    cluster: anyhow::Result<DevCluster>,
    body: impl FnOnce(&mut DevCluster) -> anyhow::Result<()>,
) {
    let mut cluster = cluster.unwrap_or_else(|error| panic!("no cluster: {error:#}"));
    let stopped = body(&mut cluster).and_then(|()| match cluster.process {
        Some(_) => cluster.stop().map(Some),
        None => Ok(None),
    });
    match stopped {
        Ok(None) => {}
        Ok(Some(status)) => assert!(status.success(), "`ashlar dev` ended with {status} after SIGTERM"),
        Err(error) => panic!("{error:#}"),
    }
}

/// Repeats `attempt` until it succeeds.
///
/// # Errors
/// The last error, once `limit` has passed.
pub fn wait_until(limit: Duration, mut attempt: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if started.elapsed() > limit => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn log_paths(dir: &Path) -> Vec<PathBuf> {
    let files = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = files(&dir.join("logs")).filter(|path| path.is_file()).collect();
    paths.sort();
    paths
}

/// Where clusters live: `ASHLAR_TEST_DIR`, or the target directory, which is on a real disk where /tmp may not be.
pub fn scratch_dir() -> PathBuf {
    std::env::var_os("ASHLAR_TEST_DIR").map_or_else(target_dir, PathBuf::from)
}

/// Waits for the right to run a cluster: two of them on a small machine would measure each other.
///
/// # Errors
/// The lock's file cannot be had.
pub fn machine_lock() -> anyhow::Result<Flock<File>> {
    let path = std::env::temp_dir().join("ashlar-tests.lock");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("{} cannot be opened", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow::anyhow!("{}: {errno}", path.display()))
}

/// The binary under test: `ASHLAR_BIN`, or a release build (`ASHLAR_PROFILE=dev` for the other) made here.
///
/// # Errors
/// It cannot be built.
pub fn binary() -> anyhow::Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(bin) = std::env::var_os("ASHLAR_BIN") {
        return Ok(bin.into());
    }
    BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
}

fn build() -> anyhow::Result<PathBuf> {
    let profile = std::env::var("ASHLAR_PROFILE").unwrap_or_else(|_| "release".to_owned());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Run::new(cargo)
        .args([
            "build",
            "--package",
            "ashlar-cli",
            "--bin",
            "ashlar",
            "--message-format=json",
            "--profile",
            &profile,
        ])
        .arg("--manifest-path")
        .arg(manifest)
        .limit(Duration::from_secs(1800))
        .ok()
        .context("the ashlar binary cannot be built; set ASHLAR_BIN to use another")?;
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let wanted = message["reason"] == "compiler-artifact" && message["target"]["name"] == "ashlar";
        if wanted { message["executable"].as_str().map(PathBuf::from) } else { None }
    };
    output.stdout.lines().find_map(executable).context("cargo named no executable")
}
