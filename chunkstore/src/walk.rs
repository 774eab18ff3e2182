//! Reading the log back: from the replay start to its end, telling a torn tail from damage.
//!
//! The decision table (a test a row in `tests/decisions.rs`). N is the next LSN expected, D the
//! highest LSN known to have been durable: the checkpoint's, or that of any batch found past N.
//!
//! | at the expected place               | D      | verdict                                        |
//! |-------------------------------------|--------|------------------------------------------------|
//! | a whole batch N                     | any    | replay it                                      |
//! | batch N in the next segment's start | any    | go on there                                    |
//! | header N whole, payload bad         | >= N   | payload damage: replay, mark the bad blocks    |
//! | header N whole, payload bad         | < N    | torn tail: cut, erase what follows             |
//! | no header N, later batches          | >= N   | damage: a hole; go on after it                 |
//! | no header N, no later batch         | >= N   | damage: the end is lost                        |
//! | no header N                         | < N    | the end; what follows is torn, erased          |
//!
//! A block that cannot be read is no torn write: where batch N may lie in it, N counts as durable (D >= N).

use crate::api::{BATCH_BLOCKS_MAX, FileId, IoError, Layout, Media};
use crate::batch::{self, HEADER_BLOCKS_MAX, Head, Logged};
use crate::checkpoint::Checkpoint;
use crate::log::{BatchPlace, NOWHERE, START_BLOCKS, SegmentUse};
use protocol::types::{BLOCK_BYTES, block_crc};

/// A batch that was found.
pub(crate) struct Found {
    pub head: Head,
    pub records: Vec<Logged>,
    pub crcs: Vec<u32>,
    /// Payload blocks that fail their CRC.
    pub bad: Vec<u32>,
}

/// The log as read.
#[derive(Default)]
pub(crate) struct Walk {
    pub batches: Vec<Found>,
    /// Segments from the replay start on.
    pub uses: Vec<SegmentUse>,
    /// Places of all LSNs from the replay start on.
    pub places: Vec<BatchPlace>,
    pub last_lsn: u64,
    pub block: u32,
    pub chain: u32,
    /// The highest epoch seen.
    pub epoch: u64,
    /// Torn batches: headers to be erased.
    pub torn: Vec<(u32, u32)>,
    /// Lost LSNs, first and last.
    pub holes: Vec<(u64, u64)>,
    /// In words, with places.
    pub damages: Vec<String>,
}

struct Reader<'m, M: ?Sized> {
    media: &'m mut M,
    layout: Layout,
    disk_tag: u64,
    at: Option<u32>,
    image: Image,
}

/// Part of a segment from its first block on. Blocks that could not be read are zeroes.
#[derive(Default)]
struct Image {
    bytes: Vec<u8>,
    unreadable: Vec<u32>,
}

impl Image {
    /// Fills what there is memory for, block by block if need be.
    fn read<M: Media + ?Sized>(&mut self, media: &mut M, file: FileId) {
        self.unreadable.clear();
        if media.read(file, 0, &mut self.bytes).is_ok() {
            return;
        }
        for (nth, block) in self.bytes.chunks_mut(BLOCK_BYTES).enumerate() {
            if media.read(file, (nth * BLOCK_BYTES) as u64, block).is_err() {
                block.fill(0);
                self.unreadable.push(nth as u32);
            }
        }
    }
    /// Blocks from `block` on that cannot be read and may hold the header of this batch.
    fn hidden(&self, block: u32, lsn: u64) -> impl Iterator<Item = u32> {
        let rest = self.bytes.get(block as usize * BLOCK_BYTES..).unwrap_or_default();
        // Of a header whose first block is there the others matter too.
        let blocks = batch::claimed_blocks(rest, lsn).unwrap_or(1);
        self.unreadable.iter().copied().filter(move |at| (block..block + blocks).contains(at))
    }
}

impl<M: Media + ?Sized> Reader<'_, M> {
    /// A segment; a missing one is empty.
    fn segment(&mut self, segment: u32) -> Result<&Image, IoError> {
        if self.at != Some(segment) {
            self.at = None;
            let file = FileId::Log(segment);
            let exists = segment < self.layout.log_segments && self.media.len(file)?.is_some();
            self.image.bytes.clear();
            if exists {
                self.image.bytes.resize(self.layout.segment_bytes as usize, 0);
            }
            self.image.read(self.media, file);
            self.at = Some(segment);
        }
        Ok(&self.image)
    }
    fn head(&mut self, segment: u32, block: u32) -> Result<Option<Head>, IoError> {
        let tag = self.disk_tag;
        let image = self.segment(segment)?;
        Ok(head_at(&image.bytes, segment, block, tag))
    }
    /// The first blocks of a segment without reading all of it.
    fn front(&mut self, segment: u32, blocks: u32) -> Result<Image, IoError> {
        let file = FileId::Log(segment);
        let mut image = Image::default();
        if self.media.len(file)?.is_some() {
            image.bytes.resize(blocks.min(self.layout.segment_blocks()) as usize * BLOCK_BYTES, 0);
            image.read(self.media, file);
        }
        Ok(image)
    }
}

fn head_at(bytes: &[u8], segment: u32, block: u32, disk_tag: u64) -> Option<Head> {
    let rest = bytes.get(block as usize * BLOCK_BYTES..)?;
    let head = batch::decode(rest)?;
    // A batch is written before it is durable, so it attests those before it only.
    let attests = head.durable_lsn < head.lsn;
    let fits = head.total_blocks() as usize * BLOCK_BYTES <= rest.len();
    (fits && attests && head.disk_tag == disk_tag && head.segment == segment && head.block == block)
        .then_some(head)
}

/// Where the next batch is expected.
#[derive(Clone, Copy)]
struct Place {
    segment: u32,
    epoch: u64,
    block: u32,
    lsn: u64,
    chain: Option<u32>,
}

/// Reads the log from where the checkpoint says.
pub(crate) fn walk<M: Media + ?Sized>(
    media: &mut M,
    layout: &Layout,
    from: &Checkpoint,
) -> Result<Walk, IoError> {
    let mut reader =
        Reader { media, layout: *layout, disk_tag: from.disk_tag, at: None, image: Image::default() };
    let mut walk = Walk { last_lsn: from.replay_lsn - 1, epoch: from.replay_epoch, ..Walk::default() };
    let mut place = Place {
        segment: from.replay_segment,
        epoch: from.replay_epoch,
        block: 0,
        lsn: from.replay_lsn,
        chain: None,
    };
    walk.uses.push(SegmentUse { segment: place.segment, epoch: place.epoch, first_lsn: place.lsn });
    // Batches past the expected place, and the highest LSN known to have been durable: looked for
    // at the first trouble only, since that means to read much.
    loop {
        let head = reader.head(place.segment, place.block)?.filter(|h| expected(h, &place));
        let Some(head) = head else {
            let hidden = reader.segment(place.segment)?.hidden(place.block, place.lsn);
            let mut hidden: Vec<_> = hidden.map(|block| (place.segment, block)).collect();
            if let Some(next) = next_segment(&mut reader, &walk, &place, &mut hidden)? {
                walk.enter(next);
                place = next;
                continue;
            }
            let later = later(&mut reader, &place, place.lsn)?;
            let unreadable = hidden.iter().map(|(s, b)| format!("log segment {s} block {b} cannot be read"));
            walk.damages.extend(unreadable);
            let known = match () {
                () if hidden.is_empty() => from.durable_lsn,
                () if !later.is_empty() => from.durable_lsn.max(place.lsn),
                // The end. Nobody knows how many batches there were, and if the block can be read the next time they
                // come back: what is written from now on must have other LSNs, and another epoch.
                () => {
                    walk.epoch += 1;
                    from.durable_lsn.max(place.lsn + u64::from(layout.segment_blocks()))
                }
            };
            match resume(&mut walk, &place, &later, known) {
                Some(next) => place = next,
                None => return Ok(walk),
            }
            continue;
        };
        let Some(found) = open(&reader.segment(place.segment)?.bytes, head) else {
            walk.damages.push(format!("log batch {} is whole but makes no sense", head.lsn));
            walk.holes.push((head.lsn, head.lsn));
            walk.accept_place(&head);
            place = after(&place, &head);
            continue;
        };
        if !found.bad.is_empty() {
            let later = later(&mut reader, &place, place.lsn + 1)?;
            let durable = later.iter().map(|h| h.durable_lsn).max().unwrap_or(0).max(from.durable_lsn);
            let payload = place.block + u32::from(head.header_blocks);
            let unreadable = &reader.segment(place.segment)?.unreadable;
            let torn = !found.bad.iter().any(|bad| unreadable.contains(&(payload + bad)));
            if torn && durable < head.lsn {
                walk.torn.push((place.segment, place.block));
                walk.torn.extend(later.iter().map(|h| (h.segment, h.block)));
                walk.finish(&place);
                return Ok(walk);
            }
            let (segment, block) = (place.segment, place.block);
            let count = found.bad.len();
            walk.damages.push(format!(
                "log segment {segment} block {block}: {count} payload blocks of batch {} are bad",
                head.lsn
            ));
        }
        walk.accept_place(&head);
        walk.batches.push(found);
        place = after(&place, &head);
        walk.finish(&place);
    }
}

fn expected(head: &Head, place: &Place) -> bool {
    head.lsn == place.lsn && head.epoch == place.epoch && place.chain.is_none_or(|c| c == head.chain)
}

fn after(place: &Place, head: &Head) -> Place {
    Place { block: head.block + head.total_blocks(), lsn: head.lsn + 1, chain: Some(head.crc), ..*place }
}

impl Walk {
    fn enter(&mut self, place: Place) {
        self.uses.push(SegmentUse { segment: place.segment, epoch: place.epoch, first_lsn: place.lsn });
        self.epoch = self.epoch.max(place.epoch);
        (self.block, self.chain) = (place.block, place.chain.unwrap_or(self.chain));
    }
    fn accept_place(&mut self, head: &Head) {
        let header_blocks = head.header_blocks.into();
        self.places.push(BatchPlace { segment: head.segment, block: head.block, header_blocks });
        self.last_lsn = head.lsn;
        (self.block, self.chain) = (head.block + head.total_blocks(), head.crc);
    }
    fn finish(&mut self, place: &Place) {
        self.block = place.block;
        self.chain = place.chain.unwrap_or(self.chain);
    }
    fn lose(&mut self, first: u64, last: u64) {
        self.holes.push((first, last));
        for _ in first..=last {
            self.places.push(BatchPlace { segment: NOWHERE, block: 0, header_blocks: 0 });
        }
        self.last_lsn = last;
    }
}

/// The start of another segment, if the expected batch is there. If it is nowhere, `hidden` gets the
/// unreadable blocks in which it may be.
fn next_segment<M: Media + ?Sized>(
    reader: &mut Reader<'_, M>,
    walk: &Walk,
    place: &Place,
    hidden: &mut Vec<(u32, u32)>,
) -> Result<Option<Place>, IoError> {
    // While the largest batch has a place in this segment no other is begun, but after a start that found damage.
    let most = place.block + BATCH_BLOCKS_MAX + HEADER_BLOCKS_MAX + START_BLOCKS;
    let may_end = most > reader.layout.segment_blocks() || !walk.damages.is_empty();
    for segment in (0..reader.layout.log_segments).filter(|s| *s != place.segment) {
        let front = reader.front(segment, HEADER_BLOCKS_MAX)?;
        // The payload may reach beyond the front, so the head alone is looked at.
        let Some(head) = batch::decode(&front.bytes) else {
            if may_end && walk.uses.iter().all(|u| u.segment != segment) {
                hidden.extend(front.hidden(0, place.lsn).map(|block| (segment, block)));
            }
            continue;
        };
        let next = Place { segment, epoch: place.epoch + 1, block: 0, ..*place };
        if expected(&head, &next)
            && head.segment == segment
            && head.block == 0
            && head.disk_tag == reader.disk_tag
        {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

/// Batches of this LSN and later past the expected place, in order of LSN.
fn later<M: Media + ?Sized>(
    reader: &mut Reader<'_, M>,
    place: &Place,
    lsn: u64,
) -> Result<Vec<Head>, IoError> {
    let tag = reader.disk_tag;
    let scan = |bytes: &[u8], segment: u32, from: u32, out: &mut Vec<Head>| {
        let blocks = (bytes.len() / BLOCK_BYTES) as u32;
        out.extend((from..blocks).filter_map(|block| head_at(bytes, segment, block, tag)));
    };
    let mut heads = Vec::new();
    scan(&reader.segment(place.segment)?.bytes, place.segment, place.block, &mut heads);
    heads.retain(|h| h.epoch == place.epoch);
    // Of other segments, those in use later; what can be in flight at once lies within their first part.
    let window =
        (reader.layout.batches_in_flight_max as u32 + 1).max(8) * (BATCH_BLOCKS_MAX + HEADER_BLOCKS_MAX);
    for segment in (0..reader.layout.log_segments).filter(|s| *s != place.segment) {
        let front = reader.front(segment, window)?;
        let mut found = Vec::new();
        scan(&front.bytes, segment, 0, &mut found);
        heads.extend(found.into_iter().filter(|h| h.epoch > place.epoch));
    }
    // There are fewer batches than blocks, so what claims to be further ahead is nonsense.
    heads.retain(|h| h.lsn >= lsn && h.lsn - lsn <= reader.layout.log_blocks());
    heads.sort_unstable_by_key(|h| (h.lsn, h.epoch));
    Ok(heads)
}

/// Nothing is at the expected place: where the log goes on, or `None` at its end.
fn resume(walk: &mut Walk, place: &Place, later: &[Head], checkpoint_durable: u64) -> Option<Place> {
    let durable = later.iter().map(|h| h.durable_lsn).max().unwrap_or(0).max(checkpoint_durable);
    let (segment, block) = (place.segment, place.block);
    if durable < place.lsn {
        walk.torn.extend(later.iter().map(|h| (h.segment, h.block)));
        walk.finish(place);
        return None;
    }
    walk.epoch = later.iter().map(|h| h.epoch).fold(walk.epoch, u64::max);
    let Some(head) = later.first() else {
        walk.damages.push(format!(
            "log segment {segment} block {block}: batches {} to {durable} are lost",
            place.lsn
        ));
        walk.lose(place.lsn, durable);
        return None;
    };
    if head.lsn > place.lsn {
        let last = head.lsn - 1;
        walk.damages
            .push(format!("log segment {segment} block {block}: batches {} to {last} are lost", place.lsn));
        walk.lose(place.lsn, last);
    } else {
        walk.damages
            .push(format!("log segment {segment} block {block}: batch {} does not follow", place.lsn));
        walk.holes.push((place.lsn, place.lsn));
    }
    let next =
        Place { segment: head.segment, epoch: head.epoch, block: head.block, lsn: head.lsn, chain: None };
    if head.segment != segment {
        walk.enter(next);
    }
    Some(next)
}

/// Reads a batch's records and checks its payload.
fn open(segment: &[u8], head: Head) -> Option<Found> {
    let bytes = &segment[head.block as usize * BLOCK_BYTES..];
    let (records, crcs) = batch::contents(&head, bytes)?;
    let payload = bytes[usize::from(head.header_blocks) * BLOCK_BYTES..].chunks_exact(BLOCK_BYTES);
    let bad = payload.zip(&crcs).enumerate().filter(|(_, (block, crc))| block_crc(block) != **crc);
    let bad = bad.map(|(nth, _)| nth as u32).collect();
    Some(Found { head, records, crcs, bad })
}
