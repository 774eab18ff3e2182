//! Replies to reads: chunks as their pieces are answered, or one run of data in order.
//!
//! A structured reply sends each piece when it is answered, holes as holes. A simple reply,
//! and a structured one that must not be fragmented, is a header and then all data in order
//! with nothing in between: pieces that are answered early wait, and so do other replies
//! until it is over. A failure after such a header can be told only by closing (simple) or by
//! an error chunk behind zeroes in the data's place, so short ones are held until complete.

use super::{NbdCloseReason, NbdConn, NbdEvent, Req, State};
use crate::pieces::{InOrder, ReadPart, ReadParts, ReqId, blocks_of, bytes_of, push_part};
use protocol::nbd::{Command, NbdError, reply};
use reactor::Arena;

/// An unfragmented reply up to this long is sent only when all of it is here, so that a failure
/// can be told properly.
pub(super) const HOLD_BYTES_MAX: usize = 1 << 20;

/// Something that must not be sent into the middle of an unfragmented reply.
pub(super) enum Waiting {
    /// Encoded replies.
    Text(Vec<u8>),
    /// Data of a chunk.
    Part(ReadPart),
}

impl Waiting {
    /// Bytes of encoded replies.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Part(_) => 0,
        }
    }
}

/// What was made of a read so far.
#[derive(Default)]
pub(super) struct Reading {
    /// The header of an unfragmented reply is out.
    begun: bool,
    /// That header ended the reply.
    ended: bool,
    order: InOrder,
}

impl NbdConn {
    /// Hands out pieces of reads as far as the budget goes.
    pub(super) fn ask_reads(&mut self, arena: &Arena, events: &mut Vec<NbdEvent>) {
        while let Some(&id) = self.unasked.front() {
            let course = &self.requests[id.key()].course;
            let (offset, length) = course.next();
            // When the client has nothing left to take, waiting for it would be for ever.
            let stuck = course.outstanding == 0 && self.stream.tx_bytes() == 0;
            if !self.has_budget(length as usize) && !stuck {
                return;
            }
            if !self.budget.has_room(arena, blocks_of(offset, length), self.bytes() == 0) {
                self.starved = true;
                return;
            }
            self.budget.reading += length as usize;
            if self.requests[id.key()].course.hand_out(length) {
                self.unasked.pop_front();
            }
            events.push(NbdEvent::Read { req: id, offset, length });
        }
    }
    /// Answers [`NbdEvent::Read`]; `offset` is the piece's, and the parts add up to its length.
    /// Pieces may be answered in any order.
    pub fn read_done(&mut self, id: ReqId, offset: u64, result: Result<ReadParts, NbdError>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.key()];
        let (at, length) = req.course.answer(offset);
        let parts = match result {
            Ok(parts) => {
                assert_eq!(bytes_of(&parts), length as usize, "the parts of an answer add up to its piece");
                Some(parts)
            }
            Err(error) => {
                req.error.get_or_insert((error, offset));
                None
            }
        };
        let structured = self.session.structured();
        let in_order = !structured || matches!(req.request.command, Command::Read { df: true });
        if in_order {
            self.answer_in_order(id, at, length, parts);
        } else {
            self.budget.reading -= length as usize;
            self.answer_in_chunks(id, offset, parts);
        }
    }
    fn answer_in_chunks(&mut self, id: ReqId, offset: u64, parts: Option<ReadParts>) {
        let req = &self.requests[id.key()];
        let (cookie, error) = (req.request.cookie, req.error);
        let last = req.course.is_answered();
        if let (Some(parts), None) = (parts, error) {
            self.send_chunks(cookie, offset, parts, last);
        }
        if last {
            if let Some((error, at)) = error {
                reply::error_at(cookie, error, &error.to_string(), at, self.text());
            }
            self.requests.remove(id.key());
        }
    }
    /// Neighbouring data is one chunk, however many buffers it lies in.
    fn send_chunks(&mut self, cookie: u64, mut offset: u64, parts: ReadParts, last: bool) {
        let mut parts = parts.into_iter().filter(|part| !part.is_empty()).peekable();
        while let Some(part) = parts.next() {
            let is_hole = matches!(part, ReadPart::Zeroes(_));
            let mut run = ReadParts::from_elem(part, 1);
            while let Some(part) = parts.next_if(|next| matches!(next, ReadPart::Zeroes(_)) == is_hole) {
                run.push(part);
            }
            let bytes = bytes_of(&run);
            let last = last && parts.peek().is_none();
            if is_hole {
                reply::hole(cookie, offset, bytes as u32, last, self.text());
            } else {
                reply::data(cookie, offset, bytes as u32, last, self.text());
                run.into_iter().for_each(|part| self.push(part));
            }
            offset += bytes as u64;
        }
    }
    fn push(&mut self, part: ReadPart) {
        if self.streaming.is_none() {
            return push_part(&mut self.stream, part);
        }
        self.waiting_bytes += self.waiting.last().map_or(0, Waiting::text_bytes) + part.len();
        self.waiting.push(Waiting::Part(part));
    }
    fn answer_in_order(&mut self, id: ReqId, at: u32, length: u32, parts: Option<ReadParts>) {
        let simple = !self.session.structured();
        let req = &mut self.requests[id.key()];
        if parts.is_none() && req.reading.begun && simple {
            self.state = State::Aborting(NbdCloseReason::ReadFailed);
            return;
        }
        let parts = parts.unwrap_or_else(|| ReadParts::from_elem(ReadPart::Zeroes(length), 1));
        req.reading.order.hold(at, parts);
        let was_streaming = self.streaming.is_some();
        self.advance(id);
        if !was_streaming || self.streaming.is_some() {
            return;
        }
        // The way is free again for those that had to wait.
        while self.streaming.is_none()
            && let Some(next) = self.next_ready()
        {
            self.advance(next);
        }
    }
    fn next_ready(&self) -> Option<ReqId> {
        let mut requests = self.requests.iter();
        requests.find(|(_, req)| self.is_ready(req)).map(|(key, _)| ReqId(key as u32))
    }
    /// Whether an unfragmented reply may begin: when all of it is here, so that no failure can
    /// come any more, or when it is too long to wait for.
    fn is_ready(&self, req: &Req) -> bool {
        let hold_bytes = HOLD_BYTES_MAX.min(self.budget.bytes_max / 2);
        let enough = req.course.is_answered() || req.request.length as usize > hold_bytes;
        enough && !req.reading.begun && req.error.is_none() && req.reading.order.has_first()
    }
    /// Sends what can be sent of an unfragmented reply.
    fn advance(&mut self, id: ReqId) {
        let req = &mut self.requests[id.key()];
        let whole = req.course.is_answered();
        if !req.reading.begun {
            if req.error.is_some() {
                // The whole reply will be an error; what is held is of no use.
                self.budget.reading -= req.reading.order.clear();
                if whole {
                    self.end_in_order(id);
                }
                return;
            }
            let req = &self.requests[id.key()];
            if self.streaming.is_some() || !self.is_ready(req) {
                return;
            }
            self.begin_in_order(id);
        }
        while self.send_next(id) {}
        if whole {
            self.end_in_order(id);
            self.end_streaming();
        }
    }
    /// Sends the next piece in order, if it is there.
    fn send_next(&mut self, id: ReqId) -> bool {
        let Some((_, parts)) = self.requests[id.key()].reading.order.next() else {
            return false;
        };
        self.budget.reading -= bytes_of(&parts);
        for part in parts {
            push_part(&mut self.stream, part);
        }
        true
    }
    /// From here to its end nothing else may be sent.
    fn begin_in_order(&mut self, id: ReqId) {
        let structured = self.session.structured();
        let Req { request, reading, course, .. } = &mut self.requests[id.key()];
        reading.begun = true;
        self.streaming = Some(id);
        if structured {
            // Only when all of it is here can nothing go wrong any more.
            reading.ended = course.is_answered();
            let (offset, length) = (request.offset, request.length);
            reply::data(request.cookie, offset, length, reading.ended, self.stream.text());
        } else {
            reply::simple_data(request.cookie, self.stream.text());
        }
    }
    fn end_in_order(&mut self, id: ReqId) {
        let structured = self.session.structured();
        let Req { request, reading, error, .. } = self.requests.remove(id.key());
        let text = if reading.begun { self.stream.text() } else { self.text() };
        match error {
            None if structured && !reading.ended => reply::none(request.cookie, text),
            None => {}
            Some((error, at)) if structured => {
                reply::error_at(request.cookie, error, &error.to_string(), at, text);
            }
            Some((error, _)) => reply::error(false, request.cookie, error, "", text),
        }
    }
    fn end_streaming(&mut self) {
        self.streaming = None;
        self.waiting_bytes = 0;
        for waiting in core::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::Text(text) => self.stream.text().extend_from_slice(&text),
                Waiting::Part(part) => push_part(&mut self.stream, part),
            }
        }
    }
    /// Where small replies go: behind the unfragmented one that is being sent, if there is one.
    pub(super) fn text(&mut self) -> &mut Vec<u8> {
        if self.streaming.is_none() {
            return self.stream.text();
        }
        waiting_text(&mut self.waiting)
    }
}

/// The text behind everything that waits.
pub(super) fn waiting_text(waiting: &mut Vec<Waiting>) -> &mut Vec<u8> {
    if !matches!(waiting.last(), Some(Waiting::Text(_))) {
        waiting.push(Waiting::Text(Vec::new()));
    }
    match waiting.last_mut() {
        Some(Waiting::Text(text)) => text,
        _ => unreachable!("just pushed"),
    }
}
