//! The page docs/tuning.md, made of the tuners themselves.

use crate::model::Tuner;

const HEAD: &str = include_str!("docs_head.md");

/// The whole page.
pub fn page(tuners: &[&Tuner]) -> String {
    let mut page = HEAD.to_owned();
    page += "\n## Tuners\n\n| tuner | what | where | default | undo | reboot | source |\n| --- | --- | --- | --- | --- | --- | --- |\n";
    for tuner in tuners {
        let cells = [
            format!("`{}`", tuner.name),
            format!("{} ({}, {})", tuner.what, tuner.severity.word(), tuner.mode.word()),
            joined(tuner.places, |place| format!("`{place}`")),
            tuner.default.to_owned(),
            tuner.undo().to_owned(),
            tuner.reboot.to_owned(),
            joined(tuner.sources, str::to_owned),
        ];
        page += &format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    page += "\n## Why, and what it may cost\n";
    let mut family = "";
    for tuner in tuners {
        if tuner.family != family {
            family = tuner.family;
            page += &format!("\n### {}\n\n", capital(family));
        }
        page += &format!("- `{}`: {}. Risk: {}.\n", tuner.name, tuner.why, tuner.risk);
    }
    page
}

fn joined(parts: &[&str], form: impl Fn(&str) -> String) -> String {
    parts.iter().map(|part| form(part)).collect::<Vec<_>>().join("<br>")
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
