//! Commands of IO queues: their fields, checked against the namespace.
//!
//! Deliberately absent: how data travels, and doing anything.

use super::wire::*;
use crate::types::VolumeId;

/// What a subsystem's only namespace is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// The volume behind it.
    pub volume: VolumeId,
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes of a logical block: 512 or 4096.
    pub block_bytes: u32,
}

/// The id of a subsystem's only namespace.
pub const NSID: u32 = 1;
/// Most ranges of a Dataset Management.
pub const RANGES_MAX: usize = 256;
/// Bytes of a range.
const RANGE_BYTES: usize = 16;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoCommand {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Compare with what the host sends.
    Compare,
    /// Read, and tell only whether it works.
    Verify,
    /// Make what was acknowledged durable.
    Flush,
    /// Make the range read as zeroes.
    WriteZeroes {
        /// The space may be given back.
        deallocate: bool,
    },
    /// Ranges follow as data; `length` is theirs.
    Deallocate {
        /// How many.
        ranges: u16,
    },
    /// Hints only: the data is taken and forgotten.
    Hints,
}

/// One command, within the namespace and the limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoRequest {
    /// What to do.
    pub command: IoCommand,
    /// Where, in bytes; 0 for ranges.
    pub offset: u64,
    /// How many bytes: of the range, or of the data that carries ranges.
    pub length: u32,
    /// To be answered only when durable.
    pub fua: bool,
}

/// Checks a command. The refusals are those of the specification.
pub(super) fn decode(sqe: &Sqe, namespace: Option<&Namespace>) -> Result<IoRequest, Status> {
    use super::wire::io::*;
    if sqe.flags() & 3 != 0 {
        // No fused operation is advertised.
        return Err(Status::INVALID_FIELD.dnr());
    }
    let opcode = sqe.opcode();
    if !matches!(opcode, FLUSH | WRITE | READ | COMPARE | WRITE_ZEROES | DSM | VERIFY) {
        return Err(Status::INVALID_OPCODE.dnr());
    }
    let all = opcode == FLUSH && sqe.nsid() == NSID_ALL;
    let namespace = namespace.filter(|_| sqe.nsid() == NSID || all);
    let namespace = namespace.ok_or(Status::INVALID_NAMESPACE.dnr())?;
    let plain = |command| Ok(IoRequest { command, offset: 0, length: 0, fua: false });
    match opcode {
        FLUSH => plain(IoCommand::Flush),
        DSM => Ok(data_set(sqe)),
        READ => range(sqe, namespace, IoCommand::Read, TRANSFER_BYTES_MAX),
        WRITE => range(sqe, namespace, IoCommand::Write, TRANSFER_BYTES_MAX),
        COMPARE => range(sqe, namespace, IoCommand::Compare, TRANSFER_BYTES_MAX),
        VERIFY => range(sqe, namespace, IoCommand::Verify, u32::MAX),
        _ => {
            let deallocate = sqe.cdw(12) & (1 << 25) != 0;
            range(sqe, namespace, IoCommand::WriteZeroes { deallocate }, u32::MAX)
        }
    }
}

fn data_set(sqe: &Sqe) -> IoRequest {
    let ranges = (sqe.cdw(10) & 0xff) as u16 + 1;
    let deallocate = sqe.cdw(11) & 4 != 0;
    let command = if deallocate { IoCommand::Deallocate { ranges } } else { IoCommand::Hints };
    // Hosts are free to send the list at its full length, however many ranges are used.
    IoRequest { command, offset: 0, length: sqe.sgl().length, fua: false }
}

fn range(sqe: &Sqe, namespace: &Namespace, command: IoCommand, bytes_max: u32) -> Result<IoRequest, Status> {
    let block = u64::from(namespace.block_bytes);
    let slba = u64::from(sqe.cdw(11)) << 32 | u64::from(sqe.cdw(10));
    let blocks = u64::from(sqe.cdw(12) & 0xffff) + 1;
    if blocks * block > u64::from(bytes_max) {
        return Err(Status::INVALID_FIELD.dnr());
    }
    let end = slba.checked_add(blocks).filter(|&end| end <= namespace.bytes / block);
    end.ok_or(Status::LBA_RANGE.dnr())?;
    let fua = sqe.cdw(12) & (1 << 30) != 0;
    // 65,536 blocks of 4 KiB at most, so it fits.
    Ok(IoRequest { command, offset: slba * block, length: (blocks * block) as u32, fua })
}

impl IoRequest {
    /// Whether so many bytes of data fit the command.
    pub(super) fn takes(&self, bytes: u32) -> bool {
        match self.command {
            IoCommand::Read | IoCommand::Write | IoCommand::Compare => bytes == self.length,
            IoCommand::Deallocate { ranges } => {
                let (least, most) = (usize::from(ranges) * RANGE_BYTES, RANGES_MAX * RANGE_BYTES);
                (least..=most).contains(&(bytes as usize))
            }
            IoCommand::Hints => bytes as usize <= RANGES_MAX * RANGE_BYTES,
            IoCommand::Verify | IoCommand::Flush | IoCommand::WriteZeroes { .. } => true,
        }
    }
}

/// The ranges of a Dataset Management, in bytes as (offset, length), empty ones left out. All or none.
pub fn ranges(data: &[u8], count: u16, namespace: &Namespace) -> Result<Vec<(u64, u64)>, Status> {
    let block = u64::from(namespace.block_bytes);
    let mut list = Vec::with_capacity(count.into());
    for range in data.chunks_exact(RANGE_BYTES).take(count.into()) {
        let (blocks, slba) = (u64::from(u32_at(range, 4)), u64_at(range, 8));
        let end = slba.checked_add(blocks).filter(|&end| end <= namespace.bytes / block);
        end.ok_or(Status::LBA_RANGE.dnr())?;
        if blocks > 0 {
            list.push((slba * block, blocks * block));
        }
    }
    Ok(list)
}
