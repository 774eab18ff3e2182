//! `ashlar bench run`: one workload against one or more targets, in alternating rounds, by our own
//! clients on the reactor that the targets use.
//!
//! Invariants: every subject of a command meets the same IOs (same seed), A B A B; figures are
//! worked out once, in [`result`], and printed, compared and plotted from there.

pub mod compare;
mod driver;
mod html;
mod job;
pub mod load;
pub mod result;
mod target;

use crate::environment::Environment;
use crate::process;
use crate::report::median;
use crate::{Output, parse_bytes};
use anyhow::{Context, bail, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use driver::Done;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use job::{Tick, Times};
use load::{BLOCK_BYTES, Io, Load, Order, Sizes};
use reactor::Reactor;
use result::{Latency, Moment, ProcessUse, Results, Run, SCHEMA};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use target::Target;

/// What `bench run` takes.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  ashlar bench run file:/srv/x --prepare --size 1G --depth 32\n  \
    ashlar bench run raw=file:/srv/x vol='nbd+unix:///vol0?socket=/srv/d/target-1/nbd.sock' --dev /srv/d --rounds 5\n  \
    ashlar bench run nbd://host/vol0 --rate 20000 --read 70 --block 4K:80,64K:20 --html report.html")]
pub struct RunArgs {
    /// What is measured: [NAME=]file:PATH, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.
    /// Several are measured in turns: A B A B.
    #[arg(value_name = "TARGET", required = true)]
    targets: Vec<String>,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    common: CommonArgs,
}

/// The workload, as the command line has it.
#[derive(Args, Debug)]
pub struct LoadArgs {
    /// In which order.
    #[arg(long, value_enum, default_value_t)]
    order: Order,
    /// Reads among 100 IOs; the others are writes.
    #[arg(long, default_value_t = 100, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    read: u8,
    /// Bytes of an IO, or sizes with their shares, as in 4K:70,64K:30.
    #[arg(long, default_value = "4K", value_name = "SIZES", value_parser = parse_sizes)]
    block: Sizes,
    /// IOs in flight at most, for each job.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    depth: u32,
    /// Connections, each with a thread of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: u32,
    /// Open loop: so many IOs arrive a second in all, and latency counts from when each should have begun.
    #[arg(long, value_name = "IOPS", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Writes of a file are durable when they complete (RWF_DSYNC).
    #[arg(long)]
    dsync: bool,
    /// Compare what is read with what this run has written.
    #[arg(long)]
    verify: bool,
    /// Bytes from the start that are touched.
    #[arg(long, default_value = "1G", value_parser = parse_bytes)]
    size: u64,
    /// Of the random numbers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What all commands that measure take.
#[derive(Args, Debug)]
pub struct CommonArgs {
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Seconds before it, not recorded.
    #[arg(long, default_value_t = 1.0, value_parser = parse_seconds)]
    warm_up: f64,
    /// How often each target is measured; medians are printed.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Write every byte once before measuring; a file that is missing is made.
    #[arg(long)]
    prepare: bool,
    /// Processes of the server, whose CPU time is counted.
    #[arg(long, value_name = "PID")]
    pid: Vec<i32>,
    /// A dev cluster, whose processes are counted.
    #[arg(long, value_name = "DIR")]
    dev: Option<PathBuf>,
    /// Where the result goes; beside it, the distributions as .hgrm files.
    #[arg(long, value_name = "FILE", default_value = "result.json")]
    save: PathBuf,
    /// Also a report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

/// A target with its name in results.
struct Subject {
    name: String,
    target: Target,
}

/// Runs the command.
///
/// # Errors
/// A target that cannot be reached, an IO that fails, or data that is not what was written.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let results = measure(&args.targets, &args.load.load(), &args.common)?;
    show(&results, &args.common)?;
    Ok(ExitCode::SUCCESS)
}

impl LoadArgs {
    fn load(&self) -> Load {
        Load {
            order: self.order,
            read_percent: self.read,
            sizes: self.block.clone(),
            depth: self.depth,
            jobs: self.jobs,
            rate: self.rate,
            dsync: self.dsync,
            verify: self.verify,
            bytes: self.size,
            seed: self.seed,
        }
    }
}

/// Measures every target in every round.
fn measure(targets: &[String], load: &Load, args: &CommonArgs) -> anyhow::Result<Results> {
    let subjects = subjects(targets)?;
    if args.prepare {
        for subject in &subjects {
            eprintln!("writing {} MiB of {}", load.bytes >> 20, subject.name);
            prepare(&subject.target, load).with_context(|| format!("{} cannot be prepared", subject.name))?;
        }
    }
    let pids = pids(args)?;
    let (mut runs, mut whole) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        for subject in &subjects {
            let (run, times) =
                one(subject, load, args, &pids, round).with_context(|| subject.name.clone())?;
            runs.push(run);
            whole.push((subject.name.clone(), times));
        }
    }
    let environment = Environment::read(
        args.save.parent().filter(|p| p.is_dir()).unwrap_or(Path::new(".")),
        String::new(),
        String::new(),
    );
    let (seconds, warm_up) = (args.seconds, args.warm_up);
    let (revision, session, tuning) = (revision(), session(), tuning());
    let results = Results {
        schema: SCHEMA.into(),
        environment,
        revision,
        session,
        tuning,
        disk: disk(),
        load: load.clone(),
        seconds,
        warm_up,
        runs,
    };
    results.write(&args.save)?;
    for subject in &subjects {
        let mut sum = job::histogram();
        for (_, times) in whole.iter().filter(|(name, _)| *name == subject.name) {
            sum.add(times)?;
        }
        let path = args.save.with_extension(format!("{}.hgrm", subject.name));
        std::fs::write(&path, result::hgrm(&sum))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(results)
}

fn subjects(targets: &[String]) -> anyhow::Result<Vec<Subject>> {
    let mut subjects: Vec<Subject> = Vec::new();
    for text in targets {
        let named =
            text.split_once('=').filter(|(name, _)| name.chars().all(|c| c.is_alphanumeric() || c == '-'));
        let target: Target = named.map_or(text.as_str(), |(_, rest)| rest).parse()?;
        let name = named.map_or(target.kind(), |(name, _)| name).to_owned();
        ensure!(
            subjects.iter().all(|other| other.name != name),
            "two targets are called {name}: give them names, as in a={text}"
        );
        subjects.push(Subject { name, target });
    }
    Ok(subjects)
}

/// Writes every byte once, in order.
fn prepare(target: &Target, load: &Load) -> anyhow::Result<()> {
    if let Target::File(path) = target {
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("{} cannot be made", path.display()))?;
        if file.metadata()?.is_file() && file.metadata()?.len() < load.bytes {
            file.set_len(load.bytes)?;
        }
    }
    let writing = Load { read_percent: 0, dsync: false, ..load.clone() };
    let mut ring = job::ring(8)?;
    let mut driver = job::connect(&mut ring, target, &writing)?;
    let (bytes, piece) = (driver.bytes().min(load.bytes), load::IO_BYTES_MAX);
    let mut spare: Vec<_> = (0..8).filter_map(|slot| Some((slot, ring.arena().alloc(32)?))).collect();
    let (mut at, mut flying, mut done) = (0, 0, Vec::new());
    while at < bytes || flying > 0 {
        while at + BLOCK_BYTES <= bytes {
            let Some((slot, mut buf)) = spare.pop() else { break };
            buf.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&ring.random().to_le_bytes()));
            let length = piece.min((bytes - at) / BLOCK_BYTES * BLOCK_BYTES);
            driver.submit(&mut ring, slot, Io { write: true, offset: at, bytes: length }, buf);
            (at, flying) = (at + length, flying + 1);
        }
        if flying == 0 {
            break;
        }
        driver.turn(&mut ring, None, &mut done)?;
        for Done { slot, result, buf } in done.drain(..) {
            result.map_err(anyhow::Error::msg)?;
            flying -= 1;
            spare.push((slot, buf));
        }
    }
    if let Target::File(path) = target {
        std::fs::File::open(path)?.sync_all()?;
    }
    Ok(())
}

fn pids(args: &CommonArgs) -> anyhow::Result<Vec<i32>> {
    let mut pids = args.pid.clone();
    if let Some(dir) = &args.dev {
        pids.extend(crate::dev::DevFile::read(dir)?.pids());
    }
    if let Some(gone) = pids.iter().find(|pid| !process::is_alive(**pid)) {
        bail!("there is no process {gone}");
    }
    Ok(pids)
}

/// CPU seconds and context switches.
type Used = (f64, u64);

/// What processes have used so far.
fn used(pids: &[i32]) -> Vec<Used> {
    pids.iter().map(|pid| (process::cpu_seconds(*pid).unwrap_or(0.0), process::switches(*pid))).collect()
}

/// One measurement.
fn one(
    subject: &Subject,
    load: &Load,
    args: &CommonArgs,
    servers: &[i32],
    round: u32,
) -> anyhow::Result<(Run, Histogram<u64>)> {
    let secs = Duration::from_secs_f64;
    let times = Times { warm_up: secs(args.warm_up), measured: secs(args.seconds) };
    let mut pids = vec![std::process::id().cast_signed()];
    // Nobody serves a file.
    if !matches!(subject.target, Target::File(_)) {
        pids.extend(servers);
    }
    let (tell, ticks) = mpsc::channel();
    let mut watch = Watch::new(&subject.name, round, times);
    let use_of = std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..load.jobs)
            .map(|job| {
                let tell = tell.clone();
                scope.spawn(move || job::run(&subject.target, load, job, times, &tell))
            })
            .collect();
        drop(tell);
        watch.until(&ticks, times.warm_up)?;
        let before = used(&pids);
        watch.until(&ticks, times.warm_up + times.measured)?;
        let after = used(&pids);
        watch.until_end(&ticks)?;
        for job in jobs {
            job.join().map_err(|_| anyhow::anyhow!("a job panicked"))??;
        }
        anyhow::Ok(before.into_iter().zip(after).collect::<Vec<_>>())
    })?;
    let mut all = watch.reads.clone();
    all.add(&watch.writes)?;
    ensure!(!all.is_empty(), "no IO ended within {} s", args.seconds);
    let process = |(nth, (pid, (before, after))): (usize, (&i32, (Used, Used)))| {
        let cpu_s = after.0 - before.0;
        ProcessUse {
            name: if nth == 0 { "client".into() } else { process::name(*pid) },
            cpu_s,
            cpu_us_per_io: cpu_s * 1e6 / all.len() as f64,
            rss_bytes: process::rss_bytes(*pid).unwrap_or(0),
            switches: after.1.saturating_sub(before.1),
        }
    };
    let run = Run {
        subject: subject.name.clone(),
        round,
        iops: all.len() as f64 / args.seconds,
        bytes_s: watch.bytes as f64 / args.seconds,
        reads: Latency::of(&watch.reads),
        writes: Latency::of(&watch.writes),
        unserved: watch.unserved,
        enters: watch.enters,
        processes: pids.iter().zip(use_of).enumerate().map(process).collect(),
        timeline: watch.timeline,
    };
    Ok((run, all))
}

/// What the jobs tell, summed up, and shown while it happens.
struct Watch {
    started: Instant,
    times: Times,
    reads: Histogram<u64>,
    writes: Histogram<u64>,
    bytes: u64,
    unserved: u64,
    enters: u64,
    /// Of the moment that is not over.
    moment: Histogram<u64>,
    moment_bytes: u64,
    moment_from: f64,
    timeline: Vec<Moment>,
    bar: ProgressBar,
}

/// Seconds of a moment of the time line.
const MOMENT_S: f64 = 0.5;

impl Watch {
    fn new(name: &str, round: u32, times: Times) -> Self {
        let bar = ProgressBar::new((times.warm_up + times.measured).as_millis() as u64);
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {msg}").expect("a fixed template");
        bar.set_style(style);
        bar.set_prefix(format!("{name} #{}", round + 1));
        let (reads, writes, moment) = (job::histogram(), job::histogram(), job::histogram());
        let (started, timeline) = (Instant::now(), Vec::new());
        Self {
            started,
            times,
            reads,
            writes,
            bytes: 0,
            unserved: 0,
            enters: 0,
            moment,
            moment_bytes: 0,
            moment_from: 0.0,
            timeline,
            bar,
        }
    }

    /// Takes what comes until so long after the start; an end before that is the jobs' to explain.
    fn until(&mut self, ticks: &Receiver<Tick>, after: Duration) -> anyhow::Result<()> {
        loop {
            let left = after.saturating_sub(self.started.elapsed());
            match ticks.recv_timeout(left) {
                Ok(tick) => self.take(tick)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn until_end(&mut self, ticks: &Receiver<Tick>) -> anyhow::Result<()> {
        while let Ok(tick) = ticks.recv() {
            self.take(tick)?;
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    fn take(&mut self, tick: Tick) -> anyhow::Result<()> {
        self.enters = self.enters.max(tick.enters);
        if !tick.counts {
            return Ok(());
        }
        self.reads.add(&tick.reads)?;
        self.writes.add(&tick.writes)?;
        self.moment.add(&tick.reads)?;
        self.moment.add(&tick.writes)?;
        self.bytes += tick.bytes;
        self.moment_bytes += tick.bytes;
        self.unserved += tick.unserved;
        let now = self.started.elapsed().as_secs_f64() - self.times.warm_up.as_secs_f64();
        if now - self.moment_from >= MOMENT_S {
            self.end_moment(now);
        }
        Ok(())
    }

    fn end_moment(&mut self, now: f64) {
        let length = now - self.moment_from;
        let us = |part| self.moment.value_at_quantile(part) as f64 / 1000.0;
        let (iops, p99_us) = (self.moment.len() as f64 / length, us(0.99));
        self.bar.set_position((self.started.elapsed()).as_millis() as u64);
        self.bar.set_message(format!(
            "{iops:.0} IOPS, {:.1} MB/s, p50 {:.0} p99 {p99_us:.0} p99.9 {:.0} us",
            self.moment_bytes as f64 / length / 1e6,
            us(0.5),
            us(0.999)
        ));
        self.timeline.push(Moment { s: now, iops, p99_us });
        self.moment.reset();
        (self.moment_bytes, self.moment_from) = (0, now);
    }
}

/// Prints and plots.
fn show(results: &Results, args: &CommonArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(results))
            .with_context(|| format!("{} cannot be written", path.display()))?;
    }
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(results)?),
        Output::Text => {
            println!("{}\n{}\n\nkept in {}", results.environment.line(), table(results), args.save.display())
        }
    }
    Ok(())
}

/// Medians over the rounds, a row a subject.
fn table(results: &Results) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "subject",
        "rounds",
        "IOPS",
        "MB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "x first",
        "client us/IO",
        "server us/IO",
    ]);
    let subjects = results.subjects();
    let iops = |name: &str| median(results.runs_of(name).map(|run| run.iops));
    for name in &subjects {
        let of = |value: &dyn Fn(&Run) -> Option<f64>| {
            let values: Vec<f64> = results.runs_of(name).filter_map(value).collect();
            (!values.is_empty()).then(|| median(values))
        };
        let latency = |value: fn(&Latency) -> f64| of(&|run| run.main_latency().map(value));
        let shown =
            |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        table.add_row([
            (*name).to_owned(),
            results.runs_of(name).count().to_string(),
            shown(of(&|run| Some(run.iops)), 0),
            shown(of(&|run| Some(run.bytes_s / 1e6)), 1),
            shown(latency(|l| l.p50_us), 0),
            shown(latency(|l| l.p99_us), 0),
            shown(latency(|l| l.p999_us), 0),
            format!("{:.2}", iops(name) / iops(subjects[0])),
            shown(of(&|run| run.processes.first().map(|client| client.cpu_us_per_io)), 1),
            shown(of(&Run::server_cpu_us_per_io), 1),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The revision of the source that this program lies in; empty where there is none.
fn revision() -> String {
    let folder = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.to_owned()));
    let output = folder.and_then(|dir| {
        Command::new("git").arg("-C").arg(dir).args(["describe", "--always", "--dirty"]).output().ok()
    });
    output
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The first half of the kernel's boot id.
fn session() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.chars().take(18).collect()
}

/// What `ashlar tune check` finds wanting, by this same program.
fn tuning() -> Vec<String> {
    let output = std::env::current_exe()
        .ok()
        .and_then(|bin| Command::new(bin).args(["tune", "check", "-o", "json"]).output().ok());
    let json: serde_json::Value =
        output.and_then(|output| serde_json::from_slice(&output.stdout).ok()).unwrap_or_default();
    let findings = json["findings"].as_array().cloned().unwrap_or_default();
    let bad = findings.iter().filter(|finding| finding["state"] == "bad");
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    bad.map(|finding| {
        format!(
            "{}: {}, wanted {}",
            word(&finding["tuner"]),
            word(&finding["found"]),
            word(&finding["wanted"])
        )
    })
    .collect()
}

/// Each disk's queue, a line a disk.
fn disk() -> Vec<String> {
    let read = |disk: &Path, file: &str| {
        std::fs::read_to_string(disk.join("queue").join(file)).unwrap_or_default().trim().to_owned()
    };
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten().map(|entry| entry.path());
    let real = disks.filter(|disk| disk.join("device").exists());
    let line = |disk: PathBuf| {
        let name = disk.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let facts =
            ["scheduler", "write_cache", "nr_requests"].map(|file| format!("{file} {}", read(&disk, file)));
        format!("{name}: {}", facts.join(", "))
    };
    let mut lines: Vec<_> = real.map(line).collect();
    lines.sort();
    lines
}

fn parse_sizes(text: &str) -> Result<Sizes, String> {
    text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of IOs a second"))?;
    if (1.0..=1e8).contains(&rate) { Ok(rate) } else { Err("between 1 and 100,000,000".into()) }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    if (0.1..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("between 0.1 and 86400".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rival::QemuNbd;

    fn common(dir: &Path) -> CommonArgs {
        let (save, html) = (dir.join("result.json"), Some(dir.join("report.html")));
        let (pid, dev, output) = (Vec::new(), None, Output::Json);
        CommonArgs { seconds: 0.6, warm_up: 0.1, rounds: 2, prepare: true, pid, dev, save, html, output }
    }

    fn mixed() -> Load {
        Load {
            order: Order::Zipfian,
            read_percent: 60,
            sizes: "4K:2,20K:1,128K:1".parse().expect("well formed"),
            depth: 8,
            jobs: 2,
            rate: None,
            dsync: false,
            verify: true,
            bytes: 8 << 20,
            seed: 3,
        }
    }

    #[test]
    fn a_file_and_a_server_are_measured_in_turns_and_what_is_read_was_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let (file, served) = (dir.path().join("raw"), dir.path().join("served"));
        std::fs::File::create(&served)?.set_len(8 << 20)?;
        let mut targets = vec![format!("raw=file:{}", file.display())];
        let server = match QemuNbd::version() {
            Some(_) => Some(QemuNbd::serve(&served, dir.path())?),
            None => {
                println!("SKIPPED the server: qemu-nbd is not installed");
                None
            }
        };
        let socket = dir.path().join("qemu-nbd.sock");
        let mut args = common(dir.path());
        if let Some(server) = &server {
            targets.push(format!("qemu=nbd+unix:///raw?socket={}", socket.display()));
            args.pid.push(server.pid());
        }
        let results = measure(&targets, &mixed(), &args)?;
        let names: Vec<_> = results.runs.iter().map(|run| run.subject.as_str()).collect();
        assert_eq!(
            names,
            if server.is_some() { ["raw", "qemu", "raw", "qemu"].as_slice() } else { &["raw", "raw"] }
        );
        for run in &results.runs {
            let (reads, writes) =
                (run.reads.as_ref().context("reads")?, run.writes.as_ref().context("writes")?);
            let ios = (reads.ios + writes.ios) as f64;
            assert!(
                (run.iops - ios / 0.6).abs() < 1.0 && ios > 0.0,
                "{}: {} IOPS of {ios} IOs",
                run.subject,
                run.iops
            );
            assert!(reads.p50_us > 0.0 && reads.p50_us <= reads.p99_us && reads.p99_us <= reads.max_us);
            let servers = if run.subject == "raw" { 0 } else { args.pid.len() };
            assert_eq!(run.processes.len(), 1 + servers);
        }
        show(&results, &args)?;
        assert!(std::fs::read_to_string(dir.path().join("report.html"))?.contains("</html>"));
        assert_eq!(Results::read(&args.save)?.runs.len(), results.runs.len());
        assert!(dir.path().join("result.raw.hgrm").is_file());
        Ok(())
    }

    #[test]
    fn an_open_loop_shows_its_queue_and_keeps_its_rate() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let targets = [format!("file:{}", dir.path().join("raw").display())];
        let load = Load {
            verify: false,
            jobs: 1,
            sizes: "4K".parse()?,
            rate: Some(200.0),
            read_percent: 100,
            ..mixed()
        };
        let args = CommonArgs { rounds: 1, ..common(dir.path()) };
        let slow = measure(&targets, &load, &args)?.runs.remove(0);
        // 140 arrive in 0.7 s, some 20 of them in the warm-up, whatever the machine does meanwhile.
        let arrived = slow.main_latency().map_or(0, |latency| latency.ios) + slow.unserved;
        assert!((100..=140).contains(&arrived), "{arrived}");
        // No disk takes a hundred million IOs a second, one at a time: nearly all stay unserved.
        let load = Load { rate: Some(1e8), depth: 1, ..load };
        let fast = measure(&targets, &load, &args)?.runs.remove(0);
        let latency = fast.main_latency().context("some were served")?;
        assert!(fast.unserved > 30_000_000, "{}", fast.unserved);
        // Each waited for all before it, since it should have begun at the start.
        assert!(latency.p50_us > 90_000.0, "{latency:?}");
        Ok(())
    }

    #[test]
    fn a_target_that_is_not_there_is_named_in_one_line() {
        let dir = tempfile::tempdir().expect("a folder");
        let args = CommonArgs { prepare: false, ..common(dir.path()) };
        for target in ["file:/nonexistent/x", "nbd+unix:///v?socket=/nonexistent/s"] {
            let error = measure(&[format!("a={target}")], &mixed(), &args).expect_err("not there");
            let line = format!("{error:#}");
            assert!(
                line.starts_with("a: ") && line.contains("/nonexistent/") && !line.contains('\n'),
                "{line}"
            );
        }
        assert!(subjects(&["file:/a".into(), "file:/b".into()]).is_err(), "two of one name");
    }
}
