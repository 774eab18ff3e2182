//! One connection, the controller's side: phases, PDUs in order, transfers, digests.
//!
//! Invariants: bytes are used strictly in order; a session that returned a [`Violation`] uses
//! nothing more, and has written the termination if one is due; a refused command is answered
//! here and leaves the stream in step (its data is skipped first); no more commands are open
//! than the queue has entries; a transfer tag is never that of one of the last 255 transfers of
//! its place, so late data finds no taker.

use super::command::{self, IoCommand, IoRequest, Namespace};
use super::pdu::{self, Common, Cqe, Data, Digests, Fatal, Ic};
use super::wire::*;

/// Most transfers at once of a connection: several for each command of a full queue.
const TRANSFERS_MAX: usize = 256;
/// Most R2Ts of a command at once, whatever the host allows.
const R2T_MAX: u32 = 4;

/// Why a connection cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// The host broke the protocol; the termination is in `out`.
    #[error("{0}")]
    Broken(#[from] Fatal),
    /// The host gave up, for this reason ([`fes`]).
    #[error("host terminated the connection (fatal error status {0})")]
    Terminated(u16),
}

/// What a session makes of the bytes it was fed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A command; before the queue is connected only ever Connect, after which nothing is read
    /// until [`Session::connected`] or [`Session::respond`].
    Command {
        /// As it came.
        sqe: Sqe,
        /// Decoded, on an IO queue.
        io: Option<IoRequest>,
        /// Bytes of data that the command has for the controller.
        out_bytes: u32,
        /// They follow now. Otherwise they are to be asked for ([`Session::ask`]).
        inline: bool,
    },
    /// Data of a transfer follows.
    Data {
        /// Which, as given by [`Session::ask`].
        place: u8,
        /// The caller's word for it.
        tag: u32,
        /// From the command's first byte.
        offset: u32,
        /// Bytes that follow now.
        length: u32,
        /// This ends the transfer.
        last: bool,
    },
    /// The payload is over.
    PayloadEnd {
        /// Its digest fits, or there is none.
        intact: bool,
    },
}

/// What one [`Session::feed`] did. No bytes used and no event: it needs more bytes, or an answer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Bytes of the input that are done with.
    pub used: usize,
    /// What they meant, if that concerns the caller.
    pub event: Option<Event>,
}

impl Progress {
    fn used(used: usize) -> Self {
        Self { used, event: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    IcReq,
    Ready,
    /// The caller takes data off the stream.
    Payload,
    /// Data is over; its digest, if any, is next.
    PayloadEnd {
        crc: Option<u32>,
    },
    Skip {
        left: u32,
        refused: Refused,
    },
    /// Connect is being looked at.
    Connecting,
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Refused {
    cid: u16,
    status: Status,
    /// The id belongs to another command that is still open.
    conflict: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Transfer {
    cid: u16,
    tag: u32,
    next: u32,
    end: u32,
}

#[derive(Clone, Copy, Default, Debug)]
struct Place {
    /// Upper half of the tag; 1 to 255.
    generation: u8,
    transfer: Option<Transfer>,
}

/// What a connection became.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Queue {
    None,
    Admin,
    Io(Option<Namespace>),
}

/// The controller's side of one connection. Call [`Session::feed`] with what has arrived and is
/// not used yet, as often as it makes progress.
#[derive(Debug)]
pub struct Session {
    phase: Phase,
    digests: Digests,
    /// Alignment of data that the host receives.
    align: usize,
    r2t_max: u32,
    queue: Queue,
    entries: u16,
    sqhd: u16,
    flow_control: bool,
    /// Ids of commands that are not answered.
    open: Vec<u16>,
    places: Vec<Place>,
    /// The place whose last data is on its way in.
    ending: Option<usize>,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A host has just connected.
    pub fn new() -> Self {
        Self {
            phase: Phase::IcReq,
            digests: Digests::default(),
            align: 4,
            r2t_max: 1,
            queue: Queue::None,
            // Connect itself.
            entries: 1,
            sqhd: 0,
            flow_control: true,
            open: Vec::new(),
            places: Vec::new(),
            ending: None,
        }
    }
    /// Which digests were agreed.
    pub fn digests(&self) -> Digests {
        self.digests
    }
    /// Most R2Ts that a command may have under way.
    pub fn r2t_max(&self) -> u32 {
        self.r2t_max
    }
    /// Whether nothing but Connect was seen so far.
    pub fn is_connected(&self) -> bool {
        self.queue != Queue::None
    }
    /// Whether it is an admin queue.
    pub fn is_admin(&self) -> bool {
        self.queue == Queue::Admin
    }
    /// The namespace of an IO queue.
    pub fn namespace(&self) -> Option<&Namespace> {
        match &self.queue {
            Queue::Io(namespace) => namespace.as_ref(),
            _ => None,
        }
    }
    /// The namespace has changed, or is gone.
    pub fn set_namespace(&mut self, now: Option<Namespace>) {
        if let Queue::Io(namespace) = &mut self.queue {
            *namespace = now;
        }
    }
    /// Commands that are not answered.
    pub fn open(&self) -> usize {
        self.open.len()
    }
    /// Whether the stream is between two PDUs.
    pub fn is_between_pdus(&self) -> bool {
        matches!(self.phase, Phase::IcReq | Phase::Ready | Phase::Connecting)
    }

    /// Takes one step. `input` is what has arrived from the first unused byte on; offer at least
    /// [`FEED_BYTES_MAX`] of it if so much is there. Answers are appended to `out`.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let result = match self.phase {
            Phase::IcReq | Phase::Ready => self.header(input, out),
            Phase::Skip { left, refused } => Ok(self.skip(input, left, refused, out)),
            Phase::PayloadEnd { crc } => Ok(self.payload_end(input, crc)),
            Phase::Payload | Phase::Connecting | Phase::Ended => Ok(Progress::default()),
        };
        if let Err(violation) = &result {
            self.phase = Phase::Ended;
            if let Violation::Broken(fatal) = violation {
                let hlen = input.get(2).map_or(0, |&hlen| usize::from(hlen).max(COMMON_BYTES));
                pdu::terminate(kind::C2H_TERM, *fatal, &input[..hlen.min(input.len())], out);
            }
        }
        result
    }
    /// The payload was taken off the stream; `crc` is of it, or `None` if it does not matter any more.
    pub fn payload_taken(&mut self, crc: Option<u32>) {
        assert_eq!(self.phase, Phase::Payload, "a payload was under way");
        self.phase = Phase::PayloadEnd { crc };
    }
    fn payload_end(&mut self, input: &[u8], crc: Option<u32>) -> Progress {
        let bytes = self.digests.data_bytes();
        let Some(told) = input.get(..bytes) else { return Progress::default() };
        if let Some(at) = self.ending.take() {
            self.places[at].transfer = None;
        }
        let intact = crc.is_none_or(|crc| told.is_empty() || u32_at(told, 0) == crc);
        self.phase = Phase::Ready;
        Progress { used: bytes, event: Some(Event::PayloadEnd { intact }) }
    }
    fn skip(&mut self, input: &[u8], left: u32, refused: Refused, out: &mut Vec<u8>) -> Progress {
        let used = input.len().min(left as usize);
        let left = left - used as u32;
        self.phase = Phase::Skip { left, refused };
        if left == 0 {
            self.phase = Phase::Ready;
            self.refuse(refused, out);
        }
        Progress::used(used)
    }
    fn refuse(&mut self, refused: Refused, out: &mut Vec<u8>) {
        if refused.conflict {
            // The command that has the id stays open.
            self.open.push(refused.cid);
        }
        self.respond(refused.cid, refused.status, 0, out);
    }

    fn header(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let Some(common) = input.first_chunk::<COMMON_BYTES>().map(Common::parse) else {
            return Ok(Progress::default());
        };
        let hlen = match common.kind {
            kind::IC_REQ => IC_BYTES,
            kind::COMMAND => COMMAND_BYTES,
            kind::H2C_TERM | kind::H2C_DATA => SHORT_BYTES,
            _ => return Err(Fatal::field(0, "no such type of PDU from a host").into()),
        };
        let first = self.phase == Phase::IcReq;
        if common.kind != kind::H2C_TERM && first != (common.kind == kind::IC_REQ) {
            return Err(Fatal::of(fes::SEQUENCE, "ICReq comes first, and once").into());
        }
        common.check_hlen(hlen)?;
        match common.kind {
            kind::IC_REQ => self.ic_req(common, input, out),
            kind::H2C_TERM => Self::terminated(common, input),
            _ => self.with_data(common, input, out),
        }
    }
    fn ic_req(&mut self, common: Common, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        if common.plen as usize != IC_BYTES {
            return Err(Fatal::field(4, "wrong length of ICReq").into());
        }
        let Some(bytes) = input.get(..IC_BYTES) else { return Ok(Progress::default()) };
        let ic = Ic::parse(bytes);
        if ic.pfv != 0 {
            return Err(Fatal { fes: fes::UNSUPPORTED, info: 8, what: "unknown PDU format version" }.into());
        }
        if ic.pda > 31 {
            return Err(Fatal::field(10, "data alignment out of range").into());
        }
        self.digests = ic.digests;
        self.align = (usize::from(ic.pda) + 1) * 4;
        self.r2t_max = ic.limit.saturating_add(1).min(R2T_MAX);
        Ic { pfv: 0, pda: 0, digests: ic.digests, limit: H2C_DATA_MAX }.encode(kind::IC_RESP, out);
        self.phase = Phase::Ready;
        Ok(Progress::used(IC_BYTES))
    }
    fn terminated(common: Common, input: &[u8]) -> Result<Progress, Violation> {
        if common.plen as usize > SHORT_BYTES + TERM_DATA_BYTES_MAX {
            return Err(Fatal::field(4, "termination is too long").into());
        }
        match input.get(..SHORT_BYTES) {
            Some(bytes) => Err(Violation::Terminated(u16_at(bytes, 8))),
            None => Ok(Progress::default()),
        }
    }
    fn with_data(&mut self, common: Common, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let (head, bytes) = common.layout(self.digests)?;
        let Some(header) = input.get(..head) else { return Ok(Progress::default()) };
        let hlen = usize::from(common.hlen);
        if self.digests.header {
            let told = u32_at(header, hlen);
            if told != crc32c::crc32c(&header[..hlen]) {
                let what = "header digest does not fit";
                return Err(Fatal { fes: fes::HEADER_DIGEST, info: told, what }.into());
            }
        }
        let event = match common.kind {
            kind::COMMAND => self.command(header, bytes, out)?,
            _ => Some(self.h2c_data(common, header, bytes)?),
        };
        Ok(Progress { used: head, event })
    }
    fn h2c_data(&mut self, common: Common, header: &[u8], bytes: u32) -> Result<Event, Fatal> {
        let data = Data::parse(header);
        let at = usize::from(data.ttag & 0xff);
        let place = self.places.get_mut(at).filter(|p| u16::from(p.generation) == data.ttag >> 8);
        let Some(place) = place.filter(|p| p.transfer.is_some()) else {
            return Err(Fatal::field(10, "no such transfer"));
        };
        let transfer = place.transfer.as_mut().expect("just asked");
        if data.cid != transfer.cid {
            return Err(Fatal::field(8, "transfer of another command"));
        }
        if data.length == 0 || data.length != bytes {
            return Err(Fatal::field(16, "data length unlike the PDU's"));
        }
        if data.length > H2C_DATA_MAX {
            return Err(Fatal::of(fes::LIMIT, "more data than MAXH2CDATA"));
        }
        if data.offset != transfer.next {
            return Err(Fatal::of(fes::SEQUENCE, "data out of order"));
        }
        let end = data.offset.checked_add(data.length).filter(|&end| end <= transfer.end);
        let Some(end) = end else {
            return Err(Fatal::of(fes::OUT_OF_RANGE, "data beyond what was asked for"));
        };
        let last = end == transfer.end;
        if last != (common.flags & flag::LAST != 0) {
            return Err(Fatal::field(1, "the last data PDU of a transfer, and only that, says so"));
        }
        transfer.next = end;
        let tag = transfer.tag;
        self.ending = last.then_some(at);
        self.phase = Phase::Payload;
        Ok(Event::Data { place: at as u8, tag, offset: data.offset, length: data.length, last })
    }

    fn command(&mut self, header: &[u8], bytes: u32, out: &mut Vec<u8>) -> Result<Option<Event>, Fatal> {
        let sqe = Sqe(header[COMMON_BYTES..COMMAND_BYTES].try_into().expect("64 bytes"));
        let fabrics = sqe.opcode() == FABRICS;
        let io = matches!(self.queue, Queue::Io(_)) && !fabrics;
        if bytes > if io { IO_CAPSULE_DATA_MAX } else { ADMIN_CAPSULE_DATA_MAX } {
            return Err(Fatal::of(fes::LIMIT, "more data than a capsule takes"));
        }
        let conflict = self.open.contains(&sqe.cid());
        if !conflict && self.open.len() >= usize::from(self.entries) {
            return Err(Fatal::of(fes::SEQUENCE, "more commands than the queue has entries"));
        }
        let checked = if conflict { Err(Status::ID_CONFLICT.dnr()) } else { self.check(&sqe, bytes) };
        if !conflict {
            self.open.push(sqe.cid());
        }
        match checked {
            Ok((io, out_bytes)) => {
                let inline = bytes > 0;
                if inline {
                    self.phase = Phase::Payload;
                }
                Ok(Some(Event::Command { sqe, io, out_bytes, inline }))
            }
            Err(status) => {
                let refused = Refused { cid: sqe.cid(), status, conflict };
                if bytes == 0 {
                    self.refuse(refused, out);
                } else {
                    let left = bytes + self.digests.data_bytes() as u32;
                    self.phase = Phase::Skip { left, refused };
                }
                Ok(None)
            }
        }
    }
    /// Whether a command may come now and is in form; gives the data that it has for us.
    fn check(&self, sqe: &Sqe, inline: u32) -> Result<(Option<IoRequest>, u32), Status> {
        let connect = sqe.opcode() == FABRICS && sqe.fctype() == fctype::CONNECT;
        if connect == self.is_connected() {
            return Err(Status::SEQUENCE.dnr());
        }
        if sqe.flags() >> 6 != 1 {
            // Fabrics know SGLs only.
            return Err(Status::INVALID_FIELD.dnr());
        }
        let io = match &self.queue {
            Queue::Io(_) if sqe.opcode() == FABRICS => return Err(Status::INVALID_OPCODE.dnr()),
            Queue::Io(namespace) => Some(command::decode(sqe, namespace.as_ref())?),
            _ => None,
        };
        let out_bytes = out_bytes(sqe, inline)?;
        let sgl = sqe.sgl();
        match io {
            Some(io) => {
                let bytes = if sqe.is_data_in() { sgl.length } else { out_bytes };
                if !io.takes(bytes) {
                    return Err(Status::SGL_LENGTH.dnr());
                }
            }
            None if connect && inline as usize != CONNECT_DATA_BYTES => {
                return Err(Status::SGL_LENGTH.dnr());
            }
            None if out_bytes > ADMIN_CAPSULE_DATA_MAX => return Err(Status::INVALID_FIELD.dnr()),
            None => {}
        }
        let needs_data_in = io.is_none_or(|io| io.command == IoCommand::Read);
        if sqe.is_data_in() && needs_data_in && sgl.length > 0 && sgl.kind != SGL_TRANSPORT {
            return Err(Status::SGL_TYPE.dnr());
        }
        Ok((io, out_bytes))
    }

    /// Accepts a Connect: the queue is there, with so many entries.
    pub fn connected(
        &mut self,
        sqe: &Sqe,
        admin: bool,
        namespace: Option<Namespace>,
        cntlid: u16,
        out: &mut Vec<u8>,
    ) {
        assert_eq!(self.phase, Phase::Connecting, "a Connect was under way");
        self.entries = u16_at(&sqe.0, 44) + 1;
        self.flow_control = sqe.0[46] & 4 == 0;
        self.queue = if admin { Queue::Admin } else { Queue::Io(namespace) };
        self.respond(sqe.cid(), Status::SUCCESS, cntlid.into(), out);
    }
    /// The data of Connect has come: nothing more is read until it is answered.
    pub fn connecting(&mut self) {
        assert!(!self.is_connected() && self.phase == Phase::Ready, "once, and with its data here");
        self.phase = Phase::Connecting;
    }
    /// Asks for data `offset..offset + length` of a command; `None` when too much is asked for already.
    /// The transfer's place is free again after the [`Event::PayloadEnd`] of its last [`Event::Data`].
    pub fn ask(&mut self, cid: u16, tag: u32, offset: u32, length: u32, out: &mut Vec<u8>) -> Option<u8> {
        let free = self.places.iter().position(|place| place.transfer.is_none());
        let at = match free {
            Some(at) => at,
            None if self.places.len() < TRANSFERS_MAX => {
                self.places.push(Place::default());
                self.places.len() - 1
            }
            None => return None,
        };
        let place = &mut self.places[at];
        place.generation = place.generation.checked_add(1).unwrap_or(1);
        place.transfer = Some(Transfer { cid, tag, next: offset, end: offset + length });
        let ttag = u16::from(place.generation) << 8 | at as u16;
        pdu::r2t(Data { cid, ttag, offset, length }, self.digests, out);
        Some(at as u8)
    }
    /// Answers a command.
    pub fn respond(&mut self, cid: u16, status: Status, result: u64, out: &mut Vec<u8>) {
        let sqhd = self.close(cid);
        if self.phase == Phase::Connecting {
            self.phase = Phase::Ready;
        }
        pdu::response(Cqe { result, sqhd, cid, status }, self.digests, out);
    }
    fn close(&mut self, cid: u16) -> u16 {
        let at = self.open.iter().position(|open| *open == cid).expect("a command is answered once");
        self.open.swap_remove(at);
        self.sqhd = (self.sqhd + 1) % self.entries;
        if self.flow_control { self.sqhd } else { u16::MAX }
    }
    /// Begins data of a read; the bytes and then [`Session::end_data`] must follow. With `done` the
    /// command succeeded and this is all: true if that answers it, else [`Session::respond`] must.
    pub fn begin_data(
        &mut self,
        cid: u16,
        offset: u32,
        length: u32,
        last: bool,
        done: bool,
        out: &mut Vec<u8>,
    ) -> bool {
        let success = last && done && !self.flow_control;
        let mut flags = if last { flag::LAST } else { 0 };
        if success {
            flags |= flag::SUCCESS;
            self.close(cid);
        }
        let fields = Data { cid, ttag: 0, offset, length };
        pdu::data(kind::C2H_DATA, flags, fields, self.digests, self.align, out);
        success
    }
    /// The data's digest, if one is in use.
    pub fn end_data(&self, crc: u32, out: &mut Vec<u8>) {
        if self.digests.data {
            out.extend_from_slice(&crc.to_le_bytes());
        }
    }
}

/// How much data a command has for the controller, its SGL checked; `inline` came with it.
fn out_bytes(sqe: &Sqe, inline: u32) -> Result<u32, Status> {
    let sgl = sqe.sgl();
    if inline > 0 {
        if !sqe.is_data_out() {
            return Err(Status::INVALID_FIELD.dnr());
        }
        return match sgl.kind {
            SGL_IN_CAPSULE if sgl.address != 0 => Err(Status::SGL_OFFSET.dnr()),
            SGL_IN_CAPSULE if sgl.length != inline => Err(Status::SGL_LENGTH.dnr()),
            SGL_IN_CAPSULE => Ok(inline),
            _ => Err(Status::SGL_TYPE.dnr()),
        };
    }
    if !sqe.is_data_out() || sgl.length == 0 {
        return Ok(0);
    }
    match sgl.kind {
        SGL_TRANSPORT => Ok(sgl.length),
        SGL_IN_CAPSULE => Err(Status::SGL_LENGTH.dnr()),
        _ => Err(Status::SGL_TYPE.dnr()),
    }
}
