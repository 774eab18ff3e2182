//! `ashlar bench steady`: what a target does once it no longer lives on what it has not yet had to pay for.
//!
//! As SNIA's Solid State Storage Performance Test Specification has it: every byte is written first, then rounds are
//! measured until, over five of them, IOPS range within 20 % of their mean, and the line of best fit falls or rises
//! by no more than 10 % of it. Figures are those of these five; the rounds before them are kept apart.

use super::measure::{Client, Measured, Plan, SETTLE_MAX, prepare};
use super::result::Results;
use super::{KeepArgs, LoadArgs, TargetArgs, keep, nothing_yet, parse_seconds, settle, show};
use crate::EXIT_CHECK_FAILED;
use crate::cluster::SETTLE_LIMIT;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

/// What `bench steady` takes.
#[derive(Args, Debug)]
#[command(after_help = "Exits with 3 when a target is not steady after --rounds-max rounds. Example:\n  \
    ashlar bench steady vol=dev:nvme --dev /srv/d --read 0 --depth 32 --size 4G --seconds 30\n\n\
    SNIA's rounds take a minute; --seconds 60 --passes 2 is its procedure, less is a quick look.")]
pub struct SteadyArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// How often every byte is written beforehand.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=10))]
    passes: u32,
    /// Rounds at most.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(5..=1000))]
    rounds_max: u32,
    /// Seconds of each round.
    #[arg(long, default_value_t = 10.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Seconds before it, not recorded.
    #[arg(long, default_value_t = 1.0, value_parser = parse_seconds)]
    warm_up: f64,
    #[command(flatten)]
    keep: KeepArgs,
}

/// Rounds that are looked at together.
pub const WINDOW: usize = 5;
/// Part of the mean that IOPS may range over.
const RANGE_MAX: f64 = 0.2;
/// Part of the mean that the line of best fit may move by from the first round of a window to its last.
const SLOPE_MAX: f64 = 0.1;

/// What the last rounds say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether both limits hold.
    pub steady: bool,
    /// The first round of the window, from 0.
    pub from_round: usize,
    /// Mean IOPS of the window.
    pub mean: f64,
    /// From the lowest to the highest, as a part of the mean.
    pub range: f64,
    /// How far the line of best fit moves within the window, as a part of the mean.
    pub slope: f64,
}

/// Judges the last rounds; `None` while there are fewer than five.
pub fn judge(iops: &[f64]) -> Option<Verdict> {
    let from_round = iops.len().checked_sub(WINDOW)?;
    let window = &iops[from_round..];
    let count = WINDOW as f64;
    let mean = window.iter().sum::<f64>() / count;
    let (low, high) =
        window.iter().fold((f64::MAX, f64::MIN), |(low, high), iops| (low.min(*iops), high.max(*iops)));
    let middle = (count - 1.0) / 2.0;
    let offsets = (0..WINDOW).map(|nth| nth as f64 - middle);
    let square: f64 = offsets.clone().map(|x| x * x).sum();
    let slope: f64 = offsets.zip(window).map(|(x, iops)| x * (iops - mean)).sum::<f64>() / square;
    let range = (high - low) / mean;
    let slope = slope.abs() * (count - 1.0) / mean;
    Some(Verdict { steady: range <= RANGE_MAX && slope <= SLOPE_MAX, from_round, mean, range, slope })
}

/// The judgement of one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// Its name.
    pub subject: String,
    /// How many there were in all.
    pub rounds: usize,
    /// Absent of too few rounds.
    #[serde(flatten)]
    pub verdict: Option<Verdict>,
}

/// Runs `bench steady`.
///
/// # Errors
/// See [`super::run`].
pub fn run(args: &SteadyArgs) -> anyhow::Result<ExitCode> {
    let (subjects, load) = (args.targets.subjects()?, args.load.load());
    let SteadyArgs { seconds, warm_up, rounds_max, .. } = *args;
    let loads = std::slice::from_ref(&load);
    let client = Client::Own;
    args.keep.make_folders()?;
    let plan = Plan {
        client: &client,
        subjects: &subjects,
        loads,
        seconds,
        warm_up,
        rounds: rounds_max,
        settle_max: SETTLE_MAX,
    };
    let mut results = nothing_yet(&plan, &args.keep);
    for subject in &subjects {
        for _ in 0..args.passes {
            prepare(subject, load.bytes)?;
        }
        settle(&subjects, SETTLE_LIMIT);
        let (rounds, verdict) = until_steady(rounds_max, |round| plan.one(subject, &load, round))?;
        let judged = Judged { subject: subject.name.clone(), rounds: rounds.len(), verdict };
        eprintln!("{}", judged.line());
        let window = part(&mut results, judged, rounds);
        keep(&mut results, window, false, &args.keep)?;
    }
    show(&results, &args.keep, "ashlar bench steady")?;
    let is_steady = |one: &Judged| one.verdict.as_ref().is_some_and(|verdict| verdict.steady);
    let steady = results.steady.iter().all(is_steady);
    Ok(if steady { ExitCode::SUCCESS } else { ExitCode::from(EXIT_CHECK_FAILED) })
}

/// Puts the verdict and the rounds before its window into the results; the others are left.
fn part(results: &mut Results, judged: Judged, mut rounds: Vec<Measured>) -> Vec<Measured> {
    let window = judged.verdict.as_ref().map_or(0, |verdict| verdict.from_round);
    results.transient.extend(rounds.drain(..window).map(|one| one.run));
    results.steady.push(judged);
    rounds
}

/// Measures rounds until the last five are steady, or there are so many.
fn until_steady(
    rounds_max: u32,
    mut round: impl FnMut(u32) -> anyhow::Result<Measured>,
) -> anyhow::Result<(Vec<Measured>, Option<Verdict>)> {
    let (mut rounds, mut iops, mut verdict) = (Vec::new(), Vec::new(), None);
    for nth in 0..rounds_max {
        let measured = round(nth)?;
        iops.push(measured.run.iops);
        rounds.push(measured);
        verdict = judge(&iops);
        if verdict.as_ref().is_some_and(|verdict| verdict.steady) {
            break;
        }
    }
    Ok((rounds, verdict))
}

impl Judged {
    /// For people.
    pub fn line(&self) -> String {
        let Self { subject, rounds, verdict } = self;
        let Some(Verdict { steady, mean, range, slope, from_round }) = verdict else {
            return format!("{subject}: {rounds} rounds are too few to judge");
        };
        format!(
            "{subject}: {} after {rounds} rounds; rounds {} to {rounds}: mean {mean:.0} IOPS, range {:.1} % (at most 20), \
             slope {:.1} % (at most 10)",
            if *steady { "steady" } else { "NOT STEADY" },
            from_round + 1,
            range * 100.0,
            slope * 100.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::load::Load;
    use crate::run::summary;
    use std::path::Path;

    fn run(round: u32, iops: f64) -> Measured {
        let text = include_str!("../../testdata/result-1.json");
        let json: serde_json::Value = serde_json::from_str(text).expect("a fixture");
        let mut one = json["runs"][0].clone();
        one["load"] = serde_json::to_value(Load::random_4k(0, 1, 4096)).expect("plain");
        (one["round"], one["iops"]) = (round.into(), iops.into());
        let (run, times) = (serde_json::from_value(one).expect("a run"), crate::run::job::histogram());
        Measured { run, times, intervals: crate::run::result::Intervals::new(round) }
    }

    fn falling(nth: u32) -> anyhow::Result<Measured> {
        Ok(run(nth, if nth < 3 { 1000.0 / f64::from(nth + 1) } else { 100.0 }))
    }

    fn steady(iops: &[f64]) -> bool {
        judge(iops).is_some_and(|verdict| verdict.steady)
    }

    #[test]
    fn four_rounds_say_nothing_and_only_the_last_five_count() {
        assert_eq!(judge(&[100.0; 4]), None);
        assert!(steady(&[100.0; 5]));
        assert!(!steady(&[300.0, 100.0, 100.0, 100.0, 100.0]));
        let late = judge(&[900.0, 300.0, 100.0, 101.0, 99.0, 100.0, 100.0]).expect("seven rounds");
        assert!(late.steady && late.from_round == 2, "{late:?}");
    }

    #[test]
    fn a_range_of_20_percent_and_a_slope_of_10_are_the_limits() {
        assert!(steady(&[110.0, 90.0, 100.0, 90.0, 110.0]), "a range of exactly 20 %");
        assert!(!steady(&[111.0, 90.0, 100.0, 90.0, 110.0]), "a little more");
        let falling = judge(&[106.0, 103.0, 100.0, 97.0, 94.0]).expect("five");
        assert!(!falling.steady && falling.range < 0.2, "{falling:?}");
        assert!((falling.slope - 0.12).abs() < 1e-9, "{falling:?}");
        assert!(steady(&[104.0, 102.0, 100.0, 98.0, 96.0]), "8 %");
    }

    #[test]
    fn measuring_ends_with_the_first_steady_window_or_at_the_limit() -> anyhow::Result<()> {
        let (rounds, verdict) = until_steady(25, falling)?;
        assert_eq!((rounds.len(), verdict.map(|verdict| verdict.from_round)), (8, Some(3)));
        let (rounds, verdict) = until_steady(6, |nth| Ok(run(nth, f64::from(nth + 1))))?;
        assert_eq!((rounds.len(), verdict.map(|verdict| verdict.steady)), (6, Some(false)));
        Ok(())
    }

    #[test]
    fn figures_are_those_of_the_window_and_the_rounds_before_it_are_kept_apart() -> anyhow::Result<()> {
        let mut results =
            Results::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json"))?;
        results.runs.clear();
        let (rounds, verdict) = until_steady(25, falling)?;
        let judged = Judged { subject: "a".into(), rounds: rounds.len(), verdict };
        let window = part(&mut results, judged, rounds);
        results.runs.extend(window.into_iter().map(|one| one.run));
        let kept = tempfile::NamedTempFile::new()?;
        results.write(kept.path())?;
        let results = Results::read(kept.path())?;
        assert_eq!(results.transient.iter().map(|run| run.round).collect::<Vec<_>>(), [0, 1, 2]);
        let rows = summary::rows(&results);
        assert_eq!((rows[0].rounds, rows[0].iops), (5, 100.0));
        assert!(!summary::processes(&results).is_empty(), "of the first round of the window");
        let setting = summary::setting(&results);
        assert!(setting.contains("last 5 rounds of each") && !setting.contains("alternating"), "{setting}");
        assert!(crate::run::html::page(&results).contains("a: steady after 8 rounds; rounds 4 to 8"));
        Ok(())
    }

    #[test]
    fn what_has_no_meaning_here_is_no_flag() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            _steady: SteadyArgs,
        }
        let line = |line: &str| <Line as clap::Parser>::try_parse_from(line.split(' ')).is_ok();
        assert!(line("x file:/x --seconds 2 -o json --html a.html"));
        assert!(!line("x file:/x --rounds 2") && !line("x file:/x --prepare"));
    }
}
