//! What `/proc` says of a process: CPU time, memory, disk writes, whether it lives.
//!
//! Deliberately absent: any way to list or find processes. Callers name the pids they own.

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Whether the process exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// A program that the kernel kills when we die, even by SIGKILL, where util-linux is there to ask for that.
pub fn with_us(program: impl AsRef<OsStr>) -> Command {
    let has = Command::new("setpriv").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// Sends SIGKILL to each of these processes that still lives, and waits up to 10 s until all are gone.
pub fn kill_all(pids: &[i32]) {
    let living = || pids.iter().copied().filter(|pid| *pid > 1 && is_alive(*pid));
    for pid in living() {
        // A process that ended meanwhile is what we wanted.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let started = Instant::now();
    while living().next().is_some() && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The direct children of a process; none when it is gone or the kernel does not say.
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// User and system CPU seconds of a process so far, children not counted.
///
/// # Errors
/// The process is gone.
pub fn cpu_seconds(pid: i32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} is gone"))?;
    let (ticks, _) =
        parse_cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat has an unknown form"))?;
    Ok(ticks as f64 / ticks_per_second())
}

/// The same with its children, those that have ended and those that live: servers that fork for each connection.
pub fn cpu_seconds_with_children(pid: i32) -> f64 {
    let one = |pid: i32, with_ended: bool| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (own, ended) = parse_cpu_ticks(&stat)?;
        Some((own + if with_ended { ended } else { 0 }) as f64 / ticks_per_second())
    };
    let living: f64 = children(pid).into_iter().filter_map(|child| one(child, false)).sum();
    one(pid, true).unwrap_or(0.0) + living
}

fn ticks_per_second() -> f64 {
    sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64
}

/// The sum of [`cpu_seconds`] over several processes; one that is gone counts as nothing.
pub fn cpu_seconds_sum(pids: &[i32]) -> f64 {
    pids.iter().filter_map(|pid| cpu_seconds(*pid).ok()).sum()
}

/// utime + stime, and the same of children that have ended; they are the 14th to 17th fields, and the second field may
/// hold spaces and parentheses.
fn parse_cpu_ticks(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<u64> =
        rest.split_whitespace().skip(11).take(4).map_while(|field| field.parse().ok()).collect();
    let [user, system, children_user, children_system] = fields[..] else { return None };
    Some((user + system, children_user + children_system))
}

/// Resident memory of a process in bytes.
///
/// # Errors
/// The process is gone.
pub fn rss_bytes(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("/proc/{pid}/status has no VmRSS"))? << 10)
}

/// The program's name, and of our own what it is: `mds`, `target-2`. Empty when the process is gone.
pub fn name(pid: i32) -> String {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let (name, line) = (read("comm").trim().to_owned(), read("cmdline"));
    role(&name, &line).unwrap_or(name)
}

/// What one of our own processes is, by its command line: words with a NUL after each. The rest of a path is left out,
/// since results are published.
fn role(name: &str, line: &str) -> Option<String> {
    let words: Vec<&str> = line.split('\0').collect();
    let is = |word| name == "ashlar" && words.get(1) == Some(&word);
    let folder = || words.iter().flat_map(|word| word.split('/')).find(|part| part.starts_with("target-"));
    if is("mds") {
        return Some("mds".into());
    }
    is("target").then(|| folder().unwrap_or("target").into())
}

/// Context switches of all threads of a process so far, wanted or not.
pub fn switches(pid: i32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |status: String| -> u64 {
        let lines = status.lines().filter_map(|line| line.split_once("ctxt_switches:"));
        lines.filter_map(|(_, count)| count.trim().parse::<u64>().ok()).sum()
    };
    threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok()).map(of).sum()
}

/// Bytes that these processes have caused to be written to disks so far; 0 where `/proc` does not say.
pub fn write_bytes_sum(pids: &[i32]) -> u64 {
    let one = |pid: &i32| {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
        io.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse::<u64>().ok())
    };
    pids.iter().filter_map(one).sum()
}

/// At rest is who writes less than this in [`REST`]; heartbeats and log lines stay below it.
const REST_WRITE_BYTES: u64 = 1 << 20;
/// At rest are processes that together use less than a tenth of a core.
const REST_CPU_SHARE: f64 = 0.1;
/// How long a rest must last: longer than the 2 s of idleness after which a target begins to flush.
const REST: Duration = Duration::from_secs(4);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(500);

/// Waits until these processes neither write to disk nor compute, for at most `limit`.
/// Returns how long it took; `None` when they were still busy at the limit.
pub fn settle(pids: &[i32], limit: Duration) -> Option<Duration> {
    let (started, mut looked) = (Instant::now(), false);
    settled(limit, || {
        if std::mem::replace(&mut looked, true) {
            std::thread::sleep(LOOK);
        }
        (started.elapsed(), write_bytes_sum(pids), cpu_seconds_sum(pids))
    })
}

/// As [`settle`], and says so when they are still busy at the limit.
pub fn settle_or_say(pids: &[i32], limit: Duration) -> Option<Duration> {
    let rested = settle(pids, limit);
    if rested.is_none() {
        eprintln!("note: the servers are still busy after {limit:?}; measuring nevertheless");
    }
    rested
}

/// When the first rest ended; each look tells the time, bytes written and seconds computed so far.
fn settled(limit: Duration, mut look: impl FnMut() -> (Duration, u64, f64)) -> Option<Duration> {
    let mut looks = VecDeque::new();
    loop {
        let (at, written, computed) = look();
        looks.push_back((at, written, computed));
        // The latest look from which on a whole rest has passed.
        while looks.get(1).is_some_and(|second| at - second.0 >= REST) {
            looks.pop_front();
        }
        let (since, w, c) = looks[0];
        let lasted = at - since;
        let quiet = written.saturating_sub(w) < REST_WRITE_BYTES
            && computed - c < REST_CPU_SHARE * lasted.as_secs_f64();
        if lasted >= REST && quiet {
            return Some(at);
        }
        if at >= limit {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 1 0 100 1 1";
        assert_eq!(parse_cpu_ticks(stat), Some((200, 18)));
        assert_eq!(parse_cpu_ticks("7 (a) S 1"), None);
    }

    #[test]
    fn our_own_servers_are_told_apart_and_no_path_is() {
        let target = "ashlar\0target\0run\0--config\0/home/me/d/target-2/target.toml\0";
        assert_eq!(role("ashlar", target).as_deref(), Some("target-2"));
        assert_eq!(role("ashlar", "ashlar\0mds\0--dir\0/home/me/target-9\0").as_deref(), Some("mds"));
        assert_eq!(role("qemu-nbd", target), None);
        assert_eq!(role("ashlar", "ashlar\0dev\0"), None);
    }

    /// Who writes for so many seconds and then does nothing, looked at twice a second.
    fn busy_for(seconds: f64) -> impl FnMut() -> (Duration, u64, f64) {
        let mut at = -0.5;
        move || {
            at += 0.5;
            (Duration::from_secs_f64(at), (at.min(seconds) * 100e6) as u64, at.min(seconds))
        }
    }

    #[test]
    fn a_rest_begins_with_the_last_work_and_is_waited_for_no_longer_than_the_limit() {
        let limit = Duration::from_secs(15);
        assert_eq!(settled(limit, busy_for(0.0)), Some(Duration::from_secs(4)));
        assert_eq!(settled(limit, busy_for(6.5)), Some(Duration::from_millis(10_500)));
        assert_eq!(settled(limit, busy_for(60.0)), None);
        // Heartbeats and log lines are no work.
        let mut at = 0;
        let beats = || {
            at += 500;
            (Duration::from_millis(at), at * 100, at as f64 * 20e-6)
        };
        assert_eq!(settled(limit, beats), Some(REST + LOOK));
    }

    #[test]
    fn our_own_process_lives_and_a_reaped_one_does_not() -> anyhow::Result<()> {
        let own = std::process::id().cast_signed();
        assert!(is_alive(own) && rss_bytes(own)? > 0 && switches(own) > 0 && cpu_seconds(own)? >= 0.0);
        let mut child = std::process::Command::new("true").spawn()?;
        let pid = child.id().cast_signed();
        child.wait()?;
        assert!(!is_alive(pid) && cpu_seconds(pid).is_err() && cpu_seconds_with_children(pid) == 0.0);
        Ok(())
    }
}
