//! One connection under load: what is sent when, and what is recorded.
//!
//! Closed loop: as many IOs as the depth says are in flight. Open loop: IOs arrive at a fixed rate
//! whatever becomes of those before, and latency counts from the moment an IO should have begun, so
//! that a stall is felt by all that arrived during it (no coordinated omission).
//!
//! Latencies are of the IOs that began, or should have, within the measured window, however late they end; IOPS and
//! bytes are of those that ended in it.

use super::driver::{Done, Driver, FileDriver, NbdDriver, NvmeDriver, VolumeDriver};
use super::load::{BLOCK_BYTES, GOLDEN, IO_BYTES_MAX, Io, Ios, Load, mixed};
use super::target::Target;
use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use protocol::types::{Span, Time};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, BufMut, Reactor};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often a job tells what it did.
const TICK: Span = Span::ms(250);
/// How late a client may wake up at the end of an open loop and still begin what was due before it.
const LATE: Span = Span::ms(10);
/// Steps in which the waiting of IOs that never began is told.
const UNSERVED_STEPS: u64 = 10_000;
/// How long IOs may be under way without any of them ending.
pub const SILENCE_MAX: Span = Span::ms(60_000);

/// What a job did since it last told.
#[derive(Debug)]
pub struct Tick {
    /// Latencies of reads in nanoseconds.
    pub reads: Histogram<u64>,
    /// Latencies of writes in nanoseconds.
    pub writes: Histogram<u64>,
    /// IOs that ended within the measured window.
    pub ios: u64,
    /// Bytes that these moved.
    pub bytes: u64,
    /// When it was.
    pub phase: Phase,
    /// IOs that should have begun and never did; only of an open loop, only at its end. They are among the latencies
    /// with the time that they had waited by then.
    pub unserved: u64,
    /// System calls that entered the ring meanwhile.
    pub enters: u64,
    /// Blocks that were read back in the end and were as they were written; absent where that is not asked for.
    pub verified: Option<u64>,
}

/// Where in its course a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing counts.
    WarmUp,
    /// The measured window.
    Measured,
    /// What is under way ends.
    After,
}

impl Tick {
    fn new(phase: Phase) -> Self {
        let (reads, writes) = (histogram(), histogram());
        Self { reads, writes, ios: 0, bytes: 0, phase, unserved: 0, enters: 0, verified: None }
    }

    fn times(&mut self, io: Io) -> &mut Histogram<u64> {
        if io.write { &mut self.writes } else { &mut self.reads }
    }
}

/// The longest latency that is told apart, in nanoseconds: ten minutes.
const LATENCY_NS_MAX: u64 = 600_000_000_000;

/// A histogram of nanoseconds with three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("three digits are allowed")
}

/// Opens a connection.
///
/// # Errors
/// See the drivers.
pub fn connect(ring: &mut Ring, target: &Target, load: &Load, job: u32) -> anyhow::Result<Box<dyn Driver>> {
    let read_only = load.read_percent == 100;
    Ok(match target {
        Target::Rbd(_) => bail!("RBD is spoken by fio only"),
        Target::File(path) => Box::new(FileDriver::open(ring, path, load.dsync, read_only)?),
        Target::NbdTcp { addr, export } => {
            Box::new(NbdDriver::open(ring, Addr::Tcp(*addr), export, read_only)?)
        }
        Target::NbdUnix { socket, export } => {
            Box::new(NbdDriver::open(ring, Addr::Unix(socket.clone()), export, read_only)?)
        }
        Target::Nvme { addr, nqn } => Box::new(NvmeDriver::open(ring, &Addr::Tcp(*addr), nqn, load.depth)?),
        Target::Volume { mds, name } => {
            let mds = mds.as_deref().context("the MDS is not named: add --mds HOST:PORT, or --dev DIR")?;
            Box::new(VolumeDriver::open(ring, mds, name, job)?)
        }
    })
}

/// How much a target holds.
///
/// # Errors
/// It cannot be reached, or not with the load's depth.
pub fn bytes_of(target: &Target, load: &Load) -> anyhow::Result<u64> {
    let mut ring = ring(load.depth, false)?;
    Ok(connect(&mut ring, target, load, 0)?.bytes())
}

/// How long a client that polls does so before it sleeps.
const POLL_US: u32 = 200;

/// A ring with memory for so many IOs, twice: the native client receives beside, and each link stages 64 KiB.
///
/// # Errors
/// No io_uring here.
pub fn ring(depth: u32, poll: bool) -> anyhow::Result<Ring> {
    let arena_bytes = ((2 * depth as usize + 32) * (128 << 10)).next_power_of_two();
    let spin_us_max = if poll { POLL_US } else { 0 };
    Ok(Ring::new(RingConfig { arena_bytes, spin_us_max, register_arena: true, ..RingConfig::default() })?)
}

/// How long a job warms up and measures.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Not recorded.
    pub warm_up: Duration,
    /// Recorded.
    pub measured: Duration,
}

/// What the jobs of a measurement have in common: they begin together, once all are attached, and when one fails the
/// others end.
#[derive(Debug)]
pub struct Together {
    /// Those who are not attached yet.
    missing: Mutex<u32>,
    all_attached: Condvar,
    failed: AtomicBool,
}

impl Together {
    /// Of so many jobs.
    pub fn new(jobs: u32) -> Self {
        Self { missing: Mutex::new(jobs), all_attached: Condvar::new(), failed: AtomicBool::new(false) }
    }

    /// Waits until all are attached, or one has failed.
    pub fn wait(&self) {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |missing: &mut u32| *missing > 0 && !self.has_failed();
        drop(self.all_attached.wait_while(missing, waits));
    }

    fn attached(&self) {
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.all_attached.notify_all();
        self.wait();
    }

    fn fail(&self) {
        // Under the lock, so that nobody looks before and waits after it.
        let _missing = self.missing.lock();
        self.failed.store(true, Ordering::Relaxed);
        self.all_attached.notify_all();
    }

    fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Runs one job on this thread, until another has failed at the latest.
///
/// # Errors
/// An IO failed, what was read is not what was written, or the connection was lost.
pub fn run(
    target: &Target,
    load: &Load,
    job: u32,
    round: u32,
    times: Times,
    together: &Together,
    tell: &Sender<Tick>,
) -> anyhow::Result<()> {
    let drive = || {
        let mut ring = ring(load.depth, load.poll)?;
        let driver = connect(&mut ring, target, load, job)?;
        let mut job = Job::new(ring, driver, load, job, round)?;
        together.attached();
        job.begin(times);
        job.drive(matches!(target, Target::File(_)), together, tell)
    };
    let result = drive();
    if result.is_err() {
        together.fail();
    }
    result
}

/// Fails when IOs are under way and none has ended for too long.
///
/// # Errors
/// That.
pub fn not_silent(heard: Time, now: Time) -> anyhow::Result<()> {
    let seconds = SILENCE_MAX.0 / 1_000_000_000;
    ensure!(now < heard + SILENCE_MAX, "no IO has ended for {seconds} s: is a quorum lost?");
    Ok(())
}

/// What a slot does that does nothing.
const NONE: Io = Io { write: false, offset: 0, bytes: 0 };

struct Job {
    ring: Ring,
    driver: Box<dyn Driver>,
    ios: Ios,
    spare: VecDeque<(u32, BufMut)>,
    /// By slot: when it should have begun, what it is, the generation it writes.
    flying: Vec<(Time, Io, u64)>,
    start: Time,
    from: Time,
    end: Time,
    interval_ns: Option<f64>,
    arrivals: u64,
    verify: Option<Verify>,
    /// Of the ring's count, what was told.
    entered: u64,
    tick: Tick,
}

impl Job {
    fn new(
        mut ring: Ring,
        driver: Box<dyn Driver>,
        load: &Load,
        job: u32,
        round: u32,
    ) -> anyhow::Result<Self> {
        let bytes = driver.bytes().min(load.bytes) / u64::from(load.jobs) / BLOCK_BYTES * BLOCK_BYTES;
        let first = bytes * u64::from(job);
        let ios = Ios::new(load, job, round, first, bytes)?;
        // Another one each time: what an earlier run or round left is not taken for what this one wrote.
        let salt = ring.random();
        let mut spare = VecDeque::new();
        for slot in 0..load.depth {
            let mut buf = ring.arena().alloc(32).context("the arena is too small for this depth")?;
            fill(&mut buf, u64::from(slot), salt, 0);
            spare.push_back((slot, buf));
        }
        let start = ring.now();
        let interval_ns = load.rate.map(|rate| f64::from(load.jobs) / rate * 1e9);
        let verify = load.verify.then(|| Verify::new(first, bytes, salt));
        let flying = vec![(start, NONE, 0); load.depth as usize];
        let (arrivals, entered, tick) = (0, ring.stats().enters, Tick::new(Phase::WarmUp));
        Ok(Self {
            ring,
            driver,
            ios,
            spare,
            flying,
            start,
            from: start,
            end: start,
            interval_ns,
            arrivals,
            verify,
            entered,
            tick,
        })
    }

    /// Its course begins now.
    fn begin(&mut self, times: Times) {
        self.start = self.ring.now();
        self.from = self.start + Span(times.warm_up.as_nanos() as u64);
        self.end = self.from + Span(times.measured.as_nanos() as u64);
    }

    fn drive(&mut self, eager: bool, together: &Together, tell: &Sender<Tick>) -> anyhow::Result<()> {
        let (mut done, mut told, mut heard) = (Vec::new(), self.start, self.start);
        let mut ended: VecDeque<Done> = VecDeque::new();
        let depth = self.flying.len();
        loop {
            let now = self.ring.now();
            self.issue(now, depth);
            if now >= self.end && self.spare.len() == depth {
                break;
            }
            if together.has_failed() {
                return Ok(());
            }
            // See `tune probe`: a disk should not wait until all that ended is looked at.
            let deadline = if ended.is_empty() { self.arrival(now) } else { Some(now) };
            let deadline = deadline.unwrap_or(told + TICK).min(told + TICK);
            self.driver.turn(&mut self.ring, Some(deadline), &mut done)?;
            let now = self.ring.now();
            if !done.is_empty() || self.spare.len() == depth {
                heard = now;
            }
            not_silent(heard, now)?;
            if now - told >= TICK || self.phase(now) != self.tick.phase {
                told = now;
                self.tell(now, tell)?;
            }
            for done in done.iter().filter(|done| done.result.is_ok()) {
                self.record(done.slot, now);
            }
            ended.extend(done.drain(..));
            while let Some(done) = ended.pop_front() {
                self.end(done)?;
                if eager && !ended.is_empty() {
                    break;
                }
            }
        }
        self.record_unserved();
        self.tick.verified = self.read_back()?;
        self.tell(self.ring.now(), tell)
    }

    /// Reads every block that this job wrote once more, and checks it; how many, where that is asked for.
    fn read_back(&mut self) -> anyhow::Result<Option<u64>> {
        let Some(verify) = &self.verify else { return Ok(None) };
        let written = verify.written_ios();
        let (mut left, mut done, mut heard) = (written.iter(), Vec::new(), self.ring.now());
        loop {
            while let Some((slot, buf)) = self.spare.pop_front() {
                let Some(io) = left.next() else {
                    self.spare.push_front((slot, buf));
                    break;
                };
                self.flying[slot as usize] = (self.end, *io, 0);
                self.driver.submit(&mut self.ring, slot, *io, buf);
            }
            if self.spare.len() == self.flying.len() {
                return Ok(Some(written.iter().map(|io| io.bytes / BLOCK_BYTES).sum()));
            }
            self.driver.turn(&mut self.ring, Some(heard + SILENCE_MAX), &mut done)?;
            let now = self.ring.now();
            if !done.is_empty() {
                heard = now;
            }
            not_silent(heard, now)?;
            done.drain(..).try_for_each(|done| self.end(done))?;
        }
    }

    fn phase(&self, now: Time) -> Phase {
        match now {
            now if now < self.from => Phase::WarmUp,
            now if now < self.end => Phase::Measured,
            _ => Phase::After,
        }
    }

    /// Of an open loop: what should have begun within the window and never did waited until its end at least.
    fn record_unserved(&mut self) {
        let Some(interval) = self.interval_ns else { return };
        let due = |at: Time| ((at - self.start).0 as f64 / interval).ceil() as u64;
        let (first, end) = (self.arrivals.max(due(self.from)), due(self.end));
        self.tick.unserved = end.saturating_sub(first);
        // There can be many millions: those next to each other count as the first of them.
        let together = self.tick.unserved.div_ceil(UNSERVED_STEPS).max(1);
        for nth in (first..end).step_by(together as usize) {
            let waited = self.end.0.saturating_sub(self.intended(nth, interval).0).max(1);
            let io = self.ios.draw();
            self.tick.times(io).saturating_record_n(waited, together.min(end - nth));
        }
    }

    fn intended(&self, nth: u64, interval: f64) -> Time {
        self.start + Span((nth as f64 * interval) as u64)
    }

    /// When the next IO arrives, if that is what is waited for.
    fn arrival(&self, now: Time) -> Option<Time> {
        let interval = self.interval_ns.filter(|_| !self.spare.is_empty() && now < self.end)?;
        Some(self.intended(self.arrivals, interval))
    }

    fn issue(&mut self, now: Time, depth: usize) {
        let mut refused = 0;
        let until = if self.interval_ns.is_some() { self.end + LATE } else { self.end };
        while now < until && !self.spare.is_empty() && refused < depth {
            let intended = match self.interval_ns {
                None => now,
                Some(interval) => {
                    let at = self.intended(self.arrivals, interval);
                    if at > now || at >= self.end {
                        return;
                    }
                    at
                }
            };
            let io = self.ios.draw();
            // Of two writes in flight to one block, nobody can say which one stays.
            let clash = |other: &(Time, Io, u64)| {
                other.1.bytes > 0
                    && other.1.blocks().start < io.blocks().end
                    && io.blocks().start < other.1.blocks().end
            };
            if self.verify.is_some() && self.flying.iter().any(clash) {
                refused += 1;
                continue;
            }
            let Some((slot, mut buf)) = self.spare.pop_front() else { return };
            let generation = match &mut self.verify {
                Some(verify) if io.write => verify.stamp(io, &mut buf),
                _ => 0,
            };
            self.arrivals += 1;
            self.flying[slot as usize] = (intended, io, generation);
            self.driver.submit(&mut self.ring, slot, io, buf);
        }
    }

    fn record(&mut self, slot: u32, now: Time) {
        let (intended, io, _) = self.flying[slot as usize];
        if self.tick.phase == Phase::Measured {
            self.tick.ios += 1;
            self.tick.bytes += io.bytes;
        }
        if (self.from..self.end).contains(&intended) {
            self.tick.times(io).saturating_record((now - intended).0.max(1));
        }
    }

    fn end(&mut self, done: Done) -> anyhow::Result<()> {
        let Done { slot, result, buf } = done;
        let (_, io, generation) = std::mem::replace(&mut self.flying[slot as usize], (self.start, NONE, 0));
        let what = if io.write { "write" } else { "read" };
        result
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{what} of {} bytes at {}", io.bytes, io.offset))?;
        if let Some(verify) = &mut self.verify {
            if io.write { verify.written(io, generation) } else { verify.check(io, &buf)? }
        }
        self.spare.push_back((slot, buf));
        Ok(())
    }

    /// Tells what was done and begins anew.
    fn tell(&mut self, now: Time, tell: &Sender<Tick>) -> anyhow::Result<()> {
        let next = Tick::new(self.phase(now));
        let mut tick = std::mem::replace(&mut self.tick, next);
        let enters = self.ring.stats().enters;
        tick.enters = enters - std::mem::replace(&mut self.entered, enters);
        tell.send(tick).context("nobody listens to the job")
    }
}

/// What each block should read: the generation of its last write.
struct Verify {
    first: usize,
    generations: Vec<u64>,
    next: u64,
    salt: u64,
}

impl Verify {
    fn new(first_byte: u64, bytes: u64, salt: u64) -> Self {
        let blocks = (bytes / BLOCK_BYTES) as usize;
        Self { first: (first_byte / BLOCK_BYTES) as usize, generations: vec![0; blocks], next: 0, salt }
    }

    /// Reads of every block that was written, each as long as it can be.
    fn written_ios(&self) -> Vec<Io> {
        let mut ios: Vec<Io> = Vec::new();
        for (nth, _) in self.generations.iter().enumerate().filter(|(_, generation)| **generation > 0) {
            let offset = (self.first + nth) as u64 * BLOCK_BYTES;
            match ios.last_mut() {
                Some(io) if io.offset + io.bytes == offset && io.bytes < IO_BYTES_MAX => {
                    io.bytes += BLOCK_BYTES;
                }
                _ => ios.push(Io { write: false, offset, bytes: BLOCK_BYTES }),
            }
        }
        ios
    }

    fn stamp(&mut self, io: Io, buf: &mut BufMut) -> u64 {
        self.next += 1;
        for (nth, block) in io.blocks().enumerate() {
            let at = nth * BLOCK_BYTES as usize;
            fill(&mut buf[at..at + BLOCK_BYTES as usize], block as u64, self.salt, self.next);
        }
        self.next
    }

    fn written(&mut self, io: Io, generation: u64) {
        io.blocks().for_each(|block| self.generations[block - self.first] = generation);
    }

    /// Blocks that this run has not written yet are not known, and pass.
    fn check(&self, io: Io, buf: &[u8]) -> anyhow::Result<()> {
        let mut wanted = vec![0; BLOCK_BYTES as usize];
        for (nth, block) in io.blocks().enumerate() {
            let generation = self.generations[block - self.first];
            let found = &buf[nth * BLOCK_BYTES as usize..][..BLOCK_BYTES as usize];
            if generation == 0 {
                continue;
            }
            fill(&mut wanted, block as u64, self.salt, generation);
            let word = |at: usize| u64::from_le_bytes(found[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
            ensure!(
                found == wanted,
                "verify: block {block} reads otherwise than write {generation} left it (it says: block {}, write {} of {})",
                word(0),
                word(1),
                if word(2) == self.salt { "this job" } else { "another run or job" }
            );
        }
        Ok(())
    }
}

/// Bytes that do not compress, told by place, salt and generation; the first words say which.
fn fill(bytes: &mut [u8], place: u64, salt: u64, generation: u64) {
    // splitmix64.
    let mut state = mixed(mixed(place ^ salt).wrapping_add(generation));
    for (nth, word) in bytes.chunks_exact_mut(8).enumerate() {
        state = state.wrapping_add(GOLDEN);
        let value = match nth {
            0 => place,
            1 => generation,
            2 => salt,
            _ => mixed(state),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A target in memory, with faults.
    #[derive(Default)]
    struct Fake {
        bytes: Vec<u8>,
        queued: Vec<(u32, Io, BufMut)>,
        /// How long it keeps its first IOs.
        hangs_ns: u64,
        started: Option<Time>,
        /// Reads fail, once IOs are issued no more.
        reads_fail: bool,
        /// Writes go nowhere.
        loses_writes: bool,
    }

    impl Fake {
        fn new(bytes: u64) -> Self {
            Self { bytes: vec![0; bytes as usize], ..Self::default() }
        }
    }

    impl Driver for Fake {
        fn bytes(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn submit(&mut self, ring: &mut Ring, slot: u32, io: Io, buf: BufMut) {
            self.started.get_or_insert(ring.now());
            self.queued.push((slot, io, buf));
        }

        fn turn(
            &mut self,
            ring: &mut Ring,
            deadline: Option<Time>,
            done: &mut Vec<Done>,
        ) -> anyhow::Result<()> {
            let until = self.started.map_or(Time(0), |started| started + Span(self.hangs_ns));
            if self.queued.is_empty() || ring.now() < until {
                let until = if self.queued.is_empty() { None } else { Some(until) };
                ring.turn(deadline.into_iter().chain(until).min(), &mut Vec::new());
                return Ok(());
            }
            for (slot, io, mut buf) in self.queued.drain(..) {
                let place = io.offset as usize..(io.offset + io.bytes) as usize;
                match io.write {
                    true if self.loses_writes => {}
                    true => self.bytes[place].copy_from_slice(&buf[..io.bytes as usize]),
                    false => buf[..io.bytes as usize].copy_from_slice(&self.bytes[place]),
                }
                let failed = !io.write && self.reads_fail;
                let result = if failed { Err("damaged".to_owned()) } else { Ok(()) };
                done.push(Done { slot, result, buf });
            }
            Ok(())
        }
    }

    const TIMES: Times = Times { warm_up: Duration::from_millis(20), measured: Duration::from_millis(80) };

    fn begun(fake: Fake, load: &Load, times: Times) -> anyhow::Result<Job> {
        let mut job = Job::new(ring(load.depth, false)?, Box::new(fake), load, 0, 0)?;
        job.begin(times);
        Ok(job)
    }

    /// What a job told, summed up.
    fn driven(fake: Fake, load: &Load, eager: bool) -> anyhow::Result<Tick> {
        let (tell, ticks) = mpsc::channel();
        begun(fake, load, TIMES)?.drive(eager, &Together::new(1), &tell)?;
        drop(tell);
        let mut sum = Tick::new(Phase::After);
        for tick in ticks {
            sum.reads.add(&tick.reads)?;
            sum.writes.add(&tick.writes)?;
            sum.ios += tick.ios;
            sum.unserved += tick.unserved;
            sum.verified = sum.verified.max(tick.verified);
        }
        Ok(sum)
    }

    #[test]
    fn an_io_that_hangs_past_the_end_is_among_the_latencies_of_an_open_loop() -> anyhow::Result<()> {
        let fake = || Fake { hangs_ns: 300_000_000, ..Fake::new(1 << 20) };
        let load = Load { rate: Some(1000.0), ..Load::random_4k(100, 64, 1 << 20) };
        let tick = driven(fake(), &load, false)?;
        // 80 should have begun in the window; 20 of the 64 that did begin belong to the warm-up.
        assert!((79..=81).contains(&tick.reads.len()), "{}", tick.reads.len());
        assert!((35..=37).contains(&tick.unserved), "{}", tick.unserved);
        assert_eq!(tick.ios, 0, "none ended within the window");
        assert!(tick.reads.max() >= 200_000_000, "{}", tick.reads.max());
        Ok(())
    }

    #[test]
    fn ios_in_flight_at_the_end_of_a_closed_loop_are_latencies_and_no_throughput() -> anyhow::Result<()> {
        let fake = Fake { hangs_ns: 300_000_000, ..Fake::new(1 << 20) };
        // No warm-up: they begin in the window.
        let (tell, ticks) = mpsc::channel();
        let (load, times) = (Load::random_4k(100, 4, 1 << 20), Times { warm_up: Duration::ZERO, ..TIMES });
        begun(fake, &load, times)?.drive(false, &Together::new(1), &tell)?;
        drop(tell);
        let (mut ios, mut times) = (0, histogram());
        for tick in ticks {
            ios += tick.ios;
            times.add(&tick.reads)?;
        }
        assert_eq!((ios, times.len()), (0, 4));
        assert!(times.min() >= 200_000_000, "{}", times.min());
        Ok(())
    }

    #[test]
    fn a_job_ends_when_another_has_failed() -> anyhow::Result<()> {
        let (tell, _ticks) = mpsc::channel();
        let (load, times) =
            (Load::random_4k(100, 1, 1 << 20), Times { measured: Duration::from_secs(3600), ..TIMES });
        let together = Together::new(1);
        together.fail();
        begun(Fake::new(1 << 20), &load, times)?.drive(false, &together, &tell)
    }

    #[test]
    fn jobs_begin_when_all_are_attached_or_one_has_failed() -> anyhow::Result<()> {
        let (began, begins) = mpsc::channel();
        let together = Together::new(2);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                together.attached();
                began.send(())
            });
            let early = begins.recv_timeout(Duration::from_millis(100));
            assert!(early.is_err(), "the other is not attached yet");
            together.attached();
            together.wait();
            first.join().map_err(|_| anyhow::anyhow!("it panicked"))?.context("nobody listens")
        })?;

        let alone = Together::new(2);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| alone.attached());
            alone.fail();
            waits.join().map_err(|_| anyhow::anyhow!("it panicked"))
        })
    }

    #[test]
    fn a_failure_among_the_last_ios_of_a_file_is_told() {
        let fake = Fake { hangs_ns: 150_000_000, reads_fail: true, ..Fake::new(1 << 20) };
        let error = driven(fake, &Load::random_4k(100, 4, 1 << 20), true).expect_err("all of them failed");
        assert!(format!("{error:#}").contains("damaged"), "{error:#}");
    }

    #[test]
    fn writes_that_went_nowhere_are_found_though_the_load_reads_nothing() -> anyhow::Result<()> {
        let load = Load { verify: true, ..Load::random_4k(0, 4, 1 << 20) };
        let found = driven(Fake::new(1 << 20), &load, false)?.verified;
        assert!(found.is_some_and(|blocks| (1..=256).contains(&blocks)), "{found:?}");
        let fake = Fake { loses_writes: true, ..Fake::new(1 << 20) };
        let error = driven(fake, &load, false).expect_err("nothing was kept");
        assert!(error.to_string().starts_with("verify: "), "{error:#}");
        Ok(())
    }

    #[test]
    fn what_another_run_left_is_not_taken_for_this_ones_and_neighbours_differ() {
        let ring = ring(1, false).expect("io_uring");
        let io = Io { write: true, offset: 0, bytes: 2 * BLOCK_BYTES };
        let (mut earlier, mut verify) = (Verify::new(0, 1 << 20, 9), Verify::new(0, 1 << 20, 10));
        let mut buf = ring.arena().alloc(2).expect("memory");
        let generation = verify.stamp(io, &mut buf);
        verify.written(io, generation);
        assert!(verify.check(io, &buf).is_ok());
        assert_eq!(earlier.stamp(io, &mut buf), generation, "the same write of the same load");
        assert!(verify.check(io, &buf).is_err(), "stale data");
        let (even, odd) = buf.split_at(BLOCK_BYTES as usize);
        assert!(even.chunks_exact(8).zip(odd.chunks_exact(8)).skip(3).all(|(even, odd)| even != odd));
        let reads = verify.written_ios();
        assert_eq!(reads, [Io { write: false, offset: 0, bytes: 2 * BLOCK_BYTES }]);
    }

    #[test]
    fn verify_finds_a_flipped_bit_a_lost_write_and_a_block_of_another_place() {
        let mut ring = ring(1, false).expect("io_uring");
        let mut verify = Verify::new(0, 1 << 20, 9);
        let io = |block: u64| Io { write: true, offset: block * BLOCK_BYTES, bytes: 2 * BLOCK_BYTES };
        let stamp = |verify: &mut Verify, ring: &mut Ring, block| {
            let mut buf = ring.arena().alloc(2).expect("memory");
            let generation = verify.stamp(io(block), &mut buf);
            verify.written(io(block), generation);
            buf
        };
        let old = stamp(&mut verify, &mut ring, 4);
        assert!(verify.check(io(4), &old).is_ok());
        let mut new = stamp(&mut verify, &mut ring, 4);
        assert!(verify.check(io(4), &new).is_ok());
        assert!(verify.check(io(4), &old).is_err(), "a lost write");
        let elsewhere = stamp(&mut verify, &mut ring, 8);
        assert!(verify.check(io(4), &elsewhere).is_err(), "a block of another place");
        new[5000] ^= 1;
        assert!(verify.check(io(4), &new).is_err(), "a flipped bit");
        assert!(verify.check(io(100), &new).is_ok(), "what was never written is not known");
    }
}
