//! Every kept input of every decoder, and some thousand made ones, the same each time.

use ashlar_tests::fuzz::plain::{Until, run};
use ashlar_tests::fuzz::{TARGETS, plain};
use peak_alloc::PeakAlloc;
use std::collections::BTreeSet;
use std::sync::Mutex;

#[global_allocator]
static HELD: PeakAlloc = PeakAlloc;
/// Memory is counted for the process, so one target at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn decoders_keep_their_promises() {
    let _only = ONE_AT_A_TIME.lock();
    let mut bad = Vec::new();
    for target in TARGETS {
        let inputs = if target.name.starts_with("disk") { 300 } else { 2000 };
        if let Err(found) = run(target, 1, Until::Inputs(inputs), &HELD, None).expect("the corpus is read") {
            bad.push(format!("{}: {} by {:02x?}", target.name, found.why, found.input));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn every_target_has_a_corpus_and_every_corpus_a_target() {
    let _only = ONE_AT_A_TIME.lock();
    let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names.len(), TARGETS.len(), "two targets of one name");
    let root = plain::corpus_folder(&TARGETS[0]).parent().expect("a folder").to_owned();
    let folders = std::fs::read_dir(root).expect("tests/fuzz").map(|f| f.expect("a folder").file_name());
    let folders: BTreeSet<String> = folders.map(|name| name.to_string_lossy().into_owned()).collect();
    assert_eq!(folders, names);
}
