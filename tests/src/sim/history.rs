//! Every operation on every register, judged as atomic at the end.
//!
//! A register is the smallest unit that a host writes: a block of 4 KiB, or of 512 bytes. Each
//! write has a value of its own, so who wrote what a read returned is known. For such histories
//! linearizability is decidable in n log n (Gibbons and Korach, "Testing shared memories", 1997):
//! the operations of one value form a zone from the earliest end to the latest beginning; forward
//! zones must not overlap, and no backward zone may lie within a forward one.
//!
//! Zeroes have no such name: every zeroing is a backward zone of its own, every read of zeroes
//! too, and it must have a zeroing (or the beginning) that nothing surely came after.
//!
//! A write that was never acknowledged ends at infinity.
//!
//! A second judge knows the order that the copysets agreed on ([`Change`]), in which every register's
//! changes are known with their values. With the order given, linearizability is decided exactly:
//! each operation takes the earliest place in it that real time allows. This judge knows one thing
//! more than a register: by a documented limit of `client::volume` a write that was sent twice may
//! take effect twice, both before it is acknowledged. So the first judge's word is overruled for a
//! register in whose log the same write is seen twice, with another one in between, and for no other.

use super::Failure;
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;

/// One change of a register, in the order agreed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Its place in the order.
    pub position: u64,
    /// What it left there; 0 for zeroes.
    pub value: u64,
    /// When it was first applied.
    pub at: u64,
    /// The term it was proposed in.
    pub term: u64,
}

/// One unit of a volume: which volume, which unit.
pub type Register = (u32, u64);

/// An end that never came.
const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Op {
    begun: u64,
    ended: u64,
    /// 0 for zeroes.
    value: u64,
    is_read: bool,
}

impl Op {
    fn kind(&self) -> &'static str {
        if self.is_read { "read" } else { "write" }
    }
}

/// All operations, by register.
#[derive(Default, Debug)]
pub struct History {
    registers: FxHashMap<Register, Vec<Op>>,
    last_value: u64,
}

/// One write of one register under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(Register, usize);

impl Ticket {
    /// Where it writes.
    pub fn register(&self) -> Register {
        self.0
    }
}

/// The operations of one value.
#[derive(Clone, Copy, Debug)]
struct Zone {
    value: u64,
    /// When its write began.
    written: u64,
    first_end: u64,
    last_begin: u64,
}

impl Zone {
    fn of(op: &Op) -> Self {
        let Op { begun, ended, value, .. } = *op;
        Self { value, written: begun, first_end: ended, last_begin: begun }
    }

    fn is_forward(&self) -> bool {
        self.first_end < self.last_begin
    }
}

impl History {
    /// A value that no other write has.
    pub fn new_value(&mut self) -> u64 {
        self.last_value += 1;
        self.last_value
    }

    /// A write begins; value 0 writes zeroes.
    pub fn begin_write(&mut self, register: Register, value: u64, now: u64) -> Ticket {
        let ops = self.registers.entry(register).or_default();
        ops.push(Op { begun: now, ended: NEVER, value, is_read: false });
        Ticket(register, ops.len() - 1)
    }

    /// A write was acknowledged.
    pub fn end_write(&mut self, ticket: Ticket, now: u64) {
        let ops = self.registers.get_mut(&ticket.0).expect("begun before");
        ops[ticket.1].ended = now;
    }

    /// A read was answered.
    pub fn read(&mut self, register: Register, value: u64, begun: u64, ended: u64) {
        let ops = self.registers.entry(register).or_default();
        ops.push(Op { begun, ended, value, is_read: true });
    }

    /// Judges every register by what was asked and answered alone.
    ///
    /// # Errors
    /// Some register did not behave as one.
    pub fn judge_alone(&self) -> Result<(), Failure> {
        self.in_order().try_for_each(|(register, ops)| {
            judge(ops).map_err(|what| Failure(describe(*register, ops, &[], &what)))
        })
    }

    fn in_order(&self) -> impl Iterator<Item = (&Register, &Vec<Op>)> {
        let mut all: Vec<_> = self.registers.iter().collect();
        all.sort_unstable_by_key(|(register, _)| **register);
        all.into_iter()
    }

    /// Judges every register by both judges; returns how many writes took effect twice.
    ///
    /// # Errors
    /// Some register did not behave as one.
    pub fn judge(&self, changes: &BTreeMap<Register, Vec<Change>>) -> Result<u64, Failure> {
        let mut doubles = 0;
        for (register, ops) in self.in_order() {
            let told = changes.get(register).map_or(&[][..], Vec::as_slice);
            let failed = |what: &str| Failure(describe(*register, ops, told, what));
            let twice = follow(ops, told).map_err(|what| failed(&what))?;
            if twice == 0 {
                judge(ops).map_err(|what| failed(&what))?;
            }
            doubles += twice;
        }
        Ok(doubles)
    }
}

/// A stretch of the order in which a register holds one value.
#[derive(Clone, Copy)]
struct Stretch {
    from: u64,
    /// One past its last place.
    to: u64,
    value: u64,
    at: u64,
}

fn stretches(changes: &[Change]) -> Vec<Stretch> {
    let mut all = vec![Stretch { from: 0, to: u64::MAX, value: 0, at: 0 }];
    for change in changes {
        let last = all.last_mut().expect("never empty");
        if last.value != change.value {
            last.to = change.position;
            let Change { position: from, value, at, .. } = *change;
            all.push(Stretch { from, to: u64::MAX, value, at });
        }
    }
    all
}

/// Whether the operations fit the order; returns how many writes took effect twice.
fn follow(ops: &[Op], changes: &[Change]) -> Result<u64, String> {
    let stretches = stretches(changes);
    let mut by_value: BTreeMap<u64, Vec<Stretch>> = BTreeMap::new();
    for stretch in &stretches {
        by_value.entry(stretch.value).or_default().push(*stretch);
    }
    let mut written: Vec<u64> = ops.iter().filter(|op| !op.is_read).map(|op| op.value).collect();
    written.sort_unstable();
    for value in by_value.keys().filter(|value| **value != 0) {
        if written.binary_search(value).is_err() {
            return Err(format!("{value} was agreed on, which nobody wrote here"));
        }
    }
    // All beginnings and ends in the order of time; at one moment beginnings come first.
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * ops.len());
    for (at, op) in ops.iter().enumerate() {
        events.push((op.begun, false, at));
        if op.ended != NEVER {
            events.push((op.ended, true, at));
        }
    }
    events.sort_unstable();
    // The place that everything which begins now must come after, or at.
    let mut reached = 0;
    let mut bounds = vec![0; ops.len()];
    for (now, is_end, at) in events {
        let op = &ops[at];
        let bound = &mut bounds[at];
        let places = by_value.get(&op.value).map_or(&[][..], Vec::as_slice);
        if !is_end {
            *bound = reached;
            let early = places.first().filter(|first| first.from <= reached);
            if let Some(first) = early.filter(|_| !op.is_read && op.value != 0) {
                return Err(format!(
                    "the write of {} began at {now}, but took effect at {}, before {reached} which was reached by then",
                    op.value, first.from
                ));
            }
        } else if op.is_read || op.value == 0 {
            let next = places.partition_point(|stretch| stretch.to <= *bound);
            let found = places.get(next).filter(|stretch| stretch.at <= now);
            let Some(found) = found else {
                return Err(format!(
                    "{} {} from {} to {now}: not there after {bound}, which was reached when it began",
                    op.kind(),
                    op.value,
                    op.begun
                ));
            };
            reached = reached.max(found.from);
        } else {
            let (Some(first), Some(last)) = (places.first(), places.last()) else {
                return Err(format!(
                    "the write of {} was acknowledged at {now} and never agreed on",
                    op.value
                ));
            };
            if first.at > now {
                return Err(format!(
                    "the write of {} was acknowledged at {now}, applied at {}",
                    op.value, first.at
                ));
            }
            reached = reached.max(last.from);
        }
    }
    let twice = by_value.iter().filter(|(value, places)| **value != 0 && places.len() > 1);
    Ok(twice.count() as u64)
}

fn judge(ops: &[Op]) -> Result<(), String> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    let mut points: Vec<Zone> = Vec::new();
    for op in ops.iter().filter(|op| !op.is_read) {
        let zone = Zone::of(op);
        if op.value == 0 {
            points.push(zone);
        } else {
            zones.insert(op.value, zone);
        }
    }
    for op in ops.iter().filter(|op| op.is_read) {
        if op.value == 0 {
            points.push(Zone::of(op));
            continue;
        }
        let Some(zone) = zones.get_mut(&op.value) else {
            return Err(format!("a read returned {}, which nobody wrote", op.value));
        };
        if op.ended < zone.written {
            return Err(format!("a read returned {} before it was written", op.value));
        }
        zone.last_begin = zone.last_begin.max(op.begun);
        zone.first_end = zone.first_end.min(op.ended);
    }
    let mut forward: Vec<Zone> = zones.values().filter(|zone| zone.is_forward()).copied().collect();
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_begin {
            return Err(format!(
                "{} was there at {} and again at {}, with {} in between at {}",
                pair[0].value, pair[0].first_end, pair[0].last_begin, pair[1].value, pair[1].first_end
            ));
        }
    }
    let backward = zones.values().filter(|zone| !zone.is_forward()).chain(&points);
    for zone in backward.filter(|zone| zone.first_end != NEVER) {
        // The only forward zone that can contain it is the last that starts before it.
        let at = forward.partition_point(|outer| outer.first_end < zone.last_begin);
        if let Some(outer) = at.checked_sub(1).map(|at| forward[at])
            && zone.first_end < outer.last_begin
        {
            return Err(format!(
                "{} was there at {} and still at {}, but {} was written or read from {} to {}",
                outer.value, outer.first_end, outer.last_begin, zone.value, zone.last_begin, zone.first_end
            ));
        }
    }
    reads_of_zeroes(ops, &zones)
}

/// Each read of zeroes needs a zeroing after which surely nothing was written before the read.
fn reads_of_zeroes(ops: &[Op], zones: &BTreeMap<u64, Zone>) -> Result<(), String> {
    let reads: Vec<&Op> = ops.iter().filter(|op| op.is_read && op.value == 0).collect();
    if reads.is_empty() {
        return Ok(());
    }
    // By time: the latest moment at which any value that was there by then was surely there still, and
    // the latest end of any zeroing that had begun by then.
    let present = latest(zones.values().map(|zone| (zone.first_end, zone.last_begin)));
    let zeroings = ops.iter().filter(|op| !op.is_read && op.value == 0);
    let zeroed = latest(zeroings.map(|op| (op.begun, op.ended)));
    for read in reads {
        let Some(last) = before(&present, read.begun) else { continue };
        if before(&zeroed, read.ended).is_none_or(|ended| ended <= last) {
            return Err(format!(
                "a read from {} to {} returned zeroes, but the last zeroing ended before {last}, when a value was there",
                read.begun, read.ended
            ));
        }
    }
    Ok(())
}

/// Sorted by the first number; the second is the highest up to there.
fn latest(pairs: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut pairs: Vec<(u64, u64)> = pairs.collect();
    pairs.sort_unstable();
    let mut most = 0;
    for (_, second) in &mut pairs {
        most = most.max(*second);
        *second = most;
    }
    pairs
}

/// The highest second number where the first is below `limit`.
fn before(pairs: &[(u64, u64)], limit: u64) -> Option<u64> {
    let count = pairs.partition_point(|(first, _)| *first < limit);
    count.checked_sub(1).map(|at| pairs[at].1)
}

fn describe(register: Register, ops: &[Op], changes: &[Change], what: &str) -> String {
    let mut sorted = ops.to_vec();
    sorted.sort_by_key(|op| op.begun);
    let mut text = format!("linearizability: volume {} unit {}: {what}\n", register.0, register.1);
    for op in &sorted {
        let ended = if op.ended == NEVER { "never".to_owned() } else { op.ended.to_string() };
        text += &format!("  {:<5} {:>8}  {} .. {ended}\n", op.kind(), op.value, op.begun);
    }
    for change in changes {
        let Change { position, value, at, term } = change;
        text += &format!("  entry {position} of term {term} left {value:>8}, applied at {at}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (write?, value, begun, ended); 0 for an end that never came.
    type Told = (bool, u64, u64, u64);

    /// The values in the order agreed, each with the time at which it was applied.
    type Order = [(u64, u64)];

    fn history(told: &[Told]) -> Vec<Op> {
        let mut history = History::default();
        for (write, value, begun, ended) in told {
            if *write {
                let ticket = history.begin_write((1, 0), *value, *begun);
                if *ended > 0 {
                    history.end_write(ticket, *ended);
                }
            } else {
                history.read((1, 0), *value, *begun, *ended);
            }
        }
        history.registers.remove(&(1, 0)).expect("all of it is about one register")
    }

    fn agreed(order: &Order) -> Vec<Change> {
        let change = |(n, (value, at)): (usize, &(u64, u64))| Change {
            position: 10 + n as u64,
            value: *value,
            at: *at,
            term: 1,
        };
        order.iter().enumerate().map(change).collect()
    }

    const W: bool = true;
    const R: bool = false;

    #[test]
    fn histories_of_a_register_pass() {
        let good: &[&[Told]] = &[
            &[(R, 0, 1, 2), (W, 1, 3, 4), (R, 1, 5, 6)],
            &[(W, 1, 1, 10), (W, 2, 2, 9), (R, 1, 11, 12)],
            &[(W, 1, 1, 10), (R, 1, 2, 3), (R, 0, 1, 4)],
            &[(W, 1, 1, 0), (R, 0, 5, 6), (R, 1, 7, 8)],
            &[(W, 1, 1, 2), (W, 0, 3, 4), (R, 0, 5, 6), (W, 2, 7, 8), (R, 2, 9, 10)],
            &[(W, 1, 1, 2), (W, 0, 3, 0), (R, 1, 5, 6), (R, 0, 7, 8)],
        ];
        for history in good {
            assert_eq!(judge(&self::history(history)), Ok(()), "{history:?}");
        }
    }

    #[test]
    fn histories_known_to_be_bad_are_caught() {
        let bad: &[(&str, &[Told])] = &[
            ("lost write", &[(W, 1, 1, 2), (W, 2, 3, 4), (R, 1, 5, 6)]),
            ("lost to the beginning", &[(W, 1, 1, 2), (R, 0, 3, 4)]),
            ("stale after seen", &[(W, 1, 1, 2), (W, 2, 3, 20), (R, 2, 4, 5), (R, 1, 6, 7)]),
            ("came back", &[(W, 1, 1, 2), (R, 1, 3, 4), (W, 2, 5, 6), (R, 1, 7, 8)]),
            ("from nowhere", &[(R, 7, 1, 2)]),
            ("before it was written", &[(R, 1, 1, 2), (W, 1, 3, 4)]),
            ("zeroing lost", &[(W, 1, 1, 2), (W, 0, 3, 4), (R, 1, 5, 6)]),
            ("zeroes came back", &[(W, 0, 1, 2), (W, 1, 3, 4), (R, 1, 5, 6), (R, 0, 7, 8)]),
            ("two orders", &[(W, 1, 1, 9), (W, 2, 1, 9), (R, 1, 10, 11), (R, 2, 12, 13), (R, 1, 14, 15)]),
        ];
        for (name, history) in bad {
            assert!(judge(&self::history(history)).is_err(), "{name}");
        }
    }

    #[test]
    fn histories_that_fit_the_agreed_order_pass() {
        let good: &[(&[Told], &Order, u64)] = &[
            (&[(R, 0, 1, 2), (W, 1, 3, 5), (R, 1, 6, 7)], &[(1, 4)], 0),
            (&[(W, 1, 1, 10), (W, 2, 2, 9), (R, 1, 11, 12)], &[(2, 8), (1, 9)], 0),
            (&[(W, 1, 1, 0), (R, 0, 5, 6), (R, 1, 7, 9)], &[(1, 8)], 0),
            (&[(W, 1, 1, 0), (R, 0, 5, 6)], &[], 0),
            (&[(W, 1, 1, 3), (W, 0, 4, 6), (R, 0, 7, 8)], &[(1, 2), (0, 5)], 0),
            (&[(W, 0, 4, 6), (R, 0, 7, 8)], &[(0, 5)], 0),
            (&[(W, 1, 1, 3), (R, 1, 4, 8), (W, 2, 4, 7)], &[(1, 2), (2, 5)], 0),
            // A neighbour's part of the block was written: the same value again is no change.
            (&[(W, 1, 1, 3), (R, 1, 4, 9)], &[(1, 2), (1, 5)], 0),
            // Sent twice, not acknowledged before both took effect.
            (
                &[(W, 1, 1, 20), (R, 1, 2, 4), (W, 2, 4, 6), (R, 2, 6, 7), (R, 1, 8, 10)],
                &[(1, 3), (2, 5), (1, 9)],
                1,
            ),
        ];
        for (ops, order, twice) in good {
            assert_eq!(follow(&history(ops), &agreed(order)), Ok(*twice), "{ops:?} {order:?}");
        }
    }

    #[test]
    fn histories_that_do_not_fit_the_agreed_order_are_caught() {
        let bad: &[(&str, &[Told], &Order)] = &[
            ("never agreed on", &[(W, 1, 1, 3)], &[]),
            ("agreed on after its answer", &[(W, 1, 1, 3)], &[(1, 4)]),
            ("nobody wrote it", &[(W, 1, 1, 3)], &[(1, 2), (7, 5)]),
            ("stale read", &[(W, 1, 1, 3), (W, 2, 4, 6), (R, 1, 7, 8)], &[(1, 2), (2, 5)]),
            ("stale read of zeroes", &[(W, 1, 1, 3), (R, 0, 4, 5)], &[(1, 2)]),
            ("read before it was applied", &[(W, 1, 1, 9), (R, 1, 2, 3)], &[(1, 5)]),
            ("went back after a read", &[(W, 1, 1, 20), (R, 1, 5, 6), (R, 0, 7, 8)], &[(1, 4)]),
            ("read of what was never there", &[(W, 1, 1, 3), (R, 5, 4, 5)], &[(1, 2)]),
            ("order against time", &[(W, 1, 1, 3), (W, 2, 4, 6)], &[(2, 2), (1, 3)]),
            ("zeroing that never was", &[(W, 1, 1, 3), (W, 0, 4, 6)], &[(1, 2)]),
            (
                "a second copy took effect after the answer",
                &[(W, 1, 1, 5), (W, 2, 6, 8), (R, 2, 9, 10), (R, 1, 12, 13)],
                &[(1, 4), (2, 7), (1, 11)],
            ),
            (
                "a part of a block was merged with what it held before",
                &[(W, 1, 1, 3), (W, 2, 4, 6), (W, 3, 7, 9)],
                &[(1, 2), (2, 5), (1, 7), (3, 8)],
            ),
        ];
        for (name, ops, order) in bad {
            assert!(follow(&history(ops), &agreed(order)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_write_seen_twice_in_the_log_is_overruled_and_nothing_else() {
        let told = [(W, 1, 1, 20), (R, 1, 2, 4), (W, 2, 4, 6), (R, 2, 6, 7), (R, 1, 8, 10)];
        let mut whole = History::default();
        whole.registers.insert((1, 0), history(&told));
        let judged = |order: &Order| whole.judge(&BTreeMap::from([((1, 0), agreed(order))]));
        assert_eq!(judged(&[(1, 3), (2, 5), (1, 9)]), Ok(1));
        assert!(judged(&[(1, 3), (2, 5)]).is_err());
    }
}
