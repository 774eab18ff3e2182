//! Faults under load, on real processes: killed, stopped, starved of files and space, damaged on disk.
//!
//! Hazards: an acknowledged write that is lost, a read that goes back in time, an IO error where a pause was promised,
//! a process that dies of what its disk or its peers do, damage that is served or that nobody reports.
//!
//! Deliberately absent: power loss. SIGKILL leaves the page cache and the device's cache alive; what needs their loss
//! is the simulator's matter.

use anyhow::{Context, bail, ensure};
use ashlar_tests::cluster::{DevCluster, wait_until, with_cluster};
use ashlar_tests::damage::{Found, Place, find, flip};
use ashlar_tests::metrics;
use ashlar_tests::register::{Attach, Register, finish};
use ashlar_tests::tools::{Run, Running, by_length, fio_verify, have, skip};
use bench::process::is_alive;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// fio writing and verifying for that long through the first target's export.
fn fio_for(cluster: &DevCluster, length: Duration) -> anyhow::Result<Running> {
    let runtime = format!("--runtime={}", length.as_secs());
    let load = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=96M", "--time_based", &runtime];
    fio_verify(&cluster.uri(0)?, &[&load[..], &["--verify_backlog=2048"]].concat()).spawn()
}

fn register(cluster: &DevCluster, seed: u64) -> anyhow::Result<Register> {
    Ok(Register::new(&cluster.scratch(), seed, 8192, &cluster.volume()?.nbd_unix))
}

/// Fails early when the load has already ended: it should outlast the fault.
fn ensure_running(mut load: Running) -> anyhow::Result<Running> {
    if load.is_running()? {
        return Ok(load);
    }
    let ran = load.end()?;
    bail!("the load ended during the fault with {:?}\n{}\n{}", ran.code, ran.stdout, ran.stderr)
}

/// Kills these targets one after another, every 2 s, for as long as said; the supervisor starts them again.
fn kill_in_turn(cluster: &DevCluster, targets: &[usize], length: Duration) -> anyhow::Result<u32> {
    let (started, mut kills) = (Instant::now(), 0);
    for target in targets.iter().cycle() {
        if started.elapsed() >= length {
            break;
        }
        let killed = Instant::now();
        cluster.kill_and_await_restart(*target)?;
        kills += 1;
        std::thread::sleep((2 * SECOND).saturating_sub(killed.elapsed()));
    }
    Ok(kills)
}

#[test]
fn targets_killed_in_turn_cost_a_spared_one_no_io() {
    if !have(&["fio"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let length = by_length(20, 60) * SECOND;
        let fio = fio_for(cluster, length + 4 * SECOND)?;
        std::thread::sleep(SECOND);
        let kills = kill_in_turn(cluster, &[1, 2], length)?;
        eprintln!("{kills} kills");
        ensure_running(fio)?.ok()?;
        cluster.check_replicas()
    });
}

#[test]
fn every_target_killed_in_turn_loses_nothing_for_hosts_that_fail_over() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        for attach in [Attach::One, Attach::All] {
            let mut register = register(cluster, 1)?;
            register.attach = attach;
            let length = by_length(10, 60) * SECOND;
            let load = register.spawn(length + 2 * SECOND)?;
            std::thread::sleep(SECOND);
            let kills = kill_in_turn(cluster, &[0, 1, 2], length)?;
            let summary = finish(load)?;
            ensure!(summary.write > 100, "only {} writes", summary.write);
            ensure!(attach == Attach::One || summary.retried > 0, "{kills} kills met no operation in flight");
        }
        cluster.check_replicas()
    });
}

#[test]
fn all_targets_killed_mid_write_keep_every_acknowledged_write() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let register = register(cluster, 2)?;
        for round in 0..by_length(2, 6) {
            let load = register.spawn_until_dead(60 * SECOND)?;
            std::thread::sleep(Duration::from_millis(1500 + 400 * round));
            let mut load = ensure_running(load)?;
            for target in 0..3 {
                cluster.signal_target(target, Signal::SIGKILL)?;
            }
            wait_until(10 * SECOND, || {
                ensure!(!load.is_running()?, "the load did not notice");
                Ok(())
            })?;
            ensure!(finish(load)?.write > 0, "nothing was written before the kill");
            register.check()?;
        }
        register.run(2 * SECOND)?;
        cluster.check_replicas()
    });
}

/// Processes of the target with this number, from 1, that run.
fn processes_of(cluster: &DevCluster, number: usize) -> anyhow::Result<Vec<i32>> {
    let config = cluster.dir().join(format!("target-{number}")).join("target.toml");
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // Gone since, perhaps.
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if words.split(|byte| *byte == 0).any(|word| word == config.as_os_str().as_encoded_bytes()) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

/// Found when a disk was full: each restart whose record could not be written was done again, and so was each end of
/// each of those processes, until the machine had no more pids.
#[test]
fn a_record_that_cannot_be_written_starts_no_target_twice() {
    with_cluster(DevCluster::start("64M"), |cluster| {
        // Even root cannot write over a directory.
        let in_the_way = cluster.dir().join("dev.json.new");
        std::fs::create_dir(&in_the_way)?;
        let old = cluster.signal_target(1, Signal::SIGKILL)?;
        wait_until(10 * SECOND, || {
            let pids = processes_of(cluster, 2)?;
            ensure!(!pids.is_empty() && !pids.contains(&old), "target 2 was not started again: {pids:?}");
            Ok(())
        })?;
        std::thread::sleep(3 * SECOND);
        let pids = processes_of(cluster, 2)?;
        ensure!(pids.len() == 1, "{pids:?} run target 2");
        std::fs::remove_dir(&in_the_way)?;
        wait_until(10 * SECOND, || {
            let told = cluster.file()?.targets[1].pid;
            ensure!(pids == [told], "the record says {told}, {pids:?} runs");
            Ok(())
        })?;
        cluster.check_replicas()
    });
}

#[test]
fn a_cluster_killed_whole_and_started_again_serves_what_it_acknowledged() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let register = register(cluster, 3)?;
        for round in 0..by_length(2, 6) {
            let load = register.spawn_until_dead(60 * SECOND)?;
            std::thread::sleep(Duration::from_millis(1500 + 400 * round));
            let load = ensure_running(load)?;
            cluster.kill_everything();
            ensure!(finish(load)?.write > 0, "nothing was written before the kill");
            cluster.start_again()?;
            register.check()?;
        }
        // A clean stop is a restart too, and the addresses stay.
        let before = cluster.volume()?;
        cluster.stop()?;
        cluster.start_again()?;
        ensure!(cluster.volume()?.nbd == before.nbd, "the ports changed: {before:?}");
        register.check()?;
        cluster.check_replicas()
    });
}

#[test]
fn io_goes_on_while_the_mds_is_dead() {
    if !have(&["fio", "nbdinfo"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let dead = by_length(5, 20) * SECOND;
        let fio = fio_for(cluster, dead + 5 * SECOND)?;
        std::thread::sleep(2 * SECOND);
        // The supervisor would start it again at once.
        cluster.signal_supervisor(Signal::SIGSTOP)?;
        kill(Pid::from_raw(cluster.file()?.mds.pid), Signal::SIGKILL)?;
        std::thread::sleep(dead / 2);
        for uri in cluster.volume()?.nbd_unix {
            Run::new("nbdinfo")
                .arg("--size")
                .arg(uri)
                .ok()
                .context("a new connection while the MDS is dead")?;
        }
        std::thread::sleep(dead / 2);
        cluster.signal_supervisor(Signal::SIGCONT)?;
        ensure_running(fio)?.ok()?;
        cluster.check_replicas()
    });
}

#[test]
fn a_target_that_hangs_for_five_seconds_costs_no_io() {
    if !have(&["fio"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let fio = fio_for(cluster, 16 * SECOND)?;
        for target in [1, 2] {
            std::thread::sleep(SECOND);
            cluster.signal_target(target, Signal::SIGSTOP)?;
            std::thread::sleep(5 * SECOND);
            cluster.signal_target(target, Signal::SIGCONT)?;
        }
        ensure_running(fio)?.ok()?;
        cluster.check_replicas()
    });
}

/// The sum over all targets of the counters whose names contain `part`.
fn counters(cluster: &DevCluster, part: &str) -> anyhow::Result<f64> {
    let targets = cluster.file()?.targets;
    targets.iter().map(|target| Ok(metrics::sum(&metrics::fetch(&target.metrics)?, part))).sum()
}

fn ensure_counted(cluster: &DevCluster, part: &str) -> anyhow::Result<()> {
    wait_until(20 * SECOND, || {
        let count = counters(cluster, part)?;
        ensure!(count > 0.0, "no counter with `{part}` in its name has counted anything");
        eprintln!("counters with `{part}`: {count}");
        Ok(())
    })
}

#[test]
fn bytes_flipped_in_chunk_files_are_served_right_reported_and_repaired() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let register = register(cluster, 4)?;
        register.run(5 * SECOND)?;
        // What lies in the log alone is another test's.
        let first = cluster.file()?.targets[0].dir.clone();
        wait_until(30 * SECOND, || {
            let count = find(&first, Place::Chunks)?.len();
            ensure!(count >= 1000, "only {count} blocks have reached the chunk files of {}", first.display());
            Ok(())
        })?;
        let dirs: Vec<PathBuf> = cluster.file()?.targets.into_iter().map(|target| target.dir).collect();
        cluster.stop()?;
        flip_one_replica_of_each(&dirs)?;
        cluster.start_again()?;
        register.check()?;
        ensure_counted(cluster, "corrupt")?;
        ensure_counted(cluster, "repair")?;
        cluster.check_replicas()?;
        register.check().map(|_| ())
    });
}

/// Damages one replica of every 16th block: whichever target leads, some of the blocks it reads are damaged.
fn flip_one_replica_of_each(dirs: &[PathBuf]) -> anyhow::Result<()> {
    let mut flipped = 0;
    for (at, dir) in dirs.iter().enumerate() {
        let chosen = |found: &Found| {
            found.block.is_multiple_of(16) && found.block / 16 % dirs.len() as u64 == at as u64
        };
        for found in find(dir, Place::Chunks)?.iter().filter(|found| chosen(found)) {
            flip(found)?;
            flipped += 1;
        }
    }
    eprintln!("{flipped} blocks damaged");
    ensure!(flipped >= 30, "only {flipped} blocks were found to damage");
    Ok(())
}

#[test]
fn bytes_flipped_in_one_log_are_served_right_and_reported() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let register = Register::new(&cluster.scratch(), 5, 64, &cluster.volume()?.nbd_unix);
        let load = register.spawn_until_dead(60 * SECOND)?;
        std::thread::sleep(3 * SECOND);
        let load = ensure_running(load)?;
        let dir = cluster.file()?.targets[1].dir.clone();
        // By SIGKILL, so that the log holds what no checkpoint covers.
        cluster.kill_everything();
        finish(load)?;
        flip_in_the_middle_of_the_tail(find(&dir, Place::Log)?)?;
        cluster.start_again()?;
        register.check()?;
        ensure_counted(cluster, "corrupt")?;
        register.run(2 * SECOND)?;
        cluster.check_replicas()
    });
}

/// Damages writes that are recent, so that replay needs them, yet followed by others, so that they are no torn tail.
fn flip_in_the_middle_of_the_tail(found: Vec<Found>) -> anyhow::Result<()> {
    let mut by_block: BTreeMap<u64, Vec<Found>> = BTreeMap::new();
    for found in found {
        by_block.entry(found.block).or_default().push(found);
    }
    let mut flipped = 0;
    for versions in by_block.values_mut().step_by(8) {
        versions.sort_by_key(|found| std::cmp::Reverse(found.number));
        // The third last write of a block: of 64 blocks in random order, some hundred writes came after it.
        if let Some(found) = versions.get(2) {
            flip(found)?;
            flipped += 1;
        }
    }
    eprintln!("{flipped} blocks damaged");
    ensure!(flipped > 0, "no block was found in the log");
    Ok(())
}

/// Fills disks of 1 GiB under the targets with these numbers, from 1, and returns whether ENOSPC was met.
fn fill_disks(targets: &[usize], must_refuse: bool) {
    if !have(&["python3-libnbd", "qemu-io", "mkfs.ext4"]) {
        return;
    }
    if !geteuid().is_root() {
        return skip("only root may mount the small disk that is to be filled");
    }
    let prepared = DevCluster::prepare("4G").and_then(|mut cluster| {
        for target in targets {
            cluster.mount_small_disk(*target, "1G")?;
        }
        cluster.start_again()?;
        Ok(cluster)
    });
    with_cluster(prepared, |cluster| {
        let pids = cluster.file()?.pids();
        let register = register(cluster, 6)?;
        register.run(3 * SECOND)?;
        let filled = fill(&cluster.uri(0)?, 64, 2048)?;
        eprintln!("filled up to {filled:?} MiB");
        ensure!(filled.is_some() || !must_refuse, "2 GiB fitted on disks of 1 GiB");
        // Overwrites and reads go on, through every export.
        register.run(3 * SECOND)?;
        for uri in cluster.volume()?.nbd_unix {
            qemu_io(&uri, "read -P 0x5a 64M 16M")?;
        }
        ensure!(cluster.file()?.pids() == pids, "a process was started again");
        ensure!(pids.iter().all(|pid| is_alive(*pid)), "a process died");
        Ok(())
    });
}

/// Writes 16 MiB at a time from one MiB to another and returns where no space was left, if it came to that.
fn fill(uri: &str, from_mib: u64, to_mib: u64) -> anyhow::Result<Option<u64>> {
    for at in (from_mib..to_mib).step_by(16) {
        let ran =
            Run::new("qemu-io").args(["-f", "raw", "-c", &format!("write -P 0x5a {at}M 16M"), uri]).end()?;
        let said = format!("{}{}", ran.stdout, ran.stderr);
        if said.contains("No space left") {
            return Ok(Some(at));
        }
        ensure!(ran.code == Some(0) && !said.contains("failed"), "write at {at} MiB: {said}");
    }
    Ok(None)
}

fn qemu_io(uri: &str, command: &str) -> anyhow::Result<()> {
    let ran = Run::new("qemu-io").args(["-f", "raw", "-c", command, uri]).ok()?;
    ensure!(!ran.stdout.contains("failed"), "qemu-io {command}: {}", ran.stdout);
    Ok(())
}

#[test]
fn full_disks_refuse_new_chunks_and_go_on_with_the_old() {
    fill_disks(&[1, 2, 3], true);
}

#[test]
fn one_full_disk_of_three_ends_nothing() {
    // Whether the two others go on alone or the writer is refused is a matter of policy; both are right here.
    fill_disks(&[1], false);
}

#[test]
fn a_low_limit_on_open_files_is_lived_with_or_explained() {
    if !have(&["prlimit", "python3-libnbd"]) {
        return;
    }
    match DevCluster::start_with("1G", |options| options.nofile = Some(256)) {
        Ok(cluster) => with_cluster(Ok(cluster), |cluster| register(cluster, 7)?.run(3 * SECOND).map(|_| ())),
        Err(error) => {
            let text = format!("{error:#}");
            let explained = ["open files", "nofile", "ulimit"].iter().any(|word| text.contains(word));
            assert!(explained, "a start with 256 open files fails and does not say why: {text}");
        }
    }
}
