//! The machine inside [`VolumeIo`]: pieces wait in their copyset's route, are sent to its leader,
//! and come back by an answer or by the loss of a link. All rules are in the parent's description.
//!
//! Invariant at the end of each call: a piece is either sent (and counted in `in_flight`) or in
//! its route's `waiting`, never both; a route with waiting pieces is in `ready`, or has a timer or
//! a probe, or no replica of it can be reached, or one of its pieces in flight will wake it.

use super::cut::Extent;
use super::route::{Attempt, Link, Probe, Route};
use super::{Action, IoError, Job, Kind, PIECES_OPEN_MAX, PROBE_SLOT, Payload, Piece, SERIAL_BITS, VolumeIo};
use protocol::peer::{IoOp, IoOutcome, IoReply, IoRequest};
use protocol::types::{
    BLOCK_BYTES, BlockRange, ChunkId, CopysetId, SessionEpoch, ShardAddr, Span, Term, Time,
};

/// `NeedMap` is said at most this often.
const NEED_MAP_EVERY: Span = Span::ms(1000);

/// What came of trying to send a route's oldest piece.
enum Try {
    Sent,
    /// Something of this route must happen first; that will wake it.
    Blocked,
    /// All that may be in flight is.
    Full,
}

impl<P: Clone> VolumeIo<P> {
    pub(super) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Cuts pieces off a job, as many as may be open.
    pub(super) fn cut(&mut self, at: usize) {
        while self.jobs[at].open < PIECES_OPEN_MAX {
            let job = &mut self.jobs[at];
            let Some(extent) = job.cursor.next() else { return };
            let (volume, epoch) = (&self.map.volumes[&job.volume], job.epoch);
            let copyset = match job.kind {
                Kind::Fence => volume.copysets[extent.chunk_index() as usize],
                _ => volume.copyset_of(extent.chunk_index()),
            };
            let (op, payload) = piece_op(job, extent);
            job.open += 1;
            let serial = self.next_serial();
            let key = self.pieces.insert(Piece {
                job: at,
                serial,
                copyset,
                epoch,
                extent,
                op,
                payload,
                sent: None,
                doubt: None,
            });
            self.route(copyset).waiting.push_back(key);
            self.wake(copyset);
        }
    }

    fn route(&mut self, id: CopysetId) -> &mut Route {
        let (map, me) = (&self.map, self.config.me);
        self.routes.entry(id).or_insert_with(|| {
            let mut route = Route::default();
            let members = map.copysets.get(&id).map_or(&[][..], |c| &c.members);
            route.set_members(id, members, me);
            route
        })
    }

    /// Lets a route try to send.
    fn wake(&mut self, id: CopysetId) {
        let Some(route) = self.routes.get_mut(&id) else { return };
        if !route.queued && !route.waiting.is_empty() {
            route.queued = true;
            self.ready.push_back(id);
        }
    }

    pub(super) fn wake_all(&mut self) {
        let ids: Vec<CopysetId> = self.routes.keys().copied().collect();
        for id in ids {
            self.wake(id);
        }
    }

    /// Sends what can be sent, one piece of each route in turn.
    pub(super) fn dispatch(&mut self, now: Time) {
        while let Some(id) = self.ready.pop_front() {
            self.route(id).queued = false;
            match self.try_send(id, now) {
                Try::Sent => self.wake(id),
                Try::Blocked => {}
                Try::Full => {
                    self.route(id).queued = true;
                    self.ready.push_front(id);
                    return;
                }
            }
        }
    }

    fn try_send(&mut self, id: CopysetId, now: Time) -> Try {
        let route = &self.routes[&id];
        let Some(&key) = route.waiting.front() else { return Try::Blocked };
        let Some((to, link)) = route.leader.and_then(|to| Some((to, self.live_link(to)?))) else {
            self.seek(id, now);
            return Try::Blocked;
        };
        if now < route.hold_until {
            let until = route.hold_until;
            self.arm(id, until);
            return Try::Blocked;
        }
        let bytes = self.pieces[key].read_bytes();
        if !self.fits(route.in_flight, route.read_bytes, bytes, 4) {
            return Try::Blocked;
        }
        if !self.fits(self.in_flight, self.read_bytes, bytes, 1) {
            return Try::Full;
        }
        let attempt = self.attempt(key, to, self.routes[&id].term, link);
        if self.pieces[key].doubt.is_some_and(|doubt| !attempt.may_follow(&doubt)) {
            // Rule 2. Two leaders of one term were named: wait for the next term.
            self.seek(id, now);
            return Try::Blocked;
        }
        self.send(id, key, attempt, now);
        Try::Sent
    }

    /// Whether one more piece stays within `1/share` of the limits; a lone piece always does.
    fn fits(&self, in_flight: usize, read_bytes: usize, more_bytes: usize, share: usize) -> bool {
        in_flight == 0
            || (in_flight < (self.config.in_flight_max / share).max(1)
                && (more_bytes == 0 || read_bytes + more_bytes <= self.config.read_bytes_max / share))
    }

    /// The epoch of the link to a shard, if it can be reached; there is always a way to oneself.
    fn live_link(&self, to: ShardAddr) -> Option<u64> {
        if self.config.me == Some(to) {
            return Some(0);
        }
        self.links.get(&to).filter(|link| link.up).map(|link| link.epoch)
    }

    fn attempt(&mut self, key: usize, to: ShardAddr, term: Term, link: u64) -> Attempt {
        let serial = self.next_serial();
        Attempt { id: wire_id(key as u64, serial), to, term, link }
    }

    fn send(&mut self, id: CopysetId, key: usize, attempt: Attempt, now: Time) {
        let piece = &mut self.pieces[key];
        assert!(piece.sent.is_none(), "a waiting piece is not in flight");
        piece.sent = Some(attempt);
        let (bytes, op, payload) = (piece.read_bytes(), piece.op, piece.payload.clone());
        let epoch = piece.epoch;
        self.in_flight += 1;
        self.read_bytes += bytes;
        let route = self.route(id);
        route.waiting.pop_front();
        let first = route.in_flight == 0;
        route.in_flight += 1;
        route.read_bytes += bytes;
        if first {
            route.heard_at = now;
            self.arm(id, now + self.config.who_leads_after);
        }
        let request = IoRequest { id: attempt.id, copyset: id, term: attempt.term, epoch, op };
        self.actions.push_back(Action::Send { to: attempt.to, request, payload });
    }

    /// Asks the next replica who leads, unless one is being asked or it is too soon.
    fn seek(&mut self, id: CopysetId, now: Time) {
        let route = &self.routes[&id];
        if route.probe.is_some() {
            return;
        }
        if now < route.probe_after {
            let after = route.probe_after;
            return self.arm(id, after);
        }
        if route.members.is_empty() {
            self.need_map(now);
            return self.arm(id, now + NEED_MAP_EVERY);
        }
        let (config, links) = (&self.config, &self.links);
        let reachable = |to| config.me == Some(to) || links.get(&to).is_some_and(|link: &Link| link.up);
        let route = self.routes.get_mut(&id).expect("looked up above");
        let Some(to) = route.next_probe(config, now, reachable) else { return };
        let term = route.term;
        let probe = Probe { id: wire_id(PROBE_SLOT, self.next_serial()), to, sent_at: now };
        self.route(id).probe = Some(probe);
        self.arm(id, now + self.config.who_leads_after);
        let request =
            IoRequest { id: probe.id, copyset: id, term, epoch: SessionEpoch(0), op: IoOp::WhoLeads };
        self.actions.push_back(Action::Send { to, request, payload: None });
    }

    fn need_map(&mut self, now: Time) {
        if now >= self.need_map_after {
            self.need_map_after = now + NEED_MAP_EVERY;
            self.actions.push_back(Action::NeedMap);
        }
    }

    /// Makes sure that the route is looked at by then.
    fn arm(&mut self, id: CopysetId, at: Time) {
        let route = self.routes.get_mut(&id).expect("only known routes have timers");
        if let Some(set) = route.timer {
            if set <= at {
                return;
            }
            self.timers.remove(&(set, id));
        }
        route.timer = Some(at);
        self.timers.insert((at, id));
    }

    /// A route's timer fired: it may be too early by now, since answers do not move timers.
    pub(super) fn route_due(&mut self, id: CopysetId, now: Time) {
        let patience = self.config.who_leads_after;
        let route = self.route(id);
        route.timer = None;
        if route.probe.is_some_and(|probe| probe.sent_at + patience <= now) {
            route.probe = None;
        }
        if let Some(probe) = route.probe {
            self.arm(id, probe.sent_at + patience);
        }
        let route = &self.routes[&id];
        if route.in_flight > 0 {
            let silent_at = route.heard_at + patience;
            if silent_at <= now {
                self.seek(id, now);
                self.arm(id, now + patience);
            } else {
                self.arm(id, silent_at);
            }
        }
        self.wake(id);
    }

    /// The piece whose latest attempt this answers.
    pub(super) fn awaited(&self, from: ShardAddr, reply: &IoReply) -> Option<usize> {
        let key = usize::try_from(reply.id >> SERIAL_BITS).ok()?;
        let piece = self.pieces.get(key)?;
        let sent = piece.sent.filter(|sent| sent.id == reply.id && sent.to == from)?;
        debug_assert_eq!(wire_id(key as u64, sent.id), sent.id);
        (piece.copyset == reply.copyset).then_some(key)
    }

    /// Takes in a word on leadership; on a higher term all that was sent in lower ones comes back.
    pub(super) fn learn(&mut self, id: CopysetId, from: ShardAddr, leader: Option<ShardAddr>, term: Term) {
        let Some(route) = self.routes.get_mut(&id) else { return };
        let before = (route.leader, route.term);
        if route.learn(from, leader, term) {
            route.hold_until = Time(0);
            self.pull_back(|attempt, copyset| copyset == id && attempt.term < term);
        }
        let route = &self.routes[&id];
        if (route.leader, route.term) != before {
            self.wake(id);
        }
    }

    pub(super) fn probe_answered(&mut self, from: ShardAddr, reply: &IoReply, now: Time) {
        let patience = self.config.who_leads_after;
        let Some(route) = self.routes.get_mut(&reply.copyset) else { return };
        if route.probe.is_none_or(|probe| probe.id != reply.id || probe.to != from) {
            return;
        }
        route.probe = None;
        let silent = route.in_flight > 0 && route.heard_at + patience <= now;
        if reply.outcome == IoOutcome::UnknownCopyset {
            self.need_map(now);
        }
        if silent {
            self.seek(reply.copyset, now);
        }
        self.wake(reply.copyset);
    }

    /// The latest attempt of a piece was answered.
    pub(super) fn answered(
        &mut self,
        key: usize,
        from: ShardAddr,
        reply: IoReply,
        payload: Payload<P>,
        now: Time,
    ) {
        let copyset = reply.copyset;
        let result = match reply.outcome {
            IoOutcome::NotLeader { term, .. } => return self.refused(key, Some(term), now),
            IoOutcome::Busy => return self.refused(key, None, now),
            IoOutcome::UnknownCopyset => {
                self.need_map(now);
                let route = self.route(copyset);
                route.leader = route.leader.filter(|leader| *leader != from);
                return self.refused(key, None, now);
            }
            IoOutcome::NoSpace => Err(IoError::NoSpace),
            IoOutcome::Corrupt => Err(IoError::Corrupt),
            IoOutcome::Invalid => Err(IoError::Io),
            IoOutcome::Fenced { .. } => Err(IoError::Fenced),
            outcome => self.accept(key, outcome, payload),
        };
        self.route(copyset).progress(now);
        self.wake(copyset);
        self.piece_done(key, result);
    }

    /// Not done, or perhaps not: the piece waits again. `term` is that of a `NotLeader`.
    fn refused(&mut self, key: usize, term: Option<Term>, now: Time) {
        let piece = &self.pieces[key];
        let (id, sent) = (piece.copyset, piece.sent.expect("an answer needs a question"));
        self.unsend(key, term.is_some_and(|term| term > sent.term));
        let config = self.config.clone();
        let route = self.route(id);
        route.heard_at = now;
        // A leader newer than the one that refused is tried at once; all else waits a little.
        if term.is_none() || route.term <= sent.term {
            route.hold(&config, now);
        }
        self.wake(id);
    }

    /// Takes a piece out of flight and lets it wait again, in its old place.
    fn unsend(&mut self, key: usize, in_doubt: bool) {
        let attempt = self.forget_sent(key);
        let piece = &mut self.pieces[key];
        if in_doubt && piece.changes_data() {
            piece.doubt = attempt;
        }
        let (id, serial) = (piece.copyset, piece.serial);
        let pieces = &self.pieces;
        let route = self.routes.get_mut(&id).expect("the piece came from it");
        let at = route.waiting.partition_point(|&other| pieces[other].serial < serial);
        route.waiting.insert(at, key);
    }

    /// Ends the accounting of a piece in flight.
    fn forget_sent(&mut self, key: usize) -> Option<Attempt> {
        let piece = &mut self.pieces[key];
        let attempt = piece.sent.take()?;
        let (id, bytes) = (piece.copyset, piece.read_bytes());
        self.in_flight -= 1;
        self.read_bytes -= bytes;
        let route = self.route(id);
        route.in_flight -= 1;
        route.read_bytes -= bytes;
        Some(attempt)
    }

    /// Takes back every sent piece whose attempt is so, its fate unknown.
    pub(super) fn pull_back(&mut self, matches: impl Fn(&Attempt, CopysetId) -> bool) {
        let lost: Vec<usize> = self
            .pieces
            .iter()
            .filter(|(_, piece)| piece.sent.is_some_and(|sent| matches(&sent, piece.copyset)))
            .map(|(key, _)| key)
            .collect();
        for key in lost {
            self.unsend(key, true);
            self.wake(self.pieces[key].copyset);
        }
    }

    /// Hands on what a success brought.
    fn accept(&mut self, key: usize, outcome: IoOutcome, payload: Payload<P>) -> Result<(), IoError> {
        let piece = &self.pieces[key];
        let job = &mut self.jobs[piece.job];
        match (piece.op, outcome) {
            (IoOp::Write { .. } | IoOp::Zero { .. } | IoOp::Fence { .. }, IoOutcome::Done) => Ok(()),
            (IoOp::Read { range, .. }, IoOutcome::Data { present, crcs })
                if u64::from(present) >> range.count == 0 && crcs.len() == present.count_ones() as usize =>
            {
                let Extent { offset, length } = piece.extent;
                self.actions.push_back(Action::ReadPiece {
                    id: job.id,
                    offset,
                    length,
                    present,
                    crcs,
                    payload,
                });
                Ok(())
            }
            (IoOp::Status { range, .. }, IoOutcome::Status { runs })
                if runs.iter().map(|run| usize::from(run.0)).sum::<usize>() == range.count.into() =>
            {
                let bytes =
                    runs.into_iter().map(|(blocks, data)| (u64::from(blocks) * BLOCK_BYTES as u64, data));
                job.runs.insert(piece.extent.offset, bytes.collect());
                Ok(())
            }
            _ => Err(IoError::Io),
        }
    }

    fn piece_done(&mut self, key: usize, result: Result<(), IoError>) {
        self.forget_sent(key);
        let at = self.pieces.remove(key).job;
        let job = &mut self.jobs[at];
        job.open -= 1;
        if let Err(error) = result {
            job.error.get_or_insert(error);
            job.cursor.clear();
            if matches!(job.kind, Kind::Read | Kind::Status) {
                return self.finish(at, Err(error));
            }
            // What is in flight may still change data: the end is told when that is over.
            self.drop_waiting(at);
        }
        let job = &self.jobs[at];
        match job.error {
            _ if job.open > 0 || !job.cursor.is_empty() => self.cut(at),
            Some(error) => self.finish(at, Err(error)),
            None => self.finish(at, Ok(())),
        }
    }

    /// Ends a job and tells so.
    pub(super) fn finish(&mut self, at: usize, result: Result<(), IoError>) {
        self.drop_pieces(at);
        let job = self.jobs.remove(at);
        self.actions.push_back(match (result, job.kind) {
            (Ok(()), Kind::Status) => Action::StatusDone { id: job.id, runs: merge_runs(&job) },
            (result, _) => Action::Done { id: job.id, result },
        });
        self.prune_deadlines();
    }

    /// Forgets all pieces of a job, in flight or not.
    pub(super) fn drop_pieces(&mut self, at: usize) {
        if self.jobs[at].open > 0 {
            self.drop_pieces_if(at, |_| true);
        }
        assert_eq!(self.jobs[at].open, 0, "every open piece was found");
    }

    /// Forgets the pieces of a job that are certainly without effect: never sent, or refused.
    fn drop_waiting(&mut self, at: usize) {
        self.drop_pieces_if(at, |piece| piece.sent.is_none() && piece.doubt.is_none());
    }

    fn drop_pieces_if(&mut self, at: usize, which: impl Fn(&Piece<P>) -> bool) {
        let chosen = self.pieces.iter().filter(|(_, piece)| piece.job == at && which(piece));
        let keys: Vec<usize> = chosen.map(|(key, _)| key).collect();
        for key in keys {
            let was_sent = self.forget_sent(key).is_some();
            let piece = self.pieces.remove(key);
            self.jobs[at].open -= 1;
            if !was_sent {
                self.route(piece.copyset).waiting.retain(|other| *other != key);
            }
            self.wake(piece.copyset);
        }
    }

    /// Keeps the queue of deadlines within twice the open jobs.
    fn prune_deadlines(&mut self) {
        let jobs = &self.jobs;
        let live = |at: usize, serial: u64| jobs.get(at).is_some_and(|job| job.serial == serial);
        while self.deadlines.front().is_some_and(|&(_, at, serial)| !live(at, serial)) {
            self.deadlines.pop_front();
        }
        if self.deadlines.len() > 2 * jobs.len() + 64 {
            self.deadlines.retain(|&(_, at, serial)| live(at, serial));
        }
    }
}

/// The message body and data of a job's next piece.
fn piece_op<P>(job: &mut Job<P>, extent: Extent) -> (IoOp, Option<P>) {
    let chunk = ChunkId { volume: job.volume, index: extent.chunk_index() };
    let (offset, length) = (extent.offset_in_chunk(), extent.length);
    let range = || {
        BlockRange::new(offset as usize / BLOCK_BYTES, length as usize / BLOCK_BYTES)
            .expect("reads and status are cut to whole blocks of one chunk")
    };
    match job.kind {
        Kind::Read => (IoOp::Read { chunk, range: range() }, None),
        Kind::Status => (IoOp::Status { chunk, range: range() }, None),
        Kind::Fence => (IoOp::Fence { volume: job.volume }, None),
        Kind::Zero => (IoOp::Zero { chunk, offset, length }, None),
        Kind::Write => {
            let (crc, payload) = job.write.take().expect("a write is one piece");
            (IoOp::Write { chunk, offset, length, crc }, Some(payload))
        }
    }
}

/// The runs of a status in order, cut to the asked range, equal neighbours joined.
fn merge_runs<P>(job: &Job<P>) -> Vec<(u64, bool)> {
    let (asked_from, asked_to) = job.asked;
    let mut merged: Vec<(u64, bool)> = Vec::new();
    for (&start, runs) in &job.runs {
        let mut at = start;
        for &(bytes, data) in runs {
            let (from, to) = (at.max(asked_from), (at + bytes).min(asked_to));
            at += bytes;
            match merged.last_mut() {
                _ if from >= to => {}
                Some(last) if last.1 == data => last.0 += to - from,
                _ => merged.push((to - from, data)),
            }
        }
    }
    merged
}

fn wire_id(slot: u64, serial: u64) -> u64 {
    (slot << SERIAL_BITS) | (serial & ((1 << SERIAL_BITS) - 1))
}
