//! Memory: hugepages, transparent hugepages, swapping, NUMA balancing.

use crate::machine::Machine;
use crate::model::{Bound, Form, GONE_AT_REBOOT, Item, Mode, Profile, Severity, Tuner};

const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// Memory to reserve as hugepages for each shard: twice its default arena.
const HUGEPAGE_BYTES_A_SHARD: u64 = 128 << 20;

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "hugepages",
        family: "memory",
        mode: Mode::OnDemand,
        severity: Severity::Optional,
        what: "hugepages reserved for the arenas",
        why: "one entry of the TLB then covers 2 MiB of IO buffers instead of 4 KiB",
        risk: "reserved memory is lost to everything else until it is given back",
        places: &["/proc/sys/vm/nr_hugepages", "/proc/meminfo"],
        default: "none; when named: 128 MiB a shard",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/admin-guide/mm/hugetlbpage.rst", "SPDK: scripts/setup.sh"],
        at_start: false,
        inspect: hugepages,
    },
    Tuner {
        name: "thp",
        family: "memory",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "transparent hugepages",
        why: "a target's IO memory asks for them, which \"madvise\" allows; \"always\" grows every process and stalls it while pages are compacted",
        risk: "programs that gained from hugepages without asking for them lose that",
        places: &[THP],
        default: "madvise, unless it is never (dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/admin-guide/mm/transhuge.rst", "rpk: transparent_hugepages"],
        at_start: true,
        inspect: thp,
    },
    Tuner {
        name: "swappiness",
        family: "memory",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "how readily the kernel swaps programs out to keep its page cache",
        why: "a target reads past the page cache, so that cache is never worth a page of the target",
        risk: "other programs' file caches shrink first",
        places: &["/proc/sys/vm/swappiness"],
        default: "latency, throughput: 1 or less; conservative: 10 or less; dev: as it is",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/admin-guide/sysctl/vm.rst",
            "rpk: swappiness",
            "tuned: throughput-performance",
        ],
        at_start: true,
        inspect: swappiness,
    },
    Tuner {
        name: "numa-balancing",
        family: "memory",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "automatic moving of pages between NUMA nodes",
        why: "it unmaps pages at intervals to see who touches them, which stalls a polling core",
        risk: "programs that are not pinned may stay far from their memory",
        places: &["/proc/sys/kernel/numa_balancing"],
        default: "latency, throughput: 0; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/admin-guide/sysctl/kernel.rst", "tuned: network-latency"],
        at_start: true,
        inspect: |machine| {
            let path = "/proc/sys/kernel/numa_balancing";
            vec![machine.setting_when(machine.profile.is_server(), "", path, Form::Words, "0")]
        },
    },
];

fn hugepages(machine: &Machine<'_>) -> Vec<Item> {
    let meminfo = machine.text("/proc/meminfo").unwrap_or_default();
    let size = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib: u64 = size.and_then(|size| size.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(2048);
    let pages = (HUGEPAGE_BYTES_A_SHARD * u64::from(machine.facts.shards.max(1))).div_ceil(kib << 10);
    vec![machine.at_least("", "/proc/sys/vm/nr_hugepages", pages as i64)]
}

fn thp(machine: &Machine<'_>) -> Vec<Item> {
    let found = machine.text(THP).map(|text| Form::Choice.canonical(&text));
    vec![match found.as_deref() {
        Some("never" | "madvise") => machine.setting("", THP, Form::Choice, &found.unwrap_or_default()),
        Some(_) if machine.profile == Profile::Dev => machine.left("", THP, Form::Choice),
        _ => machine.setting("", THP, Form::Choice, "madvise"),
    }]
}

fn swappiness(machine: &Machine<'_>) -> Vec<Item> {
    let path = "/proc/sys/vm/swappiness";
    let bound = match machine.profile {
        Profile::Latency | Profile::Throughput => Bound::AtMost(1),
        Profile::Conservative => Bound::AtMost(10),
        Profile::Dev => Bound::AsItIs,
    };
    vec![machine.bounded("", path, bound)]
}
