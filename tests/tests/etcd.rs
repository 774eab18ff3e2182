//! No single point of failure, on real processes: the leaders of etcd and of the MDS die at once, under IO; a
//! leader that was stopped goes on when another one leads.
//!
//! Hazards: IO that waits for the control plane, a control plane that stays away, a deposed leader that writes.

use anyhow::{Context, ensure};
use ashlar_tests::cluster::wait_until;
use ashlar_tests::several::{Part, Several, Shape};
use ashlar_tests::tools::{LONG_LIMIT, fio_verify, have};
use nix::sys::signal::Signal;
use protocol::control::pb::mds_client::MdsClient;
use protocol::control::{Problem, ProblemKind, pb};
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_leaders_of_etcd_and_mds_die_under_io_and_a_deposed_one_writes_nothing() {
    if !have(&["etcd", "fio"]) {
        return;
    }
    let mut cluster = Several::start(Shape { etcd: 3, mds: 3, targets: 3, zones: 0 })
        .unwrap_or_else(|error| panic!("no cluster: {error:#}"));
    let ran = both_die(&mut cluster)
        .and_then(|()| a_stopped_one_goes_on(&mut cluster))
        .and_then(|()| cluster.ashlar(&["volume", "check", "vol0", "--wait", "60"]).limit(LONG_LIMIT).ok())
        .and_then(|_| cluster.stop());
    ran.unwrap_or_else(|error| panic!("{error:#}"));
}

/// The whole control plane's leadership is gone at once, while hosts write.
fn both_die(cluster: &mut Several) -> anyhow::Result<()> {
    let load = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=64M", "--rate_iops=400"];
    let timed = ["--time_based", "--runtime=20", "--verify_backlog=1024", "--output-format=json"];
    let mut fio = fio_verify(&cluster.uri(0, "vol0"), &[&load[..], &timed[..]].concat()).spawn()?;
    std::thread::sleep(4 * SECOND);
    let (etcd, mds) = (Part::Etcd(cluster.etcd_leader()?), Part::Mds(cluster.mds_leader(None)?));
    let began = Instant::now();
    cluster.kill(etcd)?;
    cluster.kill(mds)?;
    wait_until(60 * SECOND, || {
        let create = cluster.ashlar(&["volume", "create", "made-after", "--size", "1G"]);
        create.limit(20 * SECOND).ok().map(drop)
    })?;
    let back = began.elapsed();
    ensure!(fio.is_running()?, "the load ended: {:?}", fio.left()?);
    // The targets have found the new leader, too.
    wait_until(30 * SECOND, || {
        let status = cluster.ashlar(&["status", "-o", "json"]).ok()?.stdout;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let online = status["targets"].as_array().into_iter().flatten().filter(|t| t["online"] == true);
        ensure!(online.count() == 3, "not all targets are back");
        Ok(())
    })?;
    let targets = began.elapsed();
    let told = fio.ok()?.stdout;
    let told: serde_json::Value =
        serde_json::from_str(told.get(told.find('{').unwrap_or(0)..).unwrap_or(""))?;
    let longest = told["jobs"][0]["write"]["clat_ns"]["max"].as_f64().context("fio told no latency")? / 1e6;
    eprintln!(
        "the leaders of etcd and MDS killed: a volume was created {back:.1?} later, all targets were back after \
         {targets:.1?}; the longest write took {longest:.0} ms"
    );
    cluster.launch(etcd)?;
    cluster.launch(mds)
}

/// The leader is stopped for longer than its lease, then goes on with a request that came before.
fn a_stopped_one_goes_on(cluster: &mut Several) -> anyhow::Result<()> {
    let mut old = 0;
    wait_until(30 * SECOND, || {
        old = cluster.mds_leader(None)?;
        Ok(())
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let address = format!("http://{}", cluster.mds(old));
    let endpoint = tonic::transport::Endpoint::from_shared(address)?;
    let mut client = MdsClient::new(runtime.block_on(endpoint.connect())?);
    cluster.signal(Part::Mds(old), Signal::SIGSTOP)?;
    let stale = pb::CreateVolumeRequest { name: "stale".into(), bytes: 1 << 30, ..Default::default() };
    let sent = std::thread::spawn(move || {
        let answer = client.create_volume(stale);
        runtime.block_on(async { tokio::time::timeout(90 * SECOND, answer).await })
    });
    let began = Instant::now();
    wait_until(60 * SECOND, || cluster.mds_leader(Some(old)).map(drop))?;
    eprintln!("the leader was stopped: another one leads {:.1?} later", began.elapsed());
    cluster.ashlar(&["volume", "create", "made-by-the-new-one", "--size", "1G"]).ok()?;
    cluster.signal(Part::Mds(old), Signal::SIGCONT)?;
    let refused = sent.join().map_err(|_| anyhow::anyhow!("the request's thread"))?.context("no answer")?;
    let refused = Problem::from_status(&refused.err().context("a deposed leader made a volume")?);
    ensure!(refused.kind == ProblemKind::NotLeader, "{refused}");
    wait_until(30 * SECOND, || {
        let leader = cluster.mds_leader(None)?;
        ensure!(leader != old, "it leads again at once");
        Ok(())
    })?;
    let volumes = cluster.ashlar(&["volume", "ls"]).ok()?.stdout;
    ensure!(volumes.contains("made-by-the-new-one") && !volumes.contains("stale"), "{volumes}");
    Ok(())
}
