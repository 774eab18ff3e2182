//! How far disk, network card and cores are from each other.

use crate::cpus::Cpus;
use crate::machine::Machine;
use crate::model::{Item, Mode, NOT_OURS, Severity, Tuner};
use std::collections::BTreeSet;

const NODE: &str = "/sys/devices/system/node";

pub static TUNERS: &[Tuner] = &[Tuner {
    name: "numa",
    family: "processor",
    mode: Mode::Report,
    severity: Severity::Recommended,
    what: "whether disk, network card and shards' cores are on one NUMA node",
    why: "each IO from another node crosses the link between sockets, some 100 ns each way",
    risk: "none: it only looks",
    places: &[
        "/sys/block/DISK/device/.../numa_node",
        "/sys/class/net/NIC/device/numa_node",
        "/sys/devices/system/node/nodeN/distance",
    ],
    default: "all on one node",
    reboot: NOT_OURS,
    sources: &[
        "kernel: Documentation/admin-guide/mm/numa_memory_policy.rst",
        "SPDK: doc/nvme.md",
        "numactl(8)",
    ],
    at_start: false,
    inspect: numa,
}];

fn numa(machine: &Machine<'_>) -> Vec<Item> {
    let nodes: Vec<u32> =
        machine.tree.list(NODE).iter().filter_map(|name| name.strip_prefix("node")?.parse().ok()).collect();
    if nodes.len() < 2 {
        return vec![Item::unsupported("", "one NUMA node")];
    }
    let disks = machine.disks();
    let nics = machine.nics();
    let mut places: Vec<(String, u32)> = Vec::new();
    places.extend(disks.iter().filter_map(|d| Some((d.name.clone(), machine.node_of(&d.dir)?))));
    let device = |nic: &String| machine.node_of(&format!("/sys/class/net/{nic}/device"));
    places.extend(nics.iter().filter_map(|nic| Some((nic.clone(), device(nic)?))));
    for node in &nodes {
        let cpus = machine.text(&format!("{NODE}/node{node}/cpulist")).and_then(|text| Cpus::parse(&text));
        let here = cpus.unwrap_or_default().and(&machine.facts.cpus);
        if !here.is_empty() {
            places.push((format!("cores {}", here.list()), *node));
        }
    }
    let used: BTreeSet<u32> = places.iter().map(|(_, node)| *node).collect();
    let shown = places.iter().map(|(name, node)| format!("{name} on node {node}")).collect::<Vec<_>>();
    let mut found = shown.join(", ");
    let farthest = used.iter().flat_map(|a| used.iter().map(move |b| (*a, *b)));
    if let Some(most) = farthest.filter(|(a, b)| a != b).filter_map(|(a, b)| distance(machine, a, b)).max() {
        found += &format!("; distance {most}, where 10 is near");
    }
    let home = used.first().copied().unwrap_or(0);
    let home_cpus = machine.text(&format!("{NODE}/node{home}/cpulist")).unwrap_or_default();
    let fix = format!("`cpus` in target.toml out of {home_cpus} (node {home}); cards may need another slot");
    vec![Item::judged("", used.len() <= 1, &found, "all on one node", &fix)]
}

fn distance(machine: &Machine<'_>, from: u32, to: u32) -> Option<u32> {
    let text = machine.text(&format!("{NODE}/node{from}/distance"))?;
    text.split_whitespace().nth(to as usize)?.parse().ok()
}
