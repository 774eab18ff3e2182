//! The storage daemon: shards, the driver that joins them to the reactor, exports, metrics.
//!
//! [`run`] starts one [`core_loop::Core`] a shard and the control thread beside them. Within a
//! core: [`shard`] joins `copyset` and `chunkstore`, [`export`] serves NBD clients through
//! `client::volume`, [`links`] reaches the other shards ([`siblings`] those of this target), [`disk`] runs the
//! store's operations.
//! All of it is generic over `reactor::Reactor`. [`control`] is the only place where a
//! shard meets another thread.

pub mod assemble;
pub mod config;
pub mod control;
pub mod core_loop;
mod disk;
mod export;
mod files;
pub mod identity;
mod links;
mod lock;
mod mem;
pub mod metrics;
mod run;
mod shard;
pub mod siblings;
mod spread;
mod standing;
mod subsystems;
pub mod usage;

pub use chunkstore::InspectReport;
pub use run::{format, inspect, run};
pub use shard::{CopysetStanding, Counts};
