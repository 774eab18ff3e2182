//! A machine as text: what the tuners read of it, captured (`ashlar tune capture`) or written by
//! hand, and a tree in memory made of that.
//!
//! One line an entry: `PATH = TEXT`, `PATH << END` with lines up to `END`, `LINK -> PATH`,
//! `PATH !` for a folder or a file that cannot be read, `fact NAME = VALUE`, and `#` comments. A
//! file that refuses to be written has ` !ERRNO` after its path: `/proc/irq/9/smp_affinity_list !5 = 0`.
//!
//! Writing to a tree in memory does what the kernel does where undo depends on it: a choice moves
//! its brackets, and a new IO scheduler resets `nr_requests` and `wbt_lat_usec`.

use crate::facts::Facts;
use crate::tree::Tree;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

/// An entry of a tree in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// A file: its text, and the error number that a write to it ends with.
    File(String, Option<i32>),
    /// A symbolic link to an absolute path.
    Link(String),
    /// There, but nothing of it can be read.
    Opaque,
}

/// A tree in memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemTree {
    /// Every entry by its path.
    pub nodes: BTreeMap<String, Node>,
}

impl MemTree {
    /// Reads the text form, tree and facts.
    ///
    /// # Errors
    /// The first line that is not understood.
    pub fn parse(text: &str) -> Result<(Self, Facts), String> {
        let (mut tree, mut facts) = (Self::default(), Facts::default());
        let mut lines = text.lines().enumerate();
        while let Some((at, line)) = lines.next() {
            let bad = || format!("line {}: {line}", at + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(fact) = line.strip_prefix("fact ") {
                let (name, value) = fact.split_once(" =").ok_or_else(bad)?;
                facts.set(name, value.trim()).ok_or_else(bad)?;
                continue;
            }
            let (path, node) = if let Some((path, to)) = line.split_once(" -> ") {
                (path, Node::Link(to.into()))
            } else if let Some((path, end)) = line.split_once(" << ") {
                let body = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != end);
                (path, Node::File(body.collect::<Vec<_>>().join("\n"), None))
            } else if let Some(path) = line.strip_suffix(" !") {
                (path, Node::Opaque)
            } else {
                let (path, text) = line.split_once(" =").ok_or_else(bad)?;
                let (path, errno) = match path.split_once(" !") {
                    Some((path, errno)) => (path, Some(errno.parse().map_err(|_| bad())?)),
                    None => (path, None),
                };
                (path, Node::File(text.trim().into(), errno))
            };
            if !path.starts_with('/') {
                return Err(bad());
            }
            tree.nodes.insert(path.into(), node);
        }
        Ok((tree, facts))
    }

    /// The text form of tree and facts; reading it gives the same.
    pub fn render(&self, facts: &Facts) -> String {
        let facts = facts.list().into_iter().map(|(name, value)| format!("fact {name} = {value}\n"));
        let nodes = self.nodes.iter().map(|(path, node)| match node {
            Node::Link(to) => format!("{path} -> {to}\n"),
            Node::Opaque => format!("{path} !\n"),
            Node::File(text, _) if text.contains('\n') => format!("{path} << END\n{text}\nEND\n"),
            Node::File(text, Some(errno)) => format!("{path} !{errno} = {text}\n"),
            Node::File(text, None) => format!("{path} = {text}\n"),
        });
        facts.chain(nodes).collect()
    }

    /// Follows links in every part of a path.
    fn real(&self, path: &str) -> String {
        let mut real = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            real = format!("{real}/{part}");
            let mut hops = 0;
            while let Some(Node::Link(to)) = self.nodes.get(&real) {
                real = to.clone();
                hops += 1;
                if hops > 16 {
                    break;
                }
            }
        }
        real
    }

    fn set(&mut self, path: &str, text: &str) {
        if let Some(Node::File(old, _)) = self.nodes.get_mut(path) {
            text.clone_into(old);
        }
    }

    fn switch_scheduler(&mut self, path: &str, to: &str) {
        let queue = path.trim_end_matches("scheduler").to_owned();
        let depth = if to == "none" { "1023" } else { "256" };
        self.set(&format!("{queue}nr_requests"), depth);
        self.set(&format!("{queue}wbt_lat_usec"), if to == "bfq" { "0" } else { "2000" });
    }
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Tree for MemTree {
    fn read(&self, path: &str) -> io::Result<String> {
        match self.nodes.get(&self.real(path)) {
            Some(Node::File(text, _)) => Ok(text.clone()),
            Some(_) => Err(errno(nix::libc::EINVAL)),
            None => Err(errno(nix::libc::ENOENT)),
        }
    }

    fn list(&self, path: &str) -> Vec<String> {
        let folder = format!("{}/", self.real(path));
        let beneath = self.nodes.range(folder.clone()..).map_while(|(path, _)| path.strip_prefix(&folder));
        let names: BTreeSet<_> = beneath.filter_map(|rest| rest.split('/').next()).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    fn resolve(&self, path: &str) -> Option<String> {
        let real = self.real(path);
        (self.nodes.contains_key(&real) || !self.list(&real).is_empty()).then_some(real)
    }

    fn write(&mut self, path: &str, text: &str) -> io::Result<()> {
        let real = self.real(path);
        let (old, refusal) = match self.nodes.get(&real) {
            Some(Node::File(old, refusal)) => (old.clone(), *refusal),
            _ => return Err(errno(nix::libc::ENOENT)),
        };
        if let Some(number) = refusal {
            return Err(errno(number));
        }
        let text = text.trim();
        if !old.contains('[') {
            self.set(&real, text);
            return Ok(());
        }
        let words: Vec<_> = old.split_whitespace().map(|word| word.trim_matches(['[', ']'])).collect();
        if !words.contains(&text) {
            return Err(errno(nix::libc::EINVAL));
        }
        let marked =
            words.iter().map(|word| if *word == text { format!("[{word}]") } else { (*word).into() });
        let marked = marked.collect::<Vec<_>>().join(" ");
        if marked == old {
            return Ok(());
        }
        self.set(&real, &marked);
        if real.ends_with("/queue/scheduler") {
            self.switch_scheduler(&real, text);
        }
        Ok(())
    }
}

/// A tree that remembers all that was read of the one beneath.
pub struct Recorder<'a> {
    beneath: &'a dyn Tree,
    seen: Rc<RefCell<BTreeMap<String, Node>>>,
}

impl<'a> Recorder<'a> {
    /// Remembers nothing yet.
    pub fn new(beneath: &'a dyn Tree) -> Self {
        Self { beneath, seen: Rc::default() }
    }

    /// What was read.
    pub fn seen(&self) -> MemTree {
        MemTree { nodes: self.seen.borrow().clone() }
    }

    /// Remembers each link on the way, so that the path leads to the same in the copy.
    fn saw(&self, path: &str, node: Node) {
        let mut seen = self.seen.borrow_mut();
        let mut real = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let next = format!("{real}/{part}");
            real = match self.beneath.resolve(&next) {
                Some(to) if to != next => {
                    seen.insert(next, Node::Link(to.clone()));
                    to
                }
                _ => next,
            };
        }
        let better = !matches!(seen.get(&real), Some(Node::File(..)));
        if better {
            seen.insert(real, node);
        }
    }
}

impl Tree for Recorder<'_> {
    fn read(&self, path: &str) -> io::Result<String> {
        let text = self.beneath.read(path);
        match &text {
            Ok(text) => self.saw(path, Node::File(text.clone(), None)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.saw(path, Node::Opaque),
            Err(_) => {}
        }
        text
    }

    fn list(&self, path: &str) -> Vec<String> {
        let names = self.beneath.list(path);
        for name in &names {
            self.saw(&format!("{path}/{name}"), Node::Opaque);
        }
        names
    }

    fn resolve(&self, path: &str) -> Option<String> {
        let real = self.beneath.resolve(path);
        if real.is_some() {
            self.saw(path, Node::Opaque);
        }
        real
    }

    fn write(&mut self, _: &str, _: &str) -> io::Result<()> {
        Err(errno(nix::libc::EROFS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "/dev/x !\n/sys/block/a -> /sys/devices/a\n/sys/devices/a/queue/nr_requests = 64\n\
                        /sys/devices/a/queue/scheduler = none [bfq]\n/sys/devices/a/queue/wbt_lat_usec = 0\n\
                        /sys/irq !5 = 0\n/sys/long << END\na\nb\nEND\n";

    #[test]
    fn text_to_tree_and_back() {
        let (tree, facts) = MemTree::parse(TEXT).expect("well formed");
        assert_eq!(tree.render(&facts), TEXT);
        assert_eq!(tree.list("/sys/block/a/queue").len(), 3);
        assert_eq!(tree.read("/sys/long").expect("there"), "a\nb");
        assert!(MemTree::parse("sys = 1").is_err() && MemTree::parse("/sys").is_err());
    }

    #[test]
    fn a_tree_in_memory_behaves_as_the_kernel_does() {
        let (mut tree, _) = MemTree::parse(TEXT).expect("well formed");
        tree.write("/sys/block/a/queue/scheduler", "none").expect("taken");
        assert_eq!(tree.read("/sys/block/a/queue/scheduler").expect("there"), "[none] bfq");
        assert_eq!(tree.read("/sys/block/a/queue/nr_requests").expect("there"), "1023");
        assert!(tree.write("/sys/block/a/queue/scheduler", "nonsense").is_err());
        assert_eq!(tree.write("/sys/irq", "1").expect_err("refused").raw_os_error(), Some(5));
    }

    #[test]
    fn what_a_recorder_saw_answers_the_same() {
        let (tree, _) = MemTree::parse(TEXT).expect("well formed");
        let recorder = Recorder::new(&tree);
        assert_eq!(recorder.read("/sys/block/a/queue/scheduler").expect("there"), "none [bfq]");
        assert!(recorder.read("/sys/none").is_err());
        recorder.list("/sys/block");
        let seen = recorder.seen();
        assert_eq!(seen.read("/sys/block/a/queue/scheduler").expect("there"), "none [bfq]");
        assert_eq!(seen.list("/sys/block"), ["a"]);
        assert_eq!(seen.resolve("/sys/block/a").as_deref(), Some("/sys/devices/a"));
    }
}
