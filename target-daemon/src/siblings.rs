//! The shards of one target, to each other: mailboxes instead of links.
//!
//! What goes between them is connections of hosts that one shard accepted and another is to serve ([`crate::spread`]),
//! requests of hosts whose connection and whose leader sit on different cores, and their answers. Memory for IO belongs to
//! one core alone, which lends its runs ([`reactor::loan`]). Data of an answer is sent to the host from where it lies; that
//! of a write is copied once, into the receiver's arena, for it stays there until it is flushed, longer than the sender can
//! spare its memory. When as much is lent as may be (hosts that stop taking answers hold it), data is copied into the parcel.
//!
//! Invariants: parcels arrive in the order in which they were sent, and none is lost while both shards run; so a
//! sibling is never "down" unless its shard has ended, and no request to it is ever sent twice. A parcel that finds
//! the mailbox full waits with its sender; how many can wait is bounded by what hosts may have in flight.

use crate::core_loop::Port;
use crate::mem::{Mem, Mems};
use crate::spread::Place;
use chunkstore::Payload;
use protocol::frame::{Part, layout};
use protocol::peer::PeerMessage;
use protocol::types::BLOCK_BYTES;
use reactor::loan::{Borrower, BorrowerEnd, Lender, LenderEnd, Loan, pair};
use reactor::mailbox::{MailboxReceiver, MailboxSender, mailbox};
use reactor::{Arena, BufMut, Waker};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Parcels that a mailbox holds.
const CAPACITY: usize = 256;

/// One part in so many of a shard's arena may be lent, to all siblings together.
const LENT_SHARE: usize = 4;

/// What goes between two shards of one target.
#[derive(Debug)]
enum Parcel {
    Letter(Letter),
    Guest(Guest),
}

/// A message with its block data.
#[derive(Debug)]
struct Letter {
    message: PeerMessage,
    data: Data,
    /// Whether it answers a question of the receiver.
    answer: bool,
}

/// A host's connection, just accepted, on its way to the shard that is to serve it.
#[derive(Debug)]
pub struct Guest {
    /// What it came to.
    pub port: Port,
    /// Its connection.
    pub socket: OwnedFd,
    /// Where it is served.
    pub place: Place,
}

/// The block data of a parcel: whole blocks, as they lay with the sender.
#[derive(Debug)]
enum Data {
    Lent(SmallVec<[Lent; 2]>),
    Copied(Box<[u8]>),
}

/// A window of blocks on a run that is lent.
#[derive(Debug)]
struct Lent {
    loan: Loan,
    first: usize,
    count: usize,
}

/// What a sibling has for us.
#[derive(Debug)]
pub enum Delivery {
    /// A message.
    Message {
        /// The message.
        message: PeerMessage,
        /// Its block data, as a link would have delivered it.
        payload: Mems,
        /// Whether it answers a question of ours.
        answer: bool,
    },
    /// A host that is to be served here.
    Guest(Guest),
}

/// What joins two shards at one of them, before it is on its core.
pub struct SiblingEnd {
    shard: u16,
    sender: MailboxSender<Parcel>,
    receiver: MailboxReceiver<Parcel>,
    lender: LenderEnd,
    borrower: BorrowerEnd,
}

/// Another shard of this target, as one shard sees it.
pub struct Sibling {
    shard: u16,
    sender: MailboxSender<Parcel>,
    receiver: MailboxReceiver<Parcel>,
    lender: Lender,
    borrower: Borrower,
    waiting: VecDeque<Parcel>,
    /// Something was posted since the last wake.
    posted: bool,
    /// Taken from the mailbox, but the arena had no room for its data.
    held: Option<Letter>,
    parts: Vec<Part>,
}

/// Joins the shards of a target, each woken by its waker, every one to every other: the ends for each.
pub fn mesh(wakers: &[Waker]) -> Vec<Vec<SiblingEnd>> {
    let mut all: Vec<Vec<SiblingEnd>> = wakers.iter().map(|_| Vec::new()).collect();
    for high in 0..wakers.len() {
        for low in 0..high {
            let (to_high, from_low) = mailbox(CAPACITY, wakers[high].clone());
            let (to_low, from_high) = mailbox(CAPACITY, wakers[low].clone());
            let ((low_lends, high_borrows), (high_lends, low_borrows)) = (pair(), pair());
            all[low].push(SiblingEnd {
                shard: high as u16,
                sender: to_high,
                receiver: from_high,
                lender: low_lends,
                borrower: low_borrows,
            });
            all[high].push(SiblingEnd {
                shard: low as u16,
                sender: to_low,
                receiver: from_low,
                lender: high_lends,
                borrower: high_borrows,
            });
        }
    }
    all
}

/// A shard's siblings, once it is on its core and has its arena.
pub fn join(ends: Vec<SiblingEnd>, arena: &Arena) -> Vec<Sibling> {
    let share = LENT_SHARE * ends.len();
    ends.into_iter().map(|end| Sibling::start(end, arena, share)).collect()
}

impl Sibling {
    fn start(end: SiblingEnd, arena: &Arena, share: usize) -> Self {
        let SiblingEnd { shard, sender, receiver, lender, borrower } = end;
        let (lender, borrower) = (lender.start(arena, share), borrower.start());
        let (waiting, parts) = (VecDeque::new(), Vec::new());
        Self { shard, sender, receiver, lender, borrower, waiting, posted: false, held: None, parts }
    }

    /// Its number within the target.
    pub fn shard(&self) -> u16 {
        self.shard
    }

    /// Whether its shard has ended.
    pub fn is_gone(&self) -> bool {
        self.sender.is_abandoned()
    }

    /// Sends, at the next [`Sibling::flush`] at the latest; `answer`: to a question of the sibling.
    pub fn send(&mut self, message: &PeerMessage, payload: &Mems, answer: bool) {
        let data = self.lend(payload).map_or_else(|| copied(payload), Data::Lent);
        self.waiting.push_back(Parcel::Letter(Letter { message: message.clone(), data, answer }));
        self.post();
    }

    /// Sends a host over.
    pub fn send_guest(&mut self, guest: Guest) {
        self.waiting.push_back(Parcel::Guest(guest));
        self.post();
    }

    /// All of it or nothing.
    fn lend(&mut self, payload: &Mems) -> Option<SmallVec<[Lent; 2]>> {
        let mut all = SmallVec::new();
        for run in payload {
            let (buf, start) = run.place();
            let Some(loan) = self.lender.lend(buf) else {
                all.into_iter().for_each(|Lent { loan, .. }| self.lender.take_back(loan));
                return None;
            };
            all.push(Lent { loan, first: start / BLOCK_BYTES, count: run.blocks() });
        }
        Some(all)
    }

    fn post(&mut self) {
        while let Some(parcel) = self.waiting.pop_front() {
            if let Err(parcel) = self.sender.post_quietly(parcel) {
                self.waiting.push_front(parcel);
                return;
            }
            self.posted = true;
        }
    }

    /// Posts what found the mailbox full, wakes the sibling once for all that was posted, and takes back what it has
    /// done with.
    pub fn flush(&mut self) {
        self.post();
        if std::mem::take(&mut self.posted) {
            self.sender.wake();
        }
        self.lender.collect();
    }

    /// Whether parcels wait for room in the mailbox; nobody tells when there is some.
    pub fn is_behind(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// How many parcels wait for room in the mailbox.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a parcel waits for room in the arena.
    pub fn is_starved(&self) -> bool {
        self.held.is_some()
    }

    /// The next parcel; `None` when there is none, or no room in the arena (see [`Sibling::is_starved`]).
    pub fn take(&mut self, arena: &Arena) -> Option<Delivery> {
        let letter =
            match self.held.take().map_or_else(|| self.receiver.take(), |held| Some(Parcel::Letter(held)))? {
                Parcel::Letter(letter) => letter,
                Parcel::Guest(guest) => return Some(Delivery::Guest(guest)),
            };
        let Some(room) = self.room_for(&letter, arena) else {
            self.held = Some(letter);
            return None;
        };
        let Letter { message, data, answer } = letter;
        let payload = match data {
            Data::Lent(lent) if answer => lent.into_iter().map(|lent| self.borrow(lent)).collect(),
            Data::Lent(lent) => {
                let lent: Mems = lent.into_iter().map(|lent| self.borrow(lent)).collect();
                fill(room, lent.iter().flat_map(|run| (0..run.blocks()).map(move |at| run.block(at))))
            }
            Data::Copied(blocks) => fill(room, blocks.chunks_exact(BLOCK_BYTES)),
        };
        Some(Delivery::Message { message, payload, answer })
    }

    /// Runs of ours, for data that is to be copied.
    fn room_for(&mut self, letter: &Letter, arena: &Arena) -> Option<SmallVec<[BufMut; 2]>> {
        if letter.answer && matches!(letter.data, Data::Lent(_)) {
            return Some(SmallVec::new());
        }
        layout(&letter.message, &mut self.parts).expect("a shard of this process sends what it may");
        self.parts.iter().map(|part| arena.alloc(part.blocks())).collect()
    }

    fn borrow(&mut self, Lent { loan, first, count }: Lent) -> Mem {
        Mem::whole(self.borrower.borrow(loan)).window(first, count)
    }
}

fn copied(payload: &Mems) -> Data {
    let mut blocks = Vec::with_capacity(payload.iter().map(|run| run.bytes().len()).sum());
    payload.iter().for_each(|run| blocks.extend_from_slice(run.bytes()));
    Data::Copied(blocks.into())
}

/// The runs with the blocks in them, in order.
fn fill<'a>(room: SmallVec<[BufMut; 2]>, mut blocks: impl Iterator<Item = &'a [u8]>) -> Mems {
    let filled = |mut run: BufMut| {
        for (place, block) in run.chunks_exact_mut(BLOCK_BYTES).zip(&mut blocks) {
            place.copy_from_slice(block);
        }
        Mem::whole(run.freeze())
    };
    room.into_iter().map(filled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::peer::{Hello, IoOp, IoOutcome, IoReply, IoRequest};
    use protocol::types::{ChunkId, CopysetId, SessionEpoch, ShardAddr, TargetId, Term, VolumeId};
    use reactor::Buf;

    fn hello(incarnation: u64) -> PeerMessage {
        let at = |shard| ShardAddr { target: TargetId(1), shard };
        PeerMessage::Hello(Hello { cluster: [0; 16], from: at(0), to: at(1), incarnation })
    }

    /// What a write of one block 512 bytes into its chunk carries: two blocks.
    fn write() -> PeerMessage {
        let chunk = ChunkId { volume: VolumeId(1), index: 0 };
        let op = IoOp::Write { chunk, offset: 512, length: BLOCK_BYTES as u32, crc: 0 };
        PeerMessage::Io(IoRequest { id: 1, copyset: CopysetId(1), term: Term(1), epoch: SessionEpoch(0), op })
    }

    /// The answer to a read of so many blocks.
    fn read(blocks: usize) -> PeerMessage {
        let present = u32::MAX >> (32 - blocks);
        let outcome = IoOutcome::Data { present, crcs: (0..blocks as u32).collect() };
        PeerMessage::IoReply(IoReply { id: 1, copyset: CopysetId(1), outcome })
    }

    fn wakers(count: usize) -> Vec<Waker> {
        (0..count).map(|_| Waker::new().expect("an eventfd")).collect()
    }

    /// Shard 0's end towards 1, and the other, with arenas of so many bytes.
    fn two(zero_bytes: usize, one_bytes: usize) -> [(Sibling, Arena); 2] {
        let mut bytes = [zero_bytes, one_bytes].into_iter();
        let both = mesh(&wakers(2)).into_iter().map(|ends| {
            let arena = Arena::new(bytes.next().expect("two")).expect("memory");
            (join(ends, &arena).remove(0), arena)
        });
        both.collect::<Vec<_>>().try_into().unwrap_or_else(|_| panic!("two of two"))
    }

    fn message(delivery: Option<Delivery>) -> (PeerMessage, Mems, bool) {
        match delivery.expect("there is one, and room for it") {
            Delivery::Message { message, payload, answer } => (message, payload, answer),
            Delivery::Guest(_) => panic!("not a message"),
        }
    }

    fn filled(arena: &Arena, blocks: usize) -> Buf {
        let mut run = arena.alloc(blocks).expect("room");
        (0..run.len()).for_each(|at| run[at] = (at % 251) as u8);
        run.freeze()
    }

    #[test]
    fn every_shard_has_every_other_as_its_sibling() {
        for (me, siblings) in mesh(&wakers(4)).iter().enumerate() {
            let mut shards: Vec<usize> = siblings.iter().map(|s| usize::from(s.shard)).collect();
            shards.sort_unstable();
            assert_eq!(shards, (0..4).filter(|other| *other != me).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_mailbox_keeps_the_order_and_loses_nothing() {
        let [(mut zero, _), (mut one, arena)] = two(1 << 20, 1 << 20);
        let count = 3 * CAPACITY as u64;
        (0..count).for_each(|n| zero.send(&hello(n), &Mems::new(), n % 2 == 0));
        zero.flush();
        assert!(zero.is_behind(), "more was sent than a mailbox holds");
        let mut came = Vec::new();
        while came.len() < count as usize {
            while let Some(delivery) = one.take(&arena) {
                let (message, _, answer) = self::message(Some(delivery));
                assert_eq!(answer, came.len() % 2 == 0);
                came.push(message);
            }
            zero.flush();
        }
        assert_eq!(came, (0..count).map(hello).collect::<Vec<_>>());
        assert!(!zero.is_behind() && one.take(&arena).is_none());
        drop(one);
        assert!(zero.is_gone());
    }

    #[test]
    fn data_of_a_write_waits_for_room_and_then_lies_in_the_receivers_arena() {
        let [(mut zero, from), (mut one, to)] = two(4 << 20, 128 << 10);
        let run = filled(&from, 2);
        zero.send(&write(), &std::iter::once(Mem::whole(run.clone())).collect(), false);
        zero.flush();
        let hog = to.alloc(32).unwrap();
        assert!(one.take(&to).is_none() && one.is_starved());
        assert!(run.references() > 1, "lent, until there is room");
        drop(hog);
        let (came, payload, answer) = message(one.take(&to));
        assert_eq!((came, answer), (write(), false));
        let [data] = &payload[..] else { panic!("one run, not {}", payload.len()) };
        assert!(!data.place().0.is_borrowed() && data.bytes() == &run[..]);
        zero.flush();
        assert_eq!(run.references(), 1, "it has come back");
    }

    #[test]
    fn data_of_an_answer_is_read_where_it_lies_and_comes_back() {
        let [(mut zero, from), (mut one, to)] = two(4 << 20, 128 << 10);
        let run = filled(&from, 4);
        let whole = Mem::whole(run.clone());
        let windows: Mems = [whole.window(1, 2), whole.window(3, 1)].into_iter().collect();
        drop(whole);
        zero.send(&read(3), &windows, true);
        zero.flush();
        drop(windows);
        let hog = to.alloc(32).unwrap();
        let (_, came, _) = message(one.take(&to));
        let bytes: Vec<u8> = came.iter().flat_map(Mem::bytes).copied().collect();
        assert_eq!(bytes, run[BLOCK_BYTES..], "the windows, in order");
        assert!(came.iter().all(|data| data.place().0.is_same_run(&run)));
        zero.flush();
        assert!(run.references() > 1, "as long as it is read");
        drop((came, hog));
        zero.flush();
        assert_eq!(run.references(), 1, "it has come back");
    }

    #[test]
    fn what_a_shard_may_not_lend_any_more_is_copied() {
        let [(mut zero, from), (mut one, to)] = two(4 << 20, 4 << 20);
        let runs: Vec<_> = (0..12).map(|_| filled(&from, 32)).collect();
        let answered = |run: &Buf| {
            zero.send(&read(32), &std::iter::once(Mem::whole(run.clone())).collect(), true);
            zero.flush();
            message(one.take(&to)).1
        };
        let came: Vec<_> = runs.iter().map(answered).collect();
        let borrowed = came.iter().filter(|came| came[0].place().0.is_borrowed()).count();
        assert_eq!(borrowed, 8, "a quarter of 32 runs");
        assert!(came.iter().all(|came| came[0].bytes() == &runs[0][..]));
        drop(came);
        zero.flush();
        assert!(runs.iter().all(|run| run.references() == 1) && to.used_blocks() == 0);
    }
}
