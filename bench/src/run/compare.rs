//! `ashlar bench compare` and `ashlar bench ci`: ratios of runs, round by round.
//!
//! A machine drifts by tens of percent within minutes. Subjects of one file ran in turns, so that each round is
//! compared with its neighbour. Two files did not: there each round is first divided by that of a subject that both
//! have and that did not change, such as the raw disk, and without one it is said that drift counts as change. What
//! counts is the median of the rounds' ratios. Results of different environments are refused unless that is asked for,
//! and then said; so is what only one file has.

use super::load::Load;
use super::measure::Client;
use super::result::{Direction, Latency, Results, Run};
use super::summary::shown;
use super::{CommonArgs, KeepArgs, TargetArgs, measure, parse_seconds, print, write_pages};
use crate::environment::FileFacts;
use crate::report::median;
use crate::{EXIT_CHECK_FAILED, Output};
use anyhow::{bail, ensure};
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// What `bench compare` takes.
#[derive(Args, Debug)]
#[command(after_help = "One file: its first subject against each other, round by round.\n\
                        Two files: the subjects of the same name, round by round.")]
pub struct CompareArgs {
    /// The base; with one file, its first subject is the base.
    #[arg(value_name = "A.json")]
    base: PathBuf,
    /// What is compared with it.
    #[arg(value_name = "B.json")]
    other: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

/// What `bench ci` takes.
#[derive(Args, Debug)]
pub struct CiArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// The result of an earlier `bench run`; its workload is run again.
    #[arg(long, value_name = "FILE")]
    baseline: PathBuf,
    #[command(flatten)]
    limits: LimitArgs,
    /// Seconds of each measurement [default: as the baseline].
    #[arg(long, value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Seconds before it, not recorded [default: as the baseline].
    #[arg(long, value_parser = parse_seconds)]
    warm_up: Option<f64>,
    /// How often each target is measured [default: as the baseline].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Write every byte once before measuring; a file that is missing is made.
    #[arg(long)]
    prepare: bool,
    #[command(flatten)]
    keep: KeepArgs,
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent: &f64| percent.is_finite() && *percent >= 0.0);
    percent.ok_or_else(|| format!("`{text}` is no percentage from 0 on"))
}

/// When a difference is a regression.
#[derive(Args, Debug)]
pub struct LimitArgs {
    /// Percent that IOPS may fall, or median latency rise; spread of the rounds beyond that is allowed for.
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT", value_parser = parse_percent)]
    tolerance: f64,
    /// Percent that the 99th percentile of latency may rise; it varies more than the median.
    #[arg(long, default_value_t = 25.0, value_name = "PERCENT", value_parser = parse_percent)]
    tail_tolerance: f64,
    /// Of two runs: the subject of both that did not change, by which each round of the others is divided
    /// [default: the first file that both measured].
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,
    /// Compare also when machine, kernel, boot, build or time of measurement differ.
    #[arg(long)]
    across: bool,
}

/// One comparison.
#[derive(Debug, Serialize)]
struct Row {
    load: String,
    base: String,
    other: String,
    measure: String,
    /// By whose change the ratios are divided.
    reference: Option<String>,
    /// Medians.
    was: f64,
    is: f64,
    /// The median of the rounds' ratios, and the least and greatest of them; absent of what may be nothing.
    ratio: Option<f64>,
    ratio_min: Option<f64>,
    ratio_max: Option<f64>,
    regressed: bool,
}

/// Runs `bench compare`.
///
/// # Errors
/// A file that cannot be read, or results that cannot be compared.
pub fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    let base = Results::read(&args.base)?;
    let rows = match &args.other {
        None => within(&base, &args.limits)?,
        Some(path) => between(&base, &Results::read(path)?, &args.limits)?,
    };
    finish(&rows, args.output)
}

/// Runs `bench ci`.
///
/// # Errors
/// See [`run`] and [`crate::run::run`].
pub fn ci(args: &CiArgs) -> anyhow::Result<ExitCode> {
    let base = Results::read(&args.baseline)?;
    ensure!(
        base.client == "ashlar",
        "the baseline was measured by {}: compare with `bench compare`",
        base.client
    );
    let place = |path: &PathBuf| std::fs::canonicalize(path).ok();
    let apart = place(&args.keep.save) != place(&args.baseline);
    ensure!(apart, "the baseline would be written over: name another --save FILE");
    let subjects = args.targets.subjects()?;
    let names: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    let different = only_in_one(("the baseline", &base.subjects()), ("the command line", &names));
    ensure!(different.is_empty(), "{}", different.join("; "));
    let loads: Vec<Load> = base.loads().into_iter().cloned().collect();
    let new = measure(&subjects, &loads, &args.like(&base), &Client::Own)?;
    write_pages(&new, &args.keep, "ashlar bench ci")?;
    if args.keep.output == Output::Text {
        print(&new, &args.keep)?;
    }
    finish(&between(&base, &new, &args.limits)?, args.keep.output)
}

impl CiArgs {
    /// How to measure: as the baseline was, unless the command line says otherwise.
    fn like(&self, base: &Results) -> CommonArgs {
        CommonArgs {
            seconds: self.seconds.unwrap_or(base.seconds),
            warm_up: self.warm_up.unwrap_or(base.warm_up),
            rounds: self.rounds.unwrap_or_else(|| base.rounds()),
            prepare: self.prepare,
            keep: self.keep.clone(),
        }
    }
}

/// Every other subject of a file beside its first.
fn within(results: &Results, limits: &LimitArgs) -> anyhow::Result<Vec<Row>> {
    let subjects = results.subjects();
    ensure!(subjects.len() > 1, "there is only one subject: name a second file to compare with");
    let (first, others) = (subjects[0], &subjects[1..]);
    let mut all = Vec::new();
    for load in results.loads() {
        for other in others {
            all.extend(rows(load, (first, results), (other, results), None, limits));
        }
    }
    Ok(all)
}

/// The subjects of the same name of two files.
fn between(base: &Results, other: &Results, limits: &LimitArgs) -> anyhow::Result<Vec<Row>> {
    let loads: Vec<&Load> = base.loads().into_iter().filter(|load| other.loads().contains(load)).collect();
    let mut lone = lone_loads("the base", base, other);
    ensure!(!loads.is_empty(), "the workloads differ: {}", lone.join("; "));
    lone.extend(lone_loads("the other", other, base));
    let both: Vec<&str> =
        base.subjects().into_iter().filter(|name| other.subjects().contains(name)).collect();
    ensure!(!both.is_empty(), "no subject is in both: {:?} and {:?}", base.subjects(), other.subjects());
    lone.extend(only_in_one(("the base", &base.subjects()), ("the other", &other.subjects())));
    lone.iter().for_each(|line| eprintln!("note: not compared: {line}"));
    let different = differences(base, other);
    if !different.is_empty() && !limits.across {
        bail!(
            "these were measured differently: {}; measure again, alike and on one machine, or say --across",
            different.join("; ")
        );
    }
    for difference in &different {
        eprintln!("WARNING, compared although measured differently: {difference}");
    }
    let reference = reference(base, other, &both, limits.reference.as_deref())?;
    match reference {
        Some(name) => eprintln!(
            "note: these runs did not alternate: each ratio is divided by the change of {name} in the same round"
        ),
        None => eprintln!(
            "note: these runs did not alternate and share no reference, such as a file: what the machine drifted by \
             meanwhile counts as change"
        ),
    }
    let mut all = Vec::new();
    for load in loads {
        for name in &both {
            let count = |results: &Results| results.runs_of(name, load).count();
            if count(base) != count(other) {
                let (what, was, is) = (load.label(), count(base), count(other));
                eprintln!("note: {name}, {what}: {was} rounds in the base and {is} in the other");
            }
            all.extend(rows(load, (name, base), (name, other), reference, limits));
        }
    }
    ensure!(!all.is_empty(), "no subject was measured under the same load in both");
    Ok(all)
}

/// The names that only one of two lists has.
fn only_in_one(a: (&str, &[&str]), b: (&str, &[&str])) -> Vec<String> {
    let lone = |(here, names): (&str, &[&str]), others: &[&str]| -> Vec<String> {
        let lone = names.iter().filter(|name| !others.contains(name));
        lone.map(|name| format!("subject {name} is only in {here}")).collect()
    };
    [lone(a, b.1), lone(b, a.1)].concat()
}

/// The loads that only the first has, and in what the most similar one of the second differs.
fn lone_loads(here: &str, results: &Results, others: &Results) -> Vec<String> {
    let lone = results.loads().into_iter().filter(|load| !others.loads().contains(load));
    let line = |load: &Load| {
        let different = others.loads().into_iter().map(|other| different_fields(load, other));
        let least = different.min_by_key(Vec::len).unwrap_or_default();
        format!("{} is only in {here}, and the nearest differs in {}", load.label(), least.join(", "))
    };
    lone.map(line).collect()
}

/// The fields in which two loads differ, with both values.
fn different_fields(a: &Load, b: &Load) -> Vec<String> {
    let fields = |load| serde_json::to_value(load).unwrap_or_default();
    let (a, b) = (fields(a), fields(b));
    let different = a.as_object().into_iter().flatten().filter(|(name, value)| b[name.as_str()] != **value);
    different.map(|(name, value)| format!("{name} ({value} and {})", b[name.as_str()])).collect()
}

/// The subject by which others are divided: the named one, or the first file that both measured.
fn reference<'a>(
    base: &Results,
    other: &Results,
    both: &[&'a str],
    named: Option<&str>,
) -> anyhow::Result<Option<&'a str>> {
    let found = both.iter().copied().find(|name| match named {
        Some(named) => *name == named,
        None => base.is_file(name) && other.is_file(name),
    });
    ensure!(found.is_some() || named.is_none(), "the reference {} is not in both", named.unwrap_or_default());
    // Alone there is nothing that it could be divided by.
    Ok(found.filter(|_| both.len() > 1))
}

/// How two environments differ, in words.
fn differences(a: &Results, b: &Results) -> Vec<String> {
    let (x, y) = (&a.environment, &b.environment);
    // Of the files that both tell of.
    let files = |of: &Results, other: &Results| {
        let both = |file: &&FileFacts| other.files.iter().any(|one| one.subject == file.subject);
        of.files.iter().filter(both).map(FileFacts::line).collect::<Vec<_>>().join("; ")
    };
    let tuning = |of: &Results| of.tuning.as_ref().map_or("unknown".to_owned(), |wanting| wanting.join(", "));
    let facts = [
        ("kernel", x.kernel.clone(), y.kernel.clone()),
        ("processor", x.cpu.clone(), y.cpu.clone()),
        ("processors", x.cpus.to_string(), y.cpus.to_string()),
        ("memory", x.memory_mib.to_string(), y.memory_mib.to_string()),
        ("file system", x.file_system.clone(), y.file_system.clone()),
        ("debug build", x.debug_build.to_string(), y.debug_build.to_string()),
        ("boot of the machine", a.session.clone(), b.session.clone()),
        ("disk", a.disk.join(", "), b.disk.join(", ")),
        ("tuning", tuning(a), tuning(b)),
        ("client", a.client.clone(), b.client.clone()),
        ("seconds", a.seconds.to_string(), b.seconds.to_string()),
        ("warm-up", a.warm_up.to_string(), b.warm_up.to_string()),
        ("measured files", files(a, b), files(b, a)),
    ];
    let different = facts.into_iter().filter(|(_, a, b)| a != b);
    different.map(|(what, a, b)| format!("{what} `{a}` and `{b}`")).collect()
}

/// What one subject did under a load, beside another or itself. A reference is divided by, and itself not judged.
fn rows(
    load: &Load,
    base: (&str, &Results),
    other: (&str, &Results),
    reference: Option<&str>,
    limits: &LimitArgs,
) -> Vec<Row> {
    let pairs: Vec<(&Run, &Run)> = base.1.runs_of(base.0, load).zip(other.1.runs_of(other.0, load)).collect();
    if pairs.is_empty() {
        return Vec::new();
    }
    let is_reference = reference == Some(other.0);
    let reference = reference.filter(|_| !is_reference);
    // By how much the reference changed between the rounds of two runs; 1 where it has no such value.
    let drift = |(was, is): (&Run, &Run), value: &dyn Fn(&Run) -> Option<f64>| {
        let of = |results: &Results, round| {
            let mut runs = results.runs_of(reference?, load);
            value(runs.find(|run| run.round == round)?).filter(|value| *value > 0.0)
        };
        of(base.1, was.round).zip(of(other.1, is.round)).map_or(1.0, |(was, is)| is / was)
    };
    let row = |measure: String, values: &[(f64, f64)], ratios: &[f64], regressed| Row {
        load: load.label(),
        base: base.0.to_owned(),
        other: other.0.to_owned(),
        measure,
        reference: reference.map(str::to_owned),
        was: median(values.iter().map(|(was, _)| *was)),
        is: median(values.iter().map(|(_, is)| *is)),
        ratio: (!ratios.is_empty()).then(|| median(ratios.iter().copied())),
        ratio_min: ratios.iter().copied().reduce(f64::min),
        ratio_max: ratios.iter().copied().reduce(f64::max),
        regressed: regressed && !is_reference,
    };
    let compared = |measure: String, more_is_better, tolerance, value: &dyn Fn(&Run) -> Option<f64>| {
        let (mut values, mut ratios) = (Vec::new(), Vec::new());
        for (a, b) in &pairs {
            if let (Some(was), Some(is)) = (value(a).filter(|was| *was > 0.0), value(b)) {
                values.push((was, is));
                ratios.push(is / was / drift((a, b), value));
            }
        }
        (!ratios.is_empty())
            .then(|| row(measure, &values, &ratios, is_worse(&ratios, more_is_better, tolerance)))
    };
    let mut all = vec![compared("IOPS".into(), true, limits.tolerance, &|run| Some(run.iops))];
    let directions = Direction::of(load);
    for direction in directions {
        let named = |name: &str| match directions.len() {
            1 => name.to_owned(),
            _ => format!("{}, {name}", direction.name()),
        };
        let latency = |of: fn(&Latency) -> f64| move |run: &Run| run.latency(*direction).map(of);
        all.push(compared(named("p50 us"), false, limits.tolerance, &latency(|l| l.p50_us)));
        all.push(compared(named("p99 us"), false, limits.tail_tolerance, &latency(|l| l.p99_us)));
    }
    if load.rate.is_some() {
        let values: Vec<_> = pairs.iter().map(|(a, b)| (unserved_percent(a), unserved_percent(b))).collect();
        let rise = median(values.iter().map(|(was, is)| is - was));
        all.push(Some(row("unserved %".into(), &values, &[], rise > UNSERVED_RISE_MAX)));
    }
    all.push(compared("server CPU us/IO".into(), false, limits.tolerance, &Run::server_cpu_us_per_io));
    all.into_iter().flatten().collect()
}

/// Percent of an open loop's IOs that may go unserved beyond those of the base: as many as a stall at the end of a
/// measurement leaves. It is a difference and no ratio, since a base that keeps up leaves none.
const UNSERVED_RISE_MAX: f64 = 1.0;

/// Of an open loop: percent of the IOs that should have begun and never did.
fn unserved_percent(run: &Run) -> f64 {
    let ios: u64 = [&run.reads, &run.writes].into_iter().flatten().map(|latency| latency.ios).sum();
    run.unserved as f64 * 100.0 / ios.max(run.unserved).max(1) as f64
}

/// Twice the standard error of a median, in median absolute deviations over the root of the number of rounds: of a
/// normal distribution the deviation is 1.48 of those, and the error of the median 1.25 of that of the mean.
const ERROR_SPAN: f64 = 2.0 * 1.48 * 1.25;

/// Whether rounds got worse: the median of their ratios is beyond the tolerance, and so far from 1 that their spread
/// does not explain it.
///
/// The spread is the median absolute deviation, since no single round can move it, whether of the base or of the other.
/// A sign test would need five rounds before it could tell anything; to ask that every round be worse lets one bad
/// round of the base excuse all others, and finds less the more rounds there are. Of one or two rounds there is no
/// spread to speak of, and the tolerance alone decides.
fn is_worse(ratios: &[f64], more_is_better: bool, tolerance: f64) -> bool {
    let ratio = median(ratios.iter().copied());
    let change = if more_is_better { 1.0 - ratio } else { ratio - 1.0 };
    let deviation = median(ratios.iter().map(|one| (one - ratio).abs()));
    let error = if ratios.len() < 3 { 0.0 } else { ERROR_SPAN * deviation / (ratios.len() as f64).sqrt() };
    change > tolerance / 100.0 && change > error
}

fn finish(rows: &[Row], output: Output) -> anyhow::Result<ExitCode> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(rows)?),
        Output::Text => println!("{}", table(rows)),
    }
    let regressed = rows.iter().any(|row| row.regressed);
    Ok(if regressed { ExitCode::from(EXIT_CHECK_FAILED) } else { ExitCode::SUCCESS })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["load", "base", "other", "measure", "base", "other", "ratio", "rounds", ""]);
    for row in rows {
        table.add_row([
            row.load.clone(),
            row.base.clone(),
            row.other.clone(),
            row.measure.clone(),
            format!("{:.1}", row.was),
            format!("{:.1}", row.is),
            shown(row.ratio, 3),
            format!("{} to {}", shown(row.ratio_min, 3), shown(row.ratio_max, 3)),
            if row.regressed { "REGRESSION".to_owned() } else { String::new() },
        ]);
    }
    for column in table.column_iter_mut().skip(4).take(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Environment;
    use crate::run::result::SCHEMA;
    use anyhow::Context;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        ci: CiArgs,
    }

    fn results(name: &str, iops: &[f64]) -> Results {
        let load = Load::random_4k(100, 1, 1 << 20);
        let run = |(round, iops): (usize, &f64)| Run {
            subject: name.into(),
            load: load.clone(),
            round: round as u32,
            repeats: 0,
            stolen: None,
            iops: *iops,
            bytes_s: 0.0,
            reads: None,
            writes: None,
            unserved: 0,
            enters: 0,
            verified: None,
            timeline: Vec::new(),
            processes: Vec::new(),
        };
        let environment = Environment::read(std::path::Path::new("/"), String::new(), String::new());
        Results {
            schema: SCHEMA.into(),
            environment,
            revision: String::new(),
            session: "s".into(),
            tuning: Some(Vec::new()),
            disk: Vec::new(),
            files: Vec::new(),
            client: "ashlar".into(),
            seconds: 1.0,
            warm_up: 1.0,
            runs: iops.iter().enumerate().map(run).collect(),
            steady: Vec::new(),
            transient: Vec::new(),
        }
    }

    fn limits(across: bool) -> LimitArgs {
        LimitArgs { tolerance: 5.0, tail_tolerance: 25.0, reference: None, across }
    }

    fn regressed(was: &[f64], is: &[f64]) -> bool {
        let rows = between(&results("a", was), &results("a", is), &limits(false)).expect("comparable");
        rows.iter().any(|row| row.regressed)
    }

    #[test]
    fn a_slower_build_is_a_regression_and_one_bad_round_is_not() {
        assert!(regressed(&[100.0, 100.0, 100.0], &[90.0, 91.0, 89.0]));
        assert!(!regressed(&[100.0, 100.0, 100.0], &[97.0, 98.0, 96.0]), "within the tolerance");
        assert!(!regressed(&[100.0, 100.0, 100.0], &[101.0, 40.0, 99.0]), "one bad round");
        assert!(!regressed(&[100.0, 50.0, 100.0], &[99.0, 50.0, 100.0]), "both drift alike");
        assert!(!regressed(&[100.0], &[200.0]), "faster");
    }

    #[test]
    fn a_bad_round_of_the_base_hides_no_regression_and_more_rounds_see_more() {
        assert!(regressed(&[100.0, 100.0, 40.0], &[60.0, 60.0, 60.0]));
        // 15 % slower among rounds that range over 20 %, one of which happens to be faster.
        let slower = [0.83, 0.97, 0.80, 1.02, 0.85];
        let rounds = |count: usize| -> Vec<f64> { slower.iter().cycle().take(count).copied().collect() };
        assert!(is_worse(&rounds(5), true, 5.0) && is_worse(&rounds(15), true, 5.0));
        assert!(!is_worse(&[0.80, 1.15, 0.90, 1.10, 0.94], true, 5.0), "as much faster as slower");
        assert!(is_worse(&[1.2, 0.4, 1.2], false, 5.0), "of what should be small");
    }

    /// A result of the fixture, whose load is mixed.
    fn mixed() -> Results {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let mut results = Results::read(&path).expect("a fixture");
        results.runs.retain(|run| run.subject == "a");
        results
    }

    /// What regressed when the runs were changed so.
    fn regressions(base: &Results, change: fn(&mut Run)) -> Vec<String> {
        let mut other = base.clone();
        other.runs.iter_mut().for_each(change);
        let rows = between(base, &other, &limits(false)).expect("comparable");
        rows.into_iter().filter(|row| row.regressed).map(|row| row.measure).collect()
    }

    #[test]
    fn of_a_mixed_load_both_directions_are_judged_and_their_tails() {
        assert_eq!(
            regressions(&mixed(), |run| run.writes.as_mut().expect("mixed").p50_us *= 1.1),
            ["writes, p50 us"]
        );
        assert_eq!(
            regressions(&mixed(), |run| run.reads.as_mut().expect("mixed").p50_us *= 1.1),
            ["reads, p50 us"]
        );
        assert_eq!(
            regressions(&mixed(), |run| run.writes.as_mut().expect("mixed").p99_us *= 1.3),
            ["writes, p99 us"]
        );
        assert!(regressions(&mixed(), |run| run.writes.as_mut().expect("mixed").p99_us *= 1.2).is_empty());
    }

    #[test]
    fn an_open_loop_that_serves_fewer_of_its_ios_regressed() {
        let mut base = mixed();
        base.runs.iter_mut().for_each(|run| run.load.rate = Some(1000.0));
        assert_eq!(regressions(&base, |run| run.unserved = 5000), ["unserved %"]);
        assert!(regressions(&base, |run| run.unserved = 50).is_empty());
    }

    #[test]
    fn different_environments_are_compared_only_when_that_is_said() {
        let (a, mut b) = (results("a", &[1.0]), results("a", &[1.0]));
        b.environment.kernel = "2.4".into();
        let error = between(&a, &b, &limits(false)).expect_err("another kernel");
        assert!(error.to_string().contains("kernel") && error.to_string().contains("2.4"), "{error}");
        assert!(between(&a, &b, &limits(true)).is_ok());
        b.runs[0].load.depth = 2;
        b.runs[0].load.seed = 7;
        let error = between(&a, &b, &limits(true)).expect_err("another workload is never compared");
        assert!(error.to_string().contains("differs in depth (1 and 2), seed (1 and 7)"), "{error}");
        assert!(between(&a, &results("b", &[1.0]), &limits(false)).is_err(), "no subject in both");
    }

    #[test]
    fn runs_of_other_lengths_are_compared_only_when_that_is_said() {
        for change in [|other: &mut Results| other.seconds = 9.0, |other: &mut Results| other.warm_up = 9.0] {
            let mut other = results("a", &[1.0]);
            change(&mut other);
            assert!(between(&results("a", &[1.0]), &other, &limits(false)).is_err());
        }
    }

    fn file(subject: &str) -> FileFacts {
        FileFacts { subject: subject.into(), file_system: "ext4 on x".into(), disk: String::new() }
    }

    #[test]
    fn drift_of_a_file_that_both_runs_measured_is_no_regression() {
        let run = |raw: &[f64], volume: &[f64], files: &[FileFacts]| {
            let mut both = results("raw", raw);
            both.runs.extend(results("vol", volume).runs);
            both.files = files.to_vec();
            both
        };
        let regressed = |files: &[FileFacts], volume: &[f64], reference: Option<&str>| {
            let (base, other) = (run(&[100.0; 3], &[50.0; 3], files), run(&[80.0; 3], volume, files));
            let limits = LimitArgs { reference: reference.map(str::to_owned), ..limits(false) };
            let rows = between(&base, &other, &limits).expect("comparable");
            rows.into_iter().filter(|row| row.regressed).map(|row| row.other).collect::<Vec<_>>()
        };
        let raw = &[file("raw")];
        assert!(regressed(raw, &[40.0; 3], None).is_empty(), "the whole machine is slower");
        assert_eq!(regressed(raw, &[30.0; 3], None), ["vol"]);
        assert_eq!(regressed(raw, &[35.0, 36.0, 35.0], None), ["vol"], "12 % beyond the drift");
        assert_eq!(regressed(&[], &[40.0; 3], None), ["raw", "vol"], "no reference");
        assert!(regressed(&[], &[40.0; 3], Some("raw")).is_empty());
        let limits = LimitArgs { reference: Some("x".into()), ..limits(false) };
        let base = results("a", &[1.0]);
        assert!(between(&base, &base, &limits).is_err(), "no such reference");
    }

    #[test]
    fn what_only_one_side_has_is_told_by_name() {
        let lone = only_in_one(("A", &["raw", "vol"]), ("B", &["vol", "nbd"]));
        assert_eq!(lone, ["subject raw is only in A", "subject nbd is only in B"]);
        let (mut more, less) = (results("a", &[1.0]), results("a", &[1.0]));
        let mut deep = more.runs.clone();
        deep[0].load.depth = 32;
        more.runs.extend(deep);
        let lone = lone_loads("A", &more, &less);
        assert_eq!(lone, ["randread 4K QD32 is only in A, and the nearest differs in depth (32 and 1)"]);
        assert!(lone_loads("B", &less, &more).is_empty());
    }

    #[test]
    fn ci_measures_as_the_baseline_was_measured_unless_told_otherwise() {
        let line = |line: &str| Line::parse_from(line.split(' ')).ci;
        let base = Results { seconds: 3.0, warm_up: 0.5, ..results("a", &[1.0, 1.0, 1.0]) };
        let like = line("x file:/x --baseline b.json").like(&base);
        assert_eq!((like.seconds, like.warm_up, like.rounds), (3.0, 0.5, 3));
        let other = line("x file:/x --baseline b.json --seconds 2 --rounds 7").like(&base);
        assert_eq!((other.seconds, other.warm_up, other.rounds), (2.0, 0.5, 7));
    }

    #[test]
    fn what_is_no_tolerance_and_what_is_no_result_are_refused() -> anyhow::Result<()> {
        for text in ["nan", "inf", "-1", "x", ""] {
            assert!(parse_percent(text).is_err(), "{text}");
        }
        assert_eq!(parse_percent("0.5"), Ok(0.5));
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("r.json");
        for change in [|r: &mut Results| r.runs.clear(), |r: &mut Results| r.runs[0].load.sizes.0.clear()] {
            let mut damaged = results("a", &[1.0]);
            change(&mut damaged);
            damaged.write(&path)?;
            let error = Results::read(&path).err().context("it is damaged")?;
            assert!(error.to_string().contains("r.json is damaged"), "{error:#}");
        }
        Ok(())
    }

    #[test]
    fn ci_does_not_write_over_its_baseline() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let baseline = dir.path().join("base.json");
        results("raw", &[1.0]).write(&baseline)?;
        let path = baseline.display();
        let line = format!("x raw=file:/nonexistent --baseline {path} --save {path}");
        let error = ci(&Line::parse_from(line.split(' ')).ci).err().context("it would be lost")?;
        assert!(error.to_string().contains("written over"), "{error}");
        Ok(())
    }

    #[test]
    fn ci_refuses_other_subjects_than_the_baseline_has_before_it_measures() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let baseline = dir.path().join("base.json");
        results("vol", &[1.0]).write(&baseline)?;
        let line = format!("x raw=file:/nonexistent --baseline {}", baseline.display());
        let error = ci(&Line::parse_from(line.split(' ')).ci).err().context("other subjects")?;
        assert!(error.to_string().contains("vol is only in the baseline"), "{error}");
        assert!(error.to_string().contains("raw is only in the command line"), "{error}");
        Ok(())
    }

    #[test]
    fn subjects_of_one_file_are_paired_round_by_round() {
        let mut both = results("a", &[100.0, 50.0]);
        both.runs.extend(results("b", &[80.0, 40.0]).runs);
        let rows = within(&both, &limits(false)).expect("two subjects");
        assert_eq!((rows.len(), rows[0].ratio, rows[0].regressed), (1, Some(0.8), true));
        assert!(within(&results("a", &[1.0]), &limits(false)).is_err());
    }
}
