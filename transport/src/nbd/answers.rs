//! The caller's answers, and the replies they make.

use super::{NbdConn, State};
use crate::pieces::{ReqId, count_answer, piece_charge};
use protocol::nbd::wire::EXTENTS_MAX;
use protocol::nbd::{ExportInfo, NbdError, Refusal, reply};

impl NbdConn {
    /// Answers [`super::NbdEvent::OpenExport`]. Ignored when the connection is over.
    pub fn answer_export(&mut self, answer: Result<ExportInfo, Refusal>) {
        self.question_answered();
        if !matches!(self.state, State::Open) {
            return;
        }
        if let Err(violation) = self.session.answer_export(answer, self.stream.text()) {
            self.violated(violation);
        }
    }
    /// Answers [`super::NbdEvent::ListExports`] with (name, description). Ignored when the connection is over.
    pub fn answer_list(&mut self, exports: &[(String, String)]) {
        self.question_answered();
        if matches!(self.state, State::Open) {
            self.session.answer_list(exports, self.stream.text());
        }
    }
    fn question_answered(&mut self) {
        assert!(core::mem::replace(&mut self.asking, false), "an event is answered once");
        self.dirty = true;
    }
    /// Answers [`super::NbdEvent::WritePiece`]; `offset` is the piece's.
    pub fn write_piece_done(&mut self, id: ReqId, offset: u64, result: Result<(), NbdError>) {
        if !self.answered(id) {
            return;
        }
        let req = &mut self.requests[id.key()];
        let (_, length) = req.course.answer(offset);
        if let Err(error) = result {
            req.error.get_or_insert((error, offset));
        }
        self.budget.writing -= piece_charge(offset, length);
        self.finish_write(id);
    }
    /// Answers [`super::NbdEvent::Zero`].
    pub fn zero_done(&mut self, id: ReqId, result: Result<(), NbdError>) {
        self.finish(id, result);
    }
    /// Answers [`super::NbdEvent::Flush`].
    pub fn flush_done(&mut self, id: ReqId, result: Result<(), NbdError>) {
        self.finish(id, result);
    }
    /// Answers [`super::NbdEvent::Status`] with runs of (bytes, holds data) from the request's offset on; they
    /// may cover less than was asked, but something.
    pub fn status_done(&mut self, id: ReqId, result: Result<&[(u64, bool)], NbdError>) {
        if !self.answered(id) {
            return;
        }
        let request = self.requests.remove(id.key()).request;
        let one = matches!(request.command, protocol::nbd::Command::BlockStatus { one: true });
        let extents = result.map(|runs| extents(runs, request.length, one));
        let text = self.text();
        match extents {
            Ok(extents) => reply::block_status(request.cookie, &extents, text),
            Err(error) => reply::error(true, request.cookie, error, &error.to_string(), text),
        }
    }
    fn finish(&mut self, id: ReqId, result: Result<(), NbdError>) {
        if !self.answered(id) {
            return;
        }
        let cookie = self.requests.remove(id.key()).request.cookie;
        self.reply(cookie, result);
    }
    fn reply(&mut self, cookie: u64, result: Result<(), NbdError>) {
        let structured = self.session.structured();
        let text = self.text();
        match result {
            Ok(()) => reply::done(cookie, text),
            Err(error) => reply::error(structured, cookie, error, &error.to_string(), text),
        }
    }
    /// Replies once the last piece has come and is answered.
    pub(super) fn finish_write(&mut self, id: ReqId) {
        let req = &self.requests[id.key()];
        if !req.course.is_answered() {
            return;
        }
        let req = self.requests.remove(id.key());
        self.reply(req.request.cookie, req.error.map_or(Ok(()), |(error, _)| Err(error)));
    }
    /// Counts an answer; false when it comes too late to matter.
    pub(super) fn answered(&mut self, id: ReqId) -> bool {
        self.dirty = true;
        count_answer(&mut self.requests, id, matches!(self.state, State::Closed))
    }
}

/// Merges equal neighbours and keeps to the request and to the limit of one reply.
fn extents(runs: &[(u64, bool)], length: u32, one: bool) -> Vec<(u32, bool)> {
    let most = if one { 1 } else { EXTENTS_MAX };
    let mut left = length;
    let mut extents: Vec<(u32, bool)> = Vec::new();
    for &(bytes, data) in runs {
        let bytes = bytes.min(left.into()) as u32;
        if bytes == 0 {
            continue;
        }
        left -= bytes;
        let full = extents.len() == most;
        match extents.last_mut() {
            Some(last) if last.1 == data => last.0 += bytes,
            Some(_) if full => break,
            _ => extents.push((bytes, data)),
        }
    }
    assert!(!extents.is_empty(), "a status covers at least something");
    extents
}
