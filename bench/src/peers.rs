//! `ashlar bench peers`: the same workload on what a user would pick instead, on one disk, in one run, by one client.
//!
//! Invariants: what is not installed is named in the result, not left out in silence; beside each figure stands what
//! an acknowledged write is worth there.

use crate::ClusterArgs;
use crate::cluster::{Cluster, VOLUME, ensure_size, wait_settled};
use crate::environment::Environment;
use crate::report::Report;
use crate::rival::{Rival, Server};
use crate::run::load::Load;
use crate::run::measure::{Client, Plan, Subject, prepare};
use crate::run::result::Results;
use crate::run::target::Target;
use crate::run::{results, summary};
use anyhow::{Context, ensure};
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `ashlar bench peers`.
#[derive(Debug, Args)]
#[command(
    after_help = "Servers that are not installed are left out and named. Others can be added, such as Ceph RBD\n\
    through its own NBD server:\n  \
    ashlar bench peers --also 'rbd=nbd+unix:///img?socket=/run/rbd.sock' --also-promises 'rbd=3 copies, durable'\n\n\
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
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_parser = clap::value_parser!(u32).range(1..=127))]
    pub depths: Vec<u32>,
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
    let mut peers = vec![raw, on_volume("ashlar NVMe/TCP", "nvme")?, on_volume("ashlar NBD", "nbd+unix")?];
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
    if !also.iter().any(|peer| peer.subject.name.contains("rbd")) {
        missing.push(ceph());
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
    let (client, rounds, seconds) = (Client::Own, args.rounds, args.seconds.into());
    let plan = Plan { client: &client, subjects: &subjects, loads: &loads, seconds, warm_up: 0.5, rounds };
    let runs = plan.measure()?.into_iter().map(|(run, _)| run).collect();
    let results = results(&plan, environment, runs);
    Ok(report(results, &peers, &missing))
}

fn report(results: Results, peers: &[Peer], missing: &[String]) -> Report {
    let promises = peers.iter().map(|peer| format!("| {} | {} |\n", peer.subject.name, peer.promises));
    let missing = missing.iter().map(|line| format!("- {line}\n")).collect::<String>();
    Report {
        title: "What a user would pick instead",
        command: "ashlar bench peers --write-markdown",
        about: "4 KiB random IO; servers on one machine with the client and one disk, over Unix sockets or loopback.".into(),
        bases: vec![RAW, Server::QemuNbd.name()],
        notes: format!(
            "## What an acknowledged write is worth\n\n| subject | promise |\n|---|---|\n{}\n{missing}",
            promises.collect::<String>()
        )
        .trim_end()
        .to_owned(),
        rows: summary::rows(&results),
        goals: Vec::new(),
        results,
    }
}

fn versions() -> String {
    let known = Server::ALL.into_iter().filter_map(Server::version);
    known.collect::<Vec<_>>().join(", ")
}

/// Why Ceph is not among them.
fn ceph() -> String {
    let here = std::process::Command::new("ceph-osd").arg("--version").output().is_ok();
    let why = if here {
        "its packages are here, but this command starts no Ceph cluster: map an image and name it by --also"
    } else {
        "ceph-osd cannot be run (apt-get install ceph-osd ceph-mon rbd-nbd), and its image is to be named by --also"
    };
    format!("Ceph RBD: not measured: {why}.")
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
        let page = report(results, &peers, &[ceph()]).markdown();
        assert!(page.contains("| a | nothing |") && page.contains("- Ceph RBD: not measured"), "{page}");
        Ok(())
    }
}
