//! Looking at a machine through tuners: findings in one list, ready to be printed or judged.

use crate::machine::Machine;
use crate::model::{Item, Mode, Severity, State, Tuner};
use serde::Serialize;

/// One finding with the tuner it is of.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The tuner's name.
    pub tuner: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What the tuner may do.
    pub mode: Mode,
    /// `ok`, `FAIL`, `warn`, `hint`, `?`, `n/a` or `info`.
    pub mark: &'static str,
    /// What was found.
    #[serde(flatten)]
    pub item: Item,
    /// The command or step that mends it; empty where there is nothing to mend.
    pub mend: String,
}

impl Finding {
    /// Required, and not there.
    pub fn is_failure(&self) -> bool {
        self.severity == Severity::Required && self.item.state == State::Bad
    }
}

/// What a tuner finds. What takes something from others is not missed unless it was named.
pub fn items(tuner: &Tuner, machine: &Machine<'_>, named: bool) -> Vec<Item> {
    let mut items = (tuner.inspect)(machine);
    if tuner.mode == Mode::OnDemand && !named {
        for item in items.iter_mut().filter(|item| item.state == State::Bad) {
            *item = Item::info(&item.object, &item.found, "only when named");
        }
    }
    items
}

/// Everything that these tuners find.
pub fn look(tuners: &[&'static Tuner], machine: &Machine<'_>, named: bool) -> Vec<Finding> {
    let of = |tuner: &&'static Tuner| {
        let tuner = *tuner;
        items(tuner, machine, named).into_iter().map(move |item| finding(tuner, item, machine))
    };
    tuners.iter().flat_map(of).collect()
}

fn finding(tuner: &'static Tuner, item: Item, machine: &Machine<'_>) -> Finding {
    let mend = match (item.state, &item.change) {
        (State::Bad, Some(_)) => {
            format!("sudo ashlar tune apply {} --profile {}", tuner.name, machine.profile.word())
        }
        (State::Bad, None) => item.fix.clone(),
        _ => String::new(),
    };
    Finding {
        tuner: tuner.name,
        severity: tuner.severity,
        mode: tuner.mode,
        mark: mark(item.state, tuner.severity),
        item,
        mend,
    }
}

fn mark(state: State, severity: Severity) -> &'static str {
    match (state, severity) {
        (State::Good, _) => "ok",
        (State::Bad, Severity::Required) => "FAIL",
        (State::Bad, Severity::Recommended) => "warn",
        (State::Bad, Severity::Optional) => "hint",
        (State::Unknown, _) => "?",
        (State::Unsupported, _) => "n/a",
        (State::Info, _) => "info",
    }
}
