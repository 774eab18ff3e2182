//! Where a benchmark ran: enough to judge its figures, read from the system at the start of a run.
//!
//! Deliberately absent: host names, user names and paths, since results are published.

use serde::{Deserialize, Serialize};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// The machine and the versions of all that took part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Environment {
    /// UTC, as in 2026-01-31T12:00:00Z.
    pub time: String,
    /// Version of this program.
    pub ashlar: String,
    /// Whether this program was built with debug assertions, in which case its figures mean little.
    pub debug_build: bool,
    /// Release of the kernel.
    pub kernel: String,
    /// The processor's name.
    pub cpu: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// Memory of the machine in MiB.
    pub memory_mib: u64,
    /// Type and device of the file system that the first measured file, or else what is kept, lies on.
    pub file_system: String,
    /// Version of fio.
    pub fio: String,
    /// Version of qemu-nbd; empty when it took no part.
    pub qemu_nbd: String,
}

impl Environment {
    /// Reads the environment of a run whose files lie in `scratch`.
    pub fn read(scratch: &Path, fio: String, qemu_nbd: String) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self {
            time: utc(seconds),
            ashlar: env!("CARGO_PKG_VERSION").to_owned(),
            debug_build: cfg!(debug_assertions),
            kernel: file_line("/proc/sys/kernel/osrelease", ""),
            cpu: file_line("/proc/cpuinfo", "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: file_line("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0)
                >> 10,
            file_system: file_system(scratch),
            fio,
            qemu_nbd,
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let Self { time, ashlar, kernel, cpu, cpus, memory_mib, file_system, fio, qemu_nbd, .. } = self;
        let build = if self.debug_build { " (DEBUG BUILD)" } else { "" };
        let fio = if fio.is_empty() { String::new() } else { format!(", {fio}") };
        let qemu = if qemu_nbd.is_empty() { String::new() } else { format!(", {qemu_nbd}") };
        format!(
            "{time}: ashlar {ashlar}{build}, Linux {kernel}, {cpus} x {cpu}, {memory_mib} MiB, {file_system}{fio}{qemu}"
        )
    }
}

/// The revision of the source that this program lies in; empty where there is none.
pub fn revision() -> String {
    let folder = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.to_owned()));
    let output = folder.and_then(|dir| {
        Command::new("git").arg("-C").arg(dir).args(["describe", "--always", "--dirty"]).output().ok()
    });
    output
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The first half of the kernel's boot id.
pub fn session() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.chars().take(18).collect()
}

/// What a measured file lies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// The subject's name.
    pub subject: String,
    /// Type and device of its file system, or `block device`.
    pub file_system: String,
    /// The disk with its queue, as the kernel describes it; empty where the file system names none, as overlays do.
    pub disk: String,
}

impl FileFacts {
    /// Of a file or device.
    pub fn read(subject: &str, path: &Path) -> Self {
        let is_device = std::fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
        let file_system = if is_device { "block device".to_owned() } else { file_system(path) };
        let disk = disk_of(path).map(|disk| disk_line(&disk)).unwrap_or_default();
        Self { subject: subject.to_owned(), file_system, disk }
    }

    /// For people.
    pub fn line(&self) -> String {
        format!("{}: {}, {}", self.subject, self.file_system, self.disk).trim_end_matches(", ").to_owned()
    }
}

/// What `ashlar tune check` finds wanting, by this same program; `None` when that failed.
pub fn tuning() -> Option<Vec<String>> {
    let bin = std::env::current_exe().ok()?;
    let output = Command::new(bin).args(["tune", "check", "-o", "json"]).output().ok()?;
    wanting(&output.stdout)
}

/// The bad ones of `tune check`'s findings; `None` if this is not its document. Its exit code tells of findings, too.
fn wanting(document: &[u8]) -> Option<Vec<String>> {
    let json: serde_json::Value = serde_json::from_slice(document).ok()?;
    let findings = json["findings"].as_array()?;
    let bad = findings.iter().filter(|finding| finding["state"] == "bad");
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let line = |finding: &serde_json::Value| {
        let [tuner, found, wanted] = ["tuner", "found", "wanted"].map(|key| word(&finding[key]));
        format!("{tuner}: {found}, wanted {wanted}")
    };
    Some(bad.map(line).collect())
}

/// Each disk's size, kind and queue, a line a disk.
pub fn disks() -> Vec<String> {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut lines: Vec<_> =
        disks.filter(|disk| disk.join("device").exists()).map(|disk| disk_line(&disk)).collect();
    lines.sort();
    lines
}

/// A disk, given by its folder in `/sys`.
fn disk_line(disk: &Path) -> String {
    let read = |file: &str| std::fs::read_to_string(disk.join(file)).unwrap_or_default().trim().to_owned();
    let name = disk.file_name().unwrap_or_default().to_string_lossy();
    let sectors: u64 = read("size").parse().unwrap_or(0);
    let model = read("device/model");
    let model = if model.is_empty() { model } else { format!("{model}, ") };
    let queue = ["rotational", "scheduler", "write_cache", "nr_requests", "io_poll"];
    let facts = queue.map(|file| format!("{file} {}", read(&format!("queue/{file}"))));
    format!("{name}: {model}{} GiB, {}", sectors >> 21, facts.join(", "))
}

/// The folder in `/sys` of the disk below a file, or of the disk that the path names.
fn disk_of(path: &Path) -> Option<PathBuf> {
    let file = std::fs::metadata(path).ok()?;
    let number = if file.file_type().is_block_device() { file.rdev() } else { file.dev() };
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let device = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition has no queue of its own.
    if device.join("partition").exists() { device.parent().map(Path::to_owned) } else { Some(device) }
}

/// The value of the first line that starts with `key`, or the first line when `key` is empty.
fn file_line(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    let value = if key.is_empty() { line } else { line.split_once(':').map_or("", |(_, value)| value) };
    value.trim().to_owned()
}

fn file_system(path: &Path) -> String {
    let output = Command::new("df").args(["--output=fstype,source"]).arg(path).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let words: Vec<&str> = text.lines().nth(1).unwrap_or("unknown").split_whitespace().collect();
    words.join(" on ")
}

/// Seconds since 1970 as UTC text; the calendar by Howard Hinnant's `civil_from_days`.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_hold_at_leap_days_and_year_ends() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn a_check_that_failed_is_told_from_one_that_found_nothing() {
        assert_eq!(wanting(b""), None);
        assert_eq!(wanting(b"{}"), None);
        assert_eq!(wanting(br#"{"findings": []}"#), Some(Vec::new()));
        let found = br#"{"findings": [{"state": "bad", "tuner": "wbt", "found": "75", "wanted": "0"}, {"state": "good"}]}"#;
        assert_eq!(wanting(found), Some(vec!["wbt: 75, wanted 0".to_owned()]));
    }

    #[test]
    fn a_measured_file_is_described_by_what_it_lies_on() {
        let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let node = |name: &std::ffi::OsStr| Path::new("/dev").join(name);
        for disk in disks.map(|entry| entry.file_name()).filter(|name| node(name).exists()) {
            let facts = FileFacts::read("raw", &node(&disk));
            assert_eq!(facts.file_system, "block device");
            assert!(facts.disk.starts_with(&format!("{}: ", disk.to_string_lossy())), "{facts:?}");
            assert!(facts.line().starts_with("raw: block device, "), "{}", facts.line());
        }
        let facts = FileFacts::read("raw", Path::new("/proc/version"));
        assert_eq!((facts.file_system.as_str(), facts.disk.as_str()), ("proc on proc", ""));
        assert_eq!(facts.line(), "raw: proc on proc");
    }

    #[test]
    fn the_system_answers() {
        let environment = Environment::read(Path::new("/"), "fio-3".to_owned(), String::new());
        assert!(
            environment.memory_mib > 0
                && !environment.kernel.is_empty()
                && environment.file_system != "unknown"
        );
        assert!(!environment.line().contains('\n'));
    }
}
