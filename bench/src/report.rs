//! Results: medians over rounds, the comparison, the goals, and their three renderings (text, Markdown, JSON).
//!
//! Invariants: every rendering is made from the same rows; a goal that could not be measured is not met.

use crate::environment::Environment;
use crate::fio::{Measured, Pattern};
use anyhow::{Context, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Who was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SubjectName {
    /// A raw preallocated file by io_uring and O_DIRECT, with O_DSYNC for writes.
    Raw,
    /// The replicated volume over NBD on a Unix socket.
    Volume,
    /// qemu-nbd exporting a raw preallocated file over NBD on a Unix socket.
    QemuNbd,
}

impl SubjectName {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Raw => "raw file",
            Self::Volume => "volume, 3 replicas",
            Self::QemuNbd => "qemu-nbd",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Who.
    pub subject: SubjectName,
    /// What.
    pub pattern: Pattern,
    /// IOs in flight.
    pub queue_depth: u32,
    /// Which round, from 0.
    pub round: u32,
    /// CPU that the serving processes used meanwhile.
    pub server_cpu_seconds: f64,
    /// What fio saw.
    pub measured: Measured,
}

impl Run {
    /// One line of progress.
    pub fn line(&self) -> String {
        let (who, what, depth) = (self.subject.title(), self.pattern.word(), self.queue_depth);
        format!("{what} QD{depth}, round {}, {who}: {:.0} IOPS", self.round + 1, self.measured.iops)
    }
}

/// The medians of one subject under one load, and how they compare.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What.
    pub pattern: Pattern,
    /// IOs in flight.
    pub queue_depth: u32,
    /// Who.
    pub subject: SubjectName,
    /// Median over the rounds.
    pub iops: f64,
    /// Median over the rounds of the median latency.
    pub p50_us: f64,
    /// Median over the rounds of the 99th percentile.
    pub p99_us: f64,
    /// CPU of the serving processes an IO; `None` for the raw disk, which nobody serves.
    pub server_cpu_us_per_io: Option<f64>,
    /// IOPS over those of the raw file.
    pub of_raw: Option<f64>,
    /// IOPS over those of qemu-nbd.
    pub of_qemu_nbd: Option<f64>,
}

/// A goal and whether this run met it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// What should hold.
    pub text: &'static str,
    /// What was found; `None` when it was not measured.
    pub found: Option<f64>,
    /// Whether it holds.
    pub met: bool,
}

/// The whole result of `ashlar bench first`.
#[derive(Clone, Debug, Serialize)]
pub struct FirstReport {
    /// Where it ran.
    pub environment: Environment,
    /// Bytes of each subject.
    pub size_bytes: u64,
    /// Length of each measurement.
    pub seconds: u32,
    /// Rounds.
    pub rounds: u32,
    /// The medians.
    pub rows: Vec<Row>,
    /// The goals.
    pub goals: Vec<Goal>,
    /// Every measurement, with fio's own JSON.
    pub runs: Vec<Run>,
}

impl FirstReport {
    /// Works out medians, ratios and goals.
    ///
    /// # Errors
    /// There is no measurement.
    pub fn new(
        environment: Environment,
        size_bytes: u64,
        seconds: u32,
        rounds: u32,
        runs: Vec<Run>,
    ) -> anyhow::Result<Self> {
        ensure!(!runs.is_empty(), "nothing was measured");
        let rows = rows(&runs);
        let goals = goals(&rows);
        Ok(Self { environment, size_bytes, seconds, rounds, rows, goals, runs })
    }

    /// The goals of this benchmark.
    pub fn goals(&self) -> &[Goal] {
        &self.goals
    }

    /// A table and the goals for a terminal.
    pub fn text(&self) -> String {
        format!(
            "{}\n{}\n{}\n\n{}",
            self.environment.line(),
            self.setting(),
            self.table(presets::UTF8_FULL_CONDENSED),
            goal_lines(&self.goals, "")
        )
    }

    /// A page for `docs/benchmarks`.
    pub fn markdown(&self) -> String {
        format!(
            "# First benchmark\n\nWritten by `ashlar bench first --write-markdown`; do not edit figures by hand.\n\n{}\n\n{}\n\n{}\n\n## Goals\n\n{}\n\n{}\n",
            self.environment.line(),
            self.setting(),
            self.table(presets::ASCII_MARKDOWN),
            goal_lines(&self.goals, "- "),
            NOTES
        )
    }

    fn setting(&self) -> String {
        let (mib, seconds, rounds) = (self.size_bytes >> 20, self.seconds, self.rounds);
        format!(
            "4 KiB random IO over {mib} MiB, {seconds} s a measurement, medians of {rounds} alternating rounds."
        )
    }

    fn table(&self, preset: &str) -> Table {
        let mut table = Table::new();
        table.load_preset(preset);
        table.set_header([
            "load",
            "subject",
            "IOPS",
            "p50 us",
            "p99 us",
            "x raw",
            "x qemu-nbd",
            "server CPU us/IO",
        ]);
        for row in &self.rows {
            let ratio = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            table.add_row([
                format!("{} QD{}", row.pattern.word(), row.queue_depth),
                row.subject.title().to_owned(),
                format!("{:.0}", row.iops),
                format!("{:.0}", row.p50_us),
                format!("{:.0}", row.p99_us),
                ratio(row.of_raw),
                ratio(row.of_qemu_nbd),
                row.server_cpu_us_per_io.map_or("-".to_owned(), |us| format!("{us:.1}")),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

const NOTES: &str = "Notes: the raw file is written by io_uring with O_DIRECT and O_DSYNC and read with O_DIRECT. A write to the \
volume is acknowledged when a majority of three replicas has synced it, all on this one disk. qemu-nbd runs with \
cache=none and aio=io_uring and syncs only on flush, so its writes promise less. Server CPU counts the MDS and all \
targets for the volume, and the one process for qemu-nbd; the client's share is not in it.";

/// The goals as lines, each after `bullet`.
pub fn goal_lines(goals: &[Goal], bullet: &str) -> String {
    let line = |goal: &Goal| {
        let found = goal.found.map_or("not measured".to_owned(), |found| format!("found {found:.2}"));
        format!("{bullet}goal: {}: {found}: {}", goal.text, if goal.met { "met" } else { "MISSED" })
    };
    goals.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The median of the values; of an even number, the mean of the middle two.
///
/// # Panics
/// There is no value.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    assert!(!values.is_empty(), "a median needs a value");
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    f64::midpoint(low, high)
}

fn rows(runs: &[Run]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for pattern in [Pattern::RandRead, Pattern::RandWrite] {
        for queue_depth in [1, 32] {
            for subject in [SubjectName::Raw, SubjectName::Volume, SubjectName::QemuNbd] {
                let same = |run: &&Run| {
                    (run.pattern, run.queue_depth, run.subject) == (pattern, queue_depth, subject)
                };
                let group: Vec<&Run> = runs.iter().filter(same).collect();
                if !group.is_empty() {
                    rows.push(row(&group));
                }
            }
        }
    }
    let plain = rows.clone();
    for row in &mut rows {
        let iops =
            |subject| find(&plain, row.pattern, row.queue_depth, subject).map(|other| row.iops / other.iops);
        (row.of_raw, row.of_qemu_nbd) = (iops(SubjectName::Raw), iops(SubjectName::QemuNbd));
    }
    rows
}

fn row(group: &[&Run]) -> Row {
    let of = |value: fn(&Run) -> f64| median(group.iter().map(|run| value(run)));
    let cpu_us = of(|run| run.server_cpu_seconds * 1e6 / run.measured.ios as f64);
    Row {
        pattern: group[0].pattern,
        queue_depth: group[0].queue_depth,
        subject: group[0].subject,
        iops: of(|run| run.measured.iops),
        p50_us: of(|run| run.measured.p50_us),
        p99_us: of(|run| run.measured.p99_us),
        server_cpu_us_per_io: (group[0].subject != SubjectName::Raw).then_some(cpu_us),
        of_raw: None,
        of_qemu_nbd: None,
    }
}

fn find(rows: &[Row], pattern: Pattern, queue_depth: u32, subject: SubjectName) -> Option<&Row> {
    rows.iter().find(|row| (row.pattern, row.queue_depth, row.subject) == (pattern, queue_depth, subject))
}

fn goals(rows: &[Row]) -> Vec<Goal> {
    let read = find(rows, Pattern::RandRead, 32, SubjectName::Volume);
    let write = |subject| find(rows, Pattern::RandWrite, 1, subject).map(|row| row.p50_us);
    let slower = write(SubjectName::Volume).zip(write(SubjectName::Raw)).map(|(volume, raw)| volume / raw);
    let goal = |text, found: Option<f64>, holds: fn(f64) -> bool| Goal {
        text,
        found,
        met: found.is_some_and(holds),
    };
    vec![
        goal("read QD32, IOPS at least 0.65 of raw", read.and_then(|row| row.of_raw), |found| found >= 0.65),
        goal("read QD32, IOPS at least 1.3 of qemu-nbd", read.and_then(|row| row.of_qemu_nbd), |found| {
            found >= 1.3
        }),
        goal("write QD1, p50 at most 3 of raw with O_DSYNC", slower, |found| found <= 3.0),
    ]
}

/// Keeps a report as JSON in `dir` under its name and time.
///
/// # Errors
/// The directory or file cannot be written.
pub fn keep(dir: &Path, name: &str, time: &str, report: &impl Serialize) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("{name}-{}.json", time.replace(':', "")));
    let written = std::fs::create_dir_all(dir).and_then(|()| {
        std::fs::write(&path, serde_json::to_vec_pretty(report).map_err(std::io::Error::other)?)
    });
    written.with_context(|| format!("the result cannot be kept as {}; see --results", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(subject: SubjectName, pattern: Pattern, queue_depth: u32, iops: f64) -> Run {
        let measured =
            Measured { iops, ios: 1000, p50_us: 1e6 / iops, p99_us: 2e6 / iops, fio: serde_json::json!({}) };
        Run { subject, pattern, queue_depth, round: 0, server_cpu_seconds: 0.01, measured }
    }

    fn report(runs: Vec<Run>) -> anyhow::Result<FirstReport> {
        FirstReport::new(Environment::read(Path::new("/"), "fio".into(), String::new()), 1 << 30, 10, 3, runs)
    }

    #[test]
    fn the_median_ignores_one_bad_round() {
        assert_eq!(median([1.0, 900.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0]), 2.5);
    }

    #[test]
    fn goals_compare_within_one_load_and_a_missing_rival_is_not_a_pass() -> anyhow::Result<()> {
        use SubjectName::{QemuNbd, Raw, Volume};
        let (read, write) = (Pattern::RandRead, Pattern::RandWrite);
        let mut runs =
            vec![run(Raw, read, 32, 1000.0), run(Volume, read, 32, 700.0), run(Volume, read, 32, 710.0)];
        runs.extend([run(Raw, write, 1, 100.0), run(Volume, write, 1, 30.0), run(Volume, read, 1, 5000.0)]);
        let found = report(runs.clone())?.goals;
        assert_eq!(found.iter().map(|goal| goal.met).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(found[1].found, None);
        runs.push(run(QemuNbd, read, 32, 500.0));
        runs.push(run(Volume, write, 1, 50.0));
        runs.push(run(Volume, write, 1, 50.0));
        let report = report(runs)?;
        assert!(report.goals.iter().all(|goal| goal.met), "{:?}", report.goals);
        let volume = find(&report.rows, read, 32, Volume).context("row")?;
        assert_eq!((volume.iops, volume.of_raw), (705.0, Some(0.705)));
        assert_eq!(volume.server_cpu_us_per_io, Some(10.0));
        Ok(())
    }

    #[test]
    fn the_markdown_page_holds_the_rows_of_the_table_and_the_goals() -> anyhow::Result<()> {
        let page = report(vec![run(SubjectName::Volume, Pattern::RandRead, 32, 1234.0)])?.markdown();
        assert!(page.contains("| randread QD32 | volume, 3 replicas") && page.contains("1234"), "{page}");
        assert!(page.contains("- goal: read QD32") && page.contains("MISSED"), "{page}");
        Ok(())
    }

    #[test]
    fn a_kept_report_is_json_with_the_time_in_its_name() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = keep(&dir.path().join("a/b"), "first", "2026-01-02T03:04:05Z", &[1, 2])?;
        assert!(path.ends_with("a/b/first-2026-01-02T030405Z.json"));
        assert_eq!(serde_json::from_slice::<Vec<u8>>(&std::fs::read(path)?)?, [1, 2]);
        Ok(())
    }
}
