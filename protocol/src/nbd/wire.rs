//! The numbers of the NBD protocol, and our limits on what a client may send.

/// `NBDMAGIC`, the server's first word.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes before an option's data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes before the data of a reply to an option.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Bytes of a request, without a write's payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply, without a read's data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured chunk's header.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// Longest name or description, as the protocol has it.
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest data of an option that is looked at: a name, and meta context queries.
pub const OPTION_BYTES_MAX: usize = 16 << 10;
/// Longest data of an option that is skipped with an error; a longer one closes the connection.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Most options of one negotiation; a client that haggles on is cut off.
pub const OPTIONS_MAX: u32 = 65_536;
/// Longest read and longest write: the maximum block size that is advertised.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest payload of a refused write that is skipped; a longer one closes the connection.
pub const PAYLOAD_SKIP_BYTES_MAX: u32 = 64 << 20;
/// What [`super::Session::feed`] may need to see at once to make progress.
pub const FEED_BYTES_MAX: usize = OPTION_HEADER_BYTES + OPTION_BYTES_MAX;
/// Longest text of an error chunk.
pub const TEXT_BYTES_MAX: usize = 256;
/// Most extents of one reply to a block status request.
pub const EXTENTS_MAX: usize = 4096;
/// The preferred block size that is advertised.
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;

/// Handshake flag, both ways: options have replies.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag, both ways: no padding after `NBD_OPT_EXPORT_NAME`.
pub const NO_ZEROES: u16 = 2;

/// Options of the negotiation.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information within a `rep::INFO`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Types of requests.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of structured chunks, and the flag that ends a reply.
pub mod chunk {
    #![allow(missing_docs)]
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The one meta context there is.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number once it was selected.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// State of an extent of [`BASE_ALLOCATION`] without data: a hole that reads as zeroes.
pub const STATE_HOLE_ZERO: u32 = 3;

/// The errors that NBD knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NbdError {
    /// Read-only export.
    #[error("operation not permitted")]
    NotPermitted,
    /// Data could not be read or written.
    #[error("input/output error")]
    Io,
    /// A senseless request.
    #[error("invalid request")]
    Invalid,
    /// No room for the data, or past the end of the export.
    #[error("no space left")]
    NoSpace,
    /// Too large to be answered in one chunk.
    #[error("too large for one chunk")]
    Overflow,
    /// Not to be had (a fast zero).
    #[error("not supported")]
    NotSupported,
    /// The server is stopping.
    #[error("server is shutting down")]
    Shutdown,
}

impl NbdError {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            NbdError::NotPermitted => 1,
            NbdError::Io => 5,
            NbdError::Invalid => 22,
            NbdError::NoSpace => 28,
            NbdError::Overflow => 75,
            NbdError::NotSupported => 95,
            NbdError::Shutdown => 108,
        }
    }
}
