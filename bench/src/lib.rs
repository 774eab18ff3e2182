//! The harness behind `ashlar bench`: it measures a running dev cluster with fio, beside the raw disk and qemu-nbd.
//!
//! Invariants: every subject of a comparison is measured in one run, on one disk, in alternating rounds, and the
//! medians are printed; a subject is fully written before it is read; no figure is ever typed by hand, since the
//! table, the JSON and the Markdown page all come from the same [`run::summary`].
//!
//! There are two clients: fio, which knows nothing of Ashlar, and our own in [`run`], on the reactor, which speaks
//! NVMe/TCP and the native protocol, has an open loop, and counts what fio cannot.

pub mod bare;
pub mod ceph;
pub mod cluster;
pub mod dev;
pub mod environment;
pub mod fio;
pub mod first;
pub mod goals;
pub mod idle;
pub mod metrics;
pub mod micro;
pub mod model;
pub mod nvme;
pub mod peers;
pub mod process;
pub mod report;
pub mod rival;
pub mod run;
pub mod steal;

use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

/// The exit code of a check that ran and failed, such as a missed goal under `--check`.
pub const EXIT_CHECK_FAILED: u8 = 3;

/// What `ashlar bench` can measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// 4 KiB random IO on the raw disk, on a volume over NBD and on qemu-nbd, in one run.
    First(first::FirstArgs),
    /// 4 KiB random IO on one volume through NVMe/TCP and through NBD, in one run.
    Nvme(nvme::NvmeArgs),
    /// One workload against files, exports and volumes, in alternating rounds, by our own client.
    Run(run::RunArgs),
    /// The same by stock fio, with job files to run again.
    Fio(run::FioArgs),
    /// Every combination of sizes, depths, mixes and jobs.
    Sweep(run::sweep::SweepArgs),
    /// Rounds until a target is in its steady state, as SNIA has it.
    Steady(run::steady::SteadyArgs),
    /// The same workload on what a user would pick instead, with what each of them promises.
    Peers(peers::PeersArgs),
    /// Every target of the project that this machine can show, in one run.
    Goals(goals::GoalsArgs),
    /// A server that does nothing but IO: what any server in front of a file costs here.
    Bare(bare::BareArgs),
    /// Single steps of the data path, by the criterion benches of the source tree.
    Micro(micro::MicroArgs),
    /// What more cores and targets would give, from what `bench micro` and `bench goals` measured.
    Model(model::ModelArgs),
    /// Ratios of what `bench run` kept; exit code 3 when something got slower.
    Compare(run::compare::CompareArgs),
    /// Run a baseline's workload again, and compare; exit code 3 when something got slower.
    Ci(run::compare::CiArgs),
    /// CPU of each process while nothing happens, and memory while it is busy.
    Idle(idle::IdleArgs),
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table for people.
    #[default]
    Text,
    /// The whole report with environment and fio's own output, for programs.
    Json,
}

/// Which cluster is measured and where the scratch files lie.
#[derive(Debug, Args)]
pub struct ClusterArgs {
    /// Directory of a running dev cluster; without it, one is started for the run and removed afterwards.
    #[arg(long, value_name = "D")]
    pub dir: Option<PathBuf>,
    /// Where a cluster of our own and the raw files go; it must be a real disk. Default: beside --dir, or /var/tmp.
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Bytes of the volume, and of each raw file, that are measured.
    #[arg(long, default_value = "1G", value_parser = parse_bytes)]
    pub size: u64,
    /// How results are printed.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
    /// Directory that keeps the JSON of each run.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    pub results: PathBuf,
    /// Exit with code 3 when a goal is missed.
    #[arg(long)]
    pub check: bool,
}

/// Runs a benchmark and prints its result.
///
/// # Errors
/// A missing tool, a cluster that cannot be reached or started, or a client that failed; the message names the fix.
pub fn run(command: BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::First(args) => first::run(&args),
        BenchCommand::Nvme(args) => nvme::run(&args),
        BenchCommand::Run(args) => run::run(&args),
        BenchCommand::Fio(args) => run::fio(&args),
        BenchCommand::Sweep(args) => run::sweep::run(&args),
        BenchCommand::Steady(args) => run::steady::run(&args),
        BenchCommand::Peers(args) => peers::run(&args),
        BenchCommand::Goals(args) => goals::run(&args),
        BenchCommand::Bare(args) => bare::run(&args),
        BenchCommand::Micro(args) => micro::run(&args),
        BenchCommand::Model(args) => model::run(&args),
        BenchCommand::Compare(args) => run::compare::run(&args),
        BenchCommand::Ci(args) => run::compare::ci(&args),
        BenchCommand::Idle(args) => idle::run(&args),
    }
}

/// Reads a size such as `1G`, `512M`, `64KiB` or `4096`; the units are powers of 1,024.
///
/// # Errors
/// A text that is not a number with a known unit, zero, or a size past 2^64.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let hint = || format!("`{text}` is not a size: write a number with K, M, G or T, as in 512M");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B').to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(hint()),
    };
    let number: u64 = number.parse().map_err(|_| hint())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(hint)?;
    if bytes == 0 { Err(hint()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{FromArgMatches, Subcommand};

    #[test]
    fn sizes_are_binary_and_wrong_ones_are_refused() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("64KiB"), Ok(64 << 10));
        assert_eq!(parse_bytes("512m"), Ok(512 << 20));
        assert_eq!(parse_bytes("1G"), Ok(1 << 30));
        for wrong in ["", "0", "G", "1.5G", "-1", "1X", "99999999999999999999", "18446744073709551615K"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_holds_together() {
        let command = BenchCommand::augment_subcommands(clap::Command::new("bench"));
        command.clone().debug_assert();
        let matches =
            command.get_matches_from(["bench", "first", "--size", "64M", "--rounds", "1", "-o", "json"]);
        let parsed = BenchCommand::from_arg_matches(&matches);
        assert!(matches!(parsed, Ok(BenchCommand::First(args)) if args.cluster.size == 64 << 20));
    }
}
