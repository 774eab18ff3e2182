//! A host: an NBD client that keeps requests in flight, notes every one of them, and goes to
//! another target when its connection breaks.
//!
//! What it writes tells by itself who wrote it and where it belongs: 16 bytes again and again,
//! the value and the unit. So a torn or misplaced unit is seen the moment it is read.

use super::fleet::{addresses, volume_name};
use super::history::{History, Register, Ticket};
use super::mds_operator::Notice;
use super::sessions::{TakeOvers, holder};
use super::{Draw, Failure, Mix};
use protocol::nbd::client::{self, Reply};
use protocol::nbd::wire::{FIXED_NEWSTYLE, GREETING_BYTES, NO_ZEROES, chunk, cmd, cmd_flag, opt, rep};
use protocol::types::{BLOCK_BYTES, CHUNK_BYTES, Span, Time};
use reactor::sim::{SimReactor, SimWorld};
use reactor::{Addr, Completion, IoBuf, IoList, Op, Output, Reactor, Socket};
use rustc_hash::FxHashSet;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const CONNECT: u64 = 1;
const RECEIVE: u64 = 2;
const SEND: u64 = 3;
const CLOSE: u64 = 4;
/// Tokens name the connection that they belong to, so what an older one leaves behind is known.
const KINDS: u64 = 8;

/// The error number for "the server is stopping".
const SHUTDOWN: u32 = 108;
/// The error number of a host whose volume was taken over.
const NOT_PERMITTED: u32 = 1;
/// The error number for "no space left".
const NO_SPACE: u32 = 28;
/// Blocks of the buffer that is received into.
const RECEIVE_BLOCKS: usize = 16;

enum State {
    Idle { again_at: Time },
    Connecting,
    Greeting,
    Options,
    Attached,
}

enum What {
    Read,
    Write(Vec<Ticket>),
    Nothing,
}

struct Request {
    what: What,
    offset: u64,
    length: u32,
    begun: u64,
    /// Bytes of a read, as far as they have come.
    data: Vec<u8>,
    got: u64,
    error: u32,
    is_final: bool,
}

/// One host.
pub struct Host {
    reactor: SimReactor,
    draw: Draw,
    mix: Mix,
    number: usize,
    volume: usize,
    bytes: u64,
    unit: u64,
    windows: Vec<u64>,
    history: Rc<RefCell<History>>,
    busy: Rc<RefCell<FxHashSet<Register>>>,
    state: State,
    connection: u64,
    structured: bool,
    socket: Option<Socket>,
    inbox: Vec<u8>,
    requests: BTreeMap<u64, Request>,
    next_cookie: u64,
    next_at: Time,
    heard_at: Time,
    draining: bool,
    /// Its volume is there; where it is not yet, or not any more, nothing is asked.
    is_there: bool,
    /// Under which epoch it took its volume over last; it goes on under that though others have since.
    epoch: Option<u64>,
    /// It holds its volume, or hosts do not take turns at all.
    holds: bool,
    take_overs: Rc<RefCell<TakeOvers>>,
    /// Its volume is about to go: whatever is asked of it may fail.
    leaves: bool,
    /// Reads of the end of a run that are still to be made: offset and length.
    last_reads: Vec<(u64, u32)>,
    completions: Vec<Completion>,
    /// Requests answered without an error.
    pub acknowledged: u64,
    /// Requests whose fate it never learnt.
    pub unknown: u64,
    /// Errors that it was given.
    pub errors: u64,
}

thread_local! {
    /// Units with a write in flight, of the run on this thread; shared by its hosts.
    static BUSY: RefCell<Rc<RefCell<FxHashSet<Register>>>> = RefCell::default();
}

impl Host {
    /// A host on a node of its own.
    pub fn new(
        world: &SimWorld,
        node: usize,
        number: usize,
        mix: &Mix,
        history: Rc<RefCell<History>>,
        take_overs: Rc<RefCell<TakeOvers>>,
        seed: u64,
    ) -> Result<Self, Failure> {
        let reactor =
            world.start(node, 1 << 20).map_err(|error| Failure(format!("no reactor for a host: {error}")))?;
        if number == 0 {
            BUSY.set(Rc::default());
        }
        let volume = number % mix.volumes.len();
        let (bytes, block_bytes) = mix.volumes[volume];
        // All hosts of a volume use the same places.
        let mut places = Draw::new(seed ^ 0x706c_6163 ^ volume as u64);
        let (count, blocks) = mix.windows;
        let room = (bytes / BLOCK_BYTES as u64 - blocks) / 16;
        let mut windows: Vec<u64> = (0..count).map(|_| places.below(room) * 16).collect();
        windows.sort_unstable();
        windows.dedup();
        windows.iter_mut().for_each(|first| *first *= BLOCK_BYTES as u64);
        let now = reactor.now();
        let (mut mix, holds) = (mix.clone(), mix.take_overs.is_none());
        let is_there = mix.mds.is_none() && holds;
        if number < mix.readers {
            mix.reads_permille = 1000;
        }
        Ok(Self {
            draw: Draw::new(seed ^ (node as u64) << 32 ^ 0x686f_7374),
            mix,
            number,
            volume,
            bytes,
            unit: u64::from(block_bytes),
            windows,
            history,
            busy: BUSY.with_borrow(Rc::clone),
            state: State::Idle { again_at: now },
            connection: 0,
            structured: false,
            socket: None,
            inbox: Vec::new(),
            requests: BTreeMap::new(),
            next_cookie: 1,
            next_at: now,
            heard_at: now,
            draining: false,
            is_there,
            epoch: None,
            holds,
            take_overs,
            leaves: false,
            last_reads: Vec::new(),
            completions: Vec::new(),
            acknowledged: 0,
            unknown: 0,
            errors: 0,
            reactor,
        })
    }

    /// No new load from now on.
    pub fn drain(&mut self) {
        self.draining = true;
        self.reactor.waker().wake();
    }

    /// Its volume.
    pub fn volume(&self) -> usize {
        self.volume
    }

    /// Its volume comes or goes.
    pub fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::There(_) => self.is_there = true,
            Notice::Leaves(_) => self.leaves = true,
            Notice::Gone(_) => {
                self.is_there = false;
                // Whatever a connection under way still brings is of no interest.
                self.connection += 1;
                let now = self.reactor.now();
                self.give_up(now);
                // Reads that were under way are to be made again otherwise.
                self.last_reads.clear();
            }
        }
        self.reactor.waker().wake();
    }

    /// The volume was taken over: by this host under an epoch, or by another one, which this one is not told.
    pub fn hold(&mut self, epoch: Option<u64>) {
        self.holds = epoch.is_some();
        if epoch.is_some() {
            (self.epoch, self.is_there) = (epoch, true);
            // A connection belongs to the epoch that it was made under.
            let now = self.reactor.now();
            self.connection += 1;
            self.give_up(now);
        }
        self.reactor.waker().wake();
    }

    /// Reads all places of the volume once more.
    pub fn read_everything(&mut self) {
        if !self.is_there || self.leaves || !self.holds {
            return;
        }
        let bytes = self.mix.windows.1 * BLOCK_BYTES as u64;
        for window in &self.windows {
            for at in (*window..*window + bytes).step_by(64 << 10) {
                self.last_reads.push((at, (window + bytes - at).min(64 << 10) as u32));
            }
        }
        self.reactor.waker().wake();
    }

    /// Whether nothing is in flight or to be asked.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && (self.last_reads.is_empty() || !self.holds)
    }

    /// What it waits for.
    pub fn describe(&self) -> String {
        let waiting = self.requests.values().map(|r| {
            let kind = match r.what {
                What::Read => "read",
                What::Write(_) => "write",
                What::Nothing => "flush",
            };
            format!("{kind} {}+{} since {}", r.offset, r.length, r.begun)
        });
        let waiting: Vec<String> = waiting.collect();
        format!("host {} on {}: {}", self.number, volume_name(self.volume), waiting.join(", "))
    }

    /// One turn of its loop.
    pub fn turn(&mut self) -> Result<(), Failure> {
        let deadline = self.deadline();
        let mut completions = std::mem::take(&mut self.completions);
        self.reactor.turn(deadline, &mut completions);
        for completion in completions.drain(..) {
            self.completed(completion)?;
        }
        self.completions = completions;
        let now = self.reactor.now();
        if let State::Idle { again_at } = self.state
            && again_at <= now
            && self.is_there
            && !(self.draining && self.last_reads.is_empty())
        {
            self.connect();
        }
        if matches!(self.state, State::Attached) {
            let patience = self.mix.patience.filter(|_| !self.draining && !self.requests.is_empty());
            if patience.is_some_and(|patience| now - self.heard_at > patience) {
                self.give_up(now);
            } else {
                self.ask(now);
            }
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Time> {
        match self.state {
            State::Idle { .. } if !self.is_there => None,
            State::Idle { .. } if self.draining && self.last_reads.is_empty() => None,
            State::Idle { again_at } => Some(again_at),
            State::Attached => {
                let room = self.requests.len() < self.mix.depth;
                let next = (room && (!self.draining || !self.last_reads.is_empty())).then_some(self.next_at);
                let patience = self.mix.patience.filter(|_| !self.draining && !self.requests.is_empty());
                next.into_iter().chain(patience.map(|p| self.heard_at + p + Span(1))).min()
            }
            _ => None,
        }
    }

    fn token(&self, kind: u64) -> u64 {
        self.connection * KINDS + kind
    }

    fn connect(&mut self) {
        let shards = self.mix.targets * self.mix.shards;
        let node = self.draw.below(shards as u64) as usize;
        self.connection += 1;
        self.state = State::Connecting;
        let token = self.token(CONNECT);
        self.reactor.submit(token, Op::Connect { addr: Addr::Tcp(addresses(node).1) });
    }

    /// The connection is of no use any more; what was asked on it has an unknown fate.
    fn give_up(&mut self, now: Time) {
        if let Some(socket) = self.socket.take() {
            let token = self.token(CLOSE);
            self.reactor.submit(token, Op::Close { socket });
        }
        let pause = self.draw.between(1, 200);
        self.state = State::Idle { again_at: now + Span::ms(pause) };
        self.inbox.clear();
        for (_, request) in std::mem::take(&mut self.requests) {
            self.unknown += 1;
            // The units of a write stay busy: it may take effect at any time.
            if self.draining && matches!(request.what, What::Read) {
                self.last_reads.push((request.offset, request.length));
            }
        }
    }

    fn completed(&mut self, completion: Completion) -> Result<(), Failure> {
        let now = self.reactor.now();
        let (connection, kind) = (completion.token / KINDS, completion.token % KINDS);
        if connection != self.connection || kind == CLOSE {
            if let Ok(Output::Connected { socket }) = completion.result {
                let token = connection * KINDS + CLOSE;
                self.reactor.submit(token, Op::Close { socket });
            }
            return Ok(());
        }
        match (kind, completion.result) {
            (CONNECT, Ok(Output::Connected { socket })) => {
                self.socket = Some(socket);
                self.state = State::Greeting;
                self.heard_at = now;
                self.receive();
            }
            (RECEIVE, Ok(Output::Received(count))) if count > 0 && self.socket.is_some() => {
                let buf = completion.buf.expect("a receive gives its buffer back");
                self.inbox.extend_from_slice(&buf[..count as usize]);
                drop(buf);
                self.heard_at = now;
                self.look()?;
                if self.socket.is_some() {
                    self.receive();
                }
            }
            (SEND, Ok(_)) => {}
            _ if self.socket.is_some() || kind == CONNECT => self.give_up(now),
            _ => {}
        }
        Ok(())
    }

    fn receive(&mut self) {
        let (Some(socket), Some(buf)) = (self.socket, self.reactor.arena().alloc(RECEIVE_BLOCKS)) else {
            panic!("a host has memory for its one receive");
        };
        let (token, to) = (self.token(RECEIVE), buf.len() as u32);
        self.reactor.submit(token, Op::Recv { socket, buf, from: 0, to });
    }

    fn send(&mut self, bytes: &[u8]) {
        let Some(socket) = self.socket else { return };
        let bufs: IoList = std::iter::once(IoBuf::copy(bytes)).collect();
        let token = self.token(SEND);
        self.reactor.submit(token, Op::Send { socket, bufs });
    }

    /// Looks at what has come.
    fn look(&mut self) -> Result<(), Failure> {
        loop {
            let used = match self.state {
                State::Greeting => self.greeting(),
                State::Options => self.option()?,
                State::Attached => self.reply()?,
                _ => 0,
            };
            if used == 0 {
                return Ok(());
            }
            self.inbox.drain(..used);
        }
    }

    fn greeting(&mut self) -> usize {
        if self.inbox.len() < GREETING_BYTES {
            return 0;
        }
        let mut out = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        self.structured = self.draw.chance(700);
        if self.structured {
            client::option(opt::STRUCTURED_REPLY, &[], &mut out);
        }
        let name = volume_name(self.volume);
        let name = self.epoch.map_or(name.clone(), |epoch| format!("{name}@{}", holder(self.number, epoch)));
        client::info_option(opt::GO, &name, &[], &mut out);
        self.send(&out);
        self.state = State::Options;
        GREETING_BYTES
    }

    fn option(&mut self) -> Result<usize, Failure> {
        let parsed = client::option_reply(&self.inbox).map_err(|error| self.broken(&error.to_string()))?;
        let Some((used, reply)) = parsed else { return Ok(0) };
        if reply.kind == rep::ACK && reply.option == opt::GO {
            self.state = State::Attached;
            self.next_at = self.reactor.now();
        } else if reply.kind & (1 << 31) != 0 {
            // A target that has no map yet knows no volume: another one may.
            let now = self.reactor.now();
            self.give_up(now);
            return Ok(0);
        }
        Ok(used)
    }

    fn broken(&self, what: &str) -> Failure {
        Failure(format!("protocol: host {}: {what}", self.number))
    }

    fn reply(&mut self) -> Result<usize, Failure> {
        let parsed = client::reply(&self.inbox).map_err(|error| self.broken(&error.to_string()))?;
        let Some((mut used, reply)) = parsed else { return Ok(0) };
        let (Reply::Simple { cookie, .. } | Reply::Chunk { cookie, .. }) = reply;
        let Some(request) = self.requests.get_mut(&cookie) else {
            return Err(self.broken("an answer to nothing"));
        };
        match reply {
            Reply::Simple { error, .. } => {
                request.error = error;
                request.is_final = true;
                if error == 0 && matches!(request.what, What::Read) {
                    let end = used + request.length as usize;
                    let Some(data) = self.inbox.get(used..end) else { return Ok(0) };
                    request.data.copy_from_slice(data);
                    request.got = request.length.into();
                    used = end;
                }
            }
            Reply::Chunk { kind, done, data, .. } => {
                request.is_final = done;
                if !take_chunk(request, kind, &data) {
                    return Err(self.broken(&format!("chunk of kind {kind} with {} bytes", data.len())));
                }
            }
        }
        if request.is_final {
            let request = self.requests.remove(&cookie).expect("looked up above");
            self.answered(request)?;
        }
        Ok(used)
    }

    fn answered(&mut self, request: Request) -> Result<(), Failure> {
        let now = self.reactor.now();
        if request.error != 0 {
            self.errors += 1;
            if request.error == NOT_PERMITTED && self.epoch.is_some() {
                // As a lost connection, only that it knows; it does not believe it.
                return Ok(());
            }
            let no_space = request.error == NO_SPACE && self.mix.faults.has_little_space();
            if request.error == SHUTDOWN || no_space || self.leaves || self.mix.faults.has_bad_disk() {
                // Its fate is unknown, as with a lost connection.
                return Ok(());
            }
            return Err(Failure(format!(
                "errors: host {}: error {} for {}+{} though no disk is bad",
                self.number, request.error, request.offset, request.length
            )));
        }
        self.acknowledged += 1;
        match request.what {
            What::Nothing => Ok(()),
            What::Write(tickets) => {
                let mut history = self.history.borrow_mut();
                for ticket in tickets {
                    history.end_write(ticket, now.0);
                    self.busy.borrow_mut().remove(&ticket.register());
                }
                Ok(())
            }
            What::Read => self.check_read(&request, now),
        }
    }

    fn check_read(&mut self, request: &Request, now: Time) -> Result<(), Failure> {
        if request.got != u64::from(request.length) {
            return Err(self.broken("a read with bytes missing"));
        }
        let ended = self.epoch.and_then(|epoch| self.take_overs.borrow().ended(self.volume, epoch));
        if ended.is_some_and(|at| at.0 < request.begun) {
            return Err(Failure(format!(
                "fence: host {} was answered a read of epoch {:?} that it began at {}, though a take-over had returned at {ended:?}",
                self.number, self.epoch, request.begun
            )));
        }
        let first = request.offset / self.unit;
        for (n, bytes) in request.data.chunks(self.unit as usize).enumerate() {
            let unit = first + n as u64;
            let value = decode(unit, bytes).map_err(|what| {
                Failure(format!(
                    "content: host {}: volume {} unit {unit}: {what}; read from {} to {}",
                    self.number, self.volume, request.begun, now.0
                ))
            })?;
            let register = (self.volume as u32, unit);
            self.history.borrow_mut().read(register, value, request.begun, now.0);
        }
        Ok(())
    }

    // ---- load

    fn ask(&mut self, now: Time) {
        while self.requests.len() < self.mix.depth && self.next_at <= now {
            if let Some((offset, length)) = self.last_reads.pop() {
                self.read(offset, length, now);
                continue;
            }
            if self.draining {
                return;
            }
            self.ask_something(now);
            self.next_at = now + Span::us(self.draw.below(self.mix.think_us_max));
        }
    }

    /// Some units of some window.
    fn place(&mut self) -> (u64, u32) {
        let window = self.draw.of(&self.windows);
        let units = self.mix.windows.1 * BLOCK_BYTES as u64 / self.unit;
        let most = (self.mix.blocks_max * BLOCK_BYTES as u64 / self.unit).min(units);
        // Mostly short, sometimes as long as it may be.
        let most = if self.draw.chance(700) { most.min(3) } else { most };
        let count = self.draw.between(1, most);
        let first = self.draw.below(units - count + 1);
        (window + first * self.unit, (count * self.unit) as u32)
    }

    fn ask_something(&mut self, now: Time) {
        let dice = self.draw.below(1000);
        let (reads, zeroes, flushes) =
            (self.mix.reads_permille, self.mix.zeroes_permille, self.mix.flushes_permille);
        let (mut offset, mut length) = self.place();
        let is_zeroes = (reads + flushes..reads + flushes + zeroes).contains(&dice);
        // Nothing is drawn for it in the families that have none.
        if self.mix.discards_permille > 0 && is_zeroes && self.draw.chance(self.mix.discards_permille) {
            (offset, length) = self.discard(offset);
        }
        debug_assert!(offset + u64::from(length) <= self.bytes);
        if dice < reads {
            return self.read(offset, length, now);
        }
        if dice < reads + flushes {
            return self.request(cmd::FLUSH, 0, (0, 0), What::Nothing, &[], now);
        }
        let registers = self.registers(offset, length);
        if self.mix.exclusive {
            let mut busy = self.busy.borrow_mut();
            if registers.iter().any(|register| busy.contains(register)) {
                return;
            }
            busy.extend(&registers);
        }
        let fua = if self.draw.chance(100) { cmd_flag::FUA } else { 0 };
        if is_zeroes {
            let tickets = self.begin(&registers, 0, now);
            // A trim leaves parts of blocks as they are: only whole blocks may be trimmed here.
            let whole =
                offset.is_multiple_of(BLOCK_BYTES as u64) && length.is_multiple_of(BLOCK_BYTES as u32);
            let kind = if whole && self.draw.chance(500) { cmd::TRIM } else { cmd::WRITE_ZEROES };
            return self.request(kind, fua, (offset, length), What::Write(tickets), &[], now);
        }
        let value = self.history.borrow_mut().new_value();
        if let Some(epoch) = self.epoch {
            self.take_overs.borrow_mut().writes(value, epoch);
        }
        let tickets = self.begin(&registers, value, now);
        let mut data = Vec::with_capacity(length as usize);
        for (_, unit) in &registers {
            encode(*unit, value, self.unit as usize, &mut data);
        }
        self.request(cmd::WRITE, fua, (offset, length), What::Write(tickets), &data, now);
    }

    /// The chunk of a place, or half of it.
    fn discard(&mut self, offset: u64) -> (u64, u32) {
        let chunk = CHUNK_BYTES as u64;
        let base = offset / chunk * chunk;
        match self.draw.below(4) {
            0 => (base, CHUNK_BYTES as u32 / 2),
            1 => (base + chunk / 2, CHUNK_BYTES as u32 / 2),
            _ => (base, CHUNK_BYTES as u32),
        }
    }

    /// The units of a range that any host ever looks at.
    fn registers(&self, offset: u64, length: u32) -> Vec<Register> {
        let window = self.mix.windows.1 * BLOCK_BYTES as u64;
        let used = |unit: &u64| {
            let at = unit * self.unit;
            self.windows.iter().any(|first| (*first..*first + window).contains(&at))
        };
        let units = offset / self.unit..(offset + u64::from(length)) / self.unit;
        units.filter(used).map(|unit| (self.volume as u32, unit)).collect()
    }

    fn begin(&mut self, registers: &[Register], value: u64, now: Time) -> Vec<Ticket> {
        let mut history = self.history.borrow_mut();
        registers.iter().map(|register| history.begin_write(*register, value, now.0)).collect()
    }

    fn read(&mut self, offset: u64, length: u32, now: Time) {
        self.request(cmd::READ, 0, (offset, length), What::Read, &[], now);
    }

    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        (offset, length): (u64, u32),
        what: What,
        payload: &[u8],
        now: Time,
    ) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut out = Vec::with_capacity(32 + payload.len());
        client::request(kind, flags, cookie, offset, length, &mut out);
        out.extend_from_slice(payload);
        let data = if matches!(what, What::Read) { vec![0; length as usize] } else { Vec::new() };
        let request = Request { what, offset, length, begun: now.0, data, got: 0, error: 0, is_final: false };
        if self.requests.is_empty() {
            self.heard_at = now;
        }
        self.requests.insert(cookie, request);
        self.send(&out);
    }
}

/// Takes one chunk of a structured reply; false when it makes no sense.
fn take_chunk(request: &mut Request, kind: u16, data: &[u8]) -> bool {
    let place = |data: &[u8]| {
        let at = u64::from_be_bytes(data.get(..8)?.try_into().ok()?);
        at.checked_sub(request.offset)
    };
    match kind {
        chunk::NONE => data.is_empty(),
        chunk::OFFSET_DATA => {
            let Some(at) = place(data).map(|at| at as usize) else { return false };
            let bytes = &data[8..];
            let Some(into) = request.data.get_mut(at..at + bytes.len()) else { return false };
            into.copy_from_slice(bytes);
            request.got += bytes.len() as u64;
            true
        }
        chunk::OFFSET_HOLE => {
            let (Some(_), Some(length)) = (place(data), data.get(8..12)) else { return false };
            request.got += u64::from(u32::from_be_bytes(length.try_into().expect("4 bytes")));
            true
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            let Some(error) = data.get(..4) else { return false };
            request.error = u32::from_be_bytes(error.try_into().expect("4 bytes"));
            true
        }
        _ => false,
    }
}

fn encode(unit: u64, value: u64, bytes: usize, out: &mut Vec<u8>) {
    let mut lane = [0; 16];
    lane[..8].copy_from_slice(&value.to_le_bytes());
    lane[8..].copy_from_slice(&unit.to_le_bytes());
    let from = out.len();
    out.resize(from + bytes, 0);
    out[from..].chunks_exact_mut(16).for_each(|part| part.copy_from_slice(&lane));
}

/// The value that a unit holds; why it holds none.
fn decode(unit: u64, bytes: &[u8]) -> Result<u64, String> {
    let first = &bytes[..16];
    if bytes[16..] != bytes[..bytes.len() - 16] {
        let lanes: BTreeSet<u64> =
            bytes.chunks(16).map(|l| u64::from_le_bytes(l[..8].try_into().expect("8 bytes"))).collect();
        return Err(format!("torn: it holds parts of {lanes:?}"));
    }
    let value = u64::from_le_bytes(first[..8].try_into().expect("8 bytes"));
    let place = u64::from_le_bytes(first[8..].try_into().expect("8 bytes"));
    if value != 0 && place != unit {
        return Err(format!("misplaced: it holds {value} of unit {place}"));
    }
    if value == 0 && place != 0 {
        return Err(format!("neither zeroes nor data: {first:x?}"));
    }
    Ok(value)
}
