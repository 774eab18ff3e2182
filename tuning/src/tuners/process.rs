//! What the process and its ring may use: io_uring, the kernel's version, limits.

use crate::machine::Machine;
use crate::model::{GONE_AT_REBOOT, Item, Mode, NOT_OURS, Severity, Tuner};

/// The first kernel whose io_uring has all that the reactor uses (DEFER_TASKRUN).
const KERNEL_MIN: (u32, u32) = (6, 1);
/// The capability to lock any memory, as capabilities(7) numbers it.
const CAP_IPC_LOCK: u32 = 14;
/// A shard's arena at its default size, and as much again for what else is registered.
const MEMLOCK_BYTES_MIN: u64 = 128 << 20;
/// Room for the chunk files of some disks and for some thousand connections.
const NOFILE_MIN: u64 = 16_384;
/// What databases and hypervisors ask for; io_uring itself does not count against it.
const AIO_MAX: i64 = 1 << 20;

/// What later kernels give the ring.
const FEATURES: &[((u32, u32), &str)] = &[
    ((5, 19), "multishot accept, ring-provided buffers"),
    ((6, 0), "zero-copy send, multishot receive"),
    ((6, 1), "deferred task work (DEFER_TASKRUN)"),
    ((6, 7), "futex wait"),
    ((6, 10), "bundled send and receive"),
    ((6, 12), "incremental buffers, atomic writes"),
    ((6, 13), "static NAPI tracking, ring resize"),
    ((6, 15), "zero-copy receive"),
];

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "io-uring",
        family: "process",
        mode: Mode::Report,
        severity: Severity::Required,
        what: "whether io_uring is allowed",
        why: "all disk and network IO of a target goes through io_uring; without it nothing starts",
        risk: "some distributions and container runtimes forbid it because of past holes in the kernel",
        places: &["/proc/sys/kernel/io_uring_disabled"],
        default: "0: allowed",
        reboot: NOT_OURS,
        sources: &["kernel: Documentation/admin-guide/sysctl/kernel.rst, io_uring_disabled"],
        at_start: true,
        inspect: io_uring,
    },
    Tuner {
        name: "kernel",
        family: "process",
        mode: Mode::Report,
        severity: Severity::Required,
        what: "the kernel's version, and what the ring can use of it",
        why: "kernels before 6.1 lack DEFER_TASKRUN, on which the reactor's loop is built",
        risk: "none: it only looks",
        places: &["/proc/sys/kernel/osrelease"],
        default: "6.1 or newer",
        reboot: NOT_OURS,
        sources: &["io_uring_setup(2)", "liburing: man/io_uring_setup.2"],
        at_start: true,
        inspect: kernel,
    },
    Tuner {
        name: "memlock",
        family: "process",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "how much memory this process may lock (RLIMIT_MEMLOCK)",
        why: "without it buffers cannot be registered with the ring, which costs CPU on each IO",
        risk: "locked memory cannot be swapped out or reclaimed",
        places: &["/proc/self/limits", "/proc/self/status"],
        default: "128 MiB or more a shard",
        reboot: NOT_OURS,
        sources: &["io_uring_register(2)", "SPDK: doc/system_configuration.md"],
        at_start: true,
        inspect: memlock,
    },
    Tuner {
        name: "nofile",
        family: "process",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "how many files this process may open (RLIMIT_NOFILE)",
        why: "chunk files are held open, and each connection is one more",
        risk: "none: it only looks",
        places: &["/proc/self/limits"],
        default: "may be raised to 16384",
        reboot: NOT_OURS,
        sources: &["getrlimit(2)", "systemd.exec(5): LimitNOFILE"],
        at_start: true,
        inspect: nofile,
    },
    Tuner {
        name: "aio-max-nr",
        family: "process",
        mode: Mode::Apply,
        severity: Severity::Optional,
        what: "requests that old asynchronous IO (io_submit) may have in flight",
        why: "targets use io_uring and need none, but fio, QEMU and seastar beside them do, and fail at start",
        risk: "some kernel memory, only when it is used",
        places: &["/proc/sys/fs/aio-max-nr"],
        default: "1048576 or more",
        reboot: GONE_AT_REBOOT,
        sources: &["kernel: Documentation/admin-guide/sysctl/fs.rst", "rpk: aio_events", "seastar: README"],
        at_start: false,
        inspect: |machine| vec![machine.at_least("", "/proc/sys/fs/aio-max-nr", AIO_MAX)],
    },
];

fn io_uring(machine: &Machine<'_>) -> Vec<Item> {
    // Kernels below 6.6 have no switch, and allow it.
    let value = machine.text("/proc/sys/kernel/io_uring_disabled");
    let good = !matches!(value.as_deref(), Some("1" | "2"));
    let fix =
        "sudo sysctl -w kernel.io_uring_disabled=0; in a container allow io_uring in the seccomp profile";
    vec![Item::judged("", good, value.as_deref().unwrap_or("no switch: allowed"), "0 (allowed)", fix)]
}

fn kernel(machine: &Machine<'_>) -> Vec<Item> {
    let wanted = format!("{}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1);
    let release = machine.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let Some(found) = version(&release) else {
        return vec![Item::unknown("", "no version in osrelease", &wanted)];
    };
    let fix = "install a newer kernel, such as that of Debian 12 or Ubuntu 24.04";
    let text = format!("{}.{}", found.0, found.1);
    let mut items = vec![Item::judged("", found >= KERNEL_MIN, &text, &wanted, fix)];
    let lacks = FEATURES.iter().filter(|(since, _)| *since > found);
    items.extend(lacks.map(|((major, minor), what)| {
        Item::info("", &format!("lacks {what}"), &format!("{major}.{minor} has it"))
    }));
    items
}

/// `6.18.3-amd64` -> (6, 18)
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Soft and hard limit of a row of `/proc/self/limits`; `u64::MAX` without a limit.
fn limit(machine: &Machine<'_>, row: &str) -> Option<(u64, u64)> {
    let text = machine.text("/proc/self/limits")?;
    let mut words = text.lines().find_map(|line| line.strip_prefix(row))?.split_whitespace();
    let mut next = || match words.next()? {
        "unlimited" => Some(u64::MAX),
        word => word.parse().ok(),
    };
    Some((next()?, next()?))
}

fn memlock(machine: &Machine<'_>) -> Vec<Item> {
    let least = MEMLOCK_BYTES_MIN * u64::from(machine.facts.shards.max(1));
    let wanted = format!("{} MiB or more", least >> 20);
    let Some((soft, _)) = limit(machine, "Max locked memory") else {
        return vec![Item::unknown("", "not in /proc/self/limits", &wanted)];
    };
    // The kernel counts no locked memory of who has CAP_IPC_LOCK, as root has.
    if has_capability(machine, CAP_IPC_LOCK) {
        return vec![Item::judged("", true, "unlimited (CAP_IPC_LOCK)", &wanted, "")];
    }
    let found = if soft == u64::MAX { "unlimited".into() } else { format!("{} MiB", soft >> 20) };
    let fix = "LimitMEMLOCK=infinity in the target's unit, or `ulimit -l unlimited` as root before it starts";
    vec![Item::judged("", soft >= least, &found, &wanted, fix)]
}

/// Whether this process has a capability, by its number in capabilities(7).
fn has_capability(machine: &Machine<'_>, number: u32) -> bool {
    let status = machine.text("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|mask| mask >> number & 1 == 1)
}

fn nofile(machine: &Machine<'_>) -> Vec<Item> {
    let wanted = format!("may be raised to {NOFILE_MIN}");
    // A target raises its soft limit by itself: the hard one counts.
    let Some((soft, hard)) = limit(machine, "Max open files") else {
        return vec![Item::unknown("", "not in /proc/self/limits", &wanted)];
    };
    let found = format!("{soft}, may be raised to {hard}");
    let fix = format!("LimitNOFILE={NOFILE_MIN} in the target's unit (ulimit -Hn {NOFILE_MIN} as root)");
    vec![Item::judged("", hard >= NOFILE_MIN, &found, &wanted, &fix)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_lock_any_memory_has_no_limit() {
        let text = "/proc/self/limits << END\nMax locked memory         8388608              8388608              bytes\nEND\n";
        for (mask, good) in [("000001ffffffffff", true), ("0000000000003fff", false), ("", false)] {
            let text = format!("{text}/proc/self/status << END\nCapEff:\t{mask}\nEND\n");
            let (tree, facts) = crate::fixture::MemTree::parse(&text).expect("well formed");
            let machine = Machine { tree: &tree, facts: &facts, profile: Default::default() };
            let item = memlock(&machine).remove(0);
            assert_eq!(item.state == crate::model::State::Good, good, "{mask}: {item:?}");
        }
    }

    #[test]
    fn kernel_releases() {
        assert_eq!(version("6.18.3-amd64"), Some((6, 18)));
        assert_eq!(version("5.10"), Some((5, 10)));
        assert_eq!(version("linux"), None);
    }
}
