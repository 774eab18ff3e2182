//! What a volume is compared with: a raw file on the same disk, and qemu-nbd serving another one.
//!
//! Invariants: both files are really written before they are measured, so that a read is a read and a write does not
//! allocate; the server ends with its guard.

use crate::fio::{Job, Pattern, Subject};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Writes every byte of a subject once, 1 MiB at a time, with data that does not compress.
///
/// # Errors
/// fio failed, for instance because the disk is full.
pub fn fill(subject: &Subject, size: u64) -> anyhow::Result<()> {
    let pattern = Pattern::Write;
    let job =
        Job { subject: subject.clone(), pattern, block_bytes: 1 << 20, queue_depth: 8, size, seconds: None };
    job.run().map(|_| ()).context("the subject could not be filled before the run")
}

/// Makes a raw file in `dir`, written and synced.
///
/// # Errors
/// See [`fill`].
pub fn raw_file(dir: &Path, name: &str, size: u64) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    fill(&Subject::File(path.clone()), size)?;
    std::fs::File::open(&path)?.sync_all()?;
    Ok(path)
}

/// A program that the kernel kills when we die, even by SIGKILL, where util-linux is there to ask for that.
fn with_us(program: &str) -> Command {
    let has = Command::new("setpriv").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// A running qemu-nbd; it ends when this is dropped.
#[derive(Debug)]
pub struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    /// The version, or `None` when qemu-nbd is not installed.
    pub fn version() -> Option<String> {
        let output = Command::new("qemu-nbd").arg("--version").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
    }

    /// Exports a raw file on a Unix socket in `dir` with O_DIRECT and io_uring.
    ///
    /// # Errors
    /// It does not start, for instance because this qemu-nbd was built without io_uring.
    pub fn serve(file: &Path, dir: &Path) -> anyhow::Result<Self> {
        let socket = dir.join("qemu-nbd.sock");
        let child = with_us("qemu-nbd")
            .args([
                "--format=raw",
                "--cache=none",
                "--aio=io_uring",
                "--persistent",
                "--shared=8",
                "-x",
                "raw",
                "-k",
            ])
            .arg(&socket)
            .arg(file)
            .stdin(Stdio::null())
            .spawn()
            .context("qemu-nbd cannot be run; install it: apt-get install qemu-utils")?;
        let mut server = Self { child, socket };
        server.wait_socket()?;
        Ok(server)
    }

    fn wait_socket(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        while !self.socket.exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("qemu-nbd ended with {status}; does it know --aio=io_uring? (5.0 and later do)");
            }
            if started.elapsed() > Duration::from_secs(10) {
                bail!("qemu-nbd opened no socket within 10 s");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The export as fio takes it.
    pub fn subject(&self) -> Subject {
        Subject::Nbd(format!("nbd+unix:///raw?socket={}", self.socket.display()))
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
