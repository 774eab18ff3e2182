//! One process at a time on a target's directory.
//!
//! Two targets on one directory, say by a copied configuration with other ports, would each
//! write their own log over the other's; and a disk that is inspected while its target writes
//! looks damaged. The kernel drops the lock when its holder ends, however it ends.

use protocol::control::{Problem, ProblemKind};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

const FILE_NAME: &str = "lock";

/// Held for as long as the directory is in use.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes a directory for a target that is to run there.
    ///
    /// # Errors
    /// Another process has it, or the lock's file cannot be made.
    pub fn for_running(dir: &Path) -> Result<Self, Problem> {
        let path = dir.join(FILE_NAME);
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| cannot(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(dir, &mut file)),
            Err(TryLockError::Error(error)) => return Err(cannot(&path, &error)),
        }
        // For the message of whoever comes second; the lock holds without it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }

    /// Keeps targets from starting on a directory while it is read; `None` where none ever ran.
    ///
    /// # Errors
    /// A target runs there, or the lock's file cannot be read.
    pub fn for_reading(dir: &Path) -> Result<Option<Self>, Problem> {
        let path = dir.join(FILE_NAME);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(cannot(&path, &error)),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Err(in_use(dir, &mut file)),
            Err(TryLockError::Error(error)) => Err(cannot(&path, &error)),
        }
    }
}

fn in_use(dir: &Path, file: &mut File) -> Problem {
    let mut owner = String::new();
    let _ = file.read_to_string(&mut owner);
    Problem::new(
        ProblemKind::InUse,
        format!("{} is in use by another process", dir.display()),
        format!("a target runs there (pid {}), or `ashlar disk inspect` reads it", owner.trim()),
        "stop that one first; a target of `ashlar dev` stops with its cluster",
    )
}

fn cannot(path: &Path, error: &std::io::Error) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("{} cannot be locked", path.display()),
        error.to_string(),
        "run as the user that owns the target's directory, on a file system with flock",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_target_on_a_directory_and_a_look_at_a_running_one_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(DirLock::for_reading(dir.path()).expect("never used").is_none());
        let running = DirLock::for_running(dir.path()).expect("free");
        let problem = DirLock::for_running(dir.path()).expect_err("in use");
        assert!(problem.cause.contains(&std::process::id().to_string()), "{problem:?}");
        DirLock::for_reading(dir.path()).expect_err("in use");
        drop(running);
        let readers = [(); 2].map(|()| DirLock::for_reading(dir.path()).expect("free"));
        DirLock::for_running(dir.path()).expect_err("being read");
        drop(readers);
        DirLock::for_running(dir.path()).expect("free again");
    }
}
