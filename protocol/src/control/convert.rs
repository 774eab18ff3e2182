//! Cluster map <-> message. Coming in, everything is checked: sizes, names, addresses, and that
//! every id that is referred to exists.

use super::{Problem, ProblemKind, check_holder, check_host_nqn, check_name, check_volume_size, limits, pb};
use crate::map::{ClusterMap, CopysetEntry, ExportEntry, ExportProtocol, Session, TargetEntry, VolumeEntry};
use crate::types::{CopysetId, MEMBERS_MAX, SessionEpoch, ShardAddr, TargetId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

/// The map as a message.
pub fn map_to_pb(map: &ClusterMap) -> pb::ClusterMap {
    pb::ClusterMap {
        cluster: map.cluster.to_vec(),
        generation: map.generation,
        targets: map.targets.iter().map(|(id, entry)| target_to_pb(*id, entry)).collect(),
        copysets: map.copysets.iter().map(|(id, entry)| copyset_to_pb(*id, entry)).collect(),
        volumes: map.volumes.iter().map(|(id, entry)| volume_to_pb(*id, entry)).collect(),
        exports: map.exports.iter().map(export_to_pb).collect(),
    }
}

fn target_to_pb(id: TargetId, entry: &TargetEntry) -> pb::MapTarget {
    pb::MapTarget {
        id: id.0,
        peers: entry.peers.iter().map(SocketAddr::to_string).collect(),
        nvme_tcp: entry.nvme.map(|address| address.to_string()).unwrap_or_default(),
        draining: entry.draining,
    }
}

fn copyset_to_pb(id: CopysetId, entry: &CopysetEntry) -> pb::MapCopyset {
    let members = entry.members.iter().copied().map(shard_to_pb).collect();
    pb::MapCopyset { id: id.0, members, epoch: entry.epoch }
}

fn volume_to_pb(id: VolumeId, entry: &VolumeEntry) -> pb::MapVolume {
    pb::MapVolume {
        id: id.0,
        name: entry.name.clone(),
        bytes: entry.bytes,
        block_bytes: entry.block_bytes,
        copysets: entry.copysets.iter().map(|id| id.0).collect(),
        deleted: entry.deleted,
        epoch: entry.session.epoch.0,
        holder: entry.session.holder.clone(),
    }
}

fn export_to_pb(entry: &ExportEntry) -> pb::MapExport {
    pb::MapExport {
        volume: entry.volume.0,
        protocol: protocol_to_pb(entry.protocol).into(),
        allowed_hosts: entry.allowed_hosts.iter().cloned().collect(),
    }
}

/// A shard's address as a message.
pub fn shard_to_pb(shard: ShardAddr) -> pb::Shard {
    pb::Shard { target: shard.target.0, shard: shard.shard.into() }
}

/// A protocol as a message has it.
pub fn protocol_to_pb(protocol: ExportProtocol) -> pb::ExportProtocol {
    match protocol {
        ExportProtocol::Nbd => pb::ExportProtocol::Nbd,
        ExportProtocol::Nvme => pb::ExportProtocol::Nvme,
    }
}

/// A protocol from a message's field.
pub fn protocol_from_pb(protocol: i32) -> Result<ExportProtocol, Problem> {
    match pb::ExportProtocol::try_from(protocol) {
        Ok(pb::ExportProtocol::Nbd) => Ok(ExportProtocol::Nbd),
        Ok(pb::ExportProtocol::Nvme) => Ok(ExportProtocol::Nvme),
        _ => Err(Problem::new(
            ProblemKind::Invalid,
            format!("export protocol {protocol} refused"),
            "the caller left it out or is newer than this end",
            "use nbd or nvme, and the same version at both ends",
        )),
    }
}

/// A shard's address from a message.
pub fn shard_from_pb(shard: &pb::Shard) -> Result<ShardAddr, Problem> {
    match u16::try_from(shard.shard) {
        Ok(index) if shard.target != 0 && usize::from(index) < limits::SHARDS_MAX => {
            Ok(ShardAddr { target: TargetId(shard.target), shard: index })
        }
        _ => Err(nonsense(format!("shard {} of target {}", shard.shard, shard.target))),
    }
}

/// The map that a message holds.
///
/// # Errors
/// [`ProblemKind::Protocol`] when anything in it is out of bounds, twice there, or refers to
/// something that is not there; such a map is not to be used in part.
pub fn map_from_pb(message: &pb::ClusterMap) -> Result<ClusterMap, Problem> {
    within("targets", message.targets.len(), limits::TARGETS_MAX)?;
    within("copysets", message.copysets.len(), limits::COPYSETS_MAX)?;
    within("volumes", message.volumes.len(), limits::VOLUMES_MAX)?;
    let cluster = message.cluster.as_slice().try_into();
    let cluster =
        cluster.map_err(|_| nonsense(format!("a cluster id of {} bytes", message.cluster.len())))?;
    if message.generation == 0 {
        return Err(nonsense("generation 0".into()));
    }
    let mut map = ClusterMap { cluster, generation: message.generation, ..ClusterMap::default() };
    for target in &message.targets {
        insert(&mut map.targets, TargetId(target.id), target.id, target_from_pb(target)?)?;
    }
    for copyset in &message.copysets {
        let entry = copyset_from_pb(copyset, &map)?;
        insert(&mut map.copysets, CopysetId(copyset.id), copyset.id, entry)?;
    }
    for volume in &message.volumes {
        let entry = volume_from_pb(volume, &map)?;
        insert(&mut map.volumes, VolumeId(volume.id), volume.id, entry)?;
    }
    names_differ(&map)?;
    map.exports = exports_from_pb(&message.exports, &map)?;
    Ok(map)
}

fn target_from_pb(message: &pb::MapTarget) -> Result<TargetEntry, Problem> {
    let bad = |why: String| nonsense(format!("target {} with {why}", message.id));
    if message.peers.is_empty() || message.peers.len() > limits::SHARDS_MAX {
        return Err(bad(format!("{} shards", message.peers.len())));
    }
    let address = |text: &String| {
        let address: Option<SocketAddr> = text.parse().ok();
        address.filter(|a| a.port() != 0).ok_or_else(|| bad(format!("the address {text:?}")))
    };
    let nvme = Some(&message.nvme_tcp).filter(|text| !text.is_empty());
    Ok(TargetEntry {
        peers: message.peers.iter().map(address).collect::<Result<_, _>>()?,
        nvme: nvme.map(address).transpose()?,
        draining: message.draining,
    })
}

fn copyset_from_pb(message: &pb::MapCopyset, map: &ClusterMap) -> Result<CopysetEntry, Problem> {
    let bad = |why: String| nonsense(format!("copyset {} with {why}", message.id));
    if message.members.is_empty() || message.members.len() > MEMBERS_MAX {
        return Err(bad(format!("{} members", message.members.len())));
    }
    let mut members: Vec<ShardAddr> = Vec::with_capacity(message.members.len());
    for member in &message.members {
        let shard = shard_from_pb(member)?;
        if members.iter().any(|other| other.target == shard.target) {
            return Err(bad(format!("two replicas on target {}", shard.target)));
        }
        if map.address(shard).is_none() {
            return Err(bad(format!("a replica on {shard:?}, which is not in the map")));
        }
        members.push(shard);
    }
    Ok(CopysetEntry { members, epoch: message.epoch })
}

fn volume_from_pb(message: &pb::MapVolume, map: &ClusterMap) -> Result<VolumeEntry, Problem> {
    let bad = |why: String| nonsense(format!("volume {} with {why}", message.id));
    check_name("volume", &message.name).map_err(|p| bad(p.to_string()))?;
    check_volume_size(message.bytes, message.block_bytes).map_err(|p| bad(p.to_string()))?;
    if message.copysets.is_empty() || message.copysets.len() > limits::VOLUME_COPYSETS_MAX {
        return Err(bad(format!("{} copysets", message.copysets.len())));
    }
    let copysets: Vec<CopysetId> = message.copysets.iter().copied().map(CopysetId).collect();
    if let Some(absent) = copysets.iter().find(|id| !map.copysets.contains_key(id)) {
        return Err(bad(format!("copyset {absent}, which is not in the map")));
    }
    if !message.holder.is_empty() {
        check_holder(&message.holder).map_err(|p| bad(p.to_string()))?;
    }
    let session = Session { epoch: SessionEpoch(message.epoch), holder: message.holder.clone() };
    Ok(VolumeEntry {
        name: message.name.clone(),
        bytes: message.bytes,
        block_bytes: message.block_bytes,
        copysets,
        deleted: message.deleted,
        session,
    })
}

fn exports_from_pb(messages: &[pb::MapExport], map: &ClusterMap) -> Result<Vec<ExportEntry>, Problem> {
    let mut exports: Vec<ExportEntry> = Vec::new();
    let hosts = messages.iter().map(|export| export.allowed_hosts.len()).sum();
    within("allowed hosts", hosts, limits::ALLOWED_HOSTS_ALL_MAX)?;
    for message in messages {
        let volume = VolumeId(message.volume);
        if map.volumes.get(&volume).is_none_or(|v| v.deleted) {
            return Err(nonsense(format!("an export of volume {volume}, which is not there")));
        }
        // A newer MDS may offer more protocols: what this end does not know, it does not serve.
        let Ok(protocol) = protocol_from_pb(message.protocol) else { continue };
        let allowed_hosts = allowed_hosts(&message.allowed_hosts).map_err(|p| nonsense(p.to_string()))?;
        let entry = ExportEntry { volume, protocol, allowed_hosts };
        if exports.iter().any(|other| other.volume == volume && other.protocol == protocol) {
            return Err(nonsense(format!("two equal exports of volume {volume}")));
        }
        exports.push(entry);
    }
    Ok(exports)
}

/// The hosts that a list names.
///
/// # Errors
/// `Invalid` or `Limit`: a name that no host has, or too many.
pub fn allowed_hosts(nqns: &[String]) -> Result<BTreeSet<String>, Problem> {
    nqns.iter().try_for_each(|nqn| check_host_nqn(nqn))?;
    let hosts: BTreeSet<String> = nqns.iter().cloned().collect();
    if hosts.len() > limits::ALLOWED_HOSTS_MAX {
        return Err(Problem::new(
            ProblemKind::Limit,
            format!("{} hosts for one export refused", hosts.len()),
            format!("the limit is {}", limits::ALLOWED_HOSTS_MAX),
            "name fewer, or let any host attach",
        ));
    }
    Ok(hosts)
}

fn names_differ(map: &ClusterMap) -> Result<(), Problem> {
    let mut names: Vec<&str> = map.volumes.values().filter(|v| !v.deleted).map(|v| v.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(nonsense(format!("two volumes named {:?}", pair[0]))),
        None => Ok(()),
    }
}

fn insert<K: Ord + core::fmt::Debug, V>(
    into: &mut BTreeMap<K, V>,
    key: K,
    number: u32,
    value: V,
) -> Result<(), Problem> {
    if number == 0 {
        return Err(nonsense(format!("the id {key:?}, which means none")));
    }
    let twice = nonsense_twice(&key);
    if into.insert(key, value).is_some() { Err(nonsense(twice)) } else { Ok(()) }
}

fn nonsense_twice(key: &impl core::fmt::Debug) -> String {
    format!("{key:?} twice")
}

fn within(noun: &str, count: usize, most: usize) -> Result<(), Problem> {
    if count > most { Err(nonsense(format!("{count} {noun}, above {most}"))) } else { Ok(()) }
}

fn nonsense(what: String) -> Problem {
    Problem::new(
        ProblemKind::Protocol,
        format!("cluster map refused: it holds {what}"),
        "the MDS is of another version, or this is no MDS",
        "check the MDS address and that all parts run the same version",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> ClusterMap {
        let shard = |target, shard| ShardAddr { target: TargetId(target), shard };
        let mut map = ClusterMap { cluster: [7; 16], generation: 9, ..ClusterMap::default() };
        for id in 1..=3u16 {
            let peers = (0..2).map(|at| SocketAddr::from(([127, 0, 0, 1], 1000 + id * 10 + at))).collect();
            map.targets.insert(
                TargetId(id.into()),
                TargetEntry {
                    peers,
                    nvme: Some(SocketAddr::from(([127, 0, 0, 1], 4420))),
                    draining: id == 2,
                },
            );
        }
        let members = vec![shard(1, 0), shard(2, 1), shard(3, 0)];
        map.copysets.insert(CopysetId(1), CopysetEntry { members, epoch: 3 });
        map.copysets.insert(CopysetId(2), CopysetEntry { members: vec![shard(2, 0)], epoch: 0 });
        for (id, deleted) in [(1, false), (2, true)] {
            let copysets = vec![CopysetId(2), CopysetId(1)];
            let name = "vol0".to_string();
            let session = Session { epoch: SessionEpoch(5), holder: "nqn.2014-08.org.example:a".into() };
            let entry = VolumeEntry { name, bytes: 1 << 30, block_bytes: 512, copysets, deleted, session };
            map.volumes.insert(VolumeId(id), entry);
        }
        map.exports.push(ExportEntry {
            volume: VolumeId(1),
            protocol: ExportProtocol::Nvme,
            allowed_hosts: ["nqn.2014-08.org.example:a".to_owned()].into(),
        });
        map
    }

    #[test]
    fn a_map_survives_the_way_through_its_message() {
        let map = sample();
        assert_eq!(map_from_pb(&map_to_pb(&map)).unwrap(), map);
    }

    /// Each row spoils one thing of a good map.
    #[test]
    fn a_map_with_one_thing_wrong_is_refused() {
        type Spoil = fn(&mut pb::ClusterMap);
        let rows: &[(&str, Spoil)] = &[
            ("cluster id of 15 bytes", |m| m.cluster.truncate(15)),
            ("generation 0", |m| m.generation = 0),
            ("t0", |m| m.targets[0].id = 0),
            ("t1 twice", |m| m.targets[1].id = 1),
            ("0 shards", |m| m.targets[0].peers.clear()),
            ("257 shards", |m| m.targets[0].peers = vec!["127.0.0.1:1".into(); 257]),
            ("address \"localhost\"", |m| m.targets[0].peers[0] = "localhost".into()),
            ("address \"127.0.0.1:0\"", |m| m.targets[0].peers[0] = "127.0.0.1:0".into()),
            ("0 members", |m| m.copysets[0].members.clear()),
            ("8 members", |m| m.copysets[0].members = vec![pb::Shard { target: 1, shard: 0 }; 8]),
            ("two replicas on target 1", |m| m.copysets[0].members[1].target = 1),
            ("not in the map", |m| m.copysets[0].members[1].target = 99),
            ("not in the map", |m| m.copysets[0].members[1].shard = 2),
            ("shard 65537", |m| m.copysets[0].members[1].shard = 65537),
            ("0 copysets", |m| m.volumes[0].copysets.clear()),
            ("copyset 77", |m| m.volumes[0].copysets[0] = 77),
            ("block size of 1024", |m| m.volumes[0].block_bytes = 1024),
            ("size of 0", |m| m.volumes[0].bytes = 0),
            ("no multiple", |m| m.volumes[0].bytes = 513),
            ("size of 1844", |m| m.volumes[0].bytes = u64::MAX),
            ("volume name", |m| m.volumes[0].name = "a/b".into()),
            ("volume name", |m| m.volumes[0].name.clear()),
            ("holder \"a b\"", |m| m.volumes[0].holder = "a b".into()),
            ("two volumes named", |m| m.volumes[1].deleted = false),
            ("export of volume 2", |m| m.exports[0].volume = 2),
            ("does not start", |m| m.exports[0].allowed_hosts[0] = "somebody".into()),
            ("two equal exports", |m| m.exports.push(m.exports[0].clone())),
            ("targets, above", |m| m.targets = vec![m.targets[0].clone(); limits::TARGETS_MAX + 1]),
        ];
        for (expected, spoil) in rows {
            let mut message = map_to_pb(&sample());
            spoil(&mut message);
            let problem = map_from_pb(&message).expect_err(expected);
            assert!(problem.to_string().contains(expected), "{expected}: {problem}");
            assert_eq!(problem.kind, ProblemKind::Protocol);
        }
    }

    #[test]
    fn an_export_of_a_protocol_from_the_future_is_left_out() {
        let mut message = map_to_pb(&sample());
        message.exports.push(pb::MapExport { volume: 1, protocol: 99, ..Default::default() });
        assert_eq!(map_from_pb(&message).unwrap(), sample());
    }

    proptest! {
        #[test]
        fn garbage_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = <pb::ClusterMap as prost::Message>::decode(bytes.as_slice()) {
                let _ = map_from_pb(&message);
            }
        }

        /// A flipped byte gives either a refusal or a map whose every route resolves.
        #[test]
        fn a_flipped_byte_never_makes_a_dangling_route(at in any::<proptest::sample::Index>(), to in any::<u8>()) {
            let mut bytes = prost::Message::encode_to_vec(&map_to_pb(&sample()));
            let at = at.index(bytes.len());
            bytes[at] = to;
            let Ok(message) = <pb::ClusterMap as prost::Message>::decode(bytes.as_slice()) else { return Ok(()) };
            let Ok(map) = map_from_pb(&message) else { return Ok(()) };
            for (volume, entry) in map.volumes.iter().filter(|(_, v)| !v.deleted) {
                for index in 0..100 {
                    let chunk = crate::types::ChunkId { volume: *volume, index };
                    let (id, copyset) = map.route(chunk).expect("every chunk has a copyset");
                    prop_assert_eq!(id, entry.copyset_of(index));
                    for member in &copyset.members {
                        prop_assert!(map.address(*member).is_some());
                    }
                }
            }
        }
    }
}
