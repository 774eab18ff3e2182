//! `ashlar bench peers`: the same workload on what a user would pick instead, on one disk, in one run, by one client.
//!
//! Invariants: what is not installed is named in the result, not left out in silence; beside each figure stands what
//! an acknowledged write is worth there.

use crate::ClusterArgs;
use crate::ceph::{self, Ceph};
use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::environment::Environment;
use crate::fio::Fio;
use crate::report::{Goal, Report};
use crate::rival::{Rival, Server};
use crate::run::load::Load;
use crate::run::measure::{Client, Plan, Subject, prepare, read_once};
use crate::run::measured;
use crate::run::result::Results;
use crate::run::summary::{self, Row, find};
use crate::run::target::Target;
use anyhow::{Context, ensure};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `ashlar bench peers`.
#[derive(Debug, Args)]
#[command(
    after_help = "Servers that are not installed are left out and named. Where Ceph's packages are there (ceph-mon,\n\
    ceph-mgr, ceph-osd, ceph-common), a cluster of three OSDs is started for the run, without its services, and\n\
    measured by fio's engine rbd. Others can be added:\n  \
    ashlar bench peers --also 'other=nbd+unix:///img?socket=/run/o.sock' --also-promises 'other=3 copies, durable'\n\n\
    nbdkit and nbd-server go through the page cache: their reads cost no disk at all while the file fits memory."
)]
pub struct PeersArgs {
    /// The cluster and where results go.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub seconds: u32,
    /// How often each measurement is repeated; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// IOs in flight, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub depths: Vec<u32>,
    /// Start no Ceph cluster, though its packages are there.
    #[arg(long)]
    pub no_ceph: bool,
    /// A further peer, NAME=TARGET as `bench run` takes it; its server is running already.
    #[arg(long, value_name = "NAME=TARGET")]
    pub also: Vec<String>,
    /// What an acknowledged write is worth there.
    #[arg(long, value_name = "NAME=TEXT")]
    pub also_promises: Vec<String>,
    /// Write the result as a Markdown page to this file.
    #[arg(long, value_name = "FILE")]
    pub write_markdown: Option<PathBuf>,
    /// Also a report as one HTML page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

const RAW: &str = "raw";
const NVME: &str = "ashlar NVMe/TCP";

/// A peer and what it promises.
struct Peer {
    subject: Subject,
    promises: String,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`crate::run`].
pub fn run(args: &PeersArgs) -> anyhow::Result<ExitCode> {
    let also = also(&args.also, &args.also_promises)?;
    let cluster = Cluster::open(&args.cluster)?;
    let report = measure(args, &cluster, also)?;
    cluster.close()?;
    if let Some(path) = &args.html {
        crate::report::write(path, &crate::run::html::page(&report.results))?;
    }
    report.publish(&args.cluster, "peers", args.write_markdown.as_deref())
}

fn measure(args: &PeersArgs, cluster: &Cluster, also: Vec<Peer>) -> anyhow::Result<Report> {
    let (size, scratch) = (args.cluster.size, cluster.scratch.path());
    let file = cluster.file()?;
    ensure_size(file.volume(VOLUME)?, size)?;
    let on_volume = |name: &str, protocol| {
        let (target, pids) = (Target::of_dev(protocol, &file)?, file.pids());
        let subject = Subject { name: name.to_owned(), target, pids, flushes: true };
        anyhow::Ok(Peer { subject, promises: "3 copies, each write synced on 2 of them".into() })
    };
    let raw = Peer {
        subject: Subject::file(RAW, &scratch.join("raw.raw")),
        promises: "1 copy; each write synced (O_DSYNC)".into(),
    };
    let mut peers = vec![raw, on_volume(NVME, "nvme")?, on_volume("ashlar NBD", "nbd+unix")?];
    // The second is the same volume.
    prepare(&peers[0].subject, size)?;
    prepare(&peers[1].subject, size)?;
    let (mut servers, mut missing) = (Vec::new(), Vec::new());
    for server in Server::ALL {
        if server.version().is_none() {
            eprintln!("note: {}", server.missing());
            missing.push(format!("{}: not measured: {}.", server.name(), server.missing()));
            continue;
        }
        let rival = Rival::serve(server, scratch, size)?;
        peers.push(Peer { subject: rival.subject(), promises: server.guarantee().into() });
        servers.push(rival);
    }
    let fio = Fio::probe(&scratch.join("fio"), [&ceph::target(scratch)]);
    let ceph = match (args.no_ceph, ceph::missing(), &fio) {
        (true, ..) => Err("left out by --no-ceph".to_owned()),
        (_, Some(why), _) => Err(why),
        (.., Err(why)) => Err(format!("{why:#}")),
        _ => Ok(Ceph::start(scratch, size)?),
    };
    match &ceph {
        Ok(ceph) => {
            let (subject, promises) = (ceph.subject(), ceph::PROMISE.into());
            eprintln!("writing {} MiB of {}", size >> 20, subject.name);
            fio.as_ref().map_or(Ok(()), |fio| fio.fill(&subject.target, size))?;
            peers.push(Peer { subject, promises });
        }
        Err(why) => {
            eprintln!("note: {}: not measured: {why}", ceph::NAME);
            missing.push(format!("{}: not measured: {why}.", ceph::NAME));
        }
    }
    for peer in &also {
        prepare(&peer.subject, size)?;
    }
    peers.extend(also);
    wait_settled(&file);
    let environment = Environment::read(scratch, String::new(), versions());
    let loads: Vec<Load> = [100, 0]
        .iter()
        .flat_map(|reads| args.depths.iter().map(|depth| Load::random_4k(*reads, *depth, size)))
        .collect();
    let subjects: Vec<Subject> = peers.iter().map(|peer| peer.subject.clone()).collect();
    // What takes turns here is the same disk: nobody's turn is to pay for first reads.
    let mut by_us = subjects.iter().filter(|subject| !matches!(subject.target, Target::Rbd(_)));
    by_us.try_for_each(|subject| read_once(subject, size))?;
    let client = fio.map_or(Client::Own, Client::OwnOr);
    let (rounds, seconds) = (args.rounds, args.seconds.into());
    let plan = Plan { warm_up: 0.5, ..Plan::new(&client, &subjects, &loads, seconds, rounds) };
    let results = measured(&plan, environment)?;
    Ok(report(results, &peers, &missing))
}

fn report(results: Results, peers: &[Peer], missing: &[String]) -> Report {
    let rows = summary::rows(&results);
    let promises = peers.iter().map(|peer| format!("| {} | {} |\n", peer.subject.name, peer.promises));
    let ceph = peers.iter().any(|peer| peer.subject.name == ceph::NAME);
    let by_fio = if ceph {
        "Ceph RBD's client is fio's engine rbd, whose librbd does what ours leaves to the targets: its client's CPU is \
         not counted in the goals. Its reads come from BlueStore's cache where that holds the image.\n\n"
    } else {
        ""
    };
    let missing = missing.iter().map(|line| format!("- {line}\n")).collect::<String>();
    Report {
        title: "What a user would pick instead",
        command: "ashlar bench peers --write-markdown",
        about: "4 KiB random IO; servers on one machine with the client and one disk, over Unix sockets or loopback.".into(),
        bases: vec![RAW, Server::QemuNbd.name(), ceph::NAME],
        notes: format!(
            "## What an acknowledged write is worth\n\n| subject | promise |\n|---|---|\n{}\n{by_fio}{missing}",
            promises.collect::<String>()
        )
        .trim_end()
        .to_owned(),
        goals: goals(&rows),
        rows,
        results,
    }
}

/// Against Ceph, where it was measured.
fn goals(rows: &[Row]) -> Vec<Goal> {
    if rows.iter().all(|row| row.subject != ceph::NAME) {
        return Vec::new();
    }
    let both = |row: &Row| {
        let ours = find(rows, NVME, &row.load)?;
        Some((row.load.clone(), ours.iops / row.iops, ours.server_us_per_io? / row.server_us_per_io?))
    };
    let pairs: Vec<(Load, f64, f64)> =
        rows.iter().filter(|row| row.subject == ceph::NAME).filter_map(both).collect();
    let faster = |depth| {
        let writes = |(load, ..): &&(Load, f64, f64)| load.read_percent == 0 && load.depth == depth;
        pairs.iter().find(writes).map(|(_, times, _)| *times)
    };
    let cpu = |reads| {
        let of = pairs.iter().filter(|(load, ..)| load.read_percent == reads);
        of.map(|(.., part)| *part).reduce(f64::max)
    };
    vec![
        Goal::new("write QD1, IOPS at least 6 times Ceph's", faster(1), |times| times >= 6.0),
        Goal::new("write QD32, IOPS at least 12 times Ceph's", faster(32), |times| times >= 12.0),
        Goal::new(
            "servers' CPU a write, at the depth where it is most, at most 0.1 of Ceph's",
            cpu(0),
            |part| part <= 0.1,
        ),
        Goal::new(
            "servers' CPU a read, at the depth where it is most, at most 0.1 of Ceph's",
            cpu(100),
            |part| part <= 0.1,
        ),
    ]
}

fn versions() -> String {
    let known = Server::ALL.into_iter().filter_map(Server::version).chain(ceph::version());
    known.collect::<Vec<_>>().join(", ")
}

/// The further peers of the command line.
fn also(targets: &[String], promises: &[String]) -> anyhow::Result<Vec<Peer>> {
    let split = |text: &String| {
        let (name, rest) = text.split_once('=').with_context(|| format!("`{text}` lacks its NAME="))?;
        anyhow::Ok((name.to_owned(), rest.to_owned()))
    };
    let promises: Vec<(String, String)> = promises.iter().map(split).collect::<anyhow::Result<_>>()?;
    let peer = |text| {
        let (name, target) = split(text)?;
        let promise = promises.iter().find(|(of, _)| *of == name).map(|(_, promise)| promise.clone());
        let promises = promise.with_context(|| {
            format!("what does {name} promise? Say --also-promises '{name}=3 copies, durable'")
        })?;
        Ok(Peer {
            subject: Subject { name, target: target.parse()?, pids: Vec::new(), flushes: false },
            promises,
        })
    };
    let peers: Vec<Peer> = targets.iter().map(peer).collect::<anyhow::Result<_>>()?;
    let of_nobody = promises.iter().find(|(name, _)| peers.iter().all(|peer| peer.subject.name != *name));
    ensure!(
        of_nobody.is_none(),
        "--also-promises for {:?}, which --also does not name",
        of_nobody.map(|one| &one.0)
    );
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_further_peer_must_say_what_it_promises() {
        let target = texts(&["rbd=nbd+unix:///i?socket=/s"]);
        let peers = also(&target, &texts(&["rbd=3 copies, durable"])).expect("complete");
        assert_eq!(
            (peers[0].subject.name.as_str(), peers[0].promises.as_str()),
            ("rbd", "3 copies, durable")
        );
        let error = also(&target, &[]).err().expect("no promise");
        assert!(error.to_string().contains("--also-promises 'rbd="), "{error}");
        assert!(also(&target, &texts(&["rbd=x", "other=y"])).is_err());
        assert!(also(&texts(&["nbd+unix:///i"]), &[]).is_err());
    }

    #[test]
    fn the_page_tells_promises_and_who_was_not_there() -> anyhow::Result<()> {
        let results = Results::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json"))?;
        let peers = [Peer { subject: Subject::file("a", Path::new("/x")), promises: "nothing".into() }];
        let report = report(results, &peers, &["Ceph RBD: not measured".into()]);
        let page = report.markdown();
        assert!(page.contains("| a | nothing |") && page.contains("- Ceph RBD: not measured"), "{page}");
        assert!(
            report.goals.is_empty() && !page.contains("x Ceph"),
            "nothing is compared with who is not there"
        );
        Ok(())
    }

    #[test]
    fn ceph_is_beaten_at_each_depth_and_by_cpu_at_the_worst() -> anyhow::Result<()> {
        let results = Results::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/result-1.json"))?;
        let model = summary::rows(&results)[0].clone();
        let row = |subject: &str, reads, depth, iops, cpu| Row {
            subject: subject.into(),
            load: Load::random_4k(reads, depth, 1 << 20),
            iops,
            server_us_per_io: Some(cpu),
            ..model.clone()
        };
        let mut rows = Vec::new();
        for (reads, depth, theirs, ours) in
            [(0, 1, 500.0, 3100.0), (0, 32, 1000.0, 11_900.0), (100, 1, 2000.0, 9000.0)]
        {
            rows.push(row(ceph::NAME, reads, depth, theirs, 1000.0));
            rows.push(row(NVME, reads, depth, ours, if depth == 32 { 101.0 } else { 50.0 }));
        }
        let found = goals(&rows);
        assert_eq!(found.iter().map(|goal| goal.met).collect::<Vec<_>>(), [true, false, false, true]);
        assert_eq!(found[2].found, Some(0.101));
        assert!(goals(&rows[1..2]).is_empty());
        Ok(())
    }
}
