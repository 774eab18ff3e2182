//! A cluster of real processes on a network and on disks that fail, under real clients.
//!
//! ```text
//!   hub (bridge; fio, register.py)      each box a network namespace with an address of its own
//!    |        |       |       |       \
//!   mds   target 1 target 2 target 3  target 4: holds nothing, is spared from death; fio's door
//!            |       |       |
//!          ext4 on a loop device on a FUSE file (nbdfuse) on nbdkit: errors on demand, and a cache
//!          of un-flushed writes that a power cut loses
//! ```
//!
//! One seed decides which faults come when; what they meet is up to the machine. A run ends healed:
//! every register is read back through every target, the history is judged by the simulator's
//! checker, fio has verified what it wrote, and `ashlar volume check` finds all replicas equal.
//!
//! Bounds: at most one target at a time has a disk that returns errors or rotten blocks, and the blocks
//! that rot on one target rot on no other. Processes, links and power may fail everywhere at once.
//!
//! Deliberately absent: clock jumps (no namespace has a CLOCK_REALTIME of its own, and production code
//! uses CLOCK_BOOTTIME only; the simulator has clocks that drift and jump).

mod disk;
mod fleet;
mod nemesis;
pub(crate) mod net;
mod trace;

use crate::fuzz::Dice;
use crate::register::{Attach, Register, Summary, finish};
use crate::tools::{Running, fio_verify};
use anyhow::{Context, ensure};
use fleet::Fleet;
use nemesis::Nemesis;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides the faults.
    pub seed: u64,
    /// How long faults come.
    pub length: Duration,
    /// The binary under test.
    pub bin: PathBuf,
    /// Where everything lies; a real disk.
    pub dir: PathBuf,
    /// Only faults whose names contain one of these; all when empty.
    pub only: Vec<String>,
}

/// What a run saw.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Faults by name, and how often each came.
    pub faults: Vec<(&'static str, u32)>,
    /// What could not be done here, and why.
    pub skipped: Vec<String>,
    /// Reads and writes of registers.
    pub registers: (u64, u64),
    /// Operations in the judged history.
    pub judged: u64,
    /// The longest wait for an answer.
    pub longest_ms: u64,
    /// Processes started again because they had ended by themselves, and why.
    pub ended: Vec<String>,
}

/// Whether this machine can do it at all; else why not.
pub fn possible() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("only root may make network namespaces and mount disks".into());
    }
    match ["ip", "nft", "fio", "losetup", "mkfs.ext4", "python3"].iter().find(|tool| !disk::has(tool)) {
        Some(tool) => Err(format!("{tool} is not installed")),
        None => Ok(()),
    }
}

/// Blocks of the register workload: 64 MiB, four chunks.
const REGISTERS: u32 = 16_384;

/// Makes a cluster, lets it suffer, and judges.
///
/// # Errors
/// An acknowledged write was lost, a read was wrong, IO failed or hung, replicas differ, or the
/// cluster cannot be made.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let mut fleet = Fleet::start(options, &mut report.skipped)?;
    let ran = suffer(options, &mut fleet, &mut report);
    if ran.is_err() {
        fleet.print_logs();
    }
    report.ended = std::mem::take(&mut fleet.ended);
    ran.map(|()| report)
}

fn suffer(options: &Options, fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let trace = options.dir.join("trace");
    let mut register = Register::new(&options.dir, options.seed, REGISTERS, &fleet.uris("vol0"));
    register.attach = Attach::All;
    register.netns = Some(fleet.hub());
    register.trace = Some(trace.clone());
    register.op_limit_s = 120;
    let mut fio = fio(fleet, options.length)?;
    let mut load = register.spawn(options.length)?;
    let mut nemesis = Nemesis::new(options, fleet, &mut report.skipped);
    let (begin, mut dice) = (Instant::now(), Dice(options.seed));
    while begin.elapsed() < options.length {
        nemesis.round(fleet, &mut dice)?;
        ensure_alive(&mut load, "the register workload")?;
        ensure_alive(&mut fio, "fio")?;
    }
    nemesis.heal_all(fleet)?;
    report.faults = nemesis.counts();
    fleet.await_healthy()?;
    let Summary { read, write, longest_ms, .. } = finish(load).context("the register workload")?;
    (report.registers, report.longest_ms) = ((read, write), longest_ms);
    fio.ok().context("fio")?;
    ensure!(write > 50 && read > 20, "only {write} writes and {read} reads: nothing was tested");
    report.judged = trace::judge(&trace)?;
    register.trace = None;
    register.check().context("what is there at the end")?;
    fleet.check_replicas("vol0")?;
    fleet.check_replicas("vol1")?;
    fleet.stop()
}

/// fio verifies what it writes, through the target that is spared, on a volume of its own whose chunks
/// are there before any disk is filled.
fn fio(fleet: &Fleet, length: Duration) -> anyhow::Result<Running> {
    let uri = fleet.uri(fleet.spared(), "vol1");
    let load = |args: &[&str]| {
        let mut words = vec!["--size=48M", "--bsrange=4k-64k", "--iodepth=8"];
        words.extend_from_slice(args);
        fio_verify(&uri, &words).inside(fleet.hub()).limit(length + Duration::from_secs(300))
    };
    load(&["--rw=write"]).ok().context("fio's first pass")?;
    let runtime = format!("--runtime={}", length.as_secs());
    load(&["--rw=randwrite", "--time_based", &runtime, "--verify_backlog=1024"]).spawn()
}

fn ensure_alive(load: &mut Running, name: &str) -> anyhow::Result<()> {
    if load.is_running()? {
        return Ok(());
    }
    let (code, stdout, stderr) = load.left()?;
    ensure!(code == Some(0), "{name} ended with {code:?}\n{stdout}\n{stderr}");
    Ok(())
}
