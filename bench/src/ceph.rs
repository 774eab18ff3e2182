//! A Ceph cluster of this machine for as long as a comparison takes: one monitor, one manager and three BlueStore OSDs on
//! files, a pool of three copies, one RBD image. From Debian's packages, without its scripts, services or `/etc`.
//!
//! Invariants: everything lies in one folder and listens on the loopback address; every daemon is our child, ends with
//! its guard by its pid, and with us even when we are killed. Authentication is off, as it costs Ceph some CPU; RBD's
//! cache is off, so that an acknowledged write is on all three OSDs.

use crate::process::with_us;
use crate::run::measure::Subject;
use crate::run::target::{Rbd, Target};
use anyhow::{Context, bail, ensure};
use std::fmt::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// As results name it.
pub const NAME: &str = "Ceph RBD";
/// What an acknowledged write is worth.
pub const PROMISE: &str = "3 copies on 3 OSDs, each durable (BlueStore, RBD cache off)";
/// OSDs, and copies.
const OSDS: u32 = 3;
const CONF: &str = "ceph.conf";
const POOL: &str = "bench";
const IMAGE: &str = "image";
/// Placement groups of the pool; Ceph asks for about 100 an OSD, with three copies of each.
const GROUPS: &str = "64";
const FSID: &str = "0a51a4ce-0000-4000-8000-000000000001";
/// How long each step of the start may take.
const STEP_MAX: Duration = Duration::from_secs(90);

/// Programs that are needed, with Debian's packages.
const NEEDED: [(&str, &str); 6] = [
    ("ceph-mon", "ceph-mon"),
    ("ceph-mgr", "ceph-mgr"),
    ("ceph-osd", "ceph-osd"),
    ("ceph", "ceph-common"),
    ("rbd", "ceph-common"),
    ("monmaptool", "ceph-common"),
];

/// Why there can be no cluster here, in a line; `None` when all is there.
pub fn missing() -> Option<String> {
    missing_of(&runs)
}

fn missing_of(is_there: &dyn Fn(&str) -> bool) -> Option<String> {
    let mut packages: Vec<&str> =
        NEEDED.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    packages.dedup();
    let list = packages.join(" ");
    (!packages.is_empty())
        .then(|| format!("install them: apt-get install --no-install-recommends {list}"))
        .map(|how| format!("{list} cannot be run; {how}"))
}

/// Its version, or `None` when it is not installed.
pub fn version() -> Option<String> {
    let output = Command::new("ceph-osd").arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "ceph version 16.2.15 (hash) pacific (stable)"
    Some(format!("Ceph {}", text.split_whitespace().nth(2)?))
}

fn runs(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join(program).is_file())
}

/// A running cluster; it ends when this is dropped.
#[derive(Debug)]
pub struct Ceph {
    dir: PathBuf,
    daemons: Vec<(String, Child)>,
}

impl Ceph {
    /// Starts a cluster in `dir` with an image of `bytes`.
    ///
    /// # Errors
    /// A program is missing or fails, or the cluster does not become healthy; the message has its words.
    pub fn start(dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let dir = dir.join("ceph");
        std::fs::create_dir_all(&dir)?;
        let mut ceph = Self { dir, daemons: Vec::new() };
        let port = free_port()?;
        std::fs::write(ceph.conf(), config(&ceph.dir, port, bytes))?;
        ceph.monitor(port)?;
        ceph.daemon("ceph-mgr", "x")?;
        for id in 0..OSDS {
            ceph.osd(id)?;
        }
        ceph.image(bytes)?;
        Ok(ceph)
    }

    fn conf(&self) -> PathBuf {
        self.dir.join(CONF)
    }

    fn monitor(&mut self, port: u16) -> anyhow::Result<()> {
        let map = self.dir.join("monmap").display().to_string();
        let addr = format!("[v2:127.0.0.1:{port}]");
        self.call("monmaptool", &["--create", "--fsid", FSID, "--addv", "a", &addr, &map])?;
        std::fs::create_dir_all(self.dir.join("mon.a"))?;
        std::fs::create_dir_all(self.dir.join("mgr.x"))?;
        self.call("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map])?;
        self.daemon("ceph-mon", "a")?;
        self.until("the monitor answers", |ceph| ceph.call("ceph", &["-s"]).is_ok())
    }

    fn osd(&mut self, id: u32) -> anyhow::Result<()> {
        let (id, uuid) = (id.to_string(), format!("0a51a4ce-0000-4000-8000-0000000001{id:02}"));
        std::fs::create_dir_all(self.dir.join(format!("osd.{id}")))?;
        self.call("ceph", &["osd", "new", &uuid, &id])?;
        self.call("ceph-osd", &["--mkfs", "-i", &id, "--osd-uuid", &uuid])?;
        self.daemon("ceph-osd", &id)
    }

    fn image(&mut self, bytes: u64) -> anyhow::Result<()> {
        let up = format!("{OSDS} osds: {OSDS} up");
        self.until("all OSDs are up", |ceph| {
            ceph.call("ceph", &["-s"]).is_ok_and(|said| said.contains(&up))
        })?;
        self.call("ceph", &["osd", "pool", "create", POOL, GROUPS, GROUPS, "replicated"])?;
        self.until("all placement groups are clean", |ceph| {
            ceph.call("ceph", &["pg", "stat"]).is_ok_and(|said| all_clean(&said))
        })?;
        self.call("rbd", &["pool", "init", POOL])?;
        let image = format!("{POOL}/{IMAGE}");
        self.call("rbd", &["create", &image, "--size", &format!("{}M", bytes.div_ceil(1 << 20))])?;
        Ok(())
    }

    fn daemon(&mut self, program: &str, id: &str) -> anyhow::Result<()> {
        let name = format!("{program}.{id}");
        let output = std::fs::File::create(self.dir.join(format!("{name}.out")))?;
        let mut command = with_us(program);
        command.arg("-f").args(["-i", id]).arg("-c").arg(self.conf());
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("{program} cannot be run"))?;
        self.daemons.push((name, child));
        Ok(())
    }

    /// Runs one of Ceph's programs to its end; what it said.
    fn call(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let mut command = with_us(program);
        command.args(args).env("CEPH_CONF", self.conf()).current_dir(&self.dir).stdin(Stdio::null());
        if program == "ceph" {
            // Without this it waits for ever for a monitor that is not there.
            command.args(["--connect-timeout", "10"]);
        }
        let output = command.output().with_context(|| format!("{program} cannot be run"))?;
        let words = String::from_utf8_lossy(&output.stderr);
        let last = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        ensure!(output.status.success(), "{program} {} failed: {last}", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let started = Instant::now();
        while !holds(self) {
            for (name, child) in &mut self.daemons {
                if let Some(status) = child.try_wait()? {
                    let log = crate::dev::tail(&self.dir.join(format!("{name}.out")), 3);
                    bail!("{name} ended with {status}: {}", log.trim());
                }
            }
            ensure!(started.elapsed() < STEP_MAX, "Ceph: it took more than {STEP_MAX:?} until {what}");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// The image, and the daemons that serve it.
    pub fn subject(&self) -> Subject {
        let pids = self.daemons.iter().map(|(_, child)| child.id().cast_signed()).collect();
        // It writes on after an acknowledgement, too: RocksDB compacts, and deferred writes reach their place.
        Subject { name: NAME.to_owned(), target: target(&self.dir), pids, flushes: true }
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        // The cluster is thrown away: nothing is gained by a clean stop, which takes an OSD some seconds.
        for (_, child) in &mut self.daemons {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whether `ceph pg stat` knows of groups, and of none in any other state: "65 pgs: 65 active+clean; 0 B data, ...".
fn all_clean(stat: &str) -> bool {
    let Some((count, rest)) = stat.trim().split_once(" pgs: ") else { return false };
    count != "0" && rest.split(';').next() == Some(&format!("{count} active+clean"))
}

/// The image of a cluster in a folder, whether or not it runs yet.
pub fn target(dir: &Path) -> Target {
    let (conf, pool, image) = (dir.join(CONF), POOL.to_owned(), IMAGE.to_owned());
    Target::Rbd(Rbd { conf, pool, image })
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn config(dir: &Path, port: u16, bytes: u64) -> String {
    let mut text = String::from("[global]\n");
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "{key} = {value}");
    };
    let below = |name: &str| dir.join(name).display().to_string();
    line("fsid", FSID);
    line("mon initial members", "a");
    line("mon host", &format!("[v2:127.0.0.1:{port}/0]"));
    for who in ["cluster", "service", "client"] {
        line(&format!("auth {who} required"), "none");
    }
    line("run dir", &dir.display().to_string());
    line("log file", &below("$name.log"));
    line("admin socket", &below("$name.$pid.asok"));
    for (kind, name) in [("mon", "mon.$id"), ("mgr", "mgr.$id"), ("osd", "osd.$id")] {
        line(&format!("{kind} data"), &below(name));
    }
    line("keyring", &below("keyring"));
    line("osd pool default size", &OSDS.to_string());
    line("osd pool default min size", "2");
    line("osd pool default pg autoscale mode", "off");
    // Copies on OSDs of one host, since there is one host.
    line("osd crush chooseleaf type", "0");
    line("osd objectstore", "bluestore");
    line("bluestore block create", "true");
    // Each OSD has a copy of all, and room for its own log and tables.
    line("bluestore block size", &(bytes * 2 + (3 << 30)).to_string());
    line("rbd cache", "false");
    line("mon data avail warn", "1");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_is_told_by_package_once() {
        assert_eq!(missing_of(&|_| true), None);
        let none = missing_of(&|_| false).expect("all lack");
        assert!(none.ends_with("ceph-mon ceph-mgr ceph-osd ceph-common"), "{none}");
        let one = missing_of(&|program| program != "ceph-osd").expect("one lacks");
        assert_eq!(
            one,
            "ceph-osd cannot be run; install them: apt-get install --no-install-recommends ceph-osd"
        );
    }

    #[test]
    fn groups_are_clean_when_all_of_them_are() {
        assert!(all_clean("65 pgs: 65 active+clean; 577 KiB data, 1.3 GiB used\n"));
        for not in ["65 pgs: 1 peering, 64 active+clean; 0 B", "0 pgs: ; 0 B", "64 pgs: 64 unknown; 0 B", ""]
        {
            assert!(!all_clean(not), "{not}");
        }
    }

    #[test]
    fn the_configuration_is_strict_about_copies_and_stays_in_its_folder() {
        let text = config(Path::new("/d"), 7, 1 << 30);
        for line in ["osd pool default size = 3", "rbd cache = false", "osd data = /d/osd.$id"] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        assert!(!text.contains("/etc") && !text.contains("/var"), "{text}");
    }
}
