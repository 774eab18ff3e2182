//! `ashlar tune auto`: a bounded search over the target's own knobs, with `ashlar bench` as the judge.
//!
//! One knob after the other, from the defaults: each of its values is tried, and the best is kept
//! if it gains more than the judge's own noise, which is measured first. So the number of trials is
//! known beforehand. The cluster that is judged is one of its own, started anew for each trial.
//! Deliberately absent: kernel settings (`tune apply`), and anything that a formatted target cannot
//! change.

mod cluster;

use crate::command::{Exit, Output, print};
use crate::render::Style;
use clap::Args;
use cluster::Cluster;
use comfy_table::{Cell, Color};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What `tune auto` takes.
#[derive(Args, Debug)]
pub struct AutoArgs {
    /// A folder on the disk in question; the cluster that is tried lives there [default: /var/tmp]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Trials at most, those that measure the noise included.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(3..=200))]
    trials: u32,
    /// Minutes at most; a trial that has begun is ended.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=600))]
    minutes: u32,
    /// Seconds of each measurement of a trial.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Bytes of the volume that is measured.
    #[arg(long, default_value = "256M", value_name = "BYTES")]
    size: String,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// What a trial runs with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Setting {
    /// `spin_us_max` of target.toml.
    pub spin_us_max: u32,
    /// `batches_in_flight_max` of device.toml: fewer make longer batches.
    pub batches_in_flight_max: usize,
    /// `batch_blocks_max` of device.toml.
    pub batch_blocks_max: u32,
    /// `flush_in_flight_max` of device.toml.
    pub flush_in_flight_max: usize,
    /// `queue_depth` of device.toml.
    pub queue_depth: u32,
    /// `arena_bytes` of target.toml.
    pub arena_bytes: u64,
}

impl Default for Setting {
    /// What a target does without being told.
    fn default() -> Self {
        Self {
            spin_us_max: 50,
            batches_in_flight_max: 4,
            batch_blocks_max: 256,
            flush_in_flight_max: 4,
            queue_depth: 64,
            arena_bytes: 64 << 20,
        }
    }
}

/// A knob: its name, and settings with its other values.
type Knob = (&'static str, fn(Setting) -> Vec<Setting>);

/// Every knob, the most promising first, since the number of trials is bounded.
const KNOBS: &[Knob] = &[
    ("spin_us_max", |s| [0, 10, 200].map(|spin_us_max| Setting { spin_us_max, ..s }).into()),
    ("batches_in_flight_max", |s| {
        [1, 2, 7].map(|batches_in_flight_max| Setting { batches_in_flight_max, ..s }).into()
    }),
    ("batch_blocks_max", |s| [32, 64, 128].map(|batch_blocks_max| Setting { batch_blocks_max, ..s }).into()),
    ("flush_in_flight_max", |s| {
        [1, 8, 16].map(|flush_in_flight_max| Setting { flush_in_flight_max, ..s }).into()
    }),
    ("queue_depth", |s| [256, 1024].map(|queue_depth| Setting { queue_depth, ..s }).into()),
    ("arena_bytes", |s| [32 << 20, 256 << 20].map(|arena_bytes| Setting { arena_bytes, ..s }).into()),
];

/// One trial.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// Which knob was turned; `defaults` while the noise is measured.
    pub knob: &'static str,
    /// With what.
    pub setting: Setting,
    /// The judge's score, higher is better; absent when the trial failed.
    pub score: Option<f64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Score over that of the setting to beat, less 1.
    pub gain: Option<f64>,
    /// Whether it became the setting to beat.
    pub kept: bool,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Every trial, in order.
    pub trials: Vec<Trial>,
    /// Half the distance between the worst and best of equal trials, in parts.
    pub noise: f64,
    /// The best.
    pub best: Setting,
    /// Its gain over the defaults.
    pub gain: f64,
}

/// Gains below this are never believed.
const GAIN_MIN: f64 = 0.03;
/// Equal trials that tell the noise.
const NOISE_TRIALS: u32 = 3;

/// Searches, with at most so many calls of the judge, and none after `over` says so.
///
/// # Errors
/// The judge fails with the defaults: then there is nothing to compare with.
pub fn search(
    trials_max: u32,
    over: impl Fn() -> bool,
    mut judge: impl FnMut(&Setting) -> anyhow::Result<f64>,
) -> anyhow::Result<Found> {
    let defaults = Setting::default();
    let mut trials = Vec::new();
    let mut scores = Vec::new();
    for _ in 0..NOISE_TRIALS.min(trials_max) {
        let score = judge(&defaults)?;
        scores.push(score);
        let (failure, gain) = (None, None);
        trials.push(Trial {
            knob: "defaults",
            setting: defaults,
            score: Some(score),
            failure,
            gain,
            kept: false,
        });
    }
    scores.sort_by(f64::total_cmp);
    let base = scores[scores.len() / 2];
    let noise = (scores[scores.len() - 1] - scores[0]) / base / 2.0;
    let (mut best, mut to_beat) = (defaults, base);
    for (knob, values) in KNOBS {
        let mut winner: Option<(usize, f64)> = None;
        for setting in values(best) {
            if trials.len() as u32 >= trials_max || over() {
                break;
            }
            let judged = judge(&setting);
            let (score, failure) = match judged {
                Ok(score) => (Some(score), None),
                Err(error) => (None, Some(format!("{error:#}"))),
            };
            let gain = score.map(|score| score / to_beat - 1.0);
            if let (Some(score), Some(gain)) = (score, gain)
                && gain > noise.max(GAIN_MIN)
                && winner.is_none_or(|(_, other)| score > other)
            {
                winner = Some((trials.len(), score));
            }
            trials.push(Trial { knob, setting, score, failure, gain, kept: false });
        }
        if let Some((nth, score)) = winner {
            trials[nth].kept = true;
            (best, to_beat) = (trials[nth].setting, score);
        }
    }
    Ok(Found { trials, noise, best, gain: to_beat / base - 1.0 })
}

/// Runs the command.
///
/// # Errors
/// No cluster can be started, or the bench fails with the defaults.
pub fn run(args: &AutoArgs) -> anyhow::Result<Exit> {
    let started = Instant::now();
    let limit = Duration::from_secs(u64::from(args.minutes) * 60);
    let scratch = args.scratch.clone().unwrap_or_else(|| "/var/tmp".into());
    let mut cluster = Cluster::prepare(&scratch, &args.size)?;
    let found = search(
        args.trials,
        || started.elapsed() > limit,
        |setting| {
            let score = cluster.judge(setting, args.seconds);
            match &score {
                Ok(score) => eprintln!("{}: score {score:.0}", words(setting)),
                Err(error) => eprintln!("{}: {error:#}", words(setting)),
            }
            score
        },
    )?;
    match args.output {
        Output::Json => print(&serde_json::to_string_pretty(&found)?)?,
        Output::Text => print(&text(&found))?,
    }
    Ok(Exit::Ok)
}

fn words(setting: &Setting) -> String {
    let Setting { spin_us_max, batches_in_flight_max, flush_in_flight_max, queue_depth, arena_bytes, .. } =
        setting;
    let batch_kib = setting.batch_blocks_max * 4;
    format!(
        "spin {spin_us_max} us, batches {batches_in_flight_max} of {batch_kib} KiB, flush {flush_in_flight_max}, depth {queue_depth}, \
         arena {} MiB",
        arena_bytes >> 20
    )
}

fn text(found: &Found) -> String {
    let row = |trial: &Trial| {
        let percent = |part: f64| format!("{:+.1} %", part * 100.0);
        let score = trial.score.map_or("failed".into(), |score| format!("{score:.0}"));
        let kept = if trial.kept { Cell::new("kept").fg(Color::Green) } else { Cell::new("") };
        let note = trial.failure.clone().unwrap_or_default();
        vec![
            Cell::new(trial.knob),
            Cell::new(words(&trial.setting)),
            Cell::new(score),
            Cell::new(trial.gain.map(percent).unwrap_or_default()),
            kept,
            Cell::new(note.lines().next().unwrap_or_default()),
        ]
    };
    let rows = found.trials.iter().map(row).collect();
    let mut text = Style::of_stdout().table(&["KNOB", "SETTING", "SCORE", "GAIN", "", ""], rows);
    let noise = found.noise * 100.0;
    if found.best == Setting::default() {
        let _ = write!(text, "\nthe defaults stay: nothing gained more than the noise of {noise:.1} %\n");
        return text;
    }
    let best = &found.best;
    let _ = write!(
        text,
        "\ngained {:.1} % over the defaults (noise {noise:.1} %)\n\n# target.toml\nspin_us_max = {}\narena_bytes = \
         {}\n\n# device.toml\nformat = 1\n[limits]\nqueue_depth = {}\nbatches_in_flight_max = {}\n\
         batch_blocks_max = {}\nflush_in_flight_max = {}\n",
        found.gain * 100.0,
        best.spin_us_max,
        best.arena_bytes,
        best.queue_depth,
        best.batches_in_flight_max,
        best.batch_blocks_max,
        best.flush_in_flight_max
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gains_is_found_and_kept() {
        let found = search(
            40,
            || false,
            |s| {
                let spin = if s.spin_us_max == 200 { 1.3 } else { 1.0 };
                let batches = if s.batches_in_flight_max == 2 { 1.2 } else { 1.0 };
                Ok(1000.0 * spin * batches)
            },
        );
        let found = found.expect("the judge never fails");
        assert_eq!((found.best.spin_us_max, found.best.batches_in_flight_max), (200, 2));
        assert!((found.gain - 0.56).abs() < 1e-9 && found.noise == 0.0);
        assert_eq!(found.trials.iter().filter(|trial| trial.kept).count(), 2);
    }

    #[test]
    fn noise_is_never_taken_for_a_gain() {
        let mut calls = 0_u32;
        let found = search(
            40,
            || false,
            |_| {
                calls += 1;
                Ok(1000.0 + f64::from(calls * 7919 % 11) * 20.0)
            },
        );
        let found = found.expect("the judge never fails");
        assert_eq!(found.best, Setting::default(), "{:?}", found.trials);
    }

    #[test]
    fn the_search_ends_at_its_bounds_and_outlives_a_trial_that_fails() {
        let mut calls = 0;
        let found = search(
            7,
            || false,
            |_| {
                calls += 1;
                anyhow::ensure!(calls < 5, "no memory");
                Ok(1.0)
            },
        );
        let found = found.expect("the defaults worked");
        assert_eq!((calls, found.trials.len()), (7, 7));
        assert_eq!(found.trials.iter().filter(|trial| trial.failure.is_some()).count(), 3);
        let none = search(40, || true, |_| Ok(1.0)).expect("no trial failed");
        assert_eq!(none.trials.len(), 3);
        assert!(search(40, || false, |_| anyhow::bail!("no cluster")).is_err());
    }
}
