//! A server loop over a real ring on this thread, hostile and honest hosts on another.

mod conformance;

use super::*;
use crate::rig::{self, Random, Temper, parts};
use protocol::nvme_tcp::command::NSID;
use protocol::nvme_tcp::controller::{Controllers, Out, View, Volume};
use protocol::nvme_tcp::host::{CC_ENABLE, Host as Codec, HostEvent, connect_data};
use protocol::nvme_tcp::identify::nqn;
use protocol::nvme_tcp::pdu::{Cqe, Digests};
use protocol::nvme_tcp::wire::{admin, fes, io, property};
use protocol::types::{BLOCK_BYTES, ENTRY_BYTES_MAX, VolumeId};
use reactor::Addr;
use reactor::ring::Ring;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

const VOLUME_BYTES: usize = 32 << 20;
const LBA: usize = 512;
/// What headers of answers add to their data, which alone is charged beforehand.
const HEADERS: usize = 4096;

type Seen = rig::Seen<NvmeCloseReason>;

/// How the server behaves.
#[derive(Clone, Copy)]
struct Manner {
    limits: NvmeLimits,
    temper: Temper,
    /// Pieces that hold this byte fail.
    bad: Option<u64>,
}

impl Default for Manner {
    fn default() -> Self {
        let limits = NvmeLimits { linger: Span::ms(300), ..NvmeLimits::default() };
        Self { limits, temper: Temper::default(), bad: None }
    }
}

impl Manner {
    /// Answers are given late and in any order.
    fn shuffled() -> Self {
        Self { temper: Temper { shuffle: Some(1), ..Temper::default() }, ..Self::default() }
    }
}

/// A subsystem with a volume in memory.
struct Model {
    controllers: Controllers,
    volume: Vec<u8>,
    bad: Option<u64>,
}

impl rig::Answers<NvmeConn> for Model {
    fn answer(
        &mut self,
        ring: &mut Ring,
        conns: &mut Slab<NvmeConn>,
        index: usize,
        event: NvmeEvent,
    ) -> Option<NvmeEvent> {
        let now = ring.now();
        let conn = conns.get_mut(index)?;
        let hit =
            |offset: u64, length: u64| self.bad.is_some_and(|at| (offset..offset + length).contains(&at));
        match event {
            NvmeEvent::Connect { sqe, data } => {
                conn.connect_done(&sqe, self.controllers.connect(index, &sqe, &data, now));
            }
            NvmeEvent::Admin { sqe, data } => {
                conn.admin_done(sqe.cid(), self.controllers.admin(index, &sqe, &data, now));
            }
            NvmeEvent::Read { req, offset, length } if hit(offset, length.into()) => {
                conn.read_done(req, offset, Err(Status::UNRECOVERED_READ));
            }
            NvmeEvent::Read { req, offset, length } => {
                let last = offset + u64::from(length) - 1;
                assert_eq!(offset / ENTRY_BYTES_MAX as u64, last / ENTRY_BYTES_MAX as u64);
                let volume = &self.volume;
                let empty =
                    |block: usize| volume[block * BLOCK_BYTES..][..BLOCK_BYTES].iter().all(|byte| *byte == 0);
                match parts(volume, empty, ring.arena(), offset, length) {
                    Some(parts) => conn.read_done(req, offset, Ok(parts)),
                    None => return Some(NvmeEvent::Read { req, offset, length }),
                }
            }
            NvmeEvent::WritePiece { req, offset, length, .. } if hit(offset, length.into()) => {
                conn.write_piece_done(req, offset, Err(Status::CAPACITY));
            }
            NvmeEvent::WritePiece { req, offset, length, buf, crc } => {
                let (from, bytes, lead) = (offset as usize, length as usize, offset as usize % BLOCK_BYTES);
                assert!(from / ENTRY_BYTES_MAX == (from + bytes - 1) / ENTRY_BYTES_MAX);
                let data = &buf[lead..lead + bytes];
                let fits = crc.is_none_or(|crc| crc == crc32c::crc32c(data));
                assert!(fits, "a digest is passed on only if it fits");
                self.volume[from..from + bytes].copy_from_slice(data);
                conn.write_piece_done(req, offset, Ok(()));
            }
            NvmeEvent::Zero { req, offset, length, .. } if hit(offset, length) => {
                conn.zero_done(req, Err(Status::CAPACITY));
            }
            NvmeEvent::Zero { req, offset, length, .. } => {
                self.volume[offset as usize..(offset + length) as usize].fill(0);
                conn.zero_done(req, Ok(()));
            }
            NvmeEvent::Flush { req } => conn.flush_done(req, Ok(())),
            NvmeEvent::Closed { .. } => unreachable!("no question"),
        }
        None
    }
    fn settle(&mut self, ring: &mut Ring, conns: &mut Slab<NvmeConn>, events: &mut Vec<(usize, NvmeEvent)>) {
        self.controllers.tick(ring.now());
        while let Some(out) = self.controllers.poll() {
            let index = out.queue();
            let Some(conn) = conns.get_mut(index) else { continue };
            match out {
                Out::Close { .. } => {
                    let mut mine = Vec::new();
                    conn.close(ring, &mut mine);
                    events.extend(mine.into_iter().map(|event| (index, event)));
                }
                Out::Complete { cid, status, result, .. } => {
                    conn.admin_done(cid, Answer::Done { status, result, data: Vec::new() });
                }
                Out::Namespace { namespace, .. } => conn.set_namespace(namespace),
            }
        }
    }
    fn closed(&mut self, index: usize) {
        self.controllers.closed(index);
    }
}

fn subsystem() -> String {
    nqn(&[5; 16], "vol0")
}

/// Serves a subsystem while `hosts` runs, then until every connection is gone.
fn serve(manner: Manner, hosts: impl FnOnce(SocketAddr) + Send + 'static) -> Seen {
    let mut controllers = Controllers::new();
    let namespace = Namespace { volume: VolumeId(1), bytes: VOLUME_BYTES as u64, block_bytes: LBA as u32 };
    let volumes = vec![Volume {
        name: "vol0".into(),
        namespace,
        allowed_hosts: Default::default(),
        session: Default::default(),
    }];
    controllers.set_view(View { cluster: [5; 16], generation: 1, target: 1, volumes, ..View::default() });
    let model = Model { controllers, volume: vec![0; VOLUME_BYTES], bad: manner.bad };
    let (seen, model) = rig::serve(manner.temper, manner.limits, model, |addr| match addr {
        Addr::Tcp(addr) => hosts(addr),
        Addr::Unix(path) => panic!("TCP was asked for, not {}", path.display()),
    });
    assert!(model.controllers.is_empty(), "no controller is left");
    seen
}

/// A host's queue.
struct Queue {
    wire: TcpStream,
    codec: Codec,
    input: Vec<u8>,
}

impl Queue {
    fn open(addr: SocketAddr, digests: u8, align: u8, r2t_max: u32) -> Self {
        let wire = TcpStream::connect(addr).unwrap();
        wire.set_nodelay(true).unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut queue = Self { wire, codec: Codec::default(), input: Vec::new() };
        let mut out = Vec::new();
        queue.codec.ic_req(Digests::from_bits(digests), align, r2t_max, &mut out);
        queue.wire.write_all(&out).unwrap();
        assert!(matches!(queue.event(), HostEvent::Ready(_)));
        queue
    }
    fn event(&mut self) -> HostEvent {
        loop {
            if let Some((used, event)) = self.codec.feed(&self.input).unwrap() {
                self.input.drain(..used);
                return event;
            }
            let mut some = vec![0; 1 << 16];
            let bytes = self.wire.read(&mut some).unwrap();
            assert!(bytes > 0, "closed");
            self.input.extend_from_slice(&some[..bytes]);
        }
    }
    fn send(&mut self, sqe: &Sqe, inline: &[u8]) {
        let mut out = Vec::new();
        self.codec.command(sqe, inline, &mut out);
        self.wire.write_all(&out).unwrap();
    }
    /// One command to its end: its completion, and its data. `out` is sent as it is asked for.
    fn run(&mut self, sqe: &Sqe, inline: &[u8], out: &[u8], most: u32) -> (Cqe, Vec<u8>) {
        self.send(sqe, inline);
        let mut data = Vec::new();
        loop {
            match self.event() {
                HostEvent::Response(cqe) => return (cqe, data),
                HostEvent::Data { offset, data: more, success, cid, .. } => {
                    assert_eq!(offset as usize, data.len(), "data comes in order");
                    data.extend(more);
                    if success {
                        return (Cqe { result: 0, sqhd: 0, cid, status: Status::SUCCESS }, data);
                    }
                }
                HostEvent::R2t(r2t) => {
                    let (from, to) = (r2t.offset as usize, (r2t.offset + r2t.length) as usize);
                    let mut bytes = Vec::new();
                    self.codec.h2c_data(r2t, &out[from..to], most, &mut bytes);
                    self.wire.write_all(&bytes).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    }
    fn ok(&mut self, sqe: &Sqe) -> (u64, Vec<u8>) {
        let (cqe, data) = self.run(sqe, &[], &[], u32::MAX);
        assert_eq!(cqe.status, Status::SUCCESS, "{sqe:?}");
        (cqe.result, data)
    }
    fn connect(&mut self, qid: u16, cntlid: u16, flow_control: bool) -> u16 {
        let mut sqe = Sqe::connect(0, qid, 128, 0);
        sqe.0[46] = if flow_control { 0 } else { 4 };
        let data = connect_data([3; 16], cntlid, &subsystem(), "nqn.host");
        let (cqe, _) = self.run(&sqe, &data, &[], u32::MAX);
        assert_eq!(cqe.status, Status::SUCCESS);
        cqe.result as u16
    }
}

/// An enabled controller's admin queue, and one IO queue.
fn attach(addr: SocketAddr, digests: u8, align: u8, r2t_max: u32, flow: bool) -> (Queue, Queue) {
    let mut admin = Queue::open(addr, digests, align, r2t_max);
    let id = admin.connect(0, u16::MAX, flow);
    admin.ok(&Sqe::property_set(1, property::CC, CC_ENABLE));
    let mut io = Queue::open(addr, digests, align, r2t_max);
    io.connect(1, id, flow);
    (admin, io)
}

fn command(opcode: u8, offset: usize, bytes: usize, inline: bool) -> Sqe {
    let sqe = Sqe::new(opcode, 7, NSID).with_range((offset / LBA) as u64, (bytes / LBA) as u32);
    let has_data = matches!(opcode, io::READ | io::WRITE | io::COMPARE);
    sqe.with_data(if has_data { bytes as u32 } else { 0 }, inline && opcode != io::READ)
}

/// Random commands against a model.
fn exercise(queue: &mut Queue, random: &mut Random, count: u32, model: &mut [u8]) {
    for round in 0..count {
        let magnitude = random.below(12);
        let bytes = (1 + random.below(1 << magnitude) as usize).min(2048) * LBA;
        let offset = random.below(((VOLUME_BYTES - bytes) / LBA) as u64) as usize * LBA;
        let range = offset..offset + bytes;
        let data: Vec<u8> =
            (0..bytes).map(|at| (at as u32).wrapping_mul(round | 1) as u8 ^ round as u8).collect();
        let inline = bytes <= 16 << 10 && random.below(2) == 0;
        let most = 4 << random.below(19);
        let carried = if inline { &data[..] } else { &[] };
        match random.below(8) {
            0..3 => {
                let (cqe, _) = queue.run(&command(io::WRITE, offset, bytes, inline), carried, &data, most);
                assert_eq!(cqe.status, Status::SUCCESS);
                model[range].copy_from_slice(&data);
            }
            3..6 => {
                let (_, read) = queue.ok(&command(io::READ, offset, bytes, false));
                assert!(read == model[range], "read of {bytes} at {offset}");
            }
            6 => {
                let (cqe, _) = queue.run(&command(io::COMPARE, offset, bytes, inline), carried, &data, most);
                let equal = model[range] == data;
                assert_eq!(cqe.status.code(), if equal { 0 } else { Status::COMPARE_FAILURE.0 });
                let own = model[offset..offset + bytes].to_vec();
                let carried = if inline { &own[..] } else { &[] };
                let (cqe, _) = queue.run(&command(io::COMPARE, offset, bytes, inline), carried, &own, most);
                assert_eq!(cqe.status, Status::SUCCESS);
            }
            _ => {
                queue.ok(&command(io::WRITE_ZEROES, offset, bytes, false));
                model[range].fill(0);
                queue.ok(&command(io::VERIFY, offset, bytes, false));
                queue.ok(&Sqe::new(io::FLUSH, 1, NSID));
            }
        }
    }
}

#[test]
fn what_is_written_is_read_with_every_digest_alignment_and_number_of_r2ts() {
    for (digests, align, r2t_max, flow) in
        [(0, 0, 0, true), (1, 0, 3, false), (2, 31, 0, true), (3, 7, 1, false)]
    {
        let manner = if align > 0 { Manner::shuffled() } else { Manner::default() };
        let seen = serve(manner, move |addr| {
            let (_admin, mut io) = attach(addr, digests, align, r2t_max, flow);
            exercise(&mut io, &mut Random(digests.into()), 250, &mut vec![0; VOLUME_BYTES]);
        });
        assert!(seen.closed.iter().all(|reason| *reason == NvmeCloseReason::Vanished), "{seen:?}");
    }
}

#[test]
fn a_small_budget_and_a_small_arena_slow_a_host_down_and_no_more() {
    let limits = NvmeLimits { bytes_max: 300 << 10, ..Manner::default().limits };
    let temper = Temper { arena_bytes: 1 << 20, shuffle: Some(1), ..Temper::default() };
    let manner = Manner { limits, temper, ..Manner::default() };
    let seen = serve(manner, move |addr| {
        let (_admin, mut io) = attach(addr, 2, 0, 3, true);
        exercise(&mut io, &mut Random(9), 150, &mut vec![0; VOLUME_BYTES]);
    });
    assert!(seen.bytes_max <= (300 << 10) + HEADERS, "{seen:?}");
}

#[test]
fn a_flood_of_writes_is_held_within_the_budget_and_all_of_it_ends() {
    let limits = NvmeLimits { bytes_max: 1 << 20, ..Manner::default().limits };
    let manner =
        Manner { limits, temper: Temper { hold_turns: 200, ..Temper::default() }, ..Manner::default() };
    let seen = serve(manner, move |addr| {
        let (_admin, mut io) = attach(addr, 0, 0, 3, true);
        let mut out = Vec::new();
        for cid in 0..120u16 {
            let inline = cid % 3 == 0;
            let bytes = if inline { 16 << 10 } else { 256 << 10 };
            let sqe = command(io::WRITE, usize::from(cid) * (256 << 10), bytes, inline);
            let mut sqe = sqe;
            sqe.0[2..4].copy_from_slice(&cid.to_le_bytes());
            io.codec.command(&sqe, &vec![1; if inline { bytes } else { 0 }], &mut out);
        }
        let mut wire = io.wire.try_clone().unwrap();
        let sender = std::thread::spawn(move || wire.write_all(&out).unwrap());
        let mut answered = 0;
        while answered < 120 {
            match io.event() {
                HostEvent::Response(cqe) => {
                    assert_eq!(cqe.status, Status::SUCCESS);
                    answered += 1;
                }
                HostEvent::R2t(r2t) => {
                    let mut bytes = Vec::new();
                    io.codec.h2c_data(r2t, &vec![2; r2t.length as usize], 65536, &mut bytes);
                    // The commands go first, whole.
                    if !sender.is_finished() {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    io.wire.write_all(&bytes).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        sender.join().unwrap();
    });
    assert!(seen.bytes_max <= 1 << 20, "{seen:?}");
}

#[test]
fn a_piece_that_fails_fails_its_command_and_the_next_one_works() {
    for digests in [0, 2] {
        let manner = Manner { bad: Some(1 << 20), ..Manner::shuffled() };
        serve(manner, move |addr| {
            let (_admin, mut io) = attach(addr, digests, 0, 1, false);
            let data = vec![4; 1 << 20];
            let at = (1 << 20) - (300 << 10);
            for _ in 0..3 {
                let (cqe, _) = io.run(&command(io::READ, at, 1 << 20, false), &[], &[], 0);
                assert_eq!(cqe.status, Status::UNRECOVERED_READ);
                let (cqe, _) = io.run(&command(io::WRITE, at, 1 << 20, false), &[], &data, 1 << 17);
                assert_eq!(cqe.status, Status::CAPACITY);
                let (cqe, _) = io.run(&command(io::VERIFY, at, 1 << 20, false), &[], &[], 0);
                assert_eq!(cqe.status, Status::UNRECOVERED_READ);
                let (cqe, _) = io.run(&command(io::WRITE, 0, 4096, true), &data[..4096], &[], 0);
                assert_eq!(cqe.status, Status::SUCCESS);
            }
        });
    }
}

#[test]
fn ranges_are_deallocated_all_or_none_however_they_are_sent() {
    serve(Manner::default(), |addr| {
        let (_admin, mut io) = attach(addr, 3, 0, 0, true);
        let data = vec![4; 64 << 10];
        let (cqe, _) = io.run(&command(io::WRITE, 0, 64 << 10, false), &[], &data, 1 << 17);
        assert_eq!(cqe.status, Status::SUCCESS);
        let mut list = vec![0; 4096];
        let mut range = |at: usize, slba: u64, blocks: u32| {
            list[at * 16 + 4..at * 16 + 8].copy_from_slice(&blocks.to_le_bytes());
            list[at * 16 + 8..at * 16 + 16].copy_from_slice(&slba.to_le_bytes());
            list.clone()
        };
        range(0, 8, 16);
        let good = range(1, 64, 8);
        let bad = range(2, (VOLUME_BYTES / LBA) as u64, 1);
        let dsm = |count: u32, inline| {
            Sqe::new(io::DSM, 3, NSID).with(10, count - 1).with(11, 4).with_data(4096, inline)
        };
        assert_eq!(io.run(&dsm(3, true), &bad, &[], 0).0.status, Status::LBA_RANGE.dnr());
        assert_eq!(io.ok(&command(io::READ, 0, 64 << 10, false)).1, data, "none");
        assert_eq!(io.run(&dsm(2, false), &[], &good, 1000).0.status, Status::SUCCESS);
        let read = io.ok(&command(io::READ, 0, 64 << 10, false)).1;
        let zeroed: Vec<usize> = (0..128).filter(|lba| read[lba * LBA] == 0).collect();
        assert_eq!(zeroed, (8..24).chain(64..72).collect::<Vec<_>>());
        assert_eq!(io.run(&dsm(2, true).with(11, 1), &good, &[], 0).0.status, Status::SUCCESS, "hints");
        for most in [4096, 1000, 4] {
            let hints = dsm(2, false).with(11, 1);
            assert_eq!(
                io.run(&hints, &[], &good, most).0.status,
                Status::SUCCESS,
                "hints, {most} bytes a PDU"
            );
        }
        assert_eq!(io.ok(&command(io::READ, 0, 64 << 10, false)).1, read);
    });
}

#[test]
fn many_ranges_are_deallocated_a_few_at_a_time_and_one_that_fails_ends_its_command() {
    let manner = Manner { bad: Some(4 << 20), ..Manner::shuffled() };
    let seen = serve(manner, |addr| {
        let (_admin, mut io) = attach(addr, 0, 0, 0, false);
        let list = |first: u64| -> Vec<u8> {
            let range = |nth: u64| {
                [[0; 4], 1u32.to_le_bytes()].concat().into_iter().chain((first + nth).to_le_bytes())
            };
            (0..256).flat_map(range).collect()
        };
        let mut out = Vec::new();
        let commands = 40;
        for cid in 0..commands {
            let mut sqe = Sqe::new(io::DSM, 3, NSID).with(10, 255).with(11, 4).with_data(4096, true);
            sqe.0[2..4].copy_from_slice(&u16::to_le_bytes(cid));
            // The last one has the block that fails.
            let first = if cid + 1 < commands { u64::from(cid) * 200 } else { (4 << 20) / LBA as u64 - 100 };
            io.codec.command(&sqe, &list(first), &mut out);
        }
        io.wire.write_all(&out).unwrap();
        for _ in 0..commands {
            let HostEvent::Response(cqe) = io.event() else { panic!("no data is asked for") };
            let failed = cqe.cid + 1 == commands;
            assert_eq!(cqe.status, if failed { Status::CAPACITY } else { Status::SUCCESS }, "{}", cqe.cid);
        }
    });
    assert!(seen.pending_max <= ZEROES_MAX, "{seen:?}");
}

#[test]
fn long_answers_to_many_admin_commands_are_made_as_the_host_takes_them() {
    let limits = NvmeLimits { bytes_max: 2 << 20, ..Manner::default().limits };
    let seen = serve(Manner { limits, ..Manner::default() }, |addr| {
        let (mut admin, _io) = attach(addr, 0, 0, 0, false);
        let most = 1 << 20;
        let mut out = Vec::new();
        for cid in 0..100u16 {
            let dwords = most / 4 - 1;
            let sqe =
                Sqe::new(admin::GET_LOG_PAGE, cid, 0).with(10, (dwords << 16) | 2).with(11, dwords >> 16);
            admin.codec.command(&sqe.with_data(most, false), &[], &mut out);
        }
        admin.wire.write_all(&out).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let mut bytes = 0;
        while bytes < 100 * most as usize {
            if let HostEvent::Data { data, .. } = admin.event() {
                bytes += data.len();
            }
        }
    });
    assert!(seen.bytes_max <= (3 << 20) + HEADERS, "{seen:?}");
}

#[test]
fn a_damaged_write_is_not_written_and_can_be_tried_again() {
    serve(Manner::default(), |addr| {
        let (_admin, mut io) = attach(addr, 2, 0, 0, true);
        for inline in [true, false] {
            let sqe = command(io::WRITE, 4096, 4096, inline);
            let mut bytes = Vec::new();
            io.codec.command(&sqe, if inline { &[8; 4096] } else { &[] }, &mut bytes);
            if !inline {
                io.wire.write_all(&bytes).unwrap();
                let HostEvent::R2t(r2t) = io.event() else { panic!("data is asked for") };
                bytes.clear();
                io.codec.h2c_data(r2t, &[8; 4096], u32::MAX, &mut bytes);
            }
            let end = bytes.len();
            bytes[end - 100] ^= 1;
            io.wire.write_all(&bytes).unwrap();
            let event = io.event();
            assert!(matches!(event, HostEvent::Response(cqe) if cqe.status == Status::TRANSIENT_TRANSPORT));
            assert_eq!(io.ok(&command(io::READ, 4096, 4096, false)).1, [0; 4096]);
        }
        let (cqe, _) = io.run(&command(io::WRITE, 4096, 4096, true), &[8; 4096], &[], 0);
        assert_eq!(cqe.status, Status::SUCCESS);
    });
}

#[test]
fn a_host_that_breaks_the_protocol_is_told_so_and_the_others_go_on() {
    let seen = serve(Manner::default(), |addr| {
        let (_admin, mut good) = attach(addr, 0, 0, 0, true);
        for _ in 0..20 {
            let (_admin, mut bad) = attach(addr, 0, 0, 0, true);
            bad.wire.write_all(&[0xff; 24]).unwrap();
            bad.wire.write_all(&vec![0; 100_000]).unwrap();
            let event = bad.event();
            assert_eq!(event, HostEvent::Terminated { fes: fes::HEADER_FIELD, info: 0 });
            bad.wire.shutdown(Shutdown::Write).unwrap();
            good.ok(&command(io::READ, 0, 4096, false));
        }
    });
    let broken = |reason: &&NvmeCloseReason| matches!(reason, NvmeCloseReason::Violation(_));
    assert_eq!(seen.closed.iter().filter(broken).count(), 20);
}

#[test]
fn a_host_that_closes_its_side_is_gone_with_all_that_it_asked_for() {
    let seen = serve(
        Manner { temper: Temper { hold_turns: 50, ..Temper::default() }, ..Manner::default() },
        |addr| {
            let (_admin, mut io) = attach(addr, 0, 0, 0, true);
            io.send(&command(io::WRITE, 0, 4096, true), &[8; 4096]);
            io.wire.shutdown(Shutdown::Write).unwrap();
            assert_eq!(
                io.wire.read(&mut [0; 100]).unwrap_or(0),
                0,
                "no answer, since the write may be on another path by now"
            );
        },
    );
    assert_eq!(seen.closed, [NvmeCloseReason::Vanished, NvmeCloseReason::Vanished]);
}

#[test]
fn a_host_that_stalls_in_the_middle_of_its_data_or_before_it_connects_is_cut() {
    let limits = NvmeLimits { stall: Span::ms(200), setup: Span::ms(400), ..Manner::default().limits };
    let seen = serve(Manner { limits, ..Manner::default() }, |addr| {
        let (_admin, mut io) = attach(addr, 0, 0, 0, true);
        let mut bytes = Vec::new();
        io.codec.command(&command(io::WRITE, 0, 8192, true), &[8; 8192], &mut bytes);
        io.wire.write_all(&bytes[..5000]).unwrap();
        let mut silent = Queue::open(addr, 0, 0, 0);
        assert_eq!(io.wire.read(&mut [0; 16]).unwrap_or(0), 0, "cut");
        assert_eq!(silent.wire.read(&mut [0; 16]).unwrap_or(0), 0, "cut");
    });
    assert_eq!(seen.closed.iter().filter(|r| **r == NvmeCloseReason::TooSlow).count(), 2, "{seen:?}");
}

#[test]
fn hosts_that_vanish_at_any_byte_leave_nothing_behind() {
    serve(Manner::shuffled(), |addr| {
        let mut bytes = Vec::new();
        let codec = Codec::default();
        codec.ic_req(Digests::default(), 0, 0, &mut bytes);
        let data = connect_data([3; 16], u16::MAX, &subsystem(), "nqn.host");
        codec.command(&Sqe::connect(0, 0, 32, 0), &data, &mut bytes);
        codec.command(&Sqe::property_set(1, property::CC, CC_ENABLE), &[], &mut bytes);
        codec.command(&Sqe::new(admin::ASYNC_EVENT, 2, 0), &[], &mut bytes);
        for end in (0..bytes.len()).step_by(13) {
            let mut wire = TcpStream::connect(addr).unwrap();
            wire.write_all(&bytes[..end]).unwrap();
        }
        let (_admin, mut io) = attach(addr, 0, 0, 0, true);
        for end in (1..72 + 8192).step_by(97) {
            let (_admin, io) = attach(addr, 0, 0, 0, true);
            let mut bytes = Vec::new();
            io.codec.command(&command(io::WRITE, 0, 8192, true), &[8; 8192], &mut bytes);
            (&io.wire).write_all(&bytes[..end]).unwrap();
        }
        io.ok(&command(io::READ, 0, 4096, false));
    });
}
