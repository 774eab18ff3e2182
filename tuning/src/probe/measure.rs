//! Our own measure of a disk: so many direct IOs in flight over io_uring, for so long.
//!
//! It uses the reactor that the target uses, so that what is measured is what the target gets.
//! Invariant: `depth` IOs are in flight, or ended and next in line to be replaced, from the first
//! completion to the last submission.

use super::subject::Subject;
use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use protocol::types::{ENTRY_BLOCKS_MAX, Span};
use reactor::ring::{Ring, RingConfig};
use reactor::{BufMut, Completion, Disk, File, IoBuf, Op, OpenOptions, Reactor};
use serde::{Serialize, Serializer};
use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

/// Bytes of a random IO.
const BLOCK_BYTES: u64 = 4096;
/// Bytes of an IO in order: the longest that a target sends.
const STREAM_BYTES: u64 = 128 << 10;
/// IOs in flight while the file is filled.
const FILL_DEPTH: u32 = 8;

/// The memory of one IO.
type Bufs = Vec<BufMut>;

/// A load: what is done, of which size, how many at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Writes rather than reads.
    pub write: bool,
    /// Durable (RWF_DSYNC).
    pub dsync: bool,
    /// In order rather than at random.
    pub stream: bool,
    /// Bytes of each IO, whole blocks.
    pub bytes: u64,
    /// IOs in flight.
    pub depth: u32,
}

impl Load {
    /// Random reads of 4 KiB.
    pub const READ: Self = Self { write: false, dsync: false, stream: false, bytes: BLOCK_BYTES, depth: 1 };
    /// Random writes of 4 KiB.
    pub const WRITE: Self = Self { write: true, ..Self::READ };
    /// Durable random writes of 4 KiB.
    pub const DSYNC: Self = Self { dsync: true, ..Self::WRITE };
    /// Reads of 128 KiB in order.
    pub const STREAM_READ: Self = Self { stream: true, bytes: STREAM_BYTES, ..Self::READ };
    /// Writes of 128 KiB in order.
    pub const STREAM_WRITE: Self = Self { write: true, ..Self::STREAM_READ };
    /// Durable writes of 128 KiB in order, as a log has them.
    pub const LOG: Self = Self { dsync: true, ..Self::STREAM_WRITE };
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = if self.stream { "stream " } else { "random " };
        let durable = if self.dsync { "durable " } else { "" };
        let what = if self.write { "write" } else { "read" };
        write!(f, "{durable}{order}{what} {}K", self.bytes >> 10)
    }
}

impl Serialize for Load {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What came of a load.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Run {
    /// What it was.
    pub load: Load,
    /// IOs a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_s: f64,
    /// Mean latency.
    pub mean_us: f64,
    /// Median latency.
    pub p50_us: f64,
    /// The latency that 99 of 100 IOs stay under.
    pub p99_us: f64,
}

impl Run {
    /// One line of progress.
    pub fn line(&self) -> String {
        let Self { load, iops, p50_us, p99_us, .. } = self;
        format!("{load}, depth {}: {iops:.0} IOPS, {p50_us:.0} us, 99 % below {p99_us:.0} us", load.depth)
    }
}

/// A subject opened for measuring.
pub struct Bench {
    ring: Ring,
    file: File,
    bytes: u64,
    random: u64,
}

impl Bench {
    /// Opens it past the page cache.
    ///
    /// # Errors
    /// No io_uring here, or the file system refuses direct IO.
    pub fn open(subject: &Subject) -> anyhow::Result<Self> {
        let arena_bytes = 32 << 20;
        // Without spinning, so that what is measured is the disk and not our patience.
        let config =
            RingConfig { arena_bytes, spin_us_max: 0, register_arena: true, ..RingConfig::default() };
        let mut ring = Ring::new(config)?;
        let options = OpenOptions { read_only: !subject.may_write(), ..OpenOptions::EXISTING };
        let file = ring.open(subject.path(), options)?;
        ensure!(ring.disk().is_direct(file), "the file system refuses direct IO, as tmpfs does");
        if !subject.is_device() {
            ring.allocate_blocking(file, 0, subject.bytes())?;
        }
        let random = ring.random() | 1;
        Ok(Self { ring, file, bytes: subject.bytes(), random })
    }

    /// Writes everything once.
    ///
    /// # Errors
    /// The disk fails or is full.
    pub fn fill(&mut self) -> anyhow::Result<()> {
        let load = Load { depth: FILL_DEPTH, ..Load::STREAM_WRITE };
        let pieces = self.bytes / load.bytes;
        self.drive(load, |issued, _| issued < pieces)?;
        self.ring.sync_blocking(self.file)?;
        Ok(())
    }

    /// Measures a load for so long.
    ///
    /// # Errors
    /// An IO fails.
    pub fn run(&mut self, load: Load, time: Duration) -> anyhow::Result<Run> {
        let limit = Span(time.as_nanos() as u64);
        let (times, elapsed) = self.drive(load, |_, elapsed| elapsed < limit)?;
        let iops = times.len() as f64 / (elapsed.0 as f64 / 1e9);
        let us = |ns: u64| ns as f64 / 1000.0;
        Ok(Run {
            load,
            iops,
            bytes_s: iops * load.bytes as f64,
            mean_us: times.mean() / 1000.0,
            p50_us: us(times.value_at_quantile(0.5)),
            p99_us: us(times.value_at_quantile(0.99)),
        })
    }

    /// Keeps `depth` IOs in flight while `more` (told how many were sent and for how long) says so.
    fn drive(
        &mut self,
        load: Load,
        more: impl Fn(u64, Span) -> bool,
    ) -> anyhow::Result<(Histogram<u64>, Span)> {
        let mut times = Histogram::<u64>::new(3)?;
        let mut spare: Vec<Bufs> = Vec::new();
        for _ in 0..load.depth {
            spare.push(self.bufs(load.bytes)?);
        }
        let start = self.ring.now();
        let mut sent = vec![start; load.depth as usize];
        let (mut issued, mut in_flight) = (0_u64, 0_u32);
        let mut completions: Vec<Completion> = Vec::new();
        while let Some(bufs) = spare.pop() {
            self.submit(load, in_flight.into(), issued, bufs);
            (issued, in_flight) = (issued + 1, in_flight + 1);
        }
        let mut ended: VecDeque<Completion> = VecDeque::new();
        while in_flight > 0 {
            // The next IO goes to the disk before the rest of those that ended together are looked
            // at: a disk that ends 16 at once would else be idle until 16 new ones are made up.
            let deadline = (!ended.is_empty()).then(|| self.ring.now());
            self.ring.turn(deadline, &mut completions);
            let now = self.ring.now();
            for completion in completions.drain(..) {
                times.record((now - sent[completion.token as usize]).0.max(1))?;
                ended.push_back(completion);
            }
            let Some(completion) = ended.pop_front() else { continue };
            completion.result.context("an IO of the probe failed")?;
            in_flight -= 1;
            if more(issued, now - start) {
                let bufs = take_back(completion.buf, completion.bufs).context("a buffer was lost")?;
                sent[completion.token as usize] = self.ring.now();
                self.submit(load, completion.token, issued, bufs);
                (issued, in_flight) = (issued + 1, in_flight + 1);
            }
        }
        Ok((times, self.ring.now() - start))
    }

    fn submit(&mut self, load: Load, token: u64, nth: u64, mut bufs: Bufs) {
        let pieces = self.bytes / load.bytes;
        let piece = if load.stream { nth % pieces } else { self.next_random() % pieces };
        let (file, offset) = (self.file, piece * load.bytes);
        let op = if load.write {
            Op::WriteAt {
                file,
                offset,
                bufs: bufs.into_iter().map(|buf| IoBuf::whole(buf.freeze())).collect(),
                dsync: load.dsync,
            }
        } else {
            let buf = bufs.pop().expect("a read has one buffer");
            assert!(bufs.is_empty() && buf.len() as u64 == load.bytes, "reads are of one run at most");
            Op::ReadAt { file, offset, buf, bytes: load.bytes as u32 }
        };
        self.ring.submit(token, op);
    }

    /// Xorshift: good enough for offsets, and cheap.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The memory of an IO, in runs as long as the arena has them.
    fn bufs(&mut self, bytes: u64) -> anyhow::Result<Bufs> {
        let blocks = (bytes / BLOCK_BYTES) as usize;
        let runs = (0..blocks).step_by(ENTRY_BLOCKS_MAX).map(|at| ENTRY_BLOCKS_MAX.min(blocks - at));
        let mut bufs = Bufs::new();
        for run in runs {
            let mut buf = self.ring.arena().alloc(run).context("the arena is too small for this depth")?;
            self.scramble(&mut buf);
            bufs.push(buf);
        }
        Ok(bufs)
    }

    /// Bytes that a disk cannot compress.
    fn scramble(&mut self, buf: &mut BufMut) {
        for word in buf.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next_random().to_le_bytes());
        }
    }
}

/// The memory of an IO, to be used again.
fn take_back(buf: Option<BufMut>, bufs: reactor::IoList) -> Option<Bufs> {
    let unique = |buf| match buf {
        IoBuf::Shared { buf, .. } => buf.try_unique().ok(),
        _ => None,
    };
    buf.map_or_else(|| bufs.into_iter().map(unique).collect(), |buf| Some(vec![buf]))
}
