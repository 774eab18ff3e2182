//! An NBD export: simple replies, the requests of a turn in one send.

use super::{Connection, Done, Driver, Slots};
use crate::run::load::Io;
use anyhow::{Context, bail, ensure};
use protocol::nbd::client::{OptionReply, info_option, option_reply, request};
use protocol::nbd::wire;
use protocol::types::Time;
use reactor::ring::Ring;
use reactor::{Addr, BufMut, Completion, IoBuf, Reactor};
use transport::Fill;

/// A client of one export, over one connection.
pub struct NbdDriver {
    conn: Connection,
    bytes: u64,
    slots: Slots,
    /// A read whose data comes now.
    filling: Option<u32>,
    completions: Vec<Completion>,
}

impl NbdDriver {
    /// Connects and asks for the export.
    ///
    /// # Errors
    /// Nobody listens, there is no such export, or it may not be written.
    pub fn open(ring: &mut Ring, addr: Addr, export: &str, read_only: bool) -> anyhow::Result<Self> {
        let shown = addr.to_string();
        let mut conn = Connection::open(ring, addr, 0)?;
        let bytes = negotiate(ring, &mut conn, export, read_only)
            .with_context(|| format!("{shown} does not serve `{export}`"))?;
        Ok(Self { conn, bytes, slots: Slots::default(), filling: None, completions: Vec::new() })
    }

    /// Takes as many replies apart as have come.
    fn replies(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        loop {
            if let Some(slot) = self.filling {
                let Some(buf) = self.conn.stream.poll_fill() else { return Ok(()) };
                self.slots.of(slot)?.buf = Some(buf);
                self.filling = None;
                self.slots.answer(slot, Ok(()), done)?;
            }
            let staged = self.conn.stream.staged();
            let Some(head) = staged.first_chunk::<{ wire::SIMPLE_REPLY_BYTES }>() else { return Ok(()) };
            ensure!(head[..4] == wire::SIMPLE_REPLY_MAGIC.to_be_bytes(), "the server sent no reply");
            let error = u32::from_be_bytes(head[4..8].try_into()?);
            let slot = u32::try_from(u64::from_be_bytes(head[8..16].try_into()?))?;
            self.conn.stream.consume(wire::SIMPLE_REPLY_BYTES);
            let Io { write, bytes, .. } = self.slots.of(slot)?.io;
            match (error, write) {
                (0, true) => self.slots.answer(slot, Ok(()), done)?,
                (0, false) => {
                    let buf = self.slots.memory(slot, 0, bytes as u32)?;
                    self.conn.stream.expect(Fill { buf, at: 0, end: bytes as usize });
                    self.filling = Some(slot);
                }
                (error, _) => self.slots.answer(slot, Err(format!("NBD error {error}")), done)?,
            }
        }
    }
}

/// Agrees on an export; its bytes.
fn negotiate(ring: &mut Ring, conn: &mut Connection, export: &str, read_only: bool) -> anyhow::Result<u64> {
    conn.until(ring, |came| {
        let Some(greeting) = came.first_chunk::<{ wire::GREETING_BYTES }>() else { return Ok(None) };
        ensure!(greeting[..8] == wire::MAGIC.to_be_bytes(), "it is no NBD server");
        ensure!(greeting[8..16] == wire::OPTION_MAGIC.to_be_bytes(), "it speaks the old NBD handshake only");
        Ok(Some((wire::GREETING_BYTES, ())))
    })?;
    let hello = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes();
    conn.stream.text().extend(hello);
    info_option(wire::opt::GO, export, &[], conn.stream.text());
    let mut bytes = 0;
    loop {
        let OptionReply { kind, data, .. } = conn.until(ring, |came| Ok(option_reply(came)?))?;
        match kind {
            wire::rep::ACK => break,
            wire::rep::INFO if data.len() >= 12 && data[..2] == wire::info::EXPORT.to_be_bytes() => {
                bytes = u64::from_be_bytes(data[2..10].try_into()?);
                let flags = u16::from_be_bytes(data[10..12].try_into()?);
                ensure!(read_only || flags & 1 << 1 == 0, "the export is read-only");
            }
            wire::rep::INFO => {}
            kind if kind >> 31 == 1 => bail!("refused: {}", String::from_utf8_lossy(&data)),
            kind => bail!("an unknown answer, {kind}"),
        }
    }
    ensure!(bytes > 0, "the server does not tell the export's size");
    Ok(bytes)
}

impl Driver for NbdDriver {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn submit(&mut self, _: &mut Ring, slot: u32, io: Io, buf: BufMut) {
        let kind = if io.write { wire::cmd::WRITE } else { wire::cmd::READ };
        request(kind, 0, slot.into(), io.offset, io.bytes as u32, self.conn.stream.text());
        if let Some(data) = self.slots.begin(slot, io, buf) {
            self.conn.stream.push(IoBuf::part(data, 0..io.bytes as usize));
        }
    }

    fn turn(&mut self, ring: &mut Ring, deadline: Option<Time>, done: &mut Vec<Done>) -> anyhow::Result<()> {
        self.conn.pump(ring)?;
        ring.turn(deadline, &mut self.completions);
        for completion in std::mem::take(&mut self.completions) {
            self.conn.take(completion)?;
        }
        self.replies(done)?;
        self.slots.settle(done);
        Ok(())
    }
}
