//! Accounting for segments: the first writes that shards report are told to the MDS, which may
//! refuse them. Writes do not wait for it; while no MDS answers, reports are kept and sent later.

use super::{Control, ToShard};
use client::control::MdsClient;
use protocol::control::{Problem, ProblemKind};
use protocol::types::VolumeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Most segments told in one call.
const BATCH_MAX: usize = 256;
/// Before telling again what could not be told.
const RETRY: Duration = Duration::from_secs(1);

/// Never ends, unless the other end of the queue is gone.
pub(super) async fn allocate(control: &Control, mut first_writes: mpsc::Receiver<(VolumeId, u32)>) {
    let mut waiting: BTreeMap<VolumeId, BTreeSet<u32>> = BTreeMap::new();
    let mut refused: BTreeSet<(VolumeId, u32)> = BTreeSet::new();
    loop {
        if waiting.is_empty() {
            let Some((volume, segment)) = first_writes.recv().await else {
                return std::future::pending().await;
            };
            waiting.entry(volume).or_default().insert(segment);
        }
        while let Ok((volume, segment)) = first_writes.try_recv() {
            waiting.entry(volume).or_default().insert(segment);
        }
        if !tell(control, &mut waiting, &mut refused).await {
            // Reports go on being taken, so that shards never find the queue full for long.
            let until = tokio::time::Instant::now() + RETRY;
            while let Ok(Some((volume, segment))) = tokio::time::timeout_at(until, first_writes.recv()).await
            {
                waiting.entry(volume).or_default().insert(segment);
            }
            sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Tells all that waits; false when the MDS does not answer.
async fn tell(
    control: &Control,
    waiting: &mut BTreeMap<VolumeId, BTreeSet<u32>>,
    refused: &mut BTreeSet<(VolumeId, u32)>,
) -> bool {
    let client = control.mds.clone();
    while let Some((&volume, segments)) = waiting.first_key_value() {
        let batch: Vec<u32> = segments.iter().copied().take(BATCH_MAX).collect();
        let Some(answers) = ask(&client, volume, &batch).await else { return false };
        for (segment, granted) in answers {
            note(control, refused, volume, segment, granted);
        }
        let left = waiting.get_mut(&volume).expect("it is the first");
        left.retain(|segment| !batch.contains(segment));
        if left.is_empty() {
            waiting.remove(&volume);
        }
    }
    true
}

/// Which of the segments the MDS grants; `None` when it does not answer. A call is all or
/// nothing, so after a refusal each is asked for by itself.
async fn ask(client: &MdsClient, volume: VolumeId, segments: &[u32]) -> Option<Vec<(u32, bool)>> {
    match client.allocate(volume, segments).await {
        Ok(_) => Some(segments.iter().map(|segment| (*segment, true)).collect()),
        Err(problem) if problem.kind == ProblemKind::NoSpace && segments.len() > 1 => {
            let mut answers = Vec::new();
            for segment in segments {
                answers.extend(Box::pin(ask(client, volume, std::slice::from_ref(segment))).await?);
            }
            Some(answers)
        }
        Err(problem) if problem.kind == ProblemKind::NoSpace => {
            tracing::warn!(%volume, segment = segments[0], %problem, "new data is refused with no-space");
            Some(vec![(segments[0], false)])
        }
        Err(Problem {
            kind: ProblemKind::Unreachable | ProblemKind::TimedOut | ProblemKind::NotLeader,
            ..
        }) => None,
        Err(problem) => {
            // A volume deleted meanwhile, mostly. Accounting is not worth failing a write for.
            tracing::warn!(%volume, %problem, "segments are not accounted for");
            Some(Vec::new())
        }
    }
}

fn note(
    control: &Control,
    refused: &mut BTreeSet<(VolumeId, u32)>,
    volume: VolumeId,
    segment: u32,
    granted: bool,
) {
    if !granted {
        refused.insert((volume, segment));
        control.tell_all(|| ToShard::SegmentRefused { volume, segment });
    } else if refused.remove(&(volume, segment)) {
        control.tell_all(|| ToShard::SegmentGranted { volume, segment });
    }
}
