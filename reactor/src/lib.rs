//! The only crate that touches the kernel's IO: ring, arena, timers, mailboxes, hosts.
//!
//! [`api`] is the seam: everything above is generic over [`Reactor`], so the same shard code
//! runs over the kernel's io_uring ([`ring::Ring`]) and over the seeded [`sim::SimReactor`].
//!
//! Invariants: every submitted [`Op`] yields exactly one [`Completion`]; buffers handed to an
//! op come back in its completion, on success and on error; nothing here is shared between
//! threads but [`Waker`], [`mailbox`] and what one core lends another ([`loan`]).
//!
//! Deliberately absent: any knowledge of volumes, logs or wire formats; futures.

// Shared memory with the kernel and system calls cannot be had without it; it is kept to
// `arena`, `mapping`, `clock` and `ring`, each block with its reason.
#![allow(unsafe_code)]

pub mod api;
pub mod arena;
pub mod clock;
pub mod disk;
pub mod host;
pub mod loan;
pub mod mailbox;
mod mapping;
pub mod memory;
pub mod ring;
pub mod sim;
mod table;
pub mod timers;
mod waker;

pub use api::*;
pub use arena::{Arena, Buf, BufMut};
