//! An NBD client for tests that look at single requests and at their errors.

use anyhow::{Context, bail, ensure};
use protocol::nbd::client::{self, Reply};
use protocol::nbd::wire::{FIXED_NEWSTYLE, GREETING_BYTES, NO_ZEROES, cmd, opt, rep};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long an answer may take; far more than it does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to one export, with simple replies.
#[derive(Debug)]
pub struct Nbd {
    stream: TcpStream,
    inbox: Vec<u8>,
    next: u64,
    /// Lengths of reads that are under way.
    reads: BTreeMap<u64, usize>,
    answers: BTreeMap<u64, (u32, Vec<u8>)>,
}

impl Nbd {
    /// Attaches to an export.
    ///
    /// # Errors
    /// It cannot be reached, or it refuses, with the text of why.
    pub fn connect(address: &str, export: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let (inbox, reads, answers) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let mut nbd = Self { stream, inbox, next: 1, reads, answers };
        while nbd.inbox.len() < GREETING_BYTES {
            nbd.receive()?;
        }
        nbd.inbox.drain(..GREETING_BYTES);
        let mut out = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        client::info_option(opt::GO, export, &[], &mut out);
        nbd.stream.write_all(&out)?;
        loop {
            let Some((used, reply)) = client::option_reply(&nbd.inbox)? else {
                nbd.receive()?;
                continue;
            };
            nbd.inbox.drain(..used);
            match reply.kind {
                rep::ACK => return Ok(nbd),
                kind if kind & (1 << 31) != 0 => {
                    bail!("{export} refused: {}", String::from_utf8_lossy(&reply.data))
                }
                _ => {}
            }
        }
    }

    fn receive(&mut self) -> anyhow::Result<()> {
        let mut bytes = [0; 65536];
        let count = self.stream.read(&mut bytes)?;
        ensure!(count > 0, "the connection was closed");
        self.inbox.extend_from_slice(&bytes[..count]);
        Ok(())
    }

    fn request(&mut self, kind: u16, offset: u64, length: u32, payload: &[u8]) -> anyhow::Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let mut out = Vec::with_capacity(32 + payload.len());
        client::request(kind, 0, cookie, offset, length, &mut out);
        out.extend_from_slice(payload);
        self.stream.write_all(&out)?;
        Ok(cookie)
    }

    /// Sends a write without waiting for its answer.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn begin_write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<u64> {
        self.request(cmd::WRITE, offset, data.len() as u32, data)
    }

    /// Waits for an answer: its error number, and what was read.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn answer(&mut self, cookie: u64) -> anyhow::Result<(u32, Vec<u8>)> {
        loop {
            if let Some(answer) = self.answers.remove(&cookie) {
                return Ok(answer);
            }
            if !self.take()? {
                self.receive()?;
            }
        }
    }

    /// Answers that have come within a while.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn answered(&mut self, within: Duration) -> anyhow::Result<usize> {
        self.stream.set_read_timeout(Some(within))?;
        let _ = self.receive();
        self.stream.set_read_timeout(Some(PATIENCE))?;
        while self.take()? {}
        Ok(self.answers.len())
    }

    fn take(&mut self) -> anyhow::Result<bool> {
        let Some((used, reply)) = client::reply(&self.inbox)? else { return Ok(false) };
        let Reply::Simple { cookie, error } = reply else { bail!("structured replies were not asked for") };
        let length = if error == 0 { self.reads.get(&cookie).copied().unwrap_or(0) } else { 0 };
        let Some(data) = self.inbox.get(used..used + length) else { return Ok(false) };
        let data = data.to_vec();
        self.inbox.drain(..used + length);
        self.answers.insert(cookie, (error, data));
        Ok(true)
    }

    /// Writes; the error number of the answer.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<u32> {
        let cookie = self.begin_write(offset, data)?;
        Ok(self.answer(cookie)?.0)
    }

    /// Reads; the error number of the answer where it failed.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn read(&mut self, offset: u64, length: u32) -> anyhow::Result<Result<Vec<u8>, u32>> {
        let cookie = self.request(cmd::READ, offset, length, &[])?;
        self.reads.insert(cookie, length as usize);
        let (error, data) = self.answer(cookie)?;
        Ok(if error == 0 { Ok(data) } else { Err(error) })
    }
}
