//! The other side: encodes commands, takes what a controller sends apart. For tests, `bench`
//! and clients.
//!
//! Deliberately absent: any queue of commands. Whoever uses it knows what it asked for.

use super::pdu::{self, Common, Cqe, Data, Digests, Ic};
use super::wire::*;

/// Longest PDU that is accepted from a controller.
const PDU_BYTES_MAX: u32 = TRANSFER_BYTES_MAX + 4096;

/// What the controller sent makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HostError {
    /// No controller sends that.
    #[error("PDU of type {0:#x}")]
    Kind(u8),
    /// A header that does not fit its type.
    #[error("PDU of type {kind:#x} with header length {hlen}, length {plen}")]
    Length {
        /// Type.
        kind: u8,
        /// Header length.
        hlen: u8,
        /// Length.
        plen: u32,
    },
    /// A digest does not fit.
    #[error("digest does not fit")]
    Digest,
}

/// What a controller sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HostEvent {
    /// The connection is set up.
    Ready(Ic),
    /// A command is answered.
    Response(Cqe),
    /// Data of a read.
    Data {
        /// The command.
        cid: u16,
        /// From its first byte.
        offset: u32,
        /// The bytes.
        data: Vec<u8>,
        /// The last of the command.
        last: bool,
        /// And it is thereby answered.
        success: bool,
    },
    /// Data is asked for.
    R2t(Data),
    /// The controller gave up.
    Terminated {
        /// One of [`fes`].
        fes: u16,
        /// What goes with it.
        info: u32,
    },
}

/// One connection, the host's side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Host {
    /// As agreed; set by [`HostEvent::Ready`].
    pub digests: Digests,
    /// Most data of an H2CData PDU.
    pub h2c_max: u32,
}

impl Host {
    /// The first PDU: alignment in dwords less one, R2Ts of a command less one.
    pub fn ic_req(&self, digests: Digests, align: u8, r2t_max: u32, out: &mut Vec<u8>) {
        Ic { pfv: 0, pda: align, digests, limit: r2t_max }.encode(kind::IC_REQ, out);
    }
    /// A command, with data in its capsule.
    pub fn command(&self, sqe: &Sqe, inline: &[u8], out: &mut Vec<u8>) {
        pdu::command(sqe, inline.len() as u32, self.digests, 4, out);
        self.end_data(inline, out);
    }
    /// Data that was asked for, in PDUs of at most `most` bytes; `data` is all that the R2T covers.
    pub fn h2c_data(&self, r2t: Data, data: &[u8], most: u32, out: &mut Vec<u8>) {
        let most = most.min(self.h2c_max) as usize;
        let mut offset = r2t.offset;
        let mut left = data;
        while !left.is_empty() {
            let (some, rest) = left.split_at(left.len().min(most));
            let flags = if rest.is_empty() { flag::LAST } else { 0 };
            let fields = Data { offset, length: some.len() as u32, ..r2t };
            pdu::data(kind::H2C_DATA, flags, fields, self.digests, 4, out);
            self.end_data(some, out);
            offset += some.len() as u32;
            left = rest;
        }
    }
    fn end_data(&self, data: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(data);
        if self.digests.data && !data.is_empty() {
            out.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
        }
    }
    /// Takes one PDU from the front, with how many bytes it had. `None`: more must come.
    pub fn feed(&mut self, input: &[u8]) -> Result<Option<(usize, HostEvent)>, HostError> {
        let Some(common) = input.first_chunk::<COMMON_BYTES>().map(Common::parse) else { return Ok(None) };
        let Common { kind, hlen, plen, .. } = common;
        let expected = match kind {
            kind::IC_RESP => IC_BYTES,
            kind::C2H_TERM | kind::RESPONSE | kind::C2H_DATA | kind::R2T => SHORT_BYTES,
            _ => return Err(HostError::Kind(kind)),
        };
        let bad = HostError::Length { kind, hlen, plen };
        if usize::from(hlen) != expected || plen < u32::from(hlen) || plen > PDU_BYTES_MAX {
            return Err(bad);
        }
        let Some(whole) = input.get(..plen as usize) else { return Ok(None) };
        let plain = matches!(kind, kind::IC_RESP | kind::C2H_TERM);
        if self.digests.header && !plain {
            let told = whole.get(expected..expected + DIGEST_BYTES).ok_or(bad)?;
            if u32_at(told, 0) != crc32c::crc32c(&whole[..expected]) {
                return Err(HostError::Digest);
            }
        }
        let event = match kind {
            kind::IC_RESP => {
                let ic = Ic::parse(whole);
                (self.digests, self.h2c_max) = (ic.digests, ic.limit);
                HostEvent::Ready(ic)
            }
            kind::C2H_TERM => HostEvent::Terminated { fes: u16_at(whole, 8), info: u32_at(whole, 10) },
            kind::RESPONSE => HostEvent::Response(Cqe::parse(&whole[COMMON_BYTES..])),
            kind::R2T => HostEvent::R2t(Data::parse(whole)),
            _ => self.c2h_data(common, whole)?,
        };
        Ok(Some((whole.len(), event)))
    }
    fn c2h_data(&self, common: Common, whole: &[u8]) -> Result<HostEvent, HostError> {
        let fields = Data::parse(whole);
        let (from, bytes) = (usize::from(common.pdo), fields.length as usize);
        let bad = HostError::Length { kind: common.kind, hlen: common.hlen, plen: common.plen };
        let data = whole.get(from..from + bytes).ok_or(bad)?;
        if whole.len() != from + bytes + self.digests.data_bytes() {
            return Err(bad);
        }
        if self.digests.data && u32_at(whole, from + bytes) != crc32c::crc32c(data) {
            return Err(HostError::Digest);
        }
        let (last, success) = (common.flags & flag::LAST != 0, common.flags & flag::SUCCESS != 0);
        Ok(HostEvent::Data { cid: fields.cid, offset: fields.offset, data: data.to_vec(), last, success })
    }
}

/// Commands.
impl Sqe {
    /// All zero but for the opcode and "data by SGL".
    pub fn new(opcode: u8, cid: u16, nsid: u32) -> Self {
        let mut sqe = Self([0; SQE_BYTES]);
        sqe.0[0] = opcode;
        sqe.0[1] = 1 << 6;
        put(&mut sqe.0, 2, &cid.to_le_bytes());
        put(&mut sqe.0, 4, &nsid.to_le_bytes());
        sqe.0[39] = SGL_TRANSPORT;
        sqe
    }
    /// With command dword `n`.
    pub fn with(mut self, n: usize, value: u32) -> Self {
        put(&mut self.0, n * 4, &value.to_le_bytes());
        self
    }
    /// With so much data, in the capsule or by the transport's means.
    pub fn with_data(mut self, bytes: u32, inline: bool) -> Self {
        put(&mut self.0, 32, &bytes.to_le_bytes());
        self.0[39] = if inline { SGL_IN_CAPSULE } else { SGL_TRANSPORT };
        self
    }
    /// With a range of blocks, as Read and its like have it.
    pub fn with_range(self, slba: u64, blocks: u32) -> Self {
        self.with(10, slba as u32).with(11, (slba >> 32) as u32).with(12, blocks.wrapping_sub(1) & 0xffff)
    }
    /// Connect, of queue `qid` with `entries` entries.
    pub fn connect(cid: u16, qid: u16, entries: u16, kato_ms: u32) -> Self {
        let mut sqe = Self::new(FABRICS, cid, 0).with_data(CONNECT_DATA_BYTES as u32, true);
        sqe.0[4] = fctype::CONNECT;
        put(&mut sqe.0, 42, &qid.to_le_bytes());
        put(&mut sqe.0, 44, &entries.wrapping_sub(1).to_le_bytes());
        sqe.with(12, kato_ms)
    }
    /// Property Get; `long` for 8 bytes.
    pub fn property_get(cid: u16, offset: u32, long: bool) -> Self {
        let mut sqe = Self::new(FABRICS, cid, 0).with(10, long.into()).with(11, offset);
        sqe.0[4] = fctype::PROPERTY_GET;
        sqe
    }
    /// Property Set, of 4 bytes.
    pub fn property_set(cid: u16, offset: u32, value: u32) -> Self {
        let mut sqe = Self::new(FABRICS, cid, 0).with(11, offset).with(12, value);
        sqe.0[4] = fctype::PROPERTY_SET;
        sqe
    }
}

/// The data of Connect; `cntlid` 0xffff for any.
pub fn connect_data(host_id: [u8; 16], cntlid: u16, subsystem: &str, host: &str) -> Vec<u8> {
    let mut data = vec![0; CONNECT_DATA_BYTES];
    put(&mut data, 0, &host_id);
    put(&mut data, 16, &cntlid.to_le_bytes());
    put(&mut data, 256, subsystem.as_bytes());
    put(&mut data, 512, host.as_bytes());
    data
}

/// CC of a host that enables a controller: entries of 64 and 16 bytes.
pub const CC_ENABLE: u32 = 4 << 20 | 6 << 16 | 1;
