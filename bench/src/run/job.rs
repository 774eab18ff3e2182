//! One connection under load: what is sent when, and what is recorded.
//!
//! Closed loop: as many IOs as the depth says are in flight. Open loop: IOs arrive at a fixed rate
//! whatever becomes of those before, and latency counts from the moment an IO should have begun, so
//! that a stall is felt by all that arrived during it (no coordinated omission).

use super::driver::{Done, Driver, FileDriver, NbdDriver, NvmeDriver, VolumeDriver};
use super::load::{BLOCK_BYTES, Io, Ios, Load};
use super::target::Target;
use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use protocol::types::{Span, Time};
use reactor::ring::{Ring, RingConfig};
use reactor::{Addr, BufMut, Reactor};
use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// How often a job tells what it did.
const TICK: Span = Span::ms(250);
/// How long IOs may be under way without any of them ending.
const SILENCE_MAX: Span = Span::ms(60_000);

/// What a job did since it last told.
#[derive(Debug)]
pub struct Tick {
    /// Latencies of reads in nanoseconds.
    pub reads: Histogram<u64>,
    /// Latencies of writes in nanoseconds.
    pub writes: Histogram<u64>,
    /// Bytes moved.
    pub bytes: u64,
    /// Whether the warm-up is over.
    pub counts: bool,
    /// IOs that should have begun and have not ended; only of an open loop, only at its end.
    pub unserved: u64,
    /// System calls that entered the ring meanwhile.
    pub enters: u64,
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

/// Runs one job on this thread.
///
/// # Errors
/// An IO failed, what was read is not what was written, or the connection was lost.
pub fn run(
    target: &Target,
    load: &Load,
    job: u32,
    round: u32,
    times: Times,
    tell: &Sender<Tick>,
) -> anyhow::Result<()> {
    let mut ring = ring(load.depth, load.poll)?;
    let driver = connect(&mut ring, target, load, job)?;
    let bytes = driver.bytes().min(load.bytes) / u64::from(load.jobs) / BLOCK_BYTES * BLOCK_BYTES;
    let ios = Ios::new(load, job, round, bytes * u64::from(job), bytes)?;
    let mut spare = VecDeque::new();
    for slot in 0..load.depth {
        let mut buf = ring.arena().alloc(32).context("the arena is too small for this depth")?;
        fill(&mut buf, u64::from(slot), load.seed, 0);
        spare.push_back((slot, buf));
    }
    let start = ring.now();
    let from = start + Span(times.warm_up.as_nanos() as u64);
    let end = from + Span(times.measured.as_nanos() as u64);
    let interval_ns = load.rate.map(|rate| f64::from(load.jobs) / rate * 1e9);
    let verify = load.verify.then(|| Verify::new(bytes * u64::from(job), bytes, load.seed));
    let flying = vec![(start, Io { write: false, offset: 0, bytes: 0 }, 0); load.depth as usize];
    let tick =
        Tick { reads: histogram(), writes: histogram(), bytes: 0, counts: false, unserved: 0, enters: 0 };
    let eager = matches!(target, Target::File(_));
    let (arrivals, entered) = (0, ring.stats().enters);
    let mut job = Job {
        ring,
        driver,
        ios,
        spare,
        flying,
        from,
        end,
        start,
        interval_ns,
        arrivals,
        verify,
        entered,
        tick,
    };
    job.drive(eager, tell)
}

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
    fn drive(&mut self, eager: bool, tell: &Sender<Tick>) -> anyhow::Result<()> {
        let (mut done, mut told, mut heard) = (Vec::new(), self.start, self.start);
        let mut ended: VecDeque<Done> = VecDeque::new();
        let depth = self.flying.len();
        loop {
            let now = self.ring.now();
            if now >= self.end && self.spare.len() + ended.len() == depth {
                break;
            }
            self.issue(now, depth);
            if now - told >= TICK {
                told = now;
                self.tell(now, tell)?;
            }
            // See `tune probe`: a disk should not wait until all that ended is looked at.
            let deadline = if ended.is_empty() { self.arrival(now) } else { Some(now) };
            let deadline = deadline.unwrap_or(heard + SILENCE_MAX);
            self.driver.turn(&mut self.ring, Some(deadline), &mut done)?;
            let now = self.ring.now();
            if !done.is_empty() || self.spare.len() == depth {
                heard = now;
            }
            ensure!(
                now < heard + SILENCE_MAX,
                "no IO has ended for {} s: is a quorum lost?",
                SILENCE_MAX.0 / 1_000_000_000
            );
            if now >= self.from && !self.tick.counts {
                // The measurement begins: what was before it must not take its first IOs along.
                told = now;
                self.tell(now, tell)?;
            }
            done.iter().for_each(|done| self.record(done.slot, now));
            ended.extend(done.drain(..));
            while let Some(done) = ended.pop_front() {
                self.end(done)?;
                if eager && !ended.is_empty() {
                    break;
                }
            }
        }
        self.tick.unserved = self.due(self.end).saturating_sub(self.arrivals);
        self.tell(self.end, tell)
    }

    /// IOs that should have begun by then; none counts in a closed loop.
    fn due(&self, now: Time) -> u64 {
        self.interval_ns.map_or(0, |interval| ((now - self.start).0 as f64 / interval) as u64)
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
        while now < self.end && !self.spare.is_empty() && refused < depth {
            let intended = match self.interval_ns {
                None => now,
                Some(interval) => {
                    let at = self.intended(self.arrivals, interval);
                    if at > now {
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
        if now < self.end && (now >= self.from) == self.tick.counts {
            let times = if io.write { &mut self.tick.writes } else { &mut self.tick.reads };
            times.saturating_record((now - intended).0.max(1));
            self.tick.bytes += io.bytes;
        }
    }

    fn end(&mut self, done: Done) -> anyhow::Result<()> {
        let Done { slot, result, buf } = done;
        let (_, io, generation) = std::mem::replace(
            &mut self.flying[slot as usize],
            (self.start, Io { write: false, offset: 0, bytes: 0 }, 0),
        );
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
        let counts = now >= self.from;
        let next = Tick { reads: histogram(), writes: histogram(), bytes: 0, counts, unserved: 0, enters: 0 };
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
    seed: u64,
}

impl Verify {
    fn new(first_byte: u64, bytes: u64, seed: u64) -> Self {
        let blocks = (bytes / BLOCK_BYTES) as usize;
        Self { first: (first_byte / BLOCK_BYTES) as usize, generations: vec![0; blocks], next: 0, seed }
    }

    fn stamp(&mut self, io: Io, buf: &mut BufMut) -> u64 {
        self.next += 1;
        for (nth, block) in io.blocks().enumerate() {
            let at = nth * BLOCK_BYTES as usize;
            fill(&mut buf[at..at + BLOCK_BYTES as usize], block as u64, self.seed, self.next);
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
            fill(&mut wanted, block as u64, self.seed, generation);
            let word = |at: usize| u64::from_le_bytes(found[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
            ensure!(
                found == wanted,
                "verify: block {block} reads otherwise than write {generation} left it (it says: block {}, write {})",
                word(0),
                word(1)
            );
        }
        Ok(())
    }
}

/// Bytes that do not compress, told by place, generation and seed; the first words say which.
fn fill(bytes: &mut [u8], place: u64, seed: u64, generation: u64) {
    let mut random = (place ^ seed.rotate_left(17) ^ generation.rotate_left(40)) | 1;
    for (nth, word) in bytes.chunks_exact_mut(8).enumerate() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let value = match nth {
            0 => place,
            1 => generation,
            _ => random,
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
