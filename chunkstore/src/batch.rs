//! A log batch as bytes.
/// Header blocks of a batch at most.
pub(crate) const HEADER_BLOCKS_MAX: u32 = 8;
