//! The simulator in CI: a few runs that every change must pass, and every seed that once failed.
//!
//! More seeds: `cargo xtask sim --seeds N`.

use ashlar_tests::sim::{Mix, Report, run};

fn passes(seed: u64, mix: &Mix) -> Report {
    run(seed, mix).unwrap_or_else(|failure| panic!("seed {seed}: {failure}"))
}

#[test]
fn a_calm_cluster_serves_and_the_same_seed_gives_the_same_trace() {
    let first = passes(1, &Mix::calm());
    assert!(first.acknowledged > 500, "{first:?}");
    let second = passes(1, &Mix::calm());
    assert_eq!((first.trace, first.turns), (second.trace, second.turns));
    assert_ne!(first.trace, passes(2, &Mix::calm()).trace);
}

#[test]
fn fresh_seeds_pass() {
    for seed in 1..=3 {
        passes(seed, &Mix::of_seed(seed));
    }
}
