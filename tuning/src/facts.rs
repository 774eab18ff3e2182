//! What tuners need to know that no small text file says: where the data lies, how much room there
//! is, which daemons run, what the network cards' rings are.
//!
//! Invariant: a fact that cannot be had is absent, never guessed.

use crate::cpus::Cpus;
use crate::tree::Tree;
use nix::sys::stat::{SFlag, major, minor, stat};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeMap;
use std::path::Path;

/// Facts beside the tree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// The folder (or device) in question, absolute.
    pub dir: Option<String>,
    /// The device number of the file system beneath the folder, or of the device.
    pub disk: Option<(u64, u64)>,
    /// Bytes free for us in that file system.
    pub free_bytes: Option<u64>,
    /// Bytes of that file system in all.
    pub total_bytes: Option<u64>,
    /// The processors that the shards are pinned to; empty when they are not.
    pub cpus: Cpus,
    /// Shards on this machine.
    pub shards: u32,
    /// The network card that was named; else all that are up are looked at.
    pub nic: Option<String>,
    /// Running processes of which tuners know, by name; absent when nobody looked.
    pub daemons: Option<Vec<String>>,
    /// Rings and coalescing by network card; absent when nobody asked or the card does not say.
    pub rings: BTreeMap<String, NicRings>,
}

/// What a network card says of its rings (descriptors) and of interrupt coalescing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NicRings {
    /// Receive ring now.
    pub rx: u32,
    /// Receive ring at most.
    pub rx_max: u32,
    /// Send ring now.
    pub tx: u32,
    /// Send ring at most.
    pub tx_max: u32,
    /// Microseconds that a receive interrupt may wait; absent when the card does not say.
    pub rx_usecs: Option<u32>,
    /// Whether the card chooses that by itself.
    pub adaptive_rx: Option<bool>,
}

/// The processes of which tuners know, as `/proc/PID/comm` has them (15 letters at most).
const KNOWN: &[&str] =
    &["irqbalance", "tuned", "chronyd", "ntpd", "openntpd", "systemd-timesyn", "ptp4l", "phc2sys"];

impl Facts {
    /// What the host says of a folder or device. Without `thorough`, only what is cheap: no
    /// search through all processes, no questions to network cards.
    pub fn read(tree: &dyn Tree, at: &Path, thorough: bool) -> Self {
        let mut facts = Self { shards: 1, ..Self::default() };
        facts.dir = at.canonicalize().ok().and_then(|dir| Some(dir.to_str()?.to_owned()));
        if let Ok(meta) = stat(at) {
            let is_device = SFlag::from_bits_truncate(meta.st_mode).contains(SFlag::S_IFBLK);
            let device = if is_device { meta.st_rdev } else { meta.st_dev };
            facts.disk = Some((major(device), minor(device)));
            if let Ok(room) = statvfs(at)
                && !is_device
            {
                facts.free_bytes = Some(room.blocks_available() * room.fragment_size());
                facts.total_bytes = Some(room.blocks() * room.fragment_size());
            }
        }
        if thorough {
            facts.daemons = Some(daemons(tree));
            facts.rings = crate::ethtool::rings(tree);
        }
        facts
    }

    /// Sets one from its text form.
    pub fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name.split_once(' ').unwrap_or((name, "")) {
            ("dir", _) => self.dir = Some(value.into()),
            ("disk", _) => {
                let (major, minor) = value.split_once(':')?;
                self.disk = Some((major.parse().ok()?, minor.parse().ok()?));
            }
            ("free_bytes", _) => self.free_bytes = Some(value.parse().ok()?),
            ("total_bytes", _) => self.total_bytes = Some(value.parse().ok()?),
            ("cpus", _) => self.cpus = Cpus::parse(value)?,
            ("shards", _) => self.shards = value.parse().ok()?,
            ("nic", _) => self.nic = Some(value.into()),
            ("daemons", _) => self.daemons = Some(value.split_whitespace().map(str::to_owned).collect()),
            ("rings", nic) => drop(self.rings.insert(nic.into(), NicRings::parse(value)?)),
            _ => return None,
        }
        Some(())
    }

    /// Those that are known, in their text form.
    pub fn list(&self) -> Vec<(String, String)> {
        let mut list: Vec<(String, String)> = Vec::new();
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                list.push((name.to_owned(), value));
            }
        };
        add("dir", self.dir.clone());
        add("disk", self.disk.map(|(major, minor)| format!("{major}:{minor}")));
        add("free_bytes", self.free_bytes.map(|bytes| bytes.to_string()));
        add("total_bytes", self.total_bytes.map(|bytes| bytes.to_string()));
        add("cpus", (!self.cpus.is_empty()).then(|| self.cpus.list()));
        add("shards", (self.shards > 0).then(|| self.shards.to_string()));
        add("nic", self.nic.clone());
        add("daemons", self.daemons.as_ref().map(|names| names.join(" ")));
        for (nic, rings) in &self.rings {
            add(&format!("rings {nic}"), Some(rings.text()));
        }
        list
    }
}

impl NicRings {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let mut next = || words.next()?.parse().ok();
        let rings = Self { rx: next()?, rx_max: next()?, tx: next()?, tx_max: next()?, ..Self::default() };
        let rx_usecs = words.next().and_then(|word| word.parse().ok());
        let adaptive_rx = words.next().and_then(|word| word.parse().ok());
        Some(Self { rx_usecs, adaptive_rx, ..rings })
    }

    fn text(&self) -> String {
        let Self { rx, rx_max, tx, tx_max, rx_usecs, adaptive_rx } = self;
        let usecs = rx_usecs.map_or("-".to_owned(), |usecs| usecs.to_string());
        let adaptive = adaptive_rx.map_or("-".to_owned(), |adaptive| adaptive.to_string());
        format!("{rx} {rx_max} {tx} {tx_max} {usecs} {adaptive}")
    }
}

fn daemons(tree: &dyn Tree) -> Vec<String> {
    let pids = tree.list("/proc").into_iter().filter(|name| name.starts_with(|c: char| c.is_ascii_digit()));
    let comms = pids.filter_map(|pid| tree.read(&format!("/proc/{pid}/comm")).ok());
    let mut known: Vec<_> = comms.filter(|comm| KNOWN.contains(&comm.as_str())).collect();
    known.sort();
    known.dedup();
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_survive_their_text_form() {
        let mut facts = Facts::default();
        for (name, value) in [
            ("dir", "/srv/a"),
            ("disk", "259:1"),
            ("free_bytes", "10"),
            ("total_bytes", "20"),
            ("cpus", "2-5"),
            ("shards", "4"),
            ("nic", "eth1"),
            ("daemons", "chronyd irqbalance"),
            ("rings eth1", "512 8192 512 8192 50 true"),
            ("rings eth2", "512 8192 512 8192 - -"),
        ] {
            facts.set(name, value).expect(name);
        }
        let mut again = Facts::default();
        for (name, value) in facts.list() {
            again.set(&name, &value).expect("its own text");
        }
        assert_eq!(facts, again);
        assert_eq!(facts.set("disk", "x"), None);
        assert_eq!(facts.set("colour", "x"), None);
    }
}
