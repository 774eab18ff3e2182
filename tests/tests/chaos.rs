//! The short variant of `cargo xtask chaos`: a new seed each time, printed first.

use ashlar_tests::chaos::{Options, possible, run};
use ashlar_tests::cluster::{binary, machine_lock, scratch_dir};
use ashlar_tests::tools::{by_length, have, skip};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[test]
fn nothing_acknowledged_is_lost_to_failing_processes_networks_and_disks() {
    if let Err(why) = possible() {
        return skip(&why);
    }
    if !have(&["fio", "python3-libnbd", "nft"]) {
        return;
    }
    let _lock = machine_lock().expect("the machine's lock");
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |at| at.as_secs());
    let dir = tempfile::Builder::new().prefix("ashlar-chaos-").tempdir_in(scratch_dir()).expect("a folder");
    let length = Duration::from_secs(by_length(40, 600));
    let bin = binary().expect("a binary");
    eprintln!("chaos seed {seed}");
    let options = Options { seed, length, bin, dir: dir.path().to_owned(), only: Vec::new() };
    let report = run(&options).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
    eprintln!("{report:#?}");
    report.skipped.iter().filter(|why| why.contains("not installed")).for_each(|why| skip(why));
}
