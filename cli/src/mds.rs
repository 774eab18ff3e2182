//! `ashlar mds`: the metadata server.

use crate::daemon::DaemonArgs;
use crate::problem::{Outcome, Problem};
use clap::{Args, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Commands of the metadata server.
#[derive(Subcommand)]
pub enum MdsCommand {
    /// Run it in the foreground until SIGTERM or SIGINT.
    Run(RunArgs),
}

/// What `mds run` takes.
#[derive(Args)]
pub struct RunArgs {
    /// Where it serves gRPC.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7400")]
    listen: SocketAddr,
    /// Its database; made at the first start.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Runs one of the commands.
pub fn run(command: MdsCommand) -> Outcome {
    let MdsCommand::Run(args) = command;
    args.daemon.set_up();
    Err(Problem::new(format!("no MDS in this build ({}, {})", args.listen, args.dir.display())))
}
