//! The checks themselves: facts in, findings out.

use crate::facts::Facts;
use serde::Serialize;

/// How much a check matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// A target does not work without it.
    Required,
    /// It works, but slower or with less room.
    Advised,
}

/// What a check came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As wanted.
    Good,
    /// Not as wanted.
    Bad,
    /// The value could not be read.
    Unknown,
}

/// One check's result.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// How much it matters.
    pub weight: Weight,
    /// What it came to.
    pub verdict: Verdict,
    /// What was found.
    pub value: String,
    /// What is wanted.
    pub wanted: String,
    /// Why it is wanted.
    pub why: &'static str,
    /// A line to paste, or what to do.
    pub fix: String,
}

impl Finding {
    /// Required, and not there.
    pub fn is_failure(&self) -> bool {
        self.weight == Weight::Required && self.verdict == Verdict::Bad
    }

    /// The row's mark in the table.
    pub fn mark(&self) -> &'static str {
        match (self.verdict, self.weight) {
            (Verdict::Good, _) => "ok",
            (Verdict::Unknown, _) => "?",
            (Verdict::Bad, Weight::Required) => "FAIL",
            (Verdict::Bad, Weight::Advised) => "warn",
        }
    }
}

/// The first kernel whose io_uring has all that the reactor uses (DEFER_TASKRUN).
const KERNEL_MIN: (u32, u32) = (6, 1);
/// A shard's arena at its default size is registered with the kernel, which locks it.
const MEMLOCK_BYTES_MIN: u64 = 512 << 20;
/// Room for the chunk files of some disks and for some thousand connections.
const NOFILE_MIN: u64 = 16_384;

/// Every check.
pub fn all(facts: &Facts) -> Vec<Finding> {
    vec![
        kernel(facts),
        io_uring(facts),
        file_system(facts),
        nofile(facts),
        memlock(facts),
        scheduler(facts),
        hugepages(facts),
        governor(facts),
    ]
}

fn verdict(good: Option<bool>) -> Verdict {
    match good {
        Some(true) => Verdict::Good,
        Some(false) => Verdict::Bad,
        None => Verdict::Unknown,
    }
}

fn shown<T: ToString>(value: Option<T>) -> String {
    value.map_or("unknown".into(), |value| value.to_string())
}

fn kernel(facts: &Facts) -> Finding {
    let (major, minor) = KERNEL_MIN;
    Finding {
        name: "kernel",
        weight: Weight::Required,
        verdict: verdict(facts.kernel.map(|version| version >= KERNEL_MIN)),
        value: shown(facts.kernel.map(|(major, minor)| format!("{major}.{minor}"))),
        wanted: format!("{major}.{minor} or newer"),
        why: "older kernels lack parts of io_uring that the reactor is built on",
        fix: "install a newer kernel, such as that of Debian 12 or newer".into(),
    }
}

fn io_uring(facts: &Facts) -> Finding {
    // A kernel without the switch allows it.
    let value = facts.io_uring_disabled.as_deref().unwrap_or("no switch, allowed");
    Finding {
        name: "io_uring",
        weight: Weight::Required,
        verdict: verdict(Some(!matches!(value, "1" | "2"))),
        value: value.into(),
        wanted: "0 (allowed)".into(),
        why: "all disk and network IO goes through io_uring",
        fix: "sudo sysctl -w kernel.io_uring_disabled=0; in a container allow it in the seccomp profile"
            .into(),
    }
}

fn file_system(facts: &Facts) -> Finding {
    let good = facts.file_system.as_deref().map(|kind| matches!(kind, "ext4" | "xfs"));
    Finding {
        name: "file system",
        weight: Weight::Advised,
        verdict: verdict(good),
        value: shown(facts.file_system.as_deref()),
        wanted: "ext4 or xfs".into(),
        why: "measured there; tmpfs and overlay hand each IO to a worker thread, copy-on-write ones rewrite in place slowly",
        fix: "give the target a folder on an ext4 or xfs file system".into(),
    }
}

fn nofile(facts: &Facts) -> Finding {
    // A target raises its soft limit by itself: the hard one counts.
    Finding {
        name: "open files",
        weight: Weight::Advised,
        verdict: verdict(facts.nofile.map(|(_, hard)| hard >= NOFILE_MIN)),
        value: shown(facts.nofile.map(|(soft, hard)| format!("{soft}, may be raised to {hard}"))),
        wanted: format!("may be raised to {NOFILE_MIN}"),
        why: "chunk files are held open, and each connection is one more",
        fix: format!("LimitNOFILE={NOFILE_MIN} in the service's unit, or ulimit -Hn {NOFILE_MIN} as root"),
    }
}

fn memlock(facts: &Facts) -> Finding {
    Finding {
        name: "locked memory",
        weight: Weight::Advised,
        verdict: verdict(facts.memlock_bytes.map(|bytes| bytes >= MEMLOCK_BYTES_MIN)),
        value: shown(facts.memlock_bytes.map(mebibytes)),
        wanted: format!("{} or more, a shard", mebibytes(MEMLOCK_BYTES_MIN)),
        why: "without it the buffers are not registered with the kernel, which costs CPU on each IO",
        fix: "LimitMEMLOCK=infinity and AmbientCapabilities=CAP_IPC_LOCK in the service's unit".into(),
    }
}

fn mebibytes(bytes: u64) -> String {
    if bytes == u64::MAX { "unlimited".into() } else { format!("{} MiB", bytes >> 20) }
}

fn scheduler(facts: &Facts) -> Finding {
    let good =
        facts.scheduler.as_deref().map(|scheduler| scheduler == "none" || facts.rotational == Some(true));
    Finding {
        name: "IO scheduler",
        weight: Weight::Advised,
        verdict: verdict(good),
        value: shown(facts.scheduler.as_deref()),
        wanted: "none, on a disk that does not rotate".into(),
        why: "the shard orders its IO itself; a scheduler beneath adds latency and a lock",
        fix: "echo none | sudo tee /sys/block/DISK/queue/scheduler".into(),
    }
}

fn hugepages(facts: &Facts) -> Finding {
    let good = facts.transparent_hugepages.as_deref().map(|chosen| chosen != "always");
    Finding {
        name: "transparent hugepages",
        weight: Weight::Advised,
        verdict: verdict(good),
        value: shown(facts.transparent_hugepages.as_deref()),
        wanted: "madvise or never".into(),
        why: "\"always\" grows every process and stalls it while pages are compacted",
        fix: "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled".into(),
    }
}

fn governor(facts: &Facts) -> Finding {
    let known = !facts.governors.is_empty();
    Finding {
        name: "CPU governor",
        weight: Weight::Advised,
        verdict: verdict(known.then(|| facts.governors.iter().all(|governor| governor == "performance"))),
        value: if known { facts.governors.join(", ") } else { "unknown".into() },
        wanted: "performance".into(),
        why: "a core that clocks up only under load answers the first IOs late; a virtual machine has none",
        fix: "sudo cpupower frequency-set -g performance".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            io_uring_disabled: Some("0".into()),
            kernel: Some((6, 1)),
            memlock_bytes: Some(u64::MAX),
            nofile: Some((1024, 1 << 20)),
            transparent_hugepages: Some("madvise".into()),
            scheduler: Some("none".into()),
            rotational: Some(false),
            file_system: Some("ext4".into()),
            governors: vec!["performance".into()],
        }
    }

    /// The checks that do not come out good, with their marks.
    fn marks(facts: &Facts) -> Vec<(&'static str, &'static str)> {
        let all = all(facts);
        all.iter().filter(|f| f.verdict != Verdict::Good).map(|f| (f.name, f.mark())).collect()
    }

    #[test]
    fn a_good_machine_has_nothing_to_mend() {
        assert_eq!(marks(&good()), []);
    }

    #[test]
    fn a_forbidden_io_uring_fails_but_an_old_kernels_lack_of_the_switch_does_not() {
        assert_eq!(marks(&Facts { io_uring_disabled: Some("2".into()), ..good() }), [("io_uring", "FAIL")]);
        assert_eq!(marks(&Facts { io_uring_disabled: Some("1".into()), ..good() }), [("io_uring", "FAIL")]);
        assert_eq!(marks(&Facts { io_uring_disabled: None, ..good() }), []);
        assert_eq!(marks(&Facts { kernel: Some((5, 19)), ..good() }), [("kernel", "FAIL")]);
    }

    #[test]
    fn what_is_only_advised_warns() {
        let worse = Facts {
            memlock_bytes: Some(8 << 20),
            nofile: Some((1024, 4096)),
            transparent_hugepages: Some("always".into()),
            scheduler: Some("mq-deadline".into()),
            file_system: Some("overlay".into()),
            governors: vec!["performance".into(), "powersave".into()],
            ..good()
        };
        assert_eq!(marks(&worse).len(), 6);
        assert!(marks(&worse).iter().all(|(_, mark)| *mark == "warn"));
        assert!(!all(&worse).iter().any(Finding::is_failure));
    }

    #[test]
    fn a_disk_that_rotates_may_keep_its_scheduler() {
        let spinning = Facts { scheduler: Some("bfq".into()), rotational: Some(true), ..good() };
        assert_eq!(marks(&spinning), []);
    }

    #[test]
    fn what_cannot_be_read_is_never_a_pass() {
        let blind = Facts::default();
        let unknown = all(&blind).iter().filter(|f| f.verdict == Verdict::Unknown).count();
        assert_eq!(unknown, 7, "all but io_uring");
    }
}
