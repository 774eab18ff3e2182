//! After the last fault: whether all replicas are whole, agree on how far they are, and hold the
//! same bytes.

use super::fleet::Fleet;
use super::{Failure, Sim};
use copyset::Health;
use protocol::control::{Problem, pb};
use protocol::types::{CopysetId, LogIndex, Span, VolumeId};
use std::collections::BTreeMap;
use target_daemon::control::ToShard;
use tokio::sync::mpsc;

/// How long reading every block of every replica may take.
const CHECK_WITHIN: Span = Span::ms(60_000);

/// Whether every replica is whole and has applied as much as its peers.
pub fn is_settled(fleet: &Fleet) -> bool {
    let mut applied: BTreeMap<CopysetId, (usize, LogIndex)> = BTreeMap::new();
    for node in 0..fleet.nodes() {
        for standing in fleet.standings(node) {
            let (count, index) = applied.entry(standing.id).or_insert((0, standing.applied));
            let alike = *index == standing.applied && standing.applied == standing.commit;
            if standing.health != Health::Whole || !alike {
                return false;
            }
            *count += 1;
        }
    }
    applied.len() == fleet.map().copysets.len() && applied.values().all(|(count, _)| *count == 3)
}

/// Reads every chunk of every replica, checksums verified, and compares.
pub fn compare_replicas(sim: &mut Sim) -> Result<(), Failure> {
    // Twice: what the first pass finds bad, it repairs.
    let mut last = check(sim)?;
    if last.values().flatten().any(|record| record.damaged_blocks > 0) {
        sim.settle("repairs did not end", |sim| is_settled(&sim.fleet))?;
        let until = sim.world.now() + Span::ms(5_000);
        sim.turn_until(until)?;
        last = check(sim)?;
    }
    for ((volume, chunk), records) in &last {
        let content = |r: &pb::ChunkChecksum| (r.digest, r.present_blocks);
        let holding: Vec<_> = records.iter().filter(|r| r.present_blocks > 0).collect();
        let Some(first) = holding.first() else { continue };
        let equal = holding.len() == 3 && holding.iter().all(|r| content(r) == content(first));
        if !equal || records.iter().any(|r| r.damaged_blocks > 0) {
            return Err(Failure(format!(
                "equal replicas: chunk {chunk} of volume {volume} differ:\n{records:#?}\n{}",
                sim.fleet.describe()
            )));
        }
    }
    Ok(())
}

/// Whether a chunk is left of a volume that nobody knows any more: its slot is lost for good.
pub fn find_leaks(fleet: &Fleet) -> Result<(), Failure> {
    for node in 0..fleet.nodes() {
        let Some(core) = fleet.core(node) else { continue };
        for (id, _) in core.replicas() {
            let left = |chunk: &protocol::types::ChunkId| !fleet.map().volumes.contains_key(&chunk.volume);
            if let Some(chunk) = core.chunks_of(id).into_iter().find(left) {
                return Err(Failure(format!(
                    "leak: node {node} holds {chunk:?} in copyset {id}, of a volume that was freed everywhere"
                )));
            }
        }
    }
    Ok(())
}

type Records = BTreeMap<(u32, u32), Vec<pb::ChunkChecksum>>;

fn check(sim: &mut Sim) -> Result<Records, Failure> {
    let mut records = Records::new();
    let volumes: Vec<VolumeId> = sim.fleet.map().volumes.keys().copied().collect();
    for volume in volumes {
        for node in 0..sim.fleet.nodes() {
            for record in check_shard(sim, node, volume)? {
                records.entry((volume.0, record.chunk)).or_default().push(record);
            }
        }
    }
    Ok(records)
}

fn check_shard(sim: &mut Sim, node: usize, volume: VolumeId) -> Result<Vec<pb::ChunkChecksum>, Failure> {
    let (reply, mut told) = mpsc::channel::<Result<pb::ChunkChecksum, Problem>>(1024);
    sim.fleet.tell(node, ToShard::Checksums { volume, verify: true, reply });
    let (mut records, limit) = (Vec::new(), sim.world.now() + CHECK_WITHIN);
    loop {
        match told.try_recv() {
            Ok(Ok(record)) => records.push(record),
            Ok(Err(problem)) => return Err(Failure(format!("check: shard {node} cannot check: {problem}"))),
            Err(mpsc::error::TryRecvError::Disconnected) => return Ok(records),
            Err(mpsc::error::TryRecvError::Empty) => {
                if sim.world.now() >= limit {
                    return Err(Failure(format!("liveness: the check of shard {node} did not end")));
                }
                let until = sim.world.now() + Span::ms(10);
                sim.turn_until(until)?;
            }
        }
    }
}
