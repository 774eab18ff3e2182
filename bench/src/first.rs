//! `ashlar bench first`: 4 KiB random IO on the raw disk, on a replicated volume over NBD, and on qemu-nbd.
//!
//! Invariants: one run, one disk, one client at a time; rounds alternate over the subjects, and each round starts
//! with another subject, so that a drift of the machine does not favour one of them.

use crate::dev::{DevFile, DevOptions, DevProcess, DevVolume};
use crate::environment::Environment;
use crate::fio::{self, Job, Pattern, Subject};
use crate::report::{FirstReport, Run, SubjectName};
use crate::rival::{QemuNbd, fill, raw_file};
use crate::{ClusterArgs, EXIT_CHECK_FAILED, Output, process};
use anyhow::{Context, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The volume that a dev cluster always has.
pub const VOLUME: &str = "vol0";
/// How long the targets may take to flush what was written before a measurement.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `ashlar bench first`.
#[derive(Debug, Args)]
pub struct FirstArgs {
    /// The cluster and where results go.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// How often each measurement is repeated; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// Write the result as a Markdown page to this file.
    #[arg(long, value_name = "FILE")]
    pub write_markdown: Option<PathBuf>,
}

/// A dev cluster to measure, and whether it is ours to stop.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// Its directory.
    pub dir: PathBuf,
    /// Holds raw files and, if it is ours, the cluster; removed at the end.
    pub scratch: tempfile::TempDir,
    process: Option<DevProcess>,
}

impl Cluster {
    /// Takes the running cluster of `--dir`, or starts one.
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
        let bin = std::env::current_exe().context("the path of this program is unknown")?;
        let dir = scratch.path().join("cluster");
        let process = DevProcess::start(DevOptions::new(&bin, &dir, &args.size.to_string()))?;
        Ok(Self { dir, scratch, process: Some(process) })
    }

    /// The cluster's file as it is now.
    pub fn file(&self) -> anyhow::Result<DevFile> {
        DevFile::read(&self.dir)
    }

    /// Stops the cluster if it is ours.
    pub fn close(mut self) -> anyhow::Result<()> {
        match &mut self.process {
            Some(process) => process.stop().map(|_| ()),
            None => Ok(()),
        }
    }
}

/// Refuses a volume smaller than what is to be measured.
pub(crate) fn ensure_size(volume: &DevVolume, size: u64) -> anyhow::Result<()> {
    let (name, bytes) = (&volume.name, volume.bytes);
    ensure!(bytes >= size, "{name} has {bytes} bytes, fewer than --size {size}; give a smaller --size");
    Ok(())
}

/// One thing that is measured.
struct Contestant {
    name: SubjectName,
    subject: Subject,
    /// The processes that serve it; empty for the raw disk.
    server_pids: Vec<i32>,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &FirstArgs) -> anyhow::Result<ExitCode> {
    let fio_version = fio::probe()?;
    let qemu_version = QemuNbd::version();
    if qemu_version.is_none() {
        eprintln!(
            "note: qemu-nbd is missing, so nothing is compared with it; install it: apt-get install qemu-utils"
        );
    }
    let cluster = Cluster::open(&args.cluster)?;
    let environment =
        Environment::read(cluster.scratch.path(), fio_version, qemu_version.clone().unwrap_or_default());
    if environment.debug_build {
        eprintln!("note: this is a debug build; its figures mean little, use cargo run --release");
    }
    let runs = measure(args, &cluster, qemu_version.is_some())?;
    cluster.close()?;
    let report = FirstReport::new(environment, args.cluster.size, args.seconds, args.rounds, runs)?;
    publish(args, &report)
}

fn measure(args: &FirstArgs, cluster: &Cluster, with_qemu: bool) -> anyhow::Result<Vec<Run>> {
    let (size, scratch) = (args.cluster.size, cluster.scratch.path());
    let file = cluster.file()?;
    let volume = file.volume(VOLUME)?;
    ensure_size(volume, size)?;
    eprintln!("filling the raw files and {VOLUME}, {} MiB each", size >> 20);
    let mut contestants = vec![raw(scratch, size)?, on_volume(&file, volume, size)?];
    let server =
        with_qemu.then(|| QemuNbd::serve(&raw_file(scratch, "qemu.raw", size)?, scratch)).transpose()?;
    if let Some(server) = &server {
        let (subject, server_pids) = (server.subject(), vec![server.pid()]);
        contestants.push(Contestant { name: SubjectName::QemuNbd, subject, server_pids });
    }
    wait_settled(&file);
    rounds(args, &contestants, &file)
}

fn raw(scratch: &Path, size: u64) -> anyhow::Result<Contestant> {
    let subject = Subject::File(raw_file(scratch, "raw.raw", size)?);
    Ok(Contestant { name: SubjectName::Raw, subject, server_pids: Vec::new() })
}

fn on_volume(file: &DevFile, volume: &DevVolume, size: u64) -> anyhow::Result<Contestant> {
    let subject = Subject::Nbd(volume.nbd_unix[0].clone());
    fill(&subject, size)?;
    Ok(Contestant { name: SubjectName::Volume, subject, server_pids: file.pids() })
}

pub(crate) fn wait_settled(file: &DevFile) {
    match process::settle(&file.pids(), SETTLE_LIMIT) {
        Some(after) => eprintln!("the targets came to rest after {:.0} s", after.as_secs_f64()),
        None => eprintln!("note: the targets are still busy after {SETTLE_LIMIT:?}; measuring nevertheless"),
    }
}

fn rounds(args: &FirstArgs, contestants: &[Contestant], file: &DevFile) -> anyhow::Result<Vec<Run>> {
    let mut runs = Vec::new();
    // Reads come first: they find the volume at rest, and writes then start from the same state in every round.
    for pattern in [Pattern::RandRead, Pattern::RandWrite] {
        for queue_depth in [1, 32] {
            for round in 0..args.rounds {
                for at in 0..contestants.len() {
                    let contestant = &contestants[(at + round as usize) % contestants.len()];
                    let run = one(args, contestant, pattern, queue_depth, round)?;
                    eprintln!("{}", run.line());
                    runs.push(run);
                    if pattern == Pattern::RandWrite && contestant.name == SubjectName::Volume {
                        // What the volume still flushes must not disturb the next contestant.
                        process::settle(&file.pids(), SETTLE_LIMIT);
                    }
                }
            }
        }
    }
    Ok(runs)
}

fn one(
    args: &FirstArgs,
    contestant: &Contestant,
    pattern: Pattern,
    queue_depth: u32,
    round: u32,
) -> anyhow::Result<Run> {
    let job = Job {
        subject: contestant.subject.clone(),
        pattern,
        block_bytes: 4096,
        queue_depth,
        size: args.cluster.size,
        seconds: Some(args.seconds),
    };
    let before = process::cpu_seconds_sum(&contestant.server_pids);
    let measured = job.run().with_context(|| format!("measuring {} failed", contestant.name.title()))?;
    let server_cpu_seconds = process::cpu_seconds_sum(&contestant.server_pids) - before;
    Ok(Run { subject: contestant.name, pattern, queue_depth, round, server_cpu_seconds, measured })
}

fn publish(args: &FirstArgs, report: &FirstReport) -> anyhow::Result<ExitCode> {
    let kept = crate::report::keep(&args.cluster.results, "first", &report.environment.time, report)?;
    match args.cluster.output {
        Output::Text => println!("{}", report.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
    }
    eprintln!("kept in {}", kept.display());
    if let Some(path) = &args.write_markdown {
        std::fs::write(path, report.markdown())
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let failed = args.cluster.check && !report.goals().iter().all(|goal| goal.met);
    Ok(if failed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS })
}
