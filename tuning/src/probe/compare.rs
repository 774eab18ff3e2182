//! Our measure beside fio's, of the same file, in turns: is ours to be trusted?
//!
//! Each round measures every load by both, and each round begins with the other one, so that a
//! drift of the machine favours neither. What counts is the median of the rounds' ratios.

use super::measure::{Bench, Load, Run};
use super::subject::Subject;
use crate::command::{Exit, Output};
use crate::render::Style;
use anyhow::{Context, ensure};
use comfy_table::{Cell, Color};
use serde::Serialize;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How far apart both may be.
const APART_MAX: f64 = 0.10;

/// What each does before it measures: fio's process is new each time.
const WARM_UP: Duration = Duration::from_millis(200);

/// Rounds that differ by more than this tell of other work on the machine.
const UNQUIET: f64 = 0.25;

/// One load, measured by both.
#[derive(Debug, Serialize)]
pub struct Row {
    load: Load,
    depth: u32,
    ours_iops: f64,
    fio_iops: f64,
    /// The median over the rounds of ours over fio's, less 1.
    apart: f64,
    /// The greatest distance of a round of ours from the median, in parts of it.
    ours_spread: f64,
    /// The same of fio's.
    fio_spread: f64,
    ours_us: f64,
    fio_us: f64,
    within: bool,
}

/// Measures each load by both.
///
/// # Errors
/// fio is missing or fails, or an IO fails.
pub fn measure_all(
    bench: &mut Bench,
    subject: &Subject,
    time: Duration,
    rounds: u32,
) -> anyhow::Result<Vec<Row>> {
    let mut loads =
        vec![Load::READ, Load { depth: 16, ..Load::READ }, Load { depth: 8, ..Load::STREAM_READ }];
    if subject.may_write() {
        let writes = [
            Load::WRITE,
            Load { depth: 16, ..Load::WRITE },
            Load::DSYNC,
            Load { depth: 8, ..Load::STREAM_WRITE },
        ];
        loads.extend(writes);
    }
    loads.into_iter().map(|load| measure(bench, subject, load, time, rounds)).collect()
}

/// Prints both, and says whether they agree.
///
/// # Errors
/// stdout cannot be written.
pub fn show(rows: &[Row], output: Output) -> anyhow::Result<Exit> {
    match output {
        Output::Json => crate::command::print(&serde_json::to_string_pretty(rows)?)?,
        Output::Text => crate::command::print(&text(rows))?,
    }
    Ok(if rows.iter().all(|row| row.within) { Exit::Ok } else { Exit::CheckFailed })
}

/// A page for docs/benchmarks.
pub fn page(rows: &[Row], time: Duration, rounds: u32) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut page = format!(
        "# `ashlar tune probe` beside fio\n\nWritten by `ashlar tune probe DIR --fio --write-markdown FILE`; do \
         not edit figures by hand.\n\nLinux {}, {cpus} processors; {rounds} alternating rounds of {:.1} s a load, \
         after a warm-up. Rates are medians; \"apart\" is the median of the rounds' ratios, since a shared machine \
         drifts (spread: the farthest round from the median, ours and fio's).\n\n\
         | load | depth | ours, IOPS | fio, IOPS | apart | ours, p50 us | fio, p50 us | spread |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        kernel.trim(),
        time.as_secs_f64()
    );
    for row in rows {
        page += &format!("| {} |\n", cells(row).join(" | "));
    }
    page + &format!("\n{}\n", verdict(rows))
}

fn measure(
    bench: &mut Bench,
    subject: &Subject,
    load: Load,
    time: Duration,
    rounds: u32,
) -> anyhow::Result<Row> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for turn in 0..2 {
            if (round + turn) % 2 == 0 {
                bench.run(load, WARM_UP)?;
                ours.push(bench.run(load, time)?);
            } else {
                theirs.push(fio(subject, load, time)?);
            }
        }
        eprintln!("{load}, depth {}, round {} of {rounds}", load.depth, round + 1);
    }
    let rate = |runs: &[Run]| median(runs.iter().map(|run| run.iops).collect());
    let wait = |runs: &[Run]| median(runs.iter().map(|run| run.p50_us).collect());
    let spread = |runs: &[Run], middle: f64| {
        runs.iter().map(|run| (run.iops / middle - 1.0).abs()).fold(0.0, f64::max)
    };
    let (ours_iops, fio_iops) = (rate(&ours), rate(&theirs));
    // Both of a round ran one after the other: their ratio holds even while the machine drifts.
    let ratios = ours.iter().zip(&theirs).map(|(ours, fio)| ours.iops / fio.iops).collect();
    let apart = median(ratios) - 1.0;
    Ok(Row {
        load,
        depth: load.depth,
        ours_iops,
        fio_iops,
        apart,
        ours_spread: spread(&ours, ours_iops),
        fio_spread: spread(&theirs, fio_iops),
        ours_us: wait(&ours),
        fio_us: wait(&theirs),
        within: apart.abs() <= APART_MAX,
    })
}

fn text(rows: &[Row]) -> String {
    let row = |row: &Row| {
        let colour = if row.within { Color::Green } else { Color::Red };
        let mut line: Vec<_> = cells(row).into_iter().map(Cell::new).collect();
        line[4] = Cell::new(cells(row)[4].as_str()).fg(colour);
        line
    };
    let header = ["LOAD", "DEPTH", "OURS IOPS", "FIO IOPS", "APART", "OURS P50 US", "FIO P50 US", "SPREAD"];
    let table = Style::of_stdout().table(&header, rows.iter().map(row).collect());
    format!("{table}\n{}\n", verdict(rows))
}

fn cells(row: &Row) -> [String; 8] {
    let percent = |part: f64| format!("{:.0} %", part * 100.0);
    [
        row.load.to_string(),
        row.depth.to_string(),
        format!("{:.0}", row.ours_iops),
        format!("{:.0}", row.fio_iops),
        format!("{:+.1} %", row.apart * 100.0),
        format!("{:.0}", row.ours_us),
        format!("{:.0}", row.fio_us),
        format!("{}, {}", percent(row.ours_spread), percent(row.fio_spread)),
    ]
}

fn verdict(rows: &[Row]) -> String {
    let within = rows.iter().filter(|row| row.within).count();
    let unquiet = rows.iter().any(|row| row.ours_spread.max(row.fio_spread) > UNQUIET);
    let note =
        if unquiet { "\nthe machine is not quiet (see spread): more --rounds, or try later" } else { "" };
    format!("{within} of {} loads within {:.0} % of fio{note}", rows.len(), APART_MAX * 100.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

fn fio(subject: &Subject, load: Load, time: Duration) -> anyhow::Result<Run> {
    let rw = match (load.write, load.stream) {
        (false, false) => "randread",
        (false, true) => "read",
        (true, false) => "randwrite",
        (true, true) => "write",
    };
    // fio splits a file's name at colons.
    let name = subject.path().display().to_string().replace(':', "\\:");
    let mut command = Command::new("fio");
    command
        .args(["--name=probe", "--ioengine=io_uring", "--direct=1", "--fallocate=none", "--norandommap"])
        .args([
            "--randrepeat=0",
            "--time_based",
            "--output-format=json",
            "--overwrite=1",
            "--allow_file_create=0",
        ])
        // Our ring has its memory and files registered.
        .args(["--fixedbufs=1", "--registerfiles=1"])
        // Ours sends the same bytes again; to change 128 KiB before each write takes a processor 6 us.
        .arg("--scramble_buffers=0")
        // The whole latency, as ours has it: from submission on.
        .args(["--lat_percentiles=1", "--clat_percentiles=0"])
        .args([format!("--filename={name}"), format!("--size={}", subject.bytes()), format!("--rw={rw}")])
        .args([format!("--bs={}", load.bytes), format!("--iodepth={}", load.depth)])
        .args([
            format!("--ramp_time={}ms", WARM_UP.as_millis()),
            format!("--runtime={}ms", time.as_millis()),
        ]);
    if load.dsync {
        command.arg("--sync=dsync");
    }
    let output = command.stdin(Stdio::null()).output();
    let output = output.context("fio cannot be run; install it: sudo apt-get install fio")?;
    ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    parse(&String::from_utf8_lossy(&output.stdout), load)
}

fn parse(text: &str, load: Load) -> anyhow::Result<Run> {
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
    let job = &json["jobs"][0];
    ensure!(job["error"].as_i64() == Some(0), "fio met an IO error");
    let side = &job[if load.write { "write" } else { "read" }];
    let number = |value: &serde_json::Value| value.as_f64().context("fio's JSON has an unknown form");
    let iops = number(&side["iops"])?;
    ensure!(iops > 0.0, "fio did no IO");
    let percentile = |name: &str| number(&side["lat_ns"]["percentile"][name]).map(|ns| ns / 1000.0);
    Ok(Run {
        load,
        iops,
        bytes_s: iops * load.bytes as f64,
        mean_us: number(&side["lat_ns"]["mean"])? / 1000.0,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_fio_with_an_error_is_no_figure() -> anyhow::Result<()> {
        let good = r#"note: x
            {"jobs": [{"error": 0, "read": {"iops": 100.5, "lat_ns": {"mean": 2000.0,
            "percentile": {"50.000000": 1500, "99.000000": 9000}}}}]}"#;
        let run = parse(good, Load::READ)?;
        assert_eq!((run.iops, run.p50_us, run.p99_us), (100.5, 1.5, 9.0));
        assert!(parse(&good.replace("\"error\": 0", "\"error\": 5"), Load::READ).is_err());
        assert!(parse(good, Load::WRITE).is_err());
        Ok(())
    }

    #[test]
    fn medians() {
        assert_eq!((median(vec![3.0, 1.0, 2.0]), median(vec![4.0, 1.0])), (2.0, 2.5));
    }
}
