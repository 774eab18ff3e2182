//! The CRC table of a chunk slot: 4,096 CRCs in 5 pages, each kept in two alternating copies.
//!
//! A page is only ever written over the copy that the last durable checkpoint does not rely on,
//! so a torn page leaves the other whole.

use crate::wire::{Get, Put, crc_with_hole, fill_crc, pad_to_block};
use protocol::types::{BLOCK_BYTES, CHUNK_BLOCKS, ChunkId};

/// Pages of a table.
pub(crate) const PAGES: usize = 5;
/// CRCs of a page; a multiple of 32, so that no entry's blocks straddle two pages.
pub(crate) const PAGE_CRCS: usize = 832;
/// Blocks between the two copies of a page.
pub(crate) const COPY_STRIDE: usize = 8;
/// Blocks read to load a table: both copies.
pub(crate) const LOAD_BLOCKS: usize = COPY_STRIDE + PAGES;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ASHTABLE");
const VERSION: u32 = 1;
const CRC_AT: usize = 12;
const UNKNOWN_AT: usize = 64;
const CRCS_AT: usize = 192;
const _: () = assert!(PAGES * PAGE_CRCS >= CHUNK_BLOCKS && CRCS_AT + PAGE_CRCS * 4 <= BLOCK_BYTES);
const _: () = assert!(PAGE_CRCS.is_multiple_of(32) && PAGE_CRCS / 8 <= CRCS_AT - UNKNOWN_AT);

/// What a slot's pages must match to be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pages {
    /// Highest sequence number known to be written, a page; 0: never written.
    pub seq: [u32; PAGES],
    /// Which copy that is; bit a page.
    pub current: u8,
    /// Which copy the last durable checkpoint relies on; bit a page.
    pub durable: u8,
}

impl Pages {
    pub(crate) const NONE: Self = Self { seq: [0; PAGES], current: 0, durable: 0 };
}

/// The CRCs at rest of a chunk's blocks.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub crcs: Box<[u32; CHUNK_BLOCKS]>,
    /// Blocks whose CRC is lost; bit a block.
    unknown: Box<[u64; CHUNK_BLOCKS / 64]>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { crcs: Box::new([0; CHUNK_BLOCKS]), unknown: Box::new([0; CHUNK_BLOCKS / 64]) }
    }
    pub(crate) fn is_unknown(&self, block: usize) -> bool {
        self.unknown[block / 64] >> (block % 64) & 1 == 1
    }
    fn lose(&mut self, block: usize) {
        self.unknown[block / 64] |= 1 << (block % 64);
    }
    pub(crate) fn set(&mut self, block: usize, crc: u32) {
        self.crcs[block] = crc;
        self.unknown[block / 64] &= !(1 << (block % 64));
    }
    /// `None` when lost.
    pub(crate) fn expected(&self, block: usize) -> Option<u32> {
        (!self.is_unknown(block)).then_some(self.crcs[block])
    }
    /// Whether no block holds data.
    pub(crate) fn is_empty(&self) -> bool {
        self.crcs.iter().all(|c| *c == 0) && self.unknown.iter().all(|u| *u == 0)
    }
}

fn page_blocks(page: usize) -> core::ops::Range<usize> {
    page * PAGE_CRCS..((page + 1) * PAGE_CRCS).min(CHUNK_BLOCKS)
}

/// One page as a block, into `out`, which is empty.
pub(crate) fn encode_page(
    table: &Table,
    page: usize,
    chunk: ChunkId,
    generation: u64,
    seq: u32,
    out: &mut Vec<u8>,
) {
    out.u64(MAGIC);
    out.u32(VERSION);
    out.u32(0);
    out.u64(chunk.pack());
    out.u64(generation);
    out.u32(page as u32);
    out.u32(seq);
    out.zeroes(UNKNOWN_AT - out.len());
    out.zeroes(CRCS_AT - UNKNOWN_AT);
    for (nth, block) in page_blocks(page).enumerate() {
        if table.is_unknown(block) {
            out[UNKNOWN_AT + nth / 8] |= 1 << (nth % 8);
        }
        out.u32(table.crcs[block]);
    }
    pad_to_block(out);
    fill_crc(out, CRC_AT);
}

/// The sequence number of a page of this chunk and generation, if it is one.
pub(crate) fn page_seq(block: &[u8], page: usize, chunk: ChunkId, generation: u64) -> Option<u32> {
    let mut get = Get(block);
    if get.u64()? != MAGIC || get.u32()? != VERSION || get.u32()? != crc_with_hole(block, CRC_AT) {
        return None;
    }
    let matches = get.u64()? == chunk.pack() && get.u64()? == generation && get.u32()? == page as u32;
    let seq = get.u32()?;
    (matches && seq > 0).then_some(seq)
}

fn decode_page(table: &mut Table, block: &[u8], page: usize) {
    for (nth, number) in page_blocks(page).enumerate() {
        let at = CRCS_AT + nth * 4;
        table.crcs[number] = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        if block[UNKNOWN_AT + nth / 8] >> (nth % 8) & 1 == 1 {
            table.lose(number);
        }
    }
}

/// What a load found besides the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Loaded {
    /// Pages of which a copy was rejected though one was expected there.
    pub fallbacks: u64,
    /// Pages without a good copy.
    pub lost: u64,
}

/// Makes the table of [`LOAD_BLOCKS`] blocks (`None`: unreadable), and brings `pages` up to date.
pub(crate) fn load<'a>(
    blocks: impl Fn(usize) -> Option<&'a [u8]>,
    pages: &mut Pages,
    chunk: ChunkId,
    generation: u64,
) -> (Table, Loaded) {
    let (mut table, mut loaded) = (Table::new(), Loaded::default());
    for page in 0..PAGES {
        let copies = [0, 1].map(|copy| {
            let block = blocks(copy * COPY_STRIDE + page)?;
            page_seq(block, page, chunk, generation).map(|seq| (seq, copy, block))
        });
        let best = copies.iter().flatten().max_by_key(|(seq, ..)| *seq);
        match best {
            Some((seq, copy, block)) if *seq >= pages.seq[page] => {
                loaded.fallbacks += u64::from(*seq > 1 && copies.iter().flatten().count() < 2);
                decode_page(&mut table, block, page);
                if *seq > pages.seq[page] || pages.current >> page & 1 != *copy as u8 {
                    let bit = 1u8 << page;
                    pages.seq[page] = *seq;
                    pages.current = pages.current & !bit | if *copy == 1 { bit } else { 0 };
                    pages.durable = pages.durable & !bit | pages.current & bit;
                }
            }
            _ if pages.seq[page] == 0 => {}
            _ => {
                loaded.lost += 1;
                page_blocks(page).for_each(|block| table.lose(block));
            }
        }
    }
    (table, loaded)
}
