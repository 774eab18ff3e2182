//! What tells one state of a replica from another, for whoever walks through all of them
//! (`copyset/tests/model`).
//!
//! Left out is what a walk without time cannot tell apart: clocks, draws, and how many writes and rounds
//! there were. A test there holds that states of one digest go on alike.

use crate::api::Role;
use crate::health::Install;
use crate::progress::Flow;
use crate::replica::{PEERS_MAX, Replica};
use arrayvec::ArrayVec;
use core::hash::{Hash, Hasher};
use protocol::types::TargetId;

impl Replica {
    /// Hashes all that this replica's future depends on. `name` numbers the targets from 0, so that states
    /// that differ only by who is who can be taken for one.
    ///
    /// Panics for a replica that was not polled dry with all its writes done, and for what such a walk does
    /// without: changes of membership, damage, catch-up by chunk, hand-over, reads, sleep.
    pub fn digest(&self, name: impl Fn(TargetId) -> u8, into: &mut impl Hasher) {
        assert!(self.out.is_empty() && self.is_hard_durable() && self.log.stable() == self.log.last().0);
        assert!(self.changes.is_empty() && self.damage.is_none() && self.install == Install::No);
        assert!(self.transfer.is_none() && self.reads.is_empty() && !self.asleep);
        let named = |target: Option<TargetId>| target.map_or(u8::MAX, &name);
        (self.role as u8, self.hard.term, named(self.hard.vote)).hash(into);
        named(self.leader.map(|leader| leader.target)).hash(into);
        self.votes.iter().fold(0_u64, |all, vote| all | 1 << name(*vote)).hash(into);
        (self.commit, self.commit_told, self.applied).hash(into);
        if self.role != Role::Leader {
            (self.verified, self.leader_commit, self.acked).hash(into);
        }
        let (floor, last) = (self.log.floor(), self.log.last().0);
        (floor, last).hash(into);
        for entry in self.log.from(floor.0.next()) {
            (entry.term, core::mem::discriminant(&entry.body)).hash(into);
        }
        let mut peers: ArrayVec<_, PEERS_MAX> = self.peers.iter().collect();
        peers.sort_unstable_by_key(|p| name(p.member.target));
        for peer in peers {
            let flow = match peer.flow {
                Flow::Probe { sent } => u8::from(sent.is_some()),
                Flow::Replicate => 2,
                Flow::Install { .. } => unreachable!("nothing is compacted"),
            };
            (name(peer.member.target), flow, peer.next, peer.matched, peer.counted).hash(into);
        }
    }

    /// What matters of a round in a message between this leader and a peer: whether it is that of the one
    /// Append whose answer is waited for.
    pub fn is_probe(&self, peer: TargetId, round: u64) -> bool {
        let of = |p: &&crate::progress::Progress| p.member.target == peer;
        self.peers.iter().find(of).is_some_and(|p| p.flow == Flow::Probe { sent: Some(round) })
    }
}
