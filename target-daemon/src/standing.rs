//! How a shard stands, as counters and status pages show it.

use crate::control::ShardPort;
use crate::export::ExportCounts;
use crate::shard::{ChunkCheck, CopysetStanding, Counts, Membership, VolumeSlots};
use copyset::{Health, Lag, Role};
use protocol::control::{pb, shard_to_pb};
use protocol::types::{BLOCK_BYTES, CHUNK_BYTES, SessionEpoch, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// What is published once a second.
pub struct Snapshot {
    /// Index of the shard.
    pub shard_index: u16,
    /// Where other shards reach it.
    pub peer: String,
    /// The shard's counters.
    pub shard: Counts,
    /// The store's.
    pub store: chunkstore::Stats,
    /// The export's.
    pub export: ExportCounts,
    /// The reactor's.
    pub reactor: reactor::Stats,
    /// How every copyset stands.
    pub standings: Vec<CopysetStanding>,
    /// Chunk slots in use, by volume.
    pub volumes: BTreeMap<VolumeId, VolumeSlots>,
    /// Hosts connected.
    pub connections: usize,
    /// Those that say who they are, with volume and epoch.
    pub attached: BTreeSet<(VolumeId, SessionEpoch, String)>,
    /// Arena blocks in use and in all.
    pub arena_blocks: (usize, usize),
    /// Chunk slots that the layout allows.
    pub slots_max: u32,
    /// Bytes of a log segment.
    pub segment_bytes: u64,
    /// Whether the disk failed.
    pub failed: bool,
}

/// Publishes counters and standing.
pub fn publish(port: &ShardPort, now: &Snapshot) {
    let counters = port.counters();
    let (shard, store) = (&now.shard, &now.store);
    let block = BLOCK_BYTES as u64;
    counters.io_served.set(shard.reads + shard.writes + shard.zeroes);
    counters.io_refused.set(shard.not_leader + shard.busy + shard.fenced);
    counters.log_batches.set(store.batches);
    counters.log_bytes.set(store.log_bytes);
    counters.log_used_bytes.set(store.segments_used * now.segment_bytes);
    counters.flushed_blocks.set(store.flushed_blocks);
    counters.checkpoints.set(store.checkpoints);
    counters.overlay_blocks.set(store.overlay_blocks);
    counters.blocks_damaged.set(store.corrupt_blocks);
    counters.blocks_repaired.set(store.repaired_blocks);
    counters.log_damaged.set(store.log_damages);
    counters.checksums_held.set(store.tables_cached);
    counters.checksums_loaded.set(store.table_loads);
    counters.slots_free.set(store.free_slots);
    counters.slots_used.set(store.used_slots);
    counters.disk_failed.set(now.failed.into());
    counters.copysets.set(now.standings.len() as u64);
    counters.leaders.set(count(&now.standings, |s| s.role == Role::Leader));
    counters.leaderless.set(count(&now.standings, |s| s.leader.is_none()));
    counters.elections_won.set(shard.elections_won);
    counters.catch_up_blocks.set(shard.catch_up_blocks);
    counters.wire_damaged.set(shard.wire_corrupt + now.export.wire_corrupt);
    counters.raft_violations.set(shard.violations);
    counters.connections.set(now.connections as u64);
    counters.connections_accepted.set(now.export.connections);
    counters.refused_malformed.set(now.export.violations);
    counters.arena_bytes.set(now.arena_blocks.1 as u64 * block);
    counters.arena_used_bytes.set(now.arena_blocks.0 as u64 * block);
    counters.turns.set(now.reactor.turns);
    counters.sleeps.set(now.reactor.sleeps);
    port.post_status(status(now));
}

fn status(now: &Snapshot) -> pb::ShardStatus {
    let (store, slot) = (&now.store, CHUNK_BYTES as u64);
    let block = BLOCK_BYTES as u64;
    pb::ShardStatus {
        index: now.shard_index.into(),
        peer: now.peer.clone(),
        replicas: now.standings.iter().map(|s| replica(s, now.shard_index)).collect(),
        usage: Some(pb::Usage {
            capacity_bytes: u64::from(now.slots_max) * slot,
            used_bytes: store.used_slots * slot,
            formatted_bytes: (store.used_slots + store.free_slots) * slot,
        }),
        log_bytes: store.segments_ready * now.segment_bytes,
        log_used_bytes: store.segments_used * now.segment_bytes,
        arena_bytes: now.arena_blocks.1 as u64 * block,
        arena_used_bytes: now.arena_blocks.0 as u64 * block,
        blocks_damaged: store.corrupt_blocks,
        blocks_repaired: store.repaired_blocks,
        failed: now.failed,
        failure: String::new(),
        volumes: now.volumes.iter().map(|(volume, slots)| volume_slots(*volume, *slots)).collect(),
        attached: now.attached.iter().map(attached).collect(),
    }
}

fn attached((volume, epoch, holder): &(VolumeId, SessionEpoch, String)) -> pb::Attached {
    pb::Attached { volume: volume.0, holder: holder.clone(), epoch: epoch.0 }
}

fn volume_slots(volume: VolumeId, slots: VolumeSlots) -> pb::VolumeSlots {
    pb::VolumeSlots { volume: volume.0, held: slots.held, led: slots.led }
}

fn count(standings: &[CopysetStanding], which: impl Fn(&CopysetStanding) -> bool) -> u64 {
    standings.iter().filter(|s| which(s)).count() as u64
}

fn replica(standing: &CopysetStanding, shard: u16) -> pb::ReplicaStatus {
    pb::ReplicaStatus {
        shard: shard.into(),
        copyset: standing.id.0,
        term: standing.term,
        role: match standing.role {
            Role::Leader => pb::ReplicaRole::Leader,
            Role::Follower => pb::ReplicaRole::Follower,
            Role::Candidate | Role::PreCandidate => pb::ReplicaRole::Candidate,
        }
        .into(),
        leader: standing.leader.map_or(0, |l| l.target.0),
        commit_index: standing.commit.0,
        applied_index: standing.applied.0,
        health: health(standing.health).into(),
        membership: standing.membership.as_ref().map(membership),
    }
}

fn membership(told: &Membership) -> pb::Membership {
    let lag = |lag: &Lag| pb::PeerLag {
        target: lag.peer.target.0,
        entries: lag.entries,
        installing: lag.installing,
        alive: lag.alive,
    };
    pb::Membership {
        voters: told.members.voters().map(shard_to_pb).collect(),
        learners: told.members.learners().map(shard_to_pb).collect(),
        settled: told.settled,
        lags: told.lags.iter().map(lag).collect(),
        busy: told.busy,
    }
}

fn health(health: Health) -> pb::ReplicaHealth {
    match health {
        Health::Whole => pb::ReplicaHealth::Whole,
        Health::Installing => pb::ReplicaHealth::Installing,
        Health::Damaged => pb::ReplicaHealth::Damaged,
    }
}

/// One chunk's part of a check, for the control side.
pub fn record(check: &ChunkCheck) -> pb::ChunkChecksum {
    pb::ChunkChecksum {
        chunk: check.chunk.index,
        copyset: check.copyset.0,
        applied_index: check.applied.0,
        digest: check.digest,
        present_blocks: check.present,
        health: health(check.health).into(),
        damaged_blocks: check.bad,
        // Filled in by the port.
        shard: 0,
    }
}
