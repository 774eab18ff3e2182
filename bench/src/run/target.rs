//! What is measured: a file, an export or a volume, by its address on the command line.

use crate::dev::DevFile;
use anyhow::{Context, bail, ensure};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// All forms, for messages and help.
pub const FORMS: &str = "file:PATH, nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, nvme://HOST[:PORT]/NQN, \
     ashlar://VOLUME, or dev:nvme, dev:nbd, dev:nbd+unix, dev:ashlar with --dev DIR";
/// The volume that a dev cluster always has.
const DEV_VOLUME: &str = "vol0";

/// A target of `bench run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file or device by io_uring and O_DIRECT: the limit of what lies beneath everything else.
    File(PathBuf),
    /// An NBD export over TCP.
    NbdTcp {
        /// Where the server listens.
        addr: SocketAddr,
        /// The export's name.
        export: String,
    },
    /// An NBD export over a Unix socket.
    NbdUnix {
        /// The server's socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
    /// A namespace over NVMe/TCP.
    Nvme {
        /// Where the subsystem's port listens.
        addr: SocketAddr,
        /// The subsystem's name.
        nqn: String,
    },
    /// A Ceph image, by fio's engine: only `bench peers` has one.
    Rbd(Rbd),
    /// A volume by the native client.
    Volume {
        /// Host and port of the MDS; named beside the target.
        mds: Option<String>,
        /// The volume's name.
        name: String,
    },
}

/// An image of a Ceph cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rbd {
    /// The cluster's configuration.
    pub conf: PathBuf,
    /// Its pool.
    pub pool: String,
    /// Its name.
    pub image: String,
}

impl Target {
    /// The kind, as results name it. Paths and addresses are left out of results, which are published.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::NbdTcp { .. } => "nbd",
            Self::NbdUnix { .. } => "nbd+unix",
            Self::Nvme { .. } => "nvme",
            Self::Volume { .. } => "ashlar",
            Self::Rbd(_) => "rbd",
        }
    }

    /// From the command line, where `dev` is the cluster of `--dev` and `mds` the address of `--mds`.
    ///
    /// # Errors
    /// It has none of the forms, or names what the dev cluster has not.
    pub fn parse(text: &str, dev: Option<&DevFile>, mds: Option<&str>) -> anyhow::Result<Self> {
        if let Some(protocol) = text.strip_prefix("dev:") {
            let dev =
                dev.with_context(|| format!("`{text}` needs --dev DIR, the folder of a dev cluster"))?;
            return Self::of_dev(protocol, dev);
        }
        let mut target: Self = text.parse()?;
        if let Self::Volume { mds: of_target, .. } = &mut target {
            *of_target = mds.map(str::to_owned).or_else(|| Some(dev?.mds.endpoint.clone()));
        }
        Ok(target)
    }

    /// The first volume's export by that protocol, of the first target that has it.
    pub fn of_dev(protocol: &str, dev: &DevFile) -> anyhow::Result<Self> {
        let volume = dev.volume(DEV_VOLUME)?;
        let first = |uris: &[String]| {
            let uri = uris.first().with_context(|| format!("{DEV_VOLUME} is not exported by {protocol}"))?;
            uri.parse()
        };
        match protocol {
            "nbd" => first(&volume.nbd),
            "nbd+unix" => first(&volume.nbd_unix),
            "nvme" => {
                let path = volume.nvme.first();
                let path = path.with_context(|| format!("{DEV_VOLUME} is not exported over NVMe"))?;
                format!("nvme://{}:{}/{}", path.traddr, path.trsvcid, path.nqn).parse()
            }
            "ashlar" => Ok(Self::Volume { mds: Some(dev.mds.endpoint.clone()), name: DEV_VOLUME.to_owned() }),
            other => bail!("`dev:{other}`: a dev cluster has nvme, nbd, nbd+unix and ashlar"),
        }
    }

    /// The target as fio's engine nbd takes it.
    pub fn nbd_uri(&self) -> Option<String> {
        match self {
            Self::NbdTcp { addr, export } => Some(format!("nbd://{addr}/{export}")),
            Self::NbdUnix { socket, export } => {
                Some(format!("nbd+unix:///{export}?socket={}", socket.display()))
            }
            _ => None,
        }
    }
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some((scheme, rest)) = text.split_once(':') else { bail!("`{text}` is no target: {FORMS}") };
        let after_slashes = rest.strip_prefix("//");
        Ok(match (scheme, after_slashes) {
            ("file", _) => Self::File(rest.into()),
            ("nbd+unix", Some(rest)) => {
                let socket = rest.split_once('?').and_then(|(export, query)| {
                    Some((export, query.split('&').find_map(|part| part.strip_prefix("socket="))?))
                });
                let (export, socket) =
                    socket.context("an address nbd+unix:///EXPORT?socket=PATH has ?socket=")?;
                let export = export.strip_prefix('/').unwrap_or(export).to_owned();
                Self::NbdUnix { socket: socket.into(), export }
            }
            ("nbd", Some(rest)) => {
                let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
                Self::NbdTcp { addr: resolve(host, 10809)?, export: export.to_owned() }
            }
            ("nvme", Some(rest)) => {
                let (host, nqn) = rest.split_once('/').unwrap_or((rest, ""));
                let short = (1..=protocol::nvme_tcp::wire::NQN_BYTES_MAX).contains(&nqn.len());
                ensure!(short, "`{text}` names no subsystem: nvme://HOST[:PORT]/NQN");
                Self::Nvme { addr: resolve(host, 4420)?, nqn: nqn.to_owned() }
            }
            ("ashlar", Some(name)) => {
                ensure!(!name.is_empty() && !name.contains('/'), "`{text}` names no volume: ashlar://VOLUME");
                Self::Volume { mds: None, name: name.to_owned() }
            }
            _ => bail!("`{text}` is no target: {FORMS}"),
        })
    }
}

fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let bare_v6 = host.starts_with('[') && host.ends_with(']');
    let with_port = if host.contains(':') && !bare_v6 { host.to_owned() } else { format!("{host}:{port}") };
    let mut found = with_port.to_socket_addrs().with_context(|| format!("{host} is not known"))?;
    found.next().with_context(|| format!("{host} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_other_clients_take_them() -> anyhow::Result<()> {
        let unix = Target::NbdUnix { socket: "/d/nbd.sock".into(), export: "vol0".into() };
        assert_eq!("nbd+unix:///vol0?socket=/d/nbd.sock".parse::<Target>()?, unix);
        let tcp = |port, export: &str| Target::NbdTcp {
            addr: ([127, 0, 0, 1], port).into(),
            export: export.into(),
        };
        assert_eq!("nbd://127.0.0.1/v".parse::<Target>()?, tcp(10809, "v"));
        assert_eq!("nbd://127.0.0.1:3".parse::<Target>()?, tcp(3, ""));
        assert_eq!("nbd://[::1]/v".parse::<Target>()?.nbd_uri().as_deref(), Some("nbd://[::1]:10809/v"));
        assert_eq!("file:/a b".parse::<Target>()?, Target::File("/a b".into()));
        let nqn = "nqn.2026-01.io.ashlar:0011:vol0".to_owned();
        let nvme = |port| Target::Nvme { addr: ([127, 0, 0, 1], port).into(), nqn: nqn.clone() };
        assert_eq!(format!("nvme://127.0.0.1/{nqn}").parse::<Target>()?, nvme(4420));
        assert_eq!(format!("nvme://127.0.0.1:99/{nqn}").parse::<Target>()?, nvme(99));
        for wrong in [
            "/a",
            "nbd+unix:///v",
            "nbd+unix:///v?path=/x",
            "http://x/",
            "",
            "nvme://127.0.0.1",
            "ashlar://",
            "ashlar:v",
        ] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn a_volume_gets_its_mds_from_beside_and_a_dev_cluster_names_its_exports() -> anyhow::Result<()> {
        let dev: DevFile = serde_json::from_str(
            r#"{"mds": {"endpoint": "127.0.0.1:7000", "pid": 1}, "targets": [], "volumes": [{"name": "vol0",
               "bytes": 1, "block_bytes": 512, "nbd": [], "nbd_unix": ["nbd+unix:///vol0?socket=/s"],
               "nvme": [{"traddr": "127.0.0.1", "trsvcid": "5", "nqn": "n:v"}]}]}"#,
        )?;
        let mds = |target| match target {
            Target::Volume { mds, .. } => mds,
            other => panic!("{other:?}"),
        };
        assert_eq!(mds(Target::parse("ashlar://v", Some(&dev), None)?).as_deref(), Some("127.0.0.1:7000"));
        assert_eq!(mds(Target::parse("ashlar://v", Some(&dev), Some("h:1"))?).as_deref(), Some("h:1"));
        assert_eq!(mds(Target::parse("ashlar://v", None, None)?), None);
        assert_eq!(Target::parse("dev:nvme", Some(&dev), None)?.kind(), "nvme");
        assert_eq!(Target::parse("dev:nbd+unix", Some(&dev), None)?.kind(), "nbd+unix");
        for (wrong, dev) in [("dev:nvme", None), ("dev:iscsi", Some(&dev)), ("dev:nbd", Some(&dev))] {
            assert!(Target::parse(wrong, dev, None).is_err(), "{wrong}");
        }
        Ok(())
    }
}
