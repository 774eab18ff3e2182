//! The words of tuning: what a tuner is, what it finds, what it would change.
//!
//! Invariants: a tuner is data and one pure function over a [`Machine`], so that its verdict can be
//! tested on a captured machine; a value that cannot be read is never a pass; a change names one
//! file and its new value, which is all that the engine needs to write it and to put it back.
//! Deliberately absent: writing anything (see `engine`).

use crate::machine::Machine;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What a machine is made ready for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// A storage server whose clients wait for each IO: power and fairness are given for latency.
    #[default]
    Latency,
    /// A storage server that is always busy: more is queued and merged.
    Throughput,
    /// A developer's machine: only limits are raised, nothing that others would feel.
    Dev,
    /// A machine shared with other work: what is known to cost nobody anything.
    Conservative,
}

impl Profile {
    /// Every profile, in the order of the documents.
    pub const ALL: [Self; 4] = [Self::Latency, Self::Throughput, Self::Dev, Self::Conservative];

    /// As the command line has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Dev => "dev",
            Self::Conservative => "conservative",
        }
    }

    /// A machine of ours alone, to be driven hard.
    pub fn is_server(self) -> bool {
        matches!(self, Self::Latency | Self::Throughput)
    }
}

/// How much an item matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// A target does not work, or loses its speed altogether, without it.
    Required,
    /// It works, but slower or with less room.
    Recommended,
    /// It helps some machines a little.
    Optional,
}

impl Severity {
    /// For tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Recommended => "recommended",
            Self::Optional => "optional",
        }
    }
}

/// What a tuner may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It can be applied and undone.
    Apply,
    /// The same, but only when it is named: it takes something from others.
    OnDemand,
    /// It looks and says what to do.
    Report,
}

impl Mode {
    /// For tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::OnDemand => "apply when named",
            Self::Report => "report",
        }
    }
}

/// One thing that can be tuned, or looked at.
pub struct Tuner {
    /// As the command line has it.
    pub name: &'static str,
    /// Which group of the documents it is in.
    pub family: &'static str,
    /// What it may do.
    pub mode: Mode,
    /// How much it matters.
    pub severity: Severity,
    /// What it sets or looks at, as a phrase.
    pub what: &'static str,
    /// Why a target wants it.
    pub why: &'static str,
    /// What it may cost.
    pub risk: &'static str,
    /// The files it reads and writes, with capitals for what varies.
    pub places: &'static [&'static str],
    /// What is wanted, by profile, as a phrase.
    pub default: &'static str,
    /// Whether and how it outlives a restart.
    pub reboot: &'static str,
    /// Who recommends it, or where it is described.
    pub sources: &'static [&'static str],
    /// Cheap enough, and telling enough, to be looked at each time a target starts.
    pub at_start: bool,
    /// Looks at the machine.
    pub inspect: fn(&Machine<'_>) -> Vec<Item>,
}

impl Tuner {
    /// How undo works for it, as a phrase.
    pub fn undo(&self) -> &'static str {
        match self.mode {
            Mode::Report => "changes nothing",
            Mode::Apply | Mode::OnDemand => "the old value, if ours is still there",
        }
    }
}

/// The reboot phrase of everything that is a file below /sys or /proc.
pub const GONE_AT_REBOOT: &str = "gone; ashlar-tune.service applies it again";
/// The reboot phrase of what is only looked at.
pub const NOT_OURS: &str = "as the machine has it";

/// How an item stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As wanted.
    Good,
    /// Not as wanted.
    Bad,
    /// It should be there, and could not be read or understood.
    Unknown,
    /// This machine has no such thing. Not a failure.
    Unsupported,
    /// The profile leaves it as it is; shown for information.
    Info,
}

/// How two texts of a file are compared: the kernel does not print what was written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Word by word.
    Words,
    /// The word in brackets: `none [mq-deadline]`.
    Choice,
    /// A hexadecimal mask of processors: `00000000,00000003`.
    Mask,
    /// A list of processors: `0-3,8`.
    Cpus,
}

impl Form {
    /// The text in a form that can be compared, and written to the file.
    pub fn canonical(self, text: &str) -> String {
        match self {
            Self::Words => text.split_whitespace().collect::<Vec<_>>().join(" "),
            Self::Choice => chosen(text).unwrap_or(text.trim()).to_owned(),
            Self::Mask => {
                let digits: String = text.trim().chars().filter(|c| *c != ',').collect();
                let digits = digits.trim_start_matches('0');
                if digits.is_empty() { "0".to_owned() } else { digits.to_lowercase() }
            }
            Self::Cpus => crate::cpus::Cpus::parse(text).map_or_else(|| text.trim().to_owned(), |c| c.list()),
        }
    }

    /// Whether both texts mean the same.
    pub fn same(self, a: &str, b: &str) -> bool {
        self.canonical(a) == self.canonical(b)
    }
}

/// `none [mq-deadline] kyber` -> `mq-deadline`; a single word stands for itself.
pub fn chosen(words: &str) -> Option<&str> {
    let words = words.trim();
    match words.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
        Some((word, _)) => Some(word),
        None => (!words.is_empty() && !words.contains(char::is_whitespace)).then_some(words),
    }
}

/// What is wanted of a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// So much or more: it is never lowered.
    AtLeast(i64),
    /// So much or less: it is never raised.
    AtMost(i64),
    /// Nothing: it is only shown.
    AsItIs,
}

impl Bound {
    /// The number nearest to `found` that is as wanted.
    pub fn apply(self, found: i64) -> i64 {
        match self {
            Self::AtLeast(least) => found.max(least),
            Self::AtMost(most) => found.min(most),
            Self::AsItIs => found,
        }
    }
}

/// One file and its new value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Change {
    /// The file, from the root.
    pub path: String,
    /// What to write.
    pub new: String,
    /// How its texts are compared.
    pub form: Form,
    /// Where the number only has to be large or small enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<Bound>,
    /// Files that the kernel sets anew when this one is written, with how they are compared. They
    /// are put back with it.
    pub collateral: Vec<(String, Form)>,
}

impl Change {
    /// A file that gets a text, and nothing beside it changes.
    pub fn of(path: &str, new: &str, form: Form) -> Self {
        Self { path: path.into(), new: new.into(), form, bound: None, collateral: Vec::new() }
    }
}

/// One finding of a tuner, about one object of the machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Item {
    /// What it is about: `vda`, `eth0`, `irq 36`; empty where there is only one.
    pub object: String,
    /// How it stands.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What is wanted.
    pub wanted: String,
    /// What apply would write; absent where there is nothing to write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// What an operator does about it, where apply does not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Item {
    /// As wanted, or not, with what to do about it.
    pub fn judged(object: &str, good: bool, found: &str, wanted: &str, fix: &str) -> Self {
        let (state, fix) = if good { (State::Good, "") } else { (State::Bad, fix) };
        Self { state, fix: fix.into(), ..Self::info(object, found, wanted) }
    }

    /// Shown, not judged.
    pub fn info(object: &str, found: &str, wanted: &str) -> Self {
        Self {
            object: object.into(),
            state: State::Info,
            found: found.into(),
            wanted: wanted.into(),
            change: None,
            fix: String::new(),
        }
    }

    /// There is no such thing here.
    pub fn unsupported(object: &str, why: &str) -> Self {
        Self { state: State::Unsupported, ..Self::info(object, why, "-") }
    }

    /// It could not be read.
    pub fn unknown(object: &str, why: &str, wanted: &str) -> Self {
        Self { state: State::Unknown, ..Self::info(object, why, wanted) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_way_of_marking_a_choice() {
        assert_eq!(chosen("none [mq-deadline] kyber\n"), Some("mq-deadline"));
        assert_eq!(chosen("none"), Some("none"));
        assert_eq!(chosen("a b"), None);
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn what_the_kernel_prints_differs_from_what_was_written_and_means_the_same() {
        assert!(Form::Choice.same("none", "[none] mq-deadline"));
        assert!(Form::Mask.same("3", "00000000,00000003\n"));
        assert!(!Form::Mask.same("30", "3"));
        assert!(Form::Words.same("4096 87380 6291456", "4096\t87380\t6291456\n"));
        assert!(Form::Cpus.same("0-1", "0,1\n"));
        assert!(!Form::Words.same("12", "1 2"));
    }
}
