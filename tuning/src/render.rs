//! Results for people: aligned tables, with colour where a terminal wants it.
//!
//! Colour is off when stdout is no terminal, when `NO_COLOR` is set to anything, and for
//! `TERM=dumb`. Deliberately absent: meaning in colour alone; each mark is a word.

use crate::engine::{Applied, UndoLine, Undone};
use crate::look::Finding;
use crate::model::{State, Tuner};
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use std::env;
use std::io::IsTerminal;

/// Columns of the narrowest terminal that tables are fitted into. Some have no size at all: those that `script`,
/// `docker run -t` and continuous integration make.
const WIDTH_MIN: u16 = 40;

/// How text is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Whether to colour.
    pub colour: bool,
    /// Columns of the terminal; absent where lines may be of any length.
    pub width: Option<u16>,
}

impl Style {
    /// As stdout wants it.
    pub fn of_stdout() -> Self {
        let is_terminal = std::io::stdout().is_terminal();
        let no_colour = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
        let width = Table::new().width().filter(|width| is_terminal && *width >= WIDTH_MIN);
        Self { colour: is_terminal && !no_colour && !dumb, width }
    }

    /// A table without borders, one line a row.
    pub fn table(self, header: &[&str], rows: Vec<Vec<Cell>>) -> String {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        if let Some(width) = self.width {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        table.set_header(header.iter().map(|word| Cell::new(word).add_attribute(Attribute::Bold)));
        table.add_rows(rows);
        table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

fn mark_cell(finding: &Finding) -> Cell {
    let cell = Cell::new(finding.mark);
    match finding.mark {
        "ok" => cell.fg(Color::Green),
        "FAIL" => cell.fg(Color::Red).add_attribute(Attribute::Bold),
        "warn" => cell.fg(Color::Yellow),
        "hint" => cell.fg(Color::Cyan),
        _ => cell.fg(Color::DarkGrey),
    }
}

/// `nr-requests vda`
fn subject(tuner: &str, object: &str) -> String {
    if object.is_empty() { tuner.to_owned() } else { format!("{tuner} {object}") }
}

/// What `check` prints: every finding, then what to do about those that are not well.
pub fn findings(style: Style, findings: &[Finding], all: bool) -> String {
    let shown = findings.iter().filter(|f| all || !matches!(f.item.state, State::Unsupported | State::Info));
    let row = |finding: &Finding| {
        let Finding { tuner, item, .. } = finding;
        vec![
            mark_cell(finding),
            Cell::new(subject(tuner, &item.object)),
            Cell::new(&item.found),
            Cell::new(&item.wanted),
        ]
    };
    let mut text = style.table(&["", "ITEM", "FOUND", "WANTED"], shown.map(row).collect());
    let hidden = findings.iter().filter(|f| matches!(f.item.state, State::Unsupported | State::Info)).count();
    if !all && hidden > 0 {
        text +=
            &format!("\n{hidden} more are not there on this machine or left as they are; --all shows them\n");
    }
    text + &mends(findings)
}

fn mends(findings: &[Finding]) -> String {
    let bad = || findings.iter().filter(|finding| finding.item.state == State::Bad);
    let mut text = String::new();
    let mut names: Vec<&str> = bad().filter(|f| f.item.change.is_some()).map(|f| f.tuner).collect();
    names.dedup();
    if !names.is_empty() {
        text += "\nto mend at once, and take back with `sudo ashlar tune undo`:\n";
        text += &format!("  sudo ashlar tune apply {}\n", names.join(" "));
    }
    let by_hand: Vec<_> = bad().filter(|f| f.item.change.is_none()).collect();
    if !by_hand.is_empty() {
        text += "\nto mend by hand (`ashlar tune explain NAME` tells why):\n";
    }
    for finding in by_hand {
        text += &format!("  {}: {}\n", subject(finding.tuner, &finding.item.object), finding.mend);
    }
    text
}

/// What `list` prints.
pub fn list(style: Style, tuners: &[&Tuner]) -> String {
    let row = |tuner: &&Tuner| {
        vec![
            Cell::new(tuner.name).add_attribute(Attribute::Bold),
            Cell::new(tuner.family),
            Cell::new(tuner.mode.word()),
            Cell::new(tuner.severity.word()),
            Cell::new(tuner.what),
        ]
    };
    style.table(&["TUNER", "FAMILY", "MODE", "SEVERITY", "WHAT"], tuners.iter().map(row).collect())
}

/// What `explain` prints.
pub fn explain(tuner: &Tuner) -> String {
    let mut rows = vec![
        ("what", tuner.what.to_owned()),
        ("why", tuner.why.to_owned()),
        ("risk", tuner.risk.to_owned()),
        ("mode", tuner.mode.word().to_owned()),
        ("severity", tuner.severity.word().to_owned()),
        ("default", tuner.default.to_owned()),
        ("undo", tuner.undo().to_owned()),
        ("reboot", tuner.reboot.to_owned()),
    ];
    rows.extend(tuner.places.iter().map(|place| ("where", (*place).to_owned())));
    rows.extend(tuner.sources.iter().map(|source| ("source", (*source).to_owned())));
    let lines = rows.into_iter().map(|(name, text)| format!("  {name:<9} {text}\n"));
    format!("{} ({})\n{}", tuner.name, tuner.family, lines.collect::<String>())
}

/// One change, for `apply`.
pub struct ApplyLine<'a> {
    /// Whose it is.
    pub tuner: &'a str,
    /// What it is about.
    pub object: &'a str,
    /// The old value.
    pub old: &'a str,
    /// The new one.
    pub new: &'a str,
    /// How it ended; absent for a dry run.
    pub applied: Option<&'a Applied>,
}

/// What `apply` prints.
pub fn applied(style: Style, lines: &[ApplyLine<'_>]) -> String {
    if lines.is_empty() {
        return "nothing to change: everything is as wanted, or not there on this machine\n".into();
    }
    let row = |line: &ApplyLine<'_>| {
        let (mark, colour, note) = match line.applied {
            None => ("would", Color::Cyan, String::new()),
            Some(Applied::Applied) => ("set", Color::Green, String::new()),
            Some(Applied::Already) => ("ok", Color::Green, "as wanted already".into()),
            Some(Applied::Differs { left }) => {
                ("partly", Color::Yellow, format!("the kernel made it {left}"))
            }
            Some(Applied::Refused { why }) => {
                ("refused", Color::DarkGrey, format!("not on this machine: {why}"))
            }
        };
        vec![
            Cell::new(mark).fg(colour),
            Cell::new(subject(line.tuner, line.object)),
            Cell::new(line.old),
            Cell::new(line.new),
            Cell::new(note),
        ]
    };
    style.table(&["", "ITEM", "WAS", "NOW", "NOTE"], lines.iter().map(row).collect())
}

/// What `undo` prints.
pub fn undone(style: Style, lines: &[UndoLine], would: bool) -> String {
    if lines.is_empty() {
        return "nothing to undo: nothing of ours is set\n".into();
    }
    let row = |line: &UndoLine| {
        let (mark, colour, note) = match &line.undone {
            Undone::PutBack { old } if would => ("would put back", Color::Cyan, old.clone()),
            Undone::PutBack { old } => ("put back", Color::Green, old.clone()),
            Undone::LeftAlone { why } => ("left alone", Color::Yellow, why.clone()),
            Undone::Nothing { why } => ("nothing", Color::DarkGrey, why.clone()),
        };
        vec![Cell::new(mark).fg(colour), Cell::new(subject(&line.tuner, &line.object)), Cell::new(note)]
    };
    style.table(&["", "ITEM", "VALUE OR REASON"], lines.iter().map(row).collect())
}
