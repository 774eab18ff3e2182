//! `ashlar volume check`: asks every target for the checksums of every chunk of a volume
//! and compares the replicas, asking again while any of them lags.

use super::compare::{Digest, Finding, Report, Survey, findings};
use super::stat;
use crate::cluster::ClusterArgs;
use crate::output::OutputArgs;
use crate::problem::{Exit, Outcome, Problem};
use clap::Args;
use client::control::{AdminClient, MdsClient, Patience};
use protocol::control::pb;
use protocol::types::VolumeId;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two rounds of asking.
const PAUSE: Duration = Duration::from_millis(200);

/// What `volume check` takes.
#[derive(Args)]
pub struct CheckArgs {
    /// The volume.
    name: String,
    /// Read and verify every block at rest too, not only the tables of checksums.
    #[arg(long)]
    verify: bool,
    /// How long replicas that lag, or targets that are away, are waited for.
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    wait: u64,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Verdict {
    volume: String,
    ok: bool,
    chunks: usize,
    copysets: usize,
    findings: Vec<Finding>,
}

/// Runs the check; [`Exit::CheckFailed`] on any difference and on whatever could not be compared.
pub async fn run(args: CheckArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let volume = stat(&mds, &args.name).await?;
    let verdict = judge(&mds, &volume, &args).await?;
    args.output.print(&verdict, text)?;
    Ok(if verdict.ok { Exit::Ok } else { Exit::CheckFailed })
}

/// Asks until nothing is found that waiting may clear, or the time is up.
async fn judge(mds: &MdsClient, volume: &pb::Volume, args: &CheckArgs) -> Result<Verdict, Problem> {
    let deadline = Instant::now() + Duration::from_secs(args.wait);
    loop {
        let survey = survey(mds, volume, args.verify).await?;
        let findings = findings(&survey);
        if !findings.iter().any(|finding| finding.may_clear) || Instant::now() >= deadline {
            return Ok(Verdict {
                volume: volume.name.clone(),
                ok: findings.is_empty(),
                chunks: survey.copysets.len(),
                copysets: survey.members.len(),
                findings,
            });
        }
        sleep(PAUSE).await;
    }
}

/// One round of asking everyone.
async fn survey(mds: &MdsClient, volume: &pb::Volume, verify: bool) -> Result<Survey, Problem> {
    let status = mds.status().await?;
    let ours: BTreeSet<_> = volume.copysets.iter().copied().collect();
    let mut survey = Survey::default();
    for copyset in status.copysets.iter().filter(|copyset| ours.contains(&copyset.id)) {
        survey.members.insert(copyset.id, copyset.members.iter().map(|member| member.target).collect());
    }
    let holders: BTreeSet<_> = survey.members.values().flatten().copied().collect();
    for target in status.targets.iter().filter(|target| holders.contains(&target.id)) {
        let address = target.endpoints.as_ref().map_or("", |endpoints| endpoints.admin.as_str());
        // A target that is away is seen by the absence of its report.
        if let Ok(answer) = ask(address, volume.id, verify).await {
            for (chunk, copyset) in answer.copysets {
                survey.copysets.insert(chunk, copyset);
            }
            survey.reports.insert(target.id, answer.report);
        }
    }
    Ok(survey)
}

struct Answer {
    report: Report,
    copysets: BTreeMap<u32, u32>,
}

/// With `verify`, the next record may take as long as reading some gigabytes does.
fn patience(verify: bool) -> Patience {
    Patience {
        call: Duration::from_secs(if verify { 600 } else { 10 }),
        retry: Duration::ZERO,
        ..Patience::default()
    }
}

async fn ask(address: &str, volume: u32, verify: bool) -> Result<Answer, Problem> {
    let admin = AdminClient::new(address, patience(verify))?;
    let mut answer = Answer { report: Report::default(), copysets: BTreeMap::new() };
    let status = admin.status().await?;
    for replica in status.shards.iter().flat_map(|shard| &shard.replicas) {
        answer.report.applied.insert(replica.copyset, replica.applied_index);
        note_health(&mut answer.report, replica.copyset, replica.health());
    }
    let mut stream = admin.chunk_checksums(VolumeId(volume), verify).await?;
    while let Some(chunk) = stream.next().await? {
        note_health(&mut answer.report, chunk.copyset, chunk.health());
        answer.copysets.insert(chunk.chunk, chunk.copyset);
        let digest = Digest {
            applied_index: chunk.applied_index,
            digest: chunk.digest,
            present_blocks: chunk.present_blocks,
            damaged_blocks: chunk.damaged_blocks,
        };
        answer.report.chunks.insert(chunk.chunk, digest);
    }
    Ok(answer)
}

fn note_health(report: &mut Report, copyset: u32, health: pb::ReplicaHealth) {
    if health != pb::ReplicaHealth::Whole {
        report.not_whole.insert(copyset);
    }
}

fn text(verdict: &Verdict) -> String {
    let Verdict { volume, chunks, copysets, .. } = verdict;
    if verdict.ok {
        return format!(
            "{volume}: {chunks} chunks in {copysets} copysets: every replica of every chunk is equal"
        );
    }
    let lines: String = verdict.findings.iter().map(line).collect();
    format!(
        "{volume}: {} of {chunks} chunks and {copysets} copysets are not well:\n{lines}",
        verdict.findings.len()
    )
}

fn line(finding: &Finding) -> String {
    let place = match finding.chunk {
        Some(chunk) => format!("chunk {chunk} (copyset {})", finding.copyset),
        None => format!("copyset {}", finding.copyset),
    };
    let replicas: String = finding
        .replicas
        .iter()
        .map(|(target, digest)| match digest {
            Some(d) => format!(
                "\n    target {target}: digest {:08x}, {} blocks, applied {}, {} damaged",
                d.digest, d.present_blocks, d.applied_index, d.damaged_blocks
            ),
            None => format!("\n    target {target}: no such chunk"),
        })
        .collect();
    format!("  {place}: {}{replicas}\n", finding.what)
}
