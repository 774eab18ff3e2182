//! Replies to reads: chunks as their pieces are answered, or one run of data in order.
//!
//! A structured reply sends each piece when it is answered, holes as holes. A simple reply,
//! and a structured one that must not be fragmented, is a header and then all data in order:
//! pieces that are answered early wait. Once such a header is out, a failure can be told only
//! by closing (simple) or by an error chunk behind zeroes in the data's place.

use super::answers::piece_at;
use super::{NbdCloseReason, NbdConn, NbdEvent, ReadPart, ReadParts, Req, ReqId, State, piece_length};
use protocol::nbd::{Command, NbdError, reply};
use protocol::types::BLOCK_BYTES;
use reactor::{Arena, IoBuf};
use std::collections::BTreeMap;

/// What was made of a read so far.
#[derive(Default)]
pub(super) struct Reading {
    /// The header of an unfragmented reply is out.
    begun: bool,
    /// That header ended the reply.
    ended: bool,
    /// Bytes that are out, in order.
    sent: u32,
    /// Answers that wait for an earlier one, by their offset within the request.
    held: BTreeMap<u32, ReadParts>,
}

impl NbdConn {
    /// Hands out pieces of reads as far as the budget goes.
    pub(super) fn ask_reads(&mut self, arena: &Arena, events: &mut Vec<NbdEvent>) {
        while let Some(&id) = self.unasked.front() {
            let req = &self.requests[id.0 as usize];
            let (begin, end) = (req.request.offset, req.request.length);
            let (offset, left) = (begin + u64::from(req.emitted), end - req.emitted);
            let length = piece_length(offset, left);
            if !self.has_budget(length as usize) {
                return;
            }
            if !self.has_room(arena, (length as usize).div_ceil(BLOCK_BYTES)) {
                self.starved = true;
                return;
            }
            self.reading_bytes += length as usize;
            let req = &mut self.requests[id.0 as usize];
            req.emitted += length;
            req.outstanding += 1;
            if req.emitted == req.request.length {
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
        let req = &mut self.requests[id.0 as usize];
        let length = piece_at(req, offset);
        req.answered += length;
        let parts = match result {
            Ok(parts) => {
                let bytes: usize = parts.iter().map(ReadPart::len).sum();
                assert_eq!(bytes, length as usize, "the parts of an answer add up to its piece");
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
            self.answer_in_order(id, offset, length, parts);
        } else {
            self.reading_bytes -= length as usize;
            self.answer_in_chunks(id, offset, parts);
        }
    }
    fn answer_in_chunks(&mut self, id: ReqId, offset: u64, parts: Option<ReadParts>) {
        let req = &self.requests[id.0 as usize];
        let (cookie, error) = (req.request.cookie, req.error);
        let last = req.answered == req.request.length;
        if let (Some(parts), None) = (parts, error) {
            self.send_chunks(cookie, offset, parts, last);
        }
        if last {
            if let Some((error, at)) = error {
                reply::error_at(cookie, error, &error.to_string(), at, self.stream.text());
            }
            self.requests.remove(id.0 as usize);
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
            let bytes: usize = run.iter().map(ReadPart::len).sum();
            let last = last && parts.peek().is_none();
            if is_hole {
                reply::hole(cookie, offset, bytes as u32, last, self.stream.text());
            } else {
                reply::data(cookie, offset, bytes as u32, last, self.stream.text());
                self.push_parts(run);
            }
            offset += bytes as u64;
        }
    }
    fn push_parts(&mut self, parts: ReadParts) {
        for part in parts {
            match part {
                ReadPart::Data { buf, from, to } => {
                    self.stream.push(IoBuf::part(buf, from as usize..to as usize));
                }
                ReadPart::Zeroes(bytes) => self.stream.push_zeroes(bytes as usize),
            }
        }
    }
    fn answer_in_order(&mut self, id: ReqId, offset: u64, length: u32, parts: Option<ReadParts>) {
        let simple = !self.session.structured();
        let req = &mut self.requests[id.0 as usize];
        if parts.is_none() && req.reading.begun && simple {
            self.state = State::Aborting(NbdCloseReason::ReadFailed);
            return;
        }
        let at = (offset - req.request.offset) as u32;
        let parts = parts.unwrap_or_else(|| ReadParts::from_elem(ReadPart::Zeroes(length), 1));
        req.reading.held.insert(at, parts);
        while self.send_next(id) {}
        let req = &self.requests[id.0 as usize];
        if req.answered == req.request.length {
            self.end_in_order(id);
        }
    }
    /// Sends the next piece in order, if it is there and may be sent.
    fn send_next(&mut self, id: ReqId) -> bool {
        let req = &mut self.requests[id.0 as usize];
        if req.error.is_some() && !req.reading.begun {
            // The whole reply will be an error; what is held is of no use.
            let held: usize = req.reading.held.values().flatten().map(ReadPart::len).sum();
            req.reading.held.clear();
            self.reading_bytes -= held;
            return false;
        }
        let Some(parts) = req.reading.held.remove(&req.reading.sent) else {
            return false;
        };
        let bytes: usize = parts.iter().map(ReadPart::len).sum();
        req.reading.sent += bytes as u32;
        self.begin_in_order(id);
        self.reading_bytes -= bytes;
        self.push_parts(parts);
        true
    }
    fn begin_in_order(&mut self, id: ReqId) {
        let structured = self.session.structured();
        let Req { request, reading, answered, .. } = &mut self.requests[id.0 as usize];
        if core::mem::replace(&mut reading.begun, true) {
            return;
        }
        if structured {
            // Only when all of it is here can nothing go wrong any more.
            let last = *answered == request.length;
            reading.ended = last;
            reply::data(request.cookie, request.offset, request.length, last, self.stream.text());
        } else {
            reply::simple_data(request.cookie, self.stream.text());
        }
    }
    fn end_in_order(&mut self, id: ReqId) {
        let structured = self.session.structured();
        let Req { request, reading, error, .. } = self.requests.remove(id.0 as usize);
        let text = self.stream.text();
        match error {
            None if structured && !reading.ended => reply::none(request.cookie, text),
            None => {}
            Some((error, at)) if structured => {
                reply::error_at(request.cookie, error, &error.to_string(), at, text);
            }
            Some((error, _)) => reply::error(false, request.cookie, error, "", text),
        }
    }
}
