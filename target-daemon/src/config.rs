//! A target's configuration: `target.toml`.
//!
//! Unknown keys are refused, every value is checked before anything is opened, and each refusal
//! names the file, the line, the likely cause and the fix. Sizes are in bytes, times carry their
//! unit in the key. Deliberately absent: defaults for what names a target or its data.

use chunkstore::LOG_SEGMENTS_MIN;
use protocol::control::{Problem, ProblemKind};
use protocol::types::{CHUNK_BYTES, ENTRY_BYTES_MAX, TargetId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The smallest arena that a shard works with: 4 MiB.
pub const ARENA_BYTES_MIN: u64 = 4 << 20;
/// Least memory for checksums of a shard: those of a GiB.
const CHECKSUM_BYTES_MIN: u64 = 1 << 20;
/// The smallest log segment: 1 MiB, some batches of 32 blocks.
pub const LOG_SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// The largest log segment: 256 MiB, since a start reads a segment at once.
pub const LOG_SEGMENT_BYTES_MAX: u64 = 256 << 20;

/// Everything that `target.toml` says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// The target's number in its cluster, above 0.
    pub id: u32,
    /// Where its data lies; relative to the working directory.
    pub dir: PathBuf,
    /// The MDS processes as HOST:PORT; whichever answers is used.
    pub mds: Vec<String>,
    /// What others are told to connect to instead of the listening address's IP: an IP address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<std::net::IpAddr>,
    /// Cores to use, each with a part of the data of its own. Fixed once formatted.
    #[serde(default = "one")]
    pub shards: u16,
    /// The processor each shard's thread is pinned to, in the order of shards. Absent: none is,
    /// which is right where targets share a machine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<usize>,
    /// What its chunk slots may take up in all.
    pub capacity_bytes: u64,
    /// Memory for IO, of each shard.
    #[serde(default = "default_arena")]
    pub arena_bytes: u64,
    /// Memory for checksums, of each shard: 17 KiB for each chunk of 16 MiB. A read of a chunk whose checksums are not in
    /// memory reads 52 KiB more.
    #[serde(default = "default_checksums")]
    pub checksum_bytes: u64,
    /// Where the shards' data lies.
    #[serde(default, skip_serializing_if = "Store::is_disk")]
    pub store: Store,
    /// Says once more, with `store = "memory"`, that all data is lost when the target ends.
    #[serde(default, skip_serializing_if = "is_no")]
    pub lose_all_at_exit: bool,
    /// What runs the shards' threads.
    #[serde(default)]
    pub host: Host,
    /// How long an idle shard polls before it sleeps, at most, in microseconds.
    #[serde(default = "default_spin")]
    pub spin_us_max: u32,
    /// How fast replicas are filled on a shard, in bytes a second; 0: as fast as they can be, at the cost of
    /// hosts' latency.
    #[serde(default = "default_catch_up")]
    pub catch_up_bytes_s: u64,
    /// Where it listens.
    pub listen: Listen,
    /// The write-ahead log of each shard.
    #[serde(default)]
    pub log: Log,
    /// Consensus timing; must be alike on all targets of a cluster.
    #[serde(default)]
    pub raft: Raft,
    /// What it offers to hosts.
    #[serde(default)]
    pub export: Export,
    /// Where it stands, for the MDS to keep replicas apart.
    #[serde(default, skip_serializing_if = "Topology::is_unsaid")]
    pub topology: Topology,
}

/// Where a target stands. No two replicas share a zone, or where zones are too few a host, or at
/// least a target.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Topology {
    /// Its zone, such as a rack; empty: the one of all that say nothing.
    pub zone: String,
    /// Its machine; empty: one of its own.
    pub host: String,
    /// What else there is to say of it.
    pub labels: BTreeMap<String, String>,
}

impl Topology {
    fn is_unsaid(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a target listens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// For other shards: IP:PORT, one a shard, in the order of shards.
    pub peer: Vec<SocketAddr>,
    /// gRPC for operators: IP:PORT.
    pub admin: SocketAddr,
    /// Prometheus text over HTTP: IP:PORT.
    pub metrics: SocketAddr,
    /// NBD over TCP: IP:PORT. Absent: not offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<SocketAddr>,
    /// NBD over a Unix socket: a path. Absent: not offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_unix: Option<PathBuf>,
    /// NVMe over TCP: IP:PORT. Absent: not offered. With several shards the first one serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvme: Option<SocketAddr>,
    /// NVMe discovery at a port of its own, by custom 8009; `nvme` serves it too. Absent: only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvme_discovery: Option<SocketAddr>,
}

/// The write-ahead log of each shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Size of a segment file, a multiple of 4096.
    pub segment_bytes: u64,
    /// How many.
    pub segments: u32,
}

/// Consensus timing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raft {
    /// The shortest silence of a leader after which another is elected; the longest is twice it.
    pub election_timeout_ms: u32,
    /// How often a leader is heard.
    pub heartbeat_ms: u32,
}

/// What a target offers to hosts.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// How long an IO may wait for a quorum before the host gets an error. Absent: for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_timeout_s: Option<u32>,
    /// The IP address that NVMe discovery tells hosts to connect to. Absent: `advertise`, else the
    /// one listened on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_advertise: Option<std::net::IpAddr>,
}

/// What runs the shards' threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// glommio's executor.
    #[default]
    Glommio,
    /// A plain thread.
    Bare,
}

/// Where a target's data lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// In files below `dir`.
    #[default]
    Disk,
    /// In memory, to see what a target costs without a disk. For benchmarks: a replica that forgets
    /// what it acknowledged and whom it voted for is worse than none, so such a target runs once.
    Memory,
}

impl Store {
    fn is_disk(&self) -> bool {
        *self == Self::Disk
    }
}

fn is_no(flag: &bool) -> bool {
    !flag
}
fn one() -> u16 {
    1
}
fn default_arena() -> u64 {
    64 << 20
}
/// Memory for a shard's checksums unless the file says otherwise: those of 240 GiB.
pub const CHECKSUM_BYTES: u64 = 256 << 20;
fn default_checksums() -> u64 {
    CHECKSUM_BYTES
}
fn default_spin() -> u32 {
    50
}
/// How fast a shard's replicas are filled unless the file says otherwise, in bytes a second. Hosts hardly notice
/// (docs/performance.md); a TiB takes one shard fifteen hours, twenty of them three quarters of an hour.
pub const CATCH_UP_BYTES_S: u64 = 20 << 20;

fn default_catch_up() -> u64 {
    CATCH_UP_BYTES_S
}

impl Default for Log {
    /// 8 segments of 64 MiB.
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, segments: 8 }
    }
}

impl Default for Raft {
    /// 500 ms to 1,000 ms, heard every 100 ms.
    fn default() -> Self {
        Self { election_timeout_ms: 500, heartbeat_ms: 100 }
    }
}

impl TargetConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// A [`Problem`] that names the file and, where there is one, the line.
    pub fn load(path: &Path) -> Result<Self, Problem> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let fix = "name the file by --config, or let `ashlar target format` write one";
            invalid(format!("{}: cannot be read", path.display()), error.to_string(), fix)
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses and checks; `name` is the file's, for messages.
    pub fn parse(text: &str, name: &str) -> Result<Self, Problem> {
        let config: Self = toml::from_str(text).map_err(|error| syntax(&error, text, name))?;
        config.validate().map_err(|mut problem| {
            let key = problem.what.split(['`']).nth(1).unwrap_or_default().to_owned();
            let line = line_of_key(text, &key).map(|line| format!(" line {line}")).unwrap_or_default();
            problem.what = format!("{name}{line}: {}", problem.what);
            problem
        })?;
        Ok(config)
    }

    /// Checks values and how they go together.
    pub fn validate(&self) -> Result<(), Problem> {
        self.validate_names()?;
        self.validate_sizes()?;
        self.validate_listen()?;
        let Raft { election_timeout_ms, heartbeat_ms } = self.raft;
        if heartbeat_ms == 0 || election_timeout_ms < heartbeat_ms.saturating_mul(3) {
            return refuse(
                "election_timeout_ms",
                election_timeout_ms,
                "a leader whose heartbeats are a little late would be deposed",
                "make it at least 3 times `heartbeat_ms`, and that at least 1",
            );
        }
        if self.store == Store::Memory && !self.lose_all_at_exit {
            return refuse(
                "store",
                "\"memory\"",
                "all data of such a target is lost when it ends; it is for benchmarks",
                "leave it out to keep data on the disk, or write `lose_all_at_exit = true` too",
            );
        }
        if self.export.io_timeout_s == Some(0) {
            return refuse("io_timeout_s", 0, "every IO would fail at once", "leave it out to wait for ever");
        }
        Ok(())
    }

    fn validate_names(&self) -> Result<(), Problem> {
        if self.id == 0 {
            return refuse("id", 0, "0 means no target", "give each target a number of its own from 1 up");
        }
        if self.dir.as_os_str().is_empty() {
            return refuse("dir", "\"\"", "it is empty", "name the directory of the target's data");
        }
        if self.mds.is_empty() {
            return refuse("mds", "[]", "a target must know its MDS", "write mds = [\"HOST:PORT\"]");
        }
        for address in &self.mds {
            let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if port.is_none_or(|(_, port)| port.parse::<u16>().map_or(true, |port| port == 0)) {
                let fix = "write it as 127.0.0.1:7400 or storage1:7400";
                return refuse("mds", format!("{address:?}"), "it is not of the form HOST:PORT", fix);
            }
        }
        Ok(())
    }

    fn validate_sizes(&self) -> Result<(), Problem> {
        let chunk = CHUNK_BYTES as u64;
        if self.capacity_bytes < chunk * u64::from(self.shards.max(1)) {
            let fix = format!("use at least {chunk} a shard");
            return refuse(
                "capacity_bytes",
                self.capacity_bytes,
                "it holds not even a chunk (16 MiB) a shard",
                &fix,
            );
        }
        if self.arena_bytes < ARENA_BYTES_MIN || !self.arena_bytes.is_multiple_of(ENTRY_BYTES_MAX as u64) {
            let fix = format!("use a multiple of {ENTRY_BYTES_MAX}, {ARENA_BYTES_MIN} or more");
            return refuse(
                "arena_bytes",
                self.arena_bytes,
                "it is too small or not in units of 128 KiB",
                &fix,
            );
        }
        if self.checksum_bytes < CHECKSUM_BYTES_MIN {
            let fix =
                format!("use {CHECKSUM_BYTES_MIN} or more, a thousandth of the data that is read at random");
            return refuse("checksum_bytes", self.checksum_bytes, "reads would wait for checksums", &fix);
        }
        let Log { segment_bytes, segments } = self.log;
        if segment_bytes < LOG_SEGMENT_BYTES_MIN || !segment_bytes.is_multiple_of(4096) {
            let fix = format!("use a multiple of 4096, {LOG_SEGMENT_BYTES_MIN} or more");
            return refuse("segment_bytes", segment_bytes, "it is too small or not in units of 4096", &fix);
        }
        if segment_bytes > LOG_SEGMENT_BYTES_MAX {
            let fix = format!("use {LOG_SEGMENT_BYTES_MAX} at most, and more `segments`");
            return refuse("segment_bytes", segment_bytes, "a start holds a whole segment in memory", &fix);
        }
        if segments < LOG_SEGMENTS_MIN {
            let fix = format!("use {LOG_SEGMENTS_MIN} or more");
            return refuse("segments", segments, "a log full of what waits could not be recycled", &fix);
        }
        Ok(())
    }

    fn validate_listen(&self) -> Result<(), Problem> {
        if self.shards == 0 {
            return refuse("shards", 0, "a target needs one at least", "use 1");
        }
        if self.listen.peer.len() != usize::from(self.shards) {
            return refuse(
                "peer",
                format!("of {} addresses", self.listen.peer.len()),
                &format!("there are {} shards, and each listens by itself", self.shards),
                "list one IP:PORT a shard",
            );
        }
        let Listen { peer, admin, metrics, nbd, nbd_unix, nvme, nvme_discovery } = &self.listen;
        let named = peer.iter().map(|a| ("peer", *a)).chain([("admin", *admin), ("metrics", *metrics)]);
        let offered = [("nbd", nbd), ("nvme", nvme), ("nvme_discovery", nvme_discovery)];
        let offered = offered.into_iter().filter_map(|(key, address)| address.map(|a| (key, a)));
        let all: Vec<_> = named.chain(offered).collect();
        for (at, (key, address)) in all.iter().enumerate() {
            if address.port() == 0 {
                return refuse(key, address, "others must know the port", "choose a port");
            }
            if all[..at].iter().any(|(_, other)| other == address) {
                return refuse(
                    key,
                    address,
                    "something else listens there already",
                    "give each its own port",
                );
            }
        }
        if let Some(path) = nbd_unix.as_ref().filter(|p| p.as_os_str().len() > 107) {
            let cause = "the path of a Unix socket has at most 107 bytes";
            return refuse("nbd_unix", path.display(), cause, "use a shorter path");
        }
        Ok(())
    }

    /// The file's text; `parse` of it gives the same configuration.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value of a configuration has a form in TOML")
    }

    /// The id as the rest of the system has it.
    pub fn target(&self) -> TargetId {
        TargetId(self.id)
    }

    /// The NVMe address that hosts are told; `None` if there is none that could be told.
    pub fn nvme_advertised(&self) -> Option<SocketAddr> {
        let mut address = self.advertised(self.listen.nvme?);
        if let Some(ip) = self.export.nvme_advertise {
            address.set_ip(ip);
        }
        Some(address).filter(|address| !address.ip().is_unspecified())
    }

    /// A listening address as others are to use it.
    pub fn advertised(&self, mut address: SocketAddr) -> SocketAddr {
        if let Some(ip) = self.advertise {
            address.set_ip(ip);
        }
        address
    }
}

fn invalid(what: impl Into<String>, cause: impl Into<String>, fix: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Invalid, what, cause, fix)
}

fn refuse(key: &str, value: impl std::fmt::Display, cause: &str, fix: &str) -> Result<(), Problem> {
    Err(invalid(format!("`{key}` {value} refused"), cause, fix))
}

/// What TOML or serde objected to, with its line and, for a misspelt key, the key meant.
fn syntax(error: &toml::de::Error, text: &str, name: &str) -> Problem {
    let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    let place = line.map_or_else(|| name.to_owned(), |line| format!("{name} line {line}"));
    let message = error.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field") {
        let key = quoted.next().unwrap_or_default().to_owned();
        let known: Vec<&str> = quoted.collect();
        let fix = match closest(&key, &known) {
            Some(meant) => format!("did you mean `{meant}`? Known here: {}", known.join(", ")),
            None => format!("remove it; known here: {}", known.join(", ")),
        };
        return invalid(
            format!("{place}: unknown key `{key}`"),
            "it is misspelt or stands in another table",
            fix,
        );
    }
    if message.starts_with("missing field") {
        let key = quoted.next().unwrap_or_default();
        let fix = format!("add `{key} = ...`, or its table; `ashlar dev` writes files to copy from");
        return invalid(format!("{place}: key `{key}` is missing"), "it has no default", fix);
    }
    invalid(format!("{place}: {message}"), "it is not TOML, or a value of the wrong type", "mend that line")
}

fn line_of_key(text: &str, key: &str) -> Option<usize> {
    let starts =
        |line: &str| line.trim_start().strip_prefix(key).is_some_and(|r| r.trim_start().starts_with('='));
    (!key.is_empty()).then(|| text.lines().position(starts)).flatten().map(|at| at + 1)
}

/// The known key that differs by at most two letters.
fn closest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|k| (distance(key, k), *k)).min()?;
    (near.0 <= 2 || known.iter().any(|k| near.1 == *k && (k.starts_with(key) && key.len() > 2)))
        .then_some(near.1)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"id = 1
dir = "target-1"
mds = ["127.0.0.1:7400"]
capacity_bytes = 4294967296

[listen]
peer = ["127.0.0.1:7501"]
admin = "127.0.0.1:7601"
metrics = "127.0.0.1:7701"
"#;

    fn refused(from: &str, to: &str) -> Problem {
        assert!(GOOD.contains(from));
        TargetConfig::parse(&GOOD.replace(from, to), "target.toml").expect_err("must be refused")
    }

    #[test]
    fn a_store_in_memory_must_be_said_twice() {
        let problem = refused("id = 1", "id = 1\nstore = \"memory\"").to_string();
        assert!(problem.contains("lose_all_at_exit"), "{problem}");
        let twice = GOOD.replace("id = 1", "id = 1\nstore = \"memory\"\nlose_all_at_exit = true");
        let config = TargetConfig::parse(&twice, "x").unwrap();
        assert_eq!(config.store, Store::Memory);
        assert_eq!(TargetConfig::parse(&config.to_toml(), "x").unwrap(), config);
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let mut config = TargetConfig::parse(GOOD, "x").unwrap();
        assert_eq!((config.arena_bytes, config.shards, config.host), (64 << 20, 1, Host::Glommio));
        config.listen.nbd_unix = Some("/tmp/nbd.sock".into());
        config.advertise = Some([10, 0, 0, 1].into());
        config.export.io_timeout_s = Some(30);
        assert_eq!(TargetConfig::parse(&config.to_toml(), "x").unwrap(), config);
        assert_eq!(config.advertised(config.listen.admin).to_string(), "10.0.0.1:7601");
    }

    #[test]
    fn a_misspelt_key_is_named_with_its_line_and_the_key_meant() {
        let problem = refused("capacity_bytes", "capacity_byte");
        assert_eq!(problem.what, "target.toml line 4: unknown key `capacity_byte`");
        assert!(problem.fix.starts_with("did you mean `capacity_bytes`?"), "{problem:?}");
        let problem = refused("admin =", "admn =");
        assert!(problem.what.contains("line 8") && problem.fix.contains("`admin`"), "{problem:?}");
        let problem = refused("id = 1\n", "id = 1\nquux = 7\n");
        assert!(problem.fix.starts_with("remove it"), "{problem:?}");
    }

    #[test]
    fn a_value_that_cannot_work_is_refused_with_its_line() {
        for (from, to, line) in [
            ("id = 1", "id = 0", "line 1: `id`"),
            ("127.0.0.1:7400", "nohost", "line 3: `mds`"),
            ("4294967296", "4096", "line 4: `capacity_bytes`"),
            ("peer = [\"127.0.0.1:7501\"]", "peer = []", "line 7: `peer`"),
            ("7701", "7601", "line 9: `metrics`"),
            ("7701", "0", "line 9: `metrics`"),
            ("\n[listen]", "arena_bytes = 1000\n[listen]", "line 5: `arena_bytes`"),
            ("\n[listen]", "checksum_bytes = 1000\n[listen]", "line 5: `checksum_bytes`"),
            ("\n[listen]", "[raft]\nelection_timeout_ms = 200\n[listen]", "line 6: `election_timeout_ms`"),
            ("\n[listen]", "[log]\nsegments = 1\n[listen]", "line 6: `segments`"),
            ("\n[listen]", "[log]\nsegment_bytes = 268439552\n[listen]", "line 6: `segment_bytes`"),
            ("\n[listen]", "[export]\nio_timeout_s = 0\n[listen]", "line 6: `io_timeout_s`"),
        ] {
            let problem = refused(from, to);
            assert!(problem.what.contains(line), "{to}: {problem:?}");
            assert!(!problem.cause.is_empty() && !problem.fix.is_empty());
        }
    }

    #[test]
    fn what_is_not_toml_or_of_a_wrong_type_or_missing_is_told_apart() {
        assert!(refused("id = 1", "id = ").what.contains("line 1"));
        assert!(refused("id = 1", "id = \"one\"").what.contains("line 1"));
        assert!(refused("dir = \"target-1\"\n", "").what.contains("key `dir` is missing"));
        assert!(refused("id = 1", "id = 1\nhost = \"smol\"").what.contains("line 2"));
    }

    #[test]
    fn a_missing_file_says_what_to_do() {
        let problem = TargetConfig::load(Path::new("/nonexistent/target.toml")).unwrap_err();
        assert!(problem.what.contains("/nonexistent/target.toml") && problem.fix.contains("--config"));
    }
}
