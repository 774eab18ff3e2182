//! Asks one target for one block of a volume over NBD, as a client would: the proof that
//! an export serves, leader and all. The few bytes of the protocol that this needs are
//! written out here, so that a fault in our own NBD code cannot vouch for itself.

use protocol::nvme_tcp::Sqe;
use protocol::nvme_tcp::host::{Host, HostEvent, connect_data};
use protocol::nvme_tcp::pdu::Digests;
use std::io::{self, Error, Result};
use std::net::Ipv4Addr;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_ERROR: u32 = 1 << 31;
const REPLY_BYTES_MAX: u32 = 4096;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const COMMAND_READ: u16 = 0;
const COMMAND_DISCONNECT: u16 = 2;
/// One block.
const READ_BYTES: u32 = 4096;

/// Reads the first block of `volume`; fails with what the export answered instead.
pub async fn read_first_block(socket: &Path, volume: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    greet(&mut stream).await?;
    go(&mut stream, volume).await?;
    stream.write_all(&request(COMMAND_READ, READ_BYTES)).await?;
    let magic = stream.read_u32().await?;
    let errno = stream.read_u32().await?;
    let _cookie = stream.read_u64().await?;
    if magic != SIMPLE_REPLY_MAGIC || errno != 0 {
        return Err(Error::other(format!("reading answered with error {errno} (magic {magic:#x})")));
    }
    stream.read_exact(&mut [0; READ_BYTES as usize]).await?;
    stream.write_all(&request(COMMAND_DISCONNECT, 0)).await
}

async fn greet(stream: &mut UnixStream) -> Result<()> {
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting).await?;
    if &greeting != GREETING {
        return Err(Error::other("not an NBD server"));
    }
    let _server_flags = stream.read_u16().await?;
    // Fixed newstyle, no zeroes.
    stream.write_u32(3).await
}

async fn go(stream: &mut UnixStream, volume: &str) -> Result<()> {
    let name = volume.as_bytes();
    let mut option = OPTION_MAGIC.to_vec();
    option.extend(OPTION_GO.to_be_bytes());
    option.extend((name.len() as u32 + 6).to_be_bytes());
    option.extend((name.len() as u32).to_be_bytes());
    option.extend(name);
    // No information asked for.
    option.extend([0, 0]);
    stream.write_all(&option).await?;
    loop {
        let magic = stream.read_u64().await?;
        let _option = stream.read_u32().await?;
        let kind = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if magic != OPTION_REPLY_MAGIC || length > REPLY_BYTES_MAX {
            return Err(Error::other("an answer that is not NBD"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        if kind & REPLY_ERROR != 0 {
            return Err(Error::other(format!("refused: {}", String::from_utf8_lossy(&data))));
        }
        if kind == REPLY_ACK {
            return Ok(());
        }
    }
}

fn request(command: u16, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend([0; 16]);
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Connects an admin queue to a subsystem at a port of this machine, as a host would.
pub async fn connect_nvme(port: u16, nqn: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let (mut host, mut out) = (Host::default(), Vec::new());
    host.ic_req(Digests::default(), 0, 0, &mut out);
    stream.write_all(&out).await?;
    let mut input = Vec::new();
    loop {
        let taken = host.feed(&input).map_err(io::Error::other)?;
        let Some((used, event)) = taken else {
            if stream.read_buf(&mut input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            continue;
        };
        input.drain(..used);
        match event {
            HostEvent::Ready(_) => {
                let data = connect_data([1; 16], u16::MAX, nqn, "nqn.2026-01.io.ashlar:probe");
                let mut out = Vec::new();
                host.command(&Sqe::connect(0, 0, 32, 0), &data, &mut out);
                stream.write_all(&out).await?;
            }
            HostEvent::Response(cqe) if cqe.status.is_ok() => return Ok(()),
            other => return Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// Probes a server that says `script` and nothing else.
    fn probed(script: Vec<u8>) -> Result<()> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("s");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = UnixListener::bind(&socket)?;
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await?;
                stream.write_all(&script).await?;
                stream.shutdown().await?;
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.map(|_| heard)
            });
            let outcome = read_first_block(&socket, "vol0").await;
            if outcome.is_ok() {
                let heard = server.await.map_err(Error::other)??;
                assert_eq!(&heard[4..12], OPTION_MAGIC);
                assert_eq!(heard.len(), 4 + 8 + 8 + 4 + 4 + 2 + 28 + 28);
            }
            outcome
        })
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(OPTION_GO.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn greeting() -> Vec<u8> {
        [&GREETING[..], &[0, 3]].concat()
    }

    #[test]
    fn an_export_that_serves_a_block_is_ready() {
        let mut read = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        read.extend([0; 4 + 8 + 4096]);
        probed([greeting(), reply(3, &[0; 12]), reply(REPLY_ACK, &[]), read].concat()).expect("served");
    }

    #[test]
    fn an_export_that_refuses_or_fails_is_not_ready() {
        let refused = probed([greeting(), reply(REPLY_ERROR + 6, b"no such export")].concat());
        assert!(refused.expect_err("refused").to_string().contains("no such export"));
        let mut failed = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        failed.extend([0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(probed([greeting(), reply(REPLY_ACK, &[]), failed].concat()).is_err());
    }

    #[test]
    fn whatever_else_listens_there_is_not_ready() {
        assert!(probed(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()).is_err());
        assert!(probed(vec![]).is_err());
        let huge = [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &[0xff; 12]].concat();
        assert!(probed([greeting(), huge].concat()).is_err());
    }
}
