//! A disk that fails on demand beneath a target's directory.
//!
//! ext4 on a loop device with direct IO, on a FUSE file, on nbdkit: its error filter answers EIO while a
//! file is there, its cache filter keeps what was not flushed in memory, so that killing it is a power
//! cut that loses un-synced writes. Without nbdkit or nbdfuse the loop device lies on a plain file, and
//! those two faults are skipped.

use crate::cluster::wait_until;
use crate::tools::Run;
use anyhow::{Context, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of a disk; sparse.
const SIZE: &str = "1500M";

/// Whether a program is installed.
pub fn has(tool: &str) -> bool {
    let paths = std::env::var("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(str::to_owned);
    paths.split(':').map(str::to_owned).chain(more).any(|dir| Path::new(&dir).join(tool).is_file())
}

/// Whether disks can be made to fail; else why not.
pub fn can_fail() -> Result<(), String> {
    match ["nbdkit", "nbdfuse"].iter().find(|tool| !has(tool)) {
        Some(tool) => Err(format!("{tool} is not installed")),
        None if !Path::new("/dev/fuse").exists() => Err("the kernel has no FUSE".into()),
        None => Ok(()),
    }
}

/// One target's disk. Unmounted, and its helpers ended, when dropped.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    fails: bool,
    helpers: Vec<Child>,
    device: Option<String>,
}

impl Disk {
    /// A new file system, mounted.
    ///
    /// # Errors
    /// A tool fails.
    pub fn new(folder: &Path, fails: bool) -> anyhow::Result<Self> {
        fs::create_dir_all(folder.join("fuse"))?;
        fs::create_dir_all(folder.join("mnt"))?;
        let mut disk = Self { folder: folder.to_owned(), fails, helpers: Vec::new(), device: None };
        Run::new("truncate").args(["-s", SIZE]).arg(disk.image()).ok()?;
        if fails {
            fs::write(folder.join("fuse/disk"), "")?;
        }
        disk.attach()?;
        let device = disk.device.clone().context("attached")?;
        Run::new("mkfs.ext4").args(["-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=0", &device]).ok()?;
        disk.mount()?;
        fs::create_dir_all(disk.dir())?;
        Run::new("sync").arg("-f").arg(disk.dir()).ok()?;
        Ok(disk)
    }

    /// Where the target's data lies.
    pub fn dir(&self) -> PathBuf {
        self.folder.join("mnt/data")
    }

    fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    fn attach(&mut self) -> anyhow::Result<()> {
        let mut backing = self.image();
        if self.fails {
            let _ = fs::remove_file(self.folder.join("socket"));
            let fail = format!("error-file={}", self.folder.join("fail").display());
            let mut nbdkit = Command::new("nbdkit");
            nbdkit.args(["--exit-with-parent", "-f", "-U"]).arg(self.folder.join("socket"));
            nbdkit.args(["--filter=error", "--filter=cache", "file"]).arg(self.image());
            nbdkit.args(["cache=writeback", "cache-max-size=1G", &fail]);
            nbdkit.args(["error-pread-rate=100%", "error-pwrite-rate=100%"]);
            nbdkit.env("TMPDIR", &self.folder);
            self.helpers.push(nbdkit.stdout(Stdio::null()).spawn().context("nbdkit")?);
            await_file(&self.folder.join("socket"), 0)?;
            backing = self.folder.join("fuse/disk");
            let uri = format!("nbd+unix:///?socket={}", self.folder.join("socket").display());
            let mut nbdfuse = Command::new("nbdfuse");
            nbdfuse.arg(&backing).arg(uri).stderr(Stdio::null());
            self.helpers.push(nbdfuse.spawn().context("nbdfuse")?);
            await_file(&backing, 1)?;
        }
        let ran = Run::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&backing).ok()?;
        self.device = Some(ran.stdout.trim().to_owned());
        Ok(())
    }

    fn mount(&self) -> anyhow::Result<()> {
        let device = self.device.as_deref().context("attached")?;
        Run::new("mount").arg(device).arg(self.folder.join("mnt")).ok().map(drop)
    }

    /// Ends whatever there is, though parts of it fail; whether the file system could be unmounted.
    fn detach(&mut self) -> anyhow::Result<()> {
        let unmounted = self.unmount();
        if let Some(device) = self.device.take() {
            let _ = Run::new("losetup").args(["--detach", &device]).end();
        }
        for mut helper in self.helpers.drain(..).rev() {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        let _ = Run::new("umount").args(["--lazy", "--quiet"]).arg(self.folder.join("fuse/disk")).end();
        unmounted
    }

    /// The kernel ends the operations of a killed target after its process has gone, and holds the file system until
    /// then.
    fn unmount(&self) -> anyhow::Result<()> {
        wait_until(Duration::from_secs(10), || {
            let ran = Run::new("umount").arg(self.folder.join("mnt")).end()?;
            ensure!(ran.code == Some(0) || ran.stderr.contains("not mounted"), "{}", ran.stderr);
            Ok(())
        })
    }

    /// The power fails: what was not flushed is lost. The target must be dead.
    ///
    /// # Errors
    /// The disk does not come back.
    pub fn power_cycle(&mut self) -> anyhow::Result<()> {
        ensure!(self.fails, "a plain disk loses nothing");
        // First the cache, else unmounting would write it.
        for helper in &mut self.helpers {
            let _ = helper.kill();
        }
        self.detach()?;
        self.attach()?;
        // ext4 replays its journal.
        self.mount()
    }

    /// Every read and write fails, or no more; the target must be dead when it ends, for the file
    /// system may have given up.
    ///
    /// # Errors
    /// The disk does not come back.
    pub fn fail(&mut self, fails: bool) -> anyhow::Result<()> {
        let switch = self.folder.join("fail");
        if fails {
            fs::write(switch, "")?;
            return Ok(());
        }
        let _ = fs::remove_file(switch);
        let device = self.device.as_deref().context("attached")?;
        self.unmount()?;
        // A file system that met errors turns read-only again unless all of them are mended.
        let mended = Run::new("fsck.ext4").args(["-f", "-y", device]).end()?;
        ensure!(mended.code.is_some_and(|code| code < 4), "{device} is not mended: {mended:?}");
        self.mount()
    }

    /// Takes all free space, or gives it back.
    ///
    /// # Errors
    /// The ballast cannot be removed.
    pub fn fill(&self, full: bool) -> anyhow::Result<()> {
        let ballast = self.folder.join("mnt/ballast");
        if full {
            // It takes what there is, and says so.
            let _ = Run::new("fallocate").args(["-l", "4G"]).arg(&ballast).end();
            let script = "for s in 256M 64M 16M 4M 1M; do while fallocate -o $(stat -c %s \"$0\") -l $s \"$0\"; do :; done; done";
            let _ = Run::new("sh").args(["-c", &format!("touch \"$0\"; {script}")]).arg(&ballast).end();
        } else {
            fs::remove_file(&ballast)?;
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.detach();
    }
}

fn await_file(path: &Path, bytes_min: u64) -> anyhow::Result<()> {
    let start = Instant::now();
    while fs::metadata(path).map_or(true, |found| found.len() < bytes_min) {
        ensure!(start.elapsed() < Duration::from_secs(10), "{} does not come up", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
