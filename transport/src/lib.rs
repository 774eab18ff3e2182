//! Socket loops between the reactor and the sans-IO protocols.
//!
//! A connection is a value owned by its shard: the shard hands it completions and answers,
//! then pumps it, and it appends events. Payload goes from the socket straight into arena
//! buffers and from arena buffers straight to the socket.
//!
//! Deliberately absent: listening, connecting and routing (the shard does these), threads,
//! clocks, and any knowledge of volumes.

pub mod nbd;
pub mod nvme;
pub mod peer;
pub mod pieces;
#[cfg(test)]
mod rig;
pub mod stream;
pub mod token;

pub use nbd::{NbdCloseReason, NbdConn, NbdEvent, NbdLimits};
pub use nvme::{NvmeCloseReason, NvmeConn, NvmeEvent, NvmeLimits};
pub use peer::{PeerCloseReason, PeerConn, PeerEvent, PeerLimits};
pub use pieces::{ReadPart, ReadParts, ReqId};
pub use stream::STAGING_BLOCKS;
pub use stream::{Fill, Happened, Stream};
pub use token::Owner;
