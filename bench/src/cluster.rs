//! The dev cluster that is measured: one that runs already, or one of our own for as long as it takes.

use crate::dev::{DevFile, DevOptions, DevProcess, DevVolume};
use crate::{ClusterArgs, process};
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The volume that a dev cluster always has.
pub const VOLUME: &str = "vol0";
/// How long the targets may take to flush what was written before a measurement.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// A dev cluster to measure, and whether it is ours to stop.
#[derive(Debug)]
pub struct Cluster {
    /// Its directory.
    pub dir: PathBuf,
    /// Holds raw files and, if it is ours, the cluster; removed at the end.
    pub scratch: tempfile::TempDir,
    process: Option<DevProcess>,
}

impl Cluster {
    /// Takes the running cluster of `--dir`, or starts one.
    ///
    /// # Errors
    /// The cluster of `--dir` is gone, or ours does not start.
    pub fn open(args: &ClusterArgs) -> anyhow::Result<Self> {
        let base = args.scratch.clone().or_else(|| args.dir.clone()).unwrap_or_else(|| "/var/tmp".into());
        let scratch = tempfile::Builder::new().prefix("ashlar-bench-").tempdir_in(&base);
        let scratch =
            scratch.with_context(|| format!("no scratch directory can be made in {}", base.display()))?;
        if let Some(dir) = &args.dir {
            let dead = DevFile::read(dir)?.pids().into_iter().find(|pid| !process::is_alive(*pid));
            ensure!(
                dead.is_none(),
                "process {} of the cluster in {} is gone; start `ashlar dev` again",
                dead.unwrap_or(0),
                dir.display()
            );
            return Ok(Self { dir: dir.clone(), scratch, process: None });
        }
        let dir = scratch.path().join("cluster");
        let process = start(&dir, &args.size.to_string(), &[])?;
        Ok(Self { dir, scratch, process: Some(process) })
    }

    /// The cluster's file as it is now.
    ///
    /// # Errors
    /// See [`DevFile::read`].
    pub fn file(&self) -> anyhow::Result<DevFile> {
        DevFile::read(&self.dir)
    }

    /// Stops the cluster if it is ours.
    ///
    /// # Errors
    /// See [`DevProcess::stop`].
    pub fn close(mut self) -> anyhow::Result<()> {
        match &mut self.process {
            Some(process) => process.stop().map(|_| ()),
            None => Ok(()),
        }
    }
}

/// Starts a cluster of our own, which ends with this process, by further arguments of `ashlar dev`.
///
/// # Errors
/// See [`DevProcess::start`].
pub fn start(dir: &Path, size: &str, extra: &[&str]) -> anyhow::Result<DevProcess> {
    let bin = std::env::current_exe().context("the path of this program is unknown")?;
    let extra = extra.iter().map(|word| (*word).to_owned()).collect();
    DevProcess::start(DevOptions { with_us: true, extra, ..DevOptions::new(&bin, dir, size) })
}

/// Refuses a volume smaller than what is to be measured.
///
/// # Errors
/// It is smaller.
pub fn ensure_size(volume: &DevVolume, size: u64) -> anyhow::Result<()> {
    let (name, bytes) = (&volume.name, volume.bytes);
    ensure!(bytes >= size, "{name} has {bytes} bytes, fewer than --size {size}; give a smaller --size");
    Ok(())
}

/// Waits until the cluster has flushed what was written, and says so.
pub fn wait_settled(file: &DevFile) {
    if let Some(after) = process::settle_or_say(&file.pids(), SETTLE_LIMIT) {
        eprintln!("the targets came to rest after {:.0} s", after.as_secs_f64());
    }
}
