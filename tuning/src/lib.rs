//! `ashlar tune`: a host made ready for polled storage, and put back exactly as it was.
//!
//! A closed table of [`tuners`] looks at a [`machine::Machine`] (a tree of small files and some
//! facts) and says what is there, what is wanted and what to write; the [`engine`] writes it with a
//! [`journal`] so that it can be undone; [`probe`] measures disks and writes the [`device`] file
//! that a target reads; [`start`] is what a target asks when it starts.
//!
//! Invariants: nothing is written before the old value is durable in the journal; undo writes only
//! where the value is still ours; every verdict is a pure function of tree and facts.
//! Deliberately absent: settings that outlive a restart. A unit applies them again.

mod auto;
mod command;
pub mod cpus;
pub mod device;
mod docs;
pub mod engine;
mod ethtool;
pub mod facts;
pub mod fixture;
pub mod journal;
mod latency;
pub mod look;
pub mod machine;
pub mod model;
pub mod plan;
mod probe;
mod render;
mod script;
pub mod start;
pub mod tree;
pub mod tuners;

pub use command::{Exit, TuneCommand, run};
pub use docs::page as docs_page;
pub use latency::LatencyHold;
