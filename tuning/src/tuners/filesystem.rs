//! The file system beneath a target's folder.

use crate::machine::Machine;
use crate::model::{Item, Mode, NOT_OURS, Severity, Tuner};

pub static TUNERS: &[Tuner] = &[
    Tuner {
        name: "file-system",
        family: "file system",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "the type of the file system beneath the folder",
        why: "tmpfs and overlays hand each IO to a worker thread, copy-on-write ones rewrite in place slowly",
        risk: "none: it only looks",
        places: &["/proc/self/mountinfo"],
        default: "ext4 or xfs",
        reboot: NOT_OURS,
        sources: &["seastar: xfs is required for its own IO", "io_uring(7)"],
        at_start: true,
        inspect: file_system,
    },
    Tuner {
        name: "mount-options",
        family: "file system",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "the options that file system is mounted with",
        why: "`discard` sends trims amid the IO, `data=journal` refuses direct IO, `dax` bypasses it, `nobarrier` loses data",
        risk: "none: it only looks",
        places: &["/proc/self/mountinfo"],
        default: "noatime; no discard (use fstrim.timer), no data=journal, no dax, no nobarrier",
        reboot: NOT_OURS,
        sources: &["ext4(5)", "xfs(5)", "kernel: Documentation/filesystems/dax.rst", "rpk: fstrim"],
        at_start: true,
        inspect: mount_options,
    },
    Tuner {
        name: "free-space",
        family: "file system",
        mode: Mode::Report,
        severity: Severity::Recommended,
        what: "room for log segments and for chunks formatted ahead",
        why: "log files are preallocated and fully written, so that no IO waits for the file system's metadata",
        risk: "none: it only looks",
        places: &["statvfs(3) of the folder"],
        default: "a tenth free, and 4 GiB at least",
        reboot: NOT_OURS,
        sources: &["fallocate(2)", "rpk: ballast_file"],
        at_start: true,
        inspect: free_space,
    },
];

/// What is left of a log of 8 segments of 64 MiB and the reserve of chunks, several times.
const FREE_BYTES_MIN: u64 = 4 << 30;

struct Mount {
    point: String,
    kind: String,
    options: Vec<String>,
}

/// The deepest mount of the folder's file system, as `/proc/self/mountinfo` has it.
fn mount(machine: &Machine<'_>) -> Option<Mount> {
    let (dir, (major, minor)) = (machine.facts.dir.as_deref()?, machine.facts.disk?);
    let text = machine.text("/proc/self/mountinfo")?;
    let device = format!("{major}:{minor}");
    let holds = |point: &str| {
        let rest = dir.strip_prefix(point.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let beneath = text.lines().filter_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let head: Vec<_> = head.split(' ').collect();
        let tail: Vec<_> = tail.split(' ').collect();
        let (point, options) = (unescaped(head.get(4)?), head.get(5)?);
        // A file system on several devices (btrfs) has a number that its mount does not show.
        (holds(&point) && (*head.get(2)? == device || tail.first() == Some(&"btrfs"))).then(|| {
            let more = tail.get(2).copied().unwrap_or_default();
            let options = options.split(',').chain(more.split(',')).map(str::to_owned).collect();
            (point.len(), Mount { point, kind: tail[0].to_owned(), options })
        })
    });
    beneath.max_by_key(|(length, _)| *length).map(|(_, mount)| mount)
}

/// The kernel writes a space in a path as `\040`.
fn unescaped(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t")
}

fn file_system(machine: &Machine<'_>) -> Vec<Item> {
    let wanted = "ext4 or xfs";
    let Some(mount) = mount(machine) else {
        return vec![Item::unknown("", "no mount of the folder was found", wanted)];
    };
    let fix = "give the target a folder on an ext4 or xfs file system";
    vec![Item::judged("", matches!(mount.kind.as_str(), "ext4" | "xfs"), &mount.kind, wanted, fix)]
}

fn mount_options(machine: &Machine<'_>) -> Vec<Item> {
    let Some(mount) = mount(machine) else {
        return vec![Item::unknown("", "no mount of the folder was found", "-")];
    };
    let has = |word: &str| mount.options.iter().any(|option| option == word);
    let undiscard = format!(
        "sudo mount -o remount,nodiscard {}; the same in /etc/fstab; sudo systemctl enable --now fstrim.timer",
        mount.point
    );
    let bad: &[(&str, &str)] = &[
        ("discard", &undiscard),
        ("data=journal", "mount with data=ordered"),
        ("nobarrier", "mount with barriers: without them a power cut loses acknowledged writes"),
        ("barrier=0", "mount with barriers: without them a power cut loses acknowledged writes"),
        ("dax", "mount with dax=never"),
        ("dax=always", "mount with dax=never"),
        ("sync", "mount without it: a target says itself what must be durable"),
        ("strictatime", "mount with noatime"),
    ];
    let found: Vec<_> = bad.iter().filter(|(option, _)| has(option)).collect();
    let mut items: Vec<_> =
        found.iter().map(|(option, fix)| Item::judged(option, false, option, "without it", fix)).collect();
    if items.is_empty() {
        let atime = ["noatime", "relatime"].into_iter().find(|word| has(word)).unwrap_or("no harmful option");
        items.push(Item::judged("", true, atime, "no harmful option", ""));
    }
    items
}

fn free_space(machine: &Machine<'_>) -> Vec<Item> {
    let (Some(free), Some(total)) = (machine.facts.free_bytes, machine.facts.total_bytes) else {
        return vec![Item::unsupported("", "not a folder on a disk")];
    };
    let good = free >= FREE_BYTES_MIN && free >= total / 10;
    let found = format!("{} GiB of {} GiB free", free >> 30, total >> 30);
    vec![Item::judged(
        "",
        good,
        &found,
        "a tenth, and 4 GiB at least",
        "free some space, or use a larger disk",
    )]
}
