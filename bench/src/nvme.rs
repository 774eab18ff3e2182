//! `ashlar bench nvme`: the same load on one volume through NVMe/TCP and through NBD, both over TCP on loopback.
//!
//! Invariants: one run, one volume, one connection at a time to the same target, in alternating rounds.

use crate::ClusterArgs;
use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::dev::DevFile;
use crate::environment::Environment;
use crate::report::{Goal, Report};
use crate::run::load::Load;
use crate::run::measure::{Client, Plan, Subject, prepare};
use crate::run::results;
use crate::run::summary::{self, Row, find};
use crate::run::target::Target;
use clap::Args;
use protocol::nvme_tcp::wire::QUEUE_ENTRIES_MAX;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `ashlar bench nvme`.
#[derive(Debug, Args)]
pub struct NvmeArgs {
    /// The cluster and where results go.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// How often each measurement is repeated; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// IOs in flight, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,32,128", value_parser = depth)]
    pub depths: Vec<u32>,
    /// Only this load, such as `--only read` beneath a profiler.
    #[arg(long, value_enum)]
    pub only: Option<Direction>,
    /// Only this protocol.
    #[arg(long, value_enum)]
    pub through: Option<Protocol>,
    /// Write the result as a Markdown page to this file.
    #[arg(long, value_name = "FILE")]
    pub write_markdown: Option<PathBuf>,
}

/// IOs in flight that an NVMe queue of ours takes: one entry stays free.
const DEPTH_MAX: u32 = QUEUE_ENTRIES_MAX as u32 - 1;

fn depth(text: &str) -> Result<u32, String> {
    let depth = text.parse().ok().filter(|depth| (1..=DEPTH_MAX).contains(depth));
    depth.ok_or_else(|| format!("a depth is 1 to {DEPTH_MAX}"))
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the volume.
    Read,
    /// To the volume.
    Write,
}

/// How the volume is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// NVMe over TCP.
    Nvme,
    /// NBD over TCP.
    Nbd,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Nbd => "nbd",
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &NvmeArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(&args.cluster)?;
    let report = measure(args, &cluster)?;
    cluster.close()?;
    report.publish(&args.cluster, "nvme", args.write_markdown.as_deref())
}

fn measure(args: &NvmeArgs, cluster: &Cluster) -> anyhow::Result<Report> {
    let (file, size) = (cluster.file()?, args.cluster.size);
    ensure_size(file.volume(VOLUME)?, size)?;
    prepare(&subject(&file, Protocol::Nvme)?, size)?;
    wait_settled(&file);
    let wanted = |protocol: &Protocol| args.through.is_none_or(|only| only == *protocol);
    let protocols = [Protocol::Nvme, Protocol::Nbd].into_iter().filter(wanted);
    let subjects: Vec<Subject> =
        protocols.map(|protocol| subject(&file, protocol)).collect::<anyhow::Result<_>>()?;
    let mut loads = Vec::new();
    for (direction, reads) in [(Direction::Read, 100), (Direction::Write, 0)] {
        if args.only.is_none_or(|only| only == direction) {
            loads.extend(args.depths.iter().map(|depth| Load::random_4k(reads, *depth, size)));
        }
    }
    let (client, rounds, seconds) = (Client::Own, args.rounds, args.seconds.into());
    // The first IOs find leaders and fill pools.
    let plan = Plan { client: &client, subjects: &subjects, loads: &loads, seconds, warm_up: 0.5, rounds };
    let runs = plan.measure()?.into_iter().map(|one| one.run).collect();
    let environment = Environment::read(cluster.scratch.path(), String::new(), String::new());
    let results = results(&plan, environment, runs);
    let rows = summary::rows(&results);
    Ok(Report {
        title: "NVMe/TCP and NBD",
        command: "ashlar bench nvme --write-markdown",
        about: "4 KiB random IO on one volume with 3 replicas, one connection over TCP on loopback to one target.".into(),
        bases: vec![Protocol::Nbd.name()],
        notes: "Server CPU is that of the targets, without the MDS.".into(),
        goals: goals(&rows),
        rows,
        results,
    })
}

fn subject(file: &DevFile, protocol: Protocol) -> anyhow::Result<Subject> {
    let pids = file.targets.iter().map(|target| target.pid).collect();
    let (name, target) = (protocol.name().into(), Target::of_dev(protocol.name(), file)?);
    Ok(Subject { name, target, pids, flushes: true })
}

/// NVMe/TCP costs the targets no more CPU an IO than NBD; a twentieth is what two equal runs differ by.
fn goals(rows: &[Row]) -> Vec<Goal> {
    let ratio = |nvme: &Row| {
        let nbd = find(rows, Protocol::Nbd.name(), &nvme.load)?;
        Some(nvme.server_us_per_io? / nbd.server_us_per_io?)
    };
    let nvme = rows.iter().filter(|row| row.subject == Protocol::Nvme.name());
    let found = nvme.filter_map(ratio).reduce(f64::max);
    let text = "targets' CPU an IO, NVMe by NBD, at the load where it is highest, at most 1.05";
    vec![Goal::new(text, found, |ratio| ratio <= 1.05)]
}
