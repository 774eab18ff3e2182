//! Waking a core's loop from another thread.
//!
//! Three states: AWAKE, ASLEEP, NOTIFIED. A wake swaps in NOTIFIED and writes to the eventfd
//! only when it found ASLEEP, so waking a running loop costs no system call. The loop clears
//! NOTIFIED at the end of each turn, before its caller polls its mailboxes; so whatever was
//! pushed before a wake is seen by the poll that follows, or the next sleep is refused.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::api::IoError;

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const NOTIFIED: u8 = 2;

/// Wakes one reactor's `turn`. Clones are cheap; may be used from any thread, also after the
/// reactor is gone.
#[derive(Clone)]
pub struct Waker(Arc<Shared>);

struct Shared {
    state: AtomicU8,
    /// None in a simulation, where nobody sleeps in a kernel.
    event: Option<OwnedFd>,
}

impl Waker {
    /// With an eventfd for the ring to read.
    ///
    /// # Errors
    /// The process has no file descriptor left.
    pub fn new() -> Result<Self, IoError> {
        // Blocking on purpose: the ring's read must wait, and a write blocks only at 2^64.
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| IoError::new("make an eventfd", errno as i32))?;
        Ok(Self(Arc::new(Shared { state: AtomicU8::new(AWAKE), event: Some(event.into()) })))
    }

    /// Without an eventfd.
    pub(crate) fn simulated() -> Self {
        Self(Arc::new(Shared { state: AtomicU8::new(AWAKE), event: None }))
    }

    /// Makes the reactor's current or next wait end.
    pub fn wake(&self) {
        if self.0.state.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP
            && let Some(event) = &self.0.event
        {
            // A failure is impossible short of 2^64 unread wakes; the loop would still wake at
            // its deadline.
            let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.0.event.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// About to sleep: false if a wake came since the last [`Waker::clear`].
    pub(crate) fn try_sleep(&self) -> bool {
        self.0.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Awake again after a sleep; a wake that came meanwhile stays noted.
    pub(crate) fn end_sleep(&self) {
        let _ = self.0.state.compare_exchange(ASLEEP, AWAKE, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Whether a wake came since the last [`Waker::clear`].
    pub(crate) fn is_notified(&self) -> bool {
        self.0.state.load(Ordering::SeqCst) == NOTIFIED
    }

    /// Awake again; from here on a wake counts for the next turn.
    pub(crate) fn clear(&self) {
        self.0.state.swap(AWAKE, Ordering::SeqCst);
    }
}
