//! The checks behind `ashlar tune`: is this machine set up well for a target?
//!
//! Invariants: read-only; each check is a pure function of what was read, so that its
//! verdict can be tested without the machine; a value that cannot be read is "unknown",
//! never a pass. Deliberately absent: changing anything; the fix is a line to paste.

mod checks;
mod facts;

pub use checks::{Finding, Verdict, Weight, all};
pub use facts::Facts;

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use std::path::PathBuf;

/// Commands on the machine's set-up.
#[derive(Debug, Subcommand)]
pub enum TuneCommand {
    /// Look, change nothing; exit code 3 when something required does not hold.
    Check(CheckArgs),
}

/// What `tune check` takes.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// A folder on the disk that a target uses or shall use.
    #[arg(long, value_name = "DIR", default_value = ".")]
    disk: PathBuf,
    /// How to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Runs the command. `Ok(true)` when all that is required holds.
///
/// # Errors
/// The folder is not there, or printing failed.
pub fn run(command: TuneCommand) -> anyhow::Result<bool> {
    let TuneCommand::Check(args) = command;
    anyhow::ensure!(args.disk.is_dir(), "{} is not a folder; give --disk DIR", args.disk.display());
    let findings = all(&Facts::read(&args.disk));
    match args.output {
        Output::Text => print!("{}", text(&findings)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    Ok(!findings.iter().any(Finding::is_failure))
}

fn text(findings: &[Finding]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["", "CHECK", "VALUE", "WANTED"]);
    for finding in findings {
        table.add_row([finding.mark(), finding.name, &finding.value, &finding.wanted]);
    }
    let rows: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    let fixes: String = findings
        .iter()
        .filter(|finding| finding.verdict != Verdict::Good)
        .map(|finding| format!("\n{}: {}\n  to mend: {}\n", finding.name, finding.why, finding.fix))
        .collect();
    rows + &fixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_this_runs_on_can_be_looked_at() {
        let findings = all(&Facts::read(std::path::Path::new(".")));
        assert!(findings.len() >= 6);
        assert!(text(&findings).contains("io_uring"));
    }
}
