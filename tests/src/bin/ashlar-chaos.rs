//! Runs one cluster under chaos; see `ashlar_tests::chaos`. Normally started by `cargo xtask chaos`.

use ashlar_tests::chaos::{Options, possible, run};
use ashlar_tests::cluster::{binary, machine_lock, scratch_dir};
use clap::Parser;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A cluster of real processes on failing networks and disks, under real clients.
#[derive(Parser)]
struct Args {
    /// How long faults come, in minutes.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Decides which faults come when; drawn from the clock when not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only faults whose names contain this; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Leave everything behind in this folder, which must not be there yet.
    #[arg(long)]
    keep: Option<std::path::PathBuf>,
}

fn main() -> ExitCode {
    if let Err(why) = possible() {
        println!("chaos: SKIPPED, {why}");
        return ExitCode::SUCCESS;
    }
    match go(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("chaos: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn go(args: &Args) -> anyhow::Result<()> {
    let _lock = machine_lock()?;
    let seed = args
        .seed
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |at| at.as_secs()));
    let scratch = tempfile::Builder::new().prefix("ashlar-chaos-").tempdir_in(scratch_dir())?;
    let dir = args.keep.clone().unwrap_or_else(|| scratch.path().to_owned());
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    println!("chaos: seed {seed}, {} s", length.as_secs());
    let options = Options { seed, length, bin: binary()?, dir, only: args.only.clone() };
    let report = run(&options)?;
    for line in report.skipped.iter().map(|why| format!("SKIPPED {why}")).chain(report.ended) {
        println!("chaos: {line}");
    }
    let faults: Vec<String> = report.faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("chaos: faults: {}", faults.join(", "));
    println!(
        "chaos: seed {seed} passed: {} reads and {} writes of registers, the longest {} ms; {} operations \
         judged linearizable; fio verified; replicas equal",
        report.registers.0, report.registers.1, report.longest_ms, report.judged
    );
    Ok(())
}
