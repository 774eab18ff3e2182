//! What the loops of both protocols share: requests cut into pieces, answers put in order, and the memory
//! that a connection may hold.
//!
//! IO is cut at multiples of 128 KiB of the volume, so a piece never leaves its chunk. Deliberately
//! absent: sockets, and what a host is told.

use crate::stream::Stream;
use protocol::types::{BLOCK_BYTES, ENTRY_BYTES_MAX};
use reactor::{Arena, Buf, BufMut, IoBuf};
use slab::Slab;
use smallvec::SmallVec;

/// A request of a connection; given again once its last event is answered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReqId(pub u32);

impl ReqId {
    /// Its place among the connection's requests.
    pub(crate) fn key(self) -> usize {
        self.0 as usize
    }
}

/// A part of a read's answer.
#[derive(Clone, Debug)]
pub enum ReadPart {
    /// Bytes `from..to` of a buffer.
    Data {
        /// The buffer; held until it is sent.
        buf: Buf,
        /// First byte.
        from: u32,
        /// One past the last byte.
        to: u32,
        /// CRC-32C of just these bytes, where it is known.
        crc: Option<u32>,
    },
    /// So many zeroes.
    Zeroes(u32),
}

impl ReadPart {
    /// Its length in bytes.
    pub fn len(&self) -> usize {
        match self {
            ReadPart::Data { from, to, .. } => (to - from) as usize,
            ReadPart::Zeroes(bytes) => *bytes as usize,
        }
    }
    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The answer to one piece of a read, in order.
pub type ReadParts = SmallVec<[ReadPart; 2]>;

/// The bytes of an answer.
pub(crate) fn bytes_of(parts: &ReadParts) -> usize {
    parts.iter().map(ReadPart::len).sum()
}

/// Queues a part to be sent.
pub(crate) fn push_part(stream: &mut Stream, part: ReadPart) {
    match part {
        ReadPart::Data { buf, from, to, .. } => stream.push(IoBuf::part(buf, from as usize..to as usize)),
        ReadPart::Zeroes(bytes) => stream.push_zeroes(bytes as usize),
    }
}

/// How long a piece is that begins at `offset` of the volume, of so many bytes that are left.
pub(crate) fn piece_length(offset: u64, left: u32) -> u32 {
    let window = ENTRY_BYTES_MAX as u64;
    u64::from(left).min(window - offset % window) as u32
}

/// Where a piece's data begins within its first block.
pub(crate) fn lead(offset: u64) -> usize {
    (offset % BLOCK_BYTES as u64) as usize
}

/// The blocks that cover a piece.
pub(crate) fn blocks_of(offset: u64, length: u32) -> usize {
    (lead(offset) + length as usize).div_ceil(BLOCK_BYTES)
}

/// What a write's piece is charged with: what the arena takes for it.
pub(crate) fn piece_charge(offset: u64, length: u32) -> usize {
    blocks_of(offset, length).next_power_of_two() * BLOCK_BYTES
}

/// A request, and how far it has come.
#[derive(Debug)]
pub(crate) struct Course {
    /// First byte of the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Bytes that were handed out as pieces, or skipped.
    pub emitted: u32,
    /// Bytes that are answered, or skipped.
    pub answered: u32,
    /// Events that the caller has not answered.
    pub outstanding: u32,
}

impl Course {
    pub fn new(offset: u64, length: u32) -> Self {
        Self { offset, length, emitted: 0, answered: 0, outstanding: 0 }
    }
    /// Offset and length of the next piece.
    pub fn next(&self) -> (u64, u32) {
        let offset = self.offset + u64::from(self.emitted);
        (offset, piece_length(offset, self.length - self.emitted))
    }
    /// So much of it was handed out as a piece. True if that is all.
    pub fn hand_out(&mut self, length: u32) -> bool {
        self.emitted += length;
        self.outstanding += 1;
        self.emitted == self.length
    }
    /// The place of a piece within the request, and its length.
    pub fn piece_at(&self, offset: u64) -> (u32, u32) {
        let end = self.offset + u64::from(self.length);
        assert!(offset >= self.offset && offset < end, "a piece lies within its request");
        ((offset - self.offset) as u32, piece_length(offset, (end - offset) as u32))
    }
    /// The piece that holds byte `at` of the request: where it begins within it, and its length.
    pub fn piece_around(&self, at: u32) -> (u32, u32) {
        let window = ENTRY_BYTES_MAX as u64;
        let begin = ((self.offset + u64::from(at)) / window * window).max(self.offset);
        self.piece_at(begin)
    }
    /// A piece is answered; its place within the request, and its length.
    pub fn answer(&mut self, offset: u64) -> (u32, u32) {
        let (at, length) = self.piece_at(offset);
        self.answered += length;
        (at, length)
    }
    /// Nobody needs so much of it.
    pub fn skip(&mut self, bytes: u32) {
        self.emitted += bytes;
        self.answered += bytes;
    }
    pub fn is_answered(&self) -> bool {
        self.answered == self.length
    }
}

/// What has a course.
pub(crate) trait Request {
    fn course(&mut self) -> &mut Course;
}

/// Counts an answer to an event of a request; false when the connection is over, so that it comes too late to matter.
pub(crate) fn count_answer<Q: Request>(requests: &mut Slab<Q>, id: ReqId, over: bool) -> bool {
    let req = requests.get_mut(id.key()).expect("an event is answered once, by its request");
    let course = req.course();
    course.outstanding = course.outstanding.checked_sub(1).expect("an event is answered once");
    if over && course.outstanding == 0 {
        requests.remove(id.key());
    }
    !over
}

/// Answers to pieces of a read, which are sent in order.
#[derive(Default)]
pub(crate) struct InOrder {
    /// Bytes that are on their way.
    pub sent: u32,
    /// Answers that wait for an earlier one, by their offset within the request, in order. As a rule there
    /// is one, which waits for nothing: it stays off the heap.
    held: SmallVec<[(u32, ReadParts); 1]>,
}

impl InOrder {
    pub fn hold(&mut self, at: u32, parts: ReadParts) {
        let place = self.held.partition_point(|(other, _)| *other < at);
        self.held.insert(place, (at, parts));
    }
    /// The next answer in order, if it is here; it counts as sent.
    pub fn next(&mut self) -> Option<(u32, ReadParts)> {
        let at = self.sent;
        self.held.first().filter(|(first, _)| *first == at)?;
        let (_, parts) = self.held.remove(0);
        self.sent += bytes_of(&parts) as u32;
        Some((at, parts))
    }
    pub fn has_first(&self) -> bool {
        self.held.first().is_some_and(|(first, _)| *first == 0)
    }
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
    /// Drops what waits; how many bytes that was.
    pub fn clear(&mut self) -> usize {
        self.held.drain(..).map(|(_, parts)| bytes_of(&parts)).sum()
    }
}

/// What a connection holds of memory, and what it may.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Most bytes of buffers, and of answers that are not sent.
    pub bytes_max: usize,
    /// Blocks of the arena that are left to others.
    pub reserve_blocks: usize,
    /// Bytes of buffers with payload of writes, received or being received.
    pub writing: usize,
    /// Bytes of reads that were asked for, and of answers that must wait for their turn.
    pub reading: usize,
}

impl Budget {
    pub fn new(bytes_max: usize, reserve_blocks: usize) -> Self {
        Self { bytes_max, reserve_blocks, writing: 0, reading: 0 }
    }
    /// The connection is over.
    pub fn clear(&mut self) {
        (self.writing, self.reading) = (0, 0);
    }
    /// A host that holds nothing may have a piece of the reserve's upper half: else those that do not take
    /// their answers would stop all others.
    pub fn has_room(&self, arena: &Arena, blocks: usize, holds_nothing: bool) -> bool {
        let reserve = self.reserve_blocks / if holds_nothing { 2 } else { 1 };
        arena.used_blocks() + blocks + reserve <= arena.capacity_blocks()
    }
    pub fn alloc(&self, arena: &Arena, blocks: usize, holds_nothing: bool) -> Option<BufMut> {
        self.has_room(arena, blocks, holds_nothing).then(|| arena.alloc(blocks)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_windows_and_cover_the_request_once() {
        let window = ENTRY_BYTES_MAX as u64;
        for (offset, length) in [(0, 512), (window - 512, 1024), (3 * window + 4096, 5 << 17), (512, 1 << 20)]
        {
            let mut course = Course::new(offset, length);
            let (mut end, mut all) = (offset, false);
            while !all {
                let (at, bytes) = course.next();
                assert_eq!(at, end, "in order, without gaps");
                assert_eq!(at / window, (at + u64::from(bytes) - 1) / window, "within one window");
                let place = ((at - offset) as u32, bytes);
                assert_eq!(course.piece_at(at), place);
                assert_eq!(course.piece_around(place.0 + bytes - 1), place, "found by its last byte");
                all = course.hand_out(bytes);
                end += u64::from(bytes);
            }
            assert_eq!(end, offset + u64::from(length));
        }
    }

    #[test]
    fn answers_are_given_back_in_order_however_they_come() {
        let mut order = InOrder::default();
        for at in [4096, 0, 8192] {
            assert!(order.is_empty() || order.sent == 0);
            order.hold(at, ReadParts::from_elem(ReadPart::Zeroes(4096), 1));
        }
        let told: Vec<u32> = core::iter::from_fn(|| order.next()).map(|(at, _)| at).collect();
        assert_eq!((told, order.sent, order.is_empty()), (vec![0, 4096, 8192], 12288, true));
    }
}
