//! The goals as text and as a page.
//!
//! Invariant: only what lies between the page's markers is replaced; what people wrote around them stays.

use super::Report;
use super::judge::{Line, Verdict};
use super::name::RAW;
use crate::report::write;
use crate::rival::Server;
use crate::run::summary;
use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use std::path::Path;

/// Where the page lies in the source tree.
pub const DEFAULT_PATH: &str = "docs/benchmarks/goals.md";
const BEGIN: &str =
    "<!-- Written by `ashlar bench goals --write-markdown`; what is between the markers is replaced. -->";
const END: &str = "<!-- End of what is written. -->";
const HEAD: &str = "# The goals, measured\n\nOne run on one machine, subjects in turns, medians. A ratio compares medians \
of one load within this run; figures of different runs are not compared. Causes of what is missed are in \
[performance.md](../performance.md); Ceph and others are in [peers.md](peers.md), the model of larger machines in \
[model.md](model.md).\n";

/// For a terminal.
pub fn text(report: &Report) -> String {
    let Report { lines, results, .. } = report;
    let rows = summary::rows(results);
    let table = summary::table(&rows, &[RAW, Server::QemuNbd.name()], presets::UTF8_FULL_CONDENSED);
    let (line, setting) = (results.environment.line(), summary::setting(results));
    let goals = goals(lines, presets::UTF8_FULL_CONDENSED);
    format!("{line}\n{setting}\n{table}\n{goals}\n{}", count(lines))
}

/// What comes between the markers.
pub fn markdown(report: &Report) -> String {
    let Report { lines, results, .. } = report;
    let rows = summary::rows(results);
    let table = summary::table(&rows, &[RAW, Server::QemuNbd.name()], presets::ASCII_MARKDOWN);
    let parts = [
        results.environment.line(),
        summary::setting(results),
        format!("{}.", count(lines)),
        goals(lines, presets::ASCII_MARKDOWN).to_string(),
        "## Medians".to_owned(),
        table.to_string(),
        "Writes of the raw file are O_DSYNC, but for sequential ones. A write to a volume is acknowledged when a majority \
         of its replicas has synced it, all on this one disk. Server CPU is that of the targets, spinning included. \
         qemu-nbd runs with cache=none and aio=io_uring and syncs only on flush. The bare server (`ashlar bench bare`) \
         has the reactor, the sockets and the session of a target and does nothing but IO: NBD, the raw file or memory, \
         each write synced, no checksums, no log, no replicas. What it takes is the machine's and the reactor's. A \
         replicated write at depth 1 is, at best, three synced writes at once and two hops, of which the bare server's is one."
            .to_owned(),
    ];
    parts.join("\n\n")
}

fn goals(lines: &[Line], preset: &str) -> Table {
    let mut table = Table::new();
    table.load_preset(preset);
    table.set_header(["measure", "target", "found", "", "a bare server"]);
    for Line { measure, target, found, bare, verdict, .. } in lines {
        let bare = bare.as_deref().unwrap_or("");
        table.add_row([measure.as_str(), target.as_str(), found.as_str(), verdict.word(), bare]);
    }
    table
}

fn count(lines: &[Line]) -> String {
    let of = |verdict| lines.iter().filter(|line| line.verdict == verdict).count();
    let [met, missed, not] = [Verdict::Met, Verdict::Missed, Verdict::NotShown].map(of);
    format!("{met} of {} targets met, {missed} missed, {not} not shown", lines.len())
}

/// Puts text between the markers of a page, which is made when it is not there.
///
/// # Errors
/// The page has no markers, or cannot be written.
pub fn write_between(path: &Path, text: &str) -> anyhow::Result<()> {
    let old = match std::fs::read_to_string(path) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => format!("{HEAD}\n{BEGIN}\n{END}\n"),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
    };
    write(path, &replaced(&old, text).with_context(|| format!("in {}", path.display()))?)
}

fn replaced(old: &str, text: &str) -> anyhow::Result<String> {
    let markers = "its markers are gone; put these two lines where the tables shall be";
    let (before, rest) = old.split_once(BEGIN).with_context(|| format!("{markers}:\n{BEGIN}\n{END}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("{markers}:\n{BEGIN}\n{END}"))?;
    ensure!(!text.contains(END), "a marker within the text");
    Ok(format!("{before}{BEGIN}\n\n{text}\n\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::goals::judge::{Facts, lines};
    use crate::run::result::Results;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("goals.md");
        write_between(&path, "first")?;
        let page = std::fs::read_to_string(&path)?;
        assert!(page.starts_with("# The goals") && page.contains("first"), "{page}");
        std::fs::write(&path, page.replace("# The goals", "# Mine") + "\nA note.\n")?;
        write_between(&path, "second")?;
        let page = std::fs::read_to_string(&path)?;
        assert!(
            page.starts_with("# Mine") && page.ends_with("A note.\n") && !page.contains("first"),
            "{page}"
        );
        assert_eq!(page.matches("second").count(), 1);
        std::fs::write(&path, "no markers")?;
        let error = write_between(&path, "third").expect_err("nowhere to write");
        assert!(format!("{error:#}").contains(BEGIN), "{error:#}");
        assert_eq!(std::fs::read_to_string(&path)?, "no markers");
        Ok(())
    }

    #[test]
    fn a_page_counts_and_has_every_line() -> anyhow::Result<()> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json");
        let results = Results::read(&fixture)?;
        let facts = Facts { idle_percent: Some(0.5), ..Facts::default() };
        let lines = lines(&summary::rows(&results), &facts, 1 << 30);
        let all = lines.len();
        let report = Report { lines, facts, results };
        let page = markdown(&report);
        assert!(page.contains(&format!("1 of {all} targets met, 0 missed")), "{page}");
        assert_eq!(page.lines().filter(|line| line.contains("| not shown")).count(), all - 1);
        assert!(page.contains("0.50 %") && text(&report).contains("met"), "{page}");
        Ok(())
    }
}
