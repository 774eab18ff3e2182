//! The caller's answers to IO, and what the host gets of them.
//!
//! Data of a read is sent in order, a PDU a piece; the last one may end the command. Pieces that
//! are answered early wait. A failure is told by the response, whatever data went before.

use super::{Kind, NvmeConn, NvmeEvent, ReqId, State};
use crate::nbd::{ReadPart, ReadParts, piece_charge, piece_length, push_part};
use protocol::nvme_tcp::{IoCommand, Status};
use protocol::types::BLOCK_BYTES;
use reactor::Arena;

impl NvmeConn {
    /// Hands out pieces of reads as far as the budget goes.
    pub(super) fn ask_reads(&mut self, arena: &Arena, events: &mut Vec<NvmeEvent>) {
        while let Some(&id) = self.unasked.front() {
            let req = &mut self.requests[id.0 as usize];
            if req.error.is_some() {
                // The rest cannot mend it.
                req.answered += req.length - req.emitted;
                req.emitted = req.length;
                self.unasked.pop_front();
                self.finish_if_over(id);
                continue;
            }
            let (offset, left) = (req.offset + u64::from(req.emitted), req.length - req.emitted);
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
            if req.emitted == req.length {
                self.unasked.pop_front();
            }
            events.push(NvmeEvent::Read { req: id, offset, length });
        }
    }
    /// Answers [`NvmeEvent::Read`]; `offset` is the piece's, and the parts add up to its length.
    /// Pieces may be answered in any order.
    pub fn read_done(&mut self, id: ReqId, offset: u64, result: Result<ReadParts, Status>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.0 as usize];
        let at = (offset - req.offset) as u32;
        let length = piece_length(offset, req.length - at);
        req.answered += length;
        let mut parts = result.unwrap_or_else(|status| {
            req.error.get_or_insert(status);
            ReadParts::new()
        });
        if req.error.is_none() {
            let bytes: usize = parts.iter().map(ReadPart::len).sum();
            assert_eq!(bytes, length as usize, "the parts of an answer add up to its piece");
        }
        if matches!(req.kind, Kind::Io(IoCommand::Read)) {
            req.held.insert(at, parts);
            return self.send_held(id);
        }
        if let Some(sent) = req.compare.remove(&at) {
            let lead = offset as usize % BLOCK_BYTES;
            if req.error.is_none() && !is_equal(&sent[lead..lead + length as usize], &parts) {
                req.error = Some(Status::COMPARE_FAILURE.dnr());
            }
            self.writing_bytes -= piece_charge(offset, length);
        }
        parts.clear();
        self.reading_bytes -= length as usize;
        self.finish_if_over(id);
    }
    /// Sends what can be sent in order; with an error nothing more is.
    fn send_held(&mut self, id: ReqId) {
        loop {
            let req = &mut self.requests[id.0 as usize];
            let next = req.held.first_key_value().map(|(at, _)| *at);
            let Some(at) = next.filter(|&at| at == req.sent || req.error.is_some()) else { break };
            let parts = req.held.remove(&at).expect("just seen");
            let length = piece_length(req.offset + u64::from(at), req.length - at);
            self.reading_bytes -= length as usize;
            if req.error.is_some() {
                continue;
            }
            req.sent += length;
            if self.send_piece(id, at, length, parts) {
                // The data's flag has answered it.
                let req = self.requests.remove(id.0 as usize);
                self.served.count(IoCommand::Read, req.length, Status::SUCCESS);
                return;
            }
        }
        self.finish_if_over(id);
    }
    /// True if that answered the request.
    fn send_piece(&mut self, id: ReqId, at: u32, length: u32, parts: ReadParts) -> bool {
        let req = &self.requests[id.0 as usize];
        let last = req.sent == req.length;
        let digest = self.session.digests().data;
        let crc = if digest { crc_of(&parts) } else { 0 };
        let over = self.session.begin_data(req.cid, at, length, last, true, self.stream.text());
        for part in parts {
            push_part(&mut self.stream, part);
        }
        self.session.end_data(crc, self.stream.text());
        over
    }
    /// Answers [`NvmeEvent::WritePiece`]; `offset` is the piece's.
    pub fn write_piece_done(&mut self, id: ReqId, offset: u64, result: Result<(), Status>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.0 as usize];
        let length = piece_length(offset, req.length - (offset - req.offset) as u32);
        req.answered += length;
        if let Err(status) = result {
            req.error.get_or_insert(status);
        }
        self.writing_bytes -= piece_charge(offset, length);
        self.finish_if_over(id);
    }
    /// Answers [`NvmeEvent::Zero`].
    pub fn zero_done(&mut self, id: ReqId, result: Result<(), Status>) {
        if !self.answered(id) {
            return;
        }
        if let Err(status) = result {
            self.requests[id.0 as usize].error.get_or_insert(status);
        }
        self.finish_if_over(id);
    }
    /// Answers [`NvmeEvent::Flush`].
    pub fn flush_done(&mut self, id: ReqId, result: Result<(), Status>) {
        self.zero_done(id, result);
    }
    /// Responds if nothing of the request is left to be waited for.
    pub(super) fn finish_if_over(&mut self, id: ReqId) {
        let req = &self.requests[id.0 as usize];
        let whole = match req.kind {
            // What failed asks for no more data, but takes what it asked for.
            _ if req.is_out() && req.error.is_some() => req.transfers == 0,
            _ if req.is_out() => req.taken == req.length && req.answered == req.length,
            Kind::Io(IoCommand::Read | IoCommand::Verify) => req.answered == req.length,
            _ => true,
        };
        if whole && req.outstanding == 0 && req.held.is_empty() {
            self.finish(id);
        }
    }
    pub(super) fn finish(&mut self, id: ReqId) {
        let req = self.requests.remove(id.0 as usize);
        if req.listed {
            self.ungranted.retain(|listed| *listed != id);
        }
        let status = req.error.unwrap_or(Status::SUCCESS);
        if let Kind::Io(command) = req.kind {
            self.served.count(command, req.length, status);
        }
        self.session.respond(req.cid, status, 0, self.stream.text());
    }
    /// Counts an answer; false when it comes too late to matter.
    fn answered(&mut self, id: ReqId) -> bool {
        self.dirty = true;
        let req = self.requests.get_mut(id.0 as usize).expect("an event is answered once, by its request");
        req.outstanding = req.outstanding.checked_sub(1).expect("an event is answered once");
        if matches!(self.state, State::Closed) {
            if req.outstanding == 0 {
                self.requests.remove(id.0 as usize);
            }
            return false;
        }
        true
    }
}

/// A part's bytes; zeroes come in runs that have memory behind them.
fn runs(part: &ReadPart) -> impl Iterator<Item = &[u8]> {
    static ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let (data, zeroes): (&[u8], usize) = match part {
        ReadPart::Data { buf, from, to } => (&buf[*from as usize..*to as usize], 0),
        ReadPart::Zeroes(bytes) => (&[], *bytes as usize),
    };
    let rests = (0..zeroes).step_by(BLOCK_BYTES).map(move |at| &ZEROES[..(zeroes - at).min(BLOCK_BYTES)]);
    core::iter::once(data).chain(rests)
}

fn crc_of(parts: &ReadParts) -> u32 {
    parts.iter().flat_map(runs).fold(0, crc32c::crc32c_append)
}

fn is_equal(mut sent: &[u8], parts: &ReadParts) -> bool {
    parts.iter().flat_map(runs).all(|run| {
        let (head, rest) = sent.split_at(run.len());
        sent = rest;
        head == run
    })
}
