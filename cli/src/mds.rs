//! `ashlar mds`: the metadata server, and its records as a file.

use crate::cluster::ClusterArgs;
use crate::daemon::{DaemonArgs, stop_signal};
use crate::output::OutputArgs;
use crate::problem::{Exit, Outcome, Problem};
use clap::{Args, Subcommand};
use mds_lite::snapshot::{self, Snapshot};
use mds_lite::state::Change;
use mds_lite::{StoreArgs, StoreAt};
use serde::Serialize;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Commands of the metadata server.
#[derive(Subcommand)]
pub enum MdsCommand {
    /// Run it in the foreground until SIGTERM or SIGINT.
    Run(RunArgs),
    /// Write all records of the running MDS to a file.
    Snapshot(SnapshotArgs),
    /// Put a snapshot's records into a store that no MDS is using.
    Restore(RestoreArgs),
}

/// What `mds run` takes.
#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    mds: mds_lite::Args,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// What `mds snapshot` takes.
#[derive(Args)]
pub struct SnapshotArgs {
    /// The file to write; it must not be there yet
    file: PathBuf,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `mds restore` takes.
#[derive(Args)]
pub struct RestoreArgs {
    /// A file that `ashlar mds snapshot` wrote
    file: PathBuf,
    #[command(flatten)]
    store: StoreArgs,
    /// Overwrite the records that are there
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs one of the commands.
pub fn run(command: MdsCommand) -> Outcome {
    match command {
        MdsCommand::Run(args) => {
            args.daemon.set_up();
            crate::block_on(async {
                let stop = stop_signal()?;
                mds_lite::run(args.mds.into(), stop).await?;
                Ok(Exit::Ok)
            })
        }
        MdsCommand::Snapshot(args) => crate::block_on(take(args)),
        MdsCommand::Restore(args) => crate::block_on(restore(args)),
    }
}

/// What a snapshot holds, as told.
#[derive(Serialize)]
struct Told {
    cluster: String,
    generation: u64,
    targets: usize,
    copysets: usize,
    volumes: usize,
    records: usize,
    /// Names of volumes in the bin.
    in_bin: Vec<String>,
}

impl Told {
    fn new(snapshot: &Snapshot) -> Self {
        let count = |wanted: fn(&Change) -> bool| snapshot.changes.iter().filter(|c| wanted(c)).count();
        let generation = snapshot.changes.iter().find_map(|change| match change {
            Change::Counters(counters) => Some(counters.generation),
            _ => None,
        });
        Self {
            cluster: snapshot.cluster.to_string(),
            generation: generation.unwrap_or_default(),
            targets: count(|change| matches!(change, Change::Target(..))),
            copysets: count(|change| matches!(change, Change::Copyset(..))),
            volumes: count(|change| matches!(change, Change::Volume(..))),
            records: snapshot.changes.len(),
            in_bin: snapshot.in_bin().map(|(_, volume)| volume.name.clone()).collect(),
        }
    }

    fn line(&self, verb: &str, place: &str) -> String {
        let Self { cluster, generation, targets, copysets, volumes, records, in_bin } = self;
        let bin = match in_bin.len() {
            0 => String::new(),
            count => format!(", {count} of them in the bin ({})", in_bin.join(", ")),
        };
        format!(
            "{verb} {place}: cluster {cluster} at generation {generation}, {targets} targets, \
             {copysets} copysets, {volumes} volumes{bin}, {records} records"
        )
    }
}

async fn take(args: SnapshotArgs) -> Outcome {
    let bytes = args.cluster.connect()?.snapshot().await?;
    // What cannot be read back is no backup.
    let snapshot = Snapshot::decode(&bytes)?;
    let shown = args.file.display().to_string();
    write_new(&args.file, &bytes).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Problem::new(format!("{shown} is there already"))
            .cause("a snapshot was written there before")
            .fix("name another file; none is overwritten"),
        _ => Problem::io(format!("cannot write {shown}"))(error),
    })?;
    args.output.print(&Told::new(&snapshot), |told| told.line("wrote", &shown))?;
    Ok(Exit::Ok)
}

/// Durably, and never over another file.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

async fn restore(args: RestoreArgs) -> Outcome {
    let at = StoreAt::from(args.store);
    let snapshot = snapshot::restore(&args.file, &at, args.yes).await?;
    args.output.print(&Told::new(&snapshot), |told| told.line("restored", &at.to_string()))?;
    Ok(Exit::Ok)
}
