//! Where everything of a dev cluster lies, beneath one folder D:
//!
//! ```text
//! D/lock             held (flock) by the `ashlar dev` that runs here
//! D/cluster.json     ports and shape, chosen at the first start and kept
//! D/dev.json         see `record`
//! D/mds/             the MDS's database
//! D/target-N/        target.toml, nbd.sock and the target's data
//! D/logs/            mds.log, target-N.log
//! ```

use crate::problem::Problem;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket: `sun_path` is 108 bytes, the last a NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The places of one dev cluster.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

/// Held for as long as this process serves the folder.
pub struct Lock {
    _file: File,
}

impl Layout {
    /// The layout in a folder, which is made if missing. Paths are absolute from here on.
    pub fn at(dir: &Path) -> Result<Self, Problem> {
        fs::create_dir_all(dir.join("logs"))
            .and_then(|()| dir.canonicalize())
            .map(|root| Self { root })
            .map_err(Problem::io(format_args!("cannot use {} as a dev cluster's folder", dir.display())))
    }
    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Ports and shape.
    pub fn cluster_json(&self) -> PathBuf {
        self.root.join("cluster.json")
    }
    /// The MDS's folder.
    pub fn mds(&self) -> PathBuf {
        self.root.join("mds")
    }
    /// A target's folder.
    pub fn target(&self, id: u32) -> PathBuf {
        self.root.join(format!("target-{id}"))
    }
    /// A target's configuration.
    pub fn target_toml(&self, id: u32) -> PathBuf {
        self.target(id).join("target.toml")
    }
    /// A process's log.
    pub fn log(&self, process: &str) -> PathBuf {
        self.root.join("logs").join(format!("{process}.log"))
    }

    /// The Unix socket of a target's exports: in its folder, or, where that path is longer
    /// than a socket's may be, in a short folder made from a hash of it.
    pub fn socket(&self, id: u32) -> Result<PathBuf, Problem> {
        let socket = self.target(id).join("nbd.sock");
        if fits_a_socket(&socket) {
            return Ok(socket);
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let folder = short_folder(&self.root, runtime.as_deref().filter(|dir| dir.is_dir()));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(Problem::io(format_args!("cannot make {} for sockets", folder.display())))?;
        Ok(folder.join(format!("nbd-{id}.sock")))
    }

    /// Takes the folder for this process.
    pub fn lock(&self) -> Result<Lock, Problem> {
        let path = self.root.join("lock");
        let cannot = || Problem::io(format!("cannot lock {}", path.display()));
        let opened = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path);
        let mut file = opened.map_err(cannot())?;
        if file.try_lock().is_err() {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner);
            return Err(in_use(&self.root, owner.trim()));
        }
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(cannot())?;
        Ok(Lock { _file: file })
    }
}

fn in_use(root: &Path, owner: &str) -> Problem {
    Problem::new(format!("{} is in use by another `ashlar dev` (pid {owner})", root.display()))
        .cause("a dev cluster runs there already")
        .fix("use that one, stop it (Ctrl-C or kill), or give another folder with --dir")
}

fn fits_a_socket(path: &Path) -> bool {
    path.as_os_str().as_bytes().len() <= SOCKET_PATH_BYTES_MAX
}

fn short_folder(root: &Path, runtime: Option<&Path>) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    runtime.unwrap_or(Path::new("/tmp")).join(format!("ashlar-dev-{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_dev_in_the_same_folder_is_refused_and_told_whose_it_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let layout = Layout::at(dir.path()).expect("usable");
        let held = layout.lock().expect("free");
        let problem = layout.lock().err().expect("held").to_string();
        assert!(problem.contains(&format!("pid {}", std::process::id())), "{problem}");
        drop(held);
        layout.lock().expect("free again");
    }

    #[test]
    fn a_deep_folder_gets_sockets_at_a_short_path_the_same_each_time() {
        let dir = tempfile::tempdir().expect("a folder");
        let near = Layout::at(dir.path()).expect("usable");
        assert!(near.socket(1).expect("made").starts_with(near.root()));
        let deep = Layout::at(&dir.path().join("x".repeat(120))).expect("usable");
        let socket = deep.socket(1).expect("made");
        assert!(fits_a_socket(&socket), "{}", socket.display());
        assert_eq!(socket, deep.socket(1).expect("again"));
        assert_ne!(socket, deep.socket(2).expect("another"));
        let _ = fs::remove_dir(socket.parent().expect("a folder"));
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_one_clear_message() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let problem = Layout::at(file.path()).expect_err("not a folder").to_string();
        assert!(problem.starts_with("cannot use "), "{problem}");
    }
}
