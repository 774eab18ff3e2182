//! `ashlar bench run` and its kin: workloads against one or more targets, in alternating rounds, by our own clients on
//! the reactor that the targets use, or by fio.
//!
//! Invariant: figures are worked out once, in [`result`] and [`summary`], and printed, compared and plotted from there.

pub mod compare;
pub(crate) mod driver;
pub mod html;
pub mod job;
pub mod load;
pub mod measure;
mod plot;
pub mod result;
pub mod steady;
pub mod summary;
pub mod sweep;
pub mod target;

use crate::cluster::SETTLE_LIMIT;
use crate::dev::DevFile;
use crate::environment::{self, Environment, FileFacts};
use crate::fio::Fio;
use crate::{Output, fio, parse_bytes, process, report};
use anyhow::{Context, ensure};
use clap::Args;
use comfy_table::presets;
use load::{Load, OPEN_DEPTH, Order, Sizes};
use measure::{Client, Measured, Plan, SETTLE_MAX, Subject, prepare};
use result::{Results, SCHEMA};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use target::Target;

/// What `bench run` takes.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  ashlar bench run file:/srv/x --prepare --size 1G --depth 32\n  \
    ashlar bench run raw=file:/srv/x vol=dev:nvme --dev /srv/d --prepare --rounds 5 --html report.html\n  \
    ashlar bench run nbd://host/vol0 --rate 20000 --read 70 --block 4K:80,64K:20\n  \
    ashlar bench run ashlar://vol0 --mds host:7400 --order zipfian --read 0 --verify\n\n\
    A closed loop (the default) keeps --depth IOs in flight. An open loop (--rate) lets IOs arrive whatever became of\n\
    those before, and counts latency from when each should have begun, so that a stall is felt by all it delayed.")]
pub struct RunArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    common: CommonArgs,
}

/// What `bench fio` takes.
#[derive(Args, Debug)]
#[command(
    after_help = "Each measurement leaves its job file and fio's own JSON in --keep; run one again by hand:\n  \
    fio --output-format=json+ fio-jobs/raw-randread_4K_QD32.fio\n\n\
    Files go by fio's engine io_uring, NBD exports by its engine nbd. fio speaks no NVMe/TCP: attach the volume with\n\
    `nvme connect` and give the device as file:/dev/nvme1n1."
)]
pub struct FioArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Where job files and fio's JSON go.
    #[arg(long, value_name = "DIR", default_value = "fio-jobs")]
    keep: PathBuf,
    #[command(flatten)]
    common: CommonArgs,
}

/// What is measured.
#[derive(Args, Debug)]
pub struct TargetArgs {
    /// What is measured: [NAME=]file:PATH, nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH,
    /// nvme://HOST[:PORT]/NQN, ashlar://VOLUME, or dev:nvme, dev:nbd, dev:nbd+unix, dev:ashlar with --dev.
    /// Several are measured in turns, A B, B A, A B.
    #[arg(value_name = "TARGET", required = true)]
    targets: Vec<String>,
    /// Processes of the servers, whose CPU time is counted: of the target NAME, or of all that are served and not of --dev.
    #[arg(long, value_name = "[NAME=]PID", value_parser = ServerPid::parse)]
    pid: Vec<ServerPid>,
    /// A dev cluster, whose processes are counted for dev:... and its own ashlar://...
    #[arg(long, value_name = "DIR")]
    dev: Option<PathBuf>,
    /// The MDS, for ashlar://VOLUME.
    #[arg(long, value_name = "HOST:PORT", env = "ASHLAR_MDS")]
    mds: Option<String>,
}

/// A process of a server.
#[derive(Clone, Debug)]
struct ServerPid {
    /// The target that it serves; absent when that is not said.
    subject: Option<String>,
    pid: i32,
}

impl ServerPid {
    fn parse(text: &str) -> Result<Self, String> {
        let (subject, pid) = match text.rsplit_once('=') {
            Some((name, pid)) => (Some(name.to_owned()), pid),
            None => (None, text),
        };
        let pid = pid.parse().map_err(|_| format!("`{pid}` is no process: write PID or NAME=PID"))?;
        Ok(Self { subject, pid })
    }
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
    /// IOs in flight at most, for each job [default: 1, or 128 with --rate].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    depth: Option<u32>,
    /// Connections, each with a thread of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: u32,
    /// Open loop: so many IOs arrive a second in all, and latency counts from when each should have begun.
    #[arg(long, value_name = "IOPS", value_parser = parse_rate)]
    rate: Option<f64>,
    /// Writes of a file are durable when they complete (RWF_DSYNC).
    #[arg(long)]
    dsync: bool,
    /// Compare what is read with what this run has written, and read all of that back in the end.
    #[arg(long)]
    verify: bool,
    /// The client polls for completions for up to 200 us before it sleeps, and takes a processor for that.
    #[arg(long)]
    poll: bool,
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
    #[command(flatten)]
    keep: KeepArgs,
}

/// Where results go.
#[derive(Args, Clone, Debug)]
pub struct KeepArgs {
    /// Where the result goes; beside it, the distributions as .hgrm and .hlog files.
    #[arg(long, value_name = "FILE", default_value = "result.json")]
    save: PathBuf,
    /// Also a report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also the table as a Markdown page.
    #[arg(long, value_name = "FILE")]
    write_markdown: Option<PathBuf>,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

impl KeepArgs {
    /// Makes the folders of what is kept, before anything is measured for it.
    fn make_folders(&self) -> anyhow::Result<()> {
        let files = [Some(&self.save), self.html.as_ref(), self.write_markdown.as_ref()];
        for folder in files.into_iter().flatten().filter_map(|file| file.parent()) {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("{} cannot be made", folder.display()))?;
        }
        Ok(())
    }
}

/// Runs `bench run`.
///
/// # Errors
/// A target that cannot be reached, an IO that fails, or data that is not what was written.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let results = measure(&args.targets.subjects()?, &[args.load.load()], &args.common, &Client::Own)?;
    show(&results, &args.common.keep, "ashlar bench run")?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `bench fio`.
///
/// # Errors
/// fio or an engine is missing, fio fails, or a target cannot be reached.
pub fn fio(args: &FioArgs) -> anyhow::Result<ExitCode> {
    let subjects = args.targets.subjects()?;
    let fio = Fio::probe(&args.keep, subjects.iter().map(|subject| &subject.target))?;
    let results = measure(&subjects, &[args.load.load()], &args.common, &Client::Fio(fio))?;
    show(&results, &args.common.keep, "ashlar bench fio")?;
    if args.common.keep.output == Output::Text {
        println!("job files and fio's own JSON: {}", args.keep.display());
    }
    Ok(ExitCode::SUCCESS)
}

impl LoadArgs {
    fn load(&self) -> Load {
        Load {
            order: self.order,
            read_percent: self.read,
            sizes: self.block.clone(),
            depth: self.depth.unwrap_or(if self.rate.is_some() { OPEN_DEPTH } else { 1 }),
            jobs: self.jobs,
            rate: self.rate,
            dsync: self.dsync,
            verify: self.verify,
            poll: self.poll,
            bytes: self.size,
            seed: self.seed,
        }
    }
}

impl TargetArgs {
    /// The subjects that the command line names.
    fn subjects(&self) -> anyhow::Result<Vec<Subject>> {
        let dev = self.dev.as_deref().map(DevFile::read).transpose()?;
        let mut subjects: Vec<Subject> = Vec::new();
        for text in &self.targets {
            let subject = subject(text, dev.as_ref(), self.mds.as_deref())?;
            let name = &subject.name;
            ensure!(
                subjects.iter().all(|other| other.name != *name),
                "two targets are called {name}: give them names, as in a={text}"
            );
            subjects.push(subject);
        }
        give_pids(&mut subjects, &self.pid)?;
        for subject in &mut subjects {
            let gone = subject.pids.iter().find(|pid| !process::is_alive(**pid));
            ensure!(gone.is_none(), "there is no process {}", gone.copied().unwrap_or(0));
            subject.flushes = !subject.pids.is_empty();
        }
        Ok(subjects)
    }
}

/// A subject with those processes that --dev tells of.
fn subject(text: &str, dev: Option<&DevFile>, mds: Option<&str>) -> anyhow::Result<Subject> {
    let named =
        text.split_once('=').filter(|(name, _)| name.chars().all(|c| c.is_alphanumeric() || c == '-'));
    let address = named.map_or(text, |(_, rest)| rest);
    let target = Target::parse(address, dev, mds)?;
    let name = named.map_or(target.kind(), |(name, _)| name).to_owned();
    let of_dev = |dev: &&DevFile| match &target {
        Target::Volume { mds, .. } => mds.as_ref() == Some(&dev.mds.endpoint),
        _ => address.starts_with("dev:"),
    };
    let pids = dev.filter(of_dev).map(DevFile::pids).unwrap_or_default();
    Ok(Subject { name, target, pids, flushes: false })
}

/// Gives each process of --pid to the subject that it names, or else to all that are served and have none by --dev.
fn give_pids(subjects: &mut [Subject], pids: &[ServerPid]) -> anyhow::Result<()> {
    let served = |subject: &Subject| !matches!(subject.target, Target::File(_));
    let of_dev: Vec<bool> = subjects.iter().map(|subject| !subject.pids.is_empty()).collect();
    for one in pids {
        let mut taken = false;
        for (subject, of_dev) in subjects.iter_mut().zip(&of_dev) {
            let meant = one.subject.as_ref().map_or(!of_dev, |name| *name == subject.name);
            if meant && served(subject) {
                taken = true;
                if !subject.pids.contains(&one.pid) {
                    subject.pids.push(one.pid);
                }
            }
        }
        match &one.subject {
            Some(name) => ensure!(taken, "--pid {name}={}: no target that is served has that name", one.pid),
            None => ensure!(taken, "--pid {0}: whom does it serve? Say NAME={0}", one.pid),
        }
    }
    Ok(())
}

/// The loads over no more than the smallest of the targets holds: over different ranges they cannot be compared.
fn within(loads: &[Load], subjects: &[Subject], prepares: bool) -> anyhow::Result<Vec<Load>> {
    let mut loads = loads.to_vec();
    let Some(deepest) = loads.iter().max_by_key(|load| load.depth).cloned() else { return Ok(loads) };
    for subject in subjects {
        let is_made = |path: &Path| prepares && std::fs::metadata(path).map_or(true, |file| file.is_file());
        let bytes = match &subject.target {
            // Made as long as it must be.
            Target::File(path) if is_made(path) => continue,
            // Spoken by fio alone, which says so.
            Target::Rbd(_) => continue,
            target => job::bytes_of(target, &deepest).with_context(|| subject.name.clone())?,
        };
        let smaller = loads.iter_mut().filter(|load| load.bytes > bytes);
        if smaller.map(|load| load.bytes = bytes).count() > 0 {
            eprintln!("note: {} holds {} MiB, so all are measured over no more", subject.name, bytes >> 20);
        }
    }
    Ok(loads)
}

/// Prepares, measures and keeps.
fn measure(
    subjects: &[Subject],
    loads: &[Load],
    args: &CommonArgs,
    client: &Client,
) -> anyhow::Result<Results> {
    loads.iter().try_for_each(Load::check)?;
    let loads = &within(loads, subjects, args.prepare)?;
    if let Client::Fio(_) = client {
        fio::check(subjects, loads)?;
    }
    args.keep.make_folders()?;
    if args.prepare {
        let bytes = loads.iter().map(|load| load.bytes).max().unwrap_or(0);
        subjects.iter().try_for_each(|subject| prepare(subject, bytes))?;
        settle(subjects, SETTLE_LIMIT);
    }
    for (name, _) in files(subjects).filter(|(_, path)| has_holes(path)) {
        eprintln!("note: {name} has holes, whose reads cost no disk: --prepare fills them");
    }
    if is_dsync_idle(subjects, loads) {
        eprintln!("note: --dsync has no effect: no target is a file that is written");
    }
    let CommonArgs { seconds, warm_up, rounds, .. } = *args;
    let plan = Plan { client, subjects, loads, seconds, warm_up, rounds, settle_max: SETTLE_MAX };
    let mut results = nothing_yet(&plan, &args.keep);
    for (nth, load) in loads.iter().enumerate() {
        let plan = Plan { loads: std::slice::from_ref(load), ..plan };
        let measured = plan.measure().map_err(|error| match nth {
            0 => error,
            _ => error.context(format!(
                "{} failed; what {nth} of {} loads before it showed is kept in {}",
                load.label(),
                loads.len(),
                args.keep.save.display()
            )),
        })?;
        keep(&mut results, measured, loads.len() > 1, &args.keep)?;
        // The plan knows only one load, and would not wait for what this one left to be done.
        if load.read_percent < 100 && nth + 1 < loads.len() {
            settle(subjects, SETTLE_MAX);
        }
    }
    Ok(results)
}

/// Whether syncing was asked for where there is nothing to sync: only writes of files are.
fn is_dsync_idle(subjects: &[Subject], loads: &[Load]) -> bool {
    let synced = |load: &&Load| load.dsync;
    let written = loads.iter().filter(synced).any(|load| load.read_percent < 100);
    loads.iter().any(|load| load.dsync) && !(written && files(subjects).next().is_some())
}

/// Whether a file takes up fewer blocks than it is long; a device never does.
fn has_holes(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.blocks() * 512 < file.len())
}

/// Waits until all servers have done what was put off, for so long at most.
fn settle(subjects: &[Subject], most: Duration) {
    let pids: BTreeSet<i32> = subjects.iter().flat_map(|subject| subject.pids.iter().copied()).collect();
    if !pids.is_empty() {
        process::settle_or_say(&Vec::from_iter(pids), most);
    }
}

/// The results of a plan before its first measurement.
fn nothing_yet(plan: &Plan<'_>, args: &KeepArgs) -> Results {
    let folder = args.save.parent().filter(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let place = files(plan.subjects).next().map_or(folder, |(_, path)| path);
    results(plan, Environment::read(place, String::new(), String::new()), Vec::new())
}

/// Adds all rounds of some subjects under one load, and writes the results, and for each subject a distribution and a log
/// of its moments: what was measured is kept whatever fails later. Of several loads the files' names tell which.
fn keep(
    results: &mut Results,
    measured: Vec<Measured>,
    several: bool,
    args: &KeepArgs,
) -> anyhow::Result<()> {
    let mut subjects: BTreeMap<&str, Vec<&Measured>> = BTreeMap::new();
    for one in &measured {
        subjects.entry(&one.run.subject).or_default().push(one);
    }
    for (subject, rounds) in subjects {
        let mut sum = job::histogram();
        let mut log = result::HLOG_HEAD.to_owned();
        for one in &rounds {
            sum.add(&one.times)?;
            log += one.intervals.lines();
        }
        let which = if several {
            format!(".{}", rounds[0].run.load.label().replace([' ', ',', '/'], "_"))
        } else {
            String::new()
        };
        let beside = |end: &str| args.save.with_extension(format!("{subject}{which}.{end}"));
        report::write(&beside("hgrm"), &result::hgrm(&sum))?;
        report::write(&beside("hlog"), &log)?;
    }
    results.runs.extend(measured.into_iter().map(|one| one.run));
    results.write(&args.save)
}

/// The subjects that are files, and where they lie.
fn files(subjects: &[Subject]) -> impl Iterator<Item = (&str, &Path)> {
    subjects.iter().filter_map(|subject| match &subject.target {
        Target::File(path) => Some((subject.name.as_str(), path.as_path())),
        _ => None,
    })
}

/// Measures a plan.
///
/// # Errors
/// See [`Plan::measure`].
pub fn measured(plan: &Plan<'_>, environment: Environment) -> anyhow::Result<Results> {
    Ok(results(plan, environment, plan.measure()?.into_iter().map(|one| one.run).collect()))
}

/// What was measured, with where and under what.
pub fn results(plan: &Plan<'_>, environment: Environment, runs: Vec<result::Run>) -> Results {
    if environment.debug_build {
        eprintln!("note: this is a debug build; its figures mean little, use cargo run --release");
    }
    Results {
        schema: SCHEMA.into(),
        environment,
        revision: environment::revision(),
        session: environment::session(),
        tuning: environment::tuning(),
        disk: environment::disks(),
        files: files(plan.subjects).map(|(name, path)| FileFacts::read(name, path)).collect(),
        client: plan.client.name(),
        seconds: plan.seconds,
        warm_up: plan.warm_up,
        runs,
        steady: Vec::new(),
        transient: Vec::new(),
    }
}

/// Prints, and writes the pages that were asked for.
fn show(results: &Results, args: &KeepArgs, command: &str) -> anyhow::Result<()> {
    write_pages(results, args, command)?;
    print(results, args)
}

fn write_pages(results: &Results, args: &KeepArgs, command: &str) -> anyhow::Result<()> {
    if let Some(path) = &args.html {
        report::write(path, &html::page(results))?;
    }
    if let Some(path) = &args.write_markdown {
        let written = format!("Written by `{command} --write-markdown`; do not edit figures by hand.");
        let title = path.file_stem().unwrap_or_default().to_string_lossy();
        let (line, setting) = (results.environment.line(), summary::setting(results));
        let table = summary::table(&summary::rows(results), &first(results), presets::ASCII_MARKDOWN);
        let notes: String = summary::notes(results).iter().map(|note| format!("\nNote: {note}.\n")).collect();
        report::write(path, &format!("# {title}\n\n{written}\n\n{line}\n\n{setting}\n\n{table}\n{notes}"))?;
    }
    Ok(())
}

/// The subject whose IOPS the others' are divided by.
fn first(results: &Results) -> Vec<&str> {
    results.subjects().into_iter().take(1).collect()
}

fn print(results: &Results, args: &KeepArgs) -> anyhow::Result<()> {
    let notes: String = summary::notes(results).iter().map(|note| format!("\nnote: {note}")).collect();
    match args.output {
        Output::Json => {
            println!("{}", serde_json::to_string_pretty(results)?);
            eprintln!("{}", notes.trim_start());
        }
        Output::Text => {
            let (line, setting) = (results.environment.line(), summary::setting(results));
            let rows = summary::rows(results);
            let table = summary::table(&rows, &first(results), presets::UTF8_FULL_CONDENSED);
            // Of a grid, this is for the page.
            let lone = results.loads().len() == 1;
            let processes = if lone {
                format!("\nprocesses, in the first round:\n{}", summary::process_table(results))
            } else {
                String::new()
            };
            println!("{line}\n{setting}\n{table}{notes}{processes}\n\nkept in {}", args.save.display());
        }
    }
    Ok(())
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
    use crate::rival::{Rival, Server};

    fn common(dir: &Path) -> CommonArgs {
        let (save, html) = (dir.join("result.json"), Some(dir.join("made/report.html")));
        let (write_markdown, output) = (Some(dir.join("page.md")), Output::Json);
        let keep = KeepArgs { save, html, write_markdown, output };
        CommonArgs { seconds: 0.6, warm_up: 0.1, rounds: 2, prepare: true, keep }
    }

    fn subjects_of(targets: &[String], pids: &[i32]) -> anyhow::Result<Vec<Subject>> {
        let targets = targets.to_vec();
        let pid = pids.iter().map(|pid| ServerPid { subject: None, pid: *pid }).collect();
        TargetArgs { targets, pid, dev: None, mds: None }.subjects()
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
            poll: false,
            verify: true,
            bytes: 8 << 20,
            seed: 3,
        }
    }

    #[test]
    fn a_file_and_a_server_are_measured_in_turns_and_what_is_read_was_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let file = dir.path().join("raw");
        let mut targets = vec![format!("raw=file:{}", file.display())];
        let server = match Server::QemuNbd.version() {
            Some(_) => Some(Rival::serve(Server::QemuNbd, dir.path(), 8 << 20)?),
            None => {
                println!("SKIPPED the server: qemu-nbd is not installed");
                None
            }
        };
        let (args, mut pids) = (common(dir.path()), Vec::new());
        if let Some(server) = &server {
            targets.push(format!("qemu=nbd+unix:///raw?socket={}", server.socket().display()));
            pids.push(server.pid());
        }
        let results = measure(&subjects_of(&targets, &pids)?, &[mixed()], &args, &Client::Own)?;
        let names: Vec<_> = results.runs.iter().map(|run| run.subject.as_str()).collect();
        assert_eq!(
            names,
            if server.is_some() { ["raw", "qemu", "qemu", "raw"].as_slice() } else { &["raw", "raw"] }
        );
        for run in &results.runs {
            let (reads, writes) =
                (run.reads.as_ref().context("reads")?, run.writes.as_ref().context("writes")?);
            let ios = (reads.ios + writes.ios) as f64;
            // Those in flight at either end are in one of the two: 2 jobs of 8.
            assert!(
                (run.iops * 0.6 - ios).abs() < 16.5 && ios > 0.0,
                "{}: {} IOPS of {ios} IOs",
                run.subject,
                run.iops
            );
            assert!(reads.p50_us > 0.0 && reads.p50_us <= reads.p99_us && reads.p99_us <= reads.max_us);
            let servers = if run.subject == "raw" { 0 } else { pids.len() };
            assert_eq!(run.processes.len(), 1 + servers);
            assert!(
                run.verified.is_some_and(|blocks| blocks > 0) && run.line().ends_with(" blocks verified")
            );
        }
        show(&results, &args.keep, "ashlar bench run")?;
        assert!(std::fs::read_to_string(dir.path().join("page.md"))?.contains("| zipfrw 60 % reads"));
        assert!(std::fs::read_to_string(dir.path().join("made/report.html"))?.contains("</html>"));
        assert_eq!(Results::read(&args.keep.save)?.runs.len(), results.runs.len());
        let subjects: Vec<_> = results.files.iter().map(|facts| facts.subject.as_str()).collect();
        assert_eq!(subjects, ["raw"], "a server is no file");
        assert_eq!(results.environment.file_system, results.files[0].file_system);
        assert!(dir.path().join("result.raw.hgrm").is_file());
        let log = std::fs::read(dir.path().join("result.raw.hlog"))?;
        let raw = results.runs.iter().filter(|run| run.subject == "raw");
        let ios: u64 = raw.flat_map(|run| [&run.reads, &run.writes]).flatten().map(|one| one.ios).sum();
        assert_eq!(result::hlog_ios(&log)?, ios, "the log has every IO of both rounds");
        Ok(())
    }

    #[test]
    fn fio_measures_too_and_leaves_job_files_that_run_again() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let targets = [format!("raw=file:{}", dir.path().join("raw").display())];
        let (subjects, args) = (subjects_of(&targets, &[])?, common(dir.path()));
        let jobs = dir.path().join("jobs");
        let fio = match Fio::probe(&jobs, subjects.iter().map(|subject| &subject.target)) {
            Ok(fio) => fio,
            Err(why) => {
                println!("SKIPPED fio: {why:#}");
                return Ok(());
            }
        };
        let load = Load { verify: false, sizes: "4K:3,64K:1".parse()?, ..mixed() };
        let results = measure(&subjects, std::slice::from_ref(&load), &args, &Client::Fio(fio))?;
        assert!(results.client.starts_with("fio-"), "{}", results.client);
        for run in &results.runs {
            let (reads, writes) =
                (run.reads.as_ref().context("reads")?, run.writes.as_ref().context("writes")?);
            let ios = (reads.ios + writes.ios) as f64;
            // fio divides by the time that it took, not by the time that it was given.
            assert!((run.iops / (ios / 0.6) - 1.0).abs() < 0.5, "{} IOPS of {ios} IOs", run.iops);
            assert!(reads.p50_us > 0.0 && reads.p50_us <= reads.p99_us);
            assert!(run.processes[0].cpu_s > 0.0, "fio's own CPU is counted");
        }
        let job = std::fs::read_dir(&jobs)?.flatten().map(|entry| entry.path());
        let job = job.filter(|path| path.extension().is_some_and(|end| end == "fio"));
        for job in job.collect::<Vec<_>>() {
            let status = std::process::Command::new("fio").arg("--parse-only").arg(&job).output()?.status;
            assert!(status.success(), "{}", job.display());
        }
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
        let slow = measure(&subjects_of(&targets, &[])?, std::slice::from_ref(&load), &args, &Client::Own)?
            .runs
            .remove(0);
        // 140 arrive in 0.7 s, 20 of them in the warm-up, whatever the machine does meanwhile.
        let arrived = slow.main_latency().map_or(0, |latency| latency.ios);
        assert!((119..=121).contains(&arrived), "{arrived}");
        // No disk takes a hundred million IOs a second, one at a time: nearly all stay unserved.
        let load = Load { rate: Some(1e8), depth: 1, ..load };
        let fast = measure(&subjects_of(&targets, &[])?, std::slice::from_ref(&load), &args, &Client::Own)?
            .runs
            .remove(0);
        let latency = fast.main_latency().context("some were served")?;
        assert!(fast.unserved > 30_000_000, "{}", fast.unserved);
        // Each waited for all before it, since it should have begun at the start.
        assert!(latency.p50_us > 90_000.0, "{latency:?}");
        Ok(())
    }

    #[test]
    fn an_open_loop_has_room_for_what_waits_and_a_closed_one_is_alone() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            load: LoadArgs,
        }
        let load = |line: &str| <Line as clap::Parser>::parse_from(line.split(' ')).load.load();
        assert_eq!(load("x --read 0").depth, 1);
        assert_eq!(load("x --rate 1000").depth, 128);
        assert_eq!(load("x --rate 1000 --depth 4").depth, 4);
    }

    #[test]
    fn dsync_without_a_file_or_a_write_has_no_effect() -> anyhow::Result<()> {
        let (file, nbd) = ("raw=file:/x".to_owned(), "nbd+unix:///v?socket=/s".to_owned());
        let both = subjects_of(&[file, nbd], &[])?;
        let load = |read_percent, dsync| vec![Load { dsync, ..Load::random_4k(read_percent, 1, 4096) }];
        assert!(!is_dsync_idle(&both, &load(0, true)) && !is_dsync_idle(&both[1..], &load(0, false)));
        assert!(is_dsync_idle(&both[1..], &load(0, true)) && is_dsync_idle(&both, &load(100, true)));
        Ok(())
    }

    #[test]
    fn what_was_measured_before_a_load_failed_is_kept() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let subjects = subjects_of(&[format!("raw=file:{}", dir.path().join("raw").display())], &[])?;
        // The second load's IOs are larger than its part of the file.
        let first = Load::random_4k(0, 1, 1 << 20);
        let second = Load { jobs: 64, sizes: "128K".parse()?, ..first.clone() };
        let args = CommonArgs { seconds: 0.2, rounds: 1, ..common(dir.path()) };
        let error =
            measure(&subjects, &[first.clone(), second], &args, &Client::Own).err().context("too large")?;
        let line = format!("{error:#}");
        assert!(line.starts_with("randwrite 128K QD1 x64 failed") && line.contains("raw: "), "{line}");
        assert_eq!(Results::read(&args.keep.save)?.loads(), [&first]);
        assert!(dir.path().join("result.raw.randwrite_4K_QD1.hgrm").is_file());
        Ok(())
    }

    #[test]
    fn a_file_with_holes_is_told_from_one_that_was_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let file = dir.path().join("raw");
        std::fs::File::create(&file)?.set_len(1 << 20)?;
        assert!(has_holes(&file));
        prepare(&Subject::file("raw", &file), 1 << 20)?;
        assert!(!has_holes(&file) && !has_holes(Path::new("/dev/null")));
        Ok(())
    }

    #[test]
    fn processes_count_for_those_whom_they_serve() -> anyhow::Result<()> {
        let (dir, own) = (tempfile::tempdir()?, std::process::id().cast_signed());
        let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
        let other = child.id().cast_signed();
        let dev = serde_json::json!({
            "mds": {"endpoint": "127.0.0.1:1", "pid": own},
            "targets": [{"id": 1, "pid": own, "dir": "/x"}],
        });
        std::fs::write(dir.path().join("dev.json"), dev.to_string())?;
        let pids = |targets: &[&str], pid: &[String], mds: Option<&str>| -> anyhow::Result<Vec<Vec<i32>>> {
            let pid = pid.iter().map(|text| ServerPid::parse(text).map_err(anyhow::Error::msg));
            let (targets, pid) = (targets.iter().map(ToString::to_string), pid.collect::<Result<_, _>>()?);
            let (targets, mds) = (targets.collect(), mds.map(str::to_owned));
            let args = TargetArgs { targets, pid, dev: Some(dir.path().to_owned()), mds };
            Ok(args.subjects()?.into_iter().map(|subject| subject.pids).collect())
        };
        let all = ["raw=file:/a", "vol=ashlar://v", "a=nbd+unix:///v?socket=/s", "b=nbd+unix:///v?socket=/t"];
        let (none, theirs) = (vec![], vec![other]);
        let found = pids(&all, &[other.to_string(), other.to_string()], None)?;
        assert_eq!(found, [none.clone(), vec![own, own], theirs.clone(), theirs.clone()]);
        let found = pids(&all, &[format!("b={other}")], None)?;
        assert_eq!(found, [none.clone(), vec![own, own], none.clone(), theirs]);
        assert_eq!(pids(&["ashlar://v"], &[], Some("127.0.0.1:2"))?, [none], "of another cluster");
        for wrong in [format!("raw={other}"), format!("x={other}"), "b=x".into(), String::new()] {
            assert!(pids(&all, std::slice::from_ref(&wrong), None).is_err(), "{wrong}");
        }
        assert!(pids(&all[..1], &[other.to_string()], None).is_err(), "nobody is served");
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    #[test]
    fn a_target_that_is_not_there_is_named_in_one_line() {
        let dir = tempfile::tempdir().expect("a folder");
        let args = CommonArgs { prepare: false, ..common(dir.path()) };
        for target in ["file:/nonexistent/x", "nbd+unix:///v?socket=/nonexistent/s"] {
            let subjects = subjects_of(&[format!("a={target}")], &[]).expect("well formed");
            let error = measure(&subjects, &[mixed()], &args, &Client::Own).expect_err("not there");
            let line = format!("{error:#}");
            assert!(
                line.starts_with("a: ") && line.contains("/nonexistent/") && !line.contains('\n'),
                "{line}"
            );
        }
        assert!(subjects_of(&["file:/a".into(), "file:/b".into()], &[]).is_err(), "two of one name");
        let nbd = "nbd+unix:///v?socket=/nonexistent/s".to_owned();
        assert!(subjects_of(&[nbd], &[i32::MAX]).is_err(), "no such process");
    }
}
