//! The register workload of `scripts/register.py`: numbered blocks whose history is checked.

use crate::tools::{LONG_LIMIT, Run, Running, script};
use anyhow::Context;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the workload spreads over the exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// One connection; when it breaks, the next export is tried, as a host that fails over does.
    One,
    /// A connection to every export at once, as a multi-path host has.
    All,
}

/// A volume's blocks and what each may hold; the history is in a file, so that one goes on where another ended.
#[derive(Clone, Debug)]
pub struct Register {
    state: PathBuf,
    seed: u64,
    blocks: u32,
    uris: Vec<String>,
    /// How the exports are used.
    pub attach: Attach,
    /// Whether ENOSPC is an answer like any other.
    pub allow_enospc: bool,
    /// The network namespace it runs in.
    pub netns: Option<String>,
    /// Where every operation is told, for another checker.
    pub trace: Option<PathBuf>,
    /// How long an operation may take.
    pub op_limit_s: u64,
}

/// What a run did.
#[derive(Clone, Debug, Deserialize)]
pub struct Summary {
    /// "right", or what was wrong.
    pub result: String,
    /// Longest time from an operation's birth to its answer, lost connections included.
    pub longest_ms: u64,
    /// Writes acknowledged.
    pub write: u64,
    /// Reads checked.
    pub read: u64,
    /// Operations that were sent again after a lost connection.
    pub retried: u64,
    /// Writes refused for lack of space.
    pub enospc: u64,
}

impl Register {
    /// A workload over the first `blocks` blocks of 4 KiB of the volume behind `uris`.
    pub fn new(scratch: &Path, seed: u64, blocks: u32, uris: &[String]) -> Self {
        let state = scratch.join(format!("register-{seed}.json"));
        Self {
            state,
            seed,
            blocks,
            uris: uris.to_vec(),
            attach: Attach::All,
            allow_enospc: false,
            netns: None,
            trace: None,
            op_limit_s: 30,
        }
    }

    fn command(&self, command: &str) -> anyhow::Result<Run> {
        let mut run = script("register.py")?
            .arg(command)
            .arg("--state")
            .arg(&self.state)
            .args(["--seed", &self.seed.to_string(), "--blocks", &self.blocks.to_string(), "--vary"])
            .args(["--attach", if self.attach == Attach::One { "one" } else { "all" }])
            .args(["--op-limit", &self.op_limit_s.to_string()])
            .limit(LONG_LIMIT);
        if let Some(name) = &self.netns {
            run = run.inside(name);
        }
        if let Some(trace) = &self.trace {
            run = run.arg("--trace").arg(trace);
        }
        if self.allow_enospc {
            run = run.arg("--allow-enospc");
        }
        Ok(run)
    }

    /// Starts a run of that length, followed by reading everything back through every export.
    ///
    /// # Errors
    /// Python cannot be started.
    pub fn spawn(&self, length: Duration) -> anyhow::Result<Running> {
        let seconds = length.as_secs_f64().to_string();
        let run = self.command("run")?.args(["--seconds", &seconds]).args(&self.uris);
        run.limit(length + LONG_LIMIT).spawn()
    }

    /// Starts a run that ends when the first connection is lost, and reads nothing back.
    ///
    /// # Errors
    /// Python cannot be started.
    pub fn spawn_until_dead(&self, limit: Duration) -> anyhow::Result<Running> {
        let seconds = limit.as_secs_f64().to_string();
        self.command("run")?
            .args(["--until-dead", "--no-check", "--seconds", &seconds])
            .args(&self.uris)
            .spawn()
    }

    /// Runs for that length and reads everything back.
    ///
    /// # Errors
    /// See [`finish`].
    pub fn run(&self, length: Duration) -> anyhow::Result<Summary> {
        finish(self.spawn(length)?)
    }

    /// Reads every block through every export and checks it against the history.
    ///
    /// # Errors
    /// See [`finish`].
    pub fn check(&self) -> anyhow::Result<Summary> {
        finish(self.command("check")?.args(&self.uris).spawn()?)
    }
}

/// Waits for a run's end and reads its summary.
///
/// # Errors
/// A read was wrong, or an IO failed or hung; the message says which.
pub fn finish(running: Running) -> anyhow::Result<Summary> {
    let ran = running.ok()?;
    let line = ran.stdout.lines().last().context("the register workload printed nothing")?;
    let summary: Summary = serde_json::from_str(line)?;
    eprintln!("register: {line}");
    Ok(summary)
}
