//! The haggling over options: parse, answer, refuse with a reason.

use super::session::{Lookup, Phase, Progress, Session, Then, Violation, take};
use super::wire::*;
use super::{Event, ExportInfo, Refusal};

/// How much of an unknown export's name a refusal repeats.
const NAME_SHOWN_CHARS: usize = 80;

/// Appends one reply to an option.
fn reply(option: u32, kind: u32, data: &[&[u8]], out: &mut Vec<u8>) {
    let bytes: usize = data.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(bytes as u32).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

fn ack(option: u32, out: &mut Vec<u8>) {
    reply(option, rep::ACK, &[], out);
}

fn refuse(option: u32, kind: u32, text: &str, out: &mut Vec<u8>) {
    reply(option, kind, &[text.as_bytes()], out);
}

/// The answer to an option whose data was skipped.
pub(super) fn too_big(option: u32, out: &mut Vec<u8>) {
    refuse(option, rep::ERR_TOO_BIG, "the option's data is longer than 16 KiB", out);
}

/// The answer to `NBD_OPT_LIST`.
pub(super) fn list(exports: &[(String, String)], out: &mut Vec<u8>) {
    for (name, description) in exports {
        let length = (name.len() as u32).to_be_bytes();
        reply(opt::LIST, rep::SERVER, &[&length, name.as_bytes(), description.as_bytes()], out);
    }
    ack(opt::LIST, out);
}

/// Walks through an option's data; every step fails when the data is too short.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn u16(&mut self) -> Option<u16> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_be_bytes(*head))
    }
    fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*head))
    }
    fn string(&mut self) -> Option<&'a str> {
        let bytes = self.u32()? as usize;
        let (head, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        valid_name(head)
    }
    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// A string as the protocol has it: UTF-8 without NUL, of at most 4,096 bytes.
fn valid_name(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > NAME_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    core::str::from_utf8(bytes).ok()
}

/// `NBD_OPT_INFO` and `NBD_OPT_GO`: a name and the kinds of information wanted.
fn parse_info(data: &[u8], go: bool) -> Option<(String, Lookup)> {
    let mut reader = Reader(data);
    let name = reader.string()?.to_owned();
    let (mut wants_name, mut wants_description) = (false, false);
    for _ in 0..reader.u16()? {
        match reader.u16()? {
            info::NAME => wants_name = true,
            info::DESCRIPTION => wants_description = true,
            _ => {}
        }
    }
    reader.end()?;
    Some((name, Lookup::Info { go, name: wants_name, description: wants_description }))
}

/// The meta context options: a name and queries.
fn parse_meta(data: &[u8], set: bool) -> Option<(String, Lookup)> {
    let mut reader = Reader(data);
    let name = reader.string()?.to_owned();
    let queries = reader.u32()?;
    // Without a query, LIST means all and SET means none.
    let mut found = queries == 0 && !set;
    for _ in 0..queries {
        let query = reader.string()?;
        found |= query == BASE_ALLOCATION || (!set && query == "base:");
    }
    reader.end()?;
    Some((name, Lookup::Meta { set, found }))
}

impl Session {
    pub(super) fn option(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let Some(head) = take::<OPTION_HEADER_BYTES>(input, 0) else {
            return Ok(Progress::default());
        };
        let magic = u64::from_be_bytes(take(&head, 0).expect("8 of 16"));
        let option = u32::from_be_bytes(take(&head, 8).expect("4 of 16"));
        let bytes = u32::from_be_bytes(take(&head, 12).expect("4 of 16"));
        self.check_option(magic, option, bytes)?;
        if bytes as usize > OPTION_BYTES_MAX {
            self.options += 1;
            self.phase = Phase::Skip { left: bytes.into(), then: Then::TooBig { option } };
            return Ok(Progress { used: OPTION_HEADER_BYTES, event: None });
        }
        let used = OPTION_HEADER_BYTES + bytes as usize;
        let Some(data) = input.get(OPTION_HEADER_BYTES..used) else {
            return Ok(Progress::default());
        };
        self.options += 1;
        let event = self.answer_option(option, data, out)?;
        Ok(Progress { used, event })
    }
    fn check_option(&self, magic: u64, option: u32, bytes: u32) -> Result<(), Violation> {
        if magic != OPTION_MAGIC {
            return Err(Violation::OptionMagic(magic));
        }
        if self.options >= OPTIONS_MAX {
            return Err(Violation::Options);
        }
        if !self.fixed && option != opt::EXPORT_NAME {
            return Err(Violation::NotFixed(option));
        }
        // A refusal of EXPORT_NAME can only be told by closing.
        let limit = if option == opt::EXPORT_NAME { NAME_BYTES_MAX as u32 } else { OPTION_SKIP_BYTES_MAX };
        if bytes > limit {
            return Err(Violation::OptionLength { option, bytes });
        }
        Ok(())
    }
    fn answer_option(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event>, Violation> {
        if self.stopping && option != opt::ABORT && option != opt::EXPORT_NAME {
            refuse(option, rep::ERR_SHUTDOWN, "the server is shutting down", out);
            return Ok(None);
        }
        let parsed = match option {
            opt::EXPORT_NAME => return self.export_name(data).map(Some),
            opt::ABORT => {
                ack(option, out);
                self.phase = Phase::Ended;
                return Ok(Some(Event::Disconnect));
            }
            opt::LIST | opt::STRUCTURED_REPLY if !data.is_empty() => None,
            opt::LIST => {
                self.phase = Phase::List;
                return Ok(Some(Event::List));
            }
            opt::STRUCTURED_REPLY => {
                self.structured = true;
                ack(option, out);
                return Ok(None);
            }
            opt::INFO | opt::GO => parse_info(data, option == opt::GO),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => {
                return Ok(self.meta_context(option, data, out));
            }
            _ => {
                refuse(option, rep::ERR_UNSUP, unsupported(option), out);
                return Ok(None);
            }
        };
        Ok(self.ask(option, parsed, out))
    }
    fn export_name(&mut self, data: &[u8]) -> Result<Event, Violation> {
        let lossy = || String::from_utf8_lossy(&data[..data.len().min(64)]).into_owned();
        if self.stopping {
            return Err(Violation::Export(lossy()));
        }
        let name = valid_name(data).ok_or_else(|| Violation::Export(lossy()))?.to_owned();
        self.phase = Phase::Lookup { name: name.clone(), lookup: Lookup::ExportName };
        Ok(Event::Export { name })
    }
    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Option<Event> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Even a request that fails undoes an earlier selection.
            self.meta = None;
        }
        if !self.structured {
            refuse(option, rep::ERR_INVALID, "structured replies must be negotiated first", out);
            return None;
        }
        self.ask(option, parse_meta(data, set), out)
    }
    fn ask(&mut self, option: u32, parsed: Option<(String, Lookup)>, out: &mut Vec<u8>) -> Option<Event> {
        let Some((name, lookup)) = parsed else {
            refuse(option, rep::ERR_INVALID, "the option's data is malformed", out);
            return None;
        };
        self.phase = Phase::Lookup { name: name.clone(), lookup };
        Some(Event::Export { name })
    }
    pub(super) fn looked_up(
        &mut self,
        asked: String,
        lookup: Lookup,
        answer: Result<ExportInfo, Refusal>,
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let export = match (answer, &lookup) {
            (Ok(export), _) => export,
            (Err(_), Lookup::ExportName) => return Err(Violation::Export(asked)),
            (Err(refusal), _) => {
                refuse_export(lookup.option(), &asked, &refusal, out);
                return Ok(());
            }
        };
        match lookup {
            Lookup::ExportName => self.attach_by_name(export, out),
            Lookup::Info { go, name, description } => self.inform(export, go, name, description, out),
            Lookup::Meta { set, found } => self.answer_meta(&export, set, found, out),
        }
        Ok(())
    }
    fn attach_by_name(&mut self, export: ExportInfo, out: &mut Vec<u8>) {
        out.extend_from_slice(&export.bytes.to_be_bytes());
        out.extend_from_slice(&self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.export = Some(export);
        self.phase = Phase::Attaching;
    }
    fn inform(&mut self, export: ExportInfo, go: bool, name: bool, description: bool, out: &mut Vec<u8>) {
        let option = if go { opt::GO } else { opt::INFO };
        let (bytes, flags) = (export.bytes.to_be_bytes(), self.flags(&export).to_be_bytes());
        reply(option, rep::INFO, &[&info::EXPORT.to_be_bytes(), &bytes, &flags], out);
        if name {
            reply(option, rep::INFO, &[&info::NAME.to_be_bytes(), export.name.as_bytes()], out);
        }
        if description && !export.description.is_empty() {
            let text = export.description.as_bytes();
            reply(option, rep::INFO, &[&info::DESCRIPTION.to_be_bytes(), text], out);
        }
        let minimum = export.block_bytes.to_be_bytes();
        let preferred = PREFERRED_BLOCK_BYTES.max(export.block_bytes).to_be_bytes();
        let maximum = PAYLOAD_BYTES_MAX.to_be_bytes();
        // Sent unasked too: a client that can use it should not have to know that it must ask.
        reply(option, rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), &minimum, &preferred, &maximum], out);
        ack(option, out);
        if go {
            self.export = Some(export);
            self.phase = Phase::Attaching;
        }
    }
    fn answer_meta(&mut self, export: &ExportInfo, set: bool, found: bool, out: &mut Vec<u8>) {
        let option = if set { opt::SET_META_CONTEXT } else { opt::LIST_META_CONTEXT };
        if found {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            reply(option, rep::META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()], out);
        }
        if set && found {
            self.meta = Some(export.id);
        }
        ack(option, out);
    }
    fn flags(&self, export: &ExportInfo) -> u16 {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE
            | flag::SEND_FAST_ZERO;
        if self.structured {
            flags |= flag::SEND_DF;
        }
        if export.read_only {
            flags |= flag::READ_ONLY;
        }
        flags
    }
}

impl Lookup {
    fn option(&self) -> u32 {
        match self {
            Lookup::ExportName => opt::EXPORT_NAME,
            Lookup::Info { go: true, .. } => opt::GO,
            Lookup::Info { go: false, .. } => opt::INFO,
            Lookup::Meta { set: true, .. } => opt::SET_META_CONTEXT,
            Lookup::Meta { set: false, .. } => opt::LIST_META_CONTEXT,
        }
    }
}

fn refuse_export(option: u32, asked: &str, refusal: &Refusal, out: &mut Vec<u8>) {
    match refusal {
        Refusal::Unknown => refuse(option, rep::ERR_UNKNOWN, &unknown_export(asked), out),
        Refusal::Policy(text) => refuse(option, rep::ERR_POLICY, text, out),
        Refusal::Shutdown => refuse(option, rep::ERR_SHUTDOWN, "the server is shutting down", out),
    }
}

fn unknown_export(asked: &str) -> String {
    if asked.is_empty() {
        return "no export was named, and there is no default; `nbdinfo --list` shows the names".to_owned();
    }
    // A name has up to 4,096 bytes, which is all that a reply's text may have.
    let (end, dots) =
        asked.char_indices().nth(NAME_SHOWN_CHARS).map_or((asked.len(), ""), |(at, _)| (at, "..."));
    format!("no export is named {:?}{dots}; `nbdinfo --list` shows the names", &asked[..end])
}

fn unsupported(option: u32) -> &'static str {
    match option {
        opt::STARTTLS => "TLS is not offered by this server",
        opt::EXTENDED_HEADERS => "extended headers are not offered by this server",
        _ => "unknown option",
    }
}
