//! The log's writer: batches being filled, framed, in flight and durable; segments in use and free.
//!
//! Invariants: LSNs are given in the order of staging and framed in that order; a batch never
//! spans segments; durable means this batch and all before it.

use crate::api::{FileId, LOG_SEGMENTS_MIN, Layout, Lsn, Piece, Pieces, Record};
use crate::batch::{self, Head, Logged};
use crate::spares::Spares;
use protocol::types::{BLOCK_BYTES, Time};
use std::collections::VecDeque;

/// A batch that is not framed yet.
pub(crate) struct OpenBatch<P> {
    slots: Vec<u8>,
    records: u32,
    crcs: Vec<u32>,
    payload: Vec<(P, usize)>,
}

impl<P> OpenBatch<P> {
    fn new() -> Self {
        Self { slots: Vec::new(), records: 0, crcs: Vec::new(), payload: Vec::new() }
    }
    fn clear(&mut self) {
        self.slots.clear();
        self.records = 0;
        self.crcs.clear();
        self.payload.clear();
    }
    fn blocks(&self) -> u32 {
        batch::header_blocks(self.slots.len() / batch::SLOT_BYTES, self.crcs.len()) + self.crcs.len() as u32
    }
}

/// Where a framed batch lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BatchPlace {
    /// [`NOWHERE`] for a batch that was lost.
    pub segment: u32,
    pub block: u32,
    pub header_blocks: u32,
}

/// Blocks at the end of each segment kept for the empty batches of starts, one block each: a start
/// that finds the log full must still be able to flush, and flushing begins after that batch.
pub(crate) const START_BLOCKS: u32 = 8;

/// Segment of a batch that was lost.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// A segment in use, from the oldest to the one being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SegmentUse {
    pub segment: u32,
    pub epoch: u64,
    pub first_lsn: u64,
}

/// A framed batch, to be written.
pub(crate) struct Framed<P> {
    pub lsn: u64,
    pub file: FileId,
    pub offset: u64,
    pub pieces: Pieces<P>,
    pub blocks: u32,
    pub records: u32,
}

/// Payload blocks that make a batch worth writing beside one in flight: fewer wait for its end, and share a header
/// block and a synced write.
const NEXT_BLOCKS_MIN: usize = 12;

/// Batches that keep their memory for the next ones.
const SPARE_BATCHES_MAX: usize = 8;

/// The writer.
pub(crate) struct Log<P> {
    pub disk_tag: u64,
    pub segment_blocks: u32,
    pub batch_blocks_max: u32,
    pub in_flight_max: usize,
    pub uses: VecDeque<SegmentUse>,
    pub free: VecDeque<u32>,
    /// Segments that are written and usable, in use or free.
    pub ready: u32,
    /// Next block of the last segment in use.
    pub block: u32,
    pub chain: u32,
    pub epoch: u64,
    /// Places of the batches from `first_place` on.
    pub places: VecDeque<BatchPlace>,
    pub first_place: u64,
    open_lsn: u64,
    open: OpenBatch<P>,
    closed: VecDeque<OpenBatch<P>>,
    /// Empty, to be filled again.
    spare: Vec<OpenBatch<P>>,
    closed_blocks: u32,
    in_flight: VecDeque<bool>,
    pub durable: u64,
    /// The highest durable LSN that a header tells.
    pub attested: u64,
    /// The first batch is not framed yet.
    starting: bool,
    last_was_seal: bool,
    pub last_done: Time,
}

impl<P: Clone> Log<P> {
    pub(crate) fn new(layout: &Layout, disk_tag: u64, durable: u64) -> Self {
        Self {
            disk_tag,
            segment_blocks: layout.segment_blocks(),
            batch_blocks_max: layout.batch_blocks_max,
            in_flight_max: layout.batches_in_flight_max,
            uses: VecDeque::new(),
            free: VecDeque::new(),
            ready: 0,
            block: 0,
            chain: 0,
            epoch: 0,
            places: VecDeque::new(),
            first_place: durable + 1,
            open_lsn: durable + 1,
            open: OpenBatch::new(),
            closed: VecDeque::new(),
            spare: Vec::new(),
            closed_blocks: 0,
            in_flight: VecDeque::new(),
            durable,
            attested: durable,
            starting: false,
            last_was_seal: true,
            last_done: Time(0),
        }
    }

    /// A batch is to be written as soon as possible, to attest what was read at the start. If the
    /// log is full, an empty one before all others, since that always has a place.
    pub(crate) fn start(&mut self) {
        assert!(!self.has_work(), "the first batch");
        self.starting = true;
        if self.free.is_empty() {
            let batch = OpenBatch::new();
            self.closed_blocks += batch.blocks();
            self.closed.push_back(batch);
            self.open_lsn += 1;
        }
    }
    /// LSN that the next record will get, unless its batch is full.
    pub(crate) fn next_lsn(&self) -> u64 {
        self.open_lsn
    }
    /// LSN of the last record staged.
    pub(crate) fn staged(&self) -> u64 {
        if self.open.records > 0 { self.open_lsn } else { self.open_lsn - 1 }
    }
    /// Appends a record; tells its LSN and the place of its payload.
    pub(crate) fn stage(
        &mut self,
        record: Record,
        extra: u64,
        payload: Option<(P, usize)>,
        crcs: &[u32],
    ) -> (Lsn, u32) {
        let slots = self.open.slots.len() / batch::SLOT_BYTES + batch::record_slots(&record);
        let blocks = self.open.crcs.len() + crcs.len();
        let full = blocks > self.batch_blocks_max as usize
            || batch::header_blocks(slots, blocks) > batch::HEADER_BLOCKS_MAX;
        if full {
            self.close();
        }
        let at = self.open.crcs.len() as u32;
        batch::encode_record(&mut self.open.slots, &Logged { record, at, extra });
        self.open.records += 1;
        self.open.crcs.extend_from_slice(crcs);
        self.open.payload.extend(payload);
        (Lsn(self.open_lsn), at)
    }
    /// Ends the batch being filled, if it holds anything: what is staged next gets a higher LSN.
    pub(crate) fn close(&mut self) {
        if self.open.records > 0 {
            let batch = self.take_open();
            self.closed_blocks += batch.blocks();
            self.closed.push_back(batch);
            self.open_lsn += 1;
        }
    }
    /// Blocks that may still be staged while a reserve is left for what must always fit: small records,
    /// and the copies of what waits to be applied in the oldest segment, which may be full of it.
    pub(crate) fn room(&self) -> u32 {
        let most = self.batch_blocks_max + batch::HEADER_BLOCKS_MAX;
        let Some(whole) = (self.free.len() as u32).checked_sub(self.reserve()) else { return 0 };
        let whole = whole * (self.usable() - most);
        let here = self.usable().saturating_sub(self.block).saturating_sub(most);
        (whole + here).saturating_sub(self.closed_blocks + self.open.blocks())
    }
    /// Segments kept free. One as long as the log is being formatted, and in the short ones of old disks, where two would
    /// leave too little.
    pub(crate) fn reserve(&self) -> u32 {
        if self.ready < LOG_SEGMENTS_MIN { 1 } else { 2 }
    }
    /// Blocks of all segments that are there.
    pub(crate) fn ready_blocks(&self) -> usize {
        self.ready as usize * self.segment_blocks as usize
    }
    /// Blocks that are not written yet, without a reserve.
    pub(crate) fn space(&self) -> u32 {
        let most = self.batch_blocks_max + batch::HEADER_BLOCKS_MAX;
        let here = if self.uses.is_empty() {
            0
        } else {
            (self.usable() - self.block.min(self.usable())).saturating_sub(most)
        };
        let free = self.free.len() as u32 * (self.usable() - most);
        (free + here).saturating_sub(self.closed_blocks + self.open.blocks())
    }
    /// Blocks of a segment for all batches but those of a start.
    fn usable(&self) -> u32 {
        self.segment_blocks - START_BLOCKS
    }
    /// Whether a batch of so many blocks has a place.
    fn fits(&self, blocks: u32) -> bool {
        let end = if self.starting { self.segment_blocks } else { self.usable() };
        !self.uses.is_empty() && self.block + blocks <= end
    }
    /// Where a payload block lies; `None` for a batch that is not framed, lost or recycled.
    pub(crate) fn place(&self, lsn: u64, at: u32) -> Option<(u32, u32)> {
        let place = self.places.get(lsn.checked_sub(self.first_place)? as usize)?;
        (place.segment != NOWHERE).then_some((place.segment, place.block + place.header_blocks + at))
    }
    /// When an empty batch is due, if nothing else is written.
    pub(crate) fn seal_due(&self, idle: u64) -> Option<Time> {
        let place = self.fits(1) || !self.free.is_empty();
        let needed =
            self.in_flight.is_empty() && self.attested < self.durable && !self.last_was_seal && place;
        needed.then_some(Time(self.last_done.0.saturating_add(idle)))
    }
    /// Whether something is staged and not framed.
    pub(crate) fn has_work(&self) -> bool {
        !self.closed.is_empty() || self.open.records > 0
    }
    /// Frames the next batch if there is something to write and room in flight.
    pub(crate) fn frame(&mut self, seal_due: bool, spares: &mut Spares<P>) -> Option<Framed<P>> {
        let work = !self.closed.is_empty() || self.open.records > 0 || seal_due || self.starting;
        let worth =
            self.in_flight.is_empty() || !self.closed.is_empty() || self.open.crcs.len() >= NEXT_BLOCKS_MIN;
        if !work || !worth || self.in_flight.len() >= self.in_flight_max {
            return None;
        }
        let blocks = self.closed.front().unwrap_or(&self.open).blocks();
        if !self.fits(blocks) {
            self.next_segment()?;
        }
        let batch = match self.closed.pop_front() {
            Some(batch) => {
                self.closed_blocks -= blocks;
                batch
            }
            None => {
                self.open_lsn += 1;
                self.take_open()
            }
        };
        self.starting = false;
        Some(self.put(batch, blocks, spares))
    }
    /// What is filled, with an empty batch in its place.
    fn take_open(&mut self) -> OpenBatch<P> {
        let empty = self.spare.pop().unwrap_or_else(OpenBatch::new);
        std::mem::replace(&mut self.open, empty)
    }
    /// Opens a free segment; `None` when there is none.
    fn next_segment(&mut self) -> Option<()> {
        let segment = self.free.pop_front()?;
        self.epoch += 1;
        self.block = 0;
        self.uses.push_back(SegmentUse { segment, epoch: self.epoch, first_lsn: self.framed() + 1 });
        Some(())
    }
    /// LSN of the last batch framed.
    fn framed(&self) -> u64 {
        self.open_lsn - 1 - self.closed.len() as u64
    }
    fn put(&mut self, mut batch: OpenBatch<P>, blocks: u32, spares: &mut Spares<P>) -> Framed<P> {
        let lsn = self.framed();
        let (segment, block) = (self.uses.back().expect("a segment is open").segment, self.block);
        let mut head = Head {
            lsn,
            epoch: self.epoch,
            durable_lsn: self.durable,
            disk_tag: self.disk_tag,
            segment,
            block,
            chain: self.chain,
            payload_blocks: batch.crcs.len() as u32,
            records: batch.records,
            ..Head::default()
        };
        let mut header = spares.bytes();
        batch::encode(&mut head, &batch.slots, &batch.crcs, &mut header);
        assert_eq!(head.total_blocks(), blocks);
        assert_eq!(self.first_place + self.places.len() as u64, lsn);
        self.places.push_back(BatchPlace { segment, block, header_blocks: head.header_blocks.into() });
        self.chain = head.crc;
        self.attested = self.durable;
        self.last_was_seal = batch.records == 0;
        self.block += blocks;
        self.in_flight.push_back(false);
        let mut pieces = spares.pieces();
        pieces.push(Piece::Bytes(header));
        let payload = batch.payload.drain(..);
        pieces.extend(payload.map(|(payload, count)| Piece::Payload { payload, first: 0, count }));
        let records = batch.records;
        batch.clear();
        if self.spare.len() < SPARE_BATCHES_MAX {
            self.spare.push(batch);
        }
        let offset = u64::from(block) * BLOCK_BYTES as u64;
        Framed { lsn, file: FileId::Log(segment), offset, pieces, blocks, records }
    }
    /// A batch is durable by itself; true when the durable LSN moved.
    pub(crate) fn written(&mut self, lsn: u64, now: Time) -> bool {
        self.in_flight[(lsn - self.durable - 1) as usize] = true;
        let before = self.durable;
        while self.in_flight.front() == Some(&true) {
            self.in_flight.pop_front();
            self.durable += 1;
        }
        self.last_done = now;
        self.durable > before
    }
    /// Frees the segments whose batches are all below `lsn`; tells how many.
    pub(crate) fn recycle(&mut self, lsn: u64) -> u64 {
        let mut count = 0;
        while self.uses.len() > 1 && self.uses[1].first_lsn <= lsn {
            let old = self.uses.pop_front().expect("more than one");
            self.free.push_back(old.segment);
            count += 1;
        }
        let first = self.uses.front().map_or(self.first_place, |u| u.first_lsn);
        while self.first_place < first && !self.places.is_empty() {
            self.places.pop_front();
            self.first_place += 1;
        }
        count
    }
}
