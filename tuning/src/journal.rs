//! What was changed, by which tuner, when and in which boot: written and synced before the change.
//!
//! One JSON record a line, appended. `Begin` is durable before a file is written, `Done` after it
//! was read back, `Undoing` before it is put back, `Closed` when it is ours no longer. An entry is
//! open from `Begin` to `Closed`; whatever instant the machine stops at, the open entries tell what
//! may have been written.
//!
//! Invariants: a record is synced before `append` returns; a last line that was cut off is one
//! whose change never began, and is ignored; a damaged line elsewhere is an error, since undoing
//! half of what was done would be worse. One process at a time (a lock).

use crate::model::Form;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where the journal is unless told otherwise.
pub const PATH: &str = "/var/lib/ashlar/tune/journal.jsonl";

/// A file that the kernel sets anew when another is written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Beside {
    /// The file.
    pub path: String,
    /// How its texts are compared.
    pub form: Form,
    /// Its text.
    pub text: String,
}

/// Everything known before a file is written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Number of the entry, from 1 up.
    pub seq: u64,
    /// Boot id of the kernel.
    pub boot: String,
    /// Seconds since 1970.
    pub time_s: u64,
    /// Who wants it.
    pub tuner: String,
    /// What it is about.
    pub object: String,
    /// The file.
    pub path: String,
    /// How its texts are compared.
    pub form: Form,
    /// Its text before.
    pub old: String,
    /// What is written.
    pub new: String,
    /// Files that go with it, as they were before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<Beside>,
}

/// One line of the journal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// About to be written.
    Begin(Begin),
    /// Written; what was read back.
    Done {
        /// Of which entry.
        seq: u64,
        /// The file's text now.
        left: String,
        /// The files that go with it, as they are now.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        beside: Vec<Beside>,
    },
    /// About to be put back.
    Undoing {
        /// Of which entry.
        seq: u64,
        /// What the files that go with it are to be afterwards.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        beside: Vec<Beside>,
    },
    /// Ours no longer.
    Closed {
        /// Of which entry.
        seq: u64,
        /// Why: put back, refused by the kernel, changed by others, gone with a restart.
        why: String,
    },
}

/// An entry that is not closed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Entry {
    /// What was known before.
    pub begin: Begin,
    /// What was read back, if it came that far.
    pub left: Option<(String, Vec<Beside>)>,
    /// Whether undo had begun, and what the files beside are to be.
    pub undoing: Option<Vec<Beside>>,
}

/// A durable list of records.
pub trait Journal {
    /// Appends a record; it is durable when this returns.
    ///
    /// # Errors
    /// It is not known to be durable: nothing may be changed on its account.
    fn append(&mut self, record: &Record) -> io::Result<()>;
    /// Every record, oldest first.
    fn records(&self) -> &[Record];
}

/// The entries that are not closed, oldest first.
pub fn open_entries(records: &[Record]) -> Vec<Entry> {
    let mut open: BTreeMap<u64, Entry> = BTreeMap::new();
    for record in records {
        match record {
            Record::Begin(begin) => {
                open.insert(begin.seq, Entry { begin: begin.clone(), left: None, undoing: None });
            }
            Record::Done { seq, left, beside } => {
                if let Some(entry) = open.get_mut(seq) {
                    entry.left = Some((left.clone(), beside.clone()));
                }
            }
            Record::Undoing { seq, beside } => {
                if let Some(entry) = open.get_mut(seq) {
                    entry.undoing = Some(beside.clone());
                }
            }
            Record::Closed { seq, .. } => drop(open.remove(seq)),
        }
    }
    open.into_values().collect()
}

/// The number of the next entry.
pub fn next_seq(records: &[Record]) -> u64 {
    let seqs = records.iter().filter_map(|r| if let Record::Begin(b) = r { Some(b.seq) } else { None });
    seqs.max().unwrap_or(0) + 1
}

/// A journal in a file.
#[derive(Debug)]
pub struct FileJournal {
    path: PathBuf,
    file: Flock<File>,
    records: Vec<Record>,
}

impl FileJournal {
    /// Opens it, making it and its folder where they are not there, and locks it.
    ///
    /// # Errors
    /// No permission, another `ashlar tune` at work, or a journal that is damaged.
    pub fn open(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            let busy = format!("{} is locked: another `ashlar tune` is at work ({errno})", path.display());
            io::Error::new(io::ErrorKind::ResourceBusy, busy)
        })?;
        File::open(folder)?.sync_all()?;
        let text = fs::read_to_string(path)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            file.set_len(whole as u64)?;
            file.sync_all()?;
        }
        let mut journal = Self { path: path.into(), file, records: Self::parse(&text[..whole], path)? };
        journal.compact()?;
        Ok(journal)
    }

    /// Reads it without a lock, for `list` and `check`; empty when there is none.
    ///
    /// # Errors
    /// It is there and cannot be read, or is damaged.
    pub fn peek(path: &Path) -> io::Result<Vec<Record>> {
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text[..text.rfind('\n').map_or(0, |end| end + 1)], path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str, path: &Path) -> io::Result<Vec<Record>> {
        let record = |(at, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| {
                let what = format!("{} line {}: {error}; mend or move it by hand", path.display(), at + 1);
                io::Error::new(io::ErrorKind::InvalidData, what)
            })
        };
        text.lines().enumerate().map(record).collect()
    }

    /// Forgets what is closed, once that is much.
    fn compact(&mut self) -> io::Result<()> {
        const RECORDS_MAX: usize = 4096;
        if self.records.len() < RECORDS_MAX || !open_entries(&self.records).is_empty() {
            return Ok(());
        }
        self.file.set_len(0)?;
        self.file.sync_all()?;
        self.records.clear();
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Journal for FileJournal {
    fn append(&mut self, record: &Record) -> io::Result<()> {
        let line = serde_json::to_string(record).map_err(io::Error::other)? + "\n";
        (&*self.file).write_all(line.as_bytes())?;
        self.file.sync_all()?;
        self.records.push(record.clone());
        Ok(())
    }

    fn records(&self) -> &[Record] {
        &self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(seq: u64) -> Record {
        Record::Begin(Begin {
            seq,
            boot: "b".into(),
            time_s: 1,
            tuner: "thp".into(),
            object: String::new(),
            path: "/sys/x".into(),
            form: Form::Choice,
            old: "always".into(),
            new: "madvise".into(),
            beside: Vec::new(),
        })
    }

    #[test]
    fn entries_are_open_from_begin_to_closed() {
        let records = [
            begin(1),
            Record::Done { seq: 1, left: "madvise".into(), beside: Vec::new() },
            begin(2),
            Record::Closed { seq: 1, why: "put back".into() },
        ];
        let open = open_entries(&records);
        assert_eq!(open.iter().map(|entry| entry.begin.seq).collect::<Vec<_>>(), [2]);
        assert_eq!(next_seq(&records), 3);
    }

    #[test]
    fn a_line_cut_off_by_a_power_cut_is_one_that_never_was() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a/journal.jsonl");
        FileJournal::open(&path)?.append(&begin(1))?;
        let whole = fs::read(&path)?;
        for cut in 1..whole.len() {
            let torn = [&whole[..], &whole[..cut]].concat();
            fs::write(&path, torn)?;
            let mut journal = FileJournal::open(&path)?;
            assert_eq!(journal.records(), [begin(1)]);
            journal.append(&begin(2))?;
            assert_eq!(FileJournal::peek(&path)?, [begin(1), begin(2)]);
        }
        Ok(())
    }

    #[test]
    fn a_journal_that_is_damaged_or_in_use_is_refused() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("journal.jsonl");
        let held = FileJournal::open(&path)?;
        assert_eq!(FileJournal::open(&path).expect_err("locked").kind(), io::ErrorKind::ResourceBusy);
        drop(held);
        fs::write(&path, "{\"record\":\"nonsense\"}\n")?;
        assert!(FileJournal::open(&path).expect_err("damaged").to_string().contains("line 1"));
        Ok(())
    }
}
