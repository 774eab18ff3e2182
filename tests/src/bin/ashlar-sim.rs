//! Runs seeds of the simulator; see `ashlar_tests::sim`. Normally started by `cargo xtask sim`.

use ashlar_tests::sim::{self, Mix, Report};
use clap::Parser;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Run the production code of whole clusters under simulated faults, one cluster a seed.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Only this seed, with a trace on stderr (RUST_LOG chooses what of it; default info).
    #[arg(long)]
    seed: Option<u64>,
    /// Seeds at once.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// The family of runs.
    #[arg(long, default_value = "swarm", value_parser = sim::FAMILIES)]
    family: String,
    /// With --seed: make the failing run simpler, step by step, as long as it fails.
    #[arg(long, requires = "seed")]
    shrink: bool,
    /// Go on after a failing seed.
    #[arg(long)]
    keep_going: bool,
    /// Tell of each seed its trace, its turns and how long it took.
    #[arg(long)]
    each: bool,
}

struct Virtual;

impl FormatTime for Virtual {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        let (now, node) = sim::virtual_now();
        write!(w, "{:>14.6} node {node}", now as f64 / 1e6)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.seed.filter(|_| args.shrink) {
        return shrink(seed, mix(&args, seed));
    }
    if let Some(seed) = args.seed {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env();
        tracing_subscriber::fmt()
            .with_env_filter(filter.unwrap_or_else(|_| "info".into()))
            .with_timer(Virtual)
            .with_writer(std::io::stderr)
            .init();
        eprintln!("{:#?}", mix(&args, seed));
        return match run_one(seed, &mix(&args, seed)) {
            Ok(report) => {
                println!("seed {seed} passed: {report:#?}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                println!("seed {seed} FAILED: {why}");
                ExitCode::FAILURE
            }
        };
    }
    let failed = run_many(&args);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn mix(args: &Args, seed: u64) -> Mix {
    Mix::of_family(&args.family, seed).expect("the parser knows the families")
}

/// Leaves out whatever the failure does not need.
fn shrink(seed: u64, mut mix: Mix) -> ExitCode {
    let Err(why) = run_one(seed, &mix) else {
        println!("seed {seed} passed: nothing to shrink");
        return ExitCode::SUCCESS;
    };
    let checker = |why: &str| why.split(':').next().map(str::to_owned);
    println!("seed {seed} FAILED: {}", why.lines().next().unwrap_or_default());
    let mut last = why.clone();
    for (name, simpler) in sim::SIMPLER {
        let mut simpler_mix = mix.clone();
        simpler(&mut simpler_mix);
        match run_one(seed, &simpler_mix) {
            Err(again) if checker(&again) == checker(&why) => {
                println!("  still fails: {name}");
                (mix, last) = (simpler_mix, again);
            }
            _ => println!("  needed: {name} is not so"),
        }
    }
    println!("{mix:#?}\n{last}");
    ExitCode::FAILURE
}

fn run_one(seed: u64, mix: &Mix) -> Result<Report, String> {
    let run = AssertUnwindSafe(|| sim::run(seed, mix));
    match catch_unwind(run) {
        Ok(result) => result.map_err(|failure| failure.0),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}

fn run_many(args: &Args) -> usize {
    let (next, stop) = (AtomicU64::new(args.from), AtomicBool::new(false));
    let totals: Mutex<(u64, Report)> = Mutex::default();
    let failures: Mutex<Vec<u64>> = Mutex::default();
    let begun = Instant::now();
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= args.from + args.seeds {
                return;
            }
            let started = Instant::now();
            match run_one(seed, &mix(args, seed)) {
                Ok(report) => {
                    if args.each {
                        println!(
                            "seed {seed}: trace {:016x}, {} turns, {} requests, {:.1} simulated s in {:.2} s",
                            report.trace,
                            report.turns,
                            report.acknowledged,
                            report.span.0 as f64 / 1e9,
                            started.elapsed().as_secs_f64()
                        );
                    }
                    let mut totals = totals.lock().expect("no panic holds it");
                    totals.0 += 1;
                    if totals.0.is_multiple_of(10) {
                        println!("{} seeds passed after {:.0} s", totals.0, begun.elapsed().as_secs_f64());
                    }
                    totals.1 += report;
                }
                Err(why) => {
                    println!(
                        "seed {seed} FAILED: {why}\n  replay: cargo xtask sim --family {} --seed {seed}",
                        args.family
                    );
                    failures.lock().expect("no panic holds it").push(seed);
                    stop.fetch_or(!args.keep_going, Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(work);
        }
    });
    let (passed, total) = *totals.lock().expect("no panic holds it");
    let failures = failures.into_inner().expect("no panic holds it");
    let took = begun.elapsed().as_secs_f64();
    let simulated = total.span.0 as f64 / 1e9;
    println!("{:?}\n{:?}\n{:?}", total.faults, total.shards, total.mds);
    println!(
        "{passed} seeds passed, {} failed {failures:?}: {} turns, {:.2} simulated hours in {took:.0} s ({:.0} times real time), {} requests answered, {} of unknown fate, {} errors, {} doubles",
        failures.len(),
        total.turns,
        simulated / 3600.0,
        simulated / took,
        total.acknowledged,
        total.unknown,
        total.errors,
        total.doubles,
    );
    failures.len()
}
