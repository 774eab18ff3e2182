//! The two clocks that loops and measurements read.

use protocol::types::{Span, Time};

/// The monotonic clock, as [`crate::Reactor::now`] of every ring reads it. It goes on while the machine is suspended, as
/// leases do that others wait for.
pub fn monotonic_now() -> Time {
    Time(read(libc::CLOCK_BOOTTIME))
}

/// Processor time that the calling thread has used, in the kernel too.
pub fn thread_cpu() -> Span {
    Span(read(libc::CLOCK_THREAD_CPUTIME_ID))
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, and Linux has had both clocks since 2.6.39.
    unsafe { libc::clock_gettime(clock, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
