//! Apply, then undo, is the identity: for any tuners, any profile, any state before, and a crash
//! at any step of either.

use ashlar_tuning::cpus::Cpus;
use ashlar_tuning::engine::{Applied, Engine, Moment, Undone};
use ashlar_tuning::facts::Facts;
use ashlar_tuning::fixture::{MemTree, Node};
use ashlar_tuning::journal::{Journal, Record, open_entries};
use ashlar_tuning::look::items;
use ashlar_tuning::machine::Machine;
use ashlar_tuning::model::{Change, Form, Profile};
use ashlar_tuning::tree::Tree;
use ashlar_tuning::tuners;
use proptest::prelude::*;
use std::cell::Cell;
use std::io;
use std::rc::Rc;

const MACHINES: [&str; 3] = [
    include_str!("machines/vm.tree"),
    include_str!("machines/numa-server.tree"),
    include_str!("machines/laptop.tree"),
];

/// Steps until the power goes. Each write of a file or of the journal is a step, and the power goes
/// before or after its effect.
#[derive(Clone)]
struct Power {
    steps: Rc<Cell<u32>>,
    after: bool,
    /// A journal that is not what it should be: each record is durable only when the next one comes.
    late: bool,
}

impl Power {
    fn forever() -> Self {
        Self::until(u32::MAX, false)
    }
    fn until(steps: u32, after: bool) -> Self {
        Self { steps: Rc::new(Cell::new(steps)), after, late: false }
    }
    fn step(&self, effect: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let left = self.steps.get();
        if left == 0 {
            return Err(io::Error::other("no power"));
        }
        self.steps.set(left - 1);
        if left == 1 && !self.after {
            return Err(io::Error::other("no power"));
        }
        let done = effect();
        if left == 1 { Err(io::Error::other("no power")) } else { done }
    }
}

struct PoweredTree<'a>(&'a mut MemTree, Power);

impl Tree for PoweredTree<'_> {
    fn read(&self, path: &str) -> io::Result<String> {
        self.0.read(path)
    }
    fn list(&self, path: &str) -> Vec<String> {
        self.0.list(path)
    }
    fn resolve(&self, path: &str) -> Option<String> {
        self.0.resolve(path)
    }
    fn write(&mut self, path: &str, text: &str) -> io::Result<()> {
        let Self(tree, power) = self;
        power.step(|| tree.write(path, text))
    }
}

struct PoweredJournal<'a> {
    records: &'a mut Vec<Record>,
    power: Power,
    held: Option<Record>,
}

impl<'a> PoweredJournal<'a> {
    fn new(records: &'a mut Vec<Record>, power: Power) -> Self {
        Self { records, power, held: None }
    }
}

impl Journal for PoweredJournal<'_> {
    fn append(&mut self, record: &Record) -> io::Result<()> {
        let Self { records, power, held } = self;
        power.step(|| {
            let durable = if power.late { held.replace(record.clone()) } else { Some(record.clone()) };
            records.extend(durable);
            Ok(())
        })
    }
    fn records(&self) -> &[Record] {
        self.records
    }
}

fn now() -> Moment {
    Moment { boot: "this".into(), time_s: 1 }
}

/// What `tune apply` does.
fn apply(
    tree: &mut MemTree,
    records: &mut Vec<Record>,
    facts: &Facts,
    profile: Profile,
    names: &[&str],
    power: &Power,
) -> io::Result<usize> {
    let mut tree = PoweredTree(tree, power.clone());
    let mut journal = PoweredJournal::new(records, power.clone());
    Engine { tree: &mut tree, journal: &mut journal, now: now() }.recover()?;
    let mut changed = 0;
    for tuner in tuners::all().into_iter().filter(|tuner| names.contains(&tuner.name)) {
        for item in items(tuner, &Machine { tree: &tree, facts, profile }, true) {
            let Some(change) = &item.change else { continue };
            let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
            let applied = engine.apply(tuner.name, &item.object, change)?;
            changed += usize::from(applied == Applied::Applied);
        }
    }
    Ok(changed)
}

fn undo(tree: &mut MemTree, records: &mut Vec<Record>, power: &Power) -> io::Result<Vec<Undone>> {
    let mut tree = PoweredTree(tree, power.clone());
    let mut journal = PoweredJournal::new(records, power.clone());
    let lines = Engine { tree: &mut tree, journal: &mut journal, now: now() }.undo(&[])?;
    Ok(lines.into_iter().map(|line| line.undone).collect())
}

/// A tree whose settings are what chance makes of them.
fn shuffled(mut tree: MemTree, random: &[u8]) -> MemTree {
    let mut random = random.iter().copied().cycle();
    for (path, node) in &mut tree.nodes {
        let Node::File(text, _) = node else { continue };
        let luck = random.next().unwrap_or(0);
        let settable =
            path.starts_with("/proc/sys/") || path.contains("/queue/") || path.contains("/queues/");
        if text.contains('[') {
            let words: Vec<_> = text.split(' ').map(|word| word.trim_matches(['[', ']'])).collect();
            let nth = usize::from(luck) % words.len();
            let marked = words
                .iter()
                .enumerate()
                .map(|(at, word)| if at == nth { format!("[{word}]") } else { (*word).to_owned() });
            *text = marked.collect::<Vec<_>>().join(" ");
        } else if settable && luck % 2 == 0 && text.parse::<i64>().is_ok() {
            *text = (i64::from(luck) * 40).to_string();
        } else if path.ends_with("scaling_governor") && luck % 2 == 0 {
            *text = "performance".into();
        }
    }
    tree
}

/// Trees that mean the same: the kernel's own spelling of a mask or list may differ.
fn meaning(tree: &MemTree) -> Vec<(String, String)> {
    let text = |(path, node): (&String, &Node)| {
        let Node::File(text, _) = node else { return None };
        let form = match path.rsplit('/').next().unwrap_or_default() {
            "smp_affinity_list" => Form::Cpus,
            "rps_cpus" | "xps_cpus" => Form::Mask,
            _ => Form::Words,
        };
        Some((path.clone(), form.canonical(text)))
    };
    tree.nodes.iter().filter_map(text).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn apply_then_undo_is_the_identity_whenever_the_power_goes(
        machine in 0_usize..3,
        random in prop::collection::vec(any::<u8>(), 64),
        mask in any::<u64>(),
        profile in 0_usize..4,
        second in 0_usize..4,
        crashes in prop::collection::vec((1_u32..60, any::<bool>()), 0..4),
        undo_crashes in prop::collection::vec((1_u32..60, any::<bool>()), 0..4),
    ) {
        let (tree, facts) = MemTree::parse(MACHINES[machine]).expect("well formed");
        let before = shuffled(tree, &random);
        let all = tuners::all();
        let names: Vec<&str> =
            all.iter().enumerate().filter(|(nth, _)| mask >> nth & 1 == 1).map(|(_, t)| t.name).collect();
        let (mut tree, mut records) = (before.clone(), Vec::new());
        for (steps, after) in crashes {
            // Interrupted or not: what comes next must work all the same.
            let _ = apply(&mut tree, &mut records, &facts, Profile::ALL[profile], &names, &Power::until(steps, after));
        }
        apply(&mut tree, &mut records, &facts, Profile::ALL[second], &names, &Power::forever()).expect("power");
        for (steps, after) in undo_crashes {
            let _ = undo(&mut tree, &mut records, &Power::until(steps, after));
        }
        undo(&mut tree, &mut records, &Power::forever()).expect("power");
        prop_assert_eq!(meaning(&tree), meaning(&before));
        prop_assert!(open_entries(&records).is_empty());
    }
}

/// Applies everything to a server, once for each step that may be the last, and undoes it. How many steps there are, and
/// after which of them undo did not bring the machine back.
fn every_last_step(late: bool) -> (u32, Vec<u32>) {
    let (before, mut facts) = MemTree::parse(MACHINES[1]).expect("well formed");
    facts.cpus = Cpus::parse("2-5").expect("well formed");
    let names: Vec<_> = tuners::all().iter().map(|tuner| tuner.name).collect();
    let mut wrong = Vec::new();
    for steps in 1.. {
        let mut finished = false;
        for after in [false, true] {
            let (mut tree, mut records) = (before.clone(), Vec::new());
            let power = Power { late, ..Power::until(steps, after) };
            finished |= apply(&mut tree, &mut records, &facts, Profile::Throughput, &names, &power).is_ok();
            undo(&mut tree, &mut records, &Power::forever()).expect("power");
            if meaning(&tree) != meaning(&before) {
                wrong.push(steps);
            }
        }
        if finished {
            return (steps, wrong);
        }
    }
    unreachable!("an apply has an end");
}

#[test]
fn every_single_step_of_a_whole_apply_may_be_the_last() {
    let (steps, wrong) = every_last_step(false);
    assert!(wrong.is_empty(), "after {wrong:?} of {steps} steps");
    assert!(steps > 60, "only {steps} steps: the server must have much to set");
}

/// That the test above can fail: with a journal that lags behind the files it does, at each change.
#[test]
fn a_journal_that_lags_behind_the_files_does_not_bring_the_machine_back() {
    let (steps, wrong) = every_last_step(true);
    assert!(wrong.len() as u32 > steps / 6, "{} of {steps} steps are seen", wrong.len());
}

fn one_change() -> (MemTree, Change) {
    let (tree, _) = MemTree::parse("/sys/a = 1\n/sys/b = 1\n").expect("well formed");
    (tree, Change::of("/sys/a", "2", Form::Words))
}

#[test]
fn what_others_have_changed_since_is_left_alone() {
    let (mut tree, change) = one_change();
    let mut records = Vec::new();
    let mut journal = PoweredJournal::new(&mut records, Power::forever());
    let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
    assert_eq!(engine.apply("t", "", &change).expect("power"), Applied::Applied);
    engine.tree.write("/sys/a", "3").expect("there");
    let would = engine.would_undo(&[]);
    let lines = engine.undo(&[]).expect("power");
    assert_eq!(would, lines);
    let Undone::LeftAlone { why } = &lines[0].undone else { panic!("{lines:?}") };
    assert!(why.contains("it reads 3, ours was 2") && why.contains("before us: 1"), "{why}");
    assert_eq!(engine.tree.read("/sys/a").expect("there"), "3");
    assert_eq!(engine.undo(&[]).expect("power"), []);
}

#[test]
fn what_was_set_before_a_restart_is_not_undone_after_it() {
    let (mut tree, change) = one_change();
    let mut records = Vec::new();
    let mut journal = PoweredJournal::new(&mut records, Power::forever());
    let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
    engine.apply("t", "", &change).expect("power");
    engine.now.boot = "another".into();
    let lines = engine.undo(&[]).expect("power");
    assert!(matches!(&lines[0].undone, Undone::Nothing { why } if why.contains("restarted")));
    assert_eq!(engine.tree.read("/sys/a").expect("there"), "2");
}

#[test]
fn profiles_applied_one_upon_the_other_are_undone_to_the_beginning() {
    let (mut tree, change) = one_change();
    let mut records = Vec::new();
    let mut journal = PoweredJournal::new(&mut records, Power::forever());
    let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
    engine.apply("t", "", &change).expect("power");
    engine.apply("t", "", &Change { new: "9".into(), ..change }).expect("power");
    let would = engine.would_undo(&[]);
    assert_eq!(would, engine.undo(&[]).expect("power"));
    assert_eq!(engine.tree.read("/sys/a").expect("there"), "1");
}

#[test]
fn a_refusal_changes_nothing_and_leaves_nothing_open() {
    let (mut tree, _) = MemTree::parse("/sys/a !1 = 1\n").expect("well formed");
    let (_, change) = one_change();
    let mut records = Vec::new();
    let mut journal = PoweredJournal::new(&mut records, Power::forever());
    let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
    assert!(matches!(engine.apply("t", "", &change).expect("power"), Applied::Refused { .. }));
    assert!(open_entries(&records).is_empty());
}

#[test]
fn without_a_journal_nothing_is_written() {
    let (mut tree, change) = one_change();
    let mut records = Vec::new();
    let mut journal = PoweredJournal::new(&mut records, Power::until(0, false));
    let mut engine = Engine { tree: &mut tree, journal: &mut journal, now: now() };
    assert!(engine.apply("t", "", &change).is_err());
    assert_eq!(tree.read("/sys/a").expect("there"), "1");
}
