//! The developer's commands, run as `cargo xtask COMMAND`.
//!
//! `test` is the whole check: what CI runs is what a developer runs. Deliberately absent:
//! anything that a plain `cargo` command already does well.

mod arrows;
mod fuzz;
mod mutants;
mod packages;
mod steps;
mod tidy;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Ashlar's developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that must hold: format, lints, arrows, tests, real clients. Sets up what it needs.
    Test(steps::TestArgs),
    /// What CI runs: the same as `test`.
    Ci(steps::TestArgs),
    /// Run whole simulated clusters, one a seed: --seeds N [--from S] [--jobs J], or --seed S to
    /// replay one with a trace. The first failing seed is printed and the exit status is 1.
    Sim {
        /// What the simulator takes; `--help` tells all of it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Put classic bugs into a copy of the sources, one at a time, and see whether the simulator
    /// finds them; --write puts the table into docs/testing.md.
    Mutants(mutants::MutantsArgs),
    /// Give decoders what nobody should send, led by coverage (libFuzzer) where a C++ compiler is
    /// at hand. All of them, one after the other, when none is named; `--list` tells which there are.
    Fuzz(fuzz::FuzzArgs),
    /// Run a cluster of real processes on failing networks and disks: --minutes N, --seed S.
    Chaos {
        /// What the run takes; `--help` tells all of it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run tests of reactor and protocol under miri, which finds undefined behaviour (nightly needed).
    Miri,
    /// Check which crate uses which, and the rules on unsafe and on file headers.
    Arrows,
    /// Install the Debian packages that the tests with real clients use, when allowed to.
    Setup,
    /// Format all code; with --check only say what is not formatted.
    Fmt {
        /// Change nothing.
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Test(args) | Command::Ci(args) => steps::test(&args),
        Command::Sim { args } => steps::sim(&args),
        Command::Mutants(args) => steps::mutants(&args),
        Command::Fuzz(args) => fuzz::fuzz(&args),
        Command::Chaos { args } => steps::chaos(&args),
        Command::Miri => steps::miri(),
        Command::Arrows => steps::arrows(),
        Command::Setup => packages::ensure().map(drop),
        Command::Fmt { check } => steps::fmt(check),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
