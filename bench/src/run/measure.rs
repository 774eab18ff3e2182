//! Measuring: every subject under every load, in alternating rounds.
//!
//! Invariants: every subject of a round meets the same IOs, A B, B A, A B; what a server still does after writes is over
//! before the next measurement begins.

use super::job::{self, Phase, Tick, Times, Together};
use super::load::{self, BLOCK_BYTES, Io, Load};
use super::result::{Intervals, Latency, Moment, ProcessUse, Run};
use super::target::Target;
use crate::steal::{self, Ticks};
use crate::{fio, process};
use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use reactor::Reactor;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::driver::Done;

/// A target with its name in results.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Unique within a run.
    pub name: String,
    /// What is measured.
    pub target: Target,
    /// The processes that serve it, whose CPU time is counted.
    pub pids: Vec<i32>,
    /// Whether they go on working after writes, and must come to rest before others are measured.
    pub flushes: bool,
}

impl Subject {
    /// A file that nobody serves.
    pub fn file(name: &str, path: &std::path::Path) -> Self {
        Self {
            name: name.to_owned(),
            target: Target::File(path.to_owned()),
            pids: Vec::new(),
            flushes: false,
        }
    }
}

/// Who does the IO.
#[derive(Debug)]
pub enum Client {
    /// Our own, on the reactor that the targets use.
    Own,
    /// Stock fio.
    Fio(fio::Fio),
    /// Our own, and fio for what ours does not speak.
    OwnOr(fio::Fio),
}

impl Client {
    /// As results name it.
    pub fn name(&self) -> String {
        match self {
            Self::Own | Self::OwnOr(_) => "ashlar".to_owned(),
            Self::Fio(fio) => fio.version.clone(),
        }
    }
}

/// What is measured, and how long.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Who does the IO.
    pub client: &'a Client,
    /// To whom.
    pub subjects: &'a [Subject],
    /// What.
    pub loads: &'a [Load],
    /// Seconds of each measurement.
    pub seconds: f64,
    /// Seconds before it, not recorded.
    pub warm_up: f64,
    /// How often each is measured.
    pub rounds: u32,
    /// How long a server that was written to may go on writing before the next measurement begins.
    pub settle_max: Duration,
}

/// A measurement with all its latencies in nanoseconds.
#[derive(Debug)]
pub struct Measured {
    /// What results keep of it.
    pub run: Run,
    /// All of its latencies.
    pub times: Histogram<u64>,
    /// The same by moments, as lines of a histogram log.
    pub intervals: Intervals,
}

/// How long a server may go on writing after a measurement of writes, as a rule.
pub const SETTLE_MAX: Duration = Duration::from_secs(15);

impl<'a> Plan<'a> {
    /// One without a warm-up.
    pub fn new(
        client: &'a Client,
        subjects: &'a [Subject],
        loads: &'a [Load],
        seconds: f64,
        rounds: u32,
    ) -> Self {
        Self { client, subjects, loads, seconds, warm_up: 0.0, rounds, settle_max: SETTLE_MAX }
    }

    /// Measures everything.
    ///
    /// Of several rounds, a measurement during which the host took more than [`steal::DISTURBED`] of the processors is done
    /// again once the host is calm, for each load as often as there are rounds and subjects, and the least disturbed counts.
    ///
    /// # Errors
    /// A target that cannot be reached, an IO that fails, or data that is not what was written.
    pub fn measure(&self) -> anyhow::Result<Vec<Measured>> {
        let (mut all, mut busy) = (Vec::new(), None);
        for load in self.loads {
            let mut spare = if self.rounds > 1 { self.rounds + self.subjects.len() as u32 } else { 0 };
            for round in 0..self.rounds {
                // Nobody always comes first: A B, B A, A B.
                for nth in 0..self.subjects.len() {
                    let subject = &self.subjects[(nth + round as usize) % self.subjects.len()];
                    let once = || self.rested(subject, load, round, &mut busy);
                    let stolen = |one: &Measured| one.run.stolen.unwrap_or(0.0);
                    let (mut kept, repeats) =
                        steal::calmest(&mut spare, stolen, steal::rest_until_calm, once)?;
                    kept.run.repeats = repeats;
                    all.push(kept);
                }
            }
        }
        Ok(all)
    }

    /// Measures one subject once nobody has work left of what was measured before: `busy` was written to last, and what it
    /// puts off must not be counted for another.
    fn rested(
        &self,
        subject: &'a Subject,
        load: &Load,
        round: u32,
        busy: &mut Option<&'a Subject>,
    ) -> anyhow::Result<Measured> {
        if let Some(before) = busy.take() {
            process::settle(&before.pids, self.settle_max);
        }
        *busy = Some(subject).filter(|subject| load.read_percent < 100 && subject.flushes);
        self.one(subject, load, round)
    }

    /// Measures one subject under one load; what its servers have put off is for the next measurement.
    ///
    /// # Errors
    /// See [`Plan::measure`].
    pub fn one(&self, subject: &Subject, load: &Load, round: u32) -> anyhow::Result<Measured> {
        let secs = Duration::from_secs_f64;
        let times = Times { warm_up: secs(self.warm_up), measured: secs(self.seconds) };
        let measured = match self.client {
            Client::Fio(fio) => fio.measure(subject, load, times, round),
            Client::OwnOr(fio) if matches!(subject.target, Target::Rbd(_)) => {
                fio.measure(subject, load, times, round)
            }
            Client::Own | Client::OwnOr(_) => by_us(subject, load, times, round),
        };
        let measured = measured.with_context(|| subject.name.clone())?;
        eprintln!("{}", measured.run.line());
        Ok(measured)
    }
}

/// Writes every byte once, in order; a file that is missing is made.
///
/// # Errors
/// It cannot be written, for instance because the disk is full.
pub fn prepare(subject: &Subject, bytes: u64) -> anyhow::Result<()> {
    eprintln!("writing {} MiB of {}", bytes >> 20, subject.name);
    fill(&subject.target, bytes).with_context(|| format!("{} cannot be prepared", subject.name))
}

/// Reads every byte once, in order. The first read of a block can take ten times as long as later ones on a disk that
/// somebody else serves; subjects that are compared should have that behind them.
///
/// # Errors
/// It cannot be read.
pub fn read_once(subject: &Subject, bytes: u64) -> anyhow::Result<()> {
    eprintln!("reading {} MiB of {}", bytes >> 20, subject.name);
    pass(&subject.target, bytes, false).with_context(|| format!("{} cannot be read", subject.name))
}

fn fill(target: &Target, bytes: u64) -> anyhow::Result<()> {
    if let Target::File(path) = target {
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("{} cannot be made", path.display()))?;
        if file.metadata()?.is_file() && file.metadata()?.len() < bytes {
            file.set_len(bytes)?;
        }
    }
    pass(target, bytes, true)?;
    if let Target::File(path) = target {
        std::fs::File::open(path)?.sync_all()?;
    }
    Ok(())
}

/// IOs in flight while everything is written, or read.
const PASS_DEPTH: u32 = 8;

fn pass(target: &Target, bytes: u64, write: bool) -> anyhow::Result<()> {
    let reads = if write { 0 } else { 100 };
    let load = Load { dsync: false, ..Load::random_4k(reads, PASS_DEPTH, bytes) };
    let mut ring = job::ring(PASS_DEPTH, false)?;
    let mut driver = job::connect(&mut ring, target, &load, 0)?;
    let bytes = driver.bytes().min(bytes);
    let blocks = (load::IO_BYTES_MAX / BLOCK_BYTES) as usize;
    let mut spare: Vec<_> =
        (0..PASS_DEPTH).filter_map(|slot| Some((slot, ring.arena().alloc(blocks)?))).collect();
    let (mut at, mut flying, mut done, mut heard) = (0, 0, Vec::new(), ring.now());
    while at < bytes || flying > 0 {
        while at + BLOCK_BYTES <= bytes {
            let Some((slot, mut buf)) = spare.pop() else { break };
            if write {
                // Bytes that do not compress.
                buf.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&ring.random().to_le_bytes()));
            }
            let length = load::IO_BYTES_MAX.min((bytes - at) / BLOCK_BYTES * BLOCK_BYTES);
            driver.submit(&mut ring, slot, Io { write, offset: at, bytes: length }, buf);
            (at, flying) = (at + length, flying + 1);
        }
        if flying == 0 {
            break;
        }
        driver.turn(&mut ring, Some(heard + job::SILENCE_MAX), &mut done)?;
        if !done.is_empty() {
            heard = ring.now();
        }
        job::not_silent(heard, ring.now())?;
        for Done { slot, result, buf } in done.drain(..) {
            result.map_err(anyhow::Error::msg)?;
            flying -= 1;
            spare.push((slot, buf));
        }
    }
    Ok(())
}

/// What a process has used so far: CPU seconds and context switches.
pub type Used = (f64, u64);

/// The same of several; nothing for one that is gone.
pub fn used(pids: &[i32]) -> Vec<Used> {
    let own = std::process::id().cast_signed();
    let cpu = |pid: i32| match pid == own {
        // Our children are those who serve.
        true => process::cpu_seconds(pid).unwrap_or(0.0),
        false => process::cpu_seconds_with_children(pid),
    };
    pids.iter().map(|pid| (cpu(*pid), process::switches(*pid))).collect()
}

/// What processes used between two moments for so many IOs.
pub fn uses(pids: &[i32], before: &[Used], after: &[Used], ios: u64) -> Vec<ProcessUse> {
    let one = |((pid, before), after): ((&i32, &Used), &Used)| {
        let own = *pid == std::process::id().cast_signed();
        // One that was killed meanwhile has nothing to tell afterwards.
        let cpu_s = (after.0 - before.0).max(0.0);
        let name = Some(process::name(*pid)).filter(|name| !name.is_empty());
        ProcessUse {
            name: if own { "client".into() } else { name.unwrap_or_else(|| "(ended)".into()) },
            cpu_s,
            cpu_us_per_io: cpu_s * 1e6 / ios.max(1) as f64,
            rss_bytes: process::rss_bytes(*pid).unwrap_or(0),
            switches: after.1.saturating_sub(before.1),
        }
    };
    pids.iter().zip(before).zip(after).map(one).collect()
}

fn by_us(subject: &Subject, load: &Load, times: Times, round: u32) -> anyhow::Result<Measured> {
    let pids: Vec<i32> =
        std::iter::once(std::process::id().cast_signed()).chain(subject.pids.iter().copied()).collect();
    let (tell, ticks) = mpsc::channel();
    let mut watch = Watch::new(&format!("{} #{}", subject.name, round + 1), round, times);
    let together = Together::new(load.jobs);
    let (before, after) = std::thread::scope(|scope| {
        let together = &together;
        let jobs: Vec<_> = (0..load.jobs)
            .map(|job| {
                let tell = tell.clone();
                scope.spawn(move || job::run(&subject.target, load, job, round, times, together, &tell))
            })
            .collect();
        drop(tell);
        together.wait();
        watch.started = Instant::now();
        watch.until(&ticks, times.warm_up)?;
        let before = (used(&pids), Ticks::now());
        watch.until(&ticks, times.warm_up + times.measured)?;
        let after = (used(&pids), Ticks::now());
        watch.until_end(&ticks)?;
        for job in jobs {
            job.join().map_err(|_| anyhow::anyhow!("a job panicked"))??;
        }
        anyhow::Ok((before, after))
    })?;
    let mut all = watch.reads.clone();
    all.add(&watch.writes)?;
    let seconds = times.measured.as_secs_f64();
    ensure!(watch.ios > 0, "no IO ended within {seconds} s");
    let run = Run {
        subject: subject.name.clone(),
        load: load.clone(),
        round,
        repeats: 0,
        stolen: steal::between(before.1, after.1),
        iops: watch.ios as f64 / seconds,
        bytes_s: watch.bytes as f64 / seconds,
        reads: Latency::of(&watch.reads),
        writes: Latency::of(&watch.writes),
        unserved: watch.unserved,
        enters: watch.enters,
        verified: watch.verified,
        processes: uses(&pids, &before.0, &after.0, watch.ios),
        timeline: watch.timeline,
    };
    Ok(Measured { run, times: all, intervals: watch.intervals })
}

/// What the jobs tell, summed up, and shown while it happens.
struct Watch {
    started: Instant,
    times: Times,
    reads: Histogram<u64>,
    writes: Histogram<u64>,
    ios: u64,
    bytes: u64,
    unserved: u64,
    enters: u64,
    verified: Option<u64>,
    /// Of the moment that is not over.
    moment: Histogram<u64>,
    moment_ios: u64,
    moment_bytes: u64,
    moment_from: f64,
    timeline: Vec<Moment>,
    intervals: Intervals,
    bar: ProgressBar,
}

/// Seconds of a moment of the time line.
const MOMENT_S: f64 = 0.5;

impl Watch {
    fn new(name: &str, round: u32, times: Times) -> Self {
        let bar = ProgressBar::new((times.warm_up + times.measured).as_millis() as u64);
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {msg}").expect("a fixed template");
        bar.set_style(style);
        bar.set_prefix(name.to_owned());
        let (reads, writes, moment) = (job::histogram(), job::histogram(), job::histogram());
        let (started, timeline) = (Instant::now(), Vec::new());
        Self {
            started,
            times,
            reads,
            writes,
            ios: 0,
            bytes: 0,
            unserved: 0,
            enters: 0,
            verified: None,
            moment,
            moment_ios: 0,
            moment_bytes: 0,
            moment_from: 0.0,
            timeline,
            intervals: Intervals::new(round),
            bar,
        }
    }

    /// Takes what comes until so long after the start; an end before that is the jobs' to explain.
    fn until(&mut self, ticks: &Receiver<Tick>, after: Duration) -> anyhow::Result<()> {
        loop {
            let left = after.saturating_sub(self.started.elapsed());
            match ticks.recv_timeout(left) {
                Ok(tick) => self.take(tick)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn until_end(&mut self, ticks: &Receiver<Tick>) -> anyhow::Result<()> {
        while let Ok(tick) = ticks.recv() {
            self.take(tick)?;
        }
        if !self.moment.is_empty() {
            // The rest of the last moment: too short for the time line, but the log has every IO.
            self.intervals.add(self.moment_from, self.since_start() - self.moment_from, &self.moment)?;
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    fn take(&mut self, tick: Tick) -> anyhow::Result<()> {
        if tick.phase == Phase::WarmUp {
            return Ok(());
        }
        self.reads.add(&tick.reads)?;
        self.writes.add(&tick.writes)?;
        self.moment.add(&tick.reads)?;
        self.moment.add(&tick.writes)?;
        self.unserved += tick.unserved;
        if let Some(blocks) = tick.verified {
            *self.verified.get_or_insert(0) += blocks;
        }
        if tick.phase == Phase::After {
            return Ok(());
        }
        self.enters += tick.enters;
        self.ios += tick.ios;
        self.bytes += tick.bytes;
        self.moment_ios += tick.ios;
        self.moment_bytes += tick.bytes;
        let now = self.since_start();
        if now - self.moment_from >= MOMENT_S { self.end_moment(now) } else { Ok(()) }
    }

    /// Seconds since the measurement began.
    fn since_start(&self) -> f64 {
        self.started.elapsed().as_secs_f64() - self.times.warm_up.as_secs_f64()
    }

    fn end_moment(&mut self, now: f64) -> anyhow::Result<()> {
        let length = now - self.moment_from;
        let us = |part| self.moment.value_at_quantile(part) as f64 / 1000.0;
        let (iops, p99_us) = (self.moment_ios as f64 / length, us(0.99));
        self.bar.set_position((self.started.elapsed()).as_millis() as u64);
        self.bar.set_message(format!(
            "{iops:.0} IOPS, {:.1} MB/s, p50 {:.0} p99 {p99_us:.0} p99.9 {:.0} us",
            self.moment_bytes as f64 / length / 1e6,
            us(0.5),
            us(0.999)
        ));
        self.timeline.push(Moment { s: now, iops, p99_us });
        self.intervals.add(self.moment_from, length, &self.moment)?;
        self.moment.reset();
        (self.moment_ios, self.moment_bytes, self.moment_from) = (0, 0, now);
        Ok(())
    }
}
