//! A dev cluster of our own, started anew for each trial, and the bench that judges it.
//!
//! Both are processes of this same program, as a user would run them. Whatever happens, the
//! cluster is stopped when this is dropped, and its folder removed.

use super::Setting;
use crate::device::{Device, FILE, Limits};
use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const READY_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(30);

/// The cluster.
pub struct Cluster {
    bin: PathBuf,
    scratch: TempDir,
    size: String,
    running: Option<Child>,
}

/// The part of the bench's report that is the score.
#[derive(Deserialize)]
struct Report {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    iops: f64,
}

impl Cluster {
    /// Makes a cluster once, so that its files are there to be changed.
    ///
    /// # Errors
    /// It does not start.
    pub fn prepare(scratch: &Path, size: &str) -> anyhow::Result<Self> {
        let bin = std::env::current_exe().context("the path of this program is unknown")?;
        let scratch = tempfile::Builder::new().prefix("ashlar-auto-").tempdir_in(scratch);
        let scratch = scratch.context("no folder for the cluster can be made; name one by --scratch")?;
        let mut cluster = Self { bin, scratch, size: size.into(), running: None };
        cluster.start()?;
        cluster.stop()?;
        Ok(cluster)
    }

    /// The score of a setting: the geometric mean of the volume's IOPS over the bench's loads.
    ///
    /// # Errors
    /// The cluster does not start with it, or the bench fails.
    pub fn judge(&mut self, setting: &Setting, seconds: u32) -> anyhow::Result<f64> {
        self.write(setting)?;
        self.start()?;
        let score = self.bench(seconds);
        self.stop()?;
        score
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join("cluster")
    }

    fn write(&self, setting: &Setting) -> anyhow::Result<()> {
        let limits = Limits {
            queue_depth: setting.queue_depth,
            batches_in_flight_max: setting.batches_in_flight_max,
            batch_blocks_max: setting.batch_blocks_max,
            flush_in_flight_max: setting.flush_in_flight_max,
            cpu_latency_us_max: None,
        };
        let device = Device { format: 1, limits, measured: None };
        for entry in fs::read_dir(self.dir())?.flatten() {
            let path = entry.path().join("target.toml");
            if !path.is_file() {
                continue;
            }
            let mut config: toml::Table = toml::from_str(&fs::read_to_string(&path)?)?;
            config.insert("spin_us_max".into(), i64::from(setting.spin_us_max).into());
            config.insert("arena_bytes".into(), setting.arena_bytes.cast_signed().into());
            fs::write(&path, toml::to_string(&config)?)?;
            device.save(&entry.path().join(FILE))?;
        }
        Ok(())
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let log = File::create(self.scratch.path().join("cluster.log"))?;
        let child = Command::new(&self.bin)
            .arg("dev")
            .arg("--dir")
            .arg(self.dir())
            .args(["--size", &self.size, "--no-restart"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("`ashlar dev` cannot be started")?;
        let child = self.running.insert(child);
        let started = Instant::now();
        loop {
            let said = fs::read_to_string(self.scratch.path().join("cluster.log")).unwrap_or_default();
            if said.contains("READY") {
                return Ok(());
            }
            let ended = child.try_wait()?;
            if ended.is_some() || started.elapsed() > READY_MAX {
                let lines: Vec<_> = said.lines().rev().take(5).collect();
                let last = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
                self.stop()?;
                bail!("the cluster was not ready:\n{last}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.running.take() else { return Ok(()) };
        let asked = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        let started = Instant::now();
        while asked.is_ok() && started.elapsed() < STOP_MAX {
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // The children end with their supervisor.
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn bench(&self, seconds: u32) -> anyhow::Result<f64> {
        let output = Command::new(&self.bin)
            .args(["bench", "sweep", "dev:nbd+unix", "--read", "100,0", "--depth", "1,32", "--prepare"])
            .args(["-o", "json", "--size", &self.size, "--seconds", &seconds.to_string()])
            .arg("--dev")
            .arg(self.dir())
            .arg("--save")
            .arg(self.scratch.path().join("result.json"))
            .stdin(Stdio::null())
            .output()
            .context("`ashlar bench` cannot be started")?;
        ensure!(
            output.status.success(),
            "ashlar bench failed: {}",
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default()
        );
        score(&String::from_utf8_lossy(&output.stdout))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.stop();
    }
}

/// The geometric mean of the IOPS of all runs of a bench's result.
///
/// # Errors
/// It is no such report, or has no IOs.
pub fn score(report: &str) -> anyhow::Result<f64> {
    let report: Report = serde_json::from_str(report).context("the bench's report is not understood")?;
    let iops: Vec<f64> = report.runs.iter().map(|run| run.iops).collect();
    ensure!(!iops.is_empty() && iops.iter().all(|iops| *iops > 0.0), "the bench measured no IO");
    Ok((iops.iter().map(|iops| iops.ln()).sum::<f64>() / iops.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_score_is_the_mean_that_no_load_outweighs() -> anyhow::Result<()> {
        let report = r#"{"runs": [{"iops": 100.0, "p50_us": 1}, {"iops": 400.0}], "goals": []}"#;
        assert!((score(report)? - 200.0).abs() < 1e-6);
        assert!(score(r#"{"runs": []}"#).is_err() && score(r#"{"runs": [{"iops": 0.0}]}"#).is_err());
        Ok(())
    }
}
