//! `ashlar disk`: what lies on a target's disk, read without the target.

use crate::output::OutputArgs;
use crate::problem::{Outcome, Problem};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Commands on a disk.
#[derive(Subcommand)]
pub enum DiskCommand {
    /// Print superblock, log and slot table, and verify all checksums; exit code 3 on damage.
    Inspect(InspectArgs),
}

/// What `disk inspect` takes.
#[derive(Args)]
pub struct InspectArgs {
    /// A target's folder, or one shard's in it.
    dir: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs one of the commands.
pub fn run(command: DiskCommand) -> Outcome {
    let DiskCommand::Inspect(args) = command;
    let _ = args.output;
    Err(Problem::new(format!("no disk inspection in this build ({})", args.dir.display())))
}
