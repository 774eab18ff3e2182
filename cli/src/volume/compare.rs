//! Are the replicas of a chunk equal? Pure: reports in, verdicts out.
//!
//! Digests of unequal content are comparable only at equal applied indexes; while a replica
//! lags, the answer is "not yet". Equal digests are equal content at whatever index.

use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A chunk's index in its volume.
pub type Chunk = u32;
/// A target's id.
pub type Target = u32;

/// What one replica says of one chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Digest {
    /// Of its copyset, when the digest was taken.
    pub applied_index: u64,
    /// Over the checksums of all blocks.
    pub digest: u32,
    /// Blocks that hold data.
    pub present_blocks: u32,
    /// Blocks that were read and found damaged.
    pub damaged_blocks: u32,
}

/// What one target says of one volume.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The applied index of each of its copysets, read before the digests were.
    pub applied: BTreeMap<u32, u64>,
    /// Copysets whose replica here is not whole: still catching up, or damaged.
    pub not_whole: BTreeSet<u32>,
    /// Its chunks.
    pub chunks: BTreeMap<Chunk, Digest>,
}

/// What there is to compare.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Which targets hold each copyset of the volume.
    pub members: BTreeMap<u32, Vec<Target>>,
    /// The copyset of each chunk that anyone reported.
    pub copysets: BTreeMap<Chunk, u32>,
    /// What each target that answered said.
    pub reports: BTreeMap<Target, Report>,
}

/// What is wrong with one chunk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// The chunk, or none where no chunk could be compared.
    pub chunk: Option<Chunk>,
    /// Its copyset.
    pub copyset: u32,
    /// What is wrong, for people.
    pub what: String,
    /// Whether asking again later may clear it.
    pub may_clear: bool,
    /// What each replica said; null where it has no such chunk.
    pub replicas: BTreeMap<Target, Option<Digest>>,
}

/// Everything that is wrong; empty when all replicas of all chunks are equal and whole.
pub fn findings(survey: &Survey) -> Vec<Finding> {
    let of_copysets = survey.members.iter().flat_map(|(copyset, members)| unfit(survey, *copyset, members));
    let of_chunks =
        survey.copysets.iter().filter_map(|(chunk, copyset)| difference(survey, *chunk, *copyset));
    of_copysets.chain(of_chunks).collect()
}

/// Members that said nothing, or are not whole.
fn unfit(survey: &Survey, copyset: u32, members: &[Target]) -> Option<Finding> {
    let whats: Vec<_> = members
        .iter()
        .filter_map(|target| match survey.reports.get(target) {
            None => Some(format!("target {target} did not answer")),
            Some(report) if !report.applied.contains_key(&copyset) => {
                Some(format!("target {target} has no replica yet"))
            }
            Some(report) if report.not_whole.contains(&copyset) => {
                Some(format!("target {target} is catching up"))
            }
            Some(_) => None,
        })
        .collect();
    (!whats.is_empty()).then(|| Finding {
        chunk: None,
        copyset,
        what: whats.join(", "),
        may_clear: true,
        replicas: BTreeMap::new(),
    })
}

fn difference(survey: &Survey, chunk: Chunk, copyset: u32) -> Option<Finding> {
    let members = survey.members.get(&copyset)?;
    let answered = members.iter().filter_map(|target| Some((*target, survey.reports.get(target)?)));
    let replicas: BTreeMap<_, _> =
        answered.clone().map(|(target, report)| (target, report.chunks.get(&chunk).copied())).collect();
    let found = |what: String, may_clear| {
        Some(Finding { chunk: Some(chunk), copyset, what, may_clear, replicas: replicas.clone() })
    };
    if let Some((target, _)) = replicas.iter().find(|(_, d)| d.is_some_and(|d| d.damaged_blocks > 0)) {
        return found(format!("damaged blocks at rest on target {target}"), false);
    }
    let contents: BTreeSet<_> = replicas.values().map(|digest| content(*digest)).collect();
    if contents.len() <= 1 {
        return None;
    }
    let indexes: BTreeSet<_> = answered
        .map(|(target, report)| match replicas[&target] {
            Some(digest) => digest.applied_index,
            None => report.applied.get(&copyset).copied().unwrap_or(0),
        })
        .collect();
    if indexes.len() > 1 {
        found("replicas differ, but are not at the same point of their log".into(), true)
    } else {
        found("replicas differ".into(), false)
    }
}

/// A chunk without blocks and no chunk at all read the same.
fn content(digest: Option<Digest>) -> Option<(u32, u32)> {
    digest.filter(|d| d.present_blocks > 0).map(|d| (d.digest, d.present_blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPYSET: u32 = 9;

    fn digest(applied_index: u64, digest: u32) -> Option<Digest> {
        Some(Digest { applied_index, digest, present_blocks: 5, damaged_blocks: 0 })
    }

    /// Chunk 7 on targets 1, 2 and 3, all of which applied up to 10.
    fn survey(digests: [Option<Digest>; 3]) -> Survey {
        let report = |digest: Option<Digest>| Report {
            applied: BTreeMap::from([(COPYSET, 10)]),
            not_whole: BTreeSet::new(),
            chunks: digest.map(|d| (7, d)).into_iter().collect(),
        };
        Survey {
            members: BTreeMap::from([(COPYSET, vec![1, 2, 3])]),
            copysets: BTreeMap::from([(7, COPYSET)]),
            reports: (1..).zip(digests.map(report)).collect(),
        }
    }

    fn check(digests: [Option<Digest>; 3], expected: &[(&str, bool)]) {
        let found = findings(&survey(digests));
        let short: Vec<_> = found.iter().map(|f| (f.what.as_str(), f.may_clear)).collect();
        assert_eq!(short, expected, "{digests:?}");
    }

    #[test]
    fn equal_replicas_are_equal_even_when_one_lags() {
        check([digest(10, 1), digest(10, 1), digest(10, 1)], &[]);
        check([digest(10, 1), digest(10, 1), digest(8, 1)], &[]);
    }

    #[test]
    fn a_difference_counts_only_at_one_point_of_the_log() {
        check([digest(10, 1), digest(10, 2), digest(10, 1)], &[("replicas differ", false)]);
        let lags = "replicas differ, but are not at the same point of their log";
        check([digest(10, 1), digest(9, 2), digest(10, 1)], &[(lags, true)]);
    }

    #[test]
    fn a_replica_that_lost_a_chunk_is_found_unless_it_lags() {
        check([digest(10, 1), None, digest(10, 1)], &[("replicas differ", false)]);
        let lags = "replicas differ, but are not at the same point of their log";
        check([digest(12, 1), None, digest(12, 1)], &[(lags, true)]);
    }

    #[test]
    fn a_chunk_that_was_zeroed_equals_one_that_never_was() {
        let empty = Some(Digest { applied_index: 10, digest: 77, present_blocks: 0, damaged_blocks: 0 });
        check([empty, None, empty], &[]);
    }

    #[test]
    fn damage_at_rest_is_found_though_digests_agree() {
        let damaged = Some(Digest { damaged_blocks: 1, ..digest(10, 1).expect("some") });
        check([digest(10, 1), digest(10, 1), damaged], &[("damaged blocks at rest on target 3", false)]);
    }

    #[test]
    fn a_silent_or_unfit_replica_is_never_taken_for_equal() {
        let mut survey = survey([digest(10, 1), digest(10, 1), digest(10, 1)]);
        survey.reports.remove(&2);
        survey.reports.get_mut(&3).expect("there").not_whole.insert(COPYSET);
        let found = findings(&survey);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "target 2 did not answer, target 3 is catching up");
        assert!(found[0].may_clear);
    }

    #[test]
    fn an_empty_volume_with_a_missing_member_is_not_clean() {
        let mut survey = survey([None, None, None]);
        survey.copysets.clear();
        assert_eq!(findings(&survey), []);
        survey.reports.remove(&1);
        assert_eq!(findings(&survey).len(), 1);
    }
}
