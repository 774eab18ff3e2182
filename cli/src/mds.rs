//! `ashlar mds`: the metadata server.

use crate::daemon::{DaemonArgs, stop_signal};
use crate::problem::{Exit, Outcome};
use clap::{Args, Subcommand};

/// Commands of the metadata server.
#[derive(Subcommand)]
pub enum MdsCommand {
    /// Run it in the foreground until SIGTERM or SIGINT.
    Run(RunArgs),
}

/// What `mds run` takes.
#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    mds: mds_lite::Args,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Runs one of the commands.
pub fn run(command: MdsCommand) -> Outcome {
    let MdsCommand::Run(args) = command;
    args.daemon.set_up();
    crate::block_on(async {
        let stop = stop_signal()?;
        mds_lite::run(args.mds.into(), stop).await?;
        Ok(Exit::Ok)
    })
}
