//! `ashlar disk`: what lies on a target's disk, read without the target.
//!
//! Read-only. The target must be stopped: under a running one the disk changes while it is
//! read, and what is seen then is no damage though it may look like it.

use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome};
use crate::size::Size;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::path::PathBuf;
use target_daemon::identity::{Identity, to_hex};

/// Commands on a disk.
#[derive(Subcommand)]
pub enum DiskCommand {
    /// Print superblock, checkpoint, log and slot table of a stopped target, and verify all
    /// checksums; exit code 3 on damage.
    Inspect(InspectArgs),
}

/// What `disk inspect` takes.
#[derive(Args)]
pub struct InspectArgs {
    /// The target's folder (`dir` of its target.toml).
    dir: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct ShardShown {
    /// `None` until the target has joined one.
    cluster: Option<String>,
    disk: String,
    target: u32,
    shard: u16,
    superblock: SuperblockShown,
    checkpoint: CheckpointShown,
    log: LogShown,
    slots: Vec<SlotShown>,
    blocks_good: u64,
    blocks_in_replay: u64,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct SuperblockShown {
    segment_bytes: u32,
    log_segments: u32,
    slots_per_file: u32,
    slots_max: u32,
}

#[derive(Serialize)]
struct CheckpointShown {
    seq: u64,
    durable_lsn: u64,
    replay_segment: u32,
    replay_lsn: u64,
    segments_ready: u32,
    slots_ready: u32,
    copysets: Vec<CopysetShown>,
}

#[derive(Serialize)]
struct CopysetShown {
    id: u32,
    term: u64,
    floor: u64,
    health: String,
}

#[derive(Serialize)]
struct LogShown {
    first_lsn: u64,
    last_lsn: u64,
    batches: u64,
    records: u64,
    payload_blocks: u64,
    torn_batches: u64,
    segments: Vec<SegmentShown>,
}

#[derive(Serialize)]
struct SegmentShown {
    segment: u32,
    epoch: u64,
    first_lsn: u64,
}

#[derive(Serialize)]
struct SlotShown {
    slot: u32,
    copyset: u32,
    volume: u32,
    chunk: u32,
    generation: u64,
    blocks: u32,
    bad_blocks: Vec<u16>,
}

/// Runs one of the commands.
pub fn run(command: DiskCommand) -> Outcome {
    let DiskCommand::Inspect(args) = command;
    let shards = read(&args.dir)?;
    args.output.print(&shards, |shards| shards.iter().map(text).collect::<Vec<_>>().join("\n"))?;
    Ok(if shards.iter().all(|shard| shard.problems.is_empty()) { Exit::Ok } else { Exit::CheckFailed })
}

fn read(dir: &std::path::Path) -> Result<Vec<ShardShown>, crate::problem::Problem> {
    let inspected = target_daemon::inspect(dir)?;
    // A superblock is written before its target joins a cluster; the identity's file knows it.
    let (identity, unreadable) = match Identity::load(dir) {
        Ok(identity) => (identity, None),
        Err(problem) => (None, Some(problem.to_string())),
    };
    let cluster = identity.and_then(|identity| identity.cluster).map(|id| to_hex(&id));
    let reports = inspected.into_iter().map(|report| {
        let from = report.checkpoint;
        ShardShown {
            cluster: cluster.clone(),
            disk: to_hex(&report.identity.disk),
            target: report.identity.target,
            shard: report.identity.shard,
            superblock: SuperblockShown {
                segment_bytes: report.layout.segment_bytes,
                log_segments: report.layout.log_segments,
                slots_per_file: report.layout.slots_per_file,
                slots_max: report.layout.slots_max,
            },
            checkpoint: CheckpointShown {
                seq: from.seq,
                durable_lsn: from.durable_lsn,
                replay_segment: from.replay.0,
                replay_lsn: from.replay.1,
                segments_ready: from.ready.0,
                slots_ready: from.ready.1,
                copysets: from
                    .copysets
                    .iter()
                    .map(|(id, term, floor, health)| CopysetShown {
                        id: id.0,
                        term: *term,
                        floor: *floor,
                        health: format!("{health:?}").to_lowercase(),
                    })
                    .collect(),
            },
            log: LogShown {
                first_lsn: report.log.lsns.0,
                last_lsn: report.log.lsns.1,
                batches: report.log.counts.0,
                records: report.log.counts.1,
                payload_blocks: report.log.counts.2,
                torn_batches: report.log.torn_batches,
                segments: report
                    .log
                    .segments
                    .iter()
                    .map(|(segment, epoch, first_lsn)| SegmentShown {
                        segment: *segment,
                        epoch: *epoch,
                        first_lsn: *first_lsn,
                    })
                    .collect(),
            },
            slots: report
                .slots
                .iter()
                .map(|slot| SlotShown {
                    slot: slot.slot,
                    copyset: slot.copyset.0,
                    volume: slot.chunk.volume.0,
                    chunk: slot.chunk.index,
                    generation: slot.generation,
                    blocks: slot.blocks,
                    bad_blocks: slot.bad.clone(),
                })
                .collect(),
            blocks_good: report.blocks_good,
            blocks_in_replay: report.blocks_in_replay,
            problems: unreadable.iter().cloned().chain(report.problems).collect(),
        }
    });
    Ok(reports.collect())
}

fn text(shard: &ShardShown) -> String {
    [superblock(shard), checkpoint(&shard.checkpoint), log(&shard.log), slots(shard), verdict(shard)].concat()
}

fn superblock(shard: &ShardShown) -> String {
    let ShardShown { target, shard: index, cluster, disk, superblock: s, .. } = shard;
    format!(
        "target {target} shard {index}: cluster {}, disk {disk}\n\
         superblock  {} log segments of {}, {} slots a file, at most {} slots\n",
        cluster.as_deref().unwrap_or("none yet"),
        s.log_segments,
        Size(s.segment_bytes.into()),
        s.slots_per_file,
        s.slots_max,
    )
}

fn checkpoint(from: &CheckpointShown) -> String {
    let head = format!(
        "checkpoint  number {}, log durable to LSN {}, replay from segment {} LSN {}; {} segments and {} slots ready\n",
        from.seq,
        from.durable_lsn,
        from.replay_segment,
        from.replay_lsn,
        from.segments_ready,
        from.slots_ready
    );
    let copysets = from.copysets.iter().map(|copyset| {
        format!("  copyset {} term {} floor {} {}\n", copyset.id, copyset.term, copyset.floor, copyset.health)
    });
    head + &copysets.collect::<String>()
}

fn log(log: &LogShown) -> String {
    let head = format!(
        "log         LSN {} to {}: {} batches, {} records, {} payload blocks; {} torn batches at the end\n",
        log.first_lsn, log.last_lsn, log.batches, log.records, log.payload_blocks, log.torn_batches
    );
    let segments = log.segments.iter().map(|segment| {
        format!("  segment {} epoch {} from LSN {}\n", segment.segment, segment.epoch, segment.first_lsn)
    });
    head + &segments.collect::<String>()
}

fn slots(shard: &ShardShown) -> String {
    let head = format!("slots       {} in use\n", shard.slots.len());
    if shard.slots.is_empty() {
        return head;
    }
    let rows = shard.slots.iter().map(|slot| {
        let numbers = [slot.slot, slot.copyset, slot.volume, slot.chunk].map(|number| number.to_string());
        let rest = [slot.generation.to_string(), slot.blocks.to_string(), slot.bad_blocks.len().to_string()];
        numbers.into_iter().chain(rest).collect()
    });
    head + &table(&["  SLOT", "COPYSET", "VOLUME", "CHUNK", "GENERATION", "BLOCKS", "BAD"], rows)
}

fn verdict(shard: &ShardShown) -> String {
    let counts = format!(
        "checksums   {} blocks verified at rest; {} are newer in the log, which will write them anew\n",
        shard.blocks_good, shard.blocks_in_replay
    );
    if shard.problems.is_empty() {
        return format!("{counts}sound\n");
    }
    let problems: String = shard.problems.iter().map(|problem| format!("  {problem}\n")).collect();
    format!("{counts}DAMAGED; `ashlar target run` repairs it from the other replicas:\n{problems}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_target_is_one_clear_message() {
        let dir = tempfile::tempdir().expect("a folder");
        let problem = read(dir.path()).err().expect("nothing there").to_string();
        assert!(problem.contains("no target in"), "{problem}");
    }

    #[test]
    fn a_new_disk_is_sound_and_a_damaged_one_says_so() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path();
        let text = format!(
            "id = 4\ndir = {:?}\nmds = [\"127.0.0.1:1\"]\ncapacity_bytes = 1073741824\n\
             [log]\nsegment_bytes = 16777216\nsegments = 6\n\
             [listen]\npeer = [\"127.0.0.1:2\"]\nadmin = \"127.0.0.1:3\"\nmetrics = \"127.0.0.1:4\"\n",
            path.display().to_string()
        );
        let config = target_daemon::config::TargetConfig::parse(&text, "t").expect("valid");
        target_daemon::format(&config).expect("formatted");
        let mut shards = read(path).expect("read");
        assert_eq!((shards.len(), shards[0].target, shards[0].problems.len()), (1, 4, 0));
        assert!(super::text(&shards[0]).ends_with("sound\n"));
        shards[0].problems.push("slot 3 block 9: checksum".into());
        assert!(super::text(&shards[0]).contains("DAMAGED"));
    }
}
