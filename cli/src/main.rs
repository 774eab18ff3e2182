//! The one `ashlar` binary: every process of a cluster and every command of its operator.
//!
//! Each group of commands is one module that parses its part, asks the cluster or runs the
//! process, prints, and answers with an [`Exit`] or a [`Problem`]. Deliberately absent:
//! anything a cluster does; that lives in the libraries beneath.

mod cluster;
mod copyset;
mod daemon;
mod dev;
mod disk;
mod export;
mod mds;
mod output;
mod pool;
mod problem;
mod size;
mod status;
mod target;
mod volume;

use clap::{Parser, Subcommand};
use problem::{Exit, Outcome, Problem};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "ashlar",
    version,
    about = "Replicated block volumes on stock Linux",
    after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 a check or a regression failed.\n\
                  Start here: ashlar dev"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on this machine: an MDS, three targets, a volume to use.
    Dev(dev::DevArgs),
    /// The storage daemon, and the cluster's targets.
    #[command(subcommand)]
    Target(target::TargetCommand),
    /// The metadata server.
    #[command(subcommand)]
    Mds(mds::MdsCommand),
    /// Volumes: create, list, show, remove, check.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Pools: groups of copysets with the same number of replicas.
    #[command(subcommand)]
    Pool(pool::PoolCommand),
    /// Copysets: where replicas are, and who leads.
    #[command(subcommand)]
    Copyset(copyset::CopysetCommand),
    /// Which volumes are offered to hosts, and how.
    #[command(subcommand)]
    Export(export::ExportCommand),
    /// The cluster at a glance.
    Status(status::StatusArgs),
    /// What lies on a disk.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Measure, compare, keep results.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Make this machine ready for a target, see what it lacks, put it back as it was.
    #[command(subcommand)]
    Tune(tuning::TuneCommand),
}

fn main() -> ExitCode {
    // Clap itself exits with 2 when a command makes no sense.
    run(Cli::parse().command).unwrap_or_else(|problem| {
        eprintln!("ashlar: {problem}");
        problem.exit().into()
    })
}

fn run(command: Command) -> Result<ExitCode, Problem> {
    let exit = match command {
        Command::Dev(args) => block_on(dev::run(args))?,
        Command::Target(command) => target::run(command)?,
        Command::Mds(command) => mds::run(command)?,
        Command::Volume(command) => block_on(volume::run(command))?,
        Command::Pool(command) => block_on(pool::run(command))?,
        Command::Copyset(command) => block_on(copyset::run(command))?,
        Command::Export(command) => block_on(export::run(command))?,
        Command::Status(args) => block_on(status::run(args))?,
        Command::Disk(command) => disk::run(command)?,
        Command::Bench(command) => return Ok(bench::run(command)?),
        Command::Tune(command) => tune(command)?,
    };
    Ok(exit.into())
}

fn tune(command: tuning::TuneCommand) -> Outcome {
    Ok(match tuning::run(command)? {
        tuning::Exit::Ok => Exit::Ok,
        tuning::Exit::CheckFailed => Exit::CheckFailed,
    })
}

fn block_on(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Problem::io("cannot start"))?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_as_the_documents_write_them() {
        for line in [
            "dev",
            "dev --dir d --targets 3 --size 4G --block-size 512 --advertise 10.0.2.2 --no-restart --shards 1",
            "mds run --listen 127.0.0.1:7000 --dir d",
            "mds run --store etcd://a:2379,b:2379,c:2379/prod --advertise a:7400 --metrics 127.0.0.1:7480",
            "mds snapshot f --mds a:7400,b:7400 -o json",
            "mds restore f --dir d",
            "mds restore f --store etcd://a:2379 --yes -o json",
            "target check --config target.toml",
            "target ls -o json",
            "target show 2 --mds 127.0.0.1:7000",
            "target drain 2",
            "target undrain 2 --dir d",
            "volume create v --size 10G --block-size 512 -o json",
            "volume ls --mds 127.0.0.1:7000",
            "volume show v --dir d",
            "volume rm v",
            "volume rm v --keep 48",
            "volume rm v --purge --yes",
            "volume undelete v --as w",
            "volume rename v w -o json",
            "target rm 4 --yes",
            "pool ls",
            "pool durability --targets 60 --held 4T --failures 3",
            "pool create p --replicas 2 --copysets 6 --targets 1,2,3",
            "copyset ls --unwell -o json",
            "copyset show 3",
            "copyset transfer-leader 3 --to 2",
            "volume check v -o json --dir d",
            "export add v",
            "export ls -o json",
            "export rm v",
            "status --dir d -o json",
            "disk inspect d -o json",
            "tune check -o json",
            "tune apply scheduler --profile throughput --dry-run",
            "tune undo -o json",
            "tune probe d --size 64M",
        ] {
            let words = std::iter::once("ashlar").chain(line.split(' '));
            if let Err(refusal) = Cli::try_parse_from(words) {
                panic!("ashlar {line}: {refusal}");
            }
        }
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in [
            "",
            "mds run",
            "mds restore f",
            "volume",
            "volume create v",
            "dev --size 4X",
            "dev --targets 0",
            "dev --block-size 1000",
        ] {
            let words = std::iter::once("ashlar").chain(line.split_whitespace());
            let refusal =
                Cli::try_parse_from(words).err().unwrap_or_else(|| panic!("ashlar {line} was taken"));
            assert_eq!(refusal.exit_code(), 2, "ashlar {line}");
        }
    }
}
