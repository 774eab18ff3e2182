//! The disk's request queue, its cache, its polling queues, and how it hangs on the PCI bus.

use crate::machine::{Disk, Machine};
use crate::model::{Bound, Form, GONE_AT_REBOOT, Item, Mode, NOT_OURS, Profile, Severity, Tuner};

/// Kibibytes of the longest log batch: 256 blocks and its header, rounded up.
const BATCH_KIB: i64 = 1280;
/// Room for the reads, flushes and batches of some shards at once.
const DEPTH: i64 = 512;

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "scheduler",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "the disk's IO scheduler",
        why: "a shard orders and batches its IO itself; a scheduler beneath adds a lock and latency",
        risk: "on a disk shared with other programs, nobody is fair between them any more",
        places: &["/sys/block/DISK/queue/scheduler"],
        default: "none (a disk that rotates: mq-deadline; dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/block/switching-sched.rst",
            "rpk: disk_scheduler",
            "seastar: perftune.py",
        ],
        at_start: true,
        inspect: |machine| each(machine, |disk| scheduler(machine, disk)),
    },
    Tuner {
        name: "nomerges",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "whether the kernel looks for neighbours to merge a request with",
        why: "a shard's requests are merged already, so that the search is in vain",
        risk: "programs that write in small neighbouring pieces send more requests",
        places: &["/sys/block/DISK/queue/nomerges"],
        default: "latency: 2 (none); else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/ABI/stable/sysfs-block",
            "rpk: disk_nomerges",
            "seastar: perftune.py",
        ],
        at_start: false,
        inspect: |machine| {
            let when = machine.profile == Profile::Latency;
            each(machine, |disk| {
                machine.setting_when(when, &disk.name, &disk.queue("nomerges"), Form::Words, "2")
            })
        },
    },
    Tuner {
        name: "wbt",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "throttling of background writes (wbt_lat_usec)",
        why: "a target's writes are direct and are not throttled, but each is still counted and timed",
        risk: "a program that writes a lot through the page cache may delay others' reads",
        places: &["/sys/block/DISK/queue/wbt_lat_usec"],
        default: "latency, throughput: 0 (off) on disks that do not rotate; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/ABI/stable/sysfs-block", "kernel: block/blk-wbt.c"],
        at_start: true,
        inspect: |machine| {
            each(machine, |disk| {
                let when = machine.profile.is_server() && machine.is_solid(disk);
                machine.setting_when(when, &disk.name, &disk.queue("wbt_lat_usec"), Form::Words, "0")
            })
        },
    },
    Tuner {
        name: "nr-requests",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "requests that may wait in the disk's queue",
        why: "with fewer than the device takes, a busy target's submissions block",
        risk: "with a scheduler, a deep queue can starve other programs",
        places: &["/sys/block/DISK/queue/nr_requests", "/sys/block/DISK/mq/0/nr_tags"],
        default: "throughput: 512 or more, no more than the device takes; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/ABI/stable/sysfs-block"],
        at_start: false,
        inspect: |machine| each(machine, |disk| nr_requests(machine, disk)),
    },
    Tuner {
        name: "rq-affinity",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "on which processor a request completes",
        why: "2 completes it on the very core that submitted it, where the shard's cache lines are",
        risk: "an interrupt between processors when the disk has fewer queues than there are cores",
        places: &["/sys/block/DISK/queue/rq_affinity"],
        default: "latency, throughput: 2; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/ABI/stable/sysfs-block"],
        at_start: true,
        inspect: |machine| {
            let when = machine.profile.is_server();
            each(machine, |disk| {
                machine.setting_when(when, &disk.name, &disk.queue("rq_affinity"), Form::Words, "2")
            })
        },
    },
    Tuner {
        name: "max-sectors",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "the longest request that the kernel does not split",
        why: "a log batch has up to 1 MiB and a header, and should reach the disk as one request",
        risk: "long requests delay short ones a little",
        places: &["/sys/block/DISK/queue/max_sectors_kb", "/sys/block/DISK/queue/max_hw_sectors_kb"],
        default: "1280 or more, no more than the device takes (dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/ABI/stable/sysfs-block"],
        at_start: false,
        inspect: |machine| each(machine, |disk| max_sectors(machine, disk)),
    },
    Tuner {
        name: "read-ahead",
        family: "disk",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "how much is read ahead into the page cache",
        why: "a target reads past the page cache; what others read ahead takes the disk's time",
        risk: "programs that read large files in order are slower",
        places: &["/sys/block/DISK/queue/read_ahead_kb"],
        default: "latency, throughput: 128 or less; else as it is",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/ABI/stable/sysfs-block", "readahead(2)"],
        at_start: false,
        inspect: |machine| {
            let bound = if machine.profile.is_server() { Bound::AtMost(128) } else { Bound::AsItIs };
            each(machine, |disk| machine.bounded(&disk.name, &disk.queue("read_ahead_kb"), bound))
        },
    },
    Tuner {
        name: "write-cache",
        family: "disk",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "whether the disk has a volatile cache, and so whether it claims power-loss protection",
        why: "a disk without a volatile cache makes each durable write cheap; with one, each is a flush or FUA",
        risk: "never lie to the kernel about it: data is lost when power fails",
        places: &["/sys/block/DISK/queue/write_cache", "/sys/block/DISK/queue/fua"],
        default: "write through; a disk with power-loss protection says so",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/block/writeback_cache_control.rst", "rpk: disk_write_cache"],
        at_start: false,
        inspect: |machine| each(machine, |disk| write_cache(machine, disk)),
    },
    Tuner {
        name: "poll-queues",
        family: "disk",
        mode: Mode::Report,
        severity: Severity::Optional,
        what: "queues of an NVMe disk that are polled instead of interrupting (IOPOLL)",
        why: "they are what io_uring's IOPOLL needs, and exist only if the driver was loaded with them",
        risk: "each takes a queue from the interrupting ones",
        places: &["/sys/module/nvme/parameters/poll_queues", "/sys/block/DISK/queue/io_poll"],
        default: "one a shard",
        reboot: NOT_OURS,
        sources: &[
            "io_uring_setup(2), IORING_SETUP_IOPOLL",
            "fio: --hipri",
            "kernel: drivers/nvme/host/pci.c",
        ],
        at_start: false,
        inspect: |machine| each(machine, |disk| poll_queues(machine, disk)),
    },
    Tuner {
        name: "pcie-link",
        family: "disk",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "the width and speed of the disk's PCIe link",
        why: "a card that is badly seated or in a narrow slot runs at half its speed, and nothing else says so",
        risk: "none: it only looks",
        places: &[
            "/sys/.../current_link_width",
            "/sys/.../current_link_speed",
            "/sys/.../max_link_width",
            "/sys/.../max_link_speed",
        ],
        default: "as wide and as fast as the device can",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/ABI/testing/sysfs-bus-pci"],
        at_start: false,
        inspect: |machine| each(machine, |disk| pcie_link(machine, disk)),
    },
];

fn each(machine: &Machine<'_>, look: impl Fn(&Disk) -> Item) -> Vec<Item> {
    super::each(&machine.disks(), "no disk beneath the folder", |disk| vec![look(disk)])
}

fn scheduler(machine: &Machine<'_>, disk: &Disk) -> Item {
    let path = disk.queue("scheduler");
    let words = machine.text(&path).unwrap_or_default();
    let offered = |word: &str| words.split_whitespace().any(|w| w.trim_matches(['[', ']']) == word);
    let wanted = if machine.is_solid(disk) { "none" } else { "mq-deadline" };
    if machine.profile == Profile::Dev || !offered(wanted) {
        return machine.left(&disk.name, &path, Form::Choice);
    }
    let mut item = machine.setting(&disk.name, &path, Form::Choice, wanted);
    if let Some(change) = &mut item.change {
        // The kernel sets these anew for each scheduler.
        let reset = ["nr_requests", "wbt_lat_usec"].map(|file| (disk.queue(file), Form::Words));
        change.collateral = reset.into_iter().filter(|(path, _)| machine.tree.exists(path)).collect();
    }
    item
}

fn nr_requests(machine: &Machine<'_>, disk: &Disk) -> Item {
    let path = disk.queue("nr_requests");
    let tags = machine.number(&format!("{}/mq/0/nr_tags", disk.dir));
    // Without a scheduler, there can be no more than the device has tags.
    let bound = match machine.profile {
        Profile::Throughput => Bound::AtLeast(tags.unwrap_or(DEPTH).min(DEPTH)),
        _ => Bound::AsItIs,
    };
    machine.bounded(&disk.name, &path, bound)
}

fn max_sectors(machine: &Machine<'_>, disk: &Disk) -> Item {
    let path = disk.queue("max_sectors_kb");
    let bound = match machine.number(&disk.queue("max_hw_sectors_kb")) {
        Some(most) if machine.profile != Profile::Dev => Bound::AtLeast(most.min(BATCH_KIB)),
        _ => Bound::AsItIs,
    };
    machine.bounded(&disk.name, &path, bound)
}

fn write_cache(machine: &Machine<'_>, disk: &Disk) -> Item {
    let fua = machine.number(&disk.queue("fua")) == Some(1);
    let wanted = "write through (no volatile cache)";
    match machine.text(&disk.queue("write_cache")).as_deref() {
        Some("write through") => Item::judged(
            &disk.name,
            true,
            "write through: claims that what it took survives a power cut",
            wanted,
            "",
        ),
        Some(_) => {
            let how = if fua {
                "each durable write is one with FUA"
            } else {
                "each durable write is followed by a flush"
            };
            let found = format!("write back: no power-loss protection is claimed; {how}");
            let fix = "`ashlar tune probe` tells what that costs; disks for servers with power-loss protection have no volatile cache";
            Item::judged(&disk.name, false, &found, wanted, fix)
        }
        None => Item::unsupported(&disk.name, "it does not say"),
    }
}

fn poll_queues(machine: &Machine<'_>, disk: &Disk) -> Item {
    if !disk.name.starts_with("nvme") {
        return Item::unsupported(&disk.name, "not an NVMe disk");
    }
    let shards = i64::from(machine.facts.shards.max(1));
    let Some(found) = machine.number("/sys/module/nvme/parameters/poll_queues") else {
        return Item::unsupported(&disk.name, "no driver parameter poll_queues");
    };
    let polls = machine.number(&disk.queue("io_poll")) == Some(1);
    let fix = format!(
        "echo 'options nvme poll_queues={shards}' | sudo tee /etc/modprobe.d/ashlar-nvme.conf, rebuild the \
         initramfs, restart (on the kernel line: nvme.poll_queues={shards})"
    );
    let shown = format!("{found}, {}", if polls { "polling possible" } else { "no polling" });
    Item::judged(&disk.name, found >= shards && polls, &shown, &format!("{shards} or more"), &fix)
}

fn pcie_link(machine: &Machine<'_>, disk: &Disk) -> Item {
    let Some(pci) = machine.pci_of(&disk.dir) else {
        return Item::unsupported(&disk.name, "not on a PCI bus");
    };
    let read = |file: &str| machine.text(&format!("{pci}/{file}"));
    let link = |which: &str| {
        let (width, speed) = (read(&format!("{which}_link_width"))?, read(&format!("{which}_link_speed"))?);
        let known = width != "0" && width != "255" && !speed.starts_with("Unknown");
        known.then(|| format!("x{width} at {}", speed.trim_end_matches(" PCIe")))
    };
    match (link("current"), link("max")) {
        (Some(now), Some(most)) => {
            let fix = "move the card to a slot with as many lanes, seat it anew, look at the BIOS (ASPM, bifurcation)";
            Item::judged(&disk.name, now == most, &now, &most, fix)
        }
        _ => Item::unsupported(&disk.name, "the bus does not say"),
    }
}
