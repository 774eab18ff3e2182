//! Cutting a range of a volume into pieces that one copyset leader takes whole.

use protocol::types::{BLOCK_BYTES, CHUNK_BYTES, ENTRY_BYTES_MAX};

/// Most chunks that one status looks at: its answer is at most 8 x 4,096 runs.
pub const STATUS_CHUNKS_MAX: u64 = 8;

/// A piece's place in the volume, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    pub offset: u64,
    pub length: u32,
}

impl Extent {
    pub fn chunk_index(self) -> u32 {
        (self.offset / CHUNK_BYTES as u64) as u32
    }
    pub fn offset_in_chunk(self) -> u32 {
        (self.offset % CHUNK_BYTES as u64) as u32
    }
}

/// What is left of a range, cut at multiples of `step`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Cursor {
    at: u64,
    end: u64,
    step: u64,
}

impl Cursor {
    /// Whole blocks around the range, in pieces of one entry.
    pub fn read(offset: u64, length: u64) -> Self {
        Self { at: block_down(offset), end: block_up(offset + length), step: ENTRY_BYTES_MAX as u64 }
    }
    /// The range as it is, in pieces of one entry.
    pub fn write(offset: u64, length: u64) -> Self {
        Self { at: offset, end: offset + length, step: ENTRY_BYTES_MAX as u64 }
    }
    /// The range as it is, a piece a chunk.
    pub fn zero(offset: u64, length: u64) -> Self {
        Self { at: offset, end: offset + length, step: CHUNK_BYTES as u64 }
    }
    /// Whole blocks around the range, a piece a chunk, [`STATUS_CHUNKS_MAX`] at most.
    pub fn status(offset: u64, length: u64) -> Self {
        let end = block_up(offset + length);
        let cap = (offset / CHUNK_BYTES as u64 + STATUS_CHUNKS_MAX) * CHUNK_BYTES as u64;
        Self { at: block_down(offset), end: end.min(cap), step: CHUNK_BYTES as u64 }
    }
    /// A piece for each of so many copysets: its chunk index is the copyset's place among the volume's.
    pub fn copysets(count: usize) -> Self {
        Self { at: 0, end: count as u64 * CHUNK_BYTES as u64, step: CHUNK_BYTES as u64 }
    }
    pub fn is_empty(self) -> bool {
        self.at >= self.end
    }
    /// Where the range ends.
    pub fn end(self) -> u64 {
        self.end
    }
    /// Gives up what is left.
    pub fn clear(&mut self) {
        self.at = self.end;
    }
}

impl Iterator for Cursor {
    type Item = Extent;
    fn next(&mut self) -> Option<Extent> {
        if self.is_empty() {
            return None;
        }
        let until = ((self.at / self.step + 1) * self.step).min(self.end);
        let extent = Extent { offset: self.at, length: (until - self.at) as u32 };
        self.at = until;
        Some(extent)
    }
}

fn block_down(at: u64) -> u64 {
    at - at % BLOCK_BYTES as u64
}

fn block_up(at: u64) -> u64 {
    at.next_multiple_of(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(cursor: Cursor) -> Vec<(u64, u32)> {
        cursor.map(|e| (e.offset, e.length)).collect()
    }

    #[test]
    fn a_read_is_rounded_to_blocks_and_cut_at_entry_boundaries() {
        assert_eq!(pieces(Cursor::read(512, 512)), [(0, 4096)]);
        assert_eq!(pieces(Cursor::read(126 << 10, 4 << 10)), [(124 << 10, 4096), (128 << 10, 4096)]);
        assert_eq!(pieces(Cursor::read(0, 256 << 10)), [(0, 128 << 10), (128 << 10, 128 << 10)]);
    }

    #[test]
    fn a_zero_keeps_its_bytes_and_is_cut_at_chunks() {
        let chunk = CHUNK_BYTES as u64;
        assert_eq!(
            pieces(Cursor::zero(chunk - 512, chunk + 1024)),
            [(chunk - 512, 512), (chunk, CHUNK_BYTES as u32), (2 * chunk, 512)]
        );
    }

    #[test]
    fn a_status_of_everything_is_bounded() {
        assert_eq!(pieces(Cursor::status(512, 1 << 40)).len(), STATUS_CHUNKS_MAX as usize);
    }
}
