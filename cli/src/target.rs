//! `ashlar target`: the storage daemon, and making and checking its disk.

use crate::daemon::DaemonArgs;
use crate::problem::{Outcome, Problem};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Commands of the storage daemon.
#[derive(Subcommand)]
pub enum TargetCommand {
    /// Make a target's disk ready for its first start.
    Format(ConfigArgs),
    /// Run it in the foreground until SIGTERM or SIGINT.
    Run(RunArgs),
    /// Check a configuration, and the disk it names, without running.
    Check(ConfigArgs),
}

/// What names a target.
#[derive(Args)]
pub struct ConfigArgs {
    /// Its configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// What `target run` takes.
#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    target: ConfigArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Runs one of the commands.
pub fn run(command: TargetCommand) -> Outcome {
    let config = match &command {
        TargetCommand::Format(args) | TargetCommand::Check(args) => args,
        TargetCommand::Run(args) => {
            args.daemon.set_up();
            &args.target
        }
    };
    Err(Problem::new(format!("no target in this build ({})", config.config.display())))
}
