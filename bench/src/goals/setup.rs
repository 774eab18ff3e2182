//! The clusters that are measured, each for as long as it takes.

use crate::cluster::{self, SETTLE_LIMIT};
use crate::dev::{DevFile, DevProcess};
use crate::metrics;
use crate::process;
use crate::run::measure::Subject;
use crate::run::target::Target;
use std::path::Path;
use std::process::Command;

/// A dev cluster of our own.
#[derive(Debug)]
pub struct Cluster {
    process: DevProcess,
}

impl Cluster {
    /// Starts one in a folder of its own, with further arguments of `ashlar dev`.
    ///
    /// # Errors
    /// See [`DevProcess::start`].
    pub fn start(scratch: &Path, name: &str, size: u64, extra: &[&str]) -> anyhow::Result<Self> {
        Ok(Self { process: cluster::start(&scratch.join(name), &size.to_string(), extra)? })
    }

    fn file(&self) -> anyhow::Result<DevFile> {
        self.process.file()
    }

    /// Its volume by a protocol; the processes that count are those of the targets.
    ///
    /// # Errors
    /// It is not exported so.
    pub fn subject(&self, name: &str, protocol: &str) -> anyhow::Result<Subject> {
        let target = Target::of_dev(protocol, &self.file()?)?;
        Ok(Subject { name: name.to_owned(), target, pids: self.targets()?, flushes: true })
    }

    /// The targets' processes.
    ///
    /// # Errors
    /// See [`DevFile::read`].
    pub fn targets(&self) -> anyhow::Result<Vec<i32>> {
        Ok(self.file()?.targets.iter().map(|target| target.pid).collect())
    }

    /// Bytes that the targets have written to their logs.
    ///
    /// # Errors
    /// A target does not tell.
    pub fn log_bytes(&self) -> anyhow::Result<f64> {
        let targets = self.file()?.targets;
        let pages = targets.iter().map(|target| metrics::fetch(&target.metrics));
        pages.map(|page| Ok(metrics::sum(&page?, "ashlar_log_bytes_total"))).sum()
    }

    /// Waits until what was written is flushed.
    pub fn settle(&self) {
        process::settle_or_say(&self.targets().unwrap_or_default(), SETTLE_LIMIT);
    }

    /// Stops it.
    ///
    /// # Errors
    /// See [`DevProcess::stop`].
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.process.stop().map(drop)
    }
}

/// Whether this build's `ashlar dev` has an option.
pub fn offers(option: &str) -> bool {
    let help =
        std::env::current_exe().ok().and_then(|bin| Command::new(bin).args(["dev", "--help"]).output().ok());
    let words = help.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    words.split_whitespace().any(|word| word == option)
}
