//! The caller's answers to IO, and what the host gets of them.
//!
//! Data of a read is sent in order, a PDU a piece; the last one may end the command. Pieces that
//! are answered early wait. A failure is told by the response, whatever data went before.

use super::{Kind, NvmeConn, NvmeEvent, ReqId, State, ZEROES_MAX};
use crate::pieces::{ReadPart, ReadParts, blocks_of, bytes_of, count_answer, lead, piece_charge, push_part};
use protocol::nvme_tcp::{IoCommand, Status};
use protocol::types::BLOCK_BYTES;
use reactor::Arena;

impl NvmeConn {
    /// Hands out pieces of reads as far as the budget goes.
    pub(super) fn ask_reads(&mut self, arena: &Arena, events: &mut Vec<NvmeEvent>) {
        while let Some(&id) = self.unasked.front() {
            let req = &mut self.requests[id.key()];
            if req.error.is_some() {
                // The rest cannot mend it.
                req.course.skip(req.course.length - req.course.emitted);
                self.unasked.pop_front();
                self.finish_if_over(id);
                continue;
            }
            let (offset, length) = req.course.next();
            if !self.has_budget(length as usize) {
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
            events.push(NvmeEvent::Read { req: id, offset, length });
        }
    }
    /// Answers [`NvmeEvent::Read`]; `offset` is the piece's, and the parts add up to its length.
    /// Pieces may be answered in any order.
    pub fn read_done(&mut self, id: ReqId, offset: u64, result: Result<ReadParts, Status>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.key()];
        let (at, length) = req.course.answer(offset);
        let parts = match result {
            Ok(parts) => {
                assert_eq!(bytes_of(&parts), length as usize, "the parts of an answer add up to its piece");
                parts
            }
            Err(status) => {
                req.error.get_or_insert(status);
                ReadParts::new()
            }
        };
        if matches!(req.kind, Kind::Io(IoCommand::Read)) && req.error.is_none() {
            req.order.hold(at, parts);
            return self.send_held(id);
        }
        if let Some(sent) = req.compare.remove(&at) {
            let lead = lead(offset);
            if req.error.is_none() && !is_equal(&sent[lead..lead + length as usize], &parts) {
                req.error = Some(Status::COMPARE_FAILURE.dnr());
            }
            self.budget.writing -= piece_charge(offset, length);
        }
        drop(parts);
        self.budget.reading -= length as usize + req.order.clear();
        self.finish_if_over(id);
    }
    /// Sends what can be sent in order.
    fn send_held(&mut self, id: ReqId) {
        while let Some((at, parts)) = self.requests[id.key()].order.next() {
            let length = bytes_of(&parts);
            self.budget.reading -= length;
            if self.send_piece(id, at, length as u32, parts) {
                // The data's flag has answered it.
                let req = self.requests.remove(id.key());
                self.served.count(IoCommand::Read, req.course.length, Status::SUCCESS);
                return;
            }
        }
        self.finish_if_over(id);
    }
    /// True if that answered the request.
    fn send_piece(&mut self, id: ReqId, at: u32, length: u32, parts: ReadParts) -> bool {
        let req = &self.requests[id.key()];
        let last = req.order.sent == req.course.length;
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
        let req = &mut self.requests[id.key()];
        let (_, length) = req.course.answer(offset);
        if let Err(status) = result {
            req.error.get_or_insert(status);
        }
        self.budget.writing -= piece_charge(offset, length);
        self.finish_if_over(id);
    }
    /// Answers [`NvmeEvent::Zero`].
    pub fn zero_done(&mut self, id: ReqId, result: Result<(), Status>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.key()];
        if matches!(req.kind, Kind::Io(IoCommand::Deallocate { .. })) {
            self.zeroing -= 1;
        }
        if let Err(status) = result {
            req.error.get_or_insert(status);
            // The rest cannot mend it.
            req.unzeroed.clear();
        }
        self.finish_if_over(id);
    }
    /// Hands out ranges to be deallocated, so many at a time.
    pub(super) fn ask_zeroes(&mut self, events: &mut Vec<NvmeEvent>) {
        while let Some(&id) = self.unzeroed.front() {
            let req = &mut self.requests[id.key()];
            while self.zeroing < ZEROES_MAX
                && let Some((offset, length)) = req.unzeroed.pop()
            {
                self.zeroing += 1;
                req.course.outstanding += 1;
                events.push(NvmeEvent::Zero { req: id, offset, length, trim: true });
            }
            if !req.unzeroed.is_empty() {
                return;
            }
            self.unzeroed.pop_front();
        }
    }
    /// Answers [`NvmeEvent::Flush`].
    pub fn flush_done(&mut self, id: ReqId, result: Result<(), Status>) {
        if !self.answered(id) {
            return;
        }
        if let Err(status) = result {
            self.requests[id.key()].error.get_or_insert(status);
        }
        self.finish_if_over(id);
    }
    /// Responds if nothing of the request is left to be waited for.
    pub(super) fn finish_if_over(&mut self, id: ReqId) {
        let req = &self.requests[id.key()];
        let whole = match req.kind {
            // What failed asks for no more data, but takes what it asked for.
            _ if req.is_out() && req.error.is_some() => req.transfers == 0,
            _ if req.is_out() => {
                req.taken == req.course.length && req.course.is_answered() && req.unzeroed.is_empty()
            }
            Kind::Io(IoCommand::Read | IoCommand::Verify) => req.course.is_answered(),
            _ => true,
        };
        if whole && req.course.outstanding == 0 && req.order.is_empty() {
            self.finish(id);
        }
    }
    pub(super) fn finish(&mut self, id: ReqId) {
        let req = self.requests.remove(id.key());
        if req.listed {
            self.ungranted.retain(|listed| *listed != id);
        }
        if matches!(req.kind, Kind::Io(IoCommand::Deallocate { .. })) {
            self.unzeroed.retain(|waits| *waits != id);
        }
        let status = req.error.unwrap_or(Status::SUCCESS);
        if let Kind::Io(command) = req.kind {
            self.served.count(command, req.course.length, status);
        }
        self.session.respond(req.cid, status, 0, self.stream.text());
    }
    /// Counts an answer; false when it comes too late to matter.
    fn answered(&mut self, id: ReqId) -> bool {
        self.dirty = true;
        count_answer(&mut self.requests, id, matches!(self.state, State::Closed))
    }
}

/// A part's bytes; zeroes come in runs that have memory behind them.
fn runs(part: &ReadPart) -> impl Iterator<Item = &[u8]> {
    static ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let (data, zeroes): (&[u8], usize) = match part {
        ReadPart::Data { buf, from, to, .. } => (&buf[*from as usize..*to as usize], 0),
        ReadPart::Zeroes(bytes) => (&[], *bytes as usize),
    };
    let rests = (0..zeroes).step_by(BLOCK_BYTES).map(move |at| &ZEROES[..(zeroes - at).min(BLOCK_BYTES)]);
    core::iter::once(data).chain(rests)
}

/// The digest of an answer; a lone block brings its own along.
fn crc_of(parts: &ReadParts) -> u32 {
    if let [ReadPart::Data { crc: Some(crc), .. }] = parts[..] {
        return crc;
    }
    parts.iter().flat_map(runs).fold(0, crc32c::crc32c_append)
}

fn is_equal(mut sent: &[u8], parts: &ReadParts) -> bool {
    parts.iter().flat_map(runs).all(|run| {
        let (head, rest) = sent.split_at(run.len());
        sent = rest;
        head == run
    })
}
