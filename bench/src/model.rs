//! `ashlar bench model`: what more cores and more targets would give, from what one core was measured to cost.
//!
//! A model, no measurement: it adds up stage costs that `bench micro` and `bench goals` measured, and says what it
//! assumes. Its worth is in the shape (what grows, what does not, which limit comes first), and in that a change of a
//! stage's cost changes it.
//!
//! Invariants: every cost comes from a file that a measurement wrote; every assumption is a named constant that the
//! page prints.

use crate::goals::name;
use crate::micro::{self, Micro};
use crate::report::write;
use crate::run::load::Load;
use crate::run::result::Results;
use crate::run::summary::{self, Row};
use anyhow::Context;
use clap::Args;
use serde::Deserialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `ashlar bench model`.
#[derive(Debug, Args)]
#[command(after_help = "  ashlar bench goals\n  ashlar bench micro --save micro.json\n  \
    ashlar bench model --micro micro.json --write-markdown docs/benchmarks/model.md\n\n\
    Without --micro, the benches are run; without --goals, the newest of --results is taken.")]
pub struct ModelArgs {
    /// What `bench micro --save` kept.
    #[arg(long, value_name = "FILE")]
    micro: Option<PathBuf>,
    /// What `bench goals` kept.
    #[arg(long, value_name = "FILE")]
    goals: Option<PathBuf>,
    /// Where `bench goals` keeps its results.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    results: PathBuf,
    /// Write the page to this file.
    #[arg(long, value_name = "FILE")]
    write_markdown: Option<PathBuf>,
}

/// Cores of a target that the table has.
const CORES: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Targets of a cluster that the table has.
const TARGETS: [u32; 5] = [3, 10, 30, 100, 1000];
/// Cores of each target of a larger cluster.
const CORES_OF_TARGET: u32 = 16;
/// Replicas of a chunk.
const REPLICAS: f64 = 3.0;
/// Bytes that a 4 KiB block takes on a network with its headers (TCP, a PDU or a frame).
const WIRE_BYTES: f64 = 4096.0 + 160.0;
/// Bits a second of a target's network.
const NETWORK_BITS: f64 = 100e9;
/// Random 4 KiB reads a second of one drive.
const DRIVE_READS: f64 = 800e3;
/// Bytes a second that one drive takes of synced log and of flushes.
const DRIVE_WRITE_BYTES: f64 = 2e9;
/// Part of the IO that comes to a target which does not lead its chunk, where leadership follows the IO.
const FORWARDED: f64 = 0.1;
/// Copysets for each target, as many as `ashlar dev` makes for each.
const COPYSETS_A_TARGET: f64 = 100.0;
/// Targets that one target shares copysets with, at most: each shard links to the shards that it shares one with.
const SCATTER_MAX: f64 = 100.0;
/// Seconds between two heartbeats of a target to the MDS.
const HEARTBEAT_S: f64 = 1.0;

/// What one IO costs in microseconds of one core, and what adds to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// A read over NVMe/TCP, system calls and network included.
    pub read: f64,
    /// Whose read that is.
    pub read_of: &'static str,
    /// A replicated write at depth 32, on all targets together, disk's system calls included.
    pub write: f64,
    /// A request that goes to another core of the same target and back, with its block copied as a write's is.
    pub core_hop: f64,
    /// A request that goes to another target and back: frames, and both ends' sends and receives.
    pub target_hop: f64,
    /// Raft's own part of a write, all replicas together.
    pub raft: f64,
    /// Planning and framing the log, all replicas together.
    pub log: f64,
    /// Checksums of a write, all replicas together.
    pub crc: f64,
}

/// Bytes to the disk for each 4 KiB write on all replicas, where it was measured.
type DiskBytes = Option<f64>;

#[derive(Deserialize)]
struct GoalsFile {
    #[serde(default)]
    facts: FactsPart,
    #[serde(flatten)]
    results: Results,
}

#[derive(Default, Deserialize)]
struct FactsPart {
    #[serde(default)]
    disk_bytes: Option<(f64, f64)>,
}

/// Runs the model.
///
/// # Errors
/// No measurement to begin with, or one that lacks what the model needs.
pub fn run(args: &ModelArgs) -> anyhow::Result<ExitCode> {
    let path = match &args.goals {
        Some(path) => path.clone(),
        None => newest(&args.results)?,
    };
    let text = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let goals: GoalsFile = serde_json::from_slice(&text)
        .with_context(|| format!("{} is nothing that `bench goals` kept", path.display()))?;
    let micro = match &args.micro {
        Some(path) => micro::read(path)?,
        None => micro::measure(None, None)?,
    };
    let costs = Costs::of(&micro, &summary::rows(&goals.results))?;
    let page = page(&costs, goals.facts.disk_bytes.map(|both| both.1), &goals.results);
    match &args.write_markdown {
        Some(path) => write(path, &page)?,
        None => println!("{page}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn newest(dir: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_goals = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("goals-") && name.ends_with(".json")
    };
    // The name has the time in it.
    let found = entries.filter(is_goals).max();
    found.with_context(|| format!("{} has no goals-*.json: run `ashlar bench goals` first", dir.display()))
}

impl Costs {
    /// From the micro benches and the rows of a run of `bench goals`.
    ///
    /// # Errors
    /// One of them lacks.
    pub fn of(micro: &[Micro], rows: &[Row]) -> anyhow::Result<Self> {
        let us = |name: &str| {
            let found = micro.iter().find(|one| one.name == name);
            let ns = found.map(|one| one.ns);
            ns.map(|ns| ns / 1000.0)
                .with_context(|| format!("the micro benches lack `{name}`: run all of them"))
        };
        let measured = |subject: &str, reads: u8, depth: u32| {
            let is = |row: &&Row| {
                let load = &row.load;
                let plain = Load { depth, jobs: 1, rate: None, ..Load::random_4k(reads, depth, load.bytes) };
                row.subject == subject && *load == plain
            };
            let found = rows.iter().find(is).and_then(|row| row.server_us_per_io);
            found.with_context(|| {
                format!("the run of `bench goals` lacks {subject} at depth {depth}: run all of it")
            })
        };
        let message = us("reactor/send and receive 64 bytes")?;
        let frames = us("frame/encode io")? + us("frame/decode io")?;
        // Without a disk where that was measured, else with what the disk's system calls add.
        let from_memory = measured(name::MEMORY, 100, 128).map(|us| (us, "1 replica in memory, depth 128"));
        let (read, read_of) = match from_memory {
            Ok(found) => found,
            Err(_) => (measured(name::THREE, 100, 32)?, "3 replicas on a disk, depth 32"),
        };
        Ok(Self {
            read,
            read_of,
            write: measured(name::THREE, 0, 32)?,
            // There and back, and the block from one core's memory to the other's.
            core_hop: 2.0 * us("reactor/mailbox hop")? + us("reactor/copy 4K")?,
            // There and back. Under load many messages share a system call; the bench has one for each.
            target_hop: 2.0 * (message + frames),
            raft: us("raft/commit 32 on 3 replicas")?,
            log: REPLICAS * us("log/append 32 x 4K")?,
            crc: (REPLICAS + 1.0) * us("crc/crc32c 4K")?,
        })
    }

    /// Reads a second of one target of so many cores, whose hosts' connections lie on any core.
    fn reads_of_target(&self, cores: u32) -> f64 {
        f64::from(cores) * 1e6 / (self.read + elsewhere(cores) * self.core_hop)
    }

    /// Replicated writes a second for each target: every target leads a third of what it keeps.
    fn writes_of_target(&self, cores: u32) -> f64 {
        f64::from(cores) * 1e6 / (self.write + REPLICAS * elsewhere(cores) * self.core_hop)
    }

    /// Part of the processor time that is left for IO, and the cost of forwarding added.
    fn of_cluster(&self, targets: u32, forwarded: f64) -> (f64, f64) {
        let forwarded = forwarded.min(1.0 - 1.0 / f64::from(targets));
        let hop = forwarded * self.target_hop;
        let all = f64::from(targets * CORES_OF_TARGET) * 1e6;
        let extra = elsewhere(CORES_OF_TARGET) * self.core_hop;
        (all / (self.read + extra + hop), all / (self.write + REPLICAS * extra + hop))
    }
}

/// Part of the IO that comes to another core than the one that has its copyset.
fn elsewhere(cores: u32) -> f64 {
    1.0 - 1.0 / f64::from(cores)
}

fn page(costs: &Costs, disk: DiskBytes, results: &Results) -> String {
    let mut page = String::from(
        "# A model of larger machines\n\nWritten by `ashlar bench model --write-markdown`; do not edit figures by \
         hand. A model and no measurement: what one core was measured to cost, added up.\n\n",
    );
    let _ = writeln!(page, "The costs were measured on {}\n", results.environment.line());
    page += "## What one IO costs\n\n| stage | us of one core | from |\n|---|---:|---|\n";
    let own = costs.raft + costs.log + costs.crc;
    for (stage, us, from) in [
        ("a 4 KiB read over NVMe/TCP, all of it", costs.read, costs.read_of),
        (
            "a 4 KiB write, 3 replicas, all of it on all targets",
            costs.write,
            "3 replicas on a disk, depth 32",
        ),
        ("of which Raft, 3 replicas", costs.raft, "`bench micro`, batches of 32"),
        ("of which planning and framing the log, 3 replicas", costs.log, "`bench micro`, batches of 32"),
        ("of which checksums, once at the edge and on 3 replicas", costs.crc, "`bench micro`"),
        ("of which the rest: system calls, network, disk, turns", costs.write - own, "the difference"),
        ("a hop to another core and back", costs.core_hop, "`bench micro`"),
        ("a hop to another target and back, unbatched", costs.target_hop, "`bench micro`"),
    ] {
        let _ = writeln!(page, "| {stage} | {us:.2} | {from} |");
    }
    page += &assumptions();
    page += &by_cores(costs, disk);
    page += &by_targets(costs);
    page + READING
}

fn assumptions() -> String {
    format!(
        "\n## What is assumed\n\n\
         - A shard's cost does not change with the number of shards: shards share no lock and no line of memory on the \
         path of IO. What they share is memory bandwidth (a read moves its block about four times: at 64 cores, see the \
         table) and the last cache, which this leaves out; `bench goals` has the part that two cores can show.\n\
         - Connections lie on any core, so that with n cores (n-1)/n of all IO goes to another core by mailbox. Hosts \
         that open a queue a core and a copyset's leader that is drawn to it would save that.\n\
         - Between targets {:.0} % of the IO is forwarded, since leadership follows the IO \
         ([ADR 6](../adr/0006-leaders-follow-io.md)); a second column has the worst, where leaders lie anywhere.\n\
         - A target of a larger cluster has {CORES_OF_TARGET} cores and {COPYSETS_A_TARGET:.0} copysets led or followed \
         for each of them, a network of {:.0} Gbit/s, drives of {:.0}K random reads and {:.1} GB/s of writes.\n\
         - Processors alike to the one measured, which is a virtual one: its system calls and wake-ups cost more than \
         those of real ones.\n",
        FORWARDED * 100.0,
        NETWORK_BITS / 1e9,
        DRIVE_READS / 1e3,
        DRIVE_WRITE_BYTES / 1e9,
    )
}

fn by_cores(costs: &Costs, disk: DiskBytes) -> String {
    let mut text = String::from(
        "\n## One target, by cores\n\n| cores | 4K reads/s | of linear | Gbit/s out | drives for the reads | memory traffic, GB/s | \
         4K writes/s a target | drives for the writes |\n|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for cores in CORES {
        let (reads, writes) = (costs.reads_of_target(cores), costs.writes_of_target(cores));
        let linear = reads / (f64::from(cores) * costs.reads_of_target(1));
        let drives = match disk {
            Some(bytes) => format!("{:.0}", (writes * bytes / DRIVE_WRITE_BYTES).ceil()),
            None => "-".into(),
        };
        let _ = writeln!(
            text,
            "| {cores} | {} | {linear:.2} | {:.1} | {:.0} | {:.1} | {} | {drives} |",
            thousands(reads),
            reads * WIRE_BYTES * 8.0 / 1e9,
            (reads / DRIVE_READS).ceil(),
            reads * 4.0 * 4096.0 / 1e9,
            thousands(writes),
        );
    }
    let network = NETWORK_BITS / 8.0 / WIRE_BYTES;
    let cores = CORES.into_iter().find(|cores| costs.reads_of_target(*cores) > network);
    let _ = match cores {
        Some(cores) => writeln!(
            text,
            "\n{:.0} Gbit/s carry {} reads a second: from {cores} cores on, the network is the limit, not the processor.",
            NETWORK_BITS / 1e9,
            thousands(network)
        ),
        None => writeln!(text, "\nThe network is not the limit up to {} cores.", CORES[CORES.len() - 1]),
    };
    text
}

fn by_targets(costs: &Costs) -> String {
    let mut text = format!(
        "\n## A cluster of targets of {CORES_OF_TARGET} cores\n\n| targets | 4K reads/s | the worst | 4K writes/s | the worst | copysets | \
         links of a shard | heartbeats/s at the MDS |\n|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for targets in TARGETS {
        let (reads, writes) = costs.of_cluster(targets, FORWARDED);
        let (reads_worst, writes_worst) = costs.of_cluster(targets, 1.0);
        let copysets = f64::from(targets) * COPYSETS_A_TARGET * f64::from(CORES_OF_TARGET) / REPLICAS;
        // Of a shard's copysets, each has two other replicas; they lie on the shards of those targets alike.
        let ends = COPYSETS_A_TARGET * (REPLICAS - 1.0);
        let shards = f64::from(targets - 1).min(SCATTER_MAX) * f64::from(CORES_OF_TARGET);
        let _ = writeln!(
            text,
            "| {targets} | {} | {} | {} | {} | {} | {:.0} | {:.0} |",
            thousands(reads),
            thousands(reads_worst),
            thousands(writes),
            thousands(writes_worst),
            thousands(copysets),
            ends.min(shards),
            f64::from(targets) / HEARTBEAT_S,
        );
    }
    text
}

const READING: &str = "\n## How to read it\n\nThroughput grows with targets without a bend, since nothing that IO touches \
grows with the cluster: a shard's copysets and links are bounded by placement (the scatter width), and the MDS is not on the \
path. What does grow with the cluster is the map, the MDS's heartbeats, and the links that a *host's* target opens to \
leaders elsewhere. Idle copysets hibernate and cost no timer.\n\nThe first limit is not the processor: see the columns for \
network and drives.\n";

fn thousands(value: f64) -> String {
    match value {
        big if big >= 1e7 => format!("{:.0}M", big / 1e6),
        big if big >= 1e6 => format!("{:.2}M", big / 1e6),
        some if some >= 1e4 => format!("{:.0}K", some / 1e3),
        few => format!("{few:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::ensure;

    const COSTS: Costs = Costs {
        read: 4.0,
        read_of: "a test",
        write: 60.0,
        core_hop: 0.5,
        target_hop: 10.0,
        raft: 0.3,
        log: 0.6,
        crc: 0.8,
    };

    #[test]
    fn more_cores_give_more_but_never_more_than_linear() {
        let reads = CORES.map(|cores| COSTS.reads_of_target(cores));
        assert_eq!(reads[0], 250_000.0);
        for (nth, pair) in reads.windows(2).enumerate() {
            assert!(pair[1] > pair[0] && pair[1] <= pair[0] * 2.0, "{nth}: {pair:?}");
        }
        // Nearly all of it goes to another core: 4.5 us instead of 4.
        assert!((reads[6] / (64.0 * 250_000.0) - 0.89).abs() < 0.01, "{reads:?}");
    }

    #[test]
    fn forwarding_costs_and_a_cluster_grows_with_its_targets() {
        let (good, worst) = (COSTS.of_cluster(1000, FORWARDED), COSTS.of_cluster(1000, 1.0));
        assert!(good.0 > 2.0 * worst.0 && good.1 > worst.1, "{good:?} {worst:?}");
        let ten = COSTS.of_cluster(10, FORWARDED);
        assert!((good.0 / ten.0 - 100.0).abs() < 1e-6, "{good:?} {ten:?}");
    }

    #[test]
    fn a_measurement_that_lacks_is_named() {
        let micro = |name: &str| Micro {
            name: name.into(),
            ns: 100.0,
            ns_low: 0.0,
            ns_high: 0.0,
            count: 1,
            bytes: None,
        };
        let error = Costs::of(&[micro("crc/crc32c 4K")], &[]).expect_err("nearly all lacks");
        assert!(error.to_string().contains("lack `"), "{error}");
        ensure_names().expect("the micro benches have these names");
    }

    /// The names that the model looks for are those of the benches.
    fn ensure_names() -> anyhow::Result<()> {
        let source =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/benches/micro.rs"))?;
        for part in [
            "mailbox hop",
            "copy 4K",
            "send and receive 64 bytes",
            "append {entries} x 4K",
            "commit {entries} on 3",
        ] {
            ensure!(source.contains(part), "no bench is called `{part}`");
        }
        Ok(())
    }

    #[test]
    fn the_page_has_every_row_and_no_nonsense() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let page = page(&COSTS, Some(20_000.0), &Results::read(&fixture).expect("a fixture"));
        assert!(page.contains("| 64 | ") && page.contains("| 1000 | "), "{page}");
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert!(page.contains("the network is the limit"), "{page}");
    }
}
