//! Keeping processors out of deep sleep while a process runs.
//!
//! The kernel honours what was written to /dev/cpu_dma_latency for as long as the file is open,
//! so that dropping the value (or dying) takes it back.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// The request; taken back when dropped.
#[derive(Debug)]
pub struct LatencyHold(#[allow(dead_code)] File);

impl LatencyHold {
    /// Asks that waking a processor takes at most so many microseconds.
    ///
    /// # Errors
    /// No such device here, or no permission (it is root's).
    pub fn take(us_max: u32) -> io::Result<Self> {
        Self::take_at(Path::new("/dev/cpu_dma_latency"), us_max)
    }

    fn take_at(path: &Path, us_max: u32) -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        let us = i32::try_from(us_max).unwrap_or(i32::MAX);
        file.write_all(&us.to_ne_bytes())?;
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_gets_a_binary_number() -> io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        let hold = LatencyHold::take_at(file.path(), 10)?;
        assert_eq!(std::fs::read(file.path())?, 10_i32.to_ne_bytes());
        drop(hold);
        assert!(LatencyHold::take_at(Path::new("/nonexistent/x"), 1).is_err());
        Ok(())
    }
}
