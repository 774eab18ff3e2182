//! `ashlar bench micro`: single steps of the data path, by the criterion benches of the source tree.
//!
//! The benches are built from source, since they look inside crates that this program does not show. What this adds is
//! one table of all of them, for a terminal, as JSON and as a page.

use crate::Output;
use crate::environment::Environment;
use crate::report::write;
use anyhow::{Context, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Arguments of `ashlar bench micro`.
#[derive(Debug, Args)]
#[command(
    after_help = "It needs the source tree and cargo; the first build takes minutes. One group only:\n  \
    ashlar bench micro crc"
)]
pub struct MicroArgs {
    /// Only benches whose name has this in it: crc, frame, raft, log, overlay, reactor.
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,
    /// The source tree; default: here or above.
    #[arg(long, value_name = "DIR")]
    pub source: Option<PathBuf>,
    /// Write the table as a Markdown page to this file.
    #[arg(long, value_name = "FILE")]
    pub write_markdown: Option<PathBuf>,
    /// Keep the result as JSON in this file, for `bench model`.
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// How results are printed.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
}

/// What is measured, within the source tree.
const BENCH: &str = "tests/benches/micro.rs";

/// The median of one bench.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Micro {
    /// As in `crc/crc32c 4K`.
    pub name: String,
    /// Nanoseconds of one of what the name counts; see `count`.
    pub ns: f64,
    /// With 95 % confidence not below this.
    pub ns_low: f64,
    /// With 95 % confidence not above this.
    pub ns_high: f64,
    /// How many the bench does at once; `ns` is for one of them.
    pub count: u64,
    /// Bytes that go through at once, where that is what counts.
    pub bytes: Option<u64>,
}

#[derive(Serialize)]
struct MicroReport {
    environment: Environment,
    rows: Vec<Micro>,
}

/// Runs the benches.
///
/// # Errors
/// No source tree, no cargo, or a bench that fails.
pub fn run(args: &MicroArgs) -> anyhow::Result<ExitCode> {
    let source = source(args.source.as_deref())?;
    let rows = measure(Some(&source), args.filter.as_deref())?;
    let report = MicroReport { environment: Environment::read(&source, String::new(), String::new()), rows };
    publish(args, &report)
}

fn source(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    match named {
        Some(dir) => Ok(dir.to_owned()),
        None => above(&std::env::current_dir()?),
    }
}

/// Runs the benches of a source tree, here or above where none is named.
///
/// # Errors
/// See [`run`].
pub fn measure(tree: Option<&Path>, filter: Option<&str>) -> anyhow::Result<Vec<Micro>> {
    let source = source(tree)?;
    ensure!(source.join(BENCH).is_file(), "{} has no {BENCH}: is it the source tree?", source.display());
    let home = tempfile::tempdir()?;
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "-p", "ashlar-tests", "--bench", "micro"]).current_dir(&source);
    if let Some(filter) = filter {
        cargo.arg("--").arg(filter);
    }
    // What criterion prints is for whoever watches; the result is the table.
    cargo.env("CRITERION_HOME", home.path()).stdin(Stdio::null()).stdout(std::io::stderr());
    let status = cargo.status().context("cargo cannot be run; install it: https://rustup.rs")?;
    ensure!(status.success(), "cargo bench failed with {status}");
    let rows = read_all(home.path())?;
    ensure!(!rows.is_empty(), "no bench has `{}` in its name", filter.unwrap_or_default());
    Ok(rows)
}

/// Reads what `bench micro` kept, or printed as JSON.
///
/// # Errors
/// It is not there, or something else.
pub fn read(path: &Path) -> anyhow::Result<Vec<Micro>> {
    #[derive(Deserialize)]
    struct Kept {
        rows: Vec<Micro>,
    }
    let text = std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let kept: Kept = serde_json::from_slice(&text)
        .with_context(|| format!("{} is nothing that `bench micro` kept", path.display()))?;
    Ok(kept.rows)
}

/// The source tree that a folder lies in.
fn above(dir: &Path) -> anyhow::Result<PathBuf> {
    let found = dir.ancestors().find(|dir| dir.join(BENCH).is_file()).map(Path::to_owned);
    found.context(
        "the micro benches are built from source: run this within the source tree, or name it by --source",
    )
}

#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

#[derive(Deserialize)]
struct Bench {
    full_id: String,
    throughput: Option<Throughput>,
}

#[derive(Deserialize)]
enum Throughput {
    Bytes(u64),
    Elements(u64),
    #[serde(other)]
    Other,
}

/// What criterion left in its folder: `GROUP/BENCH/new/{benchmark,estimates}.json`.
fn read_all(home: &Path) -> anyhow::Result<Vec<Micro>> {
    let folders = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    };
    let mut rows = Vec::new();
    for bench in folders(home).iter().flat_map(|group| folders(group)) {
        let new = bench.join("new");
        if new.is_dir() {
            let text = |name: &str| {
                let path = new.join(name);
                std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))
            };
            rows.push(micro(&text("benchmark.json")?, &text("estimates.json")?)?);
        }
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn micro(bench: &str, estimates: &str) -> anyhow::Result<Micro> {
    let bench: Bench =
        serde_json::from_str(bench).context("criterion's benchmark.json has an unknown form")?;
    let estimates: Estimates =
        serde_json::from_str(estimates).context("criterion's estimates.json has an unknown form")?;
    let (count, bytes) = match bench.throughput {
        Some(Throughput::Elements(count)) => (count.max(1), None),
        Some(Throughput::Bytes(bytes)) => (1, Some(bytes)),
        Some(Throughput::Other) | None => (1, None),
    };
    let of = |ns: f64| ns / count as f64;
    let Estimate { point_estimate, confidence_interval: Interval { lower_bound, upper_bound } } =
        estimates.median;
    let (ns, ns_low, ns_high) = (of(point_estimate), of(lower_bound), of(upper_bound));
    Ok(Micro { name: bench.full_id, ns, ns_low, ns_high, count, bytes })
}

fn table(rows: &[Micro], preset: &str) -> Table {
    let mut table = Table::new();
    table.load_preset(preset);
    table.set_header(["step", "ns", "95 %", "for one of", "GB/s"]);
    for row in rows {
        table.add_row([
            row.name.clone(),
            format!("{:.1}", row.ns),
            format!("{:.1} to {:.1}", row.ns_low, row.ns_high),
            row.count.to_string(),
            row.bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / row.ns)),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn publish(args: &MicroArgs, report: &MicroReport) -> anyhow::Result<ExitCode> {
    let line = report.environment.line();
    if let Some(path) = &args.save {
        write(path, &serde_json::to_string_pretty(report)?)?;
    }
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
        Output::Text => println!("{line}\n{}", table(&report.rows, presets::UTF8_FULL_CONDENSED)),
    }
    if let Some(path) = &args.write_markdown {
        let table = table(&report.rows, presets::ASCII_MARKDOWN);
        write(
            path,
            &format!(
                "# Single steps of the data path\n\nWritten by `ashlar bench micro --write-markdown`; do not edit \
                 figures by hand.\n\n{line}\n\nMedians, by criterion. Where a bench does several at once (the column \
                 `for one of`), the time is that of one. `raft` is all three replicas together, `log` is planning and \
                 framing without the disk.\n\n{table}\n"
            ),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTIMATES: &str = r#"{"mean": {}, "median": {"confidence_interval": {"confidence_level": 0.95,
        "lower_bound": 3100.0, "upper_bound": 3400.0}, "point_estimate": 3200.0, "standard_error": 1.0}}"#;

    #[test]
    fn several_at_once_are_told_for_one_and_bytes_as_a_rate() -> anyhow::Result<()> {
        let elements = r#"{"group_id": "raft", "function_id": "x", "throughput": {"Elements": 32},
            "full_id": "raft/x", "directory_name": "raft/x", "title": "raft/x"}"#;
        let row = micro(elements, ESTIMATES)?;
        assert_eq!((row.name.as_str(), row.ns, row.ns_high, row.count), ("raft/x", 100.0, 106.25, 32));
        let bytes = elements.replace("{\"Elements\": 32}", "{\"Bytes\": 6400}");
        let text = table(&[micro(&bytes, ESTIMATES)?], presets::ASCII_MARKDOWN).to_string();
        assert!(text.contains(" 2.0 |"), "{text}");
        assert_eq!(micro(&elements.replace("{\"Elements\": 32}", "null"), ESTIMATES)?.ns, 3200.0);
        assert!(micro("{}", ESTIMATES).is_err());
        Ok(())
    }

    #[test]
    fn the_source_tree_is_found_from_within_and_missed_outside() {
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(above(&crate_dir.join("src")).ok().as_deref(), crate_dir.parent());
        let error = above(Path::new("/")).expect_err("no source there");
        assert!(error.to_string().contains("--source"), "{error}");
    }
}
