//! Which crate may use which.
//!
//! The table below is the architecture: an edge that is not in it is an error, whatever
//! its reason. It reads what cargo knows (`cargo metadata`), so a renamed or optional
//! dependency is seen too. Deliberately absent: any look at the code itself (see `tidy`;
//! clippy's disallowed lists in the three cores do the rest).

use anyhow::{Context, Result};
use serde::Deserialize;

const PREFIX: &str = "ashlar-";

/// Who may use whom, within the workspace. `tests` may use anything; `xtask` nothing.
const ALLOWED: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("copyset", &["protocol"]),
    ("chunkstore", &["protocol"]),
    ("reactor", &["protocol"]),
    ("transport", &["protocol", "reactor"]),
    ("client", &["protocol", "transport", "reactor"]),
    ("target-daemon", &["protocol", "copyset", "chunkstore", "reactor", "transport", "client", "tuning"]),
    ("mds-lite", &["protocol"]),
    ("bench", &["protocol", "client", "reactor", "transport"]),
    ("tuning", &["protocol", "reactor"]),
    ("cli", &["protocol", "client", "target-daemon", "mds-lite", "bench", "tuning"]),
    ("xtask", &[]),
];

/// What tests within a crate may use besides: the real service at the other end.
const ALLOWED_IN_TESTS: &[(&str, &str)] = &[("client", "mds-lite"), ("target-daemon", "mds-lite")];

/// Only `reactor` may name these: there is one door to the kernel's IO.
const REACTOR_ONLY: &[&str] = &["glommio", "io-uring", "rtrb"];

/// Crates that decide and never act: no IO, no clock, no randomness, no threads.
pub const CORES: &[&str] = &["protocol", "copyset", "chunkstore"];

/// What a core must not even be able to call. `protocol` may have tonic behind a feature,
/// for the generated services; the data path builds without it.
const NOT_IN_CORES: &[&str] = &[
    "async-std",
    "axum",
    "crossbeam",
    "fastrand",
    "getrandom",
    "libc",
    "mio",
    "nix",
    "rand",
    "rayon",
    "redb",
    "rustix",
    "smol",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-stream",
    "tonic",
    "tracing",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    optional: bool,
}

impl Dependency {
    fn is_dev(&self) -> bool {
        self.kind.as_deref() == Some("dev")
    }
}

/// Every broken rule as one line, given the JSON of `cargo metadata --no-deps`.
pub fn violations(metadata: &str) -> Result<Vec<String>> {
    let metadata: Metadata =
        serde_json::from_str(metadata).context("cargo metadata's JSON is not understood")?;
    Ok(metadata.packages.iter().flat_map(violations_of).collect())
}

fn violations_of(package: &Package) -> Vec<String> {
    let Some(user) = package.name.strip_prefix(PREFIX) else {
        return vec![format!("{}: a crate of this workspace is named {PREFIX}...", package.name)];
    };
    if user == "tests" {
        return Vec::new();
    }
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == user) else {
        return vec![format!("{user}: not in the table of xtask/src/arrows.rs; add it with what it may use")];
    };
    package.dependencies.iter().filter_map(|used| violation(user, allowed, used)).collect()
}

fn violation(user: &str, allowed: &[&str], used: &Dependency) -> Option<String> {
    if let Some(inner) = used.name.strip_prefix(PREFIX) {
        let in_tests = used.is_dev() && ALLOWED_IN_TESTS.contains(&(user, inner));
        return (!in_tests && !allowed.contains(&inner)).then(|| {
            format!("{user} -> {inner}: not an allowed arrow; {user} may use only {}", list(allowed))
        });
    }
    if REACTOR_ONLY.contains(&used.name.as_str()) && user != "reactor" {
        return Some(format!("{user} -> {}: only reactor may name it", used.name));
    }
    let behind_feature = user == "protocol" && used.optional && used.name == "tonic";
    if CORES.contains(&user)
        && NOT_IN_CORES.contains(&used.name.as_str())
        && !used.is_dev()
        && !behind_feature
    {
        return Some(format!("{user} -> {}: {user} is sans-IO and may not use it", used.name));
    }
    None
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "nothing of this workspace".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Metadata of one package that uses others, each given as `name`, `name?` (optional) or `name!` (dev).
    fn found(user: &str, uses: &[&str]) -> Vec<String> {
        let dependencies: Vec<_> = uses
            .iter()
            .map(|used| {
                let kind = used.ends_with('!').then_some("dev");
                let name = used.trim_end_matches(['!', '?']);
                serde_json::json!({"name": name, "kind": kind, "optional": used.ends_with('?')})
            })
            .collect();
        let metadata = serde_json::json!({"packages": [{"name": user, "dependencies": dependencies}]});
        violations(&metadata.to_string()).expect("well formed")
    }

    #[test]
    fn the_two_cores_must_not_know_each_other() {
        assert_eq!(found("ashlar-copyset", &["ashlar-protocol", "arrayvec"]), Vec::<String>::new());
        assert_eq!(found("ashlar-copyset", &["ashlar-chunkstore"]).len(), 1);
        assert_eq!(found("ashlar-chunkstore", &["ashlar-copyset!"]).len(), 1, "not even in their tests");
    }

    #[test]
    fn a_core_that_could_do_io_is_refused_but_its_tests_may() {
        assert_eq!(found("ashlar-chunkstore", &["tokio"]).len(), 1);
        assert_eq!(found("ashlar-copyset", &["rand"]).len(), 1);
        assert_eq!(found("ashlar-chunkstore", &["tempfile!", "proptest!"]), Vec::<String>::new());
    }

    #[test]
    fn tonic_in_protocol_only_behind_its_feature() {
        assert_eq!(found("ashlar-protocol", &["tonic?"]), Vec::<String>::new());
        assert_eq!(found("ashlar-protocol", &["tonic"]).len(), 1);
        assert_eq!(found("ashlar-copyset", &["tonic?"]).len(), 1);
    }

    #[test]
    fn only_the_reactor_names_the_ring() {
        assert_eq!(found("ashlar-reactor", &["io-uring", "glommio"]), Vec::<String>::new());
        assert_eq!(found("ashlar-transport", &["io-uring"]).len(), 1);
        assert_eq!(found("ashlar-bench", &["glommio!"]).len(), 1);
    }

    #[test]
    fn the_real_mds_only_in_tests() {
        assert_eq!(found("ashlar-target-daemon", &["ashlar-mds-lite!"]), Vec::<String>::new());
        assert_eq!(found("ashlar-target-daemon", &["ashlar-mds-lite"]).len(), 1);
    }

    #[test]
    fn a_new_crate_must_be_put_in_the_table() {
        assert_eq!(found("ashlar-novelty", &[]).len(), 1);
        assert_eq!(found("novelty", &[]).len(), 1);
    }

    #[test]
    fn tests_may_use_everything() {
        assert_eq!(
            found("ashlar-tests", &["ashlar-copyset", "ashlar-chunkstore", "raft"]),
            Vec::<String>::new()
        );
    }
}
