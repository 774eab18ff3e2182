//! `ashlar tune auto`: a bounded search over the target's own knobs, with `ashlar bench` as the judge.
//!
//! One knob after the other, from the defaults: each of its values is tried, and the best is kept
//! if it gains more than the judge's own noise, which is measured first. Each trial lies between two of
//! the setting to beat. So the number of trials is known beforehand. The cluster that is judged is one of its own, started anew for each trial.
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
    /// Trials at most, those of the setting to beat included.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(6..=200))]
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
            flush_in_flight_max: 8,
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
        [2, 4, 16].map(|flush_in_flight_max| Setting { flush_in_flight_max, ..s }).into()
    }),
    ("queue_depth", |s| [256, 1024].map(|queue_depth| Setting { queue_depth, ..s }).into()),
    ("arena_bytes", |s| [32 << 20, 256 << 20].map(|arena_bytes| Setting { arena_bytes, ..s }).into()),
];

/// One trial.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// Which knob was turned; else `warm-up`, `defaults` (noise) or `to beat`.
    pub knob: &'static str,
    /// With what.
    pub setting: Setting,
    /// The judge's score, higher is better; absent when the trial failed.
    pub score: Option<f64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Score over the mean of the setting to beat before and after, less 1.
    pub gain: Option<f64>,
    /// Whether it became the setting to beat.
    pub kept: bool,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Every trial, in order.
    pub trials: Vec<Trial>,
    /// The greatest change, in parts, from one score of the setting to beat to its next.
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
/// The first call warms up (files, page tables, clocks) and counts for nothing. From then on the
/// setting to beat is judged before and after each other one, so that a drift of the machine does
/// not look like a gain.
///
/// # Errors
/// The judge fails with the defaults: then there is nothing to compare with.
pub fn search(
    trials_max: u32,
    over: impl Fn() -> bool,
    judge: impl FnMut(&Setting) -> anyhow::Result<f64>,
) -> anyhow::Result<Found> {
    let defaults = Setting::default();
    let mut bout = Bout { judge, trials: Vec::new(), best: defaults, before: 0.0, noise: 0.0, gain: 0.0 };
    bout.warm_up()?;
    for _ in 1..NOISE_TRIALS {
        bout.judge_again("defaults")?;
    }
    for (knob, values) in KNOBS {
        let mut winner: Option<(usize, f64)> = None;
        for setting in values(bout.best) {
            // One for the setting, one for what it has to beat.
            if bout.trials.len() as u32 + 2 > trials_max || over() {
                break;
            }
            let gain = bout.challenge(knob, setting)?;
            if winner.is_none_or(|(_, other)| gain > other) {
                winner = Some((bout.trials.len() - 2, gain));
            }
        }
        if let Some((nth, gain)) = winner.filter(|(_, gain)| *gain > bout.noise.max(GAIN_MIN)) {
            bout.keep(nth, gain);
        }
    }
    Ok(Found { trials: bout.trials, noise: bout.noise, best: bout.best, gain: bout.gain })
}

/// A search under way.
struct Bout<J> {
    judge: J,
    trials: Vec<Trial>,
    best: Setting,
    /// What the setting to beat scored last.
    before: f64,
    /// The greatest change, in parts, from one score of the setting to beat to its next.
    noise: f64,
    /// What was gained over the defaults.
    gain: f64,
}

impl<J: FnMut(&Setting) -> anyhow::Result<f64>> Bout<J> {
    /// Judges the defaults twice; only the second score counts.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        for knob in ["warm-up", "defaults"] {
            self.before = self.judge_best(knob)?;
        }
        Ok(())
    }

    /// Judges the setting to beat again.
    fn judge_again(&mut self, knob: &'static str) -> anyhow::Result<f64> {
        let score = self.judge_best(knob)?;
        self.noise = self.noise.max((score / self.before - 1.0).abs());
        self.before = score;
        Ok(score)
    }

    fn judge_best(&mut self, knob: &'static str) -> anyhow::Result<f64> {
        let score = (self.judge)(&self.best)?;
        let (setting, failure) = (self.best, None);
        self.trials.push(Trial { knob, setting, score: Some(score), failure, gain: None, kept: false });
        Ok(score)
    }

    /// Judges a setting, then again the one to beat; tells the gain over the mean of both its scores.
    /// A setting that fails gains nothing.
    fn challenge(&mut self, knob: &'static str, setting: Setting) -> anyhow::Result<f64> {
        let judged = (self.judge)(&setting);
        let (score, failure) = match judged {
            Ok(score) => (Some(score), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        let (nth, before) = (self.trials.len(), self.before);
        self.trials.push(Trial { knob, setting, score, failure, gain: None, kept: false });
        let after = self.judge_again("to beat")?;
        let gain = score.map(|score| score / f64::midpoint(before, after) - 1.0);
        self.trials[nth].gain = gain;
        Ok(gain.unwrap_or(f64::MIN))
    }

    /// From now on, this trial's setting is the one to beat.
    fn keep(&mut self, nth: usize, gain: f64) {
        self.trials[nth].kept = true;
        self.best = self.trials[nth].setting;
        self.before *= 1.0 + gain;
        self.gain = (1.0 + self.gain) * (1.0 + gain) - 1.0;
    }
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
            80,
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
    fn a_machine_that_warms_up_and_drifts_shows_no_gain_where_there_is_none() {
        let mut calls = 0_u32;
        let found = search(
            80,
            || false,
            |s| {
                calls += 1;
                let cold = if calls == 1 { 0.3 } else { 1.0 };
                let real = if s.queue_depth == 256 { 1.1 } else { 1.0 };
                Ok(1000.0 * cold * real * 1.02_f64.powi(calls.cast_signed()))
            },
        );
        let found = found.expect("the judge never fails");
        assert_eq!(found.best, Setting { queue_depth: 256, ..Setting::default() }, "{:?}", found.trials);
        assert!((found.gain - 0.1).abs() < 0.01 && found.noise < 0.05, "{} {}", found.gain, found.noise);
    }

    #[test]
    fn the_search_ends_at_its_bounds_and_outlives_a_trial_that_fails() {
        let mut calls = 0;
        let found = search(
            9,
            || false,
            |s| {
                calls += 1;
                anyhow::ensure!(*s == Setting::default(), "no memory");
                Ok(1.0)
            },
        );
        let found = found.expect("the defaults worked");
        assert_eq!((calls, found.trials.len()), (8, 8));
        assert_eq!(found.trials.iter().filter(|trial| trial.failure.is_some()).count(), 2);
        let none = search(40, || true, |_| Ok(1.0)).expect("no trial failed");
        assert_eq!(none.trials.len(), 4);
        assert!(search(40, || false, |_| anyhow::bail!("no cluster")).is_err());
    }
}
