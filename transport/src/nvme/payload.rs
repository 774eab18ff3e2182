//! Data from the host: in capsules, or asked for and then sent in one or more PDUs.
//!
//! Data is asked for when the budget has room for it, but a buffer is taken only when it
//! comes. A piece may be filled by several PDUs; a PDU may fill several pieces. Pieces of a PDU are
//! held back until its digest was seen.

use super::{Kind, NvmeConn, NvmeEvent, ReqId, Step};
use crate::pieces::{blocks_of, lead, piece_charge, piece_length};
use crate::stream::Fill;
use protocol::nvme_tcp::wire::H2C_DATA_MAX;
use protocol::nvme_tcp::{IoCommand, Status};
use reactor::{Arena, BufMut};
use smallvec::SmallVec;

/// A piece being filled.
pub(super) struct Piece {
    buf: BufMut,
    /// Its offset within the request.
    at: u32,
    length: u32,
    filled: u32,
    /// Of all of it, if one PDU brought just that.
    crc: Option<u32>,
}

/// What a transfer has under way.
#[derive(Default)]
pub(super) struct Place {
    /// The piece that it has filled in part.
    pub(super) partial: Option<Piece>,
    /// What its pieces that have no buffer yet will be charged with.
    charge: usize,
}

/// Data of a PDU on its way in.
pub(super) struct Incoming {
    req: ReqId,
    /// The transfer's; `None` in a capsule.
    place: Option<u8>,
    /// Offset of the next byte within the request.
    at: u32,
    /// Bytes that are still to come.
    left: u32,
    /// Of the bytes that came, if it matters.
    crc: Option<u32>,
    /// Bytes that are being filled in now.
    filling: u32,
    partial: Option<Piece>,
    /// Full pieces.
    held: SmallVec<[Piece; 2]>,
    /// This ends the transfer.
    last: bool,
    over: bool,
}

impl Incoming {
    pub(super) fn inline(req: ReqId, length: u32, digest: bool) -> Self {
        Self {
            req,
            place: None,
            at: 0,
            left: length,
            crc: digest.then_some(0),
            filling: 0,
            partial: None,
            held: SmallVec::new(),
            last: true,
            over: false,
        }
    }
    pub(super) fn is_over(&self) -> bool {
        self.over
    }
}

/// What the pieces of a range are charged with.
fn charge_of(mut offset: u64, mut left: u32) -> usize {
    let mut sum = 0;
    while left > 0 {
        let length = piece_length(offset, left);
        sum += piece_charge(offset, length);
        offset += u64::from(length);
        left -= length;
    }
    sum
}

impl NvmeConn {
    /// The request has data to ask for.
    pub(super) fn list(&mut self, id: ReqId) {
        let req = &mut self.requests[id.key()];
        if !req.listed && req.granted < req.course.length {
            req.listed = true;
            self.ungranted.push_back(id);
        }
    }
    /// Asks for data as far as the budget goes.
    pub(super) fn ask_data(&mut self) {
        while let Some(&id) = self.ungranted.front() {
            let Some(length) = self.next_grant(id) else { return };
            let req = &mut self.requests[id.key()];
            if length > 0 {
                let text = self.stream.text();
                let Some(place) = self.session.ask(req.cid, id.0, req.granted, length, text) else { return };
                let at = usize::from(place);
                if self.places.len() <= at {
                    self.places.resize_with(at + 1, Place::default);
                }
                let charge = charge_of(req.course.offset + u64::from(req.granted), length);
                self.places[at].charge = charge;
                self.granted_bytes += charge;
                req.granted += length;
                req.transfers += 1;
            }
            if length == 0 || req.granted == req.course.length || req.transfers >= self.session.r2t_max() {
                req.listed = false;
                self.ungranted.pop_front();
            }
        }
    }
    /// How much may be asked for next; 0 if the request needs nothing (more), `None` if there is no room.
    fn next_grant(&self, id: ReqId) -> Option<u32> {
        let req = &self.requests[id.key()];
        if req.error.is_some() || req.transfers >= self.session.r2t_max() {
            return Some(0);
        }
        let (at, left) = (req.course.offset + u64::from(req.granted), req.course.length - req.granted);
        let whole = left.min(H2C_DATA_MAX);
        // A digest covers a PDU: no more than a piece is to wait for it.
        let one = piece_length(at, left);
        let digest = self.session.digests().data;
        let fits = |bytes: u32| {
            let held = self.bytes() + self.granted_bytes;
            held + charge_of(at, bytes) <= self.budget.bytes_max || held == 0
        };
        [whole, one].into_iter().find(|&bytes| (bytes == one || !digest) && fits(bytes))
    }
    /// Data of a transfer follows.
    pub(super) fn begin_data(&mut self, place: u8, id: ReqId, offset: u32, length: u32, last: bool) {
        let mut incoming = Incoming::inline(id, length, self.session.digests().data);
        (incoming.place, incoming.at, incoming.last) = (Some(place), offset, last);
        incoming.partial = self.places[usize::from(place)].partial.take();
        self.incoming = Some(incoming);
    }
    /// Takes in data.
    pub(super) fn payload(&mut self, arena: &Arena) -> Step {
        let incoming = self.incoming.as_mut().expect("the caller asked");
        if incoming.left == 0 {
            incoming.over = true;
            self.session.payload_taken(incoming.crc);
            return Step::Again;
        }
        if incoming.filling == 0 {
            let req = &self.requests[incoming.req.key()];
            if req.error.is_some() || matches!(req.kind, Kind::Io(IoCommand::Hints)) {
                return self.skip_payload();
            }
            if incoming.partial.is_none() && !self.begin_piece(arena) {
                return Step::Blocked;
            }
            self.fill_piece();
        }
        match self.stream.poll_fill() {
            Some(buf) => {
                self.filled(buf);
                Step::Again
            }
            None => Step::NeedsBytes,
        }
    }
    /// Nobody needs the rest.
    fn skip_payload(&mut self) -> Step {
        let incoming = self.incoming.as_mut().expect("the caller asked");
        let staged = self.stream.staged();
        let bytes = staged.len().min(incoming.left as usize);
        if bytes == 0 {
            return Step::NeedsBytes;
        }
        incoming.crc = None;
        incoming.left -= bytes as u32;
        incoming.at += bytes as u32;
        self.stream.consume(bytes);
        Step::Again
    }
    /// Finds room for the next piece, if the budget and the arena have it.
    fn begin_piece(&mut self, arena: &Arena) -> bool {
        let incoming = self.incoming.as_ref().expect("the caller asked");
        let req = &self.requests[incoming.req.key()];
        let (at, place) = (incoming.at, incoming.place);
        let (offset, left) = (req.course.offset + u64::from(at), req.course.length - at);
        let length = piece_length(offset, left);
        let charge = piece_charge(offset, length);
        if !self.has_budget(charge) {
            return false;
        }
        let Some(buf) = self.budget.alloc(arena, blocks_of(offset, length), self.bytes() == 0) else {
            self.starved = true;
            return false;
        };
        self.budget.writing += charge;
        if let Some(place) = place {
            self.places[usize::from(place)].charge -= charge;
            self.granted_bytes -= charge;
        }
        let incoming = self.incoming.as_mut().expect("as above");
        incoming.partial = Some(Piece { buf, at, length, filled: 0, crc: None });
        true
    }
    fn fill_piece(&mut self) {
        let incoming = self.incoming.as_mut().expect("the caller asked");
        let piece = incoming.partial.take().expect("just made, or left over");
        let req = &self.requests[incoming.req.key()];
        let lead = lead(req.course.offset + u64::from(piece.at));
        let bytes = incoming.left.min(piece.length - piece.filled);
        let from = lead + piece.filled as usize;
        self.stream.expect(Fill { buf: piece.buf, at: from, end: from + bytes as usize });
        incoming.filling = bytes;
        incoming.at = piece.at + piece.filled;
    }
    fn filled(&mut self, buf: BufMut) {
        let incoming = self.incoming.as_mut().expect("data was under way");
        let req = &mut self.requests[incoming.req.key()];
        let bytes = core::mem::take(&mut incoming.filling);
        let at = incoming.at;
        // The piece that holds `at` begins where the window does, or the request.
        let (begin, length) = req.course.piece_around(at);
        let from = lead(req.course.offset + u64::from(begin)) + (at - begin) as usize;
        let data = &buf[from..from + bytes as usize];
        let mut whole = None;
        if let Some(crc) = &mut incoming.crc {
            let alone = bytes == length && *crc == 0;
            *crc = crc32c::crc32c_append(*crc, data);
            whole = (alone && incoming.left == bytes).then_some(*crc);
        }
        incoming.at += bytes;
        incoming.left -= bytes;
        let piece = Piece { buf, at: begin, length, filled: at - begin + bytes, crc: whole };
        if piece.filled == piece.length {
            incoming.held.push(piece);
        } else {
            incoming.partial = Some(piece);
        }
    }
    /// All data of a PDU is here; hands its pieces out if it is intact.
    pub(super) fn end_payload(&mut self, intact: bool, events: &mut Vec<NvmeEvent>) {
        let incoming = self.incoming.take().expect("data was under way");
        let id = incoming.req;
        let req = &mut self.requests[id.key()];
        let came = incoming.held.iter().map(|piece| piece.length).sum::<u32>();
        if let (true, Some(place)) = (incoming.last, incoming.place) {
            req.transfers -= 1;
            // What was skipped never had a buffer.
            self.granted_bytes -= core::mem::take(&mut self.places[usize::from(place)].charge);
        }
        if !intact {
            req.error.get_or_insert(Status::TRANSIENT_TRANSPORT);
        }
        if req.error.is_some() {
            let dropped = incoming.held.into_iter().chain(incoming.partial);
            for piece in dropped {
                self.budget.writing -= piece_charge(req.course.offset + u64::from(piece.at), piece.length);
            }
            return self.finish_if_over(id);
        }
        req.taken += came;
        if incoming.last && matches!(req.kind, Kind::Io(IoCommand::Hints)) {
            (req.taken, req.course.answered) = (req.course.length, req.course.length);
        }
        if let (Some(place), Some(piece)) = (incoming.place, incoming.partial) {
            self.places[usize::from(place)].partial = Some(piece);
        }
        for piece in incoming.held {
            self.hand_out(id, piece, events);
        }
        if self.requests.contains(id.key()) {
            self.list(id);
            self.finish_if_over(id);
        }
    }
    fn hand_out(&mut self, id: ReqId, piece: Piece, events: &mut Vec<NvmeEvent>) {
        let req = &mut self.requests[id.key()];
        let (offset, length, crc) = (req.course.offset + u64::from(piece.at), piece.length, piece.crc);
        let buf = piece.buf.freeze();
        match req.kind {
            Kind::Io(IoCommand::Write) => {
                req.course.outstanding += 1;
                events.push(NvmeEvent::WritePiece { req: id, offset, length, buf, crc });
            }
            Kind::Io(IoCommand::Compare) => {
                req.course.outstanding += 1;
                req.compare.insert(piece.at, buf);
                self.budget.reading += length as usize;
                events.push(NvmeEvent::Read { req: id, offset, length });
            }
            Kind::Io(_) | Kind::Collect(_) => {
                // At most 8 KiB from offset 0, so this piece is all.
                self.budget.writing -= piece_charge(offset, length);
                req.course.answered = req.course.length;
                self.collected(id, &buf, events);
            }
        }
    }
}
