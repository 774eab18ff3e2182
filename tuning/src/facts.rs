//! What is read from the machine. A fact that cannot be read is absent.

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{major, minor, stat};
use std::fs;
use std::path::{Path, PathBuf};

/// Everything the checks look at.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for privileged groups only, 2 forbidden. Kernels
    /// below 6.6 do not have it.
    pub io_uring_disabled: Option<String>,
    /// Major and minor version of the kernel.
    pub kernel: Option<(u32, u32)>,
    /// Bytes of memory that may be locked; `u64::MAX` without a limit.
    pub memlock_bytes: Option<u64>,
    /// Files that may be open at once, and how far a process may raise that by itself.
    pub nofile: Option<(u64, u64)>,
    /// The chosen word of transparent_hugepage/enabled.
    pub transparent_hugepages: Option<String>,
    /// The chosen IO scheduler of the disk.
    pub scheduler: Option<String>,
    /// Whether the disk says that it rotates.
    pub rotational: Option<bool>,
    /// The type of the file system beneath the folder.
    pub file_system: Option<String>,
    /// CPU governors in use, each once.
    pub governors: Vec<String>,
}

impl Facts {
    /// Reads them; `disk` is a folder on the disk in question.
    pub fn read(disk: &Path) -> Self {
        let queue = queue_of(disk);
        let of_queue = |name| queue.as_ref().and_then(|queue| word(&queue.join(name)));
        Self {
            io_uring_disabled: word(Path::new("/proc/sys/kernel/io_uring_disabled")),
            kernel: word(Path::new("/proc/sys/kernel/osrelease")).and_then(|release| version(&release)),
            memlock_bytes: getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|(soft, _)| soft),
            nofile: getrlimit(Resource::RLIMIT_NOFILE).ok(),
            transparent_hugepages: word(Path::new("/sys/kernel/mm/transparent_hugepage/enabled"))
                .and_then(|words| chosen(&words)),
            scheduler: of_queue("scheduler").and_then(|words| chosen(&words)),
            rotational: of_queue("rotational").map(|flag| flag == "1"),
            file_system: fs::read_to_string("/proc/self/mountinfo").ok().and_then(|m| file_system(&m, disk)),
            governors: governors(),
        }
    }
}

fn word(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// "none [mq-deadline] kyber" -> "mq-deadline"; a single word stands for itself.
fn chosen(words: &str) -> Option<String> {
    match words.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
        Some((word, _)) => Some(word.to_owned()),
        None => (!words.is_empty() && !words.contains(' ')).then(|| words.to_owned()),
    }
}

/// "6.18.3-amd64" -> (6, 18)
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The queue folder of the disk beneath a folder; a partition has none, its disk does.
fn queue_of(folder: &Path) -> Option<PathBuf> {
    let device = stat(folder).ok()?.st_dev;
    let device = fs::canonicalize(format!("/sys/dev/block/{}:{}", major(device), minor(device))).ok()?;
    [device.join("queue"), device.parent()?.join("queue")].into_iter().find(|queue| queue.is_dir())
}

/// The type of the deepest mount that holds the folder, as `/proc/self/mountinfo` has it.
fn file_system(mounts: &str, folder: &Path) -> Option<String> {
    let folder = folder.canonicalize().ok()?;
    let beneath = mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        folder
            .starts_with(point)
            .then(|| (point.len(), kind.split(' ').next().unwrap_or_default().to_owned()))
    });
    // The last of equals is mounted over the others.
    beneath.max_by_key(|(length, _)| *length).map(|(_, kind)| kind)
}

fn governors() -> Vec<String> {
    let Ok(cpus) = fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let files = cpus.flatten().map(|cpu| cpu.path().join("cpufreq/scaling_governor"));
    let mut governors: Vec<_> = files.filter_map(|file| word(&file)).collect();
    governors.sort();
    governors.dedup();
    governors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_way_of_marking_a_choice() {
        assert_eq!(chosen("none [mq-deadline] kyber").as_deref(), Some("mq-deadline"));
        assert_eq!(chosen("none").as_deref(), Some("none"));
        assert_eq!(chosen("a b"), None);
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn kernel_releases() {
        assert_eq!(version("6.18.3-amd64"), Some((6, 18)));
        assert_eq!(version("5.10"), Some((5, 10)));
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn the_deepest_mount_wins() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:5 / /proc rw - proc proc rw\n";
        assert_eq!(file_system(mounts, Path::new("/proc/self")).as_deref(), Some("proc"));
        assert_eq!(file_system(mounts, Path::new("/")).as_deref(), Some("ext4"));
    }
}
