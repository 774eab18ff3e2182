//! NVMe over TCP: bytes to commands, answers to bytes, and the model of a controller.
//!
//! [`Session`] is one connection, which is one queue: it is fed what a host sent and yields
//! [`Event`]s, checks every field of every PDU and the form of every command, and refuses by
//! itself what makes no sense (a status for a command, a termination for a PDU). It holds no
//! payload: after [`Event::Command`] with `inline > 0` and after [`Event::Data`] the caller takes
//! so many bytes off the stream, says so by [`Session::payload_taken`], and feeds on.
//! [`controller::Controllers`] is what the admin queues talk to. [`host`] is the other side.
//!
//! Deliberately absent: TLS and authentication, reservations, metadata, namespaces beyond one
//! a subsystem, and any queue of IO (see the `transport` crate). The rules are those of the NVM
//! Express base specification 2.0, NVM command set 1.0 and TCP transport 1.0.

pub mod command;
pub mod controller;
pub mod host;
pub mod identify;
pub mod logs;
pub mod pdu;
mod session;
pub mod wire;

pub use command::{IoCommand, IoRequest, Namespace};
pub use pdu::Fatal;
pub use session::{Event, Progress, Session, Violation};
pub use wire::{Sqe, Status};

#[cfg(test)]
mod tests;
