//! What an operator does with targets while hosts are at work, on real processes.
//!
//! Hazards: an IO error where the operator was promised none, leadership that comes back to a target that is being
//! emptied, a drain that is forgotten by a restart.

use anyhow::{Context, ensure};
use ashlar_tests::cluster::{DevCluster, wait_until, with_cluster};
use ashlar_tests::metrics;
use ashlar_tests::several::{Part, Several, Shape};
use ashlar_tests::tools::{LONG_LIMIT, Run, by_length, fio_verify, have};
use bench::report::median;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// What a command of the cluster prints with `-o json`.
fn json(cluster: &DevCluster, args: &[&str]) -> anyhow::Result<Value> {
    let ran = cluster.ashlar(&[args, &["-o", "json"]].concat()).ok()?;
    serde_json::from_str(&ran.stdout).with_context(|| format!("{args:?} printed {}", ran.stdout))
}

/// A number that `ashlar target show` prints.
fn of_target(cluster: &DevCluster, id: u32, key: &str) -> anyhow::Result<u64> {
    let target = json(cluster, &["target", "show", &id.to_string()])?;
    target[key].as_u64().with_context(|| format!("no {key} in {target}"))
}

#[test]
fn a_drained_target_leads_nothing_and_hosts_on_it_see_no_error() {
    if !have(&["fio"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        // Through the export of the very target that is drained, so that its IO draws leadership there.
        let load = ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=96M", "--time_based", "--runtime=20"];
        let mut fio =
            fio_verify(&cluster.uri(1)?, &[&load[..], &["--verify_backlog=2048"]].concat()).spawn()?;
        wait_until(15 * SECOND, || {
            ensure!(
                of_target(cluster, 2, "leaders")? >= 6,
                "its IO has not drawn leadership to target 2 yet"
            );
            Ok(())
        })?;
        json(cluster, &["target", "drain", "2"])?;
        let led = |most: u64| {
            let leaders = of_target(cluster, 2, "leaders")?;
            ensure!(leaders <= most, "target 2 leads {leaders} copysets");
            Ok(())
        };
        wait_until(10 * SECOND, || led(0))?;
        // Two windows of affinity and a restart of the MDS later it is still so.
        kill(Pid::from_raw(cluster.file()?.mds.pid), Signal::SIGKILL)?;
        std::thread::sleep(4 * SECOND);
        wait_until(10 * SECOND, || led(0))?;
        ensure!(json(cluster, &["target", "show", "2"])?["draining"] == true, "the drain was forgotten");
        ensure!(fio.is_running()?, "the load ended: {:?}", fio.left()?);
        fio.ok()?;
        json(cluster, &["target", "undrain", "2"])?;
        ensure!(json(cluster, &["target", "show", "2"])?["draining"] == false);
        cluster.check_replicas()
    });
}

/// The targets that hold replicas, and how many copysets have how many members.
fn replicas(cluster: &DevCluster) -> anyhow::Result<Vec<BTreeSet<u64>>> {
    let status = json(cluster, &["status"])?;
    let copysets = status["copysets"].as_array().context("no copysets")?;
    let members = |copyset: &Value| {
        let members = copyset["members"].as_array().into_iter().flatten();
        members.filter_map(|member| member["target"].as_u64()).collect()
    };
    Ok(copysets.iter().map(members).collect())
}

/// Whether each copyset has three whole replicas, none of them on these targets.
fn ensure_whole_without(cluster: &DevCluster, gone: &[u64]) -> anyhow::Result<()> {
    let status = json(cluster, &["status"])?;
    for (copyset, members) in status["copysets"].as_array().into_iter().flatten().zip(replicas(cluster)?) {
        ensure!(members.len() == 3, "{members:?} hold copyset {}", copyset["id"]);
        ensure!(
            gone.iter().all(|target| !members.contains(target)),
            "{members:?} hold copyset {}",
            copyset["id"]
        );
        ensure!(copyset["degraded"] == false, "degraded: {copyset}");
    }
    Ok(())
}

#[test]
fn a_target_lost_for_good_and_one_drained_leave_everything_whole_without_an_io_error() {
    if !have(&["fio"]) {
        return;
    }
    let cluster = DevCluster::start_with("512M", |options| {
        options.restart = false;
        options.extra.extend(["--targets".into(), "5".into(), "--offline-after".into(), "5".into()]);
    });
    with_cluster(cluster, |cluster| {
        let runtime = format!("--runtime={}", by_length(100, 200));
        let load = [
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--size=128M",
            "--rate_iops=500",
            "--time_based",
            &runtime,
        ];
        let fio = fio_verify(&cluster.uri(0)?, &[&load[..], &["--verify_backlog=2048"]].concat());
        let mut fio = fio.limit(LONG_LIMIT).spawn()?;
        std::thread::sleep(5 * SECOND);
        let began = Instant::now();
        cluster.signal_target(4, Signal::SIGKILL)?;
        wait_until(120 * SECOND, || ensure_whole_without(cluster, &[5]))?;
        eprintln!("whole again {:?} after a target was killed for good", began.elapsed());
        ensure!(fio.is_running()?, "the load ended during the recovery: {:?}", fio.left()?);
        let began = Instant::now();
        json(cluster, &["target", "drain", "2"])?;
        wait_until(120 * SECOND, || ensure_whole_without(cluster, &[2, 5]))?;
        eprintln!("target 2 is empty {:?} after it was drained", began.elapsed());
        // What it held is freed, once nobody can mean it any more.
        wait_until(90 * SECOND, || {
            let used = of_target(cluster, 2, "used_bytes")?;
            ensure!(used == 0, "target 2 holds {used} bytes still");
            Ok(())
        })?;
        fio.ok()?;
        cluster.check_replicas()?;
        // Freed chunks serve the next owner: the target takes part again and is filled.
        json(cluster, &["target", "undrain", "2"])?;
        wait_until(120 * SECOND, || {
            let held = replicas(cluster)?.iter().filter(|members| members.contains(&2)).count();
            ensure!(held >= 7, "target 2 holds {held} replicas");
            ensure_whole_without(cluster, &[5])
        })?;
        cluster.check_replicas()
    });
}

/// What `ashlar volume show` prints of a volume's space: allocated and replicated, in chunks of 16 MiB.
fn chunks_of(cluster: &DevCluster, volume: &str) -> anyhow::Result<(u64, u64)> {
    let shown = json(cluster, &["volume", "show", volume])?;
    let chunks = |key: &str| shown[key].as_u64().map(|bytes| bytes >> 24).context(key.to_owned());
    Ok((chunks("allocated_bytes")?, chunks("replicated_bytes")?))
}

fn ensure_chunks(cluster: &DevCluster, volume: &str, allocated: u64) -> anyhow::Result<()> {
    wait_until(20 * SECOND, || {
        let found = chunks_of(cluster, volume)?;
        ensure!(found == (allocated, 3 * allocated), "{volume} has {found:?} chunks, not {allocated}");
        Ok(())
    })
}

/// What all volumes take up over all replicas, and what targets say is used, in chunks.
fn chunks_of_all(cluster: &DevCluster) -> anyhow::Result<(u64, u64)> {
    let status = json(cluster, &["status"])?;
    let targets = status["targets"].as_array().context("no targets")?;
    let used = targets.iter().filter_map(|target| target["used_bytes"].as_u64()).sum::<u64>();
    Ok((status["space"]["replicated_bytes"].as_u64().context("no space")? >> 24, used >> 24))
}

fn qemu_io(uri: &str, commands: &[&str]) -> anyhow::Result<()> {
    let options = commands.iter().flat_map(|command| ["-c", *command]);
    let ran = Run::new("qemu-io").args(["-f", "raw", "-d", "unmap"]).args(options).arg(uri).ok()?;
    ensure!(!ran.stdout.contains("failed") && !ran.stderr.contains("failed"), "{}{}", ran.stdout, ran.stderr);
    Ok(())
}

/// The parts of a volume that are told as holes, in order.
fn holes(uri: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let ran = Run::new("nbdinfo").args(["--map", "--json", uri]).ok()?;
    let map: Vec<Value> = serde_json::from_str(&ran.stdout)?;
    let hole = |part: &Value| {
        (part["type"] == 3)
            .then(|| (part["offset"].as_u64().unwrap_or(0), part["length"].as_u64().unwrap_or(0)))
    };
    Ok(map.iter().filter_map(hole).collect())
}

#[test]
fn a_volume_gives_its_space_back_when_it_is_trimmed_and_when_the_bin_is_emptied() {
    if !have(&["qemu-io", "nbdinfo"]) {
        return;
    }
    const MIB: u64 = 1 << 20;
    with_cluster(DevCluster::start("256M"), |cluster| {
        let uri = cluster.uri(0)?;
        qemu_io(&uri, &["write -P 0xa1 0 32M", "write -P 0xa2 32M 32M", "flush"])?;
        ensure_chunks(cluster, "vol0", 4)?;
        ensure!(holes(&uri)? == [(64 * MIB, 192 * MIB)], "{:?}", holes(&uri)?);
        // One chunk whole, one in two parts, of one a part only.
        qemu_io(&uri, &["discard 0 16M", "discard 20M 12M", "discard 16M 4M", "discard 40M 8M", "flush"])?;
        let after = [(0, 32 * MIB), (40 * MIB, 8 * MIB), (64 * MIB, 192 * MIB)];
        ensure!(holes(&uri)? == after, "{:?}", holes(&uri)?);
        ensure_chunks(cluster, "vol0", 2)?;
        qemu_io(&cluster.uri(2)?, &["read -P 0 0 32M", "read -P 0xa2 32M 8M", "read -P 0 40M 8M"])?;
        // The next owner of the slots.
        json(cluster, &["volume", "create", "next", "--size", "64M"])?;
        json(cluster, &["export", "add", "next"])?;
        let next = uri.replacen("/vol0", "/next", 1);
        qemu_io(
            &next,
            &["write -P 0xb1 1M 64k", "write -P 0xb1 17M 64k", "read -P 0 0 1M", "read -P 0 18M 46M"],
        )?;
        ensure_chunks(cluster, "next", 2)?;
        // All is accounted for.
        wait_until(10 * SECOND, || {
            let (volumes, targets) = chunks_of_all(cluster)?;
            ensure!(volumes == targets && volumes == 12, "{volumes} of volumes, {targets} on targets");
            Ok(())
        })?;
        cluster.check_replicas()?;
        a_volumes_end(cluster)
    });
}

/// Renamed, put into the bin, taken out again under another name, purged: nothing is left on any replica.
fn a_volumes_end(cluster: &DevCluster) -> anyhow::Result<()> {
    let refused = cluster.ashlar(&["volume", "rm", "next"]).end()?;
    ensure!(refused.code == Some(1), "an exported volume was removed: {refused:?}");
    json(cluster, &["export", "rm", "next"])?;
    json(cluster, &["volume", "rename", "next", "other"])?;
    json(cluster, &["volume", "rm", "other"])?;
    ensure!(cluster.ashlar(&["volume", "show", "other"]).end()?.code == Some(1), "one in the bin is found");
    json(cluster, &["volume", "undelete", "other", "--as", "again"])?;
    ensure_chunks(cluster, "again", 2)?;
    ensure!(cluster.ashlar(&["volume", "rm", "again", "--purge"]).end()?.code == Some(2), "without --yes");
    json(cluster, &["volume", "rm", "again", "--purge", "--yes"])?;
    wait_until(20 * SECOND, || {
        let (volumes, targets) = chunks_of_all(cluster)?;
        ensure!((volumes, targets) == (6, 6), "{volumes} of volumes, {targets} on targets");
        let all = json(cluster, &["volume", "ls", "--all"])?;
        ensure!(all.as_array().is_some_and(|all| all.len() == 1), "{all}");
        Ok(())
    })
}

/// What fio says of one run: the 99th percentile of writes in milliseconds, over all of its jobs.
fn p99_ms(told: &str) -> anyhow::Result<f64> {
    let told: Value = serde_json::from_str(told.get(told.find('{').unwrap_or(0)..).unwrap_or(""))?;
    let of = |job: &Value| job["write"]["clat_ns"]["percentile"]["99.000000"].as_f64();
    let jobs = told["jobs"].as_array().context("no jobs")?;
    let all: Vec<f64> = jobs.iter().filter_map(of).collect();
    ensure!(!all.is_empty(), "fio told no percentiles: {told}");
    Ok(all.iter().sum::<f64>() / all.len() as f64 / 1e6)
}

/// fio on four volumes at once, through two targets that live, for so many seconds.
fn on_four(cluster: &Several, args: &[&str]) -> Run {
    let mut run =
        Run::new("fio").args(["--output-format=json", "--name=global", "--ioengine=nbd", "--verify=crc32c"]);
    run = run.args([
        "--verify_fatal=1",
        "--serialize_overlap=1",
        "--verify_state_save=0",
        "--exitall_on_error=1",
    ]);
    run = run.args(args).limit(LONG_LIMIT);
    for n in 0..4 {
        run =
            run.arg(format!("--name=v{n}")).arg(format!("--uri={}", cluster.uri(n % 2, &format!("vol{n}"))));
    }
    run
}

/// Five targets in three zones, each in a network namespace, under fio with verification on four volumes: one
/// is killed for good, another one drained. Prints how long and how fast the rebuild was, and what hosts noticed.
#[test]
fn five_targets_in_three_zones_lose_one_for_good_and_are_drained_of_another_under_verified_io() {
    if !have(&["fio"]) {
        return;
    }
    let shape = Shape { etcd: 0, mds: 1, targets: 5, zones: 3 };
    let mut cluster = Several::start(shape).unwrap_or_else(|error| panic!("no cluster: {error:#}"));
    let ran = lose_and_drain(&mut cluster).and_then(|()| cluster.stop());
    ran.unwrap_or_else(|error| panic!("{error:#}"));
}

fn lose_and_drain(cluster: &mut Several) -> anyhow::Result<()> {
    for n in 1..4 {
        cluster.create_volume(&format!("vol{n}"), "256M")?;
    }
    let size = by_length("--size=96M", "--size=240M");
    on_four(cluster, &["--rw=write", "--bs=128k", "--iodepth=4", size]).ok().context("fio's first pass")?;
    let status = |cluster: &Several| -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&cluster.ashlar(&["status", "-o", "json"]).ok()?.stdout)?)
    };
    ensure!(status(cluster)?["pools"][0]["failure_domain"] == "zone", "three replicas in three zones");
    let load = |cluster: &Several, seconds: u32| {
        let runtime = format!("--runtime={seconds}");
        let steady = ["--rw=randwrite", "--bs=4k", "--iodepth=2", "--rate_iops=100", "--verify_backlog=512"];
        on_four(cluster, &[&steady[..], &["--time_based", size, &runtime]].concat())
    };
    // Before and during the rebuild alike: runs of 2 s, of which the first IOs are a part.
    let p99 = |cluster: &Several| -> anyhow::Result<f64> { p99_ms(&load(cluster, 2).ok()?.stdout) };
    let runs = (0..by_length(5, 15)).map(|_| p99(cluster));
    let before = median(runs.collect::<anyhow::Result<Vec<_>>>()?);
    let filled = |cluster: &Several| -> anyhow::Result<f64> {
        let pages = (0..4).map(|n| cluster.metrics(n)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(pages.iter().map(|page| metrics::sum(page, "ashlar_catch_up_blocks_total") * 4096.0).sum())
    };
    let already = filled(cluster)?;
    // The fifth leads none of fio's exports. A host's pause at the kill is an election, not the rebuild.
    cluster.kill(Part::Target(4))?;
    let killed = Instant::now();
    let outstanding = |cluster: &Several| -> anyhow::Result<u64> {
        status(cluster)?["outstanding"].as_u64().context("no count of replicas to move")
    };
    wait_until(60 * SECOND, || {
        ensure!(outstanding(cluster)? > 0, "nothing is rebuilt yet");
        Ok(())
    })?;
    let began = Instant::now();
    let mut during = Vec::new();
    let whole = |cluster: &Several, gone: &[u64]| -> anyhow::Result<()> {
        let status = status(cluster)?;
        for copyset in status["copysets"].as_array().into_iter().flatten() {
            let members: Vec<u64> = copyset["members"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|m| m["target"].as_u64())
                .collect();
            ensure!(members.len() == 3 && copyset["degraded"] == false, "{copyset}");
            ensure!(!members.iter().any(|target| gone.contains(target)), "{copyset}");
        }
        Ok(())
    };
    while let Err(error) = whole(cluster, &[5]) {
        ensure!(killed.elapsed() < by_length(150, 600) * SECOND, "not whole again: {error:#}");
        during.push(p99(cluster).context("IO failed during the rebuild")?);
    }
    let (rebuilt, bytes) = (began.elapsed().as_secs_f64(), filled(cluster)? - already);
    let worst = during.iter().copied().fold(0.0, f64::max);
    let runs = during.len();
    let during = if during.is_empty() { before } else { median(during) };
    eprintln!(
        "whole again {:.1?} after the kill; rebuilt {:.0} MiB in {rebuilt:.1} s: {:.1} MiB/s. p99 of writes: \
         {before:.1} ms before, {during:.1} ms during (medians of runs of 2 s, {runs} of them; the worst {worst:.1} ms): \
         {:.2} times",
        killed.elapsed(),
        bytes / 1048576.0,
        bytes / 1048576.0 / rebuilt,
        during / before
    );
    ensure!(bytes > 0.0, "nothing was filled");
    let mut fio = load(cluster, by_length(12, 40)).spawn()?;
    let began = Instant::now();
    cluster.ashlar(&["target", "drain", "3"]).ok()?;
    wait_until(by_length(120, 600) * SECOND, || whole(cluster, &[3, 5]))?;
    eprintln!("target 3 is empty {:.1?} after it was drained", began.elapsed());
    ensure!(fio.is_running()? || fio.left()?.0 == Some(0), "IO failed during the drain: {:?}", fio.left()?);
    fio.ok().context("IO during the drain")?;
    for n in 0..4 {
        let volume = format!("vol{n}");
        cluster.ashlar(&["volume", "check", &volume, "--wait", "60"]).limit(LONG_LIMIT).ok()?;
    }
    Ok(())
}
