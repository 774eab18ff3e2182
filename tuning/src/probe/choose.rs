//! From figures to limits: where more in flight gains no more.

use super::measure::Run;
use crate::device::{BATCH_BLOCKS, BATCHES_IN_FLIGHT, FLUSH_IN_FLIGHT, Limits, QUEUE_DEPTH};
use crate::model::Profile;
use protocol::types::BLOCK_BYTES;
use serde::Serialize;

/// A disk counts as fully used from this part of its best rate on.
const ENOUGH: f64 = 0.9;
/// What a latency profile asks of idle processors, in microseconds: C1, not deeper.
const CPU_LATENCY_US: u32 = 2;

/// One measurement of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// IOs in flight.
    pub depth: u32,
    /// What came of it.
    pub run: Run,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Random reads of 4 KiB.
    pub reads: Vec<Point>,
    /// Reads of 128 KiB in order.
    pub stream_read: Vec<Point>,
    /// Random writes of 4 KiB.
    pub writes: Vec<Point>,
    /// The same, durable.
    pub dsyncs: Vec<Point>,
    /// Durable writes in order, of the sizes that a log batch may have.
    pub logs: Vec<Point>,
    /// Writes of 128 KiB in order.
    pub stream_write: Vec<Point>,
}

/// The least depth at which nearly the best rate is reached.
fn knee(points: &[Point]) -> Option<u32> {
    let best = points.iter().map(|point| point.run.iops).reduce(f64::max)?;
    points.iter().find(|point| point.run.iops >= best * ENOUGH).map(|point| point.depth)
}

/// Log batches in flight at which a disk is nearly as fast as it gets.
pub fn batches(dsyncs: &[Point]) -> u32 {
    knee(dsyncs).unwrap_or(4).clamp(*BATCHES_IN_FLIGHT.start() as u32, *BATCHES_IN_FLIGHT.end() as u32)
}

/// The smallest log batch, in blocks, that nearly fills the disk.
fn batch_blocks(logs: &[Point]) -> u32 {
    let best = logs.iter().map(|point| point.run.bytes_s).fold(0.0, f64::max);
    let enough = logs.iter().find(|point| point.run.bytes_s >= best * ENOUGH);
    let blocks = enough.map(|point| point.run.load.bytes / BLOCK_BYTES as u64);
    blocks.map_or(*BATCH_BLOCKS.end(), |n| (n as u32).clamp(*BATCH_BLOCKS.start(), *BATCH_BLOCKS.end()))
}

/// What a target should take.
pub fn limits(figures: &Figures, profile: Profile) -> Limits {
    let (reads, writes) = (knee(&figures.reads).unwrap_or(32), knee(&figures.writes).unwrap_or(16));
    let depth = reads.max(writes).clamp(*QUEUE_DEPTH.start(), *QUEUE_DEPTH.end());
    // The flusher may fill half of the disk's queue: the other half is for who waits.
    let flush = writes.min(depth / 2).max(1) as usize;
    Limits {
        queue_depth: depth,
        batches_in_flight_max: batches(&figures.dsyncs) as usize,
        batch_blocks_max: batch_blocks(&figures.logs),
        flush_in_flight_max: flush.clamp(*FLUSH_IN_FLIGHT.start(), *FLUSH_IN_FLIGHT.end()),
        cpu_latency_us_max: (profile == Profile::Latency).then_some(CPU_LATENCY_US),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::measure::Load;

    fn points(rates: &[(u32, f64)]) -> Vec<Point> {
        let run = |iops| Run { iops, ..Run::default() };
        rates.iter().map(|(depth, iops)| Point { depth: *depth, run: run(*iops) }).collect()
    }

    fn found(reads: &[(u32, f64)], writes: &[(u32, f64)], dsyncs: &[(u32, f64)]) -> (u32, usize, usize) {
        let figures = Figures {
            reads: points(reads),
            writes: points(writes),
            dsyncs: points(dsyncs),
            ..Figures::default()
        };
        let limits = limits(&figures, Profile::Throughput);
        (limits.queue_depth, limits.batches_in_flight_max, limits.flush_in_flight_max)
    }

    #[test]
    fn a_disk_that_takes_one_at_a_time_gets_no_queue() {
        assert_eq!(
            found(&[(1, 100.0), (2, 101.0)], &[(1, 90.0), (2, 91.0)], &[(1, 80.0), (2, 79.0)]),
            (1, 1, 1)
        );
    }

    #[test]
    fn a_parallel_disk_gets_the_depth_of_its_knee() {
        let reads = [(1, 10.0), (32, 300.0), (64, 580.0), (128, 600.0)];
        let writes = [(1, 40.0), (16, 290.0), (64, 300.0)];
        assert_eq!(found(&reads, &writes, &[(1, 10.0), (4, 38.0), (7, 60.0)]), (64, 7, 16));
    }

    #[test]
    fn a_device_that_was_only_read_gets_safe_limits_for_writing() {
        assert_eq!(found(&[(1, 10.0), (8, 100.0)], &[], &[]), (16, 4, 8));
    }

    #[test]
    fn a_batch_is_as_small_as_still_fills_the_disk() {
        let logs = |rates: &[(u64, f64)]| {
            let point = |(kib, bytes_s): &(u64, f64)| {
                let load = Load { bytes: kib << 10, depth: 4, ..Load::LOG };
                Point { depth: 4, run: Run { load, bytes_s: *bytes_s, ..Run::default() } }
            };
            rates.iter().map(point).collect::<Vec<_>>()
        };
        assert_eq!(batch_blocks(&logs(&[(128, 500.0), (256, 910.0), (512, 990.0), (1024, 1000.0)])), 64);
        assert_eq!(batch_blocks(&logs(&[(128, 1000.0), (1024, 700.0)])), 32);
        assert_eq!(batch_blocks(&[]), 256);
    }

    #[test]
    fn only_a_latency_profile_keeps_processors_awake() {
        assert_eq!(limits(&Figures::default(), Profile::Latency).cpu_latency_us_max, Some(2));
        assert_eq!(limits(&Figures::default(), Profile::Dev).cpu_latency_us_max, None);
    }
}
