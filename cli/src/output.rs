//! Text for people or JSON for programs, on stdout; everything else goes to stderr.

use crate::problem::Problem;
use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use serde::Serialize;
use std::io::Write;

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The flag of every command that prints.
#[derive(Args, Clone, Copy, Debug)]
pub struct OutputArgs {
    /// How to print.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    output: Format,
}

impl OutputArgs {
    /// Prints `value` as JSON, or the text made of it.
    pub fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Problem> {
        let printed = match self.output {
            Format::Text => text(value).trim_end().to_owned(),
            Format::Json => serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?,
        };
        write_line(&printed)
    }
}

/// A reader that went away (`ashlar status | head -1`) is no failure.
fn write_line(text: &str) -> Result<(), Problem> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::new(format!("cannot print: {error}")))
        }
        _ => Ok(()),
    }
}

/// A table without borders, one line a row.
pub fn table<R: IntoIterator<Item = Vec<String>>>(header: &[&str], rows: R) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}
