//! A proxy in front of targets' ports that can hold back single packets: requests that one shard sends to
//! others. What is held back is delivered later, on the connection on which it came; all else passes meanwhile.

use anyhow::{Context, ensure};
use protocol::frame::{HEADER_BYTES, Header, MetaBuf, decode_header, decode_meta};
use protocol::peer::{IoOp, PeerMessage};
use protocol::types::TargetId;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The way on to where a connection leads.
type Onward = Arc<Mutex<TcpStream>>;

/// What all connections share.
#[derive(Debug, Default)]
pub struct Delay {
    /// Whose writes are held back; 0: nobody's.
    whose: AtomicU32,
    held: Mutex<Vec<(Vec<u8>, Onward)>>,
}

impl Delay {
    /// Listens at each of the first addresses for the second.
    ///
    /// # Errors
    /// An address is taken.
    pub fn start(ways: &[(String, String)]) -> anyhow::Result<Arc<Self>> {
        let delay = Arc::new(Self::default());
        for (at, to) in ways {
            let listener = TcpListener::bind(at).with_context(|| format!("listening on {at}"))?;
            let (delay, to) = (delay.clone(), to.clone());
            std::thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    // Nobody is there yet: who connects tries again.
                    if let Ok(server) = TcpStream::connect(&to) {
                        delay.clone().join(client, server);
                    }
                }
            });
        }
        Ok(delay)
    }

    fn join(self: Arc<Self>, client: TcpStream, server: TcpStream) {
        let (Ok(mut back_from), Ok(mut back_to)) = (server.try_clone(), client.try_clone()) else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(Shutdown::Both);
        });
        std::thread::spawn(move || {
            let onward = Arc::new(Mutex::new(server));
            let _ = self.pass(client, &onward);
            let _ = lock(&onward).shutdown(Shutdown::Both);
        });
    }

    /// Passes on what comes, frame by frame where it is frames.
    fn pass(&self, mut client: TcpStream, onward: &Onward) -> anyhow::Result<()> {
        let mut from = TargetId(0);
        loop {
            let mut head = [0; HEADER_BYTES];
            let count = client.read(&mut head)?;
            ensure!(count > 0, "closed");
            if head[..count.min(4)] != b"ASHP"[..count.min(4)] {
                let mut server = lock(onward).try_clone()?;
                server.write_all(&head[..count])?;
                std::io::copy(&mut client, &mut server)?;
                return Ok(());
            }
            client.read_exact(&mut head[count..])?;
            let header = decode_header(&head)?;
            let (meta, payload) = (header.meta_bytes as usize, header.payload_bytes as usize);
            let mut frame = head.to_vec();
            frame.resize(HEADER_BYTES + meta + payload, 0);
            client.read_exact(&mut frame[HEADER_BYTES..])?;
            let message = message(&header, &frame[HEADER_BYTES..HEADER_BYTES + meta])?;
            if let PeerMessage::Hello(hello) = &message {
                from = hello.from.target;
            }
            let is_write = matches!(&message, PeerMessage::Io(io) if matches!(io.op, IoOp::Write { .. }));
            if is_write && from.0 == self.whose.load(Ordering::SeqCst) {
                lock(&self.held).push((frame, onward.clone()));
            } else {
                lock(onward).write_all(&frame)?;
            }
        }
    }

    /// Holds back what a target writes at others from now on.
    pub fn hold_back(&self, target: u32) {
        self.whose.store(target, Ordering::SeqCst);
    }

    /// How many packets are held back.
    pub fn held(&self) -> usize {
        lock(&self.held).len()
    }

    /// Delivers what was held back.
    ///
    /// # Errors
    /// A connection is gone, and the packet with it.
    pub fn release(&self) -> anyhow::Result<()> {
        self.whose.store(0, Ordering::SeqCst);
        for (frame, onward) in std::mem::take(&mut *lock(&self.held)) {
            lock(&onward).write_all(&frame).context("the connection of a packet that was held back")?;
        }
        Ok(())
    }
}

fn message(header: &Header, bytes: &[u8]) -> anyhow::Result<PeerMessage> {
    let mut meta = MetaBuf::new();
    meta.extend_from_slice(bytes);
    Ok(decode_meta(header, &meta, &mut Vec::new())?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
