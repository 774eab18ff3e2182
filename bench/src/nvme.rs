//! `ashlar bench nvme`: the same load on one volume through NVMe/TCP and through NBD, both over TCP on loopback.
//!
//! Invariants: one run, one volume, one connection at a time to the same target, in alternating rounds.

use crate::ClusterArgs;
use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::dev::DevFile;
use crate::environment::Environment;
use crate::report::{Goal, Report, median};
use crate::run::load::Load;
use crate::run::measure::{Client, Plan, Subject, prepare};
use crate::run::measured;
use crate::run::result::{Results, Run};
use crate::run::summary;
use crate::run::target::Target;
use clap::Args;
use protocol::nvme_tcp::wire::QUEUE_ENTRIES_MAX;
use serde::Serialize;
use std::collections::BTreeMap;
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
    let plan = Plan { warm_up: 0.5, ..Plan::new(&client, &subjects, &loads, seconds, rounds) };
    let environment = Environment::read(cluster.scratch.path(), String::new(), String::new());
    let results = measured(&plan, environment)?;
    let rows = summary::rows(&results);
    let costs = costs(&results);
    Ok(Report {
        title: "NVMe/TCP and NBD",
        command: "ashlar bench nvme --write-markdown",
        about: "4 KiB random IO on one volume with 3 replicas, one connection over TCP on loopback to one target.".into(),
        bases: vec![Protocol::Nbd.name()],
        notes: notes(&costs),
        goals: goals(&costs),
        rows,
        results,
    })
}

fn subject(file: &DevFile, protocol: Protocol) -> anyhow::Result<Subject> {
    let pids = file.targets.iter().map(|target| target.pid).collect();
    let (name, target) = (protocol.name().into(), Target::of_dev(protocol.name(), file)?);
    Ok(Subject { name, target, pids, flushes: true })
}

/// What NVMe/TCP costs the targets an IO beside NBD, of one load: the median of the rounds' ratios, for a machine
/// drifts from round to round, and the least and greatest of them.
struct Cost {
    load: String,
    ratio: f64,
    least: f64,
    most: f64,
}

fn costs(results: &Results) -> Vec<Cost> {
    let of_load = |load: &&Load| {
        let cost = |run: &Run| Some((run.round, run.server_cpu_us_per_io()?));
        let by_round = |protocol: Protocol| -> BTreeMap<u32, f64> {
            results.runs_of(protocol.name(), load).filter_map(cost).collect()
        };
        let (nvme, nbd) = (by_round(Protocol::Nvme), by_round(Protocol::Nbd));
        let ratios: Vec<f64> = nvme.iter().filter_map(|(round, cost)| Some(cost / nbd.get(round)?)).collect();
        let (least, most) =
            (ratios.iter().copied().reduce(f64::min)?, ratios.iter().copied().reduce(f64::max)?);
        Some(Cost { load: load.label(), ratio: median(ratios), least, most })
    };
    results.loads().iter().filter_map(of_load).collect()
}

/// NVMe/TCP costs the targets no more CPU an IO than NBD; a twentieth is what two equal runs differ by.
fn goals(costs: &[Cost]) -> Vec<Goal> {
    let found = costs.iter().map(|cost| cost.ratio).reduce(f64::max);
    let text = "targets' CPU an IO, NVMe by NBD, at the load where it is highest, at most 1.05";
    vec![Goal::new(text, found, |ratio| ratio <= 1.05)]
}

fn notes(costs: &[Cost]) -> String {
    let line = |cost: &Cost| {
        format!("| {} | {:.2} | {:.2} to {:.2} |\n", cost.load, cost.ratio, cost.least, cost.most)
    };
    let rows: String = costs.iter().map(line).collect();
    format!(
        "Server CPU is that of the targets, without the MDS. The goal is judged by the medians of the rounds' ratios:\n\n\
         | load | NVMe by NBD, server us/IO | rounds |\n| --- | ---: | ---: |\n{rows}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_is_compared_round_by_round_and_the_worst_load_decides() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), include_str!("../testdata/result-1.json")).expect("written");
        let mut results = Results::read(file.path()).expect("a fixture");
        let run = results.runs[0].clone();
        results.runs.clear();
        // The machine becomes three times slower; one round of one load is disturbed.
        for (depth, round, nvme, nbd) in [
            (1, 0, 11.0, 10.0),
            (1, 1, 33.0, 30.0),
            (1, 2, 200.0, 40.0),
            (32, 0, 9.0, 10.0),
            (32, 1, 27.0, 30.0),
        ] {
            for (subject, cost) in [("nvme", nvme), ("nbd", nbd)] {
                let mut run = run.clone();
                (run.subject, run.round, run.load.depth) = (subject.into(), round, depth);
                run.processes = vec![run.processes[0].clone(); 2];
                run.processes[1].cpu_us_per_io = cost;
                results.runs.push(run);
            }
        }
        let costs = costs(&results);
        let found: Vec<_> = costs.iter().map(|c| (c.ratio * 100.0).round()).collect();
        assert_eq!(found, [110.0, 90.0]);
        let goal = &goals(&costs)[0];
        assert!(!goal.met && goal.found == Some(costs[0].ratio), "{goal:?}");
        assert!(notes(&costs).contains("| 1.10 | 1.10 to 5.00 |"), "{}", notes(&costs));
    }
}
