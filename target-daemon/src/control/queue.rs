//! Between the control thread and the shards: bounded both ways, and never waited for by a shard.
//!
//! A shard's turn costs one relaxed load when nothing was sent to it. A map replaces a map that
//! was not taken yet, so it needs no room; everything else is refused when the queue is full.

use crate::metrics::ShardCounters;
use crate::shard::Order;
use crate::spread::Spread;
use crate::subsystems::{Seat, Subsystems, Wake};
use protocol::control::{Problem, pb};
use protocol::map::ClusterMap;
use protocol::types::{CopysetId, SessionEpoch, TargetId, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

/// Most messages that wait for a shard.
pub const TO_SHARD_MAX: usize = 256;
/// Most reports that wait for the control thread.
pub const FROM_SHARDS_MAX: usize = 4096;

/// What the control thread tells a shard.
#[derive(Debug)]
pub enum ToShard {
    /// A newer map is in force.
    Map(Arc<ClusterMap>),
    /// Send a record for each chunk of the volume held here, then drop the sender. When it is full
    /// go on at a later turn; when it is closed, give up.
    Checksums {
        /// The volume.
        volume: VolumeId,
        /// Read and verify the blocks at rest too.
        verify: bool,
        /// Where to.
        reply: mpsc::Sender<Result<pb::ChunkChecksum, Problem>>,
    },
    /// Hand over leadership.
    TransferLeader {
        /// Of which copyset.
        copyset: CopysetId,
        /// To the replica on this target.
        to: TargetId,
        /// Whether it was begun.
        reply: oneshot::Sender<Result<(), Problem>>,
    },
    /// The MDS refused a segment: `VolumeIo::segment_refused`.
    SegmentRefused {
        /// The volume.
        volume: VolumeId,
        /// Which gigabyte.
        segment: u32,
    },
    /// The MDS granted a segment that it refused before: `VolumeIo::segment_granted`.
    SegmentGranted {
        /// The volume.
        volume: VolumeId,
        /// Which gigabyte.
        segment: u32,
    },
    /// Raise the volume's fence in each of its copysets.
    Fence {
        /// The volume.
        volume: VolumeId,
        /// To this.
        epoch: SessionEpoch,
        /// Whether it is committed everywhere.
        reply: oneshot::Sender<Result<(), Problem>>,
    },
    /// List the hosts connected here.
    Connections {
        /// Where to.
        reply: oneshot::Sender<Vec<pb::Connection>>,
    },
    /// What the MDS wants done with replicas, of any shard of this target.
    Orders(Arc<[Order]>),
    /// Verify blocks at rest in the background.
    Scrub {
        /// Of one volume, or of all.
        volume: Option<VolumeId>,
    },
    /// Finish what is under way and end. The last message.
    Stop,
}

/// What a shard tells the control thread, by [`ShardPort::tell`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromShard {
    /// The first write of a segment since the start: to be accounted for by the MDS.
    FirstWrite {
        /// The volume.
        volume: VolumeId,
        /// Which gigabyte.
        segment: u32,
    },
    /// No chunk of a deleted volume is left on this shard, and none will come.
    Freed {
        /// The volume.
        volume: VolumeId,
    },
    /// The shard refuses work from now on.
    Failed {
        /// Why, one line.
        why: String,
    },
    /// The map seems stale.
    NeedMap,
}

/// The control thread's end of one shard.
pub struct ShardHandle {
    shared: Arc<Shared>,
    wake: Wake,
}

/// The shard's end. Nothing here waits.
pub struct ShardPort {
    shard: u16,
    seat: Seat,
    spread: Spread,
    shared: Arc<Shared>,
    reports: mpsc::Sender<Report>,
    /// Reports that found the queue full.
    backlog: VecDeque<FromShard>,
    /// Checks of volumes under way, by job.
    checks: BTreeMap<u64, Check>,
    /// Fences that rise, by job.
    fences: BTreeMap<u64, oneshot::Sender<Result<(), Problem>>>,
    next_job: u64,
}

/// A report and the index of the shard it is from.
pub(super) type Report = (u16, FromShard);

struct Check {
    reply: mpsc::Sender<Result<pb::ChunkChecksum, Problem>>,
    backlog: VecDeque<pb::ChunkChecksum>,
    complete: bool,
}

/// Most reports, and most records of a check, that a shard keeps while their reader is slow: the
/// segments, and the chunks, of the largest volume.
const BACKLOG_MAX: usize = 1 << 20;

#[derive(Default)]
struct Shared {
    waiting: AtomicBool,
    queue: Mutex<Queue>,
    counters: Arc<ShardCounters>,
    status: Mutex<Option<pb::ShardStatus>>,
}

#[derive(Default)]
struct Queue {
    map: Option<Arc<ClusterMap>>,
    messages: VecDeque<ToShard>,
    stop: bool,
}

/// The ends of a target's shards, and what they report to. Each `wake` makes its shard take a
/// turn if it sleeps; any thread may call it.
pub fn shard_ports(wakes: Vec<Box<dyn Fn() + Send + Sync>>) -> (ControlEnds, Vec<ShardPort>) {
    let (reports, incoming) = mpsc::channel(FROM_SHARDS_MAX);
    let wakes: Vec<Wake> = wakes.into_iter().map(Wake::from).collect();
    let subsystems = Subsystems::new(wakes.clone());
    let mut spreads = Spread::over(wakes.len());
    let make = |(shard, wake): (usize, Wake)| {
        let shared = Arc::new(Shared::default());
        let (backlog, checks, fences) = (VecDeque::new(), BTreeMap::new(), BTreeMap::new());
        let shard = u16::try_from(shard).expect("the configuration has at most 65,535 shards");
        let handle = ShardHandle { shared: shared.clone(), wake };
        let (seat, spread) = (subsystems.seat(shard), spreads.next().expect("one for each"));
        let (reports, next_job) = (reports.clone(), 0);
        (handle, ShardPort { shard, seat, spread, shared, reports, backlog, checks, fences, next_job })
    };
    let (shards, ports) = wakes.into_iter().enumerate().map(make).unzip();
    (ControlEnds { shards, reports: incoming, subsystems }, ports)
}

/// The control thread's ends of all shards.
#[derive(Debug)]
pub struct ControlEnds {
    pub(super) shards: Vec<ShardHandle>,
    pub(super) reports: mpsc::Receiver<Report>,
    pub(super) subsystems: Arc<Subsystems>,
}

impl ControlEnds {
    /// The end of each shard, in order.
    pub fn shards(&self) -> &[ShardHandle] {
        &self.shards
    }
    /// The next report that has come, and the index of the shard it is from; never waits.
    pub fn try_report(&mut self) -> Option<(u16, FromShard)> {
        self.reports.try_recv().ok()
    }
}

impl ShardPort {
    /// The next message. Call once a turn until `None`; this also sends what found no room before.
    pub fn take(&mut self) -> Option<ToShard> {
        if !self.backlog.is_empty() || !self.checks.is_empty() {
            self.retry();
        }
        if !self.shared.waiting.load(Ordering::Acquire) {
            return None;
        }
        let mut queue = lock(&self.shared.queue);
        if let Some(map) = queue.map.take() {
            return Some(ToShard::Map(map));
        }
        let next = queue.messages.pop_front();
        if next.is_none() {
            self.shared.waiting.store(false, Ordering::Release);
            return std::mem::take(&mut queue.stop).then_some(ToShard::Stop);
        }
        next
    }
    /// Whether something waits for room in a reader's queue: take a turn within some 10 ms.
    pub fn is_behind(&self) -> bool {
        !self.backlog.is_empty() || self.checks.values().any(|check| !check.backlog.is_empty())
    }
    /// Reports to the control thread.
    pub fn tell(&mut self, report: FromShard) {
        let droppable = report == FromShard::NeedMap;
        self.backlog.push_back(report);
        self.retry_reports();
        let over = self.backlog.len() > BACKLOG_MAX;
        if over || (droppable && self.backlog.back() == Some(&FromShard::NeedMap)) {
            self.backlog.pop_back();
            self.shared.counters.control_dropped.add(1);
        }
    }
    /// Takes over the answering of [`ToShard::Checksums`]; the number names it from now on.
    pub fn open_check(&mut self, reply: mpsc::Sender<Result<pb::ChunkChecksum, Problem>>) -> u64 {
        self.next_job += 1;
        self.checks.insert(self.next_job, Check { reply, backlog: VecDeque::new(), complete: false });
        self.next_job
    }
    /// One record of a check, or its end. False when nobody wants more.
    pub fn checked(&mut self, job: u64, record: Option<pb::ChunkChecksum>) -> bool {
        let shard = self.shard;
        let Some(check) = self.checks.get_mut(&job) else { return false };
        match record {
            Some(record) => check.backlog.push_back(pb::ChunkChecksum { shard: shard.into(), ..record }),
            None => check.complete = true,
        }
        self.retry_checks();
        self.checks.contains_key(&job)
    }
    /// Takes over the answering of [`ToShard::Fence`]; the number names it from now on.
    pub fn open_fence(&mut self, reply: oneshot::Sender<Result<(), Problem>>) -> u64 {
        self.next_job += 1;
        self.fences.insert(self.next_job, reply);
        self.next_job
    }
    /// A fence has risen in every copyset, or cannot.
    pub fn fenced(&mut self, job: u64, result: Result<(), Problem>) {
        if let Some(reply) = self.fences.remove(&job) {
            // Whoever asked may have given up.
            let _ = reply.send(result);
        }
    }
    /// What this shard counts.
    pub fn counters(&self) -> &Arc<ShardCounters> {
        &self.shared.counters
    }
    /// The shard's place among those that share the NVMe subsystems.
    pub(crate) fn seat(&self) -> &Seat {
        &self.seat
    }
    /// Where hosts' connections are served.
    pub(crate) fn spread(&self) -> &Spread {
        &self.spread
    }
    /// Replaces what status pages and heartbeats show of this shard; about once a second.
    pub fn post_status(&self, status: pb::ShardStatus) {
        *lock(&self.shared.status) = Some(status);
    }

    fn retry(&mut self) {
        self.retry_reports();
        self.retry_checks();
    }

    fn retry_reports(&mut self) {
        while let Some(report) = self.backlog.pop_front() {
            match self.reports.try_send((self.shard, report)) {
                Ok(()) => {}
                Err(TrySendError::Full((_, report))) => return self.backlog.push_front(report),
                // The control thread is gone: the process is stopping.
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
    }

    fn retry_checks(&mut self) {
        self.checks.retain(|_, check| {
            while let Some(record) = check.backlog.pop_front() {
                match check.reply.try_send(Ok(record)) {
                    Ok(()) => {}
                    Err(TrySendError::Full(Ok(record))) => {
                        check.backlog.push_front(record);
                        return check.backlog.len() <= BACKLOG_MAX;
                    }
                    Err(_) => return false,
                }
            }
            !check.complete && !check.reply.is_closed()
        });
    }
}

impl ShardHandle {
    /// Sends a message; gives it back when the queue is full.
    pub fn send(&self, message: ToShard) -> Result<(), ToShard> {
        let mut queue = lock(&self.shared.queue);
        match message {
            ToShard::Map(map) => queue.map = Some(map),
            ToShard::Stop => queue.stop = true,
            other if queue.messages.len() >= TO_SHARD_MAX => return Err(other),
            other => queue.messages.push_back(other),
        }
        self.shared.waiting.store(true, Ordering::Release);
        drop(queue);
        (self.wake)();
        Ok(())
    }
    /// What the shard counts.
    pub fn counters(&self) -> &Arc<ShardCounters> {
        &self.shared.counters
    }
    /// What the shard posted last.
    pub fn status(&self) -> Option<pb::ShardStatus> {
        lock(&self.shared.status).clone()
    }
}

impl fmt::Debug for ShardHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardHandle").finish_non_exhaustive()
    }
}

impl fmt::Debug for ShardPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardPort").finish_non_exhaustive()
    }
}

/// Values here are replaced whole, so one left by a thread that panicked is as good as any.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn port() -> (ShardHandle, ShardPort, Arc<AtomicUsize>, mpsc::Receiver<Report>) {
        let wakes = Arc::new(AtomicUsize::new(0));
        let count = wakes.clone();
        let wake = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let (mut ends, mut ports) = shard_ports(vec![Box::new(wake)]);
        (ends.shards.pop().unwrap(), ports.pop().unwrap(), wakes, ends.reports)
    }

    #[test]
    fn a_report_that_finds_no_room_is_told_later_and_in_order() {
        let (_handle, mut port, _, mut reports) = port();
        let report = |n| FromShard::FirstWrite { volume: VolumeId(1), segment: n };
        let count = FROM_SHARDS_MAX as u32 + 10;
        (0..count).for_each(|n| port.tell(report(n)));
        port.tell(FromShard::NeedMap);
        assert!(port.is_behind());
        for n in 0..count {
            assert_eq!(reports.try_recv(), Ok((0, report(n))));
            assert!(port.take().is_none());
        }
        assert!(reports.try_recv().is_err() && !port.is_behind());
    }

    #[test]
    fn a_slow_reader_of_checksums_gets_each_record_and_a_lost_one_ends_the_check() {
        let (_handle, mut port, ..) = port();
        let (reply, mut records) = mpsc::channel(1);
        let job = port.open_check(reply);
        for chunk in 0..5 {
            assert!(port.checked(job, Some(pb::ChunkChecksum { chunk, ..Default::default() })));
        }
        port.checked(job, None);
        for chunk in 0..5 {
            assert_eq!(records.try_recv().unwrap().unwrap().chunk, chunk);
            port.take();
        }
        assert_eq!(records.try_recv().unwrap_err(), mpsc::error::TryRecvError::Disconnected);
        let (reply, records) = mpsc::channel(1);
        let job = port.open_check(reply);
        drop(records);
        assert!(!port.checked(job, Some(pb::ChunkChecksum::default())));
    }

    #[test]
    fn a_slow_shard_gets_only_the_newest_map_and_a_full_queue_refuses() {
        let (port, mut side, wakes, _reports) = port();
        for generation in 1..=3 {
            port.send(ToShard::Map(Arc::new(ClusterMap { generation, ..ClusterMap::default() }))).unwrap();
        }
        for _ in 0..TO_SHARD_MAX {
            port.send(ToShard::Scrub { volume: None }).unwrap();
        }
        assert!(port.send(ToShard::Scrub { volume: None }).is_err());
        port.send(ToShard::Stop).unwrap();
        assert_eq!(wakes.load(Ordering::Relaxed), 3 + TO_SHARD_MAX + 1);
        assert!(matches!(side.take(), Some(ToShard::Map(map)) if map.generation == 3));
        (0..TO_SHARD_MAX).for_each(|_| assert!(matches!(side.take(), Some(ToShard::Scrub { .. }))));
        assert!(matches!(side.take(), Some(ToShard::Stop)), "after all else");
        assert!(side.take().is_none());
    }
}
