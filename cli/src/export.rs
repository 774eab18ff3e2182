//! `ashlar export`: which volumes are offered to hosts, and where.

use crate::cluster::ClusterArgs;
use crate::output::{OutputArgs, table};
use crate::problem::{Exit, Outcome, Problem};
use clap::{Args, Subcommand, ValueEnum};
use client::control::{AdminClient, MdsClient, Patience, volume_ref};
use protocol::control::{pb, protocol_to_pb};
use protocol::map::ExportProtocol;
use protocol::nvme_tcp::identify::nqn;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Commands on exports.
#[derive(Subcommand)]
pub enum ExportCommand {
    /// Offer a volume on every target.
    Add(AddArgs),
    /// List what is offered, and the hosts that are attached.
    Ls(ListArgs),
    /// Offer it no more. Its data stays.
    Rm(OneArgs),
}

/// What `export add` takes.
#[derive(Args)]
pub struct AddArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Let only this host attach, by its NQN (/etc/nvme/hostnqn); may be given several times. The hosts named
    /// replace those named before.
    #[arg(long, value_name = "NQN", conflicts_with = "allow_any")]
    allow_host: Vec<String>,
    /// Let any host attach again.
    #[arg(long)]
    allow_any: bool,
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
    /// The only hosts that may attach; empty: any host.
    allowed_hosts: Vec<String>,
    places: Vec<Place>,
}

#[derive(Serialize)]
struct Place {
    target: u32,
    online: bool,
    uris: Vec<String>,
    /// Hosts attached over NVMe; absent when the target does not answer, and over NBD.
    #[serde(skip_serializing_if = "Option::is_none")]
    hosts: Option<Vec<Host>>,
}

/// A host at one target, with all of its controllers there.
#[derive(Serialize)]
struct Host {
    nqn: String,
    /// IO queues.
    queues: usize,
    /// The shards that they are on.
    shards: BTreeSet<u32>,
    header_digest: bool,
    data_digest: bool,
}

impl Host {
    /// The hosts that use a volume, from the connections of a target.
    fn of(volume: u32, connections: &[pb::Connection]) -> Vec<Self> {
        let mut hosts: BTreeMap<(&str, bool, bool), Vec<u32>> = BTreeMap::new();
        for conn in connections.iter().filter(|conn| conn.volume == volume && !conn.host.is_empty()) {
            let host = (conn.host.as_str(), conn.header_digest, conn.data_digest);
            hosts.entry(host).or_default().push(conn.shard);
        }
        let host = |((nqn, header_digest, data_digest), shards): ((&str, bool, bool), Vec<u32>)| Self {
            nqn: nqn.to_owned(),
            queues: shards.len(),
            shards: shards.into_iter().collect(),
            header_digest,
            data_digest,
        };
        hosts.into_iter().map(host).collect()
    }
}

/// Connections by target, of those targets that answer.
type Connections = BTreeMap<u32, Vec<pb::Connection>>;

impl Shown {
    fn new(export: &pb::Export, cluster: &[u8; 16], connections: &Connections) -> Self {
        let is_nvme = export.protocol() == pb::ExportProtocol::Nvme;
        let places = export.places.iter().map(|place| Place {
            target: place.target,
            online: place.online,
            uris: match is_nvme {
                true => nvme_uri(&place.tcp, &nqn(cluster, &export.name)).into_iter().collect(),
                false => uris(&export.name, &place.tcp, &place.unix),
            },
            hosts: connections
                .get(&place.target)
                .filter(|_| is_nvme)
                .map(|connections| Host::of(export.volume, connections)),
        });
        Self {
            volume: export.name.clone(),
            protocol: protocol_name(export.protocol()),
            allowed_hosts: export.allowed_hosts.clone(),
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

async fn add(args: AddArgs) -> Outcome {
    let AddArgs { one, allow_host, allow_any } = args;
    let mds = one.cluster.connect()?;
    let allowed = (allow_any || !allow_host.is_empty()).then_some(allow_host);
    let export = mds.add_export(volume_ref(&one.volume), one.protocol.into(), allowed).await?;
    let cluster = mds.map_now().await?.cluster;
    let shown = vec![Shown::new(&export, &cluster, &Connections::new())];
    one.output.print(&shown, |shown| listing(shown))?;
    Ok(Exit::Ok)
}

async fn list(args: ListArgs) -> Outcome {
    let mds = args.cluster.connect()?;
    let exports = mds.exports(None).await?;
    let cluster = mds.map_now().await?.cluster;
    let connections = connections(&mds).await?;
    let shown: Vec<_> = exports.iter().map(|export| Shown::new(export, &cluster, &connections)).collect();
    args.output.print(&shown, |shown| listing(shown))?;
    Ok(Exit::Ok)
}

/// Asks every target that is online; one that does not answer is left out.
async fn connections(mds: &MdsClient) -> Result<Connections, Problem> {
    let mut all = Connections::new();
    for target in mds.status().await?.targets.into_iter().filter(|target| target.online) {
        let admin = target.endpoints.unwrap_or_default().admin;
        let Ok(client) = AdminClient::new(&admin, Patience::ONCE) else { continue };
        if let Ok(connections) = client.connections().await {
            all.insert(target.id, connections);
        }
    }
    Ok(all)
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

/// The hosts of a place with their queues and digests, in one line.
fn attached(place: &Place) -> String {
    let digests = |host: &Host| match (host.header_digest, host.data_digest) {
        (false, false) => "",
        (true, false) => ", header digest",
        (false, true) => ", data digest",
        (true, true) => ", both digests",
    };
    let queues = |host: &Host| if host.queues == 1 { "queue" } else { "queues" };
    let host = |host: &Host| format!("{} ({} {}{})", host.nqn, host.queues, queues(host), digests(host));
    place.hosts.iter().flatten().map(host).collect::<Vec<_>>().join("; ")
}

fn listing(exports: &[Shown]) -> String {
    if exports.is_empty() {
        return "nothing is exported; offer a volume: ashlar export add VOLUME\n".into();
    }
    let rows = exports.iter().flat_map(|export| {
        export.places.iter().flat_map(move |place| {
            place.uris.iter().map(move |uri| {
                let target = format!("{}{}", place.target, if place.online { "" } else { " (away)" });
                let allowed = export.allowed_hosts.join(" ");
                vec![export.volume.clone(), target, uri.clone(), allowed, attached(place)]
            })
        })
    });
    table(&["VOLUME", "TARGET", "URI", "ALLOWED", "ATTACHED"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_an_awkward_folder_makes_a_valid_uri() {
        assert_eq!(nbd_unix_uri("/a b/n&s#1", "vol0"), "nbd+unix:///vol0?socket=/a%20b/n%26s%231");
    }

    #[test]
    fn hosts_are_listed_by_their_io_queues_on_that_volume_alone() {
        let conn = |volume, host: &str, shard, data_digest| pb::Connection {
            volume,
            host: host.into(),
            shard,
            data_digest,
            ..pb::Connection::default()
        };
        let all = [
            conn(1, "nqn.a", 0, false),
            conn(1, "nqn.a", 1, false),
            conn(1, "nqn.a", 1, true),
            conn(2, "nqn.b", 0, false),
            conn(0, "nqn.a", 0, false),
            conn(1, "", 0, false),
        ];
        let place = Place { target: 1, online: true, uris: Vec::new(), hosts: Some(Host::of(1, &all)) };
        assert_eq!(attached(&place), "nqn.a (2 queues); nqn.a (1 queue, data digest)");
        assert_eq!(Host::of(2, &all).len(), 1);
    }

    #[test]
    fn what_is_not_offered_has_no_uri() {
        assert_eq!(uris("v", "", "/s"), ["nbd+unix:///v?socket=/s"]);
        assert_eq!(uris("v", "127.0.0.1:1", ""), ["nbd://127.0.0.1:1/v"]);
    }
}
