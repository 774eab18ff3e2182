//! Writing settings so that they can be put back, whenever the machine stops.
//!
//! Apply, one change at a time: read, journal the old text, write, read back, journal what came of
//! it. Undo goes through the open entries from the newest to the oldest, and writes only where the
//! text is still ours; everything else is left alone, with the reason. Both first settle what an
//! interrupted run has left.
//!
//! Files that the kernel resets when another is written (a queue's depth, for a new scheduler) are
//! recorded with it and put back after it.
//!
//! Deliberately absent: any knowledge of tuners, and any clock: time and boot id are passed in.

use crate::journal::{Begin, Beside, Entry, Journal, Record, next_seq, open_entries};
use crate::model::{Change, Form};
use crate::tree::Tree;
use serde::Serialize;
use std::io;

/// When something is done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Boot id of the kernel.
    pub boot: String,
    /// Seconds since 1970.
    pub time_s: u64,
}

/// How one change ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Applied {
    /// Written, and it reads as it should.
    Applied,
    /// It reads so already.
    Already,
    /// Written, but it reads otherwise: the kernel took what it could.
    Differs {
        /// What it reads.
        left: String,
    },
    /// The kernel refused; nothing was changed.
    Refused {
        /// In the kernel's words.
        why: String,
    },
}

/// How one entry was undone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Undone {
    /// The old text is back.
    PutBack {
        /// The old text.
        old: String,
    },
    /// It was not ours any more, or could not be written.
    LeftAlone {
        /// Why.
        why: String,
    },
    /// There was nothing to do.
    Nothing {
        /// Why.
        why: String,
    },
}

/// One line of what undo did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct UndoLine {
    /// Whose it was.
    pub tuner: String,
    /// What it was about.
    pub object: String,
    /// The file.
    pub path: String,
    /// How it ended.
    #[serde(flatten)]
    pub undone: Undone,
}

/// Applies and undoes over a tree and a journal.
pub struct Engine<'a> {
    /// The files.
    pub tree: &'a mut dyn Tree,
    /// What was done to them.
    pub journal: &'a mut dyn Journal,
    /// Now.
    pub now: Moment,
}

/// How an entry stands, from the file's text now.
enum Standing {
    /// Ours: it reads as we left it.
    Ours,
    /// It reads as it did before us.
    Old,
    /// It cannot be read, or others have changed it.
    Foreign(String),
    /// It is of another boot.
    Restarted,
}

impl Engine<'_> {
    /// Writes one change.
    ///
    /// # Errors
    /// The journal cannot be written; then nothing was changed.
    pub fn apply(&mut self, tuner: &str, object: &str, change: &Change) -> io::Result<Applied> {
        let old = match self.tree.read(&change.path) {
            Ok(old) => change.form.canonical(&old),
            Err(error) => return Ok(Applied::Refused { why: error.to_string() }),
        };
        if change.form.same(&old, &change.new) {
            return Ok(Applied::Already);
        }
        let seq = next_seq(self.journal.records());
        let begin = Begin {
            seq,
            boot: self.now.boot.clone(),
            time_s: self.now.time_s,
            tuner: tuner.into(),
            object: object.into(),
            path: change.path.clone(),
            form: change.form,
            old: old.clone(),
            new: change.new.clone(),
            beside: self.read_beside(change.collateral.iter().map(|(path, form)| (path.as_str(), *form))),
        };
        self.journal.append(&Record::Begin(begin.clone()))?;
        let written = self.tree.write(&change.path, &change.new);
        let left = self.tree.read(&change.path).map_or_else(|_| String::new(), |t| change.form.canonical(&t));
        if let Err(error) = written
            && change.form.same(&left, &old)
        {
            self.close(seq, &format!("refused: {error}"))?;
            return Ok(Applied::Refused { why: error.to_string() });
        }
        self.done(&begin, &left)?;
        Ok(if change.form.same(&left, &change.new) { Applied::Applied } else { Applied::Differs { left } })
    }

    /// Settles what an interrupted run has left: what was written is ours, what was not is
    /// forgotten, what was being put back is put back.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn recover(&mut self) -> io::Result<Vec<UndoLine>> {
        let mut lines = Vec::new();
        for entry in open_entries(self.journal.records()).into_iter().rev() {
            let settled = match (&entry.undoing, &entry.left, self.standing(&entry)) {
                (_, _, Standing::Restarted) => Some(self.restarted(&entry)?),
                (Some(_), _, _) => Some(self.undo_entry(&entry)?),
                (None, Some(_), _) => None,
                (None, None, Standing::Ours) => {
                    let left =
                        entry.begin.form.canonical(&self.tree.read(&entry.begin.path).unwrap_or_default());
                    self.done(&entry.begin, &left)?;
                    None
                }
                (None, None, _) => Some(self.undo_entry(&entry)?),
            };
            lines.extend(settled.map(|undone| line(&entry, undone)));
        }
        Ok(lines)
    }

    /// Puts back what is still ours of the tuners named, or of all; newest first.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn undo(&mut self, tuners: &[String]) -> io::Result<Vec<UndoLine>> {
        let mut lines = Vec::new();
        for entry in open_entries(self.journal.records()).into_iter().rev() {
            if tuners.is_empty() || tuners.contains(&entry.begin.tuner) {
                let undone = self.undo_entry(&entry)?;
                lines.push(line(&entry, undone));
            }
        }
        Ok(lines)
    }

    /// What undo would do, without doing it.
    pub fn would_undo(&self, tuners: &[String]) -> Vec<UndoLine> {
        let open = open_entries(self.journal.records()).into_iter().rev();
        let wanted = open.filter(|entry| tuners.is_empty() || tuners.contains(&entry.begin.tuner));
        // Entries beneath the newest of a file are judged as if those above were undone.
        let mut above: Vec<(String, String)> = Vec::new();
        let mut lines = Vec::new();
        for entry in wanted {
            let Begin { path, old, form, .. } = &entry.begin;
            let assumed = above.iter().rev().find(|(other, _)| other == path).map(|(_, text)| text.clone());
            let standing = match assumed {
                Some(text) => judge(&entry, &text, *form),
                None => self.standing(&entry),
            };
            let undone = match standing {
                Standing::Ours => {
                    above.push((path.clone(), old.clone()));
                    Undone::PutBack { old: old.clone() }
                }
                Standing::Old => Undone::Nothing { why: "it reads as it did before us".into() },
                Standing::Foreign(why) => Undone::LeftAlone { why },
                Standing::Restarted => Undone::Nothing { why: RESTARTED.into() },
            };
            lines.push(line(&entry, undone));
        }
        lines
    }

    fn undo_entry(&mut self, entry: &Entry) -> io::Result<Undone> {
        let (seq, begin) = (entry.begin.seq, &entry.begin);
        match (self.standing(entry), &entry.undoing) {
            (Standing::Restarted, _) => self.restarted(entry),
            (Standing::Foreign(why), _) => {
                self.close(seq, &format!("left alone: {why}"))?;
                Ok(Undone::LeftAlone { why })
            }
            // An interrupted undo had written the file itself; what goes with it may be missing.
            (Standing::Old, Some(beside)) => {
                self.put_beside(beside);
                self.close(seq, "put back")?;
                Ok(Undone::PutBack { old: begin.old.clone() })
            }
            (Standing::Old, None) => {
                let why = "it reads as it did before us";
                self.close(seq, why)?;
                Ok(Undone::Nothing { why: why.into() })
            }
            (Standing::Ours, known) => {
                let beside = known.clone().unwrap_or_else(|| self.beside_after(entry));
                if known.is_none() {
                    self.journal.append(&Record::Undoing { seq, beside: beside.clone() })?;
                }
                if let Err(error) = self.tree.write(&begin.path, &begin.old) {
                    let why = format!("the kernel refuses the old value: {error}");
                    self.close(seq, &why)?;
                    return Ok(Undone::LeftAlone { why });
                }
                self.put_beside(&beside);
                self.close(seq, "put back")?;
                Ok(Undone::PutBack { old: begin.old.clone() })
            }
        }
    }

    fn standing(&self, entry: &Entry) -> Standing {
        if entry.begin.boot != self.now.boot {
            return Standing::Restarted;
        }
        match self.tree.read(&entry.begin.path) {
            Ok(text) => judge(entry, &text, entry.begin.form),
            Err(error) => Standing::Foreign(format!("it cannot be read: {error}")),
        }
    }

    fn restarted(&mut self, entry: &Entry) -> io::Result<Undone> {
        self.close(entry.begin.seq, RESTARTED)?;
        Ok(Undone::Nothing { why: RESTARTED.into() })
    }

    /// What the files beside are to be after the entry is undone: as before it where they are
    /// still as we left them, else as they are now, since then somebody wants them so.
    fn beside_after(&self, entry: &Entry) -> Vec<Beside> {
        let after = |before: &Beside| {
            let now = self.tree.read(&before.path).ok()?;
            let left = entry.left.iter().flat_map(|(_, beside)| beside).find(|b| b.path == before.path);
            let ours = left.is_none_or(|left| before.form.same(&left.text, &now));
            let text = if ours { before.text.clone() } else { before.form.canonical(&now) };
            Some(Beside { text, ..before.clone() })
        };
        entry.begin.beside.iter().filter_map(after).collect()
    }

    fn put_beside(&mut self, beside: &[Beside]) {
        for Beside { path, form, text } in beside {
            if self.tree.read(path).is_ok_and(|now| !form.same(&now, text)) {
                // Refused only if the device changed; then its own default is as good.
                let _ = self.tree.write(path, text);
            }
        }
    }

    fn read_beside<'b>(&self, files: impl Iterator<Item = (&'b str, Form)>) -> Vec<Beside> {
        let read = |(path, form): (&str, Form)| {
            let text = form.canonical(&self.tree.read(path).ok()?);
            Some(Beside { path: path.into(), form, text })
        };
        files.filter_map(read).collect()
    }

    fn done(&mut self, begin: &Begin, left: &str) -> io::Result<()> {
        let beside = self.read_beside(begin.beside.iter().map(|b| (b.path.as_str(), b.form)));
        self.journal.append(&Record::Done { seq: begin.seq, left: left.into(), beside })
    }

    fn close(&mut self, seq: u64, why: &str) -> io::Result<()> {
        self.journal.append(&Record::Closed { seq, why: why.into() })
    }
}

const RESTARTED: &str = "the machine was restarted since: the setting had gone by itself";

fn judge(entry: &Entry, text: &str, form: Form) -> Standing {
    let ours = entry.left.as_ref().map_or(&entry.begin.new, |(left, _)| left);
    if form.same(text, ours) {
        Standing::Ours
    } else if form.same(text, &entry.begin.old) {
        Standing::Old
    } else {
        let (now, old) = (form.canonical(text), &entry.begin.old);
        Standing::Foreign(format!("it reads {now}, ours was {ours}: changed by others (before us: {old})"))
    }
}

fn line(entry: &Entry, undone: Undone) -> UndoLine {
    let Begin { tuner, object, path, .. } = &entry.begin;
    UndoLine { tuner: tuner.clone(), object: object.clone(), path: path.clone(), undone }
}
