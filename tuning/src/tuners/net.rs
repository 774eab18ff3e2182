//! The network: where packets are handled, busy polling, queues and buffers.

use crate::cpus::Cpus;
use crate::machine::Machine;
use crate::model::{Bound, Form, GONE_AT_REBOOT, Item, Mode, NOT_OURS, Profile, Severity, Tuner};
use std::collections::BTreeSet;

/// Flows that RFS remembers: some thousand connections with room to spare.
const RFS_FLOWS: i64 = 32_768;
/// Microseconds of busy polling that the kernel's documents suggest.
const BUSY_POLL_US: &str = "50";
/// Buffers of a socket: 16 MiB fill 10 Gbit/s over 13 ms.
const SOCKET_BYTES: i64 = 16 << 20;
const NO_NIC: &str = "no network card is up";

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "rps",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "spreading received packets over processors in software (RPS)",
        why: "a card with one queue gives all packets to one processor",
        risk: "an interrupt between processors for each burst of packets",
        places: &["/sys/class/net/NIC/queues/rx-N/rps_cpus"],
        default: "throughput: the spare processors, on cards with one queue; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/scaling.rst", "seastar: perftune.py", "rpk: net"],
        at_start: false,
        inspect: |machine| each(machine, rps),
    },
    Tuner {
        name: "rfs",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "handing packets to the processor that reads the connection (RFS)",
        why: "then a connection's packets are handled where its shard runs",
        risk: "none worth naming: a table of some hundred KiB",
        places: &["/proc/sys/net/core/rps_sock_flow_entries", "/sys/class/net/NIC/queues/rx-N/rps_flow_cnt"],
        default: "throughput: 32768 flows, shared by the queues; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/scaling.rst", "seastar: perftune.py", "rpk: net"],
        at_start: false,
        inspect: rfs,
    },
    Tuner {
        name: "xps",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "which processor sends through which of the card's queues (XPS)",
        why: "a queue of its own spares each core a lock",
        risk: "none worth naming",
        places: &["/sys/class/net/NIC/queues/tx-N/xps_cpus"],
        default: "latency, throughput: processors dealt out over the queues; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/scaling.rst", "seastar: perftune.py"],
        at_start: false,
        inspect: |machine| each(machine, xps),
    },
    Tuner {
        name: "nic-rings",
        family: "network",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "the card's receive and send rings",
        why: "a short receive ring drops packets in bursts, which costs TCP 200 ms each time",
        risk: "setting them takes the link down for a moment, so it is left to the operator",
        places: &["ethtool netlink: rings"],
        default: "half of what the card has, or more",
        reboot: NOT_OURS,
        sources: &["ethtool(8), -g and -G", "kernel: Documentation/networking/ethtool-netlink.rst"],
        at_start: false,
        inspect: |machine| each(machine, rings),
    },
    Tuner {
        name: "coalescing",
        family: "network",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "how long the card waits before it interrupts",
        why: "each microsecond of it is added to the latency of an idle cluster's IO",
        risk: "without it, a busy card interrupts for each packet",
        places: &["ethtool netlink: coalescing"],
        default: "latency: adaptive, or 10 us at most; else as it is",
        reboot: NOT_OURS,
        sources: &["ethtool(8), -c and -C", "kernel: Documentation/networking/ethtool-netlink.rst"],
        at_start: false,
        inspect: |machine| each(machine, coalescing),
    },
    Tuner {
        name: "busy-poll",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "polling the card's queue from a socket that waits (busy_poll, busy_read)",
        why: "it saves the interrupt and the wake-up of a packet that comes soon",
        risk: "CPU time of every program that waits on a socket",
        places: &["/proc/sys/net/core/busy_poll", "/proc/sys/net/core/busy_read"],
        default: "latency: 50 us; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/admin-guide/sysctl/net.rst", "tuned: network-latency"],
        at_start: false,
        inspect: |machine| {
            let file = |name: &str| {
                let (when, path) =
                    (machine.profile == Profile::Latency, format!("/proc/sys/net/core/{name}"));
                machine.setting_when(when, name, &path, Form::Words, BUSY_POLL_US)
            };
            vec![file("busy_poll"), file("busy_read")]
        },
    },
    Tuner {
        name: "backlogs",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "connections and packets that may wait to be taken (somaxconn and its kin)",
        why: "after a restart all hosts connect at once; what does not fit is tried again after a second",
        risk: "some kernel memory, only when it is used",
        places: &[
            "/proc/sys/net/core/somaxconn",
            "/proc/sys/net/ipv4/tcp_max_syn_backlog",
            "/proc/sys/net/core/netdev_max_backlog",
        ],
        default: "4096 or more each",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/ip-sysctl.rst", "seastar: perftune.py", "rpk: net"],
        at_start: false,
        inspect: |machine| {
            ["core/somaxconn", "ipv4/tcp_max_syn_backlog", "core/netdev_max_backlog"]
                .map(|file| {
                    let name = file.rsplit('/').next().unwrap_or(file);
                    machine.at_least(name, &format!("/proc/sys/net/{file}"), 4096)
                })
                .into()
        },
    },
    Tuner {
        name: "tcp-buffers",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "how large the buffers of a TCP connection may grow",
        why: "a connection carries no more than a buffer in each round trip",
        risk: "memory, only for connections that need it",
        places: &[
            "/proc/sys/net/core/rmem_max",
            "/proc/sys/net/core/wmem_max",
            "/proc/sys/net/ipv4/tcp_rmem",
            "/proc/sys/net/ipv4/tcp_wmem",
        ],
        default: "16 MiB or more; never lowered (dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/ip-sysctl.rst", "tuned: network-throughput"],
        at_start: false,
        inspect: tcp_buffers,
    },
    Tuner {
        name: "tcp-congestion",
        family: "network",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "that new TCP connections are not paced by BBR",
        why: "BBR sends at the rate it has seen lately, which is low after small messages: a large write that \
              follows waits for tens of milliseconds. Ashlar's own sockets leave BBR by themselves; those of hosts, \
              as of the kernel's NVMe initiator, do not",
        risk: "connections over long, lossy ways are slower by cubic",
        places: &["/proc/sys/net/ipv4/tcp_congestion_control"],
        default: "cubic instead of BBR, or reno where the kernel has no cubic; any other as it is (dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/networking/ip-sysctl.rst", "docs/performance.md"],
        at_start: false,
        inspect: |machine| vec![tcp_congestion(machine)],
    },
    Tuner {
        name: "mtu",
        family: "network",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "whether all network cards have the same MTU",
        why: "between ends that differ, large packets vanish or are cut up, which shows as stalls",
        risk: "none: it only looks",
        places: &["/sys/class/net/NIC/mtu"],
        default: "alike on all cards of the storage network, on all hosts",
        reboot: NOT_OURS,
        sources: &["ip-link(8)", "kernel: Documentation/networking/ip-sysctl.rst, tcp_mtu_probing"],
        at_start: false,
        inspect: mtu,
    },
];

fn each(machine: &Machine<'_>, look: fn(&Machine<'_>, &str) -> Vec<Item>) -> Vec<Item> {
    super::each(&machine.nics(), NO_NIC, |nic| look(machine, nic))
}

/// The names of a card's queues of one kind, in order of their numbers.
fn queues(machine: &Machine<'_>, nic: &str, kind: &str) -> Vec<String> {
    let names = machine.tree.list(&format!("/sys/class/net/{nic}/queues"));
    let mut queues: Vec<_> = names.into_iter().filter(|name| name.starts_with(kind)).collect();
    queues.sort_by_key(|name| name[kind.len()..].parse::<u32>().unwrap_or(u32::MAX));
    queues
}

fn rps(machine: &Machine<'_>, nic: &str) -> Vec<Item> {
    let queues = queues(machine, nic, "rx-");
    let [only] = queues.as_slice() else {
        return vec![Item::info(nic, &format!("{} queues in hardware", queues.len()), "as it is")];
    };
    let path = format!("/sys/class/net/{nic}/queues/{only}/rps_cpus");
    let when = machine.profile == Profile::Throughput;
    vec![machine.setting_when(when, nic, &path, Form::Mask, &machine.spare().mask())]
}

fn rfs(machine: &Machine<'_>) -> Vec<Item> {
    let table = "/proc/sys/net/core/rps_sock_flow_entries";
    if machine.profile != Profile::Throughput {
        return vec![machine.left("table", table, Form::Words)];
    }
    let mut items = vec![machine.at_least("table", table, RFS_FLOWS)];
    for nic in machine.nics() {
        let queues = queues(machine, &nic, "rx-");
        let share =
            RFS_FLOWS / (queues.len().max(1) as i64).cast_unsigned().next_power_of_two().cast_signed();
        items.extend(queues.iter().map(|queue| {
            let path = format!("/sys/class/net/{nic}/queues/{queue}/rps_flow_cnt");
            machine.at_least(&format!("{nic} {queue}"), &path, share)
        }));
    }
    items
}

fn xps(machine: &Machine<'_>, nic: &str) -> Vec<Item> {
    let queues = queues(machine, nic, "tx-");
    if queues.len() < 2 {
        return vec![Item::info(nic, "one queue", "as it is")];
    }
    let online: Vec<u32> = machine.online().0.into_iter().collect();
    let item = |(nth, queue): (usize, &String)| {
        let path = format!("/sys/class/net/{nic}/queues/{queue}/xps_cpus");
        let object = format!("{nic} {queue}");
        let own: BTreeSet<u32> = online.iter().copied().skip(nth).step_by(queues.len()).collect();
        let when = machine.profile.is_server() && !own.is_empty();
        machine.setting_when(when, &object, &path, Form::Mask, &Cpus(own).mask())
    };
    queues.iter().enumerate().map(item).collect()
}

fn rings(machine: &Machine<'_>, nic: &str) -> Vec<Item> {
    let Some(rings) = machine.facts.rings.get(nic) else {
        return vec![Item::unsupported(nic, "the card does not say")];
    };
    if rings.rx_max == 0 {
        return vec![Item::unsupported(nic, "the card does not say how long they may be")];
    }
    let good = rings.rx * 2 >= rings.rx_max && rings.tx * 2 >= rings.tx_max;
    let found = format!("rx {} of {}, tx {} of {}", rings.rx, rings.rx_max, rings.tx, rings.tx_max);
    let fix = format!("sudo ethtool -G {nic} rx {} tx {}", rings.rx_max, rings.tx_max);
    vec![Item::judged(nic, good, &found, "half of what it has, or more", &fix)]
}

fn coalescing(machine: &Machine<'_>, nic: &str) -> Vec<Item> {
    let Some(rings) = machine.facts.rings.get(nic) else {
        return vec![Item::unsupported(nic, "the card does not say")];
    };
    let (usecs, adaptive) = (rings.rx_usecs, rings.adaptive_rx.unwrap_or(false));
    let Some(usecs) = usecs else {
        return vec![Item::unsupported(nic, "the card does not say")];
    };
    let found = format!("{usecs} us{}", if adaptive { ", adaptive" } else { "" });
    vec![match machine.profile {
        Profile::Latency => {
            let fix = format!("sudo ethtool -C {nic} adaptive-rx on (or rx-usecs 10)");
            Item::judged(nic, adaptive || usecs <= 10, &found, "adaptive, or 10 us at most", &fix)
        }
        _ => Item::info(nic, &found, "as it is"),
    }]
}

fn tcp_buffers(machine: &Machine<'_>) -> Vec<Item> {
    let maximum = |name: &str| {
        let bound =
            if machine.profile == Profile::Dev { Bound::AsItIs } else { Bound::AtLeast(SOCKET_BYTES) };
        machine.bounded(name, &format!("/proc/sys/net/core/{name}"), bound)
    };
    let triple = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        let text = machine.text(&path).unwrap_or_default();
        let numbers: Vec<i64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match (machine.profile, numbers.as_slice()) {
            (Profile::Dev, _) => machine.left(name, &path, Form::Words),
            (_, [least, usual, most]) => {
                let wanted = format!("{least} {usual} {}", SOCKET_BYTES.max(*most));
                machine.setting(name, &path, Form::Words, &wanted)
            }
            _ => Item::unsupported(name, &format!("no {path}")),
        }
    };
    vec![maximum("rmem_max"), maximum("wmem_max"), triple("tcp_rmem"), triple("tcp_wmem")]
}

fn tcp_congestion(machine: &Machine<'_>) -> Item {
    let file = |name: &str| format!("/proc/sys/net/ipv4/{name}");
    let paced = machine.text(&file("tcp_congestion_control")).is_some_and(|now| now.starts_with("bbr"));
    let there = machine.text(&file("tcp_available_congestion_control")).unwrap_or_default();
    let wanted = if there.split_whitespace().any(|name| name == "cubic") { "cubic" } else { "reno" };
    let when = paced && machine.profile != Profile::Dev;
    machine.setting_when(when, "", &file("tcp_congestion_control"), Form::Words, wanted)
}

fn mtu(machine: &Machine<'_>) -> Vec<Item> {
    let read = |nic: String| Some((machine.number(&format!("/sys/class/net/{nic}/mtu"))?, nic));
    let all: Vec<(i64, String)> = machine.nics().into_iter().filter_map(read).collect();
    let Some((first, _)) = all.first() else {
        return vec![Item::unsupported("", NO_NIC)];
    };
    if all.len() == 1 {
        return vec![Item::info(&all[0].1, &first.to_string(), "the same on all hosts")];
    }
    let shown = all.iter().map(|(mtu, nic)| format!("{nic} {mtu}")).collect::<Vec<_>>().join(", ");
    let good = all.iter().all(|(mtu, _)| mtu == first);
    let fix = "sudo ip link set dev NIC mtu BYTES, alike on all hosts and on the switch; or name the one card by --nic";
    vec![Item::judged("", good, &shown, "all alike", fix)]
}
