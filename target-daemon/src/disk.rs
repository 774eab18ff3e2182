//! The store's operations, run on the reactor.
//!
//! Reads get their memory here; bytes that the store made itself (headers, tables, checkpoints)
//! are copied into aligned memory here. When the arena is exhausted an operation waits and is
//! tried again next turn, except that a log batch always gets its header from a reserve: log
//! writes are what makes memory evictable, so they must never wait for memory.

use crate::files::Files;
use crate::mem::Mem;
use chunkstore::{FileId, IoError, Op as StoreOp, Piece, Pieces};
use protocol::types::{BLOCK_BYTES, ENTRY_BLOCKS_MAX, ENTRY_BYTES_MAX};
use reactor::{BufMut, Completion, IoBuf, IoList, Op, Output, Reactor};
use slab::Slab;
use std::collections::VecDeque;
use transport::Owner;

/// Buffers that a list does not hold by itself.
const LONG_LIST: usize = 3;
/// Long lists that are kept for the next writes.
const LISTS_MAX: usize = 64;

/// Single blocks kept for headers of log batches.
const RESERVE_BLOCKS: usize = 32;

/// An operation under way.
struct Running {
    ticket: u64,
    /// What remains to be done after this step.
    then: Then,
    /// How many of the write's buffers came from the reserve.
    reserved: usize,
}

enum Then {
    Nothing,
    /// Make a new file's allocation durable.
    Sync(reactor::File),
}

/// The result of an operation, for [`chunkstore::Store::completed`].
pub type Finished = (u64, Result<Option<Mem>, IoError>);

/// The driver of one shard's disk.
pub struct DiskDriver {
    kind: u8,
    files: Files,
    running: Slab<Running>,
    stalled: VecDeque<Box<StoreOp<Mem>>>,
    reserve: Vec<BufMut>,
    finished: VecDeque<Finished>,
    /// What the last write was made of.
    spent: Option<Pieces<Mem>>,
    /// Long lists of writes that have ended, empty.
    lists: Vec<IoList>,
}

/// There is no memory now.
struct NoMemory;

impl DiskDriver {
    /// A driver whose tokens have `kind`.
    pub fn new<R: Reactor>(kind: u8, files: Files, reactor: &R) -> Self {
        let reserve = std::iter::from_fn(|| reactor.arena().alloc(1)).take(RESERVE_BLOCKS).collect();
        let (running, stalled, finished) = (Slab::new(), VecDeque::new(), VecDeque::new());
        Self { kind, files, running, stalled, reserve, finished, spent: None, lists: Vec::new() }
    }

    /// Whether operations wait for memory.
    pub fn is_starved(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// Runs an operation, or keeps it until there is memory for it. Operations may overtake. Gives back what a write was
    /// made of, for [`chunkstore::Store::take_back`].
    pub fn run<R: Reactor>(&mut self, reactor: &mut R, op: StoreOp<Mem>) -> Option<Pieces<Mem>> {
        match self.try_run(reactor, op) {
            Some(op) => {
                self.stalled.push_back(Box::new(op));
                None
            }
            None => self.spent.take(),
        }
    }

    /// Tries again what waited for memory.
    pub fn retry<R: Reactor>(&mut self, reactor: &mut R) {
        for _ in 0..self.stalled.len() {
            let Some(op) = self.stalled.pop_front() else { return };
            if let Some(op) = self.try_run(reactor, *op) {
                self.stalled.push_back(Box::new(op));
            }
            // Memory is scarce: nothing is kept.
            self.spent = None;
        }
    }

    /// What has ended.
    pub fn poll(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    /// Takes the end of one of this driver's reactor operations.
    pub fn on_completion<R: Reactor>(&mut self, reactor: &mut R, completion: Completion) {
        let (owner, _) = Owner::split(completion.token);
        let key = owner.index as usize;
        let Some(running) = self.running.get_mut(key) else { return };
        if let (Then::Sync(file), Ok(_)) = (&running.then, &completion.result) {
            let file = *file;
            running.then = Then::Nothing;
            reactor.submit(completion.token, Op::Sync { file });
            return;
        }
        let running = self.running.remove(key);
        self.take_back(running.reserved, completion.bufs);
        let result = match (completion.result, completion.buf) {
            (Ok(Output::Read(bytes)), Some(mut buf)) => {
                // Past the end of the file reads as zeroes.
                buf[bytes as usize..].fill(0);
                Ok(Some(Mem::whole(buf.freeze())))
            }
            (Ok(_), _) => Ok(None),
            (Err(error), _) => Err(IoError { errno: error.errno }),
        };
        self.finished.push_back((running.ticket, result));
    }

    /// Puts reserve blocks back, once nothing else holds them, and keeps a long list for the next write.
    fn take_back(&mut self, reserved: usize, mut bufs: IoList) {
        for buf in bufs.drain(..).take(reserved) {
            if let IoBuf::Shared { buf, .. } = buf
                && let Ok(unique) = buf.try_unique()
            {
                self.reserve.push(unique);
            }
        }
        if bufs.spilled() && self.lists.len() < LISTS_MAX {
            self.lists.push(bufs);
        }
    }

    /// Gives the operation back when there is no memory for it.
    fn try_run<R: Reactor>(&mut self, reactor: &mut R, op: StoreOp<Mem>) -> Option<StoreOp<Mem>> {
        match op {
            StoreOp::Read { ticket, file, offset, blocks } => {
                let Some(buf) = reactor.arena().alloc(blocks) else { return Some(op) };
                self.submit(reactor, ticket, file, |file| {
                    let bytes = (blocks * BLOCK_BYTES) as u32;
                    (Op::ReadAt { file, offset, buf, bytes }, Then::Nothing, 0)
                });
            }
            StoreOp::Write { ticket, file, offset, pieces, dsync } => {
                let is_log = matches!(file, FileId::Log(_));
                let Ok((bufs, reserved)) = self.gather(reactor, &pieces, is_log) else {
                    return Some(StoreOp::Write { ticket, file, offset, pieces, dsync });
                };
                self.submit(reactor, ticket, file, |file| {
                    (Op::WriteAt { file, offset, bufs, dsync }, Then::Nothing, reserved)
                });
                self.spent = Some(pieces);
            }
            StoreOp::Sync { ticket, file } => {
                self.submit(reactor, ticket, file, |file| (Op::Sync { file }, Then::Nothing, 0));
            }
            StoreOp::Create { ticket, file, bytes } => {
                if let Err(error) = self.files.make(reactor, file) {
                    self.finished.push_back((ticket, Err(IoError { errno: error.errno })));
                    return None;
                }
                self.submit(reactor, ticket, file, |file| {
                    (Op::Allocate { file, offset: 0, bytes }, Then::Sync(file), 0)
                });
            }
        }
        None
    }

    fn submit<R: Reactor>(
        &mut self,
        reactor: &mut R,
        ticket: u64,
        file: FileId,
        op: impl FnOnce(reactor::File) -> (Op, Then, usize),
    ) {
        match self.files.get(reactor, file) {
            Ok(file) => {
                let (op, then, reserved) = op(file);
                let key = self.running.insert(Running { ticket, then, reserved });
                let token = Owner { kind: self.kind, index: key as u32 }.token(0);
                reactor.submit(token, op);
            }
            Err(error) => {
                tracing::error!(%error, "a file of the store cannot be opened");
                self.finished.push_back((ticket, Err(IoError { errno: error.errno })));
            }
        }
    }

    /// The pieces as the reactor writes them. Blocks from the reserve come first in the list,
    /// since a log batch begins with its header.
    fn gather<R: Reactor>(
        &mut self,
        reactor: &mut R,
        pieces: &[Piece<Mem>],
        is_log: bool,
    ) -> Result<(IoList, usize), NoMemory> {
        let mut list = match pieces.len() {
            0..LONG_LIST => IoList::new(),
            _ => self.lists.pop().unwrap_or_default(),
        };
        let mut reserved = 0;
        for piece in pieces {
            match piece {
                Piece::Payload { payload, first, count } => {
                    list.push(payload.window(*first, *count).io_whole())
                }
                Piece::Zeroes { blocks } => {
                    let mut left = blocks * BLOCK_BYTES;
                    while left > 0 {
                        let bytes = left.min(ENTRY_BYTES_MAX);
                        list.push(IoBuf::zeroes(bytes));
                        left -= bytes;
                    }
                }
                Piece::Bytes(bytes) => {
                    let at_front = list.len() == reserved;
                    if let Err(no_memory) = copy_in(reactor, bytes, &mut list) {
                        if !is_log || !at_front || bytes.len() > self.reserve.len() * BLOCK_BYTES {
                            self.take_back(reserved, list);
                            return Err(no_memory);
                        }
                        reserved += self.copy_to_reserve(bytes, &mut list);
                    }
                }
            }
        }
        Ok((list, reserved))
    }

    fn copy_to_reserve(&mut self, bytes: &[u8], list: &mut IoList) -> usize {
        let mut blocks = 0;
        for block in bytes.chunks(BLOCK_BYTES) {
            let mut buf = self.reserve.pop().expect("counted by the caller");
            buf[..block.len()].copy_from_slice(block);
            list.push(IoBuf::whole(buf.freeze()));
            blocks += 1;
        }
        blocks
    }
}

/// Copies bytes into aligned memory; all or nothing.
fn copy_in<R: Reactor>(reactor: &R, bytes: &[u8], list: &mut IoList) -> Result<(), NoMemory> {
    let before = list.len();
    for part in bytes.chunks(ENTRY_BLOCKS_MAX * BLOCK_BYTES) {
        let Some(mut buf) = reactor.arena().alloc(part.len() / BLOCK_BYTES) else {
            list.truncate(before);
            return Err(NoMemory);
        };
        buf[..part.len()].copy_from_slice(part);
        list.push(IoBuf::whole(buf.freeze()));
    }
    Ok(())
}
