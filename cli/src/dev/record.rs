//! `dev.json`: what a running dev cluster tells scripts, tests and other commands.
//!
//! It is there exactly while the cluster serves: written when it is ready, replaced whole
//! (a rename) whenever a pid changes, removed at a clean stop. Addresses are HOST:PORT.

use crate::problem::Problem;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The file's name in the cluster's folder.
pub const FILE: &str = "dev.json";

/// The whole file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DevRecord {
    /// The metadata server.
    pub mds: MdsRecord,
    /// The targets, by id.
    pub targets: Vec<TargetRecord>,
    /// The volumes that are exported.
    pub volumes: Vec<VolumeRecord>,
    /// NVMe discovery services, the one with the well-known port first.
    pub discovery: Vec<DiscoveryRecord>,
}

/// The metadata server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MdsRecord {
    /// gRPC, HOST:PORT.
    pub endpoint: String,
    /// Of the process started last; it may have died a moment ago.
    pub pid: u32,
}

/// One target.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TargetRecord {
    /// Its number in the cluster.
    pub id: u32,
    /// Of the process started last; it may have died a moment ago.
    pub pid: u32,
    /// Its data.
    pub dir: PathBuf,
    /// Where other targets reach its first shard, HOST:PORT.
    pub peer: String,
    /// gRPC, HOST:PORT.
    pub admin: String,
    /// Prometheus text over HTTP, HOST:PORT.
    pub metrics: String,
}

/// One exported volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What hosts see as a block.
    pub block_bytes: u32,
    /// NBD over TCP, one URI a target.
    pub nbd: Vec<String>,
    /// NBD over a Unix socket, one URI a target.
    pub nbd_unix: Vec<String>,
    /// NVMe over TCP, one a target.
    pub nvme: Vec<NvmeRecord>,
}

/// One NVMe/TCP subsystem.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NvmeRecord {
    /// Address.
    pub traddr: String,
    /// Port.
    pub trsvcid: String,
    /// The subsystem's name.
    pub nqn: String,
    /// What attaches it, to paste; the paths of all targets become one disk.
    #[serde(default)]
    pub command: String,
}

impl NvmeRecord {
    /// A path of a subsystem.
    pub fn new(traddr: &str, trsvcid: u16, nqn: String) -> Self {
        let command = format!("nvme connect -t tcp -a {traddr} -s {trsvcid} -n {nqn}");
        Self { traddr: traddr.into(), trsvcid: trsvcid.to_string(), nqn, command }
    }
}

/// One NVMe discovery service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiscoveryRecord {
    /// Address.
    pub traddr: String,
    /// Port.
    pub trsvcid: String,
    /// What lists all that is there, to paste.
    #[serde(default)]
    pub command: String,
}

impl DiscoveryRecord {
    /// A discovery service.
    pub fn new(traddr: &str, trsvcid: u16) -> Self {
        let command = format!("nvme discover -t tcp -a {traddr} -s {trsvcid}");
        Self { traddr: traddr.into(), trsvcid: trsvcid.to_string(), command }
    }
}

impl DevRecord {
    /// The record of the cluster that runs in `dir`.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(dir.join(FILE))?;
        serde_json::from_str(&text).map_err(io::Error::other)
    }

    /// Replaces the record; readers see the old one or the new one.
    pub fn write(&self, dir: &Path) -> Result<(), Problem> {
        replace_json(&dir.join(FILE), self)
    }

    /// Says that nothing serves here any more.
    pub fn remove(dir: &Path) {
        let _ = fs::remove_file(dir.join(FILE));
    }
}

/// Replaces a file by the JSON of `value`, durably and at once.
pub fn replace_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Problem> {
    let mut text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    text.push('\n');
    replace(path, &text).map_err(Problem::io(format_args!("cannot write {}", path.display())))
}

/// Replaces a file by `text`, durably and at once.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = fs::File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> DevRecord {
        DevRecord {
            mds: MdsRecord { endpoint: "127.0.0.1:1".into(), pid: 10 },
            targets: vec![TargetRecord {
                id: 1,
                pid: 9,
                dir: "/d/target-1".into(),
                peer: "127.0.0.1:2".into(),
                admin: "127.0.0.1:3".into(),
                metrics: "127.0.0.1:4".into(),
            }],
            volumes: vec![VolumeRecord {
                name: "vol0".into(),
                bytes: 4 << 30,
                block_bytes: 4096,
                nbd: vec!["nbd://127.0.0.1:5/vol0".into()],
                nbd_unix: vec!["nbd+unix:///vol0?socket=/d/target-1/nbd.sock".into()],
                nvme: vec![NvmeRecord::new("127.0.0.1", 6, "nqn.x:vol0".into())],
            }],
            discovery: vec![DiscoveryRecord::new("127.0.0.1", 8009)],
        }
    }

    /// Scripts read these names; a change here breaks them.
    #[test]
    fn the_names_that_scripts_rely_on() {
        let expected = serde_json::json!({
            "mds": {"endpoint": "127.0.0.1:1", "pid": 10},
            "targets": [{"id": 1, "pid": 9, "dir": "/d/target-1", "peer": "127.0.0.1:2",
                "admin": "127.0.0.1:3", "metrics": "127.0.0.1:4"}],
            "volumes": [{"name": "vol0", "bytes": 4u64 << 30, "block_bytes": 4096,
                "nbd": ["nbd://127.0.0.1:5/vol0"],
                "nbd_unix": ["nbd+unix:///vol0?socket=/d/target-1/nbd.sock"],
                "nvme": [{"traddr": "127.0.0.1", "trsvcid": "6", "nqn": "nqn.x:vol0",
                    "command": "nvme connect -t tcp -a 127.0.0.1 -s 6 -n nqn.x:vol0"}]}],
            "discovery": [{"traddr": "127.0.0.1", "trsvcid": "8009",
                "command": "nvme discover -t tcp -a 127.0.0.1 -s 8009"}],
        });
        assert_eq!(serde_json::to_value(sample()).expect("plain values"), expected);
    }

    #[test]
    fn a_reader_never_sees_half_a_record_nor_the_one_being_made() {
        let dir = tempfile::tempdir().expect("a folder");
        sample().write(dir.path()).expect("written");
        let mut changed = sample();
        changed.targets[0].pid = 11;
        changed.write(dir.path()).expect("written again");
        assert_eq!(DevRecord::read(dir.path()).expect("there"), changed);
        let names: Vec<_> =
            fs::read_dir(dir.path()).expect("listed").flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, [FILE], "nothing left over");
        DevRecord::remove(dir.path());
        assert!(DevRecord::read(dir.path()).is_err());
    }
}
