//! A machine as tuners see it: its tree, its facts, the profile, and the questions that many ask.
//!
//! Invariant: everything here only reads. A disk is found from the folder's device number through
//! partitions, device-mapper and md down to what really does the IO.

use crate::cpus::Cpus;
use crate::facts::Facts;
use crate::model::{Bound, Change, Form, Item, Profile};
use crate::tree::Tree;
use std::collections::BTreeSet;

/// Device-mapper and md stacks deeper than this are not followed.
const STACK_MAX: usize = 8;

/// What tuners look at.
pub struct Machine<'a> {
    /// Its files.
    pub tree: &'a dyn Tree,
    /// What no file says.
    pub facts: &'a Facts,
    /// What it is made ready for.
    pub profile: Profile,
}

/// A disk beneath the folder in question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// As in `/sys/block`.
    pub name: String,
    /// Its folder, `/sys/block/NAME`.
    pub dir: String,
}

impl Disk {
    /// A file of its queue.
    pub fn queue(&self, file: &str) -> String {
        format!("{}/queue/{file}", self.dir)
    }
}

impl Machine<'_> {
    /// A file's text, when it can be read.
    pub fn text(&self, path: &str) -> Option<String> {
        self.tree.read(path).ok()
    }

    /// A file's number.
    pub fn number(&self, path: &str) -> Option<i64> {
        self.text(path)?.parse().ok()
    }

    /// The disks beneath the folder; none for tmpfs, overlays and what is on the network.
    pub fn disks(&self) -> Vec<Disk> {
        let Some((major, minor)) = self.facts.disk else { return Vec::new() };
        let mut found = BTreeSet::new();
        self.leaves(&format!("/sys/dev/block/{major}:{minor}"), STACK_MAX, &mut found);
        found.into_iter().map(|name| Disk { dir: format!("/sys/block/{name}"), name }).collect()
    }

    fn leaves(&self, path: &str, depth: usize, found: &mut BTreeSet<String>) {
        let Some(mut real) = self.tree.resolve(path) else { return };
        if self.tree.exists(&format!("{real}/partition")) {
            real.truncate(real.rfind('/').unwrap_or(0));
        }
        let slaves = self.tree.list(&format!("{real}/slaves"));
        if slaves.is_empty() || depth == 0 {
            found.extend(real.rsplit('/').next().map(str::to_owned));
        }
        if depth > 0 {
            slaves.iter().for_each(|name| self.leaves(&format!("{real}/slaves/{name}"), depth - 1, found));
        }
    }

    /// Whether a disk says that it does not rotate. Virtual disks often say that they do.
    pub fn is_solid(&self, disk: &Disk) -> bool {
        let virtual_disk = disk.name.starts_with("vd") || disk.name.starts_with("xvd");
        virtual_disk || self.number(&disk.queue("rotational")) == Some(0)
    }

    /// The network cards in question: the one that was named, else all that are real and up.
    pub fn nics(&self) -> Vec<String> {
        if let Some(nic) = &self.facts.nic {
            return vec![nic.clone()];
        }
        let real = |nic: &String| self.tree.exists(&format!("/sys/class/net/{nic}/device"));
        let up =
            |nic: &String| self.text(&format!("/sys/class/net/{nic}/operstate")).as_deref() == Some("up");
        self.tree.list("/sys/class/net").into_iter().filter(|nic| real(nic) && up(nic)).collect()
    }

    /// The PCI device (or what is nearest to one) that a device hangs on.
    pub fn pci_of(&self, device: &str) -> Option<String> {
        let mut real = self.tree.resolve(device)?;
        // The namespaces of a multipath NVMe disk hang on a virtual subsystem: take its first controller.
        if let Some(at) = real.rfind("/nvme-subsys").filter(|_| real.starts_with("/sys/devices/virtual/")) {
            let end = real[at + 1..].find('/').map_or(real.len(), |length| at + 1 + length);
            let subsystem = &real[..end];
            let controller = self.tree.list(subsystem).into_iter().find(|name| is_controller(name))?;
            real = self.tree.resolve(&format!("{subsystem}/{controller}"))?;
        }
        while real.starts_with("/sys/devices/") {
            if self.tree.exists(&format!("{real}/numa_node")) && self.tree.exists(&format!("{real}/vendor")) {
                return Some(real);
            }
            real.truncate(real.rfind('/')?);
        }
        None
    }

    /// The interrupts of a device.
    pub fn irqs(&self, device: &str) -> Vec<u32> {
        let Some(pci) = self.pci_of(device) else { return Vec::new() };
        let names = self.tree.list(&format!("{pci}/msi_irqs"));
        let mut irqs: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
        irqs.sort_unstable();
        irqs
    }

    /// The NUMA node of a device; absent where the machine has only one.
    pub fn node_of(&self, device: &str) -> Option<u32> {
        let node = self.number(&format!("{}/numa_node", self.pci_of(device)?))?;
        u32::try_from(node).ok()
    }

    /// The processors that run.
    pub fn online(&self) -> Cpus {
        let text = self.text("/sys/devices/system/cpu/online").unwrap_or_default();
        Cpus::parse(&text).unwrap_or_default()
    }

    /// The processors that the shards leave to interrupts and everything else; all when the shards
    /// are not pinned or take everything.
    pub fn spare(&self) -> Cpus {
        let (online, spare) = (self.online(), self.online().without(&self.facts.cpus));
        if spare.is_empty() { online } else { spare }
    }

    /// Whether a process of that name runs; absent when nobody looked.
    pub fn runs(&self, daemon: &str) -> Option<bool> {
        Some(self.facts.daemons.as_ref()?.iter().any(|name| name == daemon))
    }

    /// A file that should have a value. Absent files are not supported here.
    pub fn setting(&self, object: &str, path: &str, form: Form, wanted: &str) -> Item {
        match self.tree.read(path) {
            Ok(found) => {
                let (found, wanted) = (form.canonical(&found), form.canonical(wanted));
                let good = found == wanted;
                let mut item = Item::judged(object, good, &found, &wanted, "");
                item.change = (!good).then(|| Change::of(path, &wanted, form));
                item
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Item::unsupported(object, &format!("no {path}"))
            }
            Err(error) => Item::unsupported(object, &format!("{path}: {error}")),
        }
    }

    /// A file that should have a value where the profile wants one, and is only shown otherwise.
    pub fn setting_when(&self, when: bool, object: &str, path: &str, form: Form, wanted: &str) -> Item {
        if when { self.setting(object, path, form, wanted) } else { self.left(object, path, form) }
    }

    /// A file that is shown as it is, since the profile wants nothing of it.
    pub fn left(&self, object: &str, path: &str, form: Form) -> Item {
        match self.text(path) {
            Some(found) => Item::info(object, &form.canonical(&found), "as it is"),
            None => Item::unsupported(object, &format!("no {path}")),
        }
    }

    /// A number that should be at least so much; it is never lowered.
    pub fn at_least(&self, object: &str, path: &str, least: i64) -> Item {
        self.bounded(object, path, Bound::AtLeast(least))
    }

    /// A number within a bound.
    pub fn bounded(&self, object: &str, path: &str, bound: Bound) -> Item {
        let wanted = match bound {
            Bound::AtLeast(least) => format!("{least} or more"),
            Bound::AtMost(most) => format!("{most} or less"),
            Bound::AsItIs => return self.left(object, path, Form::Words),
        };
        match self.number(path).map(|found| bound.apply(found)) {
            Some(target) => {
                let item = self.setting(object, path, Form::Words, &target.to_string());
                let change = item.change.map(|change| Change { bound: Some(bound), ..change });
                Item { wanted, change, ..item }
            }
            None if self.tree.exists(path) => Item::unknown(object, &format!("{path} is no number"), &wanted),
            None => Item::unsupported(object, &format!("no {path}")),
        }
    }
}

/// `nvme0`, not `nvme0n1`.
pub fn is_controller(name: &str) -> bool {
    name.strip_prefix("nvme").is_some_and(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit()))
}
