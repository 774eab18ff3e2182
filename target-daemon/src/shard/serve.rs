//! What a replica tells one that lacks data: its chunks, their checksums, their blocks.

use super::{Origin, Output, Shard, Work, io};
use crate::mem::{Mem, Mems};
use chunkstore::{ReadData, ReadError};
use copyset::Role;
use protocol::peer::{Fetch, Fetched, PeerMessage};
use protocol::types::{BlockRange, CopysetId, ENTRY_BLOCKS_MAX, LogIndex, Term};

impl Shard {
    /// Answers a fetch. A catch-up is served by the leader alone; single blocks by whoever has
    /// them, since the asker knows their checksum.
    pub(super) fn serve(&mut self, origin: Origin, id: CopysetId, fetch: Fetch) {
        let Some(hosted) = self.hosted.get(&id) else { return self.tell(origin, id, Fetched::Refused) };
        let replica = &hosted.replica;
        let leads = replica.role() == Role::Leader;
        match fetch {
            Fetch::Blocks { chunk, range } if is_short(range) => {
                let key = self.work.insert(Work::ServeBlocks { origin, copyset: id, chunk, range });
                self.store.read(key as u64, chunk, range);
            }
            Fetch::Table { chunk } if leads => {
                let key = self.work.insert(Work::ServeTable { origin, copyset: id, chunk });
                self.store.table(key as u64, chunk);
            }
            Fetch::Begin if leads => {
                let index = replica.applied_index();
                let Some(term) = self.term_at(id, index) else {
                    return self.tell(origin, id, Fetched::Refused);
                };
                let members = replica.members_as_of(index);
                let chunks = self.store.chunks_of(id);
                let fences = self.store.fences(id).as_slice().to_vec();
                self.tell(origin, id, Fetched::Begin { index, term, members, fences, chunks });
            }
            Fetch::End if leads => {
                let index = replica.applied_index();
                self.tell(origin, id, Fetched::End { index });
            }
            _ => self.tell(origin, id, Fetched::Refused),
        }
    }

    fn term_at(&self, id: CopysetId, index: LogIndex) -> Option<Term> {
        let replica = &self.hosted.get(&id)?.replica;
        let (floor, floor_term) = replica.floor();
        if index == floor { Some(floor_term) } else { replica.entry(index).map(|e| e.term) }
    }

    fn tell(&mut self, origin: Origin, copyset: CopysetId, fetched: Fetched) {
        self.tell_with(origin, copyset, fetched, Mems::new());
    }

    fn tell_with(&mut self, origin: Origin, copyset: CopysetId, fetched: Fetched, payload: Mems) {
        let message = PeerMessage::Fetched { copyset, fetched };
        self.out.push_back(Output::Answer { origin, message, payload });
    }

    pub(super) fn serve_blocks(&mut self, key: usize, result: Result<ReadData<Mem>, ReadError>) {
        let Some(Work::ServeBlocks { origin, copyset, chunk, range }) = self.work.try_remove(key) else {
            return;
        };
        match result {
            Ok(data) => {
                let (present, crcs, payload) = io::spread(&data);
                self.tell_with(
                    origin,
                    copyset,
                    Fetched::Blocks { chunk, range, present, crcs: crcs.to_vec() },
                    payload,
                );
            }
            Err(ReadError::Corrupt(bad)) => {
                // Not to be handed on. Mend it here too; the asker comes again.
                for block in bad {
                    self.repair_block(copyset, chunk, block, None);
                }
                self.tell(origin, copyset, Fetched::Refused);
            }
            Err(_) => self.tell(origin, copyset, Fetched::Refused),
        }
    }

    /// A table was read, for whichever purpose.
    pub(super) fn table_read(&mut self, key: usize, crcs: Vec<u32>, unknown: &[u16]) {
        match self.work.get(key) {
            Some(Work::ServeTable { .. }) => {
                let Some(Work::ServeTable { origin, copyset, chunk }) = self.work.try_remove(key) else {
                    return;
                };
                if unknown.is_empty() {
                    self.tell(origin, copyset, Fetched::Table { chunk, crcs });
                } else {
                    // Whoever leads must be able to fill the others: it gives that up, and is filled itself.
                    self.tell(origin, copyset, Fetched::Refused);
                    self.rebuild(copyset);
                }
            }
            Some(Work::CatchUpTable { .. }) => {
                if let Some(Work::CatchUpTable { copyset, chunk }) = self.work.try_remove(key) {
                    self.catch_up_local_table(copyset, chunk, crcs);
                }
            }
            Some(Work::Check(_)) => self.check_table(key, crcs),
            _ => {}
        }
    }
}

fn is_short(range: BlockRange) -> bool {
    range.is_valid() && usize::from(range.count) <= ENTRY_BLOCKS_MAX
}
