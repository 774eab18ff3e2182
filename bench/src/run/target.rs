//! What is measured: a file, an NBD export, by its address on the command line.

use anyhow::{Context, bail};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

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
}

impl Target {
    /// The kind, as results name it. Paths and addresses are left out of results, which are published.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::NbdTcp { .. } => "nbd",
            Self::NbdUnix { .. } => "nbd+unix",
        }
    }
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if let Some(path) = text.strip_prefix("file:") {
            return Ok(Self::File(path.into()));
        }
        if let Some(rest) = text.strip_prefix("nbd+unix://") {
            let (export, query) =
                rest.split_once('?').context("an address nbd+unix:///EXPORT?socket=PATH has ?socket=")?;
            let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
            let socket = socket.context("an address nbd+unix:///EXPORT?socket=PATH has ?socket=")?;
            let export = export.strip_prefix('/').unwrap_or(export).to_owned();
            return Ok(Self::NbdUnix { socket: socket.into(), export });
        }
        if let Some(rest) = text.strip_prefix("nbd://") {
            let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
            let with_port = if host.contains(':') { host.to_owned() } else { format!("{host}:10809") };
            let mut found = with_port.to_socket_addrs().with_context(|| format!("{host} is not known"))?;
            let addr = found.next().with_context(|| format!("{host} has no address"))?;
            return Ok(Self::NbdTcp { addr, export: export.to_owned() });
        }
        bail!("`{text}` is no target: file:PATH, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_other_nbd_clients_take_them() -> anyhow::Result<()> {
        let unix = Target::NbdUnix { socket: "/d/nbd.sock".into(), export: "vol0".into() };
        assert_eq!("nbd+unix:///vol0?socket=/d/nbd.sock".parse::<Target>()?, unix);
        let tcp = |port, export: &str| Target::NbdTcp {
            addr: ([127, 0, 0, 1], port).into(),
            export: export.into(),
        };
        assert_eq!("nbd://127.0.0.1/v".parse::<Target>()?, tcp(10809, "v"));
        assert_eq!("nbd://127.0.0.1:3".parse::<Target>()?, tcp(3, ""));
        assert_eq!("file:/a b".parse::<Target>()?, Target::File("/a b".into()));
        for wrong in ["/a", "nbd+unix:///v", "nbd+unix:///v?path=/x", "http://x/", ""] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
        Ok(())
    }
}
