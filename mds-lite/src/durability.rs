//! How likely it is that data is lost: by formula, and by drawing failures at random.
//!
//! The model: targets fail by themselves, each at a constant rate; what one held is rebuilt by as many others
//! as it shares copysets with, each at so many bytes a second, and until then it counts as failed; data is
//! lost when all replicas of a copyset are failed at once. Failures that share a cause (a rack, an
//! operator, a bug) are not in it, so real odds are worse: the table is for comparing, not for promising.
//!
//! A set of R replicas is lost at the rate R f (f T)^(R-1), for failures at rate f and a rebuild that takes T
//! on average: the Markov chain of independent repairs, as long as f T is small. Distinct sets of targets
//! lose independently, so the rates add up. Copysets that share a set of targets are lost together.

use crate::placement::{Node, Wanted, place};
use protocol::types::TargetId;
use std::collections::BTreeSet;

const YEAR_S: f64 = 365.25 * 86_400.0;

/// A cluster and its failures.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Targets, all alike.
    pub targets: u32,
    /// Replicas of each copyset.
    pub replicas: u32,
    /// Copysets.
    pub copysets: u32,
    /// Bound of the scatter width.
    pub scatter_max: usize,
    /// What each target holds.
    pub bytes: f64,
    /// Failures of a target a year.
    pub failures_a_year: f64,
    /// At which one target sends or takes rebuilt data, in bytes a second.
    pub rebuild_bytes_s: f64,
    /// From a failure until its rebuild begins.
    pub notice_s: f64,
}

/// What is to be expected.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Others that a target shares copysets with, on average.
    pub scatter_width: f64,
    /// Distinct sets of targets whose common loss loses data.
    pub sets: usize,
    /// From a failure until everything is whole again, in seconds.
    pub rebuild_s: f64,
    /// Expected losses of a set a year, by formula.
    pub losses_a_year: f64,
}

impl Answer {
    /// The probability of any loss in a year.
    pub fn probability(&self) -> f64 {
        -(-self.losses_a_year).exp_m1()
    }
}

fn sets_of(question: &Question) -> Option<Vec<Vec<usize>>> {
    let Question { targets, replicas, copysets, scatter_max, .. } = *question;
    let nodes = (1..=targets).map(|id| Node::empty(TargetId(id), 1)).collect();
    let wanted = Wanted { replicas: replicas as usize, copysets: copysets as usize, scatter_max };
    let (_, placed) = place(nodes, wanted)?;
    let set = |members: Vec<protocol::types::ShardAddr>| {
        members.iter().map(|m| m.target.0 as usize - 1).collect::<BTreeSet<usize>>()
    };
    let sets: BTreeSet<BTreeSet<usize>> = placed.into_iter().map(set).collect();
    Some(sets.into_iter().map(|set| set.into_iter().collect()).collect())
}

/// By formula; `None` when there are fewer targets than replicas.
pub fn expected(question: &Question) -> Option<Answer> {
    let sets = sets_of(question)?;
    let mut met: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); question.targets as usize];
    for set in &sets {
        set.iter().for_each(|at| met[*at].extend(set.iter().filter(|other| *other != at)));
    }
    let scatter_width = met.iter().map(|met| met.len() as f64).sum::<f64>() / f64::from(question.targets);
    let rebuild_s = question.notice_s + question.bytes / (scatter_width.max(1.0) * question.rebuild_bytes_s);
    let losses_a_year = sets.len() as f64 * set_losses(question, rebuild_s);
    Some(Answer { scatter_width, sets: sets.len(), rebuild_s, losses_a_year })
}

fn set_losses(question: &Question, rebuild_s: f64) -> f64 {
    let (rate, replicas) = (question.failures_a_year, f64::from(question.replicas));
    replicas * rate * (rate * rebuild_s / YEAR_S).powf(replicas - 1.0)
}

/// By chance: losses a year over so many years, in which targets fail and are rebuilt in times that are
/// drawn at random. The same seed gives the same answer. Losses must not be too rare for that: see
/// [`hastened`].
pub fn simulated(question: &Question, years: f64, seed: u64) -> Option<f64> {
    let answer = expected(question)?;
    let sets = sets_of(question)?;
    let mut of: Vec<Vec<usize>> = vec![Vec::new(); question.targets as usize];
    for (at, set) in sets.iter().enumerate() {
        set.iter().for_each(|target| of[*target].push(at));
    }
    let mut dice = seed;
    // Uniform from 0 to below 1.
    let mut draw = || {
        dice = dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (dice ^ (dice >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let wait = |mean: f64, unit: f64| -mean * (1.0 - unit).ln();
    let mut whole_at = vec![0.0; question.targets as usize];
    let (mut now, end, mut losses) = (0.0, years * YEAR_S, 0u64);
    let rate = question.failures_a_year * f64::from(question.targets) / YEAR_S;
    loop {
        now += wait(1.0 / rate, draw());
        if now > end {
            return Some(losses as f64 / years);
        }
        let target = (draw() * f64::from(question.targets)) as usize;
        if whole_at[target] > now {
            continue;
        }
        whole_at[target] = now + wait(answer.rebuild_s, draw());
        losses +=
            of[target].iter().filter(|set| sets[**set].iter().all(|t| whole_at[*t] > now)).count() as u64;
    }
}

/// The same cluster with failures so frequent that losses can be counted: during one rebuild in fifty
/// another given target fails.
pub fn hastened(question: &Question) -> Option<Question> {
    let rebuild_s = expected(question)?.rebuild_s;
    Some(Question { failures_a_year: 0.02 * YEAR_S / rebuild_s, ..*question })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(replicas: u32, scatter_max: usize) -> Question {
        Question {
            targets: 60,
            replicas,
            copysets: 600,
            scatter_max,
            bytes: 8e12,
            failures_a_year: 0.02,
            rebuild_bytes_s: 50e6,
            notice_s: 60.0,
        }
    }

    #[test]
    fn formula_and_chance_agree_where_chance_can_count() {
        for replicas in [2, 3] {
            let hasty = hastened(&question(replicas, 12)).unwrap();
            let expected = expected(&hasty).unwrap().losses_a_year;
            // Some 2,000 losses, so that chance alone is 2 to 3 % off.
            let counted = simulated(&hasty, 2000.0 / expected, 7).unwrap();
            let ratio = counted / expected;
            assert!(
                (0.85..1.15).contains(&ratio),
                "{replicas} replicas: {counted} counted, {expected} expected"
            );
        }
    }

    #[test]
    fn a_replica_more_is_worth_orders_of_magnitude_and_width_trades_time_for_sets() {
        let losses = |replicas, width| expected(&question(replicas, width)).unwrap();
        assert!(losses(2, 12).losses_a_year > 100.0 * losses(3, 12).losses_a_year);
        let (narrow, wide) = (losses(3, 4), losses(3, 40));
        assert!(narrow.rebuild_s > wide.rebuild_s && narrow.sets < wide.sets);
        assert!(expected(&Question { targets: 2, ..question(3, 4) }).is_none());
    }
}
