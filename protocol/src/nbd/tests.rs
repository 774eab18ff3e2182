//! Both ends in memory: the inputs that broke other servers, and the rules of the protocol.

use super::client::{self, OptionReply, Reply};
use super::wire::*;
use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn vol0() -> ExportInfo {
    ExportInfo {
        id: 7,
        name: "vol0".into(),
        description: "the first".into(),
        bytes: 64 * MIB,
        block_bytes: 4096,
        read_only: false,
    }
}

/// A session, what it has not been fed yet, and what it said.
struct Host {
    session: Session,
    input: Vec<u8>,
    out: Vec<u8>,
    events: Vec<Event>,
    exports: Vec<ExportInfo>,
    violation: Option<Violation>,
    /// Most bytes offered at once.
    window: usize,
}

impl Host {
    fn new() -> Self {
        let session = Session::new();
        let mut out = Vec::new();
        session.greeting(&mut out);
        assert_eq!(out.len(), GREETING_BYTES);
        out.clear();
        let exports = vec![vol0()];
        Self { session, input: vec![], out, events: vec![], exports, violation: None, window: usize::MAX }
    }
    /// Past the client's flags.
    fn haggling() -> Self {
        let mut host = Self::new();
        host.send(&u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        host
    }
    /// Attached to an export of this block size.
    fn attached(structured: bool, block_bytes: u32) -> Self {
        let mut host = Self::haggling();
        host.exports[0].block_bytes = block_bytes;
        if structured {
            host.option(opt::STRUCTURED_REPLY, &[]);
            host.encode(|out| client::meta_option(opt::SET_META_CONTEXT, "vol0", &[BASE_ALLOCATION], out));
        }
        host.encode(|out| client::info_option(opt::GO, "vol0", &[], out));
        assert!(matches!(host.events.last(), Some(Event::Attached(_))), "{:?}", host.events);
        host.events.clear();
        host.out.clear();
        host
    }
    fn encode(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = Vec::new();
        write(&mut bytes);
        self.send(&bytes);
    }
    fn option(&mut self, option: u32, data: &[u8]) {
        self.encode(|out| client::option(option, data, out));
    }
    fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u32) {
        self.encode(|out| client::request(kind, flags, 1, offset, length, out));
    }
    fn send(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        while self.violation.is_none() {
            let end = self.window.min(self.input.len());
            let progress = match self.session.feed(&self.input[..end], &mut self.out) {
                Ok(progress) => progress,
                Err(violation) => {
                    self.violation = Some(violation);
                    return;
                }
            };
            self.input.drain(..progress.used);
            let idle = progress.used == 0 && progress.event.is_none();
            if let Some(event) = progress.event {
                self.answer(event);
            }
            if idle {
                return;
            }
        }
    }
    fn answer(&mut self, event: Event) {
        match &event {
            Event::Export { name } => {
                let found = self.exports.iter().find(|e| e.name == *name || name.is_empty());
                let answer = found.cloned().ok_or(Refusal::Unknown);
                self.violation = self.session.answer_export(answer, &mut self.out).err();
            }
            Event::List => {
                let list: Vec<_> =
                    self.exports.iter().map(|e| (e.name.clone(), e.description.clone())).collect();
                self.session.answer_list(&list, &mut self.out);
            }
            Event::Request(Request { command: Command::Write, length, .. }) => {
                let length = *length as usize;
                assert!(self.input.len() >= length, "tests send payloads whole");
                self.input.drain(..length);
            }
            _ => {}
        }
        self.events.push(event);
    }
    fn option_replies(&mut self) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        while let Some((used, reply)) = client::option_reply(&self.out).unwrap() {
            self.out.drain(..used);
            replies.push(reply);
        }
        assert!(self.out.is_empty());
        replies
    }
    fn kinds(&mut self) -> Vec<u32> {
        self.option_replies().iter().map(|reply| reply.kind).collect()
    }
    /// The one reply there is, as an error number.
    fn error(&mut self) -> u32 {
        let (used, reply) = client::reply(&self.out).unwrap().expect("a reply");
        self.out.drain(..used);
        assert!(self.out.is_empty());
        match reply {
            Reply::Simple { error, .. } => error,
            Reply::Chunk { kind, data, done, .. } => {
                assert_eq!((kind, done), (chunk::ERROR, true));
                assert_eq!(data.len(), 6 + usize::from(u16::from_be_bytes([data[4], data[5]])));
                u32::from_be_bytes(data[..4].try_into().unwrap())
            }
        }
    }
}

#[test]
fn go_tells_size_flags_and_block_sizes() {
    let mut host = Host::haggling();
    host.option(opt::STRUCTURED_REPLY, &[]);
    host.encode(|out| {
        client::info_option(opt::GO, "vol0", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99], out);
    });
    let replies = host.option_replies();
    let infos: Vec<_> = replies.iter().filter(|r| r.kind == rep::INFO).map(|r| &r.data[..]).collect();
    let mut export = vec![0, 0];
    export.extend_from_slice(&(64 * MIB).to_be_bytes());
    export.extend_from_slice(&0b1101_1110_1101u16.to_be_bytes());
    assert_eq!(infos[0], export);
    assert_eq!(infos[1], b"\0\x01vol0");
    assert_eq!(infos[2], b"\0\x02the first");
    assert_eq!(infos[3], [0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(replies.last().unwrap().kind, rep::ACK);
    assert!(host.events.contains(&Event::Attached(vol0())));
}

#[test]
fn info_leaves_the_haggling_open_and_go_without_a_name_takes_the_default() {
    let mut host = Host::haggling();
    host.encode(|out| client::info_option(opt::INFO, "nope", &[], out));
    assert_eq!(host.kinds(), [rep::ERR_UNKNOWN]);
    host.encode(|out| client::info_option(opt::INFO, "vol0", &[], out));
    assert_eq!(host.kinds(), [rep::INFO, rep::INFO, rep::ACK]);
    assert!(host.session.export().is_none());
    host.encode(|out| client::info_option(opt::GO, "", &[], out));
    assert_eq!(host.session.export().unwrap().name, "vol0");
}

#[test]
fn export_name_pads_with_zeroes_only_when_the_client_wants_them() {
    for (flags, bytes) in [(FIXED_NEWSTYLE, 134), (FIXED_NEWSTYLE | NO_ZEROES, 10), (0, 134)] {
        let mut host = Host::new();
        host.send(&u32::from(flags).to_be_bytes());
        host.option(opt::EXPORT_NAME, b"vol0");
        assert_eq!(host.out.len(), bytes);
        assert_eq!(host.out[..8], (64 * MIB).to_be_bytes());
        // DF needs structured replies, which were not negotiated.
        assert_eq!(u16::from_be_bytes([host.out[8], host.out[9]]) & flag::SEND_DF, 0);
        assert!(host.session.export().is_some());
    }
}

#[test]
fn export_name_of_nothing_closes() {
    for name in [&b"nope"[..], b"\xff\xfe", &[b'x'; 4096], b"a\0b"] {
        let mut host = Host::haggling();
        host.option(opt::EXPORT_NAME, name);
        assert!(matches!(host.violation, Some(Violation::Export(_))), "{name:?}");
        assert!(host.out.is_empty());
    }
    let mut host = Host::haggling();
    host.option(opt::EXPORT_NAME, &[b'x'; 4097]);
    assert_eq!(host.violation, Some(Violation::OptionLength { option: opt::EXPORT_NAME, bytes: 4097 }));
}

#[test]
fn unknown_client_flags_close() {
    for flags in [4u32, 0x8000_0003, u32::MAX] {
        let mut host = Host::new();
        host.send(&flags.to_be_bytes());
        assert_eq!(host.violation, Some(Violation::ClientFlags(flags)));
    }
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let mut host = Host::new();
    host.send(&[0; 4]);
    host.option(opt::LIST, &[]);
    assert_eq!(host.violation, Some(Violation::NotFixed(opt::LIST)));
}

#[test]
fn a_bad_option_magic_closes_and_a_bad_option_is_refused_with_a_reason() {
    let mut host = Host::haggling();
    for option in [0, 4, opt::STARTTLS, opt::EXTENDED_HEADERS, 12, u32::MAX] {
        host.option(option, b"whatever");
        let replies = host.option_replies();
        assert_eq!((replies.len(), replies[0].kind, replies[0].option), (1, rep::ERR_UNSUP, option));
        assert!(!replies[0].data.is_empty());
    }
    host.send(&[0; 16]);
    assert_eq!(host.violation, Some(Violation::OptionMagic(0)));
}

#[test]
fn option_lengths_up_to_the_largest_are_skipped_or_close() {
    let mut host = Host::haggling();
    host.window = FEED_BYTES_MAX;
    for bytes in [OPTION_BYTES_MAX + 1, OPTION_SKIP_BYTES_MAX as usize] {
        host.option(opt::GO, &vec![0; bytes]);
        assert_eq!(host.kinds(), [rep::ERR_TOO_BIG]);
    }
    host.option(opt::LIST, &[]);
    assert_eq!(host.kinds(), [rep::SERVER, rep::ACK], "still in step");
    let mut head = Vec::new();
    client::option(opt::GO, &[], &mut head);
    head[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    host.send(&head);
    assert_eq!(host.violation, Some(Violation::OptionLength { option: opt::GO, bytes: u32::MAX }));
}

#[test]
fn a_refusal_repeats_the_name_that_was_asked_for() {
    let long = "x".repeat(4096);
    for (name, told) in
        [("nope", "\"nope\""), ("a\u{7}b", "\"a\\u{7}b\""), (&long, "xxx\"..."), ("", "default")]
    {
        let mut host = Host::haggling();
        host.exports.clear();
        host.encode(|out| client::info_option(opt::GO, name, &[], out));
        let [reply] = &host.option_replies()[..] else { panic!("one reply") };
        let text = String::from_utf8(reply.data.clone()).expect("UTF-8");
        assert!(reply.kind == rep::ERR_UNKNOWN && text.contains(told) && text.len() <= 4096, "{text}");
    }
}

#[test]
fn names_of_every_length_and_of_bad_bytes() {
    for (name, kind) in [
        (vec![], rep::ACK),
        (vec![b'x'; 4096], rep::ERR_UNKNOWN),
        (vec![b'x'; 4097], rep::ERR_INVALID),
        (vec![0xff, 0xfe], rep::ERR_INVALID),
        (vec![b'a', 0], rep::ERR_INVALID),
    ] {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(&name);
        data.extend_from_slice(&[0, 0]);
        let mut host = Host::haggling();
        host.option(opt::INFO, &data);
        assert_eq!(host.kinds().pop(), Some(kind), "{} bytes", name.len());
    }
}

#[test]
fn counts_that_disagree_with_the_length_are_refused() {
    let good = b"\0\0\0\x04vol0\0\x01\0\x03";
    let mut host = Host::haggling();
    for cut in 0..good.len() {
        host.option(opt::GO, &good[..cut]);
        assert_eq!(host.kinds(), [rep::ERR_INVALID], "cut at {cut}");
    }
    let mut long = good.to_vec();
    long.push(0);
    host.option(opt::GO, &long);
    assert_eq!(host.kinds(), [rep::ERR_INVALID]);
    for data in [&b"\xff\xff\xff\xffvol0\0\0"[..], b"\0\0\0\x05vol0\0\0", b"\0\0\0\x04vol0\xff\xff"] {
        host.option(opt::GO, data);
        assert_eq!(host.kinds(), [rep::ERR_INVALID]);
    }
    host.option(opt::LIST, b"x");
    host.option(opt::STRUCTURED_REPLY, b"x");
    assert_eq!(host.kinds(), [rep::ERR_INVALID; 2]);
    assert!(!host.session.structured());
}

#[test]
fn meta_contexts_are_listed_and_selected() {
    let mut host = Host::haggling();
    host.encode(|out| client::meta_option(opt::LIST_META_CONTEXT, "vol0", &[], out));
    assert_eq!(host.kinds(), [rep::ERR_INVALID], "structured replies come first");
    host.option(opt::STRUCTURED_REPLY, &[]);
    host.out.clear();
    let both = [rep::META_CONTEXT, rep::ACK];
    for (option, name, queries, kinds) in [
        (opt::LIST_META_CONTEXT, "vol0", &[][..], &both[..]),
        (opt::LIST_META_CONTEXT, "vol0", &["base:"], &both),
        (opt::LIST_META_CONTEXT, "vol0", &["base:allocation"], &both),
        (opt::LIST_META_CONTEXT, "vol0", &["qemu:dirty"], &[rep::ACK]),
        (opt::SET_META_CONTEXT, "vol0", &[], &[rep::ACK]),
        (opt::SET_META_CONTEXT, "vol0", &["base:"], &[rep::ACK]),
        (opt::SET_META_CONTEXT, "vol0", &["x", "base:allocation", "base:allocation"], &both),
        (opt::SET_META_CONTEXT, "nope", &["base:allocation"], &[rep::ERR_UNKNOWN]),
    ] {
        host.encode(|out| client::meta_option(option, name, queries, out));
        assert_eq!(host.kinds(), kinds, "{option} {name} {queries:?}");
    }
}

#[test]
fn meta_queries_without_end_are_refused() {
    let mut host = Host::haggling();
    host.option(opt::STRUCTURED_REPLY, &[]);
    host.out.clear();
    let mut data = b"\0\0\0\x04vol0".to_vec();
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    data.resize(OPTION_BYTES_MAX, 0);
    host.option(opt::LIST_META_CONTEXT, &data);
    assert_eq!(host.kinds(), [rep::ERR_INVALID]);
}

#[test]
fn options_without_end_are_cut_off() {
    let mut host = Host::haggling();
    for _ in 0..OPTIONS_MAX {
        host.option(99, &[]);
        host.out.clear();
    }
    assert_eq!(host.violation, None);
    host.option(99, &[]);
    assert_eq!(host.violation, Some(Violation::Options));
}

#[test]
fn a_context_selected_for_another_export_does_not_count() {
    let mut host = Host::haggling();
    host.exports.push(ExportInfo { id: 8, name: "vol1".into(), ..vol0() });
    host.option(opt::STRUCTURED_REPLY, &[]);
    host.encode(|out| client::meta_option(opt::SET_META_CONTEXT, "vol0", &[BASE_ALLOCATION], out));
    host.encode(|out| client::info_option(opt::GO, "vol1", &[], out));
    host.out.clear();
    host.request(cmd::BLOCK_STATUS, 0, 0, 4096);
    assert_eq!(host.error(), 22);
}

#[test]
fn abort_is_acknowledged() {
    let mut host = Host::haggling();
    host.option(opt::ABORT, &[]);
    assert_eq!(host.kinds(), [rep::ACK]);
    assert_eq!(host.events, [Event::Disconnect]);
    host.send(b"anything");
    assert_eq!(host.input.len(), 8, "nothing more is looked at");
}

#[test]
fn a_request_without_its_magic_closes() {
    let mut host = Host::attached(true, 4096);
    host.send(&[0x55; REQUEST_BYTES]);
    assert_eq!(host.violation, Some(Violation::RequestMagic(0x5555_5555)));
}

/// Fires one request and tells the error number, 0 when it came through.
fn fire(structured: bool, block_bytes: u32, kind: u16, flags: u16, offset: u64, length: u32) -> u32 {
    let mut host = Host::attached(structured, block_bytes);
    let mut bytes = Vec::new();
    client::request(kind, flags, 9, offset, length, &mut bytes);
    if kind == cmd::WRITE {
        bytes.resize(bytes.len() + length as usize, 0xa5);
    }
    host.send(&bytes);
    let error = if host.events.is_empty() { host.error() } else { 0 };
    // Whatever happened, the stream is in step.
    host.events.clear();
    host.request(cmd::FLUSH, 0, 0, 0);
    assert!(matches!(host.events[..], [Event::Request(Request { command: Command::Flush, .. })]));
    error
}

#[test]
fn senseless_requests_are_refused_and_leave_the_stream_in_step() {
    let (all, end) = (true, 64 * MIB);
    let max = PAYLOAD_BYTES_MAX;
    for (kind, flags, offset, length, error) in [
        (cmd::READ, 0, 0, max, 0),
        (cmd::READ, 0, 0, max + 4096, 22),
        (cmd::READ, 0, 0, u32::MAX, 22),
        (cmd::READ, 0, 0, 0, 22),
        (cmd::READ, 0, end, 4096, 22),
        (cmd::READ, 0, end - 4096, 8192, 22),
        (cmd::READ, 0, u64::MAX - 4095, 4096, 22),
        (cmd::READ, 0, 512, 4096, 22),
        (cmd::READ, 0, 0, 4095, 22),
        (cmd::READ, cmd_flag::DF | cmd_flag::FUA, 0, 4096, 0),
        (cmd::READ, cmd_flag::REQ_ONE, 0, 4096, 22),
        (cmd::READ, 0x8000, 0, 4096, 22),
        (cmd::WRITE, cmd_flag::FUA, end - 4096, 4096, 0),
        (cmd::WRITE, 0, 0, max, 0),
        (cmd::WRITE, 0, 0, max + 4096, 22),
        (cmd::WRITE, 0, 0, PAYLOAD_SKIP_BYTES_MAX, 22),
        (cmd::WRITE, 0, 0, 0, 22),
        (cmd::WRITE, 0, end, 4096, 28),
        (cmd::WRITE, 0, u64::MAX - 4095, 4096, 28),
        (cmd::WRITE, 0, 1, 4096, 22),
        (cmd::WRITE, cmd_flag::NO_HOLE, 0, 4096, 22),
        (cmd::WRITE_ZEROES, cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO | cmd_flag::FUA, 0, 65 << 20, 28),
        (cmd::WRITE_ZEROES, 0, 0, 64 << 20, 0),
        (cmd::WRITE_ZEROES, cmd_flag::DF, 0, 4096, 22),
        (cmd::WRITE_ZEROES, 0, 0, u32::MAX, 28),
        (cmd::TRIM, cmd_flag::FUA, 0, 64 << 20, 0),
        (cmd::TRIM, 0, 0, u32::MAX, 22),
        (cmd::TRIM, 0, 0, 0, 22),
        (cmd::CACHE, 0, 0, 64 << 20, 0),
        (cmd::FLUSH, cmd_flag::FUA, 0, 0, 0),
        (cmd::FLUSH, 0, 4096, 0, 22),
        (cmd::FLUSH, 0, 0, 4096, 22),
        (cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 0, 64 << 20, 0),
        (cmd::BLOCK_STATUS, 0, 0, u32::MAX, 22),
        (8, 0, 0, 4096, 22),
        (0xffff, 0xffff, u64::MAX, u32::MAX, 22),
    ] {
        assert_eq!(fire(all, 4096, kind, flags, offset, length), error, "{kind} {flags} {offset} {length}");
    }
    assert_eq!(fire(all, 512, cmd::READ, 0, 512, 1024), 0);
    assert_eq!(fire(all, 512, cmd::WRITE, 0, 1536, 512), 0);
    assert_eq!(fire(all, 512, cmd::WRITE, 0, 100, 512), 22);
    assert_eq!(fire(false, 4096, cmd::READ, cmd_flag::DF, 0, 4096), 22);
    assert_eq!(fire(false, 4096, cmd::BLOCK_STATUS, 0, 0, 4096), 22);
}

#[test]
fn a_write_too_long_to_be_skipped_closes() {
    let mut host = Host::attached(true, 4096);
    host.request(cmd::WRITE, 0, 0, PAYLOAD_SKIP_BYTES_MAX + 1);
    assert_eq!(host.violation, Some(Violation::PayloadLength(PAYLOAD_SKIP_BYTES_MAX + 1)));
}

#[test]
fn a_read_only_export_refuses_what_writes() {
    let mut host = Host::haggling();
    host.exports[0].read_only = true;
    host.option(opt::EXPORT_NAME, b"vol0");
    assert_ne!(u16::from_be_bytes([host.out[8], host.out[9]]) & flag::READ_ONLY, 0);
    host.out.clear();
    host.events.clear();
    for kind in [cmd::WRITE_ZEROES, cmd::TRIM] {
        host.request(kind, 0, 0, 4096);
        assert_eq!(host.error(), 1);
    }
    host.request(cmd::WRITE, 0, 0, 4096);
    assert!(host.out.is_empty(), "answered when its payload is through");
    host.send(&[0; 4096]);
    assert_eq!(host.error(), 1);
    assert!(host.events.is_empty());
}

#[test]
fn a_refused_writes_payload_may_be_cut_at_each_byte() {
    let mut bytes = Vec::new();
    client::request(cmd::WRITE, 0, 9, 1, 64, &mut bytes);
    bytes.resize(bytes.len() + 64, 0);
    for cut in 0..bytes.len() {
        let mut host = Host::attached(true, 4096);
        host.send(&bytes[..cut]);
        assert!(host.out.is_empty());
        host.send(&bytes[cut..]);
        assert_eq!(host.error(), 22);
    }
}

#[test]
fn disconnect_ends_the_session() {
    let mut host = Host::attached(true, 4096);
    host.request(cmd::DISC, 0, 0, 0);
    assert_eq!(host.events, [Event::Disconnect]);
    host.request(cmd::READ, 0, 0, 4096);
    assert_eq!(host.events.len(), 1);
}

#[test]
fn a_stopping_server_refuses_with_its_reason() {
    let mut host = Host::attached(true, 4096);
    host.session.stop();
    host.request(cmd::READ, 0, 0, 4096);
    assert_eq!(host.error(), 108);
    let mut host = Host::haggling();
    host.session.stop();
    host.option(opt::LIST, &[]);
    assert_eq!(host.kinds(), [rep::ERR_SHUTDOWN]);
    host.option(opt::ABORT, &[]);
    assert_eq!(host.kinds(), [rep::ACK]);
}

#[test]
fn error_texts_are_cut_at_a_character() {
    let mut out = Vec::new();
    reply::error(true, 1, NbdError::Io, &"ä".repeat(200), &mut out);
    let Some((_, Reply::Chunk { data, .. })) = client::reply(&out).unwrap() else { panic!("a chunk") };
    assert_eq!(data.len(), 6 + TEXT_BYTES_MAX);
    assert!(core::str::from_utf8(&data[6..]).is_ok());
    out.clear();
    reply::error_at(1, NbdError::Io, &"aä".repeat(100), 5, &mut out);
    let Some((_, Reply::Chunk { data, .. })) = client::reply(&out).unwrap() else { panic!("a chunk") };
    let text = usize::from(u16::from_be_bytes([data[4], data[5]]));
    assert!(core::str::from_utf8(&data[6..6 + text]).is_ok());
    assert_eq!(data[6 + text..], 5u64.to_be_bytes());
}

/// A whole, sensible conversation.
fn conversation() -> Vec<u8> {
    let mut bytes = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
    client::option(opt::STRUCTURED_REPLY, &[], &mut bytes);
    client::option(opt::LIST, &[], &mut bytes);
    client::meta_option(opt::SET_META_CONTEXT, "vol0", &[BASE_ALLOCATION], &mut bytes);
    client::info_option(opt::GO, "vol0", &[info::BLOCK_SIZE], &mut bytes);
    client::request(cmd::READ, 0, 1, 0, 8192, &mut bytes);
    client::request(cmd::BLOCK_STATUS, 0, 2, 0, 8192, &mut bytes);
    client::request(cmd::TRIM, 0, 3, 0, 8192, &mut bytes);
    client::request(cmd::DISC, 0, 4, 0, 0, &mut bytes);
    bytes
}

#[test]
fn the_same_is_understood_however_the_stream_is_cut() {
    let bytes = conversation();
    let mut whole = Host::new();
    whole.send(&bytes);
    assert_eq!(whole.violation, None);
    assert_eq!(whole.events.len(), 8);
    for cut in 0..bytes.len() {
        let mut host = Host::new();
        host.send(&bytes[..cut]);
        host.send(&bytes[cut..]);
        assert_eq!((&host.events, &host.out), (&whole.events, &whole.out), "cut at {cut}");
    }
    let mut drip = Host::new();
    for byte in &bytes {
        drip.send(&[*byte]);
    }
    assert_eq!((&drip.events, &drip.out), (&whole.events, &whole.out));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut host = Host::new();
        host.send(&bytes);
        let mut host = Host::haggling();
        host.send(&bytes);
        let mut host = Host::attached(true, 512);
        host.send(&bytes);
    }

    #[test]
    fn flipped_bytes_never_panic(at in 0usize..300, value in any::<u8>(), at2 in 0usize..300, value2 in any::<u8>()) {
        let mut bytes = conversation();
        let length = bytes.len();
        bytes[at % length] = value;
        bytes[at2 % length] = value2;
        // A read that became a write has its payload.
        bytes.resize(length + 16384, 0);
        let mut host = Host::new();
        host.send(&bytes);
    }

    #[test]
    fn requests_that_come_through_are_within_the_export(
        kind in 0u16..9, flags in 0u16..32, offset in any::<u64>(), length in any::<u32>(), near in any::<bool>(),
    ) {
        let offset = if near { offset % (65 * MIB) / 512 * 512 } else { offset };
        let length = if near { length % (1 << 20) / 512 * 512 } else { length };
        let mut host = Host::attached(true, 512);
        let mut bytes = Vec::new();
        client::request(kind, flags, 5, offset, length, &mut bytes);
        if kind == cmd::WRITE && length <= PAYLOAD_SKIP_BYTES_MAX {
            bytes.resize(bytes.len() + length as usize, 0);
        }
        host.send(&bytes);
        for event in host.events {
            if let Event::Request(Request { command, offset, length, .. }) = event {
                prop_assert!(offset + u64::from(length) <= 64 * MIB);
                prop_assert!(command == Command::Flush || length > 0);
                prop_assert!(offset % 512 == 0 && length % 512 == 0);
            }
        }
    }
}
