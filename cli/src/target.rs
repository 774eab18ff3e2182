//! `ashlar target`: the storage daemon, and making and checking its disk.

use crate::daemon::{DaemonArgs, on_stop_signal};
use crate::problem::{Exit, Outcome, Problem};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use target_daemon::config::TargetConfig;
use target_daemon::identity::Identity;

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
    match command {
        TargetCommand::Format(args) => format(&TargetConfig::load(&args.config)?),
        TargetCommand::Check(args) => check(&TargetConfig::load(&args.config)?),
        TargetCommand::Run(args) => {
            args.daemon.set_up();
            serve(TargetConfig::load(&args.target.config)?)
        }
    }
}

fn format(config: &TargetConfig) -> Outcome {
    let dir = config.dir.display();
    std::fs::create_dir_all(&config.dir).map_err(Problem::io(format!("cannot make {dir}")))?;
    target_daemon::format(config)?;
    println!("target {} is formatted in {dir}", config.id);
    Ok(Exit::Ok)
}

/// The configuration was checked by reading it; what is left is its disk's identity.
fn check(config: &TargetConfig) -> Outcome {
    let (id, dir) = (config.id, config.dir.display());
    if Identity::load(&config.dir)?.is_none() {
        println!(
            "the configuration of target {id} is valid; {dir} is not formatted yet (ashlar target format)"
        );
        return Ok(Exit::CheckFailed);
    }
    Identity::open(&config.dir, config.target())?;
    println!("the configuration of target {id} is valid; {dir} is formatted and is that target's");
    Ok(Exit::Ok)
}

type Stop = Box<dyn Fn() + Send + Sync>;

fn serve(config: TargetConfig) -> Outcome {
    let stop: Arc<OnceLock<Stop>> = Arc::default();
    let asked = stop.clone();
    on_stop_signal(move || match asked.get() {
        Some(stop) => stop(),
        // Nothing is under way before the target can be stopped.
        None => std::process::exit(0),
    })?;
    target_daemon::run(config, move |handle| drop(stop.set(handle)))?;
    Ok(Exit::Ok)
}
