//! `ashlar volume`: create, list, show, resize, remove, attach, check.

pub mod check;
mod compare;
mod session;

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome, Problem};
use crate::size::Size;
use clap::{Args, Subcommand};
use client::control::{MdsClient, volume_ref};
use protocol::control::{ProblemKind, pb};
use serde::Serialize;

/// Commands on volumes.
#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Create a volume. It takes up space as it is written.
    Create(CreateArgs),
    /// List the volumes.
    Ls(ListArgs),
    /// Show one volume.
    #[command(visible_alias = "stat")]
    Show(OneArgs),
    /// Make a volume larger. Hosts attached over NVMe see it at once, NBD clients at their next connection.
    #[command(visible_alias = "extend")]
    Resize(ResizeArgs),
    /// Put a volume into the bin, or remove it with all that it holds.
    #[command(visible_alias = "delete")]
    Rm(RemoveArgs),
    /// Take a volume out of the bin.
    Undelete(UndeleteArgs),
    /// Call a volume something else. It must not be exported.
    Rename(RenameArgs),
    /// Let one host have a volume for itself, or tell that a host uses it. What another host had is refused.
    Attach(session::AttachArgs),
    /// End a host's hold on a volume.
    Detach(session::DetachArgs),
    /// Compare every replica of every chunk; exit code 3 when any differs.
    Check(check::CheckArgs),
}

/// What `volume create` takes.
#[derive(Args)]
pub struct CreateArgs {
    /// Letters, digits, '.', '_' and '-'.
    name: String,
    /// Such as 10G.
    #[arg(long)]
    size: Size,
    /// What hosts see as a block.
    #[arg(long, default_value = "4096", value_parser = block_size)]
    block_size: u32,
    /// Where it shall lie [default: the pool "default"]
    #[arg(long, default_value = "", hide_default_value = true)]
    pool: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `volume ls` takes.
#[derive(Args)]
pub struct ListArgs {
    /// Those in the bin and those being removed too.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `volume resize` takes.
#[derive(Args)]
pub struct ResizeArgs {
    /// The volume.
    name: String,
    /// Its new size, such as 20G; not below what it has.
    #[arg(long)]
    size: Size,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What commands on one volume take.
#[derive(Args)]
pub struct OneArgs {
    /// The volume.
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `volume rm` takes.
#[derive(Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Hours that it stays in the bin.
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=8760))]
    keep: u32,
    /// Free its space at once, also when it is in the bin already: nothing brings it back. Needs --yes.
    #[arg(long, conflicts_with = "keep")]
    purge: bool,
    /// Yes, destroy it.
    #[arg(long)]
    yes: bool,
}

/// What `volume undelete` takes.
#[derive(Args)]
pub struct UndeleteArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Under this name, where the old one is taken.
    #[arg(long = "as", value_name = "NAME", default_value = "", hide_default_value = true)]
    new_name: String,
}

/// What `volume rename` takes.
#[derive(Args)]
pub struct RenameArgs {
    /// The volume.
    name: String,
    /// What it is called from now on.
    new_name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// For clap: 512 or 4096.
pub fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("the block size is 512 or 4096".into()),
    }
}

/// A volume as printed.
#[derive(Serialize)]
pub struct Shown {
    id: u32,
    name: String,
    bytes: u64,
    block_bytes: u32,
    pool: String,
    copysets: Vec<u32>,
    /// Of chunks that hold data, each counted once.
    allocated_bytes: u64,
    exports: Vec<&'static str>,
    deleting: bool,
    /// It is in the bin until then, in seconds since 1970.
    purge_at_s: Option<u64>,
    /// Of chunks that hold data, over all replicas.
    replicated_bytes: u64,
    /// Of segments that were ever written: what the pool's capacity is held against.
    reserved_bytes: u64,
    /// Who is attached.
    session: session::SessionShown,
}

impl From<&pb::Volume> for Shown {
    fn from(volume: &pb::Volume) -> Self {
        Self {
            id: volume.id,
            name: volume.name.clone(),
            bytes: volume.bytes,
            block_bytes: volume.block_bytes,
            pool: volume.pool.clone(),
            copysets: volume.copysets.clone(),
            allocated_bytes: volume.allocated_bytes,
            exports: volume.exports().map(crate::export::protocol_name).collect(),
            deleting: volume.deleting,
            purge_at_s: volume.purge_at_s,
            replicated_bytes: volume.replicated_bytes,
            reserved_bytes: volume.reserved_bytes,
            session: (&volume.session.clone().unwrap_or_default()).into(),
        }
    }
}

/// Runs one of the commands.
pub async fn run(command: VolumeCommand) -> Outcome {
    match command {
        VolumeCommand::Create(args) => create(args).await,
        VolumeCommand::Ls(args) => list(args).await,
        VolumeCommand::Show(args) => show(args).await,
        VolumeCommand::Resize(args) => resize(args).await,
        VolumeCommand::Rm(args) => remove(args).await,
        VolumeCommand::Undelete(args) => undelete(args).await,
        VolumeCommand::Rename(args) => rename(args).await,
        VolumeCommand::Attach(args) => session::attach(args).await,
        VolumeCommand::Detach(args) => session::detach(args).await,
        VolumeCommand::Check(args) => check::run(args).await,
    }
}

async fn create(args: CreateArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let volume = mds.create_volume(&args.name, args.size.0, args.block_size, &args.pool).await?;
    args.output.print(&Shown::from(&volume), |v| format!("created {}, {}", v.name, Size(v.bytes)))?;
    Ok(Exit::Ok)
}

async fn list(args: ListArgs) -> Outcome {
    let volumes = args.cluster.connect()?.volumes(args.all).await?;
    let shown: Vec<_> = volumes.iter().map(Shown::from).collect();
    args.output.print(&shown, |shown| listing(shown))?;
    Ok(Exit::Ok)
}

/// Volumes as a table.
pub fn listing(volumes: &[Shown]) -> String {
    if volumes.is_empty() {
        return "no volumes; make one: ashlar volume create NAME --size 10G\n".into();
    }
    let header = ["VOLUME", "SIZE", "ALLOCATED", "REPLICATED", "BLOCK", "POOL", "COPYSETS", "EXPORTS"];
    let rows = volumes.iter().map(|volume| {
        let state = match volume.purge_at_s {
            _ if volume.deleting => "being removed".into(),
            Some(at) => format!("in the bin, for {}", hours(at)),
            None => volume.exports.join(","),
        };
        vec![
            volume.name.clone(),
            Size(volume.bytes).to_string(),
            Size(volume.allocated_bytes).to_string(),
            Size(volume.replicated_bytes).to_string(),
            volume.block_bytes.to_string(),
            volume.pool.clone(),
            volume.copysets.len().to_string(),
            state,
        ]
    });
    table(&header, rows)
}

async fn show(args: OneArgs) -> Outcome {
    let volume = stat(&args.cluster.connect()?, &args.name).await?;
    args.output.print(&Shown::from(&volume), |v| {
        format!(
            "{} (id {})\n  size       {} ({} bytes)\n  block      {} bytes\n  allocated  {}, {} over all replicas, {} reserved\n  pool       {}\n  copysets   {}\n  exports    {}\n  attached   {}\n",
            v.name,
            v.id,
            Size(v.bytes),
            v.bytes,
            v.block_bytes,
            Size(v.allocated_bytes),
            Size(v.replicated_bytes),
            Size(v.reserved_bytes),
            v.pool,
            v.copysets.iter().map(u32::to_string).collect::<Vec<_>>().join(" "),
            if v.exports.is_empty() { "none".into() } else { v.exports.join(" ") },
            v.session.line(),
        )
    })?;
    Ok(Exit::Ok)
}

async fn resize(args: ResizeArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let volume = mds.resize_volume(volume_ref(&args.name), args.size.0).await?;
    args.output.print(&Shown::from(&volume), |v| format!("{} has {} now", v.name, Size(v.bytes)))?;
    Ok(Exit::Ok)
}

async fn remove(args: RemoveArgs) -> Outcome {
    let RemoveArgs { one, keep, purge, yes } = args;
    if purge && !yes {
        return Err(Problem::usage(format!("{} was not purged", one.name))
            .cause("nothing would bring it back, so --purge wants to be confirmed")
            .fix("add --yes, or leave --purge out: it then stays in the bin for a day"));
    }
    let keep_s = if purge { 0 } else { keep * 3600 };
    let mds = one.cluster.connect()?;
    let volume = match mds.delete_volume(volume_ref(&one.name), keep_s).await {
        Err(refusal) if purge && refusal.kind == ProblemKind::NotFound => {
            let volume = in_bin(&mds.volumes(true).await?, &one.name, refusal.into())?;
            mds.delete_volume(volume, keep_s).await
        }
        deleted => deleted,
    };
    let id = volume?;
    let shown = serde_json::json!({"id": id.0, "name": one.name, "keep_s": keep_s});
    one.output.print(&shown, |_| match purge {
        true => format!("removed {}; its space is freed in the background", one.name),
        false => format!(
            "{0} is in the bin for {keep} hours; `ashlar volume undelete {0}` brings it back",
            one.name
        ),
    })?;
    Ok(Exit::Ok)
}

/// The one volume of that name in the bin, to be purged; several are not told apart by a name.
fn in_bin(volumes: &[pb::Volume], name: &str, none: Problem) -> Result<pb::VolumeRef, Problem> {
    let mut binned = volumes.iter().filter(|v| v.name == name && v.purge_at_s.is_some() && !v.deleting);
    match (binned.next(), binned.count()) {
        (None, _) => Err(none),
        (Some(one), 0) => Ok(pb::VolumeRef { id: one.id, name: String::new() }),
        (Some(_), more) => Err(Problem::new(format!("{name} was not purged"))
            .cause(format!("{} volumes in the bin were called so", more + 1))
            .fix(format!(
                "take out the last one (`ashlar volume undelete {name} --as OTHER`), then purge OTHER"
            ))),
    }
}

async fn undelete(args: UndeleteArgs) -> Outcome {
    let UndeleteArgs { one, new_name } = args;
    let volume = one.cluster.connect()?.undelete_volume(volume_ref(&one.name), &new_name).await?;
    one.output.print(&Shown::from(&volume), |v| format!("{} is there again, {}", v.name, Size(v.bytes)))?;
    Ok(Exit::Ok)
}

async fn rename(args: RenameArgs) -> Outcome {
    let volume = args.cluster.connect()?.rename_volume(volume_ref(&args.name), &args.new_name).await?;
    args.output.print(&Shown::from(&volume), |v| format!("{} is called {} now", args.name, v.name))?;
    Ok(Exit::Ok)
}

/// How long it is until then, roughly.
fn hours(unix_s: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    match unix_s.saturating_sub(now.map_or(0, |since| since.as_secs())) {
        left @ 7200.. => format!("{} h", left / 3600),
        left => format!("{} min", left.div_ceil(60)),
    }
}

/// The volume of that name.
async fn stat(mds: &MdsClient, name: &str) -> Result<pb::Volume, Problem> {
    mds.stat_volume(volume_ref(name)).await?.volume.ok_or_else(|| {
        Problem::new("the MDS answered without a volume")
            .cause("it is of another version")
            .fix("use one version")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_purged_from_the_bin_is_neither_in_use_nor_one_of_two() {
        let volume = |id, name: &str, purge_at_s| pb::Volume {
            id,
            name: name.into(),
            purge_at_s,
            ..pb::Volume::default()
        };
        let all = [
            volume(1, "a", None),
            volume(2, "b", Some(9)),
            pb::Volume { deleting: true, ..volume(3, "b", Some(9)) },
            volume(4, "c", Some(8)),
            volume(5, "c", Some(9)),
        ];
        let found = |name| in_bin(&all, name, Problem::new("there is none"));
        assert_eq!(found("b").expect("one").id, 2);
        assert_eq!(found("a").expect_err("in use").to_string(), "there is none");
        let two = found("c").expect_err("two").to_string();
        assert!(two.contains("2 volumes in the bin"), "{two}");
    }
}
