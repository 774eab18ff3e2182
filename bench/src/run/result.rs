//! `result.json`: what a run measured, where, and under what. Its schema has a version.
//!
//! Deliberately absent: paths, host names and addresses, since results are published.

use crate::environment::{Environment, FileFacts};
use crate::run::load::Load;
use crate::run::steady::Judged;
use crate::steal::DISTURBED;
use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// The schema's name and version. A change of meaning counts it up.
pub const SCHEMA: &str = "ashlar-bench-result/3";
/// The one before it, in which an IO belonged to the measurement in which it ended; still read.
const SCHEMA_2: &str = "ashlar-bench-result/2";
/// The one before that, which had one load for all runs; still read.
const SCHEMA_1: &str = "ashlar-bench-result/1";

/// One file: all rounds of all subjects of one command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where it ran.
    pub environment: Environment,
    /// Revision of the source beside the program, where it is known.
    pub revision: String,
    /// A name for the boot of the machine, so that runs of one session can be told.
    pub session: String,
    /// What `ashlar tune check` finds wanting on this machine; absent when it could not tell.
    pub tuning: Option<Vec<String>>,
    /// The disk, as the kernel describes its queue.
    pub disk: Vec<String>,
    /// What each measured file lies on.
    #[serde(default)]
    pub files: Vec<FileFacts>,
    /// Who did the IO: `ashlar`, or fio with its version.
    pub client: String,
    /// Seconds of each measurement, after the warm-up.
    pub seconds: f64,
    /// Seconds of the warm-up.
    pub warm_up: f64,
    /// Every measurement that counts, in the order in which they were made.
    pub runs: Vec<Run>,
    /// What `bench steady` judged; its `runs` are those of the last rounds only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steady: Vec<Judged>,
    /// The rounds of `bench steady` before those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transient: Vec<Run>,
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Its name on the command line, or the kind of target.
    pub subject: String,
    /// What was done.
    pub load: Load,
    /// Which round.
    pub round: u32,
    /// How often this was measured before, and not kept since the host disturbed it more.
    #[serde(default)]
    pub repeats: u32,
    /// The part of all processors' time that the host took meanwhile, from 0 to 1; absent where that is not known.
    #[serde(default)]
    pub stolen: Option<f64>,
    /// IOs a second that ended within the measurement. Latencies are of those that began in it (in an open loop: should
    /// have begun), however late they ended.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_s: f64,
    /// Reads; absent where there was none.
    pub reads: Option<Latency>,
    /// Writes; absent where there was none.
    pub writes: Option<Latency>,
    /// Of an open loop: IOs that should have begun and never did; latencies have them with the time that they waited.
    pub unserved: u64,
    /// The client's system calls that entered io_uring; 0 where that is not known.
    pub enters: u64,
    /// Blocks that were read back after the measurement and were as it had written them; absent without `--verify`.
    #[serde(default)]
    pub verified: Option<u64>,
    /// Parts of a second, in order; fio tells none.
    pub timeline: Vec<Moment>,
    /// The client first, then the servers.
    pub processes: Vec<ProcessUse>,
}

/// What an IO does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It fetches.
    Reads,
    /// It stores.
    Writes,
}

impl Direction {
    /// Those of a load.
    pub fn of(load: &Load) -> &'static [Self] {
        match load.read_percent {
            100 => &[Self::Reads],
            0 => &[Self::Writes],
            _ => &[Self::Reads, Self::Writes],
        }
    }

    /// As tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reads => "reads",
            Self::Writes => "writes",
        }
    }
}

/// Latencies in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// IOs.
    pub ios: u64,
    /// The mean.
    pub mean_us: f64,
    /// The median.
    pub p50_us: f64,
    /// 90 of 100 are below.
    pub p90_us: f64,
    /// 99 of 100 are below.
    pub p99_us: f64,
    /// 999 of 1,000 are below.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// Points of the distribution: part of all IOs, microseconds.
    pub curve: Vec<(f64, f64)>,
}

/// One moment of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since the measurement began, at the moment's end.
    pub s: f64,
    /// IOs a second in it.
    pub iops: f64,
    /// 99 of 100 IOs in it took less.
    pub p99_us: f64,
}

/// What a process used during a measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessUse {
    /// `client`, or the program's name.
    pub name: String,
    /// User and system time in seconds.
    pub cpu_s: f64,
    /// The same for each IO in microseconds.
    pub cpu_us_per_io: f64,
    /// Resident memory at the end.
    pub rss_bytes: u64,
    /// Context switches of all its threads, wanted or not.
    pub switches: u64,
}

/// The name of a process that ended meanwhile.
pub const ENDED: &str = "(ended)";

const CURVE: &[f64] =
    &[0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9999, 0.99999, 1.0];

impl Latency {
    /// Of a histogram of nanoseconds.
    pub fn of(times: &Histogram<u64>) -> Option<Self> {
        let us = |part: f64| times.value_at_quantile(part) as f64 / 1000.0;
        (!times.is_empty()).then(|| Self {
            ios: times.len(),
            mean_us: times.mean() / 1000.0,
            p50_us: us(0.5),
            p90_us: us(0.9),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: times.max() as f64 / 1000.0,
            curve: CURVE.iter().map(|part| (*part, us(*part))).collect(),
        })
    }
}

impl Run {
    /// One line of progress.
    pub fn line(&self) -> String {
        let Self { subject, load, round, iops, .. } = self;
        let p50_us = self.main_latency().map_or(0.0, |latency| latency.p50_us);
        let server =
            self.server_cpu_us_per_io().map_or(String::new(), |us| format!(", server {us:.1} us/IO"));
        let stolen = self.stolen.filter(|part| *part > DISTURBED);
        let stolen =
            stolen.map_or(String::new(), |part| format!(", {:.0} % stolen by the host", part * 100.0));
        let verified = self.verified.map_or(String::new(), |blocks| format!(", {blocks} blocks verified"));
        format!(
            "{}, round {}, {subject}: {iops:.0} IOPS, p50 {p50_us:.0} us{server}{stolen}{verified}",
            load.label(),
            round + 1
        )
    }

    /// Whether a server ended before the measurement did, so that nobody knows what it used.
    pub fn lost_a_server(&self) -> bool {
        self.processes.iter().skip(1).any(|one| one.name == ENDED)
    }

    /// Microseconds of server CPU for each IO; absent where no server was named, or one ended meanwhile.
    pub fn server_cpu_us_per_io(&self) -> Option<f64> {
        let servers =
            self.processes.get(1..).filter(|servers| !servers.is_empty() && !self.lost_a_server())?;
        Some(servers.iter().map(|one| one.cpu_us_per_io).sum())
    }

    /// The latencies of one direction; absent where there was no such IO.
    pub fn latency(&self, direction: Direction) -> Option<&Latency> {
        match direction {
            Direction::Reads => self.reads.as_ref(),
            Direction::Writes => self.writes.as_ref(),
        }
    }

    /// The latencies of whichever there are more of.
    pub fn main_latency(&self) -> Option<&Latency> {
        [&self.reads, &self.writes].into_iter().flatten().max_by_key(|latency| latency.ios)
    }
}

impl Results {
    /// The subjects, in the order of their first run.
    pub fn subjects(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for run in &self.runs {
            if !names.contains(&run.subject.as_str()) {
                names.push(&run.subject);
            }
        }
        names
    }

    /// The loads, in the order of their first run.
    pub fn loads(&self) -> Vec<&Load> {
        let mut loads: Vec<&Load> = Vec::new();
        for run in &self.runs {
            if !loads.contains(&&run.load) {
                loads.push(&run.load);
            }
        }
        loads
    }

    /// Whether a subject is a file; unknown of results that do not tell, which then have none.
    pub fn is_file(&self, subject: &str) -> bool {
        self.files.iter().any(|file| file.subject == subject)
    }

    /// How often each subject was measured under a load, at most.
    pub fn rounds(&self) -> u32 {
        let of = |load| self.subjects().into_iter().map(move |name| self.runs_of(name, load).count()).max();
        self.loads().into_iter().filter_map(of).max().unwrap_or(0) as u32
    }

    /// The runs of a subject under a load, by round.
    pub fn runs_of<'a>(&'a self, subject: &'a str, load: &'a Load) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().filter(move |run| run.subject == subject && run.load == *load)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, or not of this schema.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        let json: serde_json::Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
        let json = if json["schema"] == SCHEMA_1 { from_schema_1(json) } else { json };
        let found = json["schema"].as_str().unwrap_or("none");
        ensure!(
            [SCHEMA, SCHEMA_2].contains(&found),
            "{} has schema `{found}`, not {SCHEMA}; measure again with this version",
            path.display()
        );
        let damaged = || format!("{} is damaged", path.display());
        let results: Self = serde_json::from_value(json).with_context(damaged)?;
        results.check().with_context(damaged)?;
        Ok(results)
    }

    /// # Errors
    /// There is no measurement, or one of something that cannot be done.
    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.runs.is_empty(), "no measurement is in it");
        for run in &self.runs {
            run.load.sizes.check()?;
            ensure!(run.iops.is_finite() && run.iops >= 0.0, "{} IOs a second", run.iops);
        }
        Ok(())
    }

    /// Writes a file.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("{} cannot be written", path.display()))
    }
}

/// The first schema had one load beside the runs, and only one client.
fn from_schema_1(mut json: serde_json::Value) -> serde_json::Value {
    let load = json["load"].take();
    for run in json["runs"].as_array_mut().into_iter().flatten() {
        run["load"] = load.clone();
    }
    json["client"] = "ashlar".into();
    json["schema"] = SCHEMA.into();
    json
}

/// A percentile distribution as HdrHistogram's own tools plot it, in microseconds.
pub fn hgrm(times: &Histogram<u64>) -> String {
    let mut text = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
    let mut count = 0;
    for step in times.iter_quantiles(5) {
        count += step.count_since_last_iteration();
        let part = step.quantile_iterated_to();
        let value = step.value_iterated_to() as f64 / 1000.0;
        let _ = match part < 1.0 {
            true => writeln!(text, "{value:12.3} {part:2.12} {count:10} {:14.2}", 1.0 / (1.0 - part)),
            false => writeln!(text, "{value:12.3} {part:2.12} {count:10}"),
        };
    }
    let _ = writeln!(
        text,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n#[Max     = {:12.3}, Total count    = {:12}]",
        times.mean() / 1000.0,
        times.stdev() / 1000.0,
        times.max() as f64 / 1000.0,
        times.len()
    );
    text
}

/// The first lines of a histogram log; what follows are [`Intervals`] of one or more rounds.
pub const HLOG_HEAD: &str = "#[Histogram log format version 1.3]\n\
    #[Nanoseconds; each round has its tag and begins at 0]\n\
    \"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\"Interval_Compressed_Histogram\"\n";

/// Moments of one measurement as lines of a histogram log, for HdrHistogram's own tools.
#[derive(Clone, Debug)]
pub struct Intervals {
    tag: String,
    lines: String,
}

impl Intervals {
    /// Of a round.
    pub fn new(round: u32) -> Self {
        Self { tag: format!("round-{}", round + 1), lines: String::new() }
    }

    /// A moment's latencies in nanoseconds; both times in seconds.
    ///
    /// # Errors
    /// The distribution cannot be encoded.
    pub fn add(&mut self, start_s: f64, length_s: f64, times: &Histogram<u64>) -> anyhow::Result<()> {
        let seconds = |s: f64| Duration::from_secs_f64(s.max(0.0));
        let (mut line, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
        let mut writer = IntervalLogWriterBuilder::new().begin_log_with(&mut line, &mut serializer)?;
        writer.write_histogram(times, seconds(start_s), seconds(length_s), Tag::new(&self.tag))?;
        self.lines += std::str::from_utf8(&line)?;
        Ok(())
    }

    /// All that was added.
    pub fn lines(&self) -> &str {
        &self.lines
    }
}

/// The IOs in a histogram log.
#[cfg(test)]
pub(crate) fn hlog_ios(log: &[u8]) -> anyhow::Result<u64> {
    use base64::Engine;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    let mut ios = 0;
    for entry in IntervalLogIterator::new(log) {
        let entry = entry.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        if let LogEntry::Interval(interval) = entry {
            let bytes = base64::engine::general_purpose::STANDARD.decode(interval.encoded_histogram())?;
            let times: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice())?;
            ios += times.len();
        }
    }
    Ok(ios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_file_ends_with_all_values_and_the_largest() {
        let mut times = crate::run::job::histogram();
        (1..=1000_u64).for_each(|us| times.record(us * 1000).expect("in range"));
        let text = hgrm(&times);
        let last = text.lines().rfind(|line| !line.starts_with('#')).unwrap_or_default();
        assert!(last.contains("1.000000000000") && last.contains("1000"), "{last}");
        let latency = Latency::of(&times).expect("there are some");
        assert!((latency.p50_us - 500.0).abs() < 1.0 && (latency.p999_us - 999.0).abs() < 1.5, "{latency:?}");
        assert!(Latency::of(&crate::run::job::histogram()).is_none());
    }

    #[test]
    fn another_schema_is_refused_by_name() -> anyhow::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), r#"{"schema": "ashlar-bench-result/9"}"#)?;
        let error = Results::read(file.path()).err().context("must be refused")?;
        assert!(error.to_string().contains("ashlar-bench-result/9"), "{error}");
        Ok(())
    }

    #[test]
    fn a_result_of_the_first_schema_is_read_with_its_load_on_each_run() -> anyhow::Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let results = Results::read(&path)?;
        assert_eq!((results.schema.as_str(), results.client.as_str()), (SCHEMA, "ashlar"));
        assert_eq!(results.subjects().len(), 2);
        let loads = results.loads();
        assert_eq!(loads.len(), 1);
        assert_eq!((loads[0].depth, results.runs.len()), (32, 4));
        Ok(())
    }
}
