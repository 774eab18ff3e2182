//! `copyset` beside raft-rs: given the same state and the same events, both must decide the same.
//!
//! raft-rs is a dependency of these tests only (DESIGN: an oracle, never the product). Two ways of
//! asking it:
//!
//! - `step`: one replica in a drawn durable state gets one message, or a leader gets a row of
//!   acknowledgements; votes, logs and commit indices are compared exactly.
//! - `cluster`: both clusters live through the same drawn schedule of elections, proposals,
//!   hand-overs and restarts among the replicas that can reach each other. After each step
//!   everybody's log, commit index and part are compared. In half of the schedules single messages
//!   are lost or doubled, the same in both.
//!
//! What is not compared, since both may differ and be right: numbers of terms (this pre-vote tells
//! the candidate's term, raft-rs's does not), so entries are named by the step that made them;
//! leases; stickiness in clusters, which raft-rs is configured to be without there, so time passes before
//! each election (in `step` both are bound to a leader that they heard); memberships and catch-up by
//! chunk, which raft-rs does in other ways.
//!
//! `SCHEDULES=n` runs more than the few hundred of the ordinary test.

mod cluster;
mod ours;
mod step;
mod theirs;

use copyset::Body;
use protocol::types::{BlockRange, ChunkId, VolumeId};

/// Numbers from a seed: splitmix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// 0 to `bound - 1`.
    fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound.max(1)
    }
}

/// How many drawn cases.
fn schedules(ordinary: u64) -> u64 {
    std::env::var("SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(ordinary)
}

/// A proposal that can be told from all others.
fn body(number: u32) -> Body {
    let chunk = ChunkId { volume: VolumeId(1), index: number };
    Body::Write { chunk, range: BlockRange { first: 0, count: 1 } }
}
