//! Anonymous memory of this process, in huge pages where it is long enough and the kernel agrees.
//!
//! What has 2 MiB or more begins at a huge page and asks for transparent ones, which nobody has to reserve. Refused, it
//! lies in small pages, which works as well and is slower.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::api::IoError;

/// Bytes of a huge page, on processors that have them.
pub const HUGE_BYTES: usize = 2 << 20;

/// No swap is set aside for it. Miri's mmap does not know the flag.
const NORESERVE: libc::c_int = if cfg!(miri) { 0 } else { libc::MAP_NORESERVE };

/// Memory of our own, zeroes at first, in huge pages where it is long enough and the kernel agrees.
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping goes with its last owner, on whatever thread; what is written to it needs `&mut self`. An arena's, which
// other cores see too, is reached by runs alone, and each run by whoever holds it ([`crate::arena`], [`crate::loan`]).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`, whole blocks; none of it is resident yet. Fails as mmap does.
    pub fn new(bytes: usize) -> Result<Self, IoError> {
        // Miri gives no part of a mapping back.
        let spare = if bytes < HUGE_BYTES || cfg!(miri) { 0 } else { HUGE_BYTES };
        // SAFETY: an anonymous private mapping at an address of the kernel's choosing touches no
        // memory that exists; the result is checked.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes + spare,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(IoError::last_os("map memory"));
        }
        let mapped = NonNull::new(mapped.cast::<u8>()).expect("mmap does not return null on success");
        if spare == 0 {
            return Ok(Self { base: mapped, bytes });
        }
        let before = mapped.as_ptr().align_offset(HUGE_BYTES);
        // SAFETY: `before` is less than `spare`, so all three parts lie within the mapping made above, which nobody has seen
        // yet; what is unmapped is what lies before and behind `bytes` from `base`. Refusals leave more mapped, or in
        // small pages, which is as good.
        unsafe {
            let base = mapped.add(before);
            if before > 0 {
                libc::munmap(mapped.as_ptr().cast(), before);
            }
            libc::munmap(base.add(bytes).as_ptr().cast(), spare - before);
            libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
            Ok(Self { base, bytes })
        }
    }

    /// Where it begins.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of our own mapping. An arena's goes with its last buffer, which
        // holds a handle to it; what else borrows from a mapping borrows it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: mapped memory is initialised, and whoever could write to it needs `&mut self`, or is an arena,
        // which hands out runs and never dereferences its mapping.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_enough_begins_at_a_huge_page_and_all_of_it_is_ours() {
        for bytes in [4096, HUGE_BYTES, HUGE_BYTES + 4096, 5 * HUGE_BYTES - 4096] {
            let mut memory = Mapping::new(bytes).unwrap();
            assert_eq!(memory.len(), bytes);
            assert!(memory.iter().step_by(4096).all(|byte| *byte == 0));
            memory.fill(1);
            let aligned = memory.base().addr().is_multiple_of(HUGE_BYTES);
            assert!(bytes < HUGE_BYTES || cfg!(miri) || aligned, "{bytes} bytes at {:?}", memory.base());
        }
    }
}
