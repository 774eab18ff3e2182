//! NVMe/TCP: the controller's PDUs and commands, and what our own initiator reads.

use super::{Dice, Target, in_two};
use protocol::nvme_tcp::command::{self, Namespace};
use protocol::nvme_tcp::controller::{Answer, Controllers, Out, View, Volume};
use protocol::nvme_tcp::host::{Host, connect_data};
use protocol::nvme_tcp::pdu::Digests;
use protocol::nvme_tcp::wire::{admin, io};
use protocol::nvme_tcp::{Event, Session, Sqe, Status, Violation, identify};
use protocol::types::{Time, VolumeId};

/// A host that connects to us.
pub const CONTROLLER: Target = Target {
    name: "nvme-controller",
    about: "PDUs of NVMe/TCP, commands of admin and IO queues",
    bytes_max: 16 << 10,
    memory_max: |bytes| (2 << 20) + 64 * bytes,
    make: conversation,
    run: |input| {
        let Some((style, input)) = input.split_first() else { return };
        let cut = crc32c::crc32c(input) as usize % (input.len() + 1);
        let (whole, cut) = (spoken(*style, input, input.len()), spoken(*style, input, cut));
        assert_eq!((&whole.events, &whole.end), (&cut.events, &cut.end));
    },
};

/// A controller that answers our initiator.
pub const HOST: Target = Target {
    name: "nvme-host",
    about: "what the NVMe/TCP initiator of tests and benches reads",
    bytes_max: 8 << 10,
    memory_max: |bytes| (64 << 10) + 8 * bytes,
    make: |dice| {
        let input = conversation(dice);
        let mut out = spoken(input[0], &input[1..], usize::MAX).out;
        out.insert(0, input[0]);
        out
    },
    run: |input| {
        let Some((style, input)) = input.split_first() else { return };
        let mut host = Host { digests: Digests::from_bits(style & 3), ..Host::default() };
        let mut at = 0;
        while let Ok(Some((used, event))) = host.feed(&input[at..]) {
            assert!(used > 0 && used <= input.len() - at, "{event:?}");
            at += used;
        }
    },
};

const NAMESPACE: Namespace = Namespace { volume: VolumeId(7), bytes: 1 << 30, block_bytes: 512 };
const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:0";

fn view() -> View {
    let mut view = View { cluster: [3; 16], generation: 1, target: 1, ..View::default() };
    view.ports.push((1, "127.0.0.1:4420".parse().expect("an address")));
    view.volumes.push(Volume {
        name: "vol0".into(),
        namespace: NAMESPACE,
        allowed_hosts: Default::default(),
        session: Default::default(),
    });
    view
}

/// A session, what it is connected to, and all that it said.
struct Talk {
    session: Session,
    controllers: Controllers,
    /// Data under way: bytes still to come, and those that came.
    left: usize,
    data: Vec<u8>,
    /// Executed once its data is whole.
    pending: Option<Sqe>,
    /// Commands whose data was asked for, by tag.
    asked: Vec<Sqe>,
    events: Vec<Event>,
    out: Vec<u8>,
    end: Option<Violation>,
}

fn spoken(style: u8, input: &[u8], cut: usize) -> Talk {
    let mut controllers = Controllers::new();
    controllers.set_view(view());
    let mut talk = Talk {
        session: Session::new(),
        controllers,
        left: 0,
        data: Vec::new(),
        pending: None,
        asked: Vec::new(),
        events: Vec::new(),
        out: Vec::new(),
        end: None,
    };
    if style & 0xc0 != 0 {
        in_two(&opening(style), usize::MAX, |bytes| talk.step(bytes));
        assert!(talk.end.is_none() && talk.session.is_connected() == (style & 0x80 != 0), "{:?}", talk.end);
        talk.out.clear();
    }
    in_two(input, cut, |bytes| talk.step(bytes));
    talk
}

fn host(style: u8) -> Host {
    Host { digests: Digests::from_bits(if style & 0xc0 == 0 { 0 } else { style & 3 }), ..Host::default() }
}

/// ICReq; with style 0x80 also Connect of an admin queue, which 0xc0 enables.
fn opening(style: u8) -> Vec<u8> {
    let (host, mut out) = (host(style), Vec::new());
    Host::default().ic_req(host.digests, 0, 3, &mut out);
    if style & 0x80 != 0 {
        let subsystem = identify::nqn(&[3; 16], "vol0");
        let sqe = Sqe::connect(9, 0, 32, 0);
        host.command(&sqe, &connect_data([1; 16], u16::MAX, &subsystem, HOST_NQN), &mut out);
    }
    if style & 0x40 != 0 {
        host.command(&Sqe::property_set(8, 0x14, 0x0046_0001), &[], &mut out);
    }
    out
}

impl Talk {
    fn step(&mut self, bytes: &[u8]) -> (usize, bool) {
        if self.left > 0 {
            let taken = bytes.len().min(self.left);
            self.data.extend_from_slice(&bytes[..taken]);
            self.left -= taken;
            if self.left == 0 {
                self.session.payload_taken(Some(crc32c::crc32c(&self.data)));
            }
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
                    self.happened(&event);
                    self.events.push(event);
                }
                (progress.used, again)
            }
        }
    }
    fn happened(&mut self, event: &Event) {
        match *event {
            Event::Command { sqe, io, out_bytes, inline } => {
                if let Some(request) = io {
                    let end = request.offset.checked_add(request.length.into()).expect("no wrap");
                    assert!(end <= NAMESPACE.bytes, "{request:?}");
                }
                match out_bytes {
                    0 => self.execute(&sqe),
                    bytes if inline => self.expect(bytes, Some(sqe)),
                    bytes => self.ask(sqe, bytes),
                }
            }
            Event::Data { length, tag, offset, last, .. } => {
                assert!(offset.checked_add(length).is_some());
                let sqe = self.asked[tag as usize];
                self.expect(length, last.then_some(sqe));
            }
            Event::PayloadEnd { .. } => {
                if let Some(sqe) = self.pending.take() {
                    self.execute(&sqe);
                }
            }
        }
    }
    fn expect(&mut self, bytes: u32, then: Option<Sqe>) {
        (self.left, self.pending) = (bytes as usize, then);
        self.data.clear();
    }
    fn ask(&mut self, sqe: Sqe, bytes: u32) {
        assert!(bytes <= 1 << 20, "a command has {bytes} bytes of data for us");
        let tag = self.asked.len() as u32;
        self.asked.push(sqe);
        assert!(self.session.ask(sqe.cid(), tag, 0, bytes, &mut self.out).is_some(), "a place is free");
    }
    fn execute(&mut self, sqe: &Sqe) {
        let (session, out) = (&mut self.session, &mut self.out);
        if !session.is_connected() {
            session.connecting();
            match self.controllers.connect(0, sqe, &self.data, Time(1)) {
                Ok(to) => session.connected(sqe, to.admin, to.namespace, to.cntlid, out),
                Err((status, result)) => session.respond(sqe.cid(), status, result.into(), out),
            }
        } else if session.is_admin() {
            let data = std::mem::take(&mut self.data);
            if let Answer::Done { status, result, data } = self.controllers.admin(0, sqe, &data, Time(1)) {
                assert!(data.len() <= 1 << 20);
                session.respond(sqe.cid(), status, result, out);
            }
        } else {
            if sqe.opcode() == io::DSM {
                let _ = command::ranges(&self.data, 256, &NAMESPACE);
            }
            session.respond(sqe.cid(), Status::SUCCESS, 0, out);
        }
        while let Some(what) = self.controllers.poll() {
            if let Out::Complete { cid, status, result, .. } = what {
                self.session.respond(cid, status, result, &mut self.out);
            }
        }
    }
}

fn conversation(dice: &mut Dice) -> Vec<u8> {
    let style = dice.roll() as u8;
    let (host, mut out) = (host(style), vec![style]);
    if style & 0xc0 == 0 {
        out.extend_from_slice(&opening(0xc0));
    }
    for cid in 0..dice.below(8) as u16 {
        let opcode =
            dice.pick(&[admin::IDENTIFY, admin::GET_LOG_PAGE, admin::SET_FEATURES, admin::GET_FEATURES]);
        let mut data = Vec::new();
        let sqe = match dice.below(9) {
            0 => Sqe::property_get(cid, dice.pick(&[0, 8, 0x14, 0x1c, 0x24, 5]), dice.percent(50)),
            1 => Sqe::property_set(cid, dice.pick(&[0x14, 0x1c]), dice.odd() as u32),
            2 => Sqe::new(admin::ASYNC_EVENT, cid, 0),
            3 => Sqe::new(dice.odd() as u8, cid, dice.odd() as u32),
            4 => {
                data = dice.bytes(64);
                Sqe::new(opcode, cid, 1).with_data(data.len() as u32, true)
            }
            _ => {
                let (ten, eleven) = (dice.odd() as u32, dice.odd() as u32);
                let small = dice.below(0x90) as u32;
                Sqe::new(opcode, cid, dice.pick(&[0, 1, u32::MAX]))
                    .with(10, if dice.percent(70) { small } else { ten })
                    .with(11, if dice.percent(70) { 0 } else { eleven })
                    .with_data(4096, false)
            }
        };
        host.command(&sqe, &data, &mut out);
    }
    out
}
