//! What a target asks at its start: the disk's limits, and what on this machine costs it speed.
//!
//! Cheap on purpose: some dozen small files, no search through processes. Never an error: a target
//! starts on a badly set-up machine too, and says so.

use crate::cpus::Cpus;
use crate::device::{Device, Limits};
use crate::facts::Facts;
use crate::latency::LatencyHold;
use crate::look::{Finding, look};
use crate::machine::Machine;
use crate::model::{Item, Profile, Severity, State};
use crate::tree::{HostTree, Tree};
use crate::tuners;
use std::path::Path;

/// What a target knows about itself.
pub struct Start<'a> {
    /// The folder of its data.
    pub dir: &'a Path,
    /// The processors its shards are pinned to.
    pub cpus: &'a [usize],
    /// Its shards.
    pub shards: u16,
}

/// What a target is told at its start.
#[derive(Debug, Default)]
pub struct AtStart {
    /// What `device.toml` says; absent when there is none or it is not usable.
    pub limits: Option<Limits>,
    /// One line for each thing that costs performance, with the command that mends it.
    pub lines: Vec<String>,
    /// To be kept while the target runs.
    pub hold: Option<LatencyHold>,
}

/// Looks at the host.
pub fn at_start(start: &Start<'_>) -> AtStart {
    let tree = HostTree::default();
    let mut told = AtStart { lines: lines(&tree, start), ..AtStart::default() };
    match Device::load(start.dir) {
        Ok(device) => told.limits = device.map(|device| device.limits),
        Err(error) => {
            let dir = start.dir.display();
            told.lines.push(format!("{error:#}; defaults are used; to mend: ashlar tune probe {dir}"))
        }
    }
    if let Some(us) = told.limits.and_then(|limits| limits.cpu_latency_us_max) {
        match LatencyHold::take(us) {
            Ok(hold) => told.hold = Some(hold),
            Err(error) => told.lines.push(format!(
                "/dev/cpu_dma_latency cannot be held at {us} us ({error}), so that idle processors sleep deeply; \
                 to mend: run the target as root or let its group write that device"
            )),
        }
    }
    told
}

fn lines(tree: &dyn Tree, start: &Start<'_>) -> Vec<String> {
    let mut facts = Facts::read(tree, start.dir, false);
    facts.cpus = Cpus(start.cpus.iter().filter_map(|cpu| u32::try_from(*cpu).ok()).collect());
    facts.shards = u32::from(start.shards);
    lines_of(&Machine { tree, facts: &facts, profile: Profile::Latency })
}

/// The lines for a machine.
pub fn lines_of(machine: &Machine<'_>) -> Vec<String> {
    let cheap: Vec<_> = tuners::all().into_iter().filter(|tuner| tuner.at_start).collect();
    let costs = |f: &Finding| f.item.state == State::Bad && f.severity <= Severity::Recommended;
    let line = |finding: &Finding| {
        let why = tuners::find(finding.tuner).map_or("", |tuner| tuner.why);
        let Finding { tuner, item, mend, .. } = finding;
        let of = if item.object.is_empty() { String::new() } else { format!(" of {}", item.object) };
        let Item { found, wanted, .. } = item;
        format!("{tuner}{of} costs speed: found {found}, wanted {wanted} ({why}); to mend: {mend}")
    };
    look(&cheap, machine, false).iter().filter(|finding| costs(finding)).map(line).collect()
}
