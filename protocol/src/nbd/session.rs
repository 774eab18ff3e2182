//! One client's session: phases, and the check of every request.
//!
//! Invariants: bytes are used strictly in order; a session that returned a [`Violation`] or
//! ended uses nothing more; a refused request is answered here and leaves the stream in step
//! (a refused write's payload is skipped first, then answered).

use super::reply;
use super::wire::*;
use super::{Command, Event, ExportInfo, Refusal, Request};

/// Why a connection cannot go on. Whatever was written to `out` before may still be sent.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// Flags that were not offered.
    #[error("client sent unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// An option without its magic.
    #[error("option magic is {0:#x}")]
    OptionMagic(u64),
    /// An option so long that it is not even skipped.
    #[error("option {option} has {bytes} bytes of data, more than {OPTION_SKIP_BYTES_MAX}")]
    OptionLength {
        /// Which.
        option: u32,
        /// As told.
        bytes: u32,
    },
    /// More than [`OPTIONS_MAX`] options.
    #[error("more than {OPTIONS_MAX} options in one negotiation")]
    Options,
    /// An option other than `EXPORT_NAME` from a client that does not speak fixed newstyle.
    #[error("option {0} from a client without fixed newstyle")]
    NotFixed(u32),
    /// `EXPORT_NAME` cannot be refused in any other way.
    #[error("export {0:?} is not offered")]
    Export(String),
    /// A request without its magic.
    #[error("request magic is {0:#x}")]
    RequestMagic(u32),
    /// A write so long that it is not even skipped.
    #[error("write of {0} bytes, more than {PAYLOAD_SKIP_BYTES_MAX}")]
    PayloadLength(u32),
}

/// What one [`Session::feed`] did. No bytes used and no event: it needs more bytes, or an answer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Bytes of the input that are done with.
    pub used: usize,
    /// What they meant, if that concerns the caller.
    pub event: Option<Event>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    ClientFlags,
    Options,
    /// An export's name was asked of the caller, for this.
    Lookup {
        name: String,
        lookup: Lookup,
    },
    /// A list was asked of the caller.
    List,
    /// Bytes to be thrown away.
    Skip {
        left: u64,
        then: Then,
    },
    /// Everything is agreed; the next feed tells the caller.
    Attaching,
    Transmission,
    Ended,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Lookup {
    ExportName,
    Info { go: bool, name: bool, description: bool },
    Meta { set: bool, found: bool },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Then {
    TooBig { option: u32 },
    Refuse { cookie: u64, error: NbdError, text: &'static str },
}

/// The server's side of one connection. Call [`Session::greeting`] once, then [`Session::feed`]
/// with what has arrived and is not used yet, as often as it makes progress.
#[derive(Debug)]
pub struct Session {
    pub(super) phase: Phase,
    pub(super) fixed: bool,
    pub(super) no_zeroes: bool,
    pub(super) structured: bool,
    /// The export whose `base:allocation` was selected.
    pub(super) meta: Option<u64>,
    pub(super) options: u32,
    pub(super) export: Option<ExportInfo>,
    pub(super) stopping: bool,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A client has just connected.
    pub fn new() -> Self {
        Self {
            phase: Phase::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            meta: None,
            options: 0,
            export: None,
            stopping: false,
        }
    }
    /// The first bytes that a client gets.
    pub fn greeting(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    }
    /// Whether reads must be answered in chunks.
    pub fn structured(&self) -> bool {
        self.structured
    }
    /// The export in use, once attached.
    pub fn export(&self) -> Option<&ExportInfo> {
        self.export.as_ref().filter(|_| matches!(self.phase, Phase::Transmission | Phase::Skip { .. }))
    }
    /// Whether an answer of the caller is awaited.
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Lookup { .. } | Phase::List)
    }
    /// From now on everything is refused because the server is stopping.
    pub fn stop(&mut self) {
        self.stopping = true;
    }
    /// Takes one step. `input` is what has arrived from the first unused byte on; offer at least
    /// [`FEED_BYTES_MAX`] of it if so much is there. Answers are appended to `out`.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let result = match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Options => self.option(input, out),
            Phase::Skip { left, .. } => Ok(self.skip(left, input, out)),
            Phase::Attaching => Ok(self.attached()),
            Phase::Transmission => self.request(input, out),
            Phase::Lookup { .. } | Phase::List | Phase::Ended => Ok(Progress::default()),
        };
        if result.is_err() {
            self.phase = Phase::Ended;
        }
        result
    }
    /// Answers [`Event::Export`].
    pub fn answer_export(
        &mut self,
        answer: Result<ExportInfo, Refusal>,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let Phase::Lookup { name, lookup } = core::mem::replace(&mut self.phase, Phase::Options) else {
            panic!("no export was asked for");
        };
        let result = self.looked_up(name, lookup, answer, out);
        if result.is_err() {
            self.phase = Phase::Ended;
        }
        result
    }
    /// Answers [`Event::List`] with (name, description).
    pub fn answer_list(&mut self, exports: &[(String, String)], out: &mut Vec<u8>) {
        assert_eq!(self.phase, Phase::List, "no list was asked for");
        self.phase = Phase::Options;
        super::options::list(exports, out);
    }
    fn client_flags(&mut self, input: &[u8]) -> Result<Progress, Violation> {
        let Some(flags) = take::<4>(input, 0).map(u32::from_be_bytes) else {
            return Ok(Progress::default());
        };
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(Violation::ClientFlags(flags));
        }
        self.fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        self.phase = Phase::Options;
        Ok(Progress { used: 4, event: None })
    }
    fn skip(&mut self, left: u64, input: &[u8], out: &mut Vec<u8>) -> Progress {
        let used = left.min(input.len() as u64);
        let Phase::Skip { left, .. } = &mut self.phase else { unreachable!("asked in feed") };
        *left -= used;
        if *left == 0 {
            self.skipped(out);
        }
        Progress { used: used as usize, event: None }
    }
    fn skipped(&mut self, out: &mut Vec<u8>) {
        let Phase::Skip { then, .. } = core::mem::replace(&mut self.phase, Phase::Options) else {
            unreachable!("asked in skip")
        };
        match then {
            Then::TooBig { option } => super::options::too_big(option, out),
            Then::Refuse { cookie, error, text } => {
                self.phase = Phase::Transmission;
                reply::error(self.structured, cookie, error, text, out);
            }
        }
    }
    fn attached(&mut self) -> Progress {
        self.phase = Phase::Transmission;
        let export = self.export.clone().expect("set before the phase");
        // A selection made for another export does not count.
        self.meta = self.meta.filter(|&id| id == export.id);
        Progress { used: 0, event: Some(Event::Attached(export)) }
    }
    fn request(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let Some(head) = take::<REQUEST_BYTES>(input, 0) else {
            return Ok(Progress::default());
        };
        let raw = Raw::parse(&head);
        if raw.magic != REQUEST_MAGIC {
            return Err(Violation::RequestMagic(raw.magic));
        }
        let mut progress = Progress { used: REQUEST_BYTES, event: None };
        if raw.kind == cmd::DISC {
            self.phase = Phase::Ended;
            progress.event = Some(Event::Disconnect);
            return Ok(progress);
        }
        match self.check(&raw) {
            Ok(request) => progress.event = Some(Event::Request(request)),
            Err((error, text)) => self.refuse(&raw, error, text, out)?,
        }
        Ok(progress)
    }
    fn refuse(
        &mut self,
        raw: &Raw,
        error: NbdError,
        text: &'static str,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let cookie = raw.cookie;
        if raw.kind == cmd::WRITE && raw.length > 0 {
            if raw.length > PAYLOAD_SKIP_BYTES_MAX {
                return Err(Violation::PayloadLength(raw.length));
            }
            let then = Then::Refuse { cookie, error, text };
            self.phase = Phase::Skip { left: raw.length.into(), then };
        } else {
            reply::error(self.structured, cookie, error, text, out);
        }
        Ok(())
    }
    fn check(&self, raw: &Raw) -> Result<Request, (NbdError, &'static str)> {
        if self.stopping {
            return Err((NbdError::Shutdown, "the server is shutting down"));
        }
        let command = self.command(raw)?;
        if command == Command::Flush {
            if raw.offset != 0 || raw.length != 0 {
                return Err((NbdError::Invalid, "a flush takes no offset and no length"));
            }
        } else {
            self.check_range(raw)?;
        }
        Ok(Request {
            cookie: raw.cookie,
            command,
            offset: raw.offset,
            length: raw.length,
            fua: raw.flags & cmd_flag::FUA != 0,
        })
    }
    fn command(&self, raw: &Raw) -> Result<Command, (NbdError, &'static str)> {
        use cmd_flag::*;
        let (command, allowed) = match raw.kind {
            cmd::READ => {
                (Command::Read { df: raw.flags & DF != 0 }, if self.structured { FUA | DF } else { FUA })
            }
            cmd::WRITE => (Command::Write, FUA),
            cmd::FLUSH => (Command::Flush, FUA),
            cmd::TRIM => (Command::Trim, FUA),
            cmd::CACHE => (Command::Cache, FUA),
            cmd::WRITE_ZEROES => {
                let (no_hole, fast) = (raw.flags & NO_HOLE != 0, raw.flags & FAST_ZERO != 0);
                (Command::WriteZeroes { no_hole, fast }, FUA | NO_HOLE | FAST_ZERO)
            }
            cmd::BLOCK_STATUS if self.meta.is_none() => {
                return Err((NbdError::Invalid, "no meta context was selected for this export"));
            }
            cmd::BLOCK_STATUS => (Command::BlockStatus { one: raw.flags & REQ_ONE != 0 }, FUA | REQ_ONE),
            _ => return Err((NbdError::Invalid, "unknown request type")),
        };
        if raw.flags & !allowed != 0 {
            return Err((NbdError::Invalid, "a flag that this request does not take"));
        }
        Ok(command)
    }
    fn check_range(&self, raw: &Raw) -> Result<(), (NbdError, &'static str)> {
        let export = self.export.as_ref().expect("in transmission");
        let writes = matches!(raw.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if writes && export.read_only {
            return Err((NbdError::NotPermitted, "the export is read-only"));
        }
        if raw.length == 0 {
            return Err((NbdError::Invalid, "length 0"));
        }
        if matches!(raw.kind, cmd::READ | cmd::WRITE) && raw.length > PAYLOAD_BYTES_MAX {
            return Err((NbdError::Invalid, "longer than the maximum block size, 32 MiB"));
        }
        if raw.offset.checked_add(raw.length.into()).is_none_or(|end| end > export.bytes) {
            let grows = matches!(raw.kind, cmd::WRITE | cmd::WRITE_ZEROES);
            let error = if grows { NbdError::NoSpace } else { NbdError::Invalid };
            return Err((error, "beyond the end of the export"));
        }
        let block = export.block_bytes;
        if !raw.offset.is_multiple_of(block.into()) || !raw.length.is_multiple_of(block) {
            return Err((NbdError::Invalid, "offset or length is no multiple of the minimum block size"));
        }
        Ok(())
    }
}

/// A request as it came.
struct Raw {
    magic: u32,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Raw {
    fn parse(head: &[u8; REQUEST_BYTES]) -> Self {
        Self {
            magic: u32::from_be_bytes(at(head, 0)),
            flags: u16::from_be_bytes(at(head, 4)),
            kind: u16::from_be_bytes(at(head, 6)),
            cookie: u64::from_be_bytes(at(head, 8)),
            offset: u64::from_be_bytes(at(head, 16)),
            length: u32::from_be_bytes(at(head, 24)),
        }
    }
}

fn at<const N: usize>(head: &[u8; REQUEST_BYTES], from: usize) -> [u8; N] {
    head[from..from + N].try_into().expect("N bytes")
}

/// `N` bytes from a position on, if they are there.
pub(super) fn take<const N: usize>(bytes: &[u8], from: usize) -> Option<[u8; N]> {
    bytes.get(from..)?.first_chunk::<N>().copied()
}
