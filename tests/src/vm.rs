//! A small Linux in QEMU, for clients that the kernel of this machine has not.
//!
//! The image is made of Debian packages by `tests/interop/image.sh` and kept outside of the source. A guest runs one
//! script; its `host WORD...` asks the test outside to do something and hears how that went. The guest reaches this
//! machine's loopback as [`HOST_ADDRESS`].
//!
//! Invariants: no QEMU outlives its [`Guest`]; a guest that takes too long is killed and is an error with its output.

use crate::tools::{Run, in_path};
use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where a guest finds what listens on this machine.
pub const HOST_ADDRESS: &str = "10.0.2.2";
/// What a download of the packages may take.
const IMAGE_LIMIT: Duration = Duration::from_secs(540);

/// A kernel and its first file system.
#[derive(Debug)]
pub struct Image(PathBuf);

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    dir: tempfile::TempDir,
    control: BufReader<UnixStream>,
    limit: Duration,
}

/// What a guest's script left.
#[derive(Debug)]
pub struct Left {
    /// Its exit status.
    pub status: i32,
    /// All that it printed.
    pub output: String,
}

/// The image, made when it is not there yet; an error is a reason to skip.
///
/// # Errors
/// A program is missing, or the packages cannot be had.
pub fn image() -> anyhow::Result<Image> {
    for (program, package) in
        [("qemu-system-x86_64", "qemu-system-x86"), ("cpio", "cpio"), ("apt-get", "apt"), ("xz", "xz-utils")]
    {
        ensure!(in_path(program), "{program} is not installed; apt-get install {package}");
    }
    let cache = cache_dir();
    if !cache.join("stamp").is_file() {
        ensure!(Uid::effective().is_root(), "only root can make the image of the guest");
    }
    let made = Run::new(interop_dir().join("image.sh")).arg(&cache).limit(IMAGE_LIMIT).ok();
    made.context("the Debian packages of the guest are not to be had")?;
    Ok(Image(cache))
}

/// `ASHLAR_VM_CACHE`, or a folder in the user's cache, so that every checkout has the one download.
fn cache_dir() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = || var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    let shared = || Some(cache()?.join("ashlar-vm"));
    var("ASHLAR_VM_CACHE").or_else(shared).unwrap_or_else(|| crate::tools::target_dir().join("ashlar-vm"))
}

fn interop_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interop")
}

/// Whether the processor's own virtualization is there. Others (kvm_pvm) boot no stock kernel.
fn has_kvm() -> bool {
    let modules = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
    modules.iter().any(|module| Path::new(module).is_dir())
        && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

impl Guest {
    /// Boots a guest that runs `tests/interop/guest/SCRIPT ARGS...`, beside the udev rules that are packaged for hosts.
    ///
    /// # Errors
    /// QEMU or the archive of the job cannot be started.
    pub fn start(image: &Image, script: &str, args: &[String], limit: Duration) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let initrd = with_job(image, dir.path(), script, args)?;
        let place = |name: &str| dir.path().join(name).display().to_string();
        let accel: &[&str] = match has_kvm() {
            true => &["-accel", "kvm", "-cpu", "host"],
            false => &["-accel", "tcg,thread=multi", "-cpu", "max"],
        };
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-nographic", "-no-reboot", "-machine", "q35", "-smp", "2", "-m", "1024"])
            .args(accel)
            .arg("-kernel")
            .arg(image.0.join("vmlinuz"))
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", "console=ttyS0 panic=-1 loglevel=5 mitigations=off cryptomgr.notests"])
            .args(["-serial", &format!("file:{}", place("console")), "-monitor", "none"])
            .args(["-device", "virtio-rng-pci", "-netdev", "user,id=n0,ipv6=off"])
            .args(["-device", "virtio-net-pci,netdev=n0,romfile=", "-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("file,id=out,path={}", place("out"))])
            .args(["-device", "virtserialport,chardev=out,name=out"])
            .args(["-chardev", &format!("file,id=status,path={}", place("status"))])
            .args(["-device", "virtserialport,chardev=status,name=status"])
            .args(["-chardev", &format!("socket,id=ctl,path={},server=on,wait=off", place("ctl"))])
            .args(["-device", "virtserialport,chardev=ctl,name=ctl"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.path().join("qemu"))?)
            .spawn()
            .context("qemu-system-x86_64 cannot be started")?;
        let control = connect(&dir.path().join("ctl"));
        let mut guest = Self { qemu, dir, control: BufReader::new(UnixStream::pair()?.0), limit };
        let control = control.with_context(|| format!("no QEMU: {}", guest.read("qemu")))?;
        control.set_read_timeout(Some(Duration::from_millis(50)))?;
        guest.control = BufReader::new(control);
        Ok(guest)
    }

    /// Serves the script's `host WORD...` until it ends. `host` says something to the guest in one line, or fails.
    ///
    /// # Errors
    /// It takes longer than its limit, or ends without a status.
    pub fn serve(
        mut self,
        mut host: impl FnMut(&mut Self, &[&str]) -> anyhow::Result<String>,
    ) -> anyhow::Result<Left> {
        let started = Instant::now();
        let mut line = String::new();
        while self.qemu.try_wait()?.is_none() {
            if started.elapsed() > self.limit {
                bail!(
                    "the guest is not done within {:?}\n{}{}",
                    self.limit,
                    self.read("out"),
                    self.console()
                );
            }
            match self.control.read_line(&mut line) {
                Ok(0) => std::thread::sleep(Duration::from_millis(50)),
                Ok(_) if line.ends_with('\n') => {
                    let words = std::mem::take(&mut line);
                    let words: Vec<&str> = words.split_whitespace().collect();
                    let answer = host(&mut self, &words);
                    let answer = match &answer {
                        Ok(told) => format!("0 {told}"),
                        Err(error) => format!("1 {error:#}"),
                    };
                    writeln!(self.control.get_mut(), "{}", answer.replace('\n', " | "))?;
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("the guest's control port"),
            }
        }
        let output = self.read("out");
        let status = self.read("status").trim().parse();
        let Ok(status) = status else {
            bail!("the guest ended without a status\n{output}{}{}", self.read("qemu"), self.console());
        };
        Ok(Left { status, output })
    }

    /// Stops the guest in its tracks (SIGSTOP), or lets it go on (SIGCONT).
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.qemu.id() as i32), signal)?)
    }

    fn read(&self, name: &str) -> String {
        let bytes = fs::read(self.dir.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn console(&self) -> String {
        let console = self.read("console");
        let lines: Vec<&str> = console.lines().collect();
        format!("--- its console:\n{}\n", lines[lines.len().saturating_sub(30)..].join("\n"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn connect(path: &Path) -> anyhow::Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if started.elapsed() > Duration::from_secs(10) => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The image's file system with the job as a second archive behind it; the kernel unpacks both.
fn with_job(image: &Image, dir: &Path, script: &str, args: &[String]) -> anyhow::Result<PathBuf> {
    let job = dir.join("root/job");
    fs::create_dir_all(&job)?;
    fs::copy(interop_dir().join("guest").join(script), job.join(script))?;
    let rules = "71-ashlar-nvme.rules";
    fs::copy(interop_dir().join("../../packaging/nvme").join(rules), job.join(rules))?;
    ensure!(args.iter().all(|arg| !arg.contains('\'')), "an argument with a quote: {args:?}");
    let quoted: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
    fs::write(job.join("run"), format!("#!/bin/bash\nexec bash ./{script} {}\n", quoted.join(" ")))?;
    let initrd = dir.join("initrd");
    fs::copy(image.0.join("initrd.cpio"), &initrd)?;
    let pack = "cd \"$0/root\" && chmod +x job/run && find . -mindepth 1 -print0 | cpio --quiet -0 -H newc -R 0:0 -o >>\"$1\"";
    Run::new("sh").args(["-c", pack]).arg(dir).arg(&initrd).ok()?;
    Ok(initrd)
}
