//! The metadata server: names, places and watches; never on the IO path.
//!
//! ```text
//! service (tonic, intake) -> owner (one thread) -> state (pure: command -> changes + reply)
//!                                       -> store (redb: the changes, one synced transaction)
//! ```
//!
//! A command is decided by [`state::State`], its changes are made durable by [`store::Store`],
//! and only then are they applied, published and answered. So what anyone was ever told survives
//! a restart. What only heartbeats tell (who is online, who leads) is kept in memory and comes
//! back with the next heartbeats. docs/format-mds.md draws the tables.
//!
//! Deliberately absent: anything that IO waits for. Several MDS processes on etcd come later.

pub mod durability;
pub mod intake;
mod owner;
pub mod placement;
pub mod record;
mod server;
mod service;
pub mod state;
pub mod store;
mod view;

pub use server::{Args, Config, Server, run};
