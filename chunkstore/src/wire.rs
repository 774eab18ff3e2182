//! Little-endian fields to and from bytes.

/// Appends fields.
pub(crate) trait Put {
    fn raw(&mut self, bytes: &[u8]);
    fn u8(&mut self, v: u8) {
        self.raw(&[v]);
    }
    fn u16(&mut self, v: u16) {
        self.raw(&v.to_le_bytes());
    }
    fn u32(&mut self, v: u32) {
        self.raw(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.raw(&v.to_le_bytes());
    }
    fn zeroes(&mut self, count: usize) {
        for _ in 0..count {
            self.raw(&[0]);
        }
    }
}

impl Put for Vec<u8> {
    fn raw(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Takes fields off the front; `None` past the end.
#[derive(Clone, Copy)]
pub(crate) struct Get<'a>(pub(crate) &'a [u8]);

impl<'a> Get<'a> {
    pub(crate) fn raw(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }
    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.raw(N)?.try_into().ok()
    }
    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|b| b[0])
    }
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// CRC-32C of `bytes` with the four bytes at `hole` taken as zeroes.
pub(crate) fn crc_with_hole(bytes: &[u8], hole: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..hole]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[hole + 4..])
}

/// Puts [`crc_with_hole`] into its place.
pub(crate) fn fill_crc(bytes: &mut [u8], hole: usize) -> u32 {
    let crc = crc_with_hole(bytes, hole);
    bytes[hole..hole + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// Zeroes up to the next multiple of a block.
pub(crate) fn pad_to_block(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(protocol::types::BLOCK_BYTES), 0);
}
