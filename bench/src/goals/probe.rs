//! What no load shows: the cost of rest, the first IO after it, memory over time.

use crate::process;
use crate::report::median;
use crate::run::driver::Driver;
use crate::run::job;
use crate::run::load::{BLOCK_BYTES, Io, Ios, Load};
use crate::run::target::Target;
use anyhow::{Context, ensure};
use reactor::ring::Ring;
use reactor::{BufMut, Reactor};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The most that one of these processes uses of a core while nothing is asked of it, in percent.
///
/// # Errors
/// One of them is gone.
pub fn idle_percent(pids: &[i32], seconds: f64) -> anyhow::Result<f64> {
    let cpu = || pids.iter().map(|pid| process::cpu_seconds(*pid)).collect::<anyhow::Result<Vec<_>>>();
    let (before, started) = (cpu()?, Instant::now());
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let (after, seconds) = (cpu()?, started.elapsed().as_secs_f64());
    let shares = before.iter().zip(&after).map(|(before, after)| (after - before) / seconds * 100.0);
    Ok(shares.fold(0.0, f64::max))
}

/// Medians of single 4 KiB reads in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AfterIdle {
    /// One after the other.
    pub busy_us: f64,
    /// After a second without any.
    pub first_us: f64,
}

/// How long nothing is asked for.
const PAUSE: Duration = Duration::from_millis(1500);
/// Reads one after the other.
const BUSY: usize = 500;

/// Reads one at a time: many without a pause, and one after each of some pauses.
///
/// # Errors
/// The target cannot be reached, or a read fails.
pub fn first_after_idle(target: &Target, bytes: u64, pauses: usize) -> anyhow::Result<AfterIdle> {
    let load = Load::random_4k(100, 1, bytes);
    let mut ring = job::ring(1, false)?;
    let mut driver = job::connect(&mut ring, target, &load, 0)?;
    let mut ios = Ios::new(&load, 0, 0, 0, bytes)?;
    let mut spare = Some(ring.arena().alloc(1).context("no memory to read into")?);
    let mut one = |ios: &mut Ios| timed(&mut ring, driver.as_mut(), ios.draw(), &mut spare);
    let (mut busy, mut first) = (Vec::new(), Vec::new());
    for _ in 0..pauses {
        let run: anyhow::Result<Vec<f64>> = (0..BUSY).map(|_| one(&mut ios)).collect();
        // The first of them comes after a pause.
        busy.extend(&run?[1..]);
        std::thread::sleep(PAUSE);
        first.push(one(&mut ios)?);
    }
    ensure!(!first.is_empty(), "no pause was asked for");
    Ok(AfterIdle { busy_us: median(busy), first_us: median(first) })
}

/// Microseconds that one IO takes.
fn timed(
    ring: &mut Ring,
    driver: &mut dyn Driver,
    io: Io,
    spare: &mut Option<BufMut>,
) -> anyhow::Result<f64> {
    let io = Io { bytes: BLOCK_BYTES, ..io };
    let (started, buf, mut done) = (Instant::now(), spare.take().context("one IO at a time")?, Vec::new());
    driver.submit(ring, 0, io, buf);
    while done.is_empty() {
        ensure!(started.elapsed() < Duration::from_secs(30), "no answer for 30 s");
        let deadline = ring.now() + protocol::types::Span::ms(1000);
        driver.turn(ring, Some(deadline), &mut done)?;
    }
    let us = started.elapsed().as_secs_f64() * 1e6;
    let ended = done.pop().context("just seen")?;
    ended.result.map_err(anyhow::Error::msg)?;
    *spare = Some(ended.buf);
    Ok(us)
}

/// Memory of the process that has most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// How long it was watched.
    pub seconds: f64,
    /// The median of the second quarter of that time.
    pub early_bytes: f64,
    /// The median of the last quarter.
    pub late_bytes: f64,
    /// The most that was seen.
    pub max_bytes: f64,
}

/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_millis(250);

/// Watches the memory of processes during a load.
///
/// # Errors
/// What the load says; it was too short to judge.
pub fn memory<T>(pids: &[i32], load: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Memory)> {
    let (started, done) = (Instant::now(), AtomicBool::new(false));
    let (ran, samples) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut samples = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let bytes = pids.iter().map(|pid| process::rss_bytes(*pid).unwrap_or(0)).max();
                samples.push(bytes.unwrap_or(0) as f64);
                std::thread::sleep(SAMPLE);
            }
            samples
        });
        let ran = load();
        done.store(true, Ordering::Relaxed);
        sampler.join().map(|samples| (ran, samples))
    })
    .map_err(|_| anyhow::anyhow!("the sampler of memory panicked"))?;
    let memory = judge(&samples, started.elapsed().as_secs_f64()).context("too short to judge memory")?;
    Ok((ran?, memory))
}

fn judge(samples: &[f64], seconds: f64) -> Option<Memory> {
    let quarter = samples.len() / 4;
    if quarter == 0 {
        return None;
    }
    let of = |from: usize| median(samples[from..from + quarter].iter().copied());
    Some(Memory {
        seconds,
        early_bytes: of(quarter),
        late_bytes: of(samples.len() - quarter),
        max_bytes: samples.iter().copied().fold(0.0, f64::max),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_judged_by_the_second_quarter_and_the_last() {
        assert_eq!(judge(&[1.0; 3], 1.0), None);
        let growing: Vec<f64> = (0..100).map(f64::from).collect();
        let memory = judge(&growing, 25.0).expect("enough");
        assert_eq!((memory.early_bytes, memory.late_bytes, memory.max_bytes), (37.0, 87.0, 99.0));
    }

    #[test]
    fn a_process_that_burns_is_not_idle_and_a_file_answers_after_a_pause() -> anyhow::Result<()> {
        let mut burns = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn()?;
        let mut rests = std::process::Command::new("sleep").arg("60").spawn()?;
        let pids = [&burns, &rests].map(|child| child.id().cast_signed());
        let (burnt, rested) = (idle_percent(&pids, 0.4)?, idle_percent(&pids[1..], 0.2)?);
        burns.kill()?;
        rests.kill()?;
        burns.wait()?;
        rests.wait()?;
        assert!(burnt > rested, "{burnt} {rested}");
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        let file = dir.path().join("raw");
        std::fs::write(&file, vec![1; 1 << 20])?;
        let found = first_after_idle(&Target::File(file), 1 << 20, 1)?;
        assert!(found.busy_us > 0.0 && found.first_us > 0.0, "{found:?}");
        Ok(())
    }
}
