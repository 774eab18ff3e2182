//! The files that tuning reads and writes, behind a trait: the host's, or a captured machine's.
//!
//! Paths are absolute, as the kernel's documents have them. Invariants: a read is whole and
//! without the last line's end; names are sorted. Deliberately absent: anything but small text
//! files, folders of names and symbolic links.

use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Longer files than this are not settings.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A tree of small text files.
pub trait Tree {
    /// The text of a file, without the white space around it.
    ///
    /// # Errors
    /// As the kernel has them; some files refuse to be read while they make no sense.
    fn read(&self, path: &str) -> io::Result<String>;
    /// The names in a folder, sorted; none where there is no such folder.
    fn list(&self, path: &str) -> Vec<String>;
    /// The path with every link followed, if there is anything.
    fn resolve(&self, path: &str) -> Option<String>;
    /// Whether there is anything.
    fn exists(&self, path: &str) -> bool {
        self.resolve(path).is_some()
    }
    /// Writes a file that is there, in one write.
    ///
    /// # Errors
    /// As the kernel has them: it checks what it is told.
    fn write(&mut self, path: &str, text: &str) -> io::Result<()>;
}

/// The host's own files, or those beneath another root.
#[derive(Debug, Clone)]
pub struct HostTree {
    root: PathBuf,
}

impl Default for HostTree {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl HostTree {
    /// The tree whose `/sys` is `root/sys`. Absolute links in it lead out of it.
    pub fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        // A name made of what the machine says must not climb out.
        let parts = Path::new(path).components().filter(|part| matches!(part, Component::Normal(_)));
        self.root.join(parts.collect::<PathBuf>())
    }
}

impl Tree for HostTree {
    fn read(&self, path: &str) -> io::Result<String> {
        use io::Read;
        let mut bytes = Vec::new();
        fs::File::open(self.path(path))?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn list(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn resolve(&self, path: &str) -> Option<String> {
        let full = fs::canonicalize(self.path(path)).ok()?;
        let root = fs::canonicalize(&self.root).ok()?;
        Some(format!("/{}", full.strip_prefix(root).ok()?.to_str()?))
    }

    fn write(&mut self, path: &str, text: &str) -> io::Result<()> {
        // The kernel takes a setting in one write; a file that is not there is not made.
        fs::OpenOptions::new().write(true).open(self.path(path))?.write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_is_not_there_is_not_made() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let mut tree = HostTree::at(dir.path());
        assert!(tree.write("/sys/x", "1").is_err());
        assert!(!tree.exists("/sys/x"));
        fs::create_dir(dir.path().join("sys"))?;
        fs::write(dir.path().join("sys/x"), "0\n")?;
        tree.write("/../../sys/x", "1")?;
        assert_eq!((tree.read("/sys/x")?.as_str(), tree.list("/sys")), ("1", vec!["x".to_owned()]));
        Ok(())
    }
}
