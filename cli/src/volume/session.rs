//! `ashlar volume attach|detach`: who may use a volume.
//!
//! The MDS decides and remembers; a target then raises the volume's fence in each of its copysets. Only when that
//! is committed everywhere is a command done: from then on nothing of whoever was ended takes effect. A command
//! that was broken off is simply repeated.

use super::{OneArgs, Shown};
use crate::problem::{Exit, Outcome, Problem};
use clap::Args;
use client::control::{AdminClient, MdsClient, Patience, volume_ref};
use protocol::control::pb;
use protocol::types::VolumeId;
use serde::Serialize;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two rounds of asking.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one target may take to raise a fence; it gives up after 5 s, and is asked again.
const FENCE_CALL: Duration = Duration::from_secs(7);
/// How long targets that are online are waited for to have the map.
const MAP_WAIT: Duration = Duration::from_secs(5);

/// What `volume attach` takes.
#[derive(Args)]
pub struct AttachArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The host: its NQN over NVMe, a word of its own over NBD (the export is then VOLUME@HOLDER).
    #[arg(long)]
    holder: String,
    /// No other host may attach [the default]
    #[arg(long, conflicts_with = "shared")]
    exclusive: bool,
    /// Any host may attach; this one is shown.
    #[arg(long)]
    shared: bool,
    /// End whoever holds it, and what the holder itself had attached before: it is refused from then on.
    #[arg(long)]
    take_over: bool,
    /// How long copysets without a leader are waited for.
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    wait: u64,
}

/// What `volume detach` takes.
#[derive(Args)]
pub struct DetachArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Whose attachment ends.
    #[arg(long)]
    holder: String,
    /// How long copysets without a leader are waited for.
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    wait: u64,
}

/// A session as printed.
#[derive(Serialize)]
pub struct SessionShown {
    /// What is asked under a lower one is refused.
    pub epoch: u64,
    /// No other host may attach.
    pub exclusive: bool,
    /// Those that attached by name.
    pub holders: Vec<HolderShown>,
}

/// A holder as printed.
#[derive(Serialize)]
pub struct HolderShown {
    name: String,
    /// `null`: its lease is over.
    lease_left_ms: Option<u64>,
    /// Targets that it is connected to.
    targets: Vec<u32>,
}

impl From<&pb::Session> for SessionShown {
    fn from(session: &pb::Session) -> Self {
        let holder = |holder: &pb::SessionHolder| HolderShown {
            name: holder.name.clone(),
            lease_left_ms: holder.lease_left_ms,
            targets: holder.targets.clone(),
        };
        let holders = session.holders.iter().map(holder).collect();
        Self { epoch: session.epoch, exclusive: session.exclusive, holders }
    }
}

impl SessionShown {
    /// In one line.
    pub fn line(&self) -> String {
        let holder = |holder: &HolderShown| match (holder.lease_left_ms, &holder.targets[..]) {
            (None, _) => format!("{} (its lease is over)", holder.name),
            (Some(left), []) => format!("{} (not connected, lease {} s)", holder.name, left.div_ceil(1000)),
            (Some(_), at) => {
                let at: Vec<String> = at.iter().map(u32::to_string).collect();
                format!("{} (at target {})", holder.name, at.join(", "))
            }
        };
        let holders: Vec<String> = self.holders.iter().map(holder).collect();
        let epoch = self.epoch;
        match (self.exclusive, holders.is_empty()) {
            (true, _) => format!("exclusively by {}, epoch {epoch}", holders.join(", ")),
            (false, true) => format!("by any host, epoch {epoch}"),
            (false, false) => format!("by any host, epoch {epoch}; by name: {}", holders.join(", ")),
        }
    }
}

/// Attaches.
pub async fn attach(args: AttachArgs) -> Outcome {
    let AttachArgs { one, holder, shared, take_over, wait, .. } = args;
    let mds = one.cluster.connect()?;
    let volume = Some(volume_ref(&one.name));
    let request = pb::AttachVolumeRequest { volume, holder: holder.clone(), exclusive: !shared, take_over };
    let (volume, generation) = mds.attach_volume(request).await?;
    let behind = carry_out(&mds, &volume, generation, Duration::from_secs(wait)).await?;
    one.output.print(&Shown::from(&volume), |shown| {
        let session = &shown.session;
        let how = if session.exclusive { "exclusively " } else { "" };
        let name = &shown.name;
        format!(
            "{name} is attached {how}by {holder}, epoch {}; over NBD it is the export {name}@{holder}{}",
            session.epoch,
            note(&behind)
        )
    })?;
    Ok(Exit::Ok)
}

/// Detaches.
pub async fn detach(args: DetachArgs) -> Outcome {
    let DetachArgs { one, holder, wait } = args;
    let mds = one.cluster.connect()?;
    let (volume, generation) = mds.detach_volume(volume_ref(&one.name), &holder).await?;
    let behind = carry_out(&mds, &volume, generation, Duration::from_secs(wait)).await?;
    one.output.print(&Shown::from(&volume), |shown| {
        format!("{holder} is not attached to {} any more{}", shown.name, note(&behind))
    })?;
    Ok(Exit::Ok)
}

fn note(behind: &[u32]) -> String {
    if behind.is_empty() {
        return String::new();
    }
    let ids: Vec<String> = behind.iter().map(u32::to_string).collect();
    format!(
        "\n  target {} has not heard of it yet, and lets hosts attach as before until it does",
        ids.join(", ")
    )
}

/// Raises the fence everywhere, then waits for targets to know who may attach; tells those that do not.
async fn carry_out(
    mds: &MdsClient,
    volume: &pb::Volume,
    generation: u64,
    wait: Duration,
) -> Result<Vec<u32>, Problem> {
    let epoch = volume.session.as_ref().map_or(0, |session| session.epoch);
    let targets = mds.status().await?.targets.into_iter().filter(|target| target.online);
    let mut admins = Vec::new();
    for target in targets {
        let address = target.endpoints.unwrap_or_default().admin;
        let patience = Patience { retry: Duration::ZERO, call: FENCE_CALL, ..Patience::default() };
        if let (Ok(fences), Ok(admin)) =
            (AdminClient::new(&address, patience), AdminClient::new(&address, Patience::ONCE))
        {
            admins.push((target.id, fences, admin));
        }
    }
    raise_fence(&admins, volume, epoch, Instant::now() + wait).await?;
    let end = Instant::now() + MAP_WAIT;
    let mut behind = Vec::new();
    for (id, _, admin) in admins {
        let knows = loop {
            match admin.status().await {
                Ok(status) if status.map_generation >= generation => break true,
                Ok(_) if Instant::now() < end => sleep(PAUSE).await,
                _ => break false,
            }
        };
        if !knows {
            behind.push(id);
        }
    }
    Ok(behind)
}

/// Any one target can do it; the next is asked where one cannot.
async fn raise_fence(
    admins: &[(u32, AdminClient, AdminClient)],
    volume: &pb::Volume,
    epoch: u64,
    end: Instant,
) -> Result<(), Problem> {
    let mut last = None;
    loop {
        for (_, fences, _) in admins {
            match fences.fence_volume(VolumeId(volume.id), epoch).await {
                Ok(()) => return Ok(()),
                Err(problem) => last = Some(problem),
            }
        }
        if Instant::now() >= end {
            let why = last.map_or("no target is online".into(), |problem| problem.what);
            return Err(Problem::new(format!(
                "{} has its new epoch {epoch}, but what was attached before is not refused everywhere yet",
                volume.name
            ))
            .cause(why)
            .fix("repeat the command without --take-over; do not rely on the hold before it succeeds"));
        }
        sleep(PAUSE).await;
    }
}
