//! `ashlar bench idle`: what a dev cluster costs at rest in CPU, and under load in memory.
//!
//! Invariants: the cluster has served IO and settled before it counts as idle, so that hibernation and sleeping are
//! measured, not a process that never did anything.

use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::dev::DevFile;
use crate::environment::Environment;
use crate::fio::Fio;
use crate::report::{Goal, exit_code, goal_lines, keep};
use crate::run::job::Times;
use crate::run::load::{Load, Sizes};
use crate::run::measure::Subject;
use crate::{ClusterArgs, Output, process};
use clap::Args;
use comfy_table::{Table, presets};
use serde::Serialize;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Arguments of `ashlar bench idle`.
#[derive(Debug, Args)]
pub struct IdleArgs {
    /// The cluster and where results go.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Seconds at rest, and seconds of each load.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
}

/// What one process cost.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessCost {
    /// "mds" or "target 1".
    pub name: String,
    /// Share of one core at rest, in percent.
    pub idle_cpu_percent: f64,
    /// Resident memory at rest.
    pub idle_rss_bytes: u64,
    /// Most resident memory that was seen under load.
    pub load_rss_bytes_max: u64,
}

/// The whole result of `ashlar bench idle`.
#[derive(Clone, Debug, Serialize)]
pub struct IdleReport {
    /// Where it ran.
    pub environment: Environment,
    /// Length of the rest and of each load.
    pub seconds: u32,
    /// The processes.
    pub processes: Vec<ProcessCost>,
    /// The goals.
    pub goals: Vec<Goal>,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &IdleArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(&args.cluster)?;
    let file = cluster.file()?;
    let volume = file.volume(VOLUME)?;
    ensure_size(volume, args.cluster.size)?;
    let exports = exports(&volume.nbd_unix)?;
    let fio = Fio::probe(&cluster.scratch.path().join("fio"), exports.iter().map(|subject| &subject.target))?;
    let environment = Environment::read(cluster.scratch.path(), fio.version.clone(), String::new());
    // A short load first, so that connections and leaders exist and there is something to come to rest from.
    fio.measure(&exports[0], &loads(args)[0], times(1), 0)?;
    wait_settled(&file);
    let mut processes = at_rest(&file, Duration::from_secs(u64::from(args.seconds)))?;
    under_load(&file, &mut processes, || {
        for export in &exports {
            for load in loads(args) {
                fio.measure(export, &load, times(args.seconds), 0)?;
            }
        }
        Ok(())
    })?;
    cluster.close()?;
    let goals = goals(&processes);
    publish(args, &IdleReport { environment, seconds: args.seconds, processes, goals })
}

fn times(seconds: u32) -> Times {
    Times { warm_up: Duration::ZERO, measured: Duration::from_secs(seconds.into()) }
}

/// Each target's export.
fn exports(uris: &[String]) -> anyhow::Result<Vec<Subject>> {
    let subject = |(nth, uri): (usize, &String)| {
        Ok(Subject {
            name: format!("target-{}", nth + 1),
            target: uri.parse()?,
            pids: Vec::new(),
            flushes: false,
        })
    };
    uris.iter().enumerate().map(subject).collect()
}

/// Small and large IO.
fn loads(args: &IdleArgs) -> [Load; 2] {
    let small = Load::random_4k(0, 128, args.cluster.size);
    [small.clone(), Load { read_percent: 50, sizes: Sizes(vec![(1 << 20, 1.0)]), depth: 32, ..small }]
}

fn at_rest(file: &DevFile, rest: Duration) -> anyhow::Result<Vec<ProcessCost>> {
    let pids = file.pids();
    let before = pids.iter().map(|pid| process::cpu_seconds(*pid)).collect::<anyhow::Result<Vec<_>>>()?;
    let started = Instant::now();
    std::thread::sleep(rest);
    let seconds = started.elapsed().as_secs_f64();
    let cost = |(at, pid): (usize, &i32)| {
        let idle_cpu_percent = (process::cpu_seconds(*pid)? - before[at]) / seconds * 100.0;
        let name = if at == 0 { "mds".to_owned() } else { format!("target {at}") };
        let idle_rss_bytes = process::rss_bytes(*pid)?;
        Ok(ProcessCost { name, idle_cpu_percent, idle_rss_bytes, load_rss_bytes_max: idle_rss_bytes })
    };
    pids.iter().enumerate().map(cost).collect()
}

fn under_load(
    file: &DevFile,
    processes: &mut [ProcessCost],
    load: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (pids, done) = (file.pids(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut most = vec![0; pids.len()];
            while !done.load(Ordering::Relaxed) {
                for (most, pid) in most.iter_mut().zip(&pids) {
                    *most = process::rss_bytes(*pid).unwrap_or(0).max(*most);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            most
        });
        let ran = load();
        done.store(true, Ordering::Relaxed);
        let most = sampler.join().map_err(|_| anyhow::anyhow!("the sampler of memory panicked"))?;
        for (process, most) in processes.iter_mut().zip(most) {
            process.load_rss_bytes_max = process.load_rss_bytes_max.max(most);
        }
        ran
    })
}

fn goals(processes: &[ProcessCost]) -> Vec<Goal> {
    let most = |value: fn(&ProcessCost) -> f64| processes.iter().skip(1).map(value).max_by(f64::total_cmp);
    let cpu = most(|process| process.idle_cpu_percent);
    let rss = most(|process| mib(process.load_rss_bytes_max));
    vec![
        Goal::new("idle CPU of each target under 2 % of a core", cpu, |cpu| cpu < 2.0),
        Goal::new("RSS of each target under load below 300 MiB", rss, |rss| rss < 300.0),
    ]
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

fn publish(args: &IdleArgs, report: &IdleReport) -> anyhow::Result<ExitCode> {
    let kept = keep(&args.cluster.results, "idle", &report.environment.time, report)?;
    match args.cluster.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
        Output::Text => {
            println!("{}\n{}\n\n{}", report.environment.line(), table(report), goal_lines(&report.goals, ""))
        }
    }
    eprintln!("kept in {}", kept.display());
    Ok(exit_code(args.cluster.check, &report.goals))
}

fn table(report: &IdleReport) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["process", "idle CPU %", "idle RSS MiB", "RSS under load MiB"]);
    for process in &report.processes {
        table.add_row([
            process.name.clone(),
            format!("{:.2}", process.idle_cpu_percent),
            format!("{:.0}", mib(process.idle_rss_bytes)),
            format!("{:.0}", mib(process.load_rss_bytes_max)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mds_does_not_count_towards_the_targets_goals() {
        let cost = |name: &str, cpu, rss| ProcessCost {
            name: name.to_owned(),
            idle_cpu_percent: cpu,
            idle_rss_bytes: 0,
            load_rss_bytes_max: rss,
        };
        let met =
            |processes: &[ProcessCost]| goals(processes).iter().map(|goal| goal.met).collect::<Vec<_>>();
        assert_eq!(met(&[cost("mds", 50.0, 1 << 40), cost("target 1", 1.9, 299 << 20)]), [true, true]);
        assert_eq!(
            met(&[cost("mds", 0.0, 0), cost("target 1", 0.1, 0), cost("target 2", 2.0, 300 << 20)]),
            [false, false]
        );
        assert_eq!(met(&[cost("mds", 0.0, 0)]), [false, false]);
    }
}
