//! Rules on source text that neither the compiler nor clippy checks.
//!
//! Three rules: `unsafe` only in `reactor` (the workspace denies it, so whoever wants it
//! must write an `allow`, which is what is looked for); no IO, clock, thread or environment
//! in the sources of the cores; and every file opens with `//!`.

use crate::arrows::CORES;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// What the sources of a core do not name. Their tests may read files of scenarios.
const NOT_IN_CORES: &[&str] = &[
    "std::env",
    "std::fs",
    "std::net::Tcp",
    "std::net::Udp",
    "std::os",
    "std::process",
    "std::thread",
    "std::time",
];

/// Every broken rule as one line, over all crates beneath `root`.
pub fn violations(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for manifest in manifests(root)? {
        let folder = manifest.parent().unwrap_or(root);
        let name = folder.strip_prefix(root).unwrap_or(folder).display().to_string();
        let text = read(&manifest)?;
        found.extend(manifest_violation(&name, &text));
        for file in sources(folder)? {
            let shown = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            found.extend(source_violations(&name, &shown, &read(&file)?));
        }
    }
    Ok(found)
}

fn manifest_violation(name: &str, text: &str) -> Option<String> {
    (!text.contains("[lints]\nworkspace = true")).then(|| {
        format!("{name}/Cargo.toml: lacks `[lints] workspace = true`, so no lint of the workspace holds")
    })
}

fn source_violations(name: &str, file: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !text.starts_with("//!") && !text.starts_with("#!") {
        found.push(format!("{file}:1: a file opens with `//!`: its purpose, invariants and what is absent"));
    }
    if name != "reactor" {
        let line = text.lines().position(allows_unsafe);
        found.extend(line.map(|at| format!("{file}:{}: only reactor may allow unsafe code", at + 1)));
    }
    if CORES.contains(&name) && file.starts_with(&format!("{name}/src/")) {
        found.extend(
            text.lines()
                .enumerate()
                .filter_map(|(at, line)| acts(line).map(|what| (at, what)))
                .map(|(at, what)| format!("{file}:{}: {name} is sans-IO and does not name {what}", at + 1)),
        );
    }
    found
}

fn acts(line: &str) -> Option<&'static str> {
    let is_comment = line.trim_start().starts_with("//");
    NOT_IN_CORES.iter().copied().find(|what| !is_comment && line.contains(what))
}

fn allows_unsafe(line: &str) -> bool {
    ["allow", "expect", "warn"].iter().any(|level| line.contains(&format!("{level}({}", "unsafe_code")))
}

/// The manifests of the crates: those one folder beneath the root.
fn manifests(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<_> =
        entries(root)?.into_iter().map(|folder| folder.join("Cargo.toml")).filter(|m| m.is_file()).collect();
    found.sort();
    Ok(found)
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in entries(folder)? {
        let hidden = entry.file_name().is_some_and(|n| n == "target" || n.to_string_lossy().starts_with('.'));
        if entry.is_dir() && !hidden {
            found.extend(sources(&entry)?);
        } else if entry.extension().is_some_and(|e| e == "rs") {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    listing.map(|entry| Ok(entry?.path())).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_outside_the_reactor_is_found_with_its_line() {
        let text = format!("//! Purpose.\n#[allow({})]\nfn f() {{}}\n", "unsafe_code");
        assert_eq!(source_violations("reactor", "reactor/src/ring.rs", &text), Vec::<String>::new());
        let found = source_violations("client", "client/src/io.rs", &text);
        assert_eq!(found, ["client/src/io.rs:2: only reactor may allow unsafe code"]);
    }

    #[test]
    fn a_file_without_a_purpose_is_found() {
        assert_eq!(source_violations("client", "client/src/io.rs", "use std::fs;\n").len(), 1);
    }

    #[test]
    fn a_core_that_reads_a_clock_is_found_but_words_about_it_are_not() {
        let text = "//! Purpose.\nuse std::time::Instant;\n/// Unlike std::time.\n";
        let found = source_violations("copyset", "copyset/src/lease.rs", text);
        assert_eq!(found, ["copyset/src/lease.rs:2: copyset is sans-IO and does not name std::time"]);
        assert_eq!(source_violations("copyset", "copyset/tests/scenarios.rs", text), Vec::<String>::new());
        assert_eq!(source_violations("client", "client/src/io.rs", text), Vec::<String>::new());
    }

    #[test]
    fn a_crate_that_escapes_the_lints_is_found() {
        assert!(manifest_violation("client", "[package]\nname = \"x\"\n").is_some());
        assert!(manifest_violation("client", "[lints]\nworkspace = true\n").is_none());
    }
}
