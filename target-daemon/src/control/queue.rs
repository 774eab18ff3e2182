//! Between the control thread and the shards: bounded both ways, and never waited for by a shard.
//!
//! A shard's turn costs one relaxed load when nothing was sent to it. A map replaces a map that
//! was not taken yet, so it needs no room; everything else is refused when the queue is full.

use crate::metrics::ShardCounters;
use protocol::control::{Problem, pb};
use protocol::map::ClusterMap;
use protocol::types::{CopysetId, TargetId, VolumeId};
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// List the hosts connected here.
    Connections {
        /// Where to.
        reply: oneshot::Sender<Vec<pb::Connection>>,
    },
    /// Verify blocks at rest in the background.
    Scrub {
        /// Of one volume, or of all.
        volume: Option<VolumeId>,
    },
    /// Finish what is under way and end. The last message.
    Stop,
}

/// What a shard tells the control thread; send by `try_send`. `NeedMap` may be dropped when the
/// queue is full, the others must be tried again at a later turn.
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
        /// The shard's index.
        shard: u16,
        /// The volume.
        volume: VolumeId,
    },
    /// The shard refuses work from now on.
    Failed {
        /// The shard's index.
        shard: u16,
        /// Why, one line.
        why: String,
    },
    /// The map seems stale.
    NeedMap,
}

/// The way from shards to the control thread, to be made before either starts.
pub fn reports() -> (mpsc::Sender<FromShard>, mpsc::Receiver<FromShard>) {
    mpsc::channel(FROM_SHARDS_MAX)
}

/// The control thread's end of one shard.
pub struct ShardPort {
    shared: Arc<Shared>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The shard's end.
#[derive(Clone)]
pub struct ShardSide {
    shared: Arc<Shared>,
}

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

/// The two ends of one shard. `wake` makes a sleeping shard take a turn; any thread may call it.
pub fn shard_port(wake: Box<dyn Fn() + Send + Sync>) -> (ShardPort, ShardSide) {
    let shared = Arc::new(Shared::default());
    (ShardPort { shared: shared.clone(), wake }, ShardSide { shared })
}

impl ShardSide {
    /// The next message. Call once a turn until `None`.
    pub fn poll(&self) -> Option<ToShard> {
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
    /// What this shard counts.
    pub fn counters(&self) -> &Arc<ShardCounters> {
        &self.shared.counters
    }
    /// Replaces what status pages and heartbeats show of this shard; about once a second.
    pub fn post_status(&self, status: pb::ShardStatus) {
        *lock(&self.shared.status) = Some(status);
    }
}

impl ShardPort {
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

impl fmt::Debug for ShardPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardPort").finish_non_exhaustive()
    }
}

impl fmt::Debug for ShardSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardSide").finish_non_exhaustive()
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

    fn port() -> (ShardPort, ShardSide, Arc<AtomicUsize>) {
        let wakes = Arc::new(AtomicUsize::new(0));
        let count = wakes.clone();
        let (port, side) = shard_port(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        (port, side, wakes)
    }

    #[test]
    fn a_slow_shard_gets_only_the_newest_map_and_a_full_queue_refuses() {
        let (port, side, wakes) = port();
        for generation in 1..=3 {
            port.send(ToShard::Map(Arc::new(ClusterMap { generation, ..ClusterMap::default() }))).unwrap();
        }
        for _ in 0..TO_SHARD_MAX {
            port.send(ToShard::Scrub { volume: None }).unwrap();
        }
        assert!(port.send(ToShard::Scrub { volume: None }).is_err());
        port.send(ToShard::Stop).unwrap();
        assert_eq!(wakes.load(Ordering::Relaxed), 3 + TO_SHARD_MAX + 1);
        assert!(matches!(side.poll(), Some(ToShard::Map(map)) if map.generation == 3));
        (0..TO_SHARD_MAX).for_each(|_| assert!(matches!(side.poll(), Some(ToShard::Scrub { .. }))));
        assert!(matches!(side.poll(), Some(ToShard::Stop)), "after all else");
        assert!(side.poll().is_none());
    }
}
