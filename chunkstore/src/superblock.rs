//! The superblock: whose disk it is and the sizes that never change. Two identical copies.

use crate::api::{FileId, Identity, IoError, Layout, Media};
use crate::wire::{Get, Put, crc_with_hole, fill_crc, pad_to_block};
use protocol::types::BLOCK_BYTES;

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ASHSUPER");
pub(crate) const VERSION: u32 = 1;
const CRC_AT: usize = 12;

/// The superblock in one block.
pub(crate) fn encode(layout: &Layout, identity: &Identity) -> Vec<u8> {
    let mut out = Vec::with_capacity(BLOCK_BYTES);
    out.u64(MAGIC);
    out.u32(VERSION);
    out.u32(0);
    out.raw(&identity.cluster);
    out.raw(&identity.disk);
    out.u32(identity.target);
    out.u16(identity.shard);
    out.u16(0);
    out.u32(layout.segment_bytes);
    out.u32(layout.log_segments);
    out.u32(layout.slots_per_file);
    out.u32(layout.slots_max);
    pad_to_block(&mut out);
    fill_crc(&mut out, CRC_AT);
    out
}

/// Reads a superblock into `limits`' fixed part.
pub(crate) fn decode(block: &[u8], limits: &Layout) -> Result<(Layout, Identity), &'static str> {
    let mut get = Get(block);
    let fields = || -> Option<(u64, u32, u32)> { Some((get.u64()?, get.u32()?, get.u32()?)) };
    let mut fields = fields;
    let (magic, version, crc) = fields().ok_or("too short")?;
    if magic != MAGIC {
        return Err("not a superblock");
    }
    if crc != crc_with_hole(block, CRC_AT) {
        return Err("its checksum is wrong");
    }
    if version != VERSION {
        return Err("its format version is not known to this program");
    }
    let mut get = Get(&block[16..]);
    let mut parse = || -> Option<(Layout, Identity)> {
        let identity =
            Identity { cluster: get.array()?, disk: get.array()?, target: get.u32()?, shard: get.u16()? };
        get.u16()?;
        let layout = Layout {
            segment_bytes: get.u32()?,
            log_segments: get.u32()?,
            slots_per_file: get.u32()?,
            slots_max: get.u32()?,
            format_segments: 2,
            ..*limits
        };
        Some((layout, identity))
    };
    let (layout, identity) = parse().ok_or("too short")?;
    match layout.problem() {
        Some(problem) => Err(problem),
        None => Ok((layout, identity)),
    }
}

/// Why no copy is good.
pub(crate) struct Bad {
    /// Of both copies.
    pub why: String,
    /// A copy could not be read: nobody knows whether it is one.
    pub unread: Option<IoError>,
}

/// Reads the first good copy.
pub(crate) fn read<M: Media + ?Sized>(media: &mut M, limits: &Layout) -> Result<(Layout, Identity), Bad> {
    let mut block = vec![0; BLOCK_BYTES];
    let (mut problems, mut unread) = (Vec::new(), None);
    for copy in 0..2u64 {
        let problem = match media.read(FileId::Superblock, copy * BLOCK_BYTES as u64, &mut block) {
            Ok(()) => match decode(&block, limits) {
                Ok(found) => return Ok(found),
                Err(problem) => problem.to_string(),
            },
            Err(error) => {
                unread = Some(error);
                format!("it cannot be read ({error})")
            }
        };
        problems.push(format!("copy {copy}: {problem}"));
    }
    Err(Bad { why: problems.join("; "), unread })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_with_the_short_logs_of_before_are_opened_though_none_is_made_any_more() {
        let before = Layout { log_segments: 4, ..Layout::default() };
        let block = encode(&before, &Identity::default());
        let (layout, _) = decode(&block, &Layout::default()).expect("it was valid once");
        assert_eq!(layout.log_segments, 4, "as the disk has it");
        let never = encode(&Layout { log_segments: 3, ..before }, &Identity::default());
        assert_eq!(decode(&never, &Layout::default()).err(), Some("log_segments is below 4"));
    }
}
