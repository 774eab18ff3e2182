//! The only crate that touches the kernel's IO: ring, arena, timers, mailboxes, hosts.
