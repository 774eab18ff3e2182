//! fio as the client: jobs that become command lines, and what its JSON says afterwards.
//!
//! Invariants: a job that met an IO error is an error here, never a number; the parser takes `json` and `json+`, and
//! skips the lines that fio prints before the document.
//!
//! Deliberately absent: fio's many other options. A job here is what the benchmarks of this crate compare.

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What fio talks to.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A file by io_uring and O_DIRECT; writes are O_DSYNC.
    File(PathBuf),
    /// An NBD export by its URI.
    Nbd(String),
}

/// The pattern of IO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Writes from the first byte to the last.
    Write,
    /// Random reads and writes, half each.
    RandRw,
}

impl Pattern {
    /// fio's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Write => "write",
            Self::RandRw => "randrw",
        }
    }
}

/// One run of fio.
#[derive(Clone, Debug)]
pub struct Job {
    /// What it talks to.
    pub subject: Subject,
    /// The pattern of IO.
    pub pattern: Pattern,
    /// Bytes of each IO.
    pub block_bytes: u32,
    /// IOs in flight.
    pub queue_depth: u32,
    /// Bytes of the subject that are touched, from its start.
    pub size: u64,
    /// How long it runs; `None` goes over the size once.
    pub seconds: Option<u32>,
}

impl Job {
    fn args(&self) -> Vec<String> {
        let mut args = vec![
            "--name=bench".to_owned(),
            format!("--rw={}", self.pattern.word()),
            format!("--bs={}", self.block_bytes),
            format!("--iodepth={}", self.queue_depth),
            format!("--size={}", self.size),
            "--randrepeat=0".to_owned(),
            "--norandommap".to_owned(),
            "--lat_percentiles=1".to_owned(),
            "--clat_percentiles=0".to_owned(),
            "--output-format=json".to_owned(),
        ];
        match &self.subject {
            Subject::File(path) => {
                args.push("--ioengine=io_uring".to_owned());
                args.push("--direct=1".to_owned());
                args.push("--fallocate=none".to_owned());
                // fio splits a filename at colons.
                args.push(format!("--filename={}", path.display().to_string().replace(':', "\\:")));
                if matches!(self.pattern, Pattern::RandWrite | Pattern::RandRw) {
                    args.push("--sync=dsync".to_owned());
                }
            }
            Subject::Nbd(uri) => {
                args.push("--ioengine=nbd".to_owned());
                args.push(format!("--uri={uri}"));
            }
        }
        if let Some(seconds) = self.seconds {
            args.push(format!("--runtime={seconds}"));
            args.push("--time_based".to_owned());
        }
        args
    }

    /// Runs fio and reads its result.
    ///
    /// # Errors
    /// fio cannot run, fails, or reports an IO error.
    pub fn run(&self) -> anyhow::Result<Measured> {
        let output =
            Command::new("fio").args(self.args()).stdin(Stdio::null()).output().context(MISSING_FIO)?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!(
                "fio {} failed with {}:\n{}\n{}",
                self.args().join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim(),
                text.lines().take(5).collect::<Vec<_>>().join("\n")
            );
        }
        parse(&text)
    }
}

const MISSING_FIO: &str = "fio cannot be run; install it: apt-get install fio";

/// Checks that fio is there with the engines that the benchmarks use, and returns its version.
///
/// # Errors
/// fio or an engine is missing; the message says how to get it.
pub fn probe() -> anyhow::Result<String> {
    let version = Command::new("fio").arg("--version").output().context(MISSING_FIO)?;
    let engines = Command::new("fio").arg("--enghelp").output().context(MISSING_FIO)?;
    let engines = String::from_utf8_lossy(&engines.stdout).into_owned();
    for engine in ["nbd", "io_uring"] {
        ensure!(
            engines.lines().any(|line| line.trim() == engine),
            "this fio has no engine `{engine}`; Debian's package has it (a fio built without libnbd or liburing does not)"
        );
    }
    Ok(String::from_utf8_lossy(&version.stdout).trim().to_owned())
}

/// What one run measured, with fio's own document.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// IOs a second, reads and writes together.
    pub iops: f64,
    /// IOs done.
    pub ios: u64,
    /// Median latency, from submission to completion.
    pub p50_us: f64,
    /// The latency that 99 of 100 IOs stay under.
    pub p99_us: f64,
    /// fio's JSON as it came.
    pub fio: serde_json::Value,
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
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Direction {
    iops: f64,
    total_ios: u64,
    lat_ns: Latency,
    clat_ns: Latency,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Latency {
    percentile: std::collections::BTreeMap<String, f64>,
}

impl Direction {
    /// A percentile in microseconds: of the whole latency when fio kept it, else of completion.
    fn percentile_us(&self, name: &str) -> Option<f64> {
        [&self.lat_ns, &self.clat_ns]
            .into_iter()
            .find_map(|latency| latency.percentile.get(name))
            .map(|ns| ns / 1000.0)
    }
}

/// Reads fio's `json` or `json+` output; lines before the document are skipped.
///
/// # Errors
/// No document, a job with an error, no IO at all, or no percentiles.
pub fn parse(text: &str) -> anyhow::Result<Measured> {
    let start = if text.starts_with('{') { Some(0) } else { text.find("\n{").map(|at| at + 1) };
    let start = start
        .with_context(|| format!("fio printed no JSON:\n{}", text.chars().take(500).collect::<String>()))?;
    let mut documents = serde_json::Deserializer::from_str(&text[start..]).into_iter::<serde_json::Value>();
    let fio = documents.next().context("fio printed no JSON")?.context("fio's JSON is damaged")?;
    let document = Document::deserialize(&fio).context("fio's JSON has an unknown form")?;
    let job = document.jobs.first().context("fio's JSON has no job")?;
    ensure!(job.error == 0, "fio met an IO error: {}", std::io::Error::from_raw_os_error(job.error as i32));
    let ios = job.read.total_ios + job.write.total_ios;
    ensure!(ios > 0, "fio finished without a single IO");
    let main = if job.read.total_ios >= job.write.total_ios { &job.read } else { &job.write };
    let percentile =
        |name| main.percentile_us(name).with_context(|| format!("fio's JSON lacks percentile {name}"));
    let (p50_us, p99_us) = (percentile("50.000000")?, percentile("99.000000")?);
    Ok(Measured { iops: job.read.iops + job.write.iops, ios, p50_us, p99_us, fio })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = include_str!("../testdata/fio-3.33-nbd-randwrite.json");

    #[test]
    fn a_recorded_run_is_read_past_the_lines_before_it() -> anyhow::Result<()> {
        assert!(RECORDED.starts_with("fio: connected"));
        let measured = parse(RECORDED)?;
        assert!(measured.iops > 1000.0 && measured.ios > 1000, "{} {}", measured.iops, measured.ios);
        assert!(measured.p50_us > 1.0 && measured.p99_us >= measured.p50_us);
        assert!(measured.fio["jobs"][0]["write"]["lat_ns"].is_object());
        Ok(())
    }

    #[test]
    fn completion_latency_stands_in_where_the_whole_was_not_kept() -> anyhow::Result<()> {
        let text = r#"{"jobs": [{"error": 0, "read": {"iops": 10, "total_ios": 20, "lat_ns": {"mean": 5},
            "clat_ns": {"percentile": {"50.000000": 1500, "99.000000": 9000}, "bins": {"1": 2}}}}]}"#;
        let measured = parse(text)?;
        assert_eq!((measured.p50_us, measured.p99_us, measured.ios), (1.5, 9.0, 20));
        Ok(())
    }

    #[test]
    fn a_job_with_an_error_or_without_io_is_no_result() {
        let failed = RECORDED.replacen("\"error\" : 0", "\"error\" : 5", 1);
        assert!(parse(&failed).is_err_and(|error| error.to_string().contains("IO error")));
        assert!(parse(r#"{"jobs": [{"error": 0}]}"#).is_err());
        assert!(parse("fio: engine nbd not loadable\n").is_err());
        assert!(parse(&RECORDED[..RECORDED.len() / 2]).is_err());
    }

    #[test]
    fn raw_writes_are_dsync_and_reads_are_not() {
        let job = |pattern| Job {
            subject: Subject::File("/d/a:b".into()),
            pattern,
            block_bytes: 4096,
            queue_depth: 1,
            size: 1 << 20,
            seconds: Some(1),
        };
        let write = job(Pattern::RandWrite).args();
        assert!(write.contains(&"--sync=dsync".to_owned()) && write.contains(&"--direct=1".to_owned()));
        assert!(write.contains(&"--filename=/d/a\\:b".to_owned()));
        assert!(!job(Pattern::RandRead).args().contains(&"--sync=dsync".to_owned()));
    }
}
