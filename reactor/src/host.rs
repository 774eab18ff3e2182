//! What runs the cores' loops: a pinned thread a core, with or without glommio around it.
//!
//! A core's program is a [`CoreLoop`], built on its own thread and turned until it stops; both
//! hosts drive the same code. Under [`GlommioHost`] the loop is the one root task of an
//! executor: its preempt timer is set to an hour (a short one can hang glommio 0.9.0 for
//! good), and glommio's own reactor is visited about once a millisecond of turning. No other
//! glommio task is run: the control plane lives on a thread of its own, so nothing starves
//! while a loop sleeps in its ring.
//!
//! Deliberately absent: work stealing, restarts of a core that panicked.

use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Whether a loop wants another turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Turn again.
    Continue,
    /// The core is done.
    Stop,
}

/// A core's program.
pub trait CoreLoop {
    /// One round: take what completed, work on it, send out what follows. May sleep in its
    /// reactor; must not block elsewhere.
    fn turn(&mut self) -> Turn;
}

/// One core to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoreSpec {
    /// Index of the core within this process; the shard's number.
    pub index: usize,
    /// The processor to pin its thread to, or none.
    pub cpu: Option<usize>,
    /// The thread's name; the kernel shows 15 bytes of it.
    pub name: String,
}

/// What a loop's builder is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoreContext {
    /// As in [`CoreSpec::index`].
    pub index: usize,
    /// The processor that the thread is pinned to, if it is.
    pub cpu: Option<usize>,
}

/// Why the cores could not be run.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A thread could not be started.
    #[error("cannot start thread {name}: {error}")]
    Spawn {
        /// The thread's name.
        name: String,
        /// The kernel's answer.
        error: std::io::Error,
    },
    /// A core's loop panicked (a bug); the others went on until they stopped.
    #[error("the loop of core {index} panicked")]
    Panicked {
        /// Index of the core.
        index: usize,
    },
}

/// Runs cores.
pub trait Host {
    /// Builds a loop a core on that core's thread by `main`, and turns them all until each has
    /// stopped.
    fn run<M>(&self, cores: Vec<CoreSpec>, main: M) -> Result<(), HostError>
    where
        M: Fn(CoreContext) -> Box<dyn CoreLoop> + Send + Clone + 'static;
}

/// Plain threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct BareHost;

/// glommio executors. Where one cannot be made (memlock below 512 KiB, no io_uring for it) the
/// core runs bare, with a log line.
#[derive(Debug, Clone, Copy, Default)]
pub struct GlommioHost;

/// A host by name, for configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostKind {
    /// [`BareHost`].
    Bare,
    /// [`GlommioHost`].
    #[default]
    Glommio,
}

impl FromStr for HostKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bare" => Ok(Self::Bare),
            "glommio" => Ok(Self::Glommio),
            _ => Err(format!("unknown host {text:?}; known are \"glommio\" and \"bare\"")),
        }
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bare => "bare",
            Self::Glommio => "glommio",
        })
    }
}

impl Host for HostKind {
    fn run<M>(&self, cores: Vec<CoreSpec>, main: M) -> Result<(), HostError>
    where
        M: Fn(CoreContext) -> Box<dyn CoreLoop> + Send + Clone + 'static,
    {
        match self {
            Self::Bare => BareHost.run(cores, main),
            Self::Glommio => GlommioHost.run(cores, main),
        }
    }
}

impl Host for BareHost {
    fn run<M>(&self, cores: Vec<CoreSpec>, main: M) -> Result<(), HostError>
    where
        M: Fn(CoreContext) -> Box<dyn CoreLoop> + Send + Clone + 'static,
    {
        run_threads(cores, main, run_bare)
    }
}

impl Host for GlommioHost {
    fn run<M>(&self, cores: Vec<CoreSpec>, main: M) -> Result<(), HostError>
    where
        M: Fn(CoreContext) -> Box<dyn CoreLoop> + Send + Clone + 'static,
    {
        run_threads(cores, main, run_glommio)
    }
}

/// A spec a core: pinned to the processors this process may use, or unpinned (with a log line)
/// when there are fewer of those than cores, or when `pin` is off.
pub fn core_specs(count: usize, pin: bool, name: &str) -> Vec<CoreSpec> {
    let cpus = allowed_cpus();
    let pin_all = pin && cpus.len() >= count;
    if pin && !pin_all {
        tracing::warn!(cores = count, cpus = cpus.len(), "fewer processors than cores; running unpinned");
    }
    let cpu = |index: usize| if pin_all { cpus.get(index).copied() } else { None };
    (0..count).map(|index| CoreSpec { index, cpu: cpu(index), name: format!("{name}-{index}") }).collect()
}

fn allowed_cpus() -> Vec<usize> {
    match sched_getaffinity(Pid::from_raw(0)) {
        Ok(set) => (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect(),
        Err(_) => Vec::new(),
    }
}

fn run_threads<M>(cores: Vec<CoreSpec>, main: M, drive: fn(CoreContext, &M)) -> Result<(), HostError>
where
    M: Fn(CoreContext) -> Box<dyn CoreLoop> + Send + Clone + 'static,
{
    let mut threads = Vec::new();
    for spec in cores {
        let main = main.clone();
        let (index, name) = (spec.index, spec.name.clone());
        let body = move || {
            let cpu = pin(&spec);
            drive(CoreContext { index: spec.index, cpu }, &main);
        };
        let spawned = thread::Builder::new().name(name.clone()).spawn(body);
        threads.push((index, spawned.map_err(|error| HostError::Spawn { name, error })?));
    }
    let mut result = Ok(());
    for (index, thread) in threads {
        if thread.join().is_err() {
            result = Err(HostError::Panicked { index });
        }
    }
    result
}

fn pin(spec: &CoreSpec) -> Option<usize> {
    let cpu = spec.cpu?;
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!(core = spec.index, cpu, %error, "cannot pin the core's thread; running unpinned");
        return None;
    }
    Some(cpu)
}

fn run_bare<M: Fn(CoreContext) -> Box<dyn CoreLoop>>(context: CoreContext, main: &M) {
    let mut core = main(context);
    while core.turn() == Turn::Continue {}
}

/// Far above the life of any wait: glommio 0.9.0 parks for good if its preempt timer fires
/// before the first task runs, seen with 1 ms.
const PREEMPT_TIMER: Duration = Duration::from_secs(3600);
/// How often glommio's reactor is visited; a visit costs some 11 us.
const VISIT_EVERY: Duration = Duration::from_millis(1);
/// Turns between two looks at the clock.
const TURNS_PER_LOOK: u32 = 8;

fn run_glommio<M: Fn(CoreContext) -> Box<dyn CoreLoop>>(context: CoreContext, main: &M) {
    // Placement is ours already. The least of memory and ring: the executor does no IO.
    let made = glommio::LocalExecutorBuilder::new(glommio::Placement::Unbound)
        .preempt_timer(PREEMPT_TIMER)
        .io_memory(64 << 10)
        .ring_depth(16)
        .make();
    let executor = match made {
        Ok(executor) => executor,
        Err(error) => {
            tracing::warn!(
                core = context.index, %error,
                "glommio cannot start (memlock limit below 512 KiB? see ulimit -l); this core runs without it"
            );
            return run_bare(context, main);
        }
    };
    executor.run(async {
        let mut core = main(context);
        let mut visited = Instant::now();
        let mut turns = 0u32;
        while core.turn() == Turn::Continue {
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_PER_LOOK) && visited.elapsed() >= VISIT_EVERY {
                glommio::executor().yield_task_queue_now().await;
                visited = Instant::now();
            }
        }
    });
}
