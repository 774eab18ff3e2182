//! Clocks: how fast they are read, and whether they are right.

use crate::machine::Machine;
use crate::model::{Form, GONE_AT_REBOOT, Item, Mode, NOT_OURS, Severity, Tuner};

const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0";

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "clocksource",
        family: "time",
        mode: Mode::Apply,
        severity: Severity::Recommended,
        what: "which counter the kernel's clock is read from",
        why: "hpet and acpi_pm are read by a system call that takes a microsecond; a shard reads the clock each turn",
        risk: "the kernel leaves the TSC only when it found it unstable; it is chosen only where it is still offered",
        places: &["/sys/devices/system/clocksource/clocksource0/current_clocksource"],
        default: "tsc, or the hypervisor's own, where offered (dev: as it is)",
        reboot: GONE_AT_REBOOT,
        sources: &[
            "kernel: Documentation/virt/kvm/x86/timekeeping.rst",
            "rpk: clocksource",
            "seastar: perftune.py",
        ],
        at_start: true,
        inspect: clocksource,
    },
    Tuner {
        name: "time-sync",
        family: "time",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "whether a daemon keeps the clock right",
        why: "leases go by the monotonic clock, but logs of several hosts are read side by side",
        risk: "none: it only looks",
        places: &["/run/systemd/timesync/synchronized", "/proc/PID/comm"],
        default: "chrony, ntpd, systemd-timesyncd or PTP",
        reboot: NOT_OURS,
        sources: &["rpk: ntp checker", "chronyd(8)", "systemd-timesyncd.service(8)"],
        at_start: false,
        inspect: time_sync,
    },
];

fn clocksource(machine: &Machine<'_>) -> Vec<Item> {
    let path = format!("{CLOCK}/current_clocksource");
    let Some(current) = machine.text(&path) else {
        return vec![Item::unsupported("", "no choice of a clock source")];
    };
    let offered = machine.text(&format!("{CLOCK}/available_clocksource")).unwrap_or_default();
    // These are read without a system call.
    let fast = ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "xen"];
    let best = fast.into_iter().find(|clock| offered.split_whitespace().any(|word| word == *clock));
    vec![match best {
        _ if fast.contains(&current.as_str()) => {
            Item::judged("", true, &current, "one read without a system call", "")
        }
        Some(best) if machine.profile != crate::model::Profile::Dev => {
            machine.setting("", &path, Form::Words, best)
        }
        _ => {
            let fix = "the kernel found the TSC unstable (dmesg | grep -i tsc); tsc=reliable on the kernel line \
                       only if the hardware's maker vouches for it";
            Item::judged("", false, &current, "one read without a system call", fix)
        }
    }]
}

fn time_sync(machine: &Machine<'_>) -> Vec<Item> {
    let wanted = "a daemon that keeps the clock right";
    if machine.tree.exists("/run/systemd/timesync/synchronized") {
        return vec![Item::judged("", true, "synchronized by systemd-timesyncd", wanted, "")];
    }
    let known = ["chronyd", "ntpd", "openntpd", "systemd-timesyn", "ptp4l", "phc2sys"];
    let running = known.into_iter().find(|name| machine.runs(name) == Some(true));
    vec![match running {
        Some(name) => Item::judged("", true, &format!("{name} runs"), wanted, ""),
        None if machine.facts.daemons.is_none() => {
            Item::unknown("", "nobody looked at the processes", wanted)
        }
        None => Item::judged(
            "",
            false,
            "none runs",
            wanted,
            "sudo apt-get install chrony (in a virtual machine, the host may do it)",
        ),
    }]
}
