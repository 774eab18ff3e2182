//! Repair of single blocks: content whose checksum is known is fetched from another replica and
//! written over the bad copy in place.
//!
//! A block whose checksum is lost too (both copies of a table page are bad) cannot be told right
//! from wrong by itself: the replica gives up leadership and runs a chunk catch-up instead.

use super::{Shard, catchup};
use crate::mem::Mems;
use chunkstore::BadBlock;
use copyset::Role;
use protocol::peer::Fetch;
use protocol::types::{BlockRange, ChunkId, CopysetId, ShardAddr, Span, Time};

/// How long one replica may take to answer before the next is asked.
const ANSWER_WITHIN: Span = Span::ms(500);
/// Times that all other replicas are asked before the repair is given up.
const ROUNDS_MAX: u8 = 3;

/// How a repair ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub enum Repaired {
    /// The block is good again.
    #[default]
    Yes,
    /// Not now: another replica that may have it is away or being filled, or leads soon.
    Later,
    /// Every other replica was asked, and none has it.
    Never,
}

/// Who could lead in this replica's place.
fn heir(replica: &copyset::Replica) -> Option<ShardAddr> {
    let heirs = replica.lags().filter(|l| l.voter && l.alive && !l.installing);
    heirs.min_by_key(|l| l.entries).map(|l| l.peer)
}

/// One block being repaired.
pub struct Repair {
    bad: BadBlock,
    /// Those still to be asked in this round.
    left: Vec<ShardAddr>,
    asked: Option<ShardAddr>,
    ask_next_at: Time,
    rounds: u8,
    /// Reads that wait for it.
    reads: Vec<usize>,
}

impl Shard {
    /// Begins a repair, or joins the one under way; a waiting read is told when it ends.
    pub(super) fn repair_block(&mut self, id: CopysetId, chunk: ChunkId, bad: BadBlock, read: Option<usize>) {
        let key = (id, chunk, bad.block);
        if let Some(repair) = self.repairs.get_mut(&key) {
            repair.reads.extend(read);
            return;
        }
        tracing::warn!(
            copyset = id.0,
            ?chunk,
            block = bad.block,
            "a block fails its checksum; repairing from a peer"
        );
        if bad.expected.is_none() {
            let other = self.hosted.get(&id).and_then(|h| heir(&h.replica));
            self.rebuild(id);
            if let Some(read) = read {
                self.read_repaired(read, other.map_or(Repaired::Never, |_| Repaired::Later));
            }
            return;
        }
        let repair = Repair {
            bad,
            left: Vec::new(),
            asked: None,
            ask_next_at: self.now,
            rounds: 0,
            reads: read.into_iter().collect(),
        };
        self.repairs.insert(key, repair);
        self.ask_for_repair(key);
    }

    /// The replica's own checksums are lost: it must be filled from the leader's.
    pub(super) fn rebuild(&mut self, id: CopysetId) {
        if let Some(hosted) = self.hosted.get_mut(&id) {
            hosted.wants_rebuild = true;
            self.restless.insert(id);
        }
        self.nudge_rebuild(id);
    }

    /// Gives leadership away, and once another leads begins the catch-up.
    pub(super) fn nudge_rebuild(&mut self, id: CopysetId) {
        let (me, now) = (self.settings.me, self.now);
        let Some(hosted) = self.hosted.get_mut(&id).filter(|h| h.wants_rebuild) else { return };
        if hosted.replica.role() == Role::Leader {
            if let Some(other) = heir(&hosted.replica) {
                let _ = hosted.replica.transfer_leadership(other.target, now);
                self.touch(id);
            }
        } else if let Some(leader) = hosted.replica.leader().filter(|l| *l != me) {
            hosted.wants_rebuild = false;
            self.start_catch_up(id, leader);
        }
    }

    /// Asks the next replica; ends the repair when none is left after the last round.
    fn ask_for_repair(&mut self, key: (CopysetId, ChunkId, u16)) {
        let (id, chunk, block) = key;
        let me = self.settings.me;
        let Some(hosted) = self.hosted.get(&id) else { return };
        let Some(repair) = self.repairs.get_mut(&key) else { return };
        if repair.left.is_empty() {
            if repair.rounds == ROUNDS_MAX {
                let whole = hosted.replica.lags().filter(|l| l.voter).all(|l| l.alive && !l.installing);
                return self.end_repair(key, if whole { Repaired::Never } else { Repaired::Later });
            }
            repair.rounds += 1;
            repair.left = hosted.replica.members().all().filter(|m| *m != me).collect();
            if repair.rounds > 1 {
                // Those who refused may be a moment behind.
                (repair.asked, repair.ask_next_at) = (None, self.now + ANSWER_WITHIN);
                return;
            }
        }
        repair.asked = repair.left.pop();
        repair.ask_next_at = self.now + ANSWER_WITHIN;
        let range = BlockRange::new(block.into(), 1).expect("a block of a chunk");
        match repair.asked {
            Some(peer) => self.ask(peer, id, Fetch::Blocks { chunk, range }),
            None => self.end_repair(key, Repaired::Never),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(super) fn repair_answered(
        &mut self,
        from: ShardAddr,
        id: CopysetId,
        chunk: ChunkId,
        range: BlockRange,
        present: u32,
        crcs: &[u32],
        payload: &Mems,
    ) {
        let key = (id, chunk, range.first);
        let Some(repair) = self.repairs.get(&key).filter(|r| r.asked == Some(from) && range.count == 1)
        else {
            return;
        };
        let good = present == 1
            && crcs.first().copied() == repair.bad.expected
            && catchup::blocks_match(crcs, payload);
        match payload.first().filter(|_| good) {
            Some(block) => {
                // Refused when the block was overwritten meanwhile: then the next read is right too.
                self.store.repair(chunk, range.first, block.window(0, 1));
                self.end_repair(key, Repaired::Yes);
            }
            // That replica is behind or ahead of this one, or bad itself.
            None => self.ask_for_repair(key),
        }
    }

    pub(super) fn repair_refused(&mut self, from: ShardAddr, id: CopysetId) {
        let refused =
            self.repairs.iter().filter(|((copyset, ..), r)| *copyset == id && r.asked == Some(from));
        let keys: Vec<_> = refused.map(|(key, _)| *key).collect();
        for key in keys {
            self.ask_for_repair(key);
        }
    }

    /// Asks the next replica where the last one was silent.
    pub(super) fn nudge_repairs(&mut self) {
        let now = self.now;
        let late: Vec<_> =
            self.repairs.iter().filter(|(_, r)| now >= r.ask_next_at).map(|(k, _)| *k).collect();
        for key in late {
            self.ask_for_repair(key);
        }
    }

    fn end_repair(&mut self, key: (CopysetId, ChunkId, u16), repaired: Repaired) {
        let Some(repair) = self.repairs.remove(&key) else { return };
        let (id, chunk, block) = key;
        if repaired == Repaired::Yes {
            tracing::info!(copyset = id.0, ?chunk, block, "block repaired from a peer");
        } else {
            tracing::error!(copyset = id.0, ?chunk, block, "no replica has a good copy of this block now");
        }
        for read in repair.reads {
            self.read_repaired(read, repaired);
        }
    }
}
