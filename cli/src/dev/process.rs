//! One child process of a dev cluster: started with its log, stopped within bounds.
//!
//! A child holds the read end of a pipe as its stdin and stops when that ends, so none
//! outlives the supervisor, however that dies. Each child is in a process group of its
//! own, so that a Ctrl-C at the terminal reaches the supervisor alone.

use super::layout::Layout;
use crate::problem::Problem;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A log that has grown past this is put aside at the next start of its process.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// The wait before a first restart; doubled at each death soon after a start.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait before a restart.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// Whoever lived this long is restarted with the shortest wait.
const LIVED_WELL: Duration = Duration::from_secs(3);

/// A child's end, as told to the supervisor.
pub struct Ended {
    /// Index of the child.
    pub child: usize,
    /// How it ended.
    pub status: ExitStatus,
}

/// One child, running or not.
pub struct Process {
    /// For people and for the log's name, such as "target-1".
    pub name: String,
    arguments: Vec<OsString>,
    log: PathBuf,
    pid: u32,
    running: Option<Running>,
    back_off: Duration,
}

struct Running {
    started: Instant,
    /// Its end tells the child to stop.
    _stdin: ChildStdin,
}

impl Process {
    /// A child that is not started yet: this very binary with these arguments.
    pub fn new(layout: &Layout, name: String, mut arguments: Vec<OsString>) -> Self {
        arguments.push("--die-with-stdin".into());
        let log = layout.log(&name);
        Self { name, arguments, log, pid: 0, running: None, back_off: BACK_OFF_MIN }
    }

    /// Starts it; its end will be told as that of child `index`.
    pub fn start(&mut self, index: usize, ended: &mpsc::UnboundedSender<Ended>) -> Result<(), Problem> {
        let cannot = || Problem::io(format!("cannot start {}", self.name));
        let log = open_log(&self.log).map_err(cannot())?;
        let binary = std::env::current_exe().map_err(cannot())?;
        let mut child = Command::new(binary)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(cannot())?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(cannot())?;
        self.pid = child.id().expect("a child that was not waited for has a pid");
        let stdin = child.stdin.take().expect("its stdin was asked to be a pipe");
        self.running = Some(Running { started: Instant::now(), _stdin: stdin });
        let ended = ended.clone();
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                let _ = ended.send(Ended { child: index, status });
            }
        });
        Ok(())
    }

    /// Of the process started last.
    pub fn pid(&self) -> u32 {
        self.pid
    }
    /// Whether its end was not told yet.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Its end was told; answers with how long to wait before starting it again.
    pub fn has_ended(&mut self) -> Duration {
        let lived = self.running.take().map_or(Duration::ZERO, |running| running.started.elapsed());
        let wait = if lived >= LIVED_WELL { BACK_OFF_MIN } else { self.back_off };
        self.back_off = (wait * 2).min(BACK_OFF_MAX);
        wait
    }

    /// Sends a signal, if it runs.
    pub fn signal(&self, signal: Signal) {
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.pid.cast_signed()), signal);
        }
    }

    /// The log's path.
    pub fn log(&self) -> &PathBuf {
        &self.log
    }

    /// The last lines of its log, for a message.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].iter().map(|line| format!("    {line}\n")).collect()
    }
}

fn open_log(path: &PathBuf) -> std::io::Result<File> {
    if fs::metadata(path).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("log.old"))?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> (tempfile::TempDir, Process) {
        let dir = tempfile::tempdir().expect("a folder");
        let layout = Layout::at(dir.path()).expect("usable");
        (dir, Process::new(&layout, "target-1".into(), vec![]))
    }

    #[test]
    fn a_child_that_dies_at_once_again_and_again_is_restarted_ever_more_slowly() {
        let (_dir, mut process) = process();
        let waits: Vec<_> = (0..9).map(|_| process.has_ended().as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    }

    #[test]
    fn a_huge_log_is_put_aside() {
        let (_dir, process) = process();
        File::create(process.log()).and_then(|log| log.set_len(LOG_BYTES_MAX + 1)).expect("made");
        let log = open_log(process.log()).expect("opened");
        assert_eq!(log.metadata().expect("there").len(), 0);
        assert!(process.log().with_extension("log.old").is_file());
    }

    #[test]
    fn last_words_are_the_last_lines() {
        let (_dir, process) = process();
        assert_eq!(process.last_words(), "");
        let text: String = (0..100).map(|n| format!("line {n}\n")).collect();
        fs::write(process.log(), text).expect("written");
        assert!(process.last_words().starts_with("    line 92\n"), "{}", process.last_words());
    }
}
