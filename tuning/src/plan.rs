//! What apply would do, found without doing it.
//!
//! `apply` looks at each tuner after the changes of those before it, since the kernel sets some
//! files anew when another is written: a new IO scheduler brings its own queue depth. So a plan
//! looks at a tree that has the planned changes in it, and holds a file that the kernel will have
//! reset for wrong whatever it reads now.

use crate::facts::Facts;
use crate::look::{Finding, look};
use crate::machine::Machine;
use crate::model::{Profile, Tuner};
use crate::tree::Tree;
use std::collections::BTreeMap;
use std::io;

/// What a file reads that the kernel will have reset: no setting has this value.
const RESET: &str = "-1";

/// The findings with a change, in the order of applying.
pub fn plan(
    tree: &dyn Tree,
    facts: &Facts,
    profile: Profile,
    tuners: &[&'static Tuner],
    named: bool,
) -> Vec<Finding> {
    let mut planned = Planned { beneath: tree, changed: BTreeMap::new() };
    let mut plan = Vec::new();
    for tuner in tuners {
        for mut finding in look(&[tuner], &Machine { tree: &planned, facts, profile }, named) {
            let Some(change) = &finding.item.change else { continue };
            for (path, _) in &change.collateral {
                planned.changed.insert(path.clone(), RESET.into());
            }
            planned.changed.insert(change.path.clone(), change.new.clone());
            if finding.item.found == RESET {
                finding.item.found = "what the kernel makes of it then".into();
            }
            plan.push(finding);
        }
    }
    plan
}

/// A tree with changes that are not made yet.
struct Planned<'a> {
    beneath: &'a dyn Tree,
    changed: BTreeMap<String, String>,
}

impl Tree for Planned<'_> {
    fn read(&self, path: &str) -> io::Result<String> {
        self.changed.get(path).map_or_else(|| self.beneath.read(path), |text| Ok(text.clone()))
    }
    fn list(&self, path: &str) -> Vec<String> {
        self.beneath.list(path)
    }
    fn resolve(&self, path: &str) -> Option<String> {
        self.beneath.resolve(path)
    }
    fn write(&mut self, _: &str, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
