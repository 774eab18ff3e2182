//! The calls of the driver: the next operation, its completion, the next timeout.

use crate::api::*;
use crate::read::Pending;
use crate::store::Store;
use protocol::types::Time;

impl<P: Payload> Store<P> {
    /// The next operation to run. Takes the time because batches are framed here, with everything
    /// staged until now: call it once all that is at hand has been staged.
    pub fn poll_op(&mut self, now: Time) -> Option<Op<P>> {
        self.now = self.now.max(now);
        if self.failed.is_some() {
            return None;
        }
        self.drive_round();
        let due = self.log.seal_due(self.layout.seal_idle_ns).is_some_and(|at| self.now >= at);
        if due || (!self.hints.is_empty() && self.log.has_work()) {
            self.stage_hints(due);
        }
        if let Some(framed) = self.log.frame(due, &mut self.spares) {
            let pending = Pending::Batch { lsn: framed.lsn, blocks: framed.blocks };
            let ticket = self.ticket(framed.file, pending);
            self.stats.batches += 1;
            self.stats.seals += u64::from(framed.records == 0);
            self.stats.records += u64::from(framed.records);
            let (file, offset, pieces) = (framed.file, framed.offset, framed.pieces);
            return Some(Op::Write { ticket, file, offset, pieces, dsync: true });
        }
        if let Some(op) = self.ops.pop_front() {
            return Some(op);
        }
        if let Some(op) = self.flush.next_op(self.layout.flush_in_flight_max) {
            return Some(op);
        }
        self.preformat_op()
    }

    /// An operation ended. `Ok(Some(payload))` for reads, `Ok(None)` for the others.
    ///
    /// # Panics
    /// When the ticket was not given out or is completed twice.
    pub fn completed(&mut self, ticket: u64, result: Result<Option<P>, IoError>, now: Time) {
        self.now = self.now.max(now);
        let (file, pending) = self.pending.remove(&ticket).expect("a ticket completes once");
        if self.failed.is_some() {
            return;
        }
        if matches!(pending, Pending::JobLoad { .. } | Pending::JobWrite { .. }) {
            self.flush.in_flight -= 1;
        }
        match pending {
            Pending::Preformat => self.preformat_done(result.map(|_| ())),
            Pending::Table { .. }
            | Pending::TableBlock { .. }
            | Pending::Part { .. }
            | Pending::JobLoad { .. } => {
                self.stats.read_errors += u64::from(result.is_err());
                self.read_done(pending, result.ok().flatten());
            }
            Pending::Batch { .. } | Pending::JobWrite { .. } | Pending::Sync | Pending::Checkpoint => {
                match result {
                    Ok(_) => self.written(pending),
                    Err(error) => self.fail(pending, file, error),
                }
            }
        }
    }

    fn read_done(&mut self, pending: Pending, data: Option<P>) {
        match pending {
            Pending::Table { slot, generation } => self.table_loaded(slot, generation, data),
            Pending::TableBlock { slot, generation, at } => {
                self.table_block_loaded(slot, generation, at, data);
            }
            Pending::Part { read, part } => self.part_read(read, part, data),
            Pending::JobLoad { chunk, first, count } => self.job_loaded(chunk, first, count, data),
            _ => unreachable!("only reads come here"),
        }
    }

    fn written(&mut self, pending: Pending) {
        match pending {
            Pending::Batch { lsn, blocks } => {
                self.stats.log_bytes += u64::from(blocks) * protocol::types::BLOCK_BYTES as u64;
                if self.log.written(lsn, self.now) {
                    self.hints_durable();
                    self.events.push_back(Event::Durable(Lsn(self.log.durable)));
                }
            }
            Pending::JobWrite { chunk } => self.job_step(chunk),
            Pending::Sync => self.synced(),
            Pending::Checkpoint => self.checkpoint_written(),
            _ => unreachable!("only writes come here"),
        }
    }

    /// A write or a sync failed: what is on the disk is not known any more, so nothing more is done on it.
    fn fail(&mut self, pending: Pending, file: FileId, error: IoError) {
        let what = match pending {
            Pending::Batch { .. } => "log write",
            Pending::Sync => "sync",
            Pending::Checkpoint => "checkpoint write",
            _ => "chunk write",
        };
        let failure = Failure { what, file, error };
        self.failed = Some(failure);
        self.events.push_back(Event::Failed(failure));
        self.fail_reads();
    }

    pub(crate) fn ticket(&mut self, file: FileId, pending: Pending) -> u64 {
        self.next_ticket += 1;
        self.pending.insert(self.next_ticket, (file, pending));
        self.next_ticket
    }

    /// When to call `poll_op` again though nothing happened.
    pub fn next_timeout(&self) -> Option<Time> {
        if self.failed.is_some() {
            return None;
        }
        let times =
            [self.log.seal_due(self.layout.seal_idle_ns), self.round_timeout(), self.preformat.retry_at];
        times.into_iter().flatten().min()
    }
}
