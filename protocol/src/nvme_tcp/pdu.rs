//! PDUs: the check of a header, field by field, and the encoding of each.
//!
//! Deliberately absent: any state. What may come when is the session's affair.

use super::wire::*;

/// Why a connection must end: what goes into the termination PDU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} (fatal error status {fes}, information {info})")]
pub struct Fatal {
    /// One of [`fes`].
    pub fes: u16,
    /// The offset of the field, or the digest that came, by `fes`.
    pub info: u32,
    /// For people.
    pub what: &'static str,
}

impl Fatal {
    pub(super) const fn field(offset: u32, what: &'static str) -> Self {
        Self { fes: fes::HEADER_FIELD, info: offset, what }
    }
    pub(super) const fn of(fes: u16, what: &'static str) -> Self {
        Self { fes, info: 0, what }
    }
}

/// The common header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Common {
    /// One of [`kind`].
    pub kind: u8,
    /// Of [`flag`].
    pub flags: u8,
    /// Length of the header.
    pub hlen: u8,
    /// Offset of the data.
    pub pdo: u8,
    /// Length of the whole.
    pub plen: u32,
}

impl Common {
    /// From the first 8 bytes.
    pub fn parse(bytes: &[u8; COMMON_BYTES]) -> Self {
        Self { kind: bytes[0], flags: bytes[1], hlen: bytes[2], pdo: bytes[3], plen: u32_at(bytes, 4) }
    }
    fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind, self.flags, self.hlen, self.pdo]);
        out.extend_from_slice(&self.plen.to_le_bytes());
    }
    /// Checks the length of the header; `hlen` is what this type has.
    pub(super) fn check_hlen(self, hlen: usize) -> Result<(), Fatal> {
        if usize::from(self.hlen) != hlen {
            return Err(Fatal::field(2, "wrong header length"));
        }
        if (self.plen as usize) < hlen {
            return Err(Fatal::field(4, "PDU is shorter than its header"));
        }
        Ok(())
    }
    /// Checks digest flags, and where the data lies. Gives the header's bytes with digest and padding, and the
    /// data's.
    pub(super) fn layout(self, digests: Digests) -> Result<(usize, u32), Fatal> {
        let plain = usize::from(self.hlen) + digests.header_bytes();
        if (self.flags & flag::HDGST != 0) != digests.header {
            return Err(Fatal::field(1, "header digest flag unlike what was agreed"));
        }
        let plen = self.plen as usize;
        if plen < plain {
            return Err(Fatal::field(4, "PDU is shorter than its header and digest"));
        }
        if plen == plain {
            return match self.flags & flag::DDGST {
                0 => Ok((plain, 0)),
                _ => Err(Fatal::field(1, "data digest flag without data")),
            };
        }
        if (self.flags & flag::DDGST != 0) != digests.data {
            return Err(Fatal::field(1, "data digest flag unlike what was agreed"));
        }
        let pdo = usize::from(self.pdo);
        if pdo < plain || pdo > plen || !pdo.is_multiple_of(4) {
            return Err(Fatal::field(3, "data offset makes no sense"));
        }
        let rest = plen - pdo;
        if rest <= digests.data_bytes() {
            return Err(Fatal::field(4, "PDU has no room for its data"));
        }
        Ok((pdo, (rest - digests.data_bytes()) as u32))
    }
}

/// Which digests are in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digests {
    /// Of headers.
    pub header: bool,
    /// Of data.
    pub data: bool,
}

impl Digests {
    /// As ICReq and ICResp have them.
    pub fn from_bits(bits: u8) -> Self {
        Self { header: bits & 1 != 0, data: bits & 2 != 0 }
    }
    /// The inverse.
    pub fn bits(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }
    /// Bytes of a header's digest.
    pub fn header_bytes(self) -> usize {
        if self.header { DIGEST_BYTES } else { 0 }
    }
    /// Bytes of a data digest.
    pub fn data_bytes(self) -> usize {
        if self.data { DIGEST_BYTES } else { 0 }
    }
}

/// ICReq and ICResp alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ic {
    /// Version of the format: 0.
    pub pfv: u16,
    /// Alignment of data in what the sender receives: dwords, less one.
    pub pda: u8,
    /// Digests wanted, or granted.
    pub digests: Digests,
    /// ICReq: most R2Ts of a command at once, less one. ICResp: most data of an H2CData PDU.
    pub limit: u32,
}

impl Ic {
    /// From 128 bytes, the common header checked.
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            pfv: u16_at(bytes, 8),
            pda: bytes[10],
            digests: Digests::from_bits(bytes[11]),
            limit: u32_at(bytes, 12),
        }
    }
    /// As `kind`.
    pub fn encode(&self, kind: u8, out: &mut Vec<u8>) {
        let end = out.len() + IC_BYTES;
        Common { kind, flags: 0, hlen: IC_BYTES as u8, pdo: 0, plen: IC_BYTES as u32 }.put(out);
        out.extend_from_slice(&self.pfv.to_le_bytes());
        out.extend_from_slice(&[self.pda, self.digests.bits()]);
        out.extend_from_slice(&self.limit.to_le_bytes());
        out.resize(end, 0);
    }
}

/// The fields of H2CData, C2HData and R2T.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Data {
    /// The command.
    pub cid: u16,
    /// The transfer; 0 in C2HData.
    pub ttag: u16,
    /// First byte, from the command's first.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

impl Data {
    /// From 24 bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            cid: u16_at(bytes, 8),
            ttag: u16_at(bytes, 10),
            offset: u32_at(bytes, 12),
            length: u32_at(bytes, 16),
        }
    }
    fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.cid.to_le_bytes());
        out.extend_from_slice(&self.ttag.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.length.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }
}

/// Appends a header that begins at `start`'s digest, if there is one.
fn seal(start: usize, digests: Digests, out: &mut Vec<u8>) {
    if digests.header {
        let crc = crc32c::crc32c(&out[start..]);
        out.extend_from_slice(&crc.to_le_bytes());
    }
}

/// Begins a PDU with data: header, digest, padding. Data, and its digest, must follow.
fn begin_with_data(
    kind: u8,
    flags: u8,
    fields: &[u8],
    length: u32,
    digests: Digests,
    align: usize,
    out: &mut Vec<u8>,
) {
    let start = out.len();
    let hlen = COMMON_BYTES + fields.len();
    let plain = hlen + digests.header_bytes();
    let pdo = if length > 0 { plain.next_multiple_of(align) } else { plain };
    let trailer = if length > 0 { digests.data_bytes() } else { 0 };
    let mut bits = flags | if digests.header { flag::HDGST } else { 0 };
    if digests.data && length > 0 {
        bits |= flag::DDGST;
    }
    let plen = pdo as u32 + length + trailer as u32;
    let told = if length > 0 { pdo as u8 } else { 0 };
    Common { kind, flags: bits, hlen: hlen as u8, pdo: told, plen }.put(out);
    out.extend_from_slice(fields);
    seal(start, digests, out);
    out.resize(start + pdo, 0);
}

/// Begins H2CData or C2HData; `length` bytes of data and their digest must follow.
pub fn data(kind: u8, flags: u8, fields: Data, digests: Digests, align: usize, out: &mut Vec<u8>) {
    let mut bytes = Vec::with_capacity(16);
    fields.put(&mut bytes);
    begin_with_data(kind, flags, &bytes, fields.length, digests, align, out);
}

/// Begins a command; `inline` bytes of data and their digest must follow.
pub fn command(sqe: &Sqe, inline: u32, digests: Digests, align: usize, out: &mut Vec<u8>) {
    begin_with_data(kind::COMMAND, 0, &sqe.0, inline, digests, align, out);
}

/// A whole R2T.
pub fn r2t(fields: Data, digests: Digests, out: &mut Vec<u8>) {
    let start = out.len();
    short(kind::R2T, digests, out);
    fields.put(out);
    seal(start, digests, out);
}

fn short(kind: u8, digests: Digests, out: &mut Vec<u8>) {
    let flags = if digests.header { flag::HDGST } else { 0 };
    let plen = (SHORT_BYTES + digests.header_bytes()) as u32;
    Common { kind, flags, hlen: SHORT_BYTES as u8, pdo: 0, plen }.put(out);
}

/// A completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cqe {
    /// Depends on the command.
    pub result: u64,
    /// Head of the submission queue.
    pub sqhd: u16,
    /// The command.
    pub cid: u16,
    /// How it went.
    pub status: Status,
}

impl Cqe {
    /// From the 16 bytes behind the common header.
    pub fn parse(bytes: &[u8]) -> Self {
        let status = Status(u16_at(bytes, 14) >> 1);
        Self { result: u64_at(bytes, 0), sqhd: u16_at(bytes, 8), cid: u16_at(bytes, 12), status }
    }
}

/// A whole response.
pub fn response(cqe: Cqe, digests: Digests, out: &mut Vec<u8>) {
    let start = out.len();
    short(kind::RESPONSE, digests, out);
    out.extend_from_slice(&cqe.result.to_le_bytes());
    out.extend_from_slice(&cqe.sqhd.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&cqe.cid.to_le_bytes());
    out.extend_from_slice(&(cqe.status.0 << 1).to_le_bytes());
    seal(start, digests, out);
}

/// A whole termination, with as much of the offending header as it tells.
pub fn terminate(kind: u8, fatal: Fatal, header: &[u8], out: &mut Vec<u8>) {
    let header = &header[..header.len().min(TERM_DATA_BYTES_MAX)];
    let end = out.len() + SHORT_BYTES;
    let plen = (SHORT_BYTES + header.len()) as u32;
    Common { kind, flags: 0, hlen: SHORT_BYTES as u8, pdo: 0, plen }.put(out);
    out.extend_from_slice(&fatal.fes.to_le_bytes());
    out.extend_from_slice(&fatal.info.to_le_bytes());
    out.resize(end, 0);
    out.extend_from_slice(header);
}
