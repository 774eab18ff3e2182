//! The metadata server: names, places and watches; never on the IO path.
//!
//! ```text
//! service (tonic, intake) -> owner (one thread) -> state (pure: command -> changes + reply)
//!    ^ gate (who may call)              -> store (the changes, all or none: redb, or etcd)
//!    ^ seat (who answers) <- election (of several processes on etcd one leads)
//! ```
//!
//! A command is decided by [`state::State`], its changes are made durable by [`store::Store`],
//! and only then are they applied, published and answered. So what anyone was ever told survives
//! a restart. What only heartbeats tell (who is online, who leads) is kept in memory and comes
//! back with the next heartbeats. docs/format-mds.md draws the tables.
//!
//! Deliberately absent: anything that IO waits for.

pub mod durability;
mod election;
mod etcd;
#[cfg(test)]
#[path = "../tests/etcd_server/mod.rs"]
mod etcd_server;
pub mod gate;
pub mod intake;
pub mod lease;
mod metrics;
mod owner;
pub mod placement;
pub mod record;
mod seat;
mod server;
mod service;
pub mod snapshot;
pub mod state;
pub mod store;
pub mod view;

pub use etcd::EtcdAt;
pub use server::{Args, Config, Server, StoreArgs, StoreAt, run};
