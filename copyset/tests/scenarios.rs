//! Scenarios as text: `testdata/*.txt`, one a behaviour. A block is commands, `----`, and what they
//! print; a blank line ends it. `UPDATE_EXPECT=1` writes the files anew: read the difference.
//!
//! Time is in milliseconds; each message and each disk write takes one. Printed at the left is
//! the time since the start.

// The crate may not touch its surroundings; its tests read files and variables.
#![allow(clippy::disallowed_methods)]

mod cluster;

use ashlar_copyset::*;
use cluster::*;
use protocol::types::*;
use std::fmt::Write as _;
use std::path::Path;

struct Scene {
    cluster: Cluster,
    counter: u64,
}

fn numbers(words: &[&str]) -> Vec<u32> {
    words.iter().map(|w| w.parse().expect("a number")).collect()
}

fn node(word: &str) -> usize {
    word.trim_start_matches('n').parse::<usize>().expect("a node") - 1
}

impl Scene {
    fn new() -> Self {
        Self { cluster: Cluster::new(3, 3, 7, World::CALM), counter: 0 }
    }

    fn run(&mut self, line: &str, out: &mut String) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let c = &mut self.cluster;
        if c.trace.is_none() {
            c.trace = Some(String::new());
        }
        let mut said = String::new();
        match words[..] {
            ["cluster", nodes, voters, ref rest @ ..] => {
                let mut world = World::CALM;
                match rest {
                    ["hibernate", ms] => world.hibernate = Span::ms(ms.parse().expect("ms")),
                    ["one-by-one"] => (world.batch, world.window) = (1, 1),
                    ["small-appends"] => world.batch = 1,
                    _ => {}
                }
                *c = Cluster::new(nodes.parse().expect("n"), voters.parse().expect("n"), 7, world);
            }
            ["run", ms] => c.run_until(c.now + ms.parse::<u64>().expect("ms") * MS),
            ["until", who, "leads"] => {
                while c.replica(node(who)).role() != Role::Leader && c.now < 60_000 * MS {
                    c.run_until(c.now + MS / 2);
                }
            }
            ["elect", who] => said = Self::elect(c, node(who)),
            ["propose", who, count] => {
                let taken = (0..count.parse::<u64>().expect("count")).filter_map(|_| {
                    self.counter += 1;
                    c.propose(node(who), value(self.counter))
                });
                said = format!("taken: {:?}", taken.collect::<Vec<_>>());
            }
            ["read", who] => said = format!("{:?}", c.read(node(who))),
            ["lease", who] => said = format!("{}", c.replica(node(who)).holds_lease(c.clock(node(who)))),
            ["cut", ref sides @ ..] => Self::cut(c, sides),
            ["heal"] => c.cut.clear(),
            ["crash", who] => c.crash(node(who)),
            ["restart", who] => c.restart(node(who)),
            // Replaces what is on the disk of a node that is down: its term, and the terms of its log.
            ["disk", who, term, ref terms @ ..] => {
                let log = terms.iter().map(|t| t.parse().expect("a term"));
                c.set_disk(node(who), term.parse().expect("a term"), log);
            }
            // Timers of these stand still, as those of processes that are stopped.
            ["doze", ref who @ ..] => c.dozing.extend(who.iter().map(|w| node(w))),
            ["rise"] => c.dozing.clear(),
            // What one sends the other is kept, to be delivered in any order, doubled or never.
            ["keep", from, to] => {
                c.kept.insert((node(from) as u32 + 1, node(to) as u32 + 1), Vec::new());
            }
            ["kept", from, to] => said = Self::kept(c, node(from), node(to)),
            ["deliver", from, to, ref places @ ..] => {
                for place in numbers(places) {
                    c.deliver_kept(node(from), node(to), place as usize - 1);
                }
            }
            ["flow", from, to] => c.let_flow(node(from), node(to)),
            ["stick", who] => c.nodes[node(who)].disk_stuck = true,
            ["unstick", who] => c.unstick(node(who)),
            ["compact", who, keep] => c.compact(node(who), keep.parse().expect("keep")),
            ["wake", who] => {
                let now = c.clock(node(who));
                c.with(node(who), |r| r.wake(now));
            }
            ["transfer", from, to] => {
                let (now, to) = (c.clock(node(from)), TargetId(node(to) as u32 + 1));
                said = format!("{:?}", c.with(node(from), |r| r.transfer_leadership(to, now)));
            }
            // A vote is asked for without a pre-vote, as by one who was told to campaign.
            ["ask", voter, candidate] => {
                let (now, from) = (c.clock(node(voter)), addr(node(candidate) as u32 + 1));
                let asks = c.replica(node(candidate));
                let last_index = asks.last_index();
                let last_term = asks.entry(last_index).map_or(Term(0), |e| e.term);
                let term = Term(c.replica(node(voter)).term().0 + 1);
                let kind = protocol::raft::Kind::Vote { last_index, last_term, transfer: None };
                c.with(node(voter), |r| r.handle(from, protocol::raft::Message { term, kind }, now));
            }
            ["members", who, ref ids @ ..] => {
                let plus = ids.iter().position(|w| *w == "+").unwrap_or(ids.len());
                let next = members(&numbers(&ids[..plus]), &numbers(&ids[(plus + 1).min(ids.len())..]));
                let now = c.clock(node(who));
                said = format!("{:?}", c.with(node(who), |r| r.change_members(next, now)));
            }
            ["damage", who, keep] => Self::damage(c, node(who), keep.parse().expect("keep")),
            ["sends", "on"] => c.trace_sends = true,
            ["sends", "off"] => c.trace_sends = false,
            ["show"] => said = Self::show(c),
            _ => panic!("what is {line:?}?"),
        }
        out.push_str(&c.trace.replace(String::new()).unwrap_or_default());
        if !said.is_empty() {
            let _ = writeln!(out, "{}", said.trim_end());
        }
        c.check_logs();
    }

    /// Makes a node the leader, however it comes about, and lets its first entry commit.
    fn elect(c: &mut Cluster, who: usize) -> String {
        for _ in 0..100 {
            c.run_until(c.now + 100 * MS);
            match c.leader() {
                Some(at) if at == who => {
                    c.run_until(c.now + 200 * MS);
                    c.trace = Some(String::new());
                    return format!("n{} leads in {:?}", who + 1, c.replica(who).term());
                }
                Some(at) => {
                    let now = c.clock(at);
                    let _ = c.with(at, |r| r.transfer_leadership(TargetId(who as u32 + 1), now));
                }
                None => {}
            }
        }
        "nobody could be elected".into()
    }

    /// `cut 1 2 | 3`: no message passes between the sides.
    fn cut(c: &mut Cluster, sides: &[&str]) {
        let sides: Vec<Vec<u32>> = sides.split(|w| *w == "|").map(numbers).collect();
        for (at, side) in sides.iter().enumerate() {
            for other in sides.iter().enumerate().filter(|(o, _)| *o != at).flat_map(|(_, s)| s) {
                c.cut.extend(side.iter().map(|a| (*a, *other)));
            }
        }
    }

    fn kept(c: &Cluster, from: usize, to: usize) -> String {
        let mut out = String::new();
        let kept = &c.kept[&(from as u32 + 1, to as u32 + 1)];
        for (place, message) in (1..).zip(kept) {
            let _ = match &message.kind {
                protocol::raft::Kind::Append { prev_index, prev_term, commit, entries, .. } => {
                    let indices: Vec<String> = entries.iter().map(|e| e.index.to_string()).collect();
                    let entries = indices.join(" ");
                    writeln!(
                        out,
                        "{place}: Append [{entries}] after {prev_index} of {prev_term:?}, commit {commit}"
                    )
                }
                protocol::raft::Kind::Heartbeat { round, .. } => {
                    writeln!(out, "{place}: Heartbeat of {:?}, round {}", message.term, round.number)
                }
                kind => writeln!(out, "{place}: {kind:?}"),
            };
        }
        out
    }

    fn damage(c: &mut Cluster, at: usize, keep: usize) {
        c.crash(at);
        let disk = &mut c.nodes[at].disk;
        disk.entries.truncate(keep);
        disk.applied = disk.floor.0;
        disk.hard = HardState { term: disk.entries.last().map_or(disk.floor.1, |e| e.term), vote: None };
        disk.health = Health::Damaged;
    }

    fn show(c: &Cluster) -> String {
        let mut out = String::new();
        for (at, node) in c.nodes.iter().enumerate() {
            let Some(r) = &node.replica else {
                let _ = writeln!(out, "n{} down", at + 1);
                continue;
            };
            let terms = (r.floor().0.0 + 1..=r.last_index().0).filter_map(|i| r.entry(LogIndex(i)));
            let terms: Vec<String> = terms.map(|e| e.term.to_string()).collect();
            let vote = r.hard_state().vote.map_or("-".into(), |v| format!("n{v}"));
            let _ = write!(
                out,
                "n{} {:?} {:?} vote {vote} commit {}",
                at + 1,
                r.role(),
                r.term(),
                r.commit_index()
            );
            let _ = write!(out, " log {}:[{}] {:?}", r.floor().0, terms.join(" "), r.health());
            let voters: Vec<String> = r.members().voters().map(|m| m.target.to_string()).collect();
            let learners: Vec<String> = r.members().learners().map(|m| format!("+{}", m.target)).collect();
            let _ = write!(out, " ({}{})", voters.join(" "), learners.join(""));
            let _ = writeln!(out, "{}", if r.is_hibernating() { " asleep" } else { "" });
        }
        out
    }
}

fn check(path: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let mut scene = Scene::new();
    let mut made = String::new();
    for block in text.trim_end().split("\n\n") {
        let commands = block.split("\n----").next().unwrap_or("");
        let mut out = String::new();
        for line in commands.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty()) {
            scene.run(line, &mut out);
        }
        let ran = commands.lines().any(|l| !l.starts_with('#'));
        made += &if ran { format!("{commands}\n----\n{out}\n") } else { format!("{commands}\n\n") };
    }
    let made = format!("{}\n", made.trim_end());
    if made == text {
        return Ok(());
    }
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        return std::fs::write(path, made).map_err(|e| e.to_string());
    }
    Err(format!("{} differs; it is now:\n{made}", path.display()))
}

#[test]
fn scenarios_go_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let files = std::fs::read_dir(folder).expect("testdata").map(|f| f.expect("a file").path());
    let mut files: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "txt")).collect();
    files.sort();
    assert!(files.len() >= 27, "scenarios are missing");
    let failed: Vec<String> = files.iter().filter_map(|p| check(p).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
