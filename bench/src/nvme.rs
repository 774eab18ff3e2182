//! `ashlar bench nvme`: the same load on one volume through NVMe/TCP and through NBD, both over TCP on loopback.
//!
//! Invariants: one run, one volume, one connection at a time to the same target; rounds alternate, and each starts with
//! the other protocol.

use crate::dev::{DevFile, DevVolume};
use crate::environment::Environment;
use crate::first::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::report::{Goal, goal_lines, keep, median};
use crate::wire::{Client, DEPTH_MAX, Load, WRITE_BYTES_MAX};
use crate::{ClusterArgs, EXIT_CHECK_FAILED, Output, process};
use anyhow::{Context, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
    /// IOs in flight, one measurement each. The NVMe queue takes 127.
    #[arg(long, value_delimiter = ',', default_value = "1,32,127", value_parser = depth)]
    pub depths: Vec<usize>,
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

fn depth(text: &str) -> Result<usize, String> {
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

/// One measurement, or the medians of several.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which way.
    pub direction: Direction,
    /// IOs in flight.
    pub depth: usize,
    /// How attached.
    pub protocol: Protocol,
    /// IOs a second.
    pub iops: f64,
    /// Median latency.
    pub p50_us: f64,
    /// Of a hundred, one takes longer.
    pub p99_us: f64,
    /// CPU of all targets.
    pub target_cpu_us_per_io: f64,
    /// CPU of this client.
    pub client_cpu_us_per_io: f64,
}

/// The whole result.
#[derive(Debug, Serialize)]
pub struct NvmeReport {
    /// Where.
    pub environment: Environment,
    /// Bytes of the volume that were touched.
    pub size_bytes: u64,
    /// Of each measurement.
    pub seconds: u32,
    /// How many.
    pub rounds: u32,
    /// Medians.
    pub rows: Vec<Row>,
    /// What was hoped for.
    pub goals: Vec<Goal>,
    /// Every measurement.
    pub runs: Vec<Row>,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &NvmeArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(&args.cluster)?;
    let environment = Environment::read(cluster.scratch.path(), String::new(), String::new());
    if environment.debug_build {
        eprintln!("note: this is a debug build; its figures mean little, use cargo run --release");
    }
    let file = cluster.file()?;
    let runs = measure(args, &file)?;
    cluster.close()?;
    let rows = medians(&runs);
    let goals = goals(&rows);
    let NvmeArgs { seconds, rounds, .. } = *args;
    let report =
        NvmeReport { environment, size_bytes: args.cluster.size, seconds, rounds, rows, goals, runs };
    publish(args, &report)
}

fn measure(args: &NvmeArgs, file: &DevFile) -> anyhow::Result<Vec<Row>> {
    let volume = file.volume(VOLUME)?;
    ensure_size(volume, args.cluster.size)?;
    eprintln!("filling {VOLUME}, {} MiB", args.cluster.size >> 20);
    let (bytes, depth, size) = (WRITE_BYTES_MAX, 32, args.cluster.size);
    let fill = Load { write: true, sequential: true, bytes, depth, size, time: Duration::ZERO };
    attach(volume, Protocol::Nvme)?.run(&fill, 1)?;
    wait_settled(file);
    let mut runs = Vec::new();
    let wanted = |direction: &&Direction| args.only.is_none_or(|only| only == **direction);
    for direction in [Direction::Read, Direction::Write].iter().filter(wanted) {
        for depth in &args.depths {
            for round in 0..args.rounds {
                let both = [Protocol::Nvme, Protocol::Nbd];
                for at in 0..both.len() {
                    let protocol = both[(at + round as usize) % both.len()];
                    if args.through.is_none_or(|through| through == protocol) {
                        runs.push(one(args, file, volume, protocol, *direction, *depth)?);
                    }
                }
            }
        }
    }
    Ok(runs)
}

fn attach(volume: &DevVolume, protocol: Protocol) -> anyhow::Result<Client> {
    match protocol {
        Protocol::Nvme => {
            let path = volume.nvme.first().with_context(|| format!("{VOLUME} is not exported over NVMe"))?;
            Client::nvme(&format!("{}:{}", path.traddr, path.trsvcid), &path.nqn, volume.block_bytes)
        }
        Protocol::Nbd => {
            let uri = volume.nbd.first().with_context(|| format!("{VOLUME} is not exported over NBD"))?;
            let place = uri.strip_prefix("nbd://").and_then(|rest| rest.split_once('/'));
            let (address, export) = place.with_context(|| format!("{uri} is no NBD URI"))?;
            Client::nbd(address, export)
        }
    }
}

fn one(
    args: &NvmeArgs,
    file: &DevFile,
    volume: &DevVolume,
    protocol: Protocol,
    direction: Direction,
    depth: usize,
) -> anyhow::Result<Row> {
    let mut client = attach(volume, protocol)?;
    let load = Load {
        write: direction == Direction::Write,
        sequential: false,
        bytes: 4096,
        depth,
        size: args.cluster.size,
        time: Duration::from_millis(300),
    };
    // The first IOs find leaders and fill pools.
    client.run(&load, 2)?;
    let pids: Vec<i32> = file.targets.iter().map(|target| target.pid).collect();
    let (targets, own) = (process::cpu_seconds_sum(&pids), process::cpu_seconds(std::process::id() as i32)?);
    let time = Duration::from_secs(args.seconds.into());
    let done = client.run(&Load { time, ..load }, 3)?;
    let per_io = |seconds: f64| seconds * 1e6 / done.ios.max(1) as f64;
    ensure!(done.ios > 0, "nothing was answered within {time:?}");
    let percentile = |of: f64| done.latencies_ns[((done.ios - 1) as f64 * of) as usize] as f64 / 1e3;
    let row = Row {
        direction,
        depth,
        protocol,
        iops: done.ios as f64 / done.took.as_secs_f64(),
        p50_us: percentile(0.5),
        p99_us: percentile(0.99),
        target_cpu_us_per_io: per_io(process::cpu_seconds_sum(&pids) - targets),
        client_cpu_us_per_io: per_io(process::cpu_seconds(std::process::id() as i32)? - own),
    };
    eprintln!(
        "{direction:?} QD{depth} {protocol:?}: {:.0} IOPS, targets {:.1} us/IO",
        row.iops, row.target_cpu_us_per_io
    );
    if load.write {
        // What is still flushed must not be counted for the next one.
        process::settle(&pids, Duration::from_secs(10));
    }
    Ok(row)
}

/// One row for each load and protocol, in the order measured.
fn medians(runs: &[Row]) -> Vec<Row> {
    let same = |a: &Row, b: &Row| (a.direction, a.depth, a.protocol) == (b.direction, b.depth, b.protocol);
    let mut rows: Vec<Row> = Vec::new();
    for run in runs {
        if rows.iter().any(|row| same(row, run)) {
            continue;
        }
        let of = |value: fn(&Row) -> f64| median(runs.iter().filter(|other| same(other, run)).map(value));
        rows.push(Row {
            iops: of(|r| r.iops),
            p50_us: of(|r| r.p50_us),
            p99_us: of(|r| r.p99_us),
            target_cpu_us_per_io: of(|r| r.target_cpu_us_per_io),
            client_cpu_us_per_io: of(|r| r.client_cpu_us_per_io),
            ..run.clone()
        });
    }
    rows
}

/// NVMe/TCP costs the targets no more CPU an IO than NBD; a twentieth is what two equal runs differ by.
fn goals(rows: &[Row]) -> Vec<Goal> {
    let ratio = |nvme: &Row| {
        let same = |row: &&Row| (row.direction, row.depth) == (nvme.direction, nvme.depth);
        let nbd = rows.iter().filter(|row| row.protocol == Protocol::Nbd).find(same)?;
        Some(nvme.target_cpu_us_per_io / nbd.target_cpu_us_per_io)
    };
    let found = rows.iter().filter(|row| row.protocol == Protocol::Nvme).filter_map(ratio).reduce(f64::max);
    let text = "targets' CPU an IO, NVMe by NBD, at the load where it is highest, at most 1.05";
    vec![Goal { text, found, met: found.is_some_and(|ratio| ratio <= 1.05) }]
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Read => "randread",
        Direction::Write => "randwrite",
    }
}

impl NvmeReport {
    fn setting(&self) -> String {
        format!(
            "4 KiB random IO over {} MiB of one volume with 3 replicas, one connection over TCP on loopback to one \
             target, {} s a measurement, medians of {} alternating rounds.",
            self.size_bytes >> 20,
            self.seconds,
            self.rounds
        )
    }
    fn table(&self, preset: &str) -> Table {
        let mut table = Table::new();
        table.load_preset(preset);
        table.set_header([
            "load",
            "protocol",
            "IOPS",
            "p50 us",
            "p99 us",
            "targets' CPU us/IO",
            "client's CPU us/IO",
        ]);
        for row in &self.rows {
            table.add_row([
                format!("{} QD{}", word(row.direction), row.depth),
                format!("{:?}", row.protocol),
                format!("{:.0}", row.iops),
                format!("{:.0}", row.p50_us),
                format!("{:.0}", row.p99_us),
                format!("{:.1}", row.target_cpu_us_per_io),
                format!("{:.1}", row.client_cpu_us_per_io),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
    fn page(&self) -> String {
        format!(
            "# NVMe/TCP and NBD\n\nWritten by `ashlar bench nvme --write-markdown`; do not edit figures by hand.\n\n{}\n\n{}\n\n{}\n\n{}\n",
            self.environment.line(),
            self.setting(),
            self.table(presets::ASCII_MARKDOWN),
            goal_lines(&self.goals, "- "),
        )
    }
}

fn publish(args: &NvmeArgs, report: &NvmeReport) -> anyhow::Result<ExitCode> {
    let kept = keep(&args.cluster.results, "nvme", &report.environment.time, report)?;
    match args.cluster.output {
        Output::Text => println!(
            "{}\n{}\n{}\n{}",
            report.environment.line(),
            report.setting(),
            report.table(presets::UTF8_FULL_CONDENSED),
            goal_lines(&report.goals, "")
        ),
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
    }
    eprintln!("kept in {}", kept.display());
    if let Some(path) = &args.write_markdown {
        std::fs::write(path, report.page())
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    let failed = args.cluster.check && !report.goals.iter().all(|goal| goal.met);
    Ok(if failed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS })
}
