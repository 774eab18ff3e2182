//! Interrupts of disks and network cards, and whether they meet the shards' cores.
//!
//! Interrupts that the driver manages itself (NVMe, virtio disks) refuse to be moved; the engine
//! reports that as not supported here.

use crate::cpus::Cpus;
use crate::machine::Machine;
use crate::model::{Form, GONE_AT_REBOOT, Item, Mode, NOT_OURS, Profile, Severity, Tuner};

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "irqbalance",
        family: "interrupts",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "whether irqbalance would move interrupts onto the shards' cores",
        why: "it undoes what is set here within ten seconds, unless the shards' cores are banned to it",
        risk: "none: it only looks",
        places: &["/proc/PID/comm"],
        default: "not running, or the shards' cores banned",
        reboot: NOT_OURS,
        sources: &["irqbalance(1)", "seastar: perftune.py", "rpk: disk_irq, net"],
        at_start: false,
        inspect: irqbalance,
    },
    Tuner {
        name: "disk-irq",
        family: "interrupts",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "which processors the disk's interrupts go to",
        why: "an interrupt on a core that polls stops it for microseconds each time",
        risk: "the spare cores must carry them all",
        places: &["/proc/irq/N/smp_affinity_list", "/sys/.../msi_irqs"],
        default: "off the shards' cores, where those are pinned (--cpus; dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/core-api/irq/irq-affinity.rst",
            "rpk: disk_irq",
            "seastar: perftune.py",
        ],
        at_start: false,
        inspect: disk_irq,
    },
    Tuner {
        name: "nic-irq",
        family: "interrupts",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "which processors the network card's interrupts go to",
        why: "an interrupt on a core that polls stops it for microseconds each time",
        risk: "the spare cores must carry them all",
        places: &["/proc/irq/N/smp_affinity_list", "/sys/class/net/NIC/device/msi_irqs"],
        default: "off the shards' cores, where those are pinned (--cpus; dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/core-api/irq/irq-affinity.rst", "rpk: net", "seastar: perftune.py"],
        at_start: false,
        inspect: nic_irq,
    },
    Tuner {
        name: "core-overlap",
        family: "interrupts",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "shards' cores that also take the interrupts of a disk or network card",
        why: "a core that polls should do nothing else",
        risk: "none: it only looks",
        places: &["/proc/irq/N/effective_affinity_list"],
        default: "none",
        reboot: NOT_OURS,
        sources: &[
            "seastar: perftune.py (irq_cpu_mask)",
            "kernel: Documentation/core-api/irq/irq-affinity.rst",
        ],
        at_start: true,
        inspect: core_overlap,
    },
];

fn irqbalance(machine: &Machine<'_>) -> Vec<Item> {
    let wanted = "not running, or these cores banned";
    vec![match machine.runs("irqbalance") {
        None => Item::unknown("", "nobody looked at the processes", wanted),
        Some(false) => Item::judged("", true, "not running", wanted, ""),
        Some(true) if machine.facts.cpus.is_empty() => {
            Item::info("", "running; no cores are pinned", "as it is")
        }
        Some(true) => {
            let list = machine.facts.cpus.list();
            let fix = format!(
                "IRQBALANCE_BANNED_CPULIST={list} in /etc/default/irqbalance (or /etc/sysconfig/irqbalance), \
                 then sudo systemctl restart irqbalance"
            );
            Item::judged("", false, "running", &format!("cores {list} banned"), &fix)
        }
    }]
}

/// The interrupts of a device, away from the shards' cores.
fn moved(machine: &Machine<'_>, name: &str, device: &str) -> Vec<Item> {
    let irqs = machine.irqs(device);
    if irqs.is_empty() {
        return vec![Item::unsupported(name, "no interrupts of its own are listed")];
    }
    let found = format!("{} interrupts", irqs.len());
    if machine.facts.cpus.is_empty() {
        return vec![Item::info(name, &found, "as they are: no cores are pinned (--cpus)")];
    }
    if machine.profile == Profile::Dev {
        return vec![Item::info(name, &found, "as they are")];
    }
    let spare = machine.spare();
    let item = |irq: u32| {
        let (object, path) = (format!("{name} irq {irq}"), format!("/proc/irq/{irq}/smp_affinity_list"));
        let now = machine.text(&path).and_then(|text| Cpus::parse(&text));
        // One that is already where it should be is not spread anew.
        match now {
            Some(now) if now.without(&spare).is_empty() => {
                Item::judged(&object, true, &now.list(), &format!("within {}", spare.list()), "")
            }
            Some(now) if !now.and(&spare).is_empty() => {
                machine.setting(&object, &path, Form::Cpus, &now.and(&spare).list())
            }
            _ => machine.setting(&object, &path, Form::Cpus, &spare.list()),
        }
    };
    let raised = |irq: &u32| machine.tree.exists(&format!("/proc/irq/{irq}"));
    irqs.into_iter().filter(raised).map(item).collect()
}

fn disk_irq(machine: &Machine<'_>) -> Vec<Item> {
    let disks = machine.disks();
    if disks.is_empty() {
        return vec![Item::unsupported("", "no disk beneath the folder")];
    }
    disks.iter().flat_map(|disk| moved(machine, &disk.name, &disk.dir)).collect()
}

fn nic_irq(machine: &Machine<'_>) -> Vec<Item> {
    let nics = machine.nics();
    if nics.is_empty() {
        return vec![Item::unsupported("", "no network card is up")];
    }
    nics.iter().flat_map(|nic| moved(machine, nic, &format!("/sys/class/net/{nic}/device"))).collect()
}

fn core_overlap(machine: &Machine<'_>) -> Vec<Item> {
    if machine.facts.cpus.is_empty() {
        return vec![Item::info("", "no cores are pinned", "-")];
    }
    let disks = machine.disks().into_iter().map(|disk| (disk.name, disk.dir));
    let nics = machine.nics().into_iter().map(|nic| (nic.clone(), format!("/sys/class/net/{nic}/device")));
    let item = |(name, device): (String, String)| {
        let used = machine.irqs(&device).into_iter().filter_map(|irq| {
            let text = machine.text(&format!("/proc/irq/{irq}/effective_affinity_list"));
            Cpus::parse(&text.or_else(|| machine.text(&format!("/proc/irq/{irq}/smp_affinity_list")))?)
        });
        let used = used.fold(Cpus::default(), |all, cpus| Cpus(all.0.union(&cpus.0).copied().collect()));
        let shared = used.and(&machine.facts.cpus);
        let found = if shared.is_empty() { "none".to_owned() } else { format!("cores {}", shared.list()) };
        let fix = "ashlar tune apply disk-irq nic-irq --cpus LIST; interrupts that the driver manages follow the \
                   isolation on the kernel line (isolcpus=managed_irq)";
        Item::judged(&name, shared.is_empty(), &found, "none", fix)
    };
    disks.chain(nics).map(item).collect()
}
