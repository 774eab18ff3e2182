//! Apply and undo on the machine that runs the tests, as root, with every file compared before and
//! after. What this kernel does not take is a printed skip.
//!
//! One test in one process, so that nothing else of ours changes the machine meanwhile; it puts
//! everything back even when an assertion fails.

use ashlar_tuning::engine::{Applied, Engine, Moment, Undone};
use ashlar_tuning::facts::Facts;
use ashlar_tuning::journal::FileJournal;
use ashlar_tuning::look::items;
use ashlar_tuning::machine::Machine;
use ashlar_tuning::model::{Change, Form, Profile};
use ashlar_tuning::tree::{HostTree, Tree};
use ashlar_tuning::tuners;
use std::collections::BTreeMap;
use std::path::Path;

/// What is set and put back: nothing that could disturb whoever else uses the machine for long.
const NAMES: &[&str] = &[
    "scheduler",
    "nomerges",
    "nr-requests",
    "rq-affinity",
    "wbt",
    "read-ahead",
    "max-sectors",
    "aio-max-nr",
    "busy-poll",
    "backlogs",
    "swappiness",
    "hugepages",
];

/// Puts back what is still open when a test fails.
struct PutBack<'a>(&'a Path, Moment);

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        let Ok(mut journal) = FileJournal::open(self.0) else { return };
        let mut tree = HostTree::default();
        let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: self.1.clone() };
        for line in engine.undo(&[]).unwrap_or_default() {
            eprintln!("put back after a failure: {line:?}");
        }
    }
}

/// Every file that a change of these tuners may touch.
fn touched(facts: &Facts, tree: &HostTree) -> BTreeMap<String, String> {
    let machine = Machine { tree, facts, profile: Profile::Latency };
    let queues = machine.disks().into_iter().flat_map(|disk| {
        let names = tree.list(&disk.queue("")).into_iter();
        names.map(move |name| disk.queue(&name)).collect::<Vec<_>>()
    });
    let settings = [
        "fs/aio-max-nr",
        "net/core/busy_poll",
        "net/core/busy_read",
        "net/core/somaxconn",
        "net/core/netdev_max_backlog",
        "net/ipv4/tcp_max_syn_backlog",
        "vm/swappiness",
        "vm/nr_hugepages",
    ];
    let settings = settings.into_iter().map(|name| format!("/proc/sys/{name}"));
    queues
        .chain(settings)
        .filter_map(|path| Some((tree.read(&path).ok()?, path)))
        .map(|(t, p)| (p, t))
        .collect()
}

#[test]
fn what_this_kernel_takes_is_set_and_put_back_exactly() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: only root may change the machine");
        return Ok(());
    }
    let mut tree = HostTree::default();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let facts = Facts::read(&tree, here, false);
    let boot = tree.read("/proc/sys/kernel/random/boot_id")?;
    let now = Moment { boot, time_s: 0 };
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("journal.jsonl");
    for profile in [Profile::Latency, Profile::Throughput] {
        let before = touched(&facts, &tree);
        let guard = PutBack(&path, now.clone());
        let mut journal = FileJournal::open(&path)?;
        let mut set = 0;
        for name in NAMES {
            let tuner = tuners::find(name).expect("a tuner of the table");
            let found = items(tuner, &Machine { tree: &tree, facts: &facts, profile }, true);
            for item in found {
                let Some(change) = &item.change else {
                    println!("{name} {}: {:?}, {}", item.object, item.state, item.found);
                    continue;
                };
                let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now.clone() };
                match engine.apply(name, &item.object, change)? {
                    Applied::Applied => {
                        set += 1;
                        let reads = tree.read(&change.path)?;
                        assert!(change.form.same(&reads, &change.new), "{name}: {reads}");
                        println!("{name} {}: {} -> {}", item.object, item.found, change.new);
                    }
                    Applied::Refused { why } => println!("SKIPPED {name} {}: refused: {why}", item.object),
                    other => println!("{name} {}: {other:?}", item.object),
                }
            }
        }
        // These read as wanted on many machines: other values that every kernel takes show that
        // they too can be set and put back.
        let queues = Machine { tree: &tree, facts: &facts, profile }.disks();
        let depths = queues.iter().map(|disk| (disk.queue("nr_requests"), "64"));
        for (path, new) in depths.chain([("/proc/sys/net/core/somaxconn".to_owned(), "5000")]) {
            let change = Change::of(&path, new, Form::Words);
            let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now.clone() };
            match engine.apply("forced", "", &change)? {
                Applied::Refused { why } => println!("SKIPPED {}: refused: {why}", change.path),
                applied => {
                    set += usize::from(applied == Applied::Applied);
                    println!("{}: {applied:?} {new}", change.path);
                }
            }
        }
        let lines = Engine { tree: &mut tree, journal: &mut journal, now: now.clone() }.undo(&[])?;
        let back = lines.iter().filter(|line| matches!(line.undone, Undone::PutBack { .. })).count();
        drop((journal, guard));
        assert_eq!(touched(&facts, &tree), before, "every file reads as before");
        println!("{}: {set} set, {back} put back", profile.word());
        if set == 0 {
            println!("SKIPPED: this kernel (or sandbox) takes none of these settings");
        }
    }
    Ok(())
}
