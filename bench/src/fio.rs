//! fio as the client: job files that a person can run again, and what its JSON says afterwards.
//!
//! Invariants: what ran is the job file that is kept, and nothing else; a job that met an IO error is an error here,
//! never a number; the parser takes `json` and `json+`, and skips the lines that fio prints before the document.
//!
//! Deliberately absent: open loops (fio counts a latency from when an IO was issued, so that a stall is felt by one
//! IO only: `bench run --rate`) and verification (`bench run --verify`).

use crate::run::job::{self, Times};
use crate::run::load::{self, Load, Order, Sizes};
use crate::run::measure::{Measured, Subject, used, uses};
use crate::run::result::{Intervals, Latency, ProcessUse, Run};
use crate::run::target::Target;
use crate::steal::{self, Ticks};
use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const MISSING: &str = "fio cannot be run; install it: apt-get install fio";

/// fio, and where the job files and its own results go.
#[derive(Clone, Debug)]
pub struct Fio {
    /// As `fio --version` says.
    pub version: String,
    /// Job files and JSON documents, one of each a measurement.
    pub dir: PathBuf,
}

impl Fio {
    /// Checks that fio is there with the engines that the targets need.
    ///
    /// # Errors
    /// fio or an engine is missing; the message says how to get it.
    pub fn probe<'a>(dir: &Path, targets: impl IntoIterator<Item = &'a Target>) -> anyhow::Result<Self> {
        let version = Command::new("fio").arg("--version").output().context(MISSING)?;
        let engines = Command::new("fio").arg("--enghelp").output().context(MISSING)?;
        let engines = String::from_utf8_lossy(&engines.stdout).into_owned();
        for target in targets {
            has_engine(&engines, target)?;
        }
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
        Ok(Self { version, dir: dir.to_owned() })
    }

    /// Warms up, then measures.
    ///
    /// # Errors
    /// The load is none for fio, fio fails, or it met an IO error.
    pub fn measure(
        &self,
        subject: &Subject,
        load: &Load,
        times: Times,
        round: u32,
    ) -> anyhow::Result<Measured> {
        let name: String = format!("{}-{}", subject.name, load.label())
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
            .collect();
        let path = self.dir.join(format!("{name}.fio"));
        // Each round, and the warm-up, has IOs of its own.
        let seeded = |nth: u64| Load { seed: load.seed.wrapping_add(nth), ..load.clone() };
        if !times.warm_up.is_zero() {
            // A run of its own, so that the CPU time of the servers is that of the measured IOs only.
            let warm_up = seeded(u64::from(round) << 32 | 1 << 31);
            let job = job_file(&subject.target, &warm_up, Some(times.warm_up))?;
            self.run(&self.dir.join("warm-up.fio"), &job, &subject.target)?;
        }
        let before = (used(&subject.pids), children_cpu_s(), Ticks::now());
        let text = self.run(
            &path,
            &job_file(&subject.target, &seeded(round.into()), Some(times.measured))?,
            &subject.target,
        )?;
        let after = (used(&subject.pids), children_cpu_s(), Ticks::now());
        let outcome = parse(&text)?;
        let json = path.with_extension(format!("{}.json", round + 1));
        crate::report::write(&json, &text[document_start(&text)?..])?;
        let mut all = outcome.reads.clone();
        all.add(&outcome.writes)?;
        let cpu_s = after.1 - before.1;
        let client = ProcessUse {
            name: "client".to_owned(),
            cpu_s,
            cpu_us_per_io: cpu_s * 1e6 / all.len() as f64,
            rss_bytes: 0,
            switches: outcome.switches,
        };
        let servers = uses(&subject.pids, &before.0, &after.0, all.len());
        let run = Run {
            subject: subject.name.clone(),
            load: load.clone(),
            round,
            repeats: 0,
            stolen: steal::between(before.2, after.2),
            iops: outcome.iops,
            bytes_s: outcome.bytes_s,
            reads: Latency::of(&outcome.reads),
            writes: Latency::of(&outcome.writes),
            unserved: 0,
            enters: 0,
            verified: None,
            timeline: Vec::new(),
            processes: std::iter::once(client).chain(servers).collect(),
        };
        // fio tells one distribution, of the whole.
        let mut intervals = Intervals::new(round);
        intervals.add(0.0, times.measured.as_secs_f64(), &all)?;
        Ok(Measured { run, times: all, intervals })
    }

    /// Writes every byte of a target once, in order.
    ///
    /// # Errors
    /// See [`Fio::measure`].
    pub fn fill(&self, target: &Target, bytes: u64) -> anyhow::Result<()> {
        let sizes = Sizes(vec![(load::IO_BYTES_MAX, 1.0)]);
        let load = Load { order: Order::Sequential, sizes, dsync: false, ..Load::random_4k(0, 8, bytes) };
        let job = job_file(target, &load, None)?;
        parse(&self.run(&self.dir.join("fill.fio"), &job, target)?).map(drop)
    }

    /// Runs a job file.
    ///
    /// # Errors
    /// fio cannot run, or fails; the message has its words.
    fn run(&self, path: &Path, job: &str, target: &Target) -> anyhow::Result<String> {
        crate::report::write(path, job)?;
        let mut fio = Command::new("fio");
        fio.arg("--output-format=json+").arg(path).stdin(Stdio::null());
        if let Target::Rbd(rbd) = target {
            fio.env("CEPH_CONF", &rbd.conf);
        }
        let output = fio.output().context(MISSING)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            let words = words.lines().chain(text.lines()).find(|line| !line.trim().is_empty());
            bail!(
                "fio --output-format=json+ {} failed with {}: {}",
                path.display(),
                output.status,
                words.unwrap_or("it says nothing")
            );
        }
        Ok(text)
    }
}

/// Checks that fio's list of engines has the one for a target.
fn has_engine(engines: &str, target: &Target) -> anyhow::Result<()> {
    let (engine, library) = match target {
        Target::File(_) => ("io_uring", "liburing"),
        Target::NbdTcp { .. } | Target::NbdUnix { .. } => ("nbd", "libnbd"),
        Target::Rbd(_) => ("rbd", "librbd"),
        Target::Nvme { .. } | Target::Volume { .. } => bail!(
            "fio has no engine for {} targets: measure them with `ashlar bench run`, attach the volume with \
             `nvme connect` and give its device as file:/dev/nvmeXnY, or use its NBD export",
            target.kind()
        ),
    };
    ensure!(
        engines.lines().any(|line| line.trim() == engine),
        "this fio has no engine `{engine}`, since it was built without {library}; Debian's package has it"
    );
    Ok(())
}

/// CPU seconds of all children that have ended.
fn children_cpu_s() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return 0.0 };
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Whether fio can do these loads.
///
/// # Errors
/// It cannot do one as we mean it.
pub fn check(subjects: &[Subject], loads: &[Load]) -> anyhow::Result<()> {
    for subject in subjects {
        loads.iter().try_for_each(|load| job_file(&subject.target, load, None).map(drop))?;
    }
    Ok(())
}

/// Shares as percentages, which are all that fio takes: of 1 at least each, and 100 in all.
fn percents(sizes: &[(u64, f64)]) -> Vec<i64> {
    let sum: f64 = sizes.iter().map(|(_, share)| share).sum();
    let mut parts: Vec<i64> =
        sizes.iter().map(|(_, share)| ((share / sum * 100.0).round() as i64).max(1)).collect();
    let rest = 100 - parts.iter().sum::<i64>();
    if let Some(largest) = parts.iter_mut().max() {
        *largest += rest;
    }
    parts
}

/// A job file for a load, over so much time, or over every byte once.
///
/// # Errors
/// fio cannot do this load as we mean it.
pub fn job_file(target: &Target, load: &Load, time: Option<Duration>) -> anyhow::Result<String> {
    if load.rate.is_some() {
        bail!(
            "fio counts a latency from when an IO was issued, so that an open loop hides stalls: use \
             `ashlar bench run --rate`"
        );
    }
    ensure!(!load.verify, "verification is `ashlar bench run --verify`");
    ensure!(
        !load.poll,
        "fio's engines sleep for completions; a client that polls is `ashlar bench run --poll`"
    );
    let mut job = String::from(
        "; Written by ashlar bench. Run it again: fio --output-format=json+ THIS-FILE\n[global]\n",
    );
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(job, "{key}={value}");
    };
    match target {
        Target::File(path) => {
            line("ioengine", "io_uring");
            line("direct", "1");
            line("fallocate", "none");
            // fio splits a filename at colons.
            line("filename", &path.display().to_string().replace(':', "\\:"));
            if load.dsync && load.read_percent < 100 {
                line("sync", "dsync");
            }
        }
        Target::Rbd(rbd) => {
            line("ioengine", "rbd");
            line("clientname", "admin");
            line("pool", &rbd.pool);
            line("rbdname", &rbd.image);
        }
        other => {
            line("ioengine", "nbd");
            line("uri", &other.nbd_uri().context("fio's engine nbd takes NBD exports only")?);
        }
    }
    let random = load.order != Order::Sequential;
    let pattern = match (random, load.read_percent) {
        (true, 100) => "randread",
        (true, 0) => "randwrite",
        (true, _) => "randrw",
        (false, 100) => "read",
        (false, 0) => "write",
        (false, _) => "rw",
    };
    line("rw", pattern);
    if !matches!(load.read_percent, 0 | 100) {
        line("rwmixread", &load.read_percent.to_string());
    }
    match load.sizes.0.as_slice() {
        [(bytes, _)] => line("bs", &bytes.to_string()),
        sizes => {
            let parts = sizes.iter().zip(percents(sizes)).map(|((bytes, _), part)| format!("{bytes}/{part}"));
            line("bssplit", &parts.collect::<Vec<_>>().join(":"));
        }
    }
    match load.order {
        Order::Zipfian => line("random_distribution", "zipf:0.99"),
        Order::Random => line("norandommap", "1"),
        Order::Sequential => {}
    }
    let part = load.bytes / u64::from(load.jobs) / 4096 * 4096;
    line("iodepth", &load.depth.to_string());
    line("size", &part.to_string());
    line("randseed", &load.seed.to_string());
    if let Some(time) = time {
        line("runtime", &format!("{}ms", time.as_millis()));
        line("time_based", "1");
    }
    line("lat_percentiles", "1");
    line("clat_percentiles", "0");
    line("group_reporting", "1");
    job += "[bench]\n";
    if load.jobs > 1 {
        let _ = writeln!(job, "numjobs={}\noffset_increment={part}\nthread=1", load.jobs);
    }
    Ok(job)
}

/// What fio measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// IOs a second, reads and writes together.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_s: f64,
    /// Latencies of reads in nanoseconds.
    pub reads: Histogram<u64>,
    /// Latencies of writes in nanoseconds.
    pub writes: Histogram<u64>,
    /// Context switches of fio.
    pub switches: u64,
}

#[derive(Deserialize)]
struct Document {
    jobs: Vec<JobResult>,
}

#[derive(Deserialize)]
struct JobResult {
    #[serde(default)]
    error: i64,
    #[serde(default)]
    read: Direction,
    #[serde(default)]
    write: Direction,
    #[serde(default)]
    ctx: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Direction {
    iops: f64,
    bw_bytes: u64,
    total_ios: u64,
    lat_ns: Kept,
    clat_ns: Kept,
}

/// One kind of latency.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Kept {
    bins: BTreeMap<String, u64>,
}

impl Direction {
    /// The distribution: of the whole latency when fio kept it, else of completion.
    fn times(&self) -> anyhow::Result<Histogram<u64>> {
        let mut times = job::histogram();
        let bins =
            [&self.lat_ns, &self.clat_ns].into_iter().map(|kind| &kind.bins).find(|bins| !bins.is_empty());
        for (ns, count) in bins.into_iter().flatten() {
            let ns: u64 = ns.parse().with_context(|| format!("fio's JSON has a latency `{ns}`"))?;
            times.saturating_record_n(ns.max(1), *count);
        }
        ensure!(times.len() == self.total_ios, "fio's JSON has no `bins`; is it json+ of fio 3 or later?");
        Ok(times)
    }
}

fn document_start(text: &str) -> anyhow::Result<usize> {
    let start = if text.starts_with('{') { Some(0) } else { text.find("\n{").map(|at| at + 1) };
    start.with_context(|| format!("fio printed no JSON: {}", text.chars().take(300).collect::<String>()))
}

/// Reads fio's `json+` output; lines before the document are skipped.
///
/// # Errors
/// No document, a job with an error, no IO at all, or no distribution of latencies.
pub fn parse(text: &str) -> anyhow::Result<Outcome> {
    let mut documents = serde_json::Deserializer::from_str(&text[document_start(text)?..]).into_iter();
    let document: Document =
        documents.next().context("fio printed no JSON")?.context("fio's JSON is damaged")?;
    let job = document.jobs.first().context("fio's JSON has no job")?;
    ensure!(job.error == 0, "fio met an IO error: {}", std::io::Error::from_raw_os_error(job.error as i32));
    ensure!(job.read.total_ios + job.write.total_ios > 0, "fio finished without a single IO");
    Ok(Outcome {
        iops: job.read.iops + job.write.iops,
        bytes_s: (job.read.bw_bytes + job.write.bw_bytes) as f64,
        reads: job.read.times()?,
        writes: job.write.times()?,
        switches: job.ctx,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = include_str!("../testdata/fio-3.33-nbd-randwrite.json");

    #[test]
    fn a_recorded_run_is_read_past_the_lines_before_it() -> anyhow::Result<()> {
        assert!(RECORDED.starts_with("fio: connected"));
        let outcome = parse(RECORDED)?;
        assert!(outcome.iops > 1000.0 && outcome.writes.len() > 1000 && outcome.reads.is_empty());
        // As fio's own percentiles of that run have it, within the width of a bin.
        let json: serde_json::Value = serde_json::from_str(&RECORDED[document_start(RECORDED)?..])?;
        let theirs = json["jobs"][0]["write"]["lat_ns"]["percentile"]["50.000000"].as_f64().context("p50")?;
        let ours = outcome.writes.value_at_quantile(0.5) as f64;
        assert!((ours / theirs - 1.0).abs() < 0.02, "{ours} {theirs}");
        Ok(())
    }

    #[test]
    fn completion_latency_stands_in_where_the_whole_was_not_kept() -> anyhow::Result<()> {
        let text = r#"{"jobs": [{"read": {"iops": 10, "total_ios": 3, "lat_ns": {"mean": 5},
            "clat_ns": {"bins": {"1500": 2, "9000": 1}}}}]}"#;
        let reads = parse(text)?.reads;
        assert_eq!((reads.len(), reads.value_at_quantile(0.5) / 10), (3, 150));
        Ok(())
    }

    #[test]
    fn a_job_with_an_error_without_io_or_without_bins_is_no_result() {
        let failed = RECORDED.replacen("\"error\" : 0", "\"error\" : 5", 1);
        assert!(parse(&failed).is_err_and(|error| error.to_string().contains("IO error")));
        let no_bins = r#"{"jobs": [{"read": {"iops": 10, "total_ios": 3}}]}"#;
        assert!(parse(no_bins).is_err_and(|error| error.to_string().contains("json+")));
        assert!(parse(r#"{"jobs": [{"error": 0}]}"#).is_err());
        assert!(parse("fio: engine nbd not loadable\n").is_err());
        assert!(parse(&RECORDED[..RECORDED.len() / 2]).is_err());
    }

    fn job(target: &str, load: &Load) -> String {
        let target: Target = target.parse().expect("a target");
        job_file(&target, load, Some(Duration::from_millis(1500))).expect("fio can do that")
    }

    #[test]
    fn raw_writes_are_dsync_where_that_was_asked_for_and_reads_are_not() {
        let write = job("file:/d/a:b", &Load::random_4k(0, 1, 1 << 20));
        assert!(
            write.contains("sync=dsync\n")
                && write.contains("direct=1\n")
                && write.contains("runtime=1500ms\n")
        );
        assert!(write.contains("filename=/d/a\\:b\n"));
        assert!(!job("file:/d/a", &Load::random_4k(100, 1, 1 << 20)).contains("sync="));
        let plain = Load { dsync: false, ..Load::random_4k(0, 1, 1 << 20) };
        assert!(!job("file:/d/a", &plain).contains("sync="));
    }

    #[test]
    fn mixes_and_several_jobs_are_fios_own() {
        let sizes = "4K:3,64K:1".parse().expect("sizes");
        let load = Load { sizes, jobs: 2, order: Order::Zipfian, ..Load::random_4k(70, 8, 8 << 20) };
        let text = job("nbd+unix:///v?socket=/s", &load);
        for line in [
            "uri=nbd+unix:///v?socket=/s",
            "rwmixread=70",
            "bssplit=4096/75:65536/25",
            "random_distribution=zipf:0.99",
            "size=4194304",
            "numjobs=2",
            "offset_increment=4194304",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn shares_are_whole_percents_none_of_them_0() {
        assert_eq!(percents(&[(4096, 3.0), (65_536, 1.0)]), [75, 25]);
        assert_eq!(percents(&[(4096, 1000.0), (8192, 1.0), (65_536, 1.0)]), [98, 1, 1]);
        assert_eq!(percents(&[(4096, 1.0), (8192, 1.0), (65_536, 1.0)]).iter().sum::<i64>(), 100);
    }

    #[test]
    fn what_fio_cannot_do_is_refused_with_what_can() {
        let load = Load { rate: Some(10.0), ..Load::random_4k(100, 1, 1 << 20) };
        let file: Target = "file:/x".parse().expect("a target");
        let error = job_file(&file, &load, Some(Duration::from_secs(1))).expect_err("an open loop");
        assert!(error.to_string().contains("bench run --rate"), "{error}");
        let load = Load { poll: true, ..Load::random_4k(100, 1, 1 << 20) };
        let error = job_file(&file, &load, Some(Duration::from_secs(1))).expect_err("a client that polls");
        assert!(error.to_string().contains("bench run --poll"), "{error}");
        let nvme: Target = "nvme://127.0.0.1/n".parse().expect("a target");
        assert!(has_engine("\tio_uring\n\tnbd\n", &nvme).is_err_and(|e| e.to_string().contains("bench run")));
        let missing = has_engine("Available IO engines:\n\tnbd\n", &file).expect_err("no io_uring");
        assert!(missing.to_string().contains("liburing"), "{missing}");
        assert!(has_engine("\tio_uring\n\tnbd\n", &file).is_ok());
    }
}
