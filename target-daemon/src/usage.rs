//! What a core holds beside its arena, and what bounds it.
//!
//! Every queue has a named maximum; this is the list of those that load or a slow peer can fill. The
//! simulator looks at it all the time, with limits so small that they are reached.

/// One thing that takes memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// What.
    pub what: &'static str,
    /// How much there is now.
    pub now: usize,
    /// How much there may be.
    pub most: usize,
}

impl Usage {
    /// A thing, how much there is of it, and how much there may be.
    pub fn new(what: &'static str, now: usize, most: usize) -> Self {
        Self { what, now, most }
    }

    /// Whether it is within its bound.
    pub fn fits(&self) -> bool {
        self.now <= self.most
    }
}
