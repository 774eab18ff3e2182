//! Bytes to types and back, for every protocol that Ashlar speaks.
//!
//! Sans-IO: nothing here opens a socket, reads a clock, draws a random number or
//! starts a thread. Decoders take bytes that anyone may have sent and answer with
//! a typed value or a typed error; they never panic on input and never allocate
//! more than the limits named beside them.

pub mod frame;
pub mod map;
pub mod nbd;
pub mod nvme_tcp;
pub mod peer;
pub mod raft;
pub mod types;

/// The control plane's messages and services (MDS, target admin), made from `proto/`.
#[cfg(feature = "control")]
pub mod control;
