//! One shard's core from its parts: the same for the daemon and for the simulator.
//!
//! Everything here is generic over the reactor. Deliberately absent: configuration files,
//! threads, rings, and how listeners come to be.

use crate::control::ShardPort;
use crate::core_loop::{Core, Port, kind};
use crate::disk::DiskDriver;
use crate::export::Export;
use crate::files::{FileMedia, Files};
use crate::links::Links;
use crate::mem::Mem;
use crate::shard::{Settings, Shard};
use crate::siblings::{self, SiblingEnd};
use chunkstore::{Identity, Layout};
use client::volume::Config as VolumeConfig;
use protocol::control::{Problem, ProblemKind};
use protocol::types::{BLOCK_BYTES, ShardAddr, Span};
use reactor::{Arena, Disk, Listener, Reactor};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use transport::NbdLimits;

/// What one shard is and how it behaves.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    /// Where its files lie.
    pub dir: PathBuf,
    /// Its own place.
    pub me: ShardAddr,
    /// The identity of the disk, drawn when the target was formatted.
    pub disk: [u8; 16],
    /// Sizes of its store.
    pub layout: Layout,
    /// The shortest election time-out.
    pub election_timeout: Span,
    /// How often a leader is heard from.
    pub heartbeat: Span,
    /// How long a copyset is idle before it hibernates.
    pub hibernate_after: Span,
    /// How long a host's request may take; `None` for ever.
    pub io_timeout: Option<Span>,
    /// How fast replicas catch up, in bytes a second; 0: no limit.
    pub catch_up_bytes_s: u64,
}

/// Makes a shard's files, empty.
///
/// # Errors
/// It is formatted already, the sizes cannot work, or the disk refuses.
pub fn format_shard<D: Disk>(disk: &mut D, plan: &ShardPlan) -> Result<(), Problem> {
    let mut files = Files::new(&plan.dir);
    let mut media = FileMedia { files: &mut files, disk };
    let ShardAddr { target, shard } = plan.me;
    let whose = Identity { cluster: [0; 16], disk: plan.disk, target: target.0, shard };
    chunkstore::format(&mut media, &plan.layout, &whose).map_err(|error| cannot("format", &error))
}

/// Recovers a shard's disk and builds its core; `listen` opens the listeners once that is done.
///
/// # Errors
/// The disk cannot be recovered or belongs to another shard, or `listen` fails.
pub fn build_core<R: Reactor>(
    mut reactor: R,
    plan: &ShardPlan,
    port: ShardPort,
    siblings: Vec<SiblingEnd>,
    stop: Arc<AtomicBool>,
    listen: impl FnOnce(&mut R) -> Result<Vec<(Port, Listener)>, Problem>,
) -> Result<Core<R>, Problem> {
    let me = plan.me;
    let mut files = Files::new(&plan.dir);
    let (store, copysets, report) = {
        let mut media = FileMedia { files: &mut files, disk: &mut reactor };
        chunkstore::recover::<Mem, _>(&mut media, &plan.layout)
            .map_err(|error| cannot("recover the disk", &error))?
    };
    for damage in &report.damages {
        tracing::error!(shard = me.shard, damage, "the log is damaged; its replicas rejoin from their peers");
    }
    tracing::info!(
        shard = me.shard,
        copysets = copysets.len(),
        batches = report.batches,
        torn = report.torn_batches,
        "recovered"
    );
    check_owner(&store.identity(), plan)?;
    let (seed, incarnation, now) = (reactor.random(), reactor.random(), reactor.now());
    let settings = Settings {
        me,
        election_timeout: plan.election_timeout,
        heartbeat: plan.heartbeat,
        hibernate_after: plan.hibernate_after,
        catch_up_bytes_s: plan.catch_up_bytes_s,
        seed,
    };
    let layout = store.layout();
    let shard = Shard::new(settings, reactor.arena().clone(), store, copysets, now);
    let disk = DiskDriver::new(kind::DISK, files, &reactor);
    let siblings = siblings::join(siblings, reactor.arena());
    let links = Links::new(kind::LINK, kind::CONNECT, me, incarnation, siblings);
    let export = export(reactor.arena(), plan, &port);
    let listeners = listen(&mut reactor)?;
    Ok(Core::new(reactor, shard, disk, links, export, port, listeners, layout, stop))
}

fn export(arena: &Arena, plan: &ShardPlan, port: &ShardPort) -> Export {
    let arena = arena.capacity_blocks();
    let volume = VolumeConfig {
        me: Some(plan.me),
        io_timeout: plan.io_timeout,
        read_bytes_max: arena * BLOCK_BYTES / 4,
        ..VolumeConfig::default()
    };
    // Clients may fill half of the arena; the rest is for peers, reads and the log.
    let limits = NbdLimits {
        bytes_max: (arena * BLOCK_BYTES / 4).min(16 << 20),
        arena_reserve_blocks: arena / 2,
        ..NbdLimits::default()
    };
    Export::new(kind::NBD, volume, plan.me, limits, port.counters().clone(), port.seat().clone())
}

fn check_owner(found: &Identity, plan: &ShardPlan) -> Result<(), Problem> {
    let ShardAddr { target, shard } = plan.me;
    if found.target == target.0 && found.shard == shard && found.disk == plan.disk {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::WrongCluster,
        format!(
            "the files of shard {shard} belong to another disk (target {}, shard {})",
            found.target, found.shard
        ),
        "directories of two targets were mixed up, or a part was restored from elsewhere",
        "put the right directory back, or format an empty one and let the target be rebuilt from its peers",
    ))
}

pub(crate) fn cannot(what: &str, error: &dyn std::fmt::Display) -> Problem {
    Problem::new(
        ProblemKind::NotReady,
        format!("cannot {what}"),
        error.to_string(),
        "see the cause; `ashlar tune check` looks at what the machine allows",
    )
}
