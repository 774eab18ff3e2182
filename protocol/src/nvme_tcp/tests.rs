//! Both ends in memory: what a host may send, field by field, and what it gets for it.

use super::command::NSID;
use super::host::{Host, HostEvent, connect_data};
use super::pdu::Digests;
use super::wire::*;
use super::*;
use crate::types::VolumeId;
use proptest::prelude::*;

const NAMESPACE: Namespace = Namespace { volume: VolumeId(7), bytes: 1 << 30, block_bytes: 512 };

/// A session, and what it sent that the host has not looked at.
struct Pair {
    session: Session,
    host: Host,
    out: Vec<u8>,
}

impl Pair {
    fn new() -> Self {
        Self { session: Session::new(), host: Host::default(), out: Vec::new() }
    }
    /// After ICReq.
    fn ready(digests: u8) -> Self {
        let mut pair = Self::new();
        let mut bytes = Vec::new();
        pair.host.ic_req(Digests::from_bits(digests), 0, 3, &mut bytes);
        assert_eq!(pair.feed(&bytes), Ok(vec![]));
        assert!(matches!(pair.answer(), HostEvent::Ready(ic) if ic.limit == H2C_DATA_MAX));
        pair
    }
    /// After Connect of an IO queue.
    fn connected(digests: u8) -> Self {
        let mut pair = Self::ready(digests);
        pair.connect(1, false);
        pair
    }
    fn connect(&mut self, qid: u16, admin: bool) {
        let sqe = Sqe::connect(9, qid, 32, 0);
        let events =
            self.command(&sqe, &connect_data([1; 16], u16::MAX, "nqn.a", "nqn.b")).expect("in order");
        assert_eq!(events.len(), 2, "{events:?}");
        self.session.connecting();
        self.session.connected(&sqe, admin, Some(NAMESPACE), 5, &mut self.out);
        assert!(matches!(self.answer(), HostEvent::Response(cqe) if cqe.status.is_ok() && cqe.result == 5));
    }
    fn command(&mut self, sqe: &Sqe, inline: &[u8]) -> Result<Vec<Event>, Violation> {
        let mut bytes = Vec::new();
        self.host.command(sqe, inline, &mut bytes);
        self.feed(&bytes)
    }
    /// Feeds, taking payload as the transport would.
    fn feed(&mut self, mut bytes: &[u8]) -> Result<Vec<Event>, Violation> {
        let mut events = Vec::new();
        loop {
            let progress = self.session.feed(bytes, &mut self.out)?;
            bytes = &bytes[progress.used..];
            let payload = match &progress.event {
                Some(Event::Command { out_bytes, inline: true, .. }) => *out_bytes as usize,
                Some(Event::Data { length, .. }) => *length as usize,
                _ => 0,
            };
            if payload > 0 {
                let (data, rest) = bytes.split_at(payload);
                self.session.payload_taken(Some(crc32c::crc32c(data)));
                bytes = rest;
            }
            match progress.event {
                Some(event) => events.push(event),
                None if progress.used == 0 => return Ok(events),
                None => {}
            }
        }
    }
    fn answer(&mut self) -> HostEvent {
        let (used, event) = self.host.feed(&self.out).expect("valid").expect("an answer");
        self.out.drain(..used);
        event
    }
    fn status(&mut self, sqe: &Sqe, inline: &[u8]) -> Status {
        assert_eq!(self.command(sqe, inline), Ok(vec![]), "{sqe:?}");
        match self.answer() {
            HostEvent::Response(cqe) => {
                assert_eq!(cqe.cid, sqe.cid());
                cqe.status
            }
            other => panic!("{other:?}"),
        }
    }
    /// The termination that these bytes bring.
    fn terminated(mut self, bytes: &[u8]) -> (u16, u32) {
        let result = self.feed(bytes);
        assert!(matches!(result, Err(Violation::Broken(_))), "{result:?}");
        let answer = self.answer();
        assert!(self.session.feed(bytes, &mut self.out) == Ok(Progress::default()), "nothing more is used");
        match answer {
            HostEvent::Terminated { fes, info } => (fes, info),
            other => panic!("{other:?}"),
        }
    }
}

fn changed(mut bytes: Vec<u8>, at: usize, value: &[u8]) -> Vec<u8> {
    put(&mut bytes, at, value);
    bytes
}

fn ic_req() -> Vec<u8> {
    let mut bytes = Vec::new();
    Host::default().ic_req(Digests::default(), 0, 0, &mut bytes);
    bytes
}

fn write(cid: u16, slba: u64, blocks: u32) -> Sqe {
    Sqe::new(io::WRITE, cid, NSID).with_range(slba, blocks).with_data(blocks * 512, false)
}

fn read(cid: u16, slba: u64, blocks: u32) -> Sqe {
    Sqe::new(io::READ, cid, NSID).with_range(slba, blocks).with_data(blocks * 512, false)
}

#[test]
fn a_wrong_field_of_the_first_pdu_is_told_by_its_offset() {
    let field = |at: usize, value: &[u8]| Pair::new().terminated(&changed(ic_req(), at, value));
    for kind in [1u8, 3, 5, 7, 8, 9, 0xff] {
        assert_eq!(field(0, &[kind]), (fes::HEADER_FIELD, 0), "type {kind}");
    }
    for kind in [4u8, 6] {
        assert_eq!(field(0, &[kind]), (fes::SEQUENCE, 0), "type {kind} first");
    }
    for hlen in [0u8, 127, 129, 255] {
        assert_eq!(field(2, &[hlen]), (fes::HEADER_FIELD, 2), "hlen {hlen}");
    }
    for plen in [0u32, 127, 129, u32::MAX] {
        assert_eq!(field(4, &plen.to_le_bytes()), (fes::HEADER_FIELD, 4), "plen {plen}");
    }
    assert_eq!(field(8, &[1]), (fes::UNSUPPORTED, 8), "version");
    for hpda in [32u8, 255] {
        assert_eq!(field(10, &[hpda]), (fes::HEADER_FIELD, 10), "hpda {hpda}");
    }
    assert_eq!(Pair::ready(0).terminated(&ic_req()), (fes::SEQUENCE, 0), "twice");
}

#[test]
fn any_number_of_r2ts_may_be_allowed_by_the_host() {
    for (told, used) in [(0u32, 1), (1, 2), (u32::MAX, 4)] {
        let mut pair = Pair::new();
        assert_eq!(pair.feed(&changed(ic_req(), 12, &told.to_le_bytes())), Ok(vec![]));
        assert_eq!(pair.session.r2t_max(), used);
    }
}

#[test]
fn a_wrong_field_of_a_capsule_is_told_by_its_offset() {
    let field = |digests: u8, inline: &[u8], at: usize, value: &[u8]| {
        let pair = Pair::connected(digests);
        let mut bytes = Vec::new();
        let sqe = write(1, 0, 1).with_data(inline.len() as u32, true);
        pair.host.command(&sqe, inline, &mut bytes);
        pair.terminated(&changed(bytes, at, value))
    };
    let data = [7; 512];
    for hlen in [0u8, 71, 73, 255] {
        assert_eq!(field(0, &[], 2, &[hlen]), (fes::HEADER_FIELD, 2), "hlen {hlen}");
    }
    for plen in [0u32, 8, 71] {
        assert_eq!(field(0, &[], 4, &plen.to_le_bytes()), (fes::HEADER_FIELD, 4), "plen {plen}");
    }
    for pdo in [0u8, 8, 71, 73, 74] {
        assert_eq!(field(0, &data, 3, &[pdo]), (fes::HEADER_FIELD, 3), "pdo {pdo}");
    }
    let beyond = (COMMAND_BYTES as u32 + 4).to_le_bytes();
    assert_eq!(field(0, &data, 3, &[80, beyond[0], 0, 0, 0]), (fes::HEADER_FIELD, 3), "data beyond the end");
    for flags in [flag::HDGST, flag::DDGST] {
        assert_eq!(field(0, &data, 1, &[flags]), (fes::HEADER_FIELD, 1), "flags {flags}");
    }
    assert_eq!(field(3, &data, 1, &[flag::HDGST]), (fes::HEADER_FIELD, 1), "without a data digest");
    assert_eq!(field(3, &data, 1, &[0]), (fes::HEADER_FIELD, 1), "without digests");
    assert_eq!(field(0, &data, 4, &u32::MAX.to_le_bytes()), (fes::LIMIT, 0), "far too much data");
    let (fes, _) = field(1, &data, 72, &[1, 2, 3, 4]);
    assert_eq!(fes, super::wire::fes::HEADER_DIGEST);
}

#[test]
fn more_data_than_a_capsule_takes_ends_the_connection_and_all_that_it_takes_is_taken() {
    let mut pair = Pair::connected(0);
    let data = vec![1; 16 << 10];
    let sqe = write(1, 0, 32).with_data(16 << 10, true);
    assert_eq!(pair.command(&sqe, &data).map(|events| events.len()), Ok(2));
    let mut bytes = Vec::new();
    pair.host.command(&write(2, 0, 33).with_data(33 * 512, true), &[0; 33 * 512], &mut bytes);
    assert_eq!(pair.terminated(&bytes), (fes::LIMIT, 0));
}

#[test]
fn a_command_that_makes_no_sense_gets_its_status_and_the_next_one_works() {
    let mut pair = Pair::connected(0);
    let end = NAMESPACE.bytes / 512;
    let data = [3; 512];
    let inline = |sqe: Sqe| sqe.with_data(512, true);
    let flags = |mut sqe: Sqe, flags: u8| {
        sqe.0[1] = flags;
        sqe
    };
    let sgl = |sqe: Sqe, kind: u8| {
        let mut sqe = sqe;
        sqe.0[39] = kind;
        sqe
    };
    let cases: Vec<(Sqe, &[u8], Status)> = vec![
        (Sqe::new(0x7e, 1, 1), &[], Status::INVALID_OPCODE),
        (Sqe::new(FABRICS, 1, 0x55), &[], Status::INVALID_OPCODE),
        (Sqe::new(admin::IDENTIFY, 1, 1), &[], Status::INVALID_OPCODE),
        (read(1, 0, 1).with(1, 0), &[], Status::INVALID_NAMESPACE),
        (read(1, 0, 1).with(1, 2), &[], Status::INVALID_NAMESPACE),
        (read(1, 0, 1).with(1, u32::MAX), &[], Status::INVALID_NAMESPACE),
        (read(1, end, 1), &[], Status::LBA_RANGE),
        (read(1, end - 1, 2), &[], Status::LBA_RANGE),
        (read(1, u64::MAX, 1), &[], Status::LBA_RANGE),
        (read(1, u64::MAX - 1, 8), &[], Status::LBA_RANGE),
        (read(1, 0, 2049), &[], Status::INVALID_FIELD),
        (write(1, end, 1), &[], Status::LBA_RANGE),
        (inline(write(1, end, 1)), &data, Status::LBA_RANGE),
        (read(1, 0, 1).with_data(1024, false), &[], Status::SGL_LENGTH),
        (sgl(read(1, 0, 1), SGL_IN_CAPSULE), &[], Status::SGL_TYPE),
        (sgl(read(1, 0, 1), 0), &[], Status::SGL_TYPE),
        (write(1, 0, 1).with_data(0, false), &[], Status::SGL_LENGTH),
        (write(1, 0, 1).with_data(512, true), &[], Status::SGL_LENGTH),
        (write(1, 0, 2).with_data(512, true), &data, Status::SGL_LENGTH),
        (write(1, 0, 1).with_data(1024, true), &data, Status::SGL_LENGTH),
        (sgl(write(1, 0, 1), 0x40), &[], Status::SGL_TYPE),
        (sgl(inline(write(1, 0, 1)), SGL_TRANSPORT), &data, Status::SGL_TYPE),
        (inline(write(1, 0, 1)).with(6, 4), &data, Status::SGL_OFFSET),
        (inline(read(1, 0, 1)), &data, Status::INVALID_FIELD),
        (flags(read(1, 0, 1), 0), &[], Status::INVALID_FIELD),
        (flags(read(1, 0, 1), 1 << 6 | 1), &[], Status::INVALID_FIELD),
        (flags(inline(write(1, 0, 1)), 1 << 6 | 2), &data, Status::INVALID_FIELD),
        (Sqe::new(io::DSM, 1, 1).with(10, 1).with(11, 4).with_data(16, false), &[], Status::SGL_LENGTH),
        (Sqe::new(io::DSM, 1, 1).with(11, 4).with_data(4097, false), &[], Status::SGL_LENGTH),
        (Sqe::new(io::WRITE_ZEROES, 1, 1).with_range(end - 1, 2), &[], Status::LBA_RANGE),
        (Sqe::new(io::VERIFY, 1, 1).with_range(end, 1), &[], Status::LBA_RANGE),
        (Sqe::connect(1, 1, 32, 0), &[0; 1024], Status::SEQUENCE),
    ];
    for (sqe, data, status) in cases {
        assert_eq!(pair.status(&sqe, data), status.dnr(), "{sqe:?}");
        assert_eq!(pair.command(&read(2, 0, 1), &[]).map(|events| events.len()), Ok(1), "after {sqe:?}");
        pair.session.respond(2, Status::SUCCESS, 0, &mut pair.out);
        pair.answer();
    }
    assert_eq!(pair.session.open(), 0);
}

#[test]
fn nothing_but_connect_is_taken_by_a_new_connection_and_no_more_than_that() {
    let mut pair = Pair::ready(0);
    assert_eq!(pair.status(&read(1, 0, 1), &[]), Status::SEQUENCE.dnr());
    assert_eq!(pair.status(&Sqe::property_get(1, 0, true), &[]), Status::SEQUENCE.dnr());
    assert_eq!(pair.status(&Sqe::connect(1, 0, 32, 0).with_data(0, true), &[]), Status::SGL_LENGTH.dnr());
    assert_eq!(
        pair.status(&Sqe::connect(1, 0, 32, 0).with_data(512, true), &[0; 512]),
        Status::SGL_LENGTH.dnr()
    );
    pair.connect(0, true);
}

#[test]
fn an_id_in_use_is_refused_and_its_command_stays() {
    let mut pair = Pair::connected(0);
    assert_eq!(pair.command(&read(1, 0, 1), &[]).map(|events| events.len()), Ok(1));
    assert_eq!(pair.status(&read(1, 8, 1), &[]), Status::ID_CONFLICT.dnr());
    assert_eq!(pair.session.open(), 1);
    for cid in 2..=32 {
        assert_eq!(pair.command(&read(cid, 0, 1), &[]).map(|events| events.len()), Ok(1));
    }
    let mut bytes = Vec::new();
    pair.host.command(&read(33, 0, 1), &[], &mut bytes);
    assert_eq!(pair.terminated(&bytes), (fes::SEQUENCE, 0), "the queue has 32 entries");
}

/// A session with a write of 1,024 bytes, all of it asked for.
fn asked() -> (Pair, super::pdu::Data) {
    let mut pair = Pair::connected(0);
    assert_eq!(pair.command(&write(3, 0, 2), &[]).map(|events| events.len()), Ok(1));
    assert!(pair.session.ask(3, 77, 0, 1024, &mut pair.out).is_some());
    match pair.answer() {
        HostEvent::R2t(r2t) => (pair, r2t),
        other => panic!("{other:?}"),
    }
}

#[test]
fn data_unlike_what_was_asked_for_ends_the_connection() {
    type Change = fn(super::pdu::Data) -> super::pdu::Data;
    use super::pdu::Data;
    let cases: Vec<(&str, Change, u8, (u16, u32))> = vec![
        ("tag 0", |d| Data { ttag: 0, ..d }, flag::LAST, (1, 10)),
        ("unknown tag", |d| Data { ttag: d.ttag + 1, ..d }, flag::LAST, (1, 10)),
        ("older tag", |d| Data { ttag: d.ttag - 0x100, ..d }, flag::LAST, (1, 10)),
        ("highest tag", |d| Data { ttag: u16::MAX, ..d }, flag::LAST, (1, 10)),
        ("wrong command", |d| Data { cid: 4, ..d }, flag::LAST, (1, 8)),
        ("out of order", |d| Data { offset: 512, length: 512, ..d }, flag::LAST, (2, 0)),
        ("offset wraps", |d| Data { offset: u32::MAX - 511, length: 512, ..d }, flag::LAST, (2, 0)),
        ("beyond the R2T", |d| Data { length: 1028, ..d }, flag::LAST, (4, 0)),
        ("no data", |d| Data { length: 0, ..d }, 0, (1, 16)),
        ("LAST missing", |d| d, 0, (1, 1)),
        ("LAST early", |d| Data { length: 512, ..d }, flag::LAST, (1, 1)),
    ];
    for (name, change, flags, expected) in cases {
        let (pair, r2t) = asked();
        let fields = change(r2t);
        let mut bytes = Vec::new();
        pdu::data(kind::H2C_DATA, flags, fields, Digests::default(), 4, &mut bytes);
        bytes.resize(bytes.len() + fields.length as usize, 0);
        assert_eq!(pair.terminated(&bytes), expected, "{name}");
    }
    let (pair, r2t) = asked();
    let mut bytes = Vec::new();
    pdu::data(kind::H2C_DATA, flag::LAST, r2t, Digests::default(), 4, &mut bytes);
    let unlike = changed(bytes, 16, &1020u32.to_le_bytes());
    assert_eq!(pair.terminated(&unlike), (1, 16), "length unlike the PDU's");
}

#[test]
fn a_finished_transfer_takes_no_more_data() {
    let (mut pair, r2t) = asked();
    let mut bytes = Vec::new();
    pair.host.h2c_data(r2t, &[5; 1024], 512, &mut bytes);
    let events = pair.feed(&bytes).expect("in order");
    let last = Event::Data { place: 0, tag: 77, offset: 512, length: 512, last: true };
    assert_eq!(events[2], last);
    assert!(pair.session.ask(3, 78, 0, 512, &mut pair.out).is_some(), "its place is free again");
    pair.answer();
    assert_eq!(pair.terminated(&bytes), (fes::HEADER_FIELD, 10));
}

#[test]
fn a_data_digest_that_does_not_fit_is_told_to_the_caller_and_nothing_else_suffers() {
    let mut pair = Pair::connected(2);
    let mut bytes = Vec::new();
    pair.host.command(&write(1, 0, 1).with_data(512, true), &[9; 512], &mut bytes);
    let end = bytes.len();
    bytes[end - 1] ^= 1;
    let events = pair.feed(&bytes).expect("the stream is in step");
    assert_eq!(events[1], Event::PayloadEnd { intact: false });
    bytes[end - 1] ^= 1;
    put(&mut bytes, 10, &2u16.to_le_bytes());
    let events = pair.feed(&bytes).expect("the stream is in step");
    assert_eq!(events[1], Event::PayloadEnd { intact: true });
}

#[test]
fn a_host_that_gives_up_gets_no_answer() {
    let mut pair = Pair::connected(1);
    let mut bytes = Vec::new();
    pdu::terminate(kind::H2C_TERM, Fatal { fes: 3, info: 0, what: "" }, &[0; 24], &mut bytes);
    assert_eq!(pair.feed(&bytes), Err(Violation::Terminated(3)));
    assert!(pair.out.is_empty());
    let too_long = changed(bytes, 4, &153u32.to_le_bytes());
    assert_eq!(Pair::connected(0).terminated(&too_long), (fes::HEADER_FIELD, 4));
}

#[test]
fn success_is_told_by_the_data_only_where_flow_control_is_off() {
    for disabled in [false, true] {
        let mut pair = Pair::ready(3);
        let mut sqe = Sqe::connect(9, 1, 32, 0);
        sqe.0[46] = if disabled { 4 } else { 0 };
        pair.command(&sqe, &connect_data([1; 16], 1, "nqn.a", "nqn.b")).expect("in order");
        pair.session.connecting();
        pair.session.connected(&sqe, false, Some(NAMESPACE), 5, &mut pair.out);
        assert!(matches!(pair.answer(), HostEvent::Response(cqe) if (cqe.sqhd == u16::MAX) == disabled));
        pair.command(&read(1, 0, 1), &[]).expect("in order");
        assert_eq!(pair.session.begin_data(1, 0, 512, true, true, &mut pair.out), disabled);
        pair.out.extend_from_slice(&[6; 512]);
        pair.session.end_data(crc32c::crc32c(&[6; 512]), &mut pair.out);
        let data = HostEvent::Data { cid: 1, offset: 0, data: vec![6; 512], last: true, success: disabled };
        assert_eq!(pair.answer(), data);
        assert_eq!(pair.session.open(), usize::from(!disabled));
    }
}

#[test]
fn what_comes_byte_by_byte_means_the_same() {
    for digests in 0..4 {
        let mut whole = Pair::connected(digests);
        let mut drip = Pair::connected(digests);
        let mut bytes = Vec::new();
        whole.host.command(&read(1, 3, 5), &[], &mut bytes);
        whole.host.command(&read(2, 3, 5).with(1, 9), &[], &mut bytes);
        whole.host.command(&Sqe::new(io::FLUSH, 3, NSID_ALL), &[], &mut bytes);
        let expected = whole.feed(&bytes).expect("valid");
        assert_eq!(expected.len(), 2);
        let (mut events, mut from) = (Vec::new(), 0);
        for to in 1..=bytes.len() {
            let progress = drip.session.feed(&bytes[from..to], &mut drip.out).expect("valid");
            from += progress.used;
            events.extend(progress.event);
        }
        assert_eq!(events, expected);
        assert_eq!(drip.out, whole.out);
    }
}

proptest! {
    #[test]
    fn garbage_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600), at in 0usize..128, value: u8) {
        for mut pair in [Pair::new(), Pair::ready(0), Pair::connected(3)] {
            let _ = survive(&mut pair.session, &bytes);
        }
        // A valid PDU with one byte changed.
        let mut pair = Pair::connected(0);
        let mut bytes = Vec::new();
        pair.host.command(&write(1, 0, 1).with_data(512, true), &[1; 512], &mut bytes);
        bytes[at] = value;
        let _ = survive(&mut pair.session, &bytes);
    }
}

/// Feeds whatever; takes as much payload as there is.
fn survive(session: &mut Session, mut bytes: &[u8]) -> Result<(), Violation> {
    let mut out = Vec::new();
    loop {
        let progress = session.feed(bytes, &mut out)?;
        assert!(progress.used <= bytes.len() && out.len() < 4096);
        bytes = &bytes[progress.used..];
        match progress.event {
            Some(Event::Command { out_bytes, inline: true, .. }) => {
                if bytes.len() < out_bytes as usize {
                    return Ok(());
                }
                bytes = &bytes[out_bytes as usize..];
                session.payload_taken(None);
            }
            None if progress.used == 0 => return Ok(()),
            _ => {}
        }
    }
}
