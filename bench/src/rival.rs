//! What a volume is compared with: what a user would pick instead, from the distribution's packages, serving a raw file
//! on the same disk.
//!
//! Invariants: the file is really written before it is measured, so that a read is a read and a write does not
//! allocate; a server ends with its guard, by its pid, and with us even when we are killed (but for nbd-server, which
//! serves one connection only unless it goes into the background, away from us).

use crate::process::{self, with_us};
use crate::run::measure::{Subject, prepare};
use crate::run::target::Target;
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An NBD server that others make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// QEMU's, past the page cache by io_uring.
    QemuNbd,
    /// nbdkit with its file plugin.
    Nbdkit,
    /// The first of them all.
    NbdServer,
}

impl Server {
    /// All that are known.
    pub const ALL: [Self; 3] = [Self::QemuNbd, Self::Nbdkit, Self::NbdServer];

    /// The program, and the name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
            Self::NbdServer => "nbd-server",
        }
    }

    /// Debian's package.
    fn package(self) -> &'static str {
        match self {
            Self::QemuNbd => "qemu-utils",
            Self::Nbdkit => "nbdkit",
            Self::NbdServer => "nbd-server",
        }
    }

    /// What an acknowledged write is worth.
    pub fn guarantee(self) -> &'static str {
        match self {
            Self::QemuNbd => "1 copy, past the page cache; durable only after a flush",
            Self::Nbdkit | Self::NbdServer => {
                "1 copy, in the page cache (reads come from there, too); durable only after a flush"
            }
        }
    }

    /// How it is missed, in a line.
    pub fn missing(self) -> String {
        format!("{} cannot be run; install it: apt-get install {}", self.name(), self.package())
    }

    /// Its version, or `None` when it is not installed.
    pub fn version(self) -> Option<String> {
        let flag = if self == Self::NbdServer { "-V" } else { "--version" };
        let output = Command::new(self.name()).arg(flag).stdin(Stdio::null()).output().ok()?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let line = text.lines().find(|line| line.contains(|c: char| c.is_ascii_digit()))?.trim();
        Some(line.trim_start_matches("This is ").trim_end_matches(',').to_owned())
    }

    fn command(self, file: &Path, socket: &Path) -> anyhow::Result<Command> {
        let mut command = with_us(self.name());
        match self {
            Self::QemuNbd => {
                command.args([
                    "--format=raw",
                    "--cache=none",
                    "--aio=io_uring",
                    "--persistent",
                    "--shared=8",
                ]);
                command.args(["-x", EXPORT, "-k"]).arg(socket).arg(file);
            }
            Self::Nbdkit => {
                command.args(["--foreground", "--no-sr", "--unix"]).arg(socket).arg("file").arg(file);
            }
            Self::NbdServer => {
                let config = socket.with_extension("conf");
                let text = format!(
                    "[generic]\nunixsock = {}\n[{EXPORT}]\nexportname = {}\nflush = true\n",
                    socket.display(),
                    file.display()
                );
                std::fs::write(&config, text)?;
                command.arg("-C").arg(config).arg("-p").arg(socket.with_extension("pid"));
            }
        }
        Ok(command)
    }
}

/// The name of each export.
const EXPORT: &str = "raw";
/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(10);

/// A running server; it ends when this is dropped.
#[derive(Debug)]
pub struct Rival {
    server: Server,
    child: Child,
    /// Of one that went into the background.
    background: Option<i32>,
    socket: PathBuf,
}

impl Rival {
    /// Writes a file of `bytes` in `dir` and serves it on a Unix socket there.
    ///
    /// # Errors
    /// It is not installed, or does not start; the message has its words.
    pub fn serve(server: Server, dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let file = dir.join(format!("{}.raw", server.name()));
        prepare(&Subject::file(&format!("the file of {}", server.name()), &file), bytes)?;
        let (socket, log) =
            (dir.join(format!("{}.sock", server.name())), dir.join(format!("{}.log", server.name())));
        let output = std::fs::File::create(&log)?;
        let mut command = server.command(&file, &socket)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| server.missing())?;
        let mut rival = Self { server, child, background: None, socket };
        let started = rival.wait_socket();
        started.with_context(|| format!("{} says: {}", server.name(), crate::dev::tail(&log, 3).trim()))?;
        Ok(rival)
    }

    fn wait_socket(&mut self) -> anyhow::Result<()> {
        let (started, name) = (Instant::now(), self.server.name());
        let in_background = self.server == Server::NbdServer;
        while !self.socket.exists() || (in_background && self.background.is_none()) {
            self.background = background(&self.socket);
            let ended = self.child.try_wait()?;
            if let Some(status) = ended.filter(|status| !(in_background && status.success())) {
                bail!("{name} ended with {status}; is this version older than its options?");
            }
            if started.elapsed() > START_MAX {
                bail!("{name} opened no socket within {START_MAX:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.background.unwrap_or(self.child.id().cast_signed())
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The export, and the processes that serve it: nbd-server forks one a connection, later.
    pub fn subject(&self) -> Subject {
        let target = Target::NbdUnix { socket: self.socket.clone(), export: self.export().to_owned() };
        let (name, pids) = (self.server.name().to_owned(), vec![self.pid()]);
        Subject { name, target, pids, flushes: false }
    }

    /// nbdkit has one export, without a name.
    fn export(&self) -> &'static str {
        if self.server == Server::Nbdkit { "" } else { EXPORT }
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        let mut others = process::children(self.pid());
        others.extend(self.background.or_else(|| background(&self.socket)));
        let _ = self.child.kill();
        let _ = self.child.wait();
        process::kill_all(&others);
    }
}

/// The process that left its pid beside its socket.
fn background(socket: &Path) -> Option<i32> {
    std::fs::read_to_string(socket.with_extension("pid")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::job;
    use crate::run::load::Load;

    #[test]
    fn each_server_that_is_here_serves_its_file_and_ends_with_its_guard() -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR"))?;
        for server in Server::ALL {
            let Some(version) = server.version() else {
                println!("SKIPPED {}: {}", server.name(), server.missing());
                continue;
            };
            assert!(version.contains('.') && !version.ends_with(','), "{version}");
            let rival = Rival::serve(server, dir.path(), 1 << 20)?;
            let (pid, target) = (rival.pid(), rival.subject().target);
            // One after the other: each measurement is a connection of its own.
            for _ in 0..2 {
                let mut ring = job::ring(1, false)?;
                let driver = job::connect(&mut ring, &target, &Load::random_4k(0, 1, 1 << 20), 0)?;
                assert_eq!(driver.bytes(), 1 << 20, "{}", server.name());
            }
            drop(rival);
            assert!(!process::is_alive(pid), "{}", server.name());
        }
        Ok(())
    }
}
