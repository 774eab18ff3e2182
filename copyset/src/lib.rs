//! Raft as a pure state machine: one replica of one copyset.
//!
//! [`Replica`] takes events (messages, proposals, the passing of time, completed
//! disk writes) and answers with [`Action`]s, drained by [`Replica::poll`]. It holds
//! entry descriptors only; the shard keeps their payloads by index.
//!
//! Invariants: floor <= applied <= commit <= last; what is handed out to be applied is
//! committed *and* durable here; no vote and no acknowledgement leaves before what it
//! promises is durable; a leader counts itself like any other voter.
//!
//! Absent on purpose: IO, clocks, threads, ambient randomness (elections are jittered by a
//! generator seeded in [`Config`]), payloads, and any knowledge of chunks.

mod api;
mod digest;
mod election;
mod follow;
mod health;
mod log;
mod membership;
mod progress;
mod queue;
mod read;
mod replica;
mod replication;
mod rng;

pub use api::{Action, Config, Health, Lag, ReadGrant, Recovered, Refused, Role};
pub use protocol::raft::{Body, Entry, HardState, Kind, Member, Members, Message};
pub use replica::Replica;
