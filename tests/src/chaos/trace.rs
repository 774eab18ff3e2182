//! The register workload's history, judged by the simulator's checker.

use crate::sim::history::History;
use anyhow::{Context, ensure};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Judges a trace; returns how many operations it has. A write that was sent twice is over before
/// the next of its block begins, so it needs no liberty.
///
/// Each line is `kind block begun ended number...`, one number a block (0: zeroes), times in
/// nanoseconds, `-` for an end that never came.
///
/// # Errors
/// Some register did not behave as one, or the file is damaged.
pub fn judge(path: &Path) -> anyhow::Result<u64> {
    let mut history = History::default();
    let mut operations = 0;
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        take(&line, &mut history).with_context(|| format!("{}: {line:?}", path.display()))?;
        operations += 1;
    }
    history.judge_alone().map_err(|failure| anyhow::anyhow!("not linearizable: {}", failure.0))?;
    Ok(operations)
}

fn take(line: &str, history: &mut History) -> anyhow::Result<()> {
    let mut words = line.split(' ');
    let mut word = || words.next().context("a line is cut short");
    let (kind, block, begun, ended) = (word()?, word()?.parse::<u64>()?, word()?.parse()?, word()?);
    for (register, number) in (block..).zip(words) {
        let (register, value) = ((0, register), number.parse()?);
        match kind {
            "r" => history.read(register, value, begun, ended.parse()?),
            _ => {
                ensure!(kind == "w", "an unknown kind");
                let ticket = history.begin_write(register, value, begun);
                if ended != "-" {
                    history.end_write(ticket, ended.parse()?);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(lines: &str) -> anyhow::Result<u64> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), lines)?;
        judge(file.path())
    }

    #[test]
    fn a_trace_with_a_lost_write_is_caught_and_a_right_one_is_not() {
        assert_eq!(verdict("w 4 10 20 1 1\nw 4 30 40 2\nr 4 50 60 2 1\n").expect("right"), 3);
        assert_eq!(verdict("w 4 10 - 1\nr 4 50 60 0\nr 4 70 80 1\n").expect("right"), 3);
        assert!(verdict("w 4 10 20 1\nw 4 30 40 2\nr 4 50 60 1\n").is_err(), "the second write is lost");
        assert!(verdict("w 4 10 20 1\nr 4 50 60 0\n").is_err(), "the write is lost");
        assert!(verdict("w 4 10\n").is_err(), "cut short");
    }
}
