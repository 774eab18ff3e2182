//! Tokens of operations: whose they are, and which of the owner's.
//!
//! ```text
//! bit 63      56 55              24 23     8 7      0
//!     | kind    | index            | zero   | op     |
//! ```
//!
//! A connection gives up its index only when all its operations have completed
//! ([`crate::stream::Stream::is_closed`]), so no generation is needed.

/// Whose operation it is: a kind (connections of NBD, links, the log, ...) and an index, both
/// of the shard's choosing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Owner {
    /// Which table of the shard.
    pub kind: u8,
    /// Which place in it.
    pub index: u32,
}

impl Owner {
    /// The token of one of this owner's operations.
    pub const fn token(self, op: u8) -> u64 {
        ((self.kind as u64) << 56) | ((self.index as u64) << 24) | op as u64
    }
    /// Whose operation a token names, and which.
    pub const fn split(token: u64) -> (Self, u8) {
        (Self { kind: (token >> 56) as u8, index: (token >> 24) as u32 }, token as u8)
    }
    /// Whether the token names an operation of this owner.
    pub const fn owns(self, token: u64) -> bool {
        let (owner, _) = Self::split(token);
        owner.kind == self.kind && owner.index == self.index
    }
}

#[cfg(test)]
mod tests {
    use super::Owner;

    #[test]
    fn a_token_names_its_owner_and_nobody_else() {
        let owner = Owner { kind: 0xff, index: u32::MAX };
        assert_eq!(Owner::split(owner.token(0xfe)), (owner, 0xfe));
        assert!(owner.owns(owner.token(1)));
        assert!(!Owner { kind: 0xff, index: u32::MAX - 1 }.owns(owner.token(1)));
        assert!(!Owner { kind: 0xfe, index: u32::MAX }.owns(owner.token(1)));
    }
}
