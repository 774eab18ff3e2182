//! The Debian packages that the tests with real clients use.
//!
//! Installed when this runs as root on a machine with apt; elsewhere what is missing is
//! printed with the line to paste, and the tests that need it skip themselves, saying so.

use anyhow::{Result, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

/// How to see that a package's part is there.
enum Probe {
    /// A program on PATH or in the administrator's folders.
    Program(&'static str),
    /// A module of some Python; Debian's own may not be the first on PATH.
    Python(&'static str),
}

const NEEDED: &[(Probe, &str)] = &[
    (Probe::Program("fio"), "fio"),
    (Probe::Program("nbdinfo"), "libnbd-bin"),
    (Probe::Program("nbdcopy"), "libnbd-bin"),
    (Probe::Python("nbd"), "python3-libnbd"),
    (Probe::Program("qemu-img"), "qemu-utils"),
    (Probe::Program("qemu-io"), "qemu-utils"),
    (Probe::Program("nbdkit"), "nbdkit"),
    (Probe::Program("nft"), "nftables"),
    (Probe::Program("ip"), "iproute2"),
    (Probe::Program("qemu-system-x86_64"), "qemu-system-x86"),
    (Probe::Program("etcd"), "etcd-server"),
    (Probe::Program("cpio"), "cpio"),
    (Probe::Program("xz"), "xz-utils"),
];

/// What libFuzzer is built with.
const COMPILER: &[(Probe, &str)] = &[(Probe::Program("c++"), "g++")];

/// Installs what is missing, if that is allowed here. Answers with what is missing still.
pub fn ensure() -> Result<Vec<&'static str>> {
    let left = ensure_all(NEEDED)?;
    if left.is_empty() {
        println!("packages: all that the tests with real clients use is installed");
    } else {
        println!("packages: the tests that need them are skipped");
    }
    Ok(left)
}

/// Installs a C++ compiler, if there is none and that is allowed here. Answers whether there is one.
pub fn ensure_compiler() -> Result<bool> {
    Ok(std::env::var_os("CXX").is_some() || ensure_all(COMPILER)?.is_empty())
}

fn ensure_all(needed: &[(Probe, &'static str)]) -> Result<Vec<&'static str>> {
    let wanted = missing(needed, &is_there);
    if wanted.is_empty() {
        return Ok(wanted);
    }
    if !is_root() || !on_path("apt-get") {
        explain(&wanted);
        return Ok(wanted);
    }
    let mut left = wanted;
    // Twice: a package of another release that was there already may have to make way for one
    // that is installed, and what it held then lacks (seen with qemu-utils of the backports).
    for _ in 0..2 {
        if left.is_empty() {
            break;
        }
        println!("packages: installing {}", left.join(" "));
        if let Err(error) = install(&left) {
            println!("packages: {error:#}");
        }
        left = missing(needed, &is_there);
    }
    if !left.is_empty() {
        explain(&left);
    }
    Ok(left)
}

fn explain(wanted: &[&str]) {
    let wanted = wanted.join(" ");
    println!(
        "packages: MISSING {wanted}; on Debian or Ubuntu: sudo apt-get install --no-install-recommends {wanted}"
    );
}

fn install(wanted: &[&str]) -> Result<()> {
    let apt = |arguments: &[&str]| -> Result<()> {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "apt-get {} failed ({status})", arguments.join(" "));
        Ok(())
    };
    // An index that cannot be refreshed may still do: only the install decides.
    if let Err(error) = apt(&["update", "-qq"]) {
        println!("packages: {error:#}; trying with the package lists as they are");
    }
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(wanted);
    apt(&arguments)
}

fn missing(needed: &[(Probe, &'static str)], is_there: &dyn Fn(&Probe) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<_> = needed.iter().filter(|(probe, _)| !is_there(probe)).map(|(_, p)| *p).collect();
    packages.dedup();
    packages
}

fn is_there(probe: &Probe) -> bool {
    match probe {
        Probe::Program(name) => on_path(name),
        Probe::Python(module) => ["/usr/bin/python3", "python3"]
            .iter()
            .any(|python| runs(Command::new(python).args(["-c", &format!("import {module}")]))),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|folder| Path::new(folder).join(program).is_file())
}

fn runs(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_once_however_many_of_its_programs_lack() {
        let packages =
            missing(NEEDED, &|probe| !matches!(probe, Probe::Program("qemu-img" | "qemu-io" | "fio")));
        assert_eq!(packages, ["fio", "qemu-utils"]);
    }

    #[test]
    fn nothing_is_asked_for_when_all_is_there() {
        assert_eq!(missing(NEEDED, &|_| true), Vec::<&str>::new());
    }
}
