//! `ashlar export`: which volumes are offered to hosts, and where.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome};
use clap::{Args, Subcommand, ValueEnum};
use client::control::volume_ref;
use protocol::control::{pb, protocol_to_pb};
use protocol::map::ExportProtocol;
use protocol::nvme_tcp::identify::nqn;
use serde::Serialize;

/// Commands on exports.
#[derive(Subcommand)]
pub enum ExportCommand {
    /// Offer a volume on every target.
    Add(OneArgs),
    /// List what is offered.
    Ls(ListArgs),
    /// Offer it no more. Its data stays.
    Rm(OneArgs),
}

/// What commands on one export take.
#[derive(Args)]
pub struct OneArgs {
    /// The volume.
    volume: String,
    /// How hosts attach.
    #[arg(long, default_value = "nbd")]
    protocol: Protocol,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `export ls` takes.
#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    Nbd,
    Nvme,
}

impl From<Protocol> for ExportProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Nbd => ExportProtocol::Nbd,
            Protocol::Nvme => ExportProtocol::Nvme,
        }
    }
}

/// How a protocol is written.
pub fn protocol_name(protocol: pb::ExportProtocol) -> &'static str {
    match protocol {
        pb::ExportProtocol::Nbd => "nbd",
        pb::ExportProtocol::Nvme => "nvme",
        pb::ExportProtocol::Unspecified => "unknown",
    }
}

#[derive(Serialize)]
struct Shown {
    volume: String,
    protocol: &'static str,
    places: Vec<Place>,
}

#[derive(Serialize)]
struct Place {
    target: u32,
    online: bool,
    uris: Vec<String>,
}

impl Shown {
    fn new(export: &pb::Export, cluster: &[u8; 16]) -> Self {
        let is_nvme = export.protocol() == pb::ExportProtocol::Nvme;
        let places = export.places.iter().map(|place| Place {
            target: place.target,
            online: place.online,
            uris: match is_nvme {
                true => nvme_uri(&place.tcp, &nqn(cluster, &export.name)).into_iter().collect(),
                false => uris(&export.name, &place.tcp, &place.unix),
            },
        });
        Self {
            volume: export.name.clone(),
            protocol: protocol_name(export.protocol()),
            places: places.collect(),
        }
    }
}

/// What a client is given to reach an NBD export; an empty address is one that is not offered.
pub fn uris(volume: &str, tcp: &str, unix: &str) -> Vec<String> {
    let tcp = (!tcp.is_empty()).then(|| nbd_uri(tcp, volume));
    let unix = (!unix.is_empty()).then(|| nbd_unix_uri(unix, volume));
    tcp.into_iter().chain(unix).collect()
}

/// A path to a subsystem; an empty address is one that is not offered.
fn nvme_uri(address: &str, nqn: &str) -> Option<String> {
    (!address.is_empty()).then(|| format!("nvme+tcp://{address}/{nqn}"))
}

/// The URI of a volume at HOST:PORT.
pub fn nbd_uri(address: &str, volume: &str) -> String {
    format!("nbd://{address}/{volume}")
}

/// The URI of a volume at a Unix socket.
pub fn nbd_unix_uri(socket: &str, volume: &str) -> String {
    let escaped: String = socket.bytes().map(escaped).collect();
    format!("nbd+unix:///{volume}?socket={escaped}")
}

/// As in RFC 3986, with '/' left as it is.
fn escaped(byte: u8) -> String {
    if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
        char::from(byte).to_string()
    } else {
        format!("%{byte:02X}")
    }
}

/// Runs one of the commands.
pub async fn run(command: ExportCommand) -> Outcome {
    match command {
        ExportCommand::Add(args) => add(args).await,
        ExportCommand::Ls(args) => list(args).await,
        ExportCommand::Rm(args) => remove(args).await,
    }
}

async fn add(args: OneArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let export = mds.add_export(volume_ref(&args.volume), args.protocol.into()).await?;
    let cluster = mds.map_now().await?.cluster;
    args.output.print(&vec![Shown::new(&export, &cluster)], |shown| listing(shown))?;
    Ok(Exit::Ok)
}

async fn list(args: ListArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let exports = mds.exports(None).await?;
    let cluster = mds.map_now().await?.cluster;
    let shown: Vec<_> = exports.iter().map(|export| Shown::new(export, &cluster)).collect();
    args.output.print(&shown, |shown| listing(shown))?;
    Ok(Exit::Ok)
}

async fn remove(args: OneArgs) -> Outcome {
    let protocol = ExportProtocol::from(args.protocol);
    args.cluster.connect()?.remove_export(volume_ref(&args.volume), protocol).await?;
    let name = protocol_name(protocol_to_pb(protocol));
    let shown = serde_json::json!({"volume": args.volume, "protocol": name});
    let told =
        |volume| format!("{volume} is no longer offered over {name}; hosts attached now stay attached");
    args.output.print(&shown, |_| told(&args.volume))?;
    Ok(Exit::Ok)
}

fn listing(exports: &[Shown]) -> String {
    if exports.is_empty() {
        return "nothing is exported; offer a volume: ashlar export add VOLUME\n".into();
    }
    let rows = exports.iter().flat_map(|export| {
        export.places.iter().flat_map(move |place| {
            place.uris.iter().map(move |uri| {
                let target = format!("{}{}", place.target, if place.online { "" } else { " (away)" });
                vec![export.volume.clone(), target, uri.clone()]
            })
        })
    });
    table(&["VOLUME", "TARGET", "URI"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_an_awkward_folder_makes_a_valid_uri() {
        assert_eq!(nbd_unix_uri("/a b/n&s#1", "vol0"), "nbd+unix:///vol0?socket=/a%20b/n%26s%231");
    }

    #[test]
    fn what_is_not_offered_has_no_uri() {
        assert_eq!(uris("v", "", "/s"), ["nbd+unix:///v?socket=/s"]);
        assert_eq!(uris("v", "127.0.0.1:1", ""), ["nbd://127.0.0.1:1/v"]);
    }
}
