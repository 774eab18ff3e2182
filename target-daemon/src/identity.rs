//! Which target of which cluster a directory belongs to: `identity.json` in it.
//!
//! Written whole or not at all (a temporary file, synced, renamed). A directory of another target
//! or another cluster is refused and left untouched, so that swapped disks lose nothing.

use protocol::control::{Problem, ProblemKind};
use protocol::types::TargetId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The file's name in a target's directory.
pub const FILE_NAME: &str = "identity.json";
/// The format that this code writes.
const VERSION: u32 = 1;

/// Who a target is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Its number.
    pub target: TargetId,
    /// Its cluster, once it joined one.
    pub cluster: Option<[u8; 16]>,
    /// Random, made when the directory was formatted.
    pub disk: [u8; 16],
    /// When, in seconds since 1970.
    pub created_s: u64,
    dir: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    target: u32,
    cluster: Option<String>,
    disk: String,
    created_s: u64,
}

impl Identity {
    /// Gives a directory, which must exist and have none, an identity.
    pub fn create(dir: &Path, target: TargetId) -> Result<Self, Problem> {
        if let Some(found) = Self::load(dir)? {
            return Err(Problem::new(
                ProblemKind::AlreadyExists,
                format!("{} is formatted already", dir.display()),
                format!("it belongs to target {}", found.target),
                "use it as it is, or empty the directory first; that loses its data",
            ));
        }
        let disk = random_id().map_err(|error| failed(Path::new("/dev/urandom"), "read", &error))?;
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let identity = Self { target, cluster: None, disk, created_s, dir: dir.to_owned() };
        identity.save()?;
        Ok(identity)
    }

    /// A directory's identity; `None` when it has none.
    pub fn load(dir: &Path) -> Result<Option<Self>, Problem> {
        let path = dir.join(FILE_NAME);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&path, "read", &error)),
        };
        let damaged = |cause: String| {
            let what = format!("{} is damaged", path.display());
            let fix = "restore it from a backup, or rebuild the target in an empty directory from its peers";
            Problem::new(ProblemKind::Storage, what, cause, fix)
        };
        let stored: Stored = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if stored.version != VERSION {
            return Err(Problem::new(
                ProblemKind::Protocol,
                format!("{} has version {}", path.display(), stored.version),
                format!("another version of ashlar wrote it; this one knows version {VERSION}"),
                "run the version that formatted the target, or upgrade as its notes say",
            ));
        }
        let id = |text: &str| from_hex(text).ok_or_else(|| damaged(format!("{text:?} is not 32 hex digits")));
        Ok(Some(Self {
            target: TargetId(stored.target),
            cluster: stored.cluster.as_deref().map(id).transpose()?,
            disk: id(&stored.disk)?,
            created_s: stored.created_s,
            dir: dir.to_owned(),
        }))
    }

    /// The identity of a directory that must be this target's.
    pub fn open(dir: &Path, target: TargetId) -> Result<Self, Problem> {
        let Some(found) = Self::load(dir)? else {
            return Err(Problem::new(
                ProblemKind::NotFound,
                format!("{} holds no target", dir.display()),
                "it was never formatted, or its disk is not mounted",
                "mount it, or format it with `ashlar target format`",
            ));
        };
        if found.target != target {
            return Err(Problem::new(
                ProblemKind::IdTaken,
                format!("{} belongs to target {}, not {target}", dir.display(), found.target),
                "the configuration names another target's directory, or disks were swapped",
                "set `id` and `dir` of target.toml to those that belong together",
            ));
        }
        Ok(found)
    }

    /// Joins a cluster, or checks that it is the one joined before.
    pub fn join(&mut self, cluster: [u8; 16]) -> Result<(), Problem> {
        match self.cluster {
            Some(joined) if joined == cluster => Ok(()),
            Some(joined) => Err(Problem::new(
                ProblemKind::WrongCluster,
                format!("{} belongs to cluster {}", self.dir.display(), to_hex(&joined)),
                format!("the MDS serves cluster {}", to_hex(&cluster)),
                "set `mds` of target.toml to the MDS of the target's own cluster",
            )),
            None => {
                let joined = Self { cluster: Some(cluster), ..self.clone() };
                joined.save()?;
                *self = joined;
                Ok(())
            }
        }
    }

    /// The target's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn save(&self) -> Result<(), Problem> {
        let stored = Stored {
            version: VERSION,
            target: self.target.0,
            cluster: self.cluster.map(|id| to_hex(&id)),
            disk: to_hex(&self.disk),
            created_s: self.created_s,
        };
        let mut text =
            serde_json::to_string_pretty(&stored).expect("strings and numbers have a form in JSON");
        text.push('\n');
        let path = self.dir.join(FILE_NAME);
        replace_file(&path, text.as_bytes()).map_err(|error| failed(&path, "written", &error))
    }
}

/// Replaces a file whole or not at all, and durably.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// 32 hex digits.
pub fn to_hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

fn random_id() -> std::io::Result<[u8; 16]> {
    let mut id = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

fn failed(path: &Path, verb: &str, error: &std::io::Error) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("{} cannot be {verb}", path.display()),
        error.to_string(),
        "check that the directory exists, belongs to the user ashlar runs as, and has room",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_a_restart_and_a_join() {
        let dir = tempfile::tempdir().unwrap();
        let mut made = Identity::create(dir.path(), TargetId(3)).unwrap();
        made.join([7; 16]).unwrap();
        assert_eq!(Identity::open(dir.path(), TargetId(3)).unwrap(), made);
        assert_eq!(made.join([7; 16]), Ok(()));
    }

    #[test]
    fn swapped_disks_and_foreign_clusters_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut made = Identity::create(dir.path(), TargetId(3)).unwrap();
        made.join([7; 16]).unwrap();
        let before = fs::read(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(Identity::open(dir.path(), TargetId(4)).unwrap_err().kind, ProblemKind::IdTaken);
        assert_eq!(made.join([8; 16]).unwrap_err().kind, ProblemKind::WrongCluster);
        assert_eq!(Identity::create(dir.path(), TargetId(4)).unwrap_err().kind, ProblemKind::AlreadyExists);
        assert_eq!(fs::read(dir.path().join(FILE_NAME)).unwrap(), before);
    }

    #[test]
    fn an_unmounted_disk_is_not_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let problem = Identity::open(dir.path(), TargetId(1)).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::NotFound);
        assert!(problem.cause.contains("not mounted"));
    }

    #[test]
    fn a_damaged_file_is_reported_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let texts = [
            "",
            "{}",
            r#"{"version":1,"target":1,"cluster":null,"disk":"+0000000000000000000000000000000","created_s":0}"#,
            r#"{"version":2,"target":1,"cluster":null,"disk":"00000000000000000000000000000000","created_s":0}"#,
        ];
        for text in texts {
            fs::write(&path, text).unwrap();
            Identity::open(dir.path(), TargetId(1)).unwrap_err();
            Identity::create(dir.path(), TargetId(1)).unwrap_err();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
