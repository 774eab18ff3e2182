//! Running real clients with a time limit, finding out which are installed, and skipping with a reason.
//!
//! Invariants: a client that hangs is killed and is an error; an error carries the command line and all it printed.

use anyhow::{Context, bail};
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What a client may take when nothing else is said.
pub const LIMIT: Duration = Duration::from_secs(60);
/// What a client that moves much data may take.
pub const LONG_LIMIT: Duration = Duration::from_secs(300);

/// Whether each test runs at its full length (`ASHLAR_LONG=1`).
pub fn is_long() -> bool {
    std::env::var("ASHLAR_LONG").is_ok_and(|value| value == "1")
}

/// `long` when tests run at full length, else `short`.
pub fn by_length<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// One command to run.
#[derive(Debug)]
pub struct Run {
    words: Vec<OsString>,
    limit: Duration,
}

/// What a command left.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; `None` after a signal.
    pub code: Option<i32>,
    /// All that it printed.
    pub stdout: String,
    /// All that it complained of.
    pub stderr: String,
}

/// What comes before a command to run it in a network namespace. `ip netns exec` would give it mounts of its own, which
/// keep a file system in use, errors and all, that is unmounted elsewhere.
#[must_use]
pub fn inside(netns: &str) -> [String; 2] {
    ["nsenter".into(), format!("--net=/run/netns/{netns}")]
}

/// A command under way, with files that take its output.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    output: [tempfile::NamedTempFile; 2],
    started: Instant,
    limit: Duration,
}

impl Run {
    /// A command without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { words: vec![program.as_ref().to_owned()], limit: LIMIT }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.words.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Lets it run in a network namespace.
    #[must_use]
    pub fn inside(mut self, netns: impl AsRef<str>) -> Self {
        self.words.splice(0..0, inside(netns.as_ref()).map(OsString::from));
        self
    }

    /// Sets how long it may take.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it and lets it run.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(self) -> anyhow::Result<Running> {
        let line = self.words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let output = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
        let child = Command::new(&self.words[0])
            .args(&self.words[1..])
            .stdin(Stdio::null())
            .stdout(output[0].reopen()?)
            .stderr(output[1].reopen()?)
            .spawn()
            .with_context(|| format!("{line}: cannot be started"))?;
        Ok(Running { line, child, output, started: Instant::now(), limit: self.limit })
    }

    /// Runs it to its end, whatever its exit code.
    ///
    /// # Errors
    /// It cannot be started or takes too long.
    pub fn end(self) -> anyhow::Result<Ran> {
        self.spawn()?.end()
    }

    /// Runs it to its end and requires success.
    ///
    /// # Errors
    /// It fails or takes too long; all that it printed is in the message.
    pub fn ok(self) -> anyhow::Result<Ran> {
        self.spawn()?.ok()
    }
}

impl Running {
    /// Whether it still runs.
    ///
    /// # Errors
    /// The system refuses to say.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// The exit code of one that has ended, and what it printed.
    ///
    /// # Errors
    /// The system refuses to say.
    pub fn left(&mut self) -> anyhow::Result<(Option<i32>, String, String)> {
        let code = self.child.try_wait()?.and_then(|status| status.code());
        let [stdout, stderr] = self.printed();
        Ok((code, stdout, stderr))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It takes longer than its limit, and was killed.
    pub fn end(mut self) -> anyhow::Result<Ran> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                let [stdout, stderr] = self.printed();
                return Ok(Ran { code: status.code(), stdout, stderr });
            }
            if self.started.elapsed() > self.limit {
                let [stdout, stderr] = self.printed();
                bail!("{}: not done within {:?}\n{stdout}\n{stderr}", self.line, self.limit);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end and requires success.
    ///
    /// # Errors
    /// It fails or takes too long; all that it printed is in the message.
    pub fn ok(self) -> anyhow::Result<Ran> {
        let line = self.line.clone();
        let ran = self.end()?;
        if ran.code != Some(0) {
            bail!("{line}: exit code {:?}\n{}\n{}", ran.code, ran.stdout.trim(), ran.stderr.trim());
        }
        Ok(ran)
    }

    fn printed(&self) -> [String; 2] {
        let read = |file: &tempfile::NamedTempFile| std::fs::read(file.path()).unwrap_or_default();
        [0, 1].map(|at| String::from_utf8_lossy(&read(&self.output[at])).into_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let dir = std::env::var_os("CARGO_TARGET_DIR").map_or_else(default, PathBuf::from);
    let made = std::fs::create_dir_all(&dir);
    assert!(made.is_ok(), "{} cannot be made: {made:?}", dir.display());
    dir.canonicalize().unwrap_or(dir)
}

/// Says that a test is skipped, and why; the caller returns afterwards.
///
/// # Panics
/// Skipping is forbidden by `ASHLAR_NO_SKIP=1`.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let forbidden = std::env::var("ASHLAR_NO_SKIP").is_ok_and(|value| value == "1");
    assert!(!forbidden, "{test} may not be skipped, but: {reason}");
    eprintln!("SKIPPED {test}: {reason}");
    note("skipped.txt", &format!("SKIPPED {test}: {reason}"));
}

/// Says what a test has checked, one line each, also where the output of tests that pass is not shown.
pub fn tell_checks<'a>(test: &str, checks: impl IntoIterator<Item = &'a str>) {
    for check in checks {
        eprintln!("{check}");
        note("checks.txt", &format!("{test}: {check}"));
    }
}

/// Adds a line to a file of the target directory. It is a convenience: what counts is on stderr.
fn note(file: &str, line: &str) {
    let file = std::fs::File::options().create(true).append(true).open(target_dir().join(file));
    let _ = file.and_then(|mut file| writeln!(file, "{line}"));
}

/// Whether all of these programs are installed; if not, the test is skipped. `python3-libnbd` means the module.
///
/// # Panics
/// See [`skip`].
pub fn have(programs: &[&str]) -> bool {
    let installed = |name: &str| match name {
        "python3-libnbd" => python().is_some(),
        _ => in_path(name),
    };
    let missing: Vec<&str> = programs.iter().copied().filter(|name| !installed(name)).collect();
    if !missing.is_empty() {
        let packages = "fio libnbd-bin python3-libnbd nbdkit qemu-utils";
        skip(&format!("{} not installed; apt-get install {packages}", missing.join(", ")));
    }
    missing.is_empty()
}

/// Whether a program is installed.
pub fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// A Python that has the module nbd. Debian's own comes first, since the module is built for it.
pub fn python() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&'static str>> = OnceLock::new();
    let has_nbd = |python: &&str| {
        Run::new(python).args(["-c", "import nbd"]).end().is_ok_and(|ran| ran.code == Some(0))
    };
    *FOUND.get_or_init(|| ["/usr/bin/python3", "python3"].into_iter().find(has_nbd))
}

/// A run of one of the scripts of this crate.
///
/// # Errors
/// There is no Python with libnbd; ask [`have`] first.
pub fn script(name: &str) -> anyhow::Result<Run> {
    let python = python().context("python3-libnbd is not installed")?;
    Ok(Run::new(python).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)))
}

/// A run of fio over NBD with verification of every block, which stops at the first wrong one.
pub fn fio_verify(uri: &str, args: &[&str]) -> Run {
    Run::new("fio")
        .args([
            "--name=verify",
            "--ioengine=nbd",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--serialize_overlap=1",
            // Else fio leaves a file behind in the current directory.
            "--verify_state_save=0",
        ])
        .arg("--exitall_on_error=1")
        .arg(format!("--uri={uri}"))
        .args(args)
        .limit(LONG_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_hangs_is_an_error_with_what_it_printed() -> anyhow::Result<()> {
        let hung =
            Run::new("sh").args(["-c", "echo so far; exec sleep 60"]).limit(Duration::from_millis(300)).end();
        let message = format!("{:#}", hung.err().context("must time out")?);
        assert!(message.contains("not done within") && message.contains("so far"), "{message}");
        Ok(())
    }

    #[test]
    fn a_failing_client_shows_its_command_and_words() -> anyhow::Result<()> {
        let failed = Run::new("sh").args(["-c", "echo why >&2; exit 3"]).ok();
        let message = format!("{:#}", failed.err().context("must fail")?);
        assert!(message.contains("Some(3)") && message.contains("why"), "{message}");
        Ok(())
    }
}
