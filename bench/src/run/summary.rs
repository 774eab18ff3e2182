//! Medians over the rounds, and the tables that are made of them: for a terminal, for Markdown.
//!
//! Invariant: every table, page and goal is made from these rows.

use super::load::Load;
use super::result::{Direction, Latency, Results, Run};
use super::steady::{Judged, WINDOW};
use crate::report::median;
use crate::steal::DISTURBED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// The medians of one subject under one load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Who.
    pub subject: String,
    /// What.
    pub load: Load,
    /// Of a file that was written: whether each write was durable when it completed.
    pub synced: Option<bool>,
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

    /// The subject for a table, with whether a file's writes were synced.
    pub fn name(&self) -> String {
        match self.synced {
            None => self.subject.clone(),
            Some(true) => format!("{}, dsync", self.subject),
            Some(false) => format!("{}, not synced", self.subject),
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
                let synced = (load.read_percent < 100 && results.is_file(subject)).then_some(load.dsync);
                rows.push(Row { synced, ..row(&runs) });
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
        synced: None,
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
            row.name(),
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

/// What each process used in the first round that counts: the client, whose calls of io_uring_enter are counted, then the servers.
pub fn processes(results: &Results) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut seen: Vec<(&str, &Load)> = Vec::new();
    for run in &results.runs {
        if seen.contains(&(&run.subject, &run.load)) {
            continue;
        }
        seen.push((&run.subject, &run.load));
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
    let rounds = match results.runs.iter().map(|run| run.round + 1).max().unwrap_or(0) {
        _ if !results.steady.is_empty() => {
            format!("medians of the last {WINDOW} rounds of each target, one target after the other")
        }
        rounds => format!("medians of {rounds} alternating round(s)"),
    };
    let mib = results.runs.iter().map(|run| run.load.bytes >> 20).max().unwrap_or(0);
    let client = match results.client.as_str() {
        "ashlar" => "the client of ashlar bench".to_owned(),
        fio => format!("{fio} as the client"),
    };
    let seconds = format!("{} s a measurement after {} s of warm-up", results.seconds, results.warm_up);
    let again = match repeated(results) {
        0 => String::new(),
        times => format!(
            " {times} measurement(s) were done again, since the host took more than {:.0} % of the processors.",
            DISTURBED * 100.0
        ),
    };
    format!("{seconds}, {rounds}, over {mib} MiB, by {client}.{again}")
}

/// What a reader must know of these figures, a sentence each.
pub fn notes(results: &Results) -> Vec<String> {
    let mut notes: Vec<String> = results.steady.iter().map(Judged::line).collect();
    let served = results.subjects().into_iter().any(|subject| !results.is_file(subject));
    for subject in results.subjects() {
        let loose = |run: &Run| run.load.read_percent < 100 && !run.load.dsync;
        if served && results.is_file(subject) && results.runs.iter().any(loose) {
            notes.push(format!(
                "writes of {subject} were not synced, while a served target may answer only for what is durable: \
                 --dsync compares like with like"
            ));
        }
        let runs = || results.runs.iter().filter(|run| run.subject == subject);
        let lost = runs().filter(|run| run.lost_a_server()).count();
        if lost > 0 {
            notes.push(format!(
                "a server of {subject} ended before {lost} of its measurements did: they tell no CPU time of servers"
            ));
        }
        for load in results.loads() {
            let unserved = results.runs_of(subject, load).map(|run| run.unserved).max().unwrap_or(0);
            if unserved > 0 {
                notes.push(format!(
                    "{subject}, {}: up to {unserved} IOs of a round never began, since all {} in flight were waited \
                     for: raise --depth, or lower --rate to what it can serve",
                    load.label(),
                    load.depth * load.jobs
                ));
            }
        }
    }
    notes
}

/// How often measurements were done again.
fn repeated(results: &Results) -> u32 {
    results.runs.iter().map(|run| run.repeats).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::FileFacts;
    use crate::run::load::OPEN_DEPTH;
    use crate::run::result::{ENDED, ProcessUse};
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
    fn a_server_that_ended_makes_no_subject_look_cheaper() {
        let mut results = results();
        let server = |name: &str| ProcessUse {
            name: name.into(),
            cpu_s: 1.0,
            cpu_us_per_io: 5.0,
            rss_bytes: 0,
            switches: 0,
        };
        for run in results.runs.iter_mut().filter(|run| run.subject == "b") {
            run.processes.truncate(1);
            run.processes.extend([server("target-1"), server("target-2")]);
        }
        let cpu = |results: &Results| rows(results)[1].server_us_per_io;
        assert_eq!((cpu(&results), notes(&results).len()), (Some(10.0), 0));
        let last = results.runs.iter_mut().rfind(|run| run.subject == "b").expect("two rounds");
        last.processes[1] = ProcessUse { cpu_s: 0.0, cpu_us_per_io: 0.0, ..server(ENDED) };
        assert_eq!(cpu(&results), Some(10.0), "of the round that is whole");
        let notes = notes(&results);
        assert!(notes.len() == 1 && notes[0].contains("a server of b ended before 1 of"), "{notes:?}");
    }

    #[test]
    fn an_open_loop_that_ran_out_of_depth_is_told_with_its_depth() {
        let mut results = results();
        results.runs.iter_mut().for_each(|run| (run.load.rate, run.load.depth) = (Some(500.0), OPEN_DEPTH));
        assert_eq!(
            (results.runs[0].load.label(), notes(&results).len()),
            ("randrw 70 % reads 4K 500/s".into(), 0)
        );
        results.runs.iter_mut().for_each(|run| run.load.depth = 4);
        results.runs.iter_mut().filter(|run| run.subject == "b").for_each(|run| run.unserved = 9);
        assert_eq!(results.runs[0].load.label(), "randrw 70 % reads 4K 500/s QD4");
        let notes = notes(&results);
        assert!(
            notes.len() == 1 && notes[0].contains("all 4 in flight") && notes[0].starts_with("b, "),
            "{notes:?}"
        );
    }

    #[test]
    fn tables_say_whether_a_file_was_synced_and_a_note_when_not() {
        let mut results = results();
        let facts = |subject: &str| FileFacts {
            subject: subject.into(),
            file_system: String::new(),
            disk: String::new(),
        };
        let shown = |results: &Results| table(&rows(results), &["a"], presets::ASCII_MARKDOWN).to_string();
        assert!(!shown(&results).contains("sync"), "old results do not tell who is a file");
        results.files = vec![facts("a")];
        assert!(shown(&results).contains("| a, not synced |") && !shown(&results).contains("b, "));
        assert!(notes(&results).iter().any(|note| note.contains("--dsync")));
        results.runs.iter_mut().for_each(|run| run.load.dsync = true);
        assert!(shown(&results).contains("| a, dsync "));
        assert!(notes(&results).is_empty());
        results.runs.iter_mut().for_each(|run| (run.load.dsync, run.load.read_percent) = (false, 100));
        assert!(notes(&results).is_empty() && !shown(&results).contains("sync"));
    }

    #[test]
    fn a_lone_subject_is_not_compared_with_itself() {
        let mut results = results();
        results.runs.retain(|run| run.subject == "a");
        assert!(!table(&rows(&results), &["a"], presets::ASCII_MARKDOWN).to_string().contains("x a"));
    }
}
