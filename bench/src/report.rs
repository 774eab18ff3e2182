//! What a benchmark with goals prints and keeps: text, Markdown and JSON from the same rows.
//!
//! Invariant: a goal that could not be measured is not met.

use crate::run::result::Results;
use crate::run::summary::{self, Row};
use crate::{ClusterArgs, EXIT_CHECK_FAILED, Output};
use anyhow::Context;
use comfy_table::presets;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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

impl Goal {
    /// Holds if it was found and `holds` says so.
    pub fn new(text: &'static str, found: Option<f64>, holds: fn(f64) -> bool) -> Self {
        Self { text, found, met: found.is_some_and(holds) }
    }
}

/// The goals as lines, each after `bullet`.
pub fn goal_lines(goals: &[Goal], bullet: &str) -> String {
    let line = |goal: &Goal| {
        let found = goal.found.map_or("not measured".to_owned(), |found| format!("found {found:.2}"));
        format!("{bullet}goal: {}: {found}: {}", goal.text, if goal.met { "met" } else { "MISSED" })
    };
    goals.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// 3 when a goal of a checked run is missed.
pub fn exit_code(check: bool, goals: &[Goal]) -> ExitCode {
    let failed = check && !goals.iter().all(|goal| goal.met);
    if failed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS }
}

/// The result of a benchmark with goals.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of the page.
    #[serde(skip)]
    pub title: &'static str,
    /// The command that writes the page.
    #[serde(skip)]
    pub command: &'static str,
    /// What is measured, in a sentence.
    #[serde(skip)]
    pub about: String,
    /// Whose IOPS the others are divided by.
    #[serde(skip)]
    pub bases: Vec<&'static str>,
    /// What a reader has to know besides; Markdown.
    #[serde(skip)]
    pub notes: String,
    /// The medians.
    pub rows: Vec<Row>,
    /// What was hoped for.
    pub goals: Vec<Goal>,
    /// Every measurement.
    #[serde(flatten)]
    pub results: Results,
}

impl Report {
    /// For a terminal.
    pub fn text(&self) -> String {
        let table = summary::table(&self.rows, &self.bases, presets::UTF8_FULL_CONDENSED);
        let goals = goal_lines(&self.goals, "");
        let parts = [self.results.environment.line(), self.setting(), table.to_string(), goals];
        parts.iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join("\n")
    }

    /// A page for `docs/benchmarks`.
    pub fn markdown(&self) -> String {
        let written = format!("Written by `{}`; do not edit figures by hand.", self.command);
        let table = summary::table(&self.rows, &self.bases, presets::ASCII_MARKDOWN).to_string();
        let goals = match self.goals.as_slice() {
            [] => String::new(),
            goals => format!("## Goals\n\n{}", goal_lines(goals, "- ")),
        };
        let env = self.results.environment.line();
        let parts =
            [format!("# {}", self.title), written, env, self.setting(), table, goals, self.notes.clone()];
        let text = parts.iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join("\n\n");
        text + "\n"
    }

    fn setting(&self) -> String {
        format!("{} {}", self.about, summary::setting(&self.results)).trim().to_owned()
    }

    /// Prints it, keeps it as JSON, writes its page.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn publish(&self, args: &ClusterArgs, name: &str, page: Option<&Path>) -> anyhow::Result<ExitCode> {
        let kept = keep(&args.results, name, &self.results.environment.time, self)?;
        match args.output {
            Output::Text => println!("{}", self.text()),
            Output::Json => println!("{}", serde_json::to_string_pretty(self)?),
        }
        eprintln!("kept in {}", kept.display());
        if let Some(path) = page {
            write(path, &self.markdown())?;
        }
        Ok(exit_code(args.check, &self.goals))
    }
}

/// Writes a file of text.
///
/// # Errors
/// The folder cannot be written; the message names the file.
pub fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
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

    #[test]
    fn the_median_ignores_one_bad_round() {
        assert_eq!(median([1.0, 900.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0]), 2.5);
    }

    #[test]
    fn a_goal_that_was_not_measured_is_not_met() {
        let goal = |found| Goal::new("at least 1", found, |found| found >= 1.0);
        assert_eq!([None, Some(0.5), Some(1.0)].map(|found| goal(found).met), [false, false, true]);
        assert!(goal_lines(&[goal(None)], "- ").contains("- goal: at least 1: not measured: MISSED"));
    }

    #[test]
    fn a_page_holds_the_rows_the_goals_and_the_command_that_wrote_it() -> anyhow::Result<()> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let results = Results::read(&fixture)?;
        let rows = summary::rows(&results);
        let goals = vec![Goal::new("fast", Some(2.0), |found| found > 1.0)];
        let (about, notes, bases) = (String::new(), String::new(), vec!["a"]);
        let (title, command) = ("Title", "ashlar bench x");
        let page = Report { title, command, about, bases, notes, rows, goals, results }.markdown();
        assert!(page.starts_with("# Title\n\nWritten by `ashlar bench x`"), "{page}");
        assert!(
            page.contains("| randrw 70 % reads 4K QD32 | a") && page.contains("found 2.00: met"),
            "{page}"
        );
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
