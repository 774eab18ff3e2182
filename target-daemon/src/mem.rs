//! Block data as shards hand it around: a window of whole blocks on a shared arena run.

use chunkstore::Payload;
use protocol::types::BLOCK_BYTES;
use reactor::{Buf, IoBuf};
use smallvec::SmallVec;

/// A window of blocks on a [`Buf`]. Cloning counts references; nothing is copied.
#[derive(Clone)]
pub struct Mem {
    buf: Buf,
    first: u16,
    count: u16,
}

/// Data in as many windows as it happens to lie in, in order.
pub type Mems = SmallVec<[Mem; 2]>;

impl Mem {
    /// All blocks of a run.
    pub fn whole(buf: Buf) -> Self {
        let count = buf.len_blocks() as u16;
        Self { buf, first: 0, count }
    }
    /// A window within this one.
    pub fn window(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.blocks(), "a window lies within its run");
        Self { buf: self.buf.clone(), first: self.first + first as u16, count: count as u16 }
    }
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        let first = usize::from(self.first) * BLOCK_BYTES;
        &self.buf[first..first + self.blocks() * BLOCK_BYTES]
    }
    /// The run it lies on, and its first byte there.
    pub fn place(&self) -> (&Buf, usize) {
        (&self.buf, usize::from(self.first) * BLOCK_BYTES)
    }
    /// The same bytes, from `from` up to `to`, as the reactor sends and writes them.
    pub fn io(&self, from: usize, to: usize) -> IoBuf {
        let first = usize::from(self.first) * BLOCK_BYTES;
        IoBuf::part(self.buf.clone(), first + from..first + to)
    }
    /// All of it, as the reactor sends and writes it.
    pub fn io_whole(&self) -> IoBuf {
        self.io(0, self.blocks() * BLOCK_BYTES)
    }
}

impl Payload for Mem {
    fn blocks(&self) -> usize {
        self.count.into()
    }
    fn block(&self, at: usize) -> &[u8] {
        &self.bytes()[at * BLOCK_BYTES..][..BLOCK_BYTES]
    }
}

impl std::fmt::Debug for Mem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mem({}+{})", self.first, self.count)
    }
}
