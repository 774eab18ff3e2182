//! Lists that have done their work and keep their memory for the next: on a busy shard nothing is asked of the heap for
//! each batch, flush or overlay.

use crate::api::{Piece, Pieces};
use crate::overlay::Overlay;
use protocol::types::BLOCK_BYTES;

/// Lists and headers kept: more than there are operations under way.
const OTHERS_MAX: usize = 64;

pub(crate) struct Spares<P> {
    pub overlays: Vec<Overlay<P>>,
    pieces: Vec<Pieces<P>>,
    bytes: Vec<Vec<u8>>,
}

impl<P> Default for Spares<P> {
    fn default() -> Self {
        Self { overlays: Vec::new(), pieces: Vec::new(), bytes: Vec::new() }
    }
}

impl<P: Clone> Spares<P> {
    /// One more overlay, unless there are `most`: one that had all blocks of a chunk has some 250 KiB.
    pub(crate) fn keep_overlay(&mut self, mut overlay: Overlay<P>, most: usize) {
        if overlay.has_memory() && self.overlays.len() < most {
            overlay.clear();
            self.overlays.push(overlay);
        }
    }
    /// An empty list.
    pub(crate) fn pieces(&mut self) -> Pieces<P> {
        self.pieces.pop().unwrap_or_default()
    }
    /// No bytes yet, with room for a block.
    pub(crate) fn bytes(&mut self) -> Vec<u8> {
        self.bytes.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK_BYTES))
    }
    /// What an operation was made of.
    pub(crate) fn keep_pieces(&mut self, mut pieces: Pieces<P>) {
        for piece in pieces.drain(..) {
            if let Piece::Bytes(mut bytes) = piece
                && self.bytes.len() < OTHERS_MAX
                && bytes.capacity() == BLOCK_BYTES
            {
                bytes.clear();
                self.bytes.push(bytes);
            }
        }
        if pieces.spilled() && self.pieces.len() < OTHERS_MAX {
            self.pieces.push(pieces);
        }
    }
}
