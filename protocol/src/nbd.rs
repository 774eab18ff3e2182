//! NBD, the server's side of fixed newstyle: bytes to requests, answers to bytes.
//!
//! [`Session`] is fed what a client sent and yields [`Event`]s; it writes its own answers to
//! negotiation and to senseless requests, and the `reply` functions encode the others. It
//! never holds a payload: after [`Event::Request`] with [`Command::Write`] the caller takes
//! `length` bytes off the stream itself before it feeds on.
//!
//! Deliberately absent: TLS, oldstyle, extended headers, resize, and any queue of requests
//! (see the `transport` crate). The rules are those of `doc/proto.md` of NetworkBlockDevice/nbd.

pub mod client;
mod options;
pub mod reply;
mod session;
pub mod wire;

pub use session::{Session, Violation};
pub use wire::NbdError;

/// What a caller offers under a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// The caller's own word for it, told back in [`Event::Attached`].
    pub id: u64,
    /// The canonical name (a client may have asked for the empty, default one).
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub bytes: u64,
    /// The smallest unit of IO: 512 or 4096.
    pub block_bytes: u32,
    /// Writes are refused with `EPERM`.
    pub read_only: bool,
}

/// Why a name is not offered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// There is none of that name.
    Unknown,
    /// There is, but not for this client or not now; the text says why.
    Policy(String),
    /// The server is stopping.
    Shutdown,
}

/// What a session makes of the bytes it was fed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The client asks about an export: answer with [`Session::answer_export`]; until then nothing more is read.
    Export {
        /// As asked, possibly empty for the default export; at most [`wire::NAME_BYTES_MAX`] bytes.
        name: String,
    },
    /// The client asks what there is: answer with [`Session::answer_list`]; until then nothing more is read.
    List,
    /// Negotiation is over; requests follow.
    Attached(ExportInfo),
    /// One request, within the export and its limits.
    Request(Request),
    /// The client took its leave: finish what is in flight, then close.
    Disconnect,
}

/// One request; `offset` and `length` are multiples of the export's block size and lie within it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The client's handle, told back in the reply.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes: at most [`wire::PAYLOAD_BYTES_MAX`] for reads and writes, up to 4 GiB - 1 else.
    pub length: u32,
    /// The answer must wait until the data is on stable storage.
    pub fua: bool,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read; `df` asks for a single chunk of data.
    Read {
        /// "Don't fragment".
        df: bool,
    },
    /// Write; the payload follows on the stream.
    Write,
    /// Make earlier acknowledged writes durable.
    Flush,
    /// The range's content is no longer needed.
    Trim,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Keep the space allocated.
        no_hole: bool,
        /// Refuse unless it is faster than writing.
        fast: bool,
    },
    /// The client will read the range soon.
    Cache,
    /// Which parts hold data?
    BlockStatus {
        /// Only the first extent is wanted.
        one: bool,
    },
}

#[cfg(test)]
mod tests;
