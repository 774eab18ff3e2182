//! Clients that nobody here wrote, against a dev cluster: nbdinfo, nbdcopy, qemu-img, qemu-io, fio, libnbd.
//!
//! Hazards: an export that describes itself wrongly, data that depends on the export or the client's way of asking,
//! parts of blocks, requests at and beyond every limit.

use anyhow::{Context, ensure};
use ashlar_tests::cluster::{DevCluster, binary, scratch_dir, with_cluster};
use ashlar_tests::tools::{LONG_LIMIT, Run, by_length, fio_verify, have, script};
use bench::dev::DevVolume;
use bench::metrics;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn json(run: Run) -> anyhow::Result<Value> {
    let ran = run.ok()?;
    serde_json::from_str(&ran.stdout).with_context(|| format!("not JSON:\n{}", ran.stdout))
}

/// Every URI of a volume, over TCP and over Unix sockets.
fn all_uris(volume: &DevVolume) -> impl Iterator<Item = &String> {
    volume.nbd.iter().chain(&volume.nbd_unix)
}

#[test]
fn every_export_describes_itself_rightly() {
    if !have(&["nbdinfo"]) {
        return;
    }
    with_cluster(DevCluster::start("1G"), |cluster| {
        let volume = cluster.volume()?;
        ensure!(volume.nbd.len() == 3 && volume.nbd_unix.len() == 3, "not one export a target: {volume:?}");
        ensure!(volume.bytes == 1 << 30, "vol0 has {} bytes", volume.bytes);
        for uri in all_uris(&volume) {
            let info = json(Run::new("nbdinfo").args(["--json", uri]))?;
            check_info(&info, uri, volume.block_bytes)?;
            let size = Run::new("nbdinfo").args(["--size", uri]).ok()?.stdout;
            ensure!(size.trim() == "1073741824", "{uri}: nbdinfo --size says {size}");
            let map = json(Run::new("nbdinfo").args(["--map", "--totals", "--json", uri]))?;
            let totals = map.as_array().context("the map is no list")?.iter();
            let sum: u64 = totals.filter_map(|part| part["size"].as_u64()).sum();
            ensure!(sum == volume.bytes, "{uri}: the map adds up to {sum}: {map}");
            let list = json(Run::new("nbdinfo").args(["--list", "--json", &base_uri(uri)]))?;
            let exports = list["exports"].as_array().context("the list has no exports")?;
            ensure!(exports.iter().any(|export| export["export-name"] == "vol0"), "{uri}: list says {list}");
        }
        unknown_name_is_refused(&volume)
    });
}

fn check_info(info: &Value, uri: &str, block_bytes: u64) -> anyhow::Result<()> {
    ensure!(info["protocol"] == "newstyle-fixed" && info["structured"] == true, "{uri}: {info}");
    let export = &info["exports"][0];
    for flag in ["can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        ensure!(export[flag] == true, "{uri}: {flag} is {}", export[flag]);
    }
    for flag in ["is_read_only", "is_rotational"] {
        ensure!(export[flag] == false, "{uri}: {flag} is {}", export[flag]);
    }
    for (field, expected) in [
        ("export-size", 1 << 30),
        ("block_size_minimum", block_bytes),
        ("block_size_preferred", 4096),
        ("block_size_maximum", 32 * MIB),
    ] {
        ensure!(export[field] == expected, "{uri}: {field} is {}, expected {expected}", export[field]);
    }
    let contexts = export["contexts"].as_array().context("no contexts")?;
    ensure!(contexts.iter().any(|context| context == "base:allocation"), "{uri}: contexts {contexts:?}");
    Ok(())
}

/// A URI of the same server without the export's name.
fn base_uri(uri: &str) -> String {
    uri.replacen("/vol0", "/", 1)
}

fn unknown_name_is_refused(volume: &DevVolume) -> anyhow::Result<()> {
    let uri = volume.nbd_unix[0].replacen("/vol0", "/no-such-volume", 1);
    let ran = Run::new("nbdinfo").arg(&uri).end()?;
    ensure!(ran.code != Some(0), "nbdinfo {uri} succeeds");
    Ok(())
}

#[test]
fn what_a_client_may_rely_on_holds_on_every_export() {
    if !have(&["python3-libnbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let volume = cluster.volume()?;
        conformance(&volume, &volume.nbd_unix)?;
        conformance(&volume, &volume.nbd)
    });
}

fn conformance(volume: &DevVolume, uris: &[String]) -> anyhow::Result<()> {
    let ran = script("conformance.py")?
        .args(["--bytes", &volume.bytes.to_string(), "--block-bytes", &volume.block_bytes.to_string()])
        .args(uris)
        .limit(LONG_LIMIT)
        .ok()?;
    eprintln!("{}", ran.stdout);
    Ok(())
}

#[test]
fn an_image_survives_the_way_in_and_out() {
    if !have(&["nbdcopy", "qemu-img", "sha256sum"]) {
        return;
    }
    with_cluster(DevCluster::start(by_length("256M", "1G")), |cluster| {
        let volume = cluster.volume()?;
        let (image, back) = (cluster.scratch().join("image"), cluster.scratch().join("back"));
        random_file(&image, volume.bytes)?;
        let expected = checksum(&image)?;

        Run::new("nbdcopy").arg("--flush").arg(&image).arg(&volume.nbd_unix[0]).limit(LONG_LIMIT).ok()?;
        Run::new("nbdcopy").arg(&volume.nbd[1]).arg(&back).limit(LONG_LIMIT).ok()?;
        ensure!(checksum(&back)? == expected, "nbdcopy brings back another image than it took in");
        let compare = |uri: &str| qemu_img(&["compare", "-f", "raw", "-F", "raw"]).arg(&image).arg(uri).ok();
        for uri in all_uris(&volume) {
            compare(uri)?;
        }

        random_file(&image, volume.bytes)?;
        let convert = ["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"];
        qemu_img(&convert).arg(&image).arg(&volume.nbd_unix[2]).ok()?;
        compare(&volume.nbd_unix[1])?;
        std::fs::remove_file(&back)?;
        qemu_img(&["convert", "-f", "raw", "-O", "raw", &volume.nbd[0]]).arg(&back).ok()?;
        ensure!(checksum(&back)? == checksum(&image)?, "qemu-img convert brings back another image");

        let info = json(qemu_img(&["info", "--output=json", &volume.nbd_unix[0]]))?;
        ensure!(info["virtual-size"] == volume.bytes, "qemu-img info says {info}");
        let map = json(qemu_img(&["map", "--output=json", "-f", "raw", &volume.nbd_unix[0]]))?;
        let extents = map.as_array().context("the map is no list")?;
        let mapped: u64 = extents.iter().filter_map(|extent| extent["length"].as_u64()).sum();
        ensure!(mapped == volume.bytes, "qemu-img map adds up to {mapped}");
        ensure!(
            extents.iter().all(|extent| extent["zero"] == false),
            "written blocks are called zero: {map}"
        );
        cluster.check_replicas()
    });
}

fn qemu_img(args: &[&str]) -> Run {
    Run::new("qemu-img").args(args).limit(LONG_LIMIT)
}

fn random_file(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, bytes);
    let copied = std::io::copy(&mut random, &mut std::fs::File::create(path)?)?;
    ensure!(copied == bytes, "{copied} of {bytes} random bytes");
    Ok(())
}

fn checksum(path: &Path) -> anyhow::Result<String> {
    let ran = Run::new("sha256sum").arg(path).limit(LONG_LIMIT).ok()?;
    Ok(ran.stdout.split_whitespace().next().context("no checksum")?.to_owned())
}

#[test]
fn patterns_zeroes_and_discards_of_qemu_io_read_back() {
    if !have(&["qemu-io"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let volume = cluster.volume()?;
        let write = |commands: &[&str]| qemu_io(&volume.nbd_unix[0], commands);
        let read = |commands: &[&str]| all_uris(&volume).try_for_each(|uri| qemu_io(uri, commands));
        write(&["write -P 0xa1 0 1M", "write -f -P 0xa2 1M 64k", "write -P 0xa3 16773120 8k", "flush"])?;
        read(&["read -P 0xa1 0 1M", "read -P 0xa2 1M 64k", "read -P 0xa3 16773120 8k", "read -P 0 2M 1M"])?;
        write(&["write -z 64k 128k", "write -z -u 512k 64k", "write -z -f 1M 4k"])?;
        read(&["read -P 0xa1 0 64k", "read -P 0 64k 128k", "read -P 0xa1 192k 320k", "read -P 0 512k 64k"])?;
        read(&["read -P 0 1M 4k", "read -P 0xa2 1028k 60k"])?;
        write(&["write -P 0xa4 8M 1M", "discard 8M 512k", "flush"])?;
        read(&["read -P 0xa4 8704k 512k"])?;
        // nbd-server once zeroed only the first 64 MiB of a longer request; and the last byte must not be passed.
        write(&["write -P 0xb5 100M 72M", "write -z 100M 70M"])?;
        read(&["read -P 0 100M 70M", "read -P 0xb5 170M 2M"])?;
        write(&[
            "aio_write -P 1 200M 64k",
            "aio_write -P 2 204M 64k",
            "aio_write -P 3 208M 64k",
            "aio_flush",
        ])?;
        read(&["read -P 1 200M 64k", "read -P 2 204M 64k", "read -P 3 208M 64k"])?;
        read(&["read 255M 1M"])
    });
}

/// Runs qemu-io commands in order. It exits with 0 after a wrong pattern, so its words are read too.
fn qemu_io(uri: &str, commands: &[&str]) -> anyhow::Result<()> {
    let options = commands.iter().flat_map(|command| ["-c", *command]);
    let ran = Run::new("qemu-io").args(["-f", "raw"]).args(options).arg(uri).ok()?;
    let said = format!("{}{}", ran.stdout, ran.stderr);
    let wrong = ["failed", "Pattern verification", "error"].iter().any(|word| said.contains(word));
    ensure!(!wrong, "qemu-io {commands:?} on {uri}:\n{said}");
    Ok(())
}

#[test]
fn fio_verifies_small_and_large_blocks_through_each_target() {
    if !have(&["fio"]) {
        return;
    }
    with_cluster(DevCluster::start("1G"), |cluster| {
        let volume = cluster.volume()?;
        let size = by_length("--size=128M", "--size=1G");
        fio_verify(&volume.nbd_unix[0], &["--rw=randwrite", "--bs=4k", "--iodepth=32", size]).ok()?;
        fio_verify(&volume.nbd[1], &["--rw=write", "--bs=64k", "--iodepth=16", size]).ok()?;
        fio_verify(&volume.nbd_unix[2], &["--rw=write", "--bs=1M", "--iodepth=8", size]).ok()?;
        fio_verify(
            &volume.nbd[2],
            &["--rw=randrw", "--bsrange=4k-4M", "--blockalign=4k", "--iodepth=8", size],
        )
        .ok()?;
        cluster.check_replicas()
    });
}

#[test]
fn a_volume_of_512_byte_blocks_takes_every_size() {
    if !have(&["fio", "nbdinfo", "python3-libnbd"]) {
        return;
    }
    let cluster = DevCluster::start_with("256M", |options| {
        options.extra = ["--block-size", "512"].map(str::to_owned).to_vec();
    });
    with_cluster(cluster, |cluster| {
        let volume = cluster.volume()?;
        ensure!(volume.block_bytes == 512, "the block size is {}", volume.block_bytes);
        let mixed = ["--rw=randwrite", "--bsrange=512-4M", "--blockalign=512", "--iodepth=8"];
        fio_verify(&volume.nbd_unix[0], &[&mixed[..], &[by_length("--size=64M", "--size=256M")]].concat())
            .ok()?;
        let small = ["--rw=randwrite", "--bs=512", "--iodepth=16", by_length("--size=4M", "--size=32M")];
        fio_verify(&volume.nbd[1], &small).ok()?;
        conformance(&volume, &volume.nbd_unix)?;
        cluster.check_replicas()
    });
}

#[test]
fn the_search_for_settings_tries_a_cluster_of_its_own_to_the_end() -> anyhow::Result<()> {
    let scratch = tempfile::tempdir_in(scratch_dir())?;
    let auto =
        ["tune", "auto", "--trials", "6", "--minutes", "1", "--seconds", "1", "--size", "64M", "-o", "json"];
    let found = json(Run::new(binary()?).args(auto).arg("--scratch").arg(scratch.path()).limit(LONG_LIMIT))?;
    let trials = found["trials"].as_array().context("no trials")?;
    ensure!(trials.iter().all(|trial| trial["score"].as_f64().is_some_and(|score| score > 0.0)), "{found}");
    ensure!(!trials.is_empty() && found["best"]["spin_us_max"].is_u64(), "{found}");
    ensure!(std::fs::read_dir(scratch.path())?.next().is_none(), "it left something behind");
    Ok(())
}

/// A host makes an admin queue, then its IO queue: by turns alone one shard would get the admin queues of all hosts, and the other
/// all of the IO.
#[test]
fn hosts_with_one_io_queue_each_are_spread_over_the_shards() {
    let cluster = DevCluster::start_with("256M", |options| {
        let extra = ["--replicas", "1", "--memory", "--shards", "2"];
        options.extra = extra.map(str::to_owned).to_vec();
    });
    with_cluster(cluster, |cluster| {
        let dir = cluster.dir().display().to_string();
        let load = ["bench", "run", "v=dev:nvme", "--dev", &dir, "--size", "64M", "--seconds", "8"];
        let mut hosts = Vec::new();
        for nth in 0..4 {
            let result = cluster.scratch().join(format!("host-{nth}.json"));
            hosts.push(Run::new(binary()?).args(load).arg("--save").arg(result).spawn()?);
            std::thread::sleep(Duration::from_millis(500));
        }
        let asked = || -> anyhow::Result<[f64; 2]> {
            let text = metrics::fetch(&cluster.file()?.targets[0].metrics)?;
            let of = |shard: &str| {
                let own: Vec<_> = text.lines().filter(|line| line.contains(shard)).collect();
                metrics::sum(&own.join("\n"), "ashlar_pieces_total")
            };
            Ok([of("shard=\"0\""), of("shard=\"1\"")])
        };
        let before = asked()?;
        std::thread::sleep(Duration::from_secs(2));
        let after = asked()?;
        let served = [after[0] - before[0], after[1] - before[1]];
        let share = served[0] / (served[0] + served[1]);
        ensure!((0.2..0.8).contains(&share), "shard 0 has {share:.2} of the hosts' IO: {served:?}");
        hosts.into_iter().try_for_each(|host| host.ok().map(drop))
    });
}

#[test]
fn the_benchmarks_measure_a_running_cluster_and_keep_their_results() {
    if !have(&["fio", "qemu-nbd"]) {
        return;
    }
    with_cluster(DevCluster::start("256M"), |cluster| {
        let results = cluster.scratch().join("results");
        let bench = |what: &str| {
            let run = cluster.ashlar(&["bench", what, "--size", "64M", "--seconds", "1", "-o", "json"]);
            run.arg("--results").arg(&results).limit(LONG_LIMIT)
        };
        let page = cluster.scratch().join("first.md");
        let first = json(bench("first").args(["--rounds", "1"]).arg("--write-markdown").arg(&page))?;
        ensure!(first["rows"].as_array().is_some_and(|rows| rows.len() == 12), "rows: {}", first["rows"]);
        ensure!(first["goals"].as_array().is_some_and(|goals| goals.len() == 3), "goals: {}", first["goals"]);
        let page = std::fs::read_to_string(page)?;
        ensure!(page.contains("| randwrite 4K QD1") && page.contains("volume, 3 replicas"), "{page}");
        let idle = json(bench("idle"))?;
        ensure!(idle["processes"].as_array().is_some_and(|list| list.len() == 4), "{idle}");
        eprintln!("{}", idle["processes"]);
        ensure!(std::fs::read_dir(&results)?.count() == 2, "not both results were kept");
        let goals = Run::new(binary()?)
            .args(["bench", "goals", "--quick", "--size", "64M", "--only", "idle", "-o", "json"]);
        let goals = json(
            goals.arg("--scratch").arg(cluster.scratch()).arg("--results").arg(&results).limit(LONG_LIMIT),
        )?;
        let lines = goals["lines"].as_array().context("no lines")?;
        let shown = lines.iter().filter(|line| line["verdict"] != "not-shown").count();
        ensure!(
            lines.len() == 30 && shown == 2,
            "{shown} of {} lines are of the part asked for",
            lines.len()
        );
        Ok(())
    });
}
