//! A server loop over a real ring on this thread, hostile and honest clients on another.

use super::*;
use crate::rig::{self, Random, Temper, parts};
use protocol::nbd::client::{self, Reply};
use protocol::nbd::wire::*;
use protocol::types::ENTRY_BYTES_MAX;
use reactor::Addr;
use reactor::ring::Ring;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const BLOCK: usize = BLOCK_BYTES;
const VOLUME_BYTES: usize = 64 << 20;

type Seen = rig::Seen<NbdCloseReason>;

/// How the server behaves.
#[derive(Clone, Copy)]
struct Manner {
    block_bytes: u32,
    limits: NbdLimits,
    temper: Temper,
    /// Pieces that hold this byte fail.
    bad_read: Option<u64>,
    bad_write: Option<u64>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            block_bytes: 4096,
            limits: NbdLimits::default(),
            temper: Temper::default(),
            bad_read: None,
            bad_write: None,
        }
    }
}

/// A volume in memory.
struct Model {
    manner: Manner,
    volume: Vec<u8>,
    /// Blocks that were written.
    present: Vec<bool>,
}

impl rig::Answers<NbdConn> for Model {
    fn answer(
        &mut self,
        ring: &mut Ring,
        conns: &mut Slab<NbdConn>,
        index: usize,
        event: NbdEvent,
    ) -> Option<NbdEvent> {
        // What needs no answer may come when the connection is gone.
        if let NbdEvent::Attached(info) = event {
            assert_eq!(info.id, 7);
            return None;
        }
        let conn = &mut conns[index];
        let hit = |bad: Option<u64>, offset: u64, length: u32| {
            bad.is_some_and(|at| (offset..offset + u64::from(length)).contains(&at))
        };
        match event {
            NbdEvent::OpenExport { name } => conn.answer_export(export(&name, self.manner.block_bytes)),
            NbdEvent::ListExports => conn.answer_list(&[("vol0".into(), String::new())]),
            NbdEvent::Read { req, offset, length } if hit(self.manner.bad_read, offset, length) => {
                conn.read_done(req, offset, Err(NbdError::Io));
            }
            NbdEvent::Read { req, offset, length } => {
                let empty = |block: usize| !self.present[block];
                match parts(&self.volume, empty, ring.arena(), offset, length) {
                    Some(parts) => conn.read_done(req, offset, Ok(parts)),
                    None => return Some(NbdEvent::Read { req, offset, length }),
                }
            }
            NbdEvent::WritePiece { req, offset, length, .. }
                if hit(self.manner.bad_write, offset, length) =>
            {
                conn.write_piece_done(req, offset, Err(NbdError::NoSpace));
            }
            NbdEvent::WritePiece { req, offset, length, buf, .. } => {
                let (from, bytes, lead) = (offset as usize, length as usize, offset as usize % BLOCK);
                assert!(from / ENTRY_BYTES_MAX == (from + bytes - 1) / ENTRY_BYTES_MAX);
                self.volume[from..from + bytes].copy_from_slice(&buf[lead..lead + bytes]);
                self.present[from / BLOCK..(from + bytes).div_ceil(BLOCK)].fill(true);
                conn.write_piece_done(req, offset, Ok(()));
            }
            NbdEvent::Zero { req, offset, length, .. } => {
                let (from, bytes) = (offset as usize, length as usize);
                self.volume[from..from + bytes].fill(0);
                let whole = from.div_ceil(BLOCK)..((from + bytes) / BLOCK).max(from.div_ceil(BLOCK));
                self.present[whole].fill(false);
                conn.zero_done(req, Ok(()));
            }
            NbdEvent::Status { req, offset, length, .. } => {
                let blocks = offset as usize / BLOCK..(offset as usize + length as usize).div_ceil(BLOCK);
                let runs: Vec<_> = self.present[blocks].iter().map(|data| (BLOCK as u64, *data)).collect();
                conn.status_done(req, Ok(&runs));
            }
            NbdEvent::Flush { req } => conn.flush_done(req, Ok(())),
            NbdEvent::Attached(_) | NbdEvent::Closed { .. } => unreachable!("no question"),
        }
        None
    }
}

/// Serves a volume while `clients` runs, then until every connection is gone.
fn serve(manner: Manner, clients: impl FnOnce(Addr) + Send + 'static) -> Seen {
    let (volume, present) = (vec![0; VOLUME_BYTES], vec![false; VOLUME_BYTES / BLOCK]);
    rig::serve(manner.temper, manner.limits, Model { manner, volume, present }, clients).0
}

fn export(name: &str, block_bytes: u32) -> Result<ExportInfo, protocol::nbd::Refusal> {
    if !matches!(name, "" | "vol0") {
        return Err(protocol::nbd::Refusal::Unknown);
    }
    let (name, bytes) = ("vol0".to_owned(), VOLUME_BYTES as u64);
    Ok(ExportInfo { id: 7, name, description: String::new(), bytes, block_bytes, read_only: false })
}

trait Wire: Read + Write + Send {}
impl Wire for TcpStream {}
impl Wire for UnixStream {}

/// A client that believes nothing.
struct Host {
    wire: Box<dyn Wire>,
    input: Vec<u8>,
    structured: bool,
}

fn connect(addr: &Addr) -> Box<dyn Wire> {
    let limit = Some(Duration::from_secs(30));
    match addr {
        Addr::Tcp(addr) => {
            let wire = TcpStream::connect(addr).unwrap();
            wire.set_nodelay(true).unwrap();
            wire.set_read_timeout(limit).unwrap();
            Box::new(wire)
        }
        Addr::Unix(path) => {
            let wire = UnixStream::connect(path).unwrap();
            wire.set_read_timeout(limit).unwrap();
            Box::new(wire)
        }
    }
}

/// Everything up to the transmission.
fn negotiation(structured: bool) -> Vec<u8> {
    let mut bytes = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
    if structured {
        client::option(opt::STRUCTURED_REPLY, &[], &mut bytes);
        client::meta_option(opt::SET_META_CONTEXT, "vol0", &[BASE_ALLOCATION], &mut bytes);
    }
    client::info_option(opt::GO, "vol0", &[], &mut bytes);
    bytes
}

impl Host {
    fn attach(addr: &Addr, structured: bool) -> Self {
        let mut host = Self { wire: connect(addr), input: Vec::new(), structured };
        host.send(&negotiation(structured));
        host.need(GREETING_BYTES);
        host.input.drain(..GREETING_BYTES);
        loop {
            let Some((used, reply)) = client::option_reply(&host.input).unwrap() else {
                assert!(host.more(), "the server closed");
                continue;
            };
            host.input.drain(..used);
            if reply.option == opt::GO && reply.kind == rep::ACK {
                return host;
            }
        }
    }
    fn send(&mut self, bytes: &[u8]) {
        self.wire.write_all(bytes).unwrap();
    }
    fn more(&mut self) -> bool {
        let mut some = [0; 65536];
        match self.wire.read(&mut some) {
            Ok(0) => false,
            Ok(bytes) => {
                self.input.extend_from_slice(&some[..bytes]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("{error}"),
        }
    }
    fn need(&mut self, bytes: usize) {
        while self.input.len() < bytes {
            assert!(self.more(), "the server closed");
        }
    }
    fn request(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        let mut bytes = Vec::new();
        client::request(kind, flags, cookie, offset, length, &mut bytes);
        self.send(&bytes);
    }
    fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let mut bytes = Vec::new();
        client::request(cmd::WRITE, 0, cookie, offset, data.len() as u32, &mut bytes);
        bytes.extend_from_slice(data);
        self.send(&bytes);
    }
    /// The next reply or chunk; `None` when the server closed.
    fn reply(&mut self) -> Option<Reply> {
        loop {
            if let Some((used, reply)) = client::reply(&self.input).unwrap() {
                self.input.drain(..used);
                return Some(reply);
            }
            if !self.more() {
                return None;
            }
        }
    }
    /// The simple reply or lone error of a request that has no data.
    fn outcome(&mut self) -> (u64, u32) {
        match self.reply().expect("a reply") {
            Reply::Simple { cookie, error } => (cookie, error),
            Reply::Chunk { cookie, kind: chunk::ERROR, done: true, data } => (cookie, number(&data)),
            other => panic!("{other:?}"),
        }
    }
    /// Collects the replies to reads, by cookie = index into `wanted` of (offset, length).
    fn collect(&mut self, wanted: &[(u64, u32)]) -> Vec<Result<Vec<u8>, u32>> {
        let mut got: Vec<Vec<Option<u8>>> = wanted.iter().map(|w| vec![None; w.1 as usize]).collect();
        let mut errors = vec![0; wanted.len()];
        let mut left = wanted.len();
        while left > 0 {
            match self.reply().expect("a reply") {
                Reply::Simple { cookie, error } => {
                    assert!(!self.structured);
                    errors[cookie as usize] = error;
                    if error == 0 {
                        let bytes = wanted[cookie as usize].1 as usize;
                        self.need(bytes);
                        got[cookie as usize] = self.input.drain(..bytes).map(Some).collect();
                    }
                    left -= 1;
                }
                Reply::Chunk { cookie, kind, done, data } => {
                    let (offset, _) = wanted[cookie as usize];
                    match kind {
                        chunk::OFFSET_DATA => {
                            put(&mut got[cookie as usize], start(&data) - offset, data[8..].iter().copied());
                        }
                        chunk::OFFSET_HOLE => {
                            let bytes = u32::from_be_bytes(data[8..12].try_into().unwrap()) as usize;
                            let zeroes = std::iter::repeat_n(0, bytes);
                            put(&mut got[cookie as usize], start(&data) - offset, zeroes);
                        }
                        chunk::NONE => assert!(done),
                        chunk::ERROR | chunk::ERROR_OFFSET => errors[cookie as usize] = number(&data),
                        kind => panic!("chunk of type {kind}"),
                    }
                    left -= usize::from(done);
                }
            }
        }
        let whole = |bytes: Vec<Option<u8>>| bytes.into_iter().map(|b| b.expect("no gaps")).collect();
        let results = got.into_iter().zip(errors);
        results.map(|(bytes, error)| if error == 0 { Ok(whole(bytes)) } else { Err(error) }).collect()
    }
}

fn number(data: &[u8]) -> u32 {
    u32::from_be_bytes(data[..4].try_into().unwrap())
}

fn start(data: &[u8]) -> u64 {
    u64::from_be_bytes(data[..8].try_into().unwrap())
}

fn put(into: &mut [Option<u8>], at: u64, bytes: impl Iterator<Item = u8>) {
    for (at, byte) in (at as usize..).zip(bytes) {
        assert!(into[at].replace(byte).is_none(), "chunks overlap");
    }
}

/// Random writes, zeroes and reads, many at once, against a copy in memory.
fn exercise(addr: &Addr, structured: bool, block: u64, seed: u64, rounds: usize) {
    let mut host = Host::attach(addr, structured);
    let mut model = vec![0u8; 8 << 20];
    let mut random = Random(seed);
    let span = |random: &mut Random, units: u64| {
        let blocks = model_blocks(block);
        let offset = random.below(blocks);
        let length = 1 + random.below(units.min(blocks - offset));
        (offset * block, (length * block) as u32)
    };
    for round in 0..rounds {
        // Ranges that are changed in one round do not overlap.
        let mut changes: Vec<(u64, u32)> = Vec::new();
        for cookie in 0..random.below(8) {
            let (offset, length) = span(&mut random, 1 + (300 << 10) / block);
            if changes.iter().any(|c| offset < c.0 + u64::from(c.1) && c.0 < offset + u64::from(length)) {
                continue;
            }
            changes.push((offset, length));
            let range = offset as usize..offset as usize + length as usize;
            if random.below(4) == 0 {
                model[range].fill(0);
                let kind = if random.below(2) == 0 { cmd::TRIM } else { cmd::WRITE_ZEROES };
                host.request(kind, 0, cookie, offset, length);
            } else {
                let byte = random.next() as u8;
                model[range.clone()].iter_mut().enumerate().for_each(|(i, b)| *b = byte ^ (i / 64) as u8);
                host.write(cookie, offset, &model[range]);
            }
        }
        for _ in &changes {
            assert_eq!(host.outcome().1, 0, "round {round} of seed {seed}");
        }
        let reads: Vec<_> =
            (0..1 + random.below(6)).map(|_| span(&mut random, 1 + (600 << 10) / block)).collect();
        for (cookie, (offset, length)) in reads.iter().enumerate() {
            let df = structured && random.below(3) == 0;
            host.request(cmd::READ, if df { cmd_flag::DF } else { 0 }, cookie as u64, *offset, *length);
        }
        for ((offset, length), got) in reads.iter().zip(host.collect(&reads)) {
            let want = &model[*offset as usize..*offset as usize + *length as usize];
            assert!(got.unwrap() == want, "round {round} of seed {seed} at {offset}+{length}");
        }
    }
    host.request(cmd::DISC, 0, 0, 0, 0);
    assert!(!host.more(), "the server closes after a disconnect");
}

fn model_blocks(block: u64) -> u64 {
    (8 << 20) / block
}

#[test]
fn random_io_matches_a_copy_in_memory() {
    for (structured, block_bytes, unix, backwards) in [
        (true, 4096, false, false),
        (false, 512, true, false),
        (true, 512, true, true),
        (false, 4096, false, true),
    ] {
        let shuffle = Some(u64::from(block_bytes));
        let temper = Temper { unix, backwards, shuffle, ..Temper::default() };
        let manner = Manner { block_bytes, temper, ..Manner::default() };
        let seen = serve(manner, move |addr| exercise(&addr, structured, block_bytes.into(), 42, 60));
        assert_eq!(seen.closed, [NbdCloseReason::Disconnect]);
    }
}

#[test]
fn a_tight_budget_and_a_small_arena_slow_clients_down_but_lose_nothing() {
    let limits =
        NbdLimits { bytes_max: 256 << 10, requests_max: 4, arena_reserve_blocks: 40, ..NbdLimits::default() };
    // Staging takes 16 blocks a client of the 192 there are.
    let temper = Temper { arena_bytes: 768 << 10, shuffle: Some(5), ..Temper::default() };
    let manner = Manner { limits, temper, ..Manner::default() };
    let seen = serve(manner, |addr| {
        let clients: Vec<_> = (0..3)
            .map(|seed| {
                let addr = addr.clone();
                std::thread::spawn(move || exercise_alone(&addr, seed))
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
    assert!(seen.bytes_max <= (256 << 10) + 4096, "{seen:?}");
    assert!(seen.requests_max <= 4);
    assert!(seen.starved > 0, "the arena was meant to run short");
}

/// Writes and reads back a megabyte of its own.
fn exercise_alone(addr: &Addr, seed: u64) {
    let mut host = Host::attach(addr, seed.is_multiple_of(2));
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 13) as u8 ^ seed as u8).collect();
    for _ in 0..3 {
        let offset = seed * (8 << 20) + 4096;
        host.write(1, offset, &data);
        assert_eq!(host.outcome(), (1, 0));
        let wanted = [(offset, 1 << 20)];
        host.request(cmd::READ, 0, 0, offset, 1 << 20);
        assert!(host.collect(&wanted)[0].as_ref().unwrap() == &data);
    }
}

#[test]
fn block_status_merges_extents_and_keeps_to_one_when_asked() {
    serve(Manner::default(), |addr| {
        let mut host = Host::attach(&addr, true);
        host.write(1, 8192, &[7; 12288]);
        assert_eq!(host.outcome(), (1, 0));
        for (flags, count) in [(0, 3), (cmd_flag::REQ_ONE, 1)] {
            host.request(cmd::BLOCK_STATUS, flags, 2, 0, 32 << 10);
            let Some(Reply::Chunk { kind: chunk::BLOCK_STATUS, done: true, data, .. }) = host.reply() else {
                panic!("a status")
            };
            let numbers: Vec<_> = data.chunks(4).map(number).collect();
            assert_eq!(numbers[..1 + 2 * count], [1, 8192, 3, 12288, 0, 12288, 3][..1 + 2 * count]);
            assert_eq!(numbers.len(), 1 + 2 * count);
        }
        host.request(cmd::CACHE, 0, 3, 0, 32 << 10);
        assert_eq!(host.outcome(), (3, 0));
        host.request(cmd::FLUSH, 0, 4, 0, 0);
        assert_eq!(host.outcome(), (4, 0));
    });
}

#[test]
fn a_failed_write_is_told_once_its_payload_is_through() {
    let manner = Manner { bad_write: Some(200_000), ..Manner::default() };
    serve(manner, |addr| {
        for structured in [true, false] {
            let mut host = Host::attach(&addr, structured);
            host.write(1, 0, &vec![1; 4 << 20]);
            assert_eq!(host.outcome(), (1, 28));
            host.write(2, 0, &[1; 8192]);
            assert_eq!(host.outcome(), (2, 0), "still in step");
        }
    });
}

#[test]
fn a_failed_read_is_told_as_the_reply_allows() {
    let reads = [(0, 4096), (131_072, 8192), (0, 1 << 20), (524_288, 65_536)];
    for backwards in [false, true] {
        let temper = Temper { backwards, ..Temper::default() };
        let manner = Manner { bad_read: Some(135_168), temper, ..Manner::default() };
        serve(manner, move |addr| {
            for df in [0, cmd_flag::DF] {
                let mut host = Host::attach(&addr, true);
                for (cookie, (offset, length)) in reads.iter().enumerate() {
                    host.request(cmd::READ, df, cookie as u64, *offset, *length);
                }
                let got = host.collect(&reads);
                let told: Vec<_> = got.iter().map(|r| r.as_ref().err().copied()).collect();
                assert_eq!(told, [None, Some(5), Some(5), None]);
            }
            let mut host = Host::attach(&addr, false);
            host.request(cmd::READ, 0, 0, 131_072, 8192);
            assert_eq!(host.outcome(), (0, 5));
            // Too long to be held: the failing piece comes second, and the reply has begun by then.
            host.request(cmd::READ, 0, 0, 0, 4 << 20);
            match (backwards, host.reply()) {
                (true, Some(Reply::Simple { error: 5, .. })) | (false, None) => {}
                (false, Some(Reply::Simple { error: 0, .. })) => while host.more() {},
                (_, other) => panic!("{other:?}"),
            }
        });
    }
}

/// Negotiation, a write of two blocks, a read, a disconnect.
fn conversation() -> Vec<u8> {
    let mut bytes = negotiation(true);
    client::request(cmd::WRITE, 0, 1, 4096, 512, &mut bytes);
    bytes.resize(bytes.len() + 512, 0x5a);
    client::request(cmd::READ, 0, 2, 0, 262_144, &mut bytes);
    client::request(cmd::BLOCK_STATUS, 0, 2, 0, 262_144, &mut bytes);
    client::request(cmd::DISC, 0, 3, 0, 0, &mut bytes);
    bytes
}

#[test]
fn clients_that_leave_at_each_byte_free_everything() {
    let temper = Temper { shuffle: Some(3), ..Temper::default() };
    let manner = Manner { block_bytes: 512, temper, ..Manner::default() };
    let count = conversation().len();
    let seen = serve(manner, |addr| {
        let bytes = conversation();
        for cut in 0..bytes.len() {
            let mut wire = connect(&addr);
            wire.write_all(&bytes[..cut]).unwrap();
        }
    });
    assert_eq!(seen.closed.len(), count);
}

#[test]
fn ten_thousand_clients_that_talk_garbage() {
    let seen = serve(Manner::default(), |addr| {
        let mut random = Random(9);
        for round in 0..10_000 {
            let mut wire = connect(&addr);
            // From anywhere in a proper conversation on.
            let prefix = conversation();
            let keep = if round % 2 == 0 { 0 } else { random.below(prefix.len() as u64) as usize };
            let mut bytes = prefix[..keep].to_vec();
            bytes.extend((0..random.below(300)).map(|_| random.next() as u8));
            _ = wire.write_all(&bytes);
        }
        let mut host = Host::attach(&addr, true);
        host.request(cmd::FLUSH, 0, 1, 0, 0);
        assert_eq!(host.outcome(), (1, 0));
    });
    assert_eq!(seen.closed.len(), 10_001);
}

#[test]
fn a_thousand_clients_that_vanish_while_they_read() {
    let manner = Manner { temper: Temper { shuffle: Some(8), ..Temper::default() }, ..Manner::default() };
    let seen = serve(manner, |addr| {
        let mut first = Host::attach(&addr, true);
        first.write(1, 0, &vec![3; 4 << 20]);
        assert_eq!(first.outcome(), (1, 0));
        let mut random = Random(11);
        for _ in 0..1000 {
            let mut host = Host::attach(&addr, random.below(2) == 0);
            for cookie in 0..8 {
                host.request(cmd::READ, 0, cookie, 0, 1 << 20);
            }
            if random.below(2) == 0 {
                host.more();
            }
        }
        first.request(cmd::FLUSH, 0, 1, 0, 0);
        assert_eq!(first.outcome(), (1, 0));
    });
    assert_eq!(seen.closed.len(), 1001);
}

#[test]
fn a_client_that_drips_is_served() {
    serve(Manner { block_bytes: 512, ..Manner::default() }, |addr| {
        let mut wire = connect(&addr);
        for byte in conversation() {
            wire.write_all(&[byte]).unwrap();
        }
        let mut all = Vec::new();
        wire.read_to_end(&mut all).unwrap();
        assert!(all.len() > 4096);
    });
}

#[test]
fn a_client_that_stops_reading_is_held_back_and_others_are_not() {
    let limits = NbdLimits { bytes_max: 1 << 20, ..NbdLimits::default() };
    let seen = serve(Manner { limits, ..Manner::default() }, |addr| {
        let mut first = Host::attach(&addr, true);
        first.write(1, 0, &vec![3; 32 << 20]);
        assert_eq!(first.outcome(), (1, 0));
        let mut greedy = Host::attach(&addr, true);
        let wanted: Vec<_> = (0..40).map(|_| (0, 2 << 20)).collect();
        for (cookie, (offset, length)) in wanted.iter().enumerate() {
            greedy.request(cmd::READ, 0, cookie as u64, *offset, *length);
        }
        // 80 MiB were asked for; nobody takes them. The other client is served meanwhile.
        for cookie in 0..50 {
            first.request(cmd::READ, 0, 0, 0, 65_536);
            assert_eq!(first.collect(&[(0, 65_536)])[0].as_ref().unwrap().len(), 65_536, "{cookie}");
        }
        // It takes half of them after all, then leaves.
        for got in greedy.collect(&wanted[..1]) {
            assert!(got.unwrap().iter().all(|byte| *byte == 3));
        }
    });
    assert!(seen.bytes_max <= (1 << 20) + 65_536, "{seen:?}");
}

#[test]
fn clients_that_stop_reading_leave_room_for_one_that_reads() {
    let limits = NbdLimits { bytes_max: 600 << 10, arena_reserve_blocks: 512, ..NbdLimits::default() };
    let manner =
        Manner { limits, temper: Temper { arena_bytes: 4 << 20, ..Temper::default() }, ..Manner::default() };
    let seen = serve(manner, |addr| {
        let mut first = Host::attach(&addr, true);
        first.write(1, 0, &vec![3; 2 << 20]);
        assert_eq!(first.outcome(), (1, 0));
        let mut greedy: Vec<_> = (0..4).map(|_| Host::attach(&addr, true)).collect();
        for host in &mut greedy {
            (0..20).for_each(|cookie| host.request(cmd::READ, 0, cookie, 0, 2 << 20));
        }
        // Together they hold more than the share of clients.
        std::thread::sleep(Duration::from_millis(300));
        for cookie in 0..50 {
            first.request(cmd::READ, 0, 0, 0, 1 << 20);
            assert_eq!(first.collect(&[(0, 1 << 20)])[0].as_ref().unwrap().len(), 1 << 20, "{cookie}");
        }
        first.write(2, 0, &vec![4; 1 << 20]);
        assert_eq!(first.outcome(), (2, 0));
    });
    assert!(seen.starved > 0, "the arena was meant to run short");
}

#[test]
fn a_client_that_only_haggles_is_cut() {
    let limits = NbdLimits { negotiation: Span::ms(50), ..NbdLimits::default() };
    let seen = serve(Manner { limits, ..Manner::default() }, |addr| {
        let mut wire = connect(&addr);
        let mut all = Vec::new();
        wire.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), GREETING_BYTES);
    });
    assert_eq!(seen.closed, [NbdCloseReason::TooSlow]);
}

/// A client of the old kind of replies, and a read of 32 MiB that it has asked for.
fn reader_of_much(addr: Addr) -> TcpStream {
    let Addr::Tcp(to) = addr else { panic!("TCP was asked for") };
    let mut wire = TcpStream::connect(to).unwrap();
    let mut bytes = negotiation(false);
    client::request(cmd::READ, 0, 1, 0, 32 << 20, &mut bytes);
    wire.write_all(&bytes).unwrap();
    wire
}

#[test]
fn a_client_that_closes_its_side_without_a_word_is_gone_with_all_that_it_asked_for() {
    let manner = Manner { temper: Temper { shuffle: Some(1), ..Temper::default() }, ..Manner::default() };
    let seen = serve(manner, |addr| {
        let mut wire = reader_of_much(addr);
        wire.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        // A reset where data was still on its way.
        let _ = wire.read_to_end(&mut all);
        assert!(all.len() < 32 << 20);
    });
    assert_eq!(seen.closed, [NbdCloseReason::Vanished]);
}

#[test]
fn replies_that_wait_behind_a_read_that_nobody_takes_are_bounded_too() {
    // No multiple of a piece: reads alone never fill it.
    let limits = NbdLimits { bytes_max: (1 << 20) + 50_000, ..NbdLimits::default() };
    let seen = serve(Manner { limits, ..Manner::default() }, |addr| {
        let mut wire = reader_of_much(addr);
        wire.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut hints = Vec::new();
        (0..10_000).for_each(|cookie| client::request(cmd::CACHE, 0, cookie, 0, 4096, &mut hints));
        let blocked = (0..500).find_map(|_| wire.write_all(&hints).err());
        let error = blocked.expect("140 MB are not taken in while no reply is");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    });
    assert!(seen.bytes_max <= (1 << 20) + (256 << 10), "{seen:?}");
}
