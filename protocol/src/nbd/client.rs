//! A small client side, for tests and probes: encodes options and requests, takes replies apart.
//!
//! Deliberately absent: any state. Whoever uses it knows what it asked for, so the data behind
//! a simple reply to a read is for the caller to take.

use super::wire::*;

/// What the server sent makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplyError {
    /// Neither kind of reply starts so.
    #[error("reply magic is {0:#x}")]
    Magic(u64),
    /// More data than any reply has.
    #[error("reply of {0} bytes")]
    Length(u32),
}

/// One reply to an option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptionReply {
    /// To which.
    pub option: u32,
    /// One of [`rep`].
    pub kind: u32,
    /// What follows.
    pub data: Vec<u8>,
}

/// One reply, or chunk of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// A simple reply; the data of a read that succeeded follows.
    Simple {
        /// The request's.
        cookie: u64,
        /// 0 or the number of an [`NbdError`].
        error: u32,
    },
    /// A chunk of a structured reply.
    Chunk {
        /// The request's.
        cookie: u64,
        /// One of [`chunk`].
        kind: u16,
        /// The last of its reply.
        done: bool,
        /// What follows.
        data: Vec<u8>,
    },
}

/// Longest data of a reply that is accepted: a read's, with its offset.
const DATA_BYTES_MAX: u32 = PAYLOAD_BYTES_MAX + 8;

/// Appends an option.
pub fn option(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

fn string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Appends [`opt::INFO`] or [`opt::GO`], asking for these [`info`]s.
pub fn info_option(which: u32, name: &str, infos: &[u16], out: &mut Vec<u8>) {
    let mut data = Vec::new();
    string(name, &mut data);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    option(which, &data, out);
}

/// Appends [`opt::LIST_META_CONTEXT`] or [`opt::SET_META_CONTEXT`].
pub fn meta_option(which: u32, name: &str, queries: &[&str], out: &mut Vec<u8>) {
    let mut data = Vec::new();
    string(name, &mut data);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        string(query, &mut data);
    }
    option(which, &data, out);
}

/// Appends a request of a [`cmd`] with [`cmd_flag`]s; a write's payload must follow.
pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// Takes one reply to an option from the front; with it how many bytes it had. `None`: more must come.
pub fn option_reply(bytes: &[u8]) -> Result<Option<(usize, OptionReply)>, ReplyError> {
    if bytes.len() < OPTION_REPLY_HEADER_BYTES {
        return Ok(None);
    }
    if u64_at(bytes, 0) != OPTION_REPLY_MAGIC {
        return Err(ReplyError::Magic(u64_at(bytes, 0)));
    }
    let length = u32_at(bytes, 16);
    if length > DATA_BYTES_MAX {
        return Err(ReplyError::Length(length));
    }
    let end = OPTION_REPLY_HEADER_BYTES + length as usize;
    let Some(data) = bytes.get(OPTION_REPLY_HEADER_BYTES..end) else {
        return Ok(None);
    };
    let reply = OptionReply { option: u32_at(bytes, 8), kind: u32_at(bytes, 12), data: data.to_vec() };
    Ok(Some((end, reply)))
}

/// Takes one reply, or chunk of one, from the front; with it how many bytes it had. `None`: more must come.
pub fn reply(bytes: &[u8]) -> Result<Option<(usize, Reply)>, ReplyError> {
    if bytes.len() < SIMPLE_REPLY_BYTES {
        return Ok(None);
    }
    match u32_at(bytes, 0) {
        SIMPLE_REPLY_MAGIC => {
            let reply = Reply::Simple { error: u32_at(bytes, 4), cookie: u64_at(bytes, 8) };
            Ok(Some((SIMPLE_REPLY_BYTES, reply)))
        }
        STRUCTURED_REPLY_MAGIC => chunk_reply(bytes),
        magic => Err(ReplyError::Magic(magic.into())),
    }
}

fn chunk_reply(bytes: &[u8]) -> Result<Option<(usize, Reply)>, ReplyError> {
    if bytes.len() < CHUNK_HEADER_BYTES {
        return Ok(None);
    }
    let length = u32_at(bytes, 16);
    if length > DATA_BYTES_MAX {
        return Err(ReplyError::Length(length));
    }
    let end = CHUNK_HEADER_BYTES + length as usize;
    let Some(data) = bytes.get(CHUNK_HEADER_BYTES..end) else {
        return Ok(None);
    };
    let done = u16_at(bytes, 4) & chunk::FLAG_DONE != 0;
    let reply = Reply::Chunk { cookie: u64_at(bytes, 8), kind: u16_at(bytes, 6), done, data: data.to_vec() };
    Ok(Some((end, reply)))
}
