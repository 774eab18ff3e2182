//! `ashlar bench first`: 4 KiB random IO on the raw disk, on a replicated volume over NBD, and on qemu-nbd, by fio.
//!
//! Invariants: one run, one disk, one client at a time; every subject is fully written before it is measured.

use crate::ClusterArgs;
use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::environment::Environment;
use crate::fio::Fio;
use crate::report::{Goal, Report};
use crate::rival::{Rival, Server};
use crate::run::load::Load;
use crate::run::measure::{Client, Plan, Subject, prepare};
use crate::run::measured;
use crate::run::summary::{self, Row, find};
use crate::run::target::Target;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const RAW: &str = "raw file";
const ON_VOLUME: &str = "volume, 3 replicas";

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

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &FirstArgs) -> anyhow::Result<ExitCode> {
    let qemu_version = Server::QemuNbd.version();
    if qemu_version.is_none() {
        eprintln!("note: nothing is compared with qemu-nbd: {}", Server::QemuNbd.missing());
    }
    let cluster = Cluster::open(&args.cluster)?;
    let report = measure(args, &cluster, qemu_version)?;
    cluster.close()?;
    report.publish(&args.cluster, "first", args.write_markdown.as_deref())
}

fn measure(args: &FirstArgs, cluster: &Cluster, qemu_version: Option<String>) -> anyhow::Result<Report> {
    let (size, scratch) = (args.cluster.size, cluster.scratch.path());
    let file = cluster.file()?;
    ensure_size(file.volume(VOLUME)?, size)?;
    let (target, pids) = (Target::of_dev("nbd+unix", &file)?, file.pids());
    let volume = Subject { name: ON_VOLUME.into(), target, pids, flushes: true };
    let mut subjects = vec![Subject::file(RAW, &scratch.join("raw.raw")), volume];
    subjects.iter().try_for_each(|subject| prepare(subject, size))?;
    let server = match &qemu_version {
        Some(_) => Some(Rival::serve(Server::QemuNbd, scratch, size)?),
        None => None,
    };
    subjects.extend(server.iter().map(Rival::subject));
    wait_settled(&file);
    let fio = Fio::probe(&scratch.join("fio"), subjects.iter().map(|subject| &subject.target))?;
    let environment = Environment::read(scratch, fio.version.clone(), qemu_version.unwrap_or_default());
    // Reads come first: they find the volume at rest, and writes then start from the same state in every round.
    let loads = [100, 0].map(|reads| [1, 32].map(|depth| Load::random_4k(reads, depth, size))).concat();
    let (client, rounds) = (Client::Fio(fio), args.rounds);
    let seconds = args.seconds.into();
    let plan = Plan::new(&client, &subjects, &loads, seconds, rounds);
    let results = measured(&plan, environment)?;
    let rows = summary::rows(&results);
    let goals = goals(&rows, size);
    Ok(Report {
        title: "First benchmark",
        command: "ashlar bench first --write-markdown",
        about: "4 KiB random IO.".into(),
        bases: vec![RAW, Server::QemuNbd.name()],
        notes: NOTES.into(),
        rows,
        goals,
        results,
    })
}

const NOTES: &str = "Notes: the raw file is written by io_uring with O_DIRECT and O_DSYNC and read with O_DIRECT. A write to the \
volume is acknowledged when a majority of three replicas has synced it, all on this one disk. qemu-nbd runs with \
cache=none and aio=io_uring and syncs only on flush, so its writes promise less. Server CPU counts the MDS and all \
targets for the volume, and the one process for qemu-nbd; the client's share is told beside it.";

fn goals(rows: &[Row], size: u64) -> Vec<Goal> {
    let row = |subject, reads, depth| find(rows, subject, &Load::random_4k(reads, depth, size));
    let read_by = |base| Some(row(ON_VOLUME, 100, 32)?.iops / row(base, 100, 32)?.iops);
    let slower = || Some(row(ON_VOLUME, 0, 1)?.p50_us? / row(RAW, 0, 1)?.p50_us?);
    vec![
        Goal::new("read QD32, IOPS at least 0.65 of raw", read_by(RAW), |found| found >= 0.65),
        Goal::new("read QD32, IOPS at least 1.3 of qemu-nbd", read_by(Server::QemuNbd.name()), |found| {
            found >= 1.3
        }),
        Goal::new("write QD1, p50 at most 3 of raw with O_DSYNC", slower(), |found| found <= 3.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &str, reads: u8, depth: u32, iops: f64) -> Row {
        let nothing = None;
        Row {
            subject: subject.into(),
            load: Load::random_4k(reads, depth, 1 << 30),
            synced: None,
            rounds: 3,
            iops,
            bytes_s: iops * 4096.0,
            p50_us: Some(1e6 / iops),
            p99_us: nothing,
            p999_us: nothing,
            max_us: nothing,
            reads: None,
            writes: None,
            client_us_per_io: nothing,
            server_us_per_io: nothing,
            unserved: 0.0,
            stolen: None,
        }
    }

    #[test]
    fn goals_compare_within_one_load_and_a_missing_rival_is_not_a_pass() {
        let mut rows = vec![row(RAW, 100, 32, 1000.0), row(ON_VOLUME, 100, 32, 710.0)];
        rows.extend([row(RAW, 0, 1, 100.0), row(ON_VOLUME, 0, 1, 30.0), row(ON_VOLUME, 100, 1, 5000.0)]);
        let found = goals(&rows, 1 << 30);
        assert_eq!(found.iter().map(|goal| goal.met).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(found[1].found, None);
        rows.push(row("qemu-nbd", 100, 32, 500.0));
        rows[3].p50_us = Some(25_000.0);
        assert!(goals(&rows, 1 << 30).iter().all(|goal| goal.met));
    }
}
