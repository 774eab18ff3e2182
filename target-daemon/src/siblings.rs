//! The shards of one target, to each other: mailboxes instead of links.
//!
//! What goes between them is requests of hosts whose connection and whose leader sit on different cores. Memory for
//! IO belongs to one core alone, so block data is copied once: out of the sender's arena into the parcel, from there
//! into the receiver's.
//!
//! Invariants: parcels arrive in the order in which they were sent, and none is lost while both shards run; so a
//! sibling is never "down" unless its shard has ended, and no request to it is ever sent twice. A parcel that finds
//! the mailbox full waits with its sender; how many can wait is bounded by what hosts may have in flight.

use crate::mem::{Mem, Mems};
use protocol::frame::{Part, layout};
use protocol::peer::PeerMessage;
use reactor::mailbox::{MailboxReceiver, MailboxSender, mailbox};
use reactor::{Arena, IoBuf, Waker};
use std::collections::VecDeque;

/// Parcels that a mailbox holds.
const CAPACITY: usize = 256;

/// A message between two shards of one target, with its block data.
#[derive(Debug)]
pub struct Parcel {
    message: PeerMessage,
    bytes: Box<[u8]>,
    /// Whether it answers a question of the receiver.
    answer: bool,
}

impl Parcel {
    /// Copies the block data; `parts` is what would go over a link after the message.
    pub fn new(message: &PeerMessage, parts: &[IoBuf], answer: bool) -> Self {
        let mut bytes = Vec::with_capacity(parts.iter().map(IoBuf::len).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(part.bytes()));
        Self { message: message.clone(), bytes: bytes.into(), answer }
    }
}

/// What a sibling has for us.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: PeerMessage,
    /// Its block data, as a link would have delivered it.
    pub payload: Mems,
    /// Whether it answers a question of ours.
    pub answer: bool,
}

/// Another shard of this target, as one shard sees it.
pub struct Sibling {
    shard: u16,
    sender: MailboxSender<Parcel>,
    receiver: MailboxReceiver<Parcel>,
    waiting: VecDeque<Parcel>,
    /// Something was posted since the last wake.
    posted: bool,
    /// Taken from the mailbox, but the arena had no room for its data.
    held: Option<Parcel>,
    parts: Vec<Part>,
}

/// Joins the shards of a target, each woken by its waker, every one to every other: its siblings for each.
pub fn mesh(wakers: &[Waker]) -> Vec<Vec<Sibling>> {
    let mut all: Vec<Vec<Sibling>> = wakers.iter().map(|_| Vec::new()).collect();
    for high in 0..wakers.len() {
        for low in 0..high {
            let (to_high, from_low) = mailbox(CAPACITY, wakers[high].clone());
            let (to_low, from_high) = mailbox(CAPACITY, wakers[low].clone());
            all[low].push(Sibling::new(high as u16, to_high, from_high));
            all[high].push(Sibling::new(low as u16, to_low, from_low));
        }
    }
    all
}

impl Sibling {
    fn new(shard: u16, sender: MailboxSender<Parcel>, receiver: MailboxReceiver<Parcel>) -> Self {
        let (waiting, parts) = (VecDeque::new(), Vec::new());
        Self { shard, sender, receiver, waiting, posted: false, held: None, parts }
    }

    /// Its number within the target.
    pub fn shard(&self) -> u16 {
        self.shard
    }

    /// Whether its shard has ended.
    pub fn is_gone(&self) -> bool {
        self.sender.is_abandoned()
    }

    /// Sends, at the next [`Sibling::flush`] at the latest.
    pub fn send(&mut self, parcel: Parcel) {
        self.waiting.push_back(parcel);
        self.post();
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

    /// Posts what found the mailbox full, and wakes the sibling once for all that was posted.
    pub fn flush(&mut self) {
        self.post();
        if std::mem::take(&mut self.posted) {
            self.sender.wake();
        }
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

    /// The next parcel, its data put into the arena; `None` when there is none, or no room (see
    /// [`Sibling::is_starved`]).
    pub fn take(&mut self, arena: &Arena) -> Option<Delivery> {
        let parcel = self.held.take().or_else(|| self.receiver.take())?;
        match self.unpack(&parcel, arena) {
            Some(payload) => Some(Delivery { message: parcel.message, payload, answer: parcel.answer }),
            None => {
                self.held = Some(parcel);
                None
            }
        }
    }

    fn unpack(&mut self, parcel: &Parcel, arena: &Arena) -> Option<Mems> {
        layout(&parcel.message, &mut self.parts).expect("a shard of this process sends what it may");
        let mut payload = Mems::new();
        let mut bytes = &parcel.bytes[..];
        for part in &self.parts {
            let (own, rest) = bytes.split_at(part.bytes as usize);
            let mut buf = arena.alloc(part.blocks())?;
            let lead = part.lead as usize;
            buf[lead..lead + own.len()].copy_from_slice(own);
            payload.push(Mem::whole(buf.freeze()));
            bytes = rest;
        }
        Some(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::peer::{Hello, IoOp, IoRequest};
    use protocol::types::{
        BLOCK_BYTES, ChunkId, CopysetId, SessionEpoch, ShardAddr, TargetId, Term, VolumeId,
    };

    fn hello(incarnation: u64) -> PeerMessage {
        let at = |shard| ShardAddr { target: TargetId(1), shard };
        PeerMessage::Hello(Hello { cluster: [0; 16], from: at(0), to: at(1), incarnation })
    }

    fn wakers(count: usize) -> Vec<Waker> {
        (0..count).map(|_| Waker::new().expect("an eventfd")).collect()
    }

    #[test]
    fn every_shard_has_every_other_as_its_sibling() {
        for (me, siblings) in mesh(&wakers(4)).iter().enumerate() {
            let mut shards: Vec<usize> = siblings.iter().map(|s| usize::from(s.shard())).collect();
            shards.sort_unstable();
            assert_eq!(shards, (0..4).filter(|other| *other != me).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_mailbox_keeps_the_order_and_loses_nothing() {
        let mut all = mesh(&wakers(2));
        let (mut one, mut zero) = (all.pop().unwrap().remove(0), all.pop().unwrap().remove(0));
        let arena = Arena::new(1 << 20).unwrap();
        let count = 3 * CAPACITY as u64;
        (0..count).for_each(|n| zero.send(Parcel::new(&hello(n), &[], n % 2 == 0)));
        zero.flush();
        assert!(zero.is_behind(), "more was sent than a mailbox holds");
        let mut came = Vec::new();
        while came.len() < count as usize {
            while let Some(delivery) = one.take(&arena) {
                assert_eq!(delivery.answer, came.len() % 2 == 0);
                came.push(delivery.message);
            }
            zero.flush();
        }
        assert_eq!(came, (0..count).map(hello).collect::<Vec<_>>());
        assert!(!zero.is_behind() && one.take(&arena).is_none());
        drop(one);
        assert!(zero.is_gone());
    }

    #[test]
    fn data_waits_for_room_in_the_arena_and_then_arrives_whole() {
        let mut all = mesh(&wakers(2));
        let (mut one, mut zero) = (all.pop().unwrap().remove(0), all.pop().unwrap().remove(0));
        let (from, to) = (Arena::new(1 << 20).unwrap(), Arena::new(128 << 10).unwrap());
        let mut run = from.alloc(2).unwrap();
        (0..run.len()).for_each(|at| run[at] = (at % 251) as u8);
        let run = run.freeze();
        let chunk = ChunkId { volume: VolumeId(1), index: 0 };
        let op = IoOp::Write { chunk, offset: 512, length: BLOCK_BYTES as u32, crc: 0 };
        let write = PeerMessage::Io(IoRequest {
            id: 1,
            copyset: CopysetId(1),
            term: Term(1),
            epoch: SessionEpoch(0),
            op,
        });
        let own = IoBuf::part(run.clone(), 512..512 + BLOCK_BYTES);
        zero.send(Parcel::new(&write, &[own], false));
        zero.flush();
        let hog = to.alloc(32).unwrap();
        assert!(one.take(&to).is_none() && one.is_starved());
        drop(hog);
        let came = one.take(&to).expect("there is room now");
        assert_eq!(came.message, write);
        let [data] = &came.payload[..] else { panic!("one part, not {}", came.payload.len()) };
        assert_eq!(data.bytes()[512..512 + BLOCK_BYTES], run[512..512 + BLOCK_BYTES]);
    }
}
