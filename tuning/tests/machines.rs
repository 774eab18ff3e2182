//! Three kinds of machine, and what every tuner says of them under every profile.
//!
//! The expected findings are files beside the machines; `UPDATE_EXPECT=1` writes them anew, and
//! the difference is what a reviewer reads.

use ashlar_tuning::facts::Facts;
use ashlar_tuning::fixture::{MemTree, Recorder};
use ashlar_tuning::look::{Finding, look};
use ashlar_tuning::machine::Machine;
use ashlar_tuning::model::{Profile, Severity, State};
use ashlar_tuning::{docs_page, start, tuners};
use expect_test::{ExpectFile, expect_file};

fn parsed(text: &str) -> (MemTree, Facts) {
    MemTree::parse(text).expect("a machine's file is well formed")
}

const VM: &str = include_str!("machines/vm.tree");
const SERVER: &str = include_str!("machines/numa-server.tree");
const LAPTOP: &str = include_str!("machines/laptop.tree");

fn findings(text: &str, profile: Profile) -> Vec<Finding> {
    let (tree, facts) = parsed(text);
    look(&tuners::all(), &Machine { tree: &tree, facts: &facts, profile }, false)
}

fn check(text: &str, expected: ExpectFile) {
    let mut page = String::new();
    for profile in Profile::ALL {
        page += &format!("## {}\n", profile.word());
        for Finding { tuner, mark, item, .. } in findings(text, profile) {
            let change = item.change.as_ref().map(|c| format!(" => {}", c.new)).unwrap_or_default();
            page +=
                &format!("{mark:<4} {tuner} [{}] {} ({}){change}\n", item.object, item.found, item.wanted);
        }
    }
    expected.assert_eq(&page);
}

#[test]
fn a_virtual_machine_as_captured() {
    check(VM, expect_file!["machines/vm.findings"]);
}

#[test]
fn a_server_of_two_nodes_with_nvme_written_by_hand() {
    check(SERVER, expect_file!["machines/numa-server.findings"]);
}

#[test]
fn a_laptop_written_by_hand() {
    check(LAPTOP, expect_file!["machines/laptop.findings"]);
}

/// The state of a tuner's items.
fn states(text: &str, profile: Profile, tuner: &str) -> Vec<State> {
    findings(text, profile).into_iter().filter(|f| f.tuner == tuner).map(|f| f.item.state).collect()
}

#[test]
fn only_what_is_required_fails_a_check() {
    for (text, failures) in [(VM, vec![]), (SERVER, vec![]), (LAPTOP, vec!["io-uring", "kernel"])] {
        let found = findings(text, Profile::Latency);
        let failed: Vec<_> = found.iter().filter(|f| f.is_failure()).map(|f| f.tuner).collect();
        assert_eq!(failed, failures);
    }
}

#[test]
fn what_a_machine_has_not_is_no_failure() {
    assert_eq!(states(VM, Profile::Latency, "governor"), [State::Unsupported]);
    assert_eq!(states(VM, Profile::Latency, "numa"), [State::Unsupported]);
    assert_eq!(states(LAPTOP, Profile::Latency, "poll-queues"), [State::Unsupported]);
    assert_eq!(states(LAPTOP, Profile::Latency, "nic-irq"), [State::Unsupported]);
}

#[test]
fn a_disk_is_found_through_device_mapper_and_multipath() {
    let (tree, facts) = parsed(SERVER);
    let machine = Machine { tree: &tree, facts: &facts, profile: Profile::Latency };
    assert_eq!(machine.disks().iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["nvme0n1"]);
    assert_eq!(machine.node_of("/sys/block/nvme0n1"), Some(0));
    assert_eq!(machine.irqs("/sys/block/nvme0n1").len(), 8);
}

#[test]
fn an_empty_machine_is_looked_at_without_a_pass_or_a_panic() {
    let (tree, facts) = (MemTree::default(), Facts::default());
    for profile in Profile::ALL {
        let all = look(&tuners::all(), &Machine { tree: &tree, facts: &facts, profile }, true);
        let good: Vec<_> = all.iter().filter(|f| f.item.state == State::Good).map(|f| f.tuner).collect();
        // A kernel without the switch allows io_uring; what cannot be seen of SMT is not there.
        assert_eq!(good, ["io-uring", "smt"]);
        assert!(all.iter().all(|f| f.item.change.is_none()));
    }
}

#[test]
fn a_dev_profile_only_raises_limits() {
    for text in [VM, SERVER, LAPTOP] {
        for finding in findings(text, Profile::Dev) {
            if let Some(change) = finding.item.change {
                let (old, new): (i64, i64) =
                    (finding.item.found.parse().expect("a number"), change.new.parse().expect("a number"));
                assert!(new > old && finding.item.wanted.ends_with("or more"), "{}", finding.tuner);
            }
        }
    }
}

#[test]
fn tcp_buffers_are_never_lowered() {
    let vm = findings(VM, Profile::Throughput);
    let rmem = vm.iter().find(|f| f.item.object == "tcp_rmem").expect("looked at");
    assert_eq!((rmem.item.state, rmem.item.wanted.as_str()), (State::Good, "4096 131072 33554432"));
}

#[test]
fn bbr_gives_way_to_what_the_kernel_has_and_nothing_else_does() {
    let wanted = |text, profile| {
        let found = findings(text, profile).into_iter().find(|f| f.tuner == "tcp-congestion");
        found.expect("looked at").item.change.map(|change| change.new)
    };
    assert_eq!(wanted(VM, Profile::Latency).as_deref(), Some("cubic"));
    assert_eq!(wanted(SERVER, Profile::Throughput).as_deref(), Some("reno"));
    assert_eq!(wanted(LAPTOP, Profile::Latency), None, "it has cubic already");
    assert_eq!(wanted(VM, Profile::Dev), None);
}

#[test]
fn a_starting_target_names_what_costs_it_and_the_command_that_mends_it() {
    let (tree, facts) = parsed(SERVER);
    let lines = start::lines_of(&Machine { tree: &tree, facts: &facts, profile: Profile::Latency });
    let scheduler =
        lines.iter().find(|line| line.starts_with("governor")).expect("the server's governor costs");
    assert!(scheduler.contains("ashlar tune apply governor"), "{scheduler}");
    assert!(lines.iter().all(|line| !line.contains('\n') && line.contains("to mend: ")));
    let optional = tuners::all().into_iter().filter(|t| t.severity == Severity::Optional);
    for tuner in optional {
        assert!(!lines.iter().any(|line| line.starts_with(tuner.name)), "{}", tuner.name);
    }
}

#[test]
fn a_capture_of_a_machine_gives_the_same_findings() {
    for text in [VM, SERVER, LAPTOP] {
        let (tree, facts) = parsed(text);
        let recorder = Recorder::new(&tree);
        let whole = |tree: &dyn ashlar_tuning::tree::Tree| {
            let profiles = Profile::ALL.into_iter();
            let all =
                profiles.map(|profile| look(&tuners::all(), &Machine { tree, facts: &facts, profile }, true));
            all.map(|found| serde_json::to_string(&found).expect("it is data")).collect::<Vec<_>>()
        };
        let first = whole(&recorder);
        let (captured, _) = parsed(&recorder.seen().render(&facts));
        assert_eq!(whole(&captured), first);
    }
}

#[test]
fn the_page_of_the_documents_is_current() {
    // To write it anew: ashlar tune docs > docs/tuning.md
    expect_file!["../../docs/tuning.md"].assert_eq(&docs_page(&tuners::all()));
}
