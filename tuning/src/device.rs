//! `device.toml`: what `tune probe` found of a disk, and the limits that a target takes from it.
//!
//! Invariants: unknown keys are refused and every limit has a range, so that a file that was
//! mended by hand cannot make a target unsafe. The figures under `measured` are for people.
//! All limits may change from one start to the next.

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file's name in a target's folder.
pub const FILE: &str = "device.toml";

/// Recovery looks eight batches past a hole, so that no more than seven may be in flight.
pub const BATCHES_IN_FLIGHT: std::ops::RangeInclusive<usize> = 1..=7;
/// Blocks of 4 KiB in a log batch: one entry of 128 KiB always fits, and recovery looks no further
/// than 1 MiB for the end of one.
pub const BATCH_BLOCKS: std::ops::RangeInclusive<u32> = 32..=256;
/// Operations of the flusher in flight.
pub const FLUSH_IN_FLIGHT: std::ops::RangeInclusive<usize> = 1..=64;
/// IOs in flight in all.
pub const QUEUE_DEPTH: std::ops::RangeInclusive<u32> = 1..=1024;

/// The whole file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Version of the file's form: 1.
    pub format: u32,
    /// What a target takes from it.
    pub limits: Limits,
    /// What was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// What a target takes from the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// IOs in flight at which the disk is nearly as fast as it gets.
    pub queue_depth: u32,
    /// Log batches in flight at most.
    pub batches_in_flight_max: usize,
    /// Blocks of 4 KiB in a log batch at most.
    #[serde(default = "batch_blocks_default")]
    pub batch_blocks_max: u32,
    /// Flush operations in flight at most.
    pub flush_in_flight_max: usize,
    /// Held through /dev/cpu_dma_latency while the target runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_latency_us_max: Option<u32>,
}

/// What a target does without being told, and so what a file of an older version means.
fn batch_blocks_default() -> u32 {
    *BATCH_BLOCKS.end()
}

/// What was measured, for people and for later comparison.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Seconds since 1970.
    pub time_s: u64,
    /// Random reads of 4 KiB a second, at the best depth.
    pub read_iops: f64,
    /// Random writes of 4 KiB a second, at the best depth.
    pub write_iops: Option<f64>,
    /// Bytes a second, read in order in pieces of 128 KiB.
    pub read_bytes_s: f64,
    /// Bytes a second, written in order in pieces of 128 KiB.
    pub write_bytes_s: Option<f64>,
    /// Median microseconds of a read of 4 KiB, one at a time.
    pub read_us: f64,
    /// Median microseconds of a write of 4 KiB, one at a time.
    pub write_us: Option<f64>,
    /// Median microseconds of a durable write of 4 KiB, one at a time.
    pub dsync_us: Option<f64>,
    /// Bytes a second, written in order as durable log batches of the chosen size and number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes_s: Option<f64>,
    /// Durable over plain.
    pub dsync_cost: Option<f64>,
    /// Whether the disk has a volatile cache, as it says itself.
    pub volatile_cache: Option<bool>,
    /// Whether the disk's queues can be polled.
    pub io_poll: bool,
}

impl Device {
    /// Reads and checks the file in a target's folder; `None` when there is none.
    ///
    /// # Errors
    /// It cannot be read, or what it says is out of range; the message names the file.
    pub fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        Self::parse(&text).with_context(|| format!("{} is not usable", path.display())).map(Some)
    }

    /// Reads and checks the text.
    ///
    /// # Errors
    /// It is no TOML of this form, or a limit is out of range.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let device: Self = toml::from_str(text)?;
        ensure!(device.format == 1, "format {} is not known; run `ashlar tune probe` again", device.format);
        let Limits { queue_depth, batches_in_flight_max, batch_blocks_max, flush_in_flight_max, .. } =
            device.limits;
        ensure!(QUEUE_DEPTH.contains(&queue_depth), "queue_depth {queue_depth} is not in {QUEUE_DEPTH:?}");
        ensure!(
            BATCHES_IN_FLIGHT.contains(&batches_in_flight_max),
            "batches_in_flight_max {batches_in_flight_max} is not in {BATCHES_IN_FLIGHT:?}"
        );
        ensure!(
            BATCH_BLOCKS.contains(&batch_blocks_max),
            "batch_blocks_max {batch_blocks_max} is not in {BATCH_BLOCKS:?}"
        );
        ensure!(
            FLUSH_IN_FLIGHT.contains(&flush_in_flight_max),
            "flush_in_flight_max {flush_in_flight_max} is not in {FLUSH_IN_FLIGHT:?}"
        );
        Ok(device)
    }

    /// The file's text; reading it gives the same.
    ///
    /// # Errors
    /// A figure that TOML cannot hold.
    pub fn render(&self) -> anyhow::Result<String> {
        let text = toml::to_string(self)?;
        Ok(format!("# Written by `ashlar tune probe`; the target reads [limits] at its start.\n{text}"))
    }

    /// Writes it durably in place of an older one.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)
            .with_context(|| format!("cannot write in {}", folder.display()))?;
        std::io::Write::write_all(&mut file, self.render()?.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::File::open(folder)?.sync_all()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "format = 1\n[limits]\nqueue_depth = 32\nbatches_in_flight_max = 4\n\
                        batch_blocks_max = 64\nflush_in_flight_max = 8\n";

    #[test]
    fn what_is_saved_is_what_is_read() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        assert_eq!(Device::load(dir.path())?, None);
        let device = Device::parse(GOOD)?;
        device.save(&dir.path().join(FILE))?;
        assert_eq!(Device::load(dir.path())?, Some(device));
        Ok(())
    }

    #[test]
    fn a_file_from_before_batches_had_a_size_means_the_default() -> anyhow::Result<()> {
        let device = Device::parse(&GOOD.replace("batch_blocks_max = 64\n", ""))?;
        assert_eq!(device.limits.batch_blocks_max, 256);
        Ok(())
    }

    #[test]
    fn a_limit_that_would_be_unsafe_is_refused() {
        for (from, to) in [
            ("format = 1", "format = 2"),
            ("max = 4", "max = 8"),
            ("max = 4", "max = 0"),
            ("max = 8", "max = 65"),
            ("blocks_max = 64", "blocks_max = 31"),
            ("blocks_max = 64", "blocks_max = 257"),
            ("depth = 32", "depth = 0"),
            ("depth = 32", "depht = 32"),
        ] {
            assert!(GOOD.contains(from));
            assert!(Device::parse(&GOOD.replacen(from, to, 1)).is_err(), "{to}");
        }
    }
}
