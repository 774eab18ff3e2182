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
//! A write that was never acknowledged ends at infinity. One more liberty, a documented limit of
//! `client::volume`: a write that was sent twice may take effect twice before it is acknowledged,
//! so a value may come back after another one, until its writer has its answer. Such sightings are
//! allowed and counted, but not where no two writes of a block overlap and all were acknowledged.

use super::Failure;
use std::collections::BTreeMap;

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

/// All operations, by register.
#[derive(Default, Debug)]
pub struct History {
    registers: BTreeMap<Register, Vec<Op>>,
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
    /// When its write ended.
    acknowledged: u64,
}

impl Zone {
    fn of(op: &Op, acknowledged: u64) -> Self {
        let Op { begun, ended, value, .. } = *op;
        Self { value, written: begun, first_end: ended, last_begin: begun, acknowledged }
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

    /// Judges every register; returns how often the liberty was taken.
    ///
    /// # Errors
    /// Some register did not behave as one.
    pub fn judge(&self, exclusive: bool) -> Result<u64, Failure> {
        let mut doubles = 0;
        for (register, ops) in &self.registers {
            let Err(strict) = judge(ops, |_| true) else { continue };
            // In an exclusive history the anchor of a value may be dropped only if it was never
            // acknowledged; else also where its writer was still waiting.
            let lenient = judge(ops, |zone| exclusive && zone.acknowledged != NEVER);
            if lenient.is_err() {
                return Err(Failure(describe(*register, ops, &strict)));
            }
            doubles += 1;
        }
        Ok(doubles)
    }
}

/// `anchored`: whether reads before a value's acknowledgement tie it down.
fn judge(ops: &[Op], anchored: impl Fn(&Zone) -> bool) -> Result<(), String> {
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    let mut points: Vec<Zone> = Vec::new();
    for op in ops.iter().filter(|op| !op.is_read) {
        let zone = Zone::of(op, op.ended);
        if op.value == 0 { points.push(zone) } else { _ = zones.insert(op.value, zone) }
    }
    for op in ops.iter().filter(|op| op.is_read) {
        if op.value == 0 {
            points.push(Zone::of(op, NEVER));
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
    for zone in zones.values_mut() {
        if !anchored(zone) {
            zone.first_end = zone.acknowledged;
        }
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
    let zeroings: Vec<&Op> = ops.iter().filter(|op| !op.is_read && op.value == 0).collect();
    for read in reads {
        // The latest moment at which a value was surely there before this read began.
        let covering = zones.values().filter(|zone| zone.first_end < read.begun);
        let last = covering.map(|zone| zone.last_begin).max();
        let Some(last) = last else { continue };
        if !zeroings.iter().any(|zero| zero.begun < read.ended && zero.ended > last) {
            return Err(format!(
                "a read from {} to {} returned zeroes, but the last zeroing ended before {last}, when a value was there",
                read.begun, read.ended
            ));
        }
    }
    Ok(())
}

fn describe(register: Register, ops: &[Op], what: &str) -> String {
    let mut sorted = ops.to_vec();
    sorted.sort_by_key(|op| op.begun);
    let mut text = format!("volume {} unit {}: {what}\n", register.0, register.1);
    let count = sorted.len();
    for op in sorted.iter().skip(count.saturating_sub(200)) {
        let kind = if op.is_read { "read " } else { "write" };
        let ended = if op.ended == NEVER { "never".to_owned() } else { op.ended.to_string() };
        text += &format!("  {kind} {:>8}  {} .. {ended}\n", op.value, op.begun);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (write?, value, begun, ended); 0 for an end that never came.
    type Told = (bool, u64, u64, u64);

    fn verdict(exclusive: bool, ops: &[Told]) -> Result<u64, Failure> {
        let mut history = History::default();
        for (write, value, begun, ended) in ops {
            if *write {
                let ticket = history.begin_write((1, 0), *value, *begun);
                if *ended > 0 {
                    history.end_write(ticket, *ended);
                }
            } else {
                history.read((1, 0), *value, *begun, *ended);
            }
        }
        history.judge(exclusive)
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
            assert_eq!(verdict(true, history), Ok(0), "{history:?}");
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
            assert!(verdict(true, history).is_err(), "{name}");
        }
    }

    #[test]
    fn a_write_that_was_sent_twice_may_show_twice_until_it_is_acknowledged_and_never_after() {
        let twice = [(W, 1, 1, 20), (R, 1, 2, 3), (W, 2, 4, 5), (R, 2, 6, 7), (R, 1, 8, 9)];
        assert_eq!(verdict(false, &twice), Ok(1));
        assert!(verdict(true, &twice).is_err(), "nothing is sent over a write that is under way");
        let after = [(W, 1, 1, 5), (R, 1, 2, 3), (W, 2, 6, 7), (R, 2, 8, 9), (R, 1, 10, 11)];
        assert!(verdict(false, &after).is_err());
    }
}
