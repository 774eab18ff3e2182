//! What a shard stores and how: log, slots, overlay, checkpoint, recovery, as pure planning.
//!
//! [`Store`] is a state machine without IO: calls and completions go in, [`Op`]s and [`Event`]s
//! come out. After every call, drain [`Store::poll_op`] and [`Store::poll_event`] until both are
//! empty, and call [`Store::poll_op`] again when [`Store::next_timeout`] has passed.
//!
//! Deliberately absent: files, clocks, threads, randomness, sockets, and Raft. What is committed
//! is told from outside; here an entry is a descriptor with blocks.
//!
//! Every byte on disk is drawn in `docs/format.md`.

mod api;
mod batch;
mod checkpoint;
mod driver;
mod flush;
mod inspect;
mod log;
mod overlay;
mod pool;
mod preformat;
mod read;
mod recover;
mod round;
mod spares;
mod store;
mod superblock;
mod table;
mod tables;
mod walk;
mod wire;

pub use api::*;
pub use inspect::*;
pub use recover::*;
pub use store::{Store, waiting_max};
