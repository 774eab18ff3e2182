//! The volume as seen from outside: routing, splitting, retries; and the MDS's client.
//!
//! [`volume`] is sans-IO and deterministic: exports, bench and simulator run the same code.
//! Only [`control`] opens sockets, and only to the control plane.

pub mod control;
pub mod volume;
