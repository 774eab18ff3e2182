//! Steps aside for a client that the kernel keeps waking on our processor.
//!
//! A socket's wake-up tells the scheduler that the waker is about to sleep, so it puts the wakee on
//! the waker's processor: with a client on the same machine, client and core take turns there while
//! another processor idles, and neither side ever overlaps the other (measured on two processors:
//! reads at depth 32 at two thirds of the rate). Once they are apart the kernel keeps them apart.
//!
//! Looked at every 5 ms, for threads that are not pinned only: displaced often amid bursts of work, while
//! another processor idled -> move there. Moves that do not help become rare.

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use protocol::types::{Span, Time};

/// How often it is looked at.
const LOOK_EVERY: Span = Span::ms(5);
/// Displacements within one look that make it worth a thought: 600 a second.
const DISPLACED_MIN: i64 = 3;
/// Completions a turn from which work counts as bursts; one by one, taking turns costs nothing.
const BURST_MIN: u64 = 3;
/// Longest pause after a move.
const PAUSE_MAX: Span = Span::ms(1_000);

/// What a thread has done so far.
#[derive(Clone, Copy, Default)]
struct Counts {
    turns: u64,
    completions: u64,
    /// Times the thread was made to leave its processor while it had work.
    displaced: i64,
}

/// What the displacements of one thread looked like so far.
pub(super) struct Aside {
    allowed: Vec<usize>,
    look_at: Time,
    counts: Counts,
    /// Idle ticks a processor at the first of the looks that were suspicious, down to the last one.
    idle: Option<Vec<u64>>,
    pause: Span,
}

impl Aside {
    /// For the calling thread; `None` when it is pinned (it may run on one processor only).
    pub fn new() -> Option<Self> {
        let set = sched_getaffinity(Pid::from_raw(0)).ok()?;
        let allowed: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
        (allowed.len() > 1).then(|| Self {
            allowed,
            look_at: Time(0),
            counts: Counts::default(),
            idle: None,
            pause: LOOK_EVERY,
        })
    }

    /// Looks when it is time, given the counts of turns and completions so far.
    pub fn look(&mut self, now: Time, turns: u64, completions: u64) {
        if now < self.look_at {
            return;
        }
        let displaced = getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |u| u.involuntary_context_switches());
        let here = sched_getcpu().unwrap_or(0);
        if let Some(cpu) = self.judge(now, Counts { turns, completions, displaced }, here, idle_ticks) {
            self.move_to(cpu);
        }
    }

    /// Which processor to move to, if any.
    fn judge(
        &mut self,
        now: Time,
        counts: Counts,
        here: usize,
        idle_ticks: impl FnOnce() -> Vec<u64>,
    ) -> Option<usize> {
        let steady = (now - self.look_at).0 < LOOK_EVERY.0;
        self.look_at = now + LOOK_EVERY;
        let before = std::mem::replace(&mut self.counts, counts);
        let turned = (counts.turns - before.turns).max(1);
        let bursts = (counts.completions - before.completions) / turned >= BURST_MIN;
        if !steady || !bursts || counts.displaced - before.displaced < DISPLACED_MIN {
            self.idle = None;
            self.pause = Span(self.pause.0 / 2).max(LOOK_EVERY);
            return None;
        }
        let idle = idle_ticks();
        let Some(before) = &self.idle else {
            self.idle = Some(idle);
            return None;
        };
        let to = self.idlest(before, &idle, here)?;
        self.look_at = now + self.pause;
        self.pause = Span(self.pause.0 * 2).min(PAUSE_MAX);
        self.idle = None;
        Some(to)
    }

    /// Another processor that we may use and that idled meanwhile, the one that idled most.
    fn idlest(&self, before: &[u64], now: &[u64], here: usize) -> Option<usize> {
        let idled = |cpu: usize| Some(now.get(cpu)?.saturating_sub(*before.get(cpu)?));
        let best = self.allowed.iter().copied().filter(|cpu| *cpu != here).max_by_key(|cpu| idled(*cpu))?;
        // A tick is 10 ms, so this takes some looks.
        (idled(best)? >= 1).then_some(best)
    }

    fn move_to(&self, cpu: usize) {
        let of = |cpus: &[usize]| {
            let mut set = CpuSet::new();
            cpus.iter().try_for_each(|cpu| set.set(*cpu)).map(|()| set)
        };
        let me = Pid::from_raw(0);
        // Refused, we stay where we are, which is slow but right.
        let moved = of(&[cpu]).and_then(|set| sched_setaffinity(me, &set));
        let freed = of(&self.allowed).and_then(|set| sched_setaffinity(me, &set));
        tracing::debug!(cpu, ?moved, ?freed, "stepped aside: a client kept displacing this core's thread");
    }
}

/// Ticks that each processor has idled so far; empty where /proc does not say.
fn idle_ticks() -> Vec<u64> {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let lines = stat.lines().skip(1).take_while(|line| line.starts_with("cpu"));
    lines.map(|line| line.split_whitespace().nth(4).and_then(|idle| idle.parse().ok()).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks `looks` times, 5 ms apart, with so many turns, completions and displacements between two; processor 1
    /// idles for so many of the ticks. Returns the moves.
    fn moves(looks: u64, turns: u64, completions: u64, displaced: i64, idle: u64) -> Vec<usize> {
        let mut aside = Aside {
            allowed: vec![0, 1],
            look_at: Time(0),
            counts: Counts::default(),
            idle: None,
            pause: LOOK_EVERY,
        };
        let mut moved = Vec::new();
        for look in 1..=looks {
            let now = Time(look * LOOK_EVERY.0);
            if now < aside.look_at {
                continue;
            }
            let counts = Counts {
                turns: look * turns,
                completions: look * completions,
                displaced: look as i64 * displaced,
            };
            moved.extend(aside.judge(now, counts, 0, || vec![0, look * idle]));
        }
        moved
    }

    #[test]
    fn a_core_displaced_amid_bursts_moves_to_an_idle_processor() {
        assert_eq!(moves(3, 100, 800, 25, 2), [1]);
    }

    #[test]
    fn nothing_moves_without_all_three_signs() {
        assert_eq!(moves(50, 100, 100, 25, 2), [0usize; 0], "one completion a turn");
        assert_eq!(moves(50, 100, 800, 2, 2), [0usize; 0], "seldom displaced");
        assert_eq!(moves(50, 100, 800, 25, 0), [0usize; 0], "the other processor is busy too");
    }

    #[test]
    fn moves_that_do_not_help_become_rare() {
        let count = moves(200 * 60, 100, 800, 25, 2).len();
        assert!((50..=80).contains(&count), "{count} moves in a minute");
    }

    #[test]
    fn a_thread_free_to_run_anywhere_can_move_and_is_as_free_afterwards() {
        let free = || sched_getaffinity(Pid::from_raw(0)).expect("Linux tells");
        let before = free();
        let Some(aside) = Aside::new() else { return };
        aside.allowed.iter().for_each(|cpu| aside.move_to(*cpu));
        assert_eq!(free(), before);
        assert_eq!(idle_ticks().len(), std::thread::available_parallelism().map_or(1, |n| n.get()));
    }
}
