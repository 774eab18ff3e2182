//! Encoders of replies to requests. Each appends to `out`; data of reads is sent behind by the caller.

use super::wire::*;

fn simple(cookie: u64, error: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

fn header(cookie: u64, kind: u16, done: bool, length: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&(if done { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Success of anything but a read or a block status; right with and without structured replies.
pub fn done(cookie: u64, out: &mut Vec<u8>) {
    simple(cookie, 0, out);
}

/// Failure of a whole request, before any data was sent. With `structured` the text goes along.
pub fn error(structured: bool, cookie: u64, error: NbdError, text: &str, out: &mut Vec<u8>) {
    if !structured {
        return simple(cookie, error.code(), out);
    }
    let text = cut(text);
    header(cookie, chunk::ERROR, true, 6 + text.len() as u32, out);
    out.extend_from_slice(&error.code().to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Structured: the read failed at `offset`; the last chunk of its reply.
pub fn error_at(cookie: u64, error: NbdError, text: &str, offset: u64, out: &mut Vec<u8>) {
    let text = cut(text);
    header(cookie, chunk::ERROR_OFFSET, true, 14 + text.len() as u32, out);
    out.extend_from_slice(&error.code().to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
}

/// Simple: the read succeeded; all of its data must follow.
pub fn simple_data(cookie: u64, out: &mut Vec<u8>) {
    simple(cookie, 0, out);
}

/// Structured: `length` bytes of data follow; `last` ends the reply.
pub fn data(cookie: u64, offset: u64, length: u32, last: bool, out: &mut Vec<u8>) {
    debug_assert!(length > 0);
    header(cookie, chunk::OFFSET_DATA, last, 8 + length, out);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// Structured: `length` bytes read as zeroes; nothing follows.
pub fn hole(cookie: u64, offset: u64, length: u32, last: bool, out: &mut Vec<u8>) {
    debug_assert!(length > 0);
    header(cookie, chunk::OFFSET_HOLE, last, 12, out);
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

/// Structured: extents as (bytes, holds data), in order, at least one, at most [`EXTENTS_MAX`].
pub fn block_status(cookie: u64, extents: &[(u32, bool)], out: &mut Vec<u8>) {
    assert!(!extents.is_empty() && extents.len() <= EXTENTS_MAX, "the caller merges and cuts extents");
    header(cookie, chunk::BLOCK_STATUS, true, 4 + 8 * extents.len() as u32, out);
    out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    for &(bytes, data) in extents {
        out.extend_from_slice(&bytes.to_be_bytes());
        out.extend_from_slice(&(if data { 0 } else { STATE_HOLE_ZERO }).to_be_bytes());
    }
}

/// Structured: the reply is over, and was a success unless an error chunk came before.
pub fn none(cookie: u64, out: &mut Vec<u8>) {
    header(cookie, chunk::NONE, true, 0, out);
}
