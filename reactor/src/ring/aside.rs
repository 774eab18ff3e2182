//! Steps aside for a client that the kernel keeps waking on our processor.
//!
//! A socket's wake-up tells the scheduler that the waker is about to sleep, so it puts the wakee on
//! the waker's processor: with a client on the same machine, client and core take turns there while
//! another processor idles, and neither side ever overlaps the other (measured on two processors:
//! reads at depth 32 at two thirds of the rate). Once they are apart the kernel keeps them apart.
//!
//! Looked at every 5 ms, for threads that are not pinned only: displaced often for 40 ms, for half of which
//! another processor idled -> move there. Moves that do not help become rare.

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use protocol::types::{Span, Time};

/// How often it is looked at.
const LOOK_EVERY: Span = Span::ms(5);
/// Displacements within one look that make it worth a thought: 600 a second.
const DISPLACED_MIN: i64 = 3;
/// How long it must go on.
const WATCH: Span = Span::ms(40);
/// A tick of /proc/stat.
const TICK: Span = Span::ms(10);
/// How long a thread stays where it moved to.
const STAY: Span = Span::ms(100);
/// Longest pause after a move.
const PAUSE_MAX: Span = Span::ms(1_000);

/// What the displacements of one thread looked like so far.
pub(super) struct Aside {
    allowed: Vec<usize>,
    look_at: Time,
    /// Times the thread was made to leave its processor while it had work, so far.
    displaced: i64,
    /// When it began to be displaced often, and the ticks that each processor had idled by then.
    since: Option<(Time, Vec<u64>)>,
    pause: Span,
    /// Until when the thread may run on one processor only.
    stays_until: Option<Time>,
}

impl Aside {
    /// For the calling thread; `None` when it is pinned (it may run on one processor only).
    pub fn new() -> Option<Self> {
        let set = sched_getaffinity(Pid::from_raw(0)).ok()?;
        let allowed: Vec<usize> =
            (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
        (allowed.len() > 1).then_some(Self {
            allowed,
            look_at: Time(0),
            displaced: 0,
            since: None,
            pause: LOOK_EVERY,
            stays_until: None,
        })
    }

    /// Looks when it is time.
    pub fn look(&mut self, now: Time) {
        if now < self.look_at {
            return;
        }
        if self.stays_until.is_some_and(|until| now >= until) {
            self.stays_until = None;
            let freed = self.allow(&self.allowed);
            tracing::debug!(?freed, "runs anywhere again");
        }
        let displaced = getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |u| u.involuntary_context_switches());
        let here = sched_getcpu().unwrap_or(0);
        if let Some(cpu) = self.judge(now, displaced, here, idle_ticks) {
            self.move_to(cpu);
            self.stays_until = Some(now + STAY);
        }
    }

    /// Which processor to move to, if any.
    fn judge(
        &mut self,
        now: Time,
        displaced: i64,
        here: usize,
        idle_ticks: impl FnOnce() -> Vec<u64>,
    ) -> Option<usize> {
        let steady = (now - self.look_at).0 < LOOK_EVERY.0;
        self.look_at = now + LOOK_EVERY;
        let before = std::mem::replace(&mut self.displaced, displaced);
        if !steady || displaced - before < DISPLACED_MIN {
            self.since = None;
            self.pause = Span(self.pause.0 / 2).max(LOOK_EVERY);
            return None;
        }
        let Some((since, idle)) = &self.since else {
            self.since = Some((now, idle_ticks()));
            return None;
        };
        let watched = now - *since;
        if watched < WATCH {
            return None;
        }
        let to = self.idlest(idle, &idle_ticks(), here, watched);
        self.since = None;
        if to.is_some() {
            self.look_at = now + self.pause;
            self.pause = Span(self.pause.0 * 2).min(PAUSE_MAX);
        }
        to
    }

    /// Another processor that we may use and that idled for half of the time, the one that idled most.
    fn idlest(&self, before: &[u64], now: &[u64], here: usize, watched: Span) -> Option<usize> {
        let idled = |cpu: usize| Some(now.get(cpu)?.saturating_sub(*before.get(cpu)?));
        let best = self.allowed.iter().copied().filter(|cpu| *cpu != here).max_by_key(|cpu| idled(*cpu))?;
        (idled(best)? * TICK.0 >= watched.0 / 2).then_some(best)
    }

    /// Moves there, and stays for a while: the client settles where it is left alone.
    fn move_to(&self, cpu: usize) {
        let moved = self.allow(&[cpu]);
        tracing::debug!(cpu, ?moved, "stepped aside: a client kept displacing this core's thread");
    }

    /// May run on these processors. Refused, the thread stays where it is, which is slow but right.
    fn allow(&self, cpus: &[usize]) -> nix::Result<()> {
        let mut set = CpuSet::new();
        cpus.iter().try_for_each(|cpu| set.set(*cpu))?;
        sched_setaffinity(Pid::from_raw(0), &set)
    }
}

/// A thread outlives its ring, and what it starts later inherits where it may run.
impl Drop for Aside {
    fn drop(&mut self) {
        if self.stays_until.is_some() {
            let freed = self.allow(&self.allowed);
            tracing::debug!(?freed, "runs anywhere again");
        }
    }
}

/// Ticks that each processor has idled so far; empty where /proc does not say. A processor on which a thread sleeps
/// for its ring is told as waiting for IO, which is idling too.
fn idle_ticks() -> Vec<u64> {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let idle = |line: &str| {
        line.split_whitespace().skip(4).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
    };
    stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).map(idle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks `looks` times, 5 ms apart, displaced so often between two; processor 1 idles for so many percent of the
    /// time. Returns the moves.
    fn moves(looks: u64, displaced: i64, idle_percent: u64) -> Vec<usize> {
        let mut aside = Aside {
            allowed: vec![0, 1],
            look_at: Time(0),
            displaced: 0,
            since: None,
            pause: LOOK_EVERY,
            stays_until: None,
        };
        let mut moved = Vec::new();
        for look in 1..=looks {
            let now = Time(look * LOOK_EVERY.0);
            if now < aside.look_at {
                continue;
            }
            let ticks = now.0 * idle_percent / 100 / TICK.0;
            moved.extend(aside.judge(now, look as i64 * displaced, 0, || vec![0, ticks]));
        }
        moved
    }

    #[test]
    fn a_core_displaced_often_moves_to_an_idle_processor() {
        assert_eq!(moves(12, 7, 90), [1]);
    }

    #[test]
    fn nothing_moves_that_has_its_processor_or_has_nowhere_to_go() {
        assert_eq!(moves(500, 2, 100), [0usize; 0], "seldom displaced");
        assert_eq!(moves(500, 7, 20), [0usize; 0], "the other processor is busy too");
    }

    #[test]
    fn moves_that_do_not_help_become_rare() {
        let count = moves(200 * 60, 7, 90).len();
        assert!((50..=80).contains(&count), "{count} moves in a minute");
    }

    #[test]
    fn a_thread_free_to_run_anywhere_can_move_and_is_as_free_afterwards() {
        let free = || sched_getaffinity(Pid::from_raw(0)).expect("Linux tells");
        let before = free();
        let Some(aside) = Aside::new() else { return };
        aside.allowed.iter().for_each(|cpu| aside.move_to(*cpu));
        aside.allow(&aside.allowed).expect("where it ran before");
        assert_eq!(free(), before);

        let Some(mut amid) = Aside::new() else { return };
        amid.move_to(amid.allowed[0]);
        amid.stays_until = Some(Time(0) + STAY);
        drop(amid);
        assert_eq!(free(), before, "dropped amid its stay");
        assert_eq!(idle_ticks().len(), std::thread::available_parallelism().map_or(1, |n| n.get()));
    }
}
