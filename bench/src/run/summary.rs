//! Medians over the rounds, and the tables that are made of them: for a terminal, for Markdown.
//!
//! Invariant: every table, page and goal is made from these rows.

use super::load::Load;
use super::result::{Direction, Latency, Results, Run};
use crate::report::median;
use crate::steal::DISTURBED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use std::collections::BTreeMap;

/// The medians of one subject under one load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Who.
    pub subject: String,
    /// What.
    pub load: Load,
    /// How often it was measured.
    pub rounds: usize,
    /// IOs a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_s: f64,
    /// Median latency of whichever there are more of, reads or writes; so are the others.
    pub p50_us: Option<f64>,
    /// 99 of 100 are below.
    pub p99_us: Option<f64>,
    /// 999 of 1,000 are below.
    pub p999_us: Option<f64>,
    /// The longest.
    pub max_us: Option<f64>,
    /// Of the reads; absent where there was none.
    pub reads: Option<Wait>,
    /// Of the writes.
    pub writes: Option<Wait>,
    /// CPU of the client.
    pub client_us_per_io: Option<f64>,
    /// CPU of the servers; absent where nobody serves.
    pub server_us_per_io: Option<f64>,
    /// Of an open loop: IOs that never began.
    pub unserved: f64,
    /// The part of all processors' time that the host took meanwhile.
    pub stolen: Option<f64>,
}

/// The medians of the rounds' latencies, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Wait {
    /// The median.
    pub p50_us: f64,
    /// 99 of 100 are below.
    pub p99_us: f64,
    /// 999 of 1,000 are below.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Row {
    /// The latencies of one direction.
    pub fn wait(&self, direction: Direction) -> Option<&Wait> {
        match direction {
            Direction::Reads => self.reads.as_ref(),
            Direction::Writes => self.writes.as_ref(),
        }
    }

    /// A latency for a table; of a mixed load that of reads, a stroke, and that of writes.
    pub fn shown(&self, of: fn(&Wait) -> f64) -> String {
        let one = |direction: &Direction| shown(self.wait(*direction).map(of), 0);
        Direction::of(&self.load).iter().map(one).collect::<Vec<_>>().join(" / ")
    }
}

/// How columns of latencies are called: tables with mixed loads say what is on which side of the stroke.
pub fn wait_header(rows: &[Row], name: &str) -> String {
    let mixed = rows.iter().any(|row| Direction::of(&row.load).len() > 1);
    if mixed { format!("{name} us, read / write") } else { format!("{name} us") }
}

/// A row for each load and subject, in the order measured.
pub fn rows(results: &Results) -> Vec<Row> {
    let mut rows = Vec::new();
    for load in results.loads() {
        for subject in results.subjects() {
            let runs: Vec<&Run> = results.runs_of(subject, load).collect();
            if !runs.is_empty() {
                rows.push(row(&runs));
            }
        }
    }
    rows
}

fn row(runs: &[&Run]) -> Row {
    let maybe = |value: &dyn Fn(&Run) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter_map(|run| value(run)).collect();
        (!values.is_empty()).then(|| median(values))
    };
    let of = |value: fn(&Run) -> f64| median(runs.iter().map(|run| value(run)));
    let latency = |value: fn(&Latency) -> f64| maybe(&|run| run.main_latency().map(value));
    Row {
        subject: runs[0].subject.clone(),
        load: runs[0].load.clone(),
        rounds: runs.len(),
        iops: of(|run| run.iops),
        bytes_s: of(|run| run.bytes_s),
        p50_us: latency(|l| l.p50_us),
        p99_us: latency(|l| l.p99_us),
        p999_us: latency(|l| l.p999_us),
        max_us: latency(|l| l.max_us),
        reads: wait(runs, Direction::Reads),
        writes: wait(runs, Direction::Writes),
        client_us_per_io: maybe(&|run| run.processes.first().map(|client| client.cpu_us_per_io)),
        server_us_per_io: maybe(&Run::server_cpu_us_per_io),
        unserved: of(|run| run.unserved as f64),
        stolen: maybe(&|run| run.stolen),
    }
}

fn wait(runs: &[&Run], direction: Direction) -> Option<Wait> {
    let latencies: Vec<&Latency> = runs.iter().filter_map(|run| run.latency(direction)).collect();
    let of = |value: fn(&Latency) -> f64| median(latencies.iter().map(|latency| value(latency)));
    (!latencies.is_empty()).then(|| Wait {
        p50_us: of(|l| l.p50_us),
        p99_us: of(|l| l.p99_us),
        p999_us: of(|l| l.p999_us),
        max_us: of(|l| l.max_us),
    })
}

/// The row of a subject under a load.
pub fn find<'a>(rows: &'a [Row], subject: &str, load: &Load) -> Option<&'a Row> {
    rows.iter().find(|row| row.subject == subject && row.load == *load)
}

/// A number with so many digits, or a dash.
pub fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

/// The table; `bases` are the subjects whose IOPS all others are divided by.
pub fn table(rows: &[Row], bases: &[&str], preset: &str) -> Table {
    let mut table = Table::new();
    table.load_preset(preset);
    let mut header: Vec<String> = ["load", "subject", "IOPS", "MB/s"].map(str::to_owned).into();
    header.extend(["p50", "p99", "p99.9"].map(|name| wait_header(rows, name)));
    let of = |base: &str| rows.iter().filter(|row| row.subject == base).count();
    let measured = |base: &&&str| (1..rows.len()).contains(&of(base));
    let bases: Vec<&str> = bases.iter().filter(measured).copied().collect();
    header.extend(bases.iter().map(|base| format!("x {base}")));
    header.extend(["client us/IO", "server us/IO"].map(str::to_owned));
    let unserved = rows.iter().any(|row| row.load.rate.is_some());
    header.extend(unserved.then(|| "unserved".to_owned()));
    let stolen = rows.iter().any(|row| row.stolen.is_some_and(|part| part > 0.0));
    header.extend(stolen.then(|| "stolen %".to_owned()));
    table.set_header(header);
    for row in rows {
        let ratio = |base: &&str| find(rows, base, &row.load).map(|base| row.iops / base.iops);
        let mut cells = vec![
            row.load.label(),
            row.subject.clone(),
            format!("{:.0}", row.iops),
            format!("{:.1}", row.bytes_s / 1e6),
            row.shown(|wait| wait.p50_us),
            row.shown(|wait| wait.p99_us),
            row.shown(|wait| wait.p999_us),
        ];
        cells.extend(bases.iter().map(|base| shown(ratio(base), 2)));
        cells.extend([shown(row.client_us_per_io, 1), shown(row.server_us_per_io, 1)]);
        cells.extend(unserved.then(|| format!("{:.0}", row.unserved)));
        cells.extend(stolen.then(|| shown(row.stolen.map(|part| part * 100.0), 1)));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What [`processes`] tells.
pub const PROCESS_HEADER: [&str; 8] =
    ["load", "subject", "process", "CPU s", "us/IO", "RSS MiB", "switches/IO", "enters/IO"];

/// What each process used in the first round: the client, whose calls of io_uring_enter are counted, then the servers.
pub fn processes(results: &Results) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for run in results.runs.iter().filter(|run| run.round == 0) {
        let ios =
            [&run.reads, &run.writes].into_iter().flatten().map(|latency| latency.ios).sum::<u64>().max(1);
        for (nth, one) in run.processes.iter().enumerate() {
            let enters = (nth == 0 && run.enters > 0).then(|| run.enters as f64 / ios as f64);
            rows.push(vec![
                run.load.label(),
                run.subject.clone(),
                one.name.clone(),
                format!("{:.2}", one.cpu_s),
                format!("{:.1}", one.cpu_us_per_io),
                if one.rss_bytes > 0 { (one.rss_bytes >> 20).to_string() } else { "-".into() },
                format!("{:.2}", one.switches as f64 / ios as f64),
                shown(enters, 2),
            ]);
        }
    }
    rows
}

/// The same for a terminal.
pub fn process_table(results: &Results) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(PROCESS_HEADER);
    processes(results).into_iter().for_each(|row| {
        table.add_row(row);
    });
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// How it was measured, in a sentence.
pub fn setting(results: &Results) -> String {
    let rounds = results.runs.iter().map(|run| run.round + 1).max().unwrap_or(0);
    let mib = results.runs.iter().map(|run| run.load.bytes >> 20).max().unwrap_or(0);
    let client = match results.client.as_str() {
        "ashlar" => "the client of ashlar bench".to_owned(),
        fio => format!("{fio} as the client"),
    };
    let seconds = format!("{} s a measurement after {} s of warm-up", results.seconds, results.warm_up);
    let again = match repeated(results) {
        0 => String::new(),
        rounds => format!(
            " {rounds} round(s) were measured again, since the host took more than {:.0} % of the processors.",
            DISTURBED * 100.0
        ),
    };
    format!("{seconds}, medians of {rounds} alternating round(s), over {mib} MiB, by {client}.{again}")
}

/// How many rounds were measured again, each as often as it was.
fn repeated(results: &Results) -> u32 {
    let of = |load: &Load| {
        let rounds: BTreeMap<u32, u32> =
            results.runs.iter().filter(|run| run.load == *load).map(|run| (run.round, run.repeats)).collect();
        rounds.values().sum::<u32>()
    };
    results.loads().into_iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use comfy_table::presets;

    fn results() -> Results {
        let text = include_str!("../../testdata/result-1.json");
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let mut results = Results::read(file.path()).expect("a fixture");
        for run in &mut results.runs {
            run.iops = if run.subject == "a" { 100.0 } else { 50.0 } + f64::from(run.round);
        }
        results
    }

    #[test]
    fn a_row_is_the_median_of_its_rounds_and_ratios_are_within_one_load() {
        let mut results = results();
        let mut deep: Vec<Run> = results.runs.clone();
        for run in &mut deep {
            (run.load.depth, run.iops) = (64, 1000.0);
        }
        results.runs.extend(deep);
        let rows = rows(&results);
        let iops: Vec<_> = rows.iter().map(|row| (row.load.depth, row.iops)).collect();
        assert_eq!(iops, [(32, 100.5), (32, 50.5), (64, 1000.0), (64, 1000.0)]);
        let text = table(&rows, &["a"], presets::ASCII_MARKDOWN).to_string();
        assert!(text.contains("x a") && text.contains("0.50") && text.contains("1.00"), "{text}");
        assert!(!text.contains("unserved"));
    }

    #[test]
    fn a_mixed_load_shows_reads_and_writes_beside_each_other() {
        let mut results = results();
        for run in &mut results.runs {
            run.reads.as_mut().expect("reads").p50_us = 11.0;
            run.writes.as_mut().expect("writes").p50_us = 222.0;
        }
        let text = table(&rows(&results), &["a"], presets::ASCII_MARKDOWN).to_string();
        assert!(text.contains("11 / 222") && text.contains("p50 us, read / write"), "{text}");
        for run in &mut results.runs {
            (run.load.read_percent, run.reads) = (0, None);
        }
        let text = table(&rows(&results), &["a"], presets::ASCII_MARKDOWN).to_string();
        assert!(text.contains(" 222 ") && !text.contains(" / "), "{text}");
    }

    #[test]
    fn a_lone_subject_is_not_compared_with_itself() {
        let mut results = results();
        results.runs.retain(|run| run.subject == "a");
        assert!(!table(&rows(&results), &["a"], presets::ASCII_MARKDOWN).to_string().contains("x a"));
    }
}
