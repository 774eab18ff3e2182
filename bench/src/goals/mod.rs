//! `ashlar bench goals`: every target of the project that one machine can show, in one run, in alternating rounds.
//!
//! Invariants: subjects that are compared take turns under one load; what this machine or this build cannot show is
//! said in its line, never left out; the table, the JSON and the page come from the same [`judge::Line`]s, and no
//! figure is typed by hand.

mod judge;
mod page;
mod probe;
mod setup;

use crate::bare::Bare;
use crate::environment::Environment;
use crate::report::{keep, write};
use crate::rival::{Rival, Server};
use crate::run::load::{IO_BYTES_MAX, Load, OPEN_DEPTH, Order, Sizes};
use crate::run::measure::{Client, Plan, Subject, prepare, read_once};
use crate::run::result::{Results, Run};
use crate::run::{html, results, summary};
use crate::{EXIT_CHECK_FAILED, Output, parse_bytes, process};
use anyhow::Context;
use clap::Args;
use judge::{Facts, Line, Verdict};
use serde::Serialize;
use setup::Cluster;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Names of subjects; pages, rows and goals are found by them.
pub(crate) mod name {
    pub const RAW: &str = "raw";
    pub const ONE_NVME: &str = "1 replica, NVMe/TCP";
    pub const ONE_NBD: &str = "1 replica, NBD";
    pub const THREE: &str = "3 replicas, NVMe/TCP";
    pub const BARE_TCP: &str = "bare server, TCP";
    pub const BARE_SLEEPS: &str = "bare server, TCP, never spinning";
    pub const BARE_UNIX: &str = "bare server, Unix socket";
    pub const BARE_MEMORY: &str = "bare server, memory";
    pub const MEMORY: &str = "memory, 1 shard";
    pub const MEMORY_2: &str = "memory, 2 shards";
}

/// Arguments of `ashlar bench goals`.
#[derive(Debug, Args)]
#[command(
    after_help = "It starts clusters of its own: 3 replicas, 1 replica, and 1 replica in memory with one and with two\n\
    shards, beside a raw file, qemu-nbd and a server that does nothing but IO (`ashlar bench bare`) on the same disk.\n\
    The whole takes some twenty minutes, more while the host disturbs it; --quick a quarter of that.\n  \
    ashlar bench goals --quick\n  \
    ashlar bench goals --sustain 300 --write-markdown   # the page; some 35 minutes\n\n\
    Ceph is `ashlar bench peers`."
)]
pub struct GoalsArgs {
    /// Where the clusters and the raw file go; it must be a real disk.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Bytes of each volume and file that are touched [default: 512M, quick 256M]
    #[arg(long, value_parser = parse_bytes)]
    size: Option<u64>,
    /// Fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// How often each measurement is repeated; the median counts [default: 5, quick 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: Option<u32>,
    /// Seconds of sustained writes, which are followed by twice as many of mixed load [default: 45, quick 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(4..=86_400))]
    sustain: Option<u32>,
    /// Only parts with this in their name: reads, writes, open loop, sustained, idle, memory.
    #[arg(long, value_name = "PART")]
    only: Option<String>,
    /// Write the tables into this page, between its markers.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = page::DEFAULT_PATH)]
    write_markdown: Option<PathBuf>,
    /// Also a report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Directory that keeps the JSON of each run.
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    results: PathBuf,
    /// How results are printed.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    /// Exit with code 3 when a goal is missed.
    #[arg(long)]
    check: bool,
}

/// What is kept and printed.
#[derive(Debug, Serialize)]
struct Report {
    lines: Vec<Line>,
    facts: Facts,
    #[serde(flatten)]
    results: Results,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &GoalsArgs) -> anyhow::Result<ExitCode> {
    let scratch = tempfile::Builder::new().prefix("ashlar-goals-").tempdir_in(&args.scratch);
    let scratch = scratch.with_context(|| {
        format!("no scratch directory can be made in {}; see --scratch", args.scratch.display())
    })?;
    let report = Bench::new(args, scratch.path()).measure()?;
    let kept = keep(&args.results, "goals", &report.results.environment.time, &report)?;
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => println!("{}", page::text(&report)),
    }
    eprintln!("kept in {}", kept.display());
    if let Some(path) = &args.write_markdown {
        page::write_between(path, &page::markdown(&report))?;
    }
    if let Some(path) = &args.html {
        write(path, &html::page(&report.results))?;
    }
    let missed = report.lines.iter().any(|line| line.verdict == Verdict::Missed);
    Ok(if args.check && missed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS })
}

/// A run in progress.
struct Bench<'a> {
    args: &'a GoalsArgs,
    scratch: &'a Path,
    started: Instant,
    size: u64,
    rounds: u32,
    seconds: f64,
    sustain_s: u32,
    runs: Vec<Run>,
    facts: Facts,
}

/// Seconds before each measurement that are not recorded.
const WARM_UP_S: f64 = 0.3;
/// Bytes of volumes in memory.
const MEMORY_BYTES: u64 = 256 << 20;

impl<'a> Bench<'a> {
    fn new(args: &'a GoalsArgs, scratch: &'a Path) -> Self {
        let quick = args.quick;
        Self {
            args,
            scratch,
            started: Instant::now(),
            size: args.size.unwrap_or(if quick { 256 << 20 } else { 512 << 20 }),
            rounds: args.rounds.unwrap_or(if quick { 2 } else { 5 }),
            seconds: if quick { 1.0 } else { 1.5 },
            sustain_s: args.sustain.unwrap_or(if quick { 8 } else { 45 }),
            runs: Vec::new(),
            facts: Facts::default(),
        }
    }

    fn measure(mut self) -> anyhow::Result<Report> {
        self.parts()?;
        let environment =
            Environment::read(self.scratch, String::new(), Server::QemuNbd.version().unwrap_or_default());
        let plan = self.plan(&Client::Own, &[], &[], self.rounds);
        let results = results(&plan, environment, std::mem::take(&mut self.runs));
        let lines = judge::lines(&summary::rows(&results), &self.facts, self.size);
        Ok(Report { lines, facts: self.facts, results })
    }

    fn wants(&self, part: &str) -> bool {
        self.args.only.as_deref().is_none_or(|only| part.contains(only))
    }

    fn parts(&mut self) -> anyhow::Result<()> {
        let on_disk = ["reads", "writes", "open loop", "sustained", "idle"];
        if on_disk.iter().any(|part| self.wants(part)) {
            self.on_disk()?;
        }
        if self.wants("memory") {
            self.in_memory()?;
        }
        Ok(())
    }

    fn on_disk(&mut self) -> anyhow::Result<()> {
        let size = self.size;
        self.say("starting what is measured, and writing all that is read");
        let raw_file = self.scratch.join("raw");
        let raw = Subject::file(name::RAW, &raw_file);
        prepare(&raw, size)?;
        let [bare, sleeper] = [true, false].map(|spins| Bare::of_file(self.scratch, &raw_file, spins));
        let (bare, sleeper) = (bare?, sleeper?);
        let (on_bare, on_bare_unix) = (bare.tcp(name::BARE_TCP), bare.unix(name::BARE_UNIX));
        let mut three = Cluster::start(self.scratch, "three", size, &[])?;
        let on_three = three.subject(name::THREE, "nvme")?;
        prepare(&on_three, size)?;
        // Only reads are of these.
        let reads = self.wants("reads");
        let mut one = match (reads, setup::offers("--replicas")) {
            (true, true) => Some(Cluster::start(self.scratch, "one", size, &["--replicas", "1"])?),
            (true, false) => self.lacks("1 replica", "this build's `ashlar dev` has no --replicas"),
            (false, _) => None,
        };
        let on_one = one.as_ref().map(|one| one.subject(name::ONE_NVME, "nvme")).transpose()?;
        let on_nbd = one.as_ref().map(|one| one.subject(name::ONE_NBD, "nbd+unix")).transpose()?;
        on_one.iter().try_for_each(|subject| prepare(subject, size))?;
        let qemu = match (reads, Server::QemuNbd.version()) {
            (true, Some(_)) => Some(Rival::serve(Server::QemuNbd, self.scratch, size)?),
            (true, None) => self.lacks("qemu-nbd", &Server::QemuNbd.missing()),
            (false, _) => None,
        };
        three.settle();
        one.iter().for_each(Cluster::settle);
        let on_qemu = qemu.as_ref().map(Rival::subject);
        for subject in subjects([Some(&raw), Some(&on_three), on_one.as_ref(), on_qemu.as_ref()]) {
            read_once(&subject, size)?;
        }
        if self.wants("idle") {
            self.idle(&three, &on_three, &raw)?;
        }
        if self.wants("reads") {
            self.say("reads");
            let alone = subjects([Some(&raw), on_one.as_ref(), Some(&on_bare)]);
            self.turns(&alone, &[read(1, size), polled(1, size), read(128, size)])?;
            let volumes = [on_one.as_ref(), on_nbd.as_ref(), Some(&on_three)];
            let others = [Some(&raw), on_qemu.as_ref(), Some(&on_bare), Some(&on_bare_unix)];
            self.turns(&[subjects(others), subjects(volumes)].concat(), &[read(32, size)])?;
            self.turns(&subjects([&raw, &on_three, &on_bare].map(Some)), &[stream(100, size)])?;
        }
        // Nobody else shall answer from here on.
        drop(qemu);
        if let Some(one) = &mut one {
            one.stop()?;
        }
        if self.wants("writes") {
            self.say("writes");
            self.turns(std::slice::from_ref(&raw), &[three_at_once(size)])?;
            let all = [raw.clone(), on_three.clone(), on_bare, sleeper.tcp(name::BARE_SLEEPS)];
            self.turns(&all, &[write_4k(1, size), write_4k(32, size)])?;
            self.turns(&all[..2], &[stream(0, size)])?;
            self.bytes_to_disk(&three, &on_three)?;
        }
        drop((bare, sleeper));
        if self.wants("open loop") {
            self.open_loop(&raw, &on_three)?;
        }
        if self.wants("sustained") {
            self.sustained(&three, &on_three)?;
        }
        three.stop()
    }

    /// Says why a subject is not there, in the result too.
    fn lacks<T>(&mut self, what: &'static str, why: &str) -> Option<T> {
        eprintln!("note: {what}: {why}");
        self.facts.lacking.push((what, why.to_owned()));
        None
    }

    fn plan<'b>(
        &self,
        client: &'b Client,
        subjects: &'b [Subject],
        loads: &'b [Load],
        rounds: u32,
    ) -> Plan<'b> {
        let settle_max = Duration::from_secs(if self.args.quick { 4 } else { 8 });
        Plan { client, subjects, loads, seconds: self.seconds, warm_up: WARM_UP_S, rounds, settle_max }
    }

    /// Measures subjects in turns.
    fn turns(&mut self, subjects: &[Subject], loads: &[Load]) -> anyhow::Result<()> {
        let plan = self.plan(&Client::Own, subjects, loads, self.rounds);
        self.runs.extend(plan.measure()?.into_iter().map(|one| one.run));
        if loads.iter().any(|load| load.read_percent < 100) {
            for subject in subjects.iter().filter(|subject| subject.flushes) {
                process::settle(&subject.pids, plan.settle_max);
            }
        }
        Ok(())
    }

    /// At half of the rate that was reached at depth 32, IOs arrive whatever became of those before; on the raw file at
    /// the same rate, to tell what of the spread is the disk's.
    fn open_loop(&mut self, raw: &Subject, subject: &Subject) -> anyhow::Result<()> {
        self.say("open loop at half of the maximum rate");
        for most in [read(32, self.size), write_4k(32, self.size)] {
            let found = self.runs.iter().filter(|run| run.subject == subject.name && run.load == most);
            let iops: Vec<f64> = found.map(|run| run.iops).collect();
            let half = match iops.is_empty() {
                true => {
                    let alone = std::slice::from_ref(subject);
                    self.turns(alone, std::slice::from_ref(&most))?;
                    self.runs.last().map_or(1000.0, |run| run.iops / 2.0)
                }
                false => crate::report::median(iops) / 2.0,
            };
            let load = Load { rate: Some(half.round().max(1.0)), depth: OPEN_DEPTH, ..most };
            self.turns(&subjects([Some(raw), Some(subject)]), &[load])?;
        }
        Ok(())
    }

    /// What the disk is given for each 4 KiB write: for the log, which is all that an acknowledgement waits for, and
    /// in all. The flusher works ahead, so the two are not told apart by when they are written.
    fn bytes_to_disk(&mut self, three: &Cluster, subject: &Subject) -> anyhow::Result<()> {
        self.say("bytes to the disk for each write");
        let pids = three.targets()?;
        three.settle();
        let (before, log) = (process::write_bytes_sum(&pids), three.log_bytes()?);
        let (client, alone, load) = (Client::Own, std::slice::from_ref(subject), write_4k(32, self.size));
        let loads = std::slice::from_ref(&load);
        // All that is written counts: there is no warm-up.
        let plan = Plan { warm_up: 0.0, ..self.plan(&client, alone, loads, 1) };
        let run = plan.one(subject, &load, 0)?.run;
        let ios = run.writes.as_ref().map_or(0, |writes| writes.ios).max(1) as f64;
        three.settle();
        let (logged, all) = (three.log_bytes()? - log, process::write_bytes_sum(&pids) - before);
        self.facts.disk_bytes = Some((logged / ios, all as f64 / ios));
        Ok(())
    }

    /// Writes for long, then a mix for twice as long. Memory is watched in the mix alone: two loads need different amounts.
    fn sustained(&mut self, three: &Cluster, subject: &Subject) -> anyhow::Result<()> {
        self.say(&format!("sustained writes for {} s, then a mix for twice that", self.sustain_s));
        let (client, seconds) = (Client::Own, f64::from(self.sustain_s));
        let writes = write_4k(32, self.size);
        let mix = Load {
            order: Order::Zipfian,
            sizes: Sizes(vec![(4096, 7.0), (65_536, 2.0), (IO_BYTES_MAX, 1.0)]),
            read_percent: 70,
            ..writes.clone()
        };
        let plan = |seconds| Plan { seconds, ..self.plan(&client, &[], &[], 1) };
        let run = plan(seconds).one(subject, &writes, 0)?.run;
        let (_, memory) = probe::memory(&three.targets()?, || plan(2.0 * seconds).one(subject, &mix, 0))?;
        self.facts.sustained = Some((seconds, run.iops));
        self.facts.memory = Some(memory);
        Ok(())
    }

    fn idle(&mut self, three: &Cluster, subject: &Subject, raw: &Subject) -> anyhow::Result<()> {
        self.say("idle");
        let seconds = if self.args.quick { 5.0 } else { 10.0 };
        self.facts.idle_percent = Some(probe::idle_percent(&three.targets()?, seconds)?);
        let pauses = if self.args.quick { 3 } else { 7 };
        self.facts.after_idle = Some(probe::first_after_idle(&subject.target, self.size, pauses)?);
        self.facts.raw_after_idle = Some(probe::first_after_idle(&raw.target, self.size, pauses)?);
        Ok(())
    }

    /// What the software costs without a disk.
    fn in_memory(&mut self) -> anyhow::Result<()> {
        self.say("1 replica in memory");
        if !setup::offers("--memory") {
            let _: Option<()> = self.lacks("memory", "this build's `ashlar dev` has no --memory");
            return Ok(());
        }
        let start = |name, shards| {
            let extra = ["--memory", "--replicas", "1", "--shards", shards];
            Cluster::start(self.scratch, name, MEMORY_BYTES, &extra)
        };
        let (mut one, mut two) = (start("memory-1", "1")?, start("memory-2", "2")?);
        let (on_one, on_two) = (one.subject(name::MEMORY, "nvme")?, two.subject(name::MEMORY_2, "nvme")?);
        [&on_one, &on_two].into_iter().try_for_each(|subject| prepare(subject, MEMORY_BYTES))?;
        [&one, &two].into_iter().for_each(Cluster::settle);
        let bare = Bare::of_memory(self.scratch, MEMORY_BYTES)?;
        let on_bare = bare.tcp(name::BARE_MEMORY);
        prepare(&on_bare, MEMORY_BYTES)?;
        let loads = [read(32, MEMORY_BYTES), read(128, MEMORY_BYTES), polled(1, MEMORY_BYTES)];
        self.turns(&[on_one.clone(), on_bare], &loads)?;
        drop(bare);
        self.turns(&[on_one.clone(), on_two], &[both_shards()])?;
        one.stop()?;
        two.stop()
    }

    /// Tells where it is.
    fn say(&self, what: &str) {
        eprintln!("== {:>4.0} s: {what}", self.started.elapsed().as_secs_f64());
    }
}

fn subjects<const N: usize>(all: [Option<&Subject>; N]) -> Vec<Subject> {
    all.into_iter().flatten().cloned().collect()
}

/// 4 KiB random reads.
fn read(depth: u32, size: u64) -> Load {
    Load::random_4k(100, depth, size)
}

/// The same by a client that polls, as SPDK's initiator does, whose figures the targets are made of.
fn polled(depth: u32, size: u64) -> Load {
    Load { poll: true, ..read(depth, size) }
}

/// 4 KiB random writes; those of a file are synced.
fn write_4k(depth: u32, size: u64) -> Load {
    Load::random_4k(0, depth, size)
}

/// One write each of three clients: what three replicas on one disk do at depth 1.
fn three_at_once(size: u64) -> Load {
    Load { jobs: 3, ..write_4k(1, size) }
}

/// 128 KiB in order, eight at once; writes of a file are not synced.
fn stream(reads: u8, size: u64) -> Load {
    let sizes = Sizes(vec![(IO_BYTES_MAX, 1.0)]);
    Load { order: Order::Sequential, sizes, dsync: false, ..Load::random_4k(reads, 8, size) }
}

/// Two connections, so that a target of two shards has one on each.
fn both_shards() -> Load {
    Load { jobs: 2, ..read(32, MEMORY_BYTES) }
}
