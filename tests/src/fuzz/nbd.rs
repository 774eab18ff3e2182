//! NBD: the negotiation, the requests, and what our own client reads.

use super::{Dice, Target, in_two};
use protocol::nbd::wire::{REQUEST_BYTES, cmd, info, opt};
use protocol::nbd::{Command, Event, ExportInfo, Refusal, Session, Violation, client};

/// A client that has just connected.
pub const HANDSHAKE: Target = Target {
    name: "nbd-handshake",
    about: "options of NBD, up to the first requests",
    bytes_max: 40 << 10,
    memory_max: |bytes| (1 << 20) + 64 * bytes,
    make: handshake,
    run: |input| twice(input, Session::new),
};

/// A client that is attached.
pub const REQUESTS: Target = Target {
    name: "nbd-requests",
    about: "requests of NBD",
    bytes_max: 4 << 10,
    memory_max: |bytes| (1 << 20) + 64 * bytes,
    make: requests,
    run: |input| {
        let Some((style, input)) = input.split_first() else { return };
        twice(input, || attached(*style));
    },
};

/// A server that answers us.
pub const REPLIES: Target = Target {
    name: "nbd-replies",
    about: "what the NBD client of tests and benches reads",
    bytes_max: 4 << 10,
    memory_max: |bytes| (64 << 10) + 4 * bytes,
    make: |dice| {
        let mut server = Host::new(attached(1));
        server.out.clear();
        let input = requests(dice);
        server.feed(&input[1..], usize::MAX);
        server.out
    },
    run: replies,
};

const BYTES: u64 = 64 << 20;

fn export(name: &str) -> Result<ExportInfo, Refusal> {
    let block_bytes = match name {
        "vol0" | "" => 512,
        "vol1" => 4096,
        "away" => return Err(Refusal::Policy("it is not here".into())),
        "down" => return Err(Refusal::Shutdown),
        _ => return Err(Refusal::Unknown),
    };
    let read_only = name == "vol1";
    Ok(ExportInfo {
        id: block_bytes.into(),
        name: name.into(),
        description: "d".into(),
        bytes: BYTES,
        block_bytes,
        read_only,
    })
}

/// A session and all that it said.
struct Host {
    session: Session,
    payload: usize,
    events: Vec<Event>,
    out: Vec<u8>,
    end: Option<Violation>,
}

impl Host {
    fn new(session: Session) -> Self {
        Self { session, payload: 0, events: Vec::new(), out: Vec::new(), end: None }
    }
    fn feed(&mut self, input: &[u8], cut: usize) {
        in_two(input, cut, |bytes| self.step(bytes));
    }
    fn step(&mut self, bytes: &[u8]) -> (usize, bool) {
        if self.payload > 0 {
            let taken = self.payload.min(bytes.len());
            self.payload -= taken;
            return (taken, taken > 0);
        }
        match self.session.feed(bytes, &mut self.out) {
            Err(violation) => {
                assert!(!violation.to_string().is_empty());
                self.end = Some(violation);
                (0, false)
            }
            Ok(progress) => {
                let again = progress.used > 0 || progress.event.is_some();
                if let Some(event) = progress.event {
                    self.happened(event);
                }
                (progress.used, again && self.end.is_none())
            }
        }
    }
    fn happened(&mut self, event: Event) {
        match &event {
            Event::Export { name } => {
                assert!(name.len() <= 4096);
                self.end = self.session.answer_export(export(name), &mut self.out).err();
            }
            Event::List => {
                let all = [("vol0".to_owned(), String::new()), ("vol1".to_owned(), "read-only".to_owned())];
                self.session.answer_list(&all, &mut self.out);
            }
            Event::Request(request) => {
                let export = self.session.export().expect("attached");
                let end = request.offset.checked_add(request.length.into()).expect("no wrap");
                let block = u64::from(export.block_bytes);
                assert!(
                    end <= export.bytes && request.offset % block == 0 && end % block == 0,
                    "{request:?}"
                );
                assert!(request.command == Command::Flush || request.length > 0);
                if request.command == Command::Write {
                    assert!(!export.read_only);
                    self.payload = request.length as usize;
                }
            }
            Event::Attached(_) | Event::Disconnect => {}
        }
        self.events.push(event);
    }
}

/// Whole and cut somewhere, a stream means the same.
fn twice(input: &[u8], session: impl Fn() -> Session) {
    let (mut whole, mut cut) = (Host::new(session()), Host::new(session()));
    whole.feed(input, input.len());
    let at = crc32c::crc32c(input) as usize % (input.len() + 1);
    cut.feed(input, at);
    assert_eq!((&whole.events, &whole.end), (&cut.events, &cut.end), "cut at {at}");
    assert!(whole.out == cut.out, "other answers when cut at {at}");
    // An option or request of 16 bytes and more is answered by a few hundred at most.
    assert!(whole.out.len() <= 1024 + 40 * input.len(), "{} bytes of answers", whole.out.len());
    let mut again = whole.out.as_slice();
    if whole.end.is_none() && matches!(whole.events.first(), Some(Event::Request(_))) {
        while let Some((used, _)) = client::reply(again).expect("our answers are well-formed") {
            again = &again[used..];
        }
        assert!(again.is_empty(), "half an answer");
    }
}

fn attached(style: u8) -> Session {
    let mut host = Host::new(Session::new());
    let mut bytes = vec![0, 0, 0, 3];
    let name = if style & 4 == 0 { "vol0" } else { "vol1" };
    if style & 1 != 0 {
        client::option(opt::STRUCTURED_REPLY, &[], &mut bytes);
    }
    if style & 3 == 3 {
        client::meta_option(opt::SET_META_CONTEXT, name, &["base:allocation"], &mut bytes);
    }
    client::info_option(opt::GO, name, &[], &mut bytes);
    host.feed(&bytes, usize::MAX);
    assert!(matches!(host.events.last(), Some(Event::Attached(_))));
    if style & 8 != 0 {
        host.session.stop();
    }
    host.session
}

fn handshake(dice: &mut Dice) -> Vec<u8> {
    let mut out = vec![0, 0, 0, dice.pick(&[0, 1, 2, 3, 3, 3, 3, 0xff])];
    let names = ["", "vol0", "vol1", "away", "down", "no such", "ä"];
    for _ in 0..dice.below(6) {
        let name = dice.pick(&names);
        match dice.below(6) {
            0 => client::option(
                dice.pick(&[opt::LIST, opt::ABORT, opt::STRUCTURED_REPLY, 0, 99]),
                &dice.bytes(4),
                &mut out,
            ),
            1 => client::option(opt::STRUCTURED_REPLY, &[], &mut out),
            2 => {
                let infos = [info::NAME, info::DESCRIPTION, dice.odd() as u16];
                let count = dice.below(4);
                client::info_option(opt::INFO, name, &infos[..count], &mut out);
            }
            3 | 4 => {
                let queries = ["base:allocation", "base:", "qemu:x", ""];
                let count = dice.below(5);
                let which = dice.pick(&[opt::SET_META_CONTEXT, opt::LIST_META_CONTEXT]);
                client::meta_option(which, name, &queries[..count], &mut out);
            }
            _ => client::option(dice.odd() as u32, &dice.bytes(40), &mut out),
        }
    }
    match dice.below(3) {
        0 => client::option(opt::EXPORT_NAME, dice.pick(&names).as_bytes(), &mut out),
        _ => client::info_option(opt::GO, dice.pick(&names), &[], &mut out),
    }
    out.extend_from_slice(&requests(dice)[1..]);
    out
}

fn requests(dice: &mut Dice) -> Vec<u8> {
    let mut out = vec![dice.roll() as u8];
    for _ in 0..dice.below(8) {
        let kind = dice.below(9) as u16;
        let flags = if dice.percent(70) { 0 } else { 1 << dice.below(6) };
        let (offset, length) = match dice.below(4) {
            0 => (dice.odd(), dice.odd() as u32),
            1 => (BYTES - 4096, 4096 * dice.below(3) as u32),
            2 if kind == cmd::FLUSH => (0, 0),
            _ => (dice.below(16384) as u64 * 4096, 512 * dice.below(5) as u32),
        };
        client::request(kind, flags, dice.roll(), offset, length, &mut out);
        if kind == cmd::WRITE && length <= 2048 {
            out.resize(out.len() + length as usize, 7);
        }
    }
    assert!(out.len() <= 1 + 8 * (REQUEST_BYTES + 2048));
    out
}

fn replies(input: &[u8]) {
    let mut at = 0;
    while let Ok(Some((used, reply))) = client::reply(&input[at..]) {
        assert!(used > 0 && used <= input.len() - at, "{reply:?}");
        at += used;
    }
    let mut at = 0;
    while let Ok(Some((used, reply))) = client::option_reply(&input[at..]) {
        assert!(used > 0 && used <= input.len() - at, "{reply:?}");
        at += used;
    }
}
